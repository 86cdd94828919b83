"""Short training runs on the digits, and their results."""

import json
from pathlib import Path
from unittest import mock

from cm_diffusers.engine.checkpoint import newest_checkpoint
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.training.run import train


DEFAULTS = {
    "dataset_name": "digits",
    "class_conditional": True,
    "max_train_samples": 100,
    "model_preset": "tiny",
    "train_batch_size": 8,
    "learning_rate": 1e-3,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "validation_steps": 0,
    "logging_steps": 1,
}
ECT = {"pretrain_steps": 2, "stage_steps": 2}  # fixed, so that they do not depend on max_train_steps


def flags(folder, method="ect", **settings):
    """The command line of a short run. A setting of None removes a default; defaults without effect are left out."""
    values = {**DEFAULTS, **(ECT if method == "ect" else {}), **settings, "output_dir": folder}
    if (values["max_train_steps"] or 3) <= 2 and "pretrain_steps" not in settings:
        values.pop("pretrain_steps", None)
    taught = values.get("pretrained_teacher_model") and not values.get("from_scratch")
    named = values.get("pretrained_model_name_or_path") or values.get("model_config_name_or_path")
    if (named or taught) and "model_preset" not in settings:
        del values["model_preset"]
    words = [
        [f"--{key}", *(value if isinstance(value, list) else [value])]
        for key, value in values.items()
        if value is not None
    ]
    return [str(word) for part in words for word in part]


def run(folder, method="ect", **settings):
    """Train in this process, without verifying or drawing the export, to save seconds; returns the run's folder."""
    with mock.patch("cm_diffusers.engine.saved.export.verify_export"):
        draw = mock.patch("cm_diffusers.engine.training.text.TextProduct.draw", return_value=({}, {}))
        verify = mock.patch("cm_diffusers.engine.text.export._verify")
        with mock.patch("cm_diffusers.engine.training.product.draw_grids", return_value={}), draw, verify:
            train(parse_config(flags(folder, method, **settings), [method], ""))
    return Path(folder)


def read_log(folder):
    """The rows of log.jsonl, without wall-clock times."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def tensors(folder):
    """All tensors of the newest checkpoint, by (group, name)."""
    checkpoint, faults = newest_checkpoint(Path(folder))
    assert faults == []
    return {(group, key): value for group, values in checkpoint.tensors.items() for key, value in values.items()}


def differences(a, b):
    """Keys (group, name) of the tensors that differ in any bit between the newest checkpoints of two run folders."""
    a, b = tensors(a), tensors(b)
    return sorted(a.keys() ^ b.keys()) + [key for key in a.keys() & b.keys() if not a[key].equal(b[key])]
