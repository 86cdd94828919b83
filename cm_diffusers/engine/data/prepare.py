"""Preparation of a dataset with images of one size, written as parquet.

All images are checked first. They are written shard by shard, so an interruption costs one shard. A split is written
to a hidden folder and renamed when it is complete, so `--dataset_name` and the Hub never see a part of it.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from cm_diffusers.engine.data.sources import NumberedImages
from cm_diffusers.engine.files import fsync_folder, replace_file
from cm_diffusers.engine.lock import lock_folder
from cm_diffusers.pixels import Extrema, Ranges, extrema, is_grey, size_of, to_uint8


SHARD_BYTES = 100 << 20  # bytes of decoded pixels per shard
PLAN = ".plan.json"
CHUNK = 1000  # images in work at once
TRANSFORMS = ("center_crop", "stretch")
FILES = ("README.md", "*/*.parquet")  # all files of a prepared dataset
CARD = """---
task_categories:
- unconditional-image-generation
---
# {name}

Images of {channels} x {height} x {width} pixels{classes}, made by `training/prepare_data.py` of cm_diffusers: {how}.
"""


@dataclass(frozen=True)
class Request:
    """The requested preparation of a split.

    Args:
        source: fingerprint of the source.
        resolution: (height, width); None for the common size of all images.
        transform: how images get this size, one of `TRANSFORMS`.
        channels: 1 or 3; None for 1 if all images are grey, else 3.
    """

    source: str
    resolution: list[int] | None = None
    transform: str = "center_crop"
    channels: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a split, made from the request and a pass over the source.

    Args:
        asked: the request.
        count: number of images.
        height: height of all written images, in pixels.
        width: width of all written images, in pixels.
        channels: 1 or 3.
        classes: names of the classes; None without labels.
        enlarged: number of images that are lower or narrower than the written ones.
        scales: the value of white for each type of image with more than 8 bits (`pixels.Ranges`).
        ranges: lines that describe `scales`.
    """

    asked: Request
    count: int
    height: int
    width: int
    channels: int
    classes: list[str] | None
    enlarged: int
    scales: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the written images."""
        return self.channels, self.height, self.width


def crop_middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop `image` to its largest middle part with the aspect ratio `height` : `width`, in whole pixels."""
    scale = min(image.width / width, image.height / height)
    w, h = (max(1, round(side * scale)) for side in (width, height))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def fit(image: Image.Image, plan: Plan) -> Image.Image:
    """Convert an image to the form of the prepared dataset.

    The result is grey or RGB with 8 bits. It is cropped or stretched with an antialiasing Lanczos filter, as in EDM's
    datasets. EXIF and colour profiles are dropped.

    Args:
        image: an image of any type and size, as `NumberedImages.read` gives it.
        plan: the plan of the split.
    """
    image = to_uint8(image, plan.channels, plan.scales)
    if plan.asked.transform == "center_crop":
        image = crop_middle(image, plan.height, plan.width)
    image = image.resize((plan.width, plan.height), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def prepare(source: NumberedImages, output: Path, split: str, asked: Request) -> Plan:
    """Write the images of `source` as `output`/`split`/*.parquet, and resume an interrupted earlier call.

    Args:
        source: the images.
        output: folder of the dataset.
        split: name of the split and of its folder.
        asked: the request, which must be the same as in the interrupted call.

    Returns:
        The plan of the written split.

    Raises:
        ValueError: images can't be read (all are listed), sizes differ and no resolution is requested, or `output` is
            in use or holds another split of this name.
    """
    lock, final, partial = lock_folder(output), output / split, output / f".partial-{split}"
    try:
        plan = _find_plan(final if final.exists() else partial, asked)
        if plan is None:
            plan = _plan(source, asked)
            partial.mkdir(exist_ok=True)
            replace_file(partial / PLAN, json.dumps(asdict(plan), indent=1).encode())
        if not final.exists():
            _write_shards(source, plan, partial, split)
            fsync_folder(partial)
            os.rename(partial, final)
            fsync_folder(output)
        return plan
    finally:
        lock.release()


def _find_plan(folder: Path, asked: Request) -> Plan | None:
    """The plan of `folder`, or None if it is new. Raises ValueError if its request differs from `asked`."""
    if (
        not folder.exists() or folder.name.startswith(".") and not (folder / PLAN).exists()
    ):  # stopped before the plan was written
        return None
    try:
        values = json.loads((folder / PLAN).read_bytes())
        plan = Plan(**{**values, "asked": Request(**values["asked"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} exists, but was not made by prepare_data.py. Choose another OUTPUT.") from None
    before, now = asdict(plan.asked), asdict(asked)
    changed = [key if key == "source" else f"{key} {before[key]}" for key in before if before[key] != now[key]]
    if changed:
        raise ValueError(
            f"{folder} was begun with another {' and '.join(changed)}. Give the same again to resume it,"
            " choose another OUTPUT, or delete the folder."
        )
    return plan


def _in_threads(work: Callable[[int], Any], numbers: range, bar: tqdm) -> Iterator[Any]:
    """Yield `work` of each number in order. Threads run in parallel because Pillow releases Python's lock."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(numbers), CHUNK):  # map() would hold all results of a large dataset at once
            for result in pool.map(work, numbers[start : start + CHUNK]):
                bar.update()
                yield result


def _plan(source: NumberedImages, asked: Request) -> Plan:
    """Read every image once. Raises ValueError with a list of all unreadable images."""

    def look(i: int) -> tuple[bool, tuple[int, int], Extrema | None] | str:
        try:
            image = source.read(i)
            seen = extrema(image)
            to_uint8(image, 3, {} if seen is None else {seen.type: seen.scale})
        except Exception as error:  # any fault, including those of hostile files, is reported with the image's name
            return f"{source.names[i]}: {error or type(error).__name__}"
        return is_grey(image), size_of(image), seen

    count, faults, grey, ranges, sizes = (
        len(source.names),
        [],
        True,
        Ranges(),
        {},
    )  # by size, the numbers of its images
    with tqdm(total=count, desc="Checking images", unit="image", leave=False) as bar:
        for i, found in enumerate(_in_threads(look, range(count), bar)):
            if isinstance(found, str):
                faults.append(found)
            else:
                grey &= found[0]
                sizes.setdefault(found[1], []).append(i)
                ranges.add(source.names[i], found[2])
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(
            f"{len(faults)} of {count} images can't be read; nothing was written. Repair or remove:{listed}"
        )
    if asked.resolution is None and len(sizes) > 1:
        examples = [f"{h} x {w} ({source.names[some[0]]})" for (h, w), some in sizes.items()]
        raise ValueError(
            f"the images have {len(sizes)} sizes, for example {' and '.join(examples[:2])}; give --resolution."
        )
    height, width = asked.resolution or next(iter(sizes))
    enlarged = sum(len(some) for (h, w), some in sizes.items() if h < height or w < width)
    channels, scales = asked.channels or (1 if grey else 3), ranges.scales
    return Plan(asked, count, height, width, channels, source.classes, enlarged, scales, ranges.describe())


def _write_shards(source: NumberedImages, plan: Plan, folder: Path, split: str) -> None:
    features = datasets.Features({"image": datasets.Image()})
    if plan.classes is not None:
        features["label"] = datasets.ClassLabel(names=plan.classes)
    size = max(1, SHARD_BYTES // int(np.prod(plan.shape)))
    shards = [range(plan.count)[start : start + size] for start in range(0, plan.count, size)]

    def encode(i: int) -> dict[str, Any]:
        try:
            image = source.read(i)
        except Exception as error:
            raise ValueError(
                f"{source.names[i]} can't be read any more, although it was readable before: {error}"
            ) from error
        buffer = io.BytesIO()
        fit(image, plan).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    with tqdm(total=plan.count, desc="Writing", unit="image") as bar:
        for number, rows in enumerate(shards):
            file = folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            if file.exists():
                bar.update(len(rows))
                continue
            columns = {"image": list(_in_threads(encode, rows, bar))}
            if plan.classes is not None:
                columns["label"] = [source.labels[i] for i in rows]
            buffer = io.BytesIO()
            datasets.Dataset.from_dict(columns, features).to_parquet(buffer)
            replace_file(file, buffer.getvalue())


def write_card(folder: Path, name: str, plan: Plan) -> None:
    """Write a card of the dataset `name`, prepared by `plan`, to `folder`/README.md, unless the file exists."""
    if not (folder / "README.md").exists():
        classes = f" in {len(plan.classes)} classes" if plan.classes else ""
        how = f"resized by Lanczos' filter ({plan.asked.transform})" if plan.asked.resolution else "of their own size"
        channels, height, width = plan.shape
        text = CARD.format(name=name, channels=channels, height=height, width=width, classes=classes, how=how)
        (folder / "README.md").write_text(text, encoding="utf-8")
