"""What a saved model is and does where only diffusers is installed. Run as a file, in a process of its own.

It imports nothing of the library, and hides it, as an installed one must not help.
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
    """The configs of the pipeline and its components and the SHA-256 of each weight, as JSON has them."""
    parts = pipeline.components
    facts = {"pipeline": _settings(pipeline)}
    facts["pipeline"] = {key: value for key, value in facts["pipeline"].items() if key not in parts}
    for name, part in parts.items():
        if part is None:  # an autoencoder that there is none of
            continue
        facts[name] = {"class": type(part).__name__, **_settings(part)}
        if isinstance(part, torch.nn.Module):
            facts[name] |= {f"weight {key}": _digest(value) for key, value in part.state_dict().items()}
    return json.loads(json.dumps(facts))  # which makes lists of tuples, as reading a file does


def _settings(part: Any) -> dict[str, Any]:
    return {key: value for key, value in part.config.items() if not key.startswith("_")}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def two_images(pipeline: DiffusionPipeline) -> np.ndarray:
    """Two images (2, H, W, C) of two steps on the CPU from seed 0, of classes 0 and 1 if there are classes.

    They are made with copies of the networks. Loaded weights can lie at addresses that are not a multiple of 64, where
    some kernels round otherwise; copies never do.
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
    """A finder that finds no library of ours."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "cm_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}: it is hidden here.", name=name)


def main(folder: str, results: str, dtype: str, threads: str, paths: str) -> None:
    """Load `folder` and leave in `results` what it is and two images of it."""
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
