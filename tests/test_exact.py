"""--exact: a probability over the images whose d is y, its draws, and the models that have it."""

import itertools
import math
from functools import partial

import pytest
import selfvae
import torch
import torch.nn as nn
from common import Dmol, dmol_channels, from_uint8, quantize, to_uint8
from conftest import narrow_networks
from selfvae import (
    INTERVALS, TRANSFORMS, Config, InTurn, SelfVAE, Uniform, dense_blocks, downscale,
    downscale_interval, grayscale_interval, image_of_pixels, pixels_of_blocks, posterize_interval)

COARSE = ["downscale", "grayscale", "posterize"]


def feasible_blocks(y):
    """All 2x2 blocks of pixel values whose downscaled value is y, for a y near 0 or 255: (N, 4)."""
    values = range(6) if y < 128 else range(249, 256)
    blocks = []
    for block in itertools.product(values, repeat=4):
        if (sum(block) + 2) // 4 == y:
            blocks.append(block)
    return torch.tensor(blocks)


def extreme(params, channels, size, log_scale):
    """Parameters (B, P, H, W) with means up to ±`size` and, if given, this log-scale for all."""
    params = params.unflatten(1, (-1, 10)).clone()
    params[:, 1:1 + channels] = size * params[:, 1:1 + channels].tanh()
    if log_scale is not None:
        params[:, 1 + channels:1 + 2 * channels] = log_scale
    return params.flatten(1, 2)


def in_turn(y, channels=1, size=1.0, log_scale=None):
    """An InTurn given y, pixel values (B, C, h, w), by networks of random weights."""
    def turn(network, h):
        return extreme(network(h), channels, size, log_scale)

    torch.manual_seed(0)
    turns = []
    for before in range(3):
        c_in = 4 + (5 + before) * channels
        network = dense_blocks(c_in, 4, 1, dmol_channels(channels), sd=1.0)
        for conv in network.modules():  # v of sd 0.05 makes functions that are nearly flat
            if isinstance(conv, nn.Conv2d):
                conv.parametrizations.weight.original0.data.mul_(3)
        turns.append(partial(turn, network))
    features = torch.randn(1, 4, *y.shape[2:]).expand(len(y), -1, -1, -1)
    return InTurn(from_uint8(y), features, turns, downscale_interval)


EXTREMES = [(1.0, None), (3.0, -20.0), (3.0, 20.0), (3.0, -3.0), (3.0, 0.0), (30.0, -2.0)]


@torch.no_grad()
@pytest.mark.parametrize("size, log_scale", EXTREMES)
@pytest.mark.parametrize("y, blocks", [(0, 5), (1, 121), (254, 195), (255, 15)])
def test_all_feasible_blocks_sum_to_one(y, blocks, size, log_scale):
    """By the factors of all four pixels, for means far outside and scales at either clamp."""
    values = feasible_blocks(y)
    assert len(values) == blocks
    p = in_turn(torch.full((blocks, 1, 1, 1), y), size=size, log_scale=log_scale)
    log_p = p.log_prob(from_uint8(values.view(-1, 1, 2, 2)))
    assert log_p.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def mixture(interval, y, channels=3, size=1.0, log_scale=None):
    """A Dmol of pixels (1, 1) restricted to those whose d is y (B, C_y, 1, 1)."""
    params = torch.randn(1, dmol_channels(channels), 1, 1, generator=torch.manual_seed(0))
    params = extreme(params, channels, size, log_scale).expand(len(y), -1, -1, -1)
    return Dmol(params, channels, from_uint8(y), partial(interval, y, []))


@pytest.mark.parametrize("size, log_scale", [(1.0, None), (4.0, None), (3.0, -20.0), (3.0, 20.0)])
@pytest.mark.parametrize("y", [0, 7, 130])
def test_all_colours_of_a_grey_sum_to_one(y, size, log_scale):
    """Red, green and blue in turn, each with what the channels before leave of the grey value."""
    values = torch.arange(256)
    red, green = torch.meshgrid(values, values, indexing="ij")
    total = 0.0
    colours = []
    for blue in range(256):
        grey = (299 * red + 587 * green + 114 * blue + 500) // 1000 == y
        colours.append(torch.stack([red[grey], green[grey], torch.full_like(red[grey], blue)], 1))
    for part in torch.cat(colours).split(40_000):
        p = mixture(grayscale_interval, torch.full((len(part), 1, 1, 1), y), 3, size, log_scale)
        total += p.log_prob(from_uint8(part.view(-1, 3, 1, 1))).double().exp().sum().item()
    assert total == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("size, log_scale", EXTREMES)
@pytest.mark.parametrize("k", range(4))
def test_all_values_of_a_poster_sum_to_one(k, size, log_scale):
    """By the values of one channel; k is their two high bits."""
    x = torch.arange(64 * k, 64 * k + 64).view(-1, 1, 1, 1)
    p = mixture(posterize_interval, torch.full_like(x, 85 * k), 1, size, log_scale)
    assert p.log_prob(from_uint8(x)).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


# ---- d and its interval --------------------------------------------------------------------------

def parts(transform, x):
    """What is drawn one after the other given y: the four pixels of every block, or x at once."""
    if transform == "downscale":
        return pixels_of_blocks(x)
    return [x]


@pytest.mark.parametrize("transform", COARSE)
def test_the_interval_holds_the_image(transform):
    """Else a possible image had no probability. (With a wider one the sums above are less than 1.)

    Half of the values here are black or white.
    """
    d, _, _ = TRANSFORMS[transform]
    interval = INTERVALS[transform]
    x = torch.randint(256, (300, 3, 2, 2), generator=torch.manual_seed(0))
    x[150:] = x[150:] // 128 * 255
    images = parts(transform, x)
    for i, image in enumerate(images):
        low, high = interval(d(x), images[:i], image)
        assert (low <= image).all() and (image <= high).all()
        assert (low >= 0).all() and (high <= 255).all()


def test_one_value_beyond_the_interval_has_another_d():
    """The last value of a pixel or block is as free as d leaves it, two bits after downscaling."""
    generator = torch.manual_seed(1)
    x = torch.randint(60, 200, (500, 3, 1, 1), generator=generator)
    grey = selfvae.grayscale(x)
    low, high = grayscale_interval(grey, [], x)
    for blue in (low[:, 2] - 1, high[:, 2] + 1):
        moved = x.clone()
        moved[:, 2] = blue
        assert (selfvae.grayscale(moved) != grey).all()
    pixels = [torch.randint(100, 110, (500, 1, 1, 1), generator=generator) for _ in range(4)]
    y = downscale(image_of_pixels(pixels))
    low, high = downscale_interval(y, pixels[:3], None)
    for last in (low - 1, high + 1):
        assert (downscale(image_of_pixels([*pixels[:3], last])) != y).all()
    assert (high - low == 3).all()


def given(transform, channels=3):
    """p(x|y) of random numbers, and y: for 10,000 pixels of y or more."""
    torch.manual_seed(0)
    if transform == "downscale":
        y = torch.randint(256, (1, channels, 100, 100))
        return in_turn(y, channels), y
    x = torch.randint(256, (1, 3, 100, 100))
    d, _, _ = TRANSFORMS[transform]
    interval = INTERVALS[transform]
    y = d(x)
    params = torch.randn(1, 100, 100, 100)
    return Dmol(params, 3, from_uint8(y), partial(interval, y, [])), y


@torch.no_grad()
@pytest.mark.parametrize("transform", COARSE)
def test_every_draw_and_the_mean_have_this_d(transform):
    """Both lie on the grid. Two draws differ, the mean stays."""
    p, y = given(transform)
    d = TRANSFORMS[transform][0]
    for x in (p.sample(), p.mean):
        assert torch.equal(quantize(x), x)
        assert torch.equal(d(to_uint8(x).int()), y.int())
    assert not torch.equal(p.sample(), p.sample()) and torch.equal(p.mean, p.mean)
    assert p.log_prob(p.sample()).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("transform", COARSE)
def test_an_image_with_another_d_has_no_probability(transform):
    """Its log-probability is -inf, and not NaN, wherever the values differ."""
    p, y = given(transform)
    x = p.sample()
    for place in ((0, 0, 0, 0), (0, 2, 1, 1), (0, 1, -1, -1)):
        broken = x.clone()
        broken[place] = -broken[place].sign()  # to the other edge
        assert p.log_prob(broken).item() == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_an_interval_are_possible_and_their_neighbours_are_not(dtype):
    """Whatever the rounding of the grid: also on one that is computed in float64."""
    y = torch.arange(4).view(4, 1, 1, 1) * 85
    p = Dmol(torch.randn(4, 30, 1, 1, dtype=dtype), 1, None, partial(posterize_interval, y, []))
    low = y // 85 * 64
    for value in (low, low + 63):
        assert p.log_prob(value.to(dtype) / 127.5 - 1).isfinite().all()
    assert (p.log_prob((low - 1).to(dtype) / 127.5 - 1)[1:] == -math.inf).all()
    assert (p.log_prob((low + 64).to(dtype) / 127.5 - 1)[:3] == -math.inf).all()


def test_guesses_lead_to_y():
    """A block's guess has mean y, and whatever is drawn, guess and shifts of the rest complete it.

    A wrong sign would cost bits and fail nothing else.
    """
    y = torch.randint(256, (2, 3, 5, 5), generator=torch.manual_seed(0))
    p = in_turn(y, channels=3)
    torch.testing.assert_close(sum(p.guess) / 4, p.y)
    pixels = [pixel + 0.1 * torch.randn_like(pixel) for pixel in p.guess[:3]]
    for i in range(3):
        shift = p.given(pixels[:i]).shift
        lacking = (sum(p.guess[:i]) - sum(pixels[:i])) / (4 - i)
        torch.testing.assert_close(shift, p.guess[i] + lacking)
        torch.testing.assert_close(sum(pixels[:i]) + shift + sum(p.guess[i + 1:])
                                   + (3 - i) * lacking, 4 * p.y)


@torch.no_grad()
def test_a_pixel_is_told_by_z_by_y_and_by_the_pixels_before():
    """Each changes the numbers of the mixture, in the block itself and in its neighbours."""
    y = torch.randint(100, 150, (1, 1, 6, 6), generator=torch.manual_seed(0))
    p = in_turn(y)
    pixels = list(p.guess[:2])
    plain = p.given(pixels).logits
    other = in_turn(y)
    other.features = other.features + 1
    assert not torch.equal(other.given(pixels).logits, plain)
    for i in range(2):
        moved = [pixel.clone() for pixel in pixels]
        moved[i][..., 3, 3] += 0.2
        changed = (p.given(moved).logits - plain).abs().amax((0, 1)) > 0
        assert changed[3, 3] and changed[3, 2] and changed[2, 3]


def assert_as_often(counts, expected):
    """Chi-square is at most 5 sd above its mean, df + 5 √(2 df)."""
    often = expected > 5
    statistic = ((counts - expected)**2 / expected)[often].sum().item()
    degrees = often.sum().item()
    assert 0 < statistic < degrees + 5 * math.sqrt(2 * degrees)


@torch.no_grad()
@pytest.mark.parametrize("size, log_scale", [(1.0, None), (3.0, -2.0)])
def test_draws_come_as_often_as_they_are_probable(size, log_scale):
    """50,000 blocks of y = 1, 121 kinds."""
    n = 50_000
    values = feasible_blocks(1)
    p = in_turn(torch.full((121, 1, 1, 1), 1), 1, size, log_scale)
    log_p = p.log_prob(from_uint8(values.view(-1, 1, 2, 2)))
    drawn = in_turn(torch.full((n, 1, 1, 1), 1), 1, size, log_scale).sample()
    number = torch.tensor([216, 36, 6, 1])
    counts = torch.bincount((to_uint8(drawn).long().flatten(1) * number).sum(1), minlength=1296)
    counts = counts[(values * number).sum(1)]
    assert counts.sum() == n
    assert_as_often(counts, n * log_p.double().exp())


@torch.no_grad()
@pytest.mark.parametrize("size, log_scale", EXTREMES)
def test_draws_of_a_poster_come_as_often_as_they_are_probable(size, log_scale):
    """The interval above the means, around them, below them; scales from narrow to flat."""
    y = torch.full((20_000, 1, 1, 1), 170)
    drawn = mixture(posterize_interval, y, 1, size, log_scale).sample()
    counts = torch.bincount(to_uint8(drawn).flatten().long() - 128, minlength=64)
    x = torch.arange(128, 192).view(-1, 1, 1, 1)
    log_p = mixture(posterize_interval, y[:64], 1, size, log_scale).log_prob(from_uint8(x))
    assert counts.sum() == 20_000
    assert_as_often(counts, 20_000 * log_p.double().exp())


# ---- Gradients -----------------------------------------------------------------------------------

@pytest.mark.parametrize("transform", COARSE)
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_gradients_are_finite(transform, size):
    """For any parameters up to ±1000, at values anywhere in the interval."""
    torch.manual_seed(0)
    x = torch.randint(256, (64, 3, 4, 4))
    x[0] = 0
    x[1] = 255
    d, _, _ = TRANSFORMS[transform]
    interval = INTERVALS[transform]
    images = parts(transform, x)
    for i, image in enumerate(images[:3]):
        params = (size * (2 * torch.rand(64, 100, *image.shape[2:]) - 1)).requires_grad_()
        p = Dmol(params, 3, None, partial(interval, d(x), images[:i]))
        log_p = p.log_prob(from_uint8(image))
        log_p.sum().backward()
        assert log_p.isfinite().all() and (log_p <= 1e-3).all()
        assert params.grad.isfinite().all() and params.grad.abs().sum() > 0


@pytest.mark.parametrize("transform", COARSE)
def test_gradients_equal_finite_differences(transform):
    """In float64, with values at the ends of their intervals among them."""
    torch.manual_seed(0)
    x = torch.tensor([[0, 100, 255], [255, 0, 30]]).view(2, 3, 1, 1).repeat(1, 1, 2, 2)
    x[:, :, 0, 1] = torch.tensor([1, 90, 254])
    d, _, _ = TRANSFORMS[transform]
    interval = INTERVALS[transform]
    images = parts(transform, x)
    image = images[len(images) // 2]
    restricted = partial(interval, d(x), images[:len(images) // 2])
    shape = (2, dmol_channels(3, 2), *image.shape[2:])
    params = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def log_p(params):
        return Dmol(params, 3, None, restricted).log_prob(from_uint8(image).double())

    assert torch.autograd.gradcheck(log_p, (params,), eps=1e-6, atol=1e-4)


def test_uniform_is_uniform():
    """All values from low to high, each as often and each as probable."""
    low = torch.full((1, 1, 100, 100), 3)
    p = Uniform(low, low + 3)
    x = to_uint8(p.sample()).long()
    counts = torch.bincount(x.flatten(), minlength=7)
    assert len(counts) == 7 and counts[:3].sum() == 0
    assert (counts[3:] - 2500).abs().max() < 5 * math.sqrt(2500)
    assert p.log_prob(from_uint8(x)).item() == pytest.approx(-10_000 * math.log(4), rel=1e-5)
    assert p.log_prob(from_uint8(x + 4)).item() == -math.inf
    assert torch.equal(to_uint8(p.mean).long(), low + 1)


# ---- The bound -----------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_weights_are_p_of_x_only_with_exact(exact):
    """log p(x) is summed over all y, of which y = d(x) is one: with --exact no other has a share.

    All networks put out 0, so u and z say nothing and all weights of an x are equal. All 64 blocks
    of x are alike, so that p(x), their product, is a sum over 256 values and not 256^64.
    """
    model = SelfVAE(Config(small=True, prior="normal", exact=exact), (1, 16, 16))
    for name, p in model.named_parameters():
        if name.endswith(("original0", "bias")):
            p.zero_()
    x = from_uint8(torch.tensor([[100, 110], [120, 131]]).repeat(8, 8).view(1, 1, 16, 16))
    y = from_uint8(torch.arange(256).view(-1, 1, 1, 1).expand(-1, -1, 8, 8))
    nothing = torch.zeros(256, 16, 8, 8)
    log_p_y = model.p_y(nothing).log_prob(y)
    log_p_xy = log_p_y + model.p_x[0](y, nothing).log_prob(x.expand(256, -1, -1, -1))
    log_p = 64 * torch.logsumexp(log_p_xy / 64, 0).item()
    log_w = model.log_weights(x, 2)
    torch.testing.assert_close(log_w, log_p_xy[115].expand(2, 1))  # d(x) = 461 / 4, rounded
    assert (log_w[0].item() == pytest.approx(log_p)) == exact
    assert exact or log_w[0].item() < log_p - 50


# ---- The models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels, size, transform", [
    (1, 16, "downscale"), (2, 32, "downscale"), (3, 64, "downscale"),
    (1, 16, "grayscale"), (1, 16, "posterize")])
def test_bound_and_operations(levels, size, transform, monkeypatch):
    """Terms, weights, gradients, all operations; draws and means of x and y have the d of y."""
    narrow_networks(monkeypatch)
    torch.manual_seed(0)
    cfg = Config(levels=levels, transform=transform, exact=True, prior="normal", small=True)
    model = SelfVAE(cfg, (3, size, size))
    x = quantize(torch.rand(2, 3, size, size) * 2 - 1)
    model.initialize(x)
    model.elbo(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.log_weights(x, 2).isfinite().all()
    for operation, sent in model.operations.items():
        rate = selfvae.rate(model, x, sent, x[0].numel())
        assert all(values.isfinite().all() for values in rate.values()), operation
    known, _ = model.infer(x, [f"y_{levels}"])
    for mean in (False, True):
        drawn = model.sample(2, mean=mean, known=known)
        assert torch.equal(model.representations(drawn)[levels], known[f"y_{levels}"])
    if transform == "downscale":  # a y_1 that is drawn need be no poster
        values, _ = model.decode({}, 2)
        y = model.representations(values["x"])
        for k in range(1, levels + 1):
            assert torch.equal(y[k], values[f"y_{k}"])


def test_a_transformation_with_exact_is_two_entries(monkeypatch):
    """d keeps every other pixel: the first of a block is known, nothing of the others."""
    def sparse(y):
        return y[:, :, ::2, ::2]

    def interval(y, pixels, this):
        if not pixels:
            return y, y
        return torch.zeros_like(y), torch.full_like(y, 255)

    monkeypatch.setitem(selfvae.TRANSFORMS, "sparse", (sparse, 2, True))
    monkeypatch.setitem(selfvae.INTERVALS, "sparse", interval)
    x = quantize(torch.rand(2, 3, 32, 32) * 2 - 1)
    for exact in (False, True):
        cfg = Config(levels=2, transform="sparse", exact=exact, prior="normal", small=True)
        model = SelfVAE(cfg, (3, 32, 32))
        assert model.elbo(x).isfinite().all()
        drawn = model.reconstruct(x, operation="conditional_generate")
        assert torch.equal(drawn[..., ::2, ::2], x[..., ::2, ::2]) == exact
