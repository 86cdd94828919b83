"""A method from outside the package trains, resumes and saves models like the package's methods."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline

import cm_diffusers
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.new_method import RECIPE, SCRIPT, Halving, page_s_test
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


def test_the_page_s_test_passes():
    page_s_test()


@pytest.mark.wide
def test_the_page_s_script_trains_by_its_recipe_and_writes_a_card(tmp_path):
    (tmp_path / "halving.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "halving.yaml").write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "halving.py", "--config", "halving.yaml", "--max_train_steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cm_diffusers.__file__).parents[1])}
    ended = subprocess.run(
        [*command, "--validation_steps", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    model = tmp_path / "runs/halving/pipeline"
    assert ConsistencyModelPipeline.from_pretrained(model).scheduler.config.num_train_timesteps == 41
    assert "a fixed gap" in (model / "README.md").read_text(encoding="utf-8")
