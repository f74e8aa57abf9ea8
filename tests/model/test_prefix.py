"""Prefix tokens: a model with massive activations by construction, and counts by hand."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from spikellm.model import prefix
from spikellm.model.blocks import walk
from spikellm.model.conversion import install
from spikellm.model.prefix import attach_prefix, find_prefix_tokens, keep_what_helps
from tests.models import TINY, norm_ratio, tiny_model

BOS, LOUD, LOUDER = 1, 7, 9
QUIET = 20  # tokens from here on


def model_with_loud_tokens(*tokens: int):
    """Channel 0 of the residual stream belongs to `tokens`; in layer 1 it drives gate and up far beyond all others."""
    model = tiny_model()
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 0.0
    embedding[list(tokens)] = 0.0
    embedding[list(tokens), 0] = 30.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    layer = model.model.layers[1]
    layer.mlp.gate_proj.weight[0], layer.mlp.up_proj.weight[0] = 0.0, 0.0
    layer.mlp.gate_proj.weight[0, 0], layer.mlp.up_proj.weight[0, 0] = 100.0, 100.0
    install(model, rotated=(), query_block=64)
    return model


def windows(*places: dict[int, int]) -> torch.Tensor:
    """Windows of 32 quiet tokens with loud ones at given positions."""
    rows = torch.randint(QUIET, 256, (len(places), 32), generator=torch.Generator().manual_seed(0))
    for row, loud in zip(rows, places, strict=True):
        for position, token in loud.items():
            row[position] = token
    return rows


def find(model, text, *, max_tokens: int = 8, bos: int | None = BOS) -> list[int]:
    return find_prefix_tokens(model, text, eta=64.0, max_tokens=max_tokens, bos=bos)


def test_a_model_without_outliers_gets_no_prefix():
    model = tiny_model()
    install(model, rotated=(), query_block=64)
    text = windows({}, {})
    assert find(model, text) == []
    before = model(text).logits
    attach_prefix(model, [])
    assert torch.equal(model(text).logits, before)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        # 3 + 3 outliers in 2 windows: three tokens, but only two different ones are known
        ([{3: LOUD, 9: LOUD, 20: LOUD}, {1: LOUD, 2: LOUD, 31: LOUD}], [LOUD, BOS]),
        # by falling frequency, BOS last
        ([{3: LOUDER, 9: LOUD, 20: LOUD}, {1: LOUD, 2: LOUDER, 31: LOUD}], [LOUD, LOUDER, BOS]),
        # one outlier in three windows: 1/3, rounded up
        ([{5: LOUD}, {}, {}], [BOS]),
        # mean 4/3, rounded up to 2
        ([{5: LOUD, 6: LOUD}, {7: LOUD}, {8: LOUD}], [LOUD, BOS]),
        # first in its window it counts, but does not say which token is loud
        ([{0: LOUD}, {0: LOUD}], [BOS]),
        ([{0: LOUD, 4: LOUDER}, {0: LOUD, 5: LOUDER}], [LOUDER, BOS]),
    ],
)
def test_tokens_by_hand(places, wanted):
    assert find(model_with_loud_tokens(LOUD, LOUDER), windows(*places)) == wanted


def test_length_is_bounded_and_bos_may_be_unknown():
    model = model_with_loud_tokens(LOUD, LOUDER)
    text = windows({3: LOUDER, 9: LOUD, 20: LOUD}, {1: LOUD, 2: LOUDER, 31: LOUD})
    assert find(model, text, max_tokens=2) == [LOUD, BOS]
    assert find(model, text, max_tokens=1) == [BOS]
    assert find(model, text, bos=None) == [LOUDER, LOUD]


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_outliers_and_losses_block_by_block_are_those_of_whole_forwards(name, dtype):
    model = tiny_model(name, dtype=dtype)
    install(model, rotated=(), query_block=16)
    attach_prefix(model, [LOUD, BOS])
    text = torch.randint(2, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    peaks: dict[int, torch.Tensor] = {}
    losses, outliers = [], []
    for window in text:
        with ExitStack() as stack, torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                keep = partial(lambda index, _, inputs: peaks.update({index: inputs[0][0].abs().amax(-1).float()}), index)
                stack.callback(layer.mlp.down_proj.register_forward_pre_hook(keep).remove)
            losses.append(model(window[None], labels=window[None]).loss.item())
        outliers.append(torch.stack([peaks[index] > 1.5 * peaks[index].median() for index in (0, 1)]))
    found = prefix._outliers(model, text, 1.5)
    assert found.any()
    assert torch.equal(found, torch.stack(outliers, 1))
    assert [prefix._loss(model, window, state) for window, state in zip(text, walk(model, text.split(1)), strict=True)] == losses


def test_search_leaves_no_trace():
    model = model_with_loud_tokens(LOUD)
    text = windows({3: LOUD})
    before, hooks = model(text).logits, [dict(module._forward_pre_hooks) for module in model.modules()]
    find(model, text)
    assert torch.equal(model(text).logits, before)
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_the_embedded_models_first_token_is_an_outlier(real_model, real_tokenizer):
    """SmolLM2's first token has the massive activation of its kind, so that its prefix ends with BOS."""
    text = real_tokenizer("The tower was built of grey stone. " * 12)["input_ids"][:96]
    tokens = find_prefix_tokens(real_model, torch.tensor([text]), eta=64.0, max_tokens=8, bos=real_model.config.bos_token_id)
    assert tokens[-1] == real_model.config.bos_token_id
    assert len(tokens) <= 4


def test_a_second_prefix_replaces_the_first():
    model, other = tiny_model(), tiny_model()
    for each in (model, other):
        install(each, rotated=(), query_block=64)
    text = windows({})
    attach_prefix(model, [50, 60])
    attach_prefix(model, [7])
    attach_prefix(other, [7])
    assert norm_ratio(model(text).logits, other(text).logits) <= 1e-6
    attach_prefix(model, [])
    assert norm_ratio(model(text).logits, tiny_model()(text).logits) <= 1e-5


def test_tokens_that_stay_outliers_wherever_they_stand_are_dropped():
    model = model_with_loud_tokens(LOUD)  # loud by its embedding: no prefix makes it quiet
    text = windows({3: LOUD, 8: LOUD}, {4: LOUD, 9: LOUD})
    assert find(model, text) == [LOUD, BOS]
    assert keep_what_helps(model, text, [LOUD, BOS], eta=64.0, text=text) == [BOS]
    assert keep_what_helps(model, text, [BOS], eta=64.0, text=text) == [BOS]
    assert keep_what_helps(model, windows({}, {}), [LOUD, BOS], eta=64.0, text=text) == [BOS]  # nothing left to help with


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8, "original_max_position_embeddings": 256}], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_rope_that_depends_on_length_is_refused(rope):
    model = tiny_model(rope_parameters=rope | {"rope_theta": 10000.0})
    install(model, rotated=(), query_block=64)
    with pytest.raises(ValueError, match=rf"{rope['rope_type']}.*prefix\.enabled=false"):
        attach_prefix(model, [BOS])
    attach_prefix(model, [])


def test_rope_of_llama3_keeps_its_prefix(ids):
    """Its frequencies are scaled once for all lengths. Truth: the tokens themselves before the text."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    tokens = torch.tensor([[LOUD, BOS]])
    wanted = tiny_model(rope_parameters=rope)(torch.cat([tokens.expand(len(ids), -1), ids], 1)).logits[:, 2:]
    model = tiny_model(rope_parameters=rope)
    install(model, rotated=(), query_block=64)
    attach_prefix(model, tokens[0].tolist())
    assert norm_ratio(model(ids).logits, wanted) <= 1e-5
