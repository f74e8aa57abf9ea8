"""From a site's activation statistics to its table: the search.

Here: the base-2 code of METHOD `base2`, whose only free number is the amplitude tau, the largest activation seen. It is the
baseline of every report: a signed (T+1)-bit uniform quantiser.

Errors are taken over weighted histograms (bin centers and counts), so that they cost the same for any number of tokens.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from spikellm.artifacts import write_tensors
from spikellm.coding import default_v0, even_assignment, phase_amplitudes
from spikellm.neuron import PhaseTable, fire


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeFit:
    """Parameters of one site's code, per neuron group: tau, v0 [C], bases [C, G], assignment [T]."""

    assignment: Int[Tensor, " T"]
    tau: Float[Tensor, " C"]
    v0: Float[Tensor, " C"]
    base_d: Float[Tensor, "C G"]
    base_h: Float[Tensor, "C G"]
    base_theta: Float[Tensor, "C G"]

    @property
    def grains(self) -> int:
        return int(self.assignment.max()) + 1

    @property
    def table(self) -> PhaseTable:
        return PhaseTable(
            theta=phase_amplitudes(self.tau, self.base_theta, self.assignment),
            h=phase_amplitudes(self.tau, self.base_h, self.assignment),
            d=phase_amplitudes(self.tau, self.base_d, self.assignment),
            v0=self.v0,
        )


def base2_fit(maximum: Float[Tensor, " C"], T: int, G: int = 1, *, min_length: int = 2) -> CodeFit:
    """Base 2 in every grain, tau the largest activation of each group.

    A site that is constant zero gets tau = 1: its neurons never fire.
    """
    tau = torch.where(maximum > 0, maximum, 1.0)
    bases = torch.full((len(tau), G), 2.0)
    assignment = even_assignment(T, G, min_length=min_length)
    return CodeFit(assignment=assignment, tau=tau, v0=default_v0(tau, T), base_d=bases, base_h=bases.clone(), base_theta=bases.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeQuality:
    """What a table does to a distribution."""

    squared_error: float  # sum of (y - x)^2
    energy: float  # sum of x^2
    firing_rate: float  # spikes / (neurons x T)

    @property
    def relative_error(self) -> float:
        """Mean squared error over mean square; 0 for a site without any activation."""
        return self.squared_error / self.energy if self.energy else 0.0


def code_quality(table: PhaseTable, centers: Float[Tensor, " bins"], counts: Int[Tensor, "C bins"]) -> CodeQuality:
    """Error and firing rate of `table` on histograms of |x|, one per group (a table with one group serves all)."""
    spikes = fire(centers.expand(1, table.groups, -1), table).double()  # [T, 1, C, bins]
    coded = (spikes * table.d.double().T[:, None, :, None]).sum(0)[0]
    weights = counts.double()
    x = centers.double()
    total = weights.sum().item()
    return CodeQuality(
        squared_error=((coded - x).square() * weights).sum().item(),
        energy=(x.square() * weights).sum().item(),
        firing_rate=(spikes.sum(0)[0] * weights).sum().item() / (total * table.T) if total else 0.0,
    )


def save_fits(path: Path, fits: dict[str, CodeFit]) -> None:
    """Write the codes of all sites, by site name, to a safetensors file."""
    names = [field.name for field in fields(CodeFit)]
    write_tensors(path, {f"{site}.{name}": getattr(fit, name).contiguous() for site, fit in fits.items() for name in names})


def load_fits(path: Path) -> dict[str, CodeFit]:
    """Read what `save_fits` wrote."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        name, _, field = key.rpartition(".")
        found.setdefault(name, {})[field] = value
    return {name: CodeFit(**values) for name, values in found.items()}
