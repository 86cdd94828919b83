"""Measurements and pictures of a trajectory model in a toy run: the library's samplers beside the data.

Distances are Wasserstein-1 between 50,000 samples and as many samples of the data. `data` means further samples of
the data; their distance is that of a perfect model.
"""

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from cm_diffusers.objectives import Objective
from cm_diffusers.pipelines import CTMPipeline
from cm_diffusers.toys.problems import Mixture, Shape, ToyDraws


SAMPLERS = {  # arguments of CTMPipeline, and their titles in pictures
    "one_step": ({"num_inference_steps": 1, "gamma": 0.0}, "1 step"),
    "two_steps": ({"num_inference_steps": 2, "gamma": 0.0}, "2 steps"),
    "gamma_0.5": ({"num_inference_steps": 4, "gamma": 0.5}, "4 steps, gamma = 0.5"),
    "euler_10": ({"num_inference_steps": 10, "solver": "euler"}, "10 steps of Euler"),
}
SAMPLES = 50_000


def pipeline(objective: Objective) -> CTMPipeline:
    """The pipeline of a trained `objective`, without the clamp to [-1, 1] for images."""
    pipe = objective.pipeline(objective.network)
    pipe.scheduler.register_to_config(clip_denoised=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def path(pipe: CTMPipeline, noise: Tensor, arguments: dict) -> tuple[Tensor, Tensor]:
    """A sampler's levels, N + 1 of them, and its points there (N + 1, B, C, 1, 1).

    Args:
        pipe: the pipeline.
        noise: unit normal numbers (B, C, 1, 1).
        arguments: those of a call of the pipeline, such as the number of steps N.
    """
    points = []

    def keep(pipe: CTMPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        points.append(tensors["latents"])
        return {}

    generator = torch.Generator().manual_seed(0)
    pipe(latents=noise, generator=generator, output_type="pt", callback_on_step_end=keep, **arguments)
    return pipe.scheduler.sigmas, torch.stack([noise * pipe.scheduler.init_noise_sigma, *points])


def wasserstein(a: Tensor, b: Tensor, directions: int = 32) -> float:
    """The Wasserstein-1 distance of two samples `a` and `b` (B, C, 1, 1).

    For C = 1 it is exact, because on a line the best transport keeps the order of points. For C = 2 it is sliced: a
    mean over `directions` fixed lines, which divide half a turn evenly.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if a.shape[1] == 2:
        angles = torch.arange(directions).double() * (math.pi / directions)
        lines = torch.stack([angles.cos(), angles.sin()])
        a, b = a @ lines, b @ lines
    return (a.sort(0).values - b.sort(0).values).abs().mean().item()


def draw_samples(pipe: CTMPipeline, task: Mixture | Shape, n: int) -> dict[str, Tensor]:
    """`n` samples (n, C, 1, 1) of `task` as "reference" and as "data", and of each sampler of `pipe` by its name.

    All samplers start from the same noise.
    """
    draws = ToyDraws(1, 0, range(n))
    noise = draws.normal("noise", (task.dimensions, 1, 1))
    made = {name: path(pipe, noise, arguments)[1][-1] for name, (arguments, _) in SAMPLERS.items()}
    return {"reference": task.sample(draws), "data": task.sample(ToyDraws(2, 0, range(n))), **made}


def distances(samples: dict[str, Tensor]) -> dict[str, float]:
    """The distance of each of `samples` (B, C, 1, 1) from "reference", by name.

    That of "data" is due to the finite number of samples alone.
    """
    return {name: round(wasserstein(x, samples["reference"]), 5) for name, x in samples.items() if name != "reference"}


def picture(pipe: CTMPipeline, task: Mixture | Shape, samples: dict[str, Tensor], file: Path) -> None:
    """Write a picture of the data and of each sampler.

    It shows trajectories and densities on the line, and samples in the plane.

    Args:
        pipe: the pipeline of the model.
        task: the problem.
        samples: those of `draw_samples`, each (B, C, 1, 1).
        file: the path of the picture.
    """
    measured, columns = distances(samples), ["data", *SAMPLERS]
    titles = ["data", *(title for _, title in SAMPLERS.values())]
    rows = 2 if task.dimensions == 1 else 1
    figure = Figure(figsize=(14, 5.6 if rows == 2 else 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), sharex="row", sharey="row", squeeze=False)
    for name, title, column in zip(columns, titles, axes.T):
        colour = "C0" if name == "data" else "C1"
        column[0].set_title(title)
        column[-1].set_xlabel(f"{'x0, W1' if rows == 2 else 'sliced W1'} = {measured[name]:.4f}")
        if rows == 2:
            draw_trajectories(column[0], pipe, task, name, colour)
            draw_density(column[1], task, samples[name], colour)
        else:
            x, y = samples[name][:6000].flatten(1).T
            column[0].scatter(x, y, s=1.5, linewidths=0, color=colour)
            column[0].set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    if rows == 2:
        axes[0, 0].set_ylabel("cos(t) x_t, noise to data")
        axes[1, 0].set_ylabel("density")
    figure.savefig(file, dpi=100)


def draw_trajectories(axis: Axes, pipe: CTMPipeline, task: Mixture, name: str, colour: str) -> None:
    """Draw trajectories over the angle, from quantiles of noise on the left to data on the right.

    Args:
        axis: where to draw.
        pipe: the pipeline of the model.
        task: the problem.
        name: "data" for exact trajectories, or a name in `SAMPLERS`.
        colour: that of the lines.
    """
    sigma_max = pipe.scheduler.config.sigma_max
    noise = torch.special.ndtri(torch.linspace(0.02, 0.98, 25)).reshape(-1, 1, 1, 1)
    if name == "data":
        sigmas = task.sigma_data * torch.linspace(math.atan(sigma_max / task.sigma_data), 0, 80).tan()
        top = torch.full((len(noise),), sigma_max)
        points = torch.stack([task.jump(sigma_max * noise, top, sigma.expand(len(noise))) for sigma in sigmas])
    else:
        sigmas, points = path(pipe, noise, SAMPLERS[name][0])
    angles = (sigmas / task.sigma_data).atan()
    marker = "" if name == "data" else "."
    axis.plot(angles, angles.cos()[:, None] * points.flatten(1), colour, linewidth=0.7, marker=marker, markersize=3)
    axis.set(xlim=(1.6, -0.03), ylim=(-1.3, 1.3), xlabel="angle t")


def draw_density(axis: Axes, task: Mixture, x: Tensor, colour: str) -> None:
    """Draw a histogram of `x` (B, 1, 1, 1) in `colour` on `axis`, and the true density of `task`."""
    places = torch.linspace(-1.2, 1.2, 481)
    axis.hist(x.flatten().clamp(-1.2, 1.2).numpy(), bins=120, range=(-1.2, 1.2), density=True, color=colour, alpha=0.5)
    axis.plot(places, task.density(places), "k", linewidth=1)
    axis.set(ylim=(0, 1.5 * float(task.density(places).max())))
