"""Sampling of consistency models in one to a few steps."""

from collections.abc import Sequence

import torch
from diffusers import CMStochasticIterativeScheduler, ImagePipelineOutput, ModelMixin, SchedulerMixin

from .image_pipeline import Generators, ImagePipeline, StepCallback


class ConsistencyPipeline(ImagePipeline):
    """Images from a consistency model, unconditional or class-conditional, in 1, 2, ... steps.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: a `MultistepConsistencyScheduler`; diffusers' `CMStochasticIterativeScheduler` is converted to it.
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _scheduler_class: type[SchedulerMixin] | None = None  # set where the library is installed; None in a lone file

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        if isinstance(scheduler, CMStochasticIterativeScheduler) and self._scheduler_class is not None:
            scheduler = self._scheduler_class.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (1, 2)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Make images.

        Args:
            batch_size: how many; by default as many as there are class labels, generators or latents, else 1.
            class_labels: one label for all or one per image; drawn from `generator` where the model wants some and
                none are given.
            num_inference_steps: 1 (the default) or more steps on the scheduler's grid; or else
            sigmas: the noise levels, falling, for example [80, 0.8].
            generator: a generator, or one per image (then an image does not depend on the others of the batch).
            latents: unit normal noise (batch_size, C, H, W) instead of noise from `generator`.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent" (as it is).
            return_dict: give an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors.
            callback_on_step_end_tensor_inputs: which tensors it sees: "latents", "pred_original_sample".

        Returns:
            `ImagePipelineOutput` with `.images`.
        """
        if num_inference_steps is None and sigmas is None:
            num_inference_steps = self.default_steps[0]
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, sigmas=sigmas)
        noise, labels = self.prepare(
            batch_size, class_labels, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        sample = noise.float() * self.scheduler.init_noise_sigma  # float32 between the steps, whatever the weights
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            network_input = self.scheduler.scale_model_input(sample, t).to(noise.dtype)
            output = self.unet(network_input, t, class_labels=labels, return_dict=False)[0]
            sample, denoised = self.scheduler.step(output.float(), t, sample, generator, return_dict=False)
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, t, tensors, callback_on_step_end_tensor_inputs)[
                "latents"
            ]
        return self.finish(sample, output_type, return_dict)
