"""Drop-in replacements for modules of a decoder layer, each with a slot for a neuron.

A slot holds `nn.Identity` (the ANN), an observer (calibration) or a `PhaseNeuron` (the SNN). Parameters keep their names,
so that a state dict fits before and after. Source of the norm: Zhang & Sennrich 2019, as transformers computes it.
"""

from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikellm.hadamard import hadamard_factors, hadamard_transform


class SpikingRMSNorm(nn.Module):
    """RMSNorm, then a neuron: x [.., D]."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.neuron: nn.Module = nn.Identity()

    @classmethod
    def adopt(cls, norm: nn.Module) -> Self:
        """Take over the weight of a transformers RMSNorm."""
        return cls(norm.weight, norm.variance_epsilon)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.neuron(self.weight * scaled.to(x.dtype))


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

    @classmethod
    def adopt(cls, linear: nn.Linear, *, hadamard: bool) -> Self:
        """Take over weight and bias; `hadamard` says that the weight expects transformed input."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.neuron = nn.Identity()
        factors = (None, None)
        if hadamard:
            factors = hadamard_factors(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
        # not in the state dict: the width determines them
        module.register_buffer("hadamard_left", factors[0], persistent=False)
        module.register_buffer("hadamard_right", factors[1], persistent=False)
        return module

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        if self.hadamard_left is not None:
            x = hadamard_transform(x, (self.hadamard_left, self.hadamard_right))
        return super().forward(self.neuron(x))
