"""Figures of a run: charts as inline SVG that takes the page's ink colour, and contact sheets.

A chart is text in the page: it follows light and dark, it can be searched, and it loads nothing.
"""

import html
import io
import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from vidsim import files
from vidsim.data import video

# T frames, H height, W width, C channels.

_INK = "#010203"  # stands for the page's own text colour, see _svg
BLUE, ORANGE, GREY = "#4a86c5", "#dd7a2e", "#8d949c"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vidsim",
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "grid.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, _, text = buffer.getvalue().partition("<svg")
    head, _, body = text.partition(">")
    # Within html the parser knows the namespaces, so the page names no address; css sets the size.
    head = re.sub(r'\s(xmlns(:xlink)?|width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace(_INK, "currentColor")
    return f'<svg role="img" aria-label="{html.escape(label)}"{head}>{body}'


@matplotlib.rc_context(_STYLE)
def line_chart(lines: dict[str, dict[int, float]], title: str) -> str:
    """Draws {label: {step: value}}; a label that begins with "validation" or "t =" gets points."""
    figure = Figure(figsize=(4.7, 3.0), layout="constrained")
    axes = figure.add_subplot()
    shades = matplotlib.colormaps["plasma"](np.linspace(0.25, 0.82, max(len(lines), 2)))
    for shade, (label, points) in zip(shades, lines.items(), strict=False):
        steps, values = np.array(sorted(points.items()), np.float64).T
        if label == "training":
            smooth = _smooth(values)
            if smooth is not None:
                axes.plot(steps, values, color=BLUE, linewidth=0.7, alpha=0.35)
                values = smooth
            axes.plot(steps, values, color=BLUE, linewidth=1.6, label=label)
        else:
            color = ORANGE if label == "validation" else shade
            axes.plot(steps, values, "o-", color=color, linewidth=1.5, markersize=3.5, label=label)
    values = [value for points in lines.values() for value in points.values()]
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if "loss" in title and min(values) > 0 and max(values) > 4 * min(values):
        wide = max(values) > 200 * min(values)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(lines), 5), columnspacing=1.2)
    return _svg(figure, f"{title} over training steps")


def _smooth(values: np.ndarray) -> np.ndarray | None:
    """Moving average over a thirtieth of the run, or None when there are too few points."""
    half = len(values) // 60
    if half < 1:
        return None
    sums = np.cumsum(np.concatenate([[0.0], values]))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def training_curves(rows: Sequence[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Sorts metric rows into charts: {title: {label: {step: value}}}, the losses first.

    `x` and `val/x` share a chart, and so do all `val/x_t0.1`, `val/x_t0.5`, ... (by diffusion
    time). A step that a resumed run repeats counts once, with its later value.
    """
    charts: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key == "step" or not number or not math.isfinite(value):
                continue
            name = key.removeprefix("val/")
            label = "training" if name == key else "validation"
            timed = re.fullmatch(r"(.+)_t(\d*\.?\d+)", name)
            if timed:
                name, label = f"{timed[1]} by diffusion time", f"t = {timed[2]}"
            charts.setdefault(name, {}).setdefault(label, {})[row["step"]] = value
    order = sorted(charts, key=lambda name: (name != "loss", not name.startswith("loss"), name))
    return {name: dict(sorted(charts[name].items())) for name in order}


@matplotlib.rc_context(_STYLE)
def bar_chart(values: dict[str, float], title: str, *, marked: str) -> str:
    """Draws horizontal bars with their values; the bar named `marked` is the coloured one."""
    figure = Figure(figsize=(5.2, 0.5 + 0.36 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    colors = [BLUE if name == marked else GREY for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colors, height=0.62)
    axes.bar_label(bars, fmt="%#.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(title)
    return _svg(figure, title + ": " + ", ".join(f"{k} {v:.3g}" for k, v in values.items()))


class Chart(NamedTuple):
    """Lines of values over 0."""

    title: str
    x_label: str
    lines: dict[str, dict[float, float]]  # {label: {x: y}}
    top: float | None = None  # what is larger is cut off, unless all is


def log_charts(charts: Sequence[Chart], path: str | os.PathLike) -> None:
    """Writes an SVG file of charts in two columns; what spans more than 1 : 3 is logarithmic.

    The file is white and needs no page around it.
    """
    ink = {key: "#222222" for key, value in _STYLE.items() if value == _INK}
    with matplotlib.rc_context(_STYLE | ink | {"figure.facecolor": "white"}):
        rows = math.ceil(len(charts) / 2)
        figure = Figure(figsize=(9.6, 3.3 * rows), layout="constrained")
        for place, chart in enumerate(charts, 1):
            _draw(figure.add_subplot(rows, 2, place), chart)
        with files.atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw(axes, chart: Chart) -> None:
    shades = matplotlib.colormaps["plasma"](np.linspace(0.15, 0.8, len(chart.lines)))
    for shade, (label, points) in zip(shades, chart.lines.items(), strict=True):
        x, y = np.array(sorted(points.items()), np.float64).T
        axes.plot(x, y, "o-", color=shade, linewidth=1.5, markersize=3.5, label=label)
    x, y = np.array([point for line in chart.lines.values() for point in line.items()]).T
    if 0 < 3 * x.min() < x.max():
        axes.set_xscale("log", base=2)
    finite = y[np.isfinite(y)]
    below = finite if chart.top is None else finite[finite <= chart.top]
    if 0 < len(below) < len(finite):
        axes.set_ylim(below.min() - 0.05 * (chart.top - below.min()), chart.top)
    if len(below) and 0 < 3 * below.min() < below.max():
        axes.set_yscale("log")
    axes.set_title(chart.title, loc="left")
    axes.set_xlabel(chart.x_label)
    axes.legend(fontsize=8)


def contact_sheet(
    videos: Sequence[np.ndarray],
    labels: Sequence[str],
    path: str | os.PathLike,
    *,
    columns: int = 6,
    row_height: int = 128,
    label_width: int = 190,
) -> None:
    """Writes a PNG grid: one row a video (uint8 [T, H, W, 3]), evenly spaced frames, label at left.

    Frames are enlarged by whole factors, so that every pixel stays a square. An image, or a video
    shorter than `columns`, shows each of its frames once.
    """
    gap = 6
    font = ImageFont.load_default(size=14)
    rows = []
    for video_THWC in videos:
        picks = np.linspace(0, len(video_THWC) - 1, min(columns, len(video_THWC)))
        scale = max(1, round(row_height / video_THWC.shape[1]))
        frames = video_THWC[np.round(picks).astype(int)]
        rows.append(frames.repeat(scale, axis=1).repeat(scale, axis=2))
    width = max(len(row) * (row.shape[2] + gap) for row in rows)
    height = sum(row.shape[1] + gap for row in rows)
    sheet = Image.new("RGB", (label_width + width + gap, height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, label in zip(rows, labels, strict=True):
        lines = textwrap.wrap(label, width=label_width // 8)[: max(1, row.shape[1] // 18)]
        draw.multiline_text((2 * gap, top), "\n".join(lines), fill="#222", font=font, spacing=4)
        for column, frame in enumerate(row):
            left = label_width + column * (row.shape[2] + gap)
            sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (left, top))
        top += row.shape[1] + gap
    video.write_image(path, np.asarray(sheet))
