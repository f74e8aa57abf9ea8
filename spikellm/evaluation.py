"""Windowed perplexity, as the field reports it for WikiText-2.

Mean token loss inside each window (window - 1 targets), mean over the windows, exp. lm-eval's `wikitext` task is a word
perplexity: another number under another name.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spikellm.sites import HEAD

# Logits are [tokens, V] in float32: 256 rows of LLaMA-3's vocabulary take 131 MB.
LOGIT_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """A perplexity and what it was taken over."""

    value: float
    windows: int
    window: int  # [tokens]
    tokens: int  # targets


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Int[Tensor, "W L"], *, label: str) -> Perplexity:
    """Perplexity of `model` on `windows`, one window a forward.

    Args:
        label: for the progress bar.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    head = model.get_submodule(HEAD)
    progress = tqdm(windows, desc=f"perplexity {label}", unit="window", disable=None)
    losses = []
    for window in progress:
        ids = window[None].to(model.device)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
        targets = ids[0, 1:].to(hidden.device)
        loss = 0.0
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = head(rows).float()  # of tied embeddings the head may lie on another GPU than the last layer
            loss += cross_entropy(logits, wanted.to(logits.device), reduction="sum").item()
        losses.append(loss / len(targets))
        progress.set_postfix(ppl=f"{math.exp(min(sum(losses) / len(losses), 80)):.3f}")
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise FloatingPointError(f"perplexity {label}: the loss is {mean}; evaluate in another dtype (model.dtype=float32)")
    count, length = windows.shape
    return Perplexity(value=math.exp(min(mean, 700.0)), windows=count, window=length, tokens=count * (length - 1))
