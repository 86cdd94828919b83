"""Diffusion training as in EDM: augmented images with labels, dropped class labels, EDM's networks."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import cm_diffusers.engine.training.step as step_module
from cm_diffusers import DenoisingPipeline
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.labelled_augmentation import augment
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.saved.start import ModelArguments, guided, load_pipeline, load_teacher
from cm_diffusers.engine.training import product
from cm_diffusers.engine.training.optimisers import LearningRate
from cm_diffusers.models import EDM_PRESETS, EDMUNet2DModel
from cm_diffusers.objectives import OBJECTIVES, Diffusion
from tests.helpers.stock_pipelines import autoencoder_kl
from tests.helpers.training_runs import differences, flags, read_log, run, tensors


RECIPES = Path(__file__).parents[2] / "training" / "configs"
EDM = {"model_preset": "ddpmpp_tiny", "augment": 0.5, "dropout": 0.3, "label_dropout": 0.4}


def train(folder, **settings):
    return run(folder, "diffusion", **{**EDM, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return train(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def batches(monkeypatch):
    """For each batch of the loop: the images and labels as read, the draws, and the resulting batch."""
    seen, read, make = [], product.as_they_are, step_module.as_trained

    def as_they_are(raw, data, device):
        seen.append((raw, None, read(raw, data, device)))
        return seen[-1][-1]

    def as_trained(batch, draws, config, objective):
        raw, _, _ = seen.pop()
        seen.append((raw, draws, make(batch, draws, config, objective)))
        return seen[-1][-1]

    for module in (step_module, product):
        monkeypatch.setattr(module, "as_they_are", as_they_are)
    monkeypatch.setattr(step_module, "as_trained", as_trained)
    return seen


def test_a_stopped_run_is_resumed_bit_for_bit(whole, tmp_path, monkeypatch):
    loss = Diffusion.loss

    def loss_with_signal(self, batch, draws):
        if draws.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(Diffusion, "loss", loss_with_signal)
        with pytest.raises(SystemExit):
            train(tmp_path)
    train(tmp_path)
    assert differences(tmp_path, whole) == [] and read_log(tmp_path) == read_log(whole)


def test_the_loop_trains_on_augmented_images_and_says_so(tmp_path, batches):
    train(tmp_path, max_train_steps=4, train_batch_size=32, validation_steps=4)
    for raw, draws, batch in batches[:-1]:
        images, labels = augment(raw["images"].float() / 127.5 - 1, draws, EDM["augment"])
        assert torch.equal(batch.samples, images) and torch.equal(batch.condition.entries["augment_labels"], labels)
        left_out = batch.condition.entries["class_labels"] != raw["condition"]["class_labels"]
        assert (batch.condition.entries["class_labels"][left_out] == 10).all() and 4 <= left_out.sum() <= 22
    raw, draws, batch = batches[-1]  # previews use unchanged images and labels
    assert draws is None and "augment_labels" not in batch.condition.entries
    assert torch.equal(batch.samples, raw["images"].float() / 127.5 - 1) and torch.equal(
        batch.condition.entries["class_labels"], raw["condition"]["class_labels"]
    )


def test_without_the_options_images_and_labels_are_left_alone(tmp_path, batches):
    train(tmp_path, augment=0, label_dropout=0, max_train_steps=2)
    for raw, _, batch in batches:
        assert "augment_labels" not in batch.condition.entries and torch.equal(
            batch.condition.entries["class_labels"], raw["condition"]["class_labels"]
        )
        assert torch.equal(batch.samples, raw["images"].float() / 127.5 - 1)
    assert load_pipeline(str(tmp_path / "pipeline")).unet.augment_embedding is None


def test_an_exported_model_samples_without_augmentation(whole, monkeypatch):
    pipe = load_pipeline(str(whole / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is DenoisingPipeline and type(pipe.unet) is EDMUNet2DModel
    calls, forward = [], EDMUNet2DModel.forward

    def watched(self, *args, **kwargs):
        calls.append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EDMUNet2DModel, "forward", watched)
    images = pipe(class_labels=[1, 2], num_inference_steps=3, output_type="np").images
    assert images.std() > 0 and len(calls) == 5
    assert all(call.keys() == {"class_labels", "return_dict"} for call in calls)
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, tensors(whole)["ema_halflife_500kimg", key])


# --- guidance


def test_a_model_that_was_trained_without_labels_can_be_guided(whole, tmp_path):
    teacher = load_teacher(str(whole / "pipeline"), ModelArguments())
    assert teacher.null_class == 10 and "10 classes and a null class" in str(teacher)
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 2.0, 30.0]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        teacher.network.class_embedding.weight.normal_()
        given, null = teacher.denoiser(x, sigma, of_classes(labels)), teacher.denoiser(x, sigma)
        result = guided(teacher, 3.0)(x, sigma, of_classes(labels))
    assert (given - null).abs().max() > 1e-3
    torch.testing.assert_close(result, null + 3 * (given - null), rtol=1e-4, atol=1e-4)
    settings = {"pretrained_teacher_model": whole / "pipeline", "max_train_steps": 2, "num_scales": 8}
    student = run(tmp_path / "student", "cd", **settings, teacher_guidance_scale=2.0) / "pipeline"
    assert json.loads((student / "unet" / "config.json").read_text())["label_dropout"] == 0
    labelled = train(tmp_path / "labelled", label_dropout=0, max_train_steps=1) / "pipeline"
    with pytest.raises(ValueError, match="trained with --label_dropout. This teacher has no null class"):
        run(tmp_path / "b", "cd", **settings | {"pretrained_teacher_model": labelled}, teacher_guidance_scale=2.0)


# --- networks


@pytest.mark.parametrize("method, time_label", [("sct", "angle"), ("mean_flow", "flow_time"), ("ect", "log_sigma")])
def test_they_are_trained_by_other_methods_and_told_the_time_as_these_have_it(method, time_label, tmp_path):
    pipe = load_pipeline(str(run(tmp_path, method, model_preset="ddpmpp_tiny", max_train_steps=2) / "pipeline"))
    config = getattr(pipe.unet, "network", pipe.unet).config
    assert config["preconditioning"] == ("edm" if time_label == "log_sigma" else "none")


def test_a_run_goes_on_from_a_model_that_takes_labels(whole, tmp_path):
    settings = {"pretrained_model_name_or_path": whole / "pipeline", "max_train_steps": 2, "model_preset": None}
    again = train(tmp_path / "again", **settings) / "pipeline"
    assert load_pipeline(str(again)).unet.config.label_dropout == EDM["label_dropout"]
    stock = run(tmp_path / "stock", "diffusion", max_train_steps=1) / "pipeline"
    settings["pretrained_model_name_or_path"] = stock
    with pytest.raises(ValueError, match="augment needs a network with augment_channels 9, .*UNet2DModel has none"):
        train(tmp_path / "a", label_dropout=0, **settings)
    with pytest.raises(ValueError, match="label_dropout needs .* this UNet2DModel has none.*ddpmpp_tiny"):
        train(tmp_path / "b", augment=0, **settings)


@pytest.mark.parametrize("preset", ["tiny", "jvp_tiny"])
def test_presets_that_take_no_labels_are_refused_with_those_that_do(preset, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"preset '{preset}' has no input for augmentation labels. Use one of {', '.join(EDM_PRESETS)}",
    ):
        train(tmp_path / "a", model_preset=preset)
    with pytest.raises(ValueError, match=f"has none. Presets with one are {', '.join(EDM_PRESETS)}"):
        train(tmp_path / "b", model_preset=preset, augment=0)


# --- settings


def test_the_warm_up_of_the_recipe_is_edms_ramp_one_step_ahead():
    """EDM's is min(images seen / 10^7, 1) of the peak, for the images seen before the step (app. F.2)."""
    config = parse_config(["--config", str(RECIPES / "cifar10_edm_cond.yaml")], ["diffusion"], "")
    rate, batch = LearningRate(config.run), 8 * config.run.train_batch_size
    for step in (0, 1, 9_000, 19_529, 19_530, 19_532, 390_624):
        assert rate(step) == pytest.approx(1e-3 * min((step + 1) * batch / 1e7, 1), rel=1e-4)


@pytest.mark.parametrize("option", ["augment", "label_dropout"])
@pytest.mark.parametrize("method", [name for name, cls in OBJECTIVES.items() if not cls.trains_teachers])
def test_methods_that_train_no_teachers_refuse_them_by_name(method, option, tmp_path):
    teacher = {"pretrained_teacher_model": "x"} if OBJECTIVES[method].needs_teacher else {}
    with pytest.raises(ValueError, match=f"^{option} is only for training teachers .diffusion.*, not for {method}"):
        parse_config(flags(tmp_path, method, **{option: 0.1}, **teacher), [method], "")


def test_label_dropout_needs_labels_and_augment_pixels(tmp_path):
    with pytest.raises(ValueError, match="label_dropout .* has no effect: labels are read only with"):
        train(tmp_path / "a", class_conditional=None)
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="augment is not for latents"):
        train(tmp_path / "b", vae_name_or_path=tmp_path / "vae")
