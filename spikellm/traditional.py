"""The codes of traditional conversion, fitted as well as they allow: rate, time to first spike, few spikes of base 2.

What our codes are measured against. Each neuron group gets the amplitude (and the base or threshold ratio, where the code has one)
of least weighted squared error on the fitting part, by a grid: the same statistics, weights and groups as the search has. Their tables
are in `coding.py`; they have no grains. Sources: rate coding as in Rueckauer et al. 2017, time to first spike as in Rueckauer & Liu
2018 (here with logarithmic times of any base), few spikes as in Stoeckl & Maass 2021; the grids and thresholds are ours.
"""

import logging
from collections.abc import Callable, Mapping
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.code_fit import CodeFit, held_out_points, spikes_per_neuron, weighted_error
from spikellm.coding import uniform_table
from spikellm.config import Coding, Config, SearchMethod
from spikellm.evolution import CHUNK, base2_codes, squared_error
from spikellm.neuron import fused
from spikellm.search import weighted_points
from spikellm.statistics import HELD_OUT, SiteStatistics

log = logging.getLogger(__name__)

# The largest output of a code as a share of the largest activation: 1/256 to 1.19 in steps of 9 %.
SHARES = torch.logspace(-8, 0.25, 67, base=2)
TTFS_BASES = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5)
FEW_SPIKE_RATIOS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
POINTS = 512  # of a group's distribution; traditional codes are coarse


def variants(coding: Coding, T: int) -> list[dict[str, float]]:
    """What the grid tries beside the amplitude: base, ratio, v0 (arguments of `uniform_table`) and d_0 as a share of the largest output."""
    if coding is Coding.rate:
        return [{"base": 1.0, "ratio": 1.0, "v0": 0.5, "first": 1 / T}]
    if coding is Coding.ttfs:
        return [{"base": base, "ratio": (1 + 1 / base) / 2, "v0": 0.0, "first": 1.0} for base in TTFS_BASES]
    return [{"base": 2.0, "ratio": ratio, "v0": 0.5, "first": 0.5} for ratio in FEW_SPIKE_RATIOS]


def spike_bound(coding: Coding, max_spikes: int | None) -> int | None:
    """`PhaseTable.max_spikes` of a code."""
    return {Coding.ttfs: 1, Coding.few_spike: max_spikes}.get(coding)


def traditional_codes(config: Config, statistics: Mapping[str, SiteStatistics]) -> dict[str, CodeFit]:
    """The codes of `snn.coding`, with a warning for every option that has no effect on them."""
    options, snn = config.search, config.snn
    kind = f"snn.coding={snn.coding.value}"
    if snn.grain != "1":
        log.warning("grain=%s has no effect with %s, which has no grains", snn.grain, kind)
    if options.method is not SearchMethod.evolution:
        log.warning("search.method=%s has no effect with %s", options.method.value, kind)
    with tqdm(total=len(statistics), desc="search", unit="site", disable=None) as bar:
        return fit_traditional(
            statistics, snn.coding, T=snn.T, max_spikes=snn.max_spikes, compiled=config.hardware.compile, progress=bar.update
        )


def fit_traditional(
    statistics: Mapping[str, SiteStatistics],
    coding: Coding,
    *,
    T: int,
    max_spikes: int | None = None,
    compiled: bool = True,
    progress: Callable[[int], None] = lambda sites: None,
) -> dict[str, CodeFit]:
    """The best code of a kind for every neuron group of every site.

    `tau` of a fit is the largest d_t times the base (its `base_d`), so that d_t = tau base_d^-(t+1); thresholds may be lower by a
    constant ratio, which `base_theta` leaves out.

    Args:
        statistics: by site name.
        coding: rate, ttfs or few_spike.
        max_spikes: of few_spike.
        compiled: fuse the evaluation of candidates.
        progress: called with 1 after each site.
    """
    kernel = fused(squared_error, next(iter(statistics.values())).counts.device.type) if compiled else squared_error
    fits = {}
    for name, site in statistics.items():
        fits[name] = _fit_site(site, variants(coding, T), T, spike_bound(coding, max_spikes), kernel)
        progress(1)
    return fits


def _fit_site(site: SiteStatistics, options: list[dict[str, float]], T: int, bound: int | None, kernel: Callable[..., Tensor]) -> CodeFit:
    maximum = site.maximum.amax(0)
    top = torch.where(maximum.amax() > 0, maximum.amax(), 1.0).expand_as(maximum)
    groups = len(maximum)
    points = [weighted_points(site, group, POINTS) for group in range(groups)]
    x, weight, _ = (torch.stack(part)[:, None] for part in zip(*points, strict=True))
    grid = list(product(options, SHARES.tolist()))
    scale = torch.where(maximum > 0, maximum, top)
    tables = [_table(scale * share, option, T) for option, share in grid]
    theta, h, d, v0 = (torch.stack(part, 1) for part in zip(*tables, strict=True))
    rows = max(1, CHUNK // (len(grid) * POINTS))
    parts = [slice(start, start + rows) for start in range(0, groups, rows)]
    error = torch.cat([kernel(x[part], weight[part], theta[part], h[part], d[part], v0[part], bound) for part in parts])
    found, index = error.min(1)
    every = torch.arange(groups, device=index.device)
    theta, h, d, v0 = (part[every, index] for part in (theta, h, d, v0))
    base = torch.tensor([grid[each][0]["base"] for each in index.tolist()], device=d.device)[:, None]
    return _assess(site, theta, h, d, v0, base=base, bound=bound, objective=found, top=top)


def _table(largest: Float[Tensor, " C"], option: dict[str, float], T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return uniform_table(largest * option["first"], T, base=option["base"], ratio=option["ratio"], v0=option["v0"])


def _assess(
    site: SiteStatistics,
    theta: Float[Tensor, "C T"],
    h: Float[Tensor, "C T"],
    d: Float[Tensor, "C T"],
    v0: Float[Tensor, " C"],
    *,
    base: Float[Tensor, "C 1"],
    bound: int | None,
    objective: Float[Tensor, " C"],
    top: Float[Tensor, " C"],
) -> CodeFit:
    """The fit with its error on held-out data; what is found stays, however much worse than base 2."""
    C, T = d.shape
    x, weight, count = held_out_points(site)
    error = squared_error(x[:, None], weight[:, None], theta[:, None], h[:, None], d[:, None], v0[:, None], bound)[:, 0]
    neurons = count.sum(-1) + site.zeros[HELD_OUT]
    return CodeFit(
        tau=d[:, 0] * base[:, 0],
        v0=v0,
        assignment=torch.zeros(C, T, dtype=torch.int64, device=d.device),
        base_d=base,
        base_h=base.clone(),
        base_theta=base.clone(),
        theta=theta,
        h=h,
        d=d,
        objective=objective,
        error=error,
        error_base2=weighted_error(x, weight, base2_codes(top, T)),
        power=(weight * x.square()).sum(-1),
        firing_rate=spikes_per_neuron(x, count, neurons, (theta, h, d, v0), max_spikes=bound) / T,
        share=neurons / neurons.sum().clamp_min(1),
        fallback=torch.zeros(C, dtype=torch.bool, device=d.device),
        rho=torch.ones_like(v0),
        max_spikes=bound,
        two_sided=site.two_sided,
    )
