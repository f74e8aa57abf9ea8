"""Hadamard matrices by construction, and the fast transform x -> x H / sqrt(n).

Problem: the rotations R1..R4 need orthogonal matrices with entries +-1/sqrt(n) at every width of a LLaMA-family model:
576 = 36 x 16, 1536 = 12 x 128, 11008 = 172 x 64, 13824 = 108 x 128, 14336 = 28 x 512, ...

Constructions, for n = K * 2^k with K the smallest order that one of them reaches:

* Sylvester:  H_2n = [[H, H], [H, -H]]
* Paley I:    order q + 1,   q = 3 (mod 4) prime
* Paley II:   order 2q + 2,  q = 1 (mod 4) prime
* Williamson: order 4m, four symmetric circulants A, B, C, D with A^2 + B^2 + C^2 + D^2 = 4m I; searched among those that
  are constant on the cosets of a subgroup of the units of Z_m (Williamson 1944 found order 172 = 4 x 43 in this way).

The transform never forms H_n: with n = P * R and H_n = H_P (x) H_R it is two matrix products on a [.., P, R] view,
n (P + R) multiply-adds a row instead of n^2, and on a CPU n (P + log R) sums and differences (`native.py`). Factors hold
the signs alone, which every dtype represents exactly, and the scale multiplies the float32 sum: 1 / sqrt(n) rounded to
bfloat16 is off by up to 0.4 %, and would scale what every layer writes.

Where none of them reaches n (head width 100 of OpenLLaMA-3B, odd MLP widths) two transforms of order b = 2^k > n / 2 act, one on the first
b channels and then one on the last b: orthogonal, fast, without a dense factor, and no channel meets fewer than b. Between the two stand
signs, a quadratic character: without them the second transform undoes much of the first, and the closed form is the same in every saved
model. What else was measured: `experiments/rotations`.
"""

from functools import cache
from itertools import count, product
from math import isqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spikellm.kernels import native
from spikellm.kernels.encode import Coding

# Up to this width (head widths: 64, 128) one dense product is faster on CPU than two products of tiny factors.
DENSE = 128


class Factors(NamedTuple):
    """What a transform of width n is made of: H_P and H_R, entries +-1, and signs where P R is not n."""

    left: Float[Tensor, "P P"]
    right: Float[Tensor, "R R"]
    signs: Float[Tensor, " PR"] | None  # between two overlapping transforms of order P R; None: one of order n


@cache
def hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    """The Hadamard matrix of order n, entries +-1, H H^T = n I (float64, CPU; shared: do not write to it).

    Raises:
        ValueError: no construction of this module reaches order n.
    """
    with torch.device("cpu"):  # whatever the caller's default device: the matrix is shared
        return _construct(n)


def _construct(n: int) -> Float[Tensor, "n n"]:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n > 1 and n & (n - 1) == 0:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard_matrix(n // 2))
    if n > 0 and n % 4 == 0:
        for build in (_paley_1, _paley_2):
            if (matrix := build(n)) is not None:
                return matrix
        try:
            half = hadamard_matrix(n // 2)
        except ValueError:
            half = None
        if half is not None:
            return torch.kron(hadamard_matrix(2), half)
        if (matrix := _williamson(n)) is not None:
            return matrix
    raise ValueError(f"no Hadamard matrix of order {n}: Sylvester, Paley and Williamson constructions do not reach it")


def split(n: int) -> tuple[int, int]:
    """Factors (P, R) of n, both Hadamard orders: P + R the smallest with R a power of two, or (1, n) up to `DENSE`.

    Raises:
        ValueError: no such pair exists.
    """
    if n <= DENSE:
        hadamard_matrix(n)
        return 1, n
    pairs = []
    power = 1
    while n > 0 and n % power == 0:
        pairs.append((n // power + power, n // power, power))
        power *= 2
    for _, left, right in sorted(pairs):
        try:
            hadamard_matrix(left)
        except ValueError:
            continue
        return left, right
    raise ValueError(f"no Hadamard matrix of order {n}: Sylvester, Paley and Williamson constructions do not reach it")


@cache
def order(n: int) -> int:
    """Of the Hadamard matrix that transforms vectors of width n >= 1: n where one is constructed, else the largest power of two below."""
    try:
        split(n)
    except ValueError:
        return 1 << (n.bit_length() - 1)
    return n


def hadamard_factors(n: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Factors:
    """What `hadamard_transform` multiplies vectors of width n with."""
    size = order(n)
    left, right = (hadamard_matrix(each).to(device=device, dtype=dtype) for each in split(size))
    return Factors(left, right, None if size == n else _scrambling_signs(size).to(device=device, dtype=dtype))


def hadamard_transform(x: Float[Tensor, "*rows n"], factors: Factors) -> Float[Tensor, "*rows n"]:
    """x Q along the last axis, in float32 at least; `factors` from `hadamard_factors`, of any dtype, on x's device.

    Q = H_n / sqrt(n), or the two overlapping transforms of the module's text.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    left, right = (factor.to(x.dtype) for factor in factors[:2])
    if factors.signs is None:
        return native.hadamard(x, left, right)
    size = len(factors.signs)
    x = torch.cat([native.hadamard(x[..., :size], left, right), x[..., size:]], -1)
    passed, last = x.split([x.shape[-1] - size, size], -1)
    return torch.cat([passed, native.hadamard(last * factors.signs.to(x.dtype), left, right)], -1)


def coded_transform(x: Float[Tensor, "*rows n"], factors: Factors, coding: Coding) -> Float[Tensor, "*rows n"] | None:
    """What neurons make of `hadamard_transform`, in one pass; None: it takes two."""
    if factors.signs is not None:
        return None
    left, right = (factor.to(x.dtype) for factor in factors[:2])
    return native.coded_hadamard(x, left, right, coding)


def _scrambling_signs(n: int) -> Float[Tensor, " n"]:
    """chi(1) .. chi(n) of the smallest prime above n: signs that no Walsh function resembles (float64, CPU)."""
    with torch.device("cpu"):
        return _quadratic_character(next(q for q in count(n + 1) if _is_prime(q)))[1 : n + 1]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, isqrt(q) + 1))


def _quadratic_character(q: int) -> Float[Tensor, " q"]:
    """chi(0) .. chi(q - 1) for a prime q: 1 at squares, -1 at other numbers, 0 at 0."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[[(x * x) % q for x in range(1, q)]] = 1.0
    chi[0] = 0.0
    return chi


def _jacobsthal(q: int) -> Float[Tensor, "q q"]:
    """Q[i, j] = chi(i - j)."""
    index = torch.arange(q)
    return _quadratic_character(q)[(index[:, None] - index[None, :]) % q]


def _bordered(q: int, corner: float, column: float) -> Float[Tensor, "n n"]:
    """The Jacobsthal matrix with a row of ones above it and a column of `column` beside it."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0] = corner
    bordered[1:, 0] = column
    bordered[1:, 1:] = _jacobsthal(q)
    return bordered


def _paley_1(n: int) -> Float[Tensor, "n n"] | None:
    q = n - 1
    if q % 4 != 3 or not _is_prime(q):
        return None
    # Q is skew: I + S with S = [[0, 1], [-1, Q]]
    return torch.eye(n, dtype=torch.float64) + _bordered(q, 0.0, -1.0)


def _paley_2(n: int) -> Float[Tensor, "n n"] | None:
    q = n // 2 - 1
    if n % 4 or q % 4 != 1 or not _is_prime(q):
        return None
    # Q is symmetric: C = [[0, 1], [1, Q]] has C^2 = q I
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 0.0, 1.0), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def _cosets(m: int, group: set[int]) -> list[list[int]]:
    """Cosets of a subgroup of the units of Z_m, m prime."""
    left, cosets = set(range(1, m)), []
    while left:
        coset = sorted(min(left) * g % m for g in group)
        cosets.append(coset)
        left -= set(coset)
    return cosets


def _williamson(n: int) -> Float[Tensor, "n n"] | None:
    m = n // 4
    if n % 8 != 4 or not _is_prime(m):
        return None
    cube_roots = {g for g in range(1, m) if pow(g, 3, m) == 1}
    for multipliers in (cube_roots, {1}):
        cosets = _cosets(m, {sign * g % m for g in multipliers for sign in (1, -1)})
        if len(cosets) <= 8 and (matrix := _williamson_search(m, cosets)) is not None:
            return matrix
    return None


def _williamson_search(m: int, cosets: list[list[int]]) -> Float[Tensor, "n n"] | None:
    """Four first rows, constant on the cosets, whose circulants' squares add up to 4m I; None if there are none."""
    rows = torch.ones(2 ** len(cosets), m, dtype=torch.float64)
    for row, signs in zip(rows, product((1.0, -1.0), repeat=len(cosets)), strict=True):
        for sign, coset in zip(signs, cosets, strict=True):
            row[coset] = sign
    # The spectrum of a symmetric circulant is real; the four squared spectra must add up to 4m at every frequency.
    power = torch.fft.fft(rows).real[:, [0] + [coset[0] for coset in cosets]] ** 2
    first, second = torch.triu_indices(len(rows), len(rows))
    pair_sums = power[first] + power[second]
    wanted: dict[tuple[float, ...], int] = {}
    for index, sums in enumerate(pair_sums.round(decimals=6).tolist()):
        wanted.setdefault(tuple(sums), index)
    for index, rest in enumerate((4 * m - pair_sums).round(decimals=6).tolist()):
        match = wanted.get(tuple(rest))
        if match is not None:
            shift = (torch.arange(m)[None, :] - torch.arange(m)[:, None]) % m
            a, b, c, d = (rows[pick][shift] for pick in (first[index], second[index], first[match], second[match]))
            blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
            return torch.cat([torch.cat(row, dim=1) for row in blocks])
    return None
