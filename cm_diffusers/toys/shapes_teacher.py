"""A small Stable Diffusion of the world of shapes: text to pictures of 32 x 32 pixels, trained on the CPU in minutes.

It is a stock `StableDiffusionPipeline`, for which few-step students can be made: an autoencoder without norms
(`AutoencoderTiny`, as in TAESD), a CLIP text encoder whose tokens are words, and a U-Net with cross-attention. Text
encoder and U-Net learn together to predict v (Salimans & Ho 2022, arXiv:2202.00512) from noisy latents, with empty
prompts for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cm_diffusers.core.draws import derive_seed, permutation
from cm_diffusers.core.ema import EMA, HalfLife
from cm_diffusers.toys import shapes


WORDS = ("a", "two", *shapes.COLOURS, *shapes.SHAPES, *(f"{shape}s" for shape in shapes.SHAPES))
WORDS += ("above", "below", "left", "right", "of")
CONTEXT = 10  # tokens of the longest prompt, with those of the start and the end
WIDTH = 64  # of the text encoder
LATENT_CHANNELS = 4
LATENT_NOISE = 0.15  # that the decoder learns to bear, as a share of the latents' standard deviation
NO_PROMPT = 0.1  # share of the pictures that the U-Net sees with the empty prompt
GUIDANCE_SCALE = 3.0  # with which the teacher is right most often
SAVED_EVERY = 400  # steps


@dataclass(frozen=True)
class Size:
    """How long the teacher is trained.

    Args:
        autoencoder_steps: steps of the autoencoder.
        pictures: number of pictures that are drawn and encoded for the U-Net.
        steps: steps of the U-Net and the text encoder.
        autoencoder_batch, batch: pictures in a step.
    """

    autoencoder_steps: int
    pictures: int
    steps: int
    autoencoder_batch: int = 32
    batch: int = 48


FULL = Size(600, 20_000, 2200)
QUICK = Size(200, 4_000, 150)


def make_teacher(
    folder: Path, seed: int = 0, say: Callable[[str], None] = print, size: Size = FULL
) -> StableDiffusionPipeline:
    """Train the teacher and save it. It is saved now and then in training as well.

    Args:
        folder: where the pipeline is saved.
        seed: determines every random number, and thus the weights (for one number of threads).
        say: receives lines on the progress.
        size: the length of the training: `FULL`, `QUICK`, or another.
    """
    vae = make_autoencoder(size, seed, say)
    named = drawn_prompts(size.pictures, seed)
    latents = encoded(vae, named, seed)
    torch.manual_seed(derive_seed("shapes teacher", seed))
    tokenizer = make_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae, make_text_encoder(tokenizer), tokenizer, make_unet(), make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for _ in train(pipeline, latents, named, size, seed, say):
        pipeline.save_pretrained(folder)
    return pipeline


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a token for each of `WORDS`; other words become letters or unknown tokens.

    Words are joined from their ends, where at most one pair of tokens is known, so that no other pair is joined first.
    """
    vocabulary, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1}, {}
    for word in WORDS:
        *letters, joined = [*word[:-1], f"{word[-1]}</w>"]
        vocabulary.setdefault(joined, len(vocabulary))
        for letter in reversed(letters):
            vocabulary.setdefault(letter, len(vocabulary))
            merges[letter, joined] = None  # a dict, because merges have an order and no duplicates
            joined = letter + joined
            vocabulary.setdefault(joined, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=CONTEXT)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder of two layers with random weights, for the tokens of `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """A U-Net of 2.5 M parameters with random weights. It reads the prompt where a position is a cell (2 x 2)."""
    return UNet2DConditionModel(
        sample_size=shapes.SIZE // 4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), block_out_channels=(32, 64, 96),
        layers_per_block=1, attention_head_dim=4, cross_attention_dim=WIDTH, norm_num_groups=16,
    )  # fmt: skip


def make_scheduler() -> DDIMScheduler:
    """The process of Stable Diffusion with v prediction. Sampling starts at its last step, for any number of steps."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


def make_autoencoder(size: Size = FULL, seed: int = 0, say: Callable[[str], None] = print) -> AutoencoderTiny:
    """Train an autoencoder from pictures to latents (4, 8, 8) whose `scaling_factor` gives them unit variance."""
    torch.manual_seed(derive_seed("shapes autoencoder", seed))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), num_encoder_blocks=(0, 1, 1), latent_channels=LATENT_CHANNELS,
        decoder_block_out_channels=(32, 32, 32), num_decoder_blocks=(1, 1, 0),
    )  # fmt: skip
    random, begin = np.random.default_rng(derive_seed("shapes autoencoder", seed)), time.perf_counter()
    prompts, optimiser = shapes.prompts(), Optimiser(vae, 2e-3, size.autoencoder_steps)
    for step in range(size.autoencoder_steps):
        named = [prompts[i] for i in random.integers(0, len(prompts), size.autoencoder_batch)]
        pictures = torch.from_numpy(np.stack([shapes.draw(prompt, random) for prompt in named]))
        latents = vae.encode(pictures).latents
        noise = LATENT_NOISE * latents.std().detach() * torch.randn_like(latents)
        error = F.mse_loss(vae.decode(latents + noise).sample, pictures)
        optimiser.step(error + 1e-3 * latents.square().mean())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            say(f"autoencoder: step {step + 1} of {size.autoencoder_steps}, error {error:.4f}, {seconds:.0f} s")
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae.requires_grad_(False).eval()


class Optimiser:
    """AdamW with a warm-up of 50 steps and a learning rate that falls linearly to 0; gradients have norm 1 at most.

    Args:
        module: what is trained.
        learning_rate: its peak.
        steps: number of steps.
    """

    def __init__(self, module: nn.Module, learning_rate: float, steps: int):
        self.parameters = list(module.parameters())
        self.adam = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
        )

    def step(self, loss: Tensor) -> None:
        """Take a step down the gradient of `loss` ()."""
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


def drawn_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` of the prompts for training, drawn with replacement."""
    prompts, random = shapes.prompts(), np.random.default_rng(derive_seed("shapes prompts", seed))
    return [prompts[i] for i in random.integers(0, len(prompts), count)]


@torch.no_grad()
def encoded(vae: AutoencoderTiny, prompts: Sequence[str], seed: int = 0, batch: int = 250) -> Tensor:
    """Latents (n, 4, 8, 8) of unit variance, of one picture for each of n `prompts`."""
    random, parts = np.random.default_rng(derive_seed("shapes pictures", seed)), []
    for start in range(0, len(prompts), batch):
        pictures = np.stack([shapes.draw(prompt, random) for prompt in prompts[start : start + batch]])
        parts.append(vae.encode(torch.from_numpy(pictures)).latents * vae.config.scaling_factor)
    return torch.cat(parts)


def train(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    prompts: Sequence[str],
    size: Size = FULL,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Iterator[float]:
    """Train the U-Net and the text encoder; yields the mean loss every `SAVED_EVERY` steps and at the end.

    At each yield the networks have averaged weights. Their half-life is 5 % of the pictures so far.

    Args:
        pipeline: its U-Net and text encoder are trained in place.
        latents: (n, 4, 8, 8), of unit variance.
        prompts: the n prompts of the latents.
        size: number of steps and batch size.
        seed: determines noise, times, order, and where the prompt is empty.
        say: receives a line every 100 steps.
    """
    generator = torch.Generator().manual_seed(derive_seed("shapes training", seed))
    tokens, empty = tokens_of(pipeline.tokenizer, prompts), tokens_of(pipeline.tokenizer, [""])
    networks = nn.ModuleList([pipeline.unet, pipeline.text_encoder]).train()
    optimiser, ema = Optimiser(networks, 1.5e-3, size.steps), EMA(networks, [HalfLife(10.0)])
    losses, begin = [], time.perf_counter()
    for step in range(size.steps):
        rows = torch.randint(len(latents), (size.batch,), generator=generator)
        dropped = torch.rand(size.batch, 1, generator=generator) < NO_PROMPT
        loss = v_loss(pipeline, latents[rows], torch.where(dropped, empty, tokens[rows]), generator)
        optimiser.step(loss)
        ema.update((step + 1) * size.batch, size.batch)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            say(f"U-Net: step {step + 1} of {size.steps}, loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s")
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == size.steps:
            current = {name: value.clone() for name, value in networks.state_dict().items()}
            networks.load_state_dict(next(iter(ema.shadows.values())))
            networks.eval()
            yield float(np.mean(losses[-100:]))
            if step + 1 < size.steps:
                networks.load_state_dict(current)
                networks.train()


def tokens_of(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (n, CONTEXT) of n prompts, padded as in the pipeline."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def v_loss(pipeline: StableDiffusionPipeline, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error () of v at times drawn one from each of B equal parts of the process.

    Args:
        pipeline: the pipeline whose U-Net, text encoder and scheduler are used.
        latents: clean latents (B, 4, 8, 8).
        tokens: ids of the prompts (B, CONTEXT).
        generator: draws times and noise.
    """
    scheduler, rows = pipeline.scheduler, len(latents)
    shares = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    times = (shares * scheduler.config.num_train_timesteps).long().clamp(max=scheduler.config.num_train_timesteps - 1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, times)
    text = pipeline.text_encoder(tokens).last_hidden_state
    found = pipeline.unet(noisy, times, text).sample
    return F.mse_loss(found, scheduler.get_velocity(latents, noise, times))


def held_out_prompts(count: int) -> list[str]:
    """The first `count` of the held-out prompts, in a mixed order that is always the same."""
    prompts = shapes.prompts(held_out=True)
    return [prompts[i] for i in permutation(len(prompts), "shapes held out")[:count].tolist()]


@torch.no_grad()
def judge_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 100,
) -> float:
    """Sample a picture for each prompt and return the share that shows it, in [0, 1].

    Args:
        pipeline: a text-to-image pipeline with any scheduler.
        prompts: the prompts.
        seed: seed of the noise, which depends on it and the prompt alone, also in a scheduler's own noise.
        num_inference_steps: steps of the scheduler.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        batch_size: prompts in a call of the pipeline.
    """
    return shapes.share_right(
        sampled(pipeline, prompts, seed, num_inference_steps, guidance_scale, batch_size), prompts
    )


def sampled(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 100,
) -> np.ndarray:
    """The pictures of `judge_prompts`, float32 (n, 3, 32, 32) in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        named = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(derive_seed("judge", seed, prompt)) for prompt in named]
        pictures = pipeline(
            named, generator=generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            output_type="np",
        ).images  # fmt: skip
        parts.append(2 * pictures.transpose(0, 3, 1, 2) - 1)
    return np.concatenate(parts)
