"""Captions of images, from a column of a dataset or from text files beside the images, and prompts from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from cm_diffusers.engine.data.columns import paths_of
from cm_diffusers.engine.data.listing import Listing
from cm_diffusers.engine.data.records import name_in_messages, read_content, why


NAMED_FAULTS = 5


def read_captions(rows: datasets.Dataset, column: str, image_column: str) -> list[str]:
    """Read the caption of each image from a column of texts, or the first one of each of its lists of texts.

    Args:
        rows: the dataset.
        column: the column of the captions.
        image_column: the column of the images, whose names are used in messages.

    Raises:
        ValueError: captions are missing, empty or not texts; the first five are named.
    """
    captions = [_first(value) for value in rows[column][:]]
    faults = [i for i, caption in enumerate(captions) if not isinstance(caption, str) or not caption.strip()]
    if faults:
        paths = paths_of(rows, image_column)
        raise ValueError(
            f"{len(faults)} of {len(captions)} captions in column {column!r} are missing, empty or not texts:"
            f" {_some([name_in_messages(i, paths[i]) for i in faults])}. Write these captions, or remove these images."
            " To train without captions at times, give --proportion_empty_prompts."
        )
    return captions


def _first(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[0] if value else None
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED_FAULTS]) + (", ..." if len(names) > NAMED_FAULTS else "")


def read_caption_files(listing: Listing) -> list[str] | None:
    """Read the caption of each image of a listing from the text file of the same name: a.txt for a.png.

    Line breaks become spaces. Returns None if no image has such a file.

    Raises:
        ValueError: some images have no such file, or a file is not UTF-8.
    """
    files = [listing.text_of(image) for image in listing.images]
    missing = [image.name for image, file in zip(listing.images, files) if file is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no caption file NAME.txt beside them: {_some(missing)}. Add"
            " these files, or move these images away."
        )
    captions = []
    for image, file in zip(listing.images, files):
        try:
            captions.append(" ".join(read_content(file).decode("utf-8-sig").split()))
        except UnicodeDecodeError as error:
            raise ValueError(f"the caption file of {image.name} is not UTF-8 ({error}). Save it as UTF-8.") from None
    return captions


def read_prompts(file: Path) -> list[str]:
    """Read a prompt from each line of a file. Blank lines are skipped.

    Args:
        file: a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the file is missing, unreadable, not text, or has no prompt.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes")
    except OSError as error:
        raise ValueError(f"prompts {str(file)!r} can't be read: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise ValueError(
            f"prompts {str(file)!r} is not a text file in UTF-8: {why(error)}. Give a file with a prompt in each line."
        ) from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {str(file)!r} has no prompts. Write a prompt in each line.")
    return prompts
