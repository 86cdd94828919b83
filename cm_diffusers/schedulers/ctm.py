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
    """Output of a step of `CTMScheduler`.

    Args:
        prev_sample (`torch.Tensor`): the sample (B, ...) at the next level, for the next network call.
        pred_original_sample (`torch.Tensor`): the estimate of the clean sample (B, ...): a jump with the network's
            output down to the floor.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class CTMScheduler(KarrasLevels, SchedulerMixin, CheckedConfig):
    """Scheduler of consistency trajectory models (Kim et al. 2023, arXiv:2310.02279), by gamma sampling.

    From the level sigma_i, a step jumps below sigma_{i+1} and then adds noise up to sigma_{i+1}. The samples are
    x0 + sigma noise. The network F has two times: the level t of its input, and the level s to jump to. As labels they
    are `timesteps` and `target_timesteps`. Under EDM's preconditioning, without a floor,

        g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, t, s)
        G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)                                            (eq. 9)

    so that G(x, t, t) = x for any network, and g(x, t, t) is a denoiser. For other predictions, g is the clean sample
    that follows from the output. With gamma = 0, sampling is a deterministic chain of jumps. With gamma = 1, it is
    multistep consistency sampling. The last jump goes to the floor and yields the final sample.

    Args:
        num_train_timesteps: length of the Karras grid from which `num_inference_steps` selects levels.
        sigma_min: the floor that stands for 0. It must be above 0 for the label "log_sigma", a logarithm.
        sigma_max: the level of pure noise, where sampling starts.
        sigma_data: root mean square of the training data.
        rho: exponent of the Karras grid.
        clip_denoised: clamp the result of jumps to the floor to [-1, 1], for images but not for latents. Other jumps
            stay exact.
        time_label: the network's time inputs, see `MultistepConsistencyScheduler`.
        gamma: share of the noise that is drawn anew, in [0, 1]. `set_timesteps` can override it.
        gamma_rule: the level to which a step jumps, before noise leads up to the next level sigma:

            - "paper": sqrt(1 - gamma^2) sigma, but not below the floor;
            - "official", as in the authors' code: sqrt(1 - gamma^2) (sigma - sigma_min) + sigma_min.
        upward: whether the network was also trained to jump to higher levels, unlike in the paper.
        prediction: what the network predicts: "edm" (F), "flow", "epsilon" or "v_prediction", see
            `MultistepConsistencyScheduler`.
        time_scale: factor of the time label "flow_time", for "flow".
        noise_schedule: for "epsilon" and "v_prediction", the settings of diffusers' `DDPMScheduler`.
        default_sigmas: noise levels for given numbers of steps, instead of those of the grid. The keys are numbers of
            steps as text: {"2": [80.0, 0.8]}. `training/evaluate.py --search_sigmas` finds such levels.

    Raises:
        ValueError: a setting is unknown or outside its range, or does not fit another setting.

    Examples:
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
    _samples = "networks with two times, one of their input and one to jump to"

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
        """Return `n` Karras levels (n,) from `sigma_max`, by default the configured one, down to the floor."""
        return self._karras(np.linspace(0, 1, n), sigma_max)

    def _karras(self, ramp: np.ndarray, sigma_max: float | None = None) -> np.ndarray:
        # jumps end at the floor itself; the formula of stock schedulers would give a neighbouring number
        return np.where(ramp == 1, self.config.sigma_min, super()._karras(ramp, sigma_max))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
    ) -> None:
        """Set the noise levels, by exactly one of `num_inference_steps`, `timesteps` and `sigmas`.

        Args:
            num_inference_steps: number of levels, 1 to `num_train_timesteps`. They come from `default_sigmas`, or else
                are evenly spaced on the Karras grid from sigma_max.
            device: the device of `timesteps` and `target_timesteps`.
            timesteps: strictly decreasing time labels as in `.timesteps`. Grid indices are refused.
            sigmas: strictly decreasing noise levels in (sigma_min, sigma_max]. Sampling starts at the first.
            gamma: overrides the configured gamma for these levels, in [0, 1].

        Raises:
            ValueError: not exactly one is given, levels do not decrease strictly or are outside
                (sigma_min, sigma_max], or `gamma` is outside [0, 1].
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
        """Store levels that end with the floor, and the targets of the jumps, in float64 on the CPU.

        The labels go to `device`, in float32 if it lacks float64.
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
        """Return for each step: the norm of the network's input, the factors of the jumps, and the noise's std.

        There are two factors, of sample and output, for the jump to the floor and two for the jump to the target.
        """
        sigma, floor = self.sigmas[:-1], torch.as_tensor(self.config.sigma_min, dtype=torch.float64)
        jumps = (self._jump_scalings(sigma, to) for to in (floor, self.target_sigmas))
        return self.input.norm(sigma), *next(jumps), *next(jumps), self._noise_stds

    def _targets(self, following: np.ndarray, gamma: float) -> np.ndarray:
        """Return the targets of the jumps, for the levels `following` the first. The last target is the floor."""
        floor, kept = self.config.sigma_min, math.sqrt(1 - gamma**2)
        if gamma == 0:
            targets = following
        elif self.config.gamma_rule == "paper":
            targets = np.maximum(kept * following, floor)
        else:
            targets = kept * (following - floor) + floor
        return np.append(targets, floor)

    def _factor(self, values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Shape `values`, () or (B,), as a factor of `sample` (B, ...), in float32 for half-precision samples."""
        if values.ndim:
            values = append_dims(values, sample)
        return values.to(sample.device, torch.promote_types(sample.dtype, torch.float32))

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Scale `sample` (B, ...) at the level `sigma`, () or (B,), to the network's input: c_in x for "edm"."""
        return sample / self._factor(self.input.norm(as_float64(sigma)), sample)

    def jump(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        sigma: float | torch.Tensor,
        sigma_to: float | torch.Tensor,
    ) -> torch.Tensor:
        """Jump to another level: G(x, t, s) of eq. 9, from the network's output F.

        The jump is linear in s: G = x + (s - t) (pull x - gain F), with the pull and the gain of `velocity`. This form
        also holds at t = 0. With the diagonal output F(c_in x, t, t), the jump is an Euler step.

        Args:
            model_output: F (B, ...) for `precondition_inputs(sample, sigma)`.
            sample: x (B, ...) at the level `sigma`.
            sigma: the level t, () or (B,), at least 0.
            sigma_to: the level s, () or (B,), at least 0.

        Returns:
            The sample (B, ...) at `sigma_to`.
        """
        scalings = self._jump_scalings(as_float64(sigma), as_float64(sigma_to))
        keep, change = (self._factor(factor, sample) for factor in scalings)
        return keep * sample.to(keep.dtype) + change * model_output.to(keep.dtype)  # eq. 9

    def _jump_scalings(self, t: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of x and F in G(x, t, s), in float64."""
        pull, gain = slope_scalings(self.config.prediction, t, self.config.sigma_data)
        return 1 + (s - t) * pull, (t - s) * gain

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Return dx / dsigma = (x - g(x, t, t)) / t of the probability-flow ODE, from F(c_in x, t, t).

        It is computed as pull x - gain F. For "edm", pull = t / (t^2 + sigma_data^2), and
        gain = sigma_data / sqrt(t^2 + sigma_data^2).

        Args:
            model_output: F (B, ...), of a network call with both times equal.
            sample: x (B, ...) at the level `sigma`.
            sigma: the level t, () or (B,), at least 0.
        """
        scalings = slope_scalings(self.config.prediction, as_float64(sigma), self.config.sigma_data)
        pull, gain = (self._factor(value, sample) for value in scalings)
        return pull * sample.to(pull.dtype) - gain * model_output.to(pull.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """Scale `sample` (B, ...) to the network's input at `timestep`: for "edm", / sqrt(sigma^2 + sigma_data^2)."""
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
        """Make one step: return the sample at the next level, and the estimate of the clean sample.

        Args:
            model_output: the network's output (B, ...) for `scale_model_input(sample, timestep)`, `timestep` and the
                entry of `.target_timesteps` at the same index.
            timestep: one of `.timesteps`.
            sample: the current sample (B, ...).
            generator: the source of the noise, or a list with one per sample. With gamma = 0 no noise is drawn.
            return_dict: return an output object rather than a tuple.
            variance_noise: unit normal noise (B, ...) to add, instead of noise from `generator`.
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
