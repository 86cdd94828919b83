"""Flags of diffusers scripts: optimisers by class, schedules, passes, going back, variants, trackers."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data import latents
from cm_diffusers.engine.training.optimisers import (
    LearningRate,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from cm_diffusers.engine.training.run import main
from tests.helpers.breadth import narrowed
from tests.helpers.training_runs import differences, flags, run


def settings_of(folder, **settings):
    return parse_config(flags(folder, **settings), ["ect"], "").resolved()


# --- optimisers ----------------------------------------------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """An optimiser with numbers besides tensors in its state and an estimate in its group, like Prodigy."""

    def __init__(self, params, lr=1e-3, growth=1.0):
        super().__init__(params, {"lr": lr, "growth": growth, "d": 1.0, "steps": 0, "begun": False})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"], group["d"], group["begun"] = group["steps"] + 1, group["d"] * 0.9, True
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["seen"] = state.get("seen", 0) + 1
                    state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
                    p -= group["lr"] * group["d"] / state["seen"] * state["mean"]


class Keeping(Counting):
    """An optimiser with a state that checkpoints can't hold."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["note"] = "text"


OPTIMIZERS = ["torch.optim:NAdam", "torch.optim:SGD", f"{__name__}:Counting"]


@pytest.mark.parametrize("name", narrowed(OPTIMIZERS, OPTIMIZERS[-1]))
def test_a_run_with_an_optimizer_by_its_class_resumes_exactly(tmp_path, name):
    run(tmp_path / "a", optimizer=name, max_train_steps=4)
    run(tmp_path / "b", optimizer=name, max_train_steps=3)
    run(tmp_path / "b", optimizer=name, max_train_steps=4)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_numbers_of_an_optimizer_are_kept_with_their_types():
    network = torch.nn.Linear(2, 1)
    first, second = Counting(network.parameters()), Counting(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    first.step()
    load_optimizer_tensors(second, optimizer_tensors(first))
    group, state = second.param_groups[0], second.state[network.weight]
    assert (group["steps"], group["begun"], group["d"]) == (1, True, 0.9) and type(group["steps"]) is int
    assert (
        type(group["begun"]) is bool
        and state["seen"] == 1
        and state["mean"].equal(first.state[network.weight]["mean"])
    )


def test_what_checkpoints_can_not_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match="Keeping keeps 'note' as a str"):
        run(tmp_path, optimizer=f"{__name__}:Keeping", max_train_steps=1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("adamw8", "must be one of adam, adamw, radam, or module:Class"),
        ("no_such_package:Adam", "can't be imported.*pip install no_such_package"),
        ("torch.optim:NoSuch", "can't be imported"),
        ("json:JSONDecoder", "not a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_is_none_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(torch.nn.Linear(1, 1), settings_of(tmp_path, optimizer=name).run)


def test_a_setting_that_an_optimizer_does_not_take_is_refused(tmp_path):
    config = settings_of(tmp_path, optimizer="torch.optim:SGD", adam_beta2=0.99)
    with pytest.raises(ValueError, match="adam_beta2 has no effect: SGD has no argument betas"):
        build_optimizer(torch.nn.Linear(1, 1), config.run)


def test_use_8bit_adam_names_its_class_and_no_other_beside(tmp_path):
    assert settings_of(tmp_path, use_8bit_adam=True).run.optimizer == "bitsandbytes.optim:AdamW8bit"
    with pytest.raises(ValueError, match="optimizer adamw has no effect: --use_8bit_adam names another"):
        settings_of(tmp_path, use_8bit_adam=True, optimizer="adamw")


# --- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("cosine_with_restarts", {"lr_num_cycles": 3, "lr_warmup_steps": 5}, {"num_cycles": 3, "num_warmup_steps": 5}),
        ("polynomial", {"lr_power": 2.0, "lr_warmup_steps": 5}, {"power": 2.0, "num_warmup_steps": 5}),
        ("piecewise_constant", {"lr_step_rules": "1:10,0.1:20,0.01"}, {"step_rules": "1:10,0.1:20,0.01"}),
    ],
)
def test_schedules_are_those_of_diffusers_after_the_warm_up(tmp_path, name, ours, theirs):
    config = settings_of(tmp_path, lr_scheduler=name, max_train_steps=40, learning_rate=1e-3, **ours)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule, rate = get_scheduler(name, optimizer, num_training_steps=40, **theirs), LearningRate(config.run)
    for step in range(40):
        if step >= config.run.lr_warmup_steps:
            assert rate(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr_num_cycles": 2}, "lr_num_cycles 2 has no effect.*cosine_with_restarts"),
        ({"lr_power": 2.0}, "lr_power 2.0 has no effect.*polynomial"),
        ({"lr_scheduler": "piecewise_constant"}, "need each other"),
        ({"lr_step_rules": "1:10,0.1"}, "need each other"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1;10"}, "must be factors"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:3,0.1", "lr_warmup_steps": 2}, "has no warm-up"),
    ],
)
def test_settings_of_another_schedule_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, **settings)


# --- length, and going back ----------------------------------------------------------------------------------------


def test_passes_over_the_images_set_the_number_of_steps(tmp_path, capsys):
    where = run(tmp_path, num_train_epochs=2, max_train_steps=None, pretrain_steps=0.2)
    assert "Training 25 steps, for --num_train_epochs 2 of 100 images." in capsys.readouterr().out
    assert (where / "checkpoint-25").is_dir()
    run(tmp_path, num_train_epochs=2, max_train_steps=None, pretrain_steps=0.2)
    assert "This run is finished" in "".join(capsys.readouterr())
    run(tmp_path, num_train_epochs=3, max_train_steps=None, pretrain_steps=0.2)
    assert (where / "checkpoint-38").is_dir()
    main(["--config", str(where / "config.yaml")], ["ect"], "")
    assert "This run is finished" in "".join(capsys.readouterr())


def test_passes_and_steps_are_one_question_and_streams_have_no_number(tmp_path):
    with pytest.raises(ValueError, match="max_train_steps 6 has no effect: --num_train_epochs 2 sets the length"):
        settings_of(tmp_path, num_train_epochs=2)
    with pytest.raises(ValueError, match="the length of a stream is unknown"):
        settings_of(tmp_path, num_train_epochs=2, max_train_steps=None, streaming=True)


def test_dry_run_says_what_sets_the_length(tmp_path, capsys):
    main(flags(tmp_path, num_train_epochs=2, max_train_steps=None, dry_run=True), ["ect"], "")
    assert "# --num_train_epochs sets max_train_steps when the run begins." in capsys.readouterr().out


def test_a_run_goes_back_to_a_checkpoint_by_its_name_and_keeps_the_newer_ones(tmp_path):
    where = run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert differences(where, tmp_path / "b") == [] and (tmp_path / "b" / "left-checkpoint-6").is_dir()
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="'checkpoint-4' is not a checkpoint of .*checkpoint-3, checkpoint-6"):
        run(tmp_path, resume_from_checkpoint="checkpoint-4")
    with pytest.raises(ValueError, match="must be latest or the name of a checkpoint"):
        run(tmp_path, resume_from_checkpoint="newest")
    run(tmp_path, resume_from_checkpoint="latest")


# --- models and trackers -------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_weights_of_a_variant_are_read(tmp_path):
    first = run(tmp_path / "a", "diffusion", export_variant="fp16", max_train_steps=2)
    for file in (first / "pipeline" / "unet").glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    run(tmp_path / "b", pretrained_model_name_or_path=str(first / "pipeline"), variant="fp16", max_train_steps=2)
    teacher = {"pretrained_teacher_model": str(first / "pipeline"), "teacher_variant": "fp16"}
    run(tmp_path / "c", "ecd", max_train_steps=2, **teacher)
    with pytest.raises(ValueError, match="can't be loaded"):
        run(tmp_path / "d", pretrained_model_name_or_path=str(first / "pipeline"), max_train_steps=2)


@pytest.mark.parametrize("name", ["variant", "teacher_variant"])
def test_a_variant_is_that_of_a_model(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} needs --pretrained"):
        settings_of(tmp_path, **{name: "fp16"})


def test_report_to_takes_none_or_several(tmp_path):
    assert settings_of(tmp_path, report_to="none").run.trackers == []
    assert settings_of(tmp_path, report_to=["tensorboard", "wandb"]).run.trackers == ["tensorboard", "wandb"]
    with pytest.raises(ValueError, match="report_to none can't be combined"):
        settings_of(tmp_path, report_to=["none", "wandb"])
    with pytest.raises(ValueError, match="logging_dir logs has no effect"):
        settings_of(tmp_path, report_to="none", logging_dir="logs")


def test_latents_are_encoded_by_so_many_images_at_once(tmp_path, monkeypatch):
    sizes, encode = [], latents.encode
    monkeypatch.setattr(latents, "encode", lambda vae, images: sizes.append(len(images)) or encode(vae, images))
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (4, 8)
    AutoencoderKL(1, 1, *blocks, latent_channels=2, norm_num_groups=2).save_pretrained(tmp_path / "vae")
    run(tmp_path / "r", vae_name_or_path=str(tmp_path / "vae"), vae_encode_batch_size=30, max_train_steps=1)
    assert sizes == [30, 30, 30, 10]
