"""Codes of several intervals: cuts and tables found together, by evolution of one kind of code per interval.

The range of |x| is cut into K intervals, each coded by a population with a table of its own (`kernels/encode.Digits`). For tables
1 .. K and cuts c_1 <= .. <= c_K-1 the error is a sum over intervals,

    E = sum over k of  E_k(c_k) - E_k(c_k-1)        E_k(c): error of table k on the points up to c

so that, whatever tables there are to choose from, the best of each and the best cuts follow exactly from their running sums, by dynamic
programming. Evolution (`evolution.py`) has K populations here, and what a member is worth is the least error of a whole code with this
table in its place, the best partners and the best cuts. Nobody fixes a cut: it lies where the tables meet. While they evolve, cuts are
taken from SEGMENTS places that divide the points of a group evenly; in the end from all points.

Ours. Ranges of an activation as grains of a code: Zheng et al., ICLR 2026, in their introduction; their code has grains of phases alone.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.coding.codes import FIXED, Codes, IntervalCodes
from spikellm.coding.grains import assignments
from spikellm.kernels import native
from spikellm.kernels.chains import running_costs, running_sums, through
from spikellm.search.evolution import GENERATIONS, SIGNED_GENERATIONS, bounds, first_population, propose
from spikellm.search.objective import Objective
from spikellm.search.options import Options
from spikellm.search.parts import in_parts
from spikellm.search.points import Points

JITTER = 0.12  # of the first intervals' ends, as a share of all points


def sums_of(points: Points, codes: Codes) -> Float[Tensor, "2 N M Q"]:
    """Errors and spikes of codes [N, M] in each segment."""
    return points.sums(codes.spell())[::2]


def running_everywhere(points: Points, codes: Codes) -> Float[Tensor, "2 N 1 Q1"]:
    """The same of one code [N] a group, an edge before every point."""
    return running_sums(torch.stack(points.pointwise(codes.spell())))[:, :, None]


def ends(points: Points, edge: Int[Tensor, "ends N"]) -> Float[Tensor, "ends N"]:
    """Where the points before an edge, of one before every point, end and those behind it begin: in the middle [units of x]."""
    highest = points.x.amax(1, keepdim=True)
    below = torch.nn.functional.pad(points.x.cummax(1).values, (1, 0))
    used = torch.where(points.weight > 0, points.x, torch.inf)
    above = torch.cat([used.flip(1).cummin(1).values.flip(1), highest], 1).minimum(highest)
    return ((below + above) / 2).gather(1, edge.mT).mT


def prefix(sums: list[Float[Tensor, "2 N M Q"]], price: Float[Tensor, " N"], Q: int) -> Float[Tensor, "N Q1"]:
    """Least costs of the points before each edge with the best of some populations, whose members' sums these are."""
    found = price.new_full((len(price), Q + 1), torch.inf, dtype=torch.float64)
    found[:, 0] = 0
    for each in sums:
        found = native.chained(found, each, price)
    return found


def suffix(sums: list[Float[Tensor, "2 N M Q"]], price: Float[Tensor, " N"], Q: int) -> Float[Tensor, "N Q1"]:
    """Least costs of the points behind each edge."""
    return prefix([each.flip(-1) for each in reversed(sums)], price, Q).flip(-1)


def best_chain(sums: list[Float[Tensor, "N M Q1"]]) -> tuple[Int[Tensor, "K N"], Int[Tensor, "ends N"]]:
    """Of every population the member, and the K-1 edges, of the whole code of least cost."""
    edge = torch.full((len(sums[0]),), sums[0].shape[-1] - 1, device=sums[0].device)
    start = torch.full_like(sums[0][:, 0], torch.inf)
    start[:, 0] = 0
    before = list(accumulate(sums[:-1], lambda found, each: through(found, each).amin(1), initial=start))
    members, edges = [], []
    for k in range(len(sums) - 1, -1, -1):
        lowest, where = (before[k][:, None] - sums[k]).cummin(-1)
        at = edge[:, None, None].expand(-1, sums[k].shape[1], 1)
        member = (lowest + sums[k]).gather(-1, at)[..., 0].argmin(1)
        members.append(member)
        edge = where.gather(1, member[:, None, None].expand(-1, 1, where.shape[-1]))[:, 0].gather(1, edge[:, None])[:, 0]
        edges.append(edge)
    return torch.stack(members[::-1]), torch.stack(edges[::-1])[1:]


def evolve_intervals(
    objective: Objective,
    maximum: Float[Tensor, " N"],
    previous: IntervalCodes,
    options: Options,
    progress: Callable[[], None] = lambda: None,
) -> list[tuple[IntervalCodes, Float[Tensor, " N"]]]:
    """Codes of one interval more than `previous`, of 1, 2, .. G grains, and their objectives.

    Args:
        objective: to be minimised for each of N groups, but for what the mean error counts.
        maximum: of |x| in each group [units of x].
        previous: the best codes of one interval less; [K-1, N].
        options: T, most_grains (G), min_length, seed.
        progress: called after each round.
    """
    T, G, signed = options.T, options.most_grains, objective.points.digits.signed
    K = previous.K + 1
    generator = torch.Generator().manual_seed(options.seed + K)
    # each interval starts from one of the code before: the lowest from the lowest, the others from the next one outwards
    sources = [min(k, K - 2) for k in range(K)]
    models, reach = [previous.codes.at(k) for k in sources], torch.cat([previous.cuts, maximum[None]])[sources]
    rounds = []
    for grains in range(1, G + 1):
        cuts = assignments(T, grains, min_length=options.min_length).to(maximum.device)
        populations = []
        for k, model in enumerate(models):
            population = first_population(model, maximum, cuts, generator, signed=signed)
            populations.append(spread(population, objective.points, reach[k], place=k, K=K, generator=generator))
        generations = (SIGNED_GENERATIONS if signed else GENERATIONS)[min(grains, 3) - 1]
        found, value = evolve_chains(objective, populations, maximum, generations, generator)
        models, reach = [found.codes.at(k) for k in range(K)], torch.cat([found.cuts, maximum[None]])
        rounds.append((found.widened(G), value))
        progress()
    return rounds


def spread(population: Codes, points: Points, reach: Float[Tensor, " N"], *, place: int, K: int, generator: torch.Generator) -> Codes:
    """A first population for the interval number `place` of K, from one whose members code inputs up to `reach`.

    Each member gets an interval (a, b] somewhere about its place; points lie as levels should, so that K intervals of as many points
    are a fair guess. Below the highest interval amplitudes are scaled to b. Above the lowest one half of the members that were drawn
    at random start from an offset: a first digit in the middle of (a, b], or with binary digits at a, and digits of base 3, or 2, for
    what is left.
    """
    values = population.values.clone()
    (N, members, _), T = values.shape, population.assignment.shape[-1]
    device, half, signed = values.device, 1 + members // 2, points.digits.signed
    ascending = points.x.cummax(1).values
    last = ascending.shape[1] - 1

    def around(share: float) -> Tensor:
        """Points about that share of all."""
        at = (share + JITTER * torch.randn(N, members, generator=generator)).clamp(0.05, 1) * last
        return ascending.gather(1, at.long().to(device)).clamp_min(1e-30)

    b = around((place + 1) / K) if place < K - 1 else reach[:, None].expand(N, members)
    if place < K - 1:
        values[:, 1:, 0] += (b / reach[:, None].clamp_min(1e-30)).log()[:, 1:]
    if place > 0:
        a = torch.minimum(around(place / K), 0.9 * b)[:, half:]
        b = b[:, half:]
        base = 3.0 if signed else 2.0
        first, second = (a + b) / 2 if signed else a, (b - a) / base
        digits = torch.stack([first, *(second * base**-t for t in range(T - 1))], -1)
        # an amplitude from which the first digit and what follows it can be reached by bases above 1
        tau = torch.maximum(second * base**2, 1.1 * first)
        grains = population.G
        starts = torch.stack([(population.assignment[:, half:] == grain).int().argmax(-1) for grain in range(grains)], -1)
        bases = (tau[..., None] / digits.gather(-1, starts)).log2() / (starts + 1)
        values[:, half:, 0] = tau.log()
        noise = 0.05 * torch.randn(N, members - half, 3 * grains, generator=generator).to(device)
        values[:, half:, FIXED:] = bases.repeat(1, 1, 3) + noise
    return Codes(values=values, assignment=population.assignment)


@in_parts
def evolve_chains(
    objective: Objective, populations: list[Codes], maximum: Float[Tensor, " N"], generations: int, generator: torch.Generator
) -> tuple[IntervalCodes, Float[Tensor, " N"]]:
    """The best whole code and its objective, squared error and the price of its spikes."""
    limits = bounds(populations[0], maximum, signed=objective.points.digits.signed)
    kept = [sums_of(objective.points, population) for population in populations]
    price, Q = objective.spike_price, kept[0].shape[-1]
    for _ in range(generations):
        for k in range(len(populations)):
            before, behind = prefix(kept[:k], price, Q), suffix(kept[k + 1 :], price, Q)
            found = native.worth(before, kept[k], price, behind)
            trial = propose(populations[k], found, limits, generator)
            tried = sums_of(objective.points, trial)
            better = native.worth(before, tried, price, behind) <= found
            populations[k] = trial.where(better, populations[k])
            kept[k][:, better] = tried[:, better]
    members, _ = best_chain([running_costs(each, price) for each in kept])
    row = torch.arange(len(maximum), device=maximum.device)
    best = [population.at((row, member)) for population, member in zip(populations, members, strict=True)]
    # the tables meet anywhere, not only at the edges
    final = [running_everywhere(objective.points, codes) for codes in best]
    members, edges = best_chain([errors + price[:, None, None] * spikes for errors, spikes in final])
    error, spikes = totals(final, members, edges)
    codes = Codes(values=torch.stack([each.values for each in best]), assignment=torch.stack([each.assignment for each in best]))
    return IntervalCodes(codes=codes, cuts=ends(objective.points, edges)), (error + objective.spike_price * spikes).float()


def totals(
    sums: list[Float[Tensor, "2 N M Q1"]], members: Int[Tensor, "K N"], edges: Int[Tensor, "ends N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Error and spikes of whole codes."""
    last = torch.full_like(members[:1], sums[0].shape[-1] - 1)
    bounds = torch.cat([torch.zeros_like(last), edges, last])
    row = torch.arange(members.shape[1], device=members.device)
    cells = zip(sums, members, bounds[:-1], bounds[1:], strict=True)
    found = torch.stack([each[:, row, member, stop] - each[:, row, member, start] for each, member, start, stop in cells]).sum(0)
    return found[0], found[1]
