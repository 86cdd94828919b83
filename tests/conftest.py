"""Fixtures for tests in several folders."""

import gc
import math

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from cm_diffusers.models import build_unet


def pytest_collection_finish(session):
    """Exclude loaded objects from later garbage collections, because each training run ends with one."""
    gc.collect()
    gc.freeze()


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """A network with the exact denoiser of data N(mean of the class, data_std^2), under EDM's preconditioning."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, num_class_embeds=None, data_std=0.3, sigma_data=0.5, angle=False):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))  # gives the model a dtype and a device

    def mean(self, class_labels):
        if class_labels is None:
            return 0.2
        return (0.1 * class_labels).reshape(-1, 1, 1, 1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        data_std, sigma_data = self.config.data_std, self.config.sigma_data
        label = torch.as_tensor(timestep).double().reshape(-1, 1, 1, 1)
        sigma = label.tan() * sigma_data if self.config.angle else (label / 250).exp()
        norm = (sigma**2 + sigma_data**2).sqrt()
        x = sample.double() * norm
        denoised = (data_std**2 * x + sigma**2 * self.mean(class_labels)) / (sigma**2 + data_std**2)
        output = (denoised - sigma_data**2 / norm**2 * x) / (sigma * sigma_data / norm)
        output = output.to(sample.dtype) + self.zero
        return UNet2DOutput(output) if return_dict else (output,)

    def ode_solution(self, x, sigma, class_labels=None):
        """The solution of the probability-flow ODE from `x` at `sigma`."""
        mean = self.mean(class_labels)
        return mean + (x - mean) * self.config.data_std / math.hypot(sigma, self.config.data_std)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_unet():
    """A function that makes tiny U-Nets with random weights, class-conditional by default."""

    def make(size=(8, 8), channels=1, num_classes=10, dropout=0.0):
        return build_unet("tiny", size, channels, num_classes, dropout).eval()

    return make


@pytest.fixture
def gaussian_denoiser():
    """A function that makes networks which are exact for Gaussian data."""
    return GaussianDenoiser
