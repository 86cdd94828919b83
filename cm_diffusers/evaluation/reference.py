"""Reference features of a dataset, to compare samples with; they are computed once and cached on disk."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cm_diffusers.core.draws import permutation
from cm_diffusers.evaluation.features import Extractor
from cm_diffusers.evaluation.frechet import Moments


KEPT = 50_000  # maximum number of images whose features are kept; neighbours among more would take too long


@dataclass(frozen=True)
class Reference:
    """Features of a dataset.

    Args:
        moments: mean and covariance of the features of all images.
        features: (n, d) float32 on the CPU, for all images or for a fixed choice of `KEPT` images.
        facts: `extractor` (name), `fingerprint`, `images` (their number), `shape` (C, H, W) and `data_hash`.
    """

    moments: Moments
    features: Tensor
    facts: dict[str, object]


def reference_features(
    images: Tensor | Iterable[Tensor], extractor: Extractor, cache_dir: Path | str | None = None
) -> Reference:
    """Load the features of `images` from the cache, or compute and cache them.

    Args:
        images: (N, C, H, W) in [0, 1], or a list of such batches, or another iterable that can be iterated twice.
        extractor: computes the features.
        cache_dir: folder for files named by hashes of the data and the extractor; None caches nothing.

    Raises:
        ValueError: no images, images of several shapes, an iterator, or a cached file that is damaged or belongs to
            another dataset or extractor.
    """
    batches = images.split(1000) if torch.is_tensor(images) else images
    if iter(batches) is batches:
        raise ValueError("the reference's images are read twice: give a tensor or a list of batches, not an iterator.")
    count, shape, data_hash = _hash(batches)
    facts = {"extractor": extractor.name, "fingerprint": extractor.fingerprint}
    facts |= {"images": count, "shape": list(shape), "data_hash": data_hash}
    name = f"{Path(extractor.name).name.replace(':', '.')}-{data_hash[:16]}-{extractor.fingerprint[:16]}.safetensors"
    path = None if cache_dir is None else Path(cache_dir, name)
    if path is not None and path.exists():
        return load_reference(path, facts)
    keep = kept_places(count)
    moments, kept, start = Moments(), [], 0
    for batch in batches:
        features = extractor(batch).cpu()
        moments.add(features)
        kept.append(features[keep[start : start + len(batch)]])
        start += len(batch)
    reference = Reference(moments, torch.cat(kept), facts)
    if path is not None:
        _save(reference, path)
    return reference


def kept_places(count: int) -> Tensor:
    """Boolean mask (n,) of the n = `count` images: True for those whose features a reference keeps."""
    keep = torch.zeros(count, dtype=torch.bool)
    keep[permutation(count, "reference")[:KEPT]] = True
    return keep


def _hash(batches: Iterable[Tensor]) -> tuple[int, tuple[int, ...], str]:
    """Number, shape and hash of the images; the hash covers their 8-bit values in order."""
    count, shape, digest = 0, None, hashlib.sha256()
    for batch in batches:
        if shape is not None and tuple(batch.shape[1:]) != shape:
            raise ValueError(
                f"the reference's images differ in shape: {shape} and {tuple(batch.shape[1:])}. Resize them first."
            )
        count, shape = count + len(batch), tuple(batch.shape[1:])
        digest.update((batch * 255).round().to(torch.uint8).cpu().contiguous().numpy().tobytes())
    if not count:
        raise ValueError("the reference has no images. Give at least one batch.")
    return count, shape, hashlib.sha256(f"{shape} {digest.hexdigest()}".encode()).hexdigest()


def _save(reference: Reference, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = reference.moments
    tensors = {"features": reference.features, "mean": moments.mean, "scatter": moments.scatter}
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished, {"facts": json.dumps(reference.facts)})
    os.replace(unfinished, path)


def load_reference(path: Path | str, facts: dict[str, object]) -> Reference:
    """Load a reference from the file `path`.

    Raises:
        ValueError: the file can't be read, or its facts differ from `facts`.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})["facts"])
            tensors = {key: file.get_tensor(key) for key in ("features", "mean", "scatter")}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a cached reference ({error}). Delete it.") from None
    wrong = [f"{key} {found.get(key)} (here: {value})" for key, value in facts.items() if found.get(key) != value]
    if wrong:
        raise ValueError(f"{path} holds the features of another dataset or extractor: {', '.join(wrong)}. Delete it.")
    moments = Moments()
    moments.count, moments.mean, moments.scatter = found["images"], tensors["mean"], tensors["scatter"]
    return Reference(moments, tensors["features"], found)
