"""Fingerprints of what is read: the content decides, whatever it is called and wherever it lies."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikellm.config.choices import DatasetSource, ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.config.model import ModelConfig
from spikellm.model.load import load_model, load_tokenizer, pinned
from spikellm.store import sources
from spikellm.store.artifacts import Digests
from spikellm.store.sources import job_inputs, model_source, text_source
from tests.configure import configure
from tests.jobs import SMALL, cached, run
from tests.models import BOS, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=258, bos_token_id=BOS, num_hidden_layers=1).save_pretrained(folder)
    byte_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original, tmp_path) -> ModelConfig:
    shutil.copytree(original, tmp_path / "model")
    return ModelConfig(name="mine", source=ModelSource.hub, path=str(tmp_path / "model"))


@pytest.fixture
def digests(tmp_path) -> Digests:
    return Digests(tmp_path / "memory.json")


READ = [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "chat_template.jinja", "chat_template.json", "adapter_config.json", "adapter_model.safetensors",
    "additional_chat_templates/tool.jinja",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_file_that_a_load_opens_counts(name, model, digests):
    """There, changed in a byte with size and time as before, and gone: three models."""
    path = Path(model.path) / name
    path.parent.mkdir(exist_ok=True)
    found = [model_source(model, digests)]
    if not path.exists():
        path.write_bytes(b"{}")
        found.append(model_source(model, digests))
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found.append(model_source(model, digests))
    assert all(found.count(each) == 1 for each in found)


def test_weights_in_a_folder_that_the_index_names_count(model, digests):
    folder = Path(model.path)
    (folder / "deep").mkdir()
    (folder / "deep" / "part.safetensors").write_bytes(b"1")
    before = model_source(model, digests)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "deep/part.safetensors"}}))
    named = model_source(model, digests)
    (folder / "deep" / "part.safetensors").write_bytes(b"2")
    assert before != named != model_source(model, digests)


def test_place_name_and_what_nobody_reads_do_not_count(model, digests, tmp_path):
    before = model_source(model, digests)
    for name in ("README.md", ".gitattributes", "consolidated.00.pth"):
        (Path(model.path) / name).write_text("text")
    assert model_source(model, digests) == before
    shutil.move(model.path, tmp_path / "elsewhere")
    moved = ModelConfig(name="other", source=ModelSource.hub, path=str(tmp_path / "elsewhere"), revision="main")
    assert model_source(moved, digests) == before


def test_a_packed_file_counts_by_its_content(tmp_path, monkeypatch, digests):
    package = tmp_path / "packed_model"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(name="packed", source=ModelSource.gguf, path="packed_model:a.gguf")
    found = []
    for content in (b"1234", b"1235"):
        (package / "a.gguf").write_bytes(content)
        (package / "b.gguf").write_bytes(content * len(found))  # another model
        found.append(model_source(config, digests))
    assert found[0] != found[1]


@pytest.fixture
def hub(original, tmp_path, monkeypatch) -> Path:
    """A hub's local cache with two commits of one model: weights and tokenizer of `v2` differ from those of `main`."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = repository / "snapshots" / commit
        shutil.copytree(original, folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return repository


def test_a_model_of_the_hub_is_one_commit_of_weights_and_tokenizer(hub, digests):
    found = {}
    for revision in (None, "main", "v2"):
        config = ModelConfig(name="far", source=ModelSource.hub, path="org/tiny", revision=revision)
        fixed = pinned(config)
        assert model_source(config, digests) == model_source(fixed, digests)  # as the local cache has it
        found[revision] = fixed.revision, load_tokenizer(config)("ab")["input_ids"][-2:], model_source(fixed, digests)
    assert found[None] == found["main"]
    assert (found["main"][0], found["v2"][0]) == ("a" * 40, "b" * 40)
    assert found["v2"][1] == found["main"][1][::-1]
    (hub / "refs" / "main").write_text("b" * 40)  # the branch goes on
    config = ModelConfig(name="far", source=ModelSource.hub, path="org/tiny")
    assert model_source(pinned(config), digests) == found["v2"][2]
    held = ModelConfig(name="far", source=ModelSource.hub, path="org/tiny", revision=found["main"][0])
    assert load_tokenizer(held)("ab")["input_ids"][-2:] == found["main"][1]


def test_a_model_that_is_not_there_yet_has_no_commit(hub, digests):
    config = ModelConfig(name="far", source=ModelSource.hub, path="org/another")
    assert model_source(config, digests)["commit"] is None


def test_a_dataset_s_folder_counts_by_all_its_files(tmp_path, digests):
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    config = TextConfig(source=DatasetSource.hub, path=str(folder), split="train")
    found = []
    for name, content in (("data/train.jsonl", "1"), ("data/train.jsonl", "2"), ("README.md", "---"), ("data/more.jsonl", "3")):
        (folder / name).write_text(content)
        found.append(text_source(config, digests))
    assert all(found.count(each) == 1 for each in found)
    shutil.move(folder, tmp_path / "elsewhere")
    assert text_source(TextConfig(source=DatasetSource.hub, path=str(tmp_path / "elsewhere"), split="train"), digests) == found[-1]


def test_a_text_is_read_once_for_its_fingerprint_and_its_line_ends_do_not_count(tmp_path, digests, monkeypatch):
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), read_bytes(path))[1])
    found = []
    for name, content in (("unix", b"a\nb"), ("dos", b"a\r\nb"), ("mark", b"\xef\xbb\xbfa\nb")):
        (tmp_path / name).write_bytes(content)
        config = TextConfig(source=DatasetSource.text, path=str(tmp_path / name))
        found += [text_source(config, digests) for _ in range(3)]
    assert len(read) == 3
    assert found[0] == found[3] != found[6]


def test_what_a_job_reads_is_in_its_inputs(model, digests, tmp_path):
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    rows, neurons = tmp_path / "piqa.jsonl", tmp_path / "neurons.pth"
    files = {"dataset.calibration": texts[0], "dataset.evaluation": texts[1], "dataset.extra.more": texts[2]}
    files |= {"dataset.zero_shot piqa": rows, "search.import_file": neurons, "model": Path(model.path) / "tokenizer.json"}
    for path in (*texts, rows, neurons):
        path.write_text("before")
    arguments = [
        "dataset=text", f"dataset.calibration.path={texts[0]}", f"dataset.evaluation.path={texts[1]}", f"search.import_file={neurons}",
        "snn.coding=phase", "+dataset.extra={more: {source: text, path: " + str(texts[2]) + "}}", f"dataset.zero_shot.path={tmp_path}",
        "dataset.zero_shot.tasks=[piqa]", "model.source=hub", f"model.path={model.path}",
    ]  # fmt: skip
    config = configure(*arguments)
    before = job_inputs(config, digests)
    assert set(before) == {*files, "code"}
    for key, path in files.items():
        path.write_text("after")
        after = job_inputs(config, digests)
        assert {name for name in before if before[name] != after[name]} == {key}
        before = after
    assert set(job_inputs(configure(*arguments, "stages=[calibrate]"), digests)) == {
        "model", "dataset.calibration", "search.import_file", "code"
    }  # fmt: skip
    neurons.unlink()
    assert job_inputs(config, digests)["search.import_file"] is None


def test_another_tokenizer_another_result(original, tmp_path):
    """A fault of the kind, the whole way: only the tokenizer's file differs."""
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    arguments = ["model.source=hub", f"model.path={folder}", "snn.T=3", "grain=1", "stages=[calibrate,evaluate]", "spikes.enabled=false"]
    first = run(tmp_path, *arguments)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    second = run(tmp_path, *arguments)
    assert not any(cached(second).values())
    assert second["perplexity"]["ann"] != first["perplexity"]["ann"]
    assert second["perplexity"] == run(tmp_path / "fresh", *arguments)["perplexity"]


def test_sources_are_loaded_as_they_are_fingerprinted(hub, tmp_path):
    """A branch that goes on between two runs is another model; within one run everything is of one commit."""
    arguments = [*SMALL, "model.source=hub", "model.path=org/tiny", f"output_root={tmp_path}", "stages=[calibrate]"]
    from spikellm.run.stages import run_stages

    first = run_stages(configure(*arguments)).results.to_json()
    assert run_stages(configure(*arguments)).results.stages["calibrate"].cached
    (hub / "refs" / "main").write_text("b" * 40)
    second = run_stages(configure(*arguments)).results.to_json()
    assert not second["stages"]["calibrate"]["cached"]
    assert first["inputs"]["model"] != second["inputs"]["model"]
    assert (
        sources.model_source(ModelConfig(name="m", source=ModelSource.hub, path="org/tiny"), Digests(tmp_path / "m"))["commit"] == "b" * 40
    )
    assert torch.is_tensor(load_model(pinned(configure(*arguments).model), configure(*arguments).hardware).lm_head.weight)
