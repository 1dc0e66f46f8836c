"""VAE with a normal, mixture or RealNVP prior (Gatopoulos & Tomczak 2020, sections 2 and A.2).

    generative model   p(x, z) = p(x|z) p(z)      p(x|z) a mixture of 10 discretized logistics per
                                                  pixel, p(z) set by --prior
    inference model    q(z|x) = N(μ(x), σ²(x))    all networks are DenseNets with attention
    bound              log p(x) ≥ E_q[log p(x|z)] - E_q[log q(z|x) - log p(z)] = -E_q[re_x + kl_z]

    python vae.py --small --steps 2000            built-in shapes, minutes on a laptop
    python vae.py --dataset cifar10 --small --steps 2500
                                                  minutes on one CPU core with AVX512-BF16
    python vae.py --dataset cifar10               the released widths, for a GPU: 3.51 bits per
                                                  dimension in the paper's Table 2; not run here

Paper: arXiv:2010.02014. Its code was not released. "Released" refers to the code of srVAE, an
earlier model by the same authors. Equations without a number in the paper are named by section and
letter, such as (2.2a): docs/equations.md.
Derivation, logged terms, differences from the paper: docs/vae.md. Results: docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W, `dims` in the code
    S importance samples · M components of a prior · P parameters of p(x|z) per pixel
    x (B, C, H, W) image in [-1, 1] · z (B, 16, 8, 8) latent
    v (B, 16, 8, 8) noise from N(0, 1) that p(z) turns into z; the base variable of a flow
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Independent, Normal
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached

from common import (
    Batches, Dmol, UserError, barrier, bits_per_dim, choose_device, cost_of, dmol_channels,
    draw_curves, evaluation_batches, fid_of_samples, importance_weighted, load_images, log_mean_exp,
    log_row, log_training, mean_terms, processes, require_finite, save_sheet, seed_noise, to_json,
    write_results)


# ---- The model -----------------------------------------------------------------------------------

class VAE(nn.Module):
    """The factors q(z|x), p(z), p(x|z) for images of shape (C, H, W), H = W = 8 · 2ⁿ."""

    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        if cfg.small:
            width = WIDTHS["small"]
        else:
            width = WIDTHS["32" if size <= 32 else "64"]
        self.q_z = GaussianEncoder(channels, size, *width["q_z"])
        if cfg.prior == "normal":
            self.p_z = NormalPrior()
        elif cfg.prior == "mog":
            self.p_z = MoGPrior(cfg.mog_components)
        else:
            self.p_z = RealNVPPrior(*width["flow"])
        self.p_x = MixtureDecoder(channels, size, *width["p_x"])

    def initialize(self, x):
        """Data-dependent initialisation from one batch x (B, C, H, W), B ≥ 1."""
        data_dependent_init(self, lambda: self.terms(x))

    def terms(self, x):
        """The bound's terms: x (B, C, H, W) -> {"re_x", "kl_z"}, both (B,) in nats.

            re_x    -log p(x|z), z ~ q(z|x): the reconstruction error
            kl_z    log q(z|x) - log p(z), whose mean over z is KL(q(z|x) ‖ p(z))

        Minus their sum is one sample of what Eq. (2.1a) averages, and with the flow Eq. (2.2b).
        Both terms are costs, as in Table 2. Only the normal prior has a KL in closed form, so kl_z
        is sampled under every prior to keep them comparable. For one image it may be negative.
        """
        q_z = self.q_z(x)
        z = q_z.rsample()
        return {"re_x": -self.p_x(z).log_prob(x), "kl_z": q_z.log_prob(z) - self.p_z.log_prob(z)}

    forward = terms  # what torch.compile and DistributedDataParallel call

    def elbo(self, x):
        """One-sample estimate of E_q[log p(x|z) - log q(z|x) + log p(z)] ≤ log p(x), Eq. (2.1a).

        x (B, C, H, W) -> (B,) in nats. Training minimises the mean of its negative, from `terms`.
        """
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples):
        """log w_s = log p(x|z_s) + log p(z_s) - log q(z_s|x), z_s ~ q(z|x) -> (samples, B), nats.

        These are the weights of Burda et al. 2015, Eq. (8). x (B, C, H, W) is encoded once.
        """
        q_z = self.q_z(x)
        log_w = []
        for _ in range(samples):
            z = q_z.sample()
            log_p = self.p_x(z).log_prob(x) + self.p_z.log_prob(z)
            log_w.append(log_p - q_z.log_prob(z))
        return torch.stack(log_w)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, mean=False):
        """Eq. (3.3a): z ~ p(z), x ~ p(x|z) or its mean -> (n, C, H, W), on the pixel grid.

        `temperature` scales the prior's noise.
        """
        v = torch.randn(n, *LATENT, device=next(self.parameters()).device)
        return self.decode(self.p_z.from_noise(temperature * v), mean)

    @torch.no_grad()
    def reconstruct(self, x, mean=False):
        """Eq. (3.3b): z ~ q(z|x), x̂ ~ p(x|z) or its mean: (B, C, H, W) -> same."""
        return self.decode(self.q_z(x).sample(), mean)

    @torch.no_grad()
    def interpolate(self, x1, x2, count=10, mean=False):
        """Images along the straight line in z between the means of q(z|x1) and q(z|x2).

        Two (B, C, H, W) -> (B, count, C, H, W).
        """
        z1 = self.q_z(x1).mean
        z2 = self.q_z(x2).mean
        shares = [i / max(1, count - 1) for i in range(count)]  # of the way from x1 to x2
        z = torch.stack([torch.lerp(z1, z2, share) for share in shares], 1)
        return self.decode(z.flatten(0, 1), mean).unflatten(0, (-1, count))

    def decode(self, z, mean=False):
        """x ~ p(x|z) or its mean: z (B, 16, 8, 8) -> (B, C, H, W)."""
        p_x = self.p_x(z)
        return p_x.mean if mean else p_x.sample()


# ---- Special to this model -----------------------------------------------------------------------
# Its priors. log_prob(z) is (B,) in nats; from_noise(v) turns v ~ N(0, 1) into z ~ p(z).

class NormalPrior(nn.Module):
    """p(z) = N(0, 1)."""

    def log_prob(self, z):
        return Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))

    def from_noise(self, v):
        return v


class MoGPrior(nn.Module):
    """p(z) = 1/M Σ_m N(z; μ_m, σ_m²) with learned μ_m and σ_m, M = --mog_components."""

    def __init__(self, components):
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(components, *LATENT))  # random, so they differ
        self.log_sd = nn.Parameter(torch.zeros(components, *LATENT))

    def log_prob(self, z):
        components = Normal(self.mean, self.log_sd.exp())
        log_p = components.log_prob(z.unsqueeze(1)).sum((2, 3, 4))  # (B, M)
        return log_mean_exp(log_p, dim=1)

    def from_noise(self, v):
        """z = μ_m + σ_m·v. The component m is drawn at random and does not depend on v."""
        m = torch.randint(len(self.mean), (len(v),), device=v.device)
        return self.mean[m] + self.log_sd[m].exp() * v


class RealNVPPrior(nn.Module):
    """p(z) = N(v; 0, 1) |det ∂v/∂z|, where v = flow(z) is a RealNVP (Eq. (2.2a)).

    `flow` is the paper's f⁻¹, and `flow.inverse` is its f. There are two scales, as released: the
    first has all of z, (16, 8, 8), the second has half of it, (32, 4, 4).
    """

    def __init__(self, growth, layers):
        super().__init__()

        def make_net(channels, side):  # the same at every side
            block = DenseBlock(channels, growth, layers)
            return nn.Sequential(block, conv(block.channels, 2 * channels, sd=0.0))  # s = t = 0

        self.flow = Flow(channels=LATENT[0], side=LATENT[1], scales=2, make_net=make_net)

    def log_prob(self, z):
        v, log_det = self.flow(z)
        log_p_v = Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3))
        return log_p_v + log_det

    def from_noise(self, v):
        return self.flow.inverse(v)


# ---- Networks ------------------------------------------------------------------------------------
# `growth` is that of the dense block at 8x8. It halves whenever the side doubles.

WIDTHS = {  # (growth, layers) of the dense blocks
    "32": dict(q_z=(64, 8), p_x=(128, 6), flow=(64, 5)),  # images up to 32x32: released widths
    # Larger images: our widths. With the flow, 34 M parameters at 64x64; the paper has 32 to 42 M.
    "64": dict(q_z=(64, 6), p_x=(128, 5), flow=(64, 5)),
    "small": dict(q_z=(32, 2), p_x=(32, 2), flow=(8, 1)),
}


LATENT = (16, 8, 8)  # channels, height, width of z for images of any size (section 4.1)


def halvings(size):
    """How often `size` halves on the way down to 8; UserError if it is not 8 · 2ⁿ."""
    n = int(math.log2(size / 8)) if size >= 8 else 0
    if size != 8 * 2**n:
        raise UserError(f"images of side {size} do not halve down to 8: take 8, 16, 32, 64, 128 …")
    return n


class Encoder(nn.Sequential):
    """Dense blocks, with stride-2 convs between them that double the channels, then a 1x1 conv.

    (B, C, size, size) -> (B, c_out, 8, 8). The output starts with standard deviation `sd`. With
    0.1, q(z|x) starts near N(0, 1).
    """

    def __init__(self, channels, size, growth, layers, c_out=2 * LATENT[0], sd=0.1):
        parts = []
        for halvings_left in range(halvings(size), -1, -1):
            block = DenseBlock(channels, max(1, growth >> halvings_left), layers)
            parts.append(block)
            channels = block.channels
            if halvings_left:
                parts += [conv(channels, 2 * channels, stride=2), nn.ELU(inplace=True)]
                channels *= 2
        super().__init__(*parts, conv(channels, c_out, 1, sd=sd))


class Decoder(nn.Sequential):
    """Dense blocks, each followed by a transposed conv that halves the channels, then a conv.

    (B, 16, 8, 8) -> (B, c_out, size, size). There is no block at full size, as released.
    """

    def __init__(self, size, growth, layers, c_out, sd):
        parts = []
        channels = LATENT[0]
        for doublings_done in range(halvings(size) or 1):  # at size 8: one block, nothing doubled
            block = DenseBlock(channels, max(1, growth >> doublings_done), layers)
            parts.append(block)
            channels = block.channels
            if size > 8:
                parts += [conv(channels, channels // 2, transposed=True), nn.ELU(inplace=True)]
                channels //= 2
        super().__init__(*parts, conv(channels, c_out, sd=sd))


class GaussianEncoder(Encoder):
    """A Gaussian over (16, 8, 8), given images: (B, C, size, size) -> a distribution."""

    def forward(self, x):
        return gaussian(super().forward(x))


class MixtureDecoder(Decoder):
    """A Dmol over images of `channels` channels, given latents (B, 16, 8, 8) -> a distribution."""

    def __init__(self, channels, size, growth, layers):
        super().__init__(size, growth, layers, dmol_channels(channels), sd=0.1)
        self.channels = channels

    def forward(self, z):
        return Dmol(super().forward(z), self.channels)


def gaussian(params):
    """Network output (B, 32, 8, 8) -> N(μ, σ²) over (16, 8, 8), whose log_prob is (B,), nats.

    The first 16 channels are μ, the others log σ², which is clamped to [-7, 7] as released.
    """
    mean, log_var = params.float().chunk(2, 1)
    sd = torch.exp(0.5 * F.hardtanh(log_var, -7, 7))
    return Independent(Normal(mean, sd), 3)


# ---- Building blocks -----------------------------------------------------------------------------
# Weight norm, dense blocks, channel attention (A.3).

def conv(c_in, c_out, kernel=3, stride=1, sd=1.0, transposed=False):
    """Convolution with w = g·v/‖v‖ (Salimans & Kingma 2016, Eq. (2)).

    It keeps height and width or divides them by `stride`. A `transposed` one is 3x3 and doubles
    them. `sd` is the standard deviation of its output after data_dependent_init.
    """
    if transposed:
        layer = nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, output_padding=1)
    else:
        layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
    # Entries of v start with a fixed sd, as released. PyTorch's sd shrinks with fan-in, and Adamax
    # moves each entry by about its learning rate, so w would turn too far. (This v is not noise.)
    nn.init.normal_(layer.weight, std=0.05)
    layer.initial_sd = sd
    # One g per output channel, which is dimension 1 of a transposed weight.
    return weight_norm(layer, dim=1 if transposed else 0)


@torch.no_grad()
def data_dependent_init(model, forward):
    """Make each conv's output have mean 0 and sd `initial_sd` (Salimans & Kingma 2016, section 3).

    `forward()` pushes one batch through `model`. Each layer is set when the batch reaches it, so
    its inputs come from layers that are already set. Only g and b change, so checkpoints hold the
    result. Convs on pooled 1x1 maps keep their defaults: one value per image is too few to measure.
    """
    def normalise(layer, inputs, output):
        if output.shape[2:] == (1, 1):
            return output
        sd, mean = torch.std_mean(output.float(), (0, 2, 3), correction=0)
        # A channel that does not vary, as with black images, gives no scale, so g is kept.
        ratio = torch.where(sd < 1e-3, 1.0, layer.initial_sd / sd)
        g = layer.parametrizations.weight.original0
        g.mul_(ratio.view_as(g))
        layer.bias.sub_(mean).mul_(ratio)
        return (output - mean.view(1, -1, 1, 1)) * ratio.view(1, -1, 1, 1)

    layers = [layer for layer in model.modules() if hasattr(layer, "initial_sd")]
    hooks = [layer.register_forward_hook(normalise) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()


class ChannelAttention(nn.Module):
    """Multiplies each channel by a gate in (0, 1), from all channels' means (Zhang et al. 2018).

    (B, C, H, W) -> same.
    """

    def __init__(self, channels):
        super().__init__()
        hidden = max(1, channels // 8)  # as released
        self.gate = nn.Sequential(conv(channels, hidden, 1), nn.ELU(inplace=True),
                                  conv(hidden, channels, 1), nn.Sigmoid())

    def forward(self, h):
        return h * self.gate(h.mean((2, 3), keepdim=True))


class DenseBlock(nn.Module):
    """Dense layers (Huang et al. 2016), each of which appends `growth` channels to its input.

    A layer is a 1x1 conv to 4·growth channels and a 3x3 conv. Channel attention ends the block.
    (B, C, H, W) -> (B, C + layers·growth, H, W).
    """

    def __init__(self, channels, growth, layers):
        super().__init__()
        # NOTE(paper): ELUs are used "everywhere" (A.3), so both convs of a layer have one. In the
        # released code neither has one. Instead, an ELU is applied to all channels so far after
        # each layer, to early ones again and again. Our parameters are the same, and the memory
        # traffic is half. ELU can work in place, since its gradient follows from its output.
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(nn.Sequential(conv(channels, 4 * growth, 1), nn.ELU(inplace=True),
                                             conv(4 * growth, growth), nn.ELU(inplace=True)))
            channels += growth
        self.attention = ChannelAttention(channels)
        self.channels = channels  # of the output

    def forward(self, h):
        for layer in self.layers:
            new = layer(h)
            h = h.to(new.dtype)  # cat with the fp32 input would make all later features fp32
            h = torch.cat([h, new], 1)
        return self.attention(h)


# ---- Training ------------------------------------------------------------------------------------

def train(cfg, model, images, folder, checkpoint):
    """Minimise -ELBO in nats per image, averaged over the batch.

    Without a checkpoint a new run starts in `folder`. With one, the run in `folder` continues.
    """
    rank, world = processes()
    data = Batches(images.train, cfg.batch_size, cfg.device, cfg.seed,
                   augment=images.augment, parts=world)
    dims = math.prod(images.shape)
    total = cfg.steps or cfg.epochs * data.per_epoch
    # Adamax divides by the largest gradient so far, which decays by β₂ per step. The first
    # gradients are large. With 0.999, the default as released, they slow training down for
    # thousands of steps.
    optimizer = torch.optim.Adamax(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-7,
                                   foreach=True)  # all parameters in a few calls
    if checkpoint is None:
        state = start_run(cfg, folder, images)
        model.initialize(data.batch(0))
    else:
        state = checkpoint["state"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    if total < state["step"]:
        raise UserError(f"this run has done {state['step']} steps, so it cannot end at {total}")
    costs = parallel(cfg, model)  # model.terms, for training

    rows = []  # the terms of the steps since the last progress line
    saved = -math.inf  # when last.pt was saved
    state["clock"] = time.perf_counter()
    for step in range(state["step"] + 1, total + 1):
        state["step"] = step
        seed_noise(cfg.seed, step, rank)
        x = data.batch(step - 1, rank, world)
        with autocast(cfg):
            terms = costs(x)
        warming = min(1, step / (cfg.warmup * total + 1))  # 1 without --warmup
        loss = 0
        for name, values in terms.items():
            weight = warming if name.startswith("kl_") else 1
            loss = loss + weight * values.mean()
        optimizer.zero_grad()
        loss.backward()
        floor = min(cfg.lr, 1e-4)
        rate = max(cfg.lr * 0.999999**step, floor)  # as released
        cooling = min(1, (total + 1 - step) / (cfg.cooldown * total + 1))  # 1 without --cooldown
        optimizer.param_groups[0]["lr"] = rate * cooling
        optimizer.step()
        rows.append({name: values.detach().mean() for name, values in terms.items()})

        validating = step % cfg.eval_every == 0 or step == total
        if validating or step % cfg.log_every == 0:
            log_training(folder, state, total, rows, data.batch_size, dims)
            rows = []
            if validating:
                validate(cfg, model, images, folder, optimizer, state)
            # Saved after the validation, to include its score, and only when all steps so far are
            # logged, because a resumed run begins its next line with no rows.
            if step == total or time.perf_counter() > saved + SAVE_SECONDS:
                save(folder / "last.pt", cfg, model, optimizer, state)
                saved = time.perf_counter()


def validate(cfg, model, images, folder, optimizer, state):
    """Log the bound on validation images, draw figures; save best.pt if the bound is the best yet.

    Process 0 does this while the others wait. The time does not count as training.
    """
    if processes()[0] == 0:
        valid = evaluation_batches(images.valid, cfg.device, cfg.eval_images)
        dims = math.prod(images.shape)
        with inference(cfg, model):
            terms = mean_terms(model, valid)
            save_figures(cfg, model, images, folder, "valid", state["step"])
        log_row(folder, state, "valid", terms, dims)
        draw_curves(folder, ["bpd"])
        bpd = bits_per_dim(sum(terms.values()), dims)
        if bpd < state["best"]:
            state["best"] = bpd
            save(folder / "best.pt", cfg, model, optimizer, state)
    barrier()
    state["clock"] = time.perf_counter()  # so that this time does not count as training


# ---- Evaluation ----------------------------------------------------------------------------------

def evaluate(cfg, model, images, folder, state):
    """Evaluate the model on test images: a row of Table 1 or 2, printed and in results.json.

    The figures are called test.png. `state` is that of the model's checkpoint.
    """
    dims = math.prod(images.shape)
    test = evaluation_batches(images.test, cfg.device, cfg.eval_images)
    iw_test = evaluation_batches(images.test, cfg.device, cfg.iw_images)
    with inference(cfg, model):
        terms = mean_terms(model, test)
        results = {
            "elbo_bpd": bits_per_dim(sum(terms.values()), dims),
            "test_images": test.count,
            **importance_weighted(model, iw_test, cfg.iw_samples, dims),
            # RE and KL of Tables 1 and 2. In selfvae.py each is a sum of several terms.
            "re_nats": terms["re_x"],
            "kl_nats": terms["kl_z"],
            **terms,
        }
        if cfg.fid:
            results |= fid_of_samples(cfg, model, images)
        save_figures(cfg, model, images, folder, "test", state["step"])
        results |= cost_of(cfg, model, state)  # last: it draws as many samples as time allows
    write_results(folder, results)


def save_figures(cfg, model, images, folder, split, step):
    """Sheets: samples; reconstructions of the split's first images; interpolations between them."""
    x = next(iter(Batches(getattr(images, split), 32, cfg.device, count=32)))
    lines = model.interpolate(x[:8], x[:8].roll(1, 0), 8, cfg.mean)  # (8, 8, C, H, W)
    shown = "means" if cfg.mean else "draws"
    title = f"{sheet_title(cfg, images, split, step)}\n{shown} of p(x|z), z"
    name = f"{figure_name(cfg, split, step)}.png"
    save_sheet(folder / "samples" / name, f"{title} ~ p(z), temperature {cfg.temperature:g}",
               {"x": model.sample(64, cfg.temperature, cfg.mean)})
    save_sheet(folder / "reconstructions" / name, f"{title} ~ q(z|x)",
               {"x": x, "x̂": model.reconstruct(x, cfg.mean)})
    save_sheet(folder / "interpolations" / name, f"{title} on a line from one image to another",
               {"along z": lines.flatten(0, 1)}, keep_columns=True)


def figure_name(cfg, split, step):
    """The file name of a figure, with --mean and --temperature if they change the figure."""
    name = "test" if split == "test" else f"{step:06d}"
    if cfg.mean:
        name += "-mean"
    if cfg.temperature != 1:
        name += f"-temperature{cfg.temperature:g}"
    return name


# ---- Copied from the other scripts ---------------------------------------------------------------
# The flow of the RealNVP prior.

# Copied from realnvp.py: Coupling
class Coupling(nn.Module):
    """Affine coupling (Dinh et al. 2016, Eqs. (4), (5), by masks Eq. (9)).

    Values pass where the mask is 1; the others become z·exp(s) + t. s and t see only values that
    pass. So the Jacobian is triangular with log |det| = Σ s (their Eq. (6)), and the inverse can
    compute s and t again (Eqs. (7), (8)). z (B, C, H, W) -> z', same shape, and log |det ∂z'/∂z|,
    (B,) in nats.
    """

    def __init__(self, mask, channels, net):
        super().__init__()
        self.net = net  # C channels -> 2C
        self.s_limit = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("mask", mask.float(), persistent=False)

    def s_t(self, z):
        """Log-scale and translation, 0 where the mask is 1: z (B, C, H, W) -> two of its shape."""
        s, t = self.net(z * self.mask).to(z.dtype).chunk(2, 1)  # bf16 ends here, z is fp32
        moves = 1 - self.mask
        return self.s_limit * torch.tanh(s) * moves, t * moves

    def forward(self, z):
        """z -> z', same shape, and log |det ∂z'/∂z| (B,)."""
        s, t = self.s_t(z)
        return z * torch.exp(s) + t, s.sum((1, 2, 3))

    def inverse(self, z_next):
        """z' -> z (B, C, H, W)."""
        s, t = self.s_t(z_next)  # the same as from z: they see only unchanged values
        return (z_next - t) * torch.exp(-s)


# Copied from realnvp.py: Couplings
class Couplings(nn.ModuleList):
    """`count` couplings in a row, every other one with the mask inverted (Dinh et al., 3.5).

    z (B, C, H, W) -> z', same shape, and log |det ∂z'/∂z| (B,) in nats. Determinants multiply, so
    logarithms add (their Eqs. (10), (11)). make_net(channels, side) makes a coupling's network.
    """

    def __init__(self, mask, count, channels, side, make_net):
        super().__init__()
        for i in range(count):
            net = make_net(channels, side)
            self.append(Coupling((mask + i) % 2, channels, net))  # odd i: mask inverted

    def forward(self, z):
        log_det = 0.0
        for coupling in self:
            z, log_det_i = coupling(z)
            log_det = log_det + log_det_i
        return z, log_det

    def inverse(self, z):
        """z' -> z, as (f_b ∘ f_a)⁻¹ = f_a⁻¹ ∘ f_b⁻¹ (their Eq. (12))."""
        for coupling in reversed(self):
            z = coupling.inverse(z)
        return z


# Copied from realnvp.py: Flow
class Flow(nn.Module):
    """RealNVP of `scales` scales (Dinh et al., section 3.6, Eqs. (13) to (16)).

    z (B, C, side, side) -> v, same shape, and log |det ∂v/∂z| (B,) in nats. A scale has 3
    checkerboard couplings, then 3 channel-wise ones after squeezing 2x2 squares into
    (4C, side/2, side/2). Half of the values are then finished, and `rest` continues with the other
    half, (2C, side/2, side/2). The last scale has 4 checkerboard couplings. Finished values return
    to their pixels, so v has z's shape. make_net(channels, side) makes the network of a coupling.
    """

    def __init__(self, channels, side, scales, make_net):
        super().__init__()
        row = torch.arange(side).view(-1, 1)
        column = torch.arange(side)
        checkerboard = (row + column) % 2  # (side, side): 1 where the sum is odd (their Figure 3)
        first_half = (torch.arange(4 * channels) < 2 * channels).view(-1, 1, 1)  # (4C, 1, 1)
        self.rest = None
        if scales == 1:
            self.fine = Couplings(checkerboard, 4, channels, side, make_net)
        else:
            self.fine = Couplings(checkerboard, 3, channels, side, make_net)
            self.squeezed = Couplings(first_half, 3, 4 * channels, side // 2, make_net)
            self.rest = Flow(2 * channels, side // 2, scales - 1, make_net)

    def forward(self, z):
        z, log_det = self.fine(z)
        if self.rest is None:
            return z, log_det
        z, log_det_squeezed = self.squeezed(F.pixel_unshuffle(z, 2))
        rest, done = z.chunk(2, 1)
        rest, log_det_rest = self.rest(rest)
        v = F.pixel_shuffle(torch.cat([rest, done], 1), 2)
        return v, log_det + log_det_squeezed + log_det_rest

    def inverse(self, v):
        if self.rest is None:
            return self.fine.inverse(v)
        rest, done = F.pixel_unshuffle(v, 2).chunk(2, 1)
        z = self.squeezed.inverse(torch.cat([self.rest.inverse(rest), done], 1))
        return self.fine.inverse(F.pixel_shuffle(z, 2))


# ---- Flags ---------------------------------------------------------------------------------------

def flag(default, text, fixed=False, choices=None, low=1, high=10**9):
    """A field of Config. A `fixed` one cannot change in a run; numbers are in [`low`, `high`]."""
    metadata = {"help": text, "fixed": fixed, "choices": choices, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


# Defaults of the flags that depend on --small. "small" is ours, for runs of minutes to an hour.
SCALES = {
    "paper": dict(batch_size=32, lr=2e-3, beta2=0.999, warmup=0.0, cooldown=0.0,
                  iw_samples=512),
    "small": dict(batch_size=8, lr=6e-3, beta2=0.99, warmup=0.2, cooldown=0.2,
                  eval_images=500, iw_images=200, iw_samples=64),
}


@dataclasses.dataclass
class Config:
    """The flags. Defaults are the paper's; where it is silent, the released code's."""

    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, celebahq, "
                        "lsun, or a folder")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    size: int = flag(None, "side of the images, 8 · 2ⁿ (default: the dataset's)", fixed=True)
    prior: str = flag("realnvp", "p(z), section A.2", fixed=True,
                      choices=("normal", "mog", "realnvp"))
    mog_components: int = flag(10, "M of --prior mog (Table 2's parameter count implies 1000)",
                               fixed=True)
    small: bool = flag(False, "networks narrowed for a laptop CPU, quick evaluation", fixed=True)
    epochs: int = flag(2000, "passes over the training images")
    steps: int = flag(None, "training steps (overrides --epochs)")
    batch_size: int = flag(None, "images per step, over all processes (default 32, --small 8)",
                           fixed=True)
    lr: float = flag(None, "Adamax's learning rate; times 0.999999 per step, at least 1e-4 "
                     "(default 2e-3, --small 6e-3)", fixed=True, low=0)
    beta2: float = flag(None, "Adamax's β₂ (default 0.999, --small 0.99)", fixed=True, low=0,
                        high=0.9999)
    warmup: float = flag(None, "share of the steps, at the beginning, over which the weight of the "
                         "KLs rises from 0 to 1 (default 0, --small 0.2)", fixed=True, low=0,
                         high=1)
    cooldown: float = flag(None, "share of the steps, at the end, over which the rate falls to "
                           "zero (default 0, --small 0.2)", fixed=True, low=0, high=1)
    seed: int = flag(0, "for initialisation, batches, noise", fixed=True, low=0, high=2**32 - 1)
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first one available")
    dtype: str = flag("auto", "networks' precision; likelihoods are fp32. auto: bf16 on GPUs from "
                      "Ampere on and CPUs with AVX512-BF16, else fp32",
                      choices=("auto", "fp32", "bf16"))
    compile: bool = flag(None, "torch.compile (default: on GPUs from Ampere on, under Linux)")
    resume: bool = flag(False, "continue the run in its folder")
    eval: bool = flag(False, "evaluate the run in its folder without training")
    log_every: int = flag(50, "steps between progress lines")
    eval_every: int = flag(1000, "steps between validations, with figures")
    eval_images: int = flag(None, "images to evaluate (default all, --small 500)")
    iw_samples: int = flag(None, "S of the importance-weighted bound (default 512, --small 64)")
    iw_images: int = flag(None, "test images for that bound (default all, --small 200)")
    temperature: float = flag(1.0, "figures: scale of the prior's noise", low=0)
    mean: bool = flag(False, "figures: show the mean of p(x|z), not a sample")
    fid: int = flag(None, "samples for FID and Inception Score, often 50000 (default: neither)")

    def __post_init__(self):
        for name, value in SCALES["small" if self.small else "paper"].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def variant(self):
        """The part of the run folder's name that describes the model."""
        small = "-small" if self.small else ""
        return f"{self.prior}{small}"

    def check(self):
        """Raise UserError for flags that make no model, before anything is written."""
        if self.size is not None:
            halvings(self.size)


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
    sys.exit(main(VAE))
