"""Time-stepped operators: what a network of spikes computes step by step, with the folded result as its sum over time.

A layer integrates its input over T steps, then fires for T steps. Between two neurons flow currents x_t, t = 0 .. T-1, whose
sum over t is the value X that folded execution computes at once:

    Linear           d_t (W s_t), the bias once: the spikes s_t in {-1, 0, +1} meet the weights, the output weight d_t comes after
    function f       f(X) once, when X has been integrated: norms, SiLU, softmax, quotients
    product x y^T    d_t (x_t Y_t^T) + (X_t-1 y_t^T) d'_t, both firing in the same steps: X_t, Y_t accumulate weighted spikes, and
                     every addend has the spikes of one side before it, so an adder adds or leaves out a row of the other side
    product x V      d_t (x_t V), where V has been accumulated in earlier steps

Sources: spike products by cumulative sums as in SpikeZIP-TF (You et al., ICML 2024) and LAS (Chen et al. 2025). Their neurons fire
while they integrate, so that a nonlinear function has to be updated at every step, f(X_t) - f(X_t-1); here a code fires after
integrating: the operand V is complete, and of the differences only their sum f(X) would reach a neuron.

Time comes first in every shape; iterators keep memory at one step where the consumer only adds up.
"""

from collections.abc import Iterable, Iterator

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


def step_weights(d: Float[Tensor, "C T"], size: int) -> Float[Tensor, "T size"]:
    """The output weights of every step, spread over an axis that C groups of equal, consecutive slices divide."""
    return d.T.repeat_interleave(size // d.shape[0], dim=1)


def weighted(spikes: Int8[Tensor, " T *shape"], weights: Float[Tensor, "T *#shape"]) -> Iterator[Float[Tensor, "*shape"]]:
    """The currents d_t s_t of spikes that meet no other weight."""
    return (step * weight for step, weight in zip(spikes, weights, strict=True))


def chunks(T: int, chunk: int | None) -> Iterator[slice]:
    """The time steps in slices of at most `chunk`; None: all at once."""
    size = min(chunk or T, T)
    return (slice(start, min(start + size, T)) for start in range(0, T, size))


def spike_linear(
    spikes: Int8[Tensor, "T *rows I"],
    weight: Float[Tensor, "O I"],
    d: Float[Tensor, "C T"],
    *,
    bias: Float[Tensor, " O"] | None = None,
    chunk: int | None = None,
) -> Iterator[Float[Tensor, "t *rows O"]]:
    """d_t (W s_t) of consecutive steps, `chunk` steps a product; the bias comes with the first step.

    Tables of channel groups take one product a group: the spikes stay spikes. Groups too narrow for that (fewer than
    `NARROW` channels) have d_t multiplied into the weight instead.

    Yields:
        currents of the next t steps, float32 (float64 for float64 weights); the sum over all steps is the folded output.
    """
    T, width = len(spikes), spikes.shape[-1]
    groups = d.shape[0]
    size = width // groups
    for steps in chunks(T, chunk):
        part = spikes[steps].flatten(0, -2)
        shape = (steps.stop - steps.start, -1, len(weight))
        if groups > 1 and size < NARROW:
            scaled = [weight.to(d.dtype) * row for row in step_weights(d, width)[steps]]
            currents = torch.cat([spike_product(x, w) for x, w in zip(part.chunk(shape[0]), scaled, strict=True)]).view(shape)
        else:
            currents = None
            for group in range(groups):
                channels = slice(group * size, (group + 1) * size)
                product = spike_product(part[:, channels], weight[:, channels]).view(shape)
                scale = d[group, steps, None, None].to(product.dtype)
                currents = product.mul_(scale) if currents is None else currents.addcmul_(product, scale)
        assert currents is not None
        if bias is not None and steps.start == 0:
            currents[0] += bias
        yield currents.view(shape[0], *spikes.shape[1:-1], len(weight))


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
    x: Int8[Tensor, "T *batch M E"],
    y: Int8[Tensor, "T *batch N E"],
    x_weights: Float[Tensor, "T *#batch #M 1"],
    y_weights: Float[Tensor, "T *#batch #N 1"],
) -> Iterator[Float[Tensor, "*batch M N"]]:
    """X_t Y_t^T - X_t-1 Y_t-1^T of two trains that fire in the same steps; the weights are their d_t."""
    dtype = x_weights.dtype
    x_sum = y_sum = None
    for x_spikes, y_spikes, x_weight, y_weight in zip(x, y, x_weights, y_weights, strict=True):
        x_t, y_t = x_spikes.to(dtype), y_spikes.to(dtype)
        y_sum = y_t * y_weight if y_sum is None else torch.addcmul(y_sum, y_t, y_weight)
        current = (x_t @ y_sum.mT).mul_(x_weight)
        if x_sum is not None:
            current.addcmul_(x_sum @ y_t.mT, y_weight.mT)
        x_sum = x_t * x_weight if x_sum is None else torch.addcmul(x_sum, x_t, x_weight)
        yield current


def spike_mixture(
    x: Int8[Tensor, "T *batch M N"], values: Float[Tensor, "*batch N E"], x_weights: Float[Tensor, "T *#batch #M 1"]
) -> Iterator[Float[Tensor, "*batch M E"]]:
    """d_t (x_t V) for every step; V is complete."""
    for spikes, weight in zip(x, x_weights, strict=True):
        yield (spikes.to(values.dtype) @ values).mul_(weight)
