"""Local datasets of every kind: folders and zips of images, tables, shards, CIFAR-10's archives and MNIST's files.

Nothing in an archive is run or written to disk. Its members are read into memory one at a time, up to a size limit.
"""

import json
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from cm_diffusers.engine.data.archives import is_cifar10, read_cifar10, read_mnist
from cm_diffusers.engine.data.captions import read_caption_files
from cm_diffusers.engine.data.columns import (
    Rows,
    find_caption_column,
    find_image_column,
    find_label_column,
    marks_of,
    paths_of,
    undecoded,
)
from cm_diffusers.engine.data.labels import MOST_CLASSES, read_labels
from cm_diffusers.engine.data.listing import LABELS, TEXT, Listing, list_images
from cm_diffusers.engine.data.listing import TABLES as LISTED_TABLES
from cm_diffusers.engine.data.records import name_of, open_image
from cm_diffusers.engine.data.shards import is_shard, load_shards, names_shards
from cm_diffusers.engine.data.tables import (
    choose_split,
    is_saved,
    load_saved,
    load_tables,
    read_rows,
    select,
    split_names,
    split_of,
    stream_tables,
)
from cm_diffusers.engine.files import digest


IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
TABLES = (*LISTED_TABLES, ".json")


def is_table(path: Path) -> bool:
    """Return whether a path has the suffix of a table, such as .parquet or .csv."""
    return path.suffix.lower() in TABLES


def declares_parts(path: Path) -> bool:
    """Return whether README.md of a folder, such as a copy from the Hub, declares its datasets under `configs:`."""
    readme = path / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.S) if readme.is_file() else None
    return header is not None and re.search(r"^configs:", header[1], re.M) is not None


def load_local(
    path: Path,
    split: str = "train",
    streaming: bool = False,
    labelled: bool = True,
    label_column: str | None = None,
    image_column: str | None = None,
    tables: bool = True,
    only: bool = False,
    captioned: bool = False,
    caption_column: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Rows | None:
    """Load the rows of a local dataset, with images not decoded; return None for any other kind of path.

    Args:
        path: a folder of images, a zip, a table, a folder of tables or of `save_to_disk`; or a webdataset shard, a
            folder of shards or a pattern of them.
        split: the part to load. All images of a folder belong to the split "train"; any other split is a subfolder.
        streaming: return a stream.
        labelled: also read labels, which must not contradict each other.
        label_column: the column of the labels, if several columns can hold them.
        image_column: the column of tables that holds paths of images.
        tables: also accept tables and shards; False reads images only.
        only: assign a dataset without splits, or with a single split, to `split`.
        captioned: also read captions of images, from metadata or from text files beside the images.
        caption_column: the column of the metadata that holds the captions.
        say: receives a line on what was read, and what was left out and why.

    Raises:
        ValueError: the split is missing, or images, tables or labels are unreadable or contradict each other.
        OSError: a file or folder is unreadable.
    """
    if path.is_file() and is_table(path):
        return _read_tables({split_names(split)[0]: [path]}, path, split, streaming, image_column, say)
    if tables and (names_shards(str(path)) or path.is_file() and is_shard(path)):
        return load_shards(path, "train" if only else split, streaming, say)
    if tables and path.is_dir() and is_saved(path):
        splits = load_saved(path)
        rows = select(splits, next(iter(splits)) if only and len(splits) == 1 else split)
        parts = [f"{name} ({len(part)} rows)" for name, part in splits.items()]
        say(f"Read {len(rows)} rows of {path}, which has {_some(parts)}.")
        return rows.to_iterable_dataset() if streaming else rows
    if not path.is_dir() and not zipfile.is_zipfile(path):
        return None
    listing = list_images(path)
    if tables and path.is_dir():
        _check_mixture(listing)
        if not listing.images:
            splits = {}
            for name in listing.tables + listing.metadata:
                splits.setdefault(split_of(name), []).append(path / name)
            if not splits:
                shards = any(map(is_shard, path.rglob("*")))
                return load_shards(path, "train" if only else split, streaming, say) if shards else None
            split = next(iter(splits)) if only and len(splits) == 1 else split
            return _read_tables(splits, path, split, streaming, image_column, say)
    if only or split_names(split) == ["train"]:
        listings, split = {"train": listing}, "train" if only else split
    else:
        listings = {name: list_images(path / name) for name in split_names(split) if (path / name).is_dir()}
    images = {
        name: read_images(part, labelled, label_column, say, captioned, caption_column)
        for name, part in listings.items()
    }
    rows = select(images, split)
    return rows.to_iterable_dataset() if streaming else rows


def _check_mixture(listing: Listing) -> None:
    """Raise ValueError if a folder holds both tables and images, so that its dataset is ambiguous."""
    tables = [name for name in listing.tables if name.endswith((".parquet", ".arrow"))]
    if tables and listing.images:
        raise ValueError(
            f"it holds tables, such as {tables[0]}, and images, such as {listing.images[0].name}. Give the folder as"
            " --train_data_dir to read the images, or the table as --dataset_name."
        )


def _read_tables(
    splits: dict[str, list[Path]], path: Path, split: str, streaming: bool, image_column: str | None, say: Callable
) -> Rows:
    used = {name: choose_split(list(splits), name) for name in split_names(split)}
    others = [file.name for name, files in splits.items() if name not in used.values() for file in files]
    if not streaming:
        rows = select({name: load_tables(splits[known], name, image_column) for name, known in used.items()}, split)
    elif list(used) == [split]:
        rows = stream_tables(splits[used[split]], split, image_column)
    else:
        raise ValueError(
            f"a stream can't be sliced as in {split!r}: give --split {' or '.join(used)}, or leave out --streaming."
        )
    files = [file.name for known in used.values() for file in splits[known]]
    number = "rows" if streaming else f"{len(rows)} rows"
    say(f"Read {number} of {path}: {_some(files)}{'; left out ' + _some(others) if others else ''}.")
    return rows


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{len(names)} files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


# --- folders of images ---------------------------------------------------------------------------------------------


def read_images(
    listing: Listing,
    labelled: bool,
    label_column: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    captioned: bool = False,
    caption_column: str | None = None,
) -> datasets.Dataset:
    """Return the images of a listing as rows.

    The rows have a column "image". If `labelled`, they also have the columns of the metadata and, if found, "label".
    Labels come from EDM's dataset.json, else from the metadata, else from the folders. If `captioned`, the rows have
    the columns of the metadata, or the column "text" from files like a.txt beside a.png.

    Args:
        listing: the images.
        labelled: also read metadata and labels.
        label_column: a column of the metadata to use as labels instead of "label".
        say: receives a line on what was read, and what was left out and why.
        captioned: also read metadata and captions.
        caption_column: a column of the metadata to use for captions, even if there are caption files.

    Raises:
        ValueError: no images, labels or captions that are wrong or contradict each other, or metadata of missing
            files.
    """
    if not listing.images:
        advice = f" Give --dataset_name {listing.root} to read its tables." if listing.tables else ""
        raise ValueError(f"it holds no images{listing.summary()}.{advice}")
    if listing.tells_splits:
        listing.classes()  # its error gives the advice
    paths = pa.array([image.path for image in listing.images])
    columns = {"image": pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])}
    features = {"image": datasets.Image(decode=False)}
    described, missing = _metadata(listing)
    if labelled or captioned:
        columns |= {name: described[name] for name in described.column_names}
        features |= datasets.Features.from_arrow_schema(described.schema)
    captions = _caption_files(listing, datasets.Features(features)) if captioned and caption_column is None else None
    if captions is not None:
        columns["text"], features["text"] = pa.array(captions), datasets.Value("string")
    if labelled:
        if label_column not in described.column_names:
            labels = _labels(listing, described, missing, features)
            if labels is not None:
                columns["label"], features["label"] = labels[0], datasets.ClassLabel(names=labels[1])
    features = datasets.Features(features)
    marks = json.dumps([[image.path, image.mark] for image in listing.images])
    named = getattr(features.get("label"), "names", None)
    kinds = f" in {len(named)} classes ({', '.join(named[:5])}{', ...' if len(named) > 5 else ''})" if named else ""
    note = f" with {_some(listing.metadata)}" if listing.metadata else ""
    note += " with caption files" if captions is not None else ""
    note += f", {len(missing)} of them without a row there (for example {missing[0]})" if missing else ""
    say(f"Read {len(paths)} images{kinds} of {listing.root}{note}{listing.summary()}.")
    table = pa.table(columns).cast(features.arrow_schema)
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=digest(marks.encode())[:16])


def _metadata(listing: Listing) -> tuple[pa.Table, list[str]]:
    """The metadata with a row for every image, and the names of images without metadata."""
    rows, tables = {}, []
    for name in listing.metadata:
        table = read_rows(listing.root / name)
        if "file_name" not in table.column_names or "image" in table.column_names:
            raise ValueError(
                f"{name} must have a column file_name and must not have a column image; it has"
                f" {', '.join(table.column_names)}. Rename the file if it does not describe the images."
            )
        for number, file in enumerate(table["file_name"].to_pylist(), sum(map(len, tables))):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(file)))
            if place in rows:
                raise ValueError(f"{name} names {place!r} twice. Remove one of the rows.")
            rows[place] = number
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return pa.table({}), []
    names = [image.name if image.name in rows else image.place for image in listing.images]
    absent = rows.keys() - set(names)
    if absent:
        raise ValueError(
            f"{len(absent)} files named in {_some(listing.metadata)} are missing or not images, for example"
            f" {min(absent)!r}. Add these files, or remove their rows."
        )
    table = pa.concat_tables(tables, promote_options="permissive")
    return table.take(pa.array(map(rows.get, names), pa.int64())), [name for name in names if name not in rows]


def _caption_files(listing: Listing, features: datasets.Features) -> list[str] | None:
    """The captions in text files beside the images; None if there are none. The files no longer count as left out."""
    captions = read_caption_files(listing)
    if captions is None:
        return None
    column = find_caption_column(features, None, "image", missing_ok=True)
    if column is not None:
        raise ValueError(
            f"it has captions in the column {column!r} of {_some(listing.metadata)} and in text files beside the"
            f" images. Give --caption_column {column} to use the column, or move the .txt files away."
        )
    used = {os.path.splitext(name)[0] for image in listing.images for name in (image.name, image.place)}
    names = [name for name in listing.left_out.pop(TEXT, []) if os.path.splitext(name)[0] not in used]
    for name in names:
        listing.leave_out(TEXT, name)
    return captions


def _labels(
    listing: Listing, described: pa.Table, missing: list[str], features: dict[str, Any]
) -> tuple[list[int], list[str]] | None:
    """The label of each image and the names of the classes; None if the listing gives no labels."""
    if listing.labels is not None:
        return _listed_labels([image.place for image in listing.images], listing.labels)
    column = next((name for name in ("label", "labels") if name in described.column_names), None)
    if column is None:
        return listing.classes()
    if missing:
        raise ValueError(
            f"{len(missing)} images have no label in {_some(listing.metadata)}, for example {missing[0]!r}. Add their"
            " rows, or move these images away."
        )
    values = described[column].to_pylist()
    try:
        by_folder = listing.classes()
    except ValueError:  # folders without clear classes contradict nothing
        by_folder = None
    labels = read_labels(values, features[column], column)
    if by_folder is not None:
        finer = max(len(by_folder[1]), len(labels.classes))
        if len(set(zip(by_folder[0], values))) > finer:
            raise ValueError(
                f"the folders {', '.join(by_folder[1][:3])} give other classes than the column {column!r} of"
                f" {_some(listing.metadata)}. Give --label_column {column} to use the column, or rename it to use the"
                " folders."
            )
    return labels.values.tolist(), labels.names


def _listed_labels(names: list[str], listing: bytes) -> tuple[list[int], list[str]] | None:
    try:
        pairs = json.loads(listing)["labels"]
        known = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{LABELS} must hold {{"labels": [["name", 0], ...]}}, but reading it gave {error!r}.'
        ) from None
    if known is None:
        return None
    for name in names:
        if type(known.get(name)) is not int or not 0 <= known[name] < MOST_CLASSES:
            raise ValueError(
                f"{LABELS} must give {name!r} an integer from 0 to {MOST_CLASSES - 1}, but gives {known.get(name)!r}."
            )
    labels = [known[name] for name in names]
    return labels, [str(i) for i in range(max(labels) + 1)]


# --- sources of prepare_data.py ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberedImages:
    """The images of a source by number, not decoded yet.

    Args:
        names: name of each image, for messages.
        read: read(i) returns image i, upright, or raises an error. It can be called from several threads.
        labels: label of each image; None without labels.
        classes: names of the classes; None without labels.
        fingerprint: digest that identifies the source.
        said: lines on what was read, and what was left out and why.
    """

    names: list[str]
    read: Callable[[int], Image.Image]
    labels: list[int] | None
    classes: list[str] | None
    fingerprint: str
    said: list[str] = field(default_factory=list)


def open_source(path: Path, split: str = "train") -> NumberedImages:
    """Open the source of a dataset that is to be prepared.

    Args:
        path: one of

            - a path that `load_local` reads,
            - cifar-10-python.tar.gz or cifar-10-binary.tar.gz,
            - a file like train-images-idx3-ubyte.gz beside the file of its labels, or a folder of both.
        split: "train" or "test", if the source holds both.

    Raises:
        ValueError: the source is missing, of an unknown kind or damaged, or its pickles would run other code.
    """
    try:
        if names_shards(str(path)):
            return _by_rows(path, split)
        if not path.exists():
            raise ValueError("there is no such file or folder. Check the path.")
        if path.is_dir():
            idx = path / f"{'t10k' if split == 'test' else split}-images-idx3-ubyte"
            found = [file for file in (idx, idx.with_name(f"{idx.name}.gz")) if file.is_file()]
            return _by_arrays(*read_mnist(found[0])) if found else _by_rows(path, split)
        if IDX_IMAGES.search(path.name):
            return _by_arrays(*read_mnist(path))
        if is_table(path) or zipfile.is_zipfile(path) or is_shard(path) and not is_cifar10(path):
            return _by_rows(path, split)
        if tarfile.is_tarfile(path):
            return _by_arrays(*read_cifar10(path, split))
        raise ValueError(
            "its kind is unknown. Give a folder, a zip, a table, webdataset shards, an archive of CIFAR-10, or MNIST's"
            " file of images (idx)."
        )
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"source {str(path)!r} can't be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"source {str(path)!r}: {error}") from None


def _by_rows(path: Path, split: str) -> NumberedImages:
    said = []
    rows = load_local(path, split, only=True, say=said.append)
    if rows is None:
        raise ValueError("it holds no images. Give a folder or an archive with images.")
    column = find_image_column(rows.features, None)
    rows = undecoded(rows, column, rows.features)
    label_column = find_label_column(rows.features, None, missing_ok=True)
    labels = label_column and read_labels(rows[label_column][:], rows.features[label_column], label_column)
    paths = paths_of(rows, column)
    facts = [rows._fingerprint, marks_of(paths), labels and labels.values.tolist()]
    return NumberedImages(
        _names(paths, path),
        lambda i: open_image(rows[i][column]),
        labels and labels.values.tolist(),
        labels and labels.names,
        digest(json.dumps(facts).encode()),
        said,
    )


def _names(paths: list[str | None], source: Path) -> list[str]:
    """Names of the images for messages: the path below the source for files, else the row."""
    names, root = map(name_of, paths), os.path.abspath(source) + os.sep
    return [name.removeprefix(root) if name else f"row {i}" for i, name in enumerate(names)]


def _by_arrays(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> NumberedImages:
    names = [f"image {i}" for i in range(len(images))]
    fingerprint = digest(images.tobytes(), labels.astype(np.int64).tobytes())
    return NumberedImages(names, lambda i: Image.fromarray(images[i]), labels.tolist(), classes, fingerprint)
