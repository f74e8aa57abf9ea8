"""Densities as weighted points, and what codes make of them: the one evaluation of candidates.

Each point is an equal share of a mixture of p^(1/3) (the level density of the optimal quantiser, Panter & Dite 1951), mass and energy, so
that the tail keeps points of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.calibration.statistics import FIT, SiteStatistics
from spikellm.coding.neuron import PhaseTable
from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import Digits, Rows, code_sums, respond, segment_sums
from spikellm.search.options import Options

SEGMENTS = 64  # parts of as many points, for which sums are known: where an interval may end while tables evolve
# Elements of a buffer: on a CPU, in plain form, 2 MiB stay in the cache, page faults took half of the time without; a GPU is filled.
CHUNK = {"cpu": 2**19, "cuda": 2**24}
MIXTURE = (0.7, 0.2, 0.1)  # shares of p^(1/3), mass and energy: most points where levels belong


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Points:
    """The densities of N groups in points, ascending: positions, error weights, shares of a group's neurons.

    A multiple of SEGMENTS; unused ones weigh 0. `kernel` is `segment_sums`, fused or plain, digits are those of the codes.
    """

    x: Float[Tensor, "N points"]
    weight: Float[Tensor, "N points"]
    share: Float[Tensor, "N points"]
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]]
    digits: Digits

    @classmethod
    def of(cls, statistics: Mapping[str, SiteStatistics], digits: Digits, number: int, *, compiled: bool) -> "Points":
        """The groups of all sites in a row."""
        every = [weighted_points(site, number) for site in statistics.values()]
        x, weight, share = (torch.cat(part) for part in zip(*every, strict=True))
        return cls(x=x, weight=weight, share=share, kernel=chosen(segment_sums, x, compiled=compiled), digits=digits)

    def at(self, rows: Int[Tensor, " m"]) -> "Points":
        """Those of some groups."""
        return replace(self, x=self.x[rows], weight=self.weight[rows], share=self.share[rows])

    @property
    def size(self) -> Float[Tensor, " N"]:
        """Root of the weighted mean square of each group [units of x]; 1 where nothing but zeros passed."""
        weight = self.weight.sum(1)
        return torch.where(weight > 0, (self.weight * self.x.square()).sum(1) / weight.clamp_min(1e-30), 1.0).sqrt()

    def sums(self, rows: Rows) -> Float[Tensor, "3 N M Q"]:
        """Squared errors, errors and spikes of codes [N, M] in each segment."""
        x, weight, share = (each.unflatten(1, (SEGMENTS, -1))[:, None] for each in (self.x, self.weight, self.share))
        if x.is_cpu and self.kernel is not segment_sums:  # in C++, without buffers
            return torch.stack(self.kernel(x, weight, share, rows, self.digits))
        count = -(-len(x) * rows.v0.shape[1] * self.x.shape[1] // CHUNK[x.device.type])
        # equal parts: a compiler makes a kernel of its own for a part of one group
        parts = torch.arange(len(x)).tensor_split(min(count, len(x)))
        found = []
        for part in parts:
            own = slice(int(part[0]), int(part[-1]) + 1)
            # as tensors of their own: the compiler asks what a view is of
            members = rows.at(own).map(Tensor.clone)
            found.append(torch.stack(self.kernel(x[own], weight[own], share[own], members, self.digits)))
        return torch.cat(found, 1)

    def pointwise(self, rows: Rows) -> tuple[Float[Tensor, "N points"], Float[Tensor, "N points"]]:
        """weight (y - x)^2 and share * spikes of one code [N] for each group."""
        y, spikes = respond(self.x, rows, self.digits)
        return self.weight * (y - self.x).square(), self.share * spikes


def table_sums(
    x: Float[Tensor, "C points"],
    weight: Float[Tensor, "C points"],
    share: Float[Tensor, "C points"],
    tables: Sequence[PhaseTable],
    *,
    compiled: bool,
) -> Float[Tensor, "3 J C"]:
    """Squared errors, errors and spikes of J tables on points x > 0; of one side."""
    kernel = chosen(code_sums, x, compiled=compiled and x.is_cpu)  # on CUDA a few launches are sooner done than compiled
    return torch.stack([kernel(x, weight, share, table.rows, table.digits, table.cuts) for table in tables], 1)


def enough_points(options: Options, K: int) -> int:
    """Points for codes of K intervals: four a level, up to 512 levels."""
    bits = (math.log2(3) if options.digits.signed else 1) * options.T + math.log2(K)
    return min(2048, max(256, 2 ** round(bits + 2)))


def weighted_points(
    statistics: SiteStatistics, count: int
) -> tuple[Float[Tensor, "C points"], Float[Tensor, "C points"], Float[Tensor, "C points"]]:
    """The density of the fitting part in `count` points a group; ascending where they are used.

    Returns:
        positions; weights scaled so that sum weight x^2 = 1, an unused point weighs 0; shares of the group's neurons (zeros have
        no point).
    """
    mass = (statistics.counts if statistics.weights is None else statistics.weights)[FIT].double()
    neurons = statistics.counts[FIT].double()
    width, center = statistics.edges.double().diff(), statistics.centers.double()
    parts = ((mass / width).pow(1 / 3) * width, mass, mass * center.square())
    shares = [part / part.sum(1, keepdim=True).clamp_min(1e-300) for part in parts]
    measure = torch.stack([factor * each for factor, each in zip(MIXTURE, shares, strict=True)]).sum(0)
    cell = ((measure.cumsum(1) - measure / 2) * count).long().clamp_(0, count - 1)

    def collected(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), count).scatter_add_(1, cell, values)

    total, first = collected(mass), collected(mass * center)
    x = torch.where(total > 0, first / total.clamp_min(1e-300), 0.0)
    share = collected(torch.where(mass > 0, neurons, 0.0)) / (neurons.sum(1) + statistics.zeros[FIT]).clamp_min(1)[:, None]
    weight = total / (total * x.square()).sum(1, keepdim=True).clamp_min(1e-300)
    return x.float(), weight.float(), share.float()
