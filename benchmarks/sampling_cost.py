"""Cost of sampling beyond the network.

    python benchmarks/sampling_cost.py              # pipeline calls / bare forward passes
    python benchmarks/sampling_cost.py --overhead   # pipeline calls with a network that computes nothing

Setting of the first: batch 64, images of 28x28, preset `small`, float32, 1 and 2 steps.

Setting of the second: one image of 8x8, CPU time of one thread, progress bar off. The current build, an earlier build
(--before) and diffusers' own `ConsistencyModelPipeline` take turns in one process.
"""

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from common import paired, seconds, show
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config

import cm_diffusers
from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.models import build_unet


BATCH = 64
KINDS = {  # for a build of the library: pipeline class, scheduler, options
    "ConsistencyPipeline": lambda build: (build.ConsistencyPipeline, build.MultistepConsistencyScheduler(), {}),
    "CTMPipeline": lambda build: (build.CTMPipeline, build.CTMScheduler(), {}),
    "TrigFlowPipeline": lambda build: (build.TrigFlowPipeline, build.TrigFlowScheduler(), {}),
    "MeanFlowPipeline": lambda build: (build.MeanFlowPipeline, FlowMatchEulerDiscreteScheduler(), {}),
    "DenoisingPipeline, Euler": lambda build: (build.DenoisingPipeline, EDMEulerScheduler(), {"solver": "euler"}),
}


@torch.no_grad()
def measure(steps: int, rounds: int) -> dict:
    """Medians of a pipeline call and of the same number of bare forward passes, and their ratio."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = ConsistencyPipeline(build_unet("small", (28, 28), 1, 10), MultistepConsistencyScheduler(sigma_min=0.0))
    pipeline.to(device).set_progress_bar_config(disable=True)
    labels = torch.arange(BATCH, device=device) % 10
    sample, label = torch.randn(BATCH, 1, 28, 28, device=device), torch.tensor(100.0, device=device)

    def forwards() -> None:
        for _ in range(steps):
            pipeline.unet(sample, label, class_labels=labels, return_dict=False)

    def whole() -> None:
        pipeline(class_labels=labels, num_inference_steps=steps, output_type="pt")

    return paired(whole, {"forwards": forwards}, rounds, repeats=3)


class Nothing(ModelMixin, ConfigMixin):
    """A network that returns its input."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, num_class_embeds: int = 10):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, class_labels=None, return_dict=True, target_timestep=None):
        return (sample,)


def earlier_build(commit: str) -> ModuleType:
    """Import the library at `commit`, in addition to the current one."""
    root = Path(cm_diffusers.__file__).parents[1]
    archive = subprocess.run(
        ["git", "-C", root, "archive", commit, "cm_diffusers", "pipelines"], check=True, capture_output=True
    )
    folder = tempfile.mkdtemp()
    tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(folder, filter="data")
    for name in [name for name in sys.modules if name.split(".")[0] == "cm_diffusers"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    return importlib.import_module("cm_diffusers")


def overhead(commit: str, rounds: int) -> None:
    """Print a table of microseconds per call, for each kind of pipeline and number of steps."""
    torch.set_num_threads(1)
    builds = {"now": cm_diffusers, "before": earlier_build(commit)}
    stock = ConsistencyModelPipeline(Nothing(), CMStochasticIterativeScheduler())
    print(f"| us | steps | now | {commit} | now / {commit} | diffusers | now / diffusers |")
    print("|---|---|---|---|---|---|---|")
    for kind, of_build in KINDS.items():
        for steps in (2 if "Denoising" in kind else 1, 8):
            calls = {"diffusers": call(stock, steps)}
            for name, build in builds.items():
                cls, scheduler, more = of_build(build)
                calls[name] = call(cls(Nothing(), scheduler), steps, **more)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, function in calls.items():
                    times[name].append(1e6 * seconds(function, 20))
            now, before, theirs = (statistics.median(times[name][1:]) for name in ("now", "before", "diffusers"))
            print(
                f"| {kind} | {steps} | {now:.0f} | {before:.0f} | {now / before:.2f} | {theirs:.0f} |"
                f" {now / theirs:.2f} |",
                flush=True,
            )


def call(pipeline, steps: int, **more) -> Callable[[], object]:
    """A function that calls the pipeline once."""
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(class_labels=3, num_inference_steps=steps, output_type="pt", **more)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="number of paired timings (default: 20)")
    parser.add_argument("--overhead", action="store_true", help="use a network that computes nothing")
    parser.add_argument("--before", default="2c827e7", help="commit of the earlier build (default: 2c827e7)")
    args = parser.parse_args()
    if args.overhead:
        overhead(args.before, args.rounds)
    else:
        show({f"{n}_step{'s' if n > 1 else ''}": measure(n, args.rounds) for n in (1, 2)})
