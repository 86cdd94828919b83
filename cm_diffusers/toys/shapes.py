"""A small world for text-to-image models: coloured shapes, drawn from a prompt, and a judge that reads pictures.

A picture has four cells, two by two, each empty or with one shape. A prompt names one group of shapes ("two red
circles") or two groups and their places ("a green square above two blue triangles"). The judge finds the shape and
the colour in each cell by comparing it with drawings, and decides whether the picture shows the scene of the prompt.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


SIZE = 32  # side of a picture, in pixels
CELL = SIZE // 2
RADIUS = 5.0  # of a shape, in pixels
SHIFT = 2  # the centre of a shape lies at most this far from the centre of its cell, in pixels along each axis
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
PLACES = {  # the cells of the first group and of the second one
    "above": ((0, 1), (2, 3)),
    "below": ((2, 3), (0, 1)),
    "left of": ((0, 2), (1, 3)),
    "right of": ((1, 3), (0, 2)),
}
HELD_OUT = 0.2  # share of the prompts of two groups that training never shows
_GROUP = rf"(a|two) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s?)"


@dataclass(frozen=True)
class Group:
    """Shapes of one kind.

    Args:
        count: 1 or 2.
        colour: a key of `COLOURS`.
        shape: one of `SHAPES`.
    """

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{'a' if self.count == 1 else 'two'} {self.colour} {self.shape}{'s' * (self.count - 1)}"


@dataclass(frozen=True)
class Scene:
    """What a prompt names: one group anywhere, or two groups in the places of `PLACES`."""

    groups: tuple[Group, ...]
    place: str | None = None

    def __str__(self) -> str:
        return f" {self.place} ".join(map(str, self.groups))

    @classmethod
    def read(cls, prompt: str) -> "Scene":
        """The scene of `prompt`.

        Raises:
            ValueError: the prompt does not name a scene of this world.
        """
        found = re.fullmatch(rf"{_GROUP}(?: ({'|'.join(PLACES)}) {_GROUP})?", prompt)
        if found:
            parts = found.groups()
            named = [part[:3] for part in (parts[:4], parts[5:]) if part[0]]
            groups = [Group(1 if article == "a" else 2, colour, shape) for article, colour, shape in named]
            scene = cls(tuple(groups), parts[4])
            if str(scene) == prompt:
                return scene
        raise ValueError(f"{prompt!r} names no scene; a scene is, for example, 'two red circles above a blue square'.")


def prompts(held_out: bool = False) -> list[str]:
    """All prompts for training, or with `held_out` those of two groups that training never shows, in a fixed order."""
    groups = [Group(*parts) for parts in itertools.product((1, 2), COLOURS, SHAPES)]
    pairs = [str(Scene((a, b), place)) for a, b in itertools.product(groups, groups) for place in PLACES]
    kept = [prompt for prompt in pairs if (_share(prompt) < HELD_OUT) == held_out]
    return kept if held_out else [*(str(Scene((group,))) for group in groups), *kept]


def _share(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") / 2**32


@cache
def _coverage(shape: str, down: float, right: float) -> np.ndarray:
    """How much of each pixel of a cell a shape covers, (CELL, CELL) in [0, 1], by 4 x 4 points in each pixel."""
    points = (np.arange(4 * CELL) + 0.5) / 4 - CELL / 2
    y, x = points[:, None] - down, points[None, :] - right
    if shape == "circle":
        inside = x**2 + y**2 <= RADIUS**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.85 * RADIUS
    else:
        inside = (y <= 0.8 * RADIUS) & (y >= -RADIUS + 2 * abs(x) * 0.9)
    return inside.reshape(CELL, 4, CELL, 4).mean((1, 3)).astype(np.float32)


def draw(prompt: str, random: np.random.Generator) -> np.ndarray:
    """A picture of `prompt`, float32 (3, 32, 32) in [-1, 1], on black. `random` chooses cells and shifts."""
    scene, picture = Scene.read(prompt), np.full((3, SIZE, SIZE), -1.0, np.float32)
    for i, group in enumerate(scene.groups):
        cells = PLACES[scene.place][i] if scene.place else range(4)
        for cell in random.choice(cells, group.count, replace=False):
            covered = _coverage(group.shape, *random.integers(-SHIFT, SHIFT + 1, 2).tolist())
            colour = np.array(COLOURS[group.colour], np.float32)[:, None, None]
            _cell(picture, cell)[:] = covered * colour - (1 - covered)
    return picture


def _cell(picture: np.ndarray, cell: int) -> np.ndarray:
    """The view of a cell, (3, CELL, CELL); cells count along rows."""
    row, column = divmod(int(cell), 2)
    return picture[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


@cache
def _drawings() -> tuple[list[tuple[str, str] | None], np.ndarray]:
    """The contents that a cell can have, and their drawings (n, 3 CELL^2)."""
    contents: list[tuple[str, str] | None] = [None]
    pictures = [np.full((3, CELL, CELL), -1.0, np.float32)]
    shifts = range(-SHIFT, SHIFT + 1)
    for colour, shape, down, right in itertools.product(COLOURS, SHAPES, shifts, shifts):
        covered = _coverage(shape, down, right)
        contents.append((colour, shape))
        pictures.append(covered * np.array(COLOURS[colour], np.float32)[:, None, None] - (1 - covered))
    return contents, np.stack(pictures).reshape(len(pictures), -1)


def seen(picture: np.ndarray) -> list[tuple[str, str] | None]:
    """The colour and the shape in each of the four cells, or None for an empty cell.

    Args:
        picture: (3, 32, 32) in [-1, 1].
    """
    contents, drawings = _drawings()
    cells = np.stack([_cell(picture, cell).reshape(-1) for cell in range(4)])
    squares = (drawings**2).sum(1) - 2 * cells @ drawings.T
    return [contents[i] for i in squares.argmin(1)]


def shows(picture: np.ndarray, prompt: str) -> bool:
    """Whether `picture` (3, 32, 32) in [-1, 1] shows the shapes, colours, counts and places of `prompt`."""
    scene, found = Scene.read(prompt), seen(picture)
    for i, group in enumerate(scene.groups):
        cells = PLACES[scene.place][i] if scene.place else range(4)
        if [found[cell] for cell in cells if found[cell]] != [(group.colour, group.shape)] * group.count:
            return False
    return True


def share_right(pictures: Sequence[np.ndarray], named: Sequence[str]) -> float:
    """The share of the `pictures`, each (3, 32, 32) in [-1, 1], that show their prompts in `named`."""
    return sum(map(shows, pictures, named)) / len(named)
