"""Prefix tokens: the few tokens with massive activations, moved out of the neurons' way.

A first token and some separators carry activations hundreds of times the median and would set every tau. They are found on
calibration text (PrefixQuant, Chen et al. 2024): at every down_proj input a token is an outlier where its largest |x| exceeds
eta times the median token's; the worst layer's mean count per window, rounded up, is the number of prefix tokens; they are
the most frequent outlier tokens that do not stand first, then BOS.

Ours: keys and values of the prefix are computed once, in full precision, at RoPE positions -P .. -1, and stand before every
sequence; real tokens keep positions 0, 1, .. and the prefix tokens themselves never pass a neuron. Tokens other than BOS stay only
where they help and cost nothing: a prefix shifts what the model computes.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.model.attention import attentions
from spikellm.model.sites import DOWN, decoder_layers, sites

log = logging.getLogger(__name__)


@torch.no_grad()
def find_prefix_tokens(model: PreTrainedModel, windows: Int[Tensor, "W L"], *, eta: float, max_tokens: int, bos: int | None) -> list[int]:
    """Token ids of the prefix by PrefixQuant's rule, in order; empty where the model has no outlier tokens.

    Args:
        model: without neurons; original or rotated (the input of R4's online transform is looked at).
        windows: calibration text.
        eta: outlier threshold, in medians of the tokens' largest |x|.
        max_tokens: upper bound on the length.
        bos: the token for first-position outliers; None: the most frequent of all outlier tokens takes its place.
    """
    frequent: Counter[int] = Counter()
    everywhere: Counter[int] = Counter()
    counts = torch.zeros(len(decoder_layers(model)))
    for window, found in zip(windows, _outliers(model, windows, eta), strict=True):
        counts += found.sum(1)
        outliers = found.any(0)
        everywhere.update(window[outliers].tolist())
        frequent.update(window[1:][outliers[1:]].tolist())
    number = min(ceil(counts.max().item() / len(windows)), max_tokens)
    if number == 0:
        return []
    last = [bos] if bos is not None else [token for token, _ in everywhere.most_common(1)]
    others = [token for token, _ in frequent.most_common() if token not in last]
    return others[: number - len(last)] + last


@torch.no_grad()
def keep_what_helps(
    model: PreTrainedModel, windows: Int[Tensor, "W L"], tokens: list[int], *, eta: float, text: Int[Tensor, "W M"]
) -> list[int]:
    """`tokens`, or the last of them alone.

    The others stay if it leaves an outlier a window, they take three quarters of these away, and the loss does not rise.

    Args:
        model: installed (`conversion.install`), without neurons; its prefix is changed.
        windows: where outliers are counted.
        text: where the loss is taken; longer, because a prefix moves it by half a percent.
    """
    if len(tokens) < 2:
        return tokens
    remaining = []
    for candidate in (tokens[-1:], tokens):
        attach_prefix(model, candidate)
        remaining.append(torch.stack([found.sum(1) for found in _outliers(model, windows, eta)]).sum(0).max().item())
    if not len(windows) <= remaining[0] >= 4 * remaining[1]:
        return tokens[-1:]
    losses = []
    for candidate in (tokens[-1:], tokens):
        attach_prefix(model, candidate)
        rows = (window[None].to(model.device) for window in text)
        losses.append(sum(model(ids, labels=ids).loss.item() for ids in rows))
    return tokens if losses[1] <= losses[0] else tokens[-1:]


@torch.no_grad()
def _outliers(model: PreTrainedModel, windows: Int[Tensor, "W L"], eta: float) -> Iterator[Bool[Tensor, "layers L"]]:
    """For every window, which tokens are outliers at which layer."""
    with _peaks(model) as peaks:
        for window in tqdm(windows, desc="prefix tokens", unit="window", leave=False, disable=None):
            model.base_model(window[None].to(model.device), use_cache=False)
            yield torch.stack([peak > eta * peak.median() for peak in peaks.values()])


@contextmanager
def _peaks(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Within: every forward leaves the tokens' largest |x| at each layer's down_proj input."""
    layers = decoder_layers(model)
    peaks = {index: torch.empty(0) for index in range(len(layers))}
    index_of = {layer.get_submodule(DOWN): index for index, layer in enumerate(layers)}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        peaks[index_of[module]] = inputs[0].abs().amax(-1).flatten().float().cpu()

    handles = [module.register_forward_pre_hook(keep) for module in index_of]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


# RoPE whose frequencies depend on how long the sequence is: a prefix at positions -P .. -1 would have those of a short one.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@torch.no_grad()
def attach_prefix(model: PreTrainedModel, tokens: list[int]) -> None:
    """Compute keys and values of `tokens` and put them before every sequence.

    A prefix that was there before is taken away first; no tokens, no prefix.

    Raises:
        ValueError: the model has neurons or observers: what they make of the prefix would stay in it (`conversion.clear` takes them out);
            or its RoPE depends on the length of the sequence.
    """
    for site in sites(len(decoder_layers(model))):
        owner, attribute = site.slot
        if not getattr(model.get_submodule(owner), attribute).transparent:
            raise ValueError(f"a prefix is computed without neurons, and there is one at {site.name}: clear the model first")
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if tokens and rope in LENGTH_DEPENDENT_ROPE:
        raise ValueError(f"RoPE of type {rope!r} turns keys by the length of the sequence, a prefix has none; take prefix.enabled=false")
    for attention in attentions(model):
        attention.clear_prefix()
    if not tokens:
        return
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(-len(tokens), 0, device=model.device)[None]
    # as a tuple: transformers 5.24 renamed the output's field
    _, cache = model.base_model(ids, position_ids=positions, use_cache=True, return_dict=False)
    for attention, entry in zip(attentions(model), cache.layers, strict=True):
        attention.set_prefix(entry.keys[0], entry.values[0])
