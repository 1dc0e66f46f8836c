"""Where the bits of a trained vae.py or selfvae.py go, level by level, on 200 validation images: python tests/diagnose.py RUN_FOLDER

    bits/value    -log p of what the factor decodes, for each of its own values            error   rms of x - mean of p(x|·), in levels
    kl, in use    KL of its latent in bits per dimension of x; share of its 1,024 values whose mean KL is above 0.05 nats
    spread        rms of a draw from p(x|·) around that mean, in levels: the decoder's own idea of its error
    linear        bits/value that 16 latents to each 8th of the sides save in a linear model (probabilistic PCA against none), channels whitened,
                  for the image itself or, above level 1, for what bilinear enlargement of the y below leaves of it
    miss          rms of d(x̂) - y, x̂ drawn given y: how far p(x|y, z) is from using that y is known exactly
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Batches, bits_per_dim, dmol_log_prob, dmol_sample, load_images  # noqa: E402


def linear_gain(r):
    """Bits a value that 16 principal components of each 8x8th patch save: ½ Σ log of variances, pooled against the first 16 apart."""
    channels = torch.cov(r.transpose(0, 1).flatten(1).double())
    r = torch.einsum("ij,bjhw->bihw", torch.linalg.cholesky(torch.linalg.inv(channels)).T.float(), r)
    patches = F.pixel_unshuffle(r, r.shape[2] // 8).movedim(1, -1).flatten(0, 2).double()
    variance, n = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0), patches.shape[1]
    if n <= 16:
        return math.nan
    nats = n * variance.mean().log() - variance[:16].log().sum() - (n - 16) * variance[16:].mean().log()
    return nats.item() / (2 * n * math.log(2))


@torch.no_grad()
def main(folder, data_dir="data"):
    checkpoint = torch.load(Path(folder, "best.pt"), weights_only=True)
    module = importlib.import_module(checkpoint["script"])
    cfg = module.Config(**checkpoint["config"])
    images = load_images(cfg.dataset, data_dir, cfg.size)
    model = (module.VAE if cfg.__class__.__module__ == "vae" else module.SelfVAE)(cfg, images.shape)
    model.load_state_dict(checkpoint["model"])
    x = next(iter(Batches(images.valid[:200], 200, "cpu")))
    torch.manual_seed(0)
    rms = lambda a, b: ((a - b) * 127.5).square().mean().sqrt().item()
    y = model.representations(x) if checkpoint["script"] == "selfvae" else {1: x}
    networks = [(model.q_u, model.p_u, model.p_y)] if checkpoint["script"] == "selfvae" else [(model.q_z, model.p_z, model.p_x)]
    networks += [factor[1:] for factor in model.factors()] if len(y) > 1 else []
    print(f"{'decodes':8}{'size':>6}{'bits/value':>12}{'bpd of x':>10}{'kl':>8}{'in use':>8}{'error':>8}{'spread':>8}{'linear':>8}{'miss':>8}")
    for k, (encode, prior, decode) in enumerate(networks):
        target, q = y[k + 1], module.gaussian(encode(y[k + 1]))
        if k:
            p = module.gaussian(prior(prior.from_y(y[k]), z))
            kl = torch.distributions.kl_divergence(q.base_dist, p.base_dist).mean(0)
            z = q.rsample()
            in_use, kl = (kl > 0.05).float().mean().item(), kl.sum().item()
            params, below = decode(y[k], z), F.interpolate(y[k], size=target.shape[2:], mode="bilinear")
        else:
            z = q.rsample()
            in_use, kl = math.nan, (q.log_prob(z) - prior.log_prob(z)).mean().item()
            params, below = decode(z), torch.zeros_like(target)
        mean, draw, nats = dmol_sample(params, mean=True), dmol_sample(params), -dmol_log_prob(target, params).mean().item()
        miss = rms(model.representations(draw)[model.K], y[k]) if k and k == model.K else math.nan
        gain = linear_gain(target - below) if below.shape[1] == target.shape[1] else math.nan
        print(f"{'x' if k + 1 == len(y) else f'y_{k + 1}':8}{target.shape[2]:6}{bits_per_dim(nats, target[0].numel()):12.3f}"
              f"{bits_per_dim(nats, x[0].numel()):10.3f}{bits_per_dim(kl, x[0].numel()):8.3f}{in_use:8.2f}{rms(target, mean):8.1f}"
              f"{rms(draw, mean):8.1f}{gain:8.3f}{miss:8.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
