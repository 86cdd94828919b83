"""Text-to-image pipelines of diffusers (Stable Diffusion, SDXL), read as denoisers, and prompts as conditions."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.saved.lora import import_peft
from cm_diffusers.engine.saved.stock import AUTOENCODERS, SavedModel, is_few_step, process_in_words, read_scheduler
from cm_diffusers.lookup import looked_up
from cm_diffusers.models.text_unet import wanted_entries, with_conditions


PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class TextModel(SavedModel):
    """A text-to-image diffusion model in the form that training uses.

    Args:
        network: the U-Net, called with the conditions of `encode_prompts`.
        spec: its parameterisation; `sigma_data` is None, as pipelines do not record it.
        vae: the autoencoder of its latents.
        null_class: None; the null rows come with the prompts.
        pipeline: the pipeline that was read.
        description: what was found, in a line.
    """

    pipeline: Any = None
    description: str = ""

    def __str__(self) -> str:
        return self.description


def read_text_to_image(pipeline: DiffusionPipeline) -> TextModel:
    """Read a text-to-image pipeline as a denoiser, with the LoRAs that were fused into its weights.

    Args:
        pipeline: of a class in `PIPELINES`.

    Raises:
        ValueError: the pipeline is of another class or a few-step model, has adapters that are not fused, or has a
            network, autoencoder or scheduler that is not supported.
    """
    kind, unet = type(pipeline).__name__, getattr(pipeline, "unet", None)
    if kind not in PIPELINES:
        raise ValueError(f"this is a {kind}; this version reads {' and '.join(PIPELINES)}.")
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"its network is a {type(unet).__name__}; this version reads UNet2DConditionModel.")
    if not isinstance(pipeline.vae, AUTOENCODERS):
        raise ValueError(f"its autoencoder is a {type(pipeline.vae).__name__}, which this version does not read.")
    if is_few_step(pipeline.scheduler) or unet.config.time_cond_proj_dim is not None:
        raise ValueError("it is a few-step model already (by its scheduler or its guidance input), not a teacher.")
    if getattr(unet, "peft_config", None):
        raise ValueError(
            f"its network has adapters: {', '.join(unet.peft_config)}. Make them a part of the weights first, by"
            " pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
    spec = read_scheduler(pipeline.scheduler)
    if spec.prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"its {type(pipeline.scheduler).__name__} says that its network predicts {spec.prediction!r}. This version"
            " distils networks that predict epsilon or v_prediction, whose students stock schedulers sample."
        )
    if spec.prediction == "epsilon" and math.isinf(spec.process.sigma_max):
        raise ValueError(
            f"its {type(pipeline.scheduler).__name__} has zero terminal SNR (rescale_betas_zero_snr) and predicts"
            " epsilon, from which no sampler can start. Give the scheduler of the network's training; with zero"
            " terminal SNR it predicts v_prediction or sample."
        )
    count = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    encoders = [
        part for part in PARTS if part.startswith("text_encoder") and getattr(pipeline, part, None) is not None
    ]
    size = unet.config.sample_size * pipeline.vae_scale_factor
    description = (
        f"{kind}, {count:.1f} M parameters, {process_in_words(spec)}, {len(encoders)} text encoder(s),"
        f" {size} x {size} pixels"
    )
    return TextModel(with_conditions(unet), spec, pipeline.vae, None, pipeline, description)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the warnings of diffusers and transformers, for calls whose faults this library names itself."""
    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    finally:
        for log, level in zip(logs, before):
            log.set_verbosity(level)


def fuse_loras(pipeline: DiffusionPipeline, names: Sequence[str]) -> None:
    """Make LoRAs a part of the weights of `pipeline`, one after the other.

    Args:
        pipeline: a text-to-image pipeline without adapters.
        names: folders, files or Hub ids that `load_lora_weights` reads.

    Raises:
        ValueError: a LoRA is missing or does not fit, or PEFT is not installed.
    """
    for name in names:
        import_peft()
        try:
            with looked_up(name) as cached, without_warnings():
                pipeline.load_lora_weights(name, local_files_only=cached)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"the LoRA {name!r} can't be loaded: {error}") from None


def read_sizes(pipeline: DiffusionPipeline, rows: int, height: int | None = None, width: int | None = None) -> Tensor:
    """SDXL's sizes (rows, 6) of uncropped pictures: original size, crop of 0, target size, in pixels.

    Args:
        pipeline: the pipeline.
        rows: number of pictures.
        height, width: their size; None for the network's own.
    """
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    height, width = height or own, width or own
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(rows, 6)


@torch.no_grad()
def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], sizes: Tensor | None = None) -> Condition:
    """Embed prompts as the pipeline does: a `Condition` on the CPU, with the null rows of the empty prompt.

    Its entries are "text" (B, n, d) and for SDXL "pooled" (B, p) and "sizes" (B, 6). Prompts that are longer than the
    encoder's context are cut, as in the pipeline (see `too_long`).

    Args:
        pipeline: a pipeline with its tokenizers and text encoders.
        prompts: B prompts.
        sizes: (B, 6) for SDXL; None for uncropped pictures of the network's size.

    Raises:
        ValueError: there is no prompt, one is not a text, or a text encoder is missing.
    """
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not prompts or wrong:
        raise ValueError(f"prompts must be one or more texts; got {wrong[:3] if wrong else 'none'}.")
    missing = [part for part in PARTS if getattr(pipeline, part, 0) is None]
    if missing:
        raise ValueError(f"the pipeline has no {', '.join(missing)}, so it can't encode prompts.")
    wanted, found = wanted_entries(pipeline.unet), _embedded(pipeline, list(prompts))
    entries, nulls = {"text": found[0]}, {"text": found[1][0]}
    if "pooled" in wanted:
        sizes = read_sizes(pipeline, len(prompts)) if sizes is None else sizes
        entries |= {"pooled": found[2], "sizes": sizes}
        nulls["pooled"] = found[3][0]
    return Condition(entries, nulls).to("cpu")


def _embedded(pipeline: Any, prompts: list[str]) -> tuple[Tensor, ...]:
    """Embeddings of the prompts and of the empty prompt; for SDXL also the pooled ones of both."""
    device = next(pipeline.text_encoder.parameters()).device
    return pipeline.encode_prompt(prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True)


def too_long(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[str]:
    """Those of the prompts that the text encoder cuts, because they have more tokens than its context."""
    tokenizer = pipeline.tokenizer
    return [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length]


def free_encoders(pipeline: DiffusionPipeline) -> None:
    """Remove the tokenizers and text encoders from the pipeline, once all prompts are encoded."""
    for part in PARTS:
        if getattr(pipeline, part, None) is not None:
            pipeline.register_modules(**{part: None})
