"""Loading saved models, sampling images and drawing grids, for the engine, the scripts and the demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from cm_diffusers.lookup import looked_up
from cm_diffusers.pipelines import (
    ConsistencyPipeline,
    CTMPipeline,
    DenoisingPipeline,
    MeanFlowPipeline,
    TrigFlowPipeline,
)
from cm_diffusers.pipelines.image_pipeline import ImagePipeline


OURS = (ConsistencyPipeline, DenoisingPipeline, TrigFlowPipeline, MeanFlowPipeline, CTMPipeline)
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
CAPTION = 12  # height of a caption in pixels
PIPELINES = {"ConsistencyModelPipeline": ConsistencyPipeline, **{cls.__name__: cls for cls in OURS}}


def load_pipeline(
    name_or_path: str, revision: str | None = None, kinds: Mapping[str, type] = PIPELINES, **kwargs
) -> ImagePipeline:
    """Load a saved model from a folder or the Hub; stock consistency models get our pipeline.

    Args:
        name_or_path: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        kinds: pipeline classes to load, by the class names in saved models.
        kwargs: arguments of `from_pretrained`.

    Raises:
        ValueError: there is no such model, its class is not in `kinds`, or it can't be loaded.
    """
    if Path(name_or_path).exists() and not (Path(name_or_path) / "model_index.json").is_file():
        inside = Path(name_or_path) / "pipeline"
        hint = f" Its model is {str(inside)!r}." if (inside / "model_index.json").is_file() else ""
        if (Path(name_or_path) / LORA_FILE).is_file():
            hint = " It is a LoRA: its card shows how diffusers loads it beside its base model."
        raise ValueError(f"{name_or_path!r} is not a model: it has no model_index.json.{hint}")
    _check_links(Path(name_or_path))
    try:
        with looked_up(name_or_path, revision=revision) as cached:
            config = DiffusionPipeline.load_config(name_or_path, revision=revision, local_files_only=cached)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model {name_or_path!r} can't be loaded: {error}") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        text = isinstance(config, dict) and any(key.startswith(("text_", "tokenizer")) for key in config)
        why = ", which is conditioned on text" if text else ""
        hint = ""
        if text and "StableDiffusionPipeline" not in kinds:
            hint = (
                " Sample a text-to-image model with diffusers itself, as its card shows; to distil one, give it as"
                " --pretrained_teacher_model."
            )
        raise ValueError(f"model {name_or_path!r} is a {kind}{why}; this version reads {', '.join(kinds)}.{hint}")
    try:
        return kinds[kind].from_pretrained(
            name_or_path, revision=revision, use_safetensors=True, local_files_only=cached, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {name_or_path!r} can't be loaded: {error}") from error


def _check_links(folder: Path) -> None:
    """Check that no link leads out of `folder`, except to the Hub's cache around it.

    Raises:
        ValueError: a link leads elsewhere.
    """
    home = folder.resolve()
    allowed = (home, home.parent.parent / "blobs")
    for path in folder.rglob("*"):
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"model {str(folder)!r}: {path} is a link out of the folder, to {target}. Replace it by a copy."
            )


def with_our_interface(pipeline: DiffusionPipeline) -> ImagePipeline:
    """Return `pipeline` itself, or a `ConsistencyPipeline` with the parts of a stock consistency pipeline."""
    if isinstance(pipeline, ConsistencyModelPipeline):
        return ConsistencyPipeline(pipeline.unet, pipeline.scheduler)
    return pipeline


def labels_in_turn(pipeline: ImagePipeline, seeds: Sequence[int]) -> list[int] | None:
    """One label for each of `seeds`, cycling through the classes of `pipeline` that have images.

    None for an unconditional model.
    """
    return None if pipeline.num_classes is None else [pipeline.classes[s % len(pipeline.classes)] for s in seeds]


def label_of(pipeline: ImagePipeline, word: str) -> int:
    """The class label that `word` gives as a number or by its name in `pipeline`; a number is always a label."""
    return int(word) if word.removeprefix("-").isdecimal() else pipeline.get_label_ids(word)[0]


def captions_of(pipeline: ImagePipeline, labels: Sequence[int] | None) -> list[str] | None:
    """Captions for `labels`: their names in `pipeline`, else their numbers. None if `labels` is None."""
    return None if labels is None else [(pipeline.id2label or {}).get(label, str(label)) for label in labels]


def sample_images(
    pipeline: ImagePipeline,
    seeds: range,
    class_labels: list[int] | None = None,
    batch_size: int = 250,
    **kwargs,
) -> np.ndarray:
    """Sample images (N, H, W, C) in [0, 1], one per seed; an image depends on its own seed only, not on the batch.

    Args:
        pipeline: the model.
        seeds: one seed per image.
        class_labels: one label per image; by default labels cycle through the classes that have images.
        batch_size: maximum number of images in a batch.
        kwargs: further arguments of the pipeline, such as `num_inference_steps`, `sigmas` or `solver`.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        part = seeds[start : start + batch_size]
        labels = class_labels[start : start + len(part)] if class_labels else labels_in_turn(pipeline, part)
        generators = [torch.Generator().manual_seed(seed) for seed in part]
        output = pipeline(class_labels=labels, generator=generators, batch_size=len(part), output_type="np", **kwargs)
        images.append(output.images)
    return np.concatenate(images)


def levels_used(pipeline: ImagePipeline) -> list[float]:
    """The noise levels at which the steps of the last call of `pipeline` started."""
    return list(dict.fromkeys(pipeline.noise_levels[:-1]))  # Heun's method repeats some levels


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert `image` (H, W, C) in [0, 1] to a Pillow image.

    Raises:
        ValueError: C is neither 1 nor 3.
    """
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"An image of {image.shape[-1]} channels can't be shown; it must have 1 or 3.")
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_grid(
    images: Sequence[np.ndarray], columns: int, min_side: int = 64, captions: Sequence[str] | None = None
) -> Image.Image:
    """Draw images as a grid in one picture.

    Args:
        images: (N, H, W, C) in [0, 1], all of one size, C 1 or 3.
        columns: number of images per row.
        min_side: smaller images are enlarged, by a whole factor and without smoothing, to at least this many pixels.
        captions: one text per image, drawn below it and cut to its width.
    """
    pictures = [to_pil(image).convert("RGB") for image in images]
    line = 0 if captions is None else CAPTION
    scale = max(1, -(-min_side // min(pictures[0].size)))
    width, height = (side * scale for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * (width + 2), -(-len(pictures) // columns) * (height + 2 + line)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        left, top = column * (width + 2), row * (height + 2 + line)
        sheet.paste(enlarged, (left, top))
        if captions is not None:
            draw.text((left, top + height), _cut(captions[i], font, width), fill="black", font=font)
    return sheet


def _cut(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """Shorten the text, on one line, to `width` pixels."""
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")  # every default font has these
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
