"""How good the codes are, and where the error is: the Lloyd-Max bound, and the loss with one kind of site spiking alone.

The bound is the least squared error that any 2^T levels a neuron group can have on the site's density, whatever spikes could spell
them (Lloyd 1957, Max 1960; iterated from the level density p^(1/3) of Panter & Dite 1951, which is optimal for many levels). A phase
code spells sums of T numbers: its levels repeat the pattern of the small ones above each large one, so that on long tails it stays
well above the bound, however it is fitted.

Damage is measured, not estimated: perplexity with neurons at one kind of site, or at one site, and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.code_fit import CodeFit
from spikellm.conversion import clear, model_sites, place
from spikellm.evaluation import perplexity
from spikellm.neuron import PhaseTable, encode
from spikellm.search import weighted_points
from spikellm.sites import SiteKind
from spikellm.statistics import HELD_OUT, SiteStatistics

POINTS = 4096  # of a group's density
ITERATIONS = 100
WORST = 10  # sites that are measured alone


def lloyd_max(
    x: Float[Tensor, "N points"], weight: Float[Tensor, "N points"], levels: int, *, iterations: int = ITERATIONS
) -> tuple[Float[Tensor, "N levels"], Float[Tensor, " N"]]:
    """Levels of least weighted squared error on N densities, ascending, and that error.

    Args:
        x: ascending where weight > 0.
        weight: not negative; points of weight 0 are left out.
        levels: how many.
        iterations: of Lloyd's algorithm; the error falls in each.
    """
    x, weight = x.double(), weight.double()
    x = torch.where(weight > 0, x, 0.0).cummax(1).values
    width = x.diff(dim=1, prepend=torch.zeros_like(x[:, :1])).clamp_min(1e-30)
    ideal = torch.where(weight > 0, (weight / width).pow(1 / 3) * width, 0.0).cumsum(1)
    ideal = ideal / ideal[:, -1:].clamp_min(1e-300)
    middle = (torch.arange(levels, dtype=torch.float64, device=x.device) + 0.5) / levels
    index = torch.searchsorted(ideal, middle.expand(len(x), levels).contiguous()).clamp_max(x.shape[1] - 1)
    found = x.gather(1, index)
    for _ in range(iterations):
        cell = torch.searchsorted(((found[:, 1:] + found[:, :-1]) / 2).contiguous(), x)
        mass = torch.zeros_like(found).scatter_add_(1, cell, weight)
        moment = torch.zeros_like(found).scatter_add_(1, cell, weight * x)
        found = torch.where(mass > 0, moment / mass.clamp_min(1e-300), found).sort(1).values
    cell = torch.searchsorted(((found[:, 1:] + found[:, :-1]) / 2).contiguous(), x)
    error = (weight * (x - found.gather(1, cell)).square()).sum(1)
    return found.float(), error.float()


def bound(statistics: SiteStatistics, fit: CodeFit) -> float:
    """The Lloyd-Max bound of a site for 2^T levels a group, as `CodeFit.relative_error`: relative, on held-out data."""
    if len(fit.tau) < statistics.counts.shape[1]:
        statistics = statistics.merged()
    points = [weighted_points(statistics, group, POINTS, part=HELD_OUT) for group in range(len(fit.tau))]
    x, weight, _ = (torch.stack(part) for part in zip(*points, strict=True))
    _, error = lloyd_max(x, weight, 2 ** fit.assignment.shape[-1])
    power = fit.power.double()
    return ((error * power).sum() / power.sum()).item() if power.sum() > 0 else 0.0


def site_levels(table: PhaseTable, group: int, x: Float[Tensor, " n"]) -> Float[Tensor, " levels"]:
    """The values that the neurons of one group send for inputs x > 0, ascending."""
    row = slice(group, group + 1)
    one = PhaseTable(theta=table.theta[row], h=table.h[row], d=table.d[row], v0=table.v0[row], signed=table.signed)
    return encode(x[None, None], one, compiled=False).unique()


def damage(
    model: PreTrainedModel, fits: Mapping[str, CodeFit], windows: Int[Tensor, "W L"], *, compiled: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity with one kind of site spiking alone, and with one site alone.

    Args:
        model: installed, its prefix attached; it has no neurons afterwards.
        fits: codes of all sites.
        windows: evaluation text.
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
                place(model, site, fits[site.name].table, compiled=compiled)
        return perplexity(model, windows, label=label).value

    by_kind = {"none": measure("no neurons", set())}
    for kind in tqdm(list(SiteKind), desc="diagnose", unit="kind", disable=None):
        by_kind[kind.name] = measure(kind.name, {site.name for site in places if site.kind is kind})
    # a kind's loss, shared out among its sites by their relative errors, tells which to look at
    suspicion: dict[str, float] = {}
    for kind in SiteKind:
        names = [site.name for site in places if site.kind is kind]
        total = sum(fits[name].relative_error for name in names) or 1.0
        suspicion |= {name: max(0.0, by_kind[kind.name] - by_kind["none"]) * fits[name].relative_error / total for name in names}
    worst = sorted(suspicion, key=lambda name: -suspicion[name])[:WORST]
    by_site = {name: measure(name, {name}) for name in tqdm(worst, desc="diagnose", unit="site", disable=None)}
    clear(model)
    return by_kind, dict(sorted(by_site.items(), key=lambda item: -item[1]))


def site_rows(statistics: Mapping[str, SiteStatistics], fits: Mapping[str, CodeFit]) -> list[dict[str, Any]]:
    """One row per site: its relative errors, and how far they are above the bound."""
    rows = []
    for name, fit in tqdm(fits.items(), desc="Lloyd-Max bound", unit="site", disable=None):
        least = bound(statistics[name], fit)
        rows.append(
            {
                "name": name,
                "relative_error": fit.relative_error,
                "relative_error_base2": fit.relative_error_base2,
                "lloyd_max": least,
                "above_bound": fit.relative_error / least if least > 0 else None,
            }
        )
    return rows
