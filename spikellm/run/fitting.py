"""The stages from the model to codes.

calibrate   model, rotation, prefix, calibration text -> statistics of every site, prefix tokens
search      statistics, T, grain                      -> one code per site; search.sequential=true: from model and text again
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikellm.calibration.calibrate import Calibration, calibrate, load_block, save_block
from spikellm.config.checks import InputError
from spikellm.config.choices import Amplitude, Device, ImportV0, Rounding, SearchMethod
from spikellm.config.generate import GenerateConfig
from spikellm.config.snn import CompensateConfig, PrefixConfig, RotationConfig, SearchConfig, TuneConfig, WeightsConfig
from spikellm.model import integers
from spikellm.model.load import model_config
from spikellm.model.passage import Keep, kept_passage, not_kept
from spikellm.model.rotation import orders
from spikellm.reconstruction.sequential import fit_sequentially
from spikellm.run.stage import KeyedStage, StageOutcome
from spikellm.run.workspace import Workspace
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.search.methods import find_codes, search_summary, site_row
from spikellm.search.options import Options
from spikellm.search.published import configured_neurons, file_hash
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, RotationRecord, SearchRecord
from spikellm.store.saved import rotation_record

log = logging.getLogger(__name__)

ROTATION = "rotation.json"


class Calibrate(KeyedStage):
    """Statistics of every site, prefix tokens."""

    name = "calibrate"
    code = Code(3, ("evaluation.networks", "calibration.calibrate", "evaluation.texts"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, model, rotation, prefix options and text."""
        config = work.config
        rounded = {"weights": plain(config.weights)} if config.weights.rounds(Rounding.nearest) else {}
        # statistics of neurons with static amplitudes are named as ever
        observed = {} if config.snn.amplitude is Amplitude.static else {"amplitude": config.snn.amplitude.value}
        return (rounded | observed) | {
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
        with ExitStack() as within:
            keep: Keep[Calibration] = not_kept
            passage = None
            if work.models.offloaded:  # where a block takes longer than it does to keep what it gave
                keep = within.enter_context(self.kept_blocks(work, save_block, load_block))
                passage = within.enter_context(kept_passage(work.store, f"{self.name}_states", self.inputs(work)))
            try:
                found = calibrate(model, windows, config.prefix, amplitude=config.snn.amplitude, keep=keep, passage=passage)
            except ValueError as error:
                raise InputError(f"calibrate with model={config.model.name}, dataset={config.dataset.name}: {error}") from error
            found.save(folder)
            write_json(folder / ROTATION, orders(model.config, config.rotation.acting))

    def rotation(self, work: Workspace) -> RotationRecord:
        """Which rotation, by which matrices: without the model, whose configuration can take seconds to read."""
        return rotation_record(work.config.rotation, read_json(self.artefact(work).folder / ROTATION), {"model": work.model_source})

    def found(self, work: Workspace) -> Calibration:
        """Statistics and prefix tokens."""
        return Calibration.load(self.artefact(work).folder)

    def run(self, work: Workspace) -> StageOutcome:
        """Prefix tokens and rotation, for results.json."""
        artefact = self.artefact(work)
        found = Calibration.load(artefact.folder)
        findings = Findings(sites=len(found.statistics), prefix_tokens=found.prefix_tokens, rotation=self.rotation(work))
        return StageOutcome(artefacts=[artefact], findings=findings)


CALIBRATE = Calibrate()


SEQUENTIAL = Code(1, ("evaluation.networks", "reconstruction.sequential"))


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
        del search["sequential"]
        stream = {"sequential": SEQUENTIAL.key(), "device": work.device} if is_sequential(options) else {}
        return stream | {
            "code": self.code.key(),
            "calibrate": CALIBRATE.key(work),
            "snn": wanted | ({} if snn.max_spikes is None else {"max_spikes": snn.max_spikes}),
            "search": search,
            "seed": options.seed,
        }

    def prepare(self, work: Workspace) -> None:
        """Name options without effect; read a neuron file, or a text again, that is asked for."""
        options = work.options
        for message in without_effect(options):
            log.warning("%s", message)
        if self.is_done(work):
            return
        if options.method == "imported":
            configured_neurons(options)
        elif is_sequential(options):
            log.debug("search: %d windows", len(work.calibration_windows))

    def compute(self, work: Workspace, folder: Path) -> None:
        """Find the codes of all sites."""
        start = time.perf_counter()
        with self.kept_blocks(work, save_fits, load_fits) as keep:
            fits = self._sequentially(work, keep) if is_sequential(work.options) else self._at_once(work)
            save_fits(folder / "codes.safetensors", fits)
            write_json(folder / "search.json", search_summary(fits, seconds=round(time.perf_counter() - start, 3)).to_json())

    def _at_once(self, work: Workspace) -> dict[str, CodeFit]:
        device = "cpu" if work.config.hardware.device is Device.cpu else "cuda"
        return find_codes({name: site.to(device) for name, site in CALIBRATE.found(work).statistics.items()}, work.options)

    def _sequentially(self, work: Workspace, keep: Keep[dict[str, CodeFit]]) -> dict[str, CodeFit]:
        model = work.models.transparent(CALIBRATE.found(work).prefix_tokens, to_nearest(work.config.weights))
        try:
            return fit_sequentially(model, work.calibration_windows, work.options, keep)
        except ValueError as error:
            raise InputError(f"search.sequential=true with model={work.config.model.name}: {error}") from error

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


def is_sequential(options: Options) -> bool:
    """Whether codes are fitted on the spiking stream."""
    return options.search.sequential and options.method != "imported"


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
        for ineffective in (other, "search.sequential=true" if search.sequential else None):
            if ineffective:
                yield f"{ineffective} has no effect: the codes come from search.import_file"
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


def plain(
    node: RotationConfig | PrefixConfig | SearchConfig | WeightsConfig | TuneConfig | CompensateConfig | GenerateConfig,
) -> dict[str, Any]:
    """A config node in JSON types."""
    return {key: getattr(value, "value", value) for key, value in asdict(node).items()}
