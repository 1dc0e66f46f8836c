"""docs/compress.py: what is pushed comes back, and costs what it should."""

import importlib
import math

import compress
import numpy as np
import pytest
import selfvae
import torch
import torch.nn.functional as F
import vae
from common import Dmol, UserError, dmol_channels, quantize
from conftest import MODELS, narrow_networks, save_untrained
from PIL import Image


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Narrow networks, and no gradients."""
    narrow_networks(monkeypatch)
    with torch.no_grad():
        yield


def make(script, size=16, **flags):
    """An untrained model, initialised with noise, and two such images on the grid."""
    module = importlib.import_module(script)
    torch.manual_seed(0)
    cfg = module.Config(small=True, **{"prior": "normal", **flags})
    model = getattr(module, MODELS[script])(cfg, (3, size, size)).eval()
    x = quantize(torch.rand(2, 3, size, size) * 2 - 1)
    model.initialize(x)
    return model, x


def content(stack):
    """All that is on a stack."""
    return stack.heads.tolist(), list(stack.words)


def pushed(codec, images):
    """Push images (N, C, H, W) onto a new stack -> the stack, and how many bits it grew by."""
    stack = compress.random_stack(codec.K)
    before = stack.bits()
    for image in images.split(1):
        codec.push(stack, image.to(memory_format=torch.channels_last))  # as from a file of images
    return stack, stack.bits() - before


# ---- Symbols, latents, pixels --------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_symbols_come_back_and_cost_their_entropy(seed):
    """Random tables of random numbers of symbols, more and fewer than there are coders.

    The stack ends as it began, and in between holds what the symbols' probabilities say.
    """
    rng = np.random.default_rng(seed)
    stack = compress.random_stack(1)
    at_first = content(stack)
    before = stack.bits()
    steps = []
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
        steps.append((table, symbol))
    assert stack.bits() - before == pytest.approx(entropy, rel=1e-3)
    for table, symbol in reversed(steps):
        assert np.array_equal(compress.pop_all(stack, table), symbol)
    assert content(stack) == at_first


def test_every_symbol_keeps_a_slot():
    """Else an improbable pixel could not be coded: 0 and 10⁻³⁰ get one slot of 2^20, 1 the rest."""
    p = np.array([[0, 1, 0, 1e-30]])
    assert compress.slots(p, p >= 0).tolist() == [[0, 1, 2**20 - 2, 2**20 - 1, 2**20]]


def test_bins_have_the_probability_of_their_interval():
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


def test_latents_are_drawn_apart_from_those_before():
    """Else z takes after that of the image before, number by number, and costs more than by chance.

    Popped by q what has been pushed by the prior: without an order of its own each number would
    come back.
    """
    stack = compress.random_stack(1)
    ramp = np.linspace(300, 700, 1024).astype(np.int64)
    compress.push_prior(stack, ramp)
    p = (torch.zeros(1, 16, 8, 8), torch.ones(1, 16, 8, 8))
    table = compress.latent_table(p, p)
    drawn = compress.pop_all(stack, table)
    assert abs(np.corrcoef(ramp, drawn)[0, 1]) < 0.2
    compress.push_all(stack, table, drawn)
    assert np.array_equal(compress.pop_prior(stack), ramp)


def test_a_symbol_with_all_slots_costs_nothing():
    """Else count · 2^44 is 2^64, an overflow. One without a slot is of a damaged file: an error."""
    stack = compress.random_stack(0)
    before = content(stack)
    table = np.broadcast_to(np.array([0, 0, 2**20, 2**20], np.uint64), (64, 4))
    compress.push_all(stack, table, np.ones(64, np.int64))
    assert content(stack) == before
    assert (compress.pop_all(stack, table) == 1).all()
    with pytest.raises(UserError, match="without a slot"):
        compress.push_all(stack, table, np.zeros(64, np.int64))


def in_turn(channels):
    """An InTurn of blocks of 2x2 pixels by random networks, for an image of 16x16."""
    p_x = selfvae.SelfVAE(selfvae.Config(exact=True, small=True), (channels, 16, 16)).p_x[0]
    return p_x(quantize(torch.rand(1, channels, 8, 8) * 2 - 1), torch.randn(1, 16, 8, 8))


def mixture(channels, interval=None):
    """A Dmol of random parameters with a shift."""
    params = torch.randn(1, dmol_channels(channels), 8, 8)
    return Dmol(params, channels, torch.rand(1, channels, 8, 8) - 0.5, interval)


def greys(x):
    """The interval of colours whose luma is 0, 1, 2, … from pixel to pixel."""
    return selfvae.grayscale_interval(torch.arange(64).view(1, 1, 8, 8), [], x)


@pytest.mark.parametrize("make_p_x, arguments", [
    (mixture, [1]), (mixture, [3]), (mixture, [3, greys]), (in_turn, [1]), (in_turn, [3])])
def test_pixels_cost_their_log_probability(make_p_x, arguments):
    """Else the tables are not of p(x_c) given the values before. Mixtures are random."""
    torch.manual_seed(0)
    p_x = make_p_x(*arguments)
    x = p_x.sample()
    stack = compress.random_stack(0)
    before = stack.bits()
    compress.push_image(stack, p_x, x)
    bits = -p_x.log_prob(x).item() / math.log(2)
    assert stack.bits() - before == pytest.approx(bits, rel=2e-3)
    assert torch.equal(compress.pop_image(stack, p_x), x)


# ---- Images --------------------------------------------------------------------------------------

class Exact(vae.VAE):
    """Each of 1,024 grey pixels is N(0.3 z, 0.1²), nearly, so the posterior is N(3x, 0.1).

    q has `factor` times its sd.
    """

    def __init__(self, factor):
        torch.nn.Module.__init__(self)
        self.p_z = vae.NormalPrior()
        self.factor = factor

    def q_z(self, x):
        mean = 3 * F.pixel_unshuffle(x, 4)
        log_var = torch.full_like(mean, math.log(0.1 * self.factor**2))
        return vae.gaussian(torch.cat([mean, log_var], 1))

    def p_x(self, z):
        params = torch.full((1, 30, 32, 32), -30.0)  # one component of ten
        params[:, 0] = 30
        params[:, 10] = F.pixel_shuffle(0.3 * z, 4)
        params[:, 20] = math.log(0.1 * math.sqrt(3) / math.pi) + 2  # its sd is 0.1
        return Dmol(params, 1)


def test_bits_come_back():
    """Else z costs what it costs without them: with the posterior a file of -log2 p(x) bits.

    x is Gaussian, of variance 0.3² + 0.1², but for logistic noise. With a q of three times the
    posterior's sd more than two bits a number do not come back.
    """
    torch.manual_seed(0)
    p = torch.distributions.Normal(0.0, math.sqrt(0.3**2 + 0.1**2))
    x = quantize(p.sample((4, 1, 32, 32)))
    bits = -(p.log_prob(x) + math.log(2 / 255)).sum().item() / math.log(2)
    _, cost = pushed(compress.Codec(Exact(1)), x)
    assert cost == pytest.approx(bits, rel=0.01)
    _, more = pushed(compress.Codec(Exact(3)), x)
    assert more > cost + 4 * 1024 * 2


@pytest.mark.parametrize("script, flags", [
    ("vae", {}), ("vae", dict(prior="realnvp")),
    ("selfvae", dict(levels=0)), ("selfvae", dict(levels=2, size=32, exact=True)),
    ("selfvae", dict(levels=1)), ("selfvae", dict(transform="grayscale", exact=True)),
    ("selfvae", dict(transform="posterize", exact=True)),
    ("selfvae", dict(transform="sketch", prior="realnvp"))])
def test_images_come_back(script, flags):
    """Bit for bit, the last one first; the stack ends as it began. In between it holds the bound.

    Else bits are lost, or the probabilities are not the bound's. Within its own noise here, as the
    file is of other draws of z; under a flow q costs more.
    """
    model, x = make(script, **flags)
    codec = compress.Codec(model)
    stack, cost = pushed(codec, x)
    if "prior" not in flags:
        bound = -torch.stack([model.elbo(x) for _ in range(10)]).mean(0).sum() / math.log(2)
        assert cost == pytest.approx(bound.item(), rel=0.01)
    for image in x.flip(0).split(1):
        assert torch.equal(codec.pop(stack), image)
    assert content(stack) == content(compress.random_stack(codec.K))


def test_a_prefix_is_the_small_image():
    """Else a reader of y_1, a sixteenth of the pixels, must pop more than u and y_1."""
    model, x = make("selfvae", size=32, levels=2)
    codec = compress.Codec(model)
    stack, _ = pushed(codec, x[:1])
    whole = stack.bits()
    assert torch.equal(codec.pop(stack, last=1), model.representations(x[:1])[1])
    of_y_1 = 8 * 3 * 8 * 8
    assert whole - stack.bits() < 8.5 * 1024 + 1.5 * of_y_1


def test_q_of_a_flow_has_the_sd_of_its_precision(monkeypatch):
    """Else bins are drawn too far out, as by the marginals' sds. Here u = v + v reversed / 2.

    So 1/τ_i² = 1/σ_i² + 1/4σ_j², j the number opposite, but for the noise of 64 signs.
    """
    model, x = make("vae", prior="realnvp")
    monkeypatch.setattr(model.p_z.flow, "inverse", lambda v: v + v.flip(1) / 2)
    monkeypatch.setattr(model.p_z.flow, "forward", lambda u: ((u - u.flip(1) / 2) / 0.75, None))
    mean, sd = compress.Codec(model).q(0, x[:1])
    q = model.q_z(x[:1])
    torch.testing.assert_close(mean, (q.mean - q.mean.flip(1) / 2) / 0.75)
    expected = (q.variance.reciprocal() + q.variance.flip(1).reciprocal() / 4).rsqrt()
    error = (sd / expected).log()
    assert error.mean().abs() < 0.03 and error.std() < 0.25


def test_a_mixture_prior_is_refused():
    """Its numbers depend on each other, through the component."""
    with pytest.raises(UserError, match="mixture"):
        compress.Codec(make("vae", prior="mog")[0])


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags", [
    ("vae", dict(prior="normal")), ("vae", dict(dataset="mnist")),
    ("selfvae", dict(exact=True)), ("selfvae", dict(levels=2, size=32))])
def test_files_come_back(tmp_path, tiny_data, script, flags):
    """Two test images, through a file; none is overwritten."""
    folder = str(save_untrained(tmp_path / "run", script, data_dir=str(tiny_data), **flags))
    path = str(tmp_path / "images.ans")
    write = ["write", folder, path, "2"]
    read = ["read", folder, path]
    assert compress.main(write) == 0
    assert compress.main(read) == 0
    name = f"{flags.get('dataset', 'shapes')}-{flags.get('size', 16)}"
    images = np.load(tiny_data / name / "test.npy")[:2]
    assert np.array_equal(np.load(tmp_path / "images.ans.npy"), images)
    assert compress.main(write) == 2
    assert compress.main(read) == 2


@pytest.mark.parametrize("script, flags, dims, shown", [
    ("selfvae", dict(exact=True), 3 * 16 * 16, ["y_1", "x"]),
    ("vae", dict(dataset="mnist"), 16 * 16, ["x"])])
def test_sizes(tmp_path, tiny_data, capsys, script, flags, dims, shown):
    """Else the table says something else than `write`, the bound, and what is popped.

    Of three images of 16x16. What is popped has the latents in full, some 8 bits a number.
    """
    folder = str(save_untrained(tmp_path / "run", script, data_dir=str(tiny_data), prior="normal",
                                **flags))
    assert compress.main(["write", folder, str(tmp_path / "images.ans"), "3"]) == 0
    written = float(capsys.readouterr().out.split("; ")[1].split()[0])
    assert compress.main(["sizes", folder, "3"]) == 0
    table = {}
    for line in capsys.readouterr().out.splitlines():
        name, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        table[name] = numbers
    below = 0
    for k, name in enumerate(shown, 1):
        bound, net, popped = map(float, table[name])
        assert net == pytest.approx(bound, rel=0.02) and net > below
        assert net < popped < net + 9 * k * 1024 / dims
        below = net
    assert net == pytest.approx(written, abs=1e-4)
    weighted = float(table["x, -bound by 16 importance samples"][0])
    assert weighted == pytest.approx(bound, rel=0.05)
    for name in ("PNG", "WebP"):
        assert 0 < float(table[f"x as {name}, a file each"][1]) < 16


def test_photo(tmp_path, capsys, monkeypatch):
    """Tiles go there and come back; PNG costs what the same pixels cost as a file."""
    folder = str(save_untrained(tmp_path / "run", "selfvae", prior="normal", exact=True))
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    tiles = []
    push = compress.Codec.push

    def push_and_see(codec, stack, x):
        tiles.append(compress.to_uint8(x)[0].permute(1, 2, 0).numpy())
        push(codec, stack, x)

    monkeypatch.setattr(compress.Codec, "push", push_and_see)
    photo = ["photo", folder, str(tmp_path / "photo.png")]
    assert compress.main([*photo, "16"]) == 0
    says, net, whole, png, _ = capsys.readouterr().out.splitlines()
    assert np.array_equal(tiles[1], pixels[:16, 16:32])
    assert np.array_equal(tiles[3], pixels[16:32, :16])
    assert says.startswith("48x32 pixels, 6 tiles, back bit for bit")
    assert 7 < float(net.split()[-1]) < float(whole.split()[-1])
    Image.fromarray(pixels[:32, :48]).save(tmp_path / "cut.png", optimize=True)
    bits = 8 * (tmp_path / "cut.png").stat().st_size
    assert float(png.split()[-1]) == pytest.approx(bits / (32 * 48 * 3), abs=1e-3)


def test_photo_sees_what_did_not_come_back(tmp_path, capsys, monkeypatch):
    """Else "bit for bit" is said whatever the receiver finds."""
    folder = str(save_untrained(tmp_path / "run", "vae", prior="normal"))
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    monkeypatch.setattr(compress.Codec, "pop", lambda codec, stack: torch.zeros(1, 3, 16, 16))
    assert compress.main(["photo", folder, str(tmp_path / "photo.png"), "16"]) == 2
    assert "did not come back" in capsys.readouterr().err


def test_bad_files(tmp_path, tiny_data, capsys):
    """One line and exit code 2, and no images: what is cut, damaged, foreign, of other weights."""
    folder = save_untrained(tmp_path / "run", "vae", data_dir=str(tiny_data), prior="normal")
    path = tmp_path / "images.ans"

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
    Image.new("RGB", (40, 15)).save(tmp_path / "low.png")
    refused("is smaller than one tile", "photo", folder, tmp_path / "low.png", 16)
    refused("SIDE must be", "photo", folder, tmp_path / "low.png", "abc")
    refused("of another model", "photo", folder, tmp_path / "low.png", 32)
    refused("can be read", "photo", folder, tmp_path / "nothing.png", 16)
    refused("cannot be read", "read", folder, path)
    assert compress.main(["write", str(folder), str(path), "2"]) == 0

    content = path.read_bytes()
    header, body = content.split(b"\n", 1)
    changed = bytearray(content)
    changed[-500] ^= 1
    cases = {
        "run empty": content[:-len(body) + 8 * 64 + 40],
        "damaged": changed,
        "no file of compress.py": b"something else",
        "header is broken": content.replace(b'"count": 2', b'"count": "2"'),
        "its header": content.replace(b"[3, 16, 16]", b"[3, 16, 32]"),
        "of another model": content.replace(b"[3, 16, 16]", b"[1, 16, 16]"),
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
    torch.save(checkpoint | {"script": "dcvae"}, folder / "best.pt")
    refused("take one of vae.py", "read", folder, path)
