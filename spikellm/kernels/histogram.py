"""Histograms of |x| over bins that need no range in advance, as calibration keeps them (`calibration/statistics.py`).

A float32's exponent and its leading `MANTISSA_BITS` mantissa bits are the bin: 256 bins an octave.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

MANTISSA_BITS = 8
LOWEST_EXPONENT, OCTAVES = -40, 64  # values below 2^-40 count as zero; 2^24 and above have no bin
BINS = OCTAVES << MANTISSA_BITS
SHIFT = 23 - MANTISSA_BITS
FIRST = (127 + LOWEST_EXPONENT) << MANTISSA_BITS
_CODES = 1 << (8 + MANTISSA_BITS)  # of a non-negative float32, exponent and leading mantissa bits


class Tally(NamedTuple):
    """Histograms of C groups, on S sides one after the other (x >= 0, x < 0; or both in one), to be added to in place.

    counts and weights: activations and their summed importance (None: all the same); bin 0 takes in all below it. peaks: the largest |x|,
    which carries NaN and infinity.
    """

    counts: Int64[Tensor, "SC bins"]
    weights: Float[Tensor, "SC bins"] | None
    peaks: Float[Tensor, " SC"]


def tally_plain(
    x: Float[Tensor, "A C J K"],
    importance: Float[Tensor, "A C J K"] | None,
    neurons: Bool[Tensor, "A C J K"] | None,
    tally: Tally,
) -> Tally:
    """Count float32 activations of C groups with what each counts, but for those that are not a neuron's. The specification."""
    C = x.shape[1]
    rows = len(tally.peaks)
    values = x.movedim(1, 0).reshape(C, -1)
    hidden = None if neurons is None else ~neurons.movedim(1, 0).reshape(C, -1)
    if hidden is not None:
        values = values.masked_fill(hidden, 0)
    # amax and amin carry NaN and infinity
    highest, lowest = values.amax(1), -values.amin(1)
    peaks = torch.cat([highest, lowest]).clamp_min(0) if rows > C else torch.maximum(highest, lowest)
    torch.maximum(tally.peaks, peaks, out=tally.peaks)
    index = values.abs().contiguous().view(torch.int32) >> SHIFT
    index += torch.arange(0, C * _CODES, _CODES, dtype=torch.int32, device=x.device)[:, None]
    if rows > C:
        index += (values < 0) * (C * _CODES)
    if hidden is not None:
        index.masked_fill_(hidden, rows * _CODES)  # behind the last row: counted nowhere
    tally.counts.add_(_histogram(index, None, rows))
    if importance is not None and tally.weights is not None:
        tally.weights.add_(_histogram(index, importance.movedim(1, 0).double().flatten(), rows))
    return tally


def _histogram(index: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    every = torch.bincount(index.flatten(), weights=weights, minlength=rows * _CODES)
    every = every[: rows * _CODES].view(rows, _CODES)
    found = every[:, FIRST : FIRST + BINS].clone()
    found[:, 0] += every[:, :FIRST].sum(1)
    return found
