"""A diffusion model of images as users of diffusers have it: its schedulers, its pipelines, none of our training.

    python benchmarks/stock_teacher.py --kind v_prediction --dataset_name ylecun/mnist --output_dir runs/teacher_v

Kinds: epsilon and v_prediction on a cosine VP schedule, flow (flow matching), latent (epsilon in the latents of an
AutoencoderKL) and dit (a transformer in such latents). Class-conditional. Leaves a pipeline of diffusers, which
--pretrained_teacher_model and --pretrained_model_name_or_path take.
"""

import argparse
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
from cm_diffusers.engine.data import ImageData, Spot
from cm_diffusers.models import build_unet


KINDS = ("epsilon", "v_prediction", "flow", "latent", "dit")
LATENT_CHANNELS = 4


def optimise(
    parameters, loss: Callable[[int], Tensor], seconds: float, learning_rate: float, after=lambda: None
) -> int:
    """Adam for `seconds`, with a cosine to 0 over them; gives the number of steps."""
    optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1, (step + 1) / 100) * (1 + torch.tensor(share * torch.pi).cos()).item() / 2
            )
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()
        step += 1
        if step % 200 == 0:
            print(f"step {step}: loss {value.item():.4f}", flush=True)
    return step


def train_autoencoder(images: Callable[[int], tuple[Tensor, Tensor]], channels: int, seconds: float) -> AutoencoderKL:
    """An autoencoder that halves the sides once; its scaling factor brings latents to unit variance."""
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

    def loss(step: int) -> Tensor:
        x, _ = images(step)
        posterior = vae.encode(x).latent_dist
        return (vae.decode(posterior.sample()).sample - x).abs().mean() + 1e-4 * posterior.kl().mean() / x[0].numel()

    optimise(vae.parameters(), loss, seconds, 2e-3)
    vae.eval().requires_grad_(False)
    latents = vae.encode(torch.cat([images(step)[0] for step in range(20)])).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def train_teacher(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    data = ImageData(
        DataArguments(dataset_name=args.dataset_name, resolution=[args.resolution]), class_conditional=True
    )
    batches = data.batches(Spot(args.batch_size), args.seed)

    def images(step: int) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return batch["images"].float() / 127.5 - 1, batch["labels"]

    vae, channels, side = None, data.channels, args.resolution
    if args.kind in ("latent", "dit"):
        vae = train_autoencoder(images, data.channels, 60 * args.autoencoder_minutes)
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
        kind = "v_prediction" if args.kind == "v_prediction" else "epsilon"
        scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=vae is None)
    average = EMAModel(network.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)

    def loss(step: int) -> Tensor:
        x, labels = images(step)
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
            target = noise if args.kind != "v_prediction" else scheduler.get_velocity(x, noise, time_input)
        return (network(noisy, time_input, class_labels=labels).sample - target).square().mean()

    steps = optimise(network.parameters(), loss, 60 * args.minutes, 1e-3, lambda: average.step(network.parameters()))
    average.copy_to(network.parameters())
    if args.kind == "dit":
        pipeline = DiTPipeline(network, vae, scheduler, {str(i): str(i) for i in range(data.num_classes)})
    else:
        pipeline = DDPMPipeline(network, scheduler) if vae is None else LDMPipeline(vae, network, scheduler)
    pipeline.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir}: {steps} steps of {args.batch_size} images in {args.minutes:g} minutes.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", choices=KINDS, required=True, help="what the network predicts, and where")
    add("--dataset_name", required=True, help="as of the training scripts")
    add("--resolution", type=int, default=16, help="side of the images (16)")
    add("--minutes", type=float, default=4, help="training time (4)")
    add("--autoencoder_minutes", type=float, default=2, help="training time of the autoencoder before that (2)")
    add("--batch_size", type=int, default=32, help="images per step (32)")
    add("--seed", type=int, default=0, help="of weights, order and noise (0)")
    add("--output_dir", type=Path, required=True, help="folder of the pipeline")
    train_teacher(parser.parse_args())


if __name__ == "__main__":
    main()
