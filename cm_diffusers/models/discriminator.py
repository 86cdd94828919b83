"""Discriminators: networks that learn to tell generated images from real ones, with one logit per image patch.

They keep no running statistics, draw no random numbers and treat each sample alone. Two processes therefore compute
the same as one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GROUP = 8  # channels normalised together; with one channel per group, a map of one pixel would become zero


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


def _check_width(width: int, step: int) -> None:
    if width < step or width % step:
        raise ValueError(f"width {width} must be a positive multiple of {step}.")


class ProjectionHead(nn.Module):
    """One logit for each position of a feature map: w·h + b, plus e(y)·h / sqrt(channels) with classes.

    Miyato & Koyama (2018, arXiv:1802.05637, section 3) introduced the inner product with the class embedding e(y).
    It is taken here at each position.

    Args:
        channels: number of channels of the feature map.
        num_classes: number of classes; None for an unconditional head.
    """

    def __init__(self, channels: int, num_classes: int | None = None):
        super().__init__()
        self.linear = nn.Conv2d(channels, 1, 1)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, channels)

    def forward(self, features: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map `features` (B, channels, h, w) and `class_labels` (B,), int64, to logits (B, h w).

        Raises:
            ValueError: `class_labels` are missing, or given to an unconditional head.
        """
        logits = self.linear(features)
        if self.embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels are given, but the discriminator is unconditional (num_classes=None).")
            return logits.flatten(1)
        if class_labels is None:
            count = self.embedding.num_embeddings
            raise ValueError(f"class_labels are missing: the discriminator is conditional on {count} classes.")
        embedding = self.embedding(class_labels)[:, :, None, None] / features.shape[1] ** 0.5
        return (logits + (embedding * features).sum(1, keepdim=True)).flatten(1)


class _ToldOfClasses:
    """A mixin for networks that read class labels and no other condition."""

    def adapt_condition(self, condition: Any) -> dict[str, Tensor]:
        """The class labels (B,) of `condition`, if it has any."""
        return {name: entry for name, entry in condition.entries.items() if name == "class_labels"}


class PatchDiscriminator(_ToldOfClasses, nn.Module):
    """A small discriminator on pixels, after PatchGAN (Isola et al. 2016, arXiv:1611.07004).

    Strided convolutions halve the image and double the channels; a head reads the logits off the last map. GroupNorm
    replaces BatchNorm, which would couple samples. There is no spectral norm, because its running vectors are state.

    Args:
        channels: number of image channels.
        num_classes: number of classes; None for an unconditional discriminator.
        width: channels of the first map, a multiple of 4. Each level doubles them, up to 8 `width`.
        levels: number of times the image is halved.

    Raises:
        ValueError: `width` is not a positive multiple of 4, or `levels` is below 1.
    """

    def __init__(self, channels: int, num_classes: int | None = None, width: int = 64, levels: int = 3):
        super().__init__()
        _check_width(width, 4)
        if levels < 1:
            raise ValueError(f"levels {levels} must be at least 1.")
        self.levels = levels
        widths = [width * min(2**level, 8) for level in range(levels)]
        # no norm on the first map, so that the discriminator sees brightness and contrast
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 4, 2, 1), _norm(after), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.head = ProjectionHead(widths[-1], num_classes)

    def forward(self, images: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map `images` (B, C, H, W) in [-1, 1] and `class_labels` (B,), int64, to logits (B, patches).

        Logits are high for real images. There are floor(H / 2^levels) floor(W / 2^levels) patches, whose fields of
        view overlap.

        Raises:
            ValueError: the images are smaller than 2^levels, or class labels are missing or not expected.
        """
        if min(images.shape[2:]) < 2**self.levels:
            height, width = images.shape[2:]
            raise ValueError(
                f"images of {height}x{width} are too small: {self.levels} levels need {2**self.levels} pixels a side."
            )
        return self.head(self.features(images), class_labels)


class ProjectedDiscriminator(_ToldOfClasses, nn.Module):
    """Small trained heads on the frozen feature maps of a pretrained network, one head per map.

    The design is that of Projected GANs (Sauer et al. 2021, arXiv:2111.01007) and StyleGAN-XL (Sauer et al. 2022,
    arXiv:2202.00273). CTM uses the discriminator of the latter (Kim et al. 2023, arXiv:2310.02279). Differences here:

    - a learned 1x1 convolution on each scale replaces the fixed random mixing of channels and scales;
    - there is no spectral norm and no second backbone;
    - the convolutions of the heads keep the resolution. Their maps are averaged down to 4 to 7 positions a side, so
      that fine scales don't outnumber coarse ones.

    The backbone is not a submodule: `parameters()`, `state_dict()`, `train()` and `requires_grad_()` leave it out;
    `to()` moves it. Its weights are frozen, in eval mode, and shared with the caller.

    Args:
        backbone: a network such as the transformers backbones. It reads images with ImageNet's normalisation and
            returns `.feature_maps`, a sequence of (B, C_i, h_i, w_i). Its attribute `.channels` lists the C_i.
        channels: number of image channels, 1 or 3.
        num_classes: number of classes; None for an unconditional discriminator.
        width: channels of a head, a multiple of 8.
        image_size: side of the square to which all images are resized. Default: `image_size` of the backbone's
            config, else 224.

    Raises:
        ValueError: `channels` is neither 1 nor 3, or `width` is not a positive multiple of 8.
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
            raise ValueError(f"images of {channels} channels don't fit a pretrained backbone. Use 1 or 3 channels.")
        _check_width(width, GROUP)
        self._frozen = (backbone.requires_grad_(False).eval(),)  # a tuple hides it from nn.Module
        size = image_size or getattr(getattr(backbone, "config", None), "image_size", None) or 224
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.stems = nn.ModuleList(self._stem(count, width) for count in backbone.channels)
        self.heads = nn.ModuleList(ProjectionHead(width, num_classes) for _ in backbone.channels)

    @staticmethod
    def _stem(channels: int, width: int) -> nn.Sequential:
        mix = [nn.Conv2d(channels, width, 1), _norm(width), nn.LeakyReLU(0.2)]
        return nn.Sequential(*mix, nn.Conv2d(width, width, 3, padding=1), _norm(width), nn.LeakyReLU(0.2))

    @property
    def backbone(self) -> nn.Module:
        """The frozen pretrained network."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProjectedDiscriminator":
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _prepare(self, images: Tensor) -> Tensor:
        """Resize images (B, C, H, W) in [-1, 1] and normalise them as ImageNet's: (B, 3, *image_size)."""
        if tuple(images.shape[2:]) != self.image_size:
            # only shrinking needs the filter
            shrinks = any(before > after for before, after in zip(images.shape[2:], self.image_size))
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=shrinks)
        mean, std = self.mean.to(images), self.std.to(images)
        return ((images + 1) / 2 - mean) / std  # one channel becomes three here

    def forward(self, images: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map `images` (B, C, H, W) in [-1, 1] and `class_labels` (B,), int64, to the logits (B, n) of all heads.

        Logits are high for real images.

        Raises:
            ValueError: class labels are missing or not expected.
        """
        logits = []
        for features, stem, head in zip(self.backbone(self._prepare(images)).feature_maps, self.stems, self.heads):
            features = stem(features)
            cell = [max(side // 4, 1) for side in features.shape[2:]]
            logits.append(head(F.avg_pool2d(features, cell), class_labels))
        return torch.cat(logits, 1)
