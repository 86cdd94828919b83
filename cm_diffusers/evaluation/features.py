"""Feature extractors for comparing images, and the fingerprints that identify them."""

import hashlib
import importlib
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cm_diffusers.evaluation.classifier import train_classifier
from cm_diffusers.evaluation.hub_networks import load_dinov2, load_hub_classifier
from cm_diffusers.evaluation.inception import load_inception


BATCH = 100  # images per forward pass of a network
CLASSIFIER_IMAGES = 200_000  # training images shown to the classifier: about this many, at most 20 epochs


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Args:
        name: `inception`, `dinov2`, `classifier`, a Hub id, or the name of a module.
        network: maps images (B, C, H, W) in [0, 1] to features (B, d).
        fingerprint: a hash of the weights and the preprocessing of the images.
        shape: (C, H, W) of the images, if the network accepts only this shape.
        device: device of the network.
    """

    name: str
    network: nn.Module = field(repr=False)
    fingerprint: str
    shape: tuple[int, ...] | None = None
    device: torch.device | str = "cpu"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, d), float32, on `device`, of `images` (B, C, H, W) in [0, 1].

        Images are rounded to 8 bits, so that samples in memory have the same features as in files. On a GPU,
        convolutions compute in float32, not TF32.

        Raises:
            ValueError: images of another shape or range, or features of another shape or not finite.
        """
        if images.ndim != 4 or not len(images) or not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images must be (B, C, H, W) with finite values in [0, 1]; got {tuple(images.shape)}.")
        if self.shape is not None and images.shape[1:] != self.shape:
            shape = tuple(images.shape[1:])
            raise ValueError(f"extractor {self.name!r} is for images of shape {self.shape} (C, H, W); got {shape}.")
        parts = []
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for part in images.split(BATCH):
                parts.append(self.network((part.to(self.device, torch.float32) * 255).round() / 255))
        features = torch.cat(parts).float()
        if features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape)
            raise ValueError(
                f"extractor {self.name!r} must give (B, d) for (B, C, H, W); it gave {shape} for {len(images)} images."
            )
        if not features.isfinite().all():
            raise ValueError(f"extractor {self.name!r} gives features that are not finite. Are its weights broken?")
        return features


def load_extractor(
    name: str | nn.Module,
    weights: str | None = None,
    reference: tuple[Tensor, Tensor | None] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Extractor:
    """Load the extractor `name`, one of:

    - `inception`: the network of FID;
    - `dinov2`: the network of FD-DINOv2;
    - `classifier`: a small classifier trained on `reference`, for when nothing else is available;
    - `module:name`: an nn.Module, or a function that makes one, to be imported;
    - a folder or Hub id of an image classifier;
    - an nn.Module itself.

    Args:
        name: see above.
        weights: for `inception`, the path of its published file. For `dinov2`, a folder or Hub id of another size.
        reference: images (N, C, H, W) in [0, 1] with labels (N,), for `classifier`.
        device: device for the network.
        seed: seed of the training of `classifier`.

    Raises:
        ValueError: the extractor is unknown, or its weights, network or labels are missing.
    """
    if weights is not None and name not in ("inception", "dinov2"):
        raise ValueError(f"weights can be set for the extractors 'inception' and 'dinov2' only, not for {name!r}.")
    shape = None
    if isinstance(name, nn.Module):
        name, network = type(name).__name__, name
        facts = _sources(network)
    elif name == "inception":
        network, facts = load_inception(weights), "resized as TensorFlow 1 does to 299"
    elif name == "dinov2":
        network = load_dinov2(weights)
        facts = network.extra_repr()
    elif name == "classifier":
        images, labels = reference or (None, None)
        if labels is None:
            raise ValueError(
                "extractor 'classifier' is trained on labelled images, but these have no labels. Name the column of"
                " labels, or another extractor: 'inception', 'dinov2', an image classifier on the Hub or module:name."
            )
        epochs = min(20, -(-CLASSIFIER_IMAGES // len(images)))
        shape, network = tuple(images.shape[1:]), train_classifier(images, labels, seed, epochs).body
        facts = repr(network)
    elif ":" in name:
        network = _import(name)
        facts = _sources(network)
    else:
        network = load_hub_classifier(name)
        facts = network.extra_repr()
    network = network.eval().requires_grad_(False)
    return Extractor(name, network.to(device), _fingerprint(network, facts), shape, device)


def _import(name: str) -> nn.Module:
    module, attribute = name.split(":", 1)
    try:
        network = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"extractor {name!r} can't be imported: {error}. Add its folder to PYTHONPATH.") from None
    network = network if isinstance(network, nn.Module) else network()
    if not isinstance(network, nn.Module):
        raise ValueError(f"extractor {name!r} must be an nn.Module or return one; got a {type(network).__name__}.")
    return network


def _sources(network: nn.Module) -> str:
    """Source code of the network's classes where available, because features change with it."""
    texts = []
    for kind in sorted({type(module) for module in network.modules()}, key=str):
        try:
            texts.append(inspect.getsource(kind))
        except (OSError, TypeError):
            texts.append(str(kind))
    return repr(network) + "".join(texts)


def _fingerprint(network: nn.Module, facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for key, value in network.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
