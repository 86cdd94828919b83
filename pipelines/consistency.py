"""Sampling of consistency models in one to a few steps."""

import torch
from diffusers import CMStochasticIterativeScheduler, ImagePipelineOutput, ModelMixin, SchedulerMixin

from .arguments import Entries, Generators, Images, Labels, Levels, Samples
from .calls import one_call
from .editing import EditingPipeline
from .image_pipeline import StepCallback


class ConsistencyPipeline(EditingPipeline):
    """Generate images with a consistency model, in one step or several.

    The model is unconditional or class-conditional.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: a `MultistepConsistencyScheduler`. A `CMStochasticIterativeScheduler` of diffusers is converted to
            it.
        vae: the diffusers autoencoder of a latent model; None for a pixel model.

    Raises:
        ValueError: `scheduler` is of another class, or has `in_place_of`. This is also checked when a scheduler is
            assigned.

    Examples:
        >>> from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
        >>> from cm_diffusers.models import build_unet
        >>> unet = build_unet("tiny", (8, 8), 1, num_classes=10)  # or from_pretrained("user/model")
        >>> pipe = ConsistencyPipeline(unet, MultistepConsistencyScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(class_labels=[3, 7], sigmas=[80, 0.8], generator=0).images
        >>> images[0].size
        (8, 8)
        >>> changed = pipe(image=images[0], noise_level=5.0, class_labels=3, generator=1).images[0]
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _schedulers = ("MultistepConsistencyScheduler", "CMStochasticIterativeScheduler")
    _scheduler_class: type[SchedulerMixin] | None = None  # set by the library; None in the file saved with a model

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """Check `scheduler`, see `ImagePipeline`, and convert one of diffusers to the library's class."""
        scheduler = super().accept_scheduler(scheduler)
        if isinstance(scheduler, CMStochasticIterativeScheduler) and self._scheduler_class is not None:
            # `_use_default_values` names settings given by position as well, and from_config would drop them
            return self._scheduler_class.from_config({**scheduler.config, "_use_default_values": []})
        if scheduler.config.get("in_place_of") is not None:
            raise ValueError(
                "This scheduler has in_place_of, so it steps in the scale of diffusers' pipelines. For a"
                " ConsistencyPipeline, construct a MultistepConsistencyScheduler with prediction, noise_schedule,"
                " sigma_min=0 and sigma_max, but without in_place_of."
            )
        return scheduler

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    @torch.no_grad()
    @one_call
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels = None,
        num_inference_steps: int | None = None,
        sigmas: Levels = None,
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
            num_inference_steps: number of steps on the scheduler's grid, 1 by default. Give at most one of this,
                `sigmas` and `timesteps`.
            sigmas: strictly decreasing noise levels, for example [80, 0.8].
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
            timesteps: strictly decreasing time labels as in `scheduler.timesteps`, instead of `sigmas`.
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
        self.set_levels(*self.read_levels(num_inference_steps, sigmas, timesteps, level))
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
            sample = self.encoded(images, noise) + sample
        levels = self.noise_levels
        for i, t in self.steps(self.scheduler.timesteps):
            sample, denoised = self.advance(sample, i, t, levels[i], told, generator=generator)
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, t, tensors, names)
        return self.finish(sample, output_type, return_dict)
