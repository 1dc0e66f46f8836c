"""dcvae.py against closed forms: layers, losses, queue, averages, the game, the latent space."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import dcvae
from common import Images, UserError, from_uint8, quantize, to_uint8
from conftest import count, seeded
from dcvae import (
    BLOCKS,
    DCVAE,
    Config,
    Decoder,
    Discriminator,
    DownBlock,
    Encoder,
    discriminator_gan,
    update_average,
    gaussian_kl,
    generator_gan,
    info_nce,
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still, and one seed for every test."""
    monkeypatch.setitem(dcvae.WIDTHS, "small", (8, 8))
    torch.manual_seed(0)


def make(shape=(3, 16, 16), **flags):
    return DCVAE(Config(**dict(small=True, latent=6, negatives=10) | flags), shape)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=1)


# ---- The backbone --------------------------------------------------------------------------------
def test_parameter_counts_are_those_of_the_released_code():
    """Latent 128, 32x32 RGB; heads only where the contrast is taken."""
    with torch.device("meta"):
        model = DCVAE(Config(contrast_layers="b1,b2,b3,b4,final"), (3, 32, 32))
        assert [count(part) for part in (model.decoder, model.encoder, model.discriminator)] == [
            4_405_251,
            1_086_464,
            1_063_445,
        ]
        assert count(DCVAE(Config(loss="vaegan"), (3, 32, 32)).discriminator) == 1_055_761
        assert count(DCVAE(Config(), (3, 32, 32)).discriminator) == 1_055_761 + 129 + 256 * 16


def test_xavier_where_it_reaches_in_the_release():
    """Convs of decoder and heads fill ±√(6 / (fan in + fan out)), wider than PyTorch's default."""
    model = make()
    for layer in (
        model.decoder.cells[1].conv1,
        model.decoder.cells[2].skips[0],
        model.decoder.leave[2],
        model.discriminator.heads["b1"][0],
    ):
        area = layer.weight[0, 0].numel()
        bound = (6 / (area * (layer.in_channels + layer.out_channels))) ** 0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 32), (3, 48), (1, 8)])
def test_shapes(channels, size):
    model = make((channels, size, size), contrast_layers="b1,b2,b3,b4,final")
    x = torch.rand(3, channels, size, size) * 2 - 1
    assert [len(model.discriminator.heads[name][2].weight[0]) for name in BLOCKS] == [
        (size // 2) ** 2
    ] + 3 * [(size // 4) ** 2]
    score, features = model.discriminator(x)
    assert score.shape == (3,) and {
        name: tuple(f.shape) for name, f in features.items()
    } == dict.fromkeys([*BLOCKS, "final"], (3, 16))
    assert [tuple(part.shape) for part in model.encoder(x)] == 2 * [(3, 6)]
    for images in (model.sample(2), model.reconstruct(x[:2])):
        assert (
            images.shape == (2, channels, size, size)
            and torch.equal(images, quantize(images))
            and images.abs().max() <= 1
        )


def test_sizes_that_do_not_double_three_times():
    with pytest.raises(UserError, match="size 20 is no multiple of 8"):
        make((3, 20, 20))


def test_decoder_is_the_released_graph():
    """Layer by layer as released: enlarge, then 1x1.

    The skip into cell 3 is cell 2's sum, the skip-1 contribution included.
    """
    net = Decoder(6, 8, 3, 32).eval()
    z, (c1, c2, c3) = torch.randn(2, 6), net.cells
    with torch.no_grad():

        def up(h, mode, times=2):
            return F.interpolate(h, scale_factor=times, mode=mode)

        h = net.enter[0](z).view(2, 8, 4, 4)
        skip1 = c1.conv1(up(h.relu(), "nearest"))
        h = c1.conv2(skip1.relu()) + c1.shortcut(up(h, "nearest"))
        skip2 = c2.conv1(up(h.relu(), "bilinear")) + c2.skips[0](up(skip1, "bilinear"))
        h = c2.conv2(skip2.relu()) + c2.shortcut(up(h, "bilinear"))
        inner = (
            c3.conv1(up(h.relu(), "nearest"))
            + c3.skips[0](up(skip1, "nearest", 4))
            + c3.skips[1](up(skip2, "nearest"))
        )
        h = c3.conv2(inner.relu())
        expected = net.leave[2](net.leave[0](h).relu()).tanh()
        torch.testing.assert_close(net(z), expected, rtol=1e-4, atol=1e-5)


def test_blocks_down_are_the_released_graph():
    """Block 1: no ReLU first, shortcut of the pooled image. Block 2: 1x1, then pool.

    Blocks 3 and 4: identity.
    """
    first, second, third = (
        DownBlock(3, 8, first=True, halve=True).eval(),
        DownBlock(8, 8, halve=True).eval(),
        DownBlock(8, 8).eval(),
    )
    x, pool = torch.randn(2, 3, 16, 16), lambda h: F.avg_pool2d(h, 2)
    with torch.no_grad():
        h = first(x)
        torch.testing.assert_close(
            h, pool(first.conv2(first.conv1(x).relu())) + first.shortcut(pool(x))
        )
        torch.testing.assert_close(
            second(h), pool(second.conv2(second.conv1(h.relu()).relu()) + second.shortcut(h))
        )
        torch.testing.assert_close(third(h), h + third.conv2(third.conv1(h.relu()).relu()))
        net, h = Encoder(3, 8, 6).eval(), x
        for block in net.blocks:
            h = block(h)
        torch.testing.assert_close(
            torch.cat(net(x), 1), 64 * h.relu().mean((2, 3)) @ net.linear.weight.T
        )


@pytest.mark.parametrize("size", [32, 48, 96])
def test_codes_start_within_bounds(size):
    """log σ² of untrained encoders is below its bound at any size.

    At 32 pixels the pooling is the released sum over 8x8.
    """
    log_var = make((3, size, size)).encoder(torch.rand(8, 3, size, size) * 2 - 1)[1]
    assert log_var.max() < 20
    assert make((3, size, size)).encoder(1e6 * torch.randn(8, 3, size, size))[1].max() == 20
    h = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(dcvae.pool(h), h.relu().sum((2, 3)))


def test_features_are_pooled_over_the_map():
    """ReLU, 64 times the mean over positions, l5 without bias:

    16 values, from which the score is one more linear layer.
    """
    net, x, h = Discriminator(3, 8, 16, ("b1",)).eval(), torch.randn(2, 3, 16, 16), None
    with torch.no_grad():
        h = x
        for block in net.blocks:
            h = block(h)
        score, features = net(x)
        torch.testing.assert_close(
            features["final"], 64 * h.relu().mean((2, 3)) @ net.linear.weight.T
        )
        torch.testing.assert_close(
            score, (features["final"] @ net.score.weight.T + net.score.bias).squeeze(1)
        )
        map1 = net.blocks[0](x)
        torch.testing.assert_close(
            features["b1"], net.heads["b1"][0](map1).flatten(1) @ net.heads["b1"][2].weight.T
        )


def test_batch_of_d_is_no_matter():
    """Scores of images together are those of each alone, so real and fake images can share one
    forward pass.
    """
    model, x = make().eval(), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        together, alone = model.discriminator(x)[0], torch.cat(
            [model.discriminator(one)[0] for one in x.split(1)]
        )
    torch.testing.assert_close(together, alone)


# ---- Losses --------------------------------------------------------------------------------------
def test_kl_against_torch():
    mean, log_var = torch.randn(4, 6), torch.randn(4, 6)
    q, p = (
        Independent(Normal(m, s), 1)
        for m, s in ((mean, (log_var / 2).exp()), (torch.zeros(4, 6), torch.ones(4, 6)))
    )
    torch.testing.assert_close(gaussian_kl(mean, log_var).sum(1), kl_divergence(q, p))


def test_info_nce_is_the_softmax_over_explicit_pairs():
    """Eq. (6) by loops, cosine similarity over the temperature.

    Lengths of the query do not matter, those of keys are 1.
    """
    query, positive, negatives = 3 * torch.randn(3, 5), unit(3, 5), unit(7, 5)
    query[0] = 2 * positive[0]  # one hit
    loss, hit = info_nce(query, positive, negatives, 0.2)
    for i in range(3):

        def cosine(key):
            return (query[i] @ key / query[i].norm() / key.norm()).item()

        right, wrong = math.exp(cosine(positive[i]) / 0.2), [
            math.exp(cosine(key) / 0.2) for key in negatives
        ]
        assert loss[i].item() == pytest.approx(-math.log(right / (right + sum(wrong))), rel=1e-5)
        assert hit[i].item() == (right > max(wrong)) and (i or hit[0] == 1)
    loss, _ = info_nce(
        torch.randn(5, 4), torch.ones(5, 4) / 2, torch.ones(9, 4) / 2, 0.07
    )  # all keys alike: a guess among 10
    torch.testing.assert_close(loss, torch.full((5,), math.log(10)))


def test_info_nce_is_fp32_under_autocast():
    query, positive, negatives = torch.randn(4, 16), unit(4, 16), unit(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            info_nce(query, positive, negatives, 0.07)[0],
            info_nce(query, positive, negatives, 0.07)[0].float(),
        )
        inside = info_nce(query, positive, negatives, 0.07)[0]
    assert torch.equal(inside, info_nce(query, positive, negatives, 0.07)[0])
    half = query.bfloat16()
    assert torch.equal(
        info_nce(half, positive, negatives, 0.07)[0],
        info_nce(half.float(), positive, negatives, 0.07)[0],
    )


def test_gan_losses_by_hand():
    real, reconstructed, sampled = (
        torch.tensor([2.0, 0.5]),
        torch.tensor([-3.0, 0.5]),
        torch.tensor([0.0, -0.5]),
    )
    assert discriminator_gan("hinge", real, reconstructed, sampled).tolist() == [
        0 + 0 + 0.5,
        0.5 + 0.5 * 1.5 + 0.5 * 0.5,
    ]
    assert generator_gan("hinge", reconstructed, sampled).tolist() == [1.5 + 0.125, -0.25 + 0.125]
    D = torch.sigmoid
    eq4 = D(real).log() + (1 - D(sampled)).log() + (1 - D(reconstructed)).log()
    torch.testing.assert_close(discriminator_gan("log", real, reconstructed, sampled), -eq4)
    torch.testing.assert_close(
        generator_gan("log", reconstructed, sampled).mean(), (eq4 - D(real).log()).mean()
    )


LOSSES = {
    "vae": {"pixel", "kl"},
    "vaegan": {"feature", "gan", "kl"},
    "contrastive": {"contrast", "kl"},
    "dcvae": {"contrast", "gan", "kl"},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gan", ["hinge", "log"])
def test_terms_of_the_four_losses(loss, gan):
    """Eqs. 1, 3-5, 8, 9; every term reaches encoder and decoder.

    D's own terms reach neither, and all of D that is in use.
    """
    model, x = make(loss=loss, gan=gan), torch.rand(4, 3, 16, 16) * 2 - 1
    where, keys = model.encode_keys(x) if model.contrastive else (None, None)
    terms = model.terms(x, where, keys)
    assert terms.keys() == LOSSES[loss] and all(value.shape == (4,) for value in terms.values())
    creators = [
        model.encoder.linear.parametrizations.weight.original,
        model.decoder.enter[0].weight,
    ]
    for name, value in terms.items():
        grads = torch.autograd.grad(value.sum(), creators, retain_graph=True, allow_unused=True)
        assert grads[0].abs().sum() > 0 and (name == "kl" or grads[1].abs().sum() > 0)
    if loss == "vae":
        assert model.discriminator is None
        return
    terms = model.discriminator_terms(x, where, keys)
    assert ("d_gan" in terms, "d_contrast" in terms) == (model.adversarial, model.contrastive)
    total = sum(terms[name].sum() for name in terms.keys() & model.weights.keys())
    total.backward()
    assert all(p.grad is None for part in (model.encoder, model.decoder) for p in part.parameters())
    assert all(
        p.grad is not None
        for name, p in model.discriminator.named_parameters()
        if model.adversarial or not name.startswith("score")
    )


def test_vae_loss_is_minus_the_elbo():
    """With p(x|z) = N(x̂, ½) and the KL's weight 1: -ELBO less D/2 log π."""
    model, x = make(loss="vae", latent=3), torch.rand(2, 3, 16, 16) * 2 - 1
    assert model.cfg.kl_weight == 1 and Config().kl_weight == 6.4e-5
    terms = seeded(model.terms, x)
    mean, log_var = model.eval().encoder(x)
    model.train()
    z = mean + (log_var / 2).exp() * seeded(torch.randn_like, mean)
    with torch.no_grad():
        log_p = Normal(model.decoder(z), 0.5**0.5).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(
        terms["pixel"] + 3 * 16 * 16 / 2 * math.log(math.pi), -log_p, rtol=1e-3, atol=1e-2
    )
    kl = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-3, atol=1e-2)


def codes(model, x, samples):
    """Codes of x as drawn from seed 1, then those of `samples` images -> (B + samples, L)."""
    mean, log_var = model.encoder(x)
    torch.manual_seed(1)
    return torch.cat([mean + (log_var / 2).exp() * torch.randn_like(mean), torch.randn(samples, 6)])


def test_terms_against_parts():
    """dcvae's terms from the parts:

    contrast of reconstructions only, gan of reconstructions and of twice as many samples.
    """
    model, x = make().eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    where, keys = model.encode_keys(x)
    terms = seeded(model.terms, x, where, keys)
    with torch.no_grad():
        scores, features = model.discriminator(model.decoder(codes(model, x, 6)))
        torch.testing.assert_close(terms["gan"], -0.5 * scores[:3] - 0.5 * scores[3:].mean())
        nce = [
            info_nce(features[name][:3], keys[name], model.queue[name], 0.07)[0]
            for name in ("b1", "final")
        ]
        torch.testing.assert_close(terms["contrast"], (nce[0] + nce[1]) / 2)
        torch.testing.assert_close(
            terms["kl"], gaussian_kl(*model.encoder(x)).sum(1)
        )  # its weight comes later, in train


def test_feature_distance_is_that_of_the_reconstructions():
    """Eq. (3): the squared distance of D's 16 last features, x against x̂, sum_over_processes."""
    model, x = make(loss="vaegan").eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        terms = seeded(model.terms, x)

        def final(images):
            return model.discriminator(images)[1]["final"]

        torch.testing.assert_close(
            terms["feature"], (final(x) - final(model.decoder(codes(model, x, 0)))).square().sum(1)
        )


def test_discriminator_terms_against_parts():
    """Real images, reconstructions and samples in this order.

    The contrast's queries are the reconstructions.
    """
    model, x = make().eval(), torch.rand(3, 3, 16, 16) * 2 - 1
    where, keys = model.encode_keys(x)
    terms = seeded(model.discriminator_terms, x, where, keys)
    with torch.no_grad():
        fakes = model.decoder(codes(model, x, 3))
        for name, images in (("real", x), ("reconstructed", fakes[:3]), ("sampled", fakes[3:])):
            torch.testing.assert_close(terms[name], model.discriminator(images)[0])
        torch.testing.assert_close(
            terms["d_gan"],
            discriminator_gan("hinge", terms["real"], terms["reconstructed"], terms["sampled"]),
        )
        features = model.discriminator(fakes[:3])[1]
        pairs = [
            info_nce(features[name], keys[name], model.queue[name], 0.07)
            for name in ("b1", "final")
        ]
        torch.testing.assert_close(terms["d_contrast"], (pairs[0][0] + pairs[1][0]) / 2)
        torch.testing.assert_close(terms["accuracy"], (pairs[0][1] + pairs[1][1]) / 2)


def test_optimal_critic_of_remark_1():
    """Eq. 7 over all (x_1, x_2), i, z of a small discrete model:

    log p(x|z) - log p(x) is optimal, plus any c(z), but not plus a c(x).
    """
    joint = torch.tensor([[0.30, 0.05], [0.10, 0.15], [0.05, 0.35]], dtype=torch.float64)  # p(x, z)
    p_x, q = joint.sum(1), joint / joint.sum(1, keepdim=True)  # q(z|x)

    def i_nce(h):
        return sum(
            p_x[a]
            * p_x[b]
            * q[a, z]
            * (torch.logsumexp(torch.stack([h[a, z], h[b, z]]), 0) - h[a, z])
            for a in range(3)
            for b in range(3)
            for z in range(2)
        )

    h = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([h], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = i_nce(h)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = (joint / joint.sum(0)).log() - p_x.log()[:, None]  # log p(x|z) - log p(x)
    torch.testing.assert_close(h.detach() - h.detach()[0], best - best[0], rtol=1e-4, atol=1e-4)
    assert i_nce(best + torch.tensor([1.0, -2.0])).item() == pytest.approx(
        i_nce(best).item(), abs=1e-12
    )
    assert (
        i_nce(best + p_x.log()[:, None]) > i_nce(best) + 1e-3
    )  # log p(x|z) itself, that is c(x) = 0


# ---- Queue, averages, patches
@pytest.mark.parametrize("negatives, batch", [(10, 4), (10, 10), (6, 4), (3, 4), (8096, 4)])
def test_queue_keeps_the_newest(negatives, batch):
    """First in, first out, across the end of the buffer, also where the batch does not divide it or
    is larger.
    """
    model, keys = make(negatives=negatives), [unit(batch, 16) for _ in range(7)]
    start = model.queue["final"].clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(negatives))
    for key in keys:
        model.enqueue({"b1": key, "final": key})
    everything = torch.cat([start, *keys])[-negatives:]
    oldest_first = torch.cat([model.queue["final"], model.queue["final"]])[model.queued :][
        :negatives
    ]
    assert torch.equal(oldest_first, everything)


def test_keys_come_from_the_momentum_network_after_it_moved():
    model, x = make(momentum=0.75), torch.rand(2, 3, 16, 16)
    slow, fast = (
        part.linear.parametrizations.weight
        for part in (model.momentum_discriminator, model.discriminator)
    )
    with torch.no_grad():
        fast.original.add_(1)
    expected = 0.75 * slow.original + 0.25 * fast.original
    torch.manual_seed(0)
    _, keys = model.encode_keys(x)
    torch.testing.assert_close(slow.original.data, expected.data)
    with torch.no_grad():
        features = model.momentum_discriminator.eval()(x)[1]
    for name in ("b1", "final"):
        torch.testing.assert_close(
            keys[name], F.normalize(features[name], dim=1), rtol=1e-2, atol=1e-2
        )  # one power iteration apart
        assert not keys[name].requires_grad


def test_average_follows_parameters_and_batch_statistics():
    model = make()
    average, net = model.averaged_decoder, model.decoder
    with torch.no_grad():
        net.enter[0].weight.fill_(1), average.enter[0].weight.fill_(0)
        net.leave[0].running_mean.fill_(4), net.leave[0].running_var.fill_(3), net.leave[
            0
        ].num_batches_tracked.fill_(7)
    update_average(average, net, 0.75)
    assert (average.enter[0].weight == 0.25).all()
    assert (average.leave[0].running_mean == 1).all() and (
        average.leave[0].running_var == 1.5
    ).all()
    assert average.leave[0].num_batches_tracked == 7
    update_average(average, net, 0)  # --ema 0: the decoder itself
    assert all(
        torch.equal(a, b) for a, b in zip(average.state_dict().values(), net.state_dict().values())
    )
    assert model.train().averaged_decoder.training is False


def test_figures_show_the_averaged_decoder():
    model = make()
    with torch.no_grad():
        model.averaged_decoder.leave[2].weight.zero_(), model.averaged_decoder.leave[2].bias.fill_(
            0.5
        )
    assert torch.equal(model.sample(2), quantize(torch.full((2, 3, 16, 16), math.tanh(0.5))))


def test_patches_are_one_place_of_each_block():
    """The same place in query and key, one for each layer, all channels."""
    model, x = make(patch_after=0), torch.rand(2, 3, 16, 16)
    assert model.queue.keys() == {"b1", "final", "patch_b1", "patch_b2", "patch_b3", "patch_b4"}
    where, keys = model.encode_keys(x, patches=True)
    assert keys.keys() == model.queue.keys() and model.encode_keys(x)[1].keys() == {"b1", "final"}
    model.eval()
    with torch.no_grad():
        features, h = model.discriminator(x, where)[1], x
        for i, block in enumerate(model.discriminator.blocks):
            h = block(h)
            row, column = (where[i] * h.shape[2]).long().tolist()
            torch.testing.assert_close(features[f"patch_b{i + 1}"], h[:, :, row, column])
        both = model.contrast(features, keys)[0]

        def nce(name):
            return info_nce(features[name], keys[name], model.queue[name], 0.07)[0]

        torch.testing.assert_close(
            both,
            (nce("b1") + nce("final")) / 2 + sum(nce(f"patch_{block}") for block in BLOCKS) / 4,
        )
        assert len(model.terms(x, where, keys)) == 3
        for corner in (0.0, 1 - 2**-24):  # the first and the last place exist
            model.discriminator(x, torch.full((4, 2), corner))


def test_layers_that_do_not_exist():
    for layers in ("b5", "b1,,final", "b1,b1", ""):
        with pytest.raises(UserError, match="--contrast_layers"):
            make(contrast_layers=layers)


# ---- The game ------------------------------------------------------------------------------------
def play(tmp_path, steps=1, model=None, **flags):
    """`steps` of training on 40 random images -> model before and after."""
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    data = Images("noise", 16, images[:32], images[32:], images[32:], None, False)
    short = dict(
        small=True,
        latent=6,
        negatives=10,
        batch_size=4,
        steps=steps,
        device="cpu",
        dtype="fp32",
        lr=1e-3,
    )
    cfg = Config(**short | flags)
    model = model or DCVAE(cfg, (3, 16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dcvae.train(cfg, model, data, tmp_path, None)
    return before, model


def moved(before, model, part):
    """Whether a parameter of this part of the model has changed."""
    for name, p in getattr(model, part).named_parameters():
        if not torch.equal(before[f"{part}.{name}"], p):
            return True
    return False


@pytest.mark.parametrize("still", ["critics", "creators"])
def test_each_player_moves_by_its_own_losses(tmp_path, still):
    """With the losses of one player weighed by 0, that one stands still and the other moves."""
    model = make(lr=1e-3)
    for name in ("d_gan", "d_contrast") if still == "critics" else ("contrast", "gan", "kl"):
        model.weights[name] = 0
    before, model = play(tmp_path, model=model)
    assert moved(before, model, "discriminator") == (still == "creators")
    assert moved(before, model, "encoder") == (still == "critics")
    assert moved(before, model, "decoder") == (still == "critics")


def watched(model):
    """A list that fills with the calls of the model: (critic, x, whether keys were given)."""
    calls = []
    forward = model.forward

    def watch(x, where=None, keys=None, critic=False):
        calls.append((critic, x, keys is not None))
        return forward(x, where, keys, critic)

    model.forward = watch
    return calls


def test_a_step_is_d_steps_updates_of_d_and_one_of_the_rest(tmp_path):
    """Batches of D are its own, the last has keys; the rest shares the last, which is queued."""
    model = make()
    calls = watched(model)
    play(tmp_path, model=model, d_steps=3)
    assert [critic for critic, _, _ in calls[:4]] == [True, True, True, False]
    assert [with_keys for _, _, with_keys in calls[:4]] == [False, False, True, True]
    first_pixels = [x[0, 0, 0, 0].item() for _, x, _ in calls[:4]]
    assert len(set(first_pixels[:3])) == 3 and first_pixels[2] == first_pixels[3]
    assert model.queued == 4


def test_vae_learns(tmp_path):
    """Sixty steps on 32 images: the loss falls, the logged terms are those of the loss."""
    play(tmp_path, 60, loss="vae", lr=3e-3, log_every=10)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"train"' in line]
    assert rows[0].keys() == {"step", "split", "seconds", "pixel", "kl"}
    assert rows[-1]["pixel"] + rows[-1]["kl"] < 0.8 * (rows[0]["pixel"] + rows[0]["kl"])


def test_discriminator_lowers_the_contrast():
    """D alone, decoder fixed: its contrast falls (with Eq. 9's max over D it would rise)."""
    model, x = make(loss="contrastive", negatives=56), torch.rand(64, 3, 16, 16) * 2 - 1
    model.enqueue(model.encode_keys(x[8:])[1])
    x = x[:8]
    _, keys = model.encode_keys(x)
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        loss = seeded(model.discriminator_terms, x, None, keys)["d_contrast"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.3


def largest_singular_values(layers):
    """Of every layer's weight as it is used."""
    values = []
    for layer in layers:
        weight = layer.weight.detach().flatten(1)
        values.append(torch.linalg.matrix_norm(weight, 2).item())
    return values


def test_spectral_norms(tmp_path):
    """Largest singular values of all 11 + 12 layers, and of D's average, after some steps.

    They are 1 once power iterations, one a forward pass, have caught up with the updates.
    """
    _, model = play(tmp_path, 20, d_steps=2)
    layers = []
    for part in (model.encoder, model.discriminator, model.momentum_discriminator):
        layers += [module for module in part.modules() if hasattr(module, "parametrizations")]
    assert len(layers) == 11 + 12 + 12
    model.train()
    for _ in range(300):
        for layer in layers:
            layer.weight  # noqa: B018 (a power iteration)
    model.eval()
    norms = largest_singular_values(layers)
    assert max(norms) <= 1.01 and min(norms) >= 0.99


# ---- Latent space --------------------------------------------------------------------------------


def test_codes_and_samples_by_flag():
    model, x = make().eval(), torch.rand(2, 3, 16, 16)
    assert torch.equal(model.encode(x), model.encoder(x)[0]) and not torch.equal(
        model.encode(x, draw=True), model.encode(x)
    )
    seen = []
    model.averaged_decoder.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    seeded(model.sample, 500)
    model.cfg.clamp = True
    seeded(model.sample, 500)
    assert seen[0].abs().max() > 2 and torch.equal(seen[1], seen[0].clamp(-1, 1))
    model.cfg.draw_code = True
    model.reconstruct(x)
    assert not torch.equal(seen[2], model.encode(x))


def test_interpolation_mixing_editing():
    model, x = make().eval(), torch.rand(5, 3, 16, 16) * 2 - 1
    line = model.interpolate(x[:2], x[2:4], 5)
    assert line.shape == (2, 5, 3, 16, 16)
    torch.testing.assert_close(
        line[:, 0], model.reconstruct(x[:2]), rtol=0, atol=2.1 / 255
    )  # a level may round the other way
    torch.testing.assert_close(line[:, -1], model.reconstruct(x[2:4]), rtol=0, atol=2.1 / 255)
    seen = []
    model.averaged_decoder.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    assert model.mix(x[:2], x[2:]).shape == (2, 3, 3, 16, 16)
    z, ours, theirs = seen[0].view(2, 3, 6), model.encode(x[:2]), model.encode(x[2:])
    from_theirs = z[0, 0] == theirs[0]
    assert from_theirs.sum() == 3
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(z[i, j], torch.where(from_theirs, theirs[j], ours[i]))
    direction = torch.randn(6)
    assert model.edit(x, direction, [0, 0.5]).shape == (5, 2, 3, 16, 16)
    torch.testing.assert_close(
        seen[-1].view(5, 2, 6), torch.stack([model.encode(x), model.encode(x) + 0.5 * direction], 1)
    )


def test_label_values():
    """A column; a value that no training image has is a mistake, that no test image has is not."""
    labels = {"train": np.array([[0, 5], [2, 5], [2, 6]], np.uint8)}
    labels["test"] = labels["train"][:2]
    images = Images("made", 16, None, None, None, labels, False)
    cfg = Config(label_column=1, label_value=6)
    assert dcvae.label_values(cfg, images, "train").tolist() == [5, 5, 6]
    assert dcvae.label_values(cfg, images, "test").tolist() == [5, 5]
    for flags, told in (
        (dict(label_column=2), "columns 0 to 1"),
        (dict(label_value=9), r"labels of made are \[0, 2\]"),
    ):
        with pytest.raises(UserError, match=told):
            dcvae.label_values(Config(**flags), images, "train")


@pytest.mark.parametrize("count, labels", [(2, None), (16, [1]), (16, [2, 7]), (3, [0, 3, 3])])
def test_figures_of_small_sets_and_odd_labels(tmp_path, count, labels):
    """Fewer test images than a sheet has, one class, no class 1.

    Mixing has 8 x 8 pictures, editing only where something differs.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    several = labels is not None and len(labels) > 1
    if labels is not None:
        values = np.resize(np.array(labels, np.uint8), count)
        labels = {"train": values, "test": values}
    model = make().eval()
    images = Images("few", 16, pictures, pictures, pictures, labels, False)
    for save in (dcvae.save_interpolations, dcvae.save_mixing, dcvae.save_editing):
        save(Config(device="cpu"), model, images, tmp_path)
    sheet = matplotlib.image.imread(tmp_path / "mixing" / "test.png")
    assert sheet.shape[:2] == (8 * 18 + 2, 8 * 18 + 2)
    assert (tmp_path / "interpolations" / "test.png").exists()
    assert (tmp_path / "editing").exists() == several


def test_editing_takes_the_difference_of_mean_codes(tmp_path, monkeypatch):
    """20 training images with the label, 20 without; the edited test images have it not."""
    pictures = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    values = np.arange(60, dtype=np.uint8) % 2
    labels = {"train": values, "test": values}
    images = Images("two", 16, pictures, pictures, pictures, labels, False)
    model = make().eval()
    seen = []

    def edit(x, direction, amounts):
        seen.append((x, direction, amounts))
        return torch.zeros(len(x), 7, 3, 16, 16)

    monkeypatch.setattr(model, "edit", edit)
    dcvae.save_editing(Config(device="cpu"), model, images, tmp_path)
    x, direction, amounts = seen[0]
    all_images = from_uint8(torch.from_numpy(pictures)).permute(0, 3, 1, 2)
    expected = model.encode(all_images[1:40:2]).mean(0) - model.encode(all_images[0:40:2]).mean(0)
    torch.testing.assert_close(direction, expected, rtol=1e-3, atol=1e-3)
    assert amounts == [0, 0.5, 1, 1.5, 2, 2.5, 3] and torch.equal(x, all_images[0:16:2])


def test_fewer_images_than_a_step_wants(tmp_path):
    """32 training images, five batches of 64: five of 6."""
    model = make()
    calls = watched(model)
    play(tmp_path, model=model, d_steps=5, batch_size=64)
    assert [len(x) for critic, x, _ in calls if critic] == 5 * [6]


def test_adam_and_images_as_released(tmp_path, monkeypatch):
    """2e-4 and (0, 0.9); images as they are, neither flipped nor shifted."""
    model = make()
    calls = watched(model)
    given = []
    Adam = torch.optim.Adam

    def adam(parameters, **options):
        given.append(options)
        return Adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", adam)
    play(tmp_path, model=model, lr=Config().lr)
    assert given == [dict(lr=2e-4, betas=(0.0, 0.9))]
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    known = {picture.tobytes() for picture in pictures}
    for _, x, _ in calls:
        for image in to_uint8(x).permute(0, 2, 3, 1):
            assert image.numpy().tobytes() in known


def test_patches_do_not_wait_for_the_device():
    """An index with one element is a gather; a number would be read on the host, in every block."""
    model, x = make(patch_after=0), torch.rand(2, 3, 16, 16)
    feature = model.discriminator(x, torch.rand(4, 2))[1]["patch_b2"]
    assert "Index" in str(feature.grad_fn.next_functions[0][0])


def test_average_of_the_first_step_is_of_that_step(tmp_path):
    """Decay min(--ema, 1/10) at step 1: nine tenths of the way; with --ema 0 all of it."""
    for ema, share in ((0.999, 0.9), (0, 1)):
        model = make(lr=1e-3, ema=ema)
        before, model = play(tmp_path, model=model, ema=ema)
        start, now = before["decoder.enter.0.weight"], model.decoder.enter[0].weight.detach()
        torch.testing.assert_close(
            model.averaged_decoder.enter[0].weight - start,
            share * (now - start),
            rtol=1e-2,
            atol=1e-6,
        )
