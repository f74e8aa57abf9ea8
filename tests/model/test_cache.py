"""Keys and values coded once: what generation with a cache gives is what the whole forward gives, whatever the cache."""

from contextlib import nullcontext

import pytest
import torch
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill, get_neuron, model_sites, prepare
from spikellm.model.prefix import attach_prefix
from tests.codes import base2_tables, partitioned_tables
from tests.models import TINY, greedy, norm_ratio, tiny_model

NEW = 8


def spiking(name="llama", *, prefix=(1, 7), after=True, amplitude=Amplitude.static, dtype=torch.float64, **options):
    """Rotated, behind a prefix, coarse neurons at every site."""
    model = tiny_model(name, dtype=dtype, **options)
    prepare(model, rotation_seed=0, normalise_after=after, query_block=16)
    attach_prefix(model, list(prefix))
    tables = base2_tables(model) if amplitude is Amplitude.static else partitioned_tables(model, 6, shift=1)
    fill(model, tables, amplitude=amplitude, compiled=False)
    return model


def made(model, tokens, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(tokens)} | options
    return model.generate(tokens, **options)


def drop(cache, tokens: int) -> None:
    """Take the last tokens out of a cache, by the sign that this version of transformers wants."""
    cache.crop(-tokens)


CASES = {
    "prefix": {},
    "none": {"prefix": ()},
    "before": {"after": False},
    "before, none": {"after": False, "prefix": ()},
    "amplitudes of tokens": {"amplitude": Amplitude.token},
}


@pytest.mark.parametrize("run", ["folded", "stepped"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", list(TINY))
def test_cached_tokens_and_logits_are_those_of_the_whole_forward(name, case, run, ids):
    """In three pieces, the middle one a single token; windows that slide are passed twice."""
    if case not in ("prefix", "before") and name not in ("llama", "mistral"):
        pytest.skip("one architecture without, one with a window")
    model = spiking(name, **CASES[case], **({"sliding_window": 8} if name == "mistral" else {}))
    wanted = model(ids, use_cache=False).logits
    tokens = greedy(model, ids[:, :9], NEW)

    def check():
        cache = DynamicCache(config=model.config)
        parts = [model(part, None, None, cache, use_cache=True).logits for part in ids.split([20, 1, 19], dim=1)]
        assert norm_ratio(torch.cat(parts, 1), wanted) <= 1e-9
        assert made(model, ids[:, :9]).tolist() == tokens.tolist()

    if run == "folded":
        check()
    else:
        with stepped(model):
            check()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_in_bfloat16_cached_logits_are_within_rounding(name, ids):
    model = spiking(name, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    parts = [model(part, None, None, cache, use_cache=True).logits for part in ids.split([20, *[1] * 20], dim=1)]
    assert norm_ratio(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= 1e-3
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}  # sums, as exact as what reads them


@pytest.mark.parametrize("run", ["folded", "stepped"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_of_fixed_size_and_beams(name, run, ids):
    """Truth of the beams: transformers' own search without a cache."""
    model = spiking(name, **({"sliding_window": 12} if name == "mistral" else {}))
    tokens, wanted = ids[:, :9], greedy(model, ids[:, :9], NEW)
    beams = made(model, tokens, num_beams=3, use_cache=False)
    assert beams.tolist() != wanted.tolist()

    def check():
        assert made(model, tokens, cache_implementation="static", disable_compile=True).tolist() == wanted.tolist()
        assert made(model, tokens, num_beams=3).tolist() == beams.tolist()

    if run == "folded":
        check()
    else:
        with stepped(model):
            check()


class Quantized(QuantizedCache):
    """As transformers makes one, without the package that rounds."""

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=DynamicLayer)


@pytest.mark.parametrize("run", ["folded", "stepped"])
def test_a_quantized_cache_is_refused(run, ids):
    model = spiking()
    with stepped(model) if run == "stepped" else nullcontext(), pytest.raises(ValueError, match=r"^cache_implementation='quantized' "):
        made(model, ids[:, :9], past_key_values=Quantized())


@pytest.mark.parametrize("run", ["folded", "stepped"])
def test_a_cropped_cache_goes_on_from_there(run, ids):
    model = spiking()
    wanted = model(ids, use_cache=False).logits

    def check():
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
            other = torch.cat([ids[:, :12], (ids[:, 12:20] + 1) % 256], 1)
            model(other, None, None, cache, use_cache=True)
            drop(cache, 8)
            again = model(ids[:, 12:], None, None, cache, use_cache=True).logits
            assert norm_ratio(again, wanted[:, 12:]) <= 1e-9

    if run == "folded":
        check()
    else:
        with stepped(model):
            check()


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_a_batch_padded_on_the_left_generates_what_each_does_alone(after, ids):
    model = spiking("qwen3", after=after)
    lengths = [9, 4, 7, 1]
    rows = [ids[index % 2, index : index + length] for index, length in enumerate(lengths)]
    batch, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, 9 - len(row) :], mask[index, 9 - len(row) :] = row, 1
    alone = [made(model, row[None])[0, len(row) :].tolist() for row in rows]
    assert made(model, batch, attention_mask=mask)[:, 9:].tolist() == alone
    with stepped(model):
        assert made(model, batch, attention_mask=mask)[:, 9:].tolist() == alone


@pytest.mark.parametrize("run", ["folded", "stepped"])
def test_a_decoding_step_codes_its_own_token_however_long_the_context(run, ids):
    """Elements that pass the neurons in one step behind 10 and behind 39 tokens; only the softmax's grow with the context."""
    model = spiking()

    def coded(context: int) -> dict[str, int]:
        cache, seen = DynamicCache(config=model.config), {}

        def count(_neuron, inputs, _output, site):
            seen[site] = seen.get(site, 0) + inputs[0].numel()

        model(ids[:1, :context], None, None, cache, use_cache=True)
        hooks = [
            get_neuron(model, site).register_forward_hook(lambda *given, site=site: count(*given, site)) for site in model_sites(model)
        ]
        model(ids[:1, context : context + 1], None, None, cache, use_cache=True)
        for hook in hooks:
            hook.remove()
        return seen

    def check():
        short, long = coded(10), coded(39)
        for site, number in short.items():
            if site.kind is SiteKind.softmax:
                assert (number, long[site]) == (4 * 11, 4 * 40)
            else:
                assert number == long[site], site.name
            if site.kind in (SiteKind.key, SiteKind.value):
                assert number == 2 * 16

    if run == "folded":
        check()
    else:
        with stepped(model):
            check()
