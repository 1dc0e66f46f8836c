"""DC-VAE, with its ablations VAE, VAE/GAN and VAE-Contrastive on one backbone (Parmar et al. 2021).

    generative model   z ~ N(0, 1), x̃ = decoder(z); p(x|z) = N(decoder(z), ½) for --loss vae only
    inference model    q(z|x) = N(μ(x), σ²(x)), x̂ = decoder(z) for z ~ q(z|x); in figures and
                       evaluation z = μ(x)
    losses             --loss vae          pixel + kl            Eq. (1)
                       --loss vaegan       feature + gan + kl    Eqs. (3) to (5)
                       --loss contrastive  contrast + kl         Eqs. (6), (8)
                       --loss dcvae        contrast + gan + kl   Eq. (9)

Encoder and decoder minimise these losses. The weight of kl is 6.4e-5, and 1 in vae (--kl_weight).
The discriminator D plays against them in gan, and minimises the contrast together with them.

    python dcvae.py --small --steps 400                built-in shapes, minutes on one CPU core
    python dcvae.py --dataset cifar10 --fid 50000      the paper's size, for a GPU: FID 17.9 in the
                                                       paper's Table 1
    python dcvae.py --dataset mnist --latent 16        representation: a linear classifier has
                                                       1.30 % errors in the paper's Table 6

Paper: arXiv:2011.10063. "Released" refers to its authors' code.
Derivation, logged terms, differences from the paper: docs/dcvae.md. Results: docs/results.md.

    B batch · C, H, W channels, height, width of x · L latent dimensions · K negatives
    x, x̂, x̃ (B, C, H, W) image, reconstruction, sample in [-1, 1] · z (B, L) latent
    score (B,) of D, larger for what looks real; D(x) of Eq. (4) is its sigmoid
    features {layer: (B, d)} of D, the paper's F_D
    keys {layer: (B, d)} features of real images in a slow average of D, scaled to length 1
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached

from common import (
    DATASETS, INCEPTION_URL, VGG_URL, Batches, InceptionFeatures, UserError, VGGFeatures, barrier,
    choose_device, cost_of, draw_curves, evaluation_batches, feature_statistics, gather_batch,
    inception_metrics, linear_probe, load_images, load_network, log_row, log_training,
    path_length_metrics, perceptual_distance, pixel_distance, processes, progress, quantize,
    reference_statistics, require_finite, sample_batches, save_sheet, seed_noise, to_json, to_uint8,
    write_results)


# ---- The model -----------------------------------------------------------------------------------

class DCVAE(nn.Module):
    """The networks of --loss for images of shape (C, H, W); H = W is a side --backbone allows."""

    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        self.cfg = cfg
        self.size = size
        self.adversarial = cfg.loss in ("vaegan", "dcvae")
        self.contrastive = cfg.loss in ("contrastive", "dcvae")
        # Weights of the terms in a player's loss. A term without a weight is only logged.
        self.weights = {"pixel": 1, "feature": 1, "contrast": 1, "gan": 1, "kl": cfg.kl_weight,
                        "d_gan": 1, "d_penalty": 10, "d_contrast": 1}
        # NOTE(paper): A.5 takes the contrast at the second block and the last features. The release
        # trains with the first block, which is also the default here at 32x32.
        self.layers = parse_layers(cfg) if self.contrastive else ()
        self.encoder, self.decoder, self.discriminator = networks(cfg, channels, size, self.layers)
        if cfg.loss == "vae":
            self.discriminator = None
        self.averaged_decoder = copy.deepcopy(self.decoder).requires_grad_(False)
        if self.contrastive:
            # Keys come from a slow average of D, so that older keys in the queue are comparable to
            # new ones (He et al. 2020). At first the queue holds random directions. If an image
            # comes again while its old key is queued, it is its own negative, as in the release.
            self.momentum_discriminator = copy.deepcopy(self.discriminator).requires_grad_(False)
            lengths = dict.fromkeys(self.layers, FEATURE_DIM)
            if cfg.patch_after is not None:
                for name in BLOCKS:
                    lengths[f"patch_{name}"] = self.discriminator.linear.in_features
            # Frozen parameters, because DDP would broadcast buffers before every pass.
            self.queue = nn.ParameterDict()
            for name, d in lengths.items():
                self.queue[name] = F.normalize(torch.randn(cfg.negatives, d), dim=1)
            self.queue.requires_grad_(False)
            self.register_buffer("queued", torch.tensor(0))  # modulo K: the row of the oldest key
        self.grow(size, 1.0)

    # -- losses ------------------------------------------------------------------------------------

    def autoencoder_terms(self, x, where, keys):
        """What encoder and decoder minimise: x (B, C, H, W) -> {name: (B,)}, not yet weighted.

        The contrast needs the `keys` of x, and for patches the places `where` they were taken.
        Otherwise these are None. The gan has B reconstructions and 2B samples, as released.
        """
        mean, log_var = self.encoder(x)
        z = sample_code(mean, log_var)
        kl = gaussian_kl(mean, log_var).sum(1)
        if self.cfg.loss == "vae":  # Eq. (1): -log N(x; x̂, ½) without its constant
            return {"pixel": (x - self.decoder(z)).square().sum((1, 2, 3)), "kl": kl}

        if self.adversarial:
            z = torch.cat([z, torch.randn(2 * len(x), z.shape[1], device=x.device)])
        fakes = self.decoder(z)  # x̂, then x̃: one batch, so batch norm has the same statistics
        scores, features = self.discriminator(fakes, where)
        terms = {}
        if self.cfg.loss == "vaegan":  # Eq. (3)
            with torch.no_grad():
                _, real_features = self.discriminator(x)
            # NOTE(paper): in Eq. (5) D also maximises the feature distance. It would drive F(x) and
            # F(x̂) apart however similar x and x̂ look. Here D plays in gan only.
            difference = real_features["final"].float() - features["final"][:len(x)].float()
            terms["feature"] = difference.square().sum(1)
        if self.contrastive:  # Eqs. (6), (8)
            terms["contrast"], _ = self.contrast(features, keys)
        if self.adversarial:  # Eq. (4)
            terms["gan"] = autoencoder_gan(self.cfg.gan, scores[:len(x)], scores[len(x):])
        terms["kl"] = kl
        return terms

    def discriminator_terms(self, x, where, keys):
        """What D minimises, and how well D does: x (B, C, H, W) -> {name: (B,)}, not yet weighted.

            real, reconstructed, sampled    for gan: scores of x, x̂, x̃, only logged
            d_gan                           for gan, with B reconstructions and B samples
            d_penalty                       for --gan wgan, between x and, at random, x̂ or x̃
            d_contrast                      if keys are given
            accuracy                        of the contrast, only logged
        """
        with torch.no_grad():  # neither encoder nor decoder learns here
            z = sample_code(*self.encoder(x))
            if self.adversarial:
                z = torch.cat([z, torch.randn_like(z)])
            fakes = self.decoder(z)  # x̂, then x̃
        seen = torch.cat([fakes, x]) if self.adversarial else fakes
        scores, features = self.discriminator(seen, where)
        terms = {}
        if self.adversarial:
            reconstructed, sampled, real = scores.chunk(3)
            terms = {"real": real, "reconstructed": reconstructed, "sampled": sampled,
                     "d_gan": discriminator_gan(self.cfg.gan, real, reconstructed, sampled)}
            if self.cfg.gan == "wgan":
                x_hat, x_tilde = fakes.chunk(2)
                coin = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
                fake = torch.where(coin, x_hat, x_tilde)
                terms["d_penalty"] = gradient_penalty(self.discriminator, x, fake)
        if keys is not None:
            # NOTE(paper): in Eq. (9) D also maximises the contrast. But the optimal critic of
            # Remark 1, which recognises x, minimises it, and so does D here.
            terms["d_contrast"], terms["accuracy"] = self.contrast(features, keys)
        return terms

    def forward(self, x, where=None, keys=None, player="autoencoder"):
        """The terms of one player. torch.compile and DDP see the model through this method only."""
        if player == "discriminator":
            return self.discriminator_terms(x, where, keys)
        return self.autoencoder_terms(x, where, keys)

    def contrast(self, features, keys):
        """InfoNCE of reconstructions against `keys` {layer: (B, d)} of their originals.

        The first B rows of `features` belong to the reconstructions. -> nats and hits, (B,) each,
        averaged over --contrast_layers. The nats also include the mean over patches (4.2). Eq. (7)
        is the average of these nats over images and z.
        """
        nats = 0
        hits = 0
        for name, key in keys.items():
            query = features[name][:len(key)]
            cost, hit = info_nce(query, key, self.queue[name], self.cfg.temperature)
            if name in self.layers:
                nats = nats + cost / len(self.layers)
                hits = hits + hit / len(self.layers)
            else:
                nats = nats + cost / len(BLOCKS)
        return nats, hits

    @torch.no_grad()
    def encode_keys(self, x, where=None):
        """Keys of real images, from D's average: x (B, C, H, W) -> {layer: (B, d)}, of length 1.

        With `where` there are also keys of local patches.
        """
        _, features = self.momentum_discriminator(x, where)
        keys = {}
        for name in self.queue:
            if name in features:  # patches have queues from the start, but features only later
                keys[name] = F.normalize(features[name].float(), dim=1)
        return keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest negatives with the keys {layer: (B, d)} of all processes."""
        K = self.cfg.negatives
        for name, key in keys.items():
            key = gather_batch(key)[-K:]
            rows = (self.queued + torch.arange(len(key), device=key.device)) % K
            self.queue[name][rows] = key
        self.queued.add_(len(rows)).remainder_(K)  # rows are the same in every queue

    # -- images ------------------------------------------------------------------------------------

    def grow(self, side, alpha):
        """Set the side of growing networks, and the share `alpha` of their newest layers.

        AutoGAN's networks do not grow.
        """
        for network in self.modules():
            if isinstance(network, Growing):
                network.level = side.bit_length() - 3  # side = 4 · 2^level
                network.alpha = alpha

    @torch.no_grad()
    def decode(self, z):
        """z (…, L) -> images by the averaged decoder, enlarged to (…, C, H, W), on the grid."""
        x = F.interpolate(self.averaged_decoder(z.flatten(0, -2)), size=self.size)
        return quantize(x).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def encode(self, x, draw=False):
        """The mean of q(z|x), or with `draw` a sample from it: (B, C, H, W) -> (B, L)."""
        mean, log_var = self.encoder(x)
        return sample_code(mean, log_var) if draw else mean

    def sample(self, n):
        """z ~ N(0, 1), with --clamp limited to [-1, 1] -> (n, C, H, W), on the pixel grid."""
        z = torch.randn(n, self.cfg.latent, device=next(self.parameters()).device)
        return self.decode(z.clamp(-1, 1) if self.cfg.clamp else z)

    def reconstruct(self, x):
        """x̂ from the mean of q(z|x), or with --draw_code from a sample: (B, C, H, W) -> same."""
        return self.decode(self.encode(x, self.cfg.draw_code))

    def interpolate(self, x1, x2, count=8):
        """Images along the line between the codes of x1 and x2 (A.2): -> (B, count, C, H, W)."""
        direction = self.encode(x2) - self.encode(x1)
        return self.edit(x1, direction, [i / (count - 1) for i in range(count)])

    def mix(self, x1, x2):
        """Images of each x1's code, with half of its dimensions taken from each x2's (Figure 12).

        The half is random, but the same for all pairs. (B1, C, H, W), (B2, C, H, W) ->
        (B1, B2, C, H, W).
        """
        from_x2 = torch.randperm(self.cfg.latent, device=x1.device) < self.cfg.latent // 2
        z1 = self.encode(x1).unsqueeze(1)  # (B1, 1, L)
        z2 = self.encode(x2)  # (B2, L)
        return self.decode(torch.where(from_x2, z2, z1))

    def edit(self, x, direction, amounts):
        """Images of x's code plus each of `amounts` times `direction`, (L,) or (B, L) (A.2).

        x (B, C, H, W) -> (B, len(amounts), C, H, W).
        """
        z = self.encode(x)
        return self.decode(torch.stack([z + amount * direction for amount in amounts], 1))


# ---- Special to this model -----------------------------------------------------------------------
# Its losses, all fp32: KL, contrast, gan. pixel and feature are lines of autoencoder_terms.
# Then its game: a step, an update of one player, the moving averages.

def gaussian_kl(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, 1)) per dimension, ½ (μ² + σ² - 1 - log σ²): (B, L) in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def sample_code(mean, log_var):
    """z = μ + σε, ε ~ N(0, 1): (B, L) twice -> (B, L)."""
    return mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)


def info_nce(query, positive, negatives, temperature):
    """InfoNCE, Eq. (6): -log of the positive's share of Σ_j exp(cos(query, key_j)/τ), K + 1 keys.

    query (B, d); positive (B, d) and negatives (K, d), scaled to length 1 -> nats (B,), and hits
    (B,), 1 if the positive is nearest to the query, else 0. A blind guess costs log(1 + K) nats.
    """
    # Cosines are fp32, because bf16 would round them to 1/256.
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(query.float(), dim=1)
        similarity = (query * positive).sum(1)  # (B,)
        others = query @ negatives.T  # (B, K)
        # NOTE(paper): Eq. (6) has no temperature. Cosines lie between -1 and 1. Without temperature
        # the right one of 8097 keys could have a share of at most e/(e + 8096/e) ≈ e²/8096, and the
        # loss could not fall by more than 2 nats.
        logits = torch.cat([similarity.unsqueeze(1), others], 1) / temperature
        loss = torch.logsumexp(logits, 1) - logits[:, 0]
        return loss, (similarity > others.amax(1)).float()


def discriminator_gan(kind, real, reconstructed, sampled):
    """What D minimises: scores (B,) of real images, reconstructions, samples -> (B,).

    "log" is minus Eq. (4), where D(x) = σ(score). "wgan" does not include its gradient penalty.
    """
    if kind == "log":
        return F.softplus(-real) + F.softplus(sampled) + F.softplus(reconstructed)
    if kind == "wgan":  # the last term keeps all scores near 0
        return 0.5 * reconstructed + 0.5 * sampled - real + 1e-3 * real.square()
    # NOTE(paper): the release trains with hinge losses, as AutoGAN does, and gives both kinds of
    # fakes a weight of one half.
    return F.relu(1 - real) + 0.5 * F.relu(1 + sampled) + 0.5 * F.relu(1 + reconstructed)


def autoencoder_gan(kind, reconstructed, sampled):
    """What encoder and decoder minimise: scores of reconstructions (B,), of samples -> (B,).

    There may be any number of samples. "log" is Eq. (4) without log D(x), which encoder and decoder
    cannot change.
    """
    if kind == "log":
        return -F.softplus(reconstructed) - F.softplus(sampled).mean()
    # hinge and wgan are the same here.
    return -0.5 * reconstructed - 0.5 * sampled.mean()


def gradient_penalty(discriminator, real, fake):
    """(‖∇D(x̄)‖ - 1)² at a point x̄ between each real image and a fake: (B, C, H, W) twice -> (B,).

    It keeps D's slope near 1 (WGAN-GP, Gulrajani et al. 2017). It is fp32, because training takes
    second derivatives.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = torch.lerp(fake, real, share).requires_grad_()
    with torch.autocast(real.device.type, enabled=False):
        scores, _ = discriminator(between)
        gradient, = torch.autograd.grad(scores.sum(), between, create_graph=True)
    return (gradient.square().sum((1, 2, 3)).sqrt() - 1).square()


def train_step(cfg, model, player_terms, optimizer, batches, step):
    """Update D on each batch, then encoder and decoder on the last batch -> means of terms.

    `player_terms` is the model's forward pass, which may be compiled or parallel. There are
    --d_steps `batches`, but only one with --loss vae, which has no D. Only the last batch has a
    contrast: D's last update and that of encoder and decoder share its keys, and the terms are
    those of these two updates. D is frozen while encoder and decoder learn. Gradients then pass
    through D to the decoder, but D's own weights get none.
    """
    x = batches[-1]
    where = None
    keys = None
    means = {}
    if model.discriminator:
        for batch in batches[:-1]:
            update(cfg, model, player_terms, optimizer, "discriminator", batch)
        if model.contrastive:
            update_average(model.momentum_discriminator, model.discriminator, cfg.momentum)
            if cfg.patch_after is not None and step > cfg.patch_after:
                where = torch.rand(len(BLOCKS), 2, device=cfg.device)
            with autocast(cfg):
                keys = model.encode_keys(x, where)
        means |= update(cfg, model, player_terms, optimizer, "discriminator", x, where, keys)
        model.discriminator.requires_grad_(False)
    means |= update(cfg, model, player_terms, optimizer, "autoencoder", x, where, keys)
    if model.discriminator:
        model.discriminator.requires_grad_(True)
    if model.contrastive:
        model.enqueue(keys)
    # The decay grows with the step. Otherwise a short run's average would mostly be its random
    # start.
    decay = min(cfg.ema, step / (step + 9))
    update_average(model.averaged_decoder, model.decoder, decay)
    return means


def update(cfg, model, player_terms, optimizer, player, x, where=None, keys=None):
    """One step of Adam on the weighted sum of a player's terms -> their means.

    This follows Eqs. (5), (9), or the part of them that --loss has, except for the NOTEs on D.
    `player` is that of `DCVAE.forward`. The other player has no gradients, so Adam skips it.
    """
    with autocast(cfg):
        terms = player_terms(x, where, keys, player=player)
    loss = 0
    for name, values in terms.items():
        if name in model.weights:
            loss = loss + model.weights[name] * values.mean()
    optimizer.zero_grad()  # the other player's gradients too
    loss.backward()
    optimizer.step()
    return {name: values.detach().mean() for name, values in terms.items()}


@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay·average + (1 - decay)·model, of parameters and buffers.

    Batch norm's statistics and spectral norm's vectors are therefore averaged, too.
    """
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values()):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


# ---- Networks ------------------------------------------------------------------------------------
# AutoGAN's networks, for 32x32 and 48x48, come first. From FIRST_SIDE on: Progressive GAN's.

# Changed from vae.py: AutoGAN's
WIDTHS = {"full": (256, 128), "small": (32, 32)}  # channels of the decoder; of encoder and D


def networks(cfg, channels, size, layers):
    """Encoder, decoder and discriminator of --backbone."""
    if cfg.backbone == "progan":
        maps = feature_maps(cfg, size)
        return (GrowingEncoder(cfg.latent, channels, maps),
                GrowingDecoder(cfg.latent, channels, maps),
                GrowingDiscriminator(channels, maps, layers))
    decoder_width, width = WIDTHS["small" if cfg.small else "full"]
    return (Encoder(channels, width, cfg.latent),
            Decoder(cfg.latent, decoder_width, channels, size),
            Discriminator(channels, width, size, layers))


def parse_layers(cfg):
    """--contrast_layers as a tuple. UserError if one does not exist, or comes twice."""
    layers = tuple(cfg.contrast_layers.split(","))
    known = (*BLOCKS, "final") if cfg.backbone == "autogan" else ("b8", "final")
    if not set(layers) <= set(known) or len(set(layers)) < len(layers):
        raise UserError(f"--contrast_layers {cfg.contrast_layers}: take some of "
                        f"{','.join(known)}, each once, separated by commas")
    return layers


FEATURE_DIM = 16  # of features in the contrast (5.1), and of the last features in AutoGAN's D


BLOCKS = ("b1", "b2", "b3", "b4")


# Changed from vae.py: residual blocks with spectral norm, z is a vector
class Encoder(nn.Module):
    """q(z|x) = N(μ, σ²): x (B, C, H, W) -> μ and log σ² (B, L), fp32."""

    def __init__(self, channels, width, latent):
        super().__init__()
        self.blocks = down_blocks(channels, width)
        self.linear = spectral_norm(nn.Linear(width, 2 * latent, bias=False))

    def forward(self, x):
        return mean_and_log_var(self.linear(pool(self.blocks(x))))


def start_side(size):
    """Side of the decoder's first map, size / 8. UserError if `size` is no multiple of 8."""
    if size % 8:
        raise UserError(f"size {size} is no multiple of 8, as three doublings need: "
                        "take 32, 48 …")
    return size // 8


# Changed from vae.py: AutoGAN's generator
class Decoder(nn.Module):
    """z (B, L) -> image (B, C, size, size) in [-1, 1], fp32.

    It has one batch norm, before the last conv.
    """

    def __init__(self, latent, width, channels, size):
        super().__init__()
        side = start_side(size)
        self.enter = nn.Sequential(nn.Linear(latent, width * side**2),
                                   nn.Unflatten(1, (width, side, side)))
        self.cells = nn.ModuleList([  # as AutoGAN's search found
            UpCell(width, "nearest", earlier_cells=0),
            UpCell(width, "bilinear", earlier_cells=1),
            UpCell(width, "nearest", earlier_cells=2, shortcut=False)])
        self.leave = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(),
                                   nn.Conv2d(width, channels, 3, padding=1))
        self.apply(xavier)

    def forward(self, z):
        h = self.enter(z)
        skips = []
        for cell in self.cells:
            h, skip = cell(h, skips)
            skips.append(skip)
        return torch.tanh(self.leave(h).float())


class Discriminator(nn.Module):
    """Image (B, C, size, size) -> score (B,), > 0 for real, and features {layer: (B, d)}.

    The feature distance and the contrast compare features. `final` holds the 16 values that the
    score is computed from. Each block in `layers` has a head: a 1x1 conv to one channel, then a
    linear layer to 16 values (4.2, deep supervision). `where` (4, 2) gives a row and a column in
    [0, 1) for each block; patch_b1 … are the block's channels there (4.2, local patches).
    """

    def __init__(self, channels, width, size, layers):
        super().__init__()
        self.blocks = down_blocks(channels, width)
        self.linear = spectral_norm(nn.Linear(width, FEATURE_DIM, bias=False))
        self.score = spectral_norm(nn.Linear(FEATURE_DIM, 1))
        self.heads = nn.ModuleDict()
        for name in layers:
            if name in BLOCKS:
                side = size // 2 if name == "b1" else size // 4  # of the block's output
                self.heads[name] = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Flatten(),
                                                 nn.Linear(side**2, FEATURE_DIM, bias=False))
        self.heads.apply(xavier)

    def forward(self, x, where=None):
        features = {}
        h = x
        for i, (name, block) in enumerate(zip(BLOCKS, self.blocks)):
            h = block(h)
            if name in self.heads:
                features[name] = self.heads[name](h)
            if where is not None:
                # Indices of shape (1,), because for shape () the host would wait for the value.
                row, column = (where[i] * h.shape[2]).long().unsqueeze(1)
                features[f"patch_{name}"] = h[:, :, row, column].squeeze(2)
        features["final"] = self.linear(pool(h))
        return self.score(features["final"]).squeeze(1).float(), features


# NOTE(paper): in the paper growing begins at 4x4, but the contrast needs an 8x8 map.
FIRST_SIDE = 8


# (number of feature maps, up to this side). The number halves with each doubling beyond it.
MAPS = {"full": (512, 32), "small": (64, 16)}


def feature_maps(cfg, size):
    """Number of feature maps at sides 4, 8, …, `size`. UserError if `size` is not 16, 32, 64 …"""
    most, side_of_most = MAPS["small" if cfg.small else "full"]
    sides = [4 * 2**i for i in range(size.bit_length() - 2)]
    if size < 16 or sides[-1] != size:
        raise UserError(f"--backbone progan takes 16, 32, 64 … pixels a side, not {size}: "
                        "--backbone autogan takes any multiple of 8")
    return [min(most, most * side_of_most // side) for side in sides]


def growth(cfg, size, step):
    """The side that step 1, 2, … trains, and α in (0, 1], the share of its newest layers.

    P = --phase_steps steps train 8x8, P fade in 16x16, P train 16x16, …, the rest train `size`.
    NOTE(paper): ProGAN counts images instead, 600,000 for each of these phases.
    """
    if not cfg.grow:
        return size, 1.0
    phase, done = divmod(step - 1, cfg.phase_steps)
    side = FIRST_SIDE * 2**((phase + 1) // 2)
    if side > size:
        return size, 1.0
    return side, (done + 1) / cfg.phase_steps if phase % 2 else 1.0


def at_side(x, side, alpha=1):
    """Images (B, C, H, W) averaged down to `side`; α fades in their details as it does layers."""
    x = F.avg_pool2d(x, x.shape[-1] // side)
    if alpha < 1:
        x = torch.lerp(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), x, alpha)
    return x


class GrowingEncoder(nn.Module):
    """q(z|x) = N(μ, σ²): x (B, C, H, W) -> μ and log σ² (B, L), fp32, as Encoder.

    NOTE(paper): the encoder has spectral norm at 32x32, but not here, where it would undo the
    weights' scale. There is no minibatch deviation either: a code depends on its own image only.
    """

    def __init__(self, latent, channels, maps):
        super().__init__()
        self.body = GrowingBody(channels, maps, deviation=False)
        self.linear = ScaledConv(maps[0], 2 * latent)

    def forward(self, x):
        _, h = self.body(x)
        return mean_and_log_var(self.linear(h).flatten(1))


class Growing(nn.Module):
    """A network with layers for each side. Layers for sides up to 4 · 2^level are in use.

    The newest layers have the weight `alpha`, and the network without them has 1 - alpha.
    `DCVAE.grow` sets level and alpha. They follow from the step, by `growth`, and are not in
    checkpoints.
    """

    def blend(self, without, with_newest):
        """The output without the newest layers, and with them -> their mean weighted by alpha."""
        alpha = torch.tensor(self.alpha, dtype=with_newest.dtype)
        return (1 - alpha) * without + alpha * with_newest


class GrowingDecoder(Growing):
    """ProGAN's generator: z (B, L) -> image (B, C, side, side), fp32, not bounded."""

    def __init__(self, latent, channels, maps):
        super().__init__()
        # NOTE(paper): ProGAN divides z by its root mean square. Here z keeps its length, which
        # matters to q(z|x) and to the KL.
        c = maps[0]
        self.blocks = nn.Sequential(nn.Sequential(
            LeakyConv(latent, c, 4, padding=3), PixelNorm(),  # 1x1 to 4x4
            LeakyConv(c, c, 3, padding=1), PixelNorm()))
        for c, next_c in zip(maps, maps[1:]):
            self.blocks.append(nn.Sequential(
                nn.Upsample(scale_factor=2), LeakyConv(c, next_c, 3, padding=1), PixelNorm(),
                LeakyConv(next_c, next_c, 3, padding=1), PixelNorm()))
        self.to_image = nn.ModuleList([ScaledConv(c, channels) for c in maps])

    def forward(self, z):
        level = self.level
        h = self.blocks[:level](z[:, :, None, None])
        smaller = F.interpolate(self.to_image[level - 1](h).float(), scale_factor=2)
        h = self.blocks[level](h)
        return self.blend(smaller, self.to_image[level](h).float())


class GrowingBody(Growing):
    """ProGAN's discriminator without its score: image -> its 8x8 map, and features (B, c, 1, 1).

    Images larger than the network's side are averaged down to it.
    """

    def __init__(self, channels, maps, deviation):
        super().__init__()
        self.deviation = deviation
        self.from_image = nn.ModuleList([LeakyConv(channels, c) for c in maps])
        self.blocks = nn.ModuleList()  # each halves the side: from 8, from 16, …
        for next_c, c in zip(maps, maps[1:]):
            self.blocks.append(nn.Sequential(LeakyConv(c, c, 3, padding=1),
                                             LeakyConv(c, next_c, 3, padding=1), nn.AvgPool2d(2)))
        c = maps[0]
        self.last = nn.Sequential(LeakyConv(c + deviation, c, 3, padding=1),
                                  LeakyConv(c, c, 4))  # 4x4 to 1x1

    def forward(self, x):
        level = self.level
        x = at_side(x, 4 * 2**level)
        last_read = self.from_image[level](x)
        h = self.blocks[level - 1](last_read)
        h = self.blend(self.from_image[level - 1](F.avg_pool2d(x, 2)), h)
        for block in reversed(self.blocks[:level - 1]):
            last_read = h  # finally, the input of the block from 8x8 to 4x4
            h = block(h)
        if self.deviation:
            h = minibatch_deviation(h)
        return last_read, self.last(h)


class GrowingDiscriminator(nn.Module):
    """Image -> score (B,) and features {layer: (B, d)}, as Discriminator.

    NOTE(paper): the paper does not say where the contrast is taken. Here it is taken at the 8x8
    map, which networks of all sides have, and at the last features. If `layers` does not have
    "final", then `final` is the last features themselves.
    """

    def __init__(self, channels, maps, layers):
        super().__init__()
        self.body = GrowingBody(channels, maps, deviation=True)
        self.score = ScaledConv(maps[0], 1)
        self.heads = nn.ModuleDict()
        if "b8" in layers:
            self.heads["b8"] = nn.Sequential(ScaledConv(maps[1], 1),
                                             ScaledConv(1, FEATURE_DIM, 8))
        if "final" in layers:
            self.heads["final"] = ScaledConv(maps[0], FEATURE_DIM)

    def forward(self, x, where=None):
        map_8, h = self.body(x)
        inputs = {"b8": map_8, "final": h}
        features = {"final": h.flatten(1)}
        for name, head in self.heads.items():
            features[name] = head(inputs[name]).flatten(1)
        return self.score(h).flatten().float(), features


# ---- Building blocks -----------------------------------------------------------------------------
# Residual blocks going down, and AutoGAN's cells going up (A.5, Figure 15). From class ScaledConv
# on: Progressive GAN's blocks.

def mean_and_log_var(h):
    """The end of an encoder: (B, 2L) -> μ and log σ² (B, L), fp32.

    log σ² is limited to 20, long before exp overflows.
    """
    mean, log_var = h.float().chunk(2, 1)
    return mean, log_var.clamp(max=20)


def xavier(layer):
    """Xavier's initialisation of a conv, in the decoder and in D's heads.

    The release calls it for all convs, but it does not reach those with spectral norm.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)


def pool(h):
    """ReLU and 64 times the mean over the map: (B, width, H, W) -> (B, width).

    At 32x32 this is the released sum over 8x8 positions. A sum over a larger map would be larger,
    and log σ² would start above its limit of 20.
    """
    return 64 * F.relu(h).mean((2, 3))


class DownBlock(nn.Module):
    """Residual block with spectral norm: (B, c_in, H, W) -> (B, c_out, H, W).

    With `halve` -> (B, c_out, H/2, W/2). A ReLU precedes each 3x3 conv, but the `first` block,
    which sees an image, begins without one.
    """

    def __init__(self, c_in, c_out, first=False, halve=False):
        super().__init__()
        self.first = first
        self.shrink = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv1 = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(c_in, c_out, 1)) if halve else nn.Identity()

    def forward(self, h):
        out = self.conv1(h if self.first else F.relu(h))
        out = self.conv2(F.relu(out))
        # A 1x1 conv of means is the mean of 1x1 convs, and cheaper.
        return self.shrink(out) + self.shortcut(self.shrink(h))


def down_blocks(channels, width):
    """The four blocks of encoder and discriminator: (B, C, H, W) -> (B, width, H/4, W/4)."""
    return nn.Sequential(DownBlock(channels, width, first=True, halve=True),
                         DownBlock(width, width, halve=True),
                         DownBlock(width, width), DownBlock(width, width))


class UpCell(nn.Module):
    """AutoGAN's cell: h (B, width, H, W) -> output and `skip`, both (B, width, 2H, 2W).

    `skip` is the sum that the second conv sees, before the ReLU. It contains the skips of the
    cells before this one, enlarged; the cells after this one add it to theirs.
    """

    def __init__(self, width, mode, earlier_cells, shortcut=True):
        super().__init__()
        self.mode = mode
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skips = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(earlier_cells)])
        self.shortcut = nn.Conv2d(width, width, 1) if shortcut else None

    def forward(self, h, earlier_skips):
        side = 2 * h.shape[2]

        def up(smaller):
            return F.interpolate(smaller, side, mode=self.mode)

        skip = self.conv1(up(F.relu(h)))
        for conv, earlier_skip in zip(self.skips, earlier_skips):
            skip = skip + up(conv(earlier_skip))  # conv first: the same values for less work
        out = self.conv2(F.relu(skip))
        if self.shortcut is not None:
            out = out + up(self.shortcut(h))
        return out, skip


class ScaledConv(nn.Conv2d):
    """A conv whose weights start from N(0, 1), and are multiplied by gain / √fan_in when used.

    Adam's steps all have one size, so they are then the same relative change in every layer.
    """

    gain = 1

    def __init__(self, c_in, c_out, kernel=1, padding=0):
        super().__init__(c_in, c_out, kernel, padding=padding)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = self.gain / math.sqrt(c_in * kernel**2)

    def forward(self, h):
        return F.conv2d(h, self.weight * self.scale, self.bias, padding=self.padding)


class LeakyConv(ScaledConv):
    """The same, followed by a leaky ReLU."""

    gain = math.sqrt(2)

    def forward(self, h):
        return F.leaky_relu(super().forward(h), 0.2)


class PixelNorm(nn.Module):
    """Each pixel's features divided by their root mean square: (B, C, H, W) -> same."""

    def forward(self, h):
        # Autocast runs rsqrt in fp32; without the cast all later features would be fp32.
        return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-8).to(h.dtype)


def minibatch_deviation(h):
    """Append a map: the standard deviation over groups of 4 images, averaged over (C, H, W).

    It shows D if samples are all alike. The 4 are neighbours, so no group mixes real and fake. If B
    is not divisible by 4, groups have 2 images, or 1, which tells nothing.
    """
    group = math.gcd(4, len(h))
    variance = h.float().unflatten(0, (-1, group)).var(1, correction=0)  # (B/4, C, H, W)
    deviation = torch.sqrt(variance + 1e-8).mean((1, 2, 3), keepdim=True).to(h.dtype)
    maps = deviation.repeat_interleave(group, 0).expand(-1, 1, *h.shape[2:])
    return torch.cat([h, maps], 1)


# ---- Training ------------------------------------------------------------------------------------

# Changed from vae.py: two players, no bound
def train(cfg, model, images, folder, checkpoint):
    """Play the game of Eq. (9), or train vae, vaegan or contrastive by Eq. (2), (5) or (8).

    Without a checkpoint a new run starts in `folder`. With one, the run in `folder` continues.
    """
    label_values(cfg, images, "train")  # reports a wrong flag now, not after training
    rank, world = processes()
    data = Batches(images.train, cfg.d_steps * cfg.batch_size, cfg.device, cfg.seed,
                   parts=cfg.d_steps * world)  # no augmentation
    total = cfg.steps or cfg.epochs * data.per_epoch
    if cfg.grow and cfg.phase_steps is None:
        phases = 2 * (images.size // FIRST_SIDE).bit_length() - 2
        cfg.phase_steps = max(1, total // 2 // phases)
    reference = fid_reference(cfg, images)
    # One Adam serves both players. It skips parameters without a gradient, such as those of larger
    # sides, and each parameter has its own moments and its own count of updates.
    # NOTE(paper): ProGAN resets all moments at each new side.
    learned = [p for p in model.parameters() if p.requires_grad]
    beta2 = 0.9 if cfg.backbone == "autogan" else 0.99
    optimizer = torch.optim.Adam(learned, lr=cfg.lr, betas=(0.0, beta2), foreach=True)
    if checkpoint is None:
        state = start_run(cfg, folder, images)
    else:
        state = checkpoint["state"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    if total < state["step"]:
        raise UserError(f"this run has done {state['step']} steps, so it cannot end at {total}")
    synchronised = world > 1 and cfg.device.startswith("cuda")
    if synchronised:  # SyncBatchNorm exists on GPUs only
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # torch.compile traces neither that nor a gradient's gradient, and recompiles at every side.
    if synchronised or cfg.grow or (model.adversarial and cfg.gan == "wgan"):
        cfg = dataclasses.replace(cfg, compile=False)
    # `model` holds the weights; `player_terms` is its forward pass, compiled, over all processes.
    # DDP must be told that layers of the other player, and of other sides, have no gradients.
    unused = model.discriminator is not None or cfg.backbone == "progan"
    player_terms = parallel(cfg, model, find_unused_parameters=unused)

    rows = []  # the terms of the steps since the last progress line
    saved = -math.inf  # when last.pt was saved
    state["clock"] = time.perf_counter()
    for step in range(state["step"] + 1, total + 1):
        state["step"] = step
        seed_noise(cfg.seed, step, rank)
        side, alpha = growth(cfg, images.size, step)
        model.grow(side, alpha)
        # A smaller side has a larger batch, up to 128 images per update.
        times = max(1, min(128 // cfg.batch_size, images.size // side))
        data.set_batch_size(times * cfg.d_steps * cfg.batch_size)
        batches = at_side(data.batch(step - 1, rank, world), side, alpha).chunk(cfg.d_steps)
        rows.append(train_step(cfg, model, player_terms, optimizer, batches, step))

        validating = step % cfg.eval_every == 0 or step == total
        if validating or step % cfg.log_every == 0:
            log_training(folder, state, total, rows, data.batch_size)
            rows = []
            if validating:
                validate(cfg, model, images, folder, optimizer, state, reference)
            # Saved after the validation, to include its score, and only when all steps so far are
            # logged, because a resumed run begins its next line with no rows.
            if step == total or time.perf_counter() > saved + SAVE_SECONDS:
                save(folder / "last.pt", cfg, model, optimizer, state)
                saved = time.perf_counter()


def fid_reference(cfg, images):
    """With --fid: the Inception network and its statistics of validation images; else None."""
    if not cfg.fid or processes()[0] > 0:
        return None
    inception = load_network(InceptionFeatures, INCEPTION_URL, "FID", cfg.device)
    if inception is None:
        return None
    valid = evaluation_batches(images.valid, cfg.device, cfg.eval_images)
    batches = progress("features, valid", valid, valid.count)
    return inception, feature_statistics(inception, (to_uint8(x) for x in batches))


# Changed from vae.py: distances and pictures; only FID says which step is best
def validate(cfg, model, images, folder, optimizer, state, reference):
    """Log distances of validation images, draw figures; save best.pt if FID is the lowest yet.

    Process 0 does this while the others wait. The time does not count as training.
    """
    if processes()[0] == 0:
        valid = evaluation_batches(images.valid, cfg.device, cfg.eval_images)
        with inference(cfg, model):
            # First, so that all figures of samples have the same z.
            save_figures(cfg, model, images, folder, "valid", state["step"])
            row = distances(model, valid)
            if reference:
                inception, statistics = reference
                samples = sample_batches(model, min(cfg.fid, valid.count))
                row |= inception_metrics(inception, samples, {"valid": statistics})
        log_row(folder, state, "valid", row)
        draw_curves(folder)
        if row.get("fid_valid", math.inf) < state["best"]:
            state["best"] = row["fid_valid"]
            save(folder / "best.pt", cfg, model, optimizer, state)
    barrier()
    state["clock"] = time.perf_counter()  # so that this time does not count as training


# ---- Evaluation ----------------------------------------------------------------------------------

# Changed from vae.py: pictures, codes and a probe instead of bounds
def evaluate(cfg, model, images, folder, state):
    """Rows of Tables 1 to 8, if they apply, printed and in results.json; figures test.png.

    The results also say how each number was made.
    """
    label_values(cfg, images, "train")  # reports a wrong flag before anything is written
    model.grow(*growth(cfg, images.size, state["step"]))
    with inference(cfg, model):
        save_figures(cfg, model, images, folder, "test", state["step"])
        test = evaluation_batches(images.test, cfg.device, cfg.eval_images)
        vgg = None
        if cfg.fid:
            vgg = load_network(VGGFeatures, VGG_URL, "perceptual distance", cfg.device)
        results = {
            **distances(model, test, vgg),
            "test_images": test.count,
            "code": "drawn" if cfg.draw_code else "mean",
        }
        if cfg.fid:
            results |= fid(cfg, model, images, test)
        if cfg.path_length:
            # NOTE(paper): Table 7 names neither the space, the interpolation nor the crop. Here
            # z ~ N(0, 1), paths are arcs from one z to another, and images are whole.
            results |= path_length_metrics(model.averaged_decoder, cfg.latent, cfg.path_length,
                                           cfg.device, cfg.lpips_weights)
        title = sheet_title(cfg, images, "test", state["step"])
        for save_sheets in (save_interpolations, save_mixing, save_editing):
            save_sheets(cfg, model, images, folder, title)
        results |= {
            "clamp": cfg.clamp, "ema": cfg.ema,
            **cost_of(cfg, model, state),  # last: it draws as many samples as time allows
        }
    results |= probe(cfg, model, images)
    write_results(folder, results)


def distances(model, batches, vgg=None):
    """Mean distances of x and x̂ over a split: pixel and, with VGGFeatures, perceptual.

    The result also has the mean KL in nats, per image and per latent dimension, and `active`, the
    number of dimensions in which it is above 0.05 nats (our threshold).
    """
    pixel = []
    perceptual = []
    kl = []
    for x in progress("distances", batches, batches.count):
        x_hat = model.reconstruct(x)
        pixel.append(pixel_distance(x, x_hat))
        kl.append(gaussian_kl(*model.encoder(x)))
        if vgg:
            perceptual.append(perceptual_distance(vgg, x, x_hat))
    results = {"pixel_distance": torch.cat(pixel).mean().item()}
    if vgg:
        results["perceptual_distance"] = torch.cat(perceptual).mean().item()
    kl = torch.cat(kl).mean(0)  # (L,)
    return results | {"kl": kl.sum().item(), "kl_per_dim": kl.mean().item(),
                      "active": (kl > 0.05).sum().item()}


def fid(cfg, model, images, test):
    """FID against train and test, and Inception Score: of --fid samples, then of reconstructions.

    Each test image is reconstructed once. Without the network the result is empty.
    """
    inception = load_network(InceptionFeatures, INCEPTION_URL, "FID", cfg.device)
    if inception is None:
        return {}
    references = reference_statistics(inception, images, cfg.device)
    results = inception_metrics(inception, sample_batches(model, cfg.fid), references)
    batches = progress("reconstructions", test, test.count)
    reconstructions = (to_uint8(model.reconstruct(x)) for x in batches)
    for name, value in inception_metrics(inception, reconstructions, references).items():
        results[f"reconstruction_{name}"] = value
    return results


def label_values(cfg, images, split):
    """The labels of a split in --label_column -> int64 (N,), or None if there are none.

    UserError if there is no such column, or if the training images do not have --label_value.
    """
    if images.labels is None:
        return None
    labels = images.labels[split]
    columns = labels.reshape(len(labels), -1)
    if cfg.label_column >= columns.shape[1]:
        raise UserError(f"--label_column {cfg.label_column}: the labels of {images.name} have "
                        f"columns 0 to {columns.shape[1] - 1}")
    labels = columns[:, cfg.label_column].astype(np.int64)
    if split == "train" and cfg.label_value is not None and cfg.label_value not in labels:
        raise UserError(f"--label_value {cfg.label_value}: the labels of {images.name} are "
                        f"{np.unique(labels).tolist()}")
    return labels


def probe(cfg, model, images):
    """Table 6: test errors in percent of a linear classifier on codes, and of another on pixels.

    They learn from at most 60,000 training images, and from at most ten times --eval_images.
    Without labels the result is empty.
    """
    if images.labels is None:
        return {}
    most = 60_000
    if cfg.eval_images:
        most = min(most, 10 * cfg.eval_images)
    codes, pixels, labels = probe_data(cfg, model, images, "train", most)
    test_codes, test_pixels, test_labels = probe_data(cfg, model, images, "test", cfg.eval_images)
    results = {"probe_images": len(labels)}
    for name, train, test in (("probe", codes, test_codes), ("pixels", pixels, test_pixels)):
        error, half_width = linear_probe(train, labels, test, test_labels)
        results[f"{name}_error_percent"] = error
        results[f"{name}_error_percent_ci95"] = half_width
    return results


def probe_data(cfg, model, images, split, count):
    """Codes (N, L), the means of q(z|x), pixels (N, d) and labels (N,) of `count` images at most.

    Images of 64 pixels a side or more are averaged down to between 32 and 63, because 60,000 would
    not fit into memory.
    """
    batches = evaluation_batches(getattr(images, split), cfg.device, count)
    codes = []
    pixels = []
    with inference(cfg, model):
        for x in progress(f"codes, {split}", batches, batches.count):
            codes.append(model.encode(x))
            pixels.append(F.avg_pool2d(x, max(1, images.size // 32)).flatten(1))
    labels = label_values(cfg, images, split)[:batches.count]
    return torch.cat(codes), torch.cat(pixels), torch.from_numpy(labels).to(cfg.device)


def as_batch(pixels, device):
    """Some images of a split, uint8 (N, H, W, C) -> (N, C, H, W) in [-1, 1]."""
    return next(iter(Batches(pixels, len(pixels), device)))


# Changed from vae.py: codes instead of noise
def save_figures(cfg, model, images, folder, split, step):
    """Sheets: samples/; reconstructions/ of the split's first images, rows x, x̂."""
    x = as_batch(getattr(images, split)[:32], cfg.device)
    title = sheet_title(cfg, images, split, step)
    sampled = reconstructed = "test" if split == "test" else f"{step:06d}"
    prior = "z ~ N(0, 1)"
    code = "z the mean of q(z|x)"
    if cfg.clamp:
        sampled += "-clamp"
        prior += ", limited to [-1, 1]"
    if cfg.draw_code:
        reconstructed += "-draw"
        code = "z ~ q(z|x)"
    save_sheet(folder / "samples" / f"{sampled}.png", f"{title}\n{prior}",
               {"x̃": model.sample(64)})
    save_sheet(folder / "reconstructions" / f"{reconstructed}.png", f"{title}\n{code}",
               {"x": x, "x̂": model.reconstruct(x)})


def save_interpolations(cfg, model, images, folder, title):
    """interpolations/: each row leads from one test image to another."""
    x = as_batch(images.test[:8], cfg.device)
    lines = model.interpolate(x, x.roll(1, 0))  # (8, 8, C, H, W)
    save_sheet(folder / "interpolations" / "test.png",
               f"{title}\nfrom one image's code to another's",
               {"along z": lines.flatten(0, 1)}, keep_columns=True)


def save_mixing(cfg, model, images, folder, title):
    """mixing/: the images at the left, with half of their codes from the top row (Figure 12)."""
    n = 7 if images.size <= 32 else 3  # as many as fit
    x = as_batch(images.test[:2 * n], cfg.device)
    left = x[:n]
    top = x[-n:]
    corner = torch.ones_like(x[:1])
    rows = {"half of z from these": torch.cat([corner, top])}
    for i, mixed in enumerate(model.mix(left, top)):
        rows[f"half of z from image {i + 1}"] = torch.cat([left[i:i + 1], mixed])
    save_sheet(folder / "mixing" / "test.png", title, rows, columns=n + 1, keep_columns=True)


def save_editing(cfg, model, images, folder, title):
    """editing/: rows of x, then images of its code plus 0, ½, 1 … 3 times a direction (A.2).

    The direction goes from images without --label_value to images with it: the difference of the
    mean codes of 20 training images each. Without labels, or if all are the same, there is no
    figure.
    """
    labels = label_values(cfg, images, "train")
    if labels is None:
        return
    value = labels.max() if cfg.label_value is None else cfg.label_value
    have = np.flatnonzero(labels == value)[:20]
    lack = np.flatnonzero(labels != value)[:20]
    others = np.flatnonzero(label_values(cfg, images, "test") != value)[:8]
    if len(lack) == 0 or len(others) == 0:
        return
    with_it = model.encode(as_batch(images.train[have], cfg.device))
    without_it = model.encode(as_batch(images.train[lack], cfg.device))
    x = as_batch(images.test[others], cfg.device)
    edited = model.edit(x, with_it.mean(0) - without_it.mean(0), [i / 2 for i in range(7)])
    rows = torch.cat([x.unsqueeze(1), edited], 1).flatten(0, 1)
    save_sheet(folder / "editing" / f"test-{cfg.label_column}-{value}.png",
               f"{title}\nx, then its code plus 0, ½, 1 … 3 times the direction to label {value}",
               {"x, x̂ of edited z": rows}, keep_columns=True)


# ---- Flags ---------------------------------------------------------------------------------------

# Copied from vae.py: flag
def flag(default, text, fixed=False, choices=None, low=1, high=10**9):
    """A field of Config. A `fixed` one cannot change in a run; numbers are in [`low`, `high`]."""
    metadata = {"help": text, "fixed": fixed, "choices": choices, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


DEFAULTS = {  # of flags that depend on the backbone: the released code's, and ProGAN's
    "autogan": {"epochs": 800, "latent": 128, "d_steps": 5, "lr": 2e-4, "grow": False,
                "gan": "hinge", "contrast_layers": "b1,final"},
    "progan": {"epochs": 100, "latent": 512, "d_steps": 1, "lr": 1e-3, "grow": True,
               "gan": "wgan", "contrast_layers": "b8,final"},
}


# Changed from vae.py: four losses, the discriminator's game, the contrast
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the released code's for CIFAR-10, with progan ProGAN's.

    Where they differ from the paper: docs/dcvae.md, section 12.
    """

    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, celebahq, "
                        "lsun, or a folder")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    size: int = flag(None, "side of the images, 8 · n, progan 16, 32, … (default: the dataset's)",
                     fixed=True)
    backbone: str = flag(None, "networks (default: autogan below 64 pixels, else progan)",
                         fixed=True, choices=("autogan", "progan"))
    loss: str = flag("dcvae", "the four models of Table 1", fixed=True,
                     choices=("vae", "vaegan", "contrastive", "dcvae"))
    latent: int = flag(None, "L, dimensions of z (default 128, progan 512)", fixed=True)
    small: bool = flag(False, "networks narrowed for a laptop CPU, quick evaluation", fixed=True)
    epochs: int = flag(None, "passes over the training images, counted at full size; with a gan, "
                       "encoder and decoder learn from 1 batch in --d_steps (default 800, progan "
                       "100)")
    steps: int = flag(None, "training steps, each with one update of encoder and decoder "
                      "(overrides --epochs)")
    # NOTE(paper): 5.1 has 128. The release has 64 images, and 128 samples when the decoder learns.
    batch_size: int = flag(None, "images per update, over all processes; more while progan is "
                           "growing (default 64, progan 2048/size)", fixed=True)
    d_steps: int = flag(None, "updates of D per step, each on its own batch (default 5, progan 1; "
                        "without a gan always 1)", fixed=True)
    lr: float = flag(None, "Adam's learning rate, constant (default 2e-4, progan 1e-3)",
                     fixed=True, low=0)
    grow: bool = flag(None, "progan: from 8x8 to --size while it trains (default: yes)", fixed=True)
    phase_steps: int = flag(None, "progan: steps of each fade, and between fades (default: so that "
                            "growing takes half of all steps)", fixed=True)
    kl_weight: float = flag(None, "weight of the KL, per image (default 6.4e-5, --loss vae 1)",
                            fixed=True, low=0)
    gan: str = flag(None, "set-level loss: hinge, as released, log, as in Eq. (4), or wgan, with "
                    "ProGAN's gradient penalty (default hinge, progan wgan)",
                    fixed=True, choices=("hinge", "log", "wgan"))
    negatives: int = flag(8096, "K, number of other images that the contrast tells x apart from",
                          fixed=True)
    temperature: float = flag(0.07, "τ of the contrast", fixed=True, low=1e-3)
    momentum: float = flag(0.999, "decay of D's average, which makes the keys of the contrast",
                           fixed=True, low=0, high=1)
    contrast_layers: str = flag(None, "where the contrast is taken: blocks b1 … b4, progan b8, and "
                                "the last features (default b1,final, progan b8,final)", fixed=True)
    patch_after: int = flag(None, "steps until local patches are contrasted too (default: never)",
                            fixed=True, low=0)
    ema: float = flag(0.999, "decay of the decoder's average, which figures and evaluation use",
                      fixed=True, low=0, high=1)
    seed: int = flag(0, "for initialisation, batches, noise", fixed=True, low=0, high=2**32 - 1)
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first one available")
    dtype: str = flag("auto", "networks' precision; losses are fp32. auto: bf16 on GPUs from "
                      "Ampere on and CPUs with AVX512-BF16, else fp32",
                      choices=("auto", "fp32", "bf16"))
    compile: bool = flag(None, "torch.compile (default: on GPUs from Ampere on, under Linux)")
    resume: bool = flag(False, "continue the run in its folder")
    eval: bool = flag(False, "evaluate the run in its folder without training")
    log_every: int = flag(50, "steps between progress lines")
    eval_every: int = flag(1000, "steps between validations, with figures")
    eval_images: int = flag(None, "images to evaluate (default all, --small 500)")
    fid: int = flag(None, "samples for FID and Inception Score, with perceptual distance; best.pt "
                    "then has the lowest validation FID (default: none)")
    path_length: int = flag(None, "pairs of codes for the perceptual path length (default: none)")
    lpips_weights: str = flag(None, "vgg.pth of the package lpips, for --path_length in LPIPS")
    clamp: bool = flag(False, "samples: z limited to [-1, 1], as the release evaluates")
    draw_code: bool = flag(False, "reconstructions: z drawn from q(z|x), not its mean")
    label_column: int = flag(0, "probe and editing: which column of the labels", low=0)
    label_value: int = flag(None, "editing: the label that is added (default: the largest)", low=0)

    def __post_init__(self):
        size = self.size or DATASETS.get(self.dataset, (64,))[0]
        if self.backbone is None:
            self.backbone = "autogan" if size < 64 else "progan"
        if self.batch_size is None:
            self.batch_size = 64 if self.backbone == "autogan" else max(4, 2048 // size)
        for name, value in DEFAULTS[self.backbone].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.loss in ("vae", "contrastive"):
            self.d_steps = 1
        if self.small:
            self.eval_images = self.eval_images or 500
        if self.kl_weight is None:
            # NOTE(paper): Eqs. (3), (8) have 1, with which an empty code minimises Eq. (8). The
            # release has 1e-6 on a sum over 64 images, which is 6.4e-5 on their mean. It updates
            # encoder and decoder twice, by gan + kl and then by contrast + kl. Here dcvae has one
            # update, by gan + contrast + kl, so its KL weighs half as much as there.
            self.kl_weight = 1.0 if self.loss == "vae" else 6.4e-5

    @property
    def variant(self):
        """The part of the run folder's name that describes the model."""
        variant = f"{self.loss}-z{self.latent}"
        if self.backbone == "progan":
            variant = f"progan-{variant}"
        return f"{variant}-small" if self.small else variant

    def check(self):
        """Raise UserError for flags that make no model, before anything is written."""
        if self.size is not None and self.backbone == "autogan":
            start_side(self.size)
        if self.size is not None and self.backbone == "progan":
            feature_maps(self, self.size)
        if self.grow and self.backbone == "autogan":
            raise UserError("--grow is for --backbone progan")
        if self.phase_steps and not self.grow:
            raise UserError("--phase_steps is for a model that grows")
        if self.lpips_weights and not Path(self.lpips_weights).is_file():
            raise UserError(f"there is no {self.lpips_weights} (--lpips_weights)")
        if self.patch_after is not None and self.backbone == "progan":
            raise UserError("--patch_after is for --backbone autogan")
        parse_layers(self)


# --- same in every script -------------------------------------------------------------------------
# Flags, the run's folder and its files, precision, main: nothing here depends on the model.

SCRIPT = Path(__file__).stem
SAVE_SECONDS = 60  # at least, between saves of last.pt, which follow a progress line
IMAGES_PER_SECOND = 10  # at the paper's size on two CPU cores, up to 64x64; measured: 4 to 42


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError, which `main` prints as one line."""

    def error(self, message):
        raise UserError(message)


def parse_flags(argv=None, run=None):
    """Command line -> Config, in which each field is a flag. UserError for a wrong one.

    `run` is the configuration of the run that is resumed or evaluated. A flag that is not typed
    keeps its value from that run. A `fixed` flag cannot be given another value.
    """
    parser = OneLineParser(f"{SCRIPT}.py", description=__doc__.splitlines()[0],
                           argument_default=argparse.SUPPRESS)  # what is not typed is left out
    fields = dataclasses.fields(Config)
    for f in fields:
        text = f.metadata["help"]
        if f.default is not None:
            text += f" (default: {f.default})"
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", help=text, **kind)
    values = vars(parser.parse_args(argv))
    for f in fields:
        if f.name in values and f.type in (int, float):
            low, high = f.metadata["range"]
            if not low <= values[f.name] <= high:
                raise UserError(f"--{f.name} must be from {low} to {high}, not {values[f.name]}")
        # A run may be older than a flag. Its --device and --compile were for its machine.
        if run and f.name in run and f.name not in ("device", "compile"):
            value = values.setdefault(f.name, run[f.name])
            if f.metadata["fixed"] and value != run[f.name]:
                raise UserError(f"this run's --{f.name} is {run[f.name]} and cannot become {value}")
    return Config(**values)


def start_run(cfg, folder, images):
    """Make the folder of a new run, with config.json -> the run's state.

    "seconds" is the time that "step" steps took, "best" is the lowest validation score, and "data"
    identifies the images. FileExistsError if another run has the folder.
    """
    if processes()[0] == 0:
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                             capture_output=True, encoding="utf-8")  # stdout is "" without git
        made_by = {"command": shlex.join(sys.argv), "commit": git.stdout.strip(),
                   "torch": torch.__version__, "processes": processes()[1]}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.json", "x", encoding="utf-8") as file:
            file.write(to_json(dataclasses.asdict(cfg) | made_by, indent=1))
    return {"step": 0, "best": math.inf, "seconds": 0.0, "data": images.identity}


def load_checkpoint(folder, best):
    """Load best.pt, if `best` and if it exists, else last.pt. UserError if it cannot be read."""
    path = folder / "last.pt"
    if best and (folder / "best.pt").exists():
        path = folder / "best.pt"
    if not path.exists():
        raise UserError(f"there is no {path} to resume or evaluate")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except PermissionError:
        raise
    except Exception:  # reading a broken file may raise anything
        raise UserError(f"{path} is damaged, or not a checkpoint of these scripts") from None
    if script != SCRIPT:
        raise UserError(f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    return checkpoint


def load_weights(checkpoint, model):
    """Load a checkpoint's parameters. UserError if they belong to another model."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, AttributeError, TypeError):
        raise UserError(f"the checkpoint's parameters are not those of this {SCRIPT}.py with the "
                        "run's flags: it is of another version, or damaged") from None


def save(path, cfg, model, optimizer, state):
    """Process 0 saves a checkpoint of tensors and plain types, if all parameters are finite.

    It is written under another name and then renamed, so `path` is never half a file.
    """
    require_finite(model, state["step"])
    if processes()[0] == 0:
        checkpoint = {"script": SCRIPT, "config": dataclasses.asdict(cfg), "state": state,
                      "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        aside = path.with_suffix(".tmp")
        with open(aside, "wb") as file:  # so a full disk is an OSError, which main prints
            torch.save(checkpoint, file)
        os.replace(aside, path)


def autocast(cfg):
    """Context in which the networks compute in --dtype."""
    device = torch.device(cfg.device).type
    return torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == "bf16")


@contextlib.contextmanager
def inference(cfg, model):
    """Context without gradients. Weights are normalised once; noise depends on --seed alone."""
    model.eval()
    with torch.no_grad(), autocast(cfg), cached():
        torch.manual_seed(cfg.seed)
        yield
    model.train()


def parallel(cfg, model, **options):
    """The model, compiled with --compile; under torchrun gradients are averaged over processes."""
    if cfg.compile:
        model = torch.compile(model, fullgraph=True)
    if processes()[1] > 1:
        model = DistributedDataParallel(model, **options)
    return model


def print_header(cfg, folder, model, images):
    """Print model, images, device; at the paper's size on a CPU also how long training takes."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters:,} trained parameters; {len(images.train)} images of {images.name}, "
          f"{images.shape}; {processes()[1]} x {device_and_precision(cfg)}; writing to {folder}",
          flush=True)
    seen = cfg.epochs * len(images.train)
    if cfg.steps:
        seen = cfg.steps * cfg.batch_size * getattr(cfg, "d_steps", 1)
    rate = IMAGES_PER_SECOND / max(1, images.size / 64)**2
    days = seen / rate / 86_400
    if cfg.device == "cpu" and not cfg.small and images.size > 1 and days > 0.1:
        print(f"at the paper's size this takes a CPU about {days:.1f} days, if it trains "
              f"{rate:.2g} images/s; --small is for CPUs", flush=True)


def device_and_precision(cfg):
    """-> "cpu, threads: 1, bf16" or the like."""
    threads = f", threads: {torch.get_num_threads()}" if cfg.device == "cpu" else ""
    return f"{cfg.device}{threads}, {cfg.dtype}"


def sheet_title(cfg, images, split, step):
    """The first line of every sheet: the model, the images, the step."""
    return (f"{SCRIPT}.py {cfg.variant} · {images.name} {images.size}x{images.size}, {split} · "
            f"step {step:,}")


def main(Model, argv=None):
    """Train and evaluate, or with --eval only evaluate -> the exit code.

    The code is 0, 2 for a user's mistake, 1 if a number is not finite, 130 after Ctrl-C.
    """
    try:
        cfg = parse_flags(argv)
        dataset = f"{Path(cfg.dataset).name}{cfg.size or ''}"
        name = cfg.name or f"{SCRIPT}-{dataset}-{cfg.variant}-s{cfg.seed}"
        folder = Path(cfg.out_dir, name)
        checkpoint = None
        if cfg.resume or cfg.eval:
            checkpoint = load_checkpoint(folder, best=cfg.eval)
            cfg = parse_flags(argv, checkpoint["config"])
        elif any(folder.glob("*.pt")) or (folder / "config.json").exists():
            raise UserError(f"{folder} holds a run: --resume goes on with its last.pt, --eval "
                            "evaluates it, --name NAME starts another; without a last.pt, delete "
                            "it")
        cfg.check()
        choose_device(cfg)
        images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
        torch.manual_seed(cfg.seed)
        model = Model(cfg, images.shape).to(cfg.device, memory_format=torch.channels_last)
        if checkpoint:
            trained_on = checkpoint["state"].get("data", images.identity)
            if trained_on != images.identity:
                raise UserError(f"this run's images were {trained_on}; now they are "
                                f"{images.identity}, and the run may have been trained on some of "
                                "these test images: take another --name")
            load_weights(checkpoint, model)
        if not cfg.eval:
            print_header(cfg, folder, model, images)
            train(cfg, model, images, folder, checkpoint)
            barrier()  # until process 0 has written its checkpoints
            checkpoint = load_checkpoint(folder, best=True)
            load_weights(checkpoint, model)
        if processes()[0] == 0:
            print(f"evaluating the model of step {checkpoint['state']['step']}; "
                  f"{device_and_precision(cfg)}", flush=True)
            evaluate(cfg, model, images, folder, checkpoint["state"])
        barrier()  # until process 0 has evaluated: one that exits earlier could end the others
        print(f"written to {folder}")
        return 0
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint, if any", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a console's encoding may lack some characters
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(DCVAE))
