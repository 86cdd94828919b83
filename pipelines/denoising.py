"""Sampling of diffusion models by the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

from collections.abc import Sequence

import torch
from diffusers import EDMEulerScheduler, ImagePipelineOutput, ModelMixin

from .image_pipeline import Generators, ImagePipeline, StepCallback


# of each prediction, the default one first
TIME_LABELS = {"edm": ("log_sigma", "quarter_log_sigma", "angle"), "flow": ("flow_time",)}


class DenoisingPipeline(ImagePipeline):
    """Images from a diffusion or flow model, unconditional or class-conditional, by deterministic Heun or Euler steps.

    The levels, EDM's preconditioning and the Euler step are those of diffusers' `EDMEulerScheduler`.

    Args:
        unet: the network, called as `unet(sample, label, class_labels=...)`, for example a `UNet2DModel`.
        scheduler: an `EDMEulerScheduler` with the model's `sigma_data` (of which flow models have none).
        time_label: the network's time input, by default the first that the prediction allows: "log_sigma"
            (250 ln sigma), "quarter_log_sigma" (ln(sigma) / 4) or "angle" (atan(sigma / sigma_data)) for "edm",
            "flow_time" (sigma / (1 + sigma)) for "flow".
        prediction: "edm" for a network under EDM's preconditioning; "flow" for one that is given
            x_t = (1 - t) x0 + t noise and predicts noise - x0 (Lipman et al. 2022, arXiv:2210.02747).
        vae: the autoencoder of diffusers in whose latents the network works; None for pixels.

    Raises:
        ValueError: unknown prediction, or a time label that is not one of its own.
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: EDMEulerScheduler,
        time_label: str | None = None,
        prediction: str = "edm",
        vae: ModelMixin | None = None,
    ):
        super().__init__()
        if prediction not in TIME_LABELS:
            raise ValueError(f"prediction must be one of {', '.join(TIME_LABELS)}; got {prediction!r}.")
        labels = TIME_LABELS[prediction]
        time_label = time_label or labels[0]
        if time_label not in labels:
            raise ValueError(
                f"time_label of the prediction {prediction!r} must be one of {', '.join(labels)}; got {time_label!r}."
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(time_label=time_label, prediction=prediction)

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (18,)

    def denoise(self, sample: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The estimate of the clean sample from `sample` (B, C, H, W), float32, at the scalar level `sigma` > 0.

        The sample is x0 + sigma noise whatever the network predicts; a flow model is given sample / (1 + sigma).
        """
        flow_time = sigma / (1 + sigma)
        if self.config.prediction == "flow":
            network_input, label = sample / (1 + sigma), flow_time
        else:
            network_input = self.scheduler.precondition_inputs(sample, sigma)
            factor = {"log_sigma": 250, "quarter_log_sigma": 0.25}.get(self.config.time_label)
            label = (sigma / self.scheduler.config.sigma_data).atan() if factor is None else factor * sigma.log()
        network = network_input.to(self.unet.dtype), label.to(sample.device)
        output = self.unet(*network, class_labels=labels, return_dict=False)[0].float()
        if self.config.prediction == "flow":
            return network_input - flow_time * output
        return self.scheduler.precondition_outputs(sample, output, sigma)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int = 18,
        solver: str = "heun",
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
            num_inference_steps: number of Karras levels N; Heun calls the network 2 N - 1 times, Euler N times.
            solver: "heun" or "euler".
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
        if solver not in ("heun", "euler"):
            raise ValueError(f"solver must be 'heun' or 'euler', got {solver!r}.")
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps must be at least 2, got {num_inference_steps}.")
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        self.scheduler.is_scale_input_called = True  # `denoise` scales the network's input itself
        sigmas = self.scheduler.sigmas

        noise, labels = self.prepare(
            batch_size, class_labels, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        sample = noise.float() * sigmas[0]
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            denoised = self.denoise(sample, sigmas[i], labels)
            euler = self.scheduler.step(denoised, t, sample, pred_original_sample=denoised, return_dict=False)[0]
            if solver == "heun" and sigmas[i + 1] > 0:
                slope = (sample - denoised) / sigmas[i]
                slope_next = (euler - self.denoise(euler, sigmas[i + 1], labels)) / sigmas[i + 1]
                sample = sample + (sigmas[i + 1] - sigmas[i]) * (slope + slope_next) / 2
            else:
                sample = euler
            tensors = {"latents": sample, "pred_original_sample": denoised}
            sample = self.after_step(callback_on_step_end, i, t, tensors, callback_on_step_end_tensor_inputs)[
                "latents"
            ]
        return self.finish(sample, output_type, return_dict)
