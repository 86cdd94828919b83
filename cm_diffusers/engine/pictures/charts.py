"""Curves as SVG for embedding in a page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator


INK = "#010203"  # a placeholder that is replaced by the colour of the page's text
POINTS = 300  # at most, in a curve; longer curves are averaged


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Args:
        x: coordinates along the axis, such as steps.
        y: values, as many as `x`.
        colour: in a notation of matplotlib; the page explains the colours of runs.
        style: the line style in matplotlib's notation.
        label: the entry in the legend of the chart, or None.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"
    label: str | None = None


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve of n points `x`, `y` (n,) to at most `POINTS` points (m,), each the mean of neighbours."""
    parts = np.array_split(np.array([x, y], float), min(len(x), POINTS) or 1, axis=1)
    return tuple(np.array([part.mean(1) for part in parts if part.size]).reshape(-1, 2).T)


def chart(lines: Sequence[Line], xlabel: str, legend: str | None = None, marker: str = "", log: bool = True) -> Markup:
    """Draw a chart as SVG, which takes its text colour from the page and its size from its container.

    Args:
        lines: the curves.
        xlabel: the label of the x axis.
        legend: the title of the legend, which lists the labels of the curves.
        marker: the marker of each point in matplotlib's notation; empty for no markers.
        log: use a logarithmic y axis for positive values that span more than a factor of 10.
    """
    plain = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11}
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(plain | ink):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for line in lines:
            axes.plot(line.x, line.y, line.style, color=line.colour, marker=marker, linewidth=1.6)
        values = [y for line in lines for y in line.y]
        span = max(values) / min(values) if values and min(values) > 0 else 0
        if log and span > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1000 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(x == int(x) for line in lines for x in line.x)))
        axes.set_xlabel(xlabel)
        axes.grid(color=INK, alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        entries = {}  # by label; a label of several colours is shown in the text colour
        for line in lines:
            colour, _ = entries.get(line.label, (line.colour, ""))
            entries[line.label] = (colour if colour == line.colour else INK, line.style)
        entries.pop(None, None)
        if entries:
            handles = [Line2D([], [], color=colour, linestyle=style) for colour, style in entries.values()]
            longest = max(map(len, entries))
            columns = max(1, min(4, 64 // (longest + 6)))  # as many as fit
            place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
            figure.legend(handles, list(entries), title=legend, **place)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))  # matplotlib has escaped its texts
