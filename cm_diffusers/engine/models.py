"""From settings to a network: a preset, a config file, or a saved model of the library."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from cm_diffusers.core.denoisers import DENOISERS, Denoiser, EDMDenoiser, TrajectoryDenoiser
from cm_diffusers.core.draws import derive_seed
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.data import ImageData
from cm_diffusers.models import JVPUNet2DModel, build_unet, keep_time_embedding_in_float32
from cm_diffusers.models.unet_presets import check_halvings
from cm_diffusers.objectives import ModelSpec, Objective
from cm_diffusers.objectives.mean_flow import jump_to_zero
from cm_diffusers.pipelines import CTMPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import load_pipeline


TWO_TIMES = (MeanFlowPipeline, CTMPipeline)


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    network: nn.Module
    spec: ModelSpec
    pretrained: bool


def _is_diffusion(pipeline: ImagePipeline) -> bool:
    return isinstance(pipeline, DenoisingPipeline) or (
        isinstance(pipeline, TrigFlowPipeline) and pipeline.scheduler.config.solver != "consistency"
    )


def _spec_of(pipeline: ImagePipeline, args: ModelArguments, role: str) -> ModelSpec:
    """The parameterisation of a saved model. Raises ValueError where the settings say otherwise."""
    config, label = pipeline.scheduler.config, None
    if isinstance(pipeline, TrigFlowPipeline):
        prediction = "trigflow"
    elif isinstance(pipeline, MeanFlowPipeline):
        prediction = "flow"
    else:
        holder = pipeline.config if isinstance(pipeline, DenoisingPipeline) else config
        prediction, label = holder.get("prediction", "edm"), holder.get("time_label", "log_sigma")
    if prediction != "edm":
        label = DENOISERS[prediction].time_label
    sigma_data = config.get("sigma_data", 1.0)
    spec = ModelSpec(sigma_data, label, config.get("sigma_max", 80.0), prediction)
    for name in ("time_label", "sigma_data"):
        asked, found = getattr(args, name), getattr(spec, name)
        if asked is not None and asked != found:
            raise ValueError(f"{name} {asked!r} differs from {found!r} of the {role}; leave the option out.")
    return spec


def _check_fit(pipeline: ImagePipeline, data: ImageData, role: str) -> None:
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


def denoiser_of(pipeline: ImagePipeline) -> Denoiser:
    """D(x, sigma) of a saved model: the denoised image of a diffusion model, the jump to clean data of others."""
    spec = _spec_of(pipeline, ModelArguments(), "model")
    if isinstance(pipeline, MeanFlowPipeline):
        return jump_to_zero(pipeline.unet)
    if isinstance(pipeline, CTMPipeline):
        return TrajectoryDenoiser(pipeline.unet, spec.sigma_data, pipeline.scheduler.config.sigma_min, spec.time_label)
    if spec.prediction == "edm":
        floor = 0.0 if _is_diffusion(pipeline) else pipeline.scheduler.config.sigma_min
        return EDMDenoiser(pipeline.unet, spec.sigma_data, floor, spec.time_label)
    return DENOISERS[spec.prediction](pipeline.unet, spec.sigma_data)


def load_teacher(name_or_path: str, args: ModelArguments, data: ImageData) -> Denoiser:
    """The denoiser of a diffusion model, frozen.

    Raises:
        ValueError: no such model, not a diffusion model, or one that does not fit the settings or the data.
    """
    pipeline = load_pipeline(name_or_path, args.teacher_revision)
    if not _is_diffusion(pipeline):
        raise ValueError(f"the teacher must be a diffusion model; {name_or_path!r} is a consistency model.")
    _spec_of(pipeline, replace(args, time_label=None), "teacher")
    _check_fit(pipeline, data, "teacher")
    pipeline.unet.float().eval().requires_grad_(False)
    return denoiser_of(pipeline)


def converted(start: Start, prediction: str) -> Start:
    """A saved network as one that predicts something else, where that is the same network but for a sign.

    EDM's F is TrigFlow's with the sign turned (both take x / sqrt(sigma^2 + sigma_data^2)), if its time input is the
    angle as well.

    Raises:
        ValueError: there is no such conversion; the message says what can be done.
    """
    network, spec = start.network, start.spec
    if spec.prediction == prediction:
        return start
    if {spec.prediction, prediction} == {"edm", "trigflow"} and spec.time_label == "angle":
        with torch.no_grad():
            for parameter in network.conv_out.parameters():
                parameter.neg_()
        return replace(start, spec=replace(spec, prediction=prediction))
    if spec.prediction == "edm" and prediction == "trigflow":
        raise ValueError(
            "the saved network's time input is 250 ln(sigma), which swings too hard for tangents: its derivative by"
            " the angle is 250 / (sin t cos t). Start from a network with another time input"
            " (train_diffusion.py --interpolant trigflow, or --time_label angle) by --pretrained_model_name_or_path;"
            " the teacher may stay as it is."
        )
    raise ValueError(
        f"a saved network that predicts {spec.prediction!r} can't start one that predicts {prediction!r}; give another"
        " by --pretrained_model_name_or_path, or start from nothing with --from_scratch."
    )


def _from_teacher(teacher: Denoiser, args: ModelArguments) -> Start:
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    _set_dropout(network, args.dropout)
    spec = ModelSpec(teacher.sigma_data, teacher.time_label, prediction=teacher.prediction)
    return Start(network, spec, pretrained=True)


def _from_pretrained(args: ModelArguments, data: ImageData, method: type[Objective]) -> Start:
    pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision)
    if isinstance(pipeline, TWO_TIMES) and not method.two_times:
        raise ValueError(
            f"pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is a model of two times, for"
            f" {type(pipeline).__name__}; this method has one. Give a diffusion or a consistency model."
        )
    spec = _spec_of(pipeline, args, "pretrained model")
    _check_fit(pipeline, data, "pretrained model")
    _set_dropout(pipeline.unet, args.dropout)
    return Start(pipeline.unet.float(), spec, pretrained=True)


def _from_scratch(args: ModelArguments, data: ImageData, prediction: str, sigma_data: float | None) -> Start:
    if args.model_config_name_or_path is not None:
        network = _from_config(args, data)
    else:
        network = build_unet(args.model_preset, data.resolution, data.channels, data.num_classes, args.dropout)
    sigma_data = args.sigma_data or sigma_data or data.measure_sigma_data()
    made_for_tangents = isinstance(network, JVPUNet2DModel)
    label = args.time_label or ("angle" if made_for_tangents else "log_sigma")
    if made_for_tangents and label == "log_sigma":
        raise ValueError("time_label 'log_sigma' is not for the presets jvp_*, which read slow times: use 'angle'.")
    if prediction != "edm":
        label = DENOISERS[prediction].time_label
        if args.time_label not in (None, label):
            raise ValueError(f"time_label {args.time_label!r}: a model that predicts {prediction!r} takes {label!r}.")
    return Start(network, ModelSpec(sigma_data, label, prediction=prediction), pretrained=False)


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


def build_start(
    args: ModelArguments,
    data: ImageData,
    seed: int,
    teacher: Denoiser | None = None,
    method: type[Objective] = Objective,
    options: object = None,
) -> Start:
    """The network to train, with its parameterisation: a saved one, else the teacher's, else a new one.

    Raises:
        ValueError: no such model or config, or one that fits neither the data nor the method.
    """
    if args.from_scratch and (teacher is None or args.pretrained_model_name_or_path is not None):
        raise ValueError("from_scratch is for methods with a teacher, without --pretrained_model_name_or_path.")
    torch.manual_seed(derive_seed(seed, "initial weights"))
    prediction = method.prediction(options)
    if args.pretrained_model_name_or_path is not None:
        start = converted(_from_pretrained(args, data, method), prediction)
    elif teacher is not None and not args.from_scratch:
        start = converted(_from_teacher(teacher, args), prediction)
    else:
        start = _from_scratch(args, data, prediction, teacher and teacher.sigma_data)
    if teacher is not None and teacher.sigma_data != start.spec.sigma_data:
        raise ValueError(f"sigma_data is {start.spec.sigma_data}, that of the teacher {teacher.sigma_data}.")
    start = replace(start, network=method.adapt(start.network, start.spec.time_label))
    keep_time_embedding_in_float32(start.network)
    if args.gradient_checkpointing:
        start.network.enable_gradient_checkpointing()
    return start
