"""The stages of the main job in their order, and how a job runs those that it asks for.

Results are artefacts keyed by exactly what they depend on: a sweep over T and grain calibrates once, a run repeated
computes nothing. A stage that needs another's result obtains it, named in `stages` or not.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from spikellm.config.checks import InputError
from spikellm.config.choices import Amplitude, ModelSource
from spikellm.config.schema import Config
from spikellm.cores import threads
from spikellm.kernels.switch import fusing
from spikellm.planning.watch import in_gib, watched
from spikellm.run.converting import CONVERT
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.generating import GENERATE
from spikellm.run.measuring import DIAGNOSE, EVALUATE
from spikellm.run.planning import planned, planned_if_large
from spikellm.run.remeasuring import SAVED_STAGES
from spikellm.run.stage import Stage
from spikellm.run.workspace import Workspace
from spikellm.store.artifacts import computed_by
from spikellm.store.provenance import versions
from spikellm.store.record import PlanRecord, ReferenceRecord, Results, Row, StageRecord
from spikellm.store.sources import job_inputs

log = logging.getLogger(__name__)

RESULTS_SCHEMA = 1
STAGES: dict[str, Stage] = {stage.name: stage for stage in (CALIBRATE, SEARCH, CONVERT, EVALUATE, DIAGNOSE, GENERATE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has found: the content of results.json, rows by the name of a csv file, pictures to copy into the run's folder."""

    results: Results
    tables: dict[str, list[Row]]
    plots: list[Path]


def run_stages(config: Config, progress: Callable[[Results], None] = lambda _: None) -> Outcome:
    """Prepare all of `schema.stages` and what they need, then run them in the order of `STAGES`.

    Args:
        progress: is given what results.json will hold, after every stage.
    """
    with threads(config.hardware.threads), fusing(config.hardware.fused):
        return _run(Workspace(config), progress)


def plan_stages(config: Config) -> PlanRecord:
    """What `run_stages` would read, hold and take."""
    with threads(config.hardware.threads), fusing(config.hardware.fused):
        return planned(Workspace(config))


def _run(work: Workspace, progress: Callable[[Results], None]) -> Outcome:
    config = work.config
    asked = [stage for name, stage in registry(config).items() if name in config.stages]
    needed = with_needed(asked, work)
    for stage in needed:
        stage.prepare(work)
    results = Results(
        schema=RESULTS_SCHEMA,
        model=config.model.name,
        dtype=config.model.dtype.value,
        T=config.snn.T,
        grain=config.snn.grains or "auto",
        coding=config.snn.coding.value,
        intervals=config.snn.interval_count or "auto",
        amplitude=None if config.snn.amplitude is Amplitude.static else config.snn.amplitude.value,
        execution=config.snn.execution.value,
        seed=config.seed,
        stages={},
        versions=versions(),
        inputs=job_inputs(replace(config, model=work.model), work.store.digests),
        reference=_published(config),
        plan=planned_if_large(work, needed),
    )
    tables: dict[str, list[Row]] = {}
    plots: list[Path] = []
    for stage in asked:
        start = time.perf_counter()
        with watched() as peak:
            outcome = stage.run(work)
        seconds = round(time.perf_counter() - start, 3)
        cached = all(artefact.cached for artefact in outcome.artefacts)
        took = StageRecord(
            seconds=seconds,
            cached=cached,
            versions=computed_by(outcome.artefacts),
            memory_gib=in_gib(peak.resident),
            device_gib=in_gib(peak.device),
        )
        results = replace(results | outcome.findings, stages=results.stages | {stage.name: took})
        tables |= outcome.tables
        plots += outcome.plots
        log.info("%s: %.1f s%s", stage.name, seconds, " (cached)" if cached else "")
        progress(results)
    return Outcome(results=results, tables=tables, plots=plots)


def registry(config: Config) -> dict[str, Stage]:
    """The stages by name, of a pretrained model or of a saved one.

    Raises:
        InputError: a stage is asked for that a saved model is behind already.
    """
    if config.model.source is not ModelSource.spiking:
        return STAGES
    if behind := [name for name in config.stages if name in STAGES and name not in SAVED_STAGES]:
        raise InputError(
            f"stages=[{','.join(config.stages)}]: {config.model.path} is converted already, there is nothing to {behind[0]}; "
            f"take [{']; ['.join(SAVED_STAGES)}]"
        )
    return SAVED_STAGES


def with_needed(stages: Iterable[Stage], work: Workspace) -> list[Stage]:
    """`stages` and those whose results they have to obtain, these first, each once."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found |= {each.name: each for each in (*with_needed(stage.needed(work), work), stage)}
    return list(found.values())


def _published(config: Config) -> ReferenceRecord | None:
    """Published figures for this job, where the experiment names any."""
    reference, snn = config.reference, config.snn
    if not reference.rows:
        return None
    if figures := reference.figures(config.model.name, snn.T, snn.grain):
        return ReferenceRecord(source=reference.source, figures=figures)
    known = ", ".join(f"T={row.T} grain={row.grain}" for row in reference.rows)
    log.warning("reference: nothing was published for %s, T=%s, grain=%s; there is %s, %s",
                config.model.name, snn.T, snn.grain, reference.model, known)  # fmt: skip
    return None
