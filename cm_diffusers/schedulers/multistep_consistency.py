"""Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1) at any noise levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..core.parameterisation import read_out
from .levels import KarrasLevels
from .network_input import network_input


@dataclass
class MultistepConsistencySchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample at the next level, the input of the next network call.
        pred_original_sample (`torch.Tensor`): the network's estimate of the clean sample at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MultistepConsistencyScheduler(KarrasLevels, SchedulerMixin, ConfigMixin):
    """Jump to the clean sample, add noise of the next level, repeat; the last step adds none.

    The unit of time is `sigma`, the standard deviation of the noise on data of scale `sigma_data`. The default
    configuration means what that of diffusers' `CMStochasticIterativeScheduler` means, and gives the same numbers;
    unlike it this scheduler takes any levels, not only those of a grid, and adds noise at any levels.

    Args:
        num_train_timesteps: length of the Karras grid that `num_inference_steps` picks its levels from.
        sigma_min: the floor, at which the model is the identity; 0 for models trained without one (ECT).
        sigma_max: the level of pure noise, where sampling starts.
        sigma_data: root mean square of the training data.
        s_noise: factor of the noise that is added between steps.
        rho: exponent of the Karras grid.
        clip_denoised: clamp the estimate of the clean sample to [-1, 1] (images; not latents).
        time_label: the network's time input, by default the first that the prediction allows: "log_sigma"
            (250 ln sigma), "quarter_log_sigma" (ln(sigma) / 4) or "angle" (atan(sigma / sigma_data)) for "edm",
            "flow_time" (sigma / (1 + sigma)) for "flow", "timestep" (times between the integers of the noise schedule,
            by the angle atan(sigma)) for the others.
        renoise: "floor" adds noise of std sqrt(sigma^2 - sigma_min^2), "full" of std sigma. They agree at sigma_min 0.
        prediction: what the network predicts: "edm", F under EDM's scalings with the floor; or, for students that keep
            the process of a diffusion model, "flow" (noise - x0, given (1 - t) x0 + t noise), "epsilon" (the noise) or
            "v_prediction" (alpha noise - std x0), given alpha x0 + std noise with alpha^2 + std^2 = 1.
        time_scale: factor of the time label of "flow" (1000 for diffusers' flow models).
        noise_schedule: for "epsilon" and "v_prediction" the settings of diffusers' `DDPMScheduler` that make the table
            of alpha^2, such as {"beta_schedule": "linear"}.
        default_sigmas: the levels of `num_inference_steps`, by that number as a string, where they are not to be those
            of the grid: {"2": [80.0, 0.8]}, as `training/evaluate.py --search_sigmas` finds them.

    Raises:
        ValueError: a setting outside its range, or that does not go with another.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        time_label: str | None = None,
        renoise: str = "floor",
        prediction: str = "edm",
        time_scale: float = 1.0,
        noise_schedule: dict[str, Any] | None = None,
        default_sigmas: dict[str, list[float]] | None = None,
    ) -> None:
        self._check_settings()
        self.input = network_input(
            prediction,
            time_label=time_label,
            sigma_data=sigma_data,
            time_scale=time_scale,
            noise_schedule=noise_schedule,
        )
        self.register_to_config(time_label=self.input.time_label)
        if renoise not in ("floor", "full"):
            raise ValueError(f"renoise must be 'floor' or 'full', got {renoise!r}.")
        if not sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie in [0, sigma_max), got {sigma_min} and {sigma_max}.")
        self._check_default_sigmas()
        self.num_inference_steps: int | None = None
        self._set_sigmas(self._karras(np.linspace(0, 1, num_train_timesteps)), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels, by exactly one of the three.

        Args:
            num_inference_steps: 1 to `num_train_timesteps` levels: those of `default_sigmas`, else evenly spaced on
                the Karras grid from sigma_max.
            device: where `timesteps` go.
            timesteps: time labels as in `.timesteps`, falling. Grid indices are refused.
            sigmas: noise levels in (sigma_min, sigma_max], falling; sampling starts from noise of the first.

        Raises:
            ValueError: not exactly one was given, or levels that do not fall, or lie at or below the floor or beyond
                sigma_max.
        """
        levels = self._chosen_levels(num_inference_steps, timesteps, sigmas)
        self.num_inference_steps = len(levels)
        self._set_sigmas(levels, device)

    def _set_sigmas(self, levels: np.ndarray, device: str | torch.device | None) -> None:
        """Keep the levels and the floor in float64 on the CPU; the labels go to `device`, where it knows float64."""
        self.sigmas = torch.from_numpy(np.append(levels, self.config.sigma_min))
        self.timesteps = self.labels(self.sigmas[:-1], device)
        self._step_index = self._begin_index = None

    def _sigma(self, sample: torch.Tensor, index: int) -> torch.Tensor:
        return self.sigmas[index].to(torch.promote_types(sample.dtype, torch.float32))

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """`sample` in the scale of the network's input at `timestep`: for "edm" / sqrt(sigma^2 + sigma_data^2)."""
        return sample / self.input.norm(self._sigma(sample, self._index_now(timestep)))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MultistepConsistencySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step: the estimate of the clean sample, and the sample at the next level.

        Args:
            model_output: the network's output (B, ...) for `scale_model_input(sample, timestep)`.
            timestep: one of `.timesteps`.
            sample: the current sample (B, ...).
            generator: source of the noise; a list has one per sample.
            return_dict: give an output object rather than a tuple.
        """
        index = self._index_now(timestep)
        sigma, sigma_next = self._sigma(sample, index), self._sigma(sample, index + 1)

        # float32 arithmetic for half-precision samples
        denoised = read_out(
            self.config.prediction,
            model_output.to(sigma.dtype),
            sample.to(sigma.dtype),
            sigma,
            sigma_data=self.config.sigma_data,
            sigma_min=self.config.sigma_min,
        )
        if self.config.clip_denoised:
            denoised = denoised.clamp(-1, 1)

        prev_sample = denoised
        if index + 1 < len(self.timesteps):
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            floor = self.config.sigma_min if self.config.renoise == "floor" else 0.0
            prev_sample = denoised + noise * self.config.s_noise * (sigma_next**2 - floor**2) ** 0.5  # algorithm 1
        self._step_index = index + 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return MultistepConsistencySchedulerOutput(prev_sample, denoised)
