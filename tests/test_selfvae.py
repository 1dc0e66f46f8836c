"""selfvae.py against closed forms: the transformation, the K = 0 model (a VAE), the K-level bound, samples.

Models here have the shapes of the real ones but are very narrow (`narrow`), and images are uniform noise (`noise_images`).
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, Normal

import selfvae
import vae
from common import UserError, from_uint8, log_mean_exp, quantize, to_uint8
from selfvae import Config, SelfVAE, downscale, gaussian

SMALL = selfvae.WIDTHS["small"]

@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(selfvae.WIDTHS, "small", dict(q_u=(8, 1), p_y=(8, 1), flow=(4, 1), q_z=(8, 1), p_z=((8, 1), (4, 1)),
                                                      p_x=((8, 1), 8, (4, 1))))
    torch.manual_seed(0)

@pytest.fixture
def no_noise(monkeypatch):
    """Every reparameterised draw is the mean, as if ε = 0."""
    monkeypatch.setattr(Normal, "rsample", lambda self, shape=torch.Size(): self.loc.expand(self._extended_shape(shape)))

def noise_images(count, channels=3, size=16):
    return from_uint8(torch.randint(256, (count, channels, size, size)))

def make(levels=1, channels=3, size=16, prior="realnvp"):
    model = SelfVAE(Config(levels=levels, prior=prior, small=True), (channels, size, size))
    model.initialize(noise_images(4, channels, size))
    return model

def count(module):
    return sum(p.numel() for p in module.parameters())

def seeded(function, *args, **kwargs):
    torch.manual_seed(1)
    return function(*args, **kwargs)

def inputs_of(module):
    """A list that fills with the positional inputs of each call of `module`."""
    calls = []
    module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    return calls

# ---- The transformation d --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block, level", [
    ([0, 0, 0, 0], 0), ([255, 255, 255, 255], 255), ([10, 20, 30, 40], 25), ([0, 0, 0, 1], 0), ([0, 0, 0, 2], 1),
    ([0, 0, 1, 2], 1), ([1, 2, 1, 2], 2), ([2, 3, 2, 3], 3), ([255, 255, 255, 253], 255), ([255, 255, 255, 252], 254),
    ([0, 0, 255, 255], 128)])
def test_downscale_by_hand(block, level):
    """The mean of 2x2 pixels, half rounded up: 1.5 -> 2, 2.5 -> 3, 0.5 -> 1, 254.5 -> 255, 0.25 -> 0, 127.5 -> 128."""
    y = downscale(from_uint8(torch.tensor(block).view(1, 1, 2, 2)))
    assert to_uint8(y).item() == level and y.item() == from_uint8(torch.tensor(level)).item()

def test_downscale_is_exact():
    """Integers: (sum of the 2x2 levels + 2) // 4, for 12,000 random blocks and for the 1,021 possible sums."""
    levels = np.random.default_rng(0).integers(0, 256, (1000, 3, 4, 4))
    sums = levels.reshape(1000, 3, 2, 2, 2, 2).sum((3, 5))
    assert np.array_equal(to_uint8(downscale(from_uint8(torch.tensor(levels)))).numpy(), (sums + 2) // 4)
    every = np.array([[min(255, max(0, total - 255 * i)) for i in range(4)] for total in range(1021)])
    y = downscale(from_uint8(torch.tensor(every).view(-1, 1, 2, 2)))
    assert np.array_equal(to_uint8(y).flatten().numpy(), (every.sum(1) + 2) // 4)
    assert torch.equal(y, quantize(y))  # on the grid, bit for bit

def test_downscale_is_the_same_alone_in_a_batch_and_under_autocast():
    """Nothing but a pixel's own 2x2 block counts: not the rest of the batch, not the networks' precision."""
    x = noise_images(5)
    y = downscale(x)
    assert torch.equal(y, torch.cat([downscale(x[i:i + 1]) for i in range(5)]))
    assert torch.equal(y, downscale(x.contiguous(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, downscale(x)) and downscale(x).dtype == torch.float32

def test_representations_are_the_chain_of_downscalings():
    """K = 3, 64 pixels: y_4 = x, then 32, 16, 8; each the downscaling of the one above. A flat image stays what it is."""
    model, x = make(levels=3, size=64), noise_images(2, size=64)
    y = model.representations(x)
    assert {k: y_k.shape[-1] for k, y_k in y.items()} == {4: 64, 3: 32, 2: 16, 1: 8} and y[4] is x
    assert all(torch.equal(y[k], downscale(y[k + 1])) for k in (1, 2, 3))
    flat = from_uint8(torch.full((1, 3, 64, 64), 77))
    assert torch.equal(model.representations(flat)[1], flat[..., :8, :8])

# ---- Networks --------------------------------------------------------------------------------------------------------
def test_parameter_counts_are_those_of_the_released_code():
    """K = 1 on 32x32 RGB, factor by factor, as traced in the predecessor's code."""
    with torch.device("meta"):
        model = SelfVAE(Config(levels=1), (3, 32, 32))
    assert {name: count(part) for name, part in model.named_children() if name != "p_u"} == {
        "q_u": 3_934_912, "p_y": 4_354_140, "q_z": 3_027_986, "p_z": 6_428_516, "p_x": 10_115_140}

@pytest.mark.parametrize("levels, size", [(0, 32), (1, 32), (2, 32), (0, 64), (1, 64), (2, 64)])
def test_paper_size_has_32_to_42_million_parameters(levels, size):
    """The range of the models in the paper, at every size and depth that it has."""
    with torch.device("meta"):
        model = SelfVAE(Config(levels=levels), (3, size, size))
        assert 32e6 < count(model) < 42e6
        assert levels or count(model) == count(vae.VAE(vae.Config(), (3, size, size)))

def test_decoder_is_given_y_upsampled_bilinearly():
    """A row 0, 1, 0, 1 … of y becomes 0, 0.25, 0.75, 0.75, 0.25 …: the last channels beside what p(x|y, z) makes of z."""
    p_x = make(channels=1).p_x[0]
    joint, y = inputs_of(p_x.joint), torch.tensor([0.0, 1.0]).repeat(4).expand(1, 1, 8, 8)
    p_x(y, torch.randn(1, 16, 8, 8))
    torch.testing.assert_close(joint[0][0][0, -1, 3, :5], torch.tensor([0.0, 0.25, 0.75, 0.75, 0.25]))

NAMES = {0: ["kl_u", "re_x"], 1: ["kl_u", "re_y_1", "kl_z_1", "re_x"],
         2: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_x"],
         3: ["kl_u", "re_y_1", "kl_z_1", "re_y_2", "kl_z_2", "re_y_3", "kl_z_3", "re_x"]}

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_terms_and_shapes(levels, channels):
    """2K + 2 terms, by level; every latent is (16, 8, 8), every image's side doubles."""
    model, x = make(levels, channels, size=64), noise_images(2, channels, size=64)
    terms = model.terms(x)
    assert list(terms) == NAMES[levels]
    assert all(values.shape == (2,) and values.isfinite().all() for values in terms.values())
    assert all((values > 0).all() for name, values in terms.items() if name[:3] in ("re_", "kl_") and name != "kl_u")
    torch.testing.assert_close(seeded(model.elbo, x), -sum(seeded(model.terms, x).values()))
    z, y = torch.randn(2, 16, 8, 8), model.representations(x)
    for k, q_z, p_z, p_x in model.factors():
        assert q_z(y[k + 1]).shape == p_z(y[k], z).shape == (2, 32, 8, 8)
        assert p_x(y[k], z).shape == (2, {1: 30, 3: 100}[channels], *y[k + 1].shape[2:])

@pytest.mark.parametrize("size, levels, most", [(8, 1, 0), (32, 3, 2), (64, 4, 3)])
def test_too_many_levels_are_refused(size, levels, most):
    """Every y has at least 8 pixels a side; the message names the largest K that would do."""
    with pytest.raises(UserError, match=f"--levels {levels} .*--levels {most} at most"):
        SelfVAE(Config(levels=levels, small=True), (3, size, size))

def test_sizes_that_do_not_halve_to_8_are_refused():
    """48 is 6 times 8, no power of two."""
    with pytest.raises(UserError, match="size 48 "):
        SelfVAE(Config(levels=1, small=True), (3, 48, 48))

# ---- K = 0 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
def test_without_levels_it_is_the_vae(monkeypatch, prior):
    """q_u, p_u, p_y are the VAE's q_z, p_z, p_x: same weights and noise, same bound, weights and images."""
    monkeypatch.setitem(selfvae.WIDTHS, "small", SMALL)
    plain, x = vae.VAE(vae.Config(prior=prior, small=True), (3, 32, 32)), noise_images(2, size=32)
    plain.initialize(x)
    model = SelfVAE(Config(levels=0, prior=prior, small=True), (3, 32, 32))
    renamed = {"q_z": "q_u", "p_z": "p_u", "p_x": "p_y"}
    model.load_state_dict({renamed[name[:3]] + name[3:]: values for name, values in plain.state_dict().items()})
    ours, theirs = seeded(model.terms, x), seeded(plain.terms, x)
    torch.testing.assert_close(ours, {"kl_u": theirs["kl_z"], "re_x": theirs["re_x"]})
    torch.testing.assert_close(seeded(model.log_weights, x, 3), seeded(plain.log_weights, x, 3))
    assert torch.equal(seeded(model.sample, 2), seeded(plain.sample, 2))
    assert torch.equal(seeded(model.reconstruct, x), seeded(plain.reconstruct, x))

# ---- The bound -------------------------------------------------------------------------------------------------------
# A model with known log p(x), K = 1, 16x16 grey pixels. At each of the 8x8 places of u, one pixel y of y_1 = d(x), 4 pixels
# x_i of x and 4 values z_i; what is left of u and z has q = p = N(0, 1):
#
#     u ~ N(0, 1)     y|u ~ N(u, 0.5²)     z_i|y,u ~ N(0.7 y + c·u, 1)     x_i|y,z ~ N(y + z_i, 0.4²)
#     u|y ~ N(0.8 y, 0.2)     z_i|x,y ~ N(0.16 (0.7 + 0.8 c) y + x_i - y, 0.16) / 1.16 in mean and variance, if c = 0
#
# With c = 0 the posterior is a product q(u|y) q(z|x) and the bound is tight. Else u and z depend on each other a posteriori.

class Stub(torch.nn.Module):
    """A factor that is a given function."""
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)

def latent(mean, variance):
    """μ (B, n, 8, 8) and one σ² for the first n channels of a latent, N(0, 1) for the others -> input of `gaussian`."""
    zeros = torch.zeros(len(mean), 16 - mean.shape[1], 8, 8)
    return torch.cat([mean, zeros, torch.full_like(mean, math.log(variance)), zeros], 1)

def linear_gaussian(monkeypatch, c):
    """-> the model, x (3, 1, 16, 16), log p(x) = log p(x, d(x))"""
    model, x = make(levels=1, channels=1, prior="normal"), noise_images(3, channels=1)
    monkeypatch.setattr(selfvae, "dmol_log_prob", lambda x, params: Normal(*params).log_prob(x).sum((1, 2, 3)))
    fours, upscale = lambda x: F.pixel_unshuffle(x, 2), lambda y: F.interpolate(y, scale_factor=2)  # four pixels to each place
    model.q_u = Stub(lambda y: latent(0.8 * y, 0.2))
    model.p_y = Stub(lambda u: (u[:, :1], 0.5))
    model.q_z[0] = Stub(lambda x: latent((0.16 * (0.7 + 0.8 * c) * downscale(x) + fours(x) - downscale(x)) / 1.16, 0.16 / 1.16))
    model.p_z[0] = Stub(lambda y, u, h=None: latent((0.7 * (y if h is None else h) + c * u[:, :1]).expand(-1, 4, -1, -1), 1.0))
    model.p_z[0].from_y = torch.nn.Identity()
    model.p_x[0] = Stub(lambda y, z: (upscale(y) + F.pixel_shuffle(z[:, :4], 2), 0.4))
    y = downscale(x)
    mean, covariance = (1.7 + 0.8 * c) * y, 1.16 * torch.eye(4) + 0.2 * c**2  # of p(x_1 … x_4|y): z_i and u integrated out
    log_p_x = MultivariateNormal(mean.movedim(1, -1).expand(-1, -1, -1, 4), covariance).log_prob(fours(x).movedim(1, -1))
    return model, x, log_p_x.sum((1, 2)) + Normal(0.0, math.sqrt(1.25)).log_prob(y).sum((1, 2, 3))

def test_with_exact_posteriors_every_weight_is_p_of_x(monkeypatch):
    """log w = log p(x) whatever u and z are drawn; the ELBO too, but for the noise that a closed-form KL does not cancel."""
    model, x, log_p = linear_gaussian(monkeypatch, c=0.0)
    torch.testing.assert_close(model.log_weights(x, 5), log_p.expand(5, 3), atol=5e-3, rtol=0)
    elbo = model.elbo(x.repeat(400, 1, 1, 1)).view(400, 3)
    torch.testing.assert_close(elbo.mean(0), log_p, atol=4 * elbo.std().item() / 20, rtol=0)

def test_bounds_order_and_tighten(monkeypatch):
    """u and z_1 dependent, c = 0.4: E[elbo] = E[log w] < bound of S = 8 < of 64 < log p(x), and S = 6,400 reaches it."""
    model, x, log_p = linear_gaussian(monkeypatch, c=0.4)
    log_w = model.log_weights(x, 6400, chunk=3000)
    bound = {S: log_mean_exp(log_w.view(-1, S, 3), 1).mean(0) for S in (1, 8, 64)}
    elbo = model.elbo(x.repeat(1000, 1, 1, 1)).view(1000, 3)
    torch.testing.assert_close(elbo.mean(0), bound[1], atol=4 * elbo.std(0).max().item() / math.sqrt(1000), rtol=0)
    assert (bound[1] + 0.3 < bound[8]).all() and (bound[8] + 0.1 < bound[64]).all() and (bound[64] < log_p).all()
    torch.testing.assert_close(log_mean_exp(log_w), log_p, atol=0.4, rtol=0)

def test_kl_z_is_the_kl(no_noise):
    """Closed form against the mean of log q(z_1|x) - log p(z_1|y, u) over 2,000 draws, within 4 standard errors; and ≥ 0."""
    model, x = make(), noise_images(2)
    with torch.no_grad():
        for p in model.p_z.parameters():
            p.add_(0.1 * torch.randn_like(p))
        kl, y = model.terms(x)["kl_z_1"], downscale(x)
        posterior = gaussian(model.q_z[0](x))
        prior = gaussian(model.p_z[0](y, gaussian(model.q_u(y)).mean))
        z = posterior.sample((2000,))
        log_ratio = posterior.log_prob(z) - prior.log_prob(z)
    assert (kl > 1).all()
    assert ((log_ratio.mean(0) - kl).abs() < 4 * log_ratio.std(0) / math.sqrt(2000)).all()

def test_log_weights_average_to_the_elbo():
    """K = 2, 32 pixels: the two write the same bound differently, and agree within 4 standard errors over 200 draws."""
    model, x = make(levels=2, size=32), noise_images(1, size=32)
    with torch.no_grad():
        for p in [*model.p_u.parameters(), *model.p_z.parameters(), *model.q_z.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
        log_w, elbo = model.log_weights(x, 200)[:, 0], model.elbo(x.expand(200, -1, -1, -1))
    error = math.sqrt((log_w.var() + elbo.var()).item() / 200)
    assert abs(log_w.mean() - elbo.mean()).item() < 4 * error and error < 10

@pytest.mark.parametrize("k", [1, 2])
def test_every_kl_is_in_the_bound(no_noise, k):
    """Widening q(z_k|y_{k+1}) raises kl_z_k and, as z_k's mean is the same, nothing else; the ELBO falls by just that."""
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    before, elbo = model.terms(x), model.elbo(x)
    with torch.no_grad():
        model.q_z[k - 1][-1].bias[16:] += 1  # log σ²
    after = model.terms(x)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"kl_z_{k}"]
    rise = after[f"kl_z_{k}"] - before[f"kl_z_{k}"]
    assert (rise > 10).all()
    torch.testing.assert_close(elbo - model.elbo(x), rise, atol=0.05, rtol=0)

@pytest.mark.parametrize("bound", [SelfVAE.terms, lambda model, x: model.log_weights(x, 1)], ids=["terms", "log_weights"])
def test_each_factor_sees_what_it_should(no_noise, bound):
    """K = 2: q(u|y_1), q(z_k|y_{k+1}), p(z_k|y_k, z_{k-1}), p(y_{k+1}|y_k, z_k), with z_0 = u."""
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    y, mean = model.representations(x), lambda network, x: gaussian(network(x)).mean
    z = [mean(model.q_u, y[1]), mean(model.q_z[0], y[2]), mean(model.q_z[1], x)]
    expected = {model.q_u: [y[1]], model.p_y: [z[0]], model.q_z[0]: [y[2]], model.q_z[1]: [x],
                model.p_z[0].from_y: [y[1]], model.p_z[0].from_z: [z[0]], model.p_x[0]: [y[1], z[1]],
                model.p_z[1].from_y: [y[2]], model.p_z[1].from_z: [z[1]], model.p_x[1]: [y[2], z[2]]}
    calls = {module: inputs_of(module) for module in expected}
    bound(model, x)
    for module, inputs in expected.items():
        assert len(calls[module]) == 1
        torch.testing.assert_close(list(calls[module][0]), inputs)

@pytest.mark.parametrize("levels", [0, 1, 2])
def test_log_weights_do_not_depend_on_chunk(levels):
    """The same u and z decoded 1, 3 or 1000 at a time."""
    model, x = make(levels, size=32), noise_images(2, size=32)
    whole = seeded(model.log_weights, x, 5, chunk=1000)
    assert whole.shape == (5, 2) and whole.std(0).min() > 1e-2
    for chunk in (1, 3, 4):
        torch.testing.assert_close(seeded(model.log_weights, x, 5, chunk=chunk), whole, atol=2e-2, rtol=1e-5)

def test_log_weights_encode_once():
    """x and every y pass their encoders once, however many samples and chunks."""
    model = make(levels=2, size=32)
    calls = [inputs_of(m) for m in (model.q_u, *model.q_z, *(p_z.from_y for p_z in model.p_z))]
    model.log_weights(noise_images(2, size=32), 9, chunk=4)
    assert [len(c) for c in calls] == [1] * 5

def test_bf16_networks_give_fp32_terms():
    """Under autocast the networks round, likelihoods and KLs do not: terms are fp32, the ELBO moves by less than 2 %."""
    model, x = make(), noise_images(2)
    fp32 = seeded(model.terms, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_z[0](x).dtype == torch.bfloat16
        bf16 = seeded(model.terms, x)
    assert all(values.dtype == torch.float32 for values in bf16.values())
    torch.testing.assert_close(sum(bf16.values()), sum(fp32.values()), rtol=0.02, atol=0)

def test_initialisation_lives_in_the_state_dict():
    """A model built anew and loaded gives the same terms, with nothing left to initialise; one image is enough for it."""
    model, x = SelfVAE(Config(small=True), (3, 16, 16)), noise_images(1)
    model.initialize(x)
    fresh = SelfVAE(Config(small=True), (3, 16, 16))
    assert not torch.allclose(seeded(model.elbo, x), seeded(fresh.elbo, x))
    fresh.load_state_dict(model.state_dict())
    terms = seeded(model.terms, x)
    torch.testing.assert_close(terms, seeded(fresh.terms, x))
    assert all(values.isfinite().all() for values in terms.values())

# ---- Images ----------------------------------------------------------------------------------------------------------
def assert_images(x, shape):
    """Of that shape, in [-1, 1], on the 256-level grid."""
    assert x.shape == shape and x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, quantize(x), atol=1e-6, rtol=0)

@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("mean", [False, True])
def test_images_are_images(levels, mean):
    """Shapes and grid of x, of every y on the way and of both kinds of reconstruction, drawn or means."""
    model, x = make(levels, channels=1, size=32), noise_images(2, channels=1, size=32)
    assert_images(model.sample(3, mean=mean), (3, 1, 32, 32))
    y = model.sample(3, mean=mean, levels=True)
    assert sorted(y) == list(range(1, levels + 2))
    for k, y_k in y.items():
        assert_images(y_k, (3, 1, 32 >> (levels + 1 - k), 32 >> (levels + 1 - k)))
    for infer in (True, False):
        assert_images(model.reconstruct(x, mean=mean, infer=infer), (2, 1, 32, 32))

def test_sample_is_ancestral():
    """Each y that is drawn is what the next level is given. d(x) need not be y again: p(x|y, z) is free to ignore y."""
    model = make(levels=2, size=32)
    p_z, p_x = [inputs_of(m.from_y) for m in model.p_z], [inputs_of(m) for m in model.p_x]
    y = seeded(model.sample, 2, levels=True)
    for k in (1, 2):
        assert torch.equal(p_z[k - 1][0][0], y[k]) and torch.equal(p_x[k - 1][0][0], y[k])
    assert torch.equal(seeded(model.sample, 2), y[3]) and not torch.equal(downscale(y[3]), y[2])

def test_temperature_scales_the_noise_of_u_and_z():
    """p(u) = N(0, 1): u has sd T. At T = 0, z_1 is the mean of p(z_1|y_1, u), and two images from one u and y_1 are equal."""
    model = make(prior="normal")
    u, z = inputs_of(model.p_y), inputs_of(model.p_x[0])
    for temperature in (0.0, 0.5, 1.0):
        y = model.sample(4, temperature, mean=True, levels=True)
        prior = gaussian(model.p_z[0](y[1], u[-1][0]))
        assert u[-1][0].std().item() == pytest.approx(temperature, rel=0.1)
        noise = (z[-1][1] - prior.mean) / prior.stddev
        assert noise.std().item() == pytest.approx(temperature, rel=0.1, abs=1e-5)

@pytest.mark.parametrize("infer", [True, False])
def test_reconstruct_keeps_y_and_infers_or_samples_z(no_noise, infer):
    """p(x|y_2, z_2) is given y_2 = d(x); z_2 comes from q(z_2|x), or from p(z_2|y_2, z_1) with z_1 from q(z_1|y_2)."""
    model, x = make(levels=2, size=32), noise_images(2, size=32)
    y, q_z, p_z = downscale(x), model.q_z, model.p_z[1]
    inferred, sampled = gaussian(q_z[1](x)).mean, gaussian(p_z(y, gaussian(q_z[0](y)).mean)).mean
    calls = inputs_of(model.p_x[1])
    model.reconstruct(x, infer=infer)
    assert torch.equal(calls[0][0], y)
    torch.testing.assert_close(calls[0][1], inferred if infer else sampled)
    assert not torch.allclose(inferred, sampled)

def test_conditional_generation_has_seen_only_y():
    """Two images with the same d(x) give the same x̂ from the same noise with infer=False; with infer=True they do not."""
    model, x = make(), noise_images(2)
    flipped = F.pixel_shuffle(F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).flip(2).flatten(1, 2), 2)  # each 2x2 block reversed
    assert torch.equal(downscale(flipped), downscale(x)) and not torch.equal(flipped, x)
    assert torch.equal(seeded(model.reconstruct, x, infer=False), seeded(model.reconstruct, flipped, infer=False))
    assert not torch.equal(seeded(model.reconstruct, x), seeded(model.reconstruct, flipped))
