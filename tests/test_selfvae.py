"""selfvae.py against closed forms: the transformations, K = 0 (a VAE), the K-level bound, samples.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform
noise (`noise_images`).
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, MultivariateNormal, Normal

import selfvae
import vae
from common import (
    Batches,
    UserError,
    bits_per_dim,
    from_uint8,
    log_mean_exp,
    mean_terms,
    psnr,
    quantize,
    to_uint8,
)
from conftest import count, seeded
from selfvae import Config, SelfVAE, downscale, gaussian


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(
        selfvae.WIDTHS,
        "small",
        dict(
            q_u=(8, 1),
            p_y=(8, 1),
            flow=(4, 1),
            q_z=(8, 1),
            p_z=((8, 1), (4, 1)),
            p_x=((8, 1), 8, (4, 1)),
        ),
    )
    torch.manual_seed(0)


def noise_images(count, channels=3, size=16):
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def halved(y):
    """d = downscaling, of images in [-1, 1]."""
    return from_uint8(downscale(to_uint8(y).int()))


def make(levels=1, channels=3, size=16, prior="realnvp", transform="downscale"):
    model = SelfVAE(
        Config(levels=levels, prior=prior, transform=transform, small=True), (channels, size, size)
    )
    model.initialize(noise_images(4, channels, size))
    return model


def inputs_of(module):
    """A list that fills with the positional inputs of each call of `module`."""
    calls = []
    module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    return calls


# ---- The transformations d
def pixels(*rows):
    """Rows of grey levels -> (1, 1, H, W)."""
    return torch.tensor(rows).view(1, 1, len(rows), -1)


@pytest.mark.parametrize(
    "block, level",
    [
        ([0, 0, 0, 0], 0),
        ([255, 255, 255, 255], 255),
        ([10, 20, 30, 40], 25),
        ([0, 0, 0, 1], 0),
        ([0, 0, 0, 2], 1),
        ([0, 0, 1, 2], 1),
        ([1, 2, 1, 2], 2),
        ([2, 3, 2, 3], 3),
        ([255, 255, 255, 253], 255),
        ([255, 255, 255, 252], 254),
        ([0, 0, 255, 255], 128),
    ],
)
def test_downscale_by_hand(block, level):
    """The mean of 2x2 pixels, half rounded up:

    1.5 -> 2, 2.5 -> 3, 0.5 -> 1, 254.5 -> 255, 0.25 -> 0, 127.5 -> 128.
    """
    assert downscale(torch.tensor(block).view(1, 1, 2, 2)).item() == level


def test_downscale_is_exact():
    """Integers: (sum of the 2x2 levels + 2) // 4, for 12,000 random blocks, each at its place."""
    levels = np.random.default_rng(0).integers(0, 256, (1000, 3, 4, 4))
    sums = levels.reshape(1000, 3, 2, 2, 2, 2).sum((3, 5))
    assert np.array_equal(downscale(torch.tensor(levels)).numpy(), (sums + 2) // 4)


@pytest.mark.parametrize(
    "rgb, level",
    [
        ((255, 0, 0), 76),
        ((0, 255, 0), 150),
        ((0, 0, 255), 29),
        ((255, 255, 255), 255),
        ((1, 0, 0), 0),
        ((0, 1, 0), 1),
        ((10, 20, 30), 18),
        ((0, 0, 0), 0),
    ],
)
def test_grayscale_by_hand(rgb, level):
    """0.299 R + 0.587 G + 0.114 B:

    76.245, 149.685, 29.07, 255, 0.299, 0.587, 2.99 + 11.74 + 3.42 = 18.15, 0.
    """
    grey = selfvae.grayscale(torch.tensor(rgb).view(1, 3, 1, 1))
    assert grey.shape == (1, 1, 1, 1) and grey.item() == level and selfvae.grayscale(grey) is grey


def test_edges_by_hand():
    """Differences of the neighbours, at the border of the border pixel:

    a column of 30 and a row of 40 cross at 50.
    """
    a = pixels([0, 0, 0, 0], [0, 0, 0, 0], [40, 40, 40, 40], [40, 40, 40, 40]) + pixels(
        *[[0, 0, 30, 30]] * 4
    )
    assert selfvae.edges(a).tolist() == [
        [[[0, 30, 30, 0], [40, 50, 50, 40], [40, 50, 50, 40], [0, 30, 30, 0]]]
    ]
    assert selfvae.edges(pixels([0, 9, 1, 1])).tolist() == [[[[9, 1, 8, 0]]]]
    assert selfvae.edges(pixels([0, 255], [255, 255])).tolist() == [
        [[[255, 255], [255, 0]]]
    ]  # 255 √2, but no level is above 255
    assert selfvae.edges(pixels([0, 2], [3, 0])).tolist() == [
        [[[4, 3], [4, 4]]]
    ]  # √13, √8; √18, √13


def test_posterize_by_hand():
    """The two high bits, spread over the range."""
    assert selfvae.posterize(pixels([0, 63, 64, 127, 128, 191, 192, 255])).tolist() == [
        [[[0, 0, 85, 85, 170, 170, 255, 255]]]
    ]


def test_sketch_by_hand():
    """One pixel of 100 on 200:

    its inverse is 155 on 55, of which the blur keeps 70/256 a side in the middle.
    """
    a = torch.full((1, 1, 17, 17), 200)
    a[..., 8, 8] = 100
    y = selfvae.sketch(a)
    middle, beside, corner = (
        55 + 100 * (70 / 256) ** 2,
        55 + 100 * 70 * 56 / 256**2,
        55 + 100 * (56 / 256) ** 2,
    )  # 62.48, 60.98, 59.79
    assert (round(middle), round(beside), round(corner)) == (62, 61, 60)
    assert y[0, 0, 8, 8] == 255 * 101 // (256 - 62) == 132  # darker than around it: a line
    assert y[0, 0, 8, 9] == min(255, 255 * 201 // (256 - 61)) == 255  # lighter than the blur: paper
    assert (y == 255).sum() == 17 * 17 - 1
    assert (selfvae.sketch(pixels([0] * 9)) == 255).all() and (
        selfvae.sketch(pixels([77] * 9)) == 255
    ).all()  # flat is white


def test_sketch_blurs_with_the_edge_repeated():
    """Left of a step from 10 to 250 at columns 5 | 6:

    b's weights right of it, Σ_{i ≥ d} C(8, i) / 256, at distance d.
    """
    a = torch.tensor([10] * 6 + [250] * 6).expand(1, 1, 3, 12)
    right = [0, 0, 1, 9, 37, 93]  # of 256, for columns 0 … 5: the last i of 1 8 28 56 70 …
    b = [(245 * (256 - r) + 5 * r) / 256 for r in right]
    expected = [min(255, 255 * 11 // (256 - math.floor(v + 0.5))) for v in b]
    assert (
        selfvae.sketch(a)[0, 0, 1, :6].tolist() == expected
        and expected[0] == 255
        and expected[5] == 28
    )


def test_sketch_of_noise_and_of_colours():
    """One rounding, after both sides, by a float64 convolution.

    A colour image is sketched from its luma.
    """
    colours = torch.randint(0, 256, (2, 3, 20, 20))
    a = selfvae.grayscale(colours)
    weights = torch.tensor([math.comb(8, i) for i in range(9)]).double()
    kernel = torch.outer(weights, weights).view(1, 1, 9, 9) / 2**16
    b = (
        (
            torch.nn.functional.conv2d(
                torch.nn.functional.pad(255.0 - a.double(), (4,) * 4, mode="replicate"), kernel
            )
            + 0.5
        )
        .floor()
        .long()
    )
    expected = (255 * (a + 1) // (256 - b)).clamp(max=255)
    assert torch.equal(selfvae.sketch(colours), expected) and torch.equal(
        selfvae.sketch(a), expected
    )


@pytest.mark.parametrize("name", selfvae.TRANSFORMS)
def test_transformations_are_exact(name):
    """Levels in 0 … 255, the same alone, in a batch, in channels_last and under autocast.

    Made of integers, but for `edges`.
    """
    d, model_input = selfvae.TRANSFORMS[name][0], torch.randint(
        256, (5, 3, 16, 16), dtype=torch.int32
    )
    y = d(model_input)
    assert y.min() >= 0 and y.max() <= 255 and y.dtype == torch.int32 and y.shape[0] == 5
    assert torch.equal(y, torch.cat([d(x[None]) for x in model_input]))
    assert torch.equal(y, d(model_input.contiguous(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, d(model_input))


def test_the_float_in_edges_cannot_tip_over():
    """Every sum of two squares of level differences gives what exact integer arithmetic gives, even
    if its root is off by 2e-5.
    """
    squared = torch.arange(256)
    squared = (squared[:, None] ** 2 + squared**2).unique()
    exact = torch.tensor(
        [(math.isqrt(4 * n) + 1) // 2 for n in squared.tolist()]
    )  # round(√n) = floor((floor(2√n) + 1) / 2)
    for error in (-2e-5, 0, 2e-5):
        root = (squared.float().sqrt() + error).round().int()
        assert torch.equal(root.clamp(max=255), exact.int().clamp(max=255))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("sketch", (1, 32, 32)),
        ("grayscale", (1, 32, 32)),
        ("edges", (1, 32, 32)),
        ("posterize", (3, 32, 32)),
    ],
)
def test_networks_take_their_shapes_from_d(name, shape):
    """K = 1 on 32x32 RGB with y of its own channels and size:

    the bound is finite, y is what was drawn, x has three channels.
    """
    model, x = make(size=32, transform=name), noise_images(2, size=32)
    y, terms = model.representations(x), model.terms(x)
    assert model.shapes == {1: shape, 2: (3, 32, 32)} and y[1].shape == (2, *shape) and y[2] is x
    assert torch.equal(to_uint8(y[1]).int(), selfvae.TRANSFORMS[name][0](to_uint8(x).int()))
    assert all(values.isfinite().all() for values in terms.values()) and list(terms) == NAMES[1]
    drawn = model.decode({}, 2)[0]
    assert_images(drawn["y_1"], (2, *shape))
    assert_images(drawn["y_2"], (2, 3, 32, 32))


@pytest.mark.parametrize("name", ["sketch", "grayscale", "edges", "posterize"])
def test_what_cannot_be_repeated_says_so(name):
    with pytest.raises(
        UserError, match=f"--transform {name} cannot be applied 2 times: take --levels 1"
    ):
        SelfVAE(Config(levels=2, transform=name, small=True), (3, 32, 32))


def test_grayscale_of_grey_images_is_refused():
    """y would be x, and K = 1 describe it twice."""
    with pytest.raises(UserError, match="grayscale leaves grey images as they are"):
        SelfVAE(Config(transform="grayscale", small=True), (1, 32, 32))


def test_a_transformation_is_one_function_and_one_entry(monkeypatch):
    """A toy d, red and green at a quarter of the side, stacked twice:

    networks, bound, images and every operation follow.
    """
    monkeypatch.setitem(
        selfvae.TRANSFORMS, "toy", (lambda y: y[:, : max(1, y.shape[1] - 1), ::2, ::2], 2, False)
    )
    model, x = make(levels=2, size=32, transform="toy"), noise_images(2, size=32)
    assert model.shapes == {1: (1, 8, 8), 2: (2, 16, 16), 3: (3, 32, 32)}
    assert torch.equal(model.representations(x)[1], x[:, :1, ::4, ::4])
    assert (
        list(model.terms(x)) == NAMES[2]
        and model.elbo(x).isfinite().all()
        and model.log_weights(x, 2).isfinite().all()
    )
    for operation in model.operations:
        assert_images(model.reconstruct(x, operation=operation), (2, 3, 32, 32))


def test_representations_are_the_chain_of_downscalings():
    """K = 3, 64 pixels: y_4 = x, then 32, 16, 8; each the downscaling of the one above.

    A flat image stays what it is.
    """
    model, x = make(levels=3, size=64), noise_images(2, size=64)
    y = model.representations(x)
    assert {k: y_k.shape[-1] for k, y_k in y.items()} == {4: 64, 3: 32, 2: 16, 1: 8} and y[4] is x
    assert all(
        torch.equal(y[k], halved(y[k + 1])) and torch.equal(y[k], quantize(y[k])) for k in (1, 2, 3)
    )
    flat = from_uint8(torch.full((1, 3, 64, 64), 77))
    assert torch.equal(model.representations(flat)[1], flat[..., :8, :8])


# ---- Networks ------------------------------------------------------------------------------------
def test_parameter_counts_are_those_of_the_released_code():
    """K = 1 on 32x32 RGB, factor by factor, as traced in the predecessor's code."""
    with torch.device("meta"):
        model = SelfVAE(Config(levels=1), (3, 32, 32))
    assert {name: count(part) for name, part in model.named_children() if name != "p_u"} == {
        "q_u": 3_934_912,
        "p_y": 4_354_140,
        "q_z": 3_027_986,
        "p_z": 6_428_516,
        "p_x": 10_115_140,
    }


@pytest.mark.parametrize(
    "levels, size, transform",
    [
        (0, 32, "downscale"),
        (1, 32, "downscale"),
        (2, 32, "downscale"),
        (0, 64, "downscale"),
        (1, 64, "downscale"),
        (2, 64, "downscale"),
        (1, 32, "sketch"),
        *((1, 64, name) for name in ("sketch", "grayscale", "edges", "posterize")),
    ],
)
def test_paper_size_has_32_to_42_million_parameters(levels, size, transform):
    """The range of the models in the paper, at every size, depth and transformation."""
    with torch.device("meta"):
        model = SelfVAE(Config(levels=levels, transform=transform), (3, size, size))
        assert 32e6 < count(model) < 42e6
        assert levels or count(model) == count(vae.VAE(vae.Config(), (3, size, size)))


def test_decoder_is_given_y_upsampled_bilinearly():
    """A row 0, 1, 0, 1 … of y becomes 0, 0.25, 0.75, 0.75, 0.25 …:

    the last channels beside what p(x|y, z) makes of z.
    """
    p_x = make(channels=1).p_x[0]
    joint, y = inputs_of(p_x.joint), torch.tensor([0.0, 1.0]).repeat(4).expand(1, 1, 8, 8)
    p_x(y, torch.randn(1, 16, 8, 8))
    torch.testing.assert_close(
        joint[0][0][0, -1, 3, :5], torch.tensor([0.0, 0.25, 0.75, 0.75, 0.25])
    )


@pytest.mark.parametrize("transform", ["downscale", "grayscale", "posterize", "sketch", "edges"])
def test_a_decoder_without_output_gives_y_back_where_y_is_a_coarse_x(transform):
    """Network output 0: the mean of p(x|y, z) is the enlarged y, in every channel.

    For sketch and edges it is 0, mid-grey.
    """
    model, x = make(size=32, transform=transform), noise_images(2, size=32)
    y, last = model.representations(x)[1], model.p_x[0].joint[-1]
    with torch.no_grad():
        last.parametrizations.weight.original0.zero_()
        last.bias.zero_()
        mean = model.p_x[0](y, torch.randn(2, 16, 8, 8)).mean
    coarse = F.interpolate(y, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    expected = torch.zeros_like(coarse) if transform in ("sketch", "edges") else coarse
    torch.testing.assert_close(mean, expected, atol=1.01 / 255, rtol=0)


NAMES = {
    0: ["kl_u", "re_x"],
    1: ["kl_u", "re_y_1", "kl_z_1", "re_x"],
    2: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_x"],
    3: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_y_3", "kl_z_3", "re_x"],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_terms_and_shapes(levels, channels):
    """2K + 2 terms, by level; every latent is (16, 8, 8), every image's side doubles."""
    model, x = make(levels, channels, size=64), noise_images(2, channels, size=64)
    terms = model.terms(x)
    assert list(terms) == NAMES[levels]
    assert all(values.shape == (2,) and values.isfinite().all() for values in terms.values())
    assert all(
        (values > 0).all()
        for name, values in terms.items()
        if name[:3] in ("re_", "kl_") and name != "kl_u"
    )
    torch.testing.assert_close(seeded(model.elbo, x), -sum(seeded(model.terms, x).values()))
    z, y = torch.randn(2, 16, 8, 8), model.representations(x)
    for k in range(1, levels + 1):
        assert model.q_z[k - 1](y[k + 1]).shape == (2, 32, 8, 8)
        assert model.p_z[k - 1](y[k], z).mean.shape == (2, 16, 8, 8)
        p_x = model.p_x[k - 1](y[k], z)
        assert p_x.mean.shape == y[k + 1].shape
        assert p_x.means.shape == (2, channels, 10, *y[k + 1].shape[2:])


@pytest.mark.parametrize("size, levels, left", [(8, 1, 4), (32, 3, 4), (64, 4, 4), (32, 7, 0)])
def test_too_many_levels_are_refused(size, levels, left):
    """Every y has at least 8 pixels a side."""
    with pytest.raises(
        UserError, match=f"--levels {levels} leaves y_1 {left} pixels a side, and 8 are the least"
    ):
        SelfVAE(Config(levels=levels, small=True), (3, size, size))


def test_sizes_that_do_not_halve_to_8_are_refused():
    """48 is 6 times 8, no power of two."""
    with pytest.raises(UserError, match="size 48 does not halve"):
        SelfVAE(Config(levels=1, small=True), (3, 48, 48))


# ---- K = 0 ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("prior", ["normal", "realnvp"])
def test_without_levels_it_is_the_vae(monkeypatch, prior):
    """q_u, p_u, p_y are the VAE's q_z, p_z, p_x:

    same weights and noise, same bound, weights and images.
    """
    plain, x = vae.VAE(vae.Config(prior=prior, small=True), (3, 32, 32)), noise_images(2, size=32)
    plain.initialize(x)
    model = SelfVAE(Config(levels=0, prior=prior, small=True), (3, 32, 32))
    renamed = {"q_z": "q_u", "p_z": "p_u", "p_x": "p_y"}
    model.load_state_dict(
        {renamed[name[:3]] + name[3:]: values for name, values in plain.state_dict().items()}
    )
    ours, theirs = seeded(model.terms, x), seeded(plain.terms, x)
    torch.testing.assert_close(ours, {"kl_u": theirs["kl_z"], "re_x": theirs["re_x"]})
    torch.testing.assert_close(seeded(model.log_weights, x, 3), seeded(plain.log_weights, x, 3))
    assert torch.equal(seeded(model.sample, 2), seeded(plain.sample, 2))
    assert torch.equal(seeded(model.reconstruct, x), seeded(plain.reconstruct, x))


# ---- The bound -----------------------------------------------------------------------------------
# A model with known log p(x), K = 1, 16x16 grey pixels. At each of the 8x8 places of u, one pixel y
# of y_1 = d(x), 4 pixels
# x_i of x and 4 values z_i; what is left of u and z has q = p = N(0, 1):
#
# u ~ N(0, 1)     y|u ~ N(u, 0.5²)     z_i|y,u ~ N(0.7 y + c·u, 1)     x_i|y,z ~ N(y + z_i, 0.4²)
# u|y ~ N(0.8 y, 0.2)     z_i|x,y ~ N(0.16 (0.7 + 0.8 c) y + x_i - y, 0.16) / 1.16 in mean and
# variance, if c = 0
#
# With c = 0 the posterior is a product q(u|y) q(z|x) and the bound is tight. Else u and z depend on
# each other a posteriori.


class Stub(torch.nn.Module):
    """A factor that is a given function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def latent(mean, variance):
    """μ (B, n, 8, 8) and one σ² for the first n channels of a latent, N(0, 1) for the others ->
    input of `gaussian`.
    """
    zeros = torch.zeros(len(mean), 16 - mean.shape[1], 8, 8)
    return torch.cat([mean, zeros, torch.full_like(mean, math.log(variance)), zeros], 1)


class StubPrior(Stub):
    """A p(z|y, u) that is a given function of y and u."""

    def from_y(self, y):
        return y

    def given(self, h, z):
        return self.function(h, z)


def four(x):
    """The four pixels of each place as channels: (B, 1, 16, 16) -> (B, 4, 8, 8)."""
    return F.pixel_unshuffle(x, 2)


def upscale(y):
    """Each pixel four times: (B, 1, 8, 8) -> (B, 1, 16, 16)."""
    return F.interpolate(y, scale_factor=2)


def normal(mean, sd):
    """N(mean, sd²) of an image, in place of a mixture."""
    return Independent(Normal(mean, sd), 3)


def linear_gaussian(monkeypatch, c):
    """-> the model, x (3, 1, 16, 16), log p(x) = log p(x, d(x))"""
    model = make(levels=1, channels=1, prior="normal")
    x = noise_images(3, channels=1)
    monkeypatch.setattr(selfvae, "Dmol", lambda u: normal(u[:, :1], 0.5))

    def q_z(x):
        mean = (0.16 * (0.7 + 0.8 * c) * halved(x) + four(x) - halved(x)) / 1.16
        return latent(mean, 0.16 / 1.16)

    def p_z(y, u):
        return gaussian(latent((0.7 * y + c * u[:, :1]).expand(-1, 4, -1, -1), 1.0))

    def p_x(y, z):
        return normal(upscale(y) + F.pixel_shuffle(z[:, :4], 2), 0.4)

    model.q_u = Stub(lambda y: latent(0.8 * y, 0.2))
    model.p_y = torch.nn.Identity()
    model.q_z[0] = Stub(q_z)
    model.p_z[0] = StubPrior(p_z)
    model.p_x[0] = Stub(p_x)
    y = halved(x)
    # Of p(x_1 … x_4|y): z_i and u are integrated out.
    mean = ((1.7 + 0.8 * c) * y).movedim(1, -1).expand(-1, -1, -1, 4)
    covariance = 1.16 * torch.eye(4) + 0.2 * c**2
    log_p_x = MultivariateNormal(mean, covariance).log_prob(four(x).movedim(1, -1)).sum((1, 2))
    log_p_y = Normal(0.0, math.sqrt(1.25)).log_prob(y).sum((1, 2, 3))
    return model, x, log_p_x + log_p_y


def test_with_exact_posteriors_every_weight_is_p_of_x(monkeypatch):
    """log w = log p(x) whatever u and z are drawn.

    The ELBO too, but for the noise that a closed-form KL does not cancel.
    """
    model, x, log_p = linear_gaussian(monkeypatch, c=0.0)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=5e-3, rtol=0)
    elbo = model.elbo(x.repeat(400, 1, 1, 1)).view(400, 3)
    torch.testing.assert_close(elbo.mean(0), log_p, atol=4 * elbo.std().item() / 20, rtol=0)


def test_bounds_order_and_tighten(monkeypatch):
    """u and z_1 dependent, c = 0.4:

    E[elbo] = E[log w] < bound of S = 8 < of 64 < log p(x), and S = 6,400 reaches it.
    """
    model, x, log_p = linear_gaussian(monkeypatch, c=0.4)
    log_w = model.log_weights(x, 6400)
    bound = {S: log_mean_exp(log_w.view(-1, S, 3), 1).mean(0) for S in (1, 8, 64)}
    elbo = model.elbo(x.repeat(1000, 1, 1, 1)).view(1000, 3)
    torch.testing.assert_close(
        elbo.mean(0), bound[1], atol=4 * elbo.std(0).max().item() / math.sqrt(1000), rtol=0
    )
    assert (
        (bound[1] + 0.3 < bound[8]).all()
        and (bound[8] + 0.1 < bound[64]).all()
        and (bound[64] < log_p).all()
    )
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.4, rtol=0)


def test_kl_z_is_the_kl(no_noise):
    """Closed form against the mean of log q(z_1|x) - log p(z_1|y, u) over 2,000 draws, within 4
    standard errors; and ≥ 0.
    """
    model, x = make(), noise_images(2)
    with torch.no_grad():
        for p in model.p_z.parameters():
            p.add_(0.1 * torch.randn_like(p))
        kl, y = model.terms(x)["kl_z_1"], halved(x)
        posterior = gaussian(model.q_z[0](x))
        prior = model.p_z[0](y, gaussian(model.q_u(y)).mean)
        z = posterior.mean + posterior.stddev * torch.randn(2000, *posterior.mean.shape)
        log_ratio = posterior.log_prob(z) - prior.log_prob(z)
    assert (kl > 1).all()
    assert ((log_ratio.mean(0) - kl).abs() < 4 * log_ratio.std(0) / math.sqrt(2000)).all()


def test_one_draw_of_u_serves_every_term():
    """u is that of p_y in kl_u too, and kl_z_1 reaches it:

    through p(z_1|y_1, u) the encoder of y_1 learns what z_1 needs.
    """
    model, x, seen = make(), noise_images(2), []
    model.p_y.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    terms, q_u = model.terms(x), gaussian(model.q_u(halved(x)))
    torch.testing.assert_close(
        terms["kl_u"], q_u.log_prob(seen[-1]) - model.p_u.log_prob(seen[-1]), atol=1e-2, rtol=1e-5
    )
    (gradient,) = torch.autograd.grad(terms["kl_z_1"].sum(), seen[-1])
    assert gradient.abs().max() > 0


def test_log_weights_average_to_the_elbo():
    """K = 2, 32 pixels: the two write the same bound differently, and agree within 4 standard
    errors over 200 draws.
    """
    model, x = make(levels=2, size=32), noise_images(1, size=32)
    with torch.no_grad():
        for p in [*model.p_u.parameters(), *model.p_z.parameters(), *model.q_z.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        log_w, elbo = model.log_weights(x, 200)[:, 0], model.elbo(x.expand(200, -1, -1, -1))
    error = math.sqrt((log_w.var() + elbo.var()).item() / 200)
    assert abs(log_w.mean() - elbo.mean()).item() < 4 * error and error < 10


@pytest.mark.parametrize("k", [1, 2])
def test_every_kl_is_in_the_bound(no_noise, k):
    """Widening q(z_k|y_{k+1}) raises kl_z_k and, as z_k's mean is the same, nothing else.

    The ELBO falls by just that.
    """
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    before, elbo = model.terms(x), model.elbo(x)
    with torch.no_grad():
        model.q_z[k - 1][-1].bias[16:] += 1  # log σ²
    after = model.terms(x)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"kl_z_{k}"]
    rise = after[f"kl_z_{k}"] - before[f"kl_z_{k}"]
    assert (rise > 10).all()
    torch.testing.assert_close(elbo - model.elbo(x), rise, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "bound", [SelfVAE.terms, lambda model, x: model.log_weights(x, 1)], ids=["terms", "log_weights"]
)
def test_each_factor_sees_what_it_should(no_noise, bound):
    """K = 2: q(u|y_1), q(z_k|y_{k+1}), p(z_k|y_k, z_{k-1}), p(y_{k+1}|y_k, z_k), with z_0 = u."""
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    y, mean = model.representations(x), lambda network, x: gaussian(network(x)).mean
    z = [mean(model.q_u, y[1]), mean(model.q_z[0], y[2]), mean(model.q_z[1], x)]
    expected = {
        model.q_u: [y[1]],
        model.p_y: [z[0]],
        model.q_z[0]: [y[2]],
        model.q_z[1]: [x],
        model.p_z[0].from_y: [y[1]],
        model.p_z[0].from_z: [z[0]],
        model.p_x[0]: [y[1], z[1]],
        model.p_z[1].from_y: [y[2]],
        model.p_z[1].from_z: [z[1]],
        model.p_x[1]: [y[2], z[2]],
    }
    calls = {module: inputs_of(module) for module in expected}
    bound(model, x)
    for module, inputs in expected.items():
        assert len(calls[module]) == 1
        torch.testing.assert_close(list(calls[module][0]), inputs)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_log_weights_are_those_of_the_formula(levels, no_noise):
    """Without noise: the sum of all factors' log-probabilities, by `decode` and `infer`."""
    model, x = make(levels, size=32), noise_images(2, size=32)
    known, q = model.infer(x, [*model.operations["reconstruct_2"], f"y_{levels + 1}"])
    _, p = model.decode(known, 2)
    expected = 0
    for name, value in known.items():
        expected = expected + p[name].log_prob(value)
        if name in q:
            expected = expected - q[name].log_prob(value)
    torch.testing.assert_close(model.log_weights(x, 1)[0], expected, atol=2e-2, rtol=1e-5)


def test_log_weights_are_drawn_anew():
    """Each sample has its own u and z."""
    log_w = make(levels=2, size=32).log_weights(noise_images(2, size=32), 5)
    assert log_w.shape == (5, 2) and log_w.std(0).min() > 1e-2


def test_log_weights_encode_once():
    """x and every y pass their encoders once, however many samples."""
    model = make(levels=2, size=32)
    calls = [inputs_of(m) for m in (model.q_u, *model.q_z, *(p_z.from_y for p_z in model.p_z))]
    model.log_weights(noise_images(2, size=32), 9)
    assert [len(c) for c in calls] == [1] * 5


def test_bf16_networks_give_fp32_terms():
    """Under autocast the networks round, likelihoods and KLs do not:

    terms are fp32, the ELBO moves by less than 2 %.
    """
    model, x = make(), noise_images(2)
    fp32 = seeded(model.terms, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_z[0](x).dtype == torch.bfloat16
        bf16 = seeded(model.terms, x)
    assert all(values.dtype == torch.float32 for values in bf16.values())
    torch.testing.assert_close(sum(bf16.values()), sum(fp32.values()), rtol=0.02, atol=0)


def test_initialisation_lives_in_the_state_dict():
    """A model built anew and loaded gives the same terms, with nothing left to initialise.

    One image is enough for it.
    """
    model, x = SelfVAE(Config(small=True), (3, 16, 16)), noise_images(1)
    model.initialize(x)
    fresh = SelfVAE(Config(small=True), (3, 16, 16))
    assert not torch.allclose(seeded(model.elbo, x), seeded(fresh.elbo, x))
    fresh.load_state_dict(model.state_dict())
    terms = seeded(model.terms, x)
    torch.testing.assert_close(terms, seeded(fresh.terms, x))
    assert all(values.isfinite().all() for values in terms.values())


# ---- Images --------------------------------------------------------------------------------------
def assert_images(x, shape):
    """Of that shape, in [-1, 1], on the 256-level grid."""
    assert x.shape == shape and x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)


OPERATIONS = [
    "generate",
    "conditional_generate",
    "conditional_reconstruct",
    "reconstruct_1",
    "reconstruct_2",
]


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("mean", [False, True])
def test_images_are_images(levels, mean):
    """Shapes and grid of x, of every y on the way and of all five operations, drawn or means."""
    model, x = make(levels, channels=1, size=32), noise_images(2, channels=1, size=32)
    values, factors = model.decode({}, 3, mean=mean)
    assert len(values) == 2 * levels + 2 and values.keys() == factors.keys()
    for k in range(1, levels + 2):
        side = 32 >> (levels + 1 - k)
        assert_images(values[f"y_{k}"], (3, 1, side, side))
    again, _ = seeded(model.decode, {}, 3, mean=mean)
    assert torch.equal(seeded(model.sample, 3, mean=mean), again[f"y_{levels + 1}"])
    assert list(model.operations) == OPERATIONS
    for operation in OPERATIONS:
        assert_images(model.reconstruct(x, mean, operation), (2, 1, 32, 32))


def test_generation_is_ancestral():
    """Each y that is drawn is what the next level is given. d(x) need not be y again:

    p(x|y, z) is free to ignore y.
    """
    model = make(levels=2, size=32)
    p_z, p_x = [inputs_of(m.from_y) for m in model.p_z], [inputs_of(m) for m in model.p_x]
    values, _ = model.decode({}, 2)
    for k in (1, 2):
        assert torch.equal(p_z[k - 1][0][0], values[f"y_{k}"])
        assert torch.equal(p_x[k - 1][0][0], values[f"y_{k}"])
    assert not torch.equal(halved(values["y_3"]), values["y_2"])


def test_temperature_scales_the_noise_of_u_and_z():
    """p(u) = N(0, 1): u has sd T.

    At T = 0, z_1 is the mean of p(z_1|y_1, u), and two images from one u and y_1 are equal.
    """
    model = make(prior="normal")
    with torch.no_grad():
        model.p_z[0].joint[-1].bias[16:] += 2  # log σ²: an sd of z_1 far from 1
    u, z = inputs_of(model.p_y), inputs_of(model.p_x[0])
    for temperature in (0.0, 0.5, 1.0):
        values, _ = model.decode({}, 4, temperature, mean=True)
        prior = model.p_z[0](values["y_1"], u[-1][0])
        assert u[-1][0].std().item() == pytest.approx(temperature, rel=0.1)
        noise = (z[-1][1] - prior.mean) / prior.stddev
        assert noise.std().item() == pytest.approx(temperature, rel=0.1, abs=1e-5)


@pytest.mark.parametrize(
    "operation, sent, drawn_z, drawn_y",
    [
        ("generate", [], [0, 1, 2], [1, 2]),
        ("conditional_generate", ["y_2"], [2], []),
        ("conditional_reconstruct", ["y_2", "z_2"], [], []),
        ("reconstruct_1", ["u"], [1, 2], [1, 2]),
        ("reconstruct_2", ["u", "z_1", "z_2"], [], [1, 2]),
    ],
)
def test_operations_know_what_they_should(no_noise, operation, sent, drawn_z, drawn_y):
    """Figure 3 for K = 2, without noise.

    What is not drawn from p has x's own value, what is drawn is p's mean, given the rest.
    Conditional generation knows z_1 and u, for y_2 = d(x) tells them; section 3.3 swaps it with
    conditional reconstruction.
    """
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    of_x = model.representations(x)
    encoders = [model.q_u, *model.q_z]
    inferred = [gaussian(encoder(of_x[k + 1])).mean for k, encoder in enumerate(encoders)]
    decoded = [inputs_of(model.p_y), inputs_of(model.p_x[0]), inputs_of(model.p_x[1])]
    known, q = model.infer(x, sent)
    assert model.operations[operation] == sent and set(q) == set(known) - {"y_1", "y_2"}
    values, _ = model.decode(known, 2, temperature=0.0)
    z = [calls[0][-1] for calls in decoded]
    for k in range(3):
        expected = inferred[k]
        if k in drawn_z and k == 0:
            expected = model.p_u.from_noise(torch.zeros(2, 16, 8, 8))
        elif k in drawn_z:
            expected = model.p_z[k - 1](values[f"y_{k}"], z[k - 1]).mean
        torch.testing.assert_close(z[k], expected)
    assert [k for k in (1, 2) if not torch.equal(values[f"y_{k}"], of_x[k])] == drawn_y


def test_any_mixture_can_be_sent():
    """K = 2: y_1 and z_2 sent. The receiver has u, as y_1 tells it; z_1 and y_2 are drawn."""
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    known, q = model.infer(x, ["y_1", "z_2"])
    assert set(known) == {"u", "y_1", "z_2"} and set(q) == {"u", "z_2"}
    assert torch.equal(known["y_1"], model.representations(x)[1])
    assert_images(model.images(known, 2), (2, 3, 32, 32))


def test_to_send_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="y_3.*z_2|z_2.*y_3"):
        make().infer(noise_images(1), ["u", "z_2", "y_3"])


def test_to_send_everything_costs_the_bound():
    """All latents, y's and x itself:

    the code length Σ log q - log p has the terms of the ELBO, name by name; KLs on average.
    """
    model, x = make(levels=2, size=32), noise_images(1, size=32)
    with torch.no_grad():
        for p in [*model.p_u.parameters(), *model.p_z.parameters(), *model.q_z.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        many = x.expand(200, -1, -1, -1)
        known, q = model.infer(many, ["y_2", "y_3", "z_2"])
        _, p = model.decode(known, 200)
        terms = model.terms(many)
    pairs = {
        "u": "kl_u",
        "y_1": "re_y_1",
        "z_1": "kl_z_1",
        "y_2": "re_y_2",
        "z_2": "kl_z_2",
        "y_3": "re_x",
    }
    assert known.keys() == pairs.keys()
    for name, term in pairs.items():
        nats = -p[name].log_prob(known[name])
        if name in q:
            nats = nats + q[name].log_prob(known[name])
        error = math.sqrt((nats.var() + terms[term].var()) / 200)
        assert abs(nats.mean() - terms[term].mean()) < 4 * error + 1e-3, name


def test_conditional_generation_has_seen_only_y():
    """Two images with the same d(x) give the same x̂ from the same noise.

    Conditional reconstructions differ.
    """
    model, x = make(), noise_images(2)
    flipped = F.pixel_shuffle(
        F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).flip(2).flatten(1, 2), 2
    )  # each 2x2 block reversed
    assert torch.equal(halved(flipped), halved(x)) and not torch.equal(flipped, x)

    def same(operation):
        return torch.equal(
            *(seeded(model.reconstruct, image, operation=operation) for image in (x, flipped))
        )

    assert same("conditional_generate") and same("reconstruct_1") and same("generate")
    assert not same("conditional_reconstruct") and not same("reconstruct_2")


# ---- What is sent --------------------------------------------------------------------------------
def test_eight_bits():
    """At most 256 values between ± the largest of each image, which is kept.

    No value moves by more than half a step.
    """
    z = torch.randn(3, 16, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    rounded = selfvae.eight_bits(z)
    largest = z.abs().amax((1, 2, 3))
    torch.testing.assert_close(rounded.abs().amax((1, 2, 3)), largest)
    assert ((rounded - z).abs().amax((1, 2, 3)) <= largest / 255 * 1.001).all() and not torch.equal(
        z, rounded
    )
    assert all(100 < len(image.unique()) <= 256 for image in rounded)


def test_rates_by_hand(monkeypatch):
    """K = 1 on 32x32 RGB: D = 3,072, y has 768 values, u and z 1,024 each:

    25, 58.3, 33.3 and 66.7 %. Bits against the terms.
    """
    model, x = make(size=32), noise_images(6, size=32)
    batches = Batches(to_uint8(x).permute(0, 2, 3, 1).numpy(), 4, "cpu")
    table = selfvae.rates(Config(device="cpu", dtype="fp32"), model, batches, 3072)
    enlarged = table.pop("bicubic")
    assert enlarged["psnr"] == pytest.approx(
        psnr(selfvae.bicubic(halved(x), x), x).mean().item(), rel=1e-5
    )
    assert (
        enlarged["percent"] == table["conditional_generate"]["percent"]
        and list(table) == OPERATIONS
    )
    assert [round(row["percent"], 1) for row in table.values()] == [0.0, 25.0, 58.3, 33.3, 66.7]
    assert [round(row["raw_bpd"], 2) for row in table.values()] == [0.0, 2.0, 4.67, 2.67, 5.33]
    terms = {name: bits_per_dim(value, 3072) for name, value in mean_terms(model, batches).items()}
    ideal = [
        0.0,
        terms["kl_u"] + terms["re_y_1"],
        terms["kl_u"] + terms["re_y_1"] + terms["kl_z_1"],
        terms["kl_u"],
    ]
    assert [row["ideal_bpd"] for row in table.values()][:4] == pytest.approx(ideal, abs=0.02)
    assert all(
        5 < row[name] < 30 for row in table.values() for name in ("psnr", "psnr_8bit", "psnr_mean")
    )
    assert (
        table["generate"]["psnr"]
        == table["generate"]["psnr_8bit"]
        != table["generate"]["psnr_mean"]
    )


def test_bicubic_by_hand():
    """Far from an edge a ramp of 4 levels a pixel becomes one of 2.

    Beside a step it overshoots, but not out of range.
    """
    y = from_uint8((4 * torch.arange(16) + 100).expand(1, 1, 16, 16))
    x = to_uint8(selfvae.bicubic(y, torch.empty(1, 1, 32, 32)))[0, 0, 5, 8:24].int()
    assert torch.equal(x, 2 * torch.arange(8, 24, dtype=torch.int32) + 99)
    step = from_uint8(torch.tensor([100] * 8 + [150] * 8).expand(1, 1, 16, 16))
    x = to_uint8(selfvae.bicubic(step, torch.empty(1, 1, 32, 32)))
    assert x.min() < 100 and x.max() > 150
    step = from_uint8(torch.tensor([0] * 8 + [255] * 8).expand(1, 1, 16, 16))
    assert_images(selfvae.bicubic(step, torch.empty(1, 1, 32, 32)), (1, 1, 32, 32))


# ---- Latent space --------------------------------------------------------------------------------
@pytest.mark.parametrize("base", [False, True])
def test_interpolation_in_u_or_its_base(base):
    """From the mean of q(u|y_1) of one image to that of the other, straight in u, or in v = f⁻¹(u);
    its ends are the same.
    """
    model, x = make(), noise_images(4)
    with torch.no_grad():
        for p in model.p_u.parameters():
            p.add_(0.1 * torch.randn_like(p))
        u, p_x = inputs_of(model.p_y), inputs_of(model.p_x[0])
        images = model.interpolate(x[:2], x[2:], 5, base=base)
        y, z = p_x[0]
        torch.testing.assert_close(z, model.p_z[0](y, u[0][0]).mean)  # no noise in z_1
        assert_images(images.flatten(0, 1), (10, 3, 16, 16))
        ends = gaussian(model.q_u(halved(x))).mean
        path = u[0][0].unflatten(0, (2, 5))
        torch.testing.assert_close(
            path[:, [0, -1]], ends.unflatten(0, (2, 2)).transpose(0, 1), atol=1e-4, rtol=1e-4
        )
        line = model.p_u.flow(path[0])[0] if base else path[0]
        other = path[0] if base else model.p_u.flow(path[0])[0]
    torch.testing.assert_close(
        line[1:] - line[:-1], (line[-1:] - line[:1]).expand(4, -1, -1, -1) / 4, atol=1e-5, rtol=1e-3
    )
    assert not torch.allclose(
        other[1:] - other[:-1],
        (other[-1:] - other[:1]).expand(4, -1, -1, -1) / 4,
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("redrawn", [["z_1", "z_2"], ["z_1"], ["z_2"]])
def test_variations_share_the_other_latents(redrawn):
    """K = 2: in a row of 3, u and every z not redrawn are the same values.

    A redrawn z is a new draw each time.
    """
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    inputs = [inputs_of(model.p_y), inputs_of(model.p_x[0]), inputs_of(model.p_x[1])]
    assert_images(model.vary(x, redrawn, 3).flatten(0, 1), (6, 3, 32, 32))
    for name, calls in zip(["u", "z_1", "z_2"], inputs):
        z = calls[0][-1].unflatten(0, (2, 3))
        assert torch.equal(z[:, 0], z[:, 1]) == (name not in redrawn)
        assert not torch.equal(z[0], z[1])
