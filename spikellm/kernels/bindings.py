"""What the library of the C++ in `cpp/` takes: its structures and the arguments of its kernels, for calls by address."""

import ctypes
from functools import cache

import torch

from spikellm.kernels.build import built
from spikellm.kernels.switch import is_fusing

SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


class Code(ctypes.Structure):
    """`Code` of neuron.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("theta", "h", "d", "v0", "cuts")] + [
        (name, ctypes.c_int32) for name in ("groups", "steps", "sides", "intervals", "is_signed", "max_spikes", "together")
    ]


class Heads(ctypes.Structure):
    """`Heads` of attention.cpp."""

    _fields_ = [("at", ctypes.c_void_p), ("sequence", ctypes.c_int64), ("head", ctypes.c_int64), ("token", ctypes.c_int64)]


class Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("N", "H", "K", "L", "S", "P", "E")]


class Candidates(ctypes.Structure):
    """`Candidates` of search.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("theta", "h", "d", "v0")]
        + [(name, ctypes.c_int64) for name in ("N", "M", "T", "Q", "points")]
        + [(name, ctypes.c_int32) for name in ("is_signed", "max_spikes")]
    )


class Costs(ctypes.Structure):
    """`Costs` of chains.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("errors", "spikes", "price")] + [(name, ctypes.c_int64) for name in "NMQ"]


class Layout(ctypes.Structure):
    """`Layout` of histogram.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("A", "C", "J", "K", "sides", "bins", "shift", "first")]


class Strided(ctypes.Structure):
    """`Strided` of histogram.cpp."""

    _fields_ = [("at", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in "acjk"]


_P, _N, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_CODE, _SHAPE = ctypes.POINTER(Code), ctypes.POINTER(Shape)  # which take the structures themselves
_ARGUMENTS = {
    "encode": [_P, _P, _N, _N, _N, _CODE, _INT],
    "fire": [_P, _P, _N, _N, _N, _CODE, _INT],
    "count": [_P, _P, _N, _N, _N, _CODE, _INT],
    "segment_sums": [_P, _P, _P, _P, ctypes.POINTER(Candidates), _INT],
    "code_sums": [_P, _P, _P, _P, _N, _N, _CODE, _INT],
    "norm": [_P, _P, _P, ctypes.c_double, _N, _N, _CODE, _INT],
    "silu": [_P, _P, _N, _N, _CODE, _INT],
    "hadamard": [_P, _P, _P, _N, _N, _N, _CODE, _INT],
    "mix": [_P, _P, _P, _N, _N, ctypes.c_double, _SHAPE, _CODE, _INT],
    "attend": [_P, _P, _P, _N, _N, ctypes.c_double, _SHAPE, _CODE, _INT],
    "spike_linear": [_P, _P, _P, _INT, _P, _INT],
    "exponentials": [_P, _P, _P, *[_N] * 6, _INT],
    "integrate": [_P, _P, _P, _N, _N, _N, _INT],
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, or they are switched off."""
    return loaded() if is_fusing() else None


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    path = built()
    if path is None:
        return None
    found = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        for suffix in SUFFIX.values():
            kernel = getattr(found, f"{name}_{suffix}")
            kernel.argtypes, kernel.restype = arguments, _INT
    for suffix in SUFFIX.values():
        kernel = getattr(found, f"tally_{suffix}")
        kernel.argtypes, kernel.restype = [_P, _P, _P, *[ctypes.POINTER(Strided)] * 3, ctypes.POINTER(Layout), _INT], None
    found.spike_pairs_f32.argtypes, found.spike_pairs_f32.restype = [_P, _P, _P, _P, _N, _N, ctypes.c_double, _P, _INT], _INT
    found.spike_mixture_f32.argtypes, found.spike_mixture_f32.restype = [_P, _P, _P, _P, _P, _P, _INT], _INT
    found.chained.argtypes, found.chained.restype = [_P, _P, ctypes.POINTER(Costs), _INT], None
    found.worth.argtypes, found.worth.restype = [_P, _P, _P, ctypes.POINTER(Costs), _INT], None
    found.visible_ends.argtypes, found.visible_ends.restype = [_P, _P, _N, _N, _N, _N, _N, _N], None
    return found
