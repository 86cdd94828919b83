"""The training loop: exact resume, skipped steps, accumulation, starts and results of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image

import cm_diffusers.engine.training.trainer as loop_module
from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.engine.checkpoint import DamagedCheckpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from cm_diffusers.engine.lock import lock_folder
from cm_diffusers.engine.saved.start import load_pipeline
from cm_diffusers.engine.training.divergence import Diverged
from cm_diffusers.objectives import ECT
from tests.helpers.training_runs import differences, flags, read_log, run, tensors


REPOSITORY = Path(__file__).parents[2]
AVERAGES = {"ema_half_life": [0.05, 1.0], "ema_decay": [0.9], "ema_rampup": 0}
RICH = {"dropout": 0.2, "random_flip": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, **AVERAGES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of six steps."""
    return run(tmp_path_factory.mktemp("runs") / "whole", **RICH)


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory):
    """A diffusion model with non-default settings."""
    settings = {"time_label": "angle", "sigma_data": 0.6, "max_train_steps": 2}
    return run(tmp_path_factory.mktemp("runs") / "diffusion", "diffusion", **settings) / "pipeline"


def stopped(monkeypatch, folder, step, number=signal.SIGTERM, **settings):
    """The exit code of a run that gets a signal in the middle of the step after `step`."""
    loss = ECT.loss

    def loss_with_signal(self, batch, draws):
        if draws.step == step:
            os.kill(os.getpid(), number)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(ECT, "loss", loss_with_signal)
        with pytest.raises(SystemExit) as caught:
            run(folder, **settings)
    return caught.value.code


def break_steps(monkeypatch, steps, kind, only_pass=None):
    """In `steps`, make the loss nan or inf, or its "gradient" nan, in all forward passes or in `only_pass`."""
    loss, passes = ECT.loss, []

    def broken(self, batch, draws):
        result = loss(self, batch, draws)
        passes.append(draws.step)
        if draws.step not in steps or only_pass not in (None, passes.count(draws.step)):
            return result
        if kind == "gradient":
            result.total.register_hook(lambda gradient: gradient * float("nan"))
            return result
        return replace(result, total=result.total * float(kind))

    monkeypatch.setattr(ECT, "loss", broken)


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_stopped_run_is_resumed_bit_for_bit_by_the_same_command(tmp_path, monkeypatch, whole, step):
    assert stopped(monkeypatch, tmp_path, step, **RICH) == 128 + signal.SIGTERM
    assert newest_checkpoint(tmp_path)[0].step == step + 1 and not (tmp_path / "pipeline").exists()
    run(tmp_path, **RICH)
    assert differences(tmp_path, whole) == []
    assert read_log(tmp_path) == read_log(whole) and [row["step"] for row in read_log(whole)] == [1, 2, 3, 4, 5, 6]
    model = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / model).read_bytes() == (whole / model).read_bytes()


def test_another_seed_is_another_run(tmp_path, whole):
    run(tmp_path, seed=1, **RICH)
    assert differences(tmp_path, whole) and read_log(tmp_path) != read_log(whole)


def test_every_average_is_saved_and_they_differ(whole):
    groups = {group for group, _ in tensors(whole)}
    assert groups == {"model", "optimizer", "ema_halflife_0.05kimg", "ema_halflife_1kimg", "ema_0.9"}
    values = [tensors(whole)[group, "conv_in.weight"] for group in sorted(groups - {"optimizer"})]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_first_average_is_exported(whole):
    pipeline = load_pipeline(str(whole / "pipeline"))
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, tensors(whole)["ema_halflife_0.05kimg", key])


def test_an_interrupt_stops_as_a_termination_does(tmp_path, monkeypatch):
    assert stopped(monkeypatch, tmp_path, 1, signal.SIGINT) == 128 + signal.SIGINT
    assert newest_checkpoint(tmp_path)[0].step == 2


@pytest.mark.wide
def test_a_terminated_process_saves_ends_with_143_and_resumes_exactly(tmp_path):
    settings = {"max_train_steps": 60, "checkpointing_steps": 1000}
    script = [sys.executable, str(REPOSITORY / "training" / "train_consistency.py")]
    process = subprocess.Popen([*script, *flags(tmp_path / "a", **settings)], stderr=subprocess.DEVNULL)
    while not (tmp_path / "a" / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert 1 <= newest_checkpoint(tmp_path / "a")[0].step < 60
    run(tmp_path / "a", **settings)
    run(tmp_path / "b", **settings)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capfd):
    run(tmp_path)
    ignored = {".lock", ".owner"}
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    capfd.readouterr()
    run(tmp_path)
    assert "This run is finished" in "".join(capfd.readouterr())
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    assert before.keys() == after.keys()
    changed = {p.name for p in before if before[p][1] != after[p][1]}
    assert changed <= ignored
    rewritten = {p.name for p in before if before[p][0] != after[p][0]}
    assert rewritten <= {*ignored, "config.yaml", "log.jsonl"}


def test_a_finished_run_without_its_model_exports_it_again(tmp_path):
    run(tmp_path)
    model = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = model.read_bytes()
    shutil.rmtree(tmp_path / "pipeline")
    run(tmp_path)
    assert model.read_bytes() == before


def test_a_finished_run_can_be_made_longer(tmp_path):
    run(tmp_path / "a", max_train_steps=3)
    run(tmp_path / "a", max_train_steps=6)
    run(tmp_path / "b", max_train_steps=6)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"learning_rate": 1e-4}, ["learning_rate", "0.001", "0.0001"]),
        ({"seed": 1}, ["seed"]),
        ({"q": 3}, ["q was 2.0, is 3.0"]),
        ({"ema_decay": [0.5]}, ["ema_decay"]),
        ({"train_batch_size": 4}, ["8 images per step", "is 4 now"]),
        ({"optimizer": "adam", "dropout": 0.1}, ["optimizer", "dropout"]),
        ({"resolution": 16}, ["resolution"]),
        ({"class_conditional": False}, ["class_conditional"]),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(whole, tmp_path, change, words):
    shutil.copytree(whole, tmp_path / "r")
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "r", **{**RICH, "max_train_steps": 9, **change})
    assert all(word in str(caught.value) for word in words)
    assert differences(tmp_path / "r", whole) == [] and read_log(tmp_path / "r") == read_log(whole)
    assert (tmp_path / "r" / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


def test_a_setting_that_is_newer_than_the_run_had_its_default(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    checkpoint, _ = newest_checkpoint(folder)
    config = {key: value for key, value in checkpoint.state["config"].items() if key != "adam_epsilon"}
    save_checkpoint(folder, checkpoint.step, checkpoint.tensors, {**checkpoint.state, "config": config})
    run(folder, **RICH)
    with pytest.raises(ValueError, match="adam_epsilon was 1e-08, is 1e-06"):
        run(folder, **RICH, adam_epsilon=1e-6)


def test_the_batch_may_be_split_otherwise_when_a_run_is_resumed(tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path / "a", 2)
    run(tmp_path / "a", train_batch_size=2, gradient_accumulation_steps=4)
    run(tmp_path / "b")
    assert [row["loss"] for row in read_log(tmp_path / "a")] == pytest.approx(
        [row["loss"] for row in read_log(tmp_path / "b")], rel=1e-5
    )


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', "\0\0\0"])
def test_the_log_is_cut_back_to_the_step_that_is_resumed(tmp_path, whole, tail):
    shutil.copytree(whole, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoint-6")
    shutil.rmtree(tmp_path / "r" / "pipeline")
    log = tmp_path / "r" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:5]) + tail)
    run(tmp_path / "r", **RICH)
    assert read_log(tmp_path / "r") == read_log(whole)
    assert differences(tmp_path / "r", whole) == []


def test_a_damaged_checkpoint_is_passed_over_aloud_and_the_result_is_the_same(tmp_path, whole, capfd):
    shutil.copytree(whole, tmp_path / "r")
    (tmp_path / "r" / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    run(tmp_path / "r", **RICH)
    out = "".join(capfd.readouterr())
    assert "WARNING" in out and "checkpoint-6: model.safetensors" in out and "Resumed from step 3" in out
    assert differences(tmp_path / "r", whole) == [] and read_log(tmp_path / "r") == read_log(whole)


def test_a_run_with_only_damaged_checkpoints_is_not_started_anew(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "r")
    for step in (3, 6):
        (tmp_path / "r" / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match="not restarted"):
        run(tmp_path / "r", **RICH)
    assert read_log(tmp_path / "r") == read_log(whole)


# --- skipped steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_leaves_weights_and_optimiser_alone_and_is_counted(tmp_path, monkeypatch, kind):
    break_steps(monkeypatch, {1, 2, 4}, kind)
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=10, **AVERAGES)
    saved = [load_checkpoint(tmp_path / f"checkpoint-{step}").tensors for step in range(1, 7)]
    for before, after, moved in zip(saved, saved[1:], [False, False, True, False, True]):
        for group in ("model", "optimizer"):  # averages go on
            keys = [key for key in before[group] if "taken" not in key]  # RAdam's number of steps
            same = [torch.equal(before[group][key], after[group][key]) for key in keys]
            assert not all(same) if moved else all(same)
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 2, 2, 3, 3]
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert [loss is None for loss in losses] == [False, True, True, False, True, False]
    assert all(torch.isfinite(value).all() for value in tensors(tmp_path).values())
    assert '"NaN"' not in (tmp_path / "log.jsonl").read_text()


def test_one_bad_forward_pass_of_several_skips_the_step(tmp_path, monkeypatch):
    break_steps(monkeypatch, {1}, "nan", only_pass=2)
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=10, max_train_steps=3, **split)
    saved = [load_checkpoint(tmp_path / f"checkpoint-{step}").tensors["model"] for step in (1, 2, 3)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert not all(torch.equal(saved[1][key], saved[2][key]) for key in saved[0])
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 1]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_a_sound_checkpoint(tmp_path, monkeypatch):
    break_steps(monkeypatch, {1, 3, 4, 5, 6, 7, 8, 9}, "nan")
    with pytest.raises(Diverged, match="3 steps in a row, up to step 6"):
        run(tmp_path, max_train_steps=10, checkpointing_steps=1, max_skipped_steps=2)
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert faults == [] and checkpoint.step == 3 and checkpoint.state["skipped_in_a_row"] == 0
    assert all(torch.isfinite(value).all() for group in checkpoint.tensors.values() for value in group.values())


def test_skipped_steps_in_a_row_are_counted_across_a_stop(tmp_path, monkeypatch):
    break_steps(monkeypatch, range(2, 10), "nan")
    settings = {"max_train_steps": 10, "max_skipped_steps": 2}
    stopped(monkeypatch, tmp_path, 3, **settings)
    with pytest.raises(Diverged, match="3 steps in a row"):
        run(tmp_path, **settings)


# --- the same numbers in other ways --------------------------------------------------------------------------------


def losses_and_weights(folder):
    weights = {key: value for (group, key), value in tensors(folder).items() if group == "model"}
    return [row["loss"] for row in read_log(folder)], weights


def assert_close(a, b, loss_tolerance, weight_tolerance):
    (losses, weights), (other_losses, other_weights) = losses_and_weights(a), losses_and_weights(b)
    assert losses == pytest.approx(other_losses, rel=loss_tolerance)
    for key, value in weights.items():
        if "to_k.bias" not in key:  # softmax cancels this bias: its gradient is rounding, which Adam scales up
            assert (value - other_weights[key]).abs().max() <= weight_tolerance, key


@pytest.mark.wide
def test_four_passes_of_eight_are_one_of_thirty_two(tmp_path):
    run(tmp_path / "a", max_train_steps=10, train_batch_size=32)
    run(tmp_path / "b", max_train_steps=10, train_batch_size=8, gradient_accumulation_steps=4)
    run(tmp_path / "c", max_train_steps=10, train_batch_size=8)
    assert_close(tmp_path / "a", tmp_path / "b", 1e-6, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "a", tmp_path / "c", 1e-2, 1e-5)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    settings = {"dropout": 0.2}
    run(tmp_path / "a", **settings)
    run(tmp_path / "b", gradient_checkpointing=True, **settings)
    assert_close(tmp_path / "a", tmp_path / "b", 1e-6, 1e-5)


def test_sample_grids_do_not_touch_the_run(tmp_path, whole):
    run(tmp_path, validation_steps=2, **RICH)
    assert differences(tmp_path, whole) == [] and read_log(tmp_path) == read_log(whole)
    pictures = {path.name for path in (tmp_path / "samples").iterdir()}
    assert pictures == {f"step-000000{n}{what}.png" for n in (2, 4, 6) for what in ("", "-diagnostics")}
    images = [np.asarray(Image.open(tmp_path / "samples" / f"step-000000{n}.png")) for n in (2, 6)]
    assert not np.array_equal(*images) and Image.open(tmp_path / "losses.png").size > (100, 100)


# --- the results of a run ------------------------------------------------------------------------------------------


def test_a_run_folder_holds_tensors_text_and_pictures_only(tmp_path):
    run(tmp_path, validation_steps=6, max_train_steps=6)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".md", ""}
    assert {path.name for path in files if not path.suffix} == {".lock", ".owner"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-3",
        "checkpoint-6",
        "pipeline",
        "samples",
    ]


def test_the_stage_goes_from_pretraining_to_tuning_in_the_log(tmp_path):
    run(tmp_path)
    assert [row["stage"] for row in read_log(tmp_path)] == [-1, -1, 0, 0, 1, 1]


def test_log_lines_hold_the_mean_since_the_last_line(tmp_path, whole):
    run(tmp_path, logging_steps=4, **RICH)
    every = [row["loss"] for row in read_log(whole)]
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [4, 6]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(every[:4]), np.mean(every[4:])], rel=1e-12)


def test_the_loss_by_noise_level_adds_up_to_the_loss_over_a_stop(tmp_path, monkeypatch, whole):
    settings = {"logging_steps": 6, **RICH}
    stopped(monkeypatch, tmp_path, 3, **settings)
    assert not (tmp_path / "log.jsonl").exists()
    run(tmp_path, **settings)
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(np.mean([row["loss"] for row in read_log(whole)]), rel=1e-12)


def test_the_learning_rate_warms_up_and_falls(whole):
    rates = [row["lr"] for row in read_log(whole)]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(a > b for a, b in zip(rates[2:], rates[3:])) and rates[-1] > 0


def test_tensorboard_gets_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, report_to="tensorboard")
    logs = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "tracker").rglob("events.out.*")]
    (losses,) = [log.Scalars("loss") for log in logs if "loss" in log.Tags()["scalars"]]
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in read_log(tmp_path)], rel=1e-6)


def test_the_settings_of_a_run_are_kept_as_yaml_that_repeats_it(tmp_path, whole, monkeypatch):
    from cm_diffusers.engine.config import parse_config
    from cm_diffusers.engine.training.run import train

    verify = "cm_diffusers.engine.saved.export.verify_export"
    monkeypatch.setattr(verify, lambda pipeline, folder: None)  # it takes seconds
    train(parse_config(["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path)], ["ect"], ""))
    assert differences(tmp_path, whole) == [] and read_log(tmp_path) == read_log(whole)


def test_a_failed_export_leaves_the_model_before(tmp_path, monkeypatch):
    run(tmp_path, max_train_steps=3)
    before = {p: p.read_bytes() for p in (tmp_path / "pipeline").rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DModel, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            run(tmp_path, max_train_steps=4)
    assert {p: p.read_bytes() for p in (tmp_path / "pipeline").rglob("*") if p.is_file()} == before
    run(tmp_path, max_train_steps=4)
    pipeline, saved = load_pipeline(str(tmp_path / "pipeline")), tensors(tmp_path)
    assert all(value.equal(saved["ema_halflife_500kimg", key]) for key, value in pipeline.unet.state_dict().items())
    assert pipeline.unet.training is False


# --- one run per folder --------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_with_its_owner_and_is_free_after_a_kill(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock_folder(tmp_path)
        os.write(tell, b"1" if held.is_locked else b"0")
        time.sleep(600)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"1"
        with pytest.raises(ValueError, match=f"is in use by process {child} on "):
            run(tmp_path)
        assert not (tmp_path / "log.jsonl").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(tmp_path, max_train_steps=1)
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_the_folder_is_free_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="resolution"):
        run(tmp_path, resolution=9)
    run(tmp_path, max_train_steps=1)
    assert (tmp_path / "pipeline" / "model_index.json").exists()


# --- the start of a run --------------------------------------------------------------------------------------------


def test_a_consistency_model_starts_from_a_diffusion_model(tmp_path, diffusion_model, monkeypatch):
    trainers = []
    init = loop_module.Trainer.__init__
    monkeypatch.setattr(loop_module.Trainer, "__init__", lambda self, *a: (init(self, *a), trainers.append(self))[0])
    settings = {"pretrained_model_name_or_path": diffusion_model, "pretrain_steps": None, "max_train_steps": 1}
    run(tmp_path, learning_rate=1e-12, dropout=0.3, **settings)
    objective = trainers[0].objective
    assert objective.spec.time_label == "angle" and objective.spec.sigma_data == 0.6
    assert objective.options.pretrain_steps == 0 and read_log(tmp_path)[0]["stage"] == 0
    assert {m.p for m in objective.network.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    before = load_pipeline(str(diffusion_model)).unet.state_dict()
    after = load_pipeline(str(tmp_path / "pipeline"))
    assert all((before[key] - value).abs().max() < 1e-9 for key, value in after.unet.state_dict().items())
    assert after.scheduler.config.sigma_data == 0.6 and after.scheduler.config.time_label == "angle"


def test_a_consistency_model_starts_from_a_consistency_model(tmp_path, whole):
    settings = {"pretrained_model_name_or_path": whole / "pipeline", "pretrain_steps": None, "max_train_steps": 1}
    run(tmp_path, learning_rate=1e-12, **settings)
    before = load_pipeline(str(whole / "pipeline")).unet.state_dict()
    after = load_pipeline(str(tmp_path / "pipeline")).unet.state_dict()
    assert all((before[key] - value).abs().max() < 1e-9 for key, value in after.items())
    assert read_log(tmp_path)[0]["stage"] == 0


def make_missing(folder):
    return "missing"


def make_foreign(folder):
    (folder / "config.json").write_text("{}")
    return "no model_index.json"


def make_text_conditional(folder):
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return "is a StableDiffusionPipeline, which is conditioned on text"


def make_broken_index(folder):
    (folder / "model_index.json").write_text("{")
    return "model_index.json|JSON|json"


@pytest.mark.parametrize("make", [make_missing, make_foreign, make_text_conditional, make_broken_index])
def test_a_start_that_can_t_be_read_is_refused_by_name(tmp_path, make):
    folder = tmp_path / "missing" if make is make_missing else tmp_path
    reason = make(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        run(tmp_path / "r", pretrained_model_name_or_path=folder)
    assert str(folder) in str(caught.value)


def test_a_start_with_damaged_weights_is_refused_by_name(tmp_path, whole):
    shutil.copytree(whole / "pipeline", tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=f"{tmp_path / 'm'}.*can't be loaded"):
        run(tmp_path / "r", pretrained_model_name_or_path=tmp_path / "m")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"resolution": 16}, "makes images of 1 x 8 x 8.*gives 1 x 16 x 16"),
        ({"channels": 3}, "makes images of 1 x 8 x 8.*gives 3 x 8 x 8"),
        ({"class_conditional": False}, "conditional on 10 classes"),
        ({"time_label": "log_sigma"}, "time_label 'log_sigma' differs from 'angle'"),
        ({"sigma_data": 0.5}, "sigma_data 0.5 differs from 0.6"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, diffusion_model, change, reason):
    with pytest.raises(ValueError, match=reason):
        run(tmp_path, pretrained_model_name_or_path=diffusion_model, **change)


def test_a_resolution_that_can_not_be_halved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution 9 x 9 can't be halved 1 times"):
        run(tmp_path, resolution=9)


def test_a_network_comes_from_a_config_file_with_the_shape_of_the_data(tmp_path, tiny_unet):
    config = {key: value for key, value in tiny_unet().config.items() if not key.startswith("_")}
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({**config, "block_out_channels": [8, 32], "sample_size": 99, "in_channels": 3}))
    run(tmp_path / "r", model_config_name_or_path=path, dropout=0.1, max_train_steps=1)
    unet = load_pipeline(str(tmp_path / "r" / "pipeline")).unet
    assert unet.config.block_out_channels == [8, 32] and unet.config.num_class_embeds == 10
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.dropout) == (8, 1, 0.1)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"block_out_channels": [8, 8, 8, 8, 8]}'])
def test_a_config_file_that_is_none_is_refused_by_name(tmp_path, content):
    path = tmp_path / "unet.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        run(tmp_path / "r", model_config_name_or_path=path)


def test_the_angle_label_is_exported_with_our_classes_and_reloads(tmp_path):
    run(tmp_path, time_label="angle", max_train_steps=2)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyPipeline"
    assert index["scheduler"] == ["cm_diffusers", "MultistepConsistencyScheduler"]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline) is ConsistencyPipeline and type(pipeline.scheduler) is MultistepConsistencyScheduler
    assert pipeline.scheduler.config.time_label == "angle" and pipeline.scheduler.config.sigma_min == 0
    images = pipeline(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all() and images.std() > 0


def test_images_that_are_not_square_are_trained_on_and_sampled(tmp_path):
    run(tmp_path, resolution=[8, 16], max_train_steps=2, validation_steps=2)
    assert load_pipeline(str(tmp_path / "pipeline"))(output_type="np").images.shape == (1, 8, 16, 1)
