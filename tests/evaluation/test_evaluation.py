"""Windowed perplexity against ten lines of transformers."""

import gc
import math
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy

from spikellm.config.labels import NetworkName
from spikellm.evaluation import figures
from spikellm.evaluation.perplexity import perplexity, readout_perplexities
from spikellm.execution.memory import LOGIT_ROWS
from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill, install, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.store.artifacts import ArtifactStore
from tests.codes import base2_tables
from tests.configure import configure
from tests.models import names_and_dtypes, tiny_model, watch


def perplexity_by_transformers(model, windows) -> float:
    losses = []
    for window in windows:
        with torch.no_grad():
            losses.append(model(window[None], labels=window[None]).loss.item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("length", [2, 40, 300])
def test_perplexity_is_that_of_a_plain_loop(length):
    model = tiny_model()
    windows = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(length))
    found = perplexity(model, windows, label="test")
    assert found.value == pytest.approx(perplexity_by_transformers(model, windows), rel=1e-5)
    assert (found.windows, found.window, found.tokens) == (3, length, 3 * (length - 1))


def test_perplexity_of_a_spiking_model_is_that_of_a_plain_loop(ids):
    model = tiny_model()
    install(model, rotated=(), query_block=16)
    fill(model, base2_tables(model), compiled=False)
    assert perplexity(model, ids, label="test").value == pytest.approx(perplexity_by_transformers(model, ids), rel=1e-5)


def test_perplexity_of_the_real_model_on_real_text(real_model, real_tokenizer, shared_data):
    text = (shared_data / "text" / "wikitext2_test_dev.txt").read_text(encoding="utf-8")
    windows = torch.tensor(real_tokenizer(text[:20000], add_special_tokens=False)["input_ids"])[:1024].view(2, 512)
    found = perplexity(real_model, windows, batch_size=1)
    assert found.value == pytest.approx(perplexity_by_transformers(real_model, windows), rel=1e-4)
    assert found.value == perplexity_of_whole_forwards(real_model, windows)
    assert perplexity(real_model, windows, batch_size=1, in_flight=2) == found
    assert perplexity(real_model, windows).value == pytest.approx(found.value, rel=1e-5)
    assert 10 < found.value < 80


@torch.no_grad()
def perplexity_of_whole_forwards(model, windows) -> float:
    """The model's own forwards, and logits in the same slices: sums over other slices would be rounded otherwise."""
    losses = []
    for window in windows:
        rows = model.base_model(window[None], use_cache=False).last_hidden_state[0, :-1].split(LOGIT_ROWS)
        targets = window[1:].split(LOGIT_ROWS)
        parts = [cross_entropy(model.lm_head(x).float(), y, reduction="sum").item() for x, y in zip(rows, targets, strict=True)]
        losses.append(sum(parts) / (len(window) - 1))
    return math.exp(sum(losses) / len(losses))


def spiking(name: str, dtype: torch.dtype, *, prefix=(7, 1)):
    model = tiny_model(name, dtype=dtype)
    prepare(model, rotation_seed=0, query_block=16)
    attach_prefix(model, list(prefix))
    fill(model, base2_tables(model), compiled=False)
    return model


@names_and_dtypes
def test_perplexity_block_by_block_is_that_of_whole_forwards_to_the_last_bit(name, dtype):
    windows = torch.randint(2, 256, (5, LOGIT_ROWS + 4), generator=torch.Generator().manual_seed(2))  # two slices of rows
    for model in (tiny_model(name, dtype=dtype), spiking(name, dtype)):
        wanted = perplexity_of_whole_forwards(model, windows)
        assert [perplexity(model, windows, batch_size=1, in_flight=count).value for count in (1, 2, 5, 9)] == [wanted] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_stepped_run_block_by_block_is_that_of_whole_forwards_to_the_last_bit(dtype, ids):
    with stepped(spiking("qwen3", dtype)) as model:
        wanted = perplexity_of_whole_forwards(model, ids)
        assert [perplexity(model, ids, batch_size=1, in_flight=count).value for count in (1, 2)] == [wanted] * 2
        curve = readout_perplexities(model, ids, readouts=model.lm_head.readouts, label="curve", batch_size=1)
        together = readout_perplexities(model, ids, readouts=model.lm_head.readouts, label="curve", batch_size=1, in_flight=2)
    assert together == curve


@pytest.mark.parametrize(("in_flight", "passes"), [(1, 3), (2, 2), (3, 1)])
def test_a_block_is_called_for_all_windows_in_flight_before_the_next_one_is(in_flight, passes):
    """What a block that brings its weights in just before use pays for."""
    model = tiny_model()
    blocks = [*model.model.layers, model.model.norm]
    called = watch(blocks)
    perplexity(model, torch.randint(2, 256, (3, 8)), batch_size=1, in_flight=in_flight)
    assert len(called) == 3 * len(blocks)
    brought_in = [module for index, module in enumerate(called) if index == 0 or called[index - 1] is not module]
    assert brought_in == blocks * passes


def test_a_loss_that_is_no_number_is_an_error(ids):
    model = tiny_model()
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="broken"):
        perplexity(model, ids, label="broken")


def test_a_network_is_gone_when_the_next_is_built(tmp_path):
    """Two in memory at once are twice the weights: of a model that fits alone, none."""
    config = configure("model=tiny", "dataset.evaluation.window=32", "dataset.evaluation.max_windows=1")
    built: list[weakref.ref] = []

    def build():
        gc.collect()
        assert [ref() for ref in built] == [None] * len(built)
        model = tiny_model(seed=len(built))
        built.append(weakref.ref(model))
        return model

    networks = [
        figures.Network(name=name, inputs={"number": number}, build=build, prefix_tokens=list)
        for number, name in enumerate([NetworkName.ann_prefix, NetworkName.base2, NetworkName.ann])
    ]
    benchmarks = figures.Benchmarks(config.dataset.zero_shot)
    findings, _ = figures.evaluate(config.dataset, lambda: None, ArtifactStore(tmp_path), networks, benchmarks)
    assert len(built) == 3
    assert findings.perplexity is not None
