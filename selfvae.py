"""Self-supervised VAE: a hierarchy over deterministic representations y of the image (Gatopoulos & Tomczak 2020, section 3).

    representations    y_k = d(y_{k+1}), k = K … 1, y_{K+1} = x         d is deterministic, to 8 bits: --transform
    generative model   p(u) p(y_1|u) Π_k p(z_k|y_k, z_{k-1}) p(y_{k+1}|y_k, z_k),     z_0 = u
    inference model    q(u|y_1) Π_k q(z_k|y_{k+1}), diagonal Gaussians; y is computed, not inferred
    bound              log p(x) ≥ -E_q[re_x + Σ_k re_y_k + Σ_k kl_z_k + kl_u]

    python selfvae.py --small --steps 2000                       built-in shapes, minutes on a laptop
    python selfvae.py --dataset cifar10 --levels 1 --small       CIFAR-10 on a CPU
    python selfvae.py --dataset cifar10 --levels 1               the paper's size, for a GPU; Table 1 reports 3.65 bits per dimension
    python selfvae.py --dataset imagenette --levels 2            64 -> 32 -> 16, the paper's "3-level" model; Table 1: 3.70
    python selfvae.py --dataset celeba --transform sketch        y a pencil sketch of x; Table 1: 3.24

arXiv:2010.02014. Eq. (3.3b) is the second line without a number displayed in its section 3.3; "released" is the code of srVAE, the
authors' predecessor of this paper, which has none. Derivation, logged keys, differences from the paper: docs/selfvae.md. All
equations: docs/equations.md. Measured results: docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W · K = --levels · S importance samples
    x = y_{K+1} (B, C, H, W) image in [-1, 1] · y_k (B, C_k, H_k, W_k), as discrete as x; downscaling: H_k = H / 2^(K+1-k)
    u = z_0, z_k (B, 16, 8, 8) latents · v (B, 16, 8, 8) the noise of p(u), N(0, 1): of a flow the base variable
    P = dmol_channels(C) parameters a pixel, of 10 logistic components
"""

import argparse, contextlib, dataclasses, json, math, os, pickle, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached
from torchvision.utils import save_image

from common import (Batches, UserError, barrier, bits_per_dim, command_line, dmol_channels, dmol_log_prob, dmol_sample, dmol_shift,
                    draws, explain, from_uint8, importance_weighted, inception_metrics, join_processes, load_images, load_inception,
                    mean_terms, processes, psnr, quantize, reference_statistics, seconds_to_sample, seed_noise, summed, to_uint8)

# ---- Config ----------------------------------------------------------------------------------------------------------
# Copied from vae.py: flag
def flag(default, help, **metadata):
    """A Config field: its default and help; in metadata its `choices`, or `low`, the least value allowed (default 1)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})
# Changed from vae.py: --transform and --levels; no mixture prior
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the paper's; where it is silent, the released code's."""
    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, or a folder of images")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    size: int = flag(None, "side of the images in pixels, 8 times a power of two (default: the dataset's own)")
    transform: str = flag("downscale", "d: downscale, sketch, grayscale, edges or posterize")
    levels: int = flag(1, "K, how often d is applied; 0 is a VAE, 2 the paper's 3-level model", low=0)
    prior: str = flag("realnvp", "p(u): normal or realnvp (section A.2)", choices=("normal", "realnvp"))
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
    temperature: float = flag(1.0, "figures: scale of the priors' noise", low=0)
    mean: bool = flag(False, "figures: show the mean of p(y|·) and p(x|·), not a draw from it")
    fid: int = flag(None, "samples for FID and Inception Score, at the end; 50000 is usual (default: neither)")
    inception_weights: str = flag(None, "Inception weights for --fid (default: downloaded to --data_dir)")
    free = "iw_samples iw_images temperature mean"  # flags of the evaluation, which --resume and --eval may change (FREE)

    @property
    def variant(self):
        return f"{self.transform}{self.levels}-{self.prior}" + "-small" * self.small

# ---- Building blocks (A.3): weight norm, dense blocks, channel attention ---------------------------------------------
# Copied from vae.py: conv
def conv(c_in, c_out, kernel=3, stride=1, scale=1.0, double=False):
    """Convolution with w = g·v/‖v‖ (Salimans & Kingma 2016, Eq. (2)) that keeps height and width, divides them by `stride` or,
    transposed, doubles them. `scale` is its output's sd after data_dependent_init."""
    layer = (nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, output_padding=1) if double
             else nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2))
    nn.init.normal_(layer.weight, std=0.05)  # v of a fixed size: PyTorch's shrinks with fan-in, and Adamax then turns w too far
    layer.initial_scale = scale
    return weight_norm(layer, dim=int(double))  # one g for each output channel: dim 1 of a transposed weight

# Copied from vae.py: data_dependent_init
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

# Copied from vae.py: ChannelAttention
class ChannelAttention(nn.Module):
    """Each channel times a gate in (0, 1), computed from all channels' means (Zhang et al. 2018). (B, C, H, W) -> same."""
    def __init__(self, channels):
        super().__init__()
        hidden = max(1, channels // 8)  # as released
        self.gate = nn.Sequential(conv(channels, hidden, 1), nn.ELU(inplace=True), conv(hidden, channels, 1), nn.Sigmoid())

    def forward(self, h):
        return h * self.gate(h.mean((2, 3), keepdim=True))

# Copied from vae.py: DenseBlock
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
# Copied from vae.py: LATENT
LATENT = (16, 8, 8)  # channels, height, width of z, whatever the image (section 4.1)

# Copied from vae.py: halvings
def halvings(size):
    """How often `size` halves on the way down to 8. UserError if it is not 8 times a power of two."""
    times = int(math.log2(size / 8)) if size >= 8 else 0
    if size != 8 * 2**times:
        raise UserError(f"size {size} does not halve down to 8: take 8, 16, 32, 64, 128 …")
    return times

# Copied from vae.py: Encoder
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

# Copied from vae.py: Decoder
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

# Copied from vae.py: gaussian
def gaussian(params):
    """Network output (B, 32, 8, 8), μ and log σ², -> N(μ, σ²) over (16, 8, 8), log σ² clamped to [-7, 7], as released."""
    mean, log_var = params.float().chunk(2, 1)
    return Independent(Normal(mean, torch.exp(0.5 * F.hardtanh(log_var, -7, 7)), validate_args=False), 3, validate_args=False)

def dense_blocks(channels, growth, steps, c_out, scale=1.0):
    """Three dense blocks in a row, then a 1x1 conv: (B, channels, H, W) -> (B, c_out, H, W)."""
    layers = []
    for _ in range(3):
        layers.append(DenseBlock(channels, growth, steps))
        channels = layers[-1].channels
    return nn.Sequential(*layers, conv(channels, c_out, 1, scale=scale))

class ConditionalPrior(nn.Module):
    """p(z_k | y_k, z_{k-1}): y_k (B, C, size, size) through from_y, then with z_{k-1} (B, 16, 8, 8) -> (B, 32, 8, 8), μ and log σ²."""
    def __init__(self, channels, size, y_width, joint_width):
        super().__init__()
        self.from_y = nn.Sequential(Encoder(channels, size, *y_width, c_out=LATENT[0], scale=1.0), nn.ELU())  # as released: on z's way none
        self.from_z = dense_blocks(LATENT[0], *joint_width, LATENT[0])
        self.joint = dense_blocks(2 * LATENT[0], *joint_width, 2 * LATENT[0], scale=0.1)

    def forward(self, h, z):
        """h = from_y(y_k), apart so that importance weighting computes it once for all samples of z."""
        return self.joint(torch.cat([h, self.from_z(z)], 1))

class ConditionalDecoder(nn.Module):
    """p(y_{k+1} | y_k, z_k): y_k (B, channels, …) and z_k -> logistic-mixture parameters (B, P, size, size) for y_{k+1}.

    NOTE(paper): with `residual`, where y_k is a coarse y_{k+1}, it is the mixture of y_{k+1} less the enlarged y_k. The
    released code has no residual: its network must first learn to copy its input. The parameters are as many.
    """
    def __init__(self, channels, size, c_out, residual, z_width, features, joint_width):
        super().__init__()
        self.size, self.c_out, self.residual = size, c_out, residual
        self.from_z = Decoder(size, *z_width, features, scale=1.0)
        self.joint = dense_blocks(features + channels, *joint_width, dmol_channels(c_out), scale=0.1)

    def forward(self, y, z):
        y = F.interpolate(y, size=(self.size, self.size), mode="bilinear")
        params = self.joint(torch.cat([self.from_z(z), y], 1))
        return dmol_shift(params, y.expand(-1, self.c_out, -1, -1)) if self.residual else params

# ---- Prior p(u): log_prob(z) -> (B,) in nats; from_noise(v), v ~ N(0, 1), -> z ~ p(z); v, z (B, 16, 8, 8) --------------
# Copied from vae.py: NormalPrior
class NormalPrior(nn.Module):
    """p(z) = N(0, 1)."""
    def log_prob(self, z):
        return Normal(0.0, 1.0, validate_args=False).log_prob(z).sum((1, 2, 3))

    def from_noise(self, v):
        return v

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

# Copied from vae.py: RealNVPPrior
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

# ---- The transformation d: integer levels 0 … 255 (B, C, H, W) -> the same, hence exact on every device, in every batch ---
def downscale(y):
    """The mean of each 2x2 block, half rounded up: (B, C, H, W) -> (B, C, H/2, W/2).

    NOTE(paper): "downscaling" is not specified; the released code takes PIL's antialiased bilinear filter, on the CPU.
    """
    return (y[..., ::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, ::2] + y[..., 1::2, 1::2] + 2) // 4

def grayscale(y):
    """Luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), half rounded up: (B, 3, H, W) -> (B, 1, H, W); grey y -> itself."""
    return y if y.shape[1] == 1 else (299 * y[:, :1] + 587 * y[:, 1:2] + 114 * y[:, 2:] + 500) // 1000

def shifted(y, dim, offsets):
    """One copy of y for each offset o, pixel i of which is pixel i + o of y along `dim`; beyond the edge, the edge pixel."""
    last = y.shape[dim] - 1
    return [y.index_select(dim, (torch.arange(last + 1, device=y.device) + o).clamp(0, last)) for o in offsets]

def sketch(y):
    """Pencil sketch by colour dodge (A.6) -> (B, 1, H, W): grayscale over its own blur, so that flat areas turn white.

    dodge(a, b) = 255 a / (255 - b), b the blurred inverse of a. The blur's binomial weights are a Gaussian of σ = √2 pixels.
    NOTE(paper): no kernel is given, and the edge-preserving filter that is cited is another algorithm. The two "+ 1" turn black
    areas white, as all flat ones, where 0 / 0 would stand.
    """
    a = grayscale(y)
    b = 255 - a
    for dim in (2, 3):
        b = sum(math.comb(8, i) * moved for i, moved in enumerate(shifted(b, dim, range(-4, 5))))
    b = (b + 2**15) // 2**16  # the weights of a side sum to 2⁸
    return (255 * (a + 1) // (255 - b + 1)).clamp(max=255)

def edges(y):
    """Length of (a_{i+1} - a_{i-1}, a_{j+1} - a_{j-1}), the gradient of the grayscale image a, rounded, at most 255 -> (B, 1, H, W).

    The one float here. It cannot tip over: (m + ½)² = m² + m + ¼, so the root of an integer below 256² keeps 4e-4 from m + ½.
    """
    a = grayscale(y)
    (left, right), (above, below) = shifted(a, 3, (-1, 1)), shifted(a, 2, (-1, 1))
    return ((right - left)**2 + (below - above)**2).float().sqrt().round().int().clamp(max=255)

def posterize(y):
    """The two high bits of each channel: 0, 85, 170 or 255. Shape as before."""
    return y // 64 * 85

TRANSFORMS = {  # --transform: d, the most --levels that make sense, whether d(y) is a coarse y
    "downscale": (downscale, math.inf, True),
    "sketch": (sketch, 1, False),
    "grayscale": (grayscale, 1, True),
    "edges": (edges, 1, False),
    "posterize": (posterize, 1, True),
}

# ---- The model -------------------------------------------------------------------------------------------------------
# Changed from vae.py: every factor has its own
WIDTHS = {  # of (K, size of x ≤ 32): (growth, steps) of dense blocks. p_z: from_y; from_z and joint. p_x: from_z, its features, joint
    (0, True): dict(q_u=(64, 8), p_y=(128, 6), flow=(64, 5)),  # released, as in vae.py
    (0, False): dict(q_u=(64, 6), p_y=(128, 5), flow=(64, 5)),  # ours, as in vae.py
    (1, True): dict(q_u=(128, 3), p_y=(128, 4), flow=(64, 5), q_z=(64, 4),  # released
                    p_z=((64, 5), (64, 3)), p_x=((64, 8), 100, (64, 5))),
    "other": dict(q_u=(128, 3), p_y=(128, 4), flow=(64, 5), q_z=(64, 3),  # ours: the paper's 32-42 M parameters for K ≤ 2, x ≤ 64
                  p_z=((48, 4), (48, 3)), p_x=((64, 6), 100, (16, 4))),
    "full-size y": dict(q_u=(64, 6), p_y=(128, 4), flow=(64, 5), q_z=(64, 3),  # ours, likewise
                        p_z=((32, 3), (48, 3)), p_x=((64, 6), 100, (16, 4))),
    "small VAE": dict(q_u=(32, 2), p_y=(32, 2), flow=(16, 2)),  # as in vae.py; about as many parameters in:
    "small": dict(q_u=(16, 2), p_y=(32, 2), flow=(16, 2), q_z=(16, 2), p_z=((16, 1), (8, 1)), p_x=((16, 2), 8, (8, 2))),
}

class SelfVAE(nn.Module):
    """The factors of K = cfg.levels levels: q_u, p_u, p_y, and q_z, p_z, p_x, lists whose item k - 1 belongs to level k.

    `image_shape` is (C, H, W), H = W; every y must halve down to 8x8 (else UserError). Networks take C_k, H_k from d itself.
    K = 0 is a VAE: x is y_1, p_y decodes it.
    """
    def __init__(self, cfg, image_shape):
        super().__init__()
        if cfg.transform not in TRANSFORMS:
            raise UserError(f"there is no --transform {cfg.transform}: take {', '.join(TRANSFORMS)}")
        halvings(image_shape[1])
        self.d, most, coarse = TRANSFORMS[cfg.transform]
        self.K = cfg.levels
        if cfg.transform == "grayscale" and image_shape[0] == 1:
            raise UserError("--transform grayscale leaves grey images as they are: take another")
        if self.K > most:
            raise UserError(f"--transform {cfg.transform} cannot be applied {self.K} times: take --levels {most}")
        self.shapes = {k: y.shape[1:] for k, y in self.representations(torch.zeros(1, *image_shape)).items()}  # (C_k, H_k, W_k)
        if self.K and self.shapes[1][1] < 8:
            raise UserError(f"--levels {self.K} leaves y_1 {self.shapes[1][1]} pixels a side, and 8 are the least: take fewer")
        C, size, _ = self.shapes[1]
        if cfg.small:
            width = WIDTHS["small" if self.K else "small VAE"]
        elif self.K and size == image_shape[1]:
            width = WIDTHS["full-size y"]
        else:
            width = WIDTHS.get((self.K, image_shape[1] <= 32), WIDTHS["other"])
        self.q_u = Encoder(C, size, *width["q_u"])  # Eq. (3.2g)
        self.p_u = RealNVPPrior(*width["flow"]) if cfg.prior == "realnvp" else NormalPrior()  # Eqs. (3.2a), (3.2b)
        self.p_y = Decoder(size, *width["p_y"], dmol_channels(C))  # Eq. (3.2c)
        self.q_z, self.p_z, self.p_x = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k in range(1, self.K + 1):
            (C, size, _), (C_next, size_next, _) = self.shapes[k], self.shapes[k + 1]
            self.q_z.append(Encoder(C_next, size_next, *width["q_z"]))  # Eq. (3.2h)
            self.p_z.append(ConditionalPrior(C, size, *width["p_z"]))  # Eq. (3.2d)
            self.p_x.append(ConditionalDecoder(C, size_next, C_next, coarse, *width["p_x"]))  # Eq. (3.2e)

    def initialize(self, x):
        """Data-dependent initialisation from one batch x (B, C, H, W), B ≥ 1."""
        data_dependent_init(self, lambda: self.terms(x))

    def factors(self):
        """-> for k = 1 … K: k, q(z_k|y_{k+1}), p(z_k|y_k, z_{k-1}), p(y_{k+1}|y_k, z_k)."""
        return zip(range(1, self.K + 1), self.q_z, self.p_z, self.p_x)

    def representations(self, x):
        """x -> {k: y_k}, k = 1 … K+1, y_{K+1} = x: the deterministic q(y_k|y_{k+1}) = δ(y_k = d(y_{k+1})), Eq. (3.2f).

        On 256 levels y is discrete, and every p(y|·) a probability and no density (section 3.2): else the bound would be void. As
        log q(y|·) = 0, of the second term of Eq. (1) -log p(y|u) is left; and as y follows from x, q(z|x, y) = q(z|x).
        """
        y = {self.K + 1: x}
        for k in range(self.K, 0, -1):
            y[k] = from_uint8(self.d(to_uint8(y[k + 1]).int()))
        return y

    def terms(self, x):
        """The bound's terms, all costs, (B,) in nats, from one sample of u and every z_k: Eqs. (2), (A.4e), for K levels Eq. (3.4a).

            re_y_1, …, re_y_K, re_x    -log p(y_1|u), -log p(y_{k+1}|y_k, z_k): reconstruction errors, signed as in Table 1
            (y_{K+1} is x: at K = 0 the only reconstruction error is re_x.)
            kl_u                       log q(u|y_1) - log p(u): a one-sample estimate, as p(u) may be a flow
            kl_z_1, …, kl_z_K          KL(q(z_k|y_{k+1}) ‖ p(z_k|y_k, z_{k-1})), in closed form

        NOTE(paper): Eq. (3.4a) prints the sum of KL(z_k) from k = 2; at K = 1 that would lose the KL_z of Eq. (2).
        """
        y, terms = self.representations(x), {}
        name = lambda k: "re_x" if k == self.K + 1 else f"re_y_{k}"
        q_u = gaussian(self.q_u(y[1]))
        z = q_u.rsample()  # u ~ q(u|y_1)
        terms["kl_u"] = q_u.log_prob(z) - self.p_u.log_prob(z)
        terms[name(1)] = -dmol_log_prob(y[1], self.p_y(z))
        for k, q_z, p_z, p_x in self.factors():
            posterior, prior = gaussian(q_z(y[k + 1])), gaussian(p_z(p_z.from_y(y[k]), z))
            z = posterior.rsample()  # z_k ~ q(z_k|y_{k+1})
            terms[f"kl_z_{k}"] = kl_divergence(posterior, prior)
            terms[name(k + 1)] = -dmol_log_prob(y[k + 1], p_x(y[k], z))
        return terms

    def elbo(self, x):
        """One-sample estimate of the lower bound of log p(x), Eq. (2): (B, C, H, W) -> (B,) in nats."""
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples, chunk=None):
        """log w_s = log p(x, y, z_s, u_s) - log q(z_s, u_s|x, y), joint samples from q: (B, C, H, W) -> (samples, B) in nats.

        The two parts are what Eqs. (A.4a), (A.4b) average. E[log w] is Eqs. (1), (A.4c) with log q(y|x) = 0, hence Eq. (2). The mean
        of w is p(x, y), not p(x): the bound that more samples tighten never counts other y's. x and the y_k are encoded once; of the
        samples·B joint latents `chunk` at a time are decoded, or B if that is more (default: what fills the device): a matter of speed
        and memory, not of the result.
        """
        chunk = chunk or max(1, (16 if x.device.type == "cpu" else 512) * 3072 // x[0].numel())  # 3072 values: an image of 32x32
        y = self.representations(x)
        posteriors = [gaussian(q(y[k + 1])) for k, q in enumerate([self.q_u, *self.q_z])]
        h = {k: p_z.from_y(y[k]) for k, _, p_z, _ in self.factors()}
        z = [q.rsample((samples,)) for q in posteriors]  # [u, z_1, …, z_K], each (S, B, 16, 8, 8)
        log_p = []
        for part in zip(*(z_k.split(max(1, chunk // len(x))) for z_k in z)):
            count, part = len(part[0]), [z_k.flatten(0, 1) for z_k in part]
            tile = lambda t: t.repeat(count, 1, 1, 1)
            joint = self.p_u.log_prob(part[0]) + dmol_log_prob(tile(y[1]), self.p_y(part[0]))
            for k, _, p_z, p_x in self.factors():
                joint = joint + gaussian(p_z(tile(h[k]), part[k - 1])).log_prob(part[k])
                joint = joint + dmol_log_prob(tile(y[k + 1]), p_x(tile(y[k]), part[k]))
            log_p.append(joint.view(count, -1))
        return torch.cat(log_p) - sum(q.log_prob(z_k) for q, z_k in zip(posteriors, z))

    @torch.no_grad()
    def decode(self, known, n, temperature=1.0, mean=False):
        """Top-down through the model: what is `known` {"u", "z_k", "y_k": value} is taken, all else drawn (section 3.3).

        -> {k: y_k}, k = 1 … K+1, n images each on the 256-level grid; {name: log p(known value | what is above it)}, (n,) nats.
        `temperature` scales the noise of u and every z_k; `mean` takes the mean of every p(y|·) instead of a draw, and
        conditions what follows on it.
        """
        log_p = {}
        def take(name, draw, log_prob):
            if name not in known:
                return draw()
            log_p[name] = log_prob(known[name])
            return known[name]
        def take_y(k, params):
            return take(f"y_{k}", lambda: dmol_sample(params, mean), lambda y_k: dmol_log_prob(y_k, params))

        noise = lambda: temperature * torch.randn(n, *LATENT, device=next(self.parameters()).device)
        z = take("u", lambda: self.p_u.from_noise(noise()), self.p_u.log_prob)
        y = {1: take_y(1, self.p_y(z))}
        for k, _, p_z, p_x in self.factors():
            p = gaussian(p_z(p_z.from_y(y[k]), z))
            z = take(f"z_{k}", lambda: p.mean + p.stddev * noise(), p.log_prob)
            y[k + 1] = take_y(k + 1, p_x(y[k], z))
        return y, log_p

    @torch.no_grad()
    def infer(self, x, sent):
        """What a receiver knows once `sent` ⊆ {"u", "z_k", "y_k"} of x is sent -> {name: value}; of latents {name: log q}, (B,) nats.

        With y_k comes all that is nearer to u: y_j by d, z_{j-1} ~ q(z_{j-1}|y_j), j ≤ k. x itself is y_{K+1}. The code length, of
        draws from q by relative entropy coding, is Σ log q - log p, log p from `decode`; of everything, x included, it is minus the
        ELBO. ValueError, which names each of them, for other names.
        """
        y = self.representations(x)
        if unknown := {*sent} - {"u", *(f"z_{k}" for k in range(1, self.K + 1)), *(f"y_{k}" for k in y)}:
            raise ValueError(f"there is no {', '.join(sorted(unknown))} in a model of {self.K} levels")
        last = max((k for k in y if f"y_{k}" in sent), default=0)
        known, log_q = {f"y_{k}": y[k] for k in range(1, last + 1)}, {}
        for k, network in enumerate([self.q_u, *self.q_z]):
            name = f"z_{k}" if k else "u"
            if name in sent or k < last:
                q = gaussian(network(y[k + 1]))
                known[name] = q.rsample()
                log_q[name] = q.log_prob(known[name])
        return known, log_q

    @property
    def operations(self):
        """Figure 3, Eqs. (3.3c) to (3.3g): {operation: what is sent of x}. The rest is inferred from that or else drawn: generation sends nothing.

        NOTE(paper): section 3.3 swaps Eqs. (3.3d), (3.3e), of the conditional two ("former", "latter"): conditional generation
        draws z_K from p, conditional reconstruction infers it. For K = 0, without y, they are the other ones again.
        """
        latents = ["u"] + [f"z_{k}" for k in range(1, self.K + 1)]
        y = [f"y_{self.K}"] if self.K else []
        return {"generate": [], "conditional_generate": y, "conditional_reconstruct": [*y, latents[-1]],
                "reconstruct_1": latents[:1], "reconstruct_2": latents}

    def sample(self, n, temperature=1.0, mean=False):
        """Generation, Eq. (3.3c) -> x (n, C, H, W) on the 256-level grid; arguments as for `decode`."""
        return self.decode({}, n, temperature, mean)[0][self.K + 1]

    def reconstruct(self, x, mean=False, operation="conditional_reconstruct", temperature=1.0):
        """One of the `operations` on x: (B, C, H, W) -> x̂, same shape, on the 256-level grid."""
        return self.decode(self.infer(x, self.operations[operation])[0], len(x), temperature, mean)[0][self.K + 1]

    @torch.no_grad()
    def interpolate(self, x1, x2, steps=8, mean=False, base=False):
        """Along the straight line in u between the means of q(u|y_1) of x1 and x2, or with `base` in v, u = f(v): flow prior only.

        (B, C, H, W) -> (B, steps, C, H, W), Figures 10 B, 13 (i). Every z_k is the mean of p(z_k|·): but for the draws of y and x,
        without `mean`, only u changes.
        """
        ends = [gaussian(self.q_u(self.representations(x)[1])).mean for x in (x1, x2)]
        ends = [self.p_u.flow(u)[0] for u in ends] if base else ends
        u = torch.stack([torch.lerp(*ends, i / (steps - 1)) for i in range(steps)], 1).flatten(0, 1)
        u = self.p_u.from_noise(u) if base else u
        return self.decode({"u": u}, len(u), 0.0, mean)[0][self.K + 1].unflatten(0, (-1, steps))

    @torch.no_grad()
    def vary(self, x, redrawn, n=7, temperature=1.0, mean=False):
        """n images that share the latents of x, but for those `redrawn` ⊆ {"u", "z_k"} (Figure 13 ii).

        (B, C, H, W) -> (B, n, C, H, W). Shared ones are the same draw from q for all n; every y_k and x̂ is drawn anew.
        """
        known = {name: z.repeat_interleave(n, 0) for name, z in self.infer(x, self.operations["reconstruct_2"])[0].items()
                 if name not in redrawn}
        return self.decode(known, n * len(x), temperature, mean)[0][self.K + 1].unflatten(0, (-1, n))

# ---- Training --------------------------------------------------------------------------------------------------------
# Copied from vae.py: train
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

# Copied from vae.py: report
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
# Changed from vae.py: the representations and the operations
def draw(cfg, model, images, folder, name):
    """The figures `name`: samples/, 32 draws in rows y_1, …, y_K, x; reconstructions/ (Figures 6, 12, 14), 32 images in rows x,
    y_K, CR, CG, RS1, RS2, for K = 0 x, x̂; superresolution/, rows y_K, bicubic, CG, x. Every y is shown at the size of x."""
    name += "-mean" * cfg.mean + f"-temperature{cfg.temperature:g}" * (cfg.temperature != 1) + ".png"
    x = next(iter(Batches(images[:32], 32, cfg.device)))
    full_size = lambda y: F.interpolate(y, size=x.shape[2:]).expand(-1, x.shape[1], -1, -1)
    drawn, _ = model.decode({}, 32, cfg.temperature, cfg.mean)
    save_grid(folder / "samples" / name, *map(full_size, drawn.values()))
    CR, CG, RS1, RS2 = (model.reconstruct(x, cfg.mean, operation, cfg.temperature) for operation in (
        "conditional_reconstruct", "conditional_generate", "reconstruct_1", "reconstruct_2"))
    y = model.representations(x)[max(1, model.K)]
    save_grid(folder / "reconstructions" / name, x, *([full_size(y), CR, CG, RS1, RS2] if model.K else [CR]))
    if model.K and cfg.transform == "downscale":
        save_grid(folder / "superresolution" / name, full_size(y), bicubic(y, x), CG, x)

def draw_latent_space(cfg, model, x, folder):
    """interpolations/test-u.png, test-v.png: one a row, straight in u or in its base v. variations/test.png: a row shows x and
    7 images that share u with it, drawn once for each set of rows; first all z_k are drawn anew, then, for K > 1, each alone (Figures
    10 B, 13)."""
    name = "test" + "-mean" * cfg.mean + f"-temperature{cfg.temperature:g}" * (cfg.temperature != 1)
    for space in "uv" if cfg.prior == "realnvp" else "u":
        rows = model.interpolate(x, x.roll(1, 0), 8, cfg.mean, base=space == "v")
        save_grid(folder / "interpolations" / f"{name}-{space}.png", rows.flatten(0, 1))
    if model.K:
        z = [f"z_{k}" for k in range(1, model.K + 1)]
        rows = [torch.cat([x.unsqueeze(1), model.vary(x, redrawn, 7, cfg.temperature, cfg.mean)], 1).flatten(0, 1)
                for redrawn in [z] + [[z_k] for z_k in z if model.K > 1]]
        save_grid(folder / "variations" / f"{name}.png", *rows)

# Copied from vae.py: save_grid
def save_grid(path, *images):
    """PNG of true pixel values, 8 images a row. Several sets (B, C, H, W): row 1 of each, one above the other, then row 2 …"""
    path.parent.mkdir(exist_ok=True)
    columns = min(8, len(images[0]))
    whole = len(images[0]) // columns * columns
    rows = torch.stack([x[:whole].unflatten(0, (-1, columns)) for x in images], 1)  # (rows, sets, columns, C, H, W)
    save_image((rows.flatten(0, 2) + 1) / 2, path, nrow=columns)

def bicubic(y, x):
    """y at the size of x, on the 256-level grid: what super-resolution is held against."""
    return quantize(F.interpolate(y, size=x.shape[2:], mode="bicubic"))

def eight_bits(z):
    """Latents rounded to 256 values, evenly spaced between ± the largest of their image: (B, 16, 8, 8) -> same shape."""
    largest = z.abs().amax((1, 2, 3), keepdim=True)
    return largest * quantize(z / largest)

def rates(cfg, model, batches, dims):
    """What each operation sends, and how near it comes (Figures 6, 12, 14) -> {operation: {column: mean over images}}.

        percent        values sent, in percent of D: the paper's measure
        raw_bpd        the same at 8 bits a value (the largest of each latent, one float, is not counted)
        ideal_bpd      code length under the model, Σ log q - log p, of all that the receiver knows, given what it has by then;
                       for conditional_generate at K = 1 it is -B of Eq. (A.4d), y's own bound, in bits
        psnr           dB, x̂ drawn, latents as they are
        psnr_8bit      dB, latents rounded to 8 bits, the same noise
        psnr_mean      dB, means of p(y|·) and p(x|·) instead of draws
    """
    columns, rows = ("percent", "raw_bpd", "ideal_bpd", "psnr", "psnr_8bit", "psnr_mean"), {}
    for i, x in enumerate(batches):
        for operation, sent in model.operations.items():
            seed_noise(cfg.seed, i, operation)
            known, log_q = model.infer(x, sent)
            def receive(values, mean=False):
                seed_noise(cfg.seed, i)  # the same each time, and not that of `infer`
                y, log_p = model.decode(values, len(x), mean=mean)
                return psnr(y[model.K + 1], x), log_p
            drawn, log_p = receive(known)
            zero, share = torch.zeros_like(drawn), sum(known[name][0].numel() for name in sent) / dims  # zero, of shape (B,)
            row = [zero + 100 * share, zero + 8 * share, bits_per_dim(sum(log_q.values(), zero) - sum(log_p.values(), zero), dims)]
            rounded = known | {name: eight_bits(known[name]) for name in sent if name in log_q}
            rows.setdefault(operation, []).append(torch.stack(row + [drawn, receive(rounded)[0], receive(known, mean=True)[0]]))
            if operation == "conditional_generate" and model.K and cfg.transform == "downscale":
                rows.setdefault("bicubic", []).append(torch.stack(row + 3 * [psnr(bicubic(known[f"y_{model.K}"], x), x)]))
    return {operation: dict(zip(columns, torch.cat(row, 1).mean(1).tolist())) for operation, row in rows.items()}

# Changed from vae.py: what is sent, and the latent space
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
        draw_latent_space(cfg, model, next(iter(Batches(images.test[:8], 8, cfg.device))), folder)
        table = rates(cfg, model, Batches(images.test[:count], cfg.batch_size, cfg.device), dims)
    rows = {f"{operation}_{column}": value for operation, row in table.items() for column, value in row.items()}
    (folder / "results.json").write_text(json.dumps(results | rows, indent=1))
    for name, value in results.items():
        print(f"{name:14} {value:,.4f}" if isinstance(value, float) else f"{name:14} {value}")
    print(f"{'operation':24}", *(f"{column:>9}" for column in table["generate"]))
    for operation, row in table.items():
        print(f"{operation:24}", *(f"{value:9.3f}" for value in row.values()))

# Copied from vae.py: main
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
    sys.exit(main(SelfVAE))
