"""Consistency distillation, CD (Song et al. 2023, arXiv:2303.01469, algorithm 2).

The point at sigma_n is where one solver step of the teacher's ODE leads from x at sigma_{n+1}; in CT it lies on the
straight line to the data. The teacher is a diffusion model, and the student starts from its weights. Unlike in CT the
number of grid levels and the decay of the target network are fixed.
"""

from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import draw_levels, uniform_bins
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import (
    CM_WEIGHTS,
    SOLVERS,
    check_distance,
    cm_weight,
    consistency_pipeline,
    distance,
    distance_option,
    estimate_and_target,
    move_towards,
    moving_target,
    teacher_step,
)
from cm_diffusers.objectives.options import TeacherOptions, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


@dataclass(frozen=True)
class CDOptions(TeacherOptions):
    solver: str = option(
        "heun", "Solver for the step along the teacher's ODE; in sigma, ddim equals euler.", choices=list(SOLVERS)
    )
    num_scales: int = option(
        40, "Levels in the Karras grid; the paper uses 18 for CIFAR-10 and 40 for ImageNet-64.", "[2, 1e6]"
    )
    mu: float = option(0.95, "EMA decay of the target network.", "[0, 1]")
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
        check_distance(self.distance)


class CD(Objective):
    """E[ lambda(sigma_n) d(D(x, sigma_{n+1}), D-(ODE step of the teacher from x, sigma_n)) ], n uniform (eq. 7).

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import CD, Batch, ModelSpec
        >>> spec = ModelSpec(sigma_data=0.5)
        >>> unet, trained = (build_unet("tiny", (8, 8), channels=1) for _ in range(2))
        >>> method = CD(unet, spec, CD.Options(), total_steps=1000, teacher=spec.denoiser(trained))
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> method.after_step(0)  # after the step of an optimiser: moves the target network
    """

    teacher: Denoiser
    name = "cd"
    Options = CDOptions
    native_predictions = PROCESS_STUDENTS
    needs_teacher = has_target = compares_neighbours = True
    sigma_min = floor = 0.002
    summary = Summary(
        what="consistency distillation, 1 or more calls",
        target="average of itself, decay mu",
        times="uniform on a Karras grid",
        distance="L2 (or pseudo-Huber)",
        weight="1",
        paper="[Song et al. 2023](https://arxiv.org/abs/2303.01469), alg. 2",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.target = moving_target(self.network)
        self.auxiliary = {"target": self.target}

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition, options = batch.samples, batch.condition, self.options
        n, high, uniform = options.num_scales, self.spec.sigma_max, draws.uniform("sigma")
        u, t = (level.to(x0) for level in draw_levels(uniform_bins, n, self.sigma_min, high, uniform))
        x_t = VE().add_noise(x0, draws.normal("noise", x0.shape[1:]), t)
        x_u = teacher_step(self.teacher, x_t, t=t, u=u, condition=condition, solver=options.solver)  # eq. 6
        estimate, target = estimate_and_target(
            student=self.denoiser(),
            x_t=x_t,
            t=t,
            target=self.denoiser(self.target),
            x_u=x_u,
            u=u,
            condition=condition,
            draws=draws,
        )
        error = distance(options.distance, estimate, target, options.huber_c)
        return Loss.mean(cm_weight(options.weighting, u, self.spec.sigma_data) * error, t)  # eq. 7

    def after_step(self, step: int) -> None:
        move_towards(self.target, self.network, self.options.mu)  # eq. 8

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return consistency_pipeline(network, self.spec, self.sigma_min, self.options.num_scales)
