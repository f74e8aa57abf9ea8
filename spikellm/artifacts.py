"""Keyed folders of stage results: load or compute, whatever happens in between.

`root/<stage>/<key>/` holds the result of a stage, `key` a hash of exactly what the result depends on. A folder is written
beside its place and renamed, so that it is whole or absent, also after kill -9; a lock makes several processes (or
machines on one shared file system) that want the same folder compute it once.

The lock is the system's (flock), which goes with its process: a killed job or a machine that died leaves none behind (NFS
frees it when the client's lease ends, a minute or two). Where a file system does not carry locks from machine to machine,
the worst is that two compute the same: temporary names differ between machines and the first result to be whole stands.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout

if TYPE_CHECKING:  # report.py imports this module before torch is wanted
    from torch import Tensor

log = logging.getLogger(__name__)

STALE_SECONDS = 24 * 3600  # another machine's temporary folder of this age belongs to nobody


def artifact_key(inputs: dict[str, Any]) -> str:
    """16 hex digits that change whenever a value in `inputs` (JSON types) does."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ArtifactStore:
    """Results below `root`, one folder per stage and key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: str, inputs: dict[str, Any]) -> Path:
        """Where the result for `inputs` lies or will lie."""
        return self.root / stage / artifact_key(inputs)

    def load_or_compute(self, stage: str, inputs: dict[str, Any], compute: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder with the result of `stage`, and whether it was there already.

        Args:
            inputs: everything that the result depends on, in JSON types; kept beside it as inputs.json.
            compute: writes the result into the empty folder it is given.

        Raises:
            OSError: the store cannot be written.
        """
        target = self.folder(stage, inputs)
        if target.is_dir():
            return target, True
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another process is computing %s, waiting for it", stage, target.name)
            lock.acquire()
        try:
            if target.is_dir():
                return target, True
            self._clear_temporary(target)
            temporary = target.parent / f"{target.name}.tmp-{platform.node()}-{os.getpid()}-{uuid4().hex[:8]}"
            temporary.mkdir()
            try:
                compute(temporary)
                write_json(temporary / "inputs.json", inputs)
                try:
                    temporary.rename(target)
                except OSError:  # there already: made meanwhile by a machine that does not see our lock
                    if not target.is_dir():
                        raise
                    shutil.rmtree(temporary, ignore_errors=True)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            return target, False
        finally:
            lock.release()

    @staticmethod
    def _clear_temporary(target: Path) -> None:
        """Remove what killed runs have left: on this machine at once, for the lock is ours; of others when it is old."""
        for stale in target.parent.glob(f"{target.name}.tmp-*"):
            with suppress(FileNotFoundError):
                if f".tmp-{platform.node()}-" in stale.name or time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(stale, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")  # process numbers may meet on two machines
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> None:
    """Write a safetensors file; a full disk raises OSError (safetensors' own writer raises a type of its own)."""
    from safetensors.torch import save

    path.write_bytes(save(tensors))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
