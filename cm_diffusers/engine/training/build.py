"""Build the parts of a run from its settings: saved models, the training method with its network, the trainer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from cm_diffusers.core.denoisers import Denoiser
from cm_diffusers.engine.checkpoint import newest_state
from cm_diffusers.engine.config import Config, Known
from cm_diffusers.engine.data.description import DescribedData
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.latents import LatentData
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.processes import Team
from cm_diffusers.engine.saved.base_precision import set_base_precision
from cm_diffusers.engine.saved.discriminators import build_discriminator
from cm_diffusers.engine.saved.lora import fuse_passes, has_lora
from cm_diffusers.engine.saved.start import build_start, guided, load_start, load_teacher, load_vae
from cm_diffusers.engine.saved.stock import SavedModel
from cm_diffusers.engine.saved.text import TextModel
from cm_diffusers.engine.text.data import TextData
from cm_diffusers.engine.training.product import Product
from cm_diffusers.engine.training.state import average_profiles
from cm_diffusers.engine.training.text import TextProduct, load_text, memory_line, refuse_text_settings
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.models.unet_presets import check_halvings
from cm_diffusers.objectives import OBJECTIVES, Objective
from cm_diffusers.objectives.adversarial import AdversaryOptions
from cm_diffusers.objectives.options import check_for_latents
from cm_diffusers.pipelines import name_classes


@dataclass(frozen=True)
class SavedModels:
    """The saved models that the settings name; each is None if the settings do not name it.

    Args:
        teacher: the diffusion model to distil.
        denoiser: the denoiser of the teacher, with the guidance of `--teacher_guidance_scale`.
        start: the model whose weights training starts from.
        vae: the autoencoder in whose latents the model is trained.
    """

    teacher: SavedModel | None
    denoiser: Denoiser | None
    start: SavedModel | None
    vae: nn.Module | None


def load_models(config: Config) -> SavedModels:
    """Load the teacher, the initial model and the autoencoder that `config` names.

    Raises:
        ValueError: a model is missing or does not fit the settings, or `cache_latents` is set without an autoencoder.
    """
    model, method = config.model, OBJECTIVES[config.method]
    teacher = load_teacher(config.options.teacher, model) if config.options.teacher else None
    denoiser = None
    if teacher is not None:
        if not isinstance(teacher, TextModel):  # its null rows come with the prompts
            denoiser = guided(teacher, model.teacher_guidance_scale, config.options.draws_guidance)
    start = load_start(model, method)
    vae = load_vae(model, teacher or start)
    if isinstance(teacher, TextModel):
        teacher.pipeline.register_modules(vae=vae)
    elif vae is not None:
        check_for_latents(config.data, config.options)
    elif config.data.cache_latents:
        raise ValueError("cache_latents needs an autoencoder: give --vae_name_or_path, or a teacher that has one.")
    return SavedModels(teacher, denoiser, start, vae)


def build_objective(
    config: Config, models: SavedModels, images: ImageData | DescribedData, data: ImageData | DescribedData
) -> tuple[Config, Objective]:
    """Build the training method with its initial network; return it after the completed settings.

    The returned settings have `sigma_data` and all defaults that depend on the data or the network.

    Args:
        config: the settings as the user gave them.
        models: the result of `load_models(config)`.
        images: the images, whose resolution and channels determine some defaults.
        data: the training data: the same images, or their latents.

    Raises:
        ValueError: the models do not fit the data or each other.
    """
    method, options = OBJECTIVES[config.method], config.options
    start = build_start(
        config.model, data, config.run.seed, teacher=models.teacher, method=method, options=options, saved=models.start
    )
    text = isinstance(images, TextData)  # has no images, and its settings have a resolution
    known = Known(
        None if text else images.resolution,
        None if text else images.channels,
        data.channels * math.prod(data.resolution),
        None if start.pretrained else start.spec.time_label,
    )
    config = replace(config, model=replace(config.model, sigma_data=start.spec.sigma_data)).resolved(known)
    options = config.options
    denoiser = models.denoiser
    if isinstance(models.teacher, TextModel) and isinstance(data, TextData):
        scale, drawn = config.model.teacher_guidance_scale, options.draws_guidance
        denoiser = guided(models.teacher, scale, drawn, data.nulls)
    extra = {"pretrained": start.pretrained, "teacher": denoiser}
    if isinstance(options, AdversaryOptions) and options.discriminator_backbone is not None:
        extra["discriminator"] = build_discriminator(
            data.channels, data.num_classes, options.discriminator_backbone, image_size=224
        )
    steps = config.run.max_train_steps
    objective = method(start.network, start.spec, options, steps, **extra)
    for network in objective.auxiliary.values():
        if has_lora(network):
            fuse_passes(network)
    if data.num_classes is not None:
        name_classes(objective.network, data.description.classes)
    return config, objective


def build_trainer(config: Config, accelerator: Accelerator) -> Trainer:
    """Build the trainer of a run at its start, and print the facts of its data, model and method.

    Args:
        config: the settings of the run.
        accelerator: the processes of the run.

    Raises:
        ValueError: a dataset or model is missing, or the settings do not fit them.
    """
    config = config.given or config
    main, folder, model = accelerator.is_main_process, Path(config.run.output_dir), config.model
    models = load_models(config)
    kind: Callable[..., Product] = Product
    if isinstance(models.teacher, TextModel):
        config, images, shown = load_text(config, models.teacher, accelerator)
        kind = partial(TextProduct, teacher=models.teacher, shown=shown)
    else:
        refuse_text_settings(config)
        scanned, team = folder / RunFiles.SCANNED, Team(accelerator)
        images = ImageData(config.data, model.class_conditional, scanned, show_progress=main, team=team)
    if model.sigma_data is None and (config.run.allow_data_change or not (models.teacher or models.start)):
        config = replace(config, model=replace(model, sigma_data=_measured_before(folder)))
    config = _with_epochs(config, len(images.images) if config.run.num_train_epochs else 0, accelerator)
    data = images
    if models.vae is not None and not isinstance(images, TextData):
        data = _latents(config, images, models.vae, accelerator)
    if model.lora_rank is not None and models.teacher is not None:
        asked = _base_precision(config)
        set_base_precision(models.teacher.network, asked, accelerator.mixed_precision, accelerator.device)
    config, objective = build_objective(config, models, images, data)
    levels = objective.network.config.get("block_out_channels") or objective.network.config.get("channel_mult")
    for shape in sorted(images.shapes) if levels else ():
        check_halvings(shape, len(levels), "the network")
    trainer = Trainer(config, objective, data, accelerator, kind)
    for line in _described(trainer, models):
        trainer.say(line)
    return trainer


def _base_precision(config: Config) -> str | None:
    """The precision of frozen weights, which is float32 for methods that need tangents.

    Raises:
        ValueError: another one is asked for such a method.
    """
    asked, method = config.model.base_precision, OBJECTIVES[config.method]
    if method.needs_tangents and asked not in (None, "no"):
        raise ValueError(
            f"base_precision {asked!r} is not for {config.method}, which differentiates the network in float32. Leave"
            " it out."
        )
    return "no" if method.needs_tangents else asked


def _with_epochs(config: Config, images: int, accelerator: Accelerator) -> Config:
    """The settings with `max_train_steps` for the epochs of --num_train_epochs over `images` images."""
    run = config.run
    if run.num_train_epochs is None:
        return config
    batch = run.train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes
    steps = math.ceil(run.num_train_epochs * images / batch)
    if accelerator.is_main_process:
        print(f"Training {steps} steps, for --num_train_epochs {run.num_train_epochs} of {images} images.", flush=True)
    return replace(config, run=replace(run, max_train_steps=steps))


def _measured_before(folder: Path) -> float | None:
    """The sigma_data of the newest checkpoint in `folder`, or None. It holds even if the images have changed."""
    state = newest_state(folder) or {}
    return state["config"]["sigma_data"] if "data" in state else None


def _latents(config: Config, images: ImageData, vae: nn.Module, accelerator: Accelerator) -> LatentData:
    cache = Path(config.run.output_dir) / RunFiles.LATENTS if config.data.cache_latents else None
    batch, team = config.model.vae_encode_batch_size, Team(accelerator)
    return LatentData(images, vae, cache, accelerator.device, tqdm.write, batch, team)


def _described(trainer: Trainer, models: SavedModels) -> list[str]:
    """Lines that describe a run at its start."""
    config, objective, data, accelerator = trainer.config, trainer.objective, trainer.data, trainer.accelerator
    network, spec, latents = objective.network, objective.spec, data.vae is not None
    lines = [f"Data: {data.description}{' (latents)' if latents else ''}"]
    if config.data.dataloader_num_workers and torch.is_tensor(data.images):
        lines.append(
            "dataloader_num_workers applies to the first pass only, because the dataset is then kept in memory."
        )
    if models.teacher is not None:
        lines.append(f"Teacher: {models.teacher}")
    if isinstance(models.teacher, TextModel):
        averages = len(average_profiles(config.run)) + len(objective.auxiliary)
        lines.append(memory_line(models.teacher, network, averages))
    count = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    trained = f"{count:.2f} M parameters{' of a LoRA' if has_lora(network) else ''}"
    return [
        *lines,
        f"sigma_data: {spec.sigma_data} (root mean square of the {'latents' if latents else 'images in [-1, 1]'})",
        f"Model: {trained}, {spec.prediction}, time label {spec.time_label}",
        f"Method: {config.method}, {objective.options}",
        f"Precision: {accelerator.mixed_precision.replace('no', 'float32')}",
        f"Images per step: {trainer.share.global_batch} on {accelerator.num_processes} process(es)",
    ]
