"""Options of other programs, and what is written here instead."""

import re
from dataclasses import fields

import pytest

from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments, parse_config
from cm_diffusers.engine.foreign_flags import INSTEAD
from cm_diffusers.objectives import OBJECTIVES


OURS = {f.name for cls in (DataArguments, ModelArguments, RunArguments) for f in fields(cls)}
OF_METHODS = {f.name for cls in OBJECTIVES.values() for f in fields(cls.Options)}
OF_SCRIPTS = {"watch", "num_processes"}  # of evaluate.py and of the command


def test_no_option_is_both_ours_and_foreign():
    assert not INSTEAD.keys() & (OURS | OF_METHODS)


def test_every_option_that_is_named_instead_is_there():
    named = {name for text in INSTEAD.values() for name in re.findall(r"--(\w+)", text)}
    assert named <= OURS | OF_METHODS | OF_SCRIPTS and len(named) > 20


@pytest.mark.parametrize(
    "name, advice",
    [
        ("hub_token", "`hf auth login`"),
        ("pretrained_vae_model_name_or_path", "--vae_name_or_path"),
        ("num_train_epochs", "--max_train_steps"),
        ("warmup_ratio", "--lr_warmup_steps"),
        ("caption_column", "classes, and not on text"),
    ],
)
def test_a_foreign_option_is_answered_and_not_guessed(name, advice):
    with pytest.raises(ValueError) as said:
        parse_config([f"--{name}", "1"], ["ect"], "")
    assert advice in str(said.value) and "Did you mean" not in str(said.value)
