"""Calls that start from an image at a noise level, and levels given as timesteps."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler
from PIL import Image

from cm_diffusers import ConsistencyPipeline, DenoisingPipeline, MultistepConsistencyScheduler
from cm_diffusers.models import build_unet
from tests.pipelines.test_guidance import KINDS, network_of


SIGMA = 3.0


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind):
    pipe = KINDS[kind][0](network_of(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs(pipe, monkeypatch):
    """The input of each network call."""
    seen, forward = [], pipe.unet.forward

    def watched(sample, *args, **kwargs):
        seen.append(sample)
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", watched)
    return seen


@pytest.fixture
def make(pipe, kind):
    def make(**arguments):
        return pipe(output_type="pt", **{"class_labels": 3, "num_inference_steps": 2, **KINDS[kind][1], **arguments})

    return make


def network_input(kind, x0, noise, sigma=SIGMA):
    if kind in ("flow", "mean flow"):
        t = sigma / (1 + sigma)
        return (1 - t) * x0 + t * noise
    if kind.startswith("trigflow"):
        t = math.atan(sigma / 0.5)
        return (math.cos(t) * x0 + math.sin(t) * 0.5 * noise) / 0.5
    return (x0 + sigma * noise) / math.sqrt(sigma**2 + 0.25)


def test_the_first_call_sees_the_image_with_noise_of_its_level(make, kind, inputs):
    image, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    make(image=image, latents=noise, noise_level=SIGMA)
    torch.testing.assert_close(inputs[0], network_input(kind, 2 * image - 1, noise), rtol=0, atol=1e-6)


def test_levels_that_begin_with_it_are_the_same(make, pipe):
    image = torch.rand(1, 1, 8, 8)
    first = make(image=image, noise_level=SIGMA, num_inference_steps=3, generator=0).images
    levels = pipe.levels_below(SIGMA, 3)
    assert len(levels) == 3 and levels[0] == pytest.approx(SIGMA) and levels == sorted(levels, reverse=True)
    assert pipe.num_timesteps == 3
    again = make(image=image, sigmas=levels, num_inference_steps=None, generator=0).images
    torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    times = pipe.scheduler.timesteps[:: getattr(pipe.scheduler, "order", 1)]
    if getattr(pipe.scheduler, "order", 1) == 2:  # Heun's method has each time twice, except the first
        times = [pipe.scheduler.timesteps[0], *pipe.scheduler.timesteps[1::2]]
    by_times = make(image=image, timesteps=[float(t) for t in times], num_inference_steps=None, generator=0).images
    torch.testing.assert_close(first, by_times, rtol=0, atol=1e-5)


def test_one_image_in_any_form_is_for_all(make):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    tensor = torch.from_numpy(pixels / 255).float()[None]
    forms = [tensor, tensor[None], pixels[..., None] / 255, Image.fromarray(pixels), [Image.fromarray(pixels)]]
    made = [make(image=form, noise_level=1.0, batch_size=3, generator=[0, 1, 2]).images for form in forms]
    assert made[0].shape == (3, 1, 8, 8) and not made[0][0].equal(made[0][1])
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=0, atol=1e-6)


def test_the_number_of_images_is_that_of_the_batch(make):
    assert make(image=torch.rand(3, 1, 8, 8), noise_level=1.0).images.shape[0] == 3
    with pytest.raises(ValueError, match="batch_size is 2, the number of images is 3"):
        make(image=torch.rand(3, 1, 8, 8), noise_level=1.0, batch_size=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"noise_level": 1.0}, "noise_level 1 has no effect without an image to start from; give image"),
        ({"image": torch.rand(1, 1, 8, 8)}, "image needs a noise_level, or sigmas"),
        ({"image": torch.rand(1, 1, 8, 8), "noise_level": 100.0}, r"noise_level must be finite and in \(.*80\]"),
        ({"image": torch.rand(1, 1, 8, 8), "noise_level": 0.0}, "noise_level must be finite and in"),
        ({"image": torch.rand(1, 1, 8, 8), "noise_level": "much"}, "noise_level must be a number"),
        ({"image": torch.rand(1, 1, 8, 8), "noise_level": 1, "sigmas": [2, 1]}, "leave noise_level out"),
        ({"image": torch.rand(1, 1, 9, 8), "noise_level": 1.0}, r"image must have the shape \(n, 1, 8, 8\), got"),
        ({"image": torch.rand(1, 1, 8, 8) * 3, "noise_level": 1.0}, r"image must lie in \[0, 1\]"),
        ({"image": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "noise_level": 1.0}, "image must be a tensor or an arr"),
        ({"image": Image.new("L", (9, 8)), "noise_level": 1.0}, "image must be of 8 x 8 pixels, got 9 x 8"),
        ({"image": "cat.png", "noise_level": 1.0}, "image must be a tensor or an array of floats, got str"),
    ],
)
def test_what_can_not_be_meant_is_said_before_the_network_is_called(make, kind, inputs, arguments, message):
    if kind == "mean flow" and arguments.get("noise_level") == 100.0:
        pytest.skip("its levels have no end")
    arguments = {"num_inference_steps": None, **arguments} if "sigmas" in arguments else arguments
    with pytest.raises(ValueError, match=message):
        make(**arguments)
    assert not inputs


def test_euler_s_method_from_the_image_finds_the_end_of_its_path(gaussian_denoiser):
    network = gaussian_denoiser()
    pipe = DenoisingPipeline(network, EDMEulerScheduler(), time_label="log_sigma")
    pipe.set_progress_bar_config(disable=True)
    image, noise = torch.rand(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
    made = pipe(image=image, latents=noise, noise_level=SIGMA, num_inference_steps=100, output_type="latent").images
    expected = network.ode_solution((2 * image - 1 + SIGMA * noise).double(), SIGMA)
    assert (made - expected).abs().max() < 2e-3


def test_heun_and_the_sde_take_levels_and_times(gaussian_denoiser):
    network = gaussian_denoiser()
    pipe = DenoisingPipeline(network, EDMEulerScheduler(), time_label="log_sigma")
    pipe.set_progress_bar_config(disable=True)
    noise, levels = torch.randn(4096, 1, 4, 4), np.geomspace(80, 0.01, 60)
    for solver, tolerance in (("heun", 0.01), ("sde", 0.03)):  # orders 2 and 1
        made = pipe(latents=noise, sigmas=levels, solver=solver, output_type="latent", generator=0).images
        assert pipe.num_timesteps == 60 and pipe.scheduler.sigmas[:-1].numpy() == pytest.approx(levels, rel=1e-6)
        assert float(made.mean()) == pytest.approx(0.2, abs=0.01)
        assert float(made.std()) == pytest.approx(0.3, abs=tolerance)
        times = pipe.scheduler.timesteps.tolist()
        again = pipe(latents=noise, timesteps=times, solver=solver, output_type="latent", generator=0).images
        torch.testing.assert_close(made, again, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "levels, message",
    [
        ({"sigmas": [1, 2]}, r"`sigmas` must fall strictly, got \[1, 2\]"),
        ({"sigmas": [100, 2]}, r"`sigmas` must be levels in \(0, 80\], falling, got"),
        ({"sigmas": [1, 0]}, r"`sigmas` must be levels in \(0, 80\]"),
        ({"sigmas": []}, "`sigmas` must be levels"),
        ({"timesteps": [2.0, 1.0]}, r"`timesteps` must be levels in \(0, 80\], .*, which mean the levels \[2980"),
        ({"timesteps": [1.0], "sigmas": [1.0]}, "Pass exactly one of"),
        ({"num_inference_steps": 3, "sigmas": [1.0]}, "Pass exactly one of"),
        ({"num_inference_steps": 1}, "num_inference_steps must be an integer of at least 2"),
    ],
)
def test_levels_of_diffusion_models_are_checked(gaussian_denoiser, levels, message):
    pipe = DenoisingPipeline(gaussian_denoiser(), EDMEulerScheduler())
    with pytest.raises(ValueError, match=message):
        pipe(**levels)


def test_images_are_encoded_as_they_are_decoded():
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (4, 8)
    vae = AutoencoderKL(1, 1, *blocks, latent_channels=2, norm_num_groups=2)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    scheduler = MultistepConsistencyScheduler(clip_denoised=False)
    pipe = ConsistencyPipeline(build_unet("tiny", (4, 4), 2, None), scheduler, vae)
    image = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        latents = pipe.encoded(2 * image - 1, torch.zeros(2, 2, 4, 4))
        mode = vae.encode(2 * image - 1).latent_dist.mode()
        torch.testing.assert_close(latents, (mode - 0.1) * 0.5)
        torch.testing.assert_close(pipe.decode(latents), vae.decode(mode).sample, rtol=0, atol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(image=image, noise_level=0.5, output_type="pt").images.shape == (2, 1, 8, 8)
