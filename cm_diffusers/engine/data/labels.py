"""Reading of the labels of any column as integers, and of the names of the classes."""

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
    """The labels of all images and the names of all classes.

    Args:
        values: int64 (N,), in [0, num_classes).
        names: the name of each class by label, including classes that no image has.
    """

    values: Tensor
    names: list[str]

    @property
    def classes(self) -> dict[int, str]:
        """The name of each label that some image has, by label in rising order."""
        return {label: self.names[label] for label in self.values.unique().tolist()}

    def gaps(self) -> str:
        """Return a warning that lists the labels that no image has, or "" if every label occurs."""
        empty = sorted({*range(len(self.names))} - self.classes.keys())
        if not empty:
            return ""
        listed = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        return (
            f"WARNING: no image has the label {listed}: {len(empty)} of {len(self.names)} classes are never trained."
        )


def order_names(names: Iterable[str]) -> list[str]:
    """Sort names of classes: by value if all are finite numbers, else in natural order ("a9" before "a10")."""
    names = list(names)
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        values = {}
    if values and all(map(math.isfinite, values.values())):
        return sorted(names, key=lambda name: (values[name], name))
    return sorted(names, key=natural_key)


def read_labels(values: Sequence[Any], feature: Any, column: str) -> Labels:
    """Read labels from the values of a column.

    Integers are kept as they are. Names get numbers in the order of `order_names`.

    Args:
        values: N integers from 0 up, or N names; a ClassLabel allows integers only.
        feature: type of the column in the datasets library.
        column: name of the column, for messages.

    Raises:
        ValueError: a value is not a label; the message shows the first one and its row.
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
        f" ({len(wrong)} of {len(values)} rows are wrong). Correct them, or use another column."
    )
