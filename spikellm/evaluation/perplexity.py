"""Windowed perplexity, as the field reports it for WikiText-2.

Mean token loss inside each window (window - 1 targets), mean over the windows, exp. lm-eval's `wikitext` task is a word perplexity:
another number under another name.

Windows advance block by block (`model/blocks.py`), then through lm_head in slices of rows. One after the other unless told otherwise: as
many hidden states as in the model's own forward. More of them pay where a block's weights have to be brought in.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.execution.memory import LOGIT_ROWS
from spikellm.model.blocks import together, walk
from spikellm.model.sites import HEAD

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
    model: PreTrainedModel, windows: Int[Tensor, "W L"], *, label: str = "of the model", in_flight: int | None = None
) -> Perplexity:
    """Perplexity of `model` on `windows`.

    Args:
        model: any causal language model of a supported architecture, pretrained or spiking, also within `spikellm.stepped`.
        windows: token ids; every window starts anew.
        label: for the progress bar and messages.
        in_flight: windows that go through a block before the next block is called (None: `blocks.together`); no result depends on it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    head = model.get_submodule(HEAD)
    return readout_perplexities(model, windows, readouts=lambda rows: [head(rows)], label=label, in_flight=in_flight)[0]


@torch.no_grad()
def readout_perplexities(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    *,
    readouts: Callable[[Tensor], Iterable[Tensor]],
    label: str,
    in_flight: int | None = None,
) -> list[Perplexity]:
    """Perplexities of several logits from the same hidden states; arguments and errors as in `perplexity`.

    Args:
        readouts: rows of the last hidden state to logits [rows, V], the same number of them at every call.
    """
    losses = []
    with tqdm(total=len(windows), desc=f"perplexity {label}", unit="window", disable=None) as progress:
        for some in windows.split(in_flight or together(model, windows.shape[1])):
            for window, state in zip(some, walk(model, some), strict=True):
                losses.append(_losses(state[0, :-1], window[1:], readouts))
                progress.set_postfix(ppl=f"{math.exp(min(sum(loss[-1] for loss in losses) / len(losses), 80)):.3f}", refresh=False)
                progress.update()
    means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
    if not all(math.isfinite(mean) for mean in means):
        raise FloatingPointError(f"perplexity {label}: the loss is {means[-1]}; {WIDER[model.dtype]}")
    count, length = windows.shape
    tokens = count * (length - 1)
    return [Perplexity(value=math.exp(min(mean, 700.0)), windows=count, window=length, tokens=tokens) for mean in means]


def _losses(
    hidden: Shaped[Tensor, "rows ..."], targets: Int[Tensor, " rows"], readouts: Callable[[Tensor], Iterable[Tensor]]
) -> list[float]:
    """Mean token loss of every readout."""
    sums = [
        [cross_entropy(logits.float(), wanted.to(logits.device), reduction="sum").item() for logits in readouts(rows)]
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return [sum(column) / len(targets) for column in zip(*sums, strict=True)]
