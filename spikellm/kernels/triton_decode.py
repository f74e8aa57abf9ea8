"""Attention of few queries with a long cache in Triton: the keys are split among programs, for one per head would leave a GPU idle.

Three kernels, for a part of the keys must know the largest score of all before it codes its own: `survey_kernel` finds that of every part,
`gather_kernel` mixes every part's values, `conclude_kernel` adds the parts up and normalises. Rows are the queries of all heads that share
keys, so that these are read once for a group; query l of head h of sequence b is number (b H + h) L + l. Names: `triton_attention.py`.
"""

import triton
import triton.language as tl

from spikellm.kernels.triton_attention import finished, mixed, surveyed


@triton.jit
def rows_of(group, H, K, L, M: tl.constexpr):
    """Sequence and key head of the heads that share keys; each row's head, query, and number; rows beyond the last are the last one's."""
    batch, shared = group // K, group % K
    row = tl.minimum(tl.arange(0, M), H // K * L - 1)
    head, token = shared * (H // K) + row // L, row % L
    return batch.to(tl.int64), shared.to(tl.int64), head, token, (batch * H + head).to(tl.int64) * L + token


@triton.jit
def survey_kernel(
    query, query_batch, query_head, query_token, key, key_batch, key_head, key_token, mask, mask_batch, mask_token,
    tops, totals, H, K, L, S, length, rows,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score, and the sum below it, of so many rows with each part of `length` keys [parts, rows]."""
    part = tl.program_id(1)
    batch, shared, head, token, number = rows_of(tl.program_id(0), H, K, L, M)
    query = query + batch * query_batch + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    seen = mask + batch * mask_batch + token.to(tl.int64) * mask_token
    first = part * length
    key += batch * key_batch + shared * key_head
    top, total = surveyed(query, key, key_token, seen, first, tl.minimum(first + length, S), S, SCALING, E, E_, M, N, R, BEFORE, PRECISION)
    own = tl.arange(0, M) < H // K * L
    tl.store(tops + part.to(tl.int64) * rows + number, top, mask=own)
    if BEFORE:
        tl.store(totals + part.to(tl.int64) * rows + number, total, mask=own)


@triton.jit
def overall(tops, totals, number, rows, parts, PARTS: tl.constexpr, BEFORE: tl.constexpr):
    """The largest score of all parts, and the sum below it; PARTS: `parts` or the next power of two."""
    part = tl.arange(0, PARTS)
    there = (part < parts)[:, None]
    at = part.to(tl.int64)[:, None] * rows + number[None, :]
    each = tl.load(tops + at, mask=there, other=-float("inf"))
    top = tl.max(each, 0)
    total = top
    if BEFORE:
        total = tl.sum(tl.load(totals + at, mask=there, other=0) * tl.exp(each - top[None, :]), 0)
    return top, total


@triton.jit
def gather_kernel(
    query, query_batch, query_head, query_token, key, key_batch, key_head, key_token, value, value_batch, value_head, value_token,
    mask, mask_batch, mask_token, tops, totals, mixtures, weights, H, K, L, S, length, rows, parts, theta, h, d, v0, cuts, groups,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr, INTERVALS: tl.constexpr,
    PARTS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Values of each part mixed by coded weights [parts, rows, E], and the sums of these [parts, rows]."""
    part = tl.program_id(1)
    batch, shared, head, token, number = rows_of(tl.program_id(0), H, K, L, M)
    query = query + batch * query_batch + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    seen = mask + batch * mask_batch + token.to(tl.int64) * mask_token
    first = part * length
    key += batch * key_batch + shared * key_head
    value += batch * value_batch + shared * value_head
    top, total = overall(tops, totals, number, rows, parts, PARTS, BEFORE)
    mixture, weight = mixed(
        query, key, key_token, value, value_token, seen, first, tl.minimum(first + length, S), S, top, total,
        theta, h, d, v0, cuts, head[:, None] if PER_HEAD else 0, groups,
        SCALING, E, E_, M, N, R, BEFORE, PRECISION, T, SIGNED, BOUND, SIDES, INTERVALS,
    )  # fmt: skip
    own, e = tl.arange(0, M) < H // K * L, tl.arange(0, E_)
    at = part.to(tl.int64) * rows + number
    tl.store(weights + at, weight, mask=own)
    tl.store(mixtures + at[:, None] * E + e[None, :], mixture, mask=own[:, None] & (e < E)[None, :])


@triton.jit
def conclude_kernel(
    query, query_batch, query_head, query_token, prefix_key, prefix_key_head, prefix_key_token,
    prefix_value, prefix_value_head, prefix_value_token, tops, totals, mixtures, weights, out_at, H, K, L, P, rows, parts,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, R: tl.constexpr, PREFIX: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts' mixtures as one, normalised; out [B, L, H, E]."""
    batch, shared, head, token, number = rows_of(tl.program_id(0), H, K, L, M)
    own, e = tl.arange(0, M) < H // K * L, tl.arange(0, E_)
    mixture, weight = tl.zeros([M, E_], R), tl.zeros([M], R)
    for part in range(parts):
        at = part * rows + number
        weight += tl.load(weights + at)
        mixture += tl.load(mixtures + at[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0)
    if not BEFORE:
        top, _ = overall(tops, totals, number, rows, parts, PARTS, BEFORE)
        mixture = finished(
            query + batch * query_batch + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token, mixture, weight, top,
            prefix_key + shared * prefix_key_head, prefix_key_token, prefix_value + shared * prefix_value_head, prefix_value_token, P,
            SCALING, E, E_, R, PREFIX, PRECISION,
        )  # fmt: skip
    out = out_at + ((batch * L + token) * H + head)[:, None] * E + e[None, :]
    tl.store(out, mixture, mask=own[:, None] & (e < E)[None, :])
