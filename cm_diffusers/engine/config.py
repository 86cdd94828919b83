"""Settings of a run: frozen dataclasses, read from flags and from a YAML file with the same keys. Flags win."""

import argparse
import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from cm_diffusers.engine.commands import HelpFormatter, command, in_these_words, recipe_file
from cm_diffusers.engine.effects import replaced, say_replaced, without_effect
from cm_diffusers.engine.foreign_flags import INSTEAD
from cm_diffusers.engine.help_pages import methods_of, training_page
from cm_diffusers.engine.settings_files import read_yaml
from cm_diffusers.models import EDM_PRESETS, UNET_PRESETS
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.base import missing_teacher
from cm_diffusers.objectives.options import (
    SOME_STEPS,
    STEPS,
    Flag,
    Length,
    Options,
    check_for_latents,
    flags_of,
    option,
)
from cm_diffusers.scripts import WORDS


DEFAULT_HALF_LIFE = 500.0
LR_SCHEDULES = [
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "piecewise_constant", "polynomial"
]  # fmt: skip
OPTIMIZERS = ["adam", "adamw", "radam"]
EIGHT_BIT_ADAM = "bitsandbytes.optim:AdamW8bit"
STEP_RULES = r"({number}:\d+,)+{number}".format(number=r"\d+(?:\.\d+)?(?:[eE]-?\d+)?")
TIME_LABELS = ["log_sigma", "angle"]
USUAL = (  # settings that most runs change; the help shows them before the others
    "dataset_name", "train_data_dir", "class_conditional", "resolution", "random_flip", "model_preset",
    "pretrained_model_name_or_path", "vae_name_or_path", "output_dir", "seed", "max_train_steps", "num_train_epochs",
    "minutes", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "mixed_precision", "compile",
    "checkpointing_steps", "validation_steps", "search_levels", "report_to", "push_to_hub", "hub_model_id", "dry_run"
)  # fmt: skip
TEXT = (  # settings for text-to-image models and for adapters
    "caption_column", "prompts", "proportion_empty_prompts", "validation_prompts", "teacher_lora", "lora_rank",
    "lora_alpha", "lora_target_modules", "base_precision", "unet_time_cond_proj_dim", "fuse"
)  # fmt: skip
FOR_PROMPTS = ("prompts", "proportion_empty_prompts", "resolution", "max_train_samples")  # settings without images
BESIDE_TRAINING: dict[str, Any] = {"may_change": True, "in_recipe": False}  # settings that do not affect the weights


@dataclass(frozen=True)
class ModelArguments(Options):
    """The network, its starting weights, the teacher and the autoencoder. Each field is a flag with its help.

    Raises:
        ValueError: a value outside its range or choices, or a revision or variant without a pretrained model.
    """

    pretrained_model_name_or_path: str | None = option(
        None,
        "Start from this diffusion or consistency model (folder or Hub id). Default: new random weights, or the"
        " teacher's weights if there is a teacher.",
        place="path or Hub id",
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of --pretrained_model_name_or_path on the Hub. Default: the main branch.",
    )
    variant: str | None = option(
        None,
        "Variant of the weight files of --pretrained_model_name_or_path: fp16 reads files such as"
        " diffusion_pytorch_model.fp16.safetensors. Default: the files without a variant.",
    )
    model_preset: str = option("small", "Architecture and size of a new U-Net.", choices=[*UNET_PRESETS, *EDM_PRESETS])
    model_config_name_or_path: str | None = option(
        None,
        "Build a new UNet2DModel from this config (folder or Hub id) instead of --model_preset.",
        place="path or Hub id",
    )
    vae_name_or_path: str | None = option(
        None,
        "Train on the latents of this AutoencoderKL, AutoencoderTiny or VQModel (folder or Hub id). Default: the"
        " autoencoder of the teacher or the pretrained model, if it has one.",
        place="path or Hub id",
    )
    vae_encode_batch_size: int = option(
        64, "Number of images that the autoencoder encodes at once.", SOME_STEPS, may_change=True, in_recipe=False
    )
    dropout: float = option(0.0, "Dropout probability of the U-Net.", "[0, 0.99]")
    class_conditional: bool = option(False, "Train a class-conditional model on the labels of the dataset.")
    label_dropout: float = option(
        0.0,
        "Probability of replacing a class label with the null class, which enables classifier-free guidance. Only for"
        f" {', '.join(EDM_PRESETS)} and DiT.",
        "[0, 0.99]",
    )
    teacher_revision: str | None = option(
        None, "Branch, tag or commit of --pretrained_teacher_model on the Hub. Default: the main branch."
    )
    teacher_variant: str | None = option(
        None,
        "Variant of the weight files of --pretrained_teacher_model: fp16 reads files such as"
        " diffusion_pytorch_model.fp16.safetensors. Default: the files without a variant.",
    )
    teacher_lora: list[str] | None = option(
        None,
        "LoRAs (folders, files or Hub ids) that belong to a text-to-image teacher; they are fused into its weights.",
        place="path or Hub id",
    )
    time_label: str | None = option(
        None,
        "Time input of a new network: log_sigma is 250 ln(sigma) and loads with stock diffusers; angle is bounded and"
        " changes slowly. Default: log_sigma. TrigFlow and flow models define their own time input.",
        choices=TIME_LABELS,
        told_by_data=True,
    )
    from_scratch: bool = option(False, "Start the student from new random weights instead of the teacher's weights.")
    teacher_guidance_scale: float = option(
        1.0,
        "Scale w of the teacher's classifier-free guidance, D_null + w (D - D_null); 1 is no guidance. The teacher"
        " needs a null class: a DiT, or a model trained with --label_dropout.",
        "[0, 100]",
    )
    sigma_data: float | None = option(
        None,
        "Root mean square of the training data, with images in [-1, 1]. Default: measured on the dataset.",
        "[1e-3, 1e3]",
        told_by_data=True,
    )
    gradient_checkpointing: bool = option(
        False, "Save memory by recomputing activations in the backward pass, which takes longer.", may_change=True
    )

    lora_rank: int | None = option(
        None, "Train a low-rank adapter (LoRA) of this rank. Default: train all weights.", "[1, 1e5]"
    )
    lora_alpha: float | None = option(
        None, "Scale of the LoRA, whose update is multiplied by alpha / rank. Default: --lora_rank.", "(0, 1e6]"
    )
    lora_target_modules: list[str] | None = option(
        None,
        "Ends of the names of the layers that the LoRA changes. Default: those of LCM-LoRA, which are the attention,"
        " feed-forward, convolution and time projection layers.",
    )
    base_precision: str | None = option(
        None,
        "Precision of the frozen weights below a LoRA; fp16 and bf16 need the same --mixed_precision, and nf4 needs"
        " bitsandbytes. Default: the one of --mixed_precision.",
        choices=["no", "fp16", "bf16", "int8", "nf4"],
    )
    unet_time_cond_proj_dim: int | None = option(
        None,
        "Give the student an input of this size for the guidance scale, as LCM does. Needs --w_max and all weights.",
        "[4, 1e5]",
    )

    _argument_group_name = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_alpha", "lora_target_modules", "base_precision"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise ValueError(f"{name} is for a LoRA. Give --lora_rank as well, or leave it out.")
        if self.unet_time_cond_proj_dim is not None and self.lora_rank is not None:
            raise ValueError(
                "unet_time_cond_proj_dim and lora_rank can't be combined, because a LoRA has no new inputs. Leave one"
                " of them out."
            )
        for name in ("revision", "variant"):
            if getattr(self, name) is not None and self.pretrained_model_name_or_path is None:
                raise ValueError(
                    f"{name} needs --pretrained_model_name_or_path, which is not given. Give both or neither."
                )


@dataclass(frozen=True)
class DataArguments(Options):
    """The dataset and how its images are read. Each field is a flag with its help.

    Raises:
        ValueError: a value outside its range or choices, no dataset or two, or options that exclude each other.
    """

    dataset_name: str | None = option(
        None,
        "Dataset: a Hub id, a parquet file, a folder of parquet files or images, or digits (from scikit-learn). Give"
        " either this or --train_data_dir.",
        may_change=True,
        place="path or Hub id",
        words=("digits",),
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a Hub dataset that has several. Default: its default configuration."
    )
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset. Default: the main branch.")
    train_data_dir: str | None = option(
        None,
        "Folder of images, with a subfolder for each class if there are classes. Give either this or --dataset_name.",
        may_change=True,
        place="path",
    )
    split: str = option("train", "Split of the dataset to read.")
    image_column: str | None = option(None, "Dataset column of the images. Default: detected.")
    label_column: str | None = option(None, "Dataset column of the class labels. Default: detected.")
    caption_column: str | None = option(
        None, "Dataset column of the captions, for text-to-image models. Default: detected."
    )
    prompts: str | None = option(
        None,
        "File with a prompt in each line, to train a text-to-image model without images, on samples of its teacher."
        " Give either this or a dataset.",
        may_change=True,
        place="path",
    )
    proportion_empty_prompts: float = option(
        0.0, "Probability of replacing a caption with the empty prompt.", "[0, 1]", for_training=True
    )
    resolution: list[int] | None = option(
        None,
        "Size of the images in pixels: one number for a square, or height and width. Default: the size of the first"
        " image.",
        "[1, 1e6]",
        told_by_data=True,
    )
    channels: int | None = option(
        None,
        "Number of image channels: 1 for grey, 3 for RGB. Default: detected.",
        choices=[1, 3],
        told_by_data=True,
    )
    random_flip: bool = option(
        False,
        "Flip each image left to right with probability 0.5.",
        for_training=True,
        images_only="mirrored latents are not the latents of the mirrored image",
    )
    random_crop: bool = option(
        False,
        "Crop each resized image at a new random place in every training step. Default: crop the centre.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    aspect_ratio_buckets: bool = option(
        False,
        "Crop each image to the nearest of several aspect ratios from 1:2 to 2:1, with about as many pixels as"
        " --resolution. All images of a training step have the same shape.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    augment: float = option(
        0.0,
        "Probability of each of EDM's augmentations (mirror, scale, rotate, stretch, shift), whose parameters the"
        f" network receives; 0 is no augmentation. Only for {', '.join(EDM_PRESETS)}.",
        "[0, 1]",
        for_training=True,
        images_only="rotated latents are not the latents of the rotated image",
    )
    max_train_samples: int | None = option(
        None, "Use only the first images of the dataset, at most this many. Default: all.", SOME_STEPS
    )
    extra_datasets: list[str] | None = option(
        None,
        "Further datasets to train on, each given in any form that --dataset_name takes. Default: none.",
        place="path or Hub id",
        words=("digits",),
    )
    dataset_weights: list[float] | None = option(
        None,
        "Relative frequency of images from the first dataset and from each of --extra_datasets, in this order."
        " Default: the sizes of the datasets.",
        "(0, 1e6]",
        for_training=True,
    )
    max_image_pixels: int | None = option(
        None,
        "Refuse images with more pixels than this number; raise it to read very large images. Default: 178956970, the"
        " limit of Pillow.",
        SOME_STEPS,
        may_change=True,
    )
    streaming: bool = option(
        False,
        "Read the dataset row by row during training instead of loading it before training.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    cache_latents: bool = option(
        False,
        "Save the encoded latents to latents.safetensors in --output_dir, so that a resumed run need not encode the"
        " images again.",
        may_change=True,
        for_training=True,
    )
    dataloader_num_workers: int = option(
        0, "Number of processes that load images; 0 loads them in the training process.", "[0, 1024]", may_change=True
    )

    _argument_group_name = "data"

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of `resolution`, in pixels."""
        return None if self.resolution is None else (self.resolution[0], self.resolution[-1])

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = [name for name in ("dataset_name", "train_data_dir", "prompts") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                "Give exactly one of dataset_name and train_data_dir (or prompts, for a text-to-image model);"
                f" got {' and '.join(sources) or 'none'}."
            )
        if self.prompts is not None:
            changed = [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]
            needing = [name for name in changed if name not in FOR_PROMPTS]
            if needing:
                raise ValueError(f"{needing[0]} needs images, and prompts has none. Leave one of them out.")
        if self.dataset_revision is not None and (self.dataset_name is None or Path(self.dataset_name).exists()):
            raise ValueError(
                f"dataset_revision {self.dataset_revision!r} needs a Hub dataset as --dataset_name. Leave it out for"
                " local data."
            )
        if self.resolution is not None and len(self.resolution) > 2:
            raise ValueError(f"resolution takes one or two numbers, got {self.resolution}.")
        if self.aspect_ratio_buckets and (self.streaming or self.random_crop or self.dataset_weights):
            other = next(name for name in ("streaming", "random_crop", "dataset_weights") if getattr(self, name))
            raise ValueError(f"aspect_ratio_buckets and {other} can't be combined. Leave one of them out.")
        extra, weights = len(self.extra_datasets or []), self.dataset_weights
        if extra and self.streaming:
            raise ValueError("extra_datasets and streaming can't be combined. Leave one of them out.")
        if weights is not None and (not extra or len(weights) != 1 + extra):
            raise ValueError(
                f"dataset_weights needs {1 + extra} numbers, one for the first dataset and one for each of the {extra}"
                f" --extra_datasets; got {len(weights)}."
            )


@dataclass(frozen=True)
class RunArguments(Options):
    """Length, optimiser, precision, checkpoints and publication of a run. Each field is a flag with its help.

    Raises:
        ValueError: a value outside its range or choices, or options that exclude or need each other.
    """

    output_dir: str = option(
        "runs/model",
        "Folder for everything that the run writes. The same command resumes a stopped run from this folder.",
        may_change=True,
        place="path",
    )
    seed: int = option(0, "Seed of all random numbers of the run.", STEPS)
    max_train_steps: int = option(10_000, "Number of optimiser steps.", SOME_STEPS, may_change=True)
    num_train_epochs: int | None = option(
        None,
        "Number of passes over the images, which sets the length of the run instead of --max_train_steps.",
        SOME_STEPS,
        may_change=True,
        in_recipe=False,
    )
    minutes: float | None = option(
        None,
        "Duration of the whole run in minutes. The speed of the first steps determines --max_train_steps.",
        "(0, 1e6]",
        may_change=True,
        in_recipe=False,
    )
    train_batch_size: int = option(
        64, "Number of images in each forward pass of each process.", SOME_STEPS, may_change=True
    )
    gradient_accumulation_steps: int = option(
        1, "Number of forward passes in each optimiser step (gradient accumulation).", SOME_STEPS, may_change=True
    )
    learning_rate: float = option(1e-4, "Peak learning rate, reached at the end of the warm-up.", "[1e-12, 1e3]")
    lr_scheduler: str = option("constant_with_warmup", "Learning-rate schedule.", choices=LR_SCHEDULES)
    lr_warmup_steps: Length = option(
        0,
        "Number of steps of the linear learning-rate warm-up. A value below 1 is a share of the run.",
        STEPS,
    )
    lr_num_cycles: int = option(1, "Number of cosine cycles of --lr_scheduler cosine_with_restarts.", "[1, 1e6]")
    lr_power: float = option(1.0, "Exponent of the decay of --lr_scheduler polynomial.", "[1e-3, 1e3]")
    lr_step_rules: str | None = option(
        None,
        "Factors of the learning rate for --lr_scheduler piecewise_constant, each but the last with the step where it"
        " ends. Example: 1:1000,0.1:2000,0.01.",
    )
    optimizer: str = option(
        "radam",
        f"Optimiser: {', '.join(OPTIMIZERS)}, or module:Class for a class of an installed package, for example"
        " torch.optim:NAdam.",
    )
    use_8bit_adam: bool = option(False, f"Use 8-bit AdamW, the same as --optimizer {EIGHT_BIT_ADAM}.")
    adam_beta1: float = option(0.9, "Decay rate beta1 of the optimiser's mean of gradients.", "[0, 1)")
    adam_beta2: float = option(0.999, "Decay rate beta2 of the optimiser's mean of squared gradients.", "[0, 1)")
    adam_epsilon: float = option(1e-8, "Epsilon in the denominator of the optimiser's update.", "[0, 1]")
    adam_weight_decay: float = option(0.0, "Weight decay of the optimiser.", "[0, 1e3]")
    max_grad_norm: float = option(0.0, "Clip the norm of the gradient to this value; 0 disables clipping.", "[0, inf]")
    max_skipped_steps: int = option(
        20,
        "Stop when more than this many successive steps have a non-finite loss or gradient. Such a step changes no"
        " weights.",
        STEPS,
        may_change=True,
    )
    mixed_precision: str | None = option(
        None,
        "Precision of the network's forward and backward passes; no is float32. Default: the choice of accelerate"
        " launch; without one, no on a CPU, and on a GPU fp16 for methods that compare neighbouring noise levels and"
        " bf16 for the others.",
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = option(
        True,
        "Compute float32 products and convolutions on a GPU in TF32, which is faster and keeps 10 of 23 mantissa bits,"
        " like fp16. --allow_tf32 false keeps all of them, and so does --deterministic.",
        may_change=True,
    )
    deterministic: bool = option(
        False,
        "Repeat the weights of a run bit for bit on a GPU as well, which is slower: use only algorithms that repeat"
        " their results. Data and random numbers repeat without it on any device, and weights on a CPU.",
        may_change=True,
    )
    compile: bool = option(
        False, "Compile the network, its teacher and its target network with torch.compile.", may_change=True
    )
    ema_half_life: list[float] | None = option(
        None,
        "Half-lives of exponential moving averages (EMA) of the weights, in thousands of images; the first average is"
        " exported. Default: 500, unless --ema_decay is given.",
        "[1e-6, 1e9]",
    )
    ema_rampup: float = option(
        0.05,
        "Limit each half-life of --ema_half_life to this share of the images seen so far; 0 sets no limit.",
        "[0, 1]",
    )
    ema_decay: list[float] | None = option(
        None, "Constant decays of exponential moving averages of the weights, for each step. Default: none.", "[0, 1)"
    )
    export_weights: str = option(
        "ema",
        "Weights of the saved pipeline: ema is their first average, online the trained weights themselves.",
        choices=["ema", "online"],
        may_change=True,
    )
    search_levels: list[int] | None = option(
        None,
        "After training, search the best noise levels for these numbers of sampling steps, for example 2 4, and save"
        " them with the model. Default: no search.",
        "[2, 10]",
        may_change=True,
        in_recipe=False,
    )
    fuse: bool = option(
        False,
        "Save the whole pipeline with the LoRA fused into its weights, instead of the LoRA alone.",
        may_change=True,
    )
    export_variant: str | None = option(
        None,
        "Save a second copy of the weights in this precision, for from_pretrained(variant=...). Default: none.",
        choices=["fp16", "bf16"],
        may_change=True,
    )
    checkpointing_steps: int = option(1000, "Number of steps between checkpoints.", SOME_STEPS, may_change=True)
    checkpoints_total_limit: int = option(
        2,
        "Number of checkpoints to keep. An older one replaces the newest if that is damaged.",
        "[2, 1e12]",
        may_change=True,
    )
    validation_steps: int = option(
        1000, "Number of steps between grids of samples; 0 draws no grids.", STEPS, may_change=True
    )
    validation_prompts: list[str] | None = option(
        None,
        "Prompts of the pictures of a text-to-image model. Default: the first four different prompts of the data.",
        **BESIDE_TRAINING,
    )
    logging_steps: int = option(50, "Number of steps between lines of the log.", SOME_STEPS)
    push_to_hub: bool = option(False, "Publish the model with its model card on the Hub.", **BESIDE_TRAINING)
    hub_model_id: str | None = option(
        None,
        "Hub repository for --push_to_hub, as user/name or name. Default: the name of the folder --output_dir.",
        **BESIDE_TRAINING,
    )
    hub_private_repo: bool = option(
        False, "Make the Hub repository private if --push_to_hub creates it.", **BESIDE_TRAINING
    )
    hub_strategy: str = option(
        "end",
        "When to push to the Hub: end pushes the model after training, every_save also pushes it at each checkpoint,"
        " with all that a resumed run needs.",
        choices=["end", "every_save"],
        **BESIDE_TRAINING,
    )
    hub_timeout: float = option(
        120.0,
        "Number of seconds to keep trying to push after training while the Hub is unreachable.",
        "[0, 1e9]",
        **BESIDE_TRAINING,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Go back to this checkpoint of --output_dir, for example checkpoint-1000, and set newer ones aside. Default:"
        " latest, the newest one.",
        words=("latest",),
        **BESIDE_TRAINING,
    )
    resume_from_hub: str | None = option(
        None,
        "Resume from the newest checkpoint in this Hub model repository if --output_dir holds none. A run with"
        " --hub_strategy every_save pushes such checkpoints.",
        place="Hub id",
        **BESIDE_TRAINING,
    )
    allow_data_change: bool = option(
        False,
        "Resume even if the images, their order or their classes have changed since the checkpoint.",
        **BESIDE_TRAINING,
    )
    report_to: list[str] | None = option(
        None,
        "Experiment trackers of Accelerate: one or several of tensorboard, wandb, trackio and others, or all, or none."
        " Default: none.",
        **BESIDE_TRAINING,
    )
    logging_dir: str = option(
        "tracker",
        "Folder for the files of the trackers. A relative path is inside --output_dir.",
        place="path",
        **BESIDE_TRAINING,
    )
    tracker_project_name: str = option("cm_diffusers", "Name of the project in the trackers.", **BESIDE_TRAINING)
    dry_run: bool = option(False, "Print the resolved settings as YAML and stop without training.", **BESIDE_TRAINING)

    _argument_group_name = "run"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("ema_decay", self.ema_decay or []), ("ema_half_life", self.ema_half_life or [])):
            if len({f"{value:g}" for value in values}) < len(values):
                raise ValueError(f"{name} must be values that differ in their first six digits; got {values}.")
        if self.optimizer not in OPTIMIZERS and not re.fullmatch(r"[\w.]+:\w+", self.optimizer):
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or module:Class such as torch.optim:NAdam; got"
                f" {self.optimizer!r}."
            )
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError(
                "lr_scheduler piecewise_constant and lr_step_rules need each other. Give both or neither; got"
                f" lr_scheduler {self.lr_scheduler} and lr_step_rules {self.lr_step_rules}."
            )
        if self.lr_step_rules is not None and not re.fullmatch(STEP_RULES, self.lr_step_rules):
            raise ValueError(
                "lr_step_rules must be factors, each but the last with the step where it ends, for example"
                f" 1:1000,0.1:2000,0.01; got {self.lr_step_rules!r}."
            )
        if self.resume_from_checkpoint not in (None, "latest") and not re.fullmatch(
            r"checkpoint-\d+", Path(self.resume_from_checkpoint).name
        ):
            raise ValueError(
                "resume_from_checkpoint must be latest or the name of a checkpoint such as checkpoint-1000; got"
                f" {self.resume_from_checkpoint!r}."
            )
        if self.report_to and "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(
                f"report_to none can't be combined with trackers; got {' '.join(self.report_to)}. Give either."
            )

    @property
    def trackers(self) -> list[str]:
        """The trackers of `report_to`, empty for none. "all" stays one name, to be resolved later."""
        return [] if self.report_to in (None, ["none"]) else list(self.report_to)

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> "RunArguments":
        """These settings with values in place of None and of shares of the run.

        Args:
            total_steps: the number of steps of the run.
            pretrained: whether the run starts from a trained network.
            dimensions: the number of values in a sample, None if unknown.
        """
        run = super().resolved(total_steps, pretrained, dimensions)
        if self.use_8bit_adam:
            run = replace(run, optimizer=EIGHT_BIT_ADAM, use_8bit_adam=False)
        if self.ema_half_life is None and not self.ema_decay:
            run = replace(run, ema_half_life=[DEFAULT_HALF_LIFE])
        if self.push_to_hub and self.hub_model_id is None:
            run = replace(run, hub_model_id=Path(self.output_dir).resolve().name)
        return run


@dataclass(frozen=True)
class Known:
    """Facts about the data and the network that determine defaults. None means not known yet.

    Args:
        resolution: (height, width) of the images in pixels.
        channels: the number of image channels.
        dimensions: the number of values in a sample (an image or its latents).
        time_label: the time input of a new network; None for a saved network, which defines its own.
    """

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    dimensions: int | None = None
    time_label: str | None = None


@dataclass(frozen=True)
class Config:
    """All settings of a run: the method, its own options, and the options that all methods share.

    `notes` lists the settings of the config file that flags replaced. A resolved config (see `resolved`) keeps the
    settings as given in `given`, and the facts used in `known`. Checkpoints store the settings as given, so that
    defaults and shares follow the length of the run. Users and programs see the resolved values.
    """

    method: str
    options: Any
    model: ModelArguments
    data: DataArguments
    run: RunArguments
    notes: tuple[str, ...] = field(default=(), compare=False)
    known: Known = field(default=Known(), compare=False)
    given: "Config | None" = field(default=None, compare=False, repr=False)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The dataclasses of the data, the model, the method and the run, in this order."""
        return (self.data, self.model, self.options, self.run)

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flag names."""
        return {"method": self.method, **{key: value for part in self.parts for key, value in asdict(part).items()}}

    def defaults(self) -> dict[str, Any]:
        """The default values of all settings by their flag names."""
        return {f.name: f.default for part in self.parts for f in fields(part)}

    def resolved(self, known: Known | None = None) -> "Config":
        """These settings with values in place of shares of the run, and of None where a value can be derived.

        Args:
            known: facts about the data and the network; None uses the facts known so far.

        Raises:
            ValueError: the resolved values contradict each other.
        """
        given, known = self.given or self, known or self.known
        taught = given.options.teacher is not None and not given.model.from_scratch
        pretrained = given.model.pretrained_model_name_or_path is not None or taught
        total, data, model = given.run.max_train_steps, given.data, given.model
        if data.resolution is None and known.resolution is not None:
            data = replace(data, resolution=list(known.resolution))
        if data.channels is None:
            data = replace(data, channels=known.channels)
        if model.time_label is None and known.time_label in TIME_LABELS:
            model = replace(model, time_label=known.time_label)
        options = given.options.resolved(total, pretrained, known.dimensions)
        run = given.run.resolved(total, pretrained, known.dimensions)
        return replace(given, options=options, model=model, data=data, run=run, known=known, given=given)

    def with_settings(self, settings: Mapping[str, Any]) -> "Config":
        """The given settings with some values replaced, resolved with the facts known so far.

        Args:
            settings: new values by their flag names; other names are ignored.

        Raises:
            ValueError: a value is outside its range, or the settings contradict each other.
        """
        parts = {}
        for name in ("options", "model", "data", "run"):
            part = getattr(self.given or self, name)
            parts[name] = replace(part, **{f.name: settings[f.name] for f in fields(part) if f.name in settings})
        return replace(self.given or self, **parts).resolved(self.known)

    def flags(self) -> Mapping[str, Flag]:
        """The declaration of each setting (range, place, ...) by its flag name."""
        return flags_of(*self.parts)

    def to_yaml(self) -> str:
        """The settings as YAML that `--config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, HelpFormatter):
    """Append defaults to help texts, and show switches by their first name alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "true|false" if action.type is string_to_bool else super()._get_default_metavar_for_optional(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings[0].startswith("--") or action.nargs == 0:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if action.type is string_to_bool and action.default is False:
            return name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class _Parser(HfArgumentParser):
    """An argument parser that raises ValueErrors and groups its help into titled sections."""

    sections: Mapping[str, Sequence[str]] = {}
    methods: Sequence[str] = ()

    def format_help(self) -> str:
        """The text of `--help`, in sections if the parser has any."""
        if not self.sections:
            return super().format_help()
        own, shared = self.format_sections(True), self.format_sections(False)
        return training_page(self.prog, self.description or "", self.methods, self.get_default("method"), own, shared)

    def format_sections(self, own: bool) -> str:
        """The help for the options of the method (`own`), or for the options that all methods share."""
        formatter = self._get_formatter()
        actions = {action.dest: action for action in reversed(self._actions)}  # a switch, not its --no_ form
        for title, names in list(self.sections.items())[:1] if own else list(self.sections.items())[1:]:
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        return formatter.format_help()

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, part: Field) -> None:
        """Pass the metadata of a field to argparse, without our own declaration "flag"."""
        part = copy.copy(part)
        part.metadata = {key: value for key, value in part.metadata.items() if key != "flag"}
        HfArgumentParser._parse_dataclass_field(parser, part)

    def error(self, message: str) -> NoReturn:
        """Raise the message instead of ending the program.

        Raises:
            ValueError: always.
        """
        raise ValueError(re.sub(r"argument (--\w+)(/--[\w-]+)*", r"\1", message))


def _own_option(name: str, methods: Sequence[str], method: str) -> str:
    """An error message for the unknown flag `name`, with the most likely intended option."""
    others = [m for m in OBJECTIVES if m != method and name in {f.name for f in fields(OBJECTIVES[m].Options)}]
    own = [f.name for f in fields(OBJECTIVES[method].Options)]
    if name in INSTEAD:
        return f"Unknown option {name!r}: {in_these_words(INSTEAD[name])}."
    if others:
        return f"{name!r} is an option of {', '.join(others)}; {method} ignores it. Its own are: {', '.join(own)}."
    known = own + [f.name for cls in (ModelArguments, DataArguments, RunArguments) for f in fields(cls)]
    near = difflib.get_close_matches(name, [*known, "config", "method"], n=1)
    return f"Unknown option {name!r}." + (
        f" Did you mean {near[0]!r}?" if near else f" See --help for all options of {method}."
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path, named=True)
    except OSError as error:
        raise ValueError(f"config {path}: can't be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"config {path}: the file must hold `key: value` lines.")
    if "config" in values:
        raise ValueError(f"config {path}: config names another file. Files can't include others; remove this line.")
    return values


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _check_form(key: str, value: Any, parser: _Parser) -> None:
    """Raise ValueError if a value of a config file has the wrong form, such as a list for a single value."""
    action = next((action for action in parser._actions if f"--{key}" in action.option_strings), None)
    if action is None or value is None:
        return
    many, takes_flag = action.nargs in ("+", "*"), action.type is string_to_bool
    if isinstance(value, list) and not many:
        raise ValueError(f"{key} takes one value, got a list: {value!r:.80}.")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (dict, list, set, tuple)) or item is None:
            raise ValueError(f"{key} takes {'single values' if many else 'one value'}; got {item!r:.80}.")
        if isinstance(item, bool) and not takes_flag:
            raise ValueError(
                f"{key} is {item} here, as YAML reads yes, no, on and off as booleans. Put the word in quotes."
            )
    if value == []:
        raise ValueError(f"{key} is an empty list. Give a value, or remove the key to use the default.")


def _parse(parser: _Parser, flags: list[str], methods: Sequence[str], method: str) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(flags)
    for flag in unknown:
        if flag.startswith("--"):
            raise ValueError(_own_option(flag[2:].split("=")[0].replace("-", "_"), methods, method))
    if unknown:
        raise ValueError(f"Unexpected argument {unknown[0]!r}. Options start with --; see --help.")
    return namespace


def parse_groups(argv: Sequence[str], groups: Sequence[type], script: str, description: str) -> tuple[Any, ...]:
    """Read the command line of a script into dataclasses of settings.

    Args:
        argv: the command line without the program's name.
        groups: dataclasses of `option` fields; one instance of each is returned, in this order.
        script: the name of the script, for `--help`.
        description: the text at the top of `--help`.

    Raises:
        ValueError: an unknown flag, a wrong type, or a value outside its range.
    """
    prog = command(script)
    parser = _Parser(groups, prog=prog, usage=f"{prog} [options]", description=description, allow_abbrev=False)
    parser.formatter_class = _HelpFormatter
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [f"--{f.name}" for cls in groups for f in fields(cls)]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"Unknown option {unknown[0]!r}." + (f" Did you mean {near[0]!r}?" if near else " See --help.")
        )
    return tuple(cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)}) for cls in groups)


def sections_of(method: str) -> dict[str, list[str]]:
    """The sections of a training script's help, as option names by title. The options of `method` come first."""
    shared = [f.name for cls in (DataArguments, ModelArguments, RunArguments) for f in fields(cls)]
    return {
        f"options of {method}": [f.name for f in fields(OBJECTIVES[method].Options)],
        "usual options": [name for name in shared if name in USUAL],
        "options for text-to-image models and for LoRA": list(TEXT),
        "further options": ["help", *(name for name in shared if name not in (*USUAL, *TEXT))],
    }


def parser_of_training(method: str, methods: Sequence[str], description: str = "") -> _Parser:
    """The argument parser of a training script for one of its methods.

    Args:
        method: the method whose options the parser accepts.
        methods: all methods of the script; the first is its default.
        description: the text at the top of `--help`.
    """
    groups = (OBJECTIVES[method].Options, DataArguments, ModelArguments, RunArguments)
    fitting = [name for name in WORDS if methods[0] in methods_of(name)]
    script = next((name for name in fitting if methods_of(name) == list(methods)), [*fitting, "train_consistency"][0])
    parser = _Parser(groups, prog=command(script), description=description, allow_abbrev=False)
    parser.formatter_class = _HelpFormatter
    parser.add_argument(
        "--config", help="YAML file with the same keys as the flags, or the name of a recipe. Flags win."
    )
    parser.add_argument("--method", choices=methods, default=method, help="Method to train.")
    parser.sections, parser.methods = sections_of(method), methods
    return parser


def parse_config(argv: Sequence[str], methods: Sequence[str], description: str) -> Config:
    """Read the settings of a training script from its command line.

    A flag wins over the config file. It also replaces the settings of the file that answer the same question: for
    example, a dataset given as a flag replaces the dataset of the file with its columns and split.

    Args:
        argv: the command line without the program's name.
        methods: the methods that the script trains; the first is the default.
        description: the text at the top of `--help`.

    Raises:
        ValueError: an unknown option (the message names the nearest one), a wrong type, a value outside its range, or
            an option that has no effect with the chosen method or in this run.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--method")
    chosen, rest = first.parse_known_args(list(argv))
    from_file = _read_settings(recipe_file(chosen.config)) if chosen.config else {}
    named = from_file.pop("method", None)
    method = chosen.method or named or methods[0]
    if method not in methods:
        where = "" if chosen.method else f"config {chosen.config}: "
        raise ValueError(f"{where}Unknown method {method!r}; this script trains: {', '.join(methods)}.")

    groups = (OBJECTIVES[method].Options, DataArguments, ModelArguments, RunArguments)
    parser = parser_of_training(method, methods, description)
    for key, value in from_file.items():
        try:
            _check_form(key, value, parser)
            _parse(parser, _as_flags({key: value}), methods, method)
        except ValueError as error:
            raise ValueError(f"config {chosen.config}: {error}") from None
    _parse(parser, _as_flags(from_file) + rest, methods, method)  # handles --help, refuses words without a flag
    defaults = vars(parser.parse_args([]))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    in_file, flags = (vars(parser.parse_args(words)) for words in (_as_flags(from_file), rest))
    in_file = {name: value for name, value in in_file.items() if value != defaults[name]}
    for part in (in_file, flags):
        part.pop("method", None)
    found, idle = {}, replaced(flags, in_file)
    while True:
        found |= idle
        kept = {name: value for name, value in in_file.items() if name not in found}
        values = defaults | kept | flags | {"method": method}
        given = dict.fromkeys(kept, False) | dict.fromkeys(flags, True)
        idle, faults = without_effect(values, given)
        if not idle:
            break
    try:
        options, data, model, run = (cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in groups)
        if faults:
            raise ValueError("\n  ".join(faults))
        _check_together(method, options, data, model, run)
        config = Config(method, options, model, data, run)
        config.resolved()  # checks the resolved values
    except ValueError as error:
        from_there = any(re.search(rf"\b{name}\b", str(error)) for name in kept)
        raise ValueError(f"config {chosen.config}: {error}" if from_there else str(error)) from None
    return replace(config, notes=tuple(say_replaced(found, in_file, values)))


def _check_together(method: str, options: Any, data: DataArguments, model: ModelArguments, run: RunArguments) -> None:
    """Raise ValueError for settings that do not fit the method, or that need a missing teacher."""
    cls, without_teacher = OBJECTIVES[method], options.teacher is None
    if cls.needs_teacher and without_teacher:
        raise ValueError(missing_teacher(method))
    for name, value in (("augment", data.augment), ("label_dropout", model.label_dropout)):
        if value and not cls.trains_teachers:
            teachers = [m for m, other in OBJECTIVES.items() if other.trains_teachers]
            raise ValueError(
                f"{name} is only for training teachers ({', '.join(teachers)}), not for {method}. Leave it out."
            )
    if model.from_scratch and (without_teacher or model.pretrained_model_name_or_path is not None):
        raise ValueError(
            "from_scratch needs --pretrained_teacher_model, and excludes --pretrained_model_name_or_path."
        )
    if model.teacher_guidance_scale != 1 and without_teacher:
        raise ValueError(
            f"teacher_guidance_scale {model.teacher_guidance_scale:g} needs --pretrained_teacher_model. Give a teacher"
            " or leave it out."
        )
    if model.teacher_guidance_scale != 1 and options.draws_guidance:
        raise ValueError(
            f"teacher_guidance_scale {model.teacher_guidance_scale:g} is one scale, and w_max draws scales. Give only"
            " one of them."
        )
    if model.vae_name_or_path is not None:
        check_for_latents(data, options)
    if run.fuse and model.lora_rank is None:
        raise ValueError("fuse is for a LoRA. Give --lora_rank as well, or leave it out.")
    if model.unet_time_cond_proj_dim is not None and not options.draws_guidance:
        raise ValueError("unet_time_cond_proj_dim needs --w_max, because one fixed scale needs no input.")
    if data.prompts is not None and without_teacher:
        raise ValueError("prompts needs --pretrained_teacher_model, whose samples take the place of images.")
    for name in ("teacher_revision", "teacher_variant", "teacher_lora"):
        if getattr(model, name) is not None and without_teacher:
            raise ValueError(f"{name} needs --pretrained_teacher_model, which is not given. Give both or neither.")
    if run.num_train_epochs is not None and data.streaming:
        raise ValueError(
            "num_train_epochs and streaming can't be combined, because the length of a stream is unknown. Give"
            " --max_train_steps instead."
        )
