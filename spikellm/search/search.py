"""Distribution-aware search: statistics of every site in, phase tables out.

Problem, for each neuron group (a site, or one attention head of it) with density p of |x|, over the code's parameters:

    minimise over tau, v0, a, B, H, Theta      integral of w(x) p(x) (y(x) - x)^2 dx  /  integral of w(x) p(x) x^2 dx

y is the neuron's output (`coding/neuron.py`), tau, v0, the assignment a of phases to grains and the bases spell its table
(`coding/grains.py`), and w is what an error of that activation counts further down (`calibration/calibrate.py`,
`model/attention.py`; else 1). Where the outputs of a row are added up as they are, the square of the mean error counts as often
as a row is long (`fit.py`).

The integrals are over the fitting part of the calibration text (`calibration/statistics.py`). What comes out is chosen on the
second part and measured on the third, which decides nothing; tau may know of the largest activation of the first two.

The density stands as weighted points, each an equal share of a mixture of p^(1/3) (the level density of the optimal quantiser,
Panter & Dite 1951), mass and energy, so that the tail keeps points of its own. Zheng et al. (ICLR 2026) optimise one site at a
time by surrogate gradients (`gradient.py`); here all sites evolve together (`evolution.py`).

Ours also: a table may use fewer grains than it may, so that more grains are never worse on the objective; grain=auto takes the
coarsest G whose cost on the choosing part is within a tolerance of the best; a group whose fitted table is no better than base 2 there
keeps base 2. One-sided activations (SiLU) have a table for each sign. Signed digits (`coding/neuron.py`) are searched in the same way, with
one number more, the ratio of thresholds to resets. With a spike weight lambda the objective is multiplied by exp(lambda n), n the mean
spikes of a neuron: lambda is the relative rise of the error at which one spike less a neuron is a fair exchange.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.statistics import FIT, SiteStatistics
from spikellm.coding.codes import IntervalCodes, base2_codes
from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import BINARY, Digits
from spikellm.search.evolution import Objective, evolve_grains, squared_error
from spikellm.search.fit import CodeFit, bias_weight, choice_cost
from spikellm.search.gradient import descend_grains, draw_samples
from spikellm.search.intervals import Segments, evolve_intervals, segment_sums
from spikellm.search.options import Options


def evolution(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """Fit tables to every neuron group of every site, all together.

    Args:
        statistics: by site name; all on one device.
        options: T; grain and snn.intervals, at most (auto: per group the fewest within search.tolerance of the least cost on the
            choosing part, or of intervals the fewest with search.sufficient_error there); min_grain_length; coding, phase or
            phase_signed; search.spike_weight; seed.
    """
    digits, most = options.digits, options.most_intervals
    points = density_points(statistics, options, 1)
    weights = {name: options.spike_weight(name) for name in statistics}
    spike_weight = torch.tensor([weights[name] for name, site in statistics.items() for _ in range(site.counts.shape[1])])
    spike_weight = spike_weight.to(points.x.device)
    maximum = group_maxima(statistics)
    bias = None
    if any(site.row_neurons for site in statistics.values()):
        bias = points.bias(statistics)
    objective = Objective(
        x=points.x[:, None],
        weight=points.weight[:, None],
        kernel=chosen(squared_error, points.x, compiled=options.compiled),
        digits=digits,
        spike_weight=points.share[:, None] * spike_weight[:, None, None] if spike_weight.any() else None,
        bias_weight=bias,
    )
    with tqdm(total=options.most_grains * most, desc="search", unit="grain", disable=None) as bar:
        found = evolve_grains(objective, maximum, options, lambda _: bar.update())
        rounds = [(IntervalCodes.single(codes), error) for codes, error in (found[-1:] if options.snn.grains else found)]
        wanting = torch.arange(len(maximum), device=maximum.device)
        for K in range(2, most + 1):
            best, error = rounds[-1]
            if options.snn.interval_count is None:  # auto: the others have what they need
                enough = torch.cat(choice_errors(statistics, best, digits)) <= options.search.sufficient_error
                wanting = (~enough).nonzero().flatten()
            if not len(wanting):
                break
            points = density_points(statistics, options, K)
            kernel = chosen(segment_sums, points.x, compiled=options.compiled)
            segments = Segments(x=points.x, weight=points.weight, share=points.share, kernel=kernel, digits=digits).at(wanting)
            more = evolve_intervals(segments, maximum[wanting], best.at((wanting,)), options, spike_weight[wanting], bar.update)
            whole = [(best.padded(K).replaced(wanting, codes), error.index_copy(0, wanting, found)) for codes, found in more]
            rounds += whole[-1:] if options.snn.grains else whole
    return assess_all(statistics, rounds, options, digits=digits, spike_weights=weights)


def choice_errors(statistics: Mapping[str, SiteStatistics], codes: IntervalCodes, digits: Digits) -> list[Float[Tensor, " C"]]:
    """Relative errors on the choosing part, site by site, of codes of all groups in a row."""
    return [choice_cost(site, codes.at(rows).table(digits), spike_weight=0.0)[1] for _, site, rows in group_rows(statistics)]


def group_rows(statistics: Mapping[str, SiteStatistics]) -> Iterator[tuple[str, SiteStatistics, slice]]:
    """Sites, and where their groups are among those of all sites in a row."""
    start = 0
    for name, site in statistics.items():
        rows = slice(start, start + site.counts.shape[1])
        start = rows.stop
        yield name, site, rows


def gradient(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The published search, of exactly `grain` grains (auto: of each number, and then as in `evolution`).

    Args:
        statistics: by site name; all on one device.
        options: T, grain, min_grain_length, search.gradient_*, search.tolerance, seed.
    """
    generator = torch.Generator().manual_seed(options.seed)
    groups = [(site, group) for site in statistics.values() for group in range(site.counts.shape[1])]
    samples = torch.stack([draw_samples(site, group, options.search.gradient_samples, generator) for site, group in groups])
    most, maximum, rounds = options.most_grains, group_maxima(statistics), []
    searches = (most,) if options.snn.grains else range(1, most + 1)
    total = len(searches) * len(groups) * options.search.gradient_outer
    with tqdm(total=total, desc="search", unit="round", disable=None) as bar:
        for G in searches:
            codes, found = descend_grains(samples, maximum, options, G=G, progress=bar.update)
            rounds.append((IntervalCodes.single(codes.widened(most)), found))
    return assess_all(statistics, rounds, options)


def group_maxima(statistics: Mapping[str, SiteStatistics]) -> Float[Tensor, " N"]:
    """Largest activation of every neuron group in the parts that codes may know, 1 where nothing but zeros passed."""
    maximum = torch.cat([site.known_maximum for site in statistics.values()])
    return torch.where(maximum > 0, maximum, 1.0)


def assess_all(
    statistics: Mapping[str, SiteStatistics],
    rounds: Sequence[tuple[IntervalCodes, Float[Tensor, " N"]]],
    options: Options,
    *,
    digits: Digits = BINARY,
    spike_weights: Mapping[str, float] | None = None,
) -> dict[str, CodeFit]:
    """Codes and objectives of all groups in a row, the simplest first, as one fit per site."""
    intervals = options.snn.interval_count is None
    tolerance = options.search.tolerance if options.snn.grains is None or intervals else 0.0
    sufficient = options.search.sufficient_error if intervals else 0.0
    fits = {}
    for name, site, rows in group_rows(statistics):
        own = [(codes.at(rows), objective[rows]) for codes, objective in rounds]
        spike_weight = (spike_weights or {}).get(name, 0.0)
        fits[name] = CodeFit.assess(site, own, tolerance=tolerance, sufficient=sufficient, digits=digits, spike_weight=spike_weight)
    return fits


def base2(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The baseline: base 2 in T phases at every site, tau the largest activation of the site that codes may know."""
    fits = {}
    for name, site in statistics.items():
        merged = site.merged()
        maximum = group_maxima({name: merged})
        fits[name] = CodeFit.assess(merged, [(IntervalCodes.single(base2_codes(maximum, options.T)), torch.full_like(maximum, torch.nan))])
    return fits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """The densities of all groups in points: positions, error weights, shares of a group's neurons."""

    x: Float[Tensor, "N points"]
    weight: Float[Tensor, "N points"]
    share: Float[Tensor, "N points"]

    def bias(self, statistics: Mapping[str, SiteStatistics]) -> Float[Tensor, "N 1"]:
        """See `fit.bias_weight`."""
        return torch.cat([bias_weight(site, self.weight[rows], self.share[rows]) for _, site, rows in group_rows(statistics)])


def density_points(statistics: Mapping[str, SiteStatistics], options: Options, K: int) -> Points:
    """Enough points for codes of K intervals: four a level, up to 512 levels."""
    bits = (math.log2(3) if options.digits.signed else 1) * options.T + math.log2(K)
    number = min(2048, max(256, 2 ** round(bits + 2)))
    x, weight, share = (torch.cat(part) for part in zip(*(weighted_points(site, number) for site in statistics.values()), strict=True))
    return Points(x=x, weight=weight, share=share)


def weighted_points(
    statistics: SiteStatistics, count: int
) -> tuple[Float[Tensor, "C points"], Float[Tensor, "C points"], Float[Tensor, "C points"]]:
    """The density of the fitting part in `count` points a group; ascending where they are used.

    Returns:
        positions; weights scaled so that sum weight x^2 = 1, an unused point weighs 0; shares of the group's neurons (zeros have
        no point).
    """
    points = [_group_points(statistics, group, count) for group in range(statistics.counts.shape[1])]
    x, weight, share = (torch.stack(part) for part in zip(*points, strict=True))
    return x, weight, share


def _group_points(statistics: SiteStatistics, group: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = (statistics.counts if statistics.weights is None else statistics.weights)[FIT, group].double()
    used = weights > 0
    if not used.any():
        nothing = torch.zeros(count, device=weights.device)
        return nothing, nothing, nothing
    mass = weights[used]
    width = statistics.edges.double().diff()[used]
    center = statistics.centers.double()[used]
    parts = ((mass / width).pow(1 / 3) * width, mass, mass * center.square())
    # most points where levels belong, some for mass and energy
    measure = torch.stack([factor * part / part.sum() for factor, part in zip((0.7, 0.2, 0.1), parts, strict=True)]).sum(0)
    cell = ((measure.cumsum(0) - measure / 2) * count).long().clamp_(0, count - 1)
    total = torch.zeros(count, dtype=torch.float64, device=mass.device).index_add_(0, cell, mass)
    first = torch.zeros_like(total).index_add_(0, cell, mass * center)
    x = torch.where(total > 0, first / total.clamp_min(1e-300), 0.0)
    neurons = statistics.counts[FIT, group].double()
    share = torch.zeros_like(total).index_add_(0, cell, neurons[used]) / (neurons.sum() + statistics.zeros[FIT, group])
    return x.float(), (total / (total * x.square()).sum()).float(), share.float()
