"""Pages that are made while building: one a study, its README, and one a room, its docstrings. They join their section of the nav."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = "show_root_heading: false, show_root_toc_entry: false"  # the page's own heading stands there
# As README's reading order has them.
ROOMS = (
    "coding", "kernels", "model", "calibration", "search", "reconstruction", "execution", "spikes", "evaluation", "planning", "run",
    "report", "store", "config",
)  # fmt: skip


def studies() -> list[str]:
    """Names of the studies."""
    return sorted(path.parent.name for path in (ROOT / "experiments").glob("*/README.md"))


def room_page(room: str) -> str:
    """A room's page: what it is for, then its modules."""
    modules = [path.stem for path in sorted((ROOT / "spikellm" / room).glob("*.py")) if path.stem != "__init__"]
    door = f"# spikellm.{room}\n\n::: spikellm.{room}\n    options: {{members: false, {HIDDEN}}}\n"
    return "\n".join([door, *(f"::: spikellm.{room}.{name}\n    options: {{heading_level: 2}}\n" for name in modules)])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give every made page its place.

    Raises:
        ValueError: a room of the package has no place in ROOMS.
    """
    rooms = sorted(path.parent.name for path in (ROOT / "spikellm").glob("*/__init__.py"))
    if rooms != sorted(ROOMS):
        raise ValueError(f"docs/hooks/pages.py: ROOMS has {sorted(ROOMS)}, spikellm/ has {rooms}")
    assert config.nav is not None
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    sections["Studies"] += [{name: f"studies/{name}/README.md"} for name in studies()]
    sections["The code"] += [{room: f"rooms/{room}.md"} for room in ROOMS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages. Studies keep their folders, so that what they link to, each other and pictures, is where they say."""
    for room in ROOMS:
        files.append(File.generated(config, f"rooms/{room}.md", content=room_page(room)))
    for name in studies():
        folder = ROOT / "experiments" / name
        for path in (folder / "README.md", *sorted(folder.glob("*.png"))):
            files.append(File.generated(config, f"studies/{name}/{path.name}", abs_src_path=str(path)))
    return files
