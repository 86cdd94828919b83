"""What the tests of reliability share."""

import pytest
from fork_server import ForkServer
from training_runs import run


@pytest.fixture(scope="session")
def server():
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A diffusion model, trained a little."""
    return run(tmp_path_factory.mktemp("runs") / "teacher", "diffusion", max_train_steps=4) / "pipeline"
