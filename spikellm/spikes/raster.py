"""Spikes of one layer on the tokens of a text, one by one: what a raster plot shows."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Int, Int8
from torch import Tensor

from spikellm.coding.neuron import PhaseNeuron, fire
from spikellm.config.labels import SiteKind
from spikellm.execution.modules import SteppedNeuron
from spikellm.model.cache import read
from spikellm.model.conversion import get_neuron
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import Site, decoder_layers, sites
from spikellm.store.record import Row

NEURONS = 24  # shown of each site


@torch.no_grad()
def raster_rows(model: PreTrainedModel, prompt: Int[Tensor, " P"], new: Int[Tensor, " N"], *, layer: int) -> list[Row]:
    """A row for every spike that `new` causes behind `prompt` at `NEURONS` neurons, evenly chosen, of each site of a layer.

    The softmax is left out: it has other neurons for each token. Tokens and time steps are counted from 0.
    """
    cache = read(model, prompt)
    trains: dict[Site, Int8[Tensor, "T N neurons"]] = {}
    places = [site for site in sites(len(decoder_layers(model))) if site.layer == layer and site.kind is not SiteKind.softmax]
    hooks = []
    for site in places:
        neuron: Any = get_neuron(model, site)
        hooks.append(neuron.register_forward_hook(partial(_keep, trains, site)))
    try:
        read(model, new, cache)
    finally:
        for hook in hooks:
            hook.remove()
    rows: list[Row] = []
    for site in places:
        width = trains[site].shape[-1]
        chosen = torch.arange(min(NEURONS, width)) * width // min(NEURONS, width)
        train = trains[site][..., chosen].permute(1, 0, 2)
        rows += [
            {"name": site.name, "kind": site.kind.name, "token": token, "step": step, "neuron": int(chosen[index]), "spike": sign}
            for (token, step, index), sign in zip(train.nonzero().tolist(), train[train != 0].tolist(), strict=True)
        ]
    return rows


def _keep(trains: dict[Site, Tensor], site: Site, neuron: PhaseNeuron, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: the train of the text's tokens; what fires later at the same site is a prefix."""
    if site in trains:
        return
    x = inputs[0]
    train = output if isinstance(neuron, SteppedNeuron) else fire(neuron.grouped(neuron.coded(x)), neuron.table).view(-1, *x.shape)
    train = train.unflatten(0, (-1, neuron.digits.populations)).sum(1, dtype=torch.int8)[:, 0]  # an input is one population's
    trains[site] = (train if train.ndim == 3 else train.transpose(1, 2).flatten(2)).cpu()
