"""The few-spike neuron against hand traces, the closed form of base 2, and its laws."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.coding.neuron import PhaseNeuron, PhaseTable, Slot, count_spikes, decode, encode, fire
from spikellm.kernels import bindings, build
from spikellm.kernels.compiled import fused
from spikellm.kernels.encode import Digits
from tests.codes import base2_table

law = settings(deadline=None, max_examples=60, derandomize=True)


def values(limit: float):
    return st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=32)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).view(1, 1, -1)


def table(*, theta, h, d, v0) -> PhaseTable:
    return PhaseTable(theta=torch.tensor([theta]), h=torch.tensor([h]), d=torch.tensor([d]), v0=torch.tensor([v0]))


# theta, h and d all different, so that none can stand for another
HAND = table(theta=[0.75, 0.5, 0.125], h=[0.5, 0.375, 0.25], d=[1.0, 0.5, 0.25], v0=0.125)


@pytest.mark.parametrize(
    ("x", "spikes", "y"),
    [
        # v = 1.125 > 0.75 -> 0.625 > 0.5 -> 0.25 > 0.125
        (1.0, [1, 1, 1], 1.75),
        # v = 0.875 > 0.75 -> 0.375 <= 0.5 -> 0.375 > 0.125
        (0.75, [1, 0, 1], 1.25),
        # v = 0.625 <= 0.75 -> 0.625 > 0.5 -> 0.25 > 0.125; negative
        (-0.5, [0, -1, -1], -0.75),
        # v = 0.1875 <= 0.75, <= 0.5, > 0.125
        (0.0625, [0, 0, 1], 0.25),
        # v0 alone = 0.125, not above any threshold
        (0.0, [0, 0, 0], 0.0),
    ],
)
def test_trace_by_hand(x, spikes, y):
    fired = fire(row(x), HAND)
    assert fired.dtype == torch.int8
    assert fired.flatten().tolist() == spikes
    assert decode(fired, HAND).item() == y
    assert encode(row(x), HAND, compiled=False).item() == y


def test_threshold_is_strict():
    one = table(theta=[0.5], h=[0.5], d=[1.0], v0=0.0)
    just_above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    x = row(0.5, just_above, -0.5, -just_above)
    assert encode(x, one, compiled=False).flatten().tolist() == [0.0, 1.0, 0.0, -1.0]
    assert fire(x, one).flatten().tolist() == [0, 1, 0, -1]


@given(T=st.integers(1, 16), exponent=st.integers(-8, 8), fractions=values(1.0))
@law
def test_base_2_errs_by_half_a_step_at_most(T, exponent, fractions):
    """|y - |x|| <= tau 2^-(T+1) for |x| <= tau (1 - 2^-T)."""
    tau = 2.0**exponent
    x = row(*fractions) * (tau * (1 - 2.0**-T))
    y = encode(x, base2_table(tau, T), compiled=False)
    # float32 rounds |x| + v0 once: half a unit in the last place of tau at most
    assert (y - x).abs().max().item() <= tau * (2.0 ** -(T + 1) + 2.0**-24)


@given(T=st.integers(1, 16), fractions=values(1.0))
@law
def test_base_2_is_the_signed_uniform_quantiser(T, fractions):
    """y = round_half_down(|x| / step) * step with step = 2^-T, clipped at 1 - step, sign of x (float64 closed form)."""
    x = row(*fractions)
    y = encode(x, base2_table(1.0, T), compiled=False).flatten().tolist()
    for value, coded in zip(x.flatten().tolist(), y, strict=True):
        step = 2.0**-T
        potential = float(torch.tensor(abs(value)) + torch.tensor(step / 2))  # float32, as the membrane
        level = min(math.ceil(potential / step) - 1, 2**T - 1)
        wanted = math.copysign(level * step, value) if value else 0.0
        assert coded == wanted


@st.composite
def any_table(draw):
    T, C = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    theta, h, d = (torch.rand(C, T, generator=generator) for _ in range(3))
    return PhaseTable(theta=theta, h=h, d=d, v0=torch.rand(C, generator=generator) / 2)


@given(codes=any_table(), seed=st.integers(0, 1 << 30))
@law
def test_encode_is_fire_then_decode_and_odd_in_its_input(codes, seed):
    x = torch.randn(3, codes.groups, 5, generator=torch.Generator().manual_seed(seed))
    x[0, :, 0] = 0.0
    y = encode(x, codes, compiled=False)
    assert torch.allclose(decode(fire(x, codes), codes), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(encode(-x, codes, compiled=False), -y)
    assert torch.equal(fire(-x, codes), -fire(x, codes))
    assert not y[0, :, 0].any()  # zero input, zero output, whatever v0 would do
    assert not fire(x, codes)[:, 0, :, 0].any()


@given(codes=any_table(), seed=st.integers(0, 1 << 30), most=st.integers(1, 8))
@law
def test_a_bounded_neuron_fires_its_first_spikes_and_rests(codes, seed, most):
    x = torch.randn(2, codes.groups, 5, generator=torch.Generator().manual_seed(seed))
    few = replace(codes, digits=Digits(max_spikes=most))
    free = fire(x, codes)
    assert torch.equal(fire(x, few), free * ((free != 0).cumsum(0) <= most))
    assert torch.allclose(decode(fire(x, few), few), encode(x, few, compiled=False), rtol=1e-6, atol=1e-6)
    assert torch.equal(count_spikes(x.transpose(0, 1), few, compiled=False), fire(x, few).abs().sum(-1, dtype=torch.int64).transpose(1, 2))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 4, 3, 5), 1), ((2, 3, 8), -1), ((3, 8), 1), ((4, 6), 0)],
    ids=["heads", "channel blocks", "channel blocks of a matrix", "rows"],
)
def test_every_group_has_its_own_table(shape, axis):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    taus = [0.5, 1.0, 2.0, 4.0]
    y = PhaseNeuron(base2_table(taus, 4), axis=axis, compiled=False)(x)
    for tau, block, coded in zip(taus, x.chunk(4, axis), y.chunk(4, axis), strict=True):
        assert torch.equal(coded, PhaseNeuron(base2_table(tau, 4), compiled=False)(block))


@pytest.mark.slow
def test_the_fused_pass_equals_the_plain_one():
    for shape, axis, taus in [((2, 3, 8), -1, [3.0]), ((2, 4, 3, 5), 1, [0.5, 1.0, 2.0, 4.0])]:
        x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x.view(-1)[:2] = 0.0
        for codes in (base2_table(taus, 5), replace(base2_table(taus, 5), digits=Digits(max_spikes=2))):
            fused, plain = (PhaseNeuron(codes, axis=axis, compiled=compiled)(x) for compiled in (True, False))
            assert torch.equal(fused, plain)


def test_output_is_float32_at_least():
    x = torch.tensor([[0.3, -0.7]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = PhaseNeuron(base2_table(1.0, 4), compiled=False)(x.to(dtype))
        assert y.dtype == torch.float32
        assert torch.equal(y, torch.tensor([[0.3125, -0.6875]]))  # 5/16, 11/16: exact in all three


def test_state_dict_round_trip_and_repr():
    taus = [0.5, 2.0]
    neuron = PhaseNeuron(base2_table(taus, 3), axis=1, compiled=False)
    other = PhaseNeuron(base2_table([1.0, 1.0], 3), axis=1, compiled=False)
    other.load_state_dict(neuron.state_dict())
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), neuron(x))
    assert set(neuron.state_dict()) == {"theta", "h", "d", "v0"}
    assert "T=3, groups=2" in repr(neuron)
    sides = PhaseNeuron(replace(neuron.table, digits=Digits(sides=2, max_spikes=4)))
    assert repr(sides) == "PhaseNeuron(T=3, groups=1, Digits(signed=False, max_spikes=4, sides=2, intervals=1))"


def test_an_empty_slot_is_transparent_and_holds_nothing():
    slot, x = Slot(), torch.randn(2, 3)
    assert slot(x) is x
    assert slot.weigh(x) is None
    assert (slot.transparent, slot.held, slot.state_dict()) == (True, False, {})
    assert not PhaseNeuron(base2_table(1.0, 3)).transparent


def test_a_table_whose_rows_do_not_fit_is_refused():
    good = {"theta": torch.ones(2, 3), "h": torch.ones(2, 3), "d": torch.ones(2, 3), "v0": torch.ones(2)}
    PhaseTable(**good)
    for key, bad in [("h", torch.ones(2, 4)), ("d", torch.ones(1, 3)), ("v0", torch.ones(3))]:
        # the shape check of the class, or of the annotations where tests switch those on
        with pytest.raises((ValueError, TypeError)):
            PhaseTable(**good | {key: bad})


@pytest.mark.parametrize("key", ["theta", "h", "d", "v0"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "int", "empty"])
def test_a_table_that_holds_no_numbers_is_refused(key, bad):
    good = {"theta": torch.ones(2, 3), "h": torch.ones(2, 3), "d": torch.ones(2, 3), "v0": torch.ones(2)}
    if bad == "empty":
        rows = {name: row[:0] if key == "v0" else row[..., :0] if row.ndim == 2 else row for name, row in good.items()}
    else:
        rows = good | {key: good[key].int() if bad == "int" else good[key].masked_fill(good[key].cumsum(-1) == 2, bad)}
    with pytest.raises((ValueError, TypeError)):  # integers: of the annotations, where tests switch those on
        PhaseTable(**rows)


def test_a_table_without_values_yet_is_taken():
    rows = torch.empty(1, 3, device="meta")
    assert PhaseTable(theta=rows, h=rows, d=rows, v0=rows[:, 0]).T == 3


def test_groups_that_do_not_divide_the_axis_are_an_error():
    neuron = PhaseNeuron(base2_table([1.0, 1.0, 1.0], 3), axis=-1, compiled=False)
    with pytest.raises((ValueError, RuntimeError)):
        neuron(torch.ones(2, 8))


@pytest.mark.kernels
def test_without_a_compiler_the_plain_pass_is_used(monkeypatch, caplog):
    monkeypatch.setattr("spikellm.kernels.build.shutil.which", lambda _: None)
    caches = (fused, bindings.loaded, build.built)
    for each in caches:
        each.cache_clear()
    try:
        x = row(0.3, -0.7)
        assert torch.equal(encode(x, base2_table(1.0, 4)), encode(x, base2_table(1.0, 4), compiled=False))
        assert "no C++ compiler" in caplog.text
    finally:
        for each in caches:
            each.cache_clear()


def test_without_triton_neurons_on_cuda_run_unfused_and_say_so(monkeypatch, caplog):
    monkeypatch.setattr("spikellm.kernels.compiled.find_spec", lambda _: None)

    def kernel():
        """Not seen by `fused` before."""

    assert fused(kernel, "cuda") is kernel
    assert "triton" in caplog.text
