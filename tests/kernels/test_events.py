"""Products of spikes in C++ against the plain forms: float64 to rounding of float64, float32 to that of float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.kernels import attention, events, native, temporal

pytestmark = pytest.mark.kernels

law = settings(deadline=None, max_examples=40, derandomize=True)
SEEDS = st.integers(0, 1 << 30)
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler")


def train(numbers: torch.Generator, rate: float, *shape: int) -> torch.Tensor:
    """Spikes at a rate; the first wire is silent."""
    spikes = torch.randint(-1, 2, shape, generator=numbers) * (torch.rand(shape, generator=numbers) < rate)
    spikes[0] = 0
    return spikes.to(torch.int8)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, within: float) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= within * wanted.double().norm()


@given(
    T=st.integers(1, 8), P=st.integers(1, 4), groups=st.sampled_from([1, 2, 3]), width=st.sampled_from([16, 37, 64, 320, 600]),
    rows=st.integers(16, 70), outputs=st.integers(1, 70), dtype=st.sampled_from(list(WITHIN)), rate=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    scaled=st.booleans(), biased=st.booleans(), chunk=st.none() | st.integers(1, 9), seed=SEEDS,
)  # fmt: skip
@law
def test_a_linear_is_the_plain_one(T, P, groups, width, rows, outputs, dtype, rate, scaled, biased, chunk, seed):
    """Also of strided trains, as a norm sends them."""
    numbers = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    spikes = train(numbers, rate, T * P, 2, rows, groups * width + 32)[..., : groups * width]
    weight = torch.randn(outputs, groups * width, generator=numbers).to(dtype)
    wires = torch.randn(groups, T * P, generator=numbers).to(wide)
    scale = torch.rand(2, rows, 1, generator=numbers).to(wide) if scaled else None
    bias = torch.randn(outputs, generator=numbers).to(dtype) if biased else None
    options = {"populations": P, "bias": bias, "chunk": chunk}
    exact = {"populations": P, "bias": None if bias is None else bias.double(), "chunk": chunk}
    given_parts = list(events.linear(spikes, weight, wires, scale=scale, **options))
    factors = None if scale is None else scale.double()
    wanted = list(temporal.spike_linear(spikes, weight.double(), wires.double(), scale=factors, **exact))
    assert [len(part) for part in given_parts] == [len(part) for part in wanted]
    found, steps = torch.cat(given_parts), torch.cat(wanted)
    assert found.dtype == wide
    assert_near(found, steps, WITHIN[dtype])
    total = events.linear_sum(spikes, weight, wires, scale=scale, **options)
    assert (total.double() - steps.sum(0)).norm() <= WITHIN[dtype] * steps.norm() * T
    plain = events.linear_sum(spikes, weight, wires, scale=scale, compiled=False, **options)
    assert (plain.double() - steps.sum(0)).norm() <= 10 * WITHIN[dtype] * steps.norm() * T


def test_weights_far_apart_and_rows_of_zeros():
    numbers = torch.Generator().manual_seed(0)
    spikes, wires = train(numbers, 0.3, 4, 40, 128), torch.rand(1, 4, generator=numbers)
    weight = torch.randn(24, 128, generator=numbers) * torch.logspace(-20, 20, 24)[:, None]
    weight[5] = 0
    weight[7, 3] = -1e30
    found = torch.cat(list(events.linear(spikes, weight, wires)))
    wanted = torch.cat(list(temporal.spike_linear(spikes, weight.double(), wires.double())))
    for column in range(24):
        assert_near(found[..., column], wanted[..., column], 1e-6)


def test_few_rows_narrow_groups_and_other_dtypes_are_the_plain_form():
    numbers = torch.Generator().manual_seed(0)
    for rows, groups, dtype in ((3, 1, torch.float32), (20, 16, torch.float32), (20, 1, torch.float16)):
        spikes, weight = train(numbers, 0.3, 4, rows, 64), torch.randn(8, 64, generator=numbers).to(dtype)
        wires = torch.rand(groups, 4, generator=numbers)
        found, wanted = (list(form(spikes, weight, wires)) for form in (events.linear, temporal.spike_linear))
        assert torch.equal(torch.cat(found), torch.cat(wanted))


def per_head(wires: torch.Tensor, heads: int) -> torch.Tensor:
    return temporal.step_weights(wires.double(), heads)[:, None, :, None, None]


@given(
    T=st.integers(1, 7), P=st.integers(1, 3), Q=st.integers(1, 3), share=st.sampled_from([1, 3]), own=st.booleans(),
    L=st.integers(16, 70), S=st.integers(1, 150), E=st.sampled_from([5, 24, 64, 80]), seed=SEEDS,
)  # fmt: skip
@law
def test_pairs_and_mixtures_are_the_plain_ones_summed(T, P, Q, share, own, L, S, E, seed):
    numbers = torch.Generator().manual_seed(seed)
    B, K = 2, 2
    H = K * share
    S = max(S, 16)
    query, key = train(numbers, 0.4, T * P, B, L, H, E).transpose(2, 3), train(numbers, 0.4, T * Q, B, K, S, E)
    d_query, d_key = (torch.rand(heads if own else 1, wires, generator=numbers) for heads, wires in ((H, T * P), (K, T * Q)))
    mask = torch.rand(1, 1, L, S, generator=numbers).expand(B, -1, -1, -1) < 0.5
    found = events.pair_scores(query, key, (d_query, d_key), mask, 0.3, (P, Q))
    if found is None:
        pytest.skip("no unit for matrices of bytes")
    repeated, d_repeated = key.repeat_interleave(share, 2), per_head(d_key, K).repeat_interleave(share, 2)
    pairs = temporal.spike_pairs(query, repeated, 0.3 * per_head(d_query, H), d_repeated, populations=(P, Q))
    wanted = temporal.integrate(pairs)
    assert_near(found.where(mask, 0), wanted.where(mask, 0), 2e-6)
    value = torch.randn(B, K, S, E + 1, generator=numbers)
    spikes = train(numbers, 0.1, T * P, B, H, L, S)
    mixed, total = events.mixture_sum(spikes, value[..., :E], d_query, P)
    exact = value.double().repeat_interleave(share, 1)
    exact[..., E] = 1
    wanted = temporal.integrate(temporal.spike_mixture(spikes, exact, per_head(d_query, H), populations=P))
    assert (mixed - wanted[..., :E]).norm() <= 1e-5 * wanted[..., :E].norm() + 1e-9
    assert (total - wanted[..., E:]).norm() <= 1e-5 * wanted[..., E:].norm() + 1e-9


@given(dtype=st.sampled_from([torch.float32, torch.float64]), S=st.integers(1, 200), L=st.integers(1, 9), seed=SEEDS)
@law
def test_exponentials_of_rows_of_which_some_see_nothing(dtype, S, L, seed):
    numbers = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, L, S, generator=numbers, dtype=dtype) * 10
    mask = torch.rand(2, 1, L, S, generator=numbers) < 0.5
    mask[0, :, 0] = False
    wanted, highest = attention.exponentials(scores, mask)
    found, tops = events.exponentials(scores.clone(), mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=1e-30)
    assert torch.equal(tops, highest)


@given(dtype=st.sampled_from([torch.float32, torch.float64]), S=st.integers(1, 9), width=st.integers(1, 5000), seed=SEEDS)
@law
def test_sums_over_time(dtype, S, width, seed):
    numbers = torch.Generator().manual_seed(seed)
    currents, weights = (torch.randn(S, *shape, generator=numbers, dtype=dtype) for shape in ((2, 3, width), (width,)))
    torch.testing.assert_close(events.integrate(currents), currents.sum(0))
    torch.testing.assert_close(events.integrate(currents, weights), (currents * weights[:, None, None]).sum(0))
    turned = currents.transpose(1, 2)
    torch.testing.assert_close(events.integrate(turned), turned.sum(0))
