"""Attention with neurons on q, k, v and the probabilities, for transformers' attention interface.

Two functions are registered under one name: the attention itself and its mask. Without the mask function transformers
would pass no mask and the model would silently stop being causal; the attention therefore refuses to run without one.

The neurons, R3 (an online Hadamard transform of q and k after RoPE: scores stay, outliers spread) and the prefix (keys and
values of a few outlier tokens, before every sequence) belong to the layer: they lie in its submodule `spiking`.

Queries are taken in blocks, and keys that no query of a block may see are left out: half of the work and a fraction of
the memory of the full [H, L, S] matrix.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spikellm.hadamard import hadamard_factors
from spikellm.sites import SPIKING_ATTENTION

IMPLEMENTATION = "spiking"


class SpikingAttention(nn.Module):
    """What the layer's attention needs: slots for four neurons, R3, the prefix.

    Args:
        head_width: E.
        rotated: apply R3.
        query_block: queries per block [tokens].
    """

    rotation: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None

    def __init__(self, head_width: int, *, rotated: bool, query_block: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.query: nn.Module = nn.Identity()
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.softmax: nn.Module = nn.Identity()
        self.head_width, self.query_block, self.dtype = head_width, query_block, dtype
        # not in the state dict: the width determines it
        self.register_buffer(
            "rotation", torch.empty(head_width, head_width, dtype=dtype, device=device) if rotated else None, persistent=False
        )
        self.register_buffer("prefix_key", None)
        self.register_buffer("prefix_value", None)
        self.reset_rotation()

    def reset_rotation(self) -> None:
        """Fill R3's matrix (again: it is not in checkpoints)."""
        if self.rotation is not None and not self.rotation.is_meta:
            left, right = hadamard_factors(self.head_width, dtype=torch.float64)
            self.rotation.copy_(torch.kron(left, right))

    def set_prefix(self, key: Float[Tensor, "K P E"], value: Float[Tensor, "K P E"]) -> None:
        """Keys (after RoPE, before R3) and values that stand before every sequence."""
        self.prefix_key, self.prefix_value = key.clone(), value.clone()

    def forward(
        self,
        query: Float[Tensor, "B H L E"],
        key: Float[Tensor, "B K S E"],
        value: Float[Tensor, "B K S E"],
        mask: Bool[Tensor, "B 1 L S"],
        scaling: float,
    ) -> Float[Tensor, "B L H E"]:
        if self.prefix_key is not None and self.prefix_value is not None:
            batch, prefix = key.shape[0], self.prefix_key.shape[1]
            key = torch.cat([self.prefix_key.expand(batch, -1, -1, -1), key], dim=2)
            value = torch.cat([self.prefix_value.expand(batch, -1, -1, -1), value], dim=2)
            mask = torch.cat([mask.new_ones(*mask.shape[:-1], prefix), mask], dim=-1)
        if self.rotation is not None:
            query, key = query @ self.rotation, key @ self.rotation
        query, key, value = self.query(query), self.key(key), self.value(value)
        blocks = [
            self._mix(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask[:, :, rows, keys], scaling)
            for rows, keys in visible_blocks(mask, self.query_block)
        ]
        return torch.cat(blocks, dim=2).transpose(1, 2)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Float[Tensor, "B H l E"]:
        """One block of queries. Query heads that share a key head are stacked, so that keys are not repeated."""
        B, H, L, E = query.shape
        K = key.shape[1]
        scores = (query * scaling).reshape(B, K, H // K * L, E) @ key.transpose(-1, -2)
        scores = scores.view(B, H, L, -1).masked_fill(~mask, torch.finfo(scores.dtype).min)
        probabilities = self.softmax(scores.softmax(-1, dtype=torch.float32)).to(value.dtype)
        return (probabilities.view(B, K, H // K * L, -1) @ value).view(B, H, L, E)


def visible_blocks(mask: Bool[Tensor, "B 1 L S"], size: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of every block of `size` queries: the keys up to the last that any of its queries may see."""
    L, S = mask.shape[-2:]
    rows = [slice(start, min(start + size, L)) for start in range(0, L, size)]
    seen = torch.stack([mask[:, :, block].flatten(0, 2).any(0) for block in rows])
    last = (seen * torch.arange(1, S + 1, device=mask.device)).amax(-1).tolist()
    return [(block, slice(0, max(stop, 1))) for block, stop in zip(rows, last, strict=True)]


def spiking_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Float[Tensor, "B L H E"], None]:
    """transformers' attention function; the layer must carry a `SpikingAttention`.

    Raises:
        ValueError: no mask came in, or the layer was not converted.
    """
    if attention_mask is None:
        raise ValueError(f"attention implementation {IMPLEMENTATION!r} needs its mask: register {IMPLEMENTATION!r} masks too")
    spiking = getattr(module, SPIKING_ATTENTION, None)
    if spiking is None:
        raise ValueError(f"layer {getattr(module, 'layer_idx', '?')} has no {SPIKING_ATTENTION!r} submodule: convert the model first")
    return spiking(query, key, value, attention_mask, scaling), None


def spiking_mask(*args: Any, **kwargs: Any) -> Bool[Tensor, "B 1 L S"]:
    """The boolean mask, always spelled out: True where a query may see a key."""
    mask = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register(IMPLEMENTATION, spiking_attention)
AttentionMaskInterface.register(IMPLEMENTATION, spiking_mask)
