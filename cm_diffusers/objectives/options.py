"""Options of a method: fields of a frozen dataclass that document and check themselves."""

from dataclasses import field, fields
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
