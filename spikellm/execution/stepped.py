"""Time-stepped execution of a converted model: spikes on every wire that leaves a neuron, the same sums as folded execution.

Each module with a neuron, and each that reads one, gets a stepped sibling for as long as `stepped` lasts. transformers' own
forwards run unchanged, because time travels in the batch axis, time first: [T * B, L, D].

    embedding      the current of a token comes at the first step
    residual       currents x_t; transformers adds them step by step. RoPE is linear: it turns currents
    norms          act once on the integrated current; the neuron then fires T steps: int8 [T * B, L, P * D]
    SiLU           likewise: int8 [S * B, L, D]
    Linears        sum_p d_p,t (W s_p,t), a current a step; biases once
    q, k norms     (Qwen3) act once on the integrated current, at the last step
    attention      q, k, v integrate and fire; scores by spike pairs; the softmax acts on them once, its neuron's spikes collect
                   rows of the accumulated values; the quotient of `snn.softmax_norm=after` at the last step
    gate product   SiLU and up integrate in the same T steps, so while SiLU fires, up's sum U is complete: the difference
                   A_t U - A_t-1 U is d_t s_t U; the spikes of every wire gate U, d is applied where down_proj integrates
    R3, R4         dense and linear: applied to the integrated current
    final norm     its spikes go to lm_head as [B, L, S, D], so that a model's outputs have batch B again; logits are summed over T

A neuron of P populations (ON and OFF, intervals of |x|) has a wire for each, S = T P wires in all: they fire side by side, in the same
T steps, and what reads them adds them up to T currents. Wires are numbered step by step and in each step population by population; sites
may differ in P.

Currents and sums are float32 (float64 in float64 models), whatever the checkpoint's dtype, as in folded execution (`model/modules.py`).

Anytime readout: the logits after t steps are lm_head's sum over the first t spikes of the final norm's neuron. Steps are cheap to
stop there: everything below has been computed anyway, and at t = T they are the model's logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikellm.coding.neuron import PhaseNeuron
from spikellm.execution.attention import SteppedAttention
from spikellm.execution.modules import (
    SteppedActivation,
    SteppedEmbedding,
    SteppedHead,
    SteppedHeadNorm,
    SteppedLinear,
    SteppedRMSNorm,
    SteppedSpikingLinear,
    SteppedUp,
)
from spikellm.model.conversion import get_neuron, model_sites, replace
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import (
    ACTIVATION,
    ATTENTION,
    ATTENTION_NORM,
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    HEAD_NORMS,
    KEY,
    LAYERS,
    MLP_NORM,
    OUTPUT,
    QUERY,
    SPIKING_ATTENTION,
    UP,
    VALUE,
    decoder_layers,
)

READERS = {QUERY: ATTENTION_NORM, KEY: ATTENTION_NORM, VALUE: ATTENTION_NORM, GATE: MLP_NORM}


def _siblings(model: PreTrainedModel, chunk: int | None) -> dict[str, nn.Module]:
    """Path -> stepped sibling of every module that sends or reads spikes or currents."""

    def module(path: str) -> Any:
        return model.get_submodule(path)

    T = module(FINAL_NORM).neuron.table.T
    found: dict[str, nn.Module] = {
        EMBEDDING: SteppedEmbedding.adopt(module(EMBEDDING), T),
        FINAL_NORM: SteppedRMSNorm.of(module(FINAL_NORM), last=True),
        HEAD: SteppedHead.of(module(HEAD), module(FINAL_NORM).neuron, chunk),
    }
    for index in range(len(decoder_layers(model))):
        layer = f"{LAYERS}.{index}."
        for norm in (ATTENTION_NORM, MLP_NORM):
            found[layer + norm] = SteppedRMSNorm.of(module(layer + norm), last=False)
        for reader, norm in READERS.items():
            found[layer + reader] = SteppedLinear.of(module(layer + reader), module(layer + norm).neuron, chunk)
        gate = module(layer + ACTIVATION).neuron.table.wires
        up = SteppedUp.of(module(layer + UP), module(layer + MLP_NORM).neuron, chunk)
        up.held = gate.shape[1]
        found[layer + UP] = up
        for name in HEAD_NORMS:
            if (head_norm := getattr(module(layer + ATTENTION), name, None)) is not None:
                found[f"{layer}{ATTENTION}.{name}"] = SteppedHeadNorm(head_norm, T)
        found[layer + ACTIVATION] = SteppedActivation.of(module(layer + ACTIVATION))
        found[layer + OUTPUT] = SteppedSpikingLinear.of(module(layer + OUTPUT), incoming=None, chunk=chunk)
        found[layer + DOWN] = SteppedSpikingLinear.of(module(layer + DOWN), incoming=gate, chunk=chunk)
        attention = f"{layer}{ATTENTION}.{SPIKING_ATTENTION}"
        found[attention] = SteppedAttention.of(module(attention))
    return found


def _repeat(value: object, T: int) -> object:
    """A mask of B rows for T * B."""
    if isinstance(value, dict):
        return {key: _repeat(entry, T) for key, entry in value.items()}
    return value.repeat(T, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


@contextmanager
def stepped(model: PreTrainedModel, *, chunk: int | None = None) -> Iterator[PreTrainedModel]:
    """Within: `model` runs step by step, called like the folded one, also by `generate`; a cache holds sums, as there.

    Nothing has a gradient there. Its sites' slots hold `SteppedNeuron`s; lm_head is a `SteppedHead`. Afterwards it is folded again.

    Args:
        model: converted (`spikellm.convert`), one T at all sites.
        chunk: time steps a matrix product, at most; None: all.

    Raises:
        ValueError: a site carries no neuron, or sites differ in T.
    """
    steps: set[int] = set()
    for site in model_sites(model):
        if not isinstance(neuron := get_neuron(model, site), PhaseNeuron):
            raise ValueError(f"{site.name} carries no neuron: convert the model before it is run in steps")
        steps.add(neuron.table.T)
    if len(steps) > 1:
        raise ValueError(f"sites differ in their number of time steps, {sorted(steps)}: stepped execution needs one T")
    T = steps.pop()

    def repeat_masks(_: nn.Module, arguments: tuple, keywords: dict[str, object]) -> tuple[tuple, dict[str, object]]:
        if keywords.get("inputs_embeds") is not None:
            raise ValueError("stepped execution takes input_ids: the embedding decides at which step a token's current comes")
        if keywords.get("output_hidden_states") or getattr(model.config, "output_hidden_states", False):
            raise ValueError("output_hidden_states: stepped execution has currents of every step there; ask for them outside of it")
        keywords = dict(keywords)
        keywords["attention_mask"] = _repeat(keywords.get("attention_mask"), T)
        positions = keywords.get("position_ids")
        if isinstance(positions, Tensor) and len(positions) > 1:
            keywords["position_ids"] = _repeat(positions, T)
        return arguments, keywords

    siblings = _siblings(model, chunk)
    folded = {path: model.get_submodule(path) for path in siblings}
    for path, sibling in siblings.items():
        replace(model, path, sibling)
    handle = model.base_model.register_forward_pre_hook(repeat_masks, with_kwargs=True)
    try:
        with torch.no_grad():  # trains are int8: a gradient would end there without a word
            yield model.eval()
    finally:
        handle.remove()
        for path, module in folded.items():
            model.set_submodule(path, module)
