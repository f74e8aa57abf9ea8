"""Amplitudes chosen by the error at the output of a block, where the errors of its sites meet.

A site's code is fitted to the squared error at the site itself. Which amplitude is best depends on what follows: attention takes
exponentials of products of coded queries and keys, the MLP products of two coded factors. Here the amplitude of each site, and with it its
whole table and its cuts, is multiplied by a factor: coordinate descent over the sites of a block in the order in which a token meets them.
A factor is kept where it lowers the error on windows of the fitting part and does not raise it on those of the choosing part.

Clipping by the error at the block's output: PrefixQuant (2024), by grid search.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spikellm.calibration.calibrate import part_windows
from spikellm.calibration.statistics import CHOOSE, FIT, SiteStatistics
from spikellm.coding.neuron import BEYOND, PhaseTable
from spikellm.config.choices import Amplitude
from spikellm.model.blocks import Block, output_error
from spikellm.model.conversion import place
from spikellm.model.pretrained import PreTrainedModel
from spikellm.search.fit import CodeFit

FACTORS = (1 / 1.07, 1.07)  # steps down and up; most that are taken lead down
WINDOWS = 2  # of either part, at most: each factor costs a forward of them


def choose_amplitudes(
    model: PreTrainedModel,
    block: Block,
    fits: dict[str, CodeFit],
    statistics: dict[str, SiteStatistics],
    states: Sequence[Float[Tensor, "1 L D"]],
    wanted: Sequence[Float[Tensor, "1 L D"]],
    *,
    amplitude: Amplitude = Amplitude.static,
    compiled: bool,
) -> dict[str, CodeFit]:
    """The codes of a block with the amplitudes that its output wants; the block keeps these neurons.

    Args:
        fits, statistics: by name of the block's sites.
        states: what every window brings into the block.
        wanted: what the block without neurons makes of them.
        amplitude: see `conversion.fill`.
        compiled: see `neuron.encode`.
    """
    windows = {part: part_windows(len(states), part)[:WINDOWS] for part in (FIT, CHOOSE)}

    def error(part: int) -> float:
        return sum(output_error(block(states[index]), wanted[index]).item() for index in windows[part])

    for site in block.sites:
        place(model, site, fits[site.name].table, amplitude=amplitude, compiled=compiled)
    fitted, choosing = error(FIT), error(CHOOSE)
    found = dict(fits)
    for site in block.sites:
        fit, kept = fits[site.name], 1.0
        for step in FACTORS:
            while True:
                place(model, site, scaled_table(fit, kept * step), amplitude=amplitude, compiled=compiled)
                if (lower := error(FIT)) >= fitted or (chosen := error(CHOOSE)) > choosing:
                    break
                fitted, choosing, kept = lower, chosen, kept * step
            if kept != 1.0:
                found[site.name] = scaled(fit, kept, statistics[site.name])
                break  # nothing is to be had in the other direction
        place(model, site, found[site.name].table, amplitude=amplitude, compiled=compiled)
    return found


def scaled_table(fit: CodeFit, factor: float) -> PhaseTable:
    """The table of a code with all amplitudes, and the cuts between them, times a factor."""
    cuts = fit.cuts
    if cuts is not None:
        cuts = torch.where(cuts < BEYOND, cuts * factor, BEYOND)
    return PhaseTable(*fit.table.rows.map(lambda rows: rows * factor), digits=fit.digits, cuts=cuts)


def scaled(fit: CodeFit, factor: float, statistics: SiteStatistics) -> CodeFit:
    """The code of `scaled_table`, with its errors on the statistics of the site that it was fitted to; the objective stays the search's."""
    return fit.with_table(scaled_table(fit, factor), statistics, tau=fit.tau * factor)
