"""How a network is told the noise level: the maps between sigma and its time input, and which prediction has which."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.core.arrays import Values, math_of


Number = TypeVar("Number", Tensor, np.ndarray, float)

# stands for sigma = 0, whose logarithm is not finite; c_out = 0 there, so the output is not used
TINY_SIGMA = 1e-20
TINY_SIGMA_OF_STOCK = 1e-44  # of diffusers' `CMStochasticIterativeScheduler`, whose labels those of arrays are

# what networks predict, and the time labels that each may have, the default one first
LABELS_OF_PREDICTION = {
    "edm": ("log_sigma", "quarter_log_sigma", "angle"),
    "sample": ("timestep",),
    "epsilon": ("timestep",),
    "v_prediction": ("timestep",),
    "flow": ("flow_time",),
    "trigflow": ("angle",),
}
OWN_LABELS = {prediction: labels[0] for prediction, labels in LABELS_OF_PREDICTION.items() if len(labels) == 1}


def checked_label(prediction: str, time_label: str | None, has_table: bool, predictions: Sequence[str]) -> str:
    """The time label of a network: `time_label`, or the default one of its prediction for None.

    Args:
        prediction: what the network predicts.
        time_label: one of its labels, or None.
        has_table: whether a noise schedule was given, the table of the label "timestep".
        predictions: the predictions that the caller knows.

    Raises:
        ValueError: an unknown prediction, a label that is not its own, a schedule that is missing or not called for.
    """
    if prediction not in predictions:
        raise ValueError(f"prediction must be one of {', '.join(predictions)}; got {prediction!r}.")
    labels = LABELS_OF_PREDICTION[prediction]
    label = time_label or labels[0]
    if label not in labels:
        raise ValueError(
            f"time_label of the prediction {prediction!r} must be one of {', '.join(labels)}; got {time_label!r}."
        )
    if (label == "timestep") != has_table:
        raise ValueError("noise_schedule is for the predictions 'epsilon' and 'v_prediction', which need it.")
    return label


@dataclass(frozen=True)
class TimeLabel:
    """A map from sigma, any shape, to the network's time input, and back. The second argument is sigma_data."""

    from_sigma: Callable[[Values, float], Values]
    to_sigma: Callable[[Values, float], Values]


def log_sigma(sigma: Values) -> Values:
    """ln(sigma), finite at 0."""
    if torch.is_tensor(sigma):
        return sigma.clamp(min=TINY_SIGMA).log()
    return np.log(np.maximum(sigma, TINY_SIGMA_OF_STOCK))


def flow_time(sigma: Values, scale: float = 1.0) -> Values:
    """`scale` times the flow time t = sigma / (1 + sigma), for finite `sigma`."""
    return scale * sigma / (1 + sigma)


def sigma_of_flow_time(time: Values, scale: float = 1.0) -> Values:
    """The inverse of `flow_time`; infinite at `scale`."""
    return time / (scale - time)


def flow_time_up_to_infinity(sigma: Number) -> Number:
    """t = 1 / (1 + 1 / sigma), which is 1 at infinite `sigma`. It differs from `flow_time` in the last bit."""
    return 1 / (1 + 1 / sigma)


def sigma_of_angle(angle: Values, sigma_data: float = 1.0) -> Values:
    """tan(angle) sigma_data for angles of at least 0; infinite from pi/2 on, beyond which float32 rounds it."""
    xp = math_of(angle)
    return xp.where(angle >= math.pi / 2, math.inf, xp.tan(xp.clip(angle, 0, None)) * sigma_data)


TIME_LABELS: dict[str, TimeLabel] = {
    # 250 ln(sigma): what diffusers' ConsistencyModelPipeline feeds, unbounded and fast (Song et al. 2023, app. C).
    "log_sigma": TimeLabel(
        lambda sigma, sigma_data: 250 * log_sigma(sigma),
        lambda label, sigma_data: math_of(label).exp(label / 250),
    ),
    # ln(sigma) / 4: EDM's c_noise, the time input under diffusers' EDM schedulers (Karras et al. 2022, table 1).
    "quarter_log_sigma": TimeLabel(
        lambda sigma, sigma_data: log_sigma(sigma) / 4,
        lambda label, sigma_data: math_of(label).exp(4 * label),
    ),
    # atan(sigma / sigma_data) in [0, pi/2]: TrigFlow's angle, bounded and slow (Lu & Song 2024, arXiv:2410.11081).
    "angle": TimeLabel(lambda sigma, sigma_data: math_of(sigma).arctan(sigma / sigma_data), sigma_of_angle),
    # sigma / (1 + sigma) in [0, 1]: the time of flow matching, bounded, slow (Lipman et al. 2022, arXiv:2210.02747).
    "flow_time": TimeLabel(
        lambda sigma, sigma_data: flow_time(sigma), lambda label, sigma_data: sigma_of_flow_time(label)
    ),
}


def vp_angles(alphas_cumprod: Values) -> Values:
    """The angles atan(sigma) at the integer times 0, 1, ..., N - 1 of a VP process, float64 (N,) as its table is.

    alpha^2 = abar and std^2 = 1 - abar, so that sigma = sqrt(1 - abar) / sqrt(abar) (Ho et al. 2020, eq. 4).
    """
    xp = math_of(alphas_cumprod)
    return xp.arctan2(xp.sqrt(1 - alphas_cumprod), xp.sqrt(alphas_cumprod))


def vp_time(sigma: Values, angles: np.ndarray) -> Values:
    """The label "timestep": times between integers by the angle atan(sigma), beyond the table those of its ends.

    Float64. `VP.time` is the same on any device, but for the last bit.
    """
    angle = sigma.double().atan().cpu().numpy() if torch.is_tensor(sigma) else np.arctan(sigma)
    time = np.interp(angle, angles, np.arange(len(angles)))
    return torch.as_tensor(time) if torch.is_tensor(sigma) else time


def sigma_of_vp_time(time: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The inverse of `vp_time`."""
    return sigma_of_angle(np.interp(time, np.arange(len(angles)), angles))
