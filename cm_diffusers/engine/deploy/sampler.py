"""The sampling of a pipeline as one traceable module with tensor inputs and outputs."""

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
    """A module that computes the images of a consistency, trajectory or mean-flow model from all of their noise.

    It takes the steps of the pipeline, with the noise levels as constants. The inputs of `forward` are:

    - `noise` (B, C, H, W), float32, unit normal: the start of sampling;
    - `renoise` (steps - 1, B, C, H, W), float32, unit normal: the noise that each step but the last adds. This input
      does not exist if no noise is added: with one step, for mean flows, and for gamma 0;
    - `class_labels` (B,), int64: only for conditional models;
    - `guidance_scale` (), float32: only with guidance, which makes each call of the network one of 2B samples.

    The output is images (B, C, H, W) in [0, 1], decoded if the model generates latents.

    Args:
        pipeline: a pipeline of a consistency, trajectory or mean-flow model.
        guidance: include classifier-free guidance, away from the null class.
        **levels: `num_inference_steps` or `sigmas`, and `gamma` of trajectory models.

    Raises:
        ValueError: another kind of model, invalid levels, or guidance for a model without a null class.
    """

    def __init__(self, pipeline: ImagePipeline, guidance: bool = False, **levels: Any):
        super().__init__()
        if not isinstance(pipeline, (ConsistencyPipeline, CTMPipeline, MeanFlowPipeline, TrigFlowPipeline)):
            raise ValueError(
                f"A {type(pipeline).__name__} calls its network tens of times for an image. Only consistency,"
                " trajectory and mean-flow models can be exported. Distil it first (--method ecd, scd, ctm)."
            )
        if isinstance(pipeline, TrigFlowPipeline) and pipeline.scheduler.config.solver != "consistency":
            raise ValueError(
                "By its solver this TrigFlowPipeline is a diffusion model, which calls its network tens of times for"
                " an image. Only consistency, trajectory and mean-flow models can be exported. Distil it first"
                " (--method scd)."
            )
        self.pipeline, self.unet, self.vae = copy.copy(pipeline), pipeline.unet, pipeline.vae
        self.null = null_class(pipeline.unet) if guidance else None
        if guidance and self.null is None:
            raise ValueError("guidance needs a model with a null class. Train the model with --label_dropout 0.1.")
        if not levels.keys() & {"num_inference_steps", "sigmas"}:
            levels["num_inference_steps"] = pipeline.default_steps[0]
        self.pipeline.scheduler = copy.copy(pipeline.scheduler)
        self.pipeline.set_levels(**{"num_inference_steps": None, **levels})
        self.scheduler = self.pipeline.scheduler  # no step changes this one
        self.noise_levels = self.pipeline.noise_levels[:-1]
        self.first = float(self.pipeline.begun(torch.ones(())))
        gamma = getattr(self.scheduler, "gamma", 0.0 if isinstance(pipeline, MeanFlowPipeline) else 1.0)
        self.renoises = len(self.noise_levels) - 1 if gamma > 0 else 0
        with torch.no_grad():
            self(**self.example(1))  # schedulers compute their constants here, which tracers can't do

    def example(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Example inputs for `forward` by their names, with B = `batch_size`; the class states the shapes (B, ...)."""
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
        """Generate images (B, C, H, W) in [0, 1]; the class describes the inputs.

        Args:
            noise: the start of sampling (B, C, H, W).
            renoise: noise between the steps (steps - 1, B, C, H, W).
            class_labels: (B,), for conditional models.
            guidance_scale: (), for samplers with guidance.
        """
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
