"""Measurement of images against one dataset, shared by any number of processes."""

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
    """A stopwatch that adds up the seconds of named activities; `with clock("sampling"): ...` times one."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each activity, and of the whole time since the clock was created as "total"."""
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
    """A source of images to be measured.

    Args:
        name: its name in the results: "2 steps", "sigmas 80, 0.8", or "images".
        images: a function from seeds, or indices of a dataset, to images (B, C, H, W) in [0, 1].
        facts: further entries of the results.
        labels: a function from seeds to the class labels of the images; None for an unconditional source.
        classes: the names of these labels, or None.
    """

    name: str
    images: Callable[[range], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    labels: Callable[[range], list[int]] | None = None
    classes: dict[int, str] | None = None


@dataclass(frozen=True)
class RealLabels:
    """The class labels of the reference images.

    Args:
        values: int64 (n,), the labels of the images whose features are kept.
        classes: the names of the classes by their labels.
    """

    values: Tensor
    classes: dict[int, str]

    def of(self, labels: list[int], classes: dict[int, str] | None) -> Tensor | None:
        """Translate a model's labels to those of the reference; None if the reference lacks one of the classes.

        Classes are matched by name. Without names the labels are taken as equal.

        Args:
            labels: labels of the model.
            classes: the model's names of its labels, or None.

        Returns:
            int64 (n,) for n labels.
        """
        places = {name: label for label, name in self.classes.items()}
        found = [label if classes is None else places.get(classes.get(label)) for label in labels]
        return torch.tensor(found) if all(label in self.classes for label in found) else None


def sampler(
    pipeline: ImagePipeline, name: str, levels: dict[str, Any], how: dict[str, Any] | None = None
) -> JudgedImages:
    """A model as a source of images, one for each seed. It generates one image as a check of the arguments.

    Args:
        pipeline: the model.
        name: its name in the results.
        levels: the keyword argument `num_inference_steps` or `sigmas`.
        how: further keyword arguments of the pipeline: guidance, solver, gamma.

    Raises:
        ValueError: the pipeline does not accept these arguments or their values.
    """
    how = how or {}

    def images(seeds: range) -> Tensor:
        made = sample_images(pipeline, seeds, batch_size=len(seeds), **levels, **how)
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    try:
        images(range(1))
    except (TypeError, ValueError) as error:  # TypeError: an unknown argument
        raise ValueError(f"{type(pipeline).__name__}, {name}: {error}") from None
    used = [round(sigma, 6) if math.isfinite(sigma) else "inf" for sigma in levels_used(pipeline)]  # for JSON
    facts = {"num_inference_steps": len(used), "sigmas": used} | ({"how": how} if how else {})
    labels = None if pipeline.num_classes is None else lambda seeds: labels_in_turn(pipeline, seeds)
    return JudgedImages(name, images, facts, labels, pipeline.id2label)


def stored(data: ImageData) -> JudgedImages:
    """The unchanged images of the dataset `data` as a source."""
    return JudgedImages("images", lambda places: data.rows(list(places)).float() / 255)


@dataclass(frozen=True)
class Judge:
    """Measures images against a dataset.

    Args:
        extractor: the extractor of the features.
        reference: the features of the dataset.
        accelerator: the processes that share the work.
        batch_size: images that each process generates at once.
        clock: the stopwatch for sampling, features and metrics.
        labels: the class labels of the dataset, or None.
    """

    extractor: Extractor
    reference: Reference
    accelerator: Accelerator
    batch_size: int
    clock: Clock
    labels: RealLabels | None = None

    def features(self, source: JudgedImages, numbers: range, title: str) -> Tensor:
        """Features (N, d) of images, all of them on every process.

        The processes share batches that are the same for any number of processes, so the images are the same as well.

        Args:
            source: the source of the images.
            numbers: N seeds, or indices of a dataset.
            title: the label of the progress bar.
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
        """The metrics of images, with the arguments of `features`; empty on all but the main process."""
        features = self.features(source, numbers, title)
        if not self.accelerator.is_main_process:
            return {}
        with self.clock("metrics"):
            return measure(features, self.reference, clock=self.clock) | self._agreement(features, source, numbers)

    def halves(self, count: int) -> dict[str, Any]:
        """The metrics of real images against an equal number of other real images; empty if there are too few.

        Args:
            count: images in each part, at most half of all images with kept features.
        """
        real = self.reference.features
        order = permutation(len(real), "halves")[: 2 * count]
        one, other = (real[part] for part in order.tensor_split(2))
        if len(other) <= real.shape[1]:
            return {}
        with self.clock("metrics"):
            return {"num_samples": len(other), **measure(other, Reference(Moments(one), one, self.reference.facts))}

    def _agreement(self, features: Tensor, source: JudgedImages, numbers: range) -> dict[str, float]:
        """The label agreement, or nothing if source or dataset has no labels or their classes differ."""
        if self.labels is None or source.labels is None:
            return {}
        asked = self.labels.of(source.labels(numbers), source.classes)
        if asked is None:
            return {}
        real = self.reference.features
        return {"label_agreement": label_agreement(real, self.labels.values, features.cpu(), asked)}

    def distance(self, source: JudgedImages, numbers: range, title: str) -> float:
        """The Fréchet distance of images, with the arguments of `features`; the same value on every process."""
        features, distance = self.features(source, numbers, title), None
        if self.accelerator.is_main_process:
            distance = frechet_distance(features.cpu(), self.reference.moments)
        return broadcast_object_list([distance])[0]
