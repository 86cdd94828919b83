"""Runs that diverge: which checkpoints are sound, and what the user can do so that the run goes on."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_diffusers.core.arrays import lacks_float64
from cm_diffusers.engine.checkpoint import DamagedCheckpoint, list_checkpoints, load_checkpoint, set_aside_newer
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.files import RunFiles, read_json, replace_file


ADVISED = ("learning_rate", "max_grad_norm", "mixed_precision")  # what a run that diverged may be resumed with changed
FAR = 10.0
BROKEN = 1000.0  # a factor by which no training that works changes the size of all weights together


class Diverged(ValueError):
    """The weights are broken, or too many steps in a row had no finite loss or gradient."""


def norm(values: Iterable[Tensor]) -> float:
    """Root of the sum of squares of all floating-point values; not finite where one of them is not."""
    values = [value for value in values if value.is_floating_point()]
    total = math.hypot(*(part.item() for part in torch._foreach_norm(values))) if values else 0.0
    if math.isfinite(total):
        return total
    values = [value.cpu() if lacks_float64(value.device) else value for value in values]
    return math.hypot(*(part.item() for part in torch._foreach_norm(values, dtype=torch.float64)))  # squares overflow


def breakage(weights: Mapping[str, Tensor], start: float) -> str:
    """What is wrong with weights that no training can repair; empty where nothing is.

    Args:
        weights: by name.
        start: their norm at the start of the run.
    """
    size = norm(weights.values())
    if not math.isfinite(size):
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        return f"{len(broken)} of {len(weights)} tensors of its weights are not finite, the first is {broken[0]}"
    if size > BROKEN * start:
        return f"its weights have grown to {size / start:.1e} times their size at the start"
    return ""


def is_sound(tensors: Mapping[str, Mapping[str, Tensor]], average: str, start: float, skipped_in_a_row: int) -> bool:
    """Whether a run can go on from a state, which is finite.

    Its last step had a finite loss and gradient; and the weights are of the size of their average, and that one is of
    the size that weights had at the start: both within a factor of 10, where those of a broken network are off by
    hundreds.

    Args:
        tensors: groups of tensors as a checkpoint holds them, with the weights in "model".
        average: the group of an average of the weights.
        start: the norm of the weights at the start of the run.
        skipped_in_a_row: how many steps up to now were not finite.
    """
    if skipped_in_a_row:
        return False
    size = norm(tensors[average].values())
    return norm(tensors["model"].values()) <= FAR * size and size <= FAR * start


def go_back(root: Path, step: int, run: RunArguments) -> int | None:
    """Set all checkpoints after the newest sound one aside as diverged-checkpoint-<step>; gives its step.

    None where no checkpoint is sound: all are set aside, and the run starts anew. A note in `root` says that it
    diverged at `step`, and with which settings.
    """
    sound = None
    for number, path in list_checkpoints(root):
        try:
            if load_checkpoint(path).state.get("sound", True):
                sound = number
                break
        except DamagedCheckpoint:
            continue
    set_aside_newer(root, -1 if sound is None else sound, "diverged")
    root.mkdir(parents=True, exist_ok=True)
    note = {"step": step, "settings": {name: getattr(run, name) for name in ADVISED}}
    replace_file(root / RunFiles.DIVERGED, json.dumps(note, indent=1))
    return sound


def read_note(root: Path) -> dict[str, Any] | None:
    """What `go_back` noted: {"step": ..., "settings": {...}}; None in a run that never diverged, or has lost it."""
    try:
        return check_note(root / RunFiles.DIVERGED)
    except (OSError, ValueError):
        return None


def check_note(file: Path) -> dict[str, Any]:
    """The note. Raises OSError, or ValueError whose message goes on after the file's name."""
    note = read_json(file)
    if not isinstance(note, dict) or type(note.get("step")) is not int or not isinstance(note.get("settings"), dict):
        raise ValueError("does not say at which step the run diverged, and with which settings")
    if not note["settings"].keys() <= set(ADVISED):
        raise ValueError(f"holds other settings than {', '.join(ADVISED)}")
    return note


def advice(run: RunArguments, precision: str, sound: int | None, weights_moved: bool) -> str:
    """What to do after a divergence.

    Args:
        run: the settings of the run.
        precision: in which it was computed: no, fp16 or bf16.
        sound: the step of the newest sound checkpoint, or None.
        weights_moved: whether any step was finite; where none was, the pace of training is not what is wrong.
    """
    ways = []
    if weights_moved:
        ways.append(f"a lower --learning_rate (it is {run.learning_rate:g})")
        clipped = run.max_grad_norm
        ways.append(f"a lower --max_grad_norm (it is {clipped:g})" if clipped else "--max_grad_norm 1")
    if precision != "no":
        ways.append(f"--mixed_precision no (it is {precision})")
    if not ways:
        return (
            "No step of the run was finite, so that no setting of the training helps: look at the images, and at the"
            " model that it starts from."
        )
    choice = f"Give the same command with {' or '.join(ways)}: "
    if sound is None:
        return f"No checkpoint is sound. {choice}the run then starts anew, from step 0."
    return (
        f"checkpoint-{sound} is sound; later ones are set aside as diverged-checkpoint-*. {choice}the run then goes on"
        f" from step {sound}."
    )
