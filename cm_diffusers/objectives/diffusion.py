"""Denoising diffusion as in EDM (Karras et al. 2022, arXiv:2206.00364), the basis of the consistency methods.

Unlike in ECT the target is always the data, and an ODE solver samples the result in many steps. The network predicts
EDM's F, TrigFlow's velocity (Lu & Song 2024, arXiv:2410.11081, eq. 3: the same loss), or the velocity of linear flow
matching (Lipman et al. 2022, arXiv:2210.02747).
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from torch import Tensor, nn

from cm_diffusers.core.conditions import Rewired
from cm_diffusers.core.distances import l2
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.core.parameterisation import jump_scalings
from cm_diffusers.core.weightings import edm_weight
from cm_diffusers.models import with_log_variance, without_log_variance
from cm_diffusers.objectives.base import Batch, Loss, Objective, Summary
from cm_diffusers.objectives.options import Options, option
from cm_diffusers.objectives.spec import PROCESS_STUDENTS, ModelSpec
from cm_diffusers.pipelines import DenoisingPipeline, TrigFlowPipeline
from cm_diffusers.schedulers import TrigFlowScheduler


# mean and std of ln(sigma): EDM's; sCM's for CIFAR-10; logit-normal flow times (Esser et al. 2024, arXiv:2403.03206)
LAWS = {"edm": (-1.2, 1.2), "trigflow": (-1.0, 1.4), "flow": (0.0, 1.0)}


@dataclass(frozen=True)
class DiffusionOptions(Options):
    interpolant: str = option(
        "edm",
        "Forward process of the network and its prediction: F of EDM (edm), the velocity of TrigFlow (trigflow), or"
        " the velocity of linear flow matching (flow).",
        choices=list(LAWS),
    )
    p_mean: float | None = option(
        None,
        "Mean of ln(sigma) in training. The default is -1.2 for edm, -1.0 for trigflow and 0 for flow.",
        "[-20, 20]",
    )
    p_std: float | None = option(
        None,
        "Standard deviation of ln(sigma) in training. The default is 1.2 for edm, 1.4 for trigflow and 1 for flow.",
        "[1e-3, 10]",
    )

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        p_mean, p_std = LAWS[self.interpolant]
        options = replace(
            self,
            p_mean=p_mean if self.p_mean is None else self.p_mean,
            p_std=p_std if self.p_std is None else self.p_std,
        )
        return super(DiffusionOptions, options).resolved(total_steps, pretrained, dimensions)

    @property
    def law(self) -> tuple[float, float]:
        """Mean and standard deviation of ln(sigma), in resolved options."""
        assert self.p_mean is not None and self.p_std is not None
        return self.p_mean, self.p_std


def noised(x0: Tensor, law: tuple[float, float], draws: Draws) -> tuple[Tensor, Tensor]:
    """Noisy samples x0 + sigma noise (B, ...), and their noise levels (B,).

    Args:
        x0: the data (B, ...).
        law: mean and standard deviation of ln(sigma).
        draws: the random numbers of the step.
    """
    sigma = lognormal(draws.normal("sigma"), *law)
    return VE().add_noise(x0, draws.normal("noise", x0.shape[1:]), sigma), sigma


def denoising_error(denoised: Tensor, x0: Tensor, sigma: Tensor, spec: ModelSpec) -> Tensor:
    """The squared error (B,) of the network's own output: |D - x0|^2 over the square of the output's factor in D.

    Args:
        denoised: D (B, ...).
        x0: the data (B, ...).
        sigma: the noise levels (B,).
        spec: the parameterisation of the network.
    """
    if spec.prediction in ("edm", "trigflow"):  # c_out is the same for both
        weight = edm_weight(sigma, spec.sigma_data)
    else:
        weight = jump_scalings(spec.prediction, sigma, torch.zeros_like(sigma), spec.sigma_data)[1] ** -2
    return weight * l2(denoised, x0)


def denoising_pipeline(network: nn.Module, spec: ModelSpec, sigma_min: float) -> DiffusionPipeline:
    """The pipeline that samples a diffusion model with an ODE solver.

    Args:
        network: the trained network.
        spec: its parameterisation.
        sigma_min: the lowest noise level.
    """
    levels = {"sigma_min": sigma_min, "sigma_max": spec.sigma_max, "sigma_data": spec.sigma_data}
    if spec.prediction == "trigflow":
        return TrigFlowPipeline(network, TrigFlowScheduler(solver="heun", **levels))
    return DenoisingPipeline(network, EDMEulerScheduler(**levels), **spec.input_config)


class Diffusion(Objective):
    """E[ lambda(sigma) |D(x0 + sigma noise, sigma) - x0|^2 ], ln(sigma) ~ N(p_mean, p_std^2) (eq. 8, table 1).

    lambda = 1 / c_out^2 makes it the plain square of the network's own error. If the network has a learned
    log-variance, this weighs the error by noise level.

    Examples:
        >>> import torch
        >>> from cm_diffusers.core.draws import Draws
        >>> from cm_diffusers.models import build_unet
        >>> from cm_diffusers.objectives import Batch, Diffusion, ModelSpec
        >>> spec, options = ModelSpec(sigma_data=0.5), Diffusion.Options(p_mean=-1.0)
        >>> unet = Diffusion.adapt(build_unet("tiny", (8, 8), channels=1), spec)  # with a learned log-variance
        >>> method = Diffusion(unet, spec, options, total_steps=1000)
        >>> method.loss(Batch(torch.randn(4, 1, 8, 8)), Draws(seed=0, step=0, rows=range(4))).total.backward()
        >>> pipe, denoiser = method.pipeline(unet), method.denoiser()  # the denoiser can teach other methods
    """

    name = "diffusion"
    Options = DiffusionOptions
    native_predictions = PROCESS_STUDENTS
    sigma_min = 0.002
    floor = 0.0
    trains_teachers = True
    summary = Summary(
        what="denoising (EDM, TrigFlow or flow), sampled in ~35 calls",
        target="the data",
        times="ln sigma ~ N(-1.2, 1.2^2)",
        distance="L2",
        weight="1 / c_out^2",
        paper="[Karras et al. 2022](https://arxiv.org/abs/2206.00364), eq. 8",
    )

    @classmethod
    def prediction(cls, options: DiffusionOptions) -> str:
        return options.interpolant

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        return with_log_variance(network)

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x, sigma = noised(batch.samples, self.options.law, draws)
        outputs = []

        def network(*args: Any, **kwargs: Any) -> Any:
            outputs.append(self.model(*args, **kwargs))
            return outputs[0]

        with draws.dropout():
            denoised = self.denoiser(Rewired(self.model, network))(x, sigma, batch.condition)
        error = denoising_error(denoised, batch.samples, sigma, self.spec)  # eq. 8
        log_variance = getattr(outputs[0], "log_variance", None)
        if log_variance is not None:
            error = error / x[0].numel()  # about 1 at the start, like exp(log_variance)
        return Loss.mean(error, sigma, log_variance)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        return denoising_pipeline(without_log_variance(network), self.spec, self.sigma_min)
