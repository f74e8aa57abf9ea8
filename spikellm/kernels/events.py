"""Products of spikes on a CPU: the C++ of `cpp/events.cpp`, `tiles.cpp` and `pairs.cpp` for the plain forms of `temporal.py`.

A spike costs an addition, a silent input nothing: event by event, rows of the weights are added or left out. Where the processor has a unit
for matrices of bytes (AMX), spikes go there as they are, against the digits of 30-bit weights, and what is left out are tiles without a
spike: twice as fast at a firing rate of a quarter (SmolLM2's products, 512 tokens). All steps of a product are one pass over the weights.

Few rows, dtypes that differ, groups narrower than a register and other devices are left to the plain forms.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from spikellm.kernels import attention, temporal
from spikellm.kernels.bindings import SUFFIX, library

FEW = 16  # rows, from which on making digits of the weights, or lists of the spikes, costs less than it saves


class _Train(ctypes.Structure):
    """`Train` of product.h."""

    _fields_ = [("at", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("step", "wire", "row")]


class _Currents(ctypes.Structure):
    """`Currents` of product.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("out", "d", "scale", "bias")] + [("d_group", ctypes.c_int64)]


class _Product(ctypes.Structure):
    """`Product` of product.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("N", "I", "O", "T", "P", "groups", "summed")]


class _HeadTrain(ctypes.Structure):
    """`HeadTrain` of pairs.cpp."""

    _fields_ = [("at", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("wire", "sequence", "head", "row")]


class _Weights(ctypes.Structure):
    """`Weights` of pairs.cpp."""

    _fields_ = [("at", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("tables", "wires")]


class _Numbers(ctypes.Structure):
    """`Numbers` of pairs.cpp."""

    _fields_ = [("at", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("sequence", "head", "row")]


class _Attended(ctypes.Structure):
    """`Attended` of pairs.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in "BHKLSETPQ"]


def linear(
    spikes: Int8[Tensor, "S *rows I"],
    weight: Float[Tensor, "O I"],
    wires: Float[Tensor, "C S"],
    *,
    populations: int = 1,
    scale: Float[Tensor, "*rows 1"] | None = None,
    bias: Float[Tensor, " O"] | None = None,
    chunk: int | None = None,
    compiled: bool = True,
) -> Iterator[Float[Tensor, "t *rows O"]]:
    """`temporal.spike_linear`; compiled: else it is the plain form."""
    if not (compiled and _served(spikes, weight, wires)):
        yield from temporal.spike_linear(spikes, weight, wires, populations=populations, scale=scale, bias=bias, chunk=chunk)
        return
    for steps in temporal.chunks(len(spikes) // populations, chunk):
        own = slice(steps.start * populations, steps.stop * populations)
        yield _product(spikes[own], weight, wires[:, own], populations, scale, None if steps.start else bias, summed=False)


def linear_sum(
    spikes: Int8[Tensor, "S *rows I"],
    weight: Float[Tensor, "O I"],
    wires: Float[Tensor, "C S"],
    *,
    populations: int = 1,
    scale: Float[Tensor, "*rows 1"] | None = None,
    bias: Float[Tensor, " O"] | None = None,
    chunk: int | None = None,
    compiled: bool = True,
) -> Float[Tensor, "*rows O"]:
    """The sum over time of `linear`, of which no step is kept."""
    if compiled and _served(spikes, weight, wires):
        return _product(spikes, weight, wires, populations, scale, bias, summed=True)
    parts = temporal.spike_linear(spikes, weight, wires, populations=populations, scale=scale, bias=bias, chunk=chunk)
    return temporal.integrate(current for part in parts for current in part)


def pair_scores(
    query: Int8[Tensor, "X B H L E"],
    key: Int8[Tensor, "Y B K S E"],
    wires: tuple[Float[Tensor, "C X"], Float[Tensor, "D Y"]],
    mask: Bool[Tensor, "B 1 L S"],
    scaling: float,
    populations: tuple[int, int],
) -> Float[Tensor, "B H L S"] | None:
    """`temporal.spike_pairs` of heads that share keys, summed over time and scaled; None: it is left to the plain form.

    A table for all heads or one for each. Keys behind the last that a query sees may have scores of 0.
    """
    heads = query.shape[2], key.shape[2]
    if not (_attends(query, wires[0], heads[0]) and _attends(key, wires[1], heads[1]) and type(mask) is Tensor and mask.stride(-1) == 1):
        return None
    B, H, L, E = query.shape[1:]
    S = key.shape[3]
    out = wires[0].new_empty(B, H, L, S)
    wires = wires[0].contiguous(), wires[1].contiguous()
    trains = (_HeadTrain * 2)(*(_HeadTrain(each.data_ptr(), *each.stride()[:4]) for each in (query, key)))
    weights = (_Weights * 2)(*(_Weights(each.data_ptr(), *each.shape) for each in wires))
    shape = _Attended(B, H, heads[1], L, S, E, len(query) // populations[0], *populations)
    shown = mask.data_ptr(), mask.stride(0), mask.stride(2), scaling
    done = _library().spike_pairs_f32(out.data_ptr(), trains, weights, *shown, ctypes.byref(shape), torch.get_num_threads())
    return out if done == 0 else None


def mixture_sum(
    spikes: Int8[Tensor, "X B H L S"], value: Float[Tensor, "B K S E"], wires: Float[Tensor, "C X"], populations: int
) -> tuple[Float[Tensor, "B H L E"], Float[Tensor, "B H L 1"]] | None:
    """`temporal.spike_mixture` of heads that share values, summed over time, and what the spikes of each row spell; None: see above."""
    if not _attends(spikes, wires, spikes.shape[2]) or not _plain(value, torch.float32):
        return None
    B, H, L, S = spikes.shape[1:]
    K, E = value.shape[1], value.shape[3]
    mixed, totals = value.new_empty(B, H, L, E), value.new_empty(B, H, L, 1)
    wires = wires.contiguous()
    train, weights = _HeadTrain(spikes.data_ptr(), *spikes.stride()[:4]), _Weights(wires.data_ptr(), *wires.shape)
    numbers = _Numbers(value.data_ptr(), *value.stride()[:3])
    shape = _Attended(B, H, K, L, S, E, len(spikes) // populations, populations, populations)
    structures = (ctypes.byref(each) for each in (train, numbers, weights, shape))
    done = _library().spike_mixture_f32(mixed.data_ptr(), totals.data_ptr(), *structures, torch.get_num_threads())
    return (mixed, totals) if done == 0 else None


def exponentials(
    scores: Float[Tensor, "B H L S"], mask: Bool[Tensor, "B 1 L S"]
) -> tuple[Float[Tensor, "B H L S"], Float[Tensor, "B H L 1"]]:
    """`attention.exponentials` in one pass, in the place of the scores."""
    if not (_kernels(scores) and scores.is_contiguous() and type(mask) is Tensor and mask.stride(-1) == 1):
        return attention.exponentials(scores, mask)
    tops = scores.new_empty(*scores.shape[:3], 1)
    run = getattr(_library(), f"exponentials_{SUFFIX[scores.dtype]}")
    run(scores.data_ptr(), tops.data_ptr(), mask.data_ptr(), mask.stride(0), mask.stride(2), *scores.shape, torch.get_num_threads())
    return scores, tops


def integrate(currents: Float[Tensor, " S *shape"], weights: Float[Tensor, "S W"] | None = None) -> Float[Tensor, "*shape"]:
    """`temporal.integrate` of currents that are there, or of their products with a weight for each wire and number of the last axis."""
    if not (_kernels(currents) and currents.is_contiguous() and (weights is None or weights.dtype == currents.dtype)):
        return temporal.integrate(currents if weights is None else (x * weight for x, weight in zip(currents, weights, strict=True)))
    weights = None if weights is None else weights.contiguous()
    out = torch.empty_like(currents[0])
    width = currents.shape[-1]
    run = getattr(_library(), f"integrate_{SUFFIX[currents.dtype]}")
    shape = len(currents), out.numel() // width, width, torch.get_num_threads()
    run(out.data_ptr(), currents.data_ptr(), None if weights is None else weights.data_ptr(), *shape)
    return out


def _kernels(x: Tensor) -> bool:
    """Whether a kernel takes these numbers."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in SUFFIX
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and library() is not None
    )


def _plain(x: Tensor, dtype: torch.dtype) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype == dtype and x.stride(-1) == 1


def _attends(spikes: Tensor, wires: Tensor, heads: int) -> bool:
    return (
        _plain(spikes, torch.int8)
        and type(wires) is Tensor
        and wires.dtype == torch.float32
        and len(wires) in (1, heads)
        and spikes.shape[3] >= FEW
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _library() -> Any:
    return library()


def _served(spikes: Tensor, weight: Tensor, wires: Tensor) -> bool:
    wide = torch.promote_types(weight.dtype, torch.float32)
    width, rows = spikes.shape[-1], spikes.shape[1:-1].numel()
    return (
        all(type(each.data) is Tensor and each.is_cpu for each in (spikes, weight, wires))
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (weight.requires_grad or wires.requires_grad))
        and weight.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and wires.dtype == wide
        and rows >= FEW
        and (len(wires) == 1 or width // len(wires) >= temporal.NARROW)
        and library() is not None
    )


def _product(
    spikes: Tensor, weight: Tensor, wires: Tensor, populations: int, scale: Tensor | None, bias: Tensor | None, *, summed: bool
) -> Tensor:
    """The kernel's currents [T, *rows, O], or their sum [*rows, O]."""
    trains = spikes.unflatten(0, (-1, populations)).flatten(2, -2)
    trains = trains if trains.stride(-1) == 1 else trains.contiguous()
    T, P, N, I = trains.shape  # noqa: E741
    O = len(weight)  # noqa: E741
    weight, wires = weight.contiguous(), wires.contiguous()
    scale, bias = (None if each is None else each.to(wires.dtype).contiguous() for each in (scale, bias))
    out = wires.new_empty(*(() if summed else (T,)), *spikes.shape[1:-1], O)
    train = _Train(trains.data_ptr(), *trains.stride()[:3])
    addresses = (None if each is None else each.data_ptr() for each in (out, wires, scale, bias))
    to = _Currents(*addresses, wires.stride(0))
    shape = _Product(N, I, O, T, P, len(wires), summed)
    kernel = getattr(library(), f"spike_linear_{SUFFIX[wires.dtype]}")
    structures = (ctypes.byref(each) for each in (to, train))
    kernel(*structures, weight.data_ptr(), weight.dtype == torch.bfloat16, ctypes.byref(shape), torch.get_num_threads())
    return out
