"""Every network on every text and benchmark: windowed perplexity, zero-shot accuracy.

Perplexity as the field reports it for WikiText-2: mean token loss inside each window (window - 1 targets), mean over the
windows, exp. lm-eval's `wikitext` task is a word perplexity: another number under another name. Accuracy: see `zero_shot.py`.

Each figure is an artefact of its own: a run that was stopped, or is given one more text, computes what is missing. Networks that share
a converted model whose decoder layers lie on disk are measured in one pass (`side_by_side.py`).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spikellm.config.checks import InputError
from spikellm.config.choices import DatasetSource
from spikellm.config.dataset import DatasetConfig, TextConfig, ZeroShotConfig
from spikellm.config.extras import require
from spikellm.config.labels import NetworkName
from spikellm.evaluation import texts, zero_shot
from spikellm.evaluation.perplexity import perplexity
from spikellm.model.offload import is_offloaded
from spikellm.model.passage import Passes, StoredPasses
from spikellm.model.pretrained import PreTrainedModel
from spikellm.store.artifacts import Artefact, ArtifactStore, read_json, write_json
from spikellm.store.record import AccuracyRecord, AnytimeRecord, Findings, PerplexityRecord, Record
from spikellm.store.sources import text_source

log = logging.getLogger(__name__)

# Loaded no earlier than needed; None stands for bytes as tokens (random test models).
Tokenizer = Callable[[], PreTrainedTokenizerBase | None]


@dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """The artefact of one perplexity: `Perplexity`, and what stepped execution adds."""

    value: float
    windows: int
    window: int  # [tokens]
    tokens: int  # targets
    anytime: list[float] | None = None  # read after 1 .. T steps


def folded_perplexity(
    model: PreTrainedModel, windows: Int[Tensor, "W L"], label: str, passes: Passes, batch_size: int | None
) -> Measurement:
    """`perplexity` as an artefact holds it."""
    return Measurement(**asdict(perplexity(model, windows, label=label, passes=passes, batch_size=batch_size)))


Windows = Callable[[int], Int[Tensor, "W L"]]  # of a text, for a model of so many tokens
KeptPasses = Callable[[Sequence[NetworkName]], Passes]  # where those are kept in which some networks are measured


@runtime_checkable
class Together(Protocol):
    """Measures several networks."""

    @property
    def joins(self) -> bool:
        """Whether it pays: if not, each has a pass of its own."""
        ...

    def measure(
        self, names: Sequence[NetworkName], windows: Windows, text: str, kept: KeptPasses, batch_size: int | None
    ) -> Iterator[tuple[NetworkName, Measurement]]:
        """What is found for each of these, in any order, as soon as it is; `text` is the name of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model that is measured, built no earlier than the first figure that is missing."""

    name: NetworkName
    inputs: dict[str, Any]  # everything its figures depend on beside the data
    build: Callable[[], PreTrainedModel]
    prefix_tokens: Callable[[], list[int]]  # stand before every sequence by themselves
    # with a label, where passes are kept, and windows a forward
    measure: Callable[[PreTrainedModel, Tensor, str, Passes, int | None], Measurement] = folded_perplexity
    together: Together | None = None  # measures it with all others that have the same; None: `measure` does


def passes(networks: Iterable[Network]) -> Iterator[list[Network]]:
    """Those that are measured together, or one; each is built once, and nothing holds it when the next pass is asked for."""
    waiting = list(networks)
    while waiting:
        together = waiting[0].together
        if together is None or not together.joins:
            own, together = waiting[:1], None
        else:
            own = [network for network in waiting if network.together is together]
        waiting = [network for network in waiting if network not in own]
        yield [replace(network, build=cache(network.build), together=together) for network in own]


def named_texts(dataset: DatasetConfig) -> dict[str, TextConfig]:
    """The texts that networks are measured on, by config key; the first is the main one."""
    return {"dataset.evaluation": dataset.evaluation} | {f"dataset.extra.{name}": text for name, text in dataset.extra.items()}


class Benchmarks:
    """lm-eval's tasks by name, each loaded once and no earlier than it is asked for."""

    def __init__(self, options: ZeroShotConfig) -> None:
        self.options = options
        self._tasks: dict[str, Any] = {}

    def load(self, names: Iterable[str]) -> None:
        """Raises: InputError: unreadable local rows, a hub that does not answer."""
        if missing := [name for name in names if name not in self._tasks]:
            self._tasks |= zero_shot.load_tasks(self.options, missing)

    def __getitem__(self, name: str) -> Any:
        self.load([name])
        return self._tasks[name]


def prepare(
    dataset: DatasetConfig, tokenizer: Tokenizer, store: ArtifactStore, networks: Sequence[Network], benchmarks: Benchmarks
) -> None:
    """Refuse what cannot be read before the long work starts, and load the benchmarks with figures missing.

    Raises:
        InputError: an unreadable local text or benchmark, a hub that does not answer for a benchmark, a library that is not installed.
    """
    for key, text in named_texts(dataset).items():
        if text.source is DatasetSource.hub:
            require(f"{key}.source=hub", "datasets")
        else:
            texts.read_text(text, key)
    options = dataset.zero_shot
    if not options.tasks:
        if options.path is not None:
            log.warning("dataset.zero_shot.path=%s has no effect without dataset.zero_shot.tasks", options.path)
        return
    require(f"dataset.zero_shot.tasks=[{','.join(options.tasks)}]", "lm_eval")
    if tokenizer() is None:
        raise InputError(f"dataset.zero_shot.tasks=[{','.join(options.tasks)}]: a random model has no tokenizer; take another model")
    scored = options.scored([network.name for network in networks])
    chosen = [network for network in networks if network.name in scored]
    benchmarks.load(
        task for task in options.tasks if not all(store.holds("zero_shot", _task_inputs(options, task, network)) for network in chosen)
    )


def evaluate(
    dataset: DatasetConfig,
    tokenizer: Tokenizer,
    store: ArtifactStore,
    networks: Sequence[Network],
    benchmarks: Benchmarks,
    *,
    batch_size: int | None = None,
) -> tuple[Findings, list[Artefact]]:
    """Measure `networks`, one pass after the other.

    Args:
        batch_size: windows of a forward, see `perplexity`; of the benchmarks `dataset` says it.

    Returns:
        Perplexities, and accuracies where asked for; the artefacts that they are from.
    """
    options = dataset.zero_shot
    artefacts: list[Artefact] = []
    anytime: AnytimeRecord | None = None
    perplexities: dict[str, dict[str, Measurement]] = {key: {} for key in named_texts(dataset)}
    scored = options.scored([network.name for network in networks]) if options.tasks else []
    accuracies: dict[str, dict[str, AccuracyRecord]] = {name.value: {} for name in scored}

    def measured(own: list[Network]) -> None:
        """One pass; a function of its own, for a network that a loop's variable still names holds its model while the next is loaded."""
        nonlocal anytime
        for key, text in named_texts(dataset).items():
            for network, artefact in zip(own, _perplexities(store, own, tokenizer, text, key, batch_size), strict=True):
                found = Measurement.from_json(read_json(artefact.folder / "perplexity.json"))
                if found.anytime is not None and key == "dataset.evaluation":
                    anytime = AnytimeRecord(perplexity=found.anytime)
                perplexities[key][network.name.value] = found
                artefacts.append(artefact)
        for network in own:
            for task in options.tasks if network.name in scored else ():
                artefact = _accuracy(store, network, tokenizer, options, task, benchmarks)
                accuracies[network.name.value][task] = AccuracyRecord.from_json(read_json(artefact.folder / "accuracy.json"))
                artefacts.append(artefact)

    for own in passes(networks):
        measured(own)
    by_text = {key.rpartition(".")[2]: _on_one_text(measured) for key, measured in perplexities.items()}
    findings = Findings(
        anytime=anytime,
        perplexity=by_text.pop("evaluation"),
        perplexity_by_text=by_text or None,
        zero_shot=accuracies if options.tasks else None,
    )
    return findings, artefacts


def _on_one_text(measured: dict[str, Measurement]) -> PerplexityRecord:
    some = next(iter(measured.values()))
    networks = {name: found.value for name, found in measured.items()}
    return PerplexityRecord(networks=networks, windows=some.windows, window=some.window, tokens=some.tokens)


def _perplexities(
    store: ArtifactStore, networks: Sequence[Network], tokenizer: Tokenizer, text: TextConfig, key: str, batch_size: int | None
) -> list[Artefact]:
    """Of the networks of one pass."""
    name, numbers = key.rpartition(".")[2], {network.name: number for number, network in enumerate(networks)}

    def windows(vocabulary: int) -> Int[Tensor, "W L"]:
        return texts.token_windows(text, key, tokenizer(), vocabulary)

    def measured(missing: Sequence[Network]) -> Iterator[tuple[NetworkName, Measurement]]:
        first = missing[0]
        if first.together is not None:
            yield from first.together.measure([network.name for network in missing], windows, name, kept, batch_size)
        else:
            model = first.build()
            passes = kept([first.name]) if is_offloaded(model) else Passes()
            yield first.name, first.measure(model, windows(model.config.vocab_size), f"{first.name} {name}", passes, batch_size)

    def measure(folders: dict[int, Path]) -> Iterator[int]:
        for network, found in measured([networks[number] for number in folders]):
            write_json(folders[numbers[network]] / "perplexity.json", found.to_json())
            yield numbers[network]

    def kept(names: Sequence[NetworkName]) -> Passes:
        return StoredPasses(store, "evaluate_pass", {"networks": [inputs[numbers[network]] for network in names]})

    source = text_source(text, store.digests)
    inputs = [network.inputs | {"network": network.name.value, "text": source} for network in networks]
    return store.load_or_compute_together("evaluate", inputs, measure)


def _accuracy(
    store: ArtifactStore,
    network: Network,
    tokenizer: Tokenizer,
    options: ZeroShotConfig,
    task: str,
    benchmarks: Benchmarks,
) -> Artefact:
    def measure(folder: Path) -> None:
        start = time.perf_counter()
        prefix, limit, batch_size = network.prefix_tokens(), options.limit, options.batch_size
        found = zero_shot.accuracy(network.build(), tokenizer(), benchmarks[task], limit=limit, batch_size=batch_size, prefix_tokens=prefix)
        write_json(folder / "accuracy.json", found.to_json())
        log.info("zero-shot %s %s: acc %.4f, %.1f s", network.name, task, found.acc, time.perf_counter() - start)

    return store.load_or_compute("zero_shot", _task_inputs(options, task, network), measure)


def _task_inputs(options: ZeroShotConfig, task: str, network: Network) -> dict[str, Any]:
    return network.inputs | {"network": network.name.value, "benchmark": zero_shot.fingerprint(options, task)}
