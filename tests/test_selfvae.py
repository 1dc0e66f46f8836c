"""selfvae.py against closed forms: d, the K = 0 model (a VAE), the K-level bound, samples.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform
noise (`noise_images`).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, MultivariateNormal, Normal

import selfvae
import vae
from common import (
    Batches, UserError, bits_per_dim, from_uint8, log_mean_exp, mean_terms, quantize,
    to_uint8)
from conftest import count, seeded
from selfvae import Config, SelfVAE, downscale, gaussian

NAMES = {  # K: the terms of the bound
    0: ["kl_u", "re_x"],
    1: ["kl_u", "re_y_1", "kl_z_1", "re_x"],
    2: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_x"],
    3: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_y_3", "kl_z_3", "re_x"],
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    width = dict(q_u=(8, 1), p_y=(8, 1), flow=(4, 1), q_z=(8, 1),
                 p_z_from_y=(8, 1), p_z=(4, 1),
                 p_x_from_z=(8, 1), z_channels=8, p_x=(4, 1), turn=(4, 1))
    monkeypatch.setitem(selfvae.WIDTHS, "small", width)
    torch.manual_seed(0)


def noise_images(n, channels=3, size=16):
    return from_uint8(torch.randint(256, (n, channels, size, size)))


def halved(y):
    """d = downscaling, of images in [-1, 1]."""
    return from_uint8(downscale(to_uint8(y).int()))


def make(levels=1, channels=3, size=16, prior="realnvp", transform="downscale"):
    cfg = Config(levels=levels, prior=prior, transform=transform, small=True)
    model = SelfVAE(cfg, (channels, size, size))
    model.initialize(noise_images(4, channels, size))
    return model


def move_parameters(*modules):
    """Add noise to every parameter: the flow is no identity any more, p and q are far apart."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))


def inputs_of(module):
    """A list that fills with the positional inputs of each call of `module`."""
    calls = []
    module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    return calls


def assert_images(x, shape):
    """Of that shape, in [-1, 1], on the grid of 256 values."""
    assert x.shape == shape
    assert x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)


# ---- The transformations d -----------------------------------------------------------------------

def pixels(*rows):
    """Rows of pixel values -> (1, 1, H, W)."""
    return torch.tensor(rows).view(1, 1, len(rows), -1)


def test_downscale_by_hand():
    """Each 2x2 block becomes its mean, at its place, rounded half up, neither down nor to even.

    1.5 -> 2, 2.5 -> 3, 0.5 -> 1, 254.5 -> 255, 0.25 -> 0, 127.5 -> 128.
    """
    x = pixels([0, 0, 255, 255, 10, 20, 0, 0],
               [0, 0, 255, 255, 30, 40, 0, 1],
               [0, 0, 0, 0, 1, 2, 2, 3],
               [0, 2, 1, 2, 1, 2, 2, 3],
               [255, 255, 255, 255, 0, 0, 0, 255],
               [255, 253, 255, 252, 255, 255, 0, 255])
    assert downscale(x).tolist() == [[[[0, 255, 25, 0], [1, 1, 2, 3], [255, 254, 128, 128]]]]


@pytest.mark.parametrize("rgb, luma", [
    ((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29), ((255, 255, 255), 255),
    ((1, 0, 0), 0), ((0, 1, 0), 1), ((10, 20, 30), 18), ((0, 0, 0), 0)])
def test_grayscale_by_hand(rgb, luma):
    """It is 0.299 R + 0.587 G + 0.114 B, rounded; what is grey already is left alone.

    76.245, 149.685, 29.07, 255, 0.299, 0.587, 2.99 + 11.74 + 3.42 = 18.15, 0.
    """
    grey = selfvae.grayscale(torch.tensor(rgb).view(1, 3, 1, 1))
    assert grey.shape == (1, 1, 1, 1)
    assert grey.item() == luma
    assert selfvae.grayscale(grey) is grey


def test_edges_by_hand():
    """Differences are those of the two neighbours, at the border of the border pixel itself.

    A column of 30 and a row of 40 cross at 50; no value is above 255, and roots are rounded.
    """
    rows = pixels([0, 0, 0, 0], [0, 0, 0, 0], [40, 40, 40, 40], [40, 40, 40, 40])
    column = pixels(*[[0, 0, 30, 30]] * 4)
    crossing = [[0, 30, 30, 0], [40, 50, 50, 40], [40, 50, 50, 40], [0, 30, 30, 0]]
    assert selfvae.edges(rows + column).tolist() == [[crossing]]
    assert selfvae.edges(pixels([0, 9, 1, 1])).tolist() == [[[[9, 1, 8, 0]]]]
    clipped = selfvae.edges(pixels([0, 255], [255, 255]))
    assert clipped.tolist() == [[[[255, 255], [255, 0]]]]  # 255 √2 at the first
    rounded = selfvae.edges(pixels([0, 2], [3, 0]))
    assert rounded.tolist() == [[[[4, 3], [4, 4]]]]  # √13, √8; √18, √13


def test_posterize_by_hand():
    """The two high bits stay, and are spread over the range."""
    y = selfvae.posterize(pixels([0, 63, 64, 127, 128, 191, 192, 255]))
    assert y.tolist() == [[[[0, 0, 85, 85, 170, 170, 255, 255]]]]


def test_sketch_by_hand():
    """One pixel of 100 on 200 becomes a dark dot on white paper, and flat areas turn white.

    Its inverse is 155 on 55, of which the blur keeps 55 + 100·(70/256)² = 62.5 in the middle.
    """
    a = torch.full((1, 1, 17, 17), 200)
    a[..., 8, 8] = 100
    y = selfvae.sketch(a)
    assert y[0, 0, 8, 8] == 255 * 101 // (256 - 62)  # darker than around it: a line
    assert (y == 255).sum() == 17 * 17 - 1  # lighter than the blur: paper
    assert (selfvae.sketch(pixels([0] * 9)) == 255).all()
    assert (selfvae.sketch(pixels([77] * 9)) == 255).all()


def test_sketch_of_noise_and_of_colours():
    """It repeats the edge, and rounds once, after both sides, as a float64 convolution shows.

    A colour image is sketched from its luma.
    """
    colours = torch.randint(0, 256, (2, 3, 20, 20))
    a = selfvae.grayscale(colours)
    weights = torch.tensor([math.comb(8, i) for i in range(9)]).double()
    kernel = torch.outer(weights, weights).view(1, 1, 9, 9) / 2**16
    padded = F.pad(255.0 - a.double(), (4, 4, 4, 4), mode="replicate")
    b = (F.conv2d(padded, kernel) + 0.5).floor().long()
    expected = (255 * (a + 1) // (256 - b)).clamp(max=255)
    assert torch.equal(selfvae.sketch(colours), expected)
    assert torch.equal(selfvae.sketch(a), expected)


@pytest.mark.parametrize("name", selfvae.TRANSFORMS)
def test_transformations_are_exact(name):
    """d(x) is in 0 … 255, and the same alone, in a batch, in channels_last and under autocast.

    It is made of integers, but for `edges`. Else a model would not meet the y it was trained on.
    """
    d, _, _ = selfvae.TRANSFORMS[name]
    assert d.__name__ == name
    x = torch.randint(256, (5, 3, 16, 16), dtype=torch.int32)
    y = d(x)
    assert y.min() >= 0 and y.max() <= 255 and y.dtype == torch.int32
    assert torch.equal(y, torch.cat([d(image[None]) for image in x]))
    assert torch.equal(y, d(x.contiguous(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, d(x))


@pytest.mark.parametrize("name", ["sketch", "grayscale", "edges", "posterize"])
def test_what_cannot_be_repeated_says_so(name):
    """A second sketch of a sketch is refused, and the message says what to type instead."""
    message = f"--transform {name} cannot be applied 2 times: take --levels 1"
    with pytest.raises(UserError, match=message):
        SelfVAE(Config(levels=2, transform=name, small=True), (3, 32, 32))


def test_a_transformation_is_one_function_and_one_entry(monkeypatch):
    """Networks, bound, images and every operation follow from a new d and its entry alone.

    The toy d keeps red and green at a quarter of the side, and is stacked twice.
    """
    def toy(y):
        return y[:, :max(1, y.shape[1] - 1), ::2, ::2]

    monkeypatch.setitem(selfvae.TRANSFORMS, "toy", (toy, 2, False))
    model = make(levels=2, size=32, transform="toy")
    x = noise_images(2, size=32)
    assert model.shapes == {1: (1, 8, 8), 2: (2, 16, 16), 3: (3, 32, 32)}
    assert torch.equal(model.representations(x)[1], x[:, :1, ::4, ::4])
    assert model.elbo(x).isfinite().all()
    assert model.log_weights(x, 2).isfinite().all()
    for operation in model.operations:
        assert_images(model.reconstruct(x, operation=operation), (2, 3, 32, 32))


def test_representations_are_the_chain_of_downscalings():
    """K = 3, 64 pixels: y_4 = x, then 32, 16, 8, each the downscaling of the one above."""
    x = noise_images(2, size=64)
    y = make(levels=3, size=64).representations(x)
    assert {k: y_k.shape[-1] for k, y_k in y.items()} == {4: 64, 3: 32, 2: 16, 1: 8}
    assert y[4] is x
    for k in (1, 2, 3):
        assert torch.equal(y[k], halved(y[k + 1]))


# ---- Networks ------------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_released_code():
    """K = 1 on 32x32 RGB has its networks, factor by factor, as traced in that code."""
    with torch.device("meta"):
        model = SelfVAE(Config(levels=1), (3, 32, 32))
    counts = {name: count(part) for name, part in model.named_children() if name != "p_u"}
    assert counts == {"q_u": 3_934_912, "p_y": 4_354_140, "q_z": 3_027_986, "p_z": 6_428_516,
                      "p_x": 10_115_140}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("flags", [
    dict(levels=0), dict(levels=1), dict(levels=2), dict(transform="sketch"), dict(exact=True),
    dict(levels=2, exact=True)])
def test_paper_size_has_32_to_42_million_parameters(flags, size):
    """Models are as large as the paper's, at every size, depth and kind of decoder.

    Without levels they are exactly as large as vae.py's.
    """
    with torch.device("meta"):
        model = SelfVAE(Config(**flags), (3, size, size))
        assert 32e6 < count(model) < 42e6
        if model.K == 0:
            assert count(model) == count(vae.VAE(vae.Config(), (3, size, size)))


@pytest.mark.parametrize("transform", ["downscale", "grayscale", "posterize", "sketch", "edges"])
def test_a_decoder_without_output_gives_y_back_where_y_is_a_coarse_x(transform):
    """Where the network's output is 0, the mean of p(x|y, z) is the enlarged y in every channel.

    For sketch and edges, which are no coarse x, it is 0, mid-grey.
    """
    model = make(size=32, transform=transform)
    x = noise_images(2, size=32)
    y = model.representations(x)[1]
    last = model.p_x[0].joint[-1]
    with torch.no_grad():
        last.parametrizations.weight.original0.zero_()
        last.bias.zero_()
        mean = model.p_x[0](y, torch.randn(2, 16, 8, 8)).mean
    expected = F.interpolate(y, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    if transform in ("sketch", "edges"):
        expected = torch.zeros_like(expected)
    torch.testing.assert_close(mean, expected, atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_terms_and_shapes(levels, channels):
    """There are 2K + 2 terms, by level, costs, and the ELBO is minus their sum."""
    model = make(levels, channels, size=64)
    x = noise_images(2, channels, size=64)
    terms = seeded(model.terms, x)
    assert list(terms) == NAMES[levels]
    for name, values in terms.items():
        assert values.shape == (2,) and values.isfinite().all()
        assert name == "kl_u" or (values > 0).all()
    torch.testing.assert_close(seeded(model.elbo, x), -sum(terms.values()))


@pytest.mark.parametrize("shape, flags, message", [
    ((3, 8, 8), dict(levels=1), "--levels 1 leaves y_1 4 pixels a side, and 8 are the least"),
    ((3, 32, 32), dict(levels=7), "--levels 7 leaves y_1 0 pixels"),
    ((3, 48, 48), dict(levels=1), "side 48 do not halve"),
    ((1, 32, 32), dict(transform="grayscale"), "grayscale leaves grey images as they are"),
    ((3, 32, 32), dict(exact=True, levels=0), "exact needs --levels 1 or more"),
    ((3, 32, 32), dict(exact=True, transform="sketch"), "exact needs .* grayscale or posterize"),
    ((3, 32, 32), dict(exact=True, transform="edges"), "exact needs")])
def test_refused(shape, flags, message):
    """The message names what cannot be, and why."""
    with pytest.raises(UserError, match=message):
        SelfVAE(Config(small=True, **flags), shape)


# ---- K = 0 ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("prior", ["normal", "realnvp"])
def test_without_levels_it_is_the_vae(prior):
    """q_u, p_u, p_y are the VAE's q_z, p_z, p_x.

    From the same weights and noise come the same bound, importance weights and images.
    """
    plain = vae.VAE(vae.Config(prior=prior, small=True), (3, 32, 32))
    x = noise_images(2, size=32)
    plain.initialize(x)
    model = SelfVAE(Config(levels=0, prior=prior, small=True), (3, 32, 32))
    move_parameters(plain.p_z)
    renamed = {"q_z": "q_u", "p_z": "p_u", "p_x": "p_y"}
    weights = {}
    for name, values in plain.state_dict().items():
        weights[renamed[name[:3]] + name[3:]] = values
    model.load_state_dict(weights)
    ours = seeded(model.terms, x)
    theirs = seeded(plain.terms, x)
    torch.testing.assert_close(ours, {"kl_u": theirs["kl_z"], "re_x": theirs["re_x"]})
    log_w = seeded(model.log_weights, x, 3)
    torch.testing.assert_close(log_w, seeded(plain.log_weights, x, 3))
    assert torch.equal(seeded(model.sample, 2), seeded(plain.sample, 2))
    assert torch.equal(seeded(model.reconstruct, x), seeded(plain.reconstruct, x))


# ---- The bound -----------------------------------------------------------------------------------
# A model with known log p(x), K = 1, 16x16 grey pixels. At each of the 8x8 places of u, one pixel y
# of y_1 = d(x), 4 pixels x_i of x and 4 values z_i; what is left of u and z has q = p = N(0, 1):
#
#     u ~ N(0, 1)       y|u ~ N(u, 0.5²)
#     z_i|y,u ~ N(0.7 y + c·u, 1)         x_i|y,z ~ N(y + z_i, 0.4²)
#     u|y ~ N(0.8 y, 0.2)
#     z_i|x,y ~ N(0.16 (0.7 + 0.8 c) y + x_i - y, 0.16) / 1.16 in mean and variance, if c = 0
#
# With c = 0 the posterior is a product q(u|y) q(z|x) and the bound is tight. Else u and z depend on
# each other a posteriori.

class Stub(torch.nn.Module):
    """A factor that is a given function of what it is conditioned on."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)

    def from_y(self, y):  # this and the next are for p(z_k|·)
        return y

    def given(self, h, z):
        return self.function(h, z)


def latent(mean, variance):
    """μ (B, n, 8, 8) and one σ² for a latent's first n channels -> input of `gaussian`.

    The other channels are N(0, 1).
    """
    zeros = torch.zeros(len(mean), 16 - mean.shape[1], 8, 8)
    return torch.cat([mean, zeros, torch.full_like(mean, math.log(variance)), zeros], 1)


def fours(x):
    """The four pixels of each place: (B, 1, 16, 16) -> (B, 4, 8, 8)."""
    return F.pixel_unshuffle(x, 2)


def linear_gaussian(c):
    """-> the model, x (3, 1, 16, 16), log p(x) = log p(x, d(x)) (3,)."""
    def q_u(y):
        return gaussian(latent(0.8 * y, 0.2))

    def p_y(u):
        return Independent(Normal(u[:, :1], 0.5), 3)

    def q_z(x):
        y = halved(x)
        mean = (0.16 * (0.7 + 0.8 * c) * y + fours(x) - y) / 1.16
        return gaussian(latent(mean, 0.16 / 1.16))

    def p_z(y, u):
        return gaussian(latent((0.7 * y + c * u[:, :1]).expand(-1, 4, -1, -1), 1.0))

    def p_x(y, z):
        mean = F.interpolate(y, scale_factor=2) + F.pixel_shuffle(z[:, :4], 2)
        return Independent(Normal(mean, 0.4), 3)

    model = make(levels=1, channels=1, prior="normal")
    x = noise_images(3, channels=1)
    model.q_u = Stub(q_u)
    model.p_y = Stub(p_y)
    model.q_z[0] = Stub(q_z)
    model.p_z[0] = Stub(p_z)
    model.p_x[0] = Stub(p_x)
    y = halved(x)
    # Of p(x_1 … x_4|y): z_i and u are integrated out.
    mean = ((1.7 + 0.8 * c) * y).movedim(1, -1).expand(-1, -1, -1, 4)
    covariance = 1.16 * torch.eye(4) + 0.2 * c**2
    of_x = MultivariateNormal(mean, covariance).log_prob(fours(x).movedim(1, -1)).sum((1, 2))
    of_y = Normal(0.0, math.sqrt(1.25)).log_prob(y).sum((1, 2, 3))
    return model, x, of_x + of_y


def test_with_exact_posteriors_every_weight_is_p_of_x():
    """log w = log p(x) whatever u and z are drawn: no factor is missing or counted twice.

    The ELBO is log p(x) too, but for the noise that a closed-form KL does not cancel.
    """
    model, x, log_p = linear_gaussian(c=0.0)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=5e-3, rtol=0)
    elbo = model.elbo(x.repeat(400, 1, 1, 1)).view(400, 3)
    torch.testing.assert_close(elbo.mean(0), log_p, atol=4 * elbo.std().item() / 20, rtol=0)


def test_bounds_order_and_tighten():
    """With u and z_1 dependent, c = 0.4, more samples tighten the bound and never pass log p(x).

    E[elbo] = E[log w] < bound of S = 8 < of 64 < log p(x), and S = 6,400 reaches it.
    """
    model, x, log_p = linear_gaussian(c=0.4)
    log_w = model.log_weights(x.repeat(100, 1, 1, 1), 64).view(6400, 3)
    bound = {S: log_mean_exp(log_w.view(-1, S, 3), 1).mean(0) for S in (1, 8, 64)}
    elbo = model.elbo(x.repeat(1000, 1, 1, 1)).view(1000, 3)
    error = elbo.std(0).max().item() / math.sqrt(1000)
    torch.testing.assert_close(elbo.mean(0), bound[1], atol=4 * error, rtol=0)
    assert (bound[1] + 0.3 < bound[8]).all()
    assert (bound[8] + 0.1 < bound[64]).all()
    assert (bound[64] < log_p + 0.1).all()
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.4, rtol=0)


def test_one_draw_of_u_serves_every_term():
    """u is that of p_y in kl_u too, and kl_z_1 reaches it, as re_x reaches z_1.

    So the encoders learn what p(z_1|y_1, u) and p(x|y_1, z_1) need.
    """
    model = make()
    x = noise_images(2)
    to_p_y = inputs_of(model.p_y)
    to_p_x = inputs_of(model.p_x[0])
    terms = model.terms(x)
    u, = to_p_y[0]
    _, z = to_p_x[0]
    q_u = model.q_u(halved(x))
    kl_u = q_u.log_prob(u) - model.p_u.log_prob(u)
    torch.testing.assert_close(terms["kl_u"], kl_u, atol=1e-2, rtol=1e-5)
    for name, drawn in (("kl_z_1", u), ("re_x", z)):
        gradient, = torch.autograd.grad(terms[name].sum(), drawn, retain_graph=True)
        assert gradient.any()


@pytest.mark.parametrize("k", [1, 2])
def test_every_kl_is_in_the_bound(no_noise, k):
    """No KL is left out of the sum, as the paper prints it.

    Widening q(z_k|y_{k+1}) raises kl_z_k and, as z_k's mean is the same, nothing else; the ELBO
    falls by just that.
    """
    model = make(levels=2, size=32)
    x = noise_images(2, size=32)
    before = model.terms(x)
    with torch.no_grad():
        model.q_z[k - 1][-1].bias[16:] += 1  # log σ²
    after = model.terms(x)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"kl_z_{k}"]
    rise = after[f"kl_z_{k}"] - before[f"kl_z_{k}"]
    assert (rise > 10).all()
    torch.testing.assert_close(-sum(before.values()) - model.elbo(x), rise, atol=0.05, rtol=0)


def three_log_weights(model, x):
    return model.log_weights(x, 3)


@pytest.mark.parametrize("bound, draws", [(SelfVAE.terms, 1), (three_log_weights, 3)])
def test_each_factor_sees_what_it_should(no_noise, bound, draws):
    """K = 2: no factor has an input of another level, or one that is not given at generation.

    q(u|y_1), q(z_k|y_{k+1}), p(z_k|y_k, z_{k-1}), p(y_{k+1}|y_k, z_k), with z_0 = u. Every q sees x
    and y once, however many samples there are.
    """
    model = make(levels=2, size=32)
    x = noise_images(2, size=32)
    y = model.representations(x)
    u = model.q_u(y[1]).mean
    z_1 = model.q_z[0](y[2]).mean
    z_2 = model.q_z[1](x).mean
    expected = {
        model.q_u: [y[1]], model.p_y: [u], model.q_z[0]: [y[2]], model.q_z[1]: [x],
        model.p_z[0].from_y: [y[1]], model.p_z[0].from_z: [u], model.p_x[0]: [y[1], z_1],
        model.p_z[1].from_y: [y[2]], model.p_z[1].from_z: [z_1], model.p_x[1]: [y[2], z_2],
    }
    calls = {module: inputs_of(module) for module in expected}
    bound(model, x)
    encoders = [model.q_u, *model.q_z]
    for module, inputs in expected.items():
        assert len(calls[module]) == (1 if module in encoders else draws)
        torch.testing.assert_close(list(calls[module][0]), inputs)


# ---- Images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("mean", [False, True])
def test_images_are_images(levels, mean):
    """x, every y on the way and x̂ by every operation have their shapes and lie on the grid.

    That holds for samples and for means, and `sample` gives the x of `decode`.
    """
    model = make(levels, channels=1, size=32)
    x = noise_images(2, channels=1, size=32)
    values, factors = seeded(model.decode, {}, 3, mean=mean)
    names = ["u", "y_1", "z_1", "y_2", "z_2"][:2 * levels + 1] + ["x"]
    assert list(values) == list(factors) == names
    for k, name in model.y_names.items():
        side = 32 >> (levels + 1 - k)
        assert_images(values[name], (3, 1, side, side))
        assert torch.equal(values[name], factors[name].mean) == mean
    assert torch.equal(seeded(model.sample, 3, mean=mean), values["x"])
    for operation in model.operations:
        assert_images(model.reconstruct(x, operation, mean=mean), (2, 1, 32, 32))


def test_temperature_scales_the_noise_of_u_and_z():
    """u and z_1 have the temperature's share of the noise, T, of their priors.

    p(u) = N(0, 1), so u has sd T. At T = 0 z_1 is the mean of p(z_1|y_1, u).
    """
    model = make(prior="normal")
    with torch.no_grad():
        model.p_z[0].joint[-1].bias[16:] += 2  # log σ²: an sd of z_1 far from 1
    for temperature in (0.0, 0.5, 1.0):
        values, factors = model.decode({}, 4, temperature)
        assert values["u"].std().item() == pytest.approx(temperature, rel=0.1)
        prior = factors["z_1"]
        noise = (values["z_1"] - prior.mean) / prior.stddev
        assert noise.std().item() == pytest.approx(temperature, rel=0.1, abs=1e-5)


@pytest.mark.parametrize("operation, sent, drawn_z, drawn_y", [
    ("generate", [], [0, 1, 2], [1, 2]),
    ("conditional_generate", ["y_2"], [2], []),
    ("conditional_reconstruct", ["y_2", "z_2"], [], []),
    ("reconstruct_1", ["u"], [1, 2], [1, 2]),
    ("reconstruct_2", ["u", "z_1", "z_2"], [], [1, 2]),
    (None, ["y_1", "z_2"], [1], [2])])  # any other mixture can be sent
def test_operations_know_what_they_should(no_noise, operation, sent, drawn_z, drawn_y):
    """Figure 3 for K = 2, without noise: what is not drawn from p has x's own value.

    What is drawn is p's mean, given the rest. Conditional generation knows z_1 and u, for
    y_2 = d(x) tells them; section 3.3 swaps it with conditional reconstruction.
    """
    model = make(levels=2, size=32)
    x = noise_images(2, size=32)
    y_of_x = model.representations(x)
    inferred = [model.q_u(y_of_x[1]).mean,
                model.q_z[0](y_of_x[2]).mean,
                model.q_z[1](x).mean]
    assert operation is None or model.operations[operation] == sent
    known, q = model.infer(x, sent)
    assert set(q) == set(known) - {"y_1", "y_2"}
    to_p_x = [inputs_of(p_x) for p_x in model.p_x]
    values, _ = model.decode(known, 2, temperature=0.0)
    for name in known:
        assert torch.equal(values[name], known[name])
    z = [values[name] for name in model.latents]
    for k in range(3):
        if k not in drawn_z:
            expected = inferred[k]
        elif k == 0:
            expected = model.p_u.from_noise(torch.zeros(2, 16, 8, 8))
        else:
            expected = model.p_z[k - 1](values[f"y_{k}"], z[k - 1]).mean
        torch.testing.assert_close(z[k], expected)
    for k in (1, 2):
        assert torch.equal(values[f"y_{k}"], y_of_x[k]) == (k not in drawn_y)
        torch.testing.assert_close(to_p_x[k - 1][0], (values[f"y_{k}"], z[k]))


def test_to_send_what_is_not_there_is_an_error():
    """A name of no latent and no image is told, and not passed over in silence."""
    for name in ("z_2", "y_2"):
        with pytest.raises(ValueError, match=name):
            make().infer(noise_images(1), ["u", name])


def test_to_send_everything_costs_the_bound(no_noise):
    """K = 2: for all latents, y's and x itself the code length Σ log q - log p is -log w.

    Name by name it has the terms of the bound, but for kl_z_k, which is a mean over z_k.
    """
    model = make(levels=2, size=32)
    x = noise_images(2, size=32)
    move_parameters(model.p_u, model.p_z, model.q_z)
    known, q = model.infer(x, ["y_2", "x", "z_2"])
    assert set(known) == {"u", "y_1", "z_1", "y_2", "z_2", "x"}
    _, p = model.decode(known, 2)
    costs = {}
    for name, value in known.items():
        costs[name] = -p[name].log_prob(value)
        if name in q:
            costs[name] = costs[name] + q[name].log_prob(value)
    (log_w,) = model.log_weights(x, 1)
    torch.testing.assert_close(sum(costs.values()), -log_w)
    terms = model.terms(x)
    for name, term in (("u", "kl_u"), ("y_1", "re_y_1"), ("y_2", "re_y_2"), ("x", "re_x")):
        torch.testing.assert_close(costs[name], terms[term])


def test_conditional_generation_has_seen_only_y():
    """Two images with the same d(x) give the same x̂ from the same noise.

    What is sent is y alone. Conditional reconstructions differ: they have seen x.
    """
    model = make()
    x = noise_images(2)
    blocks = F.pixel_unshuffle(x, 2).unflatten(1, (3, 4))
    flipped = F.pixel_shuffle(blocks.flip(2).flatten(1, 2), 2)  # each 2x2 block reversed
    assert torch.equal(halved(flipped), halved(x))
    assert not torch.equal(flipped, x)
    same = []
    for operation in model.operations:
        of_x = seeded(model.reconstruct, x, operation=operation)
        if torch.equal(of_x, seeded(model.reconstruct, flipped, operation=operation)):
            same.append(operation)
    assert same == ["generate", "conditional_generate", "reconstruct_1"]


# ---- What is sent --------------------------------------------------------------------------------

def test_rates_by_hand():
    """K = 1 on 32x32 RGB: shares of D = 3,072 values, bits against the terms, and PSNRs.

    y has 768 values, u and z 1,024 each: 25, 58.3, 33.3 and 66.7 % are sent.
    """
    model = make(size=32)
    x = noise_images(6, size=32)
    batches = Batches(to_uint8(x).permute(0, 2, 3, 1).numpy(), 4, "cpu")
    table = selfvae.rates(Config(device="cpu", dtype="fp32"), model, batches, 3072)
    assert list(table) == list(model.operations)
    percent = [round(row["percent"], 1) for row in table.values()]
    assert percent == [0.0, 25.0, 58.3, 33.3, 66.7]
    raw_bpd = [round(row["raw_bpd"], 2) for row in table.values()]
    assert raw_bpd == [0.0, 2.0, 4.67, 2.67, 5.33]
    terms = {}
    for name, value in mean_terms(model, batches).items():
        terms[name] = bits_per_dim(value, 3072)
    kl_u = terms["kl_u"]
    of_y = kl_u + terms["re_y_1"]
    ideal_bpd = [row["ideal_bpd"] for row in table.values()]
    assert ideal_bpd[:4] == pytest.approx([0.0, of_y, of_y + terms["kl_z_1"], kl_u], abs=0.02)
    for row in table.values():
        assert 5 < row["psnr"] + 0.5 < row["psnr_mean"] < 30


def test_bicubic_by_hand():
    """Far from an edge a ramp of 4 values a pixel becomes one of 2. Beside a step it overshoots."""
    canvas = torch.empty(1, 1, 32, 32)
    ramp = from_uint8((4 * torch.arange(16) + 100).expand(1, 1, 16, 16))
    x = to_uint8(selfvae.bicubic(ramp, canvas))[0, 0, 5, 8:24].int()
    assert torch.equal(x, 2 * torch.arange(8, 24, dtype=torch.int32) + 99)
    step = from_uint8(torch.tensor([100] * 8 + [150] * 8).expand(1, 1, 16, 16))
    x = to_uint8(selfvae.bicubic(step, canvas))
    assert x.min() < 100 and x.max() > 150


# ---- Latent space --------------------------------------------------------------------------------

@pytest.mark.parametrize("base", [False, True])
@torch.no_grad()
def test_interpolation_in_u_or_its_base(base):
    """The way from one image's mean of q(u|y_1) to the other's is straight in u, or in v = f⁻¹(u).

    z_1 has no noise. A way of one image has no step.
    """
    model = make()
    x = noise_images(4)
    move_parameters(model.p_u)
    to_p_y = inputs_of(model.p_y)
    to_p_x = inputs_of(model.p_x[0])
    images = model.interpolate(x[:2], x[2:], 5, base=base)
    assert_images(images.flatten(0, 1), (10, 3, 16, 16))
    u, = to_p_y[0]
    y, z = to_p_x[0]
    torch.testing.assert_close(z, model.p_z[0](y, u).mean)
    path = u
    ends = model.q_u(halved(x)).mean
    if base:
        path, _ = model.p_u.flow(u)
        ends, _ = model.p_u.flow(ends)
    start, end = ends.chunk(2)
    path = path.unflatten(0, (2, 5))
    for i in range(5):
        straight = torch.lerp(start, end, i / 4)
        torch.testing.assert_close(path[:, i], straight, atol=1e-4, rtol=1e-4)
    assert_images(model.interpolate(x, x, 1, base=base)[:, 0], x.shape)


@pytest.mark.parametrize("redrawn", [["z_1", "z_2"], ["z_1"], ["z_2"]])
def test_variations_share_the_other_latents(redrawn):
    """K = 2: in a row of 3, u and every z that is not redrawn are the same values.

    A redrawn z is a new draw each time, and no two rows share one.
    """
    model = make(levels=2, size=32)
    x = noise_images(2, size=32)
    decoded = {"u": inputs_of(model.p_y), "z_1": inputs_of(model.p_x[0]),
               "z_2": inputs_of(model.p_x[1])}
    assert_images(model.vary(x, redrawn, 3).flatten(0, 1), (6, 3, 32, 32))
    for name, calls in decoded.items():
        z = calls[0][-1].unflatten(0, (2, 3))
        assert torch.equal(z[:, 0], z[:, 1]) == (name not in redrawn)
        assert not torch.equal(z[0], z[1])
