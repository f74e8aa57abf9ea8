"""Blocks tuned on the spiking stream: against the model's own forward, and what is promised of the network that has them."""

import pytest
import torch

from spikellm.calibration.statistics import CHOOSE
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import TunedPart
from spikellm.config.snn import TuneConfig
from spikellm.execution.stepped import stepped
from spikellm.model import checkpoint
from spikellm.model.conversion import clear, fill, get_neuron, model_sites
from spikellm.model.sites import LINEARS
from spikellm.reconstruction.tuned import load_block, save_block
from spikellm.reconstruction.tuning import tune_spiking
from tests.codes import partitioned_tables, spoilt_tables
from tests.models import layer_outputs, norm_ratio, transparent_model

OPTIONS = {"epochs": 6, "rate": 0.1}


@pytest.fixture
def windows():
    return torch.randint(2, 256, (4, 24), generator=torch.Generator().manual_seed(4))


def spiking(name="llama", tables=spoilt_tables, **options):
    model = transparent_model(name, **options)
    fill(model, tables(model), compiled=False)
    return model


def tune(model, windows, **options):
    return tune_spiking(model, windows, TuneConfig(**OPTIONS | options), seed=0)


def losses(model, reference, windows) -> list[float]:
    """Relative squared errors of the layers' outputs on the choosing part, mean over tokens."""
    assert CHOOSE == 1
    chosen = windows[1::4]
    found, wanted = (torch.stack(layer_outputs(each, chosen)) for each in (model, reference))
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean((1, 2)).tolist()


@pytest.mark.parametrize("what", list(TunedPart))
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_error_at_a_blocks_output_falls_by_as_much_as_is_said(name, what, windows):
    model, reference = spiking(name), spiking(name)
    clear(reference)
    untuned = losses(model, reference, windows)
    found = tune(model, windows, what=what, weight_rate=1e-4)
    tuned = losses(model, reference, windows)
    assert list(found) == [0, 1]
    assert found[0].before == pytest.approx(untuned[0], rel=1e-4)
    for block, own, before in zip(found.values(), tuned, untuned, strict=True):
        assert block.after == pytest.approx(own, rel=1e-4), "the model holds what was chosen"
        assert block.after < block.before
        assert own < 0.75 * before
        assert set(block.weights) == (set(LINEARS) if what is TunedPart.all else set())


def test_weights_change_where_they_are_asked_for(windows):
    neurons, everything, untouched = spiking(), spiking(), spiking()
    tune(neurons, windows)
    tune(everything, windows, what=TunedPart.all, weight_rate=1e-4)
    for name in LINEARS:
        own, learnt, before = (each.model.layers[0].get_submodule(name).weight for each in (neurons, everything, untouched))
        assert torch.equal(own, before)
        assert not torch.equal(learnt, before)
    assert not any(parameter.requires_grad for parameter in everything.parameters())


def test_a_rate_that_ruins_everything_changes_nothing(windows):
    model = spiking()
    before = model(windows).logits
    found = tune(model, windows, rate=1e3, what=TunedPart.all, weight_rate=1e3)
    assert all(block.after == block.before and not block.weights for block in found.values())
    assert torch.equal(model(windows).logits, before)


@pytest.mark.parametrize("shift", range(0, 7, 2))
def test_tables_of_every_partition_stay_tables(shift, windows):
    model = spiking(tables=lambda model: partitioned_tables(model, 4, shift=shift, heads=True, unused=True))
    found = tune(model, windows, epochs=2)
    for block in found.values():
        assert block.after <= block.before
        for table in block.tables.values():
            PhaseTable(*table.rows, digits=table.digits, cuts=table.cuts)  # checks
    assert any(block.after < block.before for block in found.values())
    spikes = [get_neuron(model, site).table.theta for site in model_sites(model)]
    assert all(theta.isfinite().all() for theta in spikes)


@pytest.mark.parametrize("what", list(TunedPart))
def test_stepped_equals_folded(what, windows):
    model = spiking(tables=lambda model: partitioned_tables(model, 4, shift=1, heads=True), dtype=torch.float64)
    tune(model, windows, what=what, epochs=1)
    folded = model(windows[:2]).logits
    with stepped(model):
        assert norm_ratio(model(windows[:2]).logits, folded) < 1e-9


@pytest.mark.parametrize("what", list(TunedPart))
def test_a_tuned_model_is_saved_and_loaded(what, windows, tmp_path):
    model = spiking()
    tune(model, windows, what=what, epochs=1)
    checkpoint.save(model, tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_narrow_weights_stay_what_they_are(windows):
    model = spiking(dtype=torch.bfloat16)
    found = tune(model, windows, what=TunedPart.all, weight_rate=1e-3)
    weights = [weight for block in found.values() for weight in block.weights.values()]
    assert weights
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


@pytest.mark.parametrize("what", list(TunedPart))
def test_it_goes_on_behind_a_block_that_was_finished(what, windows, tmp_path):
    whole, resumed = spiking(), spiking()
    options, found_now = TuneConfig(**OPTIONS, what=what), []

    def keep(block, find):
        path = tmp_path / f"{block}.safetensors"
        if not path.is_file():
            save_block(path, find())
            found_now.append(block)
        return load_block(path)

    wanted = tune_spiking(whole, windows, options, seed=3)
    tune_spiking(spiking(), windows, options, seed=3, keep=keep)
    (tmp_path / "layer 1.safetensors").unlink()
    found = tune_spiking(resumed, windows, options, seed=3, keep=keep)
    assert found_now == ["layer 0", "layer 1", "layer 1"]
    assert [(block.before, block.after) for block in found.values()] == [(block.before, block.after) for block in wanted.values()]
    assert torch.equal(resumed(windows).logits, whole(windows).logits)


def test_the_seed_orders_the_windows(windows):
    ends = [[block.after for block in tune_spiking(spiking(), windows, TuneConfig(**OPTIONS), seed=seed).values()] for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]
