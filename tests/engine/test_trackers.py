"""Trackers: refused if they can't be used, and one tracker run per training run."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import accelerate.tracking
import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration
from PIL import Image

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.training.tracking import check_trackers, log_pictures, start_trackers
from tests.helpers.training_runs import flags, run


TRACKERS = ["wandb", "swanlab", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive"]


def stand_in(name):
    """A stand-in for the tracker's package: its module, and the function that begins a tracker run."""
    module = MagicMock(__version__="9.0")
    module.utils.validation.MAX_PARAM_VAL_LENGTH = 500
    module.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 100
    begin = {
        "comet_ml": module.start,
        "mlflow": module.start_run,
        "aim": module.Run,
        "clearml": module.Task.init,
        "dvclive": module.Live,
    }.get(name, module.init)
    module.Task.current_task.return_value = None
    begin.return_value = MagicMock(hash="chosen", id="chosen", info=SimpleNamespace(run_id="chosen"))
    return module, begin


@pytest.fixture
def install(monkeypatch):
    """A function that installs a tracker's stand-in; it returns the module and the function that begins a run."""

    def make(name):
        module, begin = stand_in(name)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(name)])
        return module, begin

    return make


def told(module):
    """Names of the settings that MLflow's module was told, one for each time, over all batches of its calls."""
    return [name for call in module.log_params.call_args_list for name in call.args[0]]


def start(folder, name, step=0, **settings):
    """Start a tracker like a run in `folder` after `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tracker"))
    config = parse_config(flags(folder, report_to=name, **settings), ["ect"], "")
    start_trackers(Accelerator(log_with=name, project_config=project), config, step)


# --- refused before training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_an_error_before_data_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=f"report_to '{name}'.*pip install '{name}") as error:
        run(tmp_path / "r", dataset_name="no/such/data", report_to=name)
    assert "--report_to" in str(error.value) and not (tmp_path / "r").exists()


def test_a_tracker_that_accelerate_does_not_know_is_refused_with_those_that_it_knows():
    with pytest.raises(ValueError, match="'wandbb' is not a tracker.* tensorboard, .*wandb"):
        check_trackers(["wandbb"])


def test_all_trackers_are_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="'all' finds no tracker installed"):
        check_trackers(["all"])


def test_an_installed_tracker_that_can_not_be_imported_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('protobuf is too old')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    with pytest.raises(ValueError, match="its import fails: protobuf is too old"):
        check_trackers(["wandb"])


def test_a_tracker_that_does_not_start_ends_the_run_before_training(tmp_path, install):
    _, begin = install("wandb")
    begin.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(ValueError, match="report_to wandb: the tracker does not start: api_key not configured"):
        run(tmp_path, report_to="wandb")
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / RunFiles.TRACKER).exists()


# --- one run of the tracker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(tmp_path, install, name):
    """By the id that it was given, or by the id that it chose."""
    _, begin = install(name)
    folder = tmp_path / "faces"
    start(folder, name)
    start(folder, name, step=3)
    first, second = (call.kwargs for call in begin.call_args_list)
    chosen = {"mlflow": "run_id", "aim": "run_hash", "clearml": "reuse_last_task_id"}
    if name in chosen:
        assert second[chosen[name]] == "chosen" != first[chosen[name]]
    else:
        assert first == second
    if name == "dvclive":
        assert first["dir"] == str(folder / "tracker" / "dvclive") and first["resume"]
    else:
        tracked = begin.return_value
        named = {**first, "set later": tracked.name, "by a call": str(tracked.set_name.call_args)}
        assert any("faces-ect-" in str(value) for value in named.values())


def test_the_project_is_that_of_the_command(tmp_path, install):
    _, begin = install("wandb")
    start(tmp_path / "a", "wandb")
    start(tmp_path / "b", "wandb", tracker_project_name="faces")
    assert [call.kwargs["project"] for call in begin.call_args_list] == ["cm_diffusers", "faces"]
    with pytest.raises(ValueError, match="tracker_project_name faces has no effect: only --report_to starts trackers"):
        parse_config(flags(tmp_path, tracker_project_name="faces"), ["ect"], "")


def test_runs_of_folders_of_one_name_are_not_one_run_of_the_tracker(tmp_path, install):
    _, begin = install("trackio")
    for parent in ("a", "b"):
        start(tmp_path / parent / "faces", "trackio")
    first, second = (call.kwargs["name"] for call in begin.call_args_list)
    assert first != second and first.startswith("faces-ect-") and second.startswith("faces-ect-")


def test_settings_that_a_tracker_refuses_to_change_are_told_it_once(tmp_path, install):
    module, _ = install("mlflow")
    for steps in (3, 6):
        start(tmp_path, "mlflow", steps)
    assert told(module) == list(dict.fromkeys(told(module)))


def test_a_tracker_that_is_new_to_a_run_begins_with_its_settings(tmp_path, install):
    install("trackio")
    start(tmp_path, "trackio")
    module, begin = install("mlflow")
    start(tmp_path, "mlflow")
    assert {"method", "seed"} <= set(told(module)) and begin.call_args.kwargs["run_id"] is None
    assert sorted(json.loads((tmp_path / RunFiles.TRACKER).read_text())["runs"]) == ["mlflow", "trackio"]


def test_a_damaged_note_of_the_tracker_is_set_aside_and_a_new_run_begun(tmp_path, install):
    _, begin = install("trackio")
    run(tmp_path, max_train_steps=3, report_to="trackio")
    (tmp_path / RunFiles.TRACKER).write_text('{"name"')
    with pytest.raises(ValueError, match="tracker.json is not JSON .*Delete it to start a new run in the"):
        start(tmp_path, "trackio")
    run(tmp_path, max_train_steps=6, report_to="trackio")
    assert begin.call_count == 2 and (tmp_path / f"damaged-{RunFiles.TRACKER}").read_text() == '{"name"'


def test_tensorboard_shows_one_run_without_the_steps_that_a_resumed_run_trains_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "faces", max_train_steps=6, report_to="tensorboard")
    (tmp_path / "faces" / "checkpoint-6" / "model.safetensors").unlink()  # the run resumes from step 3
    run(tmp_path / "faces", max_train_steps=8, report_to="tensorboard")
    (curves,) = {path.parent for path in (tmp_path / "faces" / "tracker").glob("*/events.out.*")}
    assert curves.name.startswith("faces-ect-")
    assert len([path for path in curves.iterdir() if path.is_dir()]) <= 2  # accelerate writes the settings twice
    steps = [event.step for event in EventAccumulator(str(curves)).Reload().Scalars("loss")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


# --- several trackers, and pictures --------------------------------------------------------------------------------


def test_two_trackers_get_one_run_each_and_tensorboard_s_is_named_after_ours(tmp_path, install, monkeypatch):
    module, begin = install("wandb")
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB, LoggerType.TENSORBOARD])
    where = run(tmp_path / "faces", report_to=["tensorboard", "wandb"], logging_dir="logs", max_train_steps=2)
    (folder,) = (path.parent for path in (where / "logs").glob("*/events*"))
    assert folder.name.startswith("faces-ect-") and begin.call_args.kwargs["project"] == "cm_diffusers"
    assert begin.call_count == 1 and module.init.return_value.log.called


def test_pictures_and_scalars_and_settings_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    where = run(tmp_path, report_to="tensorboard", validation_steps=3, max_train_steps=3)
    (folder,) = (path.parent for path in (where / "tracker").glob("*/events*"))
    events = EventAccumulator(str(folder)).Reload()
    assert {"samples", "diagnostics"} <= set(events.Tags()["images"]) and "loss" in events.Tags()["scalars"]
    (picture,) = events.Images("samples")
    assert picture.step == 3 and picture.width > 100
    assert list(folder.glob("*/hparams.yml"))


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive"])
def test_each_tracker_gets_pictures_by_its_own_call(tmp_path, install, name):
    module, begin = install(name)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "tracker"))
    config = parse_config(flags(tmp_path, report_to=name), ["ect"], "")
    accelerator = Accelerator(log_with=name, project_config=project)
    start_trackers(accelerator, config, 0)
    began = begin.return_value
    calls = {
        "wandb": module.Image,
        "swanlab": module.Image,
        "trackio": module.Image,
        "comet_ml": began.log_image,
        "mlflow": module.log_artifact,
        "aim": module.Image,
        "clearml": began.get_logger.return_value.report_image,
        "dvclive": began.log_image,
    }
    log_pictures(accelerator, {"samples": tmp_path / "a.png"}, 3)
    assert calls[name].call_count == 1
