"""Network presets.

| preset | class | purpose |
|---|---|---|
| `tiny`, `small`, ... | diffusers' `UNet2DModel` | trained models load with diffusers alone |
| `jvp_...` | `JVPUNet2DModel`, in the same shapes | methods that differentiate the network |
| `ddpmpp_...`, `adm_...` | `EDMUNet2DModel` | EDM's networks, with augmentation labels and a null class |
"""

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from cm_diffusers.models.edm_unet import EDMUNet2DModel
from cm_diffusers.models.jvp_unet import JVPUNet2DModel
from cm_diffusers.models.two_time import TwoTimeModel


# channels by level, residual blocks per level, levels with attention (0 is the full resolution)
UNET_PRESETS: dict[str, dict] = {
    "tiny": {"channels": (16, 32), "layers": 1, "attention": (1,)},  # 0.2 M parameters: tests, 8x8 digits
    "small": {"channels": (16, 64, 128), "layers": 1, "attention": (2,)},  # 2.6 M: MNIST on a CPU
    "base": {"channels": (64, 128, 128), "layers": 2, "attention": (1,)},  # 6.9 M: MNIST, Fashion-MNIST
    "cifar10": {"channels": (128, 256, 256), "layers": 4, "attention": (1,)},  # 45 M; EDM's CIFAR-10 nets have 56 M
    "imagenet64": {"channels": (192, 384, 576, 768), "layers": 3, "attention": (1, 2, 3)},  # 276 M, ADM's widths
}
JVP = "jvp_"
UNET_PRESETS |= {JVP + name: UNET_PRESETS[name] for name in ("tiny", "small", "base", "cifar10")}
ADM = {"architecture": "adm", "model_channels": 192, "attention_head_dim": 64}
# settings of `EDMUNet2DModel`; Karras et al. (2022), table 7, lists those for images of 32 and 64 pixels
EDM_PRESETS: dict[str, dict] = {
    "ddpmpp_tiny": {"model_channels": 16, "channel_mult": (1, 2), "layers_per_block": 1},  # 0.2 M: tests, 8x8 digits
    "ddpmpp_32": {"channel_mult": (2, 2, 2), "layers_per_block": 4},  # 56 M: CIFAR-10
    "ddpmpp_64": {"channel_mult": (1, 2, 2, 2), "layers_per_block": 4, "attention_levels": (2,)},  # 62 M: FFHQ, AFHQ
    "adm_64": ADM | {"channel_mult": (1, 2, 3, 4), "layers_per_block": 3, "attention_levels": (1, 2, 3)},  # 296 M
}
NORM_GROUPS = 8
HEAD_DIM = 32


def build_unet(
    preset: str,
    sample_size: Sequence[int],
    channels: int,
    num_classes: int | None = None,
    dropout: float = 0.0,
    augment_channels: int = 0,
) -> UNet2DModel | JVPUNet2DModel | EDMUNet2DModel:
    """Build a new network from a preset, whose name determines the class of the network.

    Args:
        preset: a key of `UNET_PRESETS` or `EDM_PRESETS`.
        sample_size: (height, width) of the images.
        channels: number of image channels: 1 for grey, 3 for RGB, or any other number.
        num_classes: number of class labels; None for an unconditional model.
        dropout: dropout probability.
        augment_channels: size of the augmentation labels, for `EDM_PRESETS` only; 0 for none.

    Raises:
        ValueError: `preset` is unknown, `augment_channels` is set for a preset without augmentation labels, or
            `sample_size` cannot be halved once for each level after the first.
    """
    presets = UNET_PRESETS | EDM_PRESETS
    if preset not in presets:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {', '.join(presets)}.")
    if augment_channels and preset not in EDM_PRESETS:
        raise ValueError(
            f"preset {preset!r} has no input for augmentation labels. Use one of {', '.join(EDM_PRESETS)}."
        )
    shape = presets[preset]
    widths = shape["channel_mult"] if preset in EDM_PRESETS else shape["channels"]
    levels = range(len(widths))
    height, width = sample_size
    check_halvings(sample_size, len(levels), f"preset {preset!r}")
    config = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": num_classes,
        "dropout": dropout,
    }
    if preset in EDM_PRESETS:
        return EDMUNet2DModel(**config, **shape, augment_channels=augment_channels, preconditioning="edm")
    config |= {
        "block_out_channels": widths,
        "layers_per_block": shape["layers"],
        "attention_head_dim": HEAD_DIM,
        "norm_num_groups": NORM_GROUPS,
    }
    if preset.startswith(JVP):
        return JVPUNet2DModel(**config, attention_levels=shape["attention"])
    down = ["AttnDownBlock2D" if i in shape["attention"] else "DownBlock2D" for i in levels]
    return UNet2DModel(
        **config,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        resnet_time_scale_shift="scale_shift",
    )


def check_halvings(sample_size: Sequence[int], levels: int, what: str) -> None:
    """Check that a U-Net of `levels` levels can halve images of `sample_size` (height, width).

    `what` names the network in the message.

    Raises:
        ValueError: a side is not a multiple of 2^(levels - 1).
    """
    factor = 2 ** (levels - 1)
    if any(side % factor for side in sample_size):
        raise ValueError(
            f"resolution {' x '.join(map(str, sample_size))} can't be halved {levels - 1} times, as {what} requires:"
            f" use multiples of {factor}, or a preset with fewer levels."
        )


class _Float32TimestepEmbedding(TimestepEmbedding):
    """A time embedding that runs outside autocast."""

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample, condition)


def keep_time_embedding_in_float32(unet: nn.Module) -> None:
    """Run the time embedding of `unet` outside autocast: in bfloat16 neighbouring noise levels become one.

    The function replaces the embedding's class instead of its `forward`, so that a copy of the network has an
    independent embedding. Only a `UNet2DModel` needs the change; other networks stay unchanged.
    """
    if isinstance(unet, TwoTimeModel):
        unet = unet.network
    if isinstance(unet, UNet2DModel):
        unet.time_embedding.__class__ = _Float32TimestepEmbedding
