"""Weights of decoder Linears as integers: w ~ s n, n of 8 or 4 bits, a scale s an output or a group of its inputs.

    nearest   n = round(w / s), s = max |w| / (2^(bits-1) - 1) of the output or group
    gptq      column by column, each column's rounding error e_j = (w_j - s n_j) / U_jj taken out of the columns that are still to be
              rounded, w_k -= e_j U_jk, U the upper Cholesky factor of the inverse of C = sum y y^T + damping. What is minimised is
              tr (W - S N) C (W - S N)^T, the squared error of the Linear's outputs over the inputs y that C is of: here the *coded*
              ones, which the neurons send (`calibration/rounding.py` collects them)

The integers are symmetric, from -(2^(bits-1) - 1): a spike's sign turns the addend, and there is no zero point to subtract. A spike then
adds or subtracts n; s multiplies sums, an output's together with the output weight d_t, which costs nothing.

Exactness. A scale has 16 significant bits, so that s n has 23 at most: exact in float32, which a rounded Linear holds whatever
`model.dtype`: folded and stepped execution meet one and the same weight, and n = w / s without a remainder. In bfloat16 s n would
lose up to a quarter of a step at n = 127.

Left alone: embedding and lm_head, norms, biases. lm_head's input is the one site whose error no later layer averages out.

Sources: GPTQ (Frantar et al., arXiv:2210.17323): Cholesky form, damping 1 %, columns by falling diagonal of C ("act-order") with scales
set beforehand. Scales that clip, chosen on a grid by the error weighted with C's diagonal, are common practice. To nearest equals
torchao's affine primitives with symmetric mapping (a test compares them where it is installed); they are not imported: three lines
against 20 MiB, seconds of import and warnings of kernels that a CPU lacks. Ours: the coded inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int8
from safetensors.torch import load_file
from torch import Tensor, nn

from spikellm.model.modules import wide
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import LINEARS, decoder_layers, head_width
from spikellm.model.stored import Stored
from spikellm.store.artifacts import write_tensors

SCALE_BITS = 16  # significant bits of a scale: with those of an integer 23 at most, float32 has 24
DAMPING = 0.01  # of C's mean diagonal, on its diagonal
BLOCK = 128  # columns whose corrections are carried to the rest in one product
CLIPPING = tuple(1 - 0.05 * step for step in range(11))  # of the largest |w|: 1, 0.95 .. 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerWeight:
    """A Linear's weight: integers and their scales."""

    integers: Int8[Tensor, "O I"]
    scales: Float[Tensor, "O G"]  # of G equal groups of columns; float32

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """What the integers stand for, exactly."""
        return (self.integers.unflatten(1, (self.scales.shape[1], -1)) * self.scales[..., None]).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Which integers a network's Linears hold, as a value."""

    bits: int
    group_size: int | None
    file: Path | None = None  # of integers that were found before (`save_integers`); None: to nearest

    @property
    def calibrated(self) -> bool:
        """Whether the network was calibrated with these weights, its prefix computed by them."""
        return self.file is None

    def apply_to(self, layer: nn.Module, path: str) -> None:
        """Put those of the decoder layer at a path of the model in, in place."""
        if self.file is None:
            round_layer(layer, bits=self.bits, group_size=self.group_size)
            return
        for name, found in integers_of(Stored.of([self.file]).below(path)).items():
            put(layer.get_submodule(name), found)


def check_groups(config: Any, group_size: int | None) -> None:
    """Refuse groups that do not divide the inputs of every Linear that is rounded.

    Args:
        config: transformers' configuration of the model.
        group_size: inputs in a group; None: all.

    Raises:
        ValueError: naming the inputs, and what divides them.
    """
    widths = {
        "hidden_size": config.hidden_size,
        "heads x head width": config.num_attention_heads * head_width(config),
        "intermediate_size": config.intermediate_size,
    }
    for name, width in widths.items():
        if group_size is not None and width % group_size:
            raise ValueError(f"does not divide {name}={width}, inputs of Linears; take a divisor of {gcd(*widths.values())}, or null")


def largest(bits: int) -> int:
    """The largest integer of a symmetric format."""
    return 2 ** (bits - 1) - 1


def round_to_nearest(weight: Float[Tensor, "O I"], *, bits: int, group_size: int | None) -> IntegerWeight:
    """Every weight to the nearest multiple of its group's scale."""
    scales = _short(_peaks(weight, group_size) / largest(bits))
    return IntegerWeight(integers=_rounded(weight.double(), _by_column(scales, weight), bits), scales=scales)


def round_compensating(weight: Float[Tensor, "O I"], moment: Float[Tensor, "I I"], *, bits: int, group_size: int | None) -> IntegerWeight:
    """GPTQ: later columns make up for what rounding the earlier ones did to the outputs over the inputs of `moment`.

    Args:
        moment: C = sum y y^T of the Linear's inputs, up to a factor.
    """
    moment = moment.double()
    scales = clipping_scales(weight, moment.diagonal(), bits=bits, group_size=group_size)
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order])
    rest, wanted = weight.double()[:, order], _by_column(scales, weight)[:, order]
    integers = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, rest.shape[1], BLOCK):
        end = min(start + BLOCK, rest.shape[1])
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            integers[:, column] = _rounded(rest[:, column], wanted[:, column], bits)
            error = (rest[:, column] - wanted[:, column] * integers[:, column]) / factor[column, column]
            rest[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return IntegerWeight(integers=integers[:, order.argsort()].contiguous(), scales=scales)


def relative_error(weight: Float[Tensor, "O I"], found: IntegerWeight, moment: Float[Tensor, "I I"]) -> float:
    """Squared error of the Linear's outputs over the inputs of `moment`, relative to their square without the bias."""
    whole, moment = weight.double(), moment.double()
    rest = whole - found.weight.double()
    return float(((rest @ moment) * rest).sum() / ((whole @ moment) * whole).sum())


def clipping_scales(
    weight: Float[Tensor, "O I"], importance: Float[Tensor, " I"], *, bits: int, group_size: int | None
) -> Float[Tensor, "O G"]:
    """Of `CLIPPING` the scale of least squared error, weighted by `importance`, for every group."""
    peaks = _peaks(weight, group_size)
    groups = peaks.shape[1]
    grouped, share = weight.float().unflatten(1, (groups, -1)), importance.float().unflatten(0, (groups, -1))
    best, least = peaks, torch.full_like(peaks, torch.inf)
    for factor in CLIPPING:
        scales = _short(factor * peaks / largest(bits))
        found = _rounded(grouped, scales[..., None], bits) * scales[..., None]
        error = ((grouped - found).square() * share).sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _inverse_factor(moment: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """U, upper triangular, U^T U = (C + damping)^-1."""
    diagonal = moment.diagonal()
    level = (DAMPING * diagonal.mean()).clamp(min=torch.finfo(moment.dtype).tiny)
    damped = moment + level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _peaks(weight: Float[Tensor, "O I"], group_size: int | None) -> Float[Tensor, "O G"]:
    """max |w| of each group, float32; of a group of zeros 1, whose scale then is as good as any."""
    found = weight.float().unflatten(1, (-1, group_size or weight.shape[1])).abs().amax(-1)
    return torch.where(found > 0, found, 1.0)


def _by_column(scales: Float[Tensor, "O G"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """The scale of every weight, float64."""
    return scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], 1)


def _rounded(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (weight / scales).round().clamp(-largest(bits), largest(bits)).to(torch.int8)


def _short(scales: Float[Tensor, "O G"]) -> Float[Tensor, "O G"]:
    """Rounded to SCALE_BITS significant bits."""
    fraction, exponent = torch.frexp(scales)
    return torch.ldexp((fraction * 2**SCALE_BITS).round(), exponent - SCALE_BITS)


def put(linear: Any, found: IntegerWeight) -> None:
    """Give a Linear the weight that the integers stand for, float32 at least, in the place of its own."""
    weight = linear.weight
    linear.weight = nn.Parameter(found.weight.to(weight.device, wide(weight.dtype)), requires_grad=False)


@torch.no_grad()
def round_model(model: PreTrainedModel, *, bits: int, group_size: int | None) -> None:
    """Round every Linear of the decoder layers to nearest, in place.

    Raises:
        ValueError: groups that do not divide the inputs of a Linear.
    """
    check_groups(model.config, group_size)
    for layer in decoder_layers(model):
        round_layer(layer, bits=bits, group_size=group_size)


@torch.no_grad()
def round_layer(layer: nn.Module, *, bits: int, group_size: int | None) -> None:
    """Round the Linears of one decoder layer to nearest, in place; groups must divide their inputs."""
    for name in LINEARS:
        linear: Any = layer.get_submodule(name)
        put(linear, round_to_nearest(linear.weight, bits=bits, group_size=group_size))


def save_integers(path: Path, found: Mapping[str, IntegerWeight]) -> None:
    """Write integers (a byte each, of 4 bits too) and scales, by path of the Linear."""
    tensors = {f"{name}.integers": each.integers.cpu() for name, each in found.items()}
    write_tensors(path, tensors | {f"{name}.scales": each.scales.cpu() for name, each in found.items()})


def load_integers(path: Path) -> dict[str, IntegerWeight]:
    """What `save_integers` wrote."""
    return integers_of(load_file(path))


def integers_of(tensors: Mapping[str, Tensor]) -> dict[str, IntegerWeight]:
    """Integers and scales by path of the Linear, from tensors by their names in a file."""
    names = [key.removesuffix(".integers") for key in tensors if key.endswith(".integers")]
    return {name: IntegerWeight(integers=tensors[f"{name}.integers"], scales=tensors[f"{name}.scales"]) for name in names}
