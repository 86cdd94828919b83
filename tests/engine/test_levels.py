"""The search for levels after training, which are saved with the model."""

import json

import pytest
import torch

from cm_diffusers.engine.training import levels
from cm_diffusers.sampling import load_pipeline, sample_images
from tests.helpers.training_runs import run


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(levels, "SAMPLES", 40)


def scheduler_of(folder):
    return json.loads((folder / "pipeline" / "scheduler" / "scheduler_config.json").read_text())


def test_levels_that_are_better_are_saved_with_the_model_and_used(tmp_path, monkeypatch):
    """The stand-in for the distance is |ln(second level / 0.5)|, whatever the images."""
    wanted = []
    monkeypatch.setattr(levels, "frechet_distance", lambda made, real: wanted[-1])
    sample = levels.sample_images

    def watched(pipeline, seeds, sigmas=None, **how):
        if sigmas:
            wanted.append(abs(torch.tensor(sigmas[1]).log() - torch.tensor(0.5).log()).item())
        return sample(pipeline, range(seeds.start, seeds.start + 40), sigmas=sigmas, **how)

    monkeypatch.setattr(levels, "sample_images", watched)
    where = run(tmp_path, search_levels=2)
    found = scheduler_of(where)["default_sigmas"]["2"]
    assert found[0] == 80.0 and abs(torch.tensor(found[1]).log() - torch.tensor(0.5).log()) < 0.1
    pipeline = load_pipeline(str(where / "pipeline"))
    sample_images(pipeline, range(2), num_inference_steps=2)
    assert pipeline.noise_levels[:2] == found
    wanted.clear()
    run(tmp_path, search_levels=2)
    assert not wanted  # the finished run already has these levels
    run(tmp_path, search_levels=[2, 3])
    assert {"2", "3"} <= scheduler_of(where)["default_sigmas"].keys()


def test_the_model_s_own_levels_stay_where_no_others_are_better_on_other_samples(tmp_path, monkeypatch):
    seen = []

    def distance(made, real):
        seen.append(len(seen))
        return float(-len(seen)) if len(seen) < 10 else 1.0 * len(seen)

    monkeypatch.setattr(levels, "frechet_distance", distance)
    where = run(tmp_path, search_levels=2)
    assert "2" not in (scheduler_of(where).get("default_sigmas") or {})


def test_a_model_without_a_place_for_levels_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="This DenoisingPipeline has diffusers' EDMEulerScheduler"):
        run(tmp_path, "diffusion", search_levels=2)
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(ValueError, match="can't search on a stream"):
        run(tmp_path, search_levels=2, streaming=True, max_train_samples=None)


def test_images_without_labels_are_compared_by_inception(tmp_path, monkeypatch):
    asked = []

    def load(name, **how):
        asked.append(name)
        raise ValueError("no weights here")

    monkeypatch.setattr(levels, "load_extractor", load)
    with pytest.raises(ValueError, match="no weights here"):
        run(tmp_path, search_levels=2, class_conditional=None)
    assert asked == ["inception"] and not (tmp_path / "log.jsonl").exists()
