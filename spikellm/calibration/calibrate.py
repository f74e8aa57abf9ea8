"""Run calibration text through the model without neurons: prefix tokens, then the statistics of every site.

What an error counts. The residual stream r goes through an RMSNorm before anything reads it, which divides an error by the
stream's size: an error in the MLP's output counts 1 / (|r|^2 + |mlp(r)|^2). That is the importance at down_proj's input (R4 and
the weight spread errors evenly); at the activation it is multiplied by up^2, the factor on the error there. Without it a few
tokens with massive residuals, whose errors hardly matter, would set tau at both sites. An error of e_ij in the softmax moves the
output o_i by (v_j - o_i) / sum of the row, and counts by the square of that (`model/attention.py`). Ours.

Probabilities that are coded as they are (`snn.softmax_norm=before`) are added up along a row, and with them their errors: the mean error
counts as often as there are probabilities in the row (`fit.bias_weight`), for which the rows' lengths are kept.
"""

import logging
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.config.snn import PrefixConfig
from spikellm.model.attention import attending, attentions
from spikellm.model.blocks import Block, Row, enter
from spikellm.model.conversion import get_neuron, set_neuron, site_groups
from spikellm.model.passage import Keep, Passage, not_kept
from spikellm.model.prefix import attach_prefix, find_prefix_tokens, keep_what_helps, why_no_prefix
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import (
    ACTIVATION,
    DOWN,
    GROUP_AXIS,
    MLP,
    MLP_NORM,
    UP,
    Site,
    is_per_token,
)
from spikellm.store.artifacts import read_json, write_json, write_tensors

log = logging.getLogger(__name__)

# Attention has L^2 probabilities a head: every eighth query suffices for their distribution.
SOFTMAX_ROW_STRIDE = 8
# Queries per block while observing [tokens], whatever hardware.query_block says: another one rounds sums in another order, which
# carries activations over the edges of bins. A multiple of the stride, and 32 MiB a block at 32 heads and 2048 keys.
QUERY_BLOCK = 128
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
        """What `save` wrote into a folder."""
        tensors = load_file(folder / "statistics.safetensors")
        record = read_json(folder / "calibration.json")
        statistics = {name: SiteStatistics.from_tensors(tensors, name) for name in record["sites"]}
        return cls(statistics=statistics, prefix_tokens=record["prefix_tokens"])


def save_block(path: Path, found: Calibration) -> None:
    """Write what was found for one block, or before the first, to a file."""
    tensors: dict[str, Tensor] = {"prefix_tokens": torch.tensor(found.prefix_tokens, dtype=torch.int64)}
    for number, (name, site) in enumerate(found.statistics.items()):  # safetensors sorts what it holds
        tensors |= site.tensors(f"{number:03d} {name}")
    write_tensors(path, tensors)


def load_block(path: Path) -> Calibration:
    """What `save_block` wrote."""
    tensors = load_file(path)
    tokens = tensors.pop("prefix_tokens").tolist()
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return Calibration(statistics={name[4:]: SiteStatistics.from_tensors(tensors, name) for name in names}, prefix_tokens=tokens)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    prefix: PrefixConfig,
    *,
    amplitude: Amplitude = Amplitude.static,
    keep: Keep[Calibration] = not_kept,
    passage: Passage | None = None,
) -> Calibration:
    """Observe an installed model without neurons on `windows`; leaves it with its prefix and transparent slots.

    Windows go to the parts of the statistics in the order of `PERIOD`; windows too few for that are cut into pieces.

    Args:
        amplitude: of the neurons that are to come, see `conversion.fill`.
        keep, passage: where the prefix tokens, what finished blocks gave and the hidden states behind them are kept.

    Raises:
        ValueError: too little text for all parts, a prefix is asked for that the model cannot have, or a site saw NaN or infinite
            activations.
    """
    pieces = enough_pieces(windows)
    with attending(model, query_block=QUERY_BLOCK):

        def look() -> Calibration:
            return Calibration(statistics={}, prefix_tokens=_prefix_tokens(model, windows[:PREFIX_WINDOWS], prefix))

        tokens = keep("prefix", look).prefix_tokens if prefix.enabled else []
        attach_prefix(model, tokens)
        states, blocks = enter(model, pieces.split(1))
        passage = passage or Passage()
        finished, lying = passage.behind(len(blocks))
        try:
            found = [keep(block.name, _lost) for block in blocks.blocks[:finished]]
        except LookupError:  # somebody has taken findings of a block away, but not the states behind it
            finished, lying, found = 0, [], []
        for index in range(len(lying)):
            states[index] = lying[index].to(model.device)
        ahead = Row(blocks.blocks[finished:])
        for block in tqdm(ahead, desc="calibrate", unit="block", initial=finished, total=len(blocks), disable=None):
            passed: list[bool] = []

            def observe(block: Block = block, passed: list[bool] = passed) -> Calibration:
                passed.append(True)
                return Calibration(statistics=calibrate_block(model, block, states, amplitude=amplitude), prefix_tokens=tokens)

            found.append(keep(block.name, observe))
            if not passed:  # by whoever was killed before the states behind it were kept
                block.advance(states)
            passage.keep(len(found), states)
    return Calibration(statistics={name: site for each in found for name, site in each.statistics.items()}, prefix_tokens=tokens)


def _lost() -> Calibration:
    raise LookupError("the findings of a finished block are not there")


def calibrate_block(
    model: PreTrainedModel, block: Block, states: MutableSequence[Float[Tensor, "1 L D"]], *, amplitude: Amplitude = Amplitude.static
) -> dict[str, SiteStatistics]:
    """Take all windows through one block, in place, and return what its sites have seen, by name."""
    with observing(model, block, amplitude=amplitude) as observers:
        for index, part in zip(range(len(states)), cycle(PERIOD), strict=False):
            for observer in observers.values():
                observer.part = part
            states[index] = block(states[index])
    return {site.name: observer.result() for site, observer in observers.items()}


def part_windows(number: int, part: int) -> list[int]:
    """Those of so many windows that go to a part of the statistics."""
    return [index for index, each in zip(range(number), cycle(PERIOD), strict=False) if each == part]


def enough_pieces(windows: Int[Tensor, "W L"], *, option: str = "dataset.calibration.window") -> Int[Tensor, "P l"]:
    """The windows, or equal cuts of them where they are fewer than the parts of a `PERIOD`.

    Raises:
        ValueError: windows of fewer tokens than cuts; `option` names what sets their length.
    """
    number, length = windows.shape
    cuts = -(-len(PERIOD) // number)
    if length < cuts:
        raise ValueError(
            f"{option}={length}: {number} of it cannot be cut into the {len(PERIOD)} pieces that fitting, choosing and "
            f"reporting need; take a larger window"
        )
    return windows[:, : length // cuts * cuts].reshape(number * cuts, -1)


def _prefix_tokens(model: PreTrainedModel, text: Int[Tensor, "W L"], prefix: PrefixConfig) -> list[int]:
    if reason := why_no_prefix(model.config):  # before the search for it
        raise ValueError(f"{reason}; take prefix.enabled=false")
    bos, starts = model.config.bos_token_id, text[:, :PREFIX_LENGTH]
    tokens = find_prefix_tokens(model, starts, eta=prefix.eta, max_tokens=prefix.max_tokens, bos=bos)
    tokens = keep_what_helps(model, starts, tokens, eta=prefix.eta, text=text)
    log.info("calibrate: prefix tokens %s", tokens)
    return tokens


@contextmanager
def observing(model: PreTrainedModel, block: Block, *, amplitude: Amplitude = Amplitude.static) -> Iterator[dict[Site, Observer]]:
    """Within: an observer in every slot of a block; afterwards what was there before."""
    before = {site: get_neuron(model, site) for site in block.sites}
    observers = {site: _observer(model, site, amplitude) for site in block.sites}
    for site, observer in observers.items():
        set_neuron(model, site, observer)
    importance = None if block.layer is None else MlpImportance(block.module)
    try:
        yield observers
    finally:
        if importance is not None:
            importance.remove()
        for site, neuron in before.items():
            set_neuron(model, site, neuron)


def _observer(model: PreTrainedModel, site: Site, amplitude: Amplitude) -> Observer:
    softmax = site.kind is SiteKind.softmax
    return Observer(
        site.name,
        groups=site_groups(model.config, site.kind),
        axis=GROUP_AXIS[site.kind],
        row_stride=SOFTMAX_ROW_STRIDE if softmax else 1,
        held=softmax or site.kind in WEIGHTED_BY_RESIDUAL,
        summed=softmax and not attentions(model)[0].normalise_after,
        sides=2 if site.kind in TWO_SIDED else 1,
        per_token=is_per_token(site.kind, amplitude),
    )


class MlpImportance:
    """Hooks on one layer that tell the observers at its activation and its product what an error there counts."""

    def __init__(self, layer: nn.Module) -> None:
        self.activation: Any = layer.get_submodule(ACTIVATION)
        self.product: Any = layer.get_submodule(DOWN)
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
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
