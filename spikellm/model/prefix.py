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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.model.attention import attending, attentions
from spikellm.model.blocks import Block, enter, walk
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import DOWN, HEAD, decoder_layers, sites

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
    found = _outliers(model, windows, eta)
    for window, outliers in zip(windows, found.any(0), strict=True):
        everywhere.update(window[outliers].tolist())
        frequent.update(window[1:][outliers[1:]].tolist())
    number = min(ceil(found.sum((1, 2)).max().item() / len(windows)), max_tokens)
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

    def remaining(candidate: list[int]) -> int:
        attach_prefix(model, candidate)
        return int(_outliers(model, windows, eta).sum((1, 2)).max())

    alone = remaining(tokens[-1:])
    if alone < len(windows) or alone < 4 * remaining(tokens):
        return tokens[-1:]
    losses = []
    for candidate in (tokens[-1:], tokens):
        attach_prefix(model, candidate)
        losses.append(sum(_loss(model, window, state) for window, state in zip(text, walk(model, text.split(1)), strict=True)))
    return tokens if losses[1] <= losses[0] else tokens[-1:]


def _loss(model: PreTrainedModel, window: Int[Tensor, " L"], state: Float[Tensor, "1 L D"]) -> float:
    """Mean token loss, as the model itself takes it."""
    logits = model.get_submodule(HEAD)(state)
    return model.loss_function(logits, labels=window[None].to(logits.device), vocab_size=model.config.vocab_size).item()


@torch.no_grad()
def _outliers(model: PreTrainedModel, windows: Int[Tensor, "W L"], eta: float) -> Bool[Tensor, "layers W L"]:
    """Which tokens are outliers, at every layer."""
    states, blocks = enter(model, windows.split(1))
    found = []
    for block in tqdm(blocks.layers, desc="prefix tokens", unit="block", leave=False, disable=None):
        with _peaks(block) as peaks:
            block.advance(states)
        found.append(torch.stack([peak > eta * peak.median() for peak in peaks]))
    return torch.stack(found)


@contextmanager
def _peaks(block: Block) -> Iterator[list[Tensor]]:
    """Within: every window that passes a layer leaves its tokens' largest |x| at down_proj's input."""
    peaks: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        peaks.append(inputs[0].abs().amax(-1).flatten().float().cpu())

    handle = block.module.get_submodule(DOWN).register_forward_pre_hook(keep)
    try:
        yield peaks
    finally:
        handle.remove()


ATTACHED = "attached_prefix_tokens"  # attribute of a model
# RoPE whose frequencies depend on how long the sequence is: a prefix at positions -P .. -1 would have those of a short one.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def why_no_prefix(config: Any) -> str | None:
    """What keeps a model of this configuration from having a prefix; None: nothing."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope not in LENGTH_DEPENDENT_ROPE:
        return None
    return f"rope_parameters.rope_type={rope!r}: RoPE turns keys by the length of the sequence, and a prefix has none"


def attached_prefix(model: PreTrainedModel) -> list[int] | None:
    """What `attach_prefix` has put before every sequence; None: it was not called."""
    found: list[int] | None = vars(model).get(ATTACHED)
    return found


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
    if tokens and why_no_prefix(model.config):
        raise ValueError(f"{why_no_prefix(model.config)}; take prefix.enabled=false")
    for attention in attentions(model):
        attention.clear_prefix()
    vars(model)[ATTACHED] = [] if not tokens else None
    if not tokens:
        return
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(-len(tokens), 0, device=model.device)[None]
    with attending(model, rotation=None):  # the cache then holds keys as RoPE leaves them; scores are the same
        # as a tuple: transformers 5.24 renamed the output's field
        _, cache = model.base_model(ids, position_ids=positions, use_cache=True, return_dict=False)
    for attention, entry in zip(attentions(model), cache.layers, strict=True):
        attention.set_prefix(entry.keys[0], entry.values[0])
    vars(model)[ATTACHED] = list(tokens)
