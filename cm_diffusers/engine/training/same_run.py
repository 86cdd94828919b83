"""Whether the settings of a run are those that it was begun with."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cm_diffusers.engine.checkpoint import newest_state
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.shareable import ON_THIS_MACHINE
from cm_diffusers.engine.training.divergence import ADVISED, read_note


def changed_settings(config: Config, state: Mapping[str, Any], early: bool = False) -> dict[str, tuple[Any, Any]]:
    """The settings that are not those of a checkpoint and must be, by name: their values then and now.

    One is the same where the same was given, and where it comes to the same. So a run goes on by its command, whose
    shares of the run and defaults may move with --max_train_steps, and by its config.yaml, which has their values.

    Args:
        config: the settings now, resolved.
        state: of the checkpoint, with what was given then.
        early: leave out what the data or the network must tell, which are not read yet.
    """
    before = config.defaults() | state["config"]  # a setting that is newer than the run had its default
    given, now, flags = config.given.to_dict(), config.to_dict(), config.flags()
    try:
        then = config.with_settings(before).to_dict() if before["method"] == config.method else before
    except ValueError:  # what can't be now; then what was given is compared alone
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
    """Raise ValueError where settings have changed."""
    if changed:
        differences = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
        raise ValueError(
            f"{folder} holds a run with other settings: {differences}."
            " Give the same settings to resume it, or another --output_dir."
        )


def check_global_batch(folder: Path, state: Mapping[str, Any], now: int) -> None:
    """Raise ValueError where a step has another number of images than it had."""
    if state["global_batch"] != now:
        raise ValueError(
            f"{folder} holds a run with {state['global_batch']} images per step, but processes x"
            f" train_batch_size x gradient_accumulation_steps is {now} now. Choose them so that"
            f" it is {state['global_batch']} again, or another --output_dir."
        )


def check_before_data(config: Config, folder: Path, processes: int) -> None:
    """Raise ValueError for settings that are not those of the newest checkpoint, before the data are read."""
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
    """Gives a line for each difference to a checkpoint that a run may have.

    Args:
        config: the settings now, resolved.
        folder: of the run.
        state: of the checkpoint.
        data: what the images are now.
        global_batch: images of a step now.

    Raises:
        ValueError: settings, images or their number in a step are others, and must not be.
    """
    changed, run = changed_settings(config, state), config.run
    if read_note(folder) is not None:
        for key in [key for key in changed if key in ADVISED]:
            before, now = changed.pop(key)
            yield f"{key} was {before!r}, is {now!r} from here on, as this run once diverged."
    then = DataDescription.from_dict(state["data"]) if "data" in state else None
    if then is None:
        yield "The checkpoint does not say on which images it was trained; whether they changed is unknown."
    differences = then.differences(data) if then is not None else []
    if differences and changed.keys() == {"sigma_data"} and not run.allow_data_change:
        changed = {}  # it was measured on those
    check_settings(folder, changed)
    check_global_batch(folder, state, global_batch)
    if differences:
        yield _allowed_data_change(folder, "; ".join(differences), then.shape == data.shape, run.allow_data_change)
    before = state["config"]["max_train_steps"]
    if before != run.max_train_steps:
        yield (
            f"max_train_steps was {before}, is {run.max_train_steps} now: schedules that are shares of the run move."
        )


def _allowed_data_change(folder: Path, differences: str, fits: bool, allowed: bool) -> str:
    """What is said of other images; ValueError unless they were asked for and the network can take them."""
    if not (fits and allowed):
        raise ValueError(
            f"{folder} holds a run on another dataset: {differences}. Give the dataset that it was trained"
            " on, or another --output_dir"
            + ("; with --allow_data_change the run goes on with this dataset." if fits else ".")
        )
    return f"The dataset is another one from here on, as --allow_data_change says: {differences}."
