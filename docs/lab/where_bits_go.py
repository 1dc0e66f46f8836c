"""Where the bits of a trained vae.py or selfvae.py go, level by level, on 200 validation images.

    python docs/lab/where_bits_go.py RUN_FOLDER

There is one row for each image that is decoded, y_1, …, y_K, x, with these columns:

    bits/value    -log p of the image, per value of this image
    bpd of x      the same in bits per dimension of x
    kl            of its latent, in bits per dimension of x
    in use        share of the latent's 1,024 values whose mean KL is above 0.05 nats
    error         rms of the image - mean of p(x|·), in pixel values
    spread        rms of a draw from p(x|·) around that mean, in pixel values: the decoder's own
                  estimate of its error
    linear        bits/value that a linear model (probabilistic PCA) saves with 16 latents for each
                  cell of an 8x8 grid, channels whitened. It models the image itself or, above
                  level 1, the difference between the image and the bilinearly enlarged y below
    miss          rms of d(x̂) - y, where x̂ is drawn given y: how far p(x|y, z) is from using the
                  fact that y is known exactly
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributions import kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import Batches, bits_per_dim, load_images  # noqa: E402 (needs the path above)

COLUMNS = {"bits/value": (12, 3), "bpd of x": (10, 3), "kl": (8, 3), "in use": (8, 2),
           "error": (8, 1), "spread": (8, 1), "linear": (8, 3), "miss": (8, 1)}  # width, digits


def rms(a, b):
    """Root of the mean squared difference of two images (B, C, H, W), in pixel values."""
    return ((a - b) * 127.5).square().mean().sqrt().item()


def linear_gain(residual):
    """Bits per value saved by 16 principal components of each patch of an 8x8 grid.

    residual is (B, C, H, W). The saving is ½ Σ log of the variances, all pooled, minus the same
    with the first 16 apart. It is NaN if there are no more than 16.
    """
    channels = torch.cov(residual.transpose(0, 1).flatten(1).double())
    whitening = torch.linalg.cholesky(torch.linalg.inv(channels)).T.float()
    white = torch.einsum("ij,bjhw->bihw", whitening, residual)
    patches = F.pixel_unshuffle(white, white.shape[2] // 8).movedim(1, -1).flatten(0, 2).double()
    n = patches.shape[1]
    if n <= 16:
        return math.nan
    variances = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)
    of_the_others = (n - 16) * variances[16:].mean().log()
    nats = n * variances.mean().log() - variances[:16].log().sum() - of_the_others
    return nats.item() / (2 * n * math.log(2))


def load_run(folder, data_dir):
    """-> the script's name, the model of best.pt, 200 validation images (200, C, H, W)."""
    checkpoint = torch.load(Path(folder, "best.pt"), weights_only=True)
    script = checkpoint["script"]
    module = importlib.import_module(script)
    cfg = module.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, data_dir, cfg.size)
    Model = module.VAE if script == "vae" else module.SelfVAE
    model = Model(cfg, images.shape)
    model.load_state_dict(checkpoint["model"])
    return script, model, next(iter(Batches(images.valid, 200, "cpu", count=200)))


def print_row(name, target, p_x, draw, kl, below, dims, in_use=math.nan, miss=math.nan):
    """Print a row: `draw` ~ p_x, `kl` in nats per image; the linear model adds to `below`."""
    nats = -p_x.log_prob(target).mean().item()
    mean = p_x.mean
    linear = math.nan
    if below.shape[1] == target.shape[1]:
        linear = linear_gain(target - below)
    row = {
        "bits/value": bits_per_dim(nats, target[0].numel()),
        "bpd of x": bits_per_dim(nats, dims),
        "kl": bits_per_dim(kl, dims),
        "in use": in_use,
        "error": rms(target, mean),
        "spread": rms(draw, mean),
        "linear": linear,
        "miss": miss,
    }
    line = f"{name:8}{target.shape[2]:6}"
    for column, (width, digits) in COLUMNS.items():
        line += f"{row[column]:{width}.{digits}f}"
    print(line)


@torch.no_grad()
def main(folder, data_dir="data"):
    script, model, x = load_run(folder, data_dir)
    dims = x[0].numel()
    header = f"{'decodes':8}{'size':>6}"
    for column, (width, _) in COLUMNS.items():
        header += f"{column:>{width}}"
    print(header)

    torch.manual_seed(0)
    if script == "vae":
        y = {1: x}
        names = {1: "x"}
        levels = []
        encoder, prior, decoder = model.q_z, model.p_z, model.p_x
    else:
        y = model.representations(x)
        names = model.y_names
        levels = model.per_level
        encoder, prior, decoder = model.q_u, model.p_u, model.p_y
    q = encoder(y[1])
    z = q.rsample()
    kl = (q.log_prob(z) - prior.log_prob(z)).mean().item()
    p_y = decoder(z)
    print_row(names[1], y[1], p_y, p_y.sample(), kl, torch.zeros_like(y[1]), dims)
    for k, q_z, p_z, p_x in levels:
        target = y[k + 1]
        q = q_z(target)
        p = p_z(y[k], z)
        z = q.rsample()
        p_target = p_x(y[k], z)
        draw = p_target.sample()
        kl_of_values = kl_divergence(q.base_dist, p.base_dist).mean(0)
        in_use = (kl_of_values > 0.05).float().mean().item()
        miss = math.nan
        if names[k + 1] == "x":
            miss = rms(model.representations(draw)[k], y[k])
        below = F.interpolate(y[k], size=target.shape[2:], mode="bilinear")
        kl = kl_of_values.sum().item()
        print_row(names[k + 1], target, p_target, draw, kl, below, dims, in_use, miss)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
