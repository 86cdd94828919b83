import math

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, EDMEulerScheduler, ModelMixin, SCMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from cm_diffusers import (
    ConsistencyPipeline,
    DenoisingPipeline,
    MultistepConsistencyScheduler,
    TrigFlowPipeline,
    TrigFlowScheduler,
)


SIGMA_DATA = 0.5


class IdentityModel(ModelMixin, ConfigMixin):
    """F of the exact consistency function for data N(0, sigma_data^2): the identity in TrigFlow's scale."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, num_class_embeds=None):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        output = -(timestep / 2).tan().to(sample.dtype) * sample + self.zero
        return UNet2DOutput(output) if return_dict else (output,)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trigflow(network, **config):
    return quiet(TrigFlowPipeline(network, TrigFlowScheduler(**config)))


def in_pixels(sample):
    return (sample / 2 + 0.5).clamp(0, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def exact_denoiser(gaussian_denoiser):
    """A function that makes exact TrigFlow denoisers for Gaussian data: F is EDM's with the opposite sign."""

    def make(**config):
        network = gaussian_denoiser(angle=True, **config)
        network.register_forward_hook(lambda module, args, output: (-output[0],))
        return network

    return make


# --- consistency models


@pytest.mark.parametrize("levels", [{}, {"sigmas": [math.inf]}, {"timesteps": [1.2]}])
def test_one_step_of_the_exact_model_is_the_noise_at_its_level(levels):
    pipe, noise = trigflow(IdentityModel(), clip_denoised=False), torch.randn(3, 1, 4, 4)
    images = pipe(latents=noise, output_type="pt", **levels).images
    sin = math.sin(levels.get("timesteps", [math.atan(160)])[0]) if "sigmas" not in levels else 1.0
    torch.testing.assert_close(images, in_pixels(SIGMA_DATA * sin * noise), rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [{"num_inference_steps": 3}, {"sigmas": [math.inf, 2, 0.3]}])
def test_steps_of_the_exact_model_turn_towards_new_noise(levels):
    pipe = trigflow(IdentityModel(), clip_denoised=False)
    images = pipe(2, generator=generator(), output_type="pt", **levels).images
    noise, angles = generator(), pipe.scheduler.timesteps
    x = torch.zeros(2, 1, 4, 4)
    for t in angles:
        x = t.cos() * x + t.sin() * SIGMA_DATA * torch.randn(2, 1, 4, 4, generator=noise)
    torch.testing.assert_close(images, in_pixels(x).float(), rtol=0, atol=1e-6)


def test_images_of_the_exact_model_have_the_scale_of_the_data_after_any_number_of_steps():
    pipe, seen = trigflow(IdentityModel(sample_size=64), clip_denoised=False), {}
    for n in (1, 2, 10):
        pipe(
            8, num_inference_steps=n, generator=generator(), output_type="pt",
            callback_on_step_end=lambda pipe, step, t, tensors, n=n: seen.update({n: tensors["latents"].std().item()}),
        )  # fmt: skip
    assert list(seen.values()) == pytest.approx([SIGMA_DATA] * 3, rel=0.02)


@pytest.mark.parametrize("steps", [{}, {"sigmas": [80, 0.8]}, {"sigmas": [40, 3, 0.1]}])
def test_images_are_those_of_an_edm_network_of_the_opposite_sign(gaussian_denoiser, exact_denoiser, steps):
    arguments = {"class_labels": [1, 4], "output_type": "pt", **steps}
    scheduler = MultistepConsistencyScheduler(sigma_min=0.0, time_label="angle")
    edm = quiet(ConsistencyPipeline(gaussian_denoiser(num_class_embeds=5, angle=True), scheduler))
    ours = trigflow(exact_denoiser(num_class_embeds=5))
    a, b = (pipe(generator=generator(), **arguments).images for pipe in (ours, edm))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_angles_and_levels_are_two_names_of_the_same():
    pipe, noise = trigflow(IdentityModel()), torch.randn(2, 1, 4, 4)
    arguments = {"latents": noise, "output_type": "pt"}
    by_angle = pipe(timesteps=[math.atan(160), math.atan(1.6)], generator=generator(), **arguments).images
    by_level = pipe(sigmas=[80, 0.8], generator=generator(), **arguments).images
    torch.testing.assert_close(by_angle, by_level, rtol=0, atol=1e-7)


# --- diffusion models


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solvers_follow_the_ode_of_gaussian_data(exact_denoiser, solver):
    network = exact_denoiser(num_class_embeds=5, data_std=0.2)
    noise, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 4])
    exact = in_pixels(network.ode_solution(80 * noise, 80, labels))
    pipe, errors = trigflow(network, solver=solver), {}
    for n in (18, 36, 72):
        arguments = {"class_labels": labels, "latents": noise, "num_inference_steps": n, "output_type": "pt"}
        errors[n] = (pipe(**arguments).images - exact).abs().max().item()
    order = {"euler": 1, "heun": 2}[solver]
    assert errors[18] < {"euler": 0.05, "heun": 0.015}[solver]  # the values differ by 0.6
    assert math.log2(errors[36] / errors[72]) == pytest.approx(order, abs=0.15)


def test_euler_is_that_of_the_denoising_pipeline(gaussian_denoiser, exact_denoiser):
    noise = torch.randn(2, 1, 4, 4)
    edm = quiet(DenoisingPipeline(gaussian_denoiser(angle=True), EDMEulerScheduler(), time_label="angle"))
    ours = trigflow(exact_denoiser(), solver="euler")
    a = ours(latents=noise, num_inference_steps=7, output_type="pt").images
    b = edm(latents=noise, num_inference_steps=7, output_type="pt", solver="euler").images
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("configured, asked", [("euler", "heun"), ("heun", "euler"), ("heun", "heun")])
def test_a_solver_for_one_call(exact_denoiser, configured, asked):
    calls, network = [], exact_denoiser()
    network.register_forward_hook(lambda *args: calls.append(1))
    pipe, noise = trigflow(network, solver=configured), torch.randn(2, 1, 4, 4)
    images = pipe(latents=noise, num_inference_steps=6, solver=asked, output_type="pt").images
    assert len(calls) == {"euler": 6, "heun": 11}[asked]
    again = trigflow(network, solver=asked)(latents=noise, num_inference_steps=6, output_type="pt").images
    assert torch.equal(images, again)
    assert pipe.scheduler.config.solver == configured


def test_a_callback_sees_each_level_once_and_may_change_what_follows(exact_denoiser):
    pipe, noise, seen = trigflow(exact_denoiser(), solver="heun"), torch.randn(2, 1, 4, 4), []

    def scale(pipe, step, t, tensors):
        seen.append((step, float(t)))
        return {"latents": tensors["latents"] * 0.5}

    arguments = {"latents": noise, "timesteps": [1.5, 1.0, 0.5], "output_type": "pt"}
    images = pipe(callback_on_step_end=scale, **arguments).images
    assert seen == [(0, 1.5), (1, 1.0), (2, 0.5)]

    scheduler, x = TrigFlowScheduler(solver="heun"), noise * SIGMA_DATA * math.sin(1.5)
    scheduler.set_timesteps(timesteps=[1.5, 1.0, 0.5])
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x / SIGMA_DATA, t, return_dict=False)[0].detach(), t, x).prev_sample
        x = x * 0.5 if scheduler.state_in_first_order else x
    torch.testing.assert_close(images, in_pixels(x), rtol=0, atol=1e-6)


# --- settings, errors


@pytest.mark.parametrize(
    "configured, arguments, message",
    [
        ("consistency", {"solver": "heun"}, "no velocity to follow"),
        ("heun", {"solver": "consistency"}, "can't jump"),
        ("heun", {"num_inference_steps": 1}, "at least 2"),
        ("consistency", {"timesteps": [80.0, 0.8]}, "pass noise levels as `sigmas`"),
        ("consistency", {"sigmas": [80, 0.8], "timesteps": [1.5]}, "exactly one"),
        ("consistency", {"sigmas": [80, 0.8], "num_inference_steps": 2}, "exactly one"),
    ],
)
def test_errors_come_before_any_work(configured, arguments, message):
    pipe = trigflow(IdentityModel(), solver=configured)
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_other_schedulers_are_refused():
    with pytest.raises(ValueError, match="needs a TrigFlowScheduler, not a SCMScheduler"):
        TrigFlowPipeline(IdentityModel(), SCMScheduler())


def test_settings_of_the_scheduler_are_saved(tiny_unet, tmp_path):
    TrigFlowPipeline(tiny_unet(), TrigFlowScheduler(sigma_data=0.7, solver="heun")).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again, TrigFlowPipeline) and isinstance(again.scheduler, TrigFlowScheduler)
    assert again.scheduler.config.sigma_data == 0.7 and again.scheduler.config.solver == "heun"
