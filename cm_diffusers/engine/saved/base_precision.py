"""The precision of the frozen weights below an adapter: 32, 16, 8 or 4 bits.

Linear layers have 8 or 4 bits, all other layers 16 or 32. Time embeddings and the first convolution stay in float32,
because in bfloat16 neighbouring noise levels become one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 64  # weights of NF4 with one scale


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in few bits.

    Each pass unpacks the weight, also the backward pass, so that no unpacked weight is kept between the two. The layer
    computes in the dtype of autocast, or else in that of its input. Frozen copies share `weight` and `scale`.

    Args:
        linear: the layer to pack.
        device: where the weight is packed and stays.
    """

    def __init__(self, linear: nn.Linear, device: torch.device | str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = self._pack(linear.weight.detach().to(device, torch.float32).contiguous())
        self.weight, self.scale = (nn.Parameter(value, requires_grad=False) for value in (weight, scale))
        self.bias = linear.bias

    @staticmethod
    def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        """The packed weight and its scales."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Product.apply(x.to(dtype), self)


class Int8Linear(PackedLinear):
    """A linear layer in int8, with one scale per output: w = scale * q, where q is in [-127, 127]."""

    @staticmethod
    def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        return (weight / scale).round().to(torch.int8), scale

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scale).to(dtype)


class NF4Linear(PackedLinear):
    """A linear layer in NF4 (Dettmers et al. 2023, arXiv:2305.14314), with one float32 scale per 64 weights."""

    @staticmethod
    def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
        settings: dict[str, Any] = {"blocksize": BLOCK, "quant_type": "nf4"}
        packed, state = _bitsandbytes().quantize_4bit(weight, compress_statistics=False, **settings)
        return packed, state.absmax

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        library, shape = _bitsandbytes(), torch.Size((self.out_features, self.in_features))
        state = library.QuantState(self.scale, shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return library.dequantize_4bit(self.weight, state)


class _Product(torch.autograd.Function):
    """x W^T + bias, whose backward pass unpacks W again. The gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


PACKED: dict[str, type[PackedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def set_base_precision(
    network: nn.Module, asked: str | None, mixed_precision: str, device: torch.device | str
) -> nn.Module:
    """Freeze `network`, move it to `device` and store it in the precision `asked`. Returns the same network.

    Call a network with 16-bit weights inside autocast, as Accelerate or `cast_calls` does.

    Args:
        network: a network in float32 without an adapter.
        asked: "no" (float32), "fp16", "bf16", "int8" or "nf4"; None for that of `mixed_precision`.
        mixed_precision: "no", "fp16" or "bf16"; below "int8" and "nf4" the precision of all but the linear layers.
        device: where the network will run.

    Raises:
        ValueError: the weights would have 16 bits and the inputs another type, or bitsandbytes is missing.
    """
    asked = mixed_precision if asked is None else asked
    if asked in HALVES and asked != mixed_precision:
        raise ValueError(
            f"base_precision {asked!r} needs inputs of the same type, but mixed_precision is {mixed_precision!r}. Give"
            f" --mixed_precision {asked}, or another --base_precision."
        )
    dtype = torch.float32 if asked == "no" else HALVES.get(mixed_precision, torch.float32)
    network.requires_grad_(False)
    embeddings = [part for part in network.modules() if isinstance(part, TimestepEmbedding)]
    full = {layer for embedding in embeddings for layer in embedding.modules()}
    full.add(getattr(network, "conv_in", None))  # UNet2DModel rounds the time to the dtype of its first weight
    if asked in PACKED:
        for name, layer in list(network.named_modules()):
            if type(layer) is nn.Linear and layer not in full:
                network.set_submodule(name, PACKED[asked](layer, device))
    for layer in network.modules():
        if layer not in full and not isinstance(layer, PackedLinear):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.to(device, dtype)
    return network.to(device)


def cast_calls(network: nn.Module) -> AbstractContextManager:
    """The context for calls of `network` with float32 inputs: autocast if it has 16-bit weights, else nothing.

    Args:
        network: a network of `set_base_precision`, or one with an adapter above it.
    """
    for weight in network.parameters():
        if weight.dtype in HALVES.values():
            return torch.autocast(weight.device.type, weight.dtype)
    return nullcontext()


def is_packed(network: nn.Module) -> bool:
    """Whether `network` has weights in 8 or 4 bits."""
    return any(isinstance(layer, PackedLinear) for layer in network.modules())


@torch.no_grad()
def full_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of `network`, with each packed weight as the matrix (out, in) in float32 that it stands for."""
    state = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear):
            del state[f"{name}.scale"]
            state[f"{name}.weight"] = layer.unpacked(torch.float32)
    return state


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ValueError("base_precision nf4 needs another package. Run: pip install 'cm-diffusers[nf4]'") from None
    return functional
