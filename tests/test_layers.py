"""The architecture: which file may import which, how long a file may be, who may know Hydra."""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file imports only from layers before its own. A new file needs a place here.
LAYERS = (
    {"fields", "provenance"},
    {"config", "hadamard", "neuron", "coding", "temporal", "energy"},
    {"boundary"},
    {"sites", "artifacts", "spike_plots", "command", "modules"},
    {"sources", "data", "intake"},
    {"model", "tracking"},
    {"rotation", "prefix", "attention", "statistics", "evolution", "zero_shot"},
    {"conversion", "evaluation", "gradient", "stepped_modules", "spike_counter", "code_fit"},
    {"calibration", "checkpoint", "search", "stepped_attention", "ledger"},
    {"published", "stepped", "traditional", "accounts", "diagnostics"},
    {"code_plots", "fitting", "networks"},
    {"workspace"},
    {"stages", "report", "plots"},
    {"console", "html_report"},
    {"sweep"},
    {"job"},
    {"main"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# library -> the only files that may import it
RESERVED = {
    "hydra": {"main", "config", "command", "sweep", "job"},
    "omegaconf": {"main", "config", "command", "sweep", "job"},
    "matplotlib": {"plots", "spike_plots", "code_plots"},
    "jinja2": {"html_report"},
    "wandb": {"tracking"},
    "lm_eval": {"zero_shot"},
}
MATHEMATICS = LAYERS[1] - {"config"}
# Hydra imports these before every run and for --help.
NO_TORCH = {
    "fields",
    "config",
    "boundary",
    "command",
    "console",
    "report",
    "artifacts",
    "provenance",
    "sources",
    "sweep",
    "job",
}
PUBLIC = "__init__"

FILES = {path.stem: path for path in [ROOT / "main.py", *sorted((ROOT / "spikellm").rglob("*.py"))]}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere in it or only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """The files of the package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("spikellm.")} & set(FILES)


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", sorted(set(FILES) - {PUBLIC}))
def test_a_file_imports_only_from_lower_layers(name):
    assert name in LAYER, f"{name}.py has no layer: give it one in {Path(__file__).name}"
    wrong = {other for other in own(imports(FILES[name])) - {PUBLIC} if LAYER.get(other, 99) >= LAYER[name]}
    assert not wrong, f"{name} (layer {LAYER[name]}) imports {wrong}"


def test_the_public_door_imports_nothing_by_itself():
    assert libraries(imports(FILES[PUBLIC])) <= {"importlib", "typing"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_reserved_libraries_stay_where_they_belong(name):
    for library in libraries(imports(FILES[name])) & set(RESERVED):
        assert name in RESERVED[library], f"{name} imports {library}"


@pytest.mark.parametrize("name", sorted(MATHEMATICS & set(FILES)))
def test_the_mathematics_knows_no_models_and_no_files(name):
    names = libraries(imports(FILES[name]))
    assert not names & {"transformers", "datasets", "pathlib", "os", "json", "safetensors", "filelock"}
    assert not own(imports(FILES[name])) - MATHEMATICS


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_help_and_composition_need_no_torch(name):
    assert not libraries(imports(FILES[name], top_level=True)) & {"torch", "transformers", "datasets", "numpy"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_longer_than_400_lines(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


def test_main_is_an_entry_and_no_more():
    assert len(FILES["main"].read_text(encoding="utf-8").splitlines()) <= 60


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils", "util", "common", "helpers", "misc"} & set(FILES)


def test_public_names_exist():
    import spikellm

    assert 6 <= len(spikellm.__all__) <= 8
    for name in spikellm.__all__:
        assert getattr(spikellm, name) is not None
    with pytest.raises(AttributeError):
        spikellm.nothing_of_this_name  # noqa: B018


def test_public_names_stay_what_they_are():
    """Importing a submodule binds it in the package, over whatever stood under its name."""
    import spikellm

    assert not set(spikellm.__all__) & set(FILES)
    before = {name: getattr(spikellm, name) for name in spikellm.__all__}
    for name in set(FILES) - {"main", PUBLIC}:
        import_module(f"spikellm.{name}")
    assert {name: getattr(spikellm, name) for name in spikellm.__all__} == before
    assert not any(isinstance(value, ModuleType) for value in before.values())
