from types import SimpleNamespace

import pytest
import torch
from diffusers import EDMEulerScheduler

from cm_diffusers import DenoisingPipeline
from cm_diffusers.core.draws import Draws
from cm_diffusers.objectives import Batch, Diffusion, ModelSpec


def zero_network(sample, label, class_labels=None):
    return SimpleNamespace(sample=torch.zeros_like(sample))


def test_loss_is_the_error_of_the_network_itself():
    # weight * |D - x0|^2 = |F - F*|^2 with F* = (x0 - c_skip x) / c_out; with F = 0 only the target is left
    images = torch.randn(16, 1, 8, 8).clamp(-1, 1)
    loss = Diffusion(None, ModelSpec(0.5), Diffusion.Options(), 100)
    loss.model, draws = zero_network, Draws(0, 0, range(16))
    result = loss.loss(Batch(images), draws)
    sigma = (-1.2 + 1.2 * draws.normal("sigma").double()).exp().reshape(-1, 1, 1, 1)
    noisy = images + sigma * draws.normal("noise", (1, 8, 8))
    target = (images - 0.25 / (sigma**2 + 0.25) * noisy) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)
    torch.testing.assert_close(result.per_sample.double(), target.square().sum((1, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.sigma.double(), sigma.flatten())


def test_loss_of_the_exact_denoiser_of_gaussian_data_is_the_dimension():
    # for N(0, sigma_data^2) the exact F is 0 and its target has unit variance at every level
    draws = Draws(0, 0, range(2000))
    images = 0.5 * torch.randn(2000, 1, 8, 8)
    objective = Diffusion(None, ModelSpec(0.5), Diffusion.Options(), 100)
    objective.attach(zero_network)
    loss = objective.loss(Batch(images), draws)
    assert loss.total.item() == pytest.approx(64, abs=4 * (2 * 64 / 2000) ** 0.5)


@pytest.mark.parametrize("time_label", ["log_sigma", "angle"])
def test_pipeline_is_a_solver_for_edm(tiny_unet, time_label):
    network = tiny_unet()
    pipe = Diffusion(network, ModelSpec(0.6, time_label), Diffusion.Options(), 100).pipeline(network)
    assert isinstance(pipe, DenoisingPipeline) and isinstance(pipe.scheduler, EDMEulerScheduler)
    assert pipe.unet is network and pipe.config.time_label == time_label


def test_options_are_checked():
    with pytest.raises(ValueError, match="p_std"):
        Diffusion.Options(p_std=0)
