"""Embeddings of prompts, computed once and kept in files, so that the text encoders can leave memory."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.core.conditions import Condition
from cm_diffusers.engine.data.row_cache import RowCache, digest_of_network
from cm_diffusers.engine.files import digest
from cm_diffusers.engine.saved.text import PARTS, encode_prompts, read_sizes, too_long, without_warnings


class PromptCache:
    """The conditions of prompts, by index. Call `encode` in all processes, wait for all of them, and then read rows.

    Args:
        folder: where caches are kept, as prompts/KEY and, for the null rows, null/KEY.
        pipeline: a text-to-image pipeline with its tokenizers and encoders.
        prompts: N prompts.
        rank: number of this process, from 0.
        world: number of processes; each encodes every `world`-th shard.
        batch_size: number of prompts that are encoded at once.
        say: receives lines on damaged shards, and on prompts that the encoder cuts.
        show_progress: show a bar.

    Attributes:
        key: digest of the prompts, the tokenizers and the encoders.
        caches: the files of the embeddings and of the null rows.
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
        show_progress: bool = False,
    ):
        self.pipeline, self.prompts, shared = pipeline, list(prompts), (rank, world, batch_size, say)
        self._is_main, self._say = rank == 0, say
        encoders = digest_of_encoders(pipeline)
        self.key = digest(json.dumps(self.prompts).encode(), encoders.encode())
        self._rows = RowCache(
            folder / "prompts", self.key, len(self.prompts), self._embed, *shared, show_progress, "Encoding prompts"
        )
        self._nulls = RowCache(folder / "null", encoders, 1, self._embed_null, *shared)
        self.folder, self.caches = self._rows.folder, [self._rows, self._nulls]

    def encode(self) -> int:
        """Encode this process's missing shards. Returns how many prompts it encoded.

        Raises:
            OSError: a shard can't be written; the message names the file.
        """
        with without_warnings():
            count = self._rows.fill()
            self._nulls.fill()
            cut = too_long(self.pipeline, self.prompts) if count and self._is_main else []
        if cut:
            context = self.pipeline.tokenizer.model_max_length
            self._say(
                f"WARNING: {len(cut)} of {len(self.prompts)} prompts have more than {context} tokens. The text encoder"
                f" cuts them, for example {cut[0]!r}."
            )
        return count

    def rows(self, indices: Sequence[int] | Tensor) -> Condition:
        """The condition of the prompts with these `indices`, float32, with its null rows.

        For SDXL, its sizes are those of uncropped pictures of the network's own size.
        """
        entries = self._rows.rows(indices)
        if "pooled" in entries:
            entries["sizes"] = read_sizes(self.pipeline, len(indices))
        return Condition(entries, self.nulls)

    @property
    def nulls(self) -> dict[str, Tensor]:
        """The null rows (...) by name, float32."""
        return {name: rows[0] for name, rows in self._nulls.rows([0]).items()}

    def _embed(self, rows: range) -> dict[str, Tensor]:
        entries = encode_prompts(self.pipeline, self.prompts[rows.start : rows.stop]).entries
        return {name: entry for name, entry in entries.items() if name != "sizes"}

    def _embed_null(self, rows: range) -> dict[str, Tensor]:
        return {name: null[None] for name, null in encode_prompts(self.pipeline, [""]).nulls.items()}


def digest_of_encoders(pipeline: DiffusionPipeline) -> str:
    """A digest of the settings and weights of a pipeline's tokenizers and text encoders."""
    facts = [f"zeros {pipeline.config.get('force_zeros_for_empty_prompt')}"]
    for name in PARTS:
        part = getattr(pipeline, name, None)
        if isinstance(part, nn.Module):
            facts.append(f"{name} {digest_of_network(part)}")
        elif part is not None:
            facts.append(f"{name} {sorted(part.get_vocab().items())} {part.model_max_length}")
    return digest(*(fact.encode() for fact in facts))
