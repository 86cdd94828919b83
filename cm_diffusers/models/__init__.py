"""Networks. Each file imports only torch, numpy, diffusers, formulas of `core` and the other networks' files."""

from cm_diffusers.models.discriminator import PatchDiscriminator, ProjectedDiscriminator
from cm_diffusers.models.dit import DiTModel
from cm_diffusers.models.edm_unet import EDMUNet2DModel
from cm_diffusers.models.jvp_unet import JVPUNet2DModel
from cm_diffusers.models.log_variance import with_log_variance, without_log_variance
from cm_diffusers.models.raw_sigma_unet import RawSigmaUNet2DModel
from cm_diffusers.models.shuffle_unet import ShuffleUNet2DModel
from cm_diffusers.models.two_time import TwoTimeModel
from cm_diffusers.models.unet_presets import EDM_PRESETS, UNET_PRESETS, build_unet, keep_time_embedding_in_float32
from cm_diffusers.registration import of_the_library


__all__ = [
    "DiTModel",
    "EDMUNet2DModel",
    "EDM_PRESETS",
    "JVPUNet2DModel",
    "PatchDiscriminator",
    "ProjectedDiscriminator",
    "RawSigmaUNet2DModel",
    "ShuffleUNet2DModel",
    "TwoTimeModel",
    "UNET_PRESETS",
    "build_unet",
    "keep_time_embedding_in_float32",
    "with_log_variance",
    "without_log_variance",
]

of_the_library(DiTModel, EDMUNet2DModel, JVPUNet2DModel, RawSigmaUNet2DModel, ShuffleUNet2DModel, TwoTimeModel)
