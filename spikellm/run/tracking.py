"""Mirror a job in Weights & Biases: one run per job, finished in the job's own process, whatever launched it.

results.json is the truth; the run shows the same numbers under the same dotted keys (`perplexity.snn`), the configuration as a
tree, sites.csv as a table, and the plots. Jobs of a sweep share a group. The id is a hash of the configuration without
where it is written and how it is tracked, so that a job that is repeated continues its run. A job that fails ends
its run as failed and leaves the reason in the summary's `error`.

Nothing here asks a question or waits for a server: without a key, or a server that answers, the run is written into the
job's folder, for `wandb sync`. A tracker that breaks down costs the job a warning, not its results.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from spikellm.config.checks import InputError
from spikellm.config.choices import Tracker, TrackingMode
from spikellm.config.extras import require
from spikellm.config.measures import TrackingConfig
from spikellm.run.command import explain
from spikellm.store.artifacts import artifact_key
from spikellm.store.hub import answers
from spikellm.store.record import Results, Row

log = logging.getLogger(__name__)

INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 60, 600


class Tracking:
    """What a job tells its tracker; this one keeps nothing."""

    def log_results(self, results: Results) -> None:
        """The content of results.json so far: every number and truth value under its dotted key."""

    def log_files(self, results: Results, tables: dict[str, list[Row]], folder: Path) -> None:
        """The rows of csv files by file name, the PNG files of folder/plots, and where asked for codes and results as an artefact."""


class WandbTracking(Tracking):
    """A W&B run that has been started."""

    def __init__(self, run: Any, *, artifacts: bool) -> None:
        self.run, self.artifacts = run, artifacts
        self._logged: dict[str, int | float] = {}

    def log_results(self, results: Results) -> None:
        """Send figures that are new or have changed."""
        news = {key: value for key, value in numeric_leaves(results.to_json()).items() if self._logged.get(key) != value}
        self._logged |= news
        self._mirror(lambda: self.run.log(news))

    def log_files(self, results: Results, tables: dict[str, list[Row]], folder: Path) -> None:
        """Send tables and plots, and with `tracking.artifacts` the files of the results."""
        import wandb

        def send() -> None:
            content: dict[str, Any] = {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))}
            for name, rows in tables.items():
                cells = [[json.dumps(value) if isinstance(value, list) else value for value in row.values()] for row in rows]
                content[f"{Path(name).stem}_table"] = wandb.Table(columns=list(rows[0]), data=cells)
            if content:
                self.run.log(content)
            if self.artifacts:
                artifact = wandb.Artifact(f"{results.model}-T{results.T}-G{results.grain}", type="codes")
                files = [folder / "results.json", *(folder / name for name in tables)]
                files += [] if results.codes is None else [Path(results.codes)]
                for path in (file for file in files if file.is_file()):
                    artifact.add_file(str(path), policy="immutable")  # no second copy of files that nobody changes
                self.run.log_artifact(artifact)

        self._mirror(send)

    @staticmethod
    def _mirror(send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # the mirror must not cost the results
            log.warning("tracking: not everything reached W&B (%s); results.json has it all", " ".join(str(error).split())[:200])


def numeric_leaves(results: dict[str, Any], prefix: str = "") -> dict[str, int | float]:
    """Numbers and truth values of a nested dict under dotted keys."""
    leaves: dict[str, int | float] = {}
    for key, value in results.items():
        if isinstance(value, dict):
            leaves |= numeric_leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            leaves[prefix + key] = value
    return leaves


def run_id(tree: dict[str, Any]) -> str:
    """The same for every job with this configuration, wherever it is written and however it is tracked."""
    return artifact_key({key: value for key, value in tree.items() if key not in ("output_root", "tracking")})


@contextmanager
def tracked(config: TrackingConfig, tree: dict[str, Any], *, folder: Path, group: str | None) -> Iterator[Tracking]:
    """Within: the job's tracker. Leaving by an exception marks the run as failed, with the reason.

    Args:
        tree: the resolved configuration in plain types.
        folder: the job's; offline runs lie below it.
        group: of the sweep; None for a single run.

    Raises:
        InputError: W&B is not installed; `tracking.mode=online` without a key or a server that answers.
    """
    if config.kind is Tracker.none or config.mode is TrackingMode.disabled:
        yield Tracking()
        return
    run = _start(config, tree, folder, group)
    try:
        yield WandbTracking(run, artifacts=config.artifacts)
    except BaseException as error:  # Ctrl-C too
        run.summary["error"] = explain(error) if isinstance(error, Exception) else type(error).__name__
        run.finish(exit_code=1)
        raise
    run.finish()


def _start(config: TrackingConfig, tree: dict[str, Any], folder: Path, group: str | None) -> Any:
    require("tracking=wandb", "wandb")
    import wandb

    mode = _mode(config)
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "project": config.project, "entity": config.entity, "group": group, "dir": str(folder), "config": tree, "resume": "allow",
        "name": f"{tree['model']['name']}-T{tree['snn']['T']}-G{tree['snn']['grain']}", "id": run_id(tree),
    }  # fmt: skip

    def start(mode: Literal["online", "offline"]) -> Any:
        # create_new: no run is left behind in wandb's globals for the next job of this process; console=off: sys.stdout stays as it is
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, reinit="create_new",
            init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S,
        )  # fmt: skip
        return wandb.init(**common, mode=mode, settings=settings)

    try:
        run = start(mode)
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200]
        if config.mode is not TrackingMode.auto or mode == "offline":
            raise InputError(f"tracking.mode={config.mode.value}: W&B does not start ({reason}); take tracking.mode=offline") from error
        log.warning("tracking: W&B does not answer (%s); the run is written to %s instead", reason, folder)
        mode, run = "offline", start("offline")
    if mode == "offline":
        log.info("tracking: W&B run %s, offline; to upload it: wandb sync %s", run.id, run.settings.sync_dir)
    else:
        log.info("tracking: W&B run %s, %s", run.id, run.url)
    return run


def _mode(config: TrackingConfig) -> Literal["online", "offline"]:
    """online or offline, decided without a question and in seconds."""
    import wandb

    wish = config.mode
    if wish is TrackingMode.auto and os.environ.get("WANDB_MODE") in ("offline", "online"):
        wish = TrackingMode(os.environ["WANDB_MODE"])
    if wish is TrackingMode.offline:
        return "offline"
    if not wandb.login(prompt=False, verify=False):
        obstacle = "no key (WANDB_API_KEY or `wandb login`)"
    elif not answers(wandb.setup().settings.base_url):
        obstacle = "the W&B server does not answer"
    else:
        return "online"
    if wish is TrackingMode.online:
        raise InputError(f"tracking.mode=online: {obstacle}; take tracking.mode=offline, and `wandb sync` later")
    log.info("tracking: %s, so W&B stays offline", obstacle)
    return "offline"
