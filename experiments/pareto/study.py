"""Perplexity against synaptic operations per token, over codes, T, grain, `snn.intervals` and `search.spike_weight`.

    python experiments/pareto/study.py [OVERRIDE ..]

Overrides are those of main.py. All points share one calibration; what is in output_root already is not computed again, so a
study that was stopped goes on. Prints the tables of README.md and draws pareto.png into output_root/studies/pareto.
"""

import logging
import sys
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from spikellm.report import plots
from spikellm.run.command import compose_config
from spikellm.run.stages import run_stages

TARGET = 1.03  # perplexity ratio at which operations are compared


class Point(NamedTuple):
    """A job of the study; the fields with defaults are its result."""

    code: str
    T: int
    intervals: str
    grain: str
    weight: float  # search.spike_weight
    ratio: float = 0.0  # perplexity, SNN / ANN with the same prefix
    sops: float = 0.0  # a token
    rate: float = 0.0  # spikes per neuron and step
    energy: float = 0.0  # SNN / ANN

    @property
    def overrides(self) -> list[str]:
        code = [f"snn.coding={self.code}", f"snn.T={self.T}", f"snn.intervals={self.intervals}", f"grain={self.grain}"]
        return [*code, f"search.spike_weight={self.weight}"]


POINTS = [
    *(Point("phase", T, "1", "2", 0.0) for T in (4, 5, 6, 7, 8)),
    Point("phase", 4, "3", "2", 0.0),
    *(Point("phase_signed", 8, "auto", "2", weight) for weight in (0.0, 0.94, 1.5, 3.7, 12.0)),
    *(Point("phase_signed", 6, "auto", "2", weight) for weight in (0.0, 1.5, 5.0, 10.0)),
    *(Point("phase_signed", 5, "auto", "2", weight) for weight in (0.0, 1.5, 3.0)),
    *(Point("phase_signed", 4, "auto", "2", weight) for weight in (0.0, 0.3, 0.7, 1.5)),
    *(Point("phase_signed", 3, "auto", "1", weight) for weight in (0.0, 1.5)),
    *(Point("phase_signed", T, "1", "2", 1.5) for T in (6, 8)),
    *(Point("phase_signed", 6, "auto", grain, 1.5) for grain in ("1", "3", "auto")),
]


def measure(point: Point, overrides: list[str]) -> Point:
    """The point with its figures."""
    results = run_stages(compose_config([*overrides, *point.overrides])).results
    perplexity, spikes, energy = results.perplexity, results.spikes, results.energy
    assert perplexity is not None
    assert spikes is not None
    assert energy is not None
    ratio, share = perplexity.networks["snn"] / perplexity.networks["ann_prefix"], energy.snn_pj_per_token / energy.ann_pj_per_token
    return point._replace(ratio=ratio, sops=spikes.sops_per_token, rate=spikes.firing_rate, energy=share)


def front(points: list[Point]) -> list[Point]:
    """The points that no other betters in both, by operations."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.sops, point.ratio)):
        if not best or point.ratio < best[-1].ratio:
            best.append(point)
    return best


def operations_at(points: list[Point], ratio: float) -> float | None:
    """Operations a token at which the front reaches `ratio`, on the straight line between its neighbours; None if it does not."""
    best = front(points)
    if best and best[0].ratio <= ratio:
        return best[0].sops
    for left, right in pairwise(best):
        if right.ratio <= ratio < left.ratio:
            return left.sops + (right.sops - left.sops) * (left.ratio - ratio) / (left.ratio - right.ratio)
    return None


def draw(points: list[Point]) -> Figure:
    """A line for every code, number of intervals and T, through the spike weights, and the front."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(7, 4.4))
        axes = figure.subplots()
        best = front(points)
        axes.plot([point.sops / 1e6 for point in best], [point.ratio for point in best], color="#bbbbbb", linewidth=5, label="front")
        steps = sorted({point.T for point in points})
        families = sorted({(point.code, point.intervals) for point in points})
        for family, colour in zip(families, cycle(plots.COLOURS), strict=False):
            for T, marker in zip(steps, cycle(plots.MARKERS), strict=False):
                chosen = sorted(point for point in points if (point.code, point.intervals, point.T) == (*family, T))
                chosen = [point for point in chosen if point.grain == ("2" if T > 3 else "1")]
                if chosen:
                    axes.plot([point.sops / 1e6 for point in chosen], [point.ratio for point in chosen], color=colour, marker=marker,
                              markersize=4, linewidth=1, label=f"{family[0]}, intervals={family[1]}, T={T}")  # fmt: skip
        axes.axhline(TARGET, color=plots.INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="synaptic operations per token [M]", ylabel="perplexity, SNN / ANN", ylim=(0.99, 1.11))
        axes.legend(ncols=2, fontsize=7)
    return figure


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    overrides = sys.argv[1:]
    found = []
    for number, point in enumerate(POINTS, 1):
        logging.info("%d of %d: %s", number, len(POINTS), " ".join(point.overrides))
        found.append(measure(point, overrides))
    best = set(front(found))
    print("\n| code | T | intervals | grain | spike weight | perplexity / ANN | SOPs / token [M] | rate | energy / ANN | on the front |")
    print("|" + " --- |" * 10)
    for point in sorted(found, key=lambda point: point[:5]):
        cells = [point.code, point.T, point.intervals, point.grain, f"{point.weight:g}", f"{point.ratio:.4f}", f"{point.sops / 1e6:.1f}"]
        cells += [f"{point.rate:.3f}", f"{point.energy:.3f}", "yes" if point in best else ""]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"\noperations at a ratio of {TARGET}\n\n| code | T | intervals | grain | SOPs / token [M] |\n|" + " --- |" * 5)
    curves: dict[tuple[str, int, str, str], list[Point]] = {}
    for point in found:
        curves.setdefault(point[:4], []).append(point)
    at = {curve: sops for curve, points in curves.items() if (sops := operations_at(points, TARGET)) is not None}
    for (code, T, intervals, grain), sops in sorted(at.items(), key=lambda item: item[1]):
        print(f"| {code} | {T} | {intervals} | {grain} | {sops / 1e6:.1f} |")
    folder = Path(compose_config(overrides).output_root) / "studies" / "pareto"
    folder.mkdir(parents=True, exist_ok=True)
    plots.png(draw(found), folder / "pareto.png")
    print(f"\nfigure  {folder / 'pareto.png'}")


if __name__ == "__main__":
    main()
