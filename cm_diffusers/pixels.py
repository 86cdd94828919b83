"""Conversion of images with any pixel type to 8 bits.

Most of Pillow's modes have 8 bits and a fixed range. "Deep" pixels (16-bit and 32-bit integers, floats, arrays) don't
define the value of white. Their range is therefore that of the whole dataset: the smallest of `SCALES` that holds the
values of all images of one type. Values that fit no scale are refused, and the message reports them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms


EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
GREY = {"1", "L", "LA", "La", "I", "F"}
SCALES = (1, 255, 4095, 65535)  # possible values of white
ALLOWED = "0 to 1, 0 to 255, 0 to 4095 or 0 to 65535"
SLACK = 1e-4  # share of a scale by which rounding of floats can exceed it


def from_array(values: Any) -> Image.Image | np.ndarray:
    """Convert an array or nested lists to a Pillow image (8-bit values) or an array (H, W, C) (other values).

    Args:
        values: numbers or booleans, (H, W), (H, W, C) or (C, H, W). C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4
            (RGB and alpha). If both the first and the last axis could be C, the last one is.

    Raises:
        ValueError: another type or shape.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"pixels must be integers or floats; got {values.dtype}.")
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and values.shape[-1] > 4 and values.shape[0] <= 4:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or not 1 <= values.shape[-1] <= 4 or not values.size:
        raise ValueError(
            f"an array of shape {values.shape} is not an image: use (H, W), (H, W, C) or (C, H, W), C 1 to 4."
        )
    if values.dtype == bool:
        values = values * np.uint8(255)
    return _picture(values) if values.dtype == np.uint8 else values


def _picture(values: np.ndarray) -> Image.Image:
    """Pillow image of an array (H, W, C), uint8."""
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of `image` in pixels."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def is_grey(image: Image.Image | np.ndarray) -> bool:
    """Whether the mode of `image` has no colours; the pixels do not matter."""
    if isinstance(image, np.ndarray):
        return image.shape[-1] <= 2
    return image.mode in GREY or image.mode.startswith("I;16")


def _deep(image: Image.Image | np.ndarray) -> np.ndarray | None:
    """The values (H, W, C) of an image with deep pixels; None for an image with 8 bits."""
    if isinstance(image, np.ndarray):
        return image
    if image.mode in EIGHT_BITS:
        return None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)[..., None]
    raise ValueError(f"images of Pillow's mode {image.mode!r} can't be converted. Save the image as RGB.")


# --- ranges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extrema:
    """Summary of the values of an image with deep pixels.

    Args:
        type: name of the numpy dtype.
        low: lowest value.
        high: highest value.
        whole: whether all values are whole numbers.
    """

    type: str
    low: float
    high: float
    whole: bool

    @property
    def range(self) -> str:
        """Type and range, for messages."""
        return f"{self.type} values from {self.low:g} to {self.high:g}"

    def within(self, scale: int) -> bool:
        """Whether no value is above `scale`, up to the rounding of floats."""
        return self.high <= (scale if self.whole else scale * (1 + SLACK))

    @property
    def scale(self) -> int:
        """The smallest scale that holds the values."""
        return next(scale for scale in SCALES if self.within(scale))

    @property
    def dim(self) -> bool:
        """Whether the image is in the range 0 to 1, or in another range and nearly black."""
        return not self.whole and self.within(1)


def extrema(image: Image.Image | np.ndarray) -> Extrema | None:
    """Summarise an image from Pillow or `from_array`; None for 8-bit images, whose range is known.

    Raises:
        ValueError: the values are negative, NaN, infinite or above 65535, and thus fit no scale.
    """
    values = _deep(image)
    if values is None:
        return None
    low, high = float(values.min()), float(values.max())  # NaN if any value is NaN
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its {values.dtype.name} values include NaN or infinity; allowed are {ALLOWED}.")
    whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    seen = Extrema(values.dtype.name, low, high, whole)
    if low < (0 if whole else -SLACK * max(high, 0)) or not seen.within(SCALES[-1]):
        raise ValueError(f"it holds {seen.range}; allowed are {ALLOWED}.")
    return seen


class Ranges:
    """Ranges of the values in the images of a dataset so far, by type."""

    def __init__(self):
        self._all: dict[str, Extrema] = {}
        self._brightest: dict[str, str] = {}  # names of images
        self._dim: dict[str, tuple[str, Extrema]] = {}

    def add(self, name: str, seen: Extrema | None) -> None:
        """Include an image, by its `name` for messages and its summary `seen` from `extrema`."""
        if seen is None:
            return
        before = self._all.setdefault(seen.type, seen)
        if seen.high > before.high or seen is before:
            self._brightest[seen.type] = name
        if seen.dim:
            self._dim.setdefault(seen.type, (name, seen))
        low, high = min(before.low, seen.low), max(before.high, seen.high)
        self._all[seen.type] = replace(seen, low=low, high=high, whole=before.whole and seen.whole)

    @property
    def scales(self) -> dict[str, int]:
        """The value of white, by type.

        Raises:
            ValueError: the values of a type leave white uncertain; the message reports them.
        """
        return {type: self._scale(type) for type in self._all}

    def _scale(self, type: str) -> int:
        seen = self._all[type]
        if type in self._dim and seen.high >= 2:
            name, dim = self._dim[type]
            raise ValueError(
                f"{type} values reach {dim.high:g} in {name} but {seen.high:g} in {self._brightest[type]}: some images"
                " seem to be in 0 to 1, and others are not. Bring all images to one range."
            )
        if not seen.whole and any(not seen.within(white) and seen.high < 2 * white for white in (1, 255)):
            raise ValueError(
                f"the images hold {seen.range} ({self._brightest[type]}), which slightly exceeds an allowed range."
                f" Allowed are {ALLOWED}. Clip or scale the images."
            )
        return seen.scale

    def describe(self) -> list[str]:
        """One line for each type about the meaning of its values."""
        scales = self.scales
        return [f"{seen.range} are read as 0 to {scales[type]}." for type, seen in self._all.items()]


# --- conversion ----------------------------------------------------------------------------------------------------


def to_uint8(image: Image.Image | np.ndarray, channels: int, scales: Mapping[str, int] | None = None) -> Image.Image:
    """Convert an image to 8-bit grey (mode L) or RGB.

    Deep pixels are scaled and rounded, transparent pixels are laid over white, and ICC profiles are ignored.

    Args:
        image: an image from Pillow or `from_array`.
        channels: 1 (grey, by the luma of Rec. 601) or 3 (RGB).
        scales: value of white for each deep type in the dataset (`Ranges.scales`); None uses this image alone.

    Raises:
        ValueError: the values fit no scale, or not the dataset's, or the mode is unknown.
    """
    seen = extrema(image)
    if seen is not None:
        if scales is None:
            own = Ranges()
            own.add("it", seen)
            scales = own.scales
        image = _scaled(image, seen, scales)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _scaled(image: Image.Image | np.ndarray, seen: Extrema, scales: Mapping[str, int]) -> Image.Image:
    scale = scales.get(seen.type)
    if scale is None:
        known = ", ".join(scales) or "8-bit values"
        raise ValueError(f"it holds {seen.range}, but the images read before hold only {known}.")
    if not seen.within(scale) or scale > 1 and seen.dim:
        raise ValueError(f"it holds {seen.range}, but the images read before are in 0 to {scale}.")
    values = _deep(image)
    pixels = (values.astype(np.float64) * (255 / scale)).round().clip(0, 255).astype(np.uint8)
    if isinstance(image, Image.Image) and "transparency" in image.info:  # the transparent grey level of a PNG
        pixels[values == image.info["transparency"]] = 255
    return _picture(pixels)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
