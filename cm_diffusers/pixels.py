"""Images with any type of pixel as images with 8 bits: one converter, which knows the range of every type.

Most of Pillow's modes have 8 bits, and one range. The others ("deep" ones here: 16-bit and 32-bit integers, floats,
arrays) don't say what white is, so their range is a fact of the whole dataset: the smallest of `SCALES` that holds the
values of all its images of one type. What fits none of them is refused, with the values that were seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms


EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
GREY = {"1", "L", "LA", "La", "I", "F"}
SCALES = (1, 255, 4095, 65535)  # what white may be
ALLOWED = "0 to 1, 0 to 255, 0 to 4095 or 0 to 65535"
SLACK = 1e-4  # of a scale, by which rounding may leave it


def from_array(values: Any) -> Image.Image | np.ndarray:
    """The image that an array or nested lists hold: a Pillow image where it has 8 bits, else an array (H, W, C).

    Args:
        values: numbers or booleans, (H, W), (H, W, C) or (C, H, W); C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4
            (RGB and alpha). Where the first and the last axis could be C, the last one is.

    Raises:
        ValueError: anything else.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"pixels must be integers or floats; these are of type {values.dtype}.")
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and values.shape[-1] > 4 and values.shape[0] <= 4:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or not 1 <= values.shape[-1] <= 4 or not values.size:
        raise ValueError(
            f"an array of shape {values.shape} is no image: use (H, W), (H, W, C) or (C, H, W), C 1 to 4."
        )
    if values.dtype == bool:
        values = values * np.uint8(255)
    return _picture(values) if values.dtype == np.uint8 else values


def _picture(values: np.ndarray) -> Image.Image:
    """Of an array (H, W, C), uint8."""
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) in pixels."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def is_grey(image: Image.Image | np.ndarray) -> bool:
    """Whether it has no colours by its mode, whatever its pixels are."""
    if isinstance(image, np.ndarray):
        return image.shape[-1] <= 2
    return image.mode in GREY or image.mode.startswith("I;16")


def _deep(image: Image.Image | np.ndarray) -> np.ndarray | None:
    """The values (H, W, C) of an image with deep pixels, None for one with 8 bits."""
    if isinstance(image, np.ndarray):
        return image
    if image.mode in EIGHT_BITS:
        return None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)[..., None]
    raise ValueError(f"images of Pillow's mode {image.mode!r} can't be converted; save this one as RGB.")


# --- ranges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extrema:
    """What an image with deep pixels holds: the type of its values, the lowest, the highest, and whether all are whole
    numbers."""

    type: str
    low: float
    high: float
    whole: bool

    @property
    def range(self) -> str:
        return f"{self.type} values from {self.low:g} to {self.high:g}"

    def within(self, scale: int) -> bool:
        """Whether no value is above `scale`, but for what rounding of floats adds."""
        return self.high <= (scale if self.whole else scale * (1 + SLACK))

    @property
    def scale(self) -> int:
        """The smallest scale that holds the values."""
        return next(scale for scale in SCALES if self.within(scale))

    @property
    def dim(self) -> bool:
        """Whether it can only be an image in 0 to 1, or one that is nearly black."""
        return not self.whole and self.within(1)


def extrema(image: Image.Image | np.ndarray) -> Extrema | None:
    """What an image (as Pillow or `from_array` give it) holds; None where it has 8 bits, and so a range that is known.

    Raises:
        ValueError: values that no scale holds: negative ones, NaN, infinity, or above 65535.
    """
    values = _deep(image)
    if values is None:
        return None
    low, high = float(values.min()), float(values.max())  # NaN where any is
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its {values.dtype.name} values hold NaN or infinity; allowed are {ALLOWED}.")
    whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    seen = Extrema(values.dtype.name, low, high, whole)
    if low < (0 if whole else -SLACK * max(high, 0)) or not seen.within(SCALES[-1]):
        raise ValueError(f"it holds {seen.range}; allowed are {ALLOWED}.")
    return seen


class Ranges:
    """What the images of a dataset have been seen to hold, by the type of their values."""

    def __init__(self):
        self._all: dict[str, Extrema] = {}
        self._brightest: dict[str, str] = {}  # names of images
        self._dim: dict[str, tuple[str, Extrema]] = {}

    def add(self, name: str, seen: Extrema | None) -> None:
        """Count an image: its name for messages, and what `extrema` gave."""
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
        """What white is, by type. Raises ValueError where that can't be known, with the values that were seen."""
        return {type: self._scale(type) for type in self._all}

    def _scale(self, type: str) -> int:
        seen = self._all[type]
        if type in self._dim and seen.high >= 2:
            name, dim = self._dim[type]
            raise ValueError(
                f"{type} values up to {dim.high:g} in {name}, up to {seen.high:g} in {self._brightest[type]}: some"
                " images seem to be in 0 to 1, others are not. Bring all images to one range."
            )
        if not seen.whole and any(not seen.within(white) and seen.high < 2 * white for white in (1, 255)):
            raise ValueError(
                f"the images hold {seen.range} ({self._brightest[type]}), a little more than a range that is known."
                f" Allowed are {ALLOWED}; clip or scale the images."
            )
        return seen.scale

    def describe(self) -> list[str]:
        """A line for each type that says how its values are read."""
        scales = self.scales
        return [f"{seen.range} are read as 0 to {scales[type]}." for type, seen in self._all.items()]


# --- conversion ----------------------------------------------------------------------------------------------------


def to_uint8(image: Image.Image | np.ndarray, channels: int, scales: Mapping[str, int] | None = None) -> Image.Image:
    """Grey (mode L) or RGB with 8 bits: deep pixels are scaled and rounded, transparency is laid over white, ICC
    profiles are ignored.

    Args:
        image: as Pillow or `from_array` give it.
        channels: 1 or 3. Colours become grey by Rec. 601's luma.
        scales: what white is for each deep type in the dataset (`Ranges.scales`); None: by this image alone.

    Raises:
        ValueError: values that no scale holds, or that those of the dataset don't; a mode that is not known.
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
        known = ", ".join(scales) or "8-bit ones"
        raise ValueError(f"it holds {seen.range}; the images that were read before hold only {known}.")
    if not seen.within(scale) or scale > 1 and seen.dim:
        raise ValueError(f"it holds {seen.range}; the images that were read before are in 0 to {scale}.")
    values = _deep(image)
    pixels = (values.astype(np.float64) * (255 / scale)).round().clip(0, 255).astype(np.uint8)
    if isinstance(image, Image.Image) and "transparency" in image.info:  # the grey that a PNG names
        pixels[values == image.info["transparency"]] = 255
    return _picture(pixels)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
