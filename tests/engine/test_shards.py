"""WebDataset shards, several datasets, crops at random places and large images, all through one reader."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from cm_diffusers.core.draws import Draws
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import BucketOrder, KeyedOrder, Mixture, ProcessShare
from cm_diffusers.engine.data.scan import bucket_shapes, crops
from cm_diffusers.engine.data.shards import find_shards, names_shards
from cm_diffusers.engine.training.batches import as_they_are, cropped
from tests.helpers.training_runs import differences, run
from tests.helpers.webdataset import picture, png, write_shard
from training.prepare_data import main as prepare_data


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards whose images have the values 0 to 11, in order."""
    for i in range(3):
        write_shard(tmp_path / "shards" / f"s-{i:03d}.tar", range(4 * i, 4 * i + 4))
    return tmp_path / "shards"


def read(name, conditional=False, **settings):
    return ImageData(DataArguments(dataset_name=str(name), **settings), conditional, show_progress=False)


# --- shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "/*.tar", "/s-{000..002}.tar"])
def test_shards_are_read_by_folder_or_pattern_with_their_labels(shards, name):
    data = read(f"{shards}{name}", conditional=True)
    assert data.images[:, 0, 0, 0].tolist() == list(range(12))
    assert data.labels.tolist() == [i % 3 for i in range(12)] and data.num_classes == 3


def test_one_shard_is_a_dataset(shards):
    assert read(shards / "s-001.tar").images[:, 0, 0, 0].tolist() == [4, 5, 6, 7]


def test_shards_are_streamed(shards):
    data = read(f"{shards}/*.tar", streaming=True)
    batch = next(data.batches(ProcessShare(12), 0))
    assert sorted(batch["images"][:, 0, 0, 0].tolist()) == list(range(12))


def test_a_label_that_a_later_sample_lacks_is_an_error_and_no_guess(tmp_path):
    """The datasets library assumes that all samples have the members of the first five."""
    path = write_shard(tmp_path / "s.tar", range(6))
    with tarfile.open(path, "a") as archive:
        member, content = tarfile.TarInfo("s_9999.png"), png(picture(9))
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    assert read(path).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 9]
    with pytest.raises(ValueError, match="labels of column 'cls' must be integers.* row 6 has None"):
        read(path, conditional=True)


def test_a_pattern_without_files_is_refused(shards):
    with pytest.raises(ValueError, match="no file matches"):
        read(f"{shards}/t-*.tar")


def test_shards_are_named_by_patterns_and_addresses():
    assert names_shards("hf://datasets/user/name/*.tar") and names_shards("a/{0..3}.tar") and names_shards("a/*.tgz")
    assert not names_shards("user/name") and not names_shards("a/*.parquet") and not names_shards("a.tar")


def test_brackets_in_the_path_of_a_folder_are_no_pattern(tmp_path):
    write_shard(tmp_path / "[a]" / "s.tar", [7])
    assert [path.name for path in find_shards(tmp_path / "[a]")] == ["s.tar"]
    assert read(tmp_path / "[a]").images.flatten()[0] == 7


def test_prepare_data_reads_shards(shards, tmp_path):
    with pytest.raises(SystemExit) as end:
        prepare_data([f"{shards}/*.tar", str(tmp_path / "out")])
    assert end.value.code == 0
    data = read(tmp_path / "out", conditional=True)
    assert data.images[:, 0, 0, 0].tolist() == list(range(12)) and data.num_classes == 3


# --- several datasets ----------------------------------------------------------------------------------------------


def folder(path, classes):
    """Grey images with these values, in one folder per class."""
    for name, values in classes.items():
        (path / name).mkdir(parents=True)
        for value in values:
            picture(value).save(path / name / f"{value:03d}.png")
    return path


def test_datasets_lie_behind_one_another_and_classes_of_one_name_are_one(tmp_path):
    a = folder(tmp_path / "a", {"cat": [1, 2], "dog": [3]})
    b = folder(tmp_path / "b", {"ant": [4], "dog": [5, 6]})
    data = read(a, conditional=True, extra_datasets=[str(b)])
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert data.labels.tolist() == [0, 0, 1, 2, 1, 1]
    assert data.description.classes == {0: "cat", 1: "dog", 2: "ant"}


def test_images_that_are_held_in_another_way_are_refused(tmp_path, shards):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [[[0, 1], [2, 3]]]})
    rows.to_parquet(str(tmp_path / "arrays.parquet"))
    with pytest.raises(ValueError, match="stores its images as .*, but .* stores them as .*prepare_data.py"):
        read(shards, extra_datasets=[str(tmp_path / "arrays.parquet")])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_weights_are_as_many_as_datasets(weights):
    with pytest.raises(ValueError, match="one for the first dataset and one for each"):
        DataArguments(dataset_name="a", extra_datasets=["b"], dataset_weights=weights)


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1e6), (1, 2, 4)])
def test_a_block_holds_each_dataset_by_its_weight_and_at_least_once(weights):
    counts = Mixture((5,) * len(weights), weights).counts
    assert sum(counts) == 1000 and min(counts) >= 1
    for count, weight in zip(counts, weights):
        assert abs(count - 1000 * weight / sum(weights)) <= 1


def positions(order, count):
    batches = iter(order)
    return [i for _ in range(count) for i in next(batches)]


def test_datasets_have_their_turns_by_their_weights_and_epochs_of_their_own():
    order = KeyedOrder(12, ProcessShare(100), 0, mixture=Mixture((4, 8), (3, 1)))
    places = positions(order, 20)
    counts = Counter(places)
    assert sum(counts[i] for i in range(4)) == 1500
    assert {counts[i] for i in range(4)} == {375} and max(counts.values()) - min(counts[i] for i in range(4, 12)) < 320
    assert {counts[i] for i in range(4, 12)} <= {62, 63}
    firsts = [place for place in places if place < 4]
    assert all(sorted(firsts[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 1500, 4))


def test_the_turns_are_those_of_any_step_and_any_number_of_processes():
    mixture = Mixture((4, 8), (1, 1))
    whole = positions(KeyedOrder(12, ProcessShare(6), 3, mixture=mixture), 400)
    assert positions(KeyedOrder(12, ProcessShare(6), 3, step=250, mixture=mixture), 150) == whole[1500:]
    halves = [positions(KeyedOrder(12, ProcessShare(3, 1, rank, 2), 3, mixture=mixture), 400) for rank in (0, 1)]
    assert [i for s in range(400) for half in halves for i in half[3 * s : 3 * s + 3]] == whole


def test_a_run_of_two_datasets_by_their_weights(tmp_path, shards):
    settings = {"extra_datasets": [f"{shards}/*.tar"], "dataset_weights": [1, 3], "max_train_steps": 2}
    where = run(tmp_path / "r", class_conditional=None, max_train_samples=50, **settings)
    assert json.loads((where / "data.json").read_text())["number"] == 62


# --- crops ---------------------------------------------------------------------------------------------------------


def wide(path):
    """An image of 8 x 24 pixels, each with the value of its column."""
    path.mkdir()
    Image.fromarray(np.tile(np.arange(24, dtype=np.uint8), (8, 1))).save(path / "a.png")
    return path


def test_crops_are_at_the_places_that_are_drawn():
    image = torch.arange(24).expand(1, 8, 24)
    places = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.9, 0.9999]])
    assert crops([image] * 3, (8, 8), places)[:, 0, 0, 0].tolist() == [0, 8, 16]
    assert crops([image], (8, 8))[0, 0, 0, 0] == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_random_crops_depend_on_seed_and_step_alone_and_reach_everywhere(tmp_path, streaming):
    args = {"random_crop": True, "resolution": [8], "streaming": streaming}
    data = ImageData(DataArguments(dataset_name=str(wide(tmp_path / "d")), **args), False, show_progress=False)
    raw = next(data.batches(ProcessShare(64), 0))
    batch = cropped(raw, data, Draws(0, 5, range(64)))["images"]
    lefts = batch[:, 0, 0, 0].tolist()
    assert batch.shape == (64, 1, 8, 8) and {0, 16} <= set(lefts) <= set(range(17)) and len(set(lefts)) > 12
    assert torch.equal(batch[8:16], cropped({"images": raw["images"][:8]}, data, Draws(0, 5, range(8, 16)))["images"])
    assert (as_they_are(raw, data, "cpu").samples[:, 0, 0, 0] * 127.5 + 127.5).round().unique().tolist() == [8]


def test_data_are_measured_in_the_middle(tmp_path):
    folder = wide(tmp_path / "d")
    one, other = (read(folder, resolution=[8], random_crop=crop).measure_sigma_data() for crop in (True, False))
    assert one == other


@pytest.mark.wide
def test_a_run_with_random_crops_resumes_exactly(tmp_path):

    for i in range(5):
        (tmp_path / "d").mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (8, 12 + i), np.uint8)
        Image.fromarray(noise).save(tmp_path / "d" / f"{i}.png")
    settings = {"dataset_name": str(tmp_path / "d"), "class_conditional": None, "max_train_samples": None}
    settings |= {"random_crop": True, "resolution": [8, 8], "train_batch_size": 4}
    run(tmp_path / "a", max_train_steps=4, pretrain_steps=0, **settings)
    run(tmp_path / "b", max_train_steps=2, pretrain_steps=0, **settings)
    run(tmp_path / "b", max_train_steps=4, pretrain_steps=0, **settings)
    assert differences(tmp_path / "a", tmp_path / "b") == []


# --- large images --------------------------------------------------------------------------------------------------


def test_images_of_more_pixels_than_allowed_are_named(tmp_path):
    (tmp_path / "d").mkdir()
    picture(1).save(tmp_path / "d" / "a.png")
    picture(2, (16, 16)).save(tmp_path / "d" / "b.png")
    with pytest.raises(ValueError, match="b.png.*it has 256 pixels, and max_image_pixels is 100"):
        read(tmp_path / "d", max_image_pixels=100)


def test_images_that_pillow_takes_for_bombs_are_read_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "d").mkdir()
    picture(2, (16, 16)).save(tmp_path / "d" / "b.png")
    with pytest.raises(ValueError, match="give --max_image_pixels"):
        read(tmp_path / "d")
    assert read(tmp_path / "d", max_image_pixels=256).images.shape == (1, 1, 16, 16)


# --- buckets of shapes ---------------------------------------------------------------------------------------------


def test_shapes_of_buckets_have_no_more_pixels_and_sides_that_halve():
    assert bucket_shapes((64, 64)) == [(64, 64), (48, 80), (56, 72), (72, 56), (80, 48)]
    assert bucket_shapes((32, 32)) == [(32, 32), (24, 40), (40, 24)] and bucket_shapes((8, 8)) == [(8, 8)]


@pytest.fixture
def shapes(tmp_path):
    """Twelve images of 32 x 32, eight of 24 x 40 and one of 41 x 24, each with its own grey."""
    sizes = [(32, 32)] * 12 + [(24, 40)] * 8 + [(41, 24)]
    (tmp_path / "shapes").mkdir()
    for i, size in enumerate(sizes):
        picture(i, size).save(tmp_path / "shapes" / f"{i:02d}.png")
    return tmp_path / "shapes"


def test_images_of_a_step_have_one_shape_and_each_image_its_own(shapes):
    data = read(shapes, resolution=[32], aspect_ratio_buckets=True)
    batches, seen = data.batches(ProcessShare(4), 0), Counter()
    for _ in range(200):
        images = next(batches)["images"]
        for value in images[:, 0, 0, 0].tolist():
            seen[value, tuple(images.shape[2:])] += 1
    assert dict(seen.keys()) == {i: (32, 32) if i < 12 else (24, 40) if i < 20 else (40, 24) for i in range(21)}
    assert data.rows([0, 12, 20]).shape == (3, 1, 32, 32)


def test_turns_of_buckets_are_those_of_any_step_and_any_number_of_processes():
    buckets = [range(12), range(12, 20), [20]]
    whole = positions(BucketOrder(buckets, ProcessShare(4), 3), 60)
    assert positions(BucketOrder(buckets, ProcessShare(4), 3, step=37), 23) == whole[148:]
    halves = [positions(BucketOrder(buckets, ProcessShare(2, 1, rank, 2), 3), 60) for rank in (0, 1)]
    assert [i for s in range(60) for half in halves for i in half[2 * s : 2 * s + 2]] == whole
    counts = Counter(positions(BucketOrder(buckets, ProcessShare(4), 3), 1000))
    assert sum(counts[i] for i in range(12)) == 4 * 571 and counts[20] == 4 * 48
    assert {counts[i] for i in range(12)} <= {190, 191} and {counts[i] for i in range(12, 20)} <= {190, 191}


@pytest.mark.wide
def test_a_run_with_buckets_resumes_exactly_and_draws_its_pictures(shapes, tmp_path):
    settings = {
        "dataset_name": str(shapes),
        "class_conditional": None,
        "max_train_samples": None,
        "train_batch_size": 4,
    }
    settings |= {"aspect_ratio_buckets": True, "resolution": 32, "pretrain_steps": 0, "validation_steps": 3}
    run(tmp_path / "a", max_train_steps=5, **settings)
    run(tmp_path / "b", max_train_steps=3, **settings)
    run(tmp_path / "b", max_train_steps=5, **settings)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert (tmp_path / "a" / "samples" / "step-0000003-diagnostics.png").is_file()


def test_a_network_that_can_not_halve_the_shapes_is_refused(shapes, tmp_path):
    settings = {"dataset_name": str(shapes), "class_conditional": None, "max_train_samples": None}
    with pytest.raises(ValueError, match="resolution 24 x 40 can't be halved 4 times"):
        (tmp_path / "config.json").write_text(
            json.dumps(
                {
                    "block_out_channels": [8] * 5,
                    "down_block_types": ["DownBlock2D"] * 5,
                    "norm_num_groups": 4,
                    "up_block_types": ["UpBlock2D"] * 5,
                    "layers_per_block": 1,
                }
            )  # fmt: skip
        )
        run(tmp_path / "r", aspect_ratio_buckets=True, resolution=32, **settings,
            model_config_name_or_path=str(tmp_path))  # fmt: skip


@pytest.mark.parametrize("other", [{"streaming": True}, {"random_crop": True}])
def test_buckets_and_what_contradicts_them_are_refused(other):
    with pytest.raises(ValueError, match="can't be combined"):
        DataArguments(dataset_name="a", aspect_ratio_buckets=True, **other)
