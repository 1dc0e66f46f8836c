"""The scripts as a user runs them: tiny data, a few steps.

What a run leaves behind, how it resumes, ends early, fails and refuses. Most of it is done by lines
that are the same in every script: where one script is looked at, that is why.
"""

import importlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import numpy as np
import pytest
import selfvae
import torch
import vae
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for, narrow_networks, pictures_on
from PIL import Image
from two_processes import nothing

COMBOS = [
    ("vae", dict(prior="normal", dataset="mnist", lr=0)),  # none of its steps is better than others
    ("vae", dict(prior="mog", eval_images=5)),
    ("vae", dict(prior="realnvp")),
    ("selfvae", dict(levels=0, prior="normal")),
    ("selfvae", dict(levels=1, exact=True)),
    ("selfvae", dict(levels=2, prior="normal", size=32)),
    ("selfvae", dict(transform="sketch", prior="normal")),
    ("realnvp", dict(cooldown=0)),
    ("realnvp", dict(dataset="mnist", cooldown=0)),
    ("realnvp", dict(dataset="moons", batch_size=500)),
    ("dcvae", {}),
    ("dcvae", dict(loss="vae", dataset="mnist", eval_images=5)),
    ("dcvae", dict(loss="vaegan", gan="log")),
    ("dcvae", dict(loss="contrastive", patch_after=1)),
    ("dcvae", dict(backbone="progan", phase_steps=2)),  # in a fade when it ends
]
IDS = [" ".join([script, *map(str, flags.values())]) for script, flags in COMBOS]
FIRST = [COMBOS[0], COMBOS[3], COMBOS[7], COMBOS[14]]  # one of each script
CHEAPEST = {"vae": dict(prior="normal", warmup=0, cooldown=0),
            "selfvae": dict(prior="normal", levels=1, warmup=0, cooldown=0),
            "realnvp": dict(cooldown=0), "dcvae": dict(d_steps=2)}
BOUNDS = ("vae", "selfvae")  # the scripts that report the ELBO as reconstruction errors and KLs


def cheap(script, **flags):
    """The cheapest model of a script, with more flags."""
    return CHEAPEST[script] | flags


def coarser(density):
    """A density at a 25th of its cells."""
    def at_fewer_cells(model, reach, cells):
        p = density(model, reach, cells // 5)
        return p.repeat_interleave(5, 0).repeat_interleave(5, 1)
    return at_fewer_cells


def cut_short(monkeypatch):
    """Sample 100 images once, not ten times, to time it; see the density of points coarsely."""
    monkeypatch.setattr(common.seconds_to_sample, "__defaults__", (1, 0))
    monkeypatch.setattr("realnvp.density", coarser(importlib.import_module("realnvp").density))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Networks are narrow and evaluations short in every test; curves are of `finished` runs."""
    cut_short(monkeypatch)
    narrow_networks(monkeypatch)
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.draw_curves", nothing)


@pytest.fixture
def no_figures(monkeypatch):
    """For tests that look at none: they take longer than the rest of a short run."""
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.save_figures", nothing)
    monkeypatch.setattr("selfvae.save_latent_space", nothing)


@pytest.fixture
def training_only(monkeypatch, no_figures):
    """No evaluation at the end of a run, and no figures."""
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.evaluate", nothing)


@pytest.fixture
def trained(run, tmp_path, no_figures):
    """trained(script) -> the folder of a finished run of two steps, named "old"."""
    def train(script):
        assert run(script, name="old", **cheap(script)) == 0
        return tmp_path / "runs" / "old"
    return train


def tree(*folders):
    """Everything below the folders: {path: content or None for a folder}."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def records(folder):
    """The lines of log.jsonl."""
    return common.read_log(folder / "log.jsonl")


def steps_of(folder):
    """The lines of log.jsonl that are of training, without their times."""
    rows = [row for row in records(folder) if row["split"] == "train"]
    for row in rows:
        del row["seconds"]
    return rows


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load(path):
    """A checkpoint, loaded as the scripts do: no code in it is run."""
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_end(folder, other):
    """The same weights and optimizer in last.pt, bit for bit."""
    for part in ("model", "optimizer"):
        ours, theirs = load(folder / "last.pt")[part], load(other / "last.pt")[part]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---- A finished run ------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=COMBOS, ids=IDS)
def finished(request, tiny_data, tmp_path_factory):
    """(script, its folder) of a run of three steps of each combination.

    Those of FIRST are validated in their second step too, and have curves.
    """
    script, flags = request.param
    out_dir = tmp_path_factory.mktemp("runs")
    every = 2 if request.param in FIRST else 3
    line = flags_for(script, tiny_data, out_dir, name="done", steps=3, eval_every=every, **flags)
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch)
        narrow_networks(patch)
        if request.param not in FIRST:
            patch.setattr(f"{script}.draw_curves", nothing)  # matplotlib takes half a second
        assert call(script, line) == 0
    return script, out_dir / "done"


def test_run_is_complete(finished):
    """A file that is missing, or a step not logged, is what a user would look for in vain."""
    script, folder = finished
    config = read_json(folder / "config.json")
    assert (config["steps"], config["name"], config["torch"]) == (3, "done", torch.__version__)
    assert {"command", "commit"} <= config.keys()
    in_first = config["eval_every"] == 2
    rows = records(folder)
    steps = [(row["split"], row["step"]) for row in rows]
    validated = [("valid", 2)] if in_first else []
    assert steps == [("train", 1), ("train", 2), *validated, ("train", 3), ("valid", 3)]
    assert not any(None in row.values() for row in rows)  # JSON's null: a number is not finite
    assert load(folder / "last.pt").keys() == {"script", "config", "state", "model", "optimizer"}
    assert (folder / "best.pt").exists() == (script != "dcvae")  # there FID says which is best
    assert list(folder.rglob("*.tmp")) == []
    assert (folder / "samples" / "000003.png").exists()
    assert (folder / "curves.png").exists() == in_first
    for path in folder.rglob("*.png"):
        assert np.asarray(Image.open(path)).std() > 0, path


def test_results(finished):
    """results.json is flat and finite, of the best step, and its sums are those of its parts."""
    script, folder = finished
    results = read_json(folder / "results.json")
    config = read_json(folder / "config.json")
    assert all(isinstance(value, (str, int, float)) for value in results.values())
    best = load(folder / ("last.pt" if script == "dcvae" else "best.pt"))
    assert results["step"] == best["state"]["step"]
    assert config["lr"] or results["step"] == 2  # the first that was validated
    assert results["test_images"] == len(evaluated_pixels(folder))
    assert min(results[name] for name in ("parameters", "seconds_1", "seconds_100")) > 0
    if "elbo_bpd" not in results:
        return
    parts = ("re_nats", "kl_nats") if script in BOUNDS else ("base", "volume")
    nats = sum(results[name] for name in parts)
    dims = math.prod(evaluated_pixels(folder).shape[1:])
    assert results["elbo_bpd"] == pytest.approx(nats / (dims * math.log(2)), rel=1e-6)
    assert results["iw_bpd"] <= results["iw_elbo_bpd"] + 1e-6 and results["iw_bpd_se"] > 0
    assert (results["iw_samples"], results["iw_images"]) == (2, 4)
    if script in BOUNDS:
        errors = [value for name, value in results.items() if re.match("re_[xy]", name)]
        assert results["re_nats"] == pytest.approx(sum(errors))


def evaluated_pixels(folder):
    """The run's test images that are evaluated, uint8 (N, H, W, C), from its data folder."""
    config = read_json(folder / "config.json")
    images = common.load_images(config["dataset"], config["data_dir"], config["size"])
    return images.test[:config["eval_images"]]


SHEETS = {"samples/test": 8, "reconstructions/test": 4, "interpolations/test": 8}
OF_SELFVAE = {  # by transformation and levels
    ("downscale", 0): {"samples/test": 4, "reconstructions/test": 4, "interpolations/test-u": 8},
    ("downscale", 1): {"samples/test": 8, "reconstructions/test": 12, "superresolution/test": 8,
                       "interpolations/test-u": 8, "interpolations/test-v": 8,
                       "variations/test": 8},
    # At 32x32 ten rows are the most.
    ("downscale", 2): {"samples/test": 9, "reconstructions/test": 6, "superresolution/test": 4,
                       "interpolations/test-u": 8, "variations/test": 9},
    ("sketch", 1): {"samples/test": 8, "reconstructions/test": 12, "interpolations/test-u": 8,
                    "variations/test": 8}}


def test_sheets_show_true_pixels(finished):
    """8 images a row, enlarged to 64 pixels; reconstructions begin with the test images."""
    script, folder = finished
    config = read_json(folder / "config.json")
    expected = dict(SHEETS)
    if script == "selfvae":
        expected = OF_SELFVAE[config["transform"], config["levels"]]
    if script == "realnvp":
        expected["samples/test-temperature0.7"] = 8
    if script == "dcvae":
        expected |= {"mixing/test": 8, "editing/test-0-3": 8}
    if config["dataset"] == "moons":
        expected = {"samples/test": 0}  # a figure of points
    found = {}
    for path in folder.glob("*/test*.png"):
        found[str(path.relative_to(folder).with_suffix(""))] = 0
    x = evaluated_pixels(folder)
    if config["dataset"] != "moons":
        size = x.shape[1]
        sheets = {name: pictures_on(folder / f"{name}.png", size) for name in found}
        found = {name: len(pictures) for name, pictures in sheets.items()}
        count = min(8, len(x))
        assert (sheets["reconstructions/test"][0, :count] == x[:count]).all()
    assert found == expected


def test_results_of_realnvp(finished):
    """The inverse is one; of points there are nats and an integral; the rate warms up."""
    script, folder = finished
    if script != "realnvp":
        return
    results = read_json(folder / "results.json")
    config = read_json(folder / "config.json")
    assert results["inverse_error"] < 0.5
    group, = load(folder / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(config["lr"] * 3 / 200)
    if config["dataset"] == "moons":
        assert results["nll_nats"] == pytest.approx(results["base"] + results["volume"])
        assert 0.8 < results["integral"] < 1  # N(0, 1), where it begins, has 0.911 in [-2, 2]²


def test_results_of_dcvae(finished):
    """What each number stands on, and a probe of the codes and of the pixels."""
    script, folder = finished
    if script != "dcvae":
        return
    results = read_json(folder / "results.json")
    assert results.keys() >= {
        "pixel_distance", "active", "clamp", "ema", "probe_error_percent",
        "probe_error_percent_ci95", "pixels_error_percent", "probe_images"}
    latent = read_json(folder / "config.json")["latent"]
    assert results["kl_per_dim"] == pytest.approx(results["kl"] / latent)
    assert results["code"] == "mean"
    assert records(folder)[-1].keys() == {"step", "split", "seconds", "pixel_distance", "kl",
                                          "kl_per_dim", "active"}


def test_rates_are_in_the_results(finished):
    """Five columns for each of the operations; only what is sent costs bits.

    Where y is a smaller x, there is bicubic enlargement to compare with.
    """
    script, folder = finished
    if script != "selfvae":
        return
    results = read_json(folder / "results.json")
    levels = read_json(folder / "config.json")["levels"]
    for column in ("percent", "raw_bpd", "ideal_bpd", "psnr_mean"):
        operations = [name for name in results if name.endswith(f"_{column}")]
        assert len(operations) == (5 if levels else 2)
    assert ("bicubic_psnr" in results) == (folder / "superresolution").exists()
    assert results["generate_percent"] == results["generate_ideal_bpd"] == 0
    if levels:
        of_all_latents = (levels + 1) * results["reconstruct_1_percent"]
        assert results["reconstruct_2_percent"] == pytest.approx(of_all_latents)


def test_logged_keys_are_explained(finished):
    """A key in log.jsonl that no page explains is a number without a meaning."""
    script, folder = finished
    page = (ROOT / "docs" / f"{script}.md").read_text(encoding="utf-8")
    for key in set().union(*records(folder)):
        general = re.sub("_[0-9]+$", "_k", key)
        assert f"`{key}`" in page or f"`{general}`" in page, f"{key} is not in docs/{script}.md"


def test_eval_rewrites_results_only(finished):
    """--eval gives the same numbers again, and touches nothing of the run."""
    script, folder = finished
    if read_json(folder / "config.json")["eval_every"] != 2:  # one of each script is enough
        return
    before = tree(folder)
    path = folder / "results.json"
    results = json.loads(before.pop(path))
    path.unlink()
    line = ["--out_dir", str(folder.parent), "--name", "done", "--device", "cpu", "--eval"]
    assert call(script, line) == 0
    again = read_json(path)
    for name, value in results.items():
        assert "seconds_" in name or again[name] == value, name
    after = tree(folder)
    del after[path]
    assert after == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_small_evaluates_fewer_images(script):
    Config = importlib.import_module(script).Config
    assert Config(small=True).eval_images == 500 and Config().eval_images is None


def test_a_run_is_kept_in_a_folder_of_its_own(run, tmp_path, training_only):
    """Another model, dataset, size or seed is another folder."""
    assert run("vae", steps=1, seed=3, **cheap("vae")) == 0
    assert (tmp_path / "runs" / "vae-shapes16-normal-small-s3" / "config.json").exists()


# ---- Reproducibility, resuming, compilation ------------------------------------------------------

@pytest.mark.parametrize("script, flags, pause, end", [
    *[(script, flags, 2, 4) for script, flags in CHEAPEST.items()],
    ("dcvae", dict(backbone="progan", phase_steps=3), 4, 6)])  # steps 4 to 6 are a fade
def test_resumed_run_equals_an_unbroken_one(script, flags, pause, end, run, tmp_path,
                                            training_only):
    """Bit for bit: weights, optimizer and log, whenever validated; its clock goes on.

    Another seed is another run.
    """
    assert run(script, name="whole", steps=end, eval_every=3, **flags) == 0
    assert run(script, name="parts", steps=pause, **flags) == 0
    torch.manual_seed(99)  # what the next process happens to start with
    assert run(script, name="parts", steps=end, resume=True, **flags) == 0
    assert run(script, name="other", steps=1, seed=1, **flags) == 0
    folder = tmp_path / "runs"
    assert_same_end(folder / "whole", folder / "parts")
    seconds = [row["seconds"] for row in records(folder / "parts")]
    assert seconds == sorted(seconds)
    whole, parts, other = [steps_of(folder / name) for name in ("whole", "parts", "other")]
    assert parts == whole and other[0] != whole[0]


def stopped_at(step):
    """In place of log_training: Ctrl-C at that step, before it is saved."""
    def log_training(folder, state, *arguments):
        if state["step"] == step:
            raise KeyboardInterrupt
    return log_training


@pytest.mark.parametrize("script", ["vae", "realnvp"])  # selfvae.py has the first one's copy
def test_cooldown(script, run, tmp_path, training_only, monkeypatch):
    """The rate falls on a line to zero at the step after the last.

    Also in a run that was made longer before it fell, and stopped while it did.
    """
    flags = cheap(script, cooldown=0.5, eval_every=9)
    folder = tmp_path / "runs"
    assert run(script, name="whole", steps=6, **flags) == 0
    whole = load(folder / "whole" / "last.pt")
    lr = whole["config"]["lr"] * (6 / 200 if script == "realnvp" else 0.999999**6)
    group, = whole["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(lr / 4)  # steps 3, 4, 5, 6: 4/4, 3/4, 2/4, 1/4
    monkeypatch.setattr(f"{script}.SAVE_SECONDS", -1)
    for step, end, how in ((2, 4, {}), (5, 6, {"resume": True})):
        with monkeypatch.context() as patch:
            patch.setattr(f"{script}.log_training", stopped_at(step))
            assert run(script, name="parts", steps=end, **flags, **how) == 130
    assert run(script, name="parts", steps=6, resume=True, **flags) == 0
    assert_same_end(folder / "whole", folder / "parts")


@pytest.mark.parametrize("script", BOUNDS)
def test_warmup(script, run, tmp_path, training_only, monkeypatch):
    """The weight of the KLs, and of nothing else, rises on a line to 1 after half of the steps."""
    names = ["kl_u", "re_y_1", "kl_z_1", "re_x"]
    leaves = []

    def costs(x):
        leaves.append([torch.ones(len(x), requires_grad=True) for _ in names])
        return dict(zip(names, leaves[-1]))

    monkeypatch.setattr(f"{script}.parallel", lambda cfg, model: costs)
    assert run(script, name="run", steps=4, **cheap(script, warmup=0.5, eval_every=9)) == 0
    for step, weight in enumerate((1 / 3, 2 / 3, 1, 1)):
        gradients = [leaf.grad.sum().item() for leaf in leaves[step]]
        assert gradients == pytest.approx([weight, 1, weight, 1])
    assert records(tmp_path / "runs" / "run")[0]["kl_u"] == 1  # the log has the bound itself


@pytest.mark.parametrize("script", BOUNDS)
def test_small_has_defaults_of_its_own(script, run, tmp_path, training_only):
    """What is typed stays, also 0; β₂ reaches Adamax."""
    Config = importlib.import_module(script).Config
    names = ("batch_size", "lr", "beta2", "warmup", "cooldown")
    for flags, expected in ((dict(), [32, 2e-3, 0.999, 0, 0]),
                            (dict(small=True), [8, 6e-3, 0.99, 0.2, 0.2]),
                            (dict(small=True, batch_size=4, warmup=0), [4, 6e-3, 0.99, 0, 0.2])):
        assert [getattr(Config(**flags), name) for name in names] == expected
    assert run(script, name="run", steps=1, **cheap(script, beta2=0.9)) == 0
    group, = load(tmp_path / "runs" / "run" / "last.pt")["optimizer"]["param_groups"]
    assert group["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_takes_the_flags_of_the_run(script, run, refused, tmp_path, training_only):
    """Nothing need be retyped; what is typed wins where it may change, else is refused."""
    assert run(script, name="run", steps=1, seed=3, **cheap(script)) == 0
    line = ["--out_dir", str(tmp_path / "runs"), "--name", "run", "--device", "cpu", "--resume"]
    assert call(script, [*line, "--steps", "2", "--seed", "3"]) == 0
    checkpoint = load(tmp_path / "runs" / "run" / "last.pt")
    assert checkpoint["state"]["step"] == 2
    assert checkpoint["config"]["seed"] == 3 and checkpoint["config"]["size"] == 16
    refused(script, "this run's --seed is 3 and cannot become 4", name="run", resume=True, seed=4)


def test_resume_of_a_run_that_is_older_than_flags(run, trained):
    """It gets their defaults. What it had and is gone does not matter."""
    path = trained("dcvae") / "last.pt"
    checkpoint = load(path)
    for name in ("backbone", "grow", "phase_steps", "ema"):
        del checkpoint["config"][name]
    checkpoint["config"]["save_every"] = 250
    torch.save(checkpoint, path)
    flags = cheap("dcvae", name="old", resume=True)
    assert run("dcvae", steps=3, **flags) == 0


@pytest.mark.parametrize("script", ["vae", "realnvp", "dcvae"])  # selfvae.py has the first's copy
def test_a_run_does_not_shrink(script, refused, trained):
    """Fewer steps than are done."""
    trained(script)
    flags = cheap(script, name="old", resume=True, steps=1)
    refused(script, "has done 2 steps, so it cannot end at 1", **flags)


@pytest.mark.parametrize("script", ["vae", "realnvp", "dcvae"])  # selfvae.py has the first's copy
def test_validations_are_logged_and_saved(script, run, tmp_path, training_only, monkeypatch):
    """A progress line before each, and then last.pt, also in a short run; its time is no training.

    Else best.pt stands alone until a minute is over, and a second run may start in its folder.
    """
    path = tmp_path / "runs" / "run" / "last.pt"
    saved = set()
    clock = itertools.count()

    class Model(getattr(importlib.import_module(script), MODELS[script])):
        """Notes in training which step last.pt has, if there is one."""

        def forward(self, *arguments, **options):
            if torch.is_grad_enabled():
                saved.add(load(path)["state"]["step"] if path.exists() else None)
            return super().forward(*arguments, **options)

    def slow(*arguments):
        list(itertools.islice(clock, 1000))

    monkeypatch.setattr(f"{script}.draw_curves", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    flags = cheap(script, steps=3, eval_every=2, log_every=9)
    assert run(script, Model, name="run", **flags) == 0
    assert saved == {None, 2}
    rows = records(path.parent)
    steps = [(row["split"], row["step"]) for row in rows]
    assert steps == [("train", 2), ("valid", 2), ("train", 3), ("valid", 3)]
    assert 0 < rows[0]["seconds"] == rows[1]["seconds"] < rows[2]["seconds"] < 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_validation_and_evaluation_have_their_own_images(script, run, no_figures, monkeypatch):
    """No test image decides which checkpoint is the best, and no other is evaluated."""
    counts = []

    def record(images, *arguments):
        counts.append(len(images))
        return common.evaluation_batches(images, *arguments)

    monkeypatch.setattr(f"{script}.evaluation_batches", record)
    assert run(script, steps=1, **cheap(script)) == 0
    of_probe = {51} if script == "dcvae" else set()  # it learns from training images
    assert counts[0] == 9 and set(counts[1:]) == {16} | of_probe


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile(script, run, monkeypatch, training_only):
    """--compile compiles the model, whole."""
    compiled = []

    def record(model, fullgraph):
        compiled.append((type(model).__name__, fullgraph))
        return model

    monkeypatch.setattr(torch, "compile", record)
    assert run(script, compile=True, steps=1, **cheap(script)) == 0
    assert compiled == [(MODELS[script], True)]


# ---- Ends that come early ------------------------------------------------------------------------

def heed_ctrl_c():
    """In a new process: shells have background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


ODD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
       "LOCAL_RANK": "0"}  # left over from torchrun


def test_ctrl_c_ends_a_run_that_goes_on(tiny_data, tmp_path):
    """A real process, as a terminal would stop it: code 130, one line, and what was saved is whole.

    Its console and locale know no Unicode.
    """
    line = flags_for("vae", tiny_data, tmp_path, name="läuft", prior="normal", steps=1_000_000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "vae.py", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="ascii", env=os.environ | ODD | {"OMP_NUM_THREADS": "1"}, preexec_fn=heed_ctrl_c)
    path = tmp_path / "läuft" / "last.pt"
    waited = time.monotonic()
    try:
        while not path.exists() and time.monotonic() - waited < 120:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume goes on" in err.splitlines()[-1]
    assert load(path)["state"]["step"] >= 1


def broken(script, call_number):
    """The script's model, whose first parameter is not finite from one pass of training on."""
    class Broken(getattr(importlib.import_module(script), MODELS[script])):
        calls = 0

        def forward(self, *arguments, **options):
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls == call_number:
                    next(self.parameters()).data.fill_(math.nan)
            return super().forward(*arguments, **options)
    return Broken


@pytest.mark.parametrize("script, every, term", [
    ("vae", 1, "re_x"), ("vae", 2, "re_x"), ("realnvp", 1, "volume"), ("dcvae", 1, "kl")])
def test_not_finite(script, every, term, run, tmp_path, no_figures, capsys, monkeypatch):
    """Noticed at the next progress line, which names the step; the last good checkpoint is kept."""
    monkeypatch.setattr(f"{script}.SAVE_SECONDS", -1)
    Model = broken(script, 7 if script == "dcvae" else 3)  # a step of the game has three passes
    assert run(script, Model, name="nan", steps=8, log_every=every, **cheap(script)) == 1
    told, = capsys.readouterr().err.splitlines()
    assert "step 3 is not finite" in told and re.search(rf"{term}\W+nan", told)
    folder = tmp_path / "runs" / "nan"
    assert load(folder / "last.pt")["state"]["step"] == 2
    assert not (folder / "results.json").exists()
    assert run(script, name="nan", steps=4, resume=True, **cheap(script)) == 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A finite loss can have an infinite gradient: the checkpoint before it is kept."""
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(math.inf)
    path = tmp_path / "last.pt"
    path.write_bytes(b"before")
    with pytest.raises(FloatingPointError, match="weight is not finite after step 7; the last"):
        vae.save(path, vae.Config(), model, torch.optim.SGD(model.parameters()), {"step": 7})
    assert path.read_bytes() == b"before"


def test_a_full_disk_leaves_the_checkpoints(run, trained, capsys, monkeypatch):
    """One line, exit code 2."""
    def full(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    folder = trained("vae")
    before = [(folder / name).read_bytes() for name in ("best.pt", "last.pt")]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run("vae", name="old", resume=True, steps=3, **cheap("vae")) == 2
    assert "No space left" in capsys.readouterr().err
    assert [(folder / name).read_bytes() for name in ("best.pt", "last.pt")] == before


# ---- A user's mistakes: exit code 2, one line on stderr, nothing written -------------------------

@pytest.fixture
def refused(tiny_data, tmp_path, capsys):
    """refused(script, told, **flags): refused in one line that holds `told`; no file is touched."""
    def check(script, told, **flags):
        line = flags_for(script, flags.pop("data_dir", tiny_data), tmp_path / "runs", **flags)
        capsys.readouterr()
        before = tree(tiny_data, tmp_path)
        code = call(script, line)
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), lines
        assert told in lines[0]
        assert tree(tiny_data, tmp_path) == before
    return check


ABSENT = "mps" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("told, flags", [
    ("batch_size", dict(batch_size=0)),
    ("batch_size", dict(batch_size="many")),
    ("lr", dict(lr="nan")),
    ("--seed must be from 0 to 4294967295", dict(seed=1764000000000000000)),
    ("no_such_flag", dict(no_such_flag=3)),
    (ABSENT, dict(device=ABSENT)),
    ("nonsense", dict(device="nonsense")),
    ("no/such/folder", dict(dataset="no/such/folder")),
    ("4", dict(size=4)),
    ("there is no", dict(name="never", resume=True)),
    ("there is no", dict(name="never", eval=True)),
], ids=str)
def test_wrong_flag(refused, script, told, flags):
    """The line names the flag or its value."""
    refused(script, told, **flags)


@pytest.mark.parametrize("script, told, flags", [
    ("vae", "invalid choice: 'foo'", dict(prior="foo")),
    ("vae", "--cooldown must be from 0 to 1, not 20.0", dict(cooldown=20)),
    ("vae", "20", dict(size=20)),  # 10, 5
    ("selfvae", "invalid choice: 'mog'", dict(prior="mog")),
    ("selfvae", "--cooldown must be from 0 to 1, not 20.0", dict(cooldown=20)),
    ("selfvae", "20", dict(size=20)),
    ("selfvae", "invalid choice: 'emboss'", dict(transform="emboss")),
    ("realnvp", "--cooldown must be from 0 to 1, not 20.0", dict(cooldown=20)),
    ("realnvp", "size 17 is no multiple of 2", dict(size=17)),
    ("dcvae", "--momentum must be from 0 to 1, not 20.0", dict(momentum=20)),
    ("dcvae", "--ema must be from 0 to 1, not 20.0", dict(ema=20)),
    ("dcvae", "size 20 is no multiple of 8", dict(size=20)),
    ("dcvae", "--label_column 7", dict(label_column=7)),
    ("dcvae", "--label_value 9", dict(label_value=9)),
    ("dcvae", "invalid choice: 'gan'", dict(loss="gan")),
    ("dcvae", "--grow is for --backbone progan", dict(grow=True)),
    ("dcvae", "--phase_steps is for", dict(phase_steps=3)),
    ("dcvae", "there is no vgg.pth", dict(path_length=4, lpips_weights="vgg.pth")),
    ("dcvae", "--patch_after is for", dict(backbone="progan", patch_after=1)),
    ("dcvae", "--contrast_layers b1", dict(backbone="progan", contrast_layers="b1")),
], ids=str)
def test_wrong_flag_of_one_script(refused, script, told, flags):
    """What a model cannot be; 20 for a fifth would be a run at a twentieth of the rate."""
    refused(script, told, **flags)


def test_folder_that_holds_a_run(refused, trained):
    """It is never overwritten, whichever of its files are left; all scripts have the same lines."""
    folder = trained("vae")
    flags = cheap("vae", name="old")
    refused("vae", "--resume", **flags)
    (folder / "config.json").rename(folder / "config")
    refused("vae", "--resume", **flags)
    (folder / "config").rename(folder / "config.json")
    for path in folder.glob("*.pt"):
        path.unlink()
    refused("vae", "without a last.pt, delete it", **flags)


def test_a_folder_is_claimed_by_one_run(run, tmp_path, monkeypatch):
    """Two that start at once have both seen an empty folder: config.json is made by one of them."""
    path = tmp_path / "runs" / "new" / "config.json"

    def load_images(*arguments):
        path.parent.mkdir(parents=True)
        path.write_text("of the other", encoding="utf-8")
        return common.load_images(*arguments)

    monkeypatch.setattr("vae.load_images", load_images)
    assert run("vae", name="new", **cheap("vae")) == 2
    assert path.read_text(encoding="utf-8") == "of the other"


def test_checkpoint_of_another_model(refused, trained):
    """Of another script, of another prior, of another version."""
    folder = trained("vae")
    checkpoint = load(folder / "last.pt")
    for how in ({"resume": True}, {"eval": True}):
        refused("selfvae", "a checkpoint of vae.py, not of selfvae.py", name="old", **how)
        refused("vae", "this run's --prior is normal and cannot become mog", name="old",
                prior="mog", **how)
    flags = cheap("vae", name="old")
    checkpoint["model"].popitem()
    for name in ("last.pt", "best.pt"):
        torch.save(checkpoint, folder / name)
    refused("vae", "another version", resume=True, **flags)
    refused("vae", "another version", eval=True, **flags)


class Payload:
    """Pickled, it is an order to run code."""

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_damaged_checkpoint(refused, trained, tmp_path):
    """Cut, no checkpoint, or with code to run: refused, and not run.

    Whatever torch.load makes of changed bytes, it is one line.
    """
    last = trained("vae") / "last.pt"
    whole = last.read_bytes()
    payload = Payload()
    payload.target = str(tmp_path / "ran")
    torch.save({"script": "vae", "config": payload}, last)
    rng = np.random.default_rng(0)
    contents = [b"", b"no checkpoint\n", pickle.dumps([1, 2], 2), pickle.dumps(payload, 2),
                last.read_bytes(), whole[:-50]]
    contents += [whole[:length] for length in rng.integers(len(whole), size=20)]
    for content in contents:
        last.write_bytes(content)
        refused("vae", "last.pt", name="old", resume=True, **cheap("vae"))
    assert not (tmp_path / "ran").exists()
    for _ in range(40):
        broken = bytearray(whole)
        for place in rng.integers(-3000, 3000, 4):  # near the ends, where the directories lie
            broken[place] = rng.integers(256)
        last.write_bytes(broken)
        try:
            vae.load_checkpoint(last.parent, best=False)
        except common.UserError as error:
            assert "last.pt" in str(error)


# ---- Metrics of networks that may be missing -----------------------------------------------------

class Colours(torch.nn.Module):
    """In place of Inception: features and logits of an image are its mean colours."""

    def forward(self, pixels):
        colours = pixels.float().mean((2, 3))
        return colours, colours / 100


def stand_in(Network, *arguments):
    """In place of a network with its weights."""
    return Colours() if Network is common.InceptionFeatures else torch.nn.Identity()


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_of_networks(script, run, tmp_path, no_figures, monkeypatch):
    """Without the networks a run without these metrics; with them how many images they are of."""
    flags = cheap(script, fid=5)
    if script == "dcvae":
        flags |= {"path_length": 4, "eval_every": 1}
    folder = tmp_path / "runs"
    users = ("common", "dcvae")
    for module in users:
        monkeypatch.setattr(f"{module}.load_network", nothing)
    assert run(script, name="without", **flags) == 0
    without = read_json(folder / "without" / "results.json")
    assert not without.keys() & {"fid_train", "perceptual_distance", "path_length"}
    for module in users:
        monkeypatch.setattr(f"{module}.load_network", stand_in)
    with pytest.warns(UserWarning, match="10,000"):
        assert run(script, name="with", **flags) == 0
    results = read_json(folder / "with" / "results.json")
    counts = [results[f"fid_{split}images"] for split in ("", "train_", "test_")]
    assert counts == [5, 60, 16]
    assert results["fid_train"] > 0 and results["fid_test"] > 0 and results["inception_score"] >= 1
    if script == "dcvae":
        assert results["reconstruction_fid_images"] == 16
        assert results["reconstruction_fid_test_images"] == 16
        assert results["perceptual_distance"] > 0
        assert results["path_length"] > 0 and results["path_length_pairs"] == 4
        assert results["path_length_in"] == "VGG ReLU 4_3"
        fids = [row["fid_valid"] for row in records(folder / "with") if row["split"] == "valid"]
        assert load(folder / "with" / "best.pt")["state"]["best"] == min(fids)


# ---- The data of a run ---------------------------------------------------------------------------

def test_a_run_knows_its_images(refused, run, no_figures, tmp_path):
    """A folder that has moved is the same data; with an image more it is another split."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(common.make_shapes(12, 24, 0)[0]):
        Image.fromarray(image).save(pictures / f"{i:02d}.png")
    flags = cheap("vae", name="a", data_dir=tmp_path / "data")
    assert run("vae", dataset=pictures, **flags) == 0
    # A tenth of twelve is one image.
    assert read_json(tmp_path / "runs" / "a" / "results.json")["iw_bpd_se"] == 0
    flags["dataset"] = pictures.rename(tmp_path / "moved")
    assert run("vae", resume=True, steps=3, **flags) == 0
    shutil.copy(tmp_path / "moved" / "00.png", tmp_path / "moved" / "more.png")
    common.load_images(str(tmp_path / "moved"), tmp_path / "data", 16)
    for how in ({"resume": True}, {"eval": True}):
        refused("vae", "images were 11 for training, 1 for the test", **flags, **how)


def test_another_dataset_is_refused(refused, run, trained, capsys):
    """best.pt is what is evaluated."""
    folder = trained("vae")
    flags = cheap("vae", name="old", eval=True)
    refused("vae", "this run's images were", dataset="mnist", **flags)
    checkpoint = load(folder / "best.pt")
    checkpoint["state"]["step"] = 1
    torch.save(checkpoint, folder / "best.pt")
    assert run("vae", **flags) == 0
    assert "evaluating the model of step 1;" in capsys.readouterr().out


# ---- Numbers, of vae.py and common.py ------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: vae.VAE(vae.Config(small=True), (3, 16, 16)),
    lambda: selfvae.SelfVAE(selfvae.Config(small=True, exact=True), (3, 16, 16))])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_first_batch_of_one_colour_makes_no_absurd_bound(make, value):
    """The first batch sets the length of every layer; one without spread used to make 1e24 bpd."""
    model = make()
    model.initialize(torch.full((4, 3, 16, 16), value))
    x = common.from_uint8(torch.randint(256, (8, 3, 16, 16)))
    bpd = common.bits_per_dim(-model.elbo(x), 3 * 16 * 16)
    assert bpd.isfinite().all() and bpd.max() < 100


def test_json_has_no_infinity(tmp_path):
    values = {"a": math.inf, "b": math.nan, "c": 1.5, "d": "text", "e": 3}
    common.write_results(tmp_path, values)
    assert read_json(tmp_path / "results.json") == values | {"a": None, "b": None}


def test_a_slow_model_is_sampled_once(capsys):
    """After one warm-up, and not ten times; what takes so long is said."""
    calls = []

    class Slow:
        def sample(self, n):
            calls.append(n)
            return torch.zeros(n)

    assert common.seconds_to_sample(Slow(), 7, limit=0) >= 0
    assert calls == [7, 7] and "sampling of 7 at a time" in capsys.readouterr().out
