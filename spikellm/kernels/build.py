"""Compiles the C++ of `cpp/` on this machine when it is first wanted, and keeps the library for the processes after it."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock, Thread

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
# From what is fastest to what any compiler can do; x86-64-v2: gcc 12 breaks down over vectors without SSE 4.1.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-march=x86-64-v2", "-fopenmp"), ("-fopenmp",), ())
ALWAYS = ("-std=c++17", "-O3", "-fPIC", "-w")
_building = Lock()


def compiler() -> str | None:
    """The C++ compiler; None: there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)


def begin() -> None:
    """Compile in a thread of its own, where that has not been done: who then imports and reads a model waits for what is left of it."""
    Thread(target=built, name="compile kernels").start()


@cache
def built() -> Path | None:
    """The shared library of the kernels; None, with a warning, where there can be none."""
    found = compiler()
    if found is None:
        log.warning("no C++ compiler found: neurons run unfused, about 20 times slower; install g++ to cure it")
        return None
    try:
        with _building:  # who comes second finds the library of the first
            return _built(found)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("%s could not compile the kernels, neurons run unfused, about 20 times slower: %s", found, reason.strip()[-300:])
        return None


def _built(compiler: str) -> Path:
    """The shared library for this compiler and processor, from an earlier process or made now."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(SOURCES.iterdir())
    inputs = [version, _processor(), *ALWAYS, *(flag for flags in FLAGS for flag in flags), *(source.read_text() for source in sources)]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    library = _folder() / f"{key}.so"
    if library.is_file():
        return library
    log.info("compiling the neurons' kernels, once on this machine, some seconds")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        failures = []
        for flags in FLAGS:
            try:
                whole = _compiled(compiler, [source for source in sources if source.suffix == ".cpp"], flags, Path(work))
            except subprocess.CalledProcessError as failure:
                if failure.returncode < 0:
                    raise  # by a signal: somebody stops this run
                failures.append(failure)
                continue
            os.replace(whole, library)  # whoever looks finds nothing or all of it
            return library
    raise failures[0]  # of what was to be best: with fewer options a compiler may fail for other reasons


def _compiled(compiler: str, sources: list[Path], flags: tuple[str, ...], folder: Path) -> Path:
    """The library of sources that are compiled side by side."""

    def run(*arguments: str) -> None:
        subprocess.run([compiler, *ALWAYS, *flags, *arguments], capture_output=True, text=True, check=True)

    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source, to: run("-c", str(source), "-o", str(to)), sources, objects))
    run("-shared", *map(str, objects), "-o", str(folder / "kernels.so"))
    return folder / "kernels.so"


def _processor() -> str:
    """What this processor can do: a home folder may be that of many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/spikellm, or ~/.cache/spikellm, or a temporary folder."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "spikellm"  # ~ stays where nobody has a home
    own = Path(tempfile.gettempdir()) / f"spikellm-{os.getuid() if hasattr(os, 'getuid') else 0}"
    for folder in (kept, own) if kept.is_absolute() else (own,):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError(f"no folder to keep compiled kernels in: {kept} cannot be written to")
