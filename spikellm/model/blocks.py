"""A model as a row of blocks, and windows that go through it together: all of them through one block, then through the next.

What a stage does to a block, or learns from it, is a function of that block; the stage is a loop over the row. Nothing of the other
blocks has to be at hand then: not their observers (1.9 GB on LLaMA-3-8B's 32 layers), not their weights, which may lie on disk but for
the block that is called (`offload.py`). What is held instead are the windows' hidden states, W L D numbers (0.5 GB there, for 16
windows of 2048 tokens); where weights lie on disk they do so too beyond `STATES_BYTES` (`states.py`).

No figure depends on it: a window meets the same operations on the same numbers as in the model's own forward, from which the arguments
of every layer (position embeddings, the mask of its type of attention) are taken. Batches stay apart in each product: how many go
together moves no bit. Batches may differ in size and length: arguments are those of a batch of that shape. Padding is on the right,
where a causal model does not see it. Within `spikellm.stepped` states are currents [T B, L, D], and spikes [B, L, S, D] behind the final
norm.

Networks that differ in what sits in their slots alone go through a block side by side: a block's weights are brought in once for all.
"""

from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.model.offload import is_offloaded, present, scratch_of
from spikellm.model.passage import Passage
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import EMBEDDING, FINAL_NORM, LAYERS, Site, decoder_layers, sites
from spikellm.model.states import Chain, States

Tokens = Int[Tensor, "_ _"]  # of a batch [B, L]; those of a list may differ in both
STATES_BYTES = 2**30  # of hidden states in memory, where a block's weights are brought in for all of them together


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder layer, or the final norm behind the last one."""

    layer: int | None  # None: the final norm
    module: nn.Module
    sites: list[Site]  # nine, or one
    arguments: dict[torch.Size, dict[str, object]]  # of the module beside a hidden state, by that one's shape

    @property
    def name(self) -> str:
        """Of what is kept of the block."""
        return "end" if self.layer is None else f"layer {self.layer}"

    def __call__(self, state: Float[Tensor, "B L D"]) -> Shaped[Tensor, "..."]:
        """A batch's hidden state behind the block; behind the last block it is what lm_head reads."""
        return self.module(state, **self.arguments[state.shape])

    def advance(self, states: MutableSequence[Tensor]) -> None:
        """Take the hidden states of all batches through the block, in place."""
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


# What makes a block that of another network: it puts what belongs there into the block's slots.
Occupy = Callable[[Block], None]


def as_it_is(_: Block) -> None:
    """The network that the model is now."""


@torch.no_grad()
def walk(model: PreTrainedModel, batches: Iterable[Tokens]) -> States:
    """The last hidden state of every batch, which lm_head reads: all batches through one block, then through the next."""
    return walk_side_by_side(model, batches, [as_it_is])[0]


@torch.no_grad()
def walk_side_by_side(
    model: PreTrainedModel,
    batches: Iterable[Tokens],
    networks: Sequence[Occupy],
    *,
    label: str | None = None,
    passage: Passage | None = None,
) -> list[States]:
    """`walk` of several networks of one model: all of them through one block, then through the next.

    Args:
        networks: they share the model's weights, embedding and prefix; the model is left as the last one.
        label: of a progress bar; None: there is none.
        passage: where the hidden states of all networks are kept; None: nowhere.
    """
    entered, blocks = enter(model, batches)
    found = [entered.copy() for _ in networks]
    del entered  # the state before the first block is held by nobody behind it
    passage = passage or Passage()
    finished, lying = passage.behind(len(blocks))
    for number in range(len(lying)):
        states = found[number // len(found[0])]
        states[number % len(states)] = lying[number].to(model.device)
    ahead = Row(blocks.blocks[finished:])
    bar = tqdm(ahead, desc=label, unit="block", initial=finished, total=len(blocks), disable=True if label is None else None)
    for number, block in enumerate(bar, finished + 1):
        for occupy, states in zip(networks, found, strict=True):
            occupy(block)
            block.advance(states)
        passage.keep(number, Chain(found))
    return found


@torch.no_grad()
def enter(model: PreTrainedModel, batches: Iterable[Tokens]) -> tuple[States, Row]:
    """The hidden state of every batch before the first block, and the blocks in the order in which a token meets them.

    Blocks take their modules as they are, neurons and observers included, and batches of shapes that have entered.
    """
    layers = decoder_layers(model)
    modules = dict(enumerate(layers)) | {None: model.get_submodule(FINAL_NORM)}
    states = States(room=STATES_BYTES, scratch=scratch_of(model))
    with _passed_by(model, states) as arguments:
        for batch in batches:
            model.base_model(batch.to(model.device), use_cache=False)
    return states, Row(
        [
            Block(layer=layer, module=module, sites=[site for site in sites(len(layers)) if site.layer == layer], arguments=given)
            for (layer, module), given in zip(modules.items(), arguments, strict=True)
        ]
    )


def rows_of_token(model: PreTrainedModel) -> int:
    """Of a hidden state: one for every time step within `spikellm.stepped` (`SteppedEmbedding`), else one."""
    return getattr(model.get_submodule(EMBEDDING), "T", 1)


def flights(model: PreTrainedModel, batches: Iterable[Tokens], *, networks: int = 1) -> Iterator[list[Tokens]]:
    """The batches in those parts that go through a block before the next one is called.

    One at a time, or as many as it pays to bring the block's weights in for. That is until `STATES_BYTES` of so many networks' states: more
    would have to lie on disk, and go there and back at every block, which takes longer than the weights do once more.
    """
    room = STATES_BYTES if is_offloaded(model) else 0
    numbers = model.config.hidden_size * rows_of_token(model) * networks  # of a token
    part: list[Tensor] = []
    taken = 0
    for batch in batches:
        size = 4 * batch.numel() * numbers
        if part and taken + size > room:
            yield part
            part, taken = [], 0
        part.append(batch)
        taken += size
    if part:
        yield part


@contextmanager
def _passed_by(model: PreTrainedModel, states: States) -> Iterator[list[dict[torch.Size, dict[str, object]]]]:
    """Within: a forward passes all blocks by. What comes to the first is added to `states`; with what blocks are called is collected."""
    layers, norm = decoder_layers(model), model.get_submodule(FINAL_NORM)
    arguments: list[dict[torch.Size, dict[str, object]]] = [{} for _ in [*layers, norm]]

    def twin(index: int, block: nn.Module) -> nn.Module:
        def forward(state: Tensor, **given: object) -> Tensor:
            arguments[index].setdefault(state.shape, given)
            if index == 0:
                states.append(state)
            return state

        same = copy(block)  # models ask their layers for attributes
        vars(same)["forward"] = forward
        return same

    model.set_submodule(LAYERS, nn.ModuleList(twin(index, layer) for index, layer in enumerate(layers)))
    model.set_submodule(FINAL_NORM, twin(len(layers), norm))
    try:
        yield arguments
    finally:
        model.set_submodule(LAYERS, layers)
        model.set_submodule(FINAL_NORM, norm)
