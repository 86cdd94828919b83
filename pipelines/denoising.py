"""Sampling of diffusion models by the probability-flow ODE or the reverse SDE (Karras et al. 2022, arXiv:2206.00364).

All solvers work on x = x0 + sigma noise, whatever process the network was trained on:

| solver          | equation | order  | method                                                              |
|-----------------|----------|--------|---------------------------------------------------------------------|
| `euler`, `ddim` | ODE      | 1      | diffusers' `EDMEulerScheduler`; in terms of sigma, DDIM is the same |
| `heun`          | ODE      | 2      | algorithm 1 of the paper                                            |
| `sde`, `sde_2m` | SDE      | 1 or 2 | SDE-DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095)                 |

With s_churn > 0, `heun` is algorithm 2 of the paper; `euler` has churn as well. The SDE solvers are those of
diffusers' `EDMDPMSolverMultistepScheduler`. A step of `sde` equals ancestral sampling, and DDIM with eta 1.

`EDMEulerScheduler.step` adds its churn after the network call, so the slope belongs to another point than the one it
steps from. Here the churn comes before the network call, as in the paper.
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
    """Convert the `TrigFlowScheduler` of a diffusion model to an `EDMEulerScheduler`; return others unchanged."""
    if not is_a(scheduler, "TrigFlowScheduler") or scheduler.config.solver == "consistency":
        return scheduler
    levels = {name: scheduler.config[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
    return saying(EDMEulerScheduler(**levels), DEFAULTS | {"prediction": "trigflow", "time_label": "angle"})


class DenoisingPipeline(ImagePipeline):
    """Generate images with a diffusion or flow model, by a solver of the ODE or the SDE.

    The model is unconditional or class-conditional. The noise levels, EDM's preconditioning and the Euler step are
    those of diffusers' `EDMEulerScheduler`.

    By default, `prediction`, `time_label`, `time_scale` and `noise_schedule` come from the config of `scheduler`, if
    another pipeline stored them there. Therefore `DenoisingPipeline(**pipe.components)` samples the same model as
    `pipe`.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: an `EDMEulerScheduler`, with the model's `sigma_data` for "edm" and "trigflow". The
            `TrigFlowScheduler` of a diffusion model is converted to one.
        time_label: the network's time input. By default it is the first that the prediction allows:

            - for "edm": "log_sigma" (250 ln sigma), "quarter_log_sigma" (ln(sigma) / 4) or "angle"
              (atan(sigma / sigma_data));
            - for "flow": "flow_time" (sigma / (1 + sigma));
            - for "epsilon" and "v_prediction": "timestep" (times between the integers of the noise schedule, by the
              angle atan(sigma));
            - for "trigflow": "angle".
        prediction: what the network predicts:

            - "edm", the default: F under EDM's preconditioning;
            - "flow": noise - x0, from x_t = (1 - t) x0 + t noise (Lipman et al. 2022, arXiv:2210.02747);
            - "epsilon": the noise, from alpha x0 + std noise with alpha^2 + std^2 = 1, as in DDPM;
            - "v_prediction": alpha noise - std x0, from the same input;
            - "trigflow": the velocity over sigma_data, as a diffusion model for `TrigFlowPipeline` does.
        vae: the diffusers autoencoder of a latent model; None for a pixel model.
        time_scale: factor of the time label "flow_time" (1000 for diffusers' flow models), by default 1.
        noise_schedule: for "epsilon" and "v_prediction", the settings of diffusers' `DDPMScheduler` that define the
            table of alpha^2, such as {"beta_schedule": "linear"}.

    Raises:
        ValueError: the prediction is unknown, it does not allow the time label, or a noise schedule is missing or not
            used. Or `scheduler` is of another class, or for a network with other settings; this is also checked when
            one is assigned.

    Examples:
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
        """Check and convert `scheduler`, see `ImagePipeline`, and store the network's settings in its config."""
        scheduler = super().accept_scheduler(_as_edm(scheduler))
        return saying(scheduler, {name: self.config[name] for name in DEFAULTS})

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (18,)

    def denoise(
        self, sample: torch.Tensor, sigma: torch.Tensor, condition: Condition | Guidance | torch.Tensor | None
    ) -> torch.Tensor:
        """Estimate the clean sample from a noisy one.

        Args:
            sample: x0 + sigma noise (B, C, H, W), float32, whatever the network predicts. The network's input is
                sample / (1 + sigma) for "flow", sample / sqrt(1 + sigma^2) for "epsilon" and "v_prediction", and
                sample / sqrt(sigma^2 + sigma_data^2) for "edm" and "trigflow".
            sigma: the noise level, above 0, a tensor ().
            condition: the conditioning of the network, with or without guidance; class labels (B,) are also accepted.

        Returns:
            The estimate of x0, float32 (B, C, H, W).
        """
        prediction = self.config.prediction
        given = self._network_input
        edm = prediction in ("edm", "trigflow")  # their outputs differ only in sign
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
        """The input scaling and time label of the network, by the pipeline's config and the scheduler of this call."""
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
        """Apply Heun's correction to `euler`, the result of an Euler step from `sample`.

        A step to level 0 is returned unchanged, because there is no slope at 0.
        """
        now, then = self.scheduler.sigmas[i : i + 2]
        if then == 0:
            return euler
        slope = (sample - denoised) / now  # Karras et al. 2022, algorithm 1, line 4
        slope_then = (euler - self.denoise(euler, then, told)) / then  # line 7
        return heun_end(sample, then - now, slope, slope_then)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """Return `num_inference_steps` Karras levels from `noise_level` to sigma_min; a step to 0 follows them."""
        config = self.scheduler.config
        ramp = np.linspace(0, 1, num_inference_steps)
        return karras_sigma(ramp, config.sigma_min, noise_level, config.rho).tolist()

    def _set_levels(
        self, num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> None:
        """Check the levels of a call, and set them in its scheduler."""
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
                + ("." if sigmas is not None else f", which mean the levels {levels.tolist()}.")
            )
        if (levels[1:] >= levels[:-1]).any():
            raise ValueError(f"`{name}` must fall strictly, got {given}.")
        # diffusers' own argument `sigmas` takes positions on the Karras grid, not levels
        scheduler.set_timesteps(len(levels), device=self._execution_device)
        levels = levels.float()
        scheduler.timesteps = scheduler.precondition_noise(levels).to(self._execution_device)
        scheduler.sigmas = torch.cat([levels, scheduler.sigmas[-1:]])

    def _sde_scheduler(self, order: int) -> EDMDPMSolverMultistepScheduler:
        """Return the diffusers solver of the SDE, at the levels of the pipeline's scheduler."""
        settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
        # `_use_default_values` names settings given by position as well, and from_config would drop them
        config = {**self.scheduler.config, "_use_default_values": []}
        scheduler = EDMDPMSolverMultistepScheduler.from_config(config, **settings)
        own = self.scheduler
        scheduler.set_timesteps(own.num_inference_steps, device=self._execution_device)
        if not torch.allclose(scheduler.sigmas, own.sigmas):  # own levels; on the grid both differ only by rounding
            scheduler.sigmas, scheduler.timesteps = own.sigmas.clone(), own.timesteps
        scheduler.set_begin_index(0)  # no search by timestep: those of `self.scheduler` differ by rounding
        return scheduler

    def _edm_output(self, sample: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the output of an EDM network whose estimate is `denoised`; diffusers solvers take this output."""
        skip = self.scheduler.precondition_outputs(sample, 0, sigma)
        return (denoised - skip) / self.scheduler.precondition_outputs(0, 1, sigma)

    @staticmethod
    def _check_solver(solver: str, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
        """Refuse settings of the solver that are invalid or would have no effect."""
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
        """Generate images.

        Args:
            batch_size: number of images. By default it follows from the other arguments with one entry per image, such
                as `class_labels`, `generator`, `latents` or `image`; else it is 1.
            class_labels: one label for all images, or one per image: integers, or class names if the model has names.
                By default a class-conditional model draws them from `generator`; together with `latents` they are
                required.
            num_inference_steps: number N of Karras levels, 2 or more, 18 by default. Heun calls the network 2 N - 1
                times, the others N times. The SDE solvers need more levels than the ODE solvers. Give at most one of
                this, `sigmas` and `timesteps`.
            solver: "heun", "euler", "ddim" (the same as "euler"), "sde" or "sde_2m".
            s_churn: amount of noise, at least 0, that "heun" and "euler" add before steps. It raises the level of a
                step by the factor 1 + min(s_churn / N, sqrt(2) - 1).
            s_tmin: the lowest level with churn.
            s_tmax: the highest level with churn.
            s_noise: factor of the added noise; slightly above 1 if the network removes too much noise.
            generator: a `torch.Generator` or a seed, or a list with one per image. With a list, each image is
                independent of the rest of the batch.
            latents: unit normal noise (B, C, H, W) to start from, a tensor or an array, instead of noise from
                `generator`.
            output_type: "pil", "np", "pt" or "latent". "np" is an array (B, H, W, C) and "pt" a tensor (B, C, H, W),
                both in [0, 1]. "latent" is the last sample, neither decoded nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step. It can return
                `{"latents": ...}` to replace the sample, and set `pipe._interrupt = True` to end the call early.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives: "latents" (the
                sample) and "pred_original_sample" (the estimate of the clean sample).
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.
            guidance_scale: the weight w of classifier-free guidance. 1 turns guidance off; a larger w moves the images
                further from those of the null class. Guidance doubles the batch of each network call.
            guidance_interval: the lowest and the highest noise level sigma with guidance; by default all levels.
            negative_class_labels: classes to move away from, instead of the null class; in the form of
                `class_labels`.
            sigmas: strictly decreasing noise levels, for example [5, 1, 0.2].
            timesteps: strictly decreasing time labels ln(sigma) / 4 as in `scheduler.timesteps`, instead of `sigmas`.
            image: images to start from instead of pure noise: a tensor (n, C, H, W) or an array (n, H, W, C) in
                [0, 1], or PIL images, of the model's size. One image is for the whole batch.
            noise_level: sigma of the noise that is added to `image`, and the first noise level. The higher it is, the
                more of the image changes. Instead of it you can give other levels, which begin with it.

        Returns:
            An `ImagePipelineOutput` with `images` in the form of `output_type`, or the tuple `(images,)`.

        Raises:
            ValueError: an argument is invalid. This is checked before the network is called.
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
