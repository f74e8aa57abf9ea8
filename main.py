"""Convert a pretrained LLaMA-family model to a spiking one: `python main.py --help`."""

import logging
import os
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from spikellm.config import INPUT_ERRORS, Config, explain, quote_numeric_options, register, tracking_options
from spikellm.report import console_table, job_place, objective, write_failure, write_results
from spikellm.tracking import tracked

log = logging.getLogger("spikellm")
logging.raiseExceptions = False  # a full disk is reported once, not by every line of the log
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One job: run the stages, write results.json and sites.csv, return the objective."""
    folder, sweep = job_place()
    try:
        with tracked(*tracking_options(composed), folder=folder, group=sweep) as tracker:
            config = OmegaConf.to_object(composed)
            assert isinstance(config, Config)
            from spikellm.stages import run_stages  # imports torch: not before the input is known to be right

            results, rows = run_stages(config, tracker.log_results)
            path = write_results(folder, results, rows)
            tracker.log_files(results, {"sites.csv": rows} if rows else {}, folder)
    except Exception as error:
        write_failure(folder, explain(error))
        if sweep is None and isinstance(error, INPUT_ERRORS):
            raise SystemExit(explain(error)) from error  # past Hydra, which would add lines of its own
        log.error("%s", explain(error))
        raise
    log.info("done\n%s", console_table(results, path))
    return objective(results, config.objective)


def cli() -> None:
    """The command line: wrong input ends with one line and exit code 2, a defect with its traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")
    try:
        sys.argv[1:] = quote_numeric_options(sys.argv[1:])
        main()
    except (*INPUT_ERRORS, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise
        print(f"error: {error.code if isinstance(error, SystemExit) else explain(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
