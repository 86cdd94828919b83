"""Tiny diffusers models with random weights, saved as diffusers pipelines."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)


def randomised(network, seed=0):
    """Set all weights of `network` to nonzero random values, as after training; returns it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet(size=8, channels=1, classes=None, **config):
    config = {"out_channels": channels, "block_out_channels": (8, 16), "norm_num_groups": 4, **config}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return randomised(UNet2DModel(size, channels, layers_per_block=1, num_class_embeds=classes, **blocks, **config))


def dit(size=4, channels=4, classes=10, learned_variance=True):
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": size, "patch_size": 2}
    out = 2 * channels if learned_variance else channels
    return randomised(
        DiTTransformer2DModel(in_channels=channels, out_channels=out, num_embeds_ada_norm=classes, **shape)
    )


def autoencoder_kl(channels=1, latent_channels=4, **config):
    config = {"scaling_factor": 0.7, "shift_factor": 0.1, "norm_num_groups": 4, **config}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return randomised(
        AutoencoderKL(
            channels, channels, block_out_channels=(4, 8), latent_channels=latent_channels, **blocks, **config
        )
    )


def autoencoder_tiny(channels=1, latent_channels=4):
    # one halving, because one block of a tiny autoencoder's encoder keeps the resolution
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return randomised(AutoencoderTiny(channels, channels, latent_channels=latent_channels, **blocks))


def vq_model(channels=1, latent_channels=3):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (4, 8), "latent_channels": latent_channels, "norm_num_groups": 4}
    return randomised(VQModel(channels, channels, num_vq_embeddings=16, scaling_factor=0.5, **blocks, **shape))


ZERO_SNR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
PIPELINES = {
    "epsilon": lambda: DDPMPipeline(unet(), DDPMScheduler()),
    "v": lambda: DDIMPipeline(unet(classes=10), DDIMScheduler(prediction_type="v_prediction", **COSINE)),
    "v, zero snr": lambda: DDPMPipeline(unet(), DDIMScheduler(prediction_type="v_prediction", **ZERO_SNR)),
    "sample": lambda: DDPMPipeline(unet(), DDPMScheduler(prediction_type="sample")),
    "edm": lambda: DDPMPipeline(unet(), EDMEulerScheduler(sigma_data=0.6)),
    "edm, v": lambda: DDPMPipeline(unet(), EDMEulerScheduler(prediction_type="v_prediction")),
    "flow": lambda: DDPMPipeline(unet(classes=10), FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "dit": lambda: DiTPipeline(dit(), autoencoder_kl(), DDIMScheduler()),
    "ldm": lambda: LDMPipeline(vq_model(), unet(size=4, channels=3), DDIMScheduler()),
}


def save(kind, folder, pipeline=None):
    """Save the pipeline of `kind`, a key of `PIPELINES`, or the given `pipeline`, in `folder`; returns `folder`."""
    (pipeline or PIPELINES[kind]()).save_pretrained(folder)
    return folder
