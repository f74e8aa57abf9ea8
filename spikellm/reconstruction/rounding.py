"""Integer weights that make up for their rounding on what the neurons send: one block after the other, on the spiking stream.

For each block: the coded inputs y of its Linears, C = sum y y^T over the calibration text (float64); every Linear rounded against its C
(`model/integers.py`); the windows then go on through the rounded block, so that the next block's C is of what it will be given. Each block
is passed twice.

The Linears of a block are rounded together, from one pass: o_proj and down_proj see the inputs that unrounded weights before them give.

Memory beyond the block's: C of its widest input in float64 and its factors, one Linear at a time (1.6 GB each at LLaMA-3-8B's down_proj).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.config.labels import SiteKind
from spikellm.model.blocks import Block, enter
from spikellm.model.conversion import get_neuron
from spikellm.model.integers import IntegerWeight, check_groups, put, relative_error, round_compensating
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import LAYERS, READERS


@torch.no_grad()
def round_spiking(
    model: PreTrainedModel, windows: Int[Tensor, "W L"], *, bits: int, group_size: int | None
) -> tuple[dict[str, IntegerWeight], dict[str, float]]:
    """Round the Linears of every decoder layer of a converted model, in place, against its coded inputs on `windows`.

    Returns:
        The integers by path of the Linear, from the first layer to the last, and the squared errors of their outputs on `windows`
        relative to the outputs' squares.

    Raises:
        ValueError: groups that do not divide the inputs of a Linear.
    """
    check_groups(model.config, group_size)
    states, blocks = enter(model, windows.split(1))
    found: dict[str, IntegerWeight] = {}
    errors: dict[str, float] = {}
    for block in tqdm(blocks.layers, desc="weights", unit="block", disable=None):
        with moments(model, block) as collected:
            for state in states:
                block(state)
        for kind, moment in collected.items():
            for name in READERS[kind]:
                linear: Any = block.module.get_submodule(name)
                integers = round_compensating(linear.weight, moment, bits=bits, group_size=group_size)
                path = f"{LAYERS}.{block.layer}.{name}"
                found[path], errors[path] = integers, relative_error(linear.weight, integers, moment)
                put(linear, integers)
        block.advance(states)
    return found, errors


@contextmanager
def moments(model: PreTrainedModel, block: Block) -> Iterator[dict[SiteKind, Float[Tensor, "I I"]]]:
    """Within: forwards of a block add up C = sum y y^T of what the neurons before its Linears send, float64."""
    found: dict[SiteKind, Tensor] = {}

    def collect(kind: SiteKind, coded: Tensor) -> None:
        rows = coded.flatten(0, -2)
        moment = (rows.T @ rows).double()
        found[kind] = found[kind] + moment if kind in found else moment

    def hook(kind: SiteKind) -> Any:
        return lambda _module, _inputs, coded: collect(kind, coded)

    slots: dict[SiteKind, nn.Module] = {site.kind: get_neuron(model, site) for site in block.sites if site.kind in READERS}
    handles = [slot.register_forward_hook(hook(kind)) for kind, slot in slots.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
