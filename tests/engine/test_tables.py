"""Dataset tables of any tool: their types, splits and paths, and one opener for every kind of image."""

import io
import json
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData, load_source
from cm_diffusers.engine.data.labels import order_names, read_labels
from cm_diffusers.engine.data.latents import LatentData
from cm_diffusers.engine.data.records import open_image
from cm_diffusers.engine.data.sources import open_source
from cm_diffusers.engine.data.tables import split_of, stream_tables


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def records(count=3):
    return [{"bytes": png(i), "path": None} for i in range(count)]


def read(path, conditional=True, **more):
    return ImageData(DataArguments(dataset_name=str(path), **more), conditional, show_progress=False)


def holds(data, *seeds):
    images = [image.permute(1, 2, 0).numpy() for image in data.images]
    return len(images) == len(seeds) and all(np.array_equal(a, pixels(seed)) for a, seed in zip(images, seeds))


# --- types ---------------------------------------------------------------------------------------------------------

NAMES = ["x", "y", "x"]
KINDS = {
    "large_string": pa.array(NAMES, pa.large_string()),
    "string_view": pa.array(NAMES, pa.string_view()),
    "dictionary": pa.array(NAMES).dictionary_encode(),
    "dictionary of large strings": pa.array(NAMES, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", ["struct", "binary", "large_binary"])
def test_names_and_images_in_the_types_of_other_tools(tmp_path, kind, image):
    images = records() if image == "struct" else pa.array(map(png, range(3)), getattr(pa, image)())
    try:
        pq.write_table(pa.table({"picture": images, "label": KINDS[kind]}), tmp_path / "[a] 100%.parquet")
    except pa.ArrowNotImplementedError:  # pyarrow 17 has no views
        pytest.skip(f"this pyarrow doesn't write {kind}")
    data = read(tmp_path / "[a] 100%.parquet")
    assert holds(data, 0, 1, 2) and data.labels.tolist() == [0, 1, 0]
    assert data.description.classes == {0: "x", 1: "y"}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_tables_name_files_beside_them(tmp_path, ending):
    folder = tmp_path / "a [1]"
    (folder / "images #1?").mkdir(parents=True)
    files = [f"images #1?/100%20 {i}.png" for i in range(3)]
    for i, name in enumerate(files):
        (folder / name).write_bytes(png(i))
    labels, path = ["no 10", "no 9", "no 10"], folder / f"table.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"file_name": files, "label": labels}), path)
    elif ending in ("csv", "tsv"):
        mark, lines = "," if ending == "csv" else "\t", zip(["file_name", *files], ["label", *labels])
        path.write_text("\ufeff" + "".join(f'"{name}"{mark}{label}\r\n' for name, label in lines))
    else:
        rows = [json.dumps({"file_name": a, "label": b}) for a, b in zip(files, labels)]
        path.write_text("\n".join(rows) + "\n" if ending == "jsonl" else f"[{','.join(rows)}]")
    data = read(path)
    assert holds(data, 0, 1, 2) and data.labels.tolist() == [1, 0, 1]
    source = open_source(path)
    assert source.labels == [1, 0, 1] and source.classes == list(data.description.classes.values())
    assert np.array_equal(np.asarray(source.read(2)), pixels(2))
    stream = read(path, conditional=False, streaming=True)
    assert np.array_equal(np.asarray(open_image(next(iter(stream.source))[stream.column])), pixels(0))


def test_tables_in_several_folders_name_files_relative_to_themselves(tmp_path):
    (tmp_path / "images").mkdir()
    tables = []
    for i, (folder, up) in enumerate([("a", "../.."), ("b/c", "../../..")]):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
        tables.append(tmp_path / "tables" / folder / "train.parquet")
        tables[i].parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": [f"{up}/images/{i}.png"]}), tables[i])
    assert holds(read(tmp_path / "tables", conditional=False), 0, 1)
    named = [row["image"]["path"] for row in stream_tables(tables, "train")]
    assert named == [str(tmp_path / "images" / f"{i}.png") for i in range(2)]


def test_a_missing_file_of_a_table_is_named(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("image,label\n0.png,1\ngone.png,1\n")
    with pytest.raises(ValueError, match=r"row 1 \(.*gone.png\): .*No such file"):
        read(tmp_path / "t.csv")


def test_numbers_in_a_csv_are_numbers_and_other_words_names(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    for values, features in {"3,7": "int64", "01,2": "string", "NA,None": "string", "0.5,2": "float64"}.items():
        rows = "".join(f"0.png,{value}\n" for value in values.split(","))
        (tmp_path / "t.csv").write_text(f"file_name,label\n{rows}")
        assert load_source(DataArguments(dataset_name=str(tmp_path / "t.csv"))).features["label"].dtype == features
    (tmp_path / "t.csv").write_text("file_name,label\n0.png,a\n0.png,\n")
    with pytest.raises(ValueError, match="row 1 has None"):
        read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("t.jsonl", '{"file_name": "a.png"}\n{"file_', "t.jsonl can't be read"),
        ("t.jsonl", "[1, 2]", "a JSON object per line"),
        ("t.csv", "file_name,label\na.png,1,2\n", "line 2 has 3 values"),
        ("t.parquet", "PAR1", "t.parquet can't be read"),
        ("t.arrow", "x", "t.arrow can't be read"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        read(tmp_path / name)


# --- folders of tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split",
    [
        ("0000.parquet", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("val.parquet", "validation"),
        ("a/b/Test/part 1.parquet", "test"),
        ("mine-00000-of-00001.parquet", "mine"),
        ("photos of a train.parquet", "train"),
        ("my test tubes.parquet", "train"),
    ],
)
def test_the_split_of_a_table(name, split):
    assert split_of(name) == split


def test_a_folder_of_tables_is_read_by_splits_and_says_so(tmp_path, capsys):
    folder = tmp_path / "photos [2024]"
    (folder / "data").mkdir(parents=True)
    for name, seeds in {"train-00000-of-00002": [0, 1], "train-00001-of-00002": [2], "valid": [3]}.items():
        table = pa.table({"image": [records(4)[seed] for seed in seeds], "label": seeds})
        pq.write_table(table, folder / "data" / f"{name}.parquet")
    data = ImageData(DataArguments(dataset_name=str(folder)), False)
    assert holds(data, 0, 1, 2)
    assert "train-00000-of-00002.parquet, train-00001-of-00002.parquet); left out valid.parquet." in (
        capsys.readouterr().out
    )
    assert holds(read(folder, split="validation"), 3) and holds(read(folder, split="val"), 3)
    assert holds(read(folder, split="train[1:]+val"), 1, 2, 3)
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        read(folder, split="test")


def test_more_tables_than_those_of_a_split_are_not_lost(tmp_path):
    pq.write_table(pa.table({"image": records(2)}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": records(3)[2:]}), tmp_path / "extra.parquet")
    assert holds(read(tmp_path, conditional=False), 2, 0, 1)


def test_tables_beside_images_are_refused_unless_one_is_asked_for(tmp_path):
    pq.write_table(pa.table({"image": records(2)}), tmp_path / "t.parquet")
    (tmp_path / "preview.png").write_bytes(png(7))
    with pytest.raises(ValueError, match="tables, such as t.parquet, and images, .* preview.png.*--train_data_dir"):
        read(tmp_path, conditional=False)
    images = ImageData(DataArguments(train_data_dir=str(tmp_path)), False, show_progress=False)
    assert holds(images, 7) and holds(read(tmp_path / "t.parquet", conditional=False), 0, 1)


# --- save_to_disk --------------------------------------------------------------------------------------------------


def saved(path, **splits):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    parts = {}
    for name, seeds in splits.items():
        columns = {"image": [Image.fromarray(pixels(seed)) for seed in seeds], "label": [seed % 3 for seed in seeds]}
        parts[name] = datasets.Dataset.from_dict(columns, features)
    whole = datasets.DatasetDict(parts) if "alone" not in parts else parts["alone"].with_format("numpy")
    whole.save_to_disk(str(path))
    return path


def test_folders_of_save_to_disk(tmp_path):
    data = read(saved(tmp_path / "one [1]", alone=[0, 1]))
    assert holds(data, 0, 1) and data.description.classes == {0: "a", 1: "b"} and data.description.empty_classes == [2]
    both = saved(tmp_path / "both", train=[0, 1, 2], test=[3])
    assert holds(read(both), 0, 1, 2) and holds(read(both, split="test"), 3)
    assert open_source(both, "test").labels == [0]
    stream = read(both, streaming=True)
    assert np.array_equal(np.asarray(open_image(next(iter(stream.source))["image"])), pixels(0))


def test_a_saved_dict_without_the_split_names_those_it_has(tmp_path):
    saved(tmp_path / "d", test=[0])
    with pytest.raises(ValueError, match="no split 'train'; it has test: give --split"):
        read(tmp_path / "d")


def test_endings_in_capitals(tmp_path):
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": records(2)}), tmp_path / "d" / "T.PARQUET")
    for path in (tmp_path / "d", tmp_path / "d" / "T.PARQUET"):
        assert holds(read(path, conditional=False), 0, 1)


def test_an_arrow_file(tmp_path):
    table = pa.table({"image": records(2), "label": ["9", "10"]})
    for name, write in {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}.items():
        with write(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table)
        data = read(tmp_path / f"{name}.arrow")
        assert holds(data, 0, 1) and data.description.classes == {0: "9", 1: "10"}


def test_a_copy_of_a_hub_dataset_of_several_parts_asks_for_one(tmp_path):
    header = "---\nconfigs:\n"
    for i, part in enumerate(("cats", "dogs")):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"image": records(2)[i:][:1]}), tmp_path / part / "train.parquet")
        header += f"- config_name: {part}\n  data_files: {part}/*.parquet\n"
    (tmp_path / "README.md").write_text(f"{header}---\n# Pets\n")
    with pytest.raises(ValueError, match="(?s)Config name is missing.*cats.*dogs"):
        read(tmp_path, conditional=False)
    assert holds(read(tmp_path / "dogs" / "train.parquet", conditional=False), 1)


def test_paths_that_are_not_there_are_answered_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    for name in (str(tmp_path / "gone"), "gone.parquet", "data/gone.csv"):
        with pytest.raises(ValueError, match="there is no such file or folder"):
            read(name)


def test_causes_are_said_which_the_library_hides(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        try:
            raise OSError("the disk is full")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="while generating the dataset - because: the disk is full"):
        read("somebody/something")


# --- records -------------------------------------------------------------------------------------------------------


def test_whatever_holds_an_image_is_opened(tmp_path):
    path = tmp_path / "zip: a::b?#%20.png"
    path.write_bytes(png(0))
    with zipfile.ZipFile(tmp_path / "a::b.zip", "w") as archive:
        archive.writestr("x::y/0.png", png(0))
    member = f"zip://x::y/0.png::{tmp_path}/a::b.zip"
    kinds = [png(0), bytearray(png(0)), str(path), path, member, Image.fromarray(pixels(0)), pixels(0)]
    kinds += [pixels(0).tolist(), pixels(0).transpose(2, 0, 1).tolist()]  # 6 x 5 pixels
    kinds += [{"bytes": png(0)}, {"path": str(path)}, {"bytes": None, "path": member}, {"bytes": png(0), "path": "x"}]
    for record in kinds:
        assert np.array_equal(np.asarray(open_image(record)), pixels(0)), record


@pytest.mark.parametrize("record", [None, {"bytes": None, "path": None}, {"path": None}])
def test_no_image_is_said_to_be_none(record):
    with pytest.raises(ValueError, match="there is no image"):
        open_image(record)


@pytest.mark.parametrize("record", [3, 2.5, ["a"], [1, 2], {"a": 1}])
def test_what_is_no_image_is_refused(record):
    with pytest.raises((TypeError, ValueError), match="image|pixels"):
        open_image(record)


def test_the_reason_of_every_failure_is_in_the_message(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").symlink_to(tmp_path / "nowhere")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"(?s)none of the first.*0.png.: cannot identify.*1.png.: .*No such"):
            ImageData(DataArguments(train_data_dir=str(tmp_path), streaming=streaming), False, show_progress=False)


def test_columns_of_arrays_and_lists_hold_images(tmp_path):
    plain = {"image": [pixels(i).tolist() for i in range(2)], "label": [0, 1]}
    kinds = {
        "lists": datasets.Features({"image": datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))}),
        "arrays": datasets.Features({"image": datasets.Array3D((6, 5, 3), "uint8")}),
    }
    for name, features in kinds.items():
        rows = datasets.Dataset.from_dict({"image": plain["image"]}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")
        assert holds(read(tmp_path / f"{name}.parquet", conditional=False), 0, 1)


@pytest.mark.parametrize("column", ["label", "size", "tags", "when"])
def test_columns_that_hold_no_images_are_refused_as_such(tmp_path, column):
    when = pa.array([0, 1], pa.timestamp("s"))
    table = {"image": records(2), "label": [0, 1], "size": [0.5, 1.0], "tags": [["a"], ["b"]], "when": when}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=f"image_column '{column}' holds no images but .*the dataset has: image"):
        read(tmp_path / "t.parquet", image_column=column)


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, ordered",
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["-1", "1", "0.5"], ["-1", "0.5", "1"]),
        (["class 10", "class 9"], ["class 9", "class 10"]),
        (["nan", "b", "10"], ["10", "b", "nan"]),
        (["1e3", "5"], ["5", "1e3"]),
        (["02", "2", "1"], ["1", "02", "2"]),
    ],
)
def test_the_order_of_names(names, ordered):
    assert order_names(names) == order_names(names[::-1]) == ordered


def test_labels_that_count_from_1_are_kept_and_the_gap_is_said(tmp_path, capsys):
    pq.write_table(pa.table({"image": records(3), "label": [1, 3, 1]}), tmp_path / "t.parquet")
    data = ImageData(DataArguments(dataset_name=str(tmp_path / "t.parquet")), True)
    assert data.labels.tolist() == [1, 3, 1] and data.num_classes == 4
    assert data.description.classes == {1: "1", 3: "3"} and data.description.empty_classes == [0, 2]
    assert "WARNING: no image has the label 0, 2: 2 of 4 classes are never trained." in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [[1, 0], {"a": 1}, True, 2.0, "x", None, 10**9, -1])
def test_values_that_are_no_labels_are_refused_with_their_row(wrong):
    with pytest.raises(ValueError, match=r"labels of column 'label' must be .*; row 1 has .* \(1 of 2 rows"):
        read_labels([0, wrong], datasets.Value("int64"), "label")


def test_a_dataset_is_described_by_content_and_order(tmp_path):
    rows = {"a": [0, 1, 2], "same": [0, 1, 2], "other order": [1, 0, 2], "other image": [0, 1, 3]}
    found = {}
    for name, seeds in rows.items():
        table = pa.table({"image": [records(4)[seed] for seed in seeds], "label": [0, 0, 1]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        found[name] = read(tmp_path / f"{name}.parquet").description
    assert found["a"].to_dict() == {
        "number": 3,
        "channels": 3,
        "size": [6, 5],
        "num_classes": 2,
        "classes": {"0": "0", "1": "1"},
        "fingerprint": found["a"].fingerprint,
    }
    assert found["a"] == found["same"]
    unlabelled = read(tmp_path / "a.parquet", conditional=False).description
    prints = [found[name].fingerprint for name in ("a", "other order", "other image")] + [unlabelled.fingerprint]
    assert len(set(prints)) == 4 and all(prints) and unlabelled.num_classes is unlabelled.classes is None
    vae, other = (
        AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=8, latent_channels=2) for _ in range(2)
    )
    models = (vae, vae, other)
    latents, same, others = (LatentData(read(tmp_path / "a.parquet"), model).description for model in models)
    assert (latents.number, latents.channels, latents.classes) == (3, 2, found["a"].classes)
    assert latents == same and len({latents.fingerprint, others.fingerprint, found["a"].fingerprint}) == 3
    stream = read(tmp_path / "a.parquet", conditional=False, streaming=True).description
    assert stream.number is stream.fingerprint is None and stream.size == (6, 5)
