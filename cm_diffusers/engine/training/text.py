"""Runs that distil a text-to-image model: their data, and the model that they make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.config import Config, ModelArguments
from cm_diffusers.engine.data.captions import read_prompts
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.files import RunFiles
from cm_diffusers.engine.pictures.prompts import save_prompt_grid
from cm_diffusers.engine.processes import Team
from cm_diffusers.engine.saved.base_precision import is_packed
from cm_diffusers.engine.saved.export import network_with
from cm_diffusers.engine.saved.lora import has_lora
from cm_diffusers.engine.saved.text import TextModel, encode_prompts, read_sizes, without_warnings
from cm_diffusers.engine.sharing.card import RunSummary
from cm_diffusers.engine.text.card import guidance_input, text_card, text_card_facts, usage
from cm_diffusers.engine.text.data import PromptData, TextData
from cm_diffusers.engine.text.export import (
    few_step_scheduler,
    sample_prompts,
    save_fused_model,
    save_lora_model,
    student_pipeline,
)
from cm_diffusers.engine.training.product import Product
from cm_diffusers.objectives.options import check_for_latents


STEPS = (1, 2, 4, 8)  # of the pictures
TEACHER_STEPS = 25
SHOWN = 4  # prompts of the pictures, by default
METHODS = ("lcm", "tcd", "cd", "ecd", "scd")  # whose students stock schedulers sample
NOT_FOR_TEXT = (
    "class_conditional", "label_column", "label_dropout", "search_levels", "export_variant", "from_scratch"
)  # fmt: skip
ONLY_TEXT = (
    "caption_column", "prompts", "proportion_empty_prompts", "validation_prompts", "teacher_lora",
    "unet_time_cond_proj_dim", "fuse"
)  # fmt: skip


def refuse_text_settings(config: Config) -> None:
    """Check that a run without a text-to-image teacher has no setting for one.

    Raises:
        ValueError: it has one.
    """
    settings = config.to_dict()
    for name in ONLY_TEXT:
        if settings[name]:
            raise ValueError(
                f"{name} is for text-to-image models. Give one as --pretrained_teacher_model, or leave it out."
            )


def check_text_settings(config: Config) -> None:
    """Check that a run with a text-to-image teacher has no setting that it can't follow.

    Raises:
        ValueError: it has one.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"method {config.method} is not for text-to-image models, because it adds a second time to the network,"
            f" which no stock scheduler knows. Choose {', '.join(METHODS[:-1])} or {METHODS[-1]}."
        )
    settings = config.to_dict()
    for name in NOT_FOR_TEXT:
        if settings[name]:
            raise ValueError(f"{name} is not for text-to-image models. Leave it out.")
    if config.data.cache_latents:
        raise ValueError("cache_latents is not for text-to-image models, whose latents are always kept. Leave it out.")
    if config.data.prompts is not None and config.model.vae_encode_batch_size != ModelArguments.vae_encode_batch_size:
        raise ValueError("vae_encode_batch_size needs images, and prompts has none. Leave one of them out.")
    if config.data.streaming:
        raise ValueError("streaming is not for text-to-image models, whose latents are computed once. Leave it out.")
    check_for_latents(replace(config.data, aspect_ratio_buckets=False), config.options)


@dataclass(frozen=True)
class ShownPrompts:
    """The prompts of the pictures, their embeddings, and the height and width of the pictures in pixels."""

    prompts: list[str]
    condition: Condition
    size: tuple[int, int]


def load_text(config: Config, teacher: TextModel, accelerator: Accelerator) -> tuple[Config, TextData, ShownPrompts]:
    """Load the data of a run that distils `teacher`; its text encoders leave memory at the end.

    Args:
        config: the settings as the user gave them.
        teacher: the text-to-image model.
        accelerator: the processes of the run.

    Returns:
        The settings with the resolution of the model if they had none, the data, and the prompts of the pictures.

    Raises:
        ValueError: the data can't be read, or a setting is not for text-to-image models.
    """
    check_text_settings(config)
    main, folder, pipeline = accelerator.is_main_process, Path(config.run.output_dir), teacher.pipeline
    if config.data.resolution is None:
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        config = replace(config, data=replace(config.data, resolution=[own]))
    shared: dict[str, Any] = {
        "folder": folder / RunFiles.TEXT,
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "wait": accelerator.wait_for_everyone,
        "say": tqdm.write if main else (lambda line: None),
        "show_progress": main,
    }
    pipeline.to(accelerator.device)
    if config.data.prompts is not None:
        prompts = read_prompts(Path(config.data.prompts))
    else:
        scanned, team = folder / RunFiles.SCANNED, Team(accelerator)
        images = ImageData(config.data, False, scanned, show_progress=main, captioned=True, team=team)
        prompts = images.captions or []
    shown = config.run.validation_prompts or list(dict.fromkeys(prompts))[:SHOWN]
    height, width = config.data.size
    with without_warnings():  # of long prompts, which the cache of the prompts names
        condition = encode_prompts(pipeline, shown, read_sizes(pipeline, len(shown), height, width))
    pictures = ShownPrompts(shown, condition, (height, width))
    if config.data.prompts is not None:
        scale, seed = teacher_scale(config), config.run.seed
        sampling = {"guidance_scale": scale, "seed": seed, "autocast": accelerator.autocast}
        data: TextData = PromptData(config.data, prompts, pipeline, **sampling, **shared)
    else:
        data = TextData(images, pipeline, vae_batch_size=config.model.vae_encode_batch_size, **shared)
    return config, data, pictures


def teacher_scale(config: Config) -> float:
    """The guidance scale of the teacher's samples: its one scale, or the middle of the range of drawn scales."""
    if config.options.draws_guidance:
        return (config.options.w_min + config.options.w_max) / 2
    return config.model.teacher_guidance_scale


def memory_line(teacher: TextModel, network: torch.nn.Module, averages: int) -> str:
    """A line on the memory of weights: copies x parameters x bytes.

    Args:
        teacher: the frozen base.
        network: the student.
        averages: number of averages, and of target networks.
    """
    base = sum(weight.numel() * weight.element_size() for weight in teacher.network.parameters())
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    copies = 4 + averages  # weights, gradients, two moments of Adam
    shared = "teacher and student share" if has_lora(network) else "the teacher has"
    return (
        f"Memory: {shared} one set of base weights of {_size(base)}; {copies} copies of {trained / 1e6:.3g} M trained"
        f" weights in 4 bytes are {_size(copies * trained * 4)}. Activations come on top."
    )


def _size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


@dataclass
class TextProduct(Product):
    """The model of a run that distils a text-to-image model: a LoRA with its scheduler, or a whole pipeline.

    Args:
        teacher: the text-to-image model.
        shown: the prompts of the pictures.
    """

    teacher: TextModel = field(kw_only=True)
    shown: ShownPrompts = field(kw_only=True)

    def __post_init__(self) -> None:
        self._of_teacher: np.ndarray | None = None

    def pipeline(self, weights: Mapping[str, Tensor]) -> DiffusionPipeline:
        """The pipeline of the teacher with the trained network and its scheduler; its encoders are gone."""
        scheduler = few_step_scheduler(self.config.method, self.teacher.pipeline.scheduler, self.objective)
        return student_pipeline(self.teacher.pipeline, network_with(self.objective.network, weights), scheduler)

    def draw(self, pipeline: DiffusionPipeline, samples: Path) -> tuple[dict[str, Path], dict[str, float]]:
        """Draw a grid of the shown prompts: the student at 1, 2, 4 and 8 steps, beside the teacher."""
        shown, columns = self.shown, []
        scale = guidance_input(self.config) or 1.0
        for steps in STEPS:
            images = self._images(pipeline, steps, scale)
            columns.append((f"{steps} step{'s' if steps > 1 else ''}", images))
        columns.append((f"teacher, {TEACHER_STEPS} steps", self._teacher_images()))
        save_prompt_grid(samples, shown.prompts, columns)
        return {"samples": samples}, {}

    def _teacher_images(self) -> np.ndarray:
        """The teacher's images of the shown prompts, made once."""
        if self._of_teacher is None:
            self._of_teacher = self._images(self.teacher.pipeline, TEACHER_STEPS, teacher_scale(self.config))
        return self._of_teacher

    def _images(self, pipeline: DiffusionPipeline, steps: int, scale: float) -> np.ndarray:
        """Images of the shown prompts, with the seeds 0, 1, 2, ..."""
        shown = self.shown
        return sample_prompts(pipeline, shown.condition, range(len(shown.prompts)), steps, scale, size=shown.size)

    def grids(self, pipeline: DiffusionPipeline, folder: Path) -> dict[str, dict[str, Any]]:
        """Draw the picture of the card into the model's `folder`."""
        file = Path("samples") / "prompts.png"
        self.draw(pipeline, folder / file)
        return {"prompts": {"file": str(file), "prompts": self.shown.prompts}}

    def facts(
        self, pipeline: DiffusionPipeline, run: RunSummary, grids: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The facts of the card as JSON values, from facts of the run and the result of `grids`."""
        return text_card_facts(self.config, self.objective, pipeline, run, grids)

    def card(self, facts: Mapping[str, Any], name: str, metrics: Path) -> ModelCard:
        """The card with the `name` of the model."""
        return text_card(facts, name)

    def save(
        self, pipeline: DiffusionPipeline, folder: Path, verify: bool, complete: Callable[[Path], object]
    ) -> None:
        """Save the LoRA with its scheduler, or with --fuse and for full weights the whole pipeline."""
        args = self.config.model
        base = {"revision": args.teacher_revision, "variant": args.teacher_variant, "loras": args.teacher_lora or []}
        if verify and is_packed(pipeline.unet):
            verify = False
            tqdm.write("The LoRA is not compared in a clean process: its base there has more bits than in training.")
        save = save_lora_model if has_lora(pipeline.unet) and not self.config.run.fuse else save_fused_model
        save(pipeline, folder, self.config.options.teacher, verify=verify, complete=complete, **base)

    def next_command(self, folder: Path) -> str:
        """The lines that use the saved model in `folder`."""
        return "Sample it in Python:\n" + usage(folder, self.config)
