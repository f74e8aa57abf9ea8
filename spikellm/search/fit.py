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
from spikellm.coding.codes import IntervalCodes, base2_codes
from spikellm.coding.neuron import PhaseTable
from spikellm.kernels.encode import BINARY, Digits
from spikellm.search.points import table_sums
from spikellm.store.artifacts import write_tensors

SUBDIVISION = 4  # points per bin where errors are reported: a bin at the top is wider than a step at T = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeFit:
    """The code of one site: of its C neuron groups (of two sides first those of x >= 0, then those of x < 0) and R = K C tables.

    Tables stand interval by interval, as in `PhaseTable`, with their parameters beside them; bases are padded to the same number of
    grains by the last grain's. objective is the search's, on the fitting part. On the reporting part: error and error_base2, weighted
    squared errors (base 2 with one tau for the site); cost and cost_base2, with what the mean error counts; power, the weighted mean
    square; firing_rate = spikes / (neurons x T) and share, the site's neurons in a group. fallback: base 2 was kept; digits and cuts:
    `PhaseTable`'s.
    """

    tau: Float[Tensor, " R"]
    v0: Float[Tensor, " R"]
    assignment: Int[Tensor, "R T"]
    base_d: Float[Tensor, "R G"]
    base_h: Float[Tensor, "R G"]
    base_theta: Float[Tensor, "R G"]
    theta: Float[Tensor, "R T"]
    h: Float[Tensor, "R T"]
    d: Float[Tensor, "R T"]
    objective: Float[Tensor, " C"]
    error: Float[Tensor, " C"]
    error_base2: Float[Tensor, " C"]
    cost: Float[Tensor, " C"]
    cost_base2: Float[Tensor, " C"]
    power: Float[Tensor, " C"]
    firing_rate: Float[Tensor, " C"]
    share: Float[Tensor, " C"]
    fallback: Bool[Tensor, " C"]
    rho: Float[Tensor, " R"]
    digits: Digits
    cuts: Float[Tensor, "ends C"] | None = None

    @property
    def table(self) -> PhaseTable:
        """The table of the neurons."""
        return PhaseTable(self.theta, self.h, self.d, self.v0, digits=self.digits, cuts=self.cuts)

    @property
    def grain(self) -> Int[Tensor, " R"]:
        """Grains of each table; 0 where it is not used."""
        return (self.assignment.amax(-1) + 1) * self.d.any(-1)

    @property
    def intervals(self) -> Int[Tensor, " C"]:
        """Intervals that each group uses."""
        return self.table.intervals.flatten()

    def seen(self, statistics: SiteStatistics) -> SiteStatistics:
        """The site's statistics in the groups that have codes of their own: a code for all of them sees them together."""
        return statistics.merged() if len(self.error) < statistics.counts.shape[1] else statistics

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
        rounds: Sequence[tuple[IntervalCodes, Float[Tensor, " C"]]],
        *,
        tolerance: float = 0.0,
        sufficient: float = 0.0,
        fall_back: bool = True,
        digits: Digits = BINARY,
        spike_price: float = 0.0,
        compiled: bool = False,
    ) -> Self:
        """Choose per group between the found codes and base 2, on the choosing part.

        Args:
            statistics: of the site.
            rounds: codes found, all in one space of parameters, and their objectives; the simplest first.
            tolerance: the first codes are taken whose cost is at most (1 + tolerance) times the least of all,
            sufficient: or whose relative squared error is at most this.
            fall_back: False never takes base 2.
            digits: of the neurons, but for the partition: sides are the statistics', intervals the codes'.
            spike_price: see `Options.spike_price`.
            compiled: fuse the evaluation.
        """
        T, G, K = rounds[0][0].codes.assignment.shape[-1], rounds[0][0].codes.G, max(code.K for code, _ in rounds)
        known = statistics.known_maximum
        site = torch.where(known.amax() > 0, known.amax(), 1.0).expand_as(known)
        per_site, per_group = (IntervalCodes.single(base2_codes(each, T, G)) for each in (site, torch.where(known > 0, known, site)))
        codes = [per_site, per_group, *(code for code, _ in rounds)]
        tables = [code.table(digits) for code in codes]
        costs, errors = choice_costs(statistics, tables, spike_price=spike_price, compiled=compiled)
        within = (costs[2:] <= (1 + tolerance) * costs[2:].amin(0)) | (errors[2:] <= sufficient)
        number = within.int().argmax(0)
        found = number + 2
        if fall_back:
            # the first of equals: base 2 where nothing is gained, or nothing passed
            options = torch.stack([torch.zeros_like(found), torch.ones_like(found), found])
            found = options.gather(0, costs.gather(0, options).argmin(0)[None])[0]
        every = torch.arange(len(known), device=known.device)
        chosen = IntervalCodes.stack([code.padded(K) for code in codes]).at((found, every)).trimmed()
        base_d, base_h, base_theta = (part.exp2().flatten(0, 1) for part in chosen.codes.bases())
        return cls.reported(
            statistics,
            chosen.table(replace(digits, sides=statistics.sides)),
            compiled=compiled,
            tau=chosen.codes.tau.flatten(),
            assignment=chosen.codes.assignment.flatten(0, 1),
            base_d=base_d,
            base_h=base_h,
            base_theta=base_theta,
            objective=torch.stack([objective for _, objective in rounds])[number, every],
            fallback=found < 2,
            rho=chosen.codes.rho.flatten(),
        )

    @classmethod
    def reported(cls, statistics: SiteStatistics, table: PhaseTable, *, compiled: bool = False, **parameters: Tensor) -> Self:
        """The code that `table` spells, with its errors and firing rates on the reporting part; `parameters` are all other fields."""
        known = statistics.known_maximum
        site = torch.where(known.amax() > 0, known.amax(), 1.0).expand_as(known)
        x, weight, count = part_points(statistics, REPORT)
        neurons = count.sum(-1) + statistics.zeros[REPORT]
        share = count / neurons.clamp_min(1)[:, None]
        # of base 2 signed digits send no negative one: the potential never falls below 0
        base2 = PhaseTable(*base2_codes(site, table.T).spell(), digits=Digits(signed=table.digits.signed))
        every = [table_sums(x, weight, share, [each], compiled=compiled) for each in (by_group(table), base2)]
        error, off, spikes = torch.cat(every, 1)
        cost = error + bias_weight(statistics, weight, share)[:, 0] * off.square()
        return cls(
            **parameters,
            **table.rows._asdict(),
            error=error[0],
            error_base2=error[1],
            cost=cost[0],
            cost_base2=cost[1],
            power=(weight * x.square()).sum(-1),
            firing_rate=spikes[0] / table.T,
            share=neurons / neurons.sum().clamp_min(1),
            digits=table.digits,
            cuts=table.cuts,
        )

    def with_table(self, table: PhaseTable, statistics: SiteStatistics, *, tau: Float[Tensor, " R"] | None = None) -> Self:
        """The same code with another table, its errors and firing rates measured again on `statistics` of its site.

        Bases, rho and objective stay those that the search found, and tau unless another is given.
        """
        names = ("assignment", "base_d", "base_h", "base_theta", "objective", "fallback", "rho")
        kept = {name: getattr(self, name) for name in names} | {"tau": self.tau if tau is None else tau}
        return self.reported(self.seen(statistics), table, **kept)


def by_group(table: PhaseTable) -> PhaseTable:
    """The table for magnitudes, groups of two sides being groups like any other: statistics know no sign."""
    return PhaseTable(*table.rows, digits=replace(table.digits, sides=1), cuts=table.cuts, checked=True)


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = whole.double().sum().item()
    return part.double().sum().item() / total if total > 0 else 0.0


def part_points(
    statistics: SiteStatistics, part: int
) -> tuple[Float[Tensor, "C points"], Float[Tensor, "C points"], Float[Tensor, "C points"]]:
    """Positions, error weights (of all groups scaled to sum 1) and counts of one part: every used bin as SUBDIVISION points."""
    counts, weight = statistics.counts[part], (statistics.counts if statistics.weights is None else statistics.weights)[part].double()
    used = ((counts > 0) | (weight > 0)).any(0)
    edges, widths = statistics.edges[:-1][used], statistics.edges.diff()[used]
    inside = (torch.arange(SUBDIVISION, device=edges.device) + 0.5) / SUBDIVISION
    count = counts[:, used].float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    weight = (weight / weight.sum().clamp_min(1e-300))[:, used].float().repeat_interleave(SUBDIVISION, -1) / SUBDIVISION
    x = (edges[:, None] + widths[:, None] * inside).flatten().expand_as(weight)
    return x.contiguous(), weight, count


def bias_weight(statistics: SiteStatistics, weight: Float[Tensor, "C points"], share: Float[Tensor, "C points"]) -> Float[Tensor, "C 1"]:
    """How often the square of sum weight (y - x) counts beside sum weight (y - x)^2, for points with that share of a group's neurons.

    With weight = k share the mean squared error times k stands beside k S bias^2 = S / k (k bias)^2. 0 where no outputs are added up.
    """
    return (statistics.row_neurons or 0.0) * share.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-30)


def choice_costs(
    statistics: SiteStatistics, tables: Sequence[PhaseTable], *, spike_price: float, compiled: bool = False
) -> Float[Tensor, "2 J C"]:
    """What the choice is made by: the search's objective on the choosing part, in one scale for all codes; and the relative error there."""
    x, weight, count = part_points(statistics, CHOOSE)
    share = count / (count.sum(-1) + statistics.zeros[CHOOSE]).clamp_min(1)[:, None]
    error, off, spikes = table_sums(x, weight, share, tables, compiled=compiled)
    power = (weight * x.square()).sum(-1).clamp_min(1e-30)
    cost = (error + bias_weight(statistics, weight, share)[:, 0] * off.square()) / power + spike_price * spikes
    return torch.stack([cost, error / power])


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
        values["digits"] = stored_digits(values)
    return {name: CodeFit(**values) for name, values in found.items()}


def stored_digits(values: dict[str, Any]) -> Digits:
    """The digits whose fields are among a code's stored tensors, which are taken out."""
    return Digits(**{field.name: values.pop(field.name).item() for field in fields(Digits) if field.name in values})
