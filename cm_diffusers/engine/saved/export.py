"""Export of saved models: written beside the target, verified in a clean process, and put in place at once."""

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

from cm_diffusers.core.frozen import copied, load_changing_state
from cm_diffusers.engine.files import fsync_folder, naming, remove
from cm_diffusers.engine.saved import clean_process
from cm_diffusers.engine.saved.lora import fused_state, has_lora
from cm_diffusers.objectives import Objective
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.pipelines.travel import save_with_code
from cm_diffusers.sampling import with_our_interface


VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = 1e-4  # of images in [0, 1]; a wrong weight or setting changes images far more


def with_vae(pipeline: DiffusionPipeline, vae: nn.Module) -> ImagePipeline:
    """Return `pipeline` in this library's class, decoding latents with `vae`. Its scheduler stops clipping samples."""
    pipeline = with_our_interface(pipeline)
    pipeline.register_modules(vae=vae)
    if "clip_denoised" in pipeline.scheduler.config:
        pipeline.scheduler.register_to_config(clip_denoised=False)
    return pipeline


def exported(objective: Objective, weights: Mapping[str, Tensor], vae: nn.Module | None) -> DiffusionPipeline:
    """Return the pipeline of a method, with a copy of given weights. A LoRA is fused into them.

    Args:
        objective: the method, whose network gives the config and the device.
        weights: state dict of the network, or of its LoRA.
        vae: the autoencoder that decodes latents; None for pixels.
    """
    trained = objective.network
    if has_lora(trained):
        weights = fused_state(trained, weights)
    pipeline = objective.pipeline(_new_network(trained, weights))
    return pipeline if vae is None else with_vae(pipeline, vae)


def network_with(trained: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with given weights. It shares the base weights of a LoRA.

    Args:
        trained: the network in training.
        weights: its state dict, or that of its LoRA.
    """
    if not has_lora(trained):
        network = _new_network(trained, weights)
        if hasattr(trained, "adapt_condition"):
            network.adapt_condition = trained.adapt_condition
        return network
    network = copied(trained)
    load_changing_state(network, trained, weights)
    return network.eval()


def _new_network(trained: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network with the config, class and device of `trained` and with the state dict `weights`."""
    config = {k: v for k, v in trained.config.items() if k != "_name_or_path"}  # a local path
    # from_config ignores settings in `_use_default_values`, where diffusers also lists those given by position
    network = type(trained).from_config({**config, "_use_default_values": []})
    network.load_state_dict(weights)
    return network.to(next(trained.parameters()).device).eval()


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: Path | str,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    verify: bool = False,
    complete: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Save a pipeline with the code that it needs, and replace an earlier `folder` in one step.

    At any moment `folder` holds the whole old model or the whole new one. On systems that can't exchange two folders
    (Linux can), it is missing for a moment. Stock classes need no code (tier 0). Other pipelines are saved with their
    code (tier 1, see `pipelines/travel.py`).

    Args:
        pipeline: the pipeline to save.
        folder: the folder of the saved model.
        variant: "fp16" or "bf16" also saves the weights in this precision, which
            `from_pretrained(folder, variant="fp16", dtype=torch.float16)` loads.
        max_shard_size: largest size of a file of weights, in bytes or as "10GB"; larger weights are split.
        verify: call `verify_export` before the old model is replaced.
        complete: called with the new folder before the old one is replaced. It can add a card and pictures.

    Raises:
        ValueError: an unknown variant.
        RuntimeError: the new model failed the verification; the old model is untouched.
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
        if not isinstance(error, RuntimeError):  # a model that failed verification is kept for inspection
            remove(written)
        raise
    fsync_folder(folder.parent)
    with suppress(OSError):  # the old model, which another user's files can keep from being removed
        remove(written)


def _save_variant(pipeline: DiffusionPipeline, folder: Path, variant: str, max_shard_size: int | str) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part = copy.deepcopy(part).to(VARIANTS[variant])
            with tempfile.TemporaryDirectory(dir=folder) as aside:  # aside, because its config.json exists already
                part.save_pretrained(aside, variant=variant, max_shard_size=max_shard_size)
                for path in Path(aside).glob("*.safetensors*"):
                    path.rename(folder / name / path.name)


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, and an old `folder` to `new`, in one step if the system can."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".old-{folder.name}")
        remove(old)
        os.rename(folder, old)
        os.rename(new, folder)
        os.rename(old, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically with Linux's renameat2. Return False if the kernel or file system lacks it."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return renameat2 is not None and renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def verify_export(pipeline: DiffusionPipeline, folder: Path | str) -> None:
    """Load `folder` in a new process with diffusers but without this library, and compare it with `pipeline`.

    All settings must be equal, and all weights bit for bit. Two images of two steps must differ by less than 1e-4,
    which allows for rounding: they are equal if the processor rounds alike in both processes. The code in the folder
    is run, and nothing is fetched from the Hub.

    Args:
        pipeline: the pipeline that was saved.
        folder: the folder of the saved model.

    Raises:
        RuntimeError: the saved model does not load, or differs from `pipeline`.
    """
    folder = Path(folder)
    redo = f"It is kept in {folder}. The checkpoints of the run are sound, and the same command exports again."
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
                f"The {part} of the saved model differs in {len(names)} values. For example, {name} should be"
                f" {ours.get(name)!r}, but is loaded as {theirs.get(name)!r}. {redo}"
            )
    gap = np.abs(clean_process.two_images(pipeline) - images).max()
    if not gap < ROUNDING:
        raise RuntimeError(f"The images of the saved model differ by up to {gap:.2g}, above {ROUNDING:g}. {redo}")
