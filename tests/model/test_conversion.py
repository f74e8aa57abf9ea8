"""Every site gets its neuron, or the conversion fails."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from spikellm.coding.neuron import PhaseNeuron, Slot
from spikellm.config.labels import SiteKind
from spikellm.execution.memory import fitting_chunk
from spikellm.execution.stepped import stepped
from spikellm.model.checkpoint import save
from spikellm.model.conversion import clear, fill, get_neuron, install, model_sites, set_neuron
from spikellm.model.rotation import PARTS
from spikellm.spikes import ledger
from tests.codes import base2_tables
from tests.models import PUBLISHED_MODELS, TINY, norm_ratio, tiny_model

# keys and values are coded on their way into a cache, before attention codes its queries
PER_LAYER = [
    "attention_input", "key", "value", "query", "softmax", "attention_output", "mlp_input", "activation", "mlp_product",
]  # fmt: skip


def neurons_met(model, ids) -> list[str]:
    """Names of the sites whose neuron ran in one forward, in order."""
    met = []
    for site in model_sites(model):
        get_neuron(model, site).register_forward_hook(lambda *_, name=site.name: met.append(name))
    model(ids)
    return met


@pytest.mark.parametrize("name", list(TINY))
def test_every_site_has_a_neuron_that_a_token_meets_in_order(name, ids):
    model = tiny_model(name)
    install(model, rotated=(), query_block=64)
    fill(model, base2_tables(model), compiled=False)
    neurons = [module for module in model.modules() if isinstance(module, PhaseNeuron)]
    assert len(neurons) == 2 * 9 + 1
    wanted = [f"layers.{layer}.{part}" for layer in range(2) for part in PER_LAYER] + ["head_input"]
    assert neurons_met(model, ids) == wanted


def test_neurons_keep_the_outputs_on_their_levels(ids):
    """What leaves a slot is one of the 2^T - 1 signed levels of its table."""
    model = tiny_model()
    install(model, rotated=(), query_block=64)
    fill(model, base2_tables(model, T=4), compiled=False)
    seen = {}
    for site in model_sites(model):
        get_neuron(model, site).register_forward_hook(lambda _m, _i, out, name=site.name: seen.__setitem__(name, out))
    model(ids)
    for name, out in seen.items():
        step = (1.0 if SiteKind.softmax.name in name else 4.0) / 16
        levels = out / step
        assert torch.equal(levels, levels.round()), name
        assert levels.abs().max() <= 15, name


def test_clear_gives_the_pretrained_model_back(ids):
    model = tiny_model()
    install(model, rotated=(), query_block=64)
    fill(model, base2_tables(model), compiled=False)
    clear(model)
    assert norm_ratio(model(ids).logits, tiny_model()(ids).logits) <= 1e-5


def test_state_dict_names_of_weights_stay():
    model = tiny_model("llama-biases")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    install(model, rotated=(), query_block=64)
    after = model.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_missing_and_an_unknown_table_are_named():
    model = tiny_model()
    install(model, rotated=(), query_block=64)
    tables = base2_tables(model)
    lost = "layers.1.mlp_product"
    with pytest.raises(ValueError, match=lost):
        fill(model, {name: table for name, table in tables.items() if name != lost}, compiled=False)
    with pytest.raises(ValueError, match=r"layers\.9\.nowhere"):
        fill(model, tables | {"layers.9.nowhere": tables[lost]}, compiled=False)
    # nothing was put in place by the failed attempts
    assert not any(isinstance(module, PhaseNeuron) for module in model.modules())


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_an_unsupported_architecture_is_refused_by_name(architecture):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model(architecture, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=architecture):
        install(model, rotated=(), query_block=64)


@pytest.mark.parametrize("name", list(PUBLISHED_MODELS))
def test_published_models_have_the_289_published_sites(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**PUBLISHED_MODELS[name]))
    install(model, rotated=PARTS, query_block=256)
    fill(model, base2_tables(model), compiled=False)
    neurons = {site.name for site in model_sites(model) if isinstance(get_neuron(model, site), PhaseNeuron)}
    wanted = {f"layers.{layer}.{part}" for layer in range(32) for part in PER_LAYER} | {"head_input"}
    assert len(wanted) == 289
    assert neurons == wanted
    assert len([module for module in model.modules() if isinstance(module, PhaseNeuron)]) == 289


NOT_INSTALLED = {
    "fill": lambda model, tables: fill(model, tables),
    "get_neuron": lambda model, _: get_neuron(model, model_sites(model)[0]),
    "set_neuron": lambda model, _: set_neuron(model, model_sites(model)[3], Slot()),
    "save": lambda model, _: save(model, Path("nowhere")),
    "count": lambda model, _: ledger.count(model, torch.ones(1, 8, dtype=torch.long)),
    "fitting_chunk": lambda model, _: fitting_chunk(model, 8, chunk=None, max_gib=1.0),
    "stepped": lambda model, _: stepped(model).__enter__(),
}


@pytest.mark.parametrize("step", NOT_INSTALLED)
def test_a_step_before_its_turn_says_which_one_is_missing(step):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"install\(model|convert the model"):
        NOT_INSTALLED[step](model, base2_tables(model))
    if step not in ("fill", "get_neuron", "set_neuron"):
        install(model, rotated=())
        with pytest.raises(ValueError, match=r"carr(y|ies) no neuron.*convert the model"):
            NOT_INSTALLED[step](model, {})


def test_a_model_of_another_family_is_named():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=16))
    for step in (lambda: fill(model, {}), lambda: model_sites(model), lambda: install(model, rotated=())):
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel|gpt2"):
            step()
