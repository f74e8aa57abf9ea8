"""Weights re-fitted in closed form behind coded inputs, block by block: no gradient, and nothing more to compute when the network runs.

A Linear that reads what its neurons send, y, in place of x gets

    W' = (C_ty + lambda W) (C_yy + lambda I)^-1    C_yy = sum y y^T, C_ty = sum t y^T over tokens of the fitting part

the ridge regression towards W of targets t on y; lambda is in units of the mean of C_yy's diagonal (`compensate.damping`). y is what the
Linear multiplies: behind R4 at down_proj, each token's amplitude included.

Targets. gate, up: t = W x on the ANN's own stream. o, down: t = W x + d/2. They add to the residual stream, and d is what that stream
lacks beside them: the ANN's less the spiking network's, before attention for o, between attention and MLP for down. Half of it, as d is
predictable from y in part only. Tokens of o and down count by 1 over the square of the ANN's residual stream behind them, as the next
norm divides by it. Biases stay, they are the same on both sides.

What is corrected was not lost at the Linear's own neurons (codes are fitted to their squared error, which leaves next to nothing) but
before it, in attention and in earlier blocks. q, k and v are left out: their errors fall, the block's does not
(`experiments/compensation`).

o, then gate and up, then down, each behind what was kept of those before. Of every lambda's weights, as the model's dtype has them, those
stay whose block has the least error at its output (`blocks.output_error`) on windows of the choosing part, the weights as they were among
them: the error there never rises. The windows then go on through the block as it is kept.

Precision: products of a window in the activations' dtype, float32 at least; sums over windows, factor and solution in float64.
Memory beyond the hidden states: two float64 matrices of a Linear's inputs, and two while they are solved (6.6 GB at LLaMA-3-8B's down_proj,
0.5 GB at o, gate and up).

Sources: targets of the ANN's stream as in GPTAQ (Li et al., arXiv:2504.02692) and QEP (Arai & Ichikawa 2025), there for the
rounding of weights. Ours: coded inputs, half of the difference, tokens weighted, the choice by the block's output.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.config.choices import CompensatedLinear
from spikellm.config.labels import SiteKind
from spikellm.config.snn import CompensateConfig
from spikellm.model.blocks import Block
from spikellm.model.conversion import get_neuron
from spikellm.model.passage import Keep, not_kept
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.replaced import replace_weights
from spikellm.model.sites import DOWN, GATE, LAYERS, LINEARS, MLP_NORM, OUTPUT, READERS, UP, decoder_layers
from spikellm.reconstruction.streams import (
    TwoStreams,
    keeping,
    linears_of,
    stream_error,
    two_streams,
    without_neurons,
)
from spikellm.reconstruction.tuned import TunedBlock, Weights

NAMES = {CompensatedLinear.o: OUTPUT, CompensatedLinear.gate: GATE, CompensatedLinear.up: UP, CompensatedLinear.down: DOWN}
WRITERS = (SiteKind.attention_output, SiteKind.mlp_product)  # sites of Linears that add to the residual stream
SHARE = 0.5  # of the residual stream's difference


@torch.no_grad()
def compensate_spiking(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    options: CompensateConfig,
    *,
    tuned: Mapping[str, Float[Tensor, "O I"]] | None = None,
    keep: Keep[TunedBlock] = not_kept,
) -> dict[int, TunedBlock]:
    """Re-fit Linears of every decoder layer of a spiking model, in place.

    Args:
        model: with the weights of the ANN.
        windows: too few for all parts are cut into pieces (`calibrate.enough_pieces`).
        tuned: weights by path of the Linear that the spiking network has instead of the ANN's; they are put in.
        keep: where finished blocks are kept; their windows must have been these.
    """
    found: dict[int, TunedBlock] = {}
    progress = tqdm(two_streams(model, windows), desc="compensate", unit="block", total=len(decoder_layers(model)), disable=None)
    for streams in progress:
        block = streams.block
        ann = {name: linear.weight for name, linear in linears_of(block).items()}
        paths = {name: f"{LAYERS}.{streams.layer}.{name}" for name in LINEARS}
        replace_weights(block.module, {name: tuned[path] for name, path in paths.items() if path in tuned} if tuned else {})
        result = keep(block.name, partial(compensate_block, model, streams, ann, options))
        progress.set_postfix_str(f"{result.before:.4g} -> {result.after:.4g}")
        replace_weights(block.module, result.weights)
        found[streams.layer] = result
    return found


def compensate_block(model: PreTrainedModel, streams: TwoStreams, ann: Weights, options: CompensateConfig) -> TunedBlock:
    """Re-fit the Linears of one block, whose weights in the ANN are `ann`; the block is left as it was."""
    block, kept = streams.block, Weights()
    before = least = stream_error(block, streams.states, streams.wanted, streams.choose)
    asked = [NAMES[linear] for linear in options.linears]
    with keeping(model, block):
        for kind, readers in READERS.items():
            names = [name for name in readers if name in asked]
            if not names:
                continue
            moments = collect(model, streams, ann, kind)
            own = {name: linear.weight for name, linear in linears_of(block).items() if name in names}
            best: Weights = {}
            for damping in options.damping:
                offered = {name: moments.refit(weight, ann[name], damping) for name, weight in own.items()}
                replace_weights(block.module, offered)
                found = stream_error(block, streams.states, streams.wanted, streams.choose)
                if found < least:
                    best, least = offered, found
            replace_weights(block.module, own | best)
            kept |= best
    return TunedBlock(tables={}, weights=kept, before=before, after=least)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sums over tokens of what a Linear reads, y coded on the spiking stream and x on the ANN's, and of d where it adds to that stream."""

    yy: Float64[Tensor, "I I"]
    xy: Float64[Tensor, "I I"]
    dy: Float64[Tensor, "O I"] | None = None

    def __add__(self, other: "Moments") -> "Moments":
        dy = None if self.dy is None or other.dy is None else self.dy + other.dy
        return Moments(yy=self.yy + other.yy, xy=self.xy + other.xy, dy=dy)

    def refit(self, weight: Float[Tensor, "O I"], ann: Float[Tensor, "O I"], damping: float) -> Float[Tensor, "O I"]:
        """W' in the dtype of W.

        Args:
            weight: W, of the spiking network.
            ann: the Linear's weight in the ANN, which x meets.
            damping: lambda.
        """
        wanted = ann.double() @ self.xy
        found = ridge(weight, self.yy, wanted if self.dy is None else wanted + SHARE * self.dy, damping)
        return found.to(weight.dtype).contiguous()


def ridge(
    weight: Float[Tensor, "O I"], gram: Float64[Tensor, "I I"], cross: Float64[Tensor, "O I"], damping: float
) -> Float64[Tensor, "O I"]:
    """(C_ty + lambda W) (C_yy + lambda I)^-1, lambda in units of the mean of C_yy's diagonal.

    Args:
        gram, cross: C_yy, C_ty.
    """
    level = (damping * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    damped = gram.clone()
    damped.diagonal().add_(level)
    return torch.cholesky_solve((cross + level * weight.double()).T, torch.linalg.cholesky(damped)).T


def collect(model: PreTrainedModel, streams: TwoStreams, ann: Weights, kind: SiteKind) -> Moments:
    """The moments of a site's Linears over the fitting part, with the block's neurons and weights as they are now."""
    found: list[Moments] = []
    for index in streams.fit:
        with without_neurons(model, streams.block), seeing(model, streams.block, [kind]) as plain:
            replace_weights(streams.block.module, ann)
            streams.block(streams.ann[index])
        with seeing(model, streams.block, [kind]) as spiking:
            streams.block(streams.states[index])
        y, x, lack = spiking.sent[kind], plain.given[kind], None
        if kind in WRITERS:
            lack, weight = lacking(streams, index, kind, plain, spiking)
            y, x, lack = y * weight, x * weight, lack * weight
        new = Moments(yy=(y.T @ y).double(), xy=(x.T @ y).double(), dy=None if lack is None else (lack.T @ y).double())
        found = [found[0] + new] if found else [new]
    return found[0]


def lacking(
    streams: TwoStreams, index: int, kind: SiteKind, plain: "Seen", spiking: "Seen"
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N 1"]]:
    """d, what the residual stream lacks beside the Linear of one of WRITERS, and what its tokens count [root]; of one window."""
    if kind is SiteKind.attention_output:
        lack, behind = (streams.ann[index] - streams.states[index]).flatten(0, -2), plain.middle
    else:
        lack, behind = plain.middle - spiking.middle, streams.wanted[index].flatten(0, -2)
    power = behind.square().sum(-1, keepdim=True).clamp_min(torch.finfo(behind.dtype).tiny)
    return lack.to(behind.device), power.rsqrt()


@dataclass(slots=True, kw_only=True, eq=False)
class Seen:
    """What passes a block's sites in a forward, N tokens."""

    given: dict[SiteKind, Float[Tensor, "N I"]] = field(default_factory=dict)
    sent: dict[SiteKind, Float[Tensor, "N I"]] = field(default_factory=dict)
    middle: Float[Tensor, "N D"] = field(default_factory=lambda: torch.empty(0, 0))  # the residual stream between attention and MLP


@contextmanager
def seeing(model: PreTrainedModel, block: Block, kinds: list[SiteKind]) -> Iterator[Seen]:
    """Within: every forward of a decoder layer leaves what sites of some kinds are given and send."""
    seen = Seen()

    def site(kind: SiteKind) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], sent: Tensor) -> None:
            seen.given[kind], seen.sent[kind] = inputs[0].flatten(0, -2), sent.flatten(0, -2)

        return hook

    def norm(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.middle = inputs[0].flatten(0, -2)

    handles = [get_neuron(model, each).register_forward_hook(site(each.kind)) for each in block.sites if each.kind in kinds]
    handles.append(block.module.get_submodule(MLP_NORM).register_forward_pre_hook(norm))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
