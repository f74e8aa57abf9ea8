"""The differentiable neuron: its value is the neuron's, its derivatives those of means over many inputs, taken by differences."""

import pytest
import torch

from spikellm.coding.neuron import BEYOND, PhaseNeuron, PhaseTable, encode
from spikellm.kernels.encode import Digits
from spikellm.reconstruction import surrogate
from spikellm.reconstruction.surrogate import TunableNeuron, differentiable_encode
from tests.codes import PARTITIONS, base2_table, partitioned_table

POINTS = 20_001
STEP = 3e-3  # of the differences
FUSED = Digits(signed=True)  # one code is enough to compile: seconds each


def inputs() -> torch.Tensor:
    """A dense grid for two groups, float64."""
    grid = torch.arange(POINTS, dtype=torch.float64) / POINTS * 2 - 1
    return (1.6 * grid * torch.tensor([[1.0], [1.2]], dtype=torch.float64))[None]


def tensors(table: PhaseTable) -> dict[str, torch.Tensor]:
    return table.rows._asdict() | ({} if table.cuts is None else {"cuts": table.cuts})


@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_derivatives_are_those_of_a_smooth_functional_of_the_output(digits, monkeypatch):
    monkeypatch.setattr(surrogate, "WIDTH", 0.05)  # kernels that are narrow beside what the functional changes over
    table, x = partitioned_table([1.0, 1.3], 4, digits).to(torch.float64), inputs()
    weight = torch.cos(2.3 * x) + 0.3 * x

    def functional() -> float:
        return (weight * encode(x, table, compiled=False)).mean().item()

    for part in tensors(table).values():
        part.requires_grad_()
    (weight * differentiable_encode(x, table, compiled=False)).mean().backward()
    for name, part in tensors(table).items():
        wanted = torch.zeros_like(part)
        with torch.no_grad():
            for index in range(part.numel()):
                at = part.view(-1)
                start = at[index].item()
                at[index] = start + STEP
                above = functional()
                at[index] = start - STEP
                wanted.view(-1)[index] = (above - functional()) / (2 * STEP)
                at[index] = start
        assert (part.grad - wanted).norm() < (1e-6 if name == "d" else 0.06) * wanted.norm(), name


@pytest.mark.parametrize(("digits", "compiled"), [(FUSED, True), *((digits, False) for digits in PARTITIONS)], ids=str)
def test_the_value_is_the_neurons_to_the_last_bit(digits, compiled):
    neuron = PhaseNeuron(partitioned_table([1.0, 1.3], 4, digits), compiled=compiled)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TunableNeuron(neuron)(x), neuron(x))


@pytest.mark.slow
def test_the_fused_derivatives_are_the_plain_ones():
    x = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        table = partitioned_table([1.0, 1.3], 4, FUSED)
        own = [x.clone().requires_grad_(), *(part.requires_grad_() for part in table.rows)]
        differentiable_encode(own[0], table, compiled=compiled).square().mean().backward()
        found.append([part.grad for part in own])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_the_input_passes_straight_up_to_the_largest_value_that_can_be_sent():
    table = base2_table(1.0, 4)  # 15/16 at most
    x = torch.tensor([-2.0, -0.9, -0.01, 0.01, 0.93, 0.94, 3.0]).requires_grad_()
    upstream = torch.arange(1.0, 8.0)
    differentiable_encode(x[None, None], table, compiled=False).backward(upstream[None, None])
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]


def test_one_spike_at_most_bounds_what_can_be_sent():
    table = base2_table(1.0, 4)
    table = PhaseTable(*table.rows, digits=Digits(max_spikes=1))
    x = torch.tensor([0.49, 0.51]).requires_grad_()
    differentiable_encode(x[None, None], table, compiled=False).sum().backward()
    assert x.grad.tolist() == [1, 0]


@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_whatever_is_learnt_spells_a_table(digits):
    neuron = TunableNeuron(PhaseNeuron(partitioned_table([1.0, 1.3], 4, digits, unused=True), compiled=False))
    start = neuron.table
    for name, part in tensors(start).items():
        assert torch.equal(part, tensors(neuron.start)[name]), "nothing is learnt yet"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.normal_(generator=generator)
    found = neuron.table
    PhaseTable(*found.rows, digits=digits, cuts=found.cuts)  # checks
    if start.cuts is not None:
        assert torch.equal(found.cuts < BEYOND, start.cuts < BEYOND)
    assert torch.equal(found.d == 0, start.d == 0)


def test_an_amplitude_that_is_too_small_is_found_again():
    """Gaussian inputs, a squared error: the least that any amplitude gives, by trying them."""
    x = torch.randn(1, 1, 20_000, generator=torch.Generator().manual_seed(0))

    def error(tau: float) -> float:
        return (encode(x, base2_table(tau, 4), compiled=False) - x).square().mean().item()

    least = min(error(tau / 50) for tau in range(50, 250))
    neuron = TunableNeuron(PhaseNeuron(base2_table(1.0, 4), compiled=False))
    optimiser = torch.optim.Adam([neuron.tau], lr=0.3)
    for _ in range(60):
        optimiser.zero_grad()
        (neuron(x) - x).square().mean().backward()
        optimiser.step()
    assert (neuron(x) - x).square().mean().item() < 1.05 * least < 0.2 * error(1.0)
