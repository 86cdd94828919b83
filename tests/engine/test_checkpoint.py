"""Checkpoints: the newest one is read back unchanged, or else the one before, whatever happens in between."""

import builtins
import json
import os
import random
import resource
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import cm_diffusers.engine.checkpoint as checkpoint_module
from cm_diffusers.engine.checkpoint import (
    DamagedCheckpoint,
    NotFinite,
    copy_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    newest_state,
    save_checkpoint,
    set_aside_newer,
)


FILES = ["ema_0.99.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def contents(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(4, generator=generator)},
        "optimizer": {"0.step": torch.tensor(float(step)), "0.exp_avg": torch.randn(3, 4, generator=generator)},
        "ema_0.99": {"w": torch.randn(3, 4, generator=generator).bfloat16(), "n": torch.arange(step + 1)},
    }
    return tensors, {"step_of_state": step, "words": ["a", None, 0.1 + 0.2], "nested": {"x": [1, [2]]}}


def write(root, *steps, keep=2):
    for step in steps:
        save_checkpoint(root, step, *contents(step), keep=keep)


def assert_holds(checkpoint, step):
    tensors, state = contents(step)
    assert checkpoint.step == step and checkpoint.state == state and checkpoint.tensors.keys() == tensors.keys()
    for group, values in tensors.items():
        assert checkpoint.tensors[group].keys() == values.keys()
        for key, value in values.items():
            read = checkpoint.tensors[group][key]
            assert read.dtype == value.dtype and torch.equal(read, value)


def folders(root):
    return sorted(path.name for path in root.iterdir())


def test_what_was_saved_is_read_back(tmp_path):
    write(tmp_path, 3)
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert_holds(checkpoint, 3)
    assert faults == [] and folders(tmp_path / "checkpoint-3") == FILES


def test_tensors_that_are_not_contiguous_are_saved_by_value(tmp_path):
    value = torch.arange(12.0).reshape(3, 4).T
    save_checkpoint(tmp_path, 1, {"model": {"w": value, "v": torch.randn(3, requires_grad=True)}}, {})
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint-1").tensors["model"]["w"], value)


@pytest.mark.parametrize("exists", [True, False])
def test_where_nothing_was_written_there_is_no_checkpoint(tmp_path, exists):
    assert newest_checkpoint(tmp_path if exists else tmp_path / "missing") == (None, [])


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_stay_by_number_and_not_by_name(tmp_path, keep):
    write(tmp_path, 8, 9, 10, 11, 100, keep=keep)
    assert sorted(folders(tmp_path)) == sorted([f"checkpoint-{s}" for s in (8, 9, 10, 11, 100)][-keep:])
    assert_holds(newest_checkpoint(tmp_path)[0], 100)


def test_at_least_two_are_kept(tmp_path):
    with pytest.raises(AssertionError):
        write(tmp_path, 1, keep=1)


def test_an_unfinished_save_is_passed_over_and_swept(tmp_path):
    write(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".tmp-6")
    (tmp_path / ".tmp-6" / "model.safetensors").write_bytes(b"half")
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert_holds(checkpoint, 3)
    assert faults == []
    write(tmp_path, 9)
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-9"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", ["model", "optimizer", "ema_0.99"])
def test_what_is_not_finite_is_not_written(tmp_path, group, value):
    write(tmp_path, 3, 6)
    tensors, state = contents(9)
    name, broken = next((name, tensor) for name, tensor in tensors[group].items() if tensor.ndim)
    broken.view(-1)[-1] = value
    with pytest.raises(NotFinite, match=f"{name} of {group} is not finite"):
        save_checkpoint(tmp_path, 9, tensors, state)
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-6"]


# --- damage --------------------------------------------------------------------------------------------------------


def remove(path, rng, other):
    path.unlink()


def empty(path, rng, other):
    path.write_bytes(b"")


def truncate(path, rng, other):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def lengthen(path, rng, other):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path, rng, other):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def swap(path, rng, other):
    path.write_bytes(other.read_bytes())


def make_folder(path, rng, other):
    path.unlink()
    path.mkdir()


DAMAGES = [(remove, 1), (empty, 1), (truncate, 12), (lengthen, 1), (flip_a_bit, 40), (swap, 1), (make_folder, 1)]


@pytest.mark.parametrize("damage, times", DAMAGES, ids=lambda d: getattr(d, "__name__", d))
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_checkpoint_before_is_used(tmp_path, name, damage, times):
    write(tmp_path, 3, 6)
    sound = (tmp_path / "checkpoint-6" / name).read_bytes()
    rng = random.Random(f"{name} {damage.__name__}")
    for _ in range(times):
        path = tmp_path / "checkpoint-6" / name
        damage(path, rng, tmp_path / "checkpoint-3" / name)
        checkpoint, faults = newest_checkpoint(tmp_path)
        assert_holds(checkpoint, 3)
        assert len(faults) == 1 and "checkpoint-6" in faults[0]
        assert name in faults[0] or (name == "manifest.json" and "step 3" in faults[0])
        if path.is_dir():
            path.rmdir()
        path.write_bytes(sound)
        assert_holds(newest_checkpoint(tmp_path)[0], 6)


def test_a_checkpoint_under_another_name_is_not_believed(tmp_path):
    write(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-9")
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert checkpoint.step == 3 and "step 3" in faults[0]


def test_where_all_are_damaged_nothing_is_started_anew(tmp_path):
    write(tmp_path, 3, 6)
    for step in (3, 6):
        flip_a_bit(tmp_path / f"checkpoint-{step}" / "model.safetensors", random.Random(step), None)
    with pytest.raises(
        DamagedCheckpoint, match="(?s)checkpoint-6: model.safetensors.*checkpoint-3: model.safetensors"
    ):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("step", [4, 6, 8, 9, 10])
def test_damaged_checkpoints_that_were_passed_over_push_no_sound_one_out(tmp_path, step):
    write(tmp_path, 3, 6, 9, keep=3)
    for damaged in (6, 9):
        empty(tmp_path / f"checkpoint-{damaged}" / "state.json", None, None)
    set_aside_newer(tmp_path, newest_checkpoint(tmp_path)[0].step)
    write(tmp_path, step)
    assert_holds(newest_checkpoint(tmp_path)[0], step)
    assert_holds(load_checkpoint(tmp_path / "checkpoint-3"), 3)
    assert folders(tmp_path)[2:] == ["damaged-checkpoint-6", "damaged-checkpoint-9"]
    write(tmp_path, step + 3)
    assert_holds(load_checkpoint(tmp_path / f"checkpoint-{step}"), step)


def as_a_pipe(path):
    os.mkfifo(path)


def as_a_link(path):
    path.symlink_to(path.parent.parent / "checkpoint-3" / path.name)


def as_a_dangling_link(path):
    path.symlink_to("nowhere")


def as_a_link_to_itself(path):
    path.symlink_to(path.name)


def as_a_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def as_a_sparse_file(path):
    with open(path, "wb") as file:
        file.truncate(1 << 42)


NO_FILES = {
    as_a_pipe: "a pipe",
    as_a_link: "a link",
    as_a_dangling_link: "a link",
    as_a_link_to_itself: "a link",
    as_a_socket: "a socket",
    as_a_sparse_file: "4398046511104 bytes",
}


@pytest.mark.parametrize("make", NO_FILES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_what_is_no_file_is_named_and_neither_waited_for_nor_read(tmp_path, monkeypatch, make, name):
    write(tmp_path, 3, 6)
    monkeypatch.chdir(tmp_path / "checkpoint-6")  # the path of a socket must be short
    Path(name).unlink()
    make(Path(name))
    checkpoint, faults = newest_checkpoint(tmp_path)
    assert_holds(checkpoint, 3)
    assert len(faults) == 1 and f"checkpoint-6: {name}" in faults[0] and NO_FILES[make] in faults[0]
    assert (newest_state(tmp_path)["step_of_state"] == 6) == (name == "model.safetensors")
    set_aside_newer(tmp_path, 3)
    write(tmp_path, 9)
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-9", "damaged-checkpoint-6"]


def as_a_file_of_that_name(path, target):
    path.write_text("x")


def as_a_link_to_a_folder(path, target):
    path.symlink_to(target)


def as_a_link_to_nothing(path, target):
    path.symlink_to(target / "nowhere")


@pytest.mark.parametrize("make", [as_a_file_of_that_name, as_a_link_to_a_folder, as_a_link_to_nothing])
@pytest.mark.parametrize("step", [1, 6, 9])
def test_a_checkpoint_that_is_no_folder_is_rotated_and_set_aside_as_others_are(tmp_path, make, step):
    root, target = tmp_path / "run", tmp_path / "target"
    write(root, 3)
    shutil.copytree(root / "checkpoint-3", target)
    make(root / f"checkpoint-{step}", target)
    (root / f"damaged-checkpoint-{step}").write_text("of an earlier time")
    (root / ".tmp-6").symlink_to(target)
    checkpoint, _ = newest_checkpoint(root)
    assert_holds(checkpoint, 3)
    set_aside_newer(root, 3)
    assert (root / f"damaged-checkpoint-{step}").is_symlink() == (step > 3 and "link" in make.__name__)
    for later in (6, 9, 12):
        write(root, later)
        assert_holds(newest_checkpoint(root)[0], later)
    assert [name for name in folders(root) if "damaged" not in name] == ["checkpoint-12", "checkpoint-9"]
    assert_holds(load_checkpoint(target), 3)


def test_copies_are_made_of_checkpoints_that_verify_alone(tmp_path):
    write(tmp_path, 3)
    copy_checkpoint(tmp_path / "checkpoint-3", tmp_path / "copy", {"a": 1})
    assert load_checkpoint(tmp_path / "copy").state["config"] == {"a": 1}
    for damage, name in ((empty, "state.json"), (truncate, "manifest.json"), (flip_a_bit, "state.json")):
        write(tmp_path, 3)
        damage(tmp_path / "checkpoint-3" / name, random.Random(0), None)
        with pytest.raises(DamagedCheckpoint, match=name):
            copy_checkpoint(tmp_path / "checkpoint-3", tmp_path / f"copy {name} {damage.__name__}", {})
    assert not list(tmp_path.glob("copy *"))


@pytest.mark.parametrize("raw", [b"", b"[]", b"3", b"[" * 100_000, b'{"config": 1}', b"\xff\xfe"])
def test_a_state_that_does_not_verify_is_passed_over(tmp_path, raw):
    write(tmp_path, 3, 6)
    (tmp_path / "checkpoint-6" / "state.json").write_bytes(raw)
    assert newest_state(tmp_path) == contents(3)[1]
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert newest_state(tmp_path) is None


def test_a_state_that_does_not_verify_says_nothing_of_soundness(tmp_path):
    """The run diverged after step 3, so it resumes from that step's checkpoint."""
    for step, sound in ((3, True), (6, False), (9, False), (12, False)):
        if step == 12:
            empty(tmp_path / "checkpoint-9" / "state.json", None, None)
        tensors, state = contents(step)
        save_checkpoint(tmp_path, step, tensors, state | {"sound": sound})
    assert folders(tmp_path) == ["checkpoint-12", "checkpoint-3", "checkpoint-9"]


def test_a_copy_to_where_nothing_can_be_linked_holds_the_same(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "near", 3)
    copy_checkpoint(tmp_path / "near" / "checkpoint-3", tmp_path / "far" / "checkpoint-3", {"a": 1})
    copied = load_checkpoint(tmp_path / "far" / "checkpoint-3")
    assert copied.state.pop("config") == {"a": 1}
    assert_holds(copied, 3)
    assert_holds(load_checkpoint(tmp_path / "near" / "checkpoint-3"), 3)


def test_a_step_that_is_set_aside_again_takes_the_place_of_the_first(tmp_path):
    for marks in (["first"], []):
        write(tmp_path, 3, 6)
        (tmp_path / "checkpoint-6" / "first").touch() if marks else None
        set_aside_newer(tmp_path, 3)
        assert folders(tmp_path) == ["checkpoint-3", "damaged-checkpoint-6"]
        assert folders(tmp_path / "damaged-checkpoint-6") == sorted([*FILES, *marks])


# --- faults while saving -------------------------------------------------------------------------------------------


def fails_at(function, k, calls):
    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == k:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return failing


FAULTS = {
    "os.rename": (os, "rename"),
    "os.fsync": (os, "fsync"),
    "os.open": (os, "open"),
    "shutil.rmtree": (shutil, "rmtree"),
    "Path.mkdir": (Path, "mkdir"),
    "open": (builtins, "open"),
    "save_tensors": (checkpoint_module, "save_tensors"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_call_leaves_a_sound_checkpoint(tmp_path, monkeypatch, name):
    holder, attribute = FAULTS[name]
    failures = 0
    for k in range(1, 40):
        root, calls = tmp_path / str(k), []
        write(root, 3, 6)
        shutil.copytree(root / "checkpoint-6", root / ".tmp-9")  # a leftover for rmtree
        with monkeypatch.context() as patch:
            patch.setattr(holder, attribute, fails_at(getattr(holder, attribute), k, calls))
            try:
                write(root, 9)
                allowed = [9]
            except OSError:
                failures += 1
                allowed = [6, 9]
        checkpoint, faults = newest_checkpoint(root)
        assert_holds(checkpoint, checkpoint.step)
        assert checkpoint.step in allowed and faults == []
        assert len([load_checkpoint(path) for path in root.glob("checkpoint-*")]) >= 2
        write(root, 12)
        assert folders(root) == sorted(["checkpoint-12", f"checkpoint-{checkpoint.step}"])
        if len(calls) < k:
            break
    read = 2 if name in ("os.open", "open") else 0  # the soundness check reads a manifest and a state
    assert failures + read == k - 1 >= 1  # every call of a save has failed once


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 300])
def test_where_the_disk_is_full_nothing_partial_stays(tmp_path, size):
    write(tmp_path, 3, 6)
    with file_size_limit(size), pytest.raises(OSError):
        write(tmp_path, 9)
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert_holds(newest_checkpoint(tmp_path)[0], 6)
    write(tmp_path, 9)
    assert_holds(newest_checkpoint(tmp_path)[0], 9)


# --- hostile files -------------------------------------------------------------------------------------------------


def forge(root, files=None, **changes):
    """A checkpoint whose manifest is consistent with its false claims."""
    write(root, 3)
    path = root / "checkpoint-3" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["files"] = manifest["files"] if files is None else files
    manifest |= changes
    manifest["digest"] = checkpoint_module._digest_of(manifest)
    path.write_text(json.dumps(manifest))
    return path.parent


def entry(data):
    return {"size": len(data), "sha256": checkpoint_module.digest(data)}


def test_a_forged_manifest_that_tells_the_truth_is_read(tmp_path):
    assert_holds(load_checkpoint(forge(tmp_path)), 3)


@pytest.mark.parametrize("absolute", [False, True])
def test_files_outside_the_checkpoint_are_not_read(tmp_path, absolute):
    secret = save({"w": torch.ones(2)})
    (tmp_path / "x.safetensors").write_bytes(secret)
    name = str(tmp_path / "x.safetensors") if absolute else "../x.safetensors"
    state = (json.dumps({}) + " ").encode()
    folder = forge(tmp_path, files={"state.json": entry(state), name: entry(secret)})
    (folder / "state.json").write_bytes(state)
    with pytest.raises(DamagedCheckpoint, match="not a file of the checkpoint"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "files",
    [[], "x", 3, {}, {"state.json": 1}, {"state.json": {}}, {"state.json": {"size": 1, "sha256": 0, "more": 1}}]
    + [{name: entry(b"")} for name in ("..", ".", "", "a\0b", "no such file", "manifest.json")],
)
def test_a_manifest_of_the_wrong_form_is_refused(tmp_path, files):
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(forge(tmp_path, files=files))


@pytest.mark.parametrize("changes", [{"format": 2}, {"format": None}, {"format": [1]}, {"step": 4}, {"step": [3]}])
def test_another_format_or_step_is_refused(tmp_path, changes):
    with pytest.raises(DamagedCheckpoint, match="format|step"):
        load_checkpoint(forge(tmp_path, **changes))


@pytest.mark.parametrize("raw", ["[" * 10**6, "null", "[]", "3", '"digest"', "{}", '{"digest": 1}', "\ud800"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, raw):
    folder = forge(tmp_path)
    (folder / "manifest.json").write_bytes(raw.encode(errors="surrogatepass"))
    with pytest.raises(DamagedCheckpoint, match="manifest.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name, content", [("state.json", b"[" * 10**6), ("state.json", b"{"), ("a.safetensors", b"no")]
)
def test_a_consistent_manifest_over_rubbish_is_refused(tmp_path, name, content):
    state = b"{}"
    folder = forge(tmp_path, files={"state.json": entry(state), name: entry(content)})
    (folder / "state.json").write_bytes(state)
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["checkpoint-", "checkpoint-x", "checkpoint-3-old", "checkpoint-3.zip", "xcheckpoint-4"]
)
def test_other_folders_are_no_checkpoints(tmp_path, name):
    write(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / name)
    assert newest_checkpoint(tmp_path)[1] == []
    write(tmp_path, 6, 9)
    assert (tmp_path / name).exists()
