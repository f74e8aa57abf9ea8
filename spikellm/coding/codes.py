"""Parameters of many codes at once, and the tables that they spell: what searches move and imports read."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikellm.coding.grains import phase_amplitudes
from spikellm.kernels.encode import Rows

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
        v0 = self.tau * self.values[..., 1] * 2.0 ** -(self.assignment.shape[-1] + 1)
        d, h, theta = (phase_amplitudes(self.tau, part.exp2(), self.assignment) for part in self.bases())
        return Rows(self.rho[..., None] * theta, h, d, v0)

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

    def at(self, index: tuple[Tensor, ...] | slice) -> "Codes":
        """The codes at an index of the leading shape."""
        return Codes(values=self.values[index], assignment=self.assignment[index])


def base2_codes(tau: Float[Tensor, " N"], T: int, G: int = 1) -> Codes:
    """Base 2 in all phases, in the parameter space of G grains."""
    values = torch.ones(len(tau), FIXED + 3 * G, device=tau.device)
    values[:, 0], values[:, 2] = tau.log(), 0.0
    return Codes(values=values, assignment=torch.zeros(len(tau), T, dtype=torch.int64, device=tau.device))
