"""Measure how much lower precision of the networks changes the gradient of each method.

    python benchmarks/experiments/precision.py
    python benchmarks/experiments/precision.py --device cuda --size 16 --preset small \\
        --pretrain 2000 --tune 100 --batch 512

A small network is trained in float32 on smooth random images: first as a diffusion model, then by each method through
its stages. At each place in the table, the gradient of one batch is computed in float32 and in lower precision, with
the same draws. The table has the cosine of both gradients, and both losses.

Student, target network and teacher run under autocast, as in training. The column `tangent` is the precision of a
method's tangents. With fp16, the loss is scaled like by a gradient scaler. TF32 needs CUDA. Without a GPU the script
takes about three minutes, most of them for fp16.
"""

import argparse
import copy
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cm_diffusers.core.draws import Draws
from cm_diffusers.models import build_unet, keep_time_embedding_in_float32
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec, Objective


SIGMA_DATA = 0.5
LABELS = {"edm": "log_sigma", "trigflow": "angle", "flow": "flow_time"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = [  # precision of the networks, and of the tangents
    ("bf16", "low"),
    ("bf16", "fp32"),
    ("fp16", "low"),
    ("fp16", "fp32"),
    ("tf32", "low"),
]


@dataclass(frozen=True)
class Case:
    """A method to measure.

    Args:
        places: training steps at which the gradient is measured, by name.
        options: settings of the method.
        steps: training steps of the whole run, for schedules.
        prediction: what the network predicts, a key of `LABELS`.
        method: name of the method, if it differs from the key in `CASES`.
    """

    places: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    prediction: str = "edm"
    method: str | None = None


TEACHER = {"pretrained_teacher_model": "a copy of the start"}
STAGES = {f"stage {stage}": 100 * stage for stage in (0, 3, 5, 7, 8, 9)}  # 7 is the last stage of a default run
WARMUP = {"tangent_warmup_steps": 100}
ENDS = {"without tangent": 0, "full tangent": 100}
CASES = {
    "diffusion": Case({"any step": 0}),
    "cdm": Case({"any step": 0}),
    "ect": Case(STAGES, {"pretrain_steps": 0, "stage_steps": 100}),
    "ecd": Case(STAGES, TEACHER | {"stage_steps": 100}),
    "ict": Case({"N = 11": 0, "N = 161": 4000, "N = 1281": 7000}, steps=8000),
    "ct": Case({"N = 2": 0, "N = 76": 250, "N = 151": 999}),
    "cd": Case({"18 levels": 0}, TEACHER | {"num_scales": 18}),
    "cd, 40": Case({"40 levels": 0}, TEACHER | {"num_scales": 40}, method="cd"),
    "ctm": Case({"18 levels": 0}, TEACHER | {"num_scales": 18, "solver_steps": 1}),
    "ctm, 40": Case({"40 levels": 0}, TEACHER | {"num_scales": 40, "solver_steps": 1}, method="ctm"),
    "sct": Case(ENDS, WARMUP, prediction="trigflow"),
    "scd": Case(ENDS, TEACHER | WARMUP, prediction="trigflow"),
    "mean_flow": Case({"any step": 0}, prediction="flow"),
}


def smooth_images(count: int, size: int) -> Tensor:
    """Grey images (count, 1, size, size) in [-1, 1] with three soft spots each."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-1, 1, size)
    x, y, width, height = torch.rand(4, count, 3, 1, 1, generator=generator)
    across = (grid[None, None, None, :] - 2 * x + 1) ** 2 + (grid[None, None, :, None] - 2 * y + 1) ** 2
    spots = (2 * height - 1) * (-across / (0.05 + 0.2 * width)).exp()
    return (2 * spots.sum(1, keepdim=True)).tanh()


class Data:
    """Batches of smooth images on a device, with the root mean square SIGMA_DATA."""

    def __init__(self, count: int, size: int, device: str):
        images = smooth_images(count, size)
        self.images = (images * SIGMA_DATA / images.square().mean().sqrt()).to(device)

    def batch(self, size: int, seed: int) -> Batch:
        """A batch of `size` images, chosen by `seed`."""
        rows = torch.randint(len(self.images), (size,), generator=torch.Generator().manual_seed(seed))
        return Batch(self.images[rows.to(self.images.device)])


def train(objective: Objective, data: Data, place: int, steps: int, batch: int, rate: float, seed: int) -> None:
    """Take `steps` training steps in float32, all with the method's schedules at its step `place`."""
    optimizer = torch.optim.Adam(objective.network.parameters(), rate)
    for step in range(steps):
        draws = Draws(seed + step, place, range(batch), data.images.device)
        optimizer.zero_grad()
        objective.loss(data.batch(batch, seed + step), draws).total.backward()
        optimizer.step()
        objective.after_step(place)
    optimizer.zero_grad()


def diffusion_model(prediction: str, data: Data, args: argparse.Namespace) -> nn.Module:
    """Train a diffusion model with this prediction, and return its network."""
    torch.manual_seed(0)
    preset = args.preset if prediction == "edm" else f"jvp_{args.preset}"
    network = build_unet(preset, (args.size, args.size), 1).to(args.device)
    keep_time_embedding_in_float32(network)
    diffusion = OBJECTIVES["diffusion"]
    spec, options = ModelSpec(SIGMA_DATA, LABELS[prediction], prediction=prediction), diffusion.Options(prediction)
    objective = diffusion(network, spec, options, args.pretrain)
    for part, rate in enumerate((2e-3, 5e-4)):
        train(objective, data, 0, args.pretrain // 2, args.train_batch, rate, seed=part * args.pretrain)
    return network


def build(name: str, start: nn.Module) -> Objective:
    """The method of a case, with a copy of `start` as network and a frozen copy as teacher."""
    case = CASES[name]
    method = OBJECTIVES[case.method or name]
    spec = ModelSpec(SIGMA_DATA, LABELS[case.prediction], prediction=case.prediction)
    teacher = None
    if "pretrained_teacher_model" in case.options:
        teacher = spec.denoiser(copy.deepcopy(start).eval().requires_grad_(False))
    network = method.adapt(copy.deepcopy(start), spec)
    return method(network, spec, method.Options(**case.options), case.steps, pretrained=True, teacher=teacher)


@contextmanager
def precision(objective: Objective, kind: str, tangent: str) -> Iterator[None]:
    """Let the networks compute in the precision `kind`, and the tangents as well if `tangent` is "low"."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for flag in flags:
        flag.allow_tf32 = kind == "tf32"
    network, changed = objective.network, list(objective.auxiliary.values())
    if objective.teacher is not None:
        changed.append(objective.teacher.network)
    try:
        if kind in DTYPES:
            autocast = torch.autocast(next(network.parameters()).device.type, DTYPES[kind])
            if tangent == "low":
                changed.append(network)
            else:
                objective.attach(autocast(network.forward))
            for module in changed:
                module.forward = autocast(module.forward)
        yield
    finally:
        objective.attach(network)
        for module in changed:
            vars(module).pop("forward", None)


def gradient(objective: Objective, batch: Batch, place: int, kind: str, tangent: str) -> tuple[float, Tensor]:
    """The loss, and the gradient as one vector (n,) in float64."""
    scale = 2.0**16 if kind == "fp16" else 1.0
    while True:
        draws = Draws(1 << 30, place, range(len(batch.samples)), batch.samples.device)
        with precision(objective, kind, tangent):
            loss = objective.loss(batch, draws).total
            (scale * loss).backward()
        found = [p.grad for p in objective.network.parameters() if p.grad is not None]
        vector = torch.cat([grad.flatten().double() for grad in found])
        objective.network.zero_grad()
        if kind != "fp16" or vector.isfinite().all() or scale < 1e-3:
            return loss.item(), vector
        scale /= 2


def measure(name: str, start: nn.Module, data: Data, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each place of a method and each lower precision."""
    case = CASES[name]
    objective = build(name, start)
    tangents = objective.needs_tangents
    batch = data.batch(args.batch, seed=1 << 20)
    for number, (place, step) in enumerate(case.places.items()):
        train(objective, data, step, args.tune, args.train_batch, args.rate, seed=1000 * (number + 1))
        loss, exact = gradient(objective, batch, step, "fp32", "fp32")
        for kind, tangent in ROWS:
            if (kind == "tf32" and args.device == "cpu") or (tangent == "fp32" and not tangents):
                continue
            lower, other = gradient(objective, batch, step, kind, tangent)
            cosine = torch.nn.functional.cosine_similarity(exact, other, dim=0).item()
            shown = {"low": kind, "fp32": "fp32"}[tangent] if tangents else "-"
            row = {"method": name.split(",")[0], "place": place, "networks": kind, "tangent": shown}
            yield row | {"cosine": cosine, "loss": lower, "loss_fp32": loss}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    methods = list(OBJECTIVES)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="default: all methods")
    parser.add_argument("--preset", default="tiny", help="network preset, without jvp_ (default: tiny)")
    parser.add_argument("--size", type=int, default=8, help="height and width of the images (default: 8)")
    parser.add_argument("--pretrain", type=int, default=200, help="steps of the diffusion model (default: 200)")
    parser.add_argument("--tune", type=int, default=10, help="steps before each measurement (default: 10)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of these steps (default: 2e-4)")
    parser.add_argument("--batch", type=int, default=64, help="images per compared gradient (default: 64)")
    parser.add_argument("--train_batch", type=int, default=64, help="images per training step (default: 64)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    began, cuda = time.perf_counter(), args.device.startswith("cuda")
    data, starts = Data(2048, args.size, args.device), {}
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, python {platform.python_version()}, torch {torch.__version__}, {vars(args)}")
    print(f"{'method':10} {'place':16} networks tangent  cosine     loss  in fp32", flush=True)
    line = "{method:10} {place:16} {networks:8} {tangent:7} {cosine:7.4f} {loss:8.4g} {loss_fp32:8.4g}"
    for name, case in CASES.items():
        if (case.method or name) in args.methods:
            if case.prediction not in starts:
                starts[case.prediction] = diffusion_model(case.prediction, data, args)
            for row in measure(name, starts[case.prediction], data, args):
                print(line.format(**row), flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
