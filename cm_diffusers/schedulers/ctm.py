"""Sampling of consistency trajectory models (Kim et al. 2023, arXiv:2310.02279): jumps from any level to any other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..core.arrays import append_dims
from ..core.parameterisation import slope_scalings
from .levels import KarrasLevels, as_float64, as_labels, is_real
from .network_input import network_input
from .stock import CheckedConfig


@dataclass
class CTMSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample at the next level, the input of the next network call.
        pred_original_sample (`torch.Tensor`): the clean sample if what the network says held down to the floor.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class CTMScheduler(KarrasLevels, SchedulerMixin, CheckedConfig):
    """Gamma sampling: from sigma_i jump below sigma_{i+1}, then add noise up to sigma_{i+1}.

    The samples are x0 + sigma noise. The network F has two times, the level t of its input and the level s to jump to
    (`.timesteps` and `.target_timesteps`, as labels). Under EDM's preconditioning, without a floor,

        g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, t, s)
        G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)                                            (eq. 9)

    so that G(x, t, t) = x for any network, and g(x, t, t) is a denoiser. For other predictions g is the clean sample
    that they mean. With gamma = 0 all is deterministic, a chain of jumps; gamma = 1 is multistep consistency sampling.
    The last jump goes to the floor and gives the sample.

    Args:
        num_train_timesteps: length of the Karras grid that `num_inference_steps` picks its levels from.
        sigma_min: the floor that stands for 0; above 0 for the label "log_sigma", which is a logarithm.
        sigma_max: the level of pure noise, where sampling starts.
        sigma_data: root mean square of the training data.
        rho: exponent of the Karras grid.
        clip_denoised: clamp what a jump to the floor gives to [-1, 1] (images; not latents). Other jumps stay exact.
        time_label: the network's time inputs; see `MultistepConsistencyScheduler`, as for the last three.
        gamma: share of the noise that is drawn anew, in [0, 1], unless `set_timesteps` is told otherwise.
        gamma_rule: "paper" jumps to sqrt(1 - gamma^2) sigma, not below the floor; "official" to
            sqrt(1 - gamma^2) (sigma - sigma_min) + sigma_min as the authors' code does. The noise makes up for either.
        upward: whether the network has learned to jump to higher levels, too, which the paper's training leaves out.
        prediction: what the network predicts: "edm" (F), "flow", "epsilon" or "v_prediction".
        time_scale: factor of the time label of "flow".
        noise_schedule: for "epsilon" and "v_prediction" the settings of diffusers' `DDPMScheduler`.
        default_sigmas: the levels of `num_inference_steps`, by that number as a string, where they are not to be those
            of the grid: {"2": [80.0, 0.8]}, as `training/evaluate.py --search_sigmas` finds them.

    Raises:
        ValueError: an unknown label or rule, or numbers outside their range.

    Example:
        >>> import torch
        >>> from cm_diffusers import CTMScheduler, TwoTimeModel
        >>> from cm_diffusers.models import build_unet
        >>> unet, scheduler = TwoTimeModel.from_network(build_unet("tiny", (8, 8), 1)), CTMScheduler()
        >>> scheduler.set_timesteps(4, gamma=0.5)
        >>> sample = scheduler.init_noise_sigma * torch.randn(2, 1, 8, 8)
        >>> with torch.no_grad():
        ...     for t, s in zip(scheduler.timesteps, scheduler.target_timesteps):
        ...         output = unet(scheduler.scale_model_input(sample, t), t, target_timestep=s).sample
        ...         sample = scheduler.step(output, t, sample).prev_sample
        >>> sample.shape
        torch.Size([2, 1, 8, 8])
    """

    order = 1
    _compatibles: list[str] = []
    _samples = "networks with two times, that of their input and that to jump to"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        clip_denoised: bool = True,
        time_label: str | None = None,
        gamma: float = 0.0,
        gamma_rule: str = "paper",
        upward: bool = False,
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
        if gamma_rule not in ("paper", "official"):
            raise ValueError(f"gamma_rule must be 'paper' or 'official', got {gamma_rule!r}.")
        if not sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie in [0, sigma_max), got {sigma_min} and {sigma_max}.")
        label = self.input.time_label
        if sigma_min == 0 and label.endswith("log_sigma"):
            raise ValueError(f"sigma_min must be above 0 for the time_label {label!r}, which has no value at 0.")
        self._check_gamma(gamma)
        self._check_default_sigmas()
        self.num_inference_steps: int | None = None
        self._set_sigmas(self.karras_sigmas(num_train_timesteps), gamma, None)

    def karras_sigmas(self, n: int, sigma_max: float | None = None) -> np.ndarray:
        """`n` levels (n,) from `sigma_max`, by default the configured one, down to the floor."""
        return self._karras(np.linspace(0, 1, n), sigma_max)

    def _karras(self, ramp: np.ndarray, sigma_max: float | None = None) -> np.ndarray:
        # the floor itself where jumps end, not its neighbour, which stock schedulers have
        return np.where(ramp == 1, self.config.sigma_min, super()._karras(ramp, sigma_max))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
    ) -> None:
        """Choose the noise levels, by exactly one of the three.

        Args:
            num_inference_steps: 1 to `num_train_timesteps` levels: those of `default_sigmas`, else evenly spaced on
                the Karras grid from sigma_max.
            device: where `timesteps` and `target_timesteps` go.
            timesteps: time labels as in `.timesteps`, falling. Grid indices are refused.
            sigmas: noise levels in (sigma_min, sigma_max], falling; sampling starts from noise of the first.
            gamma: in [0, 1], for these levels instead of the configured one.

        Raises:
            ValueError: not exactly one was given, or levels that do not fall, or lie at or below the floor or beyond
                sigma_max, or gamma outside [0, 1].
        """
        gamma = self._check_gamma(self.config.gamma if gamma is None else gamma)
        levels = self._chosen_levels(num_inference_steps, timesteps, sigmas)
        self.num_inference_steps = len(levels)
        self._set_sigmas(np.append(levels, self.config.sigma_min), gamma, device)

    def _check_gamma(self, gamma: float) -> float:
        if not is_real(gamma) or not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}.")
        return float(gamma)

    def _set_sigmas(self, levels: np.ndarray, gamma: float, device: str | torch.device | None) -> None:
        """Keep levels that end with the floor, and where the calls jump to, in float64 on the CPU.

        The labels go to `device`, where it knows float64.
        """
        self.gamma, self._step_index, self._begin_index = gamma, None, None
        choice = (levels.tobytes(), gamma, device)
        if self._is_chosen(*choice):
            return
        self.sigmas = torch.from_numpy(levels)
        self.target_sigmas = torch.from_numpy(self._targets(levels[1:-1], gamma))
        self._noise_stds = (self.sigmas[1:] ** 2 - self.target_sigmas**2).clamp(min=0).sqrt()
        self._labels = self.sigma_to_timestep(levels[:-1])
        self.timesteps = as_labels(self._labels, device)
        self.target_timesteps = self.labels(self.target_sigmas, device)
        self._keep(*choice)

    def _columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What the sample is divided by for the network, the factors of jumps to the floor and to the target."""
        sigma, floor = self.sigmas[:-1], torch.as_tensor(self.config.sigma_min, dtype=torch.float64)
        jumps = (self._jump_scalings(sigma, to) for to in (floor, self.target_sigmas))
        return self.input.norm(sigma), *next(jumps), *next(jumps), self._noise_stds

    def _targets(self, following: np.ndarray, gamma: float) -> np.ndarray:
        """Where the calls jump to, for the levels `following` the first; the last one to the floor."""
        floor, kept = self.config.sigma_min, math.sqrt(1 - gamma**2)
        if gamma == 0:
            targets = following
        elif self.config.gamma_rule == "paper":
            targets = np.maximum(kept * following, floor)
        else:
            targets = kept * (following - floor) + floor
        return np.append(targets, floor)

    def _factor(self, values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """`values` () or (B,) as a factor of `sample` (B, ...), in float32 for half-precision samples."""
        if values.ndim:
            values = append_dims(values, sample)
        return values.to(sample.device, torch.promote_types(sample.dtype, torch.float32))

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's input, for "edm" c_in x: `sample` (B, ...) in its scale at `sigma`, () or (B,)."""
        return sample / self._factor(self.input.norm(as_float64(sigma)), sample)

    def jump(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        sigma: float | torch.Tensor,
        sigma_to: float | torch.Tensor,
    ) -> torch.Tensor:
        """G(x, t, s) of eq. 9, from the network's output F.

        It is linear in s: G = x + (s - t) (pull x - gain F), with the pull and the gain of `velocity`, which is
        computed in this form, as it holds at t = 0, too. With F of the diagonal, F(c_in x, t, t), it is Euler's step.

        Args:
            model_output: F (B, ...) for `precondition_inputs(sample, sigma)`.
            sample: x (B, ...) at the level `sigma`.
            sigma: t, () or (B,), 0 or above.
            sigma_to: s, () or (B,), 0 or above.
        """
        scalings = self._jump_scalings(as_float64(sigma), as_float64(sigma_to))
        keep, change = (self._factor(factor, sample) for factor in scalings)
        return keep * sample.to(keep.dtype) + change * model_output.to(keep.dtype)  # eq. 9

    def _jump_scalings(self, t: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of x and F in G(x, t, s), in float64."""
        pull, gain = slope_scalings(self.config.prediction, t, self.config.sigma_data)
        return 1 + (s - t) * pull, (t - s) * gain

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """dx / dsigma = (x - g(x, t, t)) / t of the probability-flow ODE, from F(c_in x, t, t).

        Computed as pull x - gain F; for "edm" t / (t^2 + sigma_data^2) and sigma_data / sqrt(t^2 + sigma_data^2).
        """
        scalings = slope_scalings(self.config.prediction, as_float64(sigma), self.config.sigma_data)
        pull, gain = (self._factor(value, sample) for value in scalings)
        return pull * sample.to(pull.dtype) - gain * model_output.to(pull.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """`sample` divided by sqrt(sigma^2 + sigma_data^2), the network's input at `timestep`."""
        index = self._index_now(timestep)
        return sample / self._factors(index, torch.promote_types(sample.dtype, torch.float32))[0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> CTMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step: the sample at the next level, and the clean sample that the network's output means.

        Args:
            model_output: the network's output (B, ...) for `scale_model_input(sample, timestep)`, `timestep` and the
                entry of `.target_timesteps` at the same index.
            timestep: one of `.timesteps`.
            sample: the current sample (B, ...).
            generator: source of the noise; a list has one per sample. None is drawn for gamma = 0.
            return_dict: give an output object rather than a tuple.
            variance_noise: the noise (B, ...) to add, unit normal, instead of what `generator` would give.
        """
        index = self._index_now(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        _, keep, change, keep_more, change_less, noise_std = self._factors(index, dtype)
        x, output = sample.to(dtype), model_output.to(dtype)
        denoised = keep * x + change * output  # eq. 9, to the floor
        if self.config.clip_denoised:
            denoised = denoised.clamp(-1, 1)
        to_floor = (keep_more, change_less) == (keep, change)
        prev_sample = denoised if to_floor else keep_more * x + change_less * output
        if noise_std > 0:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = prev_sample + noise_std * noise
        self._step_index = index + 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return CTMSchedulerOutput(prev_sample, denoised)
