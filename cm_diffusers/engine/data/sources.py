"""Local datasets of every kind: folders and zips of images, tables, CIFAR-10's archives and MNIST's files.

Nothing of an archive is run or written to disk: its members are read into memory one at a time, and only up to a size.
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
from cm_diffusers.engine.data.columns import Rows, find_image_column, find_label_column, marks_of, paths_of, undecoded
from cm_diffusers.engine.data.labels import MOST_CLASSES, read_labels
from cm_diffusers.engine.data.listing import LABELS, Listing, list_images
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
    """Whether a path is that of a table by its name."""
    return path.suffix.lower() in TABLES


def declares_parts(path: Path) -> bool:
    """Whether a folder, as a copy of one on the Hub, says in README.md itself which files make which dataset."""
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
    say: Callable[[str], None] = lambda line: None,
) -> Rows | None:
    """The rows of a local dataset: a column of images, not decoded, and others; None for what is of another kind.

    Args:
        path: a folder of images, a zip, a table, a folder of tables, or one of `save_to_disk`; a shard of
            webdataset, a folder or a pattern of them.
        split: which part. Images of a folder are all of the split "train"; another is a folder in it.
        streaming: as a stream.
        labelled: with labels, which have to be clear then.
        label_column: which column holds them, if there may be several.
        image_column: which column of tables holds images, where they are given by paths.
        tables: a folder may hold tables instead of images.
        only: what is no dataset of several splits is of the one asked for.
        say: gets a line that says what was read, and what was left out and why.

    Raises:
        ValueError: no such split, or images, tables or labels that can't be read or contradict one another.
        OSError: a file or folder that can't be read.
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
    images = {name: read_images(part, labelled, label_column, say) for name, part in listings.items()}
    rows = select(images, split)
    return rows.to_iterable_dataset() if streaming else rows


def _check_mixture(listing: Listing) -> None:
    """Raise ValueError where nobody can tell whether the images or the tables are the dataset."""
    tables = [name for name in listing.tables if name.endswith((".parquet", ".arrow"))]
    if tables and listing.images:
        raise ValueError(
            f"it holds tables, as {tables[0]}, and images, as {listing.images[0].name}: give --train_data_dir for the"
            " images, or the table or its folder as --dataset_name."
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
        raise ValueError(f"a stream has no parts as {split!r}; give {' or '.join(used)}.")
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
    listing: Listing, labelled: bool, label_column: str | None = None, say: Callable[[str], None] = lambda line: None
) -> datasets.Dataset:
    """The images of a listing as rows: "image", and if `labelled` what metadata says and "label", if there are any.

    Labels are those of EDM's dataset.json, or of the metadata, or else the folders.

    Raises:
        ValueError: there are no images, labels contradict one another, or metadata names what is not there.
    """
    if not listing.images:
        advice = f" Give --dataset_name {listing.root} to read its tables." if listing.tables else ""
        raise ValueError(f"it holds no images{listing.summary()}.{advice}")
    if listing.tells_splits:
        listing.classes()  # which says what to do
    paths = pa.array([image.path for image in listing.images])
    columns = {"image": pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])}
    features = {"image": datasets.Image(decode=False)}
    described, missing = _metadata(listing)
    if labelled:
        columns |= {name: described[name] for name in described.column_names}
        features |= datasets.Features.from_arrow_schema(described.schema)
        if label_column not in described.column_names:
            labels = _labels(listing, described, missing, features)
            if labels is not None:
                columns["label"], features["label"] = labels[0], datasets.ClassLabel(names=labels[1])
    features = datasets.Features(features)
    marks = json.dumps([[image.path, image.mark] for image in listing.images])
    named = getattr(features.get("label"), "names", None)
    kinds = f" in {len(named)} classes ({', '.join(named[:5])}{', ...' if len(named) > 5 else ''})" if named else ""
    note = f" with {_some(listing.metadata)}" if listing.metadata else ""
    note += f", {len(missing)} of them without a row there (as {missing[0]})" if missing else ""
    say(f"Read {len(paths)} images{kinds} of {listing.root}{note}{listing.summary()}.")
    table = pa.table(columns).cast(features.arrow_schema)
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=digest(marks.encode())[:16])


def _metadata(listing: Listing) -> tuple[pa.Table, list[str]]:
    """A row for every image, and the names of the images for which the metadata have none."""
    rows, tables = {}, []
    for name in listing.metadata:
        table = read_rows(listing.root / name)
        if "file_name" not in table.column_names or "image" in table.column_names:
            raise ValueError(
                f"{name} must have a column file_name and none that is called image, but has"
                f" {', '.join(table.column_names)}; rename the file if it does not describe the images."
            )
        for number, file in enumerate(table["file_name"].to_pylist(), sum(map(len, tables))):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(file)))
            if place in rows:
                raise ValueError(f"{name} names {place!r} twice.")
            rows[place] = number
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return pa.table({}), []
    names = [image.name if image.name in rows else image.place for image in listing.images]
    absent = rows.keys() - set(names)
    if absent:
        raise ValueError(
            f"{len(absent)} files that {_some(listing.metadata)} names are not there, or no images, as"
            f" {min(absent)!r}."
        )
    table = pa.concat_tables(tables, promote_options="permissive")
    return table.take(pa.array(map(rows.get, names), pa.int64())), [name for name in names if name not in rows]


def _labels(
    listing: Listing, described: pa.Table, missing: list[str], features: dict[str, Any]
) -> tuple[list[int], list[str]] | None:
    """Labels and classes of the images, if there are any."""
    if listing.labels is not None:
        return _listed_labels([image.place for image in listing.images], listing.labels)
    column = next((name for name in ("label", "labels") if name in described.column_names), None)
    if column is None:
        return listing.classes()
    if missing:
        raise ValueError(f"{len(missing)} images have no label in {_some(listing.metadata)}, as {missing[0]!r}.")
    values = described[column].to_pylist()
    try:
        by_folder = listing.classes()
    except ValueError:  # folders that tell no classes contradict nothing
        by_folder = None
    labels = read_labels(values, features[column], column)
    if by_folder is not None:
        finer = max(len(by_folder[1]), len(labels.classes))
        if len(set(zip(by_folder[0], values))) > finer:
            raise ValueError(
                f"the folders {', '.join(by_folder[1][:3])} give other classes than the column {column!r} of"
                f" {_some(listing.metadata)}: give --label_column {column}, or rename the column."
            )
    return labels.values.tolist(), labels.names


def _listed_labels(names: list[str], listing: bytes) -> tuple[list[int], list[str]] | None:
    try:
        pairs = json.loads(listing)["labels"]
        known = None if pairs is None else dict(pairs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{LABELS} must hold {{"labels": [["name", 0], ...]}}: {error!r}.') from None
    if known is None:
        return None
    for name in names:
        if type(known.get(name)) is not int or not 0 <= known[name] < MOST_CLASSES:
            raise ValueError(
                f"{LABELS} must give {name!r} an integer from 0 to {MOST_CLASSES - 1}, but has {known.get(name)!r}."
            )
    labels = [known[name] for name in names]
    return labels, [str(i) for i in range(max(labels) + 1)]


# --- what is prepared ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberedImages:
    """Images by their numbers, none decoded yet.

    Args:
        names: of the images, for messages.
        read: gives the image of a number, upright, or raises whatever is wrong with it; for several threads.
        labels: of the images, or None.
        classes: their names, where there are labels.
        fingerprint: what tells this source from others.
        said: lines that say what was read, and what was left out and why.
    """

    names: list[str]
    read: Callable[[int], Image.Image]
    labels: list[int] | None
    classes: list[str] | None
    fingerprint: str
    said: list[str] = field(default_factory=list)


def open_source(path: Path, split: str = "train") -> NumberedImages:
    """The images that a dataset can be prepared from.

    Args:
        path: what `load_local` reads; cifar-10-python.tar.gz or cifar-10-binary.tar.gz; a file like
            train-images-idx3-ubyte.gz, beside that of its labels, or a folder of these.
        split: train or test, where the source holds both.

    Raises:
        ValueError: no such source, one of another kind, damaged, or asking for what no dataset needs.
    """
    try:
        if names_shards(str(path)):
            return _by_rows(path, split)
        if not path.exists():
            raise ValueError("there is no such file or folder.")
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
        raise ValueError("it is neither a folder, a zip, a table, an archive of CIFAR-10, nor MNIST's images (idx).")
    except (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"source {str(path)!r} can't be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"source {str(path)!r}: {error}") from None


def _by_rows(path: Path, split: str) -> NumberedImages:
    said = []
    rows = load_local(path, split, only=True, say=said.append)
    if rows is None:
        raise ValueError("it holds no images.")
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
    """What the images are called in messages: files below the source by their way there, others by their rows."""
    names, root = map(name_of, paths), os.path.abspath(source) + os.sep
    return [name.removeprefix(root) if name else f"row {i}" for i, name in enumerate(names)]


def _by_arrays(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> NumberedImages:
    names = [f"image {i}" for i in range(len(images))]
    fingerprint = digest(images.tobytes(), labels.astype(np.int64).tobytes())
    return NumberedImages(names, lambda i: Image.fromarray(images[i]), labels.tolist(), classes, fingerprint)
