"""The network that training starts from: a preset, a config file or a saved model. Also the loading of teachers."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from cm_diffusers.core import labelled_augmentation as augmentation
from cm_diffusers.core.denoisers import Denoiser, Guided, jump_to_zero
from cm_diffusers.core.draws import derive_seed
from cm_diffusers.core.frozen import copied
from cm_diffusers.core.time_labels import OWN_LABELS
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.data.description import DescribedData
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.saved.lora import add_lora
from cm_diffusers.engine.saved.stock import (
    AUTOENCODERS,
    NETWORKS,
    SavedModel,
    is_few_step,
    negate,
    nulls_of,
    read_stock,
)
from cm_diffusers.engine.saved.text import PIPELINES as TEXT_PIPELINES
from cm_diffusers.engine.saved.text import TextModel, fuse_loras, read_text_to_image
from cm_diffusers.lookup import looked_up
from cm_diffusers.models import (
    EDM_PRESETS,
    DiTModel,
    EDMUNet2DModel,
    JVPUNet2DModel,
    build_unet,
    keep_time_embedding_in_float32,
)
from cm_diffusers.models.text_unet import with_guidance_input
from cm_diffusers.models.unet_presets import check_halvings
from cm_diffusers.objectives import OBJECTIVES, ModelSpec, Objective
from cm_diffusers.pipelines import CTMPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline
from cm_diffusers.pipelines.class_names import null_class
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import PIPELINES, load_pipeline


TWO_TIMES = (MeanFlowPipeline, CTMPipeline)
STOCK = {name: getattr(diffusers, name) for name in NETWORKS}
TEXT_TO_IMAGE = {name: getattr(diffusers, name) for name in TEXT_PIPELINES}


@dataclass(frozen=True)
class StartingPoint:
    """The network that training starts from.

    Args:
        network: the network to train.
        spec: the parameterisation of the network.
        pretrained: whether the network comes from a saved model.
    """

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
    """The parameterisation of a pipeline of this library."""
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
    """A saved model and its pipeline, of this library or of diffusers. Raises ValueError if it can't be read."""
    kinds = PIPELINES | STOCK | (TEXT_TO_IMAGE if role == "teacher" else {})
    pipeline = load_pipeline(name_or_path, revision, kinds, variant=variant, dtype=torch.float32)
    if type(pipeline).__name__ in TEXT_TO_IMAGE:
        try:
            return read_text_to_image(pipeline), pipeline
        except ValueError as error:
            raise ValueError(f"the {role} {name_or_path!r} can't be read: {error}") from None
    if role == "teacher" and not _is_diffusion(pipeline):
        scheduler = type(pipeline.scheduler).__name__
        raise ValueError(
            f"the teacher must be a diffusion model, but {name_or_path!r} is a consistency model, as its {scheduler}"
            " shows."
        )
    if type(pipeline).__name__ not in STOCK:
        return SavedModel(pipeline.unet, _spec_of(pipeline), pipeline.vae, null_class(pipeline.unet)), pipeline
    try:
        return read_stock(pipeline), pipeline
    except ValueError as error:
        raise ValueError(f"the {role} {name_or_path!r} can't be read: {error}") from None


def _check_settings(model: SavedModel, args: ModelArguments, role: str, names: tuple[str, ...]) -> None:
    """Raise ValueError if a setting of `names` is given and differs from the model's."""
    for name in names:
        asked, found = getattr(args, name), getattr(model.spec, name)
        if asked is not None and found is not None and asked != found:
            raise ValueError(f"{name} {asked!r} differs from {found!r} of the {role}. Leave out --{name}.")


def check_fit(model: SavedModel, data: ImageData | DescribedData, role: str) -> None:
    """Check that a model generates images of the dataset's shape and classes.

    Args:
        model: the saved model.
        data: the dataset.
        role: name of the model in messages, such as "teacher".

    Raises:
        ValueError: channels, resolution or classes differ; the message names the option to change. A text-to-image
            model takes latents of any size.
    """
    if isinstance(model, TextModel):
        return
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
            advice = "give the autoencoder of its latents as --vae_name_or_path."
        raise ValueError(
            f"the {role} makes images of {channels} x {height} x {width},"
            f" the dataset gives {there} x {size[0]} x {size[1]}: {advice}"
        )
    classes = model.num_classes
    if (classes is None) != (data.num_classes is None):
        kind = "unconditional" if classes is None else f"conditional on {classes} classes"
        raise ValueError(f"the {role} is {kind}; {'leave out' if classes is None else 'set'} --class_conditional.")
    if classes is not None and data.num_classes > classes:
        raise ValueError(
            f"the dataset has {data.num_classes} classes, but the {role} only {classes}. Give a {role} with at least"
            f" {data.num_classes} classes."
        )


def _set_dropout(network: nn.Module, dropout: float) -> None:
    if dropout and not any(isinstance(module, nn.Dropout) for module in network.modules()):
        raise ValueError(
            f"dropout {dropout:g} has no effect: this {type(network).__name__} has no dropout layer. Leave out"
            " --dropout."
        )
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    network.register_to_config(dropout=dropout)


def denoiser_of(pipeline: ImagePipeline) -> Denoiser:
    """Return D(x, sigma) of a saved model: the denoised image for a diffusion model, else the jump to clean data."""
    spec = _spec_of(pipeline)
    if isinstance(pipeline, MeanFlowPipeline):
        return jump_to_zero(pipeline.unet, spec.time_scale)
    if isinstance(pipeline, CTMPipeline):
        return spec.trajectories(pipeline.unet, pipeline.scheduler.config.sigma_min)
    return spec.denoiser(pipeline.unet, 0.0 if _is_diffusion(pipeline) else pipeline.scheduler.config.sigma_min)


def load_teacher(name_or_path: str, args: ModelArguments) -> SavedModel:
    """Load a diffusion model of this library or of diffusers as a frozen teacher. Its `str` describes it in a line.

    Args:
        name_or_path: a folder or a Hub id.
        args: settings with the teacher's revision and variant.

    Raises:
        ValueError: the model is missing or unreadable, is not a diffusion model, or contradicts the settings.
    """
    model, _ = _saved(name_or_path, args.teacher_revision, args.teacher_variant, "teacher")
    if isinstance(model, TextModel):
        fuse_loras(model.pipeline, args.teacher_lora or [])
    _check_settings(model, args, "teacher", ("sigma_data",))
    model.network.eval().requires_grad_(False)
    return model


def load_start(args: ModelArguments, method: type[Objective]) -> SavedModel | None:
    """Load the saved model that training starts from, or return None if the settings name none.

    Args:
        args: settings with the name, revision and variant of the model.
        method: the method that will train it.

    Raises:
        ValueError: the model is missing or unreadable, has two times for a method of one, or contradicts the settings.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    model, pipeline = _saved(args.pretrained_model_name_or_path, args.revision, args.variant, "pretrained model")
    if isinstance(pipeline, TWO_TIMES) and not method.two_times:
        raise ValueError(
            f"pretrained_model_name_or_path {args.pretrained_model_name_or_path!r} is a two-time model, of"
            f" {type(pipeline).__name__}, but this method trains one-time models. Give a diffusion or a consistency"
            " model."
        )
    _check_settings(model, args, "pretrained model", ("time_label", "sigma_data"))
    return model


def load_vae(args: ModelArguments, saved: SavedModel | None) -> nn.Module | None:
    """Load the autoencoder whose latents are trained on; None for pixels.

    Args:
        args: settings, which can name an autoencoder.
        saved: the teacher or start, whose autoencoder is used if the settings name none.

    Raises:
        ValueError: the autoencoder is missing or damaged, or this library can't read its class.
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


def guided(
    teacher: SavedModel, scale: float, drawn: bool = False, nulls: Mapping[str, Tensor] | None = None
) -> Denoiser:
    """Return the teacher's denoiser with classifier-free guidance.

    Args:
        teacher: the teacher.
        scale: weight of the guidance; 1 is no guidance.
        drawn: whether the method draws scales of its own.
        nulls: null rows (...) by name; None for the null class of the teacher.

    Raises:
        ValueError: `scale` is not 1 or `drawn` is set, and the teacher has no null class.
    """
    if scale == 1 and not drawn:
        return teacher.denoiser
    if nulls is not None:
        return Guided(teacher.denoiser, scale, nulls)
    if teacher.null_class is None:
        name = "w_max" if drawn else "teacher_guidance_scale"
        this = "This teacher is unconditional." if teacher.num_classes is None else "This teacher has no null class."
        raise ValueError(
            f"{name} needs a teacher with a null class: a DiT, or a model trained with --label_dropout. {this}"
        )
    return Guided(teacher.denoiser, scale, nulls_of(teacher.null_class))


def converted(
    start: StartingPoint, method: type[Objective], options: object = None, taught: bool = False
) -> StartingPoint:
    """Return a saved network in the form that `method` trains: unchanged, or with the sign of its output flipped.

    TrigFlow's F is the negative of EDM's F if the time input is the angle, because both networks see
    x / sqrt(sigma^2 + sigma_data^2).

    Args:
        start: the saved network.
        method: the method that will train it.
        options: the options of the method.
        taught: whether the method has a teacher, for the advice of the message.

    Raises:
        ValueError: `method` can't start from this network; the message gives the reason and the alternatives.
    """
    spec, prediction = start.spec, method.prediction(options)
    if spec.prediction in method.native_predictions or spec.prediction == prediction and spec.time_scale == 1:
        return start
    if {spec.prediction, prediction} == {"edm", "trigflow"} and spec.time_label == "angle":
        network = copy.deepcopy(start.network)  # its weights can be those of the teacher
        negate(network)
        return replace(start, network=network, spec=replace(spec, prediction=prediction))
    others = [name for name, cls in OBJECTIVES.items() if spec.prediction in cls.native_predictions]
    reason = f"a saved network that predicts {spec.prediction!r} can't start one that predicts {prediction!r}."
    if spec.prediction == "edm" and prediction == "trigflow":
        factor = {"log_sigma": "250", "quarter_log_sigma": "1/4"}[spec.time_label]
        reason = (
            f"the saved network's time input is {factor} ln(sigma), which varies too fast for tangents: its derivative"
            f" by the angle is {factor} / (sin t cos t). Start from a network with another time input"
            " (train_diffusion.py --interpolant trigflow, or --time_label angle)."
        )
    elif spec.prediction == "sample":
        reason = (
            "a saved network that predicts the clean image is not the identity at noise level 0, as a consistency"
            " model must be."
        )
    elif spec.time_scale != 1:
        reason = (
            f"{method.name} expects flow times in [0, 1], but this network was trained on flow times multiplied by"
            f" {spec.time_scale:g}."
        )
    elif spec.time_label == "timestep" and method.needs_tangents:
        reason = (
            f"{method.name} needs the network's derivative by time, but this network was trained on integer times."
        )
    if others:
        reason += f" It can start {', '.join(others)}."
    raise ValueError(
        f"{reason} Give another network with --pretrained_model_name_or_path, or "
        + (
            "train a new one with --from_scratch and the same teacher."
            if taught
            else "leave it out to train a new one."
        )
    )


def _from_teacher(teacher: SavedModel, args: ModelArguments) -> StartingPoint:
    if args.lora_rank is not None:
        network = copied(teacher.network)  # shares the weights, which stay frozen
    elif args.unet_time_cond_proj_dim is not None:
        network = with_guidance_input(teacher.network, args.unet_time_cond_proj_dim).requires_grad_(True)
    else:
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
        raise ValueError(
            "time_label 'log_sigma' is not for the presets jvp_*, whose time input must vary slowly: use 'angle'."
        )
    if prediction != "edm":
        label = OWN_LABELS[prediction]
        if args.time_label not in (None, label):
            raise ValueError(
                f"time_label {args.time_label!r} does not fit a model that predicts {prediction!r}: use {label!r}, or"
                " leave out --time_label."
            )
    if isinstance(network, EDMUNet2DModel) and label != "log_sigma":
        network.register_to_config(preconditioning="none")  # it then takes the time input unscaled
    return StartingPoint(network, ModelSpec(sigma_data, label, prediction=prediction), pretrained=False)


def _prepare_labels(network: nn.Module, args: ModelArguments, data: ImageData | DescribedData) -> None:
    """Raise ValueError if `network` lacks the conditioning on augmentations or the null class that settings need."""
    name = type(network).__name__
    if data.args.augment and network.config.get("augment_channels") != augmentation.LABELS:
        raise ValueError(
            f"augment needs a network with augment_channels {augmentation.LABELS}, but this {name} has"
            f" {network.config.get('augment_channels') or 'none'}. Presets with them are {', '.join(EDM_PRESETS)}."
        )
    if isinstance(network, EDMUNet2DModel):
        network.register_to_config(label_dropout=args.label_dropout)
    elif args.label_dropout and not isinstance(network, DiTModel):
        raise ValueError(
            f"label_dropout needs a network with a null class, but this {name} has none. Presets with one are"
            f" {', '.join(EDM_PRESETS)}."
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
    """Build the network to train: a saved one, else a copy of the teacher's, else a new one.

    Args:
        args: settings of the network.
        data: the dataset, or its description.
        seed: seed of the run, for the initial weights.
        teacher: the teacher, if the method has one.
        method: the method that will train the network.
        options: the options of the method.
        saved: the result of `load_start`; None loads the model that the settings name.

    Raises:
        ValueError: a model or config is missing or unreadable, or does not fit the dataset, teacher or method.
    """
    if teacher is not None:
        check_fit(teacher, data, "teacher")
    torch.manual_seed(derive_seed(seed, "initial weights"))
    if args.pretrained_model_name_or_path is not None:
        saved = saved or load_start(args, method)
        start = converted(_from_pretrained(saved, args, data), method, options, taught=teacher is not None)
    elif teacher is not None and not args.from_scratch:
        start = _from_teacher(teacher, args)
        if not isinstance(teacher, TextModel):  # whose methods train it as it is
            start = converted(start, method, options, taught=True)
    else:
        start = _from_scratch(args, data, method.prediction(options), teacher and teacher.spec.sigma_data)
    taught = teacher.spec.sigma_data if teacher is not None else None
    if start.spec.sigma_data is None:  # diffusers' VP and flow schedulers have no sigma_data
        sigma_data = args.sigma_data or taught or data.measure_sigma_data()
        start = replace(start, spec=replace(start.spec, sigma_data=sigma_data))
    if taught not in (None, start.spec.sigma_data):
        raise ValueError(
            f"sigma_data of the pretrained model is {start.spec.sigma_data}, but the teacher's is {taught}. Give a"
            " pretrained model with the teacher's sigma_data."
        )
    if teacher is not None:  # the teacher gives no targets above its highest level
        start = replace(start, spec=replace(start.spec, sigma_max=min(start.spec.sigma_max, teacher.spec.sigma_max)))
    _prepare_labels(start.network, args, data)
    start = replace(start, network=method.adapt(start.network, start.spec))
    if args.lora_rank is not None:
        if method.two_times or not start.pretrained:
            why = f"{method.name} adds an input to the network" if method.two_times else "a new network has no base"
            raise ValueError(f"lora_rank can't be used, because {why}. Leave it out to train all weights.")
        add_lora(start.network, args.lora_rank, args.lora_alpha, args.lora_target_modules)
    keep_time_embedding_in_float32(start.network)
    if args.gradient_checkpointing:
        start.network.enable_gradient_checkpointing()
    return start
