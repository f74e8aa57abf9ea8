"""Nothing travels from stage to stage or from job to job but results: orders, repetitions and damage change no figure."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.types import RunMode

from spikellm.calibration import calibrate as calibration
from spikellm.config.checks import InputError
from spikellm.config.schema import register
from spikellm.evaluation.texts import token_windows
from spikellm.model.conversion import clear, fill, install
from spikellm.model.load import load_model
from spikellm.model.prefix import attach_prefix
from spikellm.report.console import console_table
from spikellm.report.html import write_report
from spikellm.report.results import summary_rows
from spikellm.run import job
from spikellm.run.command import quote_values
from spikellm.run.stages import STAGES as ALL_STAGES
from spikellm.run.stages import run_stages
from spikellm.run.workspace import Workspace
from spikellm.store.record import Findings, Results
from tests.codes import base2_tables
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run
from tests.models import byte_model, tiny_model
from tests.places import CONF
from tests.texts import random_rows

# One layer and loud weights: the prefix and every neuron are felt.
FELT = ["snn.T=3", "grain=1", "model.options.num_hidden_layers=1", "+model.options.initializer_range=0.3"]
STAGES = {name: stage for name, stage in ALL_STAGES.items() if name != "generate"}  # it wants a tokenizer: test_generate.py
FIGURES = ("perplexity", "spikes", "energy", "diagnostics", "search", "prefix_tokens", "sites", "rotation")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Drawing takes longer than all else here."""

    def write(folder: Path, *_, **__) -> None:
        folder.mkdir()
        (folder / "density.png").write_bytes(b"a picture")

    monkeypatch.setattr("spikellm.run.measuring.write_density_plots", write)


@pytest.fixture
def long_prefix(monkeypatch):
    """Several prefix tokens."""
    monkeypatch.setattr(calibration, "find_prefix_tokens", lambda *_, **__: [7, 200, 1])
    monkeypatch.setattr(calibration, "keep_what_helps", lambda _model, _windows, tokens, **_: tokens)


def stage(results: dict, *names: str) -> dict:
    """Every figure of results.json but times."""
    found = {name: results[name] for name in (names or FIGURES) if name in results}
    if "search" in found:
        found["search"] = {key: value for key, value in found["search"].items() if key != "seconds"}
    return found


def in_order(root: Path, order: tuple[str, ...], *arguments: str) -> dict:
    """Stages one after the other with one workspace, in any order."""
    work, results = Workspace(configure(*SMALL, f"output_root={root}", *FELT, *arguments)), Findings()
    for name in order:
        results |= STAGES[name].run(work).findings
    return stage(results.to_json())


def test_diagnose_after_evaluate_is_diagnose_alone(long_prefix, tmp_path):
    """The pretrained network's figure is there already, so that the last neurons are still in their slots."""
    alone = run(tmp_path / "alone", *FELT, "stages=[diagnose]")
    run(tmp_path / "later", *FELT, "stages=[evaluate]")
    for path in artefacts(tmp_path / "later", "evaluate"):
        if json.loads((path / "inputs.json").read_text())["network"] != "ann":
            shutil.rmtree(path)
    later = run(tmp_path / "later", *FELT, "stages=[evaluate,diagnose]", "diagnostics.windows=2")
    other = run(tmp_path / "alone", *FELT, "stages=[diagnose]", "diagnostics.windows=2")
    assert later["diagnostics"] == other["diagnostics"] != alone["diagnostics"]
    assert later["diagnostics"]["perplexity_by_kind"]["none"] == later["perplexity"]["ann_prefix"]


def test_a_prefix_is_not_computed_through_neurons(ids):
    model = tiny_model(num_hidden_layers=1)
    install(model, rotated=())
    fill(model, base2_tables(model), compiled=False)
    with pytest.raises(ValueError, match="without neurons"):
        attach_prefix(model, [1])
    clear(model)
    attach_prefix(model, [1])


def test_the_order_of_stages_changes_no_figure(long_prefix, tmp_path):
    """Each stage first, the others behind it backwards; fresh stores."""
    wanted = in_order(tmp_path / "wanted", tuple(STAGES))
    assert set(wanted) == set(FIGURES)
    for first in STAGES:
        order = (first, *(name for name in reversed(STAGES) if name != first))
        assert in_order(tmp_path / first, order) == wanted, order


def test_the_order_of_jobs_changes_no_figure(long_prefix, tmp_path):
    """Jobs of a process with one store."""
    jobs = {"a": [], "b": ["snn.T=4"], "c": ["snn.softmax_norm=before"]}
    alone = {name: stage(run(tmp_path / name, *FELT, *options)) for name, options in jobs.items()}
    for order in ("abc", "cba"):
        assert {name: stage(run(tmp_path / order, *FELT, *jobs[name])) for name in order} == alone, order


def perplexity_behind(model, prefix: list[int], windows: torch.Tensor) -> float:
    """By transformers alone: the prefix is read first, and only what comes after it is scored."""
    losses = []
    for window in windows:
        logits = model(torch.cat([torch.tensor(prefix, dtype=torch.long), window])[None]).logits[0, len(prefix) : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def test_the_pretrained_network_is_measured_with_the_prefix_too(long_prefix, tmp_path):
    """Rotated, with empty slots, it is the pretrained network reading the prefix first; every ratio is to this figure."""
    arguments = [*FELT, "spikes.enabled=false", "texts=[pydocs]", "dataset.extra.pydocs.window=32", "dataset.extra.pydocs.max_windows=1"]
    found = run(tmp_path, *arguments)
    config = configure(*SMALL, *arguments)
    model = load_model(config.model, config.hardware)
    texts = {"dataset.evaluation": found["perplexity"], "dataset.extra.pydocs": found["perplexity_by_text"]["pydocs"]}
    for text, (key, figures) in zip((config.dataset.evaluation, config.dataset.extra["pydocs"]), texts.items(), strict=True):
        windows = token_windows(text, key, None)
        assert figures["ann_prefix"] == pytest.approx(perplexity_behind(model, [7, 200, 1], windows), rel=1e-4)
        assert figures["ann"] == pytest.approx(perplexity_behind(model, [], windows), rel=1e-4)
        assert figures["ann"] != pytest.approx(figures["ann_prefix"], rel=1e-2)
    assert f"x {found['perplexity']['snn'] / found['perplexity']['ann_prefix']:.4f}" in console_table(Results.from_json(found), tmp_path)
    without = run(tmp_path, *arguments, "prefix.enabled=false")["perplexity"]
    assert without["ann_prefix"] == pytest.approx(without["ann"], rel=1e-5)  # rotated, and the same function


def test_threads_are_the_job_s_own(tmp_path):
    before = torch.get_num_threads()
    seen = []
    config = configure(*SMALL, *FELT, f"output_root={tmp_path}", f"hardware.threads={before + 1}", "stages=[calibrate]")
    run_stages(config, lambda _: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    with pytest.raises(InputError):
        run_stages(configure(*SMALL, "model.path=phi3", f"output_root={tmp_path}", f"hardware.threads={before + 1}"))
    assert torch.get_num_threads() == before


def test_evaluate_needs_no_preparation(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_rows("piqa", 4)))
    arguments = [*SMALL, *byte_model(tmp_path / "model"), f"output_root={tmp_path}", "snn.T=3", "grain=1", "spikes.enabled=false"]
    arguments += [f"dataset.zero_shot.path={tmp_path}", "dataset.zero_shot.tasks=[piqa]", "dataset.zero_shot.networks=[ann_prefix]"]
    found = STAGES["evaluate"].run(Workspace(configure(*arguments)))
    assert found.findings.zero_shot["ann_prefix"]["piqa"].rows == 4


def spoil(path: Path, number: int) -> None:
    """One of the ways in which files are damaged."""
    content = path.read_bytes()
    match number % 5:
        case 0:
            path.write_bytes(content[:-1])
        case 1:
            path.write_bytes(b"")
        case 2:
            path.write_bytes(bytes(len(content)))
        case 3:
            path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])  # one bit
        case 4:
            path.unlink()


def test_damaged_artefacts_are_made_again_and_change_no_figure(tmp_path, caplog):
    arguments = [*FELT, "save_model=true", f"stages=[{','.join(STAGES)}]"]
    whole = run(tmp_path, *arguments)
    folders = [path for path in sorted((tmp_path / "artifacts").glob("*/*")) if path.is_dir()]
    for number in range(3):
        spoiled = []
        for index, folder in enumerate(folders):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            spoiled.append(files[(7 * index + 3 * number) % len(files)])
            spoil(spoiled[-1], index + number)
        caplog.clear()
        again = run(tmp_path, *arguments)
        assert stage(again) == stage(whole), spoiled
        assert not any(cached(again).values())
        for folder in folders:
            assert caplog.text.count(f"{folder}: ") == 1, folder
    assert all(cached(run(tmp_path, *arguments)).values())
    assert set((tmp_path / "artifacts").glob("*/*")) == set(folders)  # no remains


@pytest.mark.parametrize("gone", ["convert/*/model/model.safetensors", "convert/*/model", "diagnose/*/plots/*.png"])
def test_a_saved_model_or_picture_that_is_gone_is_made_again(gone, tmp_path):
    arguments = [*FELT, "save_model=true", "stages=[convert,diagnose]"]
    first = run(tmp_path, *arguments)
    paths = list((tmp_path / "artifacts").glob(gone))
    assert paths
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(tmp_path, *arguments)
    assert all(path.exists() for path in paths)
    assert cached(again) == {"convert": not gone.startswith("convert"), "diagnose": gone.startswith("convert")}
    assert again["saved_model"] == first["saved_model"]


def test_convert_loads_no_model_where_none_is_saved(tmp_path, monkeypatch):
    run(tmp_path, *FELT, "stages=[calibrate,search]")
    monkeypatch.setattr("spikellm.evaluation.networks.load_model", None)
    assert cached(run(tmp_path, *FELT, "stages=[convert]")) == {"convert": False}


def test_figures_carry_the_versions_that_computed_them(tmp_path, monkeypatch):
    run(tmp_path, *FELT, "stages=[calibrate,search]")
    monkeypatch.setattr("spikellm.store.artifacts.versions", lambda: {"torch": "99"})
    monkeypatch.setattr("spikellm.run.stages.versions", lambda: {"torch": "99"})
    later = run(tmp_path, *FELT)
    assert later["versions"] == {"torch": "99"}
    assert later["stages"]["calibrate"]["versions"]["torch"] == torch.__version__
    assert later["stages"]["evaluate"]["versions"] == {"torch": "99"}
    more = run(tmp_path, *FELT)
    assert all(cached(more).values())
    assert more["stages"]["evaluate"]["versions"] == {"torch": "99"}


@pytest.fixture
def sweep_job(tmp_path, monkeypatch):
    """Runs a job of a sweep in its folder: its results, and whether it was run."""
    register()
    folder, overrides = tmp_path / "sweep" / "0-T3-G1", SimpleNamespace(task=[])
    folder.mkdir(parents=True)
    asked = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(folder)), mode=RunMode.MULTIRUN, overrides=overrides)
    asked.sweep, asked.help = SimpleNamespace(dir=str(folder.parent)), SimpleNamespace(app_name="python main.py")
    monkeypatch.setattr(job.HydraConfig, "get", lambda: asked)

    def start(*arguments: str) -> tuple[dict, bool]:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = compose("config", overrides=quote_values([*SMALL, *FELT, f"output_root={tmp_path}", *arguments]))
        before = (folder / "results.json").stat().st_ino if (folder / "results.json").is_file() else None
        results = job.Job(composed).run().to_json()
        assert json.loads((folder / "results.json").read_text()) == results
        return results, (folder / "results.json").stat().st_ino != before

    start.folder = folder
    return start


def test_a_finished_job_is_believed_only_as_long_as_its_inputs_last(sweep_job, tmp_path, monkeypatch):
    """Damaged results, a saved model that is gone, another text, other code: run again."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 40)
    arguments = ["dataset=text", f"dataset.calibration.path={text}", f"dataset.evaluation.path={text}", "save_model=true"]
    first, _ = sweep_job(*arguments)
    assert sweep_job(*arguments) == (first, False)
    written = (sweep_job.folder / "results.json").read_bytes()
    for content in (b"", bytes(200), written[:300], b"[]", b"{}"):
        (sweep_job.folder / "results.json").write_bytes(content)
        (row,) = summary_rows(sweep_job.folder.parent)
        assert "damaged" in row["error"]
        found, repeated = sweep_job(*arguments)
        assert repeated
        assert all(cached(found).values())
        assert stage(found) == stage(first)
    shutil.rmtree(first["saved_model"])
    assert sweep_job(*arguments)[1]
    assert Path(first["saved_model"]).is_dir()
    text.write_text("seven six five four three two one " * 40)
    changed, repeated = sweep_job(*arguments)
    assert repeated
    assert changed["perplexity"] != first["perplexity"]
    assert sweep_job(*arguments) == (changed, False)
    monkeypatch.setattr("spikellm.store.sources.job_code", lambda: "other code")
    assert sweep_job(*arguments)[1]


def test_a_report_on_damaged_results_says_so(tmp_path):
    (tmp_path / "results.json").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"report\.folder=.*results\.json there is damaged"):
        write_report(tmp_path)


def test_a_finished_job_is_looked_up_without_torch():
    """A sweep of many finished jobs answers at once."""
    code = "import sys, spikellm.run.job; from spikellm.store.sources import job_inputs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
