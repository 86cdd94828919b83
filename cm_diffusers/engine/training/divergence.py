"""Diverged runs: which checkpoints are sound, and how the user can continue the run."""

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


ADVISED = ("learning_rate", "max_grad_norm", "mixed_precision")  # can differ when a diverged run is resumed
FAR = 10.0  # largest growth of the norm in a sound checkpoint
BROKEN = 1000.0  # no working training changes the norm of all weights by this factor


class Diverged(ValueError):
    """The weights are broken, or too many consecutive steps had a loss or gradient that is not finite."""


def norm(values: Iterable[Tensor]) -> float:
    """L2 norm of all floating-point tensors in `values` (any shape) together; not finite if one value is not."""
    values = [value for value in values if value.is_floating_point()]
    total = math.hypot(*(part.item() for part in torch._foreach_norm(values))) if values else 0.0
    if math.isfinite(total):
        return total
    values = [value.cpu() if lacks_float64(value.device) else value for value in values]
    return math.hypot(*(part.item() for part in torch._foreach_norm(values, dtype=torch.float64)))  # squares overflow


def breakage(weights: Mapping[str, Tensor], start: float) -> str:
    """The end of a message about weights that no training can repair; empty for sound weights.

    Args:
        weights: tensors of any shape by their names.
        start: the norm of the weights at the start of the run.
    """
    size = norm(weights.values())
    if not math.isfinite(size):
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        return f"{len(broken)} of its {len(weights)} weight tensors are not finite (the first is {broken[0]})"
    if size > BROKEN * start:
        return f"its weights have grown to {size / start:.1e} times their size at the start"
    return ""


def is_sound(tensors: Mapping[str, Mapping[str, Tensor]], average: str, start: float, skipped_in_a_row: int) -> bool:
    """Whether a run can continue from this state, whose values are all finite.

    A state is sound under three conditions:

    - the last step had a finite loss and gradient;
    - the norm of the weights is at most 10 times that of their average;
    - the norm of the average is at most 10 times that of the initial weights.

    The weights of a broken network exceed these bounds by factors of hundreds.

    Args:
        tensors: groups of tensors (any shape) as a checkpoint holds them, with the weights in "model".
        average: the name of the group that holds an average (EMA) of the weights.
        start: the norm of the weights at the start of the run.
        skipped_in_a_row: the number of consecutive skipped steps up to now.
    """
    if skipped_in_a_row:
        return False
    size = norm(tensors[average].values())
    return norm(tensors["model"].values()) <= FAR * size and size <= FAR * start


def go_back(root: Path, step: int, run: RunArguments) -> int | None:
    """Rename all checkpoints after the newest sound one to diverged-checkpoint-<step>; return the sound one's step.

    Without a sound checkpoint all are renamed, the result is None, and the run starts again from step 0. A note in
    `root` records the step of the divergence and the settings.

    Args:
        root: the folder of the run.
        step: the training step at which the run diverged.
        run: the settings of the run, of which those in `ADVISED` are recorded.
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
    """The note of `go_back` in `root`: {"step": ..., "settings": {...}}; None if it is missing or damaged."""
    try:
        return check_note(root / RunFiles.DIVERGED)
    except (OSError, ValueError):
        return None


def check_note(file: Path) -> dict[str, Any]:
    """Read and check the note of `go_back`.

    Raises:
        OSError: the file can't be read.
        ValueError: it holds something else. The message continues after the name of the file.
    """
    note = read_json(file)
    if not isinstance(note, dict) or type(note.get("step")) is not int or not isinstance(note.get("settings"), dict):
        raise ValueError("lacks the step or the settings of a diverged run")
    if not note["settings"].keys() <= set(ADVISED):
        raise ValueError(f"holds other settings than {', '.join(ADVISED)}")
    return note


def advice(run: RunArguments, precision: str, sound: int | None, weights_moved: bool) -> str:
    """Advice to the user after a divergence, in whole sentences.

    Args:
        run: the settings of the run.
        precision: the mixed precision of the run: no, fp16 or bf16.
        sound: the step of the newest sound checkpoint, or None.
        weights_moved: whether any step was finite. If none was, learning rate and clipping are not the cause.
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
            "No step of the run was finite, so no training setting helps. Check the images, and the model that the run"
            " starts from."
        )
    choice = f"Give the same command with {' or '.join(ways)}: "
    if sound is None:
        return f"No checkpoint is sound. {choice}the run then starts again from step 0."
    return (
        f"checkpoint-{sound} is sound; later ones are renamed to diverged-checkpoint-*. {choice}the run then continues"
        f" from step {sound}."
    )
