"""Checkpoints that survive a kill at any moment: safetensors and JSON files, verified and never pickled.

A checkpoint is written in these steps:

1. Each file is written to a hidden folder and fsynced.
2. A manifest with the SHA-256 of every file is added.
3. The folder is renamed to `checkpoint-<step>`.
4. Older checkpoints are deleted.

Readers take the newest checkpoint that verifies.
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
MANIFEST_BYTES = 1 << 20  # size limit; a manifest names a few files
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files differ from those that were written."""


class NotFinite(ValueError):
    """Tensors with values that are not finite, from which no run can continue. Nothing was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Args:
        step: the training step after which it was saved.
        tensors: groups of tensors by the name of the group, then by the name of the tensor.
        state: the JSON state.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `checkpoint-<step>` under `root`, then delete old ones: the newest `keep` and the newest sound one stay.

    Args:
        root: the folder of the checkpoints.
        step: the training step after which it is saved.
        tensors: groups of tensors (any shape); each group becomes a safetensors file.
        state: values that JSON can hold. Its entry "sound" (default: true) tells whether a diverged run can continue
            from this checkpoint.
        keep: the number of checkpoints to keep, at least 2.

    Returns:
        The folder of the checkpoint.

    Raises:
        NotFinite: a value is infinite or NaN.
        OSError: the checkpoint can't be written; earlier checkpoints are unchanged.
    """
    assert keep >= 2
    for group, values in tensors.items():
        numbers = {name: value for name, value in values.items() if value.is_floating_point()}
        if not numbers or all(norm.isfinite() for norm in torch._foreach_norm(list(numbers.values()))):
            continue  # norms are faster than a test of each value, but their squares can overflow
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
    """The JSON state of the newest checkpoint under `root` whose state verifies, or None. Tensors are not read."""
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
    """Copy a checkpoint with other settings; files of tensors are hard links if the file system allows that.

    Args:
        source: the folder of the checkpoint.
        folder: the folder of the copy, which must not exist yet.
        settings: the settings in place of those of the run.

    Raises:
        DamagedCheckpoint: the manifest or the state does not verify.
        FileNotFoundError: a file is missing, for example because the run is deleting the checkpoint.
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
    """Steps and folders of the checkpoints under `root`, newest first."""
    found = [(int(m[1]), path) for path in root.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify the checkpoint in the folder `path`.

    Raises:
        DamagedCheckpoint: a file is missing, changed, or of another format. The message names the file.
    """
    manifest = _read_manifest(path)
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"its format is {manifest.get('format')}, but this version reads format {FORMAT}")
    named = _NAME.fullmatch(path.name)
    if not isinstance(manifest.get("step"), int) or named and int(named[1]) != manifest["step"]:
        raise DamagedCheckpoint(f"its manifest is that of step {manifest.get('step')}")
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
    """The verified manifest, without its digest."""
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
        raise DamagedCheckpoint("state.json was not written by this library: it holds no names with values")
    return state


def _check_name(name: str) -> None:
    if Path(name).name != name:
        raise DamagedCheckpoint(f"its manifest names {name!r}, which is not a file of the checkpoint")


def _read(folder: Path, name: str, size: int, sha256: str) -> bytes:
    """The content of a file of a checkpoint, verified."""
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
    """The newest checkpoint under `root` that verifies (None without checkpoints), and the faults of newer ones.

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
            "No checkpoint verifies, and the run is not restarted from step 0: "
            + "; ".join(faults)
            + ". Restore one of them, or choose another --output_dir."
        )
    return None, []


def go_back_to(root: Path, name: str) -> str:
    """Rename all checkpoints under `root` that are newer than the one called `name`; return a line for the user.

    Raises:
        ValueError: there is no checkpoint of this name, or it is damaged.
    """
    known = {path.name: step for step, path in list_checkpoints(root)}
    if name not in known:
        found = ", ".join(sorted(known, key=known.get)) or "none"
        raise ValueError(f"resume_from_checkpoint {name!r} is not a checkpoint of {root}. Its checkpoints: {found}.")
    try:
        load_checkpoint(root / name)
    except DamagedCheckpoint as error:
        raise ValueError(f"resume_from_checkpoint {name!r} can't be read: {error}. Give another checkpoint.") from None
    set_aside_newer(root, known[name], "left")
    return f"The run goes back to {name}. Newer checkpoints are renamed to left-checkpoint-STEP."


def set_aside_newer(root: Path, step: int, why: str = "damaged") -> None:
    """Rename the checkpoints under `root` after `step` to `<why>-checkpoint-<step>`, so that readers ignore them."""
    for number, path in list_checkpoints(root):
        if number > step:
            aside = root / f"{why}-{path.name}"
            remove(aside)
            os.rename(path, aside)
