"""Attention on plain tensors: products of heads that share keys, the two ways to normalise, what an error of a weight counts, blocks."""

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
    rows: Rows,
    digits: Digits,
    cuts: Tensor | None,
) -> Float[Tensor, "B H l E"]:
    """Values mixed by coded exponentials, normalised afterwards: (c sum_j e^_j v_j + a V) / (c sum_j e^_j + a), see model/attention.py."""
    query = query * scaling
    weights, total, top = coded_exponentials(per_key_head(query, key.mT), mask, rows, digits, cuts)
    return normalised(per_key_head(weights, value), total, top, query, prefix)[0]


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
) -> tuple[Float[Tensor, "B H l E"], Float[Tensor, "B H l 1"]]:
    """Mixtures of exponentials over their sums, the prefix among both; and the share that one exponential has, c / sum."""
    share = torch.ones_like(top)
    if prefix is not None:
        sink_key, sink_value = (each.expand(len(query), -1, -1, -1) for each in prefix)
        sink, share = prefix_weights(per_key_head(query, sink_key.mT), top)
        mixed = torch.addcmul(per_key_head(sink, sink_value), share, mixed)
        total = torch.addcmul(sink.sum(-1, keepdim=True), share, total)
    total = torch.where(total == 0, 1, total)  # no spike was sent, and there is no prefix: nothing is mixed
    return mixed / total, share / total


def visible_ends(mask: Bool[Tensor, "B 1 L S"], size: int) -> list[int]:
    """Behind the last key that any query of each block of `size` may see; at least 1."""
    L, S = mask.shape[-2:]
    seen = torch.stack([mask[:, :, start : start + size].flatten(0, 2).any(0) for start in range(0, L, size)])
    return (seen * torch.arange(1, S + 1, device=mask.device)).amax(-1).clamp_min(1).tolist()
