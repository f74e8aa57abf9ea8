"""Block after block is the model's own forward, to the last bit; what calibration sees on the way is what whole forwards would show."""

from contextlib import ExitStack
from itertools import cycle

import pytest
import torch

from spikellm.calibration.calibrate import PERIOD, QUERY_BLOCK, calibrate, observing
from spikellm.coding.neuron import Slot
from spikellm.config.snn import PrefixConfig
from spikellm.model.blocks import enter, walk
from spikellm.model.conversion import clear, fill, install
from spikellm.model.prefix import attach_prefix
from spikellm.model.rotation import PARTS, rotate
from spikellm.model.sites import sites
from tests.codes import base2_tables
from tests.models import TINY, names_and_dtypes, tiny_model, watch

# Windows of 64 tokens are longer than these; of Qwen2's two layers one slides.
SLIDING = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
}
names = pytest.mark.parametrize("name", list(TINY))


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(2, 256, (6, 64), generator=torch.Generator().manual_seed(1))


def model_of(name: str, dtype: torch.dtype = torch.float32):
    return tiny_model(name, dtype=dtype, **SLIDING.get(name, {}))


def installed(name: str, dtype: torch.dtype = torch.float32, prefix=(7, 1), **options):
    model = model_of(name, dtype)
    rotate(model, seed=0)
    install(model, rotated=PARTS, query_block=16, **options)
    attach_prefix(model, list(prefix))
    return model


def assert_walked(model, windows):
    wanted = [model.base_model(window[None], use_cache=False).last_hidden_state for window in windows]
    for found, whole in zip(walk(model, windows.split(1)), wanted, strict=True):
        assert torch.equal(found, whole)


@names_and_dtypes
def test_block_after_block_is_the_models_own_forward(name, dtype, windows):
    assert_walked(model_of(name, dtype), windows)  # the ANN, in transformers' own attention
    model = installed(name, dtype)
    assert_walked(model, windows)
    fill(model, base2_tables(model), compiled=False)
    assert_walked(model, windows)
    clear(model)
    attach_prefix(model, [])
    assert_walked(model, windows)


@names
def test_blocks_are_all_of_the_model_and_leave_it_as_it_was(name, windows):
    model = installed(name)
    layers, norm, parts = model.model.layers, model.model.norm, {path: set(vars(module)) for path, module in model.named_modules()}
    _, blocks = enter(model, windows.split(1))
    assert [site for block in blocks for site in block.sites] == list(sites(2))
    assert [block.layer for block in blocks] == [0, 1, None]
    assert [block.module for block in blocks] == [*layers, norm]
    assert (model.model.layers, model.model.norm) == (layers, norm)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == parts


def test_layers_of_different_attention_get_their_own_masks(windows):
    _, blocks = enter(installed("qwen2"), windows.split(1))
    visible = [given["attention_mask"].sum().item() for block in blocks.layers for given in block.arguments.values()]
    assert visible == [64 * 65 / 2, 64 * 16 - 16 * 15 / 2]


@names_and_dtypes
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_calibration_sees_what_whole_forwards_show(name, dtype, after, windows):
    model = installed(name, dtype, normalise_after=after)
    found = calibrate(model, windows, PrefixConfig(eta=2.0, max_tokens=2))
    assert found.prefix_tokens
    model = installed(name, dtype, prefix=found.prefix_tokens, normalise_after=after)
    for layer in model.model.layers:
        layer.self_attn.spiking.query_block = QUERY_BLOCK
    with ExitStack() as stack:
        observers = {}
        for block in enter(model, windows[:1].split(1))[1]:
            observers |= stack.enter_context(observing(model, block))
        for window, part in zip(windows, cycle(PERIOD), strict=False):
            for observer in observers.values():
                observer.part = part
            model.base_model(window[None], use_cache=False)
    assert [site.name for site in observers] == list(found.statistics)
    for site, observer in observers.items():
        wanted, seen = observer.result().tensors(""), found.statistics[site.name].tensors("")
        assert wanted.keys() == seen.keys()
        assert all(torch.equal(value, seen[key]) for key, value in wanted.items()), site.name


def test_observers_are_there_for_one_block_at_a_time(windows):
    model = installed("llama", prefix=())
    _, blocks = enter(model, windows.split(1))
    for block in blocks:
        with observing(model, block) as observers:
            slots = [module for module in model.modules() if module in set(observers.values())]
            assert len(slots) == len(observers) == len(block.sites)
    assert {type(module.neuron) for module in model.modules() if hasattr(module, "neuron")} == {Slot}


def test_a_block_moves_its_inputs_as_accelerates_device_map_has_it(windows):
    wanted = calibrate(installed("llama", prefix=()), windows, PrefixConfig()).statistics
    model = tiny_model()
    moved = watch([*model.model.layers, model.model.norm])
    rotate(model, seed=0)
    install(model, rotated=PARTS, query_block=16)
    states, blocks = enter(model, windows.split(1))
    moved.clear()
    for block in blocks:
        block(states[0])
    assert moved == [block.module for block in blocks]
    found = calibrate(model, windows, PrefixConfig()).statistics
    for name, site in found.items():
        assert torch.equal(site.counts, wanted[name].counts)


def test_a_forward_that_fails_leaves_the_layers(windows):
    model = installed("llama", prefix=())
    layers = model.model.layers
    with pytest.raises(IndexError):
        enter(model, (windows + 1000).split(1))
    assert model.model.layers is layers
