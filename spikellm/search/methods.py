"""Every way to codes by name, and the configured one. A new code is one function of this signature and one entry."""

from collections.abc import Callable, Mapping

import torch

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.neuron import BEYOND
from spikellm.config.choices import Groups
from spikellm.search.fit import CodeFit
from spikellm.search.options import Options
from spikellm.search.published import imported
from spikellm.search.search import base2, evolution, gradient
from spikellm.search.traditional import classic
from spikellm.store.record import Row, SearchRecord

# Statistics by site name, all on one device -> one code per site.
Method = Callable[[Mapping[str, SiteStatistics], Options], dict[str, CodeFit]]
METHODS: dict[str, Method] = {
    "evolution": evolution,  # tables fitted to each group's distribution
    "gradient": gradient,  # the authors' search
    "base2": base2,  # the baseline
    "imported": imported,  # a neuron file of the authors
    "classic": classic,  # rate, time to first spike, few spikes
}


def find_codes(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """One code per site by the configured method, for the configured groups of neurons."""
    if options.search.groups is Groups.site:
        statistics = {name: site.merged() for name, site in statistics.items()}
    return METHODS[options.method](statistics, options)


def search_summary(fits: dict[str, CodeFit], *, seconds: float | None = None) -> SearchRecord:
    """How well the codes fit, and how long the search took."""
    every = list(fits.values())
    return SearchRecord(
        seconds=seconds,
        relative_mse=sum(fit.relative_error for fit in every) / len(every),
        relative_mse_base2=sum(fit.relative_error_base2 for fit in every) / len(every),
        worse_than_base2=sum(fit.worse_than_base2 for fit in every),
        groups=sum(len(fit.error) for fit in every),
        groups_by_grain=torch.cat([fit.grain.unflatten(0, (fit.digits.intervals, -1)).amax(0) for fit in every]).bincount()[1:].tolist(),
        groups_by_intervals=torch.cat([fit.intervals for fit in every]).bincount()[1:].tolist(),
        groups_at_base2=sum(int(fit.fallback.sum()) for fit in every),
    )


def site_row(name: str, fit: CodeFit) -> Row:
    """One line of sites.csv; lists have an entry for each table, of all neuron groups interval by interval; cuts, a list an interval."""
    return {
        "name": name,
        "tau": fit.tau.tolist(),
        "intervals": fit.intervals.tolist(),
        "cuts": [[value if value < BEYOND else None for value in row] for row in fit.cuts.tolist()] if fit.cuts is not None else [],
        "grain": fit.grain.tolist(),
        "assignment": fit.assignment.tolist(),
        "base_d": fit.base_d.tolist(),
        "base_h": fit.base_h.tolist(),
        "base_theta": fit.base_theta.tolist(),
        "rho": fit.rho.tolist(),
        "v0": fit.v0.tolist(),
        "relative_error_base2": fit.relative_error_base2,
        "relative_error": fit.relative_error,
        "firing_rate": fit.mean_firing_rate,
    }
