"""The noise levels at which the model of a run is best, found on its images once it is trained."""

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


REAL = 10_000  # images of the run, at most, that samples are compared with
SAMPLES = 2_000  # of each distance
TOLERANCE = 0.2  # of ln sigma
TRIES = 10  # for a level, at most: golden sections of ln(80 / 0.01), which is 9


def check_place(pipeline: DiffusionPipeline, data: ImageData) -> None:
    """Raise ValueError where a model has no place for levels, or its images can't be compared."""
    pipeline = with_our_interface(pipeline)
    if "default_sigmas" not in pipeline.scheduler.config:
        raise ValueError(
            f"search_levels: a {type(pipeline).__name__} samples by diffusers' {type(pipeline.scheduler).__name__},"
            " which has no place for noise levels; those of consistency and trajectory models have."
        )
    if data.vae is not None or data.args.streaming:
        kind = "latents" if data.vae is not None else "a stream"
        raise ValueError(f"search_levels is for images in memory or in files, not for {kind}. evaluate.py can do it.")
    if data.labels is None:
        load_extractor("inception")  # whose weights have to be had


def _rows(data: ImageData) -> list[int]:
    """Which images samples are compared with."""
    return permutation(len(data.images), "search_levels")[:REAL].tolist()


def _extractor(data: ImageData, device: torch.device) -> Extractor:
    """What images are compared by: a small classifier where they are labelled, else Inception."""
    if data.labels is None:
        return load_extractor("inception", device=device)
    rows = _rows(data)
    return load_extractor("classifier", reference=(data.rows(rows).float() / 255, data.labels[rows]), device=device)


def with_better_levels(
    pipeline: DiffusionPipeline, data: ImageData, steps: Sequence[int], device: torch.device
) -> ImagePipeline:
    """The pipeline with levels for so many steps, where they are better than its own on samples of other seeds.

    The Fréchet distance of samples to the images of the run decides. See `core.golden_section.search_levels`.
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
            tqdm.write(f"{n} steps: levels {what}, Fréchet distance {after:.4g} instead of {before:.4g}.")
        else:
            tqdm.write(f"{n} steps: the model's own levels stay, at {before:.4g}; the best others gave {after:.4g}.")
    pipeline.scheduler.register_to_config(default_sigmas=found or None)
    return pipeline


def seconds_of_search(
    pipeline: DiffusionPipeline, data: ImageData, steps: Sequence[int], device: torch.device
) -> float:
    """About how long `with_better_levels` will take at most, by a part of its samples."""
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
