"""What stands before neurons, in plain form: RMSNorm, and the product with a Kronecker product of two Hadamard matrices."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

# Optional CUDA kernel for powers of two (Sylvester's order); imported by the first transform that can use it.
HAS_CUDA_KERNEL = find_spec("fast_hadamard_transform") is not None


def rms_norm(x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*rows D"]:
    """weight x / sqrt(mean(x^2) + eps), as transformers computes it (Zhang & Sennrich 2019)."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def kronecker(x: Float[Tensor, "*rows PR"], left: Float[Tensor, "P P"], right: Float[Tensor, "R R"]) -> Float[Tensor, "*rows PR"]:
    """x (H_P (x) H_R) / sqrt(P R): with x as a P x R matrix X, vec(X) (H_P (x) H_R) = vec(H_P^T X H_R)."""
    p, r = left.shape[0], right.shape[0]
    if p == 1:
        return _rows_times(x, right, r**-0.5)
    return (left.T @ _rows_times(x.reshape(-1, p, r), right, (p * r) ** -0.5)).reshape(x.shape)


def _rows_times(x: Float[Tensor, "*rows R"], signs: Float[Tensor, "R R"], scale: float) -> Float[Tensor, "*rows R"]:
    size = signs.shape[0]
    if HAS_CUDA_KERNEL and x.is_cuda and size & (size - 1) == 0 and x.dtype is not torch.float64:
        from fast_hadamard_transform import hadamard_transform as kernel

        return kernel(x.contiguous(), scale=scale)
    return (x @ signs).mul_(scale)
