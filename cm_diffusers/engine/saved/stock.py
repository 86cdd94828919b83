"""Stock diffusers models, read as denoisers. Network, process and prediction come from the pipeline's configs."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
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
KNOWN_TO_ALL = ("linear", "scaled_linear", "squaredcos_cap_v2")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
# samplers of few-step networks, which jump to clean data or along the ODE and predict no posterior mean
FEW_STEPS = (
    "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler", "SCMScheduler",
    "ConsistencyDecoderScheduler", "FlowMapEulerDiscreteScheduler", "PiflowScheduler", "HeliosDMDScheduler",
    "MultistepConsistencyScheduler",
)  # fmt: skip
# EDM's sigma_max: data of scale 0.5 are 1/160 of the noise, so higher levels only stretch grids
HIGHEST_SIGMA = 80.0


@dataclass(frozen=True)
class SavedModel:
    """A saved model in the form that training uses.

    Args:
        network: a network with the signature that `core.conditions.call_network` expects.
        spec: the parameterisation; `sigma_data` is None if the model does not record it.
        vae: the autoencoder of its latents; None for pixels.
        null_class: label of the null class, for guidance; None without one.
    """

    network: nn.Module
    spec: ModelSpec
    vae: nn.Module | None = None
    null_class: int | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The model as D(x, sigma)."""
        return self.spec.denoiser(self.network)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's samples: images or latents."""
        size = self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def num_classes(self) -> int | None:
        """Number of classes without the null class; None for an unconditional model."""
        return self.network.config.num_class_embeds

    def __str__(self) -> str:
        """Describe the model in a line: network, prediction, process, classes, and shape of samples."""
        network = getattr(self.network, "transformer", self.network)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        classes = "unconditional" if self.num_classes is None else f"{self.num_classes} classes"
        if self.null_class is not None:
            classes += " and a null class"
        shape = " x ".join(map(str, self.sample_shape))
        kind = "pixels" if self.vae is None else f"latents of {type(self.vae).__name__}"
        process = process_in_words(self.spec)
        return f"{type(network).__name__}, {count:.1f} M parameters, {process}, {classes}, {shape} {kind}"


def process_in_words(spec: ModelSpec) -> str:
    """The prediction and the process of a network, in words."""
    if spec.prediction == "edm":
        return f"predicts EDM's F, time label {spec.time_label}, sigma_data {spec.sigma_data:g}"
    if spec.prediction == "trigflow":
        return f"predicts the velocity of TrigFlow, sigma_data {spec.sigma_data:g}"
    if spec.prediction == "flow":
        times = "the flow time" if spec.time_scale == 1 else f"{spec.time_scale:g} times the flow time"
        return f"predicts the velocity of linear flow, time input {times}"
    schedule, process = spec.noise_schedule, spec.process
    name = "trained" if schedule.get("trained_betas") is not None else schedule["beta_schedule"]
    name += " zero-SNR" if schedule.get("rescale_betas_zero_snr") else ""
    low, high = process.sigma(torch.zeros(1)).item(), process.sigma_max
    high = "infinity" if math.isinf(high) else f"{high:.3g}"
    steps = len(process.angles)
    return f"predicts {spec.prediction} on a {name} VP schedule of {steps} steps, sigma {low:.2g} to {high}"


def nulls_of(null_class: int | None, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Return the null conditioning on `device`: the label `null_class` as int64 (), or nothing for None."""
    return {} if null_class is None else {"class_labels": torch.full((), null_class, device=device)}


def is_few_step(scheduler: Any) -> bool:
    """Return whether a diffusers scheduler, or a subclass of one, samples a consistency or other few-step model."""
    return any(cls.__name__ in FEW_STEPS for cls in type(scheduler).__mro__)


def read_stock(pipeline: DiffusionPipeline) -> SavedModel:
    """Read a stock pipeline of a class in `NETWORKS` as a denoiser.

    Raises:
        ValueError: a component, setting or prediction is not supported; the message lists the supported ones.
    """
    network = getattr(pipeline, NETWORKS[type(pipeline).__name__])
    vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
    if vae is not None and not isinstance(vae, AUTOENCODERS):
        raise ValueError(f"its autoencoder is a {type(vae).__name__}; this version reads {_names(AUTOENCODERS)}.")
    if not isinstance(network, (UNet2DModel, DiTTransformer2DModel)):
        raise ValueError(
            f"its network is a {type(network).__name__}; this version reads UNet2DModel and DiTTransformer2DModel."
        )
    spec = read_scheduler(pipeline.scheduler)
    network = without_variance(network)
    if isinstance(network, DiTTransformer2DModel):
        network = DiTModel.from_transformer(network)
    elif network.config.time_embedding_type != "positional" or network.config.class_embed_type is not None:
        raise ValueError(
            "its UNet2DModel must have time_embedding_type 'positional', which accepts times between integers, and"
            f" class_embed_type None; it has {network.config.time_embedding_type!r} and"
            f" {network.config.class_embed_type!r}."
        )
    if pipeline.scheduler.config.get("prediction_type") == "v_prediction" and spec.prediction == "edm":
        negate(network)  # "v_prediction" of diffusers' EDM schedulers is EDM's F with the opposite sign
    return SavedModel(network, spec, vae, null_class(network))


def read_scheduler(scheduler: Any) -> ModelSpec:
    """Read the prediction, process and time input of a network from its diffusers scheduler.

    Settings of the sampler (spacing, steps_offset, set_alpha_to_one, clipping, shift, Karras levels) are ignored. They
    choose noise levels and steps, and do not describe the network.

    Raises:
        ValueError: a setting is not supported (the message lists the supported values), or the scheduler's own noise
            levels differ from the read ones (the message has both).
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
            raise ValueError(
                f"its {name} counts flow time from noise to data (invert_sigmas), but this version reads flow times"
                " from data to noise."
            )
        return ModelSpec(
            None, "flow_time", HIGHEST_SIGMA, prediction="flow", time_scale=float(config.num_train_timesteps)
        )
    if "beta_schedule" not in config:
        raise ValueError(
            f"its scheduler is a {name}; this version reads those with a beta_schedule (DDPM, DDIM, Euler, Heun,"
            " DPMSolver, ...), EDMEuler, EDMDPMSolverMultistep, and the FlowMatch schedulers."
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


def known_schedule(schedule: dict[str, Any]) -> dict[str, Any]:
    """A noise schedule in words that every scheduler of diffusers knows: rare names become the betas themselves.

    Args:
        schedule: a `ModelSpec.noise_schedule`.
    """
    if schedule.get("trained_betas") is not None or schedule["beta_schedule"] in KNOWN_TO_ALL:
        return schedule
    betas = DDPMScheduler(**schedule).betas
    return {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}


def _check_levels(scheduler: Any, spec: ModelSpec) -> None:
    """Raise ValueError if the scheduler's noise levels differ from those of `spec` at the same network times.

    The levels of its training table must agree as angles to 0.1 %. Its sampling levels can also match a time within 1
    of theirs, because some samplers round times.
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
            raise ValueError(
                f"its {name} gives no noise levels for ten steps ({error!r}). Save the model with the scheduler of the"
                " network's training, such as a DDPMScheduler."
            ) from None
        # with a table only the first level, because some samplers insert other levels
        count = 1 if tables else min(len(sampler.timesteps), len(sampler.sigmas))
        tables.append((sampler.timesteps[:count], sampler.sigmas[:count], 1))
    for times, theirs, slack in tables:
        times, theirs = (torch.as_tensor(values).double() for values in (times, theirs))
        low, ours, high = (_level(spec, times + shift) for shift in (-slack, 0, slack))
        wrong = (theirs.atan() < 0.999 * low.atan()) | (theirs.atan() > 1.001 * high.atan())
        if wrong.any():
            time, level, read = (values[wrong][0].item() for values in (times, theirs, ours))
            raise ValueError(
                f"its {name} has the noise level {level:.4g} at time {time:g}, but its settings, as this version reads"
                f" them, give {read:.4g}. Save the model with a DDPMScheduler or FlowMatchEulerDiscreteScheduler that"
                " has the noise levels of the network's training."
            )


def _level(spec: ModelSpec, times: torch.Tensor) -> torch.Tensor:
    """The noise level of a scheduler at network times (n,): the flow time in [0, 1] for flow models, else sigma."""
    return times / spec.time_scale if spec.prediction == "flow" else spec.process.sigma(times)


@torch.no_grad()
def without_variance(network: nn.Module) -> nn.Module:
    """Return a copy of a network without its learned variance, or the network itself if it predicts none.

    A network that predicts a variance outputs twice as many channels as it reads. The first half is kept.

    Raises:
        ValueError: the number of output channels is neither the input's nor twice that.
    """
    channels, out = network.config.in_channels, network.config.out_channels or network.config.in_channels
    if out == channels:
        return network
    if out != 2 * channels:
        raise ValueError(
            f"its network has {out} output channels for {channels} input channels; this version reads as many, or"
            " twice as many."
        )
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
    """Flip the sign of the network's output in place, by its last layer."""
    last = network.transformer.proj_out_2 if isinstance(network, DiTModel) else network.conv_out
    for parameter in last.parameters():
        parameter.neg_()


def _names(classes: tuple[type, ...]) -> str:
    return ", ".join(cls.__name__ for cls in classes)
