"""Distribution-aware search: statistics of every site in, phase tables out.

Problem, for each neuron group (a site, or one attention head of it) with density p of |x|, over the code's parameters:

    minimise over tau, v0, a, B, H, Theta      integral of w(x) p(x) (y(x) - x)^2 dx  /  integral of w(x) p(x) x^2 dx

y is the neuron's output (`neuron.py`), tau, v0, the assignment a of phases to grains and the bases spell its table
(`coding.py`), and w is what an error of that activation counts further down (`calibration.py`, `attention.py`; else 1).

The density stands as weighted points, each an equal share of a mixture of p^(1/3) (the level density of the optimal quantiser,
Panter & Dite 1951), mass and energy, so that the tail keeps points of its own. Zheng et al. (ICLR 2026) optimise one site at a
time by surrogate gradients (`gradient.py`); here all sites evolve together (`evolution.py`).

Ours also: a table may use fewer grains than it may, so that more grains are never worse on the objective; grain=auto takes the
coarsest G whose objective is within a tolerance of the best; a group whose fitted table is worse than base 2 on held-out data
keeps base 2. One-sided activations (SiLU) have a table for each sign. Signed digits (`neuron.py`) are searched in the same way, with
one number more, the ratio of thresholds to resets. With a spike weight lambda the objective is multiplied by exp(lambda n), n the mean
spikes of a neuron: lambda is the relative rise of the error at which one spike less a neuron is a fair exchange.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from spikellm.artifacts import write_tensors
from spikellm.coding import assignments
from spikellm.evolution import Codes, Objective, base2_codes, evolve_grains, squared_error
from spikellm.gradient import Schedule, descend_grains, draw_samples
from spikellm.neuron import PhaseTable, fire_plain, fused
from spikellm.statistics import FIT, HELD_OUT, SiteStatistics

MAX_GRAINS = 3  # of grain=auto
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


def search(
    statistics: Mapping[str, SiteStatistics],
    *,
    T: int,
    G: int | None,
    seed: int,
    min_length: int = 2,
    tolerance: float = 0.02,
    signed: bool = False,
    spike_weights: Mapping[str, float] | None = None,
    compiled: bool = True,
    progress: Callable[[int], None] = lambda grains: None,
) -> dict[str, CodeFit]:
    """Fit a table to every neuron group of every site.

    Args:
        statistics: by site name; all on one device.
        T: time steps.
        G: grains, at most; None: per group the coarsest G <= MAX_GRAINS within `tolerance` of the best objective.
        seed: of the evolution; the result is the same for the same seed and statistics.
        min_length: phases of a grain, at least [steps].
        tolerance: relative. Excess perplexity moves about as the coding error does: 0.02 of it is 0.02 of the excess.
        signed: digits may be negative.
        spike_weights: by site name; the log of the factor on the squared error at which one spike less a neuron is a fair exchange
            (0, or no entry: spikes cost nothing).
        compiled: fuse the evaluation of candidates.
        progress: called with the number of grains after each round.

    Raises:
        ValueError: T phases cannot hold G grains.
    """
    most = G or min(MAX_GRAINS, max(1, T // min_length))
    assignments(T, most, min_length=min_length)  # refuses early
    kernel = fused(squared_error, next(iter(statistics.values())).counts.device.type) if compiled else squared_error
    if signed:  # a digit's sign does not tell the side
        statistics = {name: site.merged() if site.two_sided else site for name, site in statistics.items()}
    bits = 1.6 * T if signed else T  # log2 of the number of levels
    number = min(2048, max(256, 2 ** round(bits + 2)))  # four points a level, up to 512 levels
    points = [weighted_points(site, group, number) for site in statistics.values() for group in range(site.counts.shape[1])]
    x, weight, share = (torch.stack(part)[:, None] for part in zip(*points, strict=True))
    spike_weight = None
    if spike_weights and any(spike_weights.values()):
        each = [spike_weights.get(name, 0.0) for name, site in statistics.items() for _ in range(site.counts.shape[1])]
        spike_weight = share * torch.tensor(each, device=share.device)[:, None, None]
    maximum = group_maxima(statistics)
    objective = Objective(x=x, weight=weight, kernel=kernel, signed=signed, spike_weight=spike_weight)
    rounds = evolve_grains(objective, maximum, T=T, G=most, seed=seed, min_length=min_length, progress=progress)
    chosen = rounds[-1] if G else coarsest(rounds, tolerance)
    return assess_all(statistics, *chosen, signed=signed, spike_weights=spike_weights)


def gradient_search(
    statistics: Mapping[str, SiteStatistics],
    *,
    T: int,
    G: int | None,
    seed: int,
    schedule: Schedule,
    min_length: int = 2,
    tolerance: float = 0.02,
    progress: Callable[[int], None] = lambda groups: None,
) -> dict[str, CodeFit]:
    """The published search: arguments as for `search`, but exactly G grains, and `progress` as in `descend_grains`."""
    most = G or min(MAX_GRAINS, max(1, T // min_length))
    assignments(T, most, min_length=min_length)  # refuses early
    generator = torch.Generator().manual_seed(seed)
    groups = [(site, group) for site in statistics.values() for group in range(site.counts.shape[1])]
    samples = torch.stack([draw_samples(site, group, schedule.samples, generator) for site, group in groups])
    rounds = []
    for grains in (G,) if G else range(1, most + 1):
        codes, found = descend_grains(
            samples,
            group_maxima(statistics),
            T=T,
            G=grains,
            seed=seed,
            min_length=min_length,
            schedule=schedule,
            progress=progress,
        )
        rounds.append((codes.widened(most), found))
    return assess_all(statistics, *coarsest(rounds, tolerance))


def group_maxima(statistics: Mapping[str, SiteStatistics]) -> Float[Tensor, " N"]:
    """Largest activation of every neuron group, 1 where nothing but zeros passed."""
    maximum = torch.cat([site.maximum.amax(0) for site in statistics.values()])
    return torch.where(maximum > 0, maximum, 1.0)


def assess_all(
    statistics: Mapping[str, SiteStatistics],
    codes: Codes,
    found: Float[Tensor, " N"],
    *,
    signed: bool = False,
    spike_weights: Mapping[str, float] | None = None,
) -> dict[str, CodeFit]:
    """Codes and objectives of all groups in a row as one fit per site."""
    fits, start = {}, 0
    for name, site in statistics.items():
        rows = slice(start, start + site.counts.shape[1])
        start = rows.stop
        spike_weight = (spike_weights or {}).get(name, 0.0)
        fits[name] = CodeFit.assess(site, codes.at(rows), found[rows], signed=signed, spike_weight=spike_weight)
    return fits


def base2_search(statistics: Mapping[str, SiteStatistics], T: int) -> dict[str, CodeFit]:
    """The baseline: base 2 at every site, tau the largest activation of the site."""
    fits = {}
    for name, site in statistics.items():
        merged = site.merged()
        maximum = merged.maximum.amax(0)
        codes = base2_codes(torch.where(maximum > 0, maximum, 1.0), T)
        fits[name] = CodeFit.assess(merged, codes, torch.full_like(maximum, torch.nan))
    return fits


def coarsest(rounds: list[tuple[Codes, Tensor]], tolerance: float) -> tuple[Codes, Float[Tensor, " N"]]:
    """Per group the codes of the fewest grains whose objective is at most (1 + tolerance) times that of the most."""
    codes, found = rounds[-1]
    limit = (1 + tolerance) * found
    for fewer, error in reversed(rounds[:-1]):
        enough = error <= limit
        codes, found = fewer.where(enough, codes), torch.where(enough, error, found)
    return codes, found


def weighted_points(
    statistics: SiteStatistics, group: int, count: int, *, part: int = FIT
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"], Float[Tensor, " points"]]:
    """One group's density, of the fitting part if not told otherwise, in `count` points; ascending where they are used.

    Returns:
        positions; weights scaled so that sum weight x^2 = 1, an unused point weighs 0; shares of the group's neurons (zeros have
        no point).
    """
    weights = (statistics.counts if statistics.weights is None else statistics.weights)[part, group].double()
    used = weights > 0
    if not used.any():
        nothing = torch.zeros(count, device=weights.device)
        return nothing, nothing, nothing
    mass = weights[used]
    width = statistics.edges.double().diff()[used]
    center = statistics.centers.double()[used]
    parts = ((mass / width).pow(1 / 3) * width, mass, mass * center.square())
    # most points where levels belong, some for mass and energy
    measure = torch.stack([factor * part / part.sum() for factor, part in zip((0.7, 0.2, 0.1), parts, strict=True)]).sum(0)
    cell = ((measure.cumsum(0) - measure / 2) * count).long().clamp_(0, count - 1)
    total = torch.zeros(count, dtype=torch.float64, device=mass.device).index_add_(0, cell, mass)
    first = torch.zeros_like(total).index_add_(0, cell, mass * center)
    x = torch.where(total > 0, first / total.clamp_min(1e-300), 0.0)
    neurons = statistics.counts[part, group].double()
    share = torch.zeros_like(total).index_add_(0, cell, neurons[used]) / (neurons.sum() + statistics.zeros[part, group])
    return x.float(), (total / (total * x.square()).sum()).float(), share.float()


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
