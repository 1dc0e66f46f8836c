"""Images/s and peak memory of one training step at the paper's size. Not collected by pytest.

    python tests/benchmark.py              every line of the table, each in a process of its own
    python tests/benchmark.py vae 32 0 fp32        one: script, side of the images, levels, precision; realnvp at batch 64
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = [("vae", 32, 0), ("selfvae", 32, 1), ("selfvae", 64, 2), ("realnvp", 32, 0)]


def measure(script, size, levels, dtype, steps=3):
    """Print images/s, the mean over `steps` after one to warm up, and the process's peak resident memory in GiB."""
    sys.path.insert(0, str(ROOT))
    import torch

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
    rate = steps * batch_size / (time.perf_counter() - start)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB on Linux
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else host
    name = f"{script} K={levels}" if levels else script
    print(f"| {name} {size}x{size} | {dtype} | {rate:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        print("| model | precision | images/s | peak memory, GiB |\n|---|---|---|---|", flush=True)
        for script, size, levels in CASES:
            for dtype in ("fp32", "bf16"):
                subprocess.run([sys.executable, __file__, script, str(size), str(levels), dtype], check=True)
