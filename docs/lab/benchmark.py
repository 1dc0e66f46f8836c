"""Speed and memory at the paper's size, on this machine.

    python docs/lab/benchmark.py …

    (no word)     train step of every script and mode
    growth        the same against size, levels, batch; importance
                  weighting against S (figures.py draws it, from the log)
    importance    importance weighting against a plain loop of full
                  forward passes
    sampling      seconds to sample 1 and 100 images
    roof          GFLOP/s of large matrix products, to compare steps with
    sides         dcvae.py on ProGAN's networks, grown to 512x512: a step
                  of each side, stable and fading
    streaming     a set that is read from disk against the same in memory
    threads       steps of selfvae.py --small by 1 and 2 threads, alone
                  and beside another busy program
    step vae 32 0 32 bf16
                  one case: script, side, levels, batch, mode; see `measure`

Each train step is measured in its own process.
"""

import contextlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402 (needs the path above)
import dcvae  # noqa: E402
import realnvp  # noqa: E402
import selfvae  # noqa: E402
import vae  # noqa: E402

HEAD = ("| model | side | batch | mode | images/s | GiB | GFLOP per image | GFLOP/s |\n"
        "|---|---|---|---|---|---|---|---|")
CASES = [  # script, side of the images, levels, batch, mode
    ("vae", 32, 0, 32, "released"), ("vae", 32, 0, 32, "fp32"), ("vae", 32, 0, 32, "bf16"),
    ("selfvae", 32, 1, 32, "released"), ("selfvae", 32, 1, 32, "fp32"),
    ("selfvae", 32, 1, 32, "bf16"), ("selfvae", 64, 2, 8, "fp32"), ("selfvae", 64, 2, 8, "bf16"),
    ("realnvp", 32, 0, 64, "fp32"), ("realnvp", 32, 0, 64, "bf16"),
    ("dcvae", 32, 0, 64, "fp32"), ("dcvae", 32, 0, 64, "bf16"),
]
SIDES = [("vae", side, 0, 4, "fp32") for side in (32, 64, 128)]
LEVELS = [("selfvae", 64, levels, 4, "fp32") for levels in (0, 1, 2, 3)]
BATCHES = [("vae", 32, 0, batch, "fp32") for batch in (1, 2, 4, 8, 16, 32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peak():
    """Peak memory of this process, or of its GPU, in GiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB -> GiB on Linux


def released_forward(block, h):
    """A dense block that computes in the order of the selfVAE authors' earlier code.

    An ELU is applied to the whole concatenation after each layer, and none within.
    """
    for layer in block.layers:
        h = F.elu(torch.cat([h, layer[2](layer[0](h))], 1))
    return block.attention(h)


def noise(batch, side):
    """A batch of images."""
    x = torch.randint(256, (batch, 3, side, side), device=DEVICE) / 127.5 - 1
    return x.to(memory_format=torch.channels_last)


def make(script, side, levels=0):
    """An initialised model of the paper's size; one with a bound, so not dcvae."""
    torch.manual_seed(0)
    if script == "selfvae":
        model = selfvae.SelfVAE(selfvae.Config(levels=levels), (3, side, side))
    elif script == "realnvp":
        model = realnvp.RealNVP(realnvp.Config(), (3, side, side))
    else:
        model = vae.VAE(vae.Config(), (3, side, side))
    model = model.to(DEVICE, memory_format=torch.channels_last)
    if script != "realnvp":
        model.initialize(noise(2, side))
    return model


def measure(script, side, levels, batch, mode, steps=3):
    """Print a row: images/s over `steps` training steps after two to warm up, peak memory, FLOPs.

    Modes are fp32, bf16, compile (bf16) and released (fp32). A step of dcvae is its whole game, and
    its images are those of D's updates. FLOPs are counted in the second step, but not if compiled.
    """
    dtype = "bf16" if mode in ("bf16", "compile") else "fp32"
    counter = FlopCounterMode(display=False)
    if script == "dcvae":
        cfg = dcvae.Config(batch_size=batch, dtype=dtype, device=DEVICE, compile=mode == "compile")
        seconds = game_seconds(cfg, side, steps, counter)
        images = cfg.d_steps * cfg.batch_size
    else:
        seconds = bound_seconds(script, side, levels, batch, mode, steps, counter)
        images = batch
    work = counter.get_total_flops() / images / 1e9
    name = f"{script} K = {levels}" if script == "selfvae" else script
    print(f"| {name} | {side} | {batch} | {mode} | {images / seconds:.2f} | {peak():.2f} "
          f"| {work:.2f} | {work * images / seconds:.0f} |", flush=True)


def bound_seconds(script, side, levels, batch, mode, steps, counter):
    """Seconds per training step of vae, selfvae or realnvp."""
    model = make(script, side, levels)
    if mode == "released":
        for block in model.modules():
            if type(block).__name__ == "DenseBlock":
                type(block).forward = released_forward
        model = model.to(memory_format=torch.contiguous_format)
    x = noise(batch, side)
    optimizer = torch.optim.Adamax(model.parameters(), foreach=mode != "released")
    terms_of = torch.compile(model.terms, fullgraph=True) if mode == "compile" else model.terms

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mode in ("bf16", "compile")):
            terms = terms_of(x)
        loss = sum(terms.values()).mean()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    step()
    with counter if mode != "compile" else contextlib.nullcontext():
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def nothing(*arguments):
    """Takes the place of validation."""


def game_seconds(cfg, side, steps, counter):
    """Seconds per step of dcvae.py's own `train` on noise, from its log."""
    dcvae.validate = nothing
    pixels = np.random.default_rng(0).integers(0, 256, (400, side, side, 3), np.uint8)
    images = common.Images("noise", side, pixels[:384], pixels[384:], pixels, None, False)
    model = dcvae.DCVAE(cfg, (3, side, side)).to(DEVICE, memory_format=torch.channels_last)
    cfg.log_every = 1
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cfg.steps = 1
        with counter:
            dcvae.train(cfg, model, images, Path(folder), None)
        cfg.steps = steps + 1
        dcvae.train(cfg, model, images, Path(folder), None)
        lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return (seconds[steps] - seconds[0]) / steps


def step(*case):
    """`measure` in a process of its own -> its row, printed too."""
    command = [sys.executable, __file__, "step", *map(str, case)]
    row = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.strip()
    print(row, flush=True)
    return row


def growth():
    """Print a row for each side, level and batch, and for each S the seconds for one image."""
    print(HEAD)
    for case in dict.fromkeys([*SIDES, *LEVELS, *BATCHES]):
        step(*case)
    for S in (1, 4, 16, 64):
        print(f"| importance weighting, vae 32x32, one image, bf16 | S = {S} | "
              f"{importance_seconds(S):.3f} s |")


def importance_seconds(S):
    """Seconds for the log-weights of one image, in bf16."""
    model = make("vae", 32)
    x = noise(1, 32)
    with vae.inference(vae.Config(device=DEVICE, dtype="bf16"), model):
        model.log_weights(x, S)
        start = time.perf_counter()
        model.log_weights(x, S)
        return time.perf_counter() - start


def importance(S=32):
    """Milliseconds per image and sample, for eight images.

    First full forward passes in fp32, one after another, then log_weights of the same images.
    """
    print("| model | how | ms per image and sample | times faster |\n|---|---|---|---|")
    x = noise(8, 32)
    for script, levels in (("vae", 0), ("selfvae", 1)):
        model = make(script, 32, levels)
        with torch.no_grad():
            model.terms(x)
            start = time.perf_counter()
            for _ in range(8):
                model.terms(x)
            plain = 1000 * (time.perf_counter() - start) / 8 / len(x)
        print(f"| {script} | loop of forward passes, fp32 | {plain:.1f} | 1.0 |", flush=True)
        for dtype in ("fp32", "bf16"):
            with vae.inference(vae.Config(device=DEVICE, dtype=dtype), model):
                model.log_weights(x, 2)
                start = time.perf_counter()
                model.log_weights(x, S)
            spent = 1000 * (time.perf_counter() - start) / S / len(x)
            print(f"| {script} | log_weights, {dtype} | {spent:.1f} | {plain / spent:.1f} |",
                  flush=True)


def sampling():
    """Seconds to sample images of full size, the mean of three."""
    print("| model | precision | 1 image | 100 images |\n|---|---|---|---|")
    for script, levels in (("vae", 0), ("selfvae", 1)):
        model = make(script, 32, levels)
        for dtype in ("fp32", "bf16"):
            with vae.inference(vae.Config(device=DEVICE, dtype=dtype), model):
                one = common.seconds_to_sample(model, 1, runs=3)
                hundred = common.seconds_to_sample(model, 100, runs=3)
            print(f"| {script} | {dtype} | {one:.3f} | {hundred:.2f} |", flush=True)


def roof(side=4096):
    """The fastest of five products of square matrices, for each precision."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=DEVICE).to(dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        print(f"{dtype}: {2e-9 * side**3 / min(times):.0f} GFLOP/s", flush=True)


def streaming(gib=6, side=64):
    """Training steps of vae.py --small, batch 32, in bf16, on a memory-mapped file of `gib` GiB.

    And on its first 10,000 images, which are kept in memory.
    """
    common.RESIDENT_BYTES = int(gib * 2**29)  # half of it
    count = int(gib * 2**30) // (3 * side**2)
    cfg = vae.Config(small=True, dtype="bf16", device=DEVICE)
    model = vae.VAE(cfg, (3, side, side)).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adamax(model.parameters(), foreach=True)
    (ROOT / "data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        path = Path(folder, "train.npy")
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, 3))
        block = np.random.default_rng(0).integers(0, 256, (4096, side, side, 3), np.uint8)
        for start in range(0, count, 4096):
            array[start:start + 4096] = block[:count - start]
        array.flush()
        sets = {"in memory": array[:10_000], f"streamed, {gib} GiB": array}
        for name, images in sets.items():
            data = common.Batches(images, 32, DEVICE)
            model.initialize(data.batch(0))
            times = []
            for i in range(22):
                start = time.perf_counter()
                with vae.autocast(cfg):
                    loss = sum(model.terms(data.batch(i)).values()).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                times.append(time.perf_counter() - start)
            kept = "resident" if data.resident else "memory-mapped"
            print(f"{name} ({kept}): {sum(times[2:]) / 20:.3f} s per step of 32 images", flush=True)


def threads(steps=10):
    """Seconds per step, by the clock and of the CPU, alone and beside a program that never waits.
    """
    print("| selfvae.py --small | dtype | batch | threads | beside it | s per step | CPU s |\n"
          "|---|---|---|---|---|---|---|")
    for size, levels, batch in ((16, 1, 8), (32, 1, 16), (64, 2, 8)):
        cfg = selfvae.Config(small=True, exact=True, size=size, levels=levels, device="cpu")
        common.choose_device(cfg)
        model = selfvae.SelfVAE(cfg, (3, size, size)).to(memory_format=torch.channels_last)
        x = noise(batch, size)
        model.initialize(x)
        optimizer = torch.optim.Adamax(model.parameters(), foreach=True)

        def step():
            with selfvae.autocast(cfg):
                terms = model.terms(x)
            optimizer.zero_grad()
            sum(terms.values()).mean().backward()
            optimizer.step()

        for beside, body in (("nothing", "pass"), ("a program", "while True: pass")):
            program = subprocess.Popen([sys.executable, "-c", body])
            try:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    step()
                    step()
                    start = time.perf_counter()
                    start_of_cores = time.process_time()
                    for _ in range(steps):
                        step()
                    seconds = (time.perf_counter() - start) / steps
                    of_cores = (time.process_time() - start_of_cores) / steps
                    print(f"| K = {levels}, {size}x{size} | {cfg.dtype} | {batch} | {count} "
                          f"| {beside} | {seconds:.2f} | {of_cores:.2f} |", flush=True)
            finally:
                program.kill()
                program.wait()


def sides(size=512, batch=4):
    """The second of two steps of every phase of dcvae.py grown to `size`, full width, bf16.

    The batch is the same at every side. It is ProGAN's at 512x512, where it is smallest.
    """
    def keep(self, batch_size):
        self.batch_size = batch
        self.per_epoch = self.count // batch

    common.Batches.set_batch_size = keep
    dcvae.validate = nothing
    cfg = dcvae.Config(backbone="progan", size=size, phase_steps=2, dtype="bf16", device=DEVICE)
    cfg.log_every = 1
    cfg.steps = 2 * (1 + 2 * int(math.log2(size / dcvae.FIRST_SIDE)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), np.uint8)
    images = common.Images("noise", size, pixels[:18], pixels[18:], pixels[18:], None, False)
    model = dcvae.DCVAE(cfg, (3, size, size)).to(DEVICE, memory_format=torch.channels_last)
    print("| side | α | seconds per step | µs per pixel | GiB so far |\n|---|---|---|---|---|")
    times = []

    def note(folder, state, total, terms, batch_size, dims=None):
        times.append(time.perf_counter())
        if state["step"] % 2 == 1:
            return
        side, alpha = dcvae.growth(cfg, size, state["step"] - 1)
        seconds = times[-1] - times[-2]
        share = "1" if alpha == 1 else "0 to 1"
        print(f"| {side} | {share} | {seconds:.2f} | {1e6 * seconds / (batch * side**2):.1f} "
              f"| {peak():.2f} |", flush=True)

    dcvae.log_training = note
    with tempfile.TemporaryDirectory() as folder:
        dcvae.train(cfg, model, images, Path(folder), None)


def main(words):
    """Run one of the commands above, or without a command the train steps."""
    if words[:1] == ["step"]:
        script, side, levels, batch, mode = words[1:]
        measure(script, int(side), int(levels), int(batch), mode)
    elif words:
        commands = {f.__name__: f for f in (growth, importance, sampling, roof, sides,
                                             streaming, threads)}
        if words[0] not in commands:
            sys.exit(__doc__)
        command = commands[words[0]]
        command()
    else:
        print(HEAD)
        for case in CASES:
            step(*case)


if __name__ == "__main__":
    main(sys.argv[1:])
