"""What a machine can do: memory that is free, and the speed of products, passes over memory and the disk, measured in a few seconds."""

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SIDE = 1024  # of the square matrices that are multiplied
NUMBERS = 2**24  # that are copied: more than caches hold
DISK_BYTES = 2**27  # written and read again
SECONDS = 0.3  # a measurement goes on for so long, twice at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bytes and rates per second; of the device that computes where nothing else is said."""

    device: str
    threads: int  # of the CPU
    memory: int  # of the CPU, free [bytes]
    device_memory: int | None  # of the GPU, free [bytes]; None: the CPU computes
    disk: int  # free where results go [bytes]
    products: float  # float32 matrix products [FLOP/s]
    copying: float  # of tensors, read and written [bytes/s]
    writing: float  # to the disk [bytes/s]
    reading: float  # from it [bytes/s]
    normals: float  # random normal numbers, of which random models are made, on the CPU [1/s]


def measure(device: torch.device, folder: Path) -> Machine:
    """This machine as it is now, busy as it may be.

    Args:
        device: that computes.
        folder: where results go; made where it is not there.
    """
    matrix = torch.ones(SIDE, SIDE, device=device)
    row = torch.ones(NUMBERS, device=device)
    copy, draws = torch.empty_like(row), torch.empty(2**20)
    folder.mkdir(parents=True, exist_ok=True)
    writing, reading = _disk(folder)
    return Machine(
        device=device.type,
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().available,
        device_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        disk=shutil.disk_usage(folder).free,
        products=2 * SIDE**3 / seconds(lambda: matrix @ matrix, device),
        copying=2 * row.nbytes / seconds(lambda: copy.copy_(row), device),
        writing=writing,
        reading=reading,
        normals=draws.numel() / seconds(draws.normal_, torch.device("cpu")),
    )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes, the fastest of those in `SECONDS`; the first, which may have something to prepare, is left out."""
    call()
    least, end = float("inf"), time.perf_counter() + SECONDS
    for number in range(10_000):
        if number >= 2 and time.perf_counter() > end:
            break
        _finished(device)
        start = time.perf_counter()
        call()
        _finished(device)
        least = min(least, time.perf_counter() - start)
    return least


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second, written to the medium itself and read from there where the system lets the cache be dropped."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            sum(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE))
        read = time.perf_counter() - start
    return DISK_BYTES / written, DISK_BYTES / read
