"""The code of one site: chosen on data that it was not fitted to, and measured on data that decided nothing.

Base 2 is what a code is measured against, and what it falls back to: a neuron group whose fitted code is no better on the choosing part
of the calibration text keeps base 2; the part also decides how many grains are worth having. Errors and firing rates are those on the
reporting part (`calibration/statistics.py`), where any outcome is possible. Errors are weighted as in the search (`search.py`);
histograms stand as several points a bin.

Where outputs of S neurons are added up as they are (probabilities, `snn.softmax_norm=before`), the expected squared error of the sum is
S mse + S^2 bias^2, so that a neuron's counts mse + S bias^2: the cost that is searched, chosen and compared with base 2 by. It equals the
squared error, which is reported, everywhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from spikellm.calibration.statistics import CHOOSE, REPORT, SiteStatistics
from spikellm.coding.codes import Codes, base2_codes
from spikellm.coding.neuron import PhaseTable
from spikellm.kernels.encode import BINARY, Digits, Rows, fire_plain
from spikellm.search.evolution import squared_error
from spikellm.store.artifacts import write_tensors

SUBDIVISION = 4  # points per bin where errors are reported: a bin at the top is wider than a step at T = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeFit:
    """The code of one site, per neuron group [C, ..].

    Bases are padded to the same number of grains by the last grain's. objective is the search's, on the fitting part. On the reporting
    part: error and error_base2, weighted squared errors (base 2 with one tau for the site); cost and cost_base2, with what the mean
    error counts; power, the weighted mean square; firing_rate = spikes / (neurons x T) and share, the site's neurons in a group.
    fallback: base 2 was kept; digits: of the neurons (`PhaseTable`; of two sides the first half of the rows codes x >= 0, the
    second x < 0).
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
    cost: Float[Tensor, " C"]
    cost_base2: Float[Tensor, " C"]
    power: Float[Tensor, " C"]
    firing_rate: Float[Tensor, " C"]
    share: Float[Tensor, " C"]
    fallback: Bool[Tensor, " C"]
    rho: Float[Tensor, " C"]
    digits: Digits

    @property
    def table(self) -> PhaseTable:
        """The table of the neurons."""
        return PhaseTable(self.theta, self.h, self.d, self.v0, digits=self.digits)

    @property
    def grain(self) -> Int[Tensor, " C"]:
        """Grains that each group uses."""
        return self.assignment.amax(-1) + 1

    @property
    def relative_error(self) -> float:
        """Of the site, on the reporting part; 0 for a site without any activation."""
        return _ratio(self.error, self.power)

    @property
    def relative_error_base2(self) -> float:
        """Error of base 2 over the signal's power."""
        return _ratio(self.error_base2, self.power)

    @property
    def worse_than_base2(self) -> bool:
        """Whether the site would be better off with base 2, by the costs on the reporting part."""
        return self.cost.double().sum().item() > self.cost_base2.double().sum().item()

    @property
    def mean_firing_rate(self) -> float:
        """Of the site."""
        return (self.firing_rate * self.share).sum().item()

    @classmethod
    def assess(
        cls,
        statistics: SiteStatistics,
        rounds: Sequence[tuple[Codes, Float[Tensor, " C"]]],
        *,
        tolerance: float = 0.0,
        fall_back: bool = True,
        digits: Digits = BINARY,
        spike_weight: float = 0.0,
    ) -> Self:
        """Choose per group between the found codes and base 2, on the choosing part.

        Args:
            statistics: of the site.
            rounds: codes found and their objectives, those of fewer grains first.
            tolerance: the first codes are taken whose cost is at most (1 + tolerance) times the least of all.
            fall_back: False never takes base 2.
            digits: of the neurons, but for the sides: these are the statistics'.
            spike_weight: see `Options.spike_weight`.
        """
        T, G = rounds[0][0].assignment.shape[-1], rounds[0][0].G
        known = statistics.known_maximum
        site = torch.where(known.amax() > 0, known.amax(), 1.0).expand_as(known)
        per_site, per_group = base2_codes(site, T, G), base2_codes(torch.where(known > 0, known, site), T, G)
        codes = [per_site, per_group, *(code for code, _ in rounds)]
        costs = torch.stack([_cost(statistics, code, digits, spike_weight=spike_weight) for code in codes])
        number = (costs[2:] <= (1 + tolerance) * costs[2:].amin(0)).int().argmax(0)
        found = number + 2
        if fall_back:
            # the first of equals: base 2 where nothing is gained, or nothing passed
            options = torch.stack([torch.zeros_like(found), torch.ones_like(found), found])
            found = options.gather(0, costs.gather(0, options).argmin(0)[None])[0]
        every = torch.arange(len(known), device=known.device)
        values, assignments = (torch.stack(part) for part in zip(*((code.values, code.assignment) for code in codes), strict=True))
        chosen = Codes(values=values, assignment=assignments).at((found, every))
        base_d, base_h, base_theta = (part.exp2() for part in chosen.bases())
        return cls.reported(
            statistics,
            PhaseTable(*chosen.spell(), digits=replace(digits, sides=statistics.sides)),
            tau=chosen.tau,
            assignment=chosen.assignment,
            base_d=base_d,
            base_h=base_h,
            base_theta=base_theta,
            objective=torch.stack([objective for _, objective in rounds])[number, every],
            fallback=found < 2,
            rho=chosen.rho,
        )

    @classmethod
    def reported(cls, statistics: SiteStatistics, table: PhaseTable, **parameters: Tensor) -> Self:
        """The code that `table` spells, with its errors and firing rates on the reporting part; `parameters` are all other fields."""
        known = statistics.known_maximum
        site = torch.where(known.amax() > 0, known.amax(), 1.0).expand_as(known)
        x, weight, count = part_points(statistics, REPORT)
        neurons = count.sum(-1) + statistics.zeros[REPORT]
        bias = bias_weight(statistics, weight, count / neurons.clamp_min(1)[:, None])
        own = table.rows, table.digits
        base2 = base2_codes(site, table.T).spell(), replace(table.digits, max_spikes=None)
        return cls(
            **parameters,
            **table.rows._asdict(),
            error=weighted_error(x, weight, *own),
            error_base2=weighted_error(x, weight, *base2),
            cost=weighted_error(x, weight, *own, bias),
            cost_base2=weighted_error(x, weight, *base2, bias),
            power=(weight * x.square()).sum(-1),
            firing_rate=spikes_per_neuron(x, count, neurons, *own) / table.T,
            share=neurons / neurons.sum().clamp_min(1),
            digits=table.digits,
        )


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = whole.double().sum().item()
    return part.double().sum().item() / total if total > 0 else 0.0


def part_points(
    statistics: SiteStatistics, part: int
) -> tuple[Float[Tensor, "C points"], Float[Tensor, "C points"], Float[Tensor, "C points"]]:
    """Positions, error weights (all groups' together scaled to sum 1) and counts of one part: every bin as SUBDIVISION points."""
    edges = statistics.edges
    inside = (torch.arange(SUBDIVISION, device=edges.device) + 0.5) / SUBDIVISION
    counts = statistics.counts[part].float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    weight = (statistics.counts if statistics.weights is None else statistics.weights)[part].double()
    weight = (weight / weight.sum().clamp_min(1e-300)).float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    x = (edges[:-1, None] + edges.diff()[:, None] * inside).flatten().expand_as(weight)
    return x.contiguous(), weight, counts


def bias_weight(statistics: SiteStatistics, weight: Float[Tensor, "C points"], share: Float[Tensor, "C points"]) -> Float[Tensor, "C 1"]:
    """How often the square of sum weight (y - x) counts beside sum weight (y - x)^2, for points with that share of a group's neurons.

    With weight = k share the mean squared error times k stands beside k S bias^2 = S / k (k bias)^2. 0 where no outputs are added up.
    """
    return (statistics.row_neurons or 0.0) * share.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-30)


def _cost(statistics: SiteStatistics, codes: Codes, digits: Digits, *, spike_weight: float) -> Float[Tensor, " C"]:
    """What the choice is made by: the search's objective, on the choosing part (in one scale for all codes)."""
    x, weight, count = part_points(statistics, CHOOSE)
    neurons = count.sum(-1) + statistics.zeros[CHOOSE]
    bias = bias_weight(statistics, weight, count / neurons.clamp_min(1)[:, None])
    rows = codes.spell()
    error = weighted_error(x, weight, rows, digits, bias)
    if not spike_weight:
        return error
    return error * (spike_weight * spikes_per_neuron(x, count, neurons, rows, digits)).exp()


def weighted_error(
    x: Float[Tensor, "C points"],
    weight: Float[Tensor, "C points"],
    rows: Rows,
    digits: Digits,
    bias_weight: Float[Tensor, "C 1"] | None = None,
) -> Float[Tensor, " C"]:
    """Squared error of one code per group."""
    return squared_error(x[:, None], weight[:, None], rows.at((slice(None), None)), digits, bias_weight=bias_weight)[:, 0]


def spikes_per_neuron(
    x: Float[Tensor, "C points"], count: Float[Tensor, "C points"], neurons: Float[Tensor, " C"], rows: Rows, digits: Digits
) -> Float[Tensor, " C"]:
    """Mean spikes of a neuron, 0 .. T, where `count` of `neurons` have input x > 0; one code a group."""
    train = fire_plain(x[None], rows, digits)
    spikes = torch.stack(train).abs().sum(0)[0]
    return (count * spikes).sum(-1) / neurons.clamp_min(1)


def save_fits(path: Path, fits: Mapping[str, CodeFit]) -> None:
    """Write the codes of all sites, by number and name of the site, to a safetensors file (which sorts what it holds)."""
    tensors: dict[str, Tensor] = {}
    for number, (site, fit) in enumerate(fits.items()):
        values = {field.name: getattr(fit, field.name) for field in fields(fit)}
        values |= asdict(values.pop("digits"))
        tensors |= {f"{number:05d}.{site}.{name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
    apart = torch.contiguous_format  # rows of a table may be one tensor, which safetensors refuses
    write_tensors(path, {key: tensor.cpu().clone(memory_format=apart) for key, tensor in tensors.items()})


def load_fits(path: Path) -> dict[str, CodeFit]:
    """Read what `save_fits` wrote."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in sorted(load_file(path).items()):
        name, _, field = key.partition(".")[2].rpartition(".")
        found.setdefault(name, {})[field] = value
    for values in found.values():
        values["digits"] = Digits(**{field.name: values.pop(field.name).item() for field in fields(Digits) if field.name in values})
    return {name: CodeFit(**values) for name, values in found.items()}
