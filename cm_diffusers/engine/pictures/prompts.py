"""Pictures of prompts: one row for each prompt, one column for each way of sampling it."""

import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.pictures.curves import titled_row
from cm_diffusers.sampling import image_grid


WIDTH = 180  # of the column of prompts, in pixels
LINE = 13  # height of a line of text, in pixels
SMALLEST, LARGEST = 96, 320  # sides of a drawn image, in pixels


def save_prompt_grid(path: Path, prompts: Sequence[str], columns: Sequence[tuple[str, np.ndarray]]) -> None:
    """Draw images of prompts: the prompts in the first column, then the columns of images with their titles.

    Args:
        path: the image file to write; its folder is made if missing.
        prompts: B prompts, one for each row.
        columns: titles with images (B, H, W, 3) in [0, 1]. Large images are reduced.
    """
    grids = [(title, _reduced(image_grid(list(images), 1, min_side=SMALLEST))) for title, images in columns]
    texts = Image.new("RGB", (WIDTH, grids[0][1].height), "white")
    for i, prompt in enumerate(prompts):
        _write(texts, prompt, top=i * texts.height // len(prompts), height=texts.height // len(prompts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        titled_row([("", texts), *grids]).save(aside)


def _reduced(column: Image.Image) -> Image.Image:
    """A column of images, at most `LARGEST` pixels wide."""
    share = min(1.0, LARGEST / column.width)
    return column if share == 1 else column.resize((LARGEST, round(share * column.height)), Image.Resampling.LANCZOS)


def _write(picture: Image.Image, prompt: str, top: int, height: int) -> None:
    """Write a prompt on the `height` pixels of a picture below `top`, in lines, and cut it where they end."""
    font, draw = ImageFont.load_default(), ImageDraw.Draw(picture)
    letters = unicodedata.normalize("NFKD", " ".join(prompt.split()))  # the default font has no accents
    text = "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()
    width = int(WIDTH // font.getlength("n"))
    lines = textwrap.wrap(text, width, max_lines=max(1, height // LINE), placeholder=" ...")
    for number, line in enumerate(lines):
        draw.text((0, top + number * LINE), line, fill="black", font=font)
