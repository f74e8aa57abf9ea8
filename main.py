"""Convert a pretrained LLaMA-family model to a spiking one: `python main.py --help`."""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikellm.config import Config, InputError, quote_numeric_options, register
from spikellm.report import console_table, objective, write_failure, write_results

log = logging.getLogger("spikellm")
register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """One job: run the stages, write results.json and sites.csv, return the objective."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        from spikellm.stages import run_stages  # imports torch: not before the input is known to be right

        results, rows = run_stages(config)
        path = write_results(folder, results, rows)
    except Exception as error:
        write_failure(folder, error)
        log.error("%s", " ".join(str(error).split()))
        raise
    log.info("done\n%s", console_table(results, path))
    return objective(results, config.objective)


def cli() -> None:
    """The command line: wrong input ends with one line and exit code 2, a defect with its traceback."""
    traceback_wanted = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing and exiting with 1
    try:
        sys.argv[1:] = quote_numeric_options(sys.argv[1:])
        main()
    except (InputError, HydraException, OmegaConfBaseException, OSError) as error:
        if traceback_wanted:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    cli()
