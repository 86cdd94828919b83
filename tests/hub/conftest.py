"""What the tests of the Hub share."""

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
    """One server for all tests, so that clients which live longer than a test can know its address."""
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(loopback_hub):
    """An empty Hub on the loopback interface; that it knew every request is checked at the end."""
    loopback_hub.clear()
    yield loopback_hub
    loopback_hub.up()
    assert not loopback_hub.unhandled


@pytest.fixture
def api(hub, monkeypatch):
    """A client in this process. HfApi's methods take their endpoint from it; most other functions do not."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    close_session()  # it has read the environment
    yield HfApi(endpoint=hub.url, token=TOKEN)
    close_session()
    if bars:
        enable_progress_bars()


@pytest.fixture
def sleeps(monkeypatch):
    """What time.sleep was asked for; nobody in this process waits for it."""
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


@pytest.fixture
def quick(monkeypatch):
    """Pauses take a hundredth of their time."""
    sleep, wait = time.sleep, threading.Event.wait
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: wait(self, timeout and timeout / 100))
