"""Prepared datasets: their published files, which the Hub's readers understand."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_diffusers.engine.sharing import hub as engine_hub
from tests.helpers.loopback import File, Repository
from tests.helpers.scripts import load_script
from tests.helpers.webdataset import write_shard


TRAINING = Path(__file__).parents[2] / "training"
LOAD = """
import json, sys
import datasets
data = datasets.load_dataset(sys.argv[1])
print(json.dumps({split: [rows.features["label"].names, rows["label"][:], len(rows)] for split, rows in data.items()}))
"""

TRAIN = """
import json, sys
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
limit = int(sys.argv[2])
name = sys.argv[3] if len(sys.argv) > 3 else "tester/files"
args = DataArguments(dataset_name=name, streaming=sys.argv[1] == "1", max_train_samples=limit)
data = ImageData(args, False, show_progress=False)
print(json.dumps(next(data.batches(ProcessShare(limit), 0))["images"][:, 0, 0, 0].tolist()))
"""


@pytest.fixture
def prepare(hub, api, quick, monkeypatch, tmp_path):
    """A function that runs training/prepare_data.py on six images in two classes and returns the exit code."""
    monkeypatch.setattr(engine_hub, "HfApi", lambda: api)
    prepare_data = load_script("prepare_data")
    for i in range(6):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(file)

    def run(*words):
        with pytest.raises(SystemExit) as end:
            prepare_data.main([str(tmp_path / "images"), str(tmp_path / "mine"), *map(str, words)])
        return end.value.code

    return run


def published(hub):
    return {name for name in hub.repository("tester/mine", "dataset").files if name != ".gitattributes"}


def test_a_dataset_on_the_hub_is_read_by_its_id(hub, prepare, tmp_path, capsys):
    assert prepare("--push_to_hub") == prepare("--push_to_hub", "--split", "test") == 0
    names = {f"{split}/{split}-00000-of-00001.parquet" for split in ("train", "test")}
    assert published(hub) == names | {"README.md"}  # no plans and no locks
    repo = hub.repository("tester/mine", "dataset")
    assert repo.messages == ["Upload train", "Upload test"] and not repo.private
    card = repo.files["README.md"].decode()
    assert "# mine" in card and "1 x 8 x 8 pixels in 2 classes" in card and str(tmp_path) not in card
    assert f"Pushed to {hub.url}/datasets/tester/mine: --dataset_name tester/mine" in capsys.readouterr().out
    command = [sys.executable, "-c", LOAD, "tester/mine"]
    run = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {split: [["a", "b"], [0, 0, 0, 1, 1, 1], 6] for split in ("train", "test")}


@pytest.mark.wide
@pytest.mark.parametrize("streaming", [False, True])
def test_image_files_on_the_hub_are_opened_streamed_or_not(hub, tmp_path, streaming):
    tree = {}
    for i, name in enumerate(("10/a.png", "10/b.png", "9/c.png", "9/no image.png")):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(buffer, "PNG")
        tree[name] = File(buffer.getvalue() if "no" not in name else b"no image", lfs=False)
    repo = hub.repositories["dataset", "tester/files"] = Repository("dataset", "tester/files", private=False)
    repo.commit("main", "images", tree)
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(TRAINING.parent)}

    def read(limit):
        command = [sys.executable, "-c", TRAIN, str(int(streaming)), str(limit)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    run = read(3)
    assert run.returncode == 0, run.stderr
    assert sorted(json.loads(run.stdout)) == [0, 50, 100]
    assert "no image.png): cannot identify image file" in read(4).stderr


@pytest.mark.wide
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_on_the_hub_are_read_by_their_pattern(hub, tmp_path, streaming):
    tree = {
        f"train-{i}.tar": File(write_shard(tmp_path / f"{i}.tar", [3 * i, 3 * i + 1]).read_bytes()) for i in (0, 1)
    }
    repo = hub.repositories["dataset", "tester/shards"] = Repository("dataset", "tester/shards", private=False)
    repo.commit("main", "shards", tree)
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(TRAINING.parent)}
    command = [sys.executable, "-c", TRAIN, str(int(streaming)), "4", "hf://datasets/tester/shards/*.tar"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(json.loads(run.stdout)) == [0, 1, 3, 4]


def test_a_name_that_can_t_be_written_to_is_found_before_anything_is_prepared(prepare, tmp_path, capsys):
    assert prepare("--push_to_hub", "--hub_dataset_id", "somebody/mine") == 2
    assert "hub_dataset_id 'somebody/mine' can't be written to" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "train").exists()


def test_what_an_outage_left_the_same_command_sends(hub, prepare, capsys):
    hub.fail("POST .*/commit/", times=float("inf"), status=503)
    assert prepare("--push_to_hub", "--hub_private_repo", "--hub_timeout", 0.2) == 1
    assert "Run the same command again" in capsys.readouterr().out and published(hub) == set()
    hub.clear()
    assert prepare("--push_to_hub", "--hub_private_repo") == 0
    assert len(published(hub)) == 2 and hub.repository("tester/mine", "dataset").private
