"""Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1) at any noise levels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..core.arrays import append_dims
from ..core.parameterisation import JUMP_PREDICTIONS, read_out_on_process, read_out_scalings
from .levels import KarrasLevels, as_labels
from .network_input import network_input
from .stock import (
    FLOW_SCHEDULERS,
    GRID_SCHEDULER,
    TABLE_SCHEDULERS,
    CheckedConfig,
    StockLevels,
    settings_in_place,
    settings_of,
)


@dataclass
class MultistepConsistencySchedulerOutput(BaseOutput):
    """Output of a step of `MultistepConsistencyScheduler`.

    Args:
        prev_sample (`torch.Tensor`): the sample (B, ...) at the next level, for the next network call.
        pred_original_sample (`torch.Tensor`): the estimate of the clean sample (B, ...) at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MultistepConsistencyScheduler(KarrasLevels, SchedulerMixin, CheckedConfig):
    """Scheduler of consistency models: jump to the clean sample, add noise of the next level, and repeat.

    The last step adds no noise. The unit of time is `sigma`, the standard deviation of the noise on data of scale
    `sigma_data`. The default configuration equals that of diffusers' `CMStochasticIterativeScheduler`, and gives the
    same numbers. Unlike it, this scheduler samples and adds noise at any levels, not only at those of a grid.

    `from_config` also accepts the config of a stock scheduler with a table of betas, or of linear flow. It returns a
    scheduler with `in_place_of`, which replaces the stock one in diffusers' pipelines:

    - Samples are in the network's scale, alpha x0 + std noise. They start from unit noise and are not scaled again.
    - `num_inference_steps` selects the levels of diffusers' `LCMScheduler` or `FlowMatchLCMScheduler`.
    - The samples equal those of that scheduler, except for rounding.

    Args:
        num_train_timesteps: length of the Karras grid from which `num_inference_steps` selects levels; with
            `in_place_of`, the number of training timesteps.
        sigma_min: the floor, at which the model is the identity; 0 for models trained without a floor (ECT). With
            `in_place_of` it must be None, which stands for 0.
        sigma_max: the level of pure noise, where sampling starts. With `in_place_of` it must be None, which stands for
            the highest level of the table, or for infinity.
        sigma_data: root mean square of the training data.
        s_noise: factor of the noise that is added between steps.
        rho: exponent of the Karras grid.
        clip_denoised: clamp the estimate of the clean sample to [-1, 1], for images but not for latents.
        time_label: the network's time input. By default it is the first that the prediction allows:

            - for "edm": "log_sigma" (250 ln sigma), "quarter_log_sigma" (ln(sigma) / 4) or "angle"
              (atan(sigma / sigma_data));
            - for "flow": "flow_time" (sigma / (1 + sigma));
            - for "epsilon", "v_prediction" and "sample": "timestep" (times between the integers of the noise schedule,
              by the angle atan(sigma)).
        renoise: the std of added noise: sqrt(sigma^2 - sigma_min^2) for "floor", sigma for "full". Both are equal at
            sigma_min 0.
        prediction: what the network predicts. All but "edm" are for students that keep the process of a diffusion
            model:

            - "edm": F under EDM's scalings with the floor;
            - "flow": noise - x0, from (1 - t) x0 + t noise;
            - "epsilon": the noise, from alpha x0 + std noise with alpha^2 + std^2 = 1;
            - "v_prediction": alpha noise - std x0, from the same input;
            - "sample": x0, from the same input.
        time_scale: factor of the time label "flow_time" (1000 for diffusers' flow models).
        noise_schedule: for the time label "timestep", the settings of diffusers' `DDPMScheduler` that define the table
            of alpha^2, such as {"beta_schedule": "linear"}.
        default_sigmas: noise levels for given numbers of steps, instead of those of the grid. The keys are numbers of
            steps as text: {"2": [80.0, 0.8]}. `training/evaluate.py --search_sigmas` finds such levels.
        in_place_of: settings with which the replaced stock scheduler chooses its levels, as `from_config` writes them:
            settings of `FlowMatchLCMScheduler` for "flow", and of `LCMScheduler` for a noise_schedule.

    Raises:
        ValueError: a setting is unknown or outside its range, or does not fit another setting.

    Examples:
        >>> import torch
        >>> from diffusers import LCMScheduler
        >>> from cm_diffusers import MultistepConsistencyScheduler
        >>> from cm_diffusers.models import build_unet
        >>> unet, scheduler = build_unet("tiny", (8, 8), 1), MultistepConsistencyScheduler()
        >>> scheduler.set_timesteps(sigmas=[80, 0.8])
        >>> sample = scheduler.init_noise_sigma * torch.randn(4, 1, 8, 8)
        >>> with torch.no_grad():
        ...     for t in scheduler.timesteps:
        ...         output = unet(scheduler.scale_model_input(sample, t), t).sample
        ...         sample = scheduler.step(output, t, sample).prev_sample
        >>> sample.shape
        torch.Size([4, 1, 8, 8])
        >>> in_place = MultistepConsistencyScheduler.from_config(LCMScheduler().config)  # for LCM's own pipelines
        >>> in_place.config.prediction
        'epsilon'
    """

    order = 1
    _compatibles = [*TABLE_SCHEDULERS, *FLOW_SCHEDULERS, GRID_SCHEDULER]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float | None = 0.002,
        sigma_max: float | None = 80.0,
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
        in_place_of: dict[str, Any] | None = None,
    ) -> None:
        self._check_settings(unset=() if in_place_of is None else ("sigma_min", "sigma_max", "default_sigmas"))
        self.input = network_input(
            prediction,
            time_label=time_label,
            sigma_data=sigma_data,
            time_scale=time_scale,
            noise_schedule=noise_schedule,
            predictions=(*JUMP_PREDICTIONS, "sample"),
        )
        self.register_to_config(time_label=self.input.time_label)
        if renoise not in ("floor", "full"):
            raise ValueError(f"renoise must be 'floor' or 'full', got {renoise!r}.")
        self.num_inference_steps: int | None = None
        self._stock: StockLevels | None = None
        if in_place_of is not None:
            self._take_place(in_place_of)
            return
        if not self.config.sigma_min < self.config.sigma_max:
            raise ValueError(f"sigma_min must lie in [0, sigma_max), got {sigma_min} and {sigma_max}.")
        self._check_default_sigmas()
        self._set_sigmas(self._karras(np.linspace(0, 1, num_train_timesteps)), None)

    @classmethod
    def _in_place(cls, stock: str | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if stock == GRID_SCHEDULER else settings_in_place(stock, config)

    def _take_place(self, settings: dict[str, Any]) -> None:
        """Let a stock scheduler with `settings` choose the levels, to step in its place."""
        if self.config.prediction == "edm":
            raise ValueError("in_place_of needs the prediction 'flow', or one with a noise_schedule; got 'edm'.")
        self._stock = StockLevels(self.input, settings)
        levels, labels = self._stock.all()
        self._top = float(levels[0])
        if self.config.prediction == "epsilon" and self._top == math.inf:
            raise ValueError(
                "prediction must not be 'epsilon' on a table that ends with pure noise (rescale_betas_zero_snr): an"
                " estimate of that noise does not determine x0. Use another prediction or table."
            )
        self._set_sigmas(levels, None, labels)

    @property
    def compatibles(self) -> list[type]:
        """The diffusers classes whose `from_config` accepts the config of this scheduler.

        With `in_place_of` they are those with a table of betas, or those of flow. Otherwise it is
        `CMStochasticIterativeScheduler`, if the time label is "log_sigma" and `renoise` is "floor", as there.
        """
        names: Sequence[str] = ()
        if self._stock is not None:
            names = FLOW_SCHEDULERS if self._stock.of_flow else TABLE_SCHEDULERS
        elif (self.config.time_label, self.config.renoise) == ("log_sigma", "floor"):
            names = (GRID_SCHEDULER,)
        kinds = [kind for kind in self._get_compatibles() if kind.__name__ in names]
        if (self.config.noise_schedule or {}).get("rescale_betas_zero_snr"):  # other classes would make another table
            kinds = [kind for kind in kinds if "rescale_betas_zero_snr" in settings_of(kind)]
        return kinds

    @property
    def init_noise_sigma(self) -> float:
        """The factor of unit noise at the first step; 1 with `in_place_of`."""
        return super().init_noise_sigma if self._stock is None else 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        mu: float | None = None,
    ) -> None:
        """Set the noise levels, by exactly one of `num_inference_steps`, `timesteps` and `sigmas`.

        Args:
            num_inference_steps: number of levels, 1 to `num_train_timesteps`. They come from `default_sigmas`, or else
                are evenly spaced on the Karras grid from sigma_max. With `in_place_of`, the stock scheduler chooses
                them.
            device: the device of `timesteps`.
            timesteps: strictly decreasing time labels as in `.timesteps`. Grid indices are refused, but the times of a
                noise_schedule can be integers.
            sigmas: strictly decreasing noise levels in (sigma_min, sigma_max]. Sampling starts at the first. In the
                place of a flow scheduler they are flow times in (0, 1] before the shift, as in its pipelines.
            original_inference_steps: in the place of a scheduler with a table of betas, the number of evenly spaced
                times from which `num_inference_steps` selects.
            strength: there, the share of levels in (0, 1] that is kept, as LCM pipelines pass it.
            mu: in the place of a flow scheduler with use_dynamic_shifting, its shift.

        Raises:
            ValueError: not exactly one is given, levels do not decrease strictly or are outside
                (sigma_min, sigma_max], or an argument has no effect on this scheduler.
        """
        if self._stock is None:
            if (original_inference_steps, strength, mu) != (None, 1.0, None):
                raise ValueError(
                    "original_inference_steps, strength and mu need a scheduler with in_place_of, as from_config of a"
                    " stock scheduler makes it."
                )
            levels, labels = self._chosen_levels(num_inference_steps, timesteps, sigmas), None
        else:
            self._check_one(num_inference_steps, timesteps, sigmas)
            levels, labels = self._stock.chosen(
                num_inference_steps,
                timesteps,
                sigmas,
                original_inference_steps=original_inference_steps,
                strength=strength,
                mu=mu,
            )
            self._check_levels("sigmas" if timesteps is None else "timesteps", levels)
        self.num_inference_steps = len(levels)
        self._set_sigmas(levels, device, labels)

    @property
    def _range(self) -> tuple[float, float]:
        return super()._range if self._stock is None else (0.0, self._top)

    def _set_sigmas(
        self, levels: np.ndarray, device: str | torch.device | None, labels: np.ndarray | None = None
    ) -> None:
        """Store levels and floor in float64 on the CPU; labels go to `device`, in float32 if it lacks float64."""
        self._step_index = self._begin_index = None
        choice = (levels.tobytes(), None if labels is None else labels.tobytes(), device)
        if self._is_chosen(*choice):
            return
        self.sigmas = torch.from_numpy(np.append(levels, self.config.sigma_min or 0.0))
        self._labels = self.sigma_to_timestep(levels) if labels is None else labels  # an array: no wait for a device
        self.timesteps = as_labels(self._labels, device)
        self._keep(*choice)

    def _columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return for each step the norm of the network's input, the factors of sample and output, and the noise's std.

        With `in_place_of` they are the factors of data and noise on the network's process, c_skip and c_out.
        """
        if self._stock is not None:
            boundaries = [self._stock.boundary(float(label)) for label in self._labels]
            return *self._shares(self.sigmas[:-1]), *torch.tensor(boundaries, dtype=torch.float64).unbind(1)
        sigma, config = self.sigmas[:-1].to(dtype), self.config
        scalings = read_out_scalings(config.prediction, sigma, config.sigma_data, config.sigma_min)
        floor = config.sigma_min if config.renoise == "floor" else 0.0
        return self.input.norm(sigma), *scalings, (sigma**2 - floor**2) ** 0.5

    def _shares(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of data and noise in the network's scale at `sigma`, float64, inf for pure noise."""
        alpha = 1 / self.input.norm(sigma)
        return alpha, torch.where(sigma.isinf(), 1.0, sigma * alpha)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """Scale `sample` (B, ...) to the network's input at `timestep`: for "edm", / sqrt(sigma^2 + sigma_data^2).

        With `in_place_of` it is returned unchanged.
        """
        index = self._index_now(timestep)
        if self._stock is not None:
            return sample
        return sample / self._factors(index, torch.promote_types(sample.dtype, torch.float32))[0]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> MultistepConsistencySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Make one step: return the sample at the next level, and the estimate of the clean sample.

        Args:
            model_output: the network's output (B, ...) for `scale_model_input(sample, timestep)`.
            timestep: one of `.timesteps`.
            sample: the current sample (B, ...).
            generator: the source of the noise, or a list with one per sample.
            return_dict: return an output object rather than a tuple.
            variance_noise: unit normal noise (B, ...) to add, instead of noise from `generator`.
        """
        index = self._index_now(timestep)
        # float32 arithmetic for half-precision samples
        dtype = torch.promote_types(sample.dtype, torch.float32)
        denoised = self._denoised(model_output.to(dtype), sample.to(dtype), index)
        prev_sample = denoised
        if index + 1 < len(self._labels):
            noise = variance_noise
            if noise is None:
                noise = self._drawn(denoised, model_output, generator)
            prev_sample = self._renoised(denoised, noise, index + 1)
        self._step_index = index + 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return MultistepConsistencySchedulerOutput(prev_sample, denoised)

    def _denoised(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """Return the estimate of the clean sample, clamped if `clip_denoised` is set."""
        clip = self.config.clip_denoised
        if self._stock is None:
            _, keep, gain, _ = self._factors(index, sample.dtype)
            denoised = keep * sample + gain * output
            return denoised.clamp(-1, 1) if clip else denoised
        alpha, std, c_skip, c_out = self._factors(index, sample.dtype)
        denoised = read_out_on_process(self.config.prediction, output, sample, alpha, std)
        return c_out * (denoised.clamp(-1, 1) if clip else denoised) + c_skip * sample

    def _drawn(
        self,
        denoised: torch.Tensor,
        model_output: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Draw unit normal noise in the dtype in which the stock schedulers draw it."""
        dtype = denoised.dtype if self._stock is not None and self._stock.of_flow else model_output.dtype
        return randn_tensor(denoised.shape, generator=generator, device=denoised.device, dtype=dtype)

    def _renoised(self, denoised: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Add noise of the level at `index` to the clean sample `denoised`."""
        if self._stock is None:
            return denoised + noise * self.config.s_noise * self._factors(index, denoised.dtype)[3]  # algorithm 1
        alpha, std, _, _ = self._factors(index, denoised.dtype)
        return alpha * denoised + std * self.config.s_noise * noise

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        *,
        sigmas: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add noise to clean samples at any level for each sample.

        The result is original_samples + sigma noise or, with `in_place_of`, alpha original_samples + std noise.

        Args:
            original_samples: clean samples (B, ...).
            noise: unit normal noise of the same shape.
            timesteps: time labels, one for all samples or one per sample (B,). They are floats, or the integer times
                of a noise_schedule.
            sigmas: noise levels, one for all samples or one per sample (B,), instead of `timesteps`.

        Raises:
            ValueError: not exactly one of `timesteps` and `sigmas` is given, or time labels are invalid.
        """
        if self._stock is None:
            return super().add_noise(original_samples, noise, timesteps, sigmas=sigmas)
        levels = append_dims(self._noise_levels(timesteps, sigmas), original_samples)
        alpha, std = (factor.to(original_samples.device, original_samples.dtype) for factor in self._shares(levels))
        return alpha * original_samples + std * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Call `add_noise` by the name and with the argument order of flow schedulers.

        `sample` (B, ...) is clean, `noise` has its shape, and `timestep` is for all samples or per sample (B,).
        """
        return self.add_noise(sample, noise, timestep)
