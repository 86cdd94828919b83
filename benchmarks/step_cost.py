"""Cost of a training step beyond its floor: a step of the real training loop / its unavoidable parts.

    python benchmarks/step_cost.py

- The floor: forward passes with a backward pass, the method's further forward passes, its tangent, and the optimiser
  step. Each part is timed separately in the same run. CTM's teacher takes one Heun step here.
- Beyond the floor: reading the batch, drawing noise, the distance, and the EMA of the weights.

Setting: batch 64, images of 28x28, float32, preset `small`. Methods with tangents use `jvp_small`. Their step is also
compared with the forward pass, backward pass and optimiser step of diffusion (`over_diffusion`).
"""

import argparse
import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common import paired, show
from datasets import Dataset, Features, Image, Value

from cm_diffusers.core.tangents import jvp, jvp_ready
from cm_diffusers.engine.config import parse_config
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.saved.start import build_start
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.optimisers import build_optimizer
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.objectives import OBJECTIVES


@dataclass(frozen=True)
class Method:
    """Parts of a method's training step.

    Args:
        forwards: number of forward passes without gradient.
        flags: further flags of the training.
        teacher: whether the method has a teacher.
        tangent: whether the step computes a tangent.
        method: name of the method, if it differs from the key in `METHODS`.
        trained: number of forward passes with a backward pass.
        frozen: number of forward passes with a backward pass through frozen weights.
        preset: network preset; the network is new, even with a teacher.
    """

    forwards: int
    flags: tuple[str, ...] = ()
    teacher: bool = False
    tangent: bool = False
    method: str | None = None
    trained: int = 1
    frozen: int = 0
    preset: str = "small"


JVP = "jvp_small"
METHODS = {  # the solver is Heun's method, which calls the teacher twice
    "diffusion": Method(0),
    "cdm": Method(8, trained=3),  # four steps of two rollouts; their first steps reuse the denoiser's output
    "ect": Method(1, ("--pretrain_steps", "0")),
    "ct": Method(1),
    "ict": Method(1),
    "cd": Method(3, ("--pretrained_teacher_model", "given"), teacher=True),
    "lcm": Method(2, ("--pretrained_teacher_model", "given"), teacher=True),  # DDIM calls the teacher once
    "tcd": Method(2, ("--pretrained_teacher_model", "given"), teacher=True),
    "ecd": Method(3, ("--pretrained_teacher_model", "given", "--pretrain_steps", "0"), teacher=True),
    "trigflow": Method(0, ("--interpolant", "trigflow"), method="diffusion", preset=JVP),
    "sct": Method(0, tangent=True, preset=JVP),
    "scd": Method(1, ("--pretrained_teacher_model", "given"), teacher=True, tangent=True, preset=JVP),
    "mean_flow": Method(0, tangent=True, preset=JVP),
    # two of the teacher, two of the target; the jump and the denoiser are trained; the jump on to the data is frozen
    "ctm": Method(
        4, ("--pretrained_teacher_model", "given", "--solver_steps", "1"), teacher=True, trained=2, frozen=1
    ),
}
BATCH = 64


def build_trainer(
    name: str,
    folder: str,
    accelerator: Accelerator,
    batch: int = BATCH,
    shape: tuple[int, ...] = (28, 28),
    preset: str | None = None,
    flags: tuple[str, ...] = (),
) -> Trainer:
    """A trainer for the entry `name` of `METHODS`, on images of noise. A teacher is a copy of the network.

    Args:
        name: the entry.
        folder: an empty folder for data and run.
        accelerator: the processes and the precision.
        batch: number of images of a step.
        shape: (height, width) of grey images, or (height, width, 3).
        preset: the network, in place of that of the entry.
        flags: further flags of the training.
    """
    method = METHODS[name]
    name = method.method or name
    Path(folder, "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, *shape), dtype=np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": list(pixels), "label": [i % 10 for i in range(len(pixels))]}
    Dataset.from_dict(rows, features=features).to_parquet(f"{folder}/data/train.parquet")
    words = ["--dataset_name", f"{folder}/data", "--output_dir", f"{folder}/run", "--class_conditional"]
    words += ["--train_batch_size", str(batch), *method.flags, *flags]
    config = parse_config(["--method", name, *words], [name], "")
    config = replace(config, model=replace(config.model, model_preset=preset or method.preset))
    data = ImageData(config.data, True, show_progress=False)
    start = build_start(config.model, data, 0, method=OBJECTIVES[name], options=config.options)
    teacher = None
    if method.teacher:
        network = copy.deepcopy(start.network).eval().requires_grad_(False)
        teacher = start.spec.denoiser(network)
    steps = config.run.max_train_steps
    objective = OBJECTIVES[name](start.network, start.spec, config.options, steps, teacher=teacher)
    return Trainer(config, objective, data, accelerator)


def measure(name: str, rounds: int) -> dict:
    """Medians of the whole step and of its parts, and their ratio, see `paired`."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator()
        trainer = build_trainer(name, folder, accelerator)
        device, network = accelerator.device, trainer.objective.network
        sample, label = torch.randn(BATCH, 1, 28, 28, device=device), torch.rand(BATCH, device=device)
        classes = torch.arange(BATCH, device=device) % 10
        optimizer = build_optimizer(network, trainer.run)
        optimizer.param_groups[0]["lr"] = 0.0

        second = {"target_timestep": label / 2} if OBJECTIVES[METHODS[name].method or name].two_times else {}

        def forward(sample: torch.Tensor = sample, label: torch.Tensor = label) -> torch.Tensor:
            return network(sample, label, class_labels=classes, **second).sample

        def forward_without_gradient() -> None:
            with torch.no_grad():
                forward()

        def tangent() -> None:
            with jvp_ready(network):
                jvp(forward, (sample, label), (sample, label), mode="exact")

        def forward_backward() -> None:
            optimizer.zero_grad()
            for _ in range(METHODS[name].trained):
                forward().square().mean().backward()

        def frozen() -> None:
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            forward(sample.clone().requires_grad_()).square().mean().backward()
            for parameter in network.parameters():
                parameter.requires_grad_(True)

        parts = {"forward_backward": forward_backward, "optimizer": optimizer.step}
        if METHODS[name].forwards:
            parts["forwards"] = lambda: [forward_without_gradient() for _ in range(METHODS[name].forwards)]
        if METHODS[name].tangent:
            parts["tangent"] = tangent
        if METHODS[name].frozen:
            parts["frozen"] = frozen
        batches, stopping = trainer.data.batches(trainer.share, 0), Stopping()

        def whole() -> None:
            trainer.state.optimizer.zero_grad()
            trainer.take_step(batches, stopping)

        report = paired(whole, parts, rounds)
        if METHODS[name].tangent:
            diffusion = report["forward_backward_ms"] + report["optimizer_ms"]
            report["over_diffusion"] = round(report["whole_ms"] / diffusion, 2)
        return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="number of paired timings (default: 20)")
    args = parser.parse_args()
    show({method: measure(method, args.rounds) for method in args.methods})
