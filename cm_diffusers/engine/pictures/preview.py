"""Sample grids of a pipeline, drawn without touching the randomness of a run."""

from pathlib import Path

from diffusers import DiffusionPipeline

from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.pictures.curves import titled_row
from cm_diffusers.sampling import captions_of, image_grid, labels_in_turn, sample_images, with_our_interface


def save_preview(pipeline: DiffusionPipeline, path: Path, count: int = 40, columns: int = 10) -> None:
    """A picture of `count` samples by each of the usual numbers of steps: 1 and 2, or 18 for diffusion models."""
    pipeline = with_our_interface(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    panels, captions = [], captions_of(pipeline, labels_in_turn(pipeline, range(count)))
    for n in pipeline.default_steps:
        images = sample_images(pipeline, range(count), num_inference_steps=n)
        if images.shape[-1] not in (1, 3):
            return  # latents have no picture
        panels.append((f"{n} step{'s' if n > 1 else ''}", image_grid(images, columns, captions=captions)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        titled_row(panels).save(aside)
