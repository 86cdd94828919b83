"""Pushing a model: the files that arrive, outages that a push survives, and checks before training."""

import math
import re
import threading
import time

import pytest
from huggingface_hub import constants

from cm_diffusers.engine.sharing import hub as engine_hub
from cm_diffusers.engine.sharing.hub import Publisher, Push, is_passing
from tests.helpers.breadth import narrowed
from tests.helpers.loopback import TOKEN, User, pushed


FILES = {
    "README.md": b"---\nlibrary_name: diffusers\n---\n# A model\n",
    "model_index.json": b"{}",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": bytes(1000),
    "scheduler/scheduler_config.json": b"{}",
    "samples/1_step.png": b"png",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in {**FILES, "secrets.yaml": b"x", ".env": b"secret", "unet/notes.txt": b"x"}.items():
        (tmp_path / "pipeline" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pipeline" / name).write_bytes(content)
    return tmp_path / "pipeline"


@pytest.fixture
def publisher(hub, api, quick):
    """A function that makes publishers; their messages are in `said`."""
    said = []

    def make(repo="tester/model", **settings):
        made = Publisher(repo, say=said.append, api=api, **settings)
        made.said = said
        return made

    return make


def test_what_a_model_consists_of_arrives_and_nothing_else(hub, publisher, folder):
    one = publisher(private=True)
    one.check()
    one.push(Push(folder, "End of training", tag="step-10"))
    assert one.finish(30) and one.failures == []
    assert pushed(hub) == FILES
    repo = hub.repository("tester/model")
    assert repo.messages == ["End of training"] and list(repo.tags) == ["step-10"]
    assert hub.unhandled == []


def test_a_push_of_the_same_again_makes_no_commit(hub, publisher, folder):
    for _ in range(2):
        one = publisher()
        one.check()
        one.push(Push(folder, "End of training"))
        assert one.finish(30)
    assert hub.repository("tester/model").messages == ["End of training"]


def test_a_name_without_a_user_is_the_tokens_own(hub, publisher, folder):
    one = publisher("model")
    one.check()
    assert one.repo_id == "tester/model"


# every call of a push, and every kind of outage, with five failures in a row each
CALLS = {
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "lfs batch": "POST .*/objects/batch",
    "lfs upload": "PUT ",
    "lfs verify": "POST .*/objects/verify",
    "commit": "POST .*/commit/",
    "tag": "POST .*/tag/",
    "branch": "POST .*/branch/",
    "squash": "POST .*/super-squash/",
}
OUTAGES = {
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "2"}},
    "reset": {"reset": True},
    "lost answer": {"reset": True, "processed": True},
    "blackout": None,
}


def strike(hub, call, outage):
    """Let `outage` hit `call`; returns a function of the number of hits."""
    hits = []

    def black_out(request):
        if re.search(call, request.line) and not hits:
            hits.append(1)
            hub.down()
            threading.Timer(0.3, hub.up).start()  # stands for 30 s, because pauses are shortened to a hundredth

    if outage == "blackout":
        hub.on_request(black_out)
        return lambda: len(hits)
    failure = hub.fail(call, times=5 if outage != "lost answer" else 1, **OUTAGES[outage])
    return lambda: failure.hits


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("call", narrowed(CALLS, "create", "lfs upload", "commit"))
def test_an_outage_is_survived_without_a_second_commit(hub, publisher, folder, call, outage):
    one = publisher()
    one.check()
    hits = strike(hub, CALLS[call], outage)
    start = time.perf_counter()
    one.push(Push(folder, "End of training", tag="final"))
    one.push(Push(folder, "State", branch="state", files=("*.json",)))
    assert time.perf_counter() - start < 0.5  # the push is queued and training continues
    assert one.finish(600), one.said
    assert hits() >= 1
    repo = hub.repository("tester/model")
    assert pushed(hub) == FILES and repo.messages == ["End of training"]
    assert list(repo.tags) == ["final"] and len([c for c in repo.commits if c.branch == "state"]) == 1


def test_when_time_is_over_the_push_has_failed_and_says_so(hub, publisher, folder):
    one = publisher()
    one.check()
    hub.fail("POST .*/commit/", times=math.inf, status=503)
    one.push(Push(folder, "End of training"))
    assert not one.finish(20)
    assert one.failures


def test_each_push_is_done_with_whether_it_arrived_or_not(hub, publisher, folder):
    one, done = publisher(), []
    one.check()
    hub.fail("POST .*/commit/", times=1, status=403)
    one.push(Push(folder, "first", done=lambda: done.append(1)))
    one.push(Push(folder, "second", done=lambda: done.append(2)))
    assert not one.finish(30) and done == [1, 2]
    assert "'first' was not pushed to tester/model" in one.said[0]
    assert hub.repository("tester/model").messages == ["second"]


# --- before training


@pytest.mark.parametrize("name", ["a/b/c", "tester/-model", "tester/mo del", "tester/" + 100 * "x"])
def test_a_bad_name_is_found_at_once(publisher, name):
    with pytest.raises(ValueError, match="hub_model_id"):
        publisher(name).check()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_is_an_error_at_once(hub, publisher, status):
    hub.fail("POST /api/repos/create", times=1, status=status)
    with pytest.raises(ValueError, match=r"'tester/model' can't be written to: .*hf auth login, or HF_TOKEN"):
        publisher().check()


def test_another_users_repository_is_refused_at_once(publisher):
    with pytest.raises(ValueError, match="can't be written to"):
        publisher("somebody/model").check()


def test_a_token_that_may_only_read_is_found_at_once(hub, publisher, api, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the client reads a repository's address with it
    hub.users["hf_reader"] = User("tester", write=False)
    publisher().check()
    api.token = "hf_reader"
    with pytest.raises(ValueError, match="can't be written to"):
        publisher().check()  # although the repository exists


def test_an_unreachable_hub_is_a_warning(hub, publisher, folder):
    one = publisher()
    hub.down()
    one.check()
    assert "can't be reached now" in one.said[0] and "tried again" in one.said[0]
    hub.up()
    one.push(Push(folder, "End of training"))
    assert one.finish(60) and pushed(hub) == FILES


def test_no_token_is_an_error_that_says_what_to_do(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    api = engine_hub.HfApi(endpoint=hub.url)
    with pytest.raises(ValueError, match="hf auth login"):
        Publisher("tester/model", api=api).check()


def test_errors_that_stay_are_not_retried():
    assert not is_passing(ValueError("x")) and not is_passing(RuntimeError("x"))


def test_the_token_is_in_the_authorization_header_alone(hub, publisher, folder):
    one = publisher()
    one.check()
    hub.fail("POST .*/commit/", times=1, status=500)
    one.push(Push(folder, "End of training"))
    assert one.finish(60)
    for request in hub.log:
        others = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
        assert TOKEN not in str(others) and TOKEN.encode() not in request.body and TOKEN not in request.path
    assert not any(TOKEN in line for line in one.said)
