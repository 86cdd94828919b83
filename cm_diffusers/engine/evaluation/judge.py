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

from cm_diffusers.core.draws import permutation
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.evaluation import Extractor, Reference, frechet_distance, label_agreement, measure
from cm_diffusers.evaluation.frechet import Moments
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import labels_in_turn, levels_used, sample_images


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
        labels: gives the labels that these images were asked for; None where none were.
        classes: what those labels are called, where they have names.
    """

    name: str
    images: Callable[[range], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    labels: Callable[[range], list[int]] | None = None
    classes: dict[int, str] | None = None


@dataclass(frozen=True)
class RealLabels:
    """The classes of a reference's images.

    Args:
        values: int64 (n,), of the images whose features are kept.
        classes: the names of the classes by their labels.
    """

    values: Tensor
    classes: dict[int, str]

    def of(self, labels: list[int], classes: dict[int, str] | None) -> Tensor | None:
        """A model's labels, with its names of `classes`, as these labels; None where they are of other classes.

        Names tell where the model has some, else the numbers are the same.
        """
        places = {name: label for label, name in self.classes.items()}
        found = [label if classes is None else places.get(classes.get(label)) for label in labels]
        return torch.tensor(found) if all(label in self.classes for label in found) else None


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
    labels = None if pipeline.num_classes is None else lambda seeds: labels_in_turn(pipeline, seeds)
    return JudgedImages(name, images, facts, labels, pipeline.id2label)


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
        labels: the classes of the dataset, where they were read.
    """

    extractor: Extractor
    reference: Reference
    accelerator: Accelerator
    batch_size: int
    clock: Clock
    labels: RealLabels | None = None

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
            return measure(features, self.reference, clock=self.clock) | self._agreement(features, source, numbers)

    def halves(self, count: int) -> dict[str, Any]:
        """The metrics of `count` real images, or half of all, against as many others; empty where they are too few."""
        real = self.reference.features
        order = permutation(len(real), "halves")[: 2 * count]
        one, other = (real[part] for part in order.tensor_split(2))
        if len(other) <= real.shape[1]:
            return {}
        with self.clock("metrics"):
            return {"num_samples": len(other), **measure(other, Reference(Moments(one), one, self.reference.facts))}

    def _agreement(self, features: Tensor, source: JudgedImages, numbers: range) -> dict[str, float]:
        """How many images are of the class that was asked for, where that is known of the dataset's."""
        if self.labels is None or source.labels is None:
            return {}
        asked = self.labels.of(source.labels(numbers), source.classes)
        if asked is None:
            return {}
        real = self.reference.features
        return {"label_agreement": label_agreement(real, self.labels.values, features.cpu(), asked)}

    def distance(self, source: JudgedImages, numbers: range, title: str) -> float:
        """The Fréchet distance of the images of these numbers, the same number on every process."""
        features, distance = self.features(source, numbers, title), None
        if self.accelerator.is_main_process:
            distance = frechet_distance(features.cpu(), self.reference.moments)
        return broadcast_object_list([distance])[0]
