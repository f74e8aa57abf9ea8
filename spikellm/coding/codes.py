"""Parameters of many codes at once, and the tables that they spell: what searches move and imports read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikellm.coding.neuron import BEYOND, PhaseTable
from spikellm.kernels.encode import Digits, Rows

FIXED = 3  # parameters that do not multiply with the number of grains


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """Parameters of many codes, any leading shape: log tau, v0 in units of tau 2^-(T+1), log2 of rho, B, H, Theta.

    theta_t = rho tau Theta^-(t+1): rho = 1 for digits 0 and 1, as published; signed digits want thresholds below the reset.
    """

    values: Float[Tensor, "*n P"]  # P = FIXED + 3 G
    assignment: Int[Tensor, "*n T"]

    @property
    def tau(self) -> Float[Tensor, "*n"]:
        """Amplitude of each code, in the activation's unit."""
        return self.values[..., 0].exp()

    @property
    def rho(self) -> Float[Tensor, "*n"]:
        """Factor of each code's thresholds."""
        return self.values[..., 2].exp2()

    @property
    def G(self) -> int:
        """Number of grains."""
        return (self.values.shape[-1] - FIXED) // 3

    def bases(self) -> tuple[Tensor, ...]:
        """log2 of B, H and Theta, each `[*n, G]`."""
        return self.values[..., FIXED:].chunk(3, dim=-1)

    def spell(self) -> Rows:
        """The rows of every code, `[*n, T]` and `[*n]`."""
        tau, T = self.tau, self.assignment.shape[-1]
        steps = torch.arange(1, T + 1, device=tau.device)
        # tau * base^-(t+1) of `phase_amplitudes` by one exponential, of three rows at once
        logs = self.values[..., FIXED:].unflatten(-1, (3, -1)).movedim(-2, 0).gather(-1, self.assignment.expand(3, *self.assignment.shape))
        d, h, theta = tau[..., None] * logs.mul_(-steps).exp2_()
        return Rows(self.rho[..., None] * theta, h, d, tau * self.values[..., 1] * 2.0 ** -(T + 1))

    def where(self, condition: Bool[Tensor, "*n"], other: "Codes") -> "Codes":
        """These codes where the condition holds, the others elsewhere."""
        return Codes(
            values=torch.where(condition[..., None], self.values, other.values),
            assignment=torch.where(condition[..., None], self.assignment, other.assignment),
        )

    def widened(self, G: int) -> "Codes":
        """The same codes in the parameter space of G grains: the last base repeated, never used."""
        parts = [torch.cat([part, part[..., -1:].expand(*part.shape[:-1], G - part.shape[-1])], -1) for part in self.bases()]
        return Codes(values=torch.cat([self.values[..., :FIXED], *parts], -1), assignment=self.assignment)

    def at(self, index: Any) -> "Codes":
        """The codes at an index of the leading shape."""
        return Codes(values=self.values[index], assignment=self.assignment[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntervalCodes:
    """A code for each of K intervals of |x|, and where the intervals 1 .. K-1 begin, ascending [units of x]."""

    codes: Codes  # [K, *n]
    cuts: Float[Tensor, " ends *n"]  # [K-1, *n]

    @classmethod
    def single(cls, codes: Codes) -> "IntervalCodes":
        """One interval."""
        return cls(codes=codes.at(None), cuts=codes.tau[None][:0])

    @property
    def K(self) -> int:
        """Intervals."""
        return len(self.codes.values)

    @property
    def used(self) -> Bool[Tensor, " K *n"]:
        """Whether an interval is."""
        return torch.cat([torch.ones_like(self.codes.tau[:1], dtype=torch.bool), self.cuts < BEYOND])

    def table(self, digits: Digits) -> PhaseTable:
        """The table of groups n = C, or sides C, of which the digits are; unused intervals are silent."""
        rows = self.codes.spell()
        silent = ~self.used
        rows = rows.map(lambda row: row.masked_fill(silent if row.ndim == silent.ndim else silent[..., None], 0).flatten(0, 1))
        return PhaseTable(*rows, digits=replace(digits, intervals=self.K), cuts=self.cuts if self.K > 1 else None)

    def padded(self, K: int) -> "IntervalCodes":
        """The same codes with K intervals, the last of them unused."""
        more = K - self.K
        repeated = self.codes.at([*range(self.K), *[self.K - 1] * more])
        beyond = torch.full_like(self.codes.tau[:1], BEYOND).expand(more, *self.cuts.shape[1:])
        return IntervalCodes(codes=repeated, cuts=torch.cat([self.cuts, beyond]))

    def widened(self, G: int) -> "IntervalCodes":
        """The same codes in the parameter space of G grains."""
        return IntervalCodes(codes=self.codes.widened(G), cuts=self.cuts)

    @classmethod
    def stack(cls, every: Sequence["IntervalCodes"]) -> "IntervalCodes":
        """Many codes of as many intervals, side by side in the first axis of n."""
        values = torch.stack([each.codes.values for each in every], 1)
        assignment = torch.stack([each.codes.assignment for each in every], 1)
        return cls(codes=Codes(values=values, assignment=assignment), cuts=torch.stack([each.cuts for each in every], 1))

    @classmethod
    def joined(cls, every: Sequence["IntervalCodes"]) -> "IntervalCodes":
        """The groups of codes [K, N] in a row."""
        values = torch.cat([each.codes.values for each in every], 1)
        assignment = torch.cat([each.codes.assignment for each in every], 1)
        return cls(codes=Codes(values=values, assignment=assignment), cuts=torch.cat([each.cuts for each in every], 1))

    def at(self, index: tuple[Tensor, ...] | slice) -> "IntervalCodes":
        """Those of some groups."""
        inside = index if isinstance(index, tuple) else (index,)
        return IntervalCodes(codes=self.codes.at((slice(None), *inside)), cuts=self.cuts[:, *inside])

    def replaced(self, rows: Int[Tensor, " m"], other: "IntervalCodes") -> "IntervalCodes":
        """These codes [K, N], but for some rows of N the others, which have as many intervals."""
        values, assignment, cuts = (each.clone() for each in (self.codes.values, self.codes.assignment, self.cuts))
        values[:, rows], assignment[:, rows], cuts[:, rows] = other.codes.values, other.codes.assignment, other.cuts
        return IntervalCodes(codes=Codes(values=values, assignment=assignment), cuts=cuts)

    def trimmed(self) -> "IntervalCodes":
        """Without the intervals that no group uses."""
        K = int(self.used.flatten(1).any(1).sum())
        return IntervalCodes(codes=self.codes.at(slice(K)), cuts=self.cuts[: K - 1])


def base2_codes(tau: Float[Tensor, " N"], T: int, G: int = 1) -> Codes:
    """Base 2 in all phases, in the parameter space of G grains."""
    values = torch.ones(len(tau), FIXED + 3 * G, device=tau.device)
    values[:, 0], values[:, 2] = tau.log(), 0.0
    return Codes(values=values, assignment=torch.zeros(len(tau), T, dtype=torch.int64, device=tau.device))
