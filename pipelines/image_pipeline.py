"""What the pipelines of this folder share: shapes, latents, labels and images."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..core.conditions import Condition, of_classes
from ..core.guidance import Guidance, call_guided
from ..core.karras import karras_sigma
from .arguments import (
    Entries,
    Generators,
    Images,
    Labels,
    Levels,
    Samples,
    count_of,
    read_count,
    read_entries,
    read_generators,
    read_images,
    read_labels,
    read_number,
    read_numbers,
    read_samples,
)
from .calls import Call, current_call
from .class_names import class_names, labels_named, null_class
from .settings import check_scheduler
from .travel import save_with_code


StepCallback = Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]
OneOrMore = torch.Generator | list[torch.Generator] | None
_signature_keys: dict[tuple[type, type], tuple[Any, Any]] = {}  # as diffusers found them


class ImagePipeline(DiffusionPipeline):
    """Base of pipelines that make images with one network `unet`, unconditional or class-conditional.

    With an autoencoder `vae` the network works in its latents, and images are decoded from them.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _schedulers: tuple[str, ...]  # names of the classes that it samples with

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "ImagePipeline":
        """A pipeline of another's parts and settings; parts given by their names replace those.

        As in diffusers the networks are cast to `torch_dtype`, by default to float32.

        Raises:
            ValueError: parts that this class can't sample with.
        """
        # diffusers itself takes over only networks of the very class that the signature names
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler", "vae")}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[Any, Any]:
        """As diffusers finds them. They are kept: `components` and `device` ask anew, several times in each call."""
        key = (cls, obj if isinstance(obj, type) else type(obj))
        if key not in _signature_keys:
            _signature_keys[key] = super()._get_signature_keys(obj)
        modules, settings = _signature_keys[key]
        return type(modules)(modules), type(settings)(settings)

    @property
    def _execution_device(self) -> torch.device:
        """As diffusers finds it, once in each call: where the network is, unless hooks are to bring it somewhere."""
        call = current_call(self)
        if call is not None and call.device is not None:
            return call.device
        hooked = hasattr(self.unet, "_hf_hook") or any(hasattr(m, "_diffusers_hook") for m in self.unet.modules())
        device = super()._execution_device if hooked else self.unet.device
        if call is not None:
            call.device = device
        return device

    @property
    def network_dtype(self) -> torch.dtype:
        """The network's dtype, found once in each call, as diffusers asks all modules for it."""
        call = current_call(self)
        if call is None:
            return self.unet.dtype
        if call.dtype is None:
            call.dtype = self.unet.dtype
        return call.dtype

    def register_modules(self, **modules: Any) -> None:
        """Take over components as diffusers does. Raises ValueError for a scheduler of a foreign class."""
        if "scheduler" in modules:
            modules["scheduler"] = self.accept_scheduler(modules["scheduler"])
        super().register_modules(**modules)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, self.accept_scheduler(value) if name == "scheduler" else value)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """`scheduler`, or what stands for it here. Raises ValueError for one that the pipeline can't sample with."""
        check_scheduler(type(self).__name__, scheduler, self._schedulers)
        return scheduler

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler: in a call and its callback the one that this call steps, else the pipeline's own.

        The own one shows the levels of the last call.
        """
        call = current_call(self)
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        self.__dict__["scheduler"] = scheduler

    def new_call(self) -> Call:
        """What a call has of its own."""
        return Call(self, self.__dict__["scheduler"], self.__dict__.get("_stops", 0))

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress was told to stop; it does so after its step, with the sample as it is then."""
        call = current_call(self)
        return call is not None and (call.stopped or call.stops != self.__dict__.get("_stops", 0))

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        """As diffusers' users set it: in a callback to stop that call, elsewhere to stop all calls in progress."""
        call = current_call(self)
        if call is not None:
            call.stopped = stop
        elif stop:
            self.__dict__["_stops"] = self.__dict__.get("_stops", 0) + 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps, each with a call of `callback_on_step_end`, of the call in progress or the last one."""
        return self.scheduler.num_inference_steps or 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network makes."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        channels, height, width = self.sample_shape
        if self.vae is None:
            return channels, height, width
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.out_channels, factor * height, factor * width

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None for an unconditional network."""
        return self.unet.config.num_class_embeds

    @property
    def id2label(self) -> dict[int, str] | None:
        """What the classes are called, by label, where `name_classes` has told the network; None else."""
        return class_names(self.unet)

    @property
    def classes(self) -> list[int] | None:
        """The labels that can be drawn: those with a name, or all where none has one; None without classes."""
        return None if self.num_classes is None else list(self.id2label or range(self.num_classes))

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """The labels of classes by their names, as in diffusers' `DiTPipeline`.

        Raises:
            ValueError: a name that no class or that several have, or a model that does not know the names.
        """
        return labels_named(self.id2label, [names] if isinstance(names, str) else names)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """The levels (n,) of n steps that begin at `noise_level`, falling: on a Karras grid that ends at the floor."""
        config = self.scheduler.config
        ramp = np.arange(num_inference_steps) / num_inference_steps
        return karras_sigma(ramp, config.sigma_min, noise_level, config.rho).tolist()

    @property
    def default_steps(self) -> tuple[int, ...]:
        """The numbers of steps that show what the model can do, the usual one first."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, and with the code of the library's classes.

        Once cm_diffusers is imported, `DiffusionPipeline.from_pretrained(folder)` loads it and runs no code of the
        folder; with `custom_pipeline="pipeline", trust_remote_code=True` nothing but diffusers has to be installed.
        The arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        save_with_code(self, save_directory, *args, **kwargs)

    def check_output(self, output_type: str) -> None:
        """Raise ValueError for a form that the images don't have, before any work."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        channels = self.image_shape[0]
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"Images of {channels} channels have no PIL form; use output_type 'np' or 'pt'.")

    def check_callback(self, callback: StepCallback | None, names: Sequence[str]) -> None:
        """Raise ValueError for a callback that can't be called, or tensors that it can't be given."""
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be a function or None, got {callback!r}.")
        unknown = [names] if isinstance(names, str) else [n for n in names if n not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"A callback can be given a list of {self._callback_tensor_inputs}, not {unknown}.")

    def resolve_batch_size(
        self,
        batch_size: int | None,
        class_labels: Labels,
        generator: OneOrMore,
        latents: Samples,
        condition: Samples = None,
        images: Samples = None,
    ) -> int:
        """The batch size that the arguments agree on; ValueError where they don't."""
        counts = {
            "batch_size": read_count("batch_size", batch_size),
            "the number of class_labels": count_of(class_labels),
            "the number of generators": count_of(generator),
            "the batch of latents": count_of(latents),
            "the rows of condition": count_of(condition),
            "the number of images": None if images is None or len(images) == 1 else len(images),  # one is for all
        }
        sizes = {name: size for name, size in counts.items() if size is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "These must agree: " + ", ".join(f"{name} is {size}" for name, size in sizes.items()) + "."
            )
        return next(iter(sizes.values()), 1)

    def prepare_latents(
        self, batch_size: int, generator: OneOrMore, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Unit normal noise (batch_size, *sample_shape) in the network's dtype, or the given latents."""
        if latents is None:
            shape = (batch_size, *self.sample_shape)
            return randn_tensor(shape, generator=generator, device=device, dtype=self.network_dtype)
        return latents.to(device=device, dtype=self.network_dtype)

    def prepare_class_labels(
        self, batch_size: int, class_labels: Labels, generator: OneOrMore, device: torch.device
    ) -> torch.Tensor | None:
        """Labels (batch_size,) on `device`: those given, or from `generator`; None where the network takes none."""
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional.")
            return None
        if class_labels is not None:
            return read_labels(class_labels, self.num_classes, self.id2label).expand(batch_size).to(device)
        generators = generator if isinstance(generator, list) else [generator]
        classes, share = torch.tensor(self.classes), batch_size // len(generators)
        drawn = [
            torch.randint(len(classes), (share,), generator=g, device=g.device if g else "cpu").cpu()
            for g in generators
        ]
        return classes[torch.cat(drawn)].to(device)

    def prepare_condition(
        self,
        batch_size: int,
        class_labels: Labels,
        entries: Entries,
        generator: OneOrMore,
        device: torch.device,
    ) -> Condition:
        """What the network is told of each image: class labels, see `prepare_class_labels`, and other entries."""
        told = of_classes(self.prepare_class_labels(batch_size, class_labels, generator, device))
        return told if entries is None else told.also(**read_entries(entries, batch_size)).to(device)

    def guided(
        self, told: Condition, scale: float, interval: Levels, negative_class_labels: Labels
    ) -> Condition | Guidance:
        """What the network is told, with the guidance that was asked for; ValueError where that can't be.

        Args:
            told: the condition of each image.
            scale: w; 1 is no guidance.
            interval: the lowest and the highest noise level of it; None for all.
            negative_class_labels: classes to be led away from; None for the one that stands for none.
        """
        scale, ends = read_number("guidance_scale", scale), read_numbers("guidance_interval", interval)
        if not 0 <= scale < math.inf:
            raise ValueError(f"guidance_scale must be a number of at least 0, got {scale}.")
        if ends is not None and (len(ends) != 2 or not 0 <= ends[0] < ends[1]):
            raise ValueError(f"guidance_interval must be two noise levels, the lower one first, got {interval!r}.")
        count = read_count("the number of negative_class_labels", count_of(negative_class_labels))
        rows = len(next(iter(told.entries.values()), ()))
        if count not in (None, 1, rows):
            raise ValueError(f"negative_class_labels must be one for all or one per image, {rows}, got {count}.")
        away = None
        if negative_class_labels is not None:
            away = self.prepare_class_labels(rows, negative_class_labels, None, self._execution_device)
        if scale == 1:
            return told
        if away is None:
            null = self._null_class(scale)
            away = torch.full_like(told.entries["class_labels"], null)
        return Guidance(told, told.also(class_labels=away), scale, *(ends or ()))

    def _null_class(self, scale: float) -> int:
        """The label that stands for no class; ValueError where the network knows none, as guidance wants it."""
        null = null_class(self.unet)
        if null is None:
            why = "is unconditional." if self.num_classes is None else "was trained with classes alone."
            advice = " Give negative_class_labels, or train with --label_dropout 0.1." if self.num_classes else ""
            raise ValueError(
                f"guidance_scale {scale:g} needs a model with a class that stands for none; this one {why}{advice}"
            )
        return null

    def prepare(
        self,
        batch_size: int | None,
        class_labels: Labels,
        condition: Entries,
        *,
        generator: Generators,
        latents: Samples,
        output_type: str,
        images: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Condition, OneOrMore]:
        """Unit noise, condition and the source of further noise of a call; ValueError for what can't be done.

        `images` (n, C, H, W) are those that the call begins with, as `read_images` gives them.
        """
        self.check_output(output_type)
        generator, given = read_generators(generator), latents is not None
        rows = next(iter((condition or {}).values()), None)
        batch_size = self.resolve_batch_size(batch_size, class_labels, generator, latents, rows, images)
        latents = read_samples("latents", latents, (batch_size, *self.sample_shape))
        if given and class_labels is None and self.num_classes is not None:
            raise ValueError(
                "latents were given without class_labels, and random classes would be drawn; pass the class_labels"
                f" that they belong to, integers in [0, {self.num_classes - 1}]."
            )
        device = self._execution_device
        noise = self.prepare_latents(batch_size, generator, latents, device)
        return noise, self.prepare_condition(batch_size, class_labels, condition, generator, device), generator

    def read_start(
        self, image: Images, noise_level: float | None, sigmas: Levels, timesteps: Levels
    ) -> tuple[torch.Tensor | None, float | None]:
        """The images that a call begins with, see `read_images`, and their noise level unless other levels are given.

        Raises:
            ValueError: one without the other, a level outside the scheduler's range, or several kinds of levels.
        """
        images = read_images("image", image, self.image_shape)
        level = None if noise_level is None else read_number("noise_level", noise_level)
        others = sigmas is not None or timesteps is not None
        if images is None and level is not None:
            raise ValueError(f"noise_level {level:g} is that of an image to begin with, and no image is given.")
        if level is not None and others:
            raise ValueError("Sampling begins with the first of sigmas or timesteps; leave noise_level out.")
        if images is not None and level is None and not others:
            raise ValueError("An image needs a noise_level to begin with, or sigmas: the higher, the more is new.")
        low, high = self.scheduler.config.get("sigma_min", 0.0), self.scheduler.config.get("sigma_max", math.inf)
        if level is not None and not (low < level <= high and level < math.inf):
            raise ValueError(f"noise_level must be finite and in ({low:g}, {high:g}], got {level:g}.")
        return images, level

    def read_levels(
        self, num_inference_steps: int | None, sigmas: Levels, timesteps: Levels, noise_level: float | None
    ) -> tuple[int | None, list[float] | None, list[float] | None]:
        """The arguments of a scheduler's `set_timesteps`, which checks them: a number of steps, by default the usual
        one, or levels of either kind; those below `noise_level` where that is given."""
        steps = read_count("num_inference_steps", num_inference_steps, None)
        levels, times = read_numbers("sigmas", sigmas), read_numbers("timesteps", timesteps)
        if steps is None and levels is None and times is None:
            steps = self.default_steps[0]
        if noise_level is not None:
            read_count("num_inference_steps", steps)
            count = steps or self.default_steps[0]
            steps, levels = None, self.levels_below(noise_level, count)
        return steps, levels, times

    def set_levels(
        self,
        num_inference_steps: int | None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        **how: Any,
    ) -> None:
        """Tell the scheduler of the call its levels, and how it steps; ValueError for what can't be meant."""
        self.scheduler.set_timesteps(num_inference_steps, self._execution_device, timesteps, sigmas, **how)
        self.scheduler.set_begin_index(0)  # no search for the first time, for which a GPU would have to be waited for

    @property
    def noise_levels(self) -> list[float]:
        """sigma at each call of the network, of the call in progress or the last one, and where they end."""
        return self.scheduler.sigmas.tolist()

    def begun(self, noise: torch.Tensor) -> torch.Tensor:
        """Pure noise of the first level from unit noise; float32, as samples are between the steps."""
        return noise.float() * self.scheduler.init_noise_sigma

    def advance(
        self,
        sample: torch.Tensor,
        index: int,
        timestep: torch.Tensor,
        sigma: float,
        told: Condition | Guidance,
        **noise: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample after a call of the network, and the estimate of the clean one.

        Args:
            sample: (B, ...), float32.
            index, timestep, sigma: the call's place among `scheduler.timesteps`, its entry there, and its level.
            told: what the network is told of the samples.
            **noise: `generator`, or `variance_noise`, for the scheduler's step.
        """
        network_input = self.scheduler.scale_model_input(sample, timestep).to(self.network_dtype)
        output = call_guided(self.unet, network_input, timestep, told=told, sigma=sigma, **self.targets(index))
        return self.scheduler.step(output.float(), timestep, sample, return_dict=False, **noise)

    def targets(self, index: int) -> dict[str, torch.Tensor]:
        """What a network that jumps is told of where to, in its call `index`."""
        return {}

    def encoded(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Images (1 or B, C, H, W) in [-1, 1] as samples like `noise` (B, c, h, w), float32: what `decode` undoes."""
        images = images.to(noise.device)
        if self.vae is not None:
            config = self.vae.config
            latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
            images = (latents - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)
        return images.expand(noise.shape)

    def read_sample(self, image: Images, class_labels: Labels, condition: Entries) -> tuple[torch.Tensor, Condition]:
        """Images to begin with and no noise, as samples (n, *sample_shape) in float32, and what the network is told.

        Raises:
            ValueError: no images, or labels missing or unknown, as a trajectory belongs to a class.
        """
        images = read_images("images", image, self.image_shape)
        if images is None:
            raise ValueError("images must be given.")
        told = self.told_of(len(images), class_labels, condition)
        sample = torch.empty(len(images), *self.sample_shape, device=self._execution_device)
        return self.encoded(images, sample), told

    def told_of(self, batch_size: int, class_labels: Labels, condition: Entries) -> Condition:
        """What the network is told of given samples; ValueError where labels are missing, as none are drawn."""
        if self.num_classes is not None and class_labels is None:
            raise ValueError("This model is conditional; pass the class_labels whose trajectories are meant.")
        self.resolve_batch_size(batch_size, class_labels, None, None)
        return self.prepare_condition(batch_size, class_labels, condition, None, self._execution_device)

    def steps(self, timesteps: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and time of each step under a progress bar, until the call is told to stop."""
        times, settings = timesteps.unbind(), getattr(self, "_progress_bar_config", {})
        for i, timestep in enumerate(times if settings.get("disable") else self.progress_bar(times)):
            if self.interrupt:
                return
            yield i, timestep

    def after_step(
        self,
        callback: StepCallback | None,
        index: int,
        timestep: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        names: Sequence[str],
    ) -> torch.Tensor:
        """Show the callback the tensors called `names`; give back the latents, as it may have changed them."""
        if callback is None:
            return tensors["latents"]
        changed = callback(self, index, timestep, {name: tensors[name] for name in names})
        if changed is not None and not (isinstance(changed, dict) and set(changed) <= set(tensors)):
            raise ValueError(
                f"callback_on_step_end must return None or a dict with some of {list(tensors)}, got"
                f" {list(changed) if isinstance(changed, dict) else type(changed).__name__}."
            )
        return {**tensors, **(changed or {})}["latents"]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] from latents (B, c, h, w), scaled and shifted as its config says."""
        config = self.vae.config
        latents = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def finish(self, sample: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Images from a sample in [-1, 1], or in the latents of `vae`: a list of PIL images, an array (B, H, W, C) or
        a tensor (B, C, H, W); for "latent" the sample itself."""
        images = sample
        if output_type != "latent":
            if self.vae is not None:
                sample = self.decode(sample)
            images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = VaeImageProcessor.pt_to_numpy(images)
            if output_type == "pil":
                images = VaeImageProcessor.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
