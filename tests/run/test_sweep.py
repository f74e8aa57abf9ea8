"""Sweeps in real processes: continued after a kill, the same under every launcher."""

import csv
import json
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from spikellm.report.results import NOT_FINISHED, summary_rows
from spikellm.run.sweep import count_jobs
from tests.configure import composed
from tests.jobs import SMALL, artefacts
from tests.launch import die_inside, launch, plain
from tests.places import CONF

LAUNCHERS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").open()))


def figures(folder: Path) -> dict[str, dict]:
    """What a sweep measured, by job."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))}
    return {name: {key: results[key] for key in ("model", "T", "grain", "perplexity", "prefix_tokens")} for name, results in found.items()}


def sweeps(root: Path) -> list[Path]:
    return [path for path in (root / "sweeps").glob("*/*") if path.is_dir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_sweep_started_again_finishes_what_was_missing(number, tmp_path):
    command = ["-m", *SMALL, "snn.T=4,6", "grain=1", f"output_root={tmp_path}"]
    done = launch(*command, before=die_inside, values=("search", number, 2))
    (folder,) = sweeps(tmp_path)
    if number is signal.SIGTERM:
        assert done.code == 130, done.err
        assert done.err.startswith("interrupted")
        assert [row["error"].partition(" ")[0] for row in summary(folder)] == ["", "interrupted"]
    else:
        assert done.code == -signal.SIGKILL
        assert [(row["T"], row["error"]) for row in summary_rows(folder)] == [(4, None), (6, NOT_FINISHED)]
    first = folder / "0-T4-G1" / "results.json"
    before, written = first.read_bytes(), first.stat().st_mtime_ns

    done = launch(*command)
    assert done.code == 0, done.err
    assert "continuing the sweep" in done.out
    assert "1 of 2 jobs" in done.out
    assert done.out.count("finished before") == 1
    assert sweeps(tmp_path) == [folder]
    assert (first.read_bytes(), first.stat().st_mtime_ns) == (before, written)
    assert [(row["T"], row["error"]) for row in summary(folder)] == [("4", ""), ("6", "")]
    assert len(artefacts(tmp_path, "calibrate")) == 1
    assert (folder / "summary.png").stat().st_size > 5000
    assert "T = 6" in (folder / "report.html").read_text()
    assert json.loads((folder / "sweep.json").read_text())["jobs"] == 2


def test_a_complete_sweep_given_again(tmp_path):
    """In a folder of its own, nothing is computed again; in the old one, a job with another configuration is."""
    old = tmp_path / "sweeps" / "2000-01-01" / "00-00-00"
    command = ["-m", *SMALL, "snn.T=4", "grain=1", "rotation.seed=0,1", f"output_root={tmp_path}"]
    first = launch(*command, f"hydra.sweep.dir={old}")
    assert first.code == 0, first.err
    assert [row["options"] for row in summary(old)] == ["rotation.seed=0", "rotation.seed=1"]
    assert launch(*command).code == 0
    (new,) = set(sweeps(tmp_path)) - {old}
    assert figures(old) == figures(new)
    for path in new.glob("*/results.json"):
        assert all(stage["cached"] for stage in json.loads(path.read_text())["stages"].values())
    other = launch(*command[:-2], "rotation.seed=0,2", command[-1], f"hydra.sweep.dir={old}")
    assert other.code == 0, other.err
    assert other.out.count("finished before") == 1
    assert [row["options"] for row in summary(old)] == ["rotation.seed=0", "rotation.seed=2"]


def test_jobs_without_a_word_are_named(tmp_path):
    (tmp_path / "1-T4-G1" / ".hydra").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (row,) = summary_rows(tmp_path)
    assert (row["folder"], row["error"]) == ("1-T4-G1", NOT_FINISHED)


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["snn.T=4,6,8", "grain='1','2','3'"], 9),
        (["snn.T=range(4,7)", "model=tiny"], 3),
        (["experiment=published_llama2_7b"], 4),
        (["experiment=published_llama2_7b", "snn.T=8"], 2),
        (["experiment=t_by_grain"], 28),
        ([], 1),
    ],
)
def test_jobs_are_counted_as_hydra_does(overrides, jobs):
    assert count_jobs(composed(*overrides)) == jobs


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_compose(name):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert composed(f"hydra/launcher={name}").hydra.launcher._target_.startswith("hydra_plugins.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "pairs", "infeasible"), [("joblib_two", ["snn.T=3,4", "grain=1,2"], 1), ("submitit_local", ["snn.T=4", "grain=1,2"], 0)]
)
def test_every_launcher_gives_the_same_figures_and_calibrates_once(launcher, pairs, infeasible, tmp_path):
    """Jobs in other processes, an infeasible one among them; the summary is written and the store shared."""
    if find_spec(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher") is None:
        pytest.skip("pip install 'spikellm[sweep]'")
    jobs = ["-m", *SMALL, *pairs, "hardware.threads=1"]
    done = launch(*jobs, f"output_root={tmp_path}/basic", f"hydra.sweep.dir={tmp_path}/basic/sweep")
    assert done.code == 2 * infeasible, done.err
    done = plain(*jobs, f"hydra/launcher={launcher}", f"output_root={tmp_path}/other", f"hydra.sweep.dir={tmp_path}/other/sweep")
    assert done.code == 2 * infeasible, done.err
    basic, other = tmp_path / "basic" / "sweep", tmp_path / "other" / "sweep"
    assert len(figures(basic)) == 2 + infeasible
    assert figures(other) == figures(basic)
    assert len(artefacts(tmp_path / "other", "calibrate")) == 1
    calibrated = [json.loads(path.read_text())["stages"]["calibrate"]["cached"] for path in other.glob("*/results.json")]
    assert calibrated.count(False) == 1
    assert [(row["folder"], row["error"]) for row in summary(other)] == [(row["folder"], row["error"]) for row in summary(basic)]
    assert "T = 4" in (other / "report.html").read_text()
