"""Options of a method: fields of a frozen dataclass that document and check themselves."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
STEPS, SOME_STEPS = "[0, 1e12]", "[1, 1e12]"  # ranges of counts
PRETRAINING = ("diffusion pretraining", "the method itself")  # phases of a run


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends, written as in mathematics: [0, 1) has 0 and has not 1."""

    text: str
    low: float
    high: float

    @classmethod
    def read(cls, text: str) -> "Interval":
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.text[0] == "[" else self.low < value
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Flag:
    """What a setting says of itself beside its type, default, help and choices.

    Args:
        within: the numbers that it takes, each one of a list; of a `Length` the whole numbers of steps.
        may_change: whether a run may be resumed with another value, as it moves neither weights nor randomness.
        place: what it names: a "path" of this machine, a "path or Hub id", or a "Hub id".
        words: values of it that are no names of places.
        in_recipe: whether the recipe on a model card has it; a path of this machine never is there.
        for_training: whether a dataset that is only measured must not have it.
        images_only: why it, or the choices in `images_only_choices`, can't be had in a run of latents.
        images_only_choices: see there; of other settings all that switch them on.
        told_by_data: whether its default is known only once the data are, or the network is.
        phases: of a length at the start of the run, what the steps of that length are, and what those after it are.
    """

    within: Interval | None = None
    may_change: bool = False
    place: Literal["path", "path or Hub id", "Hub id"] | None = None
    words: tuple[str, ...] = ()
    in_recipe: bool = True
    for_training: bool = False
    images_only: str | None = None
    images_only_choices: tuple[Any, ...] = ()
    told_by_data: bool = False
    phases: tuple[str, str] | None = None


def option(
    default: Any, help: str, within: str | None = None, choices: list[Any] | None = None, **declared: Any
) -> Any:
    """A documented field of an `Options` dataclass, read by the command line as a flag.

    Args:
        default: its value where nobody has said anything.
        help: what it is, for `--help`, which shows the range as well.
        within: the range of its numbers, as "[0, 1)".
        choices: the values that it may have, where these are few.
        declared: see `Flag`.
    """
    flag = Flag(None if within is None else Interval.read(within), **declared)
    if flag.within is not None:
        help = f"{help} In {flag.within}." if flag.within.high < 1e6 else f"{help} At least {flag.within.low:g}."
    return field(default=default, metadata={"help": help, "flag": flag} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class Options:
    """Settings that check themselves. Raises ValueError unless each is one of its choices, or lies in its range.

    A subclass checks in `__post_init__`, after this one's, what relates several settings.
    """

    @property
    def teacher(self) -> str | None:
        """The model that is distilled, a folder or a Hub id; None for none. See `TeacherOptions`."""
        return None

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        """These settings with values in place of shares of the run, and of None where a value follows from others.

        A method extends it for the defaults of its own. What is resolved already stays as it is.

        Args:
            total_steps: length of the run.
            pretrained: whether it starts from a trained network.
            dimensions: how many numbers a sample has; None where that is not known yet.
        """
        lengths = {name: getattr(self, name) for name in length_names(self)}
        steps = {name: steps_of(value, total_steps) for name, value in lengths.items() if value is not None}
        return replace(self, **steps)

    def __post_init__(self) -> None:
        for part in fields(self):
            value, flag, choices = getattr(self, part.name), flag_of(part), part.metadata.get("choices")
            if value is None:
                continue
            if choices is not None and value not in choices:
                raise ValueError(f"{part.name} must be one of {', '.join(map(str, choices))}; got {value!r}.")
            if flag.within is not None:
                _check_within(part.name, value, flag.within, part.name in length_names(self))
            if flag.place is not None and value == "":
                raise ValueError(f"{part.name} is empty; give a {flag.place}.")
            if flag.place == "Hub id" and not HUB_ID.fullmatch(value):
                raise ValueError(f"{part.name} must be a Hub id, as user/name; got {value!r}.")


@dataclass(frozen=True)
class TeacherOptions(Options):
    """Settings of a method that distils a teacher, or may."""

    pretrained_teacher_model: str | None = option(
        None,
        "The diffusion model to distil, of the library or of diffusers: a folder or a Hub id.",
        place="path or Hub id",
    )

    @property
    def teacher(self) -> str | None:
        return self.pretrained_teacher_model


def check_for_latents(*groups: Any) -> None:
    """Raise ValueError for a setting that only a run of images has, and not one of latents."""
    for group in groups:
        for name, flag in flags_of(group).items():
            value, choices = getattr(group, name), flag.images_only_choices
            if flag.images_only is not None and (value in choices if choices else value):
                raise ValueError(f"{name}{f' {value}' * bool(choices)} is not for latents: {flag.images_only}.")


def _check_within(name: str, value: Any, within: Interval, is_length: bool) -> None:
    if is_length and not 0 < value < 1 and not (value in within and float(value).is_integer()):
        raise ValueError(f"{name} must lie in {within} and be whole, or below 1 be a share of the run; got {value}.")
    for one in value if isinstance(value, list) else () if is_length else (value,):
        if one not in within:
            raise ValueError(f"{name} must lie in {within}, got {one!r}.")


def check_order(options: Any, low: str, high: str) -> None:
    """Raise ValueError where the setting `high` is below the setting `low`."""
    if getattr(options, high) < getattr(options, low):
        raise ValueError(f"{high} must be at least {low}, {getattr(options, low):g}; got {getattr(options, high):g}.")


def flag_of(part: Any) -> Flag:
    """What a field of a dataclass declares; nothing where it is no `option`."""
    return part.metadata.get("flag", Flag())


def flags_of(*groups: Any) -> Mapping[str, Flag]:
    """What the settings of dataclasses, or of instances, declare, by their names."""
    return {part.name: flag_of(part) for group in groups for part in fields(group)}


if TYPE_CHECKING:
    Length = float  # which settings of that type are; parsers call it, and nothing is an instance
else:

    class Length(float):
        """The type of lengths in settings: whole numbers of steps (int), or below 1 a share of the run (float)."""

        def __new__(cls, text: str | float) -> int | float:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(f"{text} is not a length.")
            return int(value) if value.is_integer() else value


def length_names(options: Any) -> list[str]:
    """The fields of a dataclass, or of an instance, that are lengths."""
    return [part.name for part in fields(options) if part.type in (Length, Length | None)]


def steps_of(length: float | None, total: int) -> int:
    """A length in steps, in a run of `total`; a share is rounded, and never the whole run."""
    if length is not None and 0 < length < 1:
        return min(round(length * total), total - 1)
    return int(length or 0)


def phases(options: Any, steps: int) -> dict[str, int]:
    """What the first `steps` steps of training were, by name; empty where they were all alike."""
    found: dict[str, int] = {}
    for name, flag in flags_of(options).items():
        if flag.phases is not None and (first := min(steps, getattr(options, name))):
            found |= dict(zip(flag.phases, (first, steps - first)))
    return found
