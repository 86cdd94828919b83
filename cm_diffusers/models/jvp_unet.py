"""A U-Net for methods that differentiate their network along a trajectory.

Continuous-time consistency models need dF/dt from one Jacobian-vector product (Lu & Song 2024, arXiv:2410.11081,
section 4.1), and so do mean flows (Geng et al. 2025, arXiv:2505.13447). This network therefore has three properties:

- The derivative in t stays bounded: time features have low frequencies, scales and shifts are pixel-normalised.
- Every operation has a forward-mode derivative: under a tangent, attention is a plain softmax(QK^T)V, because the
  fused kernels have no such derivative.
- Time in float64 stays in float64, and time is never rounded to bfloat16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .fused import attention, group_norm, split_heads, under_tangent
from .keyed_dropout import KeyedDropout, KeyedDropoutMixin


FOURIER_SEED = 20241014


@dataclass
class JVPUNet2DOutput(BaseOutput):
    """Output of `JVPUNet2DModel`.

    Args:
        sample: the output image (B, C, H, W).
        log_variance: the adaptive log-variance (B,); None if the network has no such head.
    """

    sample: Tensor
    log_variance: Tensor | None = None


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 or better, even under autocast or with weights of lower precision.

    In bfloat16 neighbouring times become one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features), in float32 or better."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Float32GroupNorm(nn.GroupNorm):
    """Group norm that computes and returns float32 or better.

    Under autocast on a CPU, the stock group norm returns a bfloat16 value with a float32 tangent, which a convolution
    refuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (B, C, H, W)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, dtype)


def pixel_norm(x: Tensor, eps: float, dim: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) along `dim`, for `x` of any shape (Karras et al. 2017, arXiv:1710.10196, section 4.2).

    `eps` bounds the derivative near x = 0.
    """
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + eps)


class TimeFeatures(nn.Module):
    """cos and sin of a time (B,) at bounded frequencies: (B, channels).

    The scale trades the diffusion loss against the quality of the student. The paper uses a largest frequency of about
    1, or a Fourier scale of 0.02. A largest frequency of 4 lowers the diffusion loss slightly (by 1.2 to 1.4 % on 8x8
    digits), but gives a worse student. After 1,000 steps of sCD on MNIST at the same learning rate, the student's
    distance from its teacher's ODE was 0.206 with 4 and 0.162 with 1.

    Args:
        channels: number of features, even.
        kind: "positional" has geometric frequencies from `scale` down to `scale` / 10, in radians per unit of time.
            "fourier" has normal frequencies with standard deviation 2 pi `scale`, drawn once for all models.
        scale: bounds the derivative in time.
    """

    def __init__(self, channels: int, kind: str, scale: float):
        super().__init__()
        self.channels, self.kind, self.scale = channels, kind, scale
        if kind == "fourier":
            normal = torch.randn(channels // 2, generator=torch.Generator().manual_seed(FOURIER_SEED), device="cpu")
            self.register_buffer("frequencies", 2 * math.pi * scale * normal)

    def forward(self, time: Tensor) -> Tensor:
        """Features (B, channels) of `time` (B,), in its dtype."""
        if self.kind == "fourier":
            frequencies = self.frequencies.to(time.dtype)
        else:
            exponents = torch.linspace(0, -1, self.channels // 2, dtype=time.dtype, device=time.device)
            frequencies = self.scale * 10**exponents
        angles = time[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


class TimeMLP(nn.Sequential):
    """Two linear layers from features (B, `features`) to an embedding (B, `channels`), in float32 or better."""

    def __init__(self, features: int, channels: int):
        super().__init__(Float32Linear(features, channels), nn.SiLU(), Float32Linear(channels, channels))


class Attention(nn.Module):
    """Self-attention over the pixels, with normalised queries and keys.

    Args:
        channels: number of channels.
        head_dim: channels per head; fewer `channels` form one head.
        groups, eps: number of `groups` of the group norm, and the `eps` added to its variance.
    """

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float):
        super().__init__()
        self.heads = channels // min(head_dim, channels)
        self.norm = Float32GroupNorm(groups, channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add the result of the attention to `x` (B, C, H, W)."""
        q, k, v = split_heads(self.qkv(self.norm(x).to(x.dtype)), self.heads)
        # unit size: no logit exceeds the square root of the head's width, so the softmax can't saturate
        h = attention(pixel_norm(q, 1e-4, 3), pixel_norm(k, 1e-4, 3), v)
        return x + self.proj(h.transpose(2, 3).reshape(x.shape))


class Block(nn.Module):
    """A residual block with adaptive double normalisation and optional self-attention.

    h = norm(h) * pnorm(1 + s) + pnorm(b), where scale s and shift b come from the embedding (arXiv:2410.11081,
    section 4.1). pnorm adds a constant to the mean square:

    - 0.01 to that of 1 + s, which is about 1;
    - 1 to that of b, because b starts near 0, where a small constant would turn any change of b into a jump. With 1,
      pnorm(b) is about b for small b, stays below 1 in size for large b, and has a derivative of at most 1.

    Args:
        in_channels, out_channels: number of channels before (`in_channels`) and after (`out_channels`) the block.
        embedding: size of the embedding vector.
        groups, eps: number of `groups` of the group norms, and the `eps` added to their variance.
        dropout: dropout probability.
        head_dim: channels per attention head; None for a block without attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        groups: int,
        eps: float,
        dropout: float,
        head_dim: int | None,
    ):
        super().__init__()
        self.norm1 = Float32GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Float32GroupNorm(groups, out_channels, eps, affine=False)
        self.modulation = Float32Linear(embedding, 2 * out_channels)
        self.drop = KeyedDropout(dropout)
        self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = None if head_dim is None else Attention(out_channels, head_dim, groups, eps)

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        """Apply the block to `x` (B, in_channels, H, W) with `embedding` (B, E).

        `keys` (B,), int64, are the dropout keys; None draws ordinary dropout.
        """
        scale, shift = self.modulation(embedding).chunk(2, 1)
        scale, shift = pixel_norm(1 + scale, 0.01)[..., None, None], pixel_norm(shift, 1.0)[..., None, None]
        h = self.norm2(self.conv1(F.silu(self.norm1(x)).to(x.dtype)))
        h = self.drop(F.silu(torch.addcmul(shift.to(h.dtype), h, scale.to(h.dtype))), keys)
        h = self.skip(x) + self.conv2(h.to(x.dtype))
        return h if self.attention is None else self.attention(h)


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class JVPUNet2DModel(KeyedDropoutMixin, ModelMixin, ConfigMixin):
    """A U-Net that is called like diffusers' `UNet2DModel` and works under `torch.func.jvp`.

    Args:
        sample_size: height and width of the images, or (height, width). The network accepts other sizes as well.
        in_channels, out_channels: number of image channels.
        block_out_channels: channels of each level. Each level after the first halves the image.
        layers_per_block: residual blocks per level (one more on the way up).
        attention_levels: levels with self-attention (0 is the full resolution). The middle always has it.
        attention_head_dim: channels per head.
        norm_num_groups, norm_eps: number of groups of the group norms, and what they add to the variance.
        dropout: dropout probability.
        num_class_embeds: number of class labels; None for an unconditional model.
        time_embedding_type: "positional" or "fourier", see `TimeFeatures`.
        time_embedding_scale: scale of `TimeFeatures`; None for 1 ("positional") or 0.02 ("fourier").
        log_variance: whether the network has the adaptive log-variance head.

    Raises:
        ValueError: `block_out_channels` do not split into groups and heads, or `time_embedding_type` is unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 256),
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (1,),
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        time_embedding_type: str = "positional",
        time_embedding_scale: float | None = None,
        log_variance: bool = False,
    ):
        super().__init__()
        if time_embedding_type not in ("positional", "fourier"):
            raise ValueError(f"time_embedding_type must be 'positional' or 'fourier', not {time_embedding_type!r}.")
        for channels in block_out_channels:
            if channels % norm_num_groups or channels % min(attention_head_dim, channels):
                raise ValueError(
                    f"{channels} in block_out_channels must be a multiple of norm_num_groups ({norm_num_groups})"
                    f" and of attention_head_dim ({attention_head_dim})."
                )
        if time_embedding_scale is None:
            time_embedding_scale = {"positional": 1.0, "fourier": 0.02}[time_embedding_type]
        features, embedding = 2 * (block_out_channels[0] // 2), 4 * block_out_channels[0]
        self.time_proj = TimeFeatures(features, time_embedding_type, time_embedding_scale)
        self.time_embedding = TimeMLP(features, embedding)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding)

        def block(width_in: int, width_out: int, attention: bool) -> Block:
            head_dim = attention_head_dim if attention else None
            return Block(width_in, width_out, embedding, norm_num_groups, norm_eps, dropout, head_dim)

        width = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks, self.up_blocks, skips = nn.ModuleList(), nn.ModuleList(), []
        for level, channels in enumerate(block_out_channels):
            skips.append(width)
            self.down_blocks.append(nn.ModuleList())
            for _ in range(layers_per_block):
                self.down_blocks[level].append(block(width, channels, level in attention_levels))
                width = channels
                skips.append(width)
        self.mid_blocks = nn.ModuleList([block(width, width, True), block(width, width, False)])
        for level, channels in reversed(list(enumerate(block_out_channels))):
            blocks = nn.ModuleList()
            for _ in range(layers_per_block + 1):
                blocks.append(block(width + skips.pop(), channels, level in attention_levels))
                width = channels
            self.up_blocks.append(blocks)
        self.conv_norm_out = Float32GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = _zero(nn.Conv2d(width, out_channels, 3, padding=1))

        self._number_dropout()
        self.log_variance_head = None
        if log_variance:
            self.add_log_variance_head()
        # from_config would leave out names listed there, even positional arguments and later changes
        self.register_to_config(time_embedding_scale=time_embedding_scale, _use_default_values=[])
        self.gradient_checkpointing = False

    def add_log_variance_head(self) -> None:
        """Add the head w(t) of the adaptive weighting e^-w loss + w: linear in the time embedding, zero at first."""
        reference = self.conv_out.weight
        head = _zero(Float32Linear(self.time_embedding[-1].out_features, 1))
        self.log_variance_head = head.to(reference.device, reference.dtype)
        self.register_to_config(log_variance=True)

    def remove_log_variance_head(self) -> None:
        """Delete the log-variance head, which sampling does not need."""
        self.log_variance_head = None
        self.register_to_config(log_variance=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> JVPUNet2DOutput | tuple[Tensor, ...]:
        """Apply the network to `sample` (B, C, H, W) at `timestep`, a number, () or (B,): an angle or a flow time.

        Time labels of a wide range, such as 250 ln(sigma), need a smaller `time_embedding_scale`.

        Args:
            class_labels: int64 (B,), for a class-conditional network.
            return_dict: False returns the tuple (sample,) or (sample, log_variance).

        Raises:
            ValueError: class labels are missing or not expected, or the dropout keys are for another batch size.
        """
        batch = sample.shape[0]
        if class_labels is None and self.class_embedding is not None:
            raise ValueError("class_labels are missing: this network is class-conditional.")
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels are not for this network: it is unconditional.")
        keys = self._keys_of(sample)

        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, dtype=dtype, device=sample.device)
        timestep = timestep.to(sample.device, torch.promote_types(timestep.dtype, dtype)).expand(batch)
        embedding = self.time_embedding(self.time_proj(timestep))
        log_variance = None if self.log_variance_head is None else self.log_variance_head(embedding).squeeze(1)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        embedding = F.silu(embedding)

        h = self.conv_in(sample)
        skips = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                h = F.avg_pool2d(h, 2)
            skips.append(h)
            for block in blocks:
                h = self._apply_block(block, h, embedding, keys)
                skips.append(h)
        for block in self.mid_blocks:
            h = self._apply_block(block, h, embedding, keys)
        for level, blocks in enumerate(self.up_blocks):
            if level > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            for block in blocks:
                h = self._apply_block(block, torch.cat([h, skips.pop()], 1), embedding, keys)
        sample = self.conv_out(F.silu(self.conv_norm_out(h)).to(h.dtype))

        if not return_dict:
            return (sample,) if log_variance is None else (sample, log_variance)
        return JVPUNet2DOutput(sample, log_variance)

    def _apply_block(self, block: Block, h: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        # gradient checkpointing recomputes after the end of the JVP, when tangents are gone
        if self.gradient_checkpointing and torch.is_grad_enabled() and not under_tangent():
            return self._gradient_checkpointing_func(block, h, embedding, keys)
        return block(h, embedding, keys)
