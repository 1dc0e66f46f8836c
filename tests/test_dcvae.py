"""dcvae.py against closed forms.

The backbone layer by layer, the losses, the queue, averages, the game, the latent space, the probe.
Models here have the shapes of the real ones but are very narrow (`narrow`).
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

import dcvae
from common import Images, UserError, from_uint8, quantize, read_log, to_uint8
from conftest import count, pictures_on, seeded
from dcvae import (
    BLOCKS, DCVAE, Config, Decoder, Discriminator, DownBlock, Encoder, autoencoder_gan,
    discriminator_gan, gaussian_kl, info_nce, sample_code, update_average)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(dcvae.WIDTHS, "small", (8, 8))
    monkeypatch.setitem(dcvae.MAPS, "small", (8, 8))
    torch.manual_seed(0)


def make(shape=(3, 16, 16), **flags):
    """An untrained model of 6 latent dimensions and 10 negatives, or of these flags."""
    return DCVAE(Config(**{"small": True, "latent": 6, "negatives": 10, **flags}), shape)


def noise_images(count, channels=3, size=16):
    """Float images of uniform noise in [-1, 1]."""
    return torch.rand(count, channels, size, size) * 2 - 1


def noise_pixels(count, size=16):
    """The same as pixel values, uint8 (count, size, size, 3), always the same ones."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def as_batch(pixels):
    """uint8 (N, H, W, C) -> float (N, C, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(pixels)).permute(0, 3, 1, 2)


def unit(*shape):
    """Random rows of length 1."""
    return F.normalize(torch.randn(*shape), dim=1)


# ---- The backbone --------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_released_code():
    """Else a layer is missing or too wide: latent 128, 32x32 RGB.

    Heads exist only where the contrast is taken.
    """
    with torch.device("meta"):
        model = DCVAE(Config(contrast_layers="b1,b2,b3,b4,final"), (3, 32, 32))
        vaegan = DCVAE(Config(loss="vaegan"), (3, 32, 32))
        dc_vae = DCVAE(Config(), (3, 32, 32))
    assert count(model.decoder) == 4_405_251
    assert count(model.encoder) == 1_086_464
    assert count(model.discriminator) == 1_063_445
    assert count(vaegan.discriminator) == 1_055_761
    assert count(dc_vae.discriminator) == 1_055_761 + 129 + 256 * 16


def test_xavier_where_it_reaches_in_the_release():
    """Else convs of decoder and heads start elsewhere than the released ones.

    They fill ±√(6 / (fan in + fan out)), wider than PyTorch's default.
    """
    model = make()
    for layer in (model.decoder.cells[1].conv1, model.decoder.cells[2].skips[0],
                  model.decoder.leave[2], model.discriminator.heads["b1"][0]):
        area = layer.weight[0, 0].numel()
        bound = (6 / (area * (layer.in_channels + layer.out_channels)))**0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 32), (3, 48), (1, 8)])
def test_shapes(channels, size):
    """Else some size or grey images do not go through; figures are on the pixel grid."""
    model = make((channels, size, size), contrast_layers="b1,b2,b3,b4,final")
    x = noise_images(3, channels, size)
    inputs = [model.discriminator.heads[name][2].in_features for name in BLOCKS]
    assert inputs == [(size // 2)**2] + 3 * [(size // 4)**2]
    score, features = model.discriminator(x)
    assert score.shape == (3,)
    shapes = {name: tuple(values.shape) for name, values in features.items()}
    assert shapes == dict.fromkeys([*BLOCKS, "final"], (3, 16))
    mean, log_var = model.encoder(x)
    assert mean.shape == log_var.shape == (3, 6)
    for images in (model.sample(2), model.reconstruct(x[:2])):
        assert images.shape == (2, channels, size, size)
        assert torch.equal(images, quantize(images))
        assert images.abs().max() <= 1


def test_sizes_that_do_not_double_three_times():
    """Else a size that no decoder has fails somewhere inside a network."""
    with pytest.raises(UserError, match="size 20 is no multiple of 8"):
        make((3, 20, 20))


def test_decoder_is_the_released_graph():
    """Else a cell differs from AutoGAN's: enlarge, then 1x1, layer by layer as released.

    The skip into cell 3 is cell 2's sum, the skip-1 contribution included.
    """
    net = Decoder(6, 8, 3, 32).eval()
    z = torch.randn(2, 6)
    cell1, cell2, cell3 = net.cells

    def up(h, mode, times=2):
        return F.interpolate(h, scale_factor=times, mode=mode)

    with torch.no_grad():
        h = net.enter[0](z).view(2, 8, 4, 4)
        skip1 = cell1.conv1(up(h.relu(), "nearest"))
        h = cell1.conv2(skip1.relu()) + cell1.shortcut(up(h, "nearest"))
        skip2 = cell2.conv1(up(h.relu(), "bilinear")) + cell2.skips[0](up(skip1, "bilinear"))
        h = cell2.conv2(skip2.relu()) + cell2.shortcut(up(h, "bilinear"))
        inner = cell3.conv1(up(h.relu(), "nearest"))
        inner = inner + cell3.skips[0](up(skip1, "nearest", 4))
        inner = inner + cell3.skips[1](up(skip2, "nearest"))
        h = cell3.conv2(inner.relu())
        expected = net.leave[2](net.leave[0](h).relu()).tanh()
        torch.testing.assert_close(net(z), expected, rtol=1e-4, atol=1e-5)


def test_blocks_down_are_the_released_graph():
    """Else a residual block differs: where it has its first ReLU, what its shortcut pools.

    Block 1: no ReLU first, shortcut of the pooled image. Block 2: 1x1, then pool. Blocks 3 and 4:
    identity. The encoder is these four, pooled, and a linear layer.
    """
    first = DownBlock(3, 8, first=True, halve=True).eval()
    second = DownBlock(8, 8, halve=True).eval()
    third = DownBlock(8, 8).eval()
    encoder = Encoder(3, 8, 6).eval()
    x = torch.randn(2, 3, 16, 16)

    def halved(h):
        return F.avg_pool2d(h, 2)

    with torch.no_grad():
        h = first(x)
        expected = halved(first.conv2(first.conv1(x).relu())) + first.shortcut(halved(x))
        torch.testing.assert_close(h, expected)
        inner = second.conv2(second.conv1(h.relu()).relu())
        torch.testing.assert_close(second(h), halved(inner + second.shortcut(h)))
        inner = third.conv2(third.conv1(h.relu()).relu())
        torch.testing.assert_close(third(h), h + inner)
        h = x
        for block in encoder.blocks:
            h = block(h)
        expected = 64 * h.relu().mean((2, 3)) @ encoder.linear.weight.T
        torch.testing.assert_close(torch.cat(encoder(x), 1), expected)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_codes_start_within_bounds(size):
    """Else log σ² of untrained encoders starts beyond its bound at some size.

    At 32 pixels the pooling is the released sum over 8x8.
    """
    encoder = make((3, size, size)).encoder
    _, log_var = encoder(noise_images(8, 3, size))
    assert log_var.max() < 20
    _, log_var = encoder(1e6 * torch.randn(8, 3, size, size))
    assert log_var.max() == 20
    h = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(dcvae.pool(h), h.relu().sum((2, 3)))


def test_features_are_pooled_over_the_map():
    """Else `final` is something else than what the score is computed from.

    ReLU, 64 times the mean over positions, linear without bias: 16 values, from which the score is
    one more linear layer. b1 is a 1x1 conv and a linear layer of the first block.
    """
    net = Discriminator(3, 8, 16, ("b1",)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        h = x
        for block in net.blocks:
            h = block(h)
        score, features = net(x)
        expected = 64 * h.relu().mean((2, 3)) @ net.linear.weight.T
        torch.testing.assert_close(features["final"], expected)
        expected = (features["final"] @ net.score.weight.T + net.score.bias).squeeze(1)
        torch.testing.assert_close(score, expected)
        conv, _, linear = net.heads["b1"]
        expected = conv(net.blocks[0](x)).flatten(1) @ linear.weight.T
        torch.testing.assert_close(features["b1"], expected)


def test_batch_of_d_is_no_matter():
    """Else real and fake images could not share one forward pass.

    Scores of images together are those of each alone.
    """
    net = make().eval().discriminator
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        together, _ = net(x)
        alone = torch.cat([net(one)[0] for one in x.split(1)])
    torch.testing.assert_close(together, alone)


# ---- Losses --------------------------------------------------------------------------------------

def test_kl_against_torch():
    """Else the closed form of the KL, or its sum over dimensions, is wrong."""
    mean = torch.randn(4, 6)
    log_var = torch.randn(4, 6)
    q = Independent(Normal(mean, (log_var / 2).exp()), 1)
    p = Independent(Normal(torch.zeros(4, 6), torch.ones(4, 6)), 1)
    torch.testing.assert_close(gaussian_kl(mean, log_var).sum(1), kl_divergence(q, p))


def test_info_nce_is_the_softmax_over_explicit_pairs():
    """Else Eq. (6) is not what is computed: by loops, cosine similarity over the temperature.

    Lengths of the query do not matter, those of keys are 1. Where all keys are alike it is a guess.
    """
    query = 3 * torch.randn(3, 5)
    positive = unit(3, 5)
    negatives = unit(7, 5)
    query[0] = 2 * positive[0]  # one hit
    losses, hits = info_nce(query, positive, negatives, 0.2)
    for i in range(3):
        shares = []
        for key in (positive[i], *negatives):
            cosine = query[i] @ key / query[i].norm() / key.norm()
            shares.append(math.exp(cosine.item() / 0.2))
        assert losses[i].item() == pytest.approx(-math.log(shares[0] / sum(shares)), rel=1e-5)
        assert hits[i].item() == (shares[0] > max(shares[1:]))
    assert hits[0] == 1
    alike = torch.ones(9, 4) / 2
    losses, _ = info_nce(torch.randn(5, 4), alike[:5], alike, 0.07)
    torch.testing.assert_close(losses, torch.full((5,), math.log(10)))


def test_info_nce_is_fp32_under_autocast():
    """Else bf16 would round cosines to 1/256, a factor e^(1/18) in a share."""
    query = torch.randn(4, 16)
    positive = unit(4, 16)
    negatives = unit(50, 16)
    outside, _ = info_nce(query, positive, negatives, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = info_nce(query, positive, negatives, 0.07)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    half = query.bfloat16()
    of_half, _ = info_nce(half, positive, negatives, 0.07)
    of_float, _ = info_nce(half.float(), positive, negatives, 0.07)
    assert torch.equal(of_half, of_float)


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
    eq4 = D(real).log() + of_fakes
    torch.testing.assert_close(discriminator_gan("log", real, reconstructed, sampled), -eq4)
    log = autoencoder_gan("log", reconstructed, sampled)
    torch.testing.assert_close(log.mean(), of_fakes.mean())
    wgan = discriminator_gan("wgan", real, reconstructed, sampled)
    by_hand = torch.tensor([-1.5 + 0 - 2 + 1e-3 * 4, 0.25 - 0.25 - 0.5 + 1e-3 * 0.25])
    torch.testing.assert_close(wgan, by_hand)


LOSSES = {
    "vae": ["pixel", "kl"],
    "vaegan": ["feature", "gan", "kl"],
    "contrastive": ["contrast", "kl"],
    "dcvae": ["contrast", "gan", "kl"],
}


def keys_of(model, x):
    """encode_keys where the loss has a contrast, else None."""
    return model.encode_keys(x) if model.contrastive else None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gan, backbone", [("hinge", "autogan"), ("log", "autogan"),
                                           ("hinge", "progan"), ("wgan", "progan")])
def test_terms_of_the_four_losses(loss, gan, backbone):
    """Else a loss has other terms than Eqs. (1), (3) to (5), (8), (9), or a term teaches nobody.

    Every term reaches encoder and decoder, the KL the encoder alone. D's own terms reach neither,
    and all of D that is in use. `forward` gives each player its terms.
    """
    model = make(loss=loss, gan=gan, backbone=backbone)
    x = noise_images(4)
    keys = keys_of(model, x)
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
        unused = name.startswith(("score", "body.from_image.0"))  # the latter for a side of 8
        if not unused or model.adversarial and name.startswith("score"):
            assert p.grad is not None, name


def test_vae_loss_is_minus_the_elbo():
    """Else --loss vae is no VAE: -ELBO less D/2 log π, with p(x|z) = N(x̂, ½), KL weight 1."""
    model = make(loss="vae", latent=3).eval()
    x = noise_images(2)
    assert model.cfg.kl_weight == 1
    assert Config().kl_weight == 6.4e-5
    with torch.no_grad():
        terms = seeded(model.autoencoder_terms, x)
        mean, log_var = model.encoder(x)
        sd = (log_var / 2).exp()
        z = mean + sd * seeded(torch.randn_like, mean)
        log_p = Normal(model.decoder(z), 0.5**0.5).log_prob(x).sum((1, 2, 3))
    minus_log_p = terms["pixel"] + 3 * 16 * 16 / 2 * math.log(math.pi)
    torch.testing.assert_close(minus_log_p, -log_p)
    kl = kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(terms["kl"], kl)


def codes(model, x, samples):
    """Codes of x as drawn from seed 1, then those of `samples` images -> (B + samples, L)."""
    mean, log_var = model.encoder(x)
    torch.manual_seed(1)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    return torch.cat([z, torch.randn(samples, 6)])


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
    with torch.no_grad():
        terms = seeded(model.autoencoder_terms, x, keys=keys)
        scores, features = model.discriminator(model.decoder(codes(model, x, 6)))
        torch.testing.assert_close(terms["gan"], -0.5 * scores[:3] - 0.5 * scores[3:].mean())
        of_reconstructions = {name: values[:3] for name, values in features.items()}
        contrast, _ = mean_nce(model, of_reconstructions, keys)
        torch.testing.assert_close(terms["contrast"], contrast)
        torch.testing.assert_close(terms["kl"], gaussian_kl(*model.encoder(x)).sum(1))


def test_feature_distance_is_that_of_the_reconstructions():
    """Else Eq. (3) is not the squared distance of D's 16 last features of x and x̂, summed."""
    model = make(loss="vaegan").eval()
    x = noise_images(3)
    with torch.no_grad():
        terms = seeded(model.autoencoder_terms, x)
        _, of_x = model.discriminator(x)
        _, of_x_hat = model.discriminator(model.decoder(codes(model, x, 0)))
    distance = (of_x["final"] - of_x_hat["final"]).square().sum(1)
    torch.testing.assert_close(terms["feature"], distance)


def test_discriminator_terms_against_parts():
    """Else D takes fakes for real: reconstructions, samples and real images are in another order.

    The contrast's queries are the reconstructions.
    """
    model = make().eval()
    x = noise_images(3)
    keys = model.encode_keys(x)
    with torch.no_grad():
        terms = seeded(model.discriminator_terms, x, keys=keys)
        fakes = model.decoder(codes(model, x, 3))
        for name, images in (("real", x), ("reconstructed", fakes[:3]), ("sampled", fakes[3:])):
            torch.testing.assert_close(terms[name], model.discriminator(images)[0])
        d_gan = discriminator_gan("hinge", terms["real"], terms["reconstructed"], terms["sampled"])
        torch.testing.assert_close(terms["d_gan"], d_gan)
        contrast, hits = mean_nce(model, model.discriminator(fakes[:3])[1], keys)
        torch.testing.assert_close(terms["d_contrast"], contrast)
        torch.testing.assert_close(terms["accuracy"], hits)


def test_optimal_critic_of_remark_1():
    """Else our reading of Eq. (7) is wrong: its best critic is log p(x|z) - log p(x).

    Over all (x_1, x_2), i, z of a small discrete model. Any c(z) may be added, but no c(x).
    """
    joint = torch.tensor([[0.30, 0.05], [0.10, 0.15], [0.05, 0.35]], dtype=torch.float64)  # p(x, z)
    p_x = joint.sum(1)
    q = joint / joint.sum(1, keepdim=True)  # q(z|x)

    def i_nce(h):
        total = 0.0
        for a in range(3):
            for b in range(3):
                for z in range(2):
                    nats = torch.logsumexp(torch.stack([h[a, z], h[b, z]]), 0) - h[a, z]
                    total = total + p_x[a] * p_x[b] * q[a, z] * nats
        return total

    h = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([h], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = i_nce(h)
        loss.backward()
        return loss

    optimizer.step(closure)
    log_p = (joint / joint.sum(0)).log()  # log p(x|z)
    best = log_p - p_x.log()[:, None]
    found = h.detach()
    torch.testing.assert_close(found - found[0], best - best[0], rtol=1e-4, atol=1e-4)
    plus_c_of_z = i_nce(best + torch.tensor([1.0, -2.0]))
    assert plus_c_of_z.item() == pytest.approx(i_nce(best).item(), abs=1e-12)
    assert i_nce(log_p) > i_nce(best) + 1e-3  # the paper's, with c(x) = 0


# ---- Queue, averages, patches --------------------------------------------------------------------

@pytest.mark.parametrize("negatives, batch", [(10, 4), (10, 10), (6, 4), (3, 4), (8096, 4)])
def test_queue_keeps_the_newest(negatives, batch):
    """Else old keys stay and new ones are lost: first in, first out, across the buffer's end.

    Also where the batch does not divide it or is larger.
    """
    model = make(negatives=negatives)
    start = model.queue["final"].clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(negatives))
    batches = [unit(batch, 16) for _ in range(7)]
    for key in batches:
        model.enqueue({"b1": key, "final": key})
    everything = torch.cat([start, *batches])
    oldest_first = model.queue["final"].roll(-model.queued.item(), 0)
    assert torch.equal(oldest_first, everything[-negatives:])


def test_keys_come_from_the_momentum_network():
    """Else keys are of D itself, or not of length 1, or carry gradients, or move the network."""
    model = make()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        model.discriminator.linear.parametrizations.weight.original.add_(1)
    expected = copy.deepcopy(model.momentum_discriminator)
    keys = model.encode_keys(x)
    with torch.no_grad():
        _, features = expected(x)
    for name in ("b1", "final"):
        torch.testing.assert_close(keys[name], F.normalize(features[name], dim=1))
        assert not keys[name].requires_grad
    for p, same in zip(model.momentum_discriminator.parameters(), expected.parameters()):
        assert torch.equal(p, same)


def test_momentum_network_moves_before_keys_are_made(tmp_path, monkeypatch):
    """Else keys are of an average that is one step behind, or that follows D's last update.

    With --momentum 0 the average that makes the keys is D after its update on the first batch.
    """
    model = make(momentum=0, lr=1e-3, d_steps=2)
    weight = "linear.parametrizations.weight.original"
    start = model.discriminator.state_dict()[weight].clone()
    seen = []

    def encode_keys(x, where):
        for net in (model.momentum_discriminator, model.discriminator):
            seen.append(copy.deepcopy(net.state_dict()))
        return DCVAE.encode_keys(model, x, where)

    monkeypatch.setattr(model, "encode_keys", encode_keys)
    play(tmp_path, model=model, momentum=0, d_steps=2)
    average, live = seen
    for name, values in live.items():  # spectral norm's vectors too
        assert torch.equal(average[name], values), name
    assert not torch.equal(average[weight], start)
    assert not torch.equal(average[weight], model.discriminator.state_dict()[weight])


def test_average_follows_parameters_and_batch_statistics():
    """Else averaged weights run with batch statistics of others, as in the release.

    With --ema 0 the average is the decoder itself. It never uses a batch's own statistics.
    """
    model = make()
    average = model.averaged_decoder
    net = model.decoder
    with torch.no_grad():
        net.enter[0].weight.fill_(1)
        average.enter[0].weight.fill_(0)
        net.leave[0].running_mean.fill_(4)
        net.leave[0].running_var.fill_(3)
        net.leave[0].num_batches_tracked.fill_(7)
    update_average(average, net, 0.75)
    assert (average.enter[0].weight == 0.25).all()
    assert (average.leave[0].running_mean == 1).all()
    assert (average.leave[0].running_var == 1.5).all()
    assert average.leave[0].num_batches_tracked == 7
    update_average(average, net, 0)
    for name, values in net.state_dict().items():
        assert torch.equal(average.state_dict()[name], values), name
    assert model.train().averaged_decoder.training is False


def test_figures_show_the_averaged_decoder():
    """Else what is drawn and evaluated is the decoder of the last step."""
    model = make()
    with torch.no_grad():
        model.averaged_decoder.leave[2].weight.zero_()
        model.averaged_decoder.leave[2].bias.fill_(0.5)
    assert torch.equal(model.sample(2), quantize(torch.full((2, 3, 16, 16), math.tanh(0.5))))


def test_patches_are_one_place_of_each_block():
    """Else query and key are of two places: one for each layer, all channels, the same in both.

    Their mean comes on top of the mean over layers.
    """
    model = make(patch_after=0)
    x = torch.rand(2, 3, 16, 16)
    patches = [f"patch_{name}" for name in BLOCKS]
    assert list(model.queue) == ["b1", "final", *patches]
    where = torch.rand(4, 2)
    keys = model.encode_keys(x, where)
    assert list(keys) == ["b1", "final", *patches]
    assert list(model.encode_keys(x)) == ["b1", "final"]

    model.eval()
    with torch.no_grad():
        _, features = model.discriminator(x, where)
        h = x
        for i, block in enumerate(model.discriminator.blocks):
            h = block(h)
            row, column = (where[i] * h.shape[2]).long().tolist()
            torch.testing.assert_close(features[patches[i]], h[:, :, row, column])
        contrast, _ = model.contrast(features, keys)
        expected, _ = mean_nce(model, features, keys)
        for name in patches:
            loss, _ = info_nce(features[name], keys[name], model.queue[name], 0.07)
            expected = expected + loss / 4
        torch.testing.assert_close(contrast, expected)
        assert len(model.autoencoder_terms(x, where, keys)) == 3
        for corner in (0.0, 1 - 2**-24):  # the first and the last place exist
            model.discriminator(x, torch.full((4, 2), corner))


def test_place_of_patches_changes():
    """Else the same corner of every map is contrasted at every step, or in every block."""
    cfg = Config(patch_after=0, device="cpu")
    places = torch.cat([dcvae.patch_places(cfg, 1), dcvae.patch_places(cfg, 2)])
    assert places.shape == (8, 2)
    assert len(places.unique(dim=0)) == 8
    assert places.min() >= 0
    assert places.max() < 1


def test_patches_begin_after_patch_after():
    """Else local patches are contrasted a step too early, from the start, or without the flag."""
    never = Config(device="cpu")
    assert dcvae.patch_places(never, 10**6) is None
    late = Config(patch_after=3, device="cpu")
    assert dcvae.patch_places(late, 3) is None
    assert dcvae.patch_places(late, 4) is not None
    at_once = Config(patch_after=0, device="cpu")
    assert dcvae.patch_places(at_once, 1) is not None


def test_patches_do_not_wait_for_the_device():
    """Else every block reads a number on the host; an index with one element is a gather."""
    model = make(patch_after=0)
    _, features = model.discriminator(torch.rand(2, 3, 16, 16), torch.rand(4, 2))
    squeezed_from, _ = features["patch_b2"].grad_fn.next_functions[0]
    assert "Index" in str(squeezed_from)


def test_layers_that_do_not_exist():
    """Else a wrong --contrast_layers is found out inside a network, or counts a layer twice."""
    for layers in ("b5", "b1,,final", "b1,b1", ""):
        with pytest.raises(UserError, match="--contrast_layers"):
            make(contrast_layers=layers)


# ---- The other backbone --------------------------------------------------------------------------

def progan(size=16, **flags):
    """As `make`, on ProGAN's networks."""
    return make((3, size, size), backbone="progan", **flags)


@pytest.mark.parametrize("size, of_decoder, of_discriminator, of_encoder", [
    (16, 15_998_473, 16_005_121, 16_525_312), (64, 22_490_383, 22_498_049, 23_018_240),
    (128, 22_933_394, 22_941_313, 23_461_504), (256, 23_044_309, 23_052_353, 23_572_544),
    (512, 23_072_120, 23_080_225, 23_600_416), (1024, 23_079_115, 23_087_249, 23_607_440)])
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


def test_sizes_that_are_not_doublings_of_4():
    """Else a network ends at another side than the images have."""
    for size in (8, 24, 48, 100):
        with pytest.raises(UserError, match=f"16, 32, 64 … pixels a side, not {size}"):
            progan(size)


def test_scaled_weights_keep_the_variance():
    """Else a gain is not √2 before a leaky ReLU, 1 elsewhere, or a fan-in is not k²·c_in.

    Noise of mean square 1 gets variance 2; the ReLU leaves (1 + 0.2²)/2 of it.
    """
    h = torch.randn(64, 40, 8, 8)
    for kernel, padding in ((1, 0), (3, 0), (8, 0), (4, 3)):
        for linear, expected in ((True, 1), (False, 1.04)):
            conv = dcvae.ScaledConv(40, 500, kernel, padding, linear)
            inside = slice(padding, 8 - padding)
            square = conv(h)[:, :, inside, inside].square().mean().item()
            assert square == pytest.approx(expected, rel=0.05)
            assert conv.weight.var().item() == pytest.approx(1, rel=0.1)
            assert (conv.bias == 0).all()


def test_pixel_norm():
    """Else a pixel's features do not have a root mean square of 1, in the same direction."""
    h = 5 * torch.randn(2, 7, 3, 3)
    normed = dcvae.PixelNorm()(h)
    torch.testing.assert_close(normed.square().mean(1), torch.ones(2, 3, 3))
    torch.testing.assert_close(F.cosine_similarity(h, normed, dim=1), torch.ones(2, 3, 3))


@pytest.mark.parametrize("batch, group", [(12, 4), (6, 2), (3, 1)])
def test_minibatch_deviation_by_hand(batch, group):
    """Else a group's number is of other images: real ones and fakes in one pass would be mixed."""
    h = torch.randn(batch, 5, 4, 4)
    seen = dcvae.minibatch_deviation(h)
    assert torch.equal(seen[:, :5], h)
    for i in range(batch):
        first = i // group * group
        deviation = h[first:first + group].double().numpy().std(0).mean()
        expected = torch.full((4, 4), max(deviation, 1e-4)).float()
        torch.testing.assert_close(seen[i, 5], expected)


def test_penalty_of_a_linear_critic():
    """Else it is not (‖w‖ - 1)², whatever the images; or D cannot learn from it: 2 (‖w‖ - 1)."""
    w = torch.randn(3, 4, 4, requires_grad=True)

    def critic(x):
        return (x * w).sum((1, 2, 3)), None

    penalty = dcvae.gradient_penalty(critic, noise_images(5, size=4), noise_images(5, size=4))
    torch.testing.assert_close(penalty, (w.norm() - 1).square().expand(5))
    gradient, = torch.autograd.grad(penalty.mean(), w)
    torch.testing.assert_close(gradient, 2 * (w.norm() - 1) * w / w.norm())


def test_penalty_between_real_and_fake():
    """Else it is taken elsewhere: of the critic x²/2 it is (|x̄| - 1)², x̄ between the two."""
    def critic(x):
        return x.square().sum((1, 2, 3)) / 2, None

    real = torch.full((200, 1, 1, 1), 2.0)
    fake = torch.full((200, 1, 1, 1), 4.0)
    slope = dcvae.gradient_penalty(critic, real, fake).sqrt() + 1
    assert 2 <= slope.min() < 2.1 and 3.9 < slope.max() <= 4


def test_penalty_under_autocast():
    """Else second derivatives are of bf16; D's weights get gradients from it all the same."""
    model = progan(loss="vaegan")
    real, fake = noise_images(4), noise_images(4)
    outside = seeded(dcvae.gradient_penalty, model.discriminator, real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        inside = seeded(dcvae.gradient_penalty, model.discriminator, real, fake)
    assert torch.equal(inside, outside)
    inside.mean().backward()
    assert model.discriminator.body.blocks[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_fade_begins_at_the_smaller_network_and_ends_at_the_larger(alpha):
    """Else growing is a jump: with α = 0 new layers do not count, with α = 1 old ones do not."""
    model = progan(size=32).eval()
    model.decoder.train()  # which shows images as small as they are
    z = torch.randn(3, 6)
    x = noise_images(3, size=32)
    small_x = F.avg_pool2d(x, 2)
    with torch.no_grad():
        model.grow(16, 1.0)
        of_smaller = (model.decoder(z), model.encoder(small_x)[0], model.discriminator(small_x)[0])
        model.grow(32, alpha)
        before = (model.decoder(z), model.encoder(x)[0], model.discriminator(x)[0])
        if alpha == 0:
            enlarged = F.interpolate(of_smaller[0], scale_factor=2)
            assert torch.equal(before[0], enlarged)
            assert torch.equal(before[1], of_smaller[1])
            assert torch.equal(before[2], of_smaller[2])
        for network in (model.encoder.body.from_image, model.discriminator.body.from_image,
                        model.decoder.to_image):
            level = 3 if alpha == 0 else 2  # the layer that does not count: of 32x32, of 16x16
            for p in network[level].parameters():
                p.add_(1)
        after = (model.decoder(z), model.encoder(x)[0], model.discriminator(x)[0])
    for left, right in zip(before, after):
        assert torch.equal(left, right)


def test_side_and_share_follow_from_the_step():
    """Else a run that is resumed goes on elsewhere: P = 2 steps for each side and each fade."""
    cfg = Config(size=32, backbone="progan", phase_steps=2)
    seen = [dcvae.growth(cfg, 32, step) for step in range(1, 13)]
    assert seen == [(8, 1), (8, 1), (16, 0.5), (16, 1), (16, 1), (16, 1), (32, 0.5), (32, 1),
                    (32, 1), (32, 1), (32, 1), (32, 1)]
    assert dcvae.growth(Config(size=32, backbone="progan", grow=False), 32, 1) == (32, 1)
    assert dcvae.growth(Config(), 32, 1) == (32, 1)


def test_images_fade_as_networks_do():
    """Else D sees sharpness that no fake can have: α = 0 is the mean of 2x2 pixels, enlarged."""
    x = noise_images(2, size=32)
    assert torch.equal(dcvae.at_side(x, 8, 1), F.avg_pool2d(x, 4))
    blurred = dcvae.at_side(x, 16, 1e-9)
    enlarged = F.avg_pool2d(x, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(blurred, enlarged)


def test_sides_batches_and_layers_of_a_growing_run(tmp_path):
    """Else a side is trained on other images than its own, or on layers that it has not got.

    Batches are larger at smaller sides. What has not grown yet is as it was, in the averages too.
    """
    model = progan()
    seen = []
    watch(model, seen)
    flags = dict(backbone="progan", latent=6, phase_steps=2)
    before, model = play(tmp_path / "run", steps=2, model=model, batch_size=8, **flags)
    assert [tuple(x.shape) for name, x, _ in seen if name == "autoencoder_terms"] == \
        2 * [(16, 3, 8, 8)]
    after = model.state_dict()
    for name in ("decoder", "averaged_decoder"):
        assert torch.equal(before[f"{name}.to_image.2.weight"], after[f"{name}.to_image.2.weight"])
        assert not torch.equal(before[f"{name}.to_image.1.weight"],
                               after[f"{name}.to_image.1.weight"])
    assert torch.equal(before["encoder.body.from_image.2.weight"],
                       after["encoder.body.from_image.2.weight"])
    shown = model.sample(2)
    assert shown.shape == (2, 3, 16, 16)  # in figures as large as the images
    assert torch.equal(shown, F.interpolate(F.avg_pool2d(shown, 2), scale_factor=2))


def test_batches_of_small_sides_are_multiples_of_the_full_ones(tmp_path):
    """Else processes that share the batch at full size cannot share it at 8x8: 12 there, not 16."""
    model = progan()
    seen = []
    watch(model, seen)
    play(tmp_path, steps=1, model=model, batch_size=6, backbone="progan", phase_steps=1)
    assert {len(x) for _, x, _ in seen} == {12}


@pytest.mark.parametrize("batch_size, asked", [(100, 100), (40, 80), (8, 16)])
def test_small_sides_have_at_most_128_images(tmp_path, monkeypatch, batch_size, asked):
    """Else 8x8 of a large model asks for thousands; the full batch is never cut, though."""
    calls = []

    def note(self, count):
        calls.append(count)
        self.batch_size = 4
        self.per_epoch = self.count // 4

    monkeypatch.setattr(dcvae.Batches, "set_batch_size", note)
    play(tmp_path, batch_size=batch_size, backbone="progan", phase_steps=2)
    assert calls[:2] == [batch_size, asked]  # validation follows


@pytest.mark.parametrize("grow", [True, False])
def test_processes_are_told_of_layers_without_gradients(tmp_path, monkeypatch, grow):
    """Else DistributedDataParallel ends at the second step: layers of other sides have none."""
    told = []

    def parallel(cfg, model, **options):
        told.append(options)
        return model

    monkeypatch.setattr(dcvae, "parallel", parallel)
    play(tmp_path, backbone="progan", loss="vae", grow=grow)
    assert told == [{"find_unused_parameters": True}]


def test_growing_takes_half_of_the_steps_by_default(tmp_path):
    """Else a run ends before its images have their size: two phases from 8 to 16, of 10 steps."""
    cfg = Config(**{"small": True, "latent": 6, "negatives": 10, "batch_size": 4, "steps": 9,
                    "device": "cpu", "dtype": "fp32", "backbone": "progan"})
    pixels = noise_pixels(40)
    images = Images("noise", 16, pixels[:32], pixels[32:], pixels[32:], None, False)
    dcvae.train(cfg, DCVAE(cfg, (3, 16, 16)), images, tmp_path, None)
    assert cfg.phase_steps == 2
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["phase_steps"] == 2


# ---- The game ------------------------------------------------------------------------------------

def play(folder, steps=1, model=None, **flags):
    """`steps` of training on 32 random images -> state_dict before, model after."""
    pixels = noise_pixels(40)
    images = Images("noise", 16, pixels[:32], pixels[32:], pixels[32:], None, False)
    cfg = Config(**{"small": True, "latent": 6, "negatives": 10, "batch_size": 4, "steps": steps,
                    "device": "cpu", "dtype": "fp32", "lr": 1e-3, **flags})
    if model is None:
        model = DCVAE(cfg, (3, 16, 16))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    dcvae.train(cfg, model, images, folder, None)
    return before, model


def moved(before, model, part):
    """Whether a parameter of this part of the model is another than before."""
    for name, p in getattr(model, part).named_parameters():
        if not torch.equal(before[f"{part}.{name}"], p):
            return True
    return False


def watch(model, seen):
    """From now on every call of one of the two players' terms is noted in `seen`.

    As (name, x, whether there are keys).
    """
    def watched(name, function):
        def call(x, where=None, keys=None):
            seen.append((name, x, keys is not None))
            return function(x, where, keys)
        return call

    for name in ("autoencoder_terms", "discriminator_terms"):
        setattr(model, name, watched(name, getattr(model, name)))


@pytest.mark.parametrize("still", ["critics", "creators"])
def test_each_player_moves_by_its_own_losses(tmp_path, still):
    """Else D learns from the decoder's losses, or the decoder from D's: Eqs. (5), (9)."""
    model = make(lr=1e-3)
    names = ("d_gan", "d_contrast") if still == "critics" else ("contrast", "gan", "kl")
    for name in names:
        model.weights[name] = 0
    before, model = play(tmp_path, model=model)
    assert moved(before, model, "discriminator") == (still == "creators")
    assert moved(before, model, "encoder") == (still == "critics")
    assert moved(before, model, "decoder") == (still == "critics")


def test_a_step_is_d_steps_updates_of_d_and_one_of_the_rest(tmp_path):
    """Else the game has another order: D's batches are its own, the rest shares the last of them.

    Keys come with that batch, and are queued once.
    """
    model = make()
    seen = []
    watch(model, seen)
    play(tmp_path, model=model, d_steps=3)
    names = [name for name, _, _ in seen]
    assert names == ["discriminator_terms"] * 3 + ["autoencoder_terms"]
    assert [has_keys for _, _, has_keys in seen] == [False, False, True, True]
    pixels = [x[0, 0, 0, 0].item() for _, x, _ in seen]
    assert len(set(pixels[:3])) == 3
    assert pixels[2] == pixels[3]
    assert model.queued == 4


def test_vae_learns(tmp_path):
    """Else an update does not minimise the mean of the loss over the batch, Eq. (2).

    Its gradient is that of this mean, with the KL's weight; a small step downhill lowers the loss;
    a line of the log has the terms of the loss.
    """
    model = make(loss="vae", kl_weight=0.5).eval()  # so that only weights change
    x = noise_images(8)

    def loss():
        terms = seeded(model.autoencoder_terms, x)
        return (terms["pixel"] + 0.5 * terms["kl"]).mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss(), parameters)
    before = loss().item()
    optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.0, 0.9))
    terms = seeded(model.autoencoder_terms, x)
    means = dcvae.update(model, optimizer, terms)
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient)
    assert loss().item() < before
    assert means == {name: values.mean() for name, values in terms.items()}

    play(tmp_path, loss="vae")
    rows = read_log(tmp_path / "log.jsonl")
    assert list(rows[0]) == ["step", "split", "pixel", "kl", "seconds"]


def test_discriminator_lowers_the_contrast():
    """Else D raises it, as Eq. (9)'s max over D would have it: one small update of D alone.

    The average over the batch is to fall.
    """
    model = make(loss="contrastive", negatives=56)
    x = noise_images(64)
    model.enqueue(model.encode_keys(x[8:]))
    keys = model.encode_keys(x[:8])
    model.eval()  # power iterations stand still: only weights change
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-4)
    before = seeded(model.discriminator_terms, x[:8], keys=keys)
    dcvae.update(model, optimizer, before)
    after = seeded(model.discriminator_terms, x[:8], keys=keys)
    assert after["d_contrast"].mean() < before["d_contrast"].mean()


def test_spectral_norms(tmp_path):
    """Else a layer of encoder, D or D's average has no spectral norm: 11 + 12 + 12 layers.

    A power iteration belongs to each pass in training, none to evaluation. As they catch up with
    weights that stand still, the largest singular values go to 1, from above: uᵀWv ≤ σ(W).
    """
    _, model = play(tmp_path, d_steps=2)
    layers = []
    for part in (model.encoder, model.discriminator, model.momentum_discriminator):
        layers += [layer for layer in part.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 11 + 12 + 12
    for layer in layers:
        for mode, moves in ((True, True), (False, False)):
            model.train(mode)
            vectors = [v.clone() for v in layer.parametrizations.weight[0].buffers()]
            assert layer.weight.isfinite().all()
            now = list(layer.parametrizations.weight[0].buffers())
            still = all(torch.equal(a, b) for a, b in zip(vectors, now))
            assert still != moves or min(layer.weight.shape) == 1  # D's score has one row
    model.train()
    for _ in range(300):
        for layer in layers:
            layer.weight.detach()
    model.eval()
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item()
        assert 1 - 1e-4 <= norm <= 1 + 1e-2


def test_fewer_images_than_a_step_wants(tmp_path):
    """Else a small folder cannot be trained on: 32 images, five batches of 64, give five of 6."""
    model = make()
    seen = []
    watch(model, seen)
    play(tmp_path, model=model, d_steps=5, batch_size=64)
    assert [len(x) for name, x, _ in seen if name == "discriminator_terms"] == 5 * [6]


def test_adam_and_images_as_released(tmp_path, monkeypatch):
    """Else Adam has not 2e-4 and (0, 0.9), or images are flipped or shifted."""
    model = make()
    seen = []
    watch(model, seen)
    given = []
    Adam = torch.optim.Adam

    def make_adam(parameters, **options):
        given.append(options)
        return Adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", make_adam)
    play(tmp_path, model=model, lr=Config().lr)
    assert given == [{"lr": 2e-4, "betas": (0.0, 0.9), "foreach": True}]
    known = {image.tobytes() for image in noise_pixels(40)[:32]}
    for _, x, _ in seen:
        for image in to_uint8(x).permute(0, 2, 3, 1):
            assert image.numpy().tobytes() in known


@pytest.mark.parametrize("ema, share", [(0.999, 0.9), (0, 1)])
def test_average_of_the_first_step_is_of_that_step(tmp_path, ema, share):
    """Else a short run's average is of its start: decay min(--ema, 1/10) at step 1.

    That is nine tenths of the way; with --ema 0 all of it.
    """
    before, model = play(tmp_path, ema=ema)
    start = before["decoder.enter.0.weight"]
    way = model.decoder.enter[0].weight.detach() - start
    assert way.abs().max() > 1e-4
    average = model.averaged_decoder.enter[0].weight
    torch.testing.assert_close(average, start + share * way, rtol=0, atol=1e-6)


# ---- Latent space and probe ----------------------------------------------------------------------

@pytest.fixture
def decoded(monkeypatch):
    """decoded(model) -> the list of the codes that its averaged decoder is given from now on."""
    def start(model):
        seen = []

        def note(module, inputs):
            seen.append(inputs[0])

        model.averaged_decoder.register_forward_pre_hook(note)
        return seen
    return start


def test_codes_and_samples_by_flag(decoded):
    """Else --clamp or --draw_code does nothing, or is always on."""
    model = make().eval()
    x = torch.rand(2, 3, 16, 16)
    mean, log_var = model.encoder(x)
    assert torch.equal(model.encode(x), mean)
    assert torch.equal(seeded(model.encode, x, draw=True), seeded(sample_code, mean, log_var))
    seen = decoded(model)
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


def test_interpolation_mixing_editing(decoded):
    """Else figures are of other codes than those that are told.

    The ends of a line are the two reconstructions; mixing takes half of the dimensions, the same
    for all pairs; editing adds multiples of the direction.
    """
    model = make().eval()
    x = noise_images(5)
    z = model.encode(x)
    seen = decoded(model)
    assert model.interpolate(x[:2], x[2:4], 5).shape == (2, 5, 3, 16, 16)
    line = seen[-1].view(2, 5, 6)
    torch.testing.assert_close(line[:, 0], z[:2])
    torch.testing.assert_close(line[:, 2], (z[:2] + z[2:4]) / 2)
    torch.testing.assert_close(line[:, -1], z[2:4])

    assert model.mix(x[:2], x[2:]).shape == (2, 3, 3, 16, 16)
    mixed = seen[-1].view(2, 3, 6)
    ours = model.encode(x[:2])
    theirs = model.encode(x[2:])
    from_theirs = mixed[0, 0] == theirs[0]
    assert from_theirs.sum() == 3
    for i in range(2):
        for j in range(3):
            assert torch.equal(mixed[i, j], torch.where(from_theirs, theirs[j], ours[i]))

    direction = torch.randn(6)
    assert model.edit(x, direction, [0, 0.5]).shape == (5, 2, 3, 16, 16)
    torch.testing.assert_close(seen[-1].view(5, 2, 6), torch.stack([z, z + 0.5 * direction], 1))


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
    labels = np.arange(60) % 3
    given = []

    def note(train, train_labels, test, test_labels):
        given.append((train, train_labels, test, test_labels))
        return 12.5, 0.5

    monkeypatch.setattr(dcvae, "linear_probe", note)
    cfg = Config(device="cpu", dtype="fp32", eval_images=eval_images)
    results = dcvae.probe(cfg, model, labelled(pixels, labels))
    assert results == {"probe_images": learned,
                       "probe_error_percent": 12.5, "probe_error_percent_ci95": 0.5,
                       "pixels_error_percent": 12.5, "pixels_error_percent_ci95": 0.5}
    x = as_batch(pixels)
    model.eval()
    for (train, train_labels, test, test_labels), features in zip(
            given, (model.encode(x), x.flatten(1))):
        torch.testing.assert_close(train, features[:learned], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(test, features[:tested], rtol=1e-4, atol=1e-4)
        assert train_labels.tolist() == labels[:learned].tolist()
        assert test_labels.tolist() == labels[:tested].tolist()


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
    (2, None, False), (16, [1], False), (16, [2, 7], True), (3, [0, 3, 3], True)])
def test_figures_of_small_sets_and_odd_labels(tmp_path, number, labels, edited):
    """Else a set with fewer test images than a sheet, with one class, or no class 1, fails.

    Mixing always has 8 x 8 pictures, editing is only where something differs.
    """
    pixels = noise_pixels(number)
    images = Images("few", 16, pixels, pixels, pixels, None, False)
    if labels is not None:
        images = labelled(pixels, np.resize(labels, number))
    model = make().eval()
    cfg = Config(device="cpu")
    dcvae.save_interpolations(cfg, model, images, tmp_path, 1)
    dcvae.save_mixing(cfg, model, images, tmp_path, 1)
    dcvae.save_editing(cfg, model, images, tmp_path, 1)
    for name in ("interpolations", "mixing"):
        assert pictures_on(tmp_path / name / "test.png", 16).shape[:2] == (8, 8)
    mixing = pictures_on(tmp_path / "mixing" / "test.png", 16)
    if number == 16:  # else images come again
        assert np.array_equal(mixing[1:, 0], pixels[:7])
        assert np.array_equal(mixing[0, 1:], pixels[7:14])
    assert (tmp_path / "editing").exists() == edited


def test_editing_takes_the_difference_of_mean_codes(tmp_path, monkeypatch):
    """Else the direction is of other images than 20 with the label and 20 without.

    The edited test images have it not.
    """
    pixels = noise_pixels(60)
    model = make().eval()
    given = []

    def edit(x, direction, amounts):
        given.append((x, direction, amounts))
        return torch.zeros(len(x), 7, 3, 16, 16)

    monkeypatch.setattr(model, "edit", edit)
    images = labelled(pixels, np.arange(60) % 2)
    dcvae.save_editing(Config(device="cpu"), model, images, tmp_path, 1)
    assert len(given) == 1
    x, direction, amounts = given[0]
    z = model.encode(as_batch(pixels))
    expected = z[1:40:2].mean(0) - z[0:40:2].mean(0)
    torch.testing.assert_close(direction, expected, rtol=1e-3, atol=1e-3)
    assert amounts == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert torch.equal(x, as_batch(pixels[0:16:2]))
