"""A run with everything on the Hub: teacher and dataset by revision, a model at every save, and a hidden token."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import load_source
from tests.helpers.loopback import File, Repository
from tests.helpers.training_runs import flags, run


CANARY = "hf_canaryXofXtheXtokenXtest"
SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train_consistency.py"
LOUD = {
    "HF_DEBUG": "1",
    "HF_HUB_VERBOSITY": "debug",
    "DATASETS_VERBOSITY": "debug",
    "TRANSFORMERS_VERBOSITY": "debug",
    "DIFFUSERS_VERBOSITY": "debug",
    "ACCELERATE_LOG_LEVEL": "DEBUG",
    "CM_DIFFUSERS_TRACEBACK": "1",
}


def publish(hub, kind, id, files):
    """Make a repository in which only the revision v1 is usable."""
    repo = hub.repositories[kind, id] = Repository(kind, id, private=True)
    tree = {name: File(content, lfs=name.endswith(hub.lfs_suffixes)) for name, content in files.items()}
    hub.storage |= {file.sha256: file.content for file in tree.values()}
    repo.tags["v1"] = repo.commit("main", "usable", tree).oid
    repo.commit("main", "broken", {name: File(b"broken") for name in files})


@pytest.fixture
def published(hub, tmp_path):
    hub.users[CANARY] = hub.users.pop("hf_loopback_tester")
    teacher = run(tmp_path / "teacher", "diffusion", max_train_steps=1) / "pipeline"
    files = [path for path in teacher.rglob("*") if path.is_file()]
    publish(hub, "model", "tester/teacher", {str(path.relative_to(teacher)): path.read_bytes() for path in files})
    parquet = io.BytesIO()
    load_source(DataArguments(dataset_name="digits", max_train_samples=100)).to_parquet(parquet)
    publish(hub, "dataset", "tester/digits", {"data/train-00000-of-00001.parquet": parquet.getvalue()})
    return hub


def command_lines():
    """The command lines of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.add(path.read_bytes())
        except OSError:  # the process has ended
            continue
    return found


def start(hub, tmp_path, **settings):
    """Train a student in another process; returns its output, its exit code and the command lines seen meanwhile."""
    words = flags(
        tmp_path / "student",
        "ecd",
        dataset_name="tester/digits",
        pretrained_teacher_model="tester/teacher",
        stage_steps=2,
        max_train_steps=4,
        push_to_hub=True,
        **settings,
    )
    environment = hub.environment(tmp_path / "home", token=CANARY, OMP_NUM_THREADS="1", **LOUD)
    seen = set()
    with open(tmp_path / "output", "wb") as output:
        command = [sys.executable, str(SCRIPT), "--method", "ecd", *words]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen |= command_lines()
            time.sleep(0.1)
    return (tmp_path / "output").read_text(), process.returncode, seen


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="the list of processes is read from /proc")
@pytest.mark.wide
def test_a_run_from_the_hub_to_the_hub_shows_its_token_to_the_hub_alone(published, tmp_path):
    hub = published
    hub.fail("POST .*/tag/", times=1, status=403)  # an error on the way
    settings = {"hub_strategy": "every_save", "checkpointing_steps": 2, "report_to": "tensorboard"}
    output, code, processes = start(hub, tmp_path, dataset_revision="v1", teacher_revision="v1", **settings)
    assert code == 0, output[-4000:]
    assert "WARNING: 'Step 2' was not pushed to tester/student" in output and "curl" in output  # a visible warning
    card = hub.repository("tester/student").files["README.md"].decode()
    assert "[tester/teacher](https://huggingface.co/tester/teacher), revision v1" in card
    assert "[tester/digits](https://huggingface.co/tester/digits), revision v1" in card

    token = CANARY.encode()
    assert any(str(SCRIPT).encode() in line for line in processes) and not any(token in line for line in processes)
    assert CANARY not in output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30 and not [path for path in written if token in path.read_bytes()]
    assert any(request.headers.get("authorization") == f"Bearer {CANARY}" for request in hub.log)
    for request in hub.log:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert CANARY not in f"{request.path} {request.query} {others}" and token not in request.body
        if request.path.startswith("/storage/"):  # another host
            assert "authorization" not in request.headers
