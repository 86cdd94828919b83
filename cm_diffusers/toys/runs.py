"""Training a method on a toy problem, and the measurements and pictures of the result."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from cm_diffusers.core.ema import EMA, HalfLife
from cm_diffusers.core.tangents import jvp
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec, Objective
from cm_diffusers.toys import trajectories
from cm_diffusers.toys.problems import TASKS, Mixture, Shape, ToyDraws, ToyNetwork


# settings of each method; tangents are not normalised, because on a line sCT would then learn a median, not a mean
OPTIONS = {
    "diffusion": {"interpolant": "trigflow", "p_mean": -0.4, "p_std": 1.6},
    "sct": {"p_std": 1.6, "tangent_warmup_steps": 1000, "tangent_norm": "none"},
    "scd": {"p_std": 1.6, "tangent_warmup_steps": 1000, "tangent_norm": "none"},
    "ctm": {"num_scales": 40, "solver_steps": 3},
}
SIGMA_MAX = 80.0
TAUGHT = ("scd", "ctm")
REPORT, PICTURE = "report.json", "toy.png"


@dataclass(frozen=True)
class ToyRun:
    """A run on a toy problem.

    Args:
        task: the data, a name in `TASKS`.
        method: the training method, a name in `OPTIONS`.
        teacher: the teacher of scd and ctm: "trained" (a diffusion model, from which the student starts; the
            default), "exact" (the exact answer) or, for ctm, "none".
        max_train_steps: steps of the method, after as many steps of a trained teacher; ctm with teacher "none" trains
            for twice as many.
        batch_size: points per step.
        learning_rate: peak learning rate.
        seed: determines every random number.

    Raises:
        ValueError: a teacher for another method, a shape without ctm or with the teacher "exact", or scd without a
            teacher.
    """

    task: str = "bimodal"
    method: str = "scd"
    teacher: str | None = None
    max_train_steps: int = 3000
    batch_size: int = 512
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.teacher not in (None, "none") and self.method not in TAUGHT:
            raise ValueError(f"teacher has no effect on {self.method}; --teacher is for --method scd and ctm.")
        if isinstance(TASKS[self.task], Shape) and (self.method != "ctm" or self.teacher == "exact"):
            raise ValueError(
                f"{self.task} has no exact answer; use --method ctm with --teacher trained or none, or another --task."
            )
        if self.method == "scd" and self.teacher == "none":
            raise ValueError("scd distils a teacher; use --teacher trained or exact, or --method ctm.")

    def run(self, folder: Path) -> dict[str, Any]:
        """Train, write report.json and toy.png to the existing `folder`, and return the report."""
        start, steps, task = time.perf_counter(), self.max_train_steps, TASKS[self.task]
        torch.manual_seed(self.seed)
        two_times = OBJECTIVES[self.method].two_times
        network = ToyNetwork(task.dimensions, two_times, depth=5 if two_times else 3)  # jumps are harder to learn
        result: dict[str, Any] = {"task": self.task, "method": self.method, "seed": self.seed}
        teacher: Callable | None = None
        options: dict[str, Any] = {}
        kind = (self.teacher or "trained") if self.method in TAUGHT else None
        if kind is not None:
            result["teacher"] = kind
            options["pretrained_teacher_model"] = None if kind == "none" else kind
        if kind == "trained":
            interpolant = "edm" if self.method == "ctm" else "trigflow"
            trained = self.train("diffusion", steps, network, interpolant=interpolant)
            result["teacher_errors"] = errors("diffusion", task, trained)
            teacher = trained.denoiser(copy.deepcopy(network).requires_grad_(False))
        elif kind == "exact":
            teacher = task
        elif kind == "none":  # a quarter of the run trains a denoiser, whose trajectories the model then learns
            steps, options["pretrain_steps"] = 2 * steps, steps // 2
        objective = self.train(self.method, steps, network, teacher, **options)
        result |= errors(self.method, task, objective)
        if self.method == "ctm":
            pipe = trajectories.pipeline(objective)
            samples = trajectories.draw_samples(pipe, task, trajectories.SAMPLES)
            result["wasserstein"] = trajectories.distances(samples)
            trajectories.picture(pipe, task, samples, folder / PICTURE)
        else:
            draw(self.method, task, objective, folder / PICTURE)
        result["seconds"] = round(time.perf_counter() - start, 1)
        (folder / REPORT).write_text(json.dumps(result, indent=2) + "\n")
        return result

    def train(
        self, method: str, steps: int, network: ToyNetwork, teacher: Callable | None = None, **options: Any
    ) -> Objective:
        """Train `network` in place; returns the objective with an average of the weights in `network`.

        Args:
            method: a name in `OBJECTIVES`.
            steps: training steps.
            network: the network to train.
            teacher: the denoiser to distil; it marks `network` as pretrained.
            options: settings of the method beside those in `OPTIONS`.
        """
        cls, task = OBJECTIVES[method], TASKS[self.task]
        options = cls.Options(**OPTIONS[method] | options)
        spec = ModelSpec(task.sigma_data, "angle", SIGMA_MAX, prediction=cls.prediction(options))
        objective = cls(network, spec, options, steps, pretrained=teacher is not None, teacher=teacher)
        optimizer = torch.optim.RAdam(network.parameters(), self.learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        ema = EMA(network, [HalfLife(500)])
        for step in trange(steps, desc=method):
            draws = ToyDraws(self.seed, step, range(self.batch_size))
            optimizer.zero_grad()
            objective.loss(Batch(task.sample(draws)), draws).total.backward()
            optimizer.step()
            schedule.step()
            objective.after_step(step)
            ema.update((step + 1) * self.batch_size, self.batch_size)
        network.load_state_dict(next(iter(ema.shadows.values())))
        return objective


def exact(method: str, task: Mixture, x: Tensor, sigma: Tensor, floor: float = 0.0) -> Tensor:
    """The exact answer at `x` (B, ...) and `sigma` (B,) for `method` on `task`.

    It is the posterior mean for "diffusion", else the consistency function down to the level `floor`.
    """
    if method == "diffusion":
        return task.denoised(x, sigma)
    return task.jump(x, sigma, torch.full_like(sigma, floor)).to(x)


def total_derivative(objective: Objective, task: Mixture, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The learned function's derivative with respect to the angle, along the exact trajectories of `task`.

    Returns it (B, 1, 1, 1) twice: as a tangent, and as a difference of two points of a trajectory.

    Args:
        objective: holds the learned denoiser.
        task: the problem.
        x: points (B, 1, 1, 1) in VE's scale.
        t: their angles (B,).
    """
    sigma_data, denoiser = objective.spec.sigma_data, objective.denoiser()
    sigma, speed = sigma_data * t.tan(), sigma_data / t.cos() ** 2
    slope = (x - task.denoised(x, sigma)) / sigma.reshape(-1, 1, 1, 1)
    tangent = jvp(denoiser, (x, sigma), (slope * speed.reshape(-1, 1, 1, 1), speed))[1]
    step, ends = 0.005, []
    for side in (t + step, t - step):
        there = sigma_data * side.clamp(1e-3, 1.569).tan()
        with torch.no_grad():
            ends.append(denoiser(task.jump(x, sigma, there).float(), there))
    return tangent, (ends[0] - ends[1]) / (2 * step)


def errors(method: str, task: Mixture | Shape, objective: Objective) -> dict[str, float]:
    """RMS errors of a trained `objective` of `method` on `task`; none for a shape, which has no exact answer.

    "rms_error" is over random noise levels, and "one_step_rms_error" is for one step from pure noise.
    """
    if isinstance(task, Shape):
        return {}
    n, denoiser, draws = 20_000, objective.denoiser(), ToyDraws(1, 0, range(20_000))
    x0 = task.sample(draws)
    noise = draws.normal("noise", (1, 1, 1))
    found = {}
    for name, sigma in (("", (-1 + 1.6 * draws.normal("sigma")).exp()), ("one_step_", torch.full((n,), SIGMA_MAX))):
        x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
        with torch.no_grad():
            difference = denoiser(x, sigma) - exact(method, task, x, sigma, objective.floor)
        found[f"{name}rms_error"] = round(difference.square().mean().sqrt().item(), 5)
    return found


def draw(method: str, task: Mixture, objective: Objective, path: Path) -> None:
    """Write a picture of a trained `objective` of `method` on `task` to `path`.

    It shows trajectories, predictions along them, and maps of prediction, error and derivatives over angle and
    position.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sigma_data, denoiser = objective.spec.sigma_data, objective.denoiser()
    angles, positions = torch.linspace(0.02, 1.56, 120), torch.linspace(-1.5, 1.5, 121)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)

    starts = torch.linspace(-1.2, 1.2, 17)
    sigmas = sigma_data * angles.tan()
    top = (starts / angles[-1].cos()).reshape(-1, 1, 1, 1)
    for start in top:
        x = task.jump(start.expand(len(angles), 1, 1, 1), sigmas[-1].expand(len(angles)), sigmas).float()
        with torch.no_grad():
            along = denoiser(x, sigmas)
        axes[0, 0].plot(angles, x.flatten() * angles.cos(), "C0", linewidth=0.8)
        axes[0, 1].plot(angles, along.flatten(), "C1", linewidth=0.8)
    axes[0, 0].set(title="exact trajectories", ylabel="x_t = cos(t) x0 + sin(t) z")
    axes[0, 1].set(title="what the model makes of them (flat if consistent)", ylabel="f(x_t, t)")

    t = angles.repeat_interleave(len(positions))
    x = (positions.repeat(len(angles)) / t.cos()).reshape(-1, 1, 1, 1)
    sigma = sigma_data * t.tan()
    with torch.no_grad():
        learned = denoiser(x, sigma)
    tangent, numeric = total_derivative(objective, task, x, t)
    maps = {
        "learned f(x_t, t)": (axes[0, 2], learned, 1.0),
        "learned less exact": (axes[1, 0], learned - exact(method, task, x, sigma), 0.2),
        "tangent df/dt": (axes[1, 1], tangent, 1.0),
        "difference of neighbours": (axes[1, 2], numeric, 1.0),
    }
    for title, (axis, values, reach) in maps.items():
        grid = values.reshape(len(angles), len(positions)).T
        image = axis.pcolormesh(angles, positions, grid, cmap="RdBu_r", vmin=-reach, vmax=reach)
        axis.set(title=title, xlabel="angle t", ylabel="x_t")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=100)
