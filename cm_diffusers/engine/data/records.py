"""One opener for all that the datasets library and our listings hold as an image."""

import functools
import io
import os
import re
import zipfile
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cm_diffusers.engine.data.archives import check_size
from cm_diffusers.pixels import from_array


Content = bytes | np.ndarray | Image.Image
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def read_content(record: Any) -> Content:
    """The content of an image: the bytes of its file, or its pixels where there is no file.

    Args:
        record: bytes; the path of a file or of a member (zip://member::archive); an address (hf://, https://); a
            dict of "bytes" and "path", of which one is None; an array or nested lists of pixels; a PIL image.

    Raises:
        ValueError: there is no image, or it is larger than one needs to be.
        TypeError: the record is of another kind.
        OSError: the file can't be read.
    """
    if isinstance(record, dict) and {"bytes", "path"} & record.keys():
        content = record.get("bytes")
        record = record.get("path") if content is None else content
    if record is None:
        raise ValueError("there is no image")
    if isinstance(record, (bytes, bytearray, memoryview)):
        return bytes(record)
    if isinstance(record, (str, os.PathLike)):
        return _read_path(os.fspath(record))
    if isinstance(record, Image.Image):
        return record
    if isinstance(record, (list, np.ndarray)):
        return np.asarray(record)
    raise TypeError(f"{record!r:.40} is no image: it is of the type {type(record).__name__}")


def decode_content(content: Content, max_pixels: int | None = None) -> Image.Image | np.ndarray:
    """An image, upright, fully read, as `pixels.to_uint8` takes it, from what `read_content` gave.

    Raises ValueError for one of more than `max_pixels`, or by default more than Pillow reads.
    """
    if isinstance(content, np.ndarray):
        return from_array(content)
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow warns above it, refuses above twice
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} Where it is meant, give --max_image_pixels.") from None
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width * image.height} pixels, and max_image_pixels is {max_pixels}")
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which would have to be run")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def open_image(record: Any, max_pixels: int | None = None) -> Image.Image | np.ndarray:
    """An image from a record, upright, fully read; see `read_content` for the records and errors."""
    return decode_content(read_content(record), max_pixels)


def name_of(record: Any) -> str | None:
    """Where a record comes from, if it says so."""
    record = record.get("path") if isinstance(record, dict) else record
    if not isinstance(record, str):
        return None
    return "/".join(split_member(record)[::-1]) if record.startswith("zip://") else record


def name_in_messages(index: int, record: Any) -> str:
    """What the image of a row is called in messages."""
    name = name_of(record)
    return f"row {index} ({name})" if name else f"row {index}"


def split_member(path: str) -> tuple[str, str]:
    """Member and archive of zip://member::archive, both of which may hold "::" themselves."""
    parts = path.removeprefix("zip://").split("::")
    pairs = [("::".join(parts[:i]), "::".join(parts[i:])) for i in range(1, len(parts))]
    return next((pair for pair in pairs if os.path.isfile(pair[1])), pairs[-1] if pairs else (path, ""))


def why(error: Exception) -> str:
    """The reason of a failure in words."""
    return str(error) or type(error).__name__


def _read_path(path: str) -> bytes:
    if path.startswith("zip://"):
        member, archive = split_member(path)
        if os.path.isfile(archive):
            opened = _archive(archive, os.getpid())
            check_size(opened.getinfo(member).file_size)
            return opened.read(member)
    if URL.match(path) and not os.path.exists(path):
        return _read_address(path)
    with open(path, "rb") as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


@functools.lru_cache(maxsize=8)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """An open archive; each process has its own, as they would move one another's place in the file."""
    return zipfile.ZipFile(path)


def _read_address(path: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:  # it brings the token of the Hub
        return file.read()
