"""A real LLaMA, written exactly as another architecture of the family: the same network, before the conversion and after it.

Zero biases of queries, keys and values (Qwen2), a window as long as the context (Mistral), a head of its own, and keys and values
repeated to plain multi-head attention change no activation. Neurons then meet the same statistics, and a search has to find the same codes.
Of repeated heads each has a code of its own (`search.groups=head`): its statistics are those of the head that was repeated, but the
search is random, and with more groups it takes other random numbers. With a code a site (`groups=site`, base 2) there are as many groups
as before.
Layers are the first of SmolLM2: real weights and real activations, few of them.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import spikellm
from spikellm.calibration.calibrate import calibrate
from spikellm.coding.neuron import PhaseTable
from spikellm.config.labels import SiteKind
from spikellm.config.snn import PrefixConfig
from spikellm.model.conversion import fill, prepare, tables
from spikellm.model.sites import Site
from tests.codes import partitioned_tables
from tests.models import norm_ratio

LAYERS = 1
CONTEXT = 32
KEPT = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "rms_norm_eps", "hidden_act", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
# name -> (architecture, what its configuration has instead)
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": CONTEXT}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "multi-head": ("llama", {"num_key_value_heads": 9}),
}
OTHERS = [name for name in FAMILIES if name != "llama"]
DTYPES = (torch.float32, torch.bfloat16)


class Real:
    """SmolLM2 with the rows of its embedding that a text needs, and the text in their numbers; BOS is number 0."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        used, numbers = torch.cat([torch.tensor([model.config.bos_token_id]), ids.flatten()]).unique(return_inverse=True)
        assert used[0] == model.config.bos_token_id
        self.windows = numbers[1:].view_as(ids)
        self.config = model.config
        self.weights = model.state_dict()
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            self.weights[key] = self.weights[key][used]

    def written_as(self, name: str, layers: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The first layers in another architecture; every weight that it knows besides is 0."""
        architecture, options = FAMILIES[name]
        given = {key: getattr(self.config, key) for key in KEPT} | {"num_hidden_layers": layers} | options
        given |= {"vocab_size": len(self.weights["lm_head.weight"]), "bos_token_id": 0, "eos_token_id": None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **given), attn_implementation="sdpa", dtype=dtype)
        heads = self.config.num_key_value_heads
        for key, parameter in model.named_parameters():
            if key not in self.weights:
                assert key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")), key
                parameter.data.zero_()
                continue
            weight = self.weights[key]
            if "k_proj" in key or "v_proj" in key:
                weight = weight.unflatten(0, (heads, -1)).repeat_interleave(given["num_key_value_heads"] // heads, 0).flatten(0, 1)
            parameter.data.copy_(weight)
        return model.eval().requires_grad_(False)


@dataclass
class Converted:
    """What is compared."""

    ann: torch.Tensor  # logits of the pretrained model
    snn: torch.Tensor
    perplexity: float
    codes: dict[str, PhaseTable]
    prefix: list[int]
    made: list[int]  # tokens


def converted(model: PreTrainedModel, windows: torch.Tensor, folder, **options) -> Converted:
    """Calibrated, searched, converted, evaluated, saved, loaded, and written with: the loaded model speaks."""
    ann = model(windows[:1]).logits
    found = spikellm.convert(model, windows, T=4, compiled=False, **{"grain": 2} | options)
    found.save(folder)
    loaded, _ = spikellm.load(folder)
    logits = loaded(windows[:1]).logits
    assert torch.equal(logits, model(windows[:1]).logits)
    value = spikellm.perplexity(loaded, windows).value
    assert value == spikellm.perplexity(model, windows).value
    prompt = windows[:1, :12]
    made = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)[0].tolist()
    return Converted(ann, logits, value, tables(loaded), found.prefix_tokens, made)


@pytest.fixture(scope="module")
def real(real_model, real_tokenizer):
    """Four windows of one text."""
    sentence = "The keel of a ship runs from bow to stern; everything else is built on it, and {} planks hold on to {} ribs. "
    text = "".join(sentence.format(number, number * number) for number in range(3, 12))
    ids = real_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return Real(real_model, ids[0, : 4 * CONTEXT].view(4, CONTEXT))


def all_equal(found: Converted, wanted: Converted) -> None:
    assert torch.equal(found.ann, wanted.ann)
    assert found.prefix == wanted.prefix
    for site, code in wanted.codes.items():
        own = found.codes[site]
        assert own.digits == code.digits
        assert all(torch.equal(*rows) for rows in zip(own.rows, code.rows, strict=True)), site
    assert torch.equal(found.snn, wanted.snn)
    assert found.perplexity == wanted.perplexity
    assert found.made == wanted.made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_network_is_the_same_spiking_network(dtype, real, tmp_path):
    """To the last bit, at every step of the way; one code a site, which repeated heads share as well."""
    llama = converted(real.written_as("llama", LAYERS, dtype), real.windows, tmp_path / "llama", method="base2")
    assert norm_ratio(llama.snn.float(), llama.ann.float()) > 0.01  # neurons act
    for name in OTHERS:
        all_equal(converted(real.written_as(name, LAYERS, dtype), real.windows, tmp_path / name, method="base2"), llama)


@pytest.mark.slow
def test_the_whole_model_is_the_same_behind_its_prefix(real, tmp_path):
    """All 30 layers, of which some have massive activations at the first token."""
    layers = real.config.num_hidden_layers
    llama = converted(real.written_as("llama", layers), real.windows, tmp_path / "llama", method="base2")
    assert llama.prefix[-1] == 0  # BOS
    for name in OTHERS:
        all_equal(converted(real.written_as(name, layers), real.windows, tmp_path / name, method="base2"), llama)


@pytest.mark.slow
def test_the_search_finds_the_same_codes_where_there_are_as_many_groups(real, tmp_path):
    """A code a head: the multi-head network has more of them, and each meets other random numbers."""
    options = {"coding": "phase", "grain": 1, "intervals": 1}
    llama = converted(real.written_as("llama", 1), real.windows, tmp_path / "llama", **options)
    for name in ("qwen2", "mistral", "untied"):
        all_equal(converted(real.written_as(name, 1), real.windows, tmp_path / name, **options), llama)
    shared = {"groups": "site", **options}
    llama = converted(real.written_as("llama", 1), real.windows, tmp_path / "llama by site", **shared)
    all_equal(converted(real.written_as("multi-head", 1), real.windows, tmp_path / "multi-head by site", **shared), llama)


def test_neurons_meet_the_same_activations(real):
    """Statistics of every site and head, to the last bit, behind a prefix: what any search starts from. Repeated heads see them again, but
    for a softmax's rounding."""
    found = {}
    for name in FAMILIES:
        model = real.written_as(name, 2)
        prepare(model, rotation_seed=0)
        found[name] = calibrate(model, real.windows, PrefixConfig(eta=1.2, max_tokens=2))  # finds some without massive activations
        assert found[name].prefix_tokens == found["llama"].prefix_tokens != []
        for site, wanted in found["llama"].statistics.items():
            wanted = wanted.tensors("")
            if name == "multi-head" and Site.of(site).kind in (SiteKind.key, SiteKind.value):
                for part in (".counts", ".zeros", ".maximum"):
                    wanted[part] = wanted[part].repeat_interleave(3, 1)
            own = found[name].statistics[site].tensors("")
            assert own.keys() == wanted.keys()
            if (
                name == "multi-head" and Site.of(site).kind is SiteKind.softmax
            ):  # products of few rows of one head round otherwise than of three
                for part in (".counts", ".weights"):
                    torch.testing.assert_close(own[part].sum(-1), wanted[part].sum(-1), rtol=1e-5, atol=0)
                torch.testing.assert_close(own[".maximum"], wanted[".maximum"], rtol=1e-5, atol=0)
                continue
            assert all(torch.equal(own[part], value) for part, value in wanted.items()), (name, site)


def test_repeated_heads_with_repeated_codes_are_the_same_network(real):
    """A code a head, the groups of keys and values taken three times: all that tells the two networks apart is who searched."""
    llama, other = real.written_as("llama", LAYERS), real.written_as("multi-head", LAYERS)
    for model in (llama, other):
        prepare(model, rotation_seed=0)
    codes = partitioned_tables(llama, 4, heads=True)
    repeated = {}
    for site, code in codes.items():
        parts = code.digits.populations
        repeats = 3 if Site.of(site).kind in (SiteKind.key, SiteKind.value) else 1
        rows = (row.unflatten(0, (parts, -1)).repeat_interleave(repeats, 1).flatten(0, 1) for row in code.rows)
        cuts = None if code.cuts is None else code.cuts.unflatten(1, (code.digits.sides, -1)).repeat_interleave(repeats, 2).flatten(1, 2)
        repeated[site] = PhaseTable(*rows, digits=code.digits, cuts=cuts)
    fill(llama, codes, compiled=False)
    fill(other, repeated, compiled=False)
    assert torch.equal(other(real.windows).logits, llama(real.windows).logits)
