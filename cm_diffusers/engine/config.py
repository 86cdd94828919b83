"""Settings of a run: frozen dataclasses, read from flags and from a YAML file with the same keys; flags win."""

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
USUAL = (  # what most runs set; the help shows the others behind them
    "dataset_name", "train_data_dir", "class_conditional", "resolution", "random_flip", "model_preset",
    "pretrained_model_name_or_path", "vae_name_or_path", "output_dir", "seed", "max_train_steps", "num_train_epochs",
    "minutes", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "mixed_precision", "compile",
    "checkpointing_steps", "validation_steps", "search_levels", "report_to", "push_to_hub", "hub_model_id", "dry_run"
)  # fmt: skip
BESIDE_TRAINING: dict[str, Any] = {"may_change": True, "in_recipe": False}  # what a setting with this says of itself


@dataclass(frozen=True)
class ModelArguments(Options):
    pretrained_model_name_or_path: str | None = option(
        None,
        "Start from this diffusion or consistency model of the library or of diffusers: a folder or a Hub id.",
        place="path or Hub id",
    )
    revision: str | None = option(None, "Revision of the pretrained model on the Hub.")
    variant: str | None = option(
        None, "Which weights of the pretrained model: fp16 for files like diffusion_pytorch_model.fp16.safetensors."
    )
    model_preset: str = option("small", "Size of the U-Net.", choices=[*UNET_PRESETS, *EDM_PRESETS])
    model_config_name_or_path: str | None = option(
        None, "Config of a UNet2DModel to use instead of a preset.", place="path or Hub id"
    )
    vae_name_or_path: str | None = option(
        None,
        "Train on latents of this AutoencoderKL, AutoencoderTiny or VQModel: a folder or a Hub id. Default: that of"
        " the teacher, or of the pretrained model, if it has one.",
        place="path or Hub id",
    )
    vae_encode_batch_size: int = option(
        64, "Images that the autoencoder encodes at once.", SOME_STEPS, may_change=True
    )
    dropout: float = option(0.0, "Dropout probability of the U-Net.", "[0, 0.99]")
    class_conditional: bool = option(False, "Condition the model on the labels of the dataset.")
    label_dropout: float = option(
        0.0,
        f"How often a class label is left out, so that the model can be guided: {', '.join(EDM_PRESETS)}, and DiT.",
        "[0, 0.99]",
    )
    teacher_revision: str | None = option(None, "Revision of the teacher on the Hub.")
    teacher_variant: str | None = option(None, "Which weights of the teacher, as --variant.")
    time_label: str | None = option(
        None,
        "The network's time input: log_sigma (250 ln sigma; loads with stock diffusers; the default) or angle"
        " (bounded and slow). TrigFlow and flow models have their own.",
        choices=TIME_LABELS,
        told_by_data=True,
    )
    from_scratch: bool = option(False, "With a teacher: start from new weights, not from the teacher's.")
    teacher_guidance_scale: float = option(
        1.0,
        "Classifier-free guidance of the teacher, w in D_null + w (D - D_null); 1 for none. For teachers with a class"
        " for none (DiT, and those that were trained with --label_dropout).",
        "[0, 100]",
    )
    sigma_data: float | None = option(
        None,
        "Root mean square of the data, of images in [-1, 1]. Default: measured.",
        "[1e-3, 1e3]",
        told_by_data=True,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", may_change=True
    )

    _argument_group_name = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("revision", "variant"):
            if getattr(self, name) is not None and self.pretrained_model_name_or_path is None:
                raise ValueError(f"{name} is that of --pretrained_model_name_or_path, which is not given.")


@dataclass(frozen=True)
class DataArguments(Options):
    dataset_name: str | None = option(
        None,
        "A dataset on the Hub, a parquet file, a folder of parquet files or images, or 'digits' (scikit-learn's).",
        may_change=True,
        place="path or Hub id",
        words=("digits",),
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_revision: str | None = option(None, "Revision of the dataset on the Hub.")
    train_data_dir: str | None = option(
        None, "A folder of images (a folder per class), instead of dataset_name.", may_change=True, place="path"
    )
    split: str = option("train", "Split of the dataset.")
    image_column: str | None = option(None, "Column of the images. Default: detected.")
    label_column: str | None = option(None, "Column of the labels. Default: detected.")
    resolution: list[int] | None = option(
        None,
        "Side, or height and width, in pixels. Default: that of the first image.",
        "[1, 1e6]",
        told_by_data=True,
    )
    channels: int | None = option(None, "1 for grey, 3 for RGB. Default: detected.", choices=[1, 3], told_by_data=True)
    random_flip: bool = option(
        False,
        "Flip half of the images left to right.",
        for_training=True,
        images_only="mirrored latents are not those of the mirrored image",
    )
    random_crop: bool = option(
        False,
        "Crop resized images at a place drawn anew each time, not in the middle.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    aspect_ratio_buckets: bool = option(
        False,
        "Crop each image to the nearest of several shapes, from 1:2 to 2:1, of about as many pixels as --resolution"
        " says; all images of a step have one shape.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    augment: float = option(
        0.0,
        "Probability of each augmentation that the network is told of (EDM's: mirrored, scaled, turned, stretched,"
        f" shifted); 0 for none. For {', '.join(EDM_PRESETS)}.",
        "[0, 1]",
        for_training=True,
        images_only="turned latents are not those of the turned image",
    )
    max_train_samples: int | None = option(None, "Use only the first samples.", SOME_STEPS)
    extra_datasets: list[str] | None = option(
        None, "More datasets to train on: each what dataset_name may be.", place="path or Hub id", words=("digits",)
    )
    dataset_weights: list[float] | None = option(
        None,
        "How often images are drawn from the dataset and from each of --extra_datasets. Default: by their sizes.",
        "(0, 1e6]",
        for_training=True,
    )
    max_image_pixels: int | None = option(
        None,
        "Refuse images of more pixels; a great number lets large ones be read. Default: Pillow's, 178956970.",
        SOME_STEPS,
        may_change=True,
    )
    streaming: bool = option(
        False,
        "Read the dataset row by row in training, not as a whole before it.",
        for_training=True,
        images_only="images are encoded once, before training",
    )
    cache_latents: bool = option(
        False,
        "Keep the latents that images are encoded to in a file beside the run.",
        may_change=True,
        for_training=True,
    )
    dataloader_num_workers: int = option(0, "Processes that load images.", "[0, 1024]", may_change=True)

    _argument_group_name = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("Give exactly one of dataset_name and train_data_dir.")
        if self.dataset_revision is not None and (self.dataset_name is None or Path(self.dataset_name).exists()):
            raise ValueError("dataset_revision is for a dataset_name on the Hub.")
        if self.resolution is not None and len(self.resolution) > 2:
            raise ValueError(f"resolution takes one or two numbers, got {self.resolution}.")
        if self.aspect_ratio_buckets and (self.streaming or self.random_crop or self.dataset_weights):
            other = next(name for name in ("streaming", "random_crop", "dataset_weights") if getattr(self, name))
            raise ValueError(f"aspect_ratio_buckets and {other} don't go together; leave one of them out.")
        extra, weights = len(self.extra_datasets or []), self.dataset_weights
        if extra and self.streaming:
            raise ValueError("extra_datasets are read as a whole; leave out --streaming.")
        if weights is not None and (not extra or len(weights) != 1 + extra):
            raise ValueError(
                f"dataset_weights has {len(weights)} numbers; give one for the dataset and one for each of"
                f" --extra_datasets, of which there are {extra}."
            )


@dataclass(frozen=True)
class RunArguments(Options):
    output_dir: str = option(
        "runs/model",
        "Folder of the run. The same command resumes a run that was stopped.",
        may_change=True,
        place="path",
    )
    seed: int = option(0, "Every random number of the run follows from it.", STEPS)
    max_train_steps: int = option(10_000, "Number of optimiser steps.", SOME_STEPS, may_change=True)
    num_train_epochs: int | None = option(
        None,
        "Train for so many passes over the images, instead of --max_train_steps.",
        SOME_STEPS,
        may_change=True,
        in_recipe=False,
    )
    minutes: float | None = option(
        None,
        "Train for so many minutes, all included: the first steps are measured, and set --max_train_steps.",
        "(0, 1e6]",
        may_change=True,
        in_recipe=False,
    )
    train_batch_size: int = option(64, "Images per process and forward pass.", SOME_STEPS, may_change=True)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.", SOME_STEPS, may_change=True)
    learning_rate: float = option(1e-4, "Peak learning rate.", "[1e-12, 1e3]")
    lr_scheduler: str = option("constant_with_warmup", "Course of the learning rate.", choices=LR_SCHEDULES)
    lr_warmup_steps: Length = option(0, "Steps of linear warm-up, or below 1 their share of the run.", STEPS)
    lr_num_cycles: int = option(1, "Restarts of --lr_scheduler cosine_with_restarts.", "[1, 1e6]")
    lr_power: float = option(1.0, "Power of --lr_scheduler polynomial.", "[1e-3, 1e3]")
    lr_step_rules: str | None = option(
        None,
        "Of --lr_scheduler piecewise_constant: factors and the steps that they end at, as 1:1000,0.1:2000,0.01.",
    )
    optimizer: str = option(
        "radam",
        f"Optimiser: {', '.join(OPTIMIZERS)}, or a class of an installed package as module:Class, for example"
        " torch.optim:NAdam.",
    )
    use_8bit_adam: bool = option(False, f"The same as --optimizer {EIGHT_BIT_ADAM}.")
    adam_beta1: float = option(0.9, "First beta of the optimiser.", "[0, 1)")
    adam_beta2: float = option(0.999, "Second beta of the optimiser.", "[0, 1)")
    adam_epsilon: float = option(1e-8, "Epsilon of the optimiser.", "[0, 1]")
    adam_weight_decay: float = option(0.0, "Weight decay of the optimiser.", "[0, 1e3]")
    max_grad_norm: float = option(0.0, "Clip the gradient to this norm; 0 for no clipping.", "[0, inf]")
    max_skipped_steps: int = option(
        20, "Stop after more successive steps with a loss or gradient that is not finite.", STEPS, may_change=True
    )
    mixed_precision: str | None = option(
        None,
        "Default: fp16 or bf16 if accelerate launch was told so; else on a GPU by the method, fp16 where neighbouring"
        " noise levels are compared and bf16 elsewhere; without one no, float32.",
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = option(
        False, "Multiply float32 matrices in TF32 on a GPU: faster, with the mantissa of fp16.", may_change=True
    )
    compile: bool = option(False, "Compile the network with torch.compile.", may_change=True)
    ema_half_life: list[float] | None = option(
        None,
        "Half-lives of averages of the weights, in thousands of images. Default: 500, if no ema_decay is given.",
        "[1e-6, 1e9]",
    )
    ema_rampup: float = option(
        0.05, "No half-life is longer than this share of the images seen so far; 0 for no ramp.", "[0, 1]"
    )
    ema_decay: list[float] | None = option(None, "Decays of averages of the weights, constant.", "[0, 1)")
    export_weights: str = option(
        "ema",
        "Which weights the pipeline gets: their first average, or those that are trained.",
        choices=["ema", "online"],
        may_change=True,
    )
    search_levels: list[int] | None = option(
        None,
        "After training, find the best noise levels for so many steps, as 2 4, on the images of the run, and save them"
        " with the model.",
        "[2, 10]",
        may_change=True,
        in_recipe=False,
    )
    export_variant: str | None = option(
        None,
        "Save the model in this precision, too, for from_pretrained(variant=...).",
        choices=["fp16", "bf16"],
        may_change=True,
    )
    checkpointing_steps: int = option(1000, "Steps between checkpoints.", SOME_STEPS, may_change=True)
    checkpoints_total_limit: int = option(
        2,
        "How many checkpoints are kept; more than one, as the newest may be found damaged.",
        "[2, 1e12]",
        may_change=True,
    )
    validation_steps: int = option(1000, "Steps between sample grids; 0 for none.", STEPS, may_change=True)
    logging_steps: int = option(50, "Steps between lines of the log.", SOME_STEPS)
    push_to_hub: bool = option(False, "Publish the model on the Hub, with a card.", **BESIDE_TRAINING)
    hub_model_id: str | None = option(
        None, "Where: user/name, or a name. Default: the name of output_dir.", **BESIDE_TRAINING
    )
    hub_private_repo: bool = option(False, "If the repository has to be made, make it private.", **BESIDE_TRAINING)
    hub_strategy: str = option(
        "end",
        "When: at the end, or at each checkpoint, too, with what is needed to resume.",
        choices=["end", "every_save"],
        **BESIDE_TRAINING,
    )
    hub_timeout: float = option(
        120.0, "Seconds to keep trying after training while the Hub is out of reach.", "[0, 1e9]", **BESIDE_TRAINING
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Go back to a checkpoint of output_dir, as checkpoint-1000: newer ones are set aside. latest is the default:"
        " the same command resumes by itself.",
        words=("latest",),
        **BESIDE_TRAINING,
    )
    resume_from_hub: str | None = option(
        None,
        "Where output_dir holds no checkpoint, resume from the newest that a run with --hub_strategy every_save left"
        " in this model repository.",
        place="Hub id",
        **BESIDE_TRAINING,
    )
    allow_data_change: bool = option(
        False,
        "Resume although the images, their order or their classes are not those that the run was trained on.",
        **BESIDE_TRAINING,
    )
    report_to: list[str] | None = option(
        None,
        "Trackers that Accelerate knows: one or several of tensorboard, wandb, trackio, ...; or all, or none.",
        **BESIDE_TRAINING,
    )
    logging_dir: str = option(
        "tracker", "Folder below output_dir, or another, for the files of trackers.", place="path", **BESIDE_TRAINING
    )
    tracker_project_name: str = option("cm_diffusers", "Project of the run in the tracker.", **BESIDE_TRAINING)
    dry_run: bool = option(False, "Print the resolved settings and stop.", **BESIDE_TRAINING)

    _argument_group_name = "run"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("ema_decay", self.ema_decay or []), ("ema_half_life", self.ema_half_life or [])):
            if len({f"{value:g}" for value in values}) < len(values):
                raise ValueError(f"{name} must be different values, which six digits tell apart; got {values}.")
        if self.optimizer not in OPTIMIZERS and not re.fullmatch(r"[\w.]+:\w+", self.optimizer):
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or module:Class, as torch.optim:NAdam; got"
                f" {self.optimizer!r}."
            )
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError("lr_scheduler piecewise_constant and lr_step_rules go together; give both or none.")
        if self.lr_step_rules is not None and not re.fullmatch(STEP_RULES, self.lr_step_rules):
            raise ValueError(
                "lr_step_rules must be factors, each but the last with the step that it ends at, as 1:1000,0.1:2000,"
                f"0.01; got {self.lr_step_rules!r}."
            )
        if self.resume_from_checkpoint not in (None, "latest") and not re.fullmatch(
            r"checkpoint-\d+", Path(self.resume_from_checkpoint).name
        ):
            raise ValueError(
                "resume_from_checkpoint must be latest or the name of a checkpoint, as checkpoint-1000; got"
                f" {self.resume_from_checkpoint!r}."
            )
        if self.report_to and "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to none stands alone, got {' '.join(self.report_to)}.")

    @property
    def trackers(self) -> list[str]:
        """The trackers of `report_to`; those of "all" are not named yet."""
        return [] if self.report_to in (None, ["none"]) else list(self.report_to)

    def resolved(self, total_steps: int, pretrained: bool = False, dimensions: int | None = None) -> "RunArguments":
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
    """What a run finds out from its data and its network, and defaults follow from.

    Args:
        resolution: (height, width) of the images.
        channels: of the images.
        dimensions: how many numbers a sample has, an image or its latents.
        time_label: the time input of a new network; None of a saved one, whose input is its own.
    """

    resolution: tuple[int, int] | None = None
    channels: int | None = None
    dimensions: int | None = None
    time_label: str | None = None


@dataclass(frozen=True)
class Config:
    """A run: the method and its own options, and what all methods share; `notes` say what flags replaced.

    A resolved one, see `resolved`, holds the settings that were given in `given`, and what else it is made of in
    `known`. Checkpoints keep what was given, so that defaults and shares move with the length of the run; people and
    programs are shown what it comes to.
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
        return (self.data, self.model, self.options, self.run)

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flag names."""
        return {"method": self.method, **{key: value for part in self.parts for key, value in asdict(part).items()}}

    def defaults(self) -> dict[str, Any]:
        """What the settings are where nobody has said anything, by their flag names."""
        return {f.name: f.default for part in self.parts for f in fields(part)}

    def resolved(self, known: Known | None = None) -> "Config":
        """These settings with values in place of shares of the run, and of None where a value follows.

        Args:
            known: what the data and the network tell; None for what is known so far.

        Raises:
            ValueError: settings that can't be, once they are resolved.
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
        """What was given, but for these values by their flag names, resolved by what is known here.

        Raises:
            ValueError: values that can't be.
        """
        parts = {}
        for name in ("options", "model", "data", "run"):
            part = getattr(self.given or self, name)
            parts[name] = replace(part, **{f.name: settings[f.name] for f in fields(part) if f.name in settings})
        return replace(self.given or self, **parts).resolved(self.known)

    def flags(self) -> Mapping[str, Flag]:
        """What the settings declare, by their flag names."""
        return flags_of(*self.parts)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, HelpFormatter):
    """Defaults behind the help where there are any, and of switches and their other spellings the name alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings[0].startswith("--") or action.nargs == 0:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if action.type is string_to_bool and action.default is False:
            return name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class _Parser(HfArgumentParser):
    """An argument parser whose errors are ValueErrors, and whose help has sections: settings by their titles."""

    sections: Mapping[str, Sequence[str]] = {}
    methods: Sequence[str] = ()

    def format_help(self) -> str:
        if not self.sections:
            return super().format_help()
        own, shared = self.format_sections(True), self.format_sections(False)
        return training_page(self.prog, self.description or "", self.methods, self.get_default("method"), own, shared)

    def format_sections(self, own: bool) -> str:
        """The part of the help that explains the method's own settings, or those that all have."""
        formatter, actions = self._get_formatter(), {action.dest: action for action in self._actions}
        for title, names in list(self.sections.items())[:1] if own else list(self.sections.items())[1:]:
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        return formatter.format_help()

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, part: Field) -> None:
        """Hand on what argparse takes of the metadata of a field: all but its declaration."""
        part = copy.copy(part)
        part.metadata = {key: value for key, value in part.metadata.items() if key != "flag"}
        HfArgumentParser._parse_dataclass_field(parser, part)

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"argument (--\w+)(/--[\w-]+)*", r"\1", message))


def _own_option(name: str, methods: Sequence[str], method: str) -> str:
    """Why the flag `name` is unknown, and what was perhaps meant."""
    others = [m for m in OBJECTIVES if m != method and name in {f.name for f in fields(OBJECTIVES[m].Options)}]
    own = [f.name for f in fields(OBJECTIVES[method].Options)]
    if name in INSTEAD:
        return f"Unknown option {name!r}: {in_these_words(INSTEAD[name])}."
    if others:
        return f"{name!r} is an option of {', '.join(others)}; {method} ignores it. Its own are: {', '.join(own)}."
    known = own + [f.name for cls in (ModelArguments, DataArguments, RunArguments) for f in fields(cls)]
    near = difflib.get_close_matches(name, [*known, "config", "method"], n=1)
    return f"Unknown option {name!r}." + (
        f" Did you mean {near[0]!r}?" if near else f" See --help for all of {method}."
    )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path, named=True)
    except OSError as error:
        raise ValueError(f"config {path}: can't be read ({error.strerror}).") from None
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"config {path}: must hold `key: value` lines.")
    if "config" in values:
        raise ValueError(f"config {path}: config names another file, and files don't include others.")
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
    """Raise ValueError for a value from a file that has the form of another one."""
    action = next((action for action in parser._actions if f"--{key}" in action.option_strings), None)
    if action is None or value is None:
        return
    many, takes_flag = action.nargs in ("+", "*"), action.type is string_to_bool
    if isinstance(value, list) and not many:
        raise ValueError(f"{key} takes one value, got a list: {value!r:.80}.")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (dict, list, set, tuple)) or item is None:
            raise ValueError(f"{key} takes {'single values' if many else 'one value'}, got {item!r:.80}.")
        if isinstance(item, bool) and not takes_flag:
            raise ValueError(
                f"{key} is {item} here, as YAML reads yes, no, on and off: put a word that is meant as one in quotes."
            )
    if value == []:
        raise ValueError(f"{key} is an empty list; leave the key out for the default.")


def _parse(parser: _Parser, flags: list[str], methods: Sequence[str], method: str) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(flags)
    for flag in unknown:
        if flag.startswith("--"):
            raise ValueError(_own_option(flag[2:].split("=")[0].replace("-", "_"), methods, method))
    if unknown:
        raise ValueError(f"Unexpected argument {unknown[0]!r}.")
    return namespace


def parse_groups(argv: Sequence[str], groups: Sequence[type], script: str, description: str) -> tuple[Any, ...]:
    """Read one dataclass of settings for each of `groups`, of a script. Raises ValueError for flags and values that
    can't be."""
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
    """The sections of the help of a training script: names of settings by titles, those of the method first."""
    shared = [f.name for cls in (DataArguments, ModelArguments, RunArguments) for f in fields(cls)]
    return {
        f"options of {method}": [f.name for f in fields(OBJECTIVES[method].Options)],
        "usual options": [name for name in shared if name in USUAL],
        "further options": ["help", *(name for name in shared if name not in USUAL)],
    }


def parser_of_training(method: str, methods: Sequence[str], description: str = "") -> _Parser:
    """The parser of a script that trains `methods`, for one of them."""
    groups = (OBJECTIVES[method].Options, DataArguments, ModelArguments, RunArguments)
    script = next((name for name in WORDS if methods[0] in methods_of(name)), "train_consistency")
    parser = _Parser(groups, prog=command(script), description=description, allow_abbrev=False)
    parser.formatter_class = _HelpFormatter
    parser.add_argument("--config", help="YAML file with the same keys as the flags, or a recipe's name; flags win.")
    parser.add_argument("--method", choices=methods, default=method, help="Training method.")
    parser.sections, parser.methods = sections_of(method), methods
    return parser


def parse_config(argv: Sequence[str], methods: Sequence[str], description: str) -> Config:
    """Read the settings of a training script from its command line.

    A flag wins over the config file, and so over the settings there that answer the same question: a source of data
    replaces the other source with its columns and split.

    Args:
        argv: the command line without the program's name.
        methods: the methods that the script trains; the first is the default.
        description: the text at the top of `--help`.

    Raises:
        ValueError: an unknown option (the nearest one is named), a wrong type, an impossible value, or an option that
            the chosen method ignores, or that changes nothing in this run.
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
    _parse(parser, _as_flags(from_file) + rest, methods, method)  # the help, and words that are no flags
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
        config.resolved()  # which finds what can't be
    except ValueError as error:
        from_there = any(re.search(rf"\b{name}\b", str(error)) for name in kept)
        raise ValueError(f"config {chosen.config}: {error}" if from_there else str(error)) from None
    return replace(config, notes=tuple(say_replaced(found, in_file, values)))


def _check_together(method: str, options: Any, data: DataArguments, model: ModelArguments, run: RunArguments) -> None:
    """Raise ValueError for settings that are not those of the method, or of a teacher that is missing."""
    cls, without_teacher = OBJECTIVES[method], options.teacher is None
    if cls.needs_teacher and without_teacher:
        raise ValueError(missing_teacher(method))
    for name, value in (("augment", data.augment), ("label_dropout", model.label_dropout)):
        if value and not cls.trains_teachers:
            teachers = [m for m, other in OBJECTIVES.items() if other.trains_teachers]
            raise ValueError(f"{name} is for the training of teachers by {', '.join(teachers)}, and not for {method}.")
    if model.from_scratch and (without_teacher or model.pretrained_model_name_or_path is not None):
        raise ValueError("from_scratch is for methods with a teacher, without --pretrained_model_name_or_path.")
    if model.teacher_guidance_scale != 1 and without_teacher:
        raise ValueError("teacher_guidance_scale is for methods with a teacher (--pretrained_teacher_model).")
    if model.vae_name_or_path is not None:
        check_for_latents(data, options)
    for name in ("teacher_revision", "teacher_variant"):
        if getattr(model, name) is not None and without_teacher:
            raise ValueError(f"{name} is that of --pretrained_teacher_model, which is not given.")
    if run.num_train_epochs is not None and data.streaming:
        raise ValueError("num_train_epochs: a stream does not tell how many images it has. Give --max_train_steps.")
