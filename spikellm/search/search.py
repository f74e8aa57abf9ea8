"""Distribution-aware search: statistics of every site in, phase tables out.

Problem, for each neuron group (a site, or one attention head of it) with density p of |x|, over the code's parameters:

    minimise over tau, v0, a, B, H, Theta      integral of w(x) p(x) (y(x) - x)^2 dx  /  integral of w(x) p(x) x^2 dx

y is the neuron's output (`coding/neuron.py`), tau, v0, the assignment a of phases to grains and the bases spell its table
(`coding/grains.py`), and w is what an error of that activation counts further down (`calibration/calibrate.py`,
`model/attention.py`; else 1). Where the outputs of a row are added up as they are, the square of the mean error counts as often
as a row is long (`fit.py`).

The integrals are over the fitting part of the calibration text (`calibration/statistics.py`). What comes out is chosen on the
second part and measured on the third, which decides nothing; tau may know of the largest activation of the first two.

The density stands as weighted points (`points.py`). Zheng et al. (ICLR 2026) optimise one site at a time by surrogate gradients
(`gradient.py`); here all sites evolve together (`evolution.py`) and lend each other what they find (`exchange.py`).

Ours also: a table may use fewer grains than it may, so that more grains are never worse on the objective; grain=auto takes the
coarsest G whose cost on the choosing part is within a tolerance of the best; a group whose fitted table is no better than base 2 there
keeps base 2. One-sided activations (SiLU) have a table for each sign. Signed digits (`coding/neuron.py`) are searched in the same way, with
one number more, the ratio of thresholds to resets. Spikes have a price (`Options.spike_price`) in units of the
relative squared error: the error at which one spike less a neuron is a fair exchange, the same at all sites.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.codes import IntervalCodes, base2_codes
from spikellm.cores import side_by_side
from spikellm.search.evolution import evolve_grains, evolve_single
from spikellm.search.exchange import Rounds, exchanged
from spikellm.search.fit import CodeFit, bias_weight, choice_costs
from spikellm.search.gradient import descend_grains, draw_samples
from spikellm.search.intervals import evolve_chains, evolve_intervals
from spikellm.search.objective import Objective
from spikellm.search.options import Options
from spikellm.search.points import Points, enough_points

Found = TypeVar("Found")


def evolution(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """Fit tables to every neuron group of every site, all together.

    Args:
        statistics: by site name; all on one device.
        options: T; grain and snn.intervals, at most (auto: per group the fewest within search.tolerance of the least cost on the
            choosing part, or of intervals the fewest with search.sufficient_error there); min_grain_length; coding, phase or
            phase_signed; search.spike_weight; seed.
    """
    most, every_round = options.most_intervals, options.snn.grains is None
    maximum = group_maxima(statistics)
    objective = objective_of(statistics, options, 1)
    with tqdm(total=options.most_grains * most, desc="search", unit="grain", disable=None) as bar:

        def first(part: Objective, rows: Tensor) -> Rounds:
            found = evolve_grains(part, maximum[rows], options, bar.update)
            return [(IntervalCodes.single(codes), value) for codes, value in found]

        rounds = exchanged(objective, maximum, first, evolve_single, every_round=every_round, seed=options.seed)
        for K in range(2, most + 1):
            best, value = rounds[-1]
            wanting = torch.arange(len(maximum), device=maximum.device)
            if options.snn.interval_count is None:  # auto: the others have what they need
                enough = torch.cat(choice_errors(statistics, best, options)) <= options.search.sufficient_error
                wanting = (~enough).nonzero().flatten()
            if not len(wanting):
                break
            own = best.at((wanting,))

            def further(part: Objective, rows: Tensor, own: IntervalCodes = own, known: Tensor = maximum[wanting]) -> Rounds:
                return evolve_intervals(part, known[rows], own.at((rows,)), options, bar.update)

            if enough_points(options, K) > enough_points(options, K - 1):
                objective = objective_of(statistics, options, K)
            more = exchanged(
                objective.at(wanting), maximum[wanting], further, evolve_chains, every_round=every_round, seed=options.seed + K
            )
            rounds += [(best.padded(K).replaced(wanting, codes), value.index_copy(0, wanting, found)) for codes, found in more]
    return assess_all(statistics, rounds, options)


def objective_of(statistics: Mapping[str, SiteStatistics], options: Options, K: int) -> Objective:
    """What codes of K intervals cost on the fitting part, the groups of all sites in a row."""
    points = Points.of(statistics, options.digits, enough_points(options, K), compiled=options.compiled)
    spike_price = torch.cat([points.x.new_full(site.counts.shape[1:2], options.spike_price(name)) for name, site in statistics.items()])
    bias = None
    if any(site.row_neurons for site in statistics.values()):
        rows = group_rows(statistics)
        bias = torch.cat([bias_weight(site, points.weight[own], points.share[own]) for _, site, own in rows])
    return Objective(points=points, spike_price=spike_price, bias_weight=bias)


def choice_errors(statistics: Mapping[str, SiteStatistics], codes: IntervalCodes, options: Options) -> list[Float[Tensor, " C"]]:
    """Relative errors on the choosing part, site by site, of codes of all groups in a row."""

    def errors(_: str, site: SiteStatistics, rows: slice) -> Float[Tensor, " C"]:
        table = codes.at(rows).table(options.digits)
        return choice_costs(site, [table], spike_price=0.0, compiled=options.compiled)[1, 0]

    return by_site(errors, statistics)


def by_site(function: Callable[[str, SiteStatistics, slice], Found], statistics: Mapping[str, SiteStatistics]) -> list[Found]:
    """What a function makes of every site, see `group_rows`: sites side by side, on a GPU one after the other."""
    return side_by_side(function, group_rows(statistics), threads=1 if any(site.counts.is_cuda for site in statistics.values()) else None)


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
) -> dict[str, CodeFit]:
    """Codes and objectives of all groups in a row, the simplest first, as one fit per site; spikes have a price in evolution alone."""
    priced = options.method == "evolution"
    intervals = options.snn.interval_count is None and priced
    tolerance = options.search.tolerance if options.snn.grains is None or intervals else 0.0
    sufficient = options.search.sufficient_error if intervals else 0.0

    def assess(name: str, site: SiteStatistics, rows: slice) -> CodeFit:
        return CodeFit.assess(
            site,
            [(codes.at(rows), objective[rows]) for codes, objective in rounds],
            tolerance=tolerance,
            sufficient=sufficient,
            digits=options.digits,
            spike_price=options.spike_price(name) if priced else 0.0,
            compiled=options.compiled,
        )

    return dict(zip(statistics, by_site(assess, statistics), strict=True))


def base2(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The baseline: base 2 in T phases at every site, tau the largest activation of the site that codes may know."""
    fits = {}
    for name, site in statistics.items():
        merged = site.merged()
        maximum = group_maxima({name: merged})
        fits[name] = CodeFit.assess(merged, [(IntervalCodes.single(base2_codes(maximum, options.T)), torch.full_like(maximum, torch.nan))])
    return fits
