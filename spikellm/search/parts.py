"""Groups in parts that evolve side by side, each on a thread with its own random numbers.

An operation on a part takes a millisecond or less: threads that share it wait for each other longer than they compute, on a busy machine
many times as long. The number of parts follows from that of groups alone, so that no result depends on the cores.
"""

from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Float
from torch import Tensor

from spikellm.coding.codes import Codes, IntervalCodes
from spikellm.cores import side_by_side
from spikellm.search.objective import Objective

LEAST, MOST = 12, 4  # groups of a part; parts

# Of an objective of N groups a population for each interval, the largest |x|, generations and random numbers: codes and their objectives.
Evolution = Callable[[Objective, list[Codes], Tensor, int, torch.Generator], tuple[IntervalCodes, Tensor]]


def in_parts(evolve: Evolution) -> Evolution:
    """`evolve` part by part; on a GPU one after the other."""

    @wraps(evolve)
    def run(
        objective: Objective, populations: list[Codes], maximum: Float[Tensor, " N"], generations: int, generator: torch.Generator
    ) -> tuple[IntervalCodes, Float[Tensor, " N"]]:
        parts = torch.arange(len(maximum), device=maximum.device).tensor_split(max(1, min(MOST, len(maximum) // LEAST)))
        if len(parts) == 1:
            return evolve(objective, populations, maximum, generations, generator)
        seeds = torch.randint(2**62, (len(parts),), generator=generator).tolist()

        def evolve_part(rows: Tensor, seed: int) -> tuple[IntervalCodes, Tensor]:
            own = [codes.at(rows) for codes in populations]
            return evolve(objective.at(rows), own, maximum[rows], generations, torch.Generator().manual_seed(seed))

        found = side_by_side(evolve_part, zip(parts, seeds, strict=True), threads=1 if maximum.is_cuda else None)
        return IntervalCodes.joined([codes for codes, _ in found]), torch.cat([value for _, value in found])

    return run
