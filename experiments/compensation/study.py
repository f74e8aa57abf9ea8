"""Weights re-fitted in closed form behind coded inputs, layer by layer: what is left of a Linear's error, and of its block's.

    python experiments/compensation/study.py [OVERRIDE ..]

Overrides are those of main.py. Calibration and codes are taken from output_root where they are there. Prints the tables of README.md.

A Linear that reads coded inputs y in place of x gets W' = (C_ty + lambda W) (C_yy + lambda I)^-1, the ridge regression towards W of
targets t on y: C_yy = sum y y^T, C_ty = sum t y^T over the windows that are fitted to, lambda in units of the mean of C_yy's diagonal.
Errors are quadratic in W', so that sums over windows are all that is kept of them.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikellm.config.labels import SiteKind
from spikellm.evaluation.texts import token_windows
from spikellm.model.blocks import Block, enter
from spikellm.model.conversion import get_neuron
from spikellm.model.sites import DOWN, GATE, KEY, MLP_NORM, OUTPUT, QUERY, READERS, UP, VALUE
from spikellm.reconstruction.tuning import relative_error, without_neurons
from spikellm.run.command import compose_config
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.workspace import Workspace, threads

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
HEADINGS = ("Linears", "target", "lambda", "Linear: fitted", "held out", "other text", "block: held out", "other text")

LAMBDAS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
# What W' y shall be: W x on the spiking stream or on the ANN's, and what share of the residual stream's difference beside it.
TARGETS = {"own": (False, 0.0), "ANN": (True, 0.0), "ANN + d/4": (True, 0.25), "ANN + d/2": (True, 0.5), "ANN + d": (True, 1.0)}


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
        product = weight @ self.sums["ann" if ann else "own"]
        return product + share * self.sums["dy"] if share else product

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

    def error(self, part: str, *, run: bool = False) -> float:
        """Relative squared error of the block's output against the ANN's stream; `run`: of the block as it is now."""
        found = {index: self.block(self.states[index]) if run else self.outputs[index] for index in self.parts[part]}
        return sum(relative_error(output, self.wanted[index]).item() for index, output in found.items()) / len(found)


def observe(model: PreTrainedModel, block: Block, states: list[Tensor], wanted: list[Tensor], parts: Mapping[str, Sequence[int]]) -> Layer:
    """Take both streams through a block.

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
            for kind in READERS:
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
def refitted(block: Block, weights: Mapping[str, Float[Tensor, "O I"]]) -> Iterator[None]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A correction of a group of Linears in a layer: errors over those with the weights as they are, by part."""

    group: str
    target: str
    scales: list[float]  # lambda of each Linear, by the least error on the choosing part
    linear: dict[str, float]  # mean of the Linears
    block: dict[str, float]


def candidates(moments: Moments, weight: Float[Tensor, "O I"]) -> dict[str, list[Float[Tensor, "O I"]]]:
    """What a weight might become, by target: one matrix for every lambda, or one where there is none."""
    sums, found = moments.sums, {}
    for target, (ann, share) in TARGETS.items():
        if not share or moments.writes:
            found[target] = moments.ridge(weight, moments.targets(weight, ann, share))
    rows = (moments.targets(weight, True, 0.0) * weight).sum(1) / ((weight @ sums["yy"]) * weight).sum(1)
    columns = sums["ann"].diagonal() / sums["yy"].diagonal()
    return found | {"a factor a row": [weight * rows[:, None]], "a factor a column": [weight * columns]}


def compare(layer: Layer) -> Iterator[Row]:
    """Every correction of every group of Linears, each alone."""
    before = {part: layer.error(part) for part in PROBED}
    for group, names in GROUPS.items():
        kind = next(kind for kind, readers in READERS.items() if names[0] in readers)
        moments = {part: layer.moments[kind, part] for part in layer.parts}
        weights = {name: layer.block.module.get_parameter(f"{name}.weight").double() for name in names}
        plain = {name: {part: each.error(weight, weight) for part, each in moments.items()} for name, weight in weights.items()}
        offered = {name: candidates(moments[FIT], weight) for name, weight in weights.items()}
        for target in offered[names[0]]:
            chosen, scales = {}, []
            for name, weight in weights.items():
                found = offered[name][target]
                errors = [moments[CHOOSE].error(weight, each) for each in found]
                best = errors.index(min(errors))
                chosen[name] = found[best]
                scales += [LAMBDAS[best]] if len(found) > 1 else []
            linear = {
                part: sum(each.error(weights[name], new) / plain[name][part] for name, new in chosen.items()) / len(chosen)
                for part, each in moments.items()
            }
            with refitted(layer.block, chosen):
                block = {part: layer.error(part, run=True) / before[part] for part in PROBED}
            yield Row(group=group, target=target, scales=scales, linear=linear, block=block)


@torch.no_grad()
def first_layers(work: Workspace) -> list[list[Row]]:
    """`compare` in the first layers, the stream itself never corrected."""
    windows, parts = study_windows(work)
    model = work.models.spiking({name: fit.table for name, fit in SEARCH.found(work).items()}, CALIBRATE.found(work).prefix_tokens)
    states, blocks = enter(model, windows)
    wanted, found = list(states), []
    for index, block in enumerate(blocks[:LAYERS_SHOWN]):
        layer = observe(model, block, states, wanted, parts)
        found.append(list(compare(layer)))
        states, wanted = layer.outputs, layer.wanted
        log.info("layer %d", index)
    return found


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


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name, code in CODES.items():
        work = Workspace(compose_config([*ONE_INTERVAL, *sys.argv[1:], *code]))
        with threads(work.config.hardware.threads):
            layers = first_layers(work)
        print(f"\n{name}: mean of {len(layers)} layers\n\n| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
        for rows in zip(*layers, strict=True):
            scales = [scale for row in rows for scale in row.scales]
            span = f"{min(scales):g} to {max(scales):g}" if scales else ""
            cells = [sum(row.linear[part] for row in rows) / len(rows) for part in (FIT, HELD, OTHER)]
            cells += [sum(row.block[part] for row in rows) / len(rows) for part in (HELD, OTHER)]
            print("| " + " | ".join([rows[0].group, rows[0].target, span, *(f"{cell:.3f}" for cell in cells)]) + " |")


if __name__ == "__main__":
    main()
