"""The networks of EDM (Karras et al. 2022, arXiv:2206.00364) and of code built on it: ECT, CDM, CTM for CIFAR-10.

Names of their tensors look like enc.16x16_block0, dec.16x16_up and map_layer0; those for CTM's second time end in
`_s`. Settings come from the names and shapes of the tensors where possible, not from the settings in the file.
"""

import re

import torch
from torch import Tensor

from cm_diffusers.convert.accounting import Ledger, ordered_qkv
from cm_diffusers.models import EDMUNet2DModel


ADM_HEAD_DIM = 64
BLOCK = {"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2", "skip": "skip"}


def build_network(
    tensors: dict[str, Tensor], prefix: str, preconditioning: str, family: str, **config
) -> EDMUNet2DModel:
    """Build the network from the tensors whose names start with `prefix`.

    Args:
        tensors: the tensors of the checkpoint (of any shape), by name.
        prefix: start of the names, possibly empty.
        preconditioning: see `EDMUNet2DModel`.
        family: description of the checkpoint in messages.
        config: settings that the tensors don't reveal: `dropout` and `label_dropout`.

    Raises:
        ValueError: tensors are missing or left over.
    """
    ledger = Ledger(tensors, prefix)
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    config |= _shape(ledger.left, prefix, names)
    network = EDMUNet2DModel(**config, preconditioning=preconditioning)
    _map_embeddings(ledger, names, config)
    _map_blocks(ledger, names, config)
    ledger.fill(network, family)
    return network


def _resolutions(names: list[str]) -> list[int]:
    """Resolutions of the levels, from high to low."""
    return sorted({int(found[1]) for name in names if (found := re.match(r"enc\.(\d+)x\d+_", name))}, reverse=True)


def _count(names: list[str], start: str) -> int:
    """Number of blocks called `start` + number."""
    return len({found[1] for name in names if (found := re.match(re.escape(start) + r"(\d+)\.", name))})


def _shape(tensors: dict[str, Tensor], prefix: str, names: list[str]) -> dict:
    """Read the config of the network off the names and shapes."""

    def size(name: str, dim: int) -> int:
        if prefix + name not in tensors:
            raise ValueError(
                f"This looks like a network of EDM's code, but {prefix + name} is missing. Is the file complete?"
            )
        return tensors[prefix + name].shape[dim]

    levels = _resolutions(names)
    adm = "out_conv.weight" in names
    top = f"{levels[0]}x{levels[0]}"
    output = "out_conv.weight" if adm else f"dec.{top}_aux_conv.weight"
    fourier = "map_noise.freqs" in names
    features = size("map_layer0.weight", 1)
    base = features // 2 if fourier else features
    filters = [name for name in names if name.endswith("resample_filter")]
    label, joined = "map_label.weight", " ".join(names)
    attends = [i for i, r in enumerate(levels) if f"enc.{r}x{r}_block0.qkv.weight" in names]
    return {
        "sample_size": levels[0],
        "in_channels": size(f"enc.{top}_conv.weight", 1),
        "out_channels": size(output, 0),
        "model_channels": base,
        "channel_mult": [size(f"enc.{r}x{r}_block0.conv1.weight", 0) / base for r in levels],
        "layers_per_block": _count(names, f"enc.{top}_block"),
        "attention_levels": attends,
        "attention_head_dim": ADM_HEAD_DIM if adm else None,
        "num_class_embeds": size(label, 1) if label in names else None,
        "augment_channels": size("map_augment.weight", 1) if "map_augment.weight" in names else 0,
        "architecture": "adm" if adm else "score",
        "time_embedding_type": "fourier" if fourier else "positional",
        "resample_filter": _taps(tensors[prefix + filters[0]]) if filters else [1, 1],
        "encoder_type": next((kind for kind in ("skip", "residual") if f"_aux_{kind}." in joined), "standard"),
        "decoder_type": "skip" if "_aux_up." in joined else "standard",
        "two_times": "map_layer0_s.weight" in names,
    }


def _taps(kernel: Tensor) -> list[int]:
    """The integer filter along one axis whose outer product is proportional to `kernel` (1, 1, n, n)."""
    row = kernel.flatten(0, -2).sum(0)
    return (row / row.min().clamp(min=1e-6)).round().int().tolist()


def _map_embeddings(ledger: Ledger, names: list[str], config: dict) -> None:
    if config["time_embedding_type"] == "fourier":
        ledger.weights["time_features.frequencies"] = ledger.take("map_noise.freqs")
    ledger.copy("map_layer0", "time_embedding.0")
    ledger.copy("map_layer1", "time_embedding.2")
    if config["two_times"]:
        ledger.copy("map_layer0_s", "target_time_embedding.0")
        ledger.copy("map_layer1_s", "target_time_embedding.2")
    if config["num_class_embeds"] is not None:
        parts = ("weight",) if config["architecture"] == "adm" else ("weight", "bias")
        ledger.copy("map_label", "class_embedding", parts=parts)
    if config["augment_channels"]:
        ledger.copy("map_augment", "augment_embedding", parts=("weight",))


def _map_blocks(ledger: Ledger, names: list[str], config: dict) -> None:
    taps = torch.tensor(config["resample_filter"], dtype=torch.float32)
    kernel = taps.outer(taps) / taps.sum().square()

    def take_filter(name: str) -> None:
        """Take the filter `name` if it equals the network's; another filter remains and counts as left over."""
        found = ledger.left.get(f"{ledger.prefix}{name}.resample_filter", kernel[None, None])
        if found.shape[2:] == kernel.shape and torch.allclose(found[0, 0].float(), kernel):
            ledger.take(f"{name}.resample_filter")

    def block(source: str, target: str, resamples: bool = False) -> None:
        for old, new in BLOCK.items():
            if old != "skip" or f"{source}.skip.weight" in names:
                ledger.copy(f"{source}.{old}", f"{target}.{new}")
        for resampler in ("conv0", "skip") if resamples else ():
            take_filter(f"{source}.{resampler}")
        if config["two_times"]:
            ledger.join(f"{source}.affine", f"{source}.affine_s", f"{target}.modulation")
        else:
            ledger.copy(f"{source}.affine", f"{target}.modulation")
        if f"{source}.qkv.weight" in names:
            channels = ledger.left[f"{ledger.prefix}{source}.qkv.weight"].shape[1]
            head_dim = config["attention_head_dim"] or channels
            ledger.copy(f"{source}.norm2", f"{target}.norm3")
            ledger.copy(f"{source}.qkv", f"{target}.qkv", lambda t: ordered_qkv(t, head_dim, "interleaved"))
            ledger.copy(f"{source}.proj", f"{target}.proj")

    levels, layers = _resolutions(names), config["layers_per_block"]
    ledger.copy(f"enc.{levels[0]}x{levels[0]}_conv", "conv_in")
    for level, r in enumerate(levels):
        start = 0 if level == 0 else 1
        if start:
            block(f"enc.{r}x{r}_down", f"down_blocks.{level}.0", resamples=True)
            if config["encoder_type"] != "standard":
                ledger.copy(f"enc.{r}x{r}_aux_{config['encoder_type']}", f"aux_down.{level - 1}")
                take_filter(f"enc.{r}x{r}_aux_{'down' if config['encoder_type'] == 'skip' else 'residual'}")
        for i in range(layers):
            block(f"enc.{r}x{r}_block{i}", f"down_blocks.{level}.{start + i}")
    for i in range(2):
        block(f"dec.{levels[-1]}x{levels[-1]}_in{i}", f"mid_blocks.{i}")
    for place, (level, r) in enumerate(reversed(list(enumerate(levels)))):
        for i in range(layers + 1):
            block(f"dec.{r}x{r}_block{i}", f"up_blocks.{place}.{i}")
        if level > 0:  # in the file, the upsampler belongs to the level above
            above = levels[level - 1]
            block(f"dec.{above}x{above}_up", f"up_blocks.{place}.{layers + 1}", resamples=True)
            if config["decoder_type"] == "skip":
                take_filter(f"dec.{above}x{above}_aux_up")
                ledger.copy(f"dec.{r}x{r}_aux_norm", f"aux_norm_out.{place}")
                ledger.copy(f"dec.{r}x{r}_aux_conv", f"aux_conv_out.{place}")
    output = "out" if config["architecture"] == "adm" else f"dec.{levels[0]}x{levels[0]}_aux"
    ledger.copy(f"{output}_norm", "norm_out")
    ledger.copy(f"{output}_conv", "conv_out")
