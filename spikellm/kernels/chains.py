"""Codes of several intervals on plain tensors: the least cost of a whole code from what tables cost in each segment of the points.

Costs of N groups with M tables each, in Q segments: errors and spikes [2, N, M, Q] at a price [N]; Q1 = Q + 1 edges. Sums are float64: a
table's error far from its interval would hide that inside. See `search/intervals.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def running_sums(each: Float[Tensor, "*n Q"]) -> Float[Tensor, "*n Q1"]:
    """Sums of what comes before each edge, from 0 on."""
    return torch.nn.functional.pad(each.double().cumsum(-1), (1, 0))


def running_costs(sums: Float[Tensor, "2 N M Q"], price: Float[Tensor, " N"]) -> Float[Tensor, "N M Q1"]:
    """Of the points before each edge: errors, and spikes at their price."""
    errors, spikes = sums.double()
    return running_sums(errors + price[:, None, None] * spikes)


def through(before: Float[Tensor, "N Q1"], costs: Float[Tensor, "N M Q1"]) -> Float[Tensor, "N M Q1"]:
    """Least costs of the points before each edge when every table in turn takes over from `before`, wherever is best."""
    return (before[:, None] - costs).cummin(-1).values + costs


def chained_plain(before: Float[Tensor, "N Q1"], sums: Float[Tensor, "2 N M Q"], price: Float[Tensor, " N"]) -> Float[Tensor, "N Q1"]:
    """Least costs of the points before each edge when the best table takes over from `before`. The specification."""
    return through(before, running_costs(sums, price)).amin(1)


def worth_plain(
    before: Float[Tensor, "N Q1"], sums: Float[Tensor, "2 N M Q"], price: Float[Tensor, " N"], behind: Float[Tensor, "N Q1"]
) -> Float[Tensor, "N M"]:
    """The least cost of a whole code with each table in its place, between the best of the others. The specification."""
    return (through(before, running_costs(sums, price)) + behind[:, None]).amin(-1)
