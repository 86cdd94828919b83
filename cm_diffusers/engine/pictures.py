"""Pictures for people: grids of images, curves of the loss."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def to_pil(image: np.ndarray) -> Image.Image:
    """A picture from an image (H, W, C) in [0, 1], C 1 or 3. Raises ValueError for other numbers of channels."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"An image of {image.shape[-1]} channels can't be shown.")
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_grid(images: Sequence[np.ndarray], columns: int, min_side: int = 32) -> Image.Image:
    """Images (N, H, W, C) in [0, 1], C 1 or 3, as one picture; small images are enlarged without smoothing."""
    pictures = [to_pil(image).convert("RGB") for image in images]
    scale = max(1, -(-min_side // min(pictures[0].size)))
    width, height = (side * scale for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * (width + 2), -(-len(pictures) // columns) * (height + 2)), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (column * (width + 2), row * (height + 2)))
    return sheet


def titled_row(panels: Sequence[tuple[str, Image.Image]], gap: int = 12, title_height: int = 18) -> Image.Image:
    """Pictures side by side, each under its title."""
    width = sum(picture.width + gap for _, picture in panels) + gap
    height = max(picture.height for _, picture in panels) + title_height + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for title, picture in panels:
        draw.text((x, 3), title, fill="black")
        sheet.paste(picture, (x, title_height))
        x += picture.width + gap
    return sheet


COMMON = {"step", "loss", "loss_by_sigma", "grad_norm", "lr", "skipped", "time"}  # columns of every method's log


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the loss of a run's log, as a whole and by noise level, and below what else the method logs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in everything if row["loss"] is not None]
    if not rows:
        return
    others = sorted({name for row in everything for name in row.keys() - COMMON})
    figure = Figure(figsize=(8, 8 if others else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(2 if others else 1, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], "k", linewidth=2, label="all")
    for name in sorted({name for row in rows for name in row["loss_by_sigma"]}, key=lambda n: float(n.split("-")[0])):
        axes.plot(steps, [row["loss_by_sigma"].get(name, float("nan")) for row in rows], label=f"sigma {name}")
    axes.set(
        xlabel="step", ylabel="loss", yscale="log", title="Loss by noise level (flat curves are normal: see README)"
    )
    axes.legend(fontsize="small", ncols=2)
    for axis in below:
        for name in others:
            places = [(row["step"], row[name]) for row in everything if name in row]
            axis.plot(*zip(*places), label=name)
        axis.set(xlabel="step", yscale="symlog")
        axis.legend(fontsize="small", ncols=2)
    figure.savefig(picture, dpi=110)
