"""What a run that distils a text-to-image model saves: a LoRA with its scheduler, or a whole pipeline.

Stock diffusers loads both. They are verified in a clean process without this library, and put in place at once.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, SchedulerMixin, TCDScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.files import fsync_folder, naming, remove
from cm_diffusers.engine.saved.base_precision import cast_calls, full_state
from cm_diffusers.engine.saved.export import ROUNDING, _new_network, _put_in_place
from cm_diffusers.engine.saved.lora import fused_state, has_lora, save_lora, trained_weights
from cm_diffusers.engine.saved.stock import known_schedule, read_scheduler
from cm_diffusers.engine.saved.text import PARTS, fuse_loras, without_warnings
from cm_diffusers.engine.text import clean_process
from cm_diffusers.lookup import looked_up
from cm_diffusers.objectives import Objective
from cm_diffusers.pipelines.travel import save_with_code
from cm_diffusers.sampling import LORA_FILE


def few_step_scheduler(method: str, teacher_scheduler: SchedulerMixin, objective: Objective) -> SchedulerMixin:
    """The stock scheduler that samples a student: `TCDScheduler` for tcd, else `LCMScheduler`.

    Both start at the highest time of the table and take every k-th time below it. Its `original_inference_steps`
    therefore holds the levels of the student. They are those of its training if their number divides the table, and
    otherwise all times up to the student's highest level, such as 80 on a schedule with zero terminal SNR.

    Args:
        method: name of the method.
        teacher_scheduler: a scheduler of the teacher, which has its noise schedule.
        objective: the method, which has the levels and the prediction of the student.

    Raises:
        ValueError: no stock scheduler samples such a student.
    """
    spec = objective.spec
    if objective.two_times or spec.noise_schedule is None:
        what = "has two times" if objective.two_times else f"predicts {spec.prediction!r}"
        raise ValueError(
            f"no stock scheduler samples a student of the method {method}, because its network {what}. Choose a method"
            " such as lcm, tcd, cd or ecd."
        )
    schedule = known_schedule(dict(read_scheduler(teacher_scheduler).noise_schedule))
    sigmas = spec.process.sigma(torch.arange(len(spec.process.angles), dtype=torch.float64))
    times, steps = len(sigmas), getattr(objective.options, "num_ddim_timesteps", None)
    levels = int((sigmas <= spec.sigma_max * (1 + 1e-6)).sum())
    if levels == times and steps is not None and times % steps == 0:
        levels = steps
    kind = TCDScheduler if method == "tcd" else LCMScheduler
    return kind(**schedule, prediction_type=spec.prediction, original_inference_steps=levels, steps_offset=1)


def student_pipeline(
    teacher_pipeline: DiffusionPipeline, network: nn.Module, scheduler: SchedulerMixin
) -> DiffusionPipeline:
    """The pipeline of the teacher with another network and scheduler. It shares all other parts with the teacher.

    Args:
        teacher_pipeline: the teacher, with or without its text encoders.
        network: the student.
        scheduler: see `few_step_scheduler`.
    """
    pipeline = copy.copy(teacher_pipeline)
    pipeline.register_modules(unet=network, scheduler=scheduler)
    return pipeline


def sample_prompts(
    pipeline: DiffusionPipeline,
    condition: Condition,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    output_type: str = "np",
    batch_size: int = 8,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Sample images (B, H, W, 3) in [0, 1] of encoded prompts. An image depends on its own prompt and seed only.

    A safety checker of the pipeline is not asked.

    Args:
        pipeline: a text-to-image pipeline; it needs no text encoders.
        condition: the B prompts of `encode_prompts`. The "sizes" of SDXL choose the size of the images.
        seeds: one seed per prompt.
        num_inference_steps: number of sampling steps.
        guidance_scale: 1 is no guidance, which otherwise needs the null rows. A network with an input for the scale
            receives it instead.
        output_type: "np" for images, or "latent" for latents (B, C, h, w).
        batch_size: largest number of images in a batch.
        size: height and width of the images in pixels, for a model without "sizes"; None for those of the network.
    """
    quiet = copy.copy(pipeline)
    quiet.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        inputs = {"height": size[0], "width": size[1]} if size else {}
        inputs |= _inputs(pipeline, condition.rows(rows), guidance_scale)
        with cast_calls(pipeline.unet):
            latents = quiet(
                **inputs,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
        parts.append(latents.float().cpu().numpy() if output_type == "latent" else _decoded(pipeline, latents))
    return np.concatenate(parts)


@torch.no_grad()
def _decoded(pipeline: DiffusionPipeline, latents: Tensor) -> np.ndarray:
    """The images (B, H, W, 3) in [0, 1] of latents (B, C, h, w), decoded in the dtype of the autoencoder."""
    vae, config = pipeline.vae, pipeline.vae.config
    latents = latents.to(vae.device, vae.dtype) / (config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std)[:, None, None] + latents.new_tensor(mean)[:, None, None]
    return pipeline.image_processor.postprocess(vae.decode(latents).sample, output_type="np")


def _inputs(pipeline: DiffusionPipeline, condition: Condition, scale: float) -> dict[str, Any]:
    """The arguments of the pipeline for encoded prompts, which have one size.

    Raises:
        ValueError: the sizes differ, or there is guidance without null rows.
    """
    unet, names = pipeline.unet, {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    found = {names[name]: entry for name, entry in condition.entries.items() if name in names}
    if scale > 1 and unet.config.time_cond_proj_dim is None:
        nulls = condition.dropped().entries
        found |= {f"negative_{names[name]}": entry for name, entry in nulls.items() if name in names}
    inputs: dict[str, Any] = {name: entry.to(unet.device, unet.dtype) for name, entry in found.items()}
    if "sizes" in condition.entries:
        sizes = condition.entries["sizes"].unique(dim=0)
        if len(sizes) > 1:
            raise ValueError(f"the prompts of a batch must have one size; got {sizes.tolist()}.")
        old_height, old_width, top, left, height, width = (int(value) for value in sizes[0])
        inputs |= {"original_size": (old_height, old_width), "crops_coords_top_left": (top, left)}
        inputs |= {"target_size": (height, width), "height": height, "width": width}
    return inputs


def is_text_to_image(folder: Path) -> bool:
    """Whether a saved model is a text-to-image model: a LoRA, or a pipeline with a tokenizer."""
    if (folder / LORA_FILE).is_file():
        return True
    return any(name.startswith("tokenizer") for name in DiffusionPipeline.load_config(folder))


def save_lora_model(
    pipeline: DiffusionPipeline,
    folder: Path | str,
    base: str,
    complete: Callable[[Path], object] = lambda folder: None,
    verify: bool = True,
    revision: str | None = None,
    variant: str | None = None,
    loras: Sequence[str] = (),
) -> None:
    """Save the LoRA of a student and its scheduler, and replace an earlier `folder` in one step.

    Args:
        pipeline: the student, whose network has the adapter of `add_lora`.
        folder: the folder of the result.
        base: folder or Hub id of the teacher.
        complete: called with the new folder before the old one is replaced. It can add a card and pictures.
        verify: load the result in a clean process, and compare its images.
        revision: branch, tag or commit of the base on the Hub.
        variant: variant of the weight files of the base.
        loras: LoRAs that were fused into the teacher.

    Raises:
        RuntimeError: the result failed the verification; the old one is untouched.
    """
    source = {"revision": revision, "variant": variant}

    def write(written: Path) -> None:
        save_lora(pipeline, written)
        pipeline.scheduler.save_pretrained(written / "scheduler")
        if verify:
            _verify(pipeline, written, base=_absolute(base), loras=[_absolute(name) for name in loras], **source)
        complete(written)

    _replace(Path(folder), write)


def save_fused_model(
    pipeline: DiffusionPipeline,
    folder: Path | str,
    base: str,
    complete: Callable[[Path], object] = lambda folder: None,
    verify: bool = True,
    revision: str | None = None,
    variant: str | None = None,
    loras: Sequence[str] = (),
) -> None:
    """Save a student as a whole pipeline with its scheduler, and replace an earlier `folder` in one step.

    A LoRA is fused into a copy of the weights. Parts that have left memory, such as text encoders, come from `base`.
    The arguments are those of `save_lora_model`.

    Raises:
        ValueError: a part of `base` can't be loaded.
        RuntimeError: the result failed the verification; the old one is untouched.
    """
    whole = _whole(pipeline, base, list(loras), revision=revision, variant=variant)

    def write(written: Path) -> None:
        save_with_code(whole, written)
        if verify:
            _verify(whole, written, base=None, loras=[])
        complete(written)

    _replace(Path(folder), write)


def _whole(pipeline: DiffusionPipeline, base: str, loras: list[str], **source: Any) -> DiffusionPipeline:
    """The pipeline without an adapter, and with the missing tokenizers and text encoders of `base`."""
    network = pipeline.unet
    if has_lora(network):
        network = _new_network(network, fused_state(network, trained_weights(network)))
    parts = {name: part for name, part in pipeline.components.items() if part is not None} | {"unet": network}
    if any(getattr(pipeline, name, 0) is None for name in PARTS):
        with looked_up(base, revision=source["revision"]) as cached, without_warnings():
            given = {} if loras else parts  # LoRAs are fused into a whole pipeline
            loaded = type(pipeline).from_pretrained(
                base, use_safetensors=True, local_files_only=cached, **source, **given
            )
        fuse_loras(loaded, loras)
        parts = {**loaded.components, **parts}
    whole = copy.copy(pipeline)
    whole.register_modules(**parts)
    return whole


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a new `folder` beside the old one with `write`, and replace the old one in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = folder.with_name(f".tmp-{folder.name}")
    remove(written)
    try:
        with naming(folder):
            written.mkdir()
            write(written)
            for path in written.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            _put_in_place(written, folder)
    except BaseException as error:
        if not isinstance(error, RuntimeError):  # a result that failed verification is kept for inspection
            remove(written)
        raise
    fsync_folder(folder.parent)
    with suppress(OSError):  # the old result, which another user's files can keep from being removed
        remove(written)


def _absolute(name: str) -> str:
    """The absolute path of a file or folder; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _verify(pipeline: DiffusionPipeline, folder: Path, **source: Any) -> None:
    """Load `folder` in a new process with diffusers but without this library, and compare its images.

    Two images of two steps on the CPU must differ by less than 1e-4. Nothing is fetched from the Hub.

    Args:
        pipeline: the pipeline that was saved.
        folder: the folder of the result.
        source: further arguments of `clean_process.load_result`.

    Raises:
        RuntimeError: the result does not load, or makes other images.
    """
    redo = f"It is kept in {folder}. The checkpoints of the run are sound, and the same command exports again."
    with tempfile.TemporaryDirectory() as results:
        images = Path(results, "images.npy")
        task: dict[str, Any] = {"folder": str(folder.resolve()), "images": str(images), "weights": None, **source}
        task |= {"threads": torch.get_num_threads(), "paths": sys.path}
        if has_lora(pipeline.unet) and (rounded := _rounded_base(pipeline.unet)):
            task["weights"] = str(Path(results, "base.safetensors"))
            save_file(rounded, task["weights"])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": results, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-I", clean_process.__file__, json.dumps(task)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"The saved model does not load with diffusers alone. {redo}\n{run.stderr[-4000:]}")
        gap = np.abs(clean_process.two_images(pipeline) - np.load(images)).max()
    if not gap < ROUNDING:
        raise RuntimeError(f"The images of the saved model differ by up to {gap:.2g}, above {ROUNDING:g}. {redo}")


def _rounded_base(network: nn.Module) -> dict[str, Tensor]:
    """The weights below a LoRA in float32 on the CPU, or nothing if they are stored in float32."""
    base = {name for name, _ in network.named_parameters() if "lora_" not in name}
    if all(network.get_parameter(name).dtype == torch.float32 for name in base):
        return {}
    state = {name: value for name, value in full_state(network).items() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): value.float().cpu().contiguous() for name, value in state.items()}
