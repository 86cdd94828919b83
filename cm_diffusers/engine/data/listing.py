"""The listing of a folder's images and their classes, shared by training and prepare_data.py.

An image is any file below the folder whose suffix Pillow reads. Links are followed. The members of a .zip count as
files of the folder that holds the .zip, unless they lie there unpacked. Hidden files and folders and all other files
are left out and counted.

The class of an image is the first folder on its path after the folders that all images share. In mine/cat/0.png,
mine/cat/more/1.png and mine/dog/2.png the classes are cat and dog. Images that all lie in one folder have no classes.
"""

import os
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image


TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl")
METADATA = re.compile(r"metadata\.(csv|tsv|jsonl|parquet)")
TEXT = ".txt"
LABELS = "dataset.json"  # the labels of EDM's and StyleGAN's datasets: {"labels": [["folder/image.png", 3], ...]}
SPLITS = {"train", "test", "val", "valid", "validation"}
UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow only recognises


def natural_key(text: str) -> tuple:
    """Return a sort key of `text` in which runs of digits count as numbers, so that "9" comes before "10"."""
    parts = re.split("([0-9]+)", text)
    digits = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(part), part) for part in digits]
    return *parts, text


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image of a folder.

    Args:
        name: path below the folder, with "/". The path of a member includes its archive, as in a.zip/0.png.
        place: the same without the archive: the path of the image if it were unpacked.
        path: absolute path, or zip:// address of a member, for `records.open_image`.
        mark: (bytes, time of the last change in ns) of a file, (bytes, CRC) of a member. It changes with the image.
        archive: name of the zip that holds the image, or "".
    """

    name: str
    place: str
    path: str
    mark: tuple[int, int]
    archive: str = ""


@dataclass
class Listing:
    """The images of a folder or a zip in natural order, and the files that were left out.

    Args:
        root: the folder or zip.
        images: all images, in natural order of their places.
        metadata: names of files like metadata.csv, which describe images by file name.
        tables: names of other tables, which may hold a dataset.
        labels: bytes of EDM's dataset.json at the top; None if missing.
        texts: paths (as of an image) of .txt files by their place without the suffix. They also count as left out.
        left_out: names of files and folders by the reason.
    """

    root: Path
    images: list[ListedImage] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    labels: bytes | None = None
    texts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """Note that the file or folder `name` is left out for `reason`."""
        self.left_out.setdefault(reason, []).append(name)

    def text_of(self, image: ListedImage) -> str | None:
        """Return the path of the text file that has the name of an image, as a.txt has of a.png; None if missing."""
        return self.texts.get(os.path.splitext(image.place)[0])

    def summary(self) -> str:
        """Count the left-out files by reason: "; left out 3: 2 hidden (.a, .b), 1 .txt (a.txt)", or ""."""
        left_out = {**self.left_out, **({"table(s)": self.tables} if self.tables else {})}
        if not left_out:
            return ""
        parts = []
        for reason, names in sorted(left_out.items()):
            examples = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            parts.append(f"{len(names)} {reason} ({examples})")
        return f"; left out {sum(map(len, left_out.values()))}: {', '.join(parts)}"

    def classes(self) -> tuple[list[int], list[str]] | None:
        """Return the labels of all images and the names of the classes in natural order, both from the folders.

        Returns None if all images lie in one folder.

        Raises:
            ValueError: some images lie beside folders of images, or all folders are named like splits.
        """
        paths = [image.place.split("/") for image in self.images]
        shared = 0
        while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
            shared += 1
        loose = [image.name for image, path in zip(self.images, paths) if len(path) == shared + 1]
        if len(loose) == len(paths):
            return None
        if loose:
            raise ValueError(
                f"{loose[0]!r} lies beside folders of images. Move it into the folder of its class, or move all images"
                " into one folder."
            )
        classes = sorted({path[shared] for path in paths}, key=natural_key)
        if {name.lower() for name in classes} <= SPLITS:
            raise ValueError(
                f"its folders {', '.join(classes)} are splits, not classes. Give one of them, for example"
                f" {self.root.joinpath(*paths[0][:shared], classes[-1])}."
            )
        numbers = {name: i for i, name in enumerate(classes)}
        return [numbers[path[shared]] for path in paths], classes

    @property
    def tells_splits(self) -> bool:
        """Whether all images lie in two or more top folders that are named like splits."""
        tops = {image.place.split("/")[0].lower() for image in self.images if "/" in image.place}
        return len(tops) > 1 and tops <= SPLITS and all("/" in image.place for image in self.images)


def list_images(root: Path) -> Listing:
    """List the images of the folder or zip `root`.

    Raises:
        ValueError: a zip is damaged or encrypted, a member would lie outside of its folder, or a name is not UTF-8.
        OSError: a folder is unreadable.
    """
    listing = Listing(root)
    if root.is_dir():
        _list_folder(listing)
        _leave_out_unpacked(listing)
    else:
        _list_members(listing, root, "")
    listing.images.sort(key=lambda image: [natural_key(part) for part in image.place.split("/")])
    return listing


def _list_folder(listing: Listing) -> None:
    known = _suffixes()
    waiting = [(str(listing.root), "", ())]
    while waiting:
        folder, place, above = waiting.pop()
        status = os.stat(folder)
        above = (*above, (status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            name = place + entry.name
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the file name {os.fsencode(name)!r} is not UTF-8. Rename the file.") from None
            if _is_hidden(entry.name):
                listing.leave_out("hidden", name)
                continue
            try:
                status = entry.stat()
            except OSError:  # a broken link: if its suffix is that of an image, opening it reports the fault
                status = None
            if status is not None and stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in above:
                    listing.leave_out("linked to a folder above", name)
                else:
                    waiting.append((entry.path, f"{name}/", above))
            elif status is not None and not stat.S_ISREG(status.st_mode):
                listing.leave_out("special", name)
            elif METADATA.fullmatch(entry.name):
                listing.metadata.append(name)
            elif _suffix(name) in TABLES:
                listing.tables.append(name)
            elif name == LABELS:
                listing.labels = Path(entry.path).read_bytes()
            elif entry.name.lower().endswith(".zip"):
                _list_members(listing, Path(entry.path), place)
            elif _suffix(name) in known:
                mark = (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)
                listing.images.append(ListedImage(name, name, os.path.abspath(entry.path), mark))
            else:
                if _suffix(name) == TEXT:
                    listing.texts[os.path.splitext(name)[0]] = os.path.abspath(entry.path)
                listing.leave_out(_suffix(name) or "without a suffix", name)


def _list_members(listing: Listing, path: Path, place: str) -> None:
    """List the members of a zip as if they were unpacked into the folder `place`."""
    known, zipped = _suffixes(), place + path.name if path != listing.root else ""
    prefix = f"{zipped}/" if zipped else ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if path == listing.root and LABELS in archive.NameToInfo:
                listing.labels = archive.read(LABELS)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ValueError(f"the archive {path.name!r} can't be read: {error}. Unpack or remove it.") from None
    for info in members:
        name, parts = info.filename, re.split(r"[/\\]", info.filename)
        if name.startswith(("/", "\\")) or ".." in parts:
            raise ValueError(
                f"the archive {path.name!r} is refused: its member {name!r} would lie outside of its folder."
                " Remove the archive."
            )
        if any(map(_is_hidden, parts)):
            listing.leave_out("hidden", prefix + name)
        elif _suffix(name) in known:
            if info.flag_bits & 1:
                raise ValueError(f"the archive {path.name!r} is encrypted. Unpack it, and remove it.")
            where = f"zip://{name}::{os.path.abspath(path)}"
            mark = info.file_size, info.CRC
            listing.images.append(ListedImage(prefix + name, place + name, where, mark, zipped))
        elif name != LABELS or path != listing.root:
            if _suffix(name) == TEXT:
                listing.texts.setdefault(os.path.splitext(place + name)[0], f"zip://{name}::{os.path.abspath(path)}")
            listing.leave_out(_suffix(name) or "without a suffix", prefix + name)


def _leave_out_unpacked(listing: Listing) -> None:
    """Leave out archives whose images all lie unpacked, beside the archive or in a folder of the same name."""
    sizes, archives = {image.name: image.mark[0] for image in listing.images if not image.archive}, {}
    for image in listing.images:
        if image.archive:
            archives.setdefault(image.archive, []).append(image)
    for archive, members in archives.items():
        folder, base = f"{os.path.dirname(archive)}/".lstrip("/"), os.path.splitext(archive)[0]
        for home in (folder, f"{base}/"):
            if all(sizes.get(home + image.place.removeprefix(folder)) == image.mark[0] for image in members):
                listing.images = [image for image in listing.images if image.archive != archive]
                listing.leave_out("already unpacked", archive)
                break


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _suffixes() -> set[str]:
    """The suffixes of all formats that Pillow can read."""
    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - UNREADABLE}
