"""Codes fitted block by block on the spiking stream: a block's sites are observed on what the spiking blocks before it send.

Calibration observes every site on the ANN's own stream (`calibration/calibrate.py`), which no site of the converted network ever sees but
those of the first block. Here, for each block: its sites are observed on the spiking stream, its codes are searched, their amplitudes are
chosen by the error at the block's output (`amplitudes.py`), and the windows go on through the block with its neurons.

The output that a block should have is its own without neurons, on the same spiking stream. The ANN's output on the ANN's stream as target
was no better (`experiments/sequential`): it differs by the errors of all blocks before, which no amplitude undoes.

Windows go to the parts of the statistics as in calibration.
"""

from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.calibrate import QUERY_BLOCK, calibrate_block, enough_pieces
from spikellm.model.attention import attending
from spikellm.model.blocks import Block, enter
from spikellm.model.conversion import place
from spikellm.model.passage import Keep, not_kept
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.states import States
from spikellm.reconstruction.amplitudes import choose_amplitudes
from spikellm.search.fit import CodeFit
from spikellm.search.methods import find_codes
from spikellm.search.options import Options

Fits = dict[str, CodeFit]


@torch.no_grad()
def fit_sequentially(model: PreTrainedModel, windows: Int[Tensor, "W L"], options: Options, keep: Keep[Fits] = not_kept) -> Fits:
    """The codes of all sites, in the order in which a token meets them; leaves the model with these neurons.

    Args:
        model: installed, slots transparent, prefix attached.
        windows: of the calibration text; cut as in calibration where they are few.
        options: of the search.
        keep: where codes of finished blocks are kept.

    Raises:
        ValueError: too little text for all parts, or a site saw NaN or infinite activations.
    """
    fits: Fits = {}
    with attending(model, query_block=QUERY_BLOCK):
        states, blocks = enter(model, enough_pieces(windows).split(1))
        for block in tqdm(blocks, desc="sequential", unit="block", disable=None):
            fits |= keep(block.name, partial(fit_block, model, block, states, options))
            for site in block.sites:
                place(model, site, fits[site.name].table, amplitude=options.snn.amplitude, compiled=options.compiled)
            block.advance(states)
    return fits


def fit_block(model: PreTrainedModel, block: Block, states: States, options: Options) -> Fits:
    """The codes of a block whose slots are empty; `states` are what every window brings into it on the spiking stream."""
    wanted = states.copy()
    amplitude = options.snn.amplitude
    seen = calibrate_block(model, block, wanted, amplitude=amplitude)
    statistics = {name: site.to(model.device) for name, site in seen.items()}
    fits = find_codes(statistics, options)
    return choose_amplitudes(model, block, fits, statistics, states, wanted, amplitude=amplitude, compiled=options.compiled)
