"""Sampling of diffusion models by the probability-flow ODE or the reverse SDE (Karras et al. 2022, arXiv:2206.00364).

Solvers, for x = x0 + sigma noise, whatever process the network was trained on:

euler, ddim   first order, of the ODE: the step of diffusers' `EDMEulerScheduler`. In sigma, DDIM's step is the same.
heun          second order, of the ODE: algorithm 1; with s_churn > 0, which euler takes as well, algorithm 2.
sde, sde_2m   first and second order, of the SDE: SDE-DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) by diffusers'
              `EDMDPMSolverMultistepScheduler`. The step of order 1 is that of ancestral sampling, and of DDIM, eta 1.

The churn of `EDMEulerScheduler.step` comes after the network was called, so that its slope is not that of the point
from which it steps. Here it comes before, as in the paper.
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor

from ..core.arrays import lacks_float64
from ..core.conditions import Condition, of_classes
from ..core.guidance import Guidance, call_guided
from ..core.karras import karras_sigma
from ..core.parameterisation import NetworkInput, read_out_of_input
from ..core.solvers import heun_end
from ..core.time_labels import checked_label, vp_angles
from .arguments import Entries, Generators, Images, Labels, Levels, Samples, read_count, read_number
from .calls import one_call
from .image_pipeline import ImagePipeline, StepCallback
from .settings import is_a, saying, settings_of


DIFFUSION_SOLVERS = ("heun", "euler", "ddim", "sde", "sde_2m")
DIFFUSION_PREDICTIONS = ("trigflow", "edm", "flow", "epsilon", "v_prediction")
DEFAULTS = {"prediction": "edm", "time_label": None, "time_scale": 1.0, "noise_schedule": None}


def _as_edm(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The `TrigFlowScheduler` of a diffusion model as an `EDMEulerScheduler`; others as they are."""
    if not is_a(scheduler, "TrigFlowScheduler") or scheduler.config.solver == "consistency":
        return scheduler
    levels = {name: scheduler.config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
    return saying(EDMEulerScheduler(**levels), DEFAULTS | {"prediction": "trigflow", "time_label": "angle"})


class DenoisingPipeline(ImagePipeline):
    """Images from a diffusion or flow model, unconditional or class-conditional, by a solver of the ODE or the SDE.

    The levels, EDM's preconditioning and the Euler step are those of diffusers' `EDMEulerScheduler`.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: an `EDMEulerScheduler` with the model's `sigma_data` (of which flow models have none); the
            `TrigFlowScheduler` of a diffusion model is converted to it.
        time_label: the network's time input, by default the first that the prediction allows: "log_sigma"
            (250 ln sigma), "quarter_log_sigma" (ln(sigma) / 4) or "angle" (atan(sigma / sigma_data)) for "edm",
            "flow_time" (sigma / (1 + sigma)) for "flow", "timestep" (times between the integers of the noise schedule,
            by the angle atan(sigma)) for the others.
        prediction: "edm", the default, for a network under EDM's preconditioning; "flow" for one that is given
            x_t = (1 - t) x0 + t noise and predicts noise - x0 (Lipman et al. 2022, arXiv:2210.02747); "epsilon" (the
            noise) or "v_prediction" (alpha noise - std x0) for one that is given alpha x0 + std noise with
            alpha^2 + std^2 = 1, a tuned DDPM; "trigflow" for a diffusion model of `TrigFlowPipeline`.
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.
        time_scale: factor of the time label of "flow" (1000 for diffusers' flow models), by default 1.
        noise_schedule: for "epsilon" and "v_prediction" the settings of diffusers' `DDPMScheduler` that make the table
            of alpha^2, such as {"beta_schedule": "linear"}.

    What is not given of the prediction, its time and its noise schedule is what the scheduler of another pipeline says
    of the network, so that `DenoisingPipeline(**pipe.components)` makes the images of `pipe`.

    Raises:
        ValueError: unknown prediction, a time label that is not one of its own, no noise schedule where it has to be
            known; another scheduler, or one for a network of another prediction, here or when one is assigned.

    Example:
        >>> from diffusers import EDMEulerScheduler
        >>> from cm_diffusers import DenoisingPipeline
        >>> from cm_diffusers.models import build_unet
        >>> unet = build_unet("tiny", (8, 8), 1)  # or from_pretrained("user/model")
        >>> pipe = DenoisingPipeline(unet, EDMEulerScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(batch_size=2, num_inference_steps=4, solver="heun", generator=0, output_type="pt").images
        >>> images.shape
        torch.Size([2, 1, 8, 8])
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _schedulers = ("EDMEulerScheduler",)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: EDMEulerScheduler,
        time_label: str | None = None,
        prediction: str | None = None,
        vae: ModelMixin | None = None,
        time_scale: float | None = None,
        noise_schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        scheduler = _as_edm(scheduler)
        given = {"prediction": prediction, "time_label": time_label, "time_scale": time_scale}
        settings = DEFAULTS | settings_of(scheduler, noise_schedule=noise_schedule, **given)
        prediction, time_label, noise_schedule = (
            settings[name] for name in ("prediction", "time_label", "noise_schedule")
        )
        time_label = checked_label(prediction, time_label, noise_schedule is not None, DIFFUSION_PREDICTIONS)
        self.register_to_config(**settings | {"time_label": time_label})
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self._angles = None
        if noise_schedule is not None:
            self._angles = vp_angles(DDPMScheduler(**noise_schedule).alphas_cumprod.double()).numpy()

    def accept_scheduler(self, scheduler: SchedulerMixin) -> EDMEulerScheduler:
        """See `ImagePipeline`: an `EDMEulerScheduler`, told what the network predicts."""
        scheduler = super().accept_scheduler(_as_edm(scheduler))
        return saying(scheduler, {name: self.config[name] for name in DEFAULTS})

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (18,)

    def denoise(
        self, sample: torch.Tensor, sigma: torch.Tensor, condition: Condition | Guidance | torch.Tensor | None
    ) -> torch.Tensor:
        """The estimate of the clean sample from `sample` (B, C, H, W), float32, at the scalar level `sigma` > 0.

        The sample is x0 + sigma noise whatever the network predicts; a flow model is given sample / (1 + sigma), one
        of noise or v sample / sqrt(1 + sigma^2). Class labels (B,), or guidance, may stand for the condition.
        """
        prediction = self.config.prediction
        given = self._network_input
        edm = prediction in ("edm", "trigflow")  # whose outputs differ in their sign alone
        network_input = self.scheduler.precondition_inputs(sample, sigma) if edm else sample / given.norm(sigma)
        cast = network_input.to(self.network_dtype)
        label = given.label(sigma)
        label = label.to(sample.device, torch.float32 if lacks_float64(sample.device) else label.dtype)
        told = condition if isinstance(condition, (Condition, Guidance)) else of_classes(condition)
        output = call_guided(self.unet, cast, label, told=told, sigma=sigma).float()
        if edm:
            output = -output if prediction == "trigflow" else output
            return self.scheduler.precondition_outputs(sample, output, sigma)
        if prediction == "epsilon":
            return sample - sigma * output
        return read_out_of_input(prediction, output, network_input, sigma)

    @property
    def _network_input(self) -> NetworkInput:
        """How the network is given a sample, as the config and the scheduler of this call say it."""
        return NetworkInput(
            self.config.prediction,
            self.config.time_label,
            sigma_data=self.scheduler.config.sigma_data,
            time_scale=self.config.time_scale,
            angles=self._angles,
        )

    def _heun_step(
        self, sample: torch.Tensor, denoised: torch.Tensor, euler: torch.Tensor, i: int, told: Condition | Guidance
    ) -> torch.Tensor:
        """`euler`, the end of a step of order 1 from `sample`, corrected by the slope there, which 0 has not."""
        now, then = self.scheduler.sigmas[i : i + 2]
        if then == 0:
            return euler
        slope = (sample - denoised) / now  # Karras et al. 2022, algorithm 1, line 4
        slope_then = (euler - self.denoise(euler, then, told)) / then  # line 7
        return heun_end(sample, then - now, slope, slope_then)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """See `ImagePipeline`: a Karras grid that ends with sigma_min, before the step to 0."""
        config = self.scheduler.config
        ramp = np.linspace(0, 1, num_inference_steps)
        return karras_sigma(ramp, config.sigma_min, noise_level, config.rho).tolist()

    def _set_levels(
        self, num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> None:
        """Tell the scheduler of the call its levels; ValueError for those that can't be meant."""
        scheduler = self.scheduler
        if sum(given is not None for given in (num_inference_steps, sigmas, timesteps)) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `sigmas` and `timesteps`.")
        if num_inference_steps is not None:
            read_count("num_inference_steps", num_inference_steps, 2)
            scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            return
        name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
        levels = torch.tensor(given, dtype=torch.float64)
        if timesteps is not None:
            levels = (4 * levels).exp()  # the inverse of EDM's c_noise, ln(sigma) / 4
        highest = scheduler.config.sigma_max * (1 + 1e-6)
        if not len(levels) or not ((levels > 0) & (levels <= highest)).all():
            raise ValueError(
                f"`{name}` must be levels in (0, {scheduler.config.sigma_max:g}], falling, got {given}"
                + ("." if sigmas is not None else f", which are {levels.tolist()}.")
            )
        if (levels[1:] >= levels[:-1]).any():
            raise ValueError(f"`{name}` must fall strictly, got {given}.")
        # diffusers' own argument `sigmas` takes places on the Karras grid, not levels
        scheduler.set_timesteps(len(levels), device=self._execution_device)
        levels = levels.float()
        scheduler.timesteps = scheduler.precondition_noise(levels).to(self._execution_device)
        scheduler.sigmas = torch.cat([levels, scheduler.sigmas[-1:]])

    def _sde_scheduler(self, order: int) -> EDMDPMSolverMultistepScheduler:
        """The stock solver of the SDE, at the levels of the pipeline's scheduler."""
        settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
        # settings given by position stand among `_use_default_values`, which from_config would leave out
        config = {**self.scheduler.config, "_use_default_values": []}
        scheduler = EDMDPMSolverMultistepScheduler.from_config(config, **settings)
        own = self.scheduler
        scheduler.set_timesteps(own.num_inference_steps, device=self._execution_device)
        if not torch.allclose(scheduler.sigmas, own.sigmas):  # where both choose the levels they differ by roundings
            scheduler.sigmas, scheduler.timesteps = own.sigmas.clone(), own.timesteps
        scheduler.set_begin_index(0)  # its timesteps differ from those of `self.scheduler` by roundings
        return scheduler

    def _edm_output(self, sample: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What a network under EDM's preconditioning puts out to mean `denoised`, which stock solvers want."""
        skip = self.scheduler.precondition_outputs(sample, 0, sigma)
        return (denoised - skip) / self.scheduler.precondition_outputs(0, 1, sigma)

    @staticmethod
    def _check_solver(solver: str, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
        """Raise ValueError for settings that are impossible or would not be used."""
        if solver not in DIFFUSION_SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(DIFFUSION_SOLVERS)}; got {solver!r}.")
        if not 0 <= s_churn < math.inf:
            raise ValueError(f"s_churn must be a number of at least 0, got {s_churn}.")
        if s_churn and solver not in ("heun", "euler"):
            raise ValueError(f"s_churn is for the solvers heun and euler; got {s_churn} for {solver!r}.")
        if not s_churn and (s_tmin, s_tmax, s_noise) != (0, math.inf, 1):
            raise ValueError("s_tmin, s_tmax and s_noise are for s_churn > 0; got s_churn 0.")
        if not 0 <= s_tmin <= s_tmax:
            raise ValueError(f"s_tmin and s_tmax must satisfy 0 <= s_tmin <= s_tmax, got {s_tmin} and {s_tmax}.")
        if not 0 < s_noise < math.inf:
            raise ValueError(f"s_noise must be a number above 0, got {s_noise}.")

    @torch.no_grad()
    @one_call
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        solver: str = "heun",
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        latents: Samples = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        condition: Entries = None,
        guidance_scale: float = 1.0,
        guidance_interval: Levels = None,
        negative_class_labels: Labels = None,
        sigmas: Levels = None,
        timesteps: Levels = None,
        image: Images = None,
        noise_level: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make images.

        Args:
            batch_size: how many; by default as many as there are class labels, generators or latents, else 1.
            class_labels: one label for all or one per image, or names of classes where the model knows them; drawn
                from `generator` where the model wants some and neither they nor `latents` are given.
            num_inference_steps: number of Karras levels N, 2 or more (18); Heun calls the network 2 N - 1 times, the
                others N times. The SDE wants more of them than the ODE.
            solver: "heun", "euler", "ddim" (euler by another name), "sde" or "sde_2m".
            s_churn: noise to add and take away again on the way, for heun and euler, at least 0: each step starts from
                a level higher by the factor 1 + min(s_churn / N, sqrt(2) - 1).
            s_tmin: the lowest level that is churned.
            s_tmax: the highest such level.
            s_noise: factor of the noise that is added, a little above 1 where the network removes too much.
            generator: a generator or a seed, or one per image (then an image does not depend on the others of the
                batch).
            latents: unit normal noise (batch_size, C, H, W), a tensor or an array, instead of noise from `generator`.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (as it is).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors, and `pipe._interrupt = True` ends the call.
            callback_on_step_end_tensor_inputs: which tensors it sees: "latents", "pred_original_sample".
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.
            guidance_scale: w of classifier-free guidance: 1 is none, more leads further away from what the network
                makes of no class, by two samples in each network call.
            guidance_interval: the lowest and the highest noise level at which there is guidance; all by default.
            negative_class_labels: classes to be led away from instead of none, given as class_labels are.
            sigmas: the noise levels, falling, instead of a number, for example [5, 1, 0.2]; or else
            timesteps: the same by the times of `scheduler.timesteps`.
            image: what to begin with instead of pure noise, one for all or one per image: a tensor (n, C, H, W) or an
                array (n, H, W, C) in [0, 1], or PIL, of the model's size.
            noise_level: sigma, of the noise that it gets, and of the first step: the higher, the more is made anew.
                Other levels, whose first one it is, may stand for it.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: an argument that can't be meant, before the network is called.
        """
        churning = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        s_churn, s_tmin, s_tmax, s_noise = (read_number(name, value) for name, value in churning.items())
        self._check_solver(solver, s_churn, s_tmin, s_tmax, s_noise)
        scheduler = self.scheduler
        images, level = self.read_start(image, noise_level, sigmas, timesteps)
        self._set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level))
        scheduler.set_begin_index(0)
        scheduler.is_scale_input_called = True  # `denoise` scales the network's input itself
        levels = scheduler.sigmas
        churn = min(s_churn / scheduler.num_inference_steps, math.sqrt(2) - 1)

        sde = self._sde_scheduler(2 if solver == "sde_2m" else 1) if "sde" in solver else None

        names = callback_on_step_end_tensor_inputs
        self.check_callback(callback_on_step_end, names)
        noise, plain, generator = self.prepare(
            batch_size,
            class_labels,
            condition,
            generator=generator,
            latents=latents,
            output_type=output_type,
            images=images,
        )
        told = self.guided(plain, guidance_scale, guidance_interval, negative_class_labels)
        sample = noise.float() * levels[0]
        if images is not None:
            sample = self.encoded(images, noise) + sample
        for i, t in self.steps(scheduler.timesteps):
            if churn and s_tmin <= levels[i] <= s_tmax:
                new = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
                sample = sample + s_noise * levels[i] * math.sqrt((1 + churn) ** 2 - 1) * new
                levels[i] *= 1 + churn
            denoised = self.denoise(sample, levels[i], told)
            if sde is not None:
                output = self._edm_output(sample, denoised, levels[i])
                sample = sde.step(output, t, sample, generator=generator, return_dict=False)[0]
            else:
                euler = scheduler.step(denoised, t, sample, pred_original_sample=denoised, return_dict=False)[0]
                sample = self._heun_step(sample, denoised, euler, i, told) if solver == "heun" else euler
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, t, tensors, names)
        return self.finish(sample, output_type, return_dict)
