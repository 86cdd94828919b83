"""Diffusion models of diffusers, read as denoisers: network, process and prediction by the pipeline's own configs."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, DiTTransformer2DModel, UNet2DModel, VQModel
from torch import nn

from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.models import DiTModel
from cm_diffusers.objectives import ModelSpec
from cm_diffusers.pipelines.class_names import null_class


NETWORKS = {"DDPMPipeline": "unet", "DDIMPipeline": "unet", "LDMPipeline": "unet", "DiTPipeline": "transformer"}
AUTOENCODERS = (AutoencoderKL, AutoencoderTiny, VQModel)
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
# samplers of networks that jump to clean data, or over a part of the way, and give no posterior mean
FEW_STEPS = (
    "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler", "SCMScheduler",
    "ConsistencyDecoderScheduler", "FlowMapEulerDiscreteScheduler", "PiflowScheduler", "HeliosDMDScheduler",
    "MultistepConsistencyScheduler",
)  # fmt: skip
# EDM's: data of scale 0.5 are 1 part in 160 there, and higher levels would only stretch the grids
HIGHEST_SIGMA = 80.0


@dataclass(frozen=True)
class SavedModel:
    """A saved model as training takes it.

    Args:
        network: called as `core.conditions.call_network` does.
        spec: its parameterisation; `sigma_data` is None where the model does not say.
        vae: the autoencoder in whose latents it lives, None for pixels.
        null_class: the label that stands for no class, for guidance; None where there is none.
    """

    network: nn.Module
    spec: ModelSpec
    vae: nn.Module | None = None
    null_class: int | None = None

    @property
    def denoiser(self) -> Denoiser:
        return self.spec.denoiser(self.network)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network makes."""
        size = self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def num_classes(self) -> int | None:
        return self.network.config.num_class_embeds

    def __str__(self) -> str:
        """One line: the network, what it predicts on which process, and what it makes."""
        network = getattr(self.network, "transformer", self.network)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        classes = "unconditional" if self.num_classes is None else f"{self.num_classes} classes"
        if self.null_class is not None:
            classes += " and none"
        shape = " x ".join(map(str, self.sample_shape))
        kind = "pixels" if self.vae is None else f"latents of {type(self.vae).__name__}"
        return f"{type(network).__name__}, {count:.1f} M parameters, {_process(self.spec)}, {classes}, {shape} {kind}"


def _process(spec: ModelSpec) -> str:
    """What a network predicts and where, in words."""
    if spec.prediction == "edm":
        return f"predicts EDM's F, time label {spec.time_label}, sigma_data {spec.sigma_data:g}"
    if spec.prediction == "trigflow":
        return f"predicts the velocity of TrigFlow, sigma_data {spec.sigma_data:g}"
    if spec.prediction == "flow":
        times = "the flow time" if spec.time_scale == 1 else f"{spec.time_scale:g} times the flow time"
        return f"predicts the velocity of linear flow, is told {times}"
    schedule, process = spec.noise_schedule, spec.process
    name = "trained" if schedule.get("trained_betas") is not None else schedule["beta_schedule"]
    name += " zero-SNR" if schedule.get("rescale_betas_zero_snr") else ""
    low, high = process.sigma(torch.zeros(1)).item(), process.sigma_max
    high = "infinity" if math.isinf(high) else f"{high:.3g}"
    steps = len(process.angles)
    return f"predicts {spec.prediction} on a {name} VP schedule of {steps} steps, sigma {low:.2g} to {high}"


def nulls_of(null_class: int | None) -> dict[str, torch.Tensor]:
    """What stands for none in a condition, see `core.conditions.Condition`."""
    return {} if null_class is None else {"class_labels": torch.tensor(null_class)}


def is_few_step(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers, or a class made from one, samples a consistency model or its kin."""
    return any(cls.__name__ in FEW_STEPS for cls in type(scheduler).__mro__)


def read_stock(pipeline: DiffusionPipeline) -> SavedModel:
    """A pipeline of one of the classes in `NETWORKS` as a denoiser.

    Raises:
        ValueError: it has a part, a setting or a prediction that this version can't read; the message says which are.
    """
    network = getattr(pipeline, NETWORKS[type(pipeline).__name__])
    vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
    if vae is not None and not isinstance(vae, AUTOENCODERS):
        raise ValueError(f"its autoencoder is a {type(vae).__name__}; this version reads {_names(AUTOENCODERS)}.")
    if not isinstance(network, (UNet2DModel, DiTTransformer2DModel)):
        raise ValueError(f"its network is a {type(network).__name__}; this version reads UNet2DModel and DiT's.")
    spec = read_scheduler(pipeline.scheduler)
    network = without_variance(network)
    if isinstance(network, DiTTransformer2DModel):
        network = DiTModel.from_transformer(network)
    elif network.config.time_embedding_type != "positional" or network.config.class_embed_type is not None:
        raise ValueError(
            "its UNet2DModel must have the time_embedding_type 'positional', which reads times between integers, and"
            " class_embed_type None."
        )
    if pipeline.scheduler.config.get("prediction_type") == "v_prediction" and spec.prediction == "edm":
        negate(network)  # EDM's F is diffusers' "v_prediction" of its EDM schedulers with the sign turned
    return SavedModel(network, spec, vae, null_class(network))


def read_scheduler(scheduler: Any) -> ModelSpec:
    """What a scheduler of diffusers says of a network's prediction, process and time input.

    The sampler's own settings (spacing, steps_offset, set_alpha_to_one, clipping, shift, Karras levels) choose levels
    and steps, and say nothing of the network.

    Raises:
        ValueError: a setting that can't be read; the message says what can. Or the scheduler's own noise levels differ
            from those that were read; the message has both.
    """
    spec = _read_settings(scheduler)
    if spec.prediction != "edm":
        _check_levels(scheduler, spec)
    return spec


def _read_settings(scheduler: Any) -> ModelSpec:
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type")
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type of its {name} must be epsilon or v_prediction; it is {prediction!r}.")
        return ModelSpec(config.sigma_data, "quarter_log_sigma", config.sigma_max)
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        if config.get("invert_sigmas"):
            raise ValueError(f"its {name} counts flow time from noise to data (invert_sigmas), which can't be read.")
        return ModelSpec(
            None, "flow_time", HIGHEST_SIGMA, prediction="flow", time_scale=float(config.num_train_timesteps)
        )
    if "beta_schedule" not in config:
        raise ValueError(
            f"its scheduler is a {name}; this version reads those with a beta_schedule (DDPM, DDIM, Euler, Heun,"
            " DPMSolver, ...), EDMEuler, EDMDPMSolverMultistep, and FlowMatchEuler and its kin."
        )
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction_type of its {name} must be one of {', '.join(PREDICTIONS)} or flow_prediction;"
            f" it is {prediction!r}."
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type of its {name} must be 'discrete'; it is {config.timestep_type!r}.")
    schedule = {key: config[key] for key in SCHEDULE if key in config}
    if schedule.get("trained_betas") is not None:
        schedule["trained_betas"] = [float(beta) for beta in schedule["trained_betas"]]
    elif schedule["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"beta_schedule of its {name} must be one of {', '.join(BETA_SCHEDULES)}, or trained_betas given;"
            f" it is {schedule['beta_schedule']!r}."
        )
    spec = ModelSpec(None, "timestep", prediction=prediction, noise_schedule=schedule)
    return replace(spec, sigma_max=min(HIGHEST_SIGMA, spec.process.sigma_max))


def _check_levels(scheduler: Any, spec: ModelSpec) -> None:
    """Raise ValueError unless the scheduler has the noise levels that `spec` has at the times it tells the network.

    Those of its training table have to agree to a thousandth, as angles; those that it samples at may also lie where a
    time within 1 of theirs is, as some samplers round times.
    """
    tables, sampler = [], copy.deepcopy(scheduler)
    if spec.noise_schedule is not None:
        abar = scheduler.alphas_cumprod.double()
        tables.append((torch.arange(len(abar)), ((1 - abar) / abar).sqrt(), 0))
    name, shifting = type(scheduler).__name__, scheduler.config.get("use_dynamic_shifting")
    if hasattr(sampler, "sigmas"):
        try:
            sampler.set_timesteps(10, **({"mu": 1.0} if shifting else {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its {name} gives no noise levels for ten steps: {error!r}.") from None
        # the first alone, where there is a table: some samplers put levels of their own between the others
        count = 1 if tables else min(len(sampler.timesteps), len(sampler.sigmas))
        tables.append((sampler.timesteps[:count], sampler.sigmas[:count], 1))
    for times, theirs, slack in tables:
        times, theirs = (torch.as_tensor(values).double() for values in (times, theirs))
        low, ours, high = (_level(spec, times + shift) for shift in (-slack, 0, slack))
        wrong = (theirs.atan() < 0.999 * low.atan()) | (theirs.atan() > 1.001 * high.atan())
        if wrong.any():
            time, level, read = (values[wrong][0].item() for values in (times, theirs, ours))
            raise ValueError(
                f"its {name} has the noise level {level:.4g} at time {time:g}, where what can be"
                f" read of its settings gives {read:.4g}. Give it the scheduler that the network was trained with, a"
                " DDPMScheduler or a FlowMatchEulerDiscreteScheduler with these levels."
            )


def _level(spec: ModelSpec, times: torch.Tensor) -> torch.Tensor:
    """The level that a scheduler writes for the time of a network: the flow time, or sigma."""
    return times / spec.time_scale if spec.prediction == "flow" else spec.process.sigma(times)


@torch.no_grad()
def without_variance(network: nn.Module) -> nn.Module:
    """A network without its learned variance: of twice as many channels as it is given the first half is kept.

    Raises:
        ValueError: any other number of channels.
    """
    channels, out = network.config.in_channels, network.config.out_channels or network.config.in_channels
    if out == channels:
        return network
    if out != 2 * channels:
        raise ValueError(f"its network gives {out} channels for {channels}; as many or twice as many can be read.")
    patch = network.config.patch_size**2 if isinstance(network, DiTTransformer2DModel) else 1
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    smaller = type(network).from_config({**config, "out_channels": channels})
    state = network.state_dict()
    for key, value in smaller.state_dict().items():
        if value.shape != state[key].shape:  # the last layer: the channel varies fastest, after the place in the patch
            state[key] = state[key].unflatten(0, (patch, out))[:, :channels].flatten(0, 1)
    smaller.load_state_dict(state)
    return smaller


@torch.no_grad()
def negate(network: nn.Module) -> None:
    """Turn the sign of what the network puts out."""
    last = network.transformer.proj_out_2 if isinstance(network, DiTModel) else network.conv_out
    for parameter in last.parameters():
        parameter.neg_()


def _names(classes: tuple[type, ...]) -> str:
    return ", ".join(cls.__name__ for cls in classes)
