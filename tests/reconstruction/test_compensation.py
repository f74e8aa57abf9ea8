"""Weights re-fitted behind coded inputs: against least squares over tokens of the model's own forward, and what is promised of them."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from spikellm.calibration.calibrate import part_windows
from spikellm.calibration.statistics import CHOOSE, FIT
from spikellm.config.choices import Amplitude, CompensatedLinear, TunedPart
from spikellm.config.snn import CompensateConfig, TuneConfig
from spikellm.execution.stepped import stepped
from spikellm.model import checkpoint
from spikellm.model.conversion import clear, fill, get_neuron, model_sites
from spikellm.model.sites import DOWN, GATE, LINEARS, OUTPUT, UP
from spikellm.reconstruction import compensation
from spikellm.reconstruction.compensation import collect, compensate_spiking, ridge
from spikellm.reconstruction.streams import two_streams
from spikellm.reconstruction.tuned import by_path, load_block, save_block
from spikellm.reconstruction.tuning import tune_spiking
from tests.codes import base2_tables, partitioned_tables, spoilt_tables
from tests.models import layer_outputs, norm_ratio, transparent_model

PLACES = {CompensatedLinear.o: OUTPUT, CompensatedLinear.gate: GATE, CompensatedLinear.up: UP, CompensatedLinear.down: DOWN}
EVERY = list(CompensatedLinear)


@pytest.fixture
def windows():
    """Every one twice: what is chosen by was fitted to, so that a few random tokens suffice for a fit that is kept."""
    return torch.randint(2, 256, (6, 32), generator=torch.Generator().manual_seed(4)).repeat_interleave(2, 0)


def spiking(name="llama", tables=spoilt_tables, amplitude=Amplitude.static, **options):
    model = transparent_model(name, **options)
    fill(model, tables(model), amplitude=amplitude, compiled=False)
    return model


def compensate(model, windows, **options):
    return compensate_spiking(model, windows, CompensateConfig(enabled=True, **options))


def ridge_rows(inputs, targets, weight, damping) -> torch.Tensor:
    """The minimum of |Y W'^T - T|^2 + lambda |W' - W|^2 as plain least squares, float64; lambda in mean squares of Y's columns."""
    level = (damping * inputs.square().sum(0).mean()).sqrt()
    rows = torch.cat([inputs, level * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([targets, level * weight.T]), driver="gelsd").solution.T


@contextmanager
def inputs_of(layer):
    """Within: what a layer's Linears multiply (behind R4 and the neuron), what is given to them, and the residual stream, by name."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name, module, given):
        given = given[0].flatten(0, -2)
        multiplied = module.neuron(module.transform(given)) if hasattr(module, "transform") else given
        found.setdefault(name, []).append(multiplied)

    places = {name: layer.get_submodule(name) for name in PLACES.values()} | {"start": layer, "middle": layer.post_attention_layernorm}
    handles = [module.register_forward_pre_hook(partial(hook, name)) for name, module in places.items()]
    handles.append(layer.register_forward_hook(lambda _module, _inputs, output: found.setdefault("end", []).append(output.flatten(0, -2))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def passing(model, layer: int, windows) -> dict[str, torch.Tensor]:
    """`inputs_of` a layer in forwards of the whole model."""
    with inputs_of(model.model.layers[layer]) as found:
        for window in windows:
            model(window[None], use_cache=False)
    return {name: torch.cat(each) for name, each in found.items()}


def expected(linear, layer: int, model, reference, windows, damping) -> torch.Tensor:
    """A re-fitted weight, from forwards of the spiking model (with the weight in its place or not) and of the ANN."""
    fitted = windows[part_windows(len(windows), FIT)]
    coded, ann = passing(model, layer, fitted), passing(reference, layer, fitted)
    name = PLACES[linear]
    weight = reference.model.layers[layer].get_submodule(name).weight
    y, target, scale = coded[name], ann[name] @ weight.T, torch.ones(1, dtype=torch.float64)
    if linear is CompensatedLinear.o:
        target, scale = target + (ann["start"] - coded["start"]) / 2, 1 / ann["middle"].norm(dim=-1, keepdim=True)
    elif linear is CompensatedLinear.down:
        target, scale = target + (ann["middle"] - coded["middle"]) / 2, 1 / ann["end"].norm(dim=-1, keepdim=True)
    return ridge_rows(y * scale, target * scale, weight, damping)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_closed_form_is_the_least_squares_of_its_rows(damping):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(50, width, generator=generator, dtype=torch.float64) for width in (12, 5))
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found = ridge(weight, inputs.T @ inputs, targets.T @ inputs, damping)
    torch.testing.assert_close(found, ridge_rows(inputs, targets, weight, damping), rtol=1e-10, atol=1e-12)


def test_inputs_that_never_fire_leave_a_weight_alone():
    weight, nothing = torch.randn(3, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(ridge(weight, nothing, torch.zeros(3, 4, dtype=torch.float64), 0.1), weight)


@pytest.mark.parametrize("linear", EVERY)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral"])
def test_each_linear_is_fitted_to_the_ann_on_what_it_multiplies(name, linear, windows):
    """In both layers: the second one behind what was kept of the first. Rotated, R4 online; two heads share a key; behind a prefix."""
    model, reference = (spiking(name, dtype=torch.float64) for _ in range(2))
    clear(reference)
    found = compensate(model, windows, linears=[linear], damping=[0.1])
    for layer, block in found.items():
        assert list(block.weights) == [PLACES[linear]]
        wanted = expected(linear, layer, model, reference, windows, 0.1)
        assert norm_ratio(block.weights[PLACES[linear]], wanted) < 1e-9
        assert torch.equal(model.model.layers[layer].get_submodule(PLACES[linear]).weight, block.weights[PLACES[linear]])


@pytest.mark.parametrize("linear", [CompensatedLinear.o, CompensatedLinear.gate])
def test_amplitudes_of_the_token_are_in_what_a_linear_multiplies(linear, windows):
    model, reference = (spiking(dtype=torch.float64, amplitude=Amplitude.token) for _ in range(2))
    clear(reference)
    found = compensate(model, windows, linears=[linear], damping=[0.1])
    for layer, block in found.items():
        assert norm_ratio(block.weights[PLACES[linear]], expected(linear, layer, model, reference, windows, 0.1)) < 1e-9


def test_gate_and_up_are_fitted_behind_the_o_that_is_kept(windows):
    """What they multiply in the finished network is what they were fitted to."""
    model, reference = (spiking(dtype=torch.float64) for _ in range(2))
    clear(reference)
    found = compensate(model, windows, damping=[0.1])
    for layer, block in found.items():
        assert set(block.weights) == {OUTPUT, GATE, UP}
        for linear in (CompensatedLinear.o, CompensatedLinear.gate, CompensatedLinear.up):
            assert norm_ratio(block.weights[PLACES[linear]], expected(linear, layer, model, reference, windows, 0.1)) < 1e-9


def losses(model, reference, windows) -> list[float]:
    """Relative squared errors of the layers' outputs on the choosing part, mean over tokens."""
    chosen = windows[part_windows(len(windows), CHOOSE)]
    found, wanted = layer_outputs(model, chosen), layer_outputs(reference, chosen)
    return [((a - b).square().sum(-1) / b.square().sum(-1)).mean().item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tables", [spoilt_tables, partial(partitioned_tables, T=4, shift=1, heads=True)], ids=["spoilt", "partitioned"])
def test_the_error_at_a_blocks_output_falls_by_as_much_as_is_said(tables, dtype, windows):
    """With the weights as the model's dtype has them, which are those that are chosen by."""
    model, reference, before = (spiking(tables=tables, dtype=dtype) for _ in range(3))
    clear(reference)
    found = compensate(model, windows, linears=EVERY)
    own, untouched = losses(model, reference, windows), losses(before, reference, windows)
    assert found[0].before == pytest.approx(untouched[0], rel=1e-4)
    for block, loss in zip(found.values(), own, strict=True):
        assert block.after == pytest.approx(loss, rel=1e-4)
        assert block.after < block.before
        assert {weight.dtype for weight in block.weights.values()} == {dtype}
    assert own[-1] < untouched[-1]


def test_what_raises_the_error_is_not_kept(windows, monkeypatch):
    """Least squares of nothing: weights of the other sign."""
    monkeypatch.setattr(compensation, "ridge", lambda weight, *_: -weight.double())
    model = spiking()
    before = model(windows).logits
    for block in compensate(model, windows, linears=EVERY).values():
        assert block.weights == {}
        assert block.after == block.before > 0
    assert torch.equal(model(windows).logits, before)


def test_of_several_lambdas_the_best_is_kept(windows):
    ends = {
        damping: compensate(spiking(), windows, damping=[damping], linears=[CompensatedLinear.o])[0].after for damping in (1e-3, 1.0, 1e3)
    }
    assert len(set(ends.values())) == 3
    assert compensate(spiking(), windows, damping=list(ends), linears=[CompensatedLinear.o])[0].after == min(ends.values())


def test_exact_codes_leave_every_weight_as_it_was(windows):
    model = transparent_model(dtype=torch.float64)
    before = model(windows).logits
    for streams in two_streams(model, windows):
        linears = {name: streams.block.module.get_submodule(name).weight for name in LINEARS}
        for kind, names in compensation.READERS.items():
            moments = collect(model, streams, linears, kind)
            for name in names:
                if kind not in compensation.WRITERS or name in PLACES.values():
                    assert norm_ratio(moments.refit(linears[name], linears[name], 0.1), linears[name]) < 1e-12
    for block in compensate(model, windows, linears=EVERY).values():
        assert (block.weights, block.before, block.after) == ({}, 0, 0)
    assert torch.equal(model(windows).logits, before)


def test_only_asked_weights_change_and_none_takes_gradients(windows):
    model, before = spiking(), spiking()
    compensate(model, windows)
    for layer, other in zip(model.model.layers, before.model.layers, strict=True):
        changed = {name for name in LINEARS if not torch.equal(layer.get_submodule(name).weight, other.get_submodule(name).weight)}
        assert changed == {OUTPUT, GATE, UP}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for site in model_sites(model):
        assert torch.equal(get_neuron(model, site).table.theta, get_neuron(before, site).table.theta)


def test_behind_tuned_weights_the_anns_stream_is_still_wanted(windows):
    tuned, model, reference = spiking(), spiking(), spiking()
    clear(reference)
    found = tune_spiking(tuned, windows, TuneConfig(epochs=4, what=TunedPart.all, weight_rate=1e-3), seed=0)
    tables = {name: table for block in found.values() for name, table in block.tables.items()}
    fill(model, spoilt_tables(model) | tables, compiled=False)
    own = compensate_spiking(model, windows, CompensateConfig(enabled=True), tuned=by_path(found))
    assert found[0].weights
    assert own[0].before == pytest.approx(found[0].after, rel=1e-6), "tuning's target is this one's"
    assert [block.after for block in own.values()] == pytest.approx(losses(model, reference, windows), rel=1e-4)
    name = "self_attn.q_proj"
    assert torch.equal(model.model.layers[0].get_submodule(name).weight, found[0].weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_behind_a_block_that_was_finished(dtype, windows, tmp_path):
    found_now = []

    def keep(block, find):
        path = tmp_path / f"{block}.safetensors"
        if not path.is_file():
            save_block(path, find())
            found_now.append(block)
        return load_block(path)

    whole, resumed = spiking(dtype=dtype), spiking(dtype=dtype)
    wanted = compensate(whole, windows)
    compensate_spiking(spiking(dtype=dtype), windows, CompensateConfig(enabled=True), keep=keep)
    (tmp_path / "layer 1.safetensors").unlink()
    found = compensate_spiking(resumed, windows, CompensateConfig(enabled=True), keep=keep)
    assert found_now == ["layer 0", "layer 1", "layer 1"]
    assert [(block.before, block.after) for block in found.values()] == [(block.before, block.after) for block in wanted.values()]
    assert torch.equal(resumed(windows).logits, whole(windows).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compensated_model_is_saved_and_loaded(dtype, windows, tmp_path):
    model = spiking(dtype=dtype)
    compensate(model, windows)
    checkpoint.save(model, tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_stepped_equals_folded(windows):
    model = spiking(tables=partial(base2_tables, T=4), dtype=torch.float64)
    compensate(model, windows)
    folded = model(windows[:2]).logits
    with stepped(model):
        assert norm_ratio(model(windows[:2]).logits, folded) < 1e-9
