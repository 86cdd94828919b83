"""Search for the best noise levels of a trained model, with the images of its run as the reference."""

import time
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from cm_diffusers.core.draws import permutation
from cm_diffusers.core.golden_section import search_levels
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.evaluation import Extractor, frechet_distance
from cm_diffusers.evaluation.features import load_extractor
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import levels_used, sample_images, with_our_interface


REAL = 10_000  # at most this many images of the run are the reference
SAMPLES = 2_000  # samples for each distance
TOLERANCE = 0.2  # precision of the search in ln sigma
TRIES = 10  # at most, for each level: golden sections of the interval ln(80 / 0.01) = 9


def check_place(pipeline: DiffusionPipeline, data: ImageData) -> None:
    """Check that the levels of a pipeline can be searched.

    Args:
        pipeline: the model.
        data: the images of the run.

    Raises:
        ValueError: the scheduler can't store noise levels, the data are latents or a stream, or Inception is missing.
    """
    pipeline = with_our_interface(pipeline)
    if "default_sigmas" not in pipeline.scheduler.config:
        raise ValueError(
            f"search_levels needs a scheduler that stores noise levels, as consistency and trajectory models have."
            f" This {type(pipeline).__name__} has diffusers' {type(pipeline.scheduler).__name__}."
        )
    if data.vae is not None or data.args.streaming:
        kind = "latents" if data.vae is not None else "a stream"
        raise ValueError(
            f"search_levels can't search on {kind}. Train without it, then use evaluate.py --search_sigmas."
        )
    if data.labels is None:
        load_extractor("inception")  # raises ValueError if its weights are missing


def _rows(data: ImageData) -> list[int]:
    """Indices of the reference images."""
    return permutation(len(data.images), "search_levels")[:REAL].tolist()


def _extractor(data: ImageData, device: torch.device) -> Extractor:
    """The feature extractor: a small classifier trained on labelled images, else Inception."""
    if data.labels is None:
        return load_extractor("inception", device=device)
    rows = _rows(data)
    return load_extractor("classifier", reference=(data.rows(rows).float() / 255, data.labels[rows]), device=device)


def with_better_levels(
    pipeline: DiffusionPipeline, data: ImageData, steps: Sequence[int], device: torch.device
) -> ImagePipeline:
    """Search noise levels for each number of steps, and store those that beat the pipeline's own levels.

    The criterion is the Fréchet distance of samples to the images of the run; see `core.golden_section.search_levels`.
    The final comparison with the pipeline's own levels uses other seeds than the search.

    Args:
        pipeline: the trained model, whose scheduler is changed in place.
        data: the images of the run.
        steps: numbers of sampling steps.
        device: the device to sample on.

    Returns:
        The same model with this library's sampling interface.
    """
    pipeline = with_our_interface(pipeline).to(device)
    pipeline.set_progress_bar_config(disable=True)
    extractor, rows = _extractor(data, device), _rows(data)
    real = torch.cat([extractor(data.rows(rows[i : i + 500]).float() / 255).cpu() for i in range(0, len(rows), 500)])
    config = pipeline.scheduler.config

    def distance(sigmas: Sequence[float], first_seed: int = 0) -> float:
        seeds = range(first_seed, first_seed + SAMPLES)
        made = torch.from_numpy(sample_images(pipeline, seeds, sigmas=list(sigmas))).permute(0, 3, 1, 2)
        bar.update()
        return frechet_distance(extractor(made).cpu(), real)

    found = dict(config.default_sigmas or {})
    for n in steps:
        sample_images(pipeline, range(1), num_inference_steps=n)
        start = [float(f"{sigma:.6g}") for sigma in levels_used(pipeline)]
        with tqdm(desc=f"Levels of {n} steps", unit="try", leave=False) as bar:
            lowest = max(config.sigma_min, config.sigma_data / 50)
            levels, _ = search_levels(distance, start, lowest, TOLERANCE, sweeps=1)
            before, after = (distance(sigmas, SAMPLES) for sigmas in (start, levels))
        what = ", ".join(f"{sigma:.4g}" for sigma in levels)
        if after < before:
            found[str(n)] = levels
            tqdm.write(f"{n} steps: levels {what} lower the Fréchet distance from {before:.4g} to {after:.4g}.")
        else:
            tqdm.write(
                f"{n} steps: the model keeps its own levels with Fréchet distance {before:.4g}; the search reached"
                f" {after:.4g}."
            )
    pipeline.scheduler.register_to_config(default_sigmas=found or None)
    return pipeline


def seconds_of_search(
    pipeline: DiffusionPipeline, data: ImageData, steps: Sequence[int], device: torch.device
) -> float:
    """Estimate the longest time of `with_better_levels` with the same arguments, from a tenth of the samples."""
    pipeline, begin = with_our_interface(pipeline).to(device), time.perf_counter()
    pipeline.set_progress_bar_config(disable=True)
    _extractor(data, device)
    seconds, some = time.perf_counter() - begin, 200
    for n in steps:
        begin = time.perf_counter()
        sample_images(pipeline, range(some), num_inference_steps=n)
        tries = 3 + TRIES * (n - 1)
        seconds += tries * (time.perf_counter() - begin) * SAMPLES / some
    return seconds
