"""Tiny diffusers text-to-image pipelines with random weights, called with embeddings instead of prompts."""

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_consistency_models import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
)

from tests.helpers.stock_pipelines import autoencoder_kl, randomised


SIZE = 8  # of images; latents have half the size
WIDTH = 8  # of embeddings
WITHOUT = {"text_encoder": None, "tokenizer": None}
LATENT = {"clip_sample": False, "steps_offset": 1}
UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _embeddings(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _unet(**config):
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    return randomised(
        UNet2DConditionModel(
            4, layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4, **blocks, **config
        )
    )


def _stable_diffusion():
    pipe = StableDiffusionPipeline(
        autoencoder_kl(3, force_upcast=False), unet=_unet(), scheduler=DDIMScheduler(**LATENT), **WITHOUT, **UNSAFE
    )
    embeddings = {
        "prompt_embeds": _embeddings(1, 3, WIDTH),
        "negative_prompt_embeds": _embeddings(1, 3, WIDTH, seed=6),
    }
    return pipe, {**embeddings, "guidance_scale": 2.0}


def _latent_consistency():
    unet = _unet(time_cond_proj_dim=8)
    pipe = LatentConsistencyModelPipeline(
        autoencoder_kl(3, force_upcast=False), unet=unet, scheduler=DDIMScheduler(**LATENT), **WITHOUT, **UNSAFE
    )
    return pipe, {"prompt_embeds": _embeddings(1, 3, WIDTH)}


def _stable_diffusion_xl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = _unet(**added, projection_class_embeddings_input_dim=WIDTH + 6 * 4)
    pipe = StableDiffusionXLPipeline(
        autoencoder_kl(3, force_upcast=False),
        unet=unet,
        scheduler=DDIMScheduler(**LATENT),
        text_encoder_2=None,
        tokenizer_2=None,
        **WITHOUT,
        add_watermarker=False,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = [(1, 3, WIDTH)] * 2 + [(1, WIDTH)] * 2
    return pipe, {name: _embeddings(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes))}


def _stable_diffusion_3():
    transformer = randomised(
        SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=8,
            pooled_projection_dim=WIDTH,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )
    encoders = {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in (2, 3)}
    pipe = StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        autoencoder_kl(3, force_upcast=False),
        **WITHOUT,
        **encoders,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    shapes = [(1, 3, WIDTH)] * 2 + [(1, WIDTH)] * 2
    return pipe, {name: _embeddings(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes))}


TEXT_TO_IMAGE = {
    "sd": _stable_diffusion, "lcm": _latent_consistency, "sdxl": _stable_diffusion_xl, "sd3": _stable_diffusion_3
}  # fmt: skip
IMAGE_TO_IMAGE = {
    "sd": StableDiffusionImg2ImgPipeline,
    "lcm": LatentConsistencyModelImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
}


def image():
    """A start image for image-to-image pipelines, (1, 3, SIZE, SIZE) in [0, 1]."""
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
