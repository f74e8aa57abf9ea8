"""Few-spike (FS) neuron with a phase code: a real number in, at most T signed spikes out.

For an input x (the current summed over time), s = sign(x), v = |x| + v0, and for t = 0 .. T-1:

    z_t = 1 if v > theta_t else 0        strictly greater
    v   = v - h_t z_t                    soft reset
    y  += d_t z_t                        output s y; on the wire s z_t in {-1, 0, +1}

Source: Stoeckl & Maass, "Optimized spiking neurons can classify images with high accuracy through temporal coding with
two spikes", Nature Machine Intelligence 2021, eq. 1-3; the sign and v0 as in Zheng et al., ICLR 2026.

Ours:

* The T steps are fused into one pass over memory by `torch.compile` ("encode"), 20 times faster on a CPU than T passes; the
  plain form is the fallback and the specification.
* Groups: every group of neurons (an attention head, a block of channels) may have its own table.
* Two sides: positive and negative inputs may have tables of their own, an ON and an OFF neuron as in the retina. SiLU's negative
  lobe ends at -0.28 and its positive one does not end: one amplitude for both wastes half of the negative spikes.
* A bound on the number of spikes: a neuron rests after its k-th spike (k = 1: time to first spike).
* Signed digits: z_t = -1 where v < -theta_t, so that the residual may go below zero and come back. The wire carries the same
  three values; 3^T digit strings instead of 2^T, or the same numbers with fewer spikes, as the non-adjacent form of integers.
"""

from collections.abc import Iterator
from dataclasses import InitVar, dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from spikellm.kernels.compiled import fused
from spikellm.kernels.encode import count_plain, encode_plain, fire_plain

ROWS = ("theta", "h", "d", "v0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhaseTable:
    """One table per neuron group: thresholds, resets, output weights [R, T] and initial potentials [R], float32.

    R = C groups (1 for a site with one table), or 2 C where `two_sided`: first the rows of non-negative inputs, then those of
    negative ones. Units: those of the activation. max_spikes: a neuron rests after so many; None: no bound. signed: digits may
    be negative (of one-sided tables only: a digit's sign then no longer tells the side). checked: the rows were looked at before
    (a view of a neuron's buffers): their values are not read again, for which a GPU would have to be waited for.

    Raises:
        ValueError: shapes that do not fit, rows that are empty, integer, NaN or infinite, flags that exclude each other.
    """

    theta: Float[Tensor, "R T"]
    h: Float[Tensor, "R T"]
    d: Float[Tensor, "R T"]
    v0: Float[Tensor, " R"]
    max_spikes: int | None = None
    two_sided: bool = False
    signed: bool = False
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if not (self.theta.shape == self.h.shape == self.d.shape and self.theta.shape[:1] == self.v0.shape):
            shapes = {name: tuple(getattr(self, name).shape) for name in ROWS}
            raise ValueError(f"a phase table needs theta, h, d [R, T] and v0 [R], got {shapes}")
        if self.two_sided and len(self.v0) % 2:
            raise ValueError(f"a two-sided phase table needs an even number of rows, got {len(self.v0)}")
        if self.two_sided and self.signed:
            raise ValueError("a phase table is two-sided or has signed digits, not both")
        if self.max_spikes is not None and self.max_spikes < 1:
            raise ValueError(f"max_spikes={self.max_spikes}: a neuron must be allowed at least one spike")
        for name in ROWS:
            rows = getattr(self, name)
            if not rows.numel() or not rows.is_floating_point():
                raise ValueError(f"a phase table's {name} is {rows.dtype} of shape {tuple(rows.shape)}: one row of floats at least")
            if not (checked or rows.is_meta or rows.isfinite().all()):
                raise ValueError(f"a phase table's {name} has {(~rows.isfinite()).sum()} values of {rows.numel()} that are NaN or infinite")

    @property
    def T(self) -> int:
        return self.theta.shape[1]

    @property
    def groups(self) -> int:
        return self.theta.shape[0] // (2 if self.two_sided else 1)

    def to(self, *args, **kwargs) -> Self:
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in ROWS})

    def halves(self) -> tuple["PhaseTable", "PhaseTable"]:
        """The tables of non-negative and of negative inputs, one-sided; the same twice where this one is."""
        if not self.two_sided:
            return self, self
        parts = {name: getattr(self, name).chunk(2) for name in ROWS}
        on, off = (replace(self, two_sided=False, checked=True, **{name: part[side] for name, part in parts.items()}) for side in (0, 1))
        return on, off

    def sides(self, x: Tensor) -> Iterator[tuple[Tensor, "PhaseTable"]]:
        """What a one-sided neuron of each side reads, and its table: all of x, or its positive and its negative part."""
        if not self.two_sided:
            yield x, self
            return
        on, off = self.halves()
        yield x.clamp_min(0), on
        yield x.clamp_max(0), off


def fire(x: Float[Tensor, "A C I"], table: PhaseTable, *, compiled: bool = False) -> Int8[Tensor, "T A C I"]:
    """The spike train s z_t of every neuron, time first; arguments as in `encode`."""
    kernel = fused(fire_plain, x.device.type) if compiled else fire_plain
    trains = [torch.stack(kernel(part, side.theta, side.h, side.v0, side.max_spikes, side.signed)) for part, side in table.sides(x)]
    return sum(trains[1:], start=trains[0])


def decode(spikes: Int8[Tensor, "T A C I"], table: PhaseTable) -> Float[Tensor, "A C I"]:
    """The value of a spike train: sum over t of d_t s z_t."""
    on, off = (side.d.T[:, None, :, None] for side in table.halves())
    return (spikes * torch.where(spikes < 0, off, on)).sum(0)


def encode(x: Float[Tensor, "A C I"], table: PhaseTable, *, compiled: bool = True) -> Float[Tensor, "A C I"]:
    """The neuron's output sum_t d_t s z_t for every input, in the wider dtype of x and the table: float32 tells all levels apart.

    Args:
        x: inputs, the group axis in the middle: A outer, C groups (1 or as many as the table has), I inner.
        table: on x's device.
        compiled: one fused pass (first call per T compiles for some seconds) or T plain ones.
    """
    kernel = fused(encode_plain, x.device.type) if compiled else encode_plain
    sides = [kernel(part, side.theta, side.h, side.d, side.v0, side.max_spikes, side.signed) for part, side in table.sides(x)]
    return sum(sides[1:], start=sides[0])


def count_spikes(x: Float[Tensor, "C I J"], table: PhaseTable, *, compiled: bool = True) -> Int64[Tensor, "T C I"]:
    """Spikes that the inputs fire at every step, summed over J: what a train would be counted for, in one pass and no memory."""
    kernel = fused(count_plain, x.device.type) if compiled else count_plain
    sides = [kernel(part, side.theta, side.h, side.v0, side.max_spikes, side.signed) for part, side in table.sides(x)]
    return sum(sides[1:], start=sides[0])


class PhaseNeuron(nn.Module):
    """Neurons of one site. The table is in buffers of static shape, so that state dicts round-trip.

    Args:
        table: one table, or one per group.
        axis: the axis of x that the groups divide (C groups of equal, consecutive slices); unused for one group.
        compiled: see `encode`.
    """

    theta: Tensor
    h: Tensor
    d: Tensor
    v0: Tensor

    def __init__(self, table: PhaseTable, *, axis: int = -1, compiled: bool = True) -> None:
        super().__init__()
        for name in ROWS:
            self.register_buffer(name, getattr(table, name).detach().clone())
        self.max_spikes, self.two_sided, self.signed = table.max_spikes, table.two_sided, table.signed
        self.axis = axis
        self.compiled = compiled

    @property
    def table(self) -> PhaseTable:
        rows = {name: getattr(self, name) for name in ROWS}
        return PhaseTable(**rows, max_spikes=self.max_spikes, two_sided=self.two_sided, signed=self.signed, checked=True)

    def grouped(self, x: Tensor) -> Float[Tensor, "A C I"]:
        """x as [A, C, I] with one index of the middle axis per group."""
        groups = self.table.groups
        if groups == 1:
            return x.reshape(1, 1, -1)
        axis = self.axis % x.ndim
        outer, inner = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
        return x.reshape(outer, groups, x.shape[axis] // groups * inner)

    def forward(self, x: Tensor) -> Tensor:
        return encode(self.grouped(x), self.table, compiled=self.compiled).reshape(x.shape)

    def extra_repr(self) -> str:
        bound = "" if self.max_spikes is None else f", max_spikes={self.max_spikes}"
        return f"T={self.theta.shape[1]}, groups={self.theta.shape[0]}{bound}"
