"""Fixtures for tests of reliability."""

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.training_runs import run


@pytest.fixture(scope="session")
def server():
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a briefly trained diffusion model."""
    return run(tmp_path_factory.mktemp("runs") / "teacher", "diffusion", max_train_steps=4) / "pipeline"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A function from a process to the folder of a briefly trained diffusion model."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(process):
        if process not in made:
            own = {"edm": {}}.get(process, {"interpolant": process})
            preset = "tiny" if process == "edm" else "jvp_tiny"
            settings = {"max_train_steps": 2, "model_preset": preset, **own}
            made[process] = run(folder / process, "diffusion", **settings) / "pipeline"
        return made[process]

    return model
