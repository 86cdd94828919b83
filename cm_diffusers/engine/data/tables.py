"""Datasets in tables: parquet, Arrow, CSV and JSON lines of any tool, and folders of `save_to_disk`.

Paths are never read as patterns, so they can hold any characters. The split of a table comes from its name
(test.parquet, test-00000-of-00004.parquet), else from its folder (test/0.parquet), and is "train" otherwise.
"""

import csv
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet

from cm_diffusers.engine.data.listing import natural_key


SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}")
SPLITS = {name: name for name in ("train", "test", "validation")}
SPLITS |= {"training": "train", "testing": "test", "eval": "test", "val": "validation", "valid": "validation"}
SPLITS |= {"dev": "validation"}
PATHS = (
    "file_name",
    "filename",
    "file",
    "path",
    "image",
    "img",
    "image_path",
)  # text columns that can hold paths of images


def _kind(path: Path) -> str:
    return path.suffix.lower()


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the datasets library."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def split_of(name: str) -> str:
    """Return the split of a table from its path (with "/") below the folder of a dataset."""
    *folders, file = name.split("/")
    stem = file.rsplit(".", 1)[0]
    shard = SHARD.fullmatch(stem)
    if shard:
        return SPLITS.get(shard[1].lower(), shard[1])
    return next((SPLITS[word.lower()] for word in (stem, *folders[-1:]) if word.lower() in SPLITS), "train")


def split_names(spec: str) -> list[str]:
    """Return the splits that a specification like "train[:10%]+test" names: here "train" and "test"."""
    return re.findall(r"(?:^|\+)\s*([\w.]+)", spec)


def choose_split(known: Sequence[str], name: str) -> str:
    """Return the split of this name, or a synonym of it such as "val" for "validation".

    Args:
        known: names of the splits of the dataset.
        name: the requested split.

    Raises:
        ValueError: there is no such split; the message lists the known ones.
    """
    if name in known:
        return name
    for other in known:
        if SPLITS.get(other.lower(), other) == SPLITS.get(name.lower(), name):
            return other
    raise ValueError(f"there is no split {name!r}; it has {', '.join(sorted(known))}: give --split.")


def select(splits: dict[str, datasets.Dataset], spec: str) -> datasets.Dataset:
    """Return the rows that a specification like "train[:10%]+test" names.

    Args:
        splits: the rows of each split.
        spec: the specification.

    Raises:
        ValueError: an unknown split, or a malformed specification.
    """
    names = {name: choose_split(list(splits), name) for name in split_names(spec)}
    lengths = {name: len(splits[known]) for name, known in names.items()}
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    chosen = [(splits[names[part.splitname]], range(part.from_, part.to)) for part in parts]
    chosen = [rows if len(places) == len(rows) else rows.select(places) for rows, places in chosen]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def load_saved(path: Path) -> dict[str, datasets.Dataset]:
    """Load the splits of a folder of `save_to_disk`."""
    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    return {name: rows.with_format(None) for name, rows in splits.items()}


def load_tables(paths: Sequence[Path], split: str, image_column: str | None = None) -> datasets.Dataset:
    """Load and concatenate tables, in natural order of their paths; parquet files come last.

    Args:
        paths: the files. Paths of images are relative to the folder of their file.
        split: name of the split that they form.
        image_column: column with paths of images; None uses the first text column with a name of `PATHS`.

    Raises:
        ValueError: a file is unreadable, or its columns differ from the first one's.
    """
    paths = sorted(paths, key=lambda path: natural_key(str(path)))
    parts = [_with_paths(_read(path), path.parent, image_column) for path in paths if _kind(path) != ".parquet"]
    for group in _by_folder([path for path in paths if _kind(path) == ".parquet"]):
        builder = _builder(group, split)
        builder.download_and_prepare()
        parts.append(_with_paths(builder.as_dataset(split), group[0].parent, image_column))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def stream_tables(paths: Sequence[Path], split: str, image_column: str | None = None) -> datasets.IterableDataset:
    """Load tables as a stream, with the arguments of `load_tables`.

    Only parquet files are read row by row. If any other table is among `paths`, all are loaded first.
    """
    if any(_kind(path) != ".parquet" for path in paths):
        return load_tables(paths, split, image_column).to_iterable_dataset()
    groups = _by_folder(sorted(paths, key=lambda path: natural_key(str(path))))
    streams = [(_builder(group, split).as_streaming_dataset(split), group[0].parent) for group in groups]
    streams = [_with_paths(stream, folder, image_column) for stream, folder in streams]
    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def _by_folder(paths: Sequence[Path]) -> list[list[Path]]:
    """Neighbours with the same folder, because a table names images relative to its own folder."""
    return [list(group) for _, group in itertools.groupby(paths, key=lambda path: path.parent)]


def _builder(paths: Sequence[Path], split: str) -> Parquet:
    """Reader of parquet files by the datasets library.

    The library receives resolved files, because it would read paths as patterns. Types that it does not know are
    replaced by ones that it knows.
    """
    marks = [(str(path), str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in paths]
    files = DataFilesDict({split: DataFilesList([os.path.abspath(path) for path in paths], marks)})
    try:
        features = features_of(pq.read_schema(paths[0]))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{paths[0]} can't be read: {error}") from None
    return Parquet(data_files=files, features=features, hash=datasets.fingerprint.Hasher.hash(marks))


def features_of(schema: pa.Schema) -> datasets.Features:
    """Return the features of a table. Types unknown to the datasets library become known ones."""
    fields = [field.with_type(_plain(field.type)) for field in schema]
    return datasets.Features.from_arrow_schema(pa.schema(fields, schema.metadata))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _read(path: Path) -> datasets.Dataset:
    """Read an Arrow, CSV, TSV or JSON file."""
    try:
        if _kind(path) == ".arrow":
            table = _read_arrow(path)
        else:
            columns = _read_json(path) if _kind(path) in (".jsonl", ".json") else _read_csv(path)
            table = pa.table({name: pa.array(values) for name, values in columns.items()})
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    features = features_of(table.schema)
    return datasets.Dataset(
        datasets.table.table_cast(table, features.arrow_schema), datasets.DatasetInfo(features=features)
    )


def read_rows(path: Path) -> pa.Table:
    """Read a table of any kind into memory, for the metadata of images.

    Raises:
        ValueError: the file is unreadable.
    """
    if _kind(path) != ".parquet":
        return _read(path).data.table
    try:
        table = pq.read_table(path, partitioning=None)
        return datasets.table.table_cast(table, features_of(table.schema).arrow_schema)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _read_arrow(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def _read_csv(path: Path) -> dict[str, list]:
    """Read a CSV. A column becomes integers or floats if all values are; "01" and "NA" are text, and "" is None."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if _kind(path) == ".tsv" else ",")
        names = next(rows, None)
        if not names:
            raise ValueError("it is empty")
        values = []
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"line {rows.line_num} has {len(row)} values, but the first line has {len(names)}")
            values += [row] if row else []
    columns = zip(*values) if values else ([] for _ in names)
    return {name: _as_numbers(list(column)) for name, column in zip(names, columns)}


def _as_numbers(values: list[str]) -> list:
    values = [value or None for value in values]
    for kind, number in ((int, r"0|-?[1-9][0-9]{0,17}"), (float, r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-]?[0-9]+)?")):
        if all(value is None or re.fullmatch(number, value) for value in values):
            return [value and kind(value) for value in values]
    return values


def _read_json(path: Path) -> dict[str, list]:
    """Read the columns of a file with an object per line, or with one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    rows = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a JSON object per line, or one list of objects")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _with_paths(rows: Any, folder: Path, image_column: str | None) -> Any:
    """The rows, in which a text column of image paths, relative to `folder`, becomes a column of images."""
    features = rows.features
    if features is None or any(isinstance(feature, datasets.Image) for feature in features.values()):
        return rows
    names = PATHS if image_column is None else (image_column,)
    column = next((name for name in names if getattr(features.get(name), "dtype", None) == "string"), None)
    if column is None:
        return rows

    def place(path: str | None) -> dict[str, Any]:
        if path is not None and "://" not in path:
            path = os.path.abspath(folder / path)
        return {"bytes": None, "path": path}

    features = datasets.Features({**features, column: datasets.Image(decode=False)})
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(lambda row: {column: place(row[column])}, features=features)
    kind = features[column].pa_type
    images = pa.array([place(path) for path in rows[column]], kind)
    table = rows.data.table.set_column(rows.data.column_names.index(column), pa.field(column, kind), images)
    return datasets.Dataset(table, datasets.DatasetInfo(features=features))
