"""Saved models: made of a method and weights, written aside, verified in a clean process, put in place at once."""

import copy
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.engine.files import fsync_folder, naming, remove
from cm_diffusers.engine.saved import clean_process
from cm_diffusers.objectives import Objective
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.pipelines.travel import save_with_code
from cm_diffusers.sampling import with_our_interface


VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = 1e-4  # images in [0, 1]; an error in a weight or a setting that is not rounding is far above


def with_vae(pipeline: DiffusionPipeline, vae: nn.Module) -> ImagePipeline:
    """The pipeline of a network of latents, decoding them; stock ones become ours. Latents are not clipped."""
    pipeline = with_our_interface(pipeline)
    pipeline.register_modules(vae=vae)
    if "clip_denoised" in pipeline.scheduler.config:
        pipeline.scheduler.register_to_config(clip_denoised=False)
    return pipeline


def exported(objective: Objective, weights: Mapping[str, Tensor], vae: nn.Module | None) -> DiffusionPipeline:
    """The pipeline of a method whose network has these weights, which are copied; `vae` decodes where there is one."""
    config = {k: v for k, v in objective.network.config.items() if k != "_name_or_path"}  # a path of here
    # settings given by position stand among `_use_default_values`, which from_config would leave out
    network = type(objective.network).from_config({**config, "_use_default_values": []})
    network.load_state_dict(weights)
    device = next(objective.network.parameters()).device
    pipeline = objective.pipeline(network.to(device).eval())
    return pipeline if vae is None else with_vae(pipeline, vae)


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: Path | str,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    verify: bool = False,
    complete: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Save a pipeline with the code that it needs; `folder` is at any moment the old one or the new one, whole.

    Stock classes need no code (tier 0). Of other pipelines the code travels along (tier 1, see `pipelines/travel.py`).
    Where the system can't exchange two folders (Linux can), there is a moment between the old one and the new one.

    Args:
        variant: "fp16" or "bf16" for a copy of the weights in this precision beside them, which
            `from_pretrained(folder, variant="fp16", dtype=torch.float16)` loads.
        max_shard_size: weights above it are split into several files; bytes, or "10GB".
        verify: call `verify_export` before the new one takes the place of the old one.
        complete: called with the folder before that; it may add a card and pictures.

    Raises:
        ValueError: another variant.
        RuntimeError: the saved model is not the one that was to be saved; the old one is untouched.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_name(f".tmp-{folder.name}")
    remove(written)
    try:
        with naming(folder):
            save_with_code(pipeline, written, max_shard_size=max_shard_size)
            if variant is not None:
                _save_variant(pipeline, written, variant, max_shard_size)
            if verify:
                verify_export(pipeline, written)
            complete(written)
            for path in written.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            _put_in_place(written, folder)
    except BaseException as error:
        if not isinstance(error, RuntimeError):  # a model that is not what was to be saved is there to be looked at
            remove(written)
        raise
    fsync_folder(folder.parent)
    with suppress(OSError):  # an old one of another user's files, whose place the new one has
        remove(written)


def _save_variant(pipeline: DiffusionPipeline, folder: Path, variant: str, max_shard_size: int | str) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part = copy.deepcopy(part).to(VARIANTS[variant])
            with tempfile.TemporaryDirectory(dir=folder) as aside:  # for its config.json, which is there already
                part.save_pretrained(aside, variant=variant, max_shard_size=max_shard_size)
                for path in Path(aside).glob("*.safetensors*"):
                    path.rename(folder / name / path.name)


def _put_in_place(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`, and an old `folder` that of `new`, in one step where the system can."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".old-{folder.name}")
        remove(old)
        os.rename(folder, old)
        os.rename(new, folder)
        os.rename(old, new)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change names by Linux' renameat2; False where there is none, or the file system has not."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def verify_export(pipeline: DiffusionPipeline, folder: Path | str) -> None:
    """Load `folder` in a new process that has diffusers and not this library, and compare with `pipeline`.

    Compared are all settings, all weights bit for bit, and two images of two steps, which are bit for bit the same
    wherever the processor rounds alike in both processes; a difference below 1e-4 counts as rounding, as settings and
    weights are the same. The code of the folder is run, and nothing is fetched from the Hub.

    Raises:
        RuntimeError: it does not load, or is another model.
    """
    folder = Path(folder)
    redo = f"It is left in {folder}. The checkpoints of the run are sound: the same command exports again."
    with tempfile.TemporaryDirectory() as results:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": results, "CUDA_VISIBLE_DEVICES": ""}
        dtype, threads = str(pipeline.unet.dtype).removeprefix("torch."), str(torch.get_num_threads())
        command = [sys.executable, "-I", clean_process.__file__, folder, results, dtype, threads, json.dumps(sys.path)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"The saved model does not load with diffusers alone. {redo}\n{run.stderr[-4000:]}")
        found = json.loads(Path(results, "facts.json").read_text())
        images = np.load(Path(results, "images.npy"))
    expected = clean_process.describe(pipeline)
    for part in expected.keys() | found.keys():
        ours, theirs = expected.get(part, {}), found.get(part, {})
        names = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if names:
            name = names[0]
            raise RuntimeError(
                f"The saved model differs in {len(names)} things of its {part}: {name} is"
                f" {ours.get(name)!r}, loaded {theirs.get(name)!r}. {redo}"
            )
    gap = np.abs(clean_process.two_images(pipeline) - images).max()
    if not gap < ROUNDING:
        raise RuntimeError(f"The saved model's images differ by up to {gap:.2g}. {redo}")
