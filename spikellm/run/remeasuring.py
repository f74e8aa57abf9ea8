"""The stages that measure a saved spiking model: those of `measuring.py`, the network being the one in the folder.

There is no calibration text and no pretrained model: what compares with them (base 2, integer rivals, bounds, densities) is left to the
run that converts. Without its neurons the saved model is the pretrained one behind the prefix, which ratios are taken to.
"""

from pathlib import Path
from typing import Any, ClassVar

from spikellm.config.checks import InputError
from spikellm.config.labels import NetworkName
from spikellm.evaluation.figures import Network
from spikellm.evaluation.measured import saved_networks
from spikellm.model.pretrained import PreTrainedModel
from spikellm.run.generating import Generate
from spikellm.run.measuring import Diagnose, Evaluate, Spikes
from spikellm.run.stage import Stage, StageOutcome
from spikellm.run.workspace import Workspace
from spikellm.store.artifacts import write_json
from spikellm.store.record import Findings
from spikellm.store.saved import CONVERTING, check, conversion_options


class SavedSpikes(Spikes):
    """Spikes and energy of the saved model."""

    needs: ClassVar[tuple[Stage, ...]] = ()

    def depends(self, work: Workspace) -> dict[str, object]:
        """The model and the text."""
        return saved_figures(work)

    def network(self, work: Workspace) -> PreTrainedModel:
        """The model as it was saved."""
        return work.saved.spiking()


class SavedEvaluate(Evaluate):
    """Perplexities and accuracies of the saved model."""

    needs: ClassVar[tuple[Stage, ...]] = ()
    spikes = SavedSpikes()

    def networks(self, work: Workspace) -> list[Network]:
        """The model with and without its neurons."""
        made = work.provenance
        return saved_networks(work.config.evaluation.networks, work.saved, work.config.snn, work.model_source, made.prefix_tokens)

    def prepare(self, work: Workspace) -> None:
        """Refuse a folder that was changed, and networks that it does not hold."""
        check_saved(work)
        known = [NetworkName.ann_prefix, NetworkName.snn] if work.provenance.keeps_weights else [NetworkName.snn]
        asked = work.config.evaluation.networks
        if other := [name for name in asked if name not in known]:
            raise InputError(
                f"evaluation.networks=[{','.join(asked)}]: {work.config.model.path} is a saved model and holds {', '.join(known)}; "
                f"{other[0]} takes the run that converts"
            )
        super().prepare(work)

    def conversion(self, work: Workspace) -> StageOutcome:
        """What the folder says of how the model was made."""
        made, config = work.provenance, work.config
        findings = Findings(
            sites=len(made.relative_error),
            prefix_tokens=made.prefix_tokens,
            rotation=made.rotation,
            search=made.search,
            tune=made.tune,
            compensate=made.compensate,
            weights=made.weights,
            saved_model=config.model.path if config.save_model else None,
        )
        return StageOutcome(artefacts=[], findings=findings)


class SavedDiagnose(Diagnose):
    """Which sites of the saved model do the damage."""

    needs: ClassVar[tuple[Stage, ...]] = ()

    def depends(self, work: Workspace) -> dict[str, object]:
        """The model and the text."""
        return saved_figures(work)

    def prepare(self, work: Workspace) -> None:
        """Refuse a folder that was changed, and a job that would measure nothing."""
        check_saved(work)
        if not work.config.diagnostics.windows:
            raise InputError("diagnostics.windows=0: of a saved model the damage is all that can be diagnosed; take at least 1")
        super().prepare(work)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Measure the damage."""
        record: dict[str, Any] = {"sites": []}
        found = self.damage(work, work.saved.transparent, work.saved.tables, work.provenance.relative_error)
        write_json(folder / "diagnostics.json", record | found)


class SavedGenerate(Generate):
    """Texts that the saved model writes behind prompts."""

    needs: ClassVar[tuple[Stage, ...]] = ()

    def depends(self, work: Workspace) -> dict[str, object]:
        """The model."""
        return {"model": work.model_source, "device": work.device}

    def network(self, work: Workspace) -> PreTrainedModel:
        """The model as it was saved."""
        return work.saved.spiking()

    def prefix_tokens(self, work: Workspace) -> list[int]:
        """Those that were saved with it."""
        return work.provenance.prefix_tokens

    def prepare(self, work: Workspace) -> None:
        """Refuse a folder that was changed, and what the stage refuses of any model."""
        check_saved(work)
        super().prepare(work)


SAVED_STAGES: dict[str, Stage] = {stage.name: stage for stage in (SavedEvaluate(), SavedDiagnose(), SavedGenerate())}


def saved_figures(work: Workspace) -> dict[str, object]:
    """What figures of the folded saved model on the main evaluation text depend on."""
    return {"model": work.model_source, "device": work.device, "text": work.evaluation_source}


def check_saved(work: Workspace) -> None:
    """Refuse a folder that is not as it was saved, and options that are not those of its conversion.

    Raises:
        InputError: naming file or option.
    """
    config = work.config
    made = work.provenance  # tells a newer version before files of that version are looked at
    check(Path(config.model.path), digest=work.store.digests.of)
    found = conversion_options({name: getattr(config, name) for name in CONVERTING}, config.seed)
    for key, value in found.items():
        if key in made.options and value != made.options[key]:
            raise InputError(f"{key}={value}: {config.model.path} is a spiking model of {key}={made.options[key]}; leave the option out")
