"""README and docs: tables agree with the code, links have targets, and commands are valid."""

import re
import shlex
from argparse import ArgumentParser
from pathlib import Path
from unittest import mock

import pytest

from cm_diffusers import demo
from cm_diffusers.engine.config import DataArguments, parse_groups
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.training.run import main
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.table import SHORT, method_table
from tests.helpers.scripts import load_script


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = {"train": [m for m in OBJECTIVES if m not in ("diffusion", "cdm")], "diffuse": ["diffusion", "cdm"]}
METHODS["text"] = ["lcm", "tcd", "cd", "ecd", "scd"]
SCRIPTS = {"prepare": "prepare_data", "toy": "train_toy"}
PARSERS = {"sample": "parse_args", "edit": "parse_args", "export": "parse_args", "convert": "parse_args"}


def test_tables_of_methods_are_those_of_the_code():
    advice = "put in what `python -m cm_diffusers.objectives.table` prints"
    assert method_table(SHORT) in README, advice
    assert method_table() in (ROOT / "docs/methods.md").read_text(encoding="utf-8"), advice
    assert all(f"| `{name}` |" in method_table() for name in OBJECTIVES)


def test_the_readme_fits_on_two_screens():
    assert len(README.encode()) < 8_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    gone = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not gone


class Parsed(Exception):
    """Raised once the options are parsed, before the script's work."""


def parsed(parser, argv=None, read=ArgumentParser.parse_args):
    read(parser, argv)
    raise Parsed


def commands():
    """The `cm-diffusers` command lines in the shell blocks of all pages, each with its page."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] in (["torchrun"], ["accelerate"]):
                    words = ["cm-diffusers", "train", *words[words.index("cm_diffusers.train") + 1 :]]
                if words[:1] == ["cm-diffusers"]:
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", commands())
def test_commands_can_be_given(words, capsys):
    """Training commands run with `--dry_run`; for the others only the options are parsed."""
    word, *rest = words
    launch = [i for i, text in enumerate(rest) if text in ("--num_processes", "--accelerate_config")]
    rest = [text for i, text in enumerate(rest) if i not in launch and i - 1 not in launch]
    if word in METHODS:
        main([*rest, "--dry_run"], METHODS[word], "")
        assert "method: " in capsys.readouterr().out
    elif word == "evaluate":
        parse_groups(rest, (EvaluationArguments, DataArguments), "evaluate", "")
    elif word in PARSERS:
        getattr(load_script(word), PARSERS[word])(rest)
    elif word != "recipes":
        begin = demo.main if word == "demo" else load_script(SCRIPTS.get(word, word)).main
        with mock.patch.object(ArgumentParser, "parse_args", parsed), pytest.raises(Parsed):
            begin(rest)
