"""RealNVP, an invertible network as a density model of images and of points in the plane (Dinh et al. 2016).

    generative model   v ~ N(0, 1), x = f⁻¹(v), with f invertible: coupling layers, whose Jacobian is triangular
    likelihood         log p(x) = log N(f(x); 0, 1) + log |det ∂f/∂x|, exact (Eq. (3))
    images             have 256 levels, but p is a density: the bound log P(x) ≥ E[log p(x + u)], u ~ U[0, 1), x in levels

    python realnvp.py --dataset moons                points in the plane, a minute; also rings, spirals, checkerboard
    python realnvp.py --dataset mnist --small        images on a CPU
    python realnvp.py --dataset cifar10              the paper's size, for a GPU; Table 1 reports 3.49 bits per dimension

arXiv:1605.08803. Derivation, logged keys, differences from the paper: docs/realnvp.md. All equations: docs/equations.md. Results:
docs/results.md.

    B batch · C, H, W channels, height, width of x · D = C·H·W · S importance samples
    x (B, C, H, W) images in [-1, 1], or points (B, 2, 1, 1) · y its logits, v the base variable (the paper's z), both like x
    z, where a coupling or a flow stands by itself, is what goes in, v what comes out: the x and y of Eqs. (4) to (9)
    "released" is the paper's TensorFlow code
"""

import argparse, contextlib, dataclasses, json, math, os, pickle, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import cached
from torchvision.utils import save_image

from common import (POINTS, Batches, UserError, barrier, bits_per_dim, command_line, draws, explain, from_uint8, importance_weighted,
                    inception_metrics, join_processes, load_images, load_inception, load_points, mean_terms, processes,
                    reference_statistics, seconds_to_sample, seed_noise, summed, to_uint8)

# ---- Config ----------------------------------------------------------------------------------------------------------
# Copied from vae.py: flag
def flag(default, help, **metadata):
    """A Config field: its default and help; in metadata its `choices`, or `low`, the least value allowed (default 1)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})

# Changed from vae.py: no latent and no prior; what the plane needs
@dataclasses.dataclass
class Config:
    """The flags. Defaults are the paper's for CIFAR-10 (section 4.1); where it is silent, its released code's; epochs are ours."""
    dataset: str = flag("shapes", "moons, rings, spirals, checkerboard; shapes, mnist, cifar10, stl10, imagenette, celeba, or a folder")
    data_dir: str = flag("data", "where datasets are kept")
    out_dir: str = flag("runs", "where runs are kept")
    size: int = flag(None, "side of the images in pixels, even; above 32 without --small 40, 48, 56, 64, 80 … (default: the dataset's own)")
    small: bool = flag(False, "images: the same network narrowed for a laptop CPU, and a quicker evaluation")
    epochs: int = flag(None, "passes over the training images (default 1000, points 20)")
    steps: int = flag(None, "training steps (overrides --epochs)")
    batch_size: int = flag(None, "images a step, all processes together (default 64, points 512)")
    accumulate: int = flag(1, "parts that a batch is computed in, one after another, for less memory")
    lr: float = flag(None, "Adam's learning rate (default 1e-3, points 3e-3): rises for 200 steps, from 1000 on falls, to a tenth", low=0)
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
    iw_samples: int = flag(16, "S of the importance-weighted bound: it takes S passes over the test images")
    iw_images: int = flag(None, "test images for that bound (default all, --small 200)")
    temperature: float = flag(0.7, "figures: scale of v for a second sheet of samples (ours; the first has 1)", low=0)
    fid: int = flag(None, "samples for FID and Inception Score, at the end; 50000 is usual (default: neither)")
    inception_weights: str = flag(None, "Inception weights for --fid (default: downloaded to --data_dir)")
    free = "iw_samples iw_images temperature"  # flags of the evaluation

    def __post_init__(self):
        for name, points, pictures in (("epochs", 20, 1000), ("batch_size", 512, 64), ("lr", 3e-3, 1e-3)):
            if getattr(self, name) is None:
                setattr(self, name, points if self.dataset in POINTS else pictures)

    @property
    def variant(self):
        return "small" if self.small else "full"

# ---- Building blocks: couplings and their networks ----------------------------------------------------------------------
# Changed from vae.py: no strides, and a fixed start
def conv(c_in, c_out, kernel=3, gain=1.0):
    """Convolution with w = g·v/‖v‖ (Salimans & Kingma 2016, Eq. (2)) that keeps height and width. g starts at gain·√2,
    for the half of the mean square that a mask or a ReLU takes before it (skips: after it; He et al. 2015)."""
    layer = weight_norm(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
    nn.init.constant_(layer.parametrizations.weight.original0, gain * 2**0.5)  # g
    return layer

def zeroed(layer):
    """The layer with weights and biases 0. It has no weight norm, under which a step would lengthen a whole filter, and not each
    of its weights, by the learning rate: too slow a way out of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

class ResNet(nn.Module):
    """s and t of a coupling (section 4.1): residual blocks, ReLU first; skip connections to the output from each and from `enter`.

    (B, C, H, W) -> (B, 2C, H, W), 0 at first. No batch norm: an image's likelihood is its own, see docs/realnvp.md.
    """
    def __init__(self, channels, hidden, blocks):
        super().__init__()
        self.enter = conv(channels, hidden)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), conv(hidden, hidden), nn.ReLU(), conv(hidden, hidden, gain=blocks**-0.5))
                                    for _ in range(blocks))  # the gains keep sums over blocks from growing with their number
        self.skips = nn.ModuleList(conv(hidden, hidden, 1, gain=(blocks + 1)**-0.5) for _ in range(blocks + 1))
        self.leave = zeroed(nn.Conv2d(hidden, 2 * channels, 1))

    def forward(self, z):
        h = self.enter(z)
        skipped = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:]):
            h = h + block(h)
            skipped = skipped + skip(h)
        return self.leave(F.relu(skipped)) * (32 / self.leave.in_channels)  # Adam moves each weight alike: s by as much as 32 features would

def mlp(hidden=64):
    """s and t in the plane, where any network will do: (B, 2, 1, 1) -> (B, 4, 1, 1), 0 at first."""
    return nn.Sequential(nn.Flatten(), nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         zeroed(nn.Linear(hidden, 4)), nn.Unflatten(1, (4, 1, 1)))

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

# ---- The model -------------------------------------------------------------------------------------------------------
ALPHA = 0.05  # keeps the logit of black and white finite
# Changed from vae.py: residual networks
WIDTHS = {  # residual blocks in s and t; their features, doubled as the side halves
    "32": (8, 64),  # the paper's for CIFAR-10, here for all up to 32
    "64": (2, 32),  # the paper's for 64x64
    "small": (1, 32),  # ours
}

def scales_for(size, small):
    """Scales for images of `size` pixels: 2 up to 32 ("downscale only once") and if small, else down to 4 … 7. Or UserError."""
    scales = 2 if small or size <= 32 else int(math.log2(size / 4)) + 1
    if size % 2**(scales - 1):
        raise UserError(f"size {size} is no multiple of {2**(scales - 1)}, which {scales} scales need: take 16, 32, 64 …")
    return scales

class RealNVP(nn.Module):
    """p(x) for images of shape (C, H, W), H = W as `scales_for` allows; or for points, shape (2, 1, 1)."""
    def __init__(self, cfg, image_shape):
        super().__init__()
        self.shape = image_shape
        channels, size, _ = image_shape
        self.plane = size == 1
        if self.plane:
            self.flow = Couplings(torch.tensor([1, 0]).view(2, 1, 1), 8, 2, mlp)  # x₁ moves x₂, x₂ moves x₁, …
        else:
            blocks, hidden = WIDTHS["small" if cfg.small else "32" if size <= 32 else "64"]
            net = lambda channels_in, side: ResNet(channels_in, hidden * size // side, blocks)
            self.flow = Flow(channels, size, scales_for(size, cfg.small), net)

    def preprocess(self, x):
        """Dequantize, then take logits (section 4.1): y = logit(α + (1 - 2α)(x + u)/256), x as levels 0 … 255, u ~ U[0, 1).

        x (B, C, H, W) -> y, same shape and dtype, and log |det ∂y/∂(x + u)|, (B,) in nats. Points stay what they are (zeros).
        """
        if self.plane:
            return x, x.new_zeros(len(x))
        # NOTE(paper): section 4.1 has α + (1 - α)·, whose logit is infinite at the upper end of white. As released here.
        r = ALPHA + (1 - 2 * ALPHA) * (to_uint8(x) + torch.rand_like(x)) / 256
        return torch.logit(r), (math.log((1 - 2 * ALPHA) / 256) - r.log() - (1 - r).log()).sum((1, 2, 3))  # logit' = 1/(r(1 - r))

    def postprocess(self, y):
        """The inverse: logits y -> x + u, in levels (below 0 or above 256 for a y that no image has). Points stay what they are."""
        return y if self.plane else 256 * (torch.sigmoid(y) - ALPHA) / (1 - 2 * ALPHA)

    def forward(self, x):
        """x -> v = f(x), same shape (Eq. (2)), and log |det ∂v/∂(x + u)|, (B,) in nats. For images u is drawn anew each time."""
        y, log_det_logit = self.preprocess(x)
        v, log_det = self.flow(y)
        return v, log_det + log_det_logit

    def inverse(self, v):
        """v -> x = f⁻¹(v), same shape, for images on the 256-level grid."""
        x = self.postprocess(self.flow.inverse(v))
        return x if self.plane else from_uint8(x.floor().clamp(0, 255))

    def terms(self, x):
        """-log p(x) = base + volume, (B,) in nats (Eq. (3)): {"base": -log N(v; 0, 1), "volume": -log |det ∂v/∂(x + u)|}.

        Exact for points. For images a one-sample estimate of E[-log p(x + u)] ≥ -log P(x), the bound that is trained.
        """
        v, log_det = self(x)
        return {"base": -Normal(0.0, 1.0, validate_args=False).log_prob(v).sum((1, 2, 3)), "volume": -log_det}

    def log_prob(self, x):
        """log p(x) of points, of images a one-sample estimate of its lower bound: (B, C, H, W) -> (B,) in nats."""
        return -sum(self.terms(x).values())

    @torch.no_grad()
    def log_weights(self, x, samples):
        """log w_s = log p(x + u_s) - log q(u_s|x), q uniform on [0, 1)ᴰ, so log q = 0: (B, C, H, W) -> (samples, B) in nats."""
        return torch.stack([self.log_prob(x) for _ in range(samples)])

    @torch.no_grad()
    def sample(self, n, temperature=1.0):
        """v ~ N(0, temperature²), x = f⁻¹(v) -> (n, C, H, W), on the 256-level grid."""
        return self.inverse(temperature * torch.randn(n, *self.shape, device=next(self.parameters()).device))

    @torch.no_grad()
    def interpolate(self, x1, x2, steps=8):
        """f⁻¹ of the arc cos φ·v1 + sin φ·v2, 0 ≤ φ ≤ π/2 (Eq. (19), for two images instead of four): (B, C, H, W) -> (B, steps, C, H, W).

        If v1 and v2 are independent draws of N(0, 1), so is every point of the arc; halfway on a straight line sd would be 1/√2.
        """
        v1, v2 = self(x1)[0], self(x2)[0]
        angles = torch.linspace(0, math.pi / 2, steps).tolist()
        return torch.stack([self.inverse(math.cos(angle) * v1 + math.sin(angle) * v2) for angle in angles], 1)

    @torch.no_grad()
    def inverse_error(self, x):
        """|f⁻¹(f(x + u)) - (x + u)|, 0 but for rounding: (B, C, H, W) -> same, in levels; points: in units of the plane."""
        y, _ = self.preprocess(x)
        return (self.postprocess(self.flow.inverse(self.flow(y)[0])) - self.postprocess(y)).abs()

# ---- Training --------------------------------------------------------------------------------------------------------
# Changed from vae.py: Adam, its rate, l2, clipping; nothing to initialise
def train(cfg, model, images, folder, checkpoint):
    """Minimise -log p(x), in nats per image averaged over the batch, plus l2. Returns False where Ctrl-C or SIGTERM ended it."""
    rank, world = processes()
    data = Batches(images.train, cfg.batch_size, cfg.device, cfg.seed, images.augment, world * cfg.accumulate)
    valid = Batches(images.valid, cfg.batch_size, cfg.device)
    total, dims = cfg.steps or cfg.epochs * data.per_epoch, math.prod(images.shape)
    penalised = [p for name, p in model.named_parameters() if name.endswith(("original0", "scale"))]  # weight norm's g, tanh's factor
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    state, rows = restore(cfg, folder, checkpoint, model, optimizer), []
    terms_of = prepared(cfg, model.terms, model)
    with stop_requests() as stop:
        for step in range(state["step"] + 1, total + 1):
            # NOTE(paper): a constant rate there. Without batch norm s must grow slowly at first; a falling rate averages noise out.
            # The numbers are ours; the tenth is reached at step 100,000.
            optimizer.param_groups[0]["lr"] = cfg.lr * min(step / 200, 1, max(math.sqrt(1000 / step), 0.1))
            optimizer.zero_grad()
            seed_noise(cfg.seed, step, rank)
            rows.append({})
            for x in data.batch(step - 1, rank, world).chunk(cfg.accumulate):
                with autocast(cfg):
                    terms = terms_of(x)
                l2 = 5e-5 * nn.utils.parameters_to_vector(penalised).square().sum()  # "on the weight scale parameters" (section 4.1)
                loss = (sum(terms.values()).mean() + l2) / cfg.accumulate  # the parts' gradients add up to that of the batch
                loss.backward()
                rows[-1] = {name: rows[-1].get(name, 0) + values.detach().mean() / cfg.accumulate for name, values in terms.items()}
            nn.utils.clip_grad_norm_(model.parameters(), 100)  # as released
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
# Changed from vae.py: temperatures, arcs in v, errors of the inverse; the plane
def draw(cfg, model, images, folder, name):
    """The figures `name`: samples/, 64 draws at temperature 1, 64 at --temperature; interpolations/, one a row; reconstructions/,
    rows x, `inverse_error`, x, …, white where that is largest. For points: samples/ is `draw_plane`."""
    if model.plane:
        return draw_plane(model, images, folder / "samples" / f"{name}.png")
    for temperature in dict.fromkeys((1.0, cfg.temperature)):
        suffix = f"-temperature{temperature:g}" * (temperature != 1) + ".png"
        save_grid(folder / "samples" / (name + suffix), model.sample(64, temperature))
    x = next(iter(Batches(images[:32], 32, cfg.device)))
    error = model.inverse_error(x)
    save_grid(folder / "reconstructions" / f"{name}.png", x, 2 * error / error.max().clamp(min=1e-9) - 1)
    save_grid(folder / "interpolations" / f"{name}.png", model.interpolate(x[:8], x[:8].roll(1, 0)).flatten(0, 1))

def density(model, reach, cells):
    """p(x) at the centres of the cells x cells squares of [-reach, reach]² -> (cells, cells), x₁ down, x₂ along rows."""
    axis = reach * (2 * torch.arange(cells, device=next(model.parameters()).device) + 1 - cells) / cells
    return model.log_prob(torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)).exp().view(cells, cells)

def draw_plane(model, points, path):
    """Twelve panels: data; p(x); v ~ N(0, 1) and a square grid, then both through f⁻¹, coupling by coupling; and the data through f."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    data, learned, *layers, back = figure.subplots(3, 4).flat
    x = next(iter(Batches(points[:3000], 3000, next(model.parameters()).device)))
    line = torch.linspace(-3, 3, 193, device=x.device)
    upright = torch.cartesian_prod(line[::8], line)  # 25 lines of 193 points; mirrored, 25 level ones
    grid, v = torch.cat([upright, upright.flip(1)]).view(-1, 2, 1, 1), torch.randn_like(x)
    hues = {"c": torch.atan2(v[:, 1], v[:, 0]).flatten().cpu().numpy(), "cmap": "hsv"}  # a draw keeps its colour

    def panel(axes, title, reach, points, grid=None, **colours):
        if grid is not None:
            axes.plot(*grid.view(50, 193, 2).permute(2, 1, 0).cpu().numpy(), color="0.8", linewidth=0.4, zorder=0)
        axes.scatter(*points.flatten(1).T.cpu().numpy(), s=1, linewidths=0, **colours)
        axes.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])

    panel(data, "data", 1.25, x, color="black")
    learned.imshow(density(model, 1.25, 250).T.cpu().numpy(), origin="lower", cmap="magma")
    learned.set(title="learned density p(x)", xticks=[], yticks=[])
    panel(layers[0], "v ~ N(0, 1)", 3.2, v, grid, **hues)
    for i, axes in enumerate(layers[1:], 1):
        grid, v = model.flow[-i].inverse(grid), model.flow[-i].inverse(v)
        reach = 1.1 * v.abs().flatten(1).quantile(0.99).item()
        panel(axes, f"{i} of 8 couplings" if i < 8 else "x = f⁻¹(v)", reach, v, grid, **hues)
    panel(back, "f(data)", 3.2, model(x)[0], color="black")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=72)

# Copied from vae.py: save_grid
def save_grid(path, *images):
    """PNG of true pixel values, 8 images a row. Several sets (B, C, H, W): row 1 of each, one above the other, then row 2 …"""
    path.parent.mkdir(exist_ok=True)
    columns = min(8, len(images[0]))
    whole = len(images[0]) // columns * columns
    rows = torch.stack([x[:whole].unflatten(0, (-1, columns)) for x in images], 1)  # (rows, sets, columns, C, H, W)
    save_image((rows.flatten(0, 2) + 1) / 2, path, nrow=columns)

# Changed from vae.py: bounds over dequantization noise, the inverse; points: the density's integral
def evaluate(cfg, model, images, folder, state):
    """Bits per dimension, or nats a point, printed and in results.json, and figures test.png: of this checkpoint, on the test set."""
    dims, count = math.prod(images.shape), cfg.iw_images or (200 if cfg.small else len(images.test))
    with inference(cfg):
        test = Batches(images.test, cfg.batch_size, cfg.device)
        terms = mean_terms(model, test)
        bound, fid = {}, {}
        if not model.plane:
            kept = folder / f"importance-{state['step']}-{cfg.iw_samples}-{count}-{cfg.dtype}.jsonl"
            bound = importance_weighted(model, Batches(images.test[:count], cfg.batch_size, cfg.device), cfg.iw_samples, dims, kept)
            if cfg.fid and (inception := load_inception(cfg.inception_weights, cfg.data_dir, cfg.device)):
                fid = inception_metrics(inception, draws(model, cfg.fid), reference_statistics(inception, images, cfg.device))
        if processes()[0]:
            return
        if model.plane:
            results = {"nll_nats": sum(terms.values()), "integral": density(model, 2, 1000).sum().item() * (2 * 2 / 1000)**2}
        else:
            results = {"elbo_bpd": bits_per_dim(sum(terms.values()), dims), **bound, **fid}
        results |= {
            **terms, "inverse_error": model.inverse_error(next(iter(test))).max().item(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_1": seconds_to_sample(model, 1), "seconds_100": seconds_to_sample(model, 100),
            "step": state["step"], "train_seconds": state["seconds"], "device": cfg.device, "dtype": cfg.dtype}
        draw(cfg, model, images.test, folder, "test")
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    for name, value in results.items():
        print(f"{name:14} {value:,.6g}" if isinstance(value, float) else f"{name:14} {value}")

# Changed from vae.py: points, and other sizes
def main(Model, argv=None):
    """Train and evaluate; --eval: evaluate. Returns the exit code: 2 for a user's mistake, 1 not finite, 130 stopped."""
    cfg = parse_flags(argv)
    try:
        plane = cfg.dataset in POINTS
        scales_for(8 if plane else cfg.size or 8, cfg.small)  # refuses a wrong --size before data are made; 8 always passes
        folder, checkpoint = open_run(cfg)
        images = load_points(cfg.dataset) if plane else load_images(cfg.dataset, cfg.data_dir, cfg.size)
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
    sys.exit(main(RealNVP))
