"""Properties of every method's runs: exact resume, any split of the batch, a model that loads."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cm_diffusers.core.conditions import of_classes
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.saved.start import denoiser_of, load_pipeline
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.breadth import narrowed
from tests.helpers.training_runs import differences, flags, read_log, run, tensors


SETTINGS = {
    "ct": {"s1": 12},
    "ict": {"s0": 4, "s1": 16},
    "cd": {"num_scales": 12},
    "lcm": {"num_ddim_timesteps": 12},
    "tcd": {"num_ddim_timesteps": 12},
    # at r = 0 a student equal to its teacher has residuals of rounding size; c > 0 removes their weight
    "ecd": {"stage_steps": 2, "p_mean": 1.0, "p_std": 0.5, "huber_c": 0.01},
    "sct": {"model_preset": "jvp_tiny", "tangent_warmup_steps": 3},
    "scd": {"from_scratch": True, "tangent_warmup_steps": 3},
    "mean_flow": {"model_preset": "jvp_tiny"},
    # short rollouts end so close to their start that rounding shows in the product of two differences
    "cdm": {"rollout_steps": 2, "epsilon_min": 0.5, "epsilon_max": 1.0},
    # other balances compute the weights of the parts in each pass
    "ctm": {"solver_steps": 2, "gan_weight": 0.5, "discriminator_start_step": 3, "balance": "fixed"},
}
CONTINUOUS = ("sct", "scd", "mean_flow")
TARGET = {"auxiliary.target"}
STATE = {
    **dict.fromkeys(("ct", "cd", "lcm", "tcd"), TARGET),
    "ctm": TARGET | {"discriminator", "discriminator_optimizer"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a briefly trained diffusion model."""
    return run(tmp_path_factory.mktemp("runs") / "teacher", "diffusion", max_train_steps=4) / "pipeline"


@pytest.fixture
def train(teacher):
    """A function that makes short runs of any method."""

    def make(folder, method, **settings):
        if "pretrained_teacher_model" in OBJECTIVES[method].Options.__dataclass_fields__:
            settings["pretrained_teacher_model"] = teacher
        return run(folder, method, **{**SETTINGS.get(method, {}), **settings})

    return make


@pytest.mark.parametrize("method", narrowed(OBJECTIVES, "ctm"))
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


@pytest.mark.parametrize("method", STATE)
def test_the_target_average_is_saved_and_loaded(train, tmp_path, monkeypatch, method):
    trainers, resume = [], Trainer.resume
    monkeypatch.setattr(Trainer, "resume", lambda self: (trainers.append(self), resume(self))[1])
    for _ in range(2):  # the second call finds a finished run and only loads it
        train(tmp_path, method)
    trained, loaded = (trainer.objective.target.state_dict() for trainer in trainers)
    saved = {key: value for (group, key), value in tensors(tmp_path).items() if group == "auxiliary.target"}
    assert saved.keys() == trained.keys() == loaded.keys()
    assert all(value.equal(trained[key]) and value.equal(loaded[key]) for key, value in saved.items())
    network = trainers[1].objective.network.state_dict()
    assert any(not value.equal(network[key]) for key, value in saved.items())


@pytest.mark.parametrize("method", ["ct", "cd", "ecd"])
def test_the_exported_model_is_the_students_average_and_nothing_else(train, tmp_path, method):
    folder = train(tmp_path, method) / "pipeline"
    weights = "unet/diffusion_pytorch_model.safetensors"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    texts = ["README.md", "data.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    assert files == [*texts, weights]
    assert not any(str(tmp_path.parent) in (folder / name).read_text() for name in texts)
    exported, saved = load_file(folder / weights), tensors(tmp_path)
    average, network = "ema_halflife_500kimg", {key for group, key in saved if group == "model"}
    assert exported.keys() == network
    assert all(saved[average, key].equal(exported[key]) for key in network)
    for group in {"model"} | STATE.get(method, set()):
        assert any(not saved[group, key].equal(exported[key]) for key in network)


@pytest.mark.parametrize("method", narrowed(OBJECTIVES, "ect", "ctm", "mean_flow"))
def test_two_passes_of_eight_are_one_of_sixteen(train, tmp_path, method):
    whole = train(tmp_path / "whole", method, train_batch_size=16)
    split = train(tmp_path / "split", method, train_batch_size=8, gradient_accumulation_steps=2)
    for a, b in zip(read_log(whole), read_log(split)):
        numbers = {key for key, value in a.items() if isinstance(value, float)} - {"grad_norm"}
        assert {key: b[key] for key in numbers} == pytest.approx({key: a[key] for key in numbers}, rel=1e-6)
    a, b = tensors(whole), tensors(split)
    for key in a:
        if key[0] != "optimizer" and not key[1].endswith("to_k.bias"):  # the true gradient of this bias is zero
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
    methods = [method for method in OBJECTIVES if method not in ("diffusion", "cdm", "ctm", *CONTINUOUS)]
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


def test_a_teacher_of_another_scale_than_the_model_to_start_from_is_refused(train, tmp_path):
    student = run(tmp_path / "ect", "ect", max_train_steps=1, sigma_data=0.7) / "pipeline"
    with pytest.raises(ValueError, match=r"sigma_data of the pretrained model is 0\.7, but the teacher's is 0\.8"):
        train(tmp_path / "cd", "cd", pretrained_model_name_or_path=student)


def test_a_teacher_of_other_classes_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="the teacher is conditional on 10 classes; set --class_conditional"):
        train(tmp_path, "cd", class_conditional=None)


def test_a_teacher_that_is_a_consistency_model_is_refused(train, tmp_path):
    model = train(tmp_path / "ect", "ect", max_train_steps=1) / "pipeline"
    with pytest.raises(ValueError, match="the teacher must be a diffusion model"):
        run(tmp_path / "cd", "cd", pretrained_teacher_model=model)


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path, "cd", pretrained_teacher_model=tmp_path / "nowhere")


@pytest.mark.parametrize("method", ["cd", "ecd"])
def test_distillation_without_a_teacher_is_refused_before_anything_is_written(tmp_path, method):
    with pytest.raises(ValueError, match=f"^{method} distils a teacher: give --pretrained_teacher_model"):
        run(tmp_path / "run", method)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["ct", "ict", "ect", "diffusion"])
def test_a_teacher_that_would_not_be_used_is_refused(tmp_path, method):
    with pytest.raises(ValueError, match=f"option of cd, lcm, tcd, ecd, scd, ctm; {method} ignores it"):
        run(tmp_path, method, pretrained_teacher_model=tmp_path)


@pytest.mark.parametrize("method", ["ct", "cd", "ect", "ecd"])
def test_an_unknown_distance_is_refused_with_the_known_ones(tmp_path, method):
    words = flags(tmp_path, method, distance="l3", pretrained_teacher_model=tmp_path if "d" in method else None)
    with pytest.raises(ValueError, match="--distance: invalid choice: 'l3'.*pseudo_huber.*l2"):
        parse_config(words, [method], "")


def test_a_distance_for_a_method_without_a_choice_is_refused_with_those_that_have_one(tmp_path):
    with pytest.raises(ValueError, match="'distance' is an option of ct, cd, lcm, tcd, ect, ecd, ctm; ict ignores it"):
        parse_config(flags(tmp_path, "ict", distance="lpips"), ["ict"], "")


# --- methods with tangents -----------------------------------------------------------------------------------


SAMPLER = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(class_labels=[1, 2, 3], num_inference_steps=2, generator=generator, output_type="np").images
    numpy.save(f"{folder}/images.npy", images)
assert "cm_diffusers" not in sys.modules
"""


@pytest.mark.wide
def test_other_models_load_with_nothing_but_diffusers_and_their_own_code(train, tmp_path):
    folders = [train(tmp_path / method, method) / "pipeline" for method in ("ctm", *CONTINUOUS)]
    folders.append(run(tmp_path / "flow", "diffusion", interpolant="flow") / "pipeline")
    folders.append(run(tmp_path / "trig", "diffusion", interpolant="trigflow", model_preset="jvp_tiny") / "pipeline")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "code")}
    command = [sys.executable, "-I", "-c", SAMPLER, *map(str, folders)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for folder in folders:
        assert not any("log_variance" in key for key in load_file(next(folder.glob("unet/*.safetensors"))))
        pipe = load_pipeline(str(folder))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(class_labels=[1, 2, 3], num_inference_steps=2, generator=generator, output_type="np").images
        assert images.std() > 0
        # new processes agree to the bit; in this one, earlier work can change the rounding of sums
        np.testing.assert_allclose(np.load(folder / "images.npy"), images, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def trigflow_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trigflow"
    return run(folder, "diffusion", interpolant="trigflow", model_preset="jvp_tiny", max_train_steps=4) / "pipeline"


def function_of(pipeline, x, sigma):
    with torch.no_grad():
        return denoiser_of(pipeline)(x, sigma, of_classes(torch.zeros(len(x), dtype=torch.long)))


@pytest.mark.parametrize("interpolant, time_label", [("trigflow", None), ("edm", "angle")])
def test_a_student_starts_as_its_teacher(tmp_path, interpolant, time_label):
    """TrigFlow's F is EDM's with the opposite sign. At a negligible learning rate a run exports the same function."""
    teacher = run(tmp_path / "t", "diffusion", interpolant=interpolant, time_label=time_label) / "pipeline"
    student = run(tmp_path / "s", "scd", pretrained_teacher_model=teacher, max_train_steps=1, learning_rate=1e-12)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 80.0])
    teacher, student = load_pipeline(str(teacher)), load_pipeline(str(student / "pipeline"))
    assert type(student).__name__ == "TrigFlowPipeline" and student.scheduler.config.solver == "consistency"
    torch.testing.assert_close(function_of(student, x, sigma), function_of(teacher, x, sigma), rtol=1e-4, atol=1e-4)


def test_a_time_label_that_swings_is_refused_with_what_to_do(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"250 ln\(sigma\), which varies too fast.*--interpolant trigflow"):
        run(tmp_path, "scd", pretrained_teacher_model=teacher)


def test_such_a_teacher_teaches_a_student_of_another_kind(teacher, trigflow_teacher, tmp_path):
    settings = {"pretrained_model_name_or_path": trigflow_teacher, "max_train_steps": 2}
    folder = run(tmp_path / "scd", "scd", pretrained_teacher_model=teacher, **settings)
    assert load_pipeline(str(folder / "pipeline")).unet.config["_class_name"] == "JVPUNet2DModel"


def test_a_flow_model_starts_and_teaches(tmp_path):
    teacher = run(tmp_path / "flow", "diffusion", interpolant="flow", max_train_steps=2) / "pipeline"
    kept = run(tmp_path / "a", "scd", pretrained_teacher_model=teacher, max_train_steps=1, learning_rate=1e-12)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 80.0])
    student = load_pipeline(str(kept / "pipeline"))
    teacher_function = function_of(load_pipeline(str(teacher)), x, sigma)
    torch.testing.assert_close(function_of(student, x, sigma), teacher_function, rtol=1e-4, atol=1e-4)
    run(tmp_path / "b", "scd", pretrained_teacher_model=teacher, from_scratch=True, max_train_steps=2)
    run(tmp_path / "c", "mean_flow", pretrained_model_name_or_path=teacher, max_train_steps=2)


@pytest.mark.parametrize("interpolant, student", [("edm", "cd"), ("trigflow", "scd")])
def test_cdm_tunes_a_diffusion_model_and_teaches(teacher, trigflow_teacher, tmp_path, interpolant, student):
    start = trigflow_teacher if interpolant == "trigflow" else teacher
    settings = {"pretrained_model_name_or_path": start, "interpolant": interpolant, "rollout_steps": 2}
    kept = run(tmp_path / "kept", "cdm", max_train_steps=1, learning_rate=1e-12, **settings) / "pipeline"
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 80.0])
    before, after = load_pipeline(str(start)), load_pipeline(str(kept))
    assert type(after) is type(before) and after.scheduler.config == before.scheduler.config
    torch.testing.assert_close(function_of(after, x, sigma), function_of(before, x, sigma), rtol=1e-4, atol=1e-4)
    run(tmp_path / "student", student, pretrained_teacher_model=kept, max_train_steps=1)


def test_from_scratch_needs_a_teacher(trigflow_teacher, tmp_path):
    with pytest.raises(ValueError, match="from_scratch needs --pretrained_teacher_model"):
        run(tmp_path / "a", "ect", from_scratch=True)
    settings = {"pretrained_teacher_model": trigflow_teacher, "pretrained_model_name_or_path": trigflow_teacher}
    with pytest.raises(ValueError, match="excludes --pretrained_model_name_or_path"):
        run(tmp_path / "b", "scd", from_scratch=True, **settings)


def test_a_student_of_another_scale_is_refused(trigflow_teacher, tmp_path):
    with pytest.raises(ValueError, match="sigma_data 0.4 differs from .* of the teacher"):
        run(tmp_path, "scd", pretrained_teacher_model=trigflow_teacher, sigma_data=0.4)


def test_a_time_label_of_another_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match="time_label 'log_sigma' does not fit .* predicts 'trigflow': use 'angle'"):
        run(tmp_path, "sct", time_label="log_sigma")


@pytest.mark.parametrize("preset", ["tiny", "jvp_tiny"])
def test_gradient_checkpointing_changes_nothing(tmp_path, preset):
    plain = run(tmp_path / "plain", "sct", model_preset=preset, dropout=0.2, max_train_steps=3)
    saving = run(
        tmp_path / "saving", "sct", model_preset=preset, dropout=0.2, max_train_steps=3, gradient_checkpointing=True
    )
    assert differences(saving, plain) == []


def test_networks_made_for_tangents_take_slow_times(tmp_path):
    with pytest.raises(ValueError, match="time_label 'log_sigma' is not for the presets jvp_"):
        run(tmp_path / "a", "ect", model_preset="jvp_tiny", time_label="log_sigma")
    pipe = load_pipeline(str(run(tmp_path / "b", "ect", model_preset="jvp_tiny", max_train_steps=1) / "pipeline"))
    assert pipe.scheduler.config.time_label == "angle"


def test_pictures_and_numbers_of_what_the_model_makes_of_noise(trigflow_teacher, tmp_path, capsys):
    folder = run(tmp_path, "scd", pretrained_teacher_model=trigflow_teacher, max_train_steps=2, validation_steps=2)
    picture = folder / "samples" / "step-0000002-diagnostics.png"
    assert Image.open(picture).width > 500
    assert "consistency_error" in capsys.readouterr().out
