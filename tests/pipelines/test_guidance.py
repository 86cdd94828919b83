"""Guidance of samplers: the formula in every pipeline, an exact case, and refusals."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    DenoisingPipeline,
    MeanFlowPipeline,
    MultistepConsistencyScheduler,
    TrigFlowPipeline,
    TrigFlowScheduler,
)
from cm_diffusers.models import EDMUNet2DModel


KINDS = {
    "consistency": (lambda network: ConsistencyPipeline(network, MultistepConsistencyScheduler()), {}),
    "ctm": (lambda network: CTMPipeline(network, CTMScheduler()), {}),
    "ctm, heun": (lambda network: CTMPipeline(network, CTMScheduler()), {"solver": "heun"}),
    "denoising": (lambda network: DenoisingPipeline(network, EDMEulerScheduler()), {}),
    "denoising, sde": (lambda network: DenoisingPipeline(network, EDMEulerScheduler()), {"solver": "sde"}),
    "flow": (lambda network: DenoisingPipeline(network, EDMEulerScheduler(), prediction="flow"), {}),
    "trigflow": (lambda network: TrigFlowPipeline(network, TrigFlowScheduler()), {}),
    "trigflow heun": (lambda network: TrigFlowPipeline(network, TrigFlowScheduler(solver="heun")), {}),
    "mean flow": (lambda network: MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler()), {}),
}
NULL = 10


def network_of(kind, label_dropout=0.1):
    two_times = kind.startswith(("ctm", "mean flow"))
    network = EDMUNet2DModel(
        8, 1, 1, 8, (1,), 1, num_class_embeds=NULL, label_dropout=label_dropout, two_times=two_times
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.class_embedding.weight.data.mul_(30)
    return network.eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind):
    make, _ = KINDS[kind]
    pipe = make(network_of(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def images(pipe, kind):
    def make(**arguments):
        arguments = {"class_labels": [1, 2, 3], "num_inference_steps": 4, **KINDS[kind][1], **arguments}
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return pipe(generator=generators, output_type="pt", **arguments).images

    return make


@pytest.fixture
def calls(pipe, monkeypatch):
    """The labels of each network call."""
    seen, forward = [], pipe.unet.forward

    def watched(*args, class_labels=None, **kwargs):
        seen.append(class_labels.tolist())
        return forward(*args, class_labels=class_labels, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", watched)
    return seen


def test_scale_1_changes_nothing(images, calls):
    plain = images()
    count = len(calls)
    assert images(guidance_scale=1).equal(plain) and images(guidance_scale=1.0, guidance_interval=[0.1, 1]).equal(
        plain
    )
    assert calls == 3 * calls[:count] and all(labels == [1, 2, 3] for labels in calls)


@pytest.mark.parametrize("away", [None, 5, [4, 5, 6]])
def test_each_call_gives_null_and_w_times_the_difference(images, pipe, monkeypatch, away):
    guided = images(guidance_scale=2.5, **({} if away is None else {"negative_class_labels": away}))
    forward = pipe.unet.forward
    others = torch.tensor(NULL if away is None else away).expand(3)

    def by_hand(*args, class_labels, **kwargs):
        given, led_from = (forward(*args, class_labels=labels, **kwargs)[0] for labels in (class_labels, others))
        return (led_from + 2.5 * (given - led_from),)

    plain = images()
    monkeypatch.setattr(pipe.unet, "forward", by_hand)
    torch.testing.assert_close(guided, images(), rtol=0, atol=2e-5)
    assert (guided - plain).abs().max() > 1e-3


def test_scale_0_is_the_model_without_classes(images):
    torch.testing.assert_close(
        images(guidance_scale=0), images(guidance_scale=0, class_labels=[7, 8, 9]), rtol=0, atol=2e-5
    )


def test_outside_of_its_interval_there_is_no_guidance(images, calls, kind):
    images(guidance_scale=2, guidance_interval=[20, math.inf])
    first, rest = calls[0], calls[1:]
    assert first == [1, 2, 3, NULL, NULL, NULL] and rest[-1] == [1, 2, 3]
    calls.clear()
    images(guidance_scale=2, guidance_interval=[0, 20])
    assert calls[0] == [1, 2, 3] and calls[-1] == [1, 2, 3, NULL, NULL, NULL]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": -1}, "guidance_scale must be a number of at least 0, got -1"),
        ({"guidance_scale": math.nan}, "guidance_scale must be"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"guidance_scale": 2, "guidance_interval": [1]}, "guidance_interval must be two noise levels"),
        ({"guidance_scale": 2, "guidance_interval": [2, 1]}, "the lower one first, got"),
        ({"guidance_scale": 2, "negative_class_labels": [1, 2]}, "one for all or one per image, 3, got 2"),
        ({"guidance_scale": 2, "negative_class_labels": 10}, "must be integers in"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_a_call(images, calls, arguments, message):
    with pytest.raises(ValueError, match=message):
        images(**arguments)
    assert not calls


def test_a_model_without_a_null_class_says_so():
    pipe = ConsistencyPipeline(network_of("", label_dropout=0), MultistepConsistencyScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="this one was trained without label dropout. Give negative"):
        pipe(class_labels=1, guidance_scale=2)
    assert pipe(class_labels=1, guidance_scale=2, negative_class_labels=2, output_type="pt").images.shape == (
        1,
        1,
        8,
        8,
    )
    with pytest.raises(ValueError, match="this one is unconditional"):
        ConsistencyPipeline(EDMUNet2DModel(8, 1, 1, 8, (1,), 1), MultistepConsistencyScheduler())(guidance_scale=2)


def test_the_distribution_is_the_guided_one_where_it_is_known(gaussian_denoiser):
    """Data N(m_c, s^2): one step gives N(sigma^2 (m_0 + w (m_c - m_0)) / (sigma^2 + s^2), (s^2 sigma / (...))^2)."""
    data_std, sigma, scale, count = 0.3, 2.0, 3.0, 4000
    network = gaussian_denoiser(num_class_embeds=10, data_std=data_std)
    scheduler = MultistepConsistencyScheduler(sigma_min=0.0, sigma_max=80.0, sigma_data=0.5, clip_denoised=False)
    pipe = ConsistencyPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": count, "class_labels": 2, "sigmas": [sigma], "generator": 0, "output_type": "latent"}
    found = pipe(guidance_scale=scale, negative_class_labels=1, **arguments).images.double()
    share = sigma**2 / (sigma**2 + data_std**2)
    expected = share * (0.1 + scale * 0.1)
    spread = data_std**2 * sigma / (sigma**2 + data_std**2)
    assert found.mean().item() == pytest.approx(expected, abs=5 * spread / math.sqrt(found.numel()))
    assert found.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * found.numel()))
