"""Denoising diffusion as in EDM (Karras et al. 2022, arXiv:2206.00364), the basis of the consistency methods.

Unlike ECT the target is always the data; the result is sampled by an ODE solver in many steps.
"""

from dataclasses import dataclass

from diffusers import DiffusionPipeline, EDMEulerScheduler
from torch import nn

from cm_diffusers.core.distances import l2
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.interpolants import VE
from cm_diffusers.core.noise_levels import lognormal
from cm_diffusers.core.weightings import edm_weight
from cm_diffusers.objectives.base import Batch, Facts, Loss, Objective, check_between, option
from cm_diffusers.pipelines import DenoisingPipeline


@dataclass(frozen=True)
class DiffusionOptions:
    p_mean: float = option(-1.2, "Mean of ln(sigma) in training.")
    p_std: float = option(1.2, "Standard deviation of ln(sigma) in training.")

    def __post_init__(self) -> None:
        check_between("p_mean", self.p_mean, -20, 20)
        check_between("p_std", self.p_std, 1e-3, 10)


class Diffusion(Objective):
    """E[ lambda(sigma) |D(x0 + sigma noise, sigma) - x0|^2 ], ln(sigma) ~ N(p_mean, p_std^2) (eq. 8, table 1)."""

    name = "diffusion"
    Options = DiffusionOptions
    sigma_min = 0.002
    floor = 0.0
    facts = Facts(
        what="EDM denoising, sampled in ~35 calls",
        teacher="no",
        target="the data",
        times="ln sigma ~ N(-1.2, 1.2^2)",
        distance="L2",
        weight="1 / c_out^2",
        paper="[Karras et al. 2022](https://arxiv.org/abs/2206.00364), eq. 8",
    )

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        x0, labels = batch.images, batch.class_labels
        sigma = lognormal(draws.normal("sigma"), self.options.p_mean, self.options.p_std)
        noise = draws.normal("noise", x0.shape[1:])
        with draws.dropout():
            denoised = self.denoiser()(VE().add_noise(x0, noise, sigma), sigma, labels)
        return Loss.mean(edm_weight(sigma, self.spec.sigma_data) * l2(denoised, x0), sigma)

    def pipeline(self, network: nn.Module) -> DiffusionPipeline:
        scheduler = EDMEulerScheduler(
            sigma_min=self.sigma_min, sigma_max=self.spec.sigma_max, sigma_data=self.spec.sigma_data
        )
        return DenoisingPipeline(network, scheduler, time_label=self.spec.time_label)
