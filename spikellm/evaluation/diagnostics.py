"""How good the codes are, and where the error is: the Lloyd-Max bound, and the loss with one kind of site spiking alone.

The bound is the least squared error that any levels could have on the site's density, as many as the neurons of each group can send with
their own tables (2^T of binary digits, up to 3^T of signed ones, T + 1 of a rate or of one spike; those of all intervals together),
whatever spikes could spell them (Lloyd 1957, Max 1960; iterated from the level density p^(1/3) of Panter & Dite 1951, which is optimal
for many levels). Errors and bound are of the same points, the reporting part of the calibration text. A phase code spells sums of T
numbers: its levels repeat the pattern of the small ones above each large one, so that on long tails it stays well above the bound,
however it is fitted.

Damage is measured, not estimated: perplexity with neurons at one kind of site, or at one site, and nowhere else.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.calibration.statistics import REPORT, SiteStatistics
from spikellm.coding.neuron import PhaseTable, encode
from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.evaluation.perplexity import perplexity
from spikellm.kernels.encode import Digits, Rows
from spikellm.model.conversion import clear, model_sites, place
from spikellm.model.pretrained import PreTrainedModel
from spikellm.search.fit import CodeFit, part_points
from spikellm.store.record import Row

# Of the histogram, where it has least: with fewer points around each level, what levels could gain between them is lost (1.6 % at 8).
POINTS_PER_LEVEL = 8
SAME_LEVEL = 4  # digit strings of one level, on average, at most
ITERATIONS = 100
WORST = 10  # sites that are measured alone


def lloyd_max(
    x: Float[Tensor, "N points"],
    weight: Float[Tensor, "N points"],
    levels: int,
    *,
    start: Float[Tensor, "N levels"] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Float[Tensor, "N levels"], Float[Tensor, " N"]]:
    """Levels of least weighted squared error on N densities, ascending, and that error.

    Args:
        x: ascending where weight > 0.
        weight: not negative; points of weight 0 are left out.
        levels: how many.
        start: where the descent starts, ascending; None: levels of the density p^(1/3).
        iterations: of Lloyd's algorithm; the error falls in each.
    """
    x, weight = x.double(), weight.double()
    x = torch.where(weight > 0, x, 0.0).cummax(1).values
    if start is None:
        middle = (torch.arange(levels, dtype=torch.float64, device=x.device) + 0.5) / levels
        index = torch.searchsorted(_level_density(x, weight).cumsum(1), middle.expand(len(x), levels).contiguous())
        start = x.gather(1, index.clamp_max(x.shape[1] - 1))
    found = start.double()
    # cells are runs of points: differences of sums up to their ends
    mass, moment = (nn.functional.pad(each.cumsum(1), (1, 0)) for each in (weight, weight * x))
    for _ in range(iterations):
        ends = nn.functional.pad(torch.searchsorted(x, _borders(found)), (1, 0))
        ends = torch.cat([ends, torch.full_like(ends[:, :1], x.shape[1])], 1)
        own = mass.gather(1, ends).diff(dim=1)
        found = torch.where(own > 0, moment.gather(1, ends).diff(dim=1) / own.clamp_min(1e-300), found)
    cell = torch.searchsorted(_borders(found), x)
    error = (weight * (x - found.gather(1, cell)).square()).sum(1)
    return found.float(), error.float()


def _borders(levels: Float[Tensor, "N levels"]) -> Float[Tensor, "N borders"]:
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def _level_density(x: Float[Tensor, "N points"], weight: Float[Tensor, "N points"]) -> Float[Tensor, "N points"]:
    """The share of many optimal levels that falls to each point: p^(1/3) times its width."""
    width = x.diff(dim=1, prepend=torch.zeros_like(x[:, :1])).clamp_min(1e-30)
    ideal = torch.where(weight > 0, (weight / width).pow(1 / 3) * width, 0.0)
    return ideal / ideal.sum(1, keepdim=True).clamp_min(1e-300)


def bound(statistics: SiteStatistics, fit: CodeFit) -> float | None:
    """The Lloyd-Max bound of a site for as many levels as each group's code has; relative, and on the points that errors are reported on.

    Lloyd's algorithm finds a local optimum. It starts from the density p^(1/3) and from the code's own levels, so that what comes
    out is never above the code's error.

    Returns:
        None where levels are too many for the histogram to tell how well they could lie (`POINTS_PER_LEVEL`).
    """
    statistics = fit.seen(statistics)
    x, weight, _ = part_points(statistics, REPORT)
    # the points around a level, harmonic mean over the levels that p^(1/3) would place
    points = 1 / _level_density(x.double(), weight.double()).square().sum(1).clamp_min(1e-300)
    error = torch.zeros(len(x))
    for row in weight.sum(1).nonzero().flatten().tolist():
        levels = spelled_levels(fit.table, row, most=int(points[row]) // POINTS_PER_LEVEL)
        if levels is None:
            return None
        own = slice(row, row + 1)
        starts = (None, levels[None].to(x.device))
        error[row] = min(lloyd_max(x[own], weight[own], len(levels), start=start)[1].item() for start in starts)
    power = fit.power.double().sum().item()
    return error.double().sum().item() / power if power > 0 else 0.0


def spelled_levels(table: PhaseTable, row: int, *, most: int) -> Float[Tensor, " levels"] | None:
    """All values that the neurons of one group and side send for inputs of that side, ascending; None if they are more than `most`.

    Args:
        row: side * groups + group: the histogram's row.
    """
    digits, rows = table.digits, table.rows.map(lambda rows: rows.double().cpu())
    ends = [0.0, *([] if table.cuts is None else table.cuts[:, row].tolist()), torch.inf]
    found = []
    for interval in range(int(table.intervals.flatten()[row])):
        own = rows.at(interval * digits.sides * table.groups + row)
        part = _interval_levels(own, digits, ends[interval], ends[interval + 1], most=SAME_LEVEL * most)
        if part is None:
            return None
        found.append(part)
    ascending = torch.cat(found).unique()
    # sums of the same spikes in another order differ in the last digits
    apart = ascending.diff(prepend=ascending[:1] - 1) > 1e-9 * rows.d.abs().max()
    return ascending[apart].float() if apart.sum() <= most else None


def _interval_levels(rows: Rows, digits: Digits, start: float, end: float, *, most: int) -> Float[Tensor, " strings"] | None:
    """What one population sends for inputs start < x <= end, a value for each digit string; None if these are more than `most`.

    An interval of inputs that have fired alike is cut at the thresholds of the next phase.
    """
    theta, h, d, v0 = rows
    T = len(theta)
    low, high = theta.new_full((1,), start), theta.new_full((1,), end)
    potential, y, fired = v0.view(1), torch.zeros_like(low), torch.zeros_like(low)  # v - x
    for t in range(T):
        awake = fired < (T if digits.max_spikes is None else digits.max_spikes)
        upper = torch.where(awake, theta[t] - potential, torch.inf)
        lower = torch.where(awake & digits.signed, -theta[t] - potential, -torch.inf)
        cuts = (
            (1, torch.maximum(low, upper), high),
            (0, torch.maximum(low, lower), torch.minimum(high, upper)),
            (-1, low, torch.minimum(high, lower)),
        )
        pieces = [
            (start[kept], stop[kept], potential[kept] - z * h[t], y[kept] + z * d[t], fired[kept] + abs(z))
            for z, start, stop in cuts
            for kept in [stop > start]
        ]
        low, high, potential, y, fired = (torch.cat(part) for part in zip(*pieces, strict=True))
        if len(y) > most:
            return None
    return y


def site_levels(table: PhaseTable, group: int, x: Float[Tensor, " n"]) -> Float[Tensor, " levels"]:
    """The values that the neurons of one group send for these inputs x > 0, ascending."""
    return encode(x[None, None], table.group(group), compiled=False).unique()


def damage(
    model: PreTrainedModel,
    tables: Mapping[str, PhaseTable],
    relative_error: Mapping[str, float],
    windows: Int[Tensor, "W L"],
    *,
    amplitude: Amplitude = Amplitude.static,
    compiled: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity with one kind of site spiking alone, and with one site alone.

    Args:
        model: installed, its prefix attached; it has no neurons afterwards.
        tables: codes of all sites.
        relative_error: of these codes, by site.
        windows: evaluation text.
        amplitude: see `conversion.fill`.
        compiled: see `neuron.encode`.

    Returns:
        by kind, "none" being the model without neurons; by site, the `WORST` sites: first those of the largest relative error
        within each kind, of the more harmful kinds more.
    """
    places = model_sites(model)

    def measure(label: str, chosen: set[str]) -> float:
        clear(model)
        for site in places:
            if site.name in chosen:
                place(model, site, tables[site.name], amplitude=amplitude, compiled=compiled)
        return perplexity(model, windows, label=label).value

    by_kind = {"none": measure("no neurons", set())}
    for kind in tqdm(list(SiteKind), desc="diagnose", unit="kind", disable=None):
        by_kind[kind.name] = measure(kind.name, {site.name for site in places if site.kind is kind})
    # a kind's loss, shared out among its sites by their relative errors, tells which to look at
    suspicion: dict[str, float] = {}
    for kind in SiteKind:
        names = [site.name for site in places if site.kind is kind]
        total = sum(relative_error[name] for name in names) or 1.0
        suspicion |= {name: max(0.0, by_kind[kind.name] - by_kind["none"]) * relative_error[name] / total for name in names}
    worst = sorted(suspicion, key=lambda name: -suspicion[name])[:WORST]
    by_site = {name: measure(name, {name}) for name in tqdm(worst, desc="diagnose", unit="site", disable=None)}
    clear(model)
    return by_kind, dict(sorted(by_site.items(), key=lambda item: -item[1]))


def site_rows(statistics: Mapping[str, SiteStatistics], fits: Mapping[str, CodeFit]) -> list[Row]:
    """One row per site: its relative errors, and how far the code's is above the bound, where there is one."""
    rows = []
    for name, fit in tqdm(fits.items(), desc="Lloyd-Max bound", unit="site", disable=None):
        least = bound(statistics[name], fit)
        rows.append(
            {
                "name": name,
                "relative_error": fit.relative_error,
                "relative_error_base2": fit.relative_error_base2,
                "lloyd_max": least,
                "above_bound": fit.relative_error / least if least else None,
            }
        )
    return rows
