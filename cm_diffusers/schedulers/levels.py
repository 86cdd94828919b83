"""Common parts of the schedulers: the choice of noise levels, the current step, and noise at any level."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..core.arrays import append_dims, lacks_float64
from ..core.karras import karras_sigma
from ..core.parameterisation import NetworkInput


# settings that must be above 0, settings that must be at least 0, and settings that must be True or False
POSITIVE = ("sigma_data", "sigma_max", "rho", "time_scale")
NOT_NEGATIVE = ("sigma_min", "s_noise")
SWITCHES = ("clip_denoised", "upward")


class Levels:
    """Base of schedulers that choose their levels; their `config` has `default_sigmas`.

    With each choice of levels, a subclass sets `sigmas`, `timesteps`, `_labels` and
    `_step_index = _begin_index = None`.
    """

    config: Any  # diffusers' ConfigMixin sets it
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    _step_index: int | None
    _begin_index: int | None
    _labels: np.ndarray  # the timesteps as an array, on the CPU
    _choice: tuple[Any, ...] = (None,)  # the config and the last choice
    _tables: dict[torch.dtype, list[tuple[float, ...]]]  # factors of each step, by dtype of the arithmetic

    @property
    def step_index(self) -> int | None:
        """Index of the current network call, or None before the first call."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index to start from; None if the first timestep decides."""
        return self._begin_index

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        """Return the index at which `timestep`, the time of the first network call, begins. ValueError if unknown."""
        raise NotImplementedError

    def _index_now(self, timestep: float | torch.Tensor) -> int:
        """Return the index of the current network call. `timestep` decides it at the first call only."""
        if self._step_index is None:
            self._step_index = self._index_of(timestep)
        if self._step_index >= len(self._labels):
            raise ValueError(f"All {len(self._labels)} steps were made; call `set_timesteps` to begin again.")
        return self._step_index

    def _is_chosen(self, *choice: Any) -> bool:
        """Return whether the last choice of levels was the same, so that everything is already computed."""
        return self._choice[0] is self.config and self._choice[1:] == choice

    def _keep(self, *choice: Any) -> None:
        """Store the choice whose levels are now set. The tables of factors are computed at the first step."""
        self._choice, self._tables = (self.config, *choice), {}

    def _factors(self, index: int, dtype: torch.dtype) -> tuple[float, ...]:
        """Return the factors of step `index` in `dtype`. They are computed for all steps at the first one."""
        if dtype not in self._tables:
            self._tables[dtype] = list(zip(*(column.to(dtype).tolist() for column in self._columns(dtype))))
        return self._tables[dtype][index]

    def _columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return the factors, each as a tensor (steps,)."""
        raise NotImplementedError

    def _check_begin_index(self, begin_index: int) -> None:
        if not is_integer(begin_index) or not 0 <= begin_index < len(self.timesteps):
            raise ValueError(f"begin_index must be an integer in [0, {len(self.timesteps) - 1}], got {begin_index!r}.")

    def _check_levels(self, name: str, levels: np.ndarray) -> np.ndarray:
        """Check that the scheduler can sample at `levels` (n,), and return them. Errors call the argument `name`."""
        raise NotImplementedError

    def _check_one(self, *ways: Any) -> None:
        if sum(way is not None for way in ways) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `sigmas` and `timesteps`.")

    def _check_settings(self, unset: Sequence[str] = ()) -> None:
        """Check each setting by itself: numbers, counts and switches. Settings named in `unset` must be None."""
        for name in unset:
            if self.config[name] is not None:
                raise ValueError(f"{name} must be None with in_place_of, got {self.config[name]!r}.")
        for name in (name for name in (*POSITIVE, *NOT_NEGATIVE) if name not in unset):
            value, zero = self.config.get(name, 1.0), name in NOT_NEGATIVE
            if not is_real(value) or not (0 <= value < math.inf) or value == 0 and not zero:
                raise ValueError(f"{name} must be {'0 or ' if zero else ''}positive and finite, got {value!r}.")
        for name in SWITCHES:
            if not isinstance(self.config.get(name, True), (bool, np.bool_)):
                raise ValueError(f"{name} must be True or False, got {self.config[name]!r}.")
        total = self.config.get("num_train_timesteps", 2)
        if not is_integer(total) or total < 2:
            raise ValueError(f"num_train_timesteps must be an integer of at least 2, got {total!r}.")
        if not isinstance(self.config.default_sigmas or {}, dict):
            raise ValueError(
                'default_sigmas must map numbers of steps to noise levels, such as {"2": [80.0, 0.8]}, got'
                f" {self.config.default_sigmas!r}."
            )

    def _check_default_sigmas(self) -> None:
        for steps, sigmas in (self.config.default_sigmas or {}).items():
            name = f"default_sigmas[{steps!r}]"
            levels = self._check_levels(name, np.array(read_numbers(name, sigmas), dtype=float))
            if str(len(levels)) != steps:
                raise ValueError(f"default_sigmas[{steps!r}] must hold as many levels as its key, got {len(levels)}.")


class KarrasLevels(Levels):
    """Base of schedulers with a Karras grid.

    Their `config` also has `num_train_timesteps`, `sigma_min`, `sigma_max` and `rho`. A subclass also sets `input`.
    """

    input: NetworkInput

    @property
    def init_noise_sigma(self) -> float:
        """The factor of unit noise at the first step."""
        return float(self.sigmas[0])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start from step `begin_index` of the current levels."""
        self._check_begin_index(begin_index)
        self._begin_index = begin_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def sigma_to_timestep(self, sigmas: np.ndarray) -> np.ndarray:
        """Convert noise levels `sigmas`, any shape, to the network's time input."""
        return self.input.label(sigmas)

    def timestep_to_sigma(self, timesteps: np.ndarray) -> np.ndarray:
        """Convert the network's time inputs `timesteps`, any shape, to noise levels."""
        return self.input.sigma(timesteps)

    def labels(self, sigmas: float | torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
        """Convert noise levels `sigmas`, any shape, to time inputs on `device`, in float32 if it lacks float64."""
        return as_labels(self.sigma_to_timestep(as_float64(sigmas).numpy()), device)

    def _karras(self, ramp: np.ndarray, sigma_max: float | None = None) -> np.ndarray:
        return karras_sigma(ramp, self.config.sigma_min, sigma_max or self.config.sigma_max, self.config.rho)

    def _chosen_levels(
        self, num_inference_steps: int | None, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
    ) -> np.ndarray:
        """Return the levels (n,) for the arguments of `set_timesteps`, which it checks."""
        self._check_one(num_inference_steps, timesteps, sigmas)
        if num_inference_steps is not None:
            return self._default_levels(num_inference_steps)
        if sigmas is not None:
            return self._check_levels("sigmas", np.array(read_numbers("sigmas", sigmas), dtype=float))
        timesteps = read_numbers("timesteps", timesteps)
        self._refuse_indices(timesteps)
        levels = self.timestep_to_sigma(np.array(timesteps, dtype=float))
        return self._check_levels("timesteps", levels)

    def _default_levels(self, n: int) -> np.ndarray:
        total = self.config.num_train_timesteps
        if not is_integer(n) or not 1 <= n <= total:
            raise ValueError(f"num_inference_steps must lie in [1, num_train_timesteps={total}], got {n}.")
        if str(n) in (self.config.default_sigmas or {}):
            return np.array(self.config.default_sigmas[str(n)])
        return self._karras(np.arange(n) * (total // n) / (total - 1))

    @property
    def _range(self) -> tuple[float, float]:
        """The exclusive lower bound and the inclusive upper bound of the levels."""
        return self.config.sigma_min, self.config.sigma_max

    def _check_levels(self, name: str, levels: np.ndarray) -> np.ndarray:
        floor, top = self._range
        finite = name != "timesteps" and top < math.inf  # a finite label may mean an infinite level
        highest = np.finfo(float).max if finite else math.inf
        if levels.ndim != 1 or len(levels) == 0 or not (np.abs(levels) <= highest).all():
            raise ValueError(f"`{name}` must be a non-empty list of finite numbers.")
        if (levels[1:] >= levels[:-1]).any():
            raise ValueError(f"`{name}` must fall strictly, got the levels {levels.tolist()}.")
        if levels[0] > top * (1 + 1e-6):
            raise ValueError(f"`{name}` must not exceed sigma_max={top}, got {levels[0]:g}.")
        if levels[-1] <= floor:
            raise ValueError(f"`{name}` must stay above sigma_min={floor}, got {levels[-1]:g}.")
        return levels

    def _refuse_index(self, wanted: str, timesteps: Any) -> None:
        """Refuse integer timesteps, see `refuse_index`, unless the network itself takes indices of a table."""
        if self.input.time_label != "timestep":
            refuse_index(wanted, timesteps)

    def _refuse_indices(self, values: list[float]) -> None:
        if self.input.time_label != "timestep" and all(map(is_integer, values)):
            total = self.config.num_train_timesteps
            hint = ""
            if values and all(0 <= t < total for t in values):
                # as in diffusers' own scheduler, indices count from sigma_max, and are sampled in increasing order
                same = self._karras(np.array(sorted(set(values))) / (total - 1))
                levels = [round(float(s), 6) for s in same if s > self.config.sigma_min * (1 + 1e-9)]
                hint = f" As indices into the grid of {total} levels, they mean sigmas={levels}."
            raise ValueError(
                "`timesteps` are the network's time labels as in `.timesteps` (floats), not grid indices;"
                f" got {values}. Pass `sigmas`, the noise levels, instead.{hint}"
            )

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        if self.begin_index is not None:
            return self.begin_index
        self._refuse_index("one of `scheduler.timesteps` (floats)", timestep)
        gaps = np.abs(self._labels - float(timestep))
        index = int(gaps.argmin())
        if gaps[index] > 1e-4 * max(1.0, abs(float(timestep))):
            raise ValueError(f"{float(timestep):g} is not one of `scheduler.timesteps`: {self.timesteps.tolist()}.")
        return index

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        *,
        sigmas: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return original_samples + sigma noise, at any level for each sample.

        Args:
            original_samples: clean samples (B, ...).
            noise: unit normal noise of the same shape.
            timesteps: time labels, one for all samples or one per sample (B,), as floats.
            sigmas: noise levels, one for all samples or one per sample (B,), instead of `timesteps`.

        Raises:
            ValueError: not exactly one of `timesteps` and `sigmas` is given, or time labels are integers.
        """
        levels = append_dims(self._noise_levels(timesteps, sigmas), original_samples)
        return original_samples + levels.to(original_samples.device, original_samples.dtype) * noise

    def _noise_levels(self, timesteps: torch.Tensor | None, sigmas: torch.Tensor | None) -> torch.Tensor:
        """Return the levels for the arguments of `add_noise`, in float64 on the CPU."""
        if timesteps is not None and sigmas is None:
            self._refuse_index("time labels as in `scheduler.timesteps` (floats)", timesteps)
            return as_float64(self.timestep_to_sigma(as_float64(timesteps).numpy()))
        if sigmas is not None and timesteps is None:
            return as_float64(sigmas)
        raise ValueError("Pass exactly one of `timesteps` and `sigmas`.")


def is_real(value: Any) -> bool:
    """Return whether `value` is a real number, of Python or NumPy. Booleans do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Return whether `value` is an integer, of Python or NumPy. Booleans do not count."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def read_numbers(name: str, values: Any) -> list[float]:
    """Read a list of numbers. Integers stay integers.

    Args:
        name: the argument's name in the error message.
        values: a flat sequence, array or tensor of numbers; or one number, which becomes a list of one.

    Raises:
        ValueError: `values` is anything else.
    """
    found = values.tolist() if hasattr(values, "tolist") else values
    found = [found] if is_real(found) else found
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in found]
        if all(map(is_real, found)):
            return found
    raise ValueError(f"`{name}` must be a number or a list of numbers, got {values!r}.")


def refuse_index(wanted: str, timesteps: Any) -> None:
    """Refuse integer timesteps, which other schedulers use as indices into their grid.

    Args:
        wanted: the expected argument, for the error message.
        timesteps: the given number, sequence, array or tensor.

    Raises:
        ValueError: `timesteps` are not floats.
    """
    floats = timesteps.is_floating_point() if torch.is_tensor(timesteps) else np.asarray(timesteps).dtype.kind == "f"
    if not floats:
        raise ValueError(f"Pass {wanted}, not the integer index {timesteps}.")


def as_float64(values: float | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert `values`, any shape, to a float64 tensor on the CPU, without rounding numbers to float32."""
    return values.cpu().double() if torch.is_tensor(values) else torch.as_tensor(values, dtype=torch.float64)


def as_labels(values: np.ndarray, device: str | torch.device | None) -> torch.Tensor:
    """Convert time labels `values`, any shape, to a tensor on `device`.

    Floats become float64, or float32 if the device lacks float64. Integers become int64.
    """
    labels = torch.as_tensor(values)
    floats = torch.float32 if lacks_float64(device) else torch.float64
    return labels.to(device, floats if labels.is_floating_point() else torch.int64)
