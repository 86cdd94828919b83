"""The scripts, started as by a user, from training to images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline
from PIL import Image

from cm_diffusers import ConsistencyPipeline, CTMPipeline, CTMScheduler, TwoTimeModel
from cm_diffusers.engine.saved.start import load_pipeline
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import flags, read_log, run


TRAINING = Path(__file__).parents[2] / "training"


def launch(name, *words):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(TRAINING / name), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def consistency_model(tmp_path_factory):
    """A class-conditional model from a launched run, and the run's output."""
    folder = tmp_path_factory.mktemp("runs") / "ect"
    result = launch("train_consistency.py", *flags(folder, max_train_steps=8, validation_steps=8))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


@pytest.fixture(scope="module")
def diffusion_model(tmp_path_factory):
    """An unconditional diffusion model from a launched run."""
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    words = flags(folder, "diffusion", max_train_steps=4, class_conditional=False, p_mean=-1)
    result = launch("train_diffusion.py", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def sample(model, folder, *words):
    """Run sample.py in this process; returns the images' pixels by name."""
    script = load_script("sample")
    paths = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(folder), "--device", "cpu"]
    script.sample(script.parse_args([*paths, *map(str, words)]))
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())}


def test_a_launched_consistency_run_leaves_a_model_a_log_and_pictures(consistency_model):
    folder, printed = consistency_model
    assert [row["step"] for row in read_log(folder)] == list(range(1, 9))
    assert all(row["loss"] > 0 and row["lr"] == 1e-3 for row in read_log(folder))
    assert "sigma_data: 0.8" in printed and "10 classes" in printed and str(folder / "pipeline") in printed
    assert Image.open(folder / "samples" / "step-0000008.png").width > 300
    assert Image.open(folder / "losses.png").format == "PNG"


def test_a_launched_diffusion_run_leaves_a_model_that_samples(diffusion_model):
    assert len(read_log(diffusion_model)) == 4
    pipeline = load_pipeline(str(diffusion_model / "pipeline"))
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert type(pipeline).__name__ == "DenoisingPipeline" and images.shape == (2, 8, 8, 1) and images.std() > 0


CLEAN = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
images = [
    pipeline(batch_size=4, class_labels=[0, 3, 3, 9], num_inference_steps=n, output_type="np",
             generator=torch.Generator().manual_seed(1)).images
    for n in (1, 2)
]
assert "cm_diffusers" not in sys.modules
numpy.save(sys.argv[2], images)
"""


def test_the_exported_model_gives_the_same_images_with_nothing_but_diffusers(consistency_model, tmp_path):
    model = consistency_model[0] / "pipeline"
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == ConsistencyModelPipeline.__name__
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CLEAN, str(model), str(tmp_path / "images.npy")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    stock = np.load(tmp_path / "images.npy")

    pipeline = load_pipeline(str(model))
    assert type(pipeline) is ConsistencyPipeline
    for n, images in zip((1, 2), stock):
        generator = torch.Generator().manual_seed(1)
        ours = pipeline(class_labels=[0, 3, 3, 9], num_inference_steps=n, generator=generator, output_type="np").images
        assert images.std() > 0 and np.array_equal(ours, images)
    assert not np.array_equal(stock[0], stock[1])


def test_sample_makes_a_file_per_image_and_a_grid(consistency_model, tmp_path):
    images = sample(consistency_model[0] / "pipeline", tmp_path, "--num_samples", 12, "--num_inference_steps", 2)
    assert list(images) == [f"{i:06d}.png" for i in range(12)]
    assert all(image.shape == (8, 8) and image.dtype == np.uint8 for image in images.values())
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (66 + 12), 10 * 66, 3)
    assert np.array_equal(grid[:64:8, :64:8, 0], images["000000.png"])


def test_images_depend_on_their_seed_alone(consistency_model, tmp_path):
    model, words = consistency_model[0] / "pipeline", ["--num_inference_steps", 2]
    images = sample(model, tmp_path / "a", "--num_samples", 7, *words)
    in_parts = sample(model, tmp_path / "b", "--num_samples", 7, "--batch_size", 3, *words)
    assert all(np.abs(images[name].astype(int) - in_parts[name]).max() <= 1 for name in images)
    later = sample(model, tmp_path / "c", "--num_samples", 2, "--seed", 5, *words)
    assert all(np.abs(later[f"{i:06d}.png"].astype(int) - images[f"{5 + i:06d}.png"]).max() <= 1 for i in range(2))
    assert not np.array_equal(images["000000.png"], images["000001.png"])


def test_sample_takes_noise_levels_and_labels(consistency_model, tmp_path):
    model = consistency_model[0] / "pipeline"
    labelled = sample(model, tmp_path / "a", "--num_samples", 4, "--sigmas", 80, 0.8, "--class_labels", 3)
    pipeline = load_pipeline(str(model))
    for i, image in enumerate(labelled.values()):
        generator = [torch.Generator().manual_seed(i)]
        (expected,) = pipeline(class_labels=[3], sigmas=[80, 0.8], generator=generator, output_type="np").images
        assert np.abs(image - expected[..., 0] * 255).max() <= 0.51
    other = sample(model, tmp_path / "b", "--num_samples", 4, "--sigmas", 80, 2.0, "--class_labels", 3)
    assert any(not np.array_equal(labelled[name], other[name]) for name in other)


def test_sample_reads_diffusion_models_too(diffusion_model, tmp_path):
    model = diffusion_model / "pipeline"
    ways = ((), ("--solver", "euler"), ("--s_churn", 2, "--s_tmin", 1))
    heun, euler, churned = (
        sample(model, tmp_path / str(i), "--num_samples", 2, "--num_inference_steps", 3, *way)
        for i, way in enumerate(ways)
    )
    for other in (euler, churned):
        assert len(heun) == 2 and any(not np.array_equal(heun[name], other[name]) for name in heun)


@pytest.fixture
def trajectory_model(tiny_unet, tmp_path):
    """A saved trajectory model with random weights."""
    network = TwoTimeModel.from_network(tiny_unet(), target_time_scale=1 / 250)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    CTMPipeline(network, CTMScheduler()).save_pretrained(tmp_path / "ctm")
    return tmp_path / "ctm"


def test_sample_knows_the_ways_of_a_trajectory_model(trajectory_model, tmp_path):
    pipeline, made = load_pipeline(str(trajectory_model)), []
    for i, way in enumerate(({}, {"gamma": 0.7}, {"solver": "gamma"}, {"solver": "euler"}, {"solver": "heun"})):
        words = [word for name, value in way.items() for word in (f"--{name}", value)]
        images = sample(trajectory_model, tmp_path / str(i), "--num_samples", 2, "--num_inference_steps", 3, *words)
        expected = pipeline(
            class_labels=[0, 1], num_inference_steps=3, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)], **way,
        ).images  # fmt: skip
        made.append(np.stack([*images.values()]))
        assert np.abs(made[-1] - expected[..., 0] * 255).max() <= 0.51
    assert np.array_equal(made[0], made[2]) and not any(np.array_equal(made[0], made[i]) for i in (1, 3, 4))


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--gamma", 2], r"gamma must lie in \[0, 1\]"),
        (["--gamma", 0.5, "--solver", "heun"], "has no effect on the solver"),
    ],
)
def test_sample_refuses_ways_that_a_trajectory_model_lacks(trajectory_model, tmp_path, words, reason):
    with pytest.raises(ValueError, match=reason):
        sample(trajectory_model, tmp_path, *words)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--class_labels", 10], "class_labels"),
        (["--class_labels", -1], "class_labels"),
        (["--num_samples", 0], "num_samples"),
        (["--batch_size", 0], "batch_size"),
        (["--num_inference_steps", 0], "num_inference_steps"),
        (["--sigmas", 0.8, 80], "sigmas"),
        (["--sigmas", 80, 0.8, "--num_inference_steps", 2], "sigmas"),
        (["--solver", "heun"], "solver is not an option of a ConsistencyPipeline"),
        (["--gamma", 0.5], "gamma is not an option of a ConsistencyPipeline"),
    ],
)
def test_sample_refuses_what_can_not_be_done(consistency_model, tmp_path, words, reason):
    with pytest.raises(ValueError, match=reason):
        sample(consistency_model[0] / "pipeline", tmp_path, *words)


def test_a_diffusion_model_takes_noise_levels_and_no_solver_of_jumps(diffusion_model, tmp_path):
    words = ["--num_samples", 1, "--seed", 3]
    chosen = sample(diffusion_model / "pipeline", tmp_path / "chosen", *words, "--sigmas", 80, 1)
    by_number = sample(diffusion_model / "pipeline", tmp_path / "number", *words, "--num_inference_steps", 2)
    assert len(chosen) == 1 and not np.array_equal(chosen.popitem()[1], by_number.popitem()[1])
    with pytest.raises(ValueError, match="solver must be one of heun, euler, .*; got 'gamma'"):
        sample(diffusion_model / "pipeline", tmp_path, "--solver", "gamma")


@pytest.mark.wide
def test_a_missing_model_ends_the_script_with_code_2_and_a_message(tmp_path):
    words = ["--pretrained_model_name_or_path", str(tmp_path / "missing"), "--output_dir", str(tmp_path / "images")]
    command = [sys.executable, str(TRAINING / "sample.py"), *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"^error: model '.*missing'", result.stderr, re.M)
    assert not (tmp_path / "images").exists()


@pytest.mark.wide
def test_diagnose_leaves_a_picture_and_numbers(tmp_path, capsys):
    model = run(tmp_path / "ect", max_train_steps=2) / "pipeline"
    teacher = run(tmp_path / "diffusion", "diffusion", max_train_steps=2) / "pipeline"
    words = ["--dataset_name", "digits", "--device", "cpu", "--output_dir", str(tmp_path)]
    script = load_script("diagnose")
    script.main(["--pretrained_model_name_or_path", str(teacher), *words])
    assert json.loads((tmp_path / "diagnostics.json").read_text()).keys() == {"tangent_difference"}
    script.main(["--pretrained_model_name_or_path", str(model), "--pretrained_teacher_model", str(teacher), *words])
    numbers = json.loads((tmp_path / "diagnostics.json").read_text())
    assert 0 < numbers["consistency_error"] < 2 and numbers["tangent_difference"] < 0.5
    assert np.asarray(Image.open(tmp_path / "diagnostics.png")).std() > 10
    plain = np.asarray(Image.open(tmp_path / "diagnostics.png"))
    with pytest.raises(SystemExit, match="2"):
        script.main(["--pretrained_model_name_or_path", str(model), "--guidance_scale", "2", *words])
    assert "a model with a null class" in capsys.readouterr().err
    labelled = {"model_preset": "ddpmpp_tiny", "label_dropout": 0.3, "max_train_steps": 20}
    guided = run(tmp_path / "labelled", "diffusion", **labelled) / "pipeline"
    pictures = []
    for scale in ("1", "9"):
        script.main(["--pretrained_model_name_or_path", str(guided), "--guidance_scale", scale, *words])
        pictures.append(np.asarray(Image.open(tmp_path / "diagnostics.png")).astype(int))
    assert plain.shape != pictures[1].shape and np.abs(pictures[0][:150] - pictures[1][:150]).max() > 5
    with pytest.raises(SystemExit, match="2"):
        script.main(["--pretrained_model_name_or_path", str(tmp_path / "nothing"), *words])
    assert "error: " in capsys.readouterr().err
