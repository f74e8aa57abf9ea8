"""Computation-invariant rotations R1..R4: the same function, activations without outlier channels.

Each RMSNorm weight is folded into the Linears that it feeds (an RMSNorm without weight commutes with rotations); then

* R1  x -> x Q on the residual stream, Q = diag(signs) H / sqrt(n), signs from `rotation.seed`;
* R2  per-head H between v_proj and o_proj;
* R3  online H on q and k after RoPE (`attention.py`);
* R4  online H before down_proj (`modules.py`), its inverse in the weight here.

Sources: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al., arXiv:2405.16406). Unlike QuaRot's code the embedding's mean is
not subtracted: right for LayerNorm, wrong for RMSNorm. All weight algebra is done in float64, one weight at a time.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikellm.hadamard import hadamard_factors, hadamard_transform
from spikellm.sites import (
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

READERS = {ATTENTION_NORM: (QUERY, KEY, VALUE), MLP_NORM: (GATE, UP)}
WRITERS = (OUTPUT, DOWN)


@torch.no_grad()
def rotate(model: PreTrainedModel, *, seed: int) -> None:
    """Apply the weight part of R1..R4 in place. R3 and R4 need their online halves: see `conversion.install`.

    Raises:
        ValueError: a width of the model has no Hadamard matrix.
    """
    untie(model)
    fold_norms(model)
    width, head_size = model.config.hidden_size, head_width(model.config)
    signs = random_signs(width, seed=seed)
    for name in (EMBEDDING, HEAD):
        _read_rotated(model.get_submodule(name), signs)
    for layer in decoder_layers(model):
        for part in (*READERS[ATTENTION_NORM], *READERS[MLP_NORM]):
            _read_rotated(layer.get_submodule(part), signs)
        for part in WRITERS:
            _write_rotated(layer.get_submodule(part), signs)
        _rotate_heads(layer.get_submodule(VALUE), layer.get_submodule(OUTPUT), head_size)
        down: Any = layer.get_submodule(DOWN)
        down.weight.copy_(_transform(down.weight.double()))


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


@torch.no_grad()
def fold_norms(model: PreTrainedModel) -> None:
    """Move every RMSNorm's weight into the Linears that it feeds; the weight becomes ones."""
    for layer in decoder_layers(model):
        for norm, readers in READERS.items():
            _fold(layer.get_submodule(norm), [layer.get_submodule(part) for part in readers])
    _fold(model.get_submodule(FINAL_NORM), [model.get_submodule(HEAD)])


def _fold(norm: Any, readers: list[Any]) -> None:
    for linear in readers:
        linear.weight.copy_(linear.weight.double() * norm.weight.double().to(linear.weight.device))
    norm.weight.fill_(1.0)


def _transform(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    return hadamard_transform(x, hadamard_factors(x.shape[-1], dtype=x.dtype, device=x.device))


def _read_rotated(module: Any, signs: Tensor) -> None:
    """x W^T = (x Q) (W Q)^T; also an embedding, whose rows are residual vectors."""
    weight = module.weight
    weight.copy_(_transform(weight.double() * signs.to(weight.device)))


def _write_rotated(linear: Any, signs: Tensor) -> None:
    """(x W^T + b) Q = x (Q^T W)^T + b Q."""
    weight, bias = linear.weight, linear.bias
    weight.copy_(_transform(weight.double().T * signs.to(weight.device)).T)
    if bias is not None:
        bias.copy_(_transform(bias.double() * signs.to(bias.device)))


def _rotate_heads(value: Any, output: Any, width: int) -> None:
    """R2: v -> v H per head, undone by o_proj; probabilities mix tokens, not channels, so it passes through."""
    weight = value.weight.double().view(-1, width, value.in_features)
    value.weight.copy_(_transform(weight.transpose(1, 2)).transpose(1, 2).reshape(value.weight.shape))
    if value.bias is not None:
        value.bias.copy_(_transform(value.bias.double().view(-1, width)).flatten())
    weight = output.weight.double().view(output.out_features, -1, width)
    output.weight.copy_(_transform(weight).reshape(output.weight.shape))
