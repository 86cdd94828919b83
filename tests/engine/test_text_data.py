"""Data of text-to-image training: captions from every source, and latents and prompts that are encoded once."""

import gc
import json
import threading
import weakref
import zipfile
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

from cm_diffusers.core.draws import Draws, derive_seed
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data import row_cache
from cm_diffusers.engine.data.captions import read_prompts
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.latents import encode
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.saved.text import encode_prompts
from cm_diffusers.engine.text import data as text_data_module
from cm_diffusers.engine.text import prompt_cache
from cm_diffusers.engine.text.data import PromptData, TextData, sampler_of
from cm_diffusers.engine.training.batches import as_they_are, as_trained
from tests.helpers.tiny_text import PIPELINES


CAPTIONS = ["a red circle", "two blue squares", "a green triangle", "a red circle", "two red squares"]
HALF = {"rtol": 2**-11, "atol": 2**-13}  # of 16 bits


@pytest.fixture(autouse=True)
def own_cache_and_small_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(row_cache, "SHARD", 2)


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def picture(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(path, texts=(), metadata=None, sizes=((8, 8),)):
    """A folder with a picture for each caption, text files for the first ones, and metadata."""
    path.mkdir(parents=True)
    for i in range(len(CAPTIONS)):
        picture(i, sizes[i % len(sizes)]).save(path / f"{i}.png")
    for i, text in enumerate(texts):
        (path / f"{i}.txt").write_text(text)
    if metadata is not None:
        rows = [{"file_name": f"{i}.png", **row} for i, row in enumerate(metadata)]
        (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def read(folder=None, **settings):
    source = {} if folder is None else {"train_data_dir": str(folder)}
    return ImageData(DataArguments(**source, **settings), False, show_progress=False, captioned=True)


def pixels_of(*pictures):
    return torch.stack([torch.tensor(np.array(one)).permute(2, 0, 1) for one in pictures]).float() / 127.5 - 1


def table(path, **columns):
    """The settings of a parquet file with a picture and the values of `columns` for each caption."""
    path.mkdir(parents=True)
    pictures = {"image": [picture(i) for i in range(len(CAPTIONS))]}
    datasets.Dataset.from_dict({**pictures, **columns}).cast_column("image", datasets.Image()).to_parquet(
        path / "train.parquet"
    )
    return {"dataset_name": str(path)}


# --- captions ------------------------------------------------------------------------------------------------------


def of_metadata(path, column="text"):
    return {"train_data_dir": str(folder_of(path, metadata=[{column: caption} for caption in CAPTIONS]))}


def of_metadata_csv(path):
    folder_of(path)
    lines = [f"{i}.png,{caption}" for i, caption in enumerate(CAPTIONS)]
    (path / "metadata.csv").write_text("\n".join(["file_name,what_it_shows", *lines]))
    return {"train_data_dir": str(path)}


def of_files(path):
    return {"train_data_dir": str(folder_of(path, texts=[f"\ufeff{caption}\n" for caption in CAPTIONS]))}


def of_zip(path):
    folder_of(path / "plain", texts=CAPTIONS)
    with zipfile.ZipFile(path / "all.zip", "w") as archive:
        for file in (path / "plain").iterdir():
            archive.write(file, file.name)
    return {"dataset_name": str(path / "all.zip")}


def of_lists(path):
    return table(path, prompt=[[caption, "another text"] for caption in CAPTIONS], source=["web"] * len(CAPTIONS))


def of_table_with_two_texts(path):
    settings = table(path, text=["x"] * len(CAPTIONS), blip=CAPTIONS)
    return {**settings, "caption_column": "blip"}


def of_csv_of_paths(path):
    folder_of(path)
    lines = [f"{i}.png,{caption}" for i, caption in enumerate(CAPTIONS)]
    (path / "all.csv").write_text("\n".join(["image,caption", *lines]))
    return {"dataset_name": str(path / "all.csv")}


@pytest.mark.parametrize(
    "source",
    [of_metadata, of_metadata_csv, of_files, of_zip, of_lists, of_table_with_two_texts, of_csv_of_paths],
    ids=lambda source: source.__name__,
)
def test_captions_of_every_source_follow_the_images(source, tmp_path):
    data = read(**source(tmp_path / "data"))
    assert data.captions == CAPTIONS
    for i, image in enumerate(data.images):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(i)))
    assert read(**source(tmp_path / "again"), max_train_samples=2).captions == CAPTIONS[:2]


def test_captions_of_several_datasets_are_joined(tmp_path):
    first, second = of_metadata(tmp_path / "a"), of_metadata(tmp_path / "b", "caption")
    data = read(**first, extra_datasets=[second["train_data_dir"]])
    assert data.captions == CAPTIONS * 2 and len(data.images) == 2 * len(CAPTIONS)


def test_caption_files_are_named_when_they_are_read(tmp_path, capsys):
    folder_of(tmp_path / "data", texts=CAPTIONS)
    (tmp_path / "data" / "readme.txt").write_text("x")
    args = DataArguments(train_data_dir=str(tmp_path / "data"))
    assert ImageData(args, False, captioned=True).captions == CAPTIONS
    assert "5 images of" in (said := capsys.readouterr().out)
    assert "with caption files; left out 1: 1 .txt (readme.txt)." in said
    plain = ImageData(args, False)
    assert plain.captions is None and "left out 6: 6 .txt" in capsys.readouterr().out


def test_images_have_another_fingerprint_with_other_captions(tmp_path):
    data = [
        read(folder_of(tmp_path / f"{i}", texts=texts)) for i, texts in enumerate((CAPTIONS, CAPTIONS, CAPTIONS[::-1]))
    ]
    first, same, other = (part.description.fingerprint for part in data)
    assert first == same != other and len({part.digest for part in data}) == 1


@pytest.mark.parametrize(
    "made, settings, message",
    [
        ({}, {}, "no captions found. Write the caption of each image NAME.png into a file NAME.txt"),
        ({"texts": CAPTIONS[:3]}, {}, "2 of 5 images have no caption file NAME.txt beside them: 3.png, 4.png. Add"),
        ({"texts": ["", *CAPTIONS[1:]]}, {}, r"1 of 5 captions in column 'text' are missing, empty .*row 0 .*0.png"),
        ({"metadata": [{"text": c} for c in CAPTIONS[:2]]}, {}, r"3 of 5 captions .*row 2 .*row 3 .*row 4 .*Write"),
        ({"metadata": [{"text": c} for c in CAPTIONS]}, {"caption_column": "words"}, "'words' is not .*columns: text"),
        (
            {"metadata": [{"n": 1} for _ in CAPTIONS]},
            {},
            "no column of captions found; .*columns of the dataset: none",
        ),
        ({"metadata": [{"n": 1} for _ in CAPTIONS]}, {"caption_column": "n"}, "'n' holds no texts but int64"),
        (
            {"metadata": [{"a": "x", "b": "y"} for _ in CAPTIONS]},
            {},
            "give --caption_column. The text columns of the dataset: a, b",
        ),
        (
            {"texts": CAPTIONS, "metadata": [{"text": c} for c in CAPTIONS]},
            {},
            "captions in the column 'text' of metadata.jsonl and in text files .* --caption_column text",
        ),
        ({"texts": CAPTIONS}, {"streaming": True}, "captions can't be read from a stream.*Leave out --streaming"),
    ],
)
def test_captions_that_are_missing_or_wrong_are_named(tmp_path, made, settings, message):
    with pytest.raises(ValueError, match=message):
        read(folder_of(tmp_path / "data", **made), **settings)


def test_a_column_decides_between_metadata_and_text_files(tmp_path):
    folder = folder_of(tmp_path / "data", CAPTIONS[::-1], [{"text": caption} for caption in CAPTIONS])
    assert read(folder, caption_column="text").captions == CAPTIONS


def test_captions_that_are_no_texts_are_named_by_their_rows(tmp_path):
    lists = [["a"], [], ["b", "c"], [""], ["d"]]
    with pytest.raises(ValueError, match=r"2 of 5 captions in column 'text' .*: row 1.*, row 3"):
        read(**table(tmp_path / "data", text=lists))


def test_a_caption_file_of_another_encoding_is_named(tmp_path):
    folder = folder_of(tmp_path / "data", CAPTIONS)
    (folder / "3.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match="the caption file of 3.png is not UTF-8"):
        read(folder)


def test_prompts_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\n  two blue squares  \n\t\ngrün\u2028e Kreise".encode())
    assert read_prompts(file) == ["a red circle", "two blue squares", "grün\u2028e Kreise"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "prompts '.*p.txt' can't be read: No such file or directory. Check the path."),
        (b"", "has no prompts. Write a prompt in each line."),
        (b"\n \n", "has no prompts"),
        ("grün".encode("latin-1"), "is not a text file in UTF-8: .* Give a file with a prompt in each line."),
        (bytes(9), "is not a text file in UTF-8"),
    ],
)
def test_files_without_prompts_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")


# --- images with captions ------------------------------------------------------------------------------------------


def text_data(tmp_path, pipe, said=None, sizes=((8, 8),), captions=CAPTIONS, settings=None, **shared):
    folder = tmp_path / "data"
    if not folder.exists():
        folder_of(folder, captions, sizes=sizes)
    images = read(folder, **(settings or {}))
    say = (lambda line: None) if said is None else said.append
    return TextData(images, pipe, tmp_path / "cache", **{"say": say, "vae_batch_size": 3, **shared})


def first_batches(data, share=None, seed=0, step=0, count=6):
    batches = data.batches(share or ProcessShare(2), seed, step)
    return [next(batches) for _ in range(count)]


def test_latents_and_embeddings_are_those_of_the_images_and_their_captions(tmp_path, pipe):
    fresh = encode_prompts(pipe, CAPTIONS)
    data = text_data(tmp_path, pipe)
    latents = encode(pipe.vae, pixels_of(*map(picture, range(5))))
    assert (len(data.images), data.channels, data.resolution) == (5, 4, (4, 4)) and data.shapes == set()
    assert data.labels is None and data.num_classes is None and data.vae is pipe.vae
    for i in range(len(CAPTIONS)):
        torch.testing.assert_close(data.rows([i])[0], latents[i], **HALF)
    assert data.measure_sigma_data() == pytest.approx(latents.square().mean().sqrt().item(), rel=1e-3)
    seen = []
    for raw in first_batches(data, ProcessShare(5), count=1):
        assert raw["images"].dtype == torch.float32 and raw["condition"]["prompt"].dtype == torch.int64
        batch = as_they_are(raw, data, torch.device("cpu"))
        for j, latent in enumerate(batch.samples):
            i = (latents - latent).flatten(1).norm(dim=1).argmin()
            seen.append(int(i))
            assert batch.condition.entries.keys() == fresh.entries.keys()
            for name, entry in batch.condition.entries.items():
                torch.testing.assert_close(entry[j], fresh.entries[name][i], rtol=1e-3, atol=1e-3)
    assert sorted(seen) == list(range(5))
    for name, null in fresh.nulls.items():
        torch.testing.assert_close(data.nulls[name], null, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.condition.nulls[name], data.nulls[name])
    assert data.description.number == 5 and data.description.size == (4, 4)


def test_the_encoders_are_gone_and_no_network_is_called_for_batches(tmp_path, pipe):
    encoders = [weakref.ref(pipe.text_encoder)]
    encoders += [weakref.ref(pipe.text_encoder_2)] if hasattr(pipe, "text_encoder_2") else []
    data = text_data(tmp_path, pipe)
    gc.collect()
    assert [encoder() for encoder in encoders] == [None] * len(encoders)
    data.vae.encode = pipe.unet.forward = None
    assert len(first_batches(data)) == 6


def test_a_second_call_reads_what_the_first_one_made(tmp_path):
    first = first_batches(text_data(tmp_path, PIPELINES["sd"]()))
    pipe = PIPELINES["sd"]()
    pipe.vae.encode = pipe.encode_prompt = None
    second = first_batches(text_data(tmp_path, pipe))
    for a, b in zip(first, second):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["condition"]["prompt"], b["condition"]["prompt"])


def test_batches_depend_on_the_seed_alone_and_not_on_the_number_of_processes(tmp_path):
    one = first_batches(text_data(tmp_path, PIPELINES["sdxl"]()), ProcessShare(4), seed=3)
    parts = [text_data(tmp_path, PIPELINES["sdxl"](), rank=rank, world=2) for rank in range(2)]
    two = [first_batches(part, ProcessShare(2, 1, rank, 2), seed=3) for rank, part in enumerate(parts)]
    for whole, *halves in zip(one, *two):
        assert torch.equal(whole["images"], torch.cat([half["images"] for half in halves]))
        for name in ("prompt", "sizes"):
            joined = torch.cat([half["condition"][name] for half in halves])
            assert torch.equal(whole["condition"][name], joined)
    later = first_batches(parts[0], ProcessShare(4), seed=3, step=2, count=1)[0]
    assert torch.equal(later["images"], one[2]["images"])
    others = first_batches(parts[0], ProcessShare(4), seed=4)
    assert not all(torch.equal(a["images"], b["images"]) for a, b in zip(one, others))


def test_two_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "without_warnings", nullcontext)  # it is global, and these are threads
    folder_of(tmp_path / "data", CAPTIONS)
    pipes = [PIPELINES["sd"]() for _ in range(2)]
    barrier, counts, made = threading.Barrier(2), [0, 0], [None, None]

    def process(rank):
        pipe, real = pipes[rank], pipes[rank].vae.encode

        def counted(pixels):
            counts[rank] += len(pixels)
            return real(pixels)

        pipe.vae.encode = counted
        made[rank] = text_data(tmp_path, pipe, rank=rank, world=2, wait=lambda: barrier.wait(60))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [3, 2]  # shards of 2, 2 and 1
    assert torch.equal(made[0].rows(range(5)), made[1].rows(range(5)))


def test_the_images_leave_memory_once_they_are_encoded(tmp_path):
    images = read(folder_of(tmp_path / "data", CAPTIONS))
    seen = weakref.ref(images)
    data = TextData(images, PIPELINES["sd"](), tmp_path / "cache", say=lambda line: None)
    del images
    gc.collect()
    assert seen() is None and len(data.images) == 5


def test_prompts_that_are_cut_are_said_once_with_an_example(tmp_path):
    long, said = " ".join(["a red circle"] * 6), []
    captions = [long, *CAPTIONS[1:]]
    text_data(tmp_path, PIPELINES["sd"](), said, captions=captions)
    assert len(said) == 1 and said[0].startswith("WARNING: 1 of 5 prompts have more than 12 tokens.")
    assert repr(long) in said[0]
    text_data(tmp_path, PIPELINES["sd"](), said, captions=captions)
    assert len(said) == 1


def test_other_captions_and_other_autoencoders_change_the_fingerprint_but_captions_keep_the_latents(tmp_path):
    first = text_data(tmp_path, PIPELINES["sd"]())
    (tmp_path / "data" / "0.txt").write_text("a blue circle")
    said, pipe = [], PIPELINES["sd"]()
    pipe.vae.encode = None
    other = text_data(tmp_path, pipe, said)
    assert other.description.fingerprint != first.description.fingerprint
    assert len(said) == 1 and "also holds caches of other data or of another teacher" in said[0]
    assert f"can be deleted: prompts/{first._prompts.key[:16]}." in said[0]
    pipe = PIPELINES["sd"]()
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1
    changed = text_data(tmp_path, pipe)
    assert changed.description.fingerprint != other.description.fingerprint
    assert not torch.equal(changed.rows([0]), other.rows([0]))


def test_another_network_of_the_teacher_changes_the_fingerprint_but_keeps_latents_and_embeddings(tmp_path):
    first, pipe = text_data(tmp_path, PIPELINES["sd"]()), PIPELINES["sd"]()
    with torch.no_grad():
        next(pipe.unet.parameters()).view(-1)[0] += 1
    pipe.vae.encode, said = None, []
    other = text_data(tmp_path, pipe, said)
    assert other.description.fingerprint != first.description.fingerprint and not said


@pytest.mark.parametrize("kind", PIPELINES)
def test_buckets_give_batches_of_one_shape_with_its_sizes(tmp_path, kind):
    pipe, sizes = PIPELINES[kind](), ((16, 16), (12, 20), (20, 12))
    data = text_data(tmp_path, pipe, sizes=sizes, settings={"aspect_ratio_buckets": True, "resolution": [16]})
    assert data.resolution == (8, 8) and data.shapes == {(8, 8), (6, 10), (10, 6)}
    shapes, prompts = set(), set()
    for raw in first_batches(data, count=12):
        shape = tuple(raw["images"].shape[2:])
        shapes.add(shape)
        prompts |= set(raw["condition"]["prompt"].tolist())
        batch = as_they_are(raw, data, torch.device("cpu"))
        if kind == "sdxl":
            height, width = (2 * side for side in shape)
            assert batch.condition.entries["sizes"].tolist() == [[height, width, 0, 0, height, width]] * 2
        else:
            assert "sizes" not in batch.condition.entries
    assert shapes == data.shapes and len(prompts) == len(set(CAPTIONS))
    for i, size in enumerate(sizes):
        torch.testing.assert_close(data.rows([i]), encode(pipe.vae, pixels_of(picture(i, size))), **HALF)
    assert data.measure_sigma_data() > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"random_flip": True}, "random_flip is not for latents: mirrored latents"),
        ({"random_crop": True}, "random_crop is not for latents: images are encoded once"),
        ({"channels": 1}, "the autoencoder takes images of 3 channels, the dataset gives 1: set --channels 3"),
        ({"resolution": [8, 12]}, "resolution must be multiples of 8, .* got 8 x 12"),
    ],
)
def test_settings_that_latents_exclude_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        text_data(tmp_path, PIPELINES["sd"](), settings=settings)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prompts_are_dropped_with_the_asked_probability_keyed_by_the_row(tmp_path, pipe, share):
    data = text_data(tmp_path, pipe)
    args = DataArguments(train_data_dir="x", proportion_empty_prompts=share)
    config = SimpleNamespace(data=args, model=SimpleNamespace(label_dropout=0.0))
    raw = {"images": data.rows([1] * 400), "condition": {name: e[[1] * 400] for name, e in data.condition.items()}}
    batch = as_they_are(raw, data, torch.device("cpu"))
    trained = as_trained(batch, Draws(0, 0, range(400)), config, None).condition
    dropped = (trained.entries["text"] == trained.nulls["text"]).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.07)
    kept = trained.rows(~dropped).entries
    assert all(torch.equal(kept[name], entry[~dropped]) for name, entry in batch.condition.entries.items())
    if "sizes" in trained.entries:
        assert torch.equal(trained.entries["sizes"], batch.condition.entries["sizes"])
        assert torch.equal((trained.entries["pooled"] == trained.nulls["pooled"]).all(1), dropped)
    half = as_trained(
        SimpleNamespace(samples=batch.samples[200:], condition=batch.condition.rows(slice(200, None))),
        Draws(0, 0, range(200, 400)),
        config,
        None,
    ).condition
    assert torch.equal(half.entries["text"], trained.entries["text"][200:])


# --- prompts alone -------------------------------------------------------------------------------------------------


PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def prompt_data(tmp_path, pipe, said=None, prompts=PROMPTS, scale=3.0, seed=5, settings=None, **shared):
    args = DataArguments(prompts="prompts.txt", **(settings or {}))
    say = (lambda line: None) if said is None else said.append
    return PromptData(args, prompts, pipe, scale, seed, tmp_path / "cache", say=say, **{"batch_size": 2, **shared})


def noise_of(rows, shape, seed=5):
    seeds = [derive_seed(seed, "teacher noise", row) for row in rows]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_latents_are_the_stock_pipeline_s_own_samples_of_the_prompts(tmp_path, pipe, scale):
    own = DDIMScheduler.from_config(pipe.scheduler.config)
    before, pipe.scheduler = pipe.scheduler, own
    pipe.set_progress_bar_config(disable=True)
    noise, options = noise_of(range(3), (4, 4, 4)), {"guidance_scale": scale, "num_inference_steps": 25}
    stock = pipe(PROMPTS, latents=noise, output_type="latent", height=8, width=8, **options).images
    pipe.scheduler = before
    data = prompt_data(tmp_path, pipe, scale=scale)
    assert pipe.scheduler is before and pipe.text_encoder is None
    assert (len(data.images), data.channels, data.resolution) == (3, 4, (4, 4))
    difference = (data.rows(range(3)) - stock).abs().max() / stock.abs().max()
    assert difference < 5e-3  # embeddings and latents of 16 bits
    assert data.condition["prompt"].tolist() == [0, 1, 2]


def test_the_number_of_samples_decides_how_often_prompts_are_sampled(tmp_path):
    pipe = PIPELINES["sdxl"]()
    data = prompt_data(tmp_path, pipe, settings={"max_train_samples": 5, "resolution": [8, 16]})
    assert data.condition["prompt"].tolist() == [0, 1, 2, 0, 1] and data.resolution == (4, 8)
    assert data.condition["sizes"].tolist() == [[8, 16, 0, 0, 8, 16]] * 5
    assert not torch.allclose(data.rows([0]), data.rows([3]), atol=0.1)  # other noise
    fewer = prompt_data(tmp_path / "fewer", PIPELINES["sd"](), settings={"max_train_samples": 2})
    assert fewer.condition["prompt"].tolist() == [0, 1]
    twice = prompt_data(tmp_path / "twice", PIPELINES["sd"](), prompts=["a red circle"] * 2)
    assert twice.condition["prompt"].tolist() == [0, 0] and len(twice.images) == 2


def change_a_weight(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-3


def change_the_scheduler(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")


@pytest.mark.parametrize(
    "other",
    [{"seed": 6}, {"scale": 2.0}, {"settings": {"resolution": [16]}}, change_a_weight, change_the_scheduler],
    ids=["seed", "scale", "size", "weight", "scheduler"],
)
def test_the_samples_of_another_teacher_or_setting_are_never_read(tmp_path, other, monkeypatch):
    monkeypatch.setattr(text_data_module, "TEACHER_STEPS", 2)
    first = prompt_data(tmp_path, PIPELINES["sd"]())
    again, said = prompt_data(tmp_path, PIPELINES["sd"]()), []
    assert again.images.caches[0].folder == first.images.caches[0].folder
    assert again.description == first.description
    pipe = PIPELINES["sd"]()
    if callable(other):
        other(pipe)
    changed = prompt_data(tmp_path, pipe, said, **({} if callable(other) else other))
    assert changed.images.caches[0].folder != first.images.caches[0].folder
    assert changed.description.fingerprint != first.description.fingerprint
    assert len(said) == 1 and f"can be deleted: samples/{first.images.caches[0].key[:16]}." in said[0]


def test_a_stopped_call_continues_with_the_missing_samples(tmp_path):
    whole = prompt_data(tmp_path, PIPELINES["sd"]())
    pipe = PIPELINES["sd"]()
    shards = sorted(whole.images.caches[0].folder.iterdir())
    expected = whole.rows(range(3))
    shards[1].unlink()
    calls, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    data = prompt_data(tmp_path, pipe)
    assert len(calls) == 25  # one batch of the missing shard
    assert torch.equal(data.rows(range(3)), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"aspect_ratio_buckets": True}, "aspect_ratio_buckets needs images, and prompts has none"),
        ({"extra_datasets": ["digits"]}, "extra_datasets needs images, and prompts has none"),
        ({"random_flip": True}, "random_flip needs images"),
        ({"caption_column": "text"}, "caption_column needs images"),
        ({"channels": 3}, "channels needs images"),
        ({"max_image_pixels": 9}, "max_image_pixels needs images"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers needs images"),
        ({"resolution": [12]}, "resolution must be multiples of 8, .* got 12 x 12"),
    ],
)
def test_settings_that_need_images_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prompt_data(tmp_path, PIPELINES["sd"](), settings=settings)


def test_latents_are_never_clipped(tmp_path):
    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear")  # its config says nothing of clipping
    assert sampler_of(euler).config.clip_sample is False
    assert sampler_of(DDIMScheduler(clip_sample=True)).config.clip_sample is False


def test_schedules_that_ddim_does_not_know_by_name_are_sampled():
    teacher = DDPMScheduler(beta_schedule="sigmoid")
    torch.testing.assert_close(sampler_of(teacher).alphas_cumprod, teacher.alphas_cumprod, rtol=1e-6, atol=0)
