"""Draws the figures of the derivations with the scripts' own functions.

    python docs/lab/figures.py …

    levels      a second: selfVAE's graph for K = 2, generation and inference
    mixture     a second: a mixture of three logistics, the 256 probabilities
                that it gives to the pixel values, their logarithms
    tighten RUN_FOLDER
                minutes: bounds of S importance samples, of a linear model
                with known log p(x) and of a trained vae.py
    holes       minutes: MNIST (downloaded) with two latents; codes of all
                images, prior, draws, for N(0, 1) and for a flow
    hero RUN_FOLDER
                seconds: README's first picture, four test images, halved, and
                enlarged again by bicubic interpolation and by a selfvae.py
    moons RUN_FOLDER
                a second: README's second picture, four panels of the one that
                `realnvp.py --dataset moons` draws
    exact RUN_FOLDER RUN_FOLDER
                seconds: draws of x given y by a selfvae.py without and with
                --exact, and how far their d is from y
    given RUN_FOLDER RUN_FOLDER RUN_FOLDER RUN_FOLDER RUN_FOLDER
                seconds: y and draws of x given y by selfvae.py with five
                transformations
    enlarge RUN_FOLDER
                seconds: draws of x by a selfvae.py, given y_1, given y_2, …
    sides RUN_FOLDER
                a second: a growing dcvae.py's images of the same codes at
                the end of each side, from its samples/
    race        a second: the bound of VAE and selfVAE during training, over
                images seen and over time, from docs/lab/logs
    growth      a second: time, memory and work of a training step against
                size, levels and batch, from docs/lab/logs
    stack RUN_FOLDER
                seconds: the bits on the stack while docs/compress.py writes
                three test images by a vae.py with --prior normal

Each command writes docs/figures/NAME.png, below 300 KB. realnvp-moons.png, a density warped by a
flow, comes from `python realnvp.py --dataset moons`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.distributions import Independent, Normal

FOLDER = Path(__file__).resolve().parents[1] / "figures"
LOGS = Path(__file__).resolve().parent / "logs"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from common import (  # noqa: E402 (needs the path above)
    GAP, PICTURE_SIDE, SHEET_TOP, Batches, Dmol, from_uint8, load_images, log_mean_exp, read_log,
    save_sheet)
import compress  # noqa: E402
import dcvae  # noqa: E402
from realnvp import Couplings, mlp  # noqa: E402
import selfvae  # noqa: E402
import vae  # noqa: E402


# ---- levels --------------------------------------------------------------------------------------

LATENTS = {"v": (0, 2.6), "u": (1, 2.6), "z_1": (2.3, 2.6), "z_2": (3.6, 2.6)}  # name: place
IMAGES = {"y_1": (1, 0.9), "y_2": (2.3, 0.9), "x": (3.6, 0.9)}
SIZES = {"y_1": "16x16", "y_2": "32x32", "x": "64x64"}


def levels():
    """White: latents, all of 16x8x8 = 1,024 values; grey: images, computed from x in training.

    Dashed: d.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    generation = [("v", "u"), ("u", "y_1"), ("u", "z_1"), ("y_1", "z_1"), ("y_1", "y_2"),
                  ("z_1", "y_2"), ("z_1", "z_2"), ("y_2", "z_2"), ("y_2", "x"), ("z_2", "x")]
    draw_graph(left, {**LATENTS, **IMAGES}, generation, [])
    left.set_title("generation, p")
    without_v = {name: place for name, place in LATENTS.items() if name != "v"}
    inference = [("x", "z_2"), ("y_2", "z_1"), ("y_1", "u")]
    draw_graph(right, {**without_v, **IMAGES}, inference, [("x", "y_2"), ("y_2", "y_1")])
    right.set_title("inference, q and d")
    figure.savefig(FOLDER / "levels.png", dpi=90)


def draw_graph(axes, places, arrows, dashed):
    """Variables {name: place}, arrows and dashed arrows [(name, name)]."""
    for start, end in arrows + dashed:
        style = dict(arrowstyle="-|>", color="black", shrinkA=22, shrinkB=22)
        style["linestyle"] = "--" if (start, end) in dashed else "-"
        axes.annotate("", places[end], places[start], arrowprops=style)
    for start, end in dashed:
        x = (places[start][0] + places[end][0]) / 2
        y = (places[start][1] + places[end][1]) / 2
        axes.text(x, y, "d", va="bottom", ha="center")
    for name, (x, y) in places.items():
        colour = "white" if name in LATENTS else "0.87"
        axes.scatter(x, y, 1500, colour, edgecolors="black", linewidths=1.2, zorder=2)
        axes.text(x, y, f"${name}$", ha="center", va="center", fontsize=13, zorder=3)
    for name, size in SIZES.items():
        axes.text(places[name][0], 0.32, size, ha="center", fontsize=9)
    axes.set(xlim=(-0.5, 4.1), ylim=(0.2, 3.1), aspect="equal")
    axes.axis("off")


# ---- mixture -------------------------------------------------------------------------------------

def mixture():
    """Density, probabilities and their logarithms, one below the other.

    The mixture is ½ logistic(-0.9, 0.12) + 0.3 logistic(0.1, 0.03) + 0.2 logistic(0.6, 0.01).
    """
    weights = torch.tensor([0.5, 0.3, 0.2])
    means = torch.tensor([-0.9, 0.1, 0.6])
    scales = torch.tensor([0.12, 0.03, 0.01])
    line = torch.linspace(-1.4, 1.4, 2001)
    a = (line[:, None] - means) / scales
    density = (weights * a.sigmoid() * (-a).sigmoid() / scales).sum(1)

    x = from_uint8(torch.arange(256))
    params = torch.full((3, 10), -1000.0)  # ten components, seven of weight 0
    params[0, :3] = weights.log()
    params[1, :3] = means
    params[2, :3] = scales.log() + 2  # Dmol subtracts 2: docs/likelihood.md, section 6
    log_p = log_probabilities(params)
    sharpest_alone = params.clone()
    sharpest_alone[0, :2] = -1000.0
    log_p_sharpest = log_probabilities(sharpest_alone)
    above = ((x + 1 / 255 - means[2]) / scales[2]).sigmoid()
    below = ((x - 1 / 255 - means[2]) / scales[2]).sigmoid()

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(line, density, color="C0")
    top.axvspan(-1.4, -1 + 1 / 255, color="0.9")
    top.axvspan(1 - 1 / 255, 1.4, color="0.9")
    top.set(ylabel="density", title="shaded: what pixel values 0 and 255 own")
    middle.bar(x.numpy(), log_p.exp().numpy(), 2 / 255, color="C1")
    total = log_p.exp().sum()
    of_black = log_p[0].exp()
    middle.set(ylabel="P(value)",
               title=f"256 probabilities, sum {total:.6f}; value 0 has {of_black:.3f}")
    bottom.plot(x, log_p, color="C1", label="mixture")
    bottom.plot(x, log_p_sharpest, color="C2", label="its sharpest component alone")
    bottom.plot(x, (above - below).log(), "k.", markersize=3, label="as σ(a) - σ(b), in fp32")
    bottom.set(ylabel="log P(value), nats", xlabel="x", xlim=(-1.4, 1.4), ylim=(-60, 2))
    bottom.legend(fontsize=8)
    figure.savefig(FOLDER / "mixture.png", dpi=90)


def log_probabilities(params):
    """log P of each pixel value, in nats: params (3, 10) of one grey pixel -> (256,)."""
    x = from_uint8(torch.arange(256)).view(256, 1, 1, 1)
    return Dmol(params.view(1, 30, 1, 1).expand(256, -1, -1, -1), 1).log_prob(x)


# ---- tighten -------------------------------------------------------------------------------------

SAMPLES = [2**i for i in range(13)]  # S = 1 … 4096


@torch.no_grad()
def tighten(run):
    """At the left a model with known log p(x), at the right a run of vae.py."""
    checkpoint = torch.load(Path(run, "best.pt"), map_location="cpu", weights_only=True)
    if checkpoint["script"] != "vae":
        sys.exit(f"{run} is a run of {checkpoint['script']}.py; tighten takes one of vae.py")
    torch.manual_seed(0)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    tighten_linear(left)
    tighten_trained(right, checkpoint)
    figure.savefig(FOLDER / "tighten.png", dpi=90)


def tighten_linear(axes):
    """8 values of z ~ N(0, 1), x ~ N(z, 1); q is N(x/2, 1), and the posterior is N(x/2, ½)."""
    x = torch.randn(200, 8) * 2**0.5
    log_p_x = Normal(0.0, 2**0.5).log_prob(x).sum(1)
    q_z = Normal(x / 2, 1.0)
    p_z = Normal(0.0, 1.0)
    log_w = []
    for _ in range(16):
        z = q_z.sample((4096,))
        p_x = Normal(z, 1.0)
        log_w.append((p_x.log_prob(x) + p_z.log_prob(z) - q_z.log_prob(z)).sum(2))
    log_w = torch.cat(log_w)  # (draws, images)

    means = []
    lows = []
    highs = []
    for S in SAMPLES:
        gaps = log_mean_exp(log_w.unflatten(0, (-1, S)), 1) - log_p_x
        gap = gaps.mean(1)  # for each set of S draws, the mean over images
        means.append(gap.mean())
        lows.append(gap.quantile(0.1))
        highs.append(gap.quantile(0.9))
    axes.plot(SAMPLES, means, "C0.-", label="bound, mean over 200 images")
    axes.fill_between(SAMPLES, lows, highs, color="C0", alpha=0.2, linewidth=0,
                      label="80 % of such means")
    # E[w²] / p(x)² of one value, for any x:
    # ∫ N(z; 0, 1)² N(x; z, 1)² / N(z; x/2, 1) dz / N(x; 0, 2)² = 2/√3
    variance = (2 / 3**0.5)**8 - 1
    axes.plot(SAMPLES, -variance / (2 * torch.tensor(SAMPLES)), "k--", linewidth=0.8,
              label="1/S law: -Var(w) / (2 S p(x)²)")
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(xscale="log", xlabel="S", ylabel="bound - log p(x), nats per image", ylim=(-1.5, 0.1),
             title="log p(x) known: a linear model")
    axes.legend(fontsize=8)


def tighten_trained(axes, checkpoint):
    """A line for each of 8 test images: its 4096 weights are divided into sets of S."""
    cfg = vae.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
    model = vae.VAE(cfg, images.shape)
    model.load_state_dict(checkpoint["model"])
    x = next(iter(Batches(images.test, 8, "cpu", count=8)))
    with torch.autocast("cpu", torch.bfloat16):
        log_w = model.log_weights(x, 4096).double()  # (4096, 8)
    for of_image in log_w.T:
        bounds = []
        for S in SAMPLES:
            bounds.append(log_mean_exp(of_image.view(-1, S), 1).mean())  # over all sets of S draws
        bounds = torch.stack(bounds)
        axes.plot(SAMPLES, bounds - bounds[0], ".-", linewidth=0.8, markersize=3)
    axes.set(xscale="log", xlabel="S", ylabel="bound - ELBO, nats",
             title="log p(x) unknown: vae.py, 8 test images")
    axes.grid(alpha=0.3)
    elbo = log_w.mean(0)
    of_512 = (log_mean_exp(log_w.view(8, 512, 8), 1).mean(0) - elbo).mean()
    of_4096 = (log_mean_exp(log_w) - elbo).mean()
    print(f"sd of log w, nats: {log_w.std(0).mean():.1f}; gain of S = 512 over the ELBO: "
          f"{of_512:.1f}; of 4096: {of_4096:.1f}")


# ---- holes ---------------------------------------------------------------------------------------

class PlaneFlow(vae.RealNVPPrior):
    """The prior of vae.py with the flow that realnvp.py has for points: z (B, 2, 1, 1)."""

    def __init__(self):
        nn.Module.__init__(self)  # and not RealNVPPrior's, whose flow is for images
        self.flow = Couplings(torch.tensor([1, 0]).view(2, 1, 1), 8, 2, 1, mlp)


class TwoLatents(nn.Module):
    """A VAE with z (B, 2, 1, 1) and fully connected networks.

    Grey x in [0, 1] is read as the probability of a white pixel.
    """

    def __init__(self, prior):
        super().__init__()
        self.q_z = nn.Sequential(nn.Flatten(), nn.Linear(1024, 400), nn.ELU(),
                                 nn.Linear(400, 400), nn.ELU(), nn.Linear(400, 4))
        self.p_z = prior
        self.p_x = nn.Sequential(nn.Flatten(), nn.Linear(2, 400), nn.ELU(),
                                 nn.Linear(400, 400), nn.ELU(), nn.Linear(400, 1024))

    def posterior(self, x):
        """x (B, 1, 32, 32) in [0, 1] -> q(z|x)."""
        mean, log_var = self.q_z(x).view(-1, 4, 1, 1).chunk(2, 1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 3)

    def terms(self, x):
        """re_x and kl_z, (B,) in nats: x (B, 1, 32, 32) in [0, 1]."""
        q_z = self.posterior(x)
        z = q_z.rsample()
        re_x = F.binary_cross_entropy_with_logits(self.p_x(z), x.flatten(1), reduction="none")
        return re_x.sum(1), q_z.log_prob(z) - self.p_z.log_prob(z)


def holes(data_dir="data", epochs=20):
    """Rows: N(0, 1), flow. Columns: q(z), the mean of all q(z|x); log p(z); images of z ~ p(z).

    log p(z) is shown down to 7 nats below its maximum.
    """
    images = load_images("mnist", data_dir)
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    rows = figure.subplots(2, 3)
    priors = {"N(0, 1)": vae.NormalPrior(), "flow": PlaneFlow()}
    for row, (name, prior) in zip(rows, priors.items()):
        torch.manual_seed(0)
        model = TwoLatents(prior)
        train_two_latents(model, images, epochs)
        draw_holes(row, name, model, images)
    figure.savefig(FOLDER / "holes.png", dpi=80)


def train_two_latents(model, images, epochs):
    """Adam on the negative ELBO, with a rate that falls from 2e-3 to 0."""
    batches = Batches(images.train, 500, "cpu")
    optimizer = torch.optim.Adam(model.parameters())
    total = epochs * batches.per_epoch
    for step in range(total):
        x = (batches.batch(step) + 1) / 2
        re_x, kl_z = model.terms(x)
        loss = re_x.mean() + kl_z.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / total)
        optimizer.step()


@torch.no_grad()
def draw_holes(row, name, model, images):
    """The three panels of a model, and its numbers on the console."""
    x = (next(iter(Batches(images.valid, len(images.valid), "cpu"))) + 1) / 2
    re_x, kl_z = model.terms(x)
    re = re_x.mean().item()
    kl = kl_z.mean().item()
    print(f"{name}: validation, nats per image: re {re:.1f} + kl {kl:.2f} = {re + kl:.1f}")

    posterior = model.posterior(x)
    z = posterior.sample()
    some = z[:2000]
    log_q = []  # of the mean of all q(z|x)
    for part in some.split(100):
        log_q.append(log_mean_exp(posterior.log_prob(part.unsqueeze(1)), 1))
    waste = (torch.cat(log_q) - model.p_z.log_prob(some)).mean().item()
    print(f"    KL(q(z) || p(z)) {waste:.2f} nats")

    codes = z.flatten(1)  # (N, 2)
    lowest, highest = codes.quantile(torch.tensor([0.003, 0.997]), 0)
    left, low = lowest.tolist()
    right, high = highest.tolist()
    grid = torch.cartesian_prod(torch.linspace(left, right, 160), torch.linspace(low, high, 160))
    log_p = model.p_z.log_prob(grid.view(-1, 2, 1, 1)).view(160, 160).T  # (rows, columns)
    means = torch.sigmoid(model.p_x(model.p_z.from_noise(torch.randn(64, 2, 1, 1))))
    mosaic = means.view(8, 8, 32, 32).transpose(1, 2).reshape(256, 256)

    of_codes, of_prior, of_draws = row
    labels = torch.tensor(images.labels["valid"])
    of_codes.scatter(codes[:4000, 0], codes[:4000, 1], s=1, c=labels[:4000], cmap="tab10",
                     linewidths=0)
    for digit in labels.unique().tolist():
        middle = codes[labels == digit].median(0).values
        of_codes.annotate(str(digit), middle.tolist(), weight="bold", size=13, ha="center",
                          va="center")
    of_codes.set(title=f"{name}: draws from q(z), by digit", xlim=(left, right), ylim=(low, high))
    of_prior.imshow(log_p.numpy(), origin="lower", extent=(left, right, low, high), cmap="magma",
                    vmin=log_p.max() - 7, aspect="auto")
    of_prior.set(title=f"log p(z)\nELBO {-re - kl:.1f}, waste {waste:.2f} nats")
    of_draws.imshow(mosaic.numpy(), cmap="gray")
    of_draws.set(title="means of p(x|z), z ~ p(z)", xticks=[], yticks=[])


# ---- exact, given, enlarge, sides: sheets of finished runs ---------------------------------------

def trained(run, data_dir):
    """A run of selfvae.py -> its Config, its images, its best model."""
    checkpoint = torch.load(Path(run, "best.pt"), map_location="cpu", weights_only=True)
    cfg = selfvae.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, data_dir, cfg.size)
    model = selfvae.SelfVAE(cfg, images.shape).eval()
    model.load_state_dict(checkpoint["model"])
    return cfg, images, model


@torch.no_grad()
def given_y(run, data_dir):
    """Eight test images, their y, and a run's draws of x given y -> a dict, with its model."""
    cfg, images, model = trained(run, data_dir)
    x = from_uint8(torch.tensor(images.test[:8]).movedim(3, 1))
    y = model.representations(x)[model.K]
    torch.manual_seed(0)
    draw = model.reconstruct(x, operation="conditional_generate")
    title = f"selfvae.py, {images.name} {images.size}x{images.size}, test\ndraws of x given y"
    return {"cfg": cfg, "model": model, "x": x, "y": y, "draw": draw, "title": title}


def hero(run, data_dir="data"):
    """Four test images, half their size, and two ways back: bicubic, and a draw of x given y."""
    of = given_y(run, data_dir)
    rows = {"photograph": of["x"], "half its size": selfvae.enlarged(of["y"], of["x"]),
            "bicubic": selfvae.bicubic(of["y"], of["x"]), "drawn by the model": of["draw"]}
    for name, images in rows.items():
        rows[name] = F.interpolate(images[:4], scale_factor=2)
    save_sheet(FOLDER / "hero.png", of["title"], rows, keep_columns=True)


def moons(run):
    """Noise, two steps on the way, and the moons: of a picture of 3 rows of 4 panels."""
    picture = Image.open(Path(run, "samples", "test.png"))
    width = picture.width // 4
    height = picture.height // 3
    small = Image.new("RGB", (2 * width, 2 * height))
    for i, (row, column) in enumerate(((0, 2), (1, 1), (2, 0), (2, 2))):
        panel = picture.crop((column * width, row * height, (column + 1) * width,
                              (row + 1) * height))
        small.paste(panel, (i % 2 * width, i // 2 * height))
    small.save(FOLDER / "moons.png")


def exact(*runs, data_dir="data"):
    """Test images, their y, and for each run a draw of x given y and 8 |d(x̂) - y|."""
    rows = {}
    for run in runs:
        of = given_y(run, data_dir)
        x = of["x"]
        model = of["model"]
        missed = (model.representations(of["draw"])[model.K] - of["y"]).abs()
        name = "--exact" if of["cfg"].exact else "without --exact"
        rows |= {"x": x, "y = d(x)": selfvae.enlarged(of["y"], x), f"x̂ from y, {name}": of["draw"],
                 f"8 |d(x̂) - y|, {name}": selfvae.enlarged(8 * missed - 1, x).clamp(-1, 1)}
    save_sheet(FOLDER / "exact.png", of["title"], rows, keep_columns=True)


@torch.no_grad()
def enlarge(run, data_dir="data"):
    """For eight test images: every y_k and a draw of x given it; then x."""
    cfg, images, model = trained(run, data_dir)
    x = from_uint8(torch.tensor(images.test[:8]).movedim(3, 1))
    y = model.representations(x)
    torch.manual_seed(0)
    rows = {}
    for k in range(1, model.K + 1):
        known, _ = model.infer(x, [f"y_{k}"])
        rows[f"y_{k}, {y[k].shape[-1]}x{y[k].shape[-1]}"] = selfvae.enlarged(y[k], x)
        rows[f"x̂ from y_{k}"] = model.sample(len(x), known=known)
    rows["x"] = x
    title = f"selfvae.py, {images.name} {images.size}x{images.size}, test\ndraws of x given y_k"
    save_sheet(FOLDER / "enlarge.png", title, rows, keep_columns=True)


def given(*runs, data_dir="data"):
    """x, then for each run y and a draw of x given y."""
    rows = {}
    for run in runs:
        of = given_y(run, data_dir)
        name = of["cfg"].transform
        rows |= {"x": of["x"], f"y: {name}": selfvae.enlarged(of["y"], of["x"]),
                 f"x̂ from y: {name}": of["draw"]}
    save_sheet(FOLDER / "given.png", of["title"], rows, keep_columns=True)


def row_of_sheet(path, side, i=0):
    """The pictures in row i of a sheet of 8 columns -> (8, 3, side, side) in [-1, 1]."""
    factor = math.ceil(PICTURE_SIDE / side)
    step = factor * side + GAP
    sheet = from_uint8(torch.tensor(np.asarray(Image.open(path).convert("RGB"))))
    if (len(sheet) - SHEET_TOP) % step:
        sys.exit(f"{path} is no sheet of today's scripts")
    row = sheet[SHEET_TOP + i * step:, -8 * step:][:step]
    pictures = row.unflatten(1, (8, step)).permute(1, 3, 0, 2)
    return pictures[..., :-GAP:factor, :-GAP:factor]


def sides(run):
    """The first row of a run's last sheet in samples/ for each side, one below the other."""
    run = Path(run)
    cfg = dcvae.Config(**torch.load(run / "last.pt", weights_only=True)["config"])
    size = load_images(cfg.dataset, cfg.data_dir, cfg.size).size
    last = {}
    for path in sorted((run / "samples").glob("[0-9]*.png")):
        side, alpha = dcvae.growth(cfg, size, int(path.stem))
        if alpha == 1:
            last[f"{side}x{side}"] = row_of_sheet(path, size)
    save_sheet(FOLDER / "sides.png", f"dcvae.py, {cfg.dataset} {size}x{size}\n"
               "samples of the same codes at the end of each side", last, keep_columns=True)


# ---- race ----------------------------------------------------------------------------------------

RACERS = {"imagenette-vae": "VAE", "imagenette-K2": "K = 2",
          "imagenette-K2-exact": "K = 2, --exact"}


def race(batch_size=8):
    """Bits per dimension at 64x64. Lines are training, means of 250 steps; crosses are validation.

    The time per step is that of the model's last seed: minutes of a core, evaluations included.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    over_images, over_time = figure.subplots(1, 2, sharey=True)
    for i, (name, label) in enumerate(RACERS.items()):
        paths = sorted(LOGS.glob(f"{name}-s[0-9]-log.jsonl"))
        if not paths:
            continue
        path = Path(str(paths[-1]).replace("log.jsonl", "results.json"))
        results = json.loads(path.read_text(encoding="utf-8"))
        minutes = results["core_minutes"] / results["step"]
        for path in paths:
            rows = read_log(path)
            if rows[-1]["split"] == "valid":
                del rows[-2]  # the mean of fewer than 250 steps
            for split, style in (("train", "-"), ("valid", "x")):
                steps = [row["step"] for row in rows if row["split"] == split]
                bpd = [row["bpd"] for row in rows if row["split"] == split]
                over_images.plot([batch_size * step for step in steps], bpd, style, color=f"C{i}")
                over_time.plot([minutes * step for step in steps], bpd, style, color=f"C{i}")
        over_time.plot([], [], color=f"C{i}", label=label)
    over_images.set(xlabel="images seen", ylabel="bits per dimension", ylim=(3.5, 6))
    over_time.set(xlabel="minutes of a core")
    over_time.legend()
    over_images.grid(alpha=0.3)
    over_time.grid(alpha=0.3)
    figure.savefig(FOLDER / "race.png", dpi=90)


# ---- growth --------------------------------------------------------------------------------------

LINES = {"time": "o-", "memory": "s--", "FLOPs": "^:"}


def growth():
    """What a training step costs, as multiples of the leftmost point of each panel.

    From docs/lab/logs/benchmark-growth.txt: {what grows: {tick: (time, memory, FLOPs)}}; of the
    importance samples S only the time was measured.
    """
    panels = {"side (VAE, batches of 4)": {}, "levels K (selfVAE, 64x64)": {},
              "batch (VAE, 32x32)": {}, "S (VAE, one image)": {}}
    by_side, by_level, by_batch, by_samples = panels.values()
    for line in (LOGS / "benchmark-growth.txt").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("importance"):
            by_samples[int(cells[1].split()[-1])] = (float(cells[2].split()[0]),)
        elif cells[0].startswith(("vae", "selfvae")):
            side = int(cells[1])
            batch = int(cells[2])
            rate, memory, work = (float(cell) for cell in cells[4:7])
            costs = (batch / rate, memory, batch * work)
            if cells[0] != "vae":
                by_level[int(cells[0].split()[-1])] = costs
            else:
                if batch == 4:
                    by_side[side] = costs
                if side == 32:
                    by_batch[batch] = costs
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, 4, sharey=True), panels.items()):
        ticks = sorted(points)
        first = points[ticks[0]]
        for i, name in enumerate(list(LINES)[:len(first)]):
            ratios = [points[tick][i] / first[i] for tick in ticks]
            axes.plot(ticks, ratios, LINES[name], label=name)
        axes.set_xscale("linear" if 0 in ticks else "log")
        axes.set(title=title, yscale="log", ylim=(0.9, 45), xticks=ticks, xticklabels=ticks)
        axes.set_yticks([1, 2, 4, 8, 16, 32], ["1x", "2x", "4x", "8x", "16x", "32x"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("times the leftmost point")
    figure.axes[0].legend()
    figure.savefig(FOLDER / "growth.png", dpi=80)


# ---- stack ---------------------------------------------------------------------------------------

MOVES = {"pop z by q(z|x)": "C3", "push x by p(x|z)": "C0", "push z by p(z)": "C2"}


def stack(run, count=3):
    """Bits back: a pop shortens the stack, a push lengthens it.

    What an image adds in the end is minus its ELBO (of another draw of z, so not to the bit).
    """
    codec, images = compress.load_codec(run)
    if not codec.is_vae or hasattr(codec.prior, "flow"):
        raise SystemExit("this figure takes a run of vae.py with --prior normal")
    pile = compress.random_stack(0)
    start = pile.bits()
    bits = [0.0]
    symbols = [0]

    def note(number):
        bits.append((pile.bits() - start) / 1000)
        symbols.append(symbols[-1] + number)

    costs = [0.0]
    with torch.inference_mode():
        for x in from_uint8(torch.tensor(images.test[:count]).movedim(3, 1)).split(1):
            p = codec.p(0, None, None)
            bins = compress.pop_all(pile, compress.latent_table(codec.q(0, x), p))
            note(len(bins))
            compress.push_image(pile, codec.p_image(0, None, codec.z(0, bins, p)), x)
            note(x.numel())
            compress.push_prior(pile, bins)
            note(len(bins))
            costs.append(costs[-1] - codec.model.elbo(x).item() / math.log(2) / 1000)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i in range(3 * count):
        name = list(MOVES)[i % 3]
        axes.plot(symbols[i:i + 2], bits[i:i + 2], color=MOVES[name], linewidth=2,
                  label=name if i < 3 else None)
    axes.plot(symbols[::3], costs, "k--", linewidth=1, label="-ELBO of the images so far")
    axes.plot(symbols[::3], bits[::3], "ko", markersize=5, label="an image is complete")
    axes.set(xlabel="values popped or pushed", ylabel="kilobits added to the stack")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(FOLDER / "stack.png", dpi=90)


def main(words):
    """Draw the figure that the command line asks for -> the exit code."""
    figures = {"levels": levels, "mixture": mixture, "tighten": tighten, "holes": holes,
               "hero": hero, "moons": moons, "exact": exact, "given": given, "enlarge": enlarge,
               "sides": sides, "race": race, "growth": growth, "stack": stack}
    folders = {"tighten": 1, "hero": 1, "moons": 1, "exact": 2, "given": 5, "enlarge": 1,
               "sides": 1, "stack": 1}
    name, *arguments = words or [""]
    if name not in figures or len(arguments) != folders.get(name, 0):
        print(__doc__, file=sys.stderr)
        return 1
    figures[name](*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
