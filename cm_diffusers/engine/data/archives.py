"""CIFAR-10 and MNIST as their authors publish them, read without running or unpacking anything."""

import gzip
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np

from cm_diffusers.convert.reading import read_arrays


LARGEST_FILE = 256 << 20  # bytes of an image, or of a file in an archive; a larger one is taken for a bomb
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
Arrays = tuple[np.ndarray, np.ndarray, list[str]]  # images (N, H, W) or (N, H, W, 3), uint8; labels (N,); classes


def check_size(size: int) -> None:
    """Raise ValueError for a file of more bytes than an image needs."""
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size >> 20} MiB, more than an image needs")


def is_cifar10(path: Path) -> bool:
    """Whether an archive is CIFAR-10's by the names of what it begins with."""
    with tarfile.open(path) as archive:
        names = [os.path.basename(member.name) for member in islice(archive, 20)]
    return any(name.startswith(("data_batch_", "test_batch", "batches.meta")) for name in names)


def read_cifar10(path: Path, split: str) -> Arrays:
    """From cifar-10-python.tar.gz, whose pickles are read without running them, or from cifar-10-binary.tar.gz."""
    stems = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}.get(split)
    if stems is None:
        raise ValueError(f"CIFAR-10 has the splits train and test, not {split!r}.")
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
        raise ValueError(f"it holds no {missing[0]}, so it is not, or not all of, CIFAR-10; unpack other archives.")
    pixels = np.concatenate([images[stem] for stem in stems]).transpose(0, 2, 3, 1)
    return pixels, np.concatenate([labels[stem] for stem in stems]), CIFAR10


def _pickled_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = read_arrays(data)
    images, labels = batch.get("data"), batch.get("labels")
    if not hasattr(images, "numpy") or not isinstance(labels, list) or any(type(n) is not int for n in labels):
        raise ValueError("it is no batch of CIFAR-10, which has data and labels.")
    return _checked(images.numpy(), np.array(labels))


def _binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % 3073:
        raise ValueError("its size is not that of whole records of 3073 bytes.")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return _checked(records[:, 1:], records[:, 0])


def _checked(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != (len(labels), 3072) or not len(labels) or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(f"images {images.shape} and {len(labels)} labels are none of CIFAR-10's.")
    return images.reshape(-1, 3, 32, 32), labels


def read_mnist(path: Path) -> Arrays:
    """From images-idx3-ubyte and, beside it, labels-idx1-ubyte."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(n) for n in (name, f"{name}.gz", name.removesuffix(".gz"))]
    found = [file for file in beside if file.is_file()]
    if not found:
        raise ValueError(f"its labels {name!r} are not beside it.")
    images, labels = _read_idx(path, 3), _read_idx(found[0], 1)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"it holds {len(images)} images, and {found[0].name} {len(labels)} labels.")
    return images, labels, [str(i) for i in range(labels.max() + 1)]


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Bytes behind a magic number and their big-endian shape."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"{path.name} is no idx file of bytes in {dimensions} dimensions.")
        shape = np.frombuffer(header, ">u4")[1:].astype(int)
        size = int(np.prod(shape, dtype=object))
        if size > 8 * LARGEST_FILE:
            raise ValueError(f"{path.name} claims {size >> 20} MiB of images.")
        data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"{path.name} is cut off, or holds more than the {size} bytes that it claims.")
    return np.frombuffer(data, np.uint8).reshape(shape)
