"""The drawings of docs/concepts.md and docs/choose.md, from exact formulas and published numbers.

    python docs/drawings.py

Trajectories are those of two Gaussians on a line (`cm_diffusers.toys.problems`), whose jumps have a closed form.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

from cm_diffusers.toys.problems import Mixture


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
TASK = Mixture((-0.45, 0.45), (0.12, 0.12), (0.5, 0.5))
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#e65100", "#2e7d32", "#9e9e9e"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def jump(x: float, sigma: float, sigma_next: float) -> float:
    """The exact ODE's end at `sigma_next` from the point `x` at `sigma`."""
    return float(TASK.jump(torch.tensor([[x]]), torch.tensor([sigma]), torch.tensor([sigma_next])))


def trajectory(x: float, sigma: float, levels: np.ndarray) -> list[float]:
    """The exact trajectory through `x` at `sigma`, at all `levels`."""
    return [jump(x, sigma, float(level)) for level in levels]


def arrow(axis: plt.Axes, start: tuple, end: tuple, colour: str, bend: float = 0.0, **style) -> None:
    """An arrow from point to point."""
    arrows = {"arrowstyle": "-|>", "color": colour, "lw": 2, "connectionstyle": f"arc3,rad={bend}", **style}
    axis.annotate("", end, start, arrowprops=arrows)


def background(axis: plt.Axes, top: float) -> None:
    """Trajectories in grey, and the data at noise level 0."""
    levels = np.linspace(0, top, 80)
    for x in np.linspace(-2.4, 2.4, 17) * top / 2:
        axis.plot(levels, trajectory(x, top, levels), color=GREY, lw=0.6, alpha=0.7)
    x = torch.linspace(-1, 1, 200)
    axis.fill_betweenx(x, -0.12 * TASK.density(x) * top / 2, 0, color=GREY, alpha=0.4, lw=0)
    axis.set(xlabel="noise level sigma", ylabel="x", xlim=(-0.25 * top / 2, top * 1.03))


def noise_levels() -> None:
    """A digit with more and more noise."""
    digit = torch.tensor(load_digits().images[13] / 8 - 1).float()
    noise = torch.randn(digit.shape, generator=torch.Generator().manual_seed(1))
    figure, axes = plt.subplots(1, 6, figsize=(9, 1.9))
    for axis, sigma in zip(axes, (0, 0.1, 0.4, 1.5, 10, 80)):
        axis.imshow(digit + sigma * noise, cmap="gray", vmin=-1 - sigma, vmax=1 + sigma)
        axis.set_title(f"sigma {sigma}", fontsize=10)
        axis.axis("off")
    save(figure, "noise_levels")


def jumps() -> None:
    """Steps of a solver, the jump of one time, and jumps of two times."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    top, start = 2.0, 1.5
    levels = np.linspace(0, top, 80)
    for axis in axes:
        background(axis, top)
        axis.plot(levels, trajectory(start, top, levels), color=BLUE, lw=2)
        axis.plot(top, start, "o", color=BLUE)
    steps = np.linspace(top, 0, 9)
    x = start
    for sigma, after in zip(steps, steps[1:]):
        denoised = float(TASK.denoised(torch.tensor([[x]]), torch.tensor([sigma])))
        following = x + (after - sigma) * (x - denoised) / sigma
        arrow(axes[0], (sigma, x), (after, following), ORANGE, lw=1.4, shrinkA=0, shrinkB=0)
        x = following
    axes[0].set_title("diffusion model: many small steps")
    end = jump(start, top, 0.0)
    arrow(axes[1], (top, start), (0, end), ORANGE, bend=0.2)
    axes[1].set_title("one time: D(x, t) jumps to noise level 0")
    middle = jump(start, top, 0.8)
    arrow(axes[2], (top, start), (0.8, middle), ORANGE, bend=0.25)
    arrow(axes[2], (0.8, middle), (0, end), GREEN, bend=0.25)
    axes[2].axvline(0.8, color=GREY, lw=0.8, ls=":")
    axes[2].text(0.83, -1.9, "s", color=GREY)
    axes[2].set_title("two times: G(x, t, s) jumps to any s")
    save(figure, "jumps")


def target() -> None:
    """Student, target, gap; the straight line of the data against a teacher's step; the tangent."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    t, r, x = 1.2, 0.8, 1.25
    levels = np.linspace(0, 1.6, 80)
    path = trajectory(x, t, levels)
    for axis in axes:
        background(axis, 1.6)
    x_r, end = jump(x, t, r), jump(x, t, 0.0)
    axes[0].plot(levels, path, color=BLUE, lw=1.5)
    arrow(axes[0], (t, x), (0, end + 0.18), ORANGE, bend=0.15)
    arrow(axes[0], (r, x_r), (0, end), GREEN, bend=0.15)
    axes[0].text(0.42, 1.35, "student\nD(x_t, t)", color=ORANGE, fontsize=10)
    axes[0].text(0.25, 0.1, "target\nD(x_r, r)", color=GREEN, fontsize=10)
    axes[0].annotate("", (r, -0.9), (t, -0.9), arrowprops={"arrowstyle": "<->", "color": GREY})
    axes[0].text(0.93, -1.2, "gap", color=GREY)
    axes[0].set_title("loss: distance between both ends")
    x0 = 0.62
    straight = x0 + (x - x0) * r / t
    axes[1].plot([0, t], [x0, x], color=ORANGE, lw=1.5, ls="--")
    axes[1].plot(levels, path, color=BLUE, lw=1.5)
    axes[1].plot([0, r], [x0, straight], "o", color=ORANGE)
    axes[1].plot(r, x_r, "s", color=GREEN)
    axes[1].text(0.9, 0.45, "teacher's step", color=GREEN, fontsize=10)
    axes[1].text(0.1, 1.2, "line to the\nimage x0", color=ORANGE, fontsize=10)
    axes[1].set_title("x_r from the data, or from a teacher")
    axes[2].plot(levels, path, color=BLUE, lw=1.5)
    slope = (jump(x, t, t + 0.01) - jump(x, t, t - 0.01)) / 0.02
    axes[2].plot([t - 0.45, t + 0.35], [x - 0.45 * slope, x + 0.35 * slope], color=ORANGE, lw=2)
    axes[2].plot(t, x, "o", color=ORANGE)
    axes[2].text(0.35, 1.5, "direction in which\nx and t change", color=ORANGE, fontsize=10)
    axes[2].set_title("gap 0: D must not change along it")
    for axis in axes:
        for level, name in ((t, "t"), (r, "r")):
            axis.axvline(level, color=GREY, lw=0.8, ls=":")
            axis.text(level + 0.02, -1.9, name, color=GREY)
    save(figure, "target")


def trade() -> None:
    """Quality against network calls, MNIST at 16 x 16."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from published import RESULTS, mnist

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for method in ("ect", "ict", "ecd", "scd", "ctm", "sct"):
        values = [value for value in mnist(method) if value is not None]
        line = axis.plot((1, 2, 5)[: len(values)], values, "o-", label=method)[0]
        place = (1, 2, 5)[len(values) - 1] * 1.06, values[-1] + {"ecd": 1.4, "ict": -1.4}.get(method, 0)
        axis.text(*place, method, color=line.get_color(), va="center")
    for teacher in ("diffusion", "trigflow"):
        axis.plot(35, *RESULTS[teacher]["values"].values(), "s", color=GREY)
    axis.text(33, 14.3, "diffusion models", color="#616161", ha="right")
    axis.axhline(*RESULTS["ect"]["reference"].values(), color=GREY, lw=0.8, ls=":")
    axis.text(1, 6.2, "training images", color="#616161")
    axis.set(xscale="log", xlabel="network calls per image", ylabel="Fréchet distance (lower is better)", ylim=(0, 58))
    axis.set_xticks([1, 2, 5, 35], ["1", "2", "5", "35"], minor=False)
    axis.minorticks_off()
    save(figure, "trade")


def save(figure: plt.Figure, name: str) -> None:
    """Write a drawing."""
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.png", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    for draw in (noise_levels, jumps, target, trade):
        draw()
