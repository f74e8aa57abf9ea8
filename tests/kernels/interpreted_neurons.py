"""Neurons in Triton on a CPU's tensors, by Triton's interpreter, to the last bit: `test_triton.py` runs this in a process of its own."""

import pytest
import torch
import triton

from spikellm.kernels import gpu
from spikellm.kernels.encode import Digits, Rows, count_plain, encode_plain, fire_plain
from tests.codes import PARTITIONS, partitioned_table

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before anybody imports Triton"


@pytest.fixture(autouse=True)
def unaided(monkeypatch):
    """A kernel that leaves its work to the plain form would be compared with itself."""
    serves = gpu._neurons
    monkeypatch.setattr(gpu, "_neurons", lambda *each: serves(*each) or pytest.fail("left to the plain form"))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def awkward(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """With inputs that are 0, on a threshold, infinite, not a number, the smallest there are."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, torch.finfo(x.dtype).tiny, *(rows.theta[0] - rows.v0[0])[:3].tolist()]
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=x.dtype)
    return x


@pytest.mark.parametrize(("digits", "groups", "width"), [*((digits, 3, 131) for digits in PARTITIONS), (PARTITIONS[4], 1, 300)], ids=str)
def test_neurons_send_the_same_spikes(digits, groups, width):
    table = partitioned_table([1.0, 1.3, 0.7][:groups], 4, digits)
    x = awkward(randn(2, groups, width), table.rows)
    code = (table.rows, digits, table.cuts)
    assert torch.equal(gpu.encode(x, *code), encode_plain(x, *code))
    assert torch.equal(gpu.fire(x, *code), fire_plain(x, *code))
    rows = x.transpose(0, 1)  # [C, I, J], not contiguous
    assert torch.equal(gpu.count(rows, *code), count_plain(rows, *code))


@pytest.mark.parametrize(("dtype", "rows_dtype"), [
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_inputs_of_other_dtypes_are_coded_as_the_plain_form_does(dtype, rows_dtype):
    digits = Digits(intervals=2, sides=2, signed=True, max_spikes=2)
    table = partitioned_table([1.0, 1.3], 4, digits).to(rows_dtype)
    x, code = randn(2, 2, 70, dtype=dtype), (table.rows, digits, table.cuts)
    found, wanted = gpu.encode(x, *code), encode_plain(x, *code)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert torch.equal(gpu.fire(x, *code), fire_plain(x, *code))
    assert torch.equal(gpu.count(x, *code), count_plain(x, *code))


def test_an_input_that_float32_cannot_tell_from_zero_has_a_sign():
    rows = Rows(torch.tensor([[0.1]]), torch.tensor([[0.2]]), torch.tensor([[0.3]]), torch.tensor([0.5]))
    x = torch.tensor([1e-300, -1e-300, 0.0], dtype=torch.float64).view(1, 1, -1)
    assert torch.equal(gpu.encode(x, rows, Digits()), encode_plain(x, rows, Digits()))
    assert gpu.encode(x, rows, Digits()).flatten().tolist() == pytest.approx([0.3, -0.3, 0.0])


def test_thresholds_below_zero_let_a_signed_neuron_send_both_digits_at_once_which_is_none():
    below, x = Rows(torch.tensor([[-0.1, 0.2]]), torch.tensor([[0.3, 0.1]]), torch.tensor([[0.4, 0.2]]), torch.zeros(1)), randn(1, 1, 50)
    assert torch.equal(gpu.encode(x, below, Digits(signed=True)), encode_plain(x, below, Digits(signed=True)))


def test_more_inputs_than_a_program_takes():
    digits = Digits(signed=True, intervals=2)
    table = partitioned_table([1.0], 3, digits)
    x, code = randn(1, 1, 16 * gpu.MOST + 77), (table.rows, digits, table.cuts)
    assert torch.equal(gpu.encode(x, *code), encode_plain(x, *code))
    assert torch.equal(gpu.count(x, *code), count_plain(x, *code))
