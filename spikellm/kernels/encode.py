"""The few-spike neuron on plain tensors: the specification of the spike train, its value and its count (`coding/neuron.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Which digits a neuron may send, and the partition of the real line: which population of neurons codes which inputs.

    The line is cut by sign into sides and by |x| into intervals. Every piece has a population of its own, with a table and a wire: x is
    sent by one of them, the others are silent, so that the output is the sum of theirs. |x| is coded and the sign goes on the wire.
    Populations are numbered interval by interval from zero outwards, and in each the ON neurons (x >= 0) before the OFF neurons.

    Raises:
        ValueError: digits that no neuron could send, or no such partition.
    """

    signed: bool = False  # digits may be negative
    max_spikes: int | None = None  # a neuron rests after so many; None: no bound
    sides: int = 1  # 2: a table for each sign of the input
    intervals: int = 1  # K: a table for each interval of |x|

    def __post_init__(self) -> None:
        if self.sides not in (1, 2):
            raise ValueError(f"sides={self.sides}: digits have one side, or one for each sign of the input")
        if self.intervals < 1:
            raise ValueError(f"intervals={self.intervals}: the range of |x| is one interval at least")
        if self.max_spikes is not None and self.max_spikes < 1:
            raise ValueError(f"max_spikes={self.max_spikes}: a neuron must be allowed at least one spike")

    @property
    def populations(self) -> int:
        """P, tables of a group of neurons."""
        return self.sides * self.intervals


BINARY = Digits()  # 0 and 1, the sign of x on the wire


class Rows(NamedTuple):
    """What codes are spelled out as, for any number of groups or candidates at once: nothing is checked (`coding.neuron.PhaseTable`)."""

    theta: Tensor  # thresholds [*n, T]
    h: Tensor  # resets [*n, T]
    d: Tensor  # output weights [*n, T]
    v0: Tensor  # initial potentials [*n]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """The same change of all four, in axes of *n."""
        return Rows(*map(change, self))

    def at(self, index: Any) -> "Rows":
        """The rows at an index of *n."""
        return self.map(lambda row: row[index])


class Coding(NamedTuple):
    """How rows of numbers are coded: by tables of equal parts of each row, or of rows."""

    rows: Rows
    digits: Digits
    cuts: Tensor | None  # [ends, groups]
    together: int  # rows in a row that are of one group; 0: groups are parts of a row


def emit(v: Tensor, theta: Tensor, fired: Tensor, digits: Digits) -> tuple[Tensor, Tensor]:
    """The digits z of one step, in v's dtype, and how many spikes each neuron has fired then (counted where they are bounded).

    In arithmetic, not `torch.where` on integers: the compiler then makes one vectorised pass of it, 25 times faster on a CPU.
    """
    z = (v > theta).to(v.dtype)
    if digits.signed:
        z = z - (v < -theta).to(v.dtype)
    if digits.max_spikes is None:
        return z, fired
    z = z * (fired < digits.max_spikes).to(v.dtype)
    return z, fired + z.abs()


def owners(x: Tensor, magnitude: Tensor, cuts: Tensor | None, digits: Digits) -> Tensor | None:
    """The number of the population that sends each input, in the magnitude's dtype (integers do not vectorise); None: there is one.

    cuts: lower ends of the intervals 1 .. K-1, [K-1, sides C] and axes to broadcast against x.
    """
    side = (x < 0).to(magnitude.dtype) if digits.sides == 2 else None
    if cuts is None:
        return side
    ends = cuts.unflatten(1, (digits.sides, -1))
    interval = torch.zeros_like(magnitude)
    for k in range(digits.intervals - 1):
        end = ends[k, 0] if side is None else torch.where(side > 0, ends[k, 1], ends[k, 0])
        interval = interval + (magnitude > end).to(magnitude.dtype)
    return interval if side is None else 2 * interval + side


def own(row: Tensor, owner: Tensor | None, digits: Digits) -> Tensor:
    """Of a row of all populations [P C, ..] what each input's own has."""
    if owner is None:
        return row
    each = row.unflatten(0, (digits.populations, -1))
    found = each[0]
    for p in range(1, digits.populations):
        found = torch.where(owner == p, each[p], found)
    return found


def fire_plain(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor:
    """The spikes s z_t of every step and in it of every population, [T P, A, C, I]; x [A, C, I], rows of P C. The specification."""
    theta, h, _, v0 = rows
    magnitude = x.abs().to(theta.dtype)
    owner = owners(x, magnitude, None if cuts is None else cuts[..., None], digits)
    v = magnitude + own(v0[:, None], owner, digits)
    sign, fired = x.sign().to(theta.dtype), torch.zeros_like(v)
    spikes = []
    for t in range(theta.shape[1]):
        z, fired = emit(v, own(theta[:, t, None], owner, digits), fired, digits)
        v = v - own(h[:, t, None], owner, digits) * z
        sent = (sign * z).to(torch.int8)
        spikes += [sent] if owner is None else [sent * (owner == p) for p in range(digits.populations)]
    return torch.stack(spikes)


def respond(magnitude: Tensor, rows: Rows, digits: Digits, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What neurons make of |x|, and in how many spikes; rows [.., T] to broadcast against |x| [.., I], those of each input by `owner`."""
    theta, h, d, v0 = rows
    v = magnitude + own(v0[..., None], owner, digits)
    y, fired, spikes = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v)
    for t in range(theta.shape[-1]):
        z, fired = emit(v, own(theta[..., t, None], owner, digits), fired, digits)
        v = v - own(h[..., t, None], owner, digits) * z
        y = y + own(d[..., t, None], owner, digits) * z
        spikes = spikes + z.abs()
    return y, spikes


def encode_plain(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor:
    """decode(fire(x)) without the train; x [A, C, I], rows of P C. The specification."""
    magnitude = x.abs().to(rows.theta.dtype)
    y, _ = respond(magnitude, rows, digits, owners(x, magnitude, None if cuts is None else cuts[..., None], digits))
    # a neuron whose input is exactly 0 has no sign to send, whatever v0 makes it do
    return (y * x.sign().to(y.dtype)).to(torch.promote_types(x.dtype, y.dtype))


def count_plain(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor:
    """abs(fire(x)) of all populations summed over the last axis, without the train: x [C, I, J] -> [T, C, I]."""
    theta, h, _, v0 = rows
    magnitude = x.abs().to(theta.dtype)
    owner = owners(x, magnitude, None if cuts is None else cuts[..., None, None], digits)
    v = magnitude + own(v0[:, None, None], owner, digits)
    awake, fired = x != 0, torch.zeros_like(v)
    counts = []
    for t in range(theta.shape[1]):
        z, fired = emit(v, own(theta[:, t, None, None], owner, digits), fired, digits)
        v = v - own(h[:, t, None, None], owner, digits) * z
        counts.append(((z != 0) & awake).sum(-1))
    return torch.stack(counts)


def code_sums(x: Tensor, weight: Tensor, share: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None) -> Tensor:
    """Sums of weight (y - x)^2, weight (y - x) and share * spikes over the points x > 0 [C, points] of each group, [3, C]."""
    y, spikes = respond(x, rows, digits, owners(x, x, None if cuts is None else cuts[..., None], digits))
    off = y - x
    return torch.stack([(weight * off.square()).sum(-1), (weight * off).sum(-1), (share * spikes).sum(-1)])


def segment_sums(x: Tensor, weight: Tensor, share: Tensor, rows: Rows, digits: Digits) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of weight (y - x)^2, weight (y - x) and share * spikes over each segment [N, M, Q], of one population.

    x, weight, share [N, 1, Q, points] of N groups in Q segments, M codes each: rows [N, M, T], v0 [N, M].
    """
    y, spikes = respond(x, rows.at((slice(None), slice(None), None)), digits)
    off = y - x
    return (weight * off.square()).sum(-1), (weight * off).sum(-1), (share * spikes).sum(-1)
