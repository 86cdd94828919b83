"""The reader of image records, in every form that the datasets library and our listings use."""

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
    """Read the content of an image: the bytes of its file, or its pixels if there is no file.

    Args:
        record: one of

            - bytes,
            - the path of a file or of a zip's member (zip://member::archive),
            - an address (hf://, https://),
            - a dict with "bytes" and "path", one of which can be None,
            - an array or nested lists of pixels, (H, W), (H, W, C) or (C, H, W),
            - a PIL image.

    Raises:
        ValueError: the record is None, or its file is too large.
        TypeError: the record has another type.
        OSError: the file is unreadable.
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
    raise TypeError(f"{record!r:.40} is not an image: its type is {type(record).__name__}")


def decode_content(content: Content, max_pixels: int | None = None) -> Image.Image | np.ndarray:
    """Decode `content` from `read_content` to an upright image, fully read, as `pixels.to_uint8` takes it.

    Args:
        content: bytes of a file, an array (H, W), (H, W, C) or (C, H, W), or a PIL image.
        max_pixels: largest allowed number of pixels; None for Pillow's limit.

    Raises:
        ValueError: too many pixels, an array of another shape or type, or a PostScript file.
        OSError: the file is damaged or of an unknown format.
    """
    if isinstance(content, np.ndarray):
        return from_array(content)
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow warns above it, refuses above twice
    try:
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} If the image is genuine, give --max_image_pixels.") from None
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(f"it has {image.width * image.height} pixels, and max_image_pixels is {max_pixels}")
    if image.format == "EPS":
        raise ValueError("PostScript is a program and is not run; convert it to PNG")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def open_image(record: Any, max_pixels: int | None = None) -> Image.Image | np.ndarray:
    """Read and decode the image of a `record`, upright.

    Args:
        record: see `read_content`.
        max_pixels: see `decode_content`.

    Raises:
        ValueError, TypeError, OSError: the record can't be read or decoded.
    """
    return decode_content(read_content(record), max_pixels)


def name_of(record: Any) -> str | None:
    """Return the path or address in a record, or None. A zip's member gives archive/member."""
    record = record.get("path") if isinstance(record, dict) else record
    if not isinstance(record, str):
        return None
    return "/".join(split_member(record)[::-1]) if record.startswith("zip://") else record


def name_in_messages(index: int, record: Any) -> str:
    """Return the name of an image for messages: its row and, if known, its file."""
    name = name_of(record)
    return f"row {index} ({name})" if name else f"row {index}"


def split_member(path: str) -> tuple[str, str]:
    """Split zip://member::archive into member and archive. Either name can contain "::"."""
    parts = path.removeprefix("zip://").split("::")
    pairs = [("::".join(parts[:i]), "::".join(parts[i:])) for i in range(1, len(parts))]
    return next((pair for pair in pairs if os.path.isfile(pair[1])), pairs[-1] if pairs else (path, ""))


def why(error: Exception) -> str:
    """Return the message of an error, or the name of its type if the message is empty."""
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
    """An open archive per process, because processes that share one move each other's position in the file."""
    return zipfile.ZipFile(path)


def _read_address(path: str) -> bytes:
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:  # xopen sends the Hub token
        return file.read()
