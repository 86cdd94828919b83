"""Several datasets as one: their images behind one another, classes of the same name as one class."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from cm_diffusers.engine.data.columns import undecoded
from cm_diffusers.engine.data.labels import read_labels


@dataclass(frozen=True)
class Source:
    """A dataset whose columns are known.

    Args:
        name: for messages.
        rows: of the dataset.
        image_column: which column holds the images.
        label_column: which column holds labels; None where they are not read.
    """

    name: str
    rows: datasets.Dataset
    image_column: str
    label_column: str | None = None


def mixed(sources: Sequence[Source]) -> datasets.Dataset:
    """The images of all sources as a column "image", and their labels as "label" if all have some.

    Classes are told apart by their names: those of the first dataset come first.

    Raises:
        ValueError: images that are held in different ways.
    """
    parts, classes = [], {}
    for source in sources:
        rows = undecoded(source.rows, source.image_column, source.rows.features)
        part = rows.select_columns([source.image_column])
        if source.image_column != "image":
            part = part.rename_column(source.image_column, "image")
        if parts and part.features["image"] != parts[0].features["image"]:
            raise ValueError(
                f"the images of {source.name!r} are held in another way than those of {sources[0].name!r}:"
                f" {part.features['image']} and {parts[0].features['image']}. prepare_data.py brings both into one."
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
