"""The first pass over all images of a dataset: every one is decoded once, so that bad ones are found before training,
and what has to be known of all of them is. A file beside the run remembers it until the data change."""

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
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cm_diffusers.engine.data.records import Content, decode_content, name_in_messages, open_image, read_content, why
from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.stopping import leave_signals_to_the_run
from cm_diffusers.pixels import Extrema, Ranges, extrema, is_grey, size_of, to_uint8


CACHE_BYTES = 4 << 30  # decoded datasets up to this size are kept in memory
LISTED_FAULTS = 20
VERSION = 2  # of what the file of a scan holds, and of how images are decoded


def resize_and_crop(image: Image.Image, resolution: Sequence[int]) -> Image.Image:
    """Resize (bicubic, antialiased) to cover (height, width), and crop the middle."""
    height, width = resolution
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def resize_to_cover(image: Image.Image, resolution: Sequence[int]) -> Image.Image:
    """Resize (bicubic, antialiased) to the smallest size that covers (height, width)."""
    height, width = resolution
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def bucket_shapes(resolution: Sequence[int], step: int = 8) -> list[tuple[int, int]]:
    """Shapes from 1:2 to 2:1, with sides that `step` divides and no more pixels than (height, width), and that one."""
    height, width = resolution
    sides = range(step, 2 * max(height, width) + 1, step)
    shapes = [(side, height * width // side // step * step) for side in sides]
    return [(height, width), *((h, w) for h, w in shapes if w and 0.5 <= h / w <= 2 and (h, w) != (height, width))]


def crops(images: Sequence[Tensor], resolution: Sequence[int], places: Tensor | None = None) -> Tensor:
    """Parts (B, C, H, W) of images (C, h, w) that cover the resolution.

    Args:
        images: B of them.
        resolution: (H, W).
        places: (B, 2) in [0, 1), of height and width, where they begin in what is left over; None for the middle.
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
    """What tells the content of an image from that of another."""
    if isinstance(content, Image.Image):
        content = np.asarray(content)
    if isinstance(content, np.ndarray):
        content = f"{content.dtype} {content.shape}".encode() + content.tobytes()
    return hashlib.sha256(content).digest()


@dataclass
class ScanFindings:
    """What a dataset was found to be.

    Args:
        channels: 1 where all images are grey, else 3.
        sizes: numbers of images by their size, "height x width".
        examples: an image of each size.
        scales: what white is in images of more than 8 bits (`pixels.Ranges`).
        ranges: lines that say so.
        fingerprint: of the contents of all images in their order.
        ratios: height over width of each, where they are wanted.
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
    """An image as the scan saw it: `pixels` (C, H, W), uint8, in its own range; whether it is grey, (height, width)
    and the range that it came with."""

    pixels: Tensor
    grey: bool
    size: tuple[int, int]
    extrema: Extrema | None
    digest: bytes


class DecodedImages(Dataset):
    """The images of a dataset, decoded.

    Args:
        rows: the dataset, its images not decoded.
        column: which holds them.
        channels: 1 or 3, or None for those of each image.
        resolution: (height, width) that they get.
        max_pixels: of an image; None for what Pillow reads.

    Attributes:
        scales: what white is in images of more than 8 bits.
        whole: images are only resized, to cover the resolution, and not cropped.
        shapes: (height, width) that each image has in training, where these differ.
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
        """An image, or the reason why it can't be read."""
        record = self.rows[index][self.column]
        try:
            content = read_content(record)
            image = decode_content(content, self.max_pixels)
            seen = extrema(image)
            pixels = self.decode(image, {} if seen is None else {seen.type: seen.scale})
            return ScannedImage(pixels, is_grey(image), size_of(image), seen, digest_of(content))
        except Exception as error:  # of hostile files, too: whatever it is, it is named
            return f"{name_in_messages(index, record)}: {why(error)}"

    def take(self, index: int, own_shape: bool = False) -> Tensor:
        """The image (C, H, W) at a place, in the shape that it has in training or in that of all."""
        shape = self.shapes[index] if own_shape and self.shapes else self.resolution
        return self.decode(open_image(self.rows[index][self.column], self.max_pixels), self.scales, shape)

    def decode(
        self, image: Image.Image | np.ndarray, scales: Mapping[str, int], shape: Sequence[int] | None = None
    ) -> Tensor:
        """(C, H, W), uint8, from an upright image of any type and size, by default in the shape of all."""
        channels = self.channels or (1 if is_grey(image) else 3)
        bring = resize_to_cover if self.whole else resize_and_crop
        image = bring(to_uint8(image, channels, scales), shape or self.resolution)
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels)
        return pixels.permute(2, 0, 1).contiguous()


def scan(
    decoder: DecodedImages, keep: bool, workers: int = 0, show_progress: bool = True, ratios: bool = False
) -> tuple[ScanFindings, Tensor]:
    """Look at every image once.

    Args:
        decoder: gives them.
        keep: keep them in memory.
        workers: processes that decode.
        show_progress: show a bar.
        ratios: note the shape of each image.

    Returns:
        What was found, and the images (N, C, H, W), N = 0 unless they are kept.

    Raises:
        ValueError: images that can't be read; all are counted, and the first ones named with the reason.
    """
    facts, digest, faults, images = ScanFindings(), hashlib.sha256(), [], torch.empty(0, 1, *decoder.resolution)
    ranges, own = Ranges(), {}  # the scales that images were decoded by
    bar = {"desc": "Reading images", "total": len(decoder), "disable": not show_progress, "leave": False}
    for i, seen in enumerate(tqdm(loaded(decoder, workers, batch_size=None), **bar)):
        if isinstance(seen, str):
            faults.append(seen)
            continue
        size = "{} x {}".format(*seen.size)
        facts.channels = facts.channels if seen.grey else 3
        ranges.add(f"row {i}", seen.extrema)
        if seen.extrema is not None:
            own[i] = seen.extrema
        facts.sizes[size] += 1
        if ratios:
            facts.ratios.append(round(seen.size[0] / seen.size[1], 4))
        facts.examples.setdefault(size, f"row {i}")
        digest.update(seen.digest)
        if keep:
            if not len(images) or len(seen.pixels) > images.shape[1]:  # the first one, or colour after grey
                before = images
                images = torch.empty(len(decoder), len(seen.pixels), *decoder.resolution, dtype=torch.uint8)
                images[: len(before)] = before
            images[i] = seen.pixels
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:LISTED_FAULTS])
        more = "\n  ..." if len(faults) > LISTED_FAULTS else ""
        raise ValueError(f"{len(faults)} of {len(decoder)} images can't be read; repair or remove them:{listed}{more}")
    facts.scales, facts.ranges, facts.fingerprint = ranges.scales, ranges.describe(), digest.hexdigest()
    if keep:
        decoder.scales = facts.scales
        for i, seen in own.items():
            if seen.scale != facts.scales[seen.type]:
                images[i] = decoder.take(i)
    return facts, images


def loaded(rows: Dataset, workers: int, **settings: Any) -> Iterator[Any]:
    """What a DataLoader of ready batches gives; its workers end with the iteration, however that ends."""
    settings |= {"num_workers": workers, "collate_fn": _as_it_is}
    batches = iter(DataLoader(rows, **settings, worker_init_fn=leave_signals_to_the_run if workers else None))
    try:
        yield from batches
    finally:
        del batches  # a traceback would keep it, and the workers with it


def _as_it_is(batch: Any) -> Any:
    return batch


def save_scan(file: Path, key: str, facts: ScanFindings, images: Tensor) -> None:
    """Write what was found, and the images that are kept, as safetensors that say of which data they are."""
    found = json.dumps(vars(facts))
    head = {"key": key, "facts": found, "check": _checksum(images, found)}
    with written_aside(file) as aside:
        save_file({"images": images}, aside, head)


def load_scan(file: Path, key: str) -> tuple[ScanFindings, Tensor] | None:
    """What `save_scan` wrote; None where there is nothing, of other data, or damaged."""
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
        tqdm.write(f"WARNING: {file} is damaged ({error}); the images are checked anew.")
        return None


def _checksum(images: Tensor, facts: str) -> str:
    return str(zlib.crc32(images.numpy().reshape(-1), zlib.crc32(facts.encode())))
