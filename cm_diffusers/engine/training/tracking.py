"""Experiment trackers (wandb, tensorboard, ...), checked before the data are read, and resumed with the run."""

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


VERSIONS = {"aim": "aim<4"}  # versions that Accelerate supports, where it does not support all
SETTINGS_ONCE = ("mlflow", "tensorboard")  # mlflow refuses changed settings; tensorboard shows them as another run


def check_trackers(names: Sequence[str]) -> None:
    """Check that all trackers in `names` (of --report_to) can be used on this machine.

    Raises:
        ValueError: a tracker is unknown, not installed, or fails to import.
    """
    for name in names:
        _check_tracker(name)


def _check_tracker(name: str) -> None:
    known, available = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    if name not in known:
        raise ValueError(
            f"report_to {name!r} is not a tracker of Accelerate. Give one of {', '.join(known)}, or none for no"
            " tracker."
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
            f"report_to {name!r} needs the package {package}, which is not installed. Install it with"
            f" `pip install '{package}'`, or leave --report_to out."
        )
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        importlib.import_module(module)
    except Exception as error:  # importing a package can raise anything
        raise ValueError(
            f"report_to {name!r}: the package {package} is installed, but its import fails: {headline(error)} Repair"
            " the package, or leave --report_to out."
        ) from error


def start_trackers(accelerator: Accelerator, config: Config, step: int) -> None:
    """Start the trackers of --report_to. A resumed run continues the tracker's run of its first start.

    Args:
        accelerator: an accelerator that was created with these trackers.
        config: the settings of the run, which the trackers record.
        step: the last training step; tensorboard drops its entries after it.

    Raises:
        ValueError: a tracker does not start, for example without a login or network, or because its run was deleted.
    """
    file = Path(config.run.output_dir) / RunFiles.TRACKER
    try:
        note = read_note(file) if file.exists() else _new_note(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} {why(error)}. Delete it to start a new run in the tracker.") from None
    values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.to_dict().items()}
    try:
        _start(accelerator, config.run.tracker_project_name, note, file.parent / config.run.logging_dir, step)
        for tracker in accelerator.trackers:
            if tracker.name not in SETTINGS_ONCE or tracker.name not in note["runs"]:
                tracker.store_init_configuration(values)
    except Exception as error:  # trackers raise many kinds; training would continue untracked
        raise ValueError(
            f"report_to {' '.join(config.run.trackers)}: the tracker does not start: {headline(error)} If the"
            f" tracker's run was deleted, delete {file} to start a new one. Without --report_to nothing is tracked."
        ) from error
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            note["runs"][tracker.name] = _identify(tracker, note)
        replace_file(file, json.dumps(note, indent=1))


def _start(accelerator: Accelerator, project: str, note: dict[str, Any], logs: Path, step: int) -> None:
    """Start the trackers one by one, because tensorboard takes the name of the run in place of a project's name."""
    chosen, started = accelerator.log_with, []
    logs.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if its folder is missing
    for kind in chosen:
        accelerator.log_with, accelerator.trackers = [kind], []
        accelerator.init_trackers(
            note["name"] if str(kind) == "tensorboard" else project, init_kwargs=_init_kwargs(note, logs, step)
        )
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = chosen, started


def log_pictures(accelerator: Accelerator, pictures: Mapping[str, Path], step: int) -> None:
    """Send pictures to the trackers of `accelerator`, with the call that each tracker has for them.

    Args:
        accelerator: an accelerator with started trackers.
        pictures: image files by the names under which the trackers show them.
        step: the training step of the pictures.
    """
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
    """Read the name, the id and the runs by tracker that `start_trackers` wrote to `file`.

    Raises:
        OSError: the file can't be read.
        ValueError, KeyError, TypeError: it holds something else.
    """
    note = read_json(file)
    return {"name": str(note["name"]), "id": str(note["id"]), "runs": dict(note["runs"])}


def _init_kwargs(note: dict[str, Any], logs: Path, step: int) -> dict[str, dict[str, Any]]:
    """The arguments by which each tracker starts or resumes its run."""
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
            "continue_last_task": 0 if "clearml" in runs else False,  # 0: no offset for the steps
        },
        "dvclive": {"dir": str(logs / "dvclive"), "resume": True},
        "tensorboard": {"purge_step": step + 1},
    }


def _identify(tracker: Any, note: dict[str, Any]) -> str:
    """The id by which the tracker finds its run again; also sets a name that could not be set at the start."""
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
