"""Several processes, started by README's commands, and user errors in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cm_diffusers.engine import processes
from cm_diffusers.engine.processes import end_with
from tests.helpers.training_runs import flags


ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = [sys.executable, "-m", *TORCHRUN, "training/train_consistency.py", *map(str, words)]
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.wide
def test_two_processes_train_where_there_is_no_gpu(tmp_path):
    result = start(flags(tmp_path / "run", max_train_steps=2))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 process(es)" in result.stdout and (tmp_path / "run/pipeline/model_index.json").is_file()


@pytest.mark.wide
def test_an_error_of_the_user_is_one_line_of_one_process(tmp_path):
    result = start([*flags(tmp_path / "run"), "--train_batch_size", "none"])
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "train_batch_size" in result.stderr


def test_another_process_waits_for_the_main_one_and_then_says_which_it_is(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    for number, shown in (("0", "error: no such folder\n"), ("1", "error: no such folder (process 1)\n")):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit, match="2"):
            end_with(ValueError("no such folder"))
        assert capsys.readouterr().err == shown
    assert waits == [processes.PATIENCE]


def test_what_the_project_prints_starts_single_processes_with_python():
    texts = [*ROOT.glob("training/*.py"), *ROOT.glob("training/configs/*"), *ROOT.glob("cm_diffusers/**/*.py")]
    assert len(texts) > 100
    for path in texts:
        assert "accelerate launch training/" not in path.read_text(), path
