"""Run calibration text through the model without neurons: prefix tokens, then the statistics of every site."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.artifacts import read_json, write_json, write_tensors
from spikellm.config import PrefixConfig
from spikellm.conversion import clear, model_sites, set_neuron, site_groups
from spikellm.prefix import attach_prefix, find_prefix_tokens
from spikellm.sites import GROUP_AXIS, Site, SiteKind
from spikellm.statistics import FIT, HELD_OUT, Observer, SiteStatistics

log = logging.getLogger(__name__)

# Attention has L^2 probabilities a head: every eighth query suffices for their distribution.
SOFTMAX_ROW_STRIDE = 8
# Windows on which prefix tokens are looked for: their count per window hardly varies.
PREFIX_WINDOWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What calibration found: statistics by site name, in the order in which a token meets them; prefix tokens."""

    statistics: dict[str, SiteStatistics]
    prefix_tokens: list[int]

    def save(self, folder: Path) -> None:
        """Write to `folder`; `load` reads it back."""
        tensors: dict[str, Tensor] = {}
        for name, site in self.statistics.items():
            tensors |= site.tensors(name)
        write_tensors(folder / "statistics.safetensors", tensors)
        write_json(folder / "calibration.json", {"prefix_tokens": self.prefix_tokens, "sites": list(self.statistics)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        tensors = load_file(folder / "statistics.safetensors")
        record = read_json(folder / "calibration.json")
        statistics = {name: SiteStatistics.from_tensors(tensors, name) for name in record["sites"]}
        return cls(statistics=statistics, prefix_tokens=record["prefix_tokens"])


@torch.no_grad()
def calibrate(model: PreTrainedModel, windows: Int[Tensor, "W L"], prefix: PrefixConfig) -> Calibration:
    """Observe an installed model without neurons on `windows`; leaves it with its prefix and transparent slots.

    Windows go alternately to the fitting and the held-out part; a single window is cut in two.

    Raises:
        ValueError: a site saw NaN or infinite activations.
    """
    if len(windows) == 1:
        half = windows.shape[1] // 2
        windows = windows[0, : 2 * half].view(2, half)
    tokens: list[int] = []
    if prefix.enabled:
        bos = model.config.bos_token_id
        tokens = find_prefix_tokens(model, windows[:PREFIX_WINDOWS], eta=prefix.eta, max_tokens=prefix.max_tokens, bos=bos)
        attach_prefix(model, tokens)
        log.info("calibrate: prefix tokens %s", tokens)
    observers = {site: _observer(model, site) for site in model_sites(model)}
    for site, observer in observers.items():
        set_neuron(model, site, observer)
    for index, window in enumerate(tqdm(windows, desc="calibrate", unit="window", disable=None)):
        for observer in observers.values():
            observer.part = HELD_OUT if index % 2 else FIT
        model.base_model(window[None].to(model.device), use_cache=False)
    clear(model)
    return Calibration(statistics={site.name: observer.result() for site, observer in observers.items()}, prefix_tokens=tokens)


def _observer(model: PreTrainedModel, site: Site) -> Observer:
    softmax = site.kind is SiteKind.softmax
    return Observer(
        site.name,
        groups=site_groups(model.config, site.kind),
        axis=GROUP_AXIS[site.kind],
        row_stride=SOFTMAX_ROW_STRIDE if softmax else 1,
        causal=softmax,
    )
