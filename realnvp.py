"""RealNVP, an invertible network as a density model of images and of points (Dinh et al. 2016).

    generative model   v ~ N(0, 1), x = f⁻¹(v); f is a chain of invertible coupling layers with
                       triangular Jacobians
    likelihood         log p(x) = log N(f(x); 0, 1) + log |det ∂f/∂x|, exact (Eq. (3))
    images             have 256 pixel values, but p is a density. With x in pixel values, noise
                       u ~ U[0, 1) gives the bound log P(x) ≥ E[log p(x + u)]

    python realnvp.py --dataset moons              points in the plane, a minute on a laptop; also
                                                   rings, spirals, checkerboard
    python realnvp.py --dataset mnist --small      images on a CPU
    python realnvp.py --dataset cifar10            the paper's size, for a GPU: 3.49 bits per
                                                   dimension in the paper's Table 1

Paper: arXiv:1605.08803. "Released" refers to its TensorFlow code.
Derivation, logged terms, differences from the paper: docs/realnvp.md. Results: docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W · S importance samples
    x (B, C, H, W) images in [-1, 1], or points (B, 2, 1, 1)
    y the logits of x, v the base variable (the paper's z), both shaped like x
    z the input of a coupling, z' its output: the x and y of Eqs. (4) to (9)
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
from matplotlib.figure import Figure
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached

from common import (
    POINTS, Batches, UserError, barrier, bits_per_dim, choose_device, cost_of, draw_curves,
    evaluation_batches, fid_of_samples, from_uint8, importance_weighted, load_images, log_row,
    log_training, mean_terms, processes, require_finite, save_sheet, seed_noise, to_json, to_uint8,
    write_results)


# ---- The model -----------------------------------------------------------------------------------

ALPHA = 0.05  # keeps the logits of black and white finite


class RealNVP(nn.Module):
    """p(x) for images of shape (C, H, W), H = W as `scales_for` allows, or for points (2, 1, 1)."""

    def __init__(self, cfg, image_shape):
        super().__init__()
        channels, size, _ = image_shape
        self.shape = image_shape
        self.plane = size == 1
        if self.plane:
            first_axis = torch.tensor([1, 0]).view(2, 1, 1)  # x₁ moves x₂, x₂ moves x₁, …
            self.flow = Couplings(first_axis, 8, channels, size, mlp)
            return
        if cfg.small:
            blocks, hidden = WIDTHS["small"]
        else:
            blocks, hidden = WIDTHS["32" if size <= 32 else "64"]

        def make_net(channels_in, side):
            return ResNet(channels_in, hidden * size // side, blocks)

        self.flow = Flow(channels, size, scales_for(size, cfg.small), make_net)

    def preprocess(self, x):
        """Dequantize, then take logits (section 4.1): y = logit(α + (1 - 2α)(x + u)/256).

        In the formula x is in pixel values 0 … 255, and u ~ U[0, 1). x (B, C, H, W) -> y, same
        shape and dtype, and log |det ∂y/∂(x + u)|, (B,) in nats. Points are not changed, so their
        log |det| is 0.
        """
        if self.plane:
            return x, x.new_zeros(len(x))
        # NOTE(paper): section 4.1 has α + (1 - α)·, whose logit is infinite at the upper end of
        # white. This is the released form.
        r = ALPHA + (1 - 2 * ALPHA) * (to_uint8(x) + torch.rand_like(x)) / 256
        log_slope = math.log((1 - 2 * ALPHA) / 256) - r.log() - (1 - r).log()  # logit' = 1/(r(1-r))
        return torch.logit(r), log_slope.sum((1, 2, 3))

    def postprocess(self, y):
        """The inverse: logits y -> x + u, in pixel values. Points are not changed.

        The result is below 0 or above 256 for a y that no image has.
        """
        if self.plane:
            return y
        return 256 * (torch.sigmoid(y) - ALPHA) / (1 - 2 * ALPHA)

    def forward(self, x):
        """x -> v = f(x), same shape (Eq. (2)), and log |det ∂v/∂(x + u)|, (B,) in nats.

        For images, every call draws a new u.
        """
        y, log_det_logit = self.preprocess(x)
        v, log_det = self.flow(y)
        return v, log_det + log_det_logit

    def inverse(self, v):
        """v -> x = f⁻¹(v), same shape. Images are on the pixel grid."""
        x = self.postprocess(self.flow.inverse(v))
        if self.plane:
            return x
        return from_uint8(x.floor().clamp(0, 255))

    def costs(self, v, log_det):
        """The two parts of -log p(x), (B,) in nats, from what `forward` gives."""
        base = -Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3))
        return {"base": base, "volume": -log_det}

    def terms(self, x):
        """-log p(x) = base + volume (Eq. (3)): x (B, C, H, W) -> two terms, (B,) in nats.

            base      -log N(v; 0, 1)
            volume    -log |det ∂v/∂(x + u)|

        The sum is exact for points. For images it is a one-sample estimate of
        E[-log p(x + u)] ≥ -log P(x), the bound that training minimises.
        """
        v, log_det = self(x)
        return self.costs(v, log_det)

    def log_prob(self, x):
        """log p(x) for points; for images a one-sample estimate of its bound -> (B,) in nats."""
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples):
        """log w_s = log p(x + u_s) - log q(u_s|x): (B, C, H, W) -> (samples, B) in nats.

        q is uniform on [0, 1)ᴰ, so log q = 0.
        """
        return torch.stack([self.log_prob(x) for _ in range(samples)])

    @torch.no_grad()
    def sample(self, n, temperature=1.0):
        """v ~ N(0, temperature²), x = f⁻¹(v) -> (n, C, H, W), on the pixel grid."""
        v = torch.randn(n, *self.shape, device=next(self.parameters()).device)
        return self.inverse(temperature * v)

    @torch.no_grad()
    def interpolate(self, x1, x2, count=8):
        """f⁻¹ of the arc cos φ·v1 + sin φ·v2, 0 ≤ φ ≤ π/2 (Eq. (19), for two images, not four).

        Two (B, C, H, W) -> (B, count, C, H, W). If v1 and v2 are independent draws of N(0, 1), then
        every point of the arc is such a draw, too. Halfway on a straight line the sd would be 1/√2.
        """
        v1, _ = self(x1)
        v2, _ = self(x2)
        images = []
        for i in range(count):
            angle = math.pi / 2 * i / max(1, count - 1)
            images.append(self.inverse(math.cos(angle) * v1 + math.sin(angle) * v2))
        return torch.stack(images, 1)

    @torch.no_grad()
    def inverse_error(self, x):
        """|f⁻¹(f(x + u)) - (x + u)|, 0 but for rounding: (B, C, H, W) -> same, in pixel values.

        For points it is in units of the plane.
        """
        y, _ = self.preprocess(x)
        v, _ = self.flow(y)
        back = self.postprocess(self.flow.inverse(v))
        return (back - self.postprocess(y)).abs()


# ---- Special to this model -----------------------------------------------------------------------
# Coupling layers, and the flow that they make up.

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


# ---- Networks ------------------------------------------------------------------------------------

# Changed from vae.py: residual networks
WIDTHS = {  # (residual blocks in s and t, their features, which double as the side halves)
    "32": (8, 64),  # the paper's for CIFAR-10, here for all sizes up to 32
    "64": (2, 32),  # the paper's for 64x64
    "small": (1, 32),  # ours
}


def scales_for(size, small):
    """Number of scales for images of `size` pixels. UserError if it cannot be halved so often.

    There are 2 scales up to size 32 ("downscale only once") and if `small`. Otherwise there are as
    many as lead down to 4 … 7 pixels.
    """
    scales = 2
    if size > 32 and not small:
        scales = int(math.log2(size / 4)) + 1
    if size % 2**(scales - 1):
        raise UserError(f"size {size} is no multiple of {2**(scales - 1)}, "
                        f"which {scales} scales need: take 16, 32, 64 …")
    return scales


class ResNet(nn.Module):
    """s and t of a coupling (section 4.1): residual blocks, ReLU first, with skip connections.

    Skips go from each block and from `enter` to the output. (B, C, H, W) -> (B, 2C, H, W), which
    starts at 0. There is no batch norm, because the likelihood of an image must not depend on other
    images: docs/realnvp.md.
    """

    def __init__(self, channels, hidden, blocks):
        super().__init__()
        self.enter = conv(channels, hidden)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):  # the gains keep sums over blocks from growing with their number
            first = conv(hidden, hidden)
            second = conv(hidden, hidden, gain=blocks**-0.5)
            self.blocks.append(nn.Sequential(nn.ReLU(), first, nn.ReLU(), second))
        self.skips = nn.ModuleList()
        for _ in range(blocks + 1):
            self.skips.append(conv(hidden, hidden, 1, gain=(blocks + 1)**-0.5))
        self.leave = zeroed(nn.Conv2d(hidden, 2 * channels, 1))
        # Adam moves every weight alike. With this factor s moves as much as with 32 features.
        self.slowed = 32 / hidden

    def forward(self, z):
        h = self.enter(z)
        skipped = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:]):
            h = h + block(h)
            skipped = skipped + skip(h)
        return self.leave(F.relu(skipped)) * self.slowed


def mlp(channels, side, hidden=64):
    """s and t in the plane, where any network will do: (B, 2, 1, 1) -> (B, 4, 1, 1), at first 0.

    Points have `channels` 2 and `side` 1.
    """
    values = channels * side**2
    return nn.Sequential(nn.Flatten(), nn.Linear(values, hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.ReLU(),
                         zeroed(nn.Linear(hidden, 2 * values)),
                         nn.Unflatten(1, (2 * channels, side, side)))


# ---- Building blocks -----------------------------------------------------------------------------

# Changed from vae.py: no strides, and a fixed start
def conv(c_in, c_out, kernel=3, gain=1.0):
    """Convolution with w = g·v/‖v‖ (Salimans & Kingma 2016, Eq. (2)) that keeps height and width.

    g starts at gain·√2, because a mask or a ReLU before the conv halves the mean square (for skips,
    one after it; He et al. 2015).
    """
    layer = weight_norm(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
    g = layer.parametrizations.weight.original0
    nn.init.constant_(g, gain * 2**0.5)
    return layer


def zeroed(layer):
    """The layer with weights and biases 0.

    It does not have weight norm. With weight norm a step would lengthen a whole filter by the
    learning rate, and not each of its weights, so weights would leave 0 too slowly.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---- Training ------------------------------------------------------------------------------------

# Changed from vae.py: Adam, its rate, l2, clipping; nothing to initialise
def train(cfg, model, images, folder, checkpoint):
    """Minimise -log p(x) in nats per image, averaged over the batch, plus l2.

    Without a checkpoint a new run starts in `folder`. With one, the run in `folder` continues.
    """
    rank, world = processes()
    data = Batches(images.train, cfg.batch_size, cfg.device, cfg.seed,
                   augment=images.augment, parts=world)
    dims = math.prod(images.shape)
    total = cfg.steps or cfg.epochs * data.per_epoch
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, foreach=True)
    penalised = []  # "the weight scale parameters" (section 4.1): weight norm's g, the bound of s
    for name, parameter in model.named_parameters():
        if name.endswith(("original0", "s_limit")):
            penalised.append(parameter)
    if checkpoint is None:
        state = start_run(cfg, folder, images)
    else:
        state = checkpoint["state"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    if total < state["step"]:
        raise UserError(f"this run has done {state['step']} steps, so it cannot end at {total}")
    f = parallel(cfg, model)

    rows = []  # the terms of the steps since the last progress line
    saved = -math.inf  # when last.pt was saved
    state["clock"] = time.perf_counter()
    for step in range(state["step"] + 1, total + 1):
        state["step"] = step
        seed_noise(cfg.seed, step, rank)
        x = data.batch(step - 1, rank, world)
        with autocast(cfg):
            v, log_det = f(x)
        terms = model.costs(v, log_det)
        l2 = 5e-5 * nn.utils.parameters_to_vector(penalised).square().sum()
        loss = sum(terms.values()).mean() + l2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100)  # as released
        # NOTE(paper): the paper's rate is constant. Without batch norm s must grow slowly at first,
        # and a falling rate averages out noise. The numbers are ours; a tenth of the rate is
        # reached at step 100,000.
        warmth = min(step / 200, 1, max(math.sqrt(1000 / step), 0.1))
        cooling = min(1, (total + 1 - step) / (cfg.cooldown * total + 1))  # 1 without --cooldown
        optimizer.param_groups[0]["lr"] = cfg.lr * warmth * cooling
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


# ---- Evaluation ----------------------------------------------------------------------------------

# Changed from vae.py: bounds over dequantization noise, the inverse; points: the density's integral
def evaluate(cfg, model, images, folder, state):
    """Evaluate the model on the test set: bits per dimension of images, or nats per point.

    They are printed and in results.json. The figures are called test.png. `state` is that of the
    checkpoint.
    """
    dims = math.prod(images.shape)
    test = evaluation_batches(images.test, cfg.device, cfg.eval_images)
    iw_test = evaluation_batches(images.test, cfg.device, cfg.iw_images)
    with inference(cfg, model):
        terms = mean_terms(model, test)
        nats = sum(terms.values())
        if model.plane:
            cell = (2 * 2 / 1000)**2  # the area of one of 1000 x 1000 squares of [-2, 2]²
            integral = density(model, 2, 1000).sum().item() * cell
            results = {"nll_nats": nats, "integral": integral}
        else:
            results = {"elbo_bpd": bits_per_dim(nats, dims),
                       **importance_weighted(model, iw_test, cfg.iw_samples, dims)}
        results |= {
            "test_images": test.count,
            **terms,
            "inverse_error": model.inverse_error(next(iter(test))).max().item(),
        }
        if cfg.fid and not model.plane:
            results |= fid_of_samples(cfg, model, images)
        save_figures(cfg, model, images, folder, "test", state["step"])
        results |= cost_of(cfg, model, state)  # last: it draws as many samples as time allows
    write_results(folder, results)


# Changed from vae.py: temperatures, arcs in v, errors of the inverse; the plane
def save_figures(cfg, model, images, folder, split, step):
    """Sheets, by folder. For points there is only that of `save_plane`, in samples/.

        samples/            draws at temperature 1, and others at --temperature
        reconstructions/    the split's first images, rows x, f⁻¹(f(x)); the title has the largest
                            `inverse_error` of these images
        interpolations/     from one image to another along an arc in v
    """
    pictured = getattr(images, split)
    name = "test" if split == "test" else f"{step:06d}"
    if model.plane:
        save_plane(cfg, model, pictured, folder / "samples" / f"{name}.png")
        return
    title = sheet_title(cfg, images, split, step)
    save_sheet(folder / "samples" / f"{name}.png", f"{title}\ndraws, temperature 1",
               {"x": model.sample(64)})
    if cfg.temperature != 1:
        save_sheet(folder / "samples" / f"{name}-temperature{cfg.temperature:g}.png",
                   f"{title}\ndraws, temperature {cfg.temperature:g}",
                   {"x": model.sample(64, cfg.temperature)})
    count = 32 if images.size <= 32 else 8  # as many as fit
    x = next(iter(Batches(pictured, count, cfg.device, count=count)))
    error = model.inverse_error(x).max().item()
    v, _ = model(x)
    lines = model.interpolate(x[:8], x[:8].roll(1, 0))  # (8, 8, C, H, W)
    save_sheet(folder / "reconstructions" / f"{name}.png",
               f"{title}\nlargest error of f⁻¹(f(x)), {len(x)} images: {error:.2g} pixel values",
               {"x": x, "f⁻¹(f(x))": model.inverse(v)})
    save_sheet(folder / "interpolations" / f"{name}.png",
               f"{title}\nfrom one image to another", {"along v": lines.flatten(0, 1)},
               keep_columns=True)


def density(model, reach, cells):
    """p(x) at the centres of cells x cells squares that tile [-reach, reach]² -> (cells, cells).

    x₁ grows downwards, and x₂ along the rows.
    """
    device = next(model.parameters()).device
    axis = reach * (2 * torch.arange(cells, device=device) + 1 - cells) / cells
    points = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    return model.log_prob(points).exp().view(cells, cells)


def save_plane(cfg, model, points, path):
    """Twelve panels: data; p(x); v ~ N(0, 1) and a grid, through f⁻¹ coupling by coupling; f(data).

    The colour of a point is the angle of its v in all panels.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    data_panel, density_panel, *layer_panels, back_panel = figure.subplots(3, 4).flat
    x = next(iter(Batches(points, 3000, cfg.device, count=3000)))
    line = torch.linspace(-3, 3, 193, device=x.device)
    upright = torch.cartesian_prod(line[::8], line)  # 25 vertical lines of 193 points
    grid = torch.cat([upright, upright.flip(1)]).view(-1, 2, 1, 1)  # flipped: 25 horizontal lines
    v = torch.randn_like(x)
    angle = torch.atan2(v[:, 1], v[:, 0]).flatten().cpu().numpy()

    scatter(data_panel, "data", 1.25, x, color="black")
    p = density(model, 1.25, 250).T.cpu().numpy()
    density_panel.imshow(p, origin="lower", cmap="magma")
    density_panel.set(title="learned density p(x)", xticks=[], yticks=[])
    draw_lines(layer_panels[0], grid)
    scatter(layer_panels[0], "v ~ N(0, 1)", 3.2, v, c=angle, cmap="hsv")
    for i, axes in enumerate(layer_panels[1:], 1):
        grid = model.flow[-i].inverse(grid)
        v = model.flow[-i].inverse(v)
        reach = 1.1 * v.abs().flatten(1).quantile(0.99).item()
        draw_lines(axes, grid)
        title = f"{i} of 8 couplings" if i < 8 else "x = f⁻¹(v)"
        scatter(axes, title, reach, v, c=angle, cmap="hsv")
    v, _ = model(x)
    scatter(back_panel, "f(data)", 3.2, v, color="black")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=72)


def scatter(axes, title, reach, points, **colours):
    """Draw points (B, 2, 1, 1) in [-reach, reach]²."""
    horizontal, vertical = points.flatten(1).T.cpu().numpy()
    axes.scatter(horizontal, vertical, s=1, linewidths=0, **colours)
    axes.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal",
             xticks=[], yticks=[])


def draw_lines(axes, grid):
    """Draw 50 grey lines of 193 points: grid (50·193, 2, 1, 1)."""
    horizontal, vertical = grid.view(50, 193, 2).permute(2, 1, 0).cpu().numpy()
    axes.plot(horizontal, vertical, color="0.8", linewidth=0.4, zorder=0)


# ---- Copied from the other scripts ---------------------------------------------------------------
# Nothing below is new.

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


# ---- Flags ---------------------------------------------------------------------------------------

# Copied from vae.py: flag
def flag(default, text, fixed=False, choices=None, low=1, high=10**9):
    """A field of Config. A `fixed` one cannot change in a run; numbers are in [`low`, `high`]."""
    metadata = {"help": text, "fixed": fixed, "choices": choices, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


# Changed from vae.py: points in the plane
#
# Defaults of the flags that depend on the scale. "small" and "points" are ours.
SCALES = {
    "paper": dict(epochs=1000, batch_size=64, lr=1e-3, cooldown=0.0),
    "small": dict(epochs=1000, batch_size=16, lr=1e-3, cooldown=0.2, eval_images=500,
                  iw_images=200),
    "points": dict(epochs=20, batch_size=512, lr=3e-3, cooldown=0.0),
}


# Changed from vae.py: no latent and no prior; what the plane needs
@dataclasses.dataclass
class Config:
    """The flags. Defaults: the paper's for CIFAR-10 (4.1), else as released; epochs are ours."""

    dataset: str = flag("shapes", "moons, rings, spirals, checkerboard; shapes, mnist, cifar10, "
                        "stl10, imagenette, celeba, celebahq, lsun, or a folder")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    name: str = flag(None, "the run's folder in --out_dir (default: script-dataset-variant-seed)")
    size: int = flag(None, "side of the images: even, or above 32 without --small one of 40, 48, "
                     "56, 64, 80 … (default: the dataset's)", fixed=True)
    small: bool = flag(False, "network narrowed for a laptop CPU, quick evaluation", fixed=True)
    epochs: int = flag(None, "passes over the training images (default 1000, points 20)")
    steps: int = flag(None, "training steps (overrides --epochs)")
    batch_size: int = flag(None, "images per step, over all processes (default 64, --small 16, "
                           "points 512)", fixed=True)
    lr: float = flag(None, "Adam's learning rate (default 1e-3, points 3e-3): rises for 200 steps, "
                     "falls from step 1000 on, to a tenth", fixed=True, low=0)
    cooldown: float = flag(None, "share of the steps, at the end, over which the rate falls to "
                           "zero (default 0, --small on images 0.2)", fixed=True, low=0, high=1)
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
    iw_samples: int = flag(16, "S of the importance-weighted bound: S passes over the images")
    iw_images: int = flag(None, "test images for that bound (default all, --small 200)")
    temperature: float = flag(0.7, "figures: scale of v for a second sheet of samples", low=0)
    fid: int = flag(None, "samples for FID and Inception Score, often 50000 (default: neither)")

    def __post_init__(self):
        scale = "small" if self.small else "paper"
        if self.dataset in POINTS:
            scale = "points"
        for name, value in SCALES[scale].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def variant(self):
        """The part of the run folder's name that describes the model."""
        return "small" if self.small else "full"

    def check(self):
        """Raise UserError for flags that make no model, before anything is written."""
        if self.dataset not in POINTS:
            scales_for(self.size or 32, self.small)


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
    sys.exit(main(RealNVP))
