"""Streams: datasets that are read row by row, in an order that only the seed decides.

Every process reads all rows, numbers them, shuffles them by the same keyed buffer, and takes its own of each global
batch. So a step has the same images for any number of processes and workers, and a run goes on at any step: the rows
before it are read again, but not decoded. A process reads its rows by itself; its workers decode them.
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
Row = tuple[int, dict[str, Any]]  # its number in the stream, from 0, and its columns


class StreamFault(ValueError):
    """A row that can't be used, or a stream that can't be read on, found in the middle of training."""


def numbered(stream: Iterable[dict[str, Any]], limit: int | None = None) -> Iterator[Row]:
    """The first rows with their numbers; what is behind them is not read, as `take` of the datasets library would.

    Raises StreamFault where the stream fails, whatever the error is.
    """
    number = -1
    try:
        for number, row in enumerate(islice(stream, limit)):
            yield number, row
    except Exception as error:  # of networks, files and formats
        place = f" after row {number}" if number >= 0 else ""
        raise StreamFault(f"the dataset can't be read{place}: {why(error)}") from error


def shuffled(rows: Iterable[Row], *key: object) -> Iterator[Row]:
    """The rows in a keyed order: each is drawn from a buffer of `SHUFFLE_BUFFER` rows."""
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

    Where the stream can't be read on, the last list is that of a `StreamFault`.

    Args:
        stream: gives the rows of an epoch, all or more.
        share: where this process stands.
        seed: of the run.
        step: the training step to begin with.
        limit: how many rows an epoch has at most.
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
        """The rows of all epochs, one epoch after another, from place `start` of this sequence on."""
        epoch = 0
        while True:
            count = 0
            for count, row in enumerate(shuffled(numbered(self.stream, self.limit), self.seed, epoch), 1):
                if count > start:
                    yield row
            if not count:
                raise StreamFault("the dataset has no rows.")
            passed = max(1, start // count)  # whole epochs; those after the first need not be read to be passed
            epoch, start = epoch + passed, max(0, start - passed * count)


class StreamedRows(Dataset):
    """Batches by lists of rows: {"images": uint8 (B, C, H, W), "condition": class labels}, or a `StreamFault`.

    Images that are still to be cropped are a list.


    Args:
        decoder: what makes images of records.
        label_column: which column holds labels, None for none.
        num_classes: labels are in [0, num_classes).
        refuse_colours: images with colours are faults, as nobody has asked for grey ones.
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
        """Raise StreamFault for the first row with a label that is none."""
        for row in rows if self.label_column else ():
            self._label(row)

    def __getitems__(self, rows: list[Row] | list[StreamFault]) -> dict[str, Any] | StreamFault:
        try:
            images = [self._image(row) for row in rows]
            images = images if self.decoder.whole else torch.stack(images)
            condition = {}
            if self.label_column:
                condition["class_labels"] = torch.tensor([self._label(row) for row in rows])
        except StreamFault as fault:  # an exception would lose its type on the way from a worker
            return fault
        return {"images": images, "condition": condition}

    def _image(self, row: Row | StreamFault) -> Tensor:
        if isinstance(row, StreamFault):
            raise row
        record = self._value(row, self.decoder.column)
        try:
            image = open_image(record, self.decoder.max_pixels)
            if self.refuse_colours and not is_grey(image):
                raise ValueError("it has colours, and the first images have none; give --channels 3, or 1 for grey")
            return self.decoder.decode(image, self.decoder.scales)
        except Exception as error:  # of hostile files, too: whatever it is, it is named
            raise StreamFault(f"{name_in_messages(row[0], record)}: {why(error)}") from error

    def _label(self, row: Row) -> int:
        label = self._value(row, self.label_column)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.num_classes:
            allowed = f"integers in [0, {self.num_classes - 1}]"
            raise StreamFault(f"row {row[0]}: labels of {self.label_column!r} must be {allowed}; it has {label!r}.")
        return label

    def _value(self, row: Row, column: str) -> Any:
        if column not in row[1]:
            raise StreamFault(f"row {row[0]} has no column {column!r}, only {', '.join(row[1])}.")
        return row[1][column]


def stream_batches(order: StreamOrder, rows: StreamedRows, workers: int = 0) -> Iterator[dict[str, Any]]:
    """Batches without end, decoded by `workers` processes. Raises StreamFault where a row can't be used."""
    with closing(loaded(rows, workers, batch_sampler=order)) as loader:
        while True:
            try:
                batch = next(loader)
            except RuntimeError as error:  # a worker that was killed, as for want of memory
                raise StreamFault(f"the images can't be decoded: {why(error)}") from error
            if isinstance(batch, StreamFault):
                raise batch
            yield batch
