"""Integers in a neuron's place against torch's own fake quantisation and counts by hand."""

import pytest
import torch

from spikellm.coding.integers import IntegerQuantizer, Levels, TokenQuantizer, spans


def levels(step: list[float], low: list[float], high: list[float]) -> Levels:
    return Levels(*(torch.tensor(values) for values in (step, low, high)))


@pytest.mark.parametrize(("T", "signed", "number"), [(3, True, 16), (8, True, 512), (3, False, 8), (8, False, 256)])
def test_signed_integers_have_a_bit_more_than_there_are_steps(T, signed, number):
    """INT(T + 1) in two's complement, unsigned INT(T)."""
    span = spans(T, signed=signed)
    low = -(span // 2 + 1) if signed else 0
    quantizer = IntegerQuantizer(levels([0.5], [float(low)], [float(low + span)]))
    found = quantizer(torch.linspace(-(2.0 ** (T + 1)), 2.0 ** (T + 1), 20001))
    assert found.unique().numel() == number == span + 1
    assert (found.min(), found.max()) == (0.5 * low, 0.5 * (low + span))
    assert torch.equal(found.unique().diff(), torch.full((span,), 0.5))


@pytest.mark.parametrize(("shape", "axis"), [((2, 7, 12), -1), ((2, 4, 7, 5), 1)])
def test_fixed_levels_are_torchs_fake_quantisation_of_every_group(shape, axis):
    """Steps are powers of two: x times their inverse is x over them to the last bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    own = levels([0.25, 0.125, 0.5, 1.0], [-8.0, -3.0, 0.0, -8.0], [7.0, 12.0, 15.0, 7.0])
    parts = x.unflatten(axis, (4, -1))
    # of torch the integers are shifted by the zero point, so that all groups have the same range
    shift = -own.low.int()
    wanted = torch.fake_quantize_per_channel_affine(parts, own.step, shift, axis % x.ndim, 0, 15)
    assert torch.equal(IntegerQuantizer(own, axis=axis)(x), wanted.view(shape))
    one = IntegerQuantizer(Levels(*(values[:1] for values in own)), axis=axis)
    assert torch.equal(one(x), torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7))


def by_hand(values: torch.Tensor, T: int, *, signed: bool) -> torch.Tensor:
    """A token's values between its least and largest, in float64."""
    number = 2 ** (T + 1) if signed else 2**T
    least, largest = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    step = (largest - least) / (number - 1)
    zero_point = round(-least / step)
    integers = [min(max(round(value / step) + zero_point, 0), number - 1) for value in values.tolist()]
    return torch.tensor([(integer - zero_point) * step for integer in integers], dtype=torch.float64)


@pytest.mark.parametrize("T", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_token_has_the_levels_of_its_own_values(T, groups):
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 5, dtype=torch.float64)[:, None]
    found = TokenQuantizer(T, signed=True, groups=groups, clip=1.0)(x)
    for token, own in zip(x.view(10, groups, -1), found.view(10, groups, -1), strict=True):
        for values, got in zip(token, own, strict=True):
            assert torch.allclose(got, by_hand(values, T, signed=True), rtol=1e-12, atol=0)
            assert got.unique().numel() <= 2 ** (T + 1)
    assert torch.equal(TokenQuantizer(T, signed=True, groups=groups, clip=1.0)(x[:, 2:3]), found[:, 2:3])  # whoever stands beside it


@pytest.mark.parametrize("groups", [1, 4])
def test_heads_have_levels_of_their_own_or_share_a_tokens(groups):
    x = torch.rand(1, 4, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.arange(1.0, 5).view(4, 1, 1)
    found = TokenQuantizer(3, signed=False, groups=groups, axis=1)(x)
    for row in range(3):
        heads = x[0, :, row] if groups == 4 else x[0, :, row].reshape(1, -1)
        wanted = torch.stack([by_hand(values, 3, signed=False) for values in heads]).view(4, 8)
        assert torch.allclose(found[0, :, row], wanted, rtol=1e-12, atol=0)


def test_zero_is_a_level_and_a_token_of_zeros_stays():
    x = torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.0, 0.0], [0.0, 5.0, 6.0], [0.0, -5.0, -6.0]])
    found = TokenQuantizer(3, signed=True, clip=1.0)(x)
    assert torch.equal(found[:, 0], torch.zeros(4))
    assert torch.equal(found[1], torch.zeros(3))
    assert torch.allclose(found[:, 2], x[:, 2])  # the far end is one, too


@pytest.mark.parametrize(("T", "levels"), [(2, 8), (3, 16), (4, 32), (5, 64)])
def test_few_levels_clip_what_is_far_out(T, levels):
    """A token of normal values: no clip is better by more than the grid's step, and the levels' range is what Max 1960 has."""
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(T), dtype=torch.float64)

    def error(clip: float | None) -> float:
        return (TokenQuantizer(T, signed=True, clip=clip)(x) - x).square().mean().item()

    assert error(None) <= 1.03 * min(error(clip) for clip in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0))
    assert len(TokenQuantizer(T, signed=True)(x[:1]).unique()) <= levels
