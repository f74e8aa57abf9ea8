"""What time-stepped execution needs of memory, and how many time steps a product may take so that it fits."""

from typing import Any

from spikellm.config.checks import InputError
from spikellm.execution.modules import neuron_of
from spikellm.model.attention import attentions
from spikellm.model.conversion import get_neuron, model_sites
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import FINAL_NORM, SiteKind

# Logits are [tokens, V] in float32: 256 rows of LLaMA-3's vocabulary take 131 MB.
LOGIT_ROWS = 256


def peak_bytes(model: PreTrainedModel, tokens: int, *, chunk: int) -> int:
    """What a stepped forward of `tokens` tokens and their logits needs at its highest: weights and activations, an estimate.

    Counted are the tensors that live together in the widest places: the MLP, a block of attention, the logits.
    """
    config, attention = model.config, attentions(model)[0]
    T = neuron_of(attention, "query").table.T
    wires = dict.fromkeys(SiteKind, T)
    for site in model_sites(model):
        neuron: Any = get_neuron(model, site)
        wires[site.kind] = max(wires[site.kind], T * neuron.digits.populations)
    size = attention.dtype.itemsize
    prefix = 0 if attention.prefix_key is None else attention.prefix_key.shape[1]
    heads, width = config.num_attention_heads, config.intermediate_size
    residual = 2 * T * tokens * config.hidden_size * size
    gated, sent = wires[SiteKind.activation], max(wires[SiteKind.activation], wires[SiteKind.mlp_product])
    # currents and spikes on all wires; integrated sums; operand (or digits of weights) and result of a product
    mlp = tokens * width * (gated * size + 2 * sent + 5 * size + 2 * chunk * size)
    block = heads * min(attention.query_block, tokens) * (tokens + prefix) * (7 * size + 2 * wires[SiteKind.softmax])
    channels = {SiteKind.query: heads, SiteKind.key: config.num_key_value_heads, SiteKind.value: config.num_key_value_heads}
    coded = sum(number * (2 * T * size + 2 * wires[kind]) for kind, number in channels.items())
    mixing = tokens * attention.head_width * (coded + heads * 2 * T * size) + block
    logits = min(LOGIT_ROWS, tokens) * config.vocab_size * (chunk + 2) * size
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return weights + max(residual + max(mlp, mixing), wires[SiteKind.head_input] * tokens * config.hidden_size + logits)


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
