"""Text to windows of tokens, for calibration and evaluation.

Protocol of WikiText-2 perplexity: rows joined by blank lines, tokenised in one piece without special tokens, cut into
windows that do not overlap; the tail is dropped.
"""

import logging
import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spikellm.config import DatasetSource, InputError, TextConfig

log = logging.getLogger(__name__)

# Of ten topics of the language reference, in alphabetical order, two are evaluated on.
PYDOCS_PERIOD, PYDOCS_EVALUATION = 5, 4


def token_windows(config: TextConfig, key: str, tokenizer: PreTrainedTokenizerBase | None) -> Int[Tensor, "W L"]:
    """The text of `config` as windows of `config.window` tokens, at most `config.max_windows` of them.

    Args:
        key: the config node's place, for messages ("dataset.evaluation").
        tokenizer: None stands for bytes as tokens (random test models).

    Raises:
        InputError: missing, unreadable, empty or too short text; unreachable hub.
    """
    text = read_text(config, key)
    if tokenizer is None:
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    else:
        # verbose=False: the text is longer than the model's context by design
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(tokens) // config.window
    if count == 0:
        raise InputError(
            f"{key}.path={config.path or config.source.value}: {len(tokens)} tokens do not fill one window of {config.window}; "
            f"take a longer text or a smaller {key}.window"
        )
    if config.max_windows is not None:
        count = min(count, config.max_windows)
    return tokens[: count * config.window].view(count, config.window)


def read_text(config: TextConfig, key: str) -> str:
    """The whole text, not empty."""
    match config.source:
        case DatasetSource.pydocs:
            text = _pydocs(config, key)
        case DatasetSource.text:
            text = _local_text(config, key)
        case DatasetSource.hub:
            text = _hub_text(config, key)
    if not text.strip():
        raise InputError(f"{key}.path={config.path}: the text is empty")
    return text


def _pydocs(config: TextConfig, key: str) -> str:
    from pydoc_data.topics import topics

    if config.split not in ("calibration", "evaluation"):
        raise InputError(f"{key}.split={config.split}: pydocs has the splits calibration and evaluation")
    evaluation = config.split == "evaluation"
    chosen = [name for index, name in enumerate(sorted(topics)) if (index % PYDOCS_PERIOD == PYDOCS_EVALUATION) == evaluation]
    return "\n\n".join(topics[name] for name in chosen)


def _local_text(config: TextConfig, key: str) -> str:
    if config.path is None:
        raise InputError(f"{key}.path=null: name a UTF-8 text file")
    try:
        return Path(config.path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{key}.path={config.path}: cannot read the file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{key}.path={config.path}: not UTF-8 text (byte {error.start})") from error


@cache
def settle_for_cache_if_unreachable() -> None:
    """Ask once whether the hub answers; if not, tell its client so, which otherwise retries for minutes.

    A cached model or data set is then used, and a missing one is an error at once. Behind a proxy the client decides.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in proxies):
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=10).close()
    except OSError:
        log.warning("the hub does not answer: only its local cache is used")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def _hub_text(config: TextConfig, key: str) -> str:
    settle_for_cache_if_unreachable()
    import datasets

    if config.path is None:
        raise InputError(f"{key}.path=null: name a data set of the hub")
    try:
        rows = datasets.load_dataset(config.path, config.name, split=config.split, streaming=config.max_rows is not None)
        if config.skip_rows:
            rows = rows.skip(config.skip_rows)
        if config.max_rows is not None:
            rows = rows.take(config.max_rows)
        return "\n\n".join(row[config.field] for row in rows)
    except KeyError as error:
        raise InputError(f"{key}.field={config.field}: {config.path} has no such column") from error
    except Exception as error:  # the hub client raises a dozen unrelated types when it is offline
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{key}.path={config.path}: the hub does not answer for it ({reason}); dataset=text reads local files") from error
