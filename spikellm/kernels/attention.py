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


def coded_exponentials(scores: Tensor, mask: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials` sent through neurons (a table per head, or one for all), their row sums, and m."""
    weights, top = exponentials(scores, mask)
    B, H, L, S = weights.shape
    groups = len(rows.v0) // digits.populations
    coded = encode_plain(weights.view(B * H // groups, groups, L * S), rows, digits, cuts).view(B, H, L, S)
    return coded, coded.sum(-1, keepdim=True), top


def visible_blocks(mask: Bool[Tensor, "B 1 L S"], size: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of every block of `size` queries: the keys up to the last that any of its queries may see."""
    L, S = mask.shape[-2:]
    rows = [slice(start, min(start + size, L)) for start in range(0, L, size)]
    seen = torch.stack([mask[:, :, block].flatten(0, 2).any(0) for block in rows])
    last = (seen * torch.arange(1, S + 1, device=mask.device)).amax(-1).tolist()
    return [(block, slice(0, max(stop, 1))) for block, stop in zip(rows, last, strict=True)]
