"""Datasets of images of one size: checked as a whole, then written as parquet, shard by shard, so that a stop costs
one shard.

A split is written to a hidden folder beside its place and renamed when it is complete: `--dataset_name` and the Hub
never see a part of it.
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


SHARD_BYTES = 100 << 20  # of its pixels
PLAN = ".plan.json"
CHUNK = 1000  # images that are waited for at once
TRANSFORMS = ("center_crop", "stretch")
FILES = ("README.md", "*/*.parquet")  # what a prepared dataset consists of
CARD = """---
task_categories:
- unconditional-image-generation
---
# {name}

Images of {channels} x {height} x {width} pixels{classes}, made by `training/prepare_data.py` of cm_diffusers: {how}.
"""


@dataclass(frozen=True)
class Request:
    """What is asked for: of a split, its source, (height, width) or None for that of the images, how to come by it
    (see `TRANSFORMS`), and channels, 1 or 3, or None for what the images have."""

    source: str
    resolution: list[int] | None = None
    transform: str = "center_crop"
    channels: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a split will be, or is: what was asked for, and what the source came to."""

    asked: Request
    count: int
    height: int
    width: int
    channels: int
    classes: list[str] | None
    enlarged: int  # images that had fewer pixels than they get
    scales: dict[str, int] = field(default_factory=dict)  # what white is in images of more than 8 bits
    ranges: list[str] = field(default_factory=list)  # lines that say so

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def crop_middle(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part of this shape, in whole pixels, from the middle."""
    scale = min(image.width / width, image.height / height)
    w, h = (max(1, round(side * scale)) for side in (width, height))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def fit(image: Image.Image, plan: Plan) -> Image.Image:
    """The image as the dataset has it: 8 bits, grey or RGB; cropped or stretched by Lanczos' filter, as EDM's datasets
    are, with antialiasing; without what was attached to its pixels (EXIF, a colour profile)."""
    image = to_uint8(image, plan.channels, plan.scales)
    if plan.asked.transform == "center_crop":
        image = crop_middle(image, plan.height, plan.width)
    image = image.resize((plan.width, plan.height), Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))


def prepare(source: NumberedImages, output: Path, split: str, asked: Request) -> Plan:
    """Write the images of `source` as `output`/`split`/*.parquet, going on where an earlier call was stopped.

    Raises:
        ValueError: images that can't be read (all are listed), or differ in size where no resolution is asked for;
            `output` holds a split of that name which is another one, or is in use.
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
    """The plan that `folder` was begun with, None for a new one. Raises ValueError where it is not that of `asked`."""
    if not folder.exists() or folder.name.startswith(".") and not (folder / PLAN).exists():  # killed as it began
        return None
    try:
        values = json.loads((folder / PLAN).read_bytes())
        plan = Plan(**{**values, "asked": Request(**values["asked"])})
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} exists, and is nothing that was prepared here; choose another OUTPUT.") from None
    before, now = asdict(plan.asked), asdict(asked)
    changed = [key if key == "source" else f"{key} {before[key]}" for key in before if before[key] != now[key]]
    if changed:
        raise ValueError(
            f"{folder} was begun with another {' and '.join(changed)}. Give the same again to go on with it, or"
            " another OUTPUT, or delete it."
        )
    return plan


def _in_threads(work: Callable[[int], Any], numbers: range, bar: tqdm) -> Iterator[Any]:
    """`work` of each number, in their order; Pillow's work lets threads run side by side."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(numbers), CHUNK):  # map() would hold all results of a large dataset at once
            for result in pool.map(work, numbers[start : start + CHUNK]):
                bar.update()
                yield result


def _plan(source: NumberedImages, asked: Request) -> Plan:
    """Read every image once; raises ValueError with all that is wrong with them."""

    def look(i: int) -> tuple[bool, tuple[int, int], Extrema | None] | str:
        try:
            image = source.read(i)
            seen = extrema(image)
            to_uint8(image, 3, {} if seen is None else {seen.type: seen.scale})
        except Exception as error:  # of hostile files, too: whatever it is, it is named
            return f"{source.names[i]}: {error or type(error).__name__}"
        return is_grey(image), size_of(image), seen

    count, faults, grey, ranges, sizes = len(source.names), [], True, Ranges(), {}  # numbers of the images of a size
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
        raise ValueError(f"the images have {len(sizes)} sizes, as {' and '.join(examples[:2])}; give --resolution.")
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
            raise ValueError(f"{source.names[i]} can't be read any more: {error}") from error
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
    """Say in `folder`/README.md what the dataset `name` is, unless there is one."""
    if not (folder / "README.md").exists():
        classes = f" in {len(plan.classes)} classes" if plan.classes else ""
        how = f"resized by Lanczos' filter ({plan.asked.transform})" if plan.asked.resolution else "of their own size"
        channels, height, width = plan.shape
        text = CARD.format(name=name, channels=channels, height=height, width=width, classes=classes, how=how)
        (folder / "README.md").write_text(text, encoding="utf-8")
