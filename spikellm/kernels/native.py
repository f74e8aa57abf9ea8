"""Kernels of a CPU: the C++ of `cpp/`, compiled on this machine (`build.py`) and called by address.

Vector registers and one pass over memory: a step of a neuron costs as few instructions as it has comparisons and sums, so that T steps of a
few numbers are hidden behind reading them. Compiling takes 15 s, once for all T, shapes and kinds of digits; calling, 10 microseconds.

Each kernel stands for a plain form of a module beside this one, takes the same arguments, and leaves to it what it does not
serve: dtypes that differ, subclasses of tensors, codes of very many populations, gradients, and graphs that somebody traces.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu as plain_silu

from spikellm.kernels.attention import mixture_plain, visible_ends
from spikellm.kernels.bindings import SUFFIX, Candidates, Code, Costs, Heads, Layout, Shape, Strided, library
from spikellm.kernels.chains import chained_plain, worth_plain
from spikellm.kernels.encode import Coding, Digits, Rows, code_sums, count_plain, encode_plain, fire_plain, segment_sums
from spikellm.kernels.histogram import BINS, FIRST, SHIFT, Tally, tally_plain
from spikellm.kernels.transforms import kronecker, rms_norm

FEW = 8  # queries that are attended to head by head, without a matrix of scores: a decoding step's
ALONE = 2**16  # numbers times steps that one thread has finished before others would have woken up


def _served(x: Tensor, other: Tensor) -> bool:
    """Whether a kernel of the library takes a tensor beside another, a parameter."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in SUFFIX
        and x.dtype == other.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or other.requires_grad))
    )


def _code(rows: Rows | None, digits: Digits, cuts: Tensor | None) -> tuple[Code, object]:
    """A code for the library, and what must live as long as it is used; no rows: numbers pass whole."""
    if rows is None:
        return Code(), None
    theta, h, d, v0 = rows = rows.map(Tensor.contiguous)
    cuts = None if cuts is None else cuts.contiguous()
    R, T = theta.shape
    pointers = (theta.data_ptr(), h.data_ptr(), d.data_ptr(), v0.data_ptr(), None if cuts is None else cuts.data_ptr())
    intervals, sides = digits.intervals, digits.sides
    return Code(*pointers, R // (intervals * sides), T, sides, intervals, digits.signed, digits.max_spikes or 0), (rows, cuts)


def _threads(work: int) -> int:
    return 1 if work < ALONE else torch.get_num_threads()


def _run(name: str, x: Tensor, *arguments: object) -> bool:
    """Whether the library has done it."""
    kernels = library()
    return kernels is not None and getattr(kernels, f"{name}_{SUFFIX[x.dtype]}")(*arguments) == 0


def or_plain(plain: Callable) -> Callable[[Callable], Callable]:
    """A kernel that may answer None, which leaves it to the plain form."""

    def decorate(kernel: Callable) -> Callable:
        @wraps(plain)
        def run(*arguments: object) -> object:
            found = kernel(*arguments)
            return plain(*arguments) if found is None else found

        return run

    return decorate


def _elementwise(
    name: str, x: Tensor, groups: int, rows: Rows, digits: Digits, cuts: Tensor | None, room: Callable[[Tensor, int], Tensor]
) -> Tensor | None:
    """A kernel that takes every input by itself; `room` for what comes of x in so many steps."""
    if not _served(x, rows.theta) or groups * digits.populations != rows.v0.shape[0]:
        return None
    x = x.contiguous()
    code, _alive = _code(rows, digits, cuts)
    found = room(x, code.steps)
    done = _run(name, x, x.data_ptr(), found.data_ptr(), *x.shape, code, _threads(x.numel() * code.steps))
    return found if done else None


@or_plain(encode_plain)
def encode(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.encode_plain`."""
    return _elementwise("encode", x, x.shape[1], rows, digits, cuts, lambda x, _: torch.empty_like(x))


@or_plain(fire_plain)
def fire(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.fire_plain`."""

    def room(x: Tensor, T: int) -> Tensor:
        return x.new_empty(T * digits.populations, *x.shape, dtype=torch.int8)

    return _elementwise("fire", x, x.shape[1], rows, digits, cuts, room)


@or_plain(count_plain)
def count(x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None = None) -> Tensor | None:
    """`encode.count_plain`."""
    return _elementwise("count", x, x.shape[0], rows, digits, cuts, lambda x, T: x.new_empty(T, *x.shape[:2], dtype=torch.int64))


@or_plain(mixture_plain)
def mixture(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, prefix: tuple[Tensor, Tensor] | None,
    rows: Rows | None, digits: Digits, cuts: Tensor | None, block: int,
) -> Tensor | None:  # fmt: skip
    """`attention.mixture_plain`, in blocks of its own; of few queries head by head."""
    every = (query, key, value, *(prefix or ()))
    groups = 1 if rows is None else rows.v0.shape[0] // digits.populations
    like = query if rows is None else rows.theta
    plain = all(_served(each, like) and each.stride(-1) == 1 for each in every) and mask.stride(-1) == 1
    if not plain or groups not in (1, query.shape[1]):
        return None
    N, H, L, E = query.shape
    K, S = key.shape[1:3]
    code, _alive = _code(rows, digits, cuts)
    heads = (Heads * 5)(*(Heads(each.data_ptr(), *each.stride()[:3]) for each in every))  # without a prefix nobody reads the last two
    shape = Shape(N, H, K, L, S, prefix[0].shape[2] if prefix else 0, E)
    out = query.new_empty(N, L, H, E)
    threads = _threads(N * H * L * S * (2 * E + code.steps))
    hidden = (mask.data_ptr(), mask.stride(0), mask.stride(2), scaling)
    done = _run("attend" if L <= FEW else "mix", query, out.data_ptr(), heads, *hidden, shape, code, threads)
    return out.transpose(1, 2) if done else None


def _by_rows(name: str, x: Tensor, given: tuple, shape: tuple[int, ...], work: int, coding: Coding | None) -> Tensor | None:
    """A kernel that makes rows of the last axis of x, and codes each of them before it makes the next; `work` for each number."""
    if coding is not None and not _served(x, coding.rows.theta):
        return None
    code, _alive = (Code(), None) if coding is None else _code(*coding[:3])
    code.together = 0 if coding is None else coding.together
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    done = _run(name, x, x.data_ptr(), y.data_ptr(), *given, rows, *shape, code, _threads(x.numel() * (work + code.steps)))
    return y if done else None


def coded_norm(x: Tensor, weight: Tensor, eps: float, coding: Coding | None) -> Tensor | None:
    """What neurons make of `transforms.rms_norm`, or itself, in one pass; None: it is not served."""
    if not _served(x, weight):
        return None
    weight = weight.contiguous()
    return _by_rows("norm", x, (weight.data_ptr(), eps), (x.shape[-1],), 2, coding)


def coded_silu(x: Tensor, coding: Coding | None) -> Tensor | None:
    """The same of SiLU."""
    return _by_rows("silu", x, (), (x.shape[-1],), 8, coding) if _served(x, x) else None


def coded_hadamard(x: Tensor, left: Tensor, right: Tensor, coding: Coding | None) -> Tensor | None:
    """The same of `transforms.kronecker`."""
    P, n = len(left), len(right)
    if not _served(x, right) or n & (n - 1):
        return None
    left = left.contiguous()
    return _by_rows("hadamard", x, (left.data_ptr(),), (P, n), P + n.bit_length(), coding)


@or_plain(rms_norm)
def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    return coded_norm(x, weight, eps, None)


@or_plain(kronecker)
def _hadamard(x: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    return coded_hadamard(x, left, right, None)


@or_plain(plain_silu)
def silu(x: Tensor) -> Tensor | None:
    """x / (1 + e^-x)."""
    return coded_silu(x, None)


class _WithGradient(torch.autograd.Function):
    """A kernel's values with the plain form's derivatives: a network gives the same numbers whether or not somebody asks for gradients."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable, plain: Callable, *arguments: Any) -> Tensor:
        ctx.plain, ctx.arguments = plain, arguments
        return kernel(*arguments)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            arguments = [each.detach().requires_grad_(want) if want else each for each, want in zip(ctx.arguments, wanted, strict=True)]
            found = iter(
                torch.autograd.grad(ctx.plain(*arguments), [a for a, want in zip(arguments, wanted, strict=True) if want], upstream)
            )
        return None, None, *(next(found) if want else None for want in wanted)


def _differentiable(kernel: Callable, plain: Callable, *arguments: Any) -> Tensor:
    learnt = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
    return _WithGradient.apply(kernel, plain, *arguments) if learnt and not torch.compiler.is_compiling() else kernel(*arguments)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`transforms.rms_norm`."""
    return _differentiable(_norm, rms_norm, x, weight, eps)


def hadamard(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`transforms.kronecker`, by sums and differences where the right factor is Sylvester's."""
    return _differentiable(_hadamard, kronecker, x, left, right)


@or_plain(segment_sums)
def candidates(x: Tensor, weight: Tensor, share: Tensor, rows: Rows, digits: Digits) -> tuple[Tensor, ...] | None:
    """`encode.segment_sums`."""
    if not all(_served(each, rows.theta) for each in (x, weight, share)) or digits.populations > 1:
        return None
    x, weight, share = (each.contiguous() for each in (x, weight, share))
    rows = rows.map(Tensor.contiguous)
    (N, M, T), (Q, points) = rows.theta.shape, x.shape[2:]
    shape = Candidates(*(part.data_ptr() for part in rows), N, M, T, Q, points, digits.signed, digits.max_spikes or 0)
    sums = x.new_empty(3, N, M, Q)
    threads = _threads(N * M * Q * points * T)
    done = _run("segment_sums", x, sums.data_ptr(), x.data_ptr(), weight.data_ptr(), share.data_ptr(), shape, threads)
    return tuple(sums) if done else None


@or_plain(code_sums)
def sums(x: Tensor, weight: Tensor, share: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None) -> Tensor | None:
    """`encode.code_sums`."""
    if not all(_served(each, rows.theta) for each in (x, weight, share)) or len(x) * digits.populations != rows.v0.shape[0]:
        return None
    x, weight, share = (each.contiguous() for each in (x, weight, share))
    code, _alive = _code(rows, digits, cuts)
    found = x.new_empty(3, len(x))
    addresses = (each.data_ptr() for each in (found, x, weight, share))
    return found if _run("code_sums", x, *addresses, *x.shape, code, _threads(x.numel() * code.steps)) else None


def _costs(sums: Tensor, price: Tensor, *others: Tensor) -> tuple[Costs, int, object] | None:
    """Costs for the library, threads that it is worth, and what must live meanwhile; None: it does not serve them."""
    price = price.double()
    if library() is None or sums.dtype != torch.float32 or not all(type(each) is Tensor and each.is_cpu for each in (sums, price, *others)):
        return None
    errors, spikes = (part.contiguous() for part in sums)
    costs = Costs(*(part.data_ptr() for part in (errors, spikes, price)), *errors.shape)
    return costs, _threads(errors.numel() * 4), (errors, spikes, price)


@or_plain(chained_plain)
def chained(before: Tensor, sums: Tensor, price: Tensor) -> Tensor | None:
    """`chains.chained_plain`."""
    if (found := _costs(sums, price, before)) is None:
        return None
    costs, threads, _alive = found
    before = before.contiguous()
    out = torch.empty_like(before)
    library().chained(out.data_ptr(), before.data_ptr(), costs, threads)  # type: ignore[union-attr]
    return out


@or_plain(worth_plain)
def worth(before: Tensor, sums: Tensor, price: Tensor, behind: Tensor) -> Tensor | None:
    """`chains.worth_plain`."""
    if (found := _costs(sums, price, before, behind)) is None:
        return None
    costs, threads, _alive = found
    before, behind = before.contiguous(), behind.contiguous()
    out = before.new_empty(sums.shape[1:3])
    library().worth(out.data_ptr(), before.data_ptr(), behind.data_ptr(), costs, threads)  # type: ignore[union-attr]
    return out


@or_plain(tally_plain)
def tally(x: Tensor, importance: Tensor | None, neurons: Tensor | None, tally: Tally) -> Tally | None:
    """`histogram.tally_plain`."""
    kernels = library()
    importance = importance if importance is None or importance.dtype in SUFFIX else importance.float()
    if (
        kernels is None
        or torch.compiler.is_compiling()
        or not all(part is None or (type(part) is Tensor and part.is_cpu) for part in (x, importance, neurons))
    ):
        return None

    def strided(part: Tensor | None) -> Strided:
        return Strided() if part is None else Strided(part.data_ptr(), *part.stride())

    x = x if x.stride(-1) == 1 else x.contiguous()
    A, C, J, K = x.shape
    layout = Layout(A, C, J, K, len(tally.peaks) // C, BINS, SHIFT, FIRST)
    into = (
        part if part is None else part.data_ptr() for part in (tally.counts, None if importance is None else tally.weights, tally.peaks)
    )
    kernel = getattr(kernels, f"tally_{SUFFIX[torch.float32 if importance is None else importance.dtype]}")
    kernel(*into, strided(x), strided(importance), strided(neurons), layout, _threads(x.numel()))
    return tally


@or_plain(visible_ends)
def ends(mask: Tensor, size: int) -> list[int] | None:
    """`attention.visible_ends`."""
    if torch.compiler.is_compiling() or type(mask) is not Tensor or not mask.is_cpu or mask.stride(-1) != 1:
        return None
    if (kernels := library()) is None:
        return None
    N, _, L, S = mask.shape
    found = torch.empty(-(-L // size), dtype=torch.int64)
    kernels.visible_ends(found.data_ptr(), mask.data_ptr(), mask.stride(0), mask.stride(2), N, L, S, size)
    return found.tolist()


# Those that may be switched off one by one (`compiled.chosen`), and of which plain form each is.
KERNELS: dict[Callable, Callable] = {
    encode_plain: encode,
    fire_plain: fire,
    count_plain: count,
    mixture_plain: mixture,
    segment_sums: candidates,
    code_sums: sums,
}
