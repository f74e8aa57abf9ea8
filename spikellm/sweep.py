"""Sweeps over Hydra's jobs: a command given again continues, and every job's end brings the summary up to date.

A sweep's folder holds sweep.json (what was asked for), a folder per job, summary.csv, summary.md, summary.png and
report.html. Continuing works on three levels: stages are artefacts (`artifacts.py`); a job that was finished in its folder with the
same resolved configuration, inputs and code returns its recorded results (`job.Job`); and a sweep started with the same command as
the newest unfinished one goes on in that one's folder, unless `hydra.sweep.dir` says where.

The callback's methods run in the process that launches (`on_multirun_*`) and in that of each job (`on_job_end`), which the
joblib and submitit launchers put elsewhere. Hydra leaves `on_multirun_end` out where a job has failed, so the last job's end counts too.
"""

import logging
import math
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from spikellm.artifacts import read_json, write_json
from spikellm.command import command_line
from spikellm.report import SWEEP, summary_rows, write_summary

log = logging.getLogger(__name__)

RUNNING = ".running.lock"
LOOKED_AT = 100  # newest sweeps among which an unfinished one is looked for


def refresh(folder: Path) -> None:
    """Bring a sweep's summary up to date, and its report where it is complete."""
    if len(write_summary(folder)) >= _jobs(folder):
        _write_report(folder)


def _write_report(folder: Path) -> None:
    from spikellm.html_report import write_report  # jinja2, matplotlib: not before they are wanted

    write_report(folder)


def _jobs(folder: Path) -> float:
    """How many jobs a sweep has; infinity where nobody knows."""
    return (read_json(folder / SWEEP)["jobs"] if (folder / SWEEP).is_file() else None) or math.inf


def _complete(folder: Path) -> bool:
    return sum(row["error"] is None for row in summary_rows(folder)) >= _jobs(folder)


class Reporter(Callback):
    """Hydra callback: see the module's text."""

    def __init__(self) -> None:
        self._running: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_running": None}  # the lock stays with the process that launches

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        task = list(config.hydra.overrides.task)
        asked = {"command": command_line(["-m", *_launching(config), *task]), "overrides": task, "jobs": count_jobs(config)}
        folder = self._choose(config, task)
        if str(folder) != config.hydra.sweep.dir:
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.sweep.dir = str(folder)
                quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # jobs are composed from the overrides
        if done := sum(row["error"] is None for row in summary_rows(folder)):
            log.info("continuing the sweep in %s: %s of %s jobs are finished", folder, done, asked["jobs"] or "?")
        write_json(folder / SWEEP, asked)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode is RunMode.MULTIRUN:
            refresh(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        write_summary(folder)
        _write_report(folder)

    def _choose(self, config: DictConfig, task: list[str]) -> Path:
        """The folder that the user names; or of the newest sweep with the same overrides, if it is unfinished; or a new one."""
        folder = Path(config.hydra.sweep.dir)
        named = any(override.partition("=")[0].lstrip("+") == "hydra.sweep.dir" for override in config.hydra.overrides.hydra)
        if not named and folder.parents[1] == Path(config.output_root) / "sweeps":
            for path in sorted(folder.parents[1].glob(f"*/*/{SWEEP}"), reverse=True)[:LOOKED_AT]:
                if read_json(path)["overrides"] == task:
                    if not _complete(path.parent) and self._take(path.parent):
                        return path.parent
                    break
        folder.mkdir(parents=True, exist_ok=True)
        if not self._take(folder):
            if named:
                log.warning("hydra.sweep.dir=%s: another process is running a sweep there", folder)
            else:  # started in the same second
                folder = folder.with_name(f"{folder.name}-{os.getpid()}")
                folder.mkdir()
                self._take(folder)
        return folder

    def _take(self, folder: Path) -> bool:
        """Whether no other process is launching jobs into `folder`; if so, none can from now until this one ends."""
        lock = FileLock(folder / RUNNING)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._running = lock
        return True


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
