"""What would it take for z to be used? selfvae.py, trained with one change. Not collected by pytest.

    python tests/wake.py warm-up FLAGS      kl_z_k is weighted by min(1, step / 1500)
    python tests/wake.py free-bits FLAGS    kl_z_k costs 150 nats if it is less, on average over
                                            the batch, so as many are free
    python tests/wake.py without-y FLAGS    the network of p(y_{k+1}|y_k, z_k) does not see y_k,
                                            which is the mixtures' shift as before

With --levels 0, a VAE, kl_u takes the place of kl_z_k. FLAGS are those of selfvae.py, without
--resume. The first two change training only: what is validated and evaluated is the bound, and
`selfvae.py --eval` evaluates their runs.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import selfvae  # noqa: E402 (needs the path above)

WARM_UP_STEPS = 1500
FREE_NATS = 150  # an image and level; 0.07 bits per dimension of CIFAR-10


def kl_terms(model):
    """Names of the KLs that may fall to 0: those of every z_k, of u where there is no other."""
    return [f"kl_{name}" for name in model.latents[1:] or ["u"]]


class WarmUp(selfvae.SelfVAE):
    """The KL costs nothing at first (Bowman et al. 2016, section 3.1)."""

    steps = 0

    def forward(self, x):
        """The terms that are minimised, each (B,) in nats; one call is one step."""
        self.steps += 1
        terms = self.terms(x)
        for name in kl_terms(self):
            terms[name] = min(1, self.steps / WARM_UP_STEPS) * terms[name]
        return terms


class FreeBits(selfvae.SelfVAE):
    """A KL under FREE_NATS has no gradient (Kingma et al. 2016, appendix C.8)."""

    def forward(self, x):
        """The terms that are minimised, each (B,) in nats."""
        terms = self.terms(x)
        for name in kl_terms(self):
            terms[name] = terms[name].mean().clamp(min=FREE_NATS).expand(len(x))
        return terms


class WithoutY(selfvae.SelfVAE):
    """What p(y_{k+1}|y_k, z_k) says beyond an enlarged y_k has to come from z_k."""

    def __init__(self, cfg, image_shape):
        super().__init__(cfg, image_shape)
        for k in range(1, self.K + 1):
            channels = self.shapes[k][0]
            self.p_x[k - 1].joint.register_forward_pre_hook(hide_last(channels))


def hide_last(channels):
    """A hook that puts zeros in place of the last channels of a network's input, those of y."""
    def hook(module, inputs):
        features, y = inputs[0].split([inputs[0].shape[1] - channels, channels], 1)
        return torch.cat([features, torch.zeros_like(y)], 1)
    return hook


CHANGES = {"warm-up": WarmUp, "free-bits": FreeBits, "without-y": WithoutY}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHANGES:
        sys.exit(__doc__)
    sys.exit(selfvae.main(CHANGES[sys.argv[1]], sys.argv[2:]))
