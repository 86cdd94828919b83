"""Data of text-to-image training: latents and prompts, encoded once by all processes and kept in files.

The latents are those of images with captions, or of the teacher's own samples if there are prompts alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from cm_diffusers.core.conditions import Condition
from cm_diffusers.core.draws import derive_seed, permutation
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import SIGMA_DATA_SAMPLES, ImageData
from cm_diffusers.engine.data.latents import encode
from cm_diffusers.engine.data.row_cache import RowCache, digest_of_network
from cm_diffusers.engine.files import digest
from cm_diffusers.engine.saved.stock import known_schedule, read_scheduler
from cm_diffusers.engine.saved.text import free_encoders
from cm_diffusers.engine.text.prompt_cache import PromptCache
from cm_diffusers.models.text_unet import wanted_entries
from cm_diffusers.objectives.options import check_for_latents


SIDES = 8  # sides of pictures are multiples of it in all pipelines of diffusers
TEACHER_STEPS = 25  # of the teacher's samples, for prompts without images


class CachedLatents:
    """The latents of a dataset, kept in a cache for each shape. Lists of indices of one shape select a batch.

    Args:
        caches: each has rows of "latents" (c, h, w), all of one shape.
        rows: for each cache, the indices in the dataset of its rows.
    """

    def __init__(self, caches: Sequence[RowCache], rows: Sequence[Sequence[int]]):
        self.caches = caches
        self._places = torch.empty(sum(map(len, rows)), 2, dtype=torch.int64)  # cache, and row in it
        for i, indices in enumerate(rows):
            count = len(indices)
            self._places[list(indices)] = torch.stack([torch.full((count,), i), torch.arange(count)], 1)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """The latents (B, c, h, w) at B `indices`, float32."""
        places = self._places[list(indices)]
        return self.caches[int(places[0, 0])].rows(places[:, 1])["latents"]


class TextData(ImageData):
    """A dataset of latents with prompts, in the interface of `ImageData`. All processes make it together.

    Each batch is {"images": float32 (B, c, h, w), "condition": {"prompt": int64 (B,)}}, for SDXL also with "sizes"
    (B, 6). `conditioned` replaces the indices of prompts by embeddings.

    Args:
        images: images with captions.
        pipeline: the text-to-image pipeline, whose tokenizers and text encoders are removed.
        folder: where the latents and embeddings are kept, for all processes.
        device: device that encodes.
        rank: number of this process, from 0.
        world: number of processes.
        wait: waits for all processes.
        say: prints a line.
        show_progress: show bars.
        vae_batch_size: number of images encoded at once.

    Raises:
        ValueError: an option that latents exclude (such as --random_flip), images with other channels than the
            autoencoder takes, or a resolution that it can't halve.
        OSError: a file can't be written; the message names it.
    """

    def __init__(
        self,
        images: ImageData,
        pipeline: DiffusionPipeline,
        folder: Path,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], object] = lambda: None,
        say: Callable[[str], None] = print,
        show_progress: bool = False,
        vae_batch_size: int = 64,
    ):
        vae, shared = pipeline.vae, {"rank": rank, "world": world, "say": say, "show_progress": show_progress}
        if images.channels != vae.config.in_channels:
            raise ValueError(
                f"the autoencoder takes images of {vae.config.in_channels} channels,"
                f" the dataset gives {images.channels}: set --channels {vae.config.in_channels}."
            )
        self._prepare(images.args, images.resolution, images.captions, pipeline, folder, device, wait, shared)
        self._mixture = images._mixture
        shapes = [images.resolution]
        if images.args.aspect_ratio_buckets:
            halvings = len(pipeline.unet.config.block_out_channels) - 1
            images.fill_buckets(pipeline.vae_scale_factor * 2**halvings)
            self._buckets = images.buckets
            shapes = [images.images.shapes[bucket[0]] for bucket in images.buckets]

        def encoded(bucket: Sequence[int], rows: range) -> dict[str, Tensor]:
            pixels = images.rows(bucket[rows.start : rows.stop], own_shapes=True).to(device).float() / 127.5 - 1
            return {"latents": encode(self.vae, pixels)}

        facts, caches = [digest_of_network(self.vae), images.digest, images.channels], []
        for shape, bucket in zip(shapes, images.buckets):
            key = digest(json.dumps([*facts, shape, bucket]).encode())
            options = {"batch_size": vae_batch_size, "desc": "Encoding images", **shared}
            caches.append(RowCache(folder / "latents", key, len(bucket), partial(encoded, bucket), **options))
        self._fill(caches, images.buckets, shapes, folder, wait, shared)

    def _prepare(
        self,
        args: DataArguments,
        size: tuple[int, int],
        captions: Sequence[str],
        pipeline: DiffusionPipeline,
        folder: Path,
        device: torch.device | str,
        wait: Callable[[], object],
        shared: dict[str, Any],
    ) -> None:
        """Check the settings, and encode the prompts, after which the encoders leave memory."""
        check_for_latents(replace(args, aspect_ratio_buckets=False))
        factor = pipeline.vae_scale_factor
        multiple = math.lcm(factor, SIDES)
        if any(side % multiple for side in size):
            raise ValueError(
                f"resolution must be multiples of {multiple}, as diffusers' pipelines need; got {size[0]} x {size[1]}."
            )
        self.args, self.show_progress = args, shared["show_progress"]
        self.labels = self.num_classes = self._classes = self._mixture = self._buckets = None
        self.resolution = size[0] // factor, size[1] // factor
        self._teacher = digest_of_network(pipeline.unet)
        pipeline.to(device)
        self.vae = pipeline.vae.float().eval().requires_grad_(False)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(captions))}
        self._prompt = torch.tensor([numbers[caption] for caption in captions])
        self._prompts = PromptCache(folder, pipeline, list(numbers), **shared)
        self._has_sizes = "sizes" in wanted_entries(pipeline.unet)
        self._prompts.encode()
        wait()
        free_encoders(pipeline)
        self.nulls = {name: null.to(device) for name, null in self._prompts.nulls.items()}

    def _fill(
        self,
        caches: Sequence[RowCache],
        rows: Sequence[Sequence[int]],
        shapes: Sequence[tuple[int, int]],
        folder: Path,
        wait: Callable[[], object],
        shared: dict[str, Any],
    ) -> None:
        """Make the latents in `caches`, for the dataset's `rows` of pictures with these `shapes` in pixels."""
        for cache in caches:
            cache.fill()
            cache.make = None  # it holds the images
        wait()
        self.images = CachedLatents(caches, rows)
        self.channels = self.images[rows[0][:1]].shape[1]
        self._sizes = torch.empty(len(self.images), 6)
        for indices, (height, width) in zip(rows, shapes):
            self._sizes[list(indices)] = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        keys = [self._teacher, *(cache.key for cache in (*caches, *self._prompts.caches))]
        self._fingerprint = digest(*(key.encode() for key in keys), self._prompt.numpy().tobytes())
        own = {cache.folder for cache in (*caches, *self._prompts.caches)}
        others = sorted(path.relative_to(folder) for path in folder.glob("*/*") if path not in own)
        if others and shared["rank"] == 0:
            shared["say"](
                f"{folder} also holds caches of other data or of another teacher, which are not used and can be"
                f" deleted: {', '.join(map(str, others))}."
            )

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """(height, width) of the latents of all buckets; empty without --aspect_ratio_buckets."""
        return set() if self._buckets is None else {self.images[bucket[:1]].shape[2:] for bucket in self._buckets}

    @property
    def condition(self) -> dict[str, Tensor]:
        """The number of the prompt (N,) of each image; for SDXL also the sizes (N, 6) of the picture in pixels."""
        return {"prompt": self._prompt, **({"sizes": self._sizes} if self._has_sizes else {})}

    def conditioned(self, entries: dict[str, Tensor]) -> Condition:
        """Return the condition of a batch with embeddings and null rows, from the entries (B, ...) of `batches`."""
        sizes = {name: entry for name, entry in entries.items() if name == "sizes"}
        return self._prompts.rows(entries["prompt"]).also(**sizes).with_nulls(self.nulls)

    def measure_sigma_data(self) -> float:
        """Return the root mean square of the latents, estimated on at most 10,000 of them."""
        rows = permutation(len(self.images), "sigma_data")[:SIGMA_DATA_SAMPLES].tolist()
        squares = [self.images[[row]].double().square().mean() for row in rows]
        return round(torch.stack(squares).mean().sqrt().item(), 4)


class PromptData(TextData):
    """Latents that the teacher itself makes for prompts, in place of images: ends of its own trajectories.

    They are the samples of the stock pipeline, by guided DDIM steps (Song et al. 2021, arXiv:2010.02502) from noise
    that depends only on the seed and the row.

    Args:
        args: the settings of the data, of which `resolution` and `max_train_samples` apply.
        prompts: the prompts. Each has one sample, or in turn as many as give `max_train_samples` rows in all.
        pipeline: the teacher, whose tokenizers and text encoders are removed.
        guidance_scale: scale w of classifier-free guidance, D_null + w (D - D_null); 1 or less is no guidance.
        seed: seed of the run.
        folder, device, rank, world, wait, say, show_progress: as in `TextData`.
        batch_size: number of samples made at once.
        autocast: makes the context in which the pipeline samples.

    Raises:
        ValueError: an option that needs images, or a resolution that the autoencoder can't halve.
        OSError: a file can't be written; the message names it.
    """

    def __init__(
        self,
        args: DataArguments,
        prompts: Sequence[str],
        pipeline: DiffusionPipeline,
        guidance_scale: float,
        seed: int,
        folder: Path,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        wait: Callable[[], object] = lambda: None,
        say: Callable[[str], None] = print,
        show_progress: bool = False,
        batch_size: int = 16,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        shared: dict[str, Any] = {"rank": rank, "world": world, "say": say, "show_progress": show_progress}
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        height, width = args.size or (own, own)
        count = args.max_train_samples or len(prompts)
        captions = [prompts[i % len(prompts)] for i in range(count)]
        self._prepare(args, (height, width), captions, pipeline, folder, device, wait, shared)
        scheduler = sampler_of(pipeline.scheduler)
        settings = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
        facts = [self._teacher, type(scheduler).__name__, settings, TEACHER_STEPS, guidance_scale]
        facts += [seed, height, width, self._prompts.key, self._prompt.tolist()]

        def sampled(rows: range) -> dict[str, Tensor]:
            condition = self._prompts.rows(self._prompt[rows.start : rows.stop])
            noise = torch.stack([self._noise(pipeline, seed, row) for row in rows])
            with autocast():
                return {"latents": sample(pipeline, scheduler, condition, noise, guidance_scale)}

        key = digest(json.dumps(facts, sort_keys=True, default=str).encode())
        options = {"batch_size": batch_size, "desc": "Sampling the teacher", **shared}
        cache = RowCache(folder / "samples", key, count, sampled, **options)
        self._fill([cache], [range(count)], [(height, width)], folder, wait, shared)

    def _noise(self, pipeline: DiffusionPipeline, seed: int, row: int) -> Tensor:
        """The unit noise (c, h, w) from which the trajectory of a row starts."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "teacher noise", row))
        return torch.randn(pipeline.unet.config.in_channels, *self.resolution, generator=generator)


def sampler_of(scheduler: Any) -> DDIMScheduler:
    """The scheduler that samples a teacher deterministically.

    Args:
        scheduler: the teacher's scheduler, which has a table of noise levels.
    """
    schedule = known_schedule(dict(read_scheduler(scheduler).noise_schedule))
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False, **schedule)  # for pixels


def sample(
    pipeline: DiffusionPipeline, scheduler: Any, condition: Condition, noise: Tensor, guidance_scale: float
) -> Tensor:
    """Sample latents (B, c, h, w) by a stock text-to-image pipeline, whose encoders can be gone.

    Args:
        pipeline: the pipeline. Its own scheduler is unchanged.
        scheduler: the scheduler of the samples.
        condition: entries "text" and for SDXL "pooled", (B, ...), with their null rows.
        noise: (B, c, h, w), unit normal.
        guidance_scale: scale of classifier-free guidance; 1 or less is no guidance.
    """
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    embeddings = {}
    for name, null in condition.nulls.items():
        entry = condition.entries[name]
        embeddings |= {names[name]: entry, f"negative_{names[name]}": null.expand_as(entry)}
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])
    pipeline.set_progress_bar_config(disable=True)
    own, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        return pipeline(
            **embeddings, height=height, width=width, latents=noise.to(pipeline.unet.dtype), output_type="latent",
            guidance_scale=guidance_scale, num_inference_steps=TEACHER_STEPS
        ).images  # fmt: skip
    finally:
        pipeline.scheduler = own
