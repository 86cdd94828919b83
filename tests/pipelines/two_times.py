"""A network with two times, as MeanFlow's are, made of a stock U-Net."""

from diffusers import ModelMixin, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput


__all__ = ["ModelMixin", "TwoTimeUNet"]  # diffusers looks the base up beside the class


class TwoTimeUNet(UNet2DModel):
    """Its output depends on both times, as 3 timestep + target_timestep."""

    def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
        label = 100 * (3 * timestep + target_timestep)
        output = super().forward(sample, label, class_labels=class_labels).sample
        return UNet2DOutput(output) if return_dict else (output,)
