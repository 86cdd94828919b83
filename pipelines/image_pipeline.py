"""What the pipelines of this folder share: shapes, latents, labels and images."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .class_names import class_names, labels_named
from .travel import save_with_code


Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]


class ImagePipeline(DiffusionPipeline):
    """Base of pipelines that make images with one network `unet`, unconditional or class-conditional.

    With an autoencoder `vae` the network works in its latents, and images are decoded from them.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

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

    @property
    def default_steps(self) -> tuple[int, ...]:
        """The numbers of steps that show what the model can do, the usual one first."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as diffusers does, and with the code of the library's classes.

        Once cm_diffusers is imported, `DiffusionPipeline.from_pretrained(folder)` loads it and runs no code of the
        folder; with `custom_pipeline="pipeline", trust_remote_code=True` nothing but diffusers has to be installed.
        The arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        save_with_code(self, save_directory, *args, **kwargs)

    def check_inputs(self, output_type: str, tensor_inputs: list[str]) -> None:
        """Raise ValueError for what can't be done, before any work."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        channels = self.image_shape[0]
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(f"Images of {channels} channels have no PIL form; use output_type 'np' or 'pt'.")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"A callback can be given {self._callback_tensor_inputs}, not {unknown}.")

    def resolve_batch_size(
        self, batch_size: int | None, class_labels: object, generator: Generators, latents: torch.Tensor | None
    ) -> int:
        """The batch size that the arguments agree on; ValueError where they don't."""
        sizes = {"batch_size": batch_size}
        if isinstance(class_labels, (list, tuple, np.ndarray)) or torch.is_tensor(class_labels) and class_labels.ndim:
            sizes["the number of class_labels"] = len(class_labels)
        if isinstance(generator, list):
            sizes["the number of generators"] = len(generator)
        if latents is not None:
            sizes["the batch of latents"] = len(latents)
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "These must agree: " + ", ".join(f"{name} is {size}" for name, size in sizes.items()) + "."
            )
        return next(iter(sizes.values()), 1)

    def prepare_latents(
        self, batch_size: int, generator: Generators, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Unit normal noise (batch_size, *sample_shape) in the network's dtype, or the given latents, checked."""
        shape = (batch_size, *self.sample_shape)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=self.unet.dtype)

    def prepare_class_labels(
        self, batch_size: int, class_labels: object, generator: Generators, device: torch.device
    ) -> torch.Tensor | None:
        """Labels (batch_size,) on `device`: those given, or from `generator`; None where the network takes none."""
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this model is unconditional.")
            return None
        if class_labels is None:
            generators = generator if isinstance(generator, list) else [generator]
            share = batch_size // len(generators)
            classes = torch.tensor(self.classes)
            drawn = [
                torch.randint(len(classes), (share,), generator=g, device=g.device if g else "cpu").cpu()
                for g in generators
            ]
            return classes[torch.cat(drawn)].to(device)
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)
        elif isinstance(class_labels, (list, tuple, np.ndarray)) and any(isinstance(c, str) for c in class_labels):
            class_labels = [self.get_label_ids(c)[0] if isinstance(c, str) else c for c in class_labels]
        labels = torch.as_tensor(class_labels)
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"class_labels must be integers in [0, {self.num_classes - 1}], got {labels.tolist()}.")
        return labels.reshape(-1).expand(batch_size).to(device)

    def prepare(
        self,
        batch_size: int | None,
        class_labels: object,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        tensor_inputs: list[str],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit noise and class labels for what a call asks for; ValueError for what can't be done."""
        self.check_inputs(output_type, tensor_inputs)
        batch_size = self.resolve_batch_size(batch_size, class_labels, generator, latents)
        device = self._execution_device
        noise = self.prepare_latents(batch_size, generator, latents, device)
        return noise, self.prepare_class_labels(batch_size, class_labels, generator, device)

    def after_step(
        self, callback: StepCallback | None, index: int, timestep: torch.Tensor, tensors: dict, names: list[str]
    ) -> dict:
        """Show the callback the tensors called `names`; give back all tensors, as it may have changed them."""
        if callback is None:
            return tensors
        changed = callback(self, index, timestep, {name: tensors[name] for name in names}) or {}
        return {**tensors, **changed}

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
