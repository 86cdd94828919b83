"""Easy consistency tuning, ECT / eCM (Geng et al. 2024, arXiv:2406.14548, algorithm 1).

The network at t is trained towards its own output, without gradient, at a nearby r < t on the same straight line
x0 + sigma noise. Training starts with r = 0 for all t. The target is then the data, as in diffusion pretraining
(`pretrain_steps`). Afterwards the gap t - r shrinks by the factor q at each stage. Unlike CT and iCT the method has
continuous noise levels instead of a grid, and no floor: D(x, 0) = x.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.core.schedules import ect_gap, ect_stage
from cm_diffusers.core.weightings import edm_weight, inverse_gap
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import (
    check_distance,
    consistency_pipeline,
    distance,
    distance_option,
    estimate_and_target,
    middle_rho,
)
from cm_diffusers.objectives.options import PRETRAINING, SOME_STEPS, STEPS, Length, Options, option, steps_of
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


DEFAULT_STAGES = 8  # as in the paper's CIFAR-10 run


@dataclass(frozen=True)
class ECTOptions(Options):
    pretrain_steps: Length | None = option(
        None,
        "Steps of diffusion pretraining (r = 0); a number below 1 is a share of the run. The default is half of the"
        " run, or 0 if training starts from a pretrained model.",
        STEPS,
        phases=PRETRAINING,
    )
    stage_steps: Length | None = option(
        None,
        "Steps in each stage; a number below 1 is a share of the run. The default is an eighth of the steps after"
        " pretraining.",
        SOME_STEPS,
    )
    q: float = option(2.0, "Factor by which the gap t - r between noise levels shrinks at each stage.", "(1, 1e6]")
    k: float = option(
        8.0, "Widens the gap t - r at small noise levels t, by the factor n(t) = 1 + k sigmoid(-b t).", "[0, 1e6]"
    )
    b: float = option(
        1.0,
        "Sets how fast the factor n(t) = 1 + k sigmoid(-b t), which widens the gap t - r, falls as the noise level t"
        " grows.",
        "[0, 1e6]",
    )
    p_mean: float = option(-1.1, "Mean of ln(sigma) in training.", "[-20, 20]")
    p_std: float = option(2.0, "Standard deviation of ln(sigma) in training.", "[1e-3, 10]")
    distance: str = distance_option("pseudo_huber")
    huber_c: float = option(
        0.0, "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c; 0 gives the plain norm.", "[0, 1e6]"
    )
    weighting: str = option(
        "inverse_gap",
        "Weight of a sample: 1 / (t - r) for noise levels t and r (inverse_gap), or EDM's 1 / c_out^2 (edm). The"
        " latter is 1 / c_out for distances other than l2, which are not squared.",
        choices=["inverse_gap", "edm"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distance(self.distance)

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        pretrain_steps = self.pretrain_steps
        if pretrain_steps is None:
            pretrain_steps = 0 if pretrained else total_steps // 2
        if self.stage_steps is None:
            tuning_steps = max(1, total_steps - steps_of(pretrain_steps, total_steps))
            stage_steps = math.ceil(tuning_steps / DEFAULT_STAGES)
        else:
            stage_steps = max(1, steps_of(self.stage_steps, total_steps))
        options = replace(self, pretrain_steps=pretrain_steps, stage_steps=stage_steps)
        return super(ECTOptions, options).resolved(total_steps, pretrained, dimensions)


class ECT(Objective):
    """E[ w(t, r) d(D(x_t, t), sg D(x_r, r)) ] with the same noise, and the same dropout masks, in x_t and x_r.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import ECT, Batch, ModelSpec
        >>> unet = build_unet("tiny", (8, 8), channels=1)
        >>> method = ECT(unet, ModelSpec(sigma_data=0.5), ECT.Options(pretrain_steps=0), total_steps=1000)
        >>> loss = method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4)))
        >>> loss.total.backward()
        >>> pipe = method.pipeline(unet)
    """

    name = "ect"
    Options: ClassVar[type] = ECTOptions
    native_predictions = PROCESS_STUDENTS
    compares_neighbours = True
    sigma_min = floor = 0.0
    summary = Summary(
        what="easy consistency tuning, 1 to 4 calls",
        target="itself at r < t, no gradient",
        times="ln sigma ~ N(-1.1, 2^2)",
        distance="pseudo-Huber, c = 0",
        weight="1 / (t - r)",
        paper="[Geng et al. 2024](https://arxiv.org/abs/2406.14548), alg. 1",
    )

    def stage(self, step: int) -> int:
        """The stage at `step`; -1 is pretraining."""
        return ect_stage(step, self.options.pretrain_steps, self.options.stage_steps)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition, stage = batch.samples, batch.condition, self.stage(draws.step)
        t = lognormal(draws.normal("sigma"), self.options.p_mean, self.options.p_std)
        gap = ect_gap(t, stage, self.options.q, self.options.k, self.options.b)
        r = t - gap
        noise = draws.normal("noise", x0.shape[1:])
        x_t = VE().add_noise(x0, noise, t)
        x_r = self.point_at(r, x0=x0, noise=noise, x_t=x_t, t=t, condition=condition)
        if stage < 0:
            with draws.dropout():
                estimate = self.denoiser()(x_t, t, condition)
            target = x_r
        else:
            estimate, target = estimate_and_target(
                student=self.denoiser(),
                x_t=x_t,
                t=t,
                target=self.denoiser(),
                x_u=x_r,
                u=r,
                condition=condition,
                draws=draws,
            )
            target = torch.where(append_dims(r > 0, x0), target, x_r)  # D(x, 0) = x, where the label is not finite
        error = distance(self.options.distance, estimate, target, self.options.huber_c)
        return Loss.mean(self._weight(t, gap) * error, t)

    def point_at(
        self, r: Tensor, *, x0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        """The point at `r` of the trajectory through `x_t`: here on the straight line from the data.

        Args:
            r: the noise levels (B,) of the result.
            x0: the data (B, ...).
            noise: the unit normal noise (B, ...) in `x_t`.
            x_t: the noisy samples (B, ...) at `t`.
            t: their noise levels (B,).
            condition: B rows.
        """
        return VE().add_noise(x0, noise, r)

    def _weight(self, t: Tensor, gap: Tensor) -> Tensor:
        if self.options.weighting == "inverse_gap":
            return inverse_gap(gap)
        weight = edm_weight(t, self.spec.sigma_data)  # for a squared distance; a norm needs its root
        return weight if self.options.distance == "l2" else weight.sqrt()

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline that samples with `network`.

        The second of two steps starts near the level that the paper uses for CIFAR-10 (0.821).
        """
        return consistency_pipeline(
            network, self.spec, self.sigma_min, num_train_timesteps=41, rho=middle_rho(self.spec)
        )

    def describe(self, step: int) -> dict[str, float]:
        return {"stage": self.stage(step)}
