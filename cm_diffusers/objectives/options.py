"""Options of a method: fields of a frozen dataclass that document and check themselves."""

import math
from dataclasses import field, fields, replace
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A documented field of an `Options` dataclass, read by the command line as a flag."""
    return field(default=default, metadata={"help": help, **metadata})


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}.")


def check_choices(options: Any) -> None:
    """Raise ValueError unless every field with choices holds one of them."""
    for part in fields(options):
        choices, value = part.metadata.get("choices"), getattr(options, part.name)
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{part.name} must be one of {', '.join(map(str, choices))}; got {value!r}.")


# what the steps before and after a length of a method's own are
PHASES = {
    "pretrain_steps": ("diffusion pretraining", "the method itself"),
    "tangent_warmup_steps": ("the tangent's warm-up", "the whole tangent"),
}


class Length(float):
    """The type of settings that are lengths: whole numbers of steps (int), or below 1 a share of the run (float)."""

    def __new__(cls, text: str | float) -> int | float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a length.")
        return int(value) if value.is_integer() else value


def length_names(options: Any) -> list[str]:
    """The fields of a dataclass, or of an instance, that are lengths."""
    return [part.name for part in fields(options) if part.type in (Length, Length | None)]


def check_lengths(options: Any, low: int = 0) -> None:
    """Raise ValueError unless every length is a share of the run or a whole number of steps from `low` on."""
    for name in length_names(options):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1 and not (float(value).is_integer() and low <= value <= 1 << 40):
            raise ValueError(
                f"{name} must lie in [{low}, {1 << 40:g}] and be whole, or below 1 be a share of the run; got {value}."
            )


def steps_of(length: float | None, total: int) -> int:
    """A length in steps, in a run of `total`; a share is rounded, and never the whole run."""
    if length is not None and 0 < length < 1:
        return min(round(length * total), total - 1)
    return int(length or 0)


def in_steps(options: Any, total: int) -> Any:
    """A copy of `options` whose lengths are numbers of steps, in a run of `total`."""
    lengths = {name: getattr(options, name) for name in length_names(options)}
    return replace(options, **{name: steps_of(value, total) for name, value in lengths.items() if value is not None})


def phases(options: Any, steps: int) -> dict[str, int]:
    """What the first `steps` steps of training were, by name; empty where they were all alike."""
    found = {}
    for name, (before, after) in PHASES.items():
        first = min(steps, getattr(options, name, 0))
        if first:
            found |= {before: first, after: steps - first}
    return found
