"""Keyed folders of stage results: load what is intact or compute, whatever happens in between.

`root/<stage>/<key>/` holds the result of a stage, `key` a hash of exactly what the result depends on. A folder is written
beside its place, synced and renamed, so that it is whole or absent, also after kill -9 or a power cut; a lock makes several
processes (or machines on one shared file system) that want the same folder compute it once.

Beside the result lie inputs.json (what the key is made of), versions.json (of the libraries that computed it) and checksums.json
(sha256 of every other file). They are compared when a result is handed out; one that is damaged, incomplete or that of other inputs
is named in the log, taken away and computed again.

The lock is the system's (flock), which goes with its process: a killed job or a machine that died leaves none behind (NFS
frees it when the client's lease ends, a minute or two). Its file goes when the result is there: whoever still waits for it, or makes
a new one, finds the result. Where people delete a lock's file, or a file system does not carry locks from machine to machine, the
worst is that two compute the same: temporary names differ and the first result to be whole stands.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from filelock import FileLock, Timeout

from spikellm.store.provenance import versions

if TYPE_CHECKING:  # report.py imports this module before torch is wanted
    from torch import Tensor

log = logging.getLogger(__name__)

INPUTS, VERSIONS, CHECKSUMS = "inputs.json", "versions.json", "checksums.json"
STALE_SECONDS = 24 * 3600  # another machine's temporary folder of this age belongs to nobody
# No fault of a file: too many open ones, no memory, a server that has just come back.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
LARGE_BYTES = 1 << 24  # files from here on are hashed once: 16 MiB take 10 ms
SETTLED_NS = 2 * 10**9  # a file changed less than this ago may change again within the same tick of the file system's clock


def artifact_key(inputs: Mapping[str, object]) -> str:
    """16 hex digits that change whenever a value in `inputs` (JSON types) does."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Artefact(NamedTuple):
    """The result of a stage on disk."""

    folder: Path
    cached: bool  # it was there already


class ArtifactStore:
    """Results below `root`, one folder per stage and key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests = Digests(root / "digests.json")
        self._verified: dict[Path, list[list[int]]] = {}

    def folder(self, stage: str, inputs: Mapping[str, object]) -> Path:
        """Where the result for `inputs` lies or will lie."""
        return self.root / stage / artifact_key(inputs)

    def holds(self, stage: str, inputs: Mapping[str, object]) -> bool:
        """Whether the result for `inputs` is there, and intact."""
        return self._fault(self.folder(stage, inputs)) is None

    def load_or_compute(self, stage: str, inputs: Mapping[str, object], compute: Callable[[Path], None]) -> Artefact:
        """The result of `stage`, every file of it as it was written.

        Args:
            inputs: everything that the result depends on, in JSON types; kept beside it as inputs.json.
            compute: writes the result into the empty folder it is given.

        Raises:
            OSError: the store cannot be written.
        """
        target = self.folder(stage, inputs)
        with self._making(target, inputs) as folder:
            if folder is not None:
                compute(folder)
        return Artefact(target, folder is None)

    def load_or_compute_together(
        self, stage: str, every: Sequence[Mapping[str, object]], compute: Callable[[dict[int, Path]], Iterator[int]]
    ) -> list[Artefact]:
        """Several results of a stage; those that are missing are computed side by side.

        Args:
            every: the inputs of each.
            compute: given the empty folders of missing results by their number in `every`, yields a number when its folder is filled:
                that result is kept, whatever becomes of the others. It is not called where nothing is missing.

        Raises:
            OSError: the store cannot be written.
        """
        targets = [self.folder(stage, inputs) for inputs in every]
        missing: dict[int, Path] = {}
        with ExitStack() as stack:
            opened = {}
            for number in sorted(range(len(every)), key=lambda number: targets[number]):  # one order: nobody waits for a lock in a circle
                opened[number] = stack.enter_context(ExitStack())
                folder = opened[number].enter_context(self._making(targets[number], every[number]))
                if folder is not None:
                    missing[number] = folder
            for number in compute(missing) if missing else ():
                opened[number].close()
        return [Artefact(target, number not in missing) for number, target in enumerate(targets)]

    @contextmanager
    def _making(self, target: Path, inputs: Mapping[str, object]) -> Iterator[Path | None]:
        """Within: nobody else computes `target`. An empty folder to fill, which is put in place afterwards; None: it is there."""
        if self._fault(target) is None:
            yield None
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if (fault := self._fault(target)) is None:
                yield None
                return
            _clear_abandoned(target.parent)
            temporary = _beside(target)
            if os.path.lexists(target):
                log.warning("%s: %s; it is taken away and computed again", target, fault)
                target.rename(temporary)
                _remove(temporary)
            temporary = _beside(target)
            temporary.mkdir()
            try:
                yield temporary
                write_json(temporary / INPUTS, inputs)
                write_json(temporary / VERSIONS, versions())
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                write_json(temporary / CHECKSUMS, {path.relative_to(temporary).as_posix(): file_digest(path) for path in files})
                _sync(temporary)
                try:
                    temporary.rename(target)
                except OSError:  # there already: made meanwhile by somebody who does not see our lock
                    if not target.is_dir():
                        raise
                    _remove(temporary)
                _sync_folder(target.parent)
            except BaseException:
                _remove(temporary)
                raise

    def remove(self, artefact: Artefact) -> None:
        """Take a result away, if it is still there."""
        temporary = _beside(artefact.folder)
        with suppress(FileNotFoundError):
            artefact.folder.rename(temporary)  # whole or absent, for whoever looks meanwhile
            _remove(temporary)

    def _fault(self, target: Path) -> str | None:
        """What is wrong with an artefact; None where it is whole. Its files are read once, and again when one has changed."""
        try:
            checksums = {name: str(digest) for name, digest in read_json(target / CHECKSUMS).items()}
            state = [file_state(target / name) for name in sorted(checksums)]
            if self._verified.get(target) == state:
                return None
            for name, digest in checksums.items():
                if self.digests.of(target / name) != digest:
                    return f"{name} is not as it was written"
            if artifact_key(read_json(target / INPUTS)) != target.name or INPUTS not in checksums:
                return f"{INPUTS} belongs to another result"
        except OSError as error:
            if error.errno in PASSING:
                raise
            return f"{Path(error.filename or target).name} cannot be read ({error.strerror})"
        except (ValueError, AttributeError) as error:  # no JSON, or none of ours
            return f"{CHECKSUMS} is damaged ({error})"
        self._verified[target] = state
        return None


def computed_by(artefacts: Iterable[Artefact]) -> dict[str, str]:
    """The versions that computed `artefacts`, by library; several where they differ."""
    found: dict[str, set[str]] = {}
    for artefact in artefacts:
        for name, version in read_json(artefact.folder / VERSIONS).items():
            found.setdefault(name, set()).add(str(version))
    return {name: ", ".join(sorted(each)) for name, each in found.items()}


class Digests:
    """sha256 of files by their content. Those of large files are remembered in `memory`, so that 16 GB are not read at every run.

    A file is known again by its path, size, inode and times of its last modification and change (which no `touch` sets back).
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self._seen: dict[str, list[object]] = {}  # by this process, also where it cannot write

    def of(self, path: Path) -> str:
        """The sha256 of a file.

        Raises:
            OSError: it is no regular file, or cannot be read.
        """
        if not path.is_file():  # a pipe or a device would be read for ever
            raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
        state = file_state(path)
        if state[0] < LARGE_BYTES:
            return file_digest(path)
        name = str(path.resolve())
        match self._seen.get(name) or self._remembered().get(name):
            case [*known, str(digest)] if known == state:
                return digest
        digest = file_digest(path)
        self._seen[name] = [*state, digest]
        if time.time_ns() - max(state[1:3]) > SETTLED_NS and file_state(path) == state:
            kept = {other: entry for other, entry in self._remembered().items() if Path(other).is_file()}
            with suppress(OSError):  # a store that can only be read serves as well
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.memory, kept | {name: self._seen[name]})
        return digest

    def _remembered(self) -> dict[str, object]:
        return intact_json(self.memory) or {}


def file_digest(path: Path) -> str:
    """The sha256 of a file, read now.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> list[int]:
    """What changes when a file does: size [bytes], times of modification and change [ns], inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Within: no other process computes `target`."""
    lock = FileLock(target.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is computing %s, waiting for it", target.parent.name, target.name)
        lock.acquire()
    try:
        yield
        Path(lock.lock_file).unlink(missing_ok=True)  # not after a failure: those who wait for it would compute side by side
    finally:
        lock.release()


def _beside(target: Path) -> Path:
    """A name for a folder that nobody else uses, and that tells whose it is."""
    return target.parent / f"{target.name}.tmp-{platform.node()}-{os.getpid()}-{uuid4().hex[:8]}"


def _clear_abandoned(folder: Path) -> None:
    """Remove what killed runs have left: on this machine where the process is gone, of others when it is old; old locks, not held."""
    for path in folder.glob("*.tmp-*"):
        node, _, process = path.name.partition(".tmp-")[2].rpartition("-")[0].rpartition("-")
        with suppress(OSError):
            if not _alive(process) if node == platform.node() else time.time() - path.stat().st_mtime > STALE_SECONDS:
                _remove(path)
    for path in folder.glob("*.lock"):
        with suppress(OSError, Timeout):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                with FileLock(path, timeout=0):
                    path.unlink()


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Bring a folder and all below it to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system syncs folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")  # process numbers may meet on two machines
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_tensors(path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file from the tensors' own memory, without a copy.

    Raises:
        OSError: the disk is full or cannot be written; safetensors' own error names the number of the system's alone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def intact_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file is missing, cannot be read, is damaged or holds something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
