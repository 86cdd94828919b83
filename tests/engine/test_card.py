"""Model cards: every number comes from the run, nothing identifies this machine, and the snippet is valid Python."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.engine.saved.start import load_pipeline
from cm_diffusers.engine.sharing.card import RunSummary, card_facts, hub_id, model_card
from cm_diffusers.objectives import OBJECTIVES, ModelSpec
from tests.helpers.training_runs import flags, run


DATA = DataDescription(100, 1, (8, 8), 10, {label: str(label) for label in range(10)}, "0" * 64)
AROUND = RunSummary(steps=6, images_per_step=8, processes=2, shape="1 x 8 x 8, 10 classes", data=DATA)
GRIDS = {
    "1 step": {"file": "samples/1_step.png", "sigmas": "80"},
    "2 steps": {"file": "samples/2_steps.png", "sigmas": "80, 1.36"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "ect", "ect", max_train_steps=1)


def card_of(folder, method="ect", metrics="absent.json", repo="user/digits", **settings):
    config = parse_config(flags(folder, method, **settings), [method], "")
    pipeline = load_pipeline(str(folder / "pipeline"))
    cls = OBJECTIVES[method]
    spec = ModelSpec(0.85)
    teacher = spec.denoiser(pipeline.unet) if cls.needs_teacher else None
    objective = cls(cls.adapt(pipeline.unet, spec), spec, config.options, 6, teacher=teacher)
    made = objective.pipeline(objective.network)
    return model_card(card_facts(config, objective, made, AROUND, GRIDS), repo, Path(folder) / metrics)


def code_of(card):
    return [part.split("```")[0] for part in card.text.split("```python\n")[1:]]


def test_the_front_matter_is_what_the_hub_reads(model):
    card = card_of(model)
    front = yaml.safe_load(str(card).split("---")[1])
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["cm_diffusers", "consistency-models", "ect"],
    }
    assert ModelCard(str(card)).data.to_dict() == front


def test_a_stock_model_needs_only_diffusers_and_others_say_both_ways(model):
    (snippet,) = code_of(card_of(model))
    assert "cm_diffusers" not in snippet and "trust" not in snippet
    ast.parse(snippet)
    first, second = code_of(card_of(model, "ctm"))
    assert first.startswith("import cm_diffusers") and "trust_remote_code" not in first
    assert 'custom_pipeline="pipeline", trust_remote_code=True' in second
    for snippet in (first, second):
        ast.parse(snippet)
        assert 'from_pretrained("user/digits"' in snippet


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_the_snippet_of_every_precision_makes_pictures(model, tmp_path, variant):
    folder = tmp_path / "pipeline"
    save_pipeline(DiffusionPipeline.from_pretrained(model / "pipeline"), folder, variant=variant)
    card = card_of(model, export_variant=variant, repo=str(folder))
    assert f"The repository also has the weights in {variant}" in card.text
    for code, dtype in zip(code_of(card), ("float32", {"fp16": "float16", "bf16": "bfloat16"}[variant]), strict=True):
        made = {}
        exec(code, made)
        assert len(made["images"]) == 4 and str(made["pipe"].unet.dtype) == f"torch.{dtype}"


def test_nothing_of_this_machine_is_on_it(model, tmp_path):
    card = str(card_of(model, "ctm", train_data_dir=str(tmp_path), dataset_name=None))
    assert str(tmp_path) not in card and str(model) not in card and str(Path.home()) not in card
    assert "a local dataset" in card


def test_the_data_on_the_hub_is_linked(model):
    card = card_of(model, dataset_name="ylecun/mnist")
    assert card.data.datasets == "ylecun/mnist" and "(https://huggingface.co/ylecun/mnist)" in card.text
    assert hub_id("ylecun/mnist") and not hub_id("digits") and not hub_id(str(model)) and not hub_id(None)


def test_numbers_are_those_measured(model):
    results = [
        {"name": "1 step", "num_inference_steps": 1, "sigmas": [80.0], "frechet_distance": 1.5231239},
        {"name": "2 steps", "num_inference_steps": 2, "sigmas": [80.0, 0.8], "frechet_distance": 1.326},
    ]
    report = {"dataset": "digits", "extractor": {"name": "a small classifier"}, "results": results}
    report["time"] = {"sampling": 3.1}
    (model / "metrics.json").write_text(json.dumps(report))
    card = card_of(model, metrics="metrics.json")
    assert {result.metric_type for result in card.data.eval_results} == {"frechet_distance"}
    assert {result.dataset_name for result in card.data.eval_results} == {"digits"}
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"frechet distance, 1 step": 1.5231, "frechet distance, 2 steps": 1.326}
    assert "| frechet distance, 1 step | 1.5231 |" in card.text and "3.1" not in card.text
    assert "features: a small classifier (not FID)." in card.text
    (model / "metrics.json").unlink()
    assert "## Measured" not in card_of(model).text


def test_of_a_watched_run_the_last_numbers_count(model):
    results = [{"name": "1 step", "step": step, "frechet_distance": 9.0 - step} for step in (2, 4)]
    (model / "metrics.json").write_text(json.dumps({"extractor": {"name": "inception"}, "results": results}))
    card = card_of(model, metrics="metrics.json")
    (model / "metrics.json").unlink()
    assert [result.metric_value for result in card.data.eval_results] == [5.0]
    assert "step: 4." in card.text


@pytest.mark.parametrize("licence, warns", [("cc-by-nc-sa-4.0", True), ("apache-2.0", False), (None, False)])
def test_the_teachers_licence_is_on_it(model, tmp_path, licence, warns):
    (tmp_path / "teacher").mkdir()
    if licence:
        (tmp_path / "teacher" / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Teacher\n")
    card = card_of(model, "cd", pretrained_teacher_model=tmp_path / "teacher", num_scales=12)
    assert card.data.license == licence
    assert ("does not allow commercial use" in card.text) == warns
    assert str(tmp_path) not in str(card)


def test_the_recipe_is_yaml_that_a_run_takes(model):
    recipe = yaml.safe_load(card_of(model).text.split("```yaml\n")[1].split("```")[0])
    assert recipe["method"] == "ect" and recipe["max_train_steps"] == 6 and "output_dir" not in recipe
