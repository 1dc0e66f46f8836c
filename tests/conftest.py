"""What all tests share: the scripts that exist, tiny datasets on disk, and `run`, a script called as from the command line."""

import dataclasses
import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from common import draw_shapes  # noqa: E402 (needs the path above)
from exercises import exercises  # noqa: E402

MODELS = {"vae": "VAE", "selfvae": "SelfVAE", "realnvp": "RealNVP", "dcvae": "DCVAE"}  # script: its model
SCRIPTS = [name for name in MODELS if (ROOT / f"{name}.py").exists()]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data_dir of 60 train and 16 test images each: shapes at 16 and 32 pixels, and a grey "mnist" at 16."""
    data_dir = tmp_path_factory.mktemp("data")
    for name, size, channels in (("shapes", 16, 3), ("shapes", 32, 3), ("mnist", 16, 1)):
        (data_dir / f"{name}-{size}").mkdir()
        for split, count, seed in (("train", 60, 0), ("test", 16, 1)):
            images, labels = draw_shapes(count, size, seed)
            np.save(data_dir / f"{name}-{size}" / f"{split}.npy", images[..., :channels])
            np.save(data_dir / f"{name}-{size}" / f"{split}-labels.npy", labels)
    return data_dir


def flags_for(script, data_dir, out_dir, **flags):
    """The command line of a short run: small, 16 pixels, on the CPU, as far as the script has these flags; then `flags`."""
    known = {f.name for f in dataclasses.fields(importlib.import_module(script).Config)}
    short = dict(data_dir=data_dir, out_dir=out_dir, size=16, small=True, steps=2, batch_size=4, log_every=1, device="cpu",
                 iw_samples=2, iw_images=4)
    line = []
    for name, value in ({k: v for k, v in short.items() if k in known} | flags).items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def call(script, line, Model=None):
    """main() of a script with this command line -> exit code, also where argument parsing exits."""
    module = importlib.import_module(script)
    try:
        return module.main(Model or getattr(module, MODELS[script]), line)
    except SystemExit as leave:
        return leave.code


@pytest.fixture
def run(tiny_data, tmp_path):
    """run(script, Model=None, **flags) -> exit code of a short run in `tmp_path / "runs"`."""
    def start(script, Model=None, **flags):
        line = flags_for(script, flags.pop("data_dir", tiny_data), tmp_path / "runs", **flags)
        return call(script, line, Model)
    return start


def count(module):
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def seeded(function, *args, **kwargs):
    """The call, from the same random state each time."""
    torch.manual_seed(1)
    return function(*args, **kwargs)


@pytest.fixture
def no_noise(monkeypatch):
    """Every draw from a Gaussian is its mean, as if ε = 0."""
    for draw in ("rsample", "sample"):
        monkeypatch.setattr(Normal, draw, lambda self, shape=torch.Size(): self.loc.expand(self._extended_shape(shape)))


@pytest.fixture(scope="session", autouse=True)
def grades(request):
    """-> a function that returns what `python tests/exercises.py grade` prints. It takes long, so it is started with the session."""
    asked = any(item.name == "test_exercises_are_graded" for item in request.session.items)
    process = subprocess.Popen([sys.executable, ROOT / "tests" / "exercises.py", "grade"], stdout=subprocess.PIPE, text=True) if asked else None
    yield lambda: process.communicate()[0]
    if asked:
        process.kill()


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run that dies must not leave its handlers to the tests after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(config, items):
    """`-k exercise_3` selects the tests that docs/exercises.md names for exercise 3; they get that keyword, and those of exercise 30 do not."""
    for number in map(int, re.findall(r"exercise_(\d+)", config.getoption("keyword"))):
        graders = exercises()[number][1]
        for item in items:
            if (item.path.name, item.originalname) in graders:
                item.extra_keyword_matches.add(f"exercise_{number}")
