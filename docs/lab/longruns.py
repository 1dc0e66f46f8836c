"""The runs behind docs/lab/runs.md, each a plain command line.

    python docs/lab/longruns.py …

    (no word)  run what is not finished, two at a time, one thread each, at
               low priority; interrupted runs continue where they stopped
    list       what is done, and how long the rest takes
    table      the rows of docs/lab/runs.md, from docs/lab/logs
    keep       copy the logs and results of finished runs to docs/lab/logs
    weights    write the trained models of finished runs to docs/models

All commands take parts of names, and then leave out all other runs: `… run imagenette`.
Budgets are steps, so everybody gets the same run on CPUs with AVX512-BF16. Elsewhere networks are
fp32. On a GPU set `WORKERS` to 1.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import read_log  # noqa: E402 (needs the path above)

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs"
LOGS = ROOT / "docs" / "lab" / "logs"
MODELS = ROOT / "docs" / "models"
WORKERS = 2

SMALL = "--small --log_every 250 --iw_samples 16"
CIFAR10 = f"--dataset cifar10 {SMALL} --eval_every 2500 --eval_images 10000"
IMAGENETTE = f"--dataset imagenette {SMALL} --eval_every 2500 --eval_images 2000 --iw_images 100"
MNIST = f"--dataset mnist {SMALL} --eval_every 2500 --eval_images 10000"
GAME = "--small --log_every 250 --batch_size 32 --d_steps 1 --lr 5e-4 --momentum 0.99 --ema 0.99 " \
       "--steps 6500 --eval_every 1000 --eval_images 10000"
FLOW = f"{SMALL} --eval_every 2000 --eval_images 2000"

# The long ones, of 90 minutes, stand first, so that the two cores begin with them.
COMMANDS = {
    "imagenette-K3-exact-long": f"selfvae.py --levels 3 --exact --steps 10000 {IMAGENETTE}",
    "cifar10-K2-exact-long": f"selfvae.py --levels 2 --exact --steps 20000 {CIFAR10}",
    "shapes-K1": f"selfvae.py --size 16 --exact --steps 4000 {SMALL} --eval_every 1000 "
                 "--eval_images 2000",
    "imagenette-K2-exact-s0": f"selfvae.py --levels 2 --exact --steps 3000 {IMAGENETTE}",
    "imagenette-K2-exact-s1": f"selfvae.py --levels 2 --exact --steps 3000 --seed 1 {IMAGENETTE}",
    "imagenette-K2-exact-normal":
        f"selfvae.py --levels 2 --exact --prior normal --steps 3000 {IMAGENETTE}",
    "cifar10-K1-exact-s0": f"selfvae.py --levels 1 --exact --steps 8000 {CIFAR10}",
    "cifar10-K1-exact-s1": f"selfvae.py --levels 1 --exact --steps 8000 --seed 1 {CIFAR10}",
    "cifar10-K1-exact-normal":
        f"selfvae.py --levels 1 --exact --prior normal --steps 8000 {CIFAR10}",
    "mnist-K1-exact": f"selfvae.py --levels 1 --exact --steps 6000 {MNIST}",
    "mnist-K2-exact": f"selfvae.py --levels 2 --exact --steps 6000 {MNIST}",
    "imagenette-vae-s0": f"vae.py --steps 8000 {IMAGENETTE}",
    "imagenette-vae-s1": f"vae.py --steps 8000 --seed 1 {IMAGENETTE}",
    "cifar10-vae-s0": f"vae.py --steps 12000 {CIFAR10}",
    "cifar10-vae-s1": f"vae.py --steps 12000 --seed 1 {CIFAR10}",
    "imagenette-K1-exact": f"selfvae.py --levels 1 --exact --steps 3000 {IMAGENETTE}",
    "imagenette-K3-exact": f"selfvae.py --levels 3 --exact --steps 3000 {IMAGENETTE}",
    "imagenette-K2-s0": f"selfvae.py --levels 2 --steps 4500 {IMAGENETTE}",
    "cifar10-K1": f"selfvae.py --levels 1 --steps 8000 {CIFAR10}",
    "cifar10-vae-normal": f"vae.py --prior normal --steps 12000 {CIFAR10}",
    "cifar10-vae-mog": f"vae.py --prior mog --steps 12000 {CIFAR10}",
    "realnvp-mnist": f"realnvp.py --dataset mnist --steps 6000 {FLOW}",
    "realnvp-cifar10": f"realnvp.py --dataset cifar10 --steps 8000 {FLOW}",
    "dcvae-cifar10-dcvae": f"dcvae.py --dataset cifar10 --kl_weight 3e-3 {GAME}",
    "dcvae-cifar10-vaegan": f"dcvae.py --dataset cifar10 --loss vaegan --kl_weight 3e-3 {GAME}",
    "dcvae-cifar10-contrastive":
        f"dcvae.py --dataset cifar10 --loss contrastive --kl_weight 3e-3 {GAME}",
    "dcvae-cifar10-vae": f"dcvae.py --dataset cifar10 --loss vae {GAME}",
    "dcvae-imagenette-progan":
        "dcvae.py --dataset imagenette --latent 128 --small --log_every 100 --steps 3600 "
        "--phase_steps 300 --eval_every 300 --batch_size 8 --kl_weight 3e-3 --momentum 0.99 "
        "--ema 0.99 --negatives 2048 --eval_images 500",
    "dcvae-mnist": f"dcvae.py --dataset mnist --latent 32 --kl_weight 3e-3 {GAME}",
    "dcvae-mnist-vae": f"dcvae.py --dataset mnist --latent 32 --loss vae {GAME}",
}
for transform in ("grayscale", "posterize"):
    COMMANDS[f"cifar10-{transform}-exact"] = \
        f"selfvae.py --transform {transform} --exact --steps 3000 {CIFAR10}"
for transform in ("sketch", "edges"):  # --exact does not support these
    COMMANDS[f"cifar10-{transform}"] = f"selfvae.py --transform {transform} --steps 3000 {CIFAR10}"


def run(name):
    """Run a command line to its end, unless its results exist; add up the core's time."""
    folder = RUNS / name
    if (folder / "results.json").exists():
        return
    command = [sys.executable, *COMMANDS[name].split(), "--name", name]
    if (folder / "last.pt").exists():
        command.append("--resume")
    print(" ".join(command[1:]), flush=True)
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / f"{name}.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   preexec_fn=lambda: os.nice(10))
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(f"{name} ended with {process.returncode}: see {output.name}", flush=True)
    if not folder.exists():
        return
    used = folder / "core_seconds.txt"
    before = float(used.read_text(encoding="utf-8")) if used.exists() else 0
    used.write_text(f"{before + usage.ru_utime + usage.ru_stime:.0f}\n", encoding="utf-8")


def rows_of(path):
    """The rows of a log.jsonl, none if there is none."""
    if not path.exists():
        return []
    return read_log(path)


def progress(name):
    """One line: done, or the step, the number of steps, and the minutes left at this rate."""
    folder = RUNS / name
    if (folder / "results.json").exists():
        return f"{name:34} done"
    words = COMMANDS[name].split()
    total = int(words[words.index("--steps") + 1])
    rows = rows_of(folder / "log.jsonl")
    if not rows:
        return f"{name:34} not begun, {total} steps"
    step = rows[-1]["step"]
    left = rows[-1]["seconds"] * (total - step) / step / 60
    return f"{name:34} step {step} of {total}, {left:.0f} minutes left"


def keep(name):
    """Copy what docs/lab/runs.md is made from: log, results, the core's time, the command."""
    folder = RUNS / name
    if not (folder / "results.json").exists():
        return
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    used = folder / "core_seconds.txt"
    if used.exists():
        results["core_minutes"] = float(used.read_text(encoding="utf-8")) / 60
    results["command"] = f"python {COMMANDS[name]} --name {name}"
    text = json.dumps(results, indent=1) + "\n"
    (LOGS / f"{name}-results.json").write_text(text, encoding="utf-8")
    shutil.copy(folder / "log.jsonl", LOGS / f"{name}-log.jsonl")
    print(f"kept {name}")


def weights(name):
    """Write the run's model alone, in fp16, to docs/models/{name}/best.pt, which --eval reads.

    All tensors are views of one tensor. Stored alone, a small tensor would need as much space for
    its entry in the file as for its numbers.
    """
    folder = RUNS / name
    if not (folder / "results.json").exists():
        return
    path = folder / "best.pt" if (folder / "best.pt").exists() else folder / "last.pt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = dict(checkpoint["model"])
    floats = [key for key, values in model.items() if values.is_floating_point()]
    flat = torch.cat([model[key].flatten() for key in floats]).half()
    for key, part in zip(floats, flat.split([model[key].numel() for key in floats])):
        model[key] = part.view(model[key].shape)
    path = MODELS / name / "best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"script": checkpoint["script"], "config": checkpoint["config"],
                "state": checkpoint["state"], "model": model}, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    commit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["commit"][:7]
    print(f"| {name} | `python {COMMANDS[name]} --name {name}` | {commit} "
          f"| {path.stat().st_size / 1e6:.2f} | {sha} |")


BOUNDS = ["steps", "validation bpd", "ELBO bpd", "IW-16 bpd ± se", "ELBO bpd, same images", "RE",
          "KL", "parameters", "minutes of a core"]
TERMS = ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_y_3", "kl_z_3", "re_x",
         "dB of draws given y", "of means", "of bicubic"]
GAMES = ["steps", "pixel distance", "the same, last three validations", "KL, nats",
         "latents in use", "contrast, nats", "accuracy, %", "D: real", "reconstructed", "sampled",
         "probe, % wrong (pixels)", "minutes of a core"]


def row_of_bounds(results, log):
    """The columns BOUNDS of a run of vae.py, selfvae.py or realnvp.py, which has no latents."""
    validations = [logged["bpd"] for logged in log if logged["split"] == "valid"]
    return [f"{results['step']:,}", f"{min(validations):.3f}", f"{results['elbo_bpd']:.3f}",
            f"{results['iw_bpd']:.3f} ± {results['iw_bpd_se']:.3f}",
            f"{results['iw_elbo_bpd']:.3f}", number(results.get("re_nats"), ",.0f"),
            number(results.get("kl_nats"), ",.0f"), f"{results['parameters']:,}",
            number(results.get("core_minutes"), ".0f")]


def row_of_terms(results, log):
    """The columns TERMS of a run of selfvae.py: in bits per dimension of x, then PSNR of x̂."""
    bpd_of_a_nat = results["elbo_bpd"] / (results["re_nats"] + results["kl_nats"])
    cells = []
    for name in TERMS[:8]:
        nats = results.get(name)
        cells.append(number(nats and nats * bpd_of_a_nat, ".3f"))
    for name in ("conditional_generate_psnr", "conditional_generate_psnr_mean", "bicubic_psnr"):
        cells.append(number(results.get(name), ".2f"))
    return cells


def row_of_games(results, log):
    """The columns GAMES of a run of dcvae.py; those of training are its last logged means."""
    training = [logged for logged in log if logged["split"] == "train"][-1]
    validations = [logged["pixel_distance"] for logged in log if logged["split"] == "valid"]
    accuracy = 100 * training["accuracy"] if "accuracy" in training else None
    return [f"{results['step']:,}", f"{results['pixel_distance']:.1f}",
            ", ".join(f"{value:.0f}" for value in validations[-3:]), f"{results['kl']:.1f}",
            f"{results['active']}", number(training.get("contrast"), ".2f"),
            number(accuracy, ".1f"), number(training.get("real"), ".2f"),
            number(training.get("reconstructed"), ".2f"), number(training.get("sampled"), ".2f"),
            f"{results['probe_error_percent']:.1f} ± {results['probe_error_percent_ci95']:.1f} "
            f"({results['pixels_error_percent']:.1f})", number(results.get("core_minutes"), ".0f")]


def number(value, form):
    """A cell of a table: – if the run does not have the value."""
    return "–" if value is None else format(value, form)


def print_table(names, columns, row):
    """Print rows of docs/lab/runs.md, from the runs' results and validations."""
    print("| run | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in names:
        path = LOGS / f"{name}-results.json"
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            cells = row(results, rows_of(LOGS / f"{name}-log.jsonl"))
            print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def main(action="run", *parts):
    """Do what the first word says, with the runs whose names contain one of `parts`."""
    names = []
    for name in COMMANDS:
        if not parts or any(part in name for part in parts):
            names.append(name)
    if action == "run":
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(run, names))
    elif action == "list":
        for name in names:
            print(progress(name))
    elif action == "keep":
        for name in names:
            keep(name)
    elif action == "weights":
        print("| model | command | commit | MB | SHA-256 begins |\n|---|---|---|---|---|")
        for name in names:
            weights(name)
    elif action == "table":
        of = {"vae.py": [], "selfvae.py": [], "realnvp.py": [], "dcvae.py": []}
        for name in names:
            of[COMMANDS[name].split()[0]].append(name)
        print_table([name for name in names if name not in of["dcvae.py"]], BOUNDS, row_of_bounds)
        print_table(of["selfvae.py"], TERMS, row_of_terms)
        print_table(of["dcvae.py"], GAMES, row_of_games)
    else:
        sys.exit("python docs/lab/longruns.py run, list, table, keep or weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
