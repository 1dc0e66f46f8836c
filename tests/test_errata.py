"""docs/errata.md: what arithmetic or our code can show of it. Published numbers are those of Tables 1 and 2, oracles by hand."""

import math
import re

import pytest
import torch
from conftest import ROOT
from torch.distributions import Categorical, Normal, Uniform, kl_divergence

from common import bits_per_dim, log_mean_exp
from dcvae import info_nce
from vae import LATENT, MoGPrior

# ---- Formulas --------------------------------------------------------------------------------------------------------

def test_bound_without_kl_z_exceeds_log_p():
    """z ~ N(0, 1), x|z ~ N(z, 1), q(z|x) = N(x, 0.1²), x = 2: log p = -2.266. Bound -4.732; with K = 1 and k = 2 … K, -0.924."""
    q, prior, K = Normal(2.0, 0.1), Normal(0.0, 1.0), 1
    log_p = Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(2.0)).item()
    re = 0.5 * math.log(2 * math.pi) + 0.5 * 0.01  # -E[log N(2; z, 1)]
    kl = {1: kl_divergence(q, prior).item()}
    right, printed = (-re - sum(kl[k] for k in range(first, K + 1)) for first in (1, 2))
    assert (log_p, right, printed) == pytest.approx((-2.2655, -4.7315, -0.9239), abs=1e-4)
    assert right < log_p < printed

def test_y_term_of_eq_1_is_no_kl():
    """y a fair coin, u = y, p(y|u) = 0.9 if y = u: ln 0.5 - ln 0.9 = -0.588; as printed ln 0.5 - (ln 0.9 + ln 0.1) / 2 = 0.511."""
    q, p = Categorical(torch.tensor([0.5, 0.5])), Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))  # p: a row for each u
    y = u = torch.tensor([0, 1])
    right = (q.log_prob(y) - p.log_prob(u)).mean().item()  # row u at y = u
    printed = kl_divergence(q, p).mean().item()
    assert (right, printed) == pytest.approx((-0.5878, 0.5108), abs=1e-4)

def test_y_term_of_eq_1_for_a_computed_y():
    """y = 0 for sure, hence u = 0: both are -ln 0.9 = 0.105."""
    q, p = Categorical(torch.tensor([1.0, 0.0])), Categorical(torch.tensor([0.9, 0.1]))
    right = (q.log_prob(torch.tensor(0)) - p.log_prob(torch.tensor(0))).item()
    assert (right, kl_divergence(q, p).item()) == pytest.approx((0.1054, 0.1054), abs=1e-4)

def test_kl_z_needs_its_expectation_over_u():
    """q(z) = N(0, 1), p(z|u) = N(u, 1), u ~ N(0, 1): E[KL] = E[u²]/2 = 0.5; to p(z) = N(0, 2) it is (ln 2 - 0.5)/2 = 0.097."""
    u = Normal(0.0, 1.0).icdf((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)  # evenly in probability
    kl = kl_divergence(Normal(0.0, 1.0), Normal(u, 1.0))
    assert kl.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert kl_divergence(Normal(0.0, 1.0), Normal(0.0, math.sqrt(2))).item() == pytest.approx(0.0966, abs=1e-4)

def test_log_q_of_a_point_mass():
    """E[log q]: 0 on a discrete set; -ln 1e-6 = 13.8 for a density 1e-6 wide, and -ln 1e-12 = 27.6 for a narrower one."""
    assert Categorical(torch.tensor([0.0, 1.0, 0.0])).entropy().item() == pytest.approx(0.0, abs=1e-6)
    zero = torch.tensor(0.0, dtype=torch.float64)
    assert -Uniform(zero, zero + 1e-6).entropy().item() == pytest.approx(13.8155, abs=1e-4)
    assert -Uniform(zero, zero + 1e-12).entropy().item() == pytest.approx(27.6310, abs=1e-4)

def test_hidden_bound_needs_a_deterministic_y():
    """A fair coin y, whatever u: B = E[log p(y|u) - log q(y|x)] = 0 exceeds log p(y) = -ln 2; with y = d(x) it is -ln 2, and so log p(y)."""
    p = Categorical(torch.tensor([0.5, 0.5]))
    for q, wanted in ((Categorical(torch.tensor([0.5, 0.5])), 0.0), (Categorical(torch.tensor([0.0, 1.0])), -math.log(2))):
        assert (q.probs * p.logits).sum().item() + q.entropy().item() == pytest.approx(wanted, abs=1e-6)
    assert p.log_prob(torch.tensor(1)).item() == pytest.approx(-math.log(2))

# ---- Numbers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("re, kl, side, published, plain", [
    (5540, 1966, 32, 3.51, 3.525), (6348, 1438, 32, 3.65, 3.657),  # CIFAR-10: VAE, selfVAE-downscale
    (24096, 2502, 64, 3.12, 3.123), (23797, 3816, 64, 3.24, 3.242), (23336, 1214, 64, 2.88, 2.882),  # CelebA: VAE, sketch, 3lvl
    (30809, 1961, 64, 3.85, 3.847), (30394, 1171, 64, 3.70, 3.706),  # Imagenette64: VAE, 3lvl
    (6675, 1596, 32, 3.88, 3.884), (6512, 1653, 32, 3.83, 3.834)])  # Table 2: standard normal, mixture; RealNVP is the first
def test_published_bpd_is_the_plain_bound(re, kl, side, published, plain):
    """(RE + KL) / (3 side² ln 2), RE being -log p: three decimals by hand, and within 0.02 of what is said to be IW-512."""
    bpd = bits_per_dim(re + kl, 3 * side**2)
    assert bpd == pytest.approx(plain, abs=6e-4)
    assert abs(bpd - published) < 0.02

def test_bpd_divides_by_the_size_of_x():
    """selfVAE on CIFAR-10, 7,786 nats: 3.66 bits for each of 3,072 values, as published; 2.93 if the 768 of y counted too."""
    assert bits_per_dim(6348 + 1438, 3072) == pytest.approx(3.657, abs=6e-4)
    assert bits_per_dim(6348 + 1438, 3072 + 768) == pytest.approx(2.925, abs=6e-4)

def test_celeba_is_64_by_64():
    """26,598 nats for the VAE, published as 3.12: 12.5 bits at 32x32, 3.12 at 64x64, 0.78 at 128x128."""
    bpd = [bits_per_dim(24096 + 2502, 3 * side**2) for side in (32, 64, 128)]
    assert bpd == pytest.approx([12.491, 3.123, 0.781], abs=6e-4)

@pytest.mark.parametrize("components, parameters, millions", [(10, 20_480, 0), (1000, 2_048_000, 2)])
def test_two_million_more_parameters_are_1000_components(components, parameters, millions):
    """A mean and a variance of 1,024 values each; Table 2 rises from 20M to 22M."""
    count = sum(p.numel() for p in MoGPrior(components).parameters())
    assert count == parameters and round(count / 1e6) == millions

def test_16_percent_counts_values():
    """u and z, 16·8·8 values each, of 3·64·64: 16.7 %. As 32-bit floats against 8-bit pixels: 66.7 %."""
    sent, image = 2 * math.prod(LATENT), 3 * 64 * 64
    assert (sent, image) == (2048, 12288)
    assert sent / image == pytest.approx(0.1667, abs=1e-4) and 32 * sent / (8 * image) == pytest.approx(0.6667, abs=1e-4)

# ---- The released code -----------------------------------------------------------------------------------------------

def released_nll(log_w, batch_size):
    """As released: log-mean-exp over S of +(batch mean of -log w), then the mean over batches. log_w (S, images)."""
    return log_mean_exp(-log_w.unflatten(1, (-1, batch_size)).mean(2)).mean().item()

def test_released_importance_weighting_is_looser_than_the_elbo():
    """log w ~ N(-0.5, 1), so E[w] = 1, -log p(x) = 0: right 0, -ELBO 0.5; released 0.5 + 0.5/32 = 0.516, one image a batch 1.0."""
    log_w = -0.5 + torch.randn(512, 6400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right, plain = -log_mean_exp(log_w).mean().item(), -log_w.mean().item()
    assert right == pytest.approx(0.0, abs=0.01) and plain == pytest.approx(0.5, abs=0.005)
    assert released_nll(log_w, 32) == pytest.approx(0.5156, abs=0.005) and released_nll(log_w, 1) == pytest.approx(1.0, abs=0.01)
    assert right < plain < released_nll(log_w, 32) < released_nll(log_w, 1)

# ---- DC-VAE ----------------------------------------------------------------------------------------------------------

def test_contrast_without_temperature_has_a_floor():
    """The best that cosines allow: 1 with the right key, -1 with all 8,096 others. 7.0 nats; at 0.07 next to nothing; a guess 9.0."""
    query, positive, negatives = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]).expand(8096, 2)
    assert info_nce(query, positive, negatives, 1.0)[0].item() == pytest.approx(math.log(1 + 8096 * math.exp(-2)), rel=1e-5) == pytest.approx(7.0, abs=0.01)
    assert info_nce(query, positive, negatives, 0.07)[0].item() < 1e-8
    assert info_nce(query, positive, positive.expand(8096, 2), 1.0)[0].item() == pytest.approx(9.0, abs=0.01)

def test_limited_codes():
    """z ~ N(0, 1) limited to [-1, 1]: P(|z| > 1) = 31.7 %; the variance is that of the middle plus 1 for the ends, sd 0.718."""
    normal = Normal(0.0, 1.0)
    ends = 2 * normal.cdf(torch.tensor(-1.0)).item()
    middle = (1 - ends) - 2 * normal.log_prob(torch.tensor(1.0)).exp().item()  # ∫ z² φ(z) over [-1, 1], by parts
    assert (ends, math.sqrt(middle + ends)) == pytest.approx((0.317, 0.718), abs=5e-4)

# ---- The page --------------------------------------------------------------------------------------------------------

def test_every_entry_says_how_to_see_it():
    """A numbered entry ends with **See**, a row of a table in a filled last cell. (That the tests named exist: test_docs.py.)"""
    for section in (ROOT / "docs" / "errata.md").read_text().split("\n## ")[1:]:
        entries = re.split(r"\n\d+\. ", section)[1:]
        blind = [entry[:60] for entry in entries if not re.search(r"\*\*See\*\* \S[^\n]{5,}\s*$", entry.split("\n### ")[0].rstrip())]
        assert blind == []
        rows = [line for line in section.splitlines() if line.startswith("|")][2:]
        assert all(len(row.strip("| ").split(" | ")[-1]) > 5 and len(row.strip("| ").split(" | ")) == len(rows[0].strip("| ").split(" | ")) for row in rows)
