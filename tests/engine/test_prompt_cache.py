"""Embeddings of prompts in files: equal to fresh ones, shared by processes, continued after a stop."""

import pytest
import torch

from cm_diffusers.engine.data import row_cache
from cm_diffusers.engine.saved.text import encode_prompts, free_encoders
from cm_diffusers.engine.text.prompt_cache import PromptCache
from cm_diffusers.toys.shapes import prompts
from tests.helpers.tiny_text import PIPELINES


PROMPTS = prompts()[::180]  # 11 of them


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD", 4)


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def assert_rows(cache, pipe, indices):
    found, expected = cache.rows(indices), encode_prompts(pipe, [PROMPTS[i] for i in indices])
    assert found.entries.keys() == expected.entries.keys() and found.nulls.keys() == expected.nulls.keys()
    for part, other in ((found.entries, expected.entries), (found.nulls, expected.nulls)):
        for name, value in part.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-3)  # 16 bits


def test_rows_are_those_of_fresh_embeddings_and_the_encoders_can_leave(tmp_path, pipe):
    cache = PromptCache(tmp_path, pipe, PROMPTS, batch_size=3)
    assert cache.encode() == len(PROMPTS) and cache.encode() == 0
    assert len(list(cache.folder.iterdir())) == 3
    assert_rows(cache, pipe, [0, 10, 4, 4, 7])
    rows = cache.rows([10])
    free_encoders(pipe)
    assert torch.equal(cache.rows([10]).entries["text"], rows.entries["text"])


def test_processes_share_the_shards_and_a_stopped_call_continues(tmp_path):
    pipe = PIPELINES["sd"]()
    parts = [PromptCache(tmp_path, pipe, PROMPTS, rank, 2) for rank in range(2)]
    assert [part.encode() for part in parts] == [7, 4]
    assert_rows(parts[0], pipe, range(len(PROMPTS)))
    (parts[0].folder / "00001.safetensors").unlink()  # as if the call had stopped before it
    assert PromptCache(tmp_path, pipe, PROMPTS).encode() == 4


def test_a_damaged_shard_is_said_and_encoded_again(tmp_path):
    pipe, said = PIPELINES["sd"](), []
    cache = PromptCache(tmp_path, pipe, PROMPTS, say=said.append)
    cache.encode()
    file = cache.folder / "00002.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    said.clear()
    assert cache.encode() == 3 and "00002.safetensors is damaged" in said[0]
    assert_rows(cache, pipe, [8, 9, 10])


def test_other_prompts_encoders_and_contexts_have_another_cache(tmp_path):
    pipe = PIPELINES["sd"]()
    keys = {PromptCache(tmp_path, pipe, prompts).key for prompts in (PROMPTS, PROMPTS[1:], PROMPTS[::-1])}
    pipe.text_encoder.config._name_or_path = "moved/elsewhere"
    assert PromptCache(tmp_path, pipe, PROMPTS).key in keys
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).view(-1)[0] += 1
    keys.add(PromptCache(tmp_path, pipe, PROMPTS).key)
    pipe.tokenizer.model_max_length -= 1
    keys.add(PromptCache(tmp_path, pipe, PROMPTS).key)
    assert len(keys) == 5


def test_a_full_disk_names_the_file_and_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    cache = PromptCache(tmp_path, PIPELINES["sd"](), PROMPTS)
    monkeypatch.setattr(row_cache, "save_file", full)
    with pytest.raises(OSError, match="00000.safetensors"):
        cache.encode()
    assert list(cache.folder.iterdir()) == []
