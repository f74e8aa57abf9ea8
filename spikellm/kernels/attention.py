"""Attention on plain tensors: products of heads that share keys, the two ways to normalise, what an error of a weight counts, blocks."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikellm.kernels.encode import Digits, Rows, encode_plain


def per_key_head(x: Float[Tensor, "B H l m"], y: Float[Tensor, "B K m n"]) -> Float[Tensor, "B H l n"]:
    """x @ y where H / K query heads share a key head: they are stacked, so that keys are not repeated."""
    B, H, L, M = x.shape
    K = y.shape[1]
    return (x.reshape(B, K, H // K * L, M) @ y).view(B, H, L, y.shape[-1])


def squared_distances(x: Float[Tensor, "B H l E"], y: Float[Tensor, "B K s E"]) -> Float[Tensor, "B H l s"]:
    """|x_i - y_j|^2 where H / K query heads share a key head."""
    y_power = y.square().sum(-1).repeat_interleave(x.shape[1] // y.shape[1], 1)
    return (x.square().sum(-1)[..., None] + y_power[:, :, None] - 2 * per_key_head(x, y.mT)).clamp_min(0)


def probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax of the visible scores; the row of a query that sees nothing (padding) is uniform, as in transformers."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)


def prefix_weights(scores: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s - M) of the prefix [B, H, l, P] and c = exp(m - M) [B, H, l, 1], with m = `top` and M the largest score of all."""
    highest = torch.maximum(top, scores.amax(-1, keepdim=True))
    return (scores - highest).exp(), (top - highest).exp()


def exponentials(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """exp(s - m) with m the largest visible score of the row, 0 where masked; and m [B, H, l, 1]."""
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # finite where a query sees nothing
    return (scores - top).exp(), top


def coded(weights: Float[Tensor, "B H l s"], rows: Rows, digits: Digits, cuts: Tensor | None) -> Float[Tensor, "B H l s"]:
    """Weights sent through neurons, a table per head or one for all."""
    B, H, L, S = weights.shape
    groups = len(rows.v0) // digits.populations
    return encode_plain(weights.view(B * H // groups, groups, L * S), rows, digits, cuts).view(B, H, L, S)


def coded_exponentials(scores: Tensor, mask: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials`, `coded`, their row sums, and m."""
    weights, top = exponentials(scores, mask)
    weights = coded(weights, rows, digits, cuts)
    return weights, weights.sum(-1, keepdim=True), top


def coded_mixture(
    query: Float[Tensor, "B H l E"],
    key: Float[Tensor, "B K s E"],
    value: Float[Tensor, "B K s E"],
    mask: Bool[Tensor, "B 1 l s"],
    scaling: float,
    prefix: tuple[Float[Tensor, "1 K P E"], Float[Tensor, "1 K P E"]] | None,
    rows: Rows | None,
    digits: Digits,
    cuts: Tensor | None,
) -> Float[Tensor, "B H l E"]:
    """Values mixed by coded exponentials, normalised afterwards: (c sum_j e^_j v_j + a V) / (c sum_j e^_j + a), see model/attention.py.

    rows: None: exponentials are not coded.
    """
    query = query * scaling
    scores = per_key_head(query, key.mT)
    if rows is None:
        weights, top = exponentials(scores, mask)
        total = weights.sum(-1, keepdim=True)
    else:
        weights, total, top = coded_exponentials(scores, mask, rows, digits, cuts)
    return normalised(per_key_head(weights, value), total, top, query, prefix)


def coded_average(
    query: Float[Tensor, "B H l E"],
    key: Float[Tensor, "B K s E"],
    value: Float[Tensor, "B K s E"],
    mask: Bool[Tensor, "B 1 l s"],
    scaling: float,
    rows: Rows,
    digits: Digits,
    cuts: Tensor | None,
) -> Float[Tensor, "B H l E"]:
    """Values mixed by coded probabilities, which are normalised before: sum_j p^_j v_j, see model/attention.py."""
    return per_key_head(coded(probabilities(per_key_head(query * scaling, key.mT), mask), rows, digits, cuts), value)


def normalised(
    mixed: Float[Tensor, "B H l E"],
    total: Float[Tensor, "B H l 1"],
    top: Float[Tensor, "B H l 1"],
    query: Float[Tensor, "B H l E"],
    prefix: tuple[Float[Tensor, "1 K P E"], Float[Tensor, "1 K P E"]] | None,
) -> Float[Tensor, "B H l E"]:
    """Mixtures of exponentials over their sums, the prefix among both."""
    total, share, sink = beside_prefix(total, top, query, prefix)
    if prefix is not None and sink is not None:
        mixed = torch.addcmul(per_key_head(sink, prefix[1].expand(len(query), -1, -1, -1)), share, mixed)
    return mixed / total


def beside_prefix(
    total: Float[Tensor, "B H l 1"],
    top: Float[Tensor, "B H l 1"],
    query: Float[Tensor, "B H l E"],
    prefix: tuple[Float[Tensor, "1 K P E"], Float[Tensor, "1 K P E"]] | None,
) -> tuple[Float[Tensor, "B H l 1"], Float[Tensor, "B H l 1"], Float[Tensor, "B H l P"] | None]:
    """What a row's mixture is divided by, c = exp(m - M), and the exponentials of the prefix; from `total`, the sum of the others."""
    share, sink = torch.ones_like(top), None
    if prefix is not None:
        sink, share = prefix_weights(per_key_head(query, prefix[0].expand(len(query), -1, -1, -1).mT), top)
        total = torch.addcmul(sink.sum(-1, keepdim=True), share, total)
    return torch.where(total == 0, 1, total), share, sink  # 0: no spike was sent, and there is no prefix: nothing is mixed


def mixture_plain(
    query: Float[Tensor, "B H L E"],
    key: Float[Tensor, "B K S E"],
    value: Float[Tensor, "B K S E"],
    mask: Bool[Tensor, "B 1 L S"],
    scaling: float,
    prefix: tuple[Float[Tensor, "1 K P E"], Float[Tensor, "1 K P E"]] | None,
    rows: Rows | None,
    digits: Digits,
    cuts: Tensor | None,
    block: int,
) -> Float[Tensor, "B H L E"]:
    """`coded_mixture`, `block` queries at a time. The specification."""

    def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return coded_mixture(query, key, value, mask, scaling, prefix, rows, digits, cuts)

    return _in_blocks(mix, query, key, value, mask, block)


def average_plain(
    query: Float[Tensor, "B H L E"],
    key: Float[Tensor, "B K S E"],
    value: Float[Tensor, "B K S E"],
    mask: Bool[Tensor, "B 1 L S"],
    scaling: float,
    rows: Rows,
    digits: Digits,
    cuts: Tensor | None,
    block: int,
) -> Float[Tensor, "B H L E"]:
    """`coded_average`, `block` queries at a time. The specification."""

    def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return coded_average(query, key, value, mask, scaling, rows, digits, cuts)

    return _in_blocks(mix, query, key, value, mask, block)


def _in_blocks(mix: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor, block: int) -> Tensor:
    """What a form of attention makes of `block` queries and the keys that they may see, block by block."""
    blocks = visible_blocks(mask.shape[2], visible_ends(mask, block), block)
    return torch.cat([mix(query[:, :, some], key[:, :, seen], value[:, :, seen], mask[:, :, some, seen]) for some, seen in blocks], dim=2)


def visible_blocks(queries: int, ends: list[int], size: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of every block of `size` queries: the keys up to the last that any of its queries may see, `visible_ends`."""
    starts = range(0, queries, size)
    return [(slice(start, min(start + size, queries)), slice(0, end)) for start, end in zip(starts, ends, strict=True)]


def visible_ends(mask: Bool[Tensor, "B 1 L S"], size: int) -> list[int]:
    """Behind the last key that any query of each block of `size` may see; at least 1."""
    L, S = mask.shape[-2:]
    seen = torch.stack([mask[:, :, start : start + size].flatten(0, 2).any(0) for start in range(0, L, size)])
    return (seen * torch.arange(1, S + 1, device=mask.device)).amax(-1).clamp_min(1).tolist()
