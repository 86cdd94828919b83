"""The world of shapes: prompts, drawings and their judge."""

import numpy as np
import pytest

from cm_diffusers.toys.shapes import PLACES, Group, Scene, draw, prompts, seen, share_right, shows


def test_prompts_are_read_as_they_are_written():
    known = prompts() + prompts(held_out=True)
    assert len(known) == len(set(known)) == 24 + 24 * 24 * 4
    assert all(str(Scene.read(prompt)) == prompt for prompt in known)
    assert Scene.read("two red circles above a blue square") == Scene(
        (Group(2, "red", "circle"), Group(1, "blue", "square")), "above"
    )
    assert 0.17 < len(prompts(held_out=True)) / (24 * 24 * 4) < 0.23


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "two red circle", "a red circles", "a red circle above", "A red circle"]
)
def test_other_texts_are_refused(prompt):
    with pytest.raises(ValueError, match="names no scene"):
        Scene.read(prompt)


def test_the_judge_is_right_for_drawings_and_for_noisy_ones():
    random, known = np.random.default_rng(0), prompts()
    named = [known[i] for i in random.integers(0, len(known), 500)]
    pictures = [draw(prompt, random) for prompt in named]
    assert share_right(pictures, named) == 1
    noisy = [picture + 0.3 * random.standard_normal(picture.shape).astype(np.float32) for picture in pictures]
    assert share_right(noisy, named) >= 0.99
    assert share_right(pictures, named[1:] + named[:1]) < 0.02


def test_the_judge_counts_and_tells_places():
    random = np.random.default_rng(1)
    one, two = draw("a red circle", random), draw("two red circles", random)
    assert shows(one, "a red circle") and not shows(one, "two red circles")
    assert shows(two, "two red circles") and not shows(two, "a red circle")
    for place, (first, _) in PLACES.items():
        picture = draw(f"a red circle {place} a red circle", random)
        assert sum(found is not None for found in seen(picture)) == 2
        picture = draw(f"a green square {place} two blue triangles", random)
        assert ("green", "square") in [seen(picture)[cell] for cell in first]
        others = [other for other in PLACES if not shows(picture, f"a green square {other} two blue triangles")]
        assert len(others) == 3
    assert seen(np.full((3, 32, 32), -1.0, np.float32)) == [None] * 4
