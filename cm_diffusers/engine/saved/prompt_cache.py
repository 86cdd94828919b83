"""Embeddings of prompts, computed once and kept in files, so that the text encoders can leave memory.

A folder holds shards of `SHARD` prompts in order, as safetensors with 16-bit floats. A shard exists only when it is
complete, so a stopped call continues with the missing ones, and several processes share the shards. The name of the
folder is a digest of everything that made the embeddings: other prompts or other encoders never find them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.files import naming, written_aside
from cm_diffusers.engine.saved.text import PARTS, encode_prompts


SHARD = 1024  # prompts in a file
NULL = "null "  # before the names of null rows in a file


class PromptCache:
    """The conditions of prompts, by index.

    Args:
        folder: where caches are kept; each has a folder of its own in it.
        pipeline: a text-to-image pipeline with its tokenizers and encoders.
        prompts: N prompts.
        rank: which of the processes this is.
        world: number of processes; each encodes every `world`-th shard.
        batch_size: number of prompts that are encoded at once.
        say: receives a line about a damaged shard.

    Call `encode` in all processes, wait for all of them, and then read rows.
    """

    def __init__(
        self,
        folder: Path,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        rank: int = 0,
        world: int = 1,
        batch_size: int = 64,
        say: Callable[[str], None] = print,
    ):
        self.pipeline, self.prompts, self.rank, self.world = pipeline, list(prompts), rank, world
        self.batch_size, self.say = batch_size, say
        self.folder = folder / made_by(pipeline, self.prompts)[:16]
        self._open: dict[int, Any] = {}

    def encode(self) -> int:
        """Encode this process's missing shards. Returns how many prompts it encoded.

        Raises:
            OSError: a shard can't be written; the message names the file.
        """
        count = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard in range(self.rank, -(-len(self.prompts) // SHARD), self.world):
            file = self._file(shard)
            prompts = self.prompts[shard * SHARD : (shard + 1) * SHARD]
            if self._is_whole(file, len(prompts)):
                continue
            parts = [
                encode_prompts(self.pipeline, prompts[start : start + self.batch_size])
                for start in range(0, len(prompts), self.batch_size)
            ]
            condition = parts[0].joined(*parts[1:])
            tensors = {name: _stored(entry) for name, entry in condition.entries.items()}
            tensors |= {NULL + name: _stored(null) for name, null in condition.nulls.items()}
            with naming(file), written_aside(file) as aside:
                save_file(tensors, aside, {"count": str(len(prompts))})
            count += len(prompts)
        return count

    def rows(self, indices: Sequence[int]) -> Condition:
        """The condition of the prompts with these `indices`, float32, with its null rows."""
        pieces: dict[str, list[Tensor]] = {}
        for index in indices:
            file = self._opened(index // SHARD)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if not name.startswith(NULL):
                    pieces.setdefault(name, []).append(file.get_slice(name)[index % SHARD])
        file = self._opened(0)
        nulls = {name[len(NULL) :]: file.get_tensor(name).float() for name in file.keys() if name.startswith(NULL)}  # noqa: SIM118
        return Condition({name: torch.stack(rows).float() for name, rows in pieces.items()}, nulls)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _opened(self, shard: int) -> Any:
        """The shard, memory-mapped."""
        if shard not in self._open:
            self._open[shard] = safe_open(self._file(shard), "pt")
        return self._open[shard]

    def _is_whole(self, file: Path, count: int) -> bool:
        if not file.exists():
            return False
        try:
            with safe_open(file, "pt") as opened:
                return opened.metadata()["count"] == str(count)
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            self.say(f"WARNING: {file} is damaged ({error}); its prompts are encoded again.")
            return False


def _stored(tensor: Tensor) -> Tensor:
    """Contiguous, floats in 16 bits."""
    return tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()


def made_by(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> str:
    """A digest of the prompts, and of the tokenizers' and encoders' settings and weights."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode())
    for name in PARTS:
        part = getattr(pipeline, name, None)
        if isinstance(part, nn.Module):
            digest.update(part.config.to_json_string().encode())
            for key, value in sorted(part.state_dict().items()):
                data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                digest.update(f"{name} {key} {hashlib.sha256(data).hexdigest()}".encode())
        elif part is not None:
            digest.update(f"{name} {sorted(part.get_vocab().items())} {part.model_max_length}".encode())
    return digest.hexdigest()
