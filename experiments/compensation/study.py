"""Weights re-fitted in closed form behind coded inputs: what is left of a Linear's error, of its block's, and of perplexity's excess.

    python experiments/compensation/study.py layers|networks [OVERRIDE ..]

Overrides are those of main.py. What is in output_root already is not computed again. Prints a table of README.md.

layers     other Linears, targets t and lambdas than `spikellm/reconstruction/compensation.py` has, each alone. Errors are quadratic in
           the new weight, so that sums over windows are all that is kept of them
networks   whole jobs, with compensate.enabled=true for some choices of Linears and without
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from spikellm.config.choices import CompensatedLinear
from spikellm.config.labels import SiteKind
from spikellm.cores import threads
from spikellm.evaluation.texts import token_windows
from spikellm.model.blocks import Block, enter
from spikellm.model.replaced import replace_weights
from spikellm.model.sites import DOWN, GATE, KEY, OUTPUT, QUERY, READERS, UP, VALUE
from spikellm.reconstruction.compensation import WRITERS, ridge, seeing
from spikellm.reconstruction.streams import keeping, stream_error, without_neurons
from spikellm.reconstruction.tuned import Weights
from spikellm.run.command import compose_config
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.stages import run_stages
from spikellm.run.workspace import Workspace

log = logging.getLogger("compensation")

ONE_INTERVAL = ["snn.intervals=1", "grain=1", "search.spike_weight=0"]
CODES = {"T=4 signed": ["snn.T=4", "snn.coding=phase_signed"], "T=5 binary": ["snn.T=5", "snn.coding=phase"]}
GROUPS = {"q, k": (QUERY, KEY), "v": (VALUE,), "o": (OUTPUT,), "gate, up": (GATE, UP), "down": (DOWN,)}

WINDOW = 512
FIT, CHOOSE, HELD, OTHER = "fit", "choose", "held out", "other text"
# Windows of the calibration text. What is held out lies behind the 32 windows that the codes of README.md were fitted to.
OWN_PARTS = {FIT: range(16), CHOOSE: range(24, 27), HELD: range(32, 35)}
OTHERS = 3  # windows of the evaluation text
PROBED = (HELD, OTHER)  # whose windows run through the block again
LAYERS_SHOWN = 6

LINEARS: tuple[tuple[str, ...], ...] = ((), ("o",), ("o", "gate", "up"), ("o", "gate", "up", "down"))
KIND = {name: kind for kind, names in READERS.items() for name in names}

LAMBDAS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
# What W' y shall be: W x on the spiking stream or on the ANN's, and what share of the residual stream's difference beside it.
TARGETS = {"own": (False, 0.0), "ANN": (True, 0.0), "ANN + d/4": (True, 0.25), "ANN + d/2": (True, 0.5), "ANN + d": (True, 1.0)}
BY_ROW, BY_COLUMN = "ANN, a factor a row", "ANN, a factor a column"


class Moments:
    """Sums over tokens of what a Linear reads: coded y, uncoded x on either stream, d the ANN's residual stream less the spiking one's."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, coded: Float[Tensor, "N I"], own: Float[Tensor, "N I"], ann: Float[Tensor, "N I"], behind: Tensor | None) -> None:
        """Tokens of a window."""
        self._add(yy=coded.T @ coded, own=own.T @ coded, ann=ann.T @ coded, power=ann.T @ ann)
        if behind is not None:
            self._add(dy=behind.T @ coded, dx=behind.T @ ann, dd=behind.square().sum())

    def _add(self, **sums: Tensor) -> None:
        for name, each in sums.items():
            self.sums[name] = self.sums[name] + each.double()

    @property
    def writes(self) -> bool:
        """Whether the Linear adds to the residual stream."""
        return "dy" in self.sums

    def targets(self, weight: Float[Tensor, "O I"], ann: bool, share: float) -> Float[Tensor, "O I"]:
        """C_ty."""
        wanted = weight @ self.sums["ann" if ann else "own"]
        return wanted + share * self.sums["dy"] if share else wanted

    def power(self, weight: Float[Tensor, "O I"]) -> Tensor:
        """Squares of what the Linear should give: W x of the ANN, and with d what the residual stream lacks."""
        power = ((weight @ self.sums["power"]) * weight).sum()
        return power + 2 * (weight * self.sums["dx"]).sum() + self.sums["dd"] if self.writes else power

    def error(self, weight: Float[Tensor, "O I"], found: Float[Tensor, "O I"]) -> float:
        """Squared error of W' y against that."""
        wanted = self.targets(weight, True, 1.0 if self.writes else 0.0)
        return (((found @ self.sums["yy"]) * found).sum() - 2 * (found * wanted).sum() + self.power(weight)).item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A block between its windows, and the moments of what its Linears read, by site and part."""

    block: Block
    parts: Mapping[str, Sequence[int]]
    states: list[Tensor]  # that come in on the spiking stream
    outputs: list[Tensor]
    wanted: list[Tensor]  # outputs on the ANN's stream
    moments: Mapping[tuple[SiteKind, str], Moments]

    def weight(self, name: str) -> Float[Tensor, "O I"]:
        """Of a Linear as it is, float64."""
        return self.block.module.get_parameter(f"{name}.weight").double()

    def error(self, model: PreTrainedModel, part: str, weights: Weights) -> float:
        """Relative squared error of the block's output against the ANN's stream, with other weights in it."""
        with keeping(model, self.block):
            replace_weights(self.block.module, {name: weight.to(model.dtype) for name, weight in weights.items()})
            return stream_error(self.block, self.states, self.wanted, list(self.parts[part]))


def observe(model: PreTrainedModel, block: Block, states: list[Tensor], before: list[Tensor], parts: Mapping[str, Sequence[int]]) -> Layer:
    """Take both streams through a block, and look at its Linears' sites.

    Tokens count by 1 over the square of the residual stream behind a Linear that adds to it, as the next norm divides by that.
    """
    moments: dict[tuple[SiteKind, str], Moments] = defaultdict(Moments)
    outputs, wanted, kinds = [], [], list(READERS)
    for part, windows in parts.items():
        for index in windows:
            with without_neurons(model, block), seeing(model, block, kinds) as ann:
                wanted.append(block(before[index]))
            with seeing(model, block, kinds) as own:
                outputs.append(block(states[index]))
            behind = {SiteKind.attention_output: ann.middle, SiteKind.mlp_product: wanted[-1][0]}
            beside = {SiteKind.attention_output: (before[index] - states[index])[0], SiteKind.mlp_product: ann.middle - own.middle}
            for kind in kinds:
                rows, lacks = [own.sent[kind], own.given[kind], ann.given[kind]], None
                if kind in WRITERS:
                    weight = behind[kind].square().sum(-1, keepdim=True).rsqrt()
                    rows, lacks = [each * weight for each in rows], beside[kind] * weight
                moments[kind, part].add(rows[0], rows[1], rows[2], lacks)
    return Layer(block=block, parts=parts, states=states, outputs=outputs, wanted=wanted, moments=moments)


def candidates(moments: Moments, weight: Float[Tensor, "O I"], target: str) -> list[Float[Tensor, "O I"]]:
    """What a weight might become: one matrix for every lambda, or one where there is none."""
    if target in TARGETS:
        return [ridge(weight, moments.sums["yy"], moments.targets(weight, *TARGETS[target]), each) for each in LAMBDAS]
    if target == BY_COLUMN:
        return [weight * (moments.sums["ann"].diagonal() / moments.sums["yy"].diagonal())]
    rows = (moments.targets(weight, True, 0.0) * weight).sum(1) / ((weight @ moments.sums["yy"]) * weight).sum(1)
    return [weight * rows[:, None]]


def choose(layer: Layer, group: str, target: str) -> tuple[Weights, list[float]]:
    """The weights of a group of Linears, by name, and their lambdas, each by the error of the Linear on the choosing part."""
    found: Weights = {}
    scales = []
    for name in GROUPS[group]:
        weight, (fit, chooser) = layer.weight(name), (layer.moments[KIND[name], part] for part in (FIT, CHOOSE))
        offered = candidates(fit, weight, target)
        errors = [chooser.error(weight, each) for each in offered]
        best = errors.index(min(errors))
        found[name] = offered[best]
        scales += [LAMBDAS[best]] if target in TARGETS else []
    return found, scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A correction of a group of Linears in a layer: errors over those with the weights as they are, by part."""

    group: str
    target: str
    scales: list[float]
    linear: dict[str, float]  # mean of the Linears
    block: dict[str, float]


def compare(model: PreTrainedModel, layer: Layer) -> Iterator[Row]:
    """Every correction of every group of Linears, each alone."""
    before = {part: layer.error(model, part, {}) for part in PROBED}
    for group, target in product(GROUPS, (*TARGETS, BY_ROW, BY_COLUMN)):
        kind = KIND[GROUPS[group][0]]
        if kind not in WRITERS and target in TARGETS and TARGETS[target][1]:
            continue  # nothing is added to the residual stream
        found, scales = choose(layer, group, target)
        linear = {}
        for part in layer.parts:
            moments = layer.moments[kind, part]
            plain = {name: layer.weight(name) for name in found}
            ratios = [moments.error(plain[name], new) / moments.error(plain[name], plain[name]) for name, new in found.items()]
            linear[part] = sum(ratios) / len(ratios)
        block = {part: layer.error(model, part, found) / before[part] for part in PROBED}
        yield Row(group=group, target=target, scales=scales, linear=linear, block=block)


@torch.no_grad()
def first_layers(work: Workspace) -> list[list[Row]]:
    """`compare` in the first layers, the stream itself never corrected."""
    windows, parts = study_windows(work)
    model = spiking(work)
    entered, blocks = enter(model, windows.split(1))
    states, wanted, found = list(entered), list(entered), []
    for block in islice(blocks.layers, LAYERS_SHOWN):
        layer = observe(model, block, states, wanted, parts)
        found.append(list(compare(model, layer)))
        states, wanted = layer.outputs, layer.wanted
        log.info("layer %d", block.layer)
    return found


def spiking(work: Workspace) -> PreTrainedModel:
    """The network whose weights are as they are."""
    tables = {name: fit.table for name, fit in SEARCH.found(work).items()}
    return work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens)


def study_windows(work: Workspace) -> tuple[Int[Tensor, "W L"], dict[str, Sequence[int]]]:
    """Windows of both texts, and which of them are of what part."""
    config = work.config.dataset
    last = max(index for part in OWN_PARTS.values() for index in part)
    own = token_windows(replace(config.calibration, window=WINDOW, max_windows=last + 1), "dataset.calibration", work.tokenizer)
    other = token_windows(replace(config.evaluation, window=WINDOW, max_windows=OTHERS), "dataset.evaluation", work.tokenizer)
    pieces = {OTHER: other} | {part: own[list(indices)] for part, indices in OWN_PARTS.items()}
    ends = list(accumulate(len(each) for each in pieces.values()))
    return torch.cat(list(pieces.values())), {
        part: range(end - len(each), end) for (part, each), end in zip(pieces.items(), ends, strict=True)
    }


def by_layer(work: Workspace) -> Iterator[list[str]]:
    """Rows of the table by layer."""
    for rows in zip(*first_layers(work), strict=True):
        scales = [scale for row in rows for scale in row.scales]
        span = f"{min(scales):g} to {max(scales):g}" if scales else ""
        cells = [sum(row.linear[part] for row in rows) / len(rows) for part in (FIT, HELD, OTHER)]
        cells += [sum(row.block[part] for row in rows) / len(rows) for part in PROBED]
        yield [rows[0].group, rows[0].target, span, *(f"{cell:.3f}" for cell in cells)]


def by_network(work: Workspace) -> Iterator[list[str]]:
    """Rows of the table of networks."""
    for linears in LINEARS:
        switch = replace(work.config.compensate, enabled=bool(linears), linears=list(map(CompensatedLinear, linears or ("o",))))
        results = run_stages(replace(work.config, compensate=switch)).results
        assert results.perplexity is not None
        found, cells = results.perplexity.networks, [""] * 3
        if (said := results.compensate) is not None:
            cells = [f"{said.relative_error_before:.4g} -> {said.relative_error:.4g}", f"{said.blocks_improved} of {said.blocks}"]
            cells.append(str(said.weights_refitted))
        yield [", ".join(linears) or "none", f"{found['snn'] / found['ann_prefix']:.4f}", *cells]


TABLES = {
    "layers": (("Linears", "target", "lambda", "Linear: fitted", "held out", "other text", "block: held out", "other text"), by_layer),
    "networks": (
        ("re-fitted", "perplexity / ANN", "error at blocks' outputs", "blocks improved", "weights re-fitted"),
        by_network,
    ),
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    headings, rows = TABLES[sys.argv[1]]
    for name, code in CODES.items():
        work = Workspace(compose_config([*ONE_INTERVAL, *sys.argv[2:], *code]))
        with threads(work.config.hardware.threads):
            lines = ["| " + " | ".join(row) + " |" for row in rows(work)]
        print(f"\n{name}\n\n| " + " | ".join(headings) + " |\n|" + " --- |" * len(headings) + "\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
