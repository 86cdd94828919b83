"""The conditioning of a network beside the noise level, as one value that losses and solvers pass on unopened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims, sent


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors (B, ...), one row per sample: class labels, text embeddings, a reference image, and so on.

    Only `call_network` reads the names. An unconditional network has a condition without entries.

    Args:
        entries: tensors by name, all with the same number of rows.
        nulls: the null rows (...) of some or all entries, which guidance and label dropout use.

    Raises:
        ValueError: entries with different numbers of rows, a null without an entry, or a null whose shape is not
            that of the rows of its entry.
    """

    entries: Mapping[str, Tensor] = field(default_factory=dict)
    nulls: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {name: entry.shape[0] for name, entry in self.entries.items()}  # len() would be constant in a trace
        if any(count != first for first in list(rows.values())[:1] for count in rows.values()):
            raise ValueError(f"All entries of a condition must have the same number of rows; got {rows}.")
        for name, null in self.nulls.items():
            if name not in self.entries:
                raise ValueError(
                    f"The condition has no entry {name!r}, for which nulls has a row; its entries are"
                    f" {', '.join(self.entries)}."
                )
            if null.shape != self.entries[name].shape[1:]:
                wanted, got = tuple(self.entries[name].shape[1:]), tuple(null.shape)
                raise ValueError(f"The null of {name!r} must have the shape of a row, {wanted}; got {got}.")

    def rows(self, index: slice | Sequence[int] | Tensor) -> "Condition":
        """The rows that `index` selects; it works as for tensors."""
        return Condition({name: entry[index] for name, entry in self.entries.items()}, self.nulls)

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on `device`."""
        entries, nulls = ({n: sent(value, device) for n, value in part.items()} for part in (self.entries, self.nulls))
        return Condition(entries, nulls)

    def also(self, **entries: Tensor) -> "Condition":
        """A condition with these `entries` added; they replace entries of the same name."""
        return Condition({**self.entries, **entries}, self.nulls)

    def with_nulls(self, nulls: Mapping[str, Tensor]) -> "Condition":
        """A condition with the same entries and with `nulls` as its null rows."""
        return Condition(self.entries, nulls)

    def dropped(self, rows: Tensor | None = None) -> "Condition":
        """The condition with null rows where the boolean mask `rows` (B,) is True, or everywhere for None.

        Entries without a null stay unchanged.

        Raises:
            ValueError: no entry has a null.
        """
        if not self.nulls:
            raise ValueError("This condition has no null rows; set them by `with_nulls`.")
        entries = dict(self.entries)
        for name, null in self.nulls.items():
            entry, null = entries[name], null.to(entries[name])
            if rows is None:
                entries[name] = null.expand_as(entry)
            else:
                entries[name] = torch.where(append_dims(rows.to(entry.device), entry), null, entry)
        return Condition(entries, self.nulls)

    def joined(self, *others: "Condition") -> "Condition":
        """The rows of this condition, then those of `others`, which need the same entries."""
        parts = (self, *others)
        entries = {name: torch.cat([part.entries[name] for part in parts]) for name in self.entries}
        return Condition(entries, self.nulls)


NOTHING = Condition()


def of_classes(class_labels: Tensor | None) -> Condition:
    """The condition of `class_labels` (B,), under the name that diffusers uses; `NOTHING` for None."""
    return NOTHING if class_labels is None else Condition({"class_labels": class_labels})


def keywords_for(network: Callable, condition: Condition | None) -> Mapping[str, Tensor]:
    """The keyword arguments that pass a condition to a network: its entries by name, for U-Nets and DiTs.

    A network with other arguments has a method `adapt_condition`, which maps a `Condition` to keyword arguments.

    Args:
        network: a network, which can be compiled or wrapped for several processes (DDP).
        condition: its entries have shape (B, ...); None for an unconditional call.

    Raises:
        TypeError: `condition` is not a `Condition`, for example bare class labels.
    """
    adapt = _adapter(network)
    if condition is None:
        condition = NOTHING
    elif not isinstance(condition, Condition):
        raise TypeError(
            f"condition must be a Condition, for example of_classes(class_labels); got {type(condition).__name__}."
        )
    return condition.entries if adapt is None else adapt(condition)


def call_network(network: Callable, *args: Any, condition: Condition | None = None, **kwargs: Any) -> Any:
    """Call `network` with `args`, `kwargs` and the keyword arguments of `condition` (see `keywords_for`)."""
    return network(*args, **kwargs, **keywords_for(network, condition))


@dataclass(frozen=True)
class Rewired:
    """A network whose calls go through a function. It takes its condition as before.

    Args:
        network: the network; its `adapt_condition` still applies.
        call: receives the arguments of each call.
    """

    network: Callable
    call: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def adapt_condition(self) -> Callable | None:
        return _adapter(self.network)


def _adapter(network: Callable) -> Callable | None:
    inside = getattr(network, "module", None)  # the network inside a wrapper for several processes
    return getattr(network, "adapt_condition", None) or getattr(inside, "adapt_condition", None)
