"""One page that shows training runs and compares them: curves, samples over training, quality, settings.

The page needs nothing beside itself: pictures are data URIs, curves are SVG in it, and there is no script.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cm_diffusers.engine.card import HUB_CARDS
from cm_diffusers.engine.run_records import Run, read_run


COLOURS = ("#2f7ed8", "#e8762c", "#2ca36b", "#c65bb5", "#b8960c", "#d0435a")  # seen on white and on black
STYLES = ("-", "--", ":", "-.")
INK = "#010203"  # becomes the colour of the page's text
POINTS = 300  # of a curve; longer ones are averaged
SKIPPED = ("step", "loss_by_sigma", "time")  # no curves of their own
TITLES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "time/images_per_second": "Images per second",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "Kernel distance",
}
NO_METRICS = ("num_inference_steps", "step")


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Any
    style: str = "-"


def write_report(folders: Sequence[Path], output: Path) -> list[Run]:
    """Write the page of the runs in `folders` to `output`; what it shows, with notes of what is missing.

    Raises:
        ValueError: a folder that is no run.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name) for folder, name in zip(folders, names)]
    loader = jinja2.FileSystemLoader(HUB_CARDS)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "title": title_of}
    page = environment.get_template("report.html").render(
        runs=runs,
        colours=[COLOURS[i % len(COLOURS)] for i in range(len(runs))],
        curves=training_curves(runs),
        levels=[(run.name, loss_by_level(run)) for run in runs if run.log],
        quality=quality_curves(runs),
        metrics=metric_names(runs),
        warnings=unlike_measurements(runs),
        settings=settings_table(runs),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, output)
    return runs


def number(value: Any) -> str:
    """A value of the log, the settings or the metrics for people to read."""
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item) if not isinstance(item, (list, dict)) else "..." for item in value)
    if isinstance(value, dict):
        return "..."
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def title_of(key: str) -> str:
    return TITLES.get(key, key.replace("_", " ").capitalize())


# --- curves --------------------------------------------------------------------------------------------------------


def training_curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """What the logs hold, each with the curves of all runs, by its title; constants have none."""
    keys = {"loss": 0, "lr": 0, "grad_norm": 0, "time/images_per_second": 0}
    keys |= {key: 0 for run in runs for row in run.log for key in row if key not in SKIPPED}
    charts = []
    for key in keys:
        lines = [Line(run.name, *thinned(*run.curve(key)), colour) for run, colour in zip(runs, _colours(runs))]
        if len({y for line in lines for y in line.y}) > 1:
            charts.append((title_of(key), chart(lines, "step")))
    return charts


def loss_by_level(run: Run) -> Markup:
    """The loss of a run by noise level."""
    names = {name for row in run.log for name in row.get("loss_by_sigma") or {}}
    names = sorted(names, key=lambda name: float(re.match(r"[\d.]*", name)[0] or 0))
    shades = matplotlib.colormaps["plasma"](np.linspace(0.2, 0.85, max(1, len(names))))
    lines = [Line(n, *thinned(*run.curve(f"loss_by_sigma/{n}")), shade) for n, shade in zip(names, shades)]
    return chart(lines, "step", legend="sigma")


def quality_curves(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """For each metric its name, and its charts by title: against network calls, training steps, hours of training."""
    found = []
    for metric in metric_names(runs):
        by_calls, by_step, by_hours = [], [], []
        for run, colour in zip(runs, _colours(runs)):
            rows = [row for row in run.results if isinstance(row.get(metric), (int, float))]
            newest = [row for row in rows if row.get("step", run.step) == max(r.get("step", run.step) for r in rows)]
            points = sorted(
                (row["num_inference_steps"], row[metric]) for row in newest if "num_inference_steps" in row
            )
            by_calls.append(Line(run.name, *zip(*points), colour) if points else Line(run.name, [], [], colour))
            for i, name in enumerate(dict.fromkeys(str(row.get("name", "")) for row in rows)):
                points = sorted(
                    (row.get("step", run.step), row[metric]) for row in rows if row.get("name", "") == name
                )
                x, y = zip(*points)
                style = STYLES[i % len(STYLES)]
                by_step.append(Line(f"{run.name}, {name}", x, y, colour, style))
                if run.hours is not None:
                    by_hours.append(Line(f"{run.name}, {name}", [run.hours_at(step) for step in x], y, colour, style))
        charts = {"network calls": by_calls, "training steps": by_step, "hours of training": by_hours}
        found.append((metric, [(f"against {x}", chart(lines, x, "", "o")) for x, lines in charts.items() if lines]))
    return found


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points, each the mean of neighbours."""
    parts = np.array_split(np.array([x, y], float), min(len(x), POINTS) or 1, axis=1)
    return tuple(np.array([part.mean(1) for part in parts if part.size]).reshape(-1, 2).T)


def chart(lines: Sequence[Line], xlabel: str, legend: str | None = None, marker: str | None = None) -> Markup:
    """An SVG that takes its ink from the page and its size from its place."""
    plain = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11}
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(plain | ink | {"legend.labelcolor": INK}):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for line in lines:
            axes.plot(line.x, line.y, line.style, color=line.colour, marker=marker, label=line.label, linewidth=1.6)
        values = [y for line in lines for y in line.y]
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(xlabel)
        axes.grid(color=INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if legend is not None and len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False, title=legend or None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))  # its texts are escaped by matplotlib


# --- tables --------------------------------------------------------------------------------------------------------


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Of the numbers in the results, error bars left out, in their order."""
    names = dict.fromkeys(
        key for run in runs for row in run.results for key, value in row.items() if isinstance(value, (int, float))
    )
    return [name for name in names if name not in NO_METRICS and not name.endswith("_std")]


def unlike_measurements(runs: Sequence[Run]) -> list[str]:
    """In what the measurements of the runs differ, so that their numbers can't be compared."""
    measured = [run.metrics for run in runs if run.results]
    differing = [
        key for key in ("extractor", "num_samples", "reference") if len({str(m.get(key)) for m in measured}) > 1
    ]
    return [f"The runs were measured with another {key.replace('_', ' ')} each; don't compare." for key in differing]


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """The settings of all runs: name, values, whether they differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [number(run.settings[name]) if name in run.settings else "-" for run in runs]
        rows.append((name, values, len(set(values)) > 1))
    return rows
