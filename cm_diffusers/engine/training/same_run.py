"""Checks that a resumed run has the settings and data of its checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cm_diffusers.engine.checkpoint import newest_state
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.shareable import ON_THIS_MACHINE
from cm_diffusers.engine.training.divergence import ADVISED, read_note


def changed_settings(config: Config, state: Mapping[str, Any], early: bool = False) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a checkpoint but must not, by name: their values then and now.

    A setting is unchanged if the user gave the same value, or if it resolves to the same value. So a run can be
    resumed in two ways:

    - by its command, whose defaults and shares of the run can move with --max_train_steps;
    - by its config.yaml, which holds the resolved values.

    Args:
        config: the present settings, resolved.
        state: the state of the checkpoint, with the settings that the user gave.
        early: leave out settings whose defaults depend on the data or the network, which are not loaded yet.
    """
    before = config.defaults() | state["config"]  # a setting that is newer than the checkpoint had its default
    given, now, flags = config.given.to_dict(), config.to_dict(), config.flags()
    try:
        then = config.with_settings(before).to_dict() if before["method"] == config.method else before
    except ValueError:  # this version refuses the old settings: compare the given values only
        then = before
    changed = {}
    for key in now:
        if key != "method" and (flags[key].may_change or early and flags[key].told_by_data):
            continue
        was, is_now = before.get(key), given[key]
        if was not in (is_now, ON_THIS_MACHINE) and then.get(key) != now[key]:
            changed[key] = then.get(key) if was is None else was, now[key] if is_now is None else is_now
    return changed


def check_settings(folder: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that no setting has changed.

    Args:
        folder: the folder of the run, for the message.
        changed: the result of `changed_settings`.

    Raises:
        ValueError: `changed` is not empty.
    """
    if changed:
        differences = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
        raise ValueError(
            f"{folder} holds a run with other settings: {differences}."
            " Give the same settings to resume it, or another --output_dir."
        )


def check_global_batch(folder: Path, state: Mapping[str, Any], now: int) -> None:
    """Check the number of images per training step, `now`, against the state of the checkpoint.

    Args:
        folder: the folder of the run, for the message.
        state: the state of the checkpoint.
        now: images per step on all processes together.

    Raises:
        ValueError: the number has changed.
    """
    if state["global_batch"] != now:
        raise ValueError(
            f"{folder} holds a run with {state['global_batch']} images per step, but processes x"
            f" train_batch_size x gradient_accumulation_steps is {now} now. Make the product"
            f" {state['global_batch']} again, or choose another --output_dir."
        )


def check_before_data(config: Config, folder: Path, processes: int) -> None:
    """Compare the settings with the newest checkpoint before the data are loaded, as far as that is possible.

    Args:
        config: the present settings, resolved.
        folder: the folder of the run.
        processes: the number of processes.

    Raises:
        ValueError: a setting or the number of images per step has changed, and must not.
    """
    state = newest_state(folder)
    if state is None:
        return
    changed, run = changed_settings(config, state, early=True), config.run
    if read_note(folder) is not None:
        changed = {key: values for key, values in changed.items() if key not in ADVISED}
    check_settings(folder, changed)
    check_global_batch(folder, state, processes * run.train_batch_size * run.gradient_accumulation_steps)


def check_same_run(
    config: Config, folder: Path, state: Mapping[str, Any], data: DataDescription, global_batch: int
) -> Iterator[str]:
    """Yield a line for each permitted difference between a resumed run and its checkpoint.

    Args:
        config: the present settings, resolved.
        folder: the folder of the run.
        state: the state of the checkpoint.
        data: the description of the present images.
        global_batch: the present number of images per step, on all processes together.

    Raises:
        ValueError: a setting, the images, or the number of images per step have changed, and must not.
    """
    changed, run = changed_settings(config, state), config.run
    if read_note(folder) is not None:
        for key in [key for key in changed if key in ADVISED]:
            before, now = changed.pop(key)
            yield f"{key} was {before!r}, is {now!r} from here on; a run that diverged may change it."
    then = DataDescription.from_dict(state["data"]) if "data" in state else None
    if then is None:
        yield "The checkpoint holds no description of its images, so changes of the images are not detected."
    differences = then.differences(data) if then is not None else []
    if differences and changed.keys() == {"sigma_data"} and not run.allow_data_change:
        changed = {}  # it was measured on the other images, which are the fault to report
    check_settings(folder, changed)
    check_global_batch(folder, state, global_batch)
    if differences:
        yield _allowed_data_change(folder, "; ".join(differences), then.shape == data.shape, run.allow_data_change)
    before = state["config"]["max_train_steps"]
    if before != run.max_train_steps:
        yield (
            f"max_train_steps was {before}, is {run.max_train_steps} now. Schedules given as shares of the run move"
            " with it."
        )


def _allowed_data_change(folder: Path, differences: str, fits: bool, allowed: bool) -> str:
    """The line about changed images. ValueError unless --allow_data_change is set and they have the same shape."""
    if not (fits and allowed):
        raise ValueError(
            f"{folder} holds a run on another dataset: {differences}. Give the dataset that it was trained"
            " on, or another --output_dir."
            + (" With --allow_data_change the run continues with this dataset." if fits else "")
        )
    return f"The dataset changes from here on, with --allow_data_change: {differences}."
