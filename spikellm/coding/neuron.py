"""Few-spike (FS) neuron with a phase code: a real number in, at most T signed spikes out.

For an input x (the current summed over time), s = sign(x), v = |x| + v0, and for t = 0 .. T-1:

    z_t = 1 if v > theta_t else 0        strictly greater
    v   = v - h_t z_t                    soft reset
    y  += d_t z_t                        output s y; on the wire s z_t in {-1, 0, +1}

Source: Stoeckl & Maass, "Optimized spiking neurons can classify images with high accuracy through temporal coding with
two spikes", Nature Machine Intelligence 2021, eq. 1-3; the sign and v0 as in Zheng et al., ICLR 2026.

Ours:

* The T steps are fused into one pass over memory ("encode"), in C++ on a CPU, in Triton on a GPU; the plain form, many times
  slower, is the fallback and the specification.
* Groups: every group of neurons (an attention head, a block of channels) may have its own table.
* Two sides: positive and negative inputs may have tables of their own, an ON and an OFF neuron as in the retina. SiLU's negative
  lobe ends at -0.28 and its positive one does not end: one amplitude for both wastes half of the negative spikes.
* A bound on the number of spikes: a neuron rests after its k-th spike (k = 1: time to first spike).
* Intervals: the range of |x| may be cut, and each piece c_k < |x| <= c_k+1 have a table of its own: fine steps where most values are,
  coarse ones where few are. Whoever introduces grains as intervals of the range (Zheng et al.) means these.
* Signed digits: z_t = -1 where v < -theta_t, so that the residual may go below zero and come back. The wire carries the same
  three values; 3^T digit strings instead of 2^T, or the same numbers with fewer spikes, as the non-adjacent form of integers.
* An amplitude of the token: with m its largest |x|, neurons fire for x / m and send m y. That is a table whose rows and cuts are all m
  times as large, for this token alone.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor, nn

from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import BINARY, Coding, Digits, Rows, count_plain, encode_plain, fire_plain

BEYOND = torch.finfo(torch.float32).max  # where an interval begins that is not used


@dataclass(frozen=True, slots=True, eq=False)
class PhaseTable:
    """One table per neuron group and population: thresholds, resets, output weights [R, T] and initial potentials [R], float32.

    R = P C, of C groups (1 for a site with one table) and P populations of the digits, one population's rows after the other's. cuts
    [K-1, sides C]: where the intervals 1 .. K-1 begin, ascending; an interval that begins beyond all inputs is not used. Units: those of
    the activation. checked: the rows were looked at before (a view of a neuron's buffers, made at every call): they are not looked at
    again, for whose values a GPU would have to be waited for.

    Raises:
        ValueError: shapes that do not fit, rows that are empty, integer, NaN or infinite, cuts out of order.
    """

    theta: Float[Tensor, "R T"]
    h: Float[Tensor, "R T"]
    d: Float[Tensor, "R T"]
    v0: Float[Tensor, " R"]
    _: KW_ONLY
    digits: Digits = BINARY
    cuts: Float[Tensor, "ends S"] | None = None
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if checked:
            return
        if not (self.theta.shape == self.h.shape == self.d.shape and self.theta.shape[:1] == self.v0.shape):
            shapes = {name: tuple(rows.shape) for name, rows in self.rows._asdict().items()}
            raise ValueError(f"a phase table needs theta, h, d [R, T] and v0 [R], got {shapes}")
        if len(self.v0) % self.digits.populations:
            raise ValueError(f"a phase table of {self.digits.populations} populations cannot have {len(self.v0)} rows")
        wanted = (self.digits.intervals - 1, len(self.v0) // self.digits.intervals)
        found = (0, wanted[1]) if self.cuts is None else tuple(self.cuts.shape)
        if found != wanted or (self.cuts is not None and not wanted[0]):
            raise ValueError(f"a phase table of {self.digits.intervals} intervals needs cuts {list(wanted)}, got {list(found)}")
        for name, rows in (self.rows._asdict() | ({} if self.cuts is None else {"cuts": self.cuts})).items():
            if not rows.numel() or not rows.is_floating_point():
                raise ValueError(f"a phase table's {name} is {rows.dtype} of shape {tuple(rows.shape)}: one row of floats at least")
            if not (rows.is_meta or rows.isfinite().all()):
                raise ValueError(f"a phase table's {name} has {(~rows.isfinite()).sum()} values of {rows.numel()} that are NaN or infinite")
        if self.cuts is None or self.cuts.is_meta:
            return
        if (self.cuts < 0).any() or (self.cuts.diff(dim=0) < 0).any():
            raise ValueError(f"a phase table's cuts are negative or not ascending: {self.cuts.tolist()}")

    @property
    def rows(self) -> Rows:
        """The table as plain tensors, for the kernels."""
        return Rows(self.theta, self.h, self.d, self.v0)

    @property
    def T(self) -> int:
        """Time steps."""
        return self.theta.shape[1]

    @property
    def groups(self) -> int:
        """Neuron groups: the rows, or pairs of rows for two-sided digits."""
        return len(self.v0) // self.digits.populations

    @property
    def populations(self) -> list[Rows]:
        """The rows of each population."""
        parts = [rows.chunk(self.digits.populations) for rows in self.rows]
        return [Rows(*part) for part in zip(*parts, strict=True)]

    @property
    def wires(self) -> Float[Tensor, "C S"]:
        """The output weights of a spike train: of its S = T P wires step by step and in each step population by population."""
        return torch.stack([rows.d for rows in self.populations], -1).flatten(1)

    @property
    def intervals(self) -> Int64[Tensor, "sides C"]:
        """How many intervals are in use: the first, and those that do not begin at the largest float32, beyond all inputs."""
        sides = self.digits.sides
        found = torch.ones(sides, self.groups, dtype=torch.int64, device=self.v0.device)
        if self.cuts is None:
            return found
        return found + (self.cuts < BEYOND).sum(0).view(sides, -1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same change of all rows, and of the cuts as [sides C, K-1]; the same digits."""
        cuts = None if self.cuts is None else change(self.cuts.mT).mT
        return type(self)(*self.rows.map(change), digits=self.digits, cuts=cuts)

    def to(self, *args, **kwargs) -> Self:
        """The table on another device or in another dtype: arguments of `torch.Tensor.to`."""
        return self.map(lambda rows: rows.to(*args, **kwargs))

    def group(self, index: int) -> Self:
        """The table of one group."""
        return self.map(lambda rows: rows[index :: self.groups])


def fire(x: Float[Tensor, "A C I"], table: PhaseTable, *, compiled: bool = False) -> Int8[Tensor, "S A C I"]:
    """The spike train s z_t of every neuron, on its S = T P wires (`PhaseTable.wires`); arguments as in `encode`."""
    kernel = chosen(fire_plain, x, compiled=compiled)
    return kernel(x, table.rows, table.digits, table.cuts)


def decode(spikes: Int8[Tensor, "S A C I"], table: PhaseTable) -> Float[Tensor, "A C I"]:
    """The value of a spike train: sum over wires of d s z."""
    return (spikes * table.wires.T[:, None, :, None]).sum(0)


def encode(x: Float[Tensor, "A C I"], table: PhaseTable, *, compiled: bool = True) -> Float[Tensor, "A C I"]:
    """The neuron's output sum_t d_t s z_t for every input, in the wider dtype of x and the table: float32 tells all levels apart.

    Args:
        x: inputs, the group axis in the middle: A outer, C groups (1 or as many as the table has), I inner.
        table: on x's device.
        compiled: one fused pass or T plain ones.
    """
    kernel = chosen(encode_plain, x, compiled=compiled)
    return kernel(x, table.rows, table.digits, table.cuts)


def count_spikes(x: Float[Tensor, "C I J"], table: PhaseTable, *, compiled: bool = True) -> Int64[Tensor, "T C I"]:
    """Spikes that the inputs fire at every step, summed over J: what a train would be counted for, in one pass and no memory."""
    kernel = chosen(count_plain, x, compiled=compiled)
    return kernel(x, table.rows, table.digits, table.cuts)


def apply_wide(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, by which casts and moves go, for buffers that a cast makes no narrower than float32.

    A code's levels, a prefix, the frequencies of RoPE are no weights: `model.half()` is the network with rounded weights.
    """
    before = dict(module.named_buffers(recurse=False))
    nn.Module._apply(module, change, recurse)
    for name, buffer in before.items():
        cast = module.get_buffer(name)
        if cast.is_floating_point() and cast.itemsize < torch.float32.itemsize <= buffer.itemsize:
            setattr(module, name, buffer.to(cast.device, torch.float32))
    return module


class NoGradient(torch.autograd.Function):
    """What a neuron sends, where somebody may ask for its gradient: a spike has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """The values y of a neuron's input x."""
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Refuse: zero, which the derivative is almost everywhere, teaches nothing.

        Raises:
            ValueError: always.
        """
        raise ValueError("spiking neurons have no gradient: tune.epochs=1 tunes blocks with surrogate ones; torch.no_grad() for all else")


class Slot(nn.Module):
    """A neuron's place in the module around it, empty: what comes passes, as in the ANN.

    Whatever else sits there is one too and may do more: an observer, neurons, a counter around them. There are no parameters, so that
    state dicts are those of the pretrained model.
    """

    held = False  # whether what has passed waits for `weigh`: only then is an importance worth computing
    row_stride = 1  # of so many queries one is looked at, where `held`

    _apply = apply_wide

    @property
    def transparent(self) -> bool:
        """Whether nothing sits here."""
        return type(self) is Slot

    def forward(self, x: Tensor) -> Tensor:
        """What comes in, unchanged."""
        return x

    def coding(self, x: Tensor) -> Coding | None:
        """What a kernel needs that makes rows of x, its last axis, and codes them in the same pass; None: x comes here."""
        return None

    def weigh(self, importance: Float[Tensor, "..."] | None, neurons: Bool[Tensor, "..."] | None = None) -> None:
        """Told after a forward: what a squared error of each activation counts, and which are a neuron's (None: all the same, all)."""


def token_amplitude(x: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch 1"]:
    """m, the largest |x| of each token; 1 where all are 0."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest == 0, 1, largest)  # NaN stays


def grouped(x: Tensor, groups: int, axis: int) -> Float[Tensor, "A C I"]:
    """x as [A, C, I]: C groups of equal, consecutive slices of an axis, which is unused for one group."""
    if groups == 1:
        return x.reshape(1, 1, -1)
    axis = axis % x.ndim
    outer, inner = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    return x.reshape(outer, groups, x.shape[axis] // groups * inner)


class PhaseNeuron(Slot):
    """Neurons of one site. The table is in buffers of static shape, so that state dicts round-trip.

    Args:
        table: one table, or one per group.
        axis: the axis of x that the groups divide (C groups of equal, consecutive slices); unused for one group.
        per_token: the table is of x / m, m the `token_amplitude` of all groups together, with which one factor serves the sum over inputs.
        compiled: see `encode`.
    """

    theta: Tensor
    h: Tensor
    d: Tensor
    v0: Tensor
    cuts: Tensor | None

    def __init__(self, table: PhaseTable, *, axis: int = -1, per_token: bool = False, compiled: bool = True) -> None:
        super().__init__()
        for name, rows in table.rows._asdict().items():
            self.register_buffer(name, rows.detach().clone())
        self.register_buffer("cuts", None if table.cuts is None else table.cuts.detach().clone())
        self.digits = table.digits
        self.axis = axis
        self.per_token = per_token
        self.compiled = compiled

    @property
    def table(self) -> PhaseTable:
        """The buffers as a table."""
        return PhaseTable(self.theta, self.h, self.d, self.v0, digits=self.digits, cuts=self.cuts, checked=True)

    def grouped(self, x: Tensor) -> Float[Tensor, "A C I"]:
        """x as [A, C, I] with one index of the middle axis per group."""
        return grouped(x, self.table.groups, self.axis)

    def amplitude(self, x: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch 1"] | None:
        """m of every token; None: one table serves all tokens as it is."""
        return token_amplitude(x) if self.per_token else None

    def coded(self, x: Tensor) -> Tensor:
        """What the table is of: x, or x / m."""
        m = self.amplitude(x)
        return x if m is None else x / m

    def forward(self, x: Tensor) -> Tensor:
        """Decoded values of the spikes that x [..] causes, same shape."""
        if torch.is_grad_enabled() and x.requires_grad:
            return NoGradient.apply(x, self.values(x.detach()))
        return self.values(x)

    def values(self, x: Tensor) -> Tensor:
        """The same, of which nobody asks for a gradient."""
        m, table = self.amplitude(x), self.table
        y = encode(grouped(x if m is None else x / m, table.groups, self.axis), table, compiled=self.compiled).reshape(x.shape)
        return y if m is None else m * y

    def coding(self, x: Tensor) -> Coding | None:
        """The table, where nobody looks at what comes and goes, and no gradient is asked for."""
        watched = type(self) is not PhaseNeuron or self._forward_hooks or self._forward_pre_hooks
        if watched or self.per_token or not (self.compiled and x.is_cpu) or (torch.is_grad_enabled() and x.requires_grad):
            return None
        table, axis, last = self.table, self.axis % x.ndim, x.ndim - 1
        apart = table.groups > 1 and axis < last
        together = x.shape[axis] // table.groups * x.shape[axis + 1 : last].numel() if apart else 0
        return Coding(table.rows, self.digits, self.cuts, together)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the neurons."""
        return f"T={self.table.T}, groups={self.table.groups}, {self.digits}" + (", amplitude of the token" if self.per_token else "")
