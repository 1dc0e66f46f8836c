"""The scripts as a user runs them: tiny data, a few steps. What a run leaves behind, how it resumes, stops, fails and refuses."""

import importlib
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time

import common
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for

COMBOS = [("vae", dict(prior="normal", dataset="mnist")), ("vae", dict(prior="mog")), ("vae", dict(prior="realnvp")),
          ("selfvae", dict(levels=0, prior="normal")), ("selfvae", dict(levels=1)),
          ("selfvae", dict(levels=2, prior="normal", size=32)), ("selfvae", dict(transform="sketch", prior="normal"))]
COMBOS += [(script, {}) for script in SCRIPTS if script not in ("vae", "selfvae")]
COMBOS += [("realnvp", dict(dataset="mnist")), ("realnvp", dict(dataset="moons", batch_size=500))]
COMBOS += [("dcvae", dict(loss="vae", dataset="mnist")), ("dcvae", dict(loss="vaegan", gan="log")), ("dcvae", dict(loss="contrastive", patch_after=1))]
FIRST = [next(combo for combo in COMBOS if combo[0] == script) for script in SCRIPTS]  # one of each script
BOUNDS = ("vae", "selfvae")  # the scripts that report the ELBO as reconstruction errors and KLs


def cut_short(monkeypatch):
    """Time one sample(n) call, not the mean of ten; see a density at a 25th of its cells."""
    monkeypatch.setattr(common.seconds_to_sample, "__defaults__", (1,))
    density = importlib.import_module("realnvp").density
    monkeypatch.setattr("realnvp.density", lambda model, reach, cells:
                        density(model, reach, cells // 5).repeat_interleave(5, 0).repeat_interleave(5, 1))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Evaluations are short in every test."""
    cut_short(monkeypatch)


@pytest.fixture
def training_only(monkeypatch):
    """No evaluation at the end of a run, and no figures."""
    monkeypatch.setattr(Figure, "savefig", lambda *arguments, **options: None)
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.evaluate", lambda *arguments: None)
        monkeypatch.setattr(f"{script}.draw", lambda *arguments: None)


def tree(*folders):
    """Everything below the folders: {path: content or None for a folder}."""
    return {path: path.read_bytes() if path.is_file() else None for folder in folders for path in sorted(folder.rglob("*"))}


def decoded(path):
    """A PNG -> its levels, uint8 (H, W, 3)."""
    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def records(folder):
    """The lines of log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def score(record):
    """One number of a line of log.jsonl that every step changes."""
    return record["bpd"] if "bpd" in record else record["kl"]


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


# ---- A finished run ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=COMBOS, ids=[" ".join([s, *(str(v) for v in f.values())]) for s, f in COMBOS])
def finished(request, tiny_data, tmp_path_factory):
    """(script, its folder, the command line, the exit code) of one short run of each combination."""
    script, flags = request.param
    out_dir = tmp_path_factory.mktemp("runs")
    line = flags_for(script, tiny_data, out_dir, name="done", steps=3, eval_every=2, **flags)
    with pytest.MonkeyPatch.context() as patch:
        cut_short(patch)
        code = call(script, line)
    return script, out_dir / "done", line, code


def test_run_is_complete(finished):
    script, folder, line, code = finished
    assert code == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 3 and config["name"] == "done" and config["torch"] == torch.__version__
    assert {"command", "commit"} <= config.keys()
    steps = [(record["split"], record["step"]) for record in records(folder)]
    assert steps == [("train", 1), ("train", 2), ("valid", 2), ("train", 3), ("valid", 3)]
    for record in records(folder):
        assert all(math.isfinite(value) for key, value in record.items() if key != "split")
    assert load(folder / "last.pt").keys() >= {"script", "config", "state", "model", "optimizer"}
    kept = "best.pt" if script != "dcvae" else "last.pt"  # without FID no number there says which step is best
    assert load(folder / kept)["script"] == script and (folder / "best.pt").exists() == (script != "dcvae")
    assert list(folder.rglob("*.tmp")) == []
    for path in ("curves.png", "samples/000002.png", "samples/000003.png", "samples/test.png"):
        assert decoded(folder / path).std() > 0, path


def test_results(finished):
    script, folder, _, _ = finished
    results = json.loads((folder / "results.json").read_text())
    for name, value in results.items():
        assert isinstance(value, (str, int)) or math.isfinite(value), name
    assert results["step"] in (2, 3)  # the better of the two validations
    if script not in BOUNDS:
        return
    assert results.keys() >= {"elbo_bpd", "iw_bpd", "iw_bpd_se", "iw_samples", "iw_images", "re_nats", "kl_nats", "parameters",
                              "seconds_1", "seconds_100"}
    _, height, width, channels = folder_images(finished).shape
    dims = height * width * channels
    assert results["elbo_bpd"] == pytest.approx((results["re_nats"] + results["kl_nats"]) / (dims * math.log(2)), rel=1e-6)
    assert results["re_nats"] == pytest.approx(sum(value for name, value in results.items() if re.match("re_[xy]", name)))
    assert results["iw_bpd"] <= results["iw_elbo_bpd"] + 1e-6
    assert (results["iw_samples"], results["iw_images"]) == (2, 4)
    assert min(results["seconds_1"], results["seconds_100"], results["iw_bpd_se"]) > 0
    tensors = load(folder / "best.pt")["model"]
    assert 0 < results["parameters"] <= sum(tensor.numel() for tensor in tensors.values())


def folder_images(finished):
    """The run's test images, uint8 (N, H, W, C), from its data folder."""
    config = json.loads((finished[1] / "config.json").read_text())
    return common.load_images(config["dataset"], config["data_dir"], config["size"]).test


def test_grids_show_true_pixels(finished):
    """8 images a row with 2 pixels between them; the first row of reconstructions/test.png is the test images, unchanged."""
    script, folder, _, _ = finished
    if not (folder / "reconstructions").exists():  # points of the plane
        return
    images = folder_images(finished)[:8]
    size = images.shape[1]
    for name in ("samples", "reconstructions"):
        grid = decoded(folder / name / "test.png")
        assert grid.shape[1] == 8 * (size + 2) + 2 and (grid.shape[0] - 2) % (size + 2) == 0
    for i, image in enumerate(images):  # `grid` is the reconstructions now
        left = 2 + i * (size + 2)
        assert np.array_equal(grid[2:2 + size, left:left + size], np.broadcast_to(image, (size, size, 3)))


def test_realnvp_results_and_figures(finished):
    """Bounds for images, with two sheets of samples; nats and an integral for points, with one picture."""
    script, folder, _, _ = finished
    if script != "realnvp":
        return
    results = json.loads((folder / "results.json").read_text())
    nats = results["base"] + results["volume"]
    assert results.keys() >= {"inverse_error", "parameters", "seconds_1", "seconds_100", "train_seconds"} and results["inverse_error"] < 0.1
    group, = load(folder / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(json.loads((folder / "config.json").read_text())["lr"] * 3 / 200)  # step 3 of the warm-up
    figures = {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/test*.png")}
    if json.loads((folder / "config.json").read_text())["dataset"] == "moons":
        assert results["nll_nats"] == pytest.approx(nats) and "elbo_bpd" not in results
        assert 0.8 < results["integral"] < 1  # three steps from N(0, 1), which has 0.911 in [-2, 2]²
        assert figures == {"samples/test"}
    else:
        dims = math.prod(folder_images(finished).shape[1:])
        assert results["elbo_bpd"] == pytest.approx(nats / (dims * math.log(2)), rel=1e-6)
        assert results["iw_bpd"] <= results["iw_elbo_bpd"] + 1e-6 and (results["iw_samples"], results["iw_images"]) == (2, 4)
        assert figures == {"samples/test", "samples/test-temperature0.7", "interpolations/test", "reconstructions/test"}


def test_dcvae_results_and_figures(finished):
    """What each number stands on, a probe of the codes and of the pixels, and a figure each."""
    script, folder, _, _ = finished
    if script != "dcvae":
        return
    results, size = json.loads((folder / "results.json").read_text()), folder_images(finished).shape[1]
    assert results.keys() >= {"pixel_distance", "kl", "kl_per_dim", "active", "test_images", "code", "clamp", "ema", "parameters",
                              "probe_error_percent", "probe_error_percent_ci95", "pixels_error_percent", "seconds_1", "seconds_100"}
    assert results["kl_per_dim"] == pytest.approx(results["kl"] / 128) and results["test_images"] == 16 and results["code"] == "mean"
    valid = [record for record in records(folder) if record["split"] == "valid"][-1]
    assert valid.keys() == {"step", "split", "seconds", "pixel_distance", "kl", "kl_per_dim", "active"}
    figures = {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/test*.png")}
    assert figures == {"samples/test", "reconstructions/test", "interpolations/test", "mixing/test", "editing/test-0-3"}
    corner = decoded(folder / "mixing" / "test.png")[2:2 + size, 2:2 + size]
    assert (corner == 255).all() and decoded(folder / "mixing" / "test.png").shape == decoded(folder / "interpolations" / "test.png").shape


FIGURES = {("downscale", 0): set(), ("downscale", 1): {"superresolution", "variations"},
           ("downscale", 2): {"superresolution", "variations"}, ("sketch", 1): {"variations"}}


def test_selfvae_draws_every_figure(finished):
    """Rows of 8: samples of K + 1, reconstructions of x, y and four operations, super-resolution only where y is a small x."""
    script, folder, _, _ = finished
    if script != "selfvae":
        return
    cfg = json.loads((folder / "config.json").read_text())
    K, size, count = cfg["levels"], folder_images(finished).shape[1], len(folder_images(finished))
    rows = {"samples": 4 * (K + 1), "reconstructions": count // 8 * (6 if K else 2),
            "superresolution": count // 8 * 4, "variations": 8 * (K + 1 if K > 1 else 1)}
    expected = FIGURES[cfg["transform"], K] | {"samples", "reconstructions", "interpolations"}
    assert {path.parent.name for path in folder.glob("*/*.png")} == expected
    for name in expected - {"interpolations"}:
        assert decoded(folder / name / "test.png").shape[0] == 2 + rows[name] * (size + 2), name
    spaces = ["test-u.png", "test-v.png"] if cfg["prior"] == "realnvp" else ["test-u.png"]
    assert sorted(path.name for path in (folder / "interpolations").iterdir()) == spaces


def test_rates_are_in_the_results(finished):
    """Six columns for each of the five operations; only what is sent costs bits, and y is sent whole."""
    script, folder, _, _ = finished
    if script != "selfvae":
        return
    results = json.loads((folder / "results.json").read_text())
    table = {key: value for key, value in results.items() if re.search("_(percent|raw_bpd|ideal_bpd|psnr|psnr_8bit|psnr_mean)$", key)}
    assert len(table) == (36 if (folder / "superresolution").exists() else 30) and table["generate_percent"] == table["generate_ideal_bpd"] == 0
    assert table["reconstruct_2_percent"] == pytest.approx((json.loads((folder / "config.json").read_text())["levels"] + 1) * table["reconstruct_1_percent"])


def test_logged_keys_are_explained(finished):
    script, folder, _, _ = finished
    page = (ROOT / "docs" / f"{script}.md").read_text()
    for key in {key for record in records(folder) for key in record}:
        assert f"`{key}`" in page or f"`{re.sub('_[0-9]+$', '_k', key)}`" in page, f"{key} is not explained in docs/{script}.md"


@pytest.mark.parametrize("finished", FIRST, ids=[script for script, _ in FIRST], indirect=True)
def test_eval_rewrites_results_only(finished):
    script, folder, line, _ = finished
    kept = [name for name in ("config.json", "log.jsonl", "last.pt", "best.pt", "curves.png") if (folder / name).exists()]
    before, times = tree(folder), [(folder / name).stat().st_mtime_ns for name in kept]
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    assert call(script, [*line, "--eval"]) == 0
    again = json.loads((folder / "results.json").read_text())
    measured = [name for name in results if "seconds" not in name or name == "train_seconds"]
    assert {name: again[name] for name in measured} == {name: results[name] for name in measured}
    after = tree(folder)
    assert after.keys() == before.keys()
    assert [path.name for path in before if before[path] != after[path] and path.name != "results.json"] == []
    assert times == [(folder / name).stat().st_mtime_ns for name in kept]


# ---- Reproducibility, precision, compilation ---------------------------------------------------------------------------

def cheap(script, **flags):
    """The cheapest model of a script."""
    return {"vae": dict(prior="normal"), "selfvae": dict(prior="normal", levels=1), "dcvae": dict(d_steps=2)}.get(script, {}) | flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_an_unbroken_one(script, run, tmp_path, training_only):
    flags = cheap(script, eval_every=3, save_every=2)
    assert run(script, name="whole", steps=4, **flags) == 0
    assert run(script, name="parts", steps=2, **flags) == 0  # with a validation at step 2 that the other does not have
    torch.manual_seed(99)  # what the next process happens to start with
    assert run(script, name="parts", steps=4, resume=True, **flags) == 0
    whole, parts = (load(tmp_path / "runs" / name / "last.pt") for name in ("whole", "parts"))
    assert whole["state"]["step"] == parts["state"]["step"] == 4
    for part in ("model", "optimizer"):
        assert equal(whole[part], parts[part]), part
    rows = {name: {(r["split"], r["step"]): score(r) for r in records(tmp_path / "runs" / name)} for name in ("whole", "parts")}
    assert len(records(tmp_path / "runs" / "parts")) == len(rows["parts"])  # none twice
    assert rows["parts"].pop(("valid", 2)) and rows["parts"] == rows["whole"]


def test_log_lines_that_were_never_saved_are_dropped(run, tmp_path):
    """A run killed between two checkpoints: the steps after the last one are run, and logged, again."""
    folder = tmp_path / "runs" / "killed"
    assert run("vae", name="killed", steps=2, **cheap("vae")) == 0
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "split": "train", "bpd": 1.0, "re_x": 1.0, "kl_z": 1.0, "seconds": 1.0}) + "\n")
    assert run("vae", name="killed", steps=3, resume=True, **cheap("vae")) == 0
    assert [r["step"] for r in records(folder) if r["split"] == "train"] == [1, 2, 3]
    assert records(folder)[-2]["bpd"] != 1.0


@pytest.mark.parametrize("script", ["vae", "dcvae"])  # the two kinds of training
def test_same_seed_same_run(script, run, tmp_path, training_only):
    flags = cheap(script, steps=2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(script, name=name, seed=seed, **flags) == 0
    a, b, c = ([{k: v for k, v in r.items() if k != "seconds"} for r in records(tmp_path / "runs" / name)] for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16(script, run, tmp_path, training_only):
    steps = 3 if script == "realnvp" else 2  # a flow is the identity at first
    assert run(script, name="bf16", dtype="bf16", steps=steps, **cheap(script)) == 0
    assert run(script, name="fp32", dtype="fp32", steps=steps, **cheap(script)) == 0
    bf16, fp32 = (score(records(tmp_path / "runs" / name)[-1]) for name in ("bf16", "fp32"))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.02)
    weights = load(tmp_path / "runs" / "bf16" / "last.pt")["model"].values()
    assert all(weight.dtype == torch.float32 for weight in weights if weight.is_floating_point())


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile(script, run, monkeypatch, training_only):
    """--compile compiles the losses, whole; the default on a CPU does not. What comes of it: test_scale.py."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: compiled.append(function.__name__ * fullgraph) or function)
    assert run(script, name="plain", steps=1, **cheap(script)) == 0 and compiled == []
    assert run(script, name="compiled", compile=True, steps=1, **cheap(script)) == 0
    assert compiled == (["terms", "discriminator_terms"] if script == "dcvae" else ["terms"])


# ---- Ends that come early ----------------------------------------------------------------------------------------------

def test_signal_saves_and_says_how_to_go_on(tiny_data, tmp_path):
    """A real process, as a terminal would stop it."""
    line = flags_for("vae", tiny_data, tmp_path / "runs", name="long", prior="normal", steps=1_000_000, save_every=1_000_000)
    process = subprocess.Popen([sys.executable, str(ROOT / "vae.py"), *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder, waited = tmp_path / "runs" / "long", time.monotonic()
    training = lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size
    try:
        while not training() and process.poll() is None and time.monotonic() - waited < 120:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    state = load(folder / "last.pt")["state"]
    assert 1 <= state["step"] < 1_000_000 and state["step"] == records(folder)[-1]["step"]
    advice = next(text for text in out.splitlines() if "--resume" in text)
    words = shlex.split(advice.split("go on with:")[1])
    assert words[0].startswith("python") and words[1].endswith("vae.py")
    assert call("vae", [*words[2:], "--steps", str(state["step"] + 2)]) == 0  # the advice works
    steps = [record["step"] for record in records(folder) if record["split"] == "train"]
    assert steps == list(range(1, state["step"] + 3))


def test_sigterm_finishes_the_step(run, tmp_path, capsys):
    class Stopped(importlib.import_module("vae").VAE):
        """The system asks for an end in the middle of its second step."""
        calls = 0

        def terms(self, x):
            self.calls += 1
            if self.calls == 3:  # the first call initialises
                os.kill(os.getpid(), signal.SIGTERM)
            return super().terms(x)

    assert run("vae", Stopped, name="stopped", steps=50, **cheap("vae")) == 130
    assert load(tmp_path / "runs" / "stopped" / "last.pt")["state"]["step"] == 2 and "--resume" in capsys.readouterr().out


def broken(script, step, name="re_x"):
    """The script's model, whose term `name` is not finite at one training step."""
    class Broken(getattr(importlib.import_module(script), MODELS[script])):
        """Counts the calls with gradients: those are training."""
        calls = 0

        def terms(self, *arguments):
            terms = super().terms(*arguments)
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls == step:
                    terms[name] = terms[name] * math.nan
            return terms
    return Broken


@pytest.mark.parametrize("script, every, term", [("vae", 1, "re_x"), ("vae", 2, "re_x"), ("realnvp", 1, "volume"), ("dcvae", 1, "kl")])
def test_not_finite(script, every, term, run, tmp_path, capsys):
    """Noticed at the step, or, with fewer reports, at the next one; it is the same step that is named."""
    assert run(script, broken(script, 3, term), name="nan", steps=8, log_every=every, save_every=every, **cheap(script)) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and re.search(r"\bstep 3\b", told[0]) and re.search(rf"{term}\W+nan", told[0])
    last = load(tmp_path / "runs" / "nan" / "last.pt")
    assert last["state"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in last["model"].values())
    assert not (tmp_path / "runs" / "nan" / "results.json").exists()
    assert run(script, name="nan", steps=4, resume=True, **cheap(script)) == 0  # from the last good checkpoint


def test_signal_handlers_are_put_back(run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run("vae", name="good", **cheap("vae")) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert run("vae", broken("vae", 1), name="bad", **cheap("vae")) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- A user's mistakes: exit code 2, one line on stderr, nothing written -----------------------------------------------

@pytest.fixture
def refused(tiny_data, tmp_path, capsys):
    """refused(script, told, **flags): the run is refused in one line that holds `told`; no file anywhere is touched."""
    def check(script, told, **flags):
        line = flags_for(script, flags.pop("data_dir", tiny_data), tmp_path / "runs", **flags)
        capsys.readouterr()
        before = tree(tiny_data, tmp_path)
        code, lines = call(script, line), capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: ") and told in lines[0], lines
        after = tree(tiny_data, tmp_path)
        assert sorted(after.keys() - before.keys()) == []
        assert before == after
    return check


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve PNG files of 24 pixels a side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(common.draw_shapes(12, 24, 0)[0]):
        common.TF.to_pil_image(image).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("told, flags", [
    ("invalid", dict(prior="foo")),
    ("batch_size", dict(batch_size=0)),
    ("batch_size", dict(batch_size="many")),
    ("lr", dict(lr="nan")),
    ("no_such_flag", dict(no_such_flag=3)),
    ("cuda" if not torch.cuda.is_available() else "mps", dict(device="cuda" if not torch.cuda.is_available() else "mps")),
    ("nonsense", dict(device="nonsense")),
    ("nonsense", dict(dataset="nonsense")),
    ("no/such/folder", dict(dataset="no/such/folder")),
    ("4", dict(size=4)),
], ids=str)
def test_wrong_flag(refused, script, told, flags):
    if "prior" in flags and script not in BOUNDS:
        return
    refused(script, told, **flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_size_that_does_not_halve_to_8(refused, script, pictures):
    if script in BOUNDS:
        refused(script, "20", dataset=pictures, size=20)


def test_size_that_the_flow_does_not_halve(refused, pictures):
    refused("realnvp", "size 17 is no multiple of 2", dataset=pictures, size=17)
    line = ["--dataset", str(pictures), "--size", "36"]  # without --small, beyond 32, it halves three times
    assert call("realnvp", line) == 2


def test_dcvae_refuses(refused, pictures):
    refused("dcvae", "size 20 is no multiple of 8", dataset=pictures, size=20)
    refused("dcvae", "--contrast_layers b9", contrast_layers="b9")
    refused("dcvae", "--label_column 7", label_column=7)
    refused("dcvae", "--label_value 9", label_value=9)
    refused("dcvae", "at most 1", momentum=1.5)
    refused("dcvae", "invalid choice: 'gan'", loss="gan")


@pytest.mark.parametrize("script", SCRIPTS)
def test_fid(script, run, tmp_path, monkeypatch, capsys):
    """With weights: both references, and for dcvae a best checkpoint and reconstructions. Offline: one line, and a run without FID."""
    def no_network(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    if script in ("vae", "dcvae"):  # the others have the same lines
        assert run(script, name="without", fid=3, **cheap(script)) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "no FID" in line]
        assert told and "pt_inception" in told[0] and "fid_train" not in json.loads((tmp_path / "runs" / "without" / "results.json").read_text())
    mean_colours = lambda self, weights: torch.nn.Module.__init__(self)
    monkeypatch.setattr(common.InceptionFeatures, "__init__", mean_colours)
    monkeypatch.setattr(common.InceptionFeatures, "forward", lambda self, x: (x.float().mean((2, 3)), x.float().mean((2, 3)) / 100))
    torch.save({}, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match="10,000"):
        assert run(script, name="with", fid=5, inception_weights=tmp_path / "weights.pth", **cheap(script)) == 0
    results = json.loads((tmp_path / "runs" / "with" / "results.json").read_text())
    assert (results["fid_images"], results["fid_train_images"], results["fid_test_images"]) == (5, 60, 16)
    assert results["fid_train"] > 0 and results["fid_test"] > 0 and results["inception_score"] >= 1
    if script == "dcvae":
        assert (results["reconstruction_fid_images"], results["reconstruction_fid_test_images"]) == (16, 16)
        best = load(tmp_path / "runs" / "with" / "best.pt")["state"]["best"]
        assert best == pytest.approx(records(tmp_path / "runs" / "with")[-1]["fid_valid"])


def test_more_levels_than_halvings(refused):
    refused("selfvae", "--levels 3 leaves y_1 4 pixels", levels=3, size=32)


def test_transformations_that_do_not_exist_or_do_not_repeat(refused):
    refused("selfvae", "no --transform emboss", transform="emboss")
    refused("selfvae", "take --levels 1", transform="edges", levels=2)


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("vae", "0 images", dataset=tmp_path / "empty")


@pytest.mark.parametrize("content", [b"no image", None], ids=["text", "cut"])
def test_folder_with_a_broken_image(refused, pictures, content):
    path = pictures / "05.png"
    path.write_bytes(content or path.read_bytes()[:300])
    refused("vae", "05.png", dataset=pictures)


def test_broken_data_folder(refused, tmp_path):
    (tmp_path / "data" / "shapes-16").mkdir(parents=True)
    refused("vae", "train.npy", data_dir=tmp_path / "data")


def test_folder_of_images(run, pictures, tiny_data, tmp_path):
    """The good case: read once, kept as .npy; the same files are not read again."""
    flags = dict(dataset=pictures, data_dir=tmp_path / "cache", **cheap("vae"))
    assert run("vae", name="once", **flags) == 0
    results = (tmp_path / "runs" / "once" / "results.json").read_text()
    assert "NaN" not in results and json.loads(results)["iw_images"] == 1  # a tenth of twelve; no spread, but valid JSON
    kept = tree(tmp_path / "cache")
    assert sorted(path.name for path in kept if path.is_file()) == ["test.npy", "train.npy"]
    assert run("vae", name="twice", **flags) == 0
    assert tree(tmp_path / "cache") == kept


@pytest.fixture
def trained(run, tmp_path):
    """trained(script) -> the folder of a finished run named "old"."""
    def train(script):
        assert run(script, name="old", **cheap(script)) == 0
        return tmp_path / "runs" / "old"
    return train


def test_folder_that_holds_a_run(refused, trained):
    trained("vae")  # all scripts refuse by the same lines
    refused("vae", "--resume", name="old", **cheap("vae"))


@pytest.mark.parametrize("how", ["resume", "eval"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_go_on_from(refused, script, how):
    refused(script, "there is no", name="never", **{how: True})


def test_checkpoint_of_another_model(refused, trained):
    trained("vae")
    for how in ("resume", "eval"):
        refused("selfvae", "script is vae, not selfvae", name="old", **cheap("selfvae"), **{how: True})
        refused("vae", "prior is normal, not mog", name="old", prior="mog", **{how: True})
    refused("vae", "seed is 0, not 1", name="old", seed=1, resume=True, **cheap("vae"))


class Payload:
    """Pickled, it is an order to run code."""

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_damaged_checkpoint(refused, trained, tmp_path):
    """Cut short, empty, no checkpoint at all, or a pickle that would run code: refused, and the code is not run."""
    last = trained("vae") / "last.pt"
    whole = last.read_bytes()
    payload = Payload()
    payload.target = str(tmp_path / "ran")
    for content in (whole[:len(whole) // 2], whole[:-50], b"", b"no checkpoint\n", pickle.dumps([1, 2], 2),
                    pickle.dumps(payload, 2)):
        last.write_bytes(content)
        refused("vae", "last.pt", name="old", resume=True, **cheap("vae"))
    torch.save({"script": "vae", "config": payload}, last)
    refused("vae", "last.pt", name="old", resume=True, **cheap("vae"))
    assert not (tmp_path / "ran").exists()

