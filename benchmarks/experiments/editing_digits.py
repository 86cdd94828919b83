"""Edit handwritten digits with a model, draw the results, and count how many keep their class.

    make quickstart
    python benchmarks/experiments/editing_digits.py runs/quickstart/pipeline --picture hub_cards/images/editing.png

Each row of the picture shows the known part of a digit, six edited images, and the digit itself. A support-vector
machine, trained on the digits, classifies the edits of 500 digits. The model is conditioned on the true class. The
edited digits are among the training data of the model and of the support-vector machine.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from cm_diffusers.sampling import image_grid, load_pipeline


COLUMNS, COUNT, NOISE = 6, 500, 0.8


def edits(pipe, images: torch.Tensor, seed: int) -> dict:
    """For each edit by name: the known part of images (n, 1, 8, 8), and a function that makes the edited images."""
    half = torch.zeros(8, 8)
    half[:, 4:] = 1
    inner, coarse = images[..., 1:7, 1:7], F.avg_pool2d(images, 2)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    noisy = images + NOISE / 2 * noise
    strokes = (images > 0.5).float()
    return {
        "the right half": (torch.where(half > 0, 0.5, images), lambda **c: pipe.inpaint(images, half, **c)),
        "the frame": (F.pad(inner, (1, 1, 1, 1), value=0.5), lambda **c: pipe.outpaint(inner, **c)),
        "4 x 4 to 8 x 8": (F.interpolate(coarse, 8), lambda **c: pipe.super_resolve(coarse, **c)),
        f"noise of {NOISE}": (noisy.clamp(0, 1), lambda **c: pipe.denoise(noisy, NOISE, **c)),
        "strokes": (strokes, lambda **c: pipe(image=strokes, noise_level=1.5, num_inference_steps=2, **c)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model trained on the digits")
    parser.add_argument("--picture", type=Path, default=Path("runs/editing.png"), help="default: runs/editing.png")
    parser.add_argument("--seed", type=int, default=0, help="seed of digits and noise (default: 0)")
    args = parser.parse_args()

    digits = load_digits()
    judge = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    chosen = np.random.default_rng(args.seed).permutation(len(digits.target))[:COUNT]
    images = torch.from_numpy(digits.images[chosen] / 16).float()[:, None]
    labels = digits.target[chosen].tolist()
    rows, names = [], []
    for k, (name, (known, edit)) in enumerate(edits(pipe, images, args.seed).items()):
        made = edit(class_labels=labels, generator=args.seed, output_type="np").images
        found = judge.predict(made.reshape(len(made), -1) * 16)
        print(f"{name}: {(found == labels).mean():.3f} of the images have the requested class", flush=True)
        one = edits(pipe, images[k : k + 1].expand(COLUMNS, -1, -1, -1), args.seed)[name]
        shown = one[1](class_labels=[labels[k]] * COLUMNS, generator=args.seed + 1, output_type="np").images
        rows += [known[k].numpy().transpose(1, 2, 0), *shown, images[k].numpy().transpose(1, 2, 0)]
        names.append(name)
    grid = image_grid(rows, COLUMNS + 2, 64)
    sheet = Image.new("RGB", (grid.width + 110, grid.height + 16), "white")
    sheet.paste(grid, (110, 16))
    draw, side = ImageDraw.Draw(sheet), grid.height // len(names)
    for i, name in enumerate(names):
        draw.text((4, 16 + side * i + side // 2 - 5), name, fill="black")
    for x, text in ((110, "known"), (110 + side, "edited"), (110 + side * (COLUMNS + 1), "the digit")):
        draw.text((x + 4, 2), text, fill="black")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.picture)
    print(f"Saved {args.picture}.")
