"""Hadamard matrices and the fast transforms, against the definition and against scipy."""

import math

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from spikellm.kernels.hadamard import Factors, hadamard_factors, hadamard_matrix, hadamard_transform, order, split

ORDERS = [1, 2, 4, 12, 20, 28, 36, 44, 52, 60, 76, 108, 172]
# head, hidden and MLP widths of the models in conf/model
WIDTHS = {
    "smollm2_135m": (64, 576, 1536),
    "tinyllama_1b": (64, 2048, 5632),
    "llama2_7b": (128, 4096, 11008),
    "llama2_13b": (128, 5120, 13824),
    "llama3_8b and mistral_7b": (128, 4096, 14336),
    "llama3_2_1b": (64, 2048, 8192),
    "llama3_2_3b": (128, 3072, 8192),
    "qwen2_5_0_5b": (64, 896, 4864),
    "qwen3_0_6b": (128, 1024, 3072),
    "tiny": (16, 64, 96),
}
MODEL_WIDTHS = sorted({width for widths in WIDTHS.values() for width in widths})


@pytest.mark.parametrize("n", ORDERS)
def test_rows_of_signs_are_orthogonal(n):
    matrix = hadamard_matrix(n)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))  # exact: sums of integers


@pytest.mark.parametrize("n", [2**k for k in range(8)])
def test_powers_of_two_equal_sylvester_up_to_signs_of_rows(n):
    sylvester = torch.from_numpy(scipy_hadamard(n)).double()
    ours = hadamard_matrix(n)
    # every row of one is a row of the other, with either sign, exactly once; Paley's matrix of order 2^k is another class
    overlap = (ours @ sylvester.T).abs() / n
    if n <= 2:
        assert torch.equal(ours, sylvester)
    assert torch.allclose(overlap.square().sum(1), torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("n", MODEL_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_of_every_model_width_are_orthogonal_in_every_dtype(n, dtype):
    left, right, signs = hadamard_factors(n, dtype=dtype)
    assert signs is None
    assert left.shape[0] * right.shape[0] == n
    for factor in (left.double(), right.double()):
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor), dtype=torch.float64))
        assert torch.equal(factor.abs(), torch.ones_like(factor))


@pytest.mark.parametrize("n", [*ORDERS, 144, 160, 576, 896, 1536])
def test_transform_is_the_product_with_the_dense_matrix(n):
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    left, right = split(n)
    dense = torch.kron(hadamard_matrix(left), hadamard_matrix(right)) / n**0.5
    assert torch.allclose(dense @ dense.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(hadamard_transform(x, hadamard_factors(n, dtype=torch.float64)), x @ dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_the_transposed_factors_undo_the_transform_and_norms_stay(n):
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    left, right, _ = factors = hadamard_factors(n, dtype=torch.float64)
    y = hadamard_transform(x, factors)
    assert torch.allclose(hadamard_transform(y, Factors(left.T, right.T, None)), x, rtol=0, atol=1e-11)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize("n", [92, 3, 5, 6, 7, 18, 35])
def test_unreachable_orders_are_refused_by_number(n):
    for construct in (hadamard_matrix, split):
        with pytest.raises(ValueError, match=rf"order {n}\b"):
            construct(n)


@pytest.mark.parametrize("n", [0, -4])
def test_orders_below_one_are_refused(n):
    with pytest.raises(ValueError, match="order"):
        hadamard_matrix(n)


# Without a matrix of their order: head width 100 is OpenLLaMA-3B's, 2730 is 8/3 of 1024; width -> order of the two that overlap
SMALLER = {3: 2, 5: 4, 6: 4, 18: 16, 35: 32, 63: 32, 92: 64, 100: 64, 118: 64, 575: 512, 1535: 1024, 2730: 2048, 3776: 2048}


@pytest.mark.parametrize("n", SMALLER)
def test_without_a_matrix_two_smaller_ones_overlap(n):
    """Q by hand: a matrix on the first b channels, signs, a matrix on the last b."""
    b = order(n)
    assert b == SMALLER[n]
    left, right, signs = factors = hadamard_factors(n, dtype=torch.float64)
    dense = torch.kron(left, right) / b**0.5
    prime = next(q for q in range(b + 1, 2 * b + 2) if all(q % p for p in range(2, q)))
    euler = [pow(index, (prime - 1) // 2, prime) for index in range(1, b + 1)] if prime > 2 else [1] * b
    assert signs.tolist() == [1.0 if power == 1 else -1.0 for power in euler]
    first, last = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    first[:b, :b], last[n - b :, n - b :] = dense, signs[:, None] * dense
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    y = hadamard_transform(x, factors)
    assert torch.allclose(y, x @ first @ last, rtol=0, atol=1e-11)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
    assert torch.allclose(hadamard_transform(x.float(), hadamard_factors(n, dtype=torch.bfloat16)).double(), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [n for n in SMALLER if n >= 18])
def test_overlapping_transforms_leave_no_channel_by_itself(n):
    """An outlier in any one channel: a Hadamard matrix leaves magnitudes of 1, a rotation at random about sqrt(2 log n)."""
    spread = hadamard_transform(torch.eye(n, dtype=torch.float64), hadamard_factors(n, dtype=torch.float64)).abs().amax(-1) * n**0.5
    assert spread.max() <= 1.3 * (2 * math.log(n)) ** 0.5


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_a_matrix_of_the_width_is_taken_where_there_is_one(n):
    assert order(n) == n
