"""Zero-shot accuracy on multiple-choice benchmarks, through lm-eval.

A model answers with the choice that it finds most likely: `acc` compares log-likelihoods, `acc_norm` log-likelihoods divided
by the choice's length in bytes. Prompts, targets and metrics are lm-eval's own: each task here is the task file that lm-eval
ships, read from the hub's data set or, with `dataset.zero_shot.path`, from TASK.jsonl with the same fields.

lm-eval pads the sequences of a batch on the right and passes no mask: a causal model does not see the padding, and the
spiking one codes each token by itself. What the batch size can move is the rounding of a matrix product, and a coded network
amplifies it: one threshold passed or not moved log-likelihoods by 0.2 to 0.36 where 11 rows took another kernel on the CPU than 88.
Products here have `MIN_TOKENS` rows at least; from there on batches of 1, 4 and 8 agreed in every bit. lm-eval's request cache
stays off: it knows requests by their text alone and would answer for the second network with the first one's scores.
"""

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spikellm.config import InputError, ZeroShotConfig

log = logging.getLogger(__name__)

MIN_TOKENS = 32  # in a sequence, the rest is padding
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Where lm-eval keeps a task, and what a row of it must hold."""

    file: str  # below lm_eval/tasks
    split: str  # the split that is scored, as published tables do
    fields: tuple[str, ...]
    has_answer: Callable[[dict[str, Any]], bool]  # the row's answer names one of its choices


def _arc(file: str) -> Benchmark:
    def has_answer(row: dict[str, Any]) -> bool:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        return len(labels) == len(texts) and row["answerKey"] in labels

    return Benchmark(file=file, split="test", fields=("question", "choices", "answerKey"), has_answer=has_answer)


BENCHMARKS = {
    "winogrande": Benchmark(
        file="winogrande/default.yaml", split="validation", fields=("sentence", "option1", "option2", "answer"),
        has_answer=lambda row: "_" in row["sentence"] and row["answer"] in ("1", "2"),
    ),
    "arc_challenge": _arc("arc/arc_challenge.yaml"),
    "arc_easy": _arc("arc/arc_easy.yaml"),
    "piqa": Benchmark(
        file="piqa/piqa.yaml", split="validation", fields=("goal", "sol1", "sol2", "label"),
        has_answer=lambda row: row["label"] in (0, 1),
    ),
    "hellaswag": Benchmark(
        file="hellaswag/hellaswag.yaml", split="validation", fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        has_answer=lambda row: 0 <= int(row["label"]) < len(row["endings"]),
    ),
}  # fmt: skip


def read_rows(folder: str, task: str) -> list[dict[str, Any]]:
    """The rows of FOLDER/TASK.jsonl, each with the fields of its benchmark and no others.

    Raises:
        InputError: missing, unreadable or empty file; a row that is no JSON object, lacks a field or has no answer.
    """
    path, benchmark = Path(folder).expanduser() / f"{task}.jsonl", BENCHMARKS[task]
    key = f"dataset.zero_shot.path={folder}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{key}: cannot read {path.name} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {path.name} is not UTF-8 text (byte {error.start})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place, wanted = f"{key}: {path.name} line {number}", f"{task} takes {', '.join(benchmark.fields)}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is not JSON ({error.msg}); {wanted}") from error
        missing = [name for name in benchmark.fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise InputError(f"{place} has no {', '.join(missing)}; {wanted}")
        try:
            answered = benchmark.has_answer(row)
        except (TypeError, ValueError, KeyError):
            answered = False
        if not answered:
            raise InputError(f"{place}: {benchmark.fields[-1]}={row[benchmark.fields[-1]]!r} names none of its choices; {wanted}")
        rows.append({name: row[name] for name in benchmark.fields})
    if not rows:
        raise InputError(f"{key}: {path.name} has no rows")
    return rows


def fingerprint(config: ZeroShotConfig, task: str) -> dict[str, Any]:
    """What decides a task's rows: their content where they are local."""
    source = "hub"
    if config.path is not None:
        source = hashlib.sha256(json.dumps(read_rows(config.path, task)).encode()).hexdigest()
    return {"task": task, "rows": source, "limit": config.limit, "lm_eval": version("lm-eval")}


def load_tasks(config: ZeroShotConfig, names: list[str]) -> dict[str, Any]:
    """lm-eval's task objects by name.

    Raises:
        InputError: see `read_rows`; the hub does not answer.
    """
    with tempfile.TemporaryDirectory() as folder, _only(logging.ERROR):
        import lm_eval.tasks

        for name in names:
            benchmark = BENCHMARKS[name]
            task: dict[str, Any] = {"include": str(Path(lm_eval.tasks.__file__).parent / benchmark.file), "task": name}
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
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False)
        try:
            return dict(manager.load(list(names))["tasks"])
        except Exception as error:  # the hub client raises a dozen unrelated types when it is offline
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"dataset.zero_shot.tasks=[{','.join(names)}]: the hub does not answer for them ({reason}); "
                "dataset.zero_shot.path=FOLDER reads local TASK.jsonl files"
            ) from error


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Any,
    *,
    limit: int | None,
    batch_size: int,
    prefix_tokens: list[int],
) -> dict[str, float]:
    """Accuracy of `model` on one of `load_tasks`.

    Args:
        limit: first rows; None: all.
        batch_size: sequences a forward.
        prefix_tokens: what stands before every sequence by itself: where BOS is among them, the tokenizer must not add another.

    Returns:
        acc and acc_norm (where the benchmark has it) with their standard errors (from two rows on), in [0, 1]; `rows`.
    """
    assert tokenizer is not None
    with _only(logging.ERROR):  # that arguments for loading a model by name may be ignored
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        class Scorer(HFLM):
            """Progress bars only where somebody looks on; no short sequences."""

            def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
                return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

            def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
                length = inps.shape[1]
                return super()._model_call(pad(inps, (0, max(0, MIN_TOKENS - length))))[:, :length]

        scorer = Scorer(
            pretrained=model,
            tokenizer=copy(tokenizer),  # it is given a padding token
            batch_size=batch_size,
            add_bos_token=False if tokenizer.bos_token_id in prefix_tokens else None,
        )
    with _only(logging.WARNING):
        found = evaluate(scorer, {"tasks": {task.task_name: task}}, limit=limit, log_samples=False)
    scores = {name.partition(",")[0]: value for name, value in found["results"][task.task_name].items()}
    return {name: scores[name] for name in METRICS if isinstance(scores.get(name), float)} | {
        "rows": found["n-samples"][task.task_name]["effective"]
    }


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
