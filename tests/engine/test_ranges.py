"""The range of pixels belongs to the whole dataset: training, streams and prepare_data.py give the same pixels."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import cm_diffusers.engine.data.images as data_module
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.data.prepare import Request, prepare
from cm_diffusers.engine.data.scan import DecodedImages
from cm_diffusers.engine.data.sources import open_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(folder, scanned=None, **settings):
    return ImageData(DataArguments(train_data_dir=str(folder), **settings), False, scanned, show_progress=False)


def all_of(data):
    return data.rows(list(range(len(data.images)))).permute(0, 2, 3, 1).numpy().astype(int)


def streamed(folder, count, monkeypatch):
    """The images of a stream in the order of its rows."""
    monkeypatch.setattr("cm_diffusers.engine.data.streams.shuffled", lambda rows, *key: rows)
    data = read(folder, streaming=True)
    batches = data.batches(ProcessShare(count), seed=0)
    return next(batches)["images"].permute(0, 2, 3, 1).numpy().astype(int)


def prepared(folder, output):
    prepare(open_source(folder), output, "train", Request(str(folder)))
    return all_of(ImageData(DataArguments(dataset_name=str(output)), False, show_progress=False))


def write(folder, images):
    """Write a file for each (ending, values) of `images`, in order; returns `folder`."""
    folder.mkdir(exist_ok=True)
    for i, (ending, values) in enumerate(images):
        if values.dtype == np.dtype(">u2"):
            image = Image.frombytes("I;16B", values.shape[::-1], values.tobytes())
        else:
            image = Image.fromarray(values)
        image.save(folder / f"{i:03d}.{ending}", **({"lossless": True} if ending == "webp" else {}))
    return folder


def random_images(rng):
    """Files of several pixel types, each with its own range, and reference values in 8 bits, (N, 8, 8, 3)."""
    types = {
        "8 bits": (("png", "bmp", "tif"), np.uint8, 255),
        "colours": (("png", "webp", "tif"), np.uint8, 255),
        "16 bits": (("png", "tif"), np.uint16, int(rng.choice([255, 4095, 65535]))),
        "big-endian": (("tif",), np.dtype(">u2"), 0),
        "32 bits": (("tif",), np.int32, int(rng.choice([255, 4095, 65535]))),
        "floats": (("tif",), np.float32, int(rng.choice([1, 255]))),
    }
    types["big-endian"] = (*types["big-endian"][:2], types["16 bits"][2])  # the same range, in another byte order
    files, expected = [], []
    for name in rng.permutation([*types] * 2):
        endings, dtype, scale = types[name]
        shape = (8, 8, 3) if name == "colours" else (8, 8)
        high = scale * (1 if scale == 1 else rng.uniform(0.2, 1))
        if name not in {file[0] for file in files}:
            high = scale  # one image of each type reaches white
        values = rng.random(shape) * high
        values.flat[0] = high
        values = (values if dtype == np.float32 else values.round()).astype(dtype)
        ending = str(rng.choice(endings))
        files.append((name, ending, values))
        expected.append(np.broadcast_to(values.reshape(8, 8, -1) * (255.0 / scale), (8, 8, 3)))
    return [(ending, values) for _, ending, values in files], np.stack(expected)


@pytest.mark.parametrize("seed", range(12))
def test_random_types_of_pixels_keep_their_values_to_one_level_wherever_they_are_read(tmp_path, monkeypatch, seed):
    files, expected = random_images(np.random.default_rng(seed))
    folder = write(tmp_path / "d", files)
    assert np.abs(all_of(read(folder)) - expected).max() < 1
    assert np.abs(prepared(folder, tmp_path / "prepared") - expected).max() < 1
    assert np.abs(streamed(folder, len(files), monkeypatch) - expected).max() < 1
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    for _ in range(2):  # the second pass uses the cached findings of the first
        assert np.abs(all_of(read(folder, tmp_path / "images_checked.safetensors")) - expected).max() < 1


SIXTEEN = [np.full((8, 8), high, np.uint16) for high in (200, 4000, 65535)]


@pytest.mark.parametrize("kept", [3, 2, 1])
def test_dark_images_come_out_dark_although_they_are_read_first(tmp_path, kept):
    folder = write(tmp_path / "d", [("png", values) for values in SIXTEEN[:kept]])
    scale = {3: 65535, 2: 4095, 1: 255}[kept]
    expected = [round(int(values[0, 0]) * 255 / scale) for values in SIXTEEN[:kept]]
    assert all_of(read(folder))[:, 0, 0, 0].tolist() == expected
    assert prepared(folder, tmp_path / "prepared")[:, 0, 0, 0].tolist() == expected


def test_only_images_in_another_range_than_their_own_are_decoded_twice(tmp_path, monkeypatch):
    folder = write(tmp_path / "d", [("png", values) for values in (*SIXTEEN, *[SIXTEEN[2]] * 4)])
    decoded, decode = [], DecodedImages.decode
    monkeypatch.setattr(DecodedImages, "decode", lambda *args: decoded.append(1) or decode(*args))
    read(folder)
    assert len(decoded) == 7 + 2


def test_how_deep_pixels_are_read_is_said(tmp_path, capsys):
    folder = write(tmp_path / "d", [("png", values) for values in SIXTEEN[:2]])
    ImageData(DataArguments(train_data_dir=str(folder)), False, tmp_path / "images_checked.safetensors")
    ImageData(DataArguments(train_data_dir=str(folder)), False, tmp_path / "images_checked.safetensors")
    assert capsys.readouterr().out.count("uint16 values from 200 to 4000 are read as 0 to 4095.") == 2
    assert prepare(open_source(folder), tmp_path / "p", "train", Request(str(folder))).ranges == [
        "uint16 values from 200 to 4000 are read as 0 to 4095."
    ]


REFUSED = {
    "a mix": (np.float32([[0.1, 0.9]]), np.float32([[0.5, 200]]), r"reach 0.9 in .*0.* but 200 in .*1.*one range"),
    "overshoot": (np.float32([[0, 1]]), np.float32([[0.5, 1.4]]), "from 0 to 1.4.*Clip or scale"),
    "negative": (np.float32([[0, 1]]), np.float32([[-1, 1]]), r"(?s)1 of 2 images.*1.*from -1 to 1; allowed"),
    "not finite": (np.float32([[0, 1]]), np.float32([[0, np.inf]]), "(?s)1 of 2 images.*1.*NaN or infinity"),
    "too much": (np.int32([[0, 1]]), np.int32([[0, 70000]]), r"(?s)1 of 2 images.*1.*from 0 to 70000; allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("reader", ["training", "stream", "prepare"])
def test_values_of_no_known_range_are_refused_with_the_image(tmp_path, case, reader):
    *values, message = REFUSED[case]
    folder = write(tmp_path / "d", [("tif", np.resize(v, (8, 8))) for v in values])
    with pytest.raises(ValueError, match=message):
        if reader == "prepare":
            prepared(folder, tmp_path / "prepared")
        else:
            read(folder, streaming=reader == "stream")
    assert not list(tmp_path.glob("prepared/train*"))


def test_arrays_in_columns_are_images_in_the_range_of_the_dataset(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (5, 8, 8, 3)).astype(np.uint16)
    (tmp_path / "d").mkdir()
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "uint16")})
    datasets.Dataset.from_dict({"image": list(values)}, features).to_parquet(tmp_path / "d" / "train.parquet")
    data = ImageData(DataArguments(dataset_name=str(tmp_path / "d")), False, show_progress=False)
    assert np.abs(all_of(data) - values / 257).max() < 1
    assert torch.is_tensor(data.images)
