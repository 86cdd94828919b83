"""A pipeline's sampling as one module of tensors in and tensors out, for tracers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.core.conditions import Condition, of_classes
from cm_diffusers.core.guidance import Guidance
from cm_diffusers.pipelines import ConsistencyPipeline, CTMPipeline, MeanFlowPipeline, TrigFlowPipeline
from cm_diffusers.pipelines.class_names import null_class
from cm_diffusers.pipelines.image_pipeline import ImagePipeline


class Sampler(nn.Module):
    """Images of a model that jumps, from all of their noise: what a call of the pipeline computes, and no more.

    The steps are the pipeline's own, with its levels as constants. `forward` takes float32 tensors but for the labels:

    - `noise` (B, C, H, W), unit normal, from which the images come;
    - `renoise` (steps - 1, B, C, H, W), unit normal, what the steps add but for the last one; where they add none (one
      step, mean flows, gamma 0) there is no such input;
    - `class_labels` (B,), int64, of conditional models;
    - `guidance_scale` (), where guidance is built in; each call of the network is one of 2B samples then.

    It gives images (B, C, H, W) in [0, 1], decoded where the model is one of latents.

    Args:
        pipeline: of a model that jumps.
        guidance: build guidance in, away from the class that stands for none.
        **levels: `num_inference_steps` or `sigmas`, and `gamma` of trajectory models.

    Raises:
        ValueError: another kind of model, levels that can't be meant, or guidance where the model knows no null class.
    """

    def __init__(self, pipeline: ImagePipeline, guidance: bool = False, **levels: Any):
        super().__init__()
        if not isinstance(pipeline, (ConsistencyPipeline, CTMPipeline, MeanFlowPipeline, TrigFlowPipeline)):
            raise ValueError(
                f"A {type(pipeline).__name__} calls its network tens of times for an image; what is exported are"
                " models that jump. Distil it first (--method ecd, scd, ctm)."
            )
        if isinstance(pipeline, TrigFlowPipeline) and pipeline.scheduler.config.solver != "consistency":
            raise ValueError(
                "By its solver this TrigFlowPipeline is a diffusion model, which calls its network tens of times for"
                " an image; what is exported are models that jump. Distil it first (--method scd)."
            )
        self.pipeline, self.unet, self.vae = copy.copy(pipeline), pipeline.unet, pipeline.vae
        self.null = null_class(pipeline.unet) if guidance else None
        if guidance and self.null is None:
            raise ValueError("guidance needs a class that stands for none; train the model with --label_dropout 0.1.")
        if not levels.keys() & {"num_inference_steps", "sigmas"}:
            levels["num_inference_steps"] = pipeline.default_steps[0]
        self.pipeline.scheduler = copy.copy(pipeline.scheduler)
        self.pipeline.set_levels(**{"num_inference_steps": None, **levels})
        self.scheduler = self.pipeline.scheduler  # which no step changes
        self.noise_levels = self.pipeline.noise_levels[:-1]
        self.first = float(self.pipeline.begun(torch.ones(())))
        gamma = getattr(self.scheduler, "gamma", 0.0 if isinstance(pipeline, MeanFlowPipeline) else 1.0)
        self.renoises = len(self.noise_levels) - 1 if gamma > 0 else 0
        with torch.no_grad():
            self(**self.example(1))  # by which schedulers get their numbers, which tracers can't compute

    def example(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Inputs for `forward`, by their names."""
        shape = (batch_size, *self.pipeline.sample_shape)
        inputs = {"noise": torch.randn(shape)}
        if self.renoises:
            inputs["renoise"] = torch.randn(self.renoises, *shape)
        classes = self.pipeline.classes
        if classes is not None:
            inputs["class_labels"] = torch.tensor([classes[i % len(classes)] for i in range(batch_size)])
        if self.null is not None:
            inputs["guidance_scale"] = torch.tensor(1.5)
        return inputs

    def forward(
        self,
        noise: Tensor,
        renoise: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        told: Condition | Guidance = of_classes(class_labels)
        if guidance_scale is not None:
            away = told.also(class_labels=torch.full_like(class_labels, self.null))
            told = Guidance(told, away, guidance_scale)
        pipeline = self.pipeline
        pipeline.__dict__["scheduler"] = copy.copy(self.scheduler)
        timesteps, sample = self.scheduler.timesteps.unbind(), noise * self.first
        for i, (timestep, sigma) in enumerate(zip(timesteps, self.noise_levels)):
            given = {} if renoise is None or i + 1 == len(timesteps) else {"variance_noise": renoise[i]}
            sample, _ = pipeline.advance(sample, i, timestep, sigma, told, **given)
        images = sample if pipeline.vae is None else pipeline.decode(sample)
        return (images / 2 + 0.5).clamp(0, 1)
