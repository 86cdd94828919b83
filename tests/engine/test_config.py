"""Settings: flags and YAML are equivalent, and messages name every mistake."""

import math
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import cm_diffusers.engine.settings_files as settings_files
from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments, parse_config
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.training.run import main
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.options import Interval, flag_of


REPOSITORY = Path(__file__).parents[2]


def parse(*argv, method="ect"):
    return parse_config([str(a) for a in argv], [method], "a description")


def parse_digits(*argv, method="ect"):
    return parse("--dataset_name", "digits", *argv, method=method)


def write_yaml(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


SETTINGS = {
    "dataset_name": "digits",
    "class_conditional": True,
    "learning_rate": 3e-5,
    "resolution": [8, 16],
    "ema_half_life": [1.0, 2.5],
    "ema_decay": [0.99],
    "q": 4.0,
    "pretrain_steps": 7,
    "time_label": "angle",
    "mixed_precision": "bf16",
    "output_dir": "runs/a folder",
}


def as_flags(settings):
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]


def test_flags_and_yaml_give_the_same_config(tmp_path):
    from_flags = parse(*as_flags(SETTINGS))
    from_yaml = parse("--config", write_yaml(tmp_path / "c.yaml", method="ect", **SETTINGS))
    assert from_flags == from_yaml
    assert {key: from_yaml.to_dict()[key] for key in SETTINGS} == SETTINGS


def test_flags_win_over_yaml_key_by_key(tmp_path):
    config = parse(
        "--config", write_yaml(tmp_path / "c.yaml", **SETTINGS), "--q", 3, "--ema_decay", 0.5, "--time_label=log_sigma"
    )
    assert (config.options.q, config.run.ema_decay, config.model.time_label) == (3.0, [0.5], "log_sigma")
    assert config.run.learning_rate == SETTINGS["learning_rate"] and config.options.pretrain_steps == 7


def test_an_empty_value_in_yaml_means_the_default(tmp_path):
    config = parse("--config", write_yaml(tmp_path / "c.yaml", dataset_name="digits", pretrain_steps=None))
    assert config == parse_digits()


@pytest.mark.parametrize("value", ["3e-5", "3.0e-5", "'3e-5'"])
def test_numbers_of_yaml_need_not_have_a_dot(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"dataset_name: digits\nlearning_rate: {value}\n")
    assert parse("--config", path).run.learning_rate == 3e-5


@pytest.mark.parametrize("settings", [SETTINGS, {"train_data_dir": "x", "random_flip": True}])
def test_the_printed_yaml_parses_back_into_the_same_config(tmp_path, settings):
    config = parse(*as_flags(settings))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert parse("--config", tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "wrong, right",
    [("learning_rat", "learning_rate"), ("lr_sheduler", "lr_scheduler"), ("pretrain_step", "pretrain_steps")],
)
def test_unknown_options_offer_the_nearest_name(tmp_path, wrong, right):
    with pytest.raises(ValueError, match=f"{wrong!r}.*{right!r}"):
        parse_digits(f"--{wrong}", 1)
    path = write_yaml(tmp_path / "c.yaml", dataset_name="digits", **{wrong: 1})
    with pytest.raises(ValueError, match=f"c.yaml.*{wrong!r}.*{right!r}"):
        parse("--config", path)


def test_abbreviated_flags_are_unknown_and_not_guessed():
    with pytest.raises(ValueError, match="'learning_rate'"):
        parse_digits("--learning", 1e-3)


@pytest.mark.parametrize("name", ["q", "pretrain_steps", "huber_c", "stage_steps"])
def test_options_of_another_method_are_refused_by_name(tmp_path, name):
    expected = f"{name!r} is an option of .*ect.*; diffusion ignores it.*p_mean, p_std"
    with pytest.raises(ValueError, match=expected):
        parse_digits(f"--{name}", 2, method="diffusion")
    path = write_yaml(tmp_path / "c.yaml", dataset_name="digits", **{name: 2})
    with pytest.raises(ValueError, match=expected):
        parse("--config", path, method="diffusion")
    assert parse_digits(f"--{name}", 2).to_dict()[name] == 2  # the flag's own method accepts it


def test_a_method_of_another_script_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'diffusion'.*trains: ect"):
        parse_digits("--method", "diffusion")
    with pytest.raises(ValueError, match="'diffusion'.*trains: ect"):
        parse("--config", write_yaml(tmp_path / "c.yaml", dataset_name="digits", method="diffusion"))


WRONG_VALUES = [
    ("learning_rate", "-1e-3"),
    ("learning_rate", "0"),
    ("learning_rate", "nan"),
    ("learning_rate", "inf"),
    ("learning_rate", "fast"),
    ("p_std", "0"),
    ("p_std", "-1"),
    ("p_std", "nan"),
    ("p_mean", "nan"),
    ("p_mean", "inf"),
    ("q", "1"),
    ("q", "0.5"),
    ("k", "-1"),
    ("b", "-1"),
    ("huber_c", "-0.1"),
    ("distance", "l3"),
    ("weighting", "none"),
    ("pretrain_steps", "-1"),
    ("pretrain_steps", "1.5"),
    ("stage_steps", "0"),
    ("max_train_steps", "0"),
    ("max_train_steps", "ten"),
    ("train_batch_size", "0"),
    ("gradient_accumulation_steps", "0"),
    ("checkpointing_steps", "0"),
    ("checkpoints_total_limit", "1"),
    ("validation_steps", "-1"),
    ("logging_steps", "0"),
    ("lr_warmup_steps", "-1"),
    ("lr_scheduler", "zigzag"),
    ("optimizer", "sgdd"),
    ("adam_beta1", "1"),
    ("adam_beta2", "1.1"),
    ("adam_epsilon", "-1"),
    ("adam_weight_decay", "-0.1"),
    ("max_grad_norm", "-1"),
    ("max_grad_norm", "nan"),
    ("max_skipped_steps", "-1"),
    ("mixed_precision", "fp8"),
    ("ema_decay", "1"),
    ("ema_decay", "-0.1"),
    ("ema_decay", "0.99999991 0.99999992"),
    ("ema_half_life", "1 1"),
    ("ema_half_life", "0"),
    ("ema_rampup", "1.5"),
    ("seed", "-1"),
    ("resolution", "1 2 3"),
    ("resolution", "0"),
    ("resolution", "8 -8"),
    ("channels", "2"),
    ("max_train_samples", "0"),
    ("dataloader_num_workers", "-1"),
    ("dropout", "2"),
    ("dropout", "-0.1"),
    ("dropout", "1"),
    ("augment", "1.5"),
    ("augment", "-0.1"),
    ("label_dropout", "1"),
    ("time_label", "sigma"),
    ("sigma_data", "0"),
    ("model_preset", "huge"),
    ("class_conditional", "perhaps"),
    ("resume_from_hub", "/home/me/run"),
]


@pytest.mark.parametrize("key, value", WRONG_VALUES)
def test_impossible_values_and_wrong_types_are_named(tmp_path, key, value):
    words = value.split()
    with pytest.raises(ValueError, match=key):
        parse_digits(f"--{key}", *words)
    in_yaml = [yaml.safe_load(word) for word in words]
    path = write_yaml(tmp_path / "c.yaml", dataset_name="digits", **{key: in_yaml if len(words) > 1 else in_yaml[0]})
    with pytest.raises(ValueError, match=key):
        parse("--config", path)


GROUPS = [DataArguments, ModelArguments, RunArguments, EvaluationArguments]
GROUPS += [cls.Options for cls in OBJECTIVES.values()]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_number_declares_its_range_and_has_a_default_in_it(group):
    for part in fields(group):
        flag, is_number = flag_of(part), re.search("int|float|Length", str(part.type))
        assert bool(is_number) == (flag.within is not None) or part.metadata.get("choices"), part.name
        if flag.within is not None:
            assert part.default is None or part.default in flag.within, part.name


@pytest.mark.parametrize("text, inside, outside", [("[0, 1)", [0, 0.5], [-0.1, 1, math.nan]), ("(1, 2]", [2], [1])])
def test_a_range_reads_as_in_mathematics(text, inside, outside):
    interval = Interval.read(text)
    assert all(value in interval for value in inside) and not any(value in interval for value in outside)
    assert str(interval) == text


def test_the_help_says_the_range(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Dropout probability of the U-Net. In [0, 0.99]. (default: 0.0)" in text
    assert "Number of optimiser steps. At least 1. (default: 10000)" in text


def test_an_empty_path_is_refused_by_name():
    with pytest.raises(ValueError, match="output_dir is empty; give a path"):
        parse_digits("--output_dir", "")


@pytest.mark.parametrize("flags", [[], ["--dataset_name", "digits", "--train_data_dir", "x"]])
def test_exactly_one_source_of_data_is_asked_for(flags):
    with pytest.raises(ValueError, match="dataset_name and train_data_dir"):
        parse(*flags)


def test_a_list_for_a_single_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match="c.yaml"):
        parse("--config", write_yaml(tmp_path / "c.yaml", dataset_name="digits", learning_rate=[1e-3, 1e-4]))


def test_a_word_without_a_flag_is_refused():
    with pytest.raises(ValueError, match="'stray'"):
        parse_digits("--q", 2, "stray")


@pytest.mark.parametrize(
    "content, reason",
    [
        ("a: [1", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("- a\n- b\n", "key: value"),
        ("", "key: value"),
        ("just words", "key: value"),
        ("1: 2", "key: value"),
        ("dataset_name: digits\nlearning_rate: {a: 1}\n", "learning_rate"),
        (b"\xff\xfe\x00bad", "not valid YAML"),
    ],
)
def test_files_that_are_no_settings_are_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"(?s)c.yaml.*{reason}"):
        parse("--config", path)


@pytest.mark.parametrize("name, reason", [("missing.yaml", "can't be read"), (".", "is a folder instead of a file")])
def test_unreadable_files_are_refused_by_name(tmp_path, name, reason):
    with pytest.raises(ValueError, match=re.escape(f"config {tmp_path / name}: {reason}")):
        parse("--config", tmp_path / name)


# --- aliases, nesting and repetition ---------------------------------------------------------------------------------


def nested(levels):
    return f"q: {'[' * levels}{']' * levels}"


def nested_by_lines(levels):
    return "\n".join(" " * i + "q:" for i in range(levels)) + " 1"


def nested_by_aliases(levels):
    """Each level has half of an excessive number of values; only joined they exceed the limit."""
    return f"a: &a {'[' * levels}{']' * levels}\nq: {'[' * levels}*a{']' * levels}"


def expanded(values):
    """A list of ten, repeated until there are slightly more than the given number of values."""
    return f"a: &a [{', '.join('x' * 10)}]\nq: [{', '.join(['*a'] * (values // 11))}]"


@pytest.mark.parametrize(
    "text, reason",
    [
        (nested(settings_files.DEPTH + 3), "nests more than 20 levels deep .line 1"),
        (nested_by_lines(settings_files.DEPTH + 3), "nests more than 20 levels deep .line 21"),
        (nested_by_aliases(settings_files.DEPTH // 2 + 2), "nests more than 20 levels deep .line 2"),
        (
            expanded(settings_files.NODES + 100),
            "holds more than 10000 values, including those that aliases repeat .line 2",
        ),
        (f"q: [{'1, ' * (settings_files.NODES + 10)}]", "holds more than 10000 values"),
        ("# " + "x" * settings_files.BYTES, "has 262146 bytes, more than 262144"),
        ("q: &a [*a]", "contains itself, through .a"),
        ("q: &a {b: {c: *a}}", "contains itself, through .a"),
    ],
)
def test_files_beyond_the_limits_are_refused_before_anything_is_made_of_them(tmp_path, monkeypatch, text, reason):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    monkeypatch.setattr(settings_files.yaml, "load", None)
    with pytest.raises(ValueError, match=f"^config .*c.yaml: {reason}"):
        parse("--config", path)


@pytest.mark.parametrize(
    "text", [nested(settings_files.DEPTH - 2), nested_by_lines(15), nested_by_aliases(9), expanded(9_000), "a: *b"]
)
def test_files_within_the_limits_are_read_as_before(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(ValueError, match="undefined alias 'b'"):
            settings_files.read_yaml(path)
    else:
        assert settings_files.read_yaml(path) == expected


@pytest.mark.parametrize(
    "text, key",
    [
        ("seed: 1\nlearning_rate: 1e-3\nseed: 1", "seed"),
        ("method: ect\nmethod: ect", "method"),
        ("{q: 3, q: 4}", "q"),
        ("'q': 3\nq: 4", "q"),
        ("q: {a: 1, b: 2, a: 3}", "a"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_by_name(tmp_path, text, key):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"c.yaml: repeats the key '{key}' .line"):
        parse_digits("--config", tmp_path / "c.yaml")


def test_keys_of_different_mappings_and_values_are_no_repetitions(tmp_path):
    text = "a: {b: 1, c: b}\nb: {b: b, a: a}\nc: [a, a, b]\nd: {<<: {a: 1}, a: 2}"
    (tmp_path / "c.yaml").write_text(text)
    assert settings_files.read_yaml(tmp_path / "c.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("comment, message", [("", None), ("#" * (1 << 18), "has more than 262144 bytes")])
def test_a_config_may_come_from_a_pipe(tmp_path, comment, message):
    """As from `--config <(command)` of a shell."""
    os.mkfifo(tmp_path / "pipe")
    text = f"dataset_name: digits\nseed: 3\n{comment}"
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert parse("--config", tmp_path / "pipe").run.seed == 3
    writer.join()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("learning_rate: [1e-3, 1e-4]", "learning_rate takes one value, got a list"),
        ("learning_rate: {a: 1}", "learning_rate takes one value"),
        ("learning_rate: 2024-01-01", "learning_rate.*invalid float value: '2024-01-01'"),
        ("learning_rate: 2024-99-99", "'learning_rate' can't be read: month must be in"),
        ("learning_rate: -1e-3", "learning_rate must lie in"),
        ("learning_rate: .nan", "learning_rate must lie in"),
        ("learning_rate: fast", "learning_rate.*invalid float value"),
        ("lr_scheduler: zigzag", "lr_scheduler.*invalid choice"),
        ("dropout: 2", "dropout must lie in"),
        ("ema_decay: [0.5, 2]", r"ema_decay must lie in \[0, 1\), got 2.0"),
        ("ema_decay: [null]", "ema_decay takes single values"),
        ("ema_decay: []", "ema_decay is an empty list"),
        ("resolution: [[8, 8]]", "resolution takes single values"),
        ("mixed_precision: no", "mixed_precision is False here, as YAML reads"),
        ("seed: true", "seed is True here"),
        ("seed: !!int x", "'seed' can't be read"),
        ("seed: !!bool x", "'seed' can't be read"),
        ("seed: !!timestamp x", "'seed' can't be read"),
        (f"seed: {'9' * 5000}", "'seed' can't be read"),
        ("max_train_steps: 1.5", "max_train_steps.*invalid int value"),
        ("class_conditional: 3", "class_conditional.*Truthy value expected"),
        ("method: [ect]", "Unknown method .'ect'."),
        ("config: other.yaml", "config names another file"),
        ("dataset_revision: 12", "dataset_revision 12 has no effect"),
        ("max_train_steps: 10\ntrain_data_dir: x", "dataset_name and train_data_dir"),
        ("teacher_revision: x", "teacher_revision needs --pretrained_teacher_model"),
        ("checkpoints_total_limit: 1", r"checkpoints_total_limit must lie in \[2, 1e12\], got 1"),
    ],
)
def test_what_is_wrong_with_a_value_names_the_file_and_the_key(tmp_path, text, reason):
    path = tmp_path / "c.yaml"
    path.write_text(f"dataset_name: digits\n{text}")
    with pytest.raises(ValueError, match=f"^config {re.escape(str(path))}: .*{reason}"):
        parse("--config", path)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("dataset_name: digits\nlearning_rate: null", "learning_rate", 1e-4),
        ("dataset_name: digits\nmethod: null", "method", "ect"),
        ("dataset_name: digits\nresolution: 8", "resolution", [8]),
        ("dataset_name: digits\noutput_dir: --odd", "output_dir", "--odd"),
        ("dataset_name: digits\np_mean: -1.1e0", "p_mean", -1.1),
        ("dataset_name: digits\nmixed_precision: 'no'", "mixed_precision", "no"),
        ("dataset_name: digits\nclass_conditional: on", "class_conditional", True),
    ],
)
def test_unusual_values_that_are_right_are_taken(tmp_path, text, key, value):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", tmp_path / "c.yaml").to_dict()[key] == value


def test_a_flag_that_is_wrong_is_not_blamed_on_the_file(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", dataset_name="digits", seed=3)
    with pytest.raises(ValueError, match="^dropout must lie"):
        parse("--config", path, "--dropout", 2)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "training" / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_parse_with_their_script(path):
    method = yaml.safe_load(path.read_text())["method"]
    scripts = [path.read_text() for path in (REPOSITORY / "training").glob("train_*.py")]
    lists = [re.search(r"^METHODS = (\[.*?\])", source, re.M | re.S) for source in scripts]
    fitting = [names for found in lists if found and method in (names := yaml.safe_load(found[1]))]
    methods = max(fitting, key=len)  # train_text_to_image.py shares some methods, and has no recipes
    config = parse_config(["--config", str(path)], methods, "")
    given = yaml.safe_load(path.read_text())
    read = {key: config.to_dict()[key] for key in given}
    assert read == {
        key: [value] if isinstance(read[key], list) and not isinstance(value, list) else value
        for key, value in given.items()
    }


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"], ["ect"], "a description")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "a description" in shown
    assert all(f"--{name}" in shown for name in ("q", "dataset_name", "dropout", "learning_rate", "config"))


def test_a_mistake_ends_a_script_with_code_2_and_a_line_rather_than_a_traceback(tmp_path):
    flags = ["--dataset_name", "digits", "--q", "2", "--output_dir", str(tmp_path / "r")]
    command = [sys.executable, str(REPOSITORY / "training" / "train_diffusion.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: 'q' is an option of ect")
    assert "Traceback" not in result.stderr and not (tmp_path / "r").exists()


def test_a_dry_run_prints_yaml_that_parses_back_and_writes_nothing(tmp_path, capsys):
    flags = ["--dataset_name", "digits", "--q", "4", "--output_dir", str(tmp_path / "r"), "--dry_run", "true"]
    main(flags, ["ect"], "")
    assert not (tmp_path / "r").exists()
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", tmp_path / "c.yaml") == parse(*flags).resolved()
