"""Amplitudes of tokens: by hand, by their law (a token k times as large gives an output k times as large), and as scaled tables."""

import pytest
import torch

from spikellm.coding.neuron import PhaseNeuron, PhaseTable, encode, token_amplitude
from spikellm.kernels.encode import Digits
from tests.codes import PARTITIONS, base2_table, partitioned_table

HALVES = PhaseTable(*(torch.tensor([[0.5, 0.25]]) for _ in range(3)), v0=torch.tensor([0.001]))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    """x / 4 = 1, -0.5, 0.25, 0.1 in halves and quarters: 0.75, -0.5, 0.25, 0; a token of zeros stays one."""
    neuron = PhaseNeuron(HALVES, per_token=True, compiled=False)
    x = torch.tensor([[[4.0, -2.0, 1.0, 0.4], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.5]]])
    assert token_amplitude(x).tolist() == [[[4.0], [1.0], [1.0]]]
    assert neuron(x).tolist() == [[[3.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-0.75, 0.0, 0.0, 0.5]]]
    assert PhaseNeuron(HALVES, compiled=False)(x)[0, 0].tolist() == [0.75, -0.75, 0.75, 0.25]


@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_tokens_that_are_scaled_have_outputs_scaled_alike(digits):
    neuron = PhaseNeuron(partitioned_table([0.9, 1.1, 0.7], 5, digits), per_token=True, compiled=False).double()
    x = tokens(2, 50, 24)
    factors = tokens(2, 50, 1, seed=1).exp()
    y = neuron(x)
    assert torch.allclose(neuron(factors * x), factors * y, rtol=1e-12, atol=0)
    powers = (3 * factors).log2().round().exp2()
    assert torch.equal(neuron(powers * x), powers * y)
    assert y.abs().max() > 0.5


@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_it_is_a_table_whose_rows_and_cuts_are_larger(digits):
    """m, a power of 2, changes no rounding: the same spikes, which is what the energy counts."""
    table = partitioned_table([0.9, 1.1], 6, digits)
    x = tokens(1, 1, 64).float()
    x = 8 * x / x.abs().amax()
    wanted = encode(x.view(1, 2, 32), table.map(lambda rows: 8 * rows), compiled=False)
    found = PhaseNeuron(table, per_token=True, compiled=False)(x)
    assert torch.equal(found, wanted.view_as(x))


def test_the_amplitude_is_of_all_groups_and_what_is_no_number_stays_none():
    neuron = PhaseNeuron(base2_table([1.0, 1.0], 8), per_token=True, compiled=False)
    x = torch.tensor([[2.0, 0.5, -8.0, 1.0], [1.0, torch.nan, 1.0, 1.0], [0.25, 0.25, 0.25, 0.125]])
    assert token_amplitude(x)[[0, 2]].tolist() == [[8.0], [0.25]]
    assert neuron(x)[0] == pytest.approx(x[0], abs=8 * 2**-8)
    assert neuron.amplitude(x)[1].isnan()
    assert "amplitude of the token" in repr(neuron)
    assert "amplitude" not in repr(PhaseNeuron(base2_table(1.0, 8)))


@pytest.mark.slow
def test_the_fused_form_is_the_plain_one():
    table = partitioned_table([0.9, 1.1], 4, Digits(signed=True, intervals=2))
    x = tokens(3, 5, 16).float()
    plain, fused = (PhaseNeuron(table, per_token=True, compiled=compiled)(x) for compiled in (False, True))
    assert torch.equal(plain, fused)
