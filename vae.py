"""VAE with a standard-normal, mixture-of-Gaussians or RealNVP prior (Gatopoulos & Tomczak 2020, sections 2 and A.2).

    generative model   p(x, z) = p(x|z) p(z)         p(x|z) 10 discretized logistics a pixel, p(z) by --prior
    inference model    q(z|x) = N(μ(x), σ²(x))       all networks are DenseNets with channel attention
    bound              log p(x) ≥ E_q[log p(x|z)] - E_q[log q(z|x) - log p(z)] = -E_q[re_x + kl_z]

    python vae.py --small --steps 2000               built-in shapes, minutes on a laptop
    python vae.py --dataset cifar10 --small          CIFAR-10 on a CPU
    python vae.py --dataset cifar10                  the paper's size, for a GPU; Table 2 reports 3.51 bits per dimension

arXiv:2010.02014. Eq. (3.3b) is the second line without a number displayed in its section 3.3; "released" is the code of srVAE, the
authors' predecessor of this paper, which has none. Derivation, logged keys, differences from the paper: docs/vae.md. All
equations: docs/equations.md. Measured results: docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W · S importance samples
    x (B, C, H, W) image in [-1, 1] · z (B, 16, 8, 8) latent · v (B, 16, 8, 8) the prior's noise, N(0, 1): of a flow the base variable
"""

import argparse, contextlib, dataclasses, json, math, os, pickle, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.distributions import Independent, Normal
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached
from torchvision.utils import save_image

from common import (Batches, UserError, barrier, bits_per_dim, command_line, dmol_channels, dmol_log_prob, dmol_sample, draws, explain,
                    importance_weighted, inception_metrics, join_processes, load_images, load_inception, log_mean_exp,
                    mean_terms, processes, reference_statistics, seconds_to_sample, seed_noise, summed)

# ---- Config ----------------------------------------------------------------------------------------------------------
def flag(default, help, **metadata):
    """A Config field: its default and help; in metadata its `choices`, or `low`, the least value allowed (default 1)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})

@dataclasses.dataclass
class Config:
    """The flags. Defaults are the paper's; where it is silent, the released code's."""
    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, or a folder of images")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    size: int = flag(None, "side of the images in pixels, 8 times a power of two (default: the dataset's own)")
    prior: str = flag("realnvp", "p(z): normal, mog or realnvp (section A.2)", choices=("normal", "mog", "realnvp"))
    mog_components: int = flag(10, "components of --prior mog (Table 2's parameter count implies 1000)")
    small: bool = flag(False, "the same networks narrowed for a laptop CPU, and a quicker evaluation")
    epochs: int = flag(2000, "passes over the training images")
    steps: int = flag(None, "training steps (overrides --epochs)")
    batch_size: int = flag(32, "images a step, all processes together")
    accumulate: int = flag(1, "parts that a batch is computed in, one after another, for less memory")
    lr: float = flag(2e-3, "Adamax's learning rate; times 0.999999 a step, not below 1e-4", low=0)
    seed: int = flag(0, "seed of initialisation, batches and noise", low=0)
    device: str = flag("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = flag("auto", "of the networks; likelihoods are fp32. auto: bf16 on cuda, from Ampere on", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(None, "torch.compile the bound (default: on cuda, from Ampere on, under Linux)")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    resume: bool = flag(False, "continue the run in that folder")
    eval: bool = flag(False, "evaluate the run in that folder, no training")
    log_every: int = flag(50, "steps between progress lines")
    eval_every: int = flag(1000, "steps between validations, with figures")
    save_every: int = flag(1000, "steps between checkpoints")
    iw_samples: int = flag(None, "S of the importance-weighted bound (default 512, --small 64)")
    iw_images: int = flag(None, "test images for that bound (default all, --small 200)")
    temperature: float = flag(1.0, "figures: scale of the prior's noise", low=0)
    mean: bool = flag(False, "figures: show the mean of p(x|z), not a draw from it")
    fid: int = flag(None, "samples for FID and Inception Score, at the end; 50000 is usual (default: neither)")
    inception_weights: str = flag(None, "Inception weights for --fid (default: downloaded to --data_dir)")
    free = "iw_samples iw_images temperature mean"  # flags of the evaluation, which --resume and --eval may change (FREE)

    @property
    def variant(self):
        return self.prior + "-small" * self.small

# ---- Building blocks (A.3): weight norm, dense blocks, channel attention ---------------------------------------------
def conv(c_in, c_out, kernel=3, stride=1, scale=1.0, double=False):
    """Convolution with w = g·v/‖v‖ (Salimans & Kingma 2016, Eq. (2)) that keeps height and width, divides them by `stride` or,
    transposed, doubles them. `scale` is its output's sd after data_dependent_init."""
    layer = (nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, output_padding=1) if double
             else nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2))
    nn.init.normal_(layer.weight, std=0.05)  # v of a fixed size: PyTorch's shrinks with fan-in, and Adamax then turns w too far
    layer.initial_scale = scale
    return weight_norm(layer, dim=int(double))  # one g for each output channel: dim 1 of a transposed weight

@torch.no_grad()
def data_dependent_init(model, forward):
    """Set each conv's g and b so that its output has mean 0 and sd `initial_scale` (Salimans & Kingma 2016, section 3).

    `forward()` pushes one batch through `model`; a layer is set when it is reached, from inputs already set right. All of
    it is kept in g and b, hence in checkpoints. Convs on pooled 1x1 maps, with one value an image, keep their default.
    """
    def normalise(layer, inputs, output):
        if output.shape[2:] == (1, 1):
            return output
        sd, mean = torch.std_mean(output.float(), (0, 2, 3), correction=0)
        ratio = layer.initial_scale / sd.clamp(min=1e-4)
        g = layer.parametrizations.weight.original0
        g.mul_(ratio.view_as(g))
        layer.bias.sub_(mean).mul_(ratio)
        return (output - mean.view(1, -1, 1, 1)) * ratio.view(1, -1, 1, 1)

    hooks = [m.register_forward_hook(normalise) for m in model.modules() if hasattr(m, "initial_scale")]
    forward()
    for hook in hooks:
        hook.remove()

class ChannelAttention(nn.Module):
    """Each channel times a gate in (0, 1), computed from all channels' means (Zhang et al. 2018). (B, C, H, W) -> same."""
    def __init__(self, channels):
        super().__init__()
        hidden = max(1, channels // 8)  # as released
        self.gate = nn.Sequential(conv(channels, hidden, 1), nn.ELU(inplace=True), conv(hidden, channels, 1), nn.Sigmoid())

    def forward(self, h):
        return h * self.gate(h.mean((2, 3), keepdim=True))

class DenseBlock(nn.Module):
    """`steps` dense steps (Huang et al. 2016; bottleneck 4·growth), then channel attention: (B, C, H, W) -> (B, C + steps·growth, H, W)."""
    def __init__(self, channels, growth, steps):
        super().__init__()
        self.channels = channels + steps * growth
        # NOTE(paper): "ELUs everywhere" (A.3), so one after each conv. The released code has none inside a step, and after
        # it one over all channels so far, old ones again. Same parameters here, half the memory traffic.
        # In place: ELU's gradient follows from its output, so its input need not be kept.
        self.steps = nn.ModuleList(nn.Sequential(conv(c, 4 * growth, 1), nn.ELU(inplace=True), conv(4 * growth, growth), nn.ELU(inplace=True))
                                   for c in range(channels, self.channels, growth))
        self.attention = ChannelAttention(self.channels)

    def forward(self, h):
        for step in self.steps:
            new = step(h)
            h = torch.cat([h.to(new.dtype), new], 1)  # else one fp32 image would make all features after it fp32
        return self.attention(h)

# ---- Networks: an Encoder's or Decoder's `growth` is that of its 8x8 block, and halves with each doubling of the side ----
LATENT = (16, 8, 8)  # channels, height, width of z, whatever the image (section 4.1)

def halvings(size):
    """How often `size` halves on the way down to 8. UserError if it is not 8 times a power of two."""
    times = int(math.log2(size / 8)) if size >= 8 else 0
    if size != 8 * 2**times:
        raise UserError(f"size {size} does not halve down to 8: take 8, 16, 32, 64, 128 …")
    return times

class Encoder(nn.Sequential):
    """Dense blocks, stride-2 convs that double the channels between them: (B, C, size, size) -> (B, c_out, 8, 8)."""
    def __init__(self, channels, size, growth, steps, c_out=2 * LATENT[0], scale=0.1):
        layers = []
        for times in range(halvings(size), -1, -1):  # halvings to come
            layers.append(DenseBlock(channels, max(1, growth >> times), steps))
            channels = layers[-1].channels
            if times:
                layers += [conv(channels, 2 * channels, stride=2), nn.ELU(inplace=True)]
                channels *= 2
        super().__init__(*layers, conv(channels, c_out, 1, scale=scale))

class Decoder(nn.Sequential):
    """Dense blocks, transposed convs that halve the channels after them: (B, 16, 8, 8) -> (B, c_out, size, size).

    There is no block at full size, as released.
    """
    def __init__(self, size, growth, steps, c_out, scale=0.1):
        layers, channels = [], LATENT[0]
        for times in range(halvings(size) or 1):  # doublings done; at size 8 one block, and none
            layers.append(DenseBlock(channels, max(1, growth >> times), steps))
            channels = layers[-1].channels
            if size > 8:
                layers += [conv(channels, channels // 2, double=True), nn.ELU(inplace=True)]
                channels //= 2
        super().__init__(*layers, conv(channels, c_out, scale=scale))

def gaussian(params):
    """Network output (B, 32, 8, 8), μ and log σ², -> N(μ, σ²) over (16, 8, 8), log σ² clamped to [-7, 7], as released."""
    mean, log_var = params.float().chunk(2, 1)
    return Independent(Normal(mean, torch.exp(0.5 * F.hardtanh(log_var, -7, 7)), validate_args=False), 3, validate_args=False)

# ---- Priors: log_prob(z) -> (B,) in nats; from_noise(v), v ~ N(0, 1), -> z ~ p(z); v, z (B, 16, 8, 8) -----------------
class NormalPrior(nn.Module):
    """p(z) = N(0, 1)."""
    def log_prob(self, z):
        return Normal(0.0, 1.0, validate_args=False).log_prob(z).sum((1, 2, 3))

    def from_noise(self, v):
        return v

class MoGPrior(nn.Module):
    """p(z) = 1/M Σ_m N(z; μ_m, σ_m²) with learned μ_m, σ_m, M = --mog_components; from_noise draws m itself, z = μ_m + σ_m·v."""
    def __init__(self, components):
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(components, *LATENT))  # near N(0, 1), no two components alike
        self.log_sd = nn.Parameter(torch.zeros(components, *LATENT))

    def log_prob(self, z):
        components = Normal(self.mean, self.log_sd.exp(), validate_args=False)
        return log_mean_exp(components.log_prob(z.unsqueeze(1)).sum((2, 3, 4)), dim=1)  # (B, M) -> (B,)

    def from_noise(self, v):
        m = torch.randint(len(self.mean), (len(v),), device=v.device)
        return self.mean[m] + self.log_sd[m].exp() * v

# Copied from realnvp.py: Coupling
class Coupling(nn.Module):
    """Affine coupling (Dinh et al. 2016, Eqs. (4), (5), by masks Eq. (9)): values where the mask is 1 pass, the others become z·exp(s) + t.

    s and t see only what passes, so the Jacobian is triangular and log |det| = Σ s (their Eq. (6)), and the inverse can compute
    them again (Eqs. (7), (8)). s is a learned scale times tanh, hence bounded. z (B, C, H, W) -> same, log |det| (B,); net: C channels -> 2C.
    """
    def __init__(self, mask, channels, net):
        super().__init__()
        self.net = net
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("mask", mask.float(), persistent=False)

    def s_t(self, z):
        """Log-scale and translation, 0 where the mask is 1: z (B, C, H, W) -> two of that shape."""
        s, t = self.net(z * self.mask).to(z.dtype).chunk(2, 1)  # bf16 ends here, z is fp32
        return self.scale * torch.tanh(s) * (1 - self.mask), t * (1 - self.mask)

    def forward(self, z):
        """z -> v (B, C, H, W) and log |det ∂v/∂z| (B,)."""
        s, t = self.s_t(z)
        return z * torch.exp(s) + t, s.sum((1, 2, 3))

    def inverse(self, v):
        """v -> z (B, C, H, W)."""
        s, t = self.s_t(v)  # those of z: what passed is the same in both
        return (v - t) * torch.exp(-s)

# Copied from realnvp.py: Couplings
class Couplings(nn.ModuleList):
    """`count` couplings in a row, every other one with the mask inverted, so that every value is moved (Dinh et al., section 3.5).

    z (B, C, H, W) -> same, log |det| (B,) in nats: determinants multiply, their logarithms add (their Eqs. (10), (11)).
    """
    def __init__(self, mask, count, channels, net):
        super().__init__(Coupling((mask + i) % 2, channels, net()) for i in range(count))  # odd i: the mask inverted

    def forward(self, z):
        log_det = 0.0
        for coupling in self:
            z, log_det_i = coupling(z)
            log_det = log_det + log_det_i
        return z, log_det

    def inverse(self, v):  # (f_b ∘ f_a)⁻¹ = f_a⁻¹ ∘ f_b⁻¹ (Eq. (12))
        for coupling in reversed(self):
            v = coupling.inverse(v)
        return v

# Copied from realnvp.py: Flow
class Flow(nn.Module):
    """RealNVP of `scales` scales (Dinh et al., section 3.6, Eqs. (13) to (16)).

    z (B, C, side, side) -> v, same shape, and log |det ∂v/∂z|, (B,) in nats. A scale is 3 checkerboard couplings, then 3
    channel-wise ones on 2x2 squares squeezed into (4C, side/2, side/2). Half of the values are then done, and `rest` goes on
    with the others, (2C, side/2, side/2); the last scale is 4 checkerboard couplings. What is done goes back to its pixel, so
    v has z's shape. net(channels, side) makes a coupling's s and t.
    """
    def __init__(self, channels, side, scales, net):
        super().__init__()
        last = scales == 1
        board = (torch.arange(side)[:, None] + torch.arange(side)) % 2  # (side, side): 1 where row + column is odd (their Figure 3, left)
        half = (torch.arange(4 * channels) < 2 * channels).view(-1, 1, 1)  # (4C, 1, 1): 1 on the first half (right), of RGB red and upper green
        self.fine = Couplings(board, 4 if last else 3, channels, lambda: net(channels, side))
        self.squeezed = None if last else Couplings(half, 3, 4 * channels, lambda: net(4 * channels, side // 2))
        self.rest = None if last else Flow(2 * channels, side // 2, scales - 1, net)

    def forward(self, z):
        z, log_det = self.fine(z)
        if self.rest is None:
            return z, log_det
        z, log_det_squeezed = self.squeezed(F.pixel_unshuffle(z, 2))
        a, b, c, d = z.unflatten(1, (-1, 4)).unbind(2)  # pixels a b over c d of each square, (B, C, side/2, side/2)
        rest, log_det_rest = self.rest(torch.cat([a, d], 1))  # b and c are done; the diagonal goes on, as released
        a, d = rest.chunk(2, 1)
        v = F.pixel_shuffle(torch.stack([a, b, c, d], 2).flatten(1, 2), 2)
        return v, log_det + log_det_squeezed + log_det_rest

    def inverse(self, v):
        if self.rest is None:
            return self.fine.inverse(v)
        a, b, c, d = F.pixel_unshuffle(v, 2).unflatten(1, (-1, 4)).unbind(2)
        a, d = self.rest.inverse(torch.cat([a, d], 1)).chunk(2, 1)
        z = self.squeezed.inverse(torch.stack([a, b, c, d], 2).flatten(1, 2))
        return self.fine.inverse(F.pixel_shuffle(z, 2))

class RealNVPPrior(NormalPrior):
    """p(z) = N(v; 0, 1) |det ∂v/∂z|, v = flow(z) a RealNVP (Eq. (2.2a)).

    `flow` is the paper's f⁻¹, `flow.inverse` its f. Two scales, as released: z is (16, 8, 8), then half of it, (32, 4, 4).
    """
    def __init__(self, growth, steps):
        super().__init__()
        def net(channels, side):
            block = DenseBlock(channels, growth, steps)
            return nn.Sequential(block, conv(block.channels, 2 * channels, scale=0.0))  # s = t = 0 at first: v = z
        self.flow = Flow(channels=LATENT[0], side=LATENT[1], scales=2, net=net)

    def log_prob(self, z):
        v, log_det = self.flow(z.float())
        return super().log_prob(v) + log_det

    def from_noise(self, v):
        return self.flow.inverse(v)

# ---- The model -------------------------------------------------------------------------------------------------------
WIDTHS = {  # (growth, steps) of the dense blocks
    "32": dict(q_z=(64, 8), p_x=(128, 6), flow=(64, 5)),  # released
    "64": dict(q_z=(64, 6), p_x=(128, 5), flow=(64, 5)),  # ours, within the 32-42 M parameters of the paper's models
    "small": dict(q_z=(32, 2), p_x=(32, 2), flow=(16, 2)),
}

class VAE(nn.Module):
    """The factors q(z|x), p(z), p(x|z) for images of shape (C, H, W), H = W = 8 times a power of two (else UserError)."""
    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        width = WIDTHS["small" if cfg.small else "32" if size <= 32 else "64"]
        self.q_z = Encoder(channels, size, *width["q_z"])
        self.p_z = {"normal": NormalPrior, "mog": lambda: MoGPrior(cfg.mog_components),
                    "realnvp": lambda: RealNVPPrior(*width["flow"])}[cfg.prior]()
        self.p_x = Decoder(size, *width["p_x"], dmol_channels(channels))

    def initialize(self, x):
        """Data-dependent initialisation from one batch x (B, C, H, W), B ≥ 1."""
        data_dependent_init(self, lambda: self.terms(x))

    def terms(self, x):
        """The bound's terms: x (B, C, H, W) -> {"re_x": -log p(x|z), "kl_z": log q(z|x) - log p(z)}, z ~ q(z|x), (B,) in nats.

        Minus their sum stands inside the expectation of Eq. (2.2b). Both are costs, signed as in Table 2, and one-sample
        estimates: kl_z too, under every prior, for the flow has no closed form and the three are to be compared.
        """
        q_z = gaussian(self.q_z(x))
        z = q_z.rsample()
        return {"re_x": -dmol_log_prob(x, self.p_x(z)), "kl_z": q_z.log_prob(z) - self.p_z.log_prob(z)}

    def elbo(self, x):
        """One-sample estimate of E_q[log p(x|z) - log q(z|x) + log p(z)] ≤ log p(x), Eq. (2.1a): (B, C, H, W) -> (B,) in nats."""
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples, chunk=None):
        """log w_s = log p(x|z_s) + log p(z_s) - log q(z_s|x), z_s ~ q(z|x): (B, C, H, W) -> (samples, B) in nats.

        The weights of Burda et al. 2015, Eq. (8). x is encoded once; of the samples·B latents `chunk` at a time are decoded,
        or B if that is more (default: what fills the device): a matter of speed and memory, not of the result.
        """
        chunk = chunk or max(1, (16 if x.device.type == "cpu" else 512) * 3072 // x[0].numel())  # 3072 values: an image of 32x32
        q_z = gaussian(self.q_z(x))
        z = q_z.rsample((samples,))  # (S, B, 16, 8, 8)
        log_p = []
        for part in z.split(max(1, chunk // len(x))):
            flat = part.flatten(0, 1)
            log_p_x = dmol_log_prob(x.repeat(len(part), 1, 1, 1), self.p_x(flat))
            log_p.append((log_p_x + self.p_z.log_prob(flat)).view(len(part), -1))
        return torch.cat(log_p) - q_z.log_prob(z)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, mean=False):
        """Eq. (3.3a): z ~ p(z), x ~ p(x|z) or the mean of p(x|z) -> (n, C, H, W), on the 256-level grid."""
        v = temperature * torch.randn(n, *LATENT, device=next(self.parameters()).device)
        return dmol_sample(self.p_x(self.p_z.from_noise(v)), mean)

    @torch.no_grad()
    def reconstruct(self, x, mean=False):
        """Eq. (3.3b): z ~ q(z|x), x̂ ~ p(x|z) or its mean: (B, C, H, W) -> same, on the 256-level grid."""
        return dmol_sample(self.p_x(gaussian(self.q_z(x)).rsample()), mean)

    @torch.no_grad()
    def interpolate(self, x1, x2, steps=10, mean=False):
        """x decoded along the straight line in z between the means of q(z|x1), q(z|x2): (B, C, H, W) -> (B, steps, C, H, W)."""
        z1, z2 = gaussian(self.q_z(x1)).mean, gaussian(self.q_z(x2)).mean
        z = torch.stack([torch.lerp(z1, z2, i / (steps - 1)) for i in range(steps)], 1)
        return dmol_sample(self.p_x(z.flatten(0, 1)), mean).unflatten(0, (-1, steps))

# ---- Training --------------------------------------------------------------------------------------------------------
def train(cfg, model, images, folder, checkpoint):
    """Minimise -ELBO, in nats per image averaged over the batch. Returns False where Ctrl-C or SIGTERM ended it early."""
    rank, world = processes()
    data = Batches(images.train, cfg.batch_size, cfg.device, cfg.seed, images.augment, world * cfg.accumulate)
    valid = Batches(images.valid, cfg.batch_size, cfg.device)
    total, dims = cfg.steps or cfg.epochs * data.per_epoch, math.prod(images.shape)
    optimizer = torch.optim.Adamax(model.parameters(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-7)  # as released
    if not checkpoint:
        model.initialize(data.batch(0))
    state, rows = restore(cfg, folder, checkpoint, model, optimizer), []
    terms_of = prepared(cfg, model.terms, model)
    with stop_requests() as stop:
        for step in range(state["step"] + 1, total + 1):
            optimizer.param_groups[0]["lr"] = max(cfg.lr * 0.999999**step, min(cfg.lr, 1e-4))
            optimizer.zero_grad()
            seed_noise(cfg.seed, step, rank)
            rows.append({})
            for x in data.batch(step - 1, rank, world).chunk(cfg.accumulate):
                with autocast(cfg):
                    terms = terms_of(x)
                loss = sum(terms.values()).mean() / cfg.accumulate  # the parts' gradients add up to that of the batch
                loss.backward()
                rows[-1] = {name: rows[-1].get(name, 0) + values.detach().mean() / cfg.accumulate for name, values in terms.items()}
            optimizer.step()
            state["step"] = step
            log, validate, keep = (step == total or step % n == 0 for n in (cfg.log_every, cfg.eval_every, cfg.save_every))
            stopping = asked(stop)
            if log or validate or keep or stopping:  # training waits for the device here only, and stops if not finite
                report(folder, state, "train", rows, total, data, dims)
                rows = []
            if validate:
                with inference(cfg):
                    bpd = report(folder, state, "valid", [mean_terms(model, valid)], total, data, dims)
                    if rank == 0:
                        draw(cfg, model, images.valid, folder, f"{step:06d}")
                if bpd < state["best"]:
                    state["best"] = bpd
                    save(folder / "best.pt", cfg, model, optimizer, state)
                state["seconds"] = time.perf_counter() - state["start"]  # images/s counts neither validation nor figures
            if keep or stopping:
                save(folder / "last.pt", cfg, model, optimizer, state)
            if stopping:
                return step == total
    return True

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

def asked(stop):
    """Whether any process was asked to stop. They agree on it each step, from CPU to CPU: no device is waited for."""
    return summed(torch.tensor(len(stop))).item() > 0

def autocast(cfg):
    """The networks' precision, --dtype."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bf16")

@contextlib.contextmanager
def inference(cfg):
    """No gradients, noise that follows from --seed alone, and normalised weights computed once, not in every pass."""
    with torch.no_grad(), autocast(cfg), cached():
        torch.manual_seed(cfg.seed)
        yield

def prepared(cfg, function, *parts, **options):
    """`function`, compiled with --compile; under torchrun its gradients for `parts` are averaged over all processes."""
    if cfg.compile:
        function = torch.compile(function, fullgraph=True)
    if processes()[1] == 1:
        return function
    module = nn.ModuleList(parts)  # DistributedDataParallel takes a module: one that holds `parts`, and whose forward is `function`
    module.forward = function
    return DistributedDataParallel(module, **options)

def report(folder, state, split, rows, total, data, dims):
    """Means of rows [{term: nats per image}] over steps and processes, for the console, log.jsonl and curves.png -> bits per dimension.

    Raises FloatingPointError, naming step and terms, where a row is not finite.
    """
    values = torch.stack([torch.stack([torch.as_tensor(value) for value in row.values()]) for row in rows])
    values = (summed(values) / processes()[1]).tolist()
    for step, row in enumerate(values, state["step"] - len(rows) + 1):
        if not all(map(math.isfinite, row)):
            raise FloatingPointError(f"step {step} is not finite, {dict(zip(rows[0], row))}; the last checkpoint is kept")
    terms = {name: sum(column) / len(rows) for name, column in zip(rows[0], zip(*values))}
    bpd, step, before = bits_per_dim(sum(terms.values()), dims), state["step"], state["seconds"]
    state["seconds"] = time.perf_counter() - state["start"]
    if processes()[0]:
        return bpd
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "split": split, "bpd": bpd, **terms, "seconds": state["seconds"]}) + "\n")
    parts = " + ".join(f"{name} {bits_per_dim(value, dims):.3f}" for name, value in terms.items())
    rate = len(rows) * data.batch_size / (state["seconds"] - before)
    spent, left = (timedelta(seconds=int(state["seconds"] * n / step)) for n in (step, total - step))
    screen = sys.stdout.isatty()  # there, a train line overwrites the one before
    print("\r\033[K" * screen + f"epoch {(step - 1) // data.per_epoch + 1}  step {step}/{total}  {split} bpd {bpd:.4f} = {parts}"
          + (f"  {rate:.0f} img/s  {spent} < {left}" if split == "train" else ""),
          end="" if screen and split == "train" and step < total else "\n", flush=True)
    if split == "valid":
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        axes = (figure := Figure(layout="constrained")).subplots()
        for name in ("train", "valid"):
            axes.plot(*zip(*((r["step"], r["bpd"]) for r in records if r["split"] == name)), marker=".", label=name)
        axes.set(xlabel="step", ylabel="bits per dimension", ylim=(None, bpd + max(1, abs(bpd)) / 2))
        axes.legend()
        figure.savefig(folder / "curves.png")
    return bpd

# ---- Evaluation ------------------------------------------------------------------------------------------------------
def draw(cfg, model, images, folder, name):
    """The figures `name`: samples/, 64 draws; reconstructions/, rows x, x̂, x, x̂ …; interpolations/, one a row."""
    name += "-mean" * cfg.mean + f"-temperature{cfg.temperature:g}" * (cfg.temperature != 1) + ".png"
    x = next(iter(Batches(images[:32], 32, cfg.device)))
    save_grid(folder / "samples" / name, model.sample(64, cfg.temperature, cfg.mean))
    save_grid(folder / "reconstructions" / name, x, model.reconstruct(x, cfg.mean))
    save_grid(folder / "interpolations" / name, model.interpolate(x[:8], x[:8].roll(1, 0), 8, cfg.mean).flatten(0, 1))

def save_grid(path, *images):
    """PNG of true pixel values, 8 images a row. Several sets (B, C, H, W): row 1 of each, one above the other, then row 2 …"""
    path.parent.mkdir(exist_ok=True)
    columns = min(8, len(images[0]))
    whole = len(images[0]) // columns * columns
    rows = torch.stack([x[:whole].unflatten(0, (-1, columns)) for x in images], 1)  # (rows, sets, columns, C, H, W)
    save_image((rows.flatten(0, 2) + 1) / 2, path, nrow=columns)

def evaluate(cfg, model, images, folder, state):
    """A row of Table 1 or 2, printed and in results.json, and the figures test.png: of this checkpoint, on the test images."""
    dims, samples = math.prod(images.shape), cfg.iw_samples or (64 if cfg.small else 512)
    count = min(cfg.iw_images or (200 if cfg.small else len(images.test)), len(images.test))
    with inference(cfg):
        terms = mean_terms(model, Batches(images.test, cfg.batch_size, cfg.device))
        kept = folder / f"importance-{state['step']}-{samples}-{count}-{cfg.dtype}.jsonl"
        bound = importance_weighted(model, Batches(images.test[:count], 8, cfg.device), samples, dims, kept)
        fid = {}
        if cfg.fid and (inception := load_inception(cfg.inception_weights, cfg.data_dir, cfg.device)):
            fid = inception_metrics(inception, draws(model, cfg.fid), reference_statistics(inception, images, cfg.device))
        if processes()[0]:
            return
        results = {
            "elbo_bpd": bits_per_dim(sum(terms.values()), dims),
            **bound,
            "re_nats": sum(value for name, value in terms.items() if name.startswith("re_")),
            "kl_nats": sum(value for name, value in terms.items() if name.startswith("kl_")),
            **terms,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_1": seconds_to_sample(model, 1), "seconds_100": seconds_to_sample(model, 100),
            "step": state["step"], "train_seconds": state["seconds"], "device": cfg.device, "dtype": cfg.dtype, **fid}
        draw(cfg, model, images.test, folder, "test")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    for name, value in results.items():
        print(f"{name:14} {value:,.4f}" if isinstance(value, float) else f"{name:14} {value}")

def main(Model, argv=None):
    """Train and evaluate; --eval: evaluate. Returns the exit code: 2 for a user's mistake, 1 not finite, 130 stopped."""
    cfg = parse_flags(argv)
    try:
        halvings(cfg.size or 8)  # before anything is made at that size
        folder, checkpoint = open_run(cfg)
        images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
        torch.manual_seed(cfg.seed)
        model = Model(cfg, images.shape).to(cfg.device, memory_format=torch.channels_last)
        if not cfg.eval:
            start_run(cfg, folder, model, images)
            if not train(cfg, model, images, folder, checkpoint):
                print(f"stopped and saved; go on with: {command_line()}{' --resume' * (not cfg.resume)}")
                return 130
            checkpoint = open_run(dataclasses.replace(cfg, eval=True))[1]  # best.pt, not the last step
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
    sys.exit(main(VAE))
