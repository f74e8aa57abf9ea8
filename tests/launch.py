"""`python main.py ...` in a process of its own, without paying the imports of torch and transformers each time.

A server process imports them once and forks for every launch (multiprocessing's forkserver), so that a launch is a real
process: own command line, output, exit code, and can be killed. `plain` starts an interpreter afresh.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.places import MAIN

SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Finished:
    code: int | None  # negative: the signal that killed it
    out: str
    err: str


def launch(*arguments: str, before: Callable[..., None] | None = None, values: tuple = (), timeout: float = 120) -> Finished:
    """Run main.py; `before(*values)`, a module-level function, is called in the new process first."""
    SERVER.set_forkserver_preload(
        [
            "spikellm.run.stages",
            "spikellm.model.checkpoint",
            "transformers.models.llama.modeling_llama",
            "transformers.masking_utils",
            "spikellm.report.html",
            "matplotlib.backends.backend_svg",
            "hydra._internal.hydra",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = SERVER.Process(target=_main, args=(arguments, str(out), str(err), before, values))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        return Finished(process.exitcode, out.read_text(), err.read_text())


def plain(*arguments: str, timeout: float = 300) -> Finished:
    """Run main.py in a fresh interpreter, from a folder that is not the repository's."""
    done = subprocess.run([sys.executable, MAIN, *arguments], cwd="/", capture_output=True, text=True, timeout=timeout, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def one_line(done: Finished) -> str:
    """The message of a refused command line."""
    assert done.code == 2, done.err
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error:"), done.err
    assert "Traceback" not in done.err + done.out
    return lines[0]


def die_inside(stage: str, number: int = signal.SIGKILL, time: int = 1) -> None:
    """Signal this process when `stage` has written its files for the `time`-th time and before they are put in place: the worst moment."""
    from spikellm.store.artifacts import ArtifactStore

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background is started with SIGINT ignored
    whole, count = ArtifactStore._making, 0

    @contextmanager
    def making(self, target, inputs):
        nonlocal count
        with whole(self, target, inputs) as folder:
            yield folder
            if folder is not None and target.parent.name == stage:
                count += 1
                if count == time:
                    os.kill(os.getpid(), number)

    ArtifactStore._making = making


def _main(arguments: tuple[str, ...], out: str, err: str, before: Callable[..., None] | None, values: tuple) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir("/")
    gc.freeze()  # what the server has imported
    if before is not None:
        before(*values)
    sys.argv = [str(MAIN), *arguments]
    runpy.run_path(str(MAIN), run_name="__main__")
