import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def stock_folder(tiny_unet, tmp_path):
    """A model saved by diffusers alone."""
    network = tiny_unet(channels=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(tmp_path)
    return tmp_path


def load(cls, folder):
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_stock_folder_makes_the_images_of_the_stock_pipeline(stock_folder, n):
    ours, theirs = load(ConsistencyPipeline, stock_folder), load(ConsistencyModelPipeline, stock_folder)
    assert isinstance(ours.scheduler, MultistepConsistencyScheduler)
    labels = [1, 5, 7]
    results = {}
    for output_type in ("np", "pil"):
        results[output_type] = [
            pipe(3, class_labels=labels, num_inference_steps=n, generator=generator(), output_type=output_type).images
            for pipe in (ours, theirs)
        ]
    for a, b in zip(*results["pil"]):
        assert (np.asarray(a) == np.asarray(b)).all()
    # after the last of several steps the stock scheduler adds noise of 7e-7, the rounding of its floor
    np.testing.assert_allclose(*results["np"], rtol=0, atol=0 if n == 1 else 3e-6)


@pytest.mark.parametrize("n", [2, 4])
def test_without_a_floor_the_images_of_the_stock_pipeline_are_equal_to_the_bit(stock_folder, n):
    ours, theirs = load(ConsistencyPipeline, stock_folder), load(ConsistencyModelPipeline, stock_folder)
    theirs.scheduler = CMStochasticIterativeScheduler(sigma_min=0.0)
    ours = ConsistencyPipeline(ours.unet, theirs.scheduler)
    a, b = (
        pipe(2, class_labels=[1, 5], num_inference_steps=n, generator=generator(), output_type="pt").images
        for pipe in (ours, theirs)
    )
    assert torch.equal(a, b)


def test_default_is_one_step(stock_folder):
    pipe = load(ConsistencyPipeline, stock_folder)
    one = pipe(class_labels=1, num_inference_steps=1, generator=generator(), output_type="pt").images
    assert torch.equal(pipe(class_labels=1, generator=generator(), output_type="pt").images, one)


def test_given_levels_follow_algorithm_1(gaussian_denoiser):
    network = gaussian_denoiser(num_class_embeds=None, data_std=0.3)
    scheduler = MultistepConsistencyScheduler(sigma_min=0.0, clip_denoised=False)
    pipe = ConsistencyPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, sigmas=[40, 0.8, 0.1], generator=generator(), output_type="pt").images

    noise, x = generator(), None
    for sigma in (40, 0.8, 0.1):
        new = sigma * torch.randn(2, 1, 4, 4, generator=noise)
        x = new.double() if x is None else x + new
        x = (0.09 * x + sigma**2 * 0.2) / (sigma**2 + 0.09)
    torch.testing.assert_close(images.double(), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-6)


def test_labels_of_the_network_are_angles_where_the_scheduler_says_so(gaussian_denoiser):
    images = []
    for angle in (False, True):
        network = gaussian_denoiser(num_class_embeds=5, angle=angle)
        scheduler = MultistepConsistencyScheduler(sigma_min=0.0, time_label="angle" if angle else "log_sigma")
        pipe = ConsistencyPipeline(network, scheduler)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(class_labels=[1, 4], sigmas=[80, 1], generator=generator(), output_type="pt").images)
    torch.testing.assert_close(*images, rtol=0, atol=2e-6)


def test_number_of_steps_and_levels_exclude_each_other(tiny_unet):
    pipe = ConsistencyPipeline(tiny_unet(), MultistepConsistencyScheduler())
    with pytest.raises(ValueError, match="exactly one"):
        pipe(num_inference_steps=2, sigmas=[80, 1])
