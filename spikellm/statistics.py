"""Streaming observers: what calibration keeps of a site's activations.

One histogram of |x| per neuron group over bins that need no range in advance: a float32's exponent and its leading
`MANTISSA_BITS` mantissa bits are the bin. Every octave has 256 bins, so that near the maximum a bin is half a step of an
8-bit code, and the fine structure near zero (where most of the mass lies, for probabilities over twenty octaves) is
resolved as well. Memory does not depend on the number of tokens; nothing leaves the device while observing.

Windows go alternately to a fitting and a held-out part.
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MANTISSA_BITS = 8
LOWEST_EXPONENT, OCTAVES = -40, 64  # values below 2^-40 count as zero; 2^24 and above are refused
BINS = OCTAVES << MANTISSA_BITS
FIT, HELD_OUT = 0, 1
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (127 + LOWEST_EXPONENT) << MANTISSA_BITS


def bin_index(magnitude: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Bin of a non-negative float32; bin 0 also holds zero and everything below the first bin."""
    return ((magnitude.view(torch.int32) >> _SHIFT) - _FIRST).clamp_(0, BINS - 1)


def bin_centers() -> Float[Tensor, " bins"]:
    """Middle of every bin (float32); 0 for bin 0."""
    index = torch.arange(BINS, dtype=torch.int32)
    low = ((index + _FIRST) << _SHIFT).view(torch.float32)
    high = ((index + 1 + _FIRST) << _SHIFT).view(torch.float32)
    centers = (low + high) / 2
    centers[0] = 0.0
    return centers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteStatistics:
    """Distribution of |x| at one site: histogram counts of bins `first_bin` .. and maxima, per part and group.

    counts [parts, C, bins] int64, maximum [parts, C] float32; parts are FIT and HELD_OUT.
    """

    counts: Int[Tensor, "P C bins"]
    maximum: Float[Tensor, "P C"]
    first_bin: int

    @property
    def centers(self) -> Float[Tensor, " bins"]:
        return bin_centers()[self.first_bin : self.first_bin + self.counts.shape[-1]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For safetensors: `from_tensors` reads them back."""
        return {
            f"{name}.counts": self.counts,
            f"{name}.maximum": self.maximum,
            f"{name}.first_bin": torch.tensor(self.first_bin),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> Self:
        return cls(
            counts=tensors[f"{name}.counts"],
            maximum=tensors[f"{name}.maximum"],
            first_bin=int(tensors[f"{name}.first_bin"]),
        )


class Observer(nn.Module):
    """Sits in a neuron's slot, counts what passes and passes it on unchanged.

    Args:
        site: name, for messages.
        groups: C, slices of `axis` that get histograms of their own.
        axis: see `PhaseNeuron`.
        row_stride: look at every n-th index of the last axis but one (attention has L^2 probabilities).
        causal: exact zeros are masked places, not activations.
    """

    def __init__(self, site: str, *, groups: int = 1, axis: int = -1, row_stride: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.site = site
        self.groups, self.axis, self.row_stride, self.causal = groups, axis, row_stride, causal
        self.part = FIT
        self.counts: Tensor | None = None
        self.maximum: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        magnitude = x[..., :: self.row_stride, :] if self.row_stride > 1 else x
        magnitude = magnitude.detach().abs().float()
        axis = self.axis % x.ndim
        if self.groups > 1:
            magnitude = magnitude.unflatten(axis, (self.groups, -1)).movedim(axis, 0)
        magnitude = magnitude.reshape(self.groups, -1)
        if self.counts is None or self.maximum is None:
            self.counts = torch.zeros(2, self.groups, BINS, dtype=torch.int64, device=x.device)
            self.maximum = torch.zeros(2, self.groups, device=x.device)
        # amax carries NaN and infinity through to `result`
        self.maximum[self.part] = torch.maximum(self.maximum[self.part], magnitude.amax(1))
        index = bin_index(magnitude.contiguous())
        if self.groups > 1:
            index += torch.arange(0, self.groups * BINS, BINS, dtype=torch.int32, device=x.device)[:, None]
        self.counts[self.part] += torch.bincount(index.flatten(), minlength=self.groups * BINS).view(self.groups, BINS)
        return x

    def result(self) -> SiteStatistics:
        """What was seen so far.

        Raises:
            ValueError: nothing, or NaN, infinite or too large values passed.
        """
        if self.counts is None or self.maximum is None:
            raise ValueError(f"site {self.site}: no activation passed while calibrating")
        if not torch.isfinite(self.maximum).all():
            raise ValueError(f"site {self.site}: NaN or infinite activations; calibrate in another dtype (model.dtype=float32)")
        if self.maximum.max() >= 2.0 ** (LOWEST_EXPONENT + OCTAVES):
            raise ValueError(f"site {self.site}: activations reach {self.maximum.max():.3g}, beyond what the histogram holds")
        counts = self.counts.cpu().clone()
        if self.causal:
            counts[..., 0] = 0
        used = counts.sum((0, 1)).nonzero().flatten()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        return SiteStatistics(counts=counts[..., first : last + 1].contiguous(), maximum=self.maximum.cpu().clone(), first_bin=first)
