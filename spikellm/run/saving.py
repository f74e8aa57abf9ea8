"""What is written into a saved spiking model of how it was made."""

from pathlib import Path

from spikellm.config.choices import ModelSource
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.workspace import Workspace
from spikellm.search.fit import CodeFit
from spikellm.store.provenance import versions
from spikellm.store.record import Findings
from spikellm.store.saved import CONVERTING, Provenance, conversion_options
from spikellm.store.sources import fingerprint


def provenance(work: Workspace, fits: dict[str, CodeFit], findings: Findings) -> Provenance:
    """How the spiking model of a job is made.

    Args:
        fits: its codes.
        findings: of tuning, compensation and integer weights.
    """
    config, model = work.config, work.model
    return Provenance(
        model=model.name,
        path=Path(model.path).resolve().name if Path(model.path).is_dir() else model.path,
        revision=model.revision if model.source is ModelSource.hub else None,
        source=fingerprint(work.model_source),
        calibration=fingerprint(work.calibration_source),
        prefix_tokens=CALIBRATE.found(work).prefix_tokens,
        options=conversion_options({name: getattr(config, name) for name in CONVERTING}, config.seed),
        rotation=CALIBRATE.rotation(work),
        search=SEARCH.run(work).findings.search,
        relative_error={name: fit.relative_error for name, fit in fits.items()},
        tune=findings.tune,
        compensate=findings.compensate,
        weights=findings.weights,
        versions=versions(),
    )
