"""Figures of runs and sweeps: T by grain, curves over T, Pareto of perplexity against synaptic operations, maps of sites.

Plain matplotlib figures without pyplot's global state. `svg` gives one that takes the colour of the page's text (light or
dark) and the page's fonts; `png` a file.
"""

import io
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spikellm.config.labels import NETWORKS, SiteKind
from spikellm.store.record import Row

INK = "#1d2733"  # text and axes; `svg` replaces it by the colour of the surrounding text
# Okabe and Ito's colours: told apart also without red or green.
COLOURS, MARKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"), "osD^vP"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK)
WIDTH = 4.8  # of a figure [inch]: two beside each other on a desktop, one on a phone with its text still readable
KINDS = [kind.name for kind in SiteKind if kind is not SiteKind.head_input]  # of the layers

Rows = list[Row]  # of a summary (`results.summary_rows`)


def measured(rows: Rows, *columns: str) -> Rows:
    """The rows that have a number in every column."""
    return [row for row in rows if all(isinstance(row.get(name), int | float) for name in columns)]


def by_grain(rows: Rows) -> list[Any]:
    """The grains of a sweep: numbers, then auto."""
    return sorted({row["grain"] for row in rows}, key=lambda grain: (isinstance(grain, str), grain))


def ratio_map(rows: Rows) -> Figure:
    """Heat map T x grain of the spiking model's perplexity over that of the pretrained one with the same prefix."""
    with matplotlib.rc_context(STYLE):
        rows = measured(rows, "ratio")
        steps, grains = sorted({row["T"] for row in rows}), by_grain(rows)
        values = {(row["T"], row["grain"]): row["ratio"] for row in rows}
        grid = [[values.get((T, grain), float("nan")) for T in steps] for grain in grains]
        figure = Figure(figsize=(WIDTH, 1.3 + 0.45 * len(grains)))
        axes = figure.subplots()
        worst = max(max(values.values()), 1.02)
        norm = LogNorm(min(1.0, *values.values()), worst)
        axes.imshow(grid, norm=norm, cmap="cividis_r", aspect="auto")
        for row, grain in enumerate(grains):
            for column, T in enumerate(steps):
                value = values.get((T, grain))
                colour = INK if value is None else "#ffffff" if norm(value) > 0.5 else "#000000"
                axes.text(column, row, "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:.0f}",
                          ha="center", va="center", color=colour, size=8 if len(steps) > 5 else 9)  # fmt: skip
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(grains)), grains)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="time steps T", ylabel="grain", title="perplexity, SNN / ANN")
    return figure


def perplexity_curves(rows: Rows) -> Figure:
    """Perplexity over T, a line per grain, beside base 2 and the pretrained model."""
    with matplotlib.rc_context(STYLE):
        rows = measured(rows, "snn", "ann")
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.subplots()
        base2 = {row["T"]: row["base2"] for row in measured(rows, "base2")}
        axes.plot(sorted(base2), [base2[T] for T in sorted(base2)], "--", color="#999999", marker="x", label=NETWORKS["base2"].short)
        for chosen, colour, marker in _lines(rows):
            axes.plot([row["T"] for row in chosen], [row["snn"] for row in chosen], color=colour, marker=marker,
                      markersize=4, label=f"grain {chosen[0]['grain']}")  # fmt: skip
        _pretrained(axes, rows[0])
        _perplexity_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="time steps T", title="perplexity over time steps")
        axes.legend()
    return figure


def operation_curves(rows: Rows) -> Figure:
    """Perplexity against synaptic operations per token, a line per grain, T written at each point."""
    with matplotlib.rc_context(STYLE):
        rows = measured(rows, "snn", "ann", "sops_per_token")
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.subplots()
        for chosen, colour, marker in _lines(rows):
            axes.plot([row["sops_per_token"] for row in chosen], [row["snn"] for row in chosen], color=colour, marker=marker,
                      markersize=4, label=f"grain {chosen[0]['grain']}")  # fmt: skip
            for row in chosen:
                axes.annotate(f"T={row['T']}", (row["sops_per_token"], row["snn"]), textcoords="offset points", xytext=(3, 3), size=7)
        _pretrained(axes, rows[0])
        _perplexity_axis(axes)
        axes.set(xlabel="synaptic operations per token", title="perplexity against operations")
        axes.legend()
    return figure


def site_map(sites: list[dict[str, str]], column: str, title: str) -> Figure | None:
    """Layers x kinds of site, a number of sites.csv as colour; None where no site has it."""
    found = {}
    for row in sites:
        if (match := re.fullmatch(r"layers\.(\d+)\.(\w+)", row["name"])) and row.get(column):
            found[match[2], int(match[1])] = float(row[column])
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        layers = range(max(layer for _, layer in found) + 1)
        grid = [[found.get((kind, layer), float("nan")) for layer in layers] for kind in KINDS]
        figure = Figure(figsize=(WIDTH, 2.7))
        axes = figure.subplots()
        positive = [value for value in found.values() if value > 0]
        wide = bool(positive) and max(positive) > 30 * min(positive)
        norm: Normalize = LogNorm(max(min(positive), 1e-4 * max(positive)), max(positive)) if wide else Normalize(0, max([*positive, 1e-9]))
        image = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto", interpolation="none")
        axes.set_yticks(range(len(KINDS)), [SiteKind[kind].value for kind in KINDS])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05)
        bar.outline.set_visible(False)
        axes.set(xlabel="layer", title=title)
    return figure


def summary_figure(rows: Rows) -> Figure | None:
    """The curves of a sweep as one picture for summary.png; None where nothing was measured."""
    rows = measured(rows, "snn", "ann")
    return perplexity_curves(rows) if rows else None


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for a page; `name` keeps the identifiers of several apart and the bytes reproducible."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)


def png(figure: Figure, path: Path) -> None:
    """A figure as a PNG file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=160, facecolor="white")
    temporary.replace(path)


def _lines(rows: Rows) -> Iterator[tuple[Rows, str, str]]:
    """The rows of each grain by T, with a colour and a marker."""
    for grain, colour, marker in zip(by_grain(rows), cycle(COLOURS), cycle(MARKERS), strict=False):
        yield sorted((row for row in rows if row["grain"] == grain), key=lambda row: row["T"]), colour, marker


def _pretrained(axes: Axes, row: Row) -> None:
    """The levels of the pretrained network, as it is and with the spiking one's prefix."""
    for network, style in (("ann", ":"), ("ann_prefix", "-.")):
        if measured([row], network):
            axes.axhline(row[network], color=INK, linewidth=0.8, linestyle=style, label=NETWORKS[network].short)


def _perplexity_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    formatter = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(formatter)
    low, high = axes.get_ylim()
    if high < 10 * low:  # less than a decade: the ticks between are wanted, too
        axes.yaxis.set_minor_formatter(formatter)
        axes.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_ylabel("perplexity")
