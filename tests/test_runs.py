"""The scripts as a user runs them: tiny data, a few steps.

What a run leaves behind, how it resumes, ends early, fails and refuses.
"""

import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import numpy as np
import pytest
import torch
import vae
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for, narrow_networks, pictures_on
from PIL import Image

COMBOS = [
    ("vae", dict(prior="normal", dataset="mnist")),
    ("vae", dict(prior="mog")),
    ("vae", dict(prior="realnvp")),
    ("selfvae", dict(levels=0, prior="normal")),
    ("selfvae", dict(levels=1, exact=True)),
    ("selfvae", dict(levels=2, prior="normal", size=32)),
    ("selfvae", dict(transform="sketch", prior="normal")),
    ("realnvp", {}),
    ("realnvp", dict(dataset="mnist")),
    ("realnvp", dict(dataset="moons", batch_size=500)),
    ("dcvae", {}),
    ("dcvae", dict(loss="vae", dataset="mnist")),
    ("dcvae", dict(loss="vaegan", gan="log")),
    ("dcvae", dict(loss="contrastive", patch_after=1)),
    ("dcvae", dict(backbone="progan", phase_steps=1)),
]
IDS = [" ".join([script, *map(str, flags.values())]) for script, flags in COMBOS]
FIRST = [COMBOS[0], COMBOS[3], COMBOS[7], COMBOS[10]]  # one of each script
BOUNDS = ("vae", "selfvae")  # the scripts that report the ELBO as reconstruction errors and KLs


def coarser(density):
    """A density at a 25th of its cells."""
    def at_fewer_cells(model, reach, cells):
        p = density(model, reach, cells // 5)
        return p.repeat_interleave(5, 0).repeat_interleave(5, 1)
    return at_fewer_cells


def seconds_to_sample_one(model, n):
    """In place of the time for n images."""
    return common.seconds_to_sample(model, 1, runs=1)


def cut_short(monkeypatch):
    """Time how long one image takes, not 100, ten times; see the density of points coarsely."""
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.seconds_to_sample", seconds_to_sample_one)
    monkeypatch.setattr("realnvp.density", coarser(importlib.import_module("realnvp").density))


def nothing(*arguments, **options):
    """In place of what a test does not look at."""


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


def tree(*folders):
    """Everything below the folders: {path: content or None for a folder}."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def decoded(path):
    """A PNG -> its pixel values, uint8 (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def records(folder):
    """The lines of log.jsonl."""
    return common.read_log(folder / "log.jsonl")


def without_seconds(folder):
    """The lines of log.jsonl without their times."""
    rows = records(folder)
    for row in rows:
        del row["seconds"]
    return rows


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load(path):
    """A checkpoint, loaded as the scripts do: no code in it is run."""
    return torch.load(path, map_location="cpu", weights_only=True)


def equal(a, b):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- A finished run ------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=COMBOS, ids=IDS)
def finished(request, tiny_data, tmp_path_factory):
    """(script, its folder, the command line, the exit code) of a short run of each combination.

    Those of FIRST are validated in their second step too.
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
        code = call(script, line)
    return script, out_dir / "done", line, code


def test_run_is_complete(finished):
    """A file that is missing, or a step not logged, is what a user would look for in vain."""
    script, folder, line, code = finished
    assert code == 0
    config = read_json(folder / "config.json")
    assert config["steps"] == 3 and config["name"] == "done"
    assert config["torch"] == torch.__version__
    assert {"command", "commit"} <= config.keys()
    steps = [(record["split"], record["step"]) for record in records(folder)]
    validated = [("valid", 2)] if config["eval_every"] == 2 else []
    assert steps == [("train", 1), ("train", 2), *validated, ("train", 3), ("valid", 3)]
    for record in records(folder):
        assert all(math.isfinite(value) for key, value in record.items() if key != "split")
    assert load(folder / "last.pt").keys() >= {"script", "config", "state", "model", "optimizer"}
    kept = "best.pt" if script != "dcvae" else "last.pt"  # without FID no step is best there
    assert load(folder / kept)["script"] == script
    assert (folder / "best.pt").exists() == (script != "dcvae")
    assert list(folder.rglob("*.tmp")) == []
    samples = {f"{step:06d}.png" for split, step in steps if split == "valid"} | {"test.png"}
    assert samples <= {path.name for path in (folder / "samples").iterdir()}
    # Elsewhere `finished` leaves them out.
    assert (folder / "curves.png").exists() == (config["eval_every"] == 2)
    for path in [*folder.glob("curves.png"), *(folder / "samples").iterdir()]:
        assert decoded(path).std() > 0, path


def test_results(finished):
    """results.json is flat and finite, and its sums are those of its parts."""
    script, folder, _, _ = finished
    results = read_json(folder / "results.json")
    for name, value in results.items():
        assert isinstance(value, (str, int)) or math.isfinite(value), name
    assert results["step"] in (2, 3)  # the better of the two validations
    assert results["test_images"] == len(evaluated_pixels(folder))
    if script not in BOUNDS:
        return
    assert results.keys() >= {"elbo_bpd", "iw_bpd", "iw_bpd_se", "iw_samples", "iw_images",
                              "re_nats", "kl_nats", "parameters", "seconds_1", "seconds_100"}
    dims = math.prod(evaluated_pixels(folder).shape[1:])
    nats = results["re_nats"] + results["kl_nats"]
    assert results["elbo_bpd"] == pytest.approx(nats / (dims * math.log(2)), rel=1e-6)
    errors = [value for name, value in results.items() if re.match("re_[xy]", name)]
    assert results["re_nats"] == pytest.approx(sum(errors))
    assert results["iw_bpd"] <= results["iw_elbo_bpd"] + 1e-6
    assert (results["iw_samples"], results["iw_images"]) == (2, 4)
    assert min(results["seconds_1"], results["seconds_100"], results["iw_bpd_se"]) > 0
    tensors = load(folder / "best.pt")["model"]
    assert 0 < results["parameters"] <= sum(tensor.numel() for tensor in tensors.values())


def evaluated_pixels(folder):
    """The run's test images that are evaluated, uint8 (N, H, W, C), from its data folder."""
    config = read_json(folder / "config.json")
    images = common.load_images(config["dataset"], config["data_dir"], config["size"])
    return images.test[:config["eval_images"]]


def test_sheets_show_true_pixels(finished):
    """8 images a row, enlarged to 64 pixels; reconstructions begin with the test images."""
    script, folder, _, _ = finished
    if not (folder / "reconstructions").exists():  # points of the plane
        return
    images = evaluated_pixels(folder)[:8]
    size = images.shape[1]
    assert len(pictures_on(folder / "samples" / "test.png", size)) > 0
    pictures = pictures_on(folder / "reconstructions" / "test.png", size)
    assert np.array_equal(pictures[0], np.broadcast_to(images, (8, size, size, 3)))
    for path in folder.glob("*/*.png"):
        assert path.stat().st_size < 300_000, path


def figures_of(folder):
    """The figures of the test images, without their ending."""
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/test*.png")}


def test_realnvp_results_and_figures(finished):
    """Bounds for images, with two sheets of samples; nats, an integral, one picture for points."""
    script, folder, _, _ = finished
    if script != "realnvp":
        return
    results = read_json(folder / "results.json")
    config = read_json(folder / "config.json")
    nats = results["base"] + results["volume"]
    assert results.keys() >= {"parameters", "seconds_1", "seconds_100", "train_seconds"}
    assert results["inverse_error"] < 0.5
    group, = load(folder / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(config["lr"] * 3 / 200)  # step 3 of the warm-up
    if config["dataset"] == "moons":
        assert results["nll_nats"] == pytest.approx(nats) and "elbo_bpd" not in results
        # Three steps from N(0, 1), which has 0.911 in [-2, 2]².
        assert 0.8 < results["integral"] < 1
        assert figures_of(folder) == {"samples/test"}
    else:
        dims = math.prod(evaluated_pixels(folder).shape[1:])
        assert results["elbo_bpd"] == pytest.approx(nats / (dims * math.log(2)), rel=1e-6)
        assert results["iw_bpd"] <= results["iw_elbo_bpd"] + 1e-6
        assert (results["iw_samples"], results["iw_images"]) == (2, 4)
        assert figures_of(folder) == {"samples/test", "samples/test-temperature0.7",
                                      "interpolations/test", "reconstructions/test"}


def test_dcvae_results_and_figures(finished):
    """What each number stands on, a probe of the codes and of the pixels, and a figure each."""
    script, folder, _, _ = finished
    if script != "dcvae":
        return
    results = read_json(folder / "results.json")
    size = evaluated_pixels(folder).shape[1]
    assert results.keys() >= {
        "pixel_distance", "kl", "kl_per_dim", "active", "test_images", "code", "clamp", "ema",
        "parameters", "probe_error_percent", "probe_error_percent_ci95", "pixels_error_percent",
        "probe_images", "seconds_1", "seconds_100"}
    config = read_json(folder / "config.json")
    assert results["kl_per_dim"] == pytest.approx(results["kl"] / config["latent"])
    assert results["test_images"] == 16 and results["code"] == "mean"
    valid = [record for record in records(folder) if record["split"] == "valid"][-1]
    assert valid.keys() == {"step", "split", "seconds", "pixel_distance", "kl", "kl_per_dim",
                            "active"}
    assert figures_of(folder) == {"samples/test", "reconstructions/test", "interpolations/test",
                                  "mixing/test", "editing/test-0-3"}
    mixing = pictures_on(folder / "mixing" / "test.png", size)
    assert (mixing[0, 0] == 255).all()  # no image in the corner
    assert mixing.shape == pictures_on(folder / "interpolations" / "test.png", size).shape


FIGURES = {("downscale", 0): set(), ("downscale", 1): {"superresolution", "variations"},
           ("downscale", 2): {"superresolution", "variations"}, ("sketch", 1): {"variations"}}


def test_selfvae_draws_every_figure(finished):
    """Rows of 8: samples of K + 1, reconstructions of x, y and four operations.

    Super-resolution only where y is a small x. At 32x32 ten rows are the most.
    """
    script, folder, _, _ = finished
    if script != "selfvae":
        return
    config = read_json(folder / "config.json")
    K = config["levels"]
    count, size = evaluated_pixels(folder).shape[:2]
    sets = {"samples": K + 1, "reconstructions": 6 if K else 2, "superresolution": 4,
            "variations": K + 1 if K > 1 else 1}
    of_images = 1 if size == 32 else count // 8
    repeats = {"samples": 4, "reconstructions": of_images, "superresolution": of_images,
               "variations": 8}
    most = 10 if size == 32 else 100
    expected = FIGURES[config["transform"], K] | {"samples", "reconstructions", "interpolations"}
    assert {path.parent.name for path in folder.glob("*/*.png")} == expected
    for name in expected - {"interpolations"}:
        rows = min(repeats[name], most // sets[name]) * sets[name]
        assert len(pictures_on(folder / name / "test.png", size)) == rows, name
    spaces = ["test-u.png", "test-v.png"] if config["prior"] == "realnvp" else ["test-u.png"]
    assert sorted(path.name for path in (folder / "interpolations").iterdir()) == spaces


COLUMN = re.compile("_(percent|raw_bpd|ideal_bpd|psnr|psnr_8bit|psnr_mean)$")


def test_rates_are_in_the_results(finished):
    """Six columns for each of the operations; only what is sent costs bits.

    Where y is a smaller x, there is bicubic enlargement to compare with.
    """
    script, folder, _, _ = finished
    if script != "selfvae":
        return
    results = read_json(folder / "results.json")
    table = {key: value for key, value in results.items() if COLUMN.search(key)}
    assert ("bicubic_psnr" in table) == (folder / "superresolution").exists()
    table.pop("bicubic_psnr", None)
    levels = read_json(folder / "config.json")["levels"]
    assert len(table) == (30 if levels else 12)
    assert table["generate_percent"] == table["generate_ideal_bpd"] == 0
    if levels:
        of_all_latents = (levels + 1) * table["reconstruct_1_percent"]
        assert table["reconstruct_2_percent"] == pytest.approx(of_all_latents)


def test_logged_keys_are_explained(finished):
    """A key in log.jsonl that no page explains is a number without a meaning."""
    script, folder, _, _ = finished
    page = (ROOT / "docs" / f"{script}.md").read_text(encoding="utf-8")
    keys = set().union(*records(folder))
    for key in keys:
        general = re.sub("_[0-9]+$", "_k", key)
        assert f"`{key}`" in page or f"`{general}`" in page, f"{key} is not in docs/{script}.md"


def test_eval_rewrites_results_only(finished):
    """--eval gives the same numbers again, and touches nothing of the run."""
    script, folder, line, _ = finished
    if read_json(folder / "config.json")["eval_every"] != 2:  # one of each script is enough
        return
    names = ("config.json", "log.jsonl", "last.pt", "best.pt", "curves.png")
    kept = [folder / name for name in names if (folder / name).exists()]
    before = tree(folder)
    times = [path.stat().st_mtime_ns for path in kept]
    results = read_json(folder / "results.json")
    (folder / "results.json").unlink()
    assert call(script, [*line, "--eval"]) == 0
    again = read_json(folder / "results.json")
    for name, value in results.items():
        assert "seconds_" in name or again[name] == value, name
    after = tree(folder)
    assert after.keys() == before.keys()
    changed = [path.name for path in before if before[path] != after[path]]
    assert set(changed) <= {"results.json"}
    assert times == [path.stat().st_mtime_ns for path in kept]


def test_evaluation_has_a_size(run, tmp_path):
    """--eval_images 5: five validation and five test images, and it says so; --small has 500."""
    for script in ("vae", "dcvae"):
        assert run(script, name=script, eval_images=5, **cheap(script)) == 0
        assert read_json(tmp_path / "runs" / script / "results.json")["test_images"] == 5
    for script in SCRIPTS:
        Config = importlib.import_module(script).Config
        assert Config(small=True).eval_images == 500 and Config().eval_images is None
        assert Config(small=True, eval_images=7).eval_images == 7


# ---- Reproducibility, compilation ----------------------------------------------------------------

CHEAPEST = {"vae": dict(prior="normal"), "selfvae": dict(prior="normal", levels=1),
            "realnvp": {}, "dcvae": dict(d_steps=2)}


def cheap(script, **flags):
    """The cheapest model of a script, with more flags."""
    return CHEAPEST[script] | flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_an_unbroken_one(script, run, tmp_path, training_only):
    """Bit for bit: weights, optimizer and log."""
    flags = cheap(script, eval_every=3)
    assert run(script, name="whole", steps=4, **flags) == 0
    assert run(script, name="parts", steps=2, **flags) == 0  # with a validation at step 2
    torch.manual_seed(99)  # what the next process happens to start with
    assert run(script, name="parts", steps=4, resume=True, **flags) == 0
    whole = load(tmp_path / "runs" / "whole" / "last.pt")
    parts = load(tmp_path / "runs" / "parts" / "last.pt")
    assert whole["state"]["step"] == parts["state"]["step"] == 4
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])
    of_whole = without_seconds(tmp_path / "runs" / "whole")
    of_parts = without_seconds(tmp_path / "runs" / "parts")
    extra = [row for row in of_parts if (row["split"], row["step"]) == ("valid", 2)]
    assert len(extra) == 1 and [row for row in of_parts if row not in extra] == of_whole


def test_growing_run_resumed_in_the_middle_of_a_fade(run, tmp_path, training_only):
    """Bit for bit: steps 4 to 6 of these are a fade, and step 4 is the last before the pause."""
    flags = dict(backbone="progan", phase_steps=3, eval_every=9)
    assert run("dcvae", name="whole", steps=6, **flags) == 0
    assert run("dcvae", name="parts", steps=4, **flags) == 0
    assert run("dcvae", name="parts", steps=6, resume=True, **flags) == 0
    whole = load(tmp_path / "runs" / "whole" / "last.pt")
    parts = load(tmp_path / "runs" / "parts" / "last.pt")
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])


def test_a_run_that_has_not_grown_up_is_evaluated_as_it_is(run, tmp_path, no_figures):
    """Else --eval shows layers of 16x16 that never learned: the numbers are training's last."""
    assert run("dcvae", name="young", backbone="progan", phase_steps=3) == 0
    path = tmp_path / "runs" / "young" / "results.json"
    before = read_json(path)
    line = ["--out_dir", str(tmp_path / "runs"), "--name", "young", "--device", "cpu", "--eval"]
    assert call("dcvae", line) == 0
    assert read_json(path)["pixel_distance"] == pytest.approx(before["pixel_distance"], rel=1e-5)


@pytest.mark.parametrize("script", ["vae", "realnvp"])  # selfvae.py has the first one's copy
def test_cooldown(script, run, tmp_path, training_only, monkeypatch, capsys):
    """The rate falls on a line to zero at the step after the last, also in a run that was stopped.

    A last step that becomes another one when it falls already would bend the line.
    """
    flags = cheap(script, cooldown=0.5, eval_every=9)
    assert run(script, name="whole", steps=4, **flags) == 0
    whole = load(tmp_path / "runs" / "whole" / "last.pt")
    lr = whole["config"]["lr"] * (4 / 200 if script == "realnvp" else 0.999999**4)
    group, = whole["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(lr / 3)  # steps 2, 3, 4: 3/3, 2/3, 1/3

    def stop_at_4(folder, state, *arguments):
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(f"{script}.SAVE_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(f"{script}.log_training", stop_at_4)
        assert run(script, name="parts", steps=4, **flags) == 130
    capsys.readouterr()
    before = tree(tmp_path)
    assert run(script, name="parts", steps=8, resume=True, **flags) == 2
    assert "falls to zero at step 4" in capsys.readouterr().err and tree(tmp_path) == before
    assert run(script, name="parts", steps=4, resume=True, **flags) == 0
    parts = load(tmp_path / "runs" / "parts" / "last.pt")
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])


@pytest.mark.parametrize("script", ["vae", "realnvp"])
def test_a_run_may_grow_before_its_rate_falls(script, run, tmp_path, training_only, monkeypatch):
    """It then falls over the last part of the longer run."""
    def stop_at_2(folder, state, *arguments):
        if state["step"] == 2:
            raise KeyboardInterrupt

    flags = cheap(script, cooldown=0.5, eval_every=9)
    monkeypatch.setattr(f"{script}.SAVE_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(f"{script}.log_training", stop_at_2)
        assert run(script, name="parts", steps=4, **flags) == 130
    assert run(script, name="parts", steps=6, resume=True, **flags) == 0
    assert run(script, name="whole", steps=6, **flags) == 0
    whole = load(tmp_path / "runs" / "whole" / "last.pt")
    parts = load(tmp_path / "runs" / "parts" / "last.pt")
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_takes_the_flags_of_the_run(script, run, tmp_path, training_only, capsys):
    """Nothing need be retyped; what is typed wins where it may change, else is refused."""
    assert run(script, name="run", steps=1, seed=3, **cheap(script)) == 0
    line = ["--out_dir", str(tmp_path / "runs"), "--name", "run", "--device", "cpu", "--resume"]
    assert call(script, [*line, "--steps", "2"]) == 0
    checkpoint = load(tmp_path / "runs" / "run" / "last.pt")
    assert checkpoint["state"]["step"] == 2
    assert checkpoint["config"]["seed"] == 3 and checkpoint["config"]["size"] == 16
    capsys.readouterr()
    before = tree(tmp_path)
    assert call(script, [*line, "--seed", "4"]) == 2
    assert "this run's --seed is 3 and cannot become 4" in capsys.readouterr().err
    assert tree(tmp_path) == before


def short_config(script, **flags):
    """What the checkpoint of a run of 5 steps says of its flags."""
    Config = importlib.import_module(script).Config
    return dataclasses.asdict(Config(small=True, steps=5, **flags))


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_knows_flags_that_are_gone(script):
    """A checkpoint may be older than the loss of one, and is still read."""
    module = importlib.import_module(script)
    cfg = module.parse_flags([], short_config(script, seed=3) | {"save_every": 250})
    assert cfg == module.Config(small=True, steps=5, seed=3)


def test_resume_of_a_run_that_is_older_than_flags():
    """A flag that others decide takes what they say; one with a default had that, and keeps it."""
    module = importlib.import_module("dcvae")
    older = short_config("dcvae")
    for name in ("backbone", "grow", "phase_steps", "ema"):
        del older[name]
    assert module.parse_flags([], older).backbone == "autogan"
    with pytest.raises(common.UserError, match="--ema is 0.999 and cannot become 0.5"):
        module.parse_flags(["--ema", "0.5"], older)


@pytest.mark.parametrize("script", SCRIPTS)
def test_epochs_do_not_override_steps(script):
    """--epochs 9 beside a run's --steps would be ignored, so it is refused."""
    module = importlib.import_module(script)
    with pytest.raises(common.UserError, match="set by --steps, which --epochs does not change"):
        module.parse_flags(["--epochs", "9"], short_config(script))
    assert module.parse_flags(["--epochs", "9", "--steps", "6"], short_config(script)).steps == 6
    of_epochs = short_config(script) | {"steps": None}
    assert module.parse_flags(["--epochs", "9"], of_epochs).epochs == 9


@pytest.mark.parametrize("script", ["vae", "selfvae", "realnvp"])
def test_a_run_does_not_shrink(script):
    """Fewer steps than are done: refused, and the number of steps to come stays what it was."""
    module = importlib.import_module(script)
    state = {"step": 2000, "total": 2000}
    with pytest.raises(common.UserError, match="has done 2000 steps, so it cannot end at 100"):
        module.start_of_cooldown(module.Config(), state, 100)
    assert module.start_of_cooldown(module.Config(), state, 3000) == 3000


@pytest.mark.parametrize("script", ["vae", "realnvp", "dcvae"])  # selfvae.py has the first's copy
def test_validations_are_logged_and_saved(script, run, tmp_path, training_only):
    """A progress line before each, with the time up to it, and then last.pt, also in a short run.

    Else best.pt stands alone until a minute is over, and a second run may start in its folder.
    """
    path = tmp_path / "runs" / "run" / "last.pt"
    saved = []

    class Model(getattr(importlib.import_module(script), MODELS[script])):
        """Notes at each step which step last.pt has, if there is one."""

        def forward(self, *arguments, **options):
            if torch.is_grad_enabled():
                saved.append(load(path)["state"]["step"] if path.exists() else None)
            return super().forward(*arguments, **options)

    flags = cheap(script, steps=3, eval_every=2, log_every=9)
    assert run(script, Model, name="run", **flags) == 0
    assert set(saved[-1:]) == {2} and None in saved
    rows = records(tmp_path / "runs" / "run")
    steps = [(row["split"], row["step"]) for row in rows]
    assert steps == [("train", 2), ("valid", 2), ("train", 3), ("valid", 3)]
    assert rows[0]["seconds"] == rows[1]["seconds"] > 0


@pytest.mark.parametrize("script", ["vae", "dcvae"])  # the two kinds of training
def test_same_seed_same_run(script, run, tmp_path, training_only):
    """A run follows from its seed; another seed is another run."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(script, name=name, seed=seed, **cheap(script, steps=2)) == 0
    a = without_seconds(tmp_path / "runs" / "a")
    assert a == without_seconds(tmp_path / "runs" / "b")
    assert a != without_seconds(tmp_path / "runs" / "c")


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile(script, run, monkeypatch, training_only):
    """--compile compiles the model, whole; the default on a CPU does not."""
    compiled = []

    def record(model, fullgraph):
        compiled.append((type(model).__name__, fullgraph))
        return model

    monkeypatch.setattr(torch, "compile", record)
    assert run(script, name="plain", steps=1, **cheap(script)) == 0 and compiled == []
    assert run(script, name="compiled", compile=True, steps=1, **cheap(script)) == 0
    assert compiled == [(MODELS[script], True)]


# ---- Ends that come early ------------------------------------------------------------------------

PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
sys.path.insert(0, {root!r})
import vae
vae.SAVE_SECONDS = 0
vae.WIDTHS["small"] = {widths}
sys.exit(vae.main(vae.VAE, sys.argv[1:]))
"""


def test_ctrl_c_ends_a_run_that_goes_on(tiny_data, tmp_path, training_only):
    """A real process, as a terminal would stop it: code 130, one line, and --resume works.

    Steps that come again stand in the log twice: the later line counts.
    """
    line = flags_for("vae", tiny_data, tmp_path, name="long", prior="normal", steps=1_000_000)
    program = PROGRAM.format(root=str(ROOT), widths=vae.WIDTHS["small"])
    process = subprocess.Popen(
        [sys.executable, "-c", program, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / "long"
    waited = time.monotonic()
    try:
        while not (folder / "last.pt").exists() and time.monotonic() - waited < 120:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "--resume goes on" in err.splitlines()[-1]
    step = load(folder / "last.pt")["state"]["step"]
    assert call("vae", [*line, "--resume", "--steps", str(step + 2)]) == 0
    steps = {record["step"] for record in records(folder) if record["split"] == "train"}
    assert steps >= set(range(1, step + 3))
    assert load(folder / "last.pt")["state"]["step"] == step + 2


def broken(script, step, name):
    """The script's model, whose term `name` is not finite at one training step."""
    class Broken(getattr(importlib.import_module(script), MODELS[script])):
        """Counts the calls with gradients: those are training."""

        calls = 0

        def spoil(self, terms):
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls == step:
                    terms[name] = terms[name] * math.nan
            return terms

        if script == "realnvp":
            def costs(self, v, log_det):
                return self.spoil(super().costs(v, log_det))
        elif script == "dcvae":
            def autoencoder_terms(self, *arguments):
                return self.spoil(super().autoencoder_terms(*arguments))
        else:
            def terms(self, *arguments):
                return self.spoil(super().terms(*arguments))

        def forward(self, *arguments, **options):
            if script in BOUNDS:
                return self.terms(*arguments)
            return super().forward(*arguments, **options)
    return Broken


@pytest.mark.parametrize("script, every, term", [
    ("vae", 1, "re_x"), ("vae", 2, "re_x"), ("realnvp", 1, "volume"), ("dcvae", 1, "kl")])
def test_not_finite(script, every, term, run, tmp_path, no_figures, capsys, monkeypatch):
    """Noticed at the next progress line, which names the step; the last good checkpoint is kept."""
    monkeypatch.setattr(f"{script}.SAVE_SECONDS", -1)
    Model = broken(script, 3, term)
    assert run(script, Model, name="nan", steps=8, log_every=every, **cheap(script)) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and re.search(r"\bstep 3\b", told[0])
    assert re.search(rf"{term}\W+nan", told[0])
    last = load(tmp_path / "runs" / "nan" / "last.pt")
    assert last["state"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    assert not (tmp_path / "runs" / "nan" / "results.json").exists()
    assert run(script, name="nan", steps=4, resume=True, **cheap(script)) == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_are_not_finite_are_not_saved(script, tmp_path):
    """A finite loss can have an infinite gradient: the checkpoint before it is kept."""
    module = importlib.import_module(script)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    path = tmp_path / "last.pt"
    module.save(path, module.Config(), model, optimizer, {"step": 6})
    (0 * model.weight).sum().sqrt().backward()
    optimizer.step()
    with pytest.raises(FloatingPointError, match="weight is not finite after step 7; the last"):
        module.save(path, module.Config(), model, optimizer, {"step": 7})
    assert load(path)["state"]["step"] == 6


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


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve PNG files of 24 pixels a side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, _ = common.make_shapes(12, 24, 0)
    for i, image in enumerate(images):
        common.TF.to_pil_image(image).save(folder / f"{i:02d}.png")
    return folder


ABSENT = "mps" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("told, flags", [
    ("invalid", dict(prior="foo")),
    ("batch_size", dict(batch_size=0)),
    ("batch_size", dict(batch_size="many")),
    ("lr", dict(lr="nan")),
    ("no_such_flag", dict(no_such_flag=3)),
    (ABSENT, dict(device=ABSENT)),
    ("nonsense", dict(device="nonsense")),
    ("nonsense", dict(dataset="nonsense")),
    ("no/such/folder", dict(dataset="no/such/folder")),
    ("4", dict(size=4)),
], ids=str)
def test_wrong_flag(refused, script, told, flags):
    """The line names the flag or its value."""
    if "prior" in flags and script not in BOUNDS:
        return
    refused(script, told, **flags)


@pytest.mark.parametrize("script, flag", [
    ("vae", "cooldown"), ("selfvae", "cooldown"), ("realnvp", "cooldown"), ("dcvae", "momentum"),
    ("dcvae", "ema")])
def test_share_above_one(refused, script, flag):
    """20 for a fifth would be a run at a twentieth of the rate."""
    refused(script, f"--{flag} must be finite and from 0 to 1, not 20.0", **{flag: 20})


@pytest.mark.parametrize("script", BOUNDS)
def test_size_that_does_not_halve_to_8(refused, script, pictures):
    """20 pixels halve to 10 and 5."""
    refused(script, "20", dataset=pictures, size=20)


def test_size_that_the_flow_does_not_halve(refused, pictures):
    """17 is odd; 36, without --small and beyond 32, would have to halve three times."""
    refused("realnvp", "size 17 is no multiple of 2", dataset=pictures, size=17)
    assert call("realnvp", ["--dataset", str(pictures), "--size", "36"]) == 2


def test_dcvae_refuses(refused, pictures):
    """What its other flags cannot be."""
    refused("dcvae", "size 20 is no multiple of 8", dataset=pictures, size=20)
    refused("dcvae", "--contrast_layers b9", contrast_layers="b9")
    refused("dcvae", "--label_column 7", label_column=7)
    refused("dcvae", "--label_value 9", label_value=9)
    refused("dcvae", "invalid choice: 'gan'", loss="gan")
    refused("dcvae", "16, 32, 64 … pixels a side, not 24", backbone="progan", size=24)
    refused("dcvae", "--grow is for --backbone progan", grow=True)
    refused("dcvae", "--phase_steps is for", phase_steps=3)
    refused("dcvae", "there is no vgg.pth", path_length=4, lpips_weights="vgg.pth")
    refused("dcvae", "--patch_after is for", backbone="progan", patch_after=1)
    refused("dcvae", "--contrast_layers b1", backbone="progan", contrast_layers="b1")


def no_network(*arguments, **options):
    """In place of a download."""
    raise OSError("no network")


@pytest.mark.parametrize("script", SCRIPTS)
def test_fid(script, run, tmp_path, monkeypatch, no_figures, capsys):
    """Offline: one line, and a run without FID. With weights: both references, counts, best.pt."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    if script in ("vae", "dcvae"):  # the others have the same lines
        assert run(script, name="without", fid=3, **cheap(script)) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "no FID" in line]
        assert told and "pt_inception" in told[0] and str(hub) in told[0]
        assert "fid_train" not in read_json(tmp_path / "runs" / "without" / "results.json")

    def start(self, weights_path):
        torch.nn.Module.__init__(self)

    def mean_colours(self, pixels):
        colours = pixels.float().mean((2, 3))
        return colours, colours / 100

    monkeypatch.setattr(common.InceptionFeatures, "__init__", start)
    monkeypatch.setattr(common.InceptionFeatures, "forward", mean_colours)
    weights = hub / "checkpoints" / Path(common.INCEPTION_URL).name
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.touch()
    with pytest.warns(UserWarning, match="10,000"):
        assert run(script, name="with", fid=5, **cheap(script)) == 0
    results = read_json(tmp_path / "runs" / "with" / "results.json")
    counts = [results[f"fid_{split}images"] for split in ("", "train_", "test_")]
    assert counts == [5, 60, 16]
    assert results["fid_train"] > 0 and results["fid_test"] > 0 and results["inception_score"] >= 1
    if script == "dcvae":
        assert results["reconstruction_fid_images"] == 16
        assert results["reconstruction_fid_test_images"] == 16
        best = load(tmp_path / "runs" / "with" / "best.pt")["state"]["best"]
        assert best == pytest.approx(records(tmp_path / "runs" / "with")[-1]["fid_valid"])


def test_path_length(run, tmp_path, monkeypatch, capsys):
    """Offline one line, and a run without; with weights a number, its distance and its pairs."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert run("dcvae", name="without", path_length=4, **cheap("dcvae")) == 0
    assert "no path length" in capsys.readouterr().out
    assert "path_length" not in read_json(tmp_path / "runs" / "without" / "results.json")

    def start(self, weights_path):
        torch.nn.Module.__init__(self)

    monkeypatch.setattr(common.VGGFeatures, "__init__", start)
    monkeypatch.setattr(common.VGGFeatures, "forward", lambda self, x: x)
    weights = tmp_path / "checkpoints" / Path(common.VGG_URL).name
    weights.parent.mkdir(exist_ok=True)
    weights.touch()
    assert run("dcvae", name="with", path_length=4, **cheap("dcvae")) == 0
    results = read_json(tmp_path / "runs" / "with" / "results.json")
    assert results["path_length"] > 0 and results["path_length_pairs"] == 4
    assert results["path_length_in"] == "VGG ReLU 4_3"


def test_more_levels_than_halvings(refused):
    """32 -> 16 -> 8 -> 4: the networks have nothing to halve."""
    refused("selfvae", "--levels 3 leaves y_1 4 pixels", levels=3, size=32)


def test_transformations_that_do_not_exist_or_do_not_repeat(refused):
    """The line says which there are, and how often one can be applied."""
    refused("selfvae", "invalid choice: 'emboss'", transform="emboss")
    refused("selfvae", "take --levels 1", transform="edges", levels=2)


def test_empty_folder(refused, tmp_path):
    """No image in it."""
    (tmp_path / "empty").mkdir()
    refused("vae", "0 images", dataset=tmp_path / "empty")


@pytest.mark.parametrize("content", [b"no image", None], ids=["text", "cut"])
def test_folder_with_a_broken_image(refused, pictures, content):
    """The line names the file."""
    path = pictures / "05.png"
    path.write_bytes(content or path.read_bytes()[:300])
    refused("vae", "05.png", dataset=pictures)


def test_broken_data_folder(refused, tmp_path):
    """The line names the file that cannot be read."""
    (tmp_path / "data" / "shapes-16").mkdir(parents=True)
    refused("vae", "train.npy", data_dir=tmp_path / "data")


def test_folder_of_images(run, pictures, tmp_path):
    """The good case: read once, kept as .npy; the same files are not read again."""
    flags = dict(dataset=pictures, data_dir=tmp_path / "cache", **cheap("vae"))
    assert run("vae", name="once", **flags) == 0
    results = (tmp_path / "runs" / "once" / "results.json").read_text(encoding="utf-8")
    # A tenth of twelve is one image; it has no spread, but the JSON is valid.
    assert "NaN" not in results and json.loads(results)["iw_images"] == 1
    kept = tree(tmp_path / "cache")
    assert sorted(path.name for path in kept if path.is_file()) == ["test.npy", "train.npy"]
    assert run("vae", name="twice", **flags) == 0
    assert tree(tmp_path / "cache") == kept


@pytest.fixture
def trained(run, tmp_path, no_figures):
    """trained(script) -> the folder of a finished run named "old"."""
    def train(script):
        assert run(script, name="old", **cheap(script)) == 0
        return tmp_path / "runs" / "old"
    return train


def test_folder_that_holds_a_run(refused, trained):
    """It is never overwritten, even if only best.pt is there; all scripts have the same lines."""
    folder = trained("vae")
    refused("vae", "--resume", name="old", **cheap("vae"))
    (folder / "last.pt").unlink()
    refused("vae", "--resume", name="old", **cheap("vae"))


def test_a_game_does_not_shrink(refused, trained):
    """dcvae.py, which has no cooldown, refuses fewer steps than are done as the others do."""
    trained("dcvae")
    flags = cheap("dcvae") | {"steps": 1}
    refused("dcvae", "so it cannot end at 1", resume=True, name="old", **flags)


@pytest.mark.parametrize("how", ["resume", "eval"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_go_on_from(refused, script, how):
    """A --name that was never run."""
    refused(script, "there is no", name="never", **{how: True})


def test_checkpoint_of_another_model(refused, trained):
    """Of another script, or of another prior."""
    trained("vae")
    for how in ("resume", "eval"):
        refused("selfvae", "a checkpoint of vae.py, not of selfvae.py", name="old",
                **cheap("selfvae"), **{how: True})
        refused("vae", "this run's --prior is normal and cannot become mog", name="old",
                prior="mog", **{how: True})


class Payload:
    """Pickled, it is an order to run code."""

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_damaged_checkpoint(refused, trained, tmp_path):
    """Cut short, empty, no checkpoint, or a pickle that would run code: refused, and not run."""
    last = trained("vae") / "last.pt"
    whole = last.read_bytes()
    payload = Payload()
    payload.target = str(tmp_path / "ran")
    for content in (whole[:len(whole) // 2], whole[:-50], b"", b"no checkpoint\n",
                    pickle.dumps([1, 2], 2), pickle.dumps(payload, 2)):
        last.write_bytes(content)
        refused("vae", "last.pt", name="old", resume=True, **cheap("vae"))
    torch.save({"script": "vae", "config": payload}, last)
    refused("vae", "last.pt", name="old", resume=True, **cheap("vae"))
    assert not (tmp_path / "ran").exists()
