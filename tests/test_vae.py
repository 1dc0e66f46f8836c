"""vae.py against closed forms: parameter counts, initialisation, priors, flow, bound, samples.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform
noise (`noise_images`).
"""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import vae
from common import UserError, dmol_log_prob, dmol_sample, from_uint8, log_mean_exp, quantize
from conftest import count, seeded
from vae import VAE, Config, Decoder, Encoder, MoGPrior, NormalPrior, RealNVPPrior, gaussian


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(vae.WIDTHS, "small", dict(q_z=(8, 1), p_x=(8, 1), flow=(4, 1)))
    torch.manual_seed(0)


@pytest.fixture
def double(monkeypatch):
    """The scripts compute densities in fp32, with .float().

    Here that means fp64, to compare to many digits.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def noise_images(count, channels=3, size=8):
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def make(prior="realnvp", channels=3, size=8, initialize=True):
    model = VAE(Config(prior=prior, small=True), (channels, size, size))
    if initialize:
        model.initialize(noise_images(4, channels, size))
    return model


def randomize(module, sd=0.5):
    """Move every parameter away from its start, the flow away from the identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=sd)
    return module


def close_terms(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ---- Networks ------------------------------------------------------------------------------------
def test_parameter_counts_are_those_of_the_released_code():
    """q(z|x) and p(x|z) for 32x32 RGB, as traced in the predecessor's code."""
    with torch.device("meta"):
        assert count(Encoder(3, 32, 64, 8)) == 10_414_802
        assert count(Decoder(32, 128, 6, 100)) == 12_449_686
        model = VAE(Config(prior="mog", mog_components=1000), (3, 32, 32))
    assert count(model.q_z) == 10_414_802 and count(model.p_x) == 12_449_686
    assert count(model.p_z) == 1000 * 2 * 1024 == 2_048_000


@pytest.mark.parametrize("size", [32, 64])
def test_paper_size_has_32_to_42_million_parameters(size):
    """The range of the models in the paper, at both image sizes."""
    with torch.device("meta"):
        assert 32e6 < count(VAE(Config(), (3, size, size))) < 42e6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_shapes(size, channels):
    """z is (16, 8, 8) whatever the image.

    P = 10·3 parameters a grey pixel, 10·10 a colour pixel.
    """
    model, x = make(channels=channels, size=size, initialize=False), noise_images(2, channels, size)
    assert model.q_z(x).shape == (2, 32, 8, 8)
    assert model.p_x(torch.randn(2, 16, 8, 8)).shape == (2, {1: 30, 3: 100}[channels], size, size)
    assert {name: values.shape for name, values in model.terms(x).items()} == {
        "re_x": (2,),
        "kl_z": (2,),
    }


@pytest.mark.parametrize("size", [4, 33, 48])
def test_sizes_that_do_not_halve_to_8_are_refused(size):
    """The message names the size and sizes that would do."""
    with pytest.raises(UserError, match=f"size {size} .*8, 16, 32"):
        VAE(Config(small=True), (3, size, size))


def test_gaussian_is_the_normal_with_clamped_log_variance():
    """Channels 0-15 are μ, 16-31 log σ²: 0 -> σ = 1, 100 -> σ² = e⁷, -100 -> σ² = e⁻⁷.

    Densities sum_over_processes over (16, 8, 8).
    """
    mean, z = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8)
    for log_var, clamped in ((0.0, 0.0), (1.3, 1.3), (100.0, 7.0), (-100.0, -7.0)):
        q = gaussian(torch.cat([mean, torch.full_like(mean, log_var)], 1))
        oracle = Normal(mean, math.exp(clamped / 2))
        torch.testing.assert_close(q.stddev, oracle.stddev.expand_as(mean))
        torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z).sum((1, 2, 3)))
    assert (
        gaussian(torch.randn(1, 32, 8, 8).bfloat16()).rsample().dtype == torch.float32
    )  # whatever the networks run in


# ---- Data-dependent initialisation
def test_initialize_gives_conv_outputs_mean_0_and_their_sd():
    """Seen again, with the same noise, the batch leaves every conv with mean 0 and the sd it was
    asked for.
    """
    model, x, seen = make(size=16, initialize=False), noise_images(4, size=16), []

    def check(layer, inputs, output):
        if output.shape[2:] != (1, 1):
            sd, mean = torch.std_mean(output, (0, 2, 3), correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(
                sd, torch.full_like(sd, layer.initial_sd), atol=1e-3, rtol=1e-2
            )
            seen.append(layer.initial_sd)

    seeded(model.initialize, x)
    for layer in model.modules():
        if hasattr(layer, "initial_sd"):
            layer.register_forward_hook(check)
    seeded(model.terms, x)
    assert {scale: seen.count(scale) for scale in set(seen)} == {
        0.1: 2,  # what q_z and p_x end in
        0.0: 10,  # what s, t of the 10 couplings end in
        1.0: 2 * 2 + 1 + 2 + 1 + 10 * 2,
    }  # q_z: 2 blocks of 2 convs, 1 that halves; p_x: 1 block, 1 that doubles; 10 couplings


def test_initialize_on_one_image_is_finite():
    """Pooled maps hold one value a channel there, whose sd is 0 or undefined.

    The convs on them keep their weights.
    """
    model, x = make(size=16, initialize=False), noise_images(1, size=16)
    gates = [m.gate for m in model.modules() if isinstance(m, vae.ChannelAttention)]
    before = [p.clone() for gate in gates for p in gate.parameters()]
    model.initialize(x)
    assert before and all(
        map(torch.equal, before, (p for gate in gates for p in gate.parameters()))
    )
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(values.isfinite().all() for values in model.terms(x).values())


def test_initialisation_lives_in_the_state_dict():
    """A model built anew and loaded gives the same terms, with nothing left to initialise."""
    model, fresh, x = make(), make(initialize=False), noise_images(2)
    assert not torch.allclose(seeded(model.elbo, x), seeded(fresh.elbo, x))
    fresh.load_state_dict(model.state_dict())
    close_terms(seeded(model.terms, x), seeded(fresh.terms, x))


def test_initialised_flow_is_the_identity():
    """s = t = 0, so v = z, log |det| = 0 and log p(z) is the standard normal's."""
    flow, z = make().p_z, torch.randn(3, 16, 8, 8)
    v, log_det = flow.flow(z)
    torch.testing.assert_close(v, z)
    torch.testing.assert_close(log_det, torch.zeros(3))
    torch.testing.assert_close(flow.log_prob(z), NormalPrior().log_prob(z))
    torch.testing.assert_close(flow.from_noise(z), z)


def test_bound_with_the_flow_at_the_identity_is_that_with_a_normal_prior():
    """The same q(z|x), p(x|z) and noise under two priors that are the same density."""
    flow, normal, x = make("realnvp"), make("normal"), noise_images(3)
    normal.q_z, normal.p_x = flow.q_z, flow.p_x
    close_terms(seeded(flow.terms, x), seeded(normal.terms, x))
    torch.testing.assert_close(seeded(flow.log_weights, x, 3), seeded(normal.log_weights, x, 3))


# ---- Priors --------------------------------------------------------------------------------------
def test_normal_prior_against_torch():
    """1,024 independent N(0, 1); at z = 0 that is -512 log 2π."""
    z = torch.randn(3, 16, 8, 8)
    torch.testing.assert_close(
        NormalPrior().log_prob(z), Independent(Normal(torch.zeros(16, 8, 8), 1.0), 3).log_prob(z)
    )
    assert NormalPrior().log_prob(0 * z)[0].item() == pytest.approx(-512 * math.log(2 * math.pi))


def test_mog_prior_against_torch():
    """Equal weights, a diagonal Gaussian each."""
    prior, z = randomize(MoGPrior(5), 0.1), torch.randn(3, 16, 8, 8)
    oracle = MixtureSameFamily(
        Categorical(torch.ones(5)), Independent(Normal(prior.mean, prior.log_sd.exp()), 3)
    )
    torch.testing.assert_close(prior.log_prob(z), oracle.log_prob(z))


def test_mog_prior_draws_both_components():
    """Components N(2, 0.5²) and N(-1, 1.5²):

    overall mean 0.5, variance (0.25 + 2.25)/2 + 1.5² = 3.5, half of z each way.
    """
    prior = MoGPrior(2)
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1).expand_as(prior.mean))
        prior.log_sd.copy_(torch.tensor([0.5, 1.5]).log().view(2, 1, 1, 1).expand_as(prior.mean))
        z = prior.from_noise(torch.randn(2000, 16, 8, 8))
    per_image_mean, per_image_sd = z.mean((1, 2, 3)), z.std(
        (1, 2, 3)
    )  # a whole z comes from one component
    first = per_image_mean > 0.5
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.05)  # sd of the share: 0.011
    assert z.mean().item() == pytest.approx(0.5, abs=0.15) and z.var().item() == pytest.approx(
        3.5, abs=0.15
    )
    torch.testing.assert_close(per_image_mean, torch.where(first, 2.0, -1.0), atol=0.25, rtol=0)
    torch.testing.assert_close(per_image_sd, torch.where(first, 0.5, 1.5), atol=0.2, rtol=0)


# ---- The flow: test_realnvp.py has every layer's proof; here it is on latents, with dense blocks
# for s and t -----------
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_flow_inverse(double, dtype, error):
    """z -> v -> z and v -> z -> v, away from the identity."""
    flow, z = randomize(RealNVPPrior(4, 1), 0.1).to(dtype), torch.randn(3, 16, 8, 8, dtype=dtype)
    with torch.no_grad():
        v, _ = flow.flow(z)
        assert (v - z).abs().mean() > 0.1
        assert (flow.from_noise(v) - z).abs().max() < error
        assert (flow.flow(flow.from_noise(z))[0] - z).abs().max() < error


def test_flow_has_two_scales_and_ten_couplings():
    """3 checkerboard couplings on 16x8x8, 3 channel-wise on 64x4x4, 4 checkerboard on 32x4x4, each
    with one dense block and a conv.
    """
    seen = []
    flow = RealNVPPrior(4, 2)
    for m in flow.modules():
        if isinstance(m, vae.Coupling):
            m.register_forward_pre_hook(lambda m, inputs: seen.append(tuple(inputs[0].shape[1:])))
            assert isinstance(m.net[0], vae.DenseBlock) and len(m.net[0].layers) == 2
    flow.log_prob(torch.randn(1, 16, 8, 8))
    assert seen == [(16, 8, 8)] * 3 + [(64, 4, 4)] * 3 + [(32, 4, 4)] * 4


def test_flow_log_det_is_the_jacobians(double):
    """The whole flow: log |det| of the 1024x1024 autograd Jacobian, and log p(z) = log N(v.

    0, 1) + it.
    """
    flow = randomize(RealNVPPrior(2, 1), 0.3).double().requires_grad_(False)
    z = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: flow.flow(z)[0], z, vectorize=True
    ).view(1024, 1024)
    v, log_det = flow.flow(z)
    assert log_det.abs() > 0.1 and (v != z).all()
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])
    torch.testing.assert_close(
        flow.log_prob(z), Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3)) + log_det
    )


# ---- The bound -----------------------------------------------------------------------------------
A, TAU = (
    1.5,
    0.5,
)  # z ~ N(0, 1), x|z ~ N(1.5 z, 0.5²), so x ~ N(0, 1.5² + 0.5² = 2.5), z|x ~ N(0.6 x, 0.1)


class ExactPosterior(torch.nn.Module):
    """q(z|x) = N(0.6 x, 0.1 e^wrong) for z's first channel, the prior N(0, 1) for the 15 that do
    not matter.
    """

    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        zeros = torch.zeros(len(x), 15, 8, 8)
        log_var = torch.zeros_like(x) + math.log(TAU**2 / (A**2 + TAU**2)) + self.wrong
        return torch.cat([x * A / (A**2 + TAU**2), zeros, log_var, zeros], 1)


class Linear(torch.nn.Module):
    """p(x|z)'s mean: 1.5 z's first channel."""

    def forward(self, z):
        return A * z[:, :1]


def around(mean, block):
    """In place of Dmol: p(x|z) = N(mean, TAU²)."""
    return Independent(Normal(mean, TAU), 3)


def linear_gaussian(monkeypatch, wrong):
    """A VAE whose log p(x) is known: 64 pixels, each of them the linear-Gaussian model above.

    -> model, x, log p(x)
    """
    sd = math.sqrt(A**2 + TAU**2)
    monkeypatch.setattr(vae, "Dmol", around)
    model = make("normal", channels=1, initialize=False)
    model.q_z = ExactPosterior(wrong)
    model.p_x = Linear()
    x = sd * torch.randn(3, 1, 8, 8)
    return model, x, Normal(0.0, sd).log_prob(x).sum((1, 2, 3))


def test_with_the_exact_posterior_the_elbo_is_log_p(monkeypatch):
    """q(z|x) = p(z|x): the bound is tight, and has no noise."""
    model, x, log_p = linear_gaussian(monkeypatch, wrong=0.0)
    torch.testing.assert_close(model.elbo(x), log_p, atol=2e-3, rtol=0)


def test_elbo_loses_the_kl_to_the_posterior(monkeypatch):
    """E[elbo] = log p(x) - KL(q‖p(z|x)), 64·(e^0.3 - 1.3)/2 = 1.6 nats here.

    The terms are costs that sum up to minus it.
    """
    model, x, log_p = linear_gaussian(monkeypatch, wrong=0.3)
    kl = kl_divergence(gaussian(model.q_z(x)), gaussian(ExactPosterior()(x)))
    torch.testing.assert_close(kl, torch.full((3,), 64 * (math.exp(0.3) - 1.3) / 2))
    model.q_z.wrong = torch.tensor(0.3, requires_grad=True)
    elbo = model.elbo(x.repeat(500, 1, 1, 1)).view(500, 3)
    torch.testing.assert_close(
        elbo.mean(0), log_p - kl, atol=0.4, rtol=0
    )  # sd of log w: 1.9, so 0.09 for the mean
    assert list(model.terms(x)) == ["re_x", "kl_z"] and elbo.std(0).min() > 1
    (gradient,) = torch.autograd.grad(
        elbo.mean(), model.q_z.wrong
    )  # through both terms and the draw of z: of -KL, -64·(e^0.3 - 1)/2
    assert gradient.item() == pytest.approx(-32 * (math.exp(0.3) - 1), abs=1)


def test_with_the_exact_posterior_every_weight_is_p_of_x(monkeypatch):
    """q(z|x) = p(z|x): log w = log p(x) whatever z is drawn."""
    model, x, log_p = linear_gaussian(monkeypatch, wrong=0.0)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=2e-3, rtol=0)


def test_bounds_order_and_tighten(monkeypatch):
    """Bounds of S = 1, 8, 64 samples rise from the ELBO, log p(x) - KL(q‖p(z|x)), towards log p(x).
    """
    model, x, log_p = linear_gaussian(monkeypatch, wrong=0.3)
    kl = kl_divergence(gaussian(model.q_z(x)), gaussian(ExactPosterior()(x)))
    log_w = model.log_weights(x, 64 * 100)
    bound = {
        S: log_mean_exp(log_w.view(-1, S, 3), 1).mean(0) for S in (1, 8, 64)
    }  # means over 100 repetitions or more
    torch.testing.assert_close(
        bound[1], log_p - kl, atol=0.1, rtol=0
    )  # sd of log w: 1.9, so 0.024 for the mean
    assert (
        (bound[1] + 0.3 < bound[8]).all()
        and (bound[8] + 0.1 < bound[64]).all()
        and (bound[64] < log_p).all()
    )
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.15, rtol=0)


def test_terms_are_per_image(no_noise):
    """A batch costs what its images cost one by one; elbo is minus the sum.

    A discrete x has -log p(x|z) > 0.
    """
    model, x = make(size=16), noise_images(3, size=16)
    randomize(model.p_z, 0.3)
    terms = model.terms(x)
    close_terms(
        terms,
        {name: torch.cat([model.terms(x[i : i + 1])[name] for i in range(3)]) for name in terms},
        atol=1e-2,
        rtol=1e-5,
    )
    torch.testing.assert_close(model.elbo(x), -(terms["re_x"] + terms["kl_z"]))
    assert (terms["re_x"] > 0).all() and terms["re_x"].unique().numel() == 3


@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
def test_log_weights_are_those_of_the_formula(prior):
    """log p(x|z) + log p(z) - log q(z|x) of the same draws, one after another."""
    model, x = make(prior), noise_images(2)
    log_w = seeded(model.log_weights, x, 3)
    torch.manual_seed(1)
    for s in range(3):
        q = gaussian(model.q_z(x))
        z = q.rsample()
        expected = dmol_log_prob(x, model.p_x(z)) + model.p_z.log_prob(z) - q.log_prob(z)
        torch.testing.assert_close(log_w[s], expected, rtol=1e-5, atol=1e-2)
    assert log_w.shape == (3, 2) and log_w.std(0).min() > 1e-2


def test_log_weights_average_to_the_elbo():
    """log w of one sample is the ELBO of one sample:

    equal means over 200 draws, within 4 standard errors.
    """
    model, x = make(), noise_images(1)
    randomize(model.p_z, 0.2)
    with torch.no_grad():
        log_w, elbo = model.log_weights(x, 200)[:, 0], model.elbo(x.expand(200, -1, -1, -1))
    error = math.sqrt((log_w.var() + elbo.var()).item() / 200)
    assert abs(log_w.mean() - elbo.mean()).item() < 4 * error
    assert log_w.std().item() == pytest.approx(elbo.std().item(), rel=0.3)


def test_log_weights_encode_once():
    """q(z|x) is one pass, however many samples."""
    model, calls = make(), []
    model.q_z.register_forward_hook(lambda *_: calls.append(1))
    model.log_weights(noise_images(2), 9)
    assert len(calls) == 1


def test_bf16_networks_give_fp32_terms():
    """Under autocast the networks round, likelihoods do not:

    terms are fp32, the ELBO moves by less than 2 %.
    """
    model, x = make(size=16), noise_images(2, size=16)
    fp32 = seeded(model.terms, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_z(x).dtype == torch.bfloat16
        bf16 = seeded(model.terms, x)
    assert all(values.dtype == torch.float32 for values in bf16.values())
    torch.testing.assert_close(sum(bf16.values()), sum(fp32.values()), rtol=0.02, atol=0)


def test_channels_last_changes_nothing():
    """Memory layout is a matter of speed."""
    model, x = make(size=16), noise_images(2, size=16)
    terms = seeded(model.terms, x)
    model, x = model.to(memory_format=torch.channels_last), x.contiguous(
        memory_format=torch.channels_last
    )
    close_terms(seeded(model.terms, x), terms, atol=1e-2, rtol=1e-5)


# ---- Images --------------------------------------------------------------------------------------
def assert_images(x, shape):
    """Of that shape, in [-1, 1], on the 256-level grid."""
    assert x.shape == shape and x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
@pytest.mark.parametrize("mean", [False, True])
def test_images_are_images(prior, mean):
    """Shapes and grid of samples, reconstructions and interpolations, drawn or means."""
    model, x = make(prior, channels=1, size=16), noise_images(4, channels=1, size=16)
    assert_images(model.sample(3, mean=mean), (3, 1, 16, 16))
    assert_images(model.reconstruct(x, mean=mean), (4, 1, 16, 16))
    assert_images(model.interpolate(x[:2], x[2:], count=5, mean=mean), (2, 5, 1, 16, 16))


LEVEL = 2.01 / 255  # one grid step: rounding may go either way


def test_mean_is_deterministic_given_z(no_noise):
    """With z fixed, mean=True gives one image; a draw from p(x|z) gives another each time."""
    model, x = make(), noise_images(2)
    assert torch.equal(model.reconstruct(x, mean=True), model.reconstruct(x, mean=True))
    assert not torch.equal(model.reconstruct(x), model.reconstruct(x))


def test_temperature_scales_the_priors_noise(monkeypatch):
    """N(0, 1): the decoder sees noise of sd 0.5 at temperature 0.5.

    At 0, all z are 0 and so all means are one image.
    """
    model, seen = make("normal"), []
    model.p_x.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    cold = model.sample(3, temperature=0, mean=True)
    assert (seen[-1] == 0).all() and (cold - cold[:1]).abs().max() < LEVEL
    for temperature in (0.5, 1.0):
        model.sample(3, temperature)
        assert seen[-1].std().item() == pytest.approx(temperature, rel=0.1)


def test_samples_pass_through_the_flow():
    """sample() decodes z = f(v), v the noise that the same seed gives."""
    model, seen = make(), []
    randomize(model.p_z, 0.3)
    model.p_x.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    seeded(model.sample, 2)
    v, _ = model.p_z.flow(seen[0])
    torch.testing.assert_close(v, seeded(torch.randn, 2, 16, 8, 8), atol=1e-4, rtol=0)


def test_interpolation_is_the_straight_line():
    """Three steps decode the means of q(z|x1) and q(z|x2) and, between them, the midpoint.

    Image by image, step by step.
    """
    model, x1, x2, seen = make(), noise_images(2), noise_images(2), []
    handle = model.p_x.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    line = model.interpolate(x1, x2, count=3, mean=True)
    handle.remove()
    z1, z2 = model.q_z(x1)[:, :16], model.q_z(x2)[:, :16]
    for i, z in enumerate((z1, (z1 + z2) / 2, z2)):
        torch.testing.assert_close(seen[0].unflatten(0, (2, 3))[:, i], z)
        assert (line[:, i] - dmol_sample(model.p_x(z), mean=True)).abs().max() < LEVEL


def test_features_keep_the_precision_of_the_networks():
    """Under autocast an fp32 image among them does not make all of them fp32."""
    block = vae.DenseBlock(3, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16
    assert block(torch.randn(1, 3, 8, 8)).dtype == torch.float32
