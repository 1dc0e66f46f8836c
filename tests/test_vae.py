"""vae.py against closed forms: parameter counts, initialisation, priors, bound, images.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform
noise (`noise_images`). The couplings of the flow are tested in test_realnvp.py.
"""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import vae
from common import UserError, from_uint8, log_mean_exp
from conftest import count, inputs_of, seeded
from vae import VAE, Config, MoGPrior, NormalPrior, RealNVPPrior, gaussian


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(vae.WIDTHS, "small", dict(q_z=(8, 1), p_x=(8, 1), flow=(4, 1)))
    torch.manual_seed(0)


def noise_images(count, channels=3, size=8):
    """Images of uniform noise, on the grid."""
    return from_uint8(torch.randint(256, (count, channels, size, size)))


def make(prior="realnvp", channels=3, size=8, initialize=True):
    """A narrow VAE, initialised by four images."""
    model = VAE(Config(prior=prior, small=True), (channels, size, size))
    if initialize:
        model.initialize(noise_images(4, channels, size))
    return model


def randomize(module, sd):
    """Move every parameter away from its start, the flow away from the identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=sd)
    return module


# ---- Networks ------------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_released_code():
    """For 32x32 RGB, as traced in the predecessor's code. (All in all: test_selfvae.py.)"""
    with torch.device("meta"):
        model = VAE(Config(prior="mog", mog_components=1000), (3, 32, 32))
    assert count(model.q_z) == 10_414_802
    assert count(model.p_x) == 12_449_686
    assert count(model.p_z) == 1000 * 2 * 1024


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_shapes(size, channels):
    """z is (16, 8, 8) whatever the image; every pixel of x has a mixture of 10 components.

    At size 8 too there is a block that makes it.
    """
    model = make(channels=channels, size=size, initialize=False)
    assert isinstance(model.p_x[0], vae.DenseBlock)
    x = noise_images(2, channels, size)
    assert model.q_z(x).mean.shape == (2, 16, 8, 8)
    p_x = model.p_x(torch.randn(2, 16, 8, 8))
    assert p_x.logits.shape == (2, 10, size, size) and len(p_x.means) == channels
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


def test_features_keep_the_precision_of_the_networks():
    """Under autocast an fp32 image among them does not make all of them fp32."""
    block = vae.DenseBlock(3, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16
    assert block(torch.randn(1, 3, 8, 8)).dtype == torch.float32


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
    # Two blocks of two convs and one that halves; a block, one that doubles; a block for each s, t.
    assert seen.count(1.0) == len(seen) - 12 == 5 + 3 + 20


def test_initialize_on_one_image_is_finite():
    """Pooled maps hold one value a channel there, whose sd is 0 or undefined.

    The convs on them keep their weights.
    """
    model = make(size=16, initialize=False)
    x = noise_images(1, size=16)
    gates = {name: p.clone() for name, p in model.named_parameters() if ".gate." in name}
    model.initialize(x)
    assert gates
    for name, before in gates.items():
        assert torch.equal(model.get_parameter(name), before)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(values.isfinite().all() for values in model.terms(x).values())


def test_initialisation_lives_in_the_state_dict():
    """A model built anew and loaded gives the same terms, with nothing left to initialise."""
    model = make()
    fresh = make(initialize=False)
    x = noise_images(2)
    assert not torch.allclose(seeded(model.elbo, x), seeded(fresh.elbo, x))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(seeded(model.terms, x), seeded(fresh.terms, x))


def test_bound_with_the_flow_at_the_identity_is_that_with_a_normal_prior():
    """q(z|x), p(x|z) and noise are the same, under two priors that are the same density."""
    flow = make("realnvp")
    normal = make("normal")
    normal.q_z = flow.q_z
    normal.p_x = flow.p_x
    x = noise_images(3)
    torch.testing.assert_close(seeded(flow.terms, x), seeded(normal.terms, x))


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
    """N(2, 0.5²) and N(-1, 1.5²) are drawn from half of the time each, for all of a z."""
    prior = MoGPrior(2)
    with torch.no_grad():
        prior.mean.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1).expand_as(prior.mean))
        prior.log_sd.copy_(torch.tensor([0.5, 1.5]).log().view(2, 1, 1, 1).expand_as(prior.mean))
        z = prior.from_noise(torch.randn(2000, 16, 8, 8))
    mean = z.mean((1, 2, 3))
    sd = z.std((1, 2, 3))
    first = mean > 0.5
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.05)  # sd of the share: 0.011
    torch.testing.assert_close(mean, torch.where(first, 2.0, -1.0), atol=0.25, rtol=0)
    torch.testing.assert_close(sd, torch.where(first, 0.5, 1.5), atol=0.2, rtol=0)


def test_flow_log_det_is_the_jacobians():
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
    (gradient,) = torch.autograd.grad(elbo.mean(), model.q_z.wrong)
    assert gradient.item() == pytest.approx(-32 * (math.exp(0.3) - 1), abs=1)


def test_with_the_exact_posterior_every_weight_is_p_of_x():
    """q(z|x) = p(z|x): log w = log p(x) whatever z is drawn. x is encoded once for all of them."""
    model, x, log_p = linear_gaussian(wrong=0.0)
    encoded = inputs_of(model.q_z)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=2e-3, rtol=0)
    assert len(encoded) == 1


def test_bounds_order_and_tighten():
    """Bounds of 1, 8 and 64 samples rise from log p(x) - KL(q‖p(z|x)), the ELBO, towards log p(x).
    """
    model, x, log_p = linear_gaussian(wrong=0.3)
    kl = kl_divergence(model.q_z(x), ExactPosterior()(x))
    log_w = model.log_weights(x.repeat(100, 1, 1, 1), 64).view(6400, 3)
    bound = {}
    for S in (1, 8, 64):
        bound[S] = log_mean_exp(log_w.view(-1, S, 3), 1).mean(0)  # over 100 repetitions or more
    # log w has an sd of 1.9, its mean over 6,400 draws one of 0.024.
    torch.testing.assert_close(bound[1], log_p - kl, atol=0.1, rtol=0)
    assert (bound[1] + 0.3 < bound[8]).all()
    assert (bound[8] + 0.1 < bound[64]).all()
    assert (bound[64] < log_p + 0.1).all()
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.15, rtol=0)


def test_terms_are_per_image(no_noise):
    """A batch costs what its images cost one by one. A discrete x has -log p(x|z) > 0."""
    model = make(size=16)
    x = noise_images(3, size=16)
    x[0] = -1  # black, so that the means over an image differ
    terms = model.terms(x)
    for i in range(3):
        alone = model.terms(x[i:i + 1])
        for name in terms:
            torch.testing.assert_close(terms[name][i:i + 1], alone[name], atol=5e-3, rtol=1e-6)
    assert (terms["re_x"] > 0).all() and len(terms["re_x"].unique()) == 3


# ---- Images --------------------------------------------------------------------------------------

def test_mean_is_deterministic_given_z(no_noise):
    """With z fixed, mean=True gives one image; a draw from p(x|z) gives another each time."""
    model = make()
    x = noise_images(2)
    assert torch.equal(model.reconstruct(x, mean=True), model.reconstruct(x, mean=True))
    assert not torch.equal(model.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_pass_through_the_flow(temperature):
    """What is decoded is z = f(v), v the temperature times the noise that the same seed gives."""
    model = make()
    randomize(model.p_z, 0.3)
    decoded = inputs_of(model.p_x)
    assert seeded(model.sample, 2, temperature).shape == (2, 3, 8, 8)
    v, _ = model.p_z.flow(decoded[0])
    noise = seeded(torch.randn, 2, 16, 8, 8)
    torch.testing.assert_close(v, temperature * noise, atol=1e-4, rtol=0)


def test_interpolation_is_the_straight_line():
    """Three steps decode the means of q(z|x1) and q(z|x2) and, between them, the midpoint.

    With count=1 there is no step, and only the start.
    """
    model = make()
    x1 = noise_images(2)
    x2 = noise_images(2)
    decoded = inputs_of(model.p_x)
    assert model.interpolate(x1, x2, count=3).shape == (2, 3, 3, 8, 8)
    z1 = model.q_z(x1).mean
    z2 = model.q_z(x2).mean
    line = torch.stack([z1, (z1 + z2) / 2, z2], 1)
    torch.testing.assert_close(decoded[0], line.flatten(0, 1))
    model.interpolate(x1, x2, count=1)
    torch.testing.assert_close(decoded[1], z1)
