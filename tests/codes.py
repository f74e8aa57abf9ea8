"""Tables, statistics and options from few words."""

import torch

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer
from spikellm.coding.grains import base2_amplitudes, default_v0
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Coding
from spikellm.config.labels import SiteKind
from spikellm.config.snn import SearchConfig, SpikingConfig
from spikellm.model.conversion import model_sites
from spikellm.search.options import Options


def base2_table(tau: float | list[float], T: int) -> PhaseTable:
    """Base 2 from one amplitude, or from one per group."""
    tau = torch.tensor(tau).view(-1)
    amplitudes = base2_amplitudes(tau, T)
    return PhaseTable(theta=amplitudes, h=amplitudes, d=amplitudes, v0=default_v0(tau, T))


def base2_tables(model, T: int = 6) -> dict[str, PhaseTable]:
    """A coarse code at every site of an installed model: neurons that visibly act."""
    return {site.name: base2_table(1.0 if site.kind is SiteKind.softmax else 4.0, T) for site in model_sites(model)}


def asked(T: int, G: int | None = 1, *, coding="phase", max_spikes=None, min_length=2, seed=0, **search) -> Options:
    """Options of codes, G=None being grain=auto; spikes cost nothing unless `spike_weight` says so, nothing is compiled."""
    grain = "auto" if G is None else str(G)
    snn = SpikingConfig(T=T, grain=grain, coding=Coding(coding), max_spikes=max_spikes, min_grain_length=min_length)
    return Options(snn=snn, search=SearchConfig(**{"spike_weight": 0.0} | search), seed=seed, compiled=False)


def observed(x: torch.Tensor, **options):
    """Statistics of x at one site, its first half the fitting part, its last quarter the reporting one; options of `Observer`."""
    observer = Observer("site", **options)
    for part, quarter in zip((FIT, FIT, CHOOSE, REPORT), x.chunk(4), strict=True):
        observer.part = part
        observer(quarter)
    return observer.result()
