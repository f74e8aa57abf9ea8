"""Counts spikes and synaptic operations at one site, from a neuron's input or from its spike train.

Folded execution makes no spikes, but the code of |x| tells which there would be (`neuron.count_spikes`): nothing of the size of a
train is kept. Both ways give the same numbers. Spikes of a neuron's populations count together, step by step: each input is one's.
"""

import math

import torch
from jaxtyping import Int, Int64
from torch import Tensor, nn

from spikellm.coding.neuron import PhaseNeuron, Slot, count_spikes


def train_counts(train: Int[Tensor, "T C I J"]) -> Int64[Tensor, "T C I"]:
    """Spikes of either sign at every step, summed over J."""
    return (train != 0).sum(-1)


def synaptic_operations(counts: Int64[Tensor, "T C I"], fan_out: int | Int64[Tensor, " I"]) -> Int64[Tensor, "T C"]:
    """Spikes times the fan-out of their place."""
    return (counts * fan_out).sum(-1)


class SpikeCounter(Slot):
    """Sits in a neuron's slot, counts the spikes of what passes and lets the neuron answer.

    Args:
        neuron: of the slot.
        axis: of x that columns (and the neuron's groups) divide.
        columns: C, the slices that are counted apart: attention heads, or 1.
        fan_out: synapses of a spike; a tensor [I] has one for every position.
    """

    def __init__(self, neuron: PhaseNeuron, *, axis: int, columns: int, fan_out: int) -> None:
        super().__init__()
        self.neuron, self.axis, self.columns = neuron, axis, columns
        self.fan_out: int | Tensor = fan_out
        self.counts = True  # False: what passes is passed on alone
        self.whole = True  # False: `add_neurons` is told from outside (the softmax, where masked pairs are no neurons)
        self.spikes = torch.zeros(neuron.table.T, columns, dtype=torch.int64)
        self.sops = torch.zeros_like(self.spikes)
        self.neurons = torch.zeros(columns, dtype=torch.int64)
        self.synapses = torch.zeros(columns, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """The neuron's values of x, after its spikes are counted."""
        if self.counts:
            self.add_values(x)
        return self.neuron(x)

    def add_values(self, x: Tensor) -> None:
        """Count what the neuron would fire for x, in folded execution."""
        table = self.neuron.table
        slices = math.lcm(table.groups, self.columns)
        spread = table.map(lambda rows: rows.repeat_interleave(slices // table.groups, 0))
        self._add(count_spikes(self._arranged(self.neuron.coded(x), slices), spread, compiled=self.neuron.compiled), x.numel())

    def look(self, _module: nn.Module, _inputs: tuple[Tensor, ...], train: Tensor) -> None:
        """`add_train` as a forward hook of a `SteppedNeuron`."""
        if self.counts:
            self.add_train(train)

    def add_train(self, train: Int[Tensor, " S *x"]) -> None:
        """Count a spike train on all its wires, in time-stepped execution."""
        counts = torch.stack([train_counts(self._arranged(wire, self.columns)[None])[0] for wire in train])
        self._add(counts.unflatten(0, (len(self.spikes), -1)).sum(1), train[0].numel())

    def add_neurons(self, number: int, synapses: int) -> None:
        """So many neurons a column, with so many synapses together, had the chance to fire."""
        self.neurons += number
        self.synapses += synapses

    def _add(self, counts: Int64[Tensor, "T slices I"], elements: int) -> None:
        counts = counts.unflatten(1, (self.columns, -1)).sum(2)
        self.spikes += counts.sum(-1).cpu()
        self.sops += synaptic_operations(counts, self.fan_out).cpu()
        if self.whole:
            number = elements // self.columns
            positions = counts.shape[-1]
            everywhere = self.fan_out if isinstance(self.fan_out, int) else int(self.fan_out.sum())
            self.add_neurons(number, number // positions * everywhere)

    def _arranged(self, x: Tensor, slices: int) -> Tensor:
        """x as [slices, I, J]: positions of their own fan-out in the middle (I = 1 without)."""
        if slices > 1:
            axis = self.axis % x.ndim
            x = x.unflatten(axis, (slices, -1)).movedim(axis, 0)
        positions = 1 if isinstance(self.fan_out, int) else len(self.fan_out)
        return x.reshape(slices, positions, -1)
