"""Folders of images: the files that are data, their order and their classes, whatever their names."""

import csv
import json
import os
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, features

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.listing import list_images, natural_key
from cm_diffusers.engine.data.prepare import Request, prepare
from cm_diffusers.engine.data.sources import open_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def put(folder, *names, **save):
    """Save distinct images of 4x4 pixels at the paths `names` below `folder`; returns `folder`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(name).save(path, **save)
    return folder


def picture(name):
    values = np.random.default_rng([*str(name).encode()]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values)


def train_on(folder, conditional=True, **more):
    return ImageData(DataArguments(train_data_dir=str(folder), **more), conditional, show_progress=False)


def refused(folder, match, conditional=True, **more):
    with pytest.raises(ValueError, match=match):
        train_on(folder, conditional, **more)


def names_in(folder):
    return [image.name for image in list_images(folder).images]


# --- any folder ----------------------------------------------------------------------------------------------------

WORDS = ["cat", "test tubes", "train", "val d'or", "photos [2024]", "9", "10", "a#b?c%20", "*", "été", "a.png", "x\ny"]
FORMATS = {"png": {}, "PNG": {}, "bmp": {}, "Tiff": {}, "webp": {"lossless": True}, "ppm": {}, "tga": {}}


def random_folder(root, seed):
    """Write a tree of class folders with stray files, links and archives; returns the random generator."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(WORDS)[: rng.integers(2, 6)]
    files = []
    for name in classes:
        for i in range(rng.integers(1, 4)):
            folders = [name, *rng.choice(WORDS, rng.integers(0, 3))]
            file = root.joinpath(*folders, f"{rng.choice(['train', 'img', 'test [1]', ''])}{i}{rng.integers(20)}")
            kind = str(rng.choice(list(FORMATS)))
            put(root, file.with_name(f"{file.name}.{kind}").relative_to(root), **FORMATS[kind])
            files.append(file.with_name(f"{file.name}.{kind}"))
            if rng.random() < 0.3:
                file.with_name(f"{file.name}.{rng.choice(['txt', 'json', 'npy', 'html'])}").write_text("{}")
    if rng.random() < 0.5:  # links to outside files and folders, and a circular link
        put(root.parent, "elsewhere/deep/linked.png", "elsewhere/other.png")
        (root / classes[0] / "linked folder").symlink_to(root.parent / "elsewhere")
        (root / classes[1] / "linked file.png").symlink_to(root.parent / "elsewhere" / "other.png")
        (root / classes[1] / "circle").symlink_to(root)
    if rng.random() < 0.5:  # leftovers of operating systems
        put(root, f"{classes[0]}/.hidden.png", ".thumbs/0.png", "__MACOSX/0.png")
        (root / classes[0] / "Thumbs.db").write_bytes(b"x")
    if rng.random() < 0.4:
        members = {"0.png": "inside", "more [1]/test.png": "other"}
        with zipfile.ZipFile(root / classes[0] / "images.zip", "w") as archive:
            for member, seed_name in members.items():
                with archive.open(member, "w") as file:
                    picture(seed_name).save(file, "PNG")
    return rng


def plain_walk(root):
    """Images (H, W, C) and their top folders, in order, by a walk with the standard library and Pillow."""
    found, ends = [], tuple(f".{kind.lower()}" for kind in FORMATS)
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name not in ("circle", "__MACOSX")]
        place = Path(folder).relative_to(root)
        for name in files:
            if name.endswith(".zip"):
                with zipfile.ZipFile(Path(folder, name)) as archive:
                    for member in archive.namelist():
                        found.append((*place.parts, *member.split("/"), Image.open(archive.open(member))))
            elif name[0] != "." and name.lower().endswith(ends):
                found.append((*place.parts, name, Image.open(Path(folder, name))))

    def key(entry):
        parts = [re.split("([0-9]+)", part) for part in entry[:-1]]
        return [[int(part) if part.isdecimal() else part for part in some] for some in parts], entry[:-1]

    found.sort(key=key)
    return [np.asarray(entry[-1].convert("RGB")) for entry in found], [entry[0] for entry in found]


@pytest.mark.parametrize("seed", range(20))
def test_any_folder_is_what_a_plain_walk_finds_in_training_and_prepared(tmp_path, seed):
    root = tmp_path / "photos [2024] of test"
    random_folder(root, seed)
    images, classes = plain_walk(root)
    data, source = train_on(root), open_source(root)
    ordered = sorted(set(classes), key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])
    assert source.classes == list(data.description.classes.values()) == ordered
    assert [ordered[label] for label in data.labels] == [ordered[label] for label in source.labels] == classes
    assert len(data.images) == len(source.names) == len(images) == data.description.number
    for i, image in enumerate(images):
        assert np.array_equal(data.images[i].permute(1, 2, 0).numpy(), image), source.names[i]
    (tmp_path / "out[1]").mkdir()
    prepare(source, tmp_path / "out[1]", "train", Request(source.fingerprint))
    prepared = ImageData(DataArguments(dataset_name=str(tmp_path / "out[1]")), True, show_progress=False)
    assert prepared.labels.equal(data.labels) and prepared.images.equal(data.images)
    assert prepared.description.classes == data.description.classes
    assert len(train_on(root, conditional=False).images) == len(images)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_any_folder_with_metadata_has_the_labels_of_its_rows(tmp_path, seed, kind):
    root = tmp_path / "in"
    rng = random_folder(root, seed)
    names = names_in(root)
    words = ["12", "7", "100"] if seed % 2 else ["truck", "test", "Ant"]
    rows = [{"file_name": name, "label": str(rng.choice(words)), "text": "x, y"} for name in names]
    with open(root / f"metadata.{kind}", "w", newline="", encoding="utf-8") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows[::-1])
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows[::-1])
    data = train_on(root, label_column="label")
    if seed % 2 and kind == "csv":  # numbers are numbers in CSV, but can be text in JSON
        assert [str(label) for label in data.labels.tolist()] == [row["label"] for row in rows]
    else:
        assert [data.description.classes[label] for label in data.labels.tolist()] == [row["label"] for row in rows]
    images, _ = plain_walk(root)
    assert all(np.array_equal(a.permute(1, 2, 0).numpy(), b) for a, b in zip(data.images, images, strict=True))


# --- which files ---------------------------------------------------------------------------------------------------


def test_all_endings_that_pillow_reads_are_images_in_any_case(tmp_path):
    kinds = ["a.jpeg", "b.JPG", "c.bmp", "d.tif", "e.GIF", "f.webp", "g.ppm"]
    kinds += ["h.avif"] if features.check("avif") else []
    put(tmp_path, *kinds)
    assert names_in(tmp_path) == kinds


def test_formats_that_pillow_only_recognises_are_left_out(tmp_path):
    put(tmp_path, "a.png")
    for name in ("features.h5", "clip.mpg", "photo.heic"):
        (tmp_path / name).write_bytes(b"x")
    listing = list_images(tmp_path)
    assert [image.name for image in listing.images] == ["a.png"]
    assert set(listing.left_out) == {".h5", ".mpg", ".heic"}


def test_a_line_says_what_was_read_and_what_was_left_out_each_time(tmp_path, capsys):
    put(tmp_path, "cat/0.png", "dog/1.png", "cat/.2.png", ".cache/0.png")
    (tmp_path / "cat" / "0.txt").write_text("a cat")
    for _ in range(2):
        ImageData(DataArguments(train_data_dir=str(tmp_path)), True)
        assert capsys.readouterr().out.splitlines()[0] == (
            f"Read 2 images in 2 classes (cat, dog) of {tmp_path}; left out 3: 1 .txt (cat/0.txt),"
            " 2 hidden (.cache, cat/.2.png)."
        )


@pytest.mark.parametrize("word", ["train", "test", "validation", "TEST", "val-1", "eval"])
def test_words_that_mean_splits_elsewhere_hide_no_images(tmp_path, word):
    put(tmp_path / "files", f"a photo of a {word}.png", "other.png", f"{word}.png")
    assert len(train_on(tmp_path / "files", conditional=False).images) == 3
    put(tmp_path / "classes", f"{word}/0.png", "bus/0.png", "car/0.png")
    assert list(train_on(tmp_path / "classes").description.classes.values()) == sorted([word, "bus", "car"])


def test_folders_that_are_splits_all_of_them_are_refused_with_the_way_out(tmp_path):
    put(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/1.png", "test/dog/2.png")
    refused(tmp_path, f"test, train are splits.*Give one of them, for example {tmp_path}/train", conditional=False)
    with pytest.raises(ValueError, match="test, train are splits"):
        open_source(tmp_path)
    assert len(train_on(tmp_path / "train").images) == 2
    assert len(train_on(tmp_path, split="test").images) == 2


def test_another_split_is_a_folder_or_nothing(tmp_path):
    put(tmp_path, "a.png", "b.png")
    refused(tmp_path, "no split 'test'", conditional=False, split="test")
    assert len(train_on(tmp_path, conditional=False, split="train[:50%]").images) == 1


def test_links_lead_to_images_and_circles_end(tmp_path):
    put(tmp_path / "real", "a/0.png", "b/0.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "one.png").symlink_to(tmp_path / "real" / "a" / "0.png")
    (tmp_path / "real" / "a" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "b" / "to a").symlink_to(tmp_path / "real" / "a")
    listing = list_images(tmp_path / "in")
    assert [image.name for image in listing.images] == ["all/a/0.png", "all/b/0.png", "all/b/to a/0.png", "one.png"]
    assert listing.left_out == {"linked to a folder above": ["all/b/to a/up", "all/a/up"]}


def test_a_link_that_leads_nowhere_is_an_image_that_cant_be_read(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    refused(tmp_path, r"(?s)1 of 2 images can't be read.*b.png.*No such file", conditional=False)


def test_pipes_and_folders_called_like_images_are_none(tmp_path):
    put(tmp_path, "a.png/0.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names_in(tmp_path) == ["a.png/0.png"]
    assert list_images(tmp_path).left_out == {"special": ["pipe.png"]}


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    put(tmp_path, "a.png")
    (Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))).write_bytes(b"x")
    refused(tmp_path, "not UTF-8. Rename", conditional=False)


def test_numbers_in_names_count(tmp_path):
    put(tmp_path, *(f"{c}/{i}.png" for c in ("class 10", "class 9", "class 1") for i in (10, 2)))
    data = train_on(tmp_path)
    assert list(data.description.classes.values()) == ["class 1", "class 9", "class 10"]
    assert names_in(tmp_path)[:2] == ["class 1/2.png", "class 1/10.png"]
    assert sorted(["b", "a10", "a9", "a09", "9" * 5000], key=natural_key) == ["9" * 5000, "a09", "a9", "a10", "b"]


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "train.parquet").write_bytes(b"x")
    refused(tmp_path, "holds no images; left out 2: 1 .txt .notes.txt., 1 table.s. .train.parquet.*--dataset_name")


def test_a_folder_that_cant_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/0.png", "b/1.png")
    scan = os.scandir

    def deny(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    refused(tmp_path, "Permission denied.*/b'", conditional=False)


# --- classes -------------------------------------------------------------------------------------------------------


def test_the_class_is_the_first_folder_behind_those_that_all_share(tmp_path):
    put(tmp_path, "mine/photos/cat/0.png", "mine/photos/cat/more/1.png", "mine/photos/dog/husky/2.png")
    data, source = train_on(tmp_path), open_source(tmp_path)
    assert list(data.description.classes.values()) == source.classes == ["cat", "dog"]
    assert data.labels.tolist() == source.labels == [0, 0, 1]


def test_images_beside_class_folders_are_read_but_have_no_class(tmp_path):
    put(tmp_path, "0.png", "cat/1.png", "dog/2.png")
    assert len(train_on(tmp_path, conditional=False).images) == 3
    refused(tmp_path, "'0.png' lies beside folders of images")


def test_one_folder_is_no_class(tmp_path):
    put(tmp_path, "cat/0.png", "cat/1.png")
    assert len(train_on(tmp_path, conditional=False).images) == 2
    refused(tmp_path, "Give each class a folder of its own, or add metadata.csv")


def test_the_listing_of_edm_gives_labels(tmp_path):
    put(tmp_path, "00000/a.png", "00000/b.png", "00001/c.png")
    labels = [["00000/a.png", 2], ["00000/b.png", 0], ["00001/c.png", 2]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    data = train_on(tmp_path)
    assert data.labels.tolist() == [2, 0, 2] and data.num_classes == 3
    assert data.description.empty_classes == [1]


# --- metadata ------------------------------------------------------------------------------------------------------


def test_metadata_in_folders_describe_their_own_images(tmp_path):
    put(tmp_path, "a/0.png", "b/deep/0.png")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n./0.png,one\n")
    (tmp_path / "b" / "metadata.jsonl").write_text('{"file_name": "deep/0.png", "label": "two", "more": 1}\n')
    data = train_on(tmp_path)
    assert list(data.description.classes.values()) == ["one", "two"] and data.labels.tolist() == [0, 1]


def test_images_without_a_row_are_read_and_counted_but_have_no_label(tmp_path, capsys):
    put(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,5\n")
    data = ImageData(DataArguments(train_data_dir=str(tmp_path)), False)
    assert len(data.images) == 3
    assert "with metadata.csv, 2 of them without a row there (for example 0.png)" in capsys.readouterr().out
    refused(tmp_path, "2 images have no label in metadata.csv, for example '0.png'")
    with pytest.raises(ValueError, match="2 images have no label"):
        open_source(tmp_path)


def test_rows_without_an_image_are_refused(tmp_path):
    put(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\nnotes.txt,c\n")
    refused(tmp_path, "2 files named in metadata.csv are missing or not images, .*'1.png'", conditional=False)


@pytest.mark.parametrize(
    "text, match",
    [
        ("name,label\n0.png,a\n", "metadata.csv must have a column file_name.*name, label"),
        ("file_name,label\n0.png,a\n0.png,b\n", "names '0.png' twice"),
        ("file_name,label\n0.png\n", "line 2 has 1 values"),
        ("", "it is empty"),
    ],
)
def test_metadata_that_are_none_are_refused(tmp_path, text, match):
    put(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text(text)
    refused(tmp_path, match, conditional=False)


def test_labels_of_metadata_and_of_folders_must_agree_or_one_is_asked_for(tmp_path):
    put(tmp_path, "x/0.png", "x/1.png", "y/0.png", "y/1.png")
    rows = [f"{name},{label}\n" for name, label in zip(names_in(tmp_path), "abab")]
    (tmp_path / "metadata.csv").write_text("".join(["file_name,label\n", *rows]))
    refused(tmp_path, "folders x, y give other classes than the column 'label' of metadata.csv.*--label_column label")
    assert train_on(tmp_path, label_column="label").labels.tolist() == [0, 1, 0, 1]
    (tmp_path / "metadata.csv").write_text("".join(["file_name,label\n", *rows]).replace("1.png,b", "1.png,a"))
    assert list(train_on(tmp_path).description.classes.values()) == ["a"]


def test_metadata_without_labels_leave_those_of_the_folders(tmp_path):
    put(tmp_path, "x/0.png", "y/0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x/0.png", "text": "a"}\n{"file_name": "y/0.png"}\n')
    assert list(train_on(tmp_path).description.classes.values()) == ["x", "y"]
    refused(tmp_path, "label_column 'kind' is not a column.*text", label_column="kind")


# --- archives ------------------------------------------------------------------------------------------------------


def zipped(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member in members.values():
            with archive.open(member, "w") as file:
                picture(member).save(file, "PNG")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_archives_count_as_unpacked_where_they_lie(tmp_path, streaming):
    put(tmp_path, "x/0.png")
    zipped(tmp_path / "part 1.zip", a="x/1.png", b="y/::2.png", c="__MACOSX/x/1.png")
    zipped(tmp_path / "y" / "part [2]::.ZIP", a="0.png")
    data = train_on(tmp_path, streaming=streaming)
    assert list(data.description.classes.values()) == ["x", "y"]
    if not streaming:
        assert data.labels.tolist() == [0, 0, 1, 1]
        assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), np.asarray(picture("y/::2.png")))
        assert np.array_equal(data.images[2].permute(1, 2, 0).numpy(), np.asarray(picture("0.png")))


def test_archives_that_cant_be_read_are_named(tmp_path):
    put(tmp_path, "0.png")
    (tmp_path / "images.zip").write_bytes(b"PK no zip")
    refused(tmp_path, "archive 'images.zip' can't be read.*Unpack or remove it", conditional=False)
    zipped(tmp_path / "images.zip", a="../0.png")
    refused(tmp_path, "'../0.png' would lie outside", conditional=False)


@pytest.mark.parametrize("home", [".", "images"])
def test_an_archive_that_lies_there_unpacked_is_not_read_twice(tmp_path, home):
    zipped(tmp_path / "in" / "images.zip", a="x/0.png", b="y/1.png")
    zipfile.ZipFile(tmp_path / "in" / "images.zip").extractall(tmp_path / "in" / home)
    listing = list_images(tmp_path / "in")
    assert [image.place.removeprefix("images/") for image in listing.images] == ["x/0.png", "y/1.png"]
    assert listing.left_out == {"already unpacked": ["images.zip"]}
    (tmp_path / "in" / home / "x" / "0.png").write_bytes(b"another")
    assert len(list_images(tmp_path / "in").images) == 4


def test_a_bad_member_is_named_with_its_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("b/c.png", b"no image")
    put(tmp_path, "0.png")
    refused(tmp_path, r"row 1 .*a.zip/b/c.png.: cannot identify", conditional=False)
