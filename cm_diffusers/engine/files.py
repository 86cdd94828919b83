"""Atomic writes, safe reads, messages about system errors, and the names of files in the folder of a run."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import cm_diffusers


LIBRARY = Path(cm_diffusers.__file__).parent
HUB_CARDS = next(f for f in (LIBRARY / "hub_cards", LIBRARY.parent / "hub_cards") if f.is_dir())  # templates
LIMIT = 64 << 20  # bytes of a JSON file, at most; files of runs have a few thousand
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}
_FULL = "Free some space (`df -h` shows it; `df -i` shows the number of files)"
_CLOSED = "Allow writing there"
_TAKEN = "Move away what is there"
ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EISDIR: _TAKEN,
    errno.ENOTDIR: _TAKEN,
    errno.EEXIST: _TAKEN,
    errno.ENOTEMPTY: _TAKEN,
    errno.EFBIG: "Allow larger files (`ulimit -f` shows the limit)",
}
GOES_ON = "give the same command again, which continues from the saved state"
# texts of system errors in the exceptions of libraries: by Python, Rust and C
_WRAPPED = re.compile(r"\[Errno (\d+)\] [^:\n]+(?:: '([^'\n]+)')?|\(os error (\d+)\)|left on device \((\d+)\)")


class RunFiles:
    """Names of files and folders in the folder of a run; an evaluation writes some of them to its output folder."""

    MODEL = "pipeline"  # a folder with the model, saved at the end
    FACTS = "card.json"  # the facts of the model's card, without measurements
    METRICS = "metrics.json"  # the measurements of evaluate.py
    QUALITY = "quality.png"  # a picture of the measurements
    BEST = "best"  # a folder with the best checkpoint that evaluate.py --watch has found
    DATA = "data.json"  # the description of the images; also in the folder of the model
    SETTINGS = "config.yaml"
    LOG = "log.jsonl"
    CURVES = "losses.png"
    PICTURES = "samples"
    TRACKERS = "tracker"
    TRACKER = "tracker.json"  # the name and ids of the run in its trackers
    EXPORTED = "exported.json"  # the step and settings of the last export
    DIVERGED = "diverged.json"  # the step of a divergence and its settings
    SCANNED = "images_checked.safetensors"
    LATENTS = "latents.safetensors"
    TEXT = "text_cache"  # a folder with the embeddings and latents of a text-to-image run
    FOR_HUB = ".hub"  # copies that are being pushed
    LOCK = ".lock"  # locked by the process that trains
    OWNER = ".owner"  # the process that holds the lock


def save_image(image: Image.Image, file: Path) -> None:
    """Save `image` as `file`, and leave no file if that fails.

    Raises:
        OSError: the file can't be written. The error names the file.
    """
    try:
        with naming(file):
            image.save(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def digest(*parts: bytes) -> str:
    """The SHA-256 of the concatenated `parts`, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that adds the file name `path` to system errors, because writing and fsync leave it out.

    Raises:
        OSError: a system error in the block, also in place of a library's exception that wraps one.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        number, file, _ = _fault(error)
        if number is None or file:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to the file `path`, and fsync it."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Fsync the folder `path`, so that its file names are on the disk. On Windows this does nothing."""
    if not OPENS_FOLDERS:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A context for writing a file atomically: it gives a temporary name, which replaces `path` at the end.

    If the block fails, the temporary file is deleted and `path` is unchanged.
    """
    aside = path.with_name(f".tmp-{path.name}")
    remove(aside)
    try:
        with naming(path):
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        remove(aside)
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically: at any moment the file is completely the old one or the new one."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Delete the file, link or folder `path`, if it exists. The target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:
            error.filename = str(path)  # the error names an entry without its folder
            raise
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """The first free one of the paths damaged-NAME, damaged-2-NAME, ... beside `path`."""
    number, aside = 1, path.with_name(f"damaged-{path.name}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"damaged-{number}-{path.name}")
    return aside


def set_aside(path: Path) -> Path:
    """Rename `path` to its `free_name`, and return that."""
    return path.rename(free_name(path))


# --- reading -------------------------------------------------------------------------------------------------------


def kind_of(mode: int) -> str | None:
    """What an entry with the file mode `mode` is, such as "a folder"; None for a regular file."""
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a device")


OPENS_FOLDERS = os.name != "nt"
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # only Windows has O_BINARY
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


def read_plain(path: Path, size: int | None = None, limit: int = LIMIT, follow: bool = True) -> bytes:
    """Read a regular file, after a check of its size. It never waits, for example for the writer of a pipe.

    Args:
        path: the file.
        size: the required number of bytes, or None.
        limit: the largest number of bytes if `size` is None.
        follow: follow links; otherwise a link is an error.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the file can't be read.
        ValueError: `path` is not a file or has another size. The message continues after the file's name.
    """
    try:
        handle = os.open(path, READ | (0 if follow else NO_LINKS))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO) and (kind := kind_of(os.lstat(path).st_mode)):
            raise ValueError(f"is {kind} instead of a file") from None
        raise
    try:
        found = os.fstat(handle)
        kind = kind_of(found.st_mode)
        if kind is not None:
            raise ValueError(f"is {kind} instead of a file")
        if size is not None and found.st_size != size:
            raise ValueError(f"has {found.st_size} bytes instead of {size}")
        if size is None and found.st_size > limit:
            raise ValueError(f"has {found.st_size} bytes, more than {limit}")
        with naming(path), open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def holds(path: Path, text: str) -> bool:
    """Whether the file `path` exists and its content is exactly `text`."""
    try:
        return read_plain(path) == text.encode()
    except (OSError, ValueError):
        return False


def parse_json(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: `data` is not JSON, or nests too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nests too deeply") from None


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """Read the JSON file `path` of at most `limit` bytes.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is too large or not JSON. The message continues after the file's name.
    """
    data = read_plain(path, limit=limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


def headline(error: BaseException) -> str:
    """The first line of the message of `error`, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def why(error: Exception) -> str:
    """The fault of a file as the end of a sentence after its name, from the `error` of reading it."""
    if isinstance(error, OSError):
        return f"can't be read ({error.strerror})"
    return str(error) if isinstance(error, ValueError) else f"was not written by this library ({error!r:.80})"


# --- system errors -------------------------------------------------------------------------------------------------


def explain(error: BaseException, flag: str = "--output_dir", then: str = GOES_ON) -> str | None:
    """A message about a system error, such as a full disk, with the next step; None for other errors.

    Args:
        error: an OSError, or a library's exception that wraps one.
        flag: the option that names the output folder.
        then: what the user can do after the repair, as a clause.
    """
    number, file, reason = _fault(error)
    if number is None:
        return reason
    head = f"{file}: {os.strerror(number)}." if file else f"{os.strerror(number)}."
    advice = ADVICE.get(number, "Repair that")
    return f"{head} {advice}, and {then}; or give another {flag}."


def _fault(error: BaseException | None) -> tuple[int | None, str | None, str | None]:
    """The number and the file of a system error, or its text if it has no number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, error.filename2 or error.filename, None
        if match := _WRAPPED.search(str(error)):
            return int(match[1] or match[3] or match[4]), match[2], None
        if isinstance(error, OSError):
            return None, None, str(error)
        error = error.__cause__
    return None, None, None
