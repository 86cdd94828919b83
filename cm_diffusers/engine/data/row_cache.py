"""Rows of tensors, such as latents and embeddings, computed once and kept in files.

A folder holds shards of `SHARD` rows in order, as safetensors with floats in 16 bits. A shard exists only when it is
complete, so a stopped call continues with the missing ones, and several processes share the shards. The name of the
folder is a digest of everything that made the rows: rows of other data or networks are never read.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from cm_diffusers.engine.files import written_aside


SHARD = 1024  # rows in a file


class RowCache:
    """Rows of named tensors, by index. Call `fill` in all processes, wait for all of them, and then read `rows`.

    Args:
        folder: where caches are kept; each has a folder of its own in it.
        key: digest of everything that determines the rows, with their number.
        count: N, the number of rows.
        make: computes tensors (n, ...) by name for a range of n indices; None if the cache is full.
        rank: number of this process, from 0.
        world: number of processes; each makes every `world`-th shard.
        batch_size: number of rows that are made at once.
        say: receives a line about a damaged shard.
        show_progress: show a bar.
        desc: what happens, for the bar and messages.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        count: int,
        make: Callable[[range], dict[str, Tensor]] | None,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 64,
        say: Callable[[str], None] = print,
        show_progress: bool = False,
        desc: str = "Making rows",
    ):
        self.folder, self.key, self.count, self.make = folder / key[:16], key, count, make
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self.say, self.show_progress, self.desc = say, show_progress, desc
        self._opened: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def fill(self) -> int:
        """Make this process's missing shards. Returns the number of rows it made.

        Raises:
            OSError: a shard can't be written; the message names the file.
            ValueError: a row has a value that is not finite in 16 bits.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = range(self.rank, -(-self.count // SHARD), self.world)
        missing = [shard for shard in shards if not self._is_whole(shard)]
        total = sum(len(self._rows_of(shard)) for shard in missing)
        with tqdm(desc=self.desc, total=total, disable=not (self.show_progress and total), leave=False) as bar:
            for shard in missing:
                self._write(shard, bar)
        return total

    def rows(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The rows (B, ...) with these B `indices`, by name. Floats are float32.

        Raises:
            OSError: a shard is missing.
        """
        indices = torch.as_tensor(indices)
        shards, found = indices // SHARD, {}
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero()[:, 0]
            for name, tensor in self._read(shard).items():
                part = tensor[indices[here] % SHARD]
                part = part.float() if part.is_floating_point() else part
                if name not in found:
                    found[name] = part.new_empty(len(indices), *part.shape[1:])
                found[name][here] = part
        return found

    def _rows_of(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _write(self, shard: int, bar: tqdm) -> None:
        rows, file, parts = self._rows_of(shard), self._file(shard), []
        for start in range(rows.start, rows.stop, self.batch_size):
            batch = range(start, min(start + self.batch_size, rows.stop))
            parts.append({name: self._stored(tensor, batch) for name, tensor in self.make(batch).items()})
            bar.update(len(batch))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        with written_aside(file) as aside:
            save_file(tensors, aside, {"count": str(len(rows)), "check": _checksum(tensors)})

    def _stored(self, tensor: Tensor, rows: range) -> Tensor:
        """A tensor as it is kept: on the CPU, contiguous, floats in 16 bits."""
        kept = tensor.to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        if not kept.isfinite().all():
            raise ValueError(
                f"{self.desc}: rows {rows.start} to {rows.stop - 1} hold values that are not finite in 16 bits. Check"
                " the weights of the network that makes them."
            )
        return kept

    def _read(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, memory-mapped."""
        if shard not in self._opened:
            with safe_open(self._file(shard), "pt") as file:
                self._opened[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._opened[shard]

    def _is_whole(self, shard: int) -> bool:
        file = self._file(shard)
        if not file.exists():
            return False
        try:
            with safe_open(file, "pt") as opened:
                head = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if head["count"] != str(len(self._rows_of(shard))) or head["check"] != _checksum(tensors):
                raise ValueError("its checksum differs")
            return True
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            self.say(f"WARNING: {file} is damaged ({error}); its rows are computed again.")
            return False


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(_bytes_of(tensor), found)
    return str(found)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digest_of_network(network: nn.Module) -> str:
    """The SHA-256 of the config and weights of a diffusers or transformers network, in hexadecimal digits.

    Args:
        network: the network. Where it was loaded from does not count.
    """
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    config = {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(network.state_dict().items()):
        found.update(f"{name} {value.dtype} {hashlib.sha256(_bytes_of(value)).hexdigest()}".encode())
    return found.hexdigest()
