"""Where the bits of a trained vae.py or selfvae.py go, level by level, on 200 validation images.

    python tests/diagnose.py RUN_FOLDER

    bits/value    -log p of what the factor decodes, for each of its own values
    kl, in use    KL of its latent in bits per dimension of x; share of its 1,024 values whose mean
                  KL is above 0.05 nats
    error         rms of x - mean of p(x|·), in pixel values
    spread        rms of a sample of p(x|·) around that mean: the decoder's own idea of its error
    linear        bits/value that 16 latents to each 8th of the sides save in a linear model
                  (probabilistic PCA against none), channels whitened, for the image itself or,
                  above level 1, for what bilinear enlargement of the y below leaves of it
    miss          rms of d(x̂) - y, x̂ a sample given y: how far p(x|y, z) is from using that y is
                  known exactly
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Batches, Dmol, bits_per_dim, load_images  # noqa: E402


def linear_gain(r):
    """Bits a value that 16 principal components of each 8x8th patch save:

    ½ Σ log of variances, pooled against the first 16 apart.
    """
    channels = torch.cov(r.transpose(0, 1).flatten(1).double())
    r = torch.einsum(
        "ij,bjhw->bihw", torch.linalg.cholesky(torch.linalg.inv(channels)).T.float(), r
    )
    patches = F.pixel_unshuffle(r, r.shape[2] // 8).movedim(1, -1).flatten(0, 2).double()
    variance, n = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0), patches.shape[1]
    if n <= 16:
        return math.nan
    nats = (
        n * variance.mean().log()
        - variance[:16].log().sum()
        - (n - 16) * variance[16:].mean().log()
    )
    return nats.item() / (2 * n * math.log(2))


def rms(a, b):
    """Root of the mean squared difference of two sets of images, in pixel values."""
    return ((a - b) * 127.5).square().mean().sqrt().item()


def factors_of(model, x):
    """-> [(what is decoded, y below or None, q, KL in nats (B,) or by latent value, p)], top-down.

    In the order of the model: of vae.py one, of selfvae.py y_1, …, x.
    """
    if not hasattr(model, "K"):
        q = sys.modules["vae"].gaussian(model.q_z(x))
        z = q.rsample()
        return [(x, None, q.log_prob(z) - model.p_z.log_prob(z), Dmol(model.p_x(z)))]
    gaussian = sys.modules["selfvae"].gaussian
    y = model.representations(x)
    q = gaussian(model.q_u(y[1]))
    z = q.rsample()
    found = [(y[1], None, q.log_prob(z) - model.p_u.log_prob(z), Dmol(model.p_y(z)))]
    for k in range(1, model.K + 1):
        q = gaussian(model.q_z[k - 1](y[k + 1]))
        p = model.p_z[k - 1](y[k], z)
        z = q.rsample()
        kl = torch.distributions.kl_divergence(q.base_dist, p.base_dist)
        found.append((y[k + 1], y[k], kl, model.p_x[k - 1](y[k], z)))
    return found


COLUMNS = ("decodes", "size", "bits/value", "bpd of x", "kl", "in use", "error", "spread",
           "linear", "miss")


@torch.no_grad()
def main(folder, data_dir="data"):
    """Print the table of a run."""
    checkpoint = torch.load(Path(folder, "best.pt"), weights_only=True)
    module = importlib.import_module(checkpoint["script"])
    cfg = module.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, data_dir, cfg.size)
    Model = module.VAE if checkpoint["script"] == "vae" else module.SelfVAE
    model = Model(cfg, images.shape)
    model.load_state_dict(checkpoint["model"])
    x = next(iter(Batches(images.valid, 200, "cpu", count=200)))
    torch.manual_seed(0)
    factors = factors_of(model, x)
    print("".join(f"{column:>11}" for column in COLUMNS))
    for k, (target, y, kl, p_x) in enumerate(factors, 1):
        sample = p_x.sample()
        nats = -p_x.log_prob(target).mean().item()
        in_use = math.nan
        if y is None:
            below = torch.zeros_like(target)
        else:
            below = F.interpolate(y, size=target.shape[2:], mode="bilinear")
            kl = kl.mean(0)  # of each value of the latent
            in_use = (kl > 0.05).float().mean().item()
        kl = kl.mean().item() if y is None else kl.sum().item()
        miss = math.nan
        if y is not None and k == len(factors):
            miss = rms(model.representations(sample)[model.K], y)
        gain = math.nan
        if below.shape[1] == target.shape[1]:
            gain = linear_gain(target - below)
        dims = x[0].numel()
        numbers = [bits_per_dim(nats, target[0].numel()), bits_per_dim(nats, dims),
                   bits_per_dim(kl, dims), in_use, rms(target, p_x.mean), rms(sample, p_x.mean),
                   gain, miss]
        name = "x" if k == len(factors) else f"y_{k}"
        print(f"{name:>11}{target.shape[2]:>11}", *(f"{number:11.3f}" for number in numbers),
              sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
