"""Reading ahead: which layer is read when, and that nobody gets another one's weights."""

from threading import Event, current_thread

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from spikellm.config.choices import Device
from spikellm.config.model import HardwareConfig
from spikellm.model.ahead import ReadAhead
from spikellm.model.load import load_offloaded
from spikellm.model.stored import Stored
from tests.models import keeping, saved, tiny_model

WAIT = 60  # for a thread that has nothing else to do [s]


class Weights:
    """One weight; who reads it, and when."""

    def __init__(self, value: float, *, error: Exception | None = None) -> None:
        self.value, self.error, self.readers, self.read = value, error, [], Event()

    def __getitem__(self, key):
        self.readers.append(current_thread().name)
        self.read.set()
        if self.error is not None:
            raise self.error
        return torch.full((3, 5), self.value)

    def keys(self):
        return ["weight"]


@pytest.fixture
def ahead() -> ReadAhead:
    return ReadAhead(torch.device("cpu"))


def test_what_is_expected_is_read_before_it_is_asked_for(ahead):
    first, second = Weights(1.0), Weights(2.0)
    assert ahead.get(first)["weight"][0, 0] == 1
    assert first.readers == [current_thread().name], "nobody had expected it"
    ahead.expect(second)
    assert second.read.wait(WAIT), "it is read though nobody has asked yet"
    assert ahead.get(second)["weight"][0, 0] == 2
    assert len(second.readers) == 1
    assert second.readers != first.readers


def test_another_layer_than_the_expected_one_gets_its_own_weights(ahead):
    """As when a layer's weights are rotated, or a pass begins again, between the two."""
    ahead.expect(Weights(1.0))
    asked = Weights(2.0)
    assert ahead.get(asked)["weight"][0, 0] == 2
    assert asked.readers == [current_thread().name]


def test_an_error_is_raised_where_the_weights_are_taken(ahead):
    broken = Weights(1.0, error=SafetensorError("the file is cut off"))
    ahead.expect(broken)
    assert broken.read.wait(WAIT)
    with pytest.raises(SafetensorError, match="cut off"):
        ahead.get(broken)
    assert ahead.get(Weights(3.0))["weight"][0, 0] == 3


def test_the_next_layer_is_expected_while_one_is_called(tmp_path, monkeypatch):
    config = saved("llama", tmp_path, num_hidden_layers=3)
    model = load_offloaded(config, HardwareConfig(device=Device.cpu), keeping(tmp_path / "kept")[0])
    told: list[tuple[str, str]] = []
    for name in ("expect", "get"):
        whole = getattr(ReadAhead, name)
        monkeypatch.setattr(
            ReadAhead, name, lambda self, weights, name=name, whole=whole: told.append((name, weights.prefix)) or whole(self, weights)
        )
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: told.append(("called", f"model.layers.{index}.")))
    ids = torch.arange(2, 20)[None]
    assert torch.equal(model(ids).logits, tiny_model("llama", num_hidden_layers=3)(ids).logits)
    layers = [f"model.layers.{index}." for index in range(3)]
    wanted = []
    for index, layer in enumerate(layers):
        wanted += [("get", layer), *(("expect", following) for following in layers[index + 1 : index + 2]), ("called", layer)]
    assert told == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second stream and pinned memory: no CUDA device found")
def test_on_a_gpu_the_copy_is_there_when_it_is_taken(tmp_path):
    ahead, device = ReadAhead(torch.device("cuda", 0)), torch.device("cuda", 0)
    for value in range(8):
        save_file({"layer.weight": torch.full((4096, 4096), float(value))}, tmp_path / f"{value}.safetensors")
        weights = Stored.of([tmp_path / f"{value}.safetensors"]).below("layer")
        ahead.expect(weights)
        busy = torch.ones(2048, 2048, device=device) @ torch.ones(2048, 2048, device=device)
        found = ahead.get(weights)["weight"]
        assert found.device == device
        assert (found == value).all()
        del found, busy
