"""Weights of decoder Linears that others have taken the place of, and what may change a network's weights at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from spikellm.model.integers import Rounding
from spikellm.model.stored import Stored
from spikellm.store.artifacts import write_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedWeights:
    """Which weights a network's Linears hold instead of their own, as a value."""

    files: tuple[Path, ...]  # of `save_weights`; of a weight in several the last one counts

    @property
    def calibrated(self) -> bool:
        """Whether the network was calibrated with these weights, its prefix computed by them: they were found later."""
        return False

    def load(self) -> dict[str, Float[Tensor, "O I"]]:
        """The weights by path of the Linear."""
        return {name: weight for file in self.files for name, weight in load_file(file).items()}

    def apply_to(self, layer: nn.Module, path: str) -> None:
        """Put those of the decoder layer at a path of the model in, in place."""
        replace_weights(layer, Stored.of(self.files).below(path))


WeightChange = Rounding | ReplacedWeights


def replace_weights(model: nn.Module, weights: Mapping[str, Float[Tensor, "O I"]]) -> None:
    """Give Linears below a module other weights, by path, in place."""
    for path, weight in weights.items():
        linear: Any = model.get_submodule(path)
        linear.weight = nn.Parameter(weight.to(linear.weight.device), requires_grad=False)


def save_weights(path: Path, weights: Mapping[str, Float[Tensor, "O I"]]) -> None:
    """Write weights by path of the Linear."""
    write_tensors(path, {name: weight.cpu().contiguous() for name, weight in weights.items()})
