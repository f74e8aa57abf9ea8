"""Keys and values are coded where they are made: on their way into the cache.

transformers' attention makes keys and values of the new tokens, hands them to the cache's `update` and attends to what comes back. A
`Coder` stands in the cache's place: it sends keys (after RoPE and R3) and values through their neurons and stores what the spikes have
spelled, the sums sum_t d_t s_t. A decoding step thus codes its own token alone, however long the context is. What the cache does with its
rows (grow, have a fixed size, slide, be cropped, reordered by a beam search, moved to another device) is transformers' own affair.

A key that leaves the cache is complete: a query's spikes collect rows of sums. So it is in stepped execution, where one T times
as large would hold spike trains, and where reordering would not find the B rows of a batch in T B of currents.
"""

from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import QuantizedCache

from spikellm.model.attention import SpikingAttention
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import ATTENTION, SPIKING_ATTENTION, decoder_layers

NAMES = ("cache", "past_key_values")  # what attention calls its cache, from transformers 5.24 on and before


class Coder:
    """Stands where an attention looks for its cache.

    Args:
        spiking: of the attention, codes what is new.
        cache: of transformers, which keeps it; None: nothing is kept.
    """

    def __init__(self, spiking: SpikingAttention, cache: Any) -> None:
        self.spiking, self.cache = spiking, cache

    def update(
        self, key_states: Float[Tensor, "TB K L E"], value_states: Float[Tensor, "TB K L E"], *arguments: Any, **options: Any
    ) -> tuple[Float[Tensor, "B K S E"], Float[Tensor, "B K S E"]]:
        """Coded keys and values of the new tokens, behind those of earlier ones; from currents [T * B, ..] in stepped execution."""
        key, value = self.spiking.code(key_states, value_states)
        return (key, value) if self.cache is None else self.cache.update(key, value, *arguments, **options)


def cache_name(attention: nn.Module) -> str:
    """What a layer's attention, and the model around it, call their cache."""
    known = signature(type(attention).forward).parameters
    return next(name for name in NAMES if name in known)


def put_coder(name: str, attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Forward pre-hook of a layer's attention: a `Coder` in the place of its cache, also where it has none.

    Raises:
        ValueError: the cache is a quantized one.
    """
    spiking: Any = attention.get_submodule(SPIKING_ATTENTION)
    if isinstance(keywords.get(name), QuantizedCache):
        raise ValueError(
            "cache_implementation='quantized' would round what keys' and values' spikes have spelled: leave it out, or take 'static'"
        )
    return arguments, keywords | {name: Coder(spiking, keywords.get(name))}


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Int[Tensor, " L"], cache: Any = None) -> Any:
    """Take one sequence through a converted model, without its logits: the cache that holds it, behind what `cache` held."""
    name = cache_name(decoder_layers(model)[0].get_submodule(ATTENTION))
    return model.base_model(tokens[None].to(model.device), use_cache=True, return_dict=False, **{name: cache})[1]
