"""vae.py against closed forms: parameter counts, initialisation, priors, flow, bound, samples.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform
noise (`noise_images`).
"""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import vae
from common import Dmol, UserError, from_uint8, log_mean_exp, quantize
from conftest import count, inputs_of, seeded
from vae import VAE, Config, Decoder, Encoder, MoGPrior, NormalPrior, RealNVPPrior, gaussian


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(vae.WIDTHS, "small", dict(q_z=(8, 1), p_x=(8, 1), flow=(4, 1)))
    torch.manual_seed(0)


@pytest.fixture
def double(monkeypatch):
    """The scripts compute densities in fp32, by .float(); here that means fp64, for many digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def noise_images(count, channels=3, size=8):
    """Images of uniform noise, on the grid."""
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def make(prior="realnvp", channels=3, size=8, initialize=True):
    """A narrow VAE, initialised by four images."""
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
    """The same keys, and values within the tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


# ---- Networks ------------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_released_code():
    """Those are q(z|x) and p(x|z) for 32x32 RGB, as traced in the predecessor's code."""
    with torch.device("meta"):
        assert count(Encoder(3, 32, 64, 8)) == 10_414_802
        assert count(Decoder(32, 128, 6, 100, sd=0.1)) == 12_449_686
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
    """z is (16, 8, 8) whatever the image; a grey pixel has 10·3 parameters, a colour one 10·10."""
    model = make(channels=channels, size=size, initialize=False)
    x = noise_images(2, channels, size)
    assert model.q_z(x).mean.shape == (2, 16, 8, 8)
    params = inputs_of(model.p_x[-1])
    p_x = model.p_x(torch.randn(2, 16, 8, 8))
    assert p_x.logits.shape == (2, 10, size, size) and len(p_x.means) == channels
    assert model.p_x[-1](params[0]).shape[1] == (30 if channels == 1 else 100)
    terms = model.terms(x)
    assert terms.keys() == {"re_x", "kl_z"}
    assert terms["re_x"].shape == terms["kl_z"].shape == (2,)


@pytest.mark.parametrize("size", [4, 33, 48])
def test_sizes_that_do_not_halve_to_8_are_refused(size):
    """The message names the size and sizes that would do."""
    with pytest.raises(UserError, match=f"side {size} .*8, 16, 32"):
        VAE(Config(small=True), (3, size, size))


def test_gaussian_is_the_normal_with_clamped_log_variance():
    """Channels 0-15 are μ, 16-31 log σ²: 0 -> σ = 1, 100 -> σ² = e⁷, -100 -> σ² = e⁻⁷.

    Log-densities are summed over (16, 8, 8), in fp32 whatever the networks run in.
    """
    mean = torch.randn(3, 16, 8, 8)
    z = torch.randn(3, 16, 8, 8)
    for log_var, clamped in ((0.0, 0.0), (1.3, 1.3), (100.0, 7.0), (-100.0, -7.0)):
        q = gaussian(torch.cat([mean, torch.full_like(mean, log_var)], 1))
        oracle = Normal(mean, math.exp(clamped / 2))
        torch.testing.assert_close(q.stddev, oracle.stddev.expand_as(mean))
        torch.testing.assert_close(q.log_prob(z), oracle.log_prob(z).sum((1, 2, 3)))
    of_bf16 = gaussian(torch.randn(1, 32, 8, 8).bfloat16())
    assert of_bf16.rsample().dtype == torch.float32


# ---- Data-dependent initialisation ---------------------------------------------------------------

def test_initialize_gives_conv_outputs_mean_0_and_their_sd():
    """Seen again, with the same noise, the batch leaves every conv with mean 0 and its own sd."""
    model = make(size=16, initialize=False)
    x = noise_images(4, size=16)
    seen = []

    def check(layer, inputs, output):
        if output.shape[2:] != (1, 1):
            sd, mean = torch.std_mean(output, (0, 2, 3), correction=0)
            wanted = torch.full_like(sd, layer.initial_sd)
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0)
            torch.testing.assert_close(sd, wanted, atol=1e-3, rtol=1e-2)
            seen.append(layer.initial_sd)

    seeded(model.initialize, x)
    for layer in model.modules():
        if hasattr(layer, "initial_sd"):
            layer.register_forward_hook(check)
    seeded(model.terms, x)
    assert seen.count(0.1) == 2  # what q_z and p_x end in
    assert seen.count(0.0) == 10  # what s, t of the 10 couplings end in
    of_q = 2 * 2 + 1  # two blocks of two convs, one that halves
    of_p = 2 + 1  # a block, one that doubles
    assert seen.count(1.0) == of_q + of_p + 10 * 2
    assert set(seen) == {0.0, 0.1, 1.0}


def test_initialize_on_one_image_is_finite():
    """Pooled maps hold one value a channel there, whose sd is 0 or undefined.

    The convs on them keep their weights.
    """
    model = make(size=16, initialize=False)
    x = noise_images(1, size=16)
    of_gates = []
    for module in model.modules():
        if isinstance(module, vae.ChannelAttention):
            of_gates += module.gate.parameters()
    before = [p.clone() for p in of_gates]
    model.initialize(x)
    assert before and all(map(torch.equal, before, of_gates))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(values.isfinite().all() for values in model.terms(x).values())


def test_initialisation_lives_in_the_state_dict():
    """A model built anew and loaded gives the same terms, with nothing left to initialise."""
    model = make()
    fresh = make(initialize=False)
    x = noise_images(2)
    assert not torch.allclose(seeded(model.elbo, x), seeded(fresh.elbo, x))
    fresh.load_state_dict(model.state_dict())
    close_terms(seeded(model.terms, x), seeded(fresh.terms, x))


def test_initialised_flow_is_the_identity():
    """s = t = 0, so v = z, log |det| = 0 and log p(z) is the standard normal's."""
    prior = make().p_z
    z = torch.randn(3, 16, 8, 8)
    v, log_det = prior.flow(z)
    torch.testing.assert_close(v, z)
    torch.testing.assert_close(log_det, torch.zeros(3))
    torch.testing.assert_close(prior.log_prob(z), NormalPrior().log_prob(z))
    torch.testing.assert_close(prior.from_noise(z), z)


def test_bound_with_the_flow_at_the_identity_is_that_with_a_normal_prior():
    """q(z|x), p(x|z) and noise are the same, under two priors that are the same density."""
    flow = make("realnvp")
    normal = make("normal")
    normal.q_z = flow.q_z
    normal.p_x = flow.p_x
    x = noise_images(3)
    close_terms(seeded(flow.terms, x), seeded(normal.terms, x))
    torch.testing.assert_close(seeded(flow.log_weights, x, 3), seeded(normal.log_weights, x, 3))


# ---- Priors --------------------------------------------------------------------------------------

def test_normal_prior_against_torch():
    """It is 1,024 independent N(0, 1): at z = 0 log p is -512 log 2π."""
    prior = NormalPrior()
    oracle = Independent(Normal(torch.zeros(16, 8, 8), 1.0), 3)
    z = torch.randn(3, 16, 8, 8)
    torch.testing.assert_close(prior.log_prob(z), oracle.log_prob(z))
    assert prior.log_prob(0 * z)[0].item() == pytest.approx(-512 * math.log(2 * math.pi))


def test_mog_prior_against_torch():
    """Its components have equal weights, and a diagonal Gaussian each."""
    prior = randomize(MoGPrior(5), 0.1)
    z = torch.randn(3, 16, 8, 8)
    components = Independent(Normal(prior.mean, prior.log_sd.exp()), 3)
    oracle = MixtureSameFamily(Categorical(torch.ones(5)), components)
    torch.testing.assert_close(prior.log_prob(z), oracle.log_prob(z))


def test_mog_prior_draws_both_components():
    """N(2, 0.5²) and N(-1, 1.5²) are drawn from half of the time each, for all of a z.

    The overall mean is 0.5, the variance (0.25 + 2.25)/2 + 1.5² = 3.5.
    """
    prior = MoGPrior(2)
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1).expand_as(prior.mean))
        prior.log_sd.copy_(torch.tensor([0.5, 1.5]).log().view(2, 1, 1, 1).expand_as(prior.mean))
        z = prior.from_noise(torch.randn(2000, 16, 8, 8))
    mean = z.mean((1, 2, 3))
    sd = z.std((1, 2, 3))
    first = mean > 0.5
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.05)  # sd of the share: 0.011
    assert z.mean().item() == pytest.approx(0.5, abs=0.15)
    assert z.var().item() == pytest.approx(3.5, abs=0.15)
    torch.testing.assert_close(mean, torch.where(first, 2.0, -1.0), atol=0.25, rtol=0)
    torch.testing.assert_close(sd, torch.where(first, 0.5, 1.5), atol=0.2, rtol=0)


# ---- The flow ------------------------------------------------------------------------------------
# test_realnvp.py has every layer's proof; here it is on latents, with dense blocks for s and t.

@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_flow_inverse(double, dtype, error):
    """z -> v -> z and v -> z -> v come back, away from the identity."""
    prior = randomize(RealNVPPrior(4, 1), 0.1).to(dtype)
    z = torch.randn(3, 16, 8, 8, dtype=dtype)
    with torch.no_grad():
        v, _ = prior.flow(z)
        assert (v - z).abs().mean() > 0.1
        assert (prior.from_noise(v) - z).abs().max() < error
        again, _ = prior.flow(prior.from_noise(z))
        assert (again - z).abs().max() < error


def test_flow_has_two_scales_and_ten_couplings():
    """3 are checkerboard on 16x8x8, 3 channel-wise on 64x4x4, 4 checkerboard on 32x4x4.

    Each has one dense block and a conv.
    """
    seen = []

    def note(coupling, inputs):
        seen.append(tuple(inputs[0].shape[1:]))

    flow = RealNVPPrior(4, 2)
    for module in flow.modules():
        if isinstance(module, vae.Coupling):
            module.register_forward_pre_hook(note)
            block = module.net[0]
            assert isinstance(block, vae.DenseBlock) and len(block.layers) == 2
    flow.log_prob(torch.randn(1, 16, 8, 8))
    assert seen == [(16, 8, 8)] * 3 + [(64, 4, 4)] * 3 + [(32, 4, 4)] * 4


def test_flow_log_det_is_the_jacobians(double):
    """It is log |det| of the 1024x1024 autograd Jacobian, and log p(z) = log N(v; 0, 1) + it."""
    prior = randomize(RealNVPPrior(2, 1), 0.3).double().requires_grad_(False)
    z = torch.randn(1, 16, 8, 8, dtype=torch.float64)

    def noise_of(z):
        return prior.flow(z)[0]

    jacobian = torch.autograd.functional.jacobian(noise_of, z, vectorize=True).view(1024, 1024)
    v, log_det = prior.flow(z)
    assert log_det.abs() > 0.1 and (v != z).all()
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1])
    log_normal = Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3))
    torch.testing.assert_close(prior.log_prob(z), log_normal + log_det)


# ---- The bound -----------------------------------------------------------------------------------

# z ~ N(0, 1), x|z ~ N(1.5 z, 0.5²), so x ~ N(0, 1.5² + 0.5² = 2.5), z|x ~ N(0.6 x, 0.1).
A = 1.5
TAU = 0.5


class ExactPosterior(torch.nn.Module):
    """q(z|x) = N(0.6 x, 0.1 e^wrong) for z's first channel.

    The 15 that do not matter have the prior N(0, 1).
    """

    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        zeros = torch.zeros(len(x), 15, 8, 8)
        log_var = torch.zeros_like(x) + math.log(TAU**2 / (A**2 + TAU**2)) + self.wrong
        return gaussian(torch.cat([x * A / (A**2 + TAU**2), zeros, log_var, zeros], 1))


class Linear(torch.nn.Module):
    """p(x|z) = N(1.5 z's first channel, TAU²), in place of a mixture."""

    def forward(self, z):
        return Independent(Normal(A * z[:, :1], TAU), 3)


def linear_gaussian(wrong):
    """A VAE whose log p(x) is known -> model, x, log p(x).

    It has 64 pixels, each of them the linear-Gaussian model above.
    """
    sd = math.sqrt(A**2 + TAU**2)
    model = make("normal", channels=1, initialize=False)
    model.q_z = ExactPosterior(wrong)
    model.p_x = Linear()
    x = sd * torch.randn(3, 1, 8, 8)
    return model, x, Normal(0.0, sd).log_prob(x).sum((1, 2, 3))


def test_with_the_exact_posterior_the_elbo_is_log_p():
    """q(z|x) = p(z|x): the bound is tight, and has no noise."""
    model, x, log_p = linear_gaussian(wrong=0.0)
    torch.testing.assert_close(model.elbo(x), log_p, atol=2e-3, rtol=0)


def test_elbo_loses_the_kl_to_the_posterior():
    """E[elbo] = log p(x) - KL(q‖p(z|x)), and that KL is 64·(e^0.3 - 1.3)/2 = 1.6 nats here.

    The gradient, through both terms and the draw of z, is that of -KL, -64·(e^0.3 - 1)/2.
    """
    model, x, log_p = linear_gaussian(wrong=0.3)
    kl = kl_divergence(model.q_z(x), ExactPosterior()(x))
    torch.testing.assert_close(kl, torch.full((3,), 64 * (math.exp(0.3) - 1.3) / 2))
    model.q_z.wrong = torch.tensor(0.3, requires_grad=True)
    elbo = model.elbo(x.repeat(500, 1, 1, 1)).view(500, 3)
    # log w has an sd of 1.9, its mean over 500 draws one of 0.09.
    torch.testing.assert_close(elbo.mean(0), log_p - kl, atol=0.4, rtol=0)
    assert list(model.terms(x)) == ["re_x", "kl_z"] and elbo.std(0).min() > 1
    (gradient,) = torch.autograd.grad(elbo.mean(), model.q_z.wrong)
    assert gradient.item() == pytest.approx(-32 * (math.exp(0.3) - 1), abs=1)


def test_with_the_exact_posterior_every_weight_is_p_of_x():
    """q(z|x) = p(z|x): log w = log p(x) whatever z is drawn."""
    model, x, log_p = linear_gaussian(wrong=0.0)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=2e-3, rtol=0)


def test_bounds_order_and_tighten():
    """Bounds of 1, 8 and 64 samples rise from log p(x) - KL(q‖p(z|x)), the ELBO, towards log p(x).
    """
    model, x, log_p = linear_gaussian(wrong=0.3)
    kl = kl_divergence(model.q_z(x), ExactPosterior()(x))
    log_w = model.log_weights(x, 64 * 100)
    bound = {}
    for S in (1, 8, 64):
        bound[S] = log_mean_exp(log_w.view(-1, S, 3), 1).mean(0)  # over 100 repetitions or more
    # log w has an sd of 1.9, its mean over 6,400 draws one of 0.024.
    torch.testing.assert_close(bound[1], log_p - kl, atol=0.1, rtol=0)
    assert (bound[1] + 0.3 < bound[8]).all()
    assert (bound[8] + 0.1 < bound[64]).all()
    assert (bound[64] < log_p).all()
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.15, rtol=0)


def test_terms_are_per_image(no_noise):
    """A batch costs what its images cost one by one; elbo is minus the sum.

    A discrete x has -log p(x|z) > 0.
    """
    model = make(size=16)
    randomize(model.p_z, 0.3)
    x = noise_images(3, size=16)
    terms = model.terms(x)
    one_by_one = [model.terms(image) for image in x.split(1)]
    alone = {name: torch.cat([each[name] for each in one_by_one]) for name in terms}
    close_terms(terms, alone, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(model.elbo(x), -(terms["re_x"] + terms["kl_z"]))
    assert (terms["re_x"] > 0).all() and terms["re_x"].unique().numel() == 3


@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
def test_log_weights_are_those_of_the_formula(prior):
    """They are log p(x|z) + log p(z) - log q(z|x) of the same draws, one after another."""
    model = make(prior)
    x = noise_images(2)
    log_w = seeded(model.log_weights, x, 3)
    torch.manual_seed(1)
    for s in range(3):
        q = model.q_z(x)
        z = q.rsample()
        expected = model.p_x(z).log_prob(x) + model.p_z.log_prob(z) - q.log_prob(z)
        torch.testing.assert_close(log_w[s], expected, rtol=1e-5, atol=1e-2)
    assert log_w.shape == (3, 2) and log_w.std(0).min() > 1e-2


def test_log_weights_average_to_the_elbo():
    """log w of one sample is the ELBO of one sample: means of 200 are within 4 standard errors."""
    model = make()
    x = noise_images(1)
    randomize(model.p_z, 0.2)
    with torch.no_grad():
        log_w = model.log_weights(x, 200)[:, 0]
        elbo = model.elbo(x.expand(200, -1, -1, -1))
    error = math.sqrt((log_w.var() + elbo.var()).item() / 200)
    assert abs(log_w.mean() - elbo.mean()).item() < 4 * error
    assert log_w.std().item() == pytest.approx(elbo.std().item(), rel=0.3)


def test_log_weights_encode_once():
    """q(z|x) is one pass, however many samples."""
    model = make()
    seen = inputs_of(model.q_z)
    model.log_weights(noise_images(2), 9)
    assert len(seen) == 1


def test_bf16_networks_give_fp32_terms():
    """Under autocast the networks round, likelihoods do not; the ELBO moves by less than 2 %."""
    model = make(size=16)
    x = noise_images(2, size=16)
    fp32 = seeded(model.terms, x)
    with torch.autocast("cpu", torch.bfloat16):
        features = inputs_of(model.q_z[-1])
        bf16 = seeded(model.terms, x)
    assert features[0].dtype == torch.bfloat16
    assert all(values.dtype == torch.float32 for values in bf16.values())
    torch.testing.assert_close(sum(bf16.values()), sum(fp32.values()), rtol=0.02, atol=0)


def test_channels_last_changes_nothing():
    """Memory layout is a matter of speed."""
    model = make(size=16)
    x = noise_images(2, size=16)
    terms = seeded(model.terms, x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    close_terms(seeded(model.terms, x), terms, atol=1e-2, rtol=1e-5)


# ---- Images --------------------------------------------------------------------------------------

def assert_images(x, shape):
    """x has that shape, lies in [-1, 1], and on the 256-level grid."""
    assert x.shape == shape and x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
@pytest.mark.parametrize("mean", [False, True])
def test_images_are_images(prior, mean):
    """Samples, reconstructions and interpolations have the shape and lie on the grid."""
    model = make(prior, channels=1, size=16)
    x = noise_images(4, channels=1, size=16)
    assert_images(model.sample(3, mean=mean), (3, 1, 16, 16))
    assert_images(model.reconstruct(x, mean=mean), (4, 1, 16, 16))
    assert_images(model.interpolate(x[:2], x[2:], count=5, mean=mean), (2, 5, 1, 16, 16))


LEVEL = 2.01 / 255  # one grid step: rounding may go either way


def test_mean_is_deterministic_given_z(no_noise):
    """With z fixed, mean=True gives one image; a draw from p(x|z) gives another each time."""
    model = make()
    x = noise_images(2)
    assert torch.equal(model.reconstruct(x, mean=True), model.reconstruct(x, mean=True))
    assert not torch.equal(model.reconstruct(x), model.reconstruct(x))


def test_temperature_scales_the_priors_noise(monkeypatch):
    """At temperature 0.5 the decoder sees noise of sd 0.5.

    At 0 all z are 0, and so all means are one image.
    """
    model = make("normal")
    seen = inputs_of(model.p_x)
    cold = model.sample(3, temperature=0, mean=True)
    assert (seen[-1] == 0).all() and (cold - cold[:1]).abs().max() < LEVEL
    for temperature in (0.5, 1.0):
        model.sample(3, temperature)
        assert seen[-1].std().item() == pytest.approx(temperature, rel=0.1)


def test_samples_pass_through_the_flow():
    """What is decoded is z = f(v), v the noise that the same seed gives."""
    model = make()
    randomize(model.p_z, 0.3)
    seen = inputs_of(model.p_x)
    seeded(model.sample, 2)
    v, _ = model.p_z.flow(seen[0])
    torch.testing.assert_close(v, seeded(torch.randn, 2, 16, 8, 8), atol=1e-4, rtol=0)


def test_interpolation_is_the_straight_line():
    """Three steps decode the means of q(z|x1) and q(z|x2) and, between them, the midpoint."""
    model = make()
    x1 = noise_images(2)
    x2 = noise_images(2)
    seen = inputs_of(model.p_x)
    line = model.interpolate(x1, x2, count=3, mean=True)
    z1 = model.q_z(x1).mean
    z2 = model.q_z(x2).mean
    for i, z in enumerate((z1, (z1 + z2) / 2, z2)):
        torch.testing.assert_close(seen[0].unflatten(0, (2, 3))[:, i], z)
        assert (line[:, i] - model.p_x(z).mean).abs().max() < LEVEL


def test_interpolation_of_one_image_is_its_start():
    """With count=1 there is no step, and none may be divided by."""
    model = make("normal")
    x = noise_images(2)
    line = model.interpolate(x[:1], x[1:], count=1, mean=True)
    start = model.p_x(model.q_z(x[:1]).mean).mean
    assert line.shape == (1, 1, 3, 8, 8) and (line[:, 0] - start).abs().max() < LEVEL


def test_features_keep_the_precision_of_the_networks():
    """Under autocast an fp32 image among them does not make all of them fp32."""
    block = vae.DenseBlock(3, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16
    assert block(torch.randn(1, 3, 8, 8)).dtype == torch.float32
