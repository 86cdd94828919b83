"""CTM's two-time U-Net for ImageNet (Kim et al. 2023, arXiv:2310.02279): OpenAI's U-Net with `time_embed_s`.

Each block has separate layers for the second time, `emb_layers_s`, whose output is added to that of the first. CTM
for CIFAR-10 builds on EDM's code, see `edm.py`.
"""

from torch import Tensor

from cm_diffusers.convert.accounting import Ledger, ordered_qkv
from cm_diffusers.convert.adm import GROUPS, check, shape_of, walk
from cm_diffusers.models import EDMUNet2DModel


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}


def build_two_time_network(
    tensors: dict[str, Tensor], head_dim: int, image_size: int, qkv_order: str, family: str
) -> EDMUNet2DModel:
    """Build the two-time network; both times are 250 ln(sigma).

    Args:
        tensors: the tensors of the checkpoint (of any shape), by name.
        head_dim: channels per attention head.
        image_size: side of the images in pixels.
        qkv_order: order of queries, keys and values in the file, see `ordered_qkv`.
        family: description of the checkpoint in messages.

    Raises:
        ValueError: tensors are missing or left over, or the network has options that no published CTM has.
    """
    shape, ledger = shape_of(tensors), Ledger(tensors)
    check(shape, head_dim, image_size)
    if not (shape.resnet_resampling and shape.scale_shift and min(shape.widths) >= 4 * GROUPS):
        raise ValueError(
            "This CTM network can't be converted: unlike the published ones, it lacks resblock_updown or"
            f" use_scale_shift_norm, or a level has fewer than {4 * GROUPS} channels."
        )
    network = EDMUNet2DModel(
        sample_size=image_size,
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        model_channels=shape.model_channels,
        channel_mult=[width / shape.model_channels for width in shape.widths],
        layers_per_block=shape.layers,
        attention_levels=[level for level, attends in enumerate(shape.attends) if attends],
        attention_head_dim=head_dim,
        num_class_embeds=shape.num_classes,
        architecture="adm",
        two_times=True,
    )
    for source, target in (("time_embed", "time_embedding"), ("time_embed_s", "target_time_embedding")):
        for i in (0, 2):
            ledger.copy(f"{source}.{i}", f"{target}.{i}")
    if shape.num_classes is not None:
        ledger.copy("label_emb", "class_embedding", lambda t: t.T, parts=("weight",))
    ledger.copy("input_blocks.0.0", "conv_in")
    for source, attention, role, place, i in walk(shape):
        target = {
            "down": f"down_blocks.{place}.{i + (place > 0)}",  # block 0 is the downsampler of the level above
            "downsampler": f"down_blocks.{place + 1}.0",
            "mid": f"mid_blocks.{i}",
            "up": f"up_blocks.{place}.{i}",
            "upsampler": f"up_blocks.{place}.{shape.layers + 1}",
        }[role]
        for old, new in RESNET.items():
            if new != "skip" or f"{source}.{old}.weight" in tensors:
                ledger.copy(f"{source}.{old}", f"{target}.{new}")
        ledger.join(f"{source}.emb_layers.1", f"{source}.emb_layers_s.1", f"{target}.modulation")
        if attention is not None:
            ledger.copy(f"{attention}.norm", f"{target}.norm3")
            ledger.copy(f"{attention}.qkv", f"{target}.qkv", lambda t: _as_2d(ordered_qkv(t, head_dim, qkv_order)))
            ledger.copy(f"{attention}.proj_out", f"{target}.proj", _as_2d)
    ledger.copy("out.0", "norm_out")
    ledger.copy("out.2", "conv_out")
    ledger.fill(network, family)
    return network


def _as_2d(tensor: Tensor) -> Tensor:
    """Turn the weight of a 1-D 1x1 convolution into that of a 2-D one; leave other tensors alone."""
    return tensor[..., None] if tensor.ndim == 3 else tensor
