"""Export samplers as `torch.export` programs and ONNX graphs, with a description for apps."""

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm_diffusers.engine.deploy.sampler import Sampler
from cm_diffusers.engine.files import written_aside
from cm_diffusers.pipelines.image_pipeline import ImagePipeline


DESCRIPTION = "sampler.json"
TOLERANCE = {
    "float32": 1e-5,
    "float16": 0.02,
}  # largest permitted difference from the float32 pipeline, for values in [0, 1]
SCALE = 1.5  # the guidance scale of the check
MEANINGS = {
    "noise": "unit normal noise, the start of sampling",
    "renoise": "unit normal noise, added by each step but the last",
    "class_labels": "class labels of the images",
    "guidance_scale": "scale of classifier-free guidance; 1 means no guidance",
}
# a program with onnxruntime and NumPy only, as on a machine without PyTorch
RUNNER = """
import statistics, sys, time
import numpy, onnxruntime

graph, inputs, outputs = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
cases = numpy.load(inputs)
names = [node.name for node in session.get_inputs()]
results, times = {}, []
for batch in {key.split("/")[0] for key in cases}:
    (results[batch],) = session.run(None, {name: cases[f"{batch}/{name}"] for name in names})
one = {name: cases[f"1/{name}"] for name in names}
for _ in range(10):
    start = time.perf_counter()
    session.run(None, one)
    times.append(time.perf_counter() - start)
assert "torch" not in sys.modules and "cm_diffusers" not in sys.modules
numpy.savez(outputs, seconds=statistics.median(times), **results)
"""


def export_sampler(
    pipeline: ImagePipeline, folder: Path, guidance: bool = False, dtype: torch.dtype = torch.float32, **levels: Any
) -> dict[str, Any]:
    """Export a sampler for any batch size as `<n>_steps.pt2` (`torch.export`) and `<n>_steps.onnx`.

    Args:
        pipeline: the model in float32 on the CPU.
        folder: the folder for the files.
        guidance: include classifier-free guidance, with its scale as an input.
        dtype: the dtype of the networks, float32 or float16; inputs and outputs stay float32 (class labels int64).
        **levels: see `Sampler`.

    Returns:
        The description of the sampler for `sampler.json`: files, noise levels, inputs and output.

    Raises:
        ValueError: `Sampler` refuses the pipeline or its arguments.
    """
    sampler = Sampler(_cast(pipeline, dtype), guidance, **levels).eval()
    steps, inputs = len(sampler.noise_levels), sampler.example()
    batch = {name: int(name == "renoise") for name, value in inputs.items() if value.ndim}
    where = {name: {batch[name]: torch.export.Dim.DYNAMIC} if name in batch else {} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(sampler, (), inputs, dynamic_shapes=where)
    name = f"{steps}_step{'s' if steps > 1 else ''}"
    torch.export.save(program, folder / f"{name}.pt2")
    torch.onnx.export(program, dynamo=True, output_names=["images"], verbose=False).save(folder / f"{name}.onnx")
    described = {
        key: {
            "shape": ["batch" if batch.get(key) == i else n for i, n in enumerate(value.shape)],
            "type": _name(value.dtype),
            "meaning": MEANINGS[key],
        }
        for key, value in inputs.items()
    }
    return {
        "steps": steps,
        "sigmas": [sigma if math.isfinite(sigma) else "inf" for sigma in sampler.noise_levels],
        "onnx": f"{name}.onnx",
        "torch_export": f"{name}.pt2",
        "dtype": _name(dtype),
        "inputs": described,
        "output": {"name": "images", "shape": ["batch", *pipeline.image_shape], "range": [0, 1]},
    }


def check_sampler(pipeline: ImagePipeline, folder: Path, described: dict[str, Any], **levels: Any) -> dict[str, float]:
    """Compare the images of an exported ONNX file in onnxruntime with those of the pipeline.

    onnxruntime runs in a separate process without PyTorch. The batch sizes are 1, 2 and 5.

    Args:
        pipeline: the pipeline that was exported.
        folder: the folder of the files.
        described: the result of `export_sampler`.
        **levels: the `levels` of the export.

    Returns:
        "largest_difference" of values in [0, 1], and the median seconds for one image: "onnxruntime_seconds" and
        "pipeline_seconds".

    Raises:
        ValueError: onnxruntime can't run the file, or the images differ by more than `TOLERANCE`.
    """
    cases, wanted = {}, {}
    for batch in (1, 2, 5):
        given, call = _case(pipeline, described, batch)
        cases |= {f"{batch}/{name}": value.numpy() for name, value in given.items()}
        wanted[str(batch)] = pipeline(**call, **levels, output_type="pt").images.numpy()
    _, call = _case(pipeline, described, 1)
    seconds = [_seconds(lambda: pipeline(**call, **levels, output_type="pt")) for _ in range(10)]
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = (Path(scratch) / f"{name}.npz" for name in ("inputs", "outputs"))
        np.savez(inputs, **cases)
        command = [sys.executable, "-I", "-c", RUNNER, str(folder / described["onnx"]), str(inputs), str(outputs)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(f"onnxruntime can't run {described['onnx']}: {run.stderr.strip()[-500:]}")
        with np.load(outputs) as made:
            error = max(float(np.abs(made[batch] - images).max()) for batch, images in wanted.items())
            theirs = float(made["seconds"])
    tolerance = TOLERANCE[described["dtype"]]
    if not error <= tolerance:
        raise ValueError(
            f"{described['onnx']} differs from the pipeline by {error:.2g} of the range of an image, but at most"
            f" {tolerance:g} is allowed."
        )
    times = {"onnxruntime_seconds": theirs, "pipeline_seconds": float(np.median(seconds))}
    return {"largest_difference": error, **times}


def write_description(folder: Path, pipeline: ImagePipeline, model: str, samplers: list[dict[str, Any]]) -> None:
    """Write `sampler.json`, which describes the samplers in a folder to an app.

    Args:
        folder: the folder of the samplers.
        pipeline: the model, for its shapes and classes.
        model: the name of the model.
        samplers: the results of `export_sampler`.
    """
    names = pipeline.id2label or {}
    content = {
        "model": model,
        "sample_shape": list(pipeline.sample_shape),
        "image_shape": list(pipeline.image_shape),
        "classes": None if pipeline.classes is None else {str(c): names.get(c, str(c)) for c in pipeline.classes},
        "samplers": samplers,
    }
    with written_aside(folder / DESCRIPTION) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(pipeline: ImagePipeline, dtype: torch.dtype) -> ImagePipeline:
    """A copy of the pipeline with networks of `dtype`; for float32 the pipeline itself."""
    if dtype == torch.float32:
        return pipeline
    found = copy.copy(pipeline)
    for name in ("unet", "vae"):
        if getattr(pipeline, name) is not None:
            setattr(found, name, copy.deepcopy(getattr(pipeline, name)).to(dtype))
    return found


def _case(pipeline: ImagePipeline, described: dict[str, Any], batch: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Inputs of an exported sampler, and the arguments of the pipeline that give the same images."""
    inputs, shape, seed = described["inputs"], (batch, *pipeline.sample_shape), 7
    given = {"noise": torch.randn(shape, generator=torch.Generator().manual_seed(batch))}
    call: dict[str, Any] = {"latents": given["noise"], "generator": seed}
    if "renoise" in inputs:
        source = torch.Generator().manual_seed(seed)
        given["renoise"] = torch.stack([torch.randn(shape, generator=source) for _ in range(described["steps"] - 1)])
    if "class_labels" in inputs:
        classes = pipeline.classes or []
        given["class_labels"] = call["class_labels"] = torch.tensor([classes[i % len(classes)] for i in range(batch)])
    if "guidance_scale" in inputs:
        given["guidance_scale"], call["guidance_scale"] = torch.tensor(SCALE), SCALE
    return given, call


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
