"""Sampling of TrigFlow models in a few steps or by the probability-flow ODE (Lu & Song 2024, arXiv:2410.11081)."""

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

from ..core.arrays import append_dims, lacks_float64
from ..core.karras import karras_sigma
from ..core.time_labels import TIME_LABELS
from .levels import Levels, as_float64, is_integer, read_numbers, refuse_index
from .stock import CheckedConfig


TRIGFLOW_SOLVERS = ("consistency", "euler", "heun")


@dataclass
class TrigFlowSchedulerOutput(BaseOutput):
    """Output of a step of `TrigFlowScheduler`.

    Args:
        prev_sample (`torch.Tensor`): the sample (B, ...) for the next network call.
        pred_original_sample (`torch.Tensor`): the estimate of the clean sample (B, ...) at this call.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class TrigFlowScheduler(Levels, SchedulerMixin, CheckedConfig):
    """Scheduler of TrigFlow models: consistency models and diffusion models.

    Samples are x_t = cos(t) x0 + sin(t) sigma_data noise at the angle t = atan(sigma / sigma_data) in [0, pi/2]. The
    network is called as F(x_t / sigma_data, t). Its output is the velocity divided by sigma_data, so the estimate of
    the clean sample is D = cos(t) x_t - sin(t) sigma_data F. `timesteps` are the angles for the network. `sigmas` are
    the noise levels at these angles, and end with 0.

    - "consistency" jumps to D and adds noise of the next angle. The last step adds none (section 4.1 of the paper).
    - "euler" turns x_t by the angle t - s, which is exact if D does not change along the path (section 3).
    - "heun" calls the network at both ends of a step, and turns the second velocity back to t. The mean of both
      velocities turns x_t. It makes 2 n - 1 calls for n levels; each angle but the first is twice in `timesteps`.
      The order is 2, except in the last step, to 0.

    Args:
        sigma_data: root mean square of the training data.
        sigma_max: the noise level where sampling starts by default.
        sigma_min: the last level above 0 of the solvers' grid. A consistency model has no floor.
        rho: exponent of the solvers' Karras grid.
        solver: "consistency" for consistency models, "euler" or "heun" for diffusion models.
        clip_denoised: clamp a consistency model's estimate of the clean sample to [-1, 1], for images but not for
            latents.
        default_sigmas: noise levels for given numbers of steps, instead of those of the grid. The keys are numbers of
            steps as text: {"2": [80.0, 0.8]}. `training/evaluate.py --search_sigmas` finds such levels.

    Raises:
        ValueError: the solver is unknown, a number is not positive and finite, sigma_min is not below sigma_max, or
            `default_sigmas` has invalid levels or another number of them.

    Examples:
        >>> import torch
        >>> from cm_diffusers import TrigFlowScheduler
        >>> from cm_diffusers.models import build_unet
        >>> unet, scheduler = build_unet("jvp_tiny", (8, 8), 1), TrigFlowScheduler()
        >>> scheduler.set_timesteps(timesteps=[1.5645, 1.1])
        >>> sample = scheduler.init_noise_sigma * torch.randn(2, 1, 8, 8)
        >>> with torch.no_grad():
        ...     for t in scheduler.timesteps:
        ...         output = unet(scheduler.scale_model_input(sample, t), t).sample
        ...         sample = scheduler.step(output, t, sample).prev_sample
        >>> sample.shape
        torch.Size([2, 1, 8, 8])
    """

    _compatibles: list[str] = []
    _samples = "networks on TrigFlow's process, with its angles as time"
    _begun: tuple[float, torch.Tensor, torch.Tensor] | None  # t, x and velocity after the first half of a "heun" step

    @register_to_config
    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        solver: str = "consistency",
        clip_denoised: bool = True,
        default_sigmas: dict[str, list[float]] | None = None,
    ) -> None:
        if solver not in TRIGFLOW_SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(TRIGFLOW_SOLVERS)}; got {solver!r}.")
        self._check_settings()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie in (0, sigma_max), got {sigma_min} and sigma_max {sigma_max}.")
        self._check_default_sigmas()
        self.num_inference_steps: int | None = None
        self.solver = solver
        self._set_levels(self._default_angles(1 if solver == "consistency" else 18), None)

    @property
    def order(self) -> int:
        """Network calls per step: 2 for "heun", else 1."""
        return 2 if self.solver == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:
        """The factor of unit noise at the first step: sin(t) sigma_data, which is sigma_data at infinite sigma."""
        return math.sin(self._angles[0]) * self.config.sigma_data

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call of `step` begins a step. False in the middle of a "heun" step."""
        return self._begun is None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start from the network call `begin_index`. For "heun" it must be even, because odd calls end a step.

        Raises:
            ValueError: `begin_index` is not the index of a call that begins a step.
        """
        self._check_begin_index(begin_index)
        if begin_index % self.order:
            raise ValueError(f"A step of 'heun' begins at an even index of `timesteps`, not at {begin_index}.")
        self._begin_index = begin_index

    def sigma_to_timestep(self, sigmas: np.ndarray) -> np.ndarray:
        """Convert noise levels `sigmas`, any shape, to angles in radians; inf becomes pi/2."""
        return TIME_LABELS["angle"].from_sigma(np.asarray(sigmas), self.config.sigma_data)

    def timestep_to_sigma(self, timesteps: np.ndarray) -> np.ndarray:
        """Convert angles `timesteps` in radians, any shape, to noise levels; pi/2 becomes inf."""
        return TIME_LABELS["angle"].to_sigma(np.asarray(timesteps), self.config.sigma_data)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        solver: str | None = None,
    ) -> None:
        """Set the noise levels, by exactly one of `num_inference_steps`, `timesteps` and `sigmas`.

        Args:
            num_inference_steps: the number of levels n. They come from `default_sigmas`, if it has n. Otherwise a
                consistency model has the angles t_max sqrt(1 - k / n); the second of two is near the paper's 1.1. A
                diffusion model has a Karras grid from sigma_max to sigma_min, with n of at least 2.
            device: the device of `timesteps`.
            timesteps: strictly decreasing angles in (0, pi/2].
            sigmas: strictly decreasing noise levels in (0, sigma_max]. The first can be inf.
            solver: "euler" or "heun", instead of the configured solver of a diffusion model.

        Raises:
            ValueError: not exactly one is given, levels do not decrease strictly or are outside their range, or the
                solver does not fit the model.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `sigmas` and `timesteps`.")
        self._check_solver(solver or self.config.solver)
        if num_inference_steps is not None:
            angles = self._default_angles(num_inference_steps)
        elif sigmas is not None:
            angles = self.sigma_to_timestep(
                self._check_levels("sigmas", np.array(read_numbers("sigmas", sigmas), dtype=float))
            )
        else:
            angles = self._check_angles(timesteps)
        self.solver = solver or self.config.solver
        self.num_inference_steps = len(angles)
        self._set_levels(angles, device)

    def _check_solver(self, solver: str) -> None:
        if solver not in TRIGFLOW_SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(TRIGFLOW_SOLVERS)}; got {solver!r}.")
        configured = self.config.solver
        if solver != configured and "consistency" in (solver, configured):
            reason = (
                "a consistency model predicts the end of its path, which gives no velocity to follow"
                if configured == "consistency"
                else "a diffusion model predicts a posterior mean, which is not a sample, so it can't jump"
            )
            raise ValueError(f"The solver {solver!r} does not fit a model of the solver {configured!r}: {reason}.")

    def _default_angles(self, n: int) -> np.ndarray:
        fewest = 1 if self.config.solver == "consistency" else 2
        if not is_integer(n) or n < fewest:
            raise ValueError(f"num_inference_steps must be an integer of at least {fewest}, got {n}.")
        if str(n) in (self.config.default_sigmas or {}):
            return self.sigma_to_timestep(np.array(self.config.default_sigmas[str(n)]))
        sigma_min, sigma_max, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if self.config.solver == "consistency":
            return self.sigma_to_timestep(sigma_max) * np.sqrt(1 - np.arange(n) / n)
        return self.sigma_to_timestep(karras_sigma(np.linspace(0, 1, n), sigma_min, sigma_max, rho))

    def _check_fall(self, name: str, levels: np.ndarray) -> None:
        if levels.ndim != 1 or len(levels) == 0 or np.isnan(levels).any():
            raise ValueError(f"`{name}` must be a non-empty list of numbers.")
        if not (levels[1:] < levels[:-1]).all():
            raise ValueError(f"`{name}` must fall strictly, got {levels.tolist()}.")
        if levels[-1] <= 0:
            raise ValueError(f"`{name}` must be above 0, got {levels[-1]:g}; the step to 0 comes by itself.")

    def _check_levels(self, name: str, levels: np.ndarray) -> np.ndarray:
        self._check_fall(name, levels)
        if levels[0] > self.config.sigma_max * (1 + 1e-6) and levels[0] != math.inf:
            raise ValueError(f"`{name}` must not exceed sigma_max={self.config.sigma_max}, got {levels[0]:g}.")
        return levels

    def _check_angles(self, timesteps: Any) -> np.ndarray:
        values = read_numbers("timesteps", timesteps)
        meant = "`timesteps` are angles in (0, pi/2]; pass noise levels as `sigmas`."
        if values and all(map(is_integer, values)):
            raise ValueError(f"{meant} Grid indices are not understood, got {values}.")
        angles = np.array(values, dtype=float)
        if (angles > math.pi / 2 + 1e-5).any():
            raise ValueError(f"{meant} Got {angles.max():g}.")
        self._check_fall("timesteps", angles)
        return angles.clip(max=math.pi / 2)  # which float32 and 1.5708 exceed

    def _set_levels(self, angles: np.ndarray, device: str | torch.device | None) -> None:
        """Store angles and levels in float64 on the CPU; `timesteps` go to `device`, float32 if it lacks float64."""
        self._step_index = self._begin_index = self._begun = None
        choice = (angles.tobytes(), self.order, device)
        if self._is_chosen(*choice):
            return
        calls = np.repeat(angles, self.order)[self.order - 1 :]
        self._labels = calls
        self._angles = np.append(calls, 0.0).tolist()  # of each network call, and 0
        self.sigmas = torch.from_numpy(self.timestep_to_sigma(np.append(calls, 0.0)))
        self.timesteps = torch.from_numpy(calls).to(device, torch.float32 if lacks_float64(device) else torch.float64)
        self._keep(*choice)

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        if self.begin_index is not None:
            return self.begin_index
        refuse_index("one of `scheduler.timesteps` (floats)", timestep)
        gaps = np.abs(self._labels[:: self.order] - float(timestep))
        index = int(gaps.argmin())
        if gaps[index] > 1e-4:
            raise ValueError(f"{float(timestep):g} is not one of `scheduler.timesteps`: {self.timesteps.tolist()}.")
        return index * self.order

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """Divide `sample` (B, ...) by sigma_data, the scaling of the network's input at every `timestep`."""
        self._index_now(timestep)
        return sample / self.config.sigma_data

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> TrigFlowSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Return the sample for the next network call, and the estimate of the clean sample.

        Args:
            model_output: the network's output F (B, ...) for `scale_model_input(sample, timestep)`.
            timestep: one of `.timesteps`.
            sample: the current sample (B, ...).
            generator: the source of a consistency model's noise, or a list with one per sample.
            return_dict: return an output object rather than a tuple.
            variance_noise: unit normal noise (B, ...) that a consistency model adds, instead of one from `generator`.
        """
        index = self._index_now(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)  # float32 arithmetic for half-precision samples
        x, output = sample.to(dtype), model_output.to(dtype)
        if self.solver == "consistency":
            prev_sample = denoised = self._jump(x, output, index)
            if index + 1 < len(self._labels):
                noise = variance_noise
                if noise is None:
                    noise = randn_tensor(
                        model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                    )
                _, _, cos, sin = self._factors(index, dtype)
                prev_sample = cos * denoised + sin * noise
        else:
            prev_sample, denoised = self._ode_step(x, self.config.sigma_data * output, index)
        self._step_index = index + 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return TrigFlowSchedulerOutput(prev_sample, denoised)

    def _jump(self, x: torch.Tensor, output: torch.Tensor, index: int) -> torch.Tensor:
        """Return the clean sample to which a consistency model jumps."""
        cos, sin, _, _ = self._factors(index, x.dtype)
        denoised = cos * x - sin * output
        return denoised.clamp(-1, 1) if self.config.clip_denoised else denoised

    def _columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return cos(t) and sigma_data sin(t), of each call and of the next level."""
        angles = torch.tensor(self._angles, dtype=torch.float64)
        cos, sin = angles.cos(), self.config.sigma_data * angles.sin()
        return cos[:-1], sin[:-1], cos[1:], sin[1:]

    def _ode_step(self, x: torch.Tensor, velocity: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        t, t_next = self._angles[index : index + 2]
        denoised = _turned(x, velocity, t)
        if self._begun is not None:
            return self._correct(x, velocity, t), denoised
        if self.solver == "heun" and t_next > 0:
            self._begun = (t, x, velocity)
        return _turned(x, velocity, t - t_next), denoised

    def _correct(self, x_next: torch.Tensor, velocity_next: torch.Tensor, t_next: float) -> torch.Tensor:
        """Make the second half of a "heun" step, with the velocity at the end that "euler" found.

        With D and the noise held fixed, the velocity turns as the sample does: dv/dt = -x. The velocity at the end is
        turned back to t, and averaged with the velocity at the start. This is Heun's rule in the coordinate
        tan(s - t), in which the paths of fixed D are straight lines.
        """
        assert self._begun is not None
        t, x, velocity = self._begun
        self._begun = None
        cos, sin = math.cos(t - t_next), math.sin(t - t_next)
        return cos * x - sin * (velocity + cos * velocity_next - sin * x_next) / 2

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        *,
        sigmas: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return cos(t) original_samples + sin(t) sigma_data noise, at any level for each sample.

        Args:
            original_samples: clean samples (B, ...).
            noise: unit normal noise of the same shape.
            timesteps: angles, one for all samples or one per sample (B,), as floats.
            sigmas: noise levels, one for all samples or one per sample (B,), instead of `timesteps`.

        Raises:
            ValueError: not exactly one of `timesteps` and `sigmas` is given, or angles are integers.
        """
        if timesteps is not None and sigmas is None:
            refuse_index("angles as in `scheduler.timesteps` (floats)", timesteps)
            angles = as_float64(timesteps)
        elif sigmas is not None and timesteps is None:
            angles = TIME_LABELS["angle"].from_sigma(as_float64(sigmas), self.config.sigma_data)
        else:
            raise ValueError("Pass exactly one of `timesteps` and `sigmas`.")
        angles = append_dims(angles, original_samples)
        cos, sin = (
            factor.to(original_samples.device, original_samples.dtype)
            for factor in (angles.cos(), angles.sin() * self.config.sigma_data)
        )
        return cos * original_samples + sin * noise


def _turned(x: torch.Tensor, velocity: torch.Tensor, angle: float) -> torch.Tensor:
    """Turn `x` back by `angle`, along the path of a fixed clean sample. By the whole angle t, the result is D."""
    return math.cos(angle) * x - math.sin(angle) * velocity
