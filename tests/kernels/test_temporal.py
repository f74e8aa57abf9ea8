"""Sums over time against the operator on the sums, in float64; traces computed by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from spikellm.kernels.temporal import integrate, spike_linear, spike_mixture, spike_pairs, step_weights

laws = settings(deadline=None, max_examples=40, derandomize=True)
T_VALUES = st.integers(1, 16)
SEEDS = st.integers(0, 1 << 30)


def trains(generator: torch.Generator, T: int, *shape: int) -> torch.Tensor:
    return torch.randint(-1, 2, (T, *shape), generator=generator, dtype=torch.int8)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def test_a_trace_by_hand():
    """Weights 4, 2, 1 of three steps; a neuron with spikes 1, 0, -1 (3) and one with 0, 1, 1 (3)."""
    spikes = torch.tensor([[[1, 0]], [[0, 1]], [[-1, 1]]], dtype=torch.int8)
    d = torch.tensor([[4.0, 2.0, 1.0]])
    weight, bias = torch.tensor([[10.0, 100.0]]), torch.tensor([0.5])
    (currents,) = spike_linear(spikes, weight, d, bias=bias)
    assert currents.flatten().tolist() == [40.5, 200.0, 90.0]  # 4 * 10 + the bias; 2 * 100; 1 * (100 - 10)


def test_a_trace_of_a_product_by_hand():
    """x = 2, 2, 3 and y = 0, 1, 1 after 1, 2, 3 steps: x y = 0, 2, 3."""
    x, y = (torch.tensor(train, dtype=torch.int8).view(3, 1, 1) for train in ([1, 0, 1], [0, 1, 0]))
    weights = torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1)
    assert [current.item() for current in spike_pairs(x, y, weights, weights)] == [0.0, 2.0, 1.0]


@given(
    T=T_VALUES, groups=st.sampled_from([1, 2, 3, 96]), chunk=st.none() | st.integers(1, 20), biased=st.booleans(), seed=SEEDS,
)  # fmt: skip
@laws
def test_a_linear_adds_up_to_the_folded_one(T, groups, chunk, biased, seed):
    """For one table, tables of wide groups, and one a channel."""
    generator = torch.Generator().manual_seed(seed)
    spikes, weight, d = trains(generator, T, 2, 4, 96), normal(generator, 7, 96), normal(generator, groups, T)
    bias = normal(generator, 7) if biased else None
    parts = list(spike_linear(spikes, weight, d, bias=bias, chunk=chunk))
    assert max(len(part) for part in parts) <= (chunk or T)
    currents = torch.cat(parts)
    values = spikes * step_weights(d, 96)[:, None, None]
    assert currents.shape == (T, 2, 4, 7)
    for t in range(T):
        assert_close(currents[: t + 1].sum(0), linear(values[: t + 1].sum(0), weight, bias))


@given(T=T_VALUES, seed=SEEDS)
@laws
def test_products_of_two_trains_and_of_a_train_and_values(T, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = trains(generator, T, 2, 3, 5, 8), trains(generator, T, 2, 3, 6, 8)
    d_x, d_y = normal(generator, T, 1, 3, 5, 1), normal(generator, T, 1, 3, 1, 1)
    pairs = torch.stack(list(spike_pairs(x, y, d_x, d_y)))
    for t in range(T):
        assert_close(pairs[: t + 1].sum(0), (x * d_x)[: t + 1].sum(0) @ (y * d_y)[: t + 1].sum(0).mT)
    values = normal(generator, 2, 3, 8, 4)
    mixture = torch.stack(list(spike_mixture(x, values, d_x)))
    assert_close(mixture.cumsum(0), (x * d_x).cumsum(0) @ values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_lose_nothing(dtype):
    """Spikes times bfloat16 weights are bfloat16 numbers; their sum is taken in float32."""
    generator = torch.Generator().manual_seed(0)
    spikes, weight = trains(generator, 6, 9, 256), torch.randn(32, 256, generator=generator).to(dtype)
    d = torch.rand(1, 6, generator=generator)
    (currents,) = spike_linear(spikes, weight, d)
    exact = spikes.double() @ weight.double().T * d.double().T[..., None]
    assert currents.dtype == torch.float32
    assert ((currents - exact).abs().max() / exact.abs().max()).item() <= 1e-6


def test_integration_leaves_its_input_alone():
    currents = torch.ones(3, 2)
    assert integrate(currents).tolist() == [3.0, 3.0]
    assert currents.tolist() == [[1.0, 1.0]] * 3
