"""Parameters of a neuron's code: grain assignments and the tables that they spell out.

A code over T time steps is a table (theta_t, h_t, d_t), t = 0 .. T-1, and an initial potential v0 (see `neuron.py`).
Multi-granularity phase coding (Zheng et al., ICLR 2026) writes the table with few numbers: the T phases are cut into G
grains, consecutive phases that share bases, and with the grain a(t) of phase t

    d_t = tau B[a(t)]^-(t+1)     h_t = tau H[a(t)]^-(t+1)     theta_t = tau Theta[a(t)]^-(t+1)

The exponent counts from the first phase of the code, not of the grain: the convention of the authors' published files.
tau is the amplitude of the site (its largest activation, or what the search makes of it), not a time constant.

Base 2 in all three places with v0 = tau 2^-T / 2 is a signed (T+1)-bit uniform quantiser with one scale:
|y - |x|| <= tau 2^-(T+1) for |x| <= tau (1 - 2^-T). Every report shows it beside the fitted code.

The codes of traditional conversion are tables of the same kind, with one base b and thresholds in one ratio to the weights:

    rate        d_t = h_t = theta_t = tau / T (b = 1), v0 = tau / 2T: the number of spikes is the value, rounded
    TTFS        one spike at most; d_t = h_t = tau b^-t, theta_t = (d_t + d_t+1) / 2, v0 = 0: its time is the value, rounded
    few-spike   base 2, at most k spikes; theta_t = ratio d_t, ratio <= 1: below 1 the k-th spike rounds instead of truncating
"""

from itertools import combinations, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikellm.kernels.encode import Rows


def assignments(T: int, G: int, *, min_length: int = 2) -> Int[Tensor, "A T"]:
    """All A = C(T - (min_length - 1) G - 1, G - 1) ways to cut T phases into G grains of at least `min_length` phases.

    Each row is the grain index of every phase: non-decreasing, 0 .. G-1.

    Raises:
        ValueError: T phases cannot hold G grains.
    """
    if G < 1 or min_length < 1 or min_length * G > T:
        raise ValueError(f"T={T} phases cannot be cut into G={G} grains of at least {min_length} phases")
    slack = T - (min_length - 1) * G
    rows = []
    for cuts in combinations(range(1, slack), G - 1):
        edges = (0, *cuts, slack)
        lengths = [stop - start + min_length - 1 for start, stop in pairwise(edges)]
        rows.append([grain for grain, length in enumerate(lengths) for _ in range(length)])
    return torch.tensor(rows, dtype=torch.int64)


def phase_amplitudes(
    tau: Float[Tensor, "*sites"], bases: Float[Tensor, "*sites G"], assignment: Int[Tensor, "*#sites T"]
) -> Float[Tensor, "*sites T"]:
    """tau * bases[a(t)]^-(t+1): one row (d, h or theta) of the table, for any number of sites at once."""
    steps = torch.arange(1, assignment.shape[-1] + 1, device=bases.device, dtype=bases.dtype)
    per_phase = bases.gather(-1, assignment.expand(*bases.shape[:-1], assignment.shape[-1]))
    return tau.unsqueeze(-1) * per_phase.pow(-steps)


def default_v0(tau: Float[Tensor, "*sites"], T: int) -> Float[Tensor, "*sites"]:
    """Half of the last base-2 step, tau 2^-T / 2: rounds to the nearest level instead of down."""
    return tau * 2.0 ** -(T + 1)


def base2_amplitudes(tau: Float[Tensor, "*sites"], T: int) -> Float[Tensor, "*sites T"]:
    """tau 2^-(t+1): d, h and theta of base-2 phase coding."""
    steps = torch.arange(1, T + 1, device=tau.device, dtype=tau.dtype)
    return tau.unsqueeze(-1) * 2.0**-steps


def uniform_rows(tau: Float[Tensor, "*sites"], T: int, *, base: float, ratio: float, v0: float) -> Rows:
    """The rows of a code with one base: d_t = h_t = tau base^-t, theta_t = ratio d_t, v0 in units of the last d."""
    d = tau.unsqueeze(-1) * float(base) ** -torch.arange(T, device=tau.device, dtype=tau.dtype)
    return Rows(ratio * d, d, d, v0 * d[..., -1])
