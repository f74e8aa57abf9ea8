"""Whether kernels stand in for the plain forms: they do, unless somebody switches them off for the work inside a `with`.

Numbers are the same within rounding: off is for whoever doubts it, or looks for a fault.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_fused = ContextVar("fused", default=True)


def is_fusing() -> bool:
    """Whether kernels are used where there are any."""
    return _fused.get()


@contextmanager
def fusing(on: bool) -> Iterator[None]:
    """Within: kernels are used, or every plain form computes itself."""
    token = _fused.set(on)
    try:
        yield
    finally:
        _fused.reset(token)
