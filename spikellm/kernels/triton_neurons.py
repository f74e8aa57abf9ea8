"""The neuron in Triton, for GPUs: the steps of `encode.py`'s `respond` for a block of inputs, and kernels that take every input once.

Products with a digit (-1, 0 or 1) are exact, so that a fused multiplication and addition rounds as two operations do: the numbers are
those of the plain form, to the last bit. A code comes as `Rows` and cuts by address, of C groups and P populations, row p C + c; what
kind of digits it has is known when a kernel is compiled, once for a kind and T. Nothing but `gpu.py` imports this file, and Triton with it.
"""

import triton
import triton.language as tl


@triton.jit
def owners(x, magnitude, cuts, group, groups, SIDES: tl.constexpr, INTERVALS: tl.constexpr):
    """`encode.owners` as integers: the population of each input of a group (a number, or numbers to broadcast against x)."""
    interval = tl.zeros_like(magnitude).to(tl.int32)
    for k in tl.static_range(INTERVALS - 1):
        end = tl.load(cuts + k * SIDES * groups + group)
        if SIDES == 2:
            end = tl.where(x < 0, tl.load(cuts + (k * SIDES + 1) * groups + group), end)
        interval += (magnitude > end).to(tl.int32)
    return 2 * interval + (x < 0).to(tl.int32) if SIDES == 2 else interval


@triton.jit
def own(row, owner, stride, P: tl.constexpr):
    """`encode.own`: of the populations' numbers, `stride` apart from `row` on, what each input's own has."""
    found = tl.load(row)
    for p in tl.static_range(1, P):
        found = tl.where(owner == p, tl.load(row + p * stride), found)
    return found


@triton.jit
def emit(v, theta, fired, SIGNED: tl.constexpr, BOUND: tl.constexpr):
    """`encode.emit`; BOUND 0: there is none."""
    z = (v > theta).to(v.dtype)
    if SIGNED:
        z -= (v < -theta).to(v.dtype)
    if BOUND > 0:
        z = tl.where(fired < BOUND, z, tl.zeros_like(z))
        fired += tl.abs(z)
    return z, fired


@triton.jit
def sign(x, like):
    """-1, 0 or 1, in another's dtype; of a number that is none 0."""
    return (x > 0).to(like.dtype) - (x < 0).to(like.dtype)


@triton.jit
def sent(
    x, theta, h, d, v0, cuts, group, groups,
    R: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """`encode_plain` of a block of inputs, in the rows' dtype R."""
    P: tl.constexpr = SIDES * INTERVALS
    magnitude = tl.abs(x).to(R)
    owner = owners(x, magnitude, cuts, group, groups, SIDES, INTERVALS)
    v = magnitude + own(v0 + group, owner, groups, P)
    y, fired = tl.zeros_like(v), tl.zeros_like(v)
    for t in range(T):
        at = group * T + t
        z, fired = emit(v, own(theta + at, owner, groups * T, P), fired, SIGNED, BOUND)
        v -= own(h + at, owner, groups * T, P) * z
        y += own(d + at, owner, groups * T, P) * z
    return y * sign(x, y)


@triton.jit
def encode_kernel(
    x_at, y_at, theta, h, d, v0, cuts, groups, width,
    WIDE: tl.constexpr, R: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr,
    INTERVALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one group's consecutive inputs; x [.., groups, width], WIDE its dtype or float32, y in its own."""
    pieces = tl.cdiv(width, BLOCK)
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    column = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row.to(tl.int64) * width + column
    x = tl.load(x_at + at, mask=inside, other=0).to(WIDE)
    y = sent(x, theta, h, d, v0, cuts, row % groups, groups, R, T, SIGNED, BOUND, SIDES, INTERVALS)
    tl.store(y_at + at, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def fire_kernel(
    x_at, train_at, theta, h, d, v0, cuts, groups, width, size,
    WIDE: tl.constexpr, R: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr,
    INTERVALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, of which the spikes are kept: [T P, size] for x of so many inputs."""
    P: tl.constexpr = SIDES * INTERVALS
    pieces = tl.cdiv(width, BLOCK)
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    column = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row.to(tl.int64) * width + column
    x = tl.load(x_at + at, mask=inside, other=0).to(WIDE)
    group, magnitude = row % groups, tl.abs(x).to(R)
    owner = owners(x, magnitude, cuts, group, groups, SIDES, INTERVALS)
    v = magnitude + own(v0 + group, owner, groups, P)
    fired, wire = tl.zeros_like(v), train_at + at
    for t in range(T):
        z, fired = emit(v, own(theta + group * T + t, owner, groups * T, P), fired, SIGNED, BOUND)
        v -= own(h + group * T + t, owner, groups * T, P) * z
        spike = (sign(x, v) * z).to(tl.int8)
        for p in tl.static_range(P):
            of_p = spike if P == 1 else tl.where(owner == p, spike, tl.zeros_like(spike))
            tl.store(wire, of_p, mask=inside)
            wire += size


@triton.jit
def count_kernel(
    x_at, counts_at, theta, h, d, v0, cuts, groups, positions, width,
    WIDE: tl.constexpr, R: tl.constexpr, T: tl.constexpr, SIGNED: tl.constexpr, BOUND: tl.constexpr, SIDES: tl.constexpr,
    INTERVALS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Spikes of so many BLOCKS of one position's inputs, x [groups, positions, width], added to [T, groups, positions]; STEPS >= T."""
    P: tl.constexpr = SIDES * INTERVALS
    pieces = tl.cdiv(width, BLOCK * BLOCKS)
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    group, step = row // positions, tl.arange(0, STEPS)
    counts = tl.zeros([STEPS], tl.int32)
    for block in range(BLOCKS):
        column = (piece.to(tl.int64) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_at + row.to(tl.int64) * width + column, mask=column < width, other=0).to(WIDE)
        magnitude = tl.abs(x).to(R)
        owner = owners(x, magnitude, cuts, group, groups, SIDES, INTERVALS)
        v = magnitude + own(v0 + group, owner, groups, P)
        fired = tl.zeros_like(v)
        for t in range(T):
            z, fired = emit(v, own(theta + group * T + t, owner, groups * T, P), fired, SIGNED, BOUND)
            v -= own(h + group * T + t, owner, groups * T, P) * z
            counts += tl.where(step == t, tl.sum(((z != 0) & (x != 0)).to(tl.int32), 0), 0)
    tl.atomic_add(counts_at + step.to(tl.int64) * groups * positions + row, counts.to(tl.int64), mask=step < T)
