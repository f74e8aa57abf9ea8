"""One job in its folder, alone or in a sweep: run the stages, or return what was recorded, or rebuild a report; leave what happened."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spikellm.config.choices import Device
from spikellm.config.extras import PICTURES, lack, require
from spikellm.config.schema import instantiate, tracking_options
from spikellm.kernels.build import begin
from spikellm.report.card import MODEL, check_place, publish
from spikellm.report.results import NOT_FINISHED, finished_results, write_failure, write_results
from spikellm.run.command import command_line
from spikellm.run.sweep import refresh, report
from spikellm.run.tracking import tracked
from spikellm.store.artifacts import ArtifactStore, artifact_key
from spikellm.store.hub import cache_if_silent
from spikellm.store.record import JobRecord, Results
from spikellm.store.sources import job_inputs

log = logging.getLogger(__name__)


class Job:
    """What Hydra asks for once."""

    def __init__(self, composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        self.composed = composed
        self.folder = Path(hydra_config.runtime.output_dir)
        self.sweep = None if hydra_config.mode is RunMode.RUN else Path(hydra_config.sweep.dir)
        self.record = _record(composed, command_line(hydra_config.help.app_name, list(hydra_config.overrides.task)))

    def run(self) -> Results | None:
        """The content of results.json, written; None where only a report, or a plan, was asked for."""
        if "report" in self.composed.stages:
            require("stages=[report]", *PICTURES)
        if list(self.composed.stages) == ["report"]:
            from spikellm.report.html import rebuild

            log.info("report  %s", rebuild(instantiate(self.composed)))
            return None
        if self.composed.plan:
            from spikellm.report.plan import plan_table
            from spikellm.run.stages import plan_stages

            log.info("%s", plan_table(plan_stages(instantiate(self.composed))))
            return None
        if self.sweep and (recorded := self._finished()):
            log.info("finished before, not run again")
            return recorded
        if self.composed.save_model:
            check_place(self.folder)
        write_failure(self.folder, NOT_FINISHED, self.record)  # what is found here should this process be killed
        with tracked(*tracking_options(self.composed), folder=self.folder, group=self.sweep.name if self.sweep else None) as tracker:
            config = instantiate(self.composed)  # a job with wrong input is tracked as failed
            if config.hardware.device is Device.cpu and config.hardware.fused:
                begin()
            from spikellm.model.load import context_warning  # imports torch: not before the input is known to be right
            from spikellm.run.stages import run_stages

            if (config.report.html or config.spikes.enabled) and (absent := lack(*PICTURES)):
                log.warning("no plots and no report.html: %s", absent)
            with cache_if_silent(config):
                if (warning := context_warning(config)) is not None:
                    log.warning("%s", warning)
                found = run_stages(config, tracker.log_results)
            own, warnings = self.record, None if warning is None else [warning]
            results = replace(found.results, command=own.command, config=own.config, warnings=warnings)
            if results.saved_model is not None:
                saved = Path(results.saved_model)
                results = replace(results, saved_model=str(self.folder / MODEL))
                publish(saved, self.folder, results)
            write_results(self.folder, results, found.tables, found.plots)
            tracker.log_files(results, found.tables, self.folder)
        if not self.sweep and (config.report.html or "report" in config.stages):
            report(self.folder)
        return results

    def _finished(self) -> Results | None:
        """What this job has left before: of the same configuration, inputs and code, and whatever it names is still there."""
        recorded = finished_results(self.folder, self.record.config)
        if recorded is None:
            return None
        config = instantiate(self.composed)
        if recorded.inputs != job_inputs(config, ArtifactStore(Path(config.output_root) / "artifacts").digests):
            log.info("finished before, of other inputs or by other code: run again")
            return None
        if absent := [path for path in (recorded.codes, recorded.saved_model) if path is not None and not Path(path).exists()]:
            log.info("finished before, but %s is gone: run again", absent[0])
            return None
        return recorded

    def fail(self, reason: str, *, interrupted: bool) -> None:
        """Leave the reason in the folder, and in the sweep's summary where Hydra stops at once, without `on_job_end`."""
        write_failure(self.folder, reason, self.record)
        if self.sweep and interrupted:
            refresh(self.sweep)


def _record(composed: DictConfig, command: str) -> JobRecord:
    resolved: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    grain = resolved["snn"]["grain"]
    return JobRecord(
        model=resolved["model"]["name"],
        T=resolved["snn"]["T"],
        grain=int(grain) if str(grain).isdigit() else grain,
        command=command,
        config=artifact_key(resolved),
    )
