"""The fields of a dataclass as text, for `--help`: name, type, default, and the docstring that stands under each in its source.

The docstring is the documentation's only home; a field without one is found by `tests/test_docs.py`.
"""

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

WIDTH, COLUMN = 140, 34  # of the text, of the meaning's column [characters]


@cache
def field_docs(owner: type) -> dict[str, str]:
    """Field or member name -> the docstring under its definition, for a dataclass or an Enum."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in pairwise(definition.body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = inspect.cleandoc(text)
    return found


def describe(owner: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every field of a dataclass, nested dataclasses in their place."""
    hints = get_type_hints(owner)
    rows = []
    for each in fields(owner):
        hint, name = hints[each.name], prefix + each.name
        if is_dataclass(hint):
            assert isinstance(hint, type)
            rows += describe(hint, f"{name}.")
        else:
            rows.append((name, _type(hint), _default(each), field_docs(owner).get(each.name, "")))
    return rows


def field_help(owner: type) -> str:
    """Every field of a dataclass with its default, meaning and choices, one paragraph a field."""
    blocks = []
    for name, kind, default, meaning in describe(owner):
        head = f"{name}={default}" if default else name
        text = f"{meaning} ({kind})" if meaning else f"({kind})"
        lines = textwrap.wrap(text, WIDTH - COLUMN)
        if len(head) < COLUMN - 1:
            lines[0] = head.ljust(COLUMN) + lines[0]
        else:
            lines.insert(0, head)
        blocks.append("\n".join([lines[0], *(" " * COLUMN + line for line in lines[1:])]))
    return "\n".join(blocks)


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _type(part) for part in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        notes = field_docs(hint)
        return "; ".join(f"{member.name}: {notes[member.name]}" if member.name in notes else member.name for member in hint)
    if get_origin(hint) is not None:
        return f"{get_origin(hint).__name__} of {', '.join(_type(part) for part in get_args(hint))}"
    return "any" if hint is Any else hint.__name__


def _default(each: "Field[Any]") -> str:
    """As it would be written on the command line; nothing where a group or the user gives the value."""
    value = each.default_factory() if each.default_factory is not MISSING else each.default
    if value is MISSING or value == "???":
        return ""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
