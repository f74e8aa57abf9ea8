"""The configured way to codes: search, import or baseline, with a warning for every option that has no effect on it."""

import logging
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from spikellm.calibration.statistics import SiteStatistics
from spikellm.config.schema import Coding, Config, Groups, ImportV0, SearchMethod
from spikellm.kernels.encode import Digits
from spikellm.model.sites import SiteKind
from spikellm.search.fit import CodeFit
from spikellm.search.gradient import Schedule
from spikellm.search.published import import_fits
from spikellm.search.search import MAX_GRAINS, base2_search, gradient_search, search
from spikellm.search.traditional import traditional_codes

log = logging.getLogger(__name__)

# At this weight signed digits have fewer spikes (a fifth, at T = 8) and smaller errors than digits 0 and 1, at T = 4 to 8.
SIGNED_SPIKE_WEIGHT = 2.5
# Sites whose spikes reach one synapse each (`spikes/ledger.py`): search.spike_weight leaves them their accuracy.
UNSHARED = (SiteKind.value.value, SiteKind.activation.value)


def find_codes(config: Config, statistics: dict[str, SiteStatistics]) -> dict[str, CodeFit]:
    """One code per site by the configured way."""
    options, snn = config.search, config.snn
    G = None if snn.grain == "auto" else int(snn.grain)
    merged = {name: site.merged() for name, site in statistics.items()} if options.groups is Groups.site else statistics
    if snn.coding not in (Coding.phase, Coding.phase_signed):
        return traditional_codes(config, merged)
    if options.spike_weight and options.method is not SearchMethod.evolution:
        log.warning("search.spike_weight=%g has no effect with search.method=%s", options.spike_weight, options.method.value)
    if options.import_file is not None:
        if options.method is not SearchMethod.evolution:
            log.warning("search.method=%s has no effect: the codes come from search.import_file", options.method.value)
        return import_fits(Path(options.import_file), statistics, T=snn.T, G=G, stored_v0=options.import_v0 is ImportV0.stored)
    if options.import_v0 is not ImportV0.stored:
        log.warning("search.import_v0=%s has no effect without search.import_file", options.import_v0.value)
    if options.method is SearchMethod.base2:
        return base2_search(statistics, snn.T)
    statistics = merged
    common: dict[str, Any] = {
        "T": snn.T,
        "G": G,
        "seed": config.seed,
        "min_length": snn.min_grain_length,
        "tolerance": options.tolerance,
    }
    if options.method is SearchMethod.gradient:
        schedule = Schedule(
            outer=options.gradient_outer,
            inner=options.gradient_inner,
            samples=options.gradient_samples,
            rate=options.gradient_rate,
        )
        searches = 1 if G else min(MAX_GRAINS, max(1, snn.T // snn.min_grain_length))
        groups = sum(site.counts.shape[1] for site in statistics.values())
        with tqdm(total=searches * groups * schedule.outer, desc="search", unit="round", disable=None) as bar:
            return gradient_search(statistics, schedule=schedule, progress=bar.update, **common)
    signed = snn.coding is Coding.phase_signed
    spike_weight = options.spike_weight if options.spike_weight is not None else SIGNED_SPIKE_WEIGHT * signed
    weights = {name: spike_weight for name in statistics if not name.endswith(UNSHARED)}
    with tqdm(total=G or MAX_GRAINS, desc="search", unit="grain", disable=None) as bar:
        return search(
            statistics,
            digits=Digits(signed=signed),
            spike_weights=weights,
            compiled=config.hardware.compile,
            progress=lambda _: bar.update(),
            **common,
        )


def search_summary(fits: dict[str, CodeFit]) -> dict[str, Any]:
    """`search` of results.json, but for the time it took."""
    every = list(fits.values())
    return {
        "relative_mse": sum(fit.relative_error for fit in every) / len(every),
        "relative_mse_base2": sum(fit.relative_error_base2 for fit in every) / len(every),
        "worse_than_base2": sum(fit.worse_than_base2 for fit in every),
        "groups": sum(len(fit.tau) for fit in every),
        "groups_by_grain": torch.cat([fit.grain for fit in every]).bincount()[1:].tolist(),
        "groups_at_base2": sum(int(fit.fallback.sum()) for fit in every),
    }


def site_row(name: str, fit: CodeFit) -> dict[str, Any]:
    """One line of sites.csv; lists have one entry per neuron group."""
    return {
        "name": name,
        "tau": fit.tau.tolist(),
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
