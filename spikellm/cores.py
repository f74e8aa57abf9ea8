"""Cores that other processes use too: how threads wait for each other, and how many there are.

Threads of an OpenMP runtime spin when they wait, for milliseconds. On a core that another process wants they spin while the thread that
they wait for does not run, and a job takes many times as long. Asleep they cost a wake-up, microseconds. The runtime reads the environment
once, when torch loads it, so `import spikellm` comes first or does nothing.

Which runtime: PyTorch's Linux wheels bring GNU's libgomp, which spins 300,000 rounds unless OMP_WAIT_POLICY is PASSIVE, then none
(GOMP_SPINCOUNT in its manual). conda, macOS and Windows have LLVM's or Intel's, which waits KMP_BLOCKTIME, 200 ms, whatever the policy.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
# Whoever has set one of these has decided how threads wait.
DECIDED = {*ASLEEP, "GOMP_SPINCOUNT", "KMP_LIBRARY"}
Found = TypeVar("Found")
CGROUP, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def sleep_while_waiting() -> None:
    """Let threads of torch and of child processes sleep while they wait for each other, unless the user has decided or torch is there."""
    if DECIDED & os.environ.keys():
        return
    if "torch" in sys.modules:
        log.debug("torch was imported before spikellm: its threads wait as they did")
        return
    os.environ.update(ASLEEP)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within: torch computes with `count` CPU threads.

    None: with as many as it has chosen or OMP_NUM_THREADS says. Its choice is the cores that the process may run on, and knows nothing
    of a container's share of them, which then is the most.
    """
    import torch  # not before it is wanted: `--help` has no seconds for it

    before = torch.get_num_threads()
    if count is None:
        count = before if "OMP_NUM_THREADS" in os.environ else min(before, share() or before)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[..., Found], jobs: Iterable[tuple], *, threads: int | None = None) -> list[Found]:
    """What `function` makes of the arguments of every job, in order, each on a thread of its own, where torch computes with one.

    Args:
        threads: at a time; None: as many as torch computes with.
    """
    import torch

    before = torch.get_num_threads()
    if (threads or before) == 1:
        return [function(*job) for job in jobs]
    # of torch's numbers of threads one is of the thread that sets it, one of threads that come later
    with ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return [each.result() for each in [pool.submit(copy_context().run, function, *job) for job in jobs]]
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def share(cgroup: Path = CGROUP, mounted: Path = MOUNTED) -> int | None:
    """Cores' worth of time that the control groups of this process allow, rounded up; None: no limit, or none that can be read.

    Args:
        cgroup: which groups they are: lines of number:controllers:path (cgroups(7)).
        mounted: where the groups are folders; in a container often under other paths, with its own group at the top.
    """
    limits = []
    try:
        for line in cgroup.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = mounted / "cpu" if controllers else mounted  # version 1, version 2
            own = top / path.strip("/")
            limits += [limit for folder in (own, *own.parents) if folder.is_relative_to(top) and (limit := _limit(folder))]
    except (OSError, ValueError):
        return None
    return math.ceil(min(limits)) if limits else None


def _limit(folder: Path) -> float | None:
    """Cores' worth of time that one group may take; None: as much as it likes."""
    if (file := folder / "cpu.max").is_file():  # version 2: both in one line, "max" for none
        quota, period = file.read_text().split()
    elif (file := folder / "cpu.cfs_quota_us").is_file():  # version 1: -1 for none
        quota, period = file.read_text(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return None
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
