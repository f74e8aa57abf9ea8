"""The stages of the main job: what each reads, writes and needs.

    calibrate   model, rotation, prefix, calibration text -> statistics of every site, prefix tokens
    search      statistics, T, grain                      -> one code per site
    convert     model, codes                              -> the spiking model (in memory; on disk with save_model=true)
    evaluate    models, evaluation texts, benchmarks      -> perplexities, zero-shot accuracies, spikes, energy
    diagnose    statistics, codes, evaluation text        -> distance to the Lloyd-Max bound, damage by kind of site, plots

Results are artefacts keyed by exactly what they depend on: a sweep over T and grain calibrates once, a run repeated
computes nothing. A stage that needs another's result obtains it, named in `stages` or not (`workspace.py`).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spikellm.config.extras import require
from spikellm.config.schema import Config, Execution
from spikellm.evaluation import diagnostics
from spikellm.evaluation.density_plots import write_density_plots
from spikellm.evaluation.figures import evaluate as evaluate_networks
from spikellm.model import checkpoint
from spikellm.run.workspace import Workspace, threads
from spikellm.search.methods import site_row
from spikellm.spikes import accounts, ledger
from spikellm.store.artifacts import Artefact, computed_by, read_json, write_json
from spikellm.store.provenance import versions
from spikellm.store.sources import job_inputs

log = logging.getLogger(__name__)

RESULTS_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What a stage adds to results.json, and the artefacts that it is from."""

    artefacts: list[Artefact]
    results: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # rows by the name of a csv file
    plots: list[Path] = field(default_factory=list)  # pictures to copy into the run's folder


def calibrate(work: Workspace) -> StageOutcome:
    found, artefact = work.calibration()
    record = {"sites": len(found.statistics), "prefix_tokens": found.prefix_tokens, "rotation": work.rotation_record}
    return StageOutcome(artefacts=[artefact], results=record)


def search(work: Workspace) -> StageOutcome:
    fits, artefact = work.fits()
    rows = [site_row(name, fit) for name, fit in fits.items()]
    record = {
        "sites": len(rows), "search": read_json(artefact.folder / "search.json"), "codes": str(artefact.folder / "codes.safetensors"),
    }  # fmt: skip
    return StageOutcome(artefacts=[artefact], results=record, tables={"sites.csv": rows})


def convert(work: Workspace) -> StageOutcome:
    """The codes fit the model's sites; with save_model=true the spiking model on disk."""

    def build(folder: Path) -> None:
        fits, places = work.fits()[0], work.calibration()[0].statistics
        if absent := sorted(set(fits) ^ set(places)):
            raise ValueError(f"codes do not fit the model: {len(absent)} sites with a code or statistics alone, {absent[:3]}")
        write_json(folder / "neurons.json", {name: {"groups": len(fit.tau), "T": fit.assignment.shape[-1]} for name, fit in fits.items()})
        if work.config.save_model:
            checkpoint.save(work.spiking(), folder / "model", rotation=work.rotation_record)
            if work.tokenizer is not None:
                work.tokenizer.save_pretrained(folder / "model")

    artefact = work.store.load_or_compute("convert", work.convert_inputs, build)
    return StageOutcome(artefacts=[artefact], results={"saved_model": str(artefact.folder / "model")} if work.config.save_model else {})


def evaluate(work: Workspace) -> StageOutcome:
    """Spikes and energy of the spiking model; perplexities and accuracies of all networks."""
    counted = _spikes(work) if work.config.spikes.enabled else StageOutcome(artefacts=[], results={})
    results, artefacts = evaluate_networks(work.config.dataset, lambda: work.tokenizer, work.store, work.networks.values(), work.benchmarks)
    return StageOutcome(artefacts=artefacts + counted.artefacts, results=results | counted.results, tables=counted.tables)


def _spikes(work: Workspace) -> StageOutcome:
    """`spikes` and `energy` of results.json, the rows of spikes.csv."""

    def measure(folder: Path) -> None:
        windows = work.evaluation_windows[: work.config.spikes.windows]
        write_json(folder / "ledger.json", ledger.count(work.spiking(), windows).to_json())

    artefact = work.store.load_or_compute("spikes", work.snn_inputs("spikes", windows=work.config.spikes.windows), measure)
    found = ledger.Ledger.from_json(read_json(artefact.folder / "ledger.json"))
    if found.windows < work.config.spikes.windows:
        log.warning("spikes.windows=%d: the evaluation text has %d", work.config.spikes.windows, found.windows)
    records = {"spikes": accounts.spikes_record(found), "energy": accounts.energy_record(found, accounts.cost_table(work.config.energy))}
    return StageOutcome(artefacts=[artefact], results=records, tables={"spikes.csv": accounts.spike_rows(found)})


def diagnose(work: Workspace) -> StageOutcome:
    """How far each code is above the Lloyd-Max bound, which sites do the damage, levels drawn on densities."""
    options = work.config.diagnostics

    def measure(folder: Path) -> None:
        fits, statistics = work.fits()[0], work.calibration()[0].statistics
        record: dict[str, Any] = {"sites": diagnostics.site_rows(statistics, fits)}
        write_density_plots(folder / "plots", statistics, fits)
        if options.windows:
            windows = work.evaluation_windows[: options.windows]
            by_kind, by_site = diagnostics.damage(work.transparent(), fits, windows, compiled=work.config.hardware.compile)
            record["damage"] = {"perplexity_by_kind": by_kind, "perplexity_by_site": by_site}
        write_json(folder / "diagnostics.json", record)

    artefact = work.store.load_or_compute("diagnose", work.snn_inputs("diagnose", windows=options.windows), measure)
    record = read_json(artefact.folder / "diagnostics.json")
    rows = record.pop("sites")
    above = sorted(row["above_bound"] for row in rows if row["above_bound"] is not None)
    found = record.get("damage", {}) | {"median_above_bound": above[len(above) // 2] if above else None}
    plots = sorted((artefact.folder / "plots").glob("*.png"))
    return StageOutcome(artefacts=[artefact], results={"diagnostics": found}, tables={"diagnostics.csv": rows}, plots=plots)


STAGES: dict[str, Callable[[Workspace], StageOutcome]] = {
    "calibrate": calibrate,
    "search": search,
    "convert": convert,
    "evaluate": evaluate,
    "diagnose": diagnose,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has found: the content of results.json, rows by the name of a csv file, pictures to copy into the run's folder."""

    results: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]
    plots: list[Path]


def run_stages(config: Config, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> Outcome:
    """Run `schema.stages` in the order of `STAGES`.

    Args:
        progress: is given what results.json will hold, after every stage.
    """
    with threads(config.hardware.threads):
        return _run(Workspace(config), progress)


def _run(work: Workspace, progress: Callable[[dict[str, Any]], None]) -> Outcome:
    config = work.config
    for key in ("step_chunk", "max_memory_gib"):
        if config.snn.execution is Execution.folded and (value := getattr(config.snn, key)) is not None:
            log.warning("snn.%s=%s has no effect with snn.execution=folded", key, value)
    if "diagnose" in config.stages:
        require("stages=[diagnose]", "matplotlib")
    if "evaluate" in config.stages:
        work.prepare_evaluation()
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "model": config.model.name,
        "dtype": config.model.dtype.value,
        "T": config.snn.T,
        "grain": config.snn.grain if config.snn.grain == "auto" else int(config.snn.grain),
        "coding": config.snn.coding.value,
        "execution": config.snn.execution.value,
        "seed": config.seed,
        "stages": {},
        "versions": versions(),
        "inputs": job_inputs(replace(config, model=work.model), work.store.digests),
    }
    results |= _published(config)
    found = Outcome(results=results, tables={}, plots=[])
    for name, stage in STAGES.items():
        if name not in config.stages:
            continue
        start = time.perf_counter()
        outcome = stage(work)
        seconds = round(time.perf_counter() - start, 3)
        results |= outcome.results
        cached = all(artefact.cached for artefact in outcome.artefacts)
        results["stages"][name] = {"seconds": seconds, "cached": cached, "versions": computed_by(outcome.artefacts)}
        found.tables.update(outcome.tables)
        found.plots.extend(outcome.plots)
        log.info("%s: %.1f s%s", name, seconds, " (cached)" if cached else "")
        progress(results)
    return found


def _published(config: Config) -> dict[str, Any]:
    """Published figures for this job, where the experiment names any."""
    reference, snn = config.reference, config.snn
    if not reference.rows:
        return {}
    if figures := reference.figures(config.model.name, snn.T, snn.grain):
        return {"reference": {"source": reference.source, "figures": figures}}
    known = ", ".join(f"T={row.T} grain={row.grain}" for row in reference.rows)
    log.warning("reference: nothing was published for %s, T=%s, grain=%s; there is %s, %s",
                config.model.name, snn.T, snn.grain, reference.model, known)  # fmt: skip
    return {}
