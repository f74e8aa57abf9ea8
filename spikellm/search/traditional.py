"""The codes of traditional conversion, fitted as well as they allow: rate, time to first spike, few spikes of base 2.

What our codes are measured against. Each neuron group gets the amplitude (and the base or threshold ratio, where the code has one)
of least weighted squared error on the fitting part, by a grid: the same statistics, weights and groups as the search has. Nothing is
chosen afterwards: what is found stays, however much worse than base 2, and is measured on the reporting part. Their tables
are in `coding/grains.py`; they have no grains. Sources: rate coding as in Rueckauer et al. 2017, time to first spike as in Rueckauer & Liu
2018 (here with logarithmic times of any base), few spikes as in Stoeckl & Maass 2021; the grids and thresholds are ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.grains import uniform_rows
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Coding
from spikellm.kernels.encode import Digits, Rows
from spikellm.search.fit import CodeFit, bias_weight
from spikellm.search.options import Options
from spikellm.search.points import Points
from spikellm.search.search import group_maxima

# The largest output of a code as a share of the largest activation: 1/256 to 1.19 in steps of 9 %.
SHARES = torch.logspace(-8, 0.25, 67, base=2)
TTFS_BASES = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5)
FEW_SPIKE_RATIOS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
POINTS = 512  # of a group's distribution; traditional codes are coarse


def variants(coding: Coding, T: int) -> list[dict[str, float]]:
    """What the grid tries beside the amplitude: base, ratio, v0 (arguments of `uniform_rows`) and d_0 as a share of the largest output."""
    if coding is Coding.rate:
        return [{"base": 1.0, "ratio": 1.0, "v0": 0.5, "first": 1 / T}]
    if coding is Coding.ttfs:
        return [{"base": base, "ratio": (1 + 1 / base) / 2, "v0": 0.0, "first": 1.0} for base in TTFS_BASES]
    return [{"base": 2.0, "ratio": ratio, "v0": 0.5, "first": 0.5} for ratio in FEW_SPIKE_RATIOS]


def classic(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The best code of a kind for every neuron group of every site.

    `tau` of a fit is the largest d_t times the base (its `base_d`), so that d_t = tau base_d^-(t+1); thresholds may be lower by a
    constant ratio, which `base_theta` leaves out.

    Args:
        statistics: by site name; all on one device.
        options: T; coding, rate, ttfs or few_spike; max_spikes.
    """
    snn = options.snn
    tried = variants(snn.coding, options.T)
    sites = tqdm(statistics.items(), desc="search", unit="site", disable=None)
    return {name: _fit_site(site, tried, options.T, options.digits, compiled=options.compiled) for name, site in sites}


def _fit_site(site: SiteStatistics, options: list[dict[str, float]], T: int, digits: Digits, *, compiled: bool) -> CodeFit:
    known = site.known_maximum
    scale = torch.where(known > 0, known, group_maxima({"": site.merged()}))
    points = Points.of({"": site}, digits, POINTS, compiled=compiled)
    bias = bias_weight(site, points.weight, points.share)
    grid = list(product(options, SHARES.tolist()))
    every = [_rows(scale * largest, option, T) for option, largest in grid]
    rows = Rows(*(torch.stack(part, 1) for part in zip(*every, strict=True)))
    error, off, _ = points.sums(rows).sum(-1)
    found, index = (error + bias * off.square()).min(1)
    table = PhaseTable(*rows.at((torch.arange(len(known), device=index.device), index)), digits=replace(digits, sides=site.sides))
    d = table.d
    base = torch.tensor([grid[each][0]["base"] for each in index.tolist()], device=d.device)[:, None]
    return CodeFit.reported(
        site,
        table,
        tau=d[:, 0] * base[:, 0],
        assignment=torch.zeros(d.shape, dtype=torch.int64, device=d.device),
        base_d=base,
        base_h=base.clone(),
        base_theta=base.clone(),
        objective=found,
        fallback=torch.zeros(len(known), dtype=torch.bool, device=d.device),
        rho=torch.ones_like(table.v0),
    )


def _rows(largest: Float[Tensor, " C"], option: dict[str, float], T: int) -> Rows:
    return uniform_rows(largest * option["first"], T, base=option["base"], ratio=option["ratio"], v0=option["v0"])
