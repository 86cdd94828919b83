"""The check of a text-to-image result with diffusers alone. It is run as a file, in a separate process.

It imports nothing of this library and hides it, because an installed copy must not help to load the result.
"""

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn


LARGEST = 256  # side of the images in pixels at most, because they are made on the CPU
UNUSED = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "safety_checker")


def two_images(pipeline: DiffusionPipeline) -> np.ndarray:
    """Sample two images (2, H, W, 3) in two steps on the CPU, from random embeddings and the seeds 0 and 1.

    Copies of the networks in float32 are used, so the pipeline can be on any device and in any dtype.
    """
    unet, alone = pipeline.unet, copy.copy(pipeline)
    alone.register_modules(
        unet=_on_cpu(unet),
        vae=_on_cpu(pipeline.vae),
        scheduler=copy.deepcopy(pipeline.scheduler),
        **{name: None for name in UNUSED if name in pipeline.components},
    )
    side = min(unet.config.sample_size * pipeline.vae_scale_factor, LARGEST)
    numbers, width = torch.Generator().manual_seed(0), unet.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    inputs = {"prompt_embeds": torch.randn(2, 8, width, generator=numbers)}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["pooled_prompt_embeds"] = torch.randn(2, width, generator=numbers)
    alone.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    size: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 2, "guidance_scale": 1.0}
    return alone(**inputs, **size, generator=generators, output_type="np").images


def _on_cpu(network: nn.Module) -> nn.Module:
    """A copy of a network in float32 on the CPU. No copy is made on its own device."""
    copies: dict[int, Any] = {}
    for value in (*network.parameters(), *network.buffers()):
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        moved = value.detach().to("cpu", dtype, copy=True)
        copies[id(value)] = nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
    return copy.deepcopy(network, copies)


def load_result(folder: Path, base: str | None, loras: list[str], weights: str | None, **source: Any) -> Any:
    """Load a result as the lines on its card do.

    Args:
        folder: a LoRA with its scheduler, or a whole pipeline.
        base: the model that the LoRA changes; None for a whole pipeline.
        loras: LoRAs that belong to the base.
        weights: file with the rounded weights of the base's network, if it was trained in less than 32 bits.
        source: "revision" and "variant" of the base.
    """
    if base is None:
        return DiffusionPipeline.from_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(base, **source)
    for name in loras:
        pipeline.load_lora_weights(name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    if weights is not None:
        pipeline.unet.load_state_dict(load_file(weights))
    pipeline.load_lora_weights(folder)
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return pipeline


def main(task: str) -> None:
    """Load a result, and save two images of it.

    Args:
        task: JSON with the arguments of `load_result`, the number of "threads", the caller's `sys.path` as "paths",
            and the file of the "images".
    """
    given = json.loads(task)
    hidden = runpy.run_path(str(Path(__file__).parents[1] / "saved" / "clean_process.py"))["_Hidden"]
    sys.meta_path.insert(0, hidden())
    sys.path += given.pop("paths")
    torch.set_num_threads(given.pop("threads"))
    images, folder = given.pop("images"), Path(given.pop("folder"))
    np.save(images, two_images(load_result(folder, **given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
