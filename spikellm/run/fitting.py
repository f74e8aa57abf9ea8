"""The stages on the way to a spiking model.

calibrate   model, rotation, prefix, calibration text -> statistics of every site, prefix tokens
search      statistics, T, grain                      -> one code per site
weights     model, codes, calibration text            -> integer weights, where weights.rounding=gptq asks for them
convert     model, codes                              -> the spiking model (in memory; on disk with save_model=true)
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from spikellm.calibration.calibrate import Calibration, calibrate
from spikellm.calibration.rounding import round_spiking
from spikellm.config.checks import InputError
from spikellm.config.choices import Device, ImportV0, Rounding, SearchMethod
from spikellm.config.snn import PrefixConfig, RotationConfig, SearchConfig, WeightsConfig
from spikellm.model import checkpoint, integers
from spikellm.model.load import model_config
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.workspace import Workspace
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.search.methods import find_codes, search_summary, site_row
from spikellm.search.options import Options
from spikellm.search.published import configured_neurons, file_hash
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, SearchRecord, WeightsRecord

log = logging.getLogger(__name__)


class Calibrate(KeyedStage):
    """Statistics of every site, prefix tokens."""

    name = "calibrate"
    code = Code(2, ("evaluation.networks", "calibration.calibrate", "evaluation.texts"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, model, rotation, prefix options and text."""
        config = work.config
        rounded = {"weights": plain(config.weights)} if config.weights.rounds(Rounding.nearest) else {}
        return rounded | {
            "code": self.code.key(),
            "model": work.model_source,
            "rotation": plain(config.rotation),
            "prefix": plain(config.prefix),
            "softmax_norm": config.snn.softmax_norm.value,
            "text": work.calibration_source,
        }

    def prepare(self, work: Workspace) -> None:
        """Read the text, unless the artefact is there; refuse groups of weights that divide no Linear's inputs."""
        check_weights(work)
        if not self.is_done(work):
            log.debug("calibration: %d windows", len(work.calibration_windows))

    def compute(self, work: Workspace, folder: Path) -> None:
        """Calibrate the installed model, its neurons transparent, its weights rounded where that needs no codes."""
        config, windows, model = work.config, work.calibration_windows, work.models.transparent([], to_nearest(work.config.weights))
        try:
            found = calibrate(model, windows, config.prefix)
        except ValueError as error:
            raise InputError(f"calibrate with model={config.model.name}, dataset={config.dataset.name}: {error}") from error
        found.save(folder)

    def found(self, work: Workspace) -> Calibration:
        """Statistics and prefix tokens."""
        return Calibration.load(self.artefact(work).folder)

    def run(self, work: Workspace) -> StageOutcome:
        """Prefix tokens and rotation, for results.json."""
        artefact = self.artefact(work)
        found = Calibration.load(artefact.folder)
        findings = Findings(sites=len(found.statistics), prefix_tokens=found.prefix_tokens, rotation=work.rotation_record)
        return StageOutcome(artefacts=[artefact], findings=findings)


CALIBRATE = Calibrate()


class Search(KeyedStage):
    """One code per site."""

    name = "search"
    needs = (CALIBRATE,)
    code = Code(2, ("search.methods",))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, calibration and options of the search."""
        options, snn = work.options, work.config.snn
        search = plain(options.search) | {"spike_weight": options.search.weight_of_spikes(snn.coding)}
        if options.search.import_file is not None:  # what is in the file, not where it lies
            search["import_file"] = file_hash(Path(options.search.import_file))
        wanted = {
            "T": options.T,
            "grain": snn.grain,
            "min_grain_length": snn.min_grain_length,
            "coding": snn.coding.value,
            "intervals": snn.intervals,
        }
        return {
            "code": self.code.key(),
            "calibrate": CALIBRATE.key(work),
            "snn": wanted | ({} if snn.max_spikes is None else {"max_spikes": snn.max_spikes}),
            "search": search,
            "seed": options.seed,
        }

    def prepare(self, work: Workspace) -> None:
        """Name options without effect; read a neuron file that is asked for."""
        options = work.options
        for message in without_effect(options):
            log.warning("%s", message)
        if options.method == "imported" and not self.is_done(work):
            configured_neurons(options)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Find the codes of all sites."""
        device = "cpu" if work.config.hardware.device is Device.cpu else "cuda"
        statistics = {name: site.to(device) for name, site in CALIBRATE.found(work).statistics.items()}
        start = time.perf_counter()
        fits = find_codes(statistics, work.options)
        save_fits(folder / "codes.safetensors", fits)
        write_json(folder / "search.json", search_summary(fits, seconds=round(time.perf_counter() - start, 3)).to_json())

    def found(self, work: Workspace) -> dict[str, CodeFit]:
        """The codes by site name."""
        return load_fits(self.artefact(work).folder / "codes.safetensors")

    def run(self, work: Workspace) -> StageOutcome:
        """The search's summary for results.json, a row of sites.csv per site."""
        artefact = self.artefact(work)
        codes = artefact.folder / "codes.safetensors"
        rows = [site_row(name, fit) for name, fit in load_fits(codes).items()]
        summary = SearchRecord.from_json(read_json(artefact.folder / "search.json"))
        findings = Findings(sites=len(rows), search=summary, codes=str(codes))
        return StageOutcome(artefacts=[artefact], findings=findings, tables={"sites.csv": rows})


SEARCH = Search()


class Weights(KeyedStage):
    """Integer weights that were rounded against the coded inputs; a part of the stages that build the spiking model."""

    name = "weights"
    needs = (CALIBRATE, SEARCH)
    code = Code(1, ("evaluation.networks", "calibration.rounding"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes and options; the search's key stands for model and text."""
        return {"code": self.code.key(), "search": SEARCH.key(work), "device": work.device, "weights": plain(work.config.weights)}

    def dependence(self, work: Workspace) -> dict[str, object]:
        """What keys of the spiking model's figures hold of its weights beside the search's; nothing where they are as they are."""
        return {"weights": self.key(work)} if work.config.weights.rounds(Rounding.gptq) else {}

    def needed(self, work: Workspace) -> tuple[Stage, ...]:
        """None where no integers are found here."""
        return super().needed(work) if work.config.weights.rounds(Rounding.gptq) else ()

    def prepare(self, work: Workspace) -> None:
        """Refuse groups that do not divide the inputs of a Linear; name options without effect."""
        options = work.config.weights
        if options.bits is None:
            if options.group_size is not None:
                log.warning("weights.group_size=%d has no effect without weights.bits", options.group_size)
            if options.rounding is not WeightsConfig().rounding:
                log.warning("weights.rounding=%s has no effect without weights.bits", options.rounding.value)
        elif options.rounds(Rounding.gptq) and not self.is_done(work):
            log.debug("weights: %d windows", len(work.calibration_windows))
        check_weights(work)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Round the spiking model block by block."""
        options = work.config.weights
        assert options.bits is not None
        tables = {name: fit.table for name, fit in SEARCH.found(work).items()}
        model = work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens)
        try:
            found, errors = round_spiking(model, work.calibration_windows, bits=options.bits, group_size=options.group_size)
        finally:
            work.models.release()  # its weights are no longer those that it was loaded with
        integers.save_integers(folder / "integers.safetensors", found)
        write_json(folder / "errors.json", errors)

    def rounding(self, work: Workspace) -> integers.Rounding | None:
        """The integers of the spiking model; None: its weights are as they are."""
        options = work.config.weights
        if not options.rounds(Rounding.gptq):
            return to_nearest(options)
        assert options.bits is not None
        file = self.artefact(work).folder / "integers.safetensors"
        return integers.Rounding(bits=options.bits, group_size=options.group_size, file=file)

    def run(self, work: Workspace) -> StageOutcome:
        """Format and mean error for results.json; nothing where weights are as they are."""
        options = work.config.weights
        if options.bits is None:
            return StageOutcome(artefacts=[], findings=Findings())
        artefacts = [self.artefact(work)] if options.rounds(Rounding.gptq) else []
        errors = [error for artefact in artefacts for error in read_json(artefact.folder / "errors.json").values()]
        record = WeightsRecord(
            bits=options.bits,
            group_size=options.group_size,
            rounding=options.rounding.value,
            relative_error=sum(errors) / len(errors) if errors else None,
        )
        return StageOutcome(artefacts=artefacts, findings=Findings(weights=record))


WEIGHTS = Weights()


class Convert(KeyedStage):
    """The codes fit the model's sites; with save_model=true the spiking model on disk."""

    name = "convert"
    needs = (CALIBRATE, SEARCH, WEIGHTS)
    code = Code(2, ("evaluation.networks", "model.checkpoint"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes, and whether the model is saved."""
        found = {"code": self.code.key(), "search": SEARCH.key(work), "save_model": work.config.save_model}
        return found | WEIGHTS.dependence(work)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Check that codes and sites fit; save the model where it is asked for."""
        fits, places = SEARCH.found(work), CALIBRATE.found(work).statistics
        if absent := sorted(set(fits) ^ set(places)):
            raise ValueError(f"codes do not fit the model: {len(absent)} sites with a code or statistics alone, {absent[:3]}")
        write_json(folder / "neurons.json", {name: {"groups": len(fit.tau), "T": fit.assignment.shape[-1]} for name, fit in fits.items()})
        if work.config.save_model:
            checkpoint.save(spiking(work), folder / "model", rotation=work.rotation_record.to_json())
            if work.tokenizer is not None:
                work.tokenizer.save_pretrained(folder / "model")

    def run(self, work: Workspace) -> StageOutcome:
        """Where the saved model lies."""
        artefact = self.artefact(work)
        saved = str(artefact.folder / "model") if work.config.save_model else None
        weights = WEIGHTS.run(work)
        return StageOutcome(artefacts=[artefact, *weights.artefacts], findings=weights.findings | Findings(saved_model=saved))


CONVERT = Convert()


def without_effect(options: Options) -> Iterator[str]:
    """Options of the search that the configured method does not read, one message each."""
    search, coding = options.search, f"snn.coding={options.snn.coding.value}"
    other = None if search.method is SearchMethod.evolution else f"search.method={search.method.value}"
    if options.method == "classic":
        if options.snn.grain != "1":
            yield f"grain={options.snn.grain} has no effect with {coding}, which has no grains"
        if other:
            yield f"{other} has no effect with {coding}"
        return
    if options.snn.intervals not in ("1", "auto") and options.method != "evolution":
        yield f"snn.intervals={options.snn.intervals} has no effect with {other or 'search.import_file'}: there it is one interval"
    if search.spike_weight and other:
        yield f"search.spike_weight={search.spike_weight:g} has no effect with {other}"
    if options.method == "imported":
        if other:
            yield f"{other} has no effect: the codes come from search.import_file"
    elif search.import_v0 is not ImportV0.stored:
        yield f"search.import_v0={search.import_v0.value} has no effect without search.import_file"


def check_weights(work: Workspace) -> None:
    """Refuse groups of weights that do not divide the inputs of a Linear.

    Raises:
        InputError: naming what would.
    """
    options = work.config.weights
    if options.bits is None or options.group_size is None:
        return
    try:
        integers.check_groups(model_config(work.model), options.group_size)
    except ValueError as error:
        raise InputError(f"weights.group_size={options.group_size} with model={work.config.model.name}: {error}") from error


def to_nearest(options: WeightsConfig) -> integers.Rounding | None:
    """The rounding that needs no codes; None: another one, or none."""
    if not options.rounds(Rounding.nearest):
        return None
    assert options.bits is not None
    return integers.Rounding(bits=options.bits, group_size=options.group_size)


def transparent(work: Workspace) -> PreTrainedModel:
    """The rotated model with its prefix and the spiking model's weights, without neurons."""
    return work.models.transparent(CALIBRATE.found(work).prefix_tokens, WEIGHTS.rounding(work))


def spiking(work: Workspace) -> PreTrainedModel:
    """The spiking model with the codes that were found: prefix attached, a neuron at every site."""
    tables = {name: fit.table for name, fit in SEARCH.found(work).items()}
    return work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens, WEIGHTS.rounding(work))


def plain(node: RotationConfig | PrefixConfig | SearchConfig | WeightsConfig) -> dict[str, object]:
    """A config node in JSON types."""
    return {key: getattr(value, "value", value) for key, value in asdict(node).items()}
