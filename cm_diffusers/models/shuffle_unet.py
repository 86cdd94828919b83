"""The small U-Net of a public sCM for MNIST, built from ShuffleNet units.

Checkpoints of that sCM are converted into it. The units come from ShuffleNet V2 (Ma et al. 2018, arXiv:1807.11164,
section 3.2). The time conditioning follows sCM's advice (Lu & Song 2024, arXiv:2410.11081, section 4.1): slow
positional features and a normalised scale. Every operation has a forward-mode derivative.
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


@dataclass
class ShuffleUNet2DOutput(BaseOutput):
    """Output of `ShuffleUNet2DModel`.

    Args:
        sample: the output image (B, C, H, W).
    """

    sample: Tensor


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 8), channels)


def _conv(in_channels: int, out_channels: int, kernel: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(conv, _norm(out_channels), nn.SiLU())


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), _norm(channels)]


class ShuffleUnit(nn.Module):
    """Two branches of depthwise and 1x1 convolutions with interleaved output channels.

    Args:
        in_channels, out_channels: number of channels before (`in_channels`) and after (`out_channels`) the unit.
        stride: with 1, each branch reads half the channels. With 2, each reads all of them and halves the image.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.splits, half = stride == 1, out_channels // 2
        seen = in_channels // 2 if self.splits else in_channels
        middle = seen if self.splits else half
        self.branch1 = nn.Sequential(*_depthwise(seen, stride), _conv(seen, half))
        self.branch2 = nn.Sequential(_conv(seen, middle), *_depthwise(middle, stride), _conv(middle, half))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        first, second = x.chunk(2, 1) if self.splits else (x, x)
        return torch.stack([self.branch1(first), self.branch2(second)], 2).flatten(1, 2)


class Stage(nn.Module):
    """Four units, a scale by the time, and a unit that ends the level.

    Args:
        in_channels: number of channels before the stage.
        channels: number of channels after the last of the four units.
        time_channels: number of time features.
        hidden: width of the hidden layer between time features and scale.
        end: unit that ends the level.
    """

    def __init__(self, in_channels: int, channels: int, time_channels: int, hidden: int, end: ShuffleUnit):
        super().__init__()
        units = [ShuffleUnit(in_channels, in_channels) for _ in range(3)]
        self.units = nn.Sequential(*units, ShuffleUnit(in_channels, channels))
        self.scale = nn.Sequential(nn.Linear(time_channels, hidden), nn.SiLU(), nn.Linear(hidden, channels))
        self.end = end

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of `end` and of the four units, for `x` (B, C, H, W) and features `time` (B, time_channels)."""
        state = self.units(x)
        scale = 1 + self.scale(time)
        scale = scale / (scale.square().mean(1, keepdim=True) + 1e-8).sqrt()
        return self.end(F.silu(state * scale[..., None, None].to(x.dtype))), state


class ShuffleUNet2DModel(ModelMixin, ConfigMixin):
    """A U-Net without attention, of 1 to 2 million parameters, for TrigFlow's angles.

    Args:
        sample_size: height and width of the images, or (height, width). The network accepts other sizes as well.
        in_channels, out_channels: number of image channels.
        base_channels: channels of the full resolution, a multiple of 4.
        channel_mult: channels of the smaller levels in units of `base_channels`. Each level halves the image.
        time_channels: number of time features, even.
        num_class_embeds: always None, because the network is unconditional.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        base_channels: int = 64,
        channel_mult: Sequence[int] = (2, 4),
        time_channels: int = 256,
        num_class_embeds: None = None,
    ):
        super().__init__()
        widths = [base_channels, *(base_channels * factor for factor in channel_mult)]
        self.conv_in = _conv(in_channels, base_channels, 3)
        self.down_stages, self.up_stages = nn.ModuleList(), nn.ModuleList()
        for above, below in zip(widths, widths[1:]):
            end = ShuffleUnit(below // 2, below, stride=2)
            self.down_stages.append(Stage(above, below // 2, time_channels, below, end))
            end = ShuffleUnit(below // 2, above // 2)
            self.up_stages.insert(0, Stage(below, below // 2, time_channels, below, end))
        low = widths[-1]
        self.mid_units = nn.Sequential(ShuffleUnit(low, low), ShuffleUnit(low, low), ShuffleUnit(low, low // 2))
        self.conv_out = nn.Conv2d(base_channels // 2, out_channels, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: None = None, return_dict: bool = True
    ) -> ShuffleUNet2DOutput | tuple[Tensor]:
        """Apply the network to `sample` (B, C, H, W) at the angle `timestep`, in radians: a number, () or (B,).

        `return_dict` False returns the tuple (sample,).

        Raises:
            ValueError: `class_labels` is not None, although the network is unconditional.
        """
        if class_labels is not None:
            raise ValueError("class_labels are not for this network: it is unconditional.")
        dtype = torch.promote_types(self.dtype, torch.float32)
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, dtype=dtype, device=sample.device)
        timestep = timestep.to(sample.device, dtype).expand(sample.shape[0])
        count = self.config.time_channels // 2
        steps = torch.arange(count, dtype=dtype, device=sample.device)
        angles = timestep[:, None] * (-math.log(10) / (count - 1) * steps).exp()  # frequencies from 1 down to 1/10
        time = torch.cat([angles.sin(), angles.cos()], 1).to(self.dtype)

        h, states = self.conv_in(sample), []
        for stage in self.down_stages:
            h, state = stage(h, time)
            states.append(state)
        h = self.mid_units(h)
        for stage in self.up_stages:
            state = states.pop()
            h = F.interpolate(h, state.shape[2:], mode="bilinear", align_corners=False)
            h = stage(torch.cat([h, state], 1), time)[0]
        sample = self.conv_out(h)
        return ShuffleUNet2DOutput(sample) if return_dict else (sample,)
