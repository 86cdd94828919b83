"""What a network is given, as the settings of a scheduler say it."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DDPMScheduler

from ..core.parameterisation import JUMP_PREDICTIONS, NetworkInput
from ..core.time_labels import checked_label, vp_angles


def network_input(
    prediction: str,
    time_label: str | None,
    sigma_data: float,
    time_scale: float,
    noise_schedule: Mapping[str, Any] | None,
    predictions: Sequence[str] = JUMP_PREDICTIONS,
) -> NetworkInput:
    """The input of a network by its prediction: "edm", or one on the process of a diffusion or flow model.

    Args:
        prediction: one of `predictions`.
        time_label: one of its labels; None for the first.
        sigma_data: root mean square of the data, for "edm".
        time_scale: factor of the label "flow_time".
        noise_schedule: for the label "timestep" the settings of diffusers' `DDPMScheduler`.
        predictions: those that the scheduler can read.

    Raises:
        ValueError: an unknown prediction, a label that is not its own, a schedule that is missing or not called for.
    """
    time_label = checked_label(prediction, time_label, noise_schedule is not None, predictions)
    angles = None
    if noise_schedule is not None:
        try:
            angles = vp_angles(DDPMScheduler(**noise_schedule).alphas_cumprod.double().numpy())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"noise_schedule {noise_schedule!r} is none of a DDPMScheduler: {error}") from None
    return NetworkInput(prediction, time_label, sigma_data=sigma_data, time_scale=time_scale, angles=angles)
