"""WebDataset shards for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(value, size=(8, 8)):
    return Image.fromarray(np.full(size, value, np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, values):
    """Write a shard of 8x8 grey images to `path`, one per value; its class is the value modulo 3. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, value in enumerate(values):
            parts = {"png": png(picture(value)), "cls": str(value % 3).encode(), "json": json.dumps({"n": i}).encode()}
            for kind, content in parts.items():
                member = tarfile.TarInfo(f"{path.stem}_{i:04d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path
