"""Shards of webdataset: tar files whose members of one name, as 00012.jpg and 00012.cls, are a sample.

The datasets library reads them. Shards are named by a tar file, a folder of them, a pattern (shards/*.tar,
shards/{000..031}.tar), or a pattern on the Hub (hf://datasets/user/name/*.tar).
"""

import glob
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from cm_diffusers.engine.data.listing import natural_key


KINDS = (".tar", ".tar.gz", ".tgz")
ON_THE_HUB = "hf://"
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def names_shards(name: str) -> bool:
    """Whether a name, of what is no file or folder here, is that of shards."""
    return name.lower().endswith(KINDS) and (name.startswith(ON_THE_HUB) or bool(re.search(r"[*?[{]", name)))


def is_shard(path: Path) -> bool:
    """Whether a file is a shard by its name, and not CIFAR-10's archive."""
    return path.name.lower().endswith(KINDS) and not path.name.startswith("cifar-10")


def find_shards(name: str | Path) -> list[Path]:
    """The files of a pattern or a folder, in natural order. Raises ValueError where there are none."""
    if Path(name).is_file():
        return [Path(name)]
    if Path(name).is_dir():
        found = [path for path in Path(name).rglob("*") if path.is_file() and is_shard(path)]
    else:
        found = [Path(file) for pattern in _unfolded(str(name)) for file in glob.glob(pattern)]
    if not found:
        raise ValueError("no file has such a name.")
    return sorted(set(found), key=lambda path: natural_key(str(path)))


def _unfolded(pattern: str) -> list[str]:
    """The patterns that braces of numbers stand for: {000..011} is 000, 001 and so on."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last = braces.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        part
        for number in numbers
        for part in _unfolded(f"{pattern[: braces.start()]}{number:0{len(first)}d}{pattern[braces.end() :]}")
    ]


def load_shards(
    name: str | Path, split: str, streaming: bool, say: Callable[[str], None] = lambda line: None
) -> datasets.Dataset | datasets.IterableDataset:
    """The samples of shards, images not decoded; members of a kind are a column, as "jpg" and "cls".

    Raises:
        ValueError: there are none, or `split` is not the only one, "train".
    """
    if str(name).startswith(ON_THE_HUB):
        return datasets.load_dataset("webdataset", data_files={split: str(name)}, split=split, streaming=streaming)
    files = find_shards(name)
    with tarfile.open(files[0]) as first:
        if first.next() is None:
            raise ValueError(f"{files[0]} holds no samples.")
    if split != "train":
        raise ValueError(f"shards are all of the split train, not {split!r}; name those that are meant.")
    marks = [(str(file), str(file.stat().st_size), str(file.stat().st_mtime_ns)) for file in files]
    listed = DataFilesDict({split: DataFilesList([os.path.abspath(file) for file in files], marks)})
    builder = WebDataset(data_files=listed, hash=datasets.fingerprint.Hasher.hash(marks))
    if streaming:
        rows = builder.as_streaming_dataset(split)
    else:
        builder.download_and_prepare()
        rows = builder.as_dataset(split)
    say(f"Read {_counted(files)} of webdataset{'' if streaming else f', {len(rows)} samples'}.")
    return rows


def _counted(files: Sequence[Path]) -> str:
    return f"the shard {files[0]}" if len(files) == 1 else f"{len(files)} shards, {files[0]} to {files[-1]}"
