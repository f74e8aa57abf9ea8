"""Whatever transformers lets one do with a model: with a spiking one it works, or is one line that says why not."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from spikellm.execution.stepped import stepped
from spikellm.model.conversion import fill, get_neuron, install, model_sites, prepare
from spikellm.model.prefix import attach_prefix
from tests.codes import base2_tables
from tests.models import norm_ratio, tiny_model
from tests.places import ROOT


def spiking(name="llama", **options):
    model = tiny_model(name, **options)
    prepare(model, rotation_seed=0, query_block=16)
    attach_prefix(model, [1])
    fill(model, base2_tables(model), compiled=False)
    return model


def test_hidden_states_are_those_of_the_pretrained_network_in_the_rotated_basis(ids):
    """R1 keeps lengths; without it they are the pretrained network's own."""
    wanted = tiny_model()(ids, output_hidden_states=True).hidden_states
    model = tiny_model()
    install(model, rotated=())
    for found, truth in zip(model(ids, output_hidden_states=True).hidden_states, wanted, strict=True):
        assert norm_ratio(found, truth) <= 1e-5
    model = tiny_model()
    prepare(model, rotation_seed=0)
    rotated = model(ids, output_hidden_states=True).hidden_states
    for found, truth in zip(rotated[:-1], wanted[:-1], strict=True):  # the last is behind the final norm, whose weight is folded
        assert norm_ratio(found.norm(dim=-1), truth.norm(dim=-1)) <= 1e-4
        assert norm_ratio(found, truth) > 0.1
    model = spiking()
    coded = model(ids, output_hidden_states=True)
    assert torch.equal(model.lm_head(coded.hidden_states[-1]), coded.logits)


def test_attention_weights_are_refused(ids):
    with pytest.raises(ValueError, match="output_attentions"):
        spiking()(ids, output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_instead_of_tokens(dtype, ids):
    """A caller's, of the weights' dtype: RoPE's angles stay float32."""
    model = spiking(dtype=dtype)
    embeds = nn.functional.embedding(ids, model.get_input_embeddings().weight)
    assert embeds.dtype == dtype
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("run", ["folded", "stepped"])
def test_the_loss_of_labels_is_the_cross_entropy_of_the_logits(run, ids):
    model, labels = spiking(), ids.clone()
    labels[0, :5] = -100

    def check():
        found = model(ids, labels=labels)
        wanted = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6)

    if run == "folded":
        check()
    else:
        with stepped(model):
            check()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_refused_where_a_gradient_would_meet_a_spike(checkpointing, ids):
    model = spiking().requires_grad_(True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    wanted = spiking()(ids).logits
    found = model(ids, labels=ids)
    assert torch.equal(found.logits, wanted)  # nothing is dropped
    with pytest.raises(ValueError, match="no gradient"):
        found.loss.backward()
    assert not any(parameter.grad is not None for name, parameter in model.named_parameters() if "layers" in name)
    with stepped(model):
        assert not model(ids, labels=ids).loss.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_neurons_gradients_are_those_of_the_pretrained_network(checkpointing, ids):
    wanted, model = tiny_model().requires_grad_(True), tiny_model()
    install(model, rotated=())
    model.requires_grad_(True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    for each in (wanted, model):
        each(ids, labels=ids).loss.backward()
    found = dict(model.named_parameters())
    for name, parameter in wanted.named_parameters():
        assert norm_ratio(found[name].grad, parameter.grad) <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_cast_rounds_weights_and_nothing_else(name, dtype, ids):
    """Truth: the float32 model with every weight rounded. Tables, prefix, transforms and RoPE's frequencies are as they were."""
    model = spiking(name)
    wanted = deepcopy(model)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.to(dtype).float()
    tables = [get_neuron(model, site).table for site in model_sites(model)]
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for site, table in zip(model_sites(model), tables, strict=True):
        assert all(torch.equal(a.double(), b.double()) for a, b in zip(get_neuron(model, site).table.rows, table.rows, strict=True))
    assert torch.equal(model.model.rotary_emb.inv_freq.double(), frequencies.double())
    if dtype is torch.float64:
        wanted = wanted.double()
    assert norm_ratio(model(ids).logits, wanted(ids).logits) <= 1e-5
    again = deepcopy(model).float()
    assert norm_ratio(again(ids).logits, wanted.float()(ids).logits) <= 1e-5


COMPILED = """
import sys, torch
from tests.model.test_fidelity import spiking
from tests.models import norm_ratio
ids = torch.arange(2, 42)[None]
for grad in (False, True):
    model = spiking().requires_grad_(grad)
    wanted, short = model(ids).logits, model(ids[:, :7]).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert norm_ratio(compiled(ids).logits, wanted) <= 1e-6, grad
    assert norm_ratio(compiled(ids[:, :7]).logits, short) <= 1e-6, grad
"""


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    """Dynamo alone: what it captures it runs as it is. In a process of its own, without the checks of types around every function."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


class Adapter(nn.Module):
    """As PEFT wraps a Linear."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_an_adapter_is_refused(place, ids):
    model = spiking()
    layer = model.model.layers[1]
    layer.set_submodule(place, Adapter(layer.get_submodule(place)))
    with pytest.raises(ValueError, match=rf"^{place} carries an adapter"):
        model(ids)


def test_hidden_states_of_a_stepped_run_are_refused(ids):
    model = spiking()
    with stepped(model):
        with pytest.raises(ValueError, match="output_hidden_states"):
            model(ids, output_hidden_states=True)
        model.config.output_hidden_states = True
        with pytest.raises(ValueError, match="output_hidden_states"):
            model(ids)
