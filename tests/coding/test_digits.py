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
    on, off = train[0::2, 0, 0].T.tolist(), train[1::2, 0, 0].T.tolist()  # a wire each
    assert on == [[1, 1], [0, 1], *[[0, 0]] * 5]
    assert off == [*[[0, 0]] * 4, [0, -1], [-1, -1], [-1, -1]]
    assert torch.allclose(decode(train, table)[0, 0], wanted)


def test_a_partition_that_the_rows_do_not_have_is_refused():
    rows = {"theta": torch.ones(3, 1), "h": torch.ones(3, 1), "d": torch.ones(3, 1), "v0": torch.zeros(3)}
    with pytest.raises(ValueError, match="2 populations cannot have 3 rows"):
        PhaseTable(**rows, digits=Digits(sides=2))
    three = Digits(intervals=3)
    for cuts, complaint in (
        (None, r"needs cuts \[2, 1\], got \[0, 1\]"),
        (torch.ones(1, 1), r"needs cuts \[2, 1\]"),
        (torch.tensor([[2.0], [1.0]]), "not ascending"),
        (torch.tensor([[-1.0], [1.0]]), "negative"),
        (torch.tensor([[1.0], [torch.nan]]), "NaN"),
    ):
        with pytest.raises(ValueError, match=complaint):
            PhaseTable(**rows, digits=three, cuts=cuts)
    with pytest.raises(ValueError, match="1 intervals needs cuts"):
        PhaseTable(**rows, cuts=torch.ones(1, 3))


def test_an_interval_has_a_table_of_its_own():
    """Steps of 1 up to 3, of 4 above: the first digit of the upper table is the offset that puts its levels where they belong."""
    theta, d = torch.tensor([[2.0, 1.0], [0.0, 2.0]]), torch.tensor([[2.0, 1.0], [6.0, 4.0]])
    h = torch.tensor([[2.0, 1.0], [6.0, 4.0]])
    table = PhaseTable(theta, h, d, torch.tensor([0.5, 0.0]), digits=Digits(intervals=2), cuts=torch.tensor([[4.0]]))
    x = torch.tensor([0.0, 0.4, 1.2, -3.1, 4.0, 4.1, -7.0, 9.0, 1000.0])
    wanted = torch.tensor([0.0, 0.0, 1.0, -3.0, 3.0, 6.0, -6.0, 10.0, 10.0])
    for neuron in (PhaseNeuron(table, compiled=False), PhaseNeuron(table)):
        assert torch.equal(neuron(x), wanted)
    inner, outer = (fire(x[None, None], table)[wire::2, 0, 0].T.tolist() for wire in (0, 1))
    assert inner == [[0, 0], [0, 0], [0, 1], [-1, -1], [1, 1], *[[0, 0]] * 4]
    assert outer == [*[[0, 0]] * 5, [1, 0], [-1, 0], [1, 1], [1, 1]]
    assert torch.equal(table.wires, torch.tensor([[2.0, 6.0, 1.0, 4.0]]))


def test_an_interval_beyond_all_inputs_is_not_in_use():
    """Two sides, two groups, three intervals: the cuts of a column are those of (side, group)."""
    beyond = torch.finfo(torch.float32).max
    rows = {name: torch.ones(12, 2) for name in ("theta", "h", "d")}
    cuts = torch.tensor([[1.0, 2.0, beyond, 3.0], [beyond, 4.0, beyond, beyond]])
    table = PhaseTable(**rows, v0=torch.zeros(12), digits=Digits(sides=2, intervals=3), cuts=cuts)
    assert table.intervals.tolist() == [[2, 3], [1, 2]]
    assert table.group(1).intervals.tolist() == [[3], [2]]
    assert table.to(torch.float64).intervals.tolist() == [[2, 3], [1, 2]]


def test_digits_that_no_neuron_could_send_are_refused():
    with pytest.raises(ValueError, match="max_spikes=0"):
        Digits(max_spikes=0)
    with pytest.raises(ValueError, match="sides=3"):
        Digits(sides=3)


def random_table(digits: Digits, groups: int, T: int, generator: torch.Generator) -> PhaseTable:
    theta, h, d = torch.rand(3, groups * digits.populations, T, generator=generator)
    v0 = 0.2 * torch.randn(len(theta), generator=generator)
    cuts = torch.rand(digits.intervals - 1, groups * digits.sides, generator=generator).cumsum(0) if digits.intervals > 1 else None
    return PhaseTable(theta=theta, h=h, d=d, v0=v0, digits=digits, cuts=cuts)


KINDS = [
    Digits(),
    Digits(sides=2),
    Digits(signed=True),
    Digits(max_spikes=2),
    Digits(max_spikes=2, signed=True),
    Digits(intervals=2),
    Digits(intervals=3, signed=True),
    Digits(intervals=3, sides=2, signed=True),
]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(KINDS))
def test_every_input_is_one_populations(seed, digits):
    """Each wire is silent outside of its piece of the line, and inside sends what a neuron with its table alone would."""
    generator = torch.Generator().manual_seed(seed)
    groups, T = 2, 3
    table = random_table(digits, groups, T, generator)
    x = 2 * torch.randn(1, groups, 40, generator=generator)
    train = fire(x, table).unflatten(0, (T, digits.populations))
    for group in range(groups):
        for p, rows in enumerate(table.populations):
            interval, side = divmod(p, digits.sides)
            column = side * groups + group
            low, high = 0.0, torch.inf
            if table.cuts is not None:
                low = table.cuts[interval - 1, column].item() if interval else 0.0
                high = table.cuts[interval, column].item() if interval < digits.intervals - 1 else torch.inf
            mine = (x[0, group].abs() > low) & (x[0, group].abs() <= high)
            if digits.sides == 2:
                mine &= (x[0, group] < 0) if side else (x[0, group] > 0)
            alone = PhaseTable(*rows.at(slice(group, group + 1)), digits=Digits(signed=digits.signed, max_spikes=digits.max_spikes))
            sent = fire(x[:, group : group + 1], alone)[:, 0, 0]
            assert torch.equal(train[:, p, 0, group], sent * mine)


# of KINDS those that leave no branch of the kernel out: a kernel takes seconds to compile
@pytest.mark.parametrize("digits", [KINDS[1], KINDS[4], KINDS[5], KINDS[7]], ids=str)
def test_the_fused_pass_equals_the_plain_one(digits):
    table = random_table(digits, 2, 3, torch.Generator().manual_seed(0))
    x = torch.randn(3, table.groups, 50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(encode(x, table), encode(x, table, compiled=False), atol=1e-6)


def test_the_fused_pass_is_compiled_once_for_all_tables_and_bounds():
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    compiled, seen = fused(encode_plain, "cpu"), []
    for seed, digits in enumerate([Digits(max_spikes=2), Digits(max_spikes=3), Digits(max_spikes=4)]):
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
    table = random_table(digits, groups, T, generator)
    x = torch.randn(3, groups, 5, generator=generator)
    train = fire(x, table)
    assert train.shape == (T * digits.populations, *x.shape)
    assert set(train.unique().tolist()) <= {-1, 0, 1}
    assert torch.allclose(decode(train, table), encode(x, table, compiled=False), atol=1e-6)
    counted = count_spikes(x.movedim(1, 0), table, compiled=False)
    assert torch.equal(counted, train.ne(0).sum(-1).unflatten(0, (T, -1)).sum(1).movedim(1, 2))


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
        rate = fire(held_out[None, None], fit.table).ne(0).sum(0).float().mean().item() / 4
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
    for weight in (0.0, 2.0, 10.0, 50.0):
        fit = evolution(statistics, asked(6, 2, coding=coding, spike_weight=weight))["site"]
        rates.append(fit.mean_firing_rate)
        errors.append(fit.relative_error)
    assert rates == sorted(rates, reverse=True)
    assert errors == sorted(errors)
    assert rates[-1] < 0.8 * rates[0]
