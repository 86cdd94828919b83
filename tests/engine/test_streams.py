"""Streams: the same images for any number of processes and workers, from any step; messages name the faulty row."""

import io
import itertools
import os

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import cm_diffusers.engine.data.images as data_module
import cm_diffusers.engine.data.streams as streams
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.scan import DecodedImages
from cm_diffusers.engine.data.streams import StreamedRows, StreamFault, StreamOrder, shuffled, stream_batches
from cm_diffusers.engine.training.run import main
from tests.helpers.training_runs import differences, flags, read_log, run


@pytest.fixture(autouse=True)
def own_cache_and_small_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(streams, "SHUFFLE_BUFFER", 6)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


# --- order ---------------------------------------------------------------------------------------------------------


def order(n, share, seed=0, step=0):
    """The row numbers of each forward pass."""
    stream = StreamOrder([{"image": i} for i in range(n)], share, seed, step)
    return ([number for number, row in batch] for batch in stream)


def flat(lists):
    return [number for part in lists for number in part]


@pytest.mark.parametrize("n, batch", [(20, 6), (20, 20), (5, 16), (1, 4)])
def test_each_epoch_has_every_row_once_and_no_two_are_alike(n, batch):
    numbers = flat(take(order(n, ProcessShare(batch)), 8 * n))
    epochs = [numbers[e * n : (e + 1) * n] for e in range(6)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 3


def test_rows_move_by_about_the_size_of_the_buffer():
    numbers = flat(take(order(600, ProcessShare(600)), 1))
    assert all(number <= place + 6 for place, number in enumerate(numbers))  # no row before it is read
    assert sum(number != place for place, number in enumerate(numbers)) > 400


def test_the_order_depends_on_the_seed_alone():
    assert (
        take(order(20, ProcessShare(6)), 9)
        == take(order(20, ProcessShare(6)), 9)
        != take(order(20, ProcessShare(6), seed=1), 9)
    )
    rows = [(i, {}) for i in range(20)]
    assert list(shuffled(rows, 0, 3)) == list(shuffled(rows, 0, 3)) != list(shuffled(rows, 0, 4))


@pytest.mark.parametrize("world, accumulation, batch", [(2, 1, 6), (1, 3, 4), (2, 3, 2), (3, 1, 4), (12, 1, 1)])
def test_processes_and_forward_passes_share_the_rows_of_one_order(world, accumulation, batch):
    whole = take(order(20, ProcessShare(12)), 10)
    ranks = [
        take(order(20, ProcessShare(batch, accumulation, rank, world)), 10 * accumulation) for rank in range(world)
    ]
    for step in range(10):
        parts = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert flat(parts) == whole[step]


@pytest.mark.parametrize("share", [ProcessShare(6), ProcessShare(2, 3), ProcessShare(3, 1, 1, 2), ProcessShare(32)])
@pytest.mark.parametrize("n", [1, 7, 20, 100])
@pytest.mark.parametrize("step", [1, 9, 40])
def test_starting_at_a_step_is_skipping_the_steps_before(share, n, step):
    skipped = take(order(n, share), (step + 6) * share.accumulation)[step * share.accumulation :]
    assert take(order(n, share, step=step), 6 * share.accumulation) == skipped


def test_to_start_far_on_at_most_two_epochs_are_read_before():
    read = []

    class Stream:
        def __iter__(self):
            for i in range(50):
                read.append(i)
                yield {"image": i}

    next(iter(StreamOrder(Stream(), ProcessShare(10), 0, step=1001)))
    assert len(read) < 100


# --- whole datasets ------------------------------------------------------------------------------------------------


def grey_images(n):
    """Constant images with the values 0, 1, 2, ..."""
    return [Image.new("L", (8, 8), i) for i in range(n)]


def write_shards(folder, *shards, classes=4):
    """Write parquet shards, each from a list of (image, label); an image can be bytes. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)})
    plain = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for number, rows in enumerate(shards):
        images = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image, _ in rows]
        shard = datasets.Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, plain)
        shard.info.features = features  # without a check of the labels
        shard.to_parquet(folder / f"train-{number:05d}-of-{len(shards):05d}.parquet")
    return folder


def open_stream(folder, conditional=False, **settings):
    args = DataArguments(dataset_name=str(folder), streaming=True, **settings)
    return ImageData(args, conditional, show_progress=False)


def values_of(batches):
    return [batch["images"][:, 0, 0, 0].tolist() for batch in batches]


@pytest.fixture
def three_shards(tmp_path):
    rows = [(image, i % 4) for i, image in enumerate(grey_images(23))]
    return write_shards(tmp_path / "d", rows[:9], rows[9:10], rows[10:])


@pytest.mark.parametrize("samples", [None, 10, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_subset_is_the_same_images_for_any_number_of_processes_and_workers(three_shards, samples, workers):
    whole = values_of(take(open_stream(three_shards, max_train_samples=samples).batches(ProcessShare(6), 0), 8))
    assert sorted(set(flat(whole))) == list(range(samples or 23))
    data = open_stream(three_shards, max_train_samples=samples, dataloader_num_workers=workers)
    for world in (1, 2, 3):
        ranks = [
            values_of(take(data.batches(ProcessShare(6 // world, 1, rank, world), 0), 8)) for rank in range(world)
        ]
        assert [flat(parts) for parts in zip(*ranks)] == whole


def test_labels_stay_with_their_images(three_shards):
    data = open_stream(three_shards, conditional=True)
    assert data.num_classes == 4
    for batch in take(data.batches(ProcessShare(5), 0), 9):
        assert batch["condition"]["class_labels"].dtype == torch.int64
        assert torch.equal(batch["condition"]["class_labels"], batch["images"][:, 0, 0, 0].long() % 4)


@pytest.mark.parametrize("workers, here", [(0, True), (2, False)])
def test_workers_decode(three_shards, monkeypatch, workers, here):
    data = open_stream(three_shards, dataloader_num_workers=workers)
    trainer, decode = os.getpid(), DecodedImages.decode
    monkeypatch.setattr(DecodedImages, "decode", lambda *args: decode(*args) * 0 + (os.getpid() == trainer))
    [batch] = take(data.batches(ProcessShare(4), 0), 1)
    assert (batch["images"] == here).all()


def test_rows_before_the_step_are_not_decoded(three_shards, monkeypatch):
    data = open_stream(three_shards)
    decoded, decode = [], DecodedImages.decode
    monkeypatch.setattr(DecodedImages, "decode", lambda *args: decoded.append(1) or decode(*args))
    assert (
        values_of(take(data.batches(ProcessShare(4), 0, step=30), 1))
        == values_of(take(data.batches(ProcessShare(4), 0), 31))[30:]
    )
    assert len(decoded) == 4 + 31 * 4


def test_digits_can_be_streamed():
    args = {"dataset_name": "digits", "max_train_samples": 30}
    whole = ImageData(DataArguments(**args), True, show_progress=False)
    data = ImageData(DataArguments(**args, streaming=True), True, show_progress=False)
    assert (data.channels, data.resolution, data.num_classes) == (1, (8, 8), 10)
    [batch] = take(data.batches(ProcessShare(30), 0), 1)
    numbers = next(order(30, ProcessShare(30)))
    assert torch.equal(batch["images"], whole.images[numbers])
    assert torch.equal(batch["condition"]["class_labels"], whole.labels[numbers])


def test_a_folder_of_images_can_be_streamed(tmp_path):
    for i, image in enumerate(grey_images(12)):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    args = {"train_data_dir": str(tmp_path / "d")}
    whole = ImageData(DataArguments(**args), True, show_progress=False)
    data = ImageData(DataArguments(**args, streaming=True), True, show_progress=False)
    [batch] = take(data.batches(ProcessShare(12), 0), 1)
    numbers = next(order(12, ProcessShare(12)))
    assert torch.equal(batch["images"], whole.images[numbers])
    assert torch.equal(batch["condition"]["class_labels"], whole.labels[numbers])


# --- faults --------------------------------------------------------------------------------------------------------


def deep(values):
    """The bytes of an 8x8 TIFF with these values."""
    buffer = io.BytesIO()
    Image.fromarray(np.resize(values, (8, 8))).save(buffer, "TIFF")
    return buffer.getvalue()


def floats(high):
    return deep(np.linspace(0.1, high, 64, dtype=np.float32))


GREY = [(image, 0) for image in grey_images(12)]
FLOATS = [(floats(1), 0) for _ in range(12)]
LATE_FAULTS = {
    "broken": (GREY, (b"GIF89a, and no more", 0), "row 12.*cannot identify"),
    "missing": (GREY, (None, 0), "row 12.*no image"),
    "coloured": (GREY, (Image.new("RGB", (8, 8), "red"), 0), "row 12.*has colours.*--channels 3"),
    "negative": (GREY, (deep(np.int32([-5, 9])), 0), "row 12.*int32 values from -5 to 9; allowed"),
    "not a number": (FLOATS, (floats(np.nan), 0), "row 12.*NaN"),
    "in another range": (FLOATS, (floats(250), 0), "row 12.*float32 values from 0.1 to 250.*in 0 to 1"),
    "of another type": (FLOATS, (deep(np.int32([0, 200])), 0), "row 12.*int32 values from 0 to 200.*only float32"),
    "a label below": (GREY, (Image.new("L", (8, 8)), -1), r"row 12.*'label'.*integers in \[0, 3\].*-1"),
    "a label above": (GREY, (Image.new("L", (8, 8)), 4), r"row 12.*integers in \[0, 3\].*4"),
    "no label": (GREY, (Image.new("L", (8, 8)), None), r"row 12.*integers in \[0, 3\].*None"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", LATE_FAULTS)
def test_what_a_scan_would_find_is_found_in_the_stream_with_its_row(tmp_path, monkeypatch, fault, workers):
    monkeypatch.setattr(data_module, "FIRST_ROWS", 10)
    before, row, message = LATE_FAULTS[fault]
    folder = write_shards(tmp_path / "d", before, [row])
    data = open_stream(folder, conditional=True, dataloader_num_workers=workers)
    before = set(psutil.Process().children())
    with pytest.raises(StreamFault, match=message) as kept:
        take(data.batches(ProcessShare(4), 0), 5)
    assert kept.value and set(psutil.Process().children()) <= before  # the error does not keep the workers alive


def test_what_is_wrong_with_the_first_rows_is_found_before_training(tmp_path):
    folder = write_shards(tmp_path / "d", [*GREY, (b"GIF89a, and no more", 0), (None, 0)])
    with pytest.raises(ValueError, match=r"(?s)2 of 14 images can't be read.*row 12.*row 13"):
        open_stream(folder)


def test_a_row_without_the_column_is_named():
    rows = StreamedRows(DecodedImages([], "image", 1, (8, 8)))
    fault = rows.__getitems__([(7, {"picture": None})])
    assert isinstance(fault, StreamFault) and str(fault) == "row 7 has no column 'image'. Its columns are picture."


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_ends_in_an_error_gives_all_before_it(workers):
    def rows():
        for i, image in enumerate(grey_images(30)):
            if i == 25:
                raise ConnectionError("the server is away")
            yield {"image": image}

    class Stream:
        __iter__ = staticmethod(rows)

    batches = stream_batches(
        StreamOrder(Stream(), ProcessShare(4), 0), StreamedRows(DecodedImages([], "image", 1, (8, 8))), workers
    )
    assert len({value for batch in values_of(take(batches, 4)) for value in batch}) == 16
    with pytest.raises(StreamFault, match="after row 24: the server is away"):
        next(batches)


def corrupt(folder):
    """Truncate the last shard; returns `folder`."""
    file = sorted(folder.glob("*.parquet"))[-1]
    file.write_bytes(file.read_bytes()[:-20])
    return folder


def test_a_damaged_shard_is_one_line_before_training_where_it_is_among_the_first_rows(tmp_path):
    with pytest.raises(ValueError, match="the dataset can't be read after row 11: .*arquet"):
        open_stream(corrupt(write_shards(tmp_path / "d", GREY, GREY)))
    with pytest.raises(ValueError, match="can't be "):
        open_stream(corrupt(write_shards(tmp_path / "e", GREY)))


def test_a_damaged_shard_later_on_is_a_fault_in_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "FIRST_ROWS", 10)
    data = open_stream(corrupt(write_shards(tmp_path / "d", GREY, GREY)))
    batches = data.batches(ProcessShare(2), 0)
    take(batches, 3)
    with pytest.raises(StreamFault, match="after row 11"):
        next(batches)


def test_what_is_behind_a_subset_is_not_read(tmp_path):
    folder = corrupt(write_shards(tmp_path / "d", GREY, GREY))
    data = open_stream(folder, max_train_samples=12)
    assert sorted(flat(values_of(take(data.batches(ProcessShare(12), 0), 1)))) == list(range(12))


def test_a_worker_that_is_killed_is_a_fault_in_the_stream(three_shards, monkeypatch):
    data = open_stream(three_shards, dataloader_num_workers=1)
    monkeypatch.setattr(DecodedImages, "decode", lambda *args: os._exit(9))
    with pytest.raises(StreamFault, match="can't be decoded: .*worker"):
        next(data.batches(ProcessShare(4), 0))


def test_labels_of_unknown_number_are_refused_with_what_to_do(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    rows = {"image": grey_images(3), "label": ["b", "a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="ClassLabel.*'label' is string. Leave out --streaming"):
        open_stream(folder, conditional=True)


def test_a_stream_without_rows_ends_at_once():
    batches = stream_batches(StreamOrder([], ProcessShare(4), 0), StreamedRows(DecodedImages([], "image", 1, (8, 8))))
    with pytest.raises(StreamFault, match="no rows"):
        next(batches)


# --- training ------------------------------------------------------------------------------------------------------


def settings_of(folder, **settings):
    return {"dataset_name": folder, "streaming": True, "max_train_samples": None, "train_batch_size": 4, **settings}


def test_a_stopped_run_goes_on_to_the_bit(three_shards, tmp_path):
    settings = settings_of(three_shards, max_train_steps=8)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, **settings)
    run(stopped, **settings_of(three_shards, max_train_steps=3))
    run(stopped, **settings)
    assert differences(whole, stopped) == [] and read_log(whole) == read_log(stopped)


def test_a_fault_in_the_middle_saves_first_and_a_repaired_stream_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module, "FIRST_ROWS", 10)
    sound = [(image, 0) for image in grey_images(30)]
    settings = settings_of(tmp_path / "d", max_train_steps=9, checkpointing_steps=100)
    write_shards(tmp_path / "d", [*sound[:20], (b"GIF89a, and no more", 0), *sound[21:]])
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path / "broken", **settings), ["ect"], "")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    [saved] = (tmp_path / "broken").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert error.startswith("error: row 20") and f"saved at step {step}" in error and "same command" in error
    assert [row["step"] for row in read_log(tmp_path / "broken")] == list(range(1, step + 1))
    write_shards(tmp_path / "d", sound)
    run(tmp_path / "broken", **settings)
    run(tmp_path / "whole", **settings)
    assert differences(tmp_path / "broken", tmp_path / "whole") == []
