"""Drop-in replacements for modules of a decoder, with slots for neurons and arithmetic that spikes can rely on.

A `Slot` is transparent (the ANN) or holds an observer (calibration) or a `PhaseNeuron` (the SNN). Parameters keep their names,
so that a state dict fits before and after. Source of the norm: Zhang & Sennrich 2019, as transformers computes it.

Precision. Weights stay as the checkpoint has them; activations are currents and membrane potentials, float32 in every network whose
weights are narrower (float64 for float64 weights), from the embedding to the logits, in folded and in time-stepped execution alike.
bfloat16 has 8 significant bits: it would represent 385 of the 512 levels of base 2 at T = 9, 513 of 1024 at T = 10, and round every
fitted d_t.
"""

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear as matrix_product
from torch.nn.functional import silu

from spikellm.coding.neuron import PhaseNeuron, Slot
from spikellm.kernels import native
from spikellm.kernels.hadamard import Factors, coded_transform, hadamard_factors, hadamard_transform, order, split
from spikellm.kernels.transforms import rms_norm

PROBE = torch.linspace(-8, 8, 33)
# Numbers of a weight that are widened together, 256 MiB in float32: LLaMA-3-8B's lm_head would take 2 GiB beside its own one.
WIDENED = 2**26


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations beside weights of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(x: Float[Tensor, "*rows I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*rows O"]:
    """x W^T of float32 activations, summed and returned in float32 (of float64 in float64).

    On CUDA a bfloat16 weight meets the two bfloat16 parts of x = high + low, 16 significant bits, as many as a code of T = 16 has:
    tensor cores, float32 accumulation, no second copy of the weight. Elsewhere the weight is widened, which is exact, some of its rows
    at a time.
    """
    dtype = torch.promote_types(wide(x.dtype), weight.dtype)
    x = x.to(dtype)
    if not (weight.is_cuda and weight.dtype is torch.bfloat16 and dtype is torch.float32):
        if weight.dtype is dtype or weight.numel() <= WIDENED or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return matrix_product(x, weight.to(dtype))
        product = x.new_empty(*x.shape[:-1], len(weight))
        step = max(1, WIDENED // weight.shape[1])
        for start in range(0, len(weight), step):
            some = slice(start, start + step)
            product[..., some] = matrix_product(x, weight[some].to(dtype))
        return product
    rows = x.reshape(-1, x.shape[-1])
    high = rows.to(weight.dtype)
    low = (rows - high).to(weight.dtype)
    parts = torch.mm(torch.cat([high, low]), weight.T, out_dtype=dtype).view(2, *x.shape[:-1], len(weight))
    return parts[0] + parts[1]


class WideEmbedding(nn.Embedding):
    """Token ids to float32 currents: transformers derives the dtype of RoPE's tables from them, too."""

    @classmethod
    def adopt(cls, embedding: nn.Embedding) -> Self:
        """Take over the weight."""
        module = cls(embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, device="meta")
        module.weight = embedding.weight
        return module

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Rows of the embedding, float32 at least."""
        rows = super().forward(input)
        return rows.to(wide(rows.dtype))


class WideLinear(nn.Linear):
    """A Linear of weights as they are and activations in float32: see `wide_product`."""

    @classmethod
    def adopt(cls, linear: nn.Linear) -> Self:
        """Take over weight and bias."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        return module

    def forward(self, input: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """W x + b, float32 at least."""
        product = wide_product(input, self.weight)
        return product if self.bias is None else product + self.bias


class SpikingRMSNorm(nn.Module):
    """RMSNorm, then a neuron: x [.., D]."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.neuron = Slot()

    @classmethod
    def adopt(cls, norm: Any) -> Self:
        """Take over the weight of a transformers RMSNorm."""
        return cls(norm.weight, norm.variance_epsilon)

    def normalise(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """weight * x / rms(x)."""
        x = x.to(wide(x.dtype))
        # beside neurons alone: an empty slot's network is transformers' own, to the last bit
        norm = native.norm if isinstance(self.neuron, PhaseNeuron) else rms_norm
        return norm(x, self.weight.to(x.dtype), self.eps)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The neuron's values of the normalised x."""
        x = x.to(wide(x.dtype))
        coding = self.neuron.coding(x)
        done = None if coding is None else native.coded_norm(x, self.weight.to(x.dtype), self.eps, coding)
        return self.neuron(self.normalise(x)) if done is None else done


class SpikingActivation(nn.Module):
    """Activation function (SiLU), then a neuron."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.is_silu = torch.equal(function(PROBE), silu(PROBE))  # by any name: then a kernel computes it beside neurons
        self.neuron = Slot()

    def activate(self, x: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """The function of x."""
        # beside neurons alone, as the norm
        return native.silu(x) if self.is_silu and isinstance(self.neuron, PhaseNeuron) else self.function(x)

    def forward(self, x: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """The neuron's values of the function of x."""
        coding = self.neuron.coding(x) if self.is_silu else None
        done = None if coding is None else native.coded_silu(x, coding)
        return self.neuron(self.activate(x)) if done is None else done


class OnlineHadamard(nn.Module):
    """`hadamard_transform` along the last axis: R3 and R4. Signs alone are stored, which no cast to another dtype changes."""

    left: Tensor
    right: Tensor
    signs: Tensor | None

    def __init__(self, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.width = width
        size = order(width)
        shapes = dict(zip(("left", "right"), ((each, each) for each in split(size)), strict=True)) | {"signs": (size,)}
        for name, shape in shapes.items():
            absent = name == "signs" and size == width
            # not in the state dict: the width determines them
            self.register_buffer(name, None if absent else torch.empty(shape, dtype=dtype, device=device), persistent=False)
        self.reset()

    @property
    def factors(self) -> Factors:
        """What the transform multiplies with."""
        return Factors(self.left, self.right, self.signs)

    def reset(self) -> None:
        """Fill the factors (again: they are not in checkpoints)."""
        if not self.left.is_meta:
            for buffer, factor in zip(self.factors, hadamard_factors(self.width, dtype=torch.float64), strict=True):
                if buffer is not None and factor is not None:
                    buffer.copy_(factor)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """x Q, with Q = H / sqrt(n) where there is such a matrix."""
        return hadamard_transform(x, self.factors)


def transformed(x: Float[Tensor, "*batch n"], rotation: OnlineHadamard | None, neuron: Slot) -> Float[Tensor, "*batch n"]:
    """What a neuron sends of the online transform of x, where there is one: in one pass where a kernel does both."""
    if rotation is None:
        return neuron(x)
    coding = neuron.coding(x)
    done = None if coding is None else coded_transform(x, rotation.factors, coding)
    return neuron(rotation(x)) if done is None else done


class SpikingLinear(WideLinear):
    """A neuron before a Linear; with R4, the online Hadamard transform before the neuron."""

    neuron: Slot
    rotation: OnlineHadamard | None

    @classmethod
    def adopt(cls, linear: nn.Linear, *, rotated: bool = False) -> Self:
        """Take over weight and bias; `rotated` says that the weight expects transformed input."""
        module = super().adopt(linear)
        module.neuron = Slot()
        weight = linear.weight
        module.rotation = OnlineHadamard(linear.in_features, dtype=wide(weight.dtype), device=weight.device) if rotated else None
        return module

    def transform(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch I"]:
        """R4, if it is there."""
        return x if self.rotation is None else self.rotation(x)

    def forward(self, input: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """The Linear of the neuron's values of x, rotated first where R4 acts."""
        return super().forward(transformed(input, self.rotation, self.neuron))
