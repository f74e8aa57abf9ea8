"""Computation-invariant rotations R1..R4: the same function, activations without outlier channels.

Each RMSNorm weight is folded into the Linears that it feeds (an RMSNorm without weight commutes with rotations); then

* R1  x -> x Q on the residual stream, Q = diag(signs) H / sqrt(n), signs from `rotation.seed`;
* R2  per-head H between v_proj and o_proj;
* R3  online H on q and k after RoPE (`attention.py`);
* R4  online H before down_proj (`modules.py`), its inverse in the weight here.

H is the Hadamard transform of the width, or where no matrix of that order is constructed two overlapping ones (`kernels/hadamard.py`).
Each part can be left out (`rotation.parts`). Norms are folded even without R1, which alone needs it: with and without a part, everything
else is alike.

Sources: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al., arXiv:2405.16406). Unlike QuaRot's code the embedding's mean is
not subtracted: right for LayerNorm, wrong for RMSNorm. Each weight is composed in float64 and rounded to the model's dtype once:
three roundings of a bfloat16 weight would deviate by 1.7 times as much.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikellm.config.choices import RotationPart
from spikellm.kernels.hadamard import hadamard_factors, hadamard_transform, order
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import (
    ATTENTION_NORM,
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    KEY,
    MLP_NORM,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    decoder_layers,
    head_width,
)

R1, R2, R3, R4 = PARTS = tuple(RotationPart)

Step = Callable[[Tensor], Tensor]  # of a weight's algebra: [O, I] to [O, I], float64

# A wide embedding is composed in parts of so many rows: LLaMA-3-8B's takes 4.2 GB in float64.
ROWS = 8192


@torch.no_grad()
def rotate(model: PreTrainedModel, *, seed: int, parts: Collection[RotationPart] = PARTS) -> None:
    """Fold the norms and apply the weight part of R1, R2 and R4 in place. R3 and R4 need their online halves: see `conversion.install`.

    Args:
        seed: of R1's signs.
        parts: those that are applied.
    """
    signs = begin(model, seed=seed, parts=parts)
    for layer in decoder_layers(model):
        rotate_block(layer, parts, signs, head_width(model.config))


@torch.no_grad()
def begin(model: PreTrainedModel, *, seed: int, parts: Collection[RotationPart]) -> Float[Tensor, " D"] | None:
    """The ends of a model rotated; what `rotate_block` needs for each layer then. Arguments as in `rotate`.

    Returns:
        R1's signs; None: without it.
    """
    untie(model)
    signs = random_signs(model.config.hidden_size, seed=seed) if R1 in parts else None
    rotate_ends(model, signs)
    return signs


def orders(config: Any, parts: Collection[RotationPart]) -> dict[str, list[int]]:
    """Orders of the Hadamard matrices of each part, for a model of this configuration: one of the part's width, or two that overlap."""
    head = head_width(config)
    widths = {R1: config.hidden_size, R2: head, R3: head, R4: config.intermediate_size}
    return {str(part): [order(widths[part])] * (1 + (order(widths[part]) < widths[part])) for part in parts}


@torch.no_grad()
def rotate_ends(model: PreTrainedModel, signs: Float[Tensor, " D"] | None) -> None:
    """R1 (None: without it) in the embedding and in lm_head, the final norm folded into it."""
    read = _residual(signs)[0]
    final_norm: Any = model.get_submodule(FINAL_NORM)
    _compose(model.get_submodule(EMBEDDING), columns=read)
    _compose(model.get_submodule(HEAD), columns=[partial(_scaled, factor=final_norm.weight), *read])
    final_norm.weight.fill_(1.0)


@torch.no_grad()
def rotate_block(layer: nn.Module, parts: Collection[RotationPart], signs: Float[Tensor, " D"] | None, head_width: int) -> None:
    """R1 (signs of None: without it), R2 and R4 in the weights of one decoder layer, its norms folded into the Linears that they feed."""

    def part(name: str) -> Any:
        return layer.get_submodule(name)

    read, write = _residual(signs)
    # R2: v -> v H per head, undone by o_proj; probabilities mix tokens, not channels, so it passes through
    heads = [partial(_heads_rotated, width=head_width)] if R2 in parts else []
    channels = [partial(_rows_of_heads_rotated, width=head_width)] if R2 in parts else []
    fold_attention, fold_mlp = (partial(_scaled, factor=part(norm).weight) for norm in (ATTENTION_NORM, MLP_NORM))
    _compose(part(QUERY), columns=[fold_attention, *read])
    _compose(part(KEY), columns=[fold_attention, *read])
    _compose(part(VALUE), columns=[fold_attention, *read], rows=channels)
    _compose(part(OUTPUT), columns=heads, rows=write)
    _compose(part(GATE), columns=[fold_mlp, *read])
    _compose(part(UP), columns=[fold_mlp, *read])
    _compose(part(DOWN), columns=[_transform] if R4 in parts else [], rows=write)
    for norm in (ATTENTION_NORM, MLP_NORM):
        part(norm).weight.fill_(1.0)


def _residual(signs: Float[Tensor, " D"] | None) -> tuple[list[Step], list[Step]]:
    """R1's steps in weights that read the residual stream, and in those that write it."""
    return ([], []) if signs is None else ([partial(_read_rotated, signs=signs)], [partial(_write_rotated, signs=signs)])


def random_signs(width: int, *, seed: int) -> Float[Tensor, " D"]:
    """R1's diagonal: +-1, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give lm_head a weight of its own."""
    head: Any = model.get_submodule(HEAD)
    embedding: Any = model.get_submodule(EMBEDDING)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _compose(module: Any, *, columns: Sequence[Step], rows: Sequence[Step] = ()) -> None:
    """Apply steps to a weight [O, I] in float64, those on its columns first, and round it once; steps on rows act on the bias as well."""
    for part in module.weight.split(len(module.weight) if rows else ROWS):
        part.copy_(_applied(part.double(), [*columns, *rows]))
    if getattr(module, "bias", None) is not None and rows:
        module.bias.copy_(_applied(module.bias.double()[:, None], rows)[:, 0])


def _applied(weight: Tensor, steps: Sequence[Step]) -> Tensor:
    for step in steps:
        weight = step(weight)
    return weight


def _transform(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    return hadamard_transform(x, hadamard_factors(x.shape[-1], dtype=x.dtype, device=x.device))


def _scaled(weight: Float[Tensor, "O I"], *, factor: Float[Tensor, " I"]) -> Float[Tensor, "O I"]:
    return weight * factor.to(weight.device, weight.dtype)


def _read_rotated(weight: Float[Tensor, "O D"], *, signs: Float[Tensor, " D"]) -> Float[Tensor, "O D"]:
    """x W^T = (x Q) (W Q)^T; also an embedding, whose rows are residual vectors."""
    return _transform(_scaled(weight, factor=signs))


def _write_rotated(weight: Float[Tensor, "D I"], *, signs: Float[Tensor, " D"]) -> Float[Tensor, "D I"]:
    """(x W^T + b) Q = x (Q^T W)^T + b Q."""
    return _read_rotated(weight.T, signs=signs).T


def _heads_rotated(weight: Float[Tensor, "O I"], *, width: int) -> Float[Tensor, "O I"]:
    """Every head's columns times H."""
    return _transform(weight.unflatten(1, (-1, width))).flatten(1)


def _rows_of_heads_rotated(weight: Float[Tensor, "O I"], *, width: int) -> Float[Tensor, "O I"]:
    """Every head's rows times H."""
    return _heads_rotated(weight.T, width=width).T
