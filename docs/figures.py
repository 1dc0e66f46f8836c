"""Draws the figures of the derivations with the scripts' own functions.

    python docs/figures.py levels                a second: selfVAE's graph for K = 2
    python docs/figures.py mixture               a second: a mixture of three logistics, the 256
                                                 probabilities that it gives, their logarithms
    python docs/figures.py tighten RUN_FOLDER    minutes: bounds of S importance samples, of a
                                                 linear model with known log p(x) and of a vae.py
    python docs/figures.py holes                 minutes: MNIST (downloaded), two latents: codes,
                                                 prior, samples, for N(0, 1) and for a flow

Each writes docs/figures/NAME.png, below 300 KB. realnvp-moons.png, densities warped by a flow, is
from `python realnvp.py --dataset moons`.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.distributions import Independent, Normal

FOLDER = Path(__file__).resolve().parent / "figures"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (  # noqa: E402 (needs the path above)
    Batches, dmol_log_prob, from_uint8, load_images, log_mean_exp)
from realnvp import Couplings, mlp  # noqa: E402
import vae  # noqa: E402


def levels():
    """White: latents, all of 16x8x8 = 1,024 values; grey: images, computed from x in training.

    Dashed: d.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, title, arrows in zip(
        figure.subplots(1, 2),
        ("generation, p", "inference, q and d"),
        ("v-u u-y1 u-z1 y1-z1 y1-y2 z1-y2 z1-z2 y2-z2 y2-x z2-x", "x=y2 y2=y1 x-z2 y2-z1 y1-u"),
    ):
        place = {
            "v": (0, 2.6),
            "u": (1, 2.6),
            "z1": (2.3, 2.6),
            "z2": (3.6, 2.6),
            "y1": (1, 0.9),
            "y2": (2.3, 0.9),
            "x": (3.6, 0.9),
        }
        if title.startswith("inference"):
            del place["v"]
        for arrow in arrows.split():
            start, dashed, end = arrow.partition("=" if "=" in arrow else "-")
            axes.annotate(
                "",
                place[end],
                place[start],
                arrowprops=dict(
                    arrowstyle="-|>",
                    color="black",
                    shrinkA=22,
                    shrinkB=22,
                    linestyle="--" if dashed == "=" else "-",
                ),
            )
            if dashed == "=":
                axes.text(
                    *[(a + b) / 2 for a, b in zip(place[start], place[end])],
                    "d",
                    va="bottom",
                    ha="center",
                )
        for name, (x, y) in place.items():
            latent = name[0] in "vuz"
            axes.scatter(
                x,
                y,
                1500,
                "white" if latent else "0.87",
                edgecolors="black",
                linewidths=1.2,
                zorder=2,
            )
            axes.text(
                x,
                y,
                f"${name[0]}_{name[1]}$" if name[1:] else f"${name}$",
                ha="center",
                va="center",
                fontsize=13,
                zorder=3,
            )
        below = {"y1": "16x16", "y2": "32x32", "x": "64x64"}
        for name, text in below.items():
            axes.text(place[name][0], 0.32, text, ha="center", fontsize=9)
        axes.set(title=title, xlim=(-0.5, 4.1), ylim=(0.2, 3.1), aspect="equal")
        axes.axis("off")
    figure.savefig(FOLDER / "levels.png", dpi=90)


def mixture():
    """Density, probabilities, logarithms of ½ logistic(-0.9, 0.12) + 0.3 logistic(0.1, 0.03) + 0.2
    logistic(0.6, 0.01).
    """
    weights, means, scales = torch.tensor([[0.5, 0.3, 0.2], [-0.9, 0.1, 0.6], [0.12, 0.03, 0.01]])
    line = torch.linspace(-1.4, 1.4, 2001)
    a = (line[:, None] - means) / scales
    density = (weights * a.sigmoid() * (-a).sigmoid() / scales).sum(1)
    x = from_uint8(torch.arange(256))
    params = torch.full(
        (3, 10), -1000.0
    )  # weight, mean, log-scale + 2 (section 6) of ten components, seven of weight 0
    params[:, :3] = torch.stack([weights.log(), means, scales.log() + 2])
    log_p = dmol_log_prob(x.view(256, 1, 1, 1), params.view(1, 30, 1, 1).expand(256, -1, -1, -1))

    def cdf(edges):
        return ((edges[:, None] - means) / scales).sigmoid()

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.plot(line, density, color="C0")
    top.axvspan(-1.4, -1 + 1 / 255, color="0.9")
    top.axvspan(1 - 1 / 255, 1.4, color="0.9")
    top.set(ylabel="density", title="grey: what the two edge levels own")
    middle.bar(x.numpy(), log_p.exp().numpy(), 2 / 255, color="C1")
    middle.set(
        ylabel="P(level)",
        title=f"256 probabilities, sum {log_p.exp().sum():.6f}; level 0 has {log_p[0].exp():.3f}",
    )
    alone = params.clone()
    alone[0, :2] = -1000.0
    exact = dmol_log_prob(x.view(256, 1, 1, 1), alone.view(1, 30, 1, 1).expand(256, -1, -1, -1))
    bottom.plot(x, log_p, color="C1", label="mixture")
    bottom.plot(x, exact, color="C2", label="its sharpest component alone")
    bottom.plot(
        x,
        (cdf(x + 1 / 255) - cdf(x - 1 / 255))[:, 2].log(),
        "k.",
        markersize=3,
        label="that by σ(a) - σ(b), in fp32",
    )
    bottom.set(ylabel="log P(level), nats", xlabel="x", xlim=(-1.4, 1.4), ylim=(-60, 2))
    bottom.legend(fontsize=8)
    figure.savefig(FOLDER / "mixture.png", dpi=90)


@torch.no_grad()
def tighten(run):
    """Left: x has 8 values, each of z ~ N(0, 1), x ~ N(z, 1), and q = N(x/2, 1) where the posterior
    is N(x/2, ½). Right: a run of vae.py.
    """
    checkpoint = torch.load(Path(run, "best.pt"), map_location="cpu", weights_only=True)
    if checkpoint["script"] != "vae":
        sys.exit(f"{run} is a run of {checkpoint['script']}.py; tighten takes one of vae.py")
    torch.manual_seed(0)
    sizes = 2 ** torch.arange(13)  # 1 … 4096
    x = torch.randn(200, 8) * 2**0.5
    log_p = Normal(0.0, 2**0.5).log_prob(x).sum(1)
    q, log_w = Normal(x / 2, 1.0), []
    for _ in range(16):
        z = q.sample((4096,))
        log_w.append(
            (Normal(z, 1.0).log_prob(x) + Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(2)
        )
    log_w = torch.cat(log_w)  # (draws, images)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    bounds = [
        (log_mean_exp(log_w.unflatten(0, (-1, S)), 1) - log_p).mean(1) for S in sizes.tolist()
    ]  # of each set of draws, over images
    left.plot(sizes, [b.mean() for b in bounds], "C0.-", label="bound")
    left.fill_between(
        sizes,
        *([b.quantile(p) for b in bounds] for p in (0.1, 0.9)),
        color="C0",
        alpha=0.2,
        linewidth=0,
    )
    # E[w²]/p(x)² of one value: ∫ N(z; 0, 1)² N(x; z, 1)² / N(z; x/2, 1) dz / N(x; 0, 2)² = 2/√3,
    # whatever x is
    left.plot(
        sizes,
        -((2 / 3**0.5) ** 8 - 1) / (2 * sizes),
        "k--",
        linewidth=0.8,
        label="-Var(w) / (2 S p(x)²)",
    )
    left.axhline(0, color="0.5", linewidth=0.8)
    left.set(
        xscale="log",
        xlabel="S",
        ylabel="bound - log p(x), nats an image",
        ylim=(-1.5, 0.1),
        title="log p(x) known",
    )
    left.legend(fontsize=8)

    cfg = vae.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
    model = vae.VAE(cfg, images.shape)
    model.load_state_dict(checkpoint["model"])
    x = next(iter(Batches(images.test[:8], 8, "cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        log_w = torch.cat([model.log_weights(x, 512) for _ in range(8)]).double()  # (4096, 8)
    for one in log_w.T:
        values = torch.stack(
            [log_mean_exp(one.view(-1, S), 1).mean() for S in sizes.tolist()]
        )  # mean over all sets of S draws
        right.plot(sizes, values - values[0], ".-", linewidth=0.8, markersize=3)
    right.set(
        xscale="log",
        xlabel="S",
        ylabel="bound - ELBO, nats",
        title="a trained vae.py, 8 test images",
    )
    elbo = log_w.mean(0)
    gain_512 = (log_mean_exp(log_w.view(8, 512, 8), 1).mean(0) - elbo).mean()
    gain_4096 = (log_mean_exp(log_w) - elbo).mean()
    print(f"sd of log w, nats: {log_w.std(0).mean():.1f}; gain over the ELBO of S = 512: "
          f"{gain_512:.1f}; of 4096: {gain_4096:.1f}")
    figure.savefig(FOLDER / "tighten.png", dpi=90)


class PlaneFlow(vae.RealNVPPrior):
    """The prior of vae.py with the flow that realnvp.py has for points: z (B, 2, 1, 1)."""

    def __init__(self):
        nn.Module.__init__(self)  # and not that of RealNVPPrior, whose flow is of images
        self.flow = Couplings(torch.tensor([1, 0]).view(2, 1, 1), 8, 2, mlp)


class TwoLatents(nn.Module):
    """A VAE with z (B, 2, 1, 1) and fully connected networks.

    Grey x in [0, 1] is read as the probability of a white pixel.
    """

    def __init__(self, prior):
        super().__init__()
        self.q_z = nn.Sequential(
            nn.Flatten(),
            nn.Linear(1024, 400),
            nn.ELU(),
            nn.Linear(400, 400),
            nn.ELU(),
            nn.Linear(400, 4),
        )
        self.p_z = prior
        self.p_x = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2, 400),
            nn.ELU(),
            nn.Linear(400, 400),
            nn.ELU(),
            nn.Linear(400, 1024),
        )

    def posterior(self, x):
        """x (B, 1, 32, 32) in [0, 1] -> q(z|x)."""
        mean, log_var = self.q_z(x).chunk(2, 1)
        return Independent(
            Normal(mean.view(-1, 2, 1, 1), (0.5 * log_var).exp().view(-1, 2, 1, 1)), 3
        )

    def terms(self, x):
        """re_x, kl_z, (B,) in nats."""
        q = self.posterior(x)
        z = q.rsample()
        return F.binary_cross_entropy_with_logits(self.p_x(z), x.flatten(1), reduction="none").sum(
            1
        ), q.log_prob(z) - self.p_z.log_prob(z)


def holes(data_dir="data", epochs=20):
    """Rows: N(0, 1), flow. Columns: q(z), the mean of all q(z|x).

    Log p(z), 7 nats down from its top; what p(z) decodes to.
    """
    images = load_images("mnist", data_dir)
    labels, figure = torch.from_numpy(images.labels["valid"].astype("int64")), Figure(
        figsize=(9, 6.2), layout="constrained"
    )
    grid = figure.subplots(2, 3)
    for row, prior in zip(grid, (vae.NormalPrior(), PlaneFlow())):
        torch.manual_seed(0)
        model, data = TwoLatents(prior), Batches(images.train, 500, "cpu")
        optimizer = torch.optim.Adam(model.parameters())
        total = epochs * data.per_epoch
        for step in range(total):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / total)
            loss = sum(term.mean() for term in model.terms((data.batch(step) + 1) / 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            x = (next(iter(Batches(images.valid, len(images.valid), "cpu"))) + 1) / 2
            re, kl = (term.mean().item() for term in model.terms(x))
            name = "N(0, 1)" if type(prior) is vae.NormalPrior else "flow"
            print(f"{name}: validation, nats an image: re {re:.1f} + kl {kl:.2f} = {re + kl:.1f}")
            posterior = model.posterior(x)
            z = posterior.sample()
            q_z = torch.cat(
                [
                    log_mean_exp(posterior.log_prob(some.unsqueeze(1)), 1)
                    for some in z[:2000].split(100)
                ]
            )  # log q(z), (2000,)
            waste = (q_z - prior.log_prob(z[:2000])).mean().item()
            (left, low), (right, high) = (
                z.flatten(1).quantile(torch.tensor([0.003, 0.997]), 0).tolist()
            )
            axes = torch.linspace(left, right, 160), torch.linspace(low, high, 160)
            log_p = prior.log_prob(torch.cartesian_prod(*axes).view(-1, 2, 1, 1)).view(160, 160).T
            draws = torch.sigmoid(model.p_x(prior.from_noise(torch.randn(64, 2, 1, 1))))
        print(f"    KL(q(z) || p(z)) {waste:.2f} nats")
        row[0].scatter(*z.flatten(1)[:4000].T, s=1, c=labels[:4000], cmap="tab10", linewidths=0)
        row[0].set(title=f"{name}: draws from q(z)", xlim=(left, right), ylim=(low, high))
        row[1].imshow(
            log_p.numpy(),
            origin="lower",
            extent=(left, right, low, high),
            cmap="magma",
            vmin=log_p.max() - 7,
            aspect="auto",
        )
        row[1].set(title=f"log p(z); ELBO {-re - kl:.1f}, waste {waste:.2f} nats")
        row[2].imshow(
            draws.view(8, 8, 32, 32).transpose(1, 2).reshape(256, 256).numpy(), cmap="gray"
        )
        row[2].set(title="means of p(x|z), z ~ p(z)", xticks=[], yticks=[])
    figure.savefig(FOLDER / "holes.png", dpi=80)


if __name__ == "__main__":
    figures = {f.__name__: f for f in (levels, mixture, tighten, holes)}
    if not set(sys.argv[1:2]) & set(figures) or len(sys.argv) != 2 + (sys.argv[1] == "tighten"):
        sys.exit(__doc__)
    figures[sys.argv[1]](*sys.argv[2:])
