"""The fingerprint of code: what it must see, and what it must not."""

import ast
import shutil
from pathlib import Path

import pytest

from spikellm.evaluation import measured
from spikellm.run.converting import WEIGHTS
from spikellm.run.measuring import SPIKES
from spikellm.run.stage import KeyedStage
from spikellm.run.stages import STAGES
from spikellm.store.provenance import JOB, PACKAGE, closure, code_fingerprint
from tests.jobs import run

# What is keyed -> the modules that compute it.
COMPUTED_BY = {stage.name: stage.code.modules for stage in (*STAGES.values(), SPIKES, WEIGHTS) if isinstance(stage, KeyedStage)} | {
    "evaluate": measured.FOLDED.modules,
    "evaluate base2": measured.BASE2.modules,
    "evaluate stepped": measured.STEPPED.modules,
    "evaluate ann": measured.PRETRAINED.modules,
}

MODULES = {
    "first.py": '"""A module."""\nfrom package.config import schema\nfrom package.second import g\n'
    "RATE = 2.0\n\n"
    '\ndef f(x):\n    """Twice."""\n    return RATE * g(x)\n',
    "second.py": "def g(x):\n    from package import third\n    return third.h(x)\n",
    "third.py": "import package.deep.fourth\n\ndef h(x):\n    return x + 1\n",
    "deep/__init__.py": "",
    "deep/fourth.py": "from package import first  # a circle\nfrom package.kernels import build\n",
    "kernels/build.py": "SOURCES = 'cpp'\n",
    "kernels/cpp/one.cpp": "int one() { return 1; }\n",
    "bystander.py": "import package.first\n",
    "config/schema.py": "DEFAULT = 1\n",
}
SEEN = {
    "a constant": ("first.py", "RATE = 2.0", "RATE = 2.5"),
    "a formula": ("third.py", "x + 1", "x + 2"),
    "an import inside a function": ("second.py", "return third.h(x)", "return third.h(x) / 2"),
    "a source in another language": ("kernels/cpp/one.cpp", "return 1", "return 2"),
    "a module of a folder": ("deep/fourth.py", "from package", "A = 1\nfrom package"),
}
NOT_SEEN = {
    "a comment": ("first.py", "RATE = 2.0", "RATE = 2.0  # per step"),
    "a docstring": ("first.py", "Twice.", "Two times."),
    "a module's docstring": ("first.py", "A module.", "The module."),
    "layout": ("third.py", "x + 1", "(x\n        + 1)"),
    "a module that imports": ("bystander.py", "import", "A = 1\nimport"),
    "the schema": ("config/schema.py", "1", "2"),
}


@pytest.fixture
def fingerprint(tmp_path):
    """The fingerprint of `first` after a change (file, old, new)."""

    def take(name: str, change: tuple[str, str, str] | None) -> str:
        package = tmp_path / name / "package"  # another folder each: a process reads a file once
        for file, text in MODULES.items():
            path = package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(change[1], change[2]) if change and change[0] == file else text)
        return code_fingerprint(("first",), package)

    return take


@pytest.mark.parametrize("change", SEEN)
def test_an_edit_of_what_computes_is_seen(change, fingerprint):
    assert fingerprint("before", None) != fingerprint("after", SEEN[change])


@pytest.mark.parametrize("change", NOT_SEEN)
def test_an_edit_of_anything_else_is_not(change, fingerprint):
    assert fingerprint("before", None) == fingerprint("after", NOT_SEEN[change])


# constant or function -> its module and the stages whose results it changes (their keys are in those of later stages)
EDITS = {
    "SOFTMAX_ROW_STRIDE": ("calibration.calibrate", {"calibrate"}),
    "PREFIX_WINDOWS": ("calibration.calibrate", {"calibrate"}),
    "GENERATIONS": ("search.evolution", {"search"}),
    "MEMBERS": ("search.evolution", {"search"}),
    "segment_sums": ("kernels.encode", {"search"}),
    "REPRESENTATIVES": ("search.exchange", {"search"}),
    "find_prefix_tokens": ("model.prefix", {"calibrate"}),
    "rotate": ("model.rotation", {"calibrate", "weights"}),
    "round_to_nearest": ("model.integers", {"calibrate"}),
    "moments": ("reconstruction.rounding", {"weights"}),
    "encode": ("coding.neuron", {"search", "convert", "evaluate", "evaluate base2", "evaluate stepped", "spikes", "diagnose"}),
    "readout_perplexities": ("evaluation.perplexity", {"evaluate", "evaluate base2", "evaluate stepped", "evaluate ann", "diagnose"}),
    "walk": ("model.blocks", {"calibrate", "evaluate", "evaluate base2", "evaluate stepped", "evaluate ann", "diagnose"}),
    "spike_linear": ("kernels.temporal", {"evaluate stepped"}),
    "lloyd_max": ("evaluation.diagnostics", {"diagnose"}),
    "token_windows": ("evaluation.texts", {"calibrate", "evaluate", "evaluate ann"}),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_constant_and_formula_is_in_the_keys_of_what_it_computes(name):
    module, stages = EDITS[name]
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {each.id for node in tree.body if isinstance(node, ast.Assign) for each in ast.walk(node) if isinstance(each, ast.Name)}
    assert name in defined
    assert stages <= {stage for stage, modules in COMPUTED_BY.items() if module in closure(modules, PACKAGE)}


@pytest.mark.parametrize(
    "name",
    [
        "report.console",
        "report.results",
        "report.html",
        "report.plots",
        "run.job",
        "run.sweep",
        "run.tracking",
        "run.command",
        "config.schema",
    ],
)
def test_what_only_shows_computes_nothing_again(name):
    assert not [stage for stage, modules in COMPUTED_BY.items() if name in closure(modules, PACKAGE)]
    assert name not in closure(JOB, PACKAGE)


def test_a_finished_job_is_of_all_code_that_computes():
    assert set().union(*(closure(modules, PACKAGE) for modules in COMPUTED_BY.values())) <= closure(JOB, PACKAGE)


@pytest.mark.parametrize(
    "name",
    [
        "search.search",
        "search.evolution",
        "search.methods",
        "evaluation.figures",
        "evaluation.diagnostics",
        "spikes.ledger",
        "execution.stepped",
    ],
)
def test_an_edit_of_a_later_stage_does_not_calibrate_again(name):
    assert name not in closure(COMPUTED_BY["calibrate"], PACKAGE)


def test_an_edited_package_answers_from_no_older_result(tmp_path, monkeypatch):
    """The whole way: another formula, another key, another figure."""
    from spikellm.store import provenance

    options = ["stages=[calibrate,search]", "model.options.num_hidden_layers=1"]
    first = run(tmp_path, *options)
    edited = tmp_path / "edited" / "spikellm"
    shutil.copytree(PACKAGE, edited, ignore=shutil.ignore_patterns("__pycache__", "*.j2"))
    path = edited / "search" / "fit.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nANOTHER = 1\n", encoding="utf-8")
    monkeypatch.setattr(provenance, "PACKAGE", edited)
    again = run(tmp_path, *options)
    cached = {stage: record["cached"] for stage, record in again["stages"].items()}
    assert cached == {"calibrate": True, "search": False}
    assert again["inputs"]["code"] != first["inputs"]["code"]
    assert Path(again["codes"]) != Path(first["codes"])
