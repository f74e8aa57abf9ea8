"""Rotation changes activations and no logits."""

import json
from copy import deepcopy
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikellm.coding.neuron import Slot
from spikellm.config.checks import InputError
from spikellm.config.choices import Device, ModelSource, RotationKind, SoftmaxNorm
from spikellm.config.labels import SiteKind
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.config.snn import RotationConfig
from spikellm.evaluation.networks import Networks
from spikellm.execution.stepped import stepped
from spikellm.model.checkpoint import save
from spikellm.model.conversion import fill, get_neuron, install, model_sites, online_parts, prepare, set_neuron
from spikellm.model.rotation import PARTS, R1, R2, R3, R4, orders, rotate
from spikellm.report.console import console_table
from spikellm.store.record import Results
from tests.codes import base2_tables
from tests.jobs import cached, run
from tests.models import TINY, norm_ratio, tiny_model

ARCHITECTURES = list(TINY)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_stay(name, ids):
    wanted = tiny_model(name)(ids).logits
    model = tiny_model(name)
    rotate(model, seed=3)
    install(model, rotated=PARTS, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


SUBSETS = [subset for number in range(5) for subset in combinations(PARTS, number)]


@pytest.mark.parametrize("parts", SUBSETS, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_logits_stay_whatever_parts_are_left_out(name, parts, ids):
    wanted = tiny_model(name)(ids).logits
    model = tiny_model(name)
    rotate(model, seed=3, parts=parts)
    install(model, rotated=parts, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4
    assert [online_parts(layer) for layer in model.model.layers] == [[part for part in (R3, R4) if part in parts]] * 2


def rotated_weights(parts, **options) -> dict[str, torch.Tensor]:
    model = tiny_model("llama-biases", **options)
    rotate(model, seed=3, parts=parts)
    return dict(model.named_parameters())


# What a part changes; R1 turns all that reads or writes the residual stream.
CHANGED = {
    R1: {f"{linear}_proj.weight" for linear in ("q", "k", "v", "o", "gate", "up", "down")}
    | {"o_proj.bias", "down_proj.bias", "embed_tokens.weight", "lm_head.weight"},
    R2: {"v_proj.weight", "v_proj.bias", "o_proj.weight"},
    R3: set(),
    R4: {"down_proj.weight"},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_left_out_is_absent_from_the_weights(part):
    """Alone beside none, and all beside all but this one."""
    others = [other for other in PARTS if other is not part]
    for without, with_it in (((), (part,)), (others, PARTS)):
        before, after = rotated_weights(without), rotated_weights(with_it)
        changed = {".".join(name.split(".")[-2:]) for name, weight in after.items() if not torch.equal(weight, before[name])}
        assert changed == CHANGED[part]


def test_without_any_part_norms_are_folded_and_no_more():
    model, folded = tiny_model("llama-biases"), rotated_weights(())
    for name, weight in dict(model.named_parameters()).items():
        norm = {"q_proj": "input", "k_proj": "input", "v_proj": "input", "gate_proj": "post_attention", "up_proj": "post_attention"}
        owner = next((norm[part] for part in norm if part in name and name.endswith("weight")), None)
        if owner is not None:
            layer = ".".join(name.split(".")[:3])
            weight = weight * model.get_parameter(f"{layer}.{owner}_layernorm.weight")
        if "norm" in name:
            weight = torch.ones_like(weight)
        assert torch.equal(folded[name], weight), name


def test_parts_are_a_set_to_the_configuration():
    assert RotationConfig().acting == list(PARTS)
    assert RotationConfig(parts=[R4, R1]) == RotationConfig(parts=[R1, R4])
    assert RotationConfig(kind=RotationKind.none).acting == []
    with pytest.raises(InputError, match=r"rotation\.parts=\[R1,R1\]: .* twice"):
        RotationConfig(parts=[R1, R1])


def test_parts_without_effect_are_said_so(caplog):
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = ModelConfig(name="tiny", source=ModelSource.random, path="llama", options=options)
    rotation = RotationConfig(kind=RotationKind.none, parts=[R2], seed=5)
    installed = Networks(model, HardwareConfig(device=Device.cpu), rotation, SoftmaxNorm.after).transparent([])
    assert online_parts(installed.model.layers[0]) == []
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "rotation.parts=[R2] has no effect with rotation.kind=none",
        "rotation.seed=5 has no effect without R1",
    ]


@pytest.mark.parametrize("parts", [[R3], [R1, R4], []], ids=lambda parts: "+".join(parts) or "none")
def test_a_saved_model_has_the_online_parts_that_it_needs(parts, tmp_path, ids):
    model = tiny_model()
    rotate(model, seed=0, parts=parts)
    install(model, rotated=parts, query_block=16)
    fill(model, base2_tables(model), compiled=False)
    save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert [online_parts(layer) for layer in again.model.layers] == [[part for part in parts if part in (R3, R4)]] * 2


def test_parts_are_in_keys_results_and_costs(tmp_path):
    found = {}
    for parts in (["R1", "R2", "R3", "R4"], ["R1", "R4"]):
        found[len(parts)] = results = run(tmp_path, "model.options.num_hidden_layers=1", f"rotation.parts=[{','.join(reversed(parts))}]")
        assert not cached(results)["calibrate"]
        assert json.loads(json.dumps(results["rotation"]))["parts"] == parts
    costs = [{each["name"]: each["mac_per_token"] for each in results["spikes"]["dense_operations"]} for results in found.values()]
    assert 0 < costs[1]["online Hadamard R4"] < costs[0]["online Hadamard R3, R4"]
    assert found[4]["rotation"]["hash"] != found[2]["rotation"]["hash"]
    assert found[4]["search"] != found[2]["search"]
    again = run(tmp_path, "model.options.num_hidden_layers=1")
    assert all(cached(again).values())
    assert again["rotation"] == found[4]["rotation"]


def test_logits_of_the_real_model_stay(real_model, real_tokenizer):
    ids = real_tokenizer("The capital of France is Paris, and the Seine flows through it.", return_tensors="pt")["input_ids"]
    wanted = real_model(ids).logits
    model = deepcopy(real_model)
    rotate(model, seed=0)
    install(model, rotated=PARTS, query_block=256)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norm_weights_become_one_and_embeddings_untied(name):
    model = tiny_model(name, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate(model, seed=0)
    for key, parameter in model.named_parameters():
        # the q and k norms of Qwen3 act per head, after the rotation's reach: they keep their weight
        if "layernorm" in key or key == "model.norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter)), key
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not model.config.tie_word_embeddings


def test_tied_embeddings_keep_the_logits(ids):
    wanted = tiny_model("llama", tie_word_embeddings=True)(ids).logits
    model = tiny_model("llama", tie_word_embeddings=True)
    rotate(model, seed=0)
    install(model, rotated=PARTS, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4


def test_seed_decides_the_rotation():
    embeddings = []
    for seed in (0, 0, 1):
        model = tiny_model()
        rotate(model, seed=seed)
        embeddings.append(model.model.embed_tokens.weight)
    assert torch.equal(embeddings[0], embeddings[1])
    assert norm_ratio(embeddings[2], embeddings[0]) > 0.1


def test_outlier_channels_are_spread(ids):
    model = tiny_model()
    model.model.embed_tokens.weight[:, 5] *= 100
    before = model.model.embed_tokens(ids)
    rotate(model, seed=0)
    after = model.model.embed_tokens(ids)
    assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-5)
    peak = [x.abs().amax(-1).mean() / x.norm(dim=-1).mean() for x in (before, after)]
    assert peak[0] > 0.95
    assert peak[1] < 0.3


class Recorder(Slot):
    def forward(self, x):
        self.seen = x.clone()
        return x


def recorded(model, ids, kinds):
    """What passes the slots of `kinds` in layer 1."""
    found = {}
    for site in model_sites(model):
        if site.layer == 1 and site.kind in kinds:
            set_neuron(model, site, Recorder())
            found[site.kind] = site
    model(ids)
    return {kind: get_neuron(model, site).seen for kind, site in found.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_r3_changes_queries_and_keys_but_no_scores(name, ids):
    plain = tiny_model(name)
    install(plain, rotated=(), query_block=64)
    rotated = tiny_model(name)
    rotate(rotated, seed=0)
    install(rotated, rotated=PARTS, query_block=64)
    kinds = (SiteKind.query, SiteKind.key)
    q, k = recorded(plain, ids, kinds).values()
    q_rotated, k_rotated = recorded(rotated, ids, kinds).values()
    groups = q.shape[1] // k.shape[1]

    def scores(query, key):
        return query @ key.repeat_interleave(groups, 1).transpose(-1, -2)

    assert norm_ratio(q_rotated, q) > 0.5
    assert norm_ratio(k_rotated, k) > 0.5
    assert norm_ratio(scores(q_rotated, k_rotated), scores(q, k)) <= 1e-4


# Hidden, head and MLP widths, each without a Hadamard matrix of its order
UNREACHED = {"hidden_size": 57, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 22, "intermediate_size": 141}


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("parts", [PARTS, (R1,), (R2, R3), (R4,)], ids="+".join)
def test_logits_stay_at_widths_without_a_hadamard_matrix(name, parts, ids):
    wanted = tiny_model(name, **UNREACHED)(ids).logits
    model = tiny_model(name, **UNREACHED)
    rotate(model, seed=3, parts=parts)
    install(model, rotated=parts, query_block=16)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-4
    assert orders(model.config, parts) == {part: found for part, found in ORDERS.items() if part in parts}


ORDERS = {R1: [32, 32], R2: [16, 16], R3: [16, 16], R4: [128, 128]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_overlapping_transforms_are_the_same_folded_stepped_saved_and_cast(dtype, tmp_path, ids):
    model = tiny_model("qwen3", dtype=dtype, **UNREACHED)
    prepare(model, rotation_seed=0, query_block=16)
    fill(model, base2_tables(model), compiled=False)
    wanted = model(ids).logits
    with stepped(model):
        assert norm_ratio(model(ids).logits, wanted) <= (1e-9 if dtype is torch.float64 else 0.02)  # rounding moves a few spikes
    save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, wanted)
    before = {name: buffer.double() for name, buffer in model.named_buffers() if "rotation" in name}
    assert any("signs" in name for name in before)
    model = model.half()
    assert all(torch.equal(buffer.double(), before[name]) for name, buffer in model.named_buffers() if name in before)


def test_where_no_matrix_is_known_results_console_and_card_say_what_acts(tmp_path):
    results = run(tmp_path, "model.options.intermediate_size=141", "save_model=true", "snn.execution=stepped")
    assert results["rotation"]["orders"] == {"R1": [64], "R2": [16], "R3": [16], "R4": [128, 128]}
    text = console_table(Results.from_json(results), tmp_path)
    assert "R4 two overlapping of order 128" in text
    costs = {each["name"]: each["mac_per_token"] for each in results["spikes"]["dense_operations"]}
    # of 128: 7 butterflies; twice; q of four heads and k of two, of width 16: 4 butterflies; two layers
    assert costs["online Hadamard R3, R4"] == 2 * (2 * 128 * 7 + (4 + 2) * 16 * 4)
    plain = run(tmp_path)
    assert plain["rotation"]["orders"] == {"R1": [64], "R2": [16], "R3": [16], "R4": [96]}
    assert "overlapping" not in console_table(Results.from_json(plain), tmp_path)
