"""What tests/test_scale.py has two processes do: main() of a script, for each line of a file.

    torchrun --nproc_per_node 2 tests/two_processes.py LINES.json

The file is [[script, [flags], folder or null], …]. With a folder, `plain` is in force: nothing is
random but the batches and no weight is updated, so what is left over can be compared with one
process.
"""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS, call, mean_of, narrow_networks
from matplotlib.figure import Figure
from torch.distributions import Normal

import common


def nothing(*arguments, **options):
    """In place of evaluations and figures."""


def short(patch):
    """Narrow networks, one image timed, no figures: what these tests do not look at."""
    narrow_networks(patch)
    patch.setattr(common.seconds_to_sample, "__defaults__", (1, 0))
    for script in SCRIPTS:
        patch.setattr(f"{script}.save_figures", nothing)
        patch.setattr(f"{script}.draw_curves", nothing)


def unshifted(pixels):
    """In place of augmentation."""
    return pixels


def fixed_batch_norm(layer, h):
    """In place of batch norm in training: its averages stay as they are, and are used."""
    return F.batch_norm(h, layer.running_mean, layer.running_var, layer.weight, layer.bias)


def halves(x):
    return torch.full_like(x, 0.5)


def zeros(*shape, device=None):
    return torch.zeros(*shape, device=device)


@contextlib.contextmanager
def plain(folder):
    """Noise is its mean, images stay unshifted, batch norm and spectral norm stay as they are.

    An update only writes its gradients to `folder`. No evaluation and no figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed_noise = common.seed_noise

    def note(optimizer):
        rank, _ = common.processes()
        gradients = []
        for group in optimizer.param_groups:
            gradients += [p.grad for p in group["params"]]
        number = len(list(folder.glob(f"{rank}-*")))
        torch.save(gradients, folder / f"{rank}-{number}.pt")

    with pytest.MonkeyPatch.context() as patch:
        def no_noise(*numbers):
            """The first call comes after the networks and the queue are made."""
            seed_noise(*numbers)
            with open(folder / f"seeds-{common.processes()[0]}", "a", encoding="utf-8") as file:
                file.write(json.dumps(numbers) + "\n")
            spectral_norm = torch.nn.utils.parametrizations._SpectralNorm
            patch.setattr(spectral_norm, "_power_method", nothing)
            patch.setattr(torch, "rand_like", halves)
            patch.setattr(torch, "randn_like", torch.zeros_like)
            patch.setattr(torch, "randn", zeros)

        patch.setattr(Normal, "rsample", mean_of)
        patch.setattr(common, "augment", unshifted)
        patch.setattr(torch.nn.BatchNorm2d, "forward", fixed_batch_norm)
        patch.setattr(Figure, "savefig", nothing)
        for optimizer in (torch.optim.Adam, torch.optim.Adamax):
            patch.setattr(optimizer, "step", note)
        for script in SCRIPTS:
            patch.setattr(f"{script}.seed_noise", no_noise)
            patch.setattr(f"{script}.evaluate", nothing)
            patch.setattr(f"{script}.save_figures", nothing)
        patch.setattr(common, "seed_noise", no_noise)  # after the scripts, which import it by name
        yield


def main(lines):
    """-> the largest exit code of the calls, which are printed as a list."""
    common.join_processes("cpu")
    codes = []
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        for script, flags, gradients in lines:
            with plain(Path(gradients)) if gradients else contextlib.nullcontext():
                codes.append(call(script, flags))
    print(codes, flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
