"""Time-stepped operators: what a network of spikes computes step by step, with the folded result as its sum over time.

A layer integrates its input over T steps, then fires for T steps. Between two neurons flow currents x_t, t = 0 .. T-1, whose
sum over t is the value X that folded execution computes at once:

    Linear           d_t (W s_t), the bias once: the spikes s_t in {-1, 0, +1} meet the weights, the output weight d_t comes after
    function f       f(X) once, when X has been integrated: norms, SiLU, softmax, quotients
    product x y^T    d_t (x_t Y_t^T) + (X_t-1 y_t^T) d'_t, both firing in the same steps: X_t, Y_t accumulate weighted spikes, and
                     every addend has the spikes of one side before it, so an adder adds or leaves out a row of the other side
    product x V      d_t (x_t V), where V has been accumulated in earlier steps

A neuron of P populations (`kernels.encode.Digits`) has P wires, which fire in the same T steps and whose weights differ: x_t is then
sum_p d_p,t s_p,t, and each of the products above a sum of P with spikes on one side. Trains come as S = T P wires, step by step and in
each step population by population (`PhaseTable.wires`); currents are of T steps whatever P was.

Sources: spike products by cumulative sums as in SpikeZIP-TF (You et al., ICML 2024) and LAS (Chen et al. 2025). Their neurons fire
while they integrate, so that a nonlinear function has to be updated at every step, f(X_t) - f(X_t-1); here a code fires after
integrating: the operand V is complete, and of the differences only their sum f(X) would reach a neuron.

These are the plain forms, which specify what `events.py` computes on a CPU.

Time comes first in every shape; iterators keep memory at one step where the consumer only adds up.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Float, Int8
from torch import Tensor

# Below this many input channels a product of its own costs more than a weight of its own.
NARROW = 16


def integrate(currents: Iterable[Tensor]) -> Tensor:
    """The sum over time."""
    steps = iter(currents)
    total = next(steps).clone()
    for current in steps:
        total += current
    return total


def at_last_step(value: Float[Tensor, "*shape"], T: int) -> Float[Tensor, " T *shape"]:
    """Currents of something that is known when T steps are over: nothing before the last."""
    currents = value.new_zeros(T, *value.shape)
    currents[-1] = value
    return currents


def step_weights(wires: Float[Tensor, "C S"], size: int) -> Float[Tensor, "S size"]:
    """The output weights of every wire, spread over an axis that C groups of equal, consecutive slices divide."""
    return wires.T.repeat_interleave(size // wires.shape[0], dim=1)


def weighted(spikes: Int8[Tensor, " S *shape"], weights: Float[Tensor, "S *#shape"]) -> Iterator[Float[Tensor, "*shape"]]:
    """The currents d s of spikes that meet no other weight, wire by wire."""
    return (step * weight for step, weight in zip(spikes, weights, strict=True))


def chunks(T: int, chunk: int | None) -> Iterator[slice]:
    """The time steps in slices of at most `chunk`; None: all at once."""
    size = min(chunk or T, T)
    return (slice(start, min(start + size, T)) for start in range(0, T, size))


def spike_linear(
    spikes: Int8[Tensor, "S *rows I"],
    weight: Float[Tensor, "O I"],
    wires: Float[Tensor, "C S"],
    *,
    populations: int = 1,
    scale: Float[Tensor, "*rows 1"] | None = None,
    bias: Float[Tensor, " O"] | None = None,
    chunk: int | None = None,
) -> Iterator[Float[Tensor, "t *rows O"]]:
    """sum_p d_p,t (W s_p,t) of consecutive steps, `chunk` steps of a population a product; the bias comes with the first step.

    Tables of channel groups take one product a group: the spikes stay spikes. Groups too narrow for that (fewer than
    `NARROW` channels) have d multiplied into the weight instead, and the populations' channels lie side by side. scale: a factor on the
    d of each row.

    Yields:
        currents of the next t steps, float32 (float64 for float64 weights); the sum over all steps is the folded output.
    """
    groups, width = wires.shape[0], spikes.shape[-1]
    size = width // groups
    trains, d = spikes.unflatten(0, (-1, populations)), wires.unflatten(1, (-1, populations))
    for steps in chunks(len(trains), chunk):
        part = trains[steps].flatten(2, -2)
        if groups > 1 and size < NARROW:
            scaled = step_weights(wires, width).unflatten(0, (-1, populations))[steps]
            currents = torch.stack(
                [
                    spike_product(x.movedim(0, 1).flatten(1), (weight.to(d.dtype)[:, None] * row).flatten(1))
                    for x, row in zip(part, scaled, strict=True)
                ]
            )
        else:
            currents = None
            for group in range(groups):
                channels = slice(group * size, (group + 1) * size)
                for p in range(populations):
                    product = spike_product(part[:, p, :, channels].flatten(0, 1), weight[:, channels]).unflatten(0, (len(part), -1))
                    own = d[group, steps, p, None, None].to(product.dtype)
                    currents = product.mul_(own) if currents is None else currents.addcmul_(product, own)
        assert currents is not None
        if scale is not None:
            currents.mul_(scale.reshape(-1, 1))
        if bias is not None and steps.start == 0:
            currents[0] += bias
        yield currents.view(len(part), *spikes.shape[1:-1], len(weight))


def spike_product(spikes: Int8[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "N O"]:
    """Spikes x weights, summed and returned in float32 at least.

    -1, 0 and +1 are exact in bfloat16 and float16: on CUDA a half-precision weight is multiplied as it is, with float32
    accumulation; elsewhere it is widened first.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_cuda and weight.dtype != wide:
        return torch.mm(spikes.to(weight.dtype), weight.T, out_dtype=wide)
    return torch.mm(spikes.to(wide), weight.to(wide).T)


def spike_pairs(
    x: Int8[Tensor, "X *batch M E"],
    y: Int8[Tensor, "Y *batch N E"],
    x_weights: Float[Tensor, "X *#batch #M 1"],
    y_weights: Float[Tensor, "Y *#batch #N 1"],
    *,
    populations: tuple[int, int] = (1, 1),
) -> Iterator[Float[Tensor, "*batch M N"]]:
    """X_t Y_t^T - X_t-1 Y_t-1^T of two neurons that fire in the same steps, each on its own number of wires; the weights are their d."""
    x_sum = y_sum = None
    for xs, ys in zip(_steps(x, x_weights, populations[0]), _steps(y, y_weights, populations[1]), strict=True):
        for y_t, y_weight in ys:
            y_sum = y_t * y_weight if y_sum is None else torch.addcmul(y_sum, y_t, y_weight)
        assert y_sum is not None
        current = _mixed(xs, y_sum.mT)
        if x_sum is not None:
            for y_t, y_weight in ys:
                current.addcmul_(x_sum @ y_t.mT, y_weight.mT)
        for x_t, x_weight in xs:
            x_sum = x_t * x_weight if x_sum is None else torch.addcmul(x_sum, x_t, x_weight)
        yield current


def spike_mixture(
    x: Int8[Tensor, "S *batch M N"],
    values: Float[Tensor, "*batch N E"],
    x_weights: Float[Tensor, "S *#batch #M 1"],
    *,
    populations: int = 1,
) -> Iterator[Float[Tensor, "*batch M E"]]:
    """sum_p d_p,t (x_p,t V) for every step; V is complete."""
    return (_mixed(step, values) for step in _steps(x, x_weights, populations))


def _steps(train: Tensor, weights: Tensor, populations: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The wires of every step, each with its weight and in its dtype."""
    wires = ((wire.to(weight.dtype), weight) for wire, weight in zip(train, weights, strict=True))
    while step := list(islice(wires, populations)):
        yield step


def _mixed(step: list[tuple[Tensor, Tensor]], values: Tensor) -> Tensor:
    """sum_p d_p (x_p V) of the wires of one step."""
    (first, first_weight), *others = step
    current = (first @ values).mul_(first_weight)
    for wire, weight in others:
        current.addcmul_(wire @ values, weight)
    return current
