"""Image datasets for training: loaded from any source, checked first, and ordered by the seed alone."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import permutation
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.captions import read_captions
from cm_diffusers.engine.data.columns import (
    Rows,
    find_caption_column,
    find_image_column,
    find_label_column,
    kind_of,
    marks_of,
    paths_of,
    undecoded,
)
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.data.labels import read_labels
from cm_diffusers.engine.data.mixture import Source, mixed
from cm_diffusers.engine.data.order import BucketOrder, KeyedOrder, Mixture, ProcessShare
from cm_diffusers.engine.data.records import name_in_messages, open_image, why
from cm_diffusers.engine.data.scan import (
    CACHE_BYTES,
    VERSION,
    DecodedImages,
    ScanFindings,
    bucket_shapes,
    crops,
    load_scan,
    loaded,
    save_scan,
    scan,
)
from cm_diffusers.engine.data.shards import load_shards, names_shards
from cm_diffusers.engine.data.sources import declares_parts, is_table, load_local
from cm_diffusers.engine.data.streams import StreamedRows, StreamOrder, numbered, stream_batches
from cm_diffusers.engine.files import digest
from cm_diffusers.engine.processes import ALONE, Team
from cm_diffusers.lookup import looked_up
from cm_diffusers.pixels import size_of


FIRST_ROWS = 1_000  # rows of a stream that decide the channels and value ranges of all
SIGMA_DATA_SAMPLES = 10_000
FIRST = 100  # images that are tried for the size until one is readable


def load_source(
    args: DataArguments,
    labelled: bool = True,
    say: Callable[[str], None] = lambda line: None,
    captioned: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the dataset that `args` name, with images not decoded yet.

    Args:
        args: the settings of the dataset.
        labelled: also read labels, which folders or metadata of local images can give.
        say: receives a line on what was read, and what was left out and why.
        captioned: also read captions, which metadata or text files beside local images can give.

    Raises:
        ValueError: the dataset can't be loaded, or is empty.
    """
    name = args.train_data_dir or args.dataset_name
    if args.dataset_name == "digits":
        source = _digits()
    elif args.train_data_dir is not None and not Path(name).is_dir():
        raise ValueError(
            f"train_data_dir {name!r} is not a folder. Check the path; a zip, a table or a Hub id is given as"
            " --dataset_name."
        )
    else:
        try:
            source = _load(args, Path(name), labelled, say, captioned)
        except Exception as error:  # the library raises many types; each means that there is no dataset
            raise ValueError(f"dataset {name!r}, split {args.split!r}, can't be loaded: {_causes(error)}") from error
    if args.max_train_samples is not None and not args.streaming:
        source = source.take(min(args.max_train_samples, len(source)))  # datasets before 5.2 can't take more than all
    if not args.streaming and len(source) == 0:
        raise ValueError(f"dataset {name!r} is empty. Check its files and --split.")
    return source


def _load(args: DataArguments, path: Path, labelled: bool, say: Callable[[str], None], captioned: bool) -> Rows:
    tables = args.train_data_dir is None
    if tables and names_shards(args.dataset_name):
        return load_shards(args.dataset_name, args.split, args.streaming, say)
    if path.exists() and args.dataset_config_name is None and not (tables and declares_parts(path)):
        columns = {"labelled": labelled, "label_column": args.label_column, "image_column": args.image_column}
        columns |= {"captioned": captioned, "caption_column": args.caption_column}
        source = load_local(path, args.split, args.streaming, **columns, tables=tables, say=say)
        if source is not None:
            return source
    elif not path.exists() and is_table(path):
        raise ValueError("there is no such file or folder.")
    name, options = str(path) if path.exists() else args.dataset_name, {"revision": args.dataset_revision}
    with looked_up(name, "dataset", args.dataset_revision) as cached, _offline(cached):
        if not args.streaming:
            return datasets.load_dataset(name, args.dataset_config_name, split=args.split, **options)
        builder = datasets.load_dataset_builder(name, args.dataset_config_name, **options)
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = 0  # otherwise the library decodes, and its errors name no image
    return builder.as_streaming_dataset(args.split)


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """If `offline`, let the datasets library read its cache only. `load_dataset` has no argument for this."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _causes(error: BaseException) -> str:
    """The message of an error, and the messages of its causes, which the datasets library hides."""
    lines = []
    while error is not None:
        lines += [why(error)] if why(error) not in " ".join(lines) else []
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return " - because: ".join(lines)


@cache
def _digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("dataset 'digits' needs scikit-learn. Run: pip install scikit-learn") from None
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


class _Rows(Dataset):
    """Batches by lists of indices: {"images": uint8 (B, C, H, W), "condition": tensors (B, ...) by name}.

    Images that still need a crop are a list of B tensors (C, h, w). With `own_shapes`, images have the shape of their
    bucket. Anything but `DecodedImages` is indexed by the list, which gives a tensor.
    """

    def __init__(self, images: Any, condition: dict[str, Tensor], own_shapes: bool = False):
        self.images, self.condition, self.own_shapes = images, condition, own_shapes

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        if isinstance(self.images, DecodedImages):
            images = [self.images.take(i, self.own_shapes) for i in indices]
            images = images if self.images.whole else torch.stack(images)
        else:
            images = self.images[indices]
        return {"images": images, "condition": {name: entry[indices] for name, entry in self.condition.items()}}


def _root_mean_square(images: Tensor) -> float:
    """Root mean square of uint8 images scaled to [-1, 1]."""
    return round((images.double() / 127.5 - 1).square().mean().sqrt().item(), 4)


class ImageData:
    """A dataset ready for training: loaded, checked, and described.

    Args:
        args: the settings of the dataset and its images.
        class_conditional: also read labels.
        scanned: file that caches the findings of the pass over all images until the data change.
        show_progress: show bars, and print what was read and what was left out.
        captioned: also read captions. With --aspect_ratio_buckets, call `fill_buckets` then, as `TextData` does.
        team: the processes that share the pass over all images. All of them make the dataset together.

    Attributes:
        images: uint8 (N, C, H, W) in memory, `DecodedImages` if they don't fit or are cropped in training, or None
            for a stream.
        labels: int64 (N,); None for a stream or without labels.
        channels: 1 or 3.
        resolution: (height, width) in training.
        num_classes: labels are integers in [0, num_classes); None without labels.
        captions: N texts; None if they are not read.
        digest: digest of the contents of all images in their order; None for a stream.

    Raises:
        ValueError: the dataset is missing or empty, a column, label or caption is missing or wrong, images can't be
            read (the first 20 are listed), or captions are to be read from a stream.
    """

    vae = None  # the autoencoder, for datasets of latents

    def __init__(
        self,
        args: DataArguments,
        class_conditional: bool,
        scanned: Path | None = None,
        show_progress: bool = True,
        captioned: bool = False,
        team: Team = ALONE,
    ):
        self.args, self.show_progress = args, show_progress
        if captioned and args.streaming:
            raise ValueError(
                "captions can't be read from a stream, because prompts are encoded once, before training. Leave out"
                " --streaming."
            )
        self._mixture = self._buckets = self.digest = None
        with team.main_first():
            features = self._load(class_conditional, captioned)
        self.resolution = self._find_size()
        self.num_classes = self.labels = self._classes = self._fingerprint = None
        if args.streaming:
            self._find_streamed_labels(features)
            self.images = None
            self._look_at_first()
        else:
            if self.label_column is not None:
                self._read_labels(features)
            self._look_at_all(scanned, team)

    def _load(self, class_conditional: bool, captioned: bool) -> datasets.Features:
        """Find the rows and their columns, and return the features."""
        args = self.args
        source = load_source(args, class_conditional, self._say, captioned)
        features = source.features or source._resolve_features().features
        self.column = find_image_column(features, args.image_column)
        self.label_column = find_label_column(features, args.label_column) if class_conditional else None
        self.captions = self._captions_of(source, self.column) if captioned else None
        if args.extra_datasets:
            source = self._mixed(source)
            features = source.features
        self.source = undecoded(source, self.column, features)
        return features

    def _mixed(self, first: datasets.Dataset) -> datasets.Dataset:
        """Append the extra datasets to the first one, in columns "image" and "label"."""
        args = self.args
        sources = [Source(args.train_data_dir or args.dataset_name, first, self.column, self.label_column)]
        for name in args.extra_datasets:
            own = replace(args, dataset_name=name, train_data_dir=None, extra_datasets=None, dataset_weights=None)
            own = replace(own, dataset_config_name=None, dataset_revision=None)
            labelled, captioned = self.label_column is not None, self.captions is not None
            rows = load_source(own, labelled, self._say, captioned)
            column = find_image_column(rows.features, args.image_column)
            label_column = find_label_column(rows.features, args.label_column) if labelled else None
            if captioned:
                self.captions += self._captions_of(rows, column)
            sources.append(Source(name, rows, column, label_column))
        if args.dataset_weights:
            sizes = tuple(len(source.rows) for source in sources)
            self._mixture = Mixture(sizes, tuple(args.dataset_weights))
        self.column, self.label_column = "image", self.label_column and "label"
        return mixed(sources)

    def _captions_of(self, rows: datasets.Dataset, image_column: str) -> list[str]:
        return read_captions(
            rows, find_caption_column(rows.features, self.args.caption_column, image_column), image_column
        )

    def _say(self, line: str) -> None:
        if self.show_progress:
            tqdm.write(line)

    def _find_size(self) -> tuple[int, int]:
        """(height, width) from the settings, or of the first readable image."""
        faults = []
        for i, row in numbered(self.source, FIRST):
            try:
                image = open_image(row[self.column], self.args.max_image_pixels)
            except Exception as error:  # the scan will name every fault
                faults.append(f"{name_in_messages(i, row[self.column])}: {why(error)}")
                continue
            return self.args.size or size_of(image)
        if not faults:
            raise ValueError(
                f"dataset {self.args.train_data_dir or self.args.dataset_name!r} is empty. Check its files and"
                " --split."
            )
        listed = "".join(f"\n  {fault}" for fault in faults[:5]) + ("\n  ..." if len(faults) > 5 else "")
        raise ValueError(
            f"none of the first images of column {self.column!r} can be read; repair or remove them:{listed}"
        )

    def _read_labels(self, features: datasets.Features) -> None:
        labels = read_labels(self.source[self.label_column][:], features[self.label_column], self.label_column)
        self.labels, self.num_classes, self._classes = labels.values, len(labels.names), labels.classes
        if labels.gaps():
            self._say(labels.gaps())

    def _find_streamed_labels(self, features: datasets.Features) -> None:
        if self.label_column is not None:
            names = getattr(features[self.label_column], "names", None)
            if names is None:
                raise ValueError(
                    f"a stream needs labels of the type ClassLabel, which gives the number of classes; column"
                    f" {self.label_column!r} is {kind_of(features[self.label_column])}. Leave out --streaming."
                )
            self.num_classes, self._classes = len(names), dict(enumerate(names))

    @property
    def description(self) -> DataDescription:
        """Number, shape, classes and fingerprint of the images; the unknown values of a stream are None."""
        number = None if self.images is None else len(self.images)
        return DataDescription(
            number, self.channels, self.resolution, self.num_classes, self._classes, self._fingerprint
        )

    def _decoder(self, rows: Any) -> DecodedImages:
        return DecodedImages(rows, self.column, self.args.channels, self.resolution, self.args.max_image_pixels)

    def _look_at_all(self, scanned: Path | None, team: Team) -> None:
        """Decode every image once, or load what an earlier pass found; keep the images in memory if they fit."""
        decoder = self._decoder(self.source)
        size = len(decoder) * (self.args.channels or 3) * self.resolution[0] * self.resolution[1]
        keep = size <= CACHE_BYTES and not (self.args.random_crop or self.args.aspect_ratio_buckets)
        key = self._key(keep)
        found = None if scanned is None else load_scan(scanned, key)
        if not all(team.gather(found is not None)):
            workers, ratios = self.args.dataloader_num_workers, self.args.aspect_ratio_buckets
            found = scan(decoder, keep, workers, self.show_progress, ratios, team)
            if scanned is not None and team.rank == 0:
                scanned.parent.mkdir(parents=True, exist_ok=True)
                save_scan(scanned, key, *found)
        facts, images = found
        self._use(facts, decoder)
        self.images = images if keep else decoder
        self._ratios = facts.ratios
        if self.args.aspect_ratio_buckets and self.captions is None:
            self.fill_buckets()
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        captions = b"" if self.captions is None else json.dumps(self.captions).encode()
        self.digest, self._fingerprint = facts.fingerprint, digest(facts.fingerprint.encode(), labels, captions)

    def fill_buckets(self, step: int = 8) -> None:
        """Assign each image the bucket of the nearest aspect ratio, and print the number of images per bucket.

        Args:
            step: the sides of all buckets but that of the resolution are multiples of this.
        """
        decoder, shapes = self.images, bucket_shapes(self.resolution, step)
        logs = torch.tensor([h / w for h, w in shapes]).log()
        nearest = (torch.tensor(self._ratios).log()[:, None] - logs).abs().argmin(1)
        decoder.shapes = [shapes[i] for i in nearest.tolist()]
        self._buckets = [where.tolist() for i in range(len(shapes)) if len(where := (nearest == i).nonzero()[:, 0])]
        parts = [f"{len(bucket)} of {'{} x {}'.format(*decoder.shapes[bucket[0]])}" for bucket in self._buckets]
        self._say(f"Shapes: {', '.join(parts)}.")

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """(height, width) of all buckets; empty without --aspect_ratio_buckets."""
        return set() if self._buckets is None else set(self.images.shapes)

    @property
    def buckets(self) -> list[list[int]]:
        """The indices of the images of each bucket; one bucket of all images without --aspect_ratio_buckets."""
        return [list(range(len(self.images)))] if self._buckets is None else self._buckets

    def _look_at_first(self) -> None:
        """Decode the first rows of a stream, which decide channels and ranges. Later rows are checked as they come."""
        count = min(FIRST_ROWS, self.args.max_train_samples or FIRST_ROWS)
        first = [row for _, row in numbered(self.source, count)]
        decoder = self._decoder(first)
        facts, images = scan(decoder, True, self.args.dataloader_num_workers, self.show_progress)
        self._use(facts, decoder)
        grey = self.args.channels is None and self.channels == 1
        self._streamed = StreamedRows(decoder, self.label_column, self.num_classes, refuse_colours=grey)
        self._streamed.check_labels(enumerate(first))
        self._first_sigma_data = _root_mean_square(images)
        decoder.rows = []

    def _use(self, facts: ScanFindings, decoder: DecodedImages) -> None:
        """Set how all images are decoded from the findings of the scan, and print what it found."""
        self.channels = decoder.channels = self.args.channels or facts.channels
        decoder.scales, decoder.whole = facts.scales, self.args.random_crop
        for line in facts.ranges:
            self._say(line)
        if self.args.resolution is None and len(facts.sizes) > 1:
            own = "{} x {}".format(*self.resolution)
            other = next(size for size in facts.sizes if size != own)
            number = facts.sizes.total() - facts.sizes[own]
            self._say(
                f"WARNING: {number} of {len(decoder)} images differ from the first one's size of {own} pixels, for"
                f" example {facts.examples[other]} with {other}. They are resized and cropped. --resolution sets the"
                " size."
            )

    def _key(self, keep: bool) -> str:
        """A digest that identifies this dataset and its settings without opening an image."""
        marks = marks_of(paths_of(self.source, self.column))
        facts = [VERSION, self.source._fingerprint, self.column, self.args.channels, self.resolution, keep, marks]
        facts += ["ratios"] if self.args.aspect_ratio_buckets else []
        return digest(json.dumps(facts).encode())

    @property
    def condition(self) -> dict[str, Tensor]:
        """The conditioning of each image: tensors (N, ...) by name. Empty without labels."""
        return {} if self.labels is None else {"class_labels": self.labels}

    def conditioned(self, entries: dict[str, Tensor]) -> Condition:
        """Return the condition of a batch from the entries (B, ...) that `batches` gives."""
        return Condition(entries)

    def measure_sigma_data(self) -> float:
        """Return the root mean square of the data scaled to [-1, 1], as EDM's preconditioning assumes.

        It is measured on at most 10,000 images, or on the first 1,000 rows of a stream. It is the second moment about
        zero, not the standard deviation about the mean. With s^2 = E[x0^2], c_skip = s^2 / (s^2 + sigma^2) minimises
        the error of c_skip x against the data.
        """
        if self.args.streaming:
            return self._first_sigma_data
        return _root_mean_square(self.rows(permutation(len(self.images), "sigma_data")[:SIGMA_DATA_SAMPLES].tolist()))

    def rows(self, indices: list[int], own_shapes: bool = False) -> Tensor:
        """Return the uint8 images (B, C, H, W) at B `indices` of the dataset.

        Args:
            indices: the indices.
            own_shapes: keep the shape of the bucket, which all indices must share.
        """
        images = _Rows(self.images, self.condition, own_shapes).__getitems__(indices)["images"]
        return images if torch.is_tensor(images) else crops(images, self.resolution)

    def batches(self, share: ProcessShare, seed: int, step: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the batches of this process without end, one per forward pass, from training step `step` on.

        Each batch is {"images": uint8 (B, C, H, W), "condition": tensors (B, ...) by name}. Images that still need a
        random crop are a list of B tensors (C, h, w).

        Args:
            share: the part of each global batch that belongs to this process.
            seed: seed of the run, which decides the order.
            step: the first training step.
        """
        if self.args.streaming:
            order = StreamOrder(self.source, share, seed, step, self.args.max_train_samples)
            return stream_batches(order, self._streamed, self.args.dataloader_num_workers)
        order: Sampler = KeyedOrder(len(self.images), share, seed, step, self._mixture)
        if self._buckets is not None:
            order = BucketOrder(self._buckets, share, seed, step)
        workers = self.args.dataloader_num_workers if isinstance(self.images, DecodedImages) else 0
        rows = _Rows(self.images, self.condition, own_shapes=True)
        return loaded(rows, workers, batch_sampler=order)
