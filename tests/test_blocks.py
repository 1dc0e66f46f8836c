"""One mixture for each 2x2 block of pixels: the probability, its draws, and what the models do."""

import math

import pytest
import torch
import torch.nn.functional as F
from common import Dmol, dmol_channels, from_uint8, quantize, to_uint8
from selfvae import Config, SelfVAE, downscale, upsample

LEVELS = torch.arange(256)


def parameters(logits, means, scales, couplings, h=1, w=1):
    """Parameters (1, P, h, w) of a Dmol whose every block has these numbers.

    logits (M,), means and scales (n, M), couplings {(c, j): L_cj}, both from 0.
    """
    n = len(means)
    raw = torch.zeros(n, n, dtype=torch.float64)
    for (c, j), value in couplings.items():
        raw[c, j] = value
    rows, columns = torch.tril_indices(n, n, -1)
    scales = torch.as_tensor(scales, dtype=torch.float64)
    numbers = [torch.as_tensor(logits), torch.as_tensor(means).flatten(),
               scales.log().flatten() + 2, raw[rows, columns]]
    numbers = torch.cat([values.double() for values in numbers])
    return numbers.view(1, -1, 1, 1).expand(-1, -1, h, w).clone()


def random_parameters(C, mixtures, h, w, seed=0):
    """(2, P, h, w) in float64, with scales of the size of the range: no value is improbable."""
    generator = torch.Generator().manual_seed(seed)
    P = dmol_channels(C, mixtures, block=2)
    params = 0.5 * torch.randn(2, P, h, w, generator=generator, dtype=torch.float64)
    n = 4 * C
    params[:, mixtures * (1 + n):mixtures * (1 + 2 * n)] += 2
    return params


def noise(C, size, seed=0):
    """(2, C, size, size) of pixel values, each as likely."""
    generator = torch.Generator().manual_seed(seed)
    return from_uint8(torch.randint(256, (2, C, size, size), generator=generator)).double()


def test_parameters_of_a_block():
    """M(1 + 8C) + 4C(4C - 1)/2 numbers: fewer for RGB than four pixels' 400."""
    assert dmol_channels(3, block=2) == 10 * 25 + 66 == 316
    assert dmol_channels(1, block=2) == 10 * 9 + 6


def literal_log_prob(x, params, mixtures):
    """The formula of a block, term by term in Python floats -> a list of B sums.

    Values are numbered as by pixel_unshuffle: all four pixels of a channel, row by row, then those
    of the next.
    """
    B, C, H, W = x.shape
    n = 4 * C
    sums = []
    for b in range(B):
        total = 0.0
        for top in range(0, H, 2):
            for left in range(0, W, 2):
                p = params[b, :, top // 2, left // 2].tolist()
                values = []
                for c in range(C):
                    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        values.append(x[b, c, top + i, left + j].item())
                weights = [math.exp(logit) for logit in p[:mixtures]]
                mass = 0.0
                for m in range(mixtures):
                    product = weights[m] / sum(weights)
                    for c in range(n):
                        mean = p[mixtures * (1 + c) + m]
                        for j in range(c):
                            pair = mixtures * (1 + 2 * n) + c * (c - 1) // 2 + j
                            mean += p[pair] * values[j]
                        scale = math.exp(p[mixtures * (1 + n + c) + m] - 2)
                        above = (values[c] + 1 / 255 - mean) / scale
                        below = (values[c] - 1 / 255 - mean) / scale
                        upper = 1.0 if values[c] > 0.999 else 1 / (1 + math.exp(-above))
                        lower = 0.0 if values[c] < -0.999 else 1 / (1 + math.exp(-below))
                        product *= upper - lower
                    mass += product
                total += math.log(mass)
        sums.append(total)
    return sums


@pytest.mark.parametrize("C, mixtures", [(1, 3), (3, 2)])
def test_log_prob_is_the_formula(C, mixtures):
    """Values of a block in another order, or another component's mean, would give other sums."""
    params = random_parameters(C, mixtures, 2, 3)
    x = noise(C, 6)[..., :4, :]
    ours = Dmol(params, mixtures=mixtures, block=2).log_prob(x)
    theirs = torch.tensor(literal_log_prob(x, params, mixtures), dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-6)


def test_shift_is_taken_from_every_value():
    """Dmol of x with a shift is Dmol of x - shift without, where no edge bin is met."""
    params = random_parameters(3, 2, 2, 2)
    x = from_uint8(to_uint8(0.3 * noise(3, 4))).double()
    shift = 0.2 * noise(3, 4, seed=1)
    shifted = Dmol(params, shift, mixtures=2, block=2).log_prob(x)
    plain = Dmol(params, mixtures=2, block=2).log_prob(x - shift)
    torch.testing.assert_close(shifted, plain)


TWO_FREE = dict(  # a grey block whose second and third pixels are surely white
    logits=[0.3, -0.4],
    means=[[-0.2, 0.4], [30.0, 30.0], [30.0, 30.0], [0.1, -0.3]],
    scales=[[0.1, 0.2], [0.1, 0.1], [0.1, 0.1], [0.05, 0.3]],
    couplings={(3, 0): 0.8, (3, 1): -0.2})


def probabilities_of_two():
    """p(first, last) of TWO_FREE -> (256, 256)."""
    first, last = torch.meshgrid(from_uint8(LEVELS), from_uint8(LEVELS), indexing="ij")
    white = torch.ones_like(first)
    x = torch.stack([first, white, white, last], -1).view(-1, 1, 2, 2).double()
    params = parameters(**TWO_FREE).expand(len(x), -1, -1, -1)
    return Dmol(params, mixtures=2, block=2).log_prob(x).exp().view(256, 256)


def test_all_pairs_of_two_values_sum_to_one():
    """The product of conditionals is a distribution: over all 256² pairs, the others certain."""
    assert probabilities_of_two().sum().item() == pytest.approx(1, abs=1e-6)


def test_draws_come_as_often_as_they_are_probable():
    """Pairs of values of 200,000 drawn blocks, in 8 x 8 cells."""
    torch.manual_seed(0)
    params = parameters(**TWO_FREE, h=400, w=500)
    x = to_uint8(Dmol(params, mixtures=2, block=2).sample()).long()[0, 0]
    assert (x[::2, 1::2] == 255).all() and (x[1::2, ::2] == 255).all()
    cells = x[::2, ::2] // 32 * 8 + x[1::2, 1::2] // 32
    drawn = torch.bincount(cells.flatten(), minlength=64) / cells.numel()
    expected = probabilities_of_two().view(8, 32, 8, 32).sum((1, 3)).flatten()
    deviation = (expected * (1 - expected) / cells.numel()).sqrt()
    assert ((drawn - expected).abs() < 5 * deviation + 1e-5).all()


def test_gradients_are_those_of_finite_differences():
    params = random_parameters(1, 2, 1, 1)[:1].requires_grad_()
    x = noise(1, 2)[:1]

    def log_prob(values):
        return Dmol(values, mixtures=2, block=2).log_prob(x)

    assert torch.autograd.gradcheck(log_prob, (params,), eps=1e-6, atol=1e-4)


def test_one_narrow_component_has_its_mean():
    """`mean` and a draw agree where there is no doubt, each value after those before it."""
    numbers = dict(logits=[0.0], means=[[0.2], [-0.1], [0.3], [0.0]], scales=[[1e-3]] * 4,
                   couplings={(1, 0): 0.5, (2, 1): -0.5, (3, 0): 1.0})
    p_x = Dmol(parameters(**numbers), mixtures=1, block=2)
    first = 0.2
    second = -0.1 + 0.5 * first
    third = 0.3 - 0.5 * second
    expected = torch.tensor([[first, second], [third, first]]).view(1, 1, 2, 2)
    assert (p_x.mean - expected).abs().max() < 1.5 / 255
    assert (p_x.sample() - expected).abs().max() < 4 / 255


# ---- A block whose mean is known -----------------------------------------------------------------

def constrained(scale_of_last, couplings, scale=40):
    """p(x|y) of grey blocks, a function of x and y.

    The last pixel has a scale of its own. Both are in grey levels.
    """
    def p_x(x, y):
        levels = [[scale], [scale], [scale], [scale_of_last]]
        scales = torch.tensor(levels) * 2 / 255
        means = torch.tensor([[0.0], [0.0], [0.0], [-1 / 255]])  # Σ x - 4y is -2, -1, 0 or 1 levels
        side = x.shape[2] // 2
        params = parameters([0.0], means, scales, couplings, side, side)
        shift = upsample(y, x.shape[2], block=2).double()
        return Dmol(params.expand(len(x), -1, -1, -1), shift, mixtures=1, block=2)
    return p_x


def bits_of_last(p_x, flat, x, y):
    """The cost of a block's last pixel: p_x against one under which it has a scale of `flat`."""
    blocks = x.numel() / 4
    centred = F.pixel_unshuffle(x - upsample(y, x.shape[2], block=2).double(), 2)[:, 3]
    scale = flat * 2 / 255
    by_hand = torch.sigmoid((centred + 2 / 255) / scale) - torch.sigmoid(centred / scale)
    without = constrained(flat, {})(x, y)
    difference = p_x(x, y).log_prob(x).sum() - without.log_prob(x).sum()
    return -(difference + by_hand.log().sum()).item() / blocks / math.log(2)


KNOWN = {(3, 0): -1.0, (3, 1): -1.0, (3, 2): -1.0}


def test_last_pixel_costs_the_rounding():
    """With L_4j = -1 and d(x) given, four values are left: 2 bits, 2.3 by one logistic.

    Independent pixels pay the logarithm of their spread.
    """
    x = from_uint8(torch.randint(60, 200, (4, 1, 32, 32), generator=torch.manual_seed(0))).double()
    y = from_uint8(downscale(to_uint8(x).int())).double()
    assert 2 < bits_of_last(constrained(0.65, KNOWN), 40, x, y) < 2.35
    assert bits_of_last(constrained(40, {}), 40, x, y) > 6


def test_draws_keep_the_mean_of_their_block():
    """d of a draw is y up to the rounding, while its pixels are far from y."""
    torch.manual_seed(0)
    x = from_uint8(torch.randint(100, 156, (4, 1, 32, 32))).double()
    y = from_uint8(downscale(to_uint8(x).int())).double()
    draw = constrained(0.3, KNOWN, scale=10)(x, y).sample()
    again = downscale(to_uint8(draw).int())
    wrong = (again - to_uint8(y).int()).abs()
    assert wrong.float().mean() < 0.3
    assert (draw - F.interpolate(y, scale_factor=2)).abs().mean() > 10 * 2 / 255


@pytest.mark.parametrize("C", [1, 3])
def test_means_of_upsampled_blocks_are_y(C):
    """Else L_4j = -1 could not say that the mean of a block is known."""
    y = noise(C, 8)
    s = upsample(y, 16, block=2)
    torch.testing.assert_close(F.avg_pool2d(s, 2), y)
    assert torch.equal(upsample(y, 8, block=2), y)  # grayscale and posterize keep the size
    plain = F.interpolate(y, size=(16, 16), mode="bilinear")
    assert torch.equal(upsample(y, 16, block=1), plain)


# ---- The models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels, transform", [
    (0, "downscale"), (1, "downscale"), (2, "downscale"), (1, "sketch"), (1, "edges"),
    (1, "grayscale"), (1, "posterize")])
def test_decoders_have_blocks(levels, transform):
    """The bound and the operations of a selfVAE whose p(y_{k+1}|y_k, z_k) have blocks.

    p(y_1|u) has pixels, but where it is all of the model.
    """
    torch.manual_seed(0)
    cfg = Config(levels=levels, transform=transform, block=2, prior="normal", small=True)
    model = SelfVAE(cfg, (3, 32, 32))
    x = quantize(torch.rand(2, 3, 32, 32) * 2 - 1)
    model.initialize(x)
    terms = model.terms(x)
    model.elbo(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.isfinite(sum(terms.values())).all()
    assert model.log_weights(x, 2).shape == (2, 2)
    values, factors = model.decode({}, 2)
    for name, p in factors.items():
        if name.startswith("y_"):
            assert p.block == (1 if levels and name == "y_1" else 2)
            assert p.log_prob(values[name]).shape == (2,)
    for operation in model.operations:
        assert model.reconstruct(x, operation=operation).shape == x.shape
    plain = SelfVAE(Config(levels=levels, transform=transform, prior="normal", small=True),
                    (3, 32, 32))
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, plain)}
    assert count[plain] < count[model] < 1.2 * count[plain]
