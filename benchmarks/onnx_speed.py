"""Speed of an exported one-step sampler in onnxruntime, against the pipeline with and without a compiled network.

    python benchmarks/onnx_speed.py

Setting: preset `small`, 28 x 28 pixels, ten classes, batches of 1 and 16. All samplers take turns in one process, with
as many threads as the machine has cores.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import onnxruntime
import torch
from common import seconds

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.engine.deploy.program import export_sampler
from cm_diffusers.models import build_unet


@torch.no_grad()
def measure(batch: int, rounds: int, session: onnxruntime.InferenceSession, pipelines: dict) -> dict:
    """Median milliseconds of each sampler for one batch, and the ratio onnxruntime / compiled pipeline."""
    noise, labels = torch.randn(batch, 1, 28, 28), torch.arange(batch) % 10
    inputs = {"noise": noise.numpy(), "class_labels": labels.numpy()}
    functions = {"onnxruntime": lambda: session.run(None, inputs)}
    for name, pipeline in pipelines.items():
        functions[name] = lambda pipeline=pipeline: pipeline(latents=noise, class_labels=labels, output_type="pt")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        seconds(function, 3)
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(1000 * seconds(function, 5))
    medians = {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(times["onnxruntime"], times["compiled pipeline"])]
    return medians | {"onnxruntime over compiled": round(statistics.median(ratios), 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of five calls each (default: 15)")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    plain = ConsistencyPipeline(build_unet("small", (28, 28), 1, 10), MultistepConsistencyScheduler())
    plain.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        described = export_sampler(plain, Path(folder), num_inference_steps=1)
        session = onnxruntime.InferenceSession(Path(folder) / described["onnx"], providers=["CPUExecutionProvider"])
    compiled = copy.copy(plain)
    compiled.unet = torch.compile(plain.unet, dynamic=False)
    pipelines = {"pipeline": plain, "compiled pipeline": compiled}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    rows = {f"batch {batch}": measure(batch, args.rounds, session, pipelines) for batch in (1, 16)}
    print(json.dumps({"machine": {**machine, "python": platform.python_version()}, **rows}, indent=2))
