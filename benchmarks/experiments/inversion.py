"""Measure the loss on the way from images to noise and back, by the number of jumps back.

    python benchmarks/experiments/inversion.py --pretrained_model_name_or_path runs/mnist_ctm_small/pipeline \
        --dataset_name ylecun/mnist --split test

The ODE of the model's denoiser (Heun's method, --inverse_steps) takes images to the highest noise level. They return
by 1, 2, 4 ... deterministic jumps, or by the same ODE. The script prints root mean square distances from the original
images, with pixels in [-1, 1].
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.data.order import ProcessShare
from cm_diffusers.engine.pictures.curves import titled_row
from cm_diffusers.sampling import image_grid, load_pipeline


def measure(args: argparse.Namespace) -> tuple[dict, Image.Image]:
    """Distances by the number of jumps, the size of the noise (1 if as the model expects), and a picture."""
    pipeline = load_pipeline(args.pretrained_model_name_or_path).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    settings = DataArguments(args.dataset_name, split=args.split, resolution=list(pipeline.sample_shape[1:]))
    data = ImageData(settings, pipeline.num_classes is not None)
    batch = next(data.batches(ProcessShare(args.num_samples, 1, 0, 1), args.seed))
    images, labels = batch["images"].to(args.device).float() / 255, batch["condition"].get("class_labels")
    noise = pipeline.invert(images, labels, num_inference_steps=args.inverse_steps, solver="heun")
    ways = {f"{n} jump{'s' * (n > 1)}": {"num_inference_steps": n, "gamma": 0.0} for n in args.jumps}
    ways[f"ODE, {args.inverse_steps} steps"] = {"num_inference_steps": args.inverse_steps, "solver": "heun"}
    report, panels = {"noise": round(noise.square().mean().sqrt().item(), 4)}, {"images": images}
    for name, way in ways.items():
        panels[name] = pipeline(latents=noise, class_labels=labels, output_type="pt", **way).images.cpu()
        report[name] = round(2 * (panels[name] - images.cpu()).square().mean().sqrt().item(), 4)
    shown = {name: image_grid(part[:12].permute(0, 2, 3, 1).cpu().numpy(), 3) for name, part in panels.items()}
    return report, titled_row(list(shown.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a consistency trajectory model")
    add("--dataset_name", required=True, help="dataset of real images")
    add("--split", default="test", help="split of the dataset (default: test)")
    add("--num_samples", type=int, default=500, help="number of images (default: 500)")
    add("--jumps", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of jumps back (default: 1 2 4 8)")
    add("--inverse_steps", type=int, default=40, help="steps of Heun's method to the noise (default: 40)")
    add("--seed", type=int, default=0, help="determines the images (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if available")
    add("--picture", type=Path, help="file for a picture of some images before and after")
    args = parser.parse_args()
    report, picture = measure(args)
    print(json.dumps(report, indent=2))
    if args.picture:
        picture.save(args.picture)
