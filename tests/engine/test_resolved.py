"""Resolved settings: shown before a run and saved beside it; impossible ones are refused before reading images."""

import json
import shutil

import pytest
import yaml

import cm_diffusers.engine.data.scan as scan
import cm_diffusers.engine.saved.start as start
from cm_diffusers.engine.checkpoint import newest_state
from cm_diffusers.engine.config import Known, parse_config
from cm_diffusers.engine.training.run import main, train
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers import stock_pipelines as stock
from tests.helpers.breadth import narrowed
from tests.helpers.training_runs import differences, flags, run


TEACHER = {"pretrained_teacher_model": "user/teacher"}
SHARES = {"pretrain_steps": 0.5, "stage_steps": None}


def settings_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def resume(folder, *words):
    """Resume by the run's config.yaml."""
    train(parse_config(["--config", str(folder / "config.yaml"), *map(str, words)], list(OBJECTIVES), ""))


# --- shown settings


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_dry_run_shows_what_the_settings_come_to_and_that_parses_back(method, tmp_path, capsys):
    words = flags(tmp_path / "r", method, **(TEACHER if OBJECTIVES[method].needs_teacher else {}))
    main([*words, "--dry_run"], [method], "")
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text)
    shown, given = yaml.safe_load(text), parse_config(words, [method], "")
    resolved = given.resolved()
    assert resolved.given == given and resolved.resolved() == resolved
    again = parse_config(["--config", str(tmp_path / "c.yaml"), "--dry_run", "false"], [method], "")
    assert again == resolved and again.resolved() == resolved
    left = {name for name in (f for f in OBJECTIVES[method].Options.__dataclass_fields__) if shown[name] is None}
    assert left <= {"pretrained_teacher_model", "discriminator_backbone", "w_max"} | (
        {"huber_c"} if method == "ict" else set()
    )
    assert shown["ema_half_life"] == [500.0]


@pytest.mark.parametrize(
    "method, words, expected",
    [
        ("ect", {"pretrain_steps": 0.25, "max_train_steps": 80}, {"pretrain_steps": 20, "stage_steps": 8}),
        ("ect", {"pretrain_steps": None, "max_train_steps": 80}, {"pretrain_steps": 40, "stage_steps": 5}),
        ("ect", {"pretrain_steps": None, "pretrained_model_name_or_path": "x"}, {"pretrain_steps": 0}),
        ("diffusion", {"interpolant": "trigflow"}, {"p_mean": -1.0, "p_std": 1.4}),
        ("diffusion", {"p_std": 2}, {"p_mean": -1.2, "p_std": 2.0}),
        ("sct", {"tangent_warmup_steps": 0.5}, {"tangent_warmup_steps": 3}),
        ("ctm", {}, {"trajectory": "self"}),
        ("ctm", TEACHER, {"trajectory": "teacher"}),
        ("ctm", {"gan_weight": 1, "discriminator_start_step": 0.5}, {"discriminator_start_step": 3}),
        ("ct", {"lr_warmup_steps": 0.5}, {"lr_warmup_steps": 3}),
        ("ct", {"ema_decay": 0.9}, {"ema_half_life": None, "ema_decay": [0.9]}),
        ("ct", {"push_to_hub": True}, {"hub_model_id": "r"}),
    ],
)
def test_defaults_and_shares_come_to_values(tmp_path, method, words, expected):
    if method == "ect":
        words = {"stage_steps": None, **words}
    resolved = parse_config(flags(tmp_path / "r", method, **words), [method], "").resolved().to_dict()
    assert {name: resolved[name] for name in expected} == expected


def test_what_the_data_tell_is_resolved_once_they_are_known(tmp_path):
    given = parse_config(flags(tmp_path, "ict"), ["ict"], "")
    resolved = given.resolved(Known((8, 8), 1, 64, "log_sigma"))
    found = resolved.to_dict()
    assert (found["resolution"], found["channels"], found["time_label"]) == ([8, 8], 1, "log_sigma")
    assert found["huber_c"] == 0.00054 * 8
    assert resolved.with_settings({"p_std": 3.0}).to_dict() == found | {"p_std": 3.0}


def test_a_combination_that_can_not_be_once_it_is_resolved_is_refused_at_once(tmp_path):
    settings = {"gan_weight": 1, "pretrain_steps": 4, "discriminator_start_step": 0.5}
    with pytest.raises(ValueError, match="discriminator_start_step must be at least pretrain_steps, 4"):
        parse_config(flags(tmp_path, "ctm", **settings), ["ctm"], "")


@pytest.mark.parametrize("method", narrowed(["ect", "ict", "ctm"], "ctm"))
def test_a_run_leaves_its_values_and_goes_on_by_its_command_or_by_them(method, tmp_path):
    settings = SHARES if method == "ect" else {}
    folder = run(tmp_path / "run", method, **settings)
    shown, kept = settings_of(folder), newest_state(folder)["config"]
    card = (folder / "pipeline" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    expected = {"resolution": [8, 8], "channels": 1, "time_label": "log_sigma", "ema_half_life": [500.0]}
    expected |= {
        "ect": {"pretrain_steps": 3, "stage_steps": 1},
        "ict": {"huber_c": 0.00054 * 8},
        "ctm": {"trajectory": "self"},
    }[method]
    for name, value in expected.items():
        assert shown[name] == recipe[name] == value and kept[name] == settings.get(name)
    parse_config(["--config", str(folder / "config.yaml")], [method], "")
    by_values = shutil.copytree(folder, tmp_path / "by values")
    run(folder, method, **settings, max_train_steps=6, checkpointing_steps=2)
    resume(by_values, "--output_dir", by_values)
    assert differences(folder, by_values) == []


def test_shares_and_defaults_move_with_the_length_of_a_run_as_before(tmp_path, capsys):
    folder = run(tmp_path / "run", **SHARES)
    run(folder, **SHARES, max_train_steps=12)
    assert "max_train_steps was 6, is 12 now. Schedules given as shares" in capsys.readouterr().out
    assert settings_of(folder)["pretrain_steps"] == 6 and newest_state(folder)["config"]["pretrain_steps"] == 0.5


def test_other_values_than_those_that_defaults_came_to_are_refused(tmp_path):
    folder = run(tmp_path / "run", "ict")
    with pytest.raises(ValueError, match=r"other settings: huber_c was 0.00432, is 0.1\."):
        run(folder, "ict", huber_c=0.1)
    with pytest.raises(ValueError, match=r"other settings: ema_half_life was \[500.0\], is \[1.0\]\."):
        run(folder, "ict", ema_half_life=1)


@pytest.mark.wide
def test_a_run_of_an_earlier_version_goes_on_by_the_values_that_are_shown_since(tmp_path):
    """Its checkpoints hold the given settings, as today; its config.yaml has nulls until it resumes."""
    folder = run(tmp_path / "run", **SHARES)
    old = yaml.safe_dump(newest_state(folder)["config"])
    assert "stage_steps: null" in old
    (folder / "config.yaml").write_text(old)
    resume(folder, "--max_train_steps", 7)
    assert settings_of(folder)["stage_steps"] == 1 and settings_of(folder)["pretrain_steps"] == 4
    resume(folder, "--max_train_steps", 8)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == 8


# --- refused before an image is read


@pytest.fixture
def decoded(monkeypatch):
    """The indices of the decoded images."""
    numbers, decode = [], scan.DecodedImages.__getitem__
    monkeypatch.setattr(scan.DecodedImages, "__getitem__", lambda self, i: numbers.append(i) or decode(self, i))
    return numbers


def latent_teacher(folder):
    return {"pretrained_teacher_model": stock.save("dit", folder)}


def autoencoder(folder):
    stock.autoencoder_kl().save_pretrained(folder)
    return {"vae_name_or_path": folder}


def pixel_start(folder):
    return {"pretrained_model_name_or_path": stock.save("flow", folder)}


REFUSED = {
    "no teacher": ("cd", None, {}, "cd distils a teacher"),
    "a teacher that is missing": (
        "cd",
        None,
        {"pretrained_teacher_model": "/no/where"},
        "there is no such file or folder",
    ),
    "from scratch, untaught": ("ctm", None, {"from_scratch": True}, "from_scratch needs --pretrained_teacher_model"),
    "guided, untaught": ("ect", None, {"teacher_guidance_scale": 2.0}, "teacher_guidance_scale 2 needs --pretrained"),
    "cached pixels": ("ect", None, {"cache_latents": True}, "cache_latents needs an autoencoder"),
    "cached pixels of a start": ("ect", pixel_start, {"cache_latents": True}, "cache_latents needs an autoencoder"),
    "lpips, autoencoder": ("ect", autoencoder, {"distance": "lpips"}, "distance lpips is not for latents"),
    "lpips, latent teacher": ("cd", latent_teacher, {"distance": "lpips"}, "distance lpips is not for latents"),
    "a stream": ("ect", autoencoder, {"streaming": True}, "streaming is not for latents"),
    "mirrored": ("cd", latent_teacher, {"random_flip": True}, "random_flip is not for latents"),
    "augmented": ("diffusion", autoencoder, {"augment": 0.1}, "augment is not for latents"),
}


@pytest.mark.parametrize("method, make, settings, message", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused_before_an_image_is_decoded(
    decoded, monkeypatch, tmp_path, method, make, settings, message
):
    monkeypatch.setattr("cm_diffusers.objectives.consistency.find_spec", lambda name: True)
    settings = settings | (make(tmp_path / "model") if make else {})
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", method, **settings)
    assert decoded == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": 0.1}, "learning_rate was 0.001, is 0.1"),
        ({"stage_steps": 1}, "stage_steps was 2, is 1"),
        ({"train_batch_size": 4}, "holds a run with 8 images per step"),
        ({"class_conditional": None}, "class_conditional was True, is False"),
    ],
)
def test_other_settings_are_refused_before_an_image_is_decoded(decoded, tmp_path, settings, message):
    folder = run(tmp_path / "run")
    assert decoded
    decoded.clear()
    (folder / "images_checked.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        run(folder, **settings)
    assert decoded == []


@pytest.mark.parametrize(
    "method, name, loads",
    [
        ("ect", "pretrained_model_name_or_path", 1),
        ("ctm", "pretrained_model_name_or_path", 1),
        ("cd", "pretrained_teacher_model", 1),
    ],
)
def test_a_saved_model_is_loaded_once(monkeypatch, tmp_path, method, name, loads):
    model, loaded, load = stock.save("flow", tmp_path / "model"), [], start.load_pipeline
    monkeypatch.setattr(start, "load_pipeline", lambda *args, **kwargs: loaded.append(args) or load(*args, **kwargs))
    run(tmp_path / "run", method, max_train_steps=1, **{name: model})
    assert len(loaded) == loads
