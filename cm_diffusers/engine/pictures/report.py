"""A page that shows and compares training runs: curves, samples over training, quality and settings.

The page is one file without scripts: pictures are data URIs, and curves are embedded SVG.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments
from cm_diffusers.engine.files import HUB_CARDS, replace_file
from cm_diffusers.engine.pictures.charts import Line, chart, thinned
from cm_diffusers.engine.pictures.curves import curves_of
from cm_diffusers.engine.pictures.run_records import Run, is_number, read_run
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, portable
from cm_diffusers.objectives import OBJECTIVES
from cm_diffusers.objectives.options import flags_of


COLOURS = ("#2f7ed8", "#e8762c", "#2ca36b", "#c65bb5", "#b8960c", "#d0435a")  # visible on white and on black
STYLES = ("-", "--", ":", "-.")
SKIPPED = ("step", "loss_by_sigma", "time")  # columns of the log without a curve
TITLES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "time/images_per_second": "images per second",
    "frechet_distance": "Fréchet distance",
}
FLAGS = flags_of(DataArguments, ModelArguments, RunArguments, *(cls.Options for cls in OBJECTIVES.values()))
NO_METRICS = ("num_inference_steps", "step")


def write_report(folders: Sequence[Path], output: Path) -> list[Run]:
    """Write the page of the runs in `folders` to the file `output`.

    Returns:
        The runs; their `notes` list missing or damaged files.

    Raises:
        ValueError: a folder is not that of a run.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    runs = [read_run(folder, name) for folder, name in zip(folders, names)]
    loader = jinja2.FileSystemLoader(HUB_CARDS)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "duration": duration, "title": title_of}
    page = environment.get_template("report.html").render(
        runs=runs,
        colours=colours_of(runs),
        curves=training_curves(runs),
        levels=[(run.name, loss_by_level(run)) for run in runs if run.log],
        quality=quality_curves(runs),
        metrics=metric_names(runs),
        warnings=unlike_measurements(runs),
        settings=settings_table(runs),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, page)
    return runs


def number(value: Any, digits: str = ".4g") -> str:
    """A value of the log, metrics or settings as text: floats in the format `digits`, nested values as "..."."""
    if isinstance(value, (list, tuple)):
        return ", ".join("..." if isinstance(item, (list, dict)) else number(item, digits) for item in value)
    if isinstance(value, dict):
        return "..."
    return format(value, digits) if isinstance(value, float) else "" if value is None else str(value)


def duration(hours: float) -> str:
    """A time in hours as text, in minutes if it is below one hour."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def title_of(key: str) -> str:
    """The title of the curve of `key`, a column of the log or a metric."""
    return TITLES.get(key, key.replace("_", " "))


# --- curves --------------------------------------------------------------------------------------------------------


def training_curves(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Titles and charts of the columns in the logs, with one curve for each run; constant columns are left out."""
    keys = ["loss", "lr", "grad_norm", "time/images_per_second"]
    keys += [key for run in runs for row in run.log for key in row if key not in SKIPPED]
    charts = []
    for key in dict.fromkeys(keys):
        lines = [Line(*thinned(*run.curve(key)), colour) for run, colour in zip(runs, colours_of(runs))]
        if len({y for line in lines for y in line.y}) > 1:
            charts.append((title_of(key), chart(lines, "step", log=key != "lr")))
    return charts


def loss_by_level(run: Run) -> Markup:
    """A chart of the loss of `run` over its steps, with one curve for each range of noise levels."""
    names = {name for row in run.log if isinstance(row.get("loss_by_sigma"), dict) for name in row["loss_by_sigma"]}
    names = sorted(names, key=lambda name: float(re.match(r"(\d+(\.\d+)?)?", name)[0] or 0))
    shades = [to_hex(matplotlib.colormaps["plasma"](x)) for x in np.linspace(0.35, 0.85, len(names))]
    curves = [thinned(*run.curve(f"loss_by_sigma/{name}")) for name in names]
    return chart([Line(*xy, shade, label=name) for xy, shade, name in zip(curves, shades, names)], "step", "sigma")


def quality_curves(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Charts of each metric against network calls, training steps and hours of training.

    Returns:
        For each metric its name, and a list of titles with charts. Charts without two places on the axis are left out,
        except those against network calls.
    """
    found = []
    names = dict.fromkeys(row.get("name", "") for run in runs for row in run.results)
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    for metric in metric_names(runs):
        by_calls, by_step, by_hours = [], [], []
        for run, colour in zip(runs, colours_of(runs)):
            rows = [{"step": run.step, "name": "", **row} for row in run.results if metric in numbers_in(row)]
            newest = [row for row in rows if row["step"] == max(row["step"] for row in rows)]
            for i, (name, curve) in enumerate(curves_of(newest, training=False).items()):
                calls = [(row["num_inference_steps"], row[metric]) for row in curve if "num_inference_steps" in row]
                by_calls.append(Line(*_columns(calls), colour, STYLES[i % len(STYLES)], name))
            for name, style in styles.items():
                x, y = _columns([(row["step"], row[metric]) for row in rows if row["name"] == name])
                by_step.append(Line(x, y, colour, style, name))
                if run.hours is not None:
                    by_hours.append(Line([run.hours_at(step) for step in x], y, colour, style, name))
        charts = {"network calls": by_calls, "training steps": by_step, "hours of training": by_hours}
        drawn = {x: [line for line in lines if line.x] for x, lines in charts.items()}
        drawn = {x: lines for x, lines in drawn.items() if lines and (x == "network calls" or _moves(lines))}
        found.append((metric, [(f"against {x}", chart(lines, x, marker="o")) for x, lines in drawn.items()]))
    return found


def _moves(lines: Sequence[Line]) -> bool:
    """Whether the lines have more than one x coordinate."""
    return len({x for line in lines for x in line.x}) > 1


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return tuple(map(list, zip(*sorted(points)))) or ([], [])


def colours_of(runs: Sequence[Run]) -> list[str]:
    """The colour of each run; colours repeat after six runs."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


# --- tables --------------------------------------------------------------------------------------------------------


def numbers_in(row: dict[str, Any]) -> list[str]:
    """Names of the metrics in the result `row`, without their standard deviations."""
    names = [key for key, value in row.items() if is_number(value) and key not in NO_METRICS]
    return [name for name in names if not name.endswith("_std")]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Names of the metrics in the results of all runs, in their order."""
    return list(dict.fromkeys(name for run in runs for row in run.results for name in numbers_in(row)))


def unlike_measurements(runs: Sequence[Run]) -> list[str]:
    """Warnings about runs whose metrics can't be compared, because they were measured differently."""
    measured = [run.metrics for run in runs if run.results]
    kinds = {"extractor": "features", "num_samples": "numbers of samples", "reference": "reference data"}
    differing = [words for key, words in kinds.items() if len({str(metrics.get(key)) for metrics in measured}) > 1]
    return [f"The runs were measured with different {words}. Don't compare their numbers." for words in differing]


def shareable(name: str, value: Any) -> Any:
    """The value of the setting `name` for a page that can be shared: local paths are replaced by a placeholder."""
    flag = FLAGS.get(name)
    if flag is None or flag.place is None or value is None:
        return value
    return ON_THIS_MACHINE if portable(flag, value) is None else value


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Name, values and whether they differ, for each setting of the runs; values that are not set are empty."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = [(name, [number(shareable(name, run.settings.get(name)), "") for run in runs]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in table]
