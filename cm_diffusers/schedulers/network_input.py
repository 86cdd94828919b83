"""What a network is given of a sample x0 + sigma noise: the sample in its own scale, and the level as its time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler


# time labels of each prediction, the default one first
NETWORK_LABELS = {"edm": ("log_sigma", "quarter_log_sigma", "angle"), "flow": ("flow_time",)}
NETWORK_LABELS |= {"epsilon": ("timestep",), "v_prediction": ("timestep",)}


class NetworkInput:
    """The input of a network by its prediction: "edm", or one on the process of a diffusion or flow model.

    Args:
        prediction: a key of `NETWORK_LABELS`.
        time_label: one of its labels; None for the first.
        sigma_data: root mean square of the data, for "edm".
        time_scale: factor of the label "flow_time".
        noise_schedule: for the label "timestep" the settings of diffusers' `DDPMScheduler`.

    Raises:
        ValueError: an unknown prediction, a label that is not its own, a schedule that is missing or not called for.
    """

    def __init__(
        self,
        prediction: str,
        time_label: str | None,
        sigma_data: float,
        time_scale: float,
        noise_schedule: Mapping[str, Any] | None,
    ):
        if prediction not in NETWORK_LABELS:
            raise ValueError(f"prediction must be one of {', '.join(NETWORK_LABELS)}; got {prediction!r}.")
        labels = NETWORK_LABELS[prediction]
        self.prediction, self.time_label = prediction, time_label or labels[0]
        if self.time_label not in labels:
            raise ValueError(
                f"time_label of the prediction {prediction!r} must be one of {', '.join(labels)}; got {time_label!r}."
            )
        if (self.time_label == "timestep") != (noise_schedule is not None):
            raise ValueError("noise_schedule is for the predictions 'epsilon' and 'v_prediction', which need it.")
        if noise_schedule is not None:
            try:
                abar = DDPMScheduler(**noise_schedule).alphas_cumprod.double().numpy()
            except (TypeError, ValueError, NotImplementedError) as error:
                raise ValueError(f"noise_schedule {noise_schedule!r} is none of a DDPMScheduler: {error}") from None
            self.angles = np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))
        self.sigma_data, self.time_scale = sigma_data, time_scale
        self.spread = sigma_data if prediction == "edm" else 1.0  # of the data, as the process takes them
        self._factor = 250.0 if self.time_label == "log_sigma" else 0.25

    def label(self, sigmas: np.ndarray) -> np.ndarray:
        """The network's time input at `sigmas`."""
        if self.time_label == "angle":
            return np.arctan(sigmas / self.sigma_data)
        if self.time_label == "flow_time":
            return self.time_scale * sigmas / (1 + sigmas)
        if self.time_label == "timestep":
            return np.interp(np.arctan(sigmas), self.angles, np.arange(len(self.angles)))
        return self._factor * np.log(sigmas + 1e-44)

    def sigma(self, labels: np.ndarray) -> np.ndarray:
        """The noise levels whose time input `labels` is."""
        if self.time_label == "angle":
            return np.tan(labels) * self.sigma_data
        if self.time_label == "flow_time":
            return labels / (self.time_scale - labels)
        if self.time_label == "timestep":
            return np.tan(np.interp(labels, np.arange(len(self.angles)), self.angles))
        return np.exp(labels / self._factor)

    def norm(self, sigma: torch.Tensor) -> torch.Tensor:
        """What a sample at `sigma` is divided by: 1 + sigma for "flow", else sqrt(sigma^2 + spread^2)."""
        return 1 + sigma if self.prediction == "flow" else (sigma**2 + self.spread**2) ** 0.5
