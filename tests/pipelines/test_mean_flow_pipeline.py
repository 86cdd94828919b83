import math

import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from cm_diffusers import MeanFlowPipeline


class GaussianMeanFlow(ModelMixin, ConfigMixin):
    """The average velocity of the probability-flow ODE for data N(mean of the class, data_std^2), in closed form."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, num_class_embeds=None, data_std=0.5):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def mean(self, class_labels):
        return 0.0 if class_labels is None else (0.1 * class_labels).reshape(-1, 1, 1, 1)

    def std(self, time):
        return ((1 - time) ** 2 * self.config.data_std**2 + time**2) ** 0.5

    def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
        mean, t, r = self.mean(class_labels), timestep, target_timestep
        if t == r:  # the limit, dx/dt of x = (1 - t) mean + std(t) noise
            slope = (t - (1 - t) * self.config.data_std**2) / self.std(t) ** 2
            output = slope * (sample - (1 - t) * mean) - mean + self.zero
            return UNet2DOutput(output) if return_dict else (output,)
        target = (1 - r) * mean + (sample - (1 - t) * mean) * self.std(r) / self.std(t)
        output = (sample - target) / (t - r) + self.zero
        return UNet2DOutput(output) if return_dict else (output,)


def mean_flow(network, **scheduler):
    pipe = MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_pixels(sample):
    return (sample / 2 + 0.5).clamp(0, 1)


def test_average_velocity_in_numbers():
    one = torch.ones(1, 1, 1, 1).double()
    velocity = GaussianMeanFlow()(one, 0.8, 0.3, return_dict=False)[0]
    assert velocity.item() == pytest.approx(0.85645625, rel=1e-8)


@pytest.mark.parametrize(
    "steps",
    [{}, *({"num_inference_steps": n} for n in (1, 2, 7)), {"sigmas": [math.inf]}, {"sigmas": [math.inf, 1, 0.1]}],
)
def test_any_steps_of_the_exact_model_make_the_same_images(steps):
    pipe, noise = mean_flow(GaussianMeanFlow(num_class_embeds=5)), torch.randn(3, 1, 4, 4)
    labels = torch.tensor([0, 2, 4])
    images = pipe(class_labels=labels, latents=noise, output_type="pt", **steps).images
    exact = pipe.unet.mean(labels) + 0.5 * noise
    torch.testing.assert_close(images, in_pixels(exact), rtol=0, atol=2e-6)


def test_sampling_starts_from_noise_of_the_first_level():
    pipe, noise = mean_flow(GaussianMeanFlow()), torch.randn(2, 1, 4, 4)
    images = pipe(latents=noise, sigmas=[4.0], output_type="pt").images
    exact = 0.8 * noise * 0.5 / math.hypot(0.1, 0.8)
    torch.testing.assert_close(images, in_pixels(exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "steps, times",
    [
        ({}, [1, 0]),
        ({"num_inference_steps": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ({"sigmas": [math.inf, 80, 1, 0.25]}, [1, 80 / 81, 0.5, 0.2, 0]),
    ],
)
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_the_network_is_given_both_flow_times_in_its_scale(steps, times, time_scale):
    pipe, seen = mean_flow(GaussianMeanFlow()), []
    pipe = MeanFlowPipeline(pipe.unet, FlowMatchEulerDiscreteScheduler(), time_scale=time_scale)
    times = [time_scale * time for time in times]
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((float(args[1]), float(kwargs["target_timestep"]))), with_kwargs=True
    )
    pipe(**steps)
    assert [x for pair in seen for x in pair] == pytest.approx([x for pair in zip(times, times[1:]) for x in pair])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 2, "sigmas": [80, 1]}, "exactly one"),
        *(({"sigmas": levels}, "positive numbers") for levels in ([], [1, 0], [1, -1], [math.nan])),
        *(({"sigmas": levels}, "fall strictly") for levels in ([1, 80], [1, 1], [math.inf, math.inf])),
    ],
)
def test_errors_come_before_any_work(arguments, message):
    pipe = mean_flow(GaussianMeanFlow())
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"stochastic_sampling": True}, {"shift_terminal": 0.1}]
)
def test_schedulers_that_move_the_times_or_add_noise_are_refused(config):
    with pytest.raises(ValueError, match=f"must have {next(iter(config))}="):
        mean_flow(GaussianMeanFlow(), **config)


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_inversion_follows_the_ode_up_and_sampling_leads_back(time_scale):
    class Scaled(GaussianMeanFlow):
        def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
            times = (time / time_scale for time in (timestep, target_timestep))
            return super().forward(sample, *times, class_labels, return_dict)

    network = Scaled(num_class_embeds=5)
    pipe = MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler(), time_scale=time_scale)
    pipe.set_progress_bar_config(disable=True)
    labels, errors = torch.tensor([0, 2, 4]), []
    images = 0.3 + 0.4 * torch.rand(3, 1, 4, 4)
    exact = (2 * images - 1 - network.mean(labels)) / network.config.data_std
    for steps in (18, 36):
        noise = pipe.invert(images, labels, num_inference_steps=steps)
        errors.append((noise - exact).abs().max().item())
    assert errors[0] < 0.02 and 1.7 < math.log2(errors[0] / errors[1]) < 2.3  # second order
    assert torch.equal(pipe.invert(images, labels), pipe.invert(images, labels, num_inference_steps=18))
    back = pipe(latents=noise, class_labels=labels, output_type="pt").images
    torch.testing.assert_close(back, images, rtol=0, atol=0.003)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": None}, "images must be given"),
        ({"images": torch.rand(1, 1, 4, 2)}, "images must have the shape"),
        ({"class_labels": None}, "conditional; pass the class_labels"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
    ],
)
def test_errors_of_an_inversion(arguments, message):
    pipe = mean_flow(GaussianMeanFlow(num_class_embeds=5))
    with pytest.raises(ValueError, match=message):
        pipe.invert(**{"images": torch.rand(1, 1, 4, 4), "class_labels": 1, **arguments})
