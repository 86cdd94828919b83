"""Latent consistency distillation, LCM (Luo et al. 2023, arXiv:2310.04378, algorithm 1).

Like CD, the target is at the end of one solver step of the teacher's ODE. Three things differ: the levels are a few
equally spaced times of the teacher's table, so that a step skips many of its times; the teacher is guided, with a
scale that is fixed or drawn anew for each sample; and the solver is DDIM, which in sigma is Euler's method.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.arrays import append_dims, on_device
from cm_diffusers.core.denoisers import Denoiser, Guided
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE, VP
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import (
    check_distance,
    consistency_pipeline,
    distance,
    distance_option,
    estimate_and_target,
    move_towards,
    moving_target,
    teacher_step,
)
from cm_diffusers.objectives.options import TeacherOptions, check_order, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS


@dataclass(frozen=True)
class LCMOptions(TeacherOptions):
    num_ddim_timesteps: int = option(
        50, "Number of levels; with 50, a step skips 20 of 1000 times of the teacher's table.", "[2, 1e6]"
    )
    w_min: float = option(
        1.0, "Lowest guidance scale of the teacher, if --w_max draws scales; 1 is no guidance.", "[0, 1e3]"
    )
    w_max: float | None = option(
        None,
        "Highest guidance scale of the teacher, which is drawn anew for each sample. A network with a guidance input"
        " (time_cond_proj_dim) receives it; any other learns their mean. Default: the one scale"
        " --teacher_guidance_scale.",
        "[0, 1e3]",
    )
    mu: float = option(0.95, "EMA decay of the target network; 0 copies the network after each step.", "[0, 1]")
    distance: str = distance_option("pseudo_huber")
    huber_c: float = option(
        0.001, "Constant c of the pseudo-Huber distance sqrt(|a - b|^2 + c^2) - c; 0 gives the plain norm.", "[0, 1e6]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distance(self.distance)
        if self.w_max is not None:
            check_order(self, "w_min", "w_max")
        elif self.w_min != 1:
            raise ValueError(f"w_min {self.w_min:g} needs --w_max, the other end of the range.")

    @property
    def draws_guidance(self) -> bool:
        return self.w_max is not None


class LCM(Objective):
    """E[ d(D(x_t, t, w), D-(DDIM step of the teacher guided by w from x_t to u, u, w)) ], t and u neighbours.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import LCM, Batch, ModelSpec
        >>> spec = ModelSpec(0.5, "timestep", prediction="epsilon", noise_schedule={"beta_schedule": "linear"})
        >>> unet, trained = (build_unet("tiny", (8, 8), channels=1) for _ in range(2))
        >>> method = LCM(unet, spec, LCM.Options(), total_steps=1000, teacher=spec.denoiser(trained))
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> method.after_step(0)  # after the step of an optimiser: moves the target network

    Raises:
        ValueError: there is no teacher, or `w_max` is set and the teacher is not a `Guided` one.
    """

    teacher: Denoiser
    name = "lcm"
    Options = LCMOptions
    native_predictions = PROCESS_STUDENTS
    needs_teacher = has_target = compares_neighbours = True
    sigma_min = floor = 0.002
    summary = Summary(
        what="latent consistency distillation, 1 to 8 calls",
        target="average of itself, decay mu",
        times="uniform on 50 times of the teacher",
        distance="pseudo-Huber, c = 0.001",
        weight="1",
        paper="[Luo et al. 2023](https://arxiv.org/abs/2310.04378), alg. 1",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.options.draws_guidance and not isinstance(self.teacher, Guided):
            raise ValueError("w_max needs a teacher with null rows, as `core.denoisers.Guided`.")
        self.target = moving_target(self.network)
        self.auxiliary = {"target": self.target}
        self.sigmas = self._levels()

    def _levels(self) -> Tensor:
        """The levels (N + 1,), rising, float64: times of the table, or a Karras grid for other processes."""
        n, process = self.options.num_ddim_timesteps, self.spec.process
        if not isinstance(process, VP):
            return karras_sigmas(n + 1, self.sigma_min, self.spec.sigma_max).flip(0)
        times = len(process.angles) * torch.arange(n + 1, dtype=torch.float64) / n - 1
        return process.sigma(times.floor().clamp(min=0)).clamp(max=self.spec.sigma_max)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition, options = batch.samples, batch.condition, self.options
        uniform = draws.uniform("sigma")
        sigmas = on_device(self.sigmas, uniform.device)
        n = (uniform * options.num_ddim_timesteps).long().to(sigmas.device)
        u, t = sigmas[n].to(x0), sigmas[n + 1].to(x0)
        x_t = VE().add_noise(x0, draws.normal("noise", x0.shape[1:]), t)
        teacher = self.teacher
        if options.w_max is not None:
            scale = options.w_min + (options.w_max - options.w_min) * draws.uniform("guidance").to(x0)
            teacher = replace(teacher, scale=scale)
            if getattr(self.network.config, "time_cond_proj_dim", None) is not None:
                condition = condition.also(guidance=scale)
        x_u = teacher_step(teacher, x_t, t=t, u=u, condition=batch.condition, solver="ddim")
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
        ends = self.ends(n, draws, x_t=x_t, estimate=estimate, x_u=x_u, target=target)
        return Loss.mean(distance(options.distance, *ends, options.huber_c), t)

    def ends(
        self, n: Tensor, draws: Draws, *, x_t: Tensor, estimate: Tensor, x_u: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two ends (B, ...) that the loss compares: where the student leads from t, and the target from u.

        Args:
            n: the indices (B,) of the levels u; those of t are `n` + 1.
            draws: the random numbers of the step.
            x_t: the points (B, ...) at t.
            estimate: the student's denoised `x_t`.
            x_u: the points (B, ...) at u.
            target: the target network's denoised `x_u`.
        """
        above = append_dims(n.to(x_u.device) > 0, x_u)  # the lowest level stands for the data
        return estimate, torch.where(above, target, x_u)

    def after_step(self, step: int) -> None:
        move_towards(self.target, self.network, self.options.mu)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return consistency_pipeline(network, self.spec, self.sigma_min, self.options.num_ddim_timesteps)
