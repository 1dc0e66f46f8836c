"""What would wake z? selfvae.py, trained with one change.

    python docs/lab/waking_z.py …

    warm-up FLAGS      kl_z_k is weighted by min(1, step / 1500)
    free-bits FLAGS    kl_z_k, averaged over the batch, costs at least 150
                       nats; where it is less it has no gradient
    without-y FLAGS    the network of p(y_{k+1}|y_k, z_k) does not see y_k,
                       which is the mixtures' shift as before

With --levels 0, a VAE, kl_u takes the place of kl_z_k, and there is no y to hide. FLAGS are those
of selfvae.py, with a --name, without --resume, on a GPU with --no-compile. The training lines of
the log hold what is minimised; validated and evaluated is the bound. `selfvae.py --eval` evaluates
the runs of the first two, `waking_z.py without-y --eval` those of the third.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import selfvae  # noqa: E402 (needs the path above)
from common import UserError  # noqa: E402

WARM_UP_STEPS = 1500
FREE_NATS = 150  # an image and level; 0.07 bits per dimension of CIFAR-10


def kl_terms(model):
    """Names of the KLs that may fall to 0: those of every z_k, of u where there is no other."""
    return [f"kl_{name}" for name in model.latents[1:] or ["u"]]


class WarmUp(selfvae.SelfVAE):
    """The KL costs next to nothing at first, then linearly more (Bowman et al. 2016, 3.1)."""

    steps = 0

    def forward(self, x):
        """The terms that are minimised, each (B,) in nats; one call is one step."""
        self.steps += 1
        terms = self.terms(x)
        for name in kl_terms(self):
            terms[name] = min(1, self.steps / WARM_UP_STEPS) * terms[name]
        return terms


class FreeBits(selfvae.SelfVAE):
    """A KL below FREE_NATS has no gradient (Kingma et al. 2016, free bits).

    Theirs are free for each group of latents; here all 1,024 values of a level are one group.
    """

    def forward(self, x):
        """The terms that are minimised, each (B,) in nats."""
        terms = self.terms(x)
        for name in kl_terms(self):
            terms[name] = terms[name].mean().clamp(min=FREE_NATS).expand(len(x))
        return terms


class WithoutY(selfvae.SelfVAE):
    """What p(y_{k+1}|y_k, z_k) says beyond its shift, the enlarged y_k, has to come from z_k.

    Not all of that need be sent: p(z_k|y_k, z_{k-1}) still sees y_k.
    """

    def __init__(self, cfg, image_shape):
        super().__init__(cfg, image_shape)
        if self.K == 0 or cfg.exact:
            raise UserError("without-y takes --levels 1 or more and no --exact")
        for k, _, _, p_x in self.per_level:
            p_x.joint.register_forward_pre_hook(hide_last(self.shapes[k][0]))


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
    if "--resume" in sys.argv:
        sys.exit("waking_z.py: error: its runs cannot be resumed: a warm-up would begin anew")
    sys.exit(selfvae.main(CHANGES[sys.argv[1]], sys.argv[2:]))
