"""The first pass over a dataset, which decodes every image once.

It finds unreadable images before training, and measures channels, sizes and value ranges of all images. A file in the
folder of the run caches the findings until the data change.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from cm_diffusers.engine.data.records import Content, decode_content, name_in_messages, open_image, read_content, why
from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.processes import ALONE, Team
from cm_diffusers.engine.stopping import leave_signals_to_the_run
from cm_diffusers.pixels import Extrema, Ranges, extrema, is_grey, size_of, to_uint8


CACHE_BYTES = 4 << 30  # decoded datasets up to this size are kept in memory
LISTED_FAULTS = 20
VERSION = 2  # of the cache file and of the decoding of images


def resize_and_crop(image: Image.Image, resolution: Sequence[int]) -> Image.Image:
    """Resize `image` (bicubic, antialiased) to cover `resolution` (height, width), and crop the middle."""
    height, width = resolution
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def resize_to_cover(image: Image.Image, resolution: Sequence[int]) -> Image.Image:
    """Resize `image` (bicubic, antialiased) to the smallest size that covers `resolution` (height, width)."""
    height, width = resolution
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def bucket_shapes(resolution: Sequence[int], step: int = 8) -> list[tuple[int, int]]:
    """Return `resolution` and further shapes (height, width) with aspect ratios from 1:2 to 2:1.

    The sides of the further shapes are multiples of `step`, and they have at most as many pixels as `resolution`.
    """
    height, width = resolution
    sides = range(step, 2 * max(height, width) + 1, step)
    shapes = [(side, height * width // side // step * step) for side in sides]
    return [(height, width), *((h, w) for h, w in shapes if w and 0.5 <= h / w <= 2 and (h, w) != (height, width))]


def crops(images: Sequence[Tensor], resolution: Sequence[int], places: Tensor | None = None) -> Tensor:
    """Crop images to one resolution, and stack them as (B, C, H, W).

    Args:
        images: B images (C, h, w) with h >= H and w >= W.
        resolution: (H, W).
        places: (B, 2) in [0, 1), the vertical and horizontal offset of each crop as a share of the free room; None
            crops the middle.
    """
    (height, width), parts = resolution, []
    for i, image in enumerate(images):
        high, wide = image.shape[1] - height, image.shape[2] - width
        y, x = (high // 2, wide // 2)
        if places is not None:
            y, x = (int(place * (room + 1)) for place, room in zip(places[i].tolist(), (high, wide)))
        parts.append(image[:, y : y + height, x : x + width])
    return torch.stack(parts)


def digest_of(content: Content) -> bytes:
    """Return the SHA-256 of an image's content, as 32 bytes."""
    if isinstance(content, Image.Image):
        content = np.asarray(content)
    if isinstance(content, np.ndarray):
        content = f"{content.dtype} {content.shape}".encode() + content.tobytes()
    return hashlib.sha256(content).digest()


@dataclass
class ScanFindings:
    """The findings of a scan.

    Args:
        channels: 1 if all images have a grey mode, else 3.
        sizes: number of images by size, "height x width".
        examples: the first row of each size, "row 3".
        scales: the value of white for each type of image with more than 8 bits (`pixels.Ranges`).
        ranges: lines that describe `scales`.
        fingerprint: SHA-256 of the contents of all images in their order.
        ratios: height / width of each image, or empty if not requested.
    """

    channels: int = 1
    sizes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    fingerprint: str = ""
    ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ScannedImage:
    """An image as the scan sees it.

    Args:
        pixels: uint8 (C, H, W), scaled by the value range of this image alone.
        grey: whether the mode of the image is grey, whatever its pixels are.
        size: (height, width) before resizing.
        extrema: value range of an image with more than 8 bits; None for 8 bits.
        digest: SHA-256 of the content.
    """

    pixels: Tensor
    grey: bool
    size: tuple[int, int]
    extrema: Extrema | None
    digest: bytes


class DecodedImages(Dataset):
    """The decoded images of a dataset.

    Args:
        rows: the dataset, with images not decoded.
        column: the column of the images.
        channels: 1 or 3; None for the channels of each image.
        resolution: (height, width) of decoded images.
        max_pixels: largest allowed number of pixels of an image; None for Pillow's limit.

    Attributes:
        scales: the value of white for each type of image with more than 8 bits.
        whole: resize images to cover the resolution, without a crop.
        shapes: (height, width) of each image in training; None if all have `resolution`.
    """

    def __init__(
        self,
        rows: Dataset,
        column: str,
        channels: int | None,
        resolution: Sequence[int],
        max_pixels: int | None = None,
    ):
        self.rows, self.column, self.channels, self.resolution = rows, column, channels, resolution
        self.max_pixels, self.whole = max_pixels, False
        self.shapes: list[tuple[int, int]] | None = None
        self.scales: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ScannedImage | str:
        """Return an image, or a text with its name and the reason why it can't be read."""
        record = self.rows[index][self.column]
        try:
            content = read_content(record)
            image = decode_content(content, self.max_pixels)
            seen = extrema(image)
            pixels = self.decode(image, {} if seen is None else {seen.type: seen.scale})
            return ScannedImage(pixels, is_grey(image), size_of(image), seen, digest_of(content))
        except Exception as error:  # any fault, including those of hostile files, is reported with the image's name
            return f"{name_in_messages(index, record)}: {why(error)}"

    def take(self, index: int, own_shape: bool = False) -> Tensor:
        """Return image `index`, uint8 (C, H, W), in `resolution`, or with `own_shape` in its entry of `shapes`."""
        shape = self.shapes[index] if own_shape and self.shapes else self.resolution
        return self.decode(open_image(self.rows[index][self.column], self.max_pixels), self.scales, shape)

    def decode(
        self, image: Image.Image | np.ndarray, scales: Mapping[str, int], shape: Sequence[int] | None = None
    ) -> Tensor:
        """Convert an upright image of any type and size to uint8 (C, H, W).

        Args:
            image: a PIL image, or an array (H, W, C).
            scales: the value of white for each type of image with more than 8 bits.
            shape: (height, width); None for `resolution`.
        """
        channels = self.channels or (1 if is_grey(image) else 3)
        bring = resize_to_cover if self.whole else resize_and_crop
        image = bring(to_uint8(image, channels, scales), shape or self.resolution)
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels)
        return pixels.permute(2, 0, 1).contiguous()


def scan(
    decoder: DecodedImages,
    keep: bool,
    workers: int = 0,
    show_progress: bool = True,
    ratios: bool = False,
    team: Team = ALONE,
) -> tuple[ScanFindings, Tensor]:
    """Decode every image once.

    Args:
        decoder: the images.
        keep: keep the decoded images in memory.
        workers: number of processes that decode, for each process of the team.
        show_progress: show a bar.
        ratios: also note the aspect ratio of each image.
        team: the processes that share the images. Each gets the findings and the images of all.

    Returns:
        The findings, and the images, uint8 (N, C, H, W), with N = 0 unless they are kept.

    Raises:
        ValueError: images can't be read (all are counted, and the first 20 are listed with the reason), or no common
            value range fits all images. It is raised on all processes.
    """
    part = team.part(len(decoder))
    facts, digests, faults, images = ScanFindings(), bytearray(), [], torch.empty(0, 1, *decoder.resolution)
    own = {}  # the value ranges by which images were decoded
    bar = {"desc": "Reading images", "total": len(part), "disable": not show_progress, "leave": False}
    seen_images = loaded(Subset(decoder, part), workers, batch_size=None)
    for i, seen in zip(part, tqdm(seen_images, **bar), strict=True):
        if isinstance(seen, str):
            faults.append(seen)
            continue
        size = "{} x {}".format(*seen.size)
        facts.channels = facts.channels if seen.grey else 3
        if seen.extrema is not None:
            own[i] = seen.extrema
        facts.sizes[size] += 1
        if ratios:
            facts.ratios.append(round(seen.size[0] / seen.size[1], 4))
        facts.examples.setdefault(size, f"row {i}")
        digests += seen.digest
        if keep:
            if not len(images) or len(seen.pixels) > images.shape[1]:  # the first image, or the first colour image
                before = images
                images = torch.empty(len(part), len(seen.pixels), *decoder.resolution, dtype=torch.uint8)
                images[: len(before)] = before
            images[i - part.start] = seen.pixels
    facts = _merged(team.gather((facts, bytes(digests), faults, own)), len(decoder))
    if not keep:
        return facts, images
    decoder.scales = facts.scales
    for i, seen in own.items():
        if seen.scale != facts.scales[seen.type]:
            images[i - part.start] = decoder.take(i)
    channels = max(team.gather(images.shape[1]))
    return facts, team.join(images.to(torch.uint8).expand(-1, channels, -1, -1))


def _merged(found: Sequence[tuple[ScanFindings, bytes, list[str], dict[int, Extrema]]], number: int) -> ScanFindings:
    """The findings of all `number` images from those of each process: facts, digests, faults and value ranges."""
    faults = [fault for _, _, part, _ in found for fault in part]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:LISTED_FAULTS])
        more = "\n  ..." if len(faults) > LISTED_FAULTS else ""
        raise ValueError(f"{len(faults)} of {number} images can't be read; repair or remove them:{listed}{more}")
    merged, ranges, digest = ScanFindings(), Ranges(), hashlib.sha256()
    for facts, digests, _, own in found:
        merged.channels = max(merged.channels, facts.channels)
        merged.sizes.update(facts.sizes)
        merged.examples = facts.examples | merged.examples  # the first ones win
        merged.ratios += facts.ratios
        digest.update(digests)
        for i, seen in own.items():
            ranges.add(f"row {i}", seen)
    merged.scales, merged.ranges, merged.fingerprint = ranges.scales, ranges.describe(), digest.hexdigest()
    return merged


def loaded(rows: Dataset, workers: int, **settings: Any) -> Iterator[Any]:
    """Yield from a DataLoader of ready batches. Its workers end with the iteration, however that ends.

    Args:
        rows: the dataset.
        workers: number of worker processes; 0 loads in this process.
        settings: further arguments of the DataLoader.
    """
    settings |= {"num_workers": workers, "collate_fn": _as_it_is}
    batches = iter(DataLoader(rows, **settings, worker_init_fn=leave_signals_to_the_run if workers else None))
    try:
        yield from batches
    finally:
        del batches  # else a traceback keeps it alive, and the workers with it


def _as_it_is(batch: Any) -> Any:
    return batch


def save_scan(file: Path, key: str, facts: ScanFindings, images: Tensor) -> None:
    """Write the findings and the kept images of a scan as safetensors.

    Args:
        file: the file to write.
        key: digest that identifies the data and the settings.
        facts: the findings.
        images: uint8 (N, C, H, W), with N = 0 if none are kept.
    """
    found = json.dumps(vars(facts))
    head = {"key": key, "facts": found, "check": _checksum(images, found)}
    with written_aside(file) as aside:
        save_file({"images": images}, aside, head)


def load_scan(file: Path, key: str) -> tuple[ScanFindings, Tensor] | None:
    """Read the findings and images (N, C, H, W) that `save_scan` wrote to `file` under `key`.

    Returns None if the file is missing, damaged, or was written under another key.
    """
    try:
        with safe_open(file, "pt") as source:
            head = source.metadata() or {}
            if head["key"] != key:
                return None
            images = source.get_tensor("images")
        if _checksum(images, head["facts"]) != head["check"]:
            raise ValueError("its checksum differs")
        facts = ScanFindings(**json.loads(head["facts"]))
        facts.sizes = Counter(facts.sizes)
        return facts, images
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        tqdm.write(f"WARNING: {file} is damaged ({error}); the images are checked again.")
        return None


def _checksum(images: Tensor, facts: str) -> str:
    return str(zlib.crc32(images.numpy().reshape(-1), zlib.crc32(facts.encode())))
