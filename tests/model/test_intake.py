"""A folder of weights fills its model or is refused: one line with the file or tensor and the cure, before any work."""

import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spikellm.config.checks import InputError
from spikellm.config.choices import Device, DType, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.model import checkpoint
from spikellm.model.conversion import fill, install
from spikellm.model.load import load_model, load_tokenizer
from tests.codes import base2_tables
from tests.models import tiny_model

CPU = HardwareConfig(device=Device.cpu)
WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def hub(folder, **options) -> ModelConfig:
    return ModelConfig(name="mine", source=ModelSource.hub, path=str(folder), **options)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), unk_token="w0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    word_tokenizer(256).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit_config(folder, **entries) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | entries))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS, {"format": "pt"})


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(share: float, name: str = WEIGHTS):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: int(share * (folder / name).stat().st_size)])


def weights(change):
    return lambda folder: edit_weights(folder, change)


def config(**entries):
    return lambda folder: edit_config(folder, **entries)


def pickled(content):
    def change(folder):
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def spiking(folder) -> None:
    model = tiny_model()
    install(model, rotated=())
    fill(model, base2_tables(model))
    checkpoint.save(model, folder)


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {
    "a tensor less": (weights(lambda t: {k: v for k, v in t.items() if k != UP}), f"1 tensors of the model are not in .*{UP}"),
    "a layer less": (weights(lambda t: {k: v for k, v in t.items() if "layers.1." not in k}), r"9 tensors .*model\.layers\.1\."),
    "no lm_head": (weights(lambda t: {k: v for k, v in t.items() if "lm_head" not in k}), "1 tensors .*lm_head.weight first"),
    "more layers in the config": (config(num_hidden_layers=3), r"9 tensors .*model\.layers\.2\."),
    "fewer layers in the config": (config(num_hidden_layers=1), r"9 weights .* no place .*model\.layers\.1\."),
    "another prefix": (weights(lambda t: {f"wrapped.{k}": v for k, v in t.items()}), "21 tensors .*and 18 in it are .*wrapped"),
    "biases that the config denies": (weights(lambda t: t | {UP.replace("weight", "bias"): torch.ones(144)}), "1 weights .*up_proj.bias"),
    "another shape": (weights(lambda t: t | {UP: torch.ones(144, 63)}), rf"1 tensors .*{UP} first: \(144, 63\), not \(144, 64\)"),
    "a NaN": (weights(lambda t: t | {"lm_head.weight": t["lm_head.weight"] * torch.nan}), "lm_head.weight has 16384 .*NaN.*float32; give"),
    "an infinity": (weights(lambda t: t[UP].view(-1)[5:6].fill_(-torch.inf) and None), f"{UP} has 1 values"),
    "empty": (write(WEIGHTS, b""), f"{WEIGHTS}: is empty"),
    "a pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS}: is a git-lfs pointer.*git lfs pull"),
    "a tokenizer's pointer": (write("tokenizer.json", POINTER), "tokenizer.json: is a git-lfs pointer"),
    "random bytes": (write(WEIGHTS, bytes(range(255, 0, -1)) * 9), f"{WEIGHTS}: SafetensorError"),
    "cut in half": (cut(0.5), f"{WEIGHTS}: SafetensorError"),
    "cut in the header": (cut(0.001), f"{WEIGHTS}: SafetensorError"),
    "a pipe": (lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)), f"{WEIGHTS}: is no file"),
    "a folder": (lambda folder: (folder / "tokenizer.model").mkdir(), "tokenizer.model: is no file"),
    "a config that is no JSON": (write("config.json", b"{"), "config.json: JSONDecodeError"),
    "a config that is a list": (write("config.json", b"[1]"), "config.json: holds no JSON object"),
    "a generation config cut short": (write("generation_config.json", b'{"max_length"'), "generation_config.json: JSONDecodeError"),
    "a tokenizer cut short": (cut(0.5, "tokenizer.json"), "tokenizer.json: JSONDecodeError"),
    "bytes that are no text": (write("tokenizer_config.json", b"\xff\xfe\xfa"), "tokenizer_config.json: Unicode"),
    "a pickle of a list": (pickled([1, 2]), "pytorch_model.bin: is no pickle of weights"),
    "a pickle of another class": (pickled(io.StringIO("text")), "pytorch_model.bin: is no pickle of weights"),
    "a pickle that is text": (lambda folder: (pickled(1)(folder), write("pytorch_model.bin", b"no")(folder)), "no pickle of weights"),
    "a pickle cut short": (lambda folder: (pickled({"a": torch.ones(99)})(folder), cut(0.5, "pytorch_model.bin")(folder)), "no pickle of"),
    "awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), r"quantised weights \(awq\)"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}), r"quantised weights \(gptq\)"),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), r"quantised weights \(fp8\)"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}), r"quantised weights \(unknown method\)"),
    "unknown": (config(quantization_config={"quant_method": "none_such"}), r"quantised weights \(none_such\)"),
    "an adapter": (write("adapter_config.json", b"{}"), "adapter.*merge_and_unload"),
    "spiking already": (spiking, "spiking model already"),
    "another architecture": (config(model_type="gpt2"), "architecture 'gpt2' is not supported"),
    "no architecture": (write("config.json", b"{}"), "architecture 'None' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_no_whole_model_is_refused_in_one_line(case, folder):
    change, message = DAMAGE[case]
    change(folder)
    with pytest.raises(InputError, match=rf"model\.path={folder}.*({message})") as caught:
        load_model(hub(folder), CPU)
    assert len(str(caught.value).splitlines()) == 1
    assert "hub does not answer" not in str(caught.value)


def test_an_adapter_has_no_tokenizer_either(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    for load in (lambda: load_model(hub(folder), CPU), lambda: load_tokenizer(hub(folder))):
        with pytest.raises(InputError, match="adapter"):
            load()


def test_what_the_config_determines_may_be_left_over(folder, ids):
    edit_weights(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "value_head.weight": torch.ones(2)})
    assert torch.equal(load_model(hub(folder), CPU)(ids).logits, tiny_model()(ids).logits)


def test_tied_weights_need_no_head(tmp_path, ids):
    model = tiny_model("llama-biases")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert torch.equal(load_model(hub(tmp_path), CPU)(ids).logits, model(ids).logits)


def test_a_pickle_of_weights_is_read(folder, ids):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(load_model(hub(folder), CPU)(ids).logits, tiny_model()(ids).logits)


def test_weights_too_large_for_float16_name_the_cure(folder):
    edit_weights(folder, lambda t: t[UP].view(-1)[:1].fill_(1e5) and None)
    with pytest.raises(InputError, match=rf"{UP} has 1 values .*model\.dtype=bfloat16"):
        load_model(hub(folder, dtype=DType.float16), CPU)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    assert len(load_tokenizer(hub(folder))) == 256
    word_tokenizer(257).save_pretrained(folder)
    with pytest.raises(InputError, match="257 tokens, the embedding 256 rows"):
        load_tokenizer(hub(folder))


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_code_of_a_folder_neither_runs_nor_asks(kind, folder, monkeypatch, tmp_path, ids):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    edit_config(folder, auto_map=code, model_type=kind)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}))
    asked = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", asked)
    if kind == "llama":
        assert torch.equal(load_model(hub(folder), CPU)(ids).logits, tiny_model()(ids).logits)
    else:
        with pytest.raises(InputError, match="architecture 'evil' is not supported"):
            load_model(hub(folder), CPU)
    with pytest.raises(InputError):
        load_tokenizer(hub(folder))
    assert asked.tell() == 0
    assert not ran.exists()


def test_everything_comes_from_one_revision(whole, tmp_path, monkeypatch, ids):
    repository = tmp_path / "models--org--tiny"
    for revision, seed in (("main", 0), ("v2", 1)):
        snapshot = shutil.copytree(whole, repository / "snapshots" / (str(seed) * 40))
        model = tiny_model(seed=seed)
        model.generation_config.max_length = 100 + seed
        model.save_pretrained(snapshot)
        word_tokenizer(200 + seed).save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(str(seed) * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, seed in ((None, 0), ("main", 0), ("v2", 1)):
        config = hub("org/tiny", revision=revision)
        model = load_model(config, CPU)
        assert torch.equal(model(ids).logits, tiny_model(seed=seed)(ids).logits)
        assert model.generation_config.max_length == 100 + seed
        assert len(load_tokenizer(config)) == 200 + seed
