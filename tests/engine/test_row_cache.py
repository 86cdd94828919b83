"""Rows of tensors in files: equal to fresh ones, shared by processes, continued after a stop, and safe."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError

from cm_diffusers.engine.data import row_cache
from cm_diffusers.engine.data.row_cache import RowCache, digest_of_network
from cm_diffusers.engine.files import explain


COUNT = 11  # in shards of 4, 4 and 3


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD", 4)


def row(index):
    generator = torch.Generator().manual_seed(int(index))
    return {"x": torch.randn(2, 3, generator=generator), "n": torch.tensor([int(index), 2**40])}


def rows_of(indices):
    parts = [row(index) for index in indices]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def a_cache(folder, key="k" * 64, **settings):
    """A cache of `COUNT` rows, and the list of the ranges that it has made."""
    made = []

    def make(rows):
        made.append(rows)
        return rows_of(rows)

    return RowCache(folder, key, COUNT, make, **{"batch_size": 3, **settings}), made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_rows(cache, indices):
    found, expected = cache.rows(indices), rows_of(indices)
    assert found.keys() == expected.keys() and found["x"].dtype == torch.float32
    torch.testing.assert_close(found["x"], expected["x"], rtol=2**-11, atol=2**-25)  # 16 bits
    assert torch.equal(found["n"], expected["n"])


def test_rows_are_the_computed_ones_to_16_bits(tmp_path):
    cache, made = a_cache(tmp_path)
    assert len(cache) == COUNT and cache.fill() == COUNT and cache.fill() == 0
    assert made == [range(0, 3), range(3, 4), range(4, 7), range(7, 8), range(8, 11)]
    assert names(cache.folder) == [f"0000{shard}.safetensors" for shard in range(3)]
    assert_rows(cache, range(COUNT))
    assert_rows(cache, [10, 0, 4, 4, 7])
    assert_rows(cache, torch.tensor([9]))


def test_rows_are_mapped_into_memory_and_not_read_whole(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list mapped files")
    cache, _ = a_cache(tmp_path)
    cache.fill()
    cache = a_cache(tmp_path)[0]
    cache.rows([5])
    mapped = [name for name in names(cache.folder) if str(cache.folder / name) in maps.read_text()]
    assert mapped == ["00001.safetensors"]


def test_processes_share_the_shards(tmp_path):
    parts = [a_cache(tmp_path, rank=rank, world=2)[0] for rank in range(2)]
    assert [part.fill() for part in parts] == [7, 4] and [part.fill() for part in parts] == [0, 0]
    whole = a_cache(tmp_path / "alone")[0]
    whole.fill()
    for part in parts:
        assert_rows(part, range(COUNT))
    assert names(parts[0].folder) == names(whole.folder)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_is_stopped_half_way_continues_with_the_missing_shards(tmp_path, fault):
    cache, made = a_cache(tmp_path)
    make, cache.make = cache.make, lambda rows: make(rows) if rows.start < 7 else (_ for _ in ()).throw(fault())
    with pytest.raises(fault):
        cache.fill()
    assert names(cache.folder) == ["00000.safetensors"]
    cache, made = a_cache(tmp_path)
    assert cache.fill() == 7 and made[0] == range(4, 7)
    assert_rows(cache, range(COUNT))


@pytest.mark.parametrize("way", ["cut", "a changed byte", "empty", "other rows"])
def test_a_damaged_shard_is_said_and_made_again(tmp_path, way):
    said = []
    cache, made = a_cache(tmp_path, say=said.append)
    cache.fill()
    file = cache.folder / "00001.safetensors"
    content = bytearray(file.read_bytes())
    if way == "other rows":
        content = (cache.folder / "00002.safetensors").read_bytes()  # fewer of them
    elif way == "a changed byte":
        content[-1] ^= 1
    file.write_bytes({"cut": content[:-3], "empty": b""}.get(way, content))
    cache, made = a_cache(tmp_path, say=said.append)
    assert cache.fill() == 4 and made == [range(4, 7), range(7, 8)]
    assert len(said) == 1 and said[0].startswith(f"WARNING: {file} is damaged (")
    assert_rows(cache, range(COUNT))


def test_another_key_is_another_cache(tmp_path):
    for number, key in enumerate(("a" * 64, "b" * 64)):
        cache, _ = a_cache(tmp_path, key)
        assert cache.fill() == COUNT and len(names(tmp_path)) == number + 1


def test_a_full_disk_names_the_file_and_the_same_call_continues(tmp_path, monkeypatch):
    save, saved = row_cache.save_file, []

    def full(tensors, file, head):
        saved.append(file)
        if len(saved) == 2:
            file.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, file, head)

    cache, _ = a_cache(tmp_path)
    monkeypatch.setattr(row_cache, "save_file", full)
    with pytest.raises(OSError) as caught:
        cache.fill()
    line = explain(caught.value)
    assert line.startswith(f"{cache.folder / '00001.safetensors'}: No space left on device.")
    assert "the same command again, which continues" in line
    assert names(cache.folder) == ["00000.safetensors"]
    assert cache.fill() == 7
    assert_rows(cache, range(COUNT))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_16_bits_do_not_hold_are_refused(tmp_path, value):
    cache = RowCache(tmp_path, "k", 8, lambda rows: {"x": torch.full((len(rows),), value)}, desc="Encoding images")
    with pytest.raises(ValueError, match="Encoding images: rows 0 to 3 hold values that are not finite in 16 bits"):
        cache.fill()
    assert names(cache.folder) == []


def test_a_missing_shard_is_named(tmp_path):
    cache, _ = a_cache(tmp_path)
    cache.fill()
    (cache.folder / "00002.safetensors").unlink()
    with pytest.raises(OSError, match="00002.safetensors"):
        cache.rows([10])


def test_the_digest_of_a_network_depends_on_its_weights_and_config_alone():
    config = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    config |= {"norm_num_groups": 2, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}

    def network(**other):
        torch.manual_seed(0)
        return UNet2DModel(**config, **other)

    moved = network()
    moved.register_to_config(_name_or_path="elsewhere")
    changed = network()
    with torch.no_grad():
        changed.conv_out.bias[0] += 1e-3
    others = [changed, network(norm_eps=1e-4), network().bfloat16()]
    assert digest_of_network(network()) == digest_of_network(moved)
    assert len({digest_of_network(other) for other in (network(), *others)}) == 4
