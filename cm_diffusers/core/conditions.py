"""What a network is told of a sample beside its noise level, as one value that losses and solvers pass on unopened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.arrays import append_dims


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors (B, ...), one row per sample: class labels, embeddings of a text, an image to go by, and so on.

    Only `call_network` looks at the names. No entries at all are the condition of an unconditional network.

    Args:
        entries: by their names, all of the same number of rows.
        nulls: of some entries, or all, the row (...) that stands for none, as guidance and dropped labels want it.

    Raises:
        ValueError: entries of different numbers of rows, or a null of another shape than the rows of its entry.
    """

    entries: Mapping[str, Tensor] = field(default_factory=dict)
    nulls: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {name: entry.shape[0] for name, entry in self.entries.items()}  # len() would fix it where one traces
        if any(count != first for first in list(rows.values())[:1] for count in rows.values()):
            raise ValueError(f"the entries of a condition must have as many rows each, got {rows}.")
        for name, null in self.nulls.items():
            if name not in self.entries:
                raise ValueError(f"there is no entry {name!r} that could be null, only {', '.join(self.entries)}.")
            if null.shape != self.entries[name].shape[1:]:
                wanted, got = tuple(self.entries[name].shape[1:]), tuple(null.shape)
                raise ValueError(f"the null of {name!r} must have the shape of a row, {wanted}, got {got}.")

    def rows(self, index: slice | Sequence[int] | Tensor) -> "Condition":
        """Some of the rows, as tensors are indexed."""
        return Condition({name: entry[index] for name, entry in self.entries.items()}, self.nulls)

    def to(self, device: torch.device | str) -> "Condition":
        """The same on a device."""
        entries, nulls = ({n: value.to(device) for n, value in part.items()} for part in (self.entries, self.nulls))
        return Condition(entries, nulls)

    def also(self, **entries: Tensor) -> "Condition":
        """With further entries, or others in the place of some."""
        return Condition({**self.entries, **entries}, self.nulls)

    def with_nulls(self, nulls: Mapping[str, Tensor]) -> "Condition":
        """With these rows standing for none."""
        return Condition(self.entries, nulls)

    def dropped(self, rows: Tensor | None = None) -> "Condition":
        """The null condition in some rows, a mask (B,), or in all; what has no null stays.

        Raises:
            ValueError: nothing has a null.
        """
        if not self.nulls:
            raise ValueError("this condition has no null, a value that stands for none.")
        entries = dict(self.entries)
        for name, null in self.nulls.items():
            entry, null = entries[name], null.to(entries[name])
            if rows is None:
                entries[name] = null.expand_as(entry)
            else:
                entries[name] = torch.where(append_dims(rows.to(entry.device), entry), null, entry)
        return Condition(entries, self.nulls)

    def joined(self, *others: "Condition") -> "Condition":
        """These rows and those of the others, which have the same entries, one after another."""
        parts = (self, *others)
        entries = {name: torch.cat([part.entries[name] for part in parts]) for name in self.entries}
        return Condition(entries, self.nulls)


NOTHING = Condition()


def of_classes(class_labels: Tensor | None) -> Condition:
    """The condition of class labels (B,) under diffusers' name for them; of None nothing."""
    return NOTHING if class_labels is None else Condition({"class_labels": class_labels})


def keywords_for(network: Callable, condition: Condition | None) -> Mapping[str, Tensor]:
    """The keywords by which a network is told the condition: the entries' names, as U-Nets and DiTs take it.

    A kind of network that takes it otherwise has a method `adapt_condition`, which gives the keywords for a condition.

    Args:
        network: a network, or one that is compiled or wrapped for several processes.
        condition: None for nothing.

    Raises:
        TypeError: bare class labels, or whatever else is no condition.
    """
    adapt = _adapter(network)
    if condition is None:
        condition = NOTHING
    elif not isinstance(condition, Condition):
        raise TypeError(
            f"a condition must be a Condition, as of_classes(class_labels) makes one, got {type(condition).__name__}."
        )
    return condition.entries if adapt is None else adapt(condition)


def call_network(network: Callable, *args: Any, condition: Condition | None = None, **kwargs: Any) -> Any:
    """`network(*args, **kwargs)`, told the condition; see `keywords_for`."""
    return network(*args, **kwargs, **keywords_for(network, condition))


@dataclass(frozen=True)
class Rewired:
    """A network that is called by way of a function, and takes its condition as it did.

    Args:
        network: the network.
        call: gets the arguments of each call.
    """

    network: Callable
    call: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def adapt_condition(self) -> Callable | None:
        return _adapter(self.network)


def _adapter(network: Callable) -> Callable | None:
    inside = getattr(network, "module", None)  # of what is wrapped for several processes
    return getattr(network, "adapt_condition", None) or getattr(inside, "adapt_condition", None)
