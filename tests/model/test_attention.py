"""The installed model against transformers' own attention: parity, causality, padding, caches, prefix."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from spikellm.execution.stepped import stepped
from spikellm.kernels.attention import exponentials
from spikellm.model.attention import spiking_attention, visible_blocks
from spikellm.model.conversion import fill, install, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.model.rotation import PARTS, rotate
from tests.codes import base2_tables
from tests.models import TINY, greedy, norm_ratio, tiny_model

BLOCK = 16  # queries per block: several blocks in every test


def installed(name: str = "llama", **options):
    model = tiny_model(name, **options)
    install(model, rotated=(), query_block=BLOCK)
    return model


def spiking(name: str = "llama", *, prefix: tuple[int, ...] = (), **options):
    """Rotated, with its prefix, and a neuron at every site."""
    model = tiny_model(name, **options)
    prepare(model, rotation_seed=0, query_block=BLOCK)
    attach_prefix(model, list(prefix))
    fill(model, base2_tables(model), compiled=False)
    return model


@pytest.mark.parametrize("name", list(TINY))
def test_transparent_slots_leave_transformers_result(name, ids):
    assert norm_ratio(installed(name)(ids).logits, tiny_model(name)(ids).logits) <= 1e-5


def test_sliding_window_is_kept(ids):
    options = {"sliding_window": 8}
    wanted = tiny_model("mistral", **options)(ids).logits
    assert norm_ratio(tiny_model("mistral")(ids).logits, wanted) > 0.01  # the window matters at this length
    assert norm_ratio(installed("mistral", **options)(ids).logits, wanted) <= 1e-5


def test_neurons_act(ids):
    assert norm_ratio(spiking()(ids).logits, tiny_model()(ids).logits) > 1e-3


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("changed", [1, 20, 39])
def test_later_tokens_never_reach_earlier_logits(name, changed, ids):
    model = spiking(name, prefix=(1,))
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [installed, spiking], ids=["neurons off", "neurons on"])
@pytest.mark.parametrize("prefix", [(), (1, 7)], ids=["no prefix", "prefix"])
def test_padding_and_batching_change_nothing(side, build, prefix):
    model = build()
    if build is installed:
        attach_prefix(model, list(prefix))
    else:
        model = spiking(prefix=prefix)
    generator = torch.Generator().manual_seed(2)
    lengths = [40, 3, 17, 25, 8, 33, 1, 12]
    rows = [torch.randint(2, 256, (length,), generator=generator) for length in lengths]
    places = [slice(0, n) if side == "right" else slice(max(lengths) - n, None) for n in lengths]
    batch, mask = torch.zeros(8, 40, dtype=torch.long), torch.zeros(8, 40, dtype=torch.long)
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        batch[index, place], mask[index, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(batch, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(together).all()
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert norm_ratio(together[index, place], model(row[None]).logits[0]) <= 1e-4


@pytest.mark.parametrize("prefix", [(), (1, 7)], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("name", list(TINY))
def test_generation_with_a_cache_equals_greedy_without(name, prefix, ids):
    model = spiking(name, prefix=prefix)
    tokens = ids[:1, :9]
    wanted = greedy(model, tokens, 8)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, use_cache=True)
    assert made.tolist() == wanted.tolist()


def test_cached_logits_equal_the_whole_forward(ids):
    model = spiking(prefix=(1, 7))
    cache = DynamicCache(config=model.config)
    parts = [model(part, None, None, cache, use_cache=True).logits for part in ids.split([20, 1, 19], dim=1)]
    assert norm_ratio(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= 1e-4


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("rotated", [False, True], ids=["as it is", "rotated"])
def test_a_prefix_in_buffers_equals_the_tokens_themselves(name, rotated, ids):
    """Truth: the pretrained model on prefix and text, one sequence. Its positions are shifted by P; RoPE does not see that."""
    tokens = [7, 200, 1]
    whole = torch.cat([torch.tensor([tokens]).expand(len(ids), -1), ids], 1)
    wanted = tiny_model(name)(whole).logits[:, len(tokens) :]
    model = tiny_model(name)
    if rotated:
        rotate(model, seed=0)
    install(model, rotated=PARTS if rotated else (), query_block=BLOCK)
    attach_prefix(model, tokens)
    assert norm_ratio(model(ids).logits, wanted) <= (1e-4 if rotated else 1e-5)
    assert norm_ratio(model(ids).logits, tiny_model(name)(ids).logits) > 0.01  # the prefix matters


def test_attention_without_a_mask_or_without_neurons_refuses():
    layer = installed().model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="mask"):
        spiking_attention(layer, q, k, k, None, scaling=1.0)
    with pytest.raises(ValueError, match="convert"):
        spiking_attention(tiny_model().model.layers[0].self_attn, q, k, k, torch.ones(1, 1, 3, 3, dtype=torch.bool), scaling=1.0)


def additive(mask: torch.Tensor, least: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, least)


@pytest.mark.parametrize(
    ("least", "dtype"),
    [(-torch.inf, torch.float32), (torch.finfo(torch.float32).min, torch.float32), (-1e9, torch.float64),
     (torch.finfo(torch.bfloat16).min, torch.bfloat16), (-1e4, torch.float16), (-1e4, torch.bfloat16)],
)  # fmt: skip
def test_a_mask_that_is_added_hides_what_it_hides_in_eager_attention(least, dtype, ids):
    """Truth: transformers' own eager attention, which adds the mask to scores. Two documents in a row, the second with a hole."""
    seen = torch.ones(40, 40).tril().bool()
    seen[20:, :20] = False
    seen[30:, 22] = False
    mask = seen.expand(2, 1, 40, 40)
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    wanted = eager(ids, attention_mask=additive(mask, torch.finfo(torch.float32).min, torch.float32)).logits
    assert norm_ratio(wanted, eager(ids).logits) > 0.01
    model = installed()
    assert norm_ratio(model(ids, attention_mask=additive(mask, least, dtype)).logits, wanted) <= 1e-5
    assert norm_ratio(model(ids, attention_mask=mask).logits, wanted) <= 1e-5
    assert norm_ratio(model(ids, attention_mask=mask[:1]).logits, wanted) <= 1e-5  # one for the whole batch


CAUSAL = torch.ones(1, 1, 40, 40).tril().bool()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (additive(CAUSAL, -torch.inf, torch.float32) + 0.5 * torch.eye(40), "bias"),
        (additive(CAUSAL, torch.nan, torch.float32), "bias"),
        (CAUSAL.long(), "torch.int64"),
        (CAUSAL.expand(1, 4, 40, 40), "all heads"),
        (CAUSAL[:, :, :, :39], r"\(2, 1, 40, 40\)"),
    ],
)
def test_a_mask_that_cannot_be_honoured_is_refused(mask, reason, ids):
    with pytest.raises(ValueError, match=reason):
        installed()(ids, attention_mask=mask)


@pytest.mark.parametrize(
    "options",
    [{"output_attentions": True}, {"head_mask": torch.ones(2, 4)}, {"position_bias": torch.ones(40, 40)}, {"softcap": 30.0},
     {"s_aux": torch.ones(4)}, {"is_causal": False}, {"cu_seq_lens_q": torch.tensor([0, 40])}, {"no_such_option": 1}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
@pytest.mark.parametrize("build", [installed, spiking], ids=["neurons off", "neurons on"])
def test_an_option_that_would_change_the_result_is_refused_by_name(build, options, ids):
    with pytest.raises(ValueError, match=next(iter(options))):
        build()(ids, **options)


def test_options_without_effect_pass(ids):
    model = installed()
    wanted = model(ids).logits
    options = {"output_attentions": False, "head_mask": None, "is_causal": True, "output_hidden_states": True, "use_cache": True,
               "token_type_ids": torch.zeros_like(ids), "position_ids": torch.arange(40)[None]}  # fmt: skip
    assert torch.equal(model(ids, **options).logits, wanted)


def test_dropout_of_attention_is_refused_in_training(ids):
    model = installed(attention_dropout=0.1)
    assert torch.isfinite(model(ids).logits).all()
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        model.train()(ids)
    assert torch.isfinite(installed().train()(ids).logits).all()


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [installed, spiking], ids=["neurons off", "neurons on"])
def test_no_other_attention_passes_the_neurons_by(build, name, chosen, ids):
    model = build(name)
    wanted = model(ids).logits
    model.set_attn_implementation(chosen)
    with pytest.raises(ValueError, match=f"attn_implementation='{chosen}'"):
        model(ids)
    model.config._attn_implementation = "spiking"
    assert torch.equal(model(ids).logits, wanted)
    model.config._attn_implementation = chosen
    with pytest.raises(ValueError, match=f"attn_implementation='{chosen}'"):
        model.generate(ids, max_new_tokens=1)


@given(L=st.integers(1, 20), S=st.integers(1, 24), size=st.integers(1, 24), density=st.floats(0, 1), seed=st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_blocks_cover_all_queries_and_every_key_they_may_see(L, S, size, density, seed):
    mask = torch.rand(2, 1, L, S, generator=torch.Generator().manual_seed(seed)) < density
    covered = []
    for rows, keys in visible_blocks(mask, size):
        rows_seen = list(range(L))[rows]
        keys_seen = set(range(S)[keys])
        covered += rows_seen
        assert 1 <= len(rows_seen) <= size
        assert keys_seen  # a softmax over nothing is not a number
        visible = {key for key in range(S) for row in rows_seen if mask[:, 0, row, key].any()}
        assert visible <= keys_seen
    assert covered == list(range(L))


def test_blocks_leave_out_keys_above_the_diagonal():
    causal = torch.ones(8, 8).tril().bool()[None, None]
    assert [(rows.stop, keys.stop) for rows, keys in visible_blocks(causal, 3)] == [(3, 3), (6, 6), (8, 8)]


def test_a_query_that_sees_nothing_has_no_exponentials():
    mask = torch.tensor([[True, False, True], [False, False, False]])[None, None]
    weights, top = exponentials(torch.tensor([[2.0, 9.0, 1.0], [5.0, 6.0, 7.0]])[None, None], mask)
    assert weights[0, 0].tolist() == [[1.0, 0.0, pytest.approx(math.exp(-1))], [0.0, 0.0, 0.0]]
    assert torch.isfinite(top).all()


@pytest.mark.parametrize("steps", [False, True], ids=["folded", "stepped"])
def test_a_softmax_that_sends_no_spike_mixes_nothing(steps, ids):
    """Its first threshold lies above 1, the largest exponential; without a prefix there is nothing else to mix."""
    model = tiny_model()
    install(model, rotated=(), query_block=BLOCK)
    tables = base2_tables(model)
    silent = {name: table for name, table in base2_tables(model).items() if "softmax" in name}
    for name, table in silent.items():
        tables[name] = replace(table, theta=table.theta + 2)
    fill(model, tables, compiled=False)
    outputs = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    if steps:
        with stepped(model):
            model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
            logits = model(ids).logits
    else:
        logits = model(ids).logits
    assert torch.isfinite(logits).all()
    assert not outputs[0].any()


def test_block_size_changes_no_logit(ids):
    logits = []
    for block in (1, 7, 64):
        model = tiny_model()
        install(model, rotated=(), query_block=block)
        fill(model, base2_tables(model), compiled=False)
        logits.append(model(ids).logits)
    assert norm_ratio(logits[0], logits[2]) <= 1e-5
    assert norm_ratio(logits[1], logits[2]) <= 1e-5
