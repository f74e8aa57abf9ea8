"""What stands above every table of the bench: the machine, the versions, and whether anybody else computes."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

LOUD = 0.1  # of all cores that other processes take, from which on ratios are not to be believed


def surroundings() -> str:
    """One line, and a second one where the machine is not quiet; takes two seconds."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "spikellm"))
    cores = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    found = f"{processor()}, {cores}; Python {platform.python_version()}, {versions}"
    others = psutil.cpu_percent(interval=2.0) / 100
    return found if others < LOUD else f"{found}\nNOT QUIET: other processes take {others:.0%} of the cores; ratios may be off"


def processor() -> str:
    """By its name, where the system tells it (Linux), and the widest registers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return f"{name} ({', '.join(each for each in ('avx2', 'avx512f', 'amx_int8') if each in flags) or 'no wide registers'})"
