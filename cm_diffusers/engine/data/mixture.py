"""Concatenation of several datasets, in which classes of the same name become one class."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from cm_diffusers.engine.data.columns import undecoded
from cm_diffusers.engine.data.labels import read_labels


@dataclass(frozen=True)
class Source:
    """A dataset with known columns.

    Args:
        name: name of the dataset, for messages.
        rows: the rows of the dataset.
        image_column: the column of the images.
        label_column: the column of the labels; None if labels are not read.
    """

    name: str
    rows: datasets.Dataset
    image_column: str
    label_column: str | None = None


def mixed(sources: Sequence[Source]) -> datasets.Dataset:
    """Concatenate `sources`, with the images in a column "image" and, if they are read, the labels in "label".

    Classes are identified by name. The classes of the first dataset come first.

    Raises:
        ValueError: two datasets store their images as different types, or a label is wrong.
    """
    parts, classes = [], {}
    for source in sources:
        rows = undecoded(source.rows, source.image_column, source.rows.features)
        part = rows.select_columns([source.image_column])
        if source.image_column != "image":
            part = part.rename_column(source.image_column, "image")
        if parts and part.features["image"] != parts[0].features["image"]:
            raise ValueError(
                f"{source.name!r} stores its images as {part.features['image']}, but {sources[0].name!r} stores them"
                f" as {parts[0].features['image']}. Prepare both with prepare_data.py, which gives them the same type."
            )
        if source.label_column is not None:
            feature = source.rows.features[source.label_column]
            labels = read_labels(source.rows[source.label_column][:], feature, source.label_column)
            for name in labels.names:
                classes.setdefault(name, len(classes))
            part = part.add_column("label", [classes[labels.names[label]] for label in labels.values.tolist()])
        parts.append(part)
    if classes:
        feature = datasets.ClassLabel(names=list(classes))
        parts = [part.cast_column("label", feature) for part in parts]
    return datasets.concatenate_datasets(parts)
