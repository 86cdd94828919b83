"""Group norm and attention: one fused kernel in plain passes, and a form with a forward derivative under a tangent.

Fused attention has no forward-mode derivative, and torch.compile can't trace that of a group norm with weights. Plain
passes need neither, and the fused kernels are faster and keep less for the backward pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def under_tangent() -> bool:
    """Whether a forward-mode derivative is in progress, as in `torch.func.jvp`, in eager or in traced code."""
    # forward_ad.unpack_dual asks a single tensor, and misses the tangents outside of an inner transform
    return getattr(forward_ad, "_current_level", 0) >= 0


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Group norm that computes in float32 or better, even under autocast.

    Args:
        x: the values (B, C, H, W). For the backward pass they are kept in their own dtype.
        groups: number of groups of channels.
        weight, bias: vectors (C,); None for neither.
        eps: added to the variance.
        dtype: dtype of the result; None for that of `x`.
    """
    dtype, full = dtype or x.dtype, torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(full) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        if under_tangent():
            h = F.group_norm(x.to(full).contiguous(), groups, eps=eps)
            if weight is not None and bias is not None:
                h = torch.addcmul(bias[:, None, None], h, weight[:, None, None])
            return h.to(dtype)
        if x.dtype == full:
            return F.group_norm(x, groups, weight, bias, eps).to(dtype)
        return _HalfGroupNorm.apply(x, weight, bias, groups, eps, dtype)[0]


class _HalfGroupNorm(torch.autograd.Function):
    """Group norm of 16-bit values by float32 statistics, which keeps the 16-bit values instead of a float32 copy.

    The stock kernel for 16-bit values on a GPU rounds mean and scale to 16 bits as well, one error for a whole group.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, mean, scale = torch.native_group_norm(x.float(), weight, bias, *_sizes(x), groups, eps)
        return h.to(dtype), mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.groups, _, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        gradients = torch.ops.aten.native_group_norm_backward(
            gradient.float(), x.float(), mean, scale, weight, *_sizes(x), ctx.groups, ctx.needs_input_grad[:3]
        )
        return gradients[0].to(x.dtype), *gradients[1:], None, None, None


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels and positions of `x` (B, C, H, W)."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all `heads`, each (B, heads, H W, d).

    `qkv` (B, 3 heads d, H, W) is the output of a 1x1 convolution.
    """
    # fused kernels require that the channels of a head are adjacent
    split = qkv.view(qkv.shape[0], 3, heads, -1, math.prod(qkv.shape[2:])).transpose(3, 4).contiguous()
    q, k, v = split.unbind(1)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, for queries `q`, keys `k` and values `v` (B, heads, n, d)."""
    if under_tangent():
        weights = (q @ (k / math.sqrt(k.shape[3])).transpose(2, 3)).softmax(3).to(v.dtype)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)
