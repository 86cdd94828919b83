"""Invariants: losses of every method, samples of saved folders, and runs that an earlier version began.

`tests/invariance/` holds the recorded values. To renew them after an intended change of numbers:

    OMP_NUM_THREADS=1 python -m tests.test_invariance --renew

On a machine like the recording one, numbers are equal to rounding: processors of one name can differ in the last bit.
On others they are close. Version 0.1.0 (commit bb2b019) wrote the archives of folders and runs, which are never
renewed.
"""

import json
import os
import platform
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from safetensors.torch import load_file, save_file

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.processes import start_accelerator
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.build import build_trainer
from cm_diffusers.models import build_unet
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.pipelines import DenoisingPipeline
from tests.helpers.breadth import narrowed


RECORDED = Path(__file__).parent / "invariance"
LOSSES, IMAGES = RECORDED / "losses.json", RECORDED / "images.safetensors"
SAVED, BEGUN_RUNS = RECORDED / "saved_by_0.1.0.zip", RECORDED / "runs_of_0.1.0.zip"
COMMON = {
    "dataset_name": "digits", "class_conditional": True, "max_train_samples": 60, "dropout": 0.1,
    "train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_train_steps": 20,
    "checkpointing_steps": 10, "validation_steps": 0, "logging_steps": 1, "output_dir": "run",
}  # fmt: skip
TAUGHT = {"pretrained_teacher_model": "teacher"}
GUIDED = {**TAUGHT, "pretrained_teacher_model": "guided", "teacher_guidance_scale": 2.0}
TANGENTS = {"model_preset": "jvp_tiny"}
RUNS = {  # method, settings
    "diffusion": ("diffusion", {"model_preset": "tiny"}),
    "diffusion flow": ("diffusion", {**TANGENTS, "interpolant": "flow"}),
    "diffusion trigflow": ("diffusion", {**TANGENTS, "interpolant": "trigflow"}),
    "diffusion labelled": ("diffusion", {"model_preset": "ddpmpp_tiny", "augment": 0.5, "label_dropout": 0.3}),
    "cdm": ("cdm", {"model_preset": "tiny", "rollout_steps": 2}),
    "ct": ("ct", {"model_preset": "tiny", "s1": 12}),
    "ict": ("ict", {"model_preset": "tiny", "s0": 4, "s1": 16}),
    "cd": ("cd", {**TAUGHT, "num_scales": 12}),
    "cd guided": ("cd", {**GUIDED, "num_scales": 12}),
    "ect": ("ect", {"model_preset": "tiny", "pretrain_steps": 6, "stage_steps": 4}),
    "ecd": ("ecd", {**TAUGHT, "stage_steps": 4}),
    "sct": ("sct", {**TANGENTS, "tangent_warmup_steps": 10}),
    "scd": ("scd", {**TAUGHT, **TANGENTS, "from_scratch": True, "tangent_warmup_steps": 10}),
    "mean_flow": ("mean_flow", TANGENTS),
    "ctm": ("ctm", {"model_preset": "tiny", "solver_steps": 2, "gan_weight": 0.5, "discriminator_start_step": 5}),
    "ctm taught": ("ctm", {**TAUGHT, "solver_steps": 2}),
}
NETWORK = {"model_config_name_or_path": "network.json"}
BEGUN = {
    "ect": ("ect", NETWORK),
    "ctm": ("ctm", {**NETWORK, "solver_steps": 2, "huber_c": 0.1}),
    "ict": ("ict", NETWORK),
}


def machine():
    """The properties of this machine on which the rounding of kernels depends."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    parts = [names[0] if names else platform.processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__]
    return " / ".join(parts)


def teachers():
    """Diffusion models with fixed random weights: one with a stock network, and one with a null class."""
    for name, preset in (("teacher", "tiny"), ("guided", "ddpmpp_tiny")):
        torch.manual_seed(7)
        network = build_unet(preset, (8, 8), 1, 10)
        if name == "guided":
            network.register_to_config(label_dropout=0.1)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        DenoisingPipeline(network, EDMEulerScheduler(sigma_data=0.5)).save_pretrained(name)


def config_of(method, settings):
    flags = [f"--{key}={value}" for key, value in {**COMMON, **settings}.items()]
    return parse_config(flags, [method], "")


def fit(method, settings):
    """Train in the current folder to the end, resuming if possible; returns losses and gradient norms."""
    accelerator = start_accelerator(mixed_precision="no")
    trainer = build_trainer(config_of(method, settings), accelerator)
    trainer.resume()
    with Stopping() as stopping:
        trainer.fit(stopping)
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if row[key] is not None] for key in ("loss", "grad_norm")}


def sample(folder):
    """Images (2, C, H, W) in [0, 1] from a saved pipeline, with its usual arguments."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    steps = 2 if "diffusion" not in Path(folder).name else 4
    output = pipe(
        batch_size=2,
        class_labels=[1, 3],
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        num_inference_steps=steps,
        output_type="pt" if type(pipe).__name__ != "ConsistencyModelPipeline" else "np",
    )
    images = torch.as_tensor(output.images)
    return (images if images.shape[-1] != 1 else images.permute(0, 3, 1, 2)).contiguous()


def assert_same(found, recorded, recorded_on):
    """Assert equality to rounding on a machine like the recording one, and closeness on others."""
    found, recorded = (torch.as_tensor(values, dtype=torch.float64) for values in (found, recorded))
    rounding = {"rtol": 2e-5, "atol": 2e-6} if recorded_on == machine() else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found, recorded, **rounding)


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread, so that sums round as in the recording."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workplace(one_thread, tmp_path_factory):
    """A folder with the teachers of `teachers`."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("teachers")
    os.chdir(folder)
    teachers()
    os.chdir(before)
    return folder


@pytest.mark.parametrize("name", narrowed(RUNS, "diffusion", "cd", "ect", "sct", "ctm"))
def test_the_losses_of_every_method_are_those_recorded(workplace, tmp_path, monkeypatch, name):
    recorded, (method, settings) = json.loads(LOSSES.read_text()), RUNS[name]
    for teacher in ("teacher", "guided"):
        shutil.copytree(workplace / teacher, tmp_path / teacher)
    monkeypatch.chdir(tmp_path)
    for key, values in fit(method, settings).items():
        assert_same(values, recorded["runs"][name][key], recorded["machine"])


def test_every_method_is_recorded():
    newer = {"lcm", "tcd"}  # than the recorded version
    assert {method for method, _ in RUNS.values()} == set(OBJECTIVES) - newer


def unpack(archive, name, folder):
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder, [member for member in file.namelist() if member.startswith(f"{name}/")])
    return folder / name


@pytest.mark.parametrize("name", load_file(IMAGES))
def test_a_folder_that_was_saved_before_gives_the_same_images(one_thread, tmp_path, name):
    images = sample(unpack(SAVED, name, tmp_path))
    assert_same(images, load_file(IMAGES)[name], json.loads(LOSSES.read_text())["machine"])


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_that_was_begun_before_goes_on(one_thread, tmp_path, monkeypatch, name):
    monkeypatch.chdir(unpack(BEGUN_RUNS, name, tmp_path))
    recorded, (method, settings) = json.loads(LOSSES.read_text()), BEGUN[name]
    for key, values in fit(method, settings).items():
        assert_same(values, recorded["begun"][name][key], recorded["machine"])


def renew():
    """Record losses and images again; the archives stay."""
    torch.set_num_threads(1)
    found = {"machine": machine(), "runs": {}, "begun": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        teachers()
        for name, (method, settings) in RUNS.items():
            found["runs"][name] = fit(method, settings)
            shutil.rmtree("run")
        for name, (method, settings) in BEGUN.items():
            os.chdir(unpack(BEGUN_RUNS, name, Path(folder)))
            found["begun"][name] = fit(method, settings)
        save_file({name: sample(unpack(SAVED, name, Path(folder))) for name in load_file(IMAGES)}, IMAGES)
        os.chdir("/")
    LOSSES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        raise SystemExit(__doc__)
    renew()
