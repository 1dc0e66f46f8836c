"""realnvp.py against closed forms: couplings, Jacobians, inverses, dequantization, the plane.

Flows here have the layers of the real ones but are very narrow, and are moved away from the
identity (`randomize`).
"""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import Normal

import realnvp
from common import (POINTS, Batches, Images, UserError, from_uint8, load_points, log_mean_exp,
                    make_points, quantize, to_uint8)
from conftest import count, inputs_of, seeded
from realnvp import ALPHA, Config, Coupling, Couplings, Flow, RealNVP, ResNet, density, scales_for


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(realnvp.WIDTHS, "small", (1, 4))
    torch.manual_seed(0)


@pytest.fixture
def middle(monkeypatch):
    """The dequantization noise is 0.3 everywhere."""
    def noise(x):
        return torch.full_like(x, 0.3)

    monkeypatch.setattr(torch, "rand_like", noise)


def randomize(module, sd=0.3):
    """Move every parameter away from its start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(sd * torch.randn_like(p))
    return module


def make(shape=(3, 8, 8), sd=0.05):
    """A model, away from the identity."""
    return randomize(RealNVP(Config(small=True), shape), sd)


def noise_images(count, channels=3, size=8):
    """Images of uniform noise, on the grid."""
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def narrow_flow(channels, side, scales, dtype=torch.float64, sd=0.1):
    """A flow of 8 features, away from the identity."""
    def make_net(channels_in, side):
        return ResNet(channels_in, 8, 1)

    return randomize(Flow(channels, side, scales, make_net), sd).to(dtype)


def layers(flow, z):
    """Every coupling of the flow with its input on the way of z -> [(coupling, input)]."""
    couplings = [module for module in flow.modules() if isinstance(module, Coupling)]
    inputs = [inputs_of(coupling) for coupling in couplings]
    flow(z)
    return [(coupling, seen[0].detach()) for coupling, seen in zip(couplings, inputs)]


def log_det_of_jacobian(layer, z):
    """log |det dv/dz| of a layer or flow at one z (1, C, H, W), by autograd."""
    def values(z):
        return layer(z)[0]

    J = jacobian(values, z).reshape(z.numel(), z.numel())
    return torch.linalg.slogdet(J)[1]


# ---- Masks and layers ----------------------------------------------------------------------------

def test_masks_of_every_scale():
    """(3 checkerboard, 3 channel-wise) twice, then 4 checkerboard; neighbours are opposite.

    The first passes odd pixels, or the first half of the channels.
    """
    masks = []
    shapes = []
    for coupling, z in layers(narrow_flow(3, 8, 3), torch.randn(1, 3, 8, 8).double()):
        masks.append(coupling.mask)
        shapes.append(tuple(z.shape[1:]))
    groups = [(3, (3, 8, 8), "checkerboard"), (3, (12, 4, 4), "channels"),
              (3, (6, 4, 4), "checkerboard"), (3, (24, 2, 2), "channels"),
              (4, (12, 2, 2), "checkerboard")]
    start = 0
    for number, shape, kind in groups:
        channels, height, width = shape
        if kind == "checkerboard":
            mask = (torch.arange(height)[:, None] + torch.arange(width)) % 2
        else:
            mask = (torch.arange(channels) < channels // 2).view(-1, 1, 1).long()
        for i in range(start, start + number):
            assert shapes[i] == shape
            assert torch.equal(masks[i].long(), mask)
            mask = 1 - mask
        start += number
    assert start == len(masks)


def test_every_layer_has_the_jacobians_log_det():
    """It is that of the autograd Jacobian, and s learns by it; what passes is untouched.

    In all 16 couplings of three scales, with both masks and both parities.
    """
    for coupling, z in layers(narrow_flow(1, 8, 3), torch.randn(1, 1, 8, 8).double()):
        out, log_det = coupling(z)
        assert log_det.abs() > 1e-3
        torch.testing.assert_close(log_det[0], log_det_of_jacobian(coupling, z))
        (gradient,) = torch.autograd.grad(log_det.sum(), coupling.s_limit)
        linear = gradient.flatten() @ coupling.s_limit.flatten()  # s = s_limit · tanh(…)
        torch.testing.assert_close(linear, log_det[0])
        passes = coupling.mask.bool().expand(z.shape[1:])
        assert torch.equal(out[0, passes], z[0, passes]) and (out != z)[0, ~passes].all()


@pytest.mark.parametrize("channels, side, scales", [
    (1, 4, 1), (1, 4, 2), (2, 4, 3), (3, 6, 2), (1, 8, 3)])
def test_whole_flow_has_the_jacobians_log_det(channels, side, scales):
    """Squeezes and what is factored out move values about and change no volume."""
    flow = narrow_flow(channels, side, scales, sd=0.05)
    z = torch.randn(1, channels, side, side).double()
    v, log_det = flow(z)
    assert v.shape == z.shape and log_det.abs() > 1e-2
    torch.testing.assert_close(log_det[0], log_det_of_jacobian(flow, z))
    assert (v != z).all()  # and no value passes all of it


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_inverse_of_every_layer_and_of_the_whole(dtype, error):
    """inverse(forward(z)) and forward(inverse(z)) are z, at three scales and in the plane."""
    flow = narrow_flow(3, 8, 3, dtype, sd=0.01)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    plane = make((2, 1, 1), sd=0.1).flow.to(dtype)
    points = torch.randn(100, 2, 1, 1, dtype=dtype)
    with torch.no_grad():
        cases = [(flow, images), *layers(flow, images), (plane, points), *layers(plane, points)]
        for layer, z in cases:
            v, _ = layer(z)
            assert (v - z).abs().mean() > 0.01
            assert (layer.inverse(v) - z).abs().max() < error
            assert (layer(layer.inverse(z))[0] - z).abs().max() < error


def test_what_goes_on_is_the_first_half_of_the_squeezed_channels():
    """Scale 2 sees channel 0 of 2, squeezed; what scale 1 made of the other one is v there."""
    flow = narrow_flow(2, 4, 2)
    flow.fine = Couplings(torch.ones(1), 0, 2, 4, None)  # no couplings in scale 1
    flow.squeezed = Couplings(torch.ones(1), 0, 8, 2, None)
    z = torch.arange(32.0).view(1, 2, 4, 4).double()
    seen = inputs_of(flow.rest)
    v, _ = flow(z)
    assert torch.equal(seen[0], nn.functional.pixel_unshuffle(z[:, :1], 2))
    assert torch.equal(v[:, 1], z[:, 1]) and (v[:, 0] != z[:, 0]).all()


def test_s_is_bounded():
    """Whatever its net says, |s| is at most s_limit; t is what the net says."""
    def net(z):
        return torch.full((1, 4, 1, 1), 1e6)

    coupling = Coupling(torch.tensor([1, 0]).view(2, 1, 1), 2, net)
    with torch.no_grad():
        coupling.s_limit.fill_(3.0)
        s, t = coupling.s_t(torch.ones(1, 2, 1, 1))
    assert s.flatten().tolist() == [0, 3] and t.flatten().tolist() == [0, 1e6]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 1, 1)])
def test_flow_starts_as_the_identity(shape):
    """s = t = 0, so v = y and log |det| = 0, exactly."""
    flow = RealNVP(Config(small=True), shape).flow
    y = torch.randn(5, *shape)
    v, log_det = flow(y)
    assert torch.equal(v, y) and torch.equal(flow.inverse(y), y)
    assert torch.equal(log_det, torch.zeros(5))


def test_start_keeps_sizes():
    """Behind a ReLU a conv returns what came in, times its gain.

    Eight blocks and their skips sum up to about the input's size.
    """
    h = torch.randn(8, 64, 16, 16)
    assert realnvp.conv(64, 64)(h.relu()).std().item() == pytest.approx(1, rel=0.1)
    assert realnvp.conv(64, 64, gain=0.25)(h.relu()).std().item() == pytest.approx(0.25, rel=0.1)
    for blocks in (1, 8):
        net = ResNet(3, 64, blocks)
        seen = inputs_of(net.leave)
        net(torch.randn(8, 3, 16, 16))
        assert 0.5 < seen[0].square().mean().sqrt() < 4


def test_skips_reach_the_output():
    """s and t see each block's output through its own 1x1 conv."""
    net = randomize(ResNet(2, 4, 2))
    z = torch.randn(1, 2, 4, 4)
    first, *others = net.skips
    h = net.enter(z)
    total = first(h)
    for block, skip in zip(net.blocks, others):
        h = h + block(h)
        total = total + skip(h)
    torch.testing.assert_close(net(z), net.leave(total.relu()) * 32 / 4)


def test_parameter_counts_are_those_of_the_docs(monkeypatch):
    """Another count is another network than the one that the docs tell of."""
    monkeypatch.undo()  # the widths of --small
    expected = {
        (False, (3, 32, 32)): 19_574_927,
        (False, (3, 64, 64)): 95_422_217,
        (True, (3, 32, 32)): 685_935,
        (True, (1, 32, 32)): 655_525,
        (False, (2, 1, 1)): 36_912,
    }
    with torch.device("meta"):
        for small, shape in expected:
            model = RealNVP(Config(small=small), shape)
            assert count(model) == expected[small, shape], (small, shape)


def test_scales_follow_the_size():
    """Up to 32x32 and with --small there are two (section 4.1 of the paper); beyond, down to 4x4.

    A size that cannot be halved so often is refused.
    """
    assert [scales_for(size, False) for size in (8, 20, 32, 48, 64, 128)] == [2, 2, 2, 4, 5, 6]
    assert [scales_for(size, True) for size in (32, 64)] == [2, 2]
    for size, small in ((9, False), (33, True), (36, False)):
        with pytest.raises(UserError, match=f"size {size} is no multiple of"):
            scales_for(size, small)


# ---- Images: dequantization and logit ------------------------------------------------------------

def test_preprocess_against_autograd():
    """y's derivative by x + u, and the way back to x + u, for every level."""
    model = RealNVP(Config(small=True), (1, 16, 16))
    x = from_uint8(torch.arange(256).view(1, 1, 16, 16))
    y, log_det = seeded(model.preprocess, x)
    u = seeded(torch.rand_like, x)
    pixel = (torch.arange(256.0).view(1, 1, 16, 16) + u).double().requires_grad_()
    oracle = torch.logit(ALPHA + (1 - 2 * ALPHA) * pixel / 256)
    (slope,) = torch.autograd.grad(oracle.sum(), pixel)
    torch.testing.assert_close(y, oracle.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_det[0], slope.log().sum().float())
    torch.testing.assert_close(model.postprocess(y), pixel.float(), atol=1e-3, rtol=0)


def interval_mass(levels):
    """The identity flow's P(level), the mass of N(0, 1) between y(level) and y(level + 1)."""
    def edge(level):
        return Normal(0.0, 1.0).cdf(torch.logit(ALPHA + (1 - 2 * ALPHA) * level / 256))

    return edge(levels.double() + 1) - edge(levels.double())


def test_bounds_against_the_exact_probability():
    """E[log p(x + u)] < log P(x), and the importance-weighted bound of many u is log P(x)."""
    model = RealNVP(Config(small=True), (1, 2, 2))
    levels = torch.tensor([3, 60, 128, 255]).view(1, 1, 2, 2)
    exact = interval_mass(levels).log().sum().item()
    x = from_uint8(levels).expand(500, -1, -1, -1)
    log_w = model.log_weights(x, 20).flatten().double()
    five_errors = 5 * log_w.std().item() / math.sqrt(len(log_w))

    # The same expectation, pixel by pixel, by the midpoint rule.
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    p = ALPHA + (1 - 2 * ALPHA) * (levels.flatten()[:, None] + u) / 256
    slope = (1 - 2 * ALPHA) / 256 / (p * (1 - p))
    log_density = Normal(0.0, 1.0).log_prob(torch.logit(p)) + slope.log()
    elbo = log_density.mean(1).sum().item()
    assert elbo < exact
    assert len(log_w.unique()) > 9000  # noise is drawn anew for each sample of each image
    assert log_w.mean().item() == pytest.approx(elbo, abs=five_errors)
    assert log_mean_exp(log_w).item() == pytest.approx(exact, abs=five_errors)


def test_terms_log_prob_and_weights(middle):
    """log p = log N(v) + log |det|, in any of the three ways to ask for it.

    An image has the same terms alone: there are no statistics of the batch.
    """
    model = make()
    x = noise_images(3)
    v, log_det = model(x)
    terms = model.terms(x)
    log_normal = Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3))
    torch.testing.assert_close(terms, {"base": -log_normal, "volume": -log_det})
    torch.testing.assert_close(model.log_prob(x), log_normal + log_det)
    torch.testing.assert_close(model.log_weights(x, 2), model.log_prob(x).expand(2, 3))
    alone = [model.log_prob(image) for image in x.split(1)]
    torch.testing.assert_close(torch.cat(alone), log_normal + log_det)


def test_images_come_back():
    """x -> v -> x is the identity; `inverse_error` is what rounding leaves, in pixel values.

    In fp32 that depends on the machine, but never makes another pixel value of one.
    """
    model = make().double()
    x = noise_images(4).double()
    with torch.no_grad():
        v, _ = model(x)
        assert torch.equal(to_uint8(model.inverse(v)), to_uint8(x))
    assert model.inverse_error(x).max() < 1e-8
    error = model.float().inverse_error(x.float())
    assert error.shape == x.shape
    assert 0 < error.max() < 0.5


def test_samples_are_images():
    """They lie on the grid, and are all alike at temperature 0.

    At 1 the identity flow has the levels' own probabilities.
    """
    model = make()
    x = model.sample(3)
    assert x.shape == (3, 3, 8, 8)
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)
    cold = model.sample(3, temperature=0)
    assert torch.equal(cold, cold[:1].expand_as(cold))
    start = RealNVP(Config(small=True), (1, 8, 8))
    levels = to_uint8(start.sample(4000)).flatten()
    mass = interval_mass(torch.arange(256))
    mass[0] += (1 - mass.sum()) / 2  # what lies below black is shown black
    share = torch.bincount(levels.int(), minlength=256) / len(levels)
    five_deviations = 5 * (mass / len(levels)).sqrt()
    for level in (0, 1, 64, 127, 128, 254):
        assert abs(share[level] - mass[level]) < five_deviations[level]


def test_interpolations_follow_the_arc(middle):
    """The ends are the images themselves, the middle is f⁻¹((v1 + v2)/√2)."""
    model = make()
    x1 = noise_images(2)
    x2 = noise_images(2)
    line = model.interpolate(x1, x2, count=5)
    assert line.shape == (2, 5, 3, 8, 8)
    one_level = 2.01 / 255
    assert (line[:, 0] - x1).abs().max() < one_level and (line[:, 4] - x2).abs().max() < one_level
    assert (model.interpolate(x1, x2, count=1)[:, 0] - x1).abs().max() < one_level
    with torch.no_grad():
        middle_v = (model(x1)[0] + model(x2)[0]) / math.sqrt(2)
        assert (line[:, 2] - model.inverse(middle_v)).abs().max() < one_level


class Stop(Exception):
    """Ends a training in its first step."""


def first_step(model, step=1, **flags):
    """`realnvp.train` from this step on, which has to end in a Stop."""
    def start_run(*arguments):
        return {"step": step - 1}

    levels = to_uint8(noise_images(4)).permute(0, 2, 3, 1).numpy()
    images = Images("noise", 8, levels, levels, levels, None, False)
    cfg = Config(small=True, device="cpu", dtype="fp32", **flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(realnvp, "start_run", start_run)
        realnvp.train(cfg, model, images, None, None)


def test_penalty_is_on_scales_alone(monkeypatch):
    """The loss is the mean of -log p, plus 5e-5 Σ g² for g of weight norm and every limit of s."""
    seen = []

    def stop(loss):
        seen.append(loss.item())
        raise Stop

    def two_nats(v, log_det):
        return {"base": torch.full((4,), 2.0, requires_grad=True)}

    model = make()
    monkeypatch.setattr(model, "costs", two_nats)
    monkeypatch.setattr(torch.Tensor, "backward", stop)
    first_step(model)
    squares = 0.0
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            squares += module.parametrizations.weight.original0.square().sum().item()
        if isinstance(module, Coupling):
            squares += module.s_limit.square().sum().item()
    assert squares > 100 and seen == pytest.approx([2 + 5e-5 * squares])


@pytest.mark.parametrize("step, factor", [
    (1, 1 / 200), (200, 1), (1000, 1), (4000, 0.5), (1_000_000, 0.1)])
def test_rate_and_clipping(monkeypatch, step, factor):
    """The rate has a warm-up, a plateau, 1/√step and a floor.

    A gradient of any size has norm 100 when Adam gets it.
    """
    seen = []

    def stop(optimizer):
        (group,) = optimizer.param_groups
        norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
        seen.append((group["lr"], torch.stack(norms).norm().item()))
        raise Stop

    def steep(v, log_det):
        return {"base": 1e4 * v.square().sum((1, 2, 3)), "volume": -1e4 * log_det}

    model = make()
    monkeypatch.setattr(model, "costs", steep)
    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    first_step(model, step, lr=0.01, steps=step, cooldown=0)
    assert seen[0] == (pytest.approx(0.01 * factor), pytest.approx(100, rel=1e-3))


# ---- The plane -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", POINTS)
def test_points(name):
    """They follow from the seed, fill [-1, 1]² around its centre, and pass through Batches as is.
    """
    points = make_points(name, 2000, 0)
    assert (points == make_points(name, 2000, 0)).all()
    assert (points != make_points(name, 2000, 1)).any()
    assert (abs(points) < 1).mean() > 0.97
    assert abs(points.mean(0)).max() < 0.05 and points.std(0).min() > 0.25
    data = load_points(name)
    assert data.shape == (2, 1, 1)
    x = next(iter(Batches(data.test, 2000, "cpu")))
    expected = torch.from_numpy(make_points(name, 10_000, 2)[:2000]).float()
    torch.testing.assert_close(x.flatten(1), expected, atol=1e-5, rtol=0)


def test_checkerboard_is_uniform_on_half_of_the_squares():
    """So its entropy is log 2, the area: what docs hold `nll_nats` against."""
    squares = torch.from_numpy(make_points("checkerboard", 16_000, 0) * 2 + 2).floor().long()
    column, row = squares.T
    assert ((column + row) % 2 == 0).all() and squares.min() == 0 and squares.max() == 3
    share = torch.bincount(4 * row + column, minlength=16) / 16_000
    assert (share > 0).sum() == 8
    torch.testing.assert_close(share[share > 0], torch.full((8,), 1 / 8), atol=0.015, rtol=0)


def test_rings_and_spirals_are_where_they_should_be():
    """Rings have radii 0.35 and 0.85, and an arm of the spirals turns once over radius 0.9."""
    radius = torch.from_numpy(make_points("rings", 4000, 0)).norm(dim=1)
    to_a_ring = (radius - 0.35).abs().minimum((radius - 0.85).abs())
    assert to_a_ring.max() < 0.25
    assert (radius < 0.6).float().mean().item() == pytest.approx(0.5, abs=0.05)  # both rings

    x, y = torch.from_numpy(make_points("spirals", 4000, 0)).T
    radius = x.hypot(y)
    half_turns = torch.atan2(y, x) / math.pi - 2 * radius / 0.9  # the arms are one apart
    phase = half_turns[radius > 0.3] % 1
    assert torch.minimum(phase, 1 - phase).mean() < 0.1  # uniform phases have 0.25
    assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # both arms


@pytest.fixture(scope="module")
def learned():
    """A flow after 200 steps on the moons, and the nats of its last batch."""
    torch.manual_seed(0)
    model = RealNVP(Config(dataset="moons"), (2, 1, 1))
    data = Batches(load_points("moons").train, 256, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        loss = -model.log_prob(data.batch(step)).mean()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False), loss.item()


def test_trained_density_integrates_to_one(learned):
    """It does so over [-4, 4]², and is no Gaussian: the best of these has 0.2 nats more."""
    model, nats = learned
    p = density(model, 4, 400)
    assert p.sum().item() * (8 / 400) ** 2 == pytest.approx(1, abs=2e-3)
    points = torch.from_numpy(make_points("moons", 20_000, 3))
    of_gaussian = 0.5 * torch.logdet(torch.cov(points.T)).item() + math.log(2 * math.pi) + 1
    assert nats < of_gaussian - 0.2


def test_density_is_that_of_the_samples(learned):
    """Parts of the plane have as much mass on the grid as there are draws in them."""
    model, _ = learned
    mass = density(model, 4, 400) * (8 / 400)**2
    x = model.sample(40_000).flatten(1)
    left = x[:, 0] < -0.5  # beyond the cell 175 of 400 from -4 to 4
    low = x[:, 1] < 0.2  # beyond the cell 210
    drawn = torch.stack([left, low, left & low]).float().mean(1)
    expected = torch.stack([mass[:175].sum(), mass[:, :210].sum(), mass[:175, :210].sum()])
    assert 0.05 < expected.min() and expected.max() < 0.9
    # 5 standard deviations of the share are 0.0125.
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)


def test_plane_has_its_own_defaults():
    """It has other batches, epochs and rate than images, but where the user says otherwise."""
    defaults = {"moons": (512, 20, 3e-3), "cifar10": (64, 1000, 1e-3)}
    for dataset, wanted in defaults.items():
        cfg = Config(dataset=dataset)
        assert (cfg.batch_size, cfg.epochs, cfg.lr) == wanted
        mine = Config(dataset=dataset, batch_size=7, epochs=3, lr=0.1)
        assert (mine.batch_size, mine.epochs, mine.lr) == (7, 3, 0.1)
