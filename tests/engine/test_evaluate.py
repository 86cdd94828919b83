"""Evaluations of tiny digit models: the numbers, refusals, cards, the search for levels, and watching a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from huggingface_hub import ModelCard
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import cm_diffusers.engine.evaluation.judge
from cm_diffusers.engine.config import DataArguments, parse_groups
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.evaluation import watch
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.evaluation.evaluate import evaluate
from cm_diffusers.engine.evaluation.judge import RealLabels
from cm_diffusers.evaluation import (
    label_agreement,
    labels_told_apart,
    load_extractor,
    measure,
    reference_features,
)
from cm_diffusers.pipelines import name_classes
from cm_diffusers.sampling import load_pipeline, sample_images, to_pil
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import run


SCRIPT = str(Path(__file__).parents[2] / "training" / "evaluate.py")
DATA = {"dataset_name": "digits", "max_train_samples": 200}
METRICS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "ect", max_train_steps=6, checkpoints_total_limit=9) / "pipeline"


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    settings = {"max_train_steps": 1, "class_conditional": False}
    return run(tmp_path_factory.mktemp("runs") / "unlabelled", **settings) / "pipeline"


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "diffusion", "diffusion", max_train_steps=1) / "pipeline"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def words(model, cache, tmp_path):
    """A function that makes command lines; None removes a default."""

    def make(**settings):
        values = {**DATA, "num_samples": 50, "batch_size": 16, "feature_extractor": "classifier"}
        values |= {"reference_cache": cache, "output_dir": tmp_path / "out", **settings}
        if not values.keys() & {"images_dir", "watch", "pretrained_model_name_or_path"}:
            values["pretrained_model_name_or_path"] = model
        lists = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
        return [str(word) for key, items in lists.items() if items != [None] for word in (f"--{key}", *items)]

    return make


@pytest.fixture
def judged(words):
    """A function that runs an evaluation in this process."""

    def judged(**settings):
        return evaluate(*parse_groups(words(**settings), (EvaluationArguments, DataArguments), "evaluate", ""))

    return judged


def features_by_hand(pipeline, seeds, extractor, **how):
    images = sample_images(pipeline, seeds, batch_size=16, **how)
    return extractor(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_the_numbers_are_those_of_the_parts(judged, model, tmp_path):
    report = judged(num_inference_steps=[1, 2], sigmas=["80,0.8"])
    data = ImageData(DataArguments(**DATA), True, show_progress=False)
    images = data.images.float() / 255
    extractor = load_extractor("classifier", None, (images, data.labels))
    reference = reference_features(images, extractor)
    pipeline = load_pipeline(str(model))
    pipeline.set_progress_bar_config(disable=True)
    by = [{"num_inference_steps": 1}, {"num_inference_steps": 2}, {"sigmas": [80, 0.8]}]
    assert [row["name"] for row in report["results"]] == ["1 step", "2 steps", "sigmas 80, 0.8"]
    assert [row["num_inference_steps"] for row in report["results"]] == [1, 2, 2]
    assert report["results"][2]["sigmas"] == [80, 0.8] and report["results"][1]["sigmas"][1] != 0.8
    for how, row in zip(by, report["results"]):
        expected = measure(features_by_hand(pipeline, range(50), extractor, **how), reference)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-6)
        assert set(METRICS) <= expected.keys()
    assert len({row["frechet_distance"] for row in report["results"]}) == 3
    assert report["extractor"] == {"name": "classifier", "fingerprint": extractor.fingerprint}
    assert report["reference"]["data_hash"] == reference.facts["data_hash"] and report["dataset"] == "digits"
    assert not any("fid" in row for row in report["results"])  # needs more than 50 images, and Inception features
    spent = report["time"]
    assert spent.pop("processes") == 1
    assert spent.keys() == {"sampling", "features", "metrics", "frechet_distance", "reference", "total"}


def test_the_file_is_the_same_again_but_for_the_time_and_names_no_folder(judged, model, tmp_path):
    texts = []
    for _ in range(2):
        report = judged(num_inference_steps=[1])
        text = (tmp_path / "out" / "metrics.json").read_text()
        assert json.loads(text) == report
        texts.append(text[: text.index('"time"')])
        assert str(model.parent) not in text
    assert texts[0] == texts[1]
    assert (tmp_path / "out" / "quality.png").read_bytes()[1:4] == b"PNG"


def test_a_folder_of_images_measures_as_the_model_that_made_them(judged, model, tmp_path):
    made = sample_images(load_pipeline(str(model)), range(50), batch_size=16, num_inference_steps=1)
    (tmp_path / "made").mkdir()
    for i, image in enumerate(made):
        to_pil(image).save(tmp_path / "made" / f"{i:03d}.png")
    [row] = judged(num_inference_steps=[1])["results"]
    [again] = judged(images_dir=tmp_path / "made", num_samples=None)["results"]
    assert again["name"] == "images" and all(again[key] == row[key] for key in METRICS)


def test_other_seeds_make_other_images(judged):
    one, other = (judged(num_inference_steps=[1], seed=seed)["results"][0] for seed in (0, 50))
    assert one["frechet_distance"] != other["frechet_distance"]


@pytest.mark.wide
def test_two_processes_measure_what_one_does(judged, words, tmp_path):
    one = judged(num_inference_steps=[1, 2], output_dir=tmp_path / "one")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, SCRIPT, *words(num_inference_steps=[1, 2], output_dir=tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("50 samples against 200 images") == 1
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["time"]["processes"] == 2 and one["time"]["processes"] == 1
    for a, b in zip(one["results"], two["results"]):
        assert a["name"] == b["name"]
        assert [a[key] for key in METRICS] == pytest.approx([b[key] for key in METRICS], rel=1e-6, abs=1e-6)


def test_processes_that_do_not_know_of_each_other_are_told(judged, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate knows of 1"):
        judged()


# --- refused before sampling


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"resolution": [9]}, r"1 x 8 x 8, but those of the dataset are 1 x 9 x 9 .*--resolution 8 8 --channels 1"),
        ({"channels": [3]}, "1 x 8 x 8, but those of the dataset are 3 x 8 x 8"),
        ({"num_samples": [32]}, "32 images are too few for the covariance of 32 features"),
        ({"search_sigmas": 2, "search_samples": 20}, "20 images are too few"),
        ({"feature_extractor": "no_such:Network"}, "'no_such:Network' can't be imported"),
        ({"sigmas": ["80", "0.8"]}, "80,0.8"),
        ({"sigmas": ["80,x"]}, "lists of numbers"),
        ({"sigmas": ["0.8,80"]}, "sigmas 0.8, 80: `sigmas` must fall"),
        ({"num_inference_steps": [0]}, r"num_inference_steps must lie in \[1, 1e12\], got 0"),
        ({"streaming": True}, "streaming applies to training only"),
        ({"augment": 0.5}, "augment applies to training only"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"watch": "runs/none", "pretrained_model_name_or_path": None}, "is not the folder of a run"),
        ({"watch": "runs/none", "images_dir": "images", "pretrained_model_name_or_path": None}, "exactly one"),
        ({"images_dir": "images", "num_inference_steps": [1]}, "sigmas apply to models"),
        ({"num_sample": 3}, "Did you mean '--num_samples'"),
    ],
)
def test_what_can_not_be_measured_is_said_before_sampling(judged, monkeypatch, settings, message):
    def sampled(*args):
        raise AssertionError("images are made")

    monkeypatch.setattr(cm_diffusers.engine.evaluation.judge.Judge, "features", sampled)
    with pytest.raises(ValueError, match=message):
        judged(**settings)


def test_the_search_needs_a_scheduler_that_keeps_levels(judged, flow_model):
    with pytest.raises(ValueError, match="needs a scheduler that stores noise levels"):
        judged(pretrained_model_name_or_path=flow_model, search_sigmas=2)


def test_the_search_does_not_replace_the_model(judged, model):
    with pytest.raises(ValueError, match="which is the model itself"):
        judged(search_sigmas=2, output_dir=model.parent)


# --- a card, a search, a run


def test_the_numbers_go_on_the_card_of_the_run(judged, model):
    report = judged(num_inference_steps=[1, 2], output_dir=None)
    card = ModelCard.load(model / "README.md")
    numbers = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert (model.parent / "metrics.json").exists()
    for row in report["results"]:
        assert numbers[f"frechet distance, {row['name']}"] == pytest.approx(row["frechet_distance"], rel=1e-4)
    assert "classifier (not FID)" in card.text and "num_samples: 50" in card.text


def test_the_card_of_the_run_does_not_name_the_folder_of_an_extractor(judged, model, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "my extractor"
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    judged(feature_extractor=folder, output_dir=model.parent)
    card, report = (model / "README.md").read_text(), model.parent / "metrics.json"
    assert "features: a local network" in card and folder.name not in card + report.read_text()
    report.unlink()


def test_numbers_do_not_go_on_the_card_of_another_model(judged, model, flow_model):
    for settings in ({"pretrained_model_name_or_path": flow_model}, {"images_dir": "images"}, {"watch": "runs/other"}):
        with pytest.raises(ValueError, match="is the folder of another model"):
            judged(output_dir=model.parent, **settings)


def test_the_search_saves_a_copy_that_takes_the_levels_it_found(judged, model, tmp_path):
    before = (model / "scheduler" / "scheduler_config.json").read_bytes()
    report = judged(search_sigmas=2, search_samples=40, batch_size=50, num_inference_steps=[1])
    search, rows = report["search"], {row["name"]: row for row in report["results"]}
    tried = search["levels_and_frechet_distances"]
    assert tried[0][:2] == search["from"] and [*search["to"], min(row[2] for row in tried)] in tried
    assert search["to"] != search["from"] and search["first_seed"] == 50  # the results have seeds 0 to 49
    assert rows.keys() == {"1 step", "2 steps", f"sigmas {', '.join(f'{s:g}' for s in search['from'])}"}
    assert rows["2 steps"]["sigmas"] == search["to"]
    copy = tmp_path / "out" / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(copy)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.default_sigmas == {"2": search["to"]}
    a, b = (sample_images(pipeline, range(3), **how) for how in ({"num_inference_steps": 2}, {"sigmas": search["to"]}))
    assert (a == b).all()
    assert (model / "scheduler" / "scheduler_config.json").read_bytes() == before
    assert "frechet distance, 2 steps" in (copy / "README.md").read_text()


def test_watching_measures_each_checkpoint_as_its_export(judged, model, tmp_path):
    report = judged(watch=model.parent, num_inference_steps=[1])
    assert [row["step"] for row in report["results"]] == [3, 6]
    [last] = judged(num_inference_steps=[1], output_dir=tmp_path / "other")["results"]
    assert all(report["results"][1][key] == last[key] for key in METRICS)
    assert report["results"][0]["frechet_distance"] != last["frechet_distance"]
    assert not (tmp_path / "out" / ".watched").exists()
    before = (tmp_path / "out" / "metrics.json").read_text()
    assert judged(watch=model.parent, num_inference_steps=[1])["results"] == report["results"]
    assert (tmp_path / "out" / "metrics.json").read_text() == before


def test_a_watch_goes_on_with_the_run_and_not_by_other_rules(judged, model, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(model.parent, folder)
    shutil.rmtree(folder / "checkpoint-6")
    assert [row["step"] for row in judged(watch=folder, num_inference_steps=[1])["results"]] == [3]
    assert "The run has stopped before its last step" in capsys.readouterr().out
    shutil.copytree(model.parent / "checkpoint-6", folder / "checkpoint-6")
    with pytest.raises(ValueError, match="results of another seed: 0 instead of 1"):
        judged(watch=folder, num_inference_steps=[1], seed=1)
    assert [row["step"] for row in judged(watch=folder, num_inference_steps=[1])["results"]] == [3, 6]
    assert "has stopped" not in capsys.readouterr().out


def test_a_series_is_not_overwritten_and_does_not_overwrite(judged, model, tmp_path):
    for file, row, settings in (("one", {}, {"watch": model.parent}), ("series", {"step": 3}, {})):
        (tmp_path / file).mkdir()
        (tmp_path / file / "metrics.json").write_text(json.dumps({"results": [{"name": "1 step", **row}]}))
        with pytest.raises(ValueError, match="metrics.json holds .* watched run. Choose another output_dir"):
            judged(output_dir=tmp_path / file, **settings)


def test_a_run_is_watched_until_it_ends(judged, model, tmp_path, monkeypatch):
    folder, waited = tmp_path / "run", []
    shutil.copytree(model.parent, folder)
    shutil.move(folder / "checkpoint-6", tmp_path)
    lock = FileLock(folder / ".lock")

    def pause(seconds):  # meanwhile the run continues
        waited.append(seconds)
        if len(waited) == 2:
            shutil.move(tmp_path / "checkpoint-6", folder)
        if len(waited) == 3:
            lock.release()

    monkeypatch.setattr(watch.time, "sleep", pause)
    with lock:
        report = judged(watch=folder, num_inference_steps=[1])
    assert [row["step"] for row in report["results"]] == [3, 6] and len(waited) == 3


def test_a_checkpoint_that_is_deleted_meanwhile_is_passed_over(model, tmp_path, monkeypatch):
    def deleted(folder, aside, settings):
        raise FileNotFoundError

    monkeypatch.setattr(watch, "copy_checkpoint", deleted)
    assert watch._next_step(model.parent, set(), tmp_path / "aside") is None


# --- guidance ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A diffusion model with a null class."""
    settings = {"model_preset": "ddpmpp_tiny", "label_dropout": 0.3, "max_train_steps": 20, "train_batch_size": 32}
    return run(tmp_path_factory.mktemp("runs") / "labelled", "diffusion", **settings) / "pipeline"


def test_guidance_is_measured_beside_none(judged, labelled):
    how = {
        "guidance_scale": [1, 2.5],
        "guidance_interval": [0.1, 10],
        "solver": "euler",
        "num_inference_steps": [3, 4],
    }
    report = judged(pretrained_model_name_or_path=labelled, **how)
    names = [f"{n} steps, euler{guidance}" for guidance in ("", ", guidance 2.5") for n in (3, 4)]
    assert [row["name"] for row in report["results"]] == names
    told = {"solver": "euler", "guidance_scale": 2.5, "guidance_interval": [0.1, 10]}
    assert [row["how"] for row in report["results"]] == [{"solver": "euler"}] * 2 + [told] * 2
    distances = [row["frechet_distance"] for row in report["results"]]
    assert len(set(distances)) == 4 and report["sampling"] == [{"solver": "euler"}, told]
    [alone] = judged(
        pretrained_model_name_or_path=labelled, **{**how, "guidance_scale": 2.5, "num_inference_steps": 4}
    )["results"]
    assert alone["frechet_distance"] == pytest.approx(distances[3], rel=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"guidance_scale": 2},
            "1 step, guidance 2: guidance_scale 2 needs a model with a null class",
        ),
        ({"guidance_interval": [0, 1]}, "guidance_interval has no effect without a --guidance_scale"),
        ({"guidance_scale": [2, 3], "search_sigmas": 2}, "searches at one guidance_scale"),
        ({"gamma": 0.5}, "gamma"),
    ],
)
def test_guidance_that_can_not_be_is_refused(judged, settings, message):
    with pytest.raises(ValueError, match=message):
        judged(num_inference_steps=1, **settings)


def test_guidance_is_for_models(judged):
    with pytest.raises(ValueError, match="guidance_scale applies to models; leave it out with images_dir"):
        judged(images_dir="images", pretrained_model_name_or_path=None, guidance_scale=2)


def test_a_series_is_not_continued_in_another_way(judged, model, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(model.parent, folder)
    shutil.rmtree(folder / "checkpoint-6")
    file, report = tmp_path / "out" / "metrics.json", judged(watch=folder, num_inference_steps=[1])
    shutil.copytree(model.parent / "checkpoint-6", folder / "checkpoint-6")
    file.write_text(json.dumps({**report, "sampling": [{"solver": "euler"}]}))
    with pytest.raises(ValueError, match="holds results of another sampling: .*euler.* instead of None"):
        judged(watch=folder, num_inference_steps=[1])
    del report["sampling"]  # as in reports of earlier versions
    file.write_text(json.dumps(report))
    assert [row["step"] for row in judged(watch=folder, num_inference_steps=[1])["results"]] == [3, 6]


def test_a_distance_that_falls_with_the_precision_is_warned_of():
    def row(name, distance, precision, **how):
        return {"name": name, "frechet_distance": distance, "precision": precision, **({"how": how} if how else {})}

    plain, guided = row("2 steps", 3.0, 0.8), {"guidance_scale": 2}
    warn = load_script("evaluate").guidance_warnings
    worse = row("2 steps, guidance 2", 2.0, 0.7, **guided)
    assert warn([plain, row("2 steps, guidance 2", 2.0, 0.9, **guided)]) == []
    assert warn([plain, row("2 steps, guidance 2", 4.0, 0.7, **guided)]) == []
    assert warn([row("4 steps", 3.0, 0.8), worse]) == []
    [warning] = warn([plain, worse])
    assert warning.startswith("WARNING: 2 steps, guidance 2: the Fréchet distance falls (3 to 2)")


@pytest.mark.wide
def test_the_guidance_that_is_best_is_found_and_measured_beside_none(judged, labelled):
    model = {"pretrained_model_name_or_path": labelled, "solver": "euler", "num_inference_steps": [4]}
    report = judged(**model, search_guidance=3, search_samples=60)
    found = report["guidance_search"]
    scales = [scale for scale, _ in found["scales_and_frechet_distances"]]
    assert scales[0] == 1 and all(1 < scale < 5 for scale in scales[1:]) and len(scales) == 11
    assert found["to"] == min(found["scales_and_frechet_distances"], key=lambda pair: pair[1])[0]
    assert found["first_seed"] == 50 and found["num_samples"] == 60 and found["num_inference_steps"] == 3
    plain = [f"{n} steps, euler" for n in (4, 3)]
    guided = [f"{name}, guidance {found['to']:g}" for name in plain]
    assert [row["name"] for row in report["results"]] == (plain if found["to"] == 1 else plain + guided)
    scale, distance = found["scales_and_frechet_distances"][1]
    [alone] = judged(
        **{**model, "num_inference_steps": 3}, guidance_scale=scale, seed=50, num_samples=60, batch_size=60
    )["results"]
    assert alone["frechet_distance"] == pytest.approx(distance, rel=1e-4)


def test_samples_are_of_the_classes_that_were_asked_for_as_often_as_by_hand(judged, labelled):
    report = judged(pretrained_model_name_or_path=labelled, num_inference_steps=[3])
    [row] = report["results"]
    data = ImageData(DataArguments(**DATA), True, show_progress=False)
    images = data.images.float() / 255
    extractor = load_extractor("classifier", None, (images, data.labels))
    pipeline = load_pipeline(str(labelled))
    pipeline.set_progress_bar_config(disable=True)
    made = features_by_hand(pipeline, range(50), extractor, num_inference_steps=3)
    asked = torch.arange(50) % 10
    assert row["label_agreement"] == label_agreement(extractor(images), data.labels, made, asked)
    real = labels_told_apart(extractor(images), data.labels)
    assert report["reference"]["label_agreement"] == pytest.approx(real, abs=1e-4) and real > 0.7
    assert "labels" in (shown := load_script("evaluate").table(report)) and f"{real:.4g} for the real images" in shown


def test_labels_are_those_of_the_same_names():
    real = RealLabels(torch.tensor([0, 1, 1]), {0: "cat", 1: "dog"})
    assert real.of([0, 1, 0], None).tolist() == [0, 1, 0]
    assert real.of([5, 3], {3: "cat", 5: "dog"}).tolist() == [1, 0]
    assert real.of([0, 2], None) is None and real.of([0], {0: "horse"}) is None


def test_a_model_without_classes_or_with_others_has_no_agreement(judged, unlabelled, labelled, capsys):
    report = judged(pretrained_model_name_or_path=unlabelled, num_inference_steps=[1])
    assert "label_agreement" not in report["results"][0]
    other = load_pipeline(str(labelled))
    name_classes(other.unet, {i: f"kind {i}" for i in range(10)})
    other.save_pretrained(labelled.parent / "named")
    report = judged(pretrained_model_name_or_path=labelled.parent / "named", num_inference_steps=[2])
    assert "label_agreement" not in report["results"][0]
    assert "Label agreement is not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "metric, steps", [("recall", [1, 2]), pytest.param("frechet_distance", [2], marks=pytest.mark.wide)]
)
def test_the_best_checkpoint_of_a_run_is_kept(judged, model, tmp_path, metric, steps):
    report = judged(watch=model.parent, num_inference_steps=steps, keep_best=metric)
    best = tmp_path / "out" / "best"
    first = {row["step"]: row[metric] for row in reversed(report["results"])}
    wanted = min(first, key=lambda step: (first[step] if metric == "frechet_distance" else -first[step], step))
    kept = json.loads((best / "metrics.json").read_text())
    assert [row["step"] for row in kept["results"]] == [wanted] and kept["kept_by"] == metric
    [alone] = judged(
        pretrained_model_name_or_path=best / "pipeline", num_inference_steps=steps[:1], output_dir=tmp_path / "other"
    )["results"]
    assert alone["frechet_distance"] == pytest.approx(kept["results"][0]["frechet_distance"], rel=1e-6)
    card = ModelCard.load(best / "pipeline" / "README.md").text
    assert f"| steps | {wanted} of" in card and model.parent.name in card


def test_the_one_that_was_best_stays_where_a_later_one_is_no_better(judged, model, tmp_path, monkeypatch):
    values = iter([0.5, 0.5])

    def measured(self, source, numbers, title):
        return dict.fromkeys(METRICS, 0.0) | {"recall": next(values)}

    monkeypatch.setattr(cm_diffusers.engine.evaluation.judge.Judge, "measure", measured)
    judged(watch=model.parent, num_inference_steps=[1], keep_best="recall")
    [kept] = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())["results"]
    assert kept["step"] == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep_best": "recall"}, "keep_best needs --watch"),
        ({"search_guidance": 2, "guidance_scale": 2}, "search_guidance finds the guidance_scale"),
        ({"search_guidance": 2, "search_sigmas": 2}, "search_guidance and search_sigmas can't run together"),
        ({"search_guidance": 2, "search_samples": 60}, "needs a model with a null class"),
        ({"images_dir": "x", "search_guidance": 2}, "search_guidance and revision need --pretrained_model"),
    ],
)
def test_searches_and_choices_that_can_not_be_are_refused(judged, settings, message):
    with pytest.raises(ValueError, match=message):
        judged(**settings)


def test_the_best_by_labels_needs_labels(judged, unlabelled):
    with pytest.raises(ValueError, match="The model has no classes, or classes that the dataset lacks"):
        judged(watch=unlabelled.parent, num_inference_steps=[1], keep_best="label_agreement")
