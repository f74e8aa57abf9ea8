"""Groups of neurons whose densities look alike lend each other their codes.

The 1141 groups of a network of 30 layers have far fewer shapes of density. REPRESENTATIVES of them, so chosen that every group has one
like it, are searched from nothing. All groups then start from the codes of the representatives that they resemble most, scaled to their
own size, evolve for some generations, and twice more start from what the groups most like them have found by then.

That takes a tenth of the work of searching each group from nothing, and finds better codes: what one of the many local optima holds
is not lost to the others (SmolLM2, T=8, phase_signed, grain=2: mean log objective -30.0 dB, from nothing -29.2; T=4 -15.2, both).

Source: islands that exchange their best (Cohoon et al. 1987); representatives by farthest-point clustering (Gonzalez 1985). Ours: a
group's neighbours are those of like density.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.coding.codes import FIXED, Codes, IntervalCodes
from spikellm.search.evolution import Objective

REPRESENTATIVES = 64
NEIGHBOURS = 10  # whose codes a group starts from
MEMBERS = 16  # of a group's population
EXCHANGES = 3
GENERATIONS = 8  # between two exchanges
# Standard deviations of what is added to codes that are lent more than once: log tau, v0, log2 rho; log2 of a base.
JITTER, BASE_JITTER = (0.03, 0.3, 0.03), 0.02
QUANTILES = 48  # of a density, that make up its shape
SPIKE_SCALE, SHARE_SCALE = 5.0, 3.0  # what a price of spikes, or a share of zeros that is different by one, counts beside log x

Rounds = list[tuple[IntervalCodes, Float[Tensor, " N"]]]
Step = Callable[[Objective, list[Codes], Float[Tensor, " N"], int, torch.Generator], tuple[IntervalCodes, Float[Tensor, " N"]]]


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """What groups are compared by: features, whose distance says how unlike two groups are, and the log of their sizes."""

    features: Float[Tensor, "N F"]
    log_size: Float[Tensor, " N"]

    @classmethod
    def of(cls, objective: Objective) -> "Shapes":
        """Of the groups of an objective: quantiles of the density in units of its size, zeros, and what else the objective counts."""
        points = objective.points
        size = points.size
        at = torch.linspace(0, 1, QUANTILES + 1)[1:] * (points.x.shape[1] - 1)
        quantiles = (points.x.cummax(1).values[:, at.long()] / size[:, None]).clamp_min(1e-4).log()
        features = [quantiles, SHARE_SCALE * points.share.sum(1, keepdim=True), SPIKE_SCALE * (objective.spike_price[:, None] > 0)]
        if objective.bias_weight is not None:
            features.append((objective.bias_weight / size.square()[:, None]).clamp_min(1e-9).log())
        return cls(torch.cat(features, 1), size.log())

    def representatives(self) -> Int[Tensor, " m"]:
        """Groups such that every group is near one of them: each next one is the farthest from all before."""
        distance = torch.full_like(self.log_size, torch.inf)
        rows = [0]
        while len(rows) < min(REPRESENTATIVES, len(distance)):
            distance = torch.minimum(distance, (self.features - self.features[rows[-1]]).square().sum(1))
            rows.append(int(distance.argmax()))
        return torch.tensor(rows, device=distance.device).unique()

    def nearest(self, rows: Int[Tensor, " m"]) -> tuple[Int[Tensor, "N R"], Float[Tensor, "N R"]]:
        """For every group those of `rows` most like it, the first the most, as places in `rows`; and how much larger it is, in log."""
        distance = torch.cdist(self.features, self.features[rows], compute_mode="donot_use_mm_for_euclid_dist")
        near = distance.topk(min(NEIGHBOURS, len(rows)), 1, largest=False).indices
        return near, self.log_size[:, None] - self.log_size[rows][near]


def lend(codes: Codes, near: Int[Tensor, "N R"], larger: Float[Tensor, "N R"], generator: torch.Generator) -> Codes:
    """A population [N, MEMBERS] for every group: the codes [m] of those near it, then more of them, the nearest most, changed."""
    R = near.shape[1]
    more = torch.randint(R, (MEMBERS - R,), generator=generator)
    nearest = torch.rand(MEMBERS - R, generator=generator) < 0.6
    pick = torch.cat([torch.arange(R), torch.where(nearest, 0, more)]).to(near.device)
    lent = codes.at(near[:, pick])
    values = lent.values.clone()
    values[..., 0] += larger[:, pick]
    spread = torch.tensor([*JITTER] + [BASE_JITTER] * (values.shape[-1] - FIXED))
    noise = spread * torch.randn(*values.shape, generator=generator)
    noise[:, :R] = 0
    return Codes(values=values + noise.to(values.device), assignment=lent.assignment.clone())


def exchanged(
    objective: Objective,
    maximum: Float[Tensor, " N"],
    from_nothing: Callable[[Objective, Int[Tensor, " m"]], Rounds],
    step: Step,
    *,
    every_round: bool,
    seed: int,
) -> Rounds:
    """Codes of all groups and their objectives, the simplest first.

    Args:
        objective: of N groups.
        maximum: of |x| in each group [units of x].
        from_nothing: the search of some groups, whose rows and objective it is given.
        step: the evolution of a population for each interval.
        every_round: False: the last round of `from_nothing` alone is wanted.
        seed: of what is added to lent codes.
    """
    shapes = Shapes.of(objective)
    every, some = torch.arange(len(maximum), device=maximum.device), shapes.representatives()
    rounds = from_nothing(objective.at(some), some)
    rounds = rounds if every_round else rounds[-1:]
    if len(some) == len(every):
        return rounds
    generator = torch.Generator().manual_seed(seed)
    lenders = [shapes.nearest(some), *[shapes.nearest(every)] * (EXCHANGES - 1)]
    found = []
    for codes, value in rounds:
        for near, larger in lenders:
            populations = [lend(codes.codes.at(k), near, larger, generator) for k in range(codes.K)]
            codes, value = step(objective, populations, maximum, GENERATIONS, generator)
        found.append((codes, value))
    return found
