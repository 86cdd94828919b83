"""Train a diffusion model with diffusers' schedulers and pipelines alone, without our training code.

    python benchmarks/experiments/stock_teacher.py --kind v_prediction --dataset_name ylecun/mnist \\
        --output_dir runs/teacher_v

| kind | model |
|---|---|
| epsilon, v_prediction | pixels, on a cosine VP schedule |
| flow | pixels, by flow matching |
| latent | v-prediction in the latents of an AutoencoderKL |
| dit | the same with a transformer |

All models are class-conditional. The script saves a diffusers pipeline for --pretrained_teacher_model and
--pretrained_model_name_or_path.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.models import build_unet


KINDS = ("epsilon", "v_prediction", "flow", "latent", "dit")
LATENT_CHANNELS = 4


def optimise(parameters, loss: Callable[[], Tensor], steps: int, learning_rate: float, after=lambda: None) -> None:
    """Minimise `loss` with Adam; the learning rate has a short warm-up and a cosine decay to 0."""
    optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {value.item():.4f}", flush=True)


def train_autoencoder(images: Callable[[], tuple[Tensor, Tensor]], channels: int, steps: int) -> AutoencoderKL:
    """Train an autoencoder that halves the sides once; its scaling factor brings latents to unit variance."""
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )

    def loss() -> Tensor:
        x, _ = images()
        posterior = vae.encode(x).latent_dist
        return (vae.decode(posterior.sample()).sample - x).abs().mean() + 1e-4 * posterior.kl().mean() / x[0].numel()

    optimise(vae.parameters(), loss, steps, 2e-3)
    vae.eval().requires_grad_(False)
    latents = vae.encode(torch.cat([images()[0] for _ in range(20)])).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def train_teacher(args: argparse.Namespace) -> None:
    """Train the model and save its pipeline."""
    torch.manual_seed(args.seed)
    data = ImageData(
        DataArguments(dataset_name=args.dataset_name, resolution=[args.resolution]), class_conditional=True
    )
    batches = data.batches(ProcessShare(args.batch_size), args.seed)

    def images() -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return batch["images"].float() / 127.5 - 1, batch["condition"]["class_labels"]

    vae, channels, side = None, data.channels, args.resolution
    if args.kind in ("latent", "dit"):
        vae = train_autoencoder(images, data.channels, args.autoencoder_steps)
        channels, side = LATENT_CHANNELS, args.resolution // 2
    if args.kind == "dit":
        shape = {"num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 6, "patch_size": 1}
        network = DiTTransformer2DModel(
            **shape,
            in_channels=channels,
            out_channels=channels,
            sample_size=side,
            num_embeds_ada_norm=data.num_classes,
        )
    else:
        network = build_unet("small", (side, side), channels, data.num_classes)
    if args.kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler()
    else:
        kind = "epsilon" if args.kind == "epsilon" else "v_prediction"
        scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=vae is None)
    average = EMAModel(network.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)

    def loss() -> Tensor:
        x, labels = images()
        if vae is not None:
            x = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(x)
        if args.kind == "flow":
            t = torch.randn(len(x)).sigmoid()
            flow = t.reshape(-1, 1, 1, 1)
            noisy, target, time_input = (1 - flow) * x + flow * noise, noise - x, 1000 * t
        else:
            time_input = torch.randint(1000, (len(x),))
            noisy = scheduler.add_noise(x, noise, time_input)
            target = noise if args.kind == "epsilon" else scheduler.get_velocity(x, noise, time_input)
        return (network(noisy, time_input, class_labels=labels).sample - target).square().mean()

    start = time.monotonic()
    optimise(network.parameters(), loss, args.max_train_steps, 1e-3, lambda: average.step(network.parameters()))
    average.copy_to(network.parameters())
    if args.kind == "dit":
        pipeline = DiTPipeline(network, vae, scheduler, {str(i): str(i) for i in range(data.num_classes)})
    else:
        pipeline = DDPMPipeline(network, scheduler) if vae is None else LDMPipeline(vae, network, scheduler)
    pipeline.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir} after {time.monotonic() - start:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", choices=KINDS, required=True, help="prediction and space of the network")
    add("--dataset_name", required=True, help="dataset, as in the training scripts")
    add("--resolution", type=int, default=16, help="side of the images (default: 16)")
    add("--max_train_steps", type=int, default=1450, help="default: 1450, for MNIST at 16x16 4 minutes on two cores")
    add("--autoencoder_steps", type=int, default=1500, help="steps of the autoencoder before that (default: 1500)")
    add("--batch_size", type=int, default=32, help="images per step (default: 32)")
    add("--seed", type=int, default=0, help="seed of weights, order and noise (default: 0)")
    add("--output_dir", type=Path, required=True, help="folder for the pipeline")
    train_teacher(parser.parse_args())


if __name__ == "__main__":
    main()
