"""OpenAI's U-Net (ADM, arXiv:2105.05233) as diffusers' `UNet2DModel`: consistency models and their EDM teachers.

Names of its tensors look like input_blocks.4.0.in_layers.2 and time_embed.0. `ctm.py` also uses the functions for
shapes and places.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from diffusers import UNet2DModel
from torch import Tensor

from cm_diffusers.convert.accounting import Ledger, ordered_qkv


GROUPS = 32
STOCK_PLACES = {
    "down": "down_blocks.{place}.resnets.{i}",
    "downsampler": "down_blocks.{place}.downsamplers.0",
    "mid": "mid_block.resnets.{i}",
    "up": "up_blocks.{place}.resnets.{i}",
    "upsampler": "up_blocks.{place}.upsamplers.0",
}
STOCK_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class Shape:
    """Settings of an ADM U-Net that the names and shapes of its tensors reveal.

    Args:
        model_channels: number of time features.
        in_channels, out_channels: number of channels of the input and output images.
        widths: channels of each level.
        layers: residual blocks per level on the way down.
        attends: whether each level has attention.
        resnet_resampling: True if residual blocks change the resolution, False if convolutions do.
        scale_shift: True if the embedding scales and shifts, False if it only shifts.
        num_classes: number of class labels; None for an unconditional network.
    """

    model_channels: int
    in_channels: int
    out_channels: int
    widths: list[int]
    layers: int
    attends: list[bool]
    resnet_resampling: bool
    scale_shift: bool
    num_classes: int | None


def shape_of(tensors: dict[str, Tensor]) -> Shape:
    """Read the settings off the names and shapes of `tensors` (any shapes).

    Raises:
        ValueError: tensors of an ADM U-Net are missing.
    """
    try:
        return _shape_of(tensors)
    except (KeyError, StopIteration) as error:
        raise ValueError(
            f"This looks like a network of OpenAI's code, but tensors are missing: {error}. Is the file complete?"
        ) from None


def _shape_of(tensors: dict[str, Tensor]) -> Shape:
    outputs = len({name.split(".")[1] for name in tensors if name.startswith("output_blocks.")})

    def upsampler(i: int) -> str | None:
        """Name of the layer in the upsampler at the end of output block `i`; None without an upsampler."""
        for place in (1, 2):
            for part in ("in_layers.2", "conv"):
                if f"output_blocks.{i}.{place}.{part}.weight" in tensors:
                    return part
        return None

    first = next(i for i in range(outputs) if upsampler(i))  # only a U-Net of one level has none; none is published
    per_level = first + 1
    lasts = range(first, outputs, per_level)
    widths = [tensors[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in lasts][::-1]
    embedding = tensors["input_blocks.1.0.emb_layers.1.weight"]
    label = tensors.get("label_emb.weight")
    return Shape(
        model_channels=tensors["time_embed.0.weight"].shape[1],
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        widths=widths,
        layers=per_level - 1,
        attends=[f"output_blocks.{i}.1.qkv.weight" in tensors for i in lasts][::-1],
        resnet_resampling=upsampler(first) == "in_layers.2",
        scale_shift=embedding.shape[0] == 2 * widths[0],
        num_classes=None if label is None else label.shape[0],
    )


class Block(NamedTuple):
    """Place of a U-Net block in the file and in diffusers.

    Args:
        source: name of the residual block or resampler in the file.
        attention: name of its attention layer in the file, if any.
        role: a key of `STOCK_PLACES`.
        place: index of the level's list among those of the role.
        i: index of the block in that list.
    """

    source: str
    attention: str | None
    role: str
    place: int
    i: int


def walk(shape: Shape) -> Iterator[Block]:
    """Iterate over the blocks of a U-Net of this `shape`: the file numbers them in one row, diffusers by level."""
    last, index = len(shape.widths) - 1, 1
    for level in range(last + 1):
        for i in range(shape.layers):
            start = f"input_blocks.{index}"
            yield Block(f"{start}.0", f"{start}.1" if shape.attends[level] else None, "down", level, i)
            index += 1
        if level < last:
            yield Block(f"input_blocks.{index}.0", None, "downsampler", level, 0)
            index += 1
    yield Block("middle_block.0", "middle_block.1", "mid", 0, 0)
    yield Block("middle_block.2", None, "mid", 0, 1)
    for place, attends in enumerate(reversed(shape.attends)):
        for i in range(shape.layers + 1):
            start = f"output_blocks.{place * (shape.layers + 1) + i}"
            yield Block(f"{start}.0", f"{start}.1" if attends else None, "up", place, i)
        if place < last:
            yield Block(f"{start}.{2 if attends else 1}", None, "upsampler", place, 0)


def check(shape: Shape, head_dim: int, image_size: int) -> None:
    """Check settings that the tensors don't reveal against the `shape` of the network.

    `head_dim` is the number of channels per attention head, `image_size` the side of the images in pixels.

    Raises:
        ValueError: `head_dim` doesn't divide the channels, or `image_size` can't be halved often enough.
    """
    for width, attends in zip(shape.widths, [*shape.attends[:-1], True]):
        if attends and (head_dim < 1 or width % head_dim):
            raise ValueError(
                f"num_head_channels {head_dim} doesn't divide {width} channels. Set --num_head_channels to the value"
                " that the model was trained with."
            )
    if image_size < 1 or image_size % 2 ** (len(shape.widths) - 1):
        raise ValueError(
            f"image_size {image_size} can't be halved {len(shape.widths) - 1} times. Set --image_size to the side of"
            " the images that the model was trained with."
        )


def build_stock_network(
    tensors: dict[str, Tensor], head_dim: int, image_size: int, qkv_order: str, family: str
) -> UNet2DModel:
    """Build the one-time network as diffusers' `UNet2DModel`, whose timestep is 250 ln(sigma).

    Args:
        tensors: the tensors of the checkpoint (of any shape), by name.
        head_dim: channels per attention head.
        image_size: side of the images in pixels.
        qkv_order: order of queries, keys and values in the file, see `ordered_qkv`.
        family: description of the checkpoint in messages.

    Raises:
        ValueError: tensors are missing or left over, or `UNet2DModel` can't represent this network.
    """
    shape, ledger = shape_of(tensors), Ledger(tensors)
    check(shape, head_dim, image_size)
    if shape.model_channels != shape.widths[0]:
        raise ValueError(
            f"This U-Net can't be converted: its first level has {shape.widths[0]} channels but its time features have"
            f" {shape.model_channels}. In diffusers' UNet2DModel both numbers are equal."
        )
    kind = "Resnet{}sampleBlock2D" if shape.resnet_resampling else "{}Block2D"
    blocks = ["Attn{}Block2D" if attends else kind for attends in shape.attends]
    resampling = "resnet" if shape.resnet_resampling else "conv"
    network = UNet2DModel(
        sample_size=image_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        down_block_types=tuple(block.format("Down") for block in blocks),
        up_block_types=tuple(block.format("Up") for block in reversed(blocks)),
        downsample_type=resampling,
        upsample_type=resampling,
        block_out_channels=tuple(shape.widths),
        layers_per_block=shape.layers,
        attention_head_dim=head_dim,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        resnet_time_scale_shift="scale_shift" if shape.scale_shift else "default",
        num_class_embeds=shape.num_classes,
    )
    ledger.copy("time_embed.0", "time_embedding.linear_1")
    ledger.copy("time_embed.2", "time_embedding.linear_2")
    if shape.num_classes is not None:
        ledger.copy("label_emb", "class_embedding", parts=("weight",))
    ledger.copy("input_blocks.0.0", "conv_in")
    for source, attention, role, place, i in walk(shape):
        target = STOCK_PLACES[role].format(place=place, i=i)
        if "sampler" in role and not shape.resnet_resampling:
            ledger.copy(f"{source}.{'op' if role == 'downsampler' else 'conv'}", f"{target}.conv")
            continue
        for old, new in STOCK_RESNET.items():
            if new != "conv_shortcut" or f"{source}.{old}.weight" in tensors:
                ledger.copy(f"{source}.{old}", f"{target}.{new}")
        if attention is not None:
            _map_attention(ledger, attention, target.replace("resnets", "attentions"), head_dim, qkv_order)
    ledger.copy("out.0", "conv_norm_out")
    ledger.copy("out.2", "conv_out")
    ledger.fill(network, family)
    return network


def _map_attention(ledger: Ledger, source: str, target: str, head_dim: int, qkv_order: str) -> None:
    """Map an attention block: 1x1 convolutions (1-D or 2-D) in the file, linear layers in diffusers."""
    ledger.copy(f"{source}.norm", f"{target}.group_norm")
    ledger.copy(f"{source}.qkv", ".qkv", lambda t: ordered_qkv(t, head_dim, qkv_order).flatten(1 if t.ndim > 1 else 0))
    ledger.copy(f"{source}.proj_out", f"{target}.to_out.0", lambda t: t.flatten(1 if t.ndim > 1 else 0))
    for part in ("weight", "bias"):
        if f".qkv.{part}" in ledger.weights:
            rows = ledger.weights.pop(f".qkv.{part}").chunk(3)
            ledger.weights |= {f"{target}.{name}.{part}": r for name, r in zip(("to_q", "to_k", "to_v"), rows)}
