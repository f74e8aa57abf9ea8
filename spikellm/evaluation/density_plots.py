"""Plots of codes on densities: one figure per kind of site, one panel per layer.

Each panel shows, over log |x|: the share of activations of the reporting part (by their importance, where they have one) per octave, the
levels of the site's code (one tick each; of the first neuron group where there are several), and two curves that should agree: how many
levels per octave the code has, and how many the optimal density p^(1/3) would put there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikellm.calibration.statistics import REPORT, SiteStatistics
from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.evaluation.diagnostics import site_levels
from spikellm.model.sites import Site, is_per_token
from spikellm.search.fit import CodeFit

COLUMNS = 6
SHOWN_OCTAVES = 14.0  # below the largest activation
BINS_PER_OCTAVE = 4
DENSITY, CODE, OPTIMUM = "#b8c4d0", "#c1440e", "#1f4e79"


def write_density_plots(
    folder: Path, statistics: Mapping[str, SiteStatistics], fits: Mapping[str, CodeFit], *, amplitude: Amplitude = Amplitude.static
) -> list[Path]:
    """Write density_KIND.png for every kind of site into `folder`; their paths. amplitude: of the neurons, which statistics follow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    sites = {name: site for name in fits if (site := Site.of(name)) is not None}
    for kind in SiteKind:
        names = [name for name, site in sites.items() if site.kind is kind]
        rows = -(-len(names) // COLUMNS)
        figure = Figure(figsize=(max(6.0, 2.6 * min(COLUMNS, len(names)) + 0.6), 1.7 * rows + 1.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, min(COLUMNS, len(names)), squeeze=False).flatten()
        for axis, name in zip(axes, names, strict=False):
            _panel(axis, statistics[name], fits[name])
            layer = sites[name].layer
            axis.set_title(kind.value if layer is None else f"layer {layer}", fontsize=7, pad=2)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
        coded = "|x| / m, m the token's largest |x|" if is_per_token(kind, amplitude) else "|x|"
        figure.suptitle(f"{kind.value}: levels of the code on the density of {coded}", x=0.01, ha="left", fontsize=9)
        paths.append(folder / f"density_{kind.name}.png")
        figure.savefig(paths[-1], dpi=90)
    return paths


def _panel(axis: Any, statistics: SiteStatistics, fit: CodeFit) -> None:
    statistics = fit.seen(statistics)
    weights = (statistics.counts if statistics.weights is None else statistics.weights)[REPORT, 0].double()
    x = statistics.centers
    top = x[weights > 0].amax().log2().item() if (weights > 0).any() else 0.0
    edges = torch.arange(top - SHOWN_OCTAVES, top + 2 / BINS_PER_OCTAVE, 1 / BINS_PER_OCTAVE)
    middle = edges[:-1].exp2() * 2 ** (0.5 / BINS_PER_OCTAVE)
    share = _histogram(x, weights, edges)
    levels = site_levels(fit.table, 0, x)
    levels = levels[levels > 0]
    density = share / edges.exp2().diff().double()
    optimum = density.pow(1 / 3) * edges.exp2().diff()
    optimum = optimum * len(levels) / optimum.sum().clamp_min(1e-300)
    code = _histogram(levels, torch.ones_like(levels).double(), edges)
    axis.fill_between(middle, share / share.amax().clamp_min(1e-300), step="mid", color=DENSITY, label="activations")
    scale = max(code.amax().item(), optimum.amax().item(), 1e-9)
    axis.step(middle, code / scale, where="mid", color=CODE, linewidth=1, label="levels of the code")
    axis.plot(middle, optimum / scale, color=OPTIMUM, linewidth=1, label="levels of p^(1/3)")
    axis.plot(levels, torch.full_like(levels, -0.06), "|", color=CODE, markersize=4, markeredgewidth=0.5)
    axis.set_xscale("log", base=2)
    axis.set_yticks([])
    axis.tick_params(labelsize=6)
    axis.spines[["left", "right", "top"]].set_visible(False)


def _histogram(x: Tensor, weights: Tensor, edges: Tensor) -> Tensor:
    """Summed weights between edges of log2 x."""
    cell = torch.bucketize(x.log2(), edges) - 1
    inside = (cell >= 0) & (cell < len(edges) - 1)
    return torch.zeros(len(edges) - 1, dtype=torch.float64).index_add_(0, cell[inside], weights[inside])
