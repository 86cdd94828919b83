"""Zero-shot editing, algorithm 4 of the consistency paper: step by step and on Gaussians, in pixels and latents."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from PIL import Image

from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    MultistepConsistencyScheduler,
    TrigFlowPipeline,
    TrigFlowScheduler,
    TwoTimeModel,
)
from cm_diffusers.core.arrays import slerp
from cm_diffusers.core.measurements import averages, inside, luma, of_averages
from cm_diffusers.models import EDMUNet2DModel
from tests.helpers.scripts import load_script
from tests.helpers.stock_pipelines import autoencoder_kl, randomised


SIZE, SIGMAS = 8, [5.0, 1.0, 0.3]


def network(channels, vae=False, classes=None):
    return randomised(EDMUNet2DModel(4 if vae else SIZE, channels, channels, 8, (1,), 1, num_class_embeds=classes))


PIPELINES = {
    "consistency": lambda unet, vae=None: ConsistencyPipeline(unet, MultistepConsistencyScheduler(), vae),
    "trigflow": lambda unet, vae=None: TrigFlowPipeline(unet, TrigFlowScheduler(), vae),
    "ctm": lambda unet, vae=None: CTMPipeline(TwoTimeModel.from_network(unet), CTMScheduler(), vae),
}


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture
def build(kind):
    def build(channels=3, **settings):
        pipe = PIPELINES[kind](network(channels, **settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def picture(channels=3, count=1, size=(SIZE, SIZE), seed=3):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


MASK = torch.zeros(SIZE, SIZE)
MASK[2:6, 3:8] = 1
INNER = F.pad(torch.ones(5, 4), (2, 2, 1, 2))  # for outpainting: rows 1 to 5, columns 2 to 5
EDITS = {
    "inpaint": (lambda pipe, **call: pipe.inpaint(picture(), MASK, **call), inside(1 - MASK), picture()),
    "outpaint": (
        lambda pipe, **call: pipe.outpaint(picture(size=(5, 4)), **call),
        inside(INNER),
        F.pad(picture(size=(5, 4)), (2, 2, 1, 2), value=0.5),
    ),
    "colorize": (lambda pipe, **call: pipe.colorize(picture(1), **call), luma, picture(1).expand(-1, 3, -1, -1)),
    "super_resolve": (
        lambda pipe, **call: pipe.super_resolve(picture(size=(4, 4)), **call),
        averages((4, 4), (SIZE, SIZE)),
        F.interpolate(picture(size=(4, 4)), (SIZE, SIZE)),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_known_is_in_the_result(build, edit):
    run, project, start = EDITS[edit]
    made = run(build(), sigmas=SIGMAS, generator=[1, 2], batch_size=2, output_type="latent").images
    told = project(2 * start - 1).expand_as(made)
    torch.testing.assert_close(project(made), told, rtol=0, atol=2e-6)
    assert (made[0] - made[1]).std() > 0.05  # the rest is generated


@pytest.mark.parametrize("edit", EDITS)
def test_each_step_is_that_of_algorithm_4(kind, build, edit):
    run, project, start = EDITS[edit]
    pipe, seen = build(), []

    def watch(_, step, timestep, tensors):
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})

    names = ["latents", "pred_original_sample"]
    given = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names}
    noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    last = run(pipe, sigmas=SIGMAS, latents=noise, generator=4, output_type="latent", **given).images
    source, x0 = torch.Generator().manual_seed(4), 2 * start - 1
    clean = jumped(kind, pipe, x0, noise, SIGMAS[0])
    for i, step in enumerate(seen):
        clean = clean - project(clean) + project(x0)
        torch.testing.assert_close(step["pred_original_sample"], clean, rtol=0, atol=2e-5)
        if i + 1 < len(SIGMAS):
            noise = torch.randn(1, 3, SIZE, SIZE, generator=source)
            clean = jumped(kind, pipe, clean, noise, SIGMAS[i + 1])
    torch.testing.assert_close(last, clean, rtol=0, atol=2e-5)


def jumped(kind, pipe, clean, noise, sigma):
    """The clean image after a jump, in one pipeline call, from `clean` with noise of level `sigma`."""
    added = math.sqrt(sigma**2 - (0 if kind == "trigflow" or sigma == SIGMAS[0] else 0.002**2))
    x = clean + added * noise
    return pipe(latents=x / sigma, sigmas=[sigma], output_type="latent").images


def test_levels_by_default_begin_at_the_highest_and_end_near_the_data(build):
    pipe = build(1)
    pipe.inpaint(picture(1), MASK)
    levels = pipe.scheduler.sigmas[:-1]
    assert len(levels) == 20 == pipe.num_timesteps
    torch.testing.assert_close(levels[[0, 1, -1]], torch.tensor([80, 2.0, 0.1]).double(), rtol=1e-5, atol=0)
    pipe.inpaint(picture(1), MASK, num_inference_steps=3, noise_level=1.0)
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx([1, 0.1**0.5, 0.1])
    pipe.inpaint(picture(1), MASK, num_inference_steps=1)
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx([80])


def test_one_image_for_many_masks_and_many_for_one(build):
    pipe = build(1)
    masks = torch.stack([MASK, 1 - MASK])[:, None]
    made = pipe.inpaint(picture(1), masks, sigmas=SIGMAS, output_type="pt").images
    for i, mask in enumerate((MASK, 1 - MASK)):
        known = mask == 0
        torch.testing.assert_close(made[i, 0][known], picture(1)[0, 0][known], rtol=0, atol=1e-6)
    made = pipe.inpaint(picture(1, 3), MASK, sigmas=SIGMAS, output_type="pt").images
    torch.testing.assert_close(made[..., MASK == 0], picture(1, 3)[..., MASK == 0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one mask, or one mask per image, 3; got 2"):
        pipe.inpaint(picture(1, 3), masks)


def test_an_image_and_a_mask_of_pil_give_one(build):
    pipe = build(3)
    pixels = (picture()[0].permute(1, 2, 0) * 255).round().byte().numpy()
    mask = Image.fromarray((MASK.numpy() * 255).astype(np.uint8))
    made = np.asarray(pipe.inpaint(Image.fromarray(pixels), mask, sigmas=SIGMAS).images[0])
    assert np.array_equal(made[MASK == 0], pixels[MASK == 0]) and not np.array_equal(made, pixels)


def test_where_an_outpainted_image_lies(build):
    pipe, inner = build(1), picture(1, size=(5, 4))
    made = pipe.outpaint(inner, top=3, left=0, sigmas=SIGMAS, output_type="pt").images
    torch.testing.assert_close(made[..., 3:, :4], inner, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at most 3 and 4"):
        pipe.outpaint(inner, top=4)
    with pytest.raises(ValueError, match="left must be an integer of at least 0"):
        pipe.outpaint(inner, left=-1)


def test_factors_of_super_resolution_may_be_any(build):
    pipe, small = build(1), picture(1, size=(3, 5))
    made = pipe.super_resolve(small, sigmas=SIGMAS, output_type="latent").images
    wanted = of_averages(2 * small - 1, (SIZE, SIZE))
    torch.testing.assert_close(averages((3, 5), (SIZE, SIZE))(made), wanted, rtol=0, atol=3e-6)


def test_denoising_is_one_jump_from_the_noisy_image(build):
    pipe = build(1)
    noisy = picture(1, 2) + 0.4 * torch.randn(2, 1, SIZE, SIZE)
    made = pipe.denoise(noisy, 0.8, output_type="latent").images
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx([0.8])
    image, noise = picture(1, 2), (noisy - picture(1, 2)) / 0.4
    same = pipe(image=image, latents=noise, noise_level=0.8, num_inference_steps=1, output_type="latent").images
    torch.testing.assert_close(made, same, rtol=0, atol=2e-5)
    for level in (0, 81):
        with pytest.raises(ValueError, match="noise_level|sigmas"):
            pipe.denoise(noisy, level)
    with pytest.raises(ValueError, match="num_inference_steps can't be set here"):
        pipe.denoise(noisy, 0.8, num_inference_steps=2)


def test_what_lies_between_two_noises(kind, build):
    if kind == "ctm":
        pytest.skip("it inverts images and interpolates these")
    pipe = build(1, classes=10)
    ends = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    made = pipe.interpolate(5, latents=ends, class_labels=3, output_type="latent").images
    noises = slerp(*ends, torch.linspace(0, 1, 5).double())
    expected = pipe(latents=noises, class_labels=[3] * 5, output_type="latent").images
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    drawn = pipe.interpolate(3, generator=5, num_inference_steps=2, output_type="latent").images
    again = pipe.interpolate(3, generator=5, num_inference_steps=2, output_type="latent").images
    assert torch.equal(drawn, again) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="num_images must be an integer of at least 2"):
        pipe.interpolate(1)


def test_classes_guidance_and_interrupts_are_those_of_a_call(build):
    pipe = build(1, classes=10)
    one, other = (
        pipe.inpaint(picture(1), MASK, class_labels=label, generator=0, sigmas=SIGMAS, output_type="pt").images
        for label in (1, 2)
    )
    assert not torch.equal(one, other)
    calls = []

    def stop(pipe, step, timestep, tensors):
        calls.append(step)
        pipe._interrupt = True

    made = pipe.inpaint(picture(1), MASK, generator=0, callback_on_step_end=stop, output_type="pt").images
    assert calls == [0] and made.shape == (1, 1, SIZE, SIZE)


WRONG = {
    "no image": (lambda pipe: pipe.inpaint(None, MASK), "image must be given"),
    "no mask": (lambda pipe: pipe.inpaint(picture(), None), "mask must be given"),
    "mask of another size": (lambda pipe: pipe.inpaint(picture(), torch.ones(4, 4)), "mask must have the shape"),
    "mask of 255": (lambda pipe: pipe.inpaint(picture(), 255 * MASK), r"mask must lie in \[0, 1\]"),
    "large image": (lambda pipe: pipe.outpaint(picture(size=(9, 4))), "at most the model's size"),
    "large image to enlarge": (lambda pipe: pipe.super_resolve(picture(size=(9, 4))), "at most the model's size"),
    "colours to colour": (lambda pipe: pipe.colorize(picture()), r"must have the shape \(n, 1, 8, 8\)"),
    "level": (lambda pipe: pipe.inpaint(picture(), MASK, noise_level=100), "noise_level must lie in"),
    "steps": (lambda pipe: pipe.inpaint(picture(), MASK, num_inference_steps=0), "num_inference_steps must be"),
    "both": (lambda pipe: pipe.inpaint(picture(), MASK, sigmas=SIGMAS, noise_level=1.0), "leave noise_level out"),
    "unknown": (lambda pipe: pipe.inpaint(picture(), MASK, strength=0.5), "strength"),
    "callback": (lambda pipe: pipe.inpaint(picture(), MASK, callback_on_step_end=3), "callback_on_step_end"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_meant_is_refused_before_the_network_is_called(build, monkeypatch, case):
    pipe = build()
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: pytest.fail("the network was called"))
    run, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        run(pipe)


def test_grey_models_have_no_colours_and_diffusion_models_do_not_jump():
    grey = ConsistencyPipeline(network(1), MultistepConsistencyScheduler())
    with pytest.raises(ValueError, match="3 channels; this model has 1"):
        grey.colorize(picture(1))
    diffusion = TrigFlowPipeline(network(1), TrigFlowScheduler(solver="heun"))
    for edit in (lambda: diffusion.inpaint(picture(1), MASK), lambda: diffusion.denoise(picture(1), 1.0)):
        with pytest.raises(ValueError, match="diffusion model, which can't"):
            edit()
    trajectory = PIPELINES["ctm"](network(1))
    with pytest.raises(ValueError, match="gamma can't be set here"):
        trajectory.inpaint(picture(1), MASK, gamma=0.5)


# --- latents


@pytest.fixture
def latent(kind):
    pipe = PIPELINES[kind](network(4, vae=True), autoencoder_kl(3))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_latents_of_known_pixels_are_put_back_and_decoded_once(latent, monkeypatch):
    factor = latent.image_shape[1] // latent.sample_shape[1]
    size = latent.image_shape[1]
    mask, decoded = torch.zeros(size, size), []
    mask[: size // 2 - 1, : size // 2 + 1] = 1  # not along the edges of latents
    decode = type(latent.vae).decode
    monkeypatch.setattr(type(latent.vae), "decode", lambda self, *a, **k: decoded.append(1) or decode(self, *a, **k))
    image = picture(size=(size, size))
    made = latent.inpaint(image, mask, sigmas=SIGMAS, output_type="latent").images
    told = latent.encoded(2 * image - 1, made)
    known = F.max_pool2d(mask[None, None], factor)[0, 0] == 0
    assert 0 < known.sum() < known.numel()
    torch.testing.assert_close(made[..., known], told[..., known], rtol=0, atol=1e-5)
    assert (made[..., ~known] - told[..., ~known]).abs().mean() > 0.05
    assert not decoded
    images = latent.outpaint(picture(size=(size - factor, size)), sigmas=SIGMAS, output_type="pt").images
    assert images.shape == (1, *latent.image_shape) and len(decoded) == 1


@pytest.mark.parametrize("method", ["colorize", "super_resolve", "denoise"])
def test_what_needs_pixels_says_so(latent, method):
    with pytest.raises(ValueError, match=f"{method} needs a pixel model"):
        getattr(latent, method)(picture(), **({"noise_level": 1.0} if method == "denoise" else {}))


# --- stock folders, and Gaussians


def test_a_stock_folder_is_edited(tmp_path):
    unet = network(1)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(tmp_path)
    pipe = ConsistencyPipeline.from_pretrained(tmp_path)
    made = pipe.inpaint(picture(1), MASK, sigmas=SIGMAS, output_type="pt").images
    torch.testing.assert_close(made[..., MASK == 0], picture(1)[..., MASK == 0], rtol=0, atol=1e-6)


EXACT = load_script("editing_gaussian", "benchmarks/experiments")


@pytest.mark.parametrize("name", ["inpaint the right half", "super_resolve 4 x 4"])
def test_many_low_levels_sample_the_posterior_of_a_gaussian(name):
    mean, covariance = EXACT.gaussian()
    truth = torch.from_numpy(EXACT.drawn(1, seed=0)).float().reshape(1, 1, EXACT.SIZE, EXACT.SIZE)
    pipe = EXACT.pipeline()
    edit, project, start = EXACT.edits(pipe, truth)[name]
    known, begin = EXACT.matrix(project), start.double().flatten().numpy()
    wanted, spread = EXACT.posterior(mean, covariance, known, known @ begin)
    base = np.linalg.norm((np.eye(len(mean)) - known) @ (mean - wanted))
    found = {}
    for n in (5, 40):
        made = edit(num_inference_steps=n, batch_size=4000, generator=0, output_type="latent").images
        x = made.flatten(1).double().numpy()
        sigmas = pipe.scheduler.sigmas[:-1].tolist()
        now, around = EXACT.algorithm(mean, covariance, known, begin, sigmas)
        assert np.linalg.norm(x.mean(0) - now) < 4 * np.sqrt(np.trace(around) / 4000)
        usual = np.hypot(np.trace(around), np.linalg.norm(around)) / np.sqrt(4000)  # for a Wishart matrix
        assert np.linalg.norm(np.cov(x.T) - around) < 1.3 * usual
        found[n] = EXACT.bias(name, known, sigmas), np.trace(around) / np.trace(spread)
    assert found[40][0] < 0.35 < found[5][0] and 1 < found[40][1] < found[5][1]
    now, around = EXACT.algorithm(mean, covariance, known, begin, np.geomspace(1, 0.02, 20000))
    assert np.linalg.norm(now - wanted) < 0.05 * base
    assert np.linalg.norm(around - spread) < 0.05 * np.linalg.norm(spread)
