"""The most memory that this process, and its part of a GPU, held during a piece of work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs: the high-water mark falls to what is resident now (proc_pid_clear_refs(5))


@dataclass(slots=True)
class Peak:
    """Largest memory held [bytes]; what lies in files that are mapped counts while its pages are in memory."""

    resident: int | None = None  # None: this system does not tell
    device: int | None = None  # allocated tensors; None: no GPU


@contextmanager
def watched() -> Iterator[Peak]:
    """Within: memory is watched; the peak is there afterwards."""
    peak, told = Peak(), _forget_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        peak.resident = _peak(told)
        if torch.cuda.is_available():
            peak.device = torch.cuda.max_memory_allocated()


def resident() -> int:
    """Memory that this process holds now [bytes]."""
    return psutil.Process().memory_info().rss


def _forget_peak() -> bool:
    with suppress(OSError):
        CLEAR.write_text(RESET_PEAK)
        return True
    return False


def _peak(told: bool) -> int | None:
    """Since it was forgotten; where that cannot be told, None rather than the peak of everything before."""
    if not told or sys.platform != "linux":
        return None
    with suppress(OSError):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return None


def in_gib(size: int | None) -> float | None:
    """Bytes in GiB, as results have them."""
    return None if size is None else round(size / 2**30, 3)
