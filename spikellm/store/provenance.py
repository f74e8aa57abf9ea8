"""What a result was computed by: versions of the libraries, and a fingerprint of the code itself.

A stage's key holds the fingerprint of the modules that compute it and of all that these import inside the package: an edit of a
formula or a constant is another key, so that an older result is not taken for a new one. The fingerprint is of the syntax trees
without docstrings: comments, layout and documentation do not count. Left out is what computes no figure: the schema (its values
are in the keys one by one) and the store.
"""

import ast
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# No figure depends on them beyond the values that the keys hold.
LEFT_OUT = ("config", "store")
# Folders of what a module computes by that is no Python.
BESIDE = {"kernels.build": "cpp"}
JOB = ("run.stages",)  # all that a job computes by; looked up without importing it, which would cost torch


@dataclass(frozen=True, slots=True)
class Code:
    """The code that computes a result, declared beside it."""

    version: int  # raised by hand where the code that declares it (run/, evaluation/measured.py) changes what it writes
    modules: tuple[str, ...]  # that compute, room.file

    def key(self) -> dict[str, object]:
        """What the key of a result holds of the code."""
        return {"version": self.version, "sha256": code_fingerprint(self.modules, PACKAGE)}


def job_code() -> str:
    """A fingerprint of everything that computes in a job, stages included."""
    return code_fingerprint(JOB, PACKAGE)


def versions() -> dict[str, str | None]:
    """Versions that a result depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("torch", "transformers", "spikellm")}


@cache
def code_fingerprint(modules: tuple[str, ...], package: Path) -> str:
    """64 hex digits that change with the code of `modules` or of what they import inside the package."""
    whole = hashlib.sha256()
    for name in sorted(closure(modules, package)):
        whole.update(f"{name} {_module(package, name)[0]}\n".encode())
    return whole.hexdigest()


def closure(modules: Iterable[str], package: Path) -> set[str]:
    """`modules` and all that they import inside the package, at the top or in a function, but for the rooms of LEFT_OUT."""
    found: set[str] = set()
    ahead = list(modules)
    while ahead:
        name = ahead.pop()
        if name not in found and name.partition(".")[0] not in LEFT_OUT:
            found.add(name)
            ahead += _module(package, name)[1]
    return found


@cache
def _module(package: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """The sha256 of a module's code, and the modules of the package that it imports; names are relative to the package."""
    tree = ast.parse(_file(package, name).read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    other = (
        "".join(each.read_text(encoding="utf-8") for each in sorted((_file(package, name).parent / BESIDE[name]).iterdir()))
        if name in BESIDE
        else ""
    )
    inside = {each.removeprefix(f"{package.name}.") for each in imported if each.startswith(f"{package.name}.")}
    modules = tuple(sorted(each for each in inside if _file(package, each).is_file()))
    return hashlib.sha256((ast.dump(tree) + other).encode()).hexdigest(), modules


def _file(package: Path, name: str) -> Path:
    path = package.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None
