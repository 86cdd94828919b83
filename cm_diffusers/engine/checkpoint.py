"""Checkpoints that survive a kill at any moment: safetensors and JSON, written aside, verified, never pickled.

A checkpoint is written to a hidden folder, each file is fsynced, a manifest with the SHA-256 of every file is added,
and the folder is renamed to `checkpoint-<step>`; only then are older ones deleted. The newest checkpoint is the newest
one that verifies.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cm_diffusers.engine.files import digest, fsync_folder, parse_json, read_plain, remove, why, write_file


FORMAT = 1
MANIFEST_BYTES = 1 << 20  # at most; a manifest names a few files
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written."""


class NotFinite(ValueError):
    """Tensors that no run can go on from; nothing was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: groups of tensors by name, and a JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `checkpoint-<step>` under `root` and delete all but the newest `keep` and the newest sound one.

    Args:
        root: the folder of checkpoints.
        step: the training step that it was taken after.
        tensors: groups of tensors; each group becomes a safetensors file.
        state: values that JSON can hold; "sound" says whether a run that diverged can go on from it (by default yes).
        keep: how many checkpoints stay, at least 2.

    Raises:
        NotFinite: a value is infinite or no number.
        OSError: it can't be written; what was there before is as it was.
    """
    assert keep >= 2
    for group, values in tensors.items():
        numbers = {name: value for name, value in values.items() if value.is_floating_point()}
        if not numbers or all(norm.isfinite() for norm in torch._foreach_norm(list(numbers.values()))):
            continue  # the norms are faster than the question to each value; their squares may overflow
        for name, value in numbers.items():
            if not value.isfinite().all():
                raise NotFinite(f"{name} of {group} is not finite")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):
        if leftover.name[5:].isdecimal():
            remove(leftover)
    folder = root / f".tmp-{step}"
    folder.mkdir()
    try:
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": {}}
        for group, values in tensors.items():
            plain = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            _add(folder, manifest, f"{group}.safetensors", save_tensors(plain))
        _add(folder, manifest, "state.json", json.dumps(dict(state), indent=1).encode())
        _seal(folder, manifest)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    final = root / f"checkpoint-{step}"
    remove(final)
    os.rename(folder, final)
    fsync_folder(root)
    paths = [path for _, path in list_checkpoints(root)]
    sound = next(filter(_says_sound, paths), None)
    for old in paths[keep:]:
        if old != sound:
            remove(old)
    return final


def newest_state(root: Path) -> dict[str, Any] | None:
    """The JSON state of the newest checkpoint whose state verifies, its tensors not read; None where there is none."""
    for _, path in list_checkpoints(root):
        try:
            return _read_state(path, _read_manifest(path))
        except DamagedCheckpoint:
            continue
    return None


def _says_sound(path: Path) -> bool:
    try:
        return _read_state(path, _read_manifest(path)).get("sound", True)
    except DamagedCheckpoint:
        return False


def _add(folder: Path, manifest: dict[str, Any], name: str, data: bytes) -> None:
    with ThreadPoolExecutor(1) as beside:  # neither hashing nor writing holds Python's lock
        found = beside.submit(digest, data)
        write_file(folder / name, data)
    manifest["files"][name] = {"size": len(data), "sha256": found.result()}


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return digest(json.dumps(manifest, sort_keys=True).encode())


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["digest"] = _digest_of(manifest)
    write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    fsync_folder(folder)


def copy_checkpoint(source: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Copy a checkpoint to `folder`, with `settings` in place of the run's own; tensors are linked if they can be.

    Raises DamagedCheckpoint, or FileNotFoundError where a file is missing, as when the run deletes it meanwhile.
    """
    manifest = _read_manifest(source)
    state = _read_state(source, manifest)
    folder.mkdir(parents=True)
    for name in manifest["files"].keys() - {"state.json"}:
        _check_name(name)
        try:
            os.link(source / name, folder / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / name, folder / name)
    _add(folder, manifest, "state.json", json.dumps({**state, "config": dict(settings)}, indent=1).encode())
    _seal(folder, manifest)


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, newest first."""
    found = [(int(m[1]), path) for path in root.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises DamagedCheckpoint, naming the file."""
    manifest = _read_manifest(path)
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"format {manifest.get('format')} is not the format {FORMAT} of this version")
    named = _NAME.fullmatch(path.name)
    if not isinstance(manifest.get("step"), int) or named and int(named[1]) != manifest["step"]:
        raise DamagedCheckpoint(f"the manifest is that of step {manifest.get('step')}")
    state = _read_state(path, manifest)
    try:
        others = {name: expected for name, expected in manifest["files"].items() if name != "state.json"}
        with ThreadPoolExecutor(2) as both:  # one reads while the other hashes
            reads = {name: both.submit(_read, path, name, **expected) for name, expected in others.items()}
        contents = {name: read.result() for name, read in reads.items()}
        tensors = {name.removesuffix(".safetensors"): load_tensors(data) for name, data in contents.items()}
    except (TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"it was not written by this library: {error!r}") from None
    return Checkpoint(int(manifest["step"]), tensors, state)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest without its digest, which it agrees with."""
    if not path.is_dir():
        raise DamagedCheckpoint("it is missing" if not os.path.lexists(path) else "it is not a folder")
    try:
        manifest = parse_json(read_plain(path / "manifest.json", limit=MANIFEST_BYTES, follow=False))
        expected = manifest.pop("digest")
        sound = expected == _digest_of(manifest) and isinstance(manifest["files"], dict)
    except FileNotFoundError:
        raise DamagedCheckpoint("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"manifest.json {why(error)}") from None
    if not sound:
        raise DamagedCheckpoint("manifest.json is damaged (its digest differs)")
    return manifest


def _read_state(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        state = parse_json(_read(path, "state.json", **manifest["files"]["state.json"]))
    except DamagedCheckpoint:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"state.json was not written by this library: {error!r}") from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint("state.json was not written by this library: it holds no names and values")
    return state


def _check_name(name: str) -> None:
    if Path(name).name != name:
        raise DamagedCheckpoint(f"the manifest names {name!r}, which is not a file of the checkpoint")


def _read(folder: Path, name: str, size: int, sha256: str) -> bytes:
    """A file of a checkpoint, verified."""
    _check_name(name)
    try:
        data = read_plain(folder / name, size, follow=False)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{name} {why(error)}") from None
    if digest(data) != sha256:
        raise DamagedCheckpoint(f"{name} was changed: its SHA-256 differs")
    return data


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None where none was ever written; and what is wrong with newer ones.

    Raises:
        DamagedCheckpoint: there are checkpoints, but none verifies.
    """
    faults = []
    for _, path in list_checkpoints(root):
        try:
            return load_checkpoint(path), faults
        except DamagedCheckpoint as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise DamagedCheckpoint(
            "No checkpoint verifies, and the run is not restarted from nothing: "
            + "; ".join(faults)
            + ". Restore one of them, or choose another --output_dir."
        )
    return None, []


def go_back_to(root: Path, name: str) -> str:
    """Set aside what is newer than the checkpoint called `name`; gives a line that says so.

    Raises:
        ValueError: there is none of the name, or it is damaged.
    """
    known = {path.name: step for step, path in list_checkpoints(root)}
    if name not in known:
        found = ", ".join(sorted(known, key=known.get)) or "none"
        raise ValueError(f"resume_from_checkpoint {name!r} is no checkpoint of {root}, which has {found}.")
    try:
        load_checkpoint(root / name)
    except DamagedCheckpoint as error:
        raise ValueError(f"resume_from_checkpoint {name!r} can't be read: {error}") from None
    set_aside_newer(root, known[name], "left")
    return f"The run goes back to {name}; newer checkpoints are kept as left-checkpoint-STEP."


def set_aside_newer(root: Path, step: int, why: str = "damaged") -> None:
    """Rename the checkpoints after `step` to `<why>-checkpoint-<step>`, so that they never count as ones to keep."""
    for number, path in list_checkpoints(root):
        if number > step:
            aside = root / f"{why}-{path.name}"
            remove(aside)
            os.rename(path, aside)
