"""Images measured against one dataset by any number of processes."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.evaluation import Extractor, Reference, frechet_distance, measure
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import levels_used, sample_images


class Clock(Counter):
    """Seconds by what was done in them, beside those since it was made."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in self.items()} | {
            "total": round(time.perf_counter() - self.start, 2)
        }

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] += time.perf_counter() - start


@dataclass(frozen=True)
class JudgedImages:
    """Where images to be judged come from.

    Args:
        name: what a result calls it: "2 steps", "sigmas 80, 0.8", or "images".
        images: gives the images (B, C, H, W) in [0, 1] of these numbers: seeds, or places in a dataset.
        facts: what a result says of it beside its name.
    """

    name: str
    images: Callable[[range], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def sampler(
    pipeline: ImagePipeline, name: str, levels: dict[str, Any], how: dict[str, Any] | None = None
) -> JudgedImages:
    """The images that a model makes, one per seed. One is made at once, so that what it can't do is known at once.

    Args:
        pipeline: the model.
        name: what a result calls it.
        levels: `num_inference_steps` or `sigmas`.
        how: what else the pipeline is told: guidance, solver, gamma.

    Raises:
        ValueError: a model that takes no such arguments, or none like these.
    """
    how = how or {}

    def images(seeds: range) -> Tensor:
        made = sample_images(pipeline, seeds, batch_size=len(seeds), **levels, **how)
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    try:
        images(range(1))
    except (TypeError, ValueError) as error:  # the first for arguments that the pipeline does not have
        raise ValueError(f"{type(pipeline).__name__}, {name}: {error}") from None
    used = [round(sigma, 6) if math.isfinite(sigma) else "inf" for sigma in levels_used(pipeline)]  # for JSON
    facts = {"num_inference_steps": len(used), "sigmas": used} | ({"how": how} if how else {})
    return JudgedImages(name, images, facts)


def stored(data: ImageData) -> JudgedImages:
    """The images of a dataset as they are."""
    return JudgedImages("images", lambda places: data.rows(list(places)).float() / 255)


@dataclass(frozen=True)
class Judge:
    """Measures images against a dataset.

    Args:
        extractor: of the features.
        reference: those of the dataset.
        accelerator: whose processes share the work.
        batch_size: images made at once by each of them.
        clock: is told the seconds of sampling, features and metrics.
    """

    extractor: Extractor
    reference: Reference
    accelerator: Accelerator
    batch_size: int
    clock: Clock

    def features(self, source: JudgedImages, numbers: range, title: str) -> Tensor:
        """Features (N, d), all of them on every process.

        The processes take turns at batches that are the same for any number of processes, and so are the images.
        """
        accelerator, size = self.accelerator, self.batch_size
        turns = range(accelerator.process_index * size, len(numbers), accelerator.num_processes * size)
        features = torch.zeros(len(numbers), len(self.reference.moments.mean), device=accelerator.device)
        for start in tqdm(turns, desc=title, unit="batch", disable=not accelerator.is_main_process, leave=False):
            part = numbers[start : start + size]
            with self.clock("sampling"):
                images = source.images(part)
            with self.clock("features"):
                features[start : start + len(part)] = self.extractor(images)
        return accelerator.reduce(features, "sum")  # each row is 0 on all processes but one

    def measure(self, source: JudgedImages, numbers: range, title: str) -> dict[str, Any]:
        """The metrics of the images of these numbers; none on other processes than the main one."""
        features = self.features(source, numbers, title)
        if not self.accelerator.is_main_process:
            return {}
        with self.clock("metrics"):
            return measure(features, self.reference, clock=self.clock)

    def distance(self, source: JudgedImages, numbers: range, title: str) -> float:
        """The Fréchet distance of the images of these numbers, the same number on every process."""
        features, distance = self.features(source, numbers, title), None
        if self.accelerator.is_main_process:
            distance = frechet_distance(features.cpu(), self.reference.moments)
        return broadcast_object_list([distance])[0]
