"""Drop-in replacements for modules of a decoder layer, each with a slot for a neuron.

A slot holds `nn.Identity` (the ANN), an observer (calibration) or a `PhaseNeuron` (the SNN). Parameters keep their names,
so that a state dict fits before and after. Source of the norm: Zhang & Sennrich 2019, as transformers computes it.
"""

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikellm.hadamard import hadamard_factors, hadamard_transform, split


class SpikingRMSNorm(nn.Module):
    """RMSNorm, then a neuron: x [.., D]."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.neuron: nn.Module = nn.Identity()

    @classmethod
    def adopt(cls, norm: Any) -> Self:
        """Take over the weight of a transformers RMSNorm."""
        return cls(norm.weight, norm.variance_epsilon)

    def normalise(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """weight * x / rms(x), the division in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.neuron(self.normalise(x))


class SpikingActivation(nn.Module):
    """Activation function (SiLU), then a neuron."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.neuron: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.function(x))


class SpikingLinear(nn.Linear):
    """A neuron before a Linear; with R4, the online Hadamard transform before the neuron."""

    neuron: nn.Module
    hadamard_left: Tensor | None
    hadamard_right: Tensor | None

    @classmethod
    def adopt(cls, linear: nn.Linear, *, hadamard: bool) -> Self:
        """Take over weight and bias; `hadamard` says that the weight expects transformed input."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.neuron = nn.Identity()
        weight = linear.weight
        sizes = split(linear.in_features) if hadamard else ()
        for name, size in zip(("hadamard_left", "hadamard_right"), sizes or (None, None), strict=True):
            factor = None if size is None else torch.empty(size, size, dtype=weight.dtype, device=weight.device)
            module.register_buffer(name, factor, persistent=False)  # the width determines it
        module.reset_rotation()
        return module

    def reset_rotation(self) -> None:
        """Fill R4's factors (again: they are not in checkpoints)."""
        if self.hadamard_left is not None and self.hadamard_right is not None and not self.hadamard_left.is_meta:
            left, right = hadamard_factors(self.in_features, dtype=torch.float64)
            self.hadamard_left.copy_(left)
            self.hadamard_right.copy_(right)

    def transform(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch I"]:
        """R4, if it is there."""
        if self.hadamard_left is None or self.hadamard_right is None:
            return x
        return hadamard_transform(x, (self.hadamard_left, self.hadamard_right))

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        return super().forward(self.neuron(self.transform(x)))
