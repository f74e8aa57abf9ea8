"""Two-sided tables and signed digits: hand traces, known digit systems, and laws of every table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.coding.neuron import PhaseNeuron, PhaseTable, count_spikes, decode, encode, fire
from spikellm.kernels.compiled import fused
from spikellm.kernels.encode import Digits, Rows, encode_plain
from spikellm.search.search import base2, evolution
from tests.codes import asked, observed


def one_row(theta, h, d, digits) -> PhaseTable:
    return PhaseTable(*(torch.tensor([row]) for row in (theta, h, d)), torch.zeros(1), digits=digits)


def balanced_ternary(T: int) -> PhaseTable:
    """Powers of three down to 1; a digit is -1, 0 or +1, whichever leaves the smallest rest."""
    powers = [3.0 ** (T - 1 - t) for t in range(T)]
    return one_row([power / 2 for power in powers], powers, powers, Digits(signed=True))


def non_adjacent(T: int) -> PhaseTable:
    """Powers of two down to 1; theta = 2/3 h gives the non-adjacent form."""
    powers = [2.0 ** (T - 1 - t) for t in range(T)]
    return one_row([2 * power / 3 for power in powers], powers, powers, Digits(signed=True))


def test_balanced_ternary_writes_every_integer_of_its_range():
    x = torch.arange(-40, 41).float()
    assert torch.equal(encode(x[None, None], balanced_ternary(4), compiled=False)[0, 0], x)
    # 8 = 9 - 1, -5 = -(9 - 3 - 1)
    train = fire(torch.tensor([[[8.0, -5.0]]]), balanced_ternary(4))[:, 0, 0]
    assert train.T.tolist() == [[0, 1, 0, -1], [0, -1, 1, 1]]


def test_two_thirds_of_the_reset_give_the_non_adjacent_form():
    x = torch.arange(0, 170).float()
    table = non_adjacent(9)
    assert torch.equal(encode(x[None, None], table, compiled=False)[0, 0], x)
    train = fire(x[None, None], table)[:, 0, 0].int()
    assert not (train[1:] * train[:-1]).any()  # never two digits side by side
    # the weight of the non-adjacent form is that of 3 n xor n, shifted (Reitwiesner 1960)
    least = [bin((3 * n) ^ n).count("1") for n in range(170)]
    assert train.abs().sum(0).tolist() == least
    assert count_spikes(x[None, :, None], table, compiled=False).sum(0)[0].tolist() == least


def test_a_two_sided_neuron_is_an_on_and_an_off_neuron():
    rows = {"theta": [[2.0, 1.0], [0.2, 0.1]], "h": [[2.0, 1.0], [0.2, 0.1]], "d": [[2.0, 1.0], [0.2, 0.1]]}
    table = PhaseTable(**{name: torch.tensor(row) for name, row in rows.items()}, v0=torch.tensor([0.5, 0.05]), digits=Digits(sides=2))
    assert table.groups == 1
    x = torch.tensor([3.2, 1.1, 0.3, 0.0, -0.1, -0.3, -5.0])
    wanted = torch.tensor([3.0, 1.0, 0.0, 0.0, -0.1, -0.3, -0.3])
    for neuron in (PhaseNeuron(table, compiled=False), PhaseNeuron(table)):
        assert torch.allclose(neuron(x), wanted)
    train = fire(x[None, None], table)
    assert train[:, 0, 0].T.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0], [0, -1], [-1, -1], [-1, -1]]
    assert torch.allclose(decode(train, table)[0, 0], wanted)


def test_what_a_wire_could_not_tell_is_refused():
    rows = {"theta": torch.ones(2, 1), "h": torch.ones(2, 1), "d": torch.ones(2, 1), "v0": torch.zeros(2)}
    with pytest.raises(ValueError, match="not both"):
        Digits(sides=2, signed=True)
    with pytest.raises(ValueError, match="even number"):
        PhaseTable(**{name: row[:1] for name, row in rows.items()}, digits=Digits(sides=2))


def test_digits_that_no_neuron_could_send_are_refused():
    with pytest.raises(ValueError, match="max_spikes=0"):
        Digits(max_spikes=0)
    with pytest.raises(ValueError, match="sides=3"):
        Digits(sides=3)


@pytest.mark.parametrize("digits", [Digits(), Digits(sides=2)], ids=str)
def test_every_input_is_one_populations(digits):
    x = torch.tensor([3.2, 0.0, -0.1, -5.0])
    parts = digits.parts(x)
    assert len(parts) == digits.populations
    assert torch.equal(sum(parts), x)
    assert sum((part != 0).int() for part in parts).tolist() == [1, 0, 1, 1]


KINDS = [Digits(), Digits(sides=2), Digits(signed=True), Digits(max_spikes=2), Digits(max_spikes=2, signed=True)]


@pytest.mark.parametrize("digits", [Digits(sides=2), Digits(max_spikes=2, signed=True)], ids=str)
def test_the_fused_pass_equals_the_plain_one(digits):
    theta, h, d = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
    table = PhaseTable(theta=theta, h=h, d=d, v0=torch.zeros(4), digits=digits)
    x = torch.randn(3, table.groups, 50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(encode(x, table), encode(x, table, compiled=False), atol=1e-6)


def test_the_fused_pass_is_compiled_once_for_all_tables_and_bounds():
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    compiled, seen = fused(encode_plain, "cpu"), []
    for seed, digits in enumerate([Digits(max_spikes=2), Digits(max_spikes=3), Digits(max_spikes=4), Digits(max_spikes=2, sides=2)]):
        generator = torch.Generator().manual_seed(seed)
        rows = Rows(*torch.rand(3, 5, 3, generator=generator), torch.rand(5, generator=generator))
        for size in (40 + seed, 70):
            x = torch.randn(3, 5, size, generator=generator)
            assert torch.allclose(compiled(x, rows, digits), encode_plain(x, rows, digits), atol=1e-6)
            seen.append(counted["unique_graphs"])
    assert seen[-1] == seen[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(KINDS))
def test_encoding_is_the_decoded_train_and_counts_are_its_spikes(T, seed, digits):
    generator = torch.Generator().manual_seed(seed)
    groups = 2
    rows = groups * digits.sides
    theta, h, d = torch.rand(3, rows, T, generator=generator)
    table = PhaseTable(theta=theta, h=h, d=d, v0=0.2 * torch.randn(rows, generator=generator), digits=digits)
    x = torch.randn(3, groups, 5, generator=generator)
    train = fire(x, table)
    assert train.shape == (T, *x.shape)
    assert set(train.unique().tolist()) <= {-1, 0, 1}
    assert torch.allclose(decode(train, table), encode(x, table, compiled=False), atol=1e-6)
    counted = count_spikes(x.movedim(1, 0), table, compiled=False)
    assert torch.equal(counted, train.ne(0).sum(-1).movedim(1, 2))


def test_silu_gains_from_two_sides_and_everything_from_signed_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.silu(2 * torch.randn(100_000, generator=generator))
    sides, together = observed(x, sides=2), observed(x)
    assert sides.counts.shape[1] == 2
    assert torch.equal(sides.counts.sum(1), together.counts[:, 0])
    assert torch.equal(sides.maximum.amax(1), together.maximum[:, 0])
    errors = {}
    for name, statistics, coding in (("one", together, "phase"), ("two", sides, "phase"), ("signed", sides, "phase_signed")):
        fit = evolution({"site": statistics}, asked(4, 2, coding=coding))["site"]
        neuron = PhaseNeuron(fit.table, compiled=False)
        held_out = x.chunk(4)[3]
        error = ((neuron(held_out) - held_out).square().sum() / held_out.square().sum()).item()
        assert fit.relative_error == pytest.approx(error, rel=0.05)
        rate = fire(held_out[None, None], fit.table).ne(0).float().mean().item()
        assert fit.mean_firing_rate == pytest.approx(rate, rel=0.02)
        errors[name] = error
    assert errors["two"] < 0.7 * errors["one"]
    assert errors["signed"] < 0.5 * errors["two"]


def test_base_2_is_the_same_with_signed_digits():
    """Its residual never goes below zero, so that it stays the fallback."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    table = base2({"site": observed(x)}, asked(6))["site"].table
    signed = PhaseTable(*table.rows, digits=Digits(signed=True))
    assert torch.equal(fire(x[None, None], table), fire(x[None, None], signed))


@pytest.mark.parametrize("coding", ["phase", "phase_signed"])
def test_a_weight_on_spikes_buys_fewer_of_them(coding):
    statistics = {"site": observed(torch.randn(100_000, generator=torch.Generator().manual_seed(2)))}
    rates, errors = [], []
    for weight in (0.0, 2.0, 3.0, 4.0):
        fit = evolution(statistics, asked(6, 2, coding=coding, spike_weight=weight))["site"]
        rates.append(fit.mean_firing_rate)
        errors.append(fit.relative_error)
    assert rates == sorted(rates, reverse=True)
    assert errors == sorted(errors)
    assert rates[-1] < 0.8 * rates[0]
