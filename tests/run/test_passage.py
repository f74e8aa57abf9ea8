"""A calibration whose layers lie on disk goes on where it was killed."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikellm.calibration import calibrate
from spikellm.model.blocks import Block
from spikellm.model.passage import StoredPassage, StoredPasses
from tests.jobs import artefacts, run

OPTIONS = ("hardware.offload=true", "stages=[calibrate]")


class Killed(BaseException):
    """What no stage catches."""


def found(root: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    (folder,) = artefacts(root, "calibrate")
    return json.loads((folder / "calibration.json").read_text()), load_file(folder / "statistics.safetensors")


def observed(monkeypatch, *, dies_in: int | None = None) -> list[int | None]:
    """Layers whose statistics were computed, from now on; at one of them the process ends."""
    layers: list[int | None] = []
    original = calibrate.calibrate_block

    def watched(model, block, states, **options):
        if dies_in is not None and len(layers) == dies_in:
            raise Killed
        layers.append(block.layer)
        return original(model, block, states, **options)

    monkeypatch.setattr(calibrate, "calibrate_block", watched)
    return layers


def killed(monkeypatch, root: Path, prepare: Callable[[pytest.MonkeyPatch], object], *options: str) -> None:
    """A job that ends where `prepare` says."""
    with monkeypatch.context() as patched:
        prepare(patched)
        with pytest.raises(Killed):
            run(root, *(options or OPTIONS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of a pass that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    run(root, *OPTIONS)
    assert not artefacts(root, "calibrate_block")
    assert not artefacts(root, "calibrate_states")
    return found(root)


def same(one: tuple[dict, dict], other: tuple[dict, dict]) -> bool:
    (record, tensors), (others, found) = one, other
    return record == others and tensors.keys() == found.keys() and all(torch.equal(tensors[name], found[name]) for name in tensors)


@pytest.mark.parametrize("dies_in", [0, 1, 2])
def test_a_killed_pass_goes_on_at_the_block_in_which_it_was_killed(dies_in, whole, tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path, lambda patched: observed(patched, dies_in=dies_in))
    assert not artefacts(tmp_path, "calibrate")
    layers = observed(monkeypatch)
    looked = []
    monkeypatch.setattr(calibrate, "_prefix_tokens", lambda *_: looked.append(1))
    run(tmp_path, *OPTIONS)
    assert layers == [0, 1, None][dies_in:]
    assert not looked, "the prefix was found before"
    assert same(found(tmp_path), whole)
    assert not artefacts(tmp_path, "calibrate_block")
    assert not artefacts(tmp_path, "calibrate_states")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_between_what_a_block_gave_and_the_states_behind_it(number, whole, tmp_path, monkeypatch):
    original = StoredPassage.keep

    def dies(self, finished, states):
        if finished == number:
            raise Killed
        original(self, finished, states)

    killed(monkeypatch, tmp_path, lambda patched: patched.setattr(StoredPassage, "keep", dies))
    layers = observed(monkeypatch)
    run(tmp_path, *OPTIONS)
    assert layers == [0, 1, None][number:]
    assert same(found(tmp_path), whole)


def test_findings_that_somebody_took_away_are_found_again(whole, tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path, lambda patched: observed(patched, dies_in=2))
    for folder in artefacts(tmp_path, "calibrate_block"):
        if json.loads((folder / "inputs.json").read_text())["block"] == "layer 0":
            (folder / "block.safetensors").write_bytes(b"")
    layers = observed(monkeypatch)
    run(tmp_path, *OPTIONS)
    assert layers == [0, None], "what layer 1 gave is there"
    assert same(found(tmp_path), whole)


def test_on_a_full_disk_the_pass_goes_on_and_says_what_that_means(whole, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spikellm.model.passage.write_tensors", full)
    run(tmp_path, *OPTIONS)
    assert same(found(tmp_path), whole)
    assert "No space left on device" in caplog.text
    assert "begin anew" in caplog.text


def test_in_memory_nothing_is_kept_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("spikellm.model.passage.write_tensors", lambda *_: pytest.fail("kept"))
    run(tmp_path, "hardware.offload=false", "stages=[calibrate]")


EVALUATED = ("hardware.offload=true", "stages=[evaluate]", "spikes.enabled=false", "dataset.evaluation.max_windows=3")


def advanced(monkeypatch) -> list[int | None]:
    """Blocks through which a network's windows are taken from now on."""
    passed: list[int | None] = []
    original = Block.advance

    def watched(self, states):
        passed.append(self.layer)
        original(self, states)

    monkeypatch.setattr(Block, "advance", watched)
    return passed


@pytest.mark.parametrize("number", [1, 3])
def test_perplexities_go_on_at_the_block_in_which_the_pass_was_killed(number, tmp_path, monkeypatch):
    """Of four networks that share a reading; their states are kept together behind each of the three blocks."""
    four = "evaluation.networks=[ann_prefix,base2,snn,int_token]"
    wanted = run(tmp_path / "whole", *EVALUATED, four)["perplexity"]
    assert not artefacts(tmp_path / "whole", "evaluate_pass")
    assert not artefacts(tmp_path / "whole", "evaluate_pass_states")
    original = StoredPassage.keep

    def dies(self, finished, states):
        if self.stage == "evaluate_pass_states" and finished == number:
            raise Killed
        original(self, finished, states)

    killed(monkeypatch, tmp_path / "killed", lambda patched: patched.setattr(StoredPassage, "keep", dies), *EVALUATED, four)
    passed = advanced(monkeypatch)
    assert run(tmp_path / "killed", *EVALUATED, four)["perplexity"] == wanted
    assert passed == [layer for layer in [0, 1, None][number - 1 :] for _ in range(4)]
    assert not artefacts(tmp_path / "killed", "evaluate_pass")
    assert not artefacts(tmp_path / "killed", "evaluate_pass_states")


def test_the_pretrained_networks_pass_is_kept_too(tmp_path, monkeypatch):
    def dies(self, finished, states):
        if self.stage == "evaluate_pass_states" and finished == 3:
            raise Killed
        original(self, finished, states)

    original = StoredPassage.keep
    killed(monkeypatch, tmp_path, lambda patched: patched.setattr(StoredPassage, "keep", dies), *EVALUATED, "evaluation.networks=[ann]")
    passed = advanced(monkeypatch)
    run(tmp_path, *EVALUATED, "evaluation.networks=[ann]")
    assert passed == [None]


@pytest.mark.parametrize("size", [1, 3])
def test_windows_of_finished_passes_are_not_measured_again(tmp_path, monkeypatch, size):
    """Each window a pass of its own, killed in the last one; whoever goes on with other batches measures all of them."""
    monkeypatch.setattr("spikellm.model.blocks.STATES_BYTES", 0)
    two, by_one, by_size = "evaluation.networks=[ann_prefix,snn]", "evaluation.batch_size=1", f"evaluation.batch_size={size}"
    wanted = run(tmp_path / "whole", *EVALUATED, two, by_size)["perplexity"]
    original = StoredPasses.find

    def dies(self, name, find):
        if name == "2 to 3 by 1":
            raise Killed
        return original(self, name, find)

    killed(monkeypatch, tmp_path / "killed", lambda patched: patched.setattr(StoredPasses, "find", dies), *EVALUATED, two, by_one)
    assert len(artefacts(tmp_path / "killed", "evaluate_pass")) == 2
    passed, windows = advanced(monkeypatch), []
    monkeypatch.setattr(StoredPasses, "find", lambda self, name, find: windows.append(name) or original(self, name, find))
    assert run(tmp_path / "killed", *EVALUATED, two, by_size)["perplexity"] == wanted
    assert passed == [0, 0, 1, 1, None, None]
    assert windows == ([f"{first} to {first + 1} by 1" for first in range(3)] if size == 1 else ["0 to 3 by 3"])
    assert size != 1 or not artefacts(tmp_path / "killed", "evaluate_pass")
