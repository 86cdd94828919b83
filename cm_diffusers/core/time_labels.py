"""Time labels: the maps between sigma and a network's time input, and the labels that each prediction can have."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cm_diffusers.core.arrays import Values, math_of


Number = TypeVar("Number", Tensor, np.ndarray, float)

# replaces sigma = 0, whose logarithm is not finite; c_out = 0 there, so the output is not used
TINY_SIGMA = 1e-20
TINY_SIGMA_OF_STOCK = 1e-44  # for arrays: that of diffusers' `CMStochasticIterativeScheduler`, whose labels they have

# what networks predict, and the time labels that each prediction can have, the default first
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
    """The time label of a network: `time_label`, or the default of its prediction for None.

    Args:
        prediction: what the network predicts.
        time_label: one of the labels of this prediction, or None.
        has_table: whether the caller has a noise schedule, the table of the label "timestep".
        predictions: the predictions that the caller supports.

    Raises:
        ValueError: an unknown prediction, a label of another prediction, or a noise schedule that is missing or has
            no effect.
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
        those = ", ".join(repr(name) for name in predictions if LABELS_OF_PREDICTION[name] == ("timestep",))
        raise ValueError(f"noise_schedule is for the predictions {those}, which need it; got {prediction!r}.")
    return label


@dataclass(frozen=True)
class TimeLabel:
    """A map from sigma (any shape) to the network's time input, and its inverse. Both also take sigma_data."""

    from_sigma: Callable[[Values, float], Values]
    to_sigma: Callable[[Values, float], Values]


def log_sigma(sigma: Values) -> Values:
    """ln(`sigma`) for any shape, finite at 0."""
    if torch.is_tensor(sigma):
        return sigma.clamp(min=TINY_SIGMA).log()
    return np.log(np.maximum(sigma, TINY_SIGMA_OF_STOCK))


def flow_time(sigma: Values, scale: float = 1.0) -> Values:
    """`scale` times the flow time t = sigma / (1 + sigma), for finite `sigma` of any shape."""
    return scale * sigma / (1 + sigma)


def sigma_of_flow_time(time: Values, scale: float = 1.0) -> Values:
    """The noise level at `time` of any shape: the inverse of `flow_time`, infinite at `scale`."""
    return time / (scale - time)


def flow_time_up_to_infinity(sigma: Number) -> Number:
    """The flow time t = 1 / (1 + 1 / sigma), which is 1 at infinite `sigma`; `flow_time` differs in the last bit."""
    return 1 / (1 + 1 / sigma)


def sigma_of_angle(angle: Values, sigma_data: float = 1.0) -> Values:
    """The noise level tan(angle) `sigma_data` at `angle` in radians, any shape, at least 0.

    It is infinite from pi/2 on, because float32 rounds pi/2 up.
    """
    xp = math_of(angle)
    return xp.where(angle >= math.pi / 2, math.inf, xp.tan(xp.clip(angle, 0, None)) * sigma_data)


TIME_LABELS: dict[str, TimeLabel] = {
    # 250 ln(sigma): that of diffusers' ConsistencyModelPipeline, unbounded and fast (Song et al. 2023, app. C).
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
    """The angles atan(sigma) (N,) at the integer times 0, 1, ..., N - 1 of a VP process.

    `alphas_cumprod` is its table abar (N,), float64 like the result. alpha^2 = abar and std^2 = 1 - abar, so that
    sigma = sqrt(1 - abar) / sqrt(abar) (Ho et al. 2020, eq. 4).
    """
    xp = math_of(alphas_cumprod)
    return xp.arctan2(xp.sqrt(1 - alphas_cumprod), xp.sqrt(alphas_cumprod))


def vp_time(sigma: Values, angles: np.ndarray) -> Values:
    """The label "timestep" at `sigma` (any shape), float64.

    Between integers the angle atan(sigma) is interpolated in the table `angles` (N,) from `vp_angles`; beyond the
    table its ends hold. `VP.time` does the same on any device and differs in the last bit.
    """
    angle = sigma.double().atan().cpu().numpy() if torch.is_tensor(sigma) else np.arctan(sigma)
    time = np.interp(angle, angles, np.arange(len(angles)))
    return torch.as_tensor(time) if torch.is_tensor(sigma) else time


def sigma_of_vp_time(time: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The noise level at `time` (any shape): the inverse of `vp_time` with the same `angles` (N,)."""
    return sigma_of_angle(np.interp(time, np.arange(len(angles)), angles))
