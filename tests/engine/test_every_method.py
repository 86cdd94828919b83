"""What holds for a run of every method: exact resume, any split of the batch, a model that loads."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_runs import differences, read_log, run, tensors

from cm_diffusers.engine.models import load_pipeline
from cm_diffusers.objectives import OBJECTIVES


SETTINGS = {
    "ct": {"s1": 12},
    "ict": {"s0": 4, "s1": 16},
    "cd": {"num_scales": 12},
    # where r = 0 a student that still is its teacher has residuals of rounding size; c > 0 takes their weight away
    "ecd": {"stage_steps": 2, "p_mean": 1.0, "p_std": 0.5, "huber_c": 0.01},
}
every_method = pytest.mark.parametrize("method", OBJECTIVES)
STATE = {"ct": {"auxiliary.target"}, "cd": {"auxiliary.target"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A diffusion model, trained a little."""
    return run(tmp_path_factory.mktemp("runs") / "teacher", "diffusion", max_train_steps=4) / "pipeline"


@pytest.fixture
def train(teacher):
    """A maker of short runs of any method."""

    def make(folder, method, **settings):
        if "pretrained_teacher_model" in OBJECTIVES[method].Options.__dataclass_fields__:
            settings["pretrained_teacher_model"] = teacher
        return run(folder, method, **{**SETTINGS.get(method, {}), **settings})

    return make


@every_method
def test_a_stopped_run_is_resumed_bit_for_bit(train, tmp_path, monkeypatch, method):
    whole = train(tmp_path / "whole", method, dropout=0.1)
    cls, loss = OBJECTIVES[method], OBJECTIVES[method].loss

    def loss_with_signal(self, batch, draws):
        if draws.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "loss", loss_with_signal)
        with pytest.raises(SystemExit):
            train(tmp_path / "stopped", method, dropout=0.1)
    train(tmp_path / "stopped", method, dropout=0.1)
    assert differences(tmp_path / "stopped", whole) == []
    assert read_log(tmp_path / "stopped") == read_log(whole)
    groups = {group for group, _ in tensors(whole)}
    assert groups == {"model", "optimizer", "ema_halflife_500kimg"} | STATE.get(method, set())


@every_method
def test_two_passes_of_eight_are_one_of_sixteen(train, tmp_path, method):
    whole = train(tmp_path / "whole", method, train_batch_size=16)
    split = train(tmp_path / "split", method, train_batch_size=8, gradient_accumulation_steps=2)
    for a, b in zip(read_log(whole), read_log(split)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
    a, b = tensors(whole), tensors(split)
    for key in a:
        if key[0] != "optimizer" and not key[1].endswith("to_k.bias"):  # whose true gradient is zero
            torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-5)


STOCK = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    for n in (1, 2, 5):
        generator = torch.Generator().manual_seed(0)
        images = pipe(3, [1, 2, 3], num_inference_steps=n, generator=generator, output_type="np").images
        numpy.save(f"{folder}/{n}.npy", images)
assert "cm_diffusers" not in sys.modules
"""


def test_every_consistency_model_loads_with_nothing_but_diffusers(train, tmp_path):
    methods = [method for method in OBJECTIVES if method != "diffusion"]
    folders = [train(tmp_path / method, method) / "pipeline" for method in methods]
    subprocess.run([sys.executable, "-I", "-c", STOCK, *map(str, folders)], check=True, capture_output=True)
    for folder in folders:
        pipe = load_pipeline(str(folder))
        pipe.set_progress_bar_config(disable=True)
        for n in (1, 2, 5):
            generator = torch.Generator().manual_seed(0)
            images = pipe(class_labels=[1, 2, 3], num_inference_steps=n, generator=generator, output_type="np").images
            assert images.std() > 0
            # the stock scheduler rounds the floor to float32 and adds noise of std 1e-6 after its last step
            np.testing.assert_allclose(np.load(folder / f"{n}.npy"), images, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigmas", [[80, 40, 20, 10, 5], [80, 2]])
@pytest.mark.parametrize("method", ["ct", "ict", "cd"])
def test_the_first_papers_reimplementations_levels_are_sampled(train, tmp_path, method, sigmas):
    pipe = load_pipeline(str(train(tmp_path, method, max_train_steps=1) / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, class_labels=[0, 1], sigmas=sigmas, output_type="pt").images
    assert pipe.scheduler.config.sigma_min == 0.002
    assert pipe.scheduler.sigmas.tolist() == [*sigmas, 0.002]
    assert images.isfinite().all()


def test_a_teacher_of_another_scale_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="sigma_data 0.7 differs from .* of the teacher"):
        train(tmp_path, "cd", sigma_data=0.7)


def test_a_teacher_of_another_resolution_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="the teacher makes images of 1 x 8 x 8, the dataset gives 1 x 16 x 16"):
        train(tmp_path, "ecd", resolution=16)


def test_a_teacher_that_is_a_consistency_model_is_refused(train, tmp_path):
    model = train(tmp_path / "ect", "ect", max_train_steps=1) / "pipeline"
    with pytest.raises(ValueError, match="the teacher must be a diffusion model"):
        run(tmp_path / "cd", "cd", pretrained_teacher_model=model)


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path, "cd", pretrained_teacher_model=tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["ct", "ict", "ect"])
def test_a_teacher_that_would_not_be_used_is_refused(tmp_path, method):
    with pytest.raises(ValueError, match=f"option of cd, ecd; {method} ignores it"):
        run(tmp_path, method, pretrained_teacher_model=tmp_path)
