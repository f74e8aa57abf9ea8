"""Integer weights: against plain GPTQ in numpy, torchao's primitives where they are installed, brute force, the properties promised."""

import numpy as np
import pytest
import torch

from spikellm.model.conversion import prepare
from spikellm.model.integers import (
    CLIPPING,
    DAMPING,
    check_groups,
    clipping_scales,
    load_integers,
    relative_error,
    round_compensating,
    round_model,
    round_to_nearest,
    save_integers,
)
from spikellm.model.sites import HEAD, LINEARS, decoder_layers
from tests.models import norm_ratio, tiny_model


def random_weight(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_moment(columns: int = 96, *, samples: int = 400, seed: int = 1) -> torch.Tensor:
    """Of correlated inputs of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / columns**0.5
    y = mixed * torch.linspace(0.1, 3, columns)
    return (y.T @ y).double()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32])
def test_to_nearest_is_no_further_than_half_a_step_and_integers_are_recovered(bits, group_size):
    weight = random_weight()
    found = round_to_nearest(weight, bits=bits, group_size=group_size)
    steps = found.scales.repeat_interleave(96 // found.scales.shape[1], 1)
    assert (found.weight - weight).abs().le(steps / 2 * (1 + 1e-4)).all()  # a scale is rounded to 16 bits
    assert found.integers.abs().max() == 2 ** (bits - 1) - 1
    assert torch.equal(found.weight.double(), found.integers.double() * steps.double()), "s n is exact in float32"
    assert torch.equal((found.weight / steps), found.integers.float())
    again = round_to_nearest(found.weight, bits=bits, group_size=group_size)
    assert torch.equal(again.integers, found.integers)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32])
def test_to_nearest_is_torchaos(bits, group_size):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, found = random_weight(), round_to_nearest(random_weight(), bits=bits, group_size=group_size)
    block, top = (1, group_size or 96), 2 ** (bits - 1) - 1
    symmetric = primitives.MappingType.SYMMETRIC
    scales, zero = primitives.choose_qparams_affine(weight, symmetric, block, torch.int8, -top, top, scale_dtype=torch.float32)
    torch.testing.assert_close(found.scales.flatten(), scales.flatten(), rtol=2**-16, atol=0)
    wanted = primitives.quantize_affine(weight, block, found.scales, zero.view_as(found.scales), torch.int8, -top, top)
    assert torch.equal(found.integers, wanted)


def plain_gptq(weight: np.ndarray, moment: np.ndarray, steps: np.ndarray, top: int) -> np.ndarray:
    """The recursion that GPTQ's Cholesky factor stands for: after each column the inverse of what is left is made anew."""
    weight, columns = weight.copy(), weight.shape[1]
    order = np.argsort(-np.diag(moment), kind="stable")
    damped = moment + DAMPING * np.diag(moment).mean() * np.eye(columns)
    integers = np.zeros_like(weight)
    for number, column in enumerate(order):
        left = order[number:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        integers[:, column] = np.clip(np.round(weight[:, column] / steps[:, column]), -top, top)
        error = weight[:, column] - steps[:, column] * integers[:, column]
        weight[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
    return integers


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 48])
def test_gptq_is_the_plain_recursion(bits, group_size):
    """192 columns: more than a block."""
    weight, moment = random_weight(6, 192), random_moment(192)
    found = round_compensating(weight, moment, bits=bits, group_size=group_size)
    steps = found.scales.double().repeat_interleave(192 // found.scales.shape[1], 1).numpy()
    wanted = plain_gptq(weight.double().numpy(), moment.numpy(), steps, 2 ** (bits - 1) - 1)
    assert (found.integers.numpy() == wanted).all()


def test_gptq_errs_less_at_the_outputs_than_nearest():
    weight, moment = random_weight(), random_moment()
    for bits in (8, 4):
        errors = [
            relative_error(weight, found, moment)
            for found in (
                round_compensating(weight, moment, bits=bits, group_size=32),
                round_to_nearest(weight, bits=bits, group_size=32),
            )
        ]
        assert errors[0] < 0.5 * errors[1]


def test_the_relative_error_is_that_of_outputs():
    y = torch.randn(50, 96, generator=torch.Generator().manual_seed(5)).double()
    weight = random_weight()
    found = round_to_nearest(weight, bits=4, group_size=None)
    wanted = norm_ratio(y @ found.weight.double().T, y @ weight.double().T) ** 2
    assert relative_error(weight, found, y.T @ y) == pytest.approx(wanted, rel=1e-9)


def test_scales_are_the_best_of_those_that_are_tried():
    weight, importance = random_weight(3, 8), torch.linspace(0.1, 2, 8)
    found = clipping_scales(weight, importance, bits=4, group_size=4)
    for row in range(3):
        for group in range(2):
            part, share = weight[row, 4 * group : 4 * group + 4], importance[4 * group : 4 * group + 4]
            tried = [factor * part.abs().max() / 7 for factor in CLIPPING]
            errors = [((part - (part / scale).round().clamp(-7, 7) * scale).square() * share).sum() for scale in tried]
            assert found[row, group] == pytest.approx(tried[int(torch.stack(errors).argmin())].item(), rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_inputs_of_zeros_stay_zero(bits):
    weight, moment = random_weight(), random_moment()
    weight[3] = 0
    moment[:, 7] = moment[7] = 0  # a channel that never fires
    for found in (round_to_nearest(weight, bits=bits, group_size=32), round_compensating(weight, moment, bits=bits, group_size=32)):
        assert not found.integers[3].any()
        assert found.weight.isfinite().all()


def test_integers_are_saved_whole(tmp_path):
    found = {"a.b": round_to_nearest(random_weight(), bits=4, group_size=32)}
    save_integers(tmp_path / "integers.safetensors", found)
    read = load_integers(tmp_path / "integers.safetensors")
    assert list(read) == ["a.b"]
    assert read["a.b"].integers.dtype is torch.int8
    assert torch.equal(read["a.b"].integers, found["a.b"].integers)
    assert torch.equal(read["a.b"].scales, found["a.b"].scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_linears_of_the_decoder_are_rounded_and_nothing_else(name, dtype):
    model = tiny_model(name, dtype=dtype)
    prepare(model, rotation_seed=0)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    round_model(model, bits=8, group_size=16)
    for key, parameter in model.named_parameters():
        rounded = any(key.endswith(f"{linear}.weight") for linear in LINEARS)
        assert torch.equal(parameter, before[key]) != rounded, key
    linear = decoder_layers(model)[0].get_submodule(LINEARS[0])
    assert linear.weight.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert model.get_submodule(HEAD).weight.dtype is dtype


def test_eight_bits_are_nearly_neutral_and_four_are_not():
    tokens = torch.randint(2, 256, (2, 64), generator=torch.Generator().manual_seed(3))
    model = tiny_model()
    prepare(model, rotation_seed=0)
    wanted = model(tokens).logits
    errors = []
    for bits in (8, 4):
        rounded = tiny_model()
        prepare(rounded, rotation_seed=0)
        round_model(rounded, bits=bits, group_size=16)
        errors.append(norm_ratio(rounded(tokens).logits, wanted))
    assert errors[0] < 0.02
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize(("group_size", "named"), [(64, "intermediate_size=144"), (24, "hidden_size=64"), (128, "hidden_size=64")])
def test_groups_that_divide_no_inputs_are_refused(group_size, named):
    with pytest.raises(ValueError, match=rf"{named}.*divisor of 16"):
        check_groups(tiny_model().config, group_size)
    for fits in (None, 16, 8):
        check_groups(tiny_model().config, fits)
