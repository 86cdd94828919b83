"""A method that somebody adds outside of the package trains, resumes and is saved as ours are."""

import shutil

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.new_method import Halving
from tests.helpers.training_runs import differences, read_log, run


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, Halving.name, Halving)


def test_a_new_method_trains_resumes_and_leaves_a_model_that_stock_diffusers_loads(tmp_path):
    whole, resumed = run(tmp_path / "whole", "halving"), tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "log.jsonl", resumed)
    run(resumed, "halving")
    assert differences(whole, resumed) == [] and read_log(whole) == read_log(resumed)
    assert "a fixed gap" in (whole / "pipeline" / "README.md").read_text()
    pipe = ConsistencyModelPipeline.from_pretrained(whole / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (1, 1, 8, 8) and images.isfinite().all()
