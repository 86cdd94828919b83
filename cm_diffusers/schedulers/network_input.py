"""The input of a network by the settings of its scheduler."""

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
    """Return the input scaling and time label of a network, by its prediction.

    Args:
        prediction: one of `predictions`: "edm", or one on the process of a diffusion or flow model.
        time_label: one of the labels that the prediction allows; None for the first.
        sigma_data: root mean square of the data, for "edm".
        time_scale: factor of the label "flow_time".
        noise_schedule: for the label "timestep", the settings of diffusers' `DDPMScheduler`.
        predictions: the predictions that the scheduler supports.

    Raises:
        ValueError: the prediction is unknown, it does not allow the label, or the noise schedule is invalid, missing
            or not used.
    """
    time_label = checked_label(prediction, time_label, noise_schedule is not None, predictions)
    angles = None
    if noise_schedule is not None:
        try:
            angles = vp_angles(DDPMScheduler(**noise_schedule).alphas_cumprod.double().numpy())
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"noise_schedule must hold settings of DDPMScheduler, got {noise_schedule!r}: {error}"
            ) from None
    return NetworkInput(prediction, time_label, sigma_data=sigma_data, time_scale=time_scale, angles=angles)
