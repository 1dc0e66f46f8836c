"""docs/compress.py: what is pushed comes back, and costs what it should."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch

from common import quantize
from conftest import ROOT, narrow_networks


@pytest.fixture
def compress(monkeypatch):
    """The module, with narrow networks."""
    narrow_networks(monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("compress")


def make(script, shape=(3, 16, 16), **flags):
    """An untrained model, initialised with noise, and such images on the grid (5, C, H, W)."""
    module = importlib.import_module(script)
    torch.manual_seed(0)
    cfg = module.Config(**{"small": True, "prior": "normal", **flags})
    model = (module.VAE if script == "vae" else module.SelfVAE)(cfg, shape).eval()
    x = quantize(torch.rand(5, *shape) * 2 - 1)
    with torch.no_grad():
        model.initialize(x)
    return model, x


@pytest.mark.parametrize("seed", range(20))
def test_symbols_come_back_and_cost_their_entropy(compress, seed):
    """Random tables of random numbers of symbols, more and fewer than there are coders.

    The stack ends as it began, and in between holds what the symbols' probabilities say.
    """
    rng = np.random.default_rng(seed)
    stack = compress.start(1)
    heads = stack.heads.copy()
    words = list(stack.words)
    before = stack.bits()
    pushed = []
    entropy = 0
    for _ in range(20):
        n = rng.integers(1, 300)
        symbols = rng.integers(2, 300)
        p = rng.dirichlet(np.full(symbols, 10.0**rng.integers(-2, 2)), n)
        table = compress.slots(p)
        symbol = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, symbols - 1)
        _, count = compress.interval(table, symbol)
        entropy -= np.log2(count / 2**compress.BITS).sum()
        compress.push_all(stack, table, symbol)
        assert (stack.heads >= 2**32).all()
        pushed.append((table, symbol))
    assert stack.bits() - before == pytest.approx(entropy, abs=0.1)
    for table, symbol in reversed(pushed):
        assert np.array_equal(compress.pop_all(stack, table), symbol)
    assert np.array_equal(stack.heads, heads) and stack.words == words


def test_every_symbol_keeps_a_slot(compress):
    """Else an improbable pixel could not be coded: 0 and 10⁻³⁰ get one slot of 2^20, 1 the rest."""
    p = np.array([[0, 1, 0, 1e-30], [0.25, 0.25, 0.25, 0.25]])
    table = compress.slots(p)
    assert table[0].tolist() == [0, 1, 2**20 - 2, 2**20 - 1, 2**20]
    assert np.diff(table[1].astype(int)).tolist() == [2**18] * 4


def test_bins_are_equally_probable_under_the_prior(compress):
    """Else the prior does not cost 10 bits a number; a narrow q falls into the bins around it."""
    p = (torch.randn(1, 16, 8, 8), torch.rand(1, 16, 8, 8) + 0.1)
    counts = np.diff(compress.latent_table(p, p).astype(int))
    assert abs(counts - 2**10).max() <= 1
    bins = np.random.default_rng(0).integers(0, 2**10, 1024)
    value = compress.latent_value(bins, p)
    narrow = compress.latent_table((value, 1e-4 * p[1]), p).astype(int)
    assert (np.diff(narrow).argmax(1) == bins).all()


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("vae", dict(block=2)), ("vae", dict(prior="realnvp")),
    ("selfvae", dict(levels=0)), ("selfvae", dict(levels=1, block=2)), ("selfvae", dict(levels=1)),
    ("selfvae", dict(transform="sketch", prior="realnvp"))])
def test_images_come_back(compress, script, flags):
    """Bit for bit, the last one first; the stack ends as it began."""
    model, x = make(script, **flags)
    codec = compress.Codec(script, model)
    stack = compress.start(codec.K)
    first = compress.start(codec.K)
    with torch.no_grad():
        for image in x[:2]:
            codec.push(stack, image[None])
        for image in reversed(x[:2]):
            assert torch.equal(codec.pop(stack)[0], image)
    assert np.array_equal(stack.heads, first.heads) and stack.words == first.words


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("vae", dict(block=2)), ("selfvae", dict(levels=1, block=2, size=16))])
def test_the_size_is_the_bound(compress, script, flags):
    """Else bits are lost, or the probabilities are not the bound's: within 1 % over five images.

    That is the ELBO's own noise here: the bits of the file are those of other draws of z.
    """
    model, x = make(script, **flags)
    codec = compress.Codec(script, model)
    stack = compress.start(codec.K)
    before = stack.bits()
    with torch.no_grad():
        for image in x:
            codec.push(stack, image[None])
        bound = -torch.stack([model.elbo(x) for _ in range(10)]).mean(0).sum() / math.log(2)
    assert stack.bits() - before == pytest.approx(bound.item(), rel=0.01)


def test_a_prefix_is_the_small_image(compress):
    """Else a progressive reader must pop more than u and y_1 for a quarter of the pixels."""
    model, x = make("selfvae", (3, 32, 32), levels=2)
    codec = compress.Codec("selfvae", model)
    stack = compress.start(codec.K)
    with torch.no_grad():
        codec.push(stack, x[:1])
        whole = stack.bits()
        y = model.representations(x[:1])
        assert torch.equal(codec.pop(stack, last=1), y[1])
        assert whole - stack.bits() < 0.2 * whole


@pytest.fixture
def run(tmp_path, compress, tiny_data):
    """The folder of an untrained vae.py on shapes."""
    flags = dict(size=16, data_dir=str(tiny_data))
    model, _ = make("vae", **flags)
    cfg = importlib.import_module("vae").Config(small=True, prior="normal", **flags)
    (tmp_path / "run").mkdir()
    torch.save({"script": "vae", "config": dataclasses.asdict(cfg), "model": model.state_dict()},
               tmp_path / "run" / "best.pt")
    return tmp_path / "run"


def test_files(compress, run, tmp_path, tiny_data, capsys):
    """Three test images there and back; a cut, a foreign and a changed file, and other weights.

    The latter end with one line and exit code 2, and no images.
    """
    path = tmp_path / "images.ans"
    images = np.load(tiny_data / "shapes-16" / "test.npy")[:3]
    assert compress.main(["write", str(run), str(path), "3"]) == 0
    assert compress.main(["read", str(run), str(path)]) == 0
    back = tmp_path / "images.ans.npy"
    assert np.array_equal(np.load(back), images)
    back.unlink()
    capsys.readouterr()

    content = path.read_bytes()
    changed = bytearray(content)
    changed[-500] ^= 1
    for broken in (content[:len(content) // 2 // 4 * 4], b"no such file", content[:100],
                   bytes(changed)):
        path.write_bytes(broken)
        assert compress.main(["read", str(run), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("compress.py: error:") and error.count("\n") == 1
    path.write_bytes(content)
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    for name, values in checkpoint["model"].items():
        if name.startswith("p_x"):
            values.mul_(1.001)
    torch.save(checkpoint, run / "best.pt")
    assert compress.main(["read", str(run), str(path)]) == 2
    assert "other weights" in capsys.readouterr().err
    assert compress.main(["read", str(tmp_path / "nothing"), str(path)]) == 2
    assert compress.main(["squeeze"]) == 2
    assert not back.exists() and sorted(p.name for p in tmp_path.glob("*.ans*")) == ["images.ans"]
