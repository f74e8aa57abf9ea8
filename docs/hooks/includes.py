"""What has its home elsewhere and is put into a page while building, where a line asks for it.

<!-- README: TITLE -->      a section of README.md, without its heading
<!-- table: fields -->      every field of the configuration, a table a node
<!-- table: groups -->      every option of the groups in conf/
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import yaml

from spikellm.config.help import describe
from spikellm.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^<!-- (README|table): (.+?) -->$", re.MULTILINE)
TOP = "The run as a whole"


def section(title: str) -> str:
    """What README.md says below a heading of the second level.

    Raises:
        ValueError: no such heading.
    """
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")
    if not found:
        raise ValueError(f"README.md has no section {title!r}, which a page includes")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def cell(text: str) -> str:
    """Text as it stands in a cell of a table: nothing in it is markup but what stands between backticks."""
    parts = " ".join(text.split()).split("`")
    plain = [re.sub(r"([\\|*_<\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(part for pair in zip_longest(plain, map(code, parts[1::2]), fillvalue="") for part in pair)


def code(text: str) -> str:
    """The same in the typeface of code."""
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def fields() -> str:
    """The text of `--help`, a table for each node; the headings are the nodes' names."""
    parts = []
    described = sorted(describe(Config), key=lambda row: ("." in row[0], row[0].rpartition(".")[0]))
    for node, rows in groupby(described, key=lambda row: row[0].rpartition(".")[0]):
        cells = [(code(name), code(default), cell(meaning), cell(kind)) for name, kind, default, meaning in rows]
        parts.append(f"### {code(node) or TOP}\n\n{table(('field', 'default', 'meaning', 'type or choices'), cells)}")
    return "\n\n".join(parts)


def leaves(tree: Any, key: str = "") -> list[str]:
    """`key=value` of every value below a node of YAML."""
    if not isinstance(tree, dict):
        return [f"{key}={tree}"]
    return [leaf for name, part in tree.items() if name != "defaults" for leaf in leaves(part, f"{key}.{name}" if key else str(name))]


def groups() -> str:
    """Every option of a group: its name, what it sets, and the comment at its head."""
    parts = []
    for folder in sorted({path.parent for path in (ROOT / "conf").rglob("*.yaml")} - {ROOT / "conf"}):
        rows = []
        for path in sorted(folder.glob("*.yaml"), key=lambda path: (len(path.stem) if path.stem.isdigit() else 0, path.stem)):
            text = path.read_text(encoding="utf-8")
            notes = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and not line.startswith("# @package")]
            tree = yaml.safe_load(text) or {}
            more = [f"{key}: {value}" for part in tree.get("defaults", []) if isinstance(part, dict) for key, value in part.items()]
            rows.append((code(path.stem), "<br>".join(map(code, [*more, *leaves(tree)])), cell(" ".join(notes))))
        parts.append(f"### {code(folder.relative_to(ROOT / 'conf').as_posix() + '=')}\n\n{table(('option', 'sets', 'note'), rows)}")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {"fields": fields, "groups": groups}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what a line asks for in its place."""
    return LINE.sub(lambda found: section(found[2]) if found[1] == "README" else TABLES[found[2]](), markdown)
