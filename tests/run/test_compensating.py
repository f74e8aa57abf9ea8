"""Compensation in a job: what it computes again, what survives a stop, what is said of it."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spikellm
from spikellm.config.checks import InputError
from spikellm.evaluation.perplexity import perplexity
from spikellm.model.integers import load_integers
from spikellm.reconstruction import compensation
from spikellm.report.console import console_table
from spikellm.run.workspace import Workspace
from spikellm.store.record import Results
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run, stopped_behind_the_first_block

SHORT = ["dataset.calibration.max_windows=8", "dataset.evaluation.max_windows=1", "snn.T=3", "grain=1"]
COMPENSATED = [*SHORT, "compensate.enabled=true", "compensate.damping=[1]", "compensate.linears=[o,gate,up,down]"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Results of one store by what was asked for, the job without compensation first."""
    root = tmp_path_factory.mktemp("compensation")
    asked = {
        "plain": SHORT,
        "compensated": [*COMPENSATED, "save_model=true"],
        "o": [*SHORT, "compensate.enabled=true", "compensate.linears=[o]"],
        "gptq": [*COMPENSATED, "weights.bits=8"],
        "plain gptq": [*SHORT, "weights.bits=8"],
    }
    return root, {name: run(root, *options) for name, options in asked.items()}


def test_it_comes_between_search_and_conversion(jobs):
    root, found = jobs
    for name in ("compensated", "o", "gptq"):
        assert cached(found[name]) == {"calibrate": True, "search": True, "convert": False, "evaluate": False}
        for network in ("ann_prefix", "ann"):
            assert found[name]["perplexity"][network] == found["plain"]["perplexity"][network]
        assert found[name]["codes"] == found["plain"]["codes"]
    assert len({found[name]["perplexity"]["snn"] for name in ("plain", "compensated", "o")}) == 3
    assert found["compensated"]["perplexity"]["base2"] == found["plain"]["perplexity"]["base2"]
    assert len(artefacts(root, "compensate")) == 2, "integers are found behind the same compensation"
    assert not artefacts(root, "compensate_block")


def test_results_and_console_say_so(jobs):
    _, found = jobs
    assert "compensate" not in found["plain"]
    said = found["compensated"]["compensate"]
    assert said["linears"] == ["o", "gate", "up", "down"]
    assert said["blocks"] == 2
    assert 1 <= said["blocks_improved"] <= 2
    assert said["blocks_improved"] <= said["weights_refitted"] <= 4 * said["blocks_improved"]
    assert said["relative_error"] < said["relative_error_before"]
    assert found["gptq"]["compensate"] == said
    lines = console_table(Results.from_json(found["compensated"]), Path("run")).splitlines()
    (line,) = [line for line in lines if line.startswith("  compensated, o gate up down ")]
    assert f"{said['relative_error_before']:.4g} -> {said['relative_error']:.4g}   better at {said['blocks_improved']} of 2" in line


def test_the_same_job_finds_it_all_there_in_any_order_of_linears(jobs):
    root, found = jobs
    again = run(root, *COMPENSATED, "save_model=true", "compensate.linears=[down,up,gate,o]")
    assert all(cached(again).values())
    assert again["perplexity"] == found["compensated"]["perplexity"]


def test_the_saved_model_is_the_evaluated_one(jobs):
    root, found = jobs
    model, _ = spikellm.load(found["compensated"]["saved_model"])
    windows = Workspace(configure(*SMALL, *SHORT, f"output_root={root}")).evaluation_windows
    assert perplexity(model, windows).value == pytest.approx(found["compensated"]["perplexity"]["snn"], rel=1e-6)


def test_integers_are_of_the_compensated_weights(jobs):
    root, _ = jobs
    (refitted,) = [load_file(path / "weights.safetensors") for path in artefacts(root, "compensate") if "down" in text_of(path)]
    (of_refitted,) = [load_integers(path / "integers.safetensors") for path in artefacts(root, "weights") if "compensate" in text_of(path)]
    (plain,) = [load_integers(path / "integers.safetensors") for path in artefacts(root, "weights") if "compensate" not in text_of(path)]
    assert refitted
    for path, weight in refitted.items():
        assert (of_refitted[path].weight - weight).norm() < 0.02 * weight.norm()
        assert (of_refitted[path].weight - weight).norm() < (plain[path].weight - weight).norm()


def text_of(artefact: Path) -> str:
    return (artefact / "inputs.json").read_text()


def test_a_job_that_was_stopped_goes_on_and_finds_the_same(jobs, tmp_path, caplog):
    root, found = jobs
    stopped_behind_the_first_block(compensation, "compensate_block", tmp_path, *COMPENSATED)
    assert len(artefacts(tmp_path, "compensate_block")) == 1
    with caplog.at_level(logging.INFO):
        again = run(tmp_path, *COMPENSATED)
    assert "compensate: goes on behind 1 finished blocks" in caplog.messages
    assert again["perplexity"] == found["compensated"]["perplexity"]
    (kept,) = artefacts(tmp_path, "compensate")
    wanted, weights = (load_file(folder / kept.name / "weights.safetensors") for folder in (root / "artifacts" / "compensate", kept.parent))
    assert list(weights) == list(wanted)
    assert all(torch.equal(weights[path], wanted[path]) for path in wanted)


def test_options_without_effect_are_named(tmp_path, caplog):
    run(tmp_path, *SHORT, "stages=[convert]", "compensate.linears=[o]", "compensate.damping=[0.5,2]")
    assert {
        "compensate.linears=[o] has no effect with compensate.enabled=false",
        "compensate.damping=[0.5,2.0] has no effect with compensate.enabled=false",
    } <= set(caplog.messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compensate.linears=[]"], r"^compensate\.linears=\[\]: name at least one"),
        (["compensate.linears=[o,o]"], r"^compensate\.linears=\[o,o\]: one of them is there twice"),
        (["compensate.damping=[]"], r"^compensate\.damping=\[\]: takes positive numbers"),
        (["compensate.damping=[0.1,0]"], r"^compensate\.damping=.*: takes positive numbers"),
        (["compensate.damping=[inf]"], r"^compensate\.damping\.0=inf: must be a finite number"),
        (
            ["compensate.enabled=true", "weights.bits=8", "weights.rounding=nearest"],
            r"^compensate\.enabled=true with weights\.bits=8, .*gptq",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_configuration(options, message):
    with pytest.raises(InputError, match=message):
        configure(*SMALL, *options)
