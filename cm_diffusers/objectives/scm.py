"""Continuous-time consistency models, sCT and sCD (Lu & Song 2024, arXiv:2410.11081, algorithm 1).

The limit of CT and CD for neighbouring times: instead of a difference of two outputs the network follows the tangent
df/dt of its consistency function f(x_t, t) = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t) along the
trajectory. sCT takes the trajectory's velocity from the data, sCD from a teacher. TrigFlow throughout, a flow model by
an exact change of variables: x_t = cos(t) x0 + sin(t) z, z ~ N(0, sigma_data^2), t = atan(sigma / sigma_data).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.arrays import append_dims
from cm_diffusers.core.conditions import Condition, call_network
from cm_diffusers.core.denoisers import Denoiser, trigflow_velocity
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.core.tangents import NORMS, jvp, jvp_ready, normalised
from cm_diffusers.models import with_log_variance, without_log_variance
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.consistency import trigflow_pipeline
from cm_diffusers.objectives.continuous import JVP_MODES, check_tangents
from cm_diffusers.objectives.options import STEPS, Length, Options, TeacherOptions, option
from cm_diffusers.objectives.spec import ModelSpec


@dataclass(frozen=True)
class SCTOptions(Options):
    p_mean: float = option(-1.0, "Mean of ln(sigma) in training.", "[-20, 20]")
    p_std: float = option(1.4, "Standard deviation of ln(sigma) in training.", "[1e-3, 10]")
    tangent_warmup_steps: Length = option(
        10_000,
        "Steps, or share, until the tangent's unstable part counts fully.",
        STEPS,
        phases=("the tangent's warm-up", "the whole tangent"),
    )
    tangent_norm: str = option(
        "norm",
        "g / (|g| + c) with the norm of the sample, or its root mean square (the same for images of any size); g"
        " clipped to [-1, 1]; or g as it is.",
        choices=list(NORMS),
    )
    tangent_c: float = option(0.1, "c of the normalisation.", "[1e-12, 1e6]")
    prior_weight: str = option(
        "one",
        "Weight by noise level. The tangent cos(t) df/dt holds the paper's prior 1 / (sigma_data tan t) already, so"
        " that one is right, and inverse_sigma, as some public trainers have it, counts it twice.",
        choices=["one", "inverse_sigma"],
    )
    jvp_mode: str = option("exact", "How tangents are taken.", choices=JVP_MODES)


class SCT(Objective):
    """E[ |F(x_t) - sg(F(x_t) + g)|^2 / D ], g = cos(t) df/dt normalised, weighed by a learned log-variance."""

    name = "sct"
    Options: ClassVar[type] = SCTOptions
    native_predictions = ("flow",)
    needs_tangents = True
    levels = ("sigma_data", "sigma_max")
    sigma_min = floor = 0.0
    summary = Summary(
        what="continuous-time consistency training, 1 or 2 calls",
        target="itself plus its tangent, no gradient",
        times="ln sigma ~ N(-1, 1.4^2)",
        distance="L2",
        weight="learned log-variance",
        paper="[Lu & Song 2024](https://arxiv.org/abs/2410.11081), alg. 1",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_tangents(self.network, self.options.jvp_mode)

    @classmethod
    def prediction(cls, options: SCTOptions) -> str:
        return "trigflow"

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        return with_log_variance(network)

    def velocity(self, x_t: Tensor, t: Tensor, *, x0: Tensor, z: Tensor, condition: Condition) -> Tensor:
        """dx_t/dt: here of the straight pair (x0, z), whose mean over the pairs through x_t is the ODE's."""
        return append_dims(t.cos(), z) * z - append_dims(t.sin(), x0) * x0

    def warmup(self, step: int) -> float:
        """r of algorithm 1, in [0, 1]; at 0 the loss is that of diffusion training."""
        return min(1.0, step / max(1, self.options.tangent_warmup_steps))

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition = batch.samples, batch.condition
        sigma_data = self.spec.sigma_data
        sigma = lognormal(draws.normal("sigma"), self.options.p_mean, self.options.p_std)
        t = (sigma / sigma_data).atan()
        cos, sin = append_dims(t.cos(), x0), append_dims(t.sin(), x0)
        z = sigma_data * draws.normal("noise", x0.shape[1:])
        x_t = cos * x0 + sin * z
        velocity = self.velocity(x_t, t, x0=x0, z=z, condition=condition)

        direction = (cos * sin * velocity / sigma_data, t.cos() * t.sin())
        dF = self.tangent(x_t / sigma_data, t, direction, condition=condition, draws=draws)
        with draws.dropout():
            output = call_network(self.spec.as_trigflow(self.model), x_t / sigma_data, t, condition=condition)
        F = output.sample.to(x0.dtype)
        target = F.detach()
        # alg. 1, with g = cos(t) df/dt: its stable part, and what the warm-up r lets in
        g = -(cos**2) * (sigma_data * target - velocity)
        g = g - self.warmup(draws.step) * (cos * sin * x_t + sigma_data * dF)
        g = normalised(g, self.options.tangent_norm, self.options.tangent_c)
        error = (F - target - g).flatten(1).square().mean(1)
        if self.options.prior_weight == "inverse_sigma":
            error = error / sigma
        return Loss.mean(error, sigma, getattr(output, "log_variance", None))

    def tangent(
        self, x: Tensor, t: Tensor, direction: tuple[Tensor, Tensor], *, condition: Condition, draws: Draws
    ) -> Tensor:
        """The derivative of F(x, t) along `direction`: for that of the loss cos(t) sin(t) sigma_data dF/dt."""
        bare = self.spec.as_trigflow(self.network)

        def network(x: Tensor, t: Tensor) -> Tensor:
            with draws.dropout():
                return call_network(bare, x, t, condition=condition).sample

        with jvp_ready(self.network, self.options.jvp_mode):
            return jvp(network, (x, t), direction, self.options.jvp_mode)[1]

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return trigflow_pipeline(without_log_variance(network), self.spec)

    def describe(self, step: int) -> dict[str, float]:
        return {"warmup": self.warmup(step)}


@dataclass(frozen=True)
class SCDOptions(SCTOptions, TeacherOptions):
    """Those of sCT, and the teacher."""


class SCD(SCT):
    """sCT with the velocity of a teacher: any denoiser, read as TrigFlow's."""

    teacher: Denoiser
    name = "scd"
    Options = SCDOptions
    needs_teacher = True
    summary = replace(
        SCT.summary, what="continuous-time consistency distillation, 1 or 2 calls", teacher="a diffusion or flow model"
    )

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, *, x0: Tensor, z: Tensor, condition: Condition) -> Tensor:
        return trigflow_velocity(self.teacher, x_t, t, self.spec.sigma_data, condition)
