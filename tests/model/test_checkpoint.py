"""A saved spiking model is a transformers checkpoint that opens with its neurons, unchanged, or not at all."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import spikellm
import spikellm.model.checkpoint
from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.execution.stepped import stepped
from spikellm.kernels.encode import Digits
from spikellm.model.conversion import fill, get_neuron, install, model_sites, place, prepare, set_neuron
from spikellm.model.prefix import attach_prefix
from spikellm.store.saved import Provenance, provenance_of, seal
from tests.codes import base2_table, base2_tables
from tests.models import BOS, byte_tokenizer, tiny_model

STATIC = Amplitude.static
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mixed_tables(model) -> dict[str, PhaseTable]:
    """Of every kind of table some: per head, two-sided, signed, bounded, of two or three intervals; every other site of another T."""
    tables = {}
    for index, site in enumerate(model_sites(model)):
        heads = {SiteKind.query: 4, SiteKind.softmax: 4, SiteKind.key: 2, SiteKind.value: 2, SiteKind.attention_output: 4}.get(site.kind, 1)
        tau = [(1.0 if site.kind is SiteKind.softmax else 4.0) * (1 + head / 7 + index / 50) for head in range(heads)]
        signed = site.kind is not SiteKind.softmax
        kinds = [
            {},
            {"max_spikes": 1 + index % 4},
            {"signed": signed},
            {"sides": 2},
            {"signed": signed, "sides": 2, "intervals": 3},
            {"intervals": 2},
        ]
        digits = Digits(**kinds[index % len(kinds)])
        table = base2_table(tau * digits.populations, 5 + index % 2)
        ends = torch.tensor([0.1, 0.3][: digits.intervals - 1])
        cuts = ends[:, None] * torch.tensor(tau * digits.sides) if len(ends) else None
        tables[site.name] = replace(table, digits=digits, cuts=cuts)
    return tables


def spiking(
    name="llama", *, dtype=torch.float32, rotated=True, after=True, prefix=(7, 1), tables=base2_tables, amplitude=STATIC, **options
):
    model = tiny_model(name, dtype=dtype, **options)
    prepare(model, rotation_seed=0 if rotated else None, normalise_after=after, query_block=16)
    attach_prefix(model, list(prefix))
    fill(model, tables(model), amplitude=amplitude, compiled=False)
    return model


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("prefix", [[], [7, 1]], ids=["no prefix", "prefix"])
def test_round_trip_keeps_every_logit_and_generates(name, prefix, tmp_path, ids):
    model = spiking(name, prefix=prefix)
    wanted = model(ids).logits
    spikellm.model.checkpoint.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, PhaseNeuron) for module in again.modules()) == 19
    assert torch.equal(again(ids).logits, wanted)
    mask = torch.ones_like(ids)
    made = [each.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for each in (model, again)]
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rotated", "after", "prefix"), [(True, True, (7, 1)), (False, False, (7, 1)), (True, False, ()), (False, True, ())]
)
def test_mixed_tables_come_back_bit_for_bit_in_every_dtype(dtype, rotated, after, prefix, tmp_path, ids):
    model = spiking(dtype=dtype, rotated=rotated, after=after, prefix=prefix, tables=mixed_tables)
    spikellm.model.checkpoint.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert torch.equal(again(ids).logits, model(ids).logits)
    for site in model_sites(model):
        before, after = get_neuron(model, site), get_neuron(again, site)
        assert (before.digits, before.axis) == (after.digits, after.axis)
        assert before.theta.dtype == after.theta.dtype
        assert (before.cuts is None) == (after.cuts is None) == (before.digits.intervals == 1)
        if before.cuts is not None:
            assert torch.equal(before.cuts, after.cuts)
            assert before.cuts.dtype == after.cuts.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rounded_rope_frequencies_stay_rounded(dtype, tmp_path, ids):
    """`.to(bfloat16)` rounds what no checkpoint holds and `from_pretrained` makes anew."""
    model = tiny_model().to(dtype)
    install(model, rotated=(), query_block=16)
    fill(model, base2_tables(model), compiled=False)
    spikellm.model.checkpoint.save(model, tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_another_dtype_rounds_weights_and_never_tables(tmp_path, ids):
    odd = {"tables": lambda model: {name: replace(table, d=table.d * 1.001) for name, table in base2_tables(model).items()}}
    model = spiking(dtype=torch.float64, **odd)
    spikellm.model.checkpoint.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.isfinite(again(ids).logits).all()
    for site in model_sites(model):
        before, after = get_neuron(model, site).d, get_neuron(again, site).d
        assert after.dtype is torch.float32
        assert torch.equal(after, before.float())


def test_saving_changes_nothing_in_the_model(tmp_path, ids):
    model = spiking()
    before, config, names = model(ids).logits, copy.deepcopy(model.config.to_dict()), set(vars(model))
    spikellm.model.checkpoint.save(model, tmp_path)
    assert model.config.to_dict() == config
    assert set(vars(model)) == names
    assert type(model) is LlamaForCausalLM
    assert torch.equal(model(ids).logits, before)


def test_a_loaded_model_is_cast_as_any_other(tmp_path, ids):
    """transformers refuses `half` and `float` for whatever a quantizer has loaded."""
    spikellm.model.checkpoint.save(spiking(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)(ids).logits
    assert torch.equal(model.half()(ids).logits, wanted)
    assert model.dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert torch.equal(model(ids).logits, wanted)
    assert model.double().dtype == torch.float64


def test_amplitudes_of_tokens_are_saved_and_loaded(tmp_path, ids):
    model, static = (spiking(tables=mixed_tables, amplitude=amplitude) for amplitude in (Amplitude.token, Amplitude.static))
    wanted = model(ids).logits
    assert not torch.equal(wanted, static(ids).logits)
    for name, each in (("token", model), ("static", static)):
        spikellm.model.checkpoint.save(each, tmp_path / name)
    configs = {name: json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("token", "static")}
    assert configs["token"]["amplitude"] == "token"
    assert configs["static"]["amplitude"] == "static"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "token")
    assert torch.equal(again(ids).logits, wanted)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, wanted)
    place(model, model_sites(model)[0], mixed_tables(model)["layers.0.attention_input"], compiled=False)
    with pytest.raises(ValueError, match=r"8 sites have amplitudes of the token, .*fill them alike"):
        spikellm.model.checkpoint.save(model, tmp_path / "mixed")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("prefix", [[BOS], [7], []])
def test_a_saved_tokenizer_adds_no_second_bos(adds_bos, prefix, tmp_path):
    """The prefix has it; where it has not, the tokenizer does as it did."""
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    made = Provenance(model="tiny", path="tiny", prefix_tokens=prefix, options={}, relative_error={}, versions={})
    model = spiking(prefix=prefix, vocab_size=259)
    spikellm.model.checkpoint.save(model, tmp_path, provenance=made, tokenizer=tokenizer)
    _, again = spikellm.load(tmp_path)
    plain = tokenizer("spikes", add_special_tokens=False).input_ids
    assert again("spikes").input_ids == ([BOS] if adds_bos and prefix != [BOS] else []) + plain
    assert again.bos_token_id == BOS
    assert again.decode(plain) == "spikes"
    assert tokenizer("spikes").input_ids == [BOS] * adds_bos + plain  # the one that was given is as it was


def test_it_is_never_sent_before_it_is_whole(tmp_path):
    spikellm.model.checkpoint.save(spiking(), tmp_path / "0")
    with pytest.raises(ValueError, match=r"take model\.push_to_hub"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "1", push_to_hub=True)


def test_a_model_of_the_hub_is_checked_where_it_was_fetched_to(tmp_path, ids, monkeypatch):
    """A local cache as the hub's library keeps it, without a network."""
    model, made = (
        spiking(vocab_size=259),
        Provenance(model="tiny", path="tiny", prefix_tokens=[7, 1], options={}, relative_error={}, versions={}),
    )
    commit = "0" * 40
    folder = tmp_path / "models--someone--spiking" / "snapshots" / commit
    spikellm.model.checkpoint.save(model, folder, provenance=made, tokenizer=byte_tokenizer())
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    again, tokenizer = spikellm.load("someone/spiking", cache_dir=tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert tokenizer("a").input_ids == [64]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"0")
    with pytest.raises(ValueError, match=r"model\.safetensors: does not match its checksum"):
        spikellm.load("someone/spiking", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^someone/other: .*there is no such folder; .*on the hub$"):
        spikellm.load("someone/other", cache_dir=tmp_path)


def test_saved_again_it_is_the_same(tmp_path, ids):
    model = spiking(tables=mixed_tables)
    made = Provenance(model="tiny", path="tiny", prefix_tokens=[7, 1], options={"snn.T": 5}, relative_error={}, versions={})
    spikellm.model.checkpoint.save(model, tmp_path / "0", provenance=made)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    spikellm.model.checkpoint.save(first, tmp_path / "1", provenance=made)
    first.save_pretrained(tmp_path / "2")
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in "012"]
    assert configs[0] == configs[1] == configs[2]
    assert provenance_of(tmp_path / "2") == made
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in "012"]
    assert weights[0] == weights[1] == weights[2]
    first.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "shards", device_map="cpu")(ids).logits, first(ids).logits)
    # a table that was exchanged after loading is saved as what it is now
    site = model_sites(first)[0]
    set_neuron(first, site, PhaseNeuron(base2_table(2.0, 3), compiled=False))
    first.save_pretrained(tmp_path / "3")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "3")(ids).logits, first(ids).logits)


def test_a_model_that_is_not_wholly_spiking_is_not_saved(tmp_path):
    model = tiny_model()
    install(model, rotated=(), query_block=16)
    with pytest.raises(ValueError, match="attention_input"):
        spikellm.model.checkpoint.save(model, tmp_path)
    model = spiking()
    with stepped(model), pytest.raises(ValueError, match="stepped"):
        spikellm.model.checkpoint.save(model, tmp_path)
    model.model.layers[1].self_attn.spiking.clear_prefix()
    with pytest.raises(ValueError, match="layers differ"):
        spikellm.model.checkpoint.save(model, tmp_path)
    silent = {name: replace(table, d=0 * table.d) for name, table in base2_tables(model).items()}
    with pytest.raises(ValueError, match="d is 0 everywhere"):
        spikellm.model.checkpoint.save(spiking(tables=lambda _: silent), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_cast_is_saved_with_its_tables_as_they_were(tmp_path, ids):
    model = spiking().to(torch.bfloat16)
    spikellm.model.checkpoint.save(model, tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits, model(ids).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    spikellm.model.checkpoint.save(spiking(tables=mixed_tables), folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the saved model, its tensors or its description changed by a function, and its files taken for those that were saved."""

    def change(*, tensors=None, description=None, config=None):
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if tensors:
            found = load_file(tmp_path / "model.safetensors")
            tensors(found)
            save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
        content = json.loads((tmp_path / "config.json").read_text())
        for function, node in ((description, content["quantization_config"]), (config, content)):
            if function:
                function(node)
        (tmp_path / "config.json").write_text(json.dumps(content))
        seal(tmp_path)
        return tmp_path

    return change


THETA = "model.layers.1.mlp.act_fn.neuron.theta"
NORM = "model.norm.neuron.cuts"
SILU = "layers.1.activation"


def put(key, value):
    return lambda found: found.__setitem__(key, value(found[key]))


def swap(one, other):
    return lambda found: found.update({one: found[other].clone(), other: found[one].clone()})


def nan(rows):
    rows = rows.clone()
    rows.view(-1)[2] = torch.nan
    return rows


CUTS = THETA.replace("theta", "cuts")

SPOILT = {
    "cuts out of order": (put(CUTS, lambda cuts: cuts.flip(0).contiguous()), f"{SILU}.* not ascending"),
    "negative cuts": (put(CUTS, torch.neg), f"{SILU}.* negative"),
    "a cut is NaN": (put(CUTS, nan), f"{SILU}.* NaN"),
    "a cut moved by one bit": (put(CUTS, lambda cuts: torch.nextafter(cuts, cuts + 1)), SILU),
    "a cut too few": (put(CUTS, lambda cuts: cuts[1:].contiguous()), f"{SILU}|{CUTS}"),
    "no cuts": (lambda found: found.pop(CUTS), f"{SILU}|{CUTS}"),
    "cuts of one interval": (lambda found: found.update({NORM: found[CUTS].clone()}), NORM),
    "one NaN": (put(THETA, nan), SILU),
    "infinite": (put(THETA, lambda rows: rows * torch.inf), SILU),
    "all zero": (put(THETA.replace("theta", "d"), torch.zeros_like), SILU),
    "negative": (put(THETA, torch.neg), SILU),
    "one bit": (put(THETA, lambda rows: torch.nextafter(rows, rows + 1)), SILU),
    "integers": (put(THETA, lambda rows: rows.int()), SILU),
    "rounded": (put(THETA, lambda rows: (rows * 1.01).bfloat16()), SILU),
    "v0": (put(THETA.replace("theta", "v0"), lambda rows: rows + 0.1), SILU),
    "two sites swapped": (swap("model.layers.0.mlp.down_proj.neuron.theta", "model.norm.neuron.theta"), "mlp_product|head_input"),
    "of another shape": (put(THETA, lambda rows: rows[:, 1:].contiguous()), f"{SILU}|{THETA}"),
    "missing": (lambda found: found.pop(THETA), f"{SILU}|{THETA}"),
    "a weight is missing": (lambda found: found.pop("model.layers.1.mlp.up_proj.weight"), "up_proj"),
    "the prefix": (put("model.layers.0.self_attn.spiking.prefix_value", lambda x: x + 0.5), "prefix"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_table_that_was_changed_is_refused_by_name(case, damaged):
    tensors, named = SPOILT[case]
    folder = damaged(tensors=tensors)
    with pytest.raises(ValueError, match=rf"(?s)^{folder}[:,] .*({named}).*again$") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


FLAGS = {
    "rotated": lambda found: found.update(rotated=["R3"]),
    "amplitude": lambda found: found.update(amplitude="token"),
    "normalise_after": lambda found: found.update(normalise_after=False),
    "prefix_length": lambda found: found.update(prefix_length=1),
    "max_spikes of a site": lambda found: found["sites"][SILU]["digits"].update(max_spikes=1),
    "signed of a site": lambda found: found["sites"][SILU]["digits"].update(signed=True, sides=1),
    "intervals of a site": lambda found: found["sites"][SILU]["digits"].update(intervals=2),
    "T of a site": lambda found: found["sites"][SILU].update(T=3),
    "groups of a site": lambda found: found["sites"][SILU].update(groups=2),
    "a site less": lambda found: found["sites"].pop(SILU),
    "rotary_dtype": lambda found: found.update(rotary_dtype="bfloat16"),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_was_changed_is_refused(flag, damaged):
    folder = damaged(description=FLAGS[flag])
    with pytest.raises(ValueError, match=rf"^{folder}: config.json, quantization_config: does not match its checksum.*again$"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(schema=99), "schema=99.*update spikellm"),
        (lambda found: found.update(schema=3), "schema=3, this version reads 5; convert again"),
        (lambda found: found.pop("schema"), "schema=None.*convert again"),
        (lambda found: found.update(max_spikes=1), "unknown key 'max_spikes'"),
        (lambda found: found.pop("rotated"), "'rotated' is missing"),
        (lambda found: found["sites"][SILU].update(d=1), f"{SILU}: unknown key 'd'"),
        (lambda found: found["sites"].update({SILU: 3}), f"{SILU}: is no table"),
        (lambda found: found["sites"][SILU].update(digits=2), f"{SILU}.digits: is no table"),
        (lambda found: found["sites"][SILU]["digits"].update(max_spikes=0), f"{SILU}.digits: .*max_spikes=0: .*again$"),
        (lambda found: found.update(schema=3), "schema=3.*convert again"),
        (lambda found: found["sites"][SILU]["digits"].update(intervals=0), f"{SILU}.digits: .*intervals=0: .*again$"),
        (lambda found: found["sites"][SILU]["digits"].pop("intervals"), f"{SILU}.digits: 'intervals' is missing"),
        (lambda found: found["sites"][SILU]["digits"].update(max_spikes="2"), f"{SILU}.digits: .*again$"),
    ],
)
def test_a_description_of_another_version_is_refused(change, message, damaged):
    folder = damaged(description=change)
    with pytest.raises(ValueError, match=rf"^{folder}: .*{message}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_of_another_size_is_refused(damaged):
    with pytest.raises(ValueError, match="19 sites for a model of 10"):
        AutoModelForCausalLM.from_pretrained(damaged(config=lambda found: found.update(num_hidden_layers=1)))


def test_how_it_is_computed_is_chosen_while_loading(saved, ids):
    again = AutoModelForCausalLM.from_pretrained(saved, query_block=7, compiled=True)
    wanted = AutoModelForCausalLM.from_pretrained(saved)
    for model, block, compiled in ((again, 7, True), (wanted, 16, False)):
        assert {layer.self_attn.spiking.query_block for layer in model.model.layers} == {block}
        assert {get_neuron(model, site).compiled for site in model_sites(model)} == {compiled}
    again = AutoModelForCausalLM.from_pretrained(saved, query_block=7)
    assert (again(ids).logits - wanted(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_another_attention_is_never_silent(chosen, saved, ids):
    model = AutoModelForCausalLM.from_pretrained(saved)
    wanted = model(ids).logits
    model.set_attn_implementation(chosen)
    with pytest.raises(ValueError, match=f"attn_implementation='{chosen}'"):
        model(ids)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(saved, attn_implementation=chosen)(ids).logits, wanted)


@pytest.fixture
def unknown(monkeypatch):
    """transformers as it is in a process that never imported this package."""
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, spikellm.model.checkpoint.METHOD)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (AutoModelForCausalLM, "trust_remote_code=True"),
        (AutoConfig, "trust_remote_code=True"),
        (LlamaForCausalLM, r"pip install spikellm, import spikellm\b"),
    ],
)
def test_who_does_not_know_the_format_is_stopped_and_told(loader, message, saved, unknown, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(saved, **({} if loader is LlamaForCausalLM else {"trust_remote_code": False}))


def test_a_plain_class_is_stopped_too(saved):
    with pytest.raises(ValueError, match="none for a plain model"):
        LlamaForCausalLM.from_pretrained(saved)
    assert AutoConfig.from_pretrained(saved).model_type.startswith("llama, spiking")


def test_save_pretrained_of_a_plain_class_writes_nothing(tmp_path):
    model = tiny_model()
    install(model, rotated=(), query_block=16)
    fill(model, base2_tables(model), compiled=False)
    with pytest.raises(ValueError, match=r"spikellm\.model\.checkpoint\.save"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
