"""The published numbers and the texts about them."""

import re
from pathlib import Path

import pytest
import yaml

from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.scripts import load_script


ROOT = Path(__file__).parents[1]
PUBLISHED = yaml.safe_load((ROOT / "hub_cards" / "results.yaml").read_text(encoding="utf-8"))
RESULTS, MOVED = PUBLISHED["results"], PUBLISHED["moved"]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["name"])
def test_a_number_comes_with_its_commit_hardware_and_command(result):
    """Without quotes, YAML reads a commit such as 8191753 or 12345e6 as a number."""
    assert isinstance(result["commit"], str) and re.match(r"[0-9a-f]{7}\b", result["commit"])
    assert isinstance(result["hardware"], str)
    assert ("command" in result) != ("commands" in result)


def nothing_in(value):
    if isinstance(value, dict | list):
        return any(map(nothing_in, value.values() if isinstance(value, dict) else value))
    return value is None


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["name"])
def test_no_key_was_cut_at_its_comma(result):
    """YAML reads `{5,000 images: 1}` as two entries, the first without a value."""
    assert not nothing_in(result)


def test_the_scripts_of_the_commands_are_there():
    commands = " ".join(str(result.get("command") or result["commands"]) for result in RESULTS)
    scripts = set(re.findall(r"(?:training|benchmarks)/[\w/]+\.py", commands))
    assert set(MOVED) <= scripts and len(scripts) > 10
    for script in scripts:
        assert (ROOT / MOVED.get(script, script)).is_file(), script
    for old in MOVED:
        assert not (ROOT / old).exists(), old


def test_the_tables_of_numbers_are_those_of_the_results():
    published = load_script("published", "benchmarks")
    assert set(PUBLISHED["papers"]) == set(OBJECTIVES)
    shown = []
    for page in published.PAGES:
        text = page.read_text(encoding="utf-8")
        assert published.with_tables(text) == text, f"{page.name}: run `python benchmarks/published.py`"
        shown += [name for _, name, _ in published.PLACE.findall(text)]
    assert sorted(shown) == sorted(published.TABLES)
