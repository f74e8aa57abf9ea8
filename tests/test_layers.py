"""The architecture: which file may import which, how long a file may be, who may know Hydra."""

import ast
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.places import ROOT

# A room imports only from rooms of layers before its own, and a file from others of its room without a circle. Three files stand alone.
LAYERS = (
    {"config", "cores", "kernels", "registration"},
    {"store", "coding"},
    {"model"},
    {"calibration", "execution"},
    {"search", "spikes"},
    {"reconstruction"},
    {"evaluation", "report"},
    {"pipeline", "planning"},
    {"run"},
    {"main", "__main__"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# room -> all that it may import of ours, where that is less than its layer allows
COMPILES = "kernels.build"  # the one of its room that has to do with files: it makes and keeps the library of the C++
NARROW = {"kernels": set(), "coding": {"kernels"}, "report": {"config", "store"}, "config": set(), "cores": set(), "registration": set()}
# library -> the only files that may import it
RESERVED = {
    "hydra": {"config.schema", "run.cli", "run.command", "run.saved", "run.sweep", "run.job"},
    "omegaconf": {
        "config.schema",
        "config.model",
        "config.snn",
        "config.dataset",
        "config.measures",
        "run.cli",
        "run.command",
        "run.sweep",
        "run.job",
    },
    "matplotlib": {"report.plots", "report.spike_plots", "evaluation.density_plots"},
    "jinja2": {"report.html"},
    "wandb": {"run.tracking"},
    "lm_eval": {"evaluation.zero_shot"},
}
# Rooms and files that Hydra imports before every run and for --help.
NO_TORCH = (
    "cores",
    "registration",
    "config",
    "store",
    "report.results",
    "report.console",
    "report.card",
    "run.command",
    "run.saved",
    "run.sweep",
    "run.job",
)
PUBLIC = "__init__"


def dotted(path: Path) -> str:
    """A file's name below the package: room.file; a room's door is the room."""
    return ".".join(path.relative_to(ROOT / "spikellm").with_suffix("").parts).removesuffix(f".{PUBLIC}")


FILES = {"main": ROOT / "main.py"} | {dotted(path): path for path in sorted((ROOT / "spikellm").rglob("*.py"))}
ROOMS = sorted(path.parent.name for path in (ROOT / "spikellm").glob(f"*/{PUBLIC}.py"))


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
    return {name.removeprefix("spikellm.") for name in names if name.startswith("spikellm.")} & set(FILES)


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", sorted(set(FILES) - {PUBLIC}))
def test_a_file_imports_only_from_rooms_below_and_from_its_own(name):
    room = room_of(name)
    assert room in LAYER, f"{room}/ has no layer: give it one in {Path(__file__).name}"
    others = {other for other in own(imports(FILES[name])) if room_of(other) != room and other != PUBLIC}
    wrong = {other for other in others if LAYER[room_of(other)] >= LAYER[room] or room_of(other) not in NARROW.get(room, set(LAYER))}
    assert not wrong, f"{name} (layer {LAYER[room]}) imports {wrong}"


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_import_each_other_without_circles(room):
    arrows = {
        name: {other for other in own(imports(path)) if room_of(other) == room} for name, path in FILES.items() if room_of(name) == room
    }
    while free := [name for name, others in arrows.items() if not others & set(arrows)]:
        for name in free:
            del arrows[name]
    assert not arrows


def test_the_search_knows_places_and_no_models():
    found = set().union(*(own(imports(path)) for name, path in FILES.items() if room_of(name) == "search"))
    assert {name for name in found if room_of(name) == "model"} <= {"model.sites"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_door_says_what_it_is_for_and_imports_nothing(room):
    tree = ast.parse(FILES[room].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_the_public_door_imports_nothing_by_itself():
    assert libraries(imports(FILES[PUBLIC])) <= {"importlib", "typing", "spikellm"}
    assert own(imports(FILES[PUBLIC])) == {"cores", "registration"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_reserved_libraries_stay_where_they_belong(name):
    for library in libraries(imports(FILES[name])) & set(RESERVED):
        assert name in RESERVED[library], f"{name} imports {library}"


@pytest.mark.parametrize("name", sorted(name for name in FILES if room_of(name) in ("kernels", "coding") and name != COMPILES))
def test_the_mathematics_knows_no_models_and_no_files(name):
    names = libraries(imports(FILES[name]))
    assert not names & {"transformers", "datasets", "pathlib", "os", "json", "safetensors", "filelock", "hydra", "omegaconf"}


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith(NO_TORCH)))
def test_help_and_composition_need_no_torch(name):
    assert not libraries(imports(FILES[name], top_level=True)) & {"torch", "transformers", "datasets", "numpy"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_longer_than_400_lines(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", ["main", "__main__"])
def test_an_entry_is_no_more(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 6
    assert own(imports(FILES[name])) == {"run.cli"}


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils", "util", "common", "helpers", "misc"} & {part for name in FILES for part in name.split(".")}


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
    assert spikellm.__all__ == ["PhaseNeuron", "PhaseTable", "convert", "count_spikes", "load", "perplexity", "stepped"]
    before = {name: getattr(spikellm, name) for name in spikellm.__all__}
    for name in set(FILES) - {"main", PUBLIC}:
        import_module(f"spikellm.{name}")
    assert {name: getattr(spikellm, name) for name in spikellm.__all__} == before
    assert not any(isinstance(value, ModuleType) for value in before.values())
