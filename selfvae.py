"""Self-supervised VAE: a hierarchy over deterministic representations y of the image x.

This is Gatopoulos & Tomczak 2020, section 3. A fixed function d makes y from x, such as a smaller
copy or a sketch. The model learns to draw y, and then x given y.

    representations    y_{K+1} = x, y_k = d(y_{k+1}) for k = K … 1, of 8 bits; d is --transform
    generative model   p(u) p(y_1|u) Π_k p(z_k|y_k, z_{k-1}) p(y_{k+1}|y_k, z_k),     z_0 = u
    inference model    q(u|y_1) Π_k q(z_k|y_{k+1}), diagonal Gaussians; y is computed, not inferred
    bound              log p(x) ≥ -E_q[re_x + Σ_k re_y_k + Σ_k kl_z_k + kl_u],     k = 1 … K
                       re is -log p of x or y, kl_z the KL of q(z|·) against p(z|·)

    python selfvae.py --small --steps 2000                   built-in shapes, minutes on a laptop
    python selfvae.py --dataset cifar10 --levels 1 --small   CIFAR-10 on a CPU
    python selfvae.py --dataset cifar10 --levels 1           the paper's size, for a GPU
    python selfvae.py --dataset imagenette --levels 2        64 -> 32 -> 16, "3-level" in the paper
    python selfvae.py --dataset celeba --transform sketch    y a pencil sketch of x

The last three were not run here; the paper's Table 1 has 3.65, 3.70 and 3.24 bits per dimension.

Paper: arXiv:2010.02014. Its code was not released. "Released" refers to the code of srVAE, an
earlier model by the same authors. Equations without a number in the paper are named by section and
letter, such as (3.2g): docs/equations.md.
Derivation, logged terms, differences from the paper: docs/selfvae.md. Results: docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W, `dims` in the code
    K = --levels · S importance samples
    x = y_{K+1} (B, C, H, W) image in [-1, 1] · y_k (B, C_k, H_k, W_k), on the same grid of values
    u = z_0, z_k (B, 16, 8, 8) latents
    v (B, 16, 8, 8) noise from N(0, 1) that p(u) turns into u = f(v)
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
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached

from common import (
    Batches, Dmol, UserError, barrier, bits_per_dim, choose_device, cost_of, dmol_channels,
    draw_curves, evaluation_batches, fid_of_samples, from_uint8, importance_weighted, load_images,
    log_row, log_training, mean_terms, processes, progress, psnr, quantize, require_finite,
    save_sheet, seed_noise, to_json, to_uint8, write_results)


# ---- The model -----------------------------------------------------------------------------------

class SelfVAE(nn.Module):
    """The factors of K = cfg.levels levels, for images of shape (C, H, W), H = W = 8 · 2ⁿ.

    q_u, p_u and p_y are the factors of u and y_1. At index k - 1 the lists q_z and p_z have the
    factors of z_k, and the list p_x has that of y_{k+1}; `per_level` counts k. With K = 0 the model
    is a VAE: x is y_1, and p_y decodes it.
    """

    def __init__(self, cfg, image_shape):
        super().__init__()
        self.K = cfg.levels
        self.latents = ["u", *(f"z_{k}" for k in range(1, self.K + 1))]  # item k is z_k, as z_0 = u
        self.y_names = {k: f"y_{k}" for k in range(1, self.K + 1)} | {self.K + 1: "x"}
        self.d, coarse, interval = transformation(cfg)
        halvings(image_shape[1])  # UserError for a size that is not 8 · 2ⁿ
        y = self.representations(torch.zeros(1, *image_shape))  # any image will do for the shapes
        self.shapes = {k: y_k.shape[1:] for k, y_k in y.items()}  # (C_k, H_k, W_k)
        channels, side, _ = self.shapes[1]
        if self.K and cfg.transform == "grayscale" and image_shape[0] == 1:
            raise UserError("--transform grayscale leaves grey images as they are: take another")
        if self.K and side < 8:
            raise UserError(f"--levels {self.K} leaves y_1 {side} pixels a side, and 8 are the "
                            "least: take fewer")

        width = widths(cfg, image_shape[1], side)
        self.q_u = GaussianEncoder(channels, side, *width["q_u"])  # Eq. (3.2g)
        if cfg.prior == "realnvp":
            self.p_u = RealNVPPrior(*width["flow"])  # Eqs. (3.2a), (3.2b)
        else:
            self.p_u = NormalPrior()
        self.p_y = MixtureDecoder(channels, side, *width["p_y"])  # Eq. (3.2c)
        self.q_z = nn.ModuleList()
        self.p_z = nn.ModuleList()
        self.p_x = nn.ModuleList()
        for k in range(1, self.K + 1):
            y_shape = self.shapes[k]
            next_shape = self.shapes[k + 1]
            self.q_z.append(GaussianEncoder(*next_shape[:2], *width["q_z"]))  # Eq. (3.2h)
            self.p_z.append(ConditionalPrior(y_shape, width))  # Eq. (3.2d)
            if interval and next_shape[1] == 2 * y_shape[1]:
                p_x = InTurnDecoder(y_shape, interval, width)
            else:
                p_x = ConditionalDecoder(y_shape, next_shape, coarse, interval, width)  # Eq. (3.2e)
            self.p_x.append(p_x)

    @property
    def per_level(self):
        """k, q_z, p_z and p_x of every level, k = 1 … K."""
        return zip(range(1, self.K + 1), self.q_z, self.p_z, self.p_x)

    def initialize(self, x):
        """Data-dependent initialisation from one batch x (B, C, H, W)."""
        data_dependent_init(self, lambda: self.terms(x))

    def representations(self, x):
        """x -> {k: y_k}, k = 1 … K+1: the deterministic q(y_k|y_{k+1}) = δ(y_k = d(y_{k+1})).

        This is Eq. (3.2f). Each value of y is one of 256, as in x, so every p(y|·) is a probability
        and not a density (section 3.2). With a density there would be no bound. log q(y|·) is 0, so
        the KL of y in Eq. (1) is -log p(y|u). As y follows from x, q(z|x, y) is q(z|x).
        """
        y = {self.K + 1: x}
        for k in range(self.K, 0, -1):
            y[k] = from_uint8(self.d(to_uint8(y[k + 1]).int()))
        return y

    def terms(self, x):
        """The bound's terms, all costs, (B,) in nats: Eqs. (2), (A.4e), for K levels Eq. (3.4a).

            kl_u                  log q(u|y_1) - log p(u) of one sample, as p(u) may be a flow
            re_y_1                -log p(y_1|u): the reconstruction error, signed as in Table 1
            kl_z_k, k = 1 … K     KL(q(z_k|y_{k+1}) ‖ p(z_k|y_k, z_{k-1})), in closed form
            re_y_{k+1}            -log p(y_{k+1}|y_k, z_k)

        u and every z_k are one sample from q. y_{K+1} is x, and its error is named re_x. The bound
        is minus the sum of all terms.
        NOTE(paper): Eq. (3.4a) prints the sum of KL(z_k) from k = 2. This loses KL(z_1), which at
        K = 1 is the KL_z of Eq. (2).
        """
        y = self.representations(x)
        q_u = self.q_u(y[1])
        u = q_u.rsample()
        terms = {"kl_u": q_u.log_prob(u) - self.p_u.log_prob(u)}
        terms[f"re_{self.y_names[1]}"] = -self.p_y(u).log_prob(y[1])
        z = u  # z_0
        for k, q_z, p_z, p_x in self.per_level:
            q = q_z(y[k + 1])
            p = p_z(y[k], z)
            z = q.rsample()
            terms[f"kl_z_{k}"] = kl_divergence(q, p)
            terms[f"re_{self.y_names[k + 1]}"] = -p_x(y[k], z).log_prob(y[k + 1])
        return terms

    forward = terms  # what torch.compile and DistributedDataParallel call

    def elbo(self, x):
        """One-sample estimate of the bound on log p(x), Eq. (2) for any K.

        x (B, C, H, W) -> (B,) in nats. Training minimises the mean of its negative, from `terms`.
        """
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples):
        """log w_s = log p(x, y, z_s, u_s) - log q(z_s, u_s|x, y) -> (samples, B) in nats.

        x is (B, C, H, W); u_s and all z_s are one joint sample from q. E[log w] is the bound,
        Eq. (2) for any K. At K = 1 Eqs. (A.4a), (A.4b) average its two parts, and Eqs. (1), (A.4c)
        join them. -log w is the cost of sending all variables.
        NOTE(paper): as S grows, log 1/S Σ w tends to log p(x, y) at y = d(x), and not to log p(x),
        the sum over all y. The two are equal only with --exact and a d that reaches all 256 values:
        then no other y can give this x.
        """
        y = self.representations(x)
        known = {name: y[k] for k, name in self.y_names.items()}
        q = {}
        for k, encoder in enumerate([self.q_u, *self.q_z]):
            q[self.latents[k]] = encoder(y[k + 1])  # once for all samples
        log_w = []
        for _ in range(samples):
            for name in self.latents:
                known[name] = q[name].sample()
            _, p = self.decode(known, len(x))  # nothing is left to draw
            log_w.append(-code_length(known, q, p))
        return torch.stack(log_w)

    @torch.no_grad()
    def decode(self, known, n, temperature=1.0, mean=False):
        """Keep the `known` variables and draw all others from p, from u to x (section 3.3).

        `known` is {name: value}; names are "u", "z_1", …, "y_1", …, "x". -> {name: value} of all
        variables, n of each, with y_k and x on the pixel grid; and {name: p}, each variable's
        factor given the variables before it, where p.log_prob(value) is (n,) in nats. `temperature`
        scales the noise of u and every z_k. With `mean` each unknown y_k and x is the mean of its
        factor, and the variables after it are conditioned on that mean.
        """
        values = dict(known)
        factors = {"u": self.p_u}

        def y_from(name, p):
            factors[name] = p
            if name not in known:
                values[name] = p.mean if mean else p.sample()
            return values[name]

        if "u" not in known:
            v = torch.randn(n, *LATENT, device=next(self.parameters()).device)
            values["u"] = self.p_u.from_noise(temperature * v)
        z = values["u"]  # z_0
        y = y_from(self.y_names[1], self.p_y(z))
        for k, _, p_z, p_x in self.per_level:
            name = self.latents[k]
            p = p_z(y, z)
            factors[name] = p
            if name not in known:
                values[name] = p.mean + temperature * p.stddev * torch.randn_like(p.mean)
            z = values[name]
            y = y_from(self.y_names[k + 1], p_x(y, z))
        return values, factors

    @torch.no_grad()
    def infer(self, x, sent):
        """What a receiver knows of x once the variables named in `sent` are sent.

        A receiver that has y_{k+1} computes y_k = d(y_{k+1}) and may draw z_k ~ q(z_k|y_{k+1}), or
        u for k = 0. A latent in `sent` is the sender's draw from the same q. -> {name: value} of
        all known variables, with the names of `decode`; and {name: q}, the factors of the known
        latents. ValueError for other names.
        """
        y = self.representations(x)
        unknown = set(sent) - {*self.latents, *self.y_names.values()}
        if unknown:
            raise ValueError(f"there is no {unknown.pop()} in a model of {self.K} levels")
        encoders = [self.q_u, *self.q_z]  # item k is the encoder of z_k
        known = {}
        factors = {}
        has_y = False  # whether the receiver has y_{k+1}
        for k in range(self.K, -1, -1):  # from z_K and y_{K+1} = x back to u and y_1
            latent = self.latents[k]
            y_name = self.y_names[k + 1]
            has_y = has_y or y_name in sent
            if has_y:
                known[y_name] = y[k + 1]
            if has_y or latent in sent:
                factors[latent] = encoders[k](y[k + 1])
                known[latent] = factors[latent].sample()
        return known, factors

    @property
    def operations(self):
        """Figure 3: {operation: what is sent of x}. The receiver infers or draws all else.

        NOTE(paper): section 3.3 swaps the formulas of the two conditional operations ("former",
        "latter"). Conditional generation draws z_K from p; conditional reconstruction infers it.
        """
        K = self.K
        if K == 0:  # the operations of a VAE, whose z is u
            return {"generate": [], "conditional_reconstruct": ["u"]}
        return {
            "generate": [],  # Eq. (3.3c)
            "conditional_generate": [f"y_{K}"],  # Eq. (3.3e)
            "conditional_reconstruct": [f"y_{K}", f"z_{K}"],  # Eq. (3.3d)
            "reconstruct_1": ["u"],  # Eq. (3.3f)
            "reconstruct_2": self.latents,  # Eq. (3.3g)
        }

    def sample(self, n, temperature=1.0, mean=False, known=None):
        """Generation, Eq. (3.3c), or x given the `known` -> (n, C, H, W); see `decode`."""
        values, _ = self.decode(known or {}, n, temperature, mean)
        return values["x"]

    def reconstruct(self, x, operation="conditional_reconstruct", temperature=1.0, mean=False):
        """One of the `operations` on x: (B, C, H, W) -> x̂, same shape, on the pixel grid."""
        known, _ = self.infer(x, self.operations[operation])
        return self.sample(len(x), temperature, mean, known)

    @torch.no_grad()
    def interpolate(self, x1, x2, count=8, mean=False, base=False):
        """Images along a straight line in u between the means of q(u|y_1) of x1 and of x2.

        With `base` the line is straight in v, where u = f(v); this needs a flow prior. Every z_k is
        the mean of p(z_k|·). With `mean` all y_k and x are means too, so that only u differs along
        a line. Two (B, C, H, W) -> (B, count, C, H, W), Figures 10 B, 13 (i).
        """
        start = self.q_u(self.representations(x1)[1]).mean
        end = self.q_u(self.representations(x2)[1]).mean
        if base:
            start, _ = self.p_u.flow(start)  # f⁻¹
            end, _ = self.p_u.flow(end)
        shares = [i / max(1, count - 1) for i in range(count)]  # of the way from x1 to x2
        u = torch.stack([torch.lerp(start, end, share) for share in shares], 1).flatten(0, 1)
        if base:
            u = self.p_u.from_noise(u)
        images = self.sample(len(u), temperature=0.0, mean=mean, known={"u": u})
        return images.unflatten(0, (-1, count))

    @torch.no_grad()
    def vary(self, x, redrawn, n=7, temperature=1.0, mean=False):
        """n images that share the latents of x, except `redrawn`, a list of "u" and "z_k".

        (B, C, H, W) -> (B, n, C, H, W), Figure 13 (ii). The shared latents are one sample from q
        for all n images. Every y_k and x̂ is drawn anew.
        """
        known, _ = self.infer(x, [name for name in self.latents if name not in redrawn])
        known = {name: value.repeat_interleave(n, 0) for name, value in known.items()}
        images = self.sample(n * len(x), temperature, mean, known)
        return images.unflatten(0, (-1, n))


def code_length(known, q, p):
    """What the `known` variables cost under the model: three dicts by name -> (B,) in nats.

    A y costs -log p. A latent costs log q - log p, by relative entropy coding with noise that both
    sides share. Each p is conditioned on what the receiver has, be it sent, inferred or drawn.
    """
    nats = torch.zeros(())  # a scalar, if nothing is known
    for name, value in known.items():
        nats = nats - p[name].log_prob(value)
        if name in q:
            nats = nats + q[name].log_prob(value)
    return nats


# ---- Special to this model -----------------------------------------------------------------------
# First the transformation d: integers 0 … 255 (B, C, H, W) -> integers 0 … 255 (B, C_y, h, w).
# Integers make it exact on every device.

def downscale(x):
    """The mean of each 2x2 block, halves rounded up: (B, C, H, W) -> (B, C, H/2, W/2).

    NOTE(paper): "downscaling" is not specified. The released code uses PIL's antialiased bilinear
    filter, on the CPU.
    """
    top = x[..., ::2, ::2] + x[..., ::2, 1::2]
    bottom = x[..., 1::2, ::2] + x[..., 1::2, 1::2]
    return (top + bottom + 2) // 4


def grayscale(x):
    """Luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), halves rounded up; grey x -> itself.

    (B, 3, H, W) -> (B, 1, H, W).
    """
    if x.shape[1] == 1:
        return x
    return (299 * x[:, :1] + 587 * x[:, 1:2] + 114 * x[:, 2:] + 500) // 1000


def shifted(x, dim, offset):
    """Pixel i becomes pixel i + offset of x along `dim`, or the edge pixel beyond the edge."""
    size = x.shape[dim]
    index = torch.arange(size, device=x.device) + offset
    return x.index_select(dim, index.clamp(0, size - 1))


def sketch(x):
    """Pencil sketch by colour dodge (A.6): grayscale divided by its blur, so flat areas are white.

    dodge(a, b) = 255 a / (255 - b), where b is the blurred inverse of a. The blur's binomial
    weights approximate a Gaussian of σ = √2 pixels. (B, C, H, W) -> (B, 1, H, W).
    NOTE(paper): the paper gives no kernel, and the edge-preserving filter that it cites is another
    algorithm. In black areas the formula is 0 / 0. Here a and 255 - b are one larger than in the
    formula, so black areas turn white like all flat areas.
    """
    a = grayscale(x)
    b = 255 - a
    for dim in (2, 3):
        blurred = 0
        for i in range(9):
            blurred = blurred + math.comb(8, i) * shifted(b, dim, i - 4)
        b = blurred
    b = (b + 2**15) // 2**16  # rounded: the weights of each direction sum to 2⁸
    return (255 * (a + 1) // (255 - b + 1)).clamp(max=255)


def edges(x):
    """Length of (a_{i+1} - a_{i-1}, a_{j+1} - a_{j-1}) of the grayscale a, rounded, at most 255.

    (B, C, H, W) -> (B, 1, H, W). This one is ours: the paper's "edge detection" is its sketch. The
    length is the only float here, and it rounds the same way on every device: (m + ½)² =
    m² + m + ¼ is not an integer, and the root of an integer below 256² is at least 4e-4 away from
    m + ½.
    """
    a = grayscale(x)
    across = shifted(a, 3, 1) - shifted(a, 3, -1)
    down = shifted(a, 2, 1) - shifted(a, 2, -1)
    length = (across**2 + down**2).float().sqrt()
    return length.round().int().clamp(max=255)


def posterize(x):
    """The two high bits of each channel: 0, 85, 170 or 255. Shape as before."""
    return x // 64 * 85


# {--transform: (d, the largest sensible --levels, whether y is a coarse x)}
TRANSFORMS = {
    "downscale": (downscale, math.inf, True),
    "sketch": (sketch, 1, False),
    "grayscale": (grayscale, 1, True),
    "edges": (edges, 1, False),
    "posterize": (posterize, 1, True),
}


def transformation(cfg):
    """--transform -> d, whether y is a coarse x, and with --exact its function of INTERVALS.

    UserError if d cannot be applied --levels times, or if --exact does not support it.
    """
    d, most_levels, coarse = TRANSFORMS[cfg.transform]
    interval = INTERVALS.get(cfg.transform) if cfg.exact else None
    if cfg.exact and (cfg.levels == 0 or interval is None):
        raise UserError("--exact needs --levels 1 or more and --transform downscale, grayscale or "
                        "posterize")
    if cfg.levels > most_levels:
        raise UserError(f"--transform {cfg.transform} cannot be applied {cfg.levels} times: "
                        f"take --levels {most_levels}")
    return d, coarse, interval


# The factors that are conditioned on y. `width` is a row of WIDTHS.

class ConditionalPrior(nn.Module):
    """p(z_k | y_k, z_{k-1}), a Gaussian over (16, 8, 8).

    y_k is (B, *y_shape), z_{k-1} (B, 16, 8, 8).
    """

    def __init__(self, y_shape, width):
        super().__init__()
        channels, side, _ = y_shape
        c = LATENT[0]
        encoder = Encoder(channels, side, *width["p_z_from_y"], c_out=c, sd=1.0)
        self.from_y = nn.Sequential(encoder, nn.ELU())  # an ELU after y's branch alone, as released
        self.from_z = dense_blocks(c, *width["p_z"], c)
        self.joint = dense_blocks(2 * c, *width["p_z"], 2 * c, sd=0.1)

    def forward(self, y, z):
        return gaussian(self.joint(torch.cat([self.from_y(y), self.from_z(z)], 1)))


class ConditionalDecoder(nn.Module):
    """p(y_{k+1}|y_k, z_k), a Dmol: y_k (B, *y_shape), z_k (B, 16, 8, 8), y_{k+1} (B, *next_shape).

    With an `interval`, one of INTERVALS, values are restricted to those that y_k leaves possible.
    NOTE(paper): if y_k is `coarse`, the mixture models y_{k+1} - upsample(y_k). The paper mentions
    no such shift. The released code has none, so its network must first learn to copy its input.
    The number of parameters is the same.
    """

    def __init__(self, y_shape, next_shape, coarse, interval, width):
        super().__init__()
        self.c_out, self.side, _ = next_shape
        self.coarse = coarse
        self.interval = interval
        self.from_z = Decoder(self.side, *width["p_x_from_z"], width["z_channels"], sd=1.0)
        self.joint = dense_blocks(width["z_channels"] + y_shape[0], *width["p_x"],
                                  dmol_channels(self.c_out), sd=0.1)

    def forward(self, y, z):
        enlarged_y = F.interpolate(y, size=(self.side, self.side), mode="bilinear")
        params = self.joint(torch.cat([self.from_z(z), enlarged_y], 1))
        shift = enlarged_y if self.coarse else None  # a grey y is the shift of all channels
        interval = None
        if self.interval:
            interval = partial(self.interval, to_uint8(y).int(), [])
        return Dmol(params, self.c_out, shift, interval)


# NOTE(paper): --exact is ours. In the paper pixels are independent given y_k and z_k, and for most
# drawn images d is not y_k. So the bound pays for y_k twice, in the term of y_k and in that of
# y_{k+1}. With --exact only a y_{k+1} whose d is y_k has a probability above 0.
#
# The functions below return what y = d(x) leaves possible for one pixel: the lowest and the highest
# value of each channel. All arguments are int pixel values: y (B, C_y, h, w); `pixels`, those of
# the same block that are drawn before; `this` (B, C, h, w), the pixel itself, or None. A channel's
# limits depend only on the channels of `this` before it.

def downscale_interval(y, pixels, this):
    """4y - 2 ≤ Σ x ≤ 4y + 1 over the four values of a block; values to come are 0 … 255."""
    rest = 4 * y - sum(pixels)  # left for this value and those to come
    most_later = 255 * (3 - len(pixels))
    low = rest - (2 + most_later)
    high = rest + 1
    return low.clamp(min=0), high.clamp(max=255)


def grayscale_interval(y, pixels, this):
    """1000y - 500 ≤ 299 R + 587 G + 114 B ≤ 1000y + 499; the channels to come are 0 … 255."""
    weights = torch.tensor([299, 587, 114], device=y.device).view(3, 1, 1)[:this.shape[1]]
    known = (weights * this).cumsum(1) - weights * this  # what the channels before add to the sum
    later = 1000 - weights.cumsum(0)  # the weights of the channels after
    low = -((known + 255 * later + 500 - 1000 * y) // weights)  # rounded up
    high = (1000 * y + 499 - known) // weights
    return low.clamp(min=0), high.clamp(max=255)


def posterize_interval(y, pixels, this):
    """The 64 values with the same two high bits."""
    low = y // 64 * 64  # y = 85 b has the two high bits b, as 64 b has
    return low, low + 63


INTERVALS = {"downscale": downscale_interval, "grayscale": grayscale_interval,
             "posterize": posterize_interval}


class InTurnDecoder(nn.Module):
    """p(y_{k+1}|y_k, z_k) if y_k has half the side, an InTurn: the pixels of 2x2 blocks in turn.

    y_k is (B, *y_shape), z_k (B, 16, 8, 8). All networks here compute at the side of y_k.
    """

    def __init__(self, y_shape, interval, width):
        super().__init__()
        channels, side, _ = y_shape
        self.interval = interval
        self.from_z = Decoder(side, *width["p_x_from_z"], width["z_channels"], sd=1.0)
        self.turns = nn.ModuleList()
        for drawn in range(3):
            # Inputs are features of z, y, four offsets, and the errors of the pixels drawn so far.
            c_in = width["z_channels"] + (5 + drawn) * channels
            self.turns.append(dense_blocks(c_in, *width["turn"], dmol_channels(channels), sd=0.1))

    def forward(self, y, z):
        return InTurn(y, self.from_z(z), self.turns, self.interval)


class InTurn:
    """A distribution over the images x with d(x) = y.

    The four pixels of a 2x2 block are drawn one after the other, each for all blocks at once:
    p(x|y, z) = Π_i p(x_i | y, z, x_1 … x_{i-1}). The first three factors are Dmols, restricted to
    what y and the pixels before leave possible. The fourth pixel then has at most four possible
    values, which are equally probable.
    """

    def __init__(self, y, features, turns, interval):
        self.y = y  # (B, C, h, w)
        self.y_values = to_uint8(y).int()
        self.features = features  # of z, (B, z_channels, h, w)
        self.turns = turns  # the networks
        self.interval = interval
        # A guess of x: the enlarged y, shifted by a constant in each block so that its mean is y.
        guess = F.interpolate(y, scale_factor=2, mode="bilinear")
        guess = guess + F.interpolate(y - F.avg_pool2d(guess, 2), scale_factor=2)
        self.guess = pixels_of_blocks(guess)
        # Differences are about a quarter as large as y, so times four all inputs have one scale.
        self.offsets = [4 * (pixel - y) for pixel in self.guess]

    def given(self, pixels):
        """p(x_i | y, z, x_1 … x_{i-1}): the factor of the pixel that comes after i - 1 `pixels`.

        Each of these is (B, C, h, w).
        """
        to_come = 4 - len(pixels)
        before = [to_uint8(pixel).int() for pixel in pixels]
        interval = partial(self.interval, self.y_values, before)
        if to_come == 1:
            return Uniform(*interval(None))
        errors = [pixel - guess for pixel, guess in zip(pixels, self.guess)]
        # The sum by which the pixels before exceed their guesses is subtracted from those to come,
        # in equal parts.
        shift = self.guess[len(pixels)] - sum(errors) / to_come
        errors = [4 * error for error in errors]
        inputs = torch.cat([self.features, self.y, *self.offsets, *errors], 1)
        # The memory layout decides how a convolution rounds. It is always the same, because
        # `sample` and `log_prob` must agree.
        params = self.turns[len(pixels)](inputs.contiguous(memory_format=torch.channels_last))
        return Dmol(params, self.y.shape[1], shift, interval)

    def log_prob(self, x):
        """log p(x) in nats: (B, C, 2h, 2w) -> (B,), -inf if d(x) is not y."""
        pixels = pixels_of_blocks(x)
        log_p = 0.0
        for i in range(4):
            log_p = log_p + self.given(pixels[:i]).log_prob(pixels[i])
        return log_p

    def sample(self):
        """x ~ p(x) -> (B, C, 2h, 2w), on the grid."""
        pixels = []
        for _ in range(4):
            pixels.append(self.given(pixels).sample())
        return image_of_pixels(pixels)

    @property
    def mean(self):
        """Each pixel is its factor's mean given the means before; d gives y -> (B, C, 2h, 2w)."""
        pixels = []
        for _ in range(4):
            pixels.append(self.given(pixels).mean)
        return image_of_pixels(pixels)


class Uniform:
    """Independent values, each uniform from `low` to `high`: pixel values, int (B, C, h, w)."""

    def __init__(self, low, high):
        self.low = low
        self.high = high

    def log_prob(self, x):
        """log p(x) in nats, (B,); -inf if a value is outside its range."""
        value = to_uint8(x).int()
        possible = (self.low <= value) & (value <= self.high)
        log_p = -torch.log((self.high - self.low + 1).float())
        return torch.where(possible, log_p, -math.inf).sum((1, 2, 3))

    def sample(self):
        """x ~ p(x) -> (B, C, h, w), on the grid."""
        count = self.high - self.low + 1
        drawn = torch.rand(count.shape, device=count.device) * count
        return from_uint8(self.low + drawn.int())

    @property
    def mean(self):
        """The value in the middle, rounded down, on the grid."""
        return from_uint8((self.low + self.high) // 2)


def pixels_of_blocks(x):
    """The pixels of all 2x2 blocks, row by row: (B, C, 2h, 2w) -> 4 tensors (B, C, h, w)."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).unbind(2)


def image_of_pixels(pixels):
    """The inverse: 4 tensors (B, C, h, w) -> (B, C, 2h, 2w)."""
    return F.pixel_shuffle(torch.stack(pixels, 2).flatten(1, 2), 2)


# ---- Networks ------------------------------------------------------------------------------------

# Changed from vae.py: every factor has its own
#
# (growth, layers) of the dense blocks of each factor. p_z and p_x have one pair for the branch that
# reads y or z alone, and one for their other networks. z_channels is the number of channels that z
# becomes in p_x. turn is for each of the three networks that replace p_x's joint one with --exact.
WIDTHS = {
    "vae-32": dict(q_u=(64, 8), p_y=(128, 6), flow=(64, 5)),  # K = 0, as in vae.py
    "vae-64": dict(q_u=(64, 6), p_y=(128, 5), flow=(64, 5)),
    "vae-small": dict(q_u=(32, 2), p_y=(32, 2), flow=(8, 1)),
    "released": dict(q_u=(128, 3), p_y=(128, 4), flow=(64, 5), q_z=(64, 4),
                     p_z_from_y=(64, 5), p_z=(64, 3),
                     p_x_from_z=(64, 8), z_channels=100, p_x=(64, 5), turn=(48, 4)),
    # Ours, with 32 to 42 M parameters as in the paper, for K ≤ 2 and x up to 64x64.
    "deeper": dict(q_u=(128, 3), p_y=(128, 4), flow=(64, 5), q_z=(64, 3),
                   p_z_from_y=(48, 4), p_z=(48, 3),
                   p_x_from_z=(64, 6), z_channels=100, p_x=(16, 4), turn=(24, 3)),
    "full-size y": dict(q_u=(64, 6), p_y=(128, 4), flow=(64, 5), q_z=(64, 3),
                        p_z_from_y=(32, 3), p_z=(48, 3),
                        p_x_from_z=(64, 6), z_channels=100, p_x=(16, 4)),
    # Chosen on validation images: on a CPU one wide layer trains faster than several narrow ones.
    "small": dict(q_u=(32, 1), p_y=(64, 1), flow=(8, 1), q_z=(16, 1),
                  p_z_from_y=(16, 1), p_z=(8, 1),
                  p_x_from_z=(16, 1), z_channels=8, p_x=(8, 2), turn=(32, 1)),
}


def widths(cfg, size, y_size):
    """The row of WIDTHS for x of `size` and y_1 of `y_size` pixels a side."""
    if cfg.small:
        return WIDTHS["small" if cfg.levels else "vae-small"]
    if cfg.levels == 0:
        return WIDTHS["vae-32" if size <= 32 else "vae-64"]
    if y_size == size:
        return WIDTHS["full-size y"]
    return WIDTHS["released" if cfg.levels == 1 and size <= 32 else "deeper"]


def dense_blocks(channels, growth, layers, c_out, sd=1.0):
    """Three dense blocks, all of the same growth at any side, then a 1x1 conv.

    (B, channels, H, W) -> (B, c_out, H, W).
    """
    parts = []
    for _ in range(3):
        block = DenseBlock(channels, growth, layers)
        parts.append(block)
        channels = block.channels
    return nn.Sequential(*parts, conv(channels, c_out, 1, sd=sd))


# ---- Evaluation ----------------------------------------------------------------------------------

# Changed from vae.py: what is sent, and the latent space
def evaluate(cfg, model, images, folder, state):
    """Evaluate the model on test images: a row of Table 1, printed and in results.json.

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
            "re_nats": sum(terms[name] for name in terms if name.startswith("re_")),
            "kl_nats": sum(terms[name] for name in terms if name.startswith("kl_")),
            **terms,
        }
        if cfg.fid:
            results |= fid_of_samples(cfg, model, images)
        save_figures(cfg, model, images, folder, "test", state["step"])
        save_latent_space(cfg, model, images, folder, state["step"])
        table = rates(cfg, model, iw_test, dims)
        if model.K and cfg.transform == "downscale":
            results["bicubic_psnr"] = bicubic_psnr(model, iw_test)
        results |= cost_of(cfg, model, state)  # last: it draws as many samples as time allows
    write_results(folder, results, table)


def rates(cfg, model, batches, dims):
    """What each operation sends, and how close its result is to x (Figures 6, 12, 14).

    -> {operation: {column of `rate`: mean over the images}}.
    """
    table = {}
    for operation, sent in model.operations.items():
        rows = []
        for i, x in enumerate(progress(operation, batches, batches.count)):
            seed_noise(cfg.seed, i)  # the same noise for every operation
            rows.append(rate(model, x, sent, dims))
        table[operation] = {}
        for column in rows[0]:
            values = torch.cat([row[column] for row in rows])
            table[operation][column] = values.mean().item()
    return table


def rate(model, x, sent, dims):
    """What it costs to send `sent` of x, and how close the receiver's x̂ is -> {column: (B,)}.

        percent      number of values sent, in percent of D: the paper's measure
        raw_bpd      bits per dimension of x at 8 bits per value
        ideal_bpd    `code_length` of all that the receiver then knows, in bits per dimension of x.
                     At K = 1 conditional_generate has one sample of minus the bound on log p(y),
                     Eq. (A.4d)
        psnr         PSNR in dB of x̂, a sample. generate sends nothing, so its PSNR is a floor
        psnr_mean    the same for the means of p(y|·) and p(x|·), unknown latents drawn anew
    """
    known, q = model.infer(x, sent)
    values, p = model.decode(known, len(x))
    of_means = model.sample(len(x), mean=True, known=known)
    share = sum(known[name][0].numel() for name in sent) / dims
    psnr_of_draws = psnr(values["x"], x)
    return {
        "percent": torch.full_like(psnr_of_draws, 100 * share),
        "raw_bpd": torch.full_like(psnr_of_draws, 8 * share),
        "ideal_bpd": bits_per_dim(code_length(known, q, p).expand(len(x)), dims),
        "psnr": psnr_of_draws,
        "psnr_mean": psnr(of_means, x),
    }


def bicubic_psnr(model, batches):
    """PSNR in dB of `bicubic` on y_K."""
    psnrs = []
    for x in batches:
        y = model.representations(x)[model.K]
        psnrs.append(psnr(bicubic(y, x), x))
    return torch.cat(psnrs).mean().item()


def bicubic(y, x):
    """y at the size of x, on the pixel grid: the baseline for conditional_generate."""
    return quantize(F.interpolate(y, size=x.shape[2:], mode="bicubic"))


def enlarged(y, x):
    """y for figures: its pixels enlarged and its channels repeated to the shape of x."""
    return F.interpolate(y, size=x.shape[2:]).expand(-1, x.shape[1], -1, -1)


# What the paper's Figures 6, 12 and 14 call the operations.
ABBREVIATIONS = {"conditional_reconstruct": "CR", "conditional_generate": "CG",
                 "reconstruct_1": "RS1", "reconstruct_2": "RS2"}


# Changed from vae.py: the representations and the operations
def save_figures(cfg, model, images, folder, split, step):
    """Sheets of draws and of the split's first images; every y is shown at the size of x.

        samples/            rows y_1, …, y_K, x
        reconstructions/    rows x, y_K, then x̂ by the operations of ABBREVIATIONS; K = 0: x, x̂
        superresolution/    for downscaling, rows y_K, its bicubic enlargement, CG, x
    """
    K = model.K
    count = 32 if images.size < 32 else 8  # as many as fit
    x = next(iter(Batches(getattr(images, split), count, cfg.device, count=count)))
    title = f"{sheet_title(cfg, images, split, step)}\n{how_drawn(cfg, model)}"
    temperature = f", temperature {cfg.temperature:g}"
    name = f"{figure_name(cfg, split, step)}.png"

    values, _ = model.decode({}, 32, cfg.temperature, cfg.mean)
    samples = {y_name: enlarged(values[y_name], x) for y_name in model.y_names.values()}
    save_sheet(folder / "samples" / name, title + temperature, samples)
    if K == 0:
        save_sheet(folder / "reconstructions" / name, title,
                   {"x": x, "x̂": model.reconstruct(x, mean=cfg.mean)})
        return

    y = model.representations(x)[K]
    rows = {"x": x, f"y_{K}": enlarged(y, x)}
    x_hats = {}
    for operation, abbreviation in ABBREVIATIONS.items():
        sent = ", ".join(model.operations[operation])
        x_hats[operation] = model.reconstruct(x, operation, cfg.temperature, cfg.mean)
        rows[f"{abbreviation}: x̂ from {sent}"] = x_hats[operation]
    save_sheet(folder / "reconstructions" / name, title + temperature, rows)
    if cfg.transform == "downscale":
        save_sheet(folder / "superresolution" / name, title + temperature, {
            f"y_{K}": enlarged(y, x), "bicubic": bicubic(y, x),
            f"CG: x̂ from y_{K}": x_hats["conditional_generate"], "x": x})


def how_drawn(cfg, model):
    """Whether a sheet shows draws or means of p(y|·) and p(x|·), as text."""
    shown = "means" if cfg.mean else "draws"
    return f"{shown} of p(y|·) and p(x|·)" if model.K else f"{shown} of p(x|u)"


def save_latent_space(cfg, model, images, folder, step):
    """Sheets of u and z_k (Figures 10 B, 13), for eight test images.

        interpolations/    each row leads from one image to another along a straight line in u; with
                           a flow prior there is also a sheet with lines in v
        variations/        each row is an image and 7 others that share its u ~ q(u|y_1). Every y is
                           drawn anew. In one set of rows all z_k are drawn anew, too. For K > 1
                           there is also a set for each k, in which only z_k is drawn anew
    """
    x = next(iter(Batches(images.test, 8, cfg.device, count=8)))
    title = f"{sheet_title(cfg, images, 'test', step)}\n{how_drawn(cfg, model)}"
    name = figure_name(cfg, "test", step)
    spaces = ("u", "v") if cfg.prior == "realnvp" else ("u",)
    for space in spaces:
        lines = model.interpolate(x, x.roll(1, 0), 8, cfg.mean, base=space == "v")
        save_sheet(folder / "interpolations" / f"{name}-{space}.png",
                   f"{title}, z the means of p(z|·)" if model.K else title,
                   {f"along {space}": lines.flatten(0, 1)}, keep_columns=True)
    if model.K == 0:
        return
    latents = model.latents[1:]
    choices = [latents]
    if model.K > 1:
        choices += [[latent] for latent in latents]
    rows = {}
    for redrawn in choices:
        varied = model.vary(x, redrawn, 7, cfg.temperature, cfg.mean)
        together = torch.cat([x.unsqueeze(1), varied], 1)  # (8, 8, C, H, W)
        rows[f"x, then {', '.join(redrawn)} anew"] = together.flatten(0, 1)
    save_sheet(folder / "variations" / f"{name}.png",
               f"{title}, temperature {cfg.temperature:g}", rows, keep_columns=True)


# ---- Copied from the other scripts ---------------------------------------------------------------
# Nothing below is new: networks and blocks; p(u), where u is called z; training.

# Copied from vae.py: LATENT
LATENT = (16, 8, 8)  # channels, height, width of z for images of any size (section 4.1)


# Copied from vae.py: halvings
def halvings(size):
    """How often `size` halves on the way down to 8; UserError if it is not 8 · 2ⁿ."""
    n = int(math.log2(size / 8)) if size >= 8 else 0
    if size != 8 * 2**n:
        raise UserError(f"images of side {size} do not halve down to 8: take 8, 16, 32, 64, 128 …")
    return n


# Copied from vae.py: Encoder
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


# Copied from vae.py: Decoder
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


# Copied from vae.py: GaussianEncoder
class GaussianEncoder(Encoder):
    """A Gaussian over (16, 8, 8), given images: (B, C, size, size) -> a distribution."""

    def forward(self, x):
        return gaussian(super().forward(x))


# Copied from vae.py: MixtureDecoder
class MixtureDecoder(Decoder):
    """A Dmol over images of `channels` channels, given latents (B, 16, 8, 8) -> a distribution."""

    def __init__(self, channels, size, growth, layers):
        super().__init__(size, growth, layers, dmol_channels(channels), sd=0.1)
        self.channels = channels

    def forward(self, z):
        return Dmol(super().forward(z), self.channels)


# Copied from vae.py: gaussian
def gaussian(params):
    """Network output (B, 32, 8, 8) -> N(μ, σ²) over (16, 8, 8), whose log_prob is (B,), nats.

    The first 16 channels are μ, the others log σ², which is clamped to [-7, 7] as released.
    """
    mean, log_var = params.float().chunk(2, 1)
    sd = torch.exp(0.5 * F.hardtanh(log_var, -7, 7))
    return Independent(Normal(mean, sd), 3)


# Copied from vae.py: conv
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


# Copied from vae.py: data_dependent_init
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


# Copied from vae.py: ChannelAttention
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


# Copied from vae.py: DenseBlock
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


# Copied from vae.py: NormalPrior
class NormalPrior(nn.Module):
    """p(z) = N(0, 1)."""

    def log_prob(self, z):
        return Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))

    def from_noise(self, v):
        return v


# Copied from vae.py: RealNVPPrior
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


# Copied from vae.py: train
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


# Copied from vae.py: validate
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


# Copied from vae.py: figure_name
def figure_name(cfg, split, step):
    """The file name of a figure, with --mean and --temperature if they change the figure."""
    name = "test" if split == "test" else f"{step:06d}"
    if cfg.mean:
        name += "-mean"
    if cfg.temperature != 1:
        name += f"-temperature{cfg.temperature:g}"
    return name


# ---- Flags ---------------------------------------------------------------------------------------

# Copied from vae.py: flag
def flag(default, text, fixed=False, choices=None, low=1, high=10**9):
    """A field of Config. A `fixed` one cannot change in a run; numbers are in [`low`, `high`]."""
    metadata = {"help": text, "fixed": fixed, "choices": choices, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


# Copied from vae.py: SCALES
# Defaults of the flags that depend on --small. "small" is ours, for runs of minutes to an hour.
SCALES = {
    "paper": dict(batch_size=32, lr=2e-3, beta2=0.999, warmup=0.0, cooldown=0.0,
                  iw_samples=512),
    "small": dict(batch_size=8, lr=6e-3, beta2=0.99, warmup=0.2, cooldown=0.2,
                  eval_images=500, iw_images=200, iw_samples=64),
}


# Changed from vae.py: --transform and --levels; no mixture prior
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the paper's; where it is silent, the released code's."""

    dataset: str = flag("shapes", "shapes, mnist, cifar10, stl10, imagenette, celeba, celebahq, "
                        "lsun, or a folder")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    size: int = flag(None, "side of the images, 8 · 2ⁿ (default: the dataset's)", fixed=True)
    transform: str = flag("downscale", "d, which makes y", fixed=True, choices=(
        "downscale", "sketch", "grayscale", "edges", "posterize"))
    levels: int = flag(1, "K, how often d is applied; 0 is a VAE, 2 the paper's 3-level model",
                       fixed=True, low=0)
    prior: str = flag("realnvp", "p(u), section A.2", fixed=True, choices=("normal", "realnvp"))
    exact: bool = flag(False, "p(y_{k+1}|y_k, z_k) is 0 unless d(y_{k+1}) = y_k (posterize: for a "
                       "y_k that d can return)", fixed=True)
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
    temperature: float = flag(1.0, "figures: scale of the priors' noise", low=0)
    mean: bool = flag(False, "figures: show the mean of p(y|·) and p(x|·), not a sample")
    fid: int = flag(None, "samples for FID and Inception Score, often 50000 (default: neither)")

    def __post_init__(self):
        for name, value in SCALES["small" if self.small else "paper"].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def variant(self):
        """The part of the run folder's name that describes the model."""
        exact = "-exact" if self.exact else ""
        small = "-small" if self.small else ""
        return f"{self.transform}{self.levels}-{self.prior}{exact}{small}"

    def check(self):
        """Raise UserError for flags that make no model, before anything is written."""
        transformation(self)
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
    sys.exit(main(SelfVAE))
