"""Windows of a forward that nobody has asked for: as many as products gain from, fewer where memory is short, and never felt."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from spikellm.evaluation.batches import CORE_ROWS, sequences
from spikellm.evaluation.measured import stepped_perplexity
from spikellm.evaluation.perplexity import perplexity
from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill, prepare
from spikellm.model.passage import Passes
from tests.codes import base2_tables
from tests.models import tiny_model

GIB = 2**30


@pytest.fixture
def memory(monkeypatch):
    """Sets what is free."""

    def free(size: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))

    free(16 * GIB)
    return free


@pytest.fixture
def cores(monkeypatch):
    """Sets how many torch computes with."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def spiking(T: int):
    model = tiny_model("llama", dtype=torch.float64)
    prepare(model, rotation_seed=0, query_block=16)
    fill(model, base2_tables(model, T), compiled=True)
    return model


def test_short_windows_share_a_forward_and_more_of_them_where_there_are_more_cores(memory, cores):
    model = tiny_model()
    cores(2)
    assert [sequences(model, length) for length in (CORE_ROWS // 8, CORE_ROWS, 2 * CORE_ROWS, 5 * CORE_ROWS)] == [16, 2, 1, 1]
    cores(8)
    assert sequences(model, CORE_ROWS) == 8


def test_a_forward_takes_no_more_than_there_is_memory_for(memory, cores):
    model = tiny_model()
    cores(8)
    row = 4 * (5 * model.config.intermediate_size + 4 * model.config.hidden_size)
    memory(4 * row * 3 * 100)  # a quarter of it has room for three windows of 100 tokens
    assert sequences(model, 100) == 3
    assert sequences(model, 100, logits=True) < 3
    memory(0)
    assert sequences(model, 100) == 1


def test_time_steps_are_rows_of_their_own(memory, cores):
    cores(1)
    model = spiking(T=4)
    whole = sequences(model, CORE_ROWS // 8)
    with stepped(model):
        assert (whole, sequences(model, CORE_ROWS // 8)) == (8, 2)


@pytest.mark.parametrize("size", [None, 2, 3, 7])
def test_batches_of_windows_change_a_perplexity_by_rounding_alone(size):
    windows = torch.randint(2, 256, (7, 24), generator=torch.Generator().manual_seed(3))
    for model in (tiny_model("llama", dtype=torch.float64), spiking(T=4)):
        wanted = perplexity(model, windows, batch_size=1)
        found = perplexity(model, windows, batch_size=size)
        assert found.value == pytest.approx(wanted.value, rel=1e-12)
        assert (found.windows, found.tokens) == (wanted.windows, wanted.tokens)
        assert perplexity(model, windows, batch_size=size, in_flight=4).value == pytest.approx(wanted.value, rel=1e-12)


def test_a_stepped_run_takes_batches_too_and_one_window_where_memory_is_bounded():
    model, seen = spiking(T=4), []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    windows = torch.randint(2, 256, (4, 24), generator=torch.Generator().manual_seed(3))
    found = [
        stepped_perplexity(model, windows, "", Passes(), size, chunk=None, max_gib=bound)
        for size, bound in ((None, None), (None, 1.0), (2, None))
    ]
    assert sorted(set(seen)) == [4, 8, 16]  # currents of four steps: of one window, of two, of all
    for each in found:
        assert each.anytime == pytest.approx(found[0].anytime, rel=1e-9)
