"""Kernels of a GPU: the Triton of `triton_*.py`, chosen, sized and started; imported where a GPU's tensors come and Triton is installed.

Each kernel stands for a plain form of `encode.py` or `attention.py`, takes the same arguments, and leaves to it what it does not serve:
subclasses of tensors, gradients, graphs that somebody traces, dtypes beyond those below. Neurons take inputs of any floating dtype and
give the plain form's numbers to the last bit. Attention is computed in float32 and takes what is no wider; its sums have another order.
Float64 is left to the plain form there: Triton 3.7 does not compile such products for compute capability 9.0.

Sizes of blocks are the largest with which ptxas 12.9 puts nothing of attention into local memory (compute capability 9.0, T = 8, two
intervals): products of float32 that are no tensor core's take their operands into registers.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton import language as tl

from spikellm.kernels import triton_attention, triton_decode, triton_neurons
from spikellm.kernels.attention import average_plain, mixture_plain
from spikellm.kernels.encode import Digits, Rows, count_plain, encode_plain, fire_plain
from spikellm.kernels.native import or_plain

# How products of float32 are made: "ieee" rounds as a CPU does; "tf32x3" is made of three products on tensor cores, a few units in the
# last place off; "tf32" has 11 bits, which moves spikes.
PRECISION = "ieee"
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
NARROW = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # of a head
FEW = 64  # queries, of all heads that share keys, that are attended to by `triton_decode.py`
PROGRAMS = 256  # that it starts at least, where there are as many blocks of keys: about two for every processor of a large GPU
MOST = 1024  # inputs of a program
INTERPRETED = triton.knobs.runtime.interpret  # without a GPU, on a CPU's tensors: for tests


def _served(*tensors: Tensor) -> bool:
    """Whether kernels take such tensors, all of one device."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and (first.is_cuda or (INTERPRETED and first.is_cpu))
        and all(type(each) is Tensor and each.device == first.device and each.numel() for each in tensors)
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
    )


def _code(rows: Rows, digits: Digits, cuts: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A code as a kernel's arguments: addresses and the number of groups; what it is compiled for."""
    rows = rows.map(Tensor.contiguous)
    kind = {"SIGNED": digits.signed, "BOUND": digits.max_spikes or 0, "SIDES": digits.sides, "INTERVALS": digits.intervals}
    addresses = (*rows, None if cuts is None else cuts.contiguous(), len(rows.v0) // digits.populations)
    return addresses, {"T": rows.theta.shape[1], "R": DTYPES[rows.theta.dtype], **kind}


def _neurons(x: Tensor, groups: int, rows: Rows, digits: Digits, cuts: Tensor | None) -> bool:
    """Whether kernels of single inputs take these."""
    code = (*rows, *([] if cuts is None else [cuts]))
    return (
        _served(x, *code)
        and x.is_floating_point()
        and rows.theta.dtype in DTYPES
        and all(each.dtype == rows.theta.dtype for each in code)
        and groups * digits.populations == len(rows.v0)
    )


def _sizes(x: Tensor, width: int) -> dict[str, Any]:
    """Of blocks of so many inputs that share a table; and x's dtype."""
    size = min(MOST, max(128, next_power_of_2(width)))
    return {"BLOCK": size, "num_warps": size // 128 if size < 512 else 4, "WIDE": DTYPES.get(x.dtype, tl.float32)}


@or_plain(encode_plain)
def encode(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.encode_plain`."""
    A, C, width = x.shape
    if not _neurons(x, C, rows, digits, cuts):
        return None
    x, sizes = x.contiguous(), _sizes(x, width)
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, rows.theta.dtype))
    code, kind = _code(rows, digits, cuts)
    with torch.cuda.device_of(x):
        triton_neurons.encode_kernel[A * C * cdiv(width, sizes["BLOCK"]),](x, y, *code, width, **kind, **sizes)
    return y


@or_plain(fire_plain)
def fire(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.fire_plain`."""
    A, C, width = x.shape
    if not _neurons(x, C, rows, digits, cuts):
        return None
    x, sizes = x.contiguous(), _sizes(x, width)
    code, kind = _code(rows, digits, cuts)
    train = x.new_empty(kind["T"] * digits.populations, A, C, width, dtype=torch.int8)
    with torch.cuda.device_of(x):
        triton_neurons.fire_kernel[A * C * cdiv(width, sizes["BLOCK"]),](x, train, *code, width, x.numel(), **kind, **sizes)
    return train


@or_plain(count_plain)
def count(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.count_plain`."""
    C, positions, J = x.shape
    if not _neurons(x, C, rows, digits, cuts):
        return None
    x, sizes = x.contiguous(), _sizes(x, J)
    code, kind = _code(rows, digits, cuts)
    blocks = min(16, cdiv(J, sizes["BLOCK"]))  # of a program: so many sums in registers for one in memory
    counts = x.new_zeros(kind["T"], C, positions, dtype=torch.int64)
    grid = (C * positions * cdiv(J, sizes["BLOCK"] * blocks),)
    with torch.cuda.device_of(x):
        triton_neurons.count_kernel[grid](x, counts, *code, positions, J, BLOCKS=blocks, STEPS=next_power_of_2(kind["T"]), **kind, **sizes)
    return counts


def attends(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefix: tuple[Tensor, Tensor] | None,
    rows: Rows, digits: Digits, cuts: Tensor | None,
) -> bool:  # fmt: skip
    """Whether attention's kernels take these."""
    every = (query, key, value, *(prefix or ()))
    code = (*rows, *([] if cuts is None else [cuts]))
    return (
        _served(*every, mask, *code)
        and all(each.dtype in NARROW and each.stride(-1) == 1 for each in every)
        and all(each.dtype == torch.float32 for each in code)
        and mask.dtype == torch.bool
        and query.shape[-1] <= WIDEST
        and len(rows.v0) // digits.populations in (1, query.shape[1])
    )


@or_plain(mixture_plain)
def mixture(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, prefix: tuple[Tensor, Tensor] | None,
    rows: Rows | None, digits: Digits, cuts: Tensor | None, block: int,
) -> Tensor | None:  # fmt: skip
    """`attention.mixture_plain`."""
    if rows is None or not attends(query, key, value, mask, prefix, rows, digits, cuts):
        return None
    return attended(query, key, value, mask, scaling, prefix, rows, digits, cuts, before=False)


@or_plain(average_plain)
def average(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, rows: Rows, digits: Digits, cuts: Tensor | None, block: int
) -> Tensor | None:
    """`attention.average_plain`."""
    if not attends(query, key, value, mask, None, rows, digits, cuts):
        return None
    return attended(query, key, value, mask, scaling, None, rows, digits, cuts, before=True)


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, prefix: tuple[Tensor, Tensor] | None,
    rows: Rows, digits: Digits, cuts: Tensor | None, *, before: bool,
) -> Tensor:  # fmt: skip
    """Attention [B, H, L, E] in the rows' dtype; before: weights are probabilities, normalised before they are coded."""
    (B, H, L, E), (K, S) = query.shape, key.shape[1:3]
    code, kind = _code(rows, digits, cuts)
    out = query.new_empty(B, L, H, E, dtype=rows.theta.dtype)
    width = max(16, next_power_of_2(E))  # products want 16 columns
    shared = {"SCALING": scaling, "E": E, "E_": width, "R": kind.pop("R"), "BEFORE": before, "PRECISION": PRECISION}
    coded = kind | {"PER_HEAD": code[-1] > 1}
    # sequences, heads and tokens, and how far apart they are; without a prefix nobody reads the last two
    q, k, v = ((each, *each.stride()[:3]) for each in (query, key, value))
    seen = (mask.view(torch.uint8), mask.stride(0), mask.stride(2))
    sinks = tuple(each for part in prefix or (query, query) for each in (part, *part.stride()[1:3]))
    P, sink = (prefix[0].shape[2], {"PREFIX": 16}) if prefix else (0, {"PREFIX": 0})
    few = H // K * L
    with torch.cuda.device_of(query):
        if few > FEW:
            sizes = {"M": 128, "N": 32} if width <= 128 and L > 64 else {"M": 64, "N": 16}
            blocks = cdiv(L, sizes["M"])
            ends = torch.empty(B * blocks, dtype=torch.int32, device=query.device)
            triton_attention.ends_kernel[B * blocks,](*seen, ends, blocks, L, S, M=sizes["M"], N=128, BEFORE=before)
            triton_attention.attend_kernel[blocks * B * H,](
                *q, *k, *v, *seen, *sinks, out, ends, B, H, K, L, S, P, *code, **shared, **coded, **sink, **sizes, num_warps=8
            )
            return out.transpose(1, 2)
        size, M, number = 32, {"M": max(16, next_power_of_2(few))}, B * H * L
        length = cdiv(cdiv(S, max(1, PROGRAMS // (B * K))), size) * size
        parts = cdiv(S, length)
        tops, totals, weights = (out.new_empty(parts, number) for _ in range(3))
        mixtures, each = out.new_empty(parts, number, E), {"PARTS": next_power_of_2(parts)}
        triton_decode.survey_kernel[B * K, parts](*q, *k, *seen, tops, totals, H, K, L, S, length, number, N=size, **shared, **M)
        triton_decode.gather_kernel[B * K, parts](
            *q, *k, *v, *seen, tops, totals, mixtures, weights, H, K, L, S, length, number, parts, *code,
            N=size, **shared, **coded, **each, **M,
        )  # fmt: skip
        triton_decode.conclude_kernel[B * K,](
            *q, *sinks, tops, totals, mixtures, weights, out, H, K, L, P, number, parts, **shared, **sink, **each, **M
        )
    return out.transpose(1, 2)


# Of which plain form each is.
KERNELS = {encode_plain: encode, fire_plain: fire, count_plain: count, mixture_plain: mixture, average_plain: average}
