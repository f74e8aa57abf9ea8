"""The command line as a user meets it: real processes, exit codes, one clear line for wrong input."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spikellm.cores import DECIDED
from tests.jobs import WITH_REPORT
from tests.launch import launch, one_line, plain
from tests.places import MAIN

RESULT_KEYS = {
    "schema", "model", "dtype", "T", "grain", "coding", "execution", "seed", "perplexity", "sites", "prefix_tokens", "rotation", "search",
    "stages", "versions", "spikes", "energy",
}  # fmt: skip


def results_below(root: Path) -> list[Path]:
    return sorted((root / "runs").rglob("results.json"))


def test_help_lists_the_groups_and_imports_no_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", str(MAIN), "--help"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0
    for group in ("model", "timesteps", "grain", "dataset", "hardware", "tracking", "experiment"):
        assert f"{group}:" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy"}


def test_composing_imports_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(MAIN), "snn.T=3", "grain=2", f"output_root={tmp_path}"],
        capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: snn.T=3" in done.stderr
    assert " torch\n" not in done.stderr


# (arguments, what the line must name): each value is what the user wrote
REFUSED_BY_COMPOSITION = [
    (["model=llama9"], ["model", "llama9"]),
    (["dataset=nothing"], ["dataset", "nothing"]),
    (["snn.steps=4"], ["steps"]),
    (["snn.T=eight"], ["snn.T", "eight"]),
    (["model.dtype=int8"], ["dtype", "int8"]),
    (["snn.T=3", "grain=2"], ["snn.T=3", "grain=2"]),
    (["snn.T=17", "grain=1"], ["snn.T=17"]),
    (["grain=7"], ["grain", "7"]),
    (["grain=range(1,3)"], ["grain=range(1,3)", "grain=1,2,3"]),
    (["stages=[calibrate,fly]"], ["stages", "fly"]),
    (["energy.table=wood"], ["energy.table", "wood", "fp32", "custom"]),
    (["energy.table=custom"], ["energy.mac_pj=null", "energy.table=custom"]),
    (["energy.table=custom", "energy.mac_pj=4.6"], ["energy.ac_pj=null"]),
    (["energy.table=custom", "energy.mac_pj=-1", "energy.ac_pj=0.9"], ["energy.mac_pj=-1"]),
    (["energy.mac_pj=4.6"], ["energy.mac_pj=4.6", "energy.table=custom"]),
    (["spikes.windows=0"], ["spikes.windows=0"]),
    (["snn.coding=morse"], ["snn.coding", "morse", "ttfs"]),
    (["snn.coding=few_spike"], ["snn.max_spikes=null"]),
    (["snn.coding=few_spike", "snn.max_spikes=9"], ["snn.max_spikes=9", "snn.T=8"]),
    (["snn.max_spikes=2"], ["snn.max_spikes=2", "few_spike"]),
    (["hydra.verbose=5"], ["command line"]),
    (["+foo=1"], ["foo=1", "no such key"]),
]
REFUSED_BY_STAGES = [
    (["dataset=text", "dataset.calibration.path=/no/such.txt"], ["dataset.calibration.path", "/no/such.txt"]),
    (["dataset=text", "dataset.calibration.path={empty}"], ["dataset.calibration.path", "empty.txt"]),
    (["dataset=text", "dataset.calibration.path={short}"], ["dataset.calibration.path", "short.txt", "window"]),
    (["dataset=text"], ["dataset.calibration.path=null"]),
    (["dataset=text", "dataset.calibration.path=/d/it's (ü)=.txt"], ["dataset.calibration.path=/d/it's (ü)=.txt", "No such file"]),
    (["model.options.hidden_size=65"], ["model.options", "hidden_size: 65"]),
    (["dataset=wikitext2"], ["dataset.calibration.path=Salesforce/wikitext"]),
    (["model.path=gpt2"], ["model.path=gpt2"]),
    (["model.path=phi3"], ["model.path=phi3"]),
    (["model=llama2_7b"], ["model.path=meta-llama/Llama-2-7b-hf"]),
    (["model=llama2_7b", "model.path=/no/such/folder"], ["model.path=/no/such/folder"]),
    (["snn.coding=rate", "search.import_file=A.pth"], ["search.import_file=A.pth", "snn.coding=rate"]),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSED_BY_COMPOSITION + REFUSED_BY_STAGES, ids=lambda value: " ".join(value))
def test_wrong_input_gets_one_line_with_key_and_value(arguments, named, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    arguments = [argument.replace("{empty}", f"{tmp_path}/empty.txt").replace("{short}", f"{tmp_path}/short.txt") for argument in arguments]
    line = one_line(launch(*WITH_REPORT, f"output_root={tmp_path}/out", *arguments))
    for name in named:
        assert name in line
    assert not results_below(tmp_path)


def test_cuda_asked_for_and_absent(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("CUDA is present")
    for hardware, device in (("gpu", "cuda"), ("multi_gpu", "auto")):
        assert f"hardware.device={device}" in one_line(launch(*WITH_REPORT, f"hardware={hardware}", f"output_root={tmp_path}"))


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "file" in one_line(launch(*WITH_REPORT, f"output_root={tmp_path}/file/out"))
    assert "file" in one_line(launch(*WITH_REPORT, f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/file/run"))
    (tmp_path / "artifacts").touch()
    assert "artifacts" in one_line(launch(*WITH_REPORT, f"output_root={tmp_path}"))


def test_one_refusal_in_a_fresh_interpreter(tmp_path, monkeypatch):
    """The same without the fork server: nothing hangs on modules that it has imported before. The threads of its torch wait asleep."""
    for name in DECIDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    done = plain(*WITH_REPORT, f"output_root={tmp_path}", "dataset=text", "dataset.calibration.path=/no/such.txt")
    settings, end, rest = done.err.rpartition("OPENMP DISPLAY ENVIRONMENT END\n")
    assert re.search(r"GOMP_SPINCOUNT = '0'|KMP_BLOCKTIME ?= ?'?0", settings + end)
    assert "/no/such.txt" in one_line(replace(done, err=rest))


def test_a_small_run_writes_what_the_contract_says(tmp_path):
    folder = tmp_path / "here"
    done = launch(*WITH_REPORT, f"output_root={tmp_path}", f"hydra.run.dir={folder}", "snn.T=6", "grain=3")
    assert done.code == 0, done.err
    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= RESULT_KEYS
    assert (results["schema"], results["model"], results["T"], results["grain"], results["sites"]) == (1, "tiny", 6, 3, 19)
    assert set(results["perplexity"]) >= {"ann", "snn", "base2", "windows", "window", "tokens"}
    assert (results["perplexity"]["windows"], results["perplexity"]["window"], results["perplexity"]["tokens"]) == (2, 64, 126)
    assert set(results["stages"]) == {"calibrate", "search", "convert", "evaluate"}
    assert set(results["rotation"]) >= {"kind", "seed", "hash"}
    assert set(results["search"]) >= {"seconds", "relative_mse", "relative_mse_base2", "worse_than_base2"}
    assert set(results["versions"]) >= {"python", "torch", "transformers", "spikellm"}
    rows = list(csv.DictReader((folder / "sites.csv").open()))
    assert len(rows) == len({row["name"] for row in rows}) == 19
    assert {"name", "tau", "grain", "assignment", "v0", "relative_error_base2", "relative_error", "firing_rate"} <= set(rows[0])
    assert all(0 <= float(row["firing_rate"]) <= 1 for row in rows)
    assert (folder / ".hydra" / "config.yaml").is_file()
    spikes, energy = results["spikes"], results["energy"]
    assert set(spikes) >= {"firing_rate", "firing_rate_at_synapses", "spikes_per_token", "sops_per_token", "dense_operations"}
    assert set(energy) >= {"ann_pj_per_token", "snn_pj_per_token", "int_pj_per_token", "break_even_firing_rate", "source"}
    counts = list(csv.DictReader((folder / "spikes.csv").open()))
    assert [row["name"] for row in counts] == [row["name"] for row in rows]
    assert sum(float(row["sops_per_token"]) for row in counts) == pytest.approx(spikes["sops_per_token"])
    assert all(len(json.loads(row["firing_rate_by_step"])) == 6 for row in counts)
    assert {path.name for path in (folder / "plots").glob("*.png")} == {"firing_rate_by_layer.png", "firing_rate_by_step.png"}
    last = done.out.splitlines()[-13:]
    assert any("SOPs per token" in line for line in last)
    assert any("Horowitz" in line for line in last)
    assert any("ANN" in line for line in last)
    assert str(folder / "results.json") in last[-1]


def test_stages_can_be_chosen(tmp_path):
    done = launch(*WITH_REPORT, f"output_root={tmp_path}", "stages=[calibrate,search]", "model.options.max_position_embeddings=32")
    assert done.code == 0, done.err
    assert done.out.count("max_position_embeddings") == 1  # windows beyond the context: told once
    results = json.loads(results_below(tmp_path)[0].read_text())
    assert list(results["stages"]) == ["calibrate", "search"]
    assert all(number in results["warnings"][0] for number in ("window=64", "32 tokens"))
    assert "perplexity" not in results
    assert "-tiny-T8-G2" in results_below(tmp_path)[0].parent.name


def test_a_sweep_goes_on_after_an_infeasible_job_and_calibrates_once(tmp_path):
    done = launch("-m", *WITH_REPORT, "snn.T=3,4", "grain=1,2", f"output_root={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep")
    assert done.code == 2
    assert "Traceback" not in done.err
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").open()))
    assert [row["folder"] for row in rows] == ["0-T3-G1", "1-T3-G2", "2-T4-G1", "3-T4-G2"]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]
    assert "snn.T=3" in rows[1]["error"]
    assert "grain=2" in rows[1]["error"]
    assert [(row["T"], row["grain"]) for row in rows if not row["error"]] == [("3", "1"), ("4", "1"), ("4", "2")]
    assert all(float(row["snn"]) > 1 for row in rows if not row["error"])
    summary = (tmp_path / "sweep" / "summary.md").read_text()
    assert len(summary.splitlines()) == 2 + 4
    cached = [
        json.loads((tmp_path / "sweep" / row["folder"] / "results.json").read_text())["stages"]["calibrate"]["cached"]
        for row in rows
        if not row["error"]
    ]
    assert cached == [False, True, True]


@pytest.mark.first
def test_the_main_job_on_the_real_model(smollm2, tmp_path):
    """Everything at once, the neurons fused, in a fresh interpreter: embedded model and text."""
    done = plain(
        f"output_root={tmp_path}", "dataset.calibration.window=256", "dataset.calibration.max_windows=2",
        "dataset.evaluation.window=256", "dataset.evaluation.max_windows=2", "snn.intervals=1", timeout=600,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    path = results_below(tmp_path)[0]
    results = json.loads(path.read_text())
    assert (results["model"], results["sites"], results["T"], results["grain"]) == ("smollm2_135m", 271, 8, 2)
    assert len(list(csv.DictReader((path.parent / "sites.csv").open()))) == 271
    perplexity = results["perplexity"]
    assert 1 < perplexity["ann"] < 100
    assert 0.9 < perplexity["snn"] / perplexity["ann"] < 1.4
    assert results["prefix_tokens"]
