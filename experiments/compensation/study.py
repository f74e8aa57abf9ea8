"""Weights re-fitted in closed form behind coded inputs, layer by layer: what is left of a Linear's error, and of its block's.

    python experiments/compensation/study.py layers|networks [OVERRIDE ..]

Overrides are those of main.py. Calibration and codes are taken from output_root where they are there. Prints a table of README.md.

A Linear that reads coded inputs y in place of x gets W' = (C_ty + lambda W) (C_yy + lambda I)^-1, the ridge regression towards W of
targets t on y: C_yy = sum y y^T, C_ty = sum t y^T over the windows that are fitted to, lambda in units of the mean of C_yy's diagonal.
Errors are quadratic in W', so that sums over windows are all that is kept of them.
"""

import logging
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import PreTrainedModel

from spikellm.config.labels import SiteKind
from spikellm.cores import threads
from spikellm.evaluation.texts import token_windows
from spikellm.execution.memory import LOGIT_ROWS
from spikellm.model.blocks import Block, enter, output_error, walk
from spikellm.model.conversion import get_neuron
from spikellm.model.replaced import replace_weights
from spikellm.model.sites import DOWN, GATE, HEAD, KEY, MLP_NORM, OUTPUT, QUERY, READERS, UP, VALUE
from spikellm.reconstruction.tuning import without_neurons
from spikellm.run.command import compose_config
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.workspace import Workspace

log = logging.getLogger("compensation")

ONE_INTERVAL = ["snn.intervals=1", "grain=1", "search.spike_weight=0"]
CODES = {"T=4 signed": ["snn.T=4", "snn.coding=phase_signed"], "T=5 binary": ["snn.T=5", "snn.coding=phase"]}
GROUPS = {"q, k": (QUERY, KEY), "v": (VALUE,), "o": (OUTPUT,), "gate, up": (GATE, UP), "down": (DOWN,)}
WRITERS = (SiteKind.attention_output, SiteKind.mlp_product)  # sites of Linears that add to the residual stream

WINDOW = 512
FIT, CHOOSE, HELD, OTHER = "fit", "choose", "held out", "other text"
# Windows of the calibration text. What is held out lies behind the 32 windows that the codes of README.md were fitted to.
OWN_PARTS = {FIT: range(16), CHOOSE: range(24, 27), HELD: range(32, 35)}
OTHERS = 3  # windows of the evaluation text
PROBED = (HELD, OTHER)  # whose windows run through the block again
LAYERS_SHOWN = 6
Weights = dict[str, Tensor]  # by name of a Linear below its layer

PLANS: dict[str, dict[str, str]] = {"nothing": {}, "o, gate, up": {"o": "ANN + d/2", "gate, up": "ANN"}}
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

    def ridge(self, weight: Float[Tensor, "O I"], wanted: Float[Tensor, "O I"]) -> list[Float[Tensor, "O I"]]:
        """W' for every lambda."""
        gram, found = self.sums["yy"], []
        for scale in (each * gram.diagonal().mean() for each in LAMBDAS):
            factor = torch.linalg.cholesky(gram + scale * torch.eye(len(gram), dtype=gram.dtype))
            found.append(torch.cholesky_solve((wanted + scale * weight).T, factor).T)
        return found


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

    def error(self, part: str, *, run: bool = False) -> float:
        """Relative squared error of the block's output against the ANN's stream; `run`: of the block as it is now."""
        found = {index: self.block(self.states[index]) if run else self.outputs[index] for index in self.parts[part]}
        return sum(output_error(output, self.wanted[index]).item() for index, output in found.items()) / len(found)


def observe(
    model: PreTrainedModel,
    block: Block,
    states: list[Tensor],
    wanted: list[Tensor],
    parts: Mapping[str, Sequence[int]],
    kinds: Collection[SiteKind] = tuple(READERS),
) -> Layer:
    """Take both streams through a block, and look at the sites of some kinds.

    Tokens count by 1 over the square of the residual stream behind a Linear that adds to it, as the next norm divides by that.
    """
    moments: dict[tuple[SiteKind, str], Moments] = defaultdict(Moments)
    outputs, targets = [], []
    for part, windows in parts.items():
        for index in windows:
            with without_neurons(model, block), recording(model, block) as ann:
                targets.append(block(wanted[index]))
            with recording(model, block) as own:
                outputs.append(block(states[index]))
            behind = {SiteKind.attention_output: ann["middle"], SiteKind.mlp_product: targets[-1][0]}
            before = {SiteKind.attention_output: (ann["start"], own["start"]), SiteKind.mlp_product: (ann["middle"], own["middle"])}
            for kind in kinds:
                rows, lacks = [own[f"coded {kind.name}"], own[f"plain {kind.name}"], ann[f"plain {kind.name}"]], None
                if kind in WRITERS:
                    weight = behind[kind].square().sum(-1, keepdim=True).rsqrt()
                    rows, lacks = [each * weight for each in rows], (before[kind][0] - before[kind][1]) * weight
                moments[kind, part].add(rows[0], rows[1], rows[2], lacks)
    return Layer(block=block, parts=parts, states=states, outputs=outputs, wanted=targets, moments=moments)


@contextmanager
def recording(model: PreTrainedModel, block: Block) -> Iterator[dict[str, Float[Tensor, "L I"]]]:
    """Within: a forward of a block leaves what its Linears' sites are given and send, the residual stream at its start and middle."""
    found: dict[str, Tensor] = {}

    def site(kind: SiteKind) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], coded: Tensor) -> None:
            found[f"plain {kind.name}"], found[f"coded {kind.name}"] = inputs[0].flatten(0, -2), coded.flatten(0, -2)

        return hook

    def residual(name: str) -> Any:
        return lambda _module, inputs: found.update({name: inputs[0].flatten(0, -2)})

    handles = [get_neuron(model, each).register_forward_hook(site(each.kind)) for each in block.sites if each.kind in READERS]
    handles.append(block.module.register_forward_pre_hook(residual("start")))
    handles.append(block.module.get_submodule(MLP_NORM).register_forward_pre_hook(residual("middle")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def refitted(block: Block, weights: Weights) -> Iterator[None]:
    """Within: Linears of a block have other weights."""
    linears: dict[str, Any] = {name: block.module.get_submodule(name) for name in weights}
    before = {name: linear.weight for name, linear in linears.items()}
    try:
        for name, weight in weights.items():
            linears[name].weight = nn.Parameter(weight.to(before[name].dtype), requires_grad=False)
        yield
    finally:
        for name, weight in before.items():
            linears[name].weight = weight


def candidates(moments: Moments, weight: Float[Tensor, "O I"], target: str) -> list[Float[Tensor, "O I"]]:
    """What a weight might become: one matrix for every lambda, or one where there is none."""
    if target in TARGETS:
        return moments.ridge(weight, moments.targets(weight, *TARGETS[target]))
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


def compare(layer: Layer) -> Iterator[Row]:
    """Every correction of every group of Linears, each alone."""
    before = {part: layer.error(part) for part in PROBED}
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
        with refitted(layer.block, found):
            block = {part: layer.error(part, run=True) / before[part] for part in PROBED}
        yield Row(group=group, target=target, scales=scales, linear=linear, block=block)


@torch.no_grad()
def first_layers(work: Workspace) -> list[list[Row]]:
    """`compare` in the first layers, the stream itself never corrected."""
    windows, parts = study_windows(work)
    model = spiking(work)
    states, blocks = enter(model, windows)
    wanted, found = list(states), []
    for block in [block for block in blocks if block.layer is not None][:LAYERS_SHOWN]:
        layer = observe(model, block, states, wanted, parts)
        found.append(list(compare(layer)))
        states, wanted = layer.outputs, layer.wanted
        log.info("layer %d", block.layer)
    return found


@torch.no_grad()
def compensate(model: PreTrainedModel, work: Workspace, plan: Mapping[str, str]) -> int:
    """Re-fit a spiking model's Linears in place, by group and target, and say how many.

    Layer after layer, the windows going on through what was kept: what lowers the error of the block's output on the choosing part.
    """
    windows, parts = study_windows(work)
    states, blocks = enter(model, windows)
    wanted, count = list(states), 0
    kinds = {KIND[GROUPS[group][0]] for group in plan}
    for block in (block for block in blocks if block.layer is not None):
        layer = observe(model, block, states, wanted, parts, kinds)
        before = least = layer.error(CHOOSE)
        kept: Weights = {}
        for group, target in plan.items():
            offered = kept | choose(layer, group, target)[0]
            with refitted(block, offered):
                error = layer.error(CHOOSE, run=True)
            if error < least:
                kept, least = offered, error
        replace_weights(block.module, {name: weight.to(model.dtype) for name, weight in kept.items()})
        states, wanted, count = [block(state) for state in states] if kept else layer.outputs, layer.wanted, count + len(kept)
        held, other = (layer.error(part, run=True) / layer.error(part) for part in (HELD, OTHER))
        log.info("layer %d: %s; %.4g -> %.4g, held out x %.3f, other text x %.3f", block.layer, ", ".join(kept), before, least, held, other)
    return count


@torch.no_grad()
def distances(model: PreTrainedModel, windows: Int[Tensor, "W L"], reference: Sequence[Tensor]) -> tuple[float, float]:
    """Mean token loss, and mean Kullback-Leibler divergence from the ANN whose last hidden states are given [nats]."""
    head, loss, divergence = model.get_submodule(HEAD), [], []
    for window, hidden in zip(windows, reference, strict=True):
        found = walk(model, window[None])[0][0]
        for rows, others, targets in zip(
            *(each[:-1].split(LOGIT_ROWS) for each in (found, hidden[0])), window[1:].split(LOGIT_ROWS), strict=True
        ):
            ours, theirs = (log_softmax(head(each).float(), -1) for each in (rows, others))
            loss.append(nll_loss(ours, targets, reduction="none"))
            divergence.append(kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
    return torch.cat(loss).mean().item(), torch.cat(divergence).mean().item()


def networks(work: Workspace) -> Iterator[tuple[str, list[float]]]:
    """Of each plan: perplexity over the ANN's and divergence from it, on the evaluation text and on unseen calibration text."""
    config, windows = work.config.dataset, [work.evaluation_windows]
    behind = -(-(max(OWN_PARTS[HELD]) + 1) * WINDOW // config.evaluation.window)  # windows that hold what decided something
    unseen = replace(config.calibration, window=config.evaluation.window, max_windows=behind + len(windows[0]))
    windows.append(token_windows(unseen, "dataset.calibration", work.tokenizer)[behind:])
    with torch.no_grad():
        ann = work.models.transparent(CALIBRATE.found(work).prefix_tokens)
        reference = [[state for window in each for state in walk(ann, window[None])] for each in windows]
        losses = [distances(ann, each, states)[0] for each, states in zip(windows, reference, strict=True)]
    for name, plan in PLANS.items():
        work.models.release()
        model = spiking(work)
        count = compensate(model, work, plan) if plan else 0
        cells = []
        for each, states, loss in zip(windows, reference, losses, strict=True):
            found, divergence = distances(model, each, states)
            cells += [math.exp(found - loss), divergence]
        yield f"{name} ({count} Linears)", cells
    work.models.release()


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
    for name, cells in networks(work):
        log.info("%s: %s", name, cells)
        yield [name, *(f"{cell:.4f}" for cell in cells)]


TABLES = {
    "layers": (("Linears", "target", "lambda", "Linear: fitted", "held out", "other text", "block: held out", "other text"), by_layer),
    "networks": (
        ("re-fitted", "evaluation text: perplexity / ANN", "divergence", "unseen text: perplexity / ANN", "divergence"),
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
