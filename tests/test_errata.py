"""docs/errata.md: what arithmetic or our code can show of it.

Published numbers are those of Tables 1 and 2, oracles by hand.
"""

import math
import re

import pytest
import torch
from conftest import ROOT
from pytest import approx
from torch.distributions import Categorical, Normal, Uniform, kl_divergence

from common import bits_per_dim, log_mean_exp
from dcvae import info_nce
from vae import LATENT, MoGPrior


# ---- Formulas ------------------------------------------------------------------------------------

def test_bound_without_kl_z_exceeds_log_p():
    """z ~ N(0, 1), x|z ~ N(z, 1), q(z|x) = N(x, 0.1²), x = 2: log p = -2.266, the bound -4.732.

    With K = 1 and a sum of KLs that starts at k = 2 the "bound" is -0.924.
    """
    log_p = Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(2.0)).item()
    re_x = 0.5 * math.log(2 * math.pi) + 0.5 * 0.01  # -E[log N(2; z, 1)]
    kl = kl_divergence(Normal(2.0, 0.1), Normal(0.0, 1.0)).item()
    assert log_p == approx(-2.2655, abs=1e-4)
    assert -re_x - kl == approx(-4.7315, abs=1e-4)
    assert -re_x == approx(-0.9239, abs=1e-4)  # as printed


@pytest.mark.parametrize("q, right, printed", [
    ([0.5, 0.5], -0.5878, 0.5108), ([1.0, 0.0], 0.1054, 0.1054)])
def test_y_term_of_eq_1_is_no_kl(q, right, printed):
    """y a fair coin, u = y, p(y|u) = 0.9 if y = u: ln 0.5 - ln 0.9 = -0.588.

    As printed ln 0.5 - (ln 0.9 + ln 0.1) / 2 = 0.511. With y = 0 for sure both are -ln 0.9 = 0.105.
    """
    q = Categorical(torch.tensor(q))
    p = Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))  # a row for each u
    y = torch.tensor([0, 1])
    term = q.probs * (q.log_prob(y) - p.log_prob(y))  # row u at y = u
    assert term.sum().item() == approx(right, abs=1e-4)
    assert (q.probs * kl_divergence(q, p)).sum().item() == approx(printed, abs=1e-4)


def test_kl_z_needs_its_expectation_over_u():
    """q(z) = N(0, 1), p(z|u) = N(u, 1), u ~ N(0, 1): E[KL] = E[u²]/2 = 0.5.

    To p(z) = N(0, 2) it is (ln 2 - 0.5)/2 = 0.097.
    """
    q = Normal(0.0, 1.0)
    share = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    u = q.icdf(share)  # evenly in probability
    assert kl_divergence(q, Normal(u, 1.0)).mean().item() == approx(0.5, abs=1e-3)
    assert kl_divergence(q, Normal(0.0, math.sqrt(2))).item() == approx(0.0966, abs=1e-4)


def test_log_q_of_a_point_mass():
    """E[log q]: 0 on a discrete set; for a density 1e-6 wide -ln 1e-6 = 13.8.

    For one 1e-12 wide it is -ln 1e-12 = 27.6.
    """
    assert Categorical(torch.tensor([0.0, 1.0, 0.0])).entropy().item() == approx(0.0, abs=1e-6)
    for width, expected in ((1e-6, 13.8155), (1e-12, 27.6310)):
        width = torch.tensor(width, dtype=torch.float64)
        assert -Uniform(0 * width, width).entropy().item() == approx(expected, abs=1e-4)


@pytest.mark.parametrize("q, wanted", [([0.5, 0.5], 0.0), ([0.0, 1.0], -math.log(2))])
def test_hidden_bound_needs_a_deterministic_y(q, wanted):
    """A fair coin y, whatever u: B = E[log p(y|u) - log q(y|x)] = 0 exceeds log p(y) = -ln 2.

    With y = d(x) it is -ln 2, and so log p(y).
    """
    p = Categorical(torch.tensor([0.5, 0.5]))
    q = Categorical(torch.tensor(q))
    bound = (q.probs * p.logits).sum().item() + q.entropy().item()
    assert bound == approx(wanted, abs=1e-6)
    assert p.log_prob(torch.tensor(1)).item() == approx(-math.log(2))


# ---- Numbers -------------------------------------------------------------------------------------

PUBLISHED = [  # RE, KL, side, published bpd, the plain bound
    (5540, 1966, 32, 3.51, 3.525),  # CIFAR-10: VAE, in Table 2 the one with RealNVP
    (6348, 1438, 32, 3.65, 3.657),  # selfVAE-downscale
    (24096, 2502, 64, 3.12, 3.123),  # CelebA: VAE
    (23797, 3816, 64, 3.24, 3.242),  # selfVAE-sketch
    (23336, 1214, 64, 2.88, 2.882),  # selfVAE-downscale-3lvl
    (30809, 1961, 64, 3.85, 3.847),  # Imagenette64: VAE
    (30394, 1171, 64, 3.70, 3.706),  # selfVAE-downscale-3lvl
    (6675, 1596, 32, 3.88, 3.884),  # Table 2: standard normal
    (6512, 1653, 32, 3.83, 3.834),  # Table 2: mixture
]


@pytest.mark.parametrize("re_x, kl, side, published, plain", PUBLISHED)
def test_published_bpd_is_the_plain_bound(re_x, kl, side, published, plain):
    """(RE + KL) / (3 side² ln 2), RE being -log p: three decimals by hand.

    And within 0.02 of what is said to be IW-512.
    """
    bpd = bits_per_dim(re_x + kl, 3 * side**2)
    assert bpd == approx(plain, abs=6e-4)
    assert abs(bpd - published) < 0.02


def test_bpd_divides_by_the_size_of_x():
    """selfVAE on CIFAR-10, 7,786 nats: 3.66 bits for each of 3,072 values, as published.

    It were 2.93 if the 768 of y counted too.
    """
    assert bits_per_dim(6348 + 1438, 3072) == approx(3.657, abs=6e-4)
    assert bits_per_dim(6348 + 1438, 3072 + 768) == approx(2.925, abs=6e-4)


@pytest.mark.parametrize("side, bpd", [(32, 12.491), (64, 3.123), (128, 0.781)])
def test_celeba_is_64_by_64(side, bpd):
    """26,598 nats for the VAE, published as 3.12: at 64x64 and at no other power of two."""
    assert bits_per_dim(24096 + 2502, 3 * side**2) == approx(bpd, abs=6e-4)
    assert (abs(bpd - 3.12) < 0.02) == (side == 64)


@pytest.mark.parametrize("components, parameters, millions",
                         [(10, 20_480, 0), (1000, 2_048_000, 2)])
def test_two_million_more_parameters_are_1000_components(components, parameters, millions):
    """A mean and a variance of 1,024 values each; Table 2 rises from 20M to 22M."""
    count = sum(p.numel() for p in MoGPrior(components).parameters())
    assert count == parameters
    assert round(count / 1e6) == millions


def test_16_percent_counts_values():
    """u and z, 16·8·8 values each, of 3·64·64: 16.7 %. As 32-bit floats and 8-bit pixels 66.7 %."""
    share = 2 * math.prod(LATENT) / (3 * 64 * 64)
    assert share == approx(0.1667, abs=1e-4)
    assert share * 32 / 8 == approx(0.6667, abs=1e-4)


# ---- The released code ---------------------------------------------------------------------------

def released_nll(log_w, batch_size):
    """As released: log-mean-exp over S of +(batch mean of -log w), then the mean over batches.

    log_w is (S, images).
    """
    batch_means = -log_w.unflatten(1, (-1, batch_size)).mean(2)
    return log_mean_exp(batch_means).mean().item()


def test_released_importance_weighting_is_looser_than_the_elbo():
    """log w ~ N(-0.5, 1), so E[w] = 1, -log p(x) = 0: right 0, -ELBO 0.5.

    Released 0.5 + 0.5/32 = 0.516, with one image a batch 1.0.
    """
    generator = torch.Generator().manual_seed(0)
    log_w = -0.5 + torch.randn(512, 6400, generator=generator, dtype=torch.float64)
    plain = -log_w.mean().item()
    of_32 = released_nll(log_w, 32)
    assert -log_mean_exp(log_w).mean().item() == approx(0.0, abs=0.01)
    assert plain == approx(0.5, abs=0.005)
    assert of_32 == approx(0.5156, abs=0.005) and of_32 > plain
    assert released_nll(log_w, 1) == approx(1.0, abs=0.01)


# ---- DC-VAE --------------------------------------------------------------------------------------

def test_contrast_without_temperature_has_a_floor():
    """The best that cosines allow: 1 with the right key, -1 with all 8,096 others.

    That costs 7.0 nats; at 0.07 next to nothing; a guess 9.0.
    """
    key = torch.tensor([[1.0, 0.0]])
    opposite = -key.expand(8096, 2)
    best = info_nce(key, key, opposite, 1.0)[0].item()
    assert best == approx(math.log(1 + 8096 * math.exp(-2)), rel=1e-5)
    assert best == approx(7.0, abs=0.01)
    assert info_nce(key, key, opposite, 0.07)[0].item() < 1e-8
    assert info_nce(key, key, -opposite, 1.0)[0].item() == approx(9.0, abs=0.01)


def test_limited_codes():
    """z ~ N(0, 1) limited to [-1, 1]: P(|z| > 1) = 31.7 %, sd 0.718.

    The variance is that of the middle plus 1 for the ends.
    """
    normal = Normal(0.0, 1.0)
    ends = 2 * normal.cdf(torch.tensor(-1.0)).item()
    density = normal.log_prob(torch.tensor(1.0)).exp().item()
    middle = (1 - ends) - 2 * density  # ∫ z² φ(z) over [-1, 1], by parts
    assert ends == approx(0.317, abs=5e-4)
    assert math.sqrt(middle + ends) == approx(0.718, abs=5e-4)


# ---- The page ------------------------------------------------------------------------------------

def test_every_entry_says_how_to_see_it():
    """A numbered entry ends with **See**, a row of a table in a filled last cell.

    (That the tests named exist: test_docs.py.)
    """
    page = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
    entries = 0
    for section in page.split("\n## ")[1:]:
        for entry in re.split(r"\n\d+\. ", section)[1:]:
            text = entry.split("\n### ")[0].rstrip()
            assert re.search(r"\*\*See\*\* \S[^\n]{5,}$", text), entry[:60]
            entries += 1
        for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
            rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
            for row in rows[2:]:
                assert len(row) == len(rows[0]) and len(row[-1]) > 5, row
    assert entries > 35
