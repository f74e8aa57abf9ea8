"""Text that a converted model writes, by transformers' own `generate`: what it cost in time and spikes, and the spikes themselves.

Prompts go in batches, padded on the left, with a cache. Spikes are counted on the finished texts, each alone and behind the cache of its
prompt (`ledger.count_decoded`): no time is lost while writing, padding fires nowhere, and of several beams the text that was chosen counts.
The last token of a text was made, not read: it costs nothing yet.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from spikellm.config.generate import GenerateConfig
from spikellm.model.pretrained import PreTrainedModel
from spikellm.spikes.ledger import Ledger, count_decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Texts in tokens, and what writing them took [s]."""

    texts: list[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]]  # prompt, what follows it
    seconds: float
    seconds_prompt: float  # from a batch to its first token, median of the batches
    seconds_per_token: float | None  # a forward of one token for each text of the batch, median; None: there was none

    def spikes(self, model: PreTrainedModel) -> Ledger | None:
        """Of the new tokens that were read again; None: there are none."""
        read = [(prompt, new[:-1]) for prompt, new in self.texts if len(new) > 1]
        return count_decoded(model, read) if read else None


class Clock(StoppingCriteria):
    """Looks at the time after every token and stops nothing."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Bool[Tensor, " B"]:
        """False for every sequence."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Int[Tensor, " _"]], options: GenerateConfig
) -> Written:
    """Continue every prompt; a single text without beams appears on the console token by token.

    Args:
        model: converted, as it is or within `spikellm.stepped`.
        prompts: token ids.
    """
    texts, clocks, start = [], [], time.perf_counter()
    with _seeded(options.seed):
        for first in tqdm(range(0, len(prompts), options.batch_size), desc="generate", unit="batch", disable=len(prompts) == 1 or None):
            batch = prompts[first : first + options.batch_size]
            streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed(prompts, options) else None
            clocks.append(Clock())
            texts += list(zip(batch, _continued(model, tokenizer, batch, options, clocks[-1], streamer), strict=True))
    steps = [step for clock in clocks for step in torch.tensor(clock.times, dtype=torch.float64).diff()[1:].tolist()]
    return Written(
        texts=texts,
        seconds=time.perf_counter() - start,
        seconds_prompt=median(clock.times[1] - clock.times[0] for clock in clocks),
        seconds_per_token=median(steps) if steps else None,
    )


def is_streamed(prompts: Sequence[object], options: GenerateConfig) -> bool:
    """Whether a text is seen while it is written: several at once would mix, and a beam may still be dropped."""
    return len(prompts) == 1 and options.beams == 1


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Int[Tensor, " _"]],
    options: GenerateConfig,
    clock: Clock,
    streamer: TextStreamer | None,
) -> list[Int[Tensor, " _"]]:
    """What follows each prompt of a batch, up to and with its end."""
    length, pad, ends = max(map(len, prompts)), _padding(tokenizer), _ends(model, tokenizer)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        row[length - len(prompt) :], seen[length - len(prompt) :] = prompt, 1
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    generate: Any = model.generate
    made = generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=options.max_new_tokens,
        num_beams=options.beams,
        pad_token_id=pad,
        eos_token_id=ends or None,
        stopping_criteria=StoppingCriteriaList([clock]),
        streamer=streamer,
        **(sampling if options.temperature else {"do_sample": False}),
    )
    return [_ended(row[length:].cpu(), ends) for row in made]


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the model's, or its tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if own is None else own
    return [] if found is None else found if isinstance(found, list) else [found]


def _ended(tokens: Int[Tensor, " n"], ends: list[int]) -> Int[Tensor, " _"]:
    """Up to and with the first end, behind which there is padding."""
    found = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype)).nonzero().flatten().tolist()
    return tokens[: found[0] + 1] if found else tokens


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within: transformers samples, from torch's global generators, what `seed` says; these go on afterwards as if nothing had been."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
