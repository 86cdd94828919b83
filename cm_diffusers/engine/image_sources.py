"""What datasets are prepared from: folders, zips, CIFAR-10's archives and MNIST's files.

Nothing of an archive is run or written to disk: its members are read into memory one at a time, and only up to a size.
"""

import hashlib
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cm_diffusers.engine.data import open_image
from cm_diffusers.engine.image_archives import check_size, read_cifar10, read_mnist


LABELS = "dataset.json"  # where EDM and StyleGAN keep them: {"labels": [["folder/image.png", 3], ...]}
MOST_CLASSES = 100_000
IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
SPLITS = {"train", "test", "val", "valid", "validation"}


@dataclass(frozen=True)
class Source:
    """Images by their numbers, none decoded yet.

    Args:
        names: of the images, for messages.
        read: gives the image of a number, upright, or raises whatever is wrong with it; for several threads.
        labels: of the images, or None.
        classes: their names, where there are labels.
        fingerprint: what tells this source from others.
        ignored: names of files that are no images.
    """

    names: list[str]
    read: Callable[[int], Image.Image]
    labels: list[int] | None
    classes: list[str] | None
    fingerprint: str
    ignored: tuple[str, ...] = ()


def open_source(path: Path, split: str = "train") -> Source:
    """The images of a folder (of a folder per class), a zip, an archive of CIFAR-10 or files of MNIST.

    Args:
        path: a folder of images, or of MNIST's files; a .zip; cifar-10-python.tar.gz or cifar-10-binary.tar.gz; a
            file like train-images-idx3-ubyte.gz, beside that of its labels.
        split: train or test, where the source holds both.

    Raises:
        ValueError: no such source, one of another kind, damaged, or asking for what no dataset needs.
    """
    try:
        if path.is_dir():
            idx = path / f"{'t10k' if split == 'test' else split}-images-idx3-ubyte"
            found = [file for file in (idx, idx.with_name(f"{idx.name}.gz")) if file.is_file()]
            return _by_arrays(*read_mnist(found[0])) if found else _folder(path)
        if not path.is_file():
            raise ValueError("there is no such file or folder.")
        if IDX_IMAGES.search(path.name):
            return _by_arrays(*read_mnist(path))
        if zipfile.is_zipfile(path):
            return _zip(path)
        if tarfile.is_tarfile(path):
            return _by_arrays(*read_cifar10(path, split))
        raise ValueError("it is neither a folder, a zip, an archive of CIFAR-10, nor images in an idx file of MNIST.")
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"source {str(path)!r} can't be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"source {str(path)!r}: {error}") from None


# --- files that are images -----------------------------------------------------------------------------------------


def _folder(path: Path) -> Source:
    files = {}
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]  # which are not followed
        for name in (*names, *links):
            file = Path(folder) / name
            files[file.relative_to(path).as_posix()] = file

    def describe(name: str) -> tuple:
        status = files[name].stat()
        return status.st_size, status.st_mtime_ns

    def read(name: str) -> Image.Image:
        check_size(files[name].stat().st_size)
        return open_image({"bytes": None, "path": files[name]})

    return _by_files(files, describe, read, lambda: (path / LABELS).read_bytes())


def _zip(path: Path) -> Source:
    archive = zipfile.ZipFile(path)
    files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    for name in files:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise ValueError(f"it is refused: its member {name!r} would lie outside of it.")

    def read(name: str) -> Image.Image:
        return open_image({"bytes": contents(name), "path": None})

    def contents(name: str) -> bytes:
        check_size(files[name].file_size)
        return archive.read(files[name])

    return _by_files(files, lambda name: (files[name].file_size, files[name].CRC), read, lambda: contents(LABELS))


def _by_files(
    files: Iterable[str],
    describe: Callable[[str], tuple],
    read: Callable[[str], Image.Image],
    listing: Callable[[], bytes],
) -> Source:
    """A source of files by their names, of which those that Pillow knows are images."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    visible = sorted(n for n in files if not any(p.startswith((".", "__MACOSX")) for p in n.split("/")))
    names = [name for name in visible if os.path.splitext(name)[1].lower() in known]
    if not names:
        raise ValueError("it holds no images.")
    listed = listing() if LABELS in visible else None
    labels, classes = _folder_labels(names) if listed is None else _listed_labels(names, listed)
    facts = [[name, *describe(name)] for name in names]
    ignored = tuple(name for name in visible if name not in {*names, LABELS})
    fingerprint = _digest(json.dumps([facts, labels]).encode())
    return Source(names, lambda i: read(names[i]), labels, classes, fingerprint, ignored)


def _folder_labels(names: list[str]) -> tuple[list[int] | None, list[str] | None]:
    """Labels by the uppermost folders that tell images apart, in alphabetical order."""
    paths = [name.split("/") for name in names]
    while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    loose = [name for name, path in zip(names, paths) if len(path) == 1]
    if len(loose) == len(names):
        return None, None
    if loose:
        raise ValueError(f"{loose[0]!r} lies beside folders of images; give every class a folder, or none.")
    classes = sorted({path[0] for path in paths})
    if {name.lower() for name in classes} <= SPLITS:
        raise ValueError(f"its folders {', '.join(classes)} are splits, not classes; prepare one after another.")
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers[path[0]] for path in paths], classes


def _listed_labels(names: list[str], listing: bytes) -> tuple[list[int] | None, list[str] | None]:
    try:
        pairs = json.loads(listing)["labels"]
        known = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{LABELS} must hold {{"labels": [["name", 0], ...]}}: {error!r}.') from None
    if known is None:
        return None, None
    for name in names:
        if type(known.get(name)) is not int or not 0 <= known[name] < MOST_CLASSES:
            raise ValueError(
                f"{LABELS} must give {name!r} an integer from 0 to {MOST_CLASSES - 1}, but has {known.get(name)!r}."
            )
    labels = [known[name] for name in names]
    return labels, [str(i) for i in range(max(labels) + 1)]


def _by_arrays(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Source:
    names = [f"image {i}" for i in range(len(images))]
    fingerprint = _digest(images.tobytes(), labels.astype(np.int64).tobytes())
    return Source(names, lambda i: Image.fromarray(images[i]), labels.tolist(), classes, fingerprint)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
