"""Convert a pretrained LLaMA-family model to a spiking one: `python main.py --help`."""

import logging
import os
import sys
from contextlib import suppress

import hydra
from omegaconf import DictConfig

from spikellm.config.schema import register
from spikellm.report.console import console_table
from spikellm.report.results import objective
from spikellm.run.command import INPUT_ERRORS, exit_code, explain, quote_values, raise_on_termination
from spikellm.run.job import Job

log = logging.getLogger("spikellm")
logging.raiseExceptions = False  # a full disk is reported once, not by every line of the log
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One job: run the stages, write results.json and sites.csv, return the objective."""
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


def run() -> None:
    """`main` on the command line as Hydra can read it."""
    sys.argv[1:] = quote_values(sys.argv[1:])
    main()


def cli() -> None:
    """The command line: wrong input ends with one line and exit code 2, a defect with its traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")
    raise_on_termination()
    sys.exit(exit_code(run))


if __name__ == "__main__":
    cli()
