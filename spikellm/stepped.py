"""Time-stepped execution of a converted model: spikes on every wire that leaves a neuron, the same sums as folded execution.

Each module with a neuron, and each that reads one, gets a stepped sibling for as long as `stepped` lasts. transformers' own
forwards run unchanged, because time travels in the batch axis, time first: [T * B, L, D].

    embedding      the current of a token comes at the first step
    residual       currents x_t; transformers adds them step by step. RoPE is linear: it turns currents
    norms, SiLU    act once on the integrated current; the neuron then fires T steps: int8 [T * B, L, D]
    Linears        d_t (W s_t); biases once
    q, k norms     (Qwen3) act once on the integrated current, at the last step
    attention      q, k, v integrate and fire; scores by spike pairs; the softmax acts on them once, its neuron's spikes collect
                   rows of the accumulated values; the quotient of `snn.softmax_norm=after` at the last step
    gate product   SiLU and up integrate in the same T steps, so while SiLU fires, up's sum U is complete: the difference
                   A_t U - A_t-1 U is d_t s_t U; the spikes gate U, d_t is applied where down_proj integrates
    R3, R4         dense and linear: applied to the integrated current
    final norm     its spikes go to lm_head as [B, L, T, D], so that a model's outputs have batch B again; logits are summed over T

Currents and sums are float32 (float64 in float64 models), whatever the checkpoint's dtype, as in folded execution (`modules.py`).

Anytime readout: the logits after t steps are lm_head's sum over the first t spikes of the final norm's neuron. Steps are cheap to
stop there: everything below has been computed anyway, and at t = T they are the model's logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikellm.attention import SpikingAttention
from spikellm.config import InputError
from spikellm.conversion import get_neuron, model_sites, replace
from spikellm.evaluation import LOGIT_ROWS
from spikellm.neuron import PhaseNeuron
from spikellm.sites import (
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
from spikellm.stepped_attention import SteppedAttention
from spikellm.stepped_modules import (
    SteppedActivation,
    SteppedEmbedding,
    SteppedHead,
    SteppedHeadNorm,
    SteppedLinear,
    SteppedRMSNorm,
    SteppedSpikingLinear,
    SteppedUp,
    neuron_of,
)

READERS = {QUERY: ATTENTION_NORM, KEY: ATTENTION_NORM, VALUE: ATTENTION_NORM, GATE: MLP_NORM}


def _siblings(model: PreTrainedModel, chunk: int | None) -> dict[str, nn.Module]:
    """Path -> stepped sibling of every module that sends or reads spikes or currents."""

    def module(path: str) -> Any:
        return model.get_submodule(path)

    def weights(path: str) -> Tensor:
        return module(path).neuron.d

    T = module(FINAL_NORM).neuron.table.T
    found: dict[str, nn.Module] = {
        EMBEDDING: SteppedEmbedding.adopt(module(EMBEDDING), T),
        FINAL_NORM: SteppedRMSNorm.of(module(FINAL_NORM), last=True),
        HEAD: SteppedHead.of(module(HEAD), weights(FINAL_NORM), chunk),
    }
    for index in range(len(decoder_layers(model))):
        layer = f"{LAYERS}.{index}."
        for norm in (ATTENTION_NORM, MLP_NORM):
            found[layer + norm] = SteppedRMSNorm.of(module(layer + norm), last=False)
        for reader, norm in READERS.items():
            found[layer + reader] = SteppedLinear.of(module(layer + reader), weights(layer + norm), chunk)
        table = module(layer + ACTIVATION).neuron.table
        gate = torch.cat([half.d for half in table.halves()], 1) if table.two_sided else table.d
        up = SteppedUp.of(module(layer + UP), weights(layer + MLP_NORM), chunk)
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


def _repeat(value: Any, T: int) -> Any:
    """A mask of B rows for T * B."""
    if isinstance(value, dict):
        return {key: _repeat(entry, T) for key, entry in value.items()}
    return value.repeat(T, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


@contextmanager
def stepped(model: PreTrainedModel, *, chunk: int | None = None) -> Iterator[PreTrainedModel]:
    """Within: `model` runs step by step, called like the folded one (also by `generate`; a cache then holds T steps).

    Its sites' slots hold `SteppedNeuron`s; lm_head is a `SteppedHead`. Afterwards it is folded again.

    Args:
        model: converted (`conversion.convert`), one T at all sites.
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

    def repeat_masks(_: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if keywords.get("inputs_embeds") is not None:
            raise ValueError("stepped execution takes input_ids: the embedding decides at which step a token's current comes")
        keywords = dict(keywords)
        keywords["attention_mask"] = _repeat(keywords.get("attention_mask"), T)
        positions = keywords.get("position_ids")
        if positions is not None and len(positions) > 1:
            keywords["position_ids"] = _repeat(positions, T)
        return arguments, keywords

    siblings = _siblings(model, chunk)
    folded = {path: model.get_submodule(path) for path in siblings}
    for path, sibling in siblings.items():
        replace(model, path, sibling)
    handle = model.base_model.register_forward_pre_hook(repeat_masks, with_kwargs=True)
    try:
        yield model.eval()
    finally:
        handle.remove()
        for path, module in folded.items():
            model.set_submodule(path, module)


def peak_bytes(model: PreTrainedModel, tokens: int, *, chunk: int) -> int:
    """What a stepped forward of `tokens` tokens and their logits needs at its highest: weights and activations, an estimate.

    Counted are the tensors that live together in the widest places: the MLP, a block of attention, the logits.
    """
    config, attention = model.config, model.get_submodule(f"{LAYERS}.0.{ATTENTION}.{SPIKING_ATTENTION}")
    assert isinstance(attention, SpikingAttention)
    T = neuron_of(attention, "query").table.T
    size = attention.dtype.itemsize
    prefix = 0 if attention.prefix_key is None else attention.prefix_key.shape[1]
    heads, width = config.num_attention_heads, config.intermediate_size
    channels = (heads + 2 * config.num_key_value_heads) * attention.head_width
    residual = 2 * T * tokens * config.hidden_size * size
    trains = T * (2 if neuron_of(model.get_submodule(f"{LAYERS}.0.{ACTIVATION}")).two_sided else 1)
    # currents and spikes of all steps; integrated sums; operand and result of a product
    mlp = tokens * width * (trains * (size + 2) + 5 * size + 2 * chunk * size)
    block = heads * min(attention.query_block, tokens) * (tokens + prefix) * (7 * size + 2 * T)
    mixing = tokens * channels * (2 * T * size + 2 * T) + tokens * heads * attention.head_width * 2 * T * size + block
    logits = min(LOGIT_ROWS, tokens) * config.vocab_size * (chunk + 2) * size
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return weights + max(residual + max(mlp, mixing), T * tokens * config.hidden_size + logits)


def fitting_chunk(model: PreTrainedModel, tokens: int, *, chunk: int | None, max_gib: float | None) -> int:
    """The most time steps per matrix product, up to `chunk` (None: all), with which a window of `tokens` fits into `max_gib`.

    Raises:
        InputError: a single step does not fit.
    """
    T = neuron_of(model.get_submodule(FINAL_NORM)).table.T
    most = min(chunk or T, T)
    if max_gib is None:
        return most
    needed = {size: peak_bytes(model, tokens, chunk=size) / 2**30 for size in range(most, 0, -1)}
    for size, gib in needed.items():
        if gib <= max_gib:
            return size
    raise InputError(
        f"snn.max_memory_gib={max_gib}: stepped execution of windows of {tokens} tokens needs about {needed[1]:.2f} GiB even at one step "
        f"per product; allow that much, or lower dataset.evaluation.window, hardware.query_block or snn.T"
    )
