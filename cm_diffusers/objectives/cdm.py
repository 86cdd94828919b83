"""Consistent diffusion models, CDM (Daras et al. 2023, arXiv:2302.09057).

Diffusion training with a second loss on the model's own samples. Along the reverse SDE of an exact denoiser D the
denoised image is a martingale: D at a point is the mean of D at the points that the SDE reaches from there. The
second loss enforces this. Unlike a consistency model the result is still a denoiser, sampled in many steps. Unlike
`diffusion` it also trains on points away from noised data, to which sampling drifts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.arrays import in_float64
from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.karras import karras_sigma
from cm_diffusers.core.solvers import reverse_sde_step
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.diffusion import DiffusionOptions, denoising_error, denoising_pipeline, noised
from cm_diffusers.objectives.options import check_order, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


@dataclass(frozen=True)
class CDMOptions(DiffusionOptions):
    martingale_weight: float = option(10.0, "Weight lambda of the martingale loss.", "[0, 1e6]")
    rollout_steps: int = option(
        5, "Steps in each rollout of the reverse SDE, between the levels of a Karras grid.", "[1, 1024]"
    )
    epsilon_min: float = option(0.0, "Smallest length of a rollout in sigma; lengths are uniform.", "[0, 1e3]")
    epsilon_max: float = option(0.05, "Largest length of a rollout in sigma; lengths are uniform.", "[0, 1e3]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self, "epsilon_min", "epsilon_max")


class CDM(Objective):
    """E[ w(sigma) |D0 - x0|^2 + lambda <D1 - D0, D2 - D0> ], D0 = D(x, sigma), Di = D(xi, sigma').

    x1 and x2 are the ends of two rollouts without gradient from x = x0 + sigma noise; sigma' = sigma - epsilon. The
    rollouts are independent, so the product's mean is |E[D1] - D0|^2, without a contribution of their noise. The mean
    of a single square would have one. All three passes of a row drop the same units.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import CDM, Batch, ModelSpec
        >>> unet = build_unet("tiny", (8, 8), channels=1)
        >>> method = CDM(unet, ModelSpec(sigma_data=0.5), CDM.Options(rollout_steps=2), total_steps=1000)
        >>> loss = method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4)))
        >>> loss.total.backward()
        >>> error, martingale = loss.per_sample, loss.terms["martingale"]  # both (B,)
    """

    name = "cdm"
    Options = CDMOptions
    native_predictions = PROCESS_STUDENTS
    trains_teachers = True
    passes = 2  # the denoiser, and the ends of both rollouts
    sigma_min = 0.002
    floor = 0.0
    terms = ("martingale", "martingale_weight")
    summary = Summary(
        what="denoising that agrees with its own reverse SDE, sampled in ~35 calls",
        target="the data, and itself after two rollouts, with gradient",
        times="ln sigma ~ N(-1.2, 1.2^2)",
        distance="L2, and a product",
        weight="1 / c_out^2, and lambda = 10",
        paper="[Daras et al. 2023](https://arxiv.org/abs/2302.09057)",
    )

    @classmethod
    def prediction(cls, options: CDMOptions) -> str:
        return options.interpolant

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x, sigma = noised(batch.samples, self.options.law, draws)
        with draws.dropout():
            denoised = self.denoiser()(x, sigma, batch.condition)
        error = denoising_error(denoised, batch.samples, sigma, self.spec)
        ends = self.rollouts(x, sigma, denoised=denoised.detach(), condition=batch.condition, draws=draws)
        first, second = ends.chunk(2)
        martingale = ((first - denoised) * (second - denoised)).flatten(1).sum(1)
        weight = error.new_full((), self.options.martingale_weight)
        terms = {"martingale": martingale.detach(), "martingale_weight": weight}
        return Loss((error + weight * martingale).mean(), error.detach(), sigma, terms)

    def rollouts(self, x: Tensor, sigma: Tensor, *, denoised: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """D at the ends of two rollouts from each `x`, with gradient: (2 B, ...), first those of all first rollouts.

        Args:
            x: the noisy samples (B, ...).
            sigma: their noise levels (B,).
            denoised: D(x, sigma) (B, ...), without gradient.
            condition: B rows.
            draws: the random numbers of the step.
        """
        options = self.options
        length = options.epsilon_min + (options.epsilon_max - options.epsilon_min) * draws.uniform("epsilon")
        end = torch.minimum(sigma, (sigma - length).clamp(min=self.sigma_min))  # a level below sigma_min stays
        low, high = in_float64(end), in_float64(sigma)  # neighbours differ by little
        ramp = torch.linspace(0, 1, options.rollout_steps + 1, dtype=torch.float64, device=low.device)[:, None]
        levels = karras_sigma(ramp, low, high).repeat(1, 2)

        x, denoised = _twice(x), _twice(denoised)
        for i, (now, then) in enumerate(zip(levels, levels[1:])):
            if i > 0:
                with torch.no_grad():
                    denoised = self._denoise_both(x, now.to(x), condition, draws)
            noise = draws.normal(f"rollout {i}", (2, *x.shape[1:])).transpose(0, 1).flatten(0, 1)
            x = reverse_sde_step(denoised, x, now, then, noise)
        return self._denoise_both(x, _twice(end), condition, draws)

    def _denoise_both(self, x: Tensor, sigma: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """D of both rollouts (2 B, ...): in one pass, or in two if a network only then drops the same units."""
        settings: Any = self.network.config
        if settings.get("dropout") and not hasattr(self.network, "key_dropout"):
            conditions = [condition, condition]
        else:
            conditions = [condition.joined(condition)]
        outputs = []
        for part, x_part, sigma_part in zip(conditions, x.chunk(len(conditions)), sigma.chunk(len(conditions))):
            with draws.dropout():
                outputs.append(self.denoiser()(x_part, sigma_part, part))
        return torch.cat(outputs)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return denoising_pipeline(network, self.spec, self.sigma_min)


def _twice(values: Tensor) -> Tensor:
    return torch.cat([values, values])
