"""Levels of the integer networks that spiking ones are compared with, each as good as calibration allows.

int_static: per neuron group the step of least weighted squared error on the fitting part, by a grid of clips and a finer one around the
best: the same statistics, weights and groups as the search of codes has, and the same cost of a mean error where outputs are added up
(`fit.py`). Where the signs are counted apart (SiLU) the zero point is part of the grid; elsewhere distributions are taken as symmetric.
int_token: levels of each token's own, nothing to be fitted.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.statistics import FIT, SiteStatistics
from spikellm.coding.integers import IntegerQuantizer, Levels, TokenQuantizer, spans
from spikellm.coding.neuron import Slot
from spikellm.config.choices import Groups
from spikellm.config.labels import SiteKind
from spikellm.model.sites import GROUP_AXIS, Site
from spikellm.search.fit import bias_weight, part_points
from spikellm.search.options import Options

# The largest level as a share of the largest activation, and factors around the best of them.
SHARES = torch.logspace(-6, 0.1, 62, base=2)
FINER = torch.logspace(-0.1, 0.1, 21, base=2)
# The least level as a share of the least activation, where there is a zero point.
LEAST_SHARES = (1.0, 0.85, 0.7, 0.5)


def static_quantizers(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, Slot]:
    """int_static: an occupant for every site. Statistics of all sites, on one device; of the options T and search.groups."""
    sites = tqdm(statistics.items(), desc="integers", unit="site", disable=None)
    return {
        name: IntegerQuantizer(fitted_levels(_grouped(site, options), options.T, signed=_is_signed(name)), axis=_axis(name))
        for name, site in sites
    }


def token_quantizers(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, Slot]:
    """int_token: an occupant for every site; of the statistics the number of groups alone."""
    return {
        name: TokenQuantizer(options.T, signed=_is_signed(name), groups=_grouped(site, options).groups, axis=_axis(name))
        for name, site in statistics.items()
    }


def fitted_levels(site: SiteStatistics, T: int, *, signed: bool) -> Levels:
    """The levels of least cost on the fitting part, for each of the C groups of a site.

    Args:
        site: of two sides those of a group are coded together, with a zero point.
        T: integers have T + 1 bits, unsigned ones T.
        signed: False: no activation is negative.
    """
    grid = _Grid(site, T, signed=signed)
    for share in SHARES:
        grid.offer(grid.largest * share)
    best = grid.levels.step * grid.levels.high
    for factor in FINER:
        grid.offer(best * factor)
    return grid.levels


class _Grid:
    """The best levels so far, and their cost.

    Of x [C, points], positive, weight_above and weight_below say what an error of x and of -x counts.
    """

    def __init__(self, site: SiteStatistics, T: int, *, signed: bool) -> None:
        x, weight, count = part_points(site, FIT)
        groups = site.groups
        self.span, self.signed = spans(T, signed=signed), signed
        known = site.known_maximum.view(site.sides, groups)
        self.x = x[:groups]
        if site.sides == 2:
            self.weight_above, self.weight_below = weight.chunk(2)
            count = count.view(2, groups, -1).sum(0)
        else:
            share_below = 0.5 if signed else 0.0
            self.weight_above, self.weight_below = (1 - share_below) * weight, share_below * weight
        self.largest, self.least = (torch.where(side > 0, side, 1.0) for side in (known[0], known[-1]))
        self.has_zero_point = site.sides == 2
        neurons = count.sum(-1) + site.zeros[FIT].view(site.sides, groups).sum(0)
        weight = self.weight_above + self.weight_below
        self.bias = bias_weight(site, weight, count / neurons.clamp_min(1)[:, None])[:, 0]
        self.cost = torch.full_like(self.largest, torch.inf)
        self.levels = Levels(*(torch.ones_like(self.largest) for _ in Levels._fields))

    def offer(self, top: Float[Tensor, " C"]) -> None:
        """Try a clip: the largest level, with every zero point that there may be."""
        half = self.span // 2 if self.signed else self.span
        self._try(top / half, torch.full_like(top, half - self.span))
        if self.has_zero_point:
            for share in LEAST_SHARES:
                step = (top + share * self.least) / self.span
                self._try(step, -(share * self.least / step).round().clamp_max(half + 1))

    def _try(self, step: Float[Tensor, " C"], low: Float[Tensor, " C"]) -> None:
        tried = Levels(step, low, low + self.span)
        cost = self._cost(tried)
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.levels = Levels(*(torch.where(better, new, old) for new, old in zip(tried, self.levels, strict=True)))

    def _cost(self, levels: Levels) -> Float[Tensor, " C"]:
        step, low, high = (each[:, None] for each in levels)
        number = (self.x / step).round()
        above, below = (number.minimum(most) * step - self.x for most in (high, -low))
        error = (self.weight_above * above.square() + self.weight_below * below.square()).sum(-1)
        mean = (self.weight_above * above - self.weight_below * below).sum(-1)
        return error + self.bias * mean.square()


def _is_signed(name: str) -> bool:
    return _kind(name) is not SiteKind.softmax


def _axis(name: str) -> int:
    return GROUP_AXIS[_kind(name)]


def _kind(name: str) -> SiteKind:
    site = Site.of(name)
    assert site is not None
    return site.kind


def _grouped(site: SiteStatistics, options: Options) -> SiteStatistics:
    """With search.groups=site in one group; the signs stay apart where they are."""
    return site.merged() if options.search.groups is Groups.site and site.groups > 1 else site
