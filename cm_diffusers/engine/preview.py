"""Sample grids of a pipeline, drawn without touching the randomness of a run."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from torch import nn

from cm_diffusers.engine.pictures import image_grid, titled_row
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.pipelines.image_pipeline import ImagePipeline


def with_our_interface(pipeline: DiffusionPipeline) -> ImagePipeline:
    """The pipeline itself, or ours over the parts of the stock one."""
    if isinstance(pipeline, ConsistencyModelPipeline):
        return ConsistencyPipeline(pipeline.unet, pipeline.scheduler)
    return pipeline


def with_vae(pipeline: DiffusionPipeline, vae: nn.Module) -> ImagePipeline:
    """The pipeline of a network of latents, decoding them; stock ones become ours. Latents are not clipped."""
    pipeline = with_our_interface(pipeline)
    pipeline.register_modules(vae=vae)
    if "clip_denoised" in pipeline.scheduler.config:
        pipeline.scheduler.register_to_config(clip_denoised=False)
    return pipeline


def sample_images(
    pipeline: ImagePipeline,
    seeds: range,
    class_labels: list[int] | None = None,
    batch_size: int = 250,
    **kwargs,
) -> np.ndarray:
    """Images (N, H, W, C) in [0, 1], one per seed: an image depends on its own seed only, not on the batch.

    Args:
        pipeline: the model.
        seeds: one seed per image.
        class_labels: one label per image; by default they go round the classes.
        batch_size: how many are made at once.
        kwargs: steps of the sampler, `num_inference_steps`, `sigmas`, `solver`.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        part = seeds[start : start + batch_size]
        labels = None
        if pipeline.num_classes is not None:
            labels = [
                (class_labels[start + i] if class_labels else s % pipeline.num_classes) for i, s in enumerate(part)
            ]
        generators = [torch.Generator().manual_seed(seed) for seed in part]
        output = pipeline(class_labels=labels, generator=generators, batch_size=len(part), output_type="np", **kwargs)
        images.append(output.images)
    return np.concatenate(images)


def save_preview(pipeline: DiffusionPipeline, path: Path, count: int = 40, columns: int = 10) -> None:
    """A picture of `count` samples by each of the usual numbers of steps: 1 and 2, or 18 for diffusion models."""
    pipeline = with_our_interface(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    panels = []
    for n in pipeline.default_steps:
        images = sample_images(pipeline, range(count), num_inference_steps=n)
        if images.shape[-1] not in (1, 3):
            return  # latents have no picture
        panels.append((f"{n} step{'s' if n > 1 else ''}", image_grid(images, columns)))
    path.parent.mkdir(parents=True, exist_ok=True)
    titled_row(panels).save(path)
