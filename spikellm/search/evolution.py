"""Batched differential evolution of phase codes: all neuron groups of a network at once.

A population of codes per group; a code is log tau, v0, the log2 of the bases of d, h and theta per grain, and the assignment of
phases to grains. The squared error of a code is a step function of most of these numbers, so no gradient is taken.

Source: differential evolution, current-to-best/1 (Storn & Price 1997; the model is one of the best eighth, as in JADE, Zhang &
Sanderson 2009). Ours: members carry their assignments, so that one run decides all of them; G grains start from the optimum
of G - 1, spelled with every assignment of G.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.coding.codes import FIXED, Codes, IntervalCodes, base2_codes
from spikellm.coding.grains import assignments
from spikellm.search.objective import Objective
from spikellm.search.options import Options
from spikellm.search.parts import in_parts

MEMBERS = 64  # population per group, at least; twice as many as there are assignments
# Per number of grains, the last entry for more. Five times as many lower the error of binary codes by 0.3 %, of signed ones by 5 %.
GENERATIONS = (30, 40, 40)
SIGNED_GENERATIONS = (60, 80, 80)
# Bounds of log tau around the maximum's, of v0 in units of tau 2^-(T+1), of log2 rho, and of log2 of a base.
LOG_TAU_BELOW, LOG_TAU_ABOVE, LOWEST_V0, LOWEST_RHO, LOWEST_BASE, HIGHEST_BASE = 8.0, 4.0, -4.0, -2.0, 0.05, 4.0


def evolve_grains(
    objective: Objective, maximum: Float[Tensor, " N"], options: Options, progress: Callable[[int], None] = lambda grains: None
) -> list[tuple[Codes, Float[Tensor, " N"]]]:
    """The best codes of at most 1, 2, .. G grains (all in the parameter space of G) and their objectives, falling in G.

    Args:
        objective: to be minimised for each of N groups.
        maximum: of |x| in each group [units of x].
        options: T, most_grains (G), min_length, seed.
        progress: called with the number of grains after each round.
    """
    T, G = options.T, options.most_grains
    # random numbers come from the CPU, so that every device searches the same candidates
    generator = torch.Generator().manual_seed(options.seed)
    signed = objective.points.digits.signed
    rounds: list[tuple[Codes, Tensor]] = []
    previous = base2_codes(maximum, T)
    for grains in range(1, G + 1):
        cuts = assignments(T, grains, min_length=options.min_length).to(maximum.device)
        population = first_population(previous, maximum, cuts, generator, signed=signed)
        generations = (SIGNED_GENERATIONS if signed else GENERATIONS)[min(grains, 3) - 1]
        best, found = evolve_single(objective, [population], maximum, generations, generator)
        previous = best.codes.at(0)
        codes = previous.widened(G)
        if rounds:
            older, before = rounds[-1]
            codes, found = older.where(before <= found, codes), torch.minimum(before, found)
        rounds.append((codes, found))
        progress(grains)
    return rounds


def first_population(previous: Codes, maximum: Tensor, options: Int[Tensor, "A T"], generator: torch.Generator, *, signed: bool) -> Codes:
    """Half around the optimum of one grain less, spelled with every assignment, half at random; [N, members, ..].

    The random ones lie around base 2; with signed digits between base 2 and base 3, thresholds between half of the reset (which
    leaves the smallest residual) and the whole.
    """
    N, T, grains = len(maximum), options.shape[1], int(options.max()) + 1
    members = max(MEMBERS, 2 * len(options))
    device = maximum.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    base = (1.3 + 0.3 * normal(N, members, 1)).clamp_min(0.6) if signed else 1 + 0.15 * normal(N, members, 1)
    rho = -torch.rand(N, members, 1, generator=generator).to(device) * signed
    v0 = 1 - signed + 0.3 * normal(N, members, 1)
    values = torch.cat([torch.empty_like(base), v0, rho, base + 0.05 * normal(N, members, 3 * grains)], -1)
    shrink = 2 * torch.rand(N, members, generator=generator).to(device).square() - 0.1
    # the largest output is tau / (B - 1): a larger base needs a larger tau for the same range
    values[..., 0] = maximum.log()[:, None] + (base[..., 0].exp2() - 1).clamp_min(0.1).log() - shrink
    assignment = options[torch.arange(members, device=device) % len(options)].expand(N, members, T).clone()
    values[:, 0] = base2_codes(maximum, T, grains).values
    spread = torch.tensor([0.03, 0.3, 0.03 * signed] + [0.03] * 3 * grains, device=device)
    for member in range(1, 1 + members // 2):
        # each new grain inherits the bases that its first phase had
        starts = torch.stack([(assignment[0, member] == grain).int().argmax() for grain in range(grains)])
        source = previous.assignment[:, starts]
        values[:, member] = torch.cat([previous.values[:, :FIXED], *(part.gather(1, source) for part in previous.bases())], -1)
        if member > len(options):
            values[:, member] += normal(N, FIXED + 3 * grains) * spread
    return Codes(values=values, assignment=assignment)


@in_parts
def evolve_single(
    objective: Objective, populations: list[Codes], maximum: Float[Tensor, " N"], generations: int, generator: torch.Generator
) -> tuple[IntervalCodes, Float[Tensor, " N"]]:
    """Differential evolution of the only interval's population; the best member of every group and its objective."""
    (population,) = populations
    limits = bounds(population, maximum, signed=objective.points.digits.signed)
    found = objective(population)
    for _ in range(generations):
        candidates = propose(population, found, limits, generator)
        error = objective(candidates)
        population, found = candidates.where(error <= found, population), torch.minimum(error, found)
    index = (torch.arange(len(maximum), device=maximum.device), found.argmin(1))
    return IntervalCodes.single(population.at(index)), found[index]


def bounds(population: Codes, maximum: Float[Tensor, " N"], *, signed: bool) -> tuple[Float[Tensor, "N 1 P"], Float[Tensor, "N 1 P"]]:
    """The least and largest parameters that members may have."""
    N, _, P = population.values.shape
    T, device = population.assignment.shape[-1], maximum.device
    low, high = torch.full((N, 1, P), LOWEST_BASE, device=device), torch.full((N, 1, P), HIGHEST_BASE, device=device)
    low[..., 0], high[..., 0] = maximum.log()[:, None] - LOG_TAU_BELOW, maximum.log()[:, None] + LOG_TAU_ABOVE
    low[..., 1], high[..., 1] = LOWEST_V0, 2.0**T
    low[..., 2], high[..., 2] = LOWEST_RHO if signed else 0.0, 0.0
    return low, high


def propose(population: Codes, found: Float[Tensor, "N K"], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Codes:
    """A trial for every member of populations [N, K] whose objectives are `found`."""
    N, K, P = population.values.shape
    device = found.device
    group = torch.arange(N, device=device)[:, None]
    uniform = torch.rand(N, K, P + 6, generator=generator).to(device)
    pick, dice = uniform[..., P : P + 3], uniform[..., P + 3 :]
    best = found.argsort(1).gather(1, (pick[..., 0] * max(2, K // 8)).long())
    one, two = (pick[..., index].mul(K).long() for index in (1, 2))
    values = population.values
    scale = 0.2 + 0.7 * dice[..., :1]
    trial = values + scale * (values[group, best] - values + values[group, one] - values[group, two])
    crossed = uniform[..., :P] < torch.where(dice[..., 1:2] < 0.5, 0.9, 0.4)
    trial = torch.where(crossed, trial, values).clamp(*limits)
    follow = dice[..., 2:] < 0.25  # now and then a member takes over the assignment of its model
    return Codes(values=trial, assignment=torch.where(follow, population.assignment[group, best], population.assignment))
