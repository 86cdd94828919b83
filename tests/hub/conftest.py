"""Fixtures for tests of the Hub."""

import threading
import time

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    close_session,
    disable_progress_bars,
    enable_progress_bars,
)

from tests.helpers.loopback import TOKEN, LoopbackHub


@pytest.fixture(scope="session")
def loopback_hub():
    """One server for all tests, so that its address stays valid for clients that outlive a test."""
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(loopback_hub):
    """An empty Hub on the loopback interface; the test fails if the Hub did not know a request."""
    loopback_hub.clear()
    yield loopback_hub
    loopback_hub.up()
    assert not loopback_hub.unhandled


@pytest.fixture
def api(hub, monkeypatch):
    """A client in this process. HfApi's methods use its endpoint; most other functions do not."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    close_session()  # the old session has read the environment
    yield HfApi(endpoint=hub.url, token=TOKEN)
    close_session()
    if bars:
        enable_progress_bars()


@pytest.fixture
def sleeps(monkeypatch):
    """The durations passed to time.sleep, which returns at once in this process."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture
def quick(monkeypatch):
    """Shorten all pauses to a hundredth."""
    sleep, wait = time.sleep, threading.Event.wait
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: wait(self, timeout and timeout / 100))
