"""Readers of CIFAR-10 and MNIST as their authors publish them. Nothing is run, and nothing is unpacked to disk."""

import gzip
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np

from cm_diffusers.convert.reading import read_arrays


LARGEST_FILE = 256 << 20  # bytes of an image or an archive member; a larger one counts as a decompression bomb
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
Arrays = tuple[np.ndarray, np.ndarray, list[str]]  # images (N, H, W) or (N, H, W, 3), uint8; labels (N,); classes


def check_size(size: int) -> None:
    """Refuse a file of `size` bytes that is too large for an image or an archive member.

    Raises:
        ValueError: `size` exceeds `LARGEST_FILE`.
    """
    if size > LARGEST_FILE:
        raise ValueError(
            f"a file of {size >> 20} MiB is too large; an image or archive member has at most {LARGEST_FILE >> 20} MiB"
        )


def is_cifar10(path: Path) -> bool:
    """Return whether the names of the first 20 members show that an archive is CIFAR-10."""
    with tarfile.open(path) as archive:
        names = [os.path.basename(member.name) for member in islice(archive, 20)]
    return any(name.startswith(("data_batch_", "test_batch", "batches.meta")) for name in names)


def read_cifar10(path: Path, split: str) -> Arrays:
    """Read CIFAR-10 from cifar-10-python.tar.gz or cifar-10-binary.tar.gz. Pickles are read without running them.

    Args:
        path: the archive.
        split: "train" (data_batch_1 to data_batch_5) or "test" (test_batch).

    Returns:
        Images (N, 32, 32, 3), uint8; labels (N,) in [0, 10); the names of the 10 classes.

    Raises:
        ValueError: an unknown split, a missing or damaged batch, or a member larger than `LARGEST_FILE`.
        OSError, tarfile.TarError: the archive is unreadable.
    """
    stems = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}.get(split)
    if stems is None:
        raise ValueError(f"CIFAR-10 has the splits train and test, not {split!r}: give one of them.")
    images, labels = {}, {}
    with tarfile.open(path) as archive:
        for member in archive:
            stem, suffix = os.path.splitext(os.path.basename(member.name))
            check_size(member.size)
            if member.isfile() and stem in stems and suffix in ("", ".bin"):
                data = archive.extractfile(member).read()
                read = _binary_batch if suffix else _pickled_batch
                try:
                    images[stem], labels[stem] = read(data)
                except ValueError as error:
                    raise ValueError(f"{member.name}: {error}") from None
    missing = [stem for stem in stems if stem not in images]
    if missing:
        raise ValueError(
            f"it holds no {missing[0]}, so it is not a complete CIFAR-10 archive. Download it again; if it is another"
            " dataset, unpack it and give the folder."
        )
    pixels = np.concatenate([images[stem] for stem in stems]).transpose(0, 2, 3, 1)
    return pixels, np.concatenate([labels[stem] for stem in stems]), CIFAR10


def _pickled_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = read_arrays(data)
    images, labels = batch.get("data"), batch.get("labels")
    if not hasattr(images, "numpy") or not isinstance(labels, list) or any(type(n) is not int for n in labels):
        raise ValueError(
            "this pickle is not a CIFAR-10 batch, which holds data and labels. Download the archive again."
        )
    return _checked(images.numpy(), np.array(labels))


def _binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % 3073:
        raise ValueError(
            f"its {len(data)} bytes are not whole records of 3073 bytes, as CIFAR-10 has. Download the archive again."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return _checked(records[:, 1:], records[:, 0])


def _checked(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != (len(labels), 3072) or not len(labels) or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(
            f"it holds data {images.shape} and {len(labels)} labels; a batch of CIFAR-10 holds data (N, 3072) and N"
            " labels from 0 to 9. Download the archive again."
        )
    return images.reshape(-1, 3, 32, 32), labels


def read_mnist(path: Path) -> Arrays:
    """Read MNIST from a file like train-images-idx3-ubyte(.gz) and the file of labels beside it.

    Args:
        path: the file of images; train-labels-idx1-ubyte(.gz) lies in the same folder.

    Returns:
        Images (N, H, W), uint8; labels (N,), uint8; the names of the classes, "0" and so on.

    Raises:
        ValueError: the file of labels is missing, a file is not idx or is damaged, or images and labels differ in
            number.
        OSError: a file is unreadable.
    """
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(n) for n in (name, f"{name}.gz", name.removesuffix(".gz"))]
    found = [file for file in beside if file.is_file()]
    if not found:
        raise ValueError(
            f"the file of its labels is missing: put {name.removesuffix('.gz')}, or the same with .gz, beside"
            f" {path.name}."
        )
    images, labels = _read_idx(path, 3), _read_idx(found[0], 1)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{path.name} holds {len(images)} images, but {found[0].name} holds {len(labels)} labels. The numbers must"
            " be equal, and above 0. Download both files again."
        )
    return images, labels, [str(i) for i in range(labels.max() + 1)]


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes: the file holds a magic number, the big-endian shape and the values."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(
                f"{path.name} is not an idx file of unsigned bytes in {dimensions} dimensions. Download it again."
            )
        shape = np.frombuffer(header, ">u4")[1:].astype(int)
        size = int(np.prod(shape, dtype=object))
        if size > 8 * LARGEST_FILE:
            raise ValueError(
                f"{path.name} claims {size >> 20} MiB of data; at most {8 * LARGEST_FILE >> 20} MiB are read. Download"
                " it again."
            )
        data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(
            f"{path.name} is cut off, or holds more than the {size} bytes that its header states. Download it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
