"""The stages from codes to the spiking model.

weights     model, tuned codes, weights, text         -> integer weights, where weights.rounding=gptq asks for them
convert     model, tuned codes, weights               -> the spiking model (in memory; on disk with save_model=true)
"""

import logging
from pathlib import Path

from spikellm.config.choices import Rounding
from spikellm.config.snn import WeightsConfig
from spikellm.model import integers
from spikellm.model.pretrained import PreTrainedModel
from spikellm.reconstruction.rounding import round_spiking
from spikellm.run.compensating import COMPENSATE
from spikellm.run.fitting import CALIBRATE, SEARCH, check_weights, plain, to_nearest
from spikellm.run.saving import provenance
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.tuning import TUNE
from spikellm.run.workspace import Workspace
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, WeightsRecord

log = logging.getLogger(__name__)


class Weights(KeyedStage):
    """Integer weights that were rounded against the coded inputs; a part of the stages that build the spiking model."""

    name = "weights"
    needs = (CALIBRATE, SEARCH, TUNE, COMPENSATE)
    code = Code(2, ("evaluation.networks", "reconstruction.rounding"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes and options; the search's key stands for model and text."""
        found = {"code": self.code.key(), "search": SEARCH.key(work), "device": work.device, "weights": plain(work.config.weights)}
        return found | TUNE.dependence(work) | COMPENSATE.dependence(work)

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
        tables = {name: fit.table for name, fit in TUNE.fits(work).items()}
        model = work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens, COMPENSATE.weights(work))
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
CHANGES = (TUNE, COMPENSATE, WEIGHTS)  # what may change codes and weights behind the search


def dependence(work: Workspace) -> dict[str, object]:
    """What keys of the spiking model's figures hold beside the search's: a key for each of CHANGES that acts."""
    return {name: key for stage in CHANGES for name, key in stage.dependence(work).items()}


def changed(work: Workspace) -> StageOutcome:
    """What CHANGES have found."""
    outcomes = [stage.run(work) for stage in CHANGES]
    findings = Findings()
    for outcome in outcomes:
        findings |= outcome.findings
    return StageOutcome(artefacts=[artefact for outcome in outcomes for artefact in outcome.artefacts], findings=findings)


class Convert(KeyedStage):
    """The codes fit the model's sites; with save_model=true the spiking model on disk."""

    name = "convert"
    needs = (CALIBRATE, SEARCH, *CHANGES)
    code = Code(3, ("evaluation.networks", "model.checkpoint"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """Code, codes, and whether the model is saved; then what it is called, which stands in it."""
        found = {"code": self.code.key(), "search": SEARCH.key(work), "save_model": work.config.save_model}
        if work.config.save_model:
            found |= {"name": work.config.model.name, "path": work.config.model.path}
        return found | dependence(work)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Check that codes and sites fit; save the model where it is asked for."""
        fits, places = TUNE.fits(work), CALIBRATE.found(work).statistics
        if absent := sorted(set(fits) ^ set(places)):
            raise ValueError(f"codes do not fit the model: {len(absent)} sites with a code or statistics alone, {absent[:3]}")
        write_json(folder / "neurons.json", {name: {"groups": len(fit.tau), "T": fit.assignment.shape[-1]} for name, fit in fits.items()})
        if work.config.save_model:
            from spikellm.model import checkpoint  # subclasses of transformers' model, see `pretrained.py`

            made = provenance(work, fits, changed(work).findings)
            checkpoint.save(spiking(work), folder / "model", provenance=made, tokenizer=work.tokenizer)

    def run(self, work: Workspace) -> StageOutcome:
        """Where the saved model lies."""
        artefact = self.artefact(work)
        saved = str(artefact.folder / "model") if work.config.save_model else None
        behind = changed(work)
        return StageOutcome(artefacts=[artefact, *behind.artefacts], findings=behind.findings | Findings(saved_model=saved))


CONVERT = Convert()


def transparent(work: Workspace) -> PreTrainedModel:
    """The rotated model with its prefix and the spiking model's weights, without neurons."""
    return work.models.transparent(CALIBRATE.found(work).prefix_tokens, WEIGHTS.rounding(work) or COMPENSATE.weights(work))


def spiking(work: Workspace) -> PreTrainedModel:
    """The spiking model with the codes that were found: prefix attached, a neuron at every site."""
    tables = {name: fit.table for name, fit in TUNE.fits(work).items()}
    return work.models.spiking(tables, CALIBRATE.found(work).prefix_tokens, WEIGHTS.rounding(work) or COMPENSATE.weights(work))
