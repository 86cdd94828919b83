"""Webdataset shards: tar files in which members of one name, such as 00012.jpg and 00012.cls, form a sample.

The datasets library reads them. They are given as

- a tar file or a folder of tar files,
- a pattern (shards/*.tar, shards/{000..031}.tar),
- a pattern on the Hub (hf://datasets/user/name/*.tar).
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
    """Return whether a name is a pattern of shards, or the address of shards on the Hub."""
    return name.lower().endswith(KINDS) and (name.startswith(ON_THE_HUB) or bool(re.search(r"[*?[{]", name)))


def is_shard(path: Path) -> bool:
    """Return whether a file is a shard by its name. An archive of CIFAR-10 is not."""
    return path.name.lower().endswith(KINDS) and not path.name.startswith("cifar-10")


def find_shards(name: str | Path) -> list[Path]:
    """Return the shards of a file, folder or pattern in natural order.

    Raises:
        ValueError: no file matches.
    """
    if Path(name).is_file():
        return [Path(name)]
    if Path(name).is_dir():
        found = [path for path in Path(name).rglob("*") if path.is_file() and is_shard(path)]
    else:
        found = [Path(file) for pattern in _unfolded(str(name)) for file in glob.glob(pattern)]
    if not found:
        raise ValueError(f"no file matches {str(name)!r}. Check the path and the pattern.")
    return sorted(set(found), key=lambda path: natural_key(str(path)))


def _unfolded(pattern: str) -> list[str]:
    """Expand braces of numbers in a pattern: {000..011} becomes 000, 001 and so on."""
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
    """Load the samples of shards, with images not decoded. Each kind of member is a column, such as "jpg" and "cls".

    Args:
        name: a file, a folder or a pattern, here or on the Hub.
        split: "train", the only split of local shards.
        streaming: return a stream.
        say: receives a line on what was read.

    Raises:
        ValueError: no file matches, the first shard is empty, or `split` is not "train".
    """
    if str(name).startswith(ON_THE_HUB):
        return datasets.load_dataset("webdataset", data_files={split: str(name)}, split=split, streaming=streaming)
    files = find_shards(name)
    with tarfile.open(files[0]) as first:
        if first.next() is None:
            raise ValueError(f"{files[0]} holds no samples. Remove it, or write it again.")
    if split != "train":
        raise ValueError(
            f"all shards belong to the split train, not {split!r}. Use --split train, and give a pattern of the shards"
            " that you mean."
        )
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
