"""Sample grids of a pipeline, drawn without a change of the run's random state."""

from pathlib import Path

from diffusers import DiffusionPipeline

from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.pictures.curves import titled_row
from cm_diffusers.sampling import captions_of, image_grid, labels_in_turn, sample_images, with_our_interface


def save_preview(pipeline: DiffusionPipeline, path: Path, count: int = 40, columns: int = 10) -> None:
    """Draw sample grids for each default number of steps of the model: 1 and 2, or 18 for diffusion models.

    Args:
        pipeline: the model; nothing is drawn for a model of latents without an autoencoder.
        path: the image file to write.
        count: samples in each grid.
        columns: columns of each grid.
    """
    pipeline = with_our_interface(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    panels, captions = [], captions_of(pipeline, labels_in_turn(pipeline, range(count)))
    for n in pipeline.default_steps:
        images = sample_images(pipeline, range(count), num_inference_steps=n)
        if images.shape[-1] not in (1, 3):
            return  # latents can't be drawn
        panels.append((f"{n} step{'s' if n > 1 else ''}", image_grid(images, columns, captions=captions)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        titled_row(panels).save(aside)
