"""Speed and memory at the paper's size, on this machine. Not collected by pytest. Each line is measured in a process of its own.

python tests/benchmark.py                train step of every script and mode
python tests/benchmark.py growth         the same against size, levels, batch; importance weighting against S; docs/figures/growth.png
python tests/benchmark.py importance     importance weighting against a plain loop of full forward passes
python tests/benchmark.py sampling       seconds to draw 1 and 100 images
python tests/benchmark.py roof           GFLOP/s of large matrix products: what a step's are to be held against
python tests/benchmark.py streaming      a set that is read from disk against the same one in memory
python tests/benchmark.py step vae 32 0 32 bf16          one: script, side of the images, levels, batch, mode; see `measure`
"""

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HEAD = "| model | side | batch | mode | images/s | GiB | GFLOP an image | GFLOP/s |\n|---|---|---|---|---|---|---|---|"
CASES = [
    *(("vae", 32, 0, 32, mode) for mode in ("released", "fp32", "bf16", "bf16-accumulate4")),
    *(("selfvae", 32, 1, 32, mode) for mode in ("released", "fp32", "bf16", "bf16-accumulate4")),
    *(
        (*case, mode)
        for case in (("selfvae", 64, 2, 8), ("realnvp", 32, 0, 64), ("dcvae", 32, 0, 64))
        for mode in ("fp32", "bf16")
    ),
]
GROWTH = [
    *(("vae", size, 0, 4, "fp32") for size in (32, 64, 128)),
    *(("selfvae", 64, levels, 4, "fp32") for levels in (0, 1, 2, 3)),
    *(("vae", 32, 0, batch, "fp32") for batch in (1, 2, 8, 16, 32)),
]


def peak():
    """Peak memory of this process, or of its GPU, in GiB."""
    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB on Linux
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else host


def as_released(model):
    """The order of work of the selfVAE authors' predecessor:

    ELU of the whole concatenation after each step, no channels-last memory.
    """
    import torch
    import torch.nn.functional as F

    def forward(self, h):
        for step in self.steps:
            h = F.elu(torch.cat([h, step[2](step[0](h))], 1))
        return self.attention(h)

    for block in model.modules():
        if type(block).__name__ == "DenseBlock":
            type(block).forward = forward
    return model.to(memory_format=torch.contiguous_format)


def measure(script, size, levels, batch, mode, steps=3):
    """Images/s over `steps` training steps after two to warm up, in the second of which FLOPs are counted, and peak memory. Modes are
    fp32, bf16 and compile (bf16), each with -accumulateN, and released (fp32). A step of dcvae is its whole game: images of D's updates.
    """
    import importlib

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    dtype, _, parts = mode.partition("-accumulate")
    module, device, parts = (
        importlib.import_module(script),
        "cuda" if torch.cuda.is_available() else "cpu",
        int(parts or 1),
    )
    precision = "bf16" if dtype in ("bf16", "compile") else "fp32"
    counter = FlopCounterMode(display=False)
    if script == "dcvae":
        seconds, count = game(
            module.Config(
                batch_size=batch,
                accumulate=parts,
                dtype=precision,
                device=device,
                compile=dtype == "compile",
            ),
            size,
            steps,
            counter,
        )
    else:
        cfg = module.Config(levels=levels) if script == "selfvae" else module.Config()
        Model = {"vae": "VAE", "selfvae": "SelfVAE", "realnvp": "RealNVP"}[script]
        model = getattr(module, Model)(cfg, (3, size, size)).to(
            device, memory_format=torch.channels_last
        )
        model = as_released(model) if mode == "released" else model
        x = (torch.randint(256, (batch, 3, size, size), device=device) / 127.5 - 1).to(
            memory_format=torch.channels_last
        )
        if script != "realnvp":
            model.initialize(x[:2])
        optimizer = (torch.optim.Adam if script == "realnvp" else torch.optim.Adamax)(
            model.parameters()
        )
        terms_of = torch.compile(model.terms, fullgraph=True) if dtype == "compile" else model.terms

        def step():
            optimizer.zero_grad()
            for part in x.chunk(parts):
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    terms = terms_of(part)
                (sum(terms.values()).mean() / parts).backward()
            optimizer.step()
            return next(iter(terms.values()))[0].item()  # waits for the device

        step()
        with counter if dtype != "compile" else contextlib.nullcontext():
            step()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        seconds, count = (time.perf_counter() - start) / steps, batch
    work = counter.get_total_flops() / count / 1e9  # what is compiled is not counted
    name = f"{script} K = {levels}" if script == "selfvae" else script
    print(
        f"| {name} | {size} | {batch} | {mode} | {count / seconds:.2f} | {peak():.2f} | {work:.2f} | {work * count / seconds:.0f} |",
        flush=True,
    )


def game(cfg, size, steps, counter):
    """dcvae.py's own `train` on noise -> seconds a step, from its log; images a step."""
    import common
    import dcvae
    import numpy as np
    import torch

    dcvae.distances, dcvae.draw = (
        lambda *arguments: {"kl": 0.0},
        lambda *arguments: None,
    )  # steps only
    noise = np.random.default_rng(0).integers(0, 256, (400, size, size, 3), np.uint8)
    model = dcvae.DCVAE(cfg, (3, size, size)).to(cfg.device, memory_format=torch.channels_last)
    cfg.log_every = 1
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        folder, images = Path(folder), common.Images(
            "noise", size, noise[:384], noise[384:], noise, None, False
        )
        (folder / "log.jsonl").write_text("")
        cfg.steps = 1
        with counter:
            dcvae.train(cfg, model, images, folder, None)
        (folder / "log.jsonl").write_text("")
        cfg.steps = steps + 1
        dcvae.train(cfg, model, images, folder, None)
        seconds = [
            json.loads(line)["seconds"] for line in (folder / "log.jsonl").read_text().splitlines()
        ]
    return (seconds[steps] - seconds[0]) / steps, cfg.d_steps * cfg.batch_size


def sampling():
    """Seconds to draw images of full size, the mean of three."""
    import common

    print("| model | precision | 1 image | 100 images |\n|---|---|---|---|")
    for script in ("vae", "selfvae"):
        module, model, _ = bound(script)
        for dtype in ("fp32", "bf16"):
            with module.inference(module.Config(device="cpu", dtype=dtype)):
                one, hundred = (common.seconds_to_sample(model, n, runs=3) for n in (1, 100))
            print(f"| {script} | {dtype} | {one:.3f} | {hundred:.2f} |", flush=True)


def roof(side=4096):
    """The best of five products of square matrices, by precision."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.randn(side, side, device=device).to(dtype), []
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        print(f"{dtype}: {2e-9 * side**3 / min(times):.0f} GFLOP/s", flush=True)


def step(*case):
    """`measure` in a process of its own -> its row, printed too."""
    row = subprocess.run(
        [sys.executable, __file__, "step", *map(str, case)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    print(row, flush=True)
    return row


def growth():
    """The table, and one panel for each thing that grows, logarithmic: seconds and GiB."""
    from matplotlib.figure import Figure

    print(HEAD)
    rows = {case: step(*case) for case in GROWTH}
    cells = {case: [cell.strip() for cell in row.split("|")] for case, row in rows.items()}
    cells = {
        case: (case[3] / float(cell[5]), float(cell[6]), float(cell[7]) * case[3] / 1000)
        for case, cell in cells.items()
    }  # seconds, GiB, TFLOP
    samples = {S: importance_seconds(S) for S in (1, 4, 16, 64)}
    for S, seconds in samples.items():
        print(
            f"| importance weighting, vae 32x32, one image, bf16 | S = {S} | {seconds:.3f} s |",
            flush=True,
        )
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = [
        (
            "side of the images (vae)",
            {c[1]: v for c, v in cells.items() if c[0] == "vae" and c[3] == 4},
        ),
        ("levels K (selfvae, 64x64)", {c[2]: v for c, v in cells.items() if c[0] == "selfvae"}),
        (
            "batch (vae, 32x32)",
            {
                c[3]: v
                for c, v in sorted(cells.items(), key=lambda item: item[0][3])
                if c[0] == "vae" and c[1] == 32
            },
        ),
    ]
    axes = figure.subplots(1, 4)
    for ax, (title, values) in zip(axes, panels):
        for column, name in enumerate(("seconds a step", "GiB", "TFLOP a step")):
            ax.plot(list(values), [v[column] for v in values.values()], marker=".", label=name)
        ax.set(
            title=title,
            yscale="log",
            xscale="linear" if 0 in values else "log",
            xticks=list(values),
            xticklabels=list(values),
        )
        ax.minorticks_off()
    axes[0].legend(fontsize="small")
    axes[3].plot(list(samples), list(samples.values()), marker=".")
    axes[3].set(
        title="S (one image), seconds",
        xscale="log",
        yscale="log",
        xticks=list(samples),
        xticklabels=list(samples),
    )
    axes[3].minorticks_off()
    figure.savefig(ROOT / "docs" / "figures" / "growth.png", dpi=80)


def bound(script):
    """A model of full size and eight images."""
    import importlib

    import torch

    torch.manual_seed(0)
    module = importlib.import_module(script)
    model = (module.VAE if script == "vae" else module.SelfVAE)(module.Config(), (3, 32, 32)).to(
        memory_format=torch.channels_last
    )
    x = (torch.randint(256, (8, 3, 32, 32)) / 127.5 - 1).to(memory_format=torch.channels_last)
    model.initialize(x)
    return module, model, x


def importance_seconds(S):
    """Seconds for the log-weights of one image, in bf16."""
    module, model, x = bound("vae")
    with module.inference(module.Config(device="cpu", dtype="bf16")):
        model.log_weights(x[:1], S)
        start = time.perf_counter()
        model.log_weights(x[:1], S)
        return time.perf_counter() - start


def importance():
    """Milliseconds an image and sample:

    full forward passes of 8 images in fp32, one after another, then log_weights of the same.
    """
    import torch

    print("| model | how | ms an image and sample | times faster |\n|---|---|---|---|")
    for script in ("vae", "selfvae"):
        module, model, x = bound(script)
        plain = None
        for how, dtype, S in (
            ("loop of forward passes", "fp32", 8),
            ("log_weights", "fp32", 64),
            ("log_weights", "bf16", 64),
        ):
            with (
                module.inference(module.Config(device="cpu", dtype=dtype))
                if plain
                else torch.no_grad()
            ):
                run = (
                    (lambda S: [model.terms(x) for _ in range(S)])
                    if plain is None
                    else (lambda S: model.log_weights(x, S))
                )
                run(2)
                start = time.perf_counter()
                run(S)
            spent = 1000 * (time.perf_counter() - start) / S / len(x)
            plain = plain or spent
            print(f"| {script} | {how}, {dtype} | {spent:.1f} | {plain / spent:.1f} |", flush=True)


def streaming(gib=6, size=64):
    """Training steps of vae.py --small on a memory-mapped file of `gib` GiB, more than
    RESIDENT_BYTES, and on as many of its images as fit.
    """
    import common
    import numpy as np
    import torch
    import vae

    count = gib * 2**30 // (3 * size**2)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        array = np.lib.format.open_memmap(
            Path(folder) / "train.npy", "w+", np.uint8, (count, size, size, 3)
        )
        block = np.random.default_rng(0).integers(0, 256, (4096, size, size, 3), np.uint8)
        for start in range(0, count, 4096):
            array[start : start + 4096] = block[: count - start]
        array.flush()
        cfg = vae.Config(small=True, dtype="bf16", device="cpu")
        model = vae.VAE(cfg, (3, size, size)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adamax(model.parameters())
        for name, images in (
            ("in memory", array[:10_000]),
            (f"streamed, {array.nbytes / 2**30:.1f} GiB", array),
        ):
            data = common.Batches(images, 32, "cpu")
            assert (data.resident is None) == (images is array)
            model.initialize(data.batch(0))
            for i in range(22):
                start = time.perf_counter() if i == 2 else start if i else 0
                with vae.autocast(cfg):
                    loss = sum(model.terms(data.batch(i)).values()).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(
                f"{name}: {(time.perf_counter() - start) / 20:.3f} s a step of 32 images",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        script, size, levels, batch, mode = sys.argv[2:]
        measure(script, int(size), int(levels), int(batch), mode)
    elif sys.argv[1:]:
        globals()[sys.argv[1]]()
    else:
        print(HEAD)
        for case in CASES:
            step(*case)
