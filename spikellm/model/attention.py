"""Attention with neurons on q, k, v and the softmax, for transformers' attention interface.

Two functions are registered under one name: the attention itself and its mask. Without the mask function transformers
would pass no mask and the model would silently stop being causal; the attention therefore refuses to run without one.

The neurons, R3 (an online Hadamard transform of q and k after RoPE: scores stay, outliers spread) and the prefix (keys and
values of a few outlier tokens, before every sequence) belong to the layer: they lie in its submodule `spiking`.

Where the softmax is normalised (`snn.softmax_norm`), with scores s_j, the prefix among the keys:

* before (the authors' network): p_j = exp(s_j) / sum_k exp(s_k), coded; out = sum_j p^_j v^_j. Most of a row's mass can lie in
  probabilities far below the code's smallest step, and their rounding errors add up over a thousand keys.
* after (ours): e_j = exp(s_j - m) with m the row's largest score among real keys, coded;
  out = (c sum_j e^_j v^_j + a V) / (c sum_j e^_j + a), with M the largest score of all, c = exp(m - M) and a = exp(s - M) of
  the prefix. Every row uses the code's whole range, the bias cancels in the quotient, and the prefix (constants with a
  sink's share of the mass) does not press real keys below the code's smallest step. Its P columns stay dense:
  P (E + 1) multiply-adds a query and head, beside the S E of the real keys.

A key and a value are coded once, when they are made: what attention gets, and a cache holds, are the sums that their spikes have
spelled (`cache.py`). Only queries and the softmax are coded here.

Queries are taken in blocks, and keys that no query of a block may see are left out: half of the work and a fraction of
the memory of the full [H, L, S] matrix. Kernels do so by themselves and hold no such matrix (`kernels/native.py`, `kernels/gpu.py`).

Scores, exponentials and sums are float32 at least, whatever the model's dtype: transformers' eager attention rounds scores to bfloat16, by
0.06 at a score of 20.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spikellm.coding.neuron import NoGradient, PhaseNeuron, Slot, apply_wide
from spikellm.kernels import native
from spikellm.kernels.attention import (
    average_plain,
    beside_prefix,
    exponentials,
    mixture_plain,
    normalised,
    per_key_head,
    probabilities,
    squared_distances,
)
from spikellm.kernels.attention import visible_blocks as blocks_of
from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import BINARY
from spikellm.model.modules import OnlineHadamard, transformed, wide
from spikellm.model.sites import ATTENTION, SPIKING_ATTENTION, decoder_layers

IMPLEMENTATION = "spiking"
# an additive mask hides a key from here on: callers write -inf, the least number of some dtype, -1e9 or -1e4
HIDDEN = -9e3
# What models pass on to their attention though the mask, or another part of the model, has dealt with it.
WITHOUT_EFFECT = {
    "cache",
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "token_type_ids",
    "use_cache",
}


class SpikingAttention(nn.Module):
    """What the layer's attention needs: slots for four neurons, R3, the prefix.

    Args:
        head_width: E.
        rotated: apply R3.
        normalise_after: see the module's text.
        query_block: queries per block, where scores are held in memory [tokens].
        dtype: of activations.
    """

    rotation: OnlineHadamard | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    _apply = apply_wide

    def __init__(
        self,
        head_width: int,
        *,
        rotated: bool,
        normalise_after: bool,
        query_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.softmax = Slot(), Slot(), Slot(), Slot()
        self.head_width, self.normalise_after, self.query_block, self.dtype = head_width, normalise_after, query_block, dtype
        self.rotation = OnlineHadamard(head_width, dtype=dtype, device=device) if rotated else None
        self.register_buffer("prefix_key", None)
        self.register_buffer("prefix_value", None)

    def set_prefix(self, key: Float[Tensor, "K P E"], value: Float[Tensor, "K P E"]) -> None:
        """Keys (after RoPE, before R3) and values that stand before every sequence."""
        self.prefix_key, self.prefix_value = key.clone(), value.clone()

    def clear_prefix(self) -> None:
        """Take the prefix away."""
        self.prefix_key = self.prefix_value = None

    def code(
        self, key: Float[Tensor, "B K L E"], value: Float[Tensor, "B K L E"]
    ) -> tuple[Float[Tensor, "B K L E"], Float[Tensor, "B K L E"]]:
        """Keys (after RoPE; R3 comes here) and values of the tokens of this forward, as attention reads them from now on."""
        return transformed(key.to(wide(key.dtype)), self.rotation, self.key), self.value(value.to(wide(value.dtype)))

    def rotate(self, x: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """R3, if it is there."""
        x = x.to(wide(x.dtype))
        return x if self.rotation is None else self.rotation(x)

    def forward(
        self,
        query: Float[Tensor, "B H L E"],
        key: Float[Tensor, "B K S E"],
        value: Float[Tensor, "B K S E"],
        mask: Bool[Tensor, "B 1 L S"],
        scaling: float,
    ) -> Float[Tensor, "B L H E"]:
        """Heads' outputs from queries and what `code` made of keys and values, in blocks of queries; query and softmax pass neurons."""
        query, prefix = transformed(query.to(wide(query.dtype)), self.rotation, self.query), self.prefix
        if prefix is not None and not self.normalise_after:
            own = (each.expand(len(key), -1, -1, -1) for each in (self.key(prefix[0]), self.value(prefix[1])))
            key, value = (torch.cat(each, dim=2) for each in zip(own, (key, value), strict=True))
            mask, prefix = behind_prefix(mask, prefix[0].shape[2]), None
        output = self._fused(query, key, value, mask, scaling, prefix)
        if output is None:
            mix = self._mix_then_normalise if self.normalise_after else self._normalise_then_mix
            blocks = [
                mix(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask[:, :, rows, keys], scaling, prefix).transpose(1, 2)
                for rows, keys in visible_blocks(mask, self.query_block)
            ]
            output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        if self.softmax.held:
            self._show(query * scaling, key, value, mask, prefix, output.transpose(1, 2))
        return output

    @property
    def prefix(self) -> tuple[Float[Tensor, "1 K P E"], Float[Tensor, "1 K P E"]] | None:
        """Keys, after R3, and values of the prefix, not coded; None: there is none."""
        if self.prefix_key is None or self.prefix_value is None:
            return None
        return self.rotate(self.prefix_key[None]), self.prefix_value[None].to(wide(self.prefix_value.dtype))

    @property
    def _sends(self) -> bool:
        """Whether the softmax is coded; else it passes whole, and observers are shown of it what they look at."""
        return not (self.softmax.transparent or self.softmax.held)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, prefix: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "B L H E"] | None:
        """What a kernel makes of it, which takes blocks by itself; None: there is none, or what sits at the softmax has to be asked."""
        neuron = self.softmax
        if not self._sends and self.normalise_after:  # as in the ANN
            return native.mixture(query, key, value, mask, scaling, prefix, None, BINARY, None, self.query_block).transpose(1, 2)
        if not (isinstance(neuron, PhaseNeuron) and neuron.compiled):
            return None
        every, code = (query.detach(), key.detach(), value.detach(), mask, scaling), (neuron.table.rows, neuron.digits, neuron.cuts)
        if self.normalise_after:
            output = chosen(mixture_plain, query, compiled=True)(*every, prefix, *code, self.query_block)
        elif query.is_cuda:
            output = chosen(average_plain, query, compiled=True)(*every, *code, self.query_block)
        else:
            return None
        output = output.transpose(1, 2)
        return NoGradient.apply(query, output) if torch.is_grad_enabled() and query.requires_grad else output

    def _normalise_then_mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, _: object
    ) -> Float[Tensor, "B H l E"]:
        weights = probabilities(per_key_head(query * scaling, key.mT), mask)
        return per_key_head(self.softmax(weights) if self._sends else weights, value)

    def _mix_then_normalise(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, prefix: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "B H l E"]:
        query = query * scaling
        weights, top = exponentials(per_key_head(query, key.mT), mask)
        weights = self.softmax(weights)
        return normalised(per_key_head(weights, value), weights.sum(-1, keepdim=True), top, query, prefix)

    def _show(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        output: Float[Tensor, "B H L E"],
    ) -> None:
        """What the softmax of some queries, scaled ones, sends, and what an error of it counts: their outputs are at hand."""
        looked_at = slice(None, None, self.softmax.row_stride)
        query, mask, output = query[:, :, looked_at], mask[:, :, looked_at], output[:, :, looked_at]
        for rows, keys in visible_blocks(mask, self.query_block):
            some, shown = query[:, :, rows], mask[:, :, rows, keys]
            scores = per_key_head(some, key[:, :, keys].mT)
            if not self.normalise_after:
                self.softmax(probabilities(scores, shown))
                self.softmax.weigh(None, shown)
                continue
            weights, top = exponentials(scores, shown)
            total, share, _ = beside_prefix(weights.sum(-1, keepdim=True), top, some, prefix)
            self.softmax(weights)
            self.softmax.weigh((share / total).square() * squared_distances(output[:, :, rows], value[:, :, keys]), shown)


def visible_blocks(mask: Bool[Tensor, "B 1 L S"], size: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of every block of `size` queries: the keys up to the last that any of its queries may see."""
    return blocks_of(mask.shape[2], native.ends(mask, size), size)


def behind_prefix(mask: Bool[Tensor, "B 1 L S"], prefix: int) -> Bool[Tensor, "B 1 L S_and_P"]:
    """A mask of so many keys more, before all others, which every query sees."""
    return torch.cat([mask.new_ones(*mask.shape[:-1], prefix), mask], dim=-1)


def attentions(model: nn.Module) -> list[SpikingAttention]:
    """The spiking attentions of an installed model, layer by layer."""
    found: list[Any] = [layer.get_submodule(f"{ATTENTION}.{SPIKING_ATTENTION}") for layer in decoder_layers(model)]
    return found


@contextmanager
def attending(model: nn.Module, **attributes: Any) -> Iterator[None]:
    """Within: the attentions of an installed model have other attributes; afterwards their own."""
    before = [(attention, {name: getattr(attention, name) for name in attributes}) for attention in attentions(model)]
    try:
        for attention, _ in before:
            for name, value in attributes.items():
                setattr(attention, name, value)
        yield
    finally:
        for attention, own in before:
            for name, value in own.items():
                setattr(attention, name, value)


def spiking_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "B L H E"], None]:
    """transformers' attention function; the layer must carry a `SpikingAttention`.

    Args:
        attention_mask: True where a query may see a key, or 0 there and a large negative number elsewhere; [B or 1, 1, L, S].
        options: what else a caller of the model has passed.

    Raises:
        ValueError: no mask came in, one that hides nothing but shifts scores, the layer was not converted, or an option would have to
            change the result.
    """
    if attention_mask is None:
        raise ValueError(f"attention implementation {IMPLEMENTATION!r} needs its mask: register {IMPLEMENTATION!r} masks too")
    spiking = getattr(module, SPIKING_ATTENTION, None)
    if spiking is None:
        raise ValueError(f"layer {getattr(module, 'layer_idx', '?')} has no {SPIKING_ATTENTION!r} submodule: convert the model first")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: a spiking model does not drop spikes; call model.eval() or set attention_dropout=0")
    acting = sorted(name for name, option in options.items() if name not in WITHOUT_EFFECT and option is not None and option is not False)
    if options.get("is_causal") is False:
        acting.append("is_causal=False")
    if acting:
        raise ValueError(f"attention of a spiking model cannot honour {', '.join(acting)}: call the model without")
    return spiking(query, key, value, visible(attention_mask, query, key), scaling), None


def visible(mask: Tensor, query: Float[Tensor, "B H L E"], key: Float[Tensor, "_ K S E"]) -> Bool[Tensor, "B 1 L S"]:
    """A caller's mask as booleans.

    Raises:
        ValueError: it is of another shape, of integers, or adds a bias to scores.
    """
    wanted = (len(query), 1, query.shape[2], key.shape[2])
    if mask.ndim != 4 or mask.shape[0] not in (1, wanted[0]) or mask.shape[1:] != wanted[1:]:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, {wanted} is needed: one mask for all heads of a sequence")
    if mask.is_floating_point():
        hidden = mask <= HIDDEN
        if not (hidden | (mask == 0)).all():
            raise ValueError(
                "attention_mask adds a bias to scores, which spiking attention cannot: 0 where a key is visible, -inf elsewhere"
            )
        mask = ~hidden
    if mask.dtype is not torch.bool:
        raise ValueError(f"attention_mask is {mask.dtype}: booleans are needed (True: visible), or floats that are added to scores")
    return mask.expand(wanted[0], -1, -1, -1)


def refuse_other_implementation(module: nn.Module, *_: object) -> None:
    """Forward hook of a layer's attention: any other attention function has passed its neurons and prefix by.

    Raises:
        ValueError: the model was set to another implementation.
    """
    chosen: object = getattr(module.config, "_attn_implementation", None)
    if chosen != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation={chosen!r} leaves out neurons of a spiking model; {IMPLEMENTATION!r} is the one that has them"
        )


def spiking_mask(*args: Any, **kwargs: Any) -> Bool[Tensor, "B 1 L S"]:
    """The boolean mask, always spelled out: True where a query may see a key."""
    mask = transformers.masking_utils.sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None  # the two options forbid it
    return mask


def register() -> None:
    """Tell transformers of the implementation; not at import, see `pretrained.py`."""
    transformers.AttentionInterface.register(IMPLEMENTATION, spiking_attention)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, spiking_mask)
