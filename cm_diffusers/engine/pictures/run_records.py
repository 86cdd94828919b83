"""Read the files that a finished or unfinished training run has written to its folder."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cm_diffusers.engine.commands import command
from cm_diffusers.engine.files import RunFiles, headline, read_json, read_plain, why
from cm_diffusers.engine.log import Log, read_log
from cm_diffusers.engine.settings_files import read_yaml


MOST_PICTURES = 12  # in the strip of samples over training


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its title and its size in pixels."""

    title: str
    uri: str
    width: int
    height: int


@dataclass
class Run:
    """The content of a run's folder; `notes` are sentences about missing or damaged parts."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # card.json
    log: list[dict[str, Any]] = field(default_factory=list)
    hours: list[float] | None = None  # hours of training up to each line of the log
    finished: bool = False
    samples: list[Picture] = field(default_factory=list)  # sample grids over training
    diagnostics: Picture | None = None  # the newest diagnostics
    final: list[Picture] = field(default_factory=list)  # samples of the exported model
    metrics: dict[str, Any] = field(default_factory=dict)  # metrics.json
    notes: list[str] = field(default_factory=list)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results in metrics.json; empty without an evaluation."""
        return self.metrics.get("results", [])

    @property
    def step(self) -> int:
        """The last training step in the log; 0 for an empty log."""
        return self.log[-1]["step"] if self.log else 0

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of the column `key` of the log, such as "loss" or "loss_by_sigma/0.1-0.3"."""
        pairs = [(row["step"], _number(row, key.split("/"))) for row in self.log]
        return tuple(map(list, zip(*[pair for pair in pairs if pair[1] is not None]))) or ([], [])

    def hours_at(self, step: float) -> float | None:
        """Hours of training up to `step`; None if they are unknown."""
        if self.hours is None:
            return None
        return float(np.interp(step, [0, *(row["step"] for row in self.log)], [0, *self.hours]))


def is_number(value: Any) -> bool:
    """Whether `value` from a JSON file is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _number(row: dict[str, Any], path: list[str]) -> float | None:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if is_number(value) else None


def read_run(folder: Path, name: str) -> Run:
    """Read the run in `folder`, and call it `name`.

    Raises:
        ValueError: the folder holds neither config.yaml nor log.jsonl.
    """
    if not any((folder / file).is_file() for file in (RunFiles.SETTINGS, RunFiles.LOG)):
        raise ValueError(f"{str(folder)!r} is not the folder of a run: it holds neither config.yaml nor log.jsonl.")
    run = Run(name)
    run.settings = _read(run, folder / RunFiles.SETTINGS, read_yaml, "settings")
    run.facts = _read(run, folder / RunFiles.FACTS, read_json, None)
    run.metrics = _read(run, folder / RunFiles.METRICS, read_json, f"metrics ({command('evaluate')} writes them)")
    results = run.metrics.get("results")
    run.metrics["results"] = [row for row in results if _is_result(row)] if isinstance(results, list) else []
    _read_log(run, folder / RunFiles.LOG)
    run.hours = _hours(run, folder)
    run.finished = (folder / RunFiles.EXPORTED).is_file()
    total = run.settings.get("max_train_steps", "an unknown number")
    if not run.finished:
        run.notes.append(f"The run is not finished: step {run.step} of {total}.")
    _read_pictures(run, folder)
    return run


def _is_result(row: Any) -> bool:
    kinds = {"step": int, "num_inference_steps": int, "name": str}
    return isinstance(row, dict) and all(type(row.get(key, kind())) is kind for key, kind in kinds.items())


def _read(run: Run, file: Path, read: Callable[[Path], Any], what: str | None) -> dict[str, Any]:
    """The mapping in a file, or an empty one with a note; a missing file gets no note if `what` is None."""
    try:
        values = read(file)
        if not isinstance(values, dict):
            raise ValueError("it holds no names with values")
        return {str(key): value for key, value in values.items()}
    except FileNotFoundError:
        if what is not None:
            run.notes.append(f"There are no {what}, because {file.name} is missing.")
    except (OSError, ValueError) as error:
        run.notes.append(f"{file.name} can't be read: {headline(error)[:200]}.")
    return {}


def _read_log(run: Run, file: Path) -> None:
    try:
        log = read_log(file)
    except FileNotFoundError:
        log = Log([], 0, False)
    except (OSError, ValueError) as error:
        log = Log([], 0, False)
        run.notes.append(f"{file.name} {why(error)}.")
    run.log = log.rows
    if not run.log:
        run.notes.append("There are no curves, because nothing is logged yet.")
    if log.damaged:
        run.notes.append(f"{log.damaged + log.cut} lines of the log are damaged.")
    elif log.cut:
        run.notes.append("The last line of the log is cut off.")


def _hours(run: Run, folder: Path) -> list[float] | None:
    """Hours of training up to each line of the log, by its rates; pauses after a stop don't count."""
    batch = run.facts.get("images_per_step")
    for state in folder.glob("checkpoint-*/state.json"):
        batch = batch or _read(run, state, read_json, None).get("global_batch")
    rates = [_number(row, ["time", "images_per_second"]) for row in run.log]
    if not isinstance(batch, int) or not rates or not all(rates):
        if run.log:
            run.notes.append(
                "The wall time is unknown, because neither card.json nor a checkpoint holds the images per step."
            )
        return None
    steps = np.diff([0, *(row["step"] for row in run.log)])
    return np.cumsum(steps * batch / np.array(rates) / 3600).tolist()


def _read_pictures(run: Run, folder: Path) -> None:
    over_training = {}
    for file in sorted((folder / RunFiles.PICTURES).glob("step-*.png")):
        if match := re.fullmatch(r"step-(\d+)(-diagnostics)?", file.stem):
            over_training.setdefault(bool(match[2]), []).append((int(match[1]), file))
    grids = sorted(over_training.get(False, []))
    if not grids:
        run.notes.append(
            "There are no samples over training, because samples/step-*.png are missing (see --validation_steps)."
        )
    if len(grids) > MOST_PICTURES:
        run.notes.append(f"{MOST_PICTURES} of {len(grids)} sample grids are shown.")
        grids = [grids[i] for i in np.linspace(0, len(grids) - 1, MOST_PICTURES).round().astype(int)]
    run.samples = [p for step, file in grids if (p := _picture(run, file, f"step {step}"))]
    for step, file in sorted(over_training.get(True, []))[-1:]:
        run.diagnostics = _picture(run, file, f"step {step}")
    final = sorted((folder / RunFiles.MODEL / "samples").glob("*.png"))
    run.final = [p for file in final if (p := _picture(run, file, file.stem.replace("_", " ")))]


def _picture(run: Run, file: Path, title: str) -> Picture | None:
    try:
        data = read_plain(file)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            size = image.size
            image.load()
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        run.notes.append(f"{file.name} can't be read: {headline(error)}.")
        return None
    return Picture(title, "data:image/png;base64," + base64.b64encode(data).decode(), *size)
