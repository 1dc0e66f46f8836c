"""When does z sleep? A selfVAE so small that the answer has a closed form (exercise 15).

y is given, and x - y is what it leaves: n ≥ 3 values of variance 1, any two of covariance ρ < 1.

    p(z) = N(0, 1)        p(x|y, z) = N(y + w z, C)        q(z|x, y) = N(a·(x - y), v)

z is a single number; w and a are vectors (n,), C is a covariance (n, n). z sleeps if q(z|x, y) is
p(z): its KL is 0, and it says nothing about x. Whether the best bound has such a z depends on what
the decoder can do:

    fixed       C = s² I, with s given
    diagonal    C = diag(s_1², …, s_n²), learned
    full        C is any covariance, learned: the values know each other without z

    python docs/sleep.py        trains all three for some ρ, and prints their KLs beside the closed
                                form, and the gain: how much the bound loses without z
"""

import math

import torch

N = 4
S = 1.2  # sd of the fixed decoder; the data's is 1
RHOS = (0.0, 0.1, 0.2, 0.4, 0.8)
DECODERS = ("fixed", "diagonal", "full")


def covariance(rho, n=N):
    """Σ of x - y, (n, n): 1 on the diagonal, ρ elsewhere."""
    return (1 - rho) * torch.eye(n, dtype=torch.float64) + rho


def terms(sigma, w, C, a, v):
    """The two costs of the bound, averaged over x - y ~ N(0, Σ), in nats: Eq. (2) without y and u.

        re    E[-log p(x|y, z)], z ~ q(z|x, y)
        kl    E[KL(q(z|x, y) ‖ p(z))]

    Shapes: sigma and C (n, n), w and a (n,), v a scalar -> two scalars, without sampling.
    """
    # With z = a·(x - y) + √v ε both need only E[z²], E[(x - y) z] and Σ.
    z_squared = a @ sigma @ a + v
    x_times_z = sigma @ a
    cross = torch.outer(w, x_times_z)
    error = sigma - cross - cross.T + z_squared * torch.outer(w, w)  # of x - y - w z
    re = (torch.logdet(2 * math.pi * C) + torch.trace(torch.linalg.solve(C, error))) / 2
    kl = (z_squared - 1 - torch.log(v)) / 2
    return re, kl


def kl_of_the_best(rho, decoder, n=N, s=S):
    """The KL of the best z in closed form, in nats, for the "fixed" and "diagonal" decoder."""
    # Σ has one large variance, λ = 1 + (n - 1)ρ, along (1, …, 1); across it all are 1 - ρ. The best
    # w lies along it, and the decoder's own variance there is s² or, once it has learned, 1 - ρ.
    # z sleeps unless λ is larger than that.
    variance = s**2 if decoder == "fixed" else 1 - rho
    return max(0.0, math.log((1 + (n - 1) * rho) / variance) / 2)


def train(rho, decoder, awake=True, n=N, s=S):
    """The best bound by L-BFGS, from a z that is nearly asleep -> its re and kl, floats.

    Without `awake` z stays asleep: w = a = 0.
    """
    sigma = covariance(rho, n)
    generator = torch.Generator().manual_seed(0)
    w = 0.1 * torch.rand(n, dtype=torch.float64, generator=generator)
    a = 0.1 * torch.rand(n, dtype=torch.float64, generator=generator)
    log_v = torch.zeros((), dtype=torch.float64)
    root = torch.eye(n, dtype=torch.float64)  # of C: C = L Lᵀ with L lower triangular
    learned = [log_v.requires_grad_()]
    if awake:
        learned += [w.requires_grad_(), a.requires_grad_()]
    else:
        w.zero_()
        a.zero_()
    if decoder == "fixed":
        root *= s
    else:
        learned.append(root.requires_grad_())

    def costs():
        L = root.tril() if decoder == "full" else torch.diag(root.diagonal())
        return terms(sigma, w, L @ L.T, a, log_v.exp())

    def step():
        optimizer.zero_grad()
        loss = sum(costs())
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(learned, max_iter=500, tolerance_grad=1e-9,
                                  tolerance_change=1e-13, line_search_fn="strong_wolfe")
    optimizer.step(step)
    re, kl = costs()
    return re.item(), kl.item()


def main():
    """Print a row for each ρ, and for each decoder its KL, closed form and gain, in nats."""
    print(f"n = {N} values; the fixed decoder has s = {S}")
    print("       " + "".join(f"{decoder:^26}" for decoder in DECODERS))
    print("  rho  " + "      kl    closed    gain" * len(DECODERS))
    for rho in RHOS:
        row = f"{rho:5.2f}  "
        for decoder in DECODERS:
            re, kl = train(rho, decoder)
            gain = max(0.0, sum(train(rho, decoder, awake=False)) - re - kl)  # rounding apart
            closed = "any" if decoder == "full" else f"{kl_of_the_best(rho, decoder):.3f}"
            row += f"{kl:8.3f}{closed:>10}{gain:8.3f}"
        print(row)


if __name__ == "__main__":
    main()
