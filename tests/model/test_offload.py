"""Decoder layers on disk: the same network, one layer in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikellm.calibration.calibrate import calibrate
from spikellm.config.checks import InputError
from spikellm.config.choices import Device, DType, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.config.snn import PrefixConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.execution.stepped import stepped
from spikellm.model import ahead, conversion, offload
from spikellm.model.blocks import enter
from spikellm.model.load import load_model, load_offloaded, stays_on_disk
from spikellm.model.prefix import attach_prefix
from spikellm.model.rotation import PARTS
from tests.codes import partitioned_tables
from tests.models import SIZES, keeping, reads, saved, tiny_model

CPU = HardwareConfig(device=Device.cpu)


def resident(model) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if not next(layer.parameters()).is_meta]


@pytest.fixture
def windows():
    return torch.randint(2, 256, (4, 48), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-biases", DType.float32), ("qwen3", DType.float32), ("qwen2", DType.bfloat16), ("mistral", DType.bfloat16)],
)
def test_every_network_is_the_same_to_the_last_bit(name, dtype, windows, tmp_path):
    config = saved(name, tmp_path / "model", dtype)
    keep, _ = keeping(tmp_path / "rotated")
    here, there = load_model(config, CPU), load_offloaded(config, CPU, keep)
    assert torch.equal(here(windows).logits, there(windows).logits)
    assert resident(there) == []
    conversion.prepare(here, rotation_seed=0)
    offload.rotate(there, seed=0, parts=PARTS, keep=keep)
    conversion.install(there, rotated=PARTS)
    behind = [calibrate(model, windows, PrefixConfig(eta=2.0, max_tokens=2)) for model in (here, there)]
    assert behind[0].prefix_tokens == behind[1].prefix_tokens != []
    # but for the prefix itself: a product of one row is rounded by where in memory its weight lies, on some processors
    assert perplexity(here, windows).value == pytest.approx(perplexity(there, windows).value, rel=1e-5)
    found = [calibrate(model, windows, PrefixConfig(enabled=False)) for model in (here, there)]
    for name_, site in found[0].statistics.items():
        assert torch.equal(site.counts, found[1].statistics[name_].counts)
    for model in (here, there):
        attach_prefix(model, [1, 7])  # a product of two rows is not
        conversion.fill(model, partitioned_tables(model, 4, heads=True), compiled=False)
    assert perplexity(here, windows) == perplexity(there, windows)
    with stepped(here), stepped(there):
        assert torch.equal(here(windows).logits, there(windows).logits)
    assert torch.equal(here.generate(windows[:1], max_new_tokens=3), there.generate(windows[:1], max_new_tokens=3))
    assert resident(there) == []


def test_one_layer_is_in_memory_and_each_is_read_once_for_all_windows(windows, tmp_path, monkeypatch):
    config = saved("llama", tmp_path, num_hidden_layers=3)
    model = load_offloaded(config, CPU, keeping(tmp_path / "kept")[0])
    read = reads(monkeypatch)
    states, blocks = enter(model, windows.split(1))
    for block in blocks:
        assert resident(model) == ([] if block.layer is None else [block.layer])
        block.advance(states)
    assert len(read) == len(set(read)) == sum(1 for _ in model.model.layers.parameters())
    read.clear()
    perplexity(model, windows)
    assert len(read) == len(set(read))


def test_slots_are_given_without_reading_a_page(tmp_path, monkeypatch):
    model = load_offloaded(saved("llama", tmp_path), CPU, keeping(tmp_path / "kept")[0])
    monkeypatch.setattr(ahead, "touch", lambda _: pytest.fail("a page is read"))
    conversion.install(model, rotated=())


def test_rotated_layers_that_are_there_are_not_computed_again(tmp_path):
    config = saved("llama", tmp_path / "model", num_hidden_layers=3)
    keep, computed = keeping(tmp_path / "rotated")

    def stopped(part, compute):
        if part.endswith("2"):
            raise KeyboardInterrupt
        return keep(part, compute)

    with pytest.raises(KeyboardInterrupt):
        offload.rotate(load_offloaded(config, CPU, keep), seed=0, parts=PARTS, keep=stopped)
    assert computed == ["model.layers.0", "model.layers.1"]
    offload.rotate(load_offloaded(config, CPU, keep), seed=0, parts=PARTS, keep=keep)
    assert computed == [f"model.layers.{index}" for index in range(3)]


@pytest.mark.parametrize("tied", [False, True])
def test_random_models_have_the_same_weights_in_memory_and_on_disk(tied, windows, tmp_path):
    options = SIZES | {"tie_word_embeddings": tied}
    config = ModelConfig(name="random", source=ModelSource.random, path="llama", seed=4, options=options)
    keep, computed = keeping(tmp_path)
    there = load_offloaded(config, CPU, keep)
    assert computed == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", *([] if tied else ["lm_head"])]
    assert torch.equal(load_model(config, CPU)(windows).logits, there(windows).logits)
    weights = torch.cat([load_file(file)[key].flatten() for file in tmp_path.glob("model*/*") for key in load_file(file) if "proj" in key])
    assert weights.std().item() == pytest.approx(there.config.initializer_range, rel=0.01)


def test_pickled_checkpoints_are_rewritten_once(windows, tmp_path):
    model = tiny_model()
    (tmp_path / "model").mkdir()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    config = ModelConfig(name="pickled", source=ModelSource.hub, path=str(tmp_path / "model"))
    keep, computed = keeping(tmp_path / "kept")
    assert torch.equal(load_offloaded(config, CPU, keep)(windows).logits, model(windows).logits)
    computed.clear()
    load_offloaded(config, CPU, keep)
    assert not computed


def test_what_does_not_fit_stays_on_disk_by_itself(tmp_path):
    config = saved("llama", tmp_path)
    assert not stays_on_disk(config, CPU)
    assert stays_on_disk(config, HardwareConfig(device=Device.cpu, max_memory_gib=1e-3))
    assert not stays_on_disk(config, HardwareConfig(device=Device.cpu, max_memory_gib=1e-3, offload=False))
    assert stays_on_disk(config, HardwareConfig(device=Device.cpu, offload=True))


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    config, (keep, _) = saved("llama", tmp_path / "model"), keeping(tmp_path / "kept")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    victim = tmp_path / "model" / index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(victim)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, victim, {"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values"):
        offload.rotate(load_offloaded(config, CPU, keep), seed=0, parts=PARTS, keep=keep)
    victim.unlink()
    with pytest.raises(InputError, match=r"model\.layers\.1.* first"):
        load_offloaded(config, CPU, keep)


def test_a_prefix_and_a_change_of_it(windows, tmp_path):
    config = saved("llama", tmp_path / "model")
    keep, _ = keeping(tmp_path / "rotated")
    model = load_offloaded(config, CPU, keep)
    conversion.install(model, rotated=())
    attach_prefix(model, [1])
    first = model(windows).logits
    attach_prefix(model, [])
    assert not torch.equal(first, model(windows).logits)
