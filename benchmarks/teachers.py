"""Train diffusion models with diffusers alone, as its own examples do, to be distilled: stock pipelines on MNIST.

    python benchmarks/teachers.py --kind epsilon --minutes 4 --output_dir runs/epsilon
    python training/train_consistency.py --method cd --pretrained_teacher_model runs/epsilon --weighting snr \\
        --dataset_name ylecun/mnist --resolution 16 --class_conditional --output_dir runs/cd_from_epsilon

Kinds: networks that predict noise, v, a flow, or EDM's F; a U-Net and a DiT that predict v of the latents of an
autoencoder, which gets a quarter of the time.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    SchedulerMixin,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data import ImageData
from cm_diffusers.engine.latents import encode
from cm_diffusers.models import build_unet


SCHEDULERS = {
    "epsilon": lambda sigma_data: DDPMScheduler(),
    "v": lambda sigma_data: DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "flow": lambda sigma_data: FlowMatchEulerDiscreteScheduler(),
    "edm": lambda sigma_data: EDMEulerScheduler(sigma_data=sigma_data),
    "latent": lambda sigma_data: DDIMScheduler(prediction_type="v_prediction"),
    "dit": lambda sigma_data: DDIMScheduler(prediction_type="v_prediction"),
}
BATCH = 128


def question(scheduler: SchedulerMixin, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network is given, at what time, and what it should say."""
    noise = torch.randn_like(x0)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        t = torch.randn(len(x0)).sigmoid()
        share = t.reshape(-1, 1, 1, 1)
        return (1 - share) * x0 + share * noise, 1000 * t, noise - x0
    if isinstance(scheduler, EDMEulerScheduler):
        sigma = (-1.2 + 1.2 * torch.randn(len(x0), 1, 1, 1)).exp()
        x, variance = x0 + sigma * noise, scheduler.config.sigma_data**2
        norm = (sigma**2 + variance).sqrt()
        target = (x0 - variance / norm**2 * x) * norm / (sigma * variance**0.5)
        return x / norm, scheduler.precondition_noise(sigma.flatten()), target
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),))
    target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
    return scheduler.add_noise(x0, noise, t), t, target


def fit(network: nn.Module, minutes: float, loss: Callable[[], Tensor]) -> None:
    """Minimise `loss` for that long; leaves an average of the weights in the network."""
    optimizer, average = torch.optim.AdamW(network.parameters(), lr=1e-3), EMAModel(network.parameters(), decay=0.998)
    network.train()
    end, step = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        average.step(network.parameters())
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {value.item():.4f}", flush=True)
    average.copy_to(network.parameters())
    network.eval()


def train_autoencoder(pixels: Tensor, minutes: float) -> AutoencoderKL:
    """Images of 16 x 16 as latents of 4 x 8 x 8, scaled to unit size."""
    vae = AutoencoderKL(
        pixels.shape[1],
        pixels.shape[1],
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
    )

    def loss() -> Tensor:
        x = pixels[torch.randint(len(pixels), (BATCH,))]
        posterior = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-6 * posterior.kl().mean()

    fit(vae, minutes, loss)
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae, pixels[:1000]).std().item())
    return vae


def train(args: argparse.Namespace) -> None:
    data = ImageData(DataArguments(dataset_name=args.dataset_name, resolution=[args.resolution]), True)
    x0, classes, minutes = data.images.float() / 127.5 - 1, data.num_classes, args.minutes
    vae = None
    if args.kind in ("latent", "dit"):
        vae = train_autoencoder(x0, minutes / 4)
        x0, minutes = torch.cat([encode(vae, part) for part in x0.split(500)]), minutes * 3 / 4
    scheduler = SCHEDULERS[args.kind](round(x0.square().mean().sqrt().item(), 4))
    channels, size = x0.shape[1], x0.shape[-1]
    if args.kind == "dit":
        shape = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "patch_size": 2}
        network = DiTTransformer2DModel(in_channels=channels, sample_size=size, num_embeds_ada_norm=classes, **shape)
    else:
        network = build_unet(args.preset, (size, size), channels, classes)

    def loss() -> Tensor:
        rows = torch.randint(len(x0), (BATCH,))
        x, t, target = question(scheduler, x0[rows])
        return F.mse_loss(network(x, t, class_labels=data.labels[rows]).sample, target)

    fit(network, minutes, loss)
    if args.kind == "dit":
        pipeline = DiTPipeline(network, vae, scheduler)
    else:
        pipeline = DDPMPipeline(network, scheduler) if vae is None else LDMPipeline(vae, network, scheduler)
    pipeline.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(SCHEDULERS), required=True)
    parser.add_argument("--minutes", type=float, default=4, help="of training (4)")
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="a dataset with labels, or a folder of one")
    parser.add_argument("--resolution", type=int, default=16, help="side of the images (16)")
    parser.add_argument("--preset", default="small", help="size of the U-Net (small)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    train(arguments)
