"""A run that is stopped and resumed equals one that was not, whatever it started from: all methods, bit for bit."""

import shutil

import pytest
from training_runs import differences, read_log, run

from cm_diffusers.engine.loop import Trainer
from cm_diffusers.objectives import OBJECTIVES


SETTINGS = {
    "ect": {"pretrain_steps": 1, "stage_steps": 1},
    "ct": {"s1": 12},
    "ict": {"s0": 4, "s1": 16},
    "cd": {"num_scales": 12},
    "ecd": {"stage_steps": 1},
    "sct": {"tangent_warmup_steps": 3},
    "scd": {"tangent_warmup_steps": 3},
    "cdm": {"rollout_steps": 2},
    "ctm": {"solver_steps": 2},
}
TAUGHT = ("cd", "ecd", "scd")  # which always have a teacher
# the diffusion model that a method can start from
MODELS = {"sct": "trigflow", "scd": "trigflow", "mean_flow": "flow"}
STARTS = [
    (method, start)
    for method in OBJECTIVES
    for start in ("scratch", "saved", "teacher")
    if start != "teacher" or method in (*TAUGHT, "ctm")
]
ADVERSARY = {"gan_weight": 0.5, "discriminator_start_step": 1}
FULL = [
    (method, start, dropout, accumulation, adversary)
    for method, start in STARTS
    for dropout in (0.0, 0.1)
    for accumulation in (1, 2)
    for adversary in ((False, True) if method == "ctm" else (False,))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Diffusion models by their process, trained a little."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(process):
        if process not in made:
            own = {"edm": {}}.get(process, {"interpolant": process})
            preset = "tiny" if process == "edm" else "jvp_tiny"
            settings = {"max_train_steps": 2, "model_preset": preset, **own}
            made[process] = run(folder / process, "diffusion", **settings) / "pipeline"
        return made[process]

    return model


def settings_of(models, method, start, dropout=0.1, accumulation=2, adversary=False):
    model, settings = models(MODELS.get(method, "edm")), {**SETTINGS.get(method, {})}
    if method in TAUGHT or start == "teacher":
        settings["pretrained_teacher_model"] = model
    if start == "scratch":
        settings |= {"from_scratch": True} if method in TAUGHT else {}
        settings["model_preset"] = "jvp_tiny" if method in MODELS else "tiny"
    elif start == "saved":
        settings["pretrained_model_name_or_path"] = model
    if adversary:
        settings |= ADVERSARY
    return {
        **settings,
        "dropout": dropout,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": 8 // accumulation,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "max_train_samples": 50,
    }


def assert_resumes_exactly(folder, method, settings):
    whole, resumed = folder / "whole", folder / "resumed"
    run(whole, method, **settings)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "log.jsonl", resumed)
    run(resumed, method, **settings)
    assert differences(resumed, whole) == []
    assert read_log(resumed) == read_log(whole)


@pytest.mark.parametrize("method, start", STARTS)
def test_every_start_of_every_method_is_resumed_bit_for_bit(models, tmp_path, method, start):
    assert_resumes_exactly(tmp_path, method, settings_of(models, method, start, adversary=method == "ctm"))


@pytest.mark.slow
@pytest.mark.parametrize("method, start, dropout, accumulation, adversary", FULL)
def test_every_combination_is_resumed_bit_for_bit(models, tmp_path, method, start, dropout, accumulation, adversary):
    assert_resumes_exactly(tmp_path, method, settings_of(models, method, start, dropout, accumulation, adversary))


@pytest.mark.parametrize("start", ["scratch", "saved"])
@pytest.mark.parametrize("method", ["ct", "cd", "ctm"])
def test_a_moving_target_drops_as_the_student_does(models, tmp_path, monkeypatch, method, start):
    """A saved model is loaded in evaluation mode; a target that stayed in it would not share the student's masks."""
    seen, fit = [], Trainer.fit

    def watched(self, stopping):
        seen.append(self.objective)
        fit(self, stopping)

    monkeypatch.setattr(Trainer, "fit", watched)
    run(tmp_path, method, **{**settings_of(models, method, start), "max_train_steps": 1})
    for network in (seen[0].network, seen[0].target):
        assert all(module.training for module in network.modules())
    if seen[0].teacher is not None:
        assert not any(module.training for module in seen[0].teacher.network.modules())
