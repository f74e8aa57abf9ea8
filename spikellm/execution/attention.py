"""Attention step by step: the stepped sibling of `SpikingAttention`.

q, k and v integrate over T steps and fire together. Scores: the spikes of one side against what the other has accumulated
(`temporal.spike_pairs`). When they are complete, the softmax's neuron reads its activations and fires; the values are complete
by then, too, and its spikes add up rows of them. What o_proj's neuron integrates comes step by step, or, with
`snn.softmax_norm=after`, at the last one: the quotient of two sums that are complete then.

A cache holds sums, not trains (`model/cache.py`): keys of earlier forwards are complete before a query fires, whose spikes collect rows
of them. Those of this forward fire beside it.

R3 is linear and acts on the integrated q and k. The prefix is what it is in folded execution: keys among others that fire
(`before`), or constants beside the spikes (`after`), whose share of each row is dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from spikellm.execution.modules import SteppedNeuron, neuron_of, unbatch
from spikellm.kernels import events
from spikellm.kernels.attention import exponentials, per_key_head, prefix_weights, probabilities
from spikellm.kernels.temporal import at_last_step, integrate, spike_mixture, spike_pairs, step_weights, weighted
from spikellm.model.attention import SpikingAttention, behind_prefix, visible_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys of a forward as queries meet them: P of the prefix, then `sums` of earlier forwards, then those of this one.

    The first and the last fire; `fired` holds their trains, in a row.
    """

    fired: Int8[Tensor, "S B K n E"]
    sums: Float[Tensor, "B K s E"]
    prefix: int = 0

    @classmethod
    def of(
        cls,
        key: Float[Tensor, "B K S E"],
        fired: Int8[Tensor, "W B K L E"],
        spelled: Float[Tensor, "B K L E"],
        mask: Bool[Tensor, "B 1 L S"],
    ) -> Self:
        """From what has come out of the cache, where this forward's keys are the last that are seen.

        Elsewhere (a mask of the caller's own) nobody can tell which they are, and all are read as sums: the scores are the same.
        """
        end = int((mask.flatten(0, 2).any(0) * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax())
        start = end - fired.shape[3]
        if start < 0 or not torch.equal(key[:, :, start:end], spelled):
            return cls(fired=fired[:, :, :, :0], sums=key)
        return cls(fired=fired, sums=key[:, :, :start])

    def behind(self, prefix: Int8[Tensor, "S B K P E"]) -> Self:
        """With the spikes of a prefix before them."""
        return replace(self, fired=torch.cat([prefix, self.fired], dim=3), prefix=prefix.shape[3])

    def until(self, stop: int) -> Self:
        """The first so many keys."""
        behind = stop - self.prefix
        own = max(behind - self.sums.shape[2], 0)
        return replace(self, fired=self.fired[:, :, :, : self.prefix + own], sums=self.sums[:, :, :behind])

    def in_order(self, fired: Float[Tensor, "B K n P_and_L"], complete: Float[Tensor, "B K n s"]) -> Float[Tensor, "B K n S"]:
        """Scores with both kinds of keys in the order of the mask."""
        return torch.cat([fired[..., : self.prefix], complete, fired[..., self.prefix :]], dim=-1)


class SteppedAttention(SpikingAttention):
    """Attention on currents [T * B, H, L, E]: see the module's text, and `model/attention.py` for the two ways to normalise.

    Its neurons fire on S = T P wires each, of their own number P of populations.
    """

    query: SteppedNeuron
    key: SteppedNeuron
    value: SteppedNeuron
    softmax: SteppedNeuron
    fired: tuple[Tensor, Tensor] | None = None  # trains of this forward's keys and what they spell, from `code` to `forward`

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

    def code(
        self, key: Float[Tensor, "TB K L E"], value: Float[Tensor, "TB K L E"]
    ) -> tuple[Float[Tensor, "B K L E"], Float[Tensor, "B K L E"]]:
        """Sums of the spikes that currents of keys and values cause; the keys' trains wait for the queries, which fire beside them."""
        key, value = (events.integrate(unbatch(x, self.key.T)) for x in (key, value))
        fired = self.key(self.rotate(key))
        self.fired = fired, self._sums(self.key, fired, key.dtype)
        return self.fired[1], self._sums(self.value, self.value(value), value.dtype)

    def forward(
        self,
        query: Float[Tensor, "TB H L E"],
        key: Float[Tensor, "B K S E"],
        value: Float[Tensor, "B K S E"],
        mask: Tensor,
        scaling: float,
    ) -> Float[Tensor, "TB L H E"]:
        """Currents of the heads' outputs, from currents of queries and what `code` made of keys and values."""
        T = self.query.T
        q = self.rotate(events.integrate(unbatch(query, T)))
        mask, v = mask[: len(q)], value
        own, self.fired = self.fired, None
        assert own is not None  # `code` comes before
        keys, exact = Keys.of(key, *own, mask), None
        if (prefix := self.prefix) is not None:
            exact = prefix[0].expand(len(q), -1, -1, -1), prefix[1].expand(len(q), -1, -1, -1)
            if not self.normalise_after:
                keys = keys.behind(self.key(exact[0]))
                v = torch.cat([self._sums(self.value, self.value(exact[1]), v.dtype), v], dim=2)
                mask = behind_prefix(mask, keys.prefix)
        q_spikes = self.query(q)
        if self.normalise_after:  # one more column: its accumulator is the row's sum of coded exponentials
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
        out = query.new_empty(T, *q.shape)
        for rows, seen in visible_blocks(mask, self.query_block):
            block = self._block(q_spikes[:, :, :, rows], keys.until(seen.stop), v[:, :, seen], mask[:, :, rows, seen], exact, scaling)
            for step, current in zip(out, block, strict=True):
                step[:, :, rows] = current
        return out.flatten(0, 1).transpose(1, 2)

    def _sums(self, neuron: SteppedNeuron, spikes: Int8[Tensor, "S B heads L E"], dtype: torch.dtype) -> Float[Tensor, "B heads L E"]:
        """What a train spells."""
        return integrate(weighted(spikes, self._weights(neuron, spikes.shape[2]).to(dtype)))

    @staticmethod
    def _weights(neuron: SteppedNeuron, heads: int) -> Float[Tensor, "S 1 heads 1 1"]:
        return step_weights(neuron.wires, heads)[:, None, :, None, None]

    def _block(
        self,
        query: Int8[Tensor, "Q B H l E"],
        keys: Keys,
        value: Float[Tensor, "B K s W"],
        mask: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        scaling: float,
    ) -> Iterator[Float[Tensor, "B H l E"]]:
        """Currents of a block of queries, step by step."""
        T, (B, H, L) = self.query.T, query.shape[1:4]
        K = keys.sums.shape[1]
        dtype = value.dtype

        def stacked(neuron: SteppedNeuron, spikes: Tensor) -> tuple[Tensor, Tensor]:
            """Spikes and weights of heads that share a key head, as in `per_key_head`."""
            weights = self._weights(neuron, H).to(dtype)
            rows = weights.expand(len(spikes), 1, H, L, 1).reshape(len(spikes), 1, K, -1, 1)
            return spikes.reshape(len(spikes), B, K, -1, spikes.shape[-1]), rows

        scores = self._scores(query, keys, mask, scaling)
        if scores is None:
            q_spikes, q_weights = stacked(self.query, query)
            k_weights = self._weights(self.key, K).to(dtype)
            populations = self.query.populations, self.key.populations
            pairs = integrate(spike_pairs(q_spikes, keys.fired, q_weights * scaling, k_weights, populations=populations))
            rows = spike_mixture(q_spikes, keys.sums.mT, q_weights * scaling, populations=self.query.populations)
            scores = keys.in_order(pairs, integrate(rows)).view(B, H, L, -1)
        exponentiate = events.exponentials if self.softmax.compiled else exponentials
        activations, top = exponentiate(scores, mask) if self.normalise_after else (probabilities(scores, mask), None)
        neuron, spikes = self.softmax, self.softmax(activations)

        def mixtures() -> Iterator[Tensor]:
            train, weights = stacked(neuron, spikes)
            return (part.view(B, H, L, -1) for part in spike_mixture(train, value, weights, populations=neuron.populations))

        if top is None:
            return mixtures()
        found = events.mixture_sum(spikes, value[..., :-1], neuron.wires, neuron.populations) if neuron.compiled else None
        if found is None:
            whole = integrate(mixtures())
            found = whole[..., :-1], whole[..., -1:]
        mixture, total = found
        if prefix is not None:
            q = integrate(weighted(query, self._weights(self.query, H).to(dtype) * scaling))
            sink, share = prefix_weights(per_key_head(q, prefix[0].mT), top)
            mixture, total = mixture * share + per_key_head(sink, prefix[1]), total * share + sink.sum(-1, keepdim=True)
        # nothing is mixed where no spike was sent
        return iter(at_last_step(mixture / torch.where(total == 0, 1, total), T))

    def _scores(self, query: Int8[Tensor, "Q B H l E"], keys: Keys, mask: Tensor, scaling: float) -> Float[Tensor, "B H l s"] | None:
        """Scores in one pass over all steps; None: where there is no such kernel, and where a cache has keys."""
        if not self.query.compiled or keys.sums.shape[2]:
            return None
        populations = self.query.populations, self.key.populations
        return events.pair_scores(query, keys.fired, (self.query.wires, self.key.wires), mask, scaling, populations)
