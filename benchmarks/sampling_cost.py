"""What sampling costs beyond the network: pipeline calls with output_type="pt" over bare forward passes.

    python benchmarks/sampling_cost.py

Batch 64, images of 28x28, the preset `small`, float32, 1 and 2 steps.
"""

import argparse

import torch
from common import paired, show

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.models import build_unet


BATCH = 64


@torch.no_grad()
def measure(steps: int, rounds: int) -> dict:
    """Medians of a pipeline call and of as many bare forward passes, and their ratio."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    show({f"{n}_step{'s' if n > 1 else ''}": measure(n, args.rounds) for n in (1, 2)})
