"""Weights rounded against the coded inputs: against the model's own forward, and what is promised of the network that has them."""

import pytest
import torch

from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill
from spikellm.model.integers import put, relative_error, round_compensating, round_to_nearest
from spikellm.model.sites import DOWN, LAYERS, LINEARS, OUTPUT
from spikellm.reconstruction.rounding import round_spiking
from tests.codes import base2_tables
from tests.models import norm_ratio, transparent_model

FORMAT = {"bits": 4, "group_size": 16}


@pytest.fixture
def windows():
    return torch.randint(2, 256, (3, 48), generator=torch.Generator().manual_seed(4))


def spiking(name="llama", **options):
    model = transparent_model(name, **options)
    fill(model, base2_tables(model), compiled=False)
    return model


def coded_inputs(model, windows, layer: int) -> dict[str, torch.Tensor]:
    """Rows that every Linear of a layer multiplies, from forwards of the whole model."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}

    def keep(name):
        def hook(linear, inputs):
            x = inputs[0]
            rows[name].append((linear.neuron(linear.transform(x)) if name in (OUTPUT, DOWN) else x).flatten(0, -2))

        return hook

    handles = [model.get_submodule(f"{LAYERS}.{layer}.{name}").register_forward_pre_hook(keep(name)) for name in LINEARS]
    for window in windows:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() for name, found in rows.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_each_block_is_rounded_on_what_rounded_blocks_before_it_send(name, windows):
    found, errors = round_spiking(spiking(name, dtype=torch.float64), windows, **FORMAT)
    assert list(found) == list(errors) == sorted(found, key=lambda path: int(path.split(".")[2]))
    model = spiking(name, dtype=torch.float64)
    for layer in range(2):
        inputs = coded_inputs(model, windows, layer)
        for linear, y in inputs.items():
            path = f"{LAYERS}.{layer}.{linear}"
            weight, moment = model.get_submodule(path).weight, y.T @ y
            assert torch.equal(round_compensating(weight, moment, **FORMAT).integers, found[path].integers)
            assert errors[path] == pytest.approx(norm_ratio(y @ found[path].weight.double().T, y @ weight.T) ** 2, rel=1e-6)
            assert errors[path] < relative_error(weight, round_to_nearest(weight, **FORMAT), moment)
        for linear in inputs:
            put(model.get_submodule(f"{LAYERS}.{layer}.{linear}"), found[f"{LAYERS}.{layer}.{linear}"])


def test_stepped_equals_folded(windows):
    model = spiking("llama-biases", dtype=torch.float64)
    found, _ = round_spiking(model, windows, **FORMAT)
    for path, integers in found.items():
        assert torch.equal(model.get_submodule(path).weight, integers.weight.double()), "in place"
    folded = model(windows).logits
    with stepped(model):
        assert norm_ratio(model(windows).logits, folded) < 1e-9


def test_groups_that_do_not_divide_leave_the_model_as_it_was(windows):
    model = spiking()
    before = model.get_submodule(f"{LAYERS}.0.{DOWN}").weight.clone()
    with pytest.raises(ValueError, match="divisor of 16"):
        round_spiking(model, windows, bits=4, group_size=64)
    assert torch.equal(model.get_submodule(f"{LAYERS}.0.{DOWN}").weight, before)
