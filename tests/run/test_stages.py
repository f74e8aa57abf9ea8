"""Artefacts across runs: killed, repeated, changed."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikellm.config.checks import InputError
from spikellm.config.measures import DEFAULT_NETWORKS
from spikellm.config.schema import DEFAULT_STAGES, STAGE_NAMES
from spikellm.run.fitting import SEARCH
from spikellm.run.measuring import DIAGNOSE, EVALUATE
from spikellm.run.stages import STAGES as ALL_STAGES
from spikellm.run.stages import with_needed
from spikellm.run.workspace import Workspace
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run
from tests.launch import die_inside, launch

STAGES = {name: stage for name, stage in ALL_STAGES.items() if name != "generate"}  # it wants a tokenizer: test_generate.py
EVERY_STAGE = f"stages=[{','.join(STAGES)}]"


def test_killed_in_the_middle_of_each_stage_and_run_again(tmp_path):
    """One store for all: each attempt goes one stage further, and what was there before stays as it was."""
    arguments = [*SMALL, EVERY_STAGE, f"output_root={tmp_path}"]
    kept: dict[Path, bytes] = {}
    for stage in STAGES:
        done = launch(*arguments, before=die_inside, values=(stage,))
        assert done.code == -signal.SIGKILL, done.err
        assert not artefacts(tmp_path, stage)
        assert not list((tmp_path / "runs").rglob("results.json"))
        for path, content in kept.items():
            assert path.read_bytes() == content
        kept = {path: path.read_bytes() for done in STAGES for folder in artefacts(tmp_path, done) for path in folder.iterdir()}
    first = launch(*arguments, f"hydra.run.dir={tmp_path}/first")
    assert first.code == 0, first.err
    second = launch(*arguments, f"hydra.run.dir={tmp_path}/second")
    assert second.code == 0, second.err
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second")]
    assert cached(results[0]) == dict.fromkeys(STAGES, True) | {"diagnose": False}
    assert all(cached(results[1]).values())
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert not list((tmp_path / "artifacts").rglob("*.tmp-*"))


def test_interrupted_in_each_stage_and_continued(tmp_path):
    """Ctrl-C and SIGTERM in turn: one line, a readable reason, no half files; the same command goes on."""
    arguments = [*SMALL, EVERY_STAGE, f"output_root={tmp_path}"]
    for index, stage in enumerate(STAGES):
        number = (signal.SIGINT, signal.SIGTERM)[index % 2]
        folder = tmp_path / stage
        done = launch(*arguments, f"hydra.run.dir={folder}", before=die_inside, values=(stage, number))
        assert done.code == 130, done.err
        assert len(done.err.splitlines()) == 1, done.err
        assert done.err.startswith("interrupted")
        assert "same command" in done.err
        assert number.name in done.err
        failure = json.loads((folder / "error.json").read_text())
        assert failure["error"] == done.err.strip()
        assert (failure["model"], failure["T"], failure["grain"]) == ("tiny", 8, 2)
        assert not (folder / "results.json").exists()
        assert not artefacts(tmp_path, stage)
        assert not [path for path in tmp_path.rglob("*tmp*") if tmp_path in path.parents]
    assert launch(*arguments, f"hydra.run.dir={tmp_path}/{stage}").code == 0
    assert not (tmp_path / stage / "error.json").exists()  # forgotten
    assert cached(json.loads((tmp_path / stage / "results.json").read_text())) == dict.fromkeys(STAGES, True) | {"diagnose": False}


def test_every_stage_has_an_object():
    assert (*ALL_STAGES, "report") == STAGE_NAMES  # a report is made of files
    assert all(stage.name == name for name, stage in ALL_STAGES.items())


def test_what_a_stage_needs_is_prepared_unless_its_result_is_there(tmp_path):
    work = Workspace(configure(*SMALL, f"output_root={tmp_path}"))
    assert [stage.name for stage in with_needed([EVALUATE], work)] == ["calibrate", "search", "tune", "compensate", "weights", "evaluate"]
    assert [stage.name for stage in with_needed([DIAGNOSE, EVALUATE], work)] == [
        "calibrate",
        "search",
        "tune",
        "compensate",
        "weights",
        "diagnose",
        "evaluate",
    ]
    run(tmp_path, "stages=[search]")
    assert with_needed([STAGES["search"]], work) == [STAGES["search"]]


@pytest.mark.parametrize("asked", ["[calibrate,diagnose]", "[evaluate]"])
def test_what_cannot_be_read_is_refused_before_the_first_stage_runs(asked, tmp_path):
    arguments = ["dataset.evaluation.source=text", "dataset.evaluation.path=/no/such.txt", f"stages={asked}"]
    with pytest.raises(InputError, match=r"dataset\.evaluation\.path=/no/such\.txt"):
        run(tmp_path, *arguments)
    assert not artefacts(tmp_path, "calibrate")


def test_a_neuron_file_of_another_T_is_refused_before_the_calibration(tmp_path):
    path = tmp_path / "neurons.pth"
    torch.save({"site": (1, [0] * 4, torch.tensor([2.0]), 3.0, torch.tensor([2.0]), torch.tensor([2.0]))}, path)
    with pytest.raises(InputError, match=r"snn\.T=8; set snn\.T=4"):
        run(tmp_path, f"search.import_file={path}", "snn.coding=phase", "search.method=evolution", "grain=1")
    assert not artefacts(tmp_path, "calibrate")


def test_the_key_of_codes_holds_the_weight_of_spikes(tmp_path):
    """Its default may change; spelled out it is the same."""
    given = {"null": 1.5, "1.5": 1.5, "1": 1.0}
    works = {value: Workspace(configure(*SMALL, "snn.coding=phase_signed", f"search.spike_weight={value}")) for value in given}
    inputs = {value: SEARCH.inputs(work) for value, work in works.items()}
    assert {value: found["search"]["spike_weight"] for value, found in inputs.items()} == given
    assert inputs["null"] == inputs["1.5"] != inputs["1"]


def fill_the_disk(size: int) -> None:
    """Files cannot grow beyond `size` bytes: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_gets_one_line_and_damages_nothing(tmp_path):
    arguments = [*SMALL, f"output_root={tmp_path}"]
    done = launch(*arguments, before=fill_the_disk, values=(8192,))
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error:")
    assert not artefacts(tmp_path, "calibrate")
    assert not cached(run(tmp_path))["calibrate"]


def test_what_a_stage_depends_on_decides_what_is_computed_again(tmp_path):
    first = run(tmp_path)
    assert not any(cached(first).values())
    everything = dict.fromkeys(DEFAULT_STAGES, True)
    again = run(tmp_path)
    assert cached(again) == everything
    assert again["perplexity"] == first["perplexity"]
    for change, calibrated in [
        ("snn.T=6", True),
        ("grain=1", True),
        ("rotation.seed=1", False),
        ("prefix.enabled=false", False),
        ("dataset.calibration.window=32", False),
        ("model.seed=1", False),
    ]:
        results = cached(run(tmp_path, change))
        assert results == {"calibrate": calibrated, "search": False, "convert": False, "evaluate": False}, change
    text = cached(run(tmp_path, "dataset.evaluation.window=32"))
    assert text == everything | {"evaluate": False}


def test_spikes_are_counted_once_and_costed_by_any_table(tmp_path, caplog):
    first = run(tmp_path)
    again = run(tmp_path, "energy.table=int8")
    assert cached(again)["evaluate"]
    assert again["spikes"] == first["spikes"]
    assert (again["energy"]["mac_pj"], first["energy"]["mac_pj"]) == (0.23, 4.6)
    custom = run(tmp_path, "energy.table=custom", "energy.mac_pj=4.6", "energy.ac_pj=0.9")["energy"]
    assert custom["snn_pj_per_token"] == first["energy"]["snn_pj_per_token"]
    # the record adds up: operations times their costs
    energy, spikes = first["energy"], first["spikes"]
    dense = {what: sum(each[f"{what}_per_token"] for each in spikes["dense_operations"]) for what in ("mac", "ac")}
    assert energy["snn_pj_per_token"] == pytest.approx(4.6 * dense["mac"] + 0.9 * (dense["ac"] + spikes["sops_per_token"]))
    assert energy["snn_ac_per_token"] == pytest.approx(dense["ac"] + spikes["sops_per_token"])
    assert sum(kind["sops_per_token"] for kind in spikes["by_kind"].values()) == pytest.approx(spikes["sops_per_token"])
    assert sum(spikes["firing_rate_by_step"]) == pytest.approx(8 * spikes["firing_rate"])
    more = run(tmp_path, "spikes.windows=5")
    assert not cached(more)["evaluate"]
    assert more["spikes"]["windows"] == 2
    assert "spikes.windows=5" in caplog.text
    assert "spikes" not in run(tmp_path, "spikes.enabled=false")


def test_traditional_codes_run_through(tmp_path, caplog):
    found = {}
    for arguments in (["phase"], ["rate"], ["ttfs"], ["few_spike", "snn.max_spikes=2"]):
        found[arguments[0]] = run(tmp_path, f"snn.coding={arguments[0]}", *arguments[1:], "grain=1")
    assert "no effect with" in caplog.text  # search.method=base2 of these runs
    assert "grain=1" not in caplog.text
    run(tmp_path, "snn.coding=rate", "grain=2", "stages=[search]")
    assert "grain=2 has no effect with snn.coding=rate" in caplog.text
    error = {code: results["search"]["relative_mse"] for code, results in found.items()}
    assert all(error[code] > 10 * error["phase"] for code in ("rate", "ttfs", "few_spike"))
    spikes = {code: results["spikes"]["spikes_per_token"] for code, results in found.items()}
    assert spikes["ttfs"] < spikes["few_spike"] < spikes["phase"]
    assert found["ttfs"]["spikes"]["firing_rate"] <= 1 / 8


def test_several_texts_and_the_main_one(tmp_path):
    """Each has the figures that it has alone; one more text computes nothing else again."""
    alone = run(tmp_path / "alone", "dataset.evaluation.window=32")
    both = run(tmp_path, "texts=[pydocs]", "dataset.extra.pydocs.window=32", "dataset.extra.pydocs.max_windows=2")
    assert both["perplexity_by_text"] == {"pydocs": alone["perplexity"]}
    assert both["perplexity"]["window"] == 64
    before = {path: path.stat().st_mtime_ns for path in artefacts(tmp_path, "evaluate")}
    more = run(tmp_path, "+dataset.extra={again: {source: pydocs, split: calibration, window: 32, max_windows: 1}}")
    assert more["perplexity"] == both["perplexity"]
    assert more["perplexity_by_text"]["again"]["tokens"] == 31
    assert before.items() <= {path: path.stat().st_mtime_ns for path in artefacts(tmp_path, "evaluate")}.items()
    assert len(artefacts(tmp_path, "evaluate")) == len(before) + len(DEFAULT_NETWORKS)


def test_results_do_not_depend_on_what_was_cached(tmp_path):
    """Stage by stage in several runs gives the numbers of one run."""
    for stages in ("[calibrate]", "[search]", "[convert]"):
        run(tmp_path / "parts", f"stages={stages}")
    parts = run(tmp_path / "parts")
    whole = run(tmp_path / "whole")
    assert parts["perplexity"] == whole["perplexity"]


def test_a_long_prefix_is_the_same_in_every_stage(tmp_path, monkeypatch):
    """Several prefix tokens: the numbers of a run that calibrates are those of a run that finds its calibration done."""
    from spikellm.calibration import calibrate as calibration

    monkeypatch.setattr(calibration, "find_prefix_tokens", lambda *_, **__: [7, 200, 1])
    monkeypatch.setattr(calibration, "keep_what_helps", lambda _model, _windows, tokens, **_: tokens)
    loud = "+model.options.initializer_range=0.3"  # weights large enough for the prefix to be felt through the neurons
    one_go = run(tmp_path / "one", loud)
    run(tmp_path / "two", loud, "stages=[calibrate,search]")
    later = run(tmp_path / "two", loud, "stages=[evaluate]")
    assert one_go["prefix_tokens"] == [7, 200, 1]
    assert one_go["perplexity"] == later["perplexity"]
    # base 2 in one grain is the same code under both names
    same = run(tmp_path / "one", loud, "grain=1")["perplexity"]
    assert same["snn"] == same["base2"]


def test_more_steps_come_closer_to_the_pretrained_model(tmp_path):
    """At T = 16 base 2 is finer than the difference that shows; the error falls on the way there."""
    distance = {}
    for T in (2, 16):
        perplexity = run(tmp_path, f"snn.T={T}", "grain=1")["perplexity"]
        distance[T] = abs(perplexity["snn"] / perplexity["ann_prefix"] - 1)
    assert distance[16] < 1e-4
    assert distance[2] > 1e-3  # at T = 4 chance can take a random model's perplexity closer than that


@pytest.mark.parametrize("path", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_architecture_runs_through(path, tmp_path):
    results = run(tmp_path, f"model.path={path}", "snn.T=16", "grain=1")
    assert results["perplexity"]["snn"] == pytest.approx(results["perplexity"]["ann"], rel=1e-2)


def test_the_saved_model_is_the_evaluated_one(tmp_path):
    from transformers import AutoModelForCausalLM

    from spikellm.evaluation.perplexity import perplexity
    from spikellm.evaluation.texts import token_windows

    results = run(tmp_path, "save_model=true")
    config = configure(*SMALL)
    windows = token_windows(config.dataset.evaluation, "dataset.evaluation", None)
    model = AutoModelForCausalLM.from_pretrained(results["saved_model"], dtype=torch.float32)
    assert perplexity(model, windows, label="saved").value == pytest.approx(results["perplexity"]["snn"], rel=1e-5)


def test_the_fitted_network_is_the_better_one(tmp_path):
    """The default search on a network of one layer; a repeated search gives the same codes."""
    options = ["search.method=evolution", "model.options.num_hidden_layers=1", "snn.T=4", "grain=1"]
    results = run(tmp_path / "one", *options)
    assert results["search"]["worse_than_base2"] < results["sites"] / 2  # on 32 tokens that decided nothing
    assert results["search"]["relative_mse"] < results["search"]["relative_mse_base2"]
    assert results["search"]["groups"] == sum(results["search"]["groups_by_grain"])
    assert run(tmp_path / "two", *options)["perplexity"] == results["perplexity"]


def test_stepped_execution_gives_the_folded_perplexity_and_its_course(tmp_path, caplog):
    """float32, so T=8: another order of additions costs a spike here and there, of the smallest steps."""
    folded = run(tmp_path, "snn.step_chunk=2")
    assert "snn.step_chunk=2 has no effect with snn.execution=folded" in caplog.text
    assert "anytime" not in folded
    results = run(tmp_path, "snn.execution=stepped", "snn.step_chunk=3")
    assert results["execution"] == "stepped"
    assert cached(results) == dict.fromkeys(DEFAULT_STAGES, True) | {"evaluate": False}
    assert results["perplexity"]["snn"] == pytest.approx(folded["perplexity"]["snn"], rel=1e-3)
    assert results["perplexity"]["base2"] == folded["perplexity"]["base2"]
    course = results["anytime"]["perplexity"]
    assert len(course) == 8
    assert course[-1] == results["perplexity"]["snn"]
    assert run(tmp_path, "snn.execution=stepped")["anytime"] == results["anytime"]


def test_a_memory_bound_that_holds_no_step_is_refused_with_key_value_and_cure(tmp_path):
    with pytest.raises(InputError, match=r"snn\.max_memory_gib=1e-06: .* GiB .*lower dataset\.evaluation\.window"):
        run(tmp_path, "snn.execution=stepped", "snn.max_memory_gib=1e-6")
    assert run(tmp_path, "snn.execution=stepped", "snn.max_memory_gib=1")["anytime"]


def test_no_stage_imports_model_classes_before_it_builds_a_model():
    """They take as long to import as all that a run does which finds everything in the store."""
    script = "import sys, spikellm.run.stages, spikellm.run.job; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "transformers"} <= set(done.stdout.split())
    assert not {"transformers.modeling_utils", "torch._dynamo", "scipy"} & set(done.stdout.split())
