"""From settings to a judge: the dataset, read, and its features by an extractor that can be had."""

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
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, hub_id
from cm_diffusers.evaluation import (
    Extractor,
    check_samples,
    kept_places,
    labels_told_apart,
    load_extractor,
    reference_features,
)


BATCH = 1000  # images of the dataset at once


def build_judge(
    args: EvaluationArguments,
    data_args: DataArguments,
    shape: tuple[int, int, int],
    count: int,
    accelerator: Accelerator,
    clock: Clock,
) -> tuple[Judge, dict[str, Any]]:
    """The dataset, read, with its features, for `count` images of this shape; and what is said of it."""
    main = accelerator.is_main_process
    with clock("reference"):
        name = args.feature_extractor or _best_extractor(args, accelerator)
        with accelerator.main_process_first():
            labelled = name == "classifier" or data_args.label_column is not None
            data = ImageData(data_args, class_conditional=labelled, show_progress=main)
        found = (data.channels, *data.resolution)
        if found != shape:
            raise ValueError(
                f"the images to be measured are {_by(shape)}, those of the dataset {_by(found)} (channels x height x"
                f" width); --resolution {shape[1]} {shape[2]} --channels {shape[0]} makes the dataset's like them."
            )
        extractor = _extractor(name, args, data, accelerator)
        batches = _Batches(data, main)
        with accelerator.main_process_first():  # the others find its features in the cache
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
    """The images of a dataset in [0, 1], batch by batch, as often as they are wanted."""

    def __init__(self, data: ImageData, show_progress: bool):
        self.data, self.show_progress = data, show_progress

    def __iter__(self) -> Iterator[torch.Tensor]:
        places = torch.arange(len(self.data.images)).split(BATCH)
        for part in tqdm(places, desc="Dataset", unit="batch", disable=not self.show_progress, leave=False):
            yield self.data.rows(part.tolist()).float() / 255


def _best_extractor(args: EvaluationArguments, accelerator: Accelerator) -> str:
    """inception where its weights are to be had, else classifier."""
    name = "inception"
    if accelerator.is_main_process:
        try:
            load_extractor(name, args.feature_weights)
        except ValueError as error:
            if args.feature_weights:
                raise
            tqdm.write(f"Features come from a small classifier of this dataset, as there is no better one: {error}")
            name = "classifier"
    return broadcast_object_list([name])[0]


def _extractor(name: str, args: EvaluationArguments, data: ImageData, accelerator: Accelerator) -> Extractor:
    """The extractor, that of the main process on all, as training may round otherwise elsewhere."""
    labelled = None
    if name == "classifier":
        if not torch.is_tensor(data.images):
            raise ValueError("the dataset is too large to train a classifier on; name another feature_extractor.")
        count = len(data.images) if accelerator.is_main_process else 1  # the others need its shape only
        labelled = data.images[:count].float() / 255, data.labels[:count]
    with accelerator.main_process_first():  # who may have to download it
        extractor = load_extractor(name, args.feature_weights, labelled, accelerator.device)
    extractor.network.load_state_dict(broadcast(dict(extractor.network.state_dict())))
    return replace(extractor, fingerprint=broadcast_object_list([extractor.fingerprint])[0])
