"""dcvae.py against closed forms.

The backbone layer by layer, the losses, the queue, averages, the game, the latent space, the probe.
Models here have the shapes of the real ones but are very narrow (`narrow`).
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import dcvae
from common import Images, UserError, quantize, read_log, to_uint8
from conftest import count, inputs_of, narrow_networks, pictures_on, seeded
from dcvae import (
    BLOCKS, DCVAE, Config, Decoder, Discriminator, Encoder, as_batch, autoencoder_gan,
    discriminator_gan, gaussian_kl, info_nce, sample_code, update_average)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    narrow_networks(monkeypatch)
    torch.manual_seed(0)


TINY = {"small": True, "latent": 6, "negatives": 10, "device": "cpu", "dtype": "fp32"}


def make(shape=(3, 16, 16), **flags):
    """An untrained model of TINY and these flags."""
    return DCVAE(Config(**TINY | flags), shape)


def noise_images(count, channels=3, size=16):
    """Float images of uniform noise in [-1, 1]."""
    return torch.rand(count, channels, size, size) * 2 - 1


def noise_pixels(count):
    """The same as pixel values, uint8 (count, 16, 16, 3), always the same ones."""
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def unit(*shape):
    """Random rows of length 1."""
    return F.normalize(torch.randn(*shape), dim=1)


# ---- The backbone --------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_released_code():
    """Else a layer is missing or too wide: latent 128, 32x32 RGB.

    Heads exist only where the contrast is taken. Averages and queue do not learn.
    """
    with torch.device("meta"):
        model = DCVAE(Config(contrast_layers="b1,b2,b3,b4,final"), (3, 32, 32))
        vaegan = DCVAE(Config(loss="vaegan"), (3, 32, 32))
    assert count(model.decoder) == 4_405_251
    assert count(model.encoder) == 1_086_464
    assert count(model.discriminator) == 1_063_445
    assert count(vaegan.discriminator) == 1_055_761
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4_405_251 + 1_086_464 + 1_063_445


def test_xavier_where_it_reaches_in_the_release():
    """Else convs of decoder and heads start elsewhere than the released ones.

    They fill ±√(6 / (fan in + fan out)), wider than PyTorch's default.
    """
    model = make()
    for layer in (model.decoder.cells[1].conv1, model.decoder.leave[2],
                  model.discriminator.heads["b1"][0]):
        area = layer.weight[0, 0].numel()
        bound = (6 / (area * (layer.in_channels + layer.out_channels)))**0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("channels, size", [(3, 48), (1, 8)])
def test_shapes(channels, size):
    """Else some size or grey images do not go through; figures are on the pixel grid."""
    model = make((channels, size, size), contrast_layers="b1,b2,b3,b4,final").eval()
    x = noise_images(3, channels, size)
    _, features = model.discriminator(x)
    shapes = {name: tuple(values.shape) for name, values in features.items()}
    assert shapes == dict.fromkeys([*BLOCKS, "final"], (3, 16))
    for images in (model.sample(3), model.reconstruct(x)):
        assert images.shape == x.shape
        assert torch.equal(images, quantize(images))


def test_flags_of_which_no_network_can_be_made():
    """Else they fail somewhere inside a network, or a layer counts twice."""
    for size in (8, 24, 100):
        with pytest.raises(UserError, match=f"16, 32, 64 … pixels a side, not {size}"):
            progan(size)
    for layers in ("b5", "b1,,final", "b1,b1"):
        with pytest.raises(UserError, match="--contrast_layers"):
            make(contrast_layers=layers)


def test_decoder_is_the_released_graph():
    """Else a cell differs from AutoGAN's: enlarge, then 1x1, layer by layer as released.

    The skip into cell 3 is cell 2's sum, the skip-1 contribution included.
    """
    net = Decoder(6, 8, 3, 32).eval()
    z = torch.randn(2, 6)
    cell1, cell2, cell3 = net.cells

    def up(h, mode, times=2):
        return F.interpolate(h, scale_factor=times, mode=mode)

    h = net.enter[0](z).view(2, 8, 4, 4)
    skip1 = cell1.conv1(up(h.relu(), "nearest"))
    h = cell1.conv2(skip1.relu()) + cell1.shortcut(up(h, "nearest"))
    skip2 = cell2.conv1(up(h.relu(), "bilinear")) + cell2.skips[0](up(skip1, "bilinear"))
    h = cell2.conv2(skip2.relu()) + cell2.shortcut(up(h, "bilinear"))
    skip3 = cell3.conv1(up(h.relu(), "nearest")) + cell3.skips[0](up(skip1, "nearest", 4))
    skip3 = skip3 + cell3.skips[1](up(skip2, "nearest"))
    h = net.leave[0](cell3.conv2(skip3.relu())).relu()
    assert_close(net(z), net.leave[2](h).tanh(), rtol=1e-4, atol=1e-5)


def test_encoder_and_discriminator_are_the_released_graph():
    """Else a residual block differs: where it has its first ReLU, what its shortcut pools.

    Block 1: no ReLU first, shortcut of the pooled image. Block 2: 1x1, then pool. Blocks 3 and 4:
    identity. Then ReLU, 64 times the mean over positions, linear without bias: the encoder's end,
    and the 16 values from which the score is one more linear layer. b1 is a 1x1 conv and a linear
    layer of the first block.
    """
    encoder = Encoder(3, 8, 6).eval()
    net = Discriminator(3, 8, 16, ("b1",)).eval()
    first, second, third, _ = net.blocks
    x = torch.randn(2, 3, 16, 16)

    def halved(h):
        return F.avg_pool2d(h, 2)

    def end(net):
        return 64 * net.blocks(x).relu().mean((2, 3)) @ net.linear.weight.T

    h1 = first(x)
    assert_close(h1, halved(first.conv2(first.conv1(x).relu())) + first.shortcut(halved(x)))
    inner = second.conv2(second.conv1(h1.relu()).relu())
    h2 = second(h1)
    assert_close(h2, halved(inner + second.shortcut(h1)))
    assert_close(third(h2), h2 + third.conv2(third.conv1(h2.relu()).relu()))
    assert_close(torch.cat(encoder(x), 1), end(encoder))
    score, features = net(x)
    assert_close(features["final"], end(net))
    assert_close(score, (end(net) @ net.score.weight.T + net.score.bias).squeeze(1))
    conv, _, linear = net.heads["b1"]
    assert_close(features["b1"], conv(h1).flatten(1) @ linear.weight.T)


@pytest.mark.parametrize("size", [32, 96])
def test_codes_start_within_bounds(size):
    """Else log σ² of untrained encoders starts beyond its bound at some size, or has none."""
    encoder = make((3, size, size)).encoder
    _, log_var = encoder(noise_images(8, 3, size))
    assert log_var.max() < 20
    _, log_var = encoder(1e6 * torch.randn(8, 3, size, size))
    assert log_var.max() == 20


# ---- Losses --------------------------------------------------------------------------------------

def test_info_nce_is_the_softmax_over_explicit_pairs():
    """Else Eq. (6) is not what is computed: by loops, cosine similarity over the temperature.

    Lengths of the query do not matter, those of keys are 1.
    """
    query = 3 * torch.randn(3, 5)
    positive = unit(3, 5)
    negatives = unit(7, 5)
    query[0] = 2 * positive[0]  # one hit
    losses, hits = info_nce(query, positive, negatives, 0.2)
    for i in range(3):
        keys = torch.stack([positive[i], *negatives])
        shares = (F.cosine_similarity(query[i], keys) / 0.2).exp()
        assert_close(losses[i], -(shares[0] / shares.sum()).log())
        assert hits[i] == (shares[0] > shares[1:].max())
    assert hits[0] == 1


def test_info_nce_is_fp32_under_autocast():
    """Else bf16 would round cosines to 1/256, a factor e^(1/18) in a share."""
    query = torch.randn(4, 16).bfloat16()
    positive = unit(4, 16)
    negatives = unit(50, 16)
    outside, _ = info_nce(query.float(), positive, negatives, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = info_nce(query, positive, negatives, 0.07)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_gan_losses_by_hand():
    """Else a sign, a margin or a weight of the hinge, or Eq. (4), is wrong."""
    real = torch.tensor([2.0, 0.5])
    reconstructed = torch.tensor([-3.0, 0.5])
    sampled = torch.tensor([0.0, -0.5])
    d_hinge = discriminator_gan("hinge", real, reconstructed, sampled)
    assert d_hinge.tolist() == [0 + 0 + 0.5, 0.5 + 0.5 * 1.5 + 0.5 * 0.5]
    hinge = autoencoder_gan("hinge", reconstructed, sampled)
    assert hinge.tolist() == [1.5 + 0.125, -0.25 + 0.125]
    D = torch.sigmoid
    of_fakes = (1 - D(sampled)).log() + (1 - D(reconstructed)).log()
    d_log = discriminator_gan("log", real, reconstructed, sampled)
    assert_close(d_log, -(D(real).log() + of_fakes))
    log = autoencoder_gan("log", reconstructed, sampled)
    assert_close(log.mean(), of_fakes.mean())
    wgan = discriminator_gan("wgan", real, reconstructed, sampled)
    by_hand = [-1.5 + 0 - 2 + 1e-3 * 4, 0.25 - 0.25 - 0.5 + 1e-3 * 0.25]
    assert_close(wgan, torch.tensor(by_hand))


LOSSES = {
    "vae": ["pixel", "kl"],
    "vaegan": ["feature", "gan", "kl"],
    "contrastive": ["contrast", "kl"],
    "dcvae": ["contrast", "gan", "kl"],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gan, backbone", [("log", "autogan"), ("hinge", "progan"),
                                           ("wgan", "progan")])
def test_terms_of_the_four_losses(loss, gan, backbone):
    """Else a loss has other terms than Eqs. (1), (3) to (5), (8), (9), or a term teaches nobody.

    Every term reaches encoder and decoder, the KL the encoder alone. D's own terms reach neither,
    and all of D that is in use. `forward` gives each player its terms.
    """
    model = make(loss=loss, gan=gan, backbone=backbone)
    x = noise_images(4)
    keys = model.encode_keys(x) if model.contrastive else None
    terms = model(x, keys=keys)
    assert list(terms) == LOSSES[loss]
    encoder_weight = list(model.encoder.parameters())[-1]
    decoder_weight = next(model.decoder.parameters())
    for name, values in terms.items():
        assert values.shape == (4,)
        of_encoder, of_decoder = torch.autograd.grad(
            values.sum(), [encoder_weight, decoder_weight], retain_graph=True, allow_unused=True)
        assert of_encoder.abs().sum() > 0
        assert name == "kl" or of_decoder.abs().sum() > 0
    if loss == "vae":
        assert model.discriminator is None
        return

    terms = model(x, keys=keys, player="discriminator")
    assert ("d_gan" in terms) == model.adversarial
    assert ("d_penalty" in terms) == (model.adversarial and gan == "wgan")
    assert ("d_contrast" in terms) == model.contrastive
    sum(terms[name].sum() for name in terms if name in model.weights).backward()
    for part in (model.encoder, model.decoder):
        assert all(p.grad is None for p in part.parameters())
    for name, p in model.discriminator.named_parameters():
        if name.startswith("score"):
            assert (p.grad is not None) == model.adversarial
        elif not name.startswith("body.from_image.0"):  # for a side of 8
            assert p.grad is not None, name


def codes(model, x, samples):
    """Codes of x as drawn from seed 1, then those of `samples` images -> (B + samples, L)."""
    mean, log_var = model.encoder(x)
    torch.manual_seed(1)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    return torch.cat([z, torch.randn(samples, 6)])


def test_vae_loss_is_minus_the_elbo():
    """Else --loss vae is no VAE: -ELBO less D/2 log π, with p(x|z) = N(x̂, ½), KL weight 1."""
    model = make(loss="vae").eval()
    x = noise_images(2)
    assert model.cfg.kl_weight == 1
    assert Config().kl_weight == 6.4e-5
    terms = seeded(model, x)
    mean, log_var = model.encoder(x)
    log_p = Normal(model.decoder(codes(model, x, 0)), 0.5**0.5).log_prob(x).sum((1, 2, 3))
    assert_close(terms["pixel"] + 3 * 16 * 16 / 2 * math.log(math.pi), -log_p)
    kl = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0))
    assert_close(gaussian_kl(mean, log_var), kl)
    assert_close(terms["kl"], kl.sum(1))


def mean_nce(model, features, keys):
    """Losses and hits of info_nce, averaged over the layers b1 and final."""
    loss1, hit1 = info_nce(features["b1"], keys["b1"], model.queue["b1"], 0.07)
    loss2, hit2 = info_nce(features["final"], keys["final"], model.queue["final"], 0.07)
    return (loss1 + loss2) / 2, (hit1 + hit2) / 2


def test_terms_against_parts():
    """Else dcvae's terms are of other images, or weighted already.

    The contrast is of reconstructions only, gan of them and of twice as many samples.
    """
    model = make().eval()
    x = noise_images(3)
    keys = model.encode_keys(x)
    terms = seeded(model, x, keys=keys)
    scores, features = model.discriminator(model.decoder(codes(model, x, 6)))
    assert_close(terms["gan"], -0.5 * scores[:3] - 0.5 * scores[3:].mean())
    of_reconstructions = {name: values[:3] for name, values in features.items()}
    assert_close(terms["contrast"], mean_nce(model, of_reconstructions, keys)[0])
    assert_close(terms["kl"], gaussian_kl(*model.encoder(x)).sum(1))


def test_feature_distance_is_that_of_the_reconstructions():
    """Else Eq. (3) is not the squared distance of D's 16 last features of x and x̂, summed."""
    model = make(loss="vaegan").eval()
    x = noise_images(3)
    terms = seeded(model, x)
    _, of_x = model.discriminator(x)
    _, of_x_hat = model.discriminator(model.decoder(codes(model, x, 0)))
    assert_close(terms["feature"], (of_x["final"] - of_x_hat["final"]).square().sum(1))


def test_discriminator_terms_against_parts():
    """Else D takes fakes for real: reconstructions, samples and real images are in another order.

    The contrast's queries are the reconstructions. Each image's score is its own.
    """
    model = make().eval()
    x = noise_images(3)
    keys = model.encode_keys(x)
    terms = seeded(model, x, keys=keys, player="discriminator")
    fakes = model.decoder(codes(model, x, 3))
    for name, images in (("real", x), ("reconstructed", fakes[:3]), ("sampled", fakes[3:])):
        assert_close(terms[name], model.discriminator(images)[0])
    d_gan = discriminator_gan("hinge", terms["real"], terms["reconstructed"], terms["sampled"])
    assert_close(terms["d_gan"], d_gan)
    contrast, hits = mean_nce(model, model.discriminator(fakes[:3])[1], keys)
    assert_close(terms["d_contrast"], contrast)
    assert_close(terms["accuracy"], hits)


def test_optimal_critic_of_remark_1():
    """Else our reading of Eq. (7) is wrong: its best critic is log p(x|z) - log p(x).

    Over all (x_1, x_2), i, z of a small discrete model. It is convex in h, so where its gradient
    is 0 it is smallest. Any c(z) may be added, but no c(x).
    """
    joint = torch.tensor([[0.30, 0.05], [0.10, 0.15], [0.05, 0.35]], dtype=torch.float64)  # p(x, z)
    p_x = joint.sum(1)
    q = joint / joint.sum(1, keepdim=True)  # q(z|x)

    def i_nce(h):
        nats = torch.logaddexp(h[:, None], h) - h[:, None]  # of x_i = x_a beside x_b, given z
        return torch.einsum("a,b,az,abz", p_x, p_x, q, nats)

    log_p = (joint / joint.sum(0)).log()  # log p(x|z)
    best = (log_p - p_x.log()[:, None]).requires_grad_()
    slope, = torch.autograd.grad(i_nce(best), best)
    assert_close(slope, torch.zeros(3, 2, dtype=torch.float64))
    assert_close(i_nce(best + torch.tensor([1.0, -2.0])), i_nce(best))
    assert i_nce(log_p) > i_nce(best) + 1e-3  # the paper's, with c(x) = 0


# ---- Queue, averages, patches --------------------------------------------------------------------

@pytest.mark.parametrize("negatives, batch", [(10, 4), (3, 4), (8096, 4)])
def test_queue_keeps_the_newest(negatives, batch):
    """Else old keys stay and new ones are lost: first in, first out, across the buffer's end.

    Also where the batch does not divide it or is larger.
    """
    model = make(negatives=negatives)
    start = model.queue["final"].clone()
    assert_close(start.norm(dim=1), torch.ones(negatives))
    batches = [unit(batch, 16) for _ in range(7)]
    for key in batches:
        model.enqueue({"b1": key, "final": key})
    for queue in model.queue.values():
        oldest_first = queue.roll(-model.queued.item(), 0)
        assert torch.equal(oldest_first[-7 * batch:], torch.cat(batches)[-negatives:])
    assert torch.equal(oldest_first, torch.cat([start, *batches])[-negatives:])


def test_keys_come_from_the_momentum_network():
    """Else keys are of D itself, or not of length 1."""
    model = make().eval()
    x = noise_images(2)
    with torch.no_grad():
        model.discriminator.linear.parametrizations.weight.original.add_(1)
    keys = model.encode_keys(x)
    _, features = model.momentum_discriminator(x)
    for name in ("b1", "final"):
        assert_close(keys[name], F.normalize(features[name], dim=1))


def test_momentum_network_moves_before_keys_are_made(tmp_path, monkeypatch):
    """Else keys are of an average that is one step behind, or that follows D's last update.

    With --momentum 0 the average that makes the keys is D after its update on the first batch.
    """
    model = make(momentum=0)
    weight = "linear.parametrizations.weight.original"
    start = model.discriminator.state_dict()[weight].clone()
    seen = []

    def encode_keys(x, where):
        for net in (model.momentum_discriminator, model.discriminator):
            seen.append(copy.deepcopy(net.state_dict()))
        return DCVAE.encode_keys(model, x, where)

    monkeypatch.setattr(model, "encode_keys", encode_keys)
    play(tmp_path, model, momentum=0, d_steps=2)
    average, live = seen
    for name, values in live.items():  # spectral norm's vectors too
        assert torch.equal(average[name], values), name
    assert not torch.equal(average[weight], start)
    after = model.state_dict()
    assert torch.equal(average[weight], after[f"momentum_discriminator.{weight}"])
    assert not torch.equal(average[weight], after[f"discriminator.{weight}"])


def test_average_follows_parameters_and_batch_statistics():
    """Else averaged weights run with batch statistics of others, as in the release.

    With --ema 0 the average is the decoder itself.
    """
    model = make()
    average = model.averaged_decoder
    net = model.decoder
    with torch.no_grad():
        net.enter[0].weight.fill_(1)
        average.enter[0].weight.fill_(0)
        net.leave[0].running_var.fill_(3)
        net.leave[0].num_batches_tracked.fill_(7)
    update_average(average, net, 0.75)
    assert (average.enter[0].weight == 0.25).all()
    assert (average.leave[0].running_var == 1.5).all()
    update_average(average, net, 0)
    for name, values in net.state_dict().items():
        assert torch.equal(average.state_dict()[name], values), name


def test_patches_are_one_place_of_each_block():
    """Else query and key are of two places: one for each layer, all channels, the same in both.

    Their mean comes on top of the mean over layers. No number is read on the host for them.
    """
    model = make(patch_after=0).eval()
    x = noise_images(2)
    patches = [f"patch_{name}" for name in BLOCKS]
    where = torch.rand(4, 2)
    keys = model.encode_keys(x, where)
    assert list(model.queue) == list(keys) == ["b1", "final", *patches]
    assert list(model.encode_keys(x)) == ["b1", "final"]

    _, features = model.discriminator(x, where)
    expected, _ = mean_nce(model, features, keys)
    h = x
    for name, place, block in zip(patches, where, model.discriminator.blocks):
        h = block(h)
        row, column = (place * h.shape[2]).long().tolist()
        assert_close(features[name], h[:, :, row, column])
        loss, _ = info_nce(features[name], keys[name], model.queue[name], 0.07)
        expected = expected + loss / 4
    assert_close(model.contrast(features, keys)[0], expected)
    model.discriminator(x, torch.full((4, 2), 1 - 2**-24))  # the last place exists
    squeezed_from, _ = features["patch_b2"].grad_fn.next_functions[0]
    assert "Index" in str(squeezed_from)  # an index with one element: a gather


def test_places_of_patches(tmp_path):
    """Else the same corner of every map is contrasted at every step, or in every block.

    None up to step --patch_after, then four new places a step, the same for both players, who take
    turns where there is no gan.
    """
    _, _, calls = play(tmp_path, loss="contrastive", steps=3, patch_after=1)
    places = [where for _, _, where, _ in calls]
    assert places[0] is None and places[1] is None
    assert places[2] is places[3] and places[4] is places[5]
    places = torch.cat([places[2], places[4]])
    assert places.shape == (8, 2) and len(places.unique()) == 16
    assert 0 <= places.min() and places.max() < 1


# ---- The other backbone --------------------------------------------------------------------------

def progan(size=16, **flags):
    """As `make`, on ProGAN's networks."""
    return make((3, size, size), backbone="progan", **flags)


@pytest.mark.parametrize("size, of_decoder, of_discriminator, of_encoder", [
    (16, 15_998_473, 16_005_121, 16_525_312), (64, 22_490_383, 22_498_049, 23_018_240),
    (1024, 23_079_115, 23_087_249, 23_607_440)])
def test_parameter_counts_are_those_of_progan(size, of_decoder, of_discriminator, of_encoder):
    """Else a layer of its tables is missing or too wide: latent 512, RGB, heads not counted.

    From 64 pixels on this backbone is the default, with ProGAN's batches.
    """
    cfg = Config(size=size, loss="vaegan", backbone="progan")
    assert Config(size=size).backbone == ("progan" if size >= 64 else "autogan")
    assert cfg.batch_size == max(4, 2048 // size)
    with torch.device("meta"):
        model = DCVAE(cfg, (3, size, size))
    assert count(model.decoder) == of_decoder
    assert count(model.discriminator) == of_discriminator
    assert count(model.encoder) == of_encoder


@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 0), (8, 0), (4, 3)])
def test_scaled_weights_keep_the_variance(kernel, padding):
    """Else a gain is not √2 before a leaky ReLU, 1 elsewhere, or a fan-in is not k²·c_in.

    Noise of mean square 1 gets variance 2; the ReLU leaves (1 + 0.2²)/2 of it.
    """
    h = torch.randn(64, 40, 8, 8)
    inside = slice(padding, 8 - padding)
    for Conv, expected in ((dcvae.ScaledConv, 1), (dcvae.LeakyConv, 1.04)):
        conv = Conv(40, 500, kernel, padding)
        square = conv(h)[:, :, inside, inside].square().mean().item()
        assert square == pytest.approx(expected, rel=0.05)
        assert conv.weight.var().item() == pytest.approx(1, rel=0.1)
        assert (conv.bias == 0).all()


def test_pixel_norm():
    """Else a pixel's features do not have a root mean square of 1, in the same direction."""
    h = 5 * torch.randn(2, 7, 3, 3)
    assert_close(dcvae.PixelNorm()(h), 7**0.5 * F.normalize(h, dim=1))


@pytest.mark.parametrize("batch, group", [(12, 4), (6, 2), (3, 1)])
def test_minibatch_deviation_by_hand(batch, group):
    """Else a group's number is of other images: real ones and fakes in one pass would be mixed."""
    h = torch.randn(batch, 5, 4, 4)
    seen = dcvae.minibatch_deviation(h)
    assert torch.equal(seen[:, :5], h)
    for i in range(batch):
        first = i // group * group
        deviation = h[first:first + group].double().numpy().std(0).mean()
        assert_close(seen[i, 5], torch.full((4, 4), max(deviation, 1e-4)))


def test_penalty_of_a_linear_critic():
    """Else it is not (‖w‖ - 1)², whatever the images; or D cannot learn from it: 2 (‖w‖ - 1)."""
    w = torch.randn(3, 4, 4, requires_grad=True)

    def critic(x):
        return (x * w).sum((1, 2, 3)), None

    penalty = dcvae.gradient_penalty(critic, noise_images(5, size=4), noise_images(5, size=4))
    assert_close(penalty, (w.norm() - 1).square().expand(5))
    assert make().weights["d_penalty"] == 10
    gradient, = torch.autograd.grad(penalty.mean(), w)
    assert_close(gradient, 2 * (w.norm() - 1) * w / w.norm())


def test_penalty_between_real_and_fake():
    """Else it is taken elsewhere: of the critic x²/2 it is (|x̄| - 1)², x̄ between the two."""
    def critic(x):
        return x.square().sum((1, 2, 3)) / 2, None

    real = torch.full((200, 1, 1, 1), 2.0)
    slope = dcvae.gradient_penalty(critic, real, 2 * real).sqrt() + 1
    assert 2 <= slope.min() < 2.1 and 3.9 < slope.max() <= 4


def test_penalty_under_autocast():
    """Else second derivatives are of bf16."""
    discriminator = progan(loss="vaegan").discriminator
    images = noise_images(4), noise_images(4)
    outside = seeded(dcvae.gradient_penalty, discriminator, *images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = seeded(dcvae.gradient_penalty, discriminator, *images)
    assert torch.equal(inside, outside)


def outputs(model, z, x):
    """Of the three networks."""
    return model.decoder(z), model.encoder(x)[0], model.discriminator(x)[0]


@pytest.mark.parametrize("alpha, unused", [(0.0, 3), (1.0, 2)])
def test_fade_begins_at_the_smaller_network_and_ends_at_the_larger(alpha, unused):
    """Else growing is a jump: with α = 0 new layers do not count, with α = 1 old ones do not."""
    model = progan(size=32)
    z = torch.randn(3, 6)
    x = noise_images(3, size=32)
    model.grow(16, 1.0)
    of_16, *critics_of_16 = outputs(model, z, F.avg_pool2d(x, 2))
    model.grow(32, alpha)
    before = outputs(model, z, x)
    if alpha == 0:
        for left, right in zip(before, [F.interpolate(of_16, scale_factor=2), *critics_of_16]):
            assert torch.equal(left, right)
    for layers in (model.encoder.body.from_image, model.discriminator.body.from_image,
                   model.decoder.to_image):
        torch.nn.init.ones_(layers[unused].weight)
    for left, right in zip(before, outputs(model, z, x)):
        assert torch.equal(left, right)


def test_side_and_share_follow_from_the_step():
    """Else a run that is resumed goes on elsewhere: P = 2 steps for each side and each fade."""
    cfg = Config(size=32, backbone="progan", phase_steps=2)
    seen = [dcvae.growth(cfg, 32, step) for step in range(1, 13)]
    assert seen == [(8, 1), (8, 1), (16, 0.5), (16, 1), (16, 1), (16, 1), (32, 0.5), (32, 1),
                    (32, 1), (32, 1), (32, 1), (32, 1)]
    cfg.grow = False
    assert dcvae.growth(cfg, 32, 1) == (32, 1)


def test_images_fade_as_networks_do():
    """Else D sees sharpness that no fake can have: α = 0 is the mean of 2x2 pixels, enlarged."""
    x = noise_images(2, size=32)
    assert torch.equal(dcvae.at_side(x, 8, 1), F.avg_pool2d(x, 4))
    blurred = dcvae.at_side(x, 16, 1e-9)
    assert_close(blurred, F.avg_pool2d(x, 4).repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_sides_batches_and_layers_of_a_growing_run(tmp_path):
    """Else a side is trained on other images than its own, or on layers that it has not got.

    Batches are larger at smaller sides. What has not grown yet is as it was, in the averages too.
    """
    before, model, calls = play(tmp_path, steps=2, batch_size=8, backbone="progan", phase_steps=2)
    assert [x.shape for _, x, _, _ in calls] == 4 * [(16, 3, 8, 8)]
    after = model.state_dict()
    for name in ("decoder.to_image", "averaged_decoder.to_image", "encoder.body.from_image"):
        for level in (1, 2):
            weight = f"{name}.{level}.weight"
            assert torch.equal(before[weight], after[weight]) == (level == 2)
    shown = model.sample(2)
    assert shown.shape == (2, 3, 16, 16)  # in figures as large as the images
    assert torch.equal(shown, F.interpolate(F.avg_pool2d(shown, 2), scale_factor=2))


@pytest.mark.parametrize("batch_size, asked", [(200, 200), (40, 80), (6, 12)])
def test_small_sides_have_at_most_128_images(tmp_path, monkeypatch, batch_size, asked):
    """Else 8x8 of a large model asks for thousands; the full batch is never cut, though.

    Multiples of it are taken, so that processes that share the one can share the other.
    """
    calls = []

    def note(self, count):
        calls.append(count)
        self.batch_size = 4
        self.per_epoch = self.count // 4

    monkeypatch.setattr(dcvae.Batches, "set_batch_size", note)
    play(tmp_path, batch_size=batch_size, backbone="progan", phase_steps=2)
    assert calls[:2] == [batch_size, asked]  # validation follows


def test_processes_are_told_of_layers_without_gradients(tmp_path, monkeypatch):
    """Else DistributedDataParallel ends at the second step: layers of other sides have none."""
    told = []

    def parallel(cfg, model, **options):
        told.append(options)
        return model

    monkeypatch.setattr(dcvae, "parallel", parallel)
    play(tmp_path, backbone="progan", loss="vae", grow=False)
    assert told == [{"find_unused_parameters": True}]


def test_growing_takes_half_of_the_steps_by_default(tmp_path):
    """Else a run ends before its images have their size: 9 steps are two at 8, two of fading, five.

    The last of a fade has images as they are, before that no image is on the grid of pixel values.
    """
    _, _, calls = play(tmp_path, steps=9, backbone="progan")
    as_they_are = [torch.equal(x, quantize(x)) for _, x, _, _ in calls]
    assert as_they_are == 6 * [False] + 12 * [True]


# ---- The game ------------------------------------------------------------------------------------

def play(folder, model=None, **flags):
    """Training on 32 random images, one step by default.

    -> state_dict before, model after, and its forward passes, [(player, x, where, keys)].
    """
    pixels = noise_pixels(40)
    images = Images("noise", 16, pixels[:32], pixels[32:], pixels[32:], None, False)
    cfg = Config(**TINY | {"batch_size": 4, "steps": 1, "lr": 1e-3} | flags)
    model = model or DCVAE(cfg, (3, 16, 16))
    before = copy.deepcopy(model.state_dict())
    calls = []

    def forward(x, where, keys, player):
        calls.append((player, x, where, keys))
        return DCVAE.forward(model, x, where, keys, player)

    model.forward = forward
    dcvae.train(cfg, model, images, folder, None)
    return before, model, calls


@pytest.mark.parametrize("losses, moved", [
    (("d_gan", "d_contrast"), {"discriminator"}),
    (("contrast", "gan", "kl"), {"encoder", "decoder"})])
def test_each_player_moves_by_its_own_losses(tmp_path, losses, moved):
    """Else D learns from the decoder's losses, or the decoder from D's: Eqs. (5), (9).

    Adam moves each parameter once.
    """
    model = make()
    for name in model.weights:
        if name not in losses:
            model.weights[name] = 0
    before, _, _ = play(tmp_path, model, d_steps=1)
    learned = {name.split(".")[0] for name, p in model.named_parameters()
               if p.requires_grad and not torch.equal(before[name], p)}
    assert learned == moved
    moments = torch.load(tmp_path / "last.pt")["optimizer"]["state"]
    assert {of_one["step"].item() for of_one in moments.values()} == {1}


def test_a_step_is_d_steps_updates_of_d_and_one_of_the_rest(tmp_path):
    """Else the game has another order: D's batches are its own, the rest shares the last of them.

    Keys come with that batch, and are queued once. Images are neither flipped nor shifted. The log
    has the terms of both players.
    """
    _, model, calls = play(tmp_path, d_steps=3)
    players, batches, _, keys = zip(*calls)
    assert players == ("discriminator", "discriminator", "discriminator", "autoencoder")
    assert keys[:2] == (None, None)
    assert keys[2] is keys[3] and list(keys[2]) == ["b1", "final"]
    assert batches[2] is batches[3]
    seen = {image.tobytes() for image in to_uint8(torch.cat(batches)).permute(0, 2, 3, 1).numpy()}
    assert len(seen) == 12
    assert seen <= {image.tobytes() for image in noise_pixels(40)[:32]}
    assert model.queued == 4
    row = read_log(tmp_path / "log.jsonl")[0]
    assert {"real", "d_gan", "d_contrast", "accuracy", "contrast", "gan", "kl"} < row.keys()


def test_vae_learns(tmp_path):
    """Else an update does not minimise the mean of the loss over the batch, Eq. (2).

    Its gradient is that of this mean, with the KL's weight; a small step downhill lowers the loss;
    a line of the log has the terms of the loss.
    """
    model = make(loss="vae", kl_weight=0.5).eval()  # so that only weights change
    x = noise_images(8)
    parameters = [p for p in model.parameters() if p.requires_grad]
    terms = seeded(model, x)
    loss = (terms["pixel"] + 0.5 * terms["kl"]).mean()
    expected = torch.autograd.grad(loss, parameters)
    optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.0, 0.9))
    means = seeded(dcvae.update, model.cfg, model, model, optimizer, "autoencoder", x)
    for p, gradient in zip(parameters, expected):
        assert_close(p.grad, gradient)
    assert means == {name: values.mean() for name, values in terms.items()}
    terms = seeded(model, x)
    assert (terms["pixel"] + 0.5 * terms["kl"]).mean() < loss

    play(tmp_path, loss="vae")
    rows = read_log(tmp_path / "log.jsonl")
    assert list(rows[0]) == ["step", "split", "pixel", "kl", "seconds"]


def test_discriminator_lowers_the_contrast():
    """Else D raises it, as Eq. (9)'s max over D would have it: one small update of D alone.

    The average over the batch is to fall.
    """
    model = make(loss="contrastive", negatives=56).eval()  # power iterations stand still
    x = noise_images(64)
    model.enqueue(model.encode_keys(x[8:]))
    keys = model.encode_keys(x[:8])
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-4)
    before = seeded(dcvae.update, model.cfg, model, model, optimizer, "discriminator", x[:8],
                    keys=keys)
    after = seeded(model, x[:8], keys=keys, player="discriminator")
    assert after["d_contrast"].mean() < before["d_contrast"]


def test_spectral_norms(tmp_path):
    """Else a layer of encoder, D or D's average has no spectral norm: 11 + 12 + 12 layers.

    As power iterations catch up with weights that stand still, the largest singular values go to
    1, from above: uᵀWv ≤ σ(W).
    """
    _, model, _ = play(tmp_path, d_steps=2)
    layers = []
    for part in (model.encoder, model.discriminator, model.momentum_discriminator):
        layers += [layer for layer in part.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 11 + 12 + 12
    for layer in layers:
        for _ in range(300):
            weight = layer.weight.detach()
        norm = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
        assert 1 - 1e-4 <= norm <= 1 + 1e-2


def test_fewer_images_than_a_step_wants(tmp_path):
    """Else a small folder cannot be trained on: 32 images, five batches of 64, give five of 6."""
    _, _, calls = play(tmp_path, d_steps=5, batch_size=64)
    assert [len(x) for _, x, _, _ in calls] == 6 * [6]


@pytest.mark.parametrize("backbone, lr, beta2", [("autogan", 2e-4, 0.9), ("progan", 1e-3, 0.99)])
def test_adam_as_released(tmp_path, backbone, lr, beta2):
    """Else Adam has not 2e-4 and (0, 0.9), or ProGAN's 1e-3 and (0, 0.99)."""
    play(tmp_path, backbone=backbone, lr=None)
    group, = torch.load(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["foreach"]) == (lr, (0, beta2), True)


@pytest.mark.parametrize("ema, share", [(0.999, 0.9), (0, 1)])
def test_average_of_the_first_step_is_of_that_step(tmp_path, ema, share):
    """Else a short run's average is of its start: decay min(--ema, 1/10) at step 1.

    That is nine tenths of the way; with --ema 0 all of it.
    """
    before, model, _ = play(tmp_path, ema=ema)
    start = before["decoder.enter.0.weight"]
    way = model.decoder.enter[0].weight - start
    assert way.abs().max() > 1e-4
    average = model.averaged_decoder.enter[0].weight
    assert_close(average, start + share * way, rtol=0, atol=1e-6)


# ---- Latent space and probe ----------------------------------------------------------------------

def test_codes_and_samples_by_flag():
    """Else --clamp or --draw_code does nothing, or is always on.

    What is seen is what the averaged decoder is given.
    """
    model = make().eval()
    x = noise_images(2)
    mean, log_var = model.encoder(x)
    seen = inputs_of(model.averaged_decoder)
    seeded(model.sample, 500)
    model.cfg.clamp = True
    seeded(model.sample, 500)
    assert seen[0].abs().max() > 2
    assert torch.equal(seen[1], seen[0].clamp(-1, 1))
    model.reconstruct(x)
    assert torch.equal(seen[2], mean)
    model.cfg.draw_code = True
    seeded(model.reconstruct, x)
    assert torch.equal(seen[3], seeded(sample_code, mean, log_var))


def test_interpolation_mixing_editing():
    """Else figures are of other codes than those that are told.

    The ends of a line are the two reconstructions; mixing takes half of the dimensions, the same
    for all pairs; editing adds multiples of the direction.
    """
    model = make().eval()
    x = noise_images(5)
    z = model.encode(x)
    seen = inputs_of(model.averaged_decoder)
    assert model.interpolate(x[:2], x[2:4], 5).shape == (2, 5, 3, 16, 16)
    line = seen[-1].view(2, 5, 6)
    for i, share in ((0, 0), (2, 0.5), (4, 1)):
        assert_close(line[:, i], torch.lerp(z[:2], z[2:4], share))

    assert model.mix(x[:2], x[2:]).shape == (2, 3, 3, 16, 16)
    mixed = seen[-1].view(2, 3, 6)
    from_theirs = mixed[0, 0] == model.encode(x[2:])[0]
    assert from_theirs.sum() == 3
    assert_close(mixed, torch.where(from_theirs, z[2:], z[:2, None]))

    direction = torch.randn(6)
    assert model.edit(x, direction, [0, 0.5]).shape == (5, 2, 3, 16, 16)
    assert_close(seen[-1].view(5, 2, 6), torch.stack([z, z + 0.5 * direction], 1))


def labelled(pixels, train, test=None):
    """Images of the same pixels in every split, with these labels."""
    labels = {"train": np.array(train, np.uint8)}
    labels["test"] = labels["train"] if test is None else np.array(test, np.uint8)
    return Images("made", 16, pixels, pixels, pixels, labels, False)


@pytest.mark.parametrize("eval_images, learned, tested", [(None, 60, 60), (3, 30, 3), (9, 60, 9)])
def test_probe_learns_from_ten_times_what_is_evaluated(monkeypatch, eval_images, learned, tested):
    """Else a quick evaluation is slow, or its labels are those of other images.

    The classifier is given codes and then pixels, and results.json says of how many images.
    """
    model = make().eval()
    pixels = noise_pixels(60)
    labels = np.arange(60) % 7
    given = []

    def note(*arguments):
        given.append(arguments)
        return 12.5, 0.5

    monkeypatch.setattr(dcvae, "linear_probe", note)
    cfg = Config(device="cpu", dtype="fp32", eval_images=eval_images)
    results = dcvae.probe(cfg, model, labelled(pixels, labels))
    assert results == {"probe_images": learned,
                       "probe_error_percent": 12.5, "probe_error_percent_ci95": 0.5,
                       "pixels_error_percent": 12.5, "pixels_error_percent_ci95": 0.5}
    x = as_batch(pixels, "cpu")
    labels = torch.from_numpy(labels)
    for arguments, features in zip(given, (model.eval().encode(x), x.flatten(1))):
        expected = (features[:learned], labels[:learned], features[:tested], labels[:tested])
        assert_close(arguments, expected, rtol=1e-4, atol=1e-4)


def test_label_values():
    """Else the probe is of another column, or a wrong flag is found out after the training.

    A value that no training image has is a mistake, one that no test image has is not.
    """
    images = labelled(None, [[0, 5], [2, 5], [2, 6]], [[0, 5], [2, 5]])
    cfg = Config(label_column=1, label_value=6)
    assert dcvae.label_values(cfg, images, "train").tolist() == [5, 5, 6]
    assert dcvae.label_values(cfg, images, "test").tolist() == [5, 5]
    with pytest.raises(UserError, match="columns 0 to 1"):
        dcvae.label_values(Config(label_column=2), images, "train")
    with pytest.raises(UserError, match=r"labels of made are \[0, 2\]"):
        dcvae.label_values(Config(label_value=9), images, "train")


@pytest.mark.parametrize("number, labels, edited", [
    (1, None, False), (16, [1], False), (16, [2, 7], True), (3, [0, 3, 3], True)])
def test_figures_of_small_sets_and_odd_labels(tmp_path, number, labels, edited):
    """Else a set with fewer test images than a sheet, with one class, or no class 1, fails.

    Mixing has 7 images on the left and 7 others at the top, editing is only where something
    differs.
    """
    pixels = noise_pixels(number)
    images = Images("few", 16, pixels, pixels, pixels, None, False)
    if labels is not None:
        images = labelled(pixels, np.resize(labels, number))
    model = make().eval()
    for save_sheets in (dcvae.save_interpolations, dcvae.save_mixing, dcvae.save_editing):
        save_sheets(Config(device="cpu"), model, images, tmp_path, "title")
    lines = pictures_on(tmp_path / "interpolations" / "test.png", 16)
    assert lines.shape[:2] == (min(number, 8), 8)
    side = min(number, 7)
    mixing = pictures_on(tmp_path / "mixing" / "test.png", 16, side + 1)
    assert np.array_equal(mixing[1:, 0], pixels[:7])
    assert np.array_equal(mixing[0, 1:], pixels[:14][-7:])
    assert (tmp_path / "editing").exists() == edited


def test_editing_takes_the_difference_of_mean_codes(tmp_path, monkeypatch):
    """Else the direction is of other images than 20 with the label and 20 without.

    The edited test images have it not.
    """
    pixels = noise_pixels(60)
    model = make().eval()
    given = []

    def edit(*arguments):
        given.append(arguments)
        return torch.zeros(8, 7, 3, 16, 16)

    monkeypatch.setattr(model, "edit", edit)
    images = labelled(pixels, np.arange(60) % 2)
    dcvae.save_editing(Config(device="cpu"), model, images, tmp_path, "title")
    (x, direction, amounts), = given
    z = model.encode(as_batch(pixels, "cpu"))
    assert_close(direction, z[1:40:2].mean(0) - z[0:40:2].mean(0), rtol=1e-3, atol=1e-3)
    assert amounts == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert torch.equal(x, as_batch(pixels[0:16:2], "cpu"))
