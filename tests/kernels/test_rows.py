"""Rows that are made and coded in one pass, against the same in two: to the last bit. SiLU against torch's, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.kernels import native
from spikellm.kernels.encode import Digits
from spikellm.kernels.hadamard import hadamard_factors
from spikellm.model.conversion import fill, get_neuron, model_sites, prepare
from tests.codes import base2_tables
from tests.models import tiny_model

pytestmark = pytest.mark.kernels

law = settings(deadline=None, max_examples=40, derandomize=True)
DTYPES = (torch.float32, torch.float64)


def neuron(groups: int, T: int, signed: bool, intervals: int, dtype: torch.dtype, numbers: torch.Generator) -> PhaseNeuron:
    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=numbers, dtype=dtype)

    R = groups * intervals
    cuts = rand(intervals - 1, groups).sort(0).values * 2 if intervals > 1 else None
    table = PhaseTable(rand(R, T), rand(R, T), rand(R, T), rand(R) / 10, digits=Digits(signed=signed, intervals=intervals), cuts=cuts)
    return PhaseNeuron(table)


@given(
    st.sampled_from([1, 3]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(0, 99),
)
@law
def test_one_pass_gives_what_two_give(groups, T, signed, intervals, dtype, part, seed):
    numbers = torch.Generator().manual_seed(seed)
    neurons, width = neuron(groups, T, signed, intervals, dtype, numbers), groups * part
    x, weight = torch.randn(2, 5, width, generator=numbers, dtype=dtype), torch.randn(width, generator=numbers, dtype=dtype)
    x[0, 0, 0] = torch.nan
    coding = neurons.coding(x)
    assert torch.equal(native.coded_norm(x, weight, 1e-5, coding), neurons(native.norm(x, weight, 1e-5)))
    assert torch.equal(native.coded_silu(x, coding), neurons(native.silu(x)))


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 6, 5, 64)), (0, (3, 7, 64)), (-2, (2, 3, 64))])
def test_groups_of_rows_have_tables_of_their_own(axis, shape):
    numbers = torch.Generator().manual_seed(1)
    neurons, (left, right, _) = neuron(3, 5, True, 2, torch.float32, numbers), hadamard_factors(64, dtype=torch.float32)
    neurons.axis = axis
    x = torch.randn(shape, generator=numbers)
    assert torch.equal(native.coded_hadamard(x, left, right, neurons.coding(x)), neurons(native.hadamard(x, left, right)))


@pytest.mark.parametrize("width", [64, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_transform_too(width, dtype):
    numbers = torch.Generator().manual_seed(0)
    neurons, (left, right, _) = neuron(1, 6, True, 2, dtype, numbers), hadamard_factors(width, dtype=dtype)
    x = torch.randn(3, 70, width, generator=numbers, dtype=dtype)
    assert torch.equal(native.coded_hadamard(x, left, right, neurons.coding(x)), neurons(native.hadamard(x, left, right)))


def test_silu_is_torchs():
    x = torch.cat([torch.linspace(-120, 120, 20_001), torch.tensor([0.0, 1e-30, -1e30, 1e30, torch.inf])])
    wanted = silu(x.double())
    torch.testing.assert_close(native.silu(x).double(), wanted, rtol=6e-7, atol=1e-34)
    torch.testing.assert_close(native.silu(x.double()), wanted, rtol=1e-14, atol=1e-300)
    assert native.silu(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def test_whoever_looks_on_sees_what_comes_and_goes():
    """A hook at a neuron, something else in its slot, amplitudes of the token, a gradient: then the neurons are called."""
    table = base2_tables(spiking())["layers.0.mlp_product"]
    x = torch.randn(2, 3, 64)
    assert PhaseNeuron(table).coding(x) is not None
    hooked = PhaseNeuron(table)
    hooked.register_forward_hook(lambda *_: None)
    others = (hooked, PhaseNeuron(table, per_token=True), PhaseNeuron(table, compiled=False))
    assert [other.coding(x) for other in others] == [None] * 3
    assert PhaseNeuron(table).coding(x.requires_grad_()) is None


def spiking():
    model = tiny_model("llama")
    prepare(model, rotation_seed=0)
    fill(model, base2_tables(model), compiled=True)
    return model


def test_a_network_is_the_same_whether_or_not_somebody_looks_on(ids, monkeypatch):
    model, called = spiking(), []
    original = native.coded_silu
    monkeypatch.setattr(native, "coded_silu", lambda x, coding: called.append(coding) or original(x, coding))
    with torch.no_grad():
        alone = model(ids).logits
    assert [coding is not None for coding in called] == [True] * len(model.model.layers)
    for site in model_sites(model):
        get_neuron(model, site).register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, alone)
