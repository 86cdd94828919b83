"""Feature networks loaded by transformers: DINOv2, and any image classifier on the Hub.

Whole images are resized as tensors, with antialiasing, bilinear or bicubic as in the model's processor. The
processor's cropping is left out, because it would hide the borders.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cm_diffusers.evaluation.checks import as_rgb
from cm_diffusers.lookup import looked_up


DINOV2 = "facebook/dinov2-large"  # the network of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675)
MODES = {2: "bilinear", 3: "bicubic"}  # keys are PIL's numbers


class HubFeatures(nn.Module):
    """A transformers model that maps images (B, 1 or 3, H, W) in [0, 1] to features (B, d).

    Args:
        model: a transformers model.
        processor: settings of the model's image processor.
        head: layer whose input is the features; None takes the model's pooled output.
    """

    def __init__(self, model: nn.Module, processor: dict[str, Any], head: nn.Linear | None):
        super().__init__()
        self.model, self.head = model, head
        self.size, self.mode = _size(processor), MODES.get(processor.get("resample"), "bicubic")
        normalised = processor.get("do_normalize", True)
        self.mean = processor["image_mean"] if normalised else [0.0] * 3
        self.std = processor["image_std"] if normalised else [1.0] * 3

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, d) of `images` (B, 1 or 3, H, W) in [0, 1].

        Raises:
            ValueError: the images have neither 1 nor 3 channels.
        """
        images = F.interpolate(as_rgb(images), self.size, mode=self.mode, antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        pixels = (images - mean) / std
        if self.head is None:
            return self.model(pixel_values=pixels).pooler_output
        entered = []
        hook = self.head.register_forward_pre_hook(lambda head, inputs: entered.append(inputs[0]))
        try:
            self.model(pixel_values=pixels)
        finally:
            hook.remove()
        return entered[0]

    def extra_repr(self) -> str:
        """Preprocessing settings, part of the extractor's fingerprint."""
        return f"{type(self.model).__name__}, size={self.size}, {self.mode}, mean={self.mean}, std={self.std}"


def load_dinov2(name: str | None = None) -> HubFeatures:
    """Load DINOv2; its features are the pooled output, the class token after the last norm.

    `name` is a folder or Hub id; the default is the large model of FD-DINOv2.

    Raises:
        ValueError: transformers or the model is not available.
    """
    model, processor = _load("AutoModel", name or DINOV2)
    return HubFeatures(model, processor, None)


def load_hub_classifier(name: str) -> HubFeatures:
    """Load an image classifier; its features are the input of the linear layer that outputs the logits.

    `name` is a folder or Hub id.

    Raises:
        ValueError: transformers or the model is not available, or no linear layer has as many outputs as classes.
    """
    model, processor = _load("AutoModelForImageClassification", name)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not heads:
        raise ValueError(
            f"extractor {name!r} has no linear layer that outputs its {model.config.num_labels} logits. Use another"
            " image classifier."
        )
    return HubFeatures(model, processor, heads[-1])


def _load(kind: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError:
        raise ValueError(f"extractor {name!r} needs transformers: pip install transformers") from None
    try:
        with looked_up(name) as cached:
            load = {"use_safetensors": True, "dtype": torch.float32, "local_files_only": cached}
            load["adapter_kwargs"] = {"local_files_only": cached}  # with PEFT, transformers also looks for an adapter
            model = getattr(transformers, kind).from_pretrained(name, **load)
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=cached)
        if not {"image_mean", "image_std"} <= processor.keys() and processor.get("do_normalize", True):
            raise ValueError("its image processor lacks image_mean and image_std")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"extractor {name!r} can't be loaded: {error}\n"
            "Other extractors are 'inception', 'dinov2', 'classifier' and module:name."
        ) from None
    return model, processor


def _size(processor: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the model's input images."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = size or processor.get("size") or 224
    if isinstance(size, int):
        return size, size
    side = size.get("shortest_edge")
    return size.get("height", side), size.get("width", side)
