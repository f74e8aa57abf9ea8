"""The neuron as something to descend on: its value is that of `encode` to the last bit, its derivatives are those of blurred decisions.

The output is piecewise constant in the input, thresholds, resets and initial potential: what depends on them is where it jumps. Going
backwards, each decision v > theta_t is taken to be blurred over a triangle of half-width w around its threshold, a kernel k. To first
order, with J_t the jump, by how much the output changes when the decision falls the other way and all later steps are run again:

    dy/dtheta_t = -k(v - theta_t) J_t        dy/dh_t = -z_t sum_s>t k(v - theta_s) J_s        dy/dv0 = sum_t k(v - theta_t) J_t

and dy/dd_t = z_t, which is exact, the output being linear in d. A cut is a decision as well: its J is the difference of the outputs of
the two populations beside it. As w goes to zero a mean over inputs has exactly these derivatives; at a finite width the loss's own slope
is averaged over both sides of the jump, which is what makes a squared error's vanish where the two levels are equally far.

For x the straight line through the staircase stands in (Bengio et al., arXiv:1308.3432): dy/dx = 1 up to the largest value that the
population can send and 0 beyond it. The parameters of the blocks before need no more, and the sum of the kernels has more noise.

Forward and backward are one fused pass each, the steps stay in registers: nothing of T times the activation's size is ever stored. Ours;
the published search uses a sigmoid's slope step by step (`search/gradient.py`), whose jump is d_t, as if no later step made up for it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikellm.coding.neuron import BEYOND, PhaseNeuron, PhaseTable, Slot, encode, grouped, token_amplitude
from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import Digits, Rows, emit, own, owners, respond

WIDTH = 0.5  # w in units of a row's smallest threshold: kernels of neighbouring levels touch


def widths(theta: Float[Tensor, "R T"]) -> Float[Tensor, " R"]:
    """Half-widths w of the kernels, row by row [units of x]; 1 for a row that is not used."""
    smallest = torch.where(theta > 0, theta, torch.inf).amin(-1)
    return WIDTH * torch.where(smallest.isinf(), 1.0, smallest)


def largest(d: Float[Tensor, "R T"], digits: Digits) -> Float[Tensor, " R"]:
    """What each row can send at most [units of x]."""
    k = d.shape[-1] if digits.max_spikes is None else min(digits.max_spikes, d.shape[-1])
    return d.clamp_min(0).topk(k, -1).values.sum(-1)


def gradients_plain(
    upstream: Tensor, x: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None, width: Tensor, top: Tensor
) -> tuple[Tensor, Rows, Tensor | None]:
    """Derivatives for x [A, C, I], the rows of P C, and the cuts, from the output's; arguments as in `encode_plain`."""
    T = rows.theta.shape[1]
    magnitude = x.abs().to(rows.theta.dtype)
    owner = owners(x, magnitude, None if cuts is None else cuts[..., None], digits)
    theta, h, d = ([own(part[:, t, None], owner, digits) for t in range(T)] for part in rows[:3])
    w = own(width[:, None], owner, digits)
    slope = upstream * x.sign().to(upstream.dtype)

    v, fired, y = magnitude + own(rows.v0[:, None], owner, digits), torch.zeros_like(magnitude), torch.zeros_like(magnitude)
    before, digit = [], []
    for t in range(T):
        before.append((v, fired, y))
        z, fired = emit(v, theta[t], fired, digits)
        digit.append(z)
        v, y = v - h[t] * z, y + d[t] * z

    moved, pushed = [], []  # what a threshold's rise, and what a higher potential does
    for t, (v, fired, sent) in enumerate(before):
        side = v.sign() if digits.signed else torch.ones_like(v)
        kernel = (1 - (v * side - theta[t]).abs() / w).clamp_min(0) / w
        if digits.max_spikes is not None:
            kernel = kernel * (fired < digits.max_spikes).to(v.dtype)
        spiking = digit[t].abs()
        other = side * (1 - spiking)
        count = fired + (1 - spiking)
        v, sent = v - h[t] * other, sent + d[t] * other
        for s in range(t + 1, T):
            z, count = emit(v, theta[s], count, digits)
            v, sent = v - h[s] * z, sent + d[s] * z
        jump = slope * kernel * (sent - y) * (1 - 2 * spiking)
        moved.append(-jump)
        pushed.append(side * jump)

    later = torch.zeros_like(magnitude)
    reset: list[Tensor] = []
    for t in reversed(range(T)):
        reset.insert(0, -digit[t] * later)
        later = later + pushed[t]

    found = Rows(
        torch.stack([_total(part, owner, digits) for part in moved], -1),
        torch.stack([_total(part, owner, digits) for part in reset], -1),
        torch.stack([_total(slope * z, owner, digits) for z in digit], -1),
        _total(later, owner, digits),
    )
    through = upstream * (magnitude <= own(top[:, None], owner, digits))
    return through.to(x.dtype), found, _cut_gradients(slope, x, magnitude, rows, digits, cuts, width)


def _total(value: Tensor, owner: Tensor | None, digits: Digits) -> Tensor:
    """The sum over the inputs of each row [P C]."""
    each = [value if owner is None else value * (owner == p) for p in range(digits.populations)]
    return torch.cat([part.sum((0, 2)) for part in each])


def _cut_gradients(
    slope: Tensor, x: Tensor, magnitude: Tensor, rows: Rows, digits: Digits, cuts: Tensor | None, width: Tensor
) -> Tensor | None:
    """Of the cuts [K-1, sides C]: the outputs of the populations on both sides of each, compared where inputs are near."""
    if cuts is None:
        return None
    side = (x < 0).to(magnitude.dtype)
    owners_beside = [k + 0 * side if digits.sides == 1 else 2 * k + side for k in range(digits.intervals)]
    values = [respond(magnitude, rows, digits, owner)[0] for owner in owners_beside]
    found = []
    for k, ends in enumerate(cuts.unflatten(1, (digits.sides, -1))):
        each = []
        for s in range(digits.sides):
            w = width.unflatten(0, (digits.populations, -1))[digits.sides * k + s, :, None]
            kernel = (1 - (magnitude - ends[s, :, None]).abs() / w).clamp_min(0) / w
            jump = slope * kernel * (values[k] - values[k + 1])
            each.append((jump if digits.sides == 1 else jump * (side == s)).sum((0, 2)))
        found.append(torch.cat(each))
    return torch.stack(found)


class _Encode(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, theta: Tensor, h: Tensor, d: Tensor, v0: Tensor, cuts: Tensor | None, digits: Digits, compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, theta, h, d, v0, cuts)
        ctx.digits, ctx.compiled = digits, compiled
        return encode(x, PhaseTable(theta, h, d, v0, digits=digits, cuts=cuts, checked=True), compiled=compiled)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, h, d, v0, cuts = ctx.saved_tensors
        kernel = chosen(gradients_plain, x, compiled=ctx.compiled)
        through, rows, ends = kernel(
            upstream[0].contiguous(), x, Rows(theta, h, d, v0), ctx.digits, cuts, widths(theta), largest(d, ctx.digits)
        )
        return through, *rows, ends, None, None


def differentiable_encode(x: Float[Tensor, "A C I"], table: PhaseTable, *, compiled: bool = True) -> Float[Tensor, "A C I"]:
    """`coding.neuron.encode` with derivatives for x, the table's rows and its cuts."""
    return _Encode.apply(x, *table.rows, table.cuts, table.digits, compiled)


class TunableNeuron(Slot):
    """Neurons of one site whose table can be learnt, from that of a `PhaseNeuron`.

    The parameters are changes in units of the row's smallest threshold, the code's finest step, so that one learning rate fits any unit of
    activations and any T: of theta, h, d, v0, the cuts, and of the largest threshold where the whole row is scaled (tau). All start at 0;
    thresholds and weights are multiplied by exp(change / value), to keep their sign.
    """

    def __init__(self, neuron: PhaseNeuron) -> None:
        super().__init__()
        table = neuron.table
        self.start, self.axis, self.per_token, self.compiled = table, neuron.axis, neuron.per_token, neuron.compiled
        R, T = table.theta.shape
        self.unit = widths(table.theta) / WIDTH
        zeros = table.theta.new_zeros
        self.tau, self.v0 = nn.Parameter(zeros(R)), nn.Parameter(zeros(R))
        self.theta, self.h, self.d = (nn.Parameter(zeros(R, T)) for _ in range(3))
        self.cuts = None if table.cuts is None else nn.Parameter(torch.zeros_like(table.cuts))

    @property
    def table(self) -> PhaseTable:
        """What the parameters spell; valid whatever they are: cuts that overtake others are taken along."""
        start, unit = self.start, self.unit[:, None]
        scale = _factor(self.tau[:, None], start.theta.amax(-1, keepdim=True), unit)
        theta, h, d = (
            part * (scale * _factor(change, part, unit)) for part, change in zip(start.rows[:3], (self.theta, self.h, self.d), strict=True)
        )
        v0 = scale[:, 0] * (start.v0 + self.v0 * self.unit)
        cuts = start.cuts
        if cuts is not None and self.cuts is not None:
            below = self.unit[: cuts.numel()].view_as(cuts)  # of the interval that ends there
            cuts = torch.where(cuts < BEYOND, cuts * _factor(self.cuts, cuts, below), cuts).cummax(0).values
        return PhaseTable(theta, h, d, v0, digits=start.digits, cuts=cuts, checked=True)

    def forward(self, x: Tensor) -> Tensor:
        """Decoded values of the spikes that x [..] causes, same shape."""
        table = self.table
        m = token_amplitude(x) if self.per_token else None
        coded = grouped(x if m is None else x / m, table.groups, self.axis)
        y = differentiable_encode(coded, table, compiled=self.compiled).reshape(x.shape)
        return y if m is None else m * y


def _factor(change: Tensor, value: Tensor, unit: Tensor) -> Tensor:
    """What multiplies a value to change it by so many units, to first order; no value changes faster than by its own size."""
    return (change * (unit / value.abs().clamp_min(1e-30)).clamp_max(1)).exp()
