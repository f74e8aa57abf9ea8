"""Integers in a neuron's place: what T phases and a sign are compared with at equal bits.

An activation x becomes an integer q between two levels and counts step q:

    y = step clamp(round(x / step), low, high)

as fake quantisation has it everywhere (Jacob et al. 2018). Signed integers have T + 1 bits, all 2^(T+1) of them: T phases and a sign spell
one fewer, but hardware has the level, and a rival is not weakened. Unsigned ones (the softmax, whose values are not negative) have T bits.
low != -2^T is a zero point: the same number of levels over another part of the line, as integer networks do where values lean to one side
(SiLU).

Two ways to the step: of calibration, one for each group of neurons and fixed (`IntegerQuantizer`); or of the values at hand, one for each
token and group (`TokenQuantizer`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spikellm.coding.neuron import Slot, grouped

# Of a token's range, what is worth its levels where they are few: by the best uniform quantiser of a normal density (Max 1960), which
# reaches 2.3, 2.7 and 3.0 standard deviations with 8, 16 and 32 levels, where the largest of 600 values is at 3.2. By T, for T + 1 bits.
CLIPS = {1: 0.6, 2: 0.72, 3: 0.84, 4: 0.94}


class Levels(NamedTuple):
    """The integers of C groups and what one of them counts [units of x]."""

    step: Float[Tensor, " C"]
    low: Float[Tensor, " C"]  # least integer, at most 0
    high: Float[Tensor, " C"]  # largest integer


def spans(T: int, *, signed: bool) -> int:
    """Steps between the least and the largest integer: 2^(T+1) - 1, without a sign 2^T - 1."""
    return 2 ** (T + signed) - 1


def quantised(x: Tensor, levels: Levels) -> Tensor:
    """step clamp(round(x / step), low, high), for levels that broadcast against x; halves go to even integers."""
    return (x / levels.step).round().maximum(levels.low).minimum(levels.high) * levels.step


class IntegerQuantizer(Slot):
    """Integers with fixed levels at one site.

    Args:
        levels: of one group, or one entry a group.
        axis: of x that the groups divide, as in `PhaseNeuron`; unused for one group.
    """

    step: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, levels: Levels, *, axis: int = -1) -> None:
        super().__init__()
        for name, values in levels._asdict().items():
            self.register_buffer(name, values.detach().clone())
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """What the integers of x [..] stand for, same shape."""
        levels = Levels(*(values[:, None] for values in (self.step, self.low, self.high)))
        return quantised(grouped(x, len(self.step), self.axis), levels).view(x.shape)

    def extra_repr(self) -> str:
        """Number of groups, in the printed model."""
        return f"groups={len(self.step)}"


class TokenQuantizer(Slot):
    """Integers whose levels reach from the least to the largest value of each token (of a query's row, at the softmax), 0 among them.

    Args:
        T: the integers have T + 1 bits, unsigned ones T.
        signed: whether there are negative values.
        groups: parts of a token with levels of their own.
        axis: of x that the groups divide: the last one, or the heads of [B, H, L, E].
        clip: the levels reach over this share of the range; None: what pays, `CLIPS`, where there are signs.
    """

    def __init__(self, T: int, *, signed: bool, groups: int = 1, axis: int = -1, clip: float | None = None) -> None:
        super().__init__()
        self.T, self.signed, self.groups, self.axis = T, signed, groups, axis
        self.clip = (CLIPS.get(T, 1.0) if signed else 1.0) if clip is None else clip

    def forward(self, x: Float[Tensor, "*shape N"]) -> Float[Tensor, "*shape N"]:
        """What the integers of x stand for."""
        axis = self.axis % x.ndim
        parts = x.unflatten(axis, (self.groups, -1))
        values = sorted({axis + 1, parts.ndim - 1})  # the group's channels, or those of its heads
        least, largest = parts.amin(values, keepdim=True).clamp_max(0), parts.amax(values, keepdim=True).clamp_min(0)
        span = spans(self.T, signed=self.signed)
        least, largest = self.clip * least, self.clip * largest
        step = (largest - least) / span
        step = torch.where(step > 0, step, 1)  # a token of zeros
        low = (least / step).round()
        return quantised(parts, Levels(step, low, low + span)).view(x.shape)

    def extra_repr(self) -> str:
        """Bits, sign and number of groups, in the printed model."""
        return f"T={self.T}, signed={self.signed}, groups={self.groups}, clip={self.clip}"
