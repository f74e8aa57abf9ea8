"""Whatever a config.json of the family may say of RoPE, windows, widths and vocabulary: it works as in transformers, or is refused by key.

Truth is transformers' own model of the same weights. Slots are empty: what is looked at is the network around the neurons.
"""

import pytest
import torch
from transformers import DynamicCache

from spikellm.config.checks import InputError
from spikellm.model.conversion import install, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.pipeline import convert
from tests.jobs import run
from tests.models import byte_model, norm_ratio, tiny_model

NEW = 8
PREFIX = [7, 1]


def rope(kind: str, **options) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | options, "max_position_embeddings": 64}


# name -> (architecture, options); windows are shorter than the text, scaled RoPEs have left their original positions long before its end
SHAPES = {
    "llama3": ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "linear": ("mistral", rope("linear", factor=4.0)),
    "dynamic": ("llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}),
    "a sliding layer behind a full one": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "layer_types": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "windows and yarn": ("mistral", {"sliding_window": 8} | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "wide heads": ("llama", {"head_dim": 24}),
    "narrow heads": ("mistral", {"head_dim": 8}),
    "heads of no Hadamard order": ("qwen2", {"head_dim": 22}),
    "one key head": ("qwen2", {"num_key_value_heads": 1}),
    "odd MLP": ("llama", {"intermediate_size": 141, "mlp_bias": True}),
    "odd widths everywhere": ("qwen3", {"hidden_size": 57, "intermediate_size": 131, "head_dim": 18, "num_attention_heads": 6}),
}
shapes = pytest.mark.parametrize("shape", list(SHAPES))
WITHOUT_PREFIX = ("dynamic",)


def pretrained(shape: str, **options):
    name, own = SHAPES[shape]
    return tiny_model(name, **own | options)


def rotated(shape: str, **options):
    model = pretrained(shape, **options)
    prepare(model, rotation_seed=0, query_block=16)
    return model


def in_pieces(model, ids: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, None, None, cache, use_cache=True).logits for part in ids.split([12, 1, 27], 1)], 1)


def generated(model, tokens: torch.Tensor) -> list:
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False).tolist()


def masks(config, length: int) -> dict[str, torch.Tensor]:
    """By type of layer, True where a query sees a key: the prefix stays in sight of every window."""
    causal = torch.ones(length, length).tril().bool()
    window = getattr(config, "sliding_window", None) or length
    near = causal & causal.T.logical_not().tril(-window).logical_not()
    near[len(PREFIX) :, : len(PREFIX)] = True
    return {"full_attention": causal[None, None], "sliding_attention": near[None, None]}


def behind_prefix(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the pretrained model on prefix and text, one sequence."""
    whole = torch.cat([torch.tensor([PREFIX]).expand(len(ids), -1), ids], 1)
    by_type = masks(model.config, whole.shape[1])
    mixed = getattr(model.config, "layer_types", None)
    mask = by_type if mixed else by_type["sliding_attention"]
    return model(whole, attention_mask=mask).logits[:, len(PREFIX) :]


@shapes
def test_logits_cached_logits_and_tokens_are_transformers_own(shape, ids):
    wanted, model = pretrained(shape), rotated(shape)
    assert norm_ratio(model(ids).logits, wanted(ids).logits) <= 1e-5
    assert norm_ratio(in_pieces(model, ids), in_pieces(wanted, ids)) <= 1e-5
    assert generated(model, ids[:, :20]) == generated(wanted, ids[:, :20])


@shapes
def test_in_bfloat16_the_network_is_that_of_the_rounded_weights(shape, ids):
    """Without rotation, whose weights are rounded once more."""
    model, wanted = pretrained(shape, dtype=torch.bfloat16), pretrained(shape)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.bfloat16().float()
    install(model, rotated=(), query_block=16)
    assert norm_ratio(model(ids).logits, wanted(ids).logits) <= 1e-5


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in WITHOUT_PREFIX])
def test_a_prefix_is_the_tokens_themselves_in_sight_of_every_window(shape, ids):
    model = rotated(shape)
    attach_prefix(model, PREFIX)
    wanted = behind_prefix(pretrained(shape), ids)
    assert norm_ratio(model(ids).logits, wanted) <= 1e-5
    assert norm_ratio(in_pieces(model, ids), wanted) <= 1e-5
    assert norm_ratio(model(ids).logits, pretrained(shape)(ids).logits) > 0.01


@pytest.mark.parametrize("shape", ["llama3", "yarn", "linear", "dynamic"])
def test_the_scaling_matters_here(shape, ids):
    name, options = SHAPES[shape]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert norm_ratio(pretrained(shape)(ids).logits, tiny_model(name, **options | plain)(ids).logits) > 0.1


def test_a_prefix_before_a_rope_that_depends_on_length_is_refused_before_a_weight_is_touched(ids):
    model = pretrained("dynamic")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(InputError, match=r"^prefix=True with rope_parameters\.rope_type='dynamic': .*prefix=False$"):
        convert(model, ids, T=4, method="base2", compiled=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert convert(model, ids, T=4, method="base2", compiled=False, prefix=False).prefix_tokens == []


def test_so_it_is_by_the_command(tmp_path):
    model = byte_model(tmp_path / "model", **SHAPES["dynamic"][1])
    with pytest.raises(InputError, match=r"^calibrate with .* rope_parameters\.rope_type='dynamic': .*; take prefix\.enabled=false$"):
        run(tmp_path, *model)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("llama", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, r"layer_types=\['sliding_attention', "),
        ("llama", {"sliding_window": 8}, r"sliding_window=8"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, r"layer_types=\['sliding_attention', "),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, r"layer_types=\['chunked_attention', "),
    ],
)
def test_windows_that_the_architecture_does_not_have_are_refused_by_key(name, options, told):
    """transformers' llama would attend to all keys in a forward and to the window alone behind its cache."""
    model = tiny_model(name)
    for key, value in options.items():
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match=rf"^config\.json, {told}.*{name}.*; "):
        prepare(model, rotation_seed=0)


def test_rows_of_the_embedding_beyond_the_tokenizer(tmp_path):
    """As Qwen2.5's 151936 rows for 151665 tokens: measured, saved, and written with."""
    model = byte_model(tmp_path / "model", vocab_size=300)
    results = run(tmp_path, *model, "stages=[evaluate,generate]", "generate.prompt=hello", "generate.max_new_tokens=24")
    assert results["perplexity"]["snn"] > 0
    assert results["generate"]["texts"][0]["tokens"] == 24
