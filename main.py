"""Convert a pretrained LLaMA-family model to a spiking one: `python main.py --help`."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spikellm.config import INPUT_ERRORS, Config, explain, quote_numeric_options, register
from spikellm.report import console_table, objective, write_failure, write_results

log = logging.getLogger("spikellm")
logging.raiseExceptions = False  # a full disk is reported once, not by every line of the log
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One job: run the stages, write results.json and the tables, return the objective."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        from spikellm.stages import run_stages  # imports torch: not before the input is known to be right

        results, tables = run_stages(config)
        path = write_results(folder, results, tables)
    except Exception as error:
        with suppress(OSError):
            write_failure(folder, explain(error))
        if hydra_config.mode is RunMode.RUN and isinstance(error, INPUT_ERRORS):
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
