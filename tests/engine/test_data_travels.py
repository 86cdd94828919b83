"""The description of the data: in checkpoints, settings, saved models and cards, and its check on resumption."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.engine.checkpoint import newest_checkpoint, save_checkpoint
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.sharing.card import draw_grids
from cm_diffusers.engine.sharing.hub import PUBLISHED
from cm_diffusers.pipelines import name_classes
from cm_diffusers.sampling import captions_of, image_grid, labels_in_turn, load_pipeline, sample_images
from tests.helpers.training_runs import run


BEFORE = DataDescription(8, 1, (8, 8), 2, {0: "cat", 1: "dog"}, "a" * 64)


def pictures(folder, classes=("cat", "dog"), count=4, seed=0):
    """A folder of grey pictures in one folder per class."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def train(folder, data, **settings):
    return run(folder, dataset_name=None, train_data_dir=data, max_train_samples=None, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of three steps, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("travels")
    data = pictures(folder / "data")
    return train(folder / "run", data, max_train_steps=3), data


# --- its places ----------------------------------------------------------------------------------------------------


def test_the_description_is_in_the_checkpoint_the_settings_the_model_and_what_is_published(trained):
    folder, _ = trained
    found = DataDescription.from_dict(newest_checkpoint(folder)[0].state["data"])
    assert (found.number, found.channels, found.size) == (8, 1, (8, 8))
    assert found.classes == {0: "cat", 1: "dog"} and len(found.fingerprint) == 64
    for file in (folder / "data.json", folder / "pipeline" / "data.json"):
        assert DataDescription.from_dict(json.loads(file.read_text())) == found
    assert "data.json" in PUBLISHED
    settings = (folder / "config.yaml").read_text()
    assert settings.splitlines()[0] == '# data: 8 images of 1 x 8 x 8, 2 classes: "cat", "dog"'
    assert yaml.safe_load(settings)["method"] == "ect"


def test_a_name_with_a_line_break_stays_in_the_comment_of_the_settings():
    assert "\n" not in str(replace(BEFORE, classes={0: "cat\nseed: 3", 1: "dog"}))


def test_the_saved_model_takes_the_names_of_its_classes(trained):
    pipe = load_pipeline(str(trained[0] / "pipeline"))
    assert pipe.id2label == {0: "cat", 1: "dog"} and pipe.get_label_ids("dog") == [1]
    by_name, by_label = (
        pipe(class_labels=label, generator=torch.Generator().manual_seed(3), output_type="pt").images
        for label in ("dog", 1)
    )
    assert torch.equal(by_name, by_label)


def test_the_card_names_the_classes(trained):
    card = (trained[0] / "pipeline" / "README.md").read_text()
    assert "| classes | 0 cat, 1 dog |" in card and "| images | 8 images of 1 x 8 x 8, 2 classes" in card


# --- other data ----------------------------------------------------------------------------------------------------


def change_image(data):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "cat" / "0.png")


CHANGES = {
    "an image more": (lambda data: pictures(data, ["cat"], 5), "the number of images was 8, is 9", True),
    "other content": (change_image, "the fingerprint of images .or latents. and labels was .*, is ", True),
    "a class renamed": (lambda data: (data / "dog").rename(data / "eel"), "class 1 was 'dog', is 'eel'", True),
    "a class more": (lambda data: pictures(data, ["eel"]), "the number of classes was 2, is 3", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_resumed_on_other_data_only_when_that_is_asked_for(trained, tmp_path, capsys, name):
    change, words, allowed = CHANGES[name]
    folder = shutil.copytree(trained[0], tmp_path / "run")
    data = shutil.copytree(trained[1], tmp_path / "data")
    change(data)
    with pytest.raises(ValueError, match=f"on another dataset: .*{words}") as error:
        train(folder, data, max_train_steps=4)
    assert ("--allow_data_change" in str(error.value)) is allowed
    if not allowed:
        with pytest.raises(ValueError, match=words):
            train(folder, data, max_train_steps=4, allow_data_change=True)
        return
    capsys.readouterr()
    train(folder, data, max_train_steps=4, allow_data_change=True)
    said = capsys.readouterr().out
    assert "The dataset changes from here on" in said and "Resumed from step 3 of 4" in said
    state = newest_checkpoint(folder)[0].state
    assert state["config"]["sigma_data"] == newest_checkpoint(trained[0])[0].state["config"]["sigma_data"]
    train(folder, data, max_train_steps=5)  # the run now has the new data


def test_the_same_images_elsewhere_are_the_same_data(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    train(folder, shutil.copytree(trained[1], tmp_path / "moved"), max_train_steps=4)
    assert newest_checkpoint(folder)[0].step == 4


def test_a_checkpoint_without_a_description_is_resumed_and_that_is_said(trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    checkpoint, _ = newest_checkpoint(folder)
    state = {key: value for key, value in checkpoint.state.items() if key != "data"}
    save_checkpoint(folder, checkpoint.step, checkpoint.tensors, state)
    train(folder, trained[1], max_train_steps=4)
    assert "The checkpoint holds no description of its images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "now, words",
    [
        ({}, []),
        ({"number": 6}, ["the number of images was 8, is 6"]),
        ({"channels": 3, "size": (8, 16)}, ["channels was 1, is 3", "size was 8 x 8, is 8 x 16"]),
        ({"classes": {0: "dog", 1: "cat"}}, ["class 0 was 'cat', is 'dog'", "class 1 was 'dog', is 'cat'"]),
        ({"classes": {1: "dog"}}, ["class 0 was 'cat', is 'none'"]),
        ({"number": None, "fingerprint": None}, []),  # unknown for a stream
        ({"number": None, "fingerprint": None, "classes": {0: "cat", 1: "eel"}}, ["class 1 was 'dog', is 'eel'"]),
    ],
)
def test_what_differs_between_two_datasets(now, words):
    assert BEFORE.differences(replace(BEFORE, **now)) == words


# --- classes without images ----------------------------------------------------------------------------------------


def test_classes_that_no_image_has_are_said_and_never_drawn(tmp_path, capsys):
    """Labels with gaps: 1, 3 and 4."""
    images = [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": [1, 3, 4] * 4}, features)
    rows.to_parquet(tmp_path / "d.parquet")
    folder = run(tmp_path / "run", dataset_name=tmp_path / "d.parquet", max_train_samples=None, max_train_steps=2)
    assert "no image has the label 0, 2: 2 of 5 classes are never trained" in capsys.readouterr().out
    card = (folder / "pipeline" / "README.md").read_text()
    assert "| labels without images | 0, 2 |" in card and "class_labels=[1, 3, 4, 1]" in card
    pipe = load_pipeline(str(folder / "pipeline"))
    assert pipe.classes == [1, 3, 4]
    seen = []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"]), with_kwargs=True)
    sample_images(pipe, range(20))
    pipe(batch_size=20)
    assert {label for labels in seen for label in labels.tolist()} == {1, 3, 4}


# --- names beside images -------------------------------------------------------------------------------------------


@pytest.fixture
def named(tiny_unet):
    """A pipeline with four classes; three have names, and two share one."""
    pipe = ConsistencyPipeline(tiny_unet(num_classes=4), MultistepConsistencyScheduler())
    name_classes(pipe.unet, {0: "cat", 2: "dog", 3: "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_labels_go_round_the_classes_that_have_images(named, tiny_unet):
    assert labels_in_turn(named, range(4)) == [0, 2, 3, 0]
    assert captions_of(named, [0, 2]) == ["cat", "dog"]
    numbered = ConsistencyPipeline(tiny_unet(num_classes=2), MultistepConsistencyScheduler())
    assert labels_in_turn(numbered, range(3)) == [0, 1, 0] and captions_of(numbered, [0, 1]) == ["0", "1"]
    assert captions_of(numbered, None) is None


def test_a_grid_shows_captions_below_its_images():
    images = np.zeros((4, 8, 8, 1), np.float32)
    plain, captioned = image_grid(images, 2, 64), image_grid(images, 2, captions=["cat", "", "x" * 100, "日本\n"])
    assert plain.size == (132, 132) and captioned.size == (132, 156)
    below = np.array(captioned)[64:76]
    assert (below[:, :64] < 128).any() and (below[:, 66:130] == 255).all()
    assert (np.array(captioned)[142:154, 64:66] == 255).all()  # the long caption is cut to the image's width


def test_the_samples_of_a_model_are_drawn_with_the_names(named, tmp_path, monkeypatch):
    seen = []
    grid = "cm_diffusers.engine.sharing.card.image_grid"
    monkeypatch.setattr(grid, lambda *a, captions: seen.append(captions) or a[0])
    with pytest.raises(AttributeError):  # the picture's stand-in can't be saved
        draw_grids(named, tmp_path)
    assert seen[0][:4] == ["cat", "dog", "dog", "cat"]


@pytest.mark.wide
def test_sample_py_takes_names_of_classes(trained, tmp_path):
    script = Path(__file__).resolve().parents[2] / "training" / "sample.py"
    model = ["--pretrained_model_name_or_path", trained[0] / "pipeline", "--num_samples", "2", "--device", "cpu"]
    commands = {"names": ["dog", "cat"], "labels": ["1", "0"], "wrong": ["eel"]}
    runs = {}
    for name, labels in commands.items():
        command = [sys.executable, script, *model, "--class_labels", *labels, "--output_dir", tmp_path / name]
        runs[name] = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert "no class 'eel'" in runs["wrong"].stderr and runs["wrong"].returncode == 2
    for i in range(2):
        by_name, by_label = (tmp_path / name / "images" / f"{i:06d}.png" for name in ("names", "labels"))
        assert by_name.read_bytes() == by_label.read_bytes()
