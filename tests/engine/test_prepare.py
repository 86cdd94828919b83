"""Data preparation: every kind of source, refusals, the resulting images, and stops, which change nothing."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import signal
import struct
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import cm_diffusers.engine.data.archives as archives_module
import cm_diffusers.engine.data.prepare as prepare_module
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.prepare import crop_middle
from cm_diffusers.engine.data.sources import open_source
from tests.helpers.scripts import load_script


SCRIPT = Path(__file__).parents[2] / "training" / "prepare_data.py"
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def prepare(source, output, *words):
    """Run the script in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        load_script("prepare_data").main([str(source), str(output), *map(str, words)])
    return end.value.code


def read(output, split="train"):
    """Features, images as arrays, and labels from load_dataset."""
    data = datasets.load_dataset(str(output), split=split)
    labels = data["label"][:] if "label" in data.features else None
    return data.features, [np.asarray(image) for image in data["image"]], labels


def pixels(seed, height=8, width=8, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path, count=7, classes=("cat", "dog"), size=(8, 8)):
    """Write images in one folder per class; returns their arrays and labels in alphabetical order."""
    arrays = [pixels(i, *size) for i in range(count)]
    for i, array in enumerate(arrays):
        file = path / classes[i % len(classes)] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(array))
    order = [i for c in range(len(classes)) for i in range(c, count, len(classes))]
    return [arrays[i] for i in order], [i % len(classes) for i in order]


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def same(images, arrays):
    return len(images) == len(arrays) and all(np.array_equal(a, b) for a, b in zip(images, arrays))


# --- sources -------------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_and_what_training_makes_of_it(tmp_path, capsys):
    arrays, labels = folder(tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / ".DS_Store").write_text("x")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    features, images, found = read(tmp_path / "out")
    assert isinstance(features["image"], datasets.Image) and features["label"].names == ["cat", "dog"]
    assert same(images, arrays) and found == labels
    said = capsys.readouterr().out
    assert "Read 7 images in 2 classes (cat, dog)" in said and "7 images of 3 x 8 x 8 in 2 classes" in said
    assert "; left out 2: 1 .txt (notes.txt), 1 hidden (.DS_Store)." in said

    command = shlex.split(re.search("Train on it: (.*)", said)[1])
    assert command[:2] == ["python", "training/train_consistency.py"]
    assert command[command.index("--dataset_name") + 1] == str(tmp_path / "out") and "--class_conditional" in command
    data = ImageData(DataArguments(dataset_name=str(tmp_path / "out")), True, show_progress=False)
    assert data.labels.tolist() == labels and data.num_classes == 2
    assert same([image.permute(1, 2, 0).numpy() for image in data.images], arrays)


def test_a_folder_without_classes_has_no_labels(tmp_path):
    arrays, _ = folder(tmp_path / "in", classes=("all",))
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    features, images, labels = read(tmp_path / "out")
    assert list(features) == ["image"] and labels is None and same(images, arrays)


def test_two_splits_in_one_folder(tmp_path):
    train, _ = folder(tmp_path / "a")
    test, _ = folder(tmp_path / "b", count=3)
    assert (
        prepare(tmp_path / "a", tmp_path / "out") == prepare(tmp_path / "b", tmp_path / "out", "--split", "test") == 0
    )
    assert same(read(tmp_path / "out")[1], train) and same(read(tmp_path / "out", "test")[1], test)


@pytest.mark.parametrize("listed", [True, False])
def test_a_zip_as_edm_has_it(tmp_path, listed):
    arrays = [pixels(i) for i in range(4)]
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(4)]
    labels = [[name, label] for name, label in zip(names, [2, 0, 2, 1])] if listed else None
    members = {name: png(array) for name, array in zip(names, arrays)}
    path = zipped(tmp_path / "edm.zip", {**members, "dataset.json": json.dumps({"labels": labels})})
    assert prepare(path, tmp_path / "out") == 0
    features, images, found = read(tmp_path / "out")
    assert same(images, [arrays[i] for i in (0, 2, 1, 3)])
    assert found == ([2, 2, 0, 1] if listed else None)
    assert "label" not in features or features["label"].num_classes == 3


def test_a_zip_of_class_folders_under_one_folder(tmp_path):
    members = {f"mine/{c}/{i}.png": png(pixels(i)) for i, c in enumerate(("b", "a"))}
    path = zipped(tmp_path / "a.zip", {**members, "__MACOSX/mine/a/._1.png": b"x", "mine/": b""})
    assert prepare(path, tmp_path / "out") == 0
    features, images, labels = read(tmp_path / "out")
    assert features["label"].names == ["a", "b"] and labels == [0, 1] and same(images, [pixels(1), pixels(0)])


def python2_batch(images, labels):
    """A CIFAR-10 batch as pickled by Python 2, where texts and bytes have one type."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    shape = b"".join(b"M" + struct.pack("<H", n) for n in images.shape)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01" + shape + b"\x86"
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += text(images.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    name = text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + name + text(b"labels") + numbers + text(b"data") + array + b"u."


def python3_batch(images, labels):
    return pickle.dumps({"data": np.asfortranarray(images), "labels": list(labels)}, protocol=4)


def binary_batch(images, labels):
    return np.concatenate([np.array(labels, np.uint8)[:, None], images], 1).tobytes()


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def batches():
    """Rows of 3072 bytes, and labels, for the five training batches and the test batch."""
    return [(np.stack([pixels(10 * b + i, 1, 3072, 1)[0] for i in range(3)]), [b, 9, 0]) for b in range(6)]


@pytest.mark.parametrize(
    "write, suffix", [(python2_batch, ""), (python3_batch, ""), (binary_batch, ".bin")], ids=["py2", "py3", "binary"]
)
def test_cifar_10(tmp_path, write, suffix):
    names = [f"cifar/data_batch_{i + 1}{suffix}" for i in range(5)] + [f"cifar/test_batch{suffix}"]
    members = {name: write(*batch) for name, batch in zip(names, batches())}
    path = tar(tmp_path / "cifar-10.tar.gz", {"cifar/batches.meta": b"not read", **members})
    assert prepare(path, tmp_path / "out") == prepare(path, tmp_path / "out", "--split", "test") == 0
    for split, part in (("train", batches()[:5]), ("test", batches()[5:])):
        features, images, labels = read(tmp_path / "out", split)
        assert features["label"].names == CIFAR10 and labels == [n for _, some in part for n in some]
        rows = np.concatenate([rows for rows, _ in part])
        assert same(images, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (bytes, "")])
def test_mnist(tmp_path, pack, suffix):
    for name, n in (("train", 5), ("t10k", 3)):
        images = np.stack([pixels(i, 28, 28, 1) for i in range(n)])
        (tmp_path / f"{name}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        labels = np.arange(n, dtype=np.uint8)[::-1].copy()
        (tmp_path / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    assert prepare(tmp_path / f"train-images-idx3-ubyte{suffix}", tmp_path / "out") == 0
    assert prepare(tmp_path, tmp_path / "out", "--split", "test") == 0
    features, images, labels = read(tmp_path / "out")
    assert features["label"].names == list("01234") and labels == [4, 3, 2, 1, 0]
    assert same(images, [pixels(i, 28, 28, 1) for i in range(5)])
    assert read(tmp_path / "out", "test")[2] == [2, 1, 0]


# --- the resulting images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, box", [((9, 6), (0, 1, 6, 7)), ((6, 11), (2, 0, 8, 6)), ((6, 6), (0, 0, 6, 6))])
def test_the_middle_is_cropped_in_whole_pixels(shape, box):
    image = Image.fromarray(pixels(0, *shape))
    assert np.array_equal(crop_middle(image, 3, 3), image.crop(box))


def test_a_crop_of_another_shape_than_a_square():
    assert crop_middle(Image.new("L", (100, 100)), 10, 20).size == (100, 50)
    assert crop_middle(Image.new("L", (300, 100)), 10, 20).size == (200, 100)
    assert crop_middle(Image.new("L", (1, 1)), 10, 20).size == (1, 1)


def test_lanczos_on_the_crop_or_on_all_of_the_image(tmp_path):
    folder(tmp_path / "in", 1, ("a",), (20, 30))
    image = Image.fromarray(pixels(0, 20, 30))
    for transform, box in (("center_crop", (5, 0, 25, 20)), ("stretch", None)):
        words = ["--resolution", 8, "--transform", transform]
        assert prepare(tmp_path / "in", tmp_path / transform, *words) == 0
        expected = np.asarray(image.crop(box).resize((8, 8), Image.Resampling.LANCZOS))
        assert same(read(tmp_path / transform)[1], [expected])


def test_resolution_is_height_and_width_and_enlarging_is_said(tmp_path, capsys):
    folder(tmp_path / "in", 3, size=(8, 20))
    assert prepare(tmp_path / "in", tmp_path / "out", "--resolution", 10, 12) == 0
    assert read(tmp_path / "out")[1][0].shape == (10, 12, 3)
    assert "WARNING: 3 images are smaller" in capsys.readouterr().out


def test_every_kind_of_pixel_in_one_dataset(tmp_path):
    (tmp_path / "in").mkdir()
    rotated, exif = pixels(0), Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (255, 0)]
    kinds = {
        "animated.gif": (frames[0], np.full((8, 8, 3), [255, 0, 0])),
        "cmyk.tiff": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), np.full((8, 8, 3), [255, 0, 0])),
        "grey16.png": (Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)), np.full((8, 8, 3), 100)),
        "rotated.png": (Image.fromarray(rotated), np.rot90(rotated, 3)),
        "transparent.png": (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), np.full((8, 8, 3), 255)),
    }
    for name, (image, _) in kinds.items():
        more = {"rotated.png": {"exif": exif}, "animated.gif": {"save_all": True, "append_images": frames[1:]}}
        image.save(tmp_path / "in" / name, **more.get(name, {}))
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert same(read(tmp_path / "out")[1], [expected for _, expected in kinds.values()])
    assert all(not image.getexif() for image in datasets.load_dataset(str(tmp_path / "out"), split="train")["image"])


def test_grey_stays_grey_where_all_are_unless_rgb_is_asked_for(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(pixels(0, channels=1)))
    assert prepare(tmp_path / "in", tmp_path / "grey") == 0
    assert prepare(tmp_path / "in", tmp_path / "rgb", "--channels", 3) == 0
    assert same(read(tmp_path / "grey")[1], [pixels(0, channels=1)])
    assert same(read(tmp_path / "rgb")[1], [np.stack([pixels(0, channels=1)] * 3, -1)])


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zip_it", [False, True])
def test_every_bad_image_is_listed_and_nothing_is_written(tmp_path, capsys, monkeypatch, zip_it):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    monkeypatch.setattr(archives_module, "LARGEST_FILE", 30_000)
    good = png(pixels(0, 64, 64))
    bad = {
        "bomb.png": png(np.zeros((200, 200), np.uint8)),
        "cut.png": good[: len(good) // 2],
        "empty.png": b"",
        "huge.png": bytes(40_000_000),
        "page.jpg": b"<!DOCTYPE html>404",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        **{f"{i}.png": b"no image" for i in range(30)},
    }
    members = {f"a/{name}": content for name, content in {**bad, "good.png": good}.items()}
    if zip_it:
        source = zipped(tmp_path / "in.zip", members)
    else:
        source = tmp_path / "in"
        for name, content in members.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    assert prepare(source, tmp_path / "out", "--resolution", 8) == 2
    error = capsys.readouterr().err
    assert "error: 36 of 37 images can't be read; nothing was written" in error and "good.png" not in error
    assert all(re.search(rf"^  a/{re.escape(name)}: .+", error, re.M) for name in bad)
    assert "exceeds limit" in error and "38 MiB" in error and "PostScript" in error
    assert not list((tmp_path / "out").rglob("*.parquet"))


def hostile_batch():
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    return pickle.dumps({"data": Payload(), "labels": [0]}, protocol=2)


PICKLES = {
    "call": hostile_batch(),
    "floats": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, protocol=4),
    "lie": python2_batch(np.zeros((1, 3072), np.uint8), [0]).replace(b"M\x00\x0c\x86", b"M\x00\xff\x86"),
    "label": python2_batch(np.zeros((1, 3072), np.uint8), [10]),
    "no batch": pickle.dumps({"data": [1], "labels": [0]}, protocol=4),
    "list": pickle.dumps([1], protocol=4),
    "cut": python2_batch(np.zeros((1, 3072), np.uint8), [0])[:-20],
    "no pickle": b"hello",
}
ANSWERS = {
    "call": "refused: it asks for (posix|nt).mkdir",
    "floats": "'f8', not of bytes",
    "label": "1 labels; a batch of CIFAR-10",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_and_damaged_batches_of_cifar_10_are_refused_and_run_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    good = python2_batch(*batches()[0])
    members = {f"data_batch_{i}": good for i in range(1, 6)} | {"data_batch_3": PICKLES[kind]}
    with pytest.raises(ValueError, match=f"data_batch_3.*{ANSWERS.get(kind, '')}"):
        open_source(tar(tmp_path / "cifar.tar.gz", members))
    assert not (tmp_path / "ran").exists()


def test_archives_that_are_no_datasets_are_refused(tmp_path, monkeypatch):
    def refused(path, reason, split="train"):
        with pytest.raises(ValueError, match=rf"source '{re.escape(str(path))}'.*{reason}"):
            open_source(path, split)

    refused(tmp_path / "missing", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images")
    (tmp_path / "a.bin").write_bytes(b"hello")
    refused(tmp_path / "a.bin", "its kind is unknown. Give a folder")
    refused(tar(tmp_path / "empty.tar.gz", {}), "no samples")
    refused(tar(tmp_path / "other.tar.gz", {"a.txt": b"text"}), "no column of images")
    refused(tar(tmp_path / "part.tar.gz", {"test_batch": b""}), "no data_batch_1.*unpack")
    refused(tar(tmp_path / "c.tar.gz", {"test_batch": b""}), "splits train and test, not 'val'", "val")
    refused(tar(tmp_path / "short.tar.gz", {"data_batch_1.bin": bytes(3072)}), "whole records")
    refused(zipped(tmp_path / "up.zip", {"../../a.png": png(pixels(0))}), "refused: its member '../../a.png'")
    refused(zipped(tmp_path / "abs.zip", {"/etc/a.png": png(pixels(0))}), "refused: its member '/etc/a.png'")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(tar(tmp_path / "whole.tar.gz", {"data_batch_1": bytes(np.random.bytes(9000))}).read_bytes()[:4000])
    refused(cut, "can't be read")
    monkeypatch.setattr(archives_module, "LARGEST_FILE", 1000)
    refused(tar(tmp_path / "bomb.tar.gz", {"data_batch_1": bytes(5000)}), "is too large")


def test_labels_that_can_t_be_used_are_refused(tmp_path):
    def refused(members, reason):
        with pytest.raises(ValueError, match=reason):
            open_source(zipped(tmp_path / "a.zip", members))

    image = png(pixels(0))
    refused({"a.png": image, "cat/b.png": image}, "'a.png' lies beside folders")
    refused({"train/a.png": image, "test/b.png": image}, "test, train are splits")
    for listing, reason in {
        '{"labels": [["b.png", 1]]}': "must give 'a.png' an integer.*None",
        '{"labels": [["a.png", -1]]}': "-1",
        '{"labels": [["a.png", 1e9]]}': "1000000000",
        '{"labels": [["a.png", 1000000000]]}': "0 to 99999",
        '{"labels": [["a.png", [0, 1]]]}': "integer",
        '{"labels": [[["a"], 0]]}': "must hold",
        '{"labels": [[1, 2, 3]]}': "must hold",
        "{}": "must hold",
        "[" * 100_000: "must hold",
    }.items():
        refused({"a.png": image, "dataset.json": listing}, reason)


@pytest.mark.parametrize(
    "images, labels, reason",
    [
        (b"\0\0\x08\x01" + bytes(20), None, "not an idx file of unsigned bytes in 3 dimensions"),
        (idx(pixels(0, 2, 28, 1)[None])[:-1], None, "cut off"),
        (idx(pixels(0, 2, 28, 1)[None]) + b"x", None, "cut off, or holds more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, None, "claims"),
        (idx(np.zeros((2, 4, 4), np.uint8)), idx(np.zeros(3, np.uint8)), "2 images.*3 labels"),
        (idx(np.zeros((2, 4, 4), np.uint8)), b"", "labels-idx1-ubyte.gz is not an idx file"),
    ],
)
def test_bad_files_of_mnist_are_refused(tmp_path, images, labels, reason):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(images))
    with pytest.raises(ValueError, match="the file of its labels is missing: put train-labels-idx1-ubyte, or"):
        open_source(file)
    labels = idx(np.zeros(1, np.uint8)) if labels is None else labels
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    with pytest.raises(ValueError, match=reason):
        open_source(file)


def test_images_of_several_sizes_need_a_resolution(tmp_path, capsys):
    folder(tmp_path / "in", 2, size=(8, 8))
    (tmp_path / "in" / "dog" / "9.png").write_bytes(png(pixels(9, 8, 9)))
    assert prepare(tmp_path / "in", tmp_path / "out") == 2
    assert "2 sizes, for example 8 x 8 (cat/0.png) and 8 x 9 (dog/9.png); give --resolution" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--resolution", 0], "resolution takes"),
        (["--resolution", 1, 2, 3], "resolution takes"),
        (["--split", "a/b"], "split must be one word"),
        (["--hub_dataset_id", "a/b"], "hub_dataset_id has no effect without --push_to_hub"),
    ],
)
def test_words_that_mean_nothing_are_refused(tmp_path, capsys, words, reason):
    assert prepare(tmp_path, tmp_path / "out", *words) == 2
    assert reason in capsys.readouterr().err


# --- stops ---------------------------------------------------------------------------------------------------------


def contents(output):
    """The SHA-256 of every file of a finished dataset."""
    files = [file for file in sorted(output.rglob("*")) if file.is_file() and file.name not in (".lock", ".owner")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_that_is_stopped_at_any_write_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 2 * 3 * 8 * 8)
    folder(tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "whole") == 0
    expected = contents(tmp_path / "whole")
    assert len(expected) == 5  # the plan and four shards
    looks, writes, stop_at = [], [], [0]
    read_image, write = Image.open, prepare_module.replace_file

    def stopping(path, data):
        writes.append(path)
        if len(writes) == stop_at[0]:
            path.with_name(f".tmp-{path.name}").write_bytes(data[:100])  # a partial file, as left by a kill
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(prepare_module, "replace_file", stopping)
    monkeypatch.setattr(Image, "open", lambda *a, **k: looks.append(1) or read_image(*a, **k))
    script = load_script("prepare_data")
    for k in range(1, 6):
        output = tmp_path / f"out{k}"
        stop_at[0] = k
        writes.clear()
        with pytest.raises(KeyboardInterrupt):
            script.main([str(tmp_path / "in"), str(output)])
        assert not (output / "train").exists()  # a part is not mistaken for the whole
        looks.clear()
        stop_at[0] = 0
        assert prepare(tmp_path / "in", output) == 0
        assert contents(output) == expected
        assert len(looks) == (14 if k == 1 else 7 - 2 * (k - 2))  # no finished shard is checked or written again


@pytest.mark.parametrize("moment, shards", [("to_uint8", 0), ("replace_file", 2)])
def test_a_killed_process_leaves_nothing_that_the_same_command_does_not_mend(tmp_path, monkeypatch, moment, shards):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 2 * 3 * 8 * 8)
    folder(tmp_path / "in", 12)
    original, calls = getattr(prepare_module, moment), []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:  # for writes, the third shard's, after the plan
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    child = os.fork()
    if child == 0:
        setattr(prepare_module, moment, killed)
        prepare(tmp_path / "in", tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == shards
    assert prepare(tmp_path / "in", tmp_path / "out") == prepare(tmp_path / "in", tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_a_line_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(
            prepare_module, "replace_file", lambda path, data: os.write(os.open("/dev/full", os.O_WRONLY), data)
        )
        assert prepare(tmp_path / "in", tmp_path / "out") == 2
    assert "No space left on device. Free some space" in (said := capsys.readouterr().err)
    assert "the same command again, which continues from the saved state" in said and "another OUTPUT" in said
    assert prepare(tmp_path / "in", tmp_path / "out") == prepare(tmp_path / "in", tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_another_source_do_not_mix_with_what_is_there(tmp_path, capsys):
    folder(tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0  # finished: nothing to do
    assert prepare(tmp_path / "in", tmp_path / "out", "--resolution", 4) == 2
    assert "begun with another resolution None" in capsys.readouterr().err
    (tmp_path / "in" / "cat" / "new.png").write_bytes(png(pixels(9)))
    assert prepare(tmp_path / "in", tmp_path / "out") == 2
    assert "begun with another source" in capsys.readouterr().err
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    assert prepare(tmp_path / "in", tmp_path / "foreign") == 2
    assert "was not made by prepare_data.py" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_an_image_that_goes_bad_after_the_check_is_named(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "in", 2)
    plan = prepare_module._plan

    def then_spoil(*args):
        found = plan(*args)
        (tmp_path / "in" / "dog" / "1.png").write_bytes(b"x")
        return found

    monkeypatch.setattr(prepare_module, "_plan", then_spoil)
    assert prepare(tmp_path / "in", tmp_path / "out") == 2
    assert "dog/1.png can't be read any more" in capsys.readouterr().err
