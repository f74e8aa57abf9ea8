"""Attention with coded weights in Triton, for GPUs: key block by key block, without a matrix of scores.

A code needs a row's largest score before its first exponential, so that keys are read twice: `surveyed` finds the largest score (and, where
weights are normalised before they are coded, the sum of exponentials), `mixed` makes scores once more, codes and mixes. The second time
they are made by the same products in the same order, so that the largest exponential is exactly 1.

Rows are queries: of one head, up to the last key that any of them sees (`attend_kernel`), or, where few queries meet a long cache, those of
all heads that share keys (`triton_decode.py`). What all of these functions call

* query [M]: where each query of a block begins; `key`, `value`: where the keys and values of its head begin, tokens `key_token` apart;
* mask [M]: where each query's row of the mask begins; `group`: of each query's table, a number or [M, 1];
* R: float32 or float64, in which everything is computed; E_: the head width or the next power of two; N: keys of a block;
* BEFORE: weights are probabilities (`attention.coded_average`), else exponentials normalised afterwards (`attention.coded_mixture`).

Source of the two halves of the softmax: Milakov & Gimelshein 2018; of the blocks: Dao et al. 2022. Ours: coded weights, the prefix.
"""

import triton
import triton.language as tl

from spikellm.kernels.triton_neurons import sent


@triton.jit
def block(at, there, E: tl.constexpr, FROM, WIDTH: tl.constexpr, R: tl.constexpr):
    """Numbers FROM .. FROM + WIDTH - 1 of the rows that begin at `at` and are `there`; 0 beyond the head width E and in other rows."""
    e = FROM + tl.arange(0, WIDTH)
    return tl.load(at[:, None] + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0).to(R)


@triton.jit
def products(
    query, key, key_token, columns, S, SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores of a block of keys [M, N], by parts of the head: operands of a whole one would not fit into registers."""
    PART: tl.constexpr = 32 if E_ > 32 else E_
    at, there = key + columns.to(tl.int64) * key_token, columns < S
    every = tl.full([query.shape[0]], 1, tl.int1)
    s = tl.zeros([query.shape[0], columns.shape[0]], R)
    for part in range(0, E_, PART):
        q = block(query, every, E, part, PART, R)
        s = tl.dot(q, tl.trans(block(at, there, E, part, PART, R)), s, input_precision=PRECISION, out_dtype=R)
    return s * SCALING


@triton.jit
def scores(
    query, key, key_token, mask, columns, S,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, R: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block of keys [M, N]: -inf beyond the last one; of a hidden one -inf or, BEFORE, the least number that there is."""
    s = products(query, key, key_token, columns, S, SCALING, E, E_, R, PRECISION)
    there = (columns < S)[None, :]
    shown = tl.load(mask[:, None] + columns[None, :], mask=there, other=0) != 0
    hidden = tl.where(there, least(R), -float("inf")) if BEFORE else -float("inf")
    return tl.where(shown, s, hidden)


@triton.jit
def least(R: tl.constexpr):
    """The least finite number of a dtype."""
    return -1.7976931348623157e308 if R.primitive_bitwidth == 64 else -3.4028234663852886e38


@triton.jit
def surveyed(
    query, key, key_token, mask, first, last, S,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest score of keys first .. last - 1, finite where none is seen; and, BEFORE, the sum of exponentials below it [M]."""
    top, total = tl.full([M], least(R), R), tl.zeros([M], R)
    for start in range(first, last, N):
        s = scores(query, key, key_token, mask, start + tl.arange(0, N), S, SCALING, E, E_, R, BEFORE, PRECISION)
        highest = tl.maximum(top, tl.max(s, 1))
        if BEFORE:
            total = total * tl.exp(top - highest) + tl.sum(tl.exp(s - highest[:, None]), 1)
        top = highest
    return top, total


@triton.jit
def mixed(
    query, key, key_token, value, value_token, mask, first, last, S, top, total, theta, h, d, v0, cuts, group, groups,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BEFORE: tl.constexpr,
    PRECISION: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Values of keys first .. last - 1 mixed by coded weights [M, E_], and the sum of these [M]."""
    mixture, weight = tl.zeros([M, E_], R), tl.zeros([M], R)
    for start in range(first, last, N):
        columns = start + tl.arange(0, N)
        s = scores(query, key, key_token, mask, columns, S, SCALING, E, E_, R, BEFORE, PRECISION)
        e = tl.exp(s - top[:, None])
        if BEFORE:
            e = e / total[:, None]
        e = sent(e, theta, h, d, v0, cuts, group, groups, R, T, SIGNED, BOUND, SIDES, INTERVALS)
        weight += tl.sum(e, 1)
        values = block(value + columns.to(tl.int64) * value_token, columns < S, E, 0, E_, R)
        mixture = tl.dot(e, values, mixture, input_precision=PRECISION, out_dtype=R)
    return mixture, weight


@triton.jit
def finished(
    query, mixture, weight, top, prefix_key, prefix_key_token, prefix_value, prefix_value_token, P,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, R: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`attention.normalised`, its outputs [M, E_]; PREFIX: how many of its keys are taken at a time, 0: there is none."""
    if PREFIX > 0:
        highest = top
        for start in range(0, P, PREFIX):
            columns = start + tl.arange(0, PREFIX)
            s = products(query, prefix_key, prefix_key_token, columns, P, SCALING, E, E_, R, PRECISION)
            highest = tl.maximum(highest, tl.max(tl.where((columns < P)[None, :], s, -float("inf")), 1))
        share = tl.exp(top - highest)
        mixture, weight = mixture * share[:, None], weight * share
        for start in range(0, P, PREFIX):
            columns = start + tl.arange(0, PREFIX)
            s = products(query, prefix_key, prefix_key_token, columns, P, SCALING, E, E_, R, PRECISION)
            e = tl.where((columns < P)[None, :], tl.exp(s - highest[:, None]), 0)
            weight += tl.sum(e, 1)
            values = block(prefix_value + columns.to(tl.int64) * prefix_value_token, columns < P, E, 0, E_, R)
            mixture = tl.dot(e, values, mixture, input_precision=PRECISION, out_dtype=R)
    return mixture / tl.where(weight == 0, 1, weight)[:, None]  # 0: no spike was sent, and there is no prefix


@triton.jit
def ends_kernel(mask, mask_batch, mask_token, ends_at, blocks, L, S, M: tl.constexpr, N: tl.constexpr, BEFORE: tl.constexpr):
    """Behind the last key that any of M queries sees [B, blocks]; S where, BEFORE, one of them sees nothing: its row is uniform."""
    batch, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = tl.minimum(number * M + tl.arange(0, M), L - 1).to(tl.int64)
    last = tl.zeros([M], tl.int32)
    for start in range(0, S, N):
        columns = start + tl.arange(0, N)
        at = mask + batch.to(tl.int64) * mask_batch + rows[:, None] * mask_token + columns[None, :]
        shown = tl.load(at, mask=(columns < S)[None, :], other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(shown, columns[None, :] + 1, 0), 1))
    end = tl.max(last, 0)
    if BEFORE:
        end = tl.where(tl.min(last, 0) == 0, S, end)
    tl.store(ends_at + tl.program_id(0), end)


@triton.jit
def attend_kernel(
    query, query_batch, query_head, query_token, key, key_batch, key_head, key_token, value, value_batch, value_head, value_token,
    mask, mask_batch, mask_token, prefix_key, prefix_key_head, prefix_key_token, prefix_value, prefix_value_head, prefix_value_token,
    out_at, ends, B, H, K, L, S, P, theta, h, d, v0, cuts, groups,
    SCALING: tl.constexpr, E: tl.constexpr, E_: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, PREFIX: tl.constexpr,
    BEFORE: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr,
    INTERVALS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """M queries of a head and all that they see; out [B, L, H, E]."""
    blocks, one = tl.cdiv(L, M), tl.program_id(0) % (B * H)
    number = blocks - 1 - tl.program_id(0) // (B * H)  # the longest rows first: short ones fill what is left of a GPU at the end
    head, batch = one % H, one // H
    of, e = batch.to(tl.int64), tl.arange(0, E_)
    rows = number * M + tl.arange(0, M)
    there = tl.minimum(rows, L - 1).to(tl.int64)  # rows beyond the last are the last one's again
    shared = head // (H // K)
    query = query + of * query_batch + head.to(tl.int64) * query_head + there * query_token
    key += of * key_batch + shared.to(tl.int64) * key_head
    value += of * value_batch + shared.to(tl.int64) * value_head
    seen = mask + of * mask_batch + there * mask_token
    end = tl.load(ends + batch * blocks + number)
    group = head if PER_HEAD else 0
    top, total = surveyed(query, key, key_token, seen, 0, end, S, SCALING, E, E_, M, N, R, BEFORE, PRECISION)
    mixture, weight = mixed(
        query, key, key_token, value, value_token, seen, 0, end, S, top, total, theta, h, d, v0, cuts, group, groups,
        SCALING, E, E_, M, N, R, BEFORE, PRECISION, T, SIGNED, BOUND, SIDES, INTERVALS,
    )  # fmt: skip
    if not BEFORE:
        mixture = finished(
            query, mixture, weight, top, prefix_key + shared * prefix_key_head, prefix_key_token,
            prefix_value + shared * prefix_value_head, prefix_value_token, P, SCALING, E, E_, R, PREFIX, PRECISION,
        )  # fmt: skip
    out = out_at + ((of * L + rows[:, None]) * H + head) * E + e[None, :]
    tl.store(out, mixture, mask=(rows < L)[:, None] & (e < E)[None, :])
