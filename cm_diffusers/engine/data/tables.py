"""Datasets in files of tables: parquet, Arrow, CSV and JSON lines of any tool, and folders of `save_to_disk`.

Their paths are taken as they are, whatever characters they hold. A table is of a split if its name says so, as in
test.parquet or test-00000-of-00004.parquet, or else the folder that it lies in (test/0.parquet); of "train" otherwise.
"""

import csv
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
PATHS = ("file_name", "filename", "file", "path", "image", "img", "image_path")  # columns of text that may be files


def _kind(path: Path) -> str:
    return path.suffix.lower()


def is_saved(path: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def split_of(name: str) -> str:
    """The split of a table by its name (with "/") below the folder of a dataset."""
    *folders, file = name.split("/")
    stem = file.rsplit(".", 1)[0]
    shard = SHARD.fullmatch(stem)
    if shard:
        return SPLITS.get(shard[1].lower(), shard[1])
    return next((SPLITS[word.lower()] for word in (stem, *folders[-1:]) if word.lower() in SPLITS), "train")


def split_names(spec: str) -> list[str]:
    """The splits that a specification like "train[:10%]+test" names."""
    return re.findall(r"(?:^|\+)\s*([\w.]+)", spec)


def choose_split(known: Sequence[str], name: str) -> str:
    """The split of this name, or of one that means the same. Raises ValueError with those that there are."""
    if name in known:
        return name
    for other in known:
        if SPLITS.get(other.lower(), other) == SPLITS.get(name.lower(), name):
            return other
    raise ValueError(f"there is no split {name!r}; it has {', '.join(sorted(known))}: give --split.")


def select(splits: dict[str, datasets.Dataset], spec: str) -> datasets.Dataset:
    """The rows that a specification like "train[:10%]+test" names. Raises ValueError for an unknown one."""
    names = {name: choose_split(list(splits), name) for name in split_names(spec)}
    lengths = {name: len(splits[known]) for name, known in names.items()}
    parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    chosen = [(splits[names[part.splitname]], range(part.from_, part.to)) for part in parts]
    chosen = [rows if len(places) == len(rows) else rows.select(places) for rows, places in chosen]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def load_saved(path: Path) -> dict[str, datasets.Dataset]:
    """The splits of a folder of `save_to_disk`."""
    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
    return {name: rows.with_format(None) for name, rows in splits.items()}


def load_tables(paths: Sequence[Path], split: str, image_column: str | None = None) -> datasets.Dataset:
    """The rows of tables one after another, in natural order of their paths.

    Args:
        paths: the files; paths of images in them are relative to their folders.
        split: the name of what they make together.
        image_column: which column holds the images; by default one called like those of `PATHS` may hold paths.

    Raises:
        ValueError: a file that can't be read, or with other columns than the first.
    """
    paths = sorted(paths, key=lambda path: natural_key(str(path)))
    parquet = [path for path in paths if _kind(path) == ".parquet"]
    parts = [_read(path) for path in paths if _kind(path) != ".parquet"]
    if parquet:
        builder = _builder(parquet, split)
        builder.download_and_prepare()
        parts.append(builder.as_dataset(split))
        paths = [path for path in paths if _kind(path) != ".parquet"] + parquet[:1]
    parts = [_with_paths(part, path.parent, image_column) for part, path in zip(parts, paths)]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def stream_tables(paths: Sequence[Path], split: str, image_column: str | None = None) -> datasets.IterableDataset:
    """The same as a stream."""
    if any(_kind(path) != ".parquet" for path in paths):
        return load_tables(paths, split, image_column).to_iterable_dataset()
    paths = sorted(paths, key=lambda path: natural_key(str(path)))
    stream = _builder(paths, split).as_streaming_dataset(split)
    return _with_paths(stream, paths[0].parent, image_column)


def _builder(paths: Sequence[Path], split: str) -> Parquet:
    """Reads parquet by the datasets library, which is given the files themselves, as it would take their names for
    patterns, and the types that it knows for those that it does not."""
    marks = [(str(path), str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in paths]
    files = DataFilesDict({split: DataFilesList([os.path.abspath(path) for path in paths], marks)})
    try:
        features = features_of(pq.read_schema(paths[0]))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{paths[0]} can't be read: {error}") from None
    return Parquet(data_files=files, features=features, hash=datasets.fingerprint.Hasher.hash(marks))


def features_of(schema: pa.Schema) -> datasets.Features:
    """The features of a table by its types, with those that the datasets library has names for."""
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
    """The rows of an Arrow file, a CSV or JSON lines."""
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
    """A table of any kind in memory, for what describes images. Raises ValueError where it can't be read."""
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
    """Columns whose values are all integers, or all numbers, become so; "01" and "NA" are text, "" is no value."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if _kind(path) == ".tsv" else ",")
        names = next(rows, None)
        if not names:
            raise ValueError("it is empty")
        values = []
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"line {rows.line_num} has {len(row)} values, and the first line {len(names)}")
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
    """Columns of an object per line, or of one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    rows = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold an object per line")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _with_paths(rows: Any, folder: Path, image_column: str | None) -> Any:
    """The rows with paths of images, relative to `folder`, made images, where a column holds such paths."""
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
