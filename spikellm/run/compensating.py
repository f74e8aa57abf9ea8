"""The stage between tuning and integer weights.

compensate  model, tuned codes, calibration text      -> weights of Linears re-fitted behind coded inputs, with compensate.enabled=true

A part of the stages that build the spiking model; finished blocks are artefacts until this one is whole.
"""

import logging
from pathlib import Path

from safetensors.torch import load_file

from spikellm.config.snn import CompensateConfig
from spikellm.model.replaced import ReplacedWeights, save_weights
from spikellm.reconstruction.compensation import compensate_spiking
from spikellm.reconstruction.tuned import by_path, load_block, save_block
from spikellm.run.fitting import CALIBRATE, SEARCH, plain
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.tuning import TUNE
from spikellm.run.workspace import Workspace
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import CompensateRecord, Findings

log = logging.getLogger(__name__)

WEIGHTS, ERRORS = "weights.safetensors", "errors.json"


class Compensate(KeyedStage):
    """Weights that make up for the errors of codes."""

    name = "compensate"
    needs = (CALIBRATE, SEARCH, TUNE)
    code = Code(1, ("evaluation.networks", "reconstruction.compensation"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes and options; the search's key stands for model and text."""
        options = {"linears": sorted(map(str, work.config.compensate.linears)), "damping": work.config.compensate.damping}
        found = {"code": self.code.key(), "search": SEARCH.key(work), "device": work.device, "compensate": options}
        return found | TUNE.dependence(work)

    def dependence(self, work: Workspace) -> dict[str, object]:
        """What keys of the spiking model's figures hold of it beside those of search and tuning; nothing where nothing is re-fitted."""
        return {"compensate": self.key(work)} if work.config.compensate.enabled else {}

    def needed(self, work: Workspace) -> tuple[Stage, ...]:
        """None where nothing is re-fitted."""
        return super().needed(work) if work.config.compensate.enabled else ()

    def prepare(self, work: Workspace) -> None:
        """Read the text, unless the artefact is there; name options without effect."""
        options, default = work.config.compensate, plain(CompensateConfig())
        if not options.enabled:
            for key, value in plain(options).items():
                if value != default[key]:
                    log.warning("compensate.%s=[%s] has no effect with compensate.enabled=false", key, ",".join(map(str, value)))
        elif not self.is_done(work):
            log.debug("compensate: %d windows", len(work.calibration_windows))

    def compute(self, work: Workspace, folder: Path) -> None:
        """Re-fit the spiking model block by block, behind the blocks that were finished before."""
        tables, tuned = {name: fit.table for name, fit in TUNE.fits(work).items()}, TUNE.weights(work)
        model = work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens)
        with self.kept_blocks(work, save_block, load_block) as keep:
            try:
                found = compensate_spiking(
                    model,
                    work.calibration_windows,
                    work.config.compensate,
                    tuned={} if tuned is None else tuned.load(),
                    keep=keep,
                )
            finally:
                work.models.release()  # its weights are no longer those that it was loaded with
            save_weights(folder / WEIGHTS, by_path(found))
            write_json(folder / ERRORS, {layer: [block.before, block.after] for layer, block in found.items()})

    def weights(self, work: Workspace) -> ReplacedWeights | None:
        """The weights of the spiking model, tuned ones among them; None: they are the ANN's."""
        tuned = TUNE.weights(work)
        if not work.config.compensate.enabled:
            return tuned
        return ReplacedWeights(files=(*(tuned.files if tuned else ()), self.artefact(work).folder / WEIGHTS))

    def run(self, work: Workspace) -> StageOutcome:
        """Errors before and after for results.json; nothing where nothing is re-fitted."""
        options = work.config.compensate
        if not options.enabled:
            return StageOutcome(artefacts=[], findings=Findings())
        artefact = self.artefact(work)
        before, after = zip(*read_json(artefact.folder / ERRORS).values(), strict=True)
        record = CompensateRecord(
            linears=[str(linear) for linear in options.linears],
            weights_refitted=len(load_file(artefact.folder / WEIGHTS)),
            relative_error_before=sum(before) / len(before),
            relative_error=sum(after) / len(after),
            blocks=len(before),
            blocks_improved=sum(end < start for start, end in zip(before, after, strict=True)),
        )
        return StageOutcome(artefacts=[artefact], findings=Findings(compensate=record))


COMPENSATE = Compensate()
