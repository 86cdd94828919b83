"""Pictures of curves: losses and quality; and rows of titled pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cm_diffusers.engine.files import written_aside
from cm_diffusers.engine.log import read_log


def titled_row(panels: Sequence[tuple[str, Image.Image]], gap: int = 12, title_height: int = 18) -> Image.Image:
    """Place pictures side by side, each below its title.

    Args:
        panels: titles with their pictures.
        gap: pixels between and around the pictures.
        title_height: pixels above the pictures for the titles.
    """
    width = sum(picture.width + gap for _, picture in panels) + gap
    height = max(picture.height for _, picture in panels) + title_height + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for title, picture in panels:
        draw.text((x, 3), title, fill="black")
        sheet.paste(picture, (x, title_height))
        x += picture.width + gap
    return sheet


COMMON = {"step", "loss", "loss_by_sigma", "grad_norm", "lr", "skipped", "time"}  # columns in the log of every method


def plot_losses(log: Path, picture: Path) -> None:
    """Draw the loss of a run in total and by noise level, and below it the other columns of the log.

    Args:
        log: the log of the run; without numbers in it nothing is drawn.
        picture: the image file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = read_log(log).rows
    rows = [row for row in everything if _is_number(row.get("loss"))]
    if not rows:
        return
    others = sorted({name for row in everything for name in row.keys() - COMMON if _is_number(row[name])})
    levels = [row["loss_by_sigma"] if isinstance(row.get("loss_by_sigma"), dict) else {} for row in rows]
    names = {name for row in levels for name in row if re.match(r"\d", name) and _is_number(row[name])}
    others, stages = [name for name in others if name not in STAGES], stages_of(everything)
    figure = Figure(figsize=(9, 4 + 1.6 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(1 + len(others), squeeze=False, height_ratios=[3, *[1.2] * len(others)])[:, 0]
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="gray", linewidth=2, label="all")
    for name in sorted(names, key=lambda name: float(re.match(r"\d+(\.\d+)?", name)[0])):
        losses = [row.get(name) for row in levels]
        axes.plot(steps, [loss if _is_number(loss) else float("nan") for loss in losses], label=f"sigma {name}")
    axes.set(xlabel="step", ylabel="loss, logarithmic", yscale="log")
    axes.set_title("Loss by noise level. Its scale changes with the stage. Judge quality by the samples.", fontsize=10)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axis, name in zip(below, others):
        places = [(row["step"], row[name]) for row in everything if _is_number(row.get(name))]
        axis.plot(*zip(*places), label=name)
        axis.set(xlabel="step", ylabel=name.replace("_", " "))
    for axis in (axes, *below):
        for step, _ in stages[1:]:
            axis.axvline(step, color="gray", linewidth=0.8, linestyle=":")
    for step, name in stages:
        place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -3), "textcoords": "offset points"}
        axes.annotate(name, (step, 1), va="top", fontsize=8, color="gray", **place)
    with written_aside(picture) as aside:
        figure.savefig(aside, dpi=110)


STAGES = ("stage",)  # columns with the stage of a schedule, drawn as vertical lines instead of curves


def stages_of(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """The first steps and names of the stages in the `rows` of a log; empty without stages."""
    found, last = [], None
    for row in rows:
        stage = row.get("stage")
        if _is_number(stage) and stage != last:
            before = rows[0]["step"] if not found else row["step"]
            found.append((before, "pretraining" if stage < 0 else f"stage {stage:g}"))
            last = stage
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plot_quality(results: Sequence[dict[str, Any]], picture: Path, real: dict[str, Any] | None = None) -> None:
    """Draw the results of an evaluation against the number of sampling steps, or against the training steps of a run.

    Args:
        results: the "results" of a metrics.json; they have a "step" if they are those of a watched run.
        picture: the image file to write.
        real: the metrics of real images against other real images, drawn as dotted lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    training = any("step" in row for row in results)
    for axes, (title, *metrics) in zip(figure.subplots(2, 2).flat, QUALITIES):
        for metric, style in zip(metrics, ("o-", "s--")):
            for i, (label, rows) in enumerate(curves_of(results, training).items()):
                x = [row.get("step") if training else row.get("num_inference_steps", 0) for row in rows]
                y, errors = [row[metric] for row in rows], [row.get(f"{metric}_std", 0) for row in rows]
                label = f"{metric}, {label}" if len(metrics) > 1 else label
                axes.errorbar(x, y, errors if any(errors) else None, fmt=style, color=f"C{i}", capsize=3, label=label)
        for metric, line in zip(metrics if real else (), (":", "-.")):
            if metric in real:
                label = f"{metric}, real images against others" if len(metrics) > 1 else "real images against others"
                axes.axhline(real[metric], color="gray", linestyle=line, label=label)
        axes.set(xlabel="step of training" if training else "steps", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    with written_aside(picture) as aside:
        figure.savefig(aside, dpi=110)


QUALITIES = (
    ("Fréchet distance", "frechet_distance"),
    ("Kernel distance", "kernel_distance"),
    ("Precision and recall", "precision", "recall"),
    ("Density and coverage", "density", "coverage"),
)


def curves_of(results: Sequence[dict[str, Any]], training: bool) -> dict[str, list[dict[str, Any]]]:
    """Group results into the curves of a chart, by the labels of the curves.

    Args:
        results: the "results" of a metrics.json.
        training: one curve for each name of a result, over the training steps. Otherwise one curve joins all numbers
            of sampling steps, and each list of noise levels is a curve of its own.
    """
    curves = {}
    for row in results:
        levels, comma, how = row["name"].partition(", ")
        joined = not training and levels.endswith(("step", "steps"))
        curves.setdefault(f"the model's levels{comma}{how}" if joined else row["name"], []).append(row)
    return curves
