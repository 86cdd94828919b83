"""Experiment trackers (wandb, tensorboard, ...): checked before any data is read, and resumed with the run."""

import importlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from cm_diffusers.engine.config import Config
from cm_diffusers.engine.files import RunFiles, headline, read_json, replace_file, why


VERSIONS = {"aim": "aim<4"}  # what Accelerate can drive, where it can't drive every version
SETTINGS_ONCE = ("mlflow", "tensorboard")  # mlflow refuses changed settings, tensorboard shows them as one more run


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if one of `names` (of --report_to) is a tracker that can't be used here."""
    for name in names:
        _check_tracker(name)


def _check_tracker(name: str) -> None:
    known, available = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    if name not in known:
        raise ValueError(
            f"report_to {name!r} is not a tracker that Accelerate knows; it knows {', '.join(known)};"
            " none stands for no tracker."
        )
    if name == "all":
        if not available:
            raise ValueError(
                "report_to 'all' finds no tracker installed. Install one, for example with `pip install tensorboard`,"
                " or leave --report_to out."
            )
        return
    package = VERSIONS.get(name, name)
    if name not in available:
        raise ValueError(
            f"report_to {name!r}: the package {package} is not installed, and nothing would be tracked. Install it"
            f" with `pip install '{package}'`, or leave --report_to out."
        )
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        importlib.import_module(module)
    except Exception as error:  # of another package's import: whatever it is, nothing would be tracked
        raise ValueError(
            f"report_to {name!r}: the package {package} is installed, but importing it fails: {headline(error)} Repair"
            " it, or leave --report_to out."
        ) from error


def start_trackers(accelerator: Accelerator, config: Config, step: int) -> None:
    """Start the trackers of --report_to; a resumed run goes on in the trackers' run that its first start began.

    Args:
        accelerator: made with these trackers.
        config: the run's settings, which trackers get as well.
        step: the last step that was trained; what a tracker holds after it is not of this run any more.

    Raises:
        ValueError: a tracker does not start (no login, no network, its run was deleted).
    """
    file = Path(config.run.output_dir) / RunFiles.TRACKER
    try:
        note = read_note(file) if file.exists() else _new_note(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} {why(error)}. Delete it, and a new run of the tracker is begun.") from None
    values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.to_dict().items()}
    try:
        _start(accelerator, config.run.tracker_project_name, note, file.parent / config.run.logging_dir, step)
        for tracker in accelerator.trackers:
            if tracker.name not in SETTINGS_ONCE or tracker.name not in note["runs"]:
                tracker.store_init_configuration(values)
    except Exception as error:  # trackers raise many kinds; training would go on unseen
        raise ValueError(
            f"report_to {' '.join(config.run.trackers)}: the tracker does not start: {headline(error)} If its run was"
            f" deleted, delete {file}, and a new one is begun. Without --report_to nothing is tracked."
        ) from error
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            note["runs"][tracker.name] = _identify(tracker, note)
        replace_file(file, json.dumps(note, indent=1))


def _start(accelerator: Accelerator, project: str, note: dict[str, Any], logs: Path, step: int) -> None:
    """Start the trackers one by one: what names the project of others names the run of tensorboard."""
    chosen, started = accelerator.log_with, []
    logs.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere where its folder is missing
    for kind in chosen:
        accelerator.log_with, accelerator.trackers = [kind], []
        accelerator.init_trackers(
            note["name"] if str(kind) == "tensorboard" else project, init_kwargs=_init_kwargs(note, logs, step)
        )
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = chosen, started


def log_pictures(accelerator: Accelerator, pictures: Mapping[str, Path], step: int) -> None:
    """Hand pictures, files by their names, to the trackers, each by its own call."""
    for tracker in accelerator.trackers:
        for name, file in pictures.items():
            image = Image.open(file).convert("RGB")
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step, dataformats="NHWC")
            elif tracker.name == "aim":
                tracker.log_images({name: image}, step)
            elif tracker.name == "clearml":
                tracker.log_images({name: np.asarray(image)}, step)
            elif tracker.name in ("wandb", "swanlab"):
                tracker.log_images({name: [image]}, step)
            elif tracker.name == "trackio":
                tracker.log({name: importlib.import_module("trackio").Image(image)}, step)
            elif tracker.name == "comet_ml":
                tracker.tracker.log_image(str(file), name=name, step=step)
            elif tracker.name == "dvclive":
                tracker.tracker.log_image(f"{name}/{file.name}", str(file))
            elif tracker.name == "mlflow":
                importlib.import_module("mlflow").log_artifact(str(file), name)


def _new_note(config: Config) -> dict[str, Any]:
    folder, number = Path(config.run.output_dir).resolve().name, uuid.uuid4().hex  # comet_ml wants 32 digits or more
    return {"name": f"{folder}-{config.method}-{number[:6]}", "id": number, "runs": {}}


def read_note(file: Path) -> dict[str, Any]:
    """Name, id and runs by tracker, as `start_trackers` wrote them. Raises OSError, or an error of another content."""
    note = read_json(file)
    return {"name": str(note["name"]), "id": str(note["id"]), "runs": dict(note["runs"])}


def _init_kwargs(note: dict[str, Any], logs: Path, step: int) -> dict[str, dict[str, Any]]:
    """What each tracker takes to begin the run, or to go on with it."""
    name, number, runs = note["name"], note["id"], note["runs"]
    return {
        "wandb": {"id": number, "name": name, "resume": "allow", "dir": str(logs)},
        "swanlab": {"id": number, "experiment_name": name, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
        "comet_ml": {"experiment_key": number},
        "mlflow": {"run_id": runs["mlflow"]} if "mlflow" in runs else {"run_name": name},
        "aim": {"run_hash": runs.get("aim")},
        "clearml": {
            "task_name": name,
            "reuse_last_task_id": runs.get("clearml", False),
            "continue_last_task": 0 if "clearml" in runs else False,  # 0: steps are counted from 0, as they are here
        },
        "dvclive": {"dir": str(logs / "dvclive"), "resume": True},
        "tensorboard": {"purge_step": step + 1},
    }


def _identify(tracker: Any, note: dict[str, Any]) -> str:
    """By which id the tracker finds the run again; it gets its name where it could not be given before."""
    run = tracker.tracker
    if tracker.name == "comet_ml":
        run.set_name(note["name"])
    elif tracker.name == "aim":
        run.name = note["name"]
        return run.hash
    elif tracker.name == "mlflow":
        return run.info.run_id
    elif tracker.name == "clearml":
        return run.id
    return note["id"]
