"""The options of a method: fields of a frozen dataclass, which document and check themselves."""

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
    """The numbers between two ends, in mathematical notation: [0, 1) contains 0 but not 1."""

    text: str
    low: float
    high: float

    @classmethod
    def read(cls, text: str) -> "Interval":
        """The interval that `text`, such as "[0, 1)", stands for."""
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.text[0] == "[" else self.low < value
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Flag:
    """The declarations of a setting beside its type, default, help and choices.

    Args:
        within: the allowed numbers. They hold for each element of a list, and for a `Length` in whole steps.
        may_change: whether a resumed run can have another value, because it affects neither weights nor randomness.
        place: the kind of place that it names: a "path" on this machine, a "path or Hub id", or a "Hub id".
        words: allowed values that do not name a place.
        in_recipe: whether the recipe on a model card contains it; paths on this machine are never there.
        for_training: whether it is for training data only, and refused for a dataset that is only measured.
        images_only: why a run on latents cannot use it, or cannot use its `images_only_choices`.
        images_only_choices: the choices that need images; if empty, every value that switches the setting on.
        told_by_data: whether its default is known only once the data or the network is.
        phases: names of two phases, for a length at the start of the run: its steps, and the steps after it.
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
        default: its value unless the user sets it.
        help: its text for `--help`, in one or two whole sentences. The range is appended.
        within: the range of its numbers, such as "[0, 1)".
        choices: the allowed values, if they are few.
        declared: further fields of `Flag`.
    """
    flag = Flag(None if within is None else Interval.read(within), **declared)
    if flag.within is not None:
        least = "At least" if flag.within.text[0] == "[" else "Above"
        help = f"{help} In {flag.within}." if flag.within.high < 1e6 else f"{help} {least} {flag.within.low:g}."
    return field(default=default, metadata={"help": help, "flag": flag} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class Options:
    """Settings that check themselves.

    A subclass checks relations between settings in its `__post_init__`, which calls that of this class first.

    Raises:
        ValueError: a setting is not one of its choices, lies outside its range, or does not name a place of its kind.
    """

    @property
    def teacher(self) -> str | None:
        """The model to distil, a folder or a Hub id, or None. See `TeacherOptions`."""
        return None

    @property
    def draws_guidance(self) -> bool:
        """Whether the method draws the guidance scale of its teacher, which therefore needs a null class."""
        return False

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> Self:
        """A copy with steps in place of shares of the run, and with values for None that follow from other settings.

        A method extends it for its own defaults. Resolved settings stay unchanged.

        Args:
            total_steps: training steps of the run.
            pretrained: whether the run starts from a trained network.
            dimensions: how many numbers a sample has; None if unknown so far.
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
                raise ValueError(f"{part.name} must be a Hub id such as user/name; got {value!r}.")


@dataclass(frozen=True)
class TeacherOptions(Options):
    """Settings of a method that distils a teacher, or can distil one."""

    pretrained_teacher_model: str | None = option(
        None,
        "The diffusion model to distil, of this library or of diffusers: a folder or a Hub id.",
        place="path or Hub id",
    )

    @property
    def teacher(self) -> str | None:
        return self.pretrained_teacher_model


def check_for_latents(*groups: Any) -> None:
    """Check that `groups`, instances of dataclasses, hold no setting that only a run on images can have.

    Raises:
        ValueError: a setting is not for latents.
    """
    for group in groups:
        for name, flag in flags_of(group).items():
            value, choices = getattr(group, name), flag.images_only_choices
            if flag.images_only is not None and (value in choices if choices else value):
                raise ValueError(f"{name}{f' {value}' * bool(choices)} is not for latents: {flag.images_only}.")


def _check_within(name: str, value: Any, within: Interval, is_length: bool) -> None:
    if is_length and not 0 < value < 1 and not (value in within and float(value).is_integer()):
        raise ValueError(
            f"{name} must lie in {within} and be a whole number of steps, or be a share of the run between 0 and 1;"
            f" got {value}."
        )
    for one in value if isinstance(value, list) else () if is_length else (value,):
        if one not in within:
            raise ValueError(f"{name} must lie in {within}, got {one!r}.")


def check_order(options: Any, low: str, high: str) -> None:
    """Check that the setting named `high` in `options` is not below the setting named `low`.

    Raises:
        ValueError: it is below.
    """
    if getattr(options, high) < getattr(options, low):
        raise ValueError(f"{high} must be at least {low}, {getattr(options, low):g}; got {getattr(options, high):g}.")


def flag_of(part: Any) -> Flag:
    """The declarations of `part`, a field of a dataclass; empty unless it is an `option`."""
    return part.metadata.get("flag", Flag())


def flags_of(*groups: Any) -> Mapping[str, Flag]:
    """The declarations of all settings in `groups`, dataclasses or their instances, by name."""
    return {part.name: flag_of(part) for group in groups for part in fields(group)}


if TYPE_CHECKING:
    Length = float  # the type of such settings; only parsers call the class below, and nothing is its instance
else:

    class Length(float):
        """The type of lengths in settings: a whole number of steps (int), or a share of the run below 1 (float)."""

        def __new__(cls, text: str | float) -> int | float:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(f"{text} is not a length; give a number of steps, or a share of the run below 1.")
            return int(value) if value.is_integer() else value


def length_names(options: Any) -> list[str]:
    """The names of those fields of `options`, a dataclass or its instance, that are lengths."""
    return [part.name for part in fields(options) if part.type in (Length, Length | None)]


def steps_of(length: float | None, total: int) -> int:
    """`length` in steps, for a run of `total` steps. A share is rounded, and is never the whole run; None is 0."""
    if length is not None and 0 < length < 1:
        return min(round(length * total), total - 1)
    return int(length or 0)


def phases(options: Any, steps: int) -> dict[str, int]:
    """How many of the first `steps` training steps fell into each phase of `options`, by its name.

    The result is empty if the run has one phase only.
    """
    found: dict[str, int] = {}
    for name, flag in flags_of(options).items():
        if flag.phases is not None and (first := min(steps, getattr(options, name))):
            found |= dict(zip(flag.phases, (first, steps - first)))
    return found
