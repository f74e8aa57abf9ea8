"""The command: `python main.py` in a checkout, `spikellm` and `python -m spikellm` everywhere."""

import logging
import os
import sys
from contextlib import suppress

import hydra
from omegaconf import DictConfig

from spikellm.config.places import CONF
from spikellm.config.schema import register
from spikellm.report.console import console_table
from spikellm.report.results import objective
from spikellm.run.command import INPUT_ERRORS, exit_code, explain, quote_values, raise_on_termination
from spikellm.run.job import Job
from spikellm.run.saved import completed

log = logging.getLogger("spikellm")


def task(composed: DictConfig) -> float | None:
    """One job: run the stages, write results.json and sites.csv, return the objective. Launchers send it to other processes by its name."""
    job = Job(composed)
    try:
        results = job.run()
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            job.fail(explain(error), interrupted=isinstance(error, KeyboardInterrupt))
        if job.sweep is None and isinstance(error, INPUT_ERRORS):
            raise SystemExit(explain(error)) from error  # past Hydra, which would add lines of its own
        if not isinstance(error, KeyboardInterrupt):
            log.error("%s", explain(error))
        raise
    if results:
        log.info("done\n%s", console_table(results, job.folder))
    return objective(results, composed.objective)


run = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)


def quote() -> None:
    """The command line as Hydra can read it, with what a saved model's folder says."""
    sys.argv[1:] = completed(quote_values(sys.argv[1:]))


def cli(program: str = "spikellm") -> None:
    """The command line: wrong input ends with one line and exit code 2, a defect with its traceback.

    Args:
        program: how it was called, for help and for the commands that results tell.
    """
    logging.raiseExceptions = False  # a full disk is reported once, not by every line of the log
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")
    raise_on_termination()
    register(program)
    sys.exit(exit_code(quote, program) or exit_code(run, program))  # two calls: `run` is Hydra's own, see `boundary.is_of_a_library`
