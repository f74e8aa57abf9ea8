"""The stepped network with amplitudes of tokens against the folded one."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from spikellm.config.choices import Amplitude
from spikellm.evaluation.perplexity import perplexity, readout_perplexities
from spikellm.execution.amplitude import attached, detached
from spikellm.execution.modules import SteppedHead, SteppedLinear, unbatch
from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill, get_neuron, model_sites, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.spikes import ledger
from tests.codes import partitioned_tables
from tests.models import norm_ratio, tiny_model

T = 4


def spiking(name: str = "llama-biases", *, after: bool = True, shift: int = 1, heads: bool = True, dtype=torch.float64):
    """Shares of the token's largest input in place of amplitudes, another partition at every site."""
    model = tiny_model(name, dtype=dtype)
    prepare(model, rotation_seed=0, query_block=16, normalise_after=after)
    attach_prefix(model, [1, 7])
    tables = partitioned_tables(model, T, shift=shift, heads=heads)
    fill(model, tables, compiled=False)
    for site in model_sites(model):
        if site.kind.name in ("attention_input", "attention_output", "mlp_input", "mlp_product", "head_input"):
            tables[site.name] = tables[site.name].map(lambda rows: rows / 4)  # of about 4
    fill(model, tables, amplitude=Amplitude.token, compiled=False)
    assert sum(get_neuron(model, site).per_token for site in model_sites(model)) == 2 * 4 + 1
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_arrive_as_they_were_sent(dtype):
    s = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(0), dtype=dtype).exp()
    s[0, :3, 0] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, 1.0])
    spikes = torch.randint(-1, 2, (3, 2, 7, 5), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    train = attached(spikes, s)
    assert train.dtype == torch.int8
    assert set(train.unique().tolist()) == {-1, 0, 1}
    found, amplitude = detached(train, 8 * dtype.itemsize)
    assert torch.equal(found, spikes)
    assert torch.equal(amplitude, s)
    assert attached(spikes, None) is spikes
    assert detached(spikes, 0) == (spikes, None)


@pytest.mark.parametrize(("after", "shift", "heads"), [(True, 1, True), (False, 2, False)], ids=["after", "before"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral"])
def test_it_equals_the_folded_network_and_counts_the_same(name, after, shift, heads, ids):
    model = spiking(name, after=after, shift=shift, heads=heads)
    folded, counted = model(ids).logits, ledger.count(model, ids)
    with stepped(model, chunk=3):
        assert norm_ratio(model(ids).logits, folded) <= 1e-9
        assert ledger.count(model, ids) == counted
    assert torch.equal(model(ids).logits, folded)
    assert {site.kind for site in counted.sites if site.per_token} == {
        "attention_input", "attention_output", "mlp_input", "mlp_product", "head_input",
    }  # fmt: skip


def test_all_that_leaves_a_neuron_is_spikes(ids):
    model = spiking()
    checked = []

    def check(_module, inputs):
        assert inputs[0].dtype == torch.int8
        assert set(inputs[0].unique().tolist()) <= {-1, 0, 1}
        checked.append(inputs)

    with stepped(model):
        for module in model.modules():
            if isinstance(module, SteppedLinear):
                module.register_forward_pre_hook(check)
        for site in model_sites(model):
            get_neuron(model, site).register_forward_hook(lambda m, _i, out: check(m, (out,)))
        model(ids)
    assert len(checked) >= 2 * 5 + 1 + 19


def test_sums_over_time_are_the_folded_layers_with_their_biases_once(ids):
    model = spiking("llama-biases")
    paths = [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")]

    def outputs() -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(path).register_forward_hook(partial(lambda name, _m, _i, out: seen.__setitem__(name, out), path))
            for path in paths
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        return seen

    folded = outputs()
    with stepped(model, chunk=1):
        steps = outputs()
    for path in paths:
        assert norm_ratio(unbatch(steps[path], T).sum(0), folded[path]) <= 1e-9, path


def test_some_tokens_alone_several_windows_a_cache_and_early_readouts(ids):
    """Wherever tokens part company, each keeps its own amplitude."""
    model = spiking("qwen3")
    whole = model(ids, use_cache=False).logits
    wanted = perplexity(model, ids, label="folded").value
    some = torch.tensor([3, 17, 30])
    prompt = ids[:, :9]

    def generate():
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)

    made = generate()
    with stepped(model, chunk=2):
        assert norm_ratio(model(ids, logits_to_keep=some).logits, whole[:, some]) <= 1e-9
        assert norm_ratio(model(ids, logits_to_keep=2).logits, whole[:, -2:]) <= 1e-9
        assert perplexity(model, ids, label="stepped", in_flight=2).value == pytest.approx(wanted, rel=1e-9)
        assert generate().tolist() == made.tolist()
        cache = DynamicCache(config=model.config)
        parts = [model(part, None, None, cache, use_cache=True).logits for part in ids.split([20, 1, 19], dim=1)]
        head = model.get_submodule("lm_head")
        assert isinstance(head, SteppedHead)
        curve = readout_perplexities(model, ids, readouts=head.readouts, label="stepped")
    assert norm_ratio(torch.cat(parts, 1), whole) <= 1e-9
    assert len(curve) == T
    assert curve[-1].value == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrower_weights(dtype, ids):
    """But for spikes at the threshold, which another order of additions moves."""
    model = spiking(dtype=dtype)
    folded = model(ids).logits
    with stepped(model):
        assert norm_ratio(model(ids).logits, folded) <= 0.05
