"""Consistency training, CT (Song et al. 2023, arXiv:2303.01469, algorithm 3).

The network at sigma_{n+1} is trained towards a moving average of itself at sigma_n. These levels are neighbours on a
Karras grid, whose number of levels N(k) grows in training. Both points lie on the straight line x0 + sigma noise.
Unlike iCT it has the average as target and draws levels uniformly; unlike CD it has no teacher.
"""

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import draw_levels, uniform_bins
from cm_diffusers.core.schedules import ct_scales, ct_target_decay
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import (
    CM_WEIGHTS,
    check_distance,
    cm_weight,
    consistency_pipeline,
    distance,
    distance_option,
    estimate_and_target,
    move_towards,
    moving_target,
)
from cm_diffusers.objectives.options import Options, check_order, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


@dataclass(frozen=True)
class CTOptions(Options):
    s0: int = option(2, "Levels in the Karras grid at the start of training.", "[2, 1e6]")
    s1: int = option(150, "Levels in the Karras grid at the end of training, less one; not below s0.", "[2, 1e6]")
    mu0: float = option(
        0.95,
        "EMA decay of the target network when the grid has s0 + 1 levels; it rises towards 1 as the grid grows.",
        "[1e-6, 1]",
    )
    distance: str = distance_option("l2")
    huber_c: float = option(
        0.0, "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c; 0 gives the plain norm.", "[0, 1e6]"
    )
    weighting: str = option(
        "uniform",
        "Weight of a sample: 1 (uniform), 1 / sigma^2 (snr), or 1 / sigma^2 + 1 / sigma_data^2 (karras).",
        choices=CM_WEIGHTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self, "s0", "s1")
        check_distance(self.distance)


class CT(Objective):
    """E[ lambda(sigma_n) d(D(x0 + sigma_{n+1} z, sigma_{n+1}), D-(x0 + sigma_n z, sigma_n)) ], n uniform.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import CT, Batch, ModelSpec
        >>> unet = build_unet("tiny", (8, 8), channels=1)
        >>> method = CT(unet, ModelSpec(sigma_data=0.5), CT.Options(s1=20), total_steps=1000)
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> method.after_step(0)  # after the step of an optimiser: moves the target network
        >>> pipe = method.pipeline(unet)
    """

    name = "ct"
    Options = CTOptions
    native_predictions = PROCESS_STUDENTS
    has_target = compares_neighbours = True
    sigma_min = floor = 0.002
    summary = Summary(
        what="consistency training, 1 or more calls",
        target="average of itself, decay mu(k)",
        times="uniform on a Karras grid of N(k) levels",
        distance="L2 (or pseudo-Huber)",
        weight="1",
        paper="[Song et al. 2023](https://arxiv.org/abs/2303.01469), alg. 3",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.target = moving_target(self.network)
        self.auxiliary = {"target": self.target}

    def scales(self, step: int) -> int:
        """Number of levels in the grid at `step`."""
        return ct_scales(step, self.total_steps, self.options.s0, self.options.s1)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, options = batch.samples, self.options
        n, high, uniform = self.scales(draws.step), self.spec.sigma_max, draws.uniform("sigma")
        u, t = (level.to(x0) for level in draw_levels(uniform_bins, n, self.sigma_min, high, uniform))
        noise = draws.normal("noise", x0.shape[1:])
        x_t, x_u = VE().add_noise(x0, noise, t), VE().add_noise(x0, noise, u)
        estimate, target = estimate_and_target(
            student=self.denoiser(),
            x_t=x_t,
            t=t,
            target=self.denoiser(self.target),
            x_u=x_u,
            u=u,
            condition=batch.condition,
            draws=draws,
        )
        error = distance(options.distance, estimate, target, options.huber_c)
        return Loss.mean(cm_weight(options.weighting, u, self.spec.sigma_data) * error, t)  # eq. 10

    def after_step(self, step: int) -> None:
        mu = ct_target_decay(self.scales(step), self.options.s0, self.options.mu0)
        move_towards(self.target, self.network, mu)  # eq. 8

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return consistency_pipeline(network, self.spec, self.sigma_min, self.options.s1 + 1)

    def describe(self, step: int) -> dict[str, float]:
        return {"scales": self.scales(step)}
