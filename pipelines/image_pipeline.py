"""The base of the pipelines: shapes, noise, class labels, guidance, noise levels and images."""

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
_signature_keys: dict[tuple[type, type], tuple[Any, Any]] = {}  # cache of what diffusers finds


class ImagePipeline(DiffusionPipeline):
    """Base of pipelines that generate images with one network `unet`, unconditional or class-conditional.

    With an autoencoder `vae`, the network works on latents, and images are decoded from them.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _schedulers: tuple[str, ...]  # names of the scheduler classes that it accepts

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "ImagePipeline":
        """Make a pipeline from the components and settings of another one.

        Args:
            pipeline: the other pipeline.
            **kwargs: components by name, which replace those of `pipeline`, and settings. As in diffusers, networks
                are cast to `torch_dtype`, by default to float32.

        Raises:
            ValueError: this class can't sample with the components.
        """
        # diffusers itself takes over only networks of exactly the class in the signature
        parts = {name: part for name, part in pipeline.components.items() if name in ("unet", "scheduler", "vae")}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[Any, Any]:
        """Find them as diffusers does, but only once: `components` and `device` ask several times in each call."""
        key = (cls, obj if isinstance(obj, type) else type(obj))
        if key not in _signature_keys:
            _signature_keys[key] = super()._get_signature_keys(obj)
        modules, settings = _signature_keys[key]
        return type(modules)(modules), type(settings)(settings)

    @property
    def _execution_device(self) -> torch.device:
        """The device of the network or, with offloading hooks, the one that diffusers finds; found once per call."""
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
        """The network's dtype. It is found once per call, because diffusers searches all modules for it."""
        call = current_call(self)
        if call is None:
            return self.unet.dtype
        if call.dtype is None:
            call.dtype = self.unet.dtype
        return call.dtype

    def register_modules(self, **modules: Any) -> None:
        """Register components as diffusers does, after `accept_scheduler` has checked the scheduler.

        Args:
            **modules: the components by name.
        """
        if "scheduler" in modules:
            modules["scheduler"] = self.accept_scheduler(modules["scheduler"])
        super().register_modules(**modules)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, self.accept_scheduler(value) if name == "scheduler" else value)

    def accept_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """Check a scheduler, and return `scheduler` itself or what the pipeline uses instead of it.

        Raises:
            ValueError: the pipeline can't sample with the scheduler.
        """
        check_scheduler(type(self).__name__, scheduler, self._schedulers)
        return scheduler

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler: during a call and in its callback the call's copy, otherwise the pipeline's own.

        The own scheduler shows the levels of the last call.
        """
        call = current_call(self)
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        self.__dict__["scheduler"] = scheduler

    def new_call(self) -> Call:
        """Return the state of a new call."""
        return Call(self, self.__dict__["scheduler"], self.__dict__.get("_stops", 0))

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress was asked to stop. It ends after the current step, with the current sample."""
        call = current_call(self)
        return call is not None and (call.stopped or call.stops != self.__dict__.get("_stops", 0))

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        """Set as in diffusers: in a callback to stop that call, elsewhere to stop all calls in progress."""
        call = current_call(self)
        if call is not None:
            call.stopped = stop
        elif stop:
            self.__dict__["_stops"] = self.__dict__.get("_stops", 0) + 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call in progress, or else of the last call. Each step calls the callback once."""
        return self.scheduler.num_inference_steps or 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the samples of the network: images, or latents."""
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
        """The class names by label, as `name_classes` stores them; None if the network has no names."""
        return class_names(self.unet)

    @property
    def classes(self) -> list[int] | None:
        """The labels that can be drawn: those with a name, or all if no class has a name. None without classes."""
        return None if self.num_classes is None else list(self.id2label or range(self.num_classes))

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Look up the labels of class names, as in diffusers' `DiTPipeline`.

        Args:
            names: one name or several.

        Raises:
            ValueError: a name matches no class or several classes, or the model has no class names.
        """
        return labels_named(self.id2label, [names] if isinstance(names, str) else names)

    def levels_below(self, noise_level: float, num_inference_steps: int) -> list[float]:
        """Return the decreasing noise levels of `num_inference_steps` steps that begin at `noise_level`.

        They lie on a Karras grid; the last step ends at sigma_min.
        """
        config = self.scheduler.config
        ramp = np.arange(num_inference_steps) / num_inference_steps
        return karras_sigma(ramp, config.sigma_min, noise_level, config.rho).tolist()

    @property
    def default_steps(self) -> tuple[int, ...]:
        """Numbers of steps that suit the model. The first one is the default of a call."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, together with the code of the library's classes.

        Once cm_diffusers is imported, `DiffusionPipeline.from_pretrained(folder)` loads the folder and runs none of
        its code. Without cm_diffusers, add `custom_pipeline="pipeline", trust_remote_code=True`.

        Args:
            save_directory: the folder.
            *args: further arguments of `DiffusionPipeline.save_pretrained`.
            **kwargs: further arguments of `DiffusionPipeline.save_pretrained`.
        """
        save_with_code(self, save_directory, *args, **kwargs)

    def check_output(self, output_type: str) -> None:
        """Check `output_type`, before any work.

        Raises:
            ValueError: `output_type` is unknown, or PIL has no images with the model's channels.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        channels = self.image_shape[0]
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"Images of {channels} channels have no PIL form; use output_type 'np' or 'pt'.")

    def check_callback(self, callback: StepCallback | None, names: Sequence[str]) -> None:
        """Check the callback of a call.

        Args:
            callback: `callback_on_step_end` of a call.
            names: `callback_on_step_end_tensor_inputs` of a call.

        Raises:
            ValueError: `callback` is not callable, or `names` has unknown tensors.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"callback_on_step_end must be a function or None, got {callback!r}.")
        unknown = [names] if isinstance(names, str) else [n for n in names if n not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs must be a list with some of"
                f" {self._callback_tensor_inputs}, got {unknown}."
            )

    def resolve_batch_size(
        self,
        batch_size: int | None,
        class_labels: Labels,
        generator: OneOrMore,
        latents: Samples,
        condition: Samples = None,
        images: Samples = None,
    ) -> int:
        """Return the batch size on which the arguments of a call agree; 1 if none determines it.

        Args:
            batch_size: the given number of images, or None.
            class_labels: labels; a sequence has one per image.
            generator: generators; a list has one per image.
            latents: noise (B, C, H, W), or None.
            condition: any entry (B, ...) of the further conditioning, or None.
            images: start images (n, C, H, W), or None. One image is for all.

        Raises:
            ValueError: `batch_size` is not a positive integer, or the arguments disagree.
        """
        counts = {
            "batch_size": read_count("batch_size", batch_size),
            "the number of class_labels": count_of(class_labels),
            "the number of generators": count_of(generator),
            "the batch of latents": count_of(latents),
            "the rows of condition": count_of(condition),
            "the number of images": None if images is None or len(images) == 1 else len(images),  # one for all
        }
        sizes = {name: size for name, size in counts.items() if size is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "The batch sizes must agree: " + ", ".join(f"{name} is {size}" for name, size in sizes.items()) + "."
            )
        return next(iter(sizes.values()), 1)

    def prepare_latents(
        self, batch_size: int, generator: OneOrMore, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Draw unit normal noise, or convert the given noise.

        Args:
            batch_size: number of samples, B.
            generator: the source of the noise, or one per sample.
            latents: the given noise (B, *sample_shape), or None.
            device: the device of the result.

        Returns:
            The noise (B, C, H, W) on `device` in the network's dtype.
        """
        if latents is None:
            shape = (batch_size, *self.sample_shape)
            return randn_tensor(shape, generator=generator, device=device, dtype=self.network_dtype)
        return latents.to(device=device, dtype=self.network_dtype)

    def prepare_class_labels(
        self, batch_size: int, class_labels: Labels, generator: OneOrMore, device: torch.device
    ) -> torch.Tensor | None:
        """Read class labels, or draw them.

        Args:
            batch_size: number of samples, B.
            class_labels: the given labels, see `read_labels`; None to draw from `classes`.
            generator: the source of drawn labels, or one per sample.
            device: the device of the result.

        Returns:
            int64 labels (B,) on `device`; None for an unconditional network.

        Raises:
            ValueError: labels are invalid, or are given to an unconditional model.
        """
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
        """Return the conditioning of the network: class labels and further entries.

        Args:
            batch_size: number of samples, B.
            class_labels: the given labels, see `prepare_class_labels`.
            entries: further conditioning (B, ...) by name, or None.
            generator: the source of drawn labels, or one per sample.
            device: the device of the result.
        """
        told = of_classes(self.prepare_class_labels(batch_size, class_labels, generator, device))
        return told if entries is None else told.also(**read_entries(entries, batch_size)).to(device)

    def guided(
        self, told: Condition, scale: float, interval: Levels, negative_class_labels: Labels
    ) -> Condition | Guidance:
        """Add classifier-free guidance to the conditioning of a call.

        Args:
            told: the conditioning of each sample.
            scale: the weight w; 1 is no guidance.
            interval: the lowest and the highest noise level with guidance; None for all levels.
            negative_class_labels: classes to move away from; None for the null class.

        Raises:
            ValueError: an argument is invalid, or the null class is needed and the model has none.
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
        """Return the label of the null class. ValueError if the network has none, which guidance needs."""
        null = null_class(self.unet)
        if null is None:
            why = "is unconditional." if self.num_classes is None else "was trained without label dropout."
            advice = " Give negative_class_labels, or train with --label_dropout 0.1." if self.num_classes else ""
            raise ValueError(f"guidance_scale {scale:g} needs a model with a null class; this one {why}{advice}")
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
        """Check the arguments of a call, and prepare its noise and conditioning.

        `batch_size`, `class_labels`, `condition`, `generator`, `latents` and `output_type` are arguments of the call.
        `images` are its start images (n, C, H, W), as `read_start` returns them, or None.

        Returns:
            Unit normal noise (B, *sample_shape), the conditioning, and the source of further noise.

        Raises:
            ValueError: an argument is invalid.
        """
        self.check_output(output_type)
        generator, given = read_generators(generator), latents is not None
        rows = next(iter((condition or {}).values()), None)
        batch_size = self.resolve_batch_size(batch_size, class_labels, generator, latents, rows, images)
        latents = read_samples("latents", latents, (batch_size, *self.sample_shape))
        if given and class_labels is None and self.num_classes is not None:
            raise ValueError(
                "latents were given without class_labels, so random classes would be drawn. Pass the class_labels"
                f" of the latents, integers in [0, {self.num_classes - 1}]."
            )
        device = self._execution_device
        noise = self.prepare_latents(batch_size, generator, latents, device)
        return noise, self.prepare_condition(batch_size, class_labels, condition, generator, device), generator

    def read_start(
        self, image: Images, noise_level: float | None, sigmas: Levels, timesteps: Levels
    ) -> tuple[torch.Tensor | None, float | None]:
        """Read the images from which a call starts, and their noise level.

        `image`, `noise_level`, `sigmas` and `timesteps` are arguments of the call.

        Returns:
            The images (n, C, H, W) in [-1, 1], or None; and the noise level, or None if other levels are given.

        Raises:
            ValueError: an image without levels, a noise level without an image or outside the scheduler's range, or
                several kinds of levels.
        """
        images = read_images("image", image, self.image_shape)
        level = None if noise_level is None else read_number("noise_level", noise_level)
        others = sigmas is not None or timesteps is not None
        if images is None and level is not None:
            raise ValueError(f"noise_level {level:g} has no effect without an image to start from; give image.")
        if level is not None and others:
            raise ValueError("sigmas and timesteps begin with the noise level of the image; leave noise_level out.")
        if images is not None and level is None and not others:
            raise ValueError("image needs a noise_level, or sigmas: the higher, the more of the image changes.")
        low, high = self.scheduler.config.get("sigma_min", 0.0), self.scheduler.config.get("sigma_max", math.inf)
        if level is not None and not (low < level <= high and level < math.inf):
            raise ValueError(f"noise_level must be finite and in ({low:g}, {high:g}], got {level:g}.")
        return images, level

    def read_levels(
        self, num_inference_steps: int | None, sigmas: Levels, timesteps: Levels, noise_level: float | None
    ) -> tuple[int | None, list[float] | None, list[float] | None]:
        """Read the levels of a call, for the scheduler's `set_timesteps`, which checks their range and order.

        Args:
            num_inference_steps: number of steps. If no levels are given, the default is the first of `default_steps`.
            sigmas: noise levels, or None.
            timesteps: time labels, or None.
            noise_level: the noise level of a start image, from which the steps begin; None without one.

        Returns:
            A number of steps, noise levels and time labels, of which two are None if the call is valid.
        """
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
        """Set the levels of the call in its scheduler, which checks them.

        `num_inference_steps`, `sigmas`, `timesteps` and the further arguments `how`, such as `gamma` or `solver`, are
        those of the scheduler's `set_timesteps`.
        """
        self.scheduler.set_timesteps(num_inference_steps, self._execution_device, timesteps, sigmas, **how)
        self.scheduler.set_begin_index(0)  # avoids a search for the first timestep, which waits for a GPU

    @property
    def noise_levels(self) -> list[float]:
        """sigma at each network call of the call in progress, or else of the last call, and the final level."""
        return self.scheduler.sigmas.tolist()

    def begun(self, noise: torch.Tensor) -> torch.Tensor:
        """Scale unit `noise` (B, C, H, W) to the first level, in float32, the dtype of samples between steps."""
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
        """Call the network once, and step the scheduler.

        Args:
            sample: the current sample (B, ...), float32.
            index: the index of the network call in `scheduler.timesteps`.
            timestep: the entry at `index`.
            sigma: the noise level at `index`.
            told: the conditioning of the network, with or without guidance.
            **noise: `generator` or `variance_noise`, for the scheduler's step.

        Returns:
            The next sample, and the estimate of the clean sample, both (B, ...).
        """
        network_input = self.scheduler.scale_model_input(sample, timestep).to(self.network_dtype)
        output = call_guided(self.unet, network_input, timestep, told=told, sigma=sigma, **self.targets(index))
        return self.scheduler.step(output.float(), timestep, sample, return_dict=False, **noise)

    def targets(self, index: int) -> dict[str, torch.Tensor]:
        """Return further keywords of network call `index`: a scalar `target_timestep` for networks that jump."""
        return {}

    def encoded(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Convert images to clean samples: latents in a latent model, which `decode` converts back.

        Args:
            images: (B, C, H, W) in [-1, 1], or (1, C, H, W) for all samples.
            noise: a tensor (B, c, h, w) with the shape and device of the result.

        Returns:
            float32 samples (B, c, h, w).
        """
        images = images.to(noise.device)
        if self.vae is not None:
            config = self.vae.config
            latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
            images = (latents - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)
        return images.expand(noise.shape)

    def read_sample(self, image: Images, class_labels: Labels, condition: Entries) -> tuple[torch.Tensor, Condition]:
        """Read images as clean samples, and their conditioning.

        Args:
            image: the images, see `read_images`.
            class_labels: their labels. A class-conditional model requires them, because trajectories depend on them.
            condition: further conditioning (B, ...) by name, or None.

        Returns:
            float32 samples (B, *sample_shape), and the conditioning.

        Raises:
            ValueError: images are missing or invalid, or labels are missing or unknown.
        """
        images = read_images("images", image, self.image_shape)
        if images is None:
            raise ValueError("images must be given.")
        told = self.told_of(len(images), class_labels, condition)
        sample = torch.empty(len(images), *self.sample_shape, device=self._execution_device)
        return self.encoded(images, sample), told

    def told_of(self, batch_size: int, class_labels: Labels, condition: Entries) -> Condition:
        """Return the conditioning of given samples. Class labels are not drawn.

        Args:
            batch_size: number of samples, B.
            class_labels: labels of the samples. A class-conditional model requires them.
            condition: further conditioning (B, ...) by name, or None.

        Raises:
            ValueError: labels are missing or unknown, or an argument has another number of rows.
        """
        if self.num_classes is not None and class_labels is None:
            raise ValueError("This model is class-conditional; pass the class_labels of the samples.")
        self.resolve_batch_size(batch_size, class_labels, None, None)
        return self.prepare_condition(batch_size, class_labels, condition, None, self._execution_device)

    def steps(self, timesteps: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield index and timestep of each step under a progress bar, until the call is asked to stop.

        Args:
            timesteps: the timesteps (steps,) of the call.
        """
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
        """Call the callback of a step, and return the latents (B, C, H, W), which it can replace.

        Args:
            callback: `callback_on_step_end` of the call, or None.
            index: the index of the step.
            timestep: the timestep of the step.
            tensors: the tensors of the step by name, "latents" among them.
            names: names of the tensors that the callback receives.

        Raises:
            ValueError: the callback returned neither None nor a dict with some of `tensors`.
        """
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
        """Decode `latents` (B, c, h, w) to images (B, C, H, W) in [-1, 1], by scale and shift of the vae's config."""
        config = self.vae.config
        latents = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def finish(self, sample: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Convert the last sample to the output of a call, and free offloaded networks.

        Args:
            sample: images in [-1, 1] (B, C, H, W), or latents.
            output_type: "pil" for a list of PIL images, "np" for an array (B, H, W, C) and "pt" for a tensor
                (B, C, H, W) in [0, 1]; "latent" for `sample` itself.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
        """
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
