"""common.py by worked examples: pixels, the mixture of logistics, metrics, datasets, the log."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as TF

import common
from common import (Batches, Dmol, UserError, dmol_channels, from_uint8,
                    load_images, make_shapes, quantize, to_uint8)
from conftest import pictures_on, seeded

LEVELS = torch.arange(256)


# ---- Pixels --------------------------------------------------------------------------------------

def test_all_256_levels_survive_the_round_trip():
    """uint8 -> float -> uint8 is the identity; the grid runs from -1 to 1 in steps of 2/255."""
    levels = LEVELS.to(torch.uint8)
    x = from_uint8(levels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert x.diff().tolist() == pytest.approx([2 / 255] * 255, abs=1e-6)
    back = to_uint8(x)
    assert back.dtype == torch.uint8 and torch.equal(back, levels)


def test_to_uint8_takes_the_nearest_level_and_clips():
    """0.4 of a step aside goes back to the level, 0.6 of a step to its neighbour.

    What is beyond [-1, 1] is clipped.
    """
    x = from_uint8(LEVELS)
    step = 2 / 255
    assert torch.equal(to_uint8(x + 0.4 * step).long(), LEVELS)
    assert torch.equal(to_uint8(x - 0.4 * step).long(), LEVELS)
    assert torch.equal(to_uint8(x + 0.6 * step).long(), (LEVELS + 1).clamp(max=255))
    assert to_uint8(torch.tensor([-9.0, 9.0, -math.inf, math.inf])).tolist() == [0, 255, 0, 255]


def test_quantize_leaves_the_grid_alone_and_moves_everything_else_onto_it():
    """A grid value stays; any other value moves by at most half a step."""
    grid = from_uint8(LEVELS)
    x = torch.linspace(-1, 1, 1001)
    assert torch.equal(quantize(grid), grid)
    assert torch.isin(quantize(x), grid).all()
    assert (quantize(x) - x).abs().max() <= 1 / 255 + 1e-6


# ---- Discretized mixture of logistics ------------------------------------------------------------

def pixel_params(logits, means, log_scales, coefficients=()):
    """The parameters of one pixel (1, P, 1, 1), from lists (M,), (C, M), (C, M) and (pairs, M).

    The networks put out log-scales that are 2 higher.
    """
    raw_scales = (torch.tensor(log_scales) + 2).tolist()
    rows = [logits, *means, *raw_scales, *coefficients]
    return torch.tensor(rows).reshape(1, -1, 1, 1)


def scales_of(params, channels, mixtures=10):
    """The log-scales among parameters (B, P, H, W), a view (B, C, M, H, W)."""
    return params.unflatten(1, (-1, mixtures))[:, 1 + channels:1 + 2 * channels]


def random_params(batch, channels, mixtures, seed, height=1, width=1, dtype=torch.float32):
    """Plausible parameters (B, P, H, W).

    Logits and couplings are N(0, 1), means within [-1, 1], log-scales -4 … -1.
    """
    generator = torch.Generator().manual_seed(seed)
    params = torch.randn(batch, dmol_channels(channels, mixtures), height, width,
                         generator=generator, dtype=dtype)
    params.unflatten(1, (-1, mixtures))[:, 1:1 + channels].tanh_()
    log_scales = scales_of(params, channels, mixtures)
    log_scales.sigmoid_().mul_(3).add_(-4 + 2)
    return params


def dmol_log_prob(x, params):
    """log p(x) of the mixture with these parameters."""
    return Dmol(params, x.shape[1]).log_prob(x)


def all_levels(params):
    """log p of each of the 256 levels of one grey pixel."""
    return dmol_log_prob(from_uint8(LEVELS).reshape(256, 1, 1, 1), params.expand(256, -1, 1, 1))


@pytest.mark.parametrize("channels, mixtures, expected", [
    (1, 10, 30), (3, 10, 100), (1, 1, 3), (2, 1, 6), (4, 5, 75)])
def test_dmol_channels(channels, mixtures, expected):
    """M (1 + 2C + C(C-1)/2): 30 for grey and 100 for RGB with ten components."""
    assert dmol_channels(channels, mixtures) == expected
    if mixtures == 10:
        assert dmol_channels(channels) == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_256_probabilities_sum_to_one(seed):
    """Those of a grey pixel with ten components and random parameters."""
    log_p = all_levels(random_params(1, 1, 10, seed))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("mean, log_scale", [
    (0.0, -7.0), (1.0, -7.0), (-1.0, -3.0), (30.0, 0.0), (0.3, 7.0), (-5.0, 2.0)])
def test_the_256_probabilities_sum_to_one_for_extreme_components(mean, log_scale):
    """A component may be narrower than a grid step, flat, or have its mean off the grid.

    The edge bins take what lies outside.
    """
    log_p = all_levels(pixel_params([0.0], [[mean]], [[log_scale]]))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-5)


def test_the_16_million_probabilities_of_an_rgb_pixel_sum_to_one():
    """All 256³ colours, channels coupled, one red level at a time; mixtures have the test above."""
    params = random_params(1, 3, 1, seed=0)
    assert params[0, -3:].abs().min() > 0.05  # the couplings are really there
    p_x = Dmol(params.expand(65536, -1, 1, 1), 3)
    green, blue = torch.meshgrid(from_uint8(LEVELS), from_uint8(LEVELS), indexing="ij")
    total = 0.0
    for red in from_uint8(LEVELS):
        x = torch.stack([red.expand_as(green), green, blue], -1).view(65536, 3, 1, 1)
        total += p_x.log_prob(x).exp().double().sum().item()
    assert total == pytest.approx(1, abs=1e-4)


def literal_log_prob(x, params, mixtures):
    """The formula above dmol_channels, term by term in Python floats.

    x (B, C, H, W), params (B, P, H, W) -> list of B.
    """
    sums = []
    for image, numbers in zip(x, params):
        total = 0.0
        for pixel, p in zip(image.flatten(1).T.tolist(), numbers.flatten(1).T):
            total += math.log(literal_probability(pixel, p.view(-1, mixtures).tolist()))
        sums.append(total)
    return sums


def literal_probability(pixel, p):
    """One pixel, a list of C values; the rows of p: logits | C means | C log-scales | couplings."""
    C = len(pixel)
    weights = [math.exp(logit) for logit in p[0]]
    probability = 0.0
    for m in range(len(weights)):
        product = weights[m] / sum(weights)
        pair = 0
        for c in range(C):
            mean = p[1 + c][m]
            scale = math.exp(p[1 + C + c][m] - 2)
            for j in range(c):
                mean += math.tanh(p[1 + 2 * C + pair][m]) * pixel[j]
                pair += 1
            above = (pixel[c] + 1 / 255 - mean) / scale
            below = (pixel[c] - 1 / 255 - mean) / scale
            upper = 1.0 if pixel[c] > 0.9999 else 1 / (1 + math.exp(-above))
            lower = 0.0 if pixel[c] < -0.9999 else 1 / (1 + math.exp(-below))
            product *= upper - lower
        probability += product
    return probability


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_log_prob_equals_the_literal_formula(channels):
    """A plain loop in float64 gives the same for 2 x 3 pixels, levels 0, 1, 254, 255 among them."""
    generator = torch.Generator().manual_seed(channels)
    levels = torch.randint(0, 256, (4, channels, 2, 3), generator=generator)
    levels[0] = 0
    levels[1] = 255
    levels[2, :, 0] = 1
    levels[2, :, 1] = 254
    x = levels.double() / 127.5 - 1
    params = random_params(4, channels, 3, seed=channels, height=2, width=3, dtype=torch.float64)
    scales_of(params, channels, 3).add_(1)  # -3 … 0: the loop does not underflow
    expected = torch.tensor(literal_log_prob(x, params, mixtures=3), dtype=torch.float64)
    actual = dmol_log_prob(x, params)
    assert actual.shape == (4,) and actual.dtype == torch.float64
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)
    in_fp32 = dmol_log_prob(x.float(), params.float())
    assert torch.allclose(in_fp32.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mean, level", [(1.0, 3), (-1.0, 252), (1.0, 0), (-1.0, 255)])
def test_a_pixel_2000_scales_out_has_the_right_log_probability(mean, level):
    """Scale e⁻⁷, pixel at the other end: p = e^a - e^b there, so log p = a + log(1 - e^(b-a)).

    At the edges log p = a.
    """
    scale = math.exp(-7)
    x = level / 127.5 - 1
    a = (1 / 255 - abs(x - mean)) / scale  # the nearer side of the bin, in scales; about -2,100
    expected = a if level in (0, 255) else a + math.log1p(-math.exp(-2 / 255 / scale))
    actual = all_levels(pixel_params([0.0], [[mean]], [[-7.0]]))[level].item()
    assert expected < -2000 and actual == pytest.approx(expected, rel=1e-5)


def test_a_flat_component_gives_each_inner_level_its_density_times_the_step():
    """Scale e⁷, mean 0: the density is 1/4 a scale, so p = 2/255 · e⁻⁷ / 4 but at the two edges."""
    inner = all_levels(pixel_params([0.0], [[0.0]], [[7.0]]))[1:-1]
    expected = math.log(2 / 255 / 4) - 7
    assert torch.allclose(inner, torch.full((254,), expected), rtol=0, atol=1e-5)


def test_a_log_scale_below_minus_7_counts_as_minus_7_and_above_7_as_7():
    """The clamp keeps the exponentials finite."""
    def at(log_scale):
        return all_levels(pixel_params([0.0], [[0.2]], [[log_scale]]))

    assert torch.equal(at(-50.0), at(-7.0)) and torch.equal(at(50.0), at(7.0))
    assert not torch.equal(at(-6.5), at(-7.0)) and not torch.equal(at(6.5), at(7.0))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shift_is_a_translation(channels):
    """p(x | shifted by a) = p(x - a | params) where neither is at an edge, whatever the coupling.

    Every value has its own a.
    """
    torch.manual_seed(0)
    x = from_uint8(torch.randint(100, 120, (2, channels, 3, 3)))
    params = random_params(2, channels, 10, seed=0, height=3, width=3)
    shift = torch.randint(-40, 40, x.shape) / 127.5
    shifted = Dmol(params, channels, shift).log_prob(x)
    assert torch.allclose(shifted, dmol_log_prob(x - shift, params), atol=1e-2)
    assert (shifted - dmol_log_prob(x, params)).abs().max() > 0.1
    assert Dmol(params.bfloat16(), channels, shift).log_prob(x).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_shifted_samples_and_means_are_shifted(channels):
    """Where no edge is near, both move by the shift; one channel of it serves all of x's."""
    params = random_params(2, channels, 10, seed=0, height=8, width=8) / 4
    scales_of(params, channels).fill_(-3)  # narrow
    still = Dmol(params, channels)
    by = 20 / 127.5
    for channels_of_shift in (1, channels):
        moved = Dmol(params, channels, torch.full((2, channels_of_shift, 8, 8), by))
        assert torch.allclose(moved.mean, still.mean + by, atol=2.1 / 255)
        assert torch.allclose(seeded(moved.sample), seeded(still.sample) + by, atol=2.1 / 255)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_values_and_gradients_are_finite_for_any_parameters(size):
    """Parameters have random signs and sizes up to ±1000; pixels include both edges."""
    generator = torch.Generator().manual_seed(0)
    x = from_uint8(torch.randint(0, 256, (64, 3, 2, 2), generator=generator))
    x[0] = -1
    x[1] = 1
    uniform = torch.rand(64, 100, 2, 2, generator=generator)
    params = (size * (2 * uniform - 1)).requires_grad_()
    log_p = dmol_log_prob(x, params)
    log_p.sum().backward()
    assert log_p.isfinite().all() and (log_p <= 1e-3).all()
    assert params.grad.isfinite().all() and params.grad.abs().sum() > 0


def test_gradients_equal_finite_differences():
    """Autograd agrees with central differences in float64, with an edge level in each image."""
    x = from_uint8(torch.tensor([[0, 100, 255], [255, 0, 30]])).double().reshape(2, 3, 1, 1)
    params = random_params(2, 3, 2, seed=4, dtype=torch.float64).requires_grad_()

    def log_p(params):
        return dmol_log_prob(x, params)

    assert torch.autograd.gradcheck(log_p, (params,), eps=1e-6, atol=1e-4)


def test_autocast_does_not_touch_the_likelihood():
    """bf16 autocast changes not one bit; bf16 parameters are computed in fp32.

    Float64 stays float64.
    """
    x = from_uint8(torch.arange(3 * 3 * 4).reshape(3, 3, 2, 2) * 7)
    params = random_params(3, 3, 10, seed=0, height=2, width=2)
    half = params.bfloat16()
    plain = dmol_log_prob(x, params)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = dmol_log_prob(x, params)
        from_half = dmol_log_prob(x, half)
    assert plain.dtype == under_autocast.dtype == from_half.dtype == torch.float32
    assert torch.equal(under_autocast, plain)
    assert torch.equal(from_half, dmol_log_prob(x, half.float()))
    assert dmol_log_prob(x, params.double()).dtype == torch.float64


def chi_square(counts, probabilities):
    """Σ (observed - expected)² / expected -> the statistic, its degrees of freedom.

    Cells with less than 5 expected are pooled.
    """
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1)])
    return ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1


def test_grey_samples_have_the_probabilities_that_log_prob_gives():
    """100,000 draws in one image: chi-square is at most 5 sd above its mean, df + 5 √(2 df)."""
    params = random_params(1, 1, 10, seed=3)
    params[0, 10] = -1.2  # one component near the lower edge, so that the edge bin matters
    torch.manual_seed(0)
    draws = to_uint8(Dmol(params.expand(-1, -1, 250, 400), 1).sample())
    counts = torch.bincount(draws.flatten().long(), minlength=256)
    statistic, df = chi_square(counts, all_levels(params).exp())
    assert df > 60 and statistic < df + 5 * math.sqrt(2 * df)


def test_rgb_samples_have_the_joint_probabilities_that_log_prob_gives():
    """Two narrow, coupled components: the counts of all colours around each, by chi-square.

    The colours are those of a cube of 13³ around each component's middle.
    """
    means = [[-0.5, 0.5], [0.3, -0.2], [0.1, 0.0]]
    log_scales = [[-5.2, -5.0], [-5.5, -5.2], [-5.3, -5.5]]
    couplings = [[1.0, -1.0], [-0.7, 0.8], [0.6, -0.4]]
    params = pixel_params([0.3, -0.3], means, log_scales, couplings)
    cube = torch.cartesian_prod(*[torch.arange(-6, 7)] * 3)
    cubes = []
    for m in range(2):
        green_red, blue_red, blue_green = [math.tanh(row[m]) for row in couplings]
        red = means[0][m]
        green = means[1][m] + green_red * red
        blue = means[2][m] + blue_red * red + blue_green * green
        middle = to_uint8(torch.tensor([red, green, blue])).long()
        cubes.append(middle + cube)
    colours = torch.cat(cubes)  # (4394, 3)
    x = from_uint8(colours)[:, :, None, None]
    probabilities = dmol_log_prob(x, params.expand(len(x), -1, 1, 1)).exp()
    assert 0.9 < probabilities.sum() < 1

    def number(colours):
        return colours @ torch.tensor([65536, 256, 1])

    p_x = Dmol(params.expand(-1, -1, 250, 400), 3)
    draws = to_uint8(seeded(p_x.sample)).long()[0].flatten(1).T  # (100000, 3)
    counts = torch.bincount(number(draws), minlength=2**24)[number(colours)]
    elsewhere = len(draws) - counts.sum()
    counts = torch.cat([counts, elsewhere[None]])
    probabilities = torch.cat([probabilities, 1 - probabilities.sum(0, keepdim=True)])
    statistic, df = chi_square(counts, probabilities)
    assert df > 500 and statistic < df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize("channels, mean", [(1, False), (1, True), (3, False), (3, True)])
def test_samples_are_images_on_the_grid(channels, mean):
    """They are (B, C, H, W), float32, every value one of the 256, for wild parameters too."""
    torch.manual_seed(0)
    plausible = random_params(2, channels, 10, seed=5, height=6, width=4)
    wild = 1000 * torch.randn(2, dmol_channels(channels), 6, 4)
    for params in (plausible, wild):
        p_x = Dmol(params, channels)
        x = p_x.mean if mean else p_x.sample()
        assert x.shape == (2, channels, 6, 4) and x.dtype == torch.float32
        assert torch.isin(x, from_uint8(LEVELS)).all()


def test_samples_vary_and_follow_the_seed():
    """Two draws differ; the same seed gives the same draw; the mean uses no randomness."""
    p_x = Dmol(random_params(1, 3, 10, seed=6, height=8, width=8), 3)
    first = seeded(p_x.sample)
    second = p_x.sample()
    again = seeded(p_x.sample)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(p_x.mean, p_x.mean)


def test_mean_of_one_dominating_component():
    """R = 0.2, G = -0.4 + tanh(0.5) R, B = 0.9 + tanh(2) R + tanh(-1) G, each to its nearest level.

    Draws are close to it.
    """
    means = [[0.2, -1.0], [-0.4, -1.0], [0.9, -1.0]]
    couplings = [[0.5, 0.0], [2.0, 0.0], [-1.0, 0.0]]
    p_x = Dmol(pixel_params([50.0, 0.0], means, [[-7.0, 0.0]] * 3, couplings), 3)
    red = 0.2
    green = -0.4 + math.tanh(0.5) * red
    blue = 0.9 + math.tanh(2) * red + math.tanh(-1) * green
    assert blue > 1  # clipped
    expected = torch.tensor([red, green, 1.0])
    assert torch.equal(p_x.mean.flatten(), quantize(expected))
    assert (p_x.sample().flatten() - expected).abs().max() < 4 / 255


def test_mean_weighs_the_components():
    """Weights 1/4 and 3/4, means -0.5 and 0.5: 0.25.

    A mean of 9 counts as 1, which makes it 1/4 (-0.5) + 3/4 = 0.625.
    """
    for means, expected in (([-0.5, 0.5], 0.25), ([-0.5, 9.0], 0.625)):
        params = pixel_params([0.0, math.log(3)], [means], [[0.0, 0.0]])
        mean = Dmol(params, 1).mean.item()
        assert mean == pytest.approx(expected, abs=1 / 255)


# ---- Metrics -------------------------------------------------------------------------------------

def test_bits_per_dim():
    """8 fair bits for each of 12 dimensions are 96 ln 2 nats."""
    assert common.bits_per_dim(96 * math.log(2), 12) == pytest.approx(8)
    bits = common.bits_per_dim(torch.tensor([0.0, 12 * math.log(2)]), 12)
    assert bits.tolist() == pytest.approx([0, 1])


def test_log_mean_exp():
    """It is log(mean(exp)) along either dimension, and neither overflows nor underflows at ±10,000.
    """
    w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dim in (0, 1):
        assert torch.allclose(common.log_mean_exp(w, dim), w.exp().mean(dim).log())
    assert torch.equal(common.log_mean_exp(w), common.log_mean_exp(w, 0))
    for far in (1e4, -1e4):
        assert torch.allclose(common.log_mean_exp(w + far) - far, common.log_mean_exp(w), atol=1e-9)
    assert common.log_mean_exp(torch.tensor([1e4, -1e4])).item() == pytest.approx(1e4 - math.log(2))
    two_images = torch.tensor([[-100.0, -7000.0], [-101.0, -7001.0]])
    expected = [-100.3799, -7000.3799]
    assert common.log_mean_exp(two_images).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr():
    """The peak is 2: an error of 0.2 everywhere has 10 log10(4 / 0.04) = 20 dB.

    One of 2 in one pixel of four has 10 log10(4) dB, none has 100: averages stay finite.
    """
    x = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    y = x.clone()
    y[0] += 0.2
    y[1, 0, 0, 0] = 2
    assert common.psnr(x, y).tolist() == pytest.approx([20, 10 * math.log10(4), 100])


class KnownModel:
    """Of seven images of one pixel; image i has level i, which its terms and weights follow from.
    """

    weights = torch.tensor([[0.0, -1, -2, -3, -4, -5, -6],
                            [0.0, -2, -2, -5, -4, -9, 10]]) - 20  # log w (S, N)

    def level(self, x):
        return to_uint8(x)[:, 0, 0, 0].long()

    def terms(self, x):
        return {"re_x": self.level(x).float(), "kl_z": self.level(x).float() ** 2}

    def log_weights(self, x, samples):
        assert samples == 2
        return self.weights[:, self.level(x)]


def seven(batch_size):
    """Batches of the images of KnownModel."""
    return Batches(np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1), batch_size, "cpu")


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_mean_terms_weighs_every_image_alike(batch_size):
    """(0 + … + 6) / 7 = 3 and (0 + 1 + 4 + … + 36) / 7 = 13, by batches of any size."""
    means = common.mean_terms(KnownModel(), seven(batch_size))
    assert means == pytest.approx({"re_x": 3, "kl_z": 13})


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_importance_weighted(batch_size):
    """Log-weights l1, l2 of each image: log((e^l1 + e^l2) / 2) against (l1 + l2) / 2.

    The former bounds more tightly.
    """
    result = common.importance_weighted(KnownModel(), seven(batch_size), samples=2, dims=5)
    log_w = KnownModel.weights.double()
    nats_per_bit = 5 * math.log(2)  # of all 5 dimensions
    bpd = -log_w.exp().mean(0).log() / nats_per_bit
    assert result["iw_bpd"] == pytest.approx(bpd.mean().item())
    assert result["iw_bpd_se"] == pytest.approx(bpd.std().item() / math.sqrt(7))
    assert result["iw_elbo_bpd"] == pytest.approx(-log_w.mean().item() / nats_per_bit)
    assert result["iw_bpd"] < result["iw_elbo_bpd"]
    assert result["iw_samples"] == 2 and result["iw_images"] == 7


def test_equal_weights_make_both_bounds_equal(monkeypatch):
    """Where the weights do not vary, Jensen's inequality is an equality."""
    monkeypatch.setattr(KnownModel, "weights", torch.full((2, 7), -3.0))
    result = common.importance_weighted(KnownModel(), seven(4), samples=2, dims=5)
    for name in ("iw_bpd", "iw_elbo_bpd"):
        assert result[name] == pytest.approx(3 / (5 * math.log(2)))
    assert result["iw_bpd_se"] == pytest.approx(0, abs=1e-12)


def test_seconds_to_sample(monkeypatch):
    """By a clock of our own the first draw takes 100 s and is not counted, 5 others take 2 s each.
    """
    class Model:
        seconds = 0.0
        calls = []

        def sample(self, n):
            self.seconds += 2 if self.calls else 100
            self.calls.append(n)
            return torch.zeros(n)

    model = Model()
    monkeypatch.setattr(common.time, "perf_counter", lambda: model.seconds)
    assert common.seconds_to_sample(model, 4, runs=5, limit=60) == 2
    assert model.calls == [4] * 6


# ---- shapes --------------------------------------------------------------------------------------

def test_shapes_are_deterministic():
    """The same (count, size, seed) has the same images and labels, another seed others."""
    images, labels = make_shapes(300, 32, seed=0)
    again, labels_again = make_shapes(300, 32, seed=0)
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    other, _ = make_shapes(300, 32, seed=1)
    assert not (images == other).all((1, 2, 3)).any()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_shapes_have_labels_that_take_every_value(size):
    """Kind, colour, size, column, row take 4, 8, 4, 4, 4 values; images have the wanted size."""
    images, labels = make_shapes(300, size, seed=0)
    assert images.shape == (300, size, size, 3) and images.dtype == np.uint8
    assert labels.shape == (300, 5) and labels.dtype == np.uint8
    for column, count in zip(labels.T.tolist(), (4, 8, 4, 4, 4)):
        assert set(column) == set(range(count))


def test_more_than_one_block_of_shapes():
    """Images are drawn 500 at a time; the ones after the 500th are drawn as well."""
    images, labels = make_shapes(510, 16, seed=0)
    assert len(labels) == 510 and (images[500:].std((1, 2, 3)) > 5).all()


def test_the_figure_has_the_kind_the_colour_and_the_place_that_its_label_says():
    """Around (column, row) discs, squares and triangles show the labelled colour.

    Rings (kind 3) are hollow there.
    """
    images, labels = make_shapes(300, 32, seed=0)
    middles = (((labels[:, 3:] + 0.5) / 8 + 0.25) * 32).astype(int)  # of the labelled cells
    patches = []
    for image, (x, y) in zip(images, middles):
        patches.append(image[y - 1:y + 1, x - 1:x + 1].mean((0, 1)))
    distances = np.linalg.norm(np.array(patches)[:, None] - common.COLOURS, axis=-1)
    found = distances.argmin(1) == labels[:, 1]
    by_kind = [found[labels[:, 0] == kind].mean() for kind in range(4)]
    assert min(by_kind[:3]) > 0.9 and by_kind[3] < 0.5, by_kind


def test_shapes_carry_sensor_noise():
    """Second differences cancel the gradient and leave noise of sd 2 √(1 + 4 + 1) = 4.9.

    Its median size is 0.67 · 4.9 = 3.3.
    """
    images, _ = make_shapes(50, 32, seed=0)
    differences = np.diff(images.astype(float), n=2, axis=2)
    assert 2.8 < np.median(abs(differences)) < 4.2


# ---- Batches -------------------------------------------------------------------------------------

def numbered(count, channels=1):
    """Image i is constant: level i in channel 0, i + 50 in channel 1, i + 100 in channel 2."""
    base = np.arange(count)[:, None, None, None] + 50 * np.arange(channels)
    return np.ascontiguousarray(np.broadcast_to(base, (count, 4, 6, channels)), np.uint8)


def which(x):
    """The numbers of the images in a batch of `numbered` images."""
    return to_uint8(x)[:, 0, 0, 0].tolist()


def test_batches_are_channels_first_floats():
    """They are (B, C, H, W), float32 in [-1, 1], channels in order, in channels-last memory."""
    x = Batches(numbered(8, 3), 5, "cpu").batch(0)
    assert x.shape == (5, 3, 4, 6) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1
    assert x.is_contiguous(memory_format=torch.channels_last)
    numbers = torch.tensor(which(x))
    levels = torch.stack([numbers, numbers + 50, numbers + 100], 1)
    assert torch.equal(to_uint8(x[:, :, 2, 3]).long(), levels)


def test_a_batch_follows_from_seed_and_step_alone():
    """A new object, asked for a late step alone, gives what one that went through all gives."""
    old = Batches(numbered(40), 8, "cpu", seed=3)
    history = [which(old.batch(step)) for step in range(23)]
    assert which(Batches(numbered(40), 8, "cpu", seed=3).batch(22)) == history[22]
    assert which(old.batch(4)) == history[4]  # and back again
    assert which(Batches(numbered(40), 8, "cpu", seed=4).batch(22)) != history[22]


def test_every_image_comes_exactly_once_an_epoch():
    """40 images in batches of 8: steps 0 … 4 hold each once, steps 5 … 9 too, in another order."""
    batches = Batches(numbered(40), 8, "cpu")
    shown = []
    for step in range(10):
        shown += which(batches.batch(step))
    first = shown[:40]
    second = shown[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_no_image_comes_twice_where_the_batch_size_does_not_divide():
    """11 images in batches of 4: two whole batches an epoch, eight different images."""
    batches = Batches(numbered(11), 4, "cpu")
    assert batches.per_epoch == 2
    assert len(set(which(batches.batch(0)) + which(batches.batch(1)))) == 8


def test_a_batch_larger_than_the_split_is_the_split():
    """5 images, batch size 100: every step holds all five."""
    batches = Batches(numbered(5), 100, "cpu")
    assert sorted(which(batches.batch(0))) == sorted(which(batches.batch(7))) == list(range(5))


def test_iterating_is_the_whole_split_in_order():
    """11 images in batches of 4 are 0-3, 4-7, 8-10, the second time again, and never augmented."""
    batches = Batches(numbered(11), 4, "cpu", augment=True)
    for _ in range(2):
        assert [which(x) for x in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    stripes = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    x = torch.cat(list(Batches(stripes, 4, "cpu", augment=True)))
    assert torch.equal(to_uint8(x), torch.from_numpy(stripes).permute(0, 3, 1, 2))


def test_memory_mapped_batches_equal_resident_ones(monkeypatch, tmp_path):
    """A split over the limit is read from disk for each batch, in training and in evaluation."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    for images in (array, common.Subset(array, np.arange(1, 20, 2))):
        resident = Batches(images, 3, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(common, "RESIDENT_BYTES", 0)
            mapped = Batches(images, 3, "cpu")
        assert resident.resident and not mapped.resident
        assert all(torch.equal(resident.batch(step), mapped.batch(step)) for step in range(8))
        assert all(torch.equal(a, b) for a, b in zip(resident, mapped, strict=True))


def test_a_subset_is_a_view_through_its_index():
    """Positions 0, 1, 2 of the subset are rows 4, 1, 7 of the array."""
    subset = common.Subset(numbered(9), np.array([4, 1, 7]))
    assert len(subset) == 3 and subset.shape == (3, 4, 6, 1)
    assert [int(subset[i][0, 0, 0]) for i in range(3)] == [4, 1, 7]
    assert subset[np.array([2, 0])][:, 0, 0, 0].tolist() == [7, 4]
    assert subset[:][:, 0, 0, 0].tolist() == [4, 1, 7]


def coordinates(batch, height, width):
    """Each pixel holds its own (row, column): what augment did can be read off the result."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns], -1).to(torch.uint8)
    return image.expand(batch, -1, -1, -1).contiguous()


def test_augment_shifts_by_at_most_5_percent_and_repeats_the_edge():
    """30 rows move by up to 2, 20 columns by up to 1, and may be mirrored.

    All 5 · 3 · 2 of these occur, and nothing else.
    """
    torch.manual_seed(0)
    result = common.augment(coordinates(1000, 30, 20))
    assert result.shape == (1000, 30, 20, 2) and result.dtype == torch.uint8
    expected = set()
    for dy in range(-2, 3):
        for dx in range(-1, 2):
            for flip in (False, True):
                rows = [min(max(i + dy, 0), 29) for i in range(30)]
                columns = [min(max(j + dx, 0), 19) for j in range(20)]
                if flip:
                    columns = [19 - j for j in columns]
                image = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
                expected.add(image.astype(np.uint8).tobytes())
    assert len(expected) == 5 * 3 * 2
    seen = {image.numpy().tobytes() for image in result}
    assert seen == expected  # each is missed by all 1,000 with a chance below 1e-14


def test_augment_flips_each_image_with_probability_one_half():
    """2,000 images of one batch: 1,000 flips, ± 5 standard deviations of √500 = 22."""
    torch.manual_seed(0)
    columns = common.augment(coordinates(2000, 20, 20))[:, 0, :, 1].int()
    flips = (columns[:, 0] > columns[:, -1]).sum().item()
    assert abs(flips - 1000) < 5 * math.sqrt(500)


def test_augment_leaves_a_constant_image_alone():
    """Edge repetition brings in no new values."""
    image = torch.full((16, 9, 7, 3), 77, dtype=torch.uint8)
    assert torch.equal(common.augment(image), image)


def test_batches_augment_only_when_told():
    """A step has the same images in the same order with and without, moved or not."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 20, 20, 3), np.uint8)
    plain = Batches(levels, 32, "cpu", augment=False).batch(0)
    moved = Batches(levels, 32, "cpu", augment=True).batch(0)
    assert torch.equal(plain, Batches(levels, 32, "cpu").batch(0))
    assert not torch.equal(plain, moved)

    def histogram(x):
        return torch.stack([torch.histc(image, 16, -1, 1) for image in x])

    assert (histogram(plain) - histogram(moved)).abs().sum(1).max() < 0.2 * 20 * 20 * 3


def test_digits_and_celeba_are_not_augmented(tmp_path):
    """A flipped digit is no digit; the paper leaves CelebA alone.

    A folder of one's own that is called mnist is augmented.
    """
    levels = np.zeros((10, 16, 16, 3), np.uint8)
    for name in common.DATASETS:
        (tmp_path / f"{name}-16").mkdir()
        for split in ("train", "test"):
            np.save(tmp_path / f"{name}-16" / f"{split}.npy", levels)
        augment = load_images(name, tmp_path, 16).augment
        assert augment == (name not in ("mnist", "celeba")), name
    for i in range(10):
        write_grey(tmp_path / "own" / "mnist" / f"{i}.png", i, 20, 20)
    images = load_images(str(tmp_path / "own" / "mnist"), tmp_path, 16)
    assert images.augment and images.shape == (3, 16, 16)
    assert len(images.valid) == len(images.test) == 1


# ---- load_images: shapes and the cache -----------------------------------------------------------

FILES = ["test-labels.npy", "test.npy", "train-labels.npy", "train.npy"]  # of a dataset with labels


@pytest.fixture
def small_shapes(monkeypatch):
    """`shapes` with 200 + 40 images instead of 20,000 + 2,000."""
    def splits(data_dir, size):
        return {"train": make_shapes(200, size, seed=0), "test": make_shapes(40, size, seed=1)}

    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits))


def test_shapes_are_20000_and_2000(monkeypatch):
    """Train and test images, from different seeds; none is drawn here."""
    drawn = []

    def draw(count, size, seed):
        drawn.append((count, size, seed))
        return "images", "labels"

    monkeypatch.setattr(common, "make_shapes", draw)
    splits = common._shapes_splits(None, 32)
    assert drawn == [(20_000, 32, 0), (2_000, 32, 1)]
    assert splits == {"train": ("images", "labels"), "test": ("images", "labels")}


def test_shapes_on_disk(small_shapes, tmp_path):
    """What is loaded is what was drawn, each image with its labels, from four files."""
    images = load_images("shapes", tmp_path, 16)
    folder = tmp_path / "shapes-16"
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["shapes-16"]
    train, labels = make_shapes(200, 16, seed=0)
    assert np.array_equal(np.load(folder / "train.npy"), train)
    assert np.array_equal(np.load(folder / "train-labels.npy"), labels)
    assert images.name == "shapes" and images.size == 16 and images.shape == (3, 16, 16)
    assert isinstance(images.test, np.memmap)
    for split in ("train", "valid"):
        subset = getattr(images, split)
        assert np.array_equal(subset[:], train[subset.index])
        assert np.array_equal(images.labels[split], labels[subset.index])
    test, labels = make_shapes(40, 16, seed=1)
    assert np.array_equal(images.test, test) and np.array_equal(images.labels["test"], labels)


def test_the_default_size_is_that_of_the_dataset(small_shapes, tmp_path):
    """Where no size is given shapes have 32."""
    assert load_images("shapes", tmp_path).shape == (3, 32, 32)
    assert (tmp_path / "shapes-32").is_dir()


def test_the_second_call_reads_and_does_not_make(small_shapes, tmp_path, monkeypatch, capsys):
    """What is on disk is used as it is; nothing is said about preparing."""
    first = load_images("shapes", tmp_path, 16)
    assert "preparing" in capsys.readouterr().out

    def splits(data_dir, size):
        pytest.fail("made again")

    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits))
    second = load_images("shapes", tmp_path, 16)
    assert np.array_equal(first.train[:], second.train[:]) and capsys.readouterr().out == ""


def test_validation_is_15_percent_and_never_changes(small_shapes, tmp_path):
    """30 of 200 images, none of which is trained on; the same ones in another folder.

    They are scattered, not the first 30.
    """
    one = load_images("shapes", tmp_path / "a", 16)
    two = load_images("shapes", tmp_path / "b", 16)
    assert len(one.valid) == 30 and len(one.train) == 170
    assert sorted([*one.valid.index, *one.train.index]) == list(range(200))
    assert np.array_equal(one.valid.index, two.valid.index)
    assert np.array_equal(one.valid[:], two.valid[:])
    assert 60 < one.valid.index.mean() < 140


@pytest.mark.parametrize("stop", [5, 200 + 7])
def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path, monkeypatch, stop):
    """After Ctrl-C at a train or a test image nothing looks finished; none is made twice."""
    made = []

    def splits_that_stop(at):
        def splits(data_dir, size):
            def image(split, i):
                if len(made) == at:
                    raise KeyboardInterrupt
                made.append((split, i))
                return images[split][i]

            images = {"train": make_shapes(200, size, seed=0)[0],
                      "test": make_shapes(40, size, seed=1)[0]}
            train = common.Made(lambda i: image("train", i), images["train"].shape)
            test = common.Made(lambda i: image("test", i), images["test"].shape)
            return {"train": (train, None), "test": (test, None)}
        return splits

    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits_that_stop(stop)))
    with pytest.raises(KeyboardInterrupt):
        load_images("shapes", tmp_path, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes-16.partial"]
    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits_that_stop(None)))
    images = load_images("shapes", tmp_path, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes-16"]
    assert sorted(p.name for p in (tmp_path / "shapes-16").iterdir()) == ["test.npy", "train.npy"]
    assert np.array_equal(np.load(tmp_path / "shapes-16" / "train.npy"),
                          make_shapes(200, 16, seed=0)[0])
    assert np.array_equal(images.test, make_shapes(40, 16, seed=1)[0])
    assert len(made) == 240


def test_a_preparation_of_other_images_begins_anew(tmp_path, monkeypatch):
    """Else images that were removed meanwhile leave black ones at the end, silently."""
    def splits_of(count, broken):
        def image(i):
            if broken and i == 150:
                raise KeyboardInterrupt
            return images[i]

        images = make_shapes(count, 16, seed=count)[0]
        return lambda data_dir, size: {"train": (common.Made(image, images.shape), None),
                                       "test": (images[:40], None)}

    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits_of(200, True)))
    with pytest.raises(KeyboardInterrupt):
        load_images("shapes", tmp_path, 16)
    monkeypatch.setitem(common.DATASETS, "shapes", (32, splits_of(180, False)))
    load_images("shapes", tmp_path, 16)
    assert np.array_equal(np.load(tmp_path / "shapes-16" / "train.npy"),
                          make_shapes(180, 16, seed=180)[0])


def test_a_long_preparation_says_how_long_it_takes(small_shapes, tmp_path, monkeypatch, capsys):
    """Half a minute for each image: 200 lines, the first of which has 199 times as long to go."""
    clock = iter(range(0, 10**6, 31))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    load_images("shapes", tmp_path, 16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1 of 200 train images, 1:42:49 left"
    assert lines[2].startswith("2 of 200 train images")


def test_a_truncated_file_is_named(small_shapes, tmp_path):
    """An error names the train.npy that is cut in half, and says what to do."""
    load_images("shapes", tmp_path, 16)
    path = tmp_path / "shapes-16" / "train.npy"
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match="delete its folder") as error:
        load_images("shapes", tmp_path, 16)
    assert str(path) in str(error.value)


def test_a_missing_or_foreign_array_is_refused(small_shapes, tmp_path):
    """The line tells of a test.npy that is not there, or is of floats."""
    load_images("shapes", tmp_path, 16)
    path = tmp_path / "shapes-16" / "test.npy"
    path.unlink()
    with pytest.raises(UserError, match="test.npy"):
        load_images("shapes", tmp_path, 16)
    np.save(path, np.zeros((4, 16, 16, 3), np.float32))
    with pytest.raises(UserError, match="float32"):
        load_images("shapes", tmp_path, 16)


def test_an_unknown_name_and_a_missing_folder_are_refused(tmp_path):
    """The message repeats the name and lists the names that exist."""
    for name in ("imagenet", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="shapes, mnist, cifar10") as error:
            load_images(name, tmp_path)
        assert name in str(error.value) and "folder" in str(error.value)


def test_a_size_below_8_is_refused(tmp_path):
    """Nothing is made then."""
    with pytest.raises(UserError, match="at least 8"):
        load_images("shapes", tmp_path, 4)
    assert not list(tmp_path.iterdir())


# ---- load_images: a folder -----------------------------------------------------------------------

def write(path, pixels, **options):
    """(C, H, W) uint8 -> an image file of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(pixels).save(path, **options)


def write_grey(path, level, height=20, width=30):
    """A constant grey RGB image."""
    write(path, torch.full((3, height, width), level, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path):
    """40 images of levels 0 … 39, not square, in nested folders."""
    for i in range(40):
        path = tmp_path / "pictures" / f"part{i % 3}" / "deep" / f"{i}.png"
        write_grey(path, i, 20 + i % 5, 30 - i % 7)
    return tmp_path / "pictures"


def levels_of(*splits):
    """The levels of all images in the splits, in order."""
    levels = []
    for split in splits:
        levels += split[:][:, 0, 0, 0].tolist()
    return sorted(levels)


def test_a_folder_of_images(folder, tmp_path):
    """They are read recursively and made square at the wanted size.

    A tenth is test, 15 % of the rest validation, each image once.
    """
    images = load_images(str(folder), tmp_path / "data", 16)
    assert images.name == "pictures" and images.shape == (3, 16, 16) and images.labels is None
    assert (len(images.train), len(images.valid), len(images.test)) == (31, 5, 4)
    assert levels_of(images.train, images.valid, images.test) == list(range(40))
    assert (images.train[:].std((1, 2, 3)) == 0).all()
    again = load_images(str(folder), tmp_path / "other", 16)
    assert np.array_equal(images.test, again.test)


def test_the_default_size_of_a_folder_is_64(folder, tmp_path):
    """That is where no size is given."""
    assert load_images(str(folder), tmp_path / "data").shape == (3, 64, 64)


def test_images_are_cropped_in_the_centre(tmp_path):
    """Of 48 x 16 pixels, dark, middle and bright, only the middle third remains, both ways round.
    """
    for i in range(10):
        levels = torch.tensor([10, 120, 230], dtype=torch.uint8).repeat_interleave(16)
        image = levels.expand(3, 16, 48) if i % 2 else levels[:, None].expand(3, 48, 16)
        write(tmp_path / "wide" / f"{i}.png", image)
    images = load_images(str(tmp_path / "wide"), tmp_path, 16)
    assert (images.train[:] == 120).all() and (images.test == 120).all()


def test_images_of_all_channels_become_rgb(tmp_path):
    """One folder may have images of 1, 3 and 4 channels, as .png and as .JPG."""
    for i in range(12):
        channels = (1, 3, 4)[i % 3]
        ending = ".JPG" if i % 2 and channels < 4 else ".png"
        pixels = torch.full((channels, 9, 9), 80, dtype=torch.uint8)
        pixels[3:] = 255  # opaque
        write(tmp_path / "mixed" / f"{i}{ending}", pixels)
    images = load_images(str(tmp_path / "mixed"), tmp_path, 8)
    assert images.train.shape[1:] == (8, 8, 3) and (images.train[:] == 80).all()


def test_train_and_test_subfolders_are_respected(tmp_path):
    """20 images below train/ and 6 below test/ stay where they are; a loose one is left out."""
    for i in range(20):
        write_grey(tmp_path / "own" / "train" / f"{i}.png", i)
    for i in range(6):
        write_grey(tmp_path / "own" / "test" / "nested" / f"{i}.png", 100 + i)
    write_grey(tmp_path / "own" / "loose.png", 255)
    images = load_images(str(tmp_path / "own"), tmp_path, 8)
    assert levels_of(images.test) == list(range(100, 106))
    assert levels_of(images.train, images.valid) == list(range(20))
    assert len(images.valid) == 3


def test_a_changed_folder_gets_a_new_cache(folder, tmp_path):
    """A folder that stays has one; with an image replaced it has another, with that image in it."""
    data = tmp_path / "data"
    for _ in range(2):
        load_images(str(folder), data, 8)
        assert len(list(data.iterdir())) == 1
    write_grey(folder / "part0" / "deep" / "0.png", 200, 50, 50)
    images = load_images(str(folder), data, 8)
    assert len(list(data.iterdir())) == 2
    levels = levels_of(images.train, images.valid, images.test)
    assert 200 in levels and 0 not in levels


def test_an_empty_folder_is_refused(tmp_path):
    """The message names the folder that has nothing in it, no image, or an empty test/."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds 0 images") as error:
        load_images(str(empty), tmp_path / "data")
    assert str(empty) in str(error.value)
    (empty / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(UserError, match="holds 0 images"):
        load_images(str(empty), tmp_path / "data")
    for i in range(12):
        write_grey(empty / "train" / f"{i}.png", i)
    (empty / "test").mkdir()
    with pytest.raises(UserError, match="test holds 0 images"):
        load_images(str(empty), tmp_path / "data")


def test_a_broken_image_is_named(folder, tmp_path):
    """The message names a .png of garbage, or one cut short; nothing that looks finished is left.
    """
    good = (folder / "part0" / "deep" / "3.png").read_bytes()
    for content in (b"this is not a picture", good[:len(good) // 2]):
        (folder / "broken.png").write_bytes(content)
        with pytest.raises(UserError, match="cannot read 1 of the images") as error:
            load_images(str(folder), tmp_path / "data", 8)
        assert "broken.png" in str(error.value)
        assert not list((tmp_path / "data").iterdir())


# ---- load_images: torchvision's datasets ---------------------------------------------------------

def failing(name, error):
    """In place of a dataset of torchvision, whose download fails."""
    def dataset(**arguments):
        raise error

    dataset.__name__ = name
    return dataset


def test_mnist_is_padded_to_32(tmp_path, monkeypatch):
    """28 x 28 digits get a frame of two black pixels; they have one channel, and labels.

    At 28 they stay as they are, at 14 they are resized.
    """
    digits = torch.arange(20)[:, None, None].expand(20, 28, 28).to(torch.uint8) + 100

    class MNIST:
        def __init__(self, root, train, download):
            assert download and str(root).startswith(str(tmp_path))
            self.data = digits if train else digits[:6] + 50
            self.targets = torch.arange(len(self.data)) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", MNIST)
    monkeypatch.setitem(common.COUNTS, "mnist", (20, 6, ""))
    images = load_images("mnist", tmp_path)
    assert images.shape == (1, 32, 32) and not images.augment
    assert sorted(p.name for p in (tmp_path / "mnist-32").iterdir()) == FILES
    train = np.load(tmp_path / "mnist-32" / "train.npy")
    assert train.shape == (20, 32, 32, 1) and train.dtype == np.uint8
    assert (train[:, 2:30, 2:30, 0] == digits.numpy()).all()
    assert train.sum() == digits.sum()  # the frame is zero
    assert (images.train[:][:, 16, 16, 0] - 100 == images.train.index).all()
    assert np.array_equal(images.labels["train"], images.train.index % 10)
    assert images.labels["test"].tolist() == list(range(6))
    for size in (28, 14):
        test = load_images("mnist", tmp_path, size).test
        assert np.array_equal(test[..., 0], digits[:6, :size, :size] + 50)


def test_cifar10(tmp_path, monkeypatch):
    """Images are (N, 32, 32, 3) as torchvision holds them, with labels; at 16 they are resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    of_test = pixels[::-1][:5]

    class CIFAR10:
        def __init__(self, root, train, download):
            self.data = pixels if train else of_test
            self.targets = [i % 10 for i in range(20)] if train else [9, 8, 7, 6, 5]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    monkeypatch.setitem(common.COUNTS, "cifar10", (20, 5, ""))
    images = load_images("cifar10", tmp_path)
    assert images.shape == (3, 32, 32) and images.augment
    assert np.array_equal(images.train[:], pixels[images.train.index])
    assert np.array_equal(images.test, of_test)
    assert np.array_equal(images.labels["valid"], images.valid.index % 10)
    assert images.labels["test"].tolist() == [9, 8, 7, 6, 5]
    small = load_images("cifar10", tmp_path, 16)
    assert small.shape == (3, 16, 16)
    assert abs(small.test.mean((1, 2)) - images.test.mean((1, 2))).max() < 5


def test_stl10(tmp_path, monkeypatch):
    """Channels-first 96 x 96 becomes channels-last 32 x 32; train is train+unlabeled; no labels."""
    parts = []

    class STL10:
        def __init__(self, root, split, download):
            parts.append(split)
            count = 4 if split == "test" else 20
            colour = np.array([10, 100, 200], np.uint8)[None, :, None, None]
            self.data = np.broadcast_to(colour, (count, 3, 96, 96))

    monkeypatch.setattr(torchvision.datasets, "STL10", STL10)
    monkeypatch.setitem(common.COUNTS, "stl10", (20, 4, ""))
    images = load_images("stl10", tmp_path)
    assert parts == ["train+unlabeled", "test"] and images.labels is None
    assert images.shape == (3, 32, 32)
    assert len(images.train) + len(images.valid) == 20 and len(images.test) == 4
    assert (images.train[:] == [10, 100, 200]).all() and (images.test == [10, 100, 200]).all()


def test_imagenette(tmp_path, monkeypatch):
    """Pictures of 160 on the shorter side become 64 x 64, with their class.

    The validation part is the test split.
    """
    calls = []

    class Imagenette:
        def __init__(self, root, split, size, download):
            calls.append((split, size, download))
            self._samples = []
            for i in range(5 if split == "val" else 20):
                path = root / "imagenette2-160" / split / f"{i}.JPEG"
                write_grey(path, i + 50, 160, 213)
                self._samples.append((str(path), i % 10))

    monkeypatch.setattr(torchvision.datasets, "Imagenette", Imagenette)
    monkeypatch.setitem(common.COUNTS, "imagenette", (20, 5, ""))
    images = load_images("imagenette", tmp_path)
    assert calls == [("train", "160px", True), ("val", "160px", True)]
    assert images.shape == (3, 64, 64) and len(images.test) == 5
    assert (images.train[:] == images.train.index[:, None, None, None] + 50).all()
    assert np.array_equal(images.labels["train"], images.train.index % 10)


def test_a_failed_download_is_a_user_error(tmp_path, monkeypatch):
    """The message names the dataset, the folder, and the cause: no network, a wrong checksum."""
    for failure in (OSError("no route to host"), RuntimeError("File not found or corrupted.")):
        monkeypatch.setattr(torchvision.datasets, "MNIST", failing("MNIST", failure))
        with pytest.raises(UserError, match=f"downloading MNIST .*{failure}") as error:
            load_images("mnist", tmp_path)
        assert str(tmp_path) in str(error.value)
        assert not (tmp_path / "mnist-32").exists()


# ---- load_images: celeba, celebahq, lsun ---------------------------------------------------------

@pytest.fixture
def celeba(monkeypatch):
    """20 training and 5 test pictures of 178 x 218, in place of torchvision's class.

    Inside the crop (top 40, left 15, side 148) picture number i has value 60 + 4 i, its top left
    quarter 20; outside it is white. Attribute 0 is set on even numbers, attribute 39 on all.
    """

    class CelebA:
        def __init__(self, root, split, download):
            assert download and split in ("train", "test")
            numbers = torch.arange(20) if split == "train" else torch.arange(25, 30)
            self.attr = torch.zeros(len(numbers), 40, dtype=torch.long)
            self.attr[:, 0] = numbers % 2 == 0
            self.attr[:, 39] = 1
            self.filename = [f"{number:06}.jpg" for number in numbers.tolist()]
            for number, file in zip(numbers.tolist(), self.filename):
                image = torch.full((3, 218, 178), 255, dtype=torch.uint8)
                image[:, 40:188, 15:163] = 60 + 4 * number
                image[:, 40:114, 15:89] = 20
                write(root / "celeba" / "img_align_celeba" / file, image, quality=100)

    monkeypatch.setattr(torchvision.datasets, "CelebA", CelebA)
    monkeypatch.setitem(common.COUNTS, "celeba", (20, 5, ""))


def test_celeba(celeba, tmp_path):
    """It has its official partition, the crop of the paper, and 40 binary attributes."""
    images = load_images("celeba", tmp_path)
    assert images.shape == (3, 64, 64) and not images.augment
    assert len(images.train) + len(images.valid) == 20 and len(images.test) == 5
    splits = {"train": (images.train[:], images.train.index),
              "valid": (images.valid[:], images.valid.index),
              "test": (images.test, np.arange(25, 30))}
    for split, (array, numbers) in splits.items():
        array = array.astype(int)
        values = (60 + 4 * numbers)[:, None, None, None]
        assert abs(array[:, 36:, 2:-2] - values).max() <= 3
        assert abs(array[:, 2:29, 2:29] - 20).max() <= 3
        assert array[:, 0, 33:].max() < 235 and array[:, :, -1].max() < 235  # no white frame
        labels = images.labels[split]
        assert labels.shape == (len(numbers), 40) and labels.dtype == np.uint8
        assert np.array_equal(labels[:, 0], numbers % 2 == 0)
        assert not labels[:, 1:39].any() and labels[:, 39].all()


def test_celeba_that_cannot_be_downloaded_says_what_to_put_where(tmp_path, monkeypatch):
    """The host's daily quota is often used up: the message has a place for files got by hand."""
    failure = RuntimeError("quota")
    monkeypatch.setattr(torchvision.datasets, "CelebA", failing("CelebA", failure))
    with pytest.raises(UserError, match="quota") as error:
        load_images("celeba", tmp_path)
    assert str(tmp_path / "celeba") in str(error.value) and "img_align_celeba" in str(error.value)


@pytest.mark.parametrize("name, says", [("celebahq", "the 30,000 images"), ("lsun", "bedrooms")])
def test_folders_that_nobody_may_pass_on(tmp_path, name, says):
    """Without images the message says what belongs where; of faces the last by name are test."""
    with pytest.raises(UserError, match=says) as error:
        load_images(name, tmp_path, 16)
    assert f"{tmp_path / name}, which holds 0 images" in str(error.value)
    for i in range(60):
        write_grey(tmp_path / name / f"{i:05}.png", 2 * i, 20, 20)
    images = load_images(name, tmp_path, 16)
    assert len(images.test) == (2 if name == "celebahq" else 6)
    if name == "celebahq":
        assert images.test[:, 0, 0, 0].tolist() == [116, 118]


# ---- what broke once -----------------------------------------------------------------------------

@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.5])
def test_a_uniform_draw_of_exactly_zero_is_no_outlier(mean, monkeypatch):
    """torch.rand returns 0 once in 2^24 draws, and logit(0) = -inf would make that pixel black."""
    params = torch.zeros(1, 30, 2, 2)
    params[:, 10:20] = mean
    scales_of(params, 1).fill_(-5)  # narrow around the mean
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert (Dmol(params, 1).sample() - mean).abs().max() < 0.15


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY"])
@pytest.mark.parametrize("name", ["train.npy", "test-labels.npy"])
def test_an_empty_or_cut_file_is_named(small_shapes, tmp_path, name, content):
    """A full disk leaves such files behind."""
    load_images("shapes", tmp_path, 16)
    (tmp_path / "shapes-16" / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_images("shapes", tmp_path, 16)


def test_labels_of_another_length_are_refused(small_shapes, tmp_path):
    """There must be a row of labels for each image."""
    load_images("shapes", tmp_path, 16)
    np.save(tmp_path / "shapes-16" / "train-labels.npy", np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="train-labels.npy"):
        load_images("shapes", tmp_path, 16)


@pytest.mark.parametrize("error", [
    OSError(), Exception("too many users have viewed this file"), EOFError("cut")])
def test_any_failure_of_a_download_is_one_line(monkeypatch, tmp_path, error):
    """The helpers that torchvision calls raise errors of many kinds, some without a text."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", failing("CIFAR10", error))
    with pytest.raises(UserError, match="downloading CIFAR10"):
        load_images("cifar10", tmp_path)


# ---- metrics of pictures -------------------------------------------------------------------------

def inception_weights():
    """Random weights in pytorch-fid's format.

    They are from numpy's legacy generator, whose numbers never change.
    """
    rng = np.random.RandomState(0)
    net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, value in net.state_dict().items():
        shape = tuple(value.shape)
        if value.dim() > 1:
            sd = (2 / value[0].numel()) ** 0.5
            value.copy_(torch.from_numpy(rng.standard_normal(shape) * sd))
        elif name.endswith(("bn.weight", "running_var")):
            value.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, shape)))
        elif value.dim() == 1:
            value.copy_(torch.from_numpy(rng.uniform(-0.2, 0.2, shape)))
    return net.state_dict()


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    """The file of these weights."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights_path):
    """The network with these weights."""
    return common.InceptionFeatures(weights_path)


def test_inception_equals_the_reference_packages(inception):
    """Two 32x32 images have the numbers of torch-fidelity 0.4.0, one of 299x299 pytorch-fid's.

    (pytorch-fid 0.3.0, given (u8 - 128) / 128.) Both were run with the weights above. At 299
    nothing is resized; what is smaller torch-fidelity enlarges as TensorFlow 1 did.
    """
    rng = np.random.RandomState(1)
    small = torch.from_numpy(rng.randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    large = torch.from_numpy(rng.randint(0, 256, (2, 3, 299, 299)).astype(np.uint8))
    columns = [0, 400, 900, 1400, 1900, 2047]
    classes = [0, 200, 400, 600, 800, 1007]
    of_small, logits = inception(small)
    of_large, _ = inception(large[:1])
    assert_near(of_small[:, columns], [
        [13.782585, 0.3956869, 0.0422434, 0.1426899, 0.0, 7.4875174],
        [13.283102, 0.2881336, 0.0315481, 0.1301389, 0.0, 7.6647468]])
    assert_near(logits[:, classes], [
        [-5.9029093, -16.189686, -4.0352182, -27.289768, -6.4560604, 2.2644403],
        [-6.0230346, -16.387669, -4.2666497, -27.487167, -6.461203, 2.258016]])
    assert_near(of_large[:, columns], [
        [24.13364, 0.4199352, 0.0926508, 0.1490372, 0.0, 12.136705]])


def assert_near(values, expected):
    """To the digits that are printed here."""
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_loading_inception_draws_no_random_numbers(weights_path):
    """A run with --fid, and a resumed one, has the noise of one without."""
    before = torch.get_rng_state()
    common.InceptionFeatures(weights_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_of_one_image(inception):
    """Neither the rest of the batch nor autocast changes them.

    A grey image is one with three equal channels.
    """
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    together, _ = inception(images)
    with torch.autocast("cpu", torch.bfloat16):
        alone, _ = inception(images[1:2].expand(-1, 3, -1, -1))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-4)
    assert not together.requires_grad and inception.training is False


def test_statistics_are_streamed(inception, monkeypatch):
    """Mean, covariance and probabilities of all images do not depend on the size of the batches."""
    def pixels_and_logits(self, x):
        pixels = x.flatten(1).float()
        return pixels, pixels / 100

    monkeypatch.setattr(common.InceptionFeatures, "forward", pixels_and_logits)
    images = torch.randint(256, (20, 1, 2, 3), dtype=torch.uint8)
    pixels = images.flatten(1).double()
    for size in (20, 7, 1):
        mean, cov, probabilities = common.feature_statistics(inception, images.split(size))
        torch.testing.assert_close(mean, pixels.mean(0))
        torch.testing.assert_close(cov, torch.cov(pixels.T))
        torch.testing.assert_close(probabilities, (pixels / 100).softmax(1).float())


def random_covariance(n, rank):
    """A matrix (n, n) of that rank with no negative eigenvalue."""
    A = torch.randn(n, rank, dtype=torch.float64)
    return A @ A.T / n


def test_frechet_distance_of_closed_cases():
    """With equal covariances it is the squared distance of the means.

    With diagonal ones it is Σ (σ₁ - σ₂)², in one dimension (μ₁ - μ₂)² + (σ₁ - σ₂)².
    """
    torch.manual_seed(0)
    distance = common.frechet_distance
    mean1 = torch.randn(30).double()
    mean2 = torch.randn(30).double()
    cov = random_covariance(30, 30)
    squares = (mean1 - mean2).square().sum().item()
    assert distance(mean1, cov, mean2, cov) == pytest.approx(squares, rel=1e-9)
    assert distance(mean1, cov, mean1, cov) == pytest.approx(0, abs=1e-9)
    assert math.isnan(distance(mean1 * math.nan, cov, mean2, cov))  # not 0, the best of all

    sd1 = torch.rand(30).double()
    sd2 = torch.rand(30).double()
    squares = (sd1 - sd2).square().sum().item()
    of_diagonals = distance(mean1, sd1.diag() ** 2, mean1, sd2.diag() ** 2)
    assert of_diagonals == pytest.approx(squares, rel=1e-9)

    one = torch.ones(1).double()
    in_one_dimension = distance(1 * one, 4 * one.diag(), 3 * one, 9 * one.diag())
    assert in_one_dimension == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)

    for rank in range(1, 31):
        cov = random_covariance(30, rank)
        assert distance(mean1, cov, mean1, cov) >= 0


def test_frechet_distance_is_computed_in_float64():
    """The statistics that come in may be fp32; the root of a product would lose their digits."""
    torch.manual_seed(0)
    mean1 = torch.randn(30)
    mean2 = torch.randn(30)
    cov = random_covariance(30, 5).float()
    of_fp32 = common.frechet_distance(mean1, cov, mean2, cov)
    same = common.frechet_distance(mean1.double(), cov.double(), mean2.double(), cov.double())
    assert of_fp32 == pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize("n, rank", [(12, 12), (40, 40), (40, 7), (200, 20)])
def test_frechet_distance_against_another_formula(n, rank):
    """tr (Σ₁Σ₂)^½ is that of the complex eigenvalues of the product, which is not symmetric.

    So it is where there are fewer samples than features.
    """
    torch.manual_seed(n + rank)
    cov1 = random_covariance(n, rank)
    cov2 = random_covariance(n, rank)
    mean1 = torch.randn(n).double()
    mean2 = torch.randn(n).double()
    values = torch.linalg.eigvals(cov1 @ cov2)
    root = values[values.abs() > 1e-10].sqrt().real.sum()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root
    there = common.frechet_distance(mean1, cov1, mean2, cov2)
    back = common.frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(expected.item(), rel=1e-5)
    assert back == pytest.approx(expected.item(), rel=1e-5)


def test_inception_score_of_known_predictions():
    """One-hot predictions, all classes as often, have the number of classes; equal ones have 1.

    Two images have exp of the mean KL to their mean, by hand.
    """
    score = common.inception_score
    assert score(torch.eye(8).repeat(10, 1)) == pytest.approx((8, 0))
    assert score(torch.full((30, 8), 1 / 8)) == pytest.approx((1, 0))
    never_the_third = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert score(never_the_third, splits=1) == pytest.approx((2, 0))
    two = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    kl_first = 0.9 * math.log(0.9 / 0.65) + 0.1 * math.log(0.1 / 0.35)
    kl_second = 0.4 * math.log(0.4 / 0.65) + 0.6 * math.log(0.6 / 0.35)
    expected = math.exp((kl_first + kl_second) / 2)
    assert score(two, splits=1) == pytest.approx((expected, 0), rel=1e-6)
    assert score(two) == (1, 0)  # no more parts than images


def test_inception_metrics_of_a_set_against_itself_and_another(monkeypatch):
    """FID is 0 and above 0, and beside it stands how many images it is of; a few give a warning."""
    def fake(x):
        pixels = x.flatten(1)
        surely = 100.0 * torch.nn.functional.one_hot(pixels[:, 0].long() % 2, 2)
        return pixels.float(), surely

    images = torch.randint(256, (50, 1, 2, 2), dtype=torch.uint8)
    references = {"train": common.feature_statistics(fake, [images]),
                  "test": common.feature_statistics(fake, [images[:20] // 2])}
    with pytest.warns(UserWarning, match="10,000"):
        results = common.inception_metrics(fake, images.split(9), references)
    assert results["fid_train"] == pytest.approx(0, abs=1e-6) and results["fid_test"] > 100
    counts = [results[f"fid_{split}images"] for split in ("", "train_", "test_")]
    assert counts == [50, 50, 20]
    assert 1.5 < results["inception_score"] < 2 and results["inception_score_sd"] > 0


def test_reference_is_all_of_train_and_test(small_shapes, tmp_path):
    """Else FID to "train" would lack the validation images, and not be that of the papers."""
    images = load_images("shapes", tmp_path, 16)
    seen = []

    def fake(x):
        seen.append(x)
        return x.flatten(1).float(), x.flatten(1).float()

    statistics = common.reference_statistics(fake, images, "cpu")
    assert len(statistics["train"][2]) == len(images.train) + len(images.valid)
    assert len(statistics["test"][2]) == len(images.test)
    folder = tmp_path / "shapes-16"
    stored = np.concatenate([np.load(folder / "train.npy"), np.load(folder / "test.npy")])
    assert np.array_equal(torch.cat(seen).permute(0, 2, 3, 1).numpy(), stored)


def test_draws_are_as_many_as_asked_for():
    """They come as pixel values, 100 at a time."""
    class Model:
        def sample(self, n):
            return torch.full((n, 1, 2, 2), 1 / 255)

    batches = list(common.sample_batches(Model(), 250))
    assert [len(x) for x in batches] == [100, 100, 50]
    assert (torch.cat(batches) == 128).all()


def test_pixel_distance_by_hand():
    """Black and white differ by one for each value, half a unit in one of twelve is a quarter."""
    black = torch.full((2, 3, 2, 2), -1.0)
    assert common.pixel_distance(black, -black).tolist() == [12, 12]
    x = torch.zeros(1, 3, 2, 2)
    y = x.clone()
    y[0, 1, 0, 1] = 1
    assert common.pixel_distance(x, y).item() == 0.25


def test_vgg_features_are_relu4_3(tmp_path):
    """They are the output of the third ReLU of the fourth group, of normalised images.

    Bf16 autocast changes nothing; the distance is a mean.
    """
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.device("meta"):
        net = torchvision.models.vgg16().eval()
    weights = {}
    for name, value in net.state_dict().items():
        if name.startswith("features"):
            weights[name] = 0.05 * torch.randn(value.shape)
        else:  # the classifier is 120 million numbers, and not used
            weights[name] = torch.zeros(1).expand(value.shape)
    net.load_state_dict(weights, assign=True)
    torch.save(weights, tmp_path / "vgg.pth")
    vgg = common.VGGFeatures(tmp_path / "vgg.pth")

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    h = ((x + 1) / 2 - mean) / sd
    relus = 0
    with torch.no_grad():
        for layer in net.features:
            h = layer(h)
            relus += isinstance(layer, torch.nn.ReLU)
            if relus == 2 + 2 + 3 + 3:
                break
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(vgg(x), h)
    assert h.shape == (2, 512, 4, 4)
    distance = common.perceptual_distance(vgg, x[:1], x[1:])
    expected = (h[0] - h[1]).square().mean()
    assert distance.tolist() == [pytest.approx(expected.item(), rel=1e-4)]


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    """The file is kept, its hash is that of its name; one with another hash is refused."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    source = tmp_path / f"net-{digest}.pth"
    source.write_bytes(b"weights")
    url = source.as_uri()
    assert common.weights_file(url).read_bytes() == b"weights"
    wrong = tmp_path / "net-00000000.pth"
    source.rename(wrong)
    assert common.weights_file(url) == hub / "checkpoints" / f"net-{digest}.pth"  # not again
    with pytest.raises(UserError, match="net-00000000.pth"):
        common.weights_file(wrong.as_uri())
    assert [path.name for path in (hub / "checkpoints").iterdir()] == [f"net-{digest}.pth"]


def no_network(*arguments, **options):
    """In place of a download."""
    raise OSError("no network")


def test_lpips_by_hand(tmp_path):
    """Five ReLUs, features of length 1, a weight for each channel, mean over pixels; or an error.

    Random weights, in the two files' formats; the distance of an image to itself is 0.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    state = {}
    for name, weight in net.state_dict().items():  # the classifier's 120 million are never used
        if name.startswith("features"):
            state[name] = 0.05 * torch.randn(weight.shape)
        else:
            state[name] = torch.zeros(1).expand(weight.shape)
    net.load_state_dict(state, assign=True)
    torch.save(state, tmp_path / "vgg16.pth")
    weights = {}
    for i, channels in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    torch.save(weights, tmp_path / "vgg.pth")
    lpips = common.LPIPS(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        h = (torch.cat([x, y]) / 2 + 0.5 - mean) / sd
        of_layers = []
        for layer in net.features:
            pooled = isinstance(layer, torch.nn.MaxPool2d)
            if pooled:
                of_layers.append(h.clone())
            h = layer(h)
        expected = torch.zeros(2)
        for h, weight in zip(of_layers, weights.values()):
            unit = h / h.square().sum(1, keepdim=True).sqrt()
            expected += (weight * (unit[:2] - unit[2:]).square()).sum(1).mean((1, 2))
        torch.testing.assert_close(lpips(x, y), expected)
        assert (lpips(x, x) == 0).all()
    with pytest.raises(UserError, match="holds no weights of LPIPS"):
        common.LPIPS(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    weights["lin1.model.1.weight"] = torch.rand(1, 192, 1, 1)  # as AlexNet's
    torch.save(weights, tmp_path / "alex.pth")
    with pytest.raises(UserError, match="holds no weights of LPIPS"):
        common.LPIPS(tmp_path / "vgg16.pth", tmp_path / "alex.pth")


def squared_distance(x, y):
    """In place of a perceptual one."""
    return (x - y).square().sum(1)


def test_path_length_of_a_linear_decoder():
    """E‖A (z_2 - z_1)‖² = 2 tr(AAᵀ) on lines; of lengths alike, as 1 % at either end is left out.

    An arc between orthogonal codes of length √L has length π/2 √L.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        A = torch.linalg.qr(torch.randn(500, 500))[0] * 3  # so that all lengths are nearly alike
        length = common.path_length(lambda z: (z @ A.T)[:, :, None, None],
                                    lambda x, y: squared_distance(x, y).flatten(), 500, 400, "cpu",
                                    between=torch.lerp)
        assert length == pytest.approx(2 * A.square().sum().item(), rel=0.01)
        arc = common.path_length(lambda z: z[:, :, None, None],
                                 lambda x, y: squared_distance(x, y).flatten(), 500, 400, "cpu")
        assert arc == pytest.approx((math.pi / 2)**2 * 500, rel=0.02)
    finally:
        torch.set_default_dtype(torch.float32)


def test_path_length_leaves_out_outliers():
    """Else one broken image of hundred decides: 2 of 200 are far away."""
    seen = []

    def distance(x, y):
        far = torch.zeros(len(x))
        if not seen:
            far[:2] = 1e9
        seen.append(len(x))
        return (1 + far) * 1e-8

    length = common.path_length(lambda z: z[:, :, None, None], distance, 4, 220, "cpu")
    assert seen == [50, 50, 50, 50, 20] and length == pytest.approx(1)
    assert common.path_length(lambda z: z[:, :, None, None], distance, 4, 1, "cpu") > 0


def test_path_length_is_not_in_tf32():
    """Else a GPU rounds to 10 bits, and the differences of 10⁻⁴ are noise."""
    seen = []

    def decode(z):
        seen.append(torch.backends.cudnn.allow_tf32)
        return z[:, :, None, None]

    common.path_length(decode, lambda x, y: (x - y).square().sum((1, 2, 3)), 4, 2, "cpu")
    assert seen == [False, False]


def test_arcs_between_codes():
    """Ends are the codes; in the middle an arc keeps the length that a line loses."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 50, 400)
    ends = torch.zeros(50, 1), torch.ones(50, 1)
    torch.testing.assert_close(common.slerp(z1, z2, ends[0]), z1)
    torch.testing.assert_close(common.slerp(z1, z2, ends[1]), z2)
    middle = common.slerp(z1, z2, 0.5 * ends[1])
    assert middle.norm(dim=1).mean().item() == pytest.approx(20, rel=0.03)
    assert torch.lerp(z1, z2, 0.5).norm(dim=1).mean().item() < 15


@pytest.mark.parametrize("Network, url", [
    (common.InceptionFeatures, common.INCEPTION_URL), (common.VGGFeatures, common.VGG_URL)])
def test_offline_one_line_names_file_address_and_place(Network, url, tmp_path, monkeypatch, capsys):
    """So it does where a file is there but damaged, or of another network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert common.load_network(Network, url, "FID", "cpu") is None
    out = capsys.readouterr().out
    place = tmp_path / "checkpoints" / url.split("/")[-1]
    assert out.count("\n") == 1 and url in out and str(place) in out
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    for content in (b"no weights", (tmp_path / "foreign.pth").read_bytes()):
        place.write_bytes(content)
        with pytest.raises(UserError, match="is missing, damaged or holds no weights of"):
            Network(place)
        assert common.load_network(Network, url, "FID", "cpu") is None
        assert str(place) in capsys.readouterr().out


# ---- Sheets --------------------------------------------------------------------------------------

def ink(sheet):
    """Where a sheet, uint8 (H, W, 3), is dark: text, since these pictures are white -> (H, W)."""
    return (sheet < 128).all(2)


def test_a_sheet_names_its_rows(tmp_path):
    """Each row has its name at the left, the sheet its title above; wide names make it wider."""
    white = torch.ones(17, 1, 16, 16)
    common.save_sheet(tmp_path / "a" / "sheet.png", "title", {"x": white, "x̂ from y_1": white})
    sheet = np.asarray(Image.open(tmp_path / "a" / "sheet.png").convert("RGB"))
    step = 64 + common.GAP
    assert sheet.shape[0] == common.SHEET_TOP + 4 * step  # two rows of each, one image left over
    text = ink(sheet)
    assert text[:common.SHEET_TOP].any() and not text[:, -8 * step:][common.SHEET_TOP:].any()
    names = text[common.SHEET_TOP:, :-8 * step].reshape(4, step, -1).sum((1, 2))
    assert (names[0], names[1]) == (names[2], names[3]) and 0 < names[0] < names[1]

    common.save_sheet(tmp_path / "one.png", 200 * "title ", {"x": white})
    sheet = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    text = ink(sheet)
    assert not text[:, -4:].any() and text[:, -60:].any()  # the title is not cut off
    names = text[common.SHEET_TOP:, :-8 * step].reshape(2, step, -1).sum((1, 2))
    assert names[0] > 0 == names[1]  # one name for all rows


def test_a_sheet_shows_true_pixels(tmp_path):
    """Row i of every set, then row i + 1 of every set; grey becomes RGB of equal channels."""
    for channels, side in ((1, 8), (3, 24), (3, 64)):
        first = noise_batch(5, channels, side)
        second = noise_batch(5, channels, side)
        common.save_sheet(tmp_path / "sheet.png", "", {"a": first, "b": second}, columns=2)
        rows = torch.stack([first[:2], second[:2], first[2:4], second[2:4]])
        expected = to_uint8(rows).permute(0, 1, 3, 4, 2).expand(-1, -1, -1, -1, 3)
        assert np.array_equal(pictures_on(tmp_path / "sheet.png", side, 2), expected)


@pytest.mark.parametrize("channels, side, sets, rows, columns", [
    (3, 16, 1, 8, 8), (3, 32, 2, 10, 8), (3, 64, 1, 3, 8), (3, 64, 6, 6, 4), (3, 128, 4, 4, 4),
    (1, 64, 1, 8, 8), (1, 64, 6, 6, 8)])
def test_a_sheet_is_no_large_file(channels, side, sets, rows, columns, tmp_path):
    """Of noise, the worst case, it has fewer rows, then fewer columns; from 128 on it is larger."""
    noise = noise_batch(64, channels, side)
    path = tmp_path / "sheet.png"
    common.save_sheet(path, "t", {str(i): noise for i in range(sets)})
    assert pictures_on(path, side, columns).shape[:2] == (rows, columns)
    assert path.stat().st_size < 330_000 or side > 64


def test_columns_that_mean_something_are_kept(tmp_path):
    """Else a line from one image to another would end before the other."""
    common.save_sheet(tmp_path / "sheet.png", "t", {"along z": noise_batch(64, 3, 128)},
                      keep_columns=True)
    assert pictures_on(tmp_path / "sheet.png", 128).shape[:2] == (1, 8)


def noise_batch(count, channels, side):
    """Images of uniform noise in [-1, 1]."""
    return 2 * torch.rand(count, channels, side, side) - 1


# ---- The log -------------------------------------------------------------------------------------

def rows_of(*values):
    """What a training gathers of steps with these values of its one term."""
    return [{"re_x": torch.tensor(value)} for value in values]


def test_mean_over_steps():
    """A step that is not finite is named, with its values."""
    assert common.mean_over_steps(rows_of(1.0, 2.0, 6.0), 30) == {"re_x": 3.0}
    with pytest.raises(FloatingPointError, match=r"step 29 is not finite, {'re_x': nan}"):
        common.mean_over_steps(rows_of(1.0, math.nan, 6.0), 30)


def test_log_rows_and_lines(tmp_path, capsys):
    """A bound is logged in nats with its bits per dimension, and shown in bits.

    Other values are logged and shown as they are.
    """
    state = {"step": 4, "seconds": 2.0}
    nats = 5 * math.log(2)
    common.log_row(tmp_path, state, "valid", {"re_x": 2 * nats, "kl_z": nats}, dims=5)
    common.log_row(tmp_path, state, "valid", {"kl": 3.0})
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    bound, other = map(json.loads, lines)
    assert bound == {"step": 4, "split": "valid", "bpd": pytest.approx(3.0), "re_x": 2 * nats,
                     "kl_z": nats, "seconds": 2.0}
    assert other == {"step": 4, "split": "valid", "kl": 3.0, "seconds": 2.0}
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 4  valid  bpd 3.0000 = re_x 2.000 + kl_z 1.000"
    assert second == "step 4  valid  kl 3"


def test_progress_line(tmp_path, capsys, monkeypatch):
    """60 images in 30 seconds are 2 a second; half of the steps are done, so as much is left."""
    monkeypatch.setattr(common.time, "perf_counter", lambda: 100.0)
    state = {"step": 5, "seconds": 30.0, "start": 40.0}
    common.log_training(tmp_path, state, 10, rows_of(1.0, 1.0, 1.0), 20)
    assert state == {"step": 5, "seconds": 60.0, "start": 40.0}
    assert capsys.readouterr().out == "step 5  train  re_x 1  2 img/s  0:01:00 < 0:01:00\n"


def test_curves_of_a_resumed_run(tmp_path):
    """Of a step that stands twice the later line counts; a line cut short is left out."""
    lines = [{"step": 1, "split": "train", "bpd": 9.0}, {"step": 2, "split": "train", "bpd": 8.0},
             {"step": 2, "split": "train", "bpd": 7.0}, {"step": 2, "split": "valid", "bpd": 6.0}]
    assert common.curve_of(lines, "bpd", "train") == ([1, 2], [9.0, 7.0])
    many = [{"step": step, "split": "train", "bpd": 0.0} for step in range(1, 101)]
    assert common.curve_of(many, "bpd", "train")[0] == list(range(3, 101))
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '\n{"step": 3, "spl', encoding="utf-8")
    common.draw_curves(tmp_path, ["bpd"])
    common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


class Slow:
    """A model whose log-weights are noise."""

    def log_weights(self, x, samples):
        return torch.randn(samples, len(x))


def test_long_evaluations_tell_of_their_progress(monkeypatch, capsys):
    """Images done, time spent < time left, after two seconds and then every ten, not at the end."""
    times = iter([0, 6, 12, 18, 24, 30, 60])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(times))
    batches = common.Batches(np.zeros((11, 2, 2, 1), np.uint8), 2, "cpu")
    common.importance_weighted(Slow(), batches, 4, 12)
    assert capsys.readouterr().out.splitlines() == [
        "importance-weighted bound, 4 samples: 2 of 11 images  0:00:06 < 0:00:27",
        "importance-weighted bound, 4 samples: 6 of 11 images  0:00:18 < 0:00:15",
        "importance-weighted bound, 4 samples: 10 of 11 images  0:00:30 < 0:00:03"]


# ---- The linear probe ----------------------------------------------------------------------------

def test_probe_on_known_cases(monkeypatch):
    """Classes that one feature separates have no errors; for unrelated labels half are wrong.

    The errors are those of the test set, and the interval is Student's.
    """
    torch.manual_seed(0)
    labels = torch.randint(2, (2000,))
    x = torch.randn(2000, 4)
    x[:, 2] += 20 * labels
    x[:, 3] = 5  # a constant is no division by 0
    train = (x[:1500], labels[:1500])
    assert common.linear_probe(*train, x[1500:], labels[1500:], epochs=30) == (0, 0)
    assert common.linear_probe(*train, x[1500:], 1 - labels[1500:], epochs=30) == (100, 0)
    unrelated = (torch.randn(1500, 4), labels[:1500], torch.randn(500, 4), labels[1500:])
    error, half_width = common.linear_probe(*unrelated, epochs=2)
    assert 40 < error < 60 and 0 < half_width < 10

    def errors_of_five_parts(errors):
        return torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    monkeypatch.setattr(torch, "stack", errors_of_five_parts)
    result = common.linear_probe(x[:10], labels[:10], x[10:20], labels[10:20], epochs=1)
    assert result == pytest.approx((3, 1.963), abs=1e-3)
