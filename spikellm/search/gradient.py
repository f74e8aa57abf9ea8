"""The published search: grain assignments as a differentiable mixture, bases by surrogate gradients.

Problem, for each neuron group with samples x of |x| / tau, over logits alpha_a of the assignments a and bases B_a, H_a, Theta_a:

    minimise    mean (sum_a w_a y_a - x)^2  +  10 sum_a w_a mean (y_a - x)^2        w = softmax(alpha)

y_a is the neuron's output (`coding/neuron.py`) with the table that a and its own bases spell (`coding/grains.py`). A spike has
no derivative; going backwards, that of sigmoid(beta (v - theta)) stands in for it. Adam steps alternate, per outer round: `inner`
steps of (H, Theta), `inner` of B, one of alpha.

Source: Zheng et al., ICLR 2026, and the settings of the authors' code (njzhenghy/SpikingLLM): 20 x (50 + 50 + 1) steps at a rate of
1e-3 (alpha: 1e-2) from base 2 on 100,000 activations of a site, beta = 10, the factor 10. tau is the largest activation and stays.

Ours: all groups of a batch take their steps together (Adam acts number by number, so that each goes its own way); samples come from
the histogram, drawn with the importance of `search.py`; v0 is there while searching as it is afterwards; what is returned
is a copy of the best bases met on the way, base 2 among them, of the assignment with the largest logit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.calibration.statistics import FIT, SiteStatistics
from spikellm.coding.codes import Codes
from spikellm.coding.grains import assignments, default_v0, phase_amplitudes
from spikellm.config.snn import SearchConfig
from spikellm.kernels.encode import Rows
from spikellm.search.options import Options

BETA = 10.0  # slope of the surrogate [1 / tau]
EACH = 10.0  # weight of the assignments' own errors beside the mixture's
LOGIT_RATE = 10.0  # learning rate of the logits, in units of the bases'
FIRST_LOGIT_SPREAD = 0.001  # ties between assignments are broken at random
# Elements of [groups, assignments, samples] in one batch: some forty buffers of this size live until the backward pass.
BATCH = {"cpu": 2**20, "cuda": 2**24}


class SurrogateSpike(torch.autograd.Function):
    """1 where u > 0, else 0; its derivative is taken to be beta s (1 - s) with s = sigmoid(beta u)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, beta: float) -> Tensor:
        """The step, 0 or 1."""
        ctx.save_for_backward(u)
        ctx.beta = beta
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """The surrogate's derivative for u; none for beta."""
        (u,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.beta * u)
        return upstream[0] * (ctx.beta * s * (1 - s)), None


def differentiable_encode(x: Float[Tensor, "N 1 S"], rows: Rows) -> Float[Tensor, "N A S"]:
    """Output of A neurons with rows [N, A, T] for inputs x >= 0, with a gradient with respect to every row."""
    theta, h, d, v0 = rows
    v = x + v0[..., None]
    y = torch.zeros_like(v)
    for t in range(theta.shape[-1]):
        z = SurrogateSpike.apply(v - theta[..., t, None], BETA)
        v = v - h[..., t, None] * z
        y = y + d[..., t, None] * z
    return y


def draw_samples(statistics: SiteStatistics, group: int, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """`count` values of |x| from one group's fitting part, by the inverse of its distribution function [units of x].

    Uniform inside a bin. Drawn with the importance where there is one, so that a plain mean over samples is the weighted one of the
    search's objective; zeros are left out, they are coded without error. All 0 for a group without activations.
    """
    mass = (statistics.counts if statistics.weights is None else statistics.weights)[FIT, group].double()
    cumulative = mass.cumsum(0)
    if cumulative[-1] <= 0:
        return torch.zeros(count, device=mass.device)
    # random numbers come from the CPU, so that every device draws the same samples
    uniform = torch.rand(count, generator=generator, dtype=torch.float64).to(mass.device) * cumulative[-1]
    index = torch.searchsorted(cumulative, uniform, right=True).clamp_(max=len(mass) - 1)
    inside = 1 - (cumulative[index] - uniform) / mass[index].clamp_min(1e-300)
    edges = statistics.edges.to(mass.device).double()
    return (edges[index] + edges.diff()[index] * inside.clamp(0, 1)).float()


def descend_grains(
    samples: Float[Tensor, "N S"],
    maximum: Float[Tensor, " N"],
    options: Options,
    *,
    G: int,
    progress: Callable[[int], None] = lambda groups: None,
) -> tuple[Codes, Float[Tensor, " N"]]:
    """The code of exactly G grains that the published search finds for each of N groups, and its relative squared error on the samples.

    Args:
        samples: of |x| [units of x].
        maximum: tau [units of x].
        options: T, min_length, the seed of the first logits, and the schedule: `search.gradient_*`.
        G: grains.
        progress: called after each outer round with the number of groups that it moved.

    Raises:
        ValueError: T phases cannot hold G grains.
    """
    cuts = assignments(options.T, G, min_length=options.min_length).to(samples.device)
    generator = torch.Generator().manual_seed(options.seed)
    logits = FIRST_LOGIT_SPREAD * torch.rand(len(samples), len(cuts), generator=generator).to(samples.device)
    groups = max(1, BATCH.get(samples.device.type, BATCH["cpu"]) // (len(cuts) * samples.shape[1]))
    scaled = samples / maximum[:, None]
    found = []
    with torch.enable_grad():  # callers may be inside no_grad
        for start in range(0, len(samples), groups):
            part = slice(start, start + groups)
            found.append(_descend(scaled[part, None], logits[part], cuts, options.search, progress))
    bases, chosen, error = (torch.cat(parts) for parts in zip(*found, strict=True))
    power = scaled.square().mean(-1)
    first = torch.stack([maximum.log(), torch.ones_like(maximum), torch.zeros_like(maximum)], -1)  # v0 = 1 step: the default rule
    codes = Codes(values=torch.cat([first, bases.log2().flatten(1)], -1), assignment=cuts[chosen])
    return codes, torch.where(power > 0, error / power.clamp_min(1e-30), 0.0)


def _descend(
    x: Float[Tensor, "N 1 S"],
    logits: Float[Tensor, "N A"],
    cuts: Int[Tensor, "A T"],
    schedule: SearchConfig,
    progress: Callable[[int], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Bases [N, 3, G] in the order d, h, theta, index of the assignment [N] and mean squared error [N] of one batch, for tau = 1."""
    (N, A), T, G = logits.shape, cuts.shape[-1], int(cuts.max()) + 1
    one = torch.ones(N, A, device=x.device)
    v0 = default_v0(one, T)
    spell = partial(phase_amplitudes, one, assignment=cuts)
    d, h, theta = (torch.full((N, A, G), 2.0, device=x.device) for _ in range(3))
    alpha = logits.clone()
    optimisers = [
        (torch.optim.Adam([h, theta], lr=schedule.gradient_rate), (h, theta), schedule.gradient_inner),
        (torch.optim.Adam([d], lr=schedule.gradient_rate), (d,), schedule.gradient_inner),
        (torch.optim.Adam([alpha], lr=schedule.gradient_rate * LOGIT_RATE), (alpha,), 1),
    ]
    best = torch.full((N, A), torch.inf, device=x.device)
    best_bases = torch.full((N, A, 3, G), 2.0, device=x.device)
    for _ in range(schedule.gradient_outer):
        for optimiser, moving, steps in optimisers:
            for parameter in (d, h, theta, alpha):
                parameter.requires_grad_(any(parameter is each for each in moving))
            for _ in range(steps):
                y = differentiable_encode(x, Rows(spell(theta), spell(h), spell(d), v0))
                share = alpha.softmax(-1)
                errors = (y - x).square().mean(-1)
                mixed = ((share[..., None] * y).sum(1, keepdim=True) - x).square().mean((1, 2))
                with torch.no_grad():
                    # copies: the parameters change in place
                    bases = torch.stack([d, h, theta], 2)
                    better = errors < best
                    best = torch.where(better, errors, best)
                    best_bases = torch.where(better[..., None, None], bases, best_bases)
                # the sum over groups: the gradient of each is its own
                loss = (mixed + EACH * (share * errors).sum(-1)).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        progress(N)
    chosen = alpha.detach().argmax(-1)
    row = torch.arange(N, device=x.device)
    return best_bases[row, chosen], chosen, best[row, chosen]
