"""Schedulers of diffusers in whose place ours can step: what their configs say, and the levels that they choose."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
from diffusers import ConfigMixin, FlowMatchLCMScheduler, LCMScheduler

from ..core.parameterisation import NetworkInput
from .levels import is_integer, is_real, read_numbers


# of networks on a VP process with a table of betas, and on the process of linear flow
TABLE_SCHEDULERS = (
    "LCMScheduler", "TCDScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "SASolverScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
FLOW_SCHEDULERS = ("FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
GRID_SCHEDULER = "CMStochasticIterativeScheduler"  # whose settings mean what ours of the same names mean

TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
TABLE_PREDICTIONS = ("epsilon", "v_prediction", "sample")
LCM_SETTINGS = {"original_inference_steps": 50, "timestep_scaling": 10.0}  # and their defaults
FLOW_SETTINGS = (
    "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "time_shift_type",
)  # fmt: skip
# what we have nothing like, by name with the values that mean nothing
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
    """diffusers' `from_config` and `from_pretrained` for schedulers, which by themselves drop what a class lacks.

    A config of another scheduler is translated where the class can take its place, and refused where it can't.
    """

    _samples: str  # what the class samples, for a refusal

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The step of `from_config` that picks settings. Raises ValueError for a config that can't be meant."""
        name, ours = config_dict.get("_class_name"), settings_of(cls)
        others = [key for key in config_dict if key not in ours and key[0] != "_"]
        if name in [base.__name__ for base in cls.__mro__]:
            stray = sorted(set(kwargs) & set(others))
            if stray:
                raise ValueError(
                    f"{', '.join(stray)} would change nothing: the config is that of a {name}, where other settings"
                    " stand for it. Give it to from_config with the config of the stock scheduler."
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
                # the settings that are not ours stay beside ours, for pipelines that read them and for the way back
                kept = {key: config_dict[key] for key in others}
                kept |= {key: kwargs.pop(key) for key in list(kwargs) if key not in ours}
                config_dict = {**kept, **settings, "_class_name": name or cls.__name__}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _in_place(cls, stock: str | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The settings of this class that mean what a config of the class `stock` of diffusers means.

        None where those of the same names mean the same. Without a name the settings tell what they are of.

        Raises:
            ValueError: there are none; the message says why.
        """
        raise ValueError(f"it samples {cls._samples}.")


def settings_in_place(stock: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """See `CheckedConfig._in_place`, for networks of noise, v or clean samples on a table of betas, or of flow."""
    said = _said(stock, config)
    of_table = stock in TABLE_SCHEDULERS or stock is None and {*TABLE[:4], "prediction_type"} <= said.keys()
    of_flow = stock in FLOW_SCHEDULERS or stock is None and {"num_train_timesteps", *FLOW_SETTINGS} <= said.keys()
    if of_table == of_flow or stock is None and "sigma_data" in said:
        raise ValueError(
            f"it takes that of schedulers with a table of betas ({', '.join(TABLE_SCHEDULERS)}), of"
            f" {', '.join(FLOW_SCHEDULERS)}, and of {GRID_SCHEDULER}"
            + ("." if stock else ". Add the _class_name of the scheduler if it is one of these.")
        )
    for key, values in NOT_OURS.items():
        if key in said and said[key] not in values:
            raise ValueError(f"it has nothing like {key}={said[key]!r}.")
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
        raise ValueError(f"it clips to [-1, 1], and not to a clip_sample_range of {said['clip_sample_range']}.")
    table = {key: said[key] for key in TABLE if said.get(key) is not None}
    if "trained_betas" in table:
        betas = table["trained_betas"] = [float(beta) for beta in table["trained_betas"]]
        if len(betas) != total:
            raise ValueError(f"num_train_timesteps must be the number of trained_betas, {len(betas)}; it is {total}.")
    settings = {key: config.get(key, default) for key, default in LCM_SETTINGS.items()}
    return {
        **settings,  # by their own names, too, for the pipelines of LCM
        "num_train_timesteps": total,
        "prediction": prediction,
        "noise_schedule": table,
        "clip_denoised": clip,
        "in_place_of": settings,
    }


def _said(stock: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler, defaults included; others, which its config keeps of other classes, say nothing."""
    known = settings_of(getattr(diffusers, stock)) if stock else {}
    if not known:  # the class is not told, or lacks a package that it needs
        return dict(config)
    return {key: config.get(key, default) for key, default in known.items()}


def settings_of(cls: type) -> dict[str, Any]:
    """The settings that a scheduler's constructor takes, with their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


class StockLevels:
    """Levels as a stock few-step scheduler chooses them, and the boundary condition that it adds to D.

    That is `LCMScheduler` for networks with a table of times, and `FlowMatchLCMScheduler` for those of flow.

    Args:
        network: how the network is given a sample and told the time.
        settings: of the stock scheduler, apart from the table: of LCM's `LCM_SETTINGS`, of flow's `FLOW_SETTINGS`.

    Raises:
        ValueError: they are no settings of that scheduler.
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
        """The network's highest time."""
        return self.network.time_scale if self.of_flow else len(self.network.angles) - 1  # type: ignore[arg-type]

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """The levels (n,) and the times (n,) of training, falling."""
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
        """The levels (n,) and the network's times (n,) that arguments of `set_timesteps` name, unchecked but for kind.

        Of the first three one is given.
        """
        if not is_real(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength!r}.")
        if self.of_flow and (original_inference_steps is not None or strength != 1):
            raise ValueError("original_inference_steps and strength choose among a table of times; flow has none.")
        if not self.of_flow and mu is not None:
            raise ValueError(f"mu shifts the times of flow, and the network has a table of times; got {mu}.")
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
                raise ValueError(f"`sigmas` of a flow scheduler's place are flow times in (0, 1], got {numbers}.")
            stock.set_timesteps(n, sigmas=numbers, mu=mu)
        elif sigmas is not None:
            levels = np.array(read_numbers("sigmas", sigmas), dtype=float)
            levels = levels[self._start(len(levels), strength) :]
            return levels, self.network.label(levels)
        else:
            stock.set_timesteps(n, original_inference_steps=original_inference_steps, strength=strength)
        return self._at(stock.timesteps.numpy())

    def _start(self, n: int, strength: float) -> int:
        """Where the levels of image-to-image begin, of which the highest are left out."""
        return n - int(n * strength)

    def _at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.network.sigma(times.astype(float)), times

    def boundary(self, time: float) -> tuple[float, float]:
        """c_skip and c_out of LCM, by which f = c_skip x + c_out D is x at time 0 (Luo et al. 2023, arXiv:2310.04378).

        x is in the network's scale. Flow models have D alone.
        """
        if self.of_flow:
            return 0.0, 1.0
        return self.stock.get_scalings_for_boundary_condition_discrete(time)
