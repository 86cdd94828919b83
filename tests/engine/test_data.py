"""Data: every source, every kind of image, every fault before training, and an order set by the seed alone."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import cm_diffusers.engine.data.images as data_module
from cm_diffusers.core.draws import permutation
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import KeyedOrder, ProcessShare
from cm_diffusers.engine.data.records import open_image
from cm_diffusers.engine.data.scan import DecodedImages, resize_and_crop
from cm_diffusers.pixels import to_uint8


def random_image(seed, size=(8, 8), mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (*size, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


@pytest.fixture(autouse=True)
def own_cache_and_no_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def image_folder(tmp_path):
    """Twelve RGB images of 8x8 pixels in three folders, one per class."""
    for i in range(12):
        folder = tmp_path / "images" / f"class_{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        random_image(i).save(folder / f"{i:02d}.png")
    return tmp_path / "images"


def read_folder(folder, conditional=False, scanned=None, **kwargs):
    return ImageData(DataArguments(train_data_dir=str(folder), **kwargs), conditional, scanned, show_progress=False)


def as_bytes(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_parquet(folder, features=None, **columns):
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder


def read_parquet(folder, conditional=True, **kwargs):
    return ImageData(DataArguments(dataset_name=str(folder), **kwargs), conditional, show_progress=False)


# --- sources -------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, digits = ImageData(DataArguments(dataset_name="digits"), True, show_progress=False), load_digits()
    assert (data.channels, data.resolution, data.num_classes) == (1, (8, 8), 10)
    assert data.labels.tolist() == digits.target.tolist()
    assert np.abs(data.images[:, 0].numpy() / 255 - digits.images / 16).max() <= 0.5 / 255 + 1e-9
    x = torch.as_tensor(digits.images) / 8 - 1
    assert data.measure_sigma_data() == pytest.approx(x.square().mean().sqrt().item(), abs=1e-3)


def test_a_folder_of_class_folders_gives_images_and_labels(image_folder):
    data = read_folder(image_folder, conditional=True)
    assert (len(data.images), data.channels, data.resolution, data.num_classes) == (12, 3, (8, 8), 3)
    expected = [(c, i) for c in range(3) for i in range(c, 12, 3)]
    assert data.labels.tolist() == [c for c, _ in expected]
    for image, (_, seed) in zip(data.images, expected):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(random_image(seed)))


def test_labels_are_not_read_for_an_unconditional_model(image_folder):
    data = read_folder(image_folder)
    assert data.labels is None and data.num_classes is None
    assert next(data.batches(ProcessShare(4), seed=0))["condition"] == {}


def test_parquet_with_the_usual_names(tmp_path):
    images = [random_image(i, mode="L") for i in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    data = read_parquet(write_parquet(tmp_path / "d", features, image=images, label=[0, 1, 2, 1, 0]))
    assert data.labels.tolist() == [0, 1, 2, 1, 0] and data.num_classes == 4 and data.channels == 1
    assert all(np.array_equal(a[0].numpy(), np.asarray(b)) for a, b in zip(data.images, images))


def test_parquet_with_other_names_and_two_label_columns(tmp_path):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(num_classes=100),
            "coarse_label": datasets.ClassLabel(num_classes=20),
        }
    )
    columns = {"img": [random_image(i) for i in range(3)], "fine_label": [99, 3, 5], "coarse_label": [1, 2, 3]}
    folder = write_parquet(tmp_path / "d", features, **columns)
    with pytest.raises(ValueError, match="--label_column.*fine_label.*coarse_label"):
        read_parquet(folder)
    data = read_parquet(folder, image_column="img", label_column="fine_label")
    assert data.labels.tolist() == [99, 3, 5] and data.num_classes == 100


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_missing_column_is_answered_with_those_there_are(tmp_path, option):
    folder = write_parquet(tmp_path / "d", img=[random_image(0)], fine=[1])
    with pytest.raises(ValueError, match=f"{option} 'picture' is not a column.*img .Image.*fine"):
        read_parquet(folder, **{"label_column": "fine", option: "picture"})


def test_a_dataset_without_images_says_so(tmp_path):
    folder = write_parquet(tmp_path / "d", text=["a", "b"])
    with pytest.raises(ValueError, match="no column of images.*--image_column.*text"):
        read_parquet(folder)


def test_plain_integer_labels_give_the_number_of_classes(tmp_path):
    images = [random_image(i) for i in range(3)]
    assert read_parquet(write_parquet(tmp_path / "d", image=images, label=[4, 0, 2])).num_classes == 5


def test_string_labels_are_encoded_in_alphabetical_order(tmp_path):
    images = [random_image(i) for i in range(4)]
    data = read_parquet(write_parquet(tmp_path / "d", image=images, label=["dog", "cat", "dog", "ant"]))
    assert data.labels.tolist() == [2, 1, 2, 0] and data.num_classes == 3


@pytest.mark.parametrize(
    "labels, row", [([0, -1, 1], "row 1 has -1"), ([0, None, 1], "row 1 has None"), ([0.5, 1.0, 2.0], "row 0 has 0.5")]
)
def test_labels_that_are_no_class_are_refused(tmp_path, labels, row):
    images = [random_image(i) for i in range(3)]
    with pytest.raises(ValueError, match=f"'label'.*{row}"):
        read_parquet(write_parquet(tmp_path / "d", image=images, label=labels))


@pytest.mark.parametrize("wrong", [-1, 3, 7])
def test_labels_outside_the_classes_are_refused(monkeypatch, wrong):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    plain = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [random_image(i) for i in range(3)], "label": [0, 2, wrong]}
    source = datasets.Dataset.from_dict(columns, features=plain)
    source.info.features = features  # as a foreign file can claim
    monkeypatch.setattr(data_module, "load_source", lambda *args: source)
    with pytest.raises(ValueError, match=rf"integers in \[0, 2\]; row 2 has {wrong}"):
        ImageData(DataArguments(dataset_name="any"), True, show_progress=False)


@pytest.mark.parametrize("make", ["folder", "parquet", "nothing"])
def test_empty_and_missing_datasets_are_refused(tmp_path, make):
    folder = tmp_path / "d"
    if make == "folder":
        folder.mkdir()
    if make == "parquet":
        write_parquet(folder, datasets.Features({"image": datasets.Image()}), image=[])
    with pytest.raises(ValueError, match=str(folder)):
        read_folder(folder) if make != "parquet" else read_parquet(folder, conditional=False)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'valid'"):
        read_parquet(write_parquet(tmp_path / "d", image=[random_image(0)], label=[0]), split="valid")


def test_only_the_first_samples_are_used(image_folder):
    assert torch.equal(read_folder(image_folder, max_train_samples=5).images, read_folder(image_folder).images[:5])


# --- faults --------------------------------------------------------------------------------------------------------


def spoil(folder):
    """Add bad files of all kinds to good ones; returns the bad files' names."""
    good = as_bytes(random_image(7, (64, 64)))
    bad = {
        "truncated.png": good[: len(good) // 2],
        "truncated.jpg": as_bytes(random_image(8, (64, 64)), "JPEG")[:500],
        "corrupt.png": good[:60] + bytes(200) + good[260:],
        "empty.png": b"",
        "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    }
    for name, content in bad.items():
        (folder / "class_1" / name).write_bytes(content)
    return list(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_files_are_found_before_training_and_named(image_folder, workers):
    names = spoil(image_folder)
    with pytest.raises(ValueError, match=f"^{len(names)} of {12 + len(names)} images can't be read") as caught:
        read_folder(image_folder, dataloader_num_workers=workers)
    assert all(name in str(caught.value) for name in names)
    assert "00.png" not in str(caught.value)


def test_a_bad_row_of_parquet_is_found_by_its_number(tmp_path):
    images = [{"bytes": as_bytes(random_image(0)), "path": None}, {"bytes": b"no image", "path": None}, None]
    features = datasets.Features({"image": datasets.Image()})
    with pytest.raises(ValueError, match=r"(?s)2 of 3 images.*row 1.*row 2"):
        read_parquet(write_parquet(tmp_path / "d", features, image=images), conditional=False)


def test_a_dataset_without_one_good_image_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the first images"):
        read_folder(tmp_path / "d")


def test_a_checked_dataset_is_not_checked_again_unless_it_changed(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    decoded = []
    decode = DecodedImages.decode
    monkeypatch.setattr(DecodedImages, "decode", lambda *a: decoded.append(1) or decode(*a))
    read_folder(image_folder, scanned=tmp_path / "images_checked.safetensors")
    assert len(decoded) == 12 and (tmp_path / "images_checked.safetensors").exists()
    read_folder(image_folder, scanned=tmp_path / "images_checked.safetensors")
    assert len(decoded) == 12
    random_image(99).save(image_folder / "class_0" / "new.png")
    read_folder(image_folder, scanned=tmp_path / "images_checked.safetensors")
    assert len(decoded) == 12 + 13


def test_a_faulty_dataset_is_not_remembered_as_checked(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    spoil(image_folder)
    for _ in range(2):
        with pytest.raises(ValueError, match="can't be read"):
            read_folder(image_folder, scanned=tmp_path / "images_checked.safetensors")


# --- kinds of images -----------------------------------------------------------------------------------------------


def one_image(folder, image, name="a.png", channels=None, **save):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **save)
    return read_folder(folder, channels=channels).images[0].permute(1, 2, 0).numpy().astype(int)


def test_grey_stays_grey_and_is_repeated_for_rgb(tmp_path):
    image = random_image(0, mode="L")
    assert np.array_equal(one_image(tmp_path / "d", image)[..., 0], np.asarray(image))
    assert np.array_equal(one_image(tmp_path / "d", image, channels=3), np.stack([np.asarray(image)] * 3, -1))


def test_rgb_becomes_grey_by_luma_where_asked(tmp_path):
    image = random_image(0)
    luma = np.asarray(image, float) @ [0.299, 0.587, 0.114]
    assert np.abs(one_image(tmp_path / "d", image, channels=1)[..., 0] - luma).max() <= 1


def test_transparency_is_laid_over_white(tmp_path):
    values = np.asarray(random_image(0, mode="RGBA"), float)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    got = one_image(tmp_path / "d", Image.fromarray(values.astype(np.uint8), "RGBA"))
    assert got.shape == (8, 8, 3) and np.abs(got - expected).max() <= 1


def test_a_palette_is_resolved_with_its_transparent_colour(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3, "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 100])
    colours = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 100]])
    index = np.arange(64).reshape(8, 8) % 3
    assert np.array_equal(one_image(tmp_path / "d", image), colours[index])
    colours[1] = 255
    assert np.array_equal(one_image(tmp_path / "e", image, transparency=1), colours[index])


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    got = one_image(tmp_path / "d", Image.fromarray(values))[..., 0]
    assert np.abs(got - values / 257).max() <= 0.5
    assert got[0, 0] == 0 and got[-1, -1] == 255 and abs(got.mean() - 127.5) < 1


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    got = one_image(tmp_path / "d", image, "a.tiff")
    assert got.shape == (8, 8, 3) and np.array_equal(got[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation, rotation", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, orientation, rotation):
    image = random_image(0, (8, 12))
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.rot90(np.asarray(image), rotation)
    assert np.array_equal(one_image(tmp_path / "d", image, exif=exif), expected)


def test_black_and_white_becomes_0_and_255(tmp_path):
    bits = np.arange(64).reshape(8, 8) % 2 == 0
    assert np.array_equal(one_image(tmp_path / "d", Image.fromarray(bits))[..., 0], bits * 255)


def test_one_colour_image_among_grey_ones_makes_the_dataset_colour(tmp_path):
    (tmp_path / "d").mkdir()
    random_image(0, mode="L").save(tmp_path / "d" / "a.png")
    random_image(1, mode="RGB").save(tmp_path / "d" / "b.png")
    data = read_folder(tmp_path / "d")
    assert data.channels == 3
    assert np.array_equal(data.images[0, 1].numpy(), np.asarray(random_image(0, mode="L")))


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution, shape", [(None, (6, 10)), ([4], (4, 4)), ([4, 8], (4, 8)), ([12, 6], (12, 6))])
def test_resolution_is_height_and_width(tmp_path, resolution, shape):
    (tmp_path / "d").mkdir()
    random_image(0, (6, 10)).save(tmp_path / "d" / "a.png")
    data = read_folder(tmp_path / "d", resolution=resolution)
    assert data.resolution == shape and data.images.shape == (1, 3, *shape)


def test_resizing_is_bicubic_with_antialiasing():
    image = random_image(0, (64, 64), "L")
    got = np.asarray(resize_and_crop(image, (8, 8)), int)
    assert np.array_equal(got, np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), int))
    wave = Image.fromarray(
        (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    )  # would alias to black without a filter
    smooth = np.asarray(resize_and_crop(wave, (8, 8)), float)
    assert np.abs(smooth[1:-1, 1:-1] - 127.5).max() < 2
    aliased = np.asarray(wave.resize((8, 8), Image.Resampling.NEAREST), float)
    assert np.abs(aliased - 127.5).min() > 100


def test_the_middle_is_kept_where_the_shape_differs():
    values = np.zeros((8, 24), np.uint8)
    values[:, 8:16] = 200
    assert (np.asarray(resize_and_crop(Image.fromarray(values), (8, 8))) == 200).all()


def test_images_of_the_right_size_are_not_touched():
    image = random_image(0)
    assert np.array_equal(np.asarray(resize_and_crop(to_uint8(image, 3), (8, 8))), np.asarray(image))


def test_an_image_is_opened_from_bytes_or_from_a_path(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    from_path = open_image({"bytes": None, "path": str(tmp_path / "a.png")})
    from_bytes = open_image({"bytes": (tmp_path / "a.png").read_bytes(), "path": None})
    assert np.array_equal(np.asarray(from_path), np.asarray(from_bytes))


def test_sigma_data_is_the_root_mean_square_and_not_the_standard_deviation(image_folder):
    data = read_folder(image_folder)
    x = data.images.double() / 127.5 - 1
    assert data.measure_sigma_data() == pytest.approx(x.square().mean().sqrt().item(), abs=6e-5)
    data.images = torch.full((len(data.images), 1, 8, 8), 242, dtype=torch.uint8)
    assert data.measure_sigma_data() == pytest.approx(242 / 127.5 - 1, abs=6e-5)


# --- order ---------------------------------------------------------------------------------------------------------


def take(iterator, count):
    iterator = iter(iterator)
    return [next(iterator) for _ in range(count)]


def flat(lists):
    return [index for part in lists for index in part]


@pytest.mark.parametrize("n, batch", [(20, 6), (20, 20), (7, 16), (1, 4)])
def test_each_epoch_is_a_permutation_and_no_two_are_alike(n, batch):
    indices = flat(take(KeyedOrder(n, ProcessShare(batch), seed=3), 8 * n))
    epochs = [indices[e * n : (e + 1) * n] for e in range(6)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 6:
        assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[2] == permutation(n, 3, "epoch", 2).tolist()


@pytest.mark.parametrize("world, accumulation, batch", [(2, 1, 6), (1, 3, 4), (2, 3, 2), (3, 1, 4), (12, 1, 1)])
def test_processes_and_forward_passes_share_the_rows_of_one_order(world, accumulation, batch):
    whole = take(KeyedOrder(20, ProcessShare(12), seed=0), 10)
    ranks = [
        take(KeyedOrder(20, ProcessShare(batch, accumulation, rank, world), seed=0), 10 * accumulation)
        for rank in range(world)
    ]
    for step in range(10):
        parts = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        assert flat(parts) == whole[step]


@pytest.mark.parametrize("share", [ProcessShare(6), ProcessShare(2, 3), ProcessShare(3, 1, 1, 2), ProcessShare(32)])
def test_starting_at_a_step_is_skipping_the_steps_before(share):
    skipped = take(KeyedOrder(20, share, seed=0), 15 * share.accumulation)[9 * share.accumulation :]
    assert take(KeyedOrder(20, share, seed=0, step=9), 6 * share.accumulation) == skipped


def test_another_seed_is_another_order():
    assert take(KeyedOrder(20, ProcessShare(6), seed=0), 3) != take(KeyedOrder(20, ProcessShare(6), seed=1), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_memory_do_not_change_the_batches(image_folder, monkeypatch, workers):
    in_memory = take(read_folder(image_folder, conditional=True).batches(ProcessShare(5), seed=1, step=2), 6)
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    lazy = read_folder(image_folder, conditional=True, dataloader_num_workers=workers)
    assert not torch.is_tensor(lazy.images)
    for a, b in zip(in_memory, take(lazy.batches(ProcessShare(5), seed=1, step=2), 6)):
        assert torch.equal(a["images"], b["images"]) and torch.equal(
            a["condition"]["class_labels"], b["condition"]["class_labels"]
        )


def test_a_batch_holds_the_rows_of_the_order(image_folder):
    data = read_folder(image_folder, conditional=True)
    for batch, indices in zip(take(data.batches(ProcessShare(5), seed=1), 4), KeyedOrder(12, ProcessShare(5), seed=1)):
        assert batch["images"].dtype == torch.uint8
        assert torch.equal(batch["images"], data.images[indices])
        assert torch.equal(batch["condition"]["class_labels"], data.labels[indices])


# --- streaming -----------------------------------------------------------------------------------------------------


def streamed(folder, conditional, share, batches):
    data = ImageData(DataArguments(dataset_name=str(folder), streaming=True), conditional, show_progress=False)
    return data, take(data.batches(share, seed=0), batches)


@pytest.fixture
def stream_folder(tmp_path):
    """Twenty constant images with the values 0, 10, ..., 190 and the class value // 100."""
    images = [Image.new("L", (4, 4), 10 * i) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    return write_parquet(tmp_path / "d", features, image=images, label=[i // 10 for i in range(20)])


@pytest.mark.parametrize("conditional", [False, True])
def test_a_stream_gives_all_images_once_per_epoch_with_their_labels(stream_folder, conditional):
    data, batches = streamed(stream_folder, conditional, ProcessShare(5), 8)
    values = torch.cat([batch["images"][:, 0, 0, 0] for batch in batches]).int()
    assert sorted(values[:20].tolist()) == sorted(values[20:].tolist()) == list(range(0, 200, 10))
    assert values[:20].tolist() != values[20:].tolist()
    if conditional:
        assert data.num_classes == 2
        assert torch.equal(
            torch.cat([batch["condition"]["class_labels"] for batch in batches]), (values // 100).long()
        )
    else:
        assert all(batch["condition"] == {} for batch in batches)


def test_processes_stream_disjoint_halves(stream_folder):
    parts = [streamed(stream_folder, False, ProcessShare(5, 1, rank, 2), 2)[1] for rank in range(2)]
    values = [{v for batch in part for v in batch["images"][:, 0, 0, 0].tolist()} for part in parts]
    assert len(values[0]) == len(values[1]) == 10 and not values[0] & values[1]


def test_sigma_data_of_a_stream_is_that_of_the_whole(stream_folder):
    data, _ = streamed(stream_folder, False, ProcessShare(5), 1)
    expected = np.sqrt(np.mean((np.arange(0, 200, 10) / 127.5 - 1) ** 2))
    assert data.measure_sigma_data() == pytest.approx(expected, abs=6e-5)


def test_a_stream_with_plain_labels_is_refused(tmp_path):
    folder = write_parquet(tmp_path / "d", image=[random_image(0)], label=[0])
    with pytest.raises(ValueError, match="ClassLabel"):
        streamed(folder, True, ProcessShare(1), 1)
