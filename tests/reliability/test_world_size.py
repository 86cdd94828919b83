"""Two processes give the results of one: the same data, the same noise, the same weights."""

import io
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from cm_diffusers.engine.data.images import FIRST_ROWS
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.streams import StreamOrder
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.breadth import narrowed
from tests.helpers.scripts import SCRIPT
from tests.helpers.training_runs import flags, read_log, run, tensors


SETTINGS = {
    "max_train_steps": 40,
    "checkpointing_steps": 20,
    "pretrain_steps": 20,
    "stage_steps": 10,
    "random_flip": True,
    "max_train_samples": 200,
}


OPTIONS = {
    "ct": {"s0": 4, "s1": 12},
    "ict": {"s0": 4, "s1": 16},
    "cd": {"num_scales": 12},
    "lcm": {"num_ddim_timesteps": 12},
    "tcd": {"num_ddim_timesteps": 12},
    # at r = 0 a student equal to its teacher has residuals of rounding size; c > 0 removes their weight
    "ecd": {"stage_steps": 2, "p_mean": 1.0, "p_std": 0.5, "huber_c": 0.01},
    "sct": {"model_preset": "jvp_tiny", "tangent_warmup_steps": 3, "dropout": 0.3},
    "scd": {"from_scratch": True, "tangent_warmup_steps": 3},
    "mean_flow": {"model_preset": "jvp_tiny", "dropout": 0.3},
    # short rollouts end so close to their start that rounding shows in the product of two differences
    "cdm": {"rollout_steps": 2, "epsilon_min": 0.5, "epsilon_max": 1.0},
    # discriminator turns, and weights on which all processes agree
    "ctm": {"solver_steps": 2, "gan_weight": 0.5, "discriminator_start_step": 3},
}


def on_one(folder, **settings):
    return run(folder, **{**SETTINGS, "train_batch_size": 16, **settings})


def on_two(folder, **settings):
    """Train in two real processes that communicate by gloo; returns the output."""
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = flags(folder, **{**SETTINGS, "train_batch_size": 8, **settings})
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, SCRIPT, *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "16 on 2 process(es)" in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return on_one(tmp_path_factory.mktemp("runs") / "one")


def losses(folder):
    return [row["loss"] or row["discriminator"] for row in read_log(folder)]  # by whose turn it was


def assert_agree(folder, one, steps=40):
    assert len(losses(one)) == steps and losses(folder) == pytest.approx(losses(one), rel=1e-6)
    by_level = [[row["loss_by_sigma"] for row in read_log(f)] for f in (folder, one)]
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-7) for a, b in zip(*by_level))
    ours, theirs = tensors(folder), tensors(one)
    compared = [key for key in theirs if key[0] != "optimizer" and "to_k.bias" not in key[1]]
    assert len(compared) > 100
    for key in compared:  # softmax cancels key biases: their gradient is rounding, which Adam scales up
        assert (ours[key] - theirs[key]).abs().max() <= 1e-5, key


@pytest.mark.wide
def test_two_processes_train_as_one(one, tmp_path):
    assert "Resumed" not in on_two(tmp_path)
    assert_agree(tmp_path, one)


@pytest.mark.wide
def test_a_checkpoint_of_one_process_is_resumed_by_two(one, tmp_path):
    shutil.copytree(one / "checkpoint-20", tmp_path / "checkpoint-20")
    shutil.copy(one / "log.jsonl", tmp_path)
    assert "Resumed from step 20 of 40" in on_two(tmp_path)
    assert losses(tmp_path)[:20] == losses(one)[:20]
    assert_agree(tmp_path, one)


@pytest.mark.parametrize("method", narrowed(OBJECTIVES, "ect"))
def test_every_method_trains_on_two_processes_as_on_one(server, teacher, tmp_path, method):
    settings = {**OPTIONS.get(method, {}), "max_train_steps": 8, "random_flip": True}
    if method in ("cd", "lcm", "tcd", "ecd", "scd", "ctm"):
        settings["pretrained_teacher_model"] = teacher
    one, two = tmp_path / "one", tmp_path / "two"
    server.run(one, method, train_batch_size=16, **settings)
    assert "16 on 2 process(es)" in server.run(two, method, processes=2, train_batch_size=8, **settings)
    assert_agree(two, one, steps=8)
    assert ("auxiliary.target" in {group for group, _ in tensors(one)}) == OBJECTIVES[method].has_target


@pytest.mark.wide
def test_augmented_images_and_dropout_of_features_and_labels_are_the_same_on_two_processes(server, tmp_path):
    settings = {"model_preset": "ddpmpp_tiny", "augment": 0.5, "dropout": 0.3, "label_dropout": 0.3}
    one, two = tmp_path / "one", tmp_path / "two"
    server.run(one, "diffusion", train_batch_size=16, max_train_steps=8, **settings)
    server.run(two, "diffusion", processes=2, train_batch_size=8, max_train_steps=8, **settings)
    assert_agree(two, one, steps=8)


def write_stream(folder, n, broken=()):
    """Write `n` images to two parquet files, with unreadable ones at the indices `broken`; returns the folder."""
    folder.mkdir()
    images = [{"bytes": b"nothing" if i in broken else as_png(i), "path": None} for i in range(n)]
    for number, part in enumerate((images[: n // 3], images[n // 3 :])):
        rows = datasets.Dataset.from_dict({"image": part}, datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    return folder


def as_png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


STREAM = {"streaming": True, "max_train_steps": 8, "class_conditional": None, "max_train_samples": 50}


def test_a_stream_has_the_same_images_on_two_processes(server, tmp_path):
    one, two, settings = (
        tmp_path / "one",
        tmp_path / "two",
        {"dataset_name": write_stream(tmp_path / "d", 60), **STREAM},
    )
    server.run(one, train_batch_size=16, **settings)
    server.run(two, processes=2, train_batch_size=8, dataloader_num_workers=1, **settings)
    assert_agree(two, one, steps=8)


def test_more_processes_than_images_wait_for_nothing(server, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"dataset_name": write_stream(tmp_path / "d", 60), **STREAM, "max_train_samples": 1}
    server.run(one, train_batch_size=2, **settings)
    server.run(two, processes=2, train_batch_size=1, **settings)
    assert_agree(two, one, steps=8)


def test_a_row_that_one_process_can_not_read_is_the_end_of_both_and_all_is_saved(server, tmp_path):
    n = FIRST_ROWS + 10
    folder, settings = tmp_path / "run", {**STREAM, "dataset_name": write_stream(tmp_path / "d", n, [n - 5])}
    settings |= {"max_train_samples": None, "max_train_steps": 70, "train_batch_size": 8, "checkpointing_steps": 500}
    server.start(folder, processes=2, **settings)
    assert 2 in server.wait()
    batches = iter(StreamOrder(range(n), ProcessShare(16), seed=0))
    step = next(step for step, batch in enumerate(batches) if any(number == n - 5 for number, _ in batch))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert [row["step"] for row in read_log(folder)] == list(range(1, step + 1))


def test_another_order_of_the_data_gives_other_losses(one, tmp_path, monkeypatch):
    import cm_diffusers.engine.data.order as order

    monkeypatch.setattr(order, "permutation", lambda n, *key: torch.arange(n))
    other = on_one(tmp_path, max_train_steps=3, pretrain_steps=2)
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(losses(other), losses(one)))
