"""Zero-shot accuracy against log-likelihoods that transformers gives, and lm-eval's own entry on the real model."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from spikellm.config.checks import InputError
from spikellm.config.choices import Device, DType
from spikellm.config.dataset import ZERO_SHOT_TASKS, ZeroShotConfig
from spikellm.config.model import HardwareConfig
from spikellm.evaluation import zero_shot
from spikellm.model import blocks
from spikellm.model.conversion import fill, install
from spikellm.model.load import load_model, load_offloaded
from spikellm.model.prefix import attach_prefix
from spikellm.run.stages import run_stages
from tests.codes import base2_tables
from tests.configure import configure
from tests.jobs import WITH_REPORT
from tests.launch import launch, one_line
from tests.models import BOS, byte_model, byte_tokenizer, keeping, reads, saved, tiny_model
from tests.texts import random_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """FOLDER of dataset.zero_shot.path, with every benchmark."""
    path = tmp_path_factory.mktemp("zero_shot")
    for seed, task in enumerate(ZERO_SHOT_TASKS):
        (path / f"{task}.jsonl").write_text("".join(json.dumps(row | {"id": 1}) + "\n" for row in random_rows(task, seed=seed)))
    return path


@pytest.fixture(scope="module")
def tasks(folder) -> dict:
    return zero_shot.load_tasks(ZeroShotConfig(path=str(folder)), list(ZERO_SHOT_TASKS))


def by_hand(model, tokenizer, pairs: list[tuple[str, str]]) -> list[float]:
    """Log-likelihood of each continuation after its context, one sequence at a time."""
    found = []
    for context, continuation in pairs:
        start, ids = len(tokenizer(context)["input_ids"]), torch.tensor([tokenizer(context + continuation)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(scores.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    return found


def spiking_tiny(*, vocab_size: int = 258):
    model = tiny_model(vocab_size=vocab_size)
    install(model, rotated=(), query_block=16)
    fill(model, base2_tables(model), compiled=False)
    return model


@pytest.mark.parametrize("make", [lambda: tiny_model(vocab_size=258), spiking_tiny], ids=["ann", "snn"])
def test_accuracy_is_that_of_log_likelihoods_by_hand(make, tasks, folder):
    model, tokenizer = make(), byte_tokenizer()
    rows = [json.loads(line) for line in (folder / "piqa.jsonl").read_text().splitlines()]
    right, right_by_length = [], []
    for row in rows:
        choices = [row["sol1"], row["sol2"]]
        scores = torch.tensor(by_hand(model, tokenizer, [(f"Question: {row['goal']}\nAnswer:", f" {choice}") for choice in choices]))
        right.append(int(scores.argmax()) == row["label"])
        right_by_length.append(int((scores / torch.tensor([len(choice) for choice in choices])).argmax()) == row["label"])
    found = zero_shot.accuracy(model, tokenizer, tasks["piqa"], limit=None, batch_size=5, prefix_tokens=[]).to_json()
    assert found["rows"] == len(rows)
    for name, hits in (("acc", right), ("acc_norm", right_by_length)):
        share = sum(hits) / len(hits)
        assert found[name] == share
        assert found[f"{name}_stderr"] == pytest.approx((share * (1 - share) / (len(hits) - 1)) ** 0.5)


@pytest.mark.parametrize("task", ZERO_SHOT_TASKS)
def test_the_batch_size_is_not_felt(task, tasks):
    model, tokenizer = spiking_tiny(), byte_tokenizer()
    one, eight, chosen = (
        zero_shot.accuracy(model, tokenizer, tasks[task], limit=12, batch_size=size, prefix_tokens=[]).to_json() for size in (1, 8, None)
    )
    assert one == eight == chosen
    assert one["rows"] == 12
    assert ("acc_norm" in one) == (task != "winogrande")


def logged(monkeypatch) -> list:
    """Every answer that lm-eval gets from now on: log-likelihood, whether the continuation is the likeliest."""
    from lm_eval.models.huggingface import HFLM

    found, whole = [], HFLM.loglikelihood
    monkeypatch.setattr(HFLM, "loglikelihood", lambda *given, **options: found.append(whole(*given, **options)) or found[-1])
    return found


@pytest.mark.parametrize(("dtype", "task"), [(DType.float32, "hellaswag"), (DType.float32, "piqa"), (DType.bfloat16, "winogrande")])
def test_layers_on_disk_are_read_once_for_a_task_and_change_no_bit(dtype, task, tasks, tmp_path, monkeypatch):
    config, cpu = saved("qwen3", tmp_path, dtype, vocab_size=258), HardwareConfig(device=Device.cpu)
    here, there = load_model(config, cpu), load_offloaded(config, cpu, keeping(tmp_path / "kept")[0])
    answers, read = logged(monkeypatch), reads(monkeypatch)

    def accuracy(model) -> dict:
        read.clear()
        found = zero_shot.accuracy(model, byte_tokenizer(), tasks[task], limit=12, batch_size=5, prefix_tokens=[1])
        return found.to_json()

    assert accuracy(here) == accuracy(there)  # the ANN in transformers' own attention
    for model in (here, there):
        install(model, rotated=(), query_block=16)
        attach_prefix(model, [1])
        fill(model, base2_tables(model), compiled=False)
    assert accuracy(here) == accuracy(there)
    assert len(read) == len(set(read)) == sum(1 for _ in there.model.layers.parameters())
    monkeypatch.setattr(blocks, "STATES_BYTES", 2 * 5 * 40 * 64 * 4)  # two short batches
    assert accuracy(there)
    assert len(read) > len(set(read))
    assert answers[0] == answers[1] != answers[2] == answers[3] == answers[4]


def test_bos_in_the_prefix_is_the_bos_that_the_tokenizer_adds(tasks):
    """Without neurons, keys and values of BOS before the text are the same as BOS in it: it must not stand there twice."""
    plain, installed, tokenizer = tiny_model(vocab_size=258), tiny_model(vocab_size=258), byte_tokenizer(adds_bos=True)
    install(installed, rotated=())
    attach_prefix(installed, [BOS])
    read: list[torch.Tensor] = []
    installed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))

    def accuracy(model, prefix: list[int]) -> dict:
        return zero_shot.accuracy(model, tokenizer, tasks["arc_easy"], limit=None, batch_size=4, prefix_tokens=prefix).to_json()

    assert accuracy(installed, [BOS]) == accuracy(plain, [])
    assert not any((ids == BOS).any() for ids in read)
    read.clear()
    accuracy(installed, [])
    assert all((ids[:, 0] == BOS).all() for ids in read)


@pytest.mark.parametrize("special", [named for count in range(4) for named in combinations(("bos", "eos", "pad"), count)])
def test_every_set_of_special_tokens_will_do(special, tasks):
    """No task has an empty context, so none is needed; what is not in the text changes no score."""
    model, tokenizer = tiny_model(vocab_size=258), byte_tokenizer(special=special)
    for name in ("piqa", "winogrande"):
        found, wanted = (
            zero_shot.accuracy(model, each, tasks[name], limit=4, batch_size=4, prefix_tokens=[]).to_json()
            for each in (tokenizer, byte_tokenizer())
        )
        assert found == wanted
    assert len(tokenizer) == BOS + len(special)  # lm-eval adds a token for padding to its own copy


def test_stages_write_accuracies_and_keep_them(folder, tmp_path):
    arguments = [*WITH_REPORT, *byte_model(tmp_path / "model"), f"output_root={tmp_path}", f"dataset.zero_shot.path={folder}"]

    def run(*more: str) -> dict:
        return run_stages(configure(*arguments, "dataset.zero_shot.limit=6", *more)).results.to_json()

    first = run("dataset.zero_shot.tasks=[piqa,winogrande]")
    assert {network: list(found) for network, found in first["zero_shot"].items()} == {
        key: ["piqa", "winogrande"] for key in ("ann", "snn")
    }
    assert set(first["zero_shot"]["ann"]["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "rows"}
    again = run("dataset.zero_shot.tasks=[piqa,winogrande]", "dataset.zero_shot.batch_size=1")
    assert again["stages"]["evaluate"]["cached"]
    assert again["zero_shot"] == first["zero_shot"]
    more = run("dataset.zero_shot.tasks=[piqa,arc_easy]", "dataset.zero_shot.networks=[base2,snn]")
    assert not more["stages"]["evaluate"]["cached"]
    assert more["zero_shot"]["snn"]["piqa"] == first["zero_shot"]["snn"]["piqa"]
    assert list(more["zero_shot"]) == ["base2", "snn"]


GOOD = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["cannot read piqa.jsonl"]),
        ("", ["no rows"]),
        ("\n\n", ["no rows"]),
        (json.dumps(GOOD) + "\n{", ["line 2", "JSON"]),
        ("[1, 2]", ["line 1", "goal, sol1, sol2, label"]),
        (json.dumps({"goal": "g", "sol1": "a", "label": 0}), ["line 1", "no sol2"]),
        (json.dumps(GOOD | {"label": -1}), ["line 1", "label=-1"]),
        (json.dumps(GOOD | {"label": [0]}), ["line 1", "label=[0]"]),
        (b"\xff\xfe", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(content, named, tmp_path):
    if content is not None:
        (tmp_path / "piqa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        zero_shot.read_rows(str(tmp_path), "piqa")
    for part in (f"dataset.zero_shot.path={tmp_path}", "piqa", *named):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}),
        ("winogrande", {"sentence": "a _", "option1": "a", "option2": "b", "answer": ""}),
        ("arc_easy", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}),
        ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["a", "b"], "label": ""}),
    ],
)
def test_a_row_without_an_answer_is_refused(task, row, tmp_path):
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"line 1: .*names none of its choices"):
        zero_shot.read_rows(str(tmp_path), task)


ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
SWAG = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": "1"}
WINO = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}


@pytest.mark.parametrize(
    ("task", "good", "field", "values"),
    [
        ("piqa", GOOD, "goal", [None, 5, True, ["g"], "\ud800"]),
        ("piqa", GOOD, "sol1", [["a"], "", " ", None, 5, {"a": "b"}]),
        ("piqa", GOOD, "label", [True, 2, 0.0, "0", None, [0]]),
        ("hellaswag", SWAG, "endings", ["abcd", [1, 2], ["a", None], [["a"], "b"], ["a", ""], ["a", "[header]"], None]),
        ("hellaswag", SWAG, "label", [0.9, 2, True, "-1", "1.0", "", None, "\u00b2"]),
        ("hellaswag", SWAG, "ctx_a", [None, 1]),
        ("arc_easy", ARC, "choices", [
            ["a"], {"text": ["a", "b"], "label": ["A", "A"]}, {"text": "ab", "label": ["A", "B"]}, {"text": [], "label": 1},
            {"text": ["a", 1], "label": ["A", "B"]}, {"text": ["a"], "label": ["A", "B"]}, {"text": ["a", "b"]},
        ]),
        ("arc_challenge", ARC, "answerKey", ["C", 1, ["A"], None]),
        ("arc_challenge", ARC, "question", ["", 7]),
        ("winogrande", WINO, "option2", [None, ""]),
        ("winogrande", WINO, "answer", [1, True, "3", ["1"]]),
        ("winogrande", WINO, "sentence", [None, ["_"]]),
    ],
)  # fmt: skip
def test_every_field_has_its_type(task, good, field, values, tmp_path):
    path = tmp_path / f"{task}.jsonl"
    path.write_text("\ufeff" + json.dumps(good) + "\r\n", encoding="utf-8")  # a byte order mark and another end of line do no harm
    assert zero_shot.read_rows(str(tmp_path), task) == [good]
    for value in values:
        path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {field: value}))
        with pytest.raises(InputError, match=rf"{task}\.jsonl line 3: {field}="):
            zero_shot.read_rows(str(tmp_path), task)


def test_lines_end_where_json_lines_do(tmp_path):
    row = GOOD | {"goal": "one\u2028two\x85three"}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert zero_shot.read_rows(str(tmp_path), "piqa") == [row]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("dataset.zero_shot.tasks=[piqa,boolq]", ["boolq", "hellaswag"]),
        ("dataset.zero_shot.tasks=[piqa,piqa]", ["there twice"]),
        ("dataset.zero_shot.networks=[cnn]", ["cnn", "base2"]),
        ("dataset.zero_shot.limit=0", ["limit=0"]),
        ("dataset.zero_shot.batch_size=0", ["batch_size=0"]),
    ],
)
def test_wrong_options_are_refused(argument, named):
    with pytest.raises(InputError) as caught:
        configure(argument)
    assert all(part in str(caught.value) for part in ("dataset.zero_shot", *named))


def test_wrong_input_is_refused_before_the_long_work(folder, tmp_path):
    whole = [*WITH_REPORT, f"output_root={tmp_path}/out"]
    line = one_line(launch(*whole, "texts=[local]", "dataset.extra.local.path=/no/such.txt"))
    assert "dataset.extra.local.path=/no/such.txt" in line
    with pytest.raises(InputError, match="has no tokenizer"):
        run_stages(configure(*whole, "dataset.zero_shot.tasks=[piqa]", f"dataset.zero_shot.path={folder}"))
    model = byte_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"cannot read piqa\.jsonl"):
        run_stages(configure(*whole, *model, "dataset.zero_shot.tasks=[piqa]", "dataset.zero_shot.path=/no/such"))
    with pytest.raises(InputError, match=r"dataset\.zero_shot\.tasks=\[piqa\]: the hub does not answer"):
        run_stages(configure(*whole, *model, "dataset.zero_shot.tasks=[piqa]"))
    assert not list((tmp_path / "out").rglob("artifacts/*/*"))


@pytest.mark.slow
def test_the_real_model_scores_as_in_lm_eval_itself(real_model, real_tokenizer, shared_data, tmp_path):
    """lm-eval's own entry, given its shipped task with the file as data set."""
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    source, name = shared_data / "zeroshot", "arc_easy"
    task = {
        "include": f"{Path(lm_eval.__file__).parent}/tasks/arc/arc_easy.yaml",
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
    }
    task |= {"training_split": None, "validation_split": None, "fewshot_split": None}
    (tmp_path / "task.yaml").write_text(json.dumps(task | {"dataset_kwargs": {"data_files": {"test": f"{source}/{name}.jsonl"}}}))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    direct = HFLM(pretrained=real_model, tokenizer=real_tokenizer)
    wanted = lm_eval.simple_evaluate(direct, tasks=[name], task_manager=manager, limit=10)["results"][name]
    ours = zero_shot.load_tasks(ZeroShotConfig(path=str(source)), [name])[name]
    found = zero_shot.accuracy(real_model, real_tokenizer, ours, limit=10, batch_size=8, prefix_tokens=[]).to_json()
    assert {f"{metric},none": value for metric, value in found.items() if metric != "rows"}.items() <= wanted.items()
