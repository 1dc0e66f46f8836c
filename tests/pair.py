"""What tests/test_scale.py has two processes do: each line of a JSON file [[script, [flags]], …] in turn, as main() would be called.

    torchrun --nproc_per_node 2 tests/pair.py LINES.json

With `Plain` in force nothing is random but the batches and no weight is updated, so that what is left over can be compared with one process.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.distributions import Normal

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]


@contextlib.contextmanager
def plain(folder):
    """Noise is its mean, images stay unshifted, batch norm and spectral norm stay as they are; an update only writes its gradients to
    `folder`; no evaluation and no figures."""
    import common
    import pytest
    from conftest import SCRIPTS

    modules = [common, *map(importlib.import_module, SCRIPTS)]  # before anything is patched: they import it by name
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"rand_like": 0.5, "randn_like": 0.0, "randn": 0.0}

    def note(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch.save(gradients, folder / f"{common.processes()[0]}-{len(list(folder.glob(f'{common.processes()[0]}-*')))}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Normal, "rsample", lambda self, shape=torch.Size(): self.loc.expand(self._extended_shape(shape)))
        patch.setattr(common, "augment", lambda levels: levels)
        patch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, h: F.batch_norm(h, self.running_mean, self.running_var, self.weight, self.bias))
        for optimizer in (torch.optim.Adam, torch.optim.Adamax):
            patch.setattr(optimizer, "step", note)
        seed = common.seed_noise

        def no_noise(*given):  # the first call comes after the networks and the queue are made
            seed(*given)
            with open(folder / f"seeds-{common.processes()[0]}", "a") as file:
                file.write(json.dumps(given) + "\n")
            patch.setattr(torch.nn.utils.parametrizations._SpectralNorm, "_power_method", lambda *arguments: None)
            patch.setattr(torch, "rand_like", lambda x: torch.full_like(x, numbers["rand_like"]))
            patch.setattr(torch, "randn_like", torch.zeros_like)
            patch.setattr(torch, "randn", lambda *shape, device=None: torch.zeros(*shape, device=device))
        patch.setattr(Figure, "savefig", lambda *arguments, **options: None)
        for module in modules[1:]:
            patch.setattr(module, "evaluate", lambda *arguments: None)
            patch.setattr(module, "draw", lambda *arguments: None)
        for module in modules:
            patch.setattr(module, "seed_noise", no_noise)
        yield


def main(lines):
    from conftest import SCRIPTS, call
    import common
    common.join_processes("cpu")
    common.seconds_to_sample.__defaults__ = (1,)
    for script in SCRIPTS:
        importlib.import_module(script).draw = lambda *arguments: None
    codes = []
    for script, flags, gradients in lines:
        with plain(Path(gradients)) if gradients else contextlib.nullcontext():
            codes.append(call(script, flags))
    print(codes, flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
