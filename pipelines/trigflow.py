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
    """Images from a TrigFlow model, unconditional or class-conditional (Lu & Song 2024, arXiv:2410.11081).

    Args:
        unet: the network, called as `unet(sample / sigma_data, angle, class_labels=...)`.
        scheduler: a `TrigFlowScheduler`; its solver says whether this is a consistency model or a diffusion model.
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.

    Raises:
        ValueError: another scheduler, here or when one is assigned.

    Example:
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
        """See `ImagePipeline`: angles t sqrt(1 - k / n) of a consistency model; a Karras grid for the solvers."""
        scheduler = self.scheduler
        if scheduler.config.solver == "consistency":
            angles = scheduler.sigma_to_timestep(noise_level) * np.sqrt(
                1 - np.arange(num_inference_steps) / num_inference_steps
            )
            return [noise_level, *scheduler.timestep_to_sigma(angles)[1:].tolist()]
        return super().levels_below(noise_level, num_inference_steps)

    def jumping(self) -> dict[str, Any]:
        """See `EditingPipeline`: diffusion models don't jump."""
        if self.scheduler.config.solver != "consistency":
            raise ValueError(
                "Editing jumps to clean images, and by its solver this is a diffusion model, which can't. To begin"
                " with an image, call the pipeline with image and noise_level."
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
        """Make images.

        Args:
            batch_size: how many; by default as many as there are class labels, generators or latents, else 1.
            class_labels: one label for all or one per image, or names of classes where the model knows them; drawn
                from `generator` where the model wants some and neither they nor `latents` are given.
            num_inference_steps: the number of levels, of the scheduler's choice: 1 (the default) or more for a
                consistency model, 2 or more (18) for a diffusion model; or else
            sigmas: the noise levels, falling, for example [80, 0.8]; the first may be inf; or else
            timesteps: the same as angles atan(sigma / sigma_data) in (0, pi/2], for example [1.5645, 1.1].
            solver: "heun" or "euler" instead of a diffusion model's own. Heun calls the network 2 N - 1 times for N
                levels, Euler N times.
            generator: a generator or a seed, or one per image (then an image does not depend on the others of the
                batch).
            latents: unit normal noise (batch_size, C, H, W), a tensor or an array, instead of noise from `generator`.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (as it is).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step, from one level
                to the next; what it returns replaces the tensors, and `pipe._interrupt = True` ends the call.
            callback_on_step_end_tensor_inputs: which tensors it sees: "latents", "pred_original_sample".
            condition: what else the network is told, tensors (batch_size, ...) by the names that it has for them.
            guidance_scale: w of classifier-free guidance: 1 is none, more leads further away from what the network
                makes of no class, by two samples in each network call.
            guidance_interval: the lowest and the highest noise level at which there is guidance; all by default.
            negative_class_labels: classes to be led away from instead of none, given as class_labels are.
            image: what to begin with instead of pure noise, one for all or one per image: a tensor (n, C, H, W) or an
                array (n, H, W, C) in [0, 1], or PIL, of the model's size.
            noise_level: sigma, of the noise that it gets, and of the first step: the higher, the more is made anew.
                Other levels, whose first one it is, may stand for it.

        Returns:
            `ImagePipelineOutput` with `.images`.

        Raises:
            ValueError: an argument that can't be meant, before the network is called.
        """
        images, level = self.read_start(image, noise_level, sigmas, timesteps)
        self.set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level), solver=solver)
        scheduler = self.scheduler
        if images is not None and scheduler.sigmas[0] == math.inf:
            raise ValueError("An image with noise of an infinite level is no more than noise; leave the image out.")
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
            for t, sigma in calls[order * i : order * (i + 1)]:  # two of Heun, but for the last step
                sample, denoised = self.advance(sample, i, t, sigma, told, generator=generator)
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, began, tensors, names)
        return self.finish(sample, output_type, return_dict)
