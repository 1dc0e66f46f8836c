"""docs/compress.py: what is pushed comes back, and costs what it should."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch

from common import Dmol, UserError, dmol_channels, quantize
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
    stack = compress.random_stack(1)
    heads = stack.heads.copy()
    words = list(stack.words)
    before = stack.bits()
    pushed = []
    entropy = 0
    for _ in range(20):
        n = rng.integers(1, 300)
        symbols = rng.integers(2, 300)
        p = rng.dirichlet(np.full(symbols, 10.0**rng.integers(-2, 2)), n)
        p = 0.99 * p + 0.01 / symbols  # so that the slot which every symbol keeps hardly counts
        table = compress.slots(p, p >= 0)
        symbol = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, symbols - 1)
        entropy -= np.log2(p[np.arange(n), symbol]).sum()
        compress.push_all(stack, table, symbol)
        assert (stack.heads >= 2**32).all()
        pushed.append((table, symbol))
    assert stack.bits() - before == pytest.approx(entropy, rel=1e-3)
    for table, symbol in reversed(pushed):
        assert np.array_equal(compress.pop_all(stack, table), symbol)
    assert np.array_equal(stack.heads, heads) and stack.words == words


def test_every_symbol_keeps_a_slot(compress):
    """Else an improbable pixel could not be coded: 0 and 10⁻³⁰ get one slot of 2^20, 1 the rest."""
    p = np.array([[0, 1, 0, 1e-30], [0.25, 0.25, 0.25, 0.25]])
    table = compress.slots(p, p >= 0)
    assert table[0].tolist() == [0, 1, 2**20 - 2, 2**20 - 1, 2**20]
    assert np.diff(table[1].astype(int)).tolist() == [2**18] * 4


def test_bins_have_the_probability_of_their_interval(compress):
    """Else latents cost something else than the KL; a narrow q falls into the bin of its mean."""
    p = (torch.randn(1, 16, 8, 8), torch.rand(1, 16, 8, 8) + 0.1)
    edges = torch.linspace(-8, 8, 1025)
    mass = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff().numpy() * 2**20
    assert abs(np.diff(compress.latent_table(p, p).astype(int)) - mass).max() <= 1.2
    prior = np.diff(compress.PRIOR_TABLE.astype(int))[0]
    assert prior.min() == 1 and abs(prior - mass * (1 - 2**-10) - 1).max() <= 1.2
    bins = np.random.default_rng(0).integers(0, 2**10, 1024)
    value = compress.latent_value(bins, p)
    narrow = compress.latent_table((value, 1e-4 * p[1]), p).astype(int)
    assert (np.diff(narrow).argmax(1) == bins).all()


def test_latents_are_drawn_apart_from_those_before(compress):
    """Else z takes after that of the image before, number by number, and costs more than by chance.

    Popped by q what has been pushed by the prior: without an order of its own each number would
    come back.
    """
    stack = compress.random_stack(1)
    ramp = np.linspace(300, 700, 1024).astype(np.int64)
    compress.push_prior(stack, ramp)
    p = (torch.zeros(1, 16, 8, 8), torch.ones(1, 16, 8, 8))
    drawn = compress.pop_all(stack, compress.latent_table(p, p))
    assert abs(np.corrcoef(ramp, drawn)[0, 1]) < 0.2
    compress.push_all(stack, compress.latent_table(p, p), drawn)
    assert np.array_equal(compress.pop_prior(stack), ramp)


def test_a_symbol_with_all_slots_costs_nothing(compress):
    """Else count · 2^44 is 2^64, an overflow. One without a slot is of a damaged file: an error."""
    stack = compress.random_stack(0)
    before = stack.heads.copy()
    table = np.broadcast_to(np.array([0, 0, 2**20, 2**20], np.uint64), (64, 4))
    compress.push_all(stack, table, np.ones(64, np.int64))
    assert np.array_equal(stack.heads, before)
    assert (compress.pop_all(stack, table) == 1).all()
    with pytest.raises(UserError, match="without a slot"):
        compress.push_all(stack, table, np.zeros(64, np.int64))


def in_turn(channels):
    """An InTurn of blocks of 2x2 pixels by random networks, for an image of 16x16."""
    selfvae = importlib.import_module("selfvae")
    cfg = selfvae.Config(exact=True, small=True)
    torch.manual_seed(0)
    p_x = selfvae.SelfVAE(cfg, (channels, 16, 16)).p_x[0]
    return p_x(quantize(torch.rand(1, channels, 8, 8) * 2 - 1), torch.randn(1, 16, 8, 8))


def random_mixture(channels, interval=None):
    """A Dmol of random parameters with a shift."""
    torch.manual_seed(0)
    params = torch.randn(1, dmol_channels(channels), 8, 8)
    return Dmol(params, channels, torch.rand(1, channels, 8, 8) - 0.5, interval)


def greys(x):
    """The interval of colours whose luma is 0, 1, 2, … from pixel to pixel."""
    grayscale_interval = importlib.import_module("selfvae").grayscale_interval
    return grayscale_interval(torch.arange(64).view(1, 1, 8, 8), [], x)


@torch.no_grad()
@pytest.mark.parametrize("make_p_x", [
    lambda: random_mixture(1), lambda: random_mixture(3), lambda: random_mixture(3, greys),
    lambda: in_turn(1), lambda: in_turn(3)], ids=["grey", "colour", "luma", "turns", "turns3"])
def test_pixels_cost_their_log_probability(compress, make_p_x):
    """Else the tables are not of p(x_c) given the values before.

    Mixtures are random.
    """
    p_x = make_p_x()
    x = p_x.sample()
    stack = compress.random_stack(0)
    before = stack.bits()
    compress.push_image(stack, p_x, x)
    bits = -p_x.log_prob(x).item() / math.log(2)
    assert stack.bits() - before == pytest.approx(bits, rel=2e-3)
    assert torch.equal(compress.pop_image(stack, p_x), x)


class Exact(torch.nn.Module):
    """Its latent's posterior is known: each of 1,024 grey pixels is N(0.3 z, 0.1²), nearly.

    As a vae.py: q_z, p_x, p_z, channels.
    """

    def __init__(self, sd):
        super().__init__()
        self.p_z = importlib.import_module("vae").NormalPrior()
        self.scale = 0.3
        self.noise = 0.1
        self.sd = sd  # of q, as a factor of the posterior's

    def q_z(self, x):
        x = torch.nn.functional.pixel_unshuffle(x, 4)
        variance = 1 / (1 + (self.scale / self.noise)**2)
        mean = variance * self.scale / self.noise**2 * x
        log_var = torch.full_like(mean, math.log(variance * self.sd**2))
        return importlib.import_module("vae").gaussian(torch.cat([mean, log_var], 1))

    def p_x(self, z):
        mean = torch.nn.functional.pixel_shuffle(self.scale * z, 4)
        params = torch.full((1, 30, 32, 32), -30.0)  # one component of ten
        params[:, 0] = 30
        params[:, 10] = mean
        params[:, 20] = math.log(self.noise * math.sqrt(3) / math.pi) + 2  # its sd is `noise`
        return Dmol(params, 1)


def test_bits_come_back(compress):
    """Else z costs what it costs without them: with the posterior a file of -log2 p(x) bits.

    x is Gaussian, of variance 0.3² + 0.1², but for logistic noise. With a q of three times the
    posterior's sd more than two bits a number do not come back.
    """
    torch.manual_seed(0)
    p = torch.distributions.Normal(0.0, math.sqrt(0.3**2 + 0.1**2))
    x = quantize(p.sample((4, 1, 32, 32)))
    bits = -(p.log_prob(x) + math.log(2 / 255)).sum().item() / math.log(2)
    costs = []
    for sd in (1, 3):
        model = Exact(sd)
        model.__class__ = type("Exact", (Exact, importlib.import_module("vae").VAE), {})
        codec = compress.Codec(model)  # takes it for a vae.py
        stack = compress.random_stack(0)
        before = stack.bits()
        for image in x:
            codec.push(stack, image[None])
        costs.append(stack.bits() - before)
    assert costs[0] == pytest.approx(bits, rel=0.01)
    assert costs[1] > costs[0] + 4 * 1024 * 2


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("vae", dict(prior="realnvp")),
    ("selfvae", dict(levels=0)), ("selfvae", dict(levels=2, size=32, exact=True)),
    ("selfvae", dict(levels=1)), ("selfvae", dict(transform="grayscale", exact=True)),
    ("selfvae", dict(transform="posterize", exact=True)),
    ("selfvae", dict(transform="sketch", prior="realnvp"))])
def test_images_come_back(compress, script, flags):
    """Bit for bit, the last one first; the stack ends as it began."""
    size = flags.get("size", 16)
    model, x = make(script, (3, size, size), **flags)
    codec = compress.Codec(model)
    stack = compress.random_stack(codec.K)
    first = compress.random_stack(codec.K)
    with torch.no_grad():
        for image in x[:2]:
            image = image[None].to(memory_format=torch.channels_last)  # as from a file of images
            codec.push(stack, image)
        for image in reversed(x[:2]):
            assert torch.equal(codec.pop(stack)[0], image)
    assert np.array_equal(stack.heads, first.heads) and stack.words == first.words


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("selfvae", dict(levels=1, size=16)),
    ("selfvae", dict(levels=1, exact=True, size=16))])
def test_the_size_is_the_bound(compress, script, flags):
    """Else bits are lost, or the probabilities are not the bound's: within 1 % over five images.

    That is the ELBO's own noise here: the bits of the file are those of other draws of z.
    """
    model, x = make(script, **flags)
    codec = compress.Codec(model)
    stack = compress.random_stack(codec.K)
    before = stack.bits()
    with torch.no_grad():
        for image in x:
            codec.push(stack, image[None])
        bound = -torch.stack([model.elbo(x) for _ in range(10)]).mean(0).sum() / math.log(2)
    assert stack.bits() - before == pytest.approx(bound.item(), rel=0.01)


def test_a_prefix_is_the_small_image(compress):
    """Else a reader of y_1, a sixteenth of the pixels, must pop more than u and y_1."""
    model, x = make("selfvae", (3, 32, 32), levels=2)
    codec = compress.Codec(model)
    stack = compress.random_stack(codec.K)
    with torch.no_grad():
        codec.push(stack, x[:1])
        whole = stack.bits()
        y = model.representations(x[:1])
        assert torch.equal(codec.pop(stack, last=1), y[1])
    of_y_1 = 8 * 3 * 8 * 8
    assert whole - stack.bits() < 8.5 * 1024 + 1.5 * of_y_1


def test_q_of_a_flow_has_the_sd_of_its_precision(compress, monkeypatch):
    """Else bins are drawn too far out, as by the marginals' sds. Here u = v + v reversed / 2.

    So 1/τ_i² = 1/σ_i² + 1/4σ_j², j the number opposite, but for the noise of 64 signs.
    """
    model, x = make("vae", prior="realnvp")
    monkeypatch.setattr(model.p_z.flow, "inverse", lambda v: v + v.flip(1) / 2)
    monkeypatch.setattr(model.p_z.flow, "forward", lambda u: ((u - u.flip(1) / 2) / 0.75, None))
    with torch.no_grad():
        mean, sd = compress.Codec(model).q(0, x[:1])
        q = model.q_z(x[:1])
    torch.testing.assert_close(mean, (q.mean - q.mean.flip(1) / 2) / 0.75)
    expected = (q.variance.reciprocal() + q.variance.flip(1).reciprocal() / 4).rsqrt()
    assert (sd / expected).log().mean().abs() < 0.03 and (sd / expected).log().std() < 0.25


def test_a_mixture_prior_is_refused(compress):
    """Its numbers depend on each other, through the component."""
    model, _ = make("vae", prior="mog")
    with pytest.raises(UserError, match="mixture"):
        compress.Codec(model)


@pytest.fixture
def folder_of(tmp_path, compress, tiny_data):
    """folder_of(script, **flags): that of an untrained model on shapes, or grey "mnist"."""
    def save(script, dataset="shapes", size=16, **flags):
        flags = dict(dataset=dataset, size=size, data_dir=str(tiny_data), **flags)
        model, _ = make(script, (1 if dataset == "mnist" else 3, size, size), **flags)
        config = importlib.import_module(script).Config(small=True, **{"prior": "normal", **flags})
        folder = tmp_path / f"{script}-{dataset}"
        folder.mkdir()
        torch.save({"script": script, "config": dataclasses.asdict(config),
                    "model": model.state_dict()}, folder / "best.pt")
        return folder
    return save


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("vae", dict(dataset="mnist", prior="realnvp")),
    ("selfvae", dict(levels=1, exact=True)), ("selfvae", dict(levels=2, size=32))])
def test_files_come_back(compress, folder_of, tmp_path, tiny_data, script, flags):
    """Two test images, through a file; none is overwritten."""
    folder = str(folder_of(script, **flags))
    path = tmp_path / "images.ans"
    assert compress.main(["write", folder, str(path), "2"]) == 0
    assert compress.main(["read", folder, str(path)]) == 0
    name = f"{flags.get('dataset', 'shapes')}-{flags.get('size', 16)}"
    images = np.load(tiny_data / name / "test.npy")[:2]
    assert np.array_equal(np.load(tmp_path / "images.ans.npy"), images)
    assert compress.main(["write", folder, str(path), "2"]) == 2
    assert compress.main(["read", folder, str(path)]) == 2


@pytest.mark.parametrize("script, flags, rows", [
    ("selfvae", dict(levels=1, exact=True), 2), ("vae", dict(dataset="mnist"), 1)])
def test_sizes(compress, folder_of, tmp_path, capsys, script, flags, rows):
    """Else the table says something else than `write`, the bound, and what is popped.

    Of three images of 16x16. What is popped has the latents in full, some 8 bits a number.
    """
    folder = str(folder_of(script, **flags))
    assert compress.main(["write", folder, str(tmp_path / "images.ans"), "3"]) == 0
    written = float(capsys.readouterr().out.split("; ")[1].split()[0])
    assert compress.main(["sizes", folder, "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    dims = 16 * 16 * (1 if "dataset" in flags else 3)
    below = 0
    for k in range(rows):
        bound, net, popped = [float(cell) for cell in cells[2 + k][1:]]
        assert net == pytest.approx(bound, rel=0.02) and net > below
        below = net
        assert net < popped < net + 9 * (k + 1) * 1024 / dims
    assert cells[1 + rows][0] == "x" and net == pytest.approx(written, abs=1e-4)
    assert float(cells[2 + rows][1]) == pytest.approx(bound, rel=0.05)
    for cell, name in ((3 + rows, "PNG"), (4 + rows, "WebP")):
        assert name in cells[cell][0] and 0 < float(cells[cell][2]) < 16


def test_bad_files(compress, folder_of, tmp_path, capsys):
    """One line and exit code 2, and no images: what is cut, damaged, foreign, of other weights."""
    folder = folder_of("vae")
    path = tmp_path / "images.ans"
    target = tmp_path / "images.ans.npy"

    def refused(says, *words):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert compress.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("compress.py: error:") and error.count("\n") == 1 and says in error
        assert sorted(tmp_path.iterdir()) == before

    for count in ("0", "-3", "2.5", "abc"):
        refused("COUNT must be", "write", folder, path, count)
    refused("is no folder", "write", folder, tmp_path / "nowhere" / "images.ans", 2)
    refused("is missing", "write", tmp_path, path, 2)
    refused("see --help", "squeeze", folder, path)
    refused("cannot be read", "read", folder, path)
    assert compress.main(["write", str(folder), str(path), "2"]) == 0

    content = path.read_bytes()
    header, body = content.split(b"\n", 1)
    changed = bytearray(body)
    changed[-500] ^= 1
    cases = {
        "run empty": header + b"\n" + body[:8 * 64 + 40],
        "damaged": header + b"\n" + bytes(changed),
        "no file of compress.py": b"something else",
        "header is broken": header.replace(b'"count": 2', b'"count": "2"') + b"\n" + body,
        "its header": header.replace(b"[3, 16, 16]", b"[3, 16, 32]") + b"\n" + body,
        "of another model": header.replace(b"[3, 16, 16]", b"[1, 16, 16]") + b"\n" + body,
    }
    for says, broken in cases.items():
        path.write_bytes(broken)
        refused(says, "read", folder, path)
    path.write_bytes(content)
    checkpoint = torch.load(folder / "best.pt", weights_only=True)
    for name, values in checkpoint["model"].items():
        if name.startswith("q_z") and values.is_floating_point():  # the encoder alone
            values.mul_(1.01)
    torch.save(checkpoint, folder / "best.pt")
    refused("other weights", "read", folder, path)
    checkpoint["script"] = "dcvae"
    torch.save(checkpoint, folder / "best.pt")
    refused("take one of vae.py", "read", folder, path)
    assert not target.exists()
