"""What a training step costs beyond its floor: a whole step of the real loop over the bare parts that it can't avoid.

    python benchmarks/step_cost.py

The floor is one forward with backward pass, the method's further forward passes, and the optimiser's step, each timed
by itself in the same run. Batch 64, images of 28x28, the preset `small`, float32.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common import paired, show
from datasets import Dataset, Features, Image, Value

from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data import ImageData
from cm_diffusers.engine.loop import Trainer
from cm_diffusers.engine.models import build_start
from cm_diffusers.objectives import OBJECTIVES


METHODS = {  # flags, and forward passes without gradient in a step
    "diffusion": ([], 0),
    "ect": (["--pretrain_steps", "0"], 1),
}
BATCH = 64


def build_trainer(method: str, folder: str, accelerator: Accelerator) -> Trainer:
    """A trainer on noise images."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 28, 28), dtype=np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": list(pixels), "label": [i % 10 for i in range(len(pixels))]}
    Dataset.from_dict(rows, features=features).to_parquet(f"{folder}/data/train.parquet")
    flags = ["--dataset_name", f"{folder}/data", "--output_dir", f"{folder}/run", "--class_conditional"]
    flags += ["--train_batch_size", str(BATCH), *METHODS[method][0]]
    config = parse_config(["--method", method, *flags], [method], "")
    data = ImageData(config.data, True, show_progress=False)
    start = build_start(config.model, data, 0)
    objective = OBJECTIVES[method](start.network, start.spec, config.options, config.run.max_train_steps)
    return Trainer(config, objective, data, accelerator)


def measure(method: str, rounds: int) -> dict:
    """Medians of the whole step and of its parts, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").mkdir()
        accelerator = Accelerator()
        trainer = build_trainer(method, folder, accelerator)
        device, network = accelerator.device, trainer.objective.network
        sample, label = torch.randn(BATCH, 1, 28, 28, device=device), torch.randn(BATCH, device=device)
        classes = torch.arange(BATCH, device=device) % 10
        optimizer = torch.optim.RAdam(network.parameters(), lr=0.0)

        def forward() -> torch.Tensor:
            return network(sample, label, class_labels=classes).sample

        def forward_without_gradient() -> None:
            with torch.no_grad():
                forward()

        parts = {"forward_backward": lambda: forward().square().mean().backward(), "optimizer": optimizer.step}
        if METHODS[method][1]:
            parts["forwards"] = lambda: [forward_without_gradient() for _ in range(METHODS[method][1])]
        batches = trainer.data.batches(trainer.spot, 0)

        def whole() -> None:
            trainer.optimizer.zero_grad()
            trainer._train_step(batches)

        return paired(whole, parts, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    show({method: measure(method, args.rounds) for method in args.methods})
