"""A saved spiking model is an ordinary transformers checkpoint."""

from dataclasses import replace

import pytest
import torch
from conftest import base2_tables, tiny_model
from transformers import AutoModelForCausalLM

import spikellm.checkpoint
from spikellm.conversion import convert, install
from spikellm.neuron import PhaseNeuron
from spikellm.prefix import attach_prefix
from spikellm.rotation import rotate


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("prefix", [[], [7, 1]], ids=["no prefix", "prefix"])
def test_round_trip_keeps_every_logit_and_generates(name, prefix, tmp_path, ids):
    model = tiny_model(name)
    rotate(model, seed=0)
    install(model, rotated=True, query_block=16)
    attach_prefix(model, prefix)
    convert(model, base2_tables(model), compiled=False)
    wanted = model(ids).logits
    spikellm.checkpoint.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, PhaseNeuron) for module in again.modules()) == 19
    assert torch.equal(again(ids).logits, wanted)
    mask = torch.ones_like(ids)
    made = [each.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for each in (model, again)]
    assert torch.equal(*made)


def test_a_bound_on_spikes_is_saved_too(tmp_path, ids):
    model = tiny_model()
    install(model, rotated=False, query_block=16)
    tables = {name: replace(table, max_spikes=2) for name, table in base2_tables(model).items()}
    convert(model, tables, compiled=False)
    spikellm.checkpoint.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {module.max_spikes for module in again.modules() if isinstance(module, PhaseNeuron)} == {2}
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_without_neurons_is_not_saved(tmp_path):
    model = tiny_model()
    install(model, rotated=False, query_block=16)
    with pytest.raises(ValueError, match="input_layernorm"):
        spikellm.checkpoint.save(model, tmp_path)
