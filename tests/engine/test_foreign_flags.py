"""Options of other programs, and their replacements here."""

import re
from collections import Counter
from dataclasses import fields

import pytest

from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments, parse_config
from cm_diffusers.engine.foreign_flags import INSTEAD
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.diffusers_flags import FLAGS_OF_DIFFUSERS


OURS = {f.name for cls in (DataArguments, ModelArguments, RunArguments) for f in fields(cls)}
OF_METHODS = {f.name for cls in OBJECTIVES.values() for f in fields(cls.Options)}
OF_SCRIPTS = {"watch", "num_processes"}  # flags of evaluate.py and of the command


def test_no_option_is_both_ours_and_foreign():
    assert not INSTEAD.keys() & (OURS | OF_METHODS)


def test_every_option_that_is_named_instead_is_there():
    named = {name for text in INSTEAD.values() for name in re.findall(r"--(\w+)", text)}
    assert named <= OURS | OF_METHODS | OF_SCRIPTS and len(named) > 20


@pytest.mark.parametrize("script, names", FLAGS_OF_DIFFUSERS.items())
def test_every_flag_of_diffusers_scripts_is_known_or_explained(script, names):
    assert not [name for name in names if name not in OURS | OF_METHODS | INSTEAD.keys()]


def test_flags_that_nearly_all_of_diffusers_scripts_have_are_taken_where_they_mean_something():
    common = Counter(name for names in FLAGS_OF_DIFFUSERS.values() for name in names)
    common = {name for name, count in common.items() if count >= 9}
    assert len(common) >= 35
    assert common - OURS == {
        "cache_dir", "center_crop", "scale_lr", "enable_xformers_memory_efficient_attention", "local_rank", "hub_token"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, advice",
    [
        ("hub_token", "`hf auth login`"),
        ("pretrained_vae_model_name_or_path", "--vae_name_or_path"),
        ("num_epochs", "--num_train_epochs"),
        ("warmup_ratio", "--lr_warmup_steps"),
        ("validation_prompt", "--validation_prompts"),
    ],
)
def test_a_foreign_option_is_answered_and_not_guessed(name, advice):
    with pytest.raises(ValueError) as said:
        parse_config([f"--{name}", "1"], ["ect"], "")
    assert advice in str(said.value) and "Did you mean" not in str(said.value)
