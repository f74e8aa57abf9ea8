"""A job whose decoder layers stay on disk finds what one in memory finds, under the same keys."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spikellm
from spikellm.evaluation import measured
from spikellm.model import blocks, states
from tests.jobs import SMALL, artefacts, cached, run
from tests.launch import launch, one_line
from tests.models import byte_model, reads

CASES = {
    "signed": [
        "search.method=evolution",
        "snn.T=3",
        "grain=1",
        "snn.intervals=2",
        "evaluation.networks=[ann,ann_prefix,base2,snn,int_token]",
    ],
    "weights": [
        "hardware.fused=false",
        "tune.epochs=1",
        "tune.what=all",
        "compensate.enabled=true",
        "snn.T=4",
        "weights.bits=4",
        "weights.group_size=16",
    ],
    "stepped": ["snn.execution=stepped", "snn.T=4", "weights.bits=8", "weights.rounding=nearest", "model.dtype=bfloat16"],
}


def figures(results: dict) -> dict:
    """What does not depend on where or when."""
    found = {key: value for key, value in results.items() if key not in ("stages", "codes", "inputs", "versions")}
    return found | {"search": {key: value for key, value in results["search"].items() if key != "seconds"}}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_results_are_those_of_the_model_in_memory(options, tmp_path):
    here = run(tmp_path / "here", *options)
    there = run(tmp_path / "there", *options, "hardware.offload=true")
    assert figures(there) == figures(here)
    codes = [Path(results["codes"]).read_bytes() for results in (here, there)]
    assert codes[0] == codes[1]
    assert len(artefacts(tmp_path / "there", "weights_on_disk")) == 7, "three ends, two layers, two rotated layers"
    assert all(cached(run(tmp_path / "here", *options, "hardware.offload=true")).values()), "one store serves both"


@pytest.mark.parametrize("options", [CASES["weights"], ["search.sequential=true", "model.dtype=bfloat16"]], ids=["weights", "sequential"])
def test_hidden_states_beyond_the_bound_lie_on_disk_and_change_no_figure(options, tmp_path, monkeypatch):
    here = run(tmp_path / "here", *options)
    spilled, whole = [], states.on_disk
    monkeypatch.setattr(states, "on_disk", lambda *given: spilled.append(given) or whole(*given))
    monkeypatch.setattr(blocks, "STATES_BYTES", 64 * 64 * 4)  # one window
    there = run(tmp_path / "there", *options, "hardware.offload=true")
    assert figures(there) == figures(here)
    assert {folder for _, folder in spilled} == {tmp_path / "there" / "artifacts" / "scratch"}
    assert not list((tmp_path / "there" / "artifacts" / "scratch").iterdir())


NETWORKS = "ann_prefix,base2,snn,int_static,int_token"


def test_layers_are_read_once_for_all_networks_that_share_them(tmp_path, monkeypatch):
    options = ["hardware.offload=true", "spikes.enabled=false", "snn.T=4", "texts=[]"]
    run(tmp_path, *options, "stages=[calibrate,search]")
    key, read = "model.layers.1.mlp.up_proj.weight", reads(monkeypatch)
    readings = {}
    for networks in ("snn", NETWORKS):
        read.clear()
        run(tmp_path, *options, f"evaluation.networks=[{networks}]", "dataset.evaluation.max_windows=" + str(2 + len(readings)))
        readings[networks] = read.count(key)
    assert readings[NETWORKS] == readings["snn"], "two for the rotated model and its prefix, one for the perplexities"
    read.clear()
    found = run(tmp_path, *options, f"evaluation.networks=[{NETWORKS}]")
    assert len(artefacts(tmp_path, "evaluate")) == 1 + 5 + 4, "snn was measured on two windows before, all on three"
    here = run(tmp_path / "here", "spikes.enabled=false", "snn.T=4", f"evaluation.networks=[{NETWORKS}]")
    assert found["perplexity"] == here["perplexity"]


def test_a_network_that_cannot_be_measured_takes_no_other_with_it(tmp_path, monkeypatch):
    whole = measured.base2

    def broken(statistics, options):
        fits = whole(statistics, options)
        name = list(fits)[-1]  # of the final norm: behind any other there are neurons, which bound what comes
        return fits | {name: replace(fits[name], d=torch.full_like(fits[name].d, 1e38))}

    options = ["hardware.offload=true", "spikes.enabled=false", f"evaluation.networks=[{NETWORKS}]"]
    monkeypatch.setattr(measured, "base2", broken)
    with pytest.raises(FloatingPointError, match="perplexity base2 evaluation: the loss is"):
        run(tmp_path, *options)
    monkeypatch.undo()
    assert len(artefacts(tmp_path, "evaluate")) == 4
    found = run(tmp_path, *options)
    assert len(artefacts(tmp_path, "evaluate")) == 5
    assert set(found["perplexity"]) >= set(NETWORKS.split(","))


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(shard(folder, key))
        save_file(tensors | {key: change(tensors[key])}, shard(folder, key), {"format": "pt"})

    return damage


def shard(folder: Path, key: str = WEIGHT) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


def cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-10])


DAMAGES = {
    "missing": (lambda folder: shard(folder).unlink(), ["tensors of the model are not in the checkpoint", "model.layers.1."], 0),
    "cut": (cut, ["model-0000", "Safetensor"], 0),
    "dtype": (changed(WEIGHT, lambda weight: weight.to(torch.int8)), ["model-0000", f"{WEIGHT} is I8"], 0),
    "shape": (changed(WEIGHT, lambda weight: weight[:-1].clone()), [f"{WEIGHT} first: (143, 64), not (144, 64)"], 0),
    "end": (changed("model.norm.weight", lambda weight: weight * torch.nan), ["model.norm.weight has 64 values"], 0),
    "layer": (changed(WEIGHT, lambda weight: weight / 0), [f"{WEIGHT} has 9216 values", "fetched whole"], 1),
    "activations": (changed(WEIGHT, lambda weight: weight * 1e36), ["site layers.1."], 2),
}


@pytest.mark.parametrize(("damage", "named", "finished"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_what_was_finished_stays(damage, named, finished, tmp_path):
    model = byte_model(tmp_path / "model", shard="100KB")
    damage(tmp_path / "model")
    line = one_line(launch(*SMALL, *model, "hardware.offload=true", f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/run"))
    assert all(part in line for part in named), line
    assert len(artefacts(tmp_path, "weights_on_disk")) == finished


def test_what_is_saved_loads_as_the_same_model(tmp_path):
    logits = []
    for offload in ("false", "true"):
        found = run(tmp_path / offload, "save_model=true", "stages=[convert]", f"hardware.offload={offload}")
        model, _ = spikellm.load(found["saved_model"])
        logits.append(model(torch.arange(2, 40)[None]).logits)
        assert not list(Path(found["saved_model"]).glob("model.safetensors")) or offload == "false"
    assert torch.equal(*logits)
