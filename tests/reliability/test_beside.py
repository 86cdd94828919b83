"""Files beside a run's checkpoints: damaged or replaced ones are reported, set aside and written again."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from cm_diffusers.engine.evaluation import evaluate
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.log import read_log as parse_log
from cm_diffusers.engine.pictures.curves import plot_losses
from cm_diffusers.engine.pictures.report import write_report
from cm_diffusers.engine.sharing.card import read_metrics, renew_card
from cm_diffusers.engine.training.run_folder import FILES, FOLDERS, OVERWRITTEN, look_over
from tests.helpers.breadth import narrowed
from tests.helpers.disks import train
from tests.helpers.training_runs import differences, flags, read_log, run


SETTINGS = {"validation_steps": 3}
RESULT = {"name": "1 step", "num_inference_steps": 1, "sigmas": [80.0], "frechet_distance": 1.5}
SOUND = {
    "metrics.json": json.dumps({"results": [RESULT], "extractor": {"name": "classifier"}}),
    "diverged.json": json.dumps({"step": 5, "settings": {"learning_rate": 0.5}}),
    "tracker.json": json.dumps({"name": "a", "id": "b", "runs": {"trackio": "c"}}),
    "quality.png": "drawn by evaluate.py",
}
CHECKED = [name for name, check in FILES.items() if check is not None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every file that can be in its folder."""
    folder = run(tmp_path_factory.mktemp("runs") / "whole", **SETTINGS)
    for name, text in SOUND.items():
        (folder / name).write_text(text)
    save_file({"latents": torch.ones(2)}, folder / "latents.safetensors")
    (folder / "tracker").mkdir()
    assert sorted(FILES) == sorted(name for name in FILES if (folder / name).is_file())
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run, stopped after step 3."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "exported.json").write_text("[3, 1, 2]")
    return folder


def assert_goes_on(folder, whole, capsys):
    capsys.readouterr()
    assert train(flags(folder, **SETTINGS)) == 0
    said = "".join(capsys.readouterr())
    assert "Resumed from step 3 of 6" in said and "Traceback" not in said
    assert differences(folder, whole) == []
    model = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (folder / model).read_bytes() == (whole / model).read_bytes()
    assert train(flags(folder, **SETTINGS)) == 0
    again = "".join(capsys.readouterr())
    assert "This run is finished" in again and "WARNING" not in again
    assert look_over(folder) == []
    return said


# --- whole runs ----------------------------------------------------------------------------------------------------


def write(content):
    def make(path):
        path.write_bytes(content)

    return make


def a_folder(path):
    path.mkdir()
    (path / "inside").write_text("x")


def a_dangling_link(path):
    path.symlink_to("nowhere")


def a_link_to_itself(path):
    path.symlink_to(path.name)


CONTENTS = {
    "empty": write(b""),
    "binary": write(bytes(range(256)) * 9),
    "other": write(b'"x"\n"y"\n'),
    "deep": write(b"[" * 100_000 + b"\n" + b"]" * 100_000),
    "cut": write(b'{"results": [{"na'),
}
KINDS = {"folder": a_folder, "pipe": os.mkfifo, "dangling link": a_dangling_link, "link to itself": a_link_to_itself}


@pytest.mark.parametrize("kind", narrowed(CONTENTS, "empty", "binary"))
def test_a_run_goes_on_whatever_its_files_hold(kind, whole, stopped, capsys):
    for name in FILES:
        CONTENTS[kind](stopped / name)
    before = (stopped / "card.json").read_bytes()
    said = assert_goes_on(stopped, whole, capsys)
    for name in CHECKED:
        assert f"{stopped / name} " in said and f"It is renamed to damaged-{name}," in said
        assert (stopped / f"damaged-{name}").read_bytes() == before
    assert ("damaged line(s) of" in said) == (kind != "empty") and "holds no line up to step 3" in said
    assert f"{stopped / 'images_checked.safetensors'} is damaged" in said
    assert [row["step"] for row in read_log(stopped)] == [4, 5, 6]
    assert (stopped / "data.json").read_bytes() == (whole / "data.json").read_bytes()


@pytest.mark.parametrize("kind", narrowed(KINDS, "folder", "dangling link"))
def test_a_run_goes_on_whatever_lies_in_the_place_of_its_files_and_folders(kind, whole, stopped, capsys):
    for name in (*FILES, *FOLDERS):
        if (stopped / name).is_dir():
            shutil.rmtree(stopped / name)
        else:
            (stopped / name).unlink(missing_ok=True)  # only text-to-image runs have a text_cache
        if name not in FOLDERS or kind != "folder":
            KINDS[kind](stopped / name)
        else:
            (stopped / name).write_text("a file")
    for name in (
        ".tmp-3",
        ".tmp-6",
        ".tmp-card.json",
        ".tmp-pipeline",
        ".tmp-images_checked.safetensors",
        ".old-pipeline",
    ):
        KINDS[kind](stopped / name)
    said = assert_goes_on(stopped, whole, capsys)
    for name in (*FILES, *FOLDERS):
        assert f"{stopped / name} " in said and os.path.lexists(stopped / f"damaged-{name}")
    assert [row["step"] for row in read_log(stopped)] == [4, 5, 6]
    assert {path.name for path in stopped.glob(".tmp-*")} == set()


def test_a_run_goes_on_where_all_but_its_checkpoints_is_missing(whole, stopped, capsys):
    for path in stopped.iterdir():
        if not path.name.startswith("checkpoint-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = assert_goes_on(stopped, whole, capsys)
    assert (
        "WARNING" not in said
        and "log.jsonl holds no line up to step 3" in said
        and not list(stopped.glob("damaged-*"))
    )


def test_links_to_files_and_folders_elsewhere_are_followed(whole, stopped, tmp_path, capsys):
    for name in ("log.jsonl", "card.json", "samples", "pipeline"):
        (stopped / name).rename(tmp_path / name)
        (stopped / name).symlink_to(tmp_path / name)
    said = assert_goes_on(stopped, whole, capsys)
    assert "WARNING" not in said and read_log(stopped) == read_log(whole)


@pytest.mark.parametrize(
    "lines, damaged",
    [
        ([b"\x00\x01\xff", b"{"], 2),
        ([b'{"step": "x"}', b'{"loss": 1}', b"[3]", b'{"step": 1}', b'{"step": true}'], 5),
        ([b"[" * 100_000], 1),
        ([b'{"step": 900, "loss": 1.0}'], 0),  # a later step, which is trained again
    ],
)
def test_damaged_lines_in_the_middle_of_a_log_are_dropped_and_said(whole, stopped, capsys, lines, damaged):
    log = stopped / "log.jsonl"
    sound = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*sound[:2], *lines, *sound[2:]]))
    before = log.read_bytes()
    said = assert_goes_on(stopped, whole, capsys)
    assert read_log(stopped) == read_log(whole)
    assert (f"{damaged} damaged line(s) of {log} are removed" in said) == bool(damaged)
    assert damaged == 0 or (stopped / "damaged-log.jsonl").read_bytes() == before


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"\0\0\0", b"[" * 100_000])
def test_a_last_line_that_was_cut_off_is_normal(whole, stopped, capsys, tail):
    log = stopped / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]) + tail)
    assert "line(s)" not in assert_goes_on(stopped, whole, capsys)
    assert read_log(stopped) == read_log(whole) and not list(stopped.glob("damaged-*"))


# --- single files --------------------------------------------------------------------------------------------------


def test_what_a_run_and_evaluate_leave_is_sound(whole):
    assert look_over(whole) == []


WRONG = {
    "metrics.json": [
        {},
        {"results": {}},
        {"results": []},
        {"results": [3]},
        {"results": [{"step": 1}]},
        {"results": [{"name": 1}], "extractor": {"name": "x"}},
        {"results": [{"name": "1 step", "step": "x"}], "extractor": {"name": "x"}},
        {"results": [{"name": "1 step", "frechet_distance": "x"}], "extractor": {"name": "x"}},
        {"results": [{"name": "1 step", "frechet_distance": None}], "extractor": {"name": "x"}},
        {"results": [{"name": "1 step", "frechet_distance": 1.0}]},
        {"results": [{"name": "1 step", "frechet_distance": 1.0}], "extractor": "x"},
    ],
    "diverged.json": [
        {},
        {"step": "x", "settings": {}},
        {"step": 3},
        {"step": 3, "settings": []},
        {"step": 3, "settings": {"seed": 1}},
    ],
    "tracker.json": [{}, {"name": "a", "id": "b"}, {"name": "a", "id": "b", "runs": 3}, {"name": "a", "runs": {}}],
    "data.json": [{}, {"number": 1}, {"number": 1, "channels": 1, "size": 3, "classes": None}, {"classes": [1]}],
    "card.json": [[], 3, None],
    "exported.json": [{}, 3, None],
    "config.yaml": [[], 3, None],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_other_json_than_a_run_leaves_is_set_aside(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / f"damaged-{name}").write_text("of an earlier time")
    (line,) = look_over(tmp_path)
    assert f"{tmp_path / name} " in line and f"It is renamed to damaged-2-{name}," in line and len(line) < 400
    assert (tmp_path / f"damaged-{name}").read_text() == "of an earlier time"
    assert json.loads((tmp_path / f"damaged-2-{name}").read_text()) == value
    assert look_over(tmp_path) == []


# --- other scripts that read them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CONTENTS, *KINDS])
def test_cards_pages_and_measurements_are_not_ended_by_a_traceback(kind, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    make = CONTENTS.get(kind) or KINDS[kind]
    (folder / "metrics.json").unlink()
    make(folder / "metrics.json")
    card = (folder / "pipeline" / "README.md").read_bytes()
    args = EvaluationArguments(pretrained_model_name_or_path=str(folder / "pipeline"))
    with pytest.raises(ValueError, match="metrics.json .*[Mm]ove it away"):
        renew_card(folder / "pipeline", "mine")
    with pytest.raises(ValueError, match="metrics.json .*Move it away"):
        evaluate._earlier_results(args)
    look_over(folder)
    (folder / "card.json").unlink()
    make(folder / "card.json")
    with pytest.raises(ValueError, match="card.json .*keeps the card that it has"):
        renew_card(folder / "pipeline", "mine")
    assert (folder / "pipeline" / "README.md").read_bytes() == card
    for name in ("log.jsonl", "data.json", "exported.json", "samples/step-0000003.png", "checkpoint-3/state.json"):
        (folder / name).unlink()
        make(folder / name)
    (run,) = write_report([folder], tmp_path / "page.html")
    assert any("log" in note for note in run.notes)
    assert any("card.json" in note for note in run.notes) == (kind != "dangling link")  # counts as missing


@pytest.mark.parametrize("facts", [{}, {"method": "ect"}, {"method": 3, "recipe": 4}, {"recipe": {}}])
def test_a_card_of_other_facts_is_not_written(whole, tmp_path, facts):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "card.json").write_text(json.dumps(facts))
    card = (folder / "pipeline" / "README.md").read_bytes()
    with pytest.raises(ValueError, match="card.json .*Move it away, and the model keeps the card"):
        renew_card(folder / "pipeline", "mine")
    assert (folder / "pipeline" / "README.md").read_bytes() == card


def test_a_series_that_lacks_metrics_is_not_gone_on_with(whole, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"results": [{"name": "1 step", "step": 3}]}))
    with pytest.raises(ValueError, match="metrics.json lacks some of the metrics of its series. Move it away"):
        evaluate._earlier_results(EvaluationArguments(watch=str(whole), output_dir=str(tmp_path)))


def test_curves_are_drawn_of_whatever_rows_there_are(tmp_path):
    rows = [{"step": 1}, {"step": 2, "loss": "x"}, {"step": 3, "loss": 2.0, "loss_by_sigma": [1], "stage": {}}]
    rows += [{"step": 4, "loss": 1.0, "loss_by_sigma": {"x": 1, "0.1-1": "y", "1-2": 1.0}, "stage": 1, "more": None}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nhalf a l")
    assert parse_log(tmp_path / "log.jsonl").rows == rows
    plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000 and read_metrics(tmp_path / "metrics.json") == ({}, {})


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_what_a_stranger_has_left_in_the_folder_is_not_written_over(tmp_path, name):
    if name == "pipeline":
        (tmp_path / name).mkdir()
        kept = tmp_path / name / "model_index.json"
    else:
        kept = tmp_path / name
    kept.write_text("theirs")
    with pytest.raises(ValueError, match=f"not the folder of a run, but holds {name}, which a run would overwrite"):
        run(tmp_path)
    assert kept.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == [name]


def test_other_files_of_a_stranger_are_no_obstacle(tmp_path):
    (tmp_path / "notes.txt").write_text("theirs")
    (tmp_path / "samples").mkdir()
    run(tmp_path, max_train_steps=1)
    assert (tmp_path / "notes.txt").read_text() == "theirs"
