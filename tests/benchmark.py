"""Images/s and peak memory of one training step at the paper's size. Not collected by pytest.

    python tests/benchmark.py              every line of the table, each in a process of its own
    python tests/benchmark.py vae 32 0 fp32        one: script, side of the images, levels, precision; realnvp at batch 64

A step of dcvae is its whole game: five updates of D on 64 images each, then one of encoder and decoder; images/s counts all 320.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = [("vae", 32, 0), ("selfvae", 32, 1), ("selfvae", 64, 2), ("realnvp", 32, 0), ("dcvae", 32, 0)]


def measure(script, size, levels, dtype, steps=3):
    """Print images/s, the mean over `steps` after one to warm up, and the process's peak resident memory in GiB."""
    sys.path.insert(0, str(ROOT))
    import torch

    if script == "dcvae":
        return measure_game(size, dtype, steps)
    import realnvp
    import selfvae
    import vae

    device = "cuda" if torch.cuda.is_available() else "cpu"
    Model, config = {"vae": (vae.VAE, vae.Config()), "selfvae": (selfvae.SelfVAE, selfvae.Config(levels=levels)),
                     "realnvp": (realnvp.RealNVP, realnvp.Config())}[script]
    model, batch_size = Model(config, (3, size, size)).to(device, memory_format=torch.channels_last), config.batch_size
    x = (torch.randint(256, (batch_size, 3, size, size), device=device) / 127.5 - 1).to(memory_format=torch.channels_last)
    if script != "realnvp":
        model.initialize(x[:2])
    optimizer = (torch.optim.Adam if script == "realnvp" else torch.optim.Adamax)(model.parameters())

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            terms = model.terms(x)
        loss = sum(terms.values()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for the device

    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    show(f"{script} K={levels}" if levels else script, size, dtype, steps * batch_size / (time.perf_counter() - start))


def measure_game(size, dtype, steps):
    """The same for dcvae.py's own `train`, on noise: from its log."""
    import numpy as np
    import torch

    import common
    import dcvae

    cfg = dcvae.Config(steps=steps + 1, dtype=dtype, log_every=1, device="cuda" if torch.cuda.is_available() else "cpu")
    noise = np.random.default_rng(0).integers(0, 256, (400, size, size, 3), np.uint8)
    model = dcvae.DCVAE(cfg, (3, size, size)).to(cfg.device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "log.jsonl").write_text("")
        dcvae.train(cfg, model, common.Images("noise", size, noise[:384], noise[384:], noise, None, False), folder, None)
        seconds = [json.loads(line)["seconds"] for line in (folder / "log.jsonl").read_text().splitlines()]
    show("dcvae", size, dtype, steps * cfg.d_steps * cfg.batch_size / (seconds[steps] - seconds[0]))


def show(name, size, dtype, rate):
    """A row of the table, with the peak memory of this process or of its GPU."""
    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB on Linux
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else host
    print(f"| {name} {size}x{size} | {dtype} | {rate:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        print("| model | precision | images/s | peak memory, GiB |\n|---|---|---|---|", flush=True)
        for script, size, levels in CASES:
            for dtype in ("fp32", "bf16"):
                subprocess.run([sys.executable, __file__, script, str(size), str(levels), dtype], check=True)
