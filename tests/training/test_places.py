"""Folders with older files, invalid places, missing devices, and proposed commands."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.evaluation.evaluate import _check_images
from cm_diffusers.engine.places import check_place, find_device
from cm_diffusers.engine.saved.start import SavedModel, check_fit
from cm_diffusers.engine.training.run import main as train_main
from cm_diffusers.objectives import ModelSpec
from cm_diffusers.sampling import load_pipeline
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import flags, run, tensors


TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def model(tiny_unet, tmp_path):
    """A saved consistency model with random weights, as from a run."""
    pipeline = ConsistencyPipeline(tiny_unet(), MultistepConsistencyScheduler())
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run" / "pipeline"


def sample(model, folder, *words):
    script = load_script("sample")
    paths = ["--pretrained_model_name_or_path", model, "--output_dir", folder, "--device", "cpu"]
    script.sample(script.parse_args([str(word) for word in (*paths, *words)]))
    return sorted(path.name for path in (folder / "images").iterdir())


# --- folders with older files ------------------------------------------------------------------------------------


def test_samples_are_not_mixed_with_those_of_an_earlier_call(model, tmp_path):
    made = sample(model, tmp_path / "s", "--num_samples", 5)
    before = {name: (tmp_path / "s" / "images" / name).read_bytes() for name in made}
    with pytest.raises(ValueError, match=r"images holds 5 files of an earlier call\. .*--overwrite"):
        sample(model, tmp_path / "s", "--num_samples", 2, "--seed", 100)
    assert {name: (tmp_path / "s" / "images" / name).read_bytes() for name in made} == before
    names = sample(model, tmp_path / "s", "--num_samples", 2, "--seed", 100, "--overwrite")
    assert names == ["000000.png", "000001.png"]
    assert (tmp_path / "s" / "images" / names[0]).read_bytes() != before[names[0]]


def test_files_that_sample_did_not_make_are_never_deleted(model, tmp_path):
    folder = tmp_path / "s" / "images"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "holiday.png")
    with pytest.raises(ValueError, match="files that this script did not write, such as holiday.png"):
        sample(model, tmp_path / "s", "--num_samples", 1, "--overwrite")
    assert [path.name for path in folder.iterdir()] == ["holiday.png"]


def test_older_samples_stay_where_the_new_ones_can_not_be_made(model, tmp_path):
    sample(model, tmp_path / "s", "--num_samples", 3)
    for words, reason in ((["--sigmas", 0.8, 80], "sigmas"), (["--class_labels", 99], "class_labels")):
        with pytest.raises(ValueError, match=reason):
            sample(model, tmp_path / "s", "--num_samples", 1, "--overwrite", *words)
    assert len(list((tmp_path / "s" / "images").iterdir())) == 3


def test_evaluate_does_not_count_the_grid_of_sample(model, tmp_path):
    sample(model, tmp_path / "s", "--num_samples", 3)
    with pytest.raises(ValueError, match=re.escape(f"Give {tmp_path / 's' / 'images'}")):
        _check_images(EvaluationArguments(images_dir=str(tmp_path / "s")))
    _check_images(EvaluationArguments(images_dir=str(tmp_path / "s" / "images")))


def test_a_run_is_not_asked_to_end_before_where_it_is(tmp_path):
    run(tmp_path / "r", max_train_steps=6)
    before = tensors(tmp_path / "r")
    with pytest.raises(ValueError, match="holds a run at step 6, but max_train_steps is 4. Give 6 or more"):
        run(tmp_path / "r", max_train_steps=4)
    assert all(value.equal(before[key]) for key, value in tensors(tmp_path / "r").items())


# --- invalid places ----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file"


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_folder_can_not_be_or_lie_in_a_file(file, below):
    with pytest.raises(ValueError, match=re.escape(f"output_dir {str(file / below)!r} can't be a folder: {file} is")):
        check_place(file / below)
    assert file.read_text() == "x"
    check_place(file.parent / "new" / "folder")
    assert not (file.parent / "new").exists()


def test_training_in_a_file_ends_in_a_line_before_the_data_are_read(file, capsys, monkeypatch):
    monkeypatch.setattr("cm_diffusers.engine.training.build.ImageData", None)
    with pytest.raises(SystemExit) as ended:
        train_main(flags(file), ["ect"], "")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: output_dir") and "is a file" in line


def test_an_empty_output_dir_is_an_unset_variable(capsys):
    with pytest.raises(SystemExit) as ended:
        train_main(flags(""), ["ect"], "")
    assert ended.value.code == 2 and "output_dir is empty" in capsys.readouterr().err


def test_no_script_writes_into_a_file(file, model):
    with pytest.raises(ValueError, match="is a file"):
        sample(model, file, "--num_samples", 1)
    words = {
        "evaluate": ["--pretrained_model_name_or_path", model, "--dataset_name", "digits", "--output_dir", file],
        "diagnose": ["--pretrained_model_name_or_path", model, "--dataset_name", "digits", "--output_dir", file],
        "prepare_data": [file.parent, file],
        "report": [model.parent, "--output", file / "report.html"],
    }
    for name, arguments in words.items():
        with pytest.raises(SystemExit) as ended:
            load_script(name).main([str(word) for word in arguments])
        assert ended.value.code == 2, name
    convert = load_script("convert")
    with pytest.raises(ValueError, match="is a file"):
        convert.convert(convert.parse_args([str(model / "model_index.json"), str(file)]))
    assert file.read_text() == "x"


def test_a_page_can_not_be_a_folder(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_script("report").main([str(model.parent), "--output", str(tmp_path)])
    assert "is a folder. Give the name of the page" in capsys.readouterr().err


# --- devices -----------------------------------------------------------------------------------------------------


def test_the_cpu_is_there():
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps:7", "xpu", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"^device {name!r} can't be used here .*Available: cpu"):
        find_device(name)


def test_sample_and_diagnose_look_for_the_device_first(tmp_path):
    words = ["--pretrained_model_name_or_path", str(tmp_path / "none"), "--output_dir", str(tmp_path / "s")]
    script = load_script("sample")
    with pytest.raises(ValueError, match="device 'cuda:99'"):
        script.sample(script.parse_args([*words, "--device", "cuda:99"]))
    with pytest.raises(SystemExit) as ended:
        load_script("diagnose").main([*words, "--device", "cuda:99", "--dataset_name", "digits"])
    assert ended.value.code == 2 and not (tmp_path / "s").exists()


# --- options that change nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--num_inference_steps", 2, "--sigmas", 80, 1], "num_inference_steps has no effect"),
        (["--s_noise", 1.1], "s_noise has no effect without --s_churn"),
        (["--revision", "v1"], "revision has no effect"),
    ],
)
def test_options_of_sample_that_change_nothing_are_refused(model, tmp_path, words, reason):
    with pytest.raises(ValueError, match=reason):
        sample(model, tmp_path / "s", *words)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"images_dir": "x", "seed": 3}, "seed applies to models"),
        ({"watch": "x", "search_samples": 10}, "search_samples has no effect without --search_sigmas"),
        ({"watch": "x", "feature_extractor": "classifier", "feature_weights": "y"}, "feature_weights has no effect"),
        ({"pretrained_model_name_or_path": str(TRAINING), "revision": "v1"}, "revision has no effect"),
    ],
)
def test_options_of_evaluate_that_change_nothing_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        EvaluationArguments(**settings)


@pytest.mark.parametrize("words", [["--transform", "stretch"], ["--hub_private_repo"], ["--hub_timeout", "5"]])
def test_options_of_prepare_data_that_change_nothing_are_refused(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as ended:
        load_script("prepare_data").main([str(tmp_path), str(tmp_path / "out"), *words])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: {words[0][2:]}")


def test_the_help_of_the_quickstart_starts_nothing(monkeypatch, capsys):
    script = load_script("quickstart")
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--help"])
    monkeypatch.setattr(script, "train", None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and "runs/quickstart" in capsys.readouterr().out


# --- proposed commands -------------------------------------------------------------------------------------------


def proposed(report, **settings):
    return load_script("evaluate").next_command(EvaluationArguments(**settings), report)


RESULTS = [
    {"name": "2 steps", "frechet_distance": 3.0, "sigmas": [80.0, 1.4]},
    {"name": "sigmas 80, 0.8", "frechet_distance": 5.0, "sigmas": [80.0, 0.8]},
]


def test_after_an_evaluation_the_best_way_is_proposed_to_sample_the_model(model, tmp_path):
    settings = {"pretrained_model_name_or_path": str(model), "output_dir": str(tmp_path / "e")}
    command = shlex.split(proposed({"results": RESULTS}, **settings))
    assert command[:2] == ["python", "training/sample.py"] and command[-2:] == ["--num_inference_steps", "2"]
    assert len(sample(model, tmp_path / "s", "--num_samples", 1, *command[4:])) == 1
    command = shlex.split(proposed({"results": RESULTS[1:]}, **settings))
    assert command[-3:] == ["--sigmas", "80", "0.8"]
    guided = {
        **RESULTS[0],
        "name": "2 steps, guidance 1.5",
        "how": {"guidance_scale": 1.5, "guidance_interval": [0.1, 2]},
    }
    command = shlex.split(proposed({"results": [guided]}, **settings))
    assert command[4:] == ["--num_inference_steps", "2", "--guidance_scale", "1.5", "--guidance_interval", "0.1", "2"]
    command = shlex.split(proposed({"results": RESULTS[1:]}, **settings))
    assert len(sample(model, tmp_path / "t", "--num_samples", 1, *command[4:])) == 1


def test_images_without_their_model_have_no_next_command(tmp_path):
    settings = {"images_dir": str(tmp_path), "output_dir": str(tmp_path / "e")}
    assert proposed({"results": [{"name": "images", "frechet_distance": 1.0}]}, **settings) is None


def test_after_watching_a_run_its_model_is_proposed_wherever_the_numbers_went(model, tmp_path):
    command = proposed({"results": RESULTS}, watch=str(model.parent), output_dir=str(tmp_path / "elsewhere"))
    assert command == f"python training/push.py --model_dir {model}"


def test_the_folder_of_a_run_names_its_model(model):
    with pytest.raises(ValueError, match=re.escape(f"Its model is {str(model)!r}.")):
        load_pipeline(str(model.parent))
    with pytest.raises(ValueError, match="has no model_index.json.$"):
        load_pipeline(str(model.parent.parent))


class _Data:
    channels, resolution, num_classes, vae = 3, (8, 8), None, None


@pytest.mark.parametrize(
    "channels, side, advice",
    [
        (1, 8, r"set --channels 1\.$"),
        (3, 16, r"set --resolution 16 16\.$"),
        (1, 16, r"set --channels 1 --resolution 16 16\.$"),
        (4, 8, r"give the autoencoder of its latents as --vae_name_or_path"),
    ],
)
def test_a_mismatch_names_the_flag_that_mends_it(tiny_unet, channels, side, advice):
    network = tiny_unet(num_classes=None)
    network.register_to_config(in_channels=channels, sample_size=side)
    with pytest.raises(ValueError, match=advice):
        check_fit(SavedModel(network, ModelSpec(0.5)), _Data, "teacher")
