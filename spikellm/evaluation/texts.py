"""Text to windows of tokens, for calibration and evaluation.

Protocol of WikiText-2 perplexity: rows joined by blank lines, tokenised in one piece without special tokens, cut into
windows that do not overlap; the tail is dropped.
"""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spikellm.config.boundary import blamed_on, read_file
from spikellm.config.checks import InputError
from spikellm.config.choices import DatasetSource
from spikellm.config.dataset import TextConfig
from spikellm.config.extras import require

# Of ten topics of the language reference, in alphabetical order, two are evaluated on.
PYDOCS_PERIOD, PYDOCS_EVALUATION = 5, 4


def token_windows(
    config: TextConfig, key: str, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int | None = None
) -> Int[Tensor, "W L"]:
    """The text of `config` as windows of `schema.window` tokens, at most `schema.max_windows` of them.

    Args:
        key: the config node's place, for messages ("dataset.evaluation").
        tokenizer: None stands for bytes as tokens (random test models).
        vocabulary: the model's; None: not compared with the tokens.

    Raises:
        InputError: missing, unreadable, empty or too short text; tokens that the model does not have; unreachable hub.
    """
    what, text = f"{key}.path={config.path or config.source.value}", read_text(config, key)
    tokens = tokenise(text, tokenizer, what)
    windows = cut(tokens, window=config.window, max_windows=config.max_windows, what=what, option=f"{key}.window")
    if vocabulary is not None and (largest := int(tokens.max())) >= vocabulary:
        cure = "take the tokenizer that belongs to model.path" if tokenizer else "a random model's tokens are bytes: 256 are enough"
        raise InputError(f"{key}: token {largest} of the text is beyond the model's vocabulary (vocab_size={vocabulary}); {cure}")
    return windows


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase | None, what: str) -> Int[Tensor, " N"]:
    """A text in one piece, without special tokens; bytes without a tokenizer.

    Raises:
        InputError: the tokenizer fails; `what` names the text.
    """
    if tokenizer is None:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    # verbose=False: the text is longer than the model's context by design
    with blamed_on(what, "the model's tokenizer (model.path) cannot read this text"):
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def cut(tokens: Int[Tensor, " N"], *, window: int, max_windows: int | None, what: str, option: str) -> Int[Tensor, "W L"]:
    """Windows of `window` tokens that do not overlap, at most `max_windows` of them.

    Raises:
        InputError: not one window; `what` names the text, `option` what sets the length.
    """
    count = len(tokens) // window
    if count == 0:
        raise InputError(f"{what}: {len(tokens)} tokens do not fill one window of {window}; take a longer text or a smaller {option}")
    if max_windows is not None:
        count = min(count, max_windows)
    return tokens[: count * window].view(count, window)


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
    content = read_file(config.path, f"{key}.path={config.path}", "name a UTF-8 text file")
    try:
        text = content.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise InputError(f"{key}.path={config.path}: not UTF-8 text (byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _hub_text(config: TextConfig, key: str) -> str:
    if config.path is None:
        raise InputError(f"{key}.path=null: name a data set of the hub")
    require(f"{key}.source=hub", "datasets")
    import datasets

    what = f"{key}.path={config.path}: the hub does not give it"
    with blamed_on(what, "dataset=text reads local files"):
        rows = datasets.load_dataset(config.path, config.name, split=config.split, streaming=config.max_rows is not None)
        if config.skip_rows:
            rows = rows.skip(config.skip_rows)
        if config.max_rows is not None:
            rows = rows.take(config.max_rows)
        found = list(rows)
    wrong = next((number for number, row in enumerate(found) if not isinstance(row.get(config.field), str)), None)
    if wrong is not None:
        raise InputError(
            f"{key}.field={config.field}: row {wrong} of {config.path} has no text there; its columns: {', '.join(found[wrong])}"
        )
    return "\n\n".join(row[config.field] for row in found)
