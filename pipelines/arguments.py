"""The arguments of a call, read in one place: what users write becomes numbers and tensors, or an error says why not.

Most readers take the argument's name for their message, and leave None, an argument that was not given, as it is.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .class_names import labels_named


Generators = torch.Generator | int | Sequence[torch.Generator | int] | None
Labels = int | str | Sequence[int | str] | np.ndarray | torch.Tensor | None
Levels = float | Sequence[float] | np.ndarray | torch.Tensor | None
Samples = torch.Tensor | np.ndarray | None
Entries = Mapping[str, torch.Tensor | np.ndarray] | None
Images = torch.Tensor | np.ndarray | Image.Image | Sequence[Image.Image] | None


def plain(value: Any) -> Any:
    """Tensors, arrays and other sequences than text as lists, their scalars and NumPy's as Python's."""
    if torch.is_tensor(value):
        value = value.detach().cpu()
        return (value if value.dtype != torch.bfloat16 else value.float()).tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def read_count(name: str, value: Any, least: int | None = 1) -> int | None:
    """An integer of any type, of at least `least` unless that is None; a float is none, whatever its value."""
    found = plain(value)
    if found is not None and not (is_whole(found) and (least is None or found >= least)):
        raise ValueError(
            f"{name} must be an integer{'' if least is None else f' of at least {least}'}, got {value!r}."
        )
    return found


def read_number(name: str, value: Any) -> float:
    """One number, of any type."""
    found = plain(value)
    if not _is_number(found):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return found


def read_numbers(name: str, value: Levels) -> list[float] | None:
    """Numbers, in any kind of sequence or array; one alone is a list of one. Integers stay integers."""
    found = plain(value)
    if _is_number(found):
        return [found]
    if found is not None and not (isinstance(found, list) and all(map(_is_number, found))):
        raise ValueError(f"{name} must be a number or a list of numbers, got {value!r}.")
    return found


def read_samples(name: str, value: Any, shape: Sequence[int | str]) -> torch.Tensor | None:
    """A tensor of finite floats of the given shape, from a tensor or an array; a size that is text may be any."""
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value)) if value.dtype.kind == "f" else value
    if not torch.is_tensor(value) or not value.is_floating_point():
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name} must be a tensor or an array of floats, got {kind}.")
    wanted = f"({', '.join(map(str, shape))})"
    fits = value.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, value.shape))
    if not fits:
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(value.shape)}.")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite; some of the values are infinite or no numbers.")
    return value


def read_images(
    name: str, value: Images, shape: tuple[int, int | str, int | str], bounded: bool = True
) -> torch.Tensor | None:
    """Images (n, *shape), float32 in [-1, 1], from a tensor (n, C, H, W) or an array (n, H, W, C) in [0, 1], or PIL.

    One alone may come without its first dimension. PIL images become grey or RGB as the shape's channels say. A height
    or width that is text may be any. Only what is `bounded` must lie in [0, 1].
    """
    if value is None:
        return None
    found = [value] if isinstance(value, Image.Image) else value
    if isinstance(found, (list, tuple)) and found and all(isinstance(one, Image.Image) for one in found):
        if shape[0] not in (1, 3):
            raise ValueError(f"{name} must be a tensor or an array, as PIL has no images of {shape[0]} channels.")
        width, height = (ours if isinstance(ours, int) else n for ours, n in zip(shape[:0:-1], found[0].size))
        if any(one.size != (width, height) for one in found):
            sizes = ", ".join("{} x {}".format(*one.size) for one in found[:4])
            raise ValueError(f"{name} must be of {width} x {height} pixels, as the model's are, got {sizes}.")
        pixels = [np.asarray(one.convert("L" if shape[0] == 1 else "RGB"), dtype=np.float32) for one in found]
        found = np.stack(pixels).reshape(len(found), height, width, shape[0]) / 255
    if isinstance(found, np.ndarray):
        found = found[None] if found.ndim == 3 else found
        found = torch.from_numpy(np.array(found)).movedim(-1, 1) if found.ndim == 4 else found
    if torch.is_tensor(found) and found.ndim == 3:
        found = found[None]
    try:
        images = read_samples(name, found, ("n", *shape))
    except ValueError as error:
        raise ValueError(f"{error} Images are those of the model's size, floats in [0, 1], or PIL images.") from None
    assert images is not None
    if bounded and (not images.numel() or images.min() < 0 or images.max() > 1):
        ends = f"[{images.min():g}, {images.max():g}]" if images.numel() else "none"
        raise ValueError(f"{name} must lie in [0, 1], got {ends}.")
    return 2 * images.float() - 1


def read_generators(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    """A generator, or one per image; integers are the seeds of new ones, on the CPU."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    found = plain(generator)
    if isinstance(found, list) and found:
        return [_generator(one) for one in found]
    return _generator(found)


def read_labels(class_labels: Labels, num_classes: int, id2label: dict[int, str] | None) -> torch.Tensor:
    """Labels, int64 (n,) or (), from integers of any type in any kind of sequence, or from names of classes."""
    found = plain(class_labels)
    several = isinstance(found, list)
    found = found if several else [found]
    found = [labels_named(id2label, [label])[0] if isinstance(label, str) else label for label in found]
    if not found or not all(is_whole(label) and 0 <= label < num_classes for label in found):
        names = "" if id2label is None else " or names of classes"
        raise ValueError(f"class_labels must be integers in [0, {num_classes - 1}]{names}, got {class_labels!r}.")
    return torch.tensor(found if several else found[0])


def read_entries(condition: Entries, batch_size: int) -> dict[str, torch.Tensor]:
    """Tensors of `batch_size` rows by their names, from tensors or arrays."""
    if condition is not None and not isinstance(condition, Mapping):
        raise ValueError(f"condition must map names to tensors, got {type(condition).__name__}.")
    found = {}
    for name, entry in (condition or {}).items():
        entry = torch.from_numpy(np.array(entry)) if isinstance(entry, np.ndarray) else entry
        if not torch.is_tensor(entry) or not entry.ndim or len(entry) != batch_size:
            got = tuple(entry.shape) if torch.is_tensor(entry) else type(entry).__name__
            raise ValueError(f"condition[{name!r}] must be a tensor with {batch_size} rows, one per image, got {got}.")
        found[name] = entry
    return found


def count_of(value: Any) -> int | None:
    """How many images an argument is for, where it has one entry per image."""
    per_image = isinstance(value, Sequence) and not isinstance(value, str)
    return len(value) if per_image or getattr(value, "ndim", False) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _generator(value: Any) -> torch.Generator:
    if isinstance(value, torch.Generator):
        return value
    if not is_whole(value) or not 0 <= value < 2**64:
        raise ValueError(
            "generator must be a torch.Generator, a seed (an integer of at least 0) or a list with one of these per"
            f" image; got {value!r}."
        )
    return torch.Generator().manual_seed(value)
