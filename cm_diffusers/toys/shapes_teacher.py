"""A small Stable Diffusion of the world of shapes: text to pictures of 32 x 32 pixels, trained on the CPU in minutes.

It is a stock `StableDiffusionPipeline`, for which few-step students can be made. Its parts are trained one after the
other, as those of Stable Diffusion were:

1. an autoencoder without norms (`AutoencoderTiny`, as in TAESD);
2. a CLIP text encoder whose tokens are words: from its embeddings a small head predicts the mean latents of a prompt;
3. a U-Net with cross-attention, which predicts v (Salimans & Ho 2022, arXiv:2202.00512) from noisy latents. Some of
   its prompts are empty, for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

The second part saves most of the time: what is where in a prompt is learned far faster without noise.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cm_diffusers.core.draws import derive_seed, permutation
from cm_diffusers.core.ema import EMA, HalfLife
from cm_diffusers.toys import shapes


WORDS = ("a", "two", *shapes.COLOURS, *shapes.SHAPES, *(f"{shape}s" for shape in shapes.SHAPES))
WORDS += ("above", "below", "left", "right", "of")
CONTEXT = 12  # tokens; the longest prompt has 10 with those of the start and the end, the others see all words
WIDTH = 96  # of the text encoder
LATENT_CHANNELS = 4
SIDE = shapes.CELL // 4  # of a cell in latents
LATENT_NOISE = 0.15  # that the decoder learns to bear, as a share of the latents' standard deviation
NO_PROMPT = 0.1  # share of the pictures that the U-Net sees with the empty prompt
GUIDANCE_SCALE = 3.0  # of the teacher; with 2 and 4 it is right as often
SAVED_EVERY = 400  # steps


@dataclass(frozen=True)
class Size:
    """How long the teacher is trained.

    Args:
        autoencoder_steps, text_steps, steps: steps of the autoencoder, the text encoder and the U-Net.
        pictures: number of pictures that are drawn and encoded for the text encoder and the U-Net.
        autoencoder_batch, text_batch, batch: pictures in a step of each.
    """

    autoencoder_steps: int
    text_steps: int
    steps: int
    pictures: int
    autoencoder_batch: int = 32
    text_batch: int = 128
    batch: int = 128


FULL = Size(600, 300, 1000, pictures=20_000)
QUICK = Size(150, 100, 80, pictures=3_000)


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
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer, latents, named, size, seed, say)
    torch.manual_seed(derive_seed("shapes U-Net", seed))
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, make_unet(), make_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    for _ in train_unet(pipeline, latents, named, size, seed, say):
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


def make_text_encoder(
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    prompts: Sequence[str],
    size: Size = FULL,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> CLIPTextModel:
    """Train a text encoder of three layers, from whose embeddings a head predicts the mean latents of a prompt.

    Args:
        tokenizer: tokenizer of the prompts.
        latents: (n, 4, 8, 8), of unit variance.
        prompts: the n prompts of the latents.
        size: number of steps and batch size.
        seed: determines the initial weights and the order.
        say: receives a line every 100 steps.
    """
    torch.manual_seed(derive_seed("shapes text encoder", seed))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder, head, tokens = CLIPTextModel(config), MeanLatents(), tokens_of(tokenizer, prompts)
    optimiser, begin = Optimiser(nn.ModuleList([encoder, head]), 2e-3, size.text_steps), time.perf_counter()
    for step in range(size.text_steps):
        rows = torch.randint(len(latents), (size.text_batch,))
        error = F.mse_loss(head(encoder(tokens[rows]).last_hidden_state), latents[rows])
        optimiser.step(error)
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            say(f"text encoder: step {step + 1} of {size.text_steps}, error {error:.4f}, {seconds:.0f} s")
    return encoder.requires_grad_(False).eval()


class MeanLatents(nn.Module):
    """A head that reads embeddings of a prompt by attention, once for each cell, and predicts latents."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(4, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        hidden, values = 2 * WIDTH, LATENT_CHANNELS * SIDE**2
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, values))

    def forward(self, text: Tensor) -> Tensor:
        """Latents (B, 4, 8, 8) from embeddings `text` (B, n, d)."""
        cells = self.cells.expand(len(text), -1, -1)
        found = self.out(cells + self.attention(cells, text, text, need_weights=False)[0])
        return F.fold(found.transpose(1, 2), (2 * SIDE, 2 * SIDE), SIDE, stride=SIDE)


def make_unet() -> UNet2DConditionModel:
    """A U-Net of 2.5 M parameters with random weights. It reads the prompt where a position is a cell (2 x 2)."""
    return UNet2DConditionModel(
        sample_size=2 * SIDE, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
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
    """Train an autoencoder from pictures to latents (4, 8, 8) whose `scaling_factor` gives them unit variance.

    Args:
        size: number of steps and batch size.
        seed: determines the initial weights, the pictures and the noise.
        say: receives a line every 100 steps.
    """
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
    """`count` of the prompts for training, drawn with replacement by `seed`."""
    prompts, random = shapes.prompts(), np.random.default_rng(derive_seed("shapes prompts", seed))
    return [prompts[i] for i in random.integers(0, len(prompts), count)]


def write_pictures(file: Path, count: int, wanted: Callable[[str], str] = str) -> None:
    """Write pictures of drawn prompts, with the prompts as captions, as a parquet file.

    Args:
        file: the file to write.
        count: number of pictures.
        wanted: maps a caption to the prompt that is drawn for it.
    """
    prompts, random = drawn_prompts(count), np.random.default_rng(1)
    pixels = [((shapes.draw(wanted(prompt), random) + 1) * 127.5).round().astype(np.uint8) for prompt in prompts]
    images = [PIL.Image.fromarray(picture.transpose(1, 2, 0)) for picture in pixels]
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict({"image": images, "text": prompts}, features=features).to_parquet(file)


@torch.no_grad()
def encoded(vae: AutoencoderTiny, prompts: Sequence[str], seed: int = 0, batch: int = 250) -> Tensor:
    """Latents (n, 4, 8, 8) of unit variance, of one picture for each of n prompts.

    Args:
        vae: the autoencoder.
        prompts: n prompts.
        seed: determines the pictures.
        batch: pictures that are encoded at once.
    """
    random, parts = np.random.default_rng(derive_seed("shapes pictures", seed)), []
    for start in range(0, len(prompts), batch):
        pictures = np.stack([shapes.draw(prompt, random) for prompt in prompts[start : start + batch]])
        parts.append(vae.encode(torch.from_numpy(pictures)).latents * vae.config.scaling_factor)
    return torch.cat(parts)


def train_unet(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    prompts: Sequence[str],
    size: Size = FULL,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Iterator[float]:
    """Train the U-Net; yields the mean of the last 100 losses every `SAVED_EVERY` steps and at the end.

    At each yield the U-Net has averaged weights. Their half-life is 5 % of the pictures so far.

    Args:
        pipeline: its U-Net is trained in place.
        latents: (n, 4, 8, 8), of unit variance.
        prompts: the n prompts of the latents.
        size: number of steps and batch size.
        seed: determines noise, times, order, and where the prompt is empty.
        say: receives a line every 100 steps.
    """
    generator, unet = torch.Generator().manual_seed(derive_seed("shapes training", seed)), pipeline.unet.train()
    text, rows_of = embedded(pipeline, prompts)
    optimiser, ema = Optimiser(unet, 1.5e-3, size.steps), EMA(unet, [HalfLife(10.0)])
    losses, begin = [], time.perf_counter()
    for step in range(1, size.steps + 1):
        rows = torch.randint(len(latents), (size.batch,), generator=generator)
        shown = torch.where(torch.rand(size.batch, generator=generator) < NO_PROMPT, 0, rows_of[rows])
        loss = v_loss(unet, pipeline.scheduler, latents[rows], text[shown], generator)
        optimiser.step(loss)
        ema.update(step * size.batch, size.batch)
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = time.perf_counter() - begin
            say(f"U-Net: step {step} of {size.steps}, loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s")
        if step % SAVED_EVERY == 0 or step == size.steps:
            current = {name: value.clone() for name, value in unet.state_dict().items()}
            unet.load_state_dict(next(iter(ema.shadows.values())))
            unet.eval()
            yield float(np.mean(losses[-100:]))
            if step < size.steps:
                unet.load_state_dict(current)
                unet.train()


@torch.no_grad()
def embedded(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (m, CONTEXT, d) of the empty prompt and the different `prompts`, and the row of each prompt (n,).

    Args:
        pipeline: its tokenizer and text encoder are used.
        prompts: n prompts.
    """
    known = {prompt: row for row, prompt in enumerate(["", *dict.fromkeys(prompts)])}
    text = pipeline.text_encoder(tokens_of(pipeline.tokenizer, list(known))).last_hidden_state
    return text, torch.tensor([known[prompt] for prompt in prompts])


def tokens_of(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (n, CONTEXT) of n `prompts` by `tokenizer`, padded as in the pipeline."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def v_loss(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, latents: Tensor, text: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error () of v at times drawn one from each of B equal parts of the process.

    Args:
        unet: the network.
        scheduler: the process.
        latents: clean latents (B, 4, 8, 8).
        text: embeddings of the prompts (B, n, d).
        generator: draws times and noise.
    """
    count, last = len(latents), scheduler.config.num_train_timesteps - 1
    times = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    times = (last * times).round().long()
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, times)
    return F.mse_loss(unet(noisy, times, text).sample, scheduler.get_velocity(latents, noise, times))


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
    """The pictures of `judge_prompts`, float32 (n, 3, 32, 32) in [-1, 1].

    Args:
        pipeline: a text-to-image pipeline with any scheduler.
        prompts: n prompts.
        seed: seed of the noise, with the prompt.
        num_inference_steps: steps of the scheduler.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        batch_size: prompts in a call of the pipeline.
    """
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
