"""Kernels compiled into one pass over memory, or as they are where there is no compiler."""

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.fx.experimental import _config

from spikellm.kernels import bindings, native
from spikellm.kernels.switch import is_fusing

log = logging.getLogger(__name__)


def chosen(function: Callable, like: Tensor, *, compiled: bool) -> Callable:
    """`function` fused for the device of `like`, or as it is."""
    return fused(function, like.device.type) if compiled and is_fusing() else function


@cache
def fused(function: Callable, device_type: str) -> Callable:
    """`function` compiled into one kernel for any shape; `function` itself, with a warning, where there is no compiler.

    On a CPU by hand, where `native` has it, on a GPU where `gpu` has it; else by Inductor.
    """
    if device_type == "cpu" and bindings.loaded() is None:
        return function
    if device_type == "cpu" and function in native.KERNELS:
        return native.KERNELS[function]
    if device_type == "cuda":
        if find_spec("triton") is None:
            log.warning("no Triton found: neurons run unfused, several times slower; pip install triton cures it")
            return function
        from spikellm.kernels import gpu

        if function in gpu.KERNELS:
            return gpu.KERNELS[function]
    # a process that sweeps over T compiles once per T and kind of shape; dynamo's default of 8 would end it
    kernel = torch.compile(function, dynamic=True, fullgraph=True, recompile_limit=128)  # type: ignore[call-overload]

    @wraps(function)
    def run(*arguments: object) -> object:
        # sizes that happen to be equal need not be so in the next call; by hand: `_config.patch` makes a class at every one
        before, _config.use_duck_shape = _config.use_duck_shape, False
        try:
            return kernel(*arguments)
        finally:
            _config.use_duck_shape = before

    return run
