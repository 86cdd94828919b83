"""A run publishes no name of a local folder, whichever flag names the folder."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments
from cm_diffusers.engine.saved.lora import add_lora, save_lora
from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.options import flags_of
from tests.helpers import stock_pipelines as stock
from tests.helpers.breadth import narrowed
from tests.helpers.tiny_text import PIPELINES
from tests.helpers.training_runs import run


NAME = "canary-in-a-coal-mine"


def flags_that_name_folders():
    groups = [DataArguments, ModelArguments, RunArguments, *(cls.Options for cls in OBJECTIVES.values())]
    return {name for name, flag in flags_of(*groups).items() if flag.place in ("path", "path or Hub id")}


def model(folder):
    stock.save("flow", folder)
    return {}


def config(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(stock.unet().config)))
    return {"class_conditional": None}


def autoencoder(folder):
    stock.autoencoder_kl().save_pretrained(folder)
    return {}


def backbone(folder):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return {"gan_weight": 1.0, "solver_steps": 1}


def images(folder):
    for i in range(16):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    return {"dataset_name": None, "max_train_samples": None}


def more_images(folder):
    images(folder)
    return {}


def of_text(folder):
    """Settings of a run that distils a text-to-image model."""
    teacher = PIPELINES["sd"]()
    teacher.save_pretrained(folder.with_name(f"{NAME}-teacher"))
    none = dict.fromkeys(("dataset_name", "class_conditional", "max_train_samples", "model_preset"))
    file = folder.with_name(f"{NAME}.txt")
    file.write_text("a red circle\ntwo blue squares")
    return none | {"pretrained_teacher_model": folder.with_name(f"{NAME}-teacher"), "prompts": file}


def prompts(folder):
    folder.write_text("a red circle\ntwo blue squares")
    return {name: value for name, value in of_text(folder).items() if name != "prompts"}


def lora(folder):
    pipeline = PIPELINES["sd"]()
    add_lora(pipeline.unet, rank=2)
    save_lora(pipeline, folder)
    return of_text(folder) | {"lora_rank": 2, "fuse": True}


# flag: (function that fills the folder and returns further settings, methods to train with the flag)
CASES = {
    "dataset_name": (images, ["ect"]),
    "train_data_dir": (images, ["ect"]),
    "extra_datasets": (more_images, ["ect"]),
    "logging_dir": (lambda folder: {"report_to": "tensorboard"}, ["ect"]),
    "output_dir": (lambda folder: {}, ["ect"]),
    "pretrained_model_name_or_path": (model, ["ect", "ctm"]),
    "model_config_name_or_path": (config, ["ect"]),
    "vae_name_or_path": (autoencoder, ["ect", "ctm"]),
    "pretrained_teacher_model": (model, ["cd", "lcm", "tcd", "ecd", "scd", "ctm"]),
    "discriminator_backbone": (backbone, ["ctm"]),
    "prompts": (prompts, ["lcm"]),
    "teacher_lora": (lora, ["lcm"]),
}
RUNS = [(name, method) for name, (_, methods) in CASES.items() for method in methods]


def test_every_flag_that_can_name_a_folder_is_here_with_every_method_that_has_it():
    assert flags_that_name_folders() == CASES.keys()
    for method, cls in OBJECTIVES.items():
        own = flags_of(cls.Options).keys() & CASES.keys()
        assert all(method in CASES[name][1] for name in own)


@pytest.mark.parametrize("name, method", narrowed(RUNS, *RUNS[::4]))
def test_the_name_of_a_folder_is_in_no_byte_that_is_pushed(hub, api, monkeypatch, tmp_path, name, method):
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)
    make, _ = CASES[name]
    settings = make(tmp_path / NAME) | ({} if name == "output_dir" else {name: tmp_path / NAME})
    settings |= {"hub_model_id": "tester/model", "push_to_hub": True, "hub_strategy": "every_save"}
    folder = run(
        tmp_path / NAME / "run" if name == "output_dir" else tmp_path / "run",
        method,
        max_train_steps=2,
        checkpointing_steps=1,
        **settings,
    )
    assert NAME in (folder / "config.yaml").read_text()  # present locally, so that the same command resumes the run
    assert {"main", "checkpoint"} <= hub.repository("tester/model").branches.keys()
    pushed = {f"{commit.branch}/{path}": content for commit in hub.repository("tester/model").commits
              for path, content in commit.files.items()}  # fmt: skip
    assert {"main/README.md", "main/unet/config.json", "checkpoint/state.json"} <= pushed.keys()
    pushed |= {request.line: request.body for request in hub.log}
    pushed |= {f"query of {request.line}": repr(request.query).encode() for request in hub.log}
    assert not [where for where, content in pushed.items() if NAME.encode() in content or NAME in where]
