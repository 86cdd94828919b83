"""Streams: datasets that are read row by row, in an order that the seed alone decides.

Every process reads and numbers all rows, shuffles them by the same keyed buffer, and takes its share of each global
batch. So a training step has the same images for any number of processes and workers. A run can resume at any step:
earlier rows are read again, but not decoded. The main thread of a process reads rows, and its workers decode them.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cm_diffusers.core.draws import derive_seed
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.records import name_in_messages, open_image, why
from cm_diffusers.engine.data.scan import DecodedImages, loaded
from cm_diffusers.pixels import is_grey


SHUFFLE_BUFFER = 2_000
Row = tuple[int, dict[str, Any]]  # number in the stream, from 0, and columns


class StreamFault(ValueError):
    """An unusable row or a failed stream, found in the middle of training."""


def numbered(stream: Iterable[dict[str, Any]], limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a stream with their numbers.

    Rows after `limit` are not read, unlike with `take` of the datasets library.

    Args:
        stream: the rows.
        limit: largest number of rows; None for all.

    Raises:
        StreamFault: the stream fails with any error.
    """
    number = -1
    try:
        for number, row in enumerate(islice(stream, limit)):
            yield number, row
    except Exception as error:  # any error of networks, files and formats
        place = f" after row {number}" if number >= 0 else ""
        raise StreamFault(f"the dataset can't be read{place}: {why(error).rstrip('.')}.") from error


def shuffled(rows: Iterable[Row], *key: object) -> Iterator[Row]:
    """Yield `rows` in an order that `key` decides, each drawn from a buffer of `SHUFFLE_BUFFER` rows."""
    draw, buffer = random.Random(derive_seed("stream", *key)).random, []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        place = int(draw() * SHUFFLE_BUFFER)
        yield buffer[place]
        buffer[place] = row
    buffer.sort(key=lambda row: draw())
    yield from buffer


class StreamOrder(Sampler):
    """Lists of rows, one per forward pass of this process, from `step` on: a function of the stream and (seed, epoch).

    If the stream fails, the last list holds one `StreamFault`.

    Args:
        stream: the rows of an epoch. Every iteration starts again.
        share: the part of each global batch that belongs to this process.
        seed: seed of the run.
        step: the first training step.
        limit: largest number of rows of an epoch; None for all.
    """

    def __init__(
        self, stream: Iterable[dict[str, Any]], share: ProcessShare, seed: int, step: int = 0, limit: int | None = None
    ):
        self.stream, self.share, self.seed, self.step, self.limit = stream, share, seed, step, limit

    def __iter__(self) -> Iterator[list[Row] | list[StreamFault]]:
        rows = self._rows(self.step * self.share.global_batch)
        try:
            while True:
                for rank in range(self.share.world):
                    batch = list(islice(rows, self.share.batch_size))
                    if rank == self.share.rank:
                        yield batch
        except StreamFault as fault:
            yield [fault]

    def _rows(self, start: int) -> Iterator[Row]:
        """The rows of all epochs in sequence, from position `start` on."""
        epoch = 0
        while True:
            count = 0
            for count, row in enumerate(shuffled(numbered(self.stream, self.limit), self.seed, epoch), 1):
                if count > start:
                    yield row
            if not count:
                raise StreamFault("the dataset has no rows. Check its files and --split.")
            passed = max(1, start // count)  # whole epochs; the skipped ones after the first are not read
            epoch, start = epoch + passed, max(0, start - passed * count)


class StreamedRows(Dataset):
    """Batches by lists of rows: {"images": uint8 (B, C, H, W), "condition": tensors (B,) by name}, or a `StreamFault`.

    Images that still need a crop are a list of B tensors (C, h, w).

    Args:
        decoder: decodes the records of images.
        label_column: the column of the labels; None without labels.
        num_classes: labels are integers in [0, num_classes).
        refuse_colours: an image with colours is a fault, because grey was detected from the first rows.
    """

    def __init__(
        self,
        decoder: DecodedImages,
        label_column: str | None = None,
        num_classes: int | None = None,
        refuse_colours: bool = False,
    ):
        self.decoder, self.label_column, self.num_classes = decoder, label_column, num_classes
        self.refuse_colours = refuse_colours

    def check_labels(self, rows: Iterable[Row]) -> None:
        """Check the labels of `rows`.

        Raises:
            StreamFault: a label is not an integer in [0, num_classes); the first such row is named.
        """
        for row in rows if self.label_column else ():
            self._label(row)

    def __getitems__(self, rows: list[Row] | list[StreamFault]) -> dict[str, Any] | StreamFault:
        try:
            images = [self._image(row) for row in rows]
            images = images if self.decoder.whole else torch.stack(images)
            condition = {}
            if self.label_column:
                condition["class_labels"] = torch.tensor([self._label(row) for row in rows])
        except StreamFault as fault:  # returned, because an exception from a worker loses its type
            return fault
        return {"images": images, "condition": condition}

    def _image(self, row: Row | StreamFault) -> Tensor:
        if isinstance(row, StreamFault):
            raise row
        record = self._value(row, self.decoder.column)
        try:
            image = open_image(record, self.decoder.max_pixels)
            if self.refuse_colours and not is_grey(image):
                raise ValueError(
                    "it has colours, but the first images are grey; give --channels 3 for colour, or 1 for grey"
                )
            return self.decoder.decode(image, self.decoder.scales)
        except Exception as error:  # any fault, including those of hostile files, is reported with the image's name
            raise StreamFault(f"{name_in_messages(row[0], record)}: {why(error).rstrip('.')}.") from error

    def _label(self, row: Row) -> int:
        label = self._value(row, self.label_column)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.num_classes:
            allowed = f"integers in [0, {self.num_classes - 1}]"
            raise StreamFault(
                f"row {row[0]}: labels of {self.label_column!r} must be {allowed}; this one is {label!r}."
            )
        return label

    def _value(self, row: Row, column: str) -> Any:
        if column not in row[1]:
            raise StreamFault(f"row {row[0]} has no column {column!r}. Its columns are {', '.join(row[1])}.")
        return row[1][column]


def stream_batches(order: StreamOrder, rows: StreamedRows, workers: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the batches of a stream without end.

    Args:
        order: lists of rows, one per batch.
        rows: decodes them, see `StreamedRows`.
        workers: number of processes that decode; 0 decodes in this process.

    Raises:
        StreamFault: a row is unusable, the stream fails, or a worker ends early.
    """
    with closing(loaded(rows, workers, batch_sampler=order)) as loader:
        while True:
            try:
                batch = next(loader)
            except RuntimeError as error:  # a worker was killed, for example when memory ran out
                raise StreamFault(f"the images can't be decoded: {why(error).rstrip('.')}.") from error
            if isinstance(batch, StreamFault):
                raise batch
            yield batch
