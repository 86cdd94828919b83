"""Sampling of TrigFlow models: consistency models in one to a few steps, diffusion models by their ODE."""

import math
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin

from .arguments import Entries, Generators, Images, Labels, Levels, Samples
from .calls import one_call
from .editing import EditingPipeline
from .image_pipeline import StepCallback


class TrigFlowPipeline(EditingPipeline):
    """Generate images with a TrigFlow model (Lu & Song 2024, arXiv:2410.11081).

    The model is unconditional or class-conditional. A consistency model needs one step or a few; a diffusion model
    follows the probability-flow ODE.

    Args:
        unet: the network, called as `unet(sample / sigma_data, angle, class_labels=...)`.
        scheduler: a `TrigFlowScheduler`. Its `solver` is "consistency" for a consistency model, and "euler" or "heun"
            for a diffusion model.
        vae: the diffusers autoencoder of a latent model; None for a pixel model.

    Raises:
        ValueError: `scheduler` is of another class. This is also checked when one is assigned.

    Examples:
        >>> from cm_diffusers import TrigFlowPipeline, TrigFlowScheduler
        >>> from cm_diffusers.models import build_unet
        >>> unet = build_unet("jvp_tiny", (8, 8), 3)  # or from_pretrained("user/model")
        >>> pipe = TrigFlowPipeline(unet, TrigFlowScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=2, generator=0, output_type="pt").images.shape
        torch.Size([2, 3, 8, 8])
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _schedulers = ("TrigFlowScheduler",)

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2) if self.scheduler.config.solver == "consistency" else (18,)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """Return `num_inference_steps` noise levels from `noise_level`, strictly decreasing.

        For a consistency model they are at the angles t sqrt(1 - k / n); for a diffusion model, on a Karras grid.
        """
        scheduler = self.scheduler
        if scheduler.config.solver == "consistency":
            angles = scheduler.sigma_to_timestep(noise_level) * np.sqrt(
                1 - np.arange(num_inference_steps) / num_inference_steps
            )
            return [noise_level, *scheduler.timestep_to_sigma(angles)[1:].tolist()]
        return super().levels_below(noise_level, num_inference_steps)

    def jumping(self) -> dict[str, Any]:
        """Return the arguments of a call that jumps to clean images, see `EditingPipeline`.

        Raises:
            ValueError: this is a diffusion model, which does not jump.
        """
        if self.scheduler.config.solver != "consistency":
            raise ValueError(
                "Editing jumps to clean images. By the solver of its scheduler this is a diffusion model, which can't."
                " To start from an image, call the pipeline with image and noise_level."
            )
        return {}

    @torch.no_grad()
    @one_call
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        sigmas: Levels = None,
        timesteps: Levels = None,
        solver: str | None = None,
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
            num_inference_steps: number N of levels, which the scheduler chooses: at least 1 for a consistency model
                (default 1), at least 2 for a diffusion model (default 18). Give at most one of this, `sigmas` and
                `timesteps`.
            sigmas: strictly decreasing noise levels, for example [80, 0.8]. The first can be inf.
            timesteps: the levels as angles atan(sigma / sigma_data) in (0, pi/2], for example [1.5645, 1.1].
            solver: "heun" or "euler", instead of the scheduler's solver of a diffusion model. Heun calls the network
                2 N - 1 times for N levels, Euler N times.
            generator: a `torch.Generator` or a seed, or a list with one per image. With a list, each image is
                independent of the rest of the batch.
            latents: unit normal noise (B, C, H, W) to start from, a tensor or an array, instead of noise from
                `generator`.
            output_type: "pil", "np", "pt" or "latent". "np" is an array (B, H, W, C) and "pt" a tensor (B, C, H, W),
                both in [0, 1]. "latent" is the last sample, neither decoded nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step from one level to
                the next. It can return `{"latents": ...}` to replace the sample, and set `pipe._interrupt = True` to
                end the call early.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback receives: "latents" (the
                sample) and "pred_original_sample" (the estimate of the clean sample).
            condition: further conditioning of the network, tensors (B, ...) by the names of its arguments.
            guidance_scale: the weight w of classifier-free guidance. 1 turns guidance off; a larger w moves the images
                further from those of the null class. Guidance doubles the batch of each network call.
            guidance_interval: the lowest and the highest noise level sigma with guidance; by default all levels.
            negative_class_labels: classes to move away from, instead of the null class; in the form of
                `class_labels`.
            image: images to start from instead of pure noise: a tensor (n, C, H, W) or an array (n, H, W, C) in
                [0, 1], or PIL images, of the model's size. One image is for the whole batch.
            noise_level: sigma of the noise that is added to `image`, and the first noise level. The higher it is, the
                more of the image changes. Instead of it you can give other levels, which begin with it.

        Returns:
            An `ImagePipelineOutput` with `images` in the form of `output_type`, or the tuple `(images,)`.

        Raises:
            ValueError: an argument is invalid. This is checked before the network is called.
        """
        images, level = self.read_start(image, noise_level, sigmas, timesteps)
        self.set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level), solver=solver)
        scheduler = self.scheduler
        if images is not None and scheduler.sigmas[0] == math.inf:
            raise ValueError(
                "At an infinite noise level nothing of the image remains. Leave image out, or start lower."
            )
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
        sample = self.begun(noise)
        if images is not None:
            sample = scheduler.add_noise(self.encoded(images, noise), noise.float(), sigmas=scheduler.sigmas[0])
        order, calls = scheduler.order, list(zip(scheduler.timesteps.unbind(), self.noise_levels))
        for i, began in self.steps(scheduler.timesteps[::order]):
            for t, sigma in calls[order * i : order * (i + 1)]:  # Heun has two calls per step, but one in the last
                sample, denoised = self.advance(sample, i, t, sigma, told, generator=generator)
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, began, tensors, names)
        return self.finish(sample, output_type, return_dict)
