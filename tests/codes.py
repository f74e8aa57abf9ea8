"""Tables, statistics and options from few words."""

from dataclasses import replace

import torch

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer
from spikellm.coding.grains import base2_amplitudes, default_v0
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Coding
from spikellm.config.labels import SiteKind
from spikellm.config.snn import SearchConfig, SpikingConfig
from spikellm.kernels.encode import Digits, Rows
from spikellm.model.conversion import model_sites, site_groups
from spikellm.search.options import Options


def base2_table(tau: float | list[float], T: int) -> PhaseTable:
    """Base 2 from one amplitude, or from one per group."""
    tau = torch.tensor(tau).view(-1)
    amplitudes = base2_amplitudes(tau, T)
    return PhaseTable(theta=amplitudes, h=amplitudes, d=amplitudes, v0=default_v0(tau, T))


def base2_tables(model, T: int = 6) -> dict[str, PhaseTable]:
    """A coarse code at every site of an installed model: neurons that visibly act."""
    return {site.name: base2_table(1.0 if site.kind is SiteKind.softmax else 4.0, T) for site in model_sites(model)}


def spoilt_tables(model, factor: float = 0.6, T: int = 4) -> dict[str, PhaseTable]:
    """Codes of too small an amplitude."""
    return {name: PhaseTable(*(part * factor for part in table.rows)) for name, table in base2_tables(model, T).items()}


PARTITIONS = (
    Digits(intervals=2),
    Digits(intervals=3, signed=True),
    Digits(sides=2, signed=True),
    Digits(),
    Digits(intervals=2, sides=2, max_spikes=2),
    Digits(intervals=3, sides=2, signed=True),
    Digits(signed=True),
)


def partitioned_table(tau: list[float], T: int, digits: Digits, *, seed: int = 0, unused: bool = False) -> PhaseTable:
    """A random table for every population and every amplitude's group; unused: the first group has no use for its last interval."""
    generator = torch.Generator().manual_seed(seed)
    rows = Rows(*(part.repeat(digits.populations, *[1] * (part.ndim - 1)) for part in base2_table(tau, T).rows))
    rows = rows.map(lambda part: part * (0.6 + 0.6 * torch.rand(part.shape, generator=generator)))
    if digits.intervals == 1:
        return PhaseTable(*rows, digits=digits)
    fractions = torch.rand(digits.intervals - 1, digits.sides * len(tau), generator=generator).cumsum(0) / digits.intervals
    cuts = fractions * torch.tensor(tau).repeat(digits.sides)
    if unused:
        cuts[-1, :: len(tau)] = torch.finfo(torch.float32).max
        last = digits.sides * (digits.intervals - 1) * len(tau)
        rows.d[last :: len(tau)] = 0
    return PhaseTable(*rows, digits=digits, cuts=cuts)


def partitioned_tables(model, T: int, *, shift: int = 0, heads: bool = False, unused: bool = False) -> dict[str, PhaseTable]:
    """Site by site another of PARTITIONS; heads: a table for each of them; unused: see `partitioned_table`."""
    found = {}
    for index, site in enumerate(model_sites(model)):
        groups = site_groups(model.config, site.kind) if heads else 1
        tau = [(1.0 if site.kind is SiteKind.softmax else 4.0) * (1 + 0.1 * group) for group in range(groups)]
        digits = PARTITIONS[(index + shift) % len(PARTITIONS)]
        if site.kind is SiteKind.softmax:
            digits = replace(digits, signed=False)
        found[site.name] = partitioned_table(tau, T, digits, seed=index, unused=unused)
    return found


def asked(T: int, G: int | None = 1, *, coding="phase", max_spikes=None, min_length=2, intervals=1, seed=0, **search) -> Options:
    """Options of codes, G=None being grain=auto; spikes cost nothing unless `spike_weight` says so."""
    grain = "auto" if G is None else str(G)
    shape = {"coding": Coding(coding), "max_spikes": max_spikes, "min_grain_length": min_length, "intervals": str(intervals)}
    snn = SpikingConfig(T=T, grain=grain, **shape)
    return Options(snn=snn, search=SearchConfig(**{"spike_weight": 0.0} | search), seed=seed)


def observed(x: torch.Tensor, **options):
    """Statistics of x at one site, its first half the fitting part, its last quarter the reporting one; options of `Observer`."""
    observer = Observer("site", **options)
    for part, quarter in zip((FIT, FIT, CHOOSE, REPORT), x.chunk(4), strict=True):
        observer.part = part
        observer(quarter)
    return observer.result()
