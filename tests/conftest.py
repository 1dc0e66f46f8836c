"""What all tests share: the scripts, tiny datasets on disk, `run`, a script called as by a user."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "docs" / "lab")]
# Threads of several processes would wait for each other, and for any other busy program.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import GAP, PICTURE_SIDE, SHEET_TOP, make_shapes  # noqa: E402 (needs the path above)
from exercises import exercises  # noqa: E402

MODELS = {"vae": "VAE", "selfvae": "SelfVAE", "realnvp": "RealNVP", "dcvae": "DCVAE"}
SCRIPTS = list(MODELS)
GRADED = "test_exercises_are_graded"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data_dir of 60 train and 16 test images each.

    Shapes at 16 and 32 pixels, and a grey "mnist" at 16.
    """
    data_dir = tmp_path_factory.mktemp("data")
    for name, size, channels in (("shapes", 16, 3), ("shapes", 32, 3), ("mnist", 16, 1)):
        folder = data_dir / f"{name}-{size}"
        folder.mkdir()
        for split, count, seed in (("train", 60, 0), ("test", 16, 1)):
            images, labels = make_shapes(count, size, seed)
            np.save(folder / f"{split}.npy", images[..., :channels])
            np.save(folder / f"{split}-labels.npy", labels)
    return data_dir


def flags_for(script, data_dir, out_dir, **flags):
    """The command line of a short run: small, 16 pixels, on the CPU; then `flags`."""
    short = dict(data_dir=data_dir, out_dir=out_dir, size=16, small=True, steps=2, batch_size=4,
                 log_every=1, device="cpu", dtype="fp32", iw_samples=2, iw_images=4)
    known = {f.name for f in dataclasses.fields(importlib.import_module(script).Config)}
    line = []
    for name, value in short.items():
        if name in known and name not in flags:
            flags[name] = value
    for name, value in flags.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def call(script, line, Model=None):
    """main() of a script with this command line -> exit code, also of --help."""
    module = importlib.import_module(script)
    try:
        return module.main(Model or getattr(module, MODELS[script]), line)
    except SystemExit as leave:
        return leave.code


@pytest.fixture
def run(tiny_data, tmp_path):
    """run(script, Model=None, **flags) -> exit code of a short run in `tmp_path / "runs"`."""
    def start(script, Model=None, **flags):
        data_dir = flags.pop("data_dir", tiny_data)
        return call(script, flags_for(script, data_dir, tmp_path / "runs", **flags), Model)
    return start


def narrow_networks(patch):
    """--small is narrower still, in every script: as many kinds of layers, fewer numbers.

    `patch` is a MonkeyPatch.
    """
    import dcvae
    import realnvp
    import selfvae
    import vae
    block = (4, 1)
    patch.setitem(vae.WIDTHS, "small", dict(q_z=block, p_x=block, flow=block))
    patch.setitem(selfvae.WIDTHS, "vae-small", dict(q_u=block, p_y=block, flow=block))
    patch.setitem(selfvae.WIDTHS, "small", dict(
        q_u=block, p_y=block, flow=block, q_z=block, p_z_from_y=block, p_z=block,
        p_x_from_z=block, z_channels=8, p_x=block, turn=block))
    patch.setitem(realnvp.WIDTHS, "small", (1, 4))
    patch.setitem(dcvae.WIDTHS, "small", (8, 8))
    patch.setitem(dcvae.MAPS, "small", (8, 8))


def save_untrained(folder, script, dataset="shapes", size=16, **flags):
    """A model as training begins, in the best.pt of a folder, which is made -> the folder."""
    module = importlib.import_module(script)
    cfg = module.Config(dataset=dataset, size=size, small=True, **flags)
    shape = (1 if dataset == "mnist" else 3, size, size)
    model = getattr(module, MODELS[script])(cfg, shape)
    folder.mkdir(exist_ok=True)
    torch.save({"script": script, "config": dataclasses.asdict(cfg), "model": model.state_dict()},
               folder / "best.pt")
    return folder


def pictures_on(path, side, columns=8):
    """The pictures of a sheet, which are `side` pixels wide before they are enlarged.

    -> uint8 (rows, columns, side, side, 3). It asserts that copies of an enlarged pixel are alike.
    """
    sheet = np.asarray(Image.open(path).convert("RGB"))
    factor = -(-PICTURE_SIDE // side)
    step = factor * side + GAP
    assert (sheet.shape[0] - SHEET_TOP) % step == 0
    grid = sheet[SHEET_TOP:, -columns * step:].reshape(-1, step, columns, step, 3)
    pictures = grid.swapaxes(1, 2)[:, :, :-GAP, :-GAP]
    small = pictures[:, :, ::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 2).repeat(factor, 3), pictures)
    return small


def inputs_of(module):
    """-> a list that gathers what the module is called with."""
    seen = []

    def note(module, inputs):
        seen.append(inputs[0])

    module.register_forward_pre_hook(note)
    return seen


def count(module):
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def seeded(function, *args, **kwargs):
    """The call, from the same random state each time."""
    torch.manual_seed(1)
    return function(*args, **kwargs)


def mean_of(distribution, shape=torch.Size()):
    """In place of a Gaussian's samples."""
    return distribution.loc.expand(distribution._extended_shape(shape))


@pytest.fixture
def no_noise(monkeypatch):
    """Every sample of a Gaussian is its mean, as if ε = 0."""
    monkeypatch.setattr(Normal, "rsample", mean_of)
    monkeypatch.setattr(Normal, "sample", mean_of)


@pytest.fixture(scope="session", autouse=True)
def grades(request):
    """-> a function that returns what `python docs/exercises.py grade` prints, JSON.

    It takes long, so it is started with the session.
    """
    names = [getattr(item, "originalname", "") for item in request.session.items]
    process = None
    if GRADED in names:
        command = [sys.executable, ROOT / "docs" / "exercises.py", "grade"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")

    def printed():
        return json.loads(process.communicate()[0])

    yield printed
    if process:
        process.kill()


def pytest_collection_modifyitems(config, items):
    """`-k exercise_3` selects the tests that docs/exercises.md names for exercise 3.

    They get that keyword, and those of exercise 30 do not. What waits for the grading comes last.
    """
    items.sort(key=lambda item: getattr(item, "originalname", "") == GRADED)
    for number in map(int, re.findall(r"exercise_(\d+)", config.getoption("keyword"))):
        graders = exercises()[number][1]
        for item in items:
            if (item.path.name, item.originalname) in graders:
                item.extra_keyword_matches.add(f"exercise_{number}")
