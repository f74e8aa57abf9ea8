"""What jaxtyping's import hook (conftest.py) makes of the package's functions: each checks its annotations at every call.

Shapes want a scope for their letters, which costs a call ten times what beartype does. Most functions that are called most often,
the neuron's steps, have no shapes: they are left to beartype alone.
"""

from inspect import isclass
from typing import Self, get_args, get_origin

import jaxtyping
from beartype import beartype

WITH_SHAPES = jaxtyping.jaxtyped


def check(function):
    """beartype, but for `Self`, which it refuses on a method of a class that it does not decorate as a whole, and for lists.

    Of a list it looks at a random item, and no compiler traces the choice.
    """
    hints = getattr(function, "__annotations__", {})
    skipped = Self in hints.values() or get_origin(hints.get("return")) is list
    return function if skipped else beartype(function)


def jaxtyped(*, typechecker):
    """In place of jaxtyping's own: the same where an annotation has shapes, or may have, else the type checker alone."""

    def decorate(it):
        if ".triton_" in it.__module__:  # is compiled from its source, and its annotations are the compiler's
            return it
        if isclass(it) or any(map(_has_shapes, it.__annotations__.values())):
            return WITH_SHAPES(it, typechecker=typechecker)
        return typechecker(it)

    return decorate


def _has_shapes(hint) -> bool:
    if isinstance(hint, str):
        return True
    return (isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_has_shapes, get_args(hint)))
