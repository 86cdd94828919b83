"""Find the columns of a dataset that hold images, labels and captions, and the files of its images."""

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
CAPTIONS = ("text", "caption", "captions", "prompt", "prompts", "description", "txt")  # txt is webdataset's
NUMBERS = ("int", "uint", "float")


def described(features: datasets.Features) -> str:
    """Return the names and types of all columns, for messages: "img (Image), fine (ClassLabel)"."""
    return ", ".join(f"{name} ({kind_of(feature)})" for name, feature in features.items())


def kind_of(feature: Any) -> str:
    """Return the type of a column in a word, such as "Image" or "int64"."""
    return feature.dtype if type(feature) is datasets.Value else type(feature).__name__


def holds_images(feature: Any) -> bool:
    """Return whether the type of a column allows images: Image, bytes, arrays, nested lists or {bytes, path}."""
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
    """Return the name of the column that holds the images.

    Without `asked`, the first of these kinds with any column decides, and it must have exactly one:

    - columns of the type Image,
    - columns of bytes, arrays or nested lists,
    - the first text column with a name of `tables.PATHS`, such as file_name.

    Args:
        features: the columns of the dataset.
        asked: the column to use, or None to find it.

    Raises:
        ValueError: `asked` is missing or holds no images; or none or several columns can hold them.
    """
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
    """Return the name of the column that holds the class labels.

    Without `asked`, it is the only column of the type ClassLabel. Otherwise it is the only column with a name of
    `LABELS`.

    Args:
        features: the columns of the dataset.
        asked: the column to use, or None to find it.
        missing_ok: return None if no such column, or more than one, is found.

    Raises:
        ValueError: `asked` is missing; or no single column is found and `missing_ok` is False.
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
            "no column of labels found. Give each class a folder of its own, or add metadata.csv with the columns"
            " file_name and label."
        )
    raise ValueError(f"no column of labels found; give --label_column. The dataset has: {described(features)}.")


def holds_texts(feature: Any) -> bool:
    """Return whether the type of a column is text or a list of texts."""
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "dtype", None) in TEXT


def find_caption_column(
    features: datasets.Features, asked: str | None, image_column: str | None = None, missing_ok: bool = False
) -> str | None:
    """Return the name of the column that holds the captions.

    Without `asked`, it is the first text column with a name of `CAPTIONS`. Otherwise it is the only text column.

    Args:
        features: the columns of the dataset.
        asked: the column to use, or None to find it.
        image_column: the column of the images, which holds no captions.
        missing_ok: return None if no such column, or more than one, is found.

    Raises:
        ValueError: `asked` is missing or holds no texts; or no single column is found and `missing_ok` is False.
    """
    texts = [name for name, feature in features.items() if holds_texts(feature) and name != image_column]
    listed = ", ".join(texts) or "none"
    if asked is not None:
        if asked not in features:
            raise ValueError(f"caption_column {asked!r} is not a column of the dataset; its text columns: {listed}.")
        if asked not in texts:
            raise ValueError(
                f"caption_column {asked!r} holds no texts but {kind_of(features[asked])}; the text columns of the"
                f" dataset: {listed}."
            )
        return asked
    columns = [name for name in CAPTIONS if name in texts][:1] or texts
    if len(columns) == 1:
        return columns[0]
    if missing_ok:
        return None
    if list(features) == ["image"]:
        raise ValueError(
            "no captions found. Write the caption of each image NAME.png into a file NAME.txt beside it, or add"
            " metadata.jsonl with the keys file_name and text."
        )
    raise ValueError(f"no column of captions found; give --caption_column. The text columns of the dataset: {listed}.")


def undecoded(rows: Rows, column: str, features: datasets.Features) -> Rows:
    """Return `rows`, described by `features`, with images in `column` not decoded, for `records.read_content`."""
    if isinstance(features[column], datasets.Image) and features[column].decode:
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def paths_of(rows: datasets.Dataset, column: str) -> list[str | None]:
    """Return the path of each image in `column` that is a file, and None for images whose bytes are in `rows`."""
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
    """Return (bytes, time of the last change in ns) of each file, and None if there is no path or file."""
    return [None if path is None else _mark(path) for path in paths]


def _mark(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(split_member(path)[1] if path.startswith("zip://") else path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
