"""Windowed perplexity, as the field reports it for WikiText-2.

Mean token loss inside each window (window - 1 targets), mean over the windows, exp. lm-eval's `wikitext` task is a word perplexity:
another number under another name.

Windows advance block by block (`model/blocks.py`), then through lm_head in slices of rows. As many form a batch as products gain from
(`batches.py`); more batches than one are on their way together where a block's weights have to be brought in.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from spikellm.evaluation.batches import sequences
from spikellm.execution.memory import LOGIT_ROWS
from spikellm.model.blocks import Occupy, as_it_is, flights, walk_side_by_side
from spikellm.model.offload import is_offloaded
from spikellm.model.passage import Passage, Passes
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import HEAD

Name = TypeVar("Name", bound=str)
Readouts = Callable[[Tensor], Iterable[Tensor]]  # rows of the last hidden state to logits

# What may hold activations that a dtype cannot; weights are known to be finite.
WIDER = {
    torch.float16: "model.dtype=bfloat16 or float32 has a wider range",
    torch.bfloat16: "model.dtype=float32 has finer steps, float64 a wider range",
    torch.float32: "model.dtype=float64 has a wider range",
    torch.float64: "no dtype has a wider range: is model.path a model that was trained?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """A perplexity and what it was taken over."""

    value: float
    windows: int
    window: int  # [tokens]
    tokens: int  # targets


def perplexity(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    *,
    label: str = "of the model",
    batch_size: int | None = None,
    in_flight: int | None = None,
    passes: Passes | None = None,
) -> Perplexity:
    """Perplexity of `model` on `windows`.

    Args:
        model: any causal language model of a supported architecture, pretrained or spiking, also within `spikellm.stepped`.
        windows: token ids; every window starts anew.
        label: for the progress bar and messages.
        batch_size: windows of a forward (None: `batches.sequences`); not felt but in how products are rounded.
        in_flight: windows that go through a block before the next block is called (None: `blocks.flights`); no result depends on it.
        passes: where losses of windows are kept, and hidden states; None: nowhere.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    head = model.get_submodule(HEAD)
    (found,) = readout_perplexities(
        model, windows, readouts=lambda rows: [head(rows)], label=label, batch_size=batch_size, in_flight=in_flight, passes=passes
    )
    return found


def readout_perplexities(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    *,
    readouts: Readouts,
    label: str,
    batch_size: int | None = None,
    in_flight: int | None = None,
    passes: Passes | None = None,
) -> list[Perplexity]:
    """Perplexities of several logits from the same hidden states; arguments and errors as in `perplexity`.

    Args:
        readouts: rows of the last hidden state to logits [rows, V], the same number of them at every call.
    """
    passes = passes or Passes()
    (losses,) = _window_losses(model, windows, [as_it_is], readouts, label=label, batch_size=batch_size, in_flight=in_flight, passes=passes)
    passes.forget()
    return _perplexities(losses, windows, label, model.dtype)


def network_perplexities(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    networks: Mapping[Name, Occupy],
    *,
    label: str,
    passes: Passes,
    batch_size: int | None = None,
) -> Iterator[tuple[Name, Perplexity]]:
    """Perplexities of several networks of one model by their names, from one reading of its layers; arguments as in `perplexity`.

    Args:
        networks: see `blocks.walk_side_by_side`.
        passes: where losses of windows are kept, and hidden states.

    Raises:
        FloatingPointError: the loss of one is not finite; those that are have come before.
    """
    head = model.get_submodule(HEAD)
    occupied, label_of_all = list(networks.values()), f"{', '.join(networks)} {label}"
    every = _window_losses(
        model, windows, occupied, lambda rows: [head(rows)], label=label_of_all, batch_size=batch_size, in_flight=None, passes=passes
    )
    passes.forget()
    found = dict(zip(networks, every, strict=True))
    for name in sorted(found, key=lambda name: not _are_finite(found[name])):
        (only,) = _perplexities(found[name], windows, f"{name} {label}", model.dtype)
        yield name, only


@torch.no_grad()
def _window_losses(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    networks: Sequence[Occupy],
    readouts: Readouts,
    *,
    label: str,
    batch_size: int | None,
    in_flight: int | None,
    passes: Passes,
) -> list[list[list[float]]]:
    """Mean token loss of every network in every window by every readout."""
    found: list[list[list[float]]] = [[] for _ in networks]
    name = f"perplexity {label}"
    size = batch_size or sequences(model, windows.shape[1])
    if in_flight is None:
        parts = flights(model, windows.split(size), networks=len(networks))
    else:
        parts = (list(some.split(size)) for some in windows.split(in_flight))
    with tqdm(total=len(windows), desc=name, unit="window", disable=None) as progress:
        for part in parts:

            def walked(passage: Passage, part: list[Tensor] = part) -> list[list[list[float]]]:
                every = walk_side_by_side(model, part, networks, label=name if is_offloaded(model) else None, passage=passage)
                return [_batch_losses(part, states, readouts) for states in every]

            first, last = len(found[0]), len(found[0]) + sum(map(len, part))
            for losses, own in zip(found, passes.find(f"{first} to {last} by {size}", walked), strict=True):
                losses += own
            means = [sum(loss[-1] for loss in losses) / len(losses) for losses in found]
            progress.set_postfix_str(f"ppl={', '.join(f'{math.exp(min(mean, 80)):.3f}' for mean in means)}", refresh=False)
            progress.update(last - first)
    return found


def _batch_losses(batches: Iterable[Int[Tensor, "_ _"]], states: Iterable[Tensor], readouts: Readouts) -> list[list[float]]:
    """Mean token loss in every window of every batch by every readout."""
    return [
        _losses(hidden[:-1], window[1:], readouts)
        for windows, hiddens in zip(batches, states, strict=True)
        for window, hidden in zip(windows, hiddens, strict=True)
    ]


def _perplexities(losses: list[list[float]], windows: Int[Tensor, "W L"], label: str, dtype: torch.dtype) -> list[Perplexity]:
    """Of every readout."""
    means = _means(losses)
    if not _are_finite(losses):
        raise FloatingPointError(f"perplexity {label}: the loss is {means[-1]}; {WIDER[dtype]}")
    count, length = windows.shape
    tokens = count * (length - 1)
    return [Perplexity(value=math.exp(min(mean, 700.0)), windows=count, window=length, tokens=tokens) for mean in means]


def _means(losses: list[list[float]]) -> list[float]:
    return [sum(column) / len(losses) for column in zip(*losses, strict=True)]


def _are_finite(losses: list[list[float]]) -> bool:
    return all(map(math.isfinite, _means(losses)))


def _losses(hidden: Shaped[Tensor, "rows ..."], targets: Int[Tensor, " rows"], readouts: Readouts) -> list[float]:
    """Mean token loss of every readout."""
    sums = [
        [cross_entropy(logits.float(), wanted.to(logits.device), reduction="sum").item() for logits in readouts(rows)]
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return [sum(column) / len(targets) for column in zip(*sums, strict=True)]
