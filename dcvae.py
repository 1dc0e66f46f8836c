"""DC-VAE, with its ablations VAE, VAE/GAN and VAE-Contrastive on one backbone (Parmar et al. 2021).

    generative model   z ~ N(0, 1), x̃ = decoder(z); p(x|z) is defined for --loss vae: N(x̂, ½)
    inference model    q(z|x) = N(μ(x), σ²(x)), x̂ = decoder(z) for z ~ q(z|x); in figures and
                       evaluation z = μ(x)
    losses             --loss vae          pixel + kl            Eq. (1)
                       --loss vaegan       feature + gan + kl    Eqs. (3) to (5)
                       --loss contrastive  contrast + kl         Eqs. (6), (8)
                       --loss dcvae        contrast + gan + kl   Eq. (9)

Encoder and decoder minimise these. The discriminator D plays against them in gan, and lowers the
contrast as they do.

    python dcvae.py --small --steps 400                built-in shapes, ten minutes on a laptop
    python dcvae.py --dataset cifar10                  the paper's size, for a GPU: FID 17.9 in its
                                                       Table 1
    python dcvae.py --dataset mnist --latent 16        representation: 1.30 % errors of a linear
                                                       classifier in its Table 6

Paper: arXiv:2011.10063; "released" is its authors' code. Derivation, logged terms, differences from
the paper: docs/dcvae.md. Results: docs/results.md.

    B batch · C, H, W channels, height, width of x · L latent dimensions · K negatives
    x, x̂, x̃ (B, C, H, W) image, reconstruction, sample in [-1, 1] · z (B, L) latent
    D(x) (B,) score of the discriminator, > 0: looks real
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
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
from torchvision.utils import save_image

from common import (
    INCEPTION_URL, VGG_URL, Batches, InceptionFeatures, UserError, VGGFeatures, barrier,
    choose_device, draw_curves, feature_statistics, gather_batch, inception_metrics, linear_probe,
    load_images, load_network, log_row, log_training, perceptual_distance, pixel_distance,
    processes, quantize, reference_statistics, sample_batches, seconds_to_sample, seed_noise,
    to_uint8, write_results)


# ---- Config --------------------------------------------------------------------------------------

# Copied from vae.py: flag
def flag(default, text, fixed=False, choices=None, low=1, high=math.inf):
    """A field of Config. A `fixed` one cannot change in a run; numbers are from `low` to `high`."""
    metadata = {"help": text, "fixed": fixed, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


# Changed from vae.py: four losses, the discriminator's game, the contrast
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the released code's for CIFAR-10, and the paper's K.

    Where these differ: docs/dcvae.md, section 11.
    """

    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, or a folder",
                        fixed=True)
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    name: str = flag(None, "the run's folder there (default: script-dataset-variant-seed)")
    size: int = flag(None, "side of the images, 8 · n (default: the dataset's)", fixed=True)
    loss: str = flag("dcvae", "the four models of Table 1", fixed=True,
                     choices=("vae", "vaegan", "contrastive", "dcvae"))
    latent: int = flag(128, "L, dimensions of z", fixed=True)
    small: bool = flag(False, "networks narrowed for a laptop CPU, quick evaluation", fixed=True)
    epochs: int = flag(800, "passes over the training images by D; encoder and decoder learn from "
                       "1 in --d_steps of them")
    steps: int = flag(None, "training steps, each one update of encoder and decoder")
    # NOTE(paper): 128 in 5.1; the release takes 64 images, and 128 samples.
    batch_size: int = flag(64, "images an update, all processes together", fixed=True)
    d_steps: int = flag(5, "updates of D a step, each on a batch of its own; contrastive has 1",
                        fixed=True)
    lr: float = flag(2e-4, "Adam's learning rate, constant", fixed=True, low=0)
    kl_weight: float = flag(None, "of the KL, per image (default 6.4e-5, --loss vae 1)",
                            fixed=True, low=0)
    gan: str = flag("hinge", "set-level loss: as released, or log, as in Eq. (4)", fixed=True,
                    choices=("hinge", "log"))
    negatives: int = flag(8096, "K, the images that the right one is told from", fixed=True)
    temperature: float = flag(0.07, "of the contrast", fixed=True, low=1e-3)
    momentum: float = flag(0.999, "of the average of D that embeds real images for the contrast",
                           fixed=True, low=0, high=1)
    contrast_layers: str = flag("b1,final", "where the contrast is taken: blocks b1 … b4 and "
                                "final, the last features", fixed=True)
    patch_after: int = flag(None, "steps until local patches are contrasted too (default: never)",
                            fixed=True, low=0)
    ema: float = flag(0.999, "of the decoder's average, which makes all figures and is evaluated",
                      fixed=True, low=0, high=1)
    seed: int = flag(0, "of initialisation, batches and noise", fixed=True, low=0)
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto", "of the networks; losses are fp32. auto: bf16 on GPUs from Ampere on",
                      choices=("auto", "fp32", "bf16"))
    compile: bool = flag(None, "torch.compile (default: on GPUs from Ampere on, under Linux)")
    resume: bool = flag(False, "go on with the run in that folder")
    eval: bool = flag(False, "evaluate the run in that folder, no training")
    log_every: int = flag(50, "steps between progress lines")
    eval_every: int = flag(1000, "steps between validations, with figures")
    eval_images: int = flag(None, "images that are evaluated (default all, --small 500)")
    fid: int = flag(None, "samples for FID, which chooses best.pt, and Inception Score; with "
                    "perceptual distance (default: none)")
    clamp: bool = flag(False, "samples: z limited to [-1, 1], as the release evaluates")
    draw_code: bool = flag(False, "reconstructions: z drawn from q(z|x), not its mean")
    label_column: int = flag(0, "probe and editing: which column of the labels", low=0)
    label_value: int = flag(None, "editing: the label that is added (default: the largest)", low=0)

    def __post_init__(self):
        if self.eval_images is None and self.small:
            self.eval_images = 500
        if self.kl_weight is None:
            # NOTE(paper): Eqs. (3), (8) have 1, at which the KL takes back what the contrast gives.
            # Released: 1e-6 on a sum over 64 images, 6.4e-5 on their mean.
            self.kl_weight = 1.0 if self.loss == "vae" else 6.4e-5

    @property
    def variant(self):
        """What the name of a run's folder says of it."""
        variant = f"{self.loss}-z{self.latent}"
        return f"{variant}-small" if self.small else variant

    def check(self):
        """UserError for what no model can be made of, before anything is written."""
        start_side(self.size or 8)
        contrast_layers(self)


# ---- Building blocks: residual blocks down, AutoGAN's cells up (A.5, Figure 15) ------------------

class DownBlock(nn.Module):
    """Residual block with spectral norm: (B, c_in, H, W) -> (B, c_out, H, W).

    With `halve` -> (B, c_out, H/2, W/2). Each 3x3 conv has its ReLU before it, but for the first
    one of the `first` block, which sees an image.
    """

    def __init__(self, c_in, c_out, first=False, halve=False):
        super().__init__()
        self.first = first
        self.halve = halve
        self.conv1 = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(c_in, c_out, 1)) if halve else nn.Identity()

    def forward(self, h):
        out = self.conv1(h if self.first else F.relu(h))
        out = self.conv2(F.relu(out))
        if self.halve:  # a 1x1 conv of means is the mean of 1x1 convs, and cheaper
            out = F.avg_pool2d(out, 2)
            h = F.avg_pool2d(h, 2)
        return out + self.shortcut(h)


def down_blocks(channels, width):
    """The four blocks of encoder and discriminator: (B, C, H, W) -> (B, width, H/4, W/4)."""
    return nn.ModuleList([DownBlock(channels, width, first=True, halve=True),
                          DownBlock(width, width, halve=True),
                          DownBlock(width, width), DownBlock(width, width)])


class UpCell(nn.Module):
    """AutoGAN's cell: doubles the side of h (B, width, H, W), adds what earlier cells found.

    Returns its output and `skip`, what its second conv sees before the ReLU, which contains the
    skips of the cells before it, each at its size.
    """

    def __init__(self, width, mode, earlier, shortcut):
        super().__init__()
        self.mode = mode
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skips = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(earlier)])
        self.shortcut = nn.Conv2d(width, width, 1) if shortcut else None

    def forward(self, h, skips):
        size = (2 * h.shape[2], 2 * h.shape[3])
        skip = self.conv1(F.interpolate(F.relu(h), size=size, mode=self.mode))
        for conv, earlier in zip(self.skips, skips):
            # Enlarged after the 1x1 conv: the same values, less work.
            skip = skip + F.interpolate(conv(earlier), size=size, mode=self.mode)
        out = self.conv2(F.relu(skip))
        if self.shortcut is not None:
            out = out + F.interpolate(self.shortcut(h), size=size, mode=self.mode)
        return out, skip


# ---- Networks ------------------------------------------------------------------------------------

FEATURES = 16  # "the contrastive embedding dimension" (5.1), and what D's score is computed from
BLOCKS = ("b1", "b2", "b3", "b4")


def pool(h):
    """ReLU and 64 times the mean over the map: (B, width, H, W) -> (B, width).

    For 32x32 images the released sum over 8x8; larger ones keep its scale, or log σ² would start
    beyond its bound.
    """
    return 64 * F.relu(h).mean((2, 3))


# Changed from vae.py: residual blocks with spectral norm, z is a vector
class Encoder(nn.Module):
    """q(z|x) = N(μ, σ²): x (B, C, H, W) -> μ and log σ² (B, L), fp32.

    log σ² is cut at 20, long before exp overflows.
    """

    def __init__(self, channels, width, latent):
        super().__init__()
        self.blocks = down_blocks(channels, width)
        self.linear = spectral_norm(nn.Linear(width, 2 * latent, bias=False))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        mean, log_var = self.linear(pool(x)).float().chunk(2, 1)
        return mean, log_var.clamp(max=20)


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
        self.cells = nn.ModuleList([  # modes, earlier cells, shortcuts: as AutoGAN's search found
            UpCell(width, "nearest", 0, True),
            UpCell(width, "bilinear", 1, True),
            UpCell(width, "nearest", 2, False)])
        self.leave = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(),
                                   nn.Conv2d(width, channels, 3, padding=1))
        # Xavier as released: here and in D's heads, as it does not reach layers with spectral norm.
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, z):
        h = self.enter(z)
        skips = []
        for cell in self.cells:
            h, skip = cell(h, skips)
            skips.append(skip)
        return torch.tanh(self.leave(h).float())


class Discriminator(nn.Module):
    """Image (B, C, size, size) -> score D(x) (B,), > 0 for real, and features {layer: (B, d)}.

    The features are for the contrast (4.2). `final` are the 16 values that the score is computed
    from. A block in `layers` has a head, 1x1 conv to one channel and linear to 16 (deep
    supervision), unless `heads` is False. With `where`, (4, 2) in [0, 1), patch_b1 … are each
    block's channels at one place (local patches).
    """

    def __init__(self, channels, width, size, layers):
        super().__init__()
        self.blocks = down_blocks(channels, width)
        self.linear = spectral_norm(nn.Linear(width, FEATURES, bias=False))
        self.score = spectral_norm(nn.Linear(FEATURES, 1))
        self.heads = nn.ModuleDict()
        for name in layers:
            if name in BLOCKS:
                side = size // 2 if name == "b1" else size // 4  # of the block's output
                self.heads[name] = nn.Sequential(nn.Conv2d(width, 1, 1), nn.Flatten(),
                                                 nn.Linear(side**2, FEATURES, bias=False))
        for head in self.heads.values():
            nn.init.xavier_uniform_(head[0].weight)

    def forward(self, h, where=None, heads=True):
        features = {}
        for i, (name, block) in enumerate(zip(BLOCKS, self.blocks)):
            h = block(h)
            if heads and name in self.heads:
                features[name] = self.heads[name](h)
            if where is not None:
                # Of one element each: a number would be read by the host.
                row, column = (where[i] * h.shape[2]).long().unsqueeze(1)
                features[f"patch_{name}"] = h[:, :, row, column].squeeze(2)
        features["final"] = self.linear(pool(h))
        return self.score(features["final"]).squeeze(1).float(), features


# ---- Losses, all fp32: KL, contrast, gan; pixel and feature are a line each in DCVAE.terms -------

def gaussian_kl(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, 1)) of each dimension, ½ (μ² + σ² - 1 - log σ²): (B, L) in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def sample_code(mean, log_var):
    """z = μ + σε, ε ~ N(0, 1): (B, L) twice -> (B, L)."""
    return mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)


def info_nce(query, positive, negatives, temperature):
    """-log of the share that the positive has in Σ_j exp(cos(query, key_j)/τ) (Eq. (6)).

    query (B, d) of any length; positive (B, d) and negatives (K, d), each of length 1 -> nats
    (B,), and whether the positive is the most similar, 1 or 0 (B,). Pure guessing has log(1 + K).
    """
    # Cosines in fp32: bf16 would round them to 1/256.
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(query.float(), dim=1)
        similarity = (query * positive).sum(1)  # (B,)
        others = query @ negatives.T  # (B, K)
        # NOTE(paper): Eq. (6) has no temperature. Cosines lie between -1 and 1: without one, the
        # right of 8097 keys could have a share of e/(e + 8096/e) at most, e²/8096, and the loss
        # could not fall by more than 2 nats.
        logits = torch.cat([similarity.unsqueeze(1), others], 1) / temperature
        loss = torch.logsumexp(logits, 1) - logits[:, 0]
        return loss, (similarity > others.amax(1)).float()


def discriminator_gan(kind, real, reconstructed, sampled):
    """What D minimises: scores (B,) of real images, reconstructions, samples -> (B,).

    log: minus Eq. (4), its D(x) = σ(score).
    """
    if kind == "log":
        return F.softplus(-real) + F.softplus(sampled) + F.softplus(reconstructed)
    # NOTE(paper): the release trains by hinge losses, as AutoGAN does, and weighs both kinds of
    # fakes by one half.
    return F.relu(1 - real) + 0.5 * F.relu(1 + sampled) + 0.5 * F.relu(1 + reconstructed)


def generator_gan(kind, reconstructed, sampled):
    """What encoder and decoder minimise: scores of reconstructions (B,), of samples -> (B,).

    There may be any number of samples. log: Eq. (4).
    """
    if kind == "log":
        return -F.softplus(reconstructed) - F.softplus(sampled).mean()
    return -0.5 * reconstructed - 0.5 * sampled.mean()


@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay·average + (1 - decay)·model, of parameters and buffers.

    So batch norm's statistics and spectral norm's vectors are averaged too.
    """
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values()):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


# ---- The model -----------------------------------------------------------------------------------

# Changed from vae.py: AutoGAN's
WIDTHS = {"full": (256, 128), "small": (32, 32)}  # channels: of decoder; of encoder and D


def contrast_layers(cfg):
    """--contrast_layers as a tuple. UserError for one that does not exist."""
    layers = tuple(cfg.contrast_layers.split(","))
    if not set(layers) <= {*BLOCKS, "final"} or len(set(layers)) < len(layers):
        raise UserError(f"--contrast_layers {cfg.contrast_layers}: take some of "
                        f"{','.join(BLOCKS)},final, each once, with commas")
    return layers


class DCVAE(nn.Module):
    """The networks that --loss needs, for images of shape (C, H, W), H = W a multiple of 8."""

    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        self.cfg = cfg
        self.adversarial = cfg.loss in ("vaegan", "dcvae")
        self.contrastive = cfg.loss in ("contrastive", "dcvae")
        self.weights = {"pixel": 1, "feature": 1, "contrast": 1, "gan": 1, "kl": cfg.kl_weight,
                        "d_gan": 1, "d_contrast": 1}
        decoder_width, width = WIDTHS["small" if cfg.small else "full"]
        self.encoder = Encoder(channels, width, cfg.latent)
        self.decoder = Decoder(cfg.latent, decoder_width, channels, size)
        # NOTE(paper): A.5 contrasts the second block and the last features; the release trains with
        # the first block, as here.
        self.layers = contrast_layers(cfg) if self.contrastive else ()
        self.discriminator = None
        if cfg.loss != "vae":
            self.discriminator = Discriminator(channels, width, size, self.layers)
        self.averaged_decoder = copy.deepcopy(self.decoder).requires_grad_(False)
        if self.contrastive:
            # Keys come from a slow copy of D, so that those in the queue fit together (He et al.
            # 2020). The queue holds random directions at first, later also older keys of x itself,
            # as released.
            momentum_discriminator = copy.deepcopy(self.discriminator)
            self.momentum_discriminator = momentum_discriminator.requires_grad_(False)
            widths = {name: FEATURES for name in self.layers}
            if cfg.patch_after is not None:
                widths |= {f"patch_{name}": width for name in BLOCKS}
            self.queue = nn.ParameterDict()
            for name, d in widths.items():
                self.queue[name] = F.normalize(torch.randn(cfg.negatives, d), dim=1)
            self.queue.requires_grad_(False)
            self.register_buffer("queued", torch.tensor(0))  # keys so far, modulo K: the oldest
        self.train()

    def train(self, mode=True):
        """As nn.Module.train, but the averaged decoder always uses its averaged statistics."""
        super().train(mode)
        self.averaged_decoder.eval()
        return self

    # -- losses ------------------------------------------------------------------------------------

    def terms(self, x, where=None, keys=None):
        """What encoder and decoder minimise: x (B, C, H, W) -> {name: (B,)}, not yet weighted.

            --loss vae            pixel, kl
            --loss vaegan         feature, gan, kl
            --loss contrastive    contrast, kl
            --loss dcvae          contrast, gan, kl

        `where` and `keys`, for a contrast, are those of `encode_keys`. Noise: that of z, then, for
        gan, 2B codes of samples, twice as many as reconstructions, as released.
        """
        mean, log_var = self.encoder(x)
        z = sample_code(mean, log_var)
        kl = gaussian_kl(mean, log_var).sum(1)
        if self.cfg.loss == "vae":  # Eq. (1): -log p(x|z) but for a constant, p(x|z) = N(x̂, ½)
            return {"pixel": (x - self.decoder(z)).square().sum((1, 2, 3)), "kl": kl}

        samples = 2 * len(x) if self.adversarial else 0
        noise = torch.randn(samples, z.shape[1], device=x.device)
        fakes = self.decoder(torch.cat([z, noise]))
        scores, features = self.discriminator(fakes, where)
        reconstructed, sampled = scores.split([len(x), samples])
        features = {name: values[:len(x)].float() for name, values in features.items()}  # of x̂
        terms = {}
        if self.cfg.loss == "vaegan":  # Eq. (3)
            with torch.no_grad():
                target = self.discriminator(x)[1]["final"].float()
            # NOTE(paper): Eq. (5) has max over D of the feature distance too, which has no upper
            # limit: here D plays in gan alone.
            terms["feature"] = (target - features["final"]).square().sum(1)
        if self.contrastive:  # Eqs. (6), (8)
            terms["contrast"], _ = self.contrast(features, keys)
        if self.adversarial:  # Eq. (4)
            terms["gan"] = generator_gan(self.cfg.gan, reconstructed, sampled)
        terms["kl"] = kl
        return terms

    def discriminator_terms(self, x, where=None, keys=None):
        """What D minimises, and beside it D's health: x (B, C, H, W) -> {name: (B,)}.

            real, reconstructed, sampled    for gan: the scores
            d_gan                           for gan, of as many samples as reconstructions
            d_contrast, accuracy            where keys are given: the two results of `contrast`

        Noise: that of z, then the samples' codes.
        """
        with torch.no_grad():  # neither encoder nor decoder learns here
            z = sample_code(*self.encoder(x))
            fakes = self.decoder(torch.cat([z, torch.randn_like(z)]) if self.adversarial else z)
        seen = torch.cat([fakes, x]) if self.adversarial else fakes
        scores, features = self.discriminator(seen, where, heads=keys is not None)
        terms = {}
        if self.adversarial:
            reconstructed, sampled, real = scores.chunk(3)
            terms = {"real": real, "reconstructed": reconstructed, "sampled": sampled}
            terms["d_gan"] = discriminator_gan(self.cfg.gan, real, reconstructed, sampled)
        if keys:
            # NOTE(paper): Eq. (9) has max over D of all terms, but a critic that learns log p(x|z)
            # must lower the contrast (Eq. (7)).
            features = {name: values[:len(x)] for name, values in features.items()}  # of x̂
            terms["d_contrast"], terms["accuracy"] = self.contrast(features, keys)
        return terms

    def forward(self, x, where=None, keys=None, critic=False):
        """The terms of one of the two players, which are compiled and shared out by this name."""
        if critic:
            return self.discriminator_terms(x, where, keys)
        return self.terms(x, where, keys)

    def contrast(self, features, keys):
        """InfoNCE of reconstructions' features {layer: (B, d)} against `keys` of their originals.

        -> nats, hits (B,): means over --contrast_layers; the mean over patches comes on top (4.2).
        Its average over images and draws is Eq. (7).
        """
        losses = []
        hits = []
        patches = []
        for name, key in keys.items():
            negatives = self.queue[name]
            loss, hit = info_nce(features[name], key, negatives, self.cfg.temperature)
            if name in self.layers:
                losses.append(loss)
                hits.append(hit)
            else:
                patches.append(loss)
        loss = torch.stack(losses).mean(0)
        if patches:
            loss = loss + torch.stack(patches).mean(0)
        return loss, torch.stack(hits).mean(0)

    @torch.no_grad()
    def encode_keys(self, x, patches=False):
        """Move the momentum network by one step of its average; keys of real images from it.

        x (B, C, H, W) -> the place of the patches (4, 2) or None, {layer: (B, d)}. The place is one
        for the whole batch; keys in the queue are of earlier places.
        """
        update_average(self.momentum_discriminator, self.discriminator, self.cfg.momentum)
        where = torch.rand(len(BLOCKS), 2, device=x.device) if patches else None
        _, features = self.momentum_discriminator(x, where)
        keys = {}
        for name in self.queue:
            if name in features:
                keys[name] = F.normalize(features[name].float(), dim=1)
        return where, keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Put keys {layer: (B, d)}, those of all processes, in place of the oldest negatives."""
        for name, key in keys.items():
            key = gather_batch(key)
            count = min(self.cfg.negatives, len(key))
            places = torch.arange(count, device=self.queued.device)
            self.queue[name][(self.queued + places) % self.cfg.negatives] = key[-count:]
        self.queued.add_(count).remainder_(self.cfg.negatives)

    # -- images ------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, z):
        """z (…, L) -> images by the averaged decoder (…, C, H, W), on the pixel grid."""
        return quantize(self.averaged_decoder(z.flatten(0, -2))).unflatten(0, z.shape[:-1])

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
        """x̂ from the mean of q(z|x), with --draw_code from a sample: (B, C, H, W) -> same."""
        return self.decode(self.encode(x, self.cfg.draw_code))

    def interpolate(self, x1, x2, count=8):
        """Images along the line between the codes of x1 and x2 (A.2): -> (B, count, C, H, W)."""
        z1 = self.encode(x1)
        z2 = self.encode(x2)
        line = [torch.lerp(z1, z2, i / (count - 1)) for i in range(count)]
        return self.decode(torch.stack(line, 1))

    def mix(self, x1, x2):
        """Each x1's code with a random half of its dimensions from each x2's (Figure 12).

        The half is the same for all pairs. (B1, C, H, W), (B2, C, H, W) -> (B1, B2, C, H, W).
        """
        from_x2 = torch.randperm(self.cfg.latent, device=x1.device) < self.cfg.latent // 2
        return self.decode(torch.where(from_x2, self.encode(x2), self.encode(x1).unsqueeze(1)))

    def edit(self, x, direction, amounts):
        """Images at x's code plus amounts times `direction` (L,) (A.2).

        x (B, C, H, W) -> (B, len(amounts), C, H, W).
        """
        z = self.encode(x)
        return self.decode(torch.stack([z + amount * direction for amount in amounts], 1))


# ---- Training ------------------------------------------------------------------------------------

# Changed from vae.py: two players, no bound
def train(cfg, model, images, folder, checkpoint):
    """The game of Eq. (9), or the part of it that --loss has, Eqs. (2), (5).

    A step is --d_steps updates of D (contrastive: one; vae: none), each on a batch of its own, then
    one of encoder and decoder on the last of these batches, D's weights being frozen. For a
    contrast, `encode_keys` makes the keys of that last batch before D's last update, which has them
    too; `enqueue` takes them at the end of the step.

    Without a checkpoint a new run is made in `folder`, else the one in it goes on.
    """
    if images.labels is not None:
        label_values(cfg, images, "train")  # a wrong flag is told now, not after the training
    rank, world = processes()
    d_steps = cfg.d_steps if model.adversarial else 1
    data = Batches(images.train, d_steps * cfg.batch_size, cfg.device, cfg.seed,
                   parts=d_steps * world)  # not augmented, as released
    total = cfg.steps or cfg.epochs * data.per_epoch
    judge = fid_judge(cfg, images)
    # One Adam for both players: it skips what has no gradient, and counts each parameter's updates.
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=cfg.lr, betas=(0.0, 0.9))
    if checkpoint is None:
        state = start_run(cfg, folder)
    else:
        state = restore(checkpoint, model, optimizer)
    if world > 1 and data.device.type == "cuda":  # CPUs have none, torch.compile cannot trace it
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        cfg = dataclasses.replace(cfg, compile=False)
    players = parallel(cfg, model, find_unused_parameters=model.discriminator is not None)

    rows = []  # the terms of the steps since the last progress line
    for step in range(state["step"] + 1, total + 1):
        state["step"] = step
        seed_noise(cfg.seed, step, rank)
        batches = data.batch(step - 1, rank, world).chunk(d_steps)
        x = batches[-1]
        where = keys = None
        row = {}
        if model.discriminator:
            for batch in batches:
                if batch is x and model.contrastive:  # D lowers it as often as the others do
                    with autocast(cfg):
                        where, keys = model.encode_keys(x, patches_wanted(cfg, step))
                with autocast(cfg):
                    terms = players(batch, where, keys, critic=True)
                row |= update(model, optimizer, terms)
            model.discriminator.requires_grad_(False)  # it is judge from here on
        with autocast(cfg):
            terms = players(x, where, keys)
        row |= update(model, optimizer, terms)
        if model.discriminator:
            model.discriminator.requires_grad_(True)
        if keys:
            model.enqueue(keys)
        # The average of a short run is not one of its start.
        update_average(model.averaged_decoder, model.decoder, min(cfg.ema, step / (step + 9)))
        rows.append(row)

        if step % cfg.log_every == 0 or step == total:
            log_training(folder, state, total, rows, data.batch_size)
            rows = []
        if step % cfg.eval_every == 0 or step == total:
            validate(cfg, model, images, folder, optimizer, state, judge)
        # After the validation, so that last.pt knows the best one; rows are logged by now.
        if not rows and time.perf_counter() > state["saved"] + SAVE_SECONDS:
            save(folder / "last.pt", cfg, model, optimizer, state)
            state["saved"] = time.perf_counter()
    save(folder / "last.pt", cfg, model, optimizer, state)


def update(model, optimizer, terms):
    """One step of Adam on the weighted terms of a player, Eqs. (5), (9) -> their means."""
    loss = sum(model.weights[name] * terms[name].mean() for name in model.weights if name in terms)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: values.detach().mean() for name, values in terms.items()}


def patches_wanted(cfg, step):
    """Whether local patches are contrasted at this step."""
    return cfg.patch_after is not None and step > cfg.patch_after


def fid_judge(cfg, images):
    """For --fid: the Inception network and what it sees in validation images; else None."""
    if not cfg.fid or processes()[0] > 0:
        return None
    inception = load_network(InceptionFeatures, INCEPTION_URL, "FID", cfg.device)
    if inception is None:
        return None
    valid = Batches(images.valid, 100, cfg.device, count=cfg.eval_images)
    return inception, feature_statistics(inception, (to_uint8(x) for x in valid))


# Changed from vae.py: distances and pictures; only FID says which step is best
def validate(cfg, model, images, folder, optimizer, state, judge):
    """Distances on validation images, figures, and with FID best.pt where it is the best so far.

    Process 0 does it while the others wait, and the clock of training stands still.
    """
    began = time.perf_counter()
    if processes()[0] == 0:
        valid = Batches(images.valid, cfg.batch_size, cfg.device, count=cfg.eval_images)
        with inference(cfg, model):
            row = distances(model, valid)
            if judge:
                inception, statistics = judge
                samples = sample_batches(model, min(cfg.fid, valid.count))
                row |= inception_metrics(inception, samples, {"valid": statistics})
            save_figures(cfg, model, images.valid, folder, f"{state['step']:06d}")
        log_row(folder, state, "valid", row)
        draw_curves(folder)
        if row.get("fid_valid", math.inf) < state["best"]:
            state["best"] = row["fid_valid"]
            save(folder / "best.pt", cfg, model, optimizer, state)
    barrier()
    state["start"] += time.perf_counter() - began


# ---- Evaluation ----------------------------------------------------------------------------------

# Changed from vae.py: pictures, codes and a probe instead of bounds
def evaluate(cfg, model, images, folder, state):
    """Rows of Tables 1 and 6, printed and in results.json, and the figures test.png.

    Beside each number stands how it was made.
    """
    if images.labels is not None:
        label_values(cfg, images, "train")  # a wrong flag is told before anything is written
    with inference(cfg, model):
        test = Batches(images.test, cfg.batch_size, cfg.device, count=cfg.eval_images)
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
        results |= {
            "clamp": cfg.clamp, "ema": cfg.ema,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds_1": seconds_to_sample(model, 1),
            "seconds_100": seconds_to_sample(model, 100),
            "step": state["step"], "train_seconds": state["seconds"],
            "device": cfg.device, "dtype": cfg.dtype,
        }
        save_figures(cfg, model, images.test, folder, "test")
        save_interpolations(cfg, model, images, folder)
        save_mixing(cfg, model, images, folder)
        save_editing(cfg, model, images, folder)
    results |= probe(cfg, model, images)
    write_results(folder, results)


def distances(model, batches, vgg=None):
    """x against x̂, means over a split: pixel and, with VGGFeatures, perceptual distance.

    Also the KL in nats per image and per latent dimension, and in how many dimensions it is above
    0.05 nats (our idea of "in use").
    """
    columns = {"pixel_distance": [], "perceptual_distance": [], "kl": []}
    for x in batches:
        mean, log_var = model.encoder(x)
        z = sample_code(mean, log_var) if model.cfg.draw_code else mean
        x_hat = model.decode(z)
        columns["pixel_distance"].append(pixel_distance(x, x_hat).cpu())
        columns["kl"].append(gaussian_kl(mean, log_var).cpu())
        if vgg:
            columns["perceptual_distance"].append(perceptual_distance(vgg, x, x_hat).cpu())
    kl = torch.cat(columns.pop("kl")).mean(0)  # (L,)
    means = {name: torch.cat(parts).mean().item() for name, parts in columns.items() if parts}
    results = {**means, "kl": kl.sum().item(), "kl_per_dim": kl.mean().item(),
               "active": (kl > 0.05).sum().item()}
    if not math.isfinite(sum(results.values())):
        raise FloatingPointError(f"the distances are not finite, {results}; "
                                 "the last checkpoint is kept")
    return results


# Changed from vae.py: of reconstructions too
def fid(cfg, model, images, test):
    """FID against train and test, Inception Score, of --fid samples and of reconstructions.

    Each test image is reconstructed once. {} without the network.
    """
    inception = load_network(InceptionFeatures, INCEPTION_URL, "FID", cfg.device)
    if inception is None:
        return {}
    references = reference_statistics(inception, images, cfg.device)
    results = inception_metrics(inception, sample_batches(model, cfg.fid), references)
    reconstructions = (to_uint8(model.reconstruct(x)) for x in test)
    for name, value in inception_metrics(inception, reconstructions, references).items():
        results[f"reconstruction_{name}"] = value
    return results


def label_values(cfg, images, split):
    """The labels of a split in --label_column -> int64 (N,).

    UserError where there is no such column, or --label_value is not in train.
    """
    labels = images.labels[split].reshape(len(images.labels[split]), -1)
    if cfg.label_column >= labels.shape[1]:
        raise UserError(f"--label_column {cfg.label_column}: the labels of {images.name} have "
                        f"columns 0 to {labels.shape[1] - 1}")
    labels = torch.from_numpy(labels[:, cfg.label_column].astype(np.int64))
    if split == "train" and cfg.label_value is not None and cfg.label_value not in labels:
        raise UserError(f"--label_value {cfg.label_value}: the labels of {images.name} are "
                        f"{labels.unique().tolist()}")
    return labels


def probe(cfg, model, images):
    """Table 6: test errors of a linear classifier on codes, and of the same on pixels, in percent.

    Codes are the means of q(z|x). It learns from 60,000 images, enough for a linear classifier, or
    from ten times --eval_images. {} without labels.
    """
    if images.labels is None:
        return {}
    most = {"train": min(60_000, 10 * (cfg.eval_images or 6000)), "test": cfg.eval_images}
    codes = {}
    pixels = {}
    labels = {}
    for split in ("train", "test"):
        batches = Batches(getattr(images, split), 500, cfg.device, count=most[split])
        with inference(cfg, model):
            codes[split] = torch.cat([model.encode(x) for x in batches])
            pixels[split] = torch.cat([x.flatten(1) for x in batches])
        labels[split] = label_values(cfg, images, split)[:batches.count].to(cfg.device)
    results = {"probe_images": len(codes["train"])}
    for name, features in (("probe", codes), ("pixels", pixels)):
        error, half_width = linear_probe(features["train"], labels["train"],
                                         features["test"], labels["test"])
        results[f"{name}_error_percent"] = error
        results[f"{name}_error_percent_ci95"] = half_width
    return results


# Changed from vae.py: codes instead of noise
def save_figures(cfg, model, images, folder, name):
    """samples/, 64 of them; reconstructions/, rows x, x̂, x, x̂ …"""
    x = next(iter(Batches(images, 32, cfg.device, count=32)))
    sampled = f"{name}-clamp.png" if cfg.clamp else f"{name}.png"
    reconstructed = f"{name}-draw.png" if cfg.draw_code else f"{name}.png"
    save_grid(folder / "samples" / sampled, model.sample(64))
    save_grid(folder / "reconstructions" / reconstructed, x, model.reconstruct(x))


def save_interpolations(cfg, model, images, folder):
    """interpolations/: one a row, between test images."""
    x = next(iter(Batches(images.test, 8, cfg.device, count=8)))
    x = x[torch.arange(8, device=x.device) % len(x)]  # of a small set, some twice
    rows = model.interpolate(x, x.roll(1, 0))
    save_grid(folder / "interpolations" / "test.png", rows.flatten(0, 1))


def save_mixing(cfg, model, images, folder):
    """mixing/: the top row's images put into those on the left (Figure 12)."""
    x = next(iter(Batches(images.test, 16, cfg.device, count=16)))
    x = x[torch.arange(16, device=x.device) % len(x)]  # of a small set, some twice
    left = x[:7]
    top = x[-7:]
    corner = torch.ones_like(x[:1])
    rows = torch.cat([left.unsqueeze(1), model.mix(left, top)], 1).flatten(0, 1)
    save_grid(folder / "mixing" / "test.png", torch.cat([corner, top, rows]))


def save_editing(cfg, model, images, folder):
    """editing/: rows x, then images at its code plus 0, ½, 1 … 3 times a direction.

    That of --label_value: the mean code of 20 training images that have it less that of 20 that
    have not. Nothing where there are no labels, or all are the same.
    """
    if images.labels is None:
        return
    labels = label_values(cfg, images, "train")
    value = labels.max().item() if cfg.label_value is None else cfg.label_value
    have = (labels == value).nonzero()[:20, 0]
    lack = (labels != value).nonzero()[:20, 0]
    others = (label_values(cfg, images, "test") != value).nonzero()[:8, 0]
    if len(lack) == 0 or len(others) == 0:
        return
    batches = []
    for array, index in ((images.train, have), (images.train, lack), (images.test, others)):
        batches.append(next(iter(Batches(array[index.numpy()], 20, cfg.device))))
    with_it, without_it, x = batches
    direction = model.encode(with_it).mean(0) - model.encode(without_it).mean(0)
    edited = model.edit(x, direction, [i / 2 for i in range(7)])
    rows = torch.cat([x.unsqueeze(1), edited], 1).flatten(0, 1)
    save_grid(folder / "editing" / f"test-{cfg.label_column}-{value}.png", rows)


# Copied from vae.py: save_grid
def save_grid(path, *images):
    """PNG of true pixel values, 8 images a row. Sets (B, C, H, W): row 1 of each, then row 2 …"""
    path.parent.mkdir(exist_ok=True)
    columns = min(8, len(images[0]))
    whole = len(images[0]) // columns * columns
    rows = torch.stack([x[:whole].unflatten(0, (-1, columns)) for x in images], 1)
    save_image((rows.flatten(0, 2) + 1) / 2, path, nrow=columns)


# --- same in every script -------------------------------------------------------------------------
# Flags, the run's folder and its files, precision, main: nothing of the model.

SCRIPT = Path(__file__).stem
SAVE_SECONDS = 60  # last.pt is saved at the first progress line after so long


class OneLineParser(argparse.ArgumentParser):
    """Tells of a wrong flag as of every other mistake."""

    def error(self, message):
        raise UserError(message)


def parse_flags(argv=None, run=None):
    """Command line -> Config, each field a flag; UserError for a wrong one.

    `run`, the flags of a run that goes on or is evaluated, are the defaults then. To type another
    value for one that is `fixed` is an error.
    """
    parser = OneLineParser(f"{SCRIPT}.py", description=__doc__.splitlines()[0],
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    fields = dataclasses.fields(Config)
    for f in fields:
        default = argparse.SUPPRESS if f.default is None else f.default  # the help says it
        options = {"default": default, "help": f.metadata["help"]}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", **options)
    if run:
        of_this_call = ("out_dir", "name", "resume", "eval", "device", "compile")
        parser.set_defaults(**{name: run[name] for name in run if name not in of_this_call})
    cfg = Config(**vars(parser.parse_args(argv)))
    for f in fields:
        value = getattr(cfg, f.name)
        low = f.metadata["low"]
        high = f.metadata["high"]
        if f.type in (int, float) and value is not None:
            if not low <= value <= high or math.isinf(value):
                wanted = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
                raise UserError(f"--{f.name} must be finite and {wanted}, not {value}")
        kept = run.get(f.name, f.default) if run and f.metadata["fixed"] else value
        if value != kept:
            raise UserError(f"this run's --{f.name} is {kept} and cannot become {value}")
    return cfg


def run_folder(cfg):
    """Where the run is kept: --name in --out_dir."""
    dataset = f"{Path(cfg.dataset).name}{cfg.size or ''}"
    return Path(cfg.out_dir, cfg.name or f"{SCRIPT}-{dataset}-{cfg.variant}-s{cfg.seed}")


def start_run(cfg, folder):
    """Make the folder of a new run, with config.json and an empty log -> its state.

    "best" is the lowest validation score; "start" and "saved" are times of the clock.
    """
    if processes()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                             capture_output=True, text=True)  # nothing, where there is no git
        made_by = {"command": shlex.join(sys.argv), "commit": git.stdout.strip(),
                   "torch": torch.__version__, "processes": processes()[1]}
        config = json.dumps({**dataclasses.asdict(cfg), **made_by}, indent=1)
        (folder / "config.json").write_text(config)
        (folder / "log.jsonl").write_text("")
    now = time.perf_counter()
    return {"step": 0, "best": math.inf, "seconds": 0.0, "start": now, "saved": now}


def restore(checkpoint, model, optimizer):
    """Load a checkpoint -> the run's state, its clock set anew."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    now = time.perf_counter()
    state = checkpoint["state"]
    return {**state, "start": now - state["seconds"], "saved": now}


def load_checkpoint(folder, best):
    """best.pt, where it is asked for and there, else last.pt; UserError if it cannot be read."""
    path = folder / "last.pt"
    if best and (folder / "best.pt").exists():
        path = folder / "best.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except FileNotFoundError:
        raise UserError(f"there is no {path} to go on from") from None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged, or no checkpoint of these scripts") from None
    if script != SCRIPT:
        raise UserError(f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    return checkpoint


def save(path, cfg, model, optimizer, state):
    """One checkpoint of tensors and plain types, by process 0.

    It is written aside and renamed, so `path` is never half a file.
    """
    if processes()[0] == 0:
        aside = path.with_suffix(".tmp")
        torch.save({"script": SCRIPT, "config": dataclasses.asdict(cfg), "state": state,
                    "model": model.state_dict(), "optimizer": optimizer.state_dict()}, aside)
        os.replace(aside, path)


def autocast(cfg):
    """The networks' precision, --dtype."""
    device = torch.device(cfg.device).type
    return torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == "bf16")


@contextlib.contextmanager
def inference(cfg, model):
    """Inside: no gradients, weights normalised once, noise that follows from --seed alone."""
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
    """What is trained, on what, where."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{parameters:,} trained parameters; {len(images.train)} images of {images.name}, "
          f"{images.shape}; {processes()[1]} x {cfg.device}, {cfg.dtype}; writing to {folder}")


def main(Model, argv=None):
    """Train and evaluate; with --eval evaluate. -> the exit code.

    2 for a user's mistake, 1 where a number is not finite, 130 for Ctrl-C.
    """
    try:
        cfg = parse_flags(argv)
        folder = run_folder(cfg)
        checkpoint = None
        if cfg.resume or cfg.eval:
            checkpoint = load_checkpoint(folder, best=cfg.eval)
            cfg = parse_flags(argv, checkpoint["config"])
        elif (folder / "last.pt").exists():
            raise UserError(f"{folder} holds a run: --resume goes on with it, --eval evaluates it, "
                            "--name NAME starts another")
        cfg.check()
        choose_device(cfg)
        images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
        torch.manual_seed(cfg.seed)
        model = Model(cfg, images.shape).to(cfg.device, memory_format=torch.channels_last)
        if not cfg.eval:
            print_header(cfg, folder, model, images)
            train(cfg, model, images, folder, checkpoint)
            barrier()  # process 0 has written
            checkpoint = load_checkpoint(folder, best=True)
        model.load_state_dict(checkpoint["model"])
        if processes()[0] == 0:
            evaluate(cfg, model, images, folder, checkpoint["state"])
        barrier()  # one that left would end the others
        print(f"written to {folder}")
        return 0
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint, if any", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(DCVAE))
