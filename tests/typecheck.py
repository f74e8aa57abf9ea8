"""The type checker behind jaxtyping's import hook (conftest.py)."""

from typing import Self

from beartype import beartype


def check(function):
    """beartype, but for `Self`, which it refuses on a method of a class that it does not decorate as a whole."""
    hints = getattr(function, "__annotations__", {})
    return function if Self in hints.values() else beartype(function)
