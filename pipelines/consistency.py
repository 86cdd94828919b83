"""Sampling of consistency models in one to a few steps."""

import torch
from diffusers import CMStochasticIterativeScheduler, ImagePipelineOutput, ModelMixin, SchedulerMixin

from .arguments import Entries, Generators, Images, Labels, Levels, Samples
from .calls import one_call
from .editing import EditingPipeline
from .image_pipeline import StepCallback


class ConsistencyPipeline(EditingPipeline):
    """Images from a consistency model, unconditional or class-conditional, in 1, 2, ... steps.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: a `MultistepConsistencyScheduler`; diffusers' `CMStochasticIterativeScheduler` is converted to it.
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.

    Raises:
        ValueError: another scheduler, here or when one is assigned.

    Example:
        >>> from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
        >>> from cm_diffusers.models import build_unet
        >>> unet = build_unet("tiny", (8, 8), 1, num_classes=10)  # or from_pretrained("user/model")
        >>> pipe = ConsistencyPipeline(unet, MultistepConsistencyScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(class_labels=[3, 7], sigmas=[80, 0.8], generator=0).images
        >>> images[0].size
        (8, 8)
        >>> anew = pipe(image=images[0], noise_level=5.0, class_labels=3, generator=1).images[0]
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _schedulers = ("MultistepConsistencyScheduler", "CMStochasticIterativeScheduler")
    _scheduler_class: type[SchedulerMixin] | None = None  # set where the library is installed; None in a lone file

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """See `ImagePipeline`: a stock one is converted."""
        scheduler = super().accept_scheduler(scheduler)
        if isinstance(scheduler, CMStochasticIterativeScheduler) and self._scheduler_class is not None:
            # settings given by position stand among `_use_default_values`, which from_config would leave out
            return self._scheduler_class.from_config({**scheduler.config, "_use_default_values": []})
        if scheduler.config.get("in_place_of") is not None:
            raise ValueError(
                "This scheduler, made from_config of a stock one, steps in the scale of diffusers' pipelines. For a"
                " ConsistencyPipeline give MultistepConsistencyScheduler its prediction, noise_schedule, sigma_min=0"
                " and sigma_max instead."
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
        """Make images.

        Args:
            batch_size: how many; by default as many as there are class labels, generators or latents, else 1.
            class_labels: one label for all or one per image, or names of classes where the model knows them; drawn
                from `generator` where the model wants some and neither they nor `latents` are given.
            num_inference_steps: 1 (the default) or more steps on the scheduler's grid; or else
            sigmas: the noise levels, falling, for example [80, 0.8].
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
            timesteps: the levels by the times of `scheduler.timesteps`, instead of sigmas.
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
