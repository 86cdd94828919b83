"""Runs that distil text-to-image models: data, exact resume, processes, memory, results, and what is refused."""

import gc
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.processes import start_accelerator
from cm_diffusers.engine.saved.lora import add_lora, save_lora, trained_weights
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.build import build_trainer
from cm_diffusers.engine.training.run import main
from cm_diffusers.engine.training.text import METHODS
from tests.helpers.scripts import load_script
from tests.helpers.tiny_text import PIPELINES
from tests.helpers.training_runs import differences, read_log, tensors


PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a yellow circle", "two red squares"]
SETTINGS = {
    "lora_rank": 2, "lora_target_modules": ["to_q", "to_v"], "teacher_guidance_scale": 3.0, "train_batch_size": 4,
    "learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 0, "logging_steps": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of tiny pipelines, by kind."""
    folder = tmp_path_factory.mktemp("teachers")
    for kind, make in PIPELINES.items():
        make().save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of 8 x 8 with captions in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i, prompt in enumerate(PROMPTS):
        colour = tuple(60 * ((i + j) % 5) for j in range(3))
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": prompt})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def words(folder, teacher, method="lcm", **settings):
    values = {**SETTINGS, **settings, "pretrained_teacher_model": teacher, "output_dir": folder, "method": method}
    flags = []
    for key, value in values.items():
        if value is not None:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def train(folder, teacher, method="lcm", verify=False, **settings):
    """Train in this process, without verifying or drawing the result unless `verify`, to save seconds."""
    with ExitStack() as patches:
        if not verify:
            patches.enter_context(mock.patch("cm_diffusers.engine.text.export._verify"))
            draw = "cm_diffusers.engine.training.text.TextProduct.draw"
            patches.enter_context(mock.patch(draw, return_value=({}, {})))
        main(words(folder, teacher, method, **settings), list(METHODS), "")
    return folder


def trainer_of(folder, teacher, method="lcm", **settings):
    config = parse_config(words(folder, teacher, method, **settings), list(METHODS), "")
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_trainer(config, start_accelerator(mixed_precision=config.run.mixed_precision or "no"))


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_lora_is_distilled_from_prompts_alone_and_resumes_bit_for_bit(tmp_path, teachers, prompts, kind, capsys):
    whole = train(tmp_path / "whole", teachers / kind, prompts=prompts)
    said = capsys.readouterr().out
    assert "Teacher: StableDiffusion" in said and "Memory: teacher and student share one set" in said
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "log.jsonl", resumed)
    train(resumed, teachers / kind, prompts=prompts)
    assert "Resumed from step 2 of 4" in capsys.readouterr().out
    assert differences(resumed, whole) == [] and read_log(resumed) == read_log(whole)
    groups = {group for group, _ in tensors(whole)}
    assert {"model", "auxiliary.target", "optimizer"} < groups
    assert all("lora" in name for group, name in tensors(whole) if group != "optimizer")  # no base weights
    saved = {path.relative_to(whole / "pipeline").as_posix() for path in (whole / "pipeline").rglob("*")}
    assert {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md"} <= saved
    with safe_open(whole / "pipeline" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118


def test_a_run_draws_its_prompts_verifies_its_lora_and_exports_again_as_a_whole_pipeline(
    tmp_path, teachers, prompts, capsys
):
    style = tmp_path / "style"
    teacher = PIPELINES["sd"]()
    add_lora(teacher.unet, rank=2)
    for weight in trained_weights(teacher.unet).values():
        torch.nn.init.normal_(weight, std=0.3)
    save_lora(teacher, style)
    settings = {"prompts": prompts, "teacher_lora": [style], "validation_prompts": ["a red square", "two circles"]}
    folder = train(tmp_path / "run", teachers / "sd", verify=True, validation_steps=4, **settings)
    assert (folder / "samples" / "step-0000004.png").is_file() and (folder / "pipeline/samples/prompts.png").is_file()
    train(folder, teachers / "sd", verify=True, validation_steps=4, **settings)
    assert "This run is finished." in capsys.readouterr().out
    lora = StableDiffusionPipeline.from_pretrained(teachers / "sd", safety_checker=None)
    lora.load_lora_weights(style)
    lora.fuse_lora()
    lora.unload_lora_weights()
    lora.load_lora_weights(folder / "pipeline")
    lora.scheduler = LCMScheduler.from_pretrained(folder / "pipeline", subfolder="scheduler")
    train(folder, teachers / "sd", verify=True, validation_steps=4, fuse=True, **settings)
    whole = DiffusionPipeline.from_pretrained(folder / "pipeline")
    images = []
    for pipe in (lora, whole):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            pipe("a red circle", num_inference_steps=2, guidance_scale=1, generator=generator, output_type="np")
        )
    assert abs(images[0].images - images[1].images).max() < 1e-4


@pytest.mark.parametrize("kind", PIPELINES)
def test_pictures_have_the_size_of_the_training_and_long_prompts_are_said_once(
    tmp_path, teachers, prompts, kind, capfd
):
    long = " ".join(["a red circle"] * 6)
    settings = {"resolution": [8, 16], "validation_prompts": [long, "a red square"], "max_train_steps": 1}
    (tmp_path / "prompts.txt").write_text(f"{prompts.read_text()}\n{long}")
    trainer = trainer_of(tmp_path, teachers / kind, prompts=tmp_path / "prompts.txt", **settings)
    assert trainer.product._images(trainer.exported(), 1, 1.0).shape == (2, 8, 16, 3)
    captured = capfd.readouterr()
    said = captured.out + captured.err
    assert said.count("more than 12 tokens") == 1 and "truncated" not in said and "Token indices" not in said


@pytest.mark.parametrize("method", ["tcd", "cd", "ecd", "scd"])
def test_the_other_methods_distil_a_lora_from_captioned_images(tmp_path, teachers, pictures, method, capsys):
    settings = {"train_data_dir": pictures, "resolution": 8, "proportion_empty_prompts": 0.2}
    folder = train(tmp_path / "run", teachers / "sd", method, **settings)
    out = capsys.readouterr().out
    assert f"Saved {folder / 'pipeline'}.\n" in out  # no pictures and no curves were drawn
    first, *_, last = read_log(folder)
    assert last["step"] == 4 and all(torch.isfinite(torch.tensor(row["loss"])) for row in (first, last))


def test_all_weights_are_trained_without_a_rank_and_can_receive_the_guidance(tmp_path, teachers, prompts):
    settings = {"lora_rank": None, "lora_target_modules": None, "teacher_guidance_scale": None}
    settings |= {"w_min": 2.0, "w_max": 4.0, "unet_time_cond_proj_dim": 8}
    folder = train(tmp_path / "run", teachers / "sd", prompts=prompts, **settings)
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert ("model", "time_embedding.cond_proj.weight") in tensors(folder)


@pytest.mark.parametrize("precision", [{"base_precision": "int8"}, {"mixed_precision": "bf16"}])
def test_the_base_of_a_lora_is_stored_in_fewer_bits(tmp_path, teachers, prompts, precision):
    trainer = trainer_of(tmp_path, teachers / "sdxl", prompts=prompts, **precision)
    trainer.run = replace(trainer.run, max_train_steps=2)
    with Stopping() as stopping:
        trainer.fit(stopping)
    stored = {weight.dtype for weight in trainer.objective.teacher.network.parameters()}
    assert (torch.int8 if "base_precision" in precision else torch.bfloat16) in stored
    assert all(weight.dtype == torch.float32 for weight in trained_weights(trainer.objective.network).values())
    images = trainer.product.draw(trainer.exported(), tmp_path / "picture.png")[0]
    assert images["samples"].is_file()


def test_after_caching_no_encoder_is_alive(tmp_path, teachers, prompts):
    gc.collect()
    before = sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects())
    trainer = trainer_of(tmp_path, teachers / "sd", prompts=prompts)
    gc.collect()
    assert sum(isinstance(thing, CLIPTextModel) for thing in gc.get_objects()) == before
    weights = [*trainer.objective.network.parameters(), *trainer.objective.teacher.network.parameters()]
    base = sum(1 for _ in trainer.objective.teacher.network.parameters())
    own = sum(weight.requires_grad for weight in trainer.objective.network.parameters())
    assert len({weight.data_ptr() for weight in weights}) == base + own


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"caption_column": "words"}, "words"),
        ({"class_conditional": True}, "class_conditional is not for text-to-image models"),
        ({"random_flip": True}, "random_flip is not for latents"),
        ({"cache_latents": True}, "cache_latents is not for text-to-image models"),
        ({"train_data_dir": None, "prompts": "p.txt", "vae_encode_batch_size": 4}, "vae_encode_batch_size needs im"),
        ({"resolution": 12}, "resolution must be multiples of 8, .* got 12 x 12"),
        ({"streaming": True}, "streaming is not for text-to-image models"),
        ({"lora_target_modules": ["to_x"]}, "lora_target_modules to_x: no layer has such a name"),
        ({"lora_rank": None, "lora_target_modules": None, "lora_alpha": 2.0}, "lora_alpha is for a LoRA"),
        ({"lora_rank": None, "lora_target_modules": None, "fuse": True}, "fuse is for a LoRA"),
    ],
)
def test_settings_that_can_t_be_followed_are_refused(tmp_path, teachers, pictures, settings, message):
    settings = {"train_data_dir": pictures, "resolution": 8, **settings}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, teachers / "sd", **settings)


def test_methods_that_do_not_distil_text_to_image_models_are_refused(tmp_path, teachers, prompts):
    script = load_script("train_text_to_image")
    assert tuple(script.METHODS) == METHODS
    flags = words(tmp_path, teachers / "sd", "ctm", prompts=prompts, lora_rank=None, lora_target_modules=None)
    with pytest.raises(ValueError, match="method ctm is not for .* second time .* Choose lcm, tcd, cd, ecd or scd"):
        build_trainer(parse_config(flags, ["ctm"], ""), start_accelerator())
