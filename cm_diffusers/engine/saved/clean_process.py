"""The check of a saved model with diffusers alone. It is run as a file, in a separate process.

It imports nothing of this library and hides it, because an installed copy must not help to load the model.
"""

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline


def describe(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the configs of the pipeline and its components, and the SHA-256 of each weight, as JSON values."""
    parts = pipeline.components
    facts = {"pipeline": _settings(pipeline)}
    facts["pipeline"] = {key: value for key, value in facts["pipeline"].items() if key not in parts}
    for name, part in parts.items():
        if part is None:  # an optional component, such as the autoencoder of a pixel model
            continue
        facts[name] = {"class": type(part).__name__, **_settings(part)}
        if isinstance(part, torch.nn.Module):
            facts[name] |= {f"weight {key}": _digest(value) for key, value in part.state_dict().items()}
    return json.loads(json.dumps(facts))  # tuples become lists, as in a JSON file


def _settings(part: Any) -> dict[str, Any]:
    return {key: value for key, value in part.config.items() if not key.startswith("_")}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def two_images(pipeline: DiffusionPipeline) -> np.ndarray:
    """Sample two images (2, H, W, C) in two steps on the CPU from seed 0, of classes 0 and 1 if the model has classes.

    Copies of the networks are used. Loaded weights can lie at addresses that are not a multiple of 64, where some
    kernels round differently. Copies are always aligned.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    classes = pipeline.unet.config.num_class_embeds
    arguments = {} if classes is None else {"class_labels": [0, min(1, classes - 1)]}
    arguments |= {"batch_size": 2, "num_inference_steps": 2, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    for name, network in networks.items():
        setattr(pipeline, name, copy.deepcopy(network).to("cpu"))
    try:
        return pipeline(generator=torch.Generator().manual_seed(0), **arguments).images
    finally:
        for name, network in networks.items():
            setattr(pipeline, name, network)


class _Hidden:
    """An import finder that hides this library."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "cm_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}: it is hidden here.", name=name)


def main(folder: str, results: str, dtype: str, threads: str, paths: str) -> None:
    """Load the saved model `folder`, and write its description and two images to `results`.

    Args:
        folder: the saved model.
        results: folder for facts.json and images.npy.
        dtype: name of the dtype of the networks, such as "float32".
        threads: number of CPU threads.
        paths: the caller's `sys.path`, as a JSON list.
    """
    sys.meta_path.insert(0, _Hidden())
    sys.path += json.loads(paths)
    torch.set_num_threads(int(threads))
    code = {"trust_remote_code": any(Path(folder).rglob("*.py"))}
    if Path(folder, "pipeline.py").exists():
        code["custom_pipeline"] = "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **code)
    Path(results, "facts.json").write_text(json.dumps(describe(pipeline)))
    np.save(Path(results, "images.npy"), two_images(pipeline))


if __name__ == "__main__":
    main(*sys.argv[1:])
