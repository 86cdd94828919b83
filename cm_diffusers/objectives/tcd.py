"""Trajectory consistency distillation, TCD (Zheng et al. 2024, arXiv:2402.19159, section 4).

LCM compares two jumps to the data; TCD compares two jumps to a level s, drawn among all levels up to u. The network
still has one time. A jump is the DDIM step along its prediction, an exponential integrator of first order (TCF(1) in
the paper). It is exact for every s only if the trajectory is straight.

Diffusers' `TCDScheduler` samples by such jumps: below the next level, by a share gamma (its `eta`) of the time, and
back to it by new noise (algorithm 4). With gamma 1 this is multistep consistency sampling.
"""

from dataclasses import dataclass

from torch import Tensor

from cm_diffusers.core.arrays import append_dims, on_device
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.objectives.base import Summary
from cm_diffusers.objectives.lcm import LCM, LCMOptions
from cm_diffusers.objectives.options import option


@dataclass(frozen=True)
class TCDOptions(LCMOptions):
    distance: str = option(
        "pseudo_huber", "Distance between the ends of the two jumps.", choices=["pseudo_huber", "l2"]
    )


class TCD(LCM):
    """E[ d(f(x_t, t, s), f-(DDIM step of the teacher from x_t to u, u, s)) ], t and u neighbours, s uniform up to u.

    f(x_t, t, s) = alpha_s D(x_t, t) + std_s eps(x_t, t), with eps = (x_t - D) / t, in the scale of the network's
    process. At s = u the target is the end of the teacher's step.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import TCD, Batch, ModelSpec
        >>> spec = ModelSpec(0.5, "timestep", prediction="epsilon", noise_schedule={"beta_schedule": "linear"})
        >>> unet, trained = (build_unet("tiny", (8, 8), channels=1) for _ in range(2))
        >>> method = TCD(unet, spec, TCD.Options(), total_steps=1000, teacher=spec.denoiser(trained))
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> method.after_step(0)  # after the step of an optimiser: moves the target network

    Raises:
        ValueError: there is no teacher, or `w_max` is set and the teacher is not a `Guided` one.
    """

    name = "tcd"
    Options = TCDOptions
    summary = Summary(
        what="trajectory consistency distillation, 1 or more calls",
        target="average of itself, decay mu",
        times="t uniform on 50 times of the teacher, s up to u",
        distance="pseudo-Huber, c = 0.001",
        weight="1",
        paper="[Zheng et al. 2024](https://arxiv.org/abs/2402.19159), sec. 4",
    )

    def jump(self, x: Tensor, denoised: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        """f(x, sigma, s) (B, ...), the end at `s` of a jump from `sigma`, in the scale of the network's process.

        Args:
            x: the points x0 + sigma noise (B, ...).
            denoised: D(x, sigma).
            sigma: their noise levels (B,).
            s: the levels to jump to (B,), at most `sigma`. At `sigma` itself, the end is `x` in that scale.
        """
        alpha = append_dims(self.spec.process.alpha(s), x)
        return alpha * VE().jump(x, denoised, sigma, s)

    def ends(
        self, n: Tensor, draws: Draws, *, x_t: Tensor, estimate: Tensor, x_u: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        m = (draws.uniform("target").to(n.device) * (n + 1)).long()
        sigmas = on_device(self.sigmas, n.device)
        t, u, s = (sigmas[i].to(x_t) for i in (n + 1, n, m))
        return self.jump(x_t, estimate, t, s), self.jump(x_u, target, u, s)
