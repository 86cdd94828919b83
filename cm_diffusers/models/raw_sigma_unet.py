"""The plain U-Net of a public minimal consistency model, which reads the unscaled image and sigma.

Checkpoints `ct_*.pth` of github.com/cloneofsimo/consistency_models are converted into it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class RawSigmaUNet2DOutput(BaseOutput):
    """Output of `RawSigmaUNet2DModel`.

    Args:
        sample: the output image (B, C, H, W).
    """

    sample: Tensor


class TwoConvs(nn.Sequential):
    """Norm, activation and convolution, twice, from `in_channels` to `out_channels`, multiples of 32."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.GroupNorm(32, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )


class RawSigmaUNet2DModel(ModelMixin, ConfigMixin):
    """A U-Net called like other consistency models, with c_in x and 250 ln(sigma); it undoes both scalings.

    Args:
        sample_size: height and width of the images, or (height, width), multiples of 4. The network accepts other
            multiples of 4 as well.
        in_channels, out_channels: number of image channels.
        base_channels: channels of the upper level, a multiple of 32. The lower level has twice as many.
        sigma_data: standard deviation of the data in c_in = 1 / sqrt(sigma^2 + sigma_data^2), which is undone.
        num_class_embeds: always None, because the network is unconditional.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 256,
        sigma_data: float = 0.5,
        num_class_embeds: None = None,
    ):
        super().__init__()
        width = base_channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList([TwoConvs(width, width), TwoConvs(width, 2 * width)])
        self.down_blocks.append(TwoConvs(2 * width, 2 * width))
        widths = (width, width, 2 * width, 2 * width)
        self.time_layers = nn.ModuleList(nn.Linear(2 * width, channels) for channels in widths)
        self.mid_block = TwoConvs(2 * width, 2 * width)
        self.up_blocks = nn.ModuleList([TwoConvs(2 * width, 2 * width), TwoConvs(4 * width, width)])
        self.up_blocks.append(TwoConvs(width, width))
        self.conv_up = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.conv_out = nn.Conv2d(2 * width + in_channels, out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: None = None, return_dict: bool = True
    ) -> RawSigmaUNet2DOutput | tuple[Tensor]:
        """Apply the network to `sample` (B, C, H, W) at `timestep` = 250 ln(sigma), a number, () or (B,).

        `return_dict` False returns the tuple (sample,).

        Raises:
            ValueError: `class_labels` is not None, although the network is unconditional.
        """
        if class_labels is not None:
            raise ValueError("class_labels are not for this network: it is unconditional.")
        dtype = torch.promote_types(self.dtype, torch.float32)
        if not torch.is_tensor(timestep):
            timestep = torch.full((), timestep, dtype=dtype, device=sample.device)
        timestep = timestep.to(sample.device, torch.promote_types(timestep.dtype, dtype)).expand(sample.shape[0])
        sigma = (timestep / 250).exp()
        norm = (sigma**2 + self.config.sigma_data**2).sqrt()
        x = (sample * norm[:, None, None, None]).to(sample.dtype)
        times = [layer(self._features(sigma.to(dtype)))[..., None, None] for layer in self.time_layers]

        down, up = self.down_blocks, self.up_blocks
        high = self._halved(self.conv_in(x))
        h = high + times[0]
        h = h + down[0](h) + times[1]
        low = self._halved(down[1](h))
        h = low + times[2]
        h = self.mid_block(h + down[2](h) + times[3])
        h = h + up[0](h)
        h = up[1](self._doubled(torch.cat([h, low], 1)))
        h = h + up[2](h)
        h = self.conv_up(self._doubled(torch.cat([h, high], 1)))
        sample = self.conv_out(torch.cat([h, x], 1))
        return RawSigmaUNet2DOutput(sample) if return_dict else (sample,)

    def _features(self, sigma: Tensor) -> Tensor:
        """sin and cos of `sigma` (B,) at frequencies from 1 down to about 1e-4: (B, 2 base_channels)."""
        count = self.config.base_channels
        steps = torch.arange(count, dtype=torch.float32, device=sigma.device)
        angles = sigma[:, None] * (-math.log(10000) * steps / count).exp().to(sigma.dtype)
        return torch.cat([angles.sin(), angles.cos()], 1).to(self.dtype)

    @staticmethod
    def _halved(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=0.5, mode="nearest")

    @staticmethod
    def _doubled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
