"""What a network is told of the noise level: the maps between sigma and its time input, in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


TINY_SIGMA = 1e-20  # stands for sigma = 0, whose logarithm is not finite; c_out = 0 there, so the output is not used


@dataclass(frozen=True)
class TimeLabel:
    """A map from sigma (B,) to the network's time input (B,), and back."""

    from_sigma: Callable[[Tensor, float], Tensor]
    to_sigma: Callable[[Tensor, float], Tensor]


TIME_LABELS: dict[str, TimeLabel] = {
    # 250 ln(sigma): what diffusers' ConsistencyModelPipeline feeds, unbounded and fast (Song et al. 2023, app. C).
    "log_sigma": TimeLabel(
        lambda sigma, sigma_data: 250 * sigma.clamp(min=TINY_SIGMA).log(),
        lambda label, sigma_data: (label / 250).exp(),
    ),
    # ln(sigma) / 4: EDM's c_noise, the time input under diffusers' EDM schedulers (Karras et al. 2022, table 1).
    "quarter_log_sigma": TimeLabel(
        lambda sigma, sigma_data: sigma.clamp(min=TINY_SIGMA).log() / 4,
        lambda label, sigma_data: (4 * label).exp(),
    ),
    # atan(sigma / sigma_data) in [0, pi/2]: TrigFlow's angle, bounded and slow (Lu & Song 2024, arXiv:2410.11081).
    "angle": TimeLabel(
        lambda sigma, sigma_data: (sigma / sigma_data).atan(),
        lambda label, sigma_data: torch.where(label >= math.pi / 2, math.inf, label.clamp(min=0).tan() * sigma_data),
    ),
    # sigma / (1 + sigma) in [0, 1]: the time of flow matching, bounded, slow (Lipman et al. 2022, arXiv:2210.02747).
    "flow_time": TimeLabel(
        lambda sigma, sigma_data: sigma / (1 + sigma),
        lambda label, sigma_data: label / (1 - label),
    ),
}
