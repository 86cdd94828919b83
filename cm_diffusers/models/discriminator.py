"""Discriminators: networks that learn to tell made images from real ones, by one logit for each patch of an image.

Neither keeps running statistics or draws random numbers, and no sample sees another: two processes equal one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GROUP = 8  # channels that are normalised together: several, so that a map of one pixel keeps something of itself


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


def _check_width(width: int, step: int) -> None:
    if width < step or width % step:
        raise ValueError(f"width {width} must be a positive multiple of {step}.")


class ProjectionHead(nn.Module):
    """One logit for each position of a feature map: w·h + b, and for classes + e(y)·h / sqrt(channels).

    The inner product with an embedding of the class is that of Miyato & Koyama (2018, arXiv:1802.05637, section 3),
    here at each position.

    Args:
        channels: of the feature map.
        num_classes: None for a head without classes.
    """

    def __init__(self, channels: int, num_classes: int | None = None):
        super().__init__()
        self.linear = nn.Conv2d(channels, 1, 1)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, channels)

    def forward(self, features: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, channels, h, w), (B,) -> (B, h w).

        Raises:
            ValueError: class labels are missing, or there are some and the head has no classes.
        """
        logits = self.linear(features)
        if self.embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels given, but the discriminator was made without num_classes.")
            return logits.flatten(1)
        if class_labels is None:
            raise ValueError(f"class_labels are missing: there are {self.embedding.num_embeddings} classes.")
        embedding = self.embedding(class_labels)[:, :, None, None] / features.shape[1] ** 0.5
        return (logits + (embedding * features).sum(1, keepdim=True)).flatten(1)


class _ToldOfClasses:
    """A part of a network that knows class labels and no other condition."""

    def adapt_condition(self, condition: Any) -> dict[str, Tensor]:
        """Of a condition the class labels."""
        return {name: entry for name, entry in condition.entries.items() if name == "class_labels"}


class PatchDiscriminator(_ToldOfClasses, nn.Module):
    """Strided convolutions, each halving the image and doubling the channels, on whose last map a logit is read.

    A small discriminator on pixels, after Isola et al. (2016, arXiv:1611.07004, "PatchGAN"), with GroupNorm for its
    BatchNorm, which would couple samples, and without spectral norm, whose running vectors are state.

    Args:
        channels: of the images.
        num_classes: None for a discriminator without classes.
        width: channels of the first map, a multiple of 4; they double until eight times as many.
        levels: how often the image is halved.

    Raises:
        ValueError: an impossible width or number of levels.
    """

    def __init__(self, channels: int, num_classes: int | None = None, width: int = 64, levels: int = 3):
        super().__init__()
        _check_width(width, 4)
        if levels < 1:
            raise ValueError(f"levels {levels} must be at least 1.")
        self.levels = levels
        widths = [width * min(2**level, 8) for level in range(levels)]
        # no norm on the first map: brightness and contrast are for the discriminator to see
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 4, 2, 1), _norm(after), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.head = ProjectionHead(widths[-1], num_classes)

    def forward(self, images: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] and class labels (B,) int64 -> logits (B, patches), high for real.

        There are floor(H / 2^levels) floor(W / 2^levels) patches, and their fields of view overlap.

        Raises:
            ValueError: images smaller than 2^levels, or class labels missing or not expected.
        """
        if min(images.shape[2:]) < 2**self.levels:
            height, width = images.shape[2:]
            raise ValueError(f"images of {height}x{width} are too small: {self.levels} levels need {2**self.levels}.")
        return self.head(self.features(images), class_labels)


class ProjectedDiscriminator(_ToldOfClasses, nn.Module):
    """Small trained heads on the frozen features of a pretrained network, one head on each of its feature maps.

    Projected GANs (Sauer et al. 2021, arXiv:2111.01007) and StyleGAN-XL (Sauer et al. 2022, arXiv:2202.00273), whose
    discriminator CTM uses (Kim et al. 2023, arXiv:2310.02279). Left out: the fixed random mixing of channels and of
    scales (a learned 1x1 convolution on each scale stands for it), spectral norm, and the second backbone. The
    convolutions of the heads halve nothing; their maps are averaged down to 4 to 7 positions a side, so that fine
    scales don't outnumber coarse ones.

    The backbone is no submodule: it is in neither `parameters()` nor `state_dict()`, and `train()` and
    `requires_grad_()` don't reach it; `to()` does. Its weights are frozen, in eval mode, and shared with the caller's.

    Args:
        backbone: gives `.feature_maps`, a sequence of (B, C_i, h_i, w_i), of images normalised as ImageNet's are, and
            has `.channels`, the C_i. Backbones of transformers do.
        channels: of the images, 1 or 3.
        num_classes: None for a discriminator without classes.
        width: channels of a head, a multiple of 8.
        image_size: side to which images are resized, also those that are not square. Default: `image_size` of the
            backbone's config, else 224.

    Raises:
        ValueError: another number of channels, or an impossible width.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        num_classes: int | None = None,
        width: int = 64,
        image_size: int | None = None,
    ):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"images of {channels} channels: a pretrained backbone sees those of 1 or 3.")
        _check_width(width, GROUP)
        self._frozen = (backbone.requires_grad_(False).eval(),)  # a tuple hides it from nn.Module
        size = image_size or getattr(getattr(backbone, "config", None), "image_size", None) or 224
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.stems = nn.ModuleList(self._stem(count, width) for count in backbone.channels)
        self.heads = nn.ModuleList(ProjectionHead(width, num_classes) for _ in backbone.channels)

    @staticmethod
    def _stem(channels: int, width: int) -> nn.Sequential:
        mix = [nn.Conv2d(channels, width, 1), _norm(width), nn.LeakyReLU(0.2)]
        return nn.Sequential(*mix, nn.Conv2d(width, width, 3, padding=1), _norm(width), nn.LeakyReLU(0.2))

    @property
    def backbone(self) -> nn.Module:
        """The frozen network."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProjectedDiscriminator":
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _prepare(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 3, *image_size), normalised."""
        if tuple(images.shape[2:]) != self.image_size:
            # only shrinking needs the filter
            shrinks = any(before > after for before, after in zip(images.shape[2:], self.image_size))
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=shrinks)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images + 1) / 2 - mean) / std  # one channel becomes three here

    def forward(self, images: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] and class labels (B,) int64 -> logits (B, n) of all heads, high for real.

        Raises:
            ValueError: class labels missing or not expected.
        """
        logits = []
        for features, stem, head in zip(self.backbone(self._prepare(images)).feature_maps, self.stems, self.heads):
            features = stem(features)
            cell = [max(side // 4, 1) for side in features.shape[2:]]
            logits.append(head(F.avg_pool2d(features, cell), class_labels))
        return torch.cat(logits, 1)
