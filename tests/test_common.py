"""common.py by worked examples: pixels, the mixture of logistics, metrics, sheets, the log."""

import hashlib
import math

import common
import numpy as np
import pytest
import torch
import torchvision
from common import Batches, Dmol, UserError, dmol_channels, from_uint8, quantize, to_uint8
from conftest import pictures_on, seeded
from PIL import Image

LEVELS = torch.arange(256)


# ---- Pixels --------------------------------------------------------------------------------------

def test_all_256_levels_survive_the_round_trip():
    """uint8 -> float -> uint8 is the identity; the grid runs from -1 to 1 in steps of 2/255."""
    x = from_uint8(LEVELS.to(torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    back = to_uint8(x)
    assert back.dtype == torch.uint8 and torch.equal(back.long(), LEVELS)
    assert torch.equal(quantize(x), x)


def test_any_value_goes_to_the_nearest_level():
    """0.4 of a step aside goes back to the level, 0.6 of a step to its neighbour.

    What is beyond [-1, 1] is clipped.
    """
    x = from_uint8(LEVELS)
    step = 2 / 255
    for share, neighbour in ((0.4, 0), (-0.4, 0), (0.6, 1), (-0.6, -1)):
        expected = (LEVELS + neighbour).clamp(0, 255)
        assert torch.equal(quantize(x + share * step), x[expected])
    assert to_uint8(torch.tensor([-9.0, 9.0, -math.inf, math.inf])).tolist() == [0, 255, 0, 255]


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
    torch.manual_seed(seed)
    params = torch.randn(batch, dmol_channels(channels, mixtures), height, width, dtype=dtype)
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


def test_dmol_channels():
    """M (1 + 2C + C(C-1)/2): 30 for grey and 100 for RGB with ten components, the default."""
    counts = [dmol_channels(1), dmol_channels(3), dmol_channels(2, 1), dmol_channels(4, 5)]
    assert counts == [30, 100, 6, 75]


@pytest.mark.parametrize("params", [
    *[random_params(1, 1, 10, seed) for seed in range(5)],
    *[pixel_params([0.0], [[mean]], [[log_scale]]) for mean, log_scale in (
        (0.0, -7.0), (1.0, -7.0), (30.0, 0.0), (-5.0, 2.0))]])
def test_the_256_probabilities_sum_to_one(params):
    """Those of a grey pixel with ten components and random parameters, and with a single one.

    It may be narrower than a grid step, flat, or have its mean off the grid: the edge bins take
    what lies outside.
    """
    assert all_levels(params).exp().sum().item() == pytest.approx(1, abs=2e-5)


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
    """A plain loop in float64 gives the same for 2 x 3 pixels, both edges and their neighbours too.
    """
    some = torch.tensor([0, 1, 50, 100, 150, 200, 254, 255])
    x = some[seeded(torch.randint, 8, (4, channels, 2, 3))].double() / 127.5 - 1
    params = random_params(4, channels, 3, seed=channels, height=2, width=3, dtype=torch.float64)
    scales_of(params, channels, 3).add_(1)  # -3 … 0: the loop does not underflow
    pixels = x.movedim(1, -1).reshape(24, -1).tolist()
    log_p = []
    for pixel, numbers in zip(pixels, params.movedim(1, -1).flatten(0, 2)):
        log_p.append(math.log(literal_probability(pixel, numbers.view(-1, 3).tolist())))
    expected = torch.tensor(log_p, dtype=torch.float64).view(4, 6).sum(1)
    torch.testing.assert_close(dmol_log_prob(x, params), expected, rtol=0, atol=1e-6)
    in_fp32 = dmol_log_prob(x.float(), params.float())
    torch.testing.assert_close(in_fp32, expected.float(), rtol=0, atol=2e-3)


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


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_values_and_gradients_are_finite_for_any_parameters(size):
    """Parameters have random signs and sizes up to ±1000; pixels include both edges."""
    torch.manual_seed(0)
    x = from_uint8(torch.randint(0, 256, (64, 3, 2, 2)))
    x[0] = -1
    x[1] = 1
    params = size * (2 * torch.rand(64, 100, 2, 2) - 1)
    log_p = dmol_log_prob(x, params.requires_grad_())
    log_p.sum().backward()
    assert log_p.isfinite().all() and (log_p <= 1e-3).all()
    assert params.grad.isfinite().all() and params.grad.abs().sum() > 0


def test_gradients_equal_finite_differences():
    """Autograd agrees with central differences in float64, with an edge level in each image."""
    x = from_uint8(torch.tensor([[0, 100, 255], [255, 0, 30]])).double().reshape(2, 3, 1, 1)
    params = random_params(2, 3, 2, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda params: dmol_log_prob(x, params), (params,), eps=1e-6,
                                    atol=1e-4)


def test_autocast_does_not_touch_the_likelihood():
    """bf16 autocast changes not one bit; bf16 parameters are computed in fp32.

    Float64 stays float64.
    """
    x = from_uint8(torch.arange(3 * 3 * 4).reshape(3, 3, 2, 2) * 7)
    params = random_params(3, 3, 10, seed=0, height=2, width=2)
    half = params.bfloat16()
    plain = dmol_log_prob(x, params)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dmol_log_prob(x, params), plain)
        assert torch.equal(dmol_log_prob(x, half), dmol_log_prob(x, half.float()))
    assert plain.dtype == torch.float32
    assert dmol_log_prob(x, params.double()).dtype == torch.float64


def assert_drawn(counts, probabilities, total, least):
    """Chi-square, Σ (observed - expected)² / expected, is at most 5 sd above its mean.

    Of `total` draws `counts` fell into cells of these probabilities. All the others are one cell
    more, together with those that expect less than 5. Its mean df is at least `least`, its
    variance 2 df.
    """
    expected = probabilities.double() * total
    observed = counts[expected >= 5].double()
    expected = expected[expected >= 5]
    elsewhere = (total - expected.sum()).clamp(min=1)
    statistic = ((observed - expected)**2 / expected).sum()
    statistic += (total - observed.sum() - elsewhere)**2 / elsewhere
    df = len(expected)
    assert df > least and statistic < df + 5 * math.sqrt(2 * df)


def test_grey_samples_have_the_probabilities_that_log_prob_gives():
    """100,000 draws in one image."""
    params = random_params(1, 1, 10, seed=3)
    params[0, 10] = -1.2  # one component near the lower edge, so that the edge bin matters
    draws = to_uint8(seeded(Dmol(params.expand(-1, -1, 250, 400), 1).sample))
    counts = torch.bincount(draws.flatten().long(), minlength=256)
    assert_drawn(counts, all_levels(params).exp(), 100_000, least=60)


def test_rgb_samples_have_the_joint_probabilities_that_log_prob_gives():
    """Two narrow, coupled components; the cells are the colours of 100,000 other draws."""
    means = [[-0.5, 0.5], [0.3, -0.2], [0.1, 0.0]]
    log_scales = [[-5.2, -5.0], [-5.5, -5.2], [-5.3, -5.5]]
    couplings = [[1.0, -1.0], [-0.7, 0.8], [0.6, -0.4]]
    params = pixel_params([0.3, -0.3], means, log_scales, couplings)
    p_x = Dmol(params.expand(-1, -1, 500, 400), 3)
    draws = to_uint8(seeded(p_x.sample))[0].flatten(1).T  # (200000, 3)
    colours = draws[100_000:].unique(dim=0)
    x = from_uint8(colours)[:, :, None, None]
    probabilities = dmol_log_prob(x, params.expand(len(x), -1, 1, 1)).exp()
    assert 0.9 < probabilities.sum() < 1
    numbers = draws.long() @ torch.tensor([65536, 256, 1])
    counts = torch.bincount(numbers[:100_000], minlength=2**24)[numbers[100_000:].unique()]
    assert_drawn(counts, probabilities, 100_000, least=500)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_images_on_the_grid(channels):
    """They are (B, C, H, W), float32, every value one of the 256, for wild parameters too.

    Two draws differ, the same seed gives the same draw, and the mean uses no randomness.
    """
    plausible = random_params(2, channels, 10, seed=5, height=6, width=4)
    wild = 1000 * seeded(torch.randn, 2, dmol_channels(channels), 6, 4)
    for params in (plausible, wild):
        p_x = Dmol(params, channels)
        first = seeded(p_x.sample)
        for x in (first, p_x.mean):
            assert x.shape == (2, channels, 6, 4) and x.dtype == torch.float32
            assert torch.isin(x, from_uint8(LEVELS)).all()
        assert torch.equal(p_x.mean, p_x.mean) and torch.equal(first, seeded(p_x.sample))
    assert not torch.equal(Dmol(plausible, channels).sample(), Dmol(plausible, channels).sample())


def test_mean_of_one_dominating_component():
    """R = 0.2, G = -0.4 + tanh(0.5) R, B = 0.9 + tanh(2) R + tanh(-1) G, each to its nearest level.

    Draws are close to it.
    """
    means = [[0.2, -1.0], [-0.4, -1.0], [0.9, -1.0]]
    couplings = [[0.5, 0.0], [2.0, 0.0], [-1.0, 0.0]]
    p_x = Dmol(pixel_params([50.0, 0.0], means, [[-7.0, 0.0]] * 3, couplings), 3)
    green = -0.4 + math.tanh(0.5) * 0.2
    assert 0.9 + math.tanh(2) * 0.2 + math.tanh(-1) * green > 1  # clipped
    expected = torch.tensor([0.2, green, 1.0])
    assert torch.equal(p_x.mean.flatten(), quantize(expected))
    assert (p_x.sample().flatten() - expected).abs().max() < 4 / 255


@pytest.mark.parametrize("second, expected", [(0.5, 0.25), (9.0, 0.625)])
def test_mean_weighs_the_components(second, expected):
    """Weights 1/4 and 3/4, means -0.5 and 0.5: 0.25.

    A mean of 9 counts as 1, which makes it 1/4 (-0.5) + 3/4 = 0.625.
    """
    params = pixel_params([0.0, math.log(3)], [[-0.5, second]], [[0.0, 0.0]])
    assert Dmol(params, 1).mean.item() == pytest.approx(expected, abs=1 / 255)


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.5])
def test_a_uniform_draw_of_exactly_zero_is_no_outlier(mean, monkeypatch):
    """torch.rand returns 0 once in 2^24 draws, and logit(0) = -inf would make that pixel black."""
    params = pixel_params([0.0], [[mean]], [[-7.0]])
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert (Dmol(params, 1).sample() - mean).abs() < 0.15


# ---- Metrics of likelihoods ----------------------------------------------------------------------

def test_bits_per_dim():
    """8 fair bits for each of 12 dimensions are 96 ln 2 nats."""
    nats = torch.tensor([0, 12, 96]) * math.log(2)
    assert common.bits_per_dim(nats, 12).tolist() == pytest.approx([0, 1, 8])


def test_log_mean_exp():
    """It is log(mean(exp)) along either dimension, and neither overflows nor underflows at ±10,000.
    """
    w = seeded(torch.randn, 5, 3, dtype=torch.float64)
    for dim in (0, 1):
        expected = w.exp().mean(dim).log()
        for far in (0, 1e4, -1e4):
            assert torch.allclose(common.log_mean_exp(w + far, dim) - far, expected, atol=1e-9)
    assert torch.equal(common.log_mean_exp(w), common.log_mean_exp(w, 0))
    assert common.log_mean_exp(torch.tensor([1e4, -1e4])).item() == pytest.approx(1e4 - math.log(2))


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
    log_w = KnownModel.weights.double() / (5 * math.log(2))  # in bits for each of 5 dimensions
    bpd = -KnownModel.weights.double().exp().mean(0).log() / (5 * math.log(2))
    assert result == pytest.approx({
        "iw_bpd": bpd.mean().item(), "iw_bpd_se": bpd.std().item() / math.sqrt(7),
        "iw_elbo_bpd": -log_w.mean().item(), "iw_samples": 2, "iw_images": 7})
    assert result["iw_bpd"] < result["iw_elbo_bpd"]


def test_seconds_to_sample(monkeypatch):
    """Each of five draws takes 2 s by a clock of our own; one before them is not counted."""
    class Model:
        calls = []

        def sample(self, n):
            self.calls.append(n)
            return torch.zeros(n)

    monkeypatch.setattr(common.time, "perf_counter", lambda: 2 * len(Model.calls))
    assert common.seconds_to_sample(Model(), 4, runs=5, limit=60) == 2
    assert Model.calls == [4] * 6


# ---- Metrics of pictures -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights_path(tmp_path_factory):
    """A file of random weights in pytorch-fid's format.

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
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
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
    columns = [0, 400, 2047]
    classes = [0, 400, 1007]
    of_small, logits = inception(small)
    of_large, _ = inception(large[:1])
    values = torch.cat([of_small[:, columns], logits[:, classes], of_large[:, columns]])
    expected = torch.tensor([
        [13.782585, 0.3956869, 7.4875174], [13.283102, 0.2881336, 7.6647468],
        [-5.9029093, -4.0352182, 2.2644403], [-6.0230346, -4.2666497, 2.258016],
        [24.13364, 0.4199352, 12.136705]])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)  # the digits printed here


def test_features_are_of_one_image(inception, weights_path):
    """Neither the rest of the batch nor autocast changes them.

    A grey image is one with three equal channels. Loading the network draws no random numbers, so
    that a run with --fid, and a resumed one, has the noise of one without.
    """
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    together, _ = inception(images)
    with torch.autocast("cpu", torch.bfloat16):
        alone, _ = inception(images[1:2].expand(-1, 3, -1, -1))
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-4)
    assert not together.requires_grad and inception.training is False
    before = torch.get_rng_state()
    common.InceptionFeatures(weights_path)
    assert torch.equal(torch.get_rng_state(), before)


def pixels_and_logits(x):
    """In place of Inception."""
    pixels = x.flatten(1).float()
    return pixels, pixels / 100


def test_statistics_are_streamed():
    """Mean, covariance and probabilities of all images do not depend on the size of the batches."""
    images = torch.randint(256, (20, 1, 2, 3), dtype=torch.uint8)
    pixels = images.flatten(1).double()
    for size in (20, 7, 1):
        mean, cov, probabilities = common.feature_statistics(pixels_and_logits, images.split(size))
        torch.testing.assert_close(mean, pixels.mean(0))
        torch.testing.assert_close(cov, torch.cov(pixels.T))
        torch.testing.assert_close(probabilities, (pixels / 100).softmax(1).float())


def random_covariance(n, rank):
    """A matrix (n, n) of that rank with no negative eigenvalue."""
    A = torch.randn(n, rank, dtype=torch.float64)
    return A @ A.T / n


def test_frechet_distance_of_closed_cases():
    """With equal covariances it is the squared distance of the means, of diagonals Σ (σ₁ - σ₂)²."""
    torch.manual_seed(0)
    distance = common.frechet_distance
    mean1, mean2, sd1, sd2 = torch.rand(4, 30).double()
    cov = random_covariance(30, 30)
    squares = (mean1 - mean2).square().sum().item()
    assert distance(mean1, cov, mean2, cov) == pytest.approx(squares, rel=1e-9)
    assert math.isnan(distance(mean1 * math.nan, cov, mean2, cov))  # not 0, the best of all
    squares = (sd1 - sd2).square().sum().item()
    of_diagonals = distance(mean1, sd1.diag() ** 2, mean1, sd2.diag() ** 2)
    assert of_diagonals == pytest.approx(squares, rel=1e-9)
    for rank in range(1, 31):  # rounding makes none of them negative
        cov = random_covariance(30, rank)
        assert 0 <= distance(mean1, cov, mean1, cov) < 1e-6


@pytest.mark.parametrize("n, rank", [(12, 12), (40, 40), (40, 7), (200, 20)])
def test_frechet_distance_against_another_formula(n, rank):
    """tr (Σ₁Σ₂)^½ is that of the complex eigenvalues of the product, which is not symmetric.

    So it is where there are fewer samples than features.
    """
    torch.manual_seed(n + rank)
    cov1 = random_covariance(n, rank)
    cov2 = random_covariance(n, rank)
    mean1, mean2 = torch.randn(2, n).double()
    values = torch.linalg.eigvals(cov1 @ cov2)
    root = values[values.abs() > 1e-10].sqrt().real.sum()
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root
    for gaussians in ((mean1, cov1, mean2, cov2), (mean2, cov2, mean1, cov1)):
        assert common.frechet_distance(*gaussians) == pytest.approx(expected.item(), rel=1e-5)


def test_inception_score_of_known_predictions():
    """One-hot predictions, all classes as often, have the number of classes; equal ones have 1.

    Two images have exp of the mean KL to their mean, by hand.
    """
    score = common.inception_score
    assert score(torch.eye(8).repeat(10, 1)) == pytest.approx((8, 0))
    assert score(torch.full((30, 8), 1 / 8)) == pytest.approx((1, 0))
    two = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    kl_first = 0.9 * math.log(0.9 / 0.65) + 0.1 * math.log(0.1 / 0.35)
    kl_second = 0.4 * math.log(0.4 / 0.65) + 0.6 * math.log(0.6 / 0.35)
    expected = math.exp((kl_first + kl_second) / 2)
    assert score(two, splits=1) == pytest.approx((expected, 0), rel=1e-6)
    assert score(two) == (1, 0)  # no more parts than images


def test_inception_metrics_of_a_set_against_itself_and_another():
    """FID is 0 and above 0, and beside it stands how many images it is of; a few give a warning.

    The reference is all of train and test: FID to "train" without the validation images would not
    be that of the papers.
    """
    array = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 1), np.uint8)
    index = np.arange(50)
    images = common.Images("a", 2, common.Subset(array, index[:40]),
                           common.Subset(array, index[40:]), array[:20] // 2, None, False)
    references = common.reference_statistics(pixels_and_logits, images, "cpu")
    ours = torch.from_numpy(array).movedim(-1, 1).split(9)
    with pytest.warns(UserWarning, match="10,000"):
        results = common.inception_metrics(pixels_and_logits, ours, references)
    assert results["fid_train"] == pytest.approx(0, abs=1e-6) and results["fid_test"] > 100
    counts = [results[f"fid_{split}images"] for split in ("", "train_", "test_")]
    assert counts == [50, 50, 20]
    assert 1 < results["inception_score"] < 4 and results["inception_score_sd"] > 0


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
    x = torch.full((2, 3, 2, 2), -1.0)
    y = torch.stack([-x[0], x[1]])
    y[1, 1, 0, 1] += 1
    assert common.pixel_distance(x, y).tolist() == [12, 0.25]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """-> the file of random weights, two batches of images, and their features by torchvision.

    Those are what comes before each of the five poolings: ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3, of
    four images.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    weights = {}
    for name, value in net.state_dict().items():
        if name.startswith("features"):
            weights[name] = 0.05 * torch.randn(value.shape)
        else:  # the classifier is 120 million numbers, and not used
            weights[name] = torch.zeros(1).expand(value.shape)
    net.load_state_dict(weights, assign=True)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(weights, path)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    sd = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    h = ((torch.cat([x, y]) + 1) / 2 - mean) / sd
    features = []
    with torch.no_grad():
        for layer in net.features:
            if isinstance(layer, torch.nn.MaxPool2d):
                features.append(h.clone())  # as the ReLU behind works in place
            h = layer(h)
    return path, x, y, features


def test_vgg_features_are_relu4_3(vgg):
    """Of normalised images; bf16 autocast changes nothing. The perceptual distance is a mean."""
    path, x, y, features = vgg
    network = common.VGGFeatures(path)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x), features[3][:2])
    assert features[3].shape == (4, 512, 4, 4)
    expected = (features[3][:2] - features[3][2:]).square().mean((1, 2, 3))
    torch.testing.assert_close(common.perceptual_distance(network, x, y), expected)


def test_lpips_by_hand(vgg, tmp_path):
    """Five ReLUs, features of length 1, a weight for each channel, mean over pixels; or an error.

    The distance of an image to itself is 0.
    """
    path, x, y, features = vgg
    weights = {}
    expected = torch.zeros(2)
    for i, h in enumerate(features):
        weight = torch.rand(1, h.shape[1], 1, 1)
        weights[f"lin{i}.model.1.weight"] = weight
        unit = h / h.square().sum(1, keepdim=True).sqrt()
        expected += (weight * (unit[:2] - unit[2:]).square()).sum(1).mean((1, 2))
    torch.save(weights, tmp_path / "vgg.pth")
    lpips = common.LPIPS(path, tmp_path / "vgg.pth")
    torch.testing.assert_close(lpips(x, y), expected)
    assert (lpips(x, x) == 0).all()
    weights["lin1.model.1.weight"] = torch.rand(1, 192, 1, 1)  # as AlexNet's
    torch.save(weights, tmp_path / "alex.pth")
    for other in (path, tmp_path / "alex.pth"):
        with pytest.raises(UserError, match="holds no weights of LPIPS"):
            common.LPIPS(path, other)


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


def as_image(z):
    """Codes (N, L) -> images (N, L, 1, 1)."""
    return z[:, :, None, None]


def squared_distance(x, y):
    """In place of a perceptual one."""
    return (x - y).square().sum((1, 2, 3))


def test_path_length_of_a_linear_decoder():
    """E‖A (z_2 - z_1)‖² = 2 tr(AAᵀ) on lines; of lengths alike, as 1 % at either end is left out.

    An arc between orthogonal codes of length √L has length π/2 √L.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        A = torch.linalg.qr(torch.randn(500, 500))[0] * 3  # so that all lengths are nearly alike
        length = common.path_length(lambda z: as_image(z @ A.T), squared_distance, 500, 400, "cpu",
                                    between=torch.lerp)
        assert length == pytest.approx(2 * A.square().sum().item(), rel=0.01)
        arc = common.path_length(as_image, squared_distance, 500, 400, "cpu")
        assert arc == pytest.approx((math.pi / 2)**2 * 500, rel=0.02)
    finally:
        torch.set_default_dtype(torch.float32)


def test_path_length_without_outliers_and_tf32():
    """Else one broken image of hundred decides: 2 of 220 are far away.

    In TF32 a GPU rounds to 10 bits, and the differences of 10⁻⁴ are noise.
    """
    seen = []

    def distance(x, y):
        assert not torch.backends.cudnn.allow_tf32
        far = torch.ones(len(x))
        if not seen:
            far[:2] = 1e9
        seen.append(len(x))
        return far * 1e-8

    def decode(z):
        assert not torch.backends.cudnn.allow_tf32
        return as_image(z)

    assert common.path_length(decode, distance, 4, 220, "cpu") == pytest.approx(1)
    assert seen == [50, 50, 50, 50, 20]
    assert common.path_length(decode, distance, 4, 1, "cpu") > 0  # a single one stays


def test_arcs_between_codes():
    """Ends are the codes; in the middle an arc keeps the length that a line loses."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 50, 400)
    start, middle, end = (common.slerp(z1, z2, torch.full((50, 1), t)) for t in (0, 0.5, 1))
    torch.testing.assert_close(start, z1)
    torch.testing.assert_close(end, z2)
    assert middle.norm(dim=1).mean().item() == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("Network, url", [
    (common.InceptionFeatures, common.INCEPTION_URL), (common.VGGFeatures, common.VGG_URL)])
def test_offline_one_line_names_file_address_and_place(Network, url, tmp_path, monkeypatch, capsys):
    """So it does where a file is there but damaged, or of another network."""
    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert common.load_network(Network, url, "FID", "cpu") is None
    out = capsys.readouterr().out
    place = tmp_path / "checkpoints" / url.split("/")[-1]
    assert out.count("\n") == 1 and url in out and str(place) in out
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    for content in (b"no weights", (tmp_path / "foreign.pth").read_bytes()):
        place.write_bytes(content)
        assert common.load_network(Network, url, "FID", "cpu") is None
        out = capsys.readouterr().out
        assert f"{place} is missing, damaged or holds no weights of" in out


# ---- Sheets --------------------------------------------------------------------------------------

def ink(path):
    """Where a sheet is dark, as these pictures are white: above them, and left of each row."""
    dark = (np.asarray(Image.open(path).convert("RGB")) < 128).all(2)
    step = 64 + common.GAP
    assert not dark[common.SHEET_TOP:, -8 * step:].any()
    beside = dark[common.SHEET_TOP:, :-8 * step]
    return dark[:common.SHEET_TOP], beside.reshape(-1, step, beside.shape[1]).sum((1, 2)).tolist()


def test_a_sheet_names_its_rows(tmp_path):
    """Each row has its name at the left, the sheet its title above; wide names make it wider."""
    white = torch.ones(17, 1, 16, 16)
    path = tmp_path / "a" / "sheet.png"
    common.save_sheet(path, "title", {"x": white, "x̂ from y_1": white})
    title, names = ink(path)
    assert title.any() and 0 < names[0] < names[1]
    assert names[2:] == names[:2]  # two rows of each, one image left over
    common.save_sheet(path, 200 * "title ", {"x": white})
    title, names = ink(path)
    assert not title[:, -4:].any() and title[:, -60:].any()  # it is not cut off
    assert names[0] > 0 and names[1:] == [0]  # one name for all rows


def test_a_sheet_shows_true_pixels(tmp_path):
    """Row i of every set, then row i + 1 of every set; grey becomes RGB of equal channels."""
    for channels, side in ((1, 8), (3, 24), (3, 64)):
        first = noise_batch(5, channels, side)
        second = noise_batch(5, channels, side)
        common.save_sheet(tmp_path / "sheet.png", "", {"a": first, "b": second}, columns=2)
        rows = torch.stack([first[:2], second[:2], first[2:4], second[2:4]])
        expected = to_uint8(rows).permute(0, 1, 3, 4, 2).expand(-1, -1, -1, -1, 3)
        assert np.array_equal(pictures_on(tmp_path / "sheet.png", side, 2), expected)


@pytest.mark.parametrize("channels, side, sets, rows, columns, keep_columns", [
    (3, 16, 1, 8, 8, False), (3, 32, 2, 10, 8, False), (3, 64, 6, 6, 4, False),
    (1, 64, 6, 6, 8, False), (3, 128, 1, 1, 8, True)])
def test_a_sheet_is_no_large_file(channels, side, sets, rows, columns, keep_columns, tmp_path):
    """Of noise, the worst case, it has fewer rows, then fewer columns; from 128 on it is larger.

    Columns that mean something, as those of a line from one image to another, are kept.
    """
    noise = noise_batch(64, channels, side)
    path = tmp_path / "sheet.png"
    common.save_sheet(path, "t", {str(i): noise for i in range(sets)}, keep_columns=keep_columns)
    assert pictures_on(path, side, columns).shape[:2] == (rows, columns)
    assert path.stat().st_size < 330_000 or side > 64


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
    bound, other = common.read_log(tmp_path / "log.jsonl")
    assert bound == {"step": 4, "split": "valid", "bpd": pytest.approx(3.0), "re_x": 2 * nats,
                     "kl_z": nats, "seconds": 2.0}
    assert other == {"step": 4, "split": "valid", "kl": 3.0, "seconds": 2.0}
    assert capsys.readouterr().out.splitlines() == [
        "step 4  valid  bpd 3.0000 = re_x 2.000 + kl_z 1.000", "step 4  valid  kl 3"]


def test_progress_line(tmp_path, capsys, monkeypatch):
    """60 images in 30 seconds are 2 a second; half of the steps are done, so as much is left."""
    monkeypatch.setattr(common.time, "perf_counter", lambda: 100.0)
    state = {"step": 5, "seconds": 30.0, "clock": 70.0}
    common.log_training(tmp_path, state, 10, rows_of(1.0, 1.0, 1.0), 20)
    assert state == {"step": 5, "seconds": 60.0, "clock": 100.0}
    assert capsys.readouterr().out == "step 5  train  re_x 1  2 img/s  0:01:00 < 0:01:00\n"


def test_curves_of_a_resumed_run(tmp_path):
    """Of a step that stands twice the later line counts; a line cut short is left out."""
    for step, bpd in ((1, 9.0), (2, 8.0), (2, 7.0)):
        state = {"step": step, "seconds": 1.0}
        common.log_row(tmp_path, state, "train", {"bpd": bpd, "images": 3})
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "spl')
    lines = common.read_log(tmp_path / "log.jsonl")
    assert common.curve_of(lines, "bpd", "train") == ([1, 2], [9.0, 7.0])
    assert common.curve_of(lines, "bpd", "valid") == ([], [])
    common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    many = [{"step": step, "split": "train", "bpd": 0.0} for step in range(1, 101)]
    assert common.curve_of(many, "bpd", "train")[0] == list(range(3, 101))


def test_long_evaluations_tell_of_their_progress(monkeypatch, capsys):
    """Images done, time spent < time left, after two seconds and then every ten, not at the end."""
    times = iter([0, 6, 12, 18, 60])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(times))
    common.importance_weighted(KnownModel(), seven(2), samples=2, dims=1)
    assert capsys.readouterr().out.splitlines() == [
        "importance-weighted bound, 2 samples: 2 of 7 images  0:00:06 < 0:00:15",
        "importance-weighted bound, 2 samples: 6 of 7 images  0:00:18 < 0:00:03"]


# ---- The linear probe ----------------------------------------------------------------------------

def test_probe_on_known_cases(monkeypatch):
    """Classes that one feature separates have no errors, or, if the test's are exchanged, 100 %.

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
    monkeypatch.setattr(torch, "stack", lambda errors: torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    result = common.linear_probe(x[:10], labels[:10], x[10:20], labels[10:20], epochs=1)
    assert result == pytest.approx((3, 1.963), abs=1e-3)
