"""Neurons, and the weights behind them, taught block by block to give what the ANN's block gives.

For each decoder layer: the hidden states of all windows on the spiking stream, blocks before it tuned already, and on the ANN's, behind
the same prefix (`streams.py`). The target is the ANN's output on its own stream. The loss,

    L = mean over tokens of |y - target|^2 / |target|^2

is relative, since the residual stream goes through an RMSNorm before anything reads it. Adam descends on the windows of the fitting part
(`calibrate.PERIOD`), the rate falling to zero along a cosine; derivatives are those of `surrogate.py`. Several times in an epoch the
loss is taken on the choosing part, with the neurons as they will run; the best state is kept, the one before tuning among them: the error
there never rises. The windows then go on through the block as it is kept.

Memory beyond the block's activations and the hidden states: gradients and Adam's two moments of one block.

A block that was finished before is taken as it was: the order of windows is the seed's and the same at every block, so that what comes
behind is the same to the last bit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.choices import TunedPart
from spikellm.config.snn import TuneConfig
from spikellm.model.blocks import Block, output_error
from spikellm.model.conversion import get_neuron, set_neuron
from spikellm.model.modules import wide
from spikellm.model.passage import Keep, not_kept
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.replaced import replace_weights
from spikellm.model.sites import Site, decoder_layers
from spikellm.reconstruction.streams import TwoStreams, keeping, linears_of, stream_error, two_streams
from spikellm.reconstruction.surrogate import TunableNeuron
from spikellm.reconstruction.tuned import Tables, TunedBlock, Weights

CHECKS = 4  # times in an epoch that the choosing part is looked at
MOMENTS = (0.9, 0.99)  # Adam's: an epoch has tens of steps, not thousands


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learner:
    """What takes gradients in a block."""

    neurons: dict[Site, TunableNeuron]
    weights: dict[str, nn.Parameter]  # as in `Weights`
    dtypes: dict[str, torch.dtype]  # that a network holds them in

    def optimiser(self, options: TuneConfig) -> torch.optim.Optimizer:
        """Adam, with a rate for the neurons' relative parameters and one for weights."""
        neurons = [each for neuron in self.neurons.values() for each in neuron.parameters()]
        groups = [{"params": neurons, "lr": options.rate}, {"params": list(self.weights.values()), "lr": options.weight_rate}]
        return torch.optim.Adam([group for group in groups if group["params"]], betas=MOMENTS)

    @torch.no_grad()
    def learnt(self) -> tuple[Tables, Weights]:
        """Tables and weights as they are now, and as a network will hold them."""
        tables = {site.name: neuron.table for site, neuron in self.neurons.items()}
        return tables, {name: weight.to(self.dtypes[name], copy=True) for name, weight in self.weights.items()}


def tune_spiking(
    model: PreTrainedModel, windows: Int[Tensor, "W L"], options: TuneConfig, *, seed: int, keep: Keep[TunedBlock] = not_kept
) -> dict[int, TunedBlock]:
    """Tune every decoder layer of a spiking model, in place.

    Args:
        windows: too few for all parts are cut into pieces (`calibrate.enough_pieces`).
        seed: of the order of windows.
        keep: where finished blocks are kept; their windows must have been these.
    """
    found: dict[int, TunedBlock] = {}
    progress = tqdm(two_streams(model, windows), desc="tune", unit="block", total=len(decoder_layers(model)), disable=None)
    for streams in progress:
        block = streams.block
        result = keep(block.name, partial(tune_block, model, streams, options, seed=seed))
        progress.set_postfix_str(f"{result.before:.4g} -> {result.after:.4g}")
        # what is kept lies on the CPU
        tables = {site.name: result.tables[site.name].to(neuron.table.theta) for site, neuron in neurons_of(model, block).items()}
        put(model, block, tables, result.weights)
        found[streams.layer] = result
    return found


def tune_block(model: PreTrainedModel, streams: TwoStreams, options: TuneConfig, *, seed: int) -> TunedBlock:
    """Tune one block on its windows' hidden states; the block is left as it was."""
    block, states, wanted, fit, choose = streams.block, streams.states, streams.wanted, streams.fit, streams.choose
    generator = torch.Generator().manual_seed(seed)
    before = least = stream_error(block, states, wanted, choose)
    best: tuple[Tables, Weights] = ({site.name: neuron.table for site, neuron in neurons_of(model, block).items()}, {})
    steps = options.epochs * -(-len(fit) // options.batch)
    checks = {round(step * steps / (CHECKS * options.epochs)) for step in range(1, CHECKS * options.epochs + 1)}
    with learning(model, block, options.what) as learner, torch.enable_grad():
        optimiser = learner.optimiser(options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
        order: list[int] = []
        for step in range(1, steps + 1):
            if not order:
                order = torch.randperm(len(fit), generator=generator).tolist()
            batch, order = order[: options.batch], order[options.batch :]
            optimiser.zero_grad()
            for index in (fit[each] for each in batch):
                (output_error(block(states[index]), wanted[index]) / len(batch)).backward()
            optimiser.step()
            schedule.step()
            if step in checks:
                candidate = learner.learnt()
                with keeping(model, block):
                    put(model, block, *candidate)
                    found = stream_error(block, states, wanted, choose)
                if found < least:
                    best, least = candidate, found
    return TunedBlock(tables=best[0], weights=best[1], before=before, after=least)


def neurons_of(model: PreTrainedModel, block: Block) -> dict[Site, PhaseNeuron]:
    """The neurons of a block."""
    found: dict[Site, Any] = {site: get_neuron(model, site) for site in block.sites}
    return found


def put(model: PreTrainedModel, block: Block, tables: Tables, weights: Weights) -> None:
    """Give a block other tables, and other weights where there are any."""
    for site in block.sites:
        neuron: Any = get_neuron(model, site)
        told = {"axis": neuron.axis, "per_token": neuron.per_token, "compiled": neuron.compiled}
        set_neuron(model, site, PhaseNeuron(tables[site.name], **told))
    replace_weights(block.module, weights)


@contextmanager
def learning(model: PreTrainedModel, block: Block, what: TunedPart) -> Iterator[Learner]:
    """Within: a block's neurons, and its weights if they are asked for, take gradients, weights in float32 at least."""
    with keeping(model, block):
        neurons = {site: TunableNeuron(neuron) for site, neuron in neurons_of(model, block).items()}
        for site, neuron in neurons.items():
            set_neuron(model, site, neuron)
        weights, dtypes = {}, {}
        for name, linear in linears_of(block).items():
            dtypes[name], wanted = linear.weight.dtype, what is TunedPart.all
            weight = linear.weight.detach()
            linear.weight = nn.Parameter(weight.to(wide(weight.dtype), copy=True) if wanted else weight, requires_grad=wanted)
            if wanted:
                weights[name] = linear.weight
        yield Learner(neurons=neurons, weights=weights, dtypes=dtypes)
