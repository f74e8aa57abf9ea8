"""A model as a row of blocks, and windows that go through it together: all of them through one block, then through the next.

What a stage does to a block, or learns from it, is a function of that block; the stage is a loop over the row. Nothing of the other
blocks has to be at hand then: not their observers (1.9 GB on LLaMA-3-8B's 32 layers), not their weights, which may lie on disk but for
the block that is called (`offload.py`). What is held instead are the windows' hidden states, W L D numbers (0.5 GB there, for 16
windows of 2048 tokens).

No figure depends on it: a window meets the same operations on the same numbers as in the model's own forward, from which the arguments
of every layer (position embeddings, the mask of its type of attention) are taken. Windows stay apart in each product: how many go
together moves no bit. Within `spikellm.stepped` states are currents [T, L, D], and spikes [1, L, S, D] behind the final norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikellm.model.offload import is_offloaded, present
from spikellm.model.sites import FINAL_NORM, LAYERS, Site, decoder_layers, sites

STATES_BYTES = 2**30  # of hidden states that windows in flight take where a block's weights are brought in for all of them together


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder layer, or the final norm behind the last one."""

    layer: int | None  # None: the final norm
    module: nn.Module
    sites: list[Site]  # nine, or one
    arguments: dict[str, object]  # of the module, beside the hidden state

    def __call__(self, state: Float[Tensor, "B L D"]) -> Shaped[Tensor, "..."]:
        """A window's hidden state behind the block; behind the last block it is what lm_head reads."""
        return self.module(state, **self.arguments)

    def advance(self, states: list[Tensor]) -> None:
        """Take the hidden states of all windows through the block, in place."""
        for index, state in enumerate(states):
            states[index] = self(state)


class Row:
    """Blocks in the order in which a token meets them; going along it, the weights of one are in memory, of no other."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        for block in self.blocks:
            with present(block.module):
                yield block

    @property
    def layers(self) -> "Row":
        """Without the final norm."""
        return Row([block for block in self.blocks if block.layer is not None])


def output_error(found: Float[Tensor, "1 L D"], target: Float[Tensor, "1 L D"]) -> Float[Tensor, ""]:
    """Squared error of each token over its square, mean of the tokens: the next norm divides by the token's size."""
    power = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
    return ((found - target).square().sum(-1) / power).mean()


@torch.no_grad()
def walk(model: PreTrainedModel, windows: Int[Tensor, "W L"]) -> list[Shaped[Tensor, "1 L ..."]]:
    """The last hidden state of every window, which lm_head reads: all windows through one block, then through the next."""
    states, blocks = enter(model, windows)
    for block in blocks:
        block.advance(states)
    return states


@torch.no_grad()
def enter(model: PreTrainedModel, windows: Int[Tensor, "W L"]) -> tuple[list[Float[Tensor, "B L D"]], Row]:
    """The hidden state of every window before the first block, and the blocks in the order in which a token meets them.

    Blocks take their modules as they are, neurons and observers included, but know one length of windows and no padding.
    """
    layers = decoder_layers(model)
    modules = dict(enumerate(layers)) | {None: model.get_submodule(FINAL_NORM)}
    with _passed_by(model) as (states, arguments):
        for window in windows:
            model.base_model(window[None].to(model.device), use_cache=False)
    return states, Row(
        [
            Block(layer=layer, module=module, sites=[site for site in sites(len(layers)) if site.layer == layer], arguments=given)
            for (layer, module), given in zip(modules.items(), arguments, strict=True)
        ]
    )


def together(model: PreTrainedModel, length: int) -> int:
    """Windows that go through a block before the next one is called: one, or as many as it pays to bring its weights in for."""
    return max(1, STATES_BYTES // (4 * length * model.config.hidden_size)) if is_offloaded(model) else 1


@contextmanager
def _passed_by(model: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[dict[str, object]]]]:
    """Within: a forward passes all blocks by. What comes to the first is collected, and what every block is called with."""
    layers, norm = decoder_layers(model), model.get_submodule(FINAL_NORM)
    states: list[Tensor] = []
    arguments: list[dict[str, object]] = [{} for _ in [*layers, norm]]

    def twin(index: int, block: nn.Module) -> nn.Module:
        def forward(state: Tensor, **given: object) -> Tensor:
            arguments[index] = given
            if index == 0:
                states.append(state)
            return state

        same = copy(block)  # models ask their layers for attributes
        vars(same)["forward"] = forward
        return same

    model.set_submodule(LAYERS, nn.ModuleList(twin(index, layer) for index, layer in enumerate(layers)))
    model.set_submodule(FINAL_NORM, twin(len(layers), norm))
    try:
        yield states, arguments
    finally:
        model.set_submodule(LAYERS, layers)
        model.set_submodule(FINAL_NORM, norm)
