"""Codes fitted on the spiking stream: against a plain search, the model's own forward, and the errors that the choice is made by."""

import pytest
import torch

from spikellm.calibration.calibrate import PERIOD, calibrate, calibrate_block, observing, part_windows
from spikellm.calibration.statistics import CHOOSE, FIT
from spikellm.coding.neuron import BEYOND, encode
from spikellm.config.snn import PrefixConfig
from spikellm.execution.stepped import stepped
from spikellm.model.blocks import enter, output_error
from spikellm.model.conversion import clear, place
from spikellm.model.prefix import attach_prefix
from spikellm.reconstruction import amplitudes
from spikellm.reconstruction.amplitudes import choose_amplitudes, scaled
from spikellm.reconstruction.sequential import fit_sequentially
from spikellm.search.methods import find_codes
from tests.codes import asked
from tests.models import norm_ratio, transparent_model


@pytest.fixture
def windows():
    return torch.randint(2, 256, (8, 48), generator=torch.Generator().manual_seed(4))


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.table.rows, other.table.rows, strict=True))


def behind_first_layer(model, windows) -> torch.Tensor:
    """What the model's own forward has behind its first layer."""
    found = []
    handle = model.model.layers[0].register_forward_hook(lambda _layer, _inputs, output: found.append(output))
    for window in windows:
        model(window[None], use_cache=False)
    handle.remove()
    return torch.stack(found)


def test_a_block_is_fitted_to_what_spiking_blocks_before_it_send(windows, monkeypatch):
    monkeypatch.setattr(amplitudes, "FACTORS", ())
    options, model = asked(4, coding="phase_signed"), transparent_model()
    found = fit_sequentially(model, windows, options)
    assert list(found) == [site.name for block in enter(model, windows.split(1))[1] for site in block.sites]
    clear(model)
    states, blocks = enter(model, windows.split(1))
    plain = {}
    for block in blocks:
        plain |= calibrate_block(model, block, states)
    for block in blocks:  # every site's statistics once more, from forwards of the whole model
        with observing(model, block) as observers:
            for index, window in enumerate(windows):
                for observer in observers.values():
                    observer.part = PERIOD[index % 4]
                model(window[None], use_cache=False)
        fits = find_codes({site.name: observer.result() for site, observer in observers.items()}, options)
        for site in block.sites:
            assert equal(fits[site.name], found[site.name]), site.name
            place(model, site, fits[site.name].table, compiled=False)
    last = "layers.1.mlp_input"
    assert not equal(find_codes({last: plain[last]}, options)[last], found[last])


def test_amplitudes_lower_the_error_behind_the_block(windows):
    model, options = transparent_model(), asked(4)
    states, (block, *_) = enter(model, windows.split(1))
    wanted = behind_first_layer(model, windows)
    statistics = calibrate(model, windows, PrefixConfig(enabled=False)).statistics
    statistics = {site.name: statistics[site.name] for site in block.sites}
    attach_prefix(model, [1])
    fits = {name: scaled(fit, 0.7, statistics[name]) for name, fit in find_codes(statistics, options).items()}  # amplitudes that clip

    def errors() -> dict[int, float]:
        found = behind_first_layer(model, windows)
        each = ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).flatten(1).mean(1)
        return {part: sum(each[index].item() for index in part_windows(len(windows), part)[: amplitudes.WINDOWS]) for part in (FIT, CHOOSE)}

    for site in block.sites:
        place(model, site, fits[site.name].table, compiled=False)
    before = errors()
    chosen = choose_amplitudes(model, block, fits, statistics, states, list(wanted), compiled=False)
    after = errors()
    assert after[FIT] < 0.9 * before[FIT]
    assert after[CHOOSE] <= before[CHOOSE]
    factors = {name: (fit.tau / fits[name].tau).unique().tolist() for name, fit in chosen.items()}
    assert any(factor > 1.1 for (factor,) in factors.values())


@pytest.mark.parametrize("coding", ["phase", "phase_signed"])
def test_a_scaled_code_answers_a_scaled_input_with_a_scaled_output(coding, windows):
    model = transparent_model()
    statistics = {"layers.0.query": calibrate(model, windows, PrefixConfig(enabled=False)).statistics["layers.0.query"]}
    (fit,) = find_codes(statistics, asked(4, coding=coding, intervals="auto", min_length=1)).values()
    if fit.cuts is None:
        pytest.fail("one interval tells nothing of cuts")
    fit.cuts[-1, 0] = BEYOND
    half = scaled(fit, 0.5, statistics["layers.0.query"])  # exactly, in binary
    x = torch.linspace(-4, 4, 1001).expand(1, 4, -1).contiguous()
    assert torch.equal(half.table.intervals, fit.table.intervals)
    assert torch.equal(2 * encode(x / 2, half.table, compiled=False), encode(x, fit.table, compiled=False))
    assert torch.equal(half.tau, fit.tau / 2)


def test_output_error_is_a_mean_of_tokens():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    assert output_error(wanted + torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]), wanted).item() == pytest.approx(0.5)


def test_stepped_equals_folded(windows):
    model = transparent_model("llama-biases", dtype=torch.float64)
    fit_sequentially(model, windows, asked(3, coding="phase_signed", intervals=2, min_length=1))
    folded = model(windows).logits
    with stepped(model):
        assert norm_ratio(model(windows).logits, folded) < 1e-9


def test_a_search_goes_on_behind_the_blocks_that_are_kept(windows):
    options, kept, searched = asked(4), {}, []

    def keep(stop_at=None):
        def each(block, found):
            if block not in kept:
                if block == stop_at:
                    raise KeyboardInterrupt
                searched.append(block)
                kept[block] = found()
            return kept[block]

        return each

    whole = fit_sequentially(transparent_model(), windows, options)
    with pytest.raises(KeyboardInterrupt):
        fit_sequentially(transparent_model(), windows, options, keep("layer 1"))
    resumed = fit_sequentially(transparent_model(), windows, options, keep())
    assert searched == ["layer 0", "layer 1", "end"]
    assert list(resumed) == list(whole)
    assert all(equal(resumed[name], fit) for name, fit in whole.items())
