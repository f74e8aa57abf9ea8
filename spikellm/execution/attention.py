"""Attention step by step: the stepped sibling of `SpikingAttention`.

q, k and v integrate over T steps and fire together. Scores: the spikes of one side against what the other has accumulated
(`temporal.spike_pairs`). When they are complete, the softmax's neuron reads its activations and fires; the values are complete
by then, too, and its spikes add up rows of them. What o_proj's neuron integrates comes step by step, or, with
`snn.softmax_norm=after`, at the last one: the quotient of two sums that are complete then.

R3 is linear and acts on the integrated q and k. The prefix is what it is in folded execution: keys among others that fire
(`before`), or constants beside the spikes (`after`), whose share of each row is dense.
"""

from collections.abc import Iterator
from typing import Self

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from spikellm.execution.modules import SteppedNeuron, neuron_of, unbatch
from spikellm.kernels.attention import exponentials, per_key_head, prefix_weights, probabilities, visible_blocks
from spikellm.kernels.temporal import at_last_step, integrate, spike_mixture, spike_pairs, step_weights, weighted
from spikellm.model.attention import SpikingAttention


class SteppedAttention(SpikingAttention):
    """Attention on currents [T * B, H, L, E]: see the module's text, and `model/attention.py` for the two ways to normalise."""

    query: SteppedNeuron
    key: SteppedNeuron
    value: SteppedNeuron
    softmax: SteppedNeuron

    @classmethod
    def of(cls, attention: SpikingAttention) -> Self:
        """The same tables, R3 and prefix."""
        module = cls(
            attention.head_width,
            rotated=False,
            normalise_after=attention.normalise_after,
            query_block=attention.query_block,
            dtype=attention.dtype,
            device=neuron_of(attention, "query").theta.device,
        )
        module.rotation = attention.rotation
        for slot in ("query", "key", "value", "softmax"):
            setattr(module, slot, SteppedNeuron.adopt(neuron_of(attention, slot)))
        module.prefix_key, module.prefix_value = attention.prefix_key, attention.prefix_value
        return module

    def forward(
        self,
        query: Float[Tensor, "TB H L E"],
        key: Float[Tensor, "TB K S E"],
        value: Float[Tensor, "TB K S E"],
        mask: Tensor,
        scaling: float,
    ) -> Float[Tensor, "TB L H E"]:
        """Currents of the heads' outputs, from currents of queries, keys and values."""
        T = self.query.T
        q, k, v = (integrate(unbatch(x, T)) for x in (query, key, value))
        q, k, v, mask, prefix = self.operands(q, k, v, mask[: len(q)])
        q_spikes, k_spikes, v_spikes = self.query(q), self.key(k), self.value(v)
        v = integrate(weighted(v_spikes, self._weights(self.value, v.shape[1]).to(v.dtype)))
        if self.normalise_after:  # one more column: its accumulator is the row's sum of coded exponentials
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
        out = query.new_empty(T, *q.shape)
        for rows, keys in visible_blocks(mask, self.query_block):
            block = self._block(q_spikes[:, :, :, rows], k_spikes[:, :, :, keys], v[:, :, keys], mask[:, :, rows, keys], prefix, scaling)
            for step, current in zip(out, block, strict=True):
                step[:, :, rows] = current
        return out.flatten(0, 1).transpose(1, 2)

    @staticmethod
    def _weights(neuron: SteppedNeuron, heads: int) -> Float[Tensor, "T 1 heads 1 1"]:
        return step_weights(neuron.d, heads)[:, None, :, None, None]

    def _block(
        self,
        query: Int8[Tensor, "T B H l E"],
        key: Int8[Tensor, "T B K s E"],
        value: Float[Tensor, "B K s W"],
        mask: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        scaling: float,
    ) -> Iterator[Float[Tensor, "B H l E"]]:
        """Currents of a block of queries, step by step."""
        T, B, H, L, E = query.shape
        K = key.shape[2]
        dtype = value.dtype
        q_weights = self._weights(self.query, H).to(dtype).expand(T, 1, H, L, 1).reshape(T, 1, K, -1, 1)
        stacked = query.reshape(T, B, K, -1, E)  # heads that share a key head, as in `per_key_head`
        pairs = spike_pairs(stacked, key, q_weights * scaling, self._weights(self.key, K).to(dtype))
        scores = integrate(pairs).view(B, H, L, -1)
        activations, top = exponentials(scores, mask) if self.normalise_after else (probabilities(scores, mask), None)
        spikes = self.softmax(activations)
        weights = self._weights(self.softmax, H).to(dtype).expand(T, 1, H, L, 1).reshape(T, 1, K, -1, 1)
        mixtures = (part.view(B, H, L, -1) for part in spike_mixture(spikes.reshape(T, B, K, -1, key.shape[3]), value, weights))
        if top is None:
            return mixtures
        parts = integrate(mixtures)
        if prefix is not None:
            q = integrate(weighted(query, self._weights(self.query, H).to(dtype) * scaling))
            exact, share = prefix_weights(per_key_head(q, prefix[0].mT), top)
            parts = parts * share + torch.cat([per_key_head(exact, prefix[1]), exact.sum(-1, keepdim=True)], dim=-1)
        total = parts[..., -1:]
        # nothing is mixed where no spike was sent
        return iter(at_last_step(parts[..., :-1] / torch.where(total == 0, 1, total), T))
