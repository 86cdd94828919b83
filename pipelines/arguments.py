"""Readers of the arguments of a pipeline call: they return numbers and tensors, or raise ValueError.

Most readers take the argument's name for their error message. They pass None on, which means that the argument was not
given.
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
    """Convert `value` to plain Python: tensors, arrays and sequences to lists, and their scalars to Python numbers.

    Text and all other values are returned unchanged.
    """
    if torch.is_tensor(value):
        value = value.detach().cpu()
        return (value if value.dtype != torch.bfloat16 else value.float()).tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value


def is_whole(value: Any) -> bool:
    """Return whether `value` is an integer, of Python or NumPy. Booleans do not count."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def read_count(name: str, value: Any, least: int | None = 1) -> int | None:
    """Read an integer.

    Args:
        name: the argument's name in the error message.
        value: an integer of any type, or None. Floats are refused, even 2.0.
        least: the smallest allowed value; None for no bound.

    Raises:
        ValueError: `value` is not an integer, or is below `least`.
    """
    found = plain(value)
    if found is not None and not (is_whole(found) and (least is None or found >= least)):
        raise ValueError(
            f"{name} must be an integer{'' if least is None else f' of at least {least}'}, got {value!r}."
        )
    return found


def read_number(name: str, value: Any) -> float:
    """Read one number.

    Args:
        name: the argument's name in the error message.
        value: a number of any type. None is refused.

    Raises:
        ValueError: `value` is not a number.
    """
    found = plain(value)
    if not _is_number(found):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return found


def read_numbers(name: str, value: Levels) -> list[float] | None:
    """Read a list of numbers. Integers stay integers.

    Args:
        name: the argument's name in the error message.
        value: a flat sequence, array or tensor of numbers; or one number, which becomes a list of one; or None.

    Raises:
        ValueError: `value` is anything else.
    """
    found = plain(value)
    if _is_number(found):
        return [found]
    if found is not None and not (isinstance(found, list) and all(map(_is_number, found))):
        raise ValueError(f"{name} must be a number or a list of numbers, got {value!r}.")
    return found


def read_samples(name: str, value: Any, shape: Sequence[int | str]) -> torch.Tensor | None:
    """Read a tensor of finite floats.

    Args:
        name: the argument's name in the error message.
        value: a tensor or an array of floats, or None.
        shape: the required shape, such as ("n", 3, 32, 32). A text entry stands for any size.

    Returns:
        A tensor, for example (n, C, H, W), in the dtype of `value`.

    Raises:
        ValueError: `value` is of another type or shape, or has infinite values or NaN.
    """
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
        raise ValueError(f"{name} must be finite; some of its values are infinite or NaN.")
    return value


def read_images(
    name: str, value: Images, shape: tuple[int, int | str, int | str], bounded: bool = True
) -> torch.Tensor | None:
    """Read images in [0, 1], and scale them to [-1, 1].

    Args:
        name: the argument's name in the error message.
        value: a tensor (n, C, H, W), an array (n, H, W, C), a PIL image, a list of PIL images, or None. A single image
            can lack the first dimension. PIL images become grey or RGB, depending on the channels in `shape`.
        shape: the required channels, height and width. A text entry stands for any size.
        bounded: refuse values outside [0, 1].

    Returns:
        A float32 tensor (n, C, H, W); 0 and 1 have become -1 and 1.

    Raises:
        ValueError: the images are of another type or shape, not finite or, if `bounded`, outside [0, 1].
    """
    if value is None:
        return None
    found = [value] if isinstance(value, Image.Image) else value
    if isinstance(found, (list, tuple)) and found and all(isinstance(one, Image.Image) for one in found):
        if shape[0] not in (1, 3):
            raise ValueError(f"{name} must be a tensor or an array, because PIL has no images of {shape[0]} channels.")
        width, height = (ours if isinstance(ours, int) else n for ours, n in zip(shape[:0:-1], found[0].size))
        if any(one.size != (width, height) for one in found):
            sizes = ", ".join("{} x {}".format(*one.size) for one in found[:4])
            raise ValueError(
                f"{name} must be of {width} x {height} pixels, got {sizes}. Resize or crop before the call."
            )
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
        raise ValueError(f"{error} Give floats in [0, 1], or PIL images, of the required size.") from None
    assert images is not None
    if bounded and (not images.numel() or images.min() < 0 or images.max() > 1):
        ends = f"[{images.min():g}, {images.max():g}]" if images.numel() else "no values"
        raise ValueError(f"{name} must lie in [0, 1], got {ends}.")
    return 2 * images.float() - 1


def read_generators(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    """Read generators.

    Args:
        generator: a generator, an integer seed, a list with one generator or seed per image, or None. Seeds make new
            generators on the CPU.

    Raises:
        ValueError: `generator` is anything else, such as a negative seed or an empty list.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    found = plain(generator)
    if isinstance(found, list) and found:
        return [_generator(one) for one in found]
    return _generator(found)


def read_labels(class_labels: Labels, num_classes: int, id2label: dict[int, str] | None) -> torch.Tensor:
    """Read class labels.

    Args:
        class_labels: one label or a flat sequence, array or tensor of labels. A label is an integer or a class name.
        num_classes: the number of classes.
        id2label: the class names by label; None if the model has no names.

    Returns:
        int64 labels (n,), or () for one label without a sequence.

    Raises:
        ValueError: a label is outside [0, num_classes), a name is unknown or ambiguous, or the sequence is empty.
    """
    found = plain(class_labels)
    several = isinstance(found, list)
    found = found if several else [found]
    found = [labels_named(id2label, [label])[0] if isinstance(label, str) else label for label in found]
    if not found or not all(is_whole(label) and 0 <= label < num_classes for label in found):
        names = "" if id2label is None else " or class names"
        raise ValueError(f"class_labels must be integers in [0, {num_classes - 1}]{names}, got {class_labels!r}.")
    return torch.tensor(found if several else found[0])


def read_entries(condition: Entries, batch_size: int) -> dict[str, torch.Tensor]:
    """Read further conditioning of the network.

    Args:
        condition: tensors or arrays (B, ...) by name, or None for none.
        batch_size: the required number of rows, B.

    Raises:
        ValueError: `condition` is not a mapping, or an entry is not a tensor or array with `batch_size` rows.
    """
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
    """Return the number of entries of `value` if it has one per image; None for a single value or none."""
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
