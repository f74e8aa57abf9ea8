"""Sweeps over Hydra's jobs: a command given again continues, and every job's end brings the summary up to date.

A sweep's folder holds sweep.json (what was asked for), a folder per job, summary.csv, summary.md, summary.png and
report.html. Continuing works on three levels: stages are artefacts (`store/artifacts.py`); a job that was finished in its folder with the
same resolved configuration, inputs and code returns its recorded results (`job.Job`); and a sweep started with the same command as
the newest unfinished one goes on in that one's folder, unless `hydra.sweep.dir` says where.

A run or sweep has its folder to itself while it lasts: a folder named by the clock is made, or another with a number behind the name;
into a folder that the user names, a second run at the same time is refused, and a second sweep unless it is the same one.

The callback's methods run in the process that launches (`on_multirun_*`) and in that of each job (`on_job_end`), which the
joblib and submitit launchers put elsewhere. Hydra leaves `on_multirun_end` out where a job has failed, so the last job's end counts too.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from spikellm.config.checks import InputError
from spikellm.config.extras import PICTURES, lack
from spikellm.report.results import SWEEP, summary_rows, write_summary
from spikellm.run.command import INPUT_ERRORS, command_line, explain
from spikellm.store.artifacts import intact_json, write_json

log = logging.getLogger(__name__)

RUNNING = ".running.lock"
PATIENCE_S = 3.0  # for another process to say which sweep it is
LOOKED_AT = 100  # newest sweeps among which an unfinished one is looked for


def refresh(folder: Path) -> None:
    """Bring a sweep's summary up to date, and its report where it is complete."""
    if len(write_summary(folder)) >= _jobs(folder):
        report(folder)


def report(folder: Path) -> None:
    """Write report.html of a run or a sweep, where the extra `report` is installed; each job says so where it is not."""
    if not lack(*PICTURES):
        from spikellm.report.html import write_report  # jinja2, matplotlib: not before they are wanted

        write_report(folder)


def _jobs(folder: Path) -> float:
    """How many jobs a sweep has; infinity where nobody knows."""
    return _asked(folder).get("jobs") or math.inf


def _asked(folder: Path) -> dict[str, Any]:
    """What sweep.json says; empty where it is missing or damaged."""
    return intact_json(folder / SWEEP) or {}


@contextmanager
def _stopping() -> Iterator[None]:
    """Within a callback: wrong input ends the command. Hydra makes a warning of any other exception, and goes on."""
    try:
        yield
    except INPUT_ERRORS as error:
        raise SystemExit(explain(error)) from error


def _complete(folder: Path) -> bool:
    return sum(row["error"] is None for row in summary_rows(folder)) >= _jobs(folder)


class Reporter(Callback):
    """Hydra callback: see the module's text."""

    def __init__(self) -> None:
        self._running: FileLock | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_running": None}  # the lock stays with the process that launches

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Make and take the folder of a run."""
        folder = Path(config.hydra.run.dir)
        with _stopping():
            if not _is_named(config, "hydra.run.dir") and folder.parents[1] == Path(config.output_root) / "runs":
                folder = _made(folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
            if not self._take(folder):
                raise InputError(f"hydra.run.dir={folder}: another run is writing there; wait for its end or name another folder")
        with read_write(config.hydra):
            config.hydra.run.dir = str(folder)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Make the folder of a sweep, or go on in the one that an interrupted sweep left."""
        with _stopping():
            self._start(config)

    def _start(self, config: DictConfig) -> None:
        task = list(config.hydra.overrides.task)
        command = command_line(config.hydra.help.app_name, ["-m", *_launching(config), *task])
        asked = {"command": command, "overrides": task, "jobs": count_jobs(config)}
        folder = self._choose(config, task)
        if str(folder) != config.hydra.sweep.dir:
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.sweep.dir = str(folder)
                quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # jobs are composed from the overrides
        if done := sum(row["error"] is None for row in summary_rows(folder)):
            log.info("continuing the sweep in %s: %s of %s jobs are finished", folder, done, asked["jobs"] or "?")
        write_json(folder / SWEEP, asked)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: object) -> None:
        """Bring the sweep's summary up to date."""
        if config.hydra.mode is RunMode.MULTIRUN:
            try:
                refresh(Path(config.hydra.sweep.dir))
            except INPUT_ERRORS as error:  # the other jobs go on; `on_multirun_end` tries again
                log.error("summary: %s", explain(error))

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Write the sweep's summary and report."""
        folder = Path(config.hydra.sweep.dir)
        with _stopping():
            write_summary(folder)
            report(folder)

    def _choose(self, config: DictConfig, task: list[str]) -> Path:
        """The folder that the user names; or of the newest sweep with the same overrides, if it is unfinished; or a new one."""
        folder = Path(config.hydra.sweep.dir)
        if not _is_named(config, "hydra.sweep.dir") and folder.parents[1] == Path(config.output_root) / "sweeps":
            for path in sorted(folder.parents[1].glob(f"*/*/{SWEEP}"), reverse=True)[:LOOKED_AT]:
                if _asked(path.parent).get("overrides") == task:
                    if not _complete(path.parent) and self._take(path.parent):
                        return path.parent
                    break
            folder = _made(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._take(folder):
            latest = time.monotonic() + PATIENCE_S
            while _asked(folder).get("overrides") != task:
                if time.monotonic() > latest:
                    raise InputError(f"hydra.sweep.dir={folder}: another sweep is running there; wait for its end or name another folder")
                time.sleep(0.1)
            log.warning("hydra.sweep.dir=%s: another process is running the same sweep there", folder)
        return folder

    def _take(self, folder: Path) -> bool:
        """Whether no other process has `folder`; if so, none can have it from now until this one ends."""
        lock = FileLock(folder / RUNNING)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._running = lock
        return True


def _is_named(config: DictConfig, key: str) -> bool:
    """Whether the command says which folder, not the clock."""
    return any(override.partition("=")[0].lstrip("+") == key for override in config.hydra.overrides.hydra)


def _made(folder: Path) -> Path:
    """A folder that nobody had before: this one, or with a number behind its name where one was started in the same second."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place, number = folder, 1
    while True:
        try:
            place.mkdir()
        except FileExistsError:
            number += 1
            place = folder.with_name(f"{folder.name}-{number}")
        else:
            return place


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs a grid of overrides makes; None where a sweeper decides as it goes."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return None
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    lengths = {}
    for override in OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task]):
        discrete = override.is_sweep_override() and override.is_discrete_sweep()
        lengths[override.get_key_element()] = len(list(override.sweep_string_iterator())) if discrete else 1
    return math.prod(lengths.values())


def _launching(config: DictConfig) -> list[str]:
    """Overrides of Hydra itself that belong to the command: all but the folder."""
    kept = [override for override in config.hydra.overrides.hydra if not override.startswith(("hydra.mode=", "hydra.sweep.dir="))]
    return list(kept)
