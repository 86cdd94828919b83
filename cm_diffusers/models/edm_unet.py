"""The U-Nets of EDM and score-based models: DDPM++, NCSN++ and ADM.

- DDPM++ and NCSN++: Song et al. (2021, arXiv:2011.13456).
- ADM: Dhariwal & Nichol (2021, arXiv:2105.05233).
- All three under EDM: Karras et al. (2022, arXiv:2206.00364, table 1 and appendix F.2).

Checkpoints of EDM, ECT, CDM and CTM are converted into these networks. As in `jvp_unet.py`, every operation has a
forward-mode derivative, and time is never rounded below float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .fused import attention, group_norm, split_heads, under_tangent
from .keyed_dropout import KeyedDropout, KeyedDropoutMixin


CHOICES = {
    "architecture": ("score", "adm"),
    "time_embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
    "preconditioning": ("none", "edm", "vp", "ve"),
}
FOURIER_SCALE = 16  # standard deviation of NCSN++'s frequencies, in units of 2 pi
BETA_D, BETA_MIN, VP_STEPS = 19.9, 0.1, 1000  # noise schedule of VP (Karras et al. 2022, table 1)


@dataclass
class EDMUNet2DOutput(BaseOutput):
    """Output of `EDMUNet2DModel`.

    Args:
        sample: the output image (B, C, H, W).
    """

    sample: Tensor


class FullLinear(nn.Linear):
    """A linear layer that computes in float32 or better, even under autocast or with weights of lower precision.

    It carries the noise level: in bfloat16 neighbouring levels become one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., in_features) to (..., out_features), in float32 or better."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class FullGroupNorm(nn.GroupNorm):
    """Group norm that computes in float32 or better and returns the dtype of its input.

    There are 32 groups, or `channels` // 4 if that is fewer.

    Args:
        channels: number of channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (B, C, H, W); the result has its dtype."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Resample(nn.Module):
    """Filter images by `taps` along both axes, at twice or half the resolution.

    Args:
        taps: the filter: (1, 1) repeats or averages pixels, (1, 3, 3, 1) is smoother.
        up: True doubles the resolution, False halves it.
        padding: pixels of zeros on each side, (len(taps) - 1) // 2 by default.
    """

    def __init__(self, taps: Sequence[float], up: bool, padding: int | None = None):
        super().__init__()
        self.up, self.padding = up, (len(taps) - 1) // 2 if padding is None else padding
        kernel = None
        if tuple(taps) != (1, 1) or self.padding:
            # on the CPU even where weights are made without values: nothing loads this table
            f = torch.tensor(taps, dtype=torch.float32, device="cpu")
            kernel = f.outer(f) * ((4 if up else 1) / f.sum().square())
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter `x` (B, C, H, W) to (B, C, 2 H, 2 W) or (B, C, H / 2, W / 2)."""
        if self.kernel is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        convolution = F.conv_transpose2d if self.up else F.conv2d
        kernel = self.kernel.to(x).expand(channels, 1, -1, -1)
        return convolution(x, kernel, stride=2, padding=self.padding, groups=channels)


class NoiseFeatures(nn.Module):
    """cos and sin of a noise label (B,) at geometric or random frequencies: (B, channels).

    The frequencies are computed in float32 by each family's own formula. At labels near 1000 a different rounding
    turns the phase by 1e-4.

    Args:
        channels: number of features, even.
        kind: "positional" for frequencies from 1 down to 1e-4, "fourier" for random ones, stored in the checkpoint.
        endpoint: whether the lowest positional frequency is exactly 1e-4 ("score") or lies just above it (ADM).
    """

    def __init__(self, channels: int, kind: str, endpoint: bool):
        super().__init__()
        self.half, self.kind, self.endpoint = channels // 2, kind, endpoint
        if kind == "fourier":
            self.register_buffer("frequencies", FOURIER_SCALE * torch.randn(self.half))

    def forward(self, label: Tensor) -> Tensor:
        """Features (B, channels) of `label` (B,): first the cosines, then the sines."""
        steps = torch.arange(self.half, dtype=torch.float32, device=label.device)
        if self.kind == "fourier":
            frequencies = 2 * math.pi * self.frequencies.float()
        elif self.endpoint:
            frequencies = (1 / 10000) ** (steps / (self.half - 1))
        else:
            frequencies = (-math.log(10000) * steps / self.half).exp()
        angles = label[:, None] * frequencies.to(label.dtype)
        return torch.cat([angles.cos(), angles.sin()], 1)


class NoiseMLP(nn.Sequential):
    """Two linear layers from features (B, `features`) to an embedding (B, `channels`), in float32 or better."""

    def __init__(self, features: int, channels: int):
        super().__init__(FullLinear(features, channels), nn.SiLU(), FullLinear(channels, channels))


class ResidualBlock(nn.Module):
    """Two convolutions around a modulation by the embedding, then optional self-attention.

    Args:
        in_channels, out_channels: number of channels before (`in_channels`) and after (`out_channels`) the block.
        embedding: size of the embedding vector.
        scale_shift: True scales and shifts after the norm (ADM); False shifts before the norm ("score").
        skip_scale: factor on each sum of a branch and its skip connection.
        eps: added to the variance in the group norms.
        taps: the filter of `up` and `down`, see `Resample`.
        dropout: dropout probability.
        head_dim: channels per attention head; None for one head.
        attention: whether the block ends with self-attention.
        up: doubles the resolution.
        down: halves the resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        scale_shift: bool,
        skip_scale: float,
        eps: float,
        taps: Sequence[float],
        dropout: float,
        head_dim: int | None,
        attention: bool = False,
        up: bool = False,
        down: bool = False,
    ):
        super().__init__()
        self.scale_shift, self.skip_scale = scale_shift, skip_scale
        self.resample = Resample(taps, up) if up or down else None
        self.norm1 = FullGroupNorm(in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = FullLinear(embedding, out_channels * (2 if scale_shift else 1))
        self.norm2 = FullGroupNorm(out_channels, eps)
        self.dropout = KeyedDropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # ADM only resamples the skip connection, without a convolution
        projects = in_channels != out_channels or self.resample is not None and not scale_shift
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if projects else nn.Identity()
        self.heads = out_channels // (head_dim or out_channels) if attention else 0
        if attention:
            self.norm3 = FullGroupNorm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None = None) -> Tensor:
        """Apply the block to `x` (B, in_channels, H, W) with `embedding` (B, E).

        `keys` (B,), int64, are the dropout keys; None draws ordinary dropout.
        """
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        modulation = self.modulation(embedding)[..., None, None].to(h.dtype)
        if self.scale_shift:
            scale, shift = modulation.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + modulation)
        h = (self.skip(x) + self.conv2(self.dropout(F.silu(h), keys))) * self.skip_scale
        return (h + self._attend(h)) * self.skip_scale if self.heads else h

    def _attend(self, x: Tensor) -> Tensor:
        h = attention(*split_heads(self.qkv(self.norm3(x)), self.heads))
        return self.proj(h.transpose(2, 3).reshape(x.shape))


class EDMUNet2DModel(KeyedDropoutMixin, ModelMixin, ConfigMixin):
    """DDPM++, NCSN++ or ADM under EDM's preconditioning, called like diffusers' `UNet2DModel`.

    - DDPM++: the defaults.
    - NCSN++: `time_embedding_type` "fourier", `resample_filter` (1, 3, 3, 1), `encoder_type` "residual".
    - ADM: `architecture` "adm", the other types as by default.

    Args:
        sample_size: height and width of the images, or (height, width). The network accepts other sizes as well.
        in_channels, out_channels: number of image channels.
        model_channels: unit of `channel_mult`, and the number of positional time features (Fourier: twice as many).
        channel_mult: channels of each level in units of `model_channels`. Each level after the first halves the image.
        layers_per_block: residual blocks per level (one more on the way up).
        attention_levels: levels with self-attention (0 is the full resolution). The middle always has it.
        attention_head_dim: channels per head; None for one head.
        dropout: dropout probability.
        label_dropout: probability with which training replaced class labels by the null class. Above 0 the network
            has been trained with the null class, the label `num_class_embeds`.
        num_class_embeds: number of class labels; None for an unconditional model.
        augment_channels: size of the augmentation labels (Karras et al. 2022, appendix F.2); 0 for none.
        architecture: "score" for DDPM++ and NCSN++, whose embedding shifts and whose sums are scaled by sqrt(1/2), or
            "adm", whose embedding scales and shifts.
        time_embedding_type: "positional" or "fourier", see `NoiseFeatures`.
        resample_filter: taps of the filter that changes the resolution, (1, 1) or (1, 3, 3, 1).
        encoder_type: side path of the encoder. "standard" has none, "skip" adds the shrunken image at each level, and
            "residual" adds the shrunken state of the previous level.
        decoder_type: "standard", or "skip" for the sum of images that are read out at each level.
        preconditioning: meaning of the timestep and of the output. "none" passes both through unchanged. The others
            take the timestep 250 ln(sigma) and return EDM's F. "edm": the network's label is ln(sigma) / 4. "vp" and
            "ve": sigma_data is 1, and the network predicts the noise or its negative, as in table 1 of the paper.
        two_times: whether the network also reads a target time, with separate layers (Kim et al. 2023,
            arXiv:2310.02279).

    Raises:
        ValueError: an unknown `architecture`, `time_embedding_type`, `encoder_type`, `decoder_type` or
            `preconditioning`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_levels: Sequence[int] = (1,),
        attention_head_dim: int | None = None,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        num_class_embeds: int | None = None,
        augment_channels: int = 0,
        architecture: str = "score",
        time_embedding_type: str = "positional",
        resample_filter: Sequence[int] = (1, 1),
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        preconditioning: str = "none",
        two_times: bool = False,
    ):
        super().__init__()
        for name, allowed in CHOICES.items():
            if self.config[name] not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {self.config[name]!r}.")
        adm = architecture == "adm"
        features, embedding = model_channels * (1 if time_embedding_type == "positional" else 2), 4 * model_channels
        self.time_features = NoiseFeatures(features, time_embedding_type, endpoint=not adm)
        self.time_embedding = NoiseMLP(features, embedding)
        self.target_time_embedding = NoiseMLP(features, embedding) if two_times else None
        self.class_embedding = self.augment_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = FullLinear(num_class_embeds, embedding if adm else features, bias=not adm)
        if augment_channels:
            self.augment_embedding = FullLinear(augment_channels, features, bias=False)

        block = partial(
            ResidualBlock,
            embedding=embedding * (2 if two_times else 1),
            scale_shift=adm,
            skip_scale=1.0 if adm else math.sqrt(0.5),
            eps=1e-5 if adm else 1e-6,
            taps=resample_filter,
            dropout=dropout,
            head_dim=attention_head_dim,
        )
        widths = [round(model_channels * factor) for factor in channel_mult]
        width = widths[0] if adm else model_channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks, self.aux_down, skips = nn.ModuleList(), nn.ModuleList(), [width]
        self.aux_shrink = Resample(resample_filter, False, 0 if encoder_type == "residual" else None)
        self.aux_enlarge = Resample(resample_filter, True)
        side = in_channels  # channels of the side path of the encoder
        for level, channels in enumerate(widths):
            blocks = nn.ModuleList()
            if level > 0:
                blocks.append(block(width, width, down=True))
                skips.append(width)
                if encoder_type == "skip":
                    self.aux_down.append(nn.Conv2d(side, width, 1))
                elif encoder_type == "residual":  # padded for the filter that follows
                    self.aux_down.append(nn.Conv2d(side, width, 3, padding=1 + (len(resample_filter) - 1) // 2))
                    side = width
            for _ in range(layers_per_block):
                blocks.append(block(width, channels, attention=level in attention_levels))
                width = channels
                skips.append(width)
            self.down_blocks.append(blocks)
        self.mid_blocks = nn.ModuleList([block(width, width, attention=True), block(width, width)])
        self.up_blocks, self.aux_norm_out, self.aux_conv_out = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, channels in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for i in range(layers_per_block + 1):
                attention = level in attention_levels and (adm or i == layers_per_block)
                blocks.append(block(width + skips.pop(), channels, attention=attention))
                width = channels
            if level > 0:
                if decoder_type == "skip":
                    self.aux_norm_out.append(FullGroupNorm(width, 1e-6))
                    self.aux_conv_out.append(nn.Conv2d(width, out_channels, 3, padding=1))
                blocks.append(block(width, width, up=True))
            self.up_blocks.append(blocks)
        self.norm_out = FullGroupNorm(width, 1e-5 if adm else 1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()
        self._number_dropout()
        # from_config would leave out names listed there, even if their values change later
        self.register_to_config(_use_default_values=[])
        self.gradient_checkpointing = False

    def _initialise(self) -> None:
        """Start the branches near 0, so that each block starts as the identity."""
        if self.config.architecture == "score":
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        small = 0.0 if self.config.architecture == "adm" else 1e-5
        ends = [end for m in self.modules() if isinstance(m, ResidualBlock) for end in (m.conv2, m.heads and m.proj)]
        with torch.no_grad():
            for end in filter(None, (*ends, self.conv_out, *self.aux_conv_out)):
                for parameter in end.parameters():
                    parameter.mul_(small)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        target_timestep: Tensor | float | None = None,
        return_dict: bool = True,
    ) -> EDMUNet2DOutput | tuple[Tensor]:
        """Apply the network to `sample` (B, C, H, W) at `timestep`, a number, () or (B,); see `preconditioning`.

        Args:
            class_labels: int64 (B,) in [0, num_class_embeds]. The last label and None mean the null class.
            augment_labels: (B, augment_channels), the parameters of the augmentation. Zeros and None mean none.
            target_timestep: like `timestep`; required if `two_times`.
            return_dict: False returns the tuple (sample,).

        Raises:
            ValueError: labels that the network does not read, a `target_timestep` that is missing or not expected,
                or dropout keys for another batch size.
        """
        given = {"class_labels": class_labels, "augment_labels": augment_labels}
        for name, module in (("class_labels", self.class_embedding), ("augment_labels", self.augment_embedding)):
            if module is None and given[name] is not None:
                raise ValueError(f"{name} are not for this network: it has no embedding for them.")
        if target_timestep is None and self.target_time_embedding is not None:
            raise ValueError("target_timestep is missing: this network reads two times.")
        if target_timestep is not None and self.target_time_embedding is None:
            raise ValueError("target_timestep is not for this network: it reads one time.")

        sigma, label = self._noise(timestep, sample)
        kind = self.config.preconditioning
        x = (sample * (sigma**2 + 1).sqrt()).to(sample.dtype) if kind == "ve" else sample
        embedding = self._embed(label, target_timestep, class_labels, augment_labels, sample)
        output = self._network(x, embedding, self._keys_of(sample))
        if kind in ("vp", "ve"):  # D = x - sigma noise, as c_skip x + c_out F
            noise = output if kind == "vp" else -output
            output = (sigma * sample - (sigma**2 + 1).sqrt() * noise).to(sample.dtype)
        return EDMUNet2DOutput(output) if return_dict else (output,)

    def _noise(self, timestep: Tensor | float, sample: Tensor) -> tuple[Tensor | None, Tensor]:
        """sigma (B, 1, 1, 1) for "vp" and "ve", else None, and the noise label (B,) of the network's training."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, dtype=dtype, device=sample.device)
        timestep = timestep.to(sample.device, torch.promote_types(timestep.dtype, dtype)).expand(sample.shape[0])
        kind = self.config.preconditioning
        if kind in ("none", "edm"):
            return None, (timestep if kind == "none" else timestep / 1000).to(dtype)
        sigma = (timestep / 250).exp()
        if kind == "ve":
            label = (sigma / 2).log()
        else:
            time = ((BETA_MIN**2 + 2 * BETA_D * (1 + sigma**2).log()).sqrt() - BETA_MIN) / BETA_D
            label = (VP_STEPS - 1) * time
        return sigma[:, None, None, None].to(dtype), label.to(dtype)

    def _embed(
        self,
        label: Tensor,
        target_timestep: Tensor | float | None,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        sample: Tensor,
    ) -> Tensor:
        """The embedding (B, E) that modulates the blocks; E is doubled with a target time."""
        adm, shared = self.config.architecture == "adm", 0
        one_hot = classes = None
        if self.class_embedding is not None:
            count = self.config.num_class_embeds
            if class_labels is None:
                one_hot = label.new_zeros(sample.shape[0], count)
            else:
                one_hot = F.one_hot(class_labels.long(), count + 1)[:, :count].to(label.dtype)
            classes = self.class_embedding(one_hot if adm else one_hot * math.sqrt(count))
        if self.augment_embedding is not None:
            if augment_labels is None:  # zeros keep the weights in the graph, as distributed training requires
                augment_labels = label.new_zeros(sample.shape[0], self.config.augment_channels)
            shared = shared + self.augment_embedding(augment_labels)
        if classes is not None and not adm:
            shared = shared + classes

        embedding = self.time_embedding(self._features(label) + shared)
        if adm and classes is not None:
            embedding = embedding + classes
        if self.target_time_embedding is not None:
            target = self._noise(target_timestep, sample)[1]
            embedding = torch.cat([embedding, self.target_time_embedding(self._features(target) + shared)], 1)
        return F.silu(embedding)

    def _features(self, label: Tensor) -> Tensor:
        """Features (B, F) of the noise label (B,); for "score" the sines come first."""
        features = self.time_features(label)
        return features if self.config.architecture == "adm" else torch.cat(features.chunk(2, 1)[::-1], 1)

    def _network(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        """Output of the U-Net for `x` (B, C, H, W), before the preconditioning is converted."""
        encoder_type = self.config.encoder_type
        side, h = x, self.conv_in(x)
        skips = [h]
        for level, blocks in enumerate(self.down_blocks):
            for i, block in enumerate(blocks):
                h = self._apply_block(block, h, embedding, keys)
                if level > 0 and i == 0 and encoder_type != "standard":
                    if encoder_type == "skip":
                        side = self.aux_shrink(side)
                        h = h + self.aux_down[level - 1](side)
                    else:
                        side = self.aux_shrink(self.aux_down[level - 1](side))
                        side = h = (h + side) / math.sqrt(2)
                skips.append(h)
        for block in self.mid_blocks:
            h = self._apply_block(block, h, embedding, keys)
        image = None
        for place, blocks in enumerate(self.up_blocks):
            for i, block in enumerate(blocks):
                if i <= self.config.layers_per_block:
                    h = torch.cat([h, skips.pop()], 1)
                elif self.config.decoder_type == "skip":
                    image = self._read_out(self.aux_norm_out[place], self.aux_conv_out[place], h, image)
                h = self._apply_block(block, h, embedding, keys)
        return self._read_out(self.norm_out, self.conv_out, h, image)

    def _read_out(self, norm: nn.Module, conv: nn.Module, h: Tensor, image: Tensor | None) -> Tensor:
        """Read an image out of the state `h` and add the enlarged `image` of the level below."""
        read = conv(F.silu(norm(h)))
        return read if image is None else read + self.aux_enlarge(image)

    def _apply_block(self, block: ResidualBlock, h: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        # gradient checkpointing recomputes after the end of the JVP, when tangents are gone
        if self.gradient_checkpointing and torch.is_grad_enabled() and not under_tangent():
            return self._gradient_checkpointing_func(block, h, embedding, keys)
        return block(h, embedding, keys)
