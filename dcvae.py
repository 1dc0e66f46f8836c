"""DC-VAE, with its ablations VAE, VAE/GAN and VAE-Contrastive on one backbone (Parmar et al. 2021).

    generative model   z ~ N(0, 1), x̃ = decoder(z)               p(x|z) is defined for --loss vae only: N(x̂, ½)
    inference model    q(z|x) = N(μ(x), σ²(x)), x̂ = decoder(z)   for z ~ q(z|x), in figures and evaluation z = μ(x)
    losses             --loss vae          pixel + kl            Eq. (1)
                       --loss vaegan       feature + gan + kl    Eqs. (3) to (5)
                       --loss contrastive  contrast + kl         Eqs. (6), (8)
                       --loss dcvae        contrast + gan + kl   Eq. (9)

Encoder and decoder minimise these. The discriminator D plays against them in gan, and lowers contrast as they do.

    python dcvae.py --small --steps 400              built-in shapes, ten minutes on a laptop
    python dcvae.py --dataset cifar10                the paper's size, for a GPU; Table 1 reports FID 17.9
    python dcvae.py --dataset mnist --latent 16      representation: Table 6 reports 1.30 % errors of a linear classifier

arXiv:2011.10063. Derivation, logged keys, differences from the paper: docs/dcvae.md. All equations: docs/equations.md. Results:
docs/results.md.

    B batch · C, H, W channels, height, width of x · L latent dimensions · K negatives
    x, x̂, x̃ (B, C, H, W) image, reconstruction, sample in [-1, 1] · z (B, L) latent · D(x) (B,) score, > 0: looks real
"""

import argparse, contextlib, copy, dataclasses, json, math, os, pickle, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached
from torchvision.utils import save_image

from common import (Batches, UserError, barrier, command_line, draws, explain, feature_statistics, gathered, inception_metrics, join_processes,
                    levels, load_images, load_inception, load_vgg, merged, perceptual_distance, pixel_distance, processes,
                    quantize, reference_statistics, seconds_to_sample, seed_noise, shared, summed, to_uint8)

# ---- Config ----------------------------------------------------------------------------------------------------------
# Copied from vae.py: flag
def flag(default, help, **metadata):
    """A Config field: its default and help; in metadata its `choices`, or `low`, the least value allowed (default 1)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})

# Changed from vae.py: four losses, the discriminator's game, the contrast
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the released code's for CIFAR-10, and the paper's K; where these differ: docs/dcvae.md, section 11."""
    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, or a folder of images")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    size: int = flag(None, "side of the images in pixels, a multiple of 8 (default: the dataset's own)")
    loss: str = flag("dcvae", "the four models of Table 1", choices=("vae", "vaegan", "contrastive", "dcvae"))
    latent: int = flag(128, "dimensions of z")
    small: bool = flag(False, "the same networks narrowed for a laptop CPU")
    epochs: int = flag(800, "passes over the training images by D; encoder and decoder learn from 1 in --d_steps of them")
    steps: int = flag(None, "training steps, each one update of encoder and decoder (overrides --epochs)")
    accumulate: int = flag(1, "parts that an update is computed in, one after another, for less memory; batch norm sees a part at a time")
    batch_size: int = flag(64, "images an update, all processes together")  # NOTE(paper): 128 in 5.1; the release takes 64 images, and 128 samples
    d_steps: int = flag(5, "updates of the discriminator a step, each on a batch of its own; --loss contrastive has 1")
    lr: float = flag(2e-4, "Adam's learning rate, constant", low=0)
    kl_weight: float = flag(None, "of the KL, per image (default 6.4e-5, --loss vae 1)", low=0)
    gan: str = flag("hinge", "set-level loss: hinge, as released, or log, as in Eq. (4)", choices=("hinge", "log"))
    negatives: int = flag(8096, "K, the images that the right one is told from")
    temperature: float = flag(0.07, "of the contrast", low=1e-3)
    momentum: float = flag(0.999, "of the average of the discriminator that embeds real images for the contrast", low=0)
    contrast_layers: str = flag("b1,final", "where the contrast is taken: blocks b1 … b4 and final, the last features")
    patch_after: int = flag(None, "steps until local patches are contrasted too (default: never)", low=0)
    ema: float = flag(0.999, "of the decoder's average, which draws all figures and is evaluated", low=0)
    seed: int = flag(0, "seed of initialisation, batches and noise", low=0)
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto", "of the networks; losses are fp32. auto: bf16 on cuda, from Ampere on", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(None, "torch.compile the losses (default: on cuda, from Ampere on, under Linux)")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    resume: bool = flag(False, "continue the run in that folder")
    eval: bool = flag(False, "evaluate the run in that folder, no training")
    log_every: int = flag(50, "steps between progress lines")
    eval_every: int = flag(1000, "steps between validations, with figures")
    save_every: int = flag(1000, "steps between checkpoints")
    fid: int = flag(None, "samples for FID, which chooses best.pt, and Inception Score; with perceptual distance (default: none)")
    inception_weights: str = flag(None, "Inception weights for --fid (default: downloaded to --data_dir)")
    vgg_weights: str = flag(None, "VGG-16 weights for --fid (default: downloaded to --data_dir)")
    clamp: bool = flag(False, "samples: z limited to [-1, 1], as the release evaluates")
    draw_code: bool = flag(False, "reconstructions: z drawn from q(z|x), not its mean")
    label_column: int = flag(0, "probe and editing: which column of the labels, where there are several", low=0)
    label_value: int = flag(None, "editing: the label that is added (default: the largest)", low=0)
    free = "vgg_weights clamp draw_code label_column label_value"  # flags of the evaluation

    def __post_init__(self):
        if self.kl_weight is None:
            # NOTE(paper): Eqs. (3), (8) have 1, at which the KL takes back what the contrast gives. Released: 1e-6 on a sum over 64
            # images, 6.4e-5 on their mean.
            self.kl_weight = 1.0 if self.loss == "vae" else 6.4e-5

    @property
    def variant(self):
        return f"{self.loss}-z{self.latent}" + "-small" * self.small

# ---- Building blocks: residual blocks down, AutoGAN's cells up (A.5, Figure 15) -------------------------------------------
class DownBlock(nn.Module):
    """Residual block with spectral norm: (B, c_in, H, W) -> (B, c_out, H, W), with `halve` (B, c_out, H/2, W/2).

    Each 3x3 conv has its ReLU before it, but for the first one of the `first` block, which sees an image.
    """
    def __init__(self, c_in, c_out, first=False, halve=False):
        super().__init__()
        self.first, self.halve = first, halve
        self.conv1 = spectral_norm(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(c_in, c_out, 1)) if halve else nn.Identity()

    def forward(self, h):
        out = self.conv2(F.relu(self.conv1(h if self.first else F.relu(h))))
        if self.halve:
            out, h = F.avg_pool2d(out, 2), F.avg_pool2d(h, 2)  # a 1x1 conv of means is the mean of 1x1 convs, and cheaper
        return out + self.shortcut(h)

def down_blocks(channels, width):
    """The four blocks of encoder and discriminator: (B, C, H, W) -> (B, width, H/4, W/4)."""
    return nn.ModuleList([DownBlock(channels, width, first=True, halve=True), DownBlock(width, width, halve=True),
                          DownBlock(width, width), DownBlock(width, width)])

class UpCell(nn.Module):
    """AutoGAN's cell: doubles the side of h (B, width, H, W) and adds what earlier cells found at their sizes.

    Returns its output and `skip`, what its second conv sees before the ReLU, which contains the skips of the cells before it.
    """
    def __init__(self, width, mode, earlier, shortcut):
        super().__init__()
        self.mode = mode
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(earlier))
        self.shortcut = nn.Conv2d(width, width, 1) if shortcut else None

    def forward(self, h, skips):
        size = (2 * h.shape[2], 2 * h.shape[3])
        enlarge = lambda map: F.interpolate(map, size=size, mode=self.mode)
        skip = self.conv1(enlarge(F.relu(h)))
        for conv, earlier in zip(self.skips, skips):
            skip = skip + enlarge(conv(earlier))  # enlarged after the 1x1 conv: the same values, less work
        out = self.conv2(F.relu(skip))
        return (out if self.shortcut is None else out + enlarge(self.shortcut(h))), skip

# ---- Networks --------------------------------------------------------------------------------------------------------
FEATURES = 16  # "the contrastive embedding dimension" (5.1), and what D's score is computed from
BLOCKS = ("b1", "b2", "b3", "b4")

def pool(h):
    """ReLU and 64 times the mean over the map: (B, width, H, W) -> (B, width). For 32x32 images the released sum over 8x8; larger
    ones keep its scale, or log σ² would start beyond its bound."""
    return 64 * F.relu(h).mean((2, 3))

# Changed from vae.py: residual blocks with spectral norm, z is a vector
class Encoder(nn.Module):
    """q(z|x) = N(μ, σ²): x (B, C, H, W) -> μ and log σ² (B, L), fp32. log σ² is cut at 20, long before exp overflows."""
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
        raise UserError(f"size {size} is no multiple of 8, as three doublings need: take 32, 48 …")
    return size // 8

# Changed from vae.py: AutoGAN's generator
class Decoder(nn.Module):
    """z (B, L) -> image (B, C, size, size) in [-1, 1], fp32. One batch norm, before the last conv."""
    def __init__(self, latent, width, channels, size):
        super().__init__()
        side = start_side(size)
        self.enter = nn.Sequential(nn.Linear(latent, width * side**2), nn.Unflatten(1, (width, side, side)))
        # modes, earlier cells, shortcuts: as AutoGAN's search found them
        self.cells = nn.ModuleList([UpCell(width, "nearest", 0, True), UpCell(width, "bilinear", 1, True),
                                    UpCell(width, "nearest", 2, False)])
        self.leave = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1))
        for layer in self.modules():  # Xavier as released: here and in D's heads, as it does not reach layers with spectral norm
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, z):
        h, skips = self.enter(z), []
        for cell in self.cells:
            h, skip = cell(h, skips)
            skips.append(skip)
        return torch.tanh(self.leave(h).float())

class Discriminator(nn.Module):
    """Image (B, C, size, size) -> score D(x) (B,), > 0 for real, and features for the contrast, {layer: (B, features)} (4.2).

    `final` are the 16 values that the score is computed from. A block in `layers` has a head, 1x1 conv to one channel and linear
    to 16 (deep supervision), unless `heads` is False. With `where`, (4, 2) in [0, 1), patch_b1 … are each block's channels at one
    place (local patches).
    """
    def __init__(self, channels, width, size, layers):
        super().__init__()
        self.blocks = down_blocks(channels, width)
        self.linear = spectral_norm(nn.Linear(width, FEATURES, bias=False))
        self.score = spectral_norm(nn.Linear(FEATURES, 1))
        area = {name: (size // (2 if name == "b1" else 4))**2 for name in BLOCKS}  # of a block's output, in its pixels
        self.heads = nn.ModuleDict({
            name: nn.Sequential(nn.Conv2d(width, 1, 1), nn.Flatten(), nn.Linear(area[name], FEATURES, bias=False))
            for name in layers if name in BLOCKS})
        for head in self.heads.values():
            nn.init.xavier_uniform_(head[0].weight)

    def forward(self, h, where=None, heads=True):
        features = {}
        for i, (name, block) in enumerate(zip(BLOCKS, self.blocks)):
            h = block(h)
            if heads and name in self.heads:
                features[name] = self.heads[name](h)
            if where is not None:
                row, column = (where[i] * h.shape[2]).long().unsqueeze(1)  # (1,) each: a number would be read on the host
                features[f"patch_{name}"] = h[:, :, row, column].squeeze(2)
        features["final"] = self.linear(pool(h))
        return self.score(features["final"]).squeeze(1).float(), features

# ---- Losses: KL, contrast, gan, all fp32; pixel and feature, Eqs. (1), (3), are a line each in DCVAE.terms -------------------
def gaussian_kl(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, 1)) of each dimension, ½ (μ² + σ² - 1 - log σ²): (B, L) twice -> (B, L) in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)

def sample_code(mean, log_var):
    """z = μ + σε, ε ~ N(0, 1): (B, L) twice -> (B, L)."""
    return mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)

def info_nce(query, positive, negatives, temperature):
    """-log of the share that the positive has in Σ_j exp(cos(query, key_j)/τ) (Eq. (6)), and whether it is the most similar.

    query (B, d) of any length; positive (B, d) and negatives (K, d), each of length 1 -> nats (B,), 1 or 0 (B,). Pure guessing has
    log(1 + K).
    """
    with torch.autocast(query.device.type, enabled=False):  # cosines in fp32: bf16 would round them to 1/256
        query = F.normalize(query.float(), dim=1)
        similarity, others = (query * positive).sum(1), query @ negatives.T  # (B,), (B, K)
        # NOTE(paper): Eq. (6) has no temperature. Cosines lie between -1 and 1: without one, the right of 8097 keys could have a
        # share of e/(e + 8096/e) at most, e²/8096, and the loss could not fall by more than 2 nats.
        logits = torch.cat([similarity.unsqueeze(1), others], 1) / temperature
        return torch.logsumexp(logits, 1) - logits[:, 0], (similarity > others.amax(1)).float()

def discriminator_gan(kind, real, reconstructed, sampled):
    """What D minimises: scores (B,) of real images, reconstructions, samples -> (B,). log: minus Eq. (4), its D(x) = σ(score)."""
    if kind == "log":
        return F.softplus(-real) + F.softplus(sampled) + F.softplus(reconstructed)
    # NOTE(paper): the release trains by hinge losses, as AutoGAN does, and weighs both kinds of fakes by one half.
    return F.relu(1 - real) + 0.5 * F.relu(1 + sampled) + 0.5 * F.relu(1 + reconstructed)

def generator_gan(kind, reconstructed, sampled):
    """What encoder and decoder minimise: scores of reconstructions (B,) and of any number of samples -> (B,). log: Eq. (4)."""
    if kind == "log":
        return -F.softplus(reconstructed) - F.softplus(sampled).mean()
    return -0.5 * reconstructed - 0.5 * sampled.mean()

@torch.no_grad()
def update_average(average, model, decay):
    """average ← decay·average + (1 - decay)·model: parameters and buffers, so batch norm's statistics and spectral norm's vectors too."""
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values()):
        slow.lerp_(fast, 1 - decay) if slow.is_floating_point() else slow.copy_(fast)

# ---- The model -------------------------------------------------------------------------------------------------------
# Changed from vae.py: AutoGAN's
WIDTHS = {"full": (256, 128), "small": (32, 32)}  # channels of the decoder; of encoder and discriminator

def contrast_layers(cfg):
    """--contrast_layers as a tuple. UserError for one that does not exist."""
    layers = tuple(cfg.contrast_layers.split(","))
    if not set(layers) <= {*BLOCKS, "final"} or len(set(layers)) < len(layers):
        raise UserError(f"--contrast_layers {cfg.contrast_layers}: take some of {','.join(BLOCKS)},final, each once, with commas")
    return layers

class DCVAE(nn.Module):
    """The networks that --loss needs, for images of shape (C, H, W), H = W a multiple of 8 (else UserError)."""
    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        self.cfg = cfg
        self.adversarial, self.contrastive = cfg.loss in ("vaegan", "dcvae"), cfg.loss in ("contrastive", "dcvae")
        self.weights = dict.fromkeys(["pixel", "feature", "contrast", "gan", "d_gan", "d_contrast"], 1) | {"kl": cfg.kl_weight}
        decoder_width, width = WIDTHS["small" if cfg.small else "full"]
        self.encoder = Encoder(channels, width, cfg.latent)
        self.decoder = Decoder(cfg.latent, decoder_width, channels, size)
        # NOTE(paper): A.5 contrasts the second block and the last features; the release trains with the first block, as here.
        self.layers = contrast_layers(cfg) if self.contrastive else ()
        self.discriminator = Discriminator(channels, width, size, self.layers) if cfg.loss != "vae" else None
        self.averaged_decoder = copy.deepcopy(self.decoder).requires_grad_(False)
        if self.contrastive:  # keys come from a slow copy of D, so that those in the queue fit together (He et al. 2020)
            self.momentum_discriminator = copy.deepcopy(self.discriminator).requires_grad_(False)
            widths = dict.fromkeys(self.layers, FEATURES)
            if cfg.patch_after is not None:
                widths |= {f"patch_{name}": width for name in BLOCKS}
            self.queue = nn.ParameterDict({name: F.normalize(torch.randn(cfg.negatives, d), dim=1) for name, d in widths.items()})
            self.queue.requires_grad_(False)  # random directions at first; later also older keys of x itself, as released
            self.register_buffer("queued", torch.tensor(0))  # keys so far, modulo K: where the oldest is
        self.train()

    def train(self, mode=True):
        """As nn.Module.train, but the averaged decoder always uses its averaged batch statistics."""
        super().train(mode)
        self.averaged_decoder.eval()
        return self

    # -- losses ----------------------------------------------------------------------------------------------------------
    def terms(self, x, where=None, keys=None):
        """What encoder and decoder minimise: x (B, C, H, W) -> {name: (B,)}, as they are; `train` weighs them by `self.weights`.

        --loss vae: pixel, kl; vaegan: feature, gan, kl; contrastive: contrast, kl; dcvae: contrast, gan, kl. Noise is drawn in this
        order: that of z, then, for gan, 2B codes of samples, twice as many as reconstructions, as released. `where` and `keys`, for
        the losses with a contrast, are those of `encode_keys`.
        """
        mean, log_var = self.encoder(x)
        z, kl = sample_code(mean, log_var), gaussian_kl(mean, log_var).sum(1)
        if self.cfg.loss == "vae":  # Eq. (1): -log p(x|z) but for a constant, p(x|z) = N(x̂, ½)
            return {"pixel": (x - self.decoder(z)).square().sum((1, 2, 3)), "kl": kl}
        samples = 2 * len(x) if self.adversarial else 0
        scores, features = self.discriminator(self.decoder(torch.cat([z, torch.randn(samples, z.shape[1], device=x.device)])), where)
        features = {name: values[:len(x)].float() for name, values in features.items()}  # of x̂
        if self.cfg.loss == "vaegan":  # Eqs. (3), (4)
            with torch.no_grad():
                target = self.discriminator(x)[1]["final"].float()
            # NOTE(paper): Eq. (5) has max over D of the feature distance too, which has no upper limit: here D plays in gan alone.
            return {"feature": (target - features["final"]).square().sum(1),
                    "gan": generator_gan(self.cfg.gan, scores[:len(x)], scores[len(x):]), "kl": kl}
        contrast, _ = self.contrast(features, keys)
        if self.cfg.loss == "contrastive":  # Eqs. (6), (8)
            return {"contrast": contrast, "kl": kl}
        return {"contrast": contrast, "gan": generator_gan(self.cfg.gan, scores[:len(x)], scores[len(x):]), "kl": kl}  # Eqs. (6), (4), (8)

    def discriminator_terms(self, x, where=None, keys=None):
        """What D minimises, d_gan and, where keys are given, d_contrast; beside them its health: x -> {name: (B,)}.

        For gan: the scores real, reconstructed, sampled, and d_gan, of as many samples as reconstructions. Where keys are given:
        d_contrast and accuracy, the two results of `contrast`. Noise: that of z, then the samples' codes.
        """
        with torch.no_grad():  # neither encoder nor decoder learns here
            z = sample_code(*self.encoder(x))
            fakes = self.decoder(torch.cat([z, torch.randn_like(z)]) if self.adversarial else z)
        scores, features = self.discriminator(torch.cat([fakes, x]) if self.adversarial else fakes, where, heads=keys is not None)
        terms = {}
        if self.adversarial:
            reconstructed, sampled, real = scores.chunk(3)
            terms = {"real": real, "reconstructed": reconstructed, "sampled": sampled,
                     "d_gan": discriminator_gan(self.cfg.gan, real, reconstructed, sampled)}
        if keys:
            # NOTE(paper): Eq. (9) has max over D of all terms, but a critic that learns log p(x|z) must lower the contrast (Eq. (7)).
            features = {name: values[:len(x)] for name, values in features.items()}  # of reconstructions
            terms["d_contrast"], terms["accuracy"] = self.contrast(features, keys)
        return terms

    def contrast(self, features, keys):
        """InfoNCE of reconstructions' features {layer: (B, d)} against `keys` of their originals -> nats, hits (B,): means over
        --contrast_layers. Its average over images and draws is Eq. (7). The mean over patches comes on top (4.2)."""
        pairs = {name: info_nce(features[name], key, self.queue[name], self.cfg.temperature) for name, key in keys.items()}
        losses, hits = zip(*(pairs[name] for name in self.layers))
        patches = [loss for name, (loss, _) in pairs.items() if name.startswith("patch_")]
        return torch.stack(losses).mean(0) + (torch.stack(patches).mean(0) if patches else 0), torch.stack(hits).mean(0)

    @torch.no_grad()
    def encode_keys(self, x, patches=False):
        """Move the momentum network by one step of its average; real images' keys from it: x (B, C, H, W) -> place of the patches
        (4, 2) or None, {layer: (B, d)}."""
        update_average(self.momentum_discriminator, self.discriminator, self.cfg.momentum)
        where = torch.rand(len(BLOCKS), 2, device=x.device) if patches else None  # for the whole batch; the queue's are of earlier places
        features = self.momentum_discriminator(x, where)[1]
        return where, {name: F.normalize(features[name].float(), dim=1) for name in self.queue if name in features}

    @torch.no_grad()
    def enqueue(self, keys):
        """Put keys {layer: (B, d)}, with those of the other processes, in place of the oldest negatives."""
        keys = {name: gathered(key) for name, key in keys.items()}
        count = min(self.cfg.negatives, *map(len, keys.values()))
        at = (self.queued + torch.arange(count, device=self.queued.device)) % self.cfg.negatives
        for name, key in keys.items():
            self.queue[name][at] = key[-count:]
        self.queued.add_(count).remainder_(self.cfg.negatives)

    # -- images ----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def decode(self, z):
        """z (…, L) -> images by the averaged decoder (…, C, H, W), on the 256-level grid."""
        return quantize(self.averaged_decoder(z.flatten(0, -2))).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def encode(self, x, draw=False):
        """The mean of q(z|x) or a draw from it: (B, C, H, W) -> (B, L)."""
        mean, log_var = self.encoder(x)
        return sample_code(mean, log_var) if draw else mean

    def sample(self, n):
        """z ~ N(0, 1), with --clamp limited to [-1, 1] -> (n, C, H, W), on the 256-level grid."""
        z = torch.randn(n, self.cfg.latent, device=next(self.parameters()).device)
        return self.decode(z.clamp(-1, 1) if self.cfg.clamp else z)

    def reconstruct(self, x):
        """x̂ from the mean of q(z|x), with --draw_code from a draw: (B, C, H, W) -> same, on the 256-level grid."""
        return self.decode(self.encode(x, self.cfg.draw_code))

    def interpolate(self, x1, x2, steps=8):
        """Images along the line between the codes of x1 and x2 (A.2): (B, C, H, W) -> (B, steps, C, H, W)."""
        z1, z2 = self.encode(x1), self.encode(x2)
        return self.decode(torch.stack([torch.lerp(z1, z2, i / (steps - 1)) for i in range(steps)], 1))

    def mix(self, x1, x2):
        """Each x1's code with a random half of its dimensions, the same half for all pairs, from each x2's (Figure 12):
        (B1, C, H, W), (B2, C, H, W) -> (B1, B2, C, H, W)."""
        from_x2 = torch.randperm(self.cfg.latent, device=x1.device) < self.cfg.latent // 2
        return self.decode(torch.where(from_x2, self.encode(x2), self.encode(x1).unsqueeze(1)))

    def edit(self, x, direction, amounts):
        """Images at x's code plus amounts times `direction` (L,) (A.2): (B, C, H, W) -> (B, len(amounts), C, H, W)."""
        z = self.encode(x)
        return self.decode(torch.stack([z + amount * direction for amount in amounts], 1))

# ---- Training --------------------------------------------------------------------------------------------------------
# Changed from vae.py: two players, no bound
def train(cfg, model, images, folder, checkpoint):
    """The game of Eq. (9), or the part of it that --loss has, Eqs. (2), (5). Returns False where Ctrl-C or SIGTERM ended it early.

    A step is --d_steps updates of D (--loss contrastive: one; vae: none), each on a batch of its own, then one of encoder and decoder
    on the last of these batches, D's weights being frozen. For a contrast, `encode_keys` makes the keys of that last batch before D's
    last update, which has them too; `enqueue` takes them at the end of the step.
    """
    rank, world = processes()
    d_steps = cfg.d_steps if model.adversarial else 1
    batch_size = min(cfg.batch_size, max(1, len(images.train) // d_steps))
    data = Batches(images.train, d_steps * batch_size, cfg.device, cfg.seed, parts=d_steps * world * cfg.accumulate)  # no augmentation, as released
    valid = Batches(images.valid, cfg.batch_size, cfg.device)
    total = cfg.steps or cfg.epochs * data.per_epoch
    inception = load_inception(cfg.inception_weights, cfg.data_dir, cfg.device) if cfg.fid else None
    references = {"valid": feature_statistics(inception, levels(valid))} if inception else {}
    if world > 1 and valid.device.type == "cuda":  # there is none for CPUs, and torch.compile cannot trace it
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        cfg = dataclasses.replace(cfg, compile=False)
    # One Adam for both players: it skips what has no gradient, and counts each parameter's updates for itself.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, betas=(0.0, 0.9))
    state, rows = restore(cfg, folder, checkpoint, model, optimizer), []
    terms_of = prepared(cfg, model.terms, model.encoder, model.decoder)
    if model.discriminator:  # parts of it are unused in some losses
        discriminator_terms_of = prepared(cfg, model.discriminator_terms, model.discriminator, find_unused_parameters=True)

    def update(function, x, where, keys):
        """One step of Adam for the player whose losses `function` computes."""
        optimizer.zero_grad()
        row, parts = {}, cfg.accumulate
        for i, part in enumerate(x.chunk(parts)):
            with autocast(cfg):
                terms = function(part, where, keys and {name: key.chunk(parts)[i] for name, key in keys.items()})
            loss = sum(weight * terms[name].mean() for name, weight in model.weights.items() if name in terms) / parts  # Eqs. (5), (9): sums
            loss.backward()
            row = {name: row.get(name, 0) + values.detach().mean() / parts for name, values in terms.items()}
        optimizer.step()
        rows[-1] |= row

    with stop_requests() as stop:
        for step in range(state["step"] + 1, total + 1):
            seed_noise(cfg.seed, step, rank)
            rows.append({})
            where, keys = None, None
            for i, x in enumerate(data.batch(step - 1, rank, world).chunk(d_steps), 1):
                if model.discriminator:
                    if model.contrastive and i == d_steps:  # D lowers the contrast as often as encoder and decoder do
                        with autocast(cfg):
                            where, keys = model.encode_keys(x, cfg.patch_after is not None and step > cfg.patch_after)
                    update(discriminator_terms_of, x, where, keys)
            if model.discriminator:  # it is judge here: no gradients of its weights
                model.discriminator.requires_grad_(False)
            update(terms_of, x, where, keys)
            if model.discriminator:
                model.discriminator.requires_grad_(True)
            if keys:
                model.enqueue(keys)
            update_average(model.averaged_decoder, model.decoder, min(cfg.ema, step / (step + 9)))  # a short run's is not of its start
            state["step"] = step
            log, validate, keep = (step == total or step % n == 0 for n in (cfg.log_every, cfg.eval_every, cfg.save_every))
            stopping = asked(stop)
            if log or validate or keep or stopping:  # training waits for the device here only, and stops if not finite
                report(folder, state, "train", rows, total, data)
                rows = []
                for buffer in model.averaged_decoder.buffers():  # on CPUs batch norm's statistics are of each process's own share
                    buffer.copy_(summed(buffer) / world)
            if validate:
                with inference(cfg), evaluating(model):
                    row = distances(model, valid)
                    if inception:
                        row |= inception_metrics(inception, draws(model, min(cfg.fid, len(images.valid))), references)
                    report(folder, state, "valid", [row], total, data)
                    if rank == 0:
                        draw(cfg, model, images.valid, folder, f"{step:06d}")
                if row.get("fid_valid", math.inf) < state["best"]:  # without FID no number says which step is best
                    state["best"] = row["fid_valid"]
                    save(folder / "best.pt", cfg, model, optimizer, state)
                state["seconds"] = time.perf_counter() - state["start"]  # images/s counts neither validation nor figures
            if keep or stopping:
                save(folder / "last.pt", cfg, model, optimizer, state)
            if stopping:
                return step == total
    return True

@contextlib.contextmanager
def evaluating(model):
    """Inside, batch norm uses its averages, and spectral norm leaves its vectors as they are."""
    model.eval()
    try:
        yield
    finally:
        model.train()

# Copied from vae.py: stop_requests
@contextlib.contextmanager
def stop_requests():
    """Inside, Ctrl-C and SIGTERM fill the list that is yielded, so that the step is finished; a second one kills."""
    requests = []
    note = lambda number, frame: requests.append(number) or signal.signal(number, signal.SIG_DFL)  # (append returns None)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# Copied from vae.py: asked
def asked(stop):
    """Whether any process was asked to stop. They agree on it each step, from CPU to CPU: no device is waited for."""
    return summed(torch.tensor(len(stop))).item() > 0

# Copied from vae.py: autocast
def autocast(cfg):
    """The networks' precision, --dtype."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bf16")

# Copied from vae.py: inference
@contextlib.contextmanager
def inference(cfg):
    """No gradients, noise that follows from --seed alone, and normalised weights computed once, not in every pass."""
    with torch.no_grad(), autocast(cfg), cached():
        torch.manual_seed(cfg.seed)
        yield

# Copied from vae.py: prepared
def prepared(cfg, function, *parts, **options):
    """`function`, compiled with --compile; under torchrun its gradients for `parts` are averaged over all processes."""
    if cfg.compile:
        function = torch.compile(function, fullgraph=True)
    if processes()[1] == 1:
        return function
    module = nn.ModuleList(parts)  # DistributedDataParallel takes a module: one that holds `parts`, and whose forward is `function`
    module.forward = function
    return DistributedDataParallel(module, **options)

# Changed from vae.py: losses of two players, a curve for each, no bound
def report(folder, state, split, rows, total, data):
    """Means of rows [{key: value}] over steps and processes, for the console, log.jsonl and curves.png.

    Raises FloatingPointError, naming step and keys, where a row is not finite.
    """
    values = torch.stack([torch.stack([torch.as_tensor(value) for value in row.values()]) for row in rows])
    values = (summed(values) / processes()[1]).tolist()
    for step, row in enumerate(values, state["step"] - len(rows) + 1):
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(f"step {step} is not finite, {dict(zip(rows[0], row))}; the last checkpoint is kept")
    means = {name: sum(column) / len(rows) for name, column in zip(rows[0], zip(*values))}
    step, before = state["step"], state["seconds"]
    state["seconds"] = time.perf_counter() - state["start"]
    if processes()[0]:
        return
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "split": split, **means, "seconds": state["seconds"]}) + "\n")
    rate = len(rows) * data.batch_size / (state["seconds"] - before)
    spent, left = (timedelta(seconds=int(state["seconds"] * n / step)) for n in (step, total - step))
    screen = sys.stdout.isatty()  # there, a train line overwrites the one before
    print("\r\033[K" * screen + f"epoch {(step - 1) // data.per_epoch + 1}  step {step}/{total}  {split} "
          + "  ".join(f"{name} {value:.3g}" for name, value in means.items())
          + (f"  {rate:.0f} img/s  {spent} < {left}" if split == "train" else ""),
          end="" if screen and split == "train" and step < total else "\n", flush=True)
    if split == "valid":
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        keys = list(dict.fromkeys(key for r in records for key in r if not key.endswith(("step", "split", "seconds", "images"))))
        height = math.ceil(len(keys) / 4)
        figure = Figure(figsize=(12, 2.5 * height))
        figure.suptitle("training blue, validation orange")
        for key, axes in zip(keys, figure.subplots(height, 4, squeeze=False, gridspec_kw={"hspace": 0.35, "wspace": 0.35}).flat):
            for name, colour in (("train", "C0"), ("valid", "C1")):
                steps = [(r["step"], r[key]) for r in records if r["split"] == name and key in r]
                if steps:
                    axes.plot(*zip(*steps), marker=".", color=colour)
            axes.set_title(key)
        figure.savefig(folder / "curves.png")

# ---- Evaluation ------------------------------------------------------------------------------------------------------
def distances(model, batches, vgg=None):
    """x against x̂, means over a split: pixel and, with VGGFeatures, perceptual distance; the KL in nats per image and per latent
    dimension, and in how many dimensions it is above 0.05 nats (our idea of "in use")."""
    rows = {}
    for i, x in shared(batches):
        mean, log_var = model.encoder(x)
        x_hat = model.decode(sample_code(mean, log_var) if model.cfg.draw_code else mean)
        rows[i] = {"pixel_distance": pixel_distance(x, x_hat).cpu(), "kl": gaussian_kl(mean, log_var).cpu()}
        if vgg:
            rows[i]["perceptual_distance"] = perceptual_distance(vgg, x, x_hat).cpu()
    rows = merged(rows).values()
    means = {name: torch.cat([row[name] for row in rows]).mean(0) for name in next(iter(rows))}
    kl = means.pop("kl")  # (L,)
    return {**{name: value.item() for name, value in means.items()},
            "kl": kl.sum().item(), "kl_per_dim": kl.mean().item(), "active": (kl > 0.05).sum().item()}

def factor(cfg, images, split):
    """The labels of a split in --label_column -> int64 (N,). UserError where there is no such column, or --label_value is not in train."""
    labels = images.labels[split].reshape(len(images.labels[split]), -1)
    if cfg.label_column >= labels.shape[1]:
        raise UserError(f"--label_column {cfg.label_column}: the labels of {images.name} have columns 0 to {labels.shape[1] - 1}")
    labels = torch.from_numpy(labels[:, cfg.label_column].astype(np.int64))
    if split == "train" and cfg.label_value is not None and cfg.label_value not in labels:
        raise UserError(f"--label_value {cfg.label_value}: the labels of {images.name} are {labels.unique().tolist()}")
    return labels

def linear_probe(train, train_labels, test, test_labels, epochs=20):
    """Errors in percent of a linear classifier of features (N, d), labels (N,) int64, on the test set -> mean over five seeds, half
    the width of its 95 % interval (Table 6, whose 5 trials may be of the whole model): softmax regression on standardised features
    by Adam, rate 0.01 falling to 0."""
    mean, sd = train.mean(0), train.std(0).clamp(min=0.01)  # no division by 0 where a feature is constant
    train, test = (train - mean) / sd, (test - mean) / sd
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        linear = nn.Linear(train.shape[1], int(train_labels.max()) + 1).to(train.device)
        optimizer = torch.optim.Adam(linear.parameters())
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - epoch / epochs)
            for index in torch.randperm(len(train), device=train.device).split(500):
                loss = F.cross_entropy(linear(train[index]), train_labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        errors.append(100 * (linear(test).argmax(1) != test_labels).double().mean())
    errors = torch.stack(errors)
    return errors.mean().item(), 2.776 * errors.std().item() / len(errors)**0.5  # Student's t for five seeds

def probe(cfg, model, images):
    """Table 6: test errors of a linear classifier on codes, the means of q(z|x), and of the same on pixels; {} without labels."""
    if images.labels is None:
        return {}
    codes, pixels, labels = {}, {}, {}
    for split in ("train", "test"):
        with inference(cfg), evaluating(model):
            batches = Batches(getattr(images, split)[:60_000], 500, cfg.device)  # enough for a linear classifier
            codes[split] = torch.cat([model.encode(x) for x in batches])
            pixels[split] = torch.cat([x.flatten(1) for x in batches])
        labels[split] = factor(cfg, images, split)[:60_000].to(cfg.device)
    results = {}
    for name, features in ("probe", codes), ("pixels", pixels):
        error, half = linear_probe(features["train"], labels["train"], features["test"], labels["test"])
        results |= {f"{name}_error_percent": error, f"{name}_error_percent_ci95": half}
    return results

# Changed from vae.py: codes instead of noise
def draw(cfg, model, images, folder, name):
    """The figures `name`: samples/, 64 draws; reconstructions/, rows x, x̂, x, x̂ …"""
    x = next(iter(Batches(images[:32], 32, cfg.device)))
    save_grid(folder / "samples" / f"{name}{'-clamp' * cfg.clamp}.png", model.sample(64))
    save_grid(folder / "reconstructions" / f"{name}{'-draw' * cfg.draw_code}.png", x, model.reconstruct(x))

# Changed from selfvae.py: lines, mixtures and directions of one code
def draw_latent_space(cfg, model, images, folder):
    """interpolations/, one a row; mixing/, the top row's images put into those on the left; editing/, rows x, then images at its code
    plus 0, ½, 1 … 3 times the direction of --label_value: mean code of 20 training images that have it less that of 20 that have not."""
    x = next(iter(Batches(images.test[:16], 16, cfg.device)))
    x = x[torch.arange(16, device=x.device) % len(x)]  # of a small set, some twice
    save_grid(folder / "interpolations" / "test.png", model.interpolate(x[:8], x[:8].roll(1, 0)).flatten(0, 1))
    left, top = x[:7], x[-7:]
    rows = torch.cat([left.unsqueeze(1), model.mix(left, top)], 1).flatten(0, 1)
    save_grid(folder / "mixing" / "test.png", torch.cat([torch.ones_like(x[:1]), top, rows]))
    if images.labels is None:
        return
    labels = factor(cfg, images, "train")
    value = labels.max().item() if cfg.label_value is None else cfg.label_value
    have, lack = (labels == value).nonzero()[:20, 0], (labels != value).nonzero()[:20, 0]
    others = (factor(cfg, images, "test") != value).nonzero()[:8, 0]
    if len(lack) and len(others):
        mean_code = lambda index: model.encode(next(iter(Batches(images.train[index.numpy()], 20, cfg.device)))).mean(0)
        x = next(iter(Batches(images.test[others.numpy()], 8, cfg.device)))
        edited = model.edit(x, mean_code(have) - mean_code(lack), [i / 2 for i in range(7)])
        path = folder / "editing" / f"test-{cfg.label_column}-{value}.png"
        save_grid(path, torch.cat([x.unsqueeze(1), edited], 1).flatten(0, 1))

# Copied from vae.py: save_grid
def save_grid(path, *images):
    """PNG of true pixel values, 8 images a row. Several sets (B, C, H, W): row 1 of each, one above the other, then row 2 …"""
    path.parent.mkdir(exist_ok=True)
    columns = min(8, len(images[0]))
    whole = len(images[0]) // columns * columns
    rows = torch.stack([x[:whole].unflatten(0, (-1, columns)) for x in images], 1)  # (rows, sets, columns, C, H, W)
    save_image((rows.flatten(0, 2) + 1) / 2, path, nrow=columns)

# Changed from vae.py: pictures, codes and a probe instead of bounds
def evaluate(cfg, model, images, folder, state):
    """Rows of Tables 1 and 6, printed and in results.json with the protocol of each number, and figures test.png."""
    with inference(cfg), evaluating(model):
        test = Batches(images.test, cfg.batch_size, cfg.device)
        inception = load_inception(cfg.inception_weights, cfg.data_dir, cfg.device) if cfg.fid else None
        vgg = load_vgg(cfg.vgg_weights, cfg.data_dir, cfg.device) if cfg.fid else None
        results = {**distances(model, test, vgg), "test_images": len(images.test), "code": "drawn" if cfg.draw_code else "mean"}
        if inception:
            references = reference_statistics(inception, images, cfg.device)
            results |= inception_metrics(inception, draws(model, cfg.fid), references)
            of_reconstructions = inception_metrics(inception, ((i, to_uint8(model.reconstruct(x))) for i, x in shared(test)), references)
            results |= {f"reconstruction_{name}": value for name, value in of_reconstructions.items()}
        if processes()[0]:
            return
        results |= {
            "clamp": cfg.clamp, "ema": cfg.ema, "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds_1": seconds_to_sample(model, 1), "seconds_100": seconds_to_sample(model, 100),
            "step": state["step"], "train_seconds": state["seconds"], "device": cfg.device, "dtype": cfg.dtype}
        draw(cfg, model, images.test, folder, "test")
        draw_latent_space(cfg, model, images, folder)
    results |= probe(cfg, model, images)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    for name, value in results.items():
        print(f"{name:26} {value:,.4f}" if isinstance(value, float) else f"{name:26} {value}")

# Changed from vae.py: other sizes, layers, labels
def main(Model, argv=None):
    """Train and evaluate; --eval: evaluate. Returns the exit code: 2 for a user's mistake, 1 not finite, 130 stopped."""
    cfg = parse_flags(argv)
    try:
        start_side(cfg.size or 8), contrast_layers(cfg)  # before anything is made
        if max(cfg.momentum, cfg.ema) > 1:
            raise UserError("--momentum and --ema are shares of what is kept, at most 1")
        folder, checkpoint = open_run(cfg)
        images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
        if images.labels is not None:
            factor(cfg, images, "train")
        torch.manual_seed(cfg.seed)
        model = Model(cfg, images.shape).to(cfg.device, memory_format=torch.channels_last)
        if not cfg.eval:
            start_run(cfg, folder, model, images)
            if not train(cfg, model, images, folder, checkpoint):
                print(f"stopped and saved; go on with: {command_line()}{' --resume' * (not cfg.resume)}")
                return 130
            checkpoint = open_run(dataclasses.replace(cfg, eval=True))[1]
        model.load_state_dict(checkpoint["model"])
        evaluate(cfg, model, images, folder, checkpoint["state"])
        barrier()  # one that left would end the others
        print(f"written to {folder}")
        return 0
    except (UserError, OSError, FloatingPointError, KeyboardInterrupt, RuntimeError) as error:
        return explain(SCRIPT, error)

# --- same in every script ---------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem
FREE = set("accumulate data_dir out_dir epochs steps device dtype compile name resume eval log_every eval_every save_every fid "
           "inception_weights".split() + Config.free.split())  # flags that may differ from those of the run resumed or evaluated

def parse_flags(argv=None):
    """Command line -> Config, each field a flag. A wrong one is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", None, __doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{SCRIPT}.py: error: {message}\n")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "choices": f.metadata.get("choices")}
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"], **kind)
    cfg = Config(**vars(parser.parse_args(argv)))
    for f in dataclasses.fields(Config):
        value, low = getattr(cfg, f.name), f.metadata.get("low", 1)
        if f.type in (int, float) and value is not None and not low <= value < math.inf:
            parser.error(f"--{f.name} must be finite and at least {low}, not {value}")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if cfg.device == "cuda" and "LOCAL_RANK" in os.environ:
        cfg.device += ":" + os.environ["LOCAL_RANK"]  # torchrun: one GPU for each process
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError):  # AssertionError: torch was built without it
        parser.error(f"there is no --device {cfg.device} here; take auto or cpu, and no more processes than GPUs")
    modern = cfg.device.startswith("cuda") and torch.cuda.get_device_capability(cfg.device) >= (8, 0)  # computes in bf16, can compile
    cfg.dtype = ("bf16" if modern else "fp32") if cfg.dtype == "auto" else cfg.dtype
    cfg.compile = modern and sys.platform == "linux" if cfg.compile is None else cfg.compile
    join_processes(cfg.device)
    return cfg

def open_run(cfg):
    """-> the run's folder and, for --resume and --eval, its checkpoint. UserError rather than overwrite or mix up runs."""
    folder = Path(cfg.out_dir, cfg.name or f"{SCRIPT}-{Path(cfg.dataset).name}{cfg.size or ''}-{cfg.variant}-s{cfg.seed}")
    barrier()  # what process 0 saves is there for all
    path = folder / ("best.pt" if cfg.eval and (folder / "best.pt").exists() else "last.pt")
    if not (cfg.resume or cfg.eval):
        if (folder / "last.pt").exists():
            raise UserError(f"{folder} holds a run: --resume continues it, --eval evaluates it, --name NAME starts another")
        return folder, None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        made_with = {"script": checkpoint["script"], **checkpoint["config"]}
    except FileNotFoundError:
        raise UserError(f"there is no {path} to go on from") from None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged, or no checkpoint of these scripts") from None
    for name, value in {"script": SCRIPT, **dataclasses.asdict(cfg)}.items():
        if name not in FREE and made_with.get(name) != value:
            raise UserError(f"{path} is of another run: its {name} is {made_with.get(name)}, not {value}")
    return folder, checkpoint

def start_run(cfg, folder, model, images):
    """Print the header; for a new run make the folder, config.json and an empty log.jsonl."""
    if not cfg.resume and processes()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        facts = {"command": command_line(), "commit": git.stdout.strip(), "torch": torch.__version__, "processes": processes()[1]}
        (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(cfg), **facts}, indent=1))
        (folder / "log.jsonl").write_text("")
        for file in folder.glob("importance-*.jsonl"):  # of a model that is gone
            file.unlink()
    print("trained parameters:", {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in model.named_children()})
    print(f"{images.name} {images.shape}: {len(images.train)} train, {len(images.valid)} valid, {len(images.test)} test images\n"
          f"{processes()[1]} x {torch.device(cfg.device).type}, {cfg.dtype}, torch {torch.__version__}; writing to {folder}", flush=True)

def save(path, cfg, model, optimizer, state):
    """One whole checkpoint of tensors and plain types, written by process 0 aside and renamed: `path` is never half a file."""
    if processes()[0] == 0:
        torch.save({"script": SCRIPT, "config": dataclasses.asdict(cfg), "state": state, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    barrier()  # nobody leaves before it is written

def restore(cfg, folder, checkpoint, model, optimizer):
    """Load a checkpoint (None: a new run) -> {"step", "best": lowest validation score, "seconds" spent, "start" of the clock}."""
    if checkpoint is None:
        return {"step": 0, "best": math.inf, "seconds": 0.0, "start": time.perf_counter()}
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    state, log = checkpoint["state"], folder / "log.jsonl"
    if processes()[0] == 0:
        lines = (line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n"))
        log.with_suffix(".tmp").write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
        os.replace(log.with_suffix(".tmp"), log)  # what came after the checkpoint was never saved, and comes again
    return state | {"start": time.perf_counter() - state["seconds"]}

if __name__ == "__main__":
    sys.exit(main(DCVAE))
