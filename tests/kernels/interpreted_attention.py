"""Attention in Triton on a CPU's tensors, by Triton's interpreter: `test_triton.py` runs this in a process of its own.

The truth is the plain form in float64, where no exponential is so near a threshold that another order of sums moves it over; in float32
with keys whose exponentials keep away from thresholds, or a code so fine that a spike is worth no more than rounding.
"""

import pytest
import torch
import triton

from spikellm.kernels import gpu
from spikellm.kernels.attention import average_plain, coded_average, coded_mixture, mixture_plain
from spikellm.kernels.encode import Digits, Rows, encode_plain
from spikellm.model import attention
from spikellm.model.conversion import fill, prepare
from spikellm.model.prefix import attach_prefix
from tests.codes import PARTITIONS, base2_table, partitioned_table, partitioned_tables
from tests.models import norm_ratio, tiny_model

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before anybody imports Triton"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(B: int, H: int, K: int, L: int, S: int, E: int, *, dtype: torch.dtype = torch.float64, P: int = 0):
    """Query, key, value, and a prefix of P tokens; laid out as models and caches do, token by token and with room before."""
    query = randn(B, L, H, E, seed=1, dtype=dtype).transpose(1, 2)
    key, value = randn(B, K, S + 3, E, seed=2, dtype=dtype)[:, :, 3:], randn(B, S, K, E, seed=3, dtype=dtype).transpose(1, 2)
    prefix = (randn(1, K, P, E, seed=4, dtype=dtype), randn(1, K, P, E, seed=5, dtype=dtype)) if P else None
    return query, key, value, prefix


def causal(B: int, L: int, S: int, *, padding: int = 0) -> torch.Tensor:
    """The last L of S tokens see themselves and what stands before; the first `padding` tokens of sequence 0 nobody."""
    mask = torch.ones(L, S, dtype=torch.bool).tril(S - L).repeat(B, 1, 1, 1)
    mask[0, :, :, :padding] = False
    return mask


def code(digits: Digits, groups: int, T: int = 4, dtype: torch.dtype = torch.float64):
    table = partitioned_table([0.8 + 0.1 * group for group in range(groups)], T, digits).to(dtype)
    return table.rows, digits, table.cuts


def both(query, key, value, mask, prefix, *code):
    """What the kernels and the plain forms make of it, normalised after and, where there is no prefix, before."""
    scaling = query.shape[-1] ** -0.5
    found = [(gpu.attended(query, key, value, mask, scaling, prefix, *code, before=False),
              coded_mixture(query, key, value, mask, scaling, prefix, *code))]  # fmt: skip
    if prefix is None:
        found.append((gpu.attended(query, key, value, mask, scaling, None, *code, before=True),
                      coded_average(query, key, value, mask, scaling, *code)))  # fmt: skip
    return found


SHAPES = {
    # B, H, K, L, S, E; hidden tokens; prefix
    "prefill": ((1, 4, 2, 66, 66, 64), 0, 0),
    "blocks": ((1, 2, 1, 130, 131, 16), 0, 2),
    "prefill-padded-behind-prefix": ((2, 2, 2, 65, 65, 64), 5, 3),
    "prefill-padded": ((2, 1, 1, 65, 65, 32), 5, 0),
    "prefill-into-a-cache": ((1, 2, 1, 40, 90, 24), 0, 1),
    "wide-heads": ((1, 2, 1, 34, 40, 128), 0, 2),
    "widest-heads": ((1, 2, 1, 33, 33, 256), 0, 0),
    "decode": ((1, 4, 2, 1, 150, 64), 0, 0),
    "decode-padded-behind-prefix": ((2, 4, 1, 1, 150, 128), 60, 17),
    "few-queries": ((1, 4, 2, 5, 70, 48), 0, 2),
    "short-padded": ((2, 2, 1, 9, 9, 20), 4, 0),
    "one-key": ((1, 2, 2, 1, 1, 256), 0, 0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_plain_forms(shape):
    """Queries that see nothing among them: padding of the first sequence. Every other shape has a code per head."""
    (B, H, K, L, S, E), padding, P = SHAPES[shape]
    query, key, value, prefix = heads(B, H, K, L, S, E, P=P)
    number = list(SHAPES).index(shape)
    own = code(PARTITIONS[number % len(PARTITIONS)], H if number % 2 else 1)
    for found, wanted in both(query, key, value, causal(B, L, S, padding=padding), prefix, *own):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("digits", "L"), [*((digits, 1) for digits in PARTITIONS), (PARTITIONS[4], 33), (PARTITIONS[5], 33)], ids=str)
def test_weights_are_coded_by_every_kind_of_digits(digits, L):
    query, key, value, _ = heads(1, 2, 1, L, 34, 16)
    for found, wanted in both(query, key, value, causal(1, L, 34), None, *code(digits, 2)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_probabilities_of_a_query_that_sees_nothing_are_those_of_all_keys():
    """Of the two first queries of two blocks; the code tells 1/130 from 1/128, which the first block's end would make of it."""
    query, key, value, _ = heads(1, 1, 1, 130, 130, 16)
    fine = base2_table(1.0, 12).to(torch.float64)
    given = (query, key, value, causal(1, 130, 130, padding=2), 0.25)
    wanted = coded_average(*given, fine.rows, fine.digits, None)
    assert wanted[:, :, :2].abs().max() > 1e-3
    torch.testing.assert_close(gpu.attended(*given, None, fine.rows, fine.digits, None, before=True), wanted, rtol=1e-12, atol=1e-12)


def test_masks_may_hide_any_key():
    query, key, value, _ = heads(2, 2, 1, 40, 50, 16)
    mask = (torch.rand(1, 1, 40, 50, generator=torch.Generator().manual_seed(0)) < 0.3).expand(2, -1, -1, -1)
    mask = mask & (torch.arange(40) != 7)[:, None]
    for found, wanted in both(query, key, value, mask, None, *code(PARTITIONS[1], 1)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def far_from_thresholds(exact: torch.Tensor, table) -> bool:
    """Whether the code's answers to exact weights are those to weights that rounding has moved by 1e-5 of themselves."""
    rows = table.rows
    each = [encode_plain(exact.view(1, 1, -1) * factor, rows, table.digits, table.cuts) for factor in (1 - 1e-5, 1, 1 + 1e-5)]
    return torch.equal(each[0], each[1]) and torch.equal(each[1], each[2])


@pytest.mark.parametrize(("L", "E", "dtype"), [
    (1, 128, torch.float32),
    (1, 80, torch.bfloat16),
    (70, 64, torch.float32),
    (33, 80, torch.bfloat16),
    (33, 64, torch.float16),
])  # fmt: skip
def test_in_float32_it_is_the_plain_form_within_rounding(L, E, dtype):
    """Keys such that no exponential lies within 1e-5 of a threshold, by their scores in float64: rounding moves no spike.

    Inputs of half precision are computed as the same numbers in float32.
    """
    digits = Digits(intervals=2, signed=True)
    table = partitioned_table([1.0], 3, digits)
    for seed in range(50):
        query, key, value, prefix = heads(1, 2, 1, L, L + 9, E, dtype=dtype, P=2)
        key = key + 0.1 * randn(*key.shape, seed=100 + seed, dtype=dtype)
        mask = causal(1, L, L + 9)
        scores = (query.double() @ key.double().mT * E**-0.5).masked_fill(~mask, -torch.inf)
        if far_from_thresholds((scores - scores.amax(-1, keepdim=True)).exp(), table.to(torch.float64)):
            break
    else:
        pytest.fail("every key has met a threshold")
    assert gpu.attends(query, key, value, mask, prefix, table.rows, digits, table.cuts)
    found = gpu.mixture(query, key, value, mask, E**-0.5, prefix, table.rows, digits, table.cuts, 256)

    def plain(dtype: torch.dtype) -> torch.Tensor:
        numbers = (each.to(dtype) for each in (query, key, value))
        sinks, own = (prefix[0].to(dtype), prefix[1].to(dtype)), table.to(dtype)
        return coded_mixture(*numbers, mask, E**-0.5, sinks, own.rows, digits, own.cuts)

    wanted, truth = plain(torch.float32), plain(torch.float64)
    assert found.dtype == torch.float32
    assert norm_ratio(found, wanted) < 1e-5
    assert norm_ratio(found.double(), truth) < 1e-5


@pytest.mark.parametrize("L", [2, 70])
def test_with_a_fine_code_it_is_the_softmax(L):
    """A spike on the other side of a threshold is worth 2^-20."""
    query, key, value, _ = heads(1, 2, 2, L, 90, 32, dtype=torch.float32)
    table = base2_table(1.0, 20)
    rows = Rows(*(part * 2 for part in table.rows))
    mask = torch.ones(1, 1, L, 90, dtype=torch.bool)
    wanted = (query.double() @ key.double().mT * 0.7).softmax(-1) @ value.double()
    assert (gpu.mixture(query, key, value, mask, 0.7, None, rows, table.digits, None, 256) - wanted).abs().max() < 90 * 2.0**-20
    assert (gpu.average(query, key, value, mask, 0.7, rows, table.digits, None, 256) - wanted).abs().max() < 90 * 2.0**-20


def test_what_it_does_not_serve_is_left_to_the_plain_form(monkeypatch):
    """Each is a refusal of `attends` or of neurons: nothing runs."""
    query, key, value, _ = heads(1, 2, 1, 3, 5, 16, dtype=torch.float32)
    mask, (rows, digits, cuts) = causal(1, 3, 5), code(PARTITIONS[0], 1, dtype=torch.float32)
    assert gpu.attends(query, key, value, mask, None, rows, digits, cuts)
    assert not gpu.attends(query.double(), key.double(), value.double(), mask, None, rows.map(torch.Tensor.double), digits, cuts.double())
    assert not gpu.attends(query.mT.contiguous().mT, key, value, mask, None, rows, digits, cuts)
    assert not gpu.attends(query.clone().requires_grad_(), key, value, mask, None, rows, digits, cuts)
    assert not gpu.attends(query, key, value, mask, (key, value.double()), rows, digits, cuts)
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    assert not gpu.attends(query, key, value, mask, None, rows, digits, cuts)


@pytest.mark.parametrize("after", [True, False])
def test_a_network_attends_in_one_kernel(monkeypatch, ids, after):
    """In float64, without blocks of queries; the truth is the network in blocks. Padding in front, two tokens of prefix."""
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    model = tiny_model(dtype=torch.float64)
    prepare(model, rotation_seed=0, query_block=16, normalise_after=after)
    attach_prefix(model, [1, 7])
    fill(model, partitioned_tables(model, 4, shift=1, heads=True), compiled=True)
    wanted = model(ids, attention_mask=seen).logits[seen.bool()]
    called, before = [], not after

    def kernel(function, _, *, compiled):
        def run(*given):
            called.append(function)
            given = given[:-1]  # of queries in blocks
            code = (None, *given[5:]) if before else given[5:]  # a prefix is among the keys then
            return gpu.attended(*given[:5], *code, before=before)

        return run

    if before:  # what a CPU leaves to the plain form
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(attention, "chosen", kernel)
    monkeypatch.setattr(attention.native, "ends", lambda *_: pytest.fail("in blocks"))
    found = model(ids, attention_mask=seen).logits[seen.bool()]
    assert called == [average_plain if before else mixture_plain] * 2
    assert norm_ratio(found, wanted) < 1e-9
