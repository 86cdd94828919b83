"""Improved consistency training, iCT (Song & Dhariwal 2023, arXiv:2310.14189, section 3).

It differs from CT in five ways:

- The target is the network itself instead of an average.
- The distance is pseudo-Huber.
- The weight is 1 / (t - u).
- Levels have a discretised log-normal distribution.
- N(k) doubles at even intervals.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.core.distances import ict_huber_c, pseudo_huber
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import draw_levels, lognormal_bins
from cm_diffusers.core.schedules import ict_scales
from cm_diffusers.core.weightings import inverse_gap
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import consistency_pipeline, estimate_and_target
from cm_diffusers.objectives.options import Options, check_order, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


@dataclass(frozen=True)
class ICTOptions(Options):
    s0: int = option(10, "Levels in the Karras grid at the start of training, less one.", "[1, 1e6]")
    s1: int = option(1280, "Levels in the Karras grid at the end of training, less one; not below s0.", "[1, 1e6]")
    p_mean: float = option(-1.1, "Mean of ln(sigma) in training.", "[-20, 20]")
    p_std: float = option(2.0, "Standard deviation of ln(sigma) in training.", "[1e-3, 10]")
    huber_c: float | None = option(
        None,
        "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c. The default is 0.00054 sqrt(d) for"
        " samples of d numbers.",
        "[0, 1e6]",
        told_by_data=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self, "s0", "s1")

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        options = super().resolved(total_steps, pretrained, dimensions)
        if self.huber_c is None and dimensions is not None:
            options = replace(options, huber_c=ict_huber_c(dimensions))
        return options


class ICT(Objective):
    """E[ d(D(x0 + sigma_{i+1} z, sigma_{i+1}), sg D(x0 + sigma_i z, sigma_i)) / (sigma_{i+1} - sigma_i) ].

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import ICT, Batch, ModelSpec
        >>> unet = build_unet("tiny", (8, 8), channels=1)
        >>> method = ICT(unet, ModelSpec(sigma_data=0.5), ICT.Options(s1=320), total_steps=1000)
        >>> loss = method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4)))
        >>> loss.total.backward()
        >>> pipe, levels = method.pipeline(unet), method.describe(step=999)["scales"]
    """

    name = "ict"
    Options = ICTOptions
    native_predictions = PROCESS_STUDENTS
    compares_neighbours = True
    sigma_min = floor = 0.002
    summary = Summary(
        what="improved consistency training, 1 or more calls",
        target="itself, no gradient",
        times="discretised ln sigma ~ N(-1.1, 2^2) on N(k) levels",
        distance="pseudo-Huber, c = 0.00054 sqrt(d)",
        weight="1 / (t - u)",
        paper="[Song & Dhariwal 2023](https://arxiv.org/abs/2310.14189), sec. 3",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.law = partial(lognormal_bins, mean=self.options.p_mean, std=self.options.p_std)  # eq. 9

    def scales(self, step: int) -> int:
        """Number of levels in the grid at `step`."""
        return ict_scales(step, self.total_steps, self.options.s0, self.options.s1)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0 = batch.samples
        n, high, uniform = self.scales(draws.step), self.spec.sigma_max, draws.uniform("sigma")
        u, t = draw_levels(self.law, n, self.sigma_min, high, uniform)
        u, t, gap = u.to(x0), t.to(x0), (t - u).to(x0)
        noise = draws.normal("noise", x0.shape[1:])
        x_t, x_u = VE().add_noise(x0, noise, t), VE().add_noise(x0, noise, u)
        estimate, target = estimate_and_target(
            student=self.denoiser(),
            x_t=x_t,
            t=t,
            target=self.denoiser(),
            x_u=x_u,
            u=u,
            condition=batch.condition,
            draws=draws,
        )
        c = self.options.huber_c
        c = ict_huber_c(math.prod(x0.shape[1:])) if c is None else c
        return Loss.mean(inverse_gap(gap) * pseudo_huber(estimate, target, c), t)  # eq. 7

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return consistency_pipeline(network, self.spec, self.sigma_min, self.options.s1 + 1)

    def describe(self, step: int) -> dict[str, float]:
        return {"scales": self.scales(step)}
