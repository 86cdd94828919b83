"""From settings to a network: a preset, a config file, or a saved model of the library."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from torch import nn

from cm_diffusers.core import labelled_augmentation as augmentation
from cm_diffusers.core.denoisers import Denoiser, Guided, jump_to_zero
from cm_diffusers.core.draws import derive_seed
from cm_diffusers.core.time_labels import OWN_LABELS
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.data.description import DescribedData
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.saved.stock import (
    AUTOENCODERS,
    NETWORKS,
    SavedModel,
    is_few_step,
    negate,
    nulls_of,
    read_stock,
)
from cm_diffusers.lookup import looked_up
from cm_diffusers.models import (
    EDM_PRESETS,
    DiTModel,
    EDMUNet2DModel,
    JVPUNet2DModel,
    build_unet,
    keep_time_embedding_in_float32,
)
from cm_diffusers.models.unet_presets import check_halvings
from cm_diffusers.objectives import OBJECTIVES, ModelSpec, Objective
from cm_diffusers.pipelines import CTMPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline
from cm_diffusers.pipelines.class_names import null_class
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import PIPELINES, load_pipeline


TWO_TIMES = (MeanFlowPipeline, CTMPipeline)
STOCK = {name: getattr(diffusers, name) for name in NETWORKS}


@dataclass(frozen=True)
class StartingPoint:
    """What training starts from."""

    network: nn.Module
    spec: ModelSpec
    pretrained: bool


def _is_diffusion(pipeline: DiffusionPipeline) -> bool:
    if type(pipeline).__name__ in STOCK:
        return not is_few_step(pipeline.scheduler)
    return isinstance(pipeline, DenoisingPipeline) or (
        isinstance(pipeline, TrigFlowPipeline) and pipeline.scheduler.config.solver != "consistency"
    )


def _spec_of(pipeline: ImagePipeline) -> ModelSpec:
    """The parameterisation of a saved model of the library."""
    levels = pipeline.scheduler.config
    config = pipeline.config if isinstance(pipeline, (DenoisingPipeline, MeanFlowPipeline)) else levels
    if isinstance(pipeline, TrigFlowPipeline):
        prediction = "trigflow"
    elif isinstance(pipeline, MeanFlowPipeline):
        prediction = "flow"
    else:
        prediction, label = config.get("prediction", "edm"), config.get("time_label", "log_sigma")
    return ModelSpec(
        sigma_data=levels.get("sigma_data", 1.0),
        time_label=OWN_LABELS.get(prediction) or label,
        sigma_max=levels.get("sigma_max", 80.0),
        prediction=prediction,
        time_scale=config.get("time_scale", 1.0),
        noise_schedule=config.get("noise_schedule"),
    )


def _saved(
    name_or_path: str, revision: str | None, variant: str | None, role: str
) -> tuple[SavedModel, DiffusionPipeline]:
    """A saved model of the library or of diffusers, and its pipeline. Raises ValueError for what can't be read."""
    pipeline = load_pipeline(name_or_path, revision, PIPELINES | STOCK, variant=variant, dtype=torch.float32)
    if role == "teacher" and not _is_diffusion(pipeline):
        scheduler = type(pipeline.scheduler).__name__
        raise ValueError(
            f"the teacher must be a diffusion model; {name_or_path!r} is a consistency model, by its {scheduler}."
        )
    if type(pipeline).__name__ not in STOCK:
        return SavedModel(pipeline.unet, _spec_of(pipeline), pipeline.vae, null_class(pipeline.unet)), pipeline
    try:
        return read_stock(pipeline), pipeline
    except ValueError as error:
        raise ValueError(f"the {role} {name_or_path!r} can't be read: {error}") from None


def _check_settings(model: SavedModel, args: ModelArguments, role: str, names: tuple[str, ...]) -> None:
    """Raise ValueError where the settings called `names` are not those of the model."""
    for name in names:
        asked, found = getattr(args, name), getattr(model.spec, name)
        if asked is not None and found is not None and asked != found:
            raise ValueError(f"{name} {asked!r} differs from {found!r} of the {role}; leave the option out.")


def check_fit(model: SavedModel, data: ImageData | DescribedData, role: str) -> None:
    """Raise ValueError unless the model makes images like those of the dataset."""
    channels, height, width = model.sample_shape
    there, size = data.channels, data.resolution
    if (channels, height, width) != (there, *size):
        if channels == there:
            advice = f"set --resolution {height} {width}."
        elif channels in (1, 3) and data.vae is None:
            advice = f"set --channels {channels}" + (
                f" --resolution {height} {width}." if (height, width) != size else "."
            )
        else:
            advice = "its channels are those of latents: give --vae_name_or_path with its autoencoder."
        raise ValueError(
            f"the {role} makes images of {channels} x {height} x {width},"
            f" the dataset gives {there} x {size[0]} x {size[1]}: {advice}"
        )
    classes = model.num_classes
    if (classes is None) != (data.num_classes is None):
        kind = "unconditional" if classes is None else f"conditional on {classes} classes"
        raise ValueError(f"the {role} is {kind}; set --class_conditional accordingly.")
    if classes is not None and data.num_classes > classes:
        raise ValueError(f"the dataset has {data.num_classes} classes, the {role} {classes}.")


def _set_dropout(network: nn.Module, dropout: float) -> None:
    if dropout and not any(isinstance(module, nn.Dropout) for module in network.modules()):
        raise ValueError(f"dropout {dropout:g} has no effect: this {type(network).__name__} has no layer that drops.")
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    network.register_to_config(dropout=dropout)


def denoiser_of(pipeline: ImagePipeline) -> Denoiser:
    """D(x, sigma) of a saved model: the denoised image of a diffusion model, the jump to clean data of others."""
    spec = _spec_of(pipeline)
    if isinstance(pipeline, MeanFlowPipeline):
        return jump_to_zero(pipeline.unet, spec.time_scale)
    if isinstance(pipeline, CTMPipeline):
        return spec.trajectories(pipeline.unet, pipeline.scheduler.config.sigma_min)
    return spec.denoiser(pipeline.unet, 0.0 if _is_diffusion(pipeline) else pipeline.scheduler.config.sigma_min)


def load_teacher(name_or_path: str, args: ModelArguments) -> SavedModel:
    """A diffusion model of the library or of diffusers, frozen; `str` of it says in a line what it is.

    Raises:
        ValueError: no such model, not a diffusion model, or one that can't be read or does not fit the settings.
    """
    model, _ = _saved(name_or_path, args.teacher_revision, args.teacher_variant, "teacher")
    _check_settings(model, args, "teacher", ("sigma_data",))
    model.network.eval().requires_grad_(False)
    return model


def load_start(args: ModelArguments, method: type[Objective]) -> SavedModel | None:
    """The saved model that training starts from; None where none is named.

    Raises:
        ValueError: no such model, one of two times for a method of one, or one that does not fit the settings.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    model, pipeline = _saved(args.pretrained_model_name_or_path, args.revision, args.variant, "pretrained model")
    if isinstance(pipeline, TWO_TIMES) and not method.two_times:
        raise ValueError(
            f"pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is a model of two times, for"
            f" {type(pipeline).__name__}; this method has one. Give a diffusion or a consistency model."
        )
    _check_settings(model, args, "pretrained model", ("time_label", "sigma_data"))
    return model


def load_vae(args: ModelArguments, saved: SavedModel | None) -> nn.Module | None:
    """The autoencoder to train in the latents of: the one that is named, else that of `saved`, the teacher or start.

    Raises:
        ValueError: there is no such autoencoder, or it is of a kind that the library can't read.
    """
    name = args.vae_name_or_path
    if name is None:
        return saved and saved.vae
    known = {cls.__name__: cls for cls in AUTOENCODERS}
    try:
        with looked_up(name) as cached:
            kind = AutoencoderKL.load_config(name, local_files_only=cached).get("_class_name")
            if kind in known:
                return known[kind].from_pretrained(name, use_safetensors=True, local_files_only=cached)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"vae_name_or_path {name!r} can't be loaded: {error}") from None
    raise ValueError(f"vae_name_or_path {name!r} is a {kind}; this version reads {', '.join(known)}.")


def guided(teacher: SavedModel, scale: float) -> Denoiser:
    """The teacher's denoiser under classifier-free guidance of the given scale; 1 is none.

    Raises:
        ValueError: the teacher has no class that stands for none.
    """
    if scale == 1:
        return teacher.denoiser
    if teacher.null_class is None:
        raise ValueError(
            "teacher_guidance_scale needs a teacher that knows a class for none, as a DiTPipeline does and what was"
            " trained with --label_dropout; this one"
            + (" is unconditional." if teacher.num_classes is None else "'s labels are all those of classes.")
        )
    return Guided(teacher.denoiser, scale, nulls_of(teacher.null_class))


def converted(
    start: StartingPoint, method: type[Objective], options: object = None, taught: bool = False
) -> StartingPoint:
    """A saved network as `method` trains it: as it is, or as one that predicts the same but for a sign.

    EDM's F is TrigFlow's with the sign turned (both take x / sqrt(sigma^2 + sigma_data^2)), if its time input is the
    angle as well. `taught` says whether there is a teacher beside.

    Raises:
        ValueError: there is no such conversion; the message says what can be done.
    """
    spec, prediction = start.spec, method.prediction(options)
    if spec.prediction in method.native_predictions or spec.prediction == prediction and spec.time_scale == 1:
        return start
    if {spec.prediction, prediction} == {"edm", "trigflow"} and spec.time_label == "angle":
        negate(start.network)
        return replace(start, spec=replace(spec, prediction=prediction))
    others = [name for name, cls in OBJECTIVES.items() if spec.prediction in cls.native_predictions]
    reason = f"a saved network that predicts {spec.prediction!r} can't start one that predicts {prediction!r}"
    if spec.prediction == "edm" and prediction == "trigflow":
        factor = {"log_sigma": "250", "quarter_log_sigma": "1/4"}[spec.time_label]
        reason = (
            f"the saved network's time input is {factor} ln(sigma), which swings too hard for tangents: its derivative"
            f" by the angle is {factor} / (sin t cos t). Start from a network with another time input"
            " (train_diffusion.py --interpolant trigflow, or --time_label angle)"
        )
    elif spec.prediction == "sample":
        reason = (
            "a saved network that predicts the clean image itself is not the identity where there is no noise, as a"
            " consistency model must be"
        )
    elif spec.time_scale != 1:
        reason = f"{method.name} tells its networks flow times, and this one is told {spec.time_scale:g} times that"
    elif spec.time_label == "timestep" and method.needs_tangents:
        reason = f"{method.name} follows the network's derivative by time, and this network knows a table of integers"
    if others:
        reason += f"; it can start {', '.join(others)}"
    raise ValueError(
        f"{reason}; give another network by --pretrained_model_name_or_path, or start from nothing"
        + (" with --from_scratch: the teacher may stay as it is." if taught else ".")
    )


def _from_teacher(teacher: SavedModel, args: ModelArguments) -> StartingPoint:
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    _set_dropout(network, args.dropout)
    return StartingPoint(network, teacher.spec, pretrained=True)


def _from_pretrained(model: SavedModel, args: ModelArguments, data: ImageData | DescribedData) -> StartingPoint:
    check_fit(model, data, "pretrained model")
    _set_dropout(model.network, args.dropout)
    return StartingPoint(model.network, model.spec, pretrained=True)


def _from_scratch(
    args: ModelArguments, data: ImageData | DescribedData, prediction: str, sigma_data: float | None
) -> StartingPoint:
    if args.model_config_name_or_path is not None:
        network = _from_config(args, data)
    else:
        augment = augmentation.LABELS if data.args.augment else 0
        shape = (data.resolution, data.channels, data.num_classes)
        network = build_unet(args.model_preset, *shape, args.dropout, augment)
    sigma_data = args.sigma_data or sigma_data or data.measure_sigma_data()
    made_for_tangents = isinstance(network, JVPUNet2DModel)
    label = args.time_label or ("angle" if made_for_tangents else "log_sigma")
    if made_for_tangents and label == "log_sigma":
        raise ValueError("time_label 'log_sigma' is not for the presets jvp_*, which read slow times: use 'angle'.")
    if prediction != "edm":
        label = OWN_LABELS[prediction]
        if args.time_label not in (None, label):
            raise ValueError(f"time_label {args.time_label!r}: a model that predicts {prediction!r} takes {label!r}.")
    if isinstance(network, EDMUNet2DModel) and label != "log_sigma":
        network.register_to_config(preconditioning="none")  # it is told such times as they are
    return StartingPoint(network, ModelSpec(sigma_data, label, prediction=prediction), pretrained=False)


def _prepare_labels(network: nn.Module, args: ModelArguments, data: ImageData | DescribedData) -> None:
    """Raise ValueError where `network` can't be told what it shall be: how an image was augmented, or of no class."""
    name = type(network).__name__
    if data.args.augment and network.config.get("augment_channels") != augmentation.LABELS:
        raise ValueError(
            f"augment needs a network with augment_channels {augmentation.LABELS}, and this {name} has"
            f" {network.config.get('augment_channels') or 'none'}; presets with them are {', '.join(EDM_PRESETS)}."
        )
    if isinstance(network, EDMUNet2DModel):
        network.register_to_config(label_dropout=args.label_dropout)
    elif args.label_dropout and not isinstance(network, DiTModel):
        raise ValueError(
            f"label_dropout: a {name} knows no class for none; presets that do are {', '.join(EDM_PRESETS)}."
        )


def _from_config(args: ModelArguments, data: ImageData | DescribedData) -> UNet2DModel:
    path = Path(args.model_config_name_or_path)
    try:
        with looked_up(str(path)) as cached:
            if path.is_file():
                config = json.loads(path.read_text())
            else:
                config = UNet2DModel.load_config(str(path), local_files_only=cached)
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
    data: ImageData | DescribedData,
    seed: int,
    teacher: SavedModel | None = None,
    method: type[Objective] = Objective,
    options: object = None,
    saved: SavedModel | None = None,
) -> StartingPoint:
    """The network to train, with its parameterisation: a saved one, else the teacher's, else a new one.

    `saved` is what `load_start` gives, for callers that have it.

    Raises:
        ValueError: no such model or config, or one that fits neither the data nor the method.
    """
    if teacher is not None:
        check_fit(teacher, data, "teacher")
    torch.manual_seed(derive_seed(seed, "initial weights"))
    if args.pretrained_model_name_or_path is not None:
        saved = saved or load_start(args, method)
        start = converted(_from_pretrained(saved, args, data), method, options, taught=teacher is not None)
    elif teacher is not None and not args.from_scratch:
        start = converted(_from_teacher(teacher, args), method, options, taught=True)
    else:
        start = _from_scratch(args, data, method.prediction(options), teacher and teacher.spec.sigma_data)
    taught = teacher.spec.sigma_data if teacher is not None else None
    if start.spec.sigma_data is None:  # a process of diffusers says nothing of the data
        sigma_data = args.sigma_data or taught or data.measure_sigma_data()
        start = replace(start, spec=replace(start.spec, sigma_data=sigma_data))
    if taught not in (None, start.spec.sigma_data):
        raise ValueError(f"sigma_data is {start.spec.sigma_data}, that of the teacher {taught}.")
    if teacher is not None:  # beyond what the teacher knows there is nothing to learn
        start = replace(start, spec=replace(start.spec, sigma_max=min(start.spec.sigma_max, teacher.spec.sigma_max)))
    _prepare_labels(start.network, args, data)
    start = replace(start, network=method.adapt(start.network, start.spec))
    keep_time_embedding_in_float32(start.network)
    if args.gradient_checkpointing:
        start.network.enable_gradient_checkpointing()
    return start
