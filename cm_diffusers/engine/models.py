"""From settings to a network: a preset, a config file, or a saved model of the library."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    UNet2DModel,
)
from torch import nn

from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.draws import derive_seed
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.data import ImageData
from cm_diffusers.models import build_unet, keep_time_embedding_in_float32
from cm_diffusers.models.unet_presets import check_halvings
from cm_diffusers.objectives import ModelSpec
from cm_diffusers.pipelines import ConsistencyPipeline, DenoisingPipeline
from cm_diffusers.schedulers import MultistepConsistencyScheduler


PIPELINES = {cls.__name__: cls for cls in (ConsistencyModelPipeline, ConsistencyPipeline, DenoisingPipeline)}


def load_pipeline(name_or_path: str, revision: str | None = None, **kwargs) -> ConsistencyPipeline | DenoisingPipeline:
    """A saved model of the library, from a folder or the Hub; models with stock classes get our pipeline.

    Raises:
        ValueError: there is no such model, or it is of a kind that the library can't read.
    """
    if Path(name_or_path).exists() and not (Path(name_or_path) / "model_index.json").is_file():
        raise ValueError(f"{name_or_path!r} is not a model: it holds no model_index.json.")
    try:
        config = DiffusionPipeline.load_config(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name_or_path!r} is neither a folder nor to be had from the Hub: {error}") from None
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise ValueError(f"model {name_or_path!r} is a {kind}; this version reads {', '.join(PIPELINES)}.")
    cls = DenoisingPipeline if kind == "DenoisingPipeline" else ConsistencyPipeline
    try:
        return cls.from_pretrained(name_or_path, revision=revision, use_safetensors=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {name_or_path!r} can't be loaded: {error}") from error


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    network: nn.Module
    spec: ModelSpec
    pretrained: bool


def _spec_of(pipeline: ConsistencyPipeline | DenoisingPipeline, args: ModelArguments, role: str) -> ModelSpec:
    """The parameterisation of a saved model. Raises ValueError where the settings say otherwise."""
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, (EDMEulerScheduler, CMStochasticIterativeScheduler, MultistepConsistencyScheduler))
    holder = pipeline.config if isinstance(pipeline, DenoisingPipeline) else scheduler.config
    levels = {name: scheduler.config[name] for name in ("sigma_data", "sigma_max")}
    spec = ModelSpec(time_label=holder.get("time_label", "log_sigma"), **levels)
    for name in ("time_label", "sigma_data"):
        asked, found = getattr(args, name), getattr(spec, name)
        if asked is not None and asked != found:
            raise ValueError(f"{name} {asked!r} differs from {found!r} of the {role}; leave the option out.")
    return spec


def _check_fit(pipeline: ConsistencyPipeline | DenoisingPipeline, data: ImageData, role: str) -> None:
    """Raise ValueError unless the model makes images like those of the dataset."""
    channels, height, width = pipeline.sample_shape
    if (channels, height, width) != (data.channels, *data.resolution):
        raise ValueError(
            f"the {role} makes images of {channels} x {height} x {width},"
            f" the dataset gives {data.channels} x {data.resolution[0]} x {data.resolution[1]}: set --resolution."
        )
    classes = pipeline.num_classes
    if (classes is None) != (data.num_classes is None):
        kind = "unconditional" if classes is None else f"conditional on {classes} classes"
        raise ValueError(f"the {role} is {kind}; set --class_conditional accordingly.")
    if classes is not None and data.num_classes > classes:
        raise ValueError(f"the dataset has {data.num_classes} classes, the {role} {classes}.")


def _set_dropout(network: nn.Module, dropout: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    network.register_to_config(dropout=dropout)


def load_teacher(name_or_path: str, args: ModelArguments, data: ImageData) -> EDMDenoiser:
    """The denoiser of a diffusion model, frozen.

    Raises:
        ValueError: no such model, not a diffusion model, or one that does not fit the settings or the data.
    """
    pipeline = load_pipeline(name_or_path)
    if not isinstance(pipeline, DenoisingPipeline):
        raise ValueError(f"the teacher must be a diffusion model; {name_or_path!r} is a consistency model.")
    spec = _spec_of(pipeline, args, "teacher")
    _check_fit(pipeline, data, "teacher")
    network = pipeline.unet.float().eval().requires_grad_(False)
    return EDMDenoiser(network, spec.sigma_data, time_label=spec.time_label)


def _from_teacher(teacher: EDMDenoiser, args: ModelArguments) -> Start:
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    _set_dropout(network, args.dropout)
    return Start(network, ModelSpec(teacher.sigma_data, teacher.time_label), pretrained=True)


def _from_pretrained(args: ModelArguments, data: ImageData) -> Start:
    pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision)
    spec = _spec_of(pipeline, args, "pretrained model")
    _check_fit(pipeline, data, "pretrained model")
    _set_dropout(pipeline.unet, args.dropout)
    return Start(pipeline.unet.float(), spec, pretrained=True)


def _from_scratch(args: ModelArguments, data: ImageData, seed: int) -> Start:
    torch.manual_seed(derive_seed(seed, "initial weights"))
    if args.model_config_name_or_path is not None:
        network = _from_config(args, data)
    else:
        network = build_unet(args.model_preset, data.resolution, data.channels, data.num_classes, args.dropout)
    sigma_data = args.sigma_data or data.measure_sigma_data()
    return Start(network, ModelSpec(sigma_data, args.time_label or "log_sigma"), pretrained=False)


def _from_config(args: ModelArguments, data: ImageData) -> UNet2DModel:
    path = Path(args.model_config_name_or_path)
    try:
        config = json.loads(path.read_text()) if path.is_file() else UNet2DModel.load_config(str(path))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"model_config_name_or_path {str(path)!r} can't be read: {error}") from None
    height, width = data.resolution
    check_halvings(data.resolution, len(config.get("block_out_channels", (0,) * 4)), f"the model of {path}")
    shape = {"sample_size": height if height == width else (height, width)}
    shape |= {"in_channels": data.channels, "out_channels": data.channels, "num_class_embeds": data.num_classes}
    return UNet2DModel.from_config(config, **shape, dropout=args.dropout)


def build_start(args: ModelArguments, data: ImageData, seed: int, teacher: EDMDenoiser | None = None) -> Start:
    """The network to train, with its parameterisation: a saved one, else the teacher's, else a new one.

    Raises:
        ValueError: no such model or config, or one that does not fit the data.
    """
    if args.pretrained_model_name_or_path is not None:
        start = _from_pretrained(args, data)
    elif teacher is not None:
        start = _from_teacher(teacher, args)
    else:
        start = _from_scratch(args, data, seed)
    if teacher is not None and teacher.sigma_data != start.spec.sigma_data:
        raise ValueError(f"sigma_data is {start.spec.sigma_data}, that of the teacher {teacher.sigma_data}.")
    keep_time_embedding_in_float32(start.network)
    if args.gradient_checkpointing:
        start.network.enable_gradient_checkpointing()
    return start
