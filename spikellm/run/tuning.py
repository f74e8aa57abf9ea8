"""The stage between codes and integer weights.

tune        model, codes, calibration text            -> codes, and weights with tune.what=all, tuned block by block

A part of the stages that build the spiking model. Finished blocks are artefacts until this one is whole: a job that was killed goes on
behind the last of them.
"""

import logging
from pathlib import Path

from spikellm.config.choices import TunedPart
from spikellm.config.snn import TuneConfig
from spikellm.model.replaced import ReplacedWeights, save_weights
from spikellm.reconstruction.tuned import by_path, load_block, retabled, save_block
from spikellm.reconstruction.tuning import tune_spiking
from spikellm.run.fitting import CALIBRATE, SEARCH, plain, to_nearest
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.workspace import Workspace
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, TuneRecord

log = logging.getLogger(__name__)

CODES, WEIGHTS, ERRORS = "codes.safetensors", "weights.safetensors", "errors.json"


class Tune(KeyedStage):
    """Codes after tuning; the search's own where there is none."""

    name = "tune"
    needs = (CALIBRATE, SEARCH)
    code = Code(2, ("evaluation.networks", "reconstruction.tuning", "reconstruction.tuned"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes and options; the search's key stands for model, text and seed."""
        options = plain(work.config.tune)
        if work.config.tune.what is TunedPart.neurons:
            del options["weight_rate"]
        return {"code": self.code.key(), "search": SEARCH.key(work), "device": work.device, "tune": options}

    def dependence(self, work: Workspace) -> dict[str, object]:
        """What keys of the spiking model's figures hold of its tuning beside the search's; nothing where there is none."""
        return {"tune": self.key(work)} if work.config.tune.epochs else {}

    def needed(self, work: Workspace) -> tuple[Stage, ...]:
        """None where nothing is tuned."""
        return super().needed(work) if work.config.tune.epochs else ()

    def prepare(self, work: Workspace) -> None:
        """Read the text, unless the artefact is there; name options without effect."""
        options, default = work.config.tune, TuneConfig()
        if options.epochs:
            if options.what is TunedPart.neurons and options.weight_rate != default.weight_rate:
                log.warning("tune.weight_rate=%g has no effect without tune.what=all", options.weight_rate)
            if not self.is_done(work):
                log.debug("tune: %d windows", len(work.calibration_windows))
            return
        for key, value in plain(options).items():
            if value != plain(default)[key]:
                log.warning("tune.%s=%s has no effect with tune.epochs=0", key, value)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Tune the spiking model block by block, behind the blocks that were finished before."""
        fits, calibration = SEARCH.found(work), CALIBRATE.found(work)
        tables = {name: fit.table for name, fit in fits.items()}
        model = work.models.spiking(tables, calibration.prefix_tokens, to_nearest(work.config.weights))
        with self.kept_blocks(work, save_block, load_block) as keep:
            try:
                found = tune_spiking(model, work.calibration_windows, work.config.tune, seed=work.config.seed, keep=keep)
            finally:
                work.models.release()  # its weights may no longer be those that it was loaded with
            tables = {name: table for block in found.values() for name, table in block.tables.items()}
            tuned = {name: retabled(fit, tables.get(name), calibration.statistics[name]) for name, fit in fits.items()}
            save_fits(folder / CODES, tuned)
            if weights := by_path(found):
                save_weights(folder / WEIGHTS, weights)
            write_json(folder / ERRORS, {layer: [block.before, block.after] for layer, block in found.items()})

    def fits(self, work: Workspace) -> dict[str, CodeFit]:
        """The codes of the spiking model, by site name."""
        return load_fits(self.artefact(work).folder / CODES) if work.config.tune.epochs else SEARCH.found(work)

    def weights(self, work: Workspace) -> ReplacedWeights | None:
        """The weights of the spiking model; None: they are not tuned."""
        if not work.config.tune.epochs:
            return None
        file = self.artefact(work).folder / WEIGHTS
        return ReplacedWeights(files=(file,)) if file.is_file() else None

    def run(self, work: Workspace) -> StageOutcome:
        """Errors before and after for results.json; nothing where nothing is tuned."""
        options = work.config.tune
        if not options.epochs:
            return StageOutcome(artefacts=[], findings=Findings())
        artefact = self.artefact(work)
        before, after = zip(*read_json(artefact.folder / ERRORS).values(), strict=True)
        record = TuneRecord(
            epochs=options.epochs,
            what=options.what.value,
            relative_error_before=sum(before) / len(before),
            relative_error=sum(after) / len(after),
            blocks=len(before),
            blocks_improved=sum(end < start for start, end in zip(before, after, strict=True)),
        )
        return StageOutcome(artefacts=[artefact], findings=Findings(tune=record))


TUNE = Tune()
