"""Labels of any column as integers, and the names of the classes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from cm_diffusers.engine.data.listing import natural_key


MOST_CLASSES = 100_000
TEXT = ("string", "large_string")


@dataclass(frozen=True)
class Labels:
    """Labels of images.

    Args:
        values: int64 (N,), in [0, num_classes).
        names: of the classes by their labels, with those that no image has.
    """

    values: Tensor
    names: list[str]

    @property
    def classes(self) -> dict[int, str]:
        """The names of the labels that an image has, in rising order."""
        return {label: self.names[label] for label in self.values.unique().tolist()}

    def gaps(self) -> str:
        """A warning that names the classes that no image has; empty where there are none."""
        empty = sorted({*range(len(self.names))} - self.classes.keys())
        if not empty:
            return ""
        listed = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        return (
            f"WARNING: no image has the label {listed}: {len(empty)} of {len(self.names)} classes are never trained."
        )


def order_names(names: Iterable[str]) -> list[str]:
    """Names of classes in their order: by value where all are numbers, else in natural order."""
    names = list(names)
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        values = {}
    if values and all(map(math.isfinite, values.values())):
        return sorted(names, key=lambda name: (values[name], name))
    return sorted(names, key=natural_key)


def read_labels(values: Sequence[Any], feature: Any, column: str) -> Labels:
    """Labels from the values of a column.

    Args:
        values: integers, or names; with a ClassLabel integers only.
        feature: of the column in the datasets library.
        column: its name, for messages.

    Raises:
        ValueError: values that are no labels, with the first row that has one.
    """
    names = None
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif getattr(feature, "dtype", None) in TEXT:
        wrong = [i for i, value in enumerate(values) if not isinstance(value, str)]
        if wrong:
            raise _refusal(column, "names", wrong, values)
        names = order_names(set(values))
        numbers = {name: i for i, name in enumerate(names)}
        values = [numbers[name] for name in values]
    limit = MOST_CLASSES if names is None else len(names)
    wrong = [i for i, v in enumerate(values) if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < limit]
    if wrong:
        integers = all(isinstance(values[i], int) for i in wrong)
        allowed = f"integers in [0, {limit - 1}]" if names or integers else "integers from 0 up, or names"
        raise _refusal(column, allowed, wrong, values)
    values = torch.tensor(values, dtype=torch.int64)
    return Labels(values, [str(label) for label in range(int(values.max()) + 1)] if names is None else names)


def _refusal(column: str, allowed: str, wrong: list[int], values: Sequence[Any]) -> ValueError:
    return ValueError(
        f"labels of column {column!r} must be {allowed}; row {wrong[0]} has {values[wrong[0]]!r:.60}"
        f" ({len(wrong)} of {len(values)} rows are wrong)."
    )
