"""Continuous-time consistency models, sCT and sCD (Lu & Song 2024, arXiv:2410.11081, algorithm 1).

This is the limit of CT and CD for neighbouring times. Instead of a difference of two outputs the loss contains the
tangent df/dt of the consistency function f(x_t, t) = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t) along the
trajectory. sCT takes the trajectory's velocity from the data, sCD from a teacher. All formulas are in TrigFlow:
x_t = cos(t) x0 + sin(t) z, z ~ N(0, sigma_data^2), t = atan(sigma / sigma_data). A flow model takes part by an exact
change of variables.
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
        "Steps until the unstable part of the tangent has its full weight; a number below 1 is a share of the run.",
        STEPS,
        phases=("the tangent's warm-up", "the whole tangent"),
    )
    tangent_norm: str = option(
        "norm",
        "Normalisation of the tangent g: g / (|g| + c) by the norm of the sample (norm) or its root mean square (rms),"
        " g clipped to [-1, 1] (clip), or g (none). Unlike norm, rms does not depend on the image size.",
        choices=list(NORMS),
    )
    tangent_c: float = option(0.1, "Constant c of the normalisation g / (|g| + c) of the tangent g.", "[1e-12, 1e6]")
    prior_weight: str = option(
        "one",
        "Weight by noise level: 1 (one) is right, because the tangent cos(t) df/dt already contains the paper's prior"
        " 1 / (sigma_data tan t). Some public trainers use 1 / sigma (inverse_sigma), which counts the prior twice.",
        choices=["one", "inverse_sigma"],
    )
    jvp_mode: str = option(
        "exact",
        "Computation of tangents: forward-mode differentiation (exact), the central difference of two more calls"
        " (finite_difference), or exact with the central difference as fallback (auto).",
        choices=JVP_MODES,
    )


class SCT(Objective):
    """E[ |F(x_t) - sg(F(x_t) + g)|^2 / D ], g = cos(t) df/dt normalised, weighted by a learned log-variance.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import SCT, Batch, ModelSpec
        >>> spec = ModelSpec(sigma_data=0.5, time_label="angle", prediction="trigflow")
        >>> unet = SCT.adapt(build_unet("jvp_tiny", (8, 8), channels=1), spec)  # with a learned log-variance
        >>> method = SCT(unet, spec, SCT.Options(tangent_warmup_steps=100), total_steps=1000)
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> pipe = method.pipeline(unet)
    """

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
        """The velocity dx_t/dt (B, ...): here of the pair (x0, z), whose mean over all pairs through x_t is the ODE's.

        Args:
            x_t: the points (B, ...) in TrigFlow's scale.
            t: their angles (B,).
            x0: the data (B, ...).
            z: the noise (B, ...) in `x_t`, of standard deviation sigma_data.
            condition: B rows.
        """
        return append_dims(t.cos(), z) * z - append_dims(t.sin(), x0) * x0

    def warmup(self, step: int) -> float:
        """r of algorithm 1 at `step`, in [0, 1]; at 0 the loss is that of diffusion training."""
        return min(1.0, step / max(1, self.options.tangent_warmup_steps))

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, condition = batch.samples, batch.condition
        sigma_data = self.spec.sigma_data
        sigma = lognormal(draws.normal("sigma"), self.options.p_mean, self.options.p_std)
        if self.spec.noise_schedule is not None:
            sigma = sigma.clamp(max=self.spec.sigma_max)  # beyond it the table of times has no derivative
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
        # alg. 1, with g = cos(t) df/dt: its stable part, and its unstable part times the warm-up r
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
        """The derivative (B, ...) of F(x, t) along `direction`.

        For the direction that the loss uses it is cos(t) sin(t) dF/dt.

        Args:
            x: the network's input (B, ...), which is x_t / sigma_data.
            t: the angles (B,).
            direction: directions for `x` (B, ...) and for `t` (B,).
            condition: B rows.
            draws: the random numbers of the step, for dropout.
        """
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
    """The settings of sCT, and the teacher."""


class SCD(SCT):
    """sCT with the velocity of a teacher. It can be any denoiser, converted to TrigFlow.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import SCD, Batch, ModelSpec
        >>> spec = ModelSpec(sigma_data=0.5, time_label="angle", prediction="trigflow")
        >>> unet, trained = (SCD.adapt(build_unet("jvp_tiny", (8, 8), 1), spec) for _ in range(2))
        >>> method = SCD(unet, spec, SCD.Options(), total_steps=1000, teacher=spec.denoiser(trained))
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> pipe = method.pipeline(unet)
    """

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
