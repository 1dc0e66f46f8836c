"""What a careless world does to a run: two at once, changed data, full disks, odd consoles."""

import ast
import errno
import importlib
import json
import math
import os
import shutil
import subprocess
import sys

import common
import numpy as np
import pytest
import torch
from common import UserError, from_uint8, make_shapes, read_log
from conftest import ROOT, SCRIPTS, narrow_networks
from test_runs import cut_short, nothing
from torchvision.utils import save_image

PROGRAMS = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("docs/**/*.py")]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Networks are narrow, evaluations short, and there are no figures but curves."""
    narrow_networks(monkeypatch)
    cut_short(monkeypatch)
    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.save_figures", nothing)


def one_line(capsys):
    """What a run says that is refused: one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ---- Two runs in one folder ----------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_is_claimed_by_one_run(script, tiny_data, tmp_path):
    """Two that start at once have both seen an empty folder: config.json is made by one of them."""
    module = importlib.import_module(script)
    cfg = module.Config(small=True, data_dir=str(tiny_data), size=16)
    images = common.load_images("shapes", tiny_data, 16)
    module.start_run(cfg, tmp_path / "run", images)
    ours = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        module.start_run(module.Config(lr=1e-5), tmp_path / "run", images)
    assert (tmp_path / "run" / "config.json").read_bytes() == ours


def test_a_run_without_its_checkpoints_is_not_overwritten(run, tmp_path, capsys):
    assert run("vae", prior="normal", name="a") == 0
    folder = tmp_path / "runs" / "a"
    for path in folder.glob("*.pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    capsys.readouterr()
    assert run("vae", prior="normal", name="a") == 2
    assert "holds a run" in one_line(capsys)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}


# ---- The data of a run ---------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    """A folder of 20 images, 16 pixels a side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, _ = make_shapes(20, 16, 3)
    for i, image in enumerate(images):
        save_image(torch.tensor(image).permute(2, 0, 1) / 255, folder / f"{i:02d}.png")
    return folder


def test_a_run_knows_its_images(run, pictures, tmp_path, capsys):
    """A folder that has moved is the same data; with an image more it is another split."""
    assert run("vae", prior="normal", dataset=pictures, data_dir=tmp_path / "data", name="a") == 0
    moved = tmp_path / "elsewhere" / "pictures"
    moved.parent.mkdir()
    shutil.move(pictures, moved)
    again = dict(dataset=moved, data_dir=tmp_path / "data", name="a")
    assert run("vae", prior="normal", **again, resume=True, steps=3) == 0
    shutil.copy(moved / "00.png", moved / "another.png")
    for flags in (dict(resume=True, steps=4), dict(eval=True)):
        capsys.readouterr()
        assert run("vae", prior="normal", **again, **flags) == 2
        error = one_line(capsys)
        assert "18 for training, 2 for the test" in error
        assert "19 for training, 2 for the test" in error
    (moved / "another.png").unlink()
    save_image(torch.zeros(3, 16, 16), moved / "00.png")  # another picture of this name
    capsys.readouterr()
    assert run("vae", prior="normal", **again, eval=True) == 2


def test_another_dataset_is_refused(run, tmp_path, capsys):
    """Also by a run that is older than the note of its images."""
    assert run("vae", prior="normal", name="a") == 0
    (tmp_path / "runs" / "old").mkdir()
    checkpoint = torch.load(tmp_path / "runs" / "a" / "last.pt", weights_only=True)
    del checkpoint["state"]["data"]
    torch.save(checkpoint, tmp_path / "runs" / "old" / "best.pt")
    for name in ("a", "old"):
        capsys.readouterr()
        assert run("vae", prior="normal", name=name, dataset="mnist", eval=True) == 2
        assert "this run's images were" in one_line(capsys)
    assert run("vae", prior="normal", name="old", eval=True) == 0


# ---- Logs, disks, checkpoints --------------------------------------------------------------------

def test_a_torn_log_line_is_ended(run, tmp_path):
    """A full disk leaves such a line. The next one does not hang on to it, readers leave it out."""
    assert run("vae", prior="normal", name="a") == 0
    path = tmp_path / "runs" / "a" / "log.jsonl"
    whole = read_log(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert run("vae", prior="normal", name="a", resume=True, steps=4) == 0
    rows = read_log(path)
    assert rows[:len(whole) - 1] == whole[:-1]
    assert [row["step"] for row in rows[len(whole) - 1:]] == [3, 4, 4]
    assert (tmp_path / "runs" / "a" / "curves.png").exists()


@pytest.mark.parametrize("script", ["vae", "dcvae"])  # one optimizer, and three
def test_a_full_disk_leaves_the_last_checkpoint(script, run, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, nothing half written."""
    assert run(script, name="a") == 0
    folder = tmp_path / "runs" / "a"
    before = (folder / "last.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    capsys.readouterr()
    assert run(script, name="a", resume=True, steps=4) == 2
    assert "No space left" in one_line(capsys)
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


def test_any_damage_to_a_checkpoint_is_one_line(run, tmp_path):
    """Whatever torch.load makes of it: bytes changed all over the file, or cut off."""
    assert run("vae", name="a", prior="normal") == 0
    import vae
    folder = tmp_path / "runs" / "a"
    whole = (folder / "last.pt").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(whole)
        if i % 3 == 0:
            del broken[rng.integers(len(broken)):]
            (folder / "last.pt").write_bytes(broken)
            with pytest.raises(UserError, match="last.pt"):
                vae.load_checkpoint(folder, best=False)
            continue
        else:  # the pickle and the directories lie at the two ends
            for _ in range(4):
                place = rng.integers(3000) * (-1 if i % 3 == 1 else 1)
                broken[place] = rng.integers(256)
        (folder / "last.pt").write_bytes(broken)
        try:
            vae.load_checkpoint(folder, best=False)
        except UserError as error:
            assert "last.pt" in str(error)


@pytest.mark.parametrize("script", ["vae", "dcvae"])  # one optimizer, and three
def test_parameters_of_another_model_are_refused(script, run, tmp_path, capsys):
    assert run(script, name="a") == 0
    path = tmp_path / "runs" / "a" / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"].popitem()
    for name in ("last.pt", "best.pt"):
        torch.save(checkpoint, path.with_name(name))
    for flags in (dict(resume=True, steps=4), dict(eval=True)):
        capsys.readouterr()
        assert run(script, name="a", **flags) == 2
        assert "another version" in one_line(capsys)


# ---- Numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, exact", [("vae", False), ("selfvae", False), ("selfvae", True)])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_first_batch_of_one_colour_makes_no_absurd_bound(script, exact, batch, value):
    """The first batch sets the length of every layer; one without spread used to make 1e24 bpd."""
    module = importlib.import_module(script)
    cfg = module.Config(small=True, **(dict(exact=True) if exact else {}))
    model = (module.VAE if script == "vae" else module.SelfVAE)(cfg, (3, 16, 16))
    model.initialize(torch.full((batch, 3, 16, 16), value))
    images, _ = make_shapes(8, 16, 0)
    x = from_uint8(torch.tensor(images)).movedim(3, 1)
    bpd = common.bits_per_dim(-model.elbo(x), x[0].numel())
    assert bpd.isfinite().all() and bpd.max() < 100


def test_json_has_no_infinity(tmp_path):
    values = {"a": math.inf, "b": math.nan, "c": 1.5, "d": "text", "e": 3}
    common.write_results(tmp_path, values)

    def refuse(word):
        raise AssertionError(word)

    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    stored = json.loads(text, parse_constant=refuse)
    assert stored == {"a": None, "b": None, "c": 1.5, "d": "text", "e": 3}


def test_timing_says_so_and_ends(capsys):
    """A slow model is not sampled ten times."""
    class Slow:
        calls = 0

        def sample(self, n):
            self.calls += 1
            return torch.zeros(n)

    model = Slow()
    assert common.seconds_to_sample(model, 7, limit=0) >= 0
    assert model.calls == 2  # once to warm up
    assert "sampling of 7 at a time" in capsys.readouterr().out
    common.seconds_to_sample(model, 7)
    assert model.calls == 2 + 11


# ---- Consoles, locales, flags --------------------------------------------------------------------

def test_an_old_console_and_locale():
    """--help where the console knows no Unicode. Files are looked at in the next test."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
              "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, ROOT / "vae.py", "--help"], capture_output=True,
                          env=os.environ | locale)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.decode("ascii")


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.name for path in PROGRAMS])
def test_every_text_file_is_opened_with_an_encoding(path):
    """Else a program reads and writes by the locale of the day."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [keyword.arg for keyword in node.keywords]
        if name in ("read_text", "write_text"):
            assert "encoding" in given, node.lineno
        if name == "open" and isinstance(node.func, ast.Name):
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
            assert "b" in mode or "encoding" in given, node.lineno
        assert "text" not in given or name not in ("run", "Popen"), node.lineno


def test_a_seed_that_is_too_large_is_refused(run, capsys):
    assert run("vae", seed=1764000000000000000) == 2
    assert "--seed must be finite and from 0 to 4294967295" in one_line(capsys)


def test_a_rank_left_over_in_the_shell_is_not_torchrun(run, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("vae", prior="normal") == 0


def test_what_is_evaluated_is_said(run, capsys):
    """best.pt may be of an earlier step than the last."""
    assert run("vae", name="a", prior="normal") == 0
    assert "evaluating the model of step" in capsys.readouterr().out
