"""What `pip install` gives: the wheel has everything, runs anywhere, and says in one line what an extra would add."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

from spikellm.config.extras import EXTRA, PICTURES, lack
from tests.jobs import SMALL, WITH_REPORT
from tests.launch import launch, one_line
from tests.places import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Runs the script argv[2] with the libraries of argv[1] missing; last on stderr: what it opened of the checkout's code and configuration.
WATCHED = f"""
import atexit, runpy, sys
opened = []
ours = tuple(f"{ROOT}/{{name}}" for name in ("spikellm", "conf", "main.py"))
sys.addaudithook(lambda event, given: event == "open" and str(given[0]).startswith(ours) and opened.append(given[0]))
atexit.register(lambda: print("opened", opened, file=sys.stderr))
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this checkout, installed; its script is bin/spikellm."""
    folder = tmp_path_factory.mktemp("install")
    for name in ("spikellm", "conf"):
        copytree(ROOT / name, folder / "source" / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", f"{folder}/wheel", f"{folder}/source"]
    subprocess.run([*pip, *built], check=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", f"{folder}/site", str(wheel)], check=True)
    return folder / "site"


def python(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the wheel before whatever else is installed."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_of_conf(installed):
    wanted = [path.relative_to(ROOT) for path in (ROOT / "spikellm").rglob("*") if path.suffix in (".py", ".j2", ".typed")]
    wanted += [Path("spikellm") / path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")]
    assert [str(path) for path in wanted if not (installed / path).is_file()] == []
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"spikellm", "bin"}


@pytest.mark.slow
def test_the_console_script_runs_from_an_empty_folder_and_writes_below_it(installed, tmp_path):
    script = str(installed / "bin" / "spikellm")
    told = python(installed, tmp_path, script, "--help")
    assert told.returncode == 0, told.stderr
    assert "  spikellm model=llama3_8b snn.T=8 grain=3 " in told.stdout
    assert "main.py" not in told.stdout
    assert list(tmp_path.iterdir()) == []

    done = python(installed, tmp_path, "-c", WATCHED, "", script, *WITH_REPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "opened []\n"
    (results,) = (tmp_path / "outputs" / "runs").rglob("results.json")
    assert json.loads(results.read_text())["command"] == " ".join(["spikellm", *WITH_REPORT])
    assert {"main.log", "report.html", "sites.csv", ".hydra"} <= {path.name for path in results.parent.iterdir()}
    assert "<svg" in (results.parent / "report.html").read_text()

    base = " ".join(name for name in EXTRA if not name.startswith("hydra_plugins"))
    done = python(installed, tmp_path, "-c", WATCHED, base, script, *WITH_REPORT, "hydra.run.dir=base")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "opened []\n"
    assert done.stdout.count("pip install 'spikellm[report]'") == 1
    assert json.loads((tmp_path / "base" / "results.json").read_text())["perplexity"] == json.loads(results.read_text())["perplexity"]
    assert not (tmp_path / "base" / "report.html").exists()


def test_python_m_spikellm_is_the_same_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "spikellm", "snn.T=3"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: snn.T=3")


def without(*libraries: str) -> None:
    """As if they were not installed: importing them fails, `find_spec` finds none."""
    sys.modules.update(dict.fromkeys(libraries))


@pytest.mark.parametrize(
    ("library", "arguments", "wish"),
    [
        ("datasets", ["dataset=wikitext2"], "dataset.calibration.source=hub"),
        ("datasets", ["texts=[c4]"], "dataset.extra.c4.source=hub"),
        ("lm_eval", ["dataset.zero_shot.tasks=[piqa,arc_easy]"], "dataset.zero_shot.tasks=[piqa,arc_easy]"),
        ("wandb", ["tracking=wandb"], "tracking=wandb"),
        ("matplotlib", ["stages=[search,diagnose]"], "stages=[diagnose]"),
        ("jinja2", ["stages=[report]"], "stages=[report]"),
        ("jinja2", ["stages=[calibrate,report]"], "stages=[report]"),
        ("hydra_plugins.hydra_joblib_launcher", ["-m", "hydra/launcher=joblib_two"], "hydra/launcher=joblib_two"),
        ("hydra_plugins.hydra_submitit_launcher", ["-m", "hydra/launcher=submitit_local"], "hydra/launcher=submitit_local"),
    ],
)
def test_an_option_whose_library_is_missing_gets_one_line_before_any_work(library, arguments, wish, tmp_path):
    line = one_line(launch(*SMALL, f"output_root={tmp_path}", *arguments, before=without, values=(library,)))
    assert line == f"error: {wish}: {library} is not installed: pip install 'spikellm[{EXTRA[library]}]'"
    assert not (tmp_path / "artifacts" / "search").exists()


def test_a_sweep_goes_without_pictures(tmp_path):
    arguments = ["-m", *SMALL, "stages=[calibrate]", "grain=1,2", f"output_root={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = launch(*arguments, before=without, values=PICTURES)
    assert done.code == 0, done.err
    assert {"summary.csv", "summary.md"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert not (tmp_path / "sweep" / "report.html").exists()


def test_a_library_below_one_that_is_missing_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_plugins", None)
    monkeypatch.delitem(sys.modules, "hydra_plugins.hydra_joblib_launcher", raising=False)
    assert "spikellm[sweep]" in lack("hydra_plugins.hydra_joblib_launcher")
    assert lack("json", "csv") is None


# ---- pyproject.toml -------------------------------------------------------------------------------------------------------


def names(requirements: list[str]) -> set[str]:
    """Distributions as modules are spelled."""
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_") for requirement in requirements}


def test_every_room_is_a_package_of_the_wheel():
    rooms = {f"spikellm.{path.parent.name}" for path in (ROOT / "spikellm").glob("*/__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {"spikellm", "spikellm.conf"} | rooms


def test_every_library_that_the_package_imports_is_declared_and_extras_are_known_by_their_libraries():
    extras = PYPROJECT["project"]["optional-dependencies"]
    spelled = {"hydra_core": "hydra", "hydra_joblib_launcher": "hydra_plugins.hydra_joblib_launcher"}
    spelled |= {"hydra_submitit_launcher": "hydra_plugins.hydra_submitit_launcher"}
    declared = {extra: {spelled.get(name, name) for name in names(extras[extra])} for extra in extras}
    assert set(EXTRA.values()) == {"eval", "hub", "report", "sweep", "wandb"}
    assert all(library in declared[extra] for library, extra in EXTRA.items())
    assert extras["all"] == [f"spikellm[{','.join(sorted(set(EXTRA.values())))}]"]
    assert "spikellm[all]" in extras["dev"]
    base = {spelled.get(name, name) for name in names(PYPROJECT["project"]["dependencies"])}
    imported = set()
    for path in (ROOT / "spikellm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "spikellm"}
    assert imported - base == set(EXTRA) - {name for name in EXTRA if "." in name} | declared["cuda"]
    assert not base & set(EXTRA)
