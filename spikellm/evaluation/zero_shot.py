"""Zero-shot accuracy on multiple-choice benchmarks, through lm-eval.

A model answers with the choice that it finds most likely: `acc` compares log-likelihoods, `acc_norm` log-likelihoods divided
by the choice's length in bytes. Prompts, targets and metrics are lm-eval's own: each task here is the task file that lm-eval
ships, read from the hub's data set or, with `dataset.zero_shot.path`, from TASK.jsonl with the same fields.

lm-eval pads the sequences of a batch on the right and passes no mask: a causal model does not see the padding, and the
spiking one codes each token by itself. What the batch size can move is the rounding of a matrix product, and a coded network
amplifies it: one threshold passed or not moved log-likelihoods by 0.2 to 0.36 where 11 rows took another kernel on the CPU than 88.
Products here have `MIN_TOKENS` rows at least; from there on batches of 1, 4 and 8 agreed in every bit. lm-eval's request cache
stays off: it knows requests by their text alone and would answer for the second network with the first one's scores.

Where decoder layers lie on disk, all requests go through a layer before the next one is read. lm-eval scores twice then: first only to
show its batches, in its order; then their logits are there.
"""

import hashlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, float32, no_grad
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from spikellm.config.boundary import blamed_on, read_file
from spikellm.config.checks import InputError
from spikellm.config.dataset import ZeroShotConfig
from spikellm.evaluation.batches import sequences
from spikellm.model.blocks import flights, walk
from spikellm.model.offload import is_offloaded
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import HEAD
from spikellm.store.record import AccuracyRecord

log = logging.getLogger(__name__)

MIN_TOKENS = 32  # in a sequence, the rest is padding
SHOWN = 60  # of a value, in a message [characters]
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field of a row may hold."""

    meaning: str
    accepts: Callable[[object], bool]


def _is_text(value: object) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer reads."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_answer(value: object) -> bool:
    """A text of which something is left without [brackets], which HellaSwag's task strips: nothing has no likelihood."""
    return isinstance(value, str) and _is_text(value) and re.sub(r"\[.*?\]", "", value).strip() != ""


def _are_choices(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in ("text", "label")):
        return False
    texts, labels = value["text"], value["label"]
    return all(map(_is_answer, texts)) and all(map(_is_text, labels)) and len(texts) == len(labels) == len(set(labels))


TEXT, ANSWER = Kind("a text", _is_text), Kind("a text that is not empty", _is_answer)
ANY = Kind("anything", lambda _: True)  # the label: see `has_answer`
CHOICES = Kind("{text: [texts], label: [as many different labels]}", _are_choices)
ENDINGS = Kind("a list of texts that are not empty", lambda value: isinstance(value, list) and all(map(_is_answer, value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Where lm-eval keeps a task, and what a row of it must hold."""

    file: str  # below lm_eval/tasks
    split: str  # the split that is scored, as published tables do
    fields: dict[str, Kind]
    has_answer: Callable[[dict[str, Any]], bool]  # the last field of a row names one of its choices


def _arc(file: str) -> Benchmark:
    fields = {"question": ANSWER, "choices": CHOICES, "answerKey": ANY}
    return Benchmark(file=file, split="test", fields=fields, has_answer=lambda row: row["answerKey"] in row["choices"]["label"])


def _whole(value: object) -> int:
    """A number as JSON or as text; -1 for anything else. True is no 1."""
    return int(value) if type(value) is int or (isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value)) else -1


BENCHMARKS = {
    "winogrande": Benchmark(
        file="winogrande/default.yaml", split="validation",
        fields={"sentence": TEXT, "option1": ANSWER, "option2": ANSWER, "answer": ANY},
        has_answer=lambda row: row["sentence"].partition("_")[2].strip() != "" and row["answer"] in ("1", "2"),
    ),
    "arc_challenge": _arc("arc/arc_challenge.yaml"),
    "arc_easy": _arc("arc/arc_easy.yaml"),
    "piqa": Benchmark(
        file="piqa/piqa.yaml", split="validation", fields={"goal": TEXT, "sol1": ANSWER, "sol2": ANSWER, "label": ANY},
        has_answer=lambda row: type(row["label"]) is int and row["label"] in (0, 1),
    ),
    "hellaswag": Benchmark(
        file="hellaswag/hellaswag.yaml", split="validation",
        fields={"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": ENDINGS, "label": ANY},
        has_answer=lambda row: 0 <= _whole(row["label"]) < len(row["endings"]),
    ),
}  # fmt: skip


def read_rows(folder: str, task: str) -> list[dict[str, Any]]:
    """The rows of FOLDER/TASK.jsonl, each with the fields of its benchmark and no others.

    Raises:
        InputError: missing, unreadable or empty file; a row that is no JSON object, lacks a field, has one of another type or no answer.
    """
    key, name, benchmark = f"dataset.zero_shot.path={folder}", f"{task}.jsonl", BENCHMARKS[task]
    wanted = f"{task} takes {', '.join(benchmark.fields)}"
    content = read_file(f"{folder}/{name}", f"{key}: cannot read {name}", wanted)
    try:
        lines = content.decode("utf-8-sig").split("\n")  # no other mark ends a line: JSON may hold them in its texts
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {name} is not UTF-8 text (byte {error.start})") from error
    rows = [_read_row(line, f"{key}: {name} line {number}", task, wanted) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InputError(f"{key}: {name} has no rows")
    return rows


def _read_row(line: str, place: str, task: str, wanted: str) -> dict[str, object]:
    benchmark = BENCHMARKS[task]
    with blamed_on(f"{place} is not JSON", wanted):
        row = json.loads(line)
    missing = [name for name in benchmark.fields if not isinstance(row, dict) or name not in row]
    if missing:
        raise InputError(f"{place} has no {', '.join(missing)}; {wanted}")
    for name, kind in benchmark.fields.items():
        if not kind.accepts(row[name]):
            raise InputError(f"{place}: {name}={_shown(row[name])} must be {kind.meaning}; {wanted}")
    if not benchmark.has_answer(row):
        answer = list(benchmark.fields)[-1]
        raise InputError(f"{place}: {answer}={_shown(row[answer])} names none of its choices; {wanted}")
    return {name: row[name] for name in benchmark.fields}


def _shown(value: object) -> str:
    """As it stands in the file, in ASCII, not too long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} .."


def fingerprint(config: ZeroShotConfig, task: str) -> dict[str, object]:
    """What decides a task's rows: their content where they are local."""
    source = "hub"
    if config.path is not None:
        source = hashlib.sha256(json.dumps(read_rows(config.path, task)).encode()).hexdigest()
    return {"task": task, "rows": source, "limit": config.limit, "lm_eval": version("lm-eval")}


def load_tasks(config: ZeroShotConfig, names: list[str]) -> dict[str, object]:
    """lm-eval's task objects by name.

    Raises:
        InputError: see `read_rows`; the hub does not answer.
    """
    with tempfile.TemporaryDirectory() as folder, _only(logging.ERROR):
        import lm_eval.tasks

        for name in names:
            benchmark = BENCHMARKS[name]
            task: dict[str, object] = {"include": str(Path(lm_eval.tasks.__file__).parent / benchmark.file), "task": name}
            if config.path is not None:
                rows = Path(folder) / f"{name}.jsonl"
                rows.write_text("".join(json.dumps(row) + "\n" for row in read_rows(config.path, name)), encoding="utf-8")
                splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
                task |= {"dataset_path": "json", "dataset_name": None} | splits | {f"{benchmark.split}_split": benchmark.split}
                # in memory: nothing of it outlives the folder
                task["dataset_kwargs"] = {
                    "data_files": {benchmark.split: str(rows)}, "cache_dir": f"{folder}/cache", "keep_in_memory": True,
                }  # fmt: skip
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
        key = f"dataset.zero_shot.tasks=[{','.join(names)}]"
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        if config.path is None:
            what, cure = f"{key}: the hub does not answer for them", "dataset.zero_shot.path=FOLDER reads local TASK.jsonl files"
        else:
            what, cure = (
                f"{key} with dataset.zero_shot.path={config.path}",
                "each row takes the types of the hub's data set",
            )
        with blamed_on(what, cure):
            return dict(manager.load(list(names))["tasks"])


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Any,
    *,
    limit: int | None,
    batch_size: int | None,
    prefix_tokens: list[int],
) -> AccuracyRecord:
    """Accuracy of `model` on one of `load_tasks`.

    Args:
        limit: first rows; None: all.
        batch_size: sequences a forward; None: see `batches.sequences`.
        prefix_tokens: what stands before every sequence by itself: where BOS is among them, the tokenizer must not add another.

    Returns:
        acc and acc_norm (where the benchmark has it) with their standard errors (from two rows on).
    """
    assert tokenizer is not None
    with _only(logging.ERROR):  # that arguments for loading a model by name may be ignored
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        class Scorer(HFLM):
            """Progress bars only where somebody looks on; no short sequences; layers on disk are read for all requests together."""

            asked: list[Tensor] | None = None  # batches, while lm-eval only shows them
            ahead: Iterator[Tensor] | None = None  # logits of the batches to come

            def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
                with blamed_on(f"dataset.zero_shot.tasks=[{task.task_name}]: lm-eval cannot score it", "take other rows or another model"):
                    return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

            def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
                if batch_size is None:  # lm-eval's own "auto" tries larger ones until memory is full
                    longest = max(len(context) + len(continuation) for _, context, continuation in requests)
                    self.batch_size_per_gpu = sequences(model, max(MIN_TOKENS, longest), logits=True)
                if not is_offloaded(model):
                    return super()._loglikelihood_tokens(requests, *arguments, **options)
                self.asked = []
                super()._loglikelihood_tokens(requests, disable_tqdm=True)
                self.ahead, self.asked = logits(model, self.asked), None
                return super()._loglikelihood_tokens(requests, *arguments, **options)

            def _model_call(self, inps: Tensor, *_: object, **__: object) -> Tensor:
                length = inps.shape[1]
                batch = pad(inps, (0, max(0, MIN_TOKENS - length)))
                if self.asked is not None:
                    self.asked.append(batch)
                    return inps.new_zeros((), dtype=float32).expand(*inps.shape, model.config.vocab_size)
                return (super()._model_call(batch) if self.ahead is None else next(self.ahead))[:, :length]

        scorer = Scorer(
            pretrained=model,
            tokenizer=deepcopy(tokenizer),  # it is given a padding token
            batch_size=batch_size or 1,
            trust_remote_code=False,
            # lm-eval asks for the token that stands for an empty context; no task here has one, and not every tokenizer a BOS or EOS
            prefix_token_id=next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0),
            add_bos_token=False if tokenizer.bos_token_id in prefix_tokens else None,
        )
    with _only(logging.WARNING):
        found = evaluate(scorer, {"tasks": {task.task_name: task}}, limit=limit, log_samples=False)
    scores = {name.partition(",")[0]: value for name, value in found["results"][task.task_name].items()}
    known = {name: scores[name] for name in METRICS if isinstance(scores.get(name), float)}
    return AccuracyRecord(**known, rows=found["n-samples"][task.task_name]["effective"])


@no_grad()
def logits(model: PreTrainedModel, batches: list[Int[Tensor, "_ _"]]) -> Iterator[Float[Tensor, "_ _ V"]]:
    """Those of every batch, one after the other, of which as many as `flights` allows go through the layers together."""
    head = model.get_submodule(HEAD)
    for some in flights(model, batches):
        yield from map(head, walk(model, some))


@contextmanager
def _only(level: int) -> Iterator[None]:
    """Within: lm-eval logs from `level` on."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
