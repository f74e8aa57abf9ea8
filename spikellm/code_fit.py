"""The code of one site, and how good it is on data that it was not fitted to.

Base 2 is what it is measured against, and what it falls back to: a neuron group whose fitted code is no better there keeps base 2. Errors
are weighted as in the search (`search.py`); the held-out histogram stands as several points a bin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from spikellm.artifacts import write_tensors
from spikellm.evolution import Codes, base2_codes, squared_error
from spikellm.neuron import PhaseTable, fire_plain
from spikellm.statistics import HELD_OUT, SiteStatistics

SUBDIVISION = 4  # points per bin where errors are reported: a bin at the top is wider than a step at T = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeFit:
    """The code of one site, per neuron group [C, ..].

    Bases are padded to the same number of grains by the last grain's. error and error_base2 are weighted squared errors on
    held-out data, power the weighted mean square there (base 2 with one tau for the site); firing_rate = spikes / (neurons x T)
    there and share the site's neurons in a group; fallback: base 2 was kept; max_spikes, two_sided, signed: of the neurons
    (`PhaseTable`; of a two-sided site the first half of the rows codes x >= 0, the second x < 0).
    """

    tau: Float[Tensor, " C"]
    v0: Float[Tensor, " C"]
    assignment: Int[Tensor, "C T"]
    base_d: Float[Tensor, "C G"]
    base_h: Float[Tensor, "C G"]
    base_theta: Float[Tensor, "C G"]
    theta: Float[Tensor, "C T"]
    h: Float[Tensor, "C T"]
    d: Float[Tensor, "C T"]
    objective: Float[Tensor, " C"]
    error: Float[Tensor, " C"]
    error_base2: Float[Tensor, " C"]
    power: Float[Tensor, " C"]
    firing_rate: Float[Tensor, " C"]
    share: Float[Tensor, " C"]
    fallback: Bool[Tensor, " C"]
    rho: Float[Tensor, " C"]
    max_spikes: int | None = None
    two_sided: bool = False
    signed: bool = False

    @property
    def table(self) -> PhaseTable:
        flags: dict[str, Any] = {"max_spikes": self.max_spikes, "two_sided": self.two_sided, "signed": self.signed}
        return PhaseTable(theta=self.theta, h=self.h, d=self.d, v0=self.v0, **flags)

    @property
    def grain(self) -> Int[Tensor, " C"]:
        """Grains that each group uses."""
        return self.assignment.amax(-1) + 1

    @property
    def relative_error(self) -> float:
        """Of the site, on held-out data; 0 for a site without any activation."""
        return _ratio(self.error, self.power)

    @property
    def relative_error_base2(self) -> float:
        return _ratio(self.error_base2, self.power)

    @property
    def mean_firing_rate(self) -> float:
        """Of the site."""
        return (self.firing_rate * self.share).sum().item()

    @classmethod
    def assess(
        cls,
        statistics: SiteStatistics,
        codes: Codes,
        objective: Float[Tensor, " C"],
        *,
        fall_back: bool = True,
        signed: bool = False,
        spike_weight: float = 0.0,
    ) -> Self:
        """Choose per group between the found code and base 2, on held-out data; fall_back=False keeps the found code."""
        T, G = codes.assignment.shape[-1], codes.G
        maximum = statistics.maximum.amax(0)
        site = torch.where(maximum.amax() > 0, maximum.amax(), 1.0).expand_as(maximum)
        x, weight, count = held_out_points(statistics)
        per_site, per_group = base2_codes(site, T, G), base2_codes(torch.where(maximum > 0, maximum, site), T, G)
        neurons = count.sum(-1) + statistics.zeros[HELD_OUT]
        candidates = (per_site, per_group, codes)
        errors = torch.stack([weighted_error(x, weight, each, signed=signed) for each in candidates])
        spikes = torch.stack([spikes_per_neuron(x, count, neurons, each.spell(), signed=signed) for each in candidates])
        costs = errors * (spike_weight * spikes).exp()
        # the first of equals: base 2 where nothing is gained, or nothing passed
        best = costs.argmin(0) if fall_back else torch.full_like(errors[0], 2, dtype=torch.int64)
        chosen = per_site.where(best == 0, per_group.where(best == 1, codes))
        theta, h, d, v0 = chosen.spell()
        base_d, base_h, base_theta = (part.exp2() for part in chosen.bases())
        return cls(
            tau=chosen.tau,
            v0=v0,
            assignment=chosen.assignment,
            base_d=base_d,
            base_h=base_h,
            base_theta=base_theta,
            theta=theta,
            h=h,
            d=d,
            objective=objective,
            error=errors.gather(0, best[None])[0],
            error_base2=errors[0],
            power=(weight * x.square()).sum(-1),
            firing_rate=spikes.gather(0, best[None])[0] / T,
            share=neurons / neurons.sum().clamp_min(1),
            fallback=best < 2,
            rho=chosen.rho,
            two_sided=statistics.two_sided,
            signed=signed,
        )


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = whole.double().sum().item()
    return part.double().sum().item() / total if total > 0 else 0.0


def held_out_points(statistics: SiteStatistics) -> tuple[Float[Tensor, "C points"], Float[Tensor, "C points"], Float[Tensor, "C points"]]:
    """Positions, error weights (all groups' together scaled to sum 1) and counts: every bin as SUBDIVISION points."""
    edges = statistics.edges
    inside = (torch.arange(SUBDIVISION, device=edges.device) + 0.5) / SUBDIVISION
    counts = statistics.counts[HELD_OUT].float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    weight = (statistics.counts if statistics.weights is None else statistics.weights)[HELD_OUT].double()
    weight = (weight / weight.sum().clamp_min(1e-300)).float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    x = (edges[:-1, None] + edges.diff()[:, None] * inside).flatten().expand_as(weight)
    return x.contiguous(), weight, counts


def weighted_error(
    x: Float[Tensor, "C points"], weight: Float[Tensor, "C points"], codes: Codes, *, signed: bool = False
) -> Float[Tensor, " C"]:
    """Squared error of one code per group."""
    theta, h, d, v0 = (part[:, None] for part in codes.spell())
    return squared_error(x[:, None], weight[:, None], theta, h, d, v0, None, signed)[:, 0]


def spikes_per_neuron(
    x: Float[Tensor, "C points"],
    count: Float[Tensor, "C points"],
    neurons: Float[Tensor, " C"],
    table: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    max_spikes: int | None = None,
    signed: bool = False,
) -> Float[Tensor, " C"]:
    """Mean spikes of a neuron, 0 .. T, where `count` of `neurons` have input x > 0; `table` is theta, h, d, v0."""
    theta, h, _, v0 = table
    train = fire_plain(x[None], theta, h, v0, max_spikes, signed)
    spikes = torch.stack(train).abs().sum(0)[0]
    return (count * spikes).sum(-1) / neurons.clamp_min(1)


def save_fits(path: Path, fits: Mapping[str, CodeFit]) -> None:
    """Write the codes of all sites, by number and name of the site, to a safetensors file (which sorts what it holds)."""
    names = [field.name for field in fields(CodeFit)]
    values = {f"{number:05d}.{site}.{name}": getattr(fit, name) for number, (site, fit) in enumerate(fits.items()) for name in names}
    write_tensors(path, {key: torch.as_tensor(value).cpu().contiguous() for key, value in values.items() if value is not None})


def load_fits(path: Path) -> dict[str, CodeFit]:
    """Read what `save_fits` wrote."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in sorted(load_file(path).items()):
        name, _, field = key.partition(".")[2].rpartition(".")
        found.setdefault(name, {})[field] = value.item() if field in ("max_spikes", "two_sided", "signed") else value
    return {name: CodeFit(**values) for name, values in found.items()}
