"""The four stages of the main job: what each reads, writes and needs.

    calibrate   model, rotation, prefix, calibration text -> statistics of every site, prefix tokens
    search      statistics, T, grain                      -> one code per site
    convert     model, codes                              -> the spiking model (in memory; on disk with save_model=true)
    evaluate    models, evaluation text                   -> perplexities

Results are artefacts keyed by exactly what they depend on: a sweep over T and grain calibrates once, a run repeated
computes nothing. A stage that needs another's result obtains it, named in `stages` or not.
"""

import gc
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spikellm import checkpoint, conversion, data, evaluation, rotation
from spikellm.artifacts import ArtifactStore, artifact_key, read_json, write_json
from spikellm.calibration import Calibration
from spikellm.calibration import calibrate as run_calibration
from spikellm.config import Config, Groups, ImportV0, InputError, RotationKind, SearchMethod, SoftmaxNorm, Tracker
from spikellm.gradient import Schedule
from spikellm.hadamard import HAS_CUDA_KERNEL
from spikellm.model import load_model, load_tokenizer, package_version, source_fingerprint
from spikellm.prefix import attach_prefix
from spikellm.published import file_hash, import_fits
from spikellm.search import MAX_GRAINS, CodeFit, base2_search, gradient_search, load_fits, save_fits
from spikellm.search import search as find_codes
from spikellm.statistics import SiteStatistics

log = logging.getLogger(__name__)

# Changes when what calibrate or search write no longer means the same.
ARTIFACT_SCHEMA = 1
RESULTS_SCHEMA = 1


class Workspace:
    """What the stages share: the configuration, the artefact store, and models loaded no earlier than needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = ArtifactStore(Path(config.output_root) / "artifacts")
        self._installed: PreTrainedModel | None = None
        if config.hardware.threads is not None:
            torch.set_num_threads(config.hardware.threads)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.config.model)

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        return source_fingerprint(self.config.model)

    @cached_property
    def calibrate_inputs(self) -> dict[str, Any]:
        config = self.config
        return {
            "schema": ARTIFACT_SCHEMA,
            "model": self.model_inputs,
            "rotation": _plain(config.rotation),
            "prefix": _plain(config.prefix),
            "softmax_norm": config.snn.softmax_norm.value,
            "text": data.fingerprint(config.dataset.calibration, "dataset.calibration"),
        }

    @cached_property
    def search_inputs(self) -> dict[str, Any]:
        snn, options = self.config.snn, _plain(self.config.search)
        if options["import_file"] is not None:  # what is in the file, not where it lies
            options["import_file"] = file_hash(Path(options["import_file"]))
        return {
            "schema": ARTIFACT_SCHEMA,
            "calibrate": artifact_key(self.calibrate_inputs),
            "snn": {"T": snn.T, "grain": snn.grain, "min_grain_length": snn.min_grain_length, "coding": snn.coding.value},
            "search": options,
            "seed": self.config.seed,
        }

    def evaluate_inputs(self, network: str) -> dict[str, Any]:
        depends: dict[str, dict[str, Any]] = {
            "ann": {"model": self.model_inputs},
            "base2": {"calibrate": artifact_key(self.calibrate_inputs), "T": self.config.snn.T},
            "snn": {"search": artifact_key(self.search_inputs), "execution": self.config.snn.execution.value},
        }
        text = data.fingerprint(self.config.dataset.evaluation, "dataset.evaluation")
        return {"schema": ARTIFACT_SCHEMA, "text": text, "device": self.config.hardware.device.value, "network": network} | depends[network]

    @property
    def rotation_record(self) -> dict[str, Any]:
        kind, seed = self.config.rotation.kind.value, self.config.rotation.seed
        return {"kind": kind, "seed": seed, "hash": artifact_key({"kind": kind, "seed": seed, "model": self.model_inputs})}

    def windows(self, purpose: str) -> torch.Tensor:
        """Calibration or evaluation windows [W, L]."""
        return data.token_windows(getattr(self.config.dataset, purpose), f"dataset.{purpose}", self.tokenizer)

    def ann(self) -> PreTrainedModel:
        """The model as it was pretrained, loaded afresh."""
        return load_model(self.config.model, self.config.hardware)

    def installed(self) -> PreTrainedModel:
        """The rotated model with transparent neuron slots and no prefix yet."""
        if self._installed is None:
            model = self.ann()
            rotated = self.config.rotation.kind is RotationKind.hadamard
            if rotated:
                try:
                    rotation.rotate(model, seed=self.config.rotation.seed)
                except ValueError as error:
                    raise InputError(f"rotation.kind=hadamard with model={self.config.model.name}: {error}") from error
            if rotated:
                log.info("rotation: online transforms by %s", "fast-hadamard-transform" if HAS_CUDA_KERNEL else "matrix products")
            after = self.config.snn.softmax_norm is SoftmaxNorm.after
            conversion.install(model, rotated=rotated, normalise_after=after, query_block=self.config.hardware.query_block)
            self._installed = model
        return self._installed

    def spiking(self, fits: dict[str, CodeFit]) -> PreTrainedModel:
        """The spiking model for `fits`: prefix attached, a neuron at every site."""
        model = self.installed()
        conversion.clear(model)
        attach_prefix(model, self.calibration()[0].prefix_tokens)
        conversion.convert(model, {name: fit.table for name, fit in fits.items()}, compiled=self.config.hardware.compile)
        return model

    def release(self) -> None:
        """Drop the converted model, so that another fits into memory."""
        self._installed = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def calibration(self) -> tuple[Calibration, bool]:
        """Statistics of every site and the prefix tokens, and whether they were there already."""
        folder, cached = self.store.load_or_compute("calibrate", self.calibrate_inputs, lambda path: _calibrate(self, path))
        return Calibration.load(folder), cached

    def fits(self) -> tuple[dict[str, CodeFit], Path, bool]:
        """One code per site, the artefact's folder, and whether it was there already."""
        folder, cached = self.store.load_or_compute("search", self.search_inputs, lambda path: _search(self, path))
        return load_fits(folder / "codes.safetensors"), folder, cached


def _plain(node: Any) -> dict[str, Any]:
    """A config node in JSON types."""
    return {key: getattr(value, "value", value) for key, value in asdict(node).items()}


def _calibrate(work: Workspace, folder: Path) -> None:
    windows, model = work.windows("calibration"), work.installed()
    try:
        found = run_calibration(model, windows, work.config.prefix)
    except ValueError as error:
        raise InputError(f"calibrate with model={work.config.model.name}, dataset={work.config.dataset.name}: {error}") from error
    found.save(folder)


def _search(work: Workspace, folder: Path) -> None:
    statistics = work.calibration()[0].statistics
    start = time.perf_counter()
    fits = _find(work.config, statistics)
    every = list(fits.values())
    summary = {
        "seconds": round(time.perf_counter() - start, 3),
        "relative_mse": sum(fit.relative_error for fit in every) / len(every),
        "relative_mse_base2": sum(fit.relative_error_base2 for fit in every) / len(every),
        "worse_than_base2": sum(fit.relative_error > fit.relative_error_base2 for fit in every),
        "groups": sum(len(fit.tau) for fit in every),
        "groups_by_grain": torch.cat([fit.grain for fit in every]).bincount()[1:].tolist(),
        "groups_at_base2": sum(int(fit.fallback.sum()) for fit in every),
    }
    save_fits(folder / "codes.safetensors", fits)
    write_json(folder / "search.json", summary)


def _find(config: Config, statistics: dict[str, SiteStatistics]) -> dict[str, CodeFit]:
    """One code per site by the configured way."""
    options, snn = config.search, config.snn
    G = None if snn.grain == "auto" else int(snn.grain)
    if options.import_file is not None:
        if options.method is not SearchMethod.evolution:
            log.warning("search.method=%s has no effect: the codes come from search.import_file", options.method.value)
        return import_fits(Path(options.import_file), statistics, T=snn.T, G=G, stored_v0=options.import_v0 is ImportV0.stored)
    if options.import_v0 is not ImportV0.stored:
        log.warning("search.import_v0=%s has no effect without search.import_file", options.import_v0.value)
    if options.method is SearchMethod.base2:
        return base2_search(statistics, snn.T)
    if options.groups is Groups.site:
        statistics = {name: site.merged() for name, site in statistics.items()}
    common: dict[str, Any] = {
        "T": snn.T,
        "G": G,
        "seed": config.seed,
        "min_length": snn.min_grain_length,
        "tolerance": options.tolerance,
    }
    if options.method is SearchMethod.gradient:
        schedule = Schedule(
            outer=options.gradient_outer,
            inner=options.gradient_inner,
            samples=options.gradient_samples,
            rate=options.gradient_rate,
        )
        searches = 1 if G else min(MAX_GRAINS, max(1, snn.T // snn.min_grain_length))
        groups = sum(site.counts.shape[1] for site in statistics.values())
        with tqdm(total=searches * groups * schedule.outer, desc="search", unit="round", disable=None) as bar:
            return gradient_search(statistics, schedule=schedule, progress=bar.update, **common)
    with tqdm(total=G or MAX_GRAINS, desc="search", unit="grain", disable=None) as bar:
        return find_codes(statistics, compiled=config.hardware.compile, progress=lambda _: bar.update(), **common)


def site_row(name: str, fit: CodeFit) -> dict[str, Any]:
    """One line of sites.csv; lists have one entry per neuron group."""
    return {
        "name": name,
        "tau": fit.tau.tolist(),
        "grain": fit.grain.tolist(),
        "assignment": fit.assignment.tolist(),
        "base_d": fit.base_d.tolist(),
        "base_h": fit.base_h.tolist(),
        "base_theta": fit.base_theta.tolist(),
        "v0": fit.v0.tolist(),
        "relative_error_base2": fit.relative_error_base2,
        "relative_error": fit.relative_error,
        "firing_rate": fit.firing_rate.mean().item(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What a stage adds to results.json, and whether it was there already."""

    cached: bool
    results: dict[str, Any]
    site_rows: list[dict[str, Any]] | None = None  # for sites.csv


def calibrate(work: Workspace) -> StageOutcome:
    found, cached = work.calibration()
    record = {"sites": len(found.statistics), "prefix_tokens": found.prefix_tokens, "rotation": work.rotation_record}
    return StageOutcome(cached=cached, results=record)


def search(work: Workspace) -> StageOutcome:
    fits, folder, cached = work.fits()
    rows = [site_row(name, fit) for name, fit in fits.items()]
    return StageOutcome(cached=cached, results={"search": read_json(folder / "search.json")}, site_rows=rows)


def convert(work: Workspace) -> StageOutcome:
    def build(folder: Path) -> None:
        model = work.spiking(work.fits()[0])
        neurons = {site.name: repr(conversion.get_neuron(model, site)) for site in conversion.model_sites(model)}
        write_json(folder / "neurons.json", neurons)
        if work.config.save_model:
            checkpoint.save(model, folder / "model")
            if work.tokenizer is not None:
                work.tokenizer.save_pretrained(folder / "model")

    inputs = {"search": artifact_key(work.search_inputs), "save_model": work.config.save_model}
    folder, cached = work.store.load_or_compute("convert", inputs, build)
    return StageOutcome(cached=cached, results={"saved_model": str(folder / "model")} if work.config.save_model else {})


def evaluate(work: Workspace) -> StageOutcome:
    """Perplexity of the spiking model, of base 2 and of the pretrained model.

    In this order: the first two share the converted model, which then makes room for the third.
    """

    def ann() -> PreTrainedModel:
        work.release()
        return work.ann()

    builders: dict[str, Callable[[], PreTrainedModel]] = {
        "snn": lambda: work.spiking(work.fits()[0]),
        "base2": lambda: work.spiking(base2_search(work.calibration()[0].statistics, work.config.snn.T)),
        "ann": ann,
    }
    values: dict[str, Any] = {}
    every_cached = True
    for network, build in builders.items():

        def measure(folder: Path, network: str = network, build: Callable[[], PreTrainedModel] = build) -> None:
            windows = work.windows("evaluation")
            write_json(folder / "perplexity.json", asdict(evaluation.perplexity(build(), windows, label=network)))

        folder, cached = work.store.load_or_compute("evaluate", work.evaluate_inputs(network), measure)
        result = read_json(folder / "perplexity.json")
        every_cached = every_cached and cached
        values[network] = result.pop("value")
    perplexity = {network: values[network] for network in ("ann", "snn", "base2")} | result
    return StageOutcome(cached=every_cached, results={"perplexity": perplexity})


STAGES: dict[str, Callable[[Workspace], StageOutcome]] = {
    "calibrate": calibrate,
    "search": search,
    "convert": convert,
    "evaluate": evaluate,
}


def run_stages(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Run `config.stages` in the order of `STAGES`; the content of results.json, and the rows of sites.csv if known."""
    work = Workspace(config)
    if config.tracking.kind is not Tracker.none:
        log.warning("tracking=%s has no effect in this version: results.json and sites.csv hold the results", config.tracking.kind.value)
    results: dict[str, Any] = {
        "schema": RESULTS_SCHEMA,
        "model": config.model.name,
        "T": config.snn.T,
        "grain": config.snn.grain if config.snn.grain == "auto" else int(config.snn.grain),
        "coding": config.snn.coding.value,
        "execution": config.snn.execution.value,
        "seed": config.seed,
        "stages": {},
        "versions": versions(),
    }
    results |= _published(config)
    rows = None
    for name, stage in STAGES.items():
        if name not in config.stages:
            continue
        start = time.perf_counter()
        outcome = stage(work)
        seconds = round(time.perf_counter() - start, 3)
        results |= outcome.results
        results["stages"][name] = {"seconds": seconds, "cached": outcome.cached}
        rows = outcome.site_rows or rows
        log.info("%s: %.1f s%s", name, seconds, " (cached)" if outcome.cached else "")
    return results, rows


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


def versions() -> dict[str, str | None]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "spikellm")
    return {"python": platform.python_version()} | {name: package_version(name) for name in names}
