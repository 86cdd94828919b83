"""Stock schedulers that the library's schedulers can replace: the meaning of their configs, and their levels."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
from diffusers import ConfigMixin, FlowMatchLCMScheduler, LCMScheduler

from ..core.parameterisation import NetworkInput
from .levels import is_integer, is_real, read_numbers


# schedulers of networks on a VP process with a table of betas, and on the process of linear flow
TABLE_SCHEDULERS = (
    "LCMScheduler", "TCDScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "SASolverScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
FLOW_SCHEDULERS = ("FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
GRID_SCHEDULER = "CMStochasticIterativeScheduler"  # its settings mean the same as ours of the same names

TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
TABLE_PREDICTIONS = ("epsilon", "v_prediction", "sample")
LCM_SETTINGS = {"original_inference_steps": 50, "timestep_scaling": 10.0}  # and their defaults
FLOW_SETTINGS = (
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "time_shift_type",
)  # fmt: skip
# settings without a counterpart in our schedulers, with the values that have no effect
NOT_OURS: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "snr_shift_scale": (),
    "invert_sigmas": (False,),
    "scale_factors": (None,),
}


class CheckedConfig(ConfigMixin):
    """Loading of configs with checks: diffusers' `from_config` and `from_pretrained` drop unknown settings silently.

    The config of another scheduler is translated if the class can take its place, and refused otherwise.
    """

    _samples: str  # what the class samples, for error messages

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Select the settings from a config, as a step of `from_config`, after translating the config if necessary.

        Args:
            config_dict: the config, of this class or of another scheduler.
            **kwargs: settings that override those of the config.

        Raises:
            ValueError: the class can't take the place of the config's scheduler, or an override would have no effect.
        """
        name, ours = config_dict.get("_class_name"), settings_of(cls)
        others = [key for key in config_dict if key not in ours and key[0] != "_"]
        if name in [base.__name__ for base in cls.__mro__]:
            stray = sorted(set(kwargs) & set(others))
            if stray:
                raise ValueError(
                    f"{', '.join(stray)} would change nothing, because the config of a {name} has other settings for"
                    " this. Pass the override to from_config together with the config of the stock scheduler."
                )
            return super().extract_init_dict(config_dict, **kwargs)
        stock = name if isinstance(name, str) and hasattr(diffusers, name) else None
        if stock or others:
            try:
                settings = cls._in_place(stock, {**config_dict, **kwargs})
            except ValueError as error:
                whose = f"a {stock}" if stock else f"a scheduler with the settings {', '.join(others[:5])}"
                raise ValueError(f"{cls.__name__} can't take the place of {whose}: {error}") from None
            if settings is not None:
                # foreign settings stay in the config, for pipelines that read them and for the conversion back
                kept = {key: config_dict[key] for key in others}
                kept |= {key: kwargs.pop(key) for key in list(kwargs) if key not in ours}
                config_dict = {**kept, **settings, "_class_name": name or cls.__name__}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _in_place(cls, stock: str | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Translate the config of the diffusers class `stock` to settings of this class.

        Returns None if settings of the same names mean the same. If `stock` is None, the settings identify the class.

        Raises:
            ValueError: no translation exists; the message gives the reason.
        """
        raise ValueError(f"it samples {cls._samples}.")


def settings_in_place(stock: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the config of a stock scheduler to settings of `MultistepConsistencyScheduler` with `in_place_of`.

    Args:
        stock: the class of the scheduler in diffusers; None to identify it by its settings.
        config: its config, on a table of betas (noise, v or clean samples) or on linear flow.

    Raises:
        ValueError: the scheduler is of another kind, or has a setting without a counterpart.
    """
    said = _said(stock, config)
    of_table = stock in TABLE_SCHEDULERS or stock is None and {*TABLE[:4], "prediction_type"} <= said.keys()
    of_flow = stock in FLOW_SCHEDULERS or stock is None and {"num_train_timesteps", *FLOW_SETTINGS} <= said.keys()
    if of_table == of_flow or stock is None and "sigma_data" in said:
        raise ValueError(
            f"it can replace schedulers with a table of betas ({', '.join(TABLE_SCHEDULERS)}),"
            f" {', '.join(FLOW_SCHEDULERS)}, and {GRID_SCHEDULER}."
            + ("" if stock else " Add the _class_name of the scheduler to the config if it is one of these.")
        )
    for key, values in NOT_OURS.items():
        if key in said and said[key] not in values:
            raise ValueError(f"it has no counterpart of {key}={said[key]!r}.")
    ends = {"sigma_min": None, "sigma_max": None}
    return (_of_flow(said) if of_flow else _of_table(said, config)) | ends


def _of_flow(said: Mapping[str, Any]) -> dict[str, Any]:
    total = said["num_train_timesteps"]
    return {
        "num_train_timesteps": total,
        "prediction": "flow",
        "time_scale": float(total),
        "clip_denoised": False,
        "in_place_of": {key: said[key] for key in FLOW_SETTINGS if key in said},
    }


def _of_table(said: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    prediction, total = said.get("prediction_type"), said["num_train_timesteps"]
    if prediction not in TABLE_PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(TABLE_PREDICTIONS)}; it is {prediction!r}.")
    clip = bool(said.get("clip_sample", False))
    if clip and said.get("clip_sample_range", 1.0) != 1:
        raise ValueError(f"it clips to [-1, 1], not to a clip_sample_range of {said['clip_sample_range']}.")
    table = {key: said[key] for key in TABLE if said.get(key) is not None}
    if "trained_betas" in table:
        betas = table["trained_betas"] = [float(beta) for beta in table["trained_betas"]]
        if len(betas) != total:
            raise ValueError(f"num_train_timesteps must be the number of trained_betas, {len(betas)}; it is {total}.")
    settings = {key: config.get(key, default) for key, default in LCM_SETTINGS.items()}
    return {
        **settings,  # also under their own names, for LCM pipelines
        "num_train_timesteps": total,
        "prediction": prediction,
        "noise_schedule": table,
        "clip_denoised": clip,
        "in_place_of": settings,
    }


def _said(stock: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a scheduler, with defaults, without those that its config keeps of other classes."""
    known = settings_of(getattr(diffusers, stock)) if stock else {}
    if not known:  # the class is unknown, or a package that it needs is missing
        return dict(config)
    return {key: config.get(key, default) for key, default in known.items()}


def settings_of(cls: type) -> dict[str, Any]:
    """Return the settings that the constructor of the scheduler class `cls` takes, with their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


class StockLevels:
    """The levels that a stock few-step scheduler chooses, and the boundary condition that it adds to D.

    The stock scheduler is `LCMScheduler` for networks with a table of times, and `FlowMatchLCMScheduler` for flow.

    Args:
        network: the input scaling and time label of the network.
        settings: settings of the stock scheduler apart from the table, among `LCM_SETTINGS` or `FLOW_SETTINGS`.

    Raises:
        ValueError: `settings` has other settings.
    """

    def __init__(self, network: NetworkInput, settings: Mapping[str, Any]):
        self.network, self.of_flow = network, network.prediction == "flow"
        known = FLOW_SETTINGS if self.of_flow else tuple(LCM_SETTINGS)
        if not isinstance(settings, Mapping) or not set(settings) <= set(known):
            raise ValueError(f"in_place_of must hold settings among {', '.join(known)}; got {settings!r}.")
        total = int(self._end) if self.of_flow else int(self._end) + 1
        self.stock = (FlowMatchLCMScheduler if self.of_flow else LCMScheduler)(total, **settings)

    @property
    def _end(self) -> float:
        """The highest time of the network."""
        return self.network.time_scale if self.of_flow else len(self.network.angles) - 1  # type: ignore[arg-type]

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise levels (n,) and the times (n,) of training, decreasing."""
        return self._at(self.stock.timesteps.numpy())

    def chosen(
        self,
        n: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        original_inference_steps: int | None,
        strength: float,
        mu: float | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise levels (n,) and the network's times (n,) for the arguments of `set_timesteps`.

        Range and order of the levels remain to be checked.

        Args:
            n: number of levels. Exactly one of `n`, `timesteps` and `sigmas` is given.
            timesteps: times of the network.
            sigmas: noise levels, or for flow, flow times in (0, 1] before the shift.
            original_inference_steps: for a table, the number of times from which `n` selects; None for the default.
            strength: share of the levels in (0, 1] that is kept; the highest are left out.
            mu: for flow, the shift; None without one.

        Raises:
            ValueError: an argument is invalid, or has no effect on this kind of scheduler.
        """
        if not is_real(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength!r}.")
        if self.of_flow and (original_inference_steps is not None or strength != 1):
            raise ValueError("original_inference_steps and strength select from a table of times; flow has none.")
        if not self.of_flow and mu is not None:
            raise ValueError(f"mu shifts the times of flow, but this network has a table of times; got {mu}.")
        stock = copy.copy(self.stock)
        if n is not None and (not is_integer(n) or n < 1):
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {n!r}.")
        if timesteps is not None:
            times = np.array(read_numbers("timesteps", timesteps))
            if times.size and not (0 <= times.min() and times.max() <= self._end):
                raise ValueError(f"`timesteps` must lie in [0, {self._end:g}], got {times.tolist()}.")
            return self._at(times[self._start(len(times), strength) :])
        if self.of_flow:
            numbers = None if sigmas is None else read_numbers("sigmas", sigmas)
            if numbers is not None and not all(0 < number <= 1 for number in numbers):
                raise ValueError(f"`sigmas` in the place of a flow scheduler are flow times in (0, 1], got {numbers}.")
            stock.set_timesteps(n, sigmas=numbers, mu=mu)
        elif sigmas is not None:
            levels = np.array(read_numbers("sigmas", sigmas), dtype=float)
            levels = levels[self._start(len(levels), strength) :]
            return levels, self.network.label(levels)
        else:
            stock.set_timesteps(n, original_inference_steps=original_inference_steps, strength=strength)
        return self._at(stock.timesteps.numpy())

    def _start(self, n: int, strength: float) -> int:
        """Return the index of the first level of image-to-image, which leaves out the highest levels."""
        return n - int(n * strength)

    def _at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.network.sigma(times.astype(float)), times

    def boundary(self, time: float) -> tuple[float, float]:
        """Return c_skip and c_out of LCM (Luo et al. 2023, arXiv:2310.04378) at `time`, a time of the network.

        With them, f = c_skip x + c_out D equals x at time 0, for x in the network's scale. For flow, f = D.
        """
        if self.of_flow:
            return 0.0, 1.0
        return self.stock.get_scalings_for_boundary_condition_discrete(time)
