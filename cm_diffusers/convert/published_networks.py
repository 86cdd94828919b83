"""Two small public models: the sCM of MNIST (github.com/bryan107/sCM-mnist) and cloneofsimo's consistency models."""

import re

import torch
from torch import Tensor

from cm_diffusers.convert.accounting import Ledger
from cm_diffusers.models.raw_sigma_unet import RawSigmaUNet2DModel
from cm_diffusers.models.shuffle_unet import ShuffleUNet2DModel


def build_shuffle_network(tensors: dict[str, Tensor], image_size: int, family: str) -> ShuffleUNet2DModel:
    """Build the sCM's network, without the log-variance head, which only training needs.

    Args:
        tensors: the tensors of the checkpoint (of any shape), by name.
        image_size: side of the images in pixels.
        family: description of the checkpoint in messages.

    Raises:
        ValueError: tensors are missing or left over.
    """
    ledger = Ledger(tensors)
    levels = len({found[1] for name in tensors if (found := re.match(r"encoder_blocks\.(\d+)\.", name))})
    base, in_channels = _size(tensors, "init_conv.conv.weight")[:2]
    below = [_size(tensors, f"encoder_blocks.{i}.conv1.branch1.0.weight")[0] for i in range(levels)]
    network = ShuffleUNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=_size(tensors, "final_conv.weight")[0],
        base_channels=base,
        channel_mult=[2 * width // base for width in below],  # a stage's units end at half its width
        time_channels=_size(tensors, "logvar_linear.weight")[1],
    )

    def conv(source: str, target: str) -> None:
        ledger.copy(f"{source}.conv", f"{target}.0")
        ledger.copy(f"{source}.gn", f"{target}.1")

    def unit(source: str, target: str) -> None:
        for i in (0, 1):
            ledger.copy(f"{source}.branch1.{i}", f"{target}.branch1.{i}")
            ledger.copy(f"{source}.branch2.{i + 1}", f"{target}.branch2.{i + 1}")
        for branch, i in (("branch1", 2), ("branch2", 0), ("branch2", 3)):
            conv(f"{source}.{branch}.{i}", f"{target}.{branch}.{i}")

    conv("init_conv", "conv_in")
    for old, new in (("encoder_blocks", "down_stages"), ("decoder_blocks", "up_stages")):
        for level in range(levels):
            for i in range(4):
                unit(f"{old}.{level}.conv0.{i}", f"{new}.{level}.units.{i}")
            for i in (0, 2):
                ledger.copy(f"{old}.{level}.time_mlp.mlp.{i}", f"{new}.{level}.scale.{i}")
            unit(f"{old}.{level}.conv1", f"{new}.{level}.end")
    for i in range(3):
        unit(f"mid_block.{i}", f"mid_units.{i}")
    ledger.copy("final_conv", "conv_out")
    for part in ("weight", "bias"):
        ledger.take(f"logvar_linear.{part}")
    expected = 10 ** torch.linspace(0, -1, network.config.time_channels // 2)
    frequencies = tensors.get("time_embedding.freqs", expected)
    if frequencies.shape == expected.shape and torch.allclose(frequencies, expected):
        ledger.take("time_embedding.freqs")  # other frequencies count as left over
    ledger.fill(network, family)
    return network


def build_raw_sigma_network(tensors: dict[str, Tensor], image_size: int, family: str) -> RawSigmaUNet2DModel:
    """Build cloneofsimo's network.

    The original c_out is half the right value for sigma_data = 0.5. The last layer is halved to compensate.

    Args:
        tensors: the tensors of the checkpoint (of any shape), by name.
        image_size: side of the images in pixels.
        family: description of the checkpoint in messages.

    Raises:
        ValueError: tensors are missing or left over.
    """
    ledger = Ledger(tensors)
    base, in_channels = _size(tensors, "down.0.weight")[:2]
    network = RawSigmaUNet2DModel(image_size, in_channels, _size(tensors, "last.weight")[0], base)
    blocks = {f"down.{i + 1}": f"down_blocks.{i}" for i in range(3)} | {f"up.{i}": f"up_blocks.{i}" for i in range(3)}
    for source, target in (blocks | {"mid": "mid_block"}).items():
        for i in (0, 2, 3, 5):
            ledger.copy(f"{source}.{i}", f"{target}.{i}")
    for i in range(4):
        ledger.copy(f"time_downs.{i}", f"time_layers.{i}")
    ledger.copy("down.0", "conv_in")
    ledger.copy("up.3", "conv_up")
    ledger.copy("last", "conv_out", lambda t: t / 2)
    ledger.fill(network, family)
    return network


def _size(tensors: dict[str, Tensor], name: str) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"This looks like a small public model, but {name} is missing. Is the file complete?")
    return tensors[name].shape
