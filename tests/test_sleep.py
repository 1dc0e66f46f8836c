"""docs/sleep.py against torch.distributions, and what is trained there against the closed form."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import sleep


def random_model(seed):
    """-> Σ, w, C of four values, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, dtype=torch.float64, generator=generator)
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    return sleep.covariance(0.3), w, root @ root.T + 0.1 * torch.eye(4)


def test_terms_are_averages_over_x_and_z():
    """By quadrature: both are polynomials of degree 2, so ten points average them exactly.

    The points are ±√5 along each axis of (L⁻¹(x - y), ε), where Σ = L Lᵀ.
    """
    sigma, w, C = random_model(0)
    a = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    v = torch.tensor(0.5, dtype=torch.float64)
    L = torch.linalg.cholesky(sigma)
    points = torch.eye(5, dtype=torch.float64) * math.sqrt(5)
    points = torch.cat([points, -points])
    x = points[:, :4] @ L.T
    z = x @ a + v.sqrt() * points[:, 4]
    log_p = MultivariateNormal(z[:, None] * w, C).log_prob(x)
    q = Normal(x @ a, v.sqrt())
    re, kl = sleep.terms(sigma, w, C, a, v)
    torch.testing.assert_close(re, -log_p.mean())
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).mean())


def test_with_the_exact_posterior_the_bound_is_log_p():
    """By another q it is lower."""
    sigma, w, C = random_model(1)
    v = 1 / (1 + w @ torch.linalg.solve(C, w))
    a = v * torch.linalg.solve(C, w)
    marginal = torch.outer(w, w) + C
    cross_entropy = (torch.logdet(2 * math.pi * marginal)
                     + torch.trace(torch.linalg.solve(marginal, sigma))) / 2
    torch.testing.assert_close(sum(sleep.terms(sigma, w, C, a, v)), cross_entropy)
    assert sum(sleep.terms(sigma, w, C, 1.1 * a, v)) > cross_entropy
    assert sum(sleep.terms(sigma, w, C, a, 1.1 * v)) > cross_entropy


@pytest.mark.parametrize("decoder", ["fixed", "diagonal"])
@pytest.mark.parametrize("n, s, threshold", [(4, 1.2, 0.147), (3, 1.1, 0.105)])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.4])
def test_a_trained_z_is_as_awake_as_the_closed_form_says(rho, n, s, threshold, decoder):
    """The fixed decoder's threshold is (s² - 1) / (n - 1): 0.1 is below it, and 0.4 above it."""
    _, kl = sleep.train(rho, decoder, n=n, s=s)
    closed = sleep.kl_of_the_best(rho, decoder, n, s)
    assert kl == pytest.approx(closed, abs=2e-3)
    assert (closed > 0) == (rho > (threshold if decoder == "fixed" else 0))


def test_a_full_decoder_gains_nothing_from_z():
    """Its bound with z asleep is -E[log p(x|y)], the entropy of x - y, and that is the best."""
    entropy = MultivariateNormal(torch.zeros(4, dtype=torch.float64),
                                 sleep.covariance(0.4)).entropy().item()
    for awake in (False, True):
        assert sum(sleep.train(0.4, "full", awake)) == pytest.approx(entropy, abs=1e-6)
    assert sum(sleep.train(0.4, "diagonal", awake=False)) > entropy + 0.3
