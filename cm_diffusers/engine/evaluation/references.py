"""Build the judge of an evaluation: load the dataset, choose the extractor, compute the reference features."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from tqdm.auto import tqdm

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.evaluation.judge import Clock, Judge, RealLabels
from cm_diffusers.engine.processes import Team
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, hub_id
from cm_diffusers.evaluation import (
    Extractor,
    check_samples,
    kept_places,
    labels_told_apart,
    load_extractor,
    reference_features,
)


BATCH = 1000  # images of the dataset for each call of the extractor


def build_judge(
    args: EvaluationArguments,
    data_args: DataArguments,
    shape: tuple[int, int, int],
    count: int,
    accelerator: Accelerator,
    clock: Clock,
) -> tuple[Judge, dict[str, Any]]:
    """Load the dataset and its features; return the judge, and the facts about the dataset for the report.

    Args:
        args: the settings of the evaluation.
        data_args: the dataset.
        shape: (channels, height, width) of the images to be measured.
        count: the number of images to be measured.
        accelerator: the processes that share the work.
        clock: the stopwatch of the evaluation.

    Raises:
        ValueError: the images have another shape than the dataset's, are too few, or the extractor is not available.
    """
    main = accelerator.is_main_process
    with clock("reference"):
        name = args.feature_extractor or _best_extractor(args, accelerator)
        labelled = name == "classifier" or data_args.label_column is not None
        data = ImageData(data_args, class_conditional=labelled, show_progress=main, team=Team(accelerator))
        found = (data.channels, *data.resolution)
        if found != shape:
            raise ValueError(
                f"the images to be measured are {_by(shape)}, but those of the dataset are {_by(found)} (channels x"
                f" height x width). Give --resolution {shape[1]} {shape[2]} --channels {shape[0]} to convert the"
                " dataset."
            )
        extractor = _extractor(name, args, data, accelerator)
        batches = _Batches(data, main)
        with accelerator.main_process_first():  # the other processes find the features in the cache
            reference = reference_features(batches, extractor, args.reference_cache)
    check_samples(count, reference)
    known = "digits" if data_args.dataset_name == "digits" else hub_id(data_args.dataset_name)
    facts = {"dataset": known or ON_THIS_MACHINE, "split": data_args.split, "reference": reference.facts}
    labels = None
    if data.labels is not None:
        labels = RealLabels(data.labels[kept_places(len(data.labels))], dict(data.description.classes))
        told_apart = labels_told_apart(reference.features, labels.values)
        facts["reference"] = {**reference.facts, "label_agreement": round(told_apart, 4)}
    return Judge(extractor, reference, accelerator, args.batch_size, clock, labels), facts


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class _Batches:
    """An iterable of the images of a dataset in [0, 1], in batches; it can be iterated repeatedly."""

    def __init__(self, data: ImageData, show_progress: bool):
        self.data, self.show_progress = data, show_progress

    def __iter__(self) -> Iterator[torch.Tensor]:
        places = torch.arange(len(self.data.images)).split(BATCH)
        for part in tqdm(places, desc="Dataset", unit="batch", disable=not self.show_progress, leave=False):
            yield self.data.rows(part.tolist()).float() / 255


def _best_extractor(args: EvaluationArguments, accelerator: Accelerator) -> str:
    """The default extractor: inception if its weights are available, else classifier."""
    name = "inception"
    if accelerator.is_main_process:
        try:
            load_extractor(name, args.feature_weights)
        except ValueError as error:
            if args.feature_weights:
                raise
            tqdm.write(
                f"Features come from a small classifier of this dataset, because Inception is not available: {error}"
            )
            name = "classifier"
    return broadcast_object_list([name])[0]


def _extractor(name: str, args: EvaluationArguments, data: ImageData, accelerator: Accelerator) -> Extractor:
    """The main process's extractor on all processes, because training can round differently on each of them."""
    labelled = None
    if name == "classifier":
        if not torch.is_tensor(data.images):
            raise ValueError("the dataset is too large to train a classifier on. Give another feature_extractor.")
        count = len(data.images) if accelerator.is_main_process else 1  # the other processes need only the shape
        labelled = data.images[:count].float() / 255, data.labels[:count]
    with accelerator.main_process_first():  # the main process downloads it
        extractor = load_extractor(name, args.feature_weights, labelled, accelerator.device)
    extractor.network.load_state_dict(broadcast(dict(extractor.network.state_dict())))
    return replace(extractor, fingerprint=broadcast_object_list([extractor.fingerprint])[0])
