"""Mistaken names and an unreachable Hub: found by one request, where Hub clients would retry for half a minute."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler, lookup
from cm_diffusers.engine.config import DataArguments, ModelArguments
from cm_diffusers.engine.data.images import load_source
from cm_diffusers.engine.saved.discriminators import load_backbone
from cm_diffusers.engine.saved.start import load_vae
from cm_diffusers.engine.sharing.hub import Publisher, Push
from cm_diffusers.evaluation.features import load_extractor
from cm_diffusers.sampling import load_pipeline


LOADERS = {
    "dataset": lambda name: load_source(DataArguments(dataset_name=name)),
    "stream": lambda name: load_source(DataArguments(dataset_name=name, streaming=True)),
    "model": load_pipeline,
    "autoencoder": lambda name: load_vae(ModelArguments(vae_name_or_path=name), None),
    "backbone": load_backbone,
    "extractor": load_extractor,
}


@pytest.fixture
def client(api, monkeypatch):
    """Look up names on the loopback Hub."""
    monkeypatch.setattr(lookup, "HfApi", lambda: api)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_mistaken_name_is_one_question(hub, client, sleeps, load):
    with pytest.raises(ValueError, match=r"'runs/tpyo'.*no such file or folder, and no such \w+ on the Hub"):
        load("runs/tpyo")
    assert len(hub.log) == 1 and sleeps == []


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_hub_that_is_away_is_asked_once(hub, client, sleeps, load):
    hub.down()
    with pytest.raises(ValueError, match=r"'runs/tpyo'.*no such file or folder, the Hub can't be reached \(.+\), and"):
        load("runs/tpyo")
    assert sleeps == []


@pytest.mark.parametrize(
    "name", ["./images", "../images", "~/images", "/no/images", "data/my/images", "images/", "a b"]
)
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_names_that_the_hub_can_not_have_are_not_asked_for(hub, client, load, name):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load(name)
    assert hub.log == []


def test_a_mistaken_revision_is_named(hub, client, api):
    api.create_repo("tester/mine", repo_type="dataset")
    with pytest.raises(ValueError, match="the Hub's dataset has no revision 'v2'"):
        load_source(DataArguments(dataset_name="tester/mine", dataset_revision="v2"))


def test_a_busy_hub_is_left_to_its_clients(hub, client):
    hub.fail("GET /api/models/tester/mine", times=1, status=503)
    with lookup.looked_up("tester/mine") as cached:
        assert not cached


CACHED = """
import json, sys
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import load_source
from cm_diffusers.sampling import load_pipeline
pipe = load_pipeline("tester/model")
rows = load_source(DataArguments(dataset_name="tester/mine"))
print(json.dumps([type(pipe).__name__, len(rows)]))
"""


@pytest.mark.wide
def test_what_is_in_the_cache_is_used_while_the_hub_is_away(hub, api, tiny_unet, tmp_path):
    ConsistencyPipeline(tiny_unet(), MultistepConsistencyScheduler()).save_pretrained(tmp_path / "model")
    publisher = Publisher("tester/model", api=api)
    publisher.push(Push(tmp_path / "model", "A model"))
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "data" / f"{i}.png")
    data = Publisher("tester/mine", api=api, kind="dataset")
    data.push(Push(tmp_path / "data", "A dataset", files=("*.png",)))
    assert publisher.finish(60) and data.finish(60)
    for away in (False, True):
        if away:
            hub.down()
        run = subprocess.run(
            [sys.executable, "-c", CACHED], env=hub.environment(tmp_path / "home"), capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout) == ["ConsistencyPipeline", 3]
        assert "Retrying" not in run.stderr
