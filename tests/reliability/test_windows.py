"""A simulation of Windows, which lacks the opening of folders, some file flags and some signals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cm_diffusers.engine import files
from cm_diffusers.engine.checkpoint import newest_checkpoint, save_checkpoint
from tests.helpers.training_runs import differences, flags, run


ROOT = Path(__file__).parents[2]
SIMULATION = """
import os, shutil, signal, sys

for name in ("SIGHUP", "SIGUSR1", "alarm"):
    delattr(signal, name)
flags = {name: os.__dict__.pop(name) for name in ("O_NONBLOCK", "O_NOFOLLOW")}
from cm_diffusers.engine import files

vars(os).update(flags)  # for the Unix parts of other packages
shutil._use_fd_functions = False  # as it is there
opened = os.open


def open_no_folder(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *args, **kwargs)


os.open = open_no_folder
from cm_diffusers.engine.training.run import main

files.OPENS_FOLDERS = False
for steps in ("3", "6"):
    main([*sys.argv[1:], "--max_train_steps", steps], ["ect"], "")
"""


def test_a_checkpoint_is_saved_where_no_folder_can_be_opened(tmp_path, monkeypatch):
    opened = os.open

    def open_no_folder(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(files, "OPENS_FOLDERS", False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(os, "open", open_no_folder)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.full((2,), float(step))}}, {})
    assert newest_checkpoint(tmp_path)[0].tensors["model"]["a"].tolist() == [3, 3]


@pytest.mark.wide
def test_a_run_saves_resumes_and_exports_where_no_folder_can_be_opened(tmp_path):
    command = [sys.executable, "-c", SIMULATION, *flags(tmp_path / "there", max_train_steps=None, validation_steps=3)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resumed from step 3 of 6." in result.stderr + result.stdout
    assert (tmp_path / "there" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    run(tmp_path / "here")
    assert differences(tmp_path / "here", tmp_path / "there") == []
