"""Cards of few-step text-to-image models: the code makes an image, and every fact comes from the run."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from cm_diffusers.core.frozen import copied
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.pictures.prompts import save_prompt_grid
from cm_diffusers.engine.saved.lora import add_lora, save_lora
from cm_diffusers.engine.saved.start import guided
from cm_diffusers.engine.saved.text import encode_prompts, read_text_to_image
from cm_diffusers.engine.sharing.card import RunSummary
from cm_diffusers.engine.text.card import text_card, text_card_facts, usage
from cm_diffusers.engine.text.export import (
    few_step_scheduler,
    save_fused_model,
    save_lora_model,
    student_pipeline,
)
from cm_diffusers.models.text_unet import with_guidance_input
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.tiny_text import PIPELINES


AROUND = RunSummary(10, 4, 2, "3 x 8 x 8", DataDescription(123, 4, (4, 4)))
GRIDS = {"prompts": {"file": "samples/prompts.png", "prompts": ["two red circles", "a green | triangle"]}}


@pytest.fixture
def base(tmp_path):
    PIPELINES["sd"]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def finished(base, method="lcm", rank=4, **settings):
    """The settings, the pipeline and the facts of a run that has distilled `base`."""
    words = {"pretrained_teacher_model": base, "prompts": base / "prompts.txt", "output_dir": base.parent / "run"}
    words |= {"max_train_steps": 10, "teacher_guidance_scale": 3, **settings}
    if rank:
        words["lora_rank"] = rank
    flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in words.items() if value]
    config = parse_config([f"--method={method}", *sum(flags, [])], [method], "")
    model = read_text_to_image(DiffusionPipeline.from_pretrained(base))
    pipe, nulls = model.pipeline, encode_prompts(model.pipeline, ["a"]).nulls
    network = copied(model.network.requires_grad_(False))
    if rank:
        network = add_lora(network, rank)
    elif "unet_time_cond_proj_dim" in words:
        network = with_guidance_input(network, words["unet_time_cond_proj_dim"])
    teacher = guided(model, config.model.teacher_guidance_scale, config.options.draws_guidance, nulls)
    spec = replace(model.spec, sigma_data=0.5)
    objective = OBJECTIVES[method](network, spec, config.options, 10, teacher=teacher, pretrained=True)
    student = student_pipeline(pipe, network, few_step_scheduler(method, pipe.scheduler, objective))
    return config, student, text_card_facts(config, objective, student, AROUND, GRIDS)


def code_of(card):
    (snippet,) = [part.split("```")[0] for part in str(card).split("```python\n")[1:]]
    ast.parse(snippet)
    return snippet


def image_of(snippet):
    done = {}
    exec(snippet, done)
    return done["image"]


def test_the_front_matter_is_what_the_hub_reads(base):
    _, _, facts = finished(base)
    card = text_card(json.loads(json.dumps(facts)) | {"base_model": "user/base", "licence": "mit"}, "user/few")
    front = yaml.safe_load(str(card).split("---")[1])
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["cm_diffusers", "text-to-image", "lora", "lcm"],
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "license": "mit",
    }
    assert ModelCard(str(card)).data.to_dict() == front
    _, _, facts = finished(base, "tcd", fuse=True)
    front = text_card(facts | {"base_model": "user/base"}, "user/few").data.to_dict()
    assert front["base_model_relation"] == "finetune"
    assert front["tags"] == ["cm_diffusers", "text-to-image", "tcd"]


@pytest.mark.parametrize(
    "method, scheduler", [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler"), ("ecd", "LCMScheduler")]
)
def test_a_lora_needs_its_base_and_its_scheduler(base, method, scheduler):
    _, _, facts = finished(base, method)
    found = code_of(text_card(facts | {"base": "user/base", "base_variant": "fp16"}, "user/few"))
    assert found.splitlines() == [
        f"from diffusers import DiffusionPipeline, {scheduler}",
        "",
        'pipe = DiffusionPipeline.from_pretrained("user/base", variant="fp16")',
        'pipe.load_lora_weights("user/few")',
        f'pipe.scheduler = {scheduler}.from_pretrained("user/few", subfolder="scheduler")',
        'image = pipe("two red circles", num_inference_steps=4, guidance_scale=1).images[0]',
    ]
    assert ("`eta=g`" in str(text_card(facts, "user/few"))) == (method == "tcd")


@pytest.mark.parametrize("resolution, words", [(8, ""), (16, ", height=16, width=16")])
def test_the_code_makes_an_image_of_the_size_of_the_training(base, tmp_path, resolution, words):
    _, student, facts = finished(base, fuse=True, resolution=resolution)
    save_fused_model(student, tmp_path / "whole", str(base), verify=False)
    found = code_of(text_card(facts, str(tmp_path / "whole")))
    assert f'pipe("two red circles"{words}, num_inference_steps' in found
    assert image_of(found).size == (resolution, resolution)


def test_the_code_of_a_whole_pipeline_is_two_lines_and_makes_an_image(base, tmp_path):
    _, student, facts = finished(base, fuse=True)
    save_fused_model(student, tmp_path / "whole", str(base), verify=False)
    found = code_of(text_card(facts, str(tmp_path / "whole")))
    assert len(found.splitlines()) == 4 and "lora" not in found and "Scheduler" not in found
    assert image_of(found).size == (8, 8)


def test_an_input_for_the_guidance_gets_the_middle_of_its_range(base, tmp_path):
    settings = {"unet_time_cond_proj_dim": 8, "w_min": 2, "w_max": 5, "teacher_guidance_scale": None}
    _, student, facts = finished(base, rank=None, **settings)
    save_fused_model(student, tmp_path / "whole", str(base), verify=False)
    card = text_card(facts, str(tmp_path / "whole"))
    assert "guidance_scale=3.5)" in code_of(card) and "trained from scales 2 to 5" in str(card)
    assert image_of(code_of(card)).size == (8, 8)


def test_the_lines_at_the_end_of_a_run_make_an_image(base, tmp_path):
    style = tmp_path / "style"
    save_lora(finished(base, rank=2)[1], style)
    config, student, facts = finished(base, teacher_lora=style)
    folder = tmp_path / "run" / RunFiles.MODEL
    save_lora_model(student, folder, str(base), verify=False, loras=[str(style)])
    (tmp_path / "run" / RunFiles.FACTS).write_text(json.dumps(facts))
    lines = usage(folder, config)
    assert lines.count("pipe.load_lora_weights") == 2 and f'load_lora_weights("{style}")' in lines
    assert image_of(lines).size == (8, 8)


def test_nothing_of_this_machine_is_on_it(base, tmp_path):
    _, _, facts = finished(base, teacher_lora=tmp_path / "style")
    card = str(text_card(facts, "user/few"))
    assert str(tmp_path) not in card and str(Path.home()) not in card
    assert "from a local model" in card and "a local LoRA" in card and "prompts alone, without images" in card


def test_every_number_comes_from_the_run(base):
    _, student, facts = finished(base)
    card = str(text_card(facts, "user/few"))
    said = re.sub(r"(?s)```.*?```|Seeds 0, 1, 2|\[0, 1\]|guidance_scale=1", "", card.split("---\n", 2)[2])
    numbers = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", said))
    assert len(numbers) > 5 and numbers <= set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", json.dumps(facts)))
    assert "| prompts | 123 |" in card and "scale 3, is a part of the model" in card
    trained = sum(weight.numel() for name, weight in student.unet.named_parameters() if "lora_" in name)
    assert f"| trained weights | {trained} of a LoRA of rank 4, EMA weights |" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["method"] == "lcm" and recipe["lora_rank"] == 4 and "output_dir" not in recipe


@pytest.mark.parametrize("licence, warns", [("cc-by-nc-sa-4.0", True), ("apache-2.0", False)])
def test_the_teachers_licence_is_on_it(base, licence, warns):
    (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Teacher\n")
    card = text_card(finished(base)[2], "user/few")
    assert card.data.license == licence and ("does not allow commercial use" in str(card)) == warns


def test_a_picture_of_prompts_has_a_row_for_each(tmp_path):
    prompts = ["a red circle", "größer als ein Bild, und 長い " * 40]
    first, second = (np.full((2, 4, 6, 3), value) for value in (0.0, 1.0))
    second[1] = [1, 0, 0]
    save_prompt_grid(tmp_path / "new" / "grid.png", prompts, [("1 step", first), ("2 steps", second)])
    picture = np.array(Image.open(tmp_path / "new" / "grid.png")).astype(int)
    red = (picture == [255, 0, 0]).all(-1)  # the second row of the second column, enlarged to at least 96 pixels
    assert red.sum() == 96 * 144 and red[18 + 98 : 18 + 98 + 96, -14 - 144 : -14].all()
    assert (picture[18 : 18 + 96, -14 - 144 - 12 - 146 : -14 - 144 - 12 - 2] == 0).all()
    text = picture[:, :192].min(-1) < 128
    assert text[18 : 18 + 98].any() and text[18 + 98 : 18 + 2 * 98].any() and not text[18 + 2 * 98 :].any()
    wide = np.random.default_rng(0).random((1, 700, 700, 3))
    save_prompt_grid(tmp_path / "wide.png", ["a"], [("1 step", wide)])
    assert Image.open(tmp_path / "wide.png").width < 600
