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
from common import (
    POINTS,
    Batches,
    Images,
    UserError,
    bits_per_dim,
    from_uint8,
    make_points,
    load_points,
    log_mean_exp,
    mean_terms,
    quantize,
    to_uint8,
)
from conftest import count, seeded
from realnvp import ALPHA, Config, Coupling, Couplings, Flow, RealNVP, ResNet, density, scales_for


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(realnvp.WIDTHS, "small", (1, 4))
    torch.manual_seed(0)


@pytest.fixture
def middle(monkeypatch):
    """The dequantization noise is 0.3 everywhere."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.3))


def randomize(module, sd=0.3):
    """Move every parameter away from its start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(sd * torch.randn_like(p))
    return module


def make(shape=(3, 8, 8), sd=0.05):
    return randomize(RealNVP(Config(small=True), shape), sd)


def noise_images(count, channels=3, size=8):
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def narrow_flow(channels, side, scales, dtype=torch.float64, sd=0.1):
    return randomize(
        Flow(channels, side, scales, lambda channels, side: ResNet(channels, 8, 1)), sd
    ).to(dtype)


def layers(flow, z):
    """Every coupling of the flow with its input on the way of z -> [(coupling, input)]."""
    seen = []

    def note(coupling, inputs):
        seen.append((coupling, inputs[0].detach()))

    couplings = [module for module in flow.modules() if isinstance(module, Coupling)]
    handles = [coupling.register_forward_pre_hook(note) for coupling in couplings]
    flow(z)
    for handle in handles:
        handle.remove()
    return seen


# ---- Masks and layers
def test_masks_of_every_scale():
    """(3 checkerboard, 3 channel-wise) twice, then 4 checkerboard; neighbours are opposite.

    The first passes odd pixels, channels 0 … 2C - 1.
    """
    masks = [
        (m.mask, tuple(z.shape[1:]))
        for m, z in layers(narrow_flow(3, 8, 3), torch.randn(1, 3, 8, 8, dtype=torch.float64))
    ]
    assert [shape for _, shape in masks] == [(3, 8, 8)] * 3 + [(12, 4, 4)] * 3 + [(6, 4, 4)] * 3 + [
        (24, 2, 2)
    ] * 3 + [(12, 2, 2)] * 4
    for start, stop in ((0, 3), (3, 6), (6, 9), (9, 12), (12, 16)):
        mask, shape = masks[start]
        for i in range(start, stop):
            assert torch.equal(masks[i][0], mask if (i - start) % 2 == 0 else 1 - mask)
        if stop - start == 4 or start in (0, 6):
            assert all(mask[r, c] == (r + c) % 2 for r in range(shape[1]) for c in range(shape[2]))
        else:
            assert mask.shape == (shape[0], 1, 1) and mask.flatten().tolist() == [1] * (
                shape[0] // 2
            ) + [0] * (shape[0] // 2)


def test_every_layer_has_the_jacobians_log_det():
    """All 16 couplings of three scales, both masks, both parities:

    log |det| of the autograd Jacobian, which s learns by; what passes is untouched.
    """
    for coupling, z in layers(narrow_flow(1, 8, 3), torch.randn(1, 1, 8, 8, dtype=torch.float64)):
        out, log_det = coupling(z)
        J = jacobian(lambda z: coupling(z)[0], z).reshape(z.numel(), z.numel())
        assert log_det.abs() > 1e-3
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(J)[1])
        (gradient,) = torch.autograd.grad(log_det.sum(), coupling.s_limit)
        torch.testing.assert_close(
            gradient.flatten() @ coupling.s_limit.flatten(), log_det[0]
        )  # s = scale·tanh(·)
        passes = coupling.mask.bool().expand(z.shape[1:])
        assert torch.equal(out[0, passes], z[0, passes]) and (out != z)[0, ~passes].all()


@pytest.mark.parametrize(
    "channels, side, scales", [(1, 4, 1), (1, 4, 2), (2, 4, 3), (3, 6, 2), (1, 8, 3)]
)
def test_whole_flow_has_the_jacobians_log_det(channels, side, scales):
    """Squeezes and what is factored out move values about and change no volume."""
    flow, z = narrow_flow(channels, side, scales, sd=0.05), torch.randn(
        1, channels, side, side, dtype=torch.float64
    )
    v, log_det = flow(z)
    assert v.shape == z.shape and log_det.abs() > 1e-2
    J = jacobian(lambda z: flow(z)[0], z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(J)[1])
    assert (v != z).all()  # and no value passes all of it


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_inverse_of_every_layer_and_of_the_whole(dtype, error):
    """inverse(forward(z)) and forward(inverse(v)), of each coupling, of three scales together, and
    of the plane's flow.
    """
    flow, z = narrow_flow(3, 8, 3, dtype, sd=0.01), torch.randn(4, 3, 8, 8, dtype=dtype)
    plane, x = make((2, 1, 1), sd=0.1).flow.to(dtype), torch.randn(100, 2, 1, 1, dtype=dtype)
    with torch.no_grad():
        for layer, z in [(flow, z), (plane, x), *layers(flow, z), *layers(plane, x)]:
            v, _ = layer(z)
            assert (v - z).abs().mean() > 0.01
            assert (layer.inverse(v) - z).abs().max() < error
            assert (layer(layer.inverse(z))[0] - z).abs().max() < error


def test_what_goes_on_is_the_first_half_of_the_squeezed_channels():
    """Scale 2 sees channel 0 of 2, squeezed; what scale 1 made of the other one is v there."""
    flow = narrow_flow(2, 4, 2)
    flow.fine = Couplings(torch.ones(1), 0, 2, None)  # no couplings in scale 1
    flow.squeezed = Couplings(torch.ones(1), 0, 8, None)
    z = torch.arange(32.0).view(1, 2, 4, 4).double()
    seen = []
    flow.rest.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    v, _ = flow(z)
    assert torch.equal(seen[0], torch.nn.functional.pixel_unshuffle(z[:, :1], 2))
    assert torch.equal(v[:, 1], z[:, 1]) and (v[:, 0] != z[:, 0]).all()


def test_s_is_bounded():
    """Whatever its net says, |s| ≤ scale, and both directions stay finite.

    T is what the net says.
    """
    coupling = Coupling(
        torch.tensor([1, 0]).view(2, 1, 1), 2, lambda z: torch.full((1, 4, 1, 1), 1e6)
    )
    with torch.no_grad():
        coupling.s_limit.fill_(3.0)
        s, t = coupling.s_t(torch.ones(1, 2, 1, 1))
        assert s.flatten().tolist() == [0, 3] and t.flatten().tolist() == [0, 1e6]
        out, log_det = coupling(torch.full((1, 2, 1, 1), 1e4))
    assert log_det.item() == 3 and out.flatten().tolist() == pytest.approx(
        [1e4, 1e4 * math.exp(3) + 1e6]
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (2, 1, 1)])
def test_flow_starts_as_the_identity(shape):
    """s = t = 0: v = y, log |det| = 0, exactly."""
    model, y = RealNVP(Config(small=True), shape), torch.randn(5, *shape)
    v, log_det = model.flow(y)
    assert (
        torch.equal(v, y)
        and torch.equal(log_det, torch.zeros(5))
        and torch.equal(model.flow.inverse(y), y)
    )


def test_start_keeps_sizes():
    """Behind a ReLU a conv returns what came in, times its gain.

    Eight blocks and their skips sum up to about the input's size.
    """
    h = torch.randn(8, 64, 16, 16)
    assert realnvp.conv(64, 64)(h.relu()).std().item() == pytest.approx(1, rel=0.1)
    assert realnvp.conv(64, 64, gain=0.25)(h.relu()).std().item() == pytest.approx(0.25, rel=0.1)
    for blocks in (1, 8):
        net, seen = ResNet(3, 64, blocks), []
        net.leave.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        net(torch.randn(8, 3, 16, 16))
        assert 0.5 < seen[0].square().mean().sqrt() < 4


def test_skips_reach_the_output():
    """s and t see each block's output through its own 1x1 conv:

    without the blocks' sum of skips, only the first is left.
    """
    net, z = randomize(ResNet(2, 4, 2)), torch.randn(1, 2, 4, 4)
    h, total = net.enter(z), net.skips[0](net.enter(z))
    for block, skip in zip(net.blocks, list(net.skips)[1:]):
        h = h + block(h)
        total = total + skip(h)
    torch.testing.assert_close(net(z), net.leave(total.relu()) * 32 / 4)
    gradients = torch.autograd.grad(net(z).sum(), [skip.bias for skip in net.skips])
    assert all((g != 0).any() for g in gradients)


def test_parameter_counts_are_those_of_the_docs(monkeypatch):
    monkeypatch.undo()
    for small, shape, expected in (
        (False, (3, 32, 32), 19_574_927),
        (False, (3, 64, 64), 95_422_217),
        (True, (3, 32, 32), 685_935),
        (True, (1, 32, 32), 655_525),
        (False, (2, 1, 1), 36_912),
    ):
        with torch.device("meta"):
            assert count(RealNVP(Config(small=small), shape)) == expected


def test_configuration_follows_the_size():
    """Section 4.1: CIFAR-10 8 blocks, 64 features, two scales.

    64x64 2 blocks, 32 features, down to 4x4, doubled at each scale.
    """
    with torch.device("meta"):
        model = RealNVP(Config(), (3, 64, 64))
    nets, flow = [], model.flow
    while flow is not None:
        nets, flow = nets + [flow.fine[0].net], flow.rest
    assert [net.enter.out_channels for net in nets] == [32, 64, 128, 256, 512] and len(
        nets[0].blocks
    ) == 2
    assert model.flow.squeezed[0].net.enter.out_channels == 64
    assert [scales_for(size, False) for size in (8, 20, 32, 48, 64, 128)] == [2, 2, 2, 4, 5, 6]
    assert [scales_for(size, True) for size in (32, 64)] == [2, 2]
    for size, small in ((9, False), (33, True), (36, False)):
        with pytest.raises(UserError, match=f"size {size} is no multiple of"):
            scales_for(size, small)


def test_no_statistics_of_the_batch():
    """Training and evaluation mode are one function, and it keeps no running averages."""
    model, x = make(), noise_images(3)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    torch.testing.assert_close(
        seeded(model.train().terms, x), seeded(model.eval().terms, x), rtol=0, atol=0
    )
    assert all("mask" in name for name, _ in model.named_buffers())


# ---- Images: dequantization and logit
def test_first_bound_by_hand(middle):
    """Flow at the identity: y = logit(0.05 + 0.9 (level + 0.3)/256) under N(0, 1), times dy/dx of
    each pixel.
    """
    model, levels = RealNVP(Config(small=True), (1, 2, 2)), [0, 17, 128, 255]
    nats = 0.0
    for level in levels:
        p = 0.05 + 0.9 * (level + 0.3) / 256
        y = math.log(p / (1 - p))
        nats += 0.5 * y**2 + 0.5 * math.log(2 * math.pi) - math.log(0.9 / 256 / (p * (1 - p)))
    x = from_uint8(torch.tensor(levels).view(1, 1, 2, 2))
    assert model.log_prob(x).item() == pytest.approx(-nats, rel=1e-5)
    assert bits_per_dim(-model.log_prob(x).item(), 4) == pytest.approx(
        nats / 4 / math.log(2), rel=1e-5
    )


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


def interval_mass(model, levels):
    """The identity flow's P(level): the integral of N(y.

    0, 1) over the level's interval, Φ(y(level + 1)) - Φ(y(level)).
    """

    def edge(level):
        return Normal(0.0, 1.0).cdf(torch.logit(ALPHA + (1 - 2 * ALPHA) * level / 256))

    return edge(levels.double() + 1) - edge(levels.double())


def test_bounds_against_the_exact_probability():
    """E[log p(x + u)] < log P(x), and the importance-weighted bound of many u is log P(x).

    All levels together have at most 1.
    """
    model, levels = RealNVP(Config(small=True), (1, 2, 2)), torch.tensor([3, 60, 128, 255]).view(
        1, 1, 2, 2
    )
    exact = interval_mass(model, levels).log().sum().item()
    log_w = torch.cat(
        [model.log_weights(from_uint8(levels).expand(500, -1, -1, -1), 20).flatten()]
    ).double()
    u = (
        torch.arange(10_000).double() + 0.5
    ) / 10_000  # the same expectation, pixel by pixel, by the midpoint rule
    p = ALPHA + (1 - 2 * ALPHA) * (levels.flatten()[:, None] + u) / 256
    elbo = (
        (
            Normal(0.0, 1.0).log_prob(torch.logit(p))
            + torch.log((1 - 2 * ALPHA) / 256 / (p * (1 - p)))
        )
        .mean(1)
        .sum()
        .item()
    )
    assert elbo < exact and log_w.mean().item() == pytest.approx(
        elbo, abs=5 * log_w.std().item() / 100
    )
    assert log_mean_exp(log_w).item() == pytest.approx(exact, abs=5 * log_w.std().item() / 100)
    total = interval_mass(model, torch.arange(256)).sum().item()
    assert (
        total == pytest.approx(2 * Normal(0.0, 1.0).cdf(torch.tensor(math.log(19.0))).item() - 1)
        and total < 1
    )


def test_bits_do_not_depend_on_the_batch(middle):
    """One by one, by two, by five: the same terms of each image, the same mean."""
    model, x = make(), noise_images(5)
    whole = model.terms(x)
    assert whole.keys() == {"base", "volume"} and whole["base"].unique().numel() == 5
    for name in whole:
        torch.testing.assert_close(
            torch.cat([model.terms(x[i : i + 1])[name] for i in range(5)]), whole[name]
        )
    levels = to_uint8(x).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        means = [mean_terms(model, Batches(levels, size, "cpu")) for size in (1, 2, 5)]
    for mean in means:
        assert mean == pytest.approx(
            {name: values.mean().item() for name, values in whole.items()}, rel=1e-5
        )


def test_terms_log_prob_and_weights_agree(middle):
    """log p = log N(v) + log |det|, in any of the three ways to ask for it."""
    model, x = make(), noise_images(3)
    v, log_det = model(x)
    terms = model.terms(x)
    torch.testing.assert_close(terms["base"], -Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3)))
    torch.testing.assert_close(terms["volume"], -log_det)
    torch.testing.assert_close(model.log_prob(x), -(terms["base"] + terms["volume"]))
    torch.testing.assert_close(model.log_weights(x, 2), model.log_prob(x).expand(2, 3))


def test_dequantization_noise_is_drawn_anew():
    model, x = make(), noise_images(2)
    log_w = model.log_weights(x, 3)
    assert log_w.shape == (3, 2) and log_w.unique().numel() == 6


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
    """On the grid; all alike at temperature 0.

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
    mass = interval_mass(start, torch.arange(256))
    mass[0] += (1 - mass.sum()) / 2  # what lies below black is shown black
    share = torch.bincount(levels.int(), minlength=256) / len(levels)
    for level in (0, 1, 64, 127, 128, 254):
        assert share[level].item() == pytest.approx(
            mass[level].item(), abs=5 * math.sqrt(mass[level].item() / len(levels))
        )
    assert (
        to_uint8(start.sample(500, temperature=0.5)).float().std()
        < 0.7 * to_uint8(start.sample(500)).float().std()
    )


def test_interpolations_follow_the_arc(middle):
    """The ends are the images themselves, the middle is f⁻¹((v1 + v2)/√2)."""
    model, x1, x2 = make(), noise_images(2), noise_images(2)
    line = model.interpolate(x1, x2, count=5)
    assert line.shape == (2, 5, 3, 8, 8)
    one_level = 2.01 / 255
    assert (line[:, 0] - x1).abs().max() < one_level and (line[:, 4] - x2).abs().max() < one_level
    with torch.no_grad():
        middle_v = (model(x1)[0] + model(x2)[0]) / math.sqrt(2)
        assert (line[:, 2] - model.inverse(middle_v)).abs().max() < one_level


def test_bf16_networks_give_fp32_terms():
    """Under autocast s and t are rounded, volumes are not:

    terms are fp32 and move by less than 2 %.
    """
    model, x = make(), noise_images(4)
    fp32 = seeded(model.log_prob, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.flow.fine[0].net(x).dtype == torch.bfloat16
        bf16 = seeded(model.terms, x)
    assert all(values.dtype == torch.float32 for values in bf16.values())
    torch.testing.assert_close(-sum(bf16.values()), fp32, rtol=0.02, atol=0)
    assert not torch.equal(-sum(bf16.values()), fp32)


def test_penalty_is_on_scales_alone(monkeypatch, tmp_path):
    """The loss is the mean of -log p plus 5e-5 times the squares of every g of weight norm and
    every scale of tanh.
    """
    seen = []

    class Stop(Exception):
        """Ends the training in its first step."""

    def stop(loss):
        seen.append(loss.item())
        raise Stop

    model, levels = make(), to_uint8(noise_images(4)).permute(0, 2, 3, 1).numpy()
    two = {"base": torch.full((4,), 2.0, requires_grad=True)}
    monkeypatch.setattr(model, "costs", lambda v, log_det: two)
    monkeypatch.setattr(torch.Tensor, "backward", stop)
    images = Images("noise", 8, levels, levels, levels, None, False)
    with pytest.raises(Stop):
        realnvp.train(Config(small=True, device="cpu", dtype="fp32"), model, images, tmp_path, None)
    squares = sum(
        m.parametrizations.weight.original0.square().sum()
        for m in model.modules()
        if hasattr(m, "parametrizations")
    )
    squares += sum(m.s_limit.square().sum() for m in model.modules() if isinstance(m, Coupling))
    assert squares > 100 and seen == pytest.approx([2 + 5e-5 * squares.item()])


@pytest.mark.parametrize(
    "step, factor", [(1, 1 / 200), (200, 1), (1000, 1), (4000, 0.5), (1_000_000, 0.1)]
)
def test_rate_and_clipping(monkeypatch, step, factor):
    """Warm-up, plateau, 1/√step, floor.

    And a gradient of any size has norm 100 when Adam gets it.
    """
    seen = []

    class Stop(Exception):
        """Ends the training in its first step."""

    def stop(optimizer):
        norms = [p.grad.norm() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        seen.append((optimizer.param_groups[0]["lr"], torch.stack(norms).norm().item()))
        raise Stop

    model, levels = make(), to_uint8(noise_images(4)).permute(0, 2, 3, 1).numpy()
    costs = model.costs

    def steep(v, log_det):
        return {name: 1e4 * values for name, values in costs(v, log_det).items()}

    monkeypatch.setattr(model, "costs", steep)
    monkeypatch.setattr(realnvp, "start_run", lambda *_: {"step": step - 1})
    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    images = Images("noise", 8, levels, levels, levels, None, False)
    with pytest.raises(Stop):
        cfg = Config(small=True, device="cpu", dtype="fp32", lr=0.01, steps=step)
        realnvp.train(cfg, model, images, None, None)
    assert seen[0] == (pytest.approx(0.01 * factor), pytest.approx(100, rel=1e-3))


# ---- The plane -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", POINTS)
def test_points(name):
    """Deterministic, another set for another seed, most of it in [-1, 1]², centred there.

    Through Batches unchanged.
    """
    points = make_points(name, 2000, 0)
    assert (
        points.shape == (2000, 2)
        and (points == make_points(name, 2000, 0)).all()
        and (points != make_points(name, 2000, 1)).any()
    )
    assert (
        (abs(points) < 1).mean() > 0.97
        and abs(points.mean(0)).max() < 0.05
        and points.std(0).min() > 0.25
    )
    data = load_points(name)
    assert data.shape == (2, 1, 1) and (len(data.train), len(data.valid), len(data.test)) == (
        102_400,
        10_000,
        10_000,
    )
    x = next(iter(Batches(data.test, 2000, "cpu")))
    torch.testing.assert_close(
        x.flatten(1),
        torch.from_numpy(make_points(name, 10_000, 2)[:2000]).float(),
        atol=1e-5,
        rtol=0,
    )


def test_checkerboard_is_uniform_on_half_of_the_squares():
    """So its entropy is log 2, the area: what docs hold `nll_nats` against."""
    squares = torch.from_numpy(make_points("checkerboard", 16_000, 0) * 2 + 2).floor().long()
    column, row = squares.T
    assert ((column + row) % 2 == 0).all() and squares.min() == 0 and squares.max() == 3
    share = torch.bincount(4 * row + column, minlength=16) / 16_000
    assert (share > 0).sum() == 8
    torch.testing.assert_close(share[share > 0], torch.full((8,), 1 / 8), atol=0.015, rtol=0)


def test_rings_and_spirals_are_where_they_should_be():
    radius = torch.from_numpy(make_points("rings", 4000, 0)).norm(dim=1)
    assert ((radius - 0.35).abs().minimum((radius - 0.85).abs()) < 0.25).all() and (
        radius < 0.6
    ).float().mean().item() == pytest.approx(0.5, abs=0.05)
    x, y = torch.from_numpy(make_points("spirals", 4000, 0)).T
    far = (
        x.hypot(y) > 0.3
    )  # an arm's angle grows by one turn over radius 0.9, the other's is half a turn on
    phase = (torch.atan2(y, x) / math.pi - 2 * x.hypot(y) / 0.9)[far] % 1
    assert torch.minimum(phase, 1 - phase).mean() < 0.1  # uniform phases have 0.25
    assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # both arms


@pytest.fixture(scope="module")
def learned():
    """A flow after 200 steps on the moons."""
    torch.manual_seed(0)
    model = RealNVP(Config(dataset="moons"), (2, 1, 1))
    data, optimizer = Batches(load_points("moons").train, 256, "cpu"), torch.optim.Adam(
        model.parameters(), lr=3e-3
    )
    for step in range(200):
        optimizer.zero_grad()
        loss = -model.log_prob(data.batch(step)).mean()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False), loss.item()


def test_trained_density_integrates_to_one(learned):
    """Over [-4, 4]², where it is far from N(0, 1):

    its nats are 1 below those of the best Gaussian.
    """
    model, nats = learned
    p = density(model, 4, 400)
    assert p.sum().item() * (8 / 400) ** 2 == pytest.approx(1, abs=2e-3)
    points = torch.from_numpy(make_points("moons", 20_000, 3))
    gaussian = 0.5 * torch.logdet(torch.cov(points.T)).item() + math.log(2 * math.pi) + 1
    assert nats < gaussian - 0.2


def test_density_is_that_of_the_samples(learned):
    """The mass of half planes and of a square, on the grid and as a share of draws."""
    model, _ = learned
    cells, side = 400, 4
    p, x = density(model, side, cells) * (2 * side / cells) ** 2, model.sample(40_000).flatten(1)
    axis = (torch.arange(cells) + 0.5) / cells * 2 * side - side
    for inside in (
        lambda a, b: (a > 0.1) & (b < 9),
        lambda a, b: (b > 0.2) & (a < 9),
        lambda a, b: (a.abs() < 0.5) & (b.abs() < 0.3),
    ):
        mass = p[inside(axis[:, None], axis[None, :])].sum().item()
        assert 0.1 < mass < 0.9 and inside(*x.T).float().mean().item() == pytest.approx(
            mass, abs=0.015
        )  # 5 sd of the share: 0.0125


def test_plane_has_its_own_defaults():
    """Batches of 512, 20 epochs, a rate of 3e-3; what the user says stands. Images:

    64, 1000, 1e-3.
    """
    moons, images = Config(dataset="moons"), Config(dataset="cifar10")
    assert (moons.batch_size, moons.epochs, moons.lr) == (512, 20, 3e-3)
    assert (images.batch_size, images.epochs, images.lr) == (64, 1000, 1e-3)
    mine = Config(dataset="rings", batch_size=7, epochs=3, lr=0.1)
    assert (mine.batch_size, mine.epochs, mine.lr) == (7, 3, 0.1)
