"""Weights & Biases offline: read back with W&B's own tool, against results.json."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spikellm.config.checks import InputError
from spikellm.config.choices import Tracker, TrackingMode
from spikellm.config.measures import TrackingConfig
from spikellm.run.tracking import WandbTracking, numeric_leaves, run_id, tracked
from spikellm.store.record import Findings, PerplexityRecord, Results
from tests.configure import configure
from tests.jobs import WITH_REPORT
from tests.launch import launch

TREE = {"model": {"name": "tiny"}, "snn": {"T": 8, "grain": "2"}, "output_root": "/a", "tracking": {"kind": "wandb"}}

NOTHING = Results(schema=1, model="tiny", T=8, grain=2, stages={})


def offline(**options) -> TrackingConfig:
    return TrackingConfig(kind=Tracker.wandb, mode=TrackingMode.offline, **options)


def inspect(folder: Path) -> dict:
    """The one run below the folder of a job."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def no_account(server: str | None = None) -> None:
    """No key to be found, or one for a server that does not answer."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["NETRC"] = "/no/such/netrc"
    if server is not None:
        os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server}


def test_a_sweep_leaves_a_run_per_job_and_its_repetition_continues_it(tmp_path):
    """One job is infeasible. The sweep has no key; the repetition of a job has one, and a server that does not answer."""
    sweep, again = tmp_path / "sweep", tmp_path / "again"
    arguments = [*WITH_REPORT, "tracking=wandb", f"output_root={tmp_path}/out"]
    done = launch("-m", *arguments, "snn.T=3,4", f"hydra.sweep.dir={sweep}", before=no_account)
    assert (done.code, "Traceback" in done.err) == (2, False)
    failed, finished = inspect(sweep / "0-T3-G2"), inspect(sweep / "1-T4-G2")
    assert (failed["state"], failed["exit_code"], finished["state"], finished["exit_code"]) == ("failed", 1, "finished", 0)
    assert "snn.T=3 with grain=2" in failed["summary"]["error"]
    results = json.loads((sweep / "1-T4-G2" / "results.json").read_text())
    figures = {
        key: value for key, value in finished["summary"].items() if not key.startswith(("_", "plots/")) and not key.endswith("_table")
    }
    assert figures == numeric_leaves(results)
    assert figures["perplexity.snn"] == results["perplexity"]["snn"]
    rows = list(csv.DictReader((sweep / "1-T4-G2" / "sites.csv").open()))
    assert (finished["summary"]["sites_table"]["nrows"], finished["summary"]["sites_table"]["ncols"]) == (len(rows), len(rows[0]))
    assert (finished["name"], finished["config"]["snn"]["T"], finished["config"]["dataset"]["evaluation"]["window"]) == (
        "tiny-T4-G2",
        4,
        64,
    )

    server = "http://127.0.0.1:9"
    done = launch(*arguments, "snn.T=4", f"output_root={tmp_path}/other", f"hydra.run.dir={again}", before=no_account, values=(server,))
    assert done.code == 0, done.err
    assert "does not answer" in done.out
    repeated = inspect(again)
    assert repeated["run_id"] == finished["run_id"] != failed["run_id"]
    assert repeated["summary"]["perplexity.snn"] == figures["perplexity.snn"]


def test_what_is_sent(tmp_path):
    """A run in this process with everything: plots, table, artefact, group."""
    (tmp_path / "plots").mkdir()
    from PIL import Image

    Image.new("RGB", (4, 3)).save(tmp_path / "plots" / "heat.png")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "codes.safetensors").write_bytes(b"0")
    results = Results(schema=1, model="tiny", T=8, grain=2, stages={}, codes=str(tmp_path / "codes.safetensors"))
    with tracked(offline(artifacts=True), TREE, folder=tmp_path, group="a sweep") as tracker:
        tracker.log_results(results)
        results |= Findings(perplexity=PerplexityRecord(networks={"snn": 0.25}, windows=1, window=2, tokens=1))
        tracker.log_results(results)
        tracker.log_files(results, {"sites.csv": [{"name": "site", "tau": [1.0, 2.0], "relative_error": 0.5}]}, tmp_path)
    found = inspect(tmp_path)
    assert found["summary"]["perplexity.snn"] == 0.25
    assert found["summary"]["plots/heat"]["_type"] == "image-file"
    assert found["summary"]["sites_table"]["nrows"] == 1
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"codes.safetensors" in content
    assert b"a sweep" in content


@pytest.mark.parametrize(("error", "reason"), [(ValueError("two\nlines"), "two lines"), (KeyboardInterrupt(), "KeyboardInterrupt")])
def test_a_job_that_raises_is_marked_failed(error, reason, tmp_path):
    with pytest.raises(type(error)), tracked(offline(), TREE, folder=tmp_path, group=None):
        raise error
    found = inspect(tmp_path)
    assert (found["state"], found["exit_code"], found["summary"]["error"]) == ("failed", 1, reason)


def test_online_without_a_key_is_refused_with_the_cure(tmp_path):
    done = launch(*WITH_REPORT, "tracking=wandb", "tracking.mode=online", f"output_root={tmp_path}", before=no_account)
    assert done.code == 2
    assert "tracking.mode=online: no key" in done.err.splitlines()[-1]
    assert "tracking.mode=offline" in done.err


def test_disabled_starts_nothing(tmp_path):
    options = TrackingConfig(kind=Tracker.wandb, mode=TrackingMode.disabled)
    with tracked(options, TREE, folder=tmp_path, group=None) as tracker:
        tracker.log_results(NOTHING)
    assert not list(tmp_path.iterdir())


def test_an_id_is_that_of_what_is_computed():
    assert run_id(TREE) == run_id(TREE | {"output_root": "/b", "tracking": {"kind": "wandb", "mode": "offline"}})
    assert run_id(TREE) != run_id(TREE | {"snn": {"T": 7, "grain": "2"}})


def test_a_tracker_that_breaks_costs_a_warning(caplog):
    def log(_):
        raise RuntimeError("disk full")

    WandbTracking(SimpleNamespace(log=log), artifacts=False).log_results(NOTHING)
    assert "disk full" in caplog.text


def test_leaves_are_numbers_and_truth_values():
    tree = {"a": {"b": 1, "c": {"d": 0.5, "e": "text"}}, "f": True, "g": [1, 2], "h": None}
    assert numeric_leaves(tree) == {"a.b": 1, "a.c.d": 0.5, "f": True}


def test_the_options_compose():
    assert configure("tracking=wandb").tracking.mode is TrackingMode.auto
    assert configure("tracking=wandb", "tracking.mode=offline", "tracking.artifacts=true").tracking.artifacts
    with pytest.raises(InputError, match=r"dataset\.extra"):
        configure("+dataset.extra={a b: {source: pydocs}}")
