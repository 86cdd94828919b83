"""Files: whole or not at all where they are written, plain and of a known size where they are read; a run's names."""

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
LIMIT = 64 << 20  # bytes of a JSON file; those of runs hold a few thousand
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}
_FULL = "Free some room (`df -h` shows it, `df -i` for numbers of files)"
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
GOES_ON = "the same command goes on from what is saved, which is whole"
# how libraries wrap a fault of the system: Python's text, Rust's, C's
_WRAPPED = re.compile(r"\[Errno (\d+)\] [^:\n]+(?:: '([^'\n]+)')?|\(os error (\d+)\)|left on device \((\d+)\)")


class RunFiles:
    """What lies in the folder of a run; the first few in that of an evaluation as well."""

    MODEL = "pipeline"  # the model, saved at the end
    FACTS = "card.json"  # all that the model's card says, but for what was measured
    METRICS = "metrics.json"  # what evaluate.py has measured
    QUALITY = "quality.png"  # a picture of that
    BEST = "best"  # a folder with the best of the models that evaluate.py has watched
    DATA = "data.json"  # what the images are; in the model's folder as well
    SETTINGS = "config.yaml"
    LOG = "log.jsonl"
    CURVES = "losses.png"
    PICTURES = "samples"
    TRACKERS = "tracker"
    TRACKER = "tracker.json"  # under which name and ids trackers know the run
    EXPORTED = "exported.json"  # what the saved model is an export of
    DIVERGED = "diverged.json"  # at which step it has, with which settings
    SCANNED = "images_checked.safetensors"
    LATENTS = "latents.safetensors"
    FOR_HUB = ".hub"  # copies that are being pushed
    LOCK = ".lock"  # held by the process that trains, while it lives
    OWNER = ".owner"  # whose it is


def save_image(image: Image.Image, file: Path) -> None:
    """Save an image, or nothing where the disk is full."""
    try:
        with naming(file):
            image.save(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def digest(*parts: bytes) -> str:
    """The SHA-256 of all parts, one after the other, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A fault of the system gets the name of the file that it is about, which writing and fsync leave out.

    What a library made of one becomes an OSError again.
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
    """Write and fsync."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Have the names in a folder on the disk. Windows opens no folder, and keeps them by itself."""
    if not OPENS_FOLDERS:
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name for a file to be written under; once it is whole it takes the place of `path`, else it is deleted."""
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
    """Write a file that is at any moment the old one or the new one, whole."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Delete a file, a link (and not what it leads to) or a folder; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:
            error.filename = str(path)  # it names what is in there without its folder
            raise
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """damaged-NAME, or damaged-2-NAME and so on where that is taken."""
    number, aside = 1, path.with_name(f"damaged-{path.name}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"damaged-{number}-{path.name}")
    return aside


def set_aside(path: Path) -> Path:
    """Rename to damaged-NAME or, where that is taken, a numbered name; gives it."""
    return path.rename(free_name(path))


# --- reading -------------------------------------------------------------------------------------------------------


def kind_of(mode: int) -> str | None:
    """What there is instead of a file; None for a file."""
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a device")


OPENS_FOLDERS = os.name != "nt"
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # Windows has the last one alone
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


def read_plain(path: Path, size: int | None = None, limit: int = LIMIT, follow: bool = True) -> bytes:
    """The content of a file. Waits for nothing, as for the writer of a pipe, and looks at the size before it reads.

    Args:
        path: its name.
        size: bytes that it has to have.
        limit: the most that it may have, where `size` is None.
        follow: go where a link leads; else a link is no file.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: it can't be read.
        ValueError: it is not a file, or of another size; the message goes on after its name.
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
    """Whether a file is there and holds this and nothing else."""
    try:
        return read_plain(path) == text.encode()
    except (OSError, ValueError):
        return False


def parse_json(data: bytes) -> Any:
    """JSON. Raises ValueError, for what nests too deeply as well."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nests too deeply") from None


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """The JSON of a file. Raises OSError or ValueError, whose message goes on after the file's name."""
    data = read_plain(path, limit=limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


def headline(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def why(error: Exception) -> str:
    """What is wrong with a file, to go on after its name."""
    if isinstance(error, OSError):
        return f"can't be read ({error.strerror})"
    return str(error) if isinstance(error, ValueError) else f"is not what this library writes ({error!r:.80})"


# --- faults of the system ------------------------------------------------------------------------------------------


def explain(error: BaseException, flag: str = "--output_dir", then: str = GOES_ON) -> str | None:
    """What a fault of the system (a full disk, a folder in a file's place) was, and what to do; None for other errors.

    Args:
        error: an OSError, or what a library made of it.
        flag: what names the folder that is written to.
        then: what can be done once the fault is repaired.
    """
    number, file, reason = _fault(error)
    if number is None:
        return reason
    head = f"{file}: {os.strerror(number)}." if file else f"{os.strerror(number)}."
    advice = ADVICE.get(number, "Repair that")
    return f"{head} {advice}, and {then}; or give another {flag}."


def _fault(error: BaseException | None) -> tuple[int | None, str | None, str | None]:
    """Number, file, and text where there is no number, of a fault of the system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, error.filename2 or error.filename, None
        if match := _WRAPPED.search(str(error)):
            return int(match[1] or match[3] or match[4]), match[2], None
        if isinstance(error, OSError):
            return None, None, str(error)
        error = error.__cause__
    return None, None, None
