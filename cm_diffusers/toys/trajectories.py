"""What a toy run measures and draws of a trajectory model: the library's samplers beside the data.

Distances are Wasserstein-1, of 50,000 samples to as many of the data. `data` stands for other samples of the data,
whose distance is that of a perfect model.
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


SAMPLERS = {  # arguments of CTMPipeline, and what they are called in pictures
    "one_step": ({"num_inference_steps": 1, "gamma": 0.0}, "1 step"),
    "two_steps": ({"num_inference_steps": 2, "gamma": 0.0}, "2 steps"),
    "gamma_0.5": ({"num_inference_steps": 4, "gamma": 0.5}, "4 steps, gamma = 0.5"),
    "euler_10": ({"num_inference_steps": 10, "solver": "euler"}, "10 steps of Euler"),
}
SAMPLES = 50_000


def pipeline(objective: Objective) -> CTMPipeline:
    """The pipeline of a trained model, without the clamp to [-1, 1] that images have."""
    pipe = objective.pipeline(objective.network)
    pipe.scheduler.register_to_config(clip_denoised=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def path(pipe: CTMPipeline, noise: Tensor, arguments: dict) -> tuple[Tensor, Tensor]:
    """A sampler's levels (N + 1,) and where it is at them, (N + 1, B, C, 1, 1), from unit `noise` (B, C, 1, 1)."""
    points = []

    def keep(pipe: CTMPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        points.append(tensors["latents"])
        return {}

    generator = torch.Generator().manual_seed(0)
    pipe(latents=noise, generator=generator, output_type="pt", callback_on_step_end=keep, **arguments)
    return pipe.scheduler.sigmas, torch.stack([noise * pipe.scheduler.init_noise_sigma, *points])


def wasserstein(a: Tensor, b: Tensor, directions: int = 32) -> float:
    """Wasserstein-1 distance of two samples (B, C, 1, 1): exact for C = 1; for C = 2 sliced, a mean over directions.

    On a line the best transport keeps the order of points. The directions, always the same, divide half a turn evenly.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if a.shape[1] == 2:
        angles = torch.arange(directions).double() * (math.pi / directions)
        lines = torch.stack([angles.cos(), angles.sin()])
        a, b = a @ lines, b @ lines
    return (a.sort(0).values - b.sort(0).values).abs().mean().item()


def draw_samples(pipe: CTMPipeline, task: Mixture | Shape, n: int) -> dict[str, Tensor]:
    """`n` samples (n, C, 1, 1): the reference, more data, and what each sampler makes of the same noise."""
    draws = ToyDraws(1, 0, range(n))
    noise = draws.normal("noise", (task.dimensions, 1, 1))
    made = {name: path(pipe, noise, arguments)[1][-1] for name, (arguments, _) in SAMPLERS.items()}
    return {"reference": task.sample(draws), "data": task.sample(ToyDraws(2, 0, range(n))), **made}


def distances(samples: dict[str, Tensor]) -> dict[str, float]:
    """Of each of `samples` from the reference; that of "data" is due to their finite number alone."""
    return {name: round(wasserstein(x, samples["reference"]), 5) for name, x in samples.items() if name != "reference"}


def picture(pipe: CTMPipeline, task: Mixture | Shape, samples: dict[str, Tensor], file: Path) -> None:
    """The data and each sampler: on the line trajectories and densities, in the plane the samples."""
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
    """From the quantiles of noise on the left to data on the right, over the angle: exact, or by a sampler."""
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
    """A histogram over the true density."""
    places = torch.linspace(-1.2, 1.2, 481)
    axis.hist(x.flatten().clamp(-1.2, 1.2).numpy(), bins=120, range=(-1.2, 1.2), density=True, color=colour, alpha=0.5)
    axis.plot(places, task.density(places), "k", linewidth=1)
    axis.set(ylim=(0, 1.5 * float(task.density(places).max())))
