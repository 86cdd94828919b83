"""The published numbers and what is said of them."""

import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
RESULTS = yaml.safe_load((ROOT / "hub_cards" / "results.yaml").read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["name"])
def test_a_number_comes_with_its_commit_hardware_and_command(result):
    """YAML makes a number of a commit such as 8191753 or 12345e6 unless it is quoted."""
    assert isinstance(result["commit"], str) and re.match(r"[0-9a-f]{7}\b", result["commit"])
    assert isinstance(result["hardware"], str)
    assert ("command" in result) != ("commands" in result)
