"""Run calibration text through the model without neurons: prefix tokens, then the statistics of every site.

What an error counts. The residual stream r goes through an RMSNorm before anything reads it, which divides an error by the
stream's size: an error in the MLP's output counts 1 / (|r|^2 + |mlp(r)|^2). That is the importance at down_proj's input (R4 and
the weight spread errors evenly); at the activation it is multiplied by up^2, the factor on the error there. Without it a few
tokens with massive residuals, whose errors hardly matter, would set tau at both sites. An error of e_ij in the softmax moves the
output o_i by (v_j - o_i) / sum of the row, and counts by the square of that (`attention.py`). Ours.

Probabilities that are coded as they are (`snn.softmax_norm=before`) are added up along a row, and with them their errors: the mean error
counts as often as there are probabilities in the row (`code_fit.bias_weight`), for which the rows' lengths are kept.
"""

import logging
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.artifacts import read_json, write_json, write_tensors
from spikellm.attention import SpikingAttention
from spikellm.config import PrefixConfig
from spikellm.conversion import clear, model_sites, set_neuron, site_groups
from spikellm.prefix import attach_prefix, find_prefix_tokens, keep_what_helps
from spikellm.sites import (
    ACTIVATION,
    ATTENTION,
    DOWN,
    GROUP_AXIS,
    LAYERS,
    MLP,
    MLP_NORM,
    SPIKING_ATTENTION,
    UP,
    Site,
    SiteKind,
    decoder_layers,
)
from spikellm.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics

log = logging.getLogger(__name__)

# Attention has L^2 probabilities a head: every eighth query suffices for their distribution.
SOFTMAX_ROW_STRIDE = 8
# Where prefix tokens are looked for, windows and tokens of each: sinks arise at the start, and their number hardly varies.
PREFIX_WINDOWS, PREFIX_LENGTH = 4, 512
# The parts that windows go to, over and over: half of them are fitted to.
PERIOD = (FIT, CHOOSE, FIT, REPORT)
WEIGHTED_BY_RESIDUAL = (SiteKind.activation, SiteKind.mlp_product)
TWO_SIDED = (SiteKind.activation,)


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

    Windows go to the parts of the statistics in the order of `PERIOD`; windows too few for that are cut into pieces.

    Raises:
        ValueError: too little text for all parts, or a site saw NaN or infinite activations.
    """
    pieces = enough_pieces(windows)
    tokens: list[int] = []
    if prefix.enabled:
        bos = model.config.bos_token_id
        starts = windows[:PREFIX_WINDOWS, :PREFIX_LENGTH]
        tokens = find_prefix_tokens(model, starts, eta=prefix.eta, max_tokens=prefix.max_tokens, bos=bos)
        tokens = keep_what_helps(model, starts, tokens, eta=prefix.eta, text=windows[:PREFIX_WINDOWS])
        attach_prefix(model, tokens)
        log.info("calibrate: prefix tokens %s", tokens)
    observers = {site: _observer(model, site) for site in model_sites(model)}
    for site, observer in observers.items():
        set_neuron(model, site, observer)
    importances = [MlpImportance(layer) for layer in decoder_layers(model)]
    rows = {site.name: RowLengths(_attention(model, site)) for site in observers if site.kind is SiteKind.softmax}
    for piece, part in zip(tqdm(pieces, desc="calibrate", unit="window", disable=None), cycle(PERIOD), strict=False):
        for observer in observers.values():
            observer.part = part
        model.base_model(piece[None].to(model.device), use_cache=False)
    for watch in (*importances, *rows.values()):
        watch.remove()
    clear(model)
    statistics = {site.name: observer.result() for site, observer in observers.items()}
    statistics |= {name: replace(statistics[name], row_neurons=each.mean) for name, each in rows.items()}
    return Calibration(statistics=statistics, prefix_tokens=tokens)


def enough_pieces(windows: Int[Tensor, "W L"]) -> Int[Tensor, "P l"]:
    """At least as many pieces of text as `PERIOD` has, of one length: the windows, or equal cuts of them.

    Raises:
        ValueError: windows of fewer tokens than cuts.
    """
    number, length = windows.shape
    cuts = -(-len(PERIOD) // number)
    if length < cuts:
        raise ValueError(
            f"dataset.calibration.window={length}: {number} windows of it cannot be cut into {len(PERIOD)} pieces; take a longer text "
            f"or a larger dataset.calibration.window"
        )
    return windows[:, : length // cuts * cuts].reshape(number * cuts, -1)


def _observer(model: PreTrainedModel, site: Site) -> Observer:
    softmax = site.kind is SiteKind.softmax
    return Observer(
        site.name,
        groups=site_groups(model.config, site.kind),
        axis=GROUP_AXIS[site.kind],
        row_stride=SOFTMAX_ROW_STRIDE if softmax else 1,
        weighted=_attention(model, site).normalise_after if softmax else site.kind in WEIGHTED_BY_RESIDUAL,
        two_sided=site.kind in TWO_SIDED,
    )


def _attention(model: PreTrainedModel, site: Site) -> SpikingAttention:
    attention = model.get_submodule(f"{LAYERS}.{site.layer}.{ATTENTION}.{SPIKING_ATTENTION}")
    assert isinstance(attention, SpikingAttention)
    return attention


class RowLengths:
    """Hook on one attention that keeps how many keys a query sees, the mean over the pairs of both; None where no errors add up."""

    def __init__(self, attention: SpikingAttention) -> None:
        self.pairs = self.squares = 0
        self.handle = attention.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SpikingAttention)
        if module.normalise_after:
            return
        prefix = 0 if module.prefix_key is None else module.prefix_key.shape[1]
        keys = inputs[3].sum(-1) + prefix  # of the mask [B, 1, L, S]
        self.pairs += int(keys.sum())
        self.squares += int(keys.square().sum())

    @property
    def mean(self) -> float | None:
        # the squared errors of row sums, S mse + S^2 bias^2 of a row of S, added up over rows: relative weight sum S^2 / sum S
        return self.squares / self.pairs if self.pairs else None

    def remove(self) -> None:
        self.handle.remove()


class MlpImportance:
    """Hooks on one layer that tell the observers at its activation and its product what an error there counts."""

    def __init__(self, layer: Any) -> None:
        self.activation, self.product = layer.get_submodule(ACTIVATION), layer.get_submodule(DOWN)
        self.residual_power = self.up_power = torch.empty(0)
        self.handles = [
            layer.get_submodule(MLP_NORM).register_forward_pre_hook(self._keep_residual),
            layer.get_submodule(UP).register_forward_hook(self._keep_up),
            layer.get_submodule(MLP).register_forward_hook(self._weigh),
        ]

    def _keep_residual(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.residual_power = inputs[0].float().square().mean(-1, keepdim=True)

    def _keep_up(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.up_power = output.float().square()

    def _weigh(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        importance = 1 / (self.residual_power + output.float().square().mean(-1, keepdim=True))
        self.activation.neuron.weigh(importance * self.up_power)
        self.product.neuron.weigh(importance)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
