"""Saved models in the engine: as a pipeline, as a denoiser and as a start for training."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    MeanFlowPipeline,
    MultistepConsistencyScheduler,
    TwoTimeModel,
)
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import TrajectoryDenoiser
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.saved.start import build_start, denoiser_of, load_pipeline, load_teacher
from cm_diffusers.objectives import OBJECTIVES, ModelSpec, Objective


DATA = SimpleNamespace(channels=1, resolution=(8, 8), num_classes=10, args=SimpleNamespace(augment=0.0))


class AnyTwoTimes(Objective):
    """A method with two times that trains EDM's networks."""

    two_times = True
    told = None

    @classmethod
    def adapt(cls, network: nn.Module, spec: ModelSpec) -> nn.Module:
        cls.told = spec.time_label
        return network if isinstance(network, TwoTimeModel) else TwoTimeModel.from_network(network)


def start_from(folder, method, options=None, **settings):
    arguments = ModelArguments(pretrained_model_name_or_path=str(folder), **settings)
    return build_start(arguments, DATA, 0, method=method, options=options)


@pytest.fixture
def two_times(tiny_unet):
    """A network with two times and random weights."""
    network = TwoTimeModel.from_network(tiny_unet(), target_time_scale=1 / 250)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(params=["log_sigma", "angle"])
def ctm(request, two_times, tmp_path):
    """A saved trajectory model."""
    scheduler = CTMScheduler(sigma_data=0.6, sigma_min=0.01, sigma_max=50.0, time_label=request.param)
    CTMPipeline(two_times, scheduler).save_pretrained(tmp_path / "ctm")
    return tmp_path / "ctm"


@pytest.fixture
def mean_flow(two_times, tmp_path):
    """A saved mean flow."""
    MeanFlowPipeline(two_times, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "mean_flow")
    return tmp_path / "mean_flow"


def test_the_denoiser_of_a_trajectory_model_is_its_jump_to_the_floor(ctm):
    pipeline = load_pipeline(str(ctm))
    denoiser = denoiser_of(pipeline)
    assert type(pipeline) is CTMPipeline and type(denoiser) is TrajectoryDenoiser
    sigma, labels = torch.tensor([0.01, 0.5, 50.0]), torch.tensor([1, 2, 3])
    x = sigma.reshape(-1, 1, 1, 1) * torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, sigma, of_classes(labels)), pipeline.jump(x, sigma, 0.01, labels))
        assert torch.equal(denoiser(x, sigma, of_classes(labels))[0], x[0])


def test_a_trajectory_model_is_no_teacher(ctm):
    with pytest.raises(ValueError, match="teacher must be a diffusion model"):
        load_teacher(str(ctm), ModelArguments())


def test_a_method_with_two_times_starts_from_a_trajectory_model(ctm):
    start, saved = start_from(ctm, AnyTwoTimes), load_pipeline(str(ctm))
    label = saved.scheduler.config.time_label
    assert (start.spec.prediction, start.spec.sigma_data, start.spec.sigma_max) == ("edm", 0.6, 50.0)
    assert start.pretrained and start.spec.time_label == AnyTwoTimes.told == label
    assert all(torch.equal(a, b) for a, b in zip(start.network.parameters(), saved.unet.parameters(), strict=True))
    other = {"log_sigma": "angle", "angle": "log_sigma"}[label]
    with pytest.raises(ValueError, match="time_label .* differs"):
        start_from(ctm, AnyTwoTimes, time_label=other)


def test_a_method_with_two_times_starts_from_a_consistency_model(tiny_unet, tmp_path):
    ConsistencyPipeline(tiny_unet(), MultistepConsistencyScheduler()).save_pretrained(tmp_path)
    start = start_from(tmp_path, AnyTwoTimes)
    assert isinstance(start.network, TwoTimeModel) and start.pretrained and AnyTwoTimes.told == "log_sigma"


def test_mean_flow_starts_from_a_mean_flow(mean_flow):
    start = start_from(mean_flow, OBJECTIVES["mean_flow"])
    assert isinstance(start.network, TwoTimeModel) and start.spec.prediction == "flow"


@pytest.mark.parametrize("method", ["diffusion", "ect", "sct"])
def test_a_method_with_one_time_refuses_models_of_two(mean_flow, method):
    with pytest.raises(ValueError, match="pretrained_model_.* two-time model, of MeanFlowPipeline, but this method"):
        start_from(mean_flow, OBJECTIVES[method], OBJECTIVES[method].Options())


def test_a_method_with_one_time_refuses_trajectory_models(ctm):
    with pytest.raises(ValueError, match="a two-time model, of CTMPipeline, but this method"):
        start_from(ctm, Objective)


def test_mean_flow_refuses_trajectory_models_and_the_reverse(ctm, mean_flow):
    with pytest.raises(ValueError, match="predicts 'edm' can't start one that predicts 'flow'"):
        start_from(ctm, OBJECTIVES["mean_flow"])
    with pytest.raises(ValueError, match="predicts 'flow' can't start one that predicts 'edm'"):
        start_from(mean_flow, AnyTwoTimes)
