"""Which columns of a dataset hold images and labels, and what can be told of images without opening them."""

import os
from typing import Any

import datasets
import pyarrow as pa

from cm_diffusers.engine.data.records import split_member
from cm_diffusers.engine.data.tables import PATHS


Rows = datasets.Dataset | datasets.IterableDataset
BYTES = ("binary", "large_binary")
TEXT = ("string", "large_string")
ARRAYS = (datasets.Array2D, datasets.Array3D)
LABELS = ("label", "labels", "cls")  # cls is webdataset's
NUMBERS = ("int", "uint", "float")


def described(features: datasets.Features) -> str:
    """The columns of a dataset and what they hold, for messages."""
    return ", ".join(f"{name} ({kind_of(feature)})" for name, feature in features.items())


def kind_of(feature: Any) -> str:
    """What a column holds, in a word."""
    return feature.dtype if type(feature) is datasets.Value else type(feature).__name__


def holds_images(feature: Any) -> bool:
    """Whether the values of a column can be images by their type."""
    if isinstance(feature, dict):
        return {"bytes", "path"} & feature.keys() != set()
    if isinstance(feature, (datasets.Image, *ARRAYS)):
        return True
    if isinstance(getattr(feature, "feature", None), type(feature)):  # lists of lists
        while hasattr(feature, "feature"):
            feature = feature.feature
        return getattr(feature, "dtype", "").startswith(NUMBERS)
    return getattr(feature, "dtype", None) in BYTES


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """The column that was asked for, or the only one that holds images: of the type Image, or else of bytes or arrays,
    or else of text under a name like file_name. Raises ValueError with the list of columns."""
    if asked is not None:
        if asked not in features:
            raise ValueError(f"image_column {asked!r} is not a column of the dataset; it has: {described(features)}.")
        if not holds_images(features[asked]) and getattr(features[asked], "dtype", None) not in TEXT:
            raise ValueError(
                f"image_column {asked!r} holds no images but {kind_of(features[asked])}; the dataset has:"
                f" {described(features)}."
            )
        return asked
    kinds = (
        [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        [name for name, feature in features.items() if holds_images(feature)],
        [name for name in PATHS if getattr(features.get(name), "dtype", None) in TEXT][:1],
    )
    columns = next(filter(None, kinds), [])
    if len(columns) != 1:
        found = "no column" if not columns else f"several columns ({', '.join(columns)})"
        raise ValueError(f"{found} of images found; give --image_column. The dataset has: {described(features)}.")
    return columns[0]


def find_label_column(features: datasets.Features, asked: str | None, missing_ok: bool = False) -> str | None:
    """The column that was asked for, or the only one of class labels, or one called `label`.

    Raises ValueError where there is none; with `missing_ok` only where there may be several.
    """
    if asked is not None:
        if asked not in features:
            raise ValueError(f"label_column {asked!r} is not a column of the dataset; it has: {described(features)}.")
        return asked
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns if len(columns) == 1 else [name for name in LABELS if name in features]
    if len(columns) == 1:
        return columns[0]
    if missing_ok:
        return None
    if list(features) == ["image"]:
        raise ValueError(
            "no column of labels found: classes come from a folder per class, or from metadata.csv with the columns"
            " file_name and label."
        )
    raise ValueError(f"no column of labels found; give --label_column. The dataset has: {described(features)}.")


def undecoded(rows: Rows, column: str, features: datasets.Features) -> Rows:
    """The rows with images as `records.read_content` takes them."""
    if isinstance(features[column], datasets.Image) and features[column].decode:
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def paths_of(rows: datasets.Dataset, column: str) -> list[str | None]:
    """Where the images lie that are files of their own, None for the others."""
    table = rows.select_columns([column]).with_format("arrow")[:]
    values = table[column]
    if pa.types.is_string(values.type):
        return values.to_pylist()
    if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
        return [None] * len(rows)
    paths = [path for chunk in values.chunks for path in chunk.field("path").to_pylist()]
    if values.type.get_field_index("bytes") < 0:
        return paths
    inside = [here for chunk in values.chunks for here in chunk.field("bytes").is_valid().to_pylist()]
    return [None if here else path for path, here in zip(paths, inside)]


def marks_of(paths: list[str | None]) -> list[tuple[int, int] | None]:
    """What changes when a file does, for every path: its size and the time of its last change."""
    return [None if path is None else _mark(path) for path in paths]


def _mark(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(split_member(path)[1] if path.startswith("zip://") else path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
