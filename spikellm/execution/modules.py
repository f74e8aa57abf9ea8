"""Stepped siblings of the modules around neurons: currents [T * B, ...] and spike trains in, the same out.

A neuron of P populations fires on S = T P wires (`PhaseTable.wires`); P may differ from site to site. Each module shares weights,
tables and rotations with its folded sibling. How they work together: `stepped.py`; the operators: `kernels/temporal.py`. Spikes are
int8 in {-1, 0, +1}; currents are float32 (float64 in float64 models). Where neurons have their amplitude m from the token, they fire for
x / m, and output weights are m d_t for this token: m comes to a norm's readers with its spikes (`amplitude.py`).
"""

from collections.abc import Iterator
from typing import Any, Self

from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from spikellm.coding.neuron import PhaseNeuron, fire
from spikellm.execution.amplitude import attached, detached
from spikellm.kernels import events
from spikellm.kernels.temporal import at_last_step, step_weights
from spikellm.model.modules import SpikingActivation, SpikingLinear, SpikingRMSNorm, wide


class SteppedNeuron(PhaseNeuron):
    """A site's neurons, firing: integrated input in, spike train on all wires out. Forward hooks see both.

    Every spike of a stepped run leaves a forward of one of these; the softmax's run once per block of queries.
    """

    @classmethod
    def adopt(cls, neuron: PhaseNeuron) -> Self:
        """The same table."""
        return cls(neuron.table, axis=neuron.axis, per_token=neuron.per_token, compiled=neuron.compiled)

    @property
    def T(self) -> int:
        """Time steps."""
        return self.theta.shape[1]

    @property
    def populations(self) -> int:
        """P, wires in a step."""
        return self.digits.populations

    @property
    def wires(self) -> Float[Tensor, "C S"]:
        """Output weights of all wires, in units of the token's amplitude where there is one."""
        return self.table.wires

    def forward(self, x: Float[Tensor, "*shape"]) -> Int8[Tensor, " S *shape"]:
        """Spikes -1, 0 or 1 of every step, from the integrated input."""
        return fire(self.grouped(self.coded(x)), self.table, compiled=self.compiled).view(-1, *x.shape)


def neuron_of(owner: nn.Module, slot: str = "neuron") -> PhaseNeuron:
    """The neuron in a slot of a converted module.

    Raises:
        ValueError: there is none.
    """
    neuron = getattr(owner, slot, None)
    if not isinstance(neuron, PhaseNeuron):
        raise ValueError(f"{type(owner).__name__} carries no neuron in {slot!r}: convert the model before it is run in steps")
    return neuron


def unbatch(x: Shaped[Tensor, " TB *shape"], T: int) -> Shaped[Tensor, "T B *shape"]:
    """Time, or wires, out of the batch axis."""
    return x.unflatten(0, (T, -1))


class SteppedEmbedding(nn.Embedding):
    """Token ids [B, L] to currents [T * B, L, D]: the embedding at the first step, nothing after it."""

    T: int

    @classmethod
    def adopt(cls, embedding: nn.Embedding, T: int) -> Self:
        """The same weight."""
        module = cls(
            embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, _weight=embedding.weight, _freeze=True
        )
        module.weight, module.T = embedding.weight, T
        return module

    def forward(self, input: Int[Tensor, "B L"]) -> Float[Tensor, "TB L D"]:
        """Embeddings as the current of step 0; zero after it."""
        first = super().forward(input)
        currents = first.new_zeros(self.T, *first.shape, dtype=wide(first.dtype))
        currents[0] = first
        return currents.flatten(0, 1)


class SteppedRMSNorm(SpikingRMSNorm):
    """Currents [T * B, L, D] to spikes [T * B, L, P * D]; `last`: the final norm, whose spikes leave as [B, L, S, D].

    The wires of a step lie side by side: transformers' attention takes the first axes of q, k and v from what its norm gives. Behind
    them, and behind the D of the final norm, there may be an amplitude.
    """

    neuron: SteppedNeuron
    last: bool

    @classmethod
    def of(cls, norm: SpikingRMSNorm, *, last: bool) -> Self:
        """The same weight and table."""
        module = cls(norm.weight, norm.eps)
        module.neuron, module.last = SteppedNeuron.adopt(neuron_of(norm)), last
        return module

    def forward(self, x: Float[Tensor, "TB L D"]) -> Int8[Tensor, "..."]:
        """Spikes of the norm's neuron, from the integrated currents."""
        normed = self.normalise(events.integrate(unbatch(x, self.neuron.T)))
        spikes, amplitude = self.neuron(normed), self.neuron.amplitude(normed)
        if self.last:
            return attached(spikes.permute(1, 2, 0, 3), None if amplitude is None else amplitude[:, :, None])
        return attached(spikes.unflatten(0, (self.neuron.T, -1)).movedim(1, -2).flatten(-2), amplitude).flatten(0, 1)


class SteppedHeadNorm(nn.Module):
    """The norm of q or k between its projection and RoPE (Qwen3): currents in, currents out."""

    norm: Any

    def __init__(self, norm: Any, T: int) -> None:
        super().__init__()
        self.weight, self.T = norm.weight, T  # under the name that it has in the folded network
        vars(self)["norm"] = norm  # no child, which would have the weight under another

    def forward(self, x: Float[Tensor, "TB L H E"]) -> Float[Tensor, "TB L H E"]:
        """The norm of the integrated currents, as the current of the last step."""
        normed = functional_call(self.norm, {"weight": self.weight}, (events.integrate(unbatch(x, self.T)),))
        return at_last_step(normed, self.T).flatten(0, 1)


class SteppedActivation(SpikingActivation):
    """Currents [T * B, L, F] to spikes of SiLU's neuron."""

    neuron: SteppedNeuron

    @classmethod
    def of(cls, activation: SpikingActivation) -> Self:
        """The same function and table."""
        module = cls(activation.function)
        module.neuron = SteppedNeuron.adopt(neuron_of(activation))
        return module

    def forward(self, x: Float[Tensor, "TB L F"]) -> Int8[Tensor, "SB L F"]:
        """Spikes of SiLU's neuron on its S wires."""
        return self.neuron(self.activate(events.integrate(unbatch(x, self.neuron.T)))).flatten(0, 1)


class SteppedLinear(nn.Linear):
    """A Linear that reads spikes [T * B, L, P * I] of a norm's neuron with the output weights `wires`: currents [T * B, L, O].

    Args:
        populations: P of the neuron.
        amplitude_bits: of the token's amplitude behind its spikes; 0: there is none.
        chunk: time steps a product, at most; None: all.
        compiled: products in C++, where it has them.
    """

    wires: Tensor
    populations: int
    amplitude_bits: int
    chunk: int | None
    compiled: bool

    @classmethod
    def of(cls, linear: nn.Linear, neuron: PhaseNeuron, chunk: int | None) -> Self:
        """The same weight and bias, behind `neuron`."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias, module.chunk = linear.weight, linear.bias, chunk
        module.populations, module.compiled = neuron.digits.populations, neuron.compiled
        module.amplitude_bits = 8 * neuron.theta.itemsize if neuron.per_token else 0
        module.register_buffer("wires", neuron.table.wires, persistent=False)
        return module

    @property
    def options(self) -> dict[str, Any]:
        """Of a product with this weight."""
        return {"populations": self.populations, "bias": self.bias, "chunk": self.chunk, "compiled": self.compiled}

    def parts(self, spikes: Int8[Tensor, "S *rows I"], amplitude: Float[Tensor, "*rows 1"] | None) -> Iterator[Float[Tensor, "t *rows O"]]:
        """Currents of consecutive steps."""
        return events.linear(spikes, self.weight, self.wires, scale=amplitude, **self.options)

    def total(self, spikes: Int8[Tensor, "S *rows I"], amplitude: Float[Tensor, "*rows 1"] | None) -> Float[Tensor, "*rows O"]:
        """Their sum over time."""
        return events.linear_sum(spikes, self.weight, self.wires, scale=amplitude, **self.options)

    @property
    def T(self) -> int:
        """Time steps."""
        return self.wires.shape[1] // self.populations

    def received(self, input: Int8[Tensor, "TB L W"]) -> tuple[Int8[Tensor, "S B L I"], Float[Tensor, "B L 1"] | None]:
        """The train, wire by wire, and the tokens' amplitudes: the wires of a step come side by side, the amplitude behind them."""
        spikes, amplitude = detached(unbatch(input, self.T), self.amplitude_bits)
        return spikes.unflatten(-1, (self.populations, -1)).movedim(-2, 1).flatten(0, 1), amplitude

    def forward(self, input: Int8[Tensor, "TB L W"]) -> Float[Tensor, "TB L O"]:
        """Currents d_t (W s_t) of every step."""
        return joined(self.parts(*self.received(input)), self.T).flatten(0, 1)


class SteppedUp(SteppedLinear):
    """up_proj: what it has summed up after its T steps, held for as many wires as SiLU's spikes gate it on."""

    held: int

    def forward(self, input: Int8[Tensor, "TB L W"]) -> Float[Tensor, "HB L O"]:
        """The summed current at each of the S steps of SiLU's spikes."""
        total = self.total(*self.received(input))
        return total.expand(self.held, *total.shape).flatten(0, 1)  # a view for batch 1


class SteppedHead(SteppedLinear):
    """lm_head: spikes [*rows, S, D] of the final norm to logits [*rows, V], summed over time."""

    def received(self, input: Int8[Tensor, "*rows S W"]) -> tuple[Int8[Tensor, "S *rows D"], Float[Tensor, "*rows 1"] | None]:
        """The train, time first, and the tokens' amplitudes."""
        return detached(input.movedim(-2, 0), self.amplitude_bits)

    def forward(self, input: Int8[Tensor, "*rows S D"]) -> Float[Tensor, "*rows V"]:
        """Logits: the sum of the currents over time."""
        return self.total(*self.received(input))

    def readouts(self, input: Int8[Tensor, "*rows S D"]) -> Iterator[Float[Tensor, "*rows V"]]:
        """The logits after 1, 2, .. T steps of the final norm's neuron: one tensor, which the next step adds to."""
        total = None
        for part in self.parts(*self.received(input)):
            for current in part:
                total = current.clone() if total is None else total.add_(current)
                yield total


class SteppedSpikingLinear(SpikingLinear):
    """o_proj or down_proj: integrates its input currents, applies R4, fires, and sends on d_t (W s_t).

    `incoming` [C, S]: output weights of the S wires whose spikes have made the input (SiLU's, before down_proj); None: currents.
    """

    neuron: SteppedNeuron
    incoming: Tensor | None
    chunk: int | None

    @classmethod
    def of(cls, linear: SpikingLinear, *, incoming: Float[Tensor, "C S"] | None, chunk: int | None) -> Self:
        """The same weight, bias, table and R4."""
        module = cls.adopt(linear)
        module.neuron, module.chunk, module.rotation = SteppedNeuron.adopt(neuron_of(linear)), chunk, linear.rotation
        module.register_buffer("incoming", incoming, persistent=False)
        return module

    def forward(self, x: Float[Tensor, "SB L I"]) -> Float[Tensor, "TB L O"]:
        """Currents d_t (W s_t) of the neuron's spikes, from the currents that it integrates."""
        T = self.neuron.T
        if self.incoming is None:
            total = events.integrate(unbatch(x, T))
        else:
            weights = step_weights(self.incoming, x.shape[-1]).to(x.dtype)
            total = events.integrate(unbatch(x, self.incoming.shape[1]), weights)
        total, neuron = self.transform(total), self.neuron
        parts = events.linear(
            neuron(total), self.weight, neuron.wires, populations=neuron.populations, scale=neuron.amplitude(total), bias=self.bias,
            chunk=self.chunk, compiled=neuron.compiled,
        )  # fmt: skip
        return joined(parts, T).flatten(0, 1)


def joined(parts: Iterator[Float[Tensor, "t *rows O"]], T: int) -> Float[Tensor, "T *rows O"]:
    """Currents of consecutive steps in one tensor."""
    first = next(parts)
    if len(first) == T:
        return first
    whole = first.new_empty(T, *first.shape[1:])
    start = 0
    while True:
        whole[start : start + len(first)] = first
        start += len(first)
        if start == T:
            return whole
        first = next(parts)
