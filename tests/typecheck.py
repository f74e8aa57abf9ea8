"""The type checker behind jaxtyping's import hook (conftest.py)."""

from typing import Self, get_origin

from beartype import beartype


def check(function):
    """beartype, but for `Self`, which it refuses on a method of a class that it does not decorate as a whole, and for lists.

    Of a list it looks at a random item, and no compiler traces the choice.
    """
    hints = getattr(function, "__annotations__", {})
    skipped = Self in hints.values() or get_origin(hints.get("return")) is list
    return function if skipped else beartype(function)
