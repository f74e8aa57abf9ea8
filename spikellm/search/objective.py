"""What is minimised: the cost of codes on the points of many neuron groups."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from spikellm.coding.codes import Codes
from spikellm.search.points import Points


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objective:
    """Weighted squared error of codes on the points of N groups.

    The square of the sum of weight (y - x) is added, bias_weight times, and the mean spikes of a neuron, at their price.
    """

    points: Points
    spike_price: Float[Tensor, " N"]
    bias_weight: Float[Tensor, "N 1"] | None = None

    def __call__(self, codes: Codes) -> Float[Tensor, "N M"]:
        """Cost of M codes for each of the N groups."""
        error, off, spikes = self.points.sums(codes.spell()).sum(-1)
        if self.bias_weight is not None:
            error = error + self.bias_weight * off.square()
        return error + self.spike_price[:, None] * spikes

    def at(self, rows: Int[Tensor, " m"]) -> "Objective":
        """Of some groups."""
        bias_weight = None if self.bias_weight is None else self.bias_weight[rows]
        return Objective(points=self.points.at(rows), spike_price=self.spike_price[rows], bias_weight=bias_weight)
