"""Every given setting has an effect, or the run is refused; a flag overrides all settings that answer its question."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.training.optimisers import LearningRate
from cm_diffusers.engine.training.run import main, train
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.options import Length, phases, steps_of


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TEACHER = ("--pretrained_teacher_model", "user/teacher")
STUDENT = ("--pretrained_model_name_or_path", "user/model")
# steps by recipe: pretraining, a stage, learning rate warm-up, tangent warm-up
LENGTHS = {
    "afhqv2_cdm": (None, None, 78125, None),
    "afhqv2_edm": (None, None, 39062, None),
    "cifar10_8_minutes": (4000, 800, 280, None),
    "cifar10_cd": (None, None, 19531, None),
    "cifar10_cdm_cond": (None, None, 19531, None),
    "cifar10_cdm_uncond": (None, None, 19531, None),
    "cifar10_ct": (None, None, 19531, None),
    "cifar10_ctm_small": (0, None, 500, None),
    "cifar10_diffusion_small": (None, None, 500, None),
    "cifar10_ect": (0, 25000, 0, None),
    "cifar10_ect_small": (10000, 1250, 500, None),
    "cifar10_edm_cond": (None, None, 19531, None),
    "cifar10_edm_uncond": (None, None, 19531, None),
    "cifar10_mean_flow": (None, None, 10000, None),
    "cifar10_scd": (None, None, 0, 10000),
    "cifar10_sct": (None, None, 0, 10000),
    "cifar10_trigflow": (None, None, 20000, None),
    "digits_diffusion": (None, None, 100, None),
    "digits_ect": (1600, 680, 100, None),
    "ffhq_edm": (None, None, 39062, None),
    "imagenet64_edm": (None, None, 2441, None),
    "mnist_cd_small": (None, None, 100, None),
    "mnist_cdm_small": (None, None, 100, None),
    "mnist_ct_small": (None, None, 100, None),
    "mnist_ctm": (0, None, 1000, None),
    "mnist_ctm_scratch_small": (1500, None, 100, None),
    "mnist_ctm_small": (0, None, 100, None),
    "mnist_diffusion": (None, None, 1000, None),
    "mnist_diffusion_small": (None, None, 100, None),
    "mnist_ecd_small": (0, 380, 100, None),
    "mnist_ect": (50000, 6250, 1000, None),
    "mnist_ect_small": (900, 390, 100, None),
    "mnist_ict_small": (None, None, 100, None),
    "mnist_mean_flow_small": (None, None, 100, None),
    "mnist_scd": (None, None, 0, 1000),
    "mnist_scd_small": (None, None, 100, 200),
    "mnist_sct_small": (None, None, 100, 1000),
    "mnist_trigflow_small": (None, None, 100, None),
}


def parse(*argv, method="ect"):
    return parse_config([str(word) for word in argv], [method], "")


def of_digits(*argv, method="ect"):
    return parse("--dataset_name", "digits", *argv, method=method)


def of_file(path, *argv, method="ect", **values):
    path.write_text(yaml.safe_dump(values))
    return parse("--config", path, *argv, method=method)


def recipe(name, *argv):
    method = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["method"]
    return parse("--config", CONFIGS / f"{name}.yaml", *argv, method=method)


def lengths(config):
    run, options = config.resolved().run, config.resolved().options
    names = ("pretrain_steps", "stage_steps", "lr_warmup_steps", "tangent_warmup_steps")
    return tuple(getattr(run, name, getattr(options, name, None)) for name in names)


# --- lengths as shares of the run --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_the_shares_of_a_recipe_are_the_steps_that_it_had(name):
    assert lengths(recipe(name)) == LENGTHS[name]


def test_recipes_state_lengths_as_shares_alone():
    for path in CONFIGS.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        part = OBJECTIVES[values["method"]].Options
        own = {f.name for f in part.__dataclass_fields__.values() if f.type in (Length, Length | None)}
        given = [values[name] for name in own | {"lr_warmup_steps"} if name in values]
        assert all(value == 0 or 0 < value < 1 for value in given), path
        assert path.stem in LENGTHS or not given


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_recipe_is_shortened_by_one_flag_and_keeps_its_proportions(name):
    config = recipe(name, "--max_train_steps", 40)
    long, total = lengths(recipe(name)), recipe(name).run.max_train_steps
    for short, full in zip(lengths(config), long):
        assert full is None or abs(short / 40 - full / total) <= 0.5 / 40


def test_a_share_scales_with_the_run_and_a_number_of_steps_does_not():
    assert [steps_of(0.3, total) for total in (10, 1000)] == [3, 300]
    assert [steps_of(3, total) for total in (10, 1000)] == [3, 3]
    assert steps_of(0.99, 2) == 1  # a share is never the whole run
    assert steps_of(0, 10) == steps_of(None, 10) == 0


def test_a_share_of_warm_up_is_that_of_as_many_steps():
    share, steps = (of_digits("--lr_warmup_steps", n, "--max_train_steps", 40).run for n in (0.25, 10))
    assert [LearningRate(share)(step) for step in range(40)] == [LearningRate(steps)(step) for step in range(40)]


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "inf", "half"])
@pytest.mark.parametrize("name, method", [("pretrain_steps", "ctm"), ("tangent_warmup_steps", "sct")])
def test_lengths_that_are_neither_are_refused(name, method, value):
    with pytest.raises(ValueError, match=name):
        of_digits(f"--{name}", value, method=method)


def test_phases_count_what_was_trained_up_to_a_step():
    options = recipe("mnist_ect_small").resolved().options
    assert phases(options, 500) == {"diffusion pretraining": 500, "the method itself": 0}
    assert phases(options, 2850) == {"diffusion pretraining": 900, "the method itself": 1950}
    assert phases(recipe("mnist_ict_small").resolved().options, 2900) == {}


# --- settings that change nothing --------------------------------------------------------------------------------

IDLE = [
    ("ect", "pretrain_steps", ["--max_train_steps", 40, "--pretrain_steps", 40]),
    ("ecd", "pretrain_steps", ["--max_train_steps", 40, "--pretrain_steps", 900, *TEACHER]),
    ("ctm", "pretrain_steps", ["--max_train_steps", 40, "--pretrain_steps", 41]),
    ("ect", "lr_warmup_steps", ["--lr_scheduler", "constant", "--lr_warmup_steps", 0.1]),
    ("ect", "lr_warmup_steps", ["--max_train_steps", 40, "--lr_warmup_steps", 40]),
    ("sct", "tangent_warmup_steps", ["--max_train_steps", 40, "--tangent_warmup_steps", 1000]),
    ("ctm", "discriminator_start_step", ["--max_train_steps", 4, "--gan_weight", 1, "--discriminator_start_step", 9]),
    ("ect", "model_preset", ["--model_preset", "base", *STUDENT]),
    ("ect", "model_config_name_or_path", ["--model_config_name_or_path", "x", *STUDENT]),
    ("cd", "model_preset", ["--model_preset", "base", *TEACHER]),
    ("cd", "time_label", ["--time_label", "angle", *TEACHER]),
    ("ect", "model_preset", ["--model_preset", "base", "--model_config_name_or_path", "x"]),
    ("ect", "revision", ["--pretrained_model_name_or_path", CONFIGS, "--revision", "v1"]),
    ("cd", "teacher_revision", ["--pretrained_teacher_model", CONFIGS, "--teacher_revision", "v1"]),
    ("ect", "label_column", ["--label_column", "nope"]),
    ("diffusion", "label_dropout", ["--label_dropout", 0.1]),
    ("ect", "split", ["--split", "test"]),
    ("ect", "dataloader_num_workers", ["--dataloader_num_workers", 2]),
    ("ect", "dataset_config_name", ["--dataset_config_name", "plain"]),
    ("ect", "ema_rampup", ["--ema_decay", 0.99, "--ema_rampup", 0.1]),
    ("ect", "hub_strategy", ["--hub_strategy", "every_save"]),
    ("ect", "hub_timeout", ["--hub_timeout", 10]),
    ("ect", "hub_model_id", ["--hub_model_id", "user/name"]),
    ("ect", "hub_strategy", ["--push_to_hub", "--hub_strategy", "every_save", "--max_train_steps", 40]),
    ("ect", "huber_c", ["--distance", "l2", "--huber_c", 0.1]),
    ("ect", "b", ["--k", 0, "--b", 2]),
    ("sct", "tangent_c", ["--tangent_norm", "clip", "--tangent_c", 0.2]),
    ("cdm", "rollout_steps", ["--martingale_weight", 0, "--rollout_steps", 3]),
    ("mean_flow", "weight_c", ["--power", 0, "--weight_c", 0.1]),
    ("ctm", "discriminator_period", ["--discriminator_period", 3]),
    ("ctm", "solver", ["--trajectory", "data", "--solver", "euler"]),
    ("ctm", "balance", ["--dsm_weight", 0, "--balance", "fixed"]),
]


@pytest.mark.parametrize("method, name, words", IDLE, ids=[f"{method}-{name}" for method, name, _ in IDLE])
def test_a_setting_that_changes_nothing_is_refused_by_name(tmp_path, method, name, words):
    with pytest.raises(ValueError, match=f"^{name} .*has no effect: "):
        of_digits(*words, method=method)
    values, key = {"dataset_name": "digits"}, None
    for word in map(str, words):
        key, values = (word[2:], values | {word[2:]: True}) if word.startswith("--") else (key, values | {key: word})
    with pytest.raises(ValueError, match=f"{name} .*has no effect: "):
        of_file(tmp_path / "c.yaml", method=method, **values)


def test_all_settings_without_effect_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)lr_warmup_steps 5 has no effect.*\n  split test has no effect"):
        of_digits("--split", "test", "--lr_scheduler", "constant", "--lr_warmup_steps", 5)


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler", "constant", "--lr_warmup_steps", 0],
        ["--split", "train"],
        ["--distance", "pseudo_huber", "--huber_c", 0.1],
        ["--max_train_steps", 40, "--pretrain_steps", 39, "--lr_warmup_steps", 39],
        ["--max_train_steps", 1],
    ],
)
def test_settings_with_an_effect_and_those_switched_off_pass(words):
    of_digits(*words)


def test_defaults_don_t_count_whatever_file_they_stand_in(tmp_path):
    (tmp_path / "c.yaml").write_text(of_digits(*STUDENT).to_yaml())
    assert parse("--config", tmp_path / "c.yaml") == of_digits(*STUDENT)


# --- flags against a config file ---------------------------------------------------------------------------------


def test_a_folder_given_as_a_flag_replaces_the_recipe_s_dataset_with_its_columns_and_split(tmp_path):
    values = {"dataset_name": "user/set", "split": "test", "image_column": "img", "channels": 1, "resolution": 16}
    config = of_file(tmp_path / "c.yaml", "--train_data_dir", "mine", **values)
    assert (config.data.train_data_dir, config.data.dataset_name) == ("mine", None)
    assert (config.data.split, config.data.image_column, config.data.channels) == ("train", None, None)
    (note,) = config.notes
    assert note.startswith("--train_data_dir mine replaces the config file's dataset_name user/set, split test,")
    assert config.data.resolution == [16] and "resolution stays: 16" in note


def test_another_dataset_leaves_the_columns_of_the_first_and_those_given_as_flags_stay(tmp_path):
    values = {"dataset_name": "user/set", "split": "test", "image_column": "img"}
    config = of_file(tmp_path / "c.yaml", "--dataset_name", "user/other", "--image_column", "picture", **values)
    assert (config.data.split, config.data.image_column) == ("train", "picture")
    same = of_file(tmp_path / "c.yaml", "--dataset_name", "user/set", **values)
    assert same.data.split == "test" and same.notes == ()


def test_a_start_given_as_a_flag_replaces_the_recipe_s_network_and_the_other_way_round(tmp_path):
    config = of_file(tmp_path / "a.yaml", *STUDENT, dataset_name="digits", model_preset="base", time_label="angle")
    assert (config.model.model_preset, config.model.time_label) == ("small", None)
    assert config.notes == ("--pretrained_model_name_or_path user/model replaces the config file's model_preset base,"
                            " time_label angle.",)  # fmt: skip
    start = {"dataset_name": "digits", "pretrained_model_name_or_path": "user/model", "revision": "v1"}
    config = of_file(tmp_path / "b.yaml", "--model_preset", "base", **start)
    assert (config.model.model_preset, config.model.pretrained_model_name_or_path) == ("base", None)
    assert config.model.revision is None


def test_a_teacher_given_as_a_flag_replaces_the_recipe_s_own_trajectory_and_network():
    config = recipe("mnist_ctm_scratch_small", *TEACHER)
    assert (config.options.trajectory, config.model.model_preset) == (None, "small")
    own = recipe("mnist_ctm_small", "--trajectory", "self")
    assert own.options.pretrained_teacher_model is None and own.options.trajectory == "self"


@pytest.mark.parametrize(
    "words, values, idle",
    [
        (["--lr_scheduler", "constant"], {"lr_warmup_steps": 10}, "lr_warmup_steps"),
        (["--distance", "l2"], {"huber_c": 0.1}, "huber_c"),
        (["--class_conditional", "false"], {"class_conditional": True, "label_column": "y"}, "label_column"),
        (["--ema_decay", 0.9], {"ema_rampup": 0.1}, "ema_rampup"),
    ],
)
def test_what_a_flag_makes_idle_in_a_config_file_is_left_out_and_said(tmp_path, words, values, idle):
    config = of_file(tmp_path / "c.yaml", *words, dataset_name="digits" if idle != "label_column" else "x/y", **values)
    assert config.to_dict()[idle] == config.defaults()[idle]
    assert re.search(f"{words[0]} .*replaces the config file's .*{idle} {values[idle]}", config.notes[0])


def test_a_dry_run_says_what_was_replaced_in_comments(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("dataset_name: user/set\nsplit: test\n")
    main(["--config", str(tmp_path / "c.yaml"), "--dataset_name", "digits", "--dry_run"], ["ect"], "")
    shown = capsys.readouterr().out
    assert shown.startswith("# --dataset_name digits replaces the config file's dataset_name user/set, split test.")
    assert yaml.safe_load(shown)["split"] == "train"


def test_a_recipe_of_another_dataset_trains_on_class_folders_and_says_what_it_replaced(tmp_path, monkeypatch):
    for i in range(8):
        path = tmp_path / "mine" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 15), (20 * i, 0, 90)).save(path)
    said = []
    monkeypatch.setattr("tqdm.auto.tqdm.write", lambda line, **kwargs: said.append(line))
    monkeypatch.setattr("cm_diffusers.engine.saved.export.verify_export", lambda *args, **kwargs: None)
    monkeypatch.setattr("cm_diffusers.engine.training.product.draw_grids", lambda *args: {})
    words = ["--train_data_dir", tmp_path / "mine", "--max_train_steps", 4, "--train_batch_size", 2]
    words += ["--model_preset", "tiny", "--validation_steps", 0, "--output_dir", tmp_path / "run"]
    train(recipe("mnist_ect_small", *words))
    assert said[0].startswith(
        f"--train_data_dir {tmp_path / 'mine'} replaces the config file's dataset_name ylecun/mnist."
    )
    facts = json.loads((tmp_path / "run" / "card.json").read_text())
    assert facts["shape"] == "3 x 16 x 16, 2 classes"
    assert facts["phases"] == {"diffusion pretraining": 1, "the method itself": 3}
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "| steps | 4 of 2 images: 1 of diffusion pretraining, 3 of the method itself |" in card
