"""Streaming observers: what calibration keeps of a site's activations.

One histogram of |x| per neuron group over bins that need no range in advance (`kernels/histogram.py`). Every octave has 256 bins, so that
near the maximum a bin is half a step of an 8-bit code, and the fine structure near zero (where most of the mass lies, for probabilities
over twenty octaves) is resolved as well. Memory does not depend on the number of tokens; nothing leaves the device while observing.

An activation may carry an importance, what a squared error of it counts further down: the weights of the histogram. Where they
come from: `model/attention.py` (softmax) and `calibrate.py` (MLP). Where neurons have their amplitude from the token (`snn.amplitude`) what
is observed is x / m, m the token's largest |x|, an error of which counts m^2.

One-sided activations (SiLU) are counted apart by sign: two `sides`.

Windows go to three parts: codes are fitted to FIT; CHOOSE decides between what was found and base 2, and between numbers of grains
(`search/fit.py`); errors and firing rates are reported on REPORT, on which nothing is decided: a code may turn out worse than base 2
there, and an activation beyond all of the other parts' is clipped as it would be in use.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from spikellm.coding.neuron import Slot, token_amplitude
from spikellm.kernels import native
from spikellm.kernels.histogram import BINS, FIRST, LOWEST_EXPONENT, OCTAVES, SHIFT, Tally

FIT, CHOOSE, REPORT = range(3)
PARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteStatistics:
    """Distribution of |x| at one site: histogram of the bins from `first_bin` on, and maxima, per part and group.

    C rows: one a group, or two where there are two sides, first those of x >= 0, then those of x < 0. counts [parts, C, bins] float32;
    weights [parts, C, bins] float32, the summed importance of a bin's activations, None where all count the same; zeros
    [parts, C] int64, activations of exactly zero or below the smallest bin; maximum [parts, C] float32. Parts are FIT, CHOOSE and
    REPORT. row_neurons: of a row whose outputs are added up as they are (the softmax normalised before coding), as a neuron sees it:
    the mean over neurons of how many its row has; None where no such sum is taken.
    """

    counts: Float[Tensor, "P C bins"]
    weights: Float[Tensor, "P C bins"] | None
    zeros: Int[Tensor, "P C"]
    maximum: Float[Tensor, "P C"]
    first_bin: int
    sides: int = 1
    row_neurons: float | None = None

    @property
    def groups(self) -> int:
        """Groups of neurons."""
        return self.counts.shape[1] // self.sides

    @property
    def known_maximum(self) -> Float[Tensor, " C"]:
        """The largest activation of each row that a code may know of: in all parts but the one that reports."""
        return self.maximum[:REPORT].amax(0)

    @property
    def edges(self) -> Float[Tensor, " edges"]:
        """Bounds of the bins, one more than bins [units of x]."""
        last = self.first_bin + self.counts.shape[-1] + 1
        index = torch.arange(self.first_bin, last, dtype=torch.int32, device=self.counts.device)
        return ((index + FIRST) << SHIFT).view(torch.float32)

    @property
    def centers(self) -> Float[Tensor, " bins"]:
        """Middles of the bins [units of x]."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2

    def merged(self) -> Self:
        """The same statistics with all groups, and both signs, in one."""
        return replace(
            self,
            sides=1,
            counts=self.counts.sum(1, keepdim=True),
            weights=None if self.weights is None else self.weights.sum(1, keepdim=True),
            zeros=self.zeros.sum(1, keepdim=True),
            maximum=self.maximum.amax(1, keepdim=True),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same statistics on another device: where they lie, codes are searched."""
        tensors: dict[str, Any] = {
            field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For safetensors: `from_tensors` reads them back."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f"{name}.{key}": torch.as_tensor(value) for key, value in found.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> Self:
        """The statistics of a site among the tensors of a file: the inverse of `tensors`."""
        return cls(
            counts=tensors[f"{name}.counts"],
            weights=tensors.get(f"{name}.weights"),
            zeros=tensors[f"{name}.zeros"],
            maximum=tensors[f"{name}.maximum"],
            first_bin=int(tensors[f"{name}.first_bin"]),
            sides=int(tensors[f"{name}.sides"]),
            row_neurons=tensors[f"{name}.row_neurons"].item() if f"{name}.row_neurons" in tensors else None,
        )


class Observer(Slot):
    """Sits in a neuron's slot, counts what passes and passes it on unchanged.

    Args:
        site: name, for messages.
        groups: C, slices of `axis` that get histograms of their own.
        axis: see `PhaseNeuron`.
        row_stride: of the last axis but one, attention's queries, every so manieth is shown (attention has L^2 probabilities).
        held: hold what passed until `weigh` tells its importance and which of it stand for neurons.
        sides: 2 counts negative activations apart (`kernels.encode.Digits`).
        per_token: count x / m with m the `token_amplitude`; the last axis is the token's.
        summed: outputs are added up along the last axis; rows' lengths are those of the neurons that `weigh` is told.
    """

    def __init__(
        self,
        site: str,
        *,
        groups: int = 1,
        axis: int = -1,
        row_stride: int = 1,
        held: bool = False,
        sides: int = 1,
        per_token: bool = False,
        summed: bool = False,
    ) -> None:
        super().__init__()
        self.site, self.per_token, self.summed = site, per_token, summed
        self.groups, self.axis, self.row_stride, self.held, self.sides = groups, axis, row_stride, held, sides
        self.rows = sides * groups
        self.part = FIT
        self.counts: Tensor | None = None
        self.weights: Tensor | None = None
        self.maximum: Tensor | None = None
        self._passed: Tensor | None = None
        self._lengths = torch.zeros(2, dtype=torch.float64)  # of rows: sum, sum of squares

    def forward(self, x: Tensor) -> Tensor:
        """Count x, or hold it until its importance is known; x comes out as it is."""
        if self.held:
            self._passed = x
        else:
            self._count(x, None, None)
        return x

    def weigh(self, importance: Float[Tensor, "*#x"] | None, neurons: Bool[Tensor, "*#x"] | None = None) -> None:
        """What a squared error of the activations that passed last counts (None: all the same), and which are a neuron's (None: all).

        Both broadcast against them.

        Raises:
            ValueError: nothing has passed since the last call, or the observer does not hold what passes.
        """
        if self._passed is None:
            raise ValueError(f"site {self.site}: nothing is held; call weigh once after each forward of an observer with held=True")
        x, self._passed = self._passed, None
        if self.summed and neurons is not None:
            lengths = neurons.sum(-1).double()
            self._lengths += torch.stack([lengths.sum(), lengths.square().sum()]).cpu()
        self._count(x, *(None if each is None else each.expand(x.shape) for each in (importance, neurons)))

    def _count(self, x: Tensor, importance: Tensor | None, neurons: Tensor | None) -> None:
        if self.per_token:
            m = token_amplitude(x)
            x, power = x / m, m.double().square().expand(x.shape)
            importance = power if importance is None else importance * power
        if self.counts is None or self.maximum is None:
            self.counts = torch.zeros(PARTS, self.rows, BINS, dtype=torch.int64, device=x.device)
            self.maximum = torch.zeros(PARTS, self.rows, device=x.device)
        if importance is not None and self.weights is None:
            self.weights = torch.zeros(PARTS, self.rows, BINS, dtype=torch.float64, device=x.device)
        tally = Tally(self.counts[self.part], None if self.weights is None else self.weights[self.part], self.maximum[self.part])
        parts = [None if each is None else self._grouped(each) for each in (importance, neurons)]
        native.tally(self._grouped(x).float(), *parts, tally)

    def _grouped(self, x: Tensor) -> Shaped[Tensor, "A C J K"]:
        """C groups of the activations: outer, groups, rows, numbers of a row."""
        x, axis = x.detach(), self.axis % x.ndim
        if self.groups == 1:
            return x.reshape(1, 1, -1, x.shape[-1])
        outer = x.shape[:axis].numel()
        x = x.unflatten(axis, (self.groups, -1))
        return x.reshape(outer, self.groups, -1, x.shape[-1])

    def result(self) -> SiteStatistics:
        """What was seen so far.

        Raises:
            ValueError: nothing, or NaN, infinite or too large values passed.
        """
        if self.counts is None or self.maximum is None:
            raise ValueError(f"site {self.site}: no activation passed while calibrating")
        if not torch.isfinite(self.maximum).all():
            raise ValueError(f"site {self.site}: NaN or infinite activations; a model.dtype of wider range may hold them")
        if self.maximum.max() >= 2.0 ** (LOWEST_EXPONENT + OCTAVES):
            raise ValueError(f"site {self.site}: activations reach {self.maximum.max():.3g}, beyond what the histogram holds")
        counts = self.counts.cpu()
        used = counts[..., 1:].sum((0, 1)).nonzero().flatten() + 1
        first, last = (int(used[0]), int(used[-1])) if len(used) else (1, 1)
        return SiteStatistics(
            counts=counts[..., first : last + 1].float(),
            weights=None if self.weights is None else self.weights.cpu()[..., first : last + 1].float(),
            zeros=counts[..., 0].clone(),
            maximum=self.maximum.cpu().clone(),
            first_bin=first,
            sides=self.sides,
            # what an error of the mean costs all rows, sum S^2 bias^2, in units of what errors of their own cost, sum S mse
            row_neurons=(self._lengths[1] / self._lengths[0]).item() if self._lengths[0] else None,
        )
