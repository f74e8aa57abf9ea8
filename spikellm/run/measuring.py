"""The stages that measure networks.

evaluate    models, evaluation texts, benchmarks      -> perplexities, zero-shot accuracies, spikes, energy
diagnose    statistics, codes, evaluation text        -> distance to the Lloyd-Max bound, damage by kind of site, plots
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Execution, Groups
from spikellm.config.extras import require
from spikellm.config.labels import NetworkName
from spikellm.evaluation import diagnostics, figures
from spikellm.evaluation.density_plots import write_density_plots
from spikellm.evaluation.measured import measured_networks
from spikellm.model.pretrained import PreTrainedModel
from spikellm.run.compensating import COMPENSATE
from spikellm.run.converting import CHANGES, WEIGHTS, changed, dependence, spiking, transparent
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.tuning import TUNE
from spikellm.run.workspace import Workspace
from spikellm.spikes import accounts, ledger
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import DiagnosticsRecord, Findings

log = logging.getLogger(__name__)


class Spikes(KeyedStage):
    """Spikes and energy of the spiking model, the rows of spikes.csv; a part of evaluate."""

    name = "spikes"
    needs: ClassVar[tuple[Stage, ...]] = (CALIBRATE, SEARCH, *CHANGES)
    code = Code(3, ("evaluation.networks", "spikes.ledger"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """What the folded network is made of, and the windows."""
        return self.depends(work) | {"code": self.code.key(), "windows": work.config.spikes.windows}

    def depends(self, work: Workspace) -> dict[str, object]:
        """What figures of the folded network depend on."""
        return folded_figures(work)

    def network(self, work: Workspace) -> PreTrainedModel:
        """The spiking model."""
        return spiking(work)

    def compute(self, work: Workspace, folder: Path) -> None:
        """Count spikes and synaptic operations on the windows."""
        windows = work.evaluation_windows[: work.config.spikes.windows]
        write_json(folder / "ledger.json", ledger.count(self.network(work), windows).to_json())

    def run(self, work: Workspace) -> StageOutcome:
        """Spikes and energy for results.json, a row of spikes.csv per site."""
        artefact = self.artefact(work)
        found, wanted = ledger.Ledger.from_json(read_json(artefact.folder / "ledger.json")), work.config.spikes.windows
        if found.windows < wanted:
            log.warning("spikes.windows=%d: the evaluation text has %d", wanted, found.windows)
        table, by_head, weights = accounts.cost_table(work.config.energy), work.config.search.groups is Groups.head, work.config.weights
        rivals = accounts.rivals_energy(found, table, work.config.evaluation.networks, by_head=by_head)
        findings = Findings(
            spikes=accounts.spikes_record(found, weights), energy=accounts.energy_record(found, table, rivals=rivals, weights=weights)
        )
        return StageOutcome(artefacts=[artefact], findings=findings, tables={"spikes.csv": accounts.spike_rows(found)})


SPIKES = Spikes()


class Evaluate(Stage):
    """Spikes and energy of the spiking model; perplexities and accuracies of all networks, an artefact each."""

    name = "evaluate"
    needs: ClassVar[tuple[Stage, ...]] = (CALIBRATE, SEARCH, *CHANGES)
    spikes: ClassVar[Spikes] = SPIKES

    def networks(self, work: Workspace) -> list[figures.Network]:
        """The networks that are to be measured, none loaded yet."""
        keys = {"model": work.model_source, "calibrate": CALIBRATE.key(work), "search": SEARCH.key(work)}
        return measured_networks(
            work.config.evaluation.networks,
            work.models,
            work.options,
            keys | dependence(work),
            lambda: CALIBRATE.found(work),
            lambda: TUNE.fits(work),
            lambda: WEIGHTS.rounding(work),
            lambda: COMPENSATE.weights(work),
        )

    def prepare(self, work: Workspace) -> None:
        """Name options without effect; read texts and benchmarks that are not measured yet."""
        snn = work.config.snn
        for key in ("step_chunk", "max_memory_gib"):
            if snn.execution is Execution.folded and (value := getattr(snn, key)) is not None:
                log.warning("snn.%s=%s has no effect with snn.execution=folded", key, value)
        if snn.execution is Execution.stepped and NetworkName.snn not in work.config.evaluation.networks:
            log.warning("snn.execution=stepped has no effect without snn in evaluation.networks")
        figures.prepare(work.config.dataset, lambda: work.tokenizer, work.store, self.networks(work), work.benchmarks)

    def run(self, work: Workspace) -> StageOutcome:
        """Figures of all networks for results.json."""
        counted = self.spikes.run(work) if work.config.spikes.enabled else StageOutcome(artefacts=[], findings=Findings())
        config, networks = work.config, self.networks(work)
        findings, artefacts = figures.evaluate(
            config.dataset, lambda: work.tokenizer, work.store, networks, work.benchmarks, batch_size=config.evaluation.batch_size
        )
        made = self.conversion(work)
        return StageOutcome(
            artefacts=artefacts + counted.artefacts + made.artefacts,
            findings=findings | counted.findings | made.findings,
            tables=counted.tables,
        )

    def conversion(self, work: Workspace) -> StageOutcome:
        """What there is to say of how the spiking model was made."""
        return changed(work)


EVALUATE = Evaluate()


class Diagnose(KeyedStage):
    """How far each code is above the Lloyd-Max bound, which sites do the damage, levels drawn on densities."""

    name = "diagnose"
    needs: ClassVar[tuple[Stage, ...]] = (CALIBRATE, SEARCH, *CHANGES)
    code = Code(3, ("evaluation.networks", "evaluation.diagnostics", "evaluation.density_plots"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """What the folded network is made of, and the windows."""
        return self.depends(work) | {"code": self.code.key(), "windows": work.config.diagnostics.windows}

    def depends(self, work: Workspace) -> dict[str, object]:
        """What figures of the folded network depend on."""
        return folded_figures(work)

    def prepare(self, work: Workspace) -> None:
        """Refuse without matplotlib; read the text, unless the artefact is there."""
        require("stages=[diagnose]", "matplotlib")
        if work.config.diagnostics.windows and not self.is_done(work):
            log.debug("evaluation: %d windows", len(work.evaluation_windows))

    def compute(self, work: Workspace, folder: Path) -> None:
        """Compare the codes with the Lloyd-Max bound, measure the damage, draw levels on densities."""
        fits, statistics = TUNE.fits(work), CALIBRATE.found(work).statistics
        record: dict[str, Any] = {"sites": diagnostics.site_rows(statistics, fits)}
        write_density_plots(folder / "plots", statistics, fits, amplitude=work.config.snn.amplitude)
        tables, errors = {name: fit.table for name, fit in fits.items()}, {name: fit.relative_error for name, fit in fits.items()}
        write_json(folder / "diagnostics.json", record | self.damage(work, lambda: transparent(work), tables, errors))

    def damage(
        self, work: Workspace, network: Callable[[], PreTrainedModel], tables: dict[str, PhaseTable], errors: dict[str, float]
    ) -> dict[str, Any]:
        """Perplexities of the network with some of its codes; nothing where no windows are asked for."""
        config, count = work.config, work.config.diagnostics.windows
        if not count:
            return {}
        windows = work.evaluation_windows[:count]
        by_kind, by_site = diagnostics.damage(
            network(), tables, errors, windows, amplitude=config.snn.amplitude, compiled=config.hardware.fused
        )
        return {"damage": {"perplexity_by_kind": by_kind, "perplexity_by_site": by_site}}

    def run(self, work: Workspace) -> StageOutcome:
        """Damage and median excess over the bound for results.json, a row of diagnostics.csv per site, plots."""
        artefact = self.artefact(work)
        record = read_json(artefact.folder / "diagnostics.json")
        rows = record["sites"]
        above = sorted(row["above_bound"] for row in rows if row["above_bound"] is not None)
        found = DiagnosticsRecord(**record.get("damage", {}), median_above_bound=above[len(above) // 2] if above else None)
        plots = sorted((artefact.folder / "plots").glob("*.png"))
        tables = {"diagnostics.csv": rows} if rows else {}
        return StageOutcome(artefacts=[artefact], findings=Findings(diagnostics=found), tables=tables, plots=plots)


DIAGNOSE = Diagnose()


def folded_figures(work: Workspace) -> dict[str, object]:
    """What figures of the folded spiking model on the main evaluation text depend on."""
    return dependence(work) | {"search": SEARCH.key(work), "device": work.device, "text": work.evaluation_source}
