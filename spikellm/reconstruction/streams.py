"""A spiking network and the ANN that it stands for, taken through their decoder layers side by side; where results of finished blocks go.

Windows run on two streams: behind the blocks with neurons as they are now, and behind the same blocks without neurons. What a block is
taught or fitted to is the ANN's output on the ANN's stream, so that it makes up for what the blocks before it did. Windows are of the
fitting or of the choosing part of the calibration text (`calibrate.PERIOD`); those of the reporting part are left out.

Memory: hidden states of all windows, three at a time (`model/states.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.calibration.calibrate import enough_pieces, part_windows
from spikellm.calibration.statistics import CHOOSE, FIT
from spikellm.coding.neuron import Slot
from spikellm.model.blocks import Block, enter, output_error
from spikellm.model.conversion import get_neuron, set_neuron
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import LINEARS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoStreams:
    """A decoder layer and the hidden states of its windows."""

    layer: int
    block: Block
    states: Sequence[Float[Tensor, "1 L D"]]  # that come in on the spiking stream
    ann: Sequence[Float[Tensor, "1 L D"]]  # on the ANN's
    wanted: Sequence[Float[Tensor, "1 L D"]]  # the ANN's behind the layer
    fit: list[int]  # windows of the fitting part
    choose: list[int]  # of the choosing part


def two_streams(model: PreTrainedModel, windows: Int[Tensor, "W L"]) -> Iterator[TwoStreams]:
    """Every decoder layer of a spiking model in order; the windows go on through a layer as whoever asks for the next has left it.

    Args:
        windows: too few for all parts are cut into pieces (`calibrate.enough_pieces`).
    """
    pieces = enough_pieces(windows)
    used = sorted((index, part) for part in (FIT, CHOOSE) for index in part_windows(len(pieces), part))
    fit, choose = ([index for index, (_, own) in enumerate(used) if own == part] for part in (FIT, CHOOSE))
    states, blocks = enter(model, pieces[[index for index, _ in used]].split(1))
    wanted = states.copy()
    for block in blocks.layers:
        assert block.layer is not None
        ann = wanted.copy()
        with torch.no_grad(), without_neurons(model, block):
            block.advance(wanted)
        yield TwoStreams(layer=block.layer, block=block, states=states, ann=ann, wanted=wanted, fit=fit, choose=choose)
        with torch.no_grad():
            block.advance(states)


@torch.no_grad()
def stream_error(block: Block, states: Sequence[Tensor], wanted: Sequence[Tensor], windows: list[int]) -> float:
    """`blocks.output_error` of a block as it is now, mean of some windows."""
    return sum(output_error(block(states[index]), wanted[index]).item() for index in windows) / len(windows)


def linears_of(block: Block) -> dict[str, Any]:
    """The Linears of a decoder layer by name below it."""
    return {name: block.module.get_submodule(name) for name in LINEARS}


@contextmanager
def keeping(model: PreTrainedModel, block: Block) -> Iterator[None]:
    """Within: a block's slots and weights may be anything; afterwards what was there before."""
    slots = {site: get_neuron(model, site) for site in block.sites}
    weights = {name: linear.weight for name, linear in linears_of(block).items()}
    try:
        yield
    finally:
        for site, slot in slots.items():
            set_neuron(model, site, slot)
        for name, linear in linears_of(block).items():
            linear.weight = weights[name]


@contextmanager
def without_neurons(model: PreTrainedModel, block: Block) -> Iterator[None]:
    """Within: a block's slots are transparent, as in the ANN."""
    with keeping(model, block):
        for site in block.sites:
            set_neuron(model, site, Slot())
        yield
