"""Text-to-image pipelines with their own tokenizers and encoders: tiny, with random weights."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.helpers.stock_pipelines import autoencoder_kl, randomised


WORDS = "a two red green blue yellow circle circles square squares triangle triangles above below left right of"
CONTEXT = 12  # tokens, with those of the start and the end
WIDTH = 16
SETTINGS = {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear"}


def tokenizer(words=WORDS):
    """A CLIP tokenizer in which each of the words is one token, and other words are letters or unknown."""
    vocabulary, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1}, []
    for word in words.split():
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for letter in letters:
            vocabulary.setdefault(letter, len(vocabulary))
        joined = letters[0]
        for letter in letters[1:]:
            merges += [merge] if (merge := (joined, letter)) not in merges else []
            joined += letter
            vocabulary.setdefault(joined, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def text_encoder(words, kind=CLIPTextModel, layers=1):
    """A CLIP text encoder of this width for the tokens of a tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": WIDTH, "projection_dim": WIDTH, "intermediate_size": 2 * WIDTH}
    config = CLIPTextConfig(
        vocab_size=len(words), num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=CONTEXT,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )  # fmt: skip
    return kind(config).eval()


def _unet(**config):
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    return randomised(UNet2DConditionModel(4, layers_per_block=1, attention_head_dim=4, **blocks, **config))


def stable_diffusion():
    """A `StableDiffusionPipeline`."""
    words = tokenizer()
    return StableDiffusionPipeline(
        autoencoder_kl(3, force_upcast=False), text_encoder(words), words, _unet(cross_attention_dim=WIDTH),
        DDIMScheduler(**SETTINGS), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )  # fmt: skip


def stable_diffusion_xl():
    """A `StableDiffusionXLPipeline`, whose two encoders are concatenated."""
    words = tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added["projection_class_embeddings_input_dim"] = WIDTH + 6 * 4
    second = text_encoder(words, CLIPTextModelWithProjection, layers=2)
    return StableDiffusionXLPipeline(
        autoencoder_kl(3, force_upcast=False), text_encoder(words), second, words, words,
        _unet(cross_attention_dim=2 * WIDTH, **added), DDIMScheduler(**SETTINGS), add_watermarker=False
    )  # fmt: skip


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}
