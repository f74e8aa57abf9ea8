"""Which networks are measured, what beside perplexity, and where figures go.

The nodes `evaluation`, `diagnostics`, `spikes`, `energy`, `tracking`, `reference` and `report`.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from spikellm.config.checks import check
from spikellm.config.choices import EnergyTable, Tracker, TrackingMode
from spikellm.config.labels import NetworkName

DEFAULT_NETWORKS = (NetworkName.ann, NetworkName.ann_prefix, NetworkName.base2, NetworkName.snn)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Which networks stage evaluate measures."""

    networks: list[NetworkName] = field(default_factory=lambda: list(DEFAULT_NETWORKS))
    """those that are measured; the integer rivals int_static and int_token at request"""
    batch_size: int | None = None
    """windows a forward; null: as many as products gain from and memory has room for; not felt in the results but by rounding"""

    def __post_init__(self) -> None:
        given = f"[{','.join(self.networks)}]"
        check(bool(self.networks), "evaluation.networks", given, f"name at least one of {', '.join(NetworkName)}")
        check(len(set(self.networks)) == len(self.networks), "evaluation.networks", given, "one of them is there twice")
        check(self.batch_size is None or self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "must be at least 1 or null")
        self.networks.sort(key=list(NetworkName).index)


@dataclass(kw_only=True, slots=True)
class DiagnosticsConfig:
    """What stage diagnose measures by forwards of its own."""

    windows: int = 1
    """stage diagnose: evaluation windows for the loss by kind of site, about twenty forwards each; 0: none"""

    def __post_init__(self) -> None:
        check(self.windows >= 0, "diagnostics.windows", self.windows, "must not be negative; 0 leaves the measurement out")


@dataclass(kw_only=True, slots=True)
class SpikesConfig:
    """The count of spikes and synaptic operations."""

    enabled: bool = True
    """count the spikes and synaptic operations of the spiking model while evaluating it"""
    windows: int = 1
    """of the evaluation text, the first ones; each costs about two forwards"""

    def __post_init__(self) -> None:
        check(self.windows >= 1, "spikes.windows", self.windows, "must be at least 1; spikes.enabled=false counts none")


@dataclass(kw_only=True, slots=True)
class EnergyConfig:
    """What the operations of both networks cost."""

    table: EnergyTable = EnergyTable.fp32
    """what an operation costs (see energy.py for the numbers and their source)"""
    mac_pj: float | None = None
    """a multiply-accumulate; table=custom only [pJ]"""
    ac_pj: float | None = None
    """an accumulate; table=custom only [pJ]"""

    def __post_init__(self) -> None:
        custom = self.table is EnergyTable.custom
        for key, value in (("energy.mac_pj", self.mac_pj), ("energy.ac_pj", self.ac_pj)):
            cure = "energy.table=custom needs a positive cost in pJ, as in energy.mac_pj=4.6 energy.ac_pj=0.9"
            if custom:
                check(value is not None and 0 < value < float("inf"), key, "null" if value is None else value, cure)
            else:
                check(value is None, key, value, f"goes with energy.table=custom; energy.table={self.table.value} has its own")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where jobs are mirrored beside their folders."""

    kind: Tracker = MISSING
    """where results are mirrored"""
    project: str = "spikellm"
    """project of Weights & Biases"""
    entity: str | None = None
    """W&B user or team; null: the key's default"""
    mode: TrackingMode = TrackingMode.auto
    """whether runs are uploaded"""
    artifacts: bool = False
    """also upload the codes, results.json and sites.csv as an artefact"""


@dataclass(kw_only=True, slots=True)
class PublishedRow:
    """Figures that were published for one T and grain."""

    T: int = MISSING
    """time steps [steps]"""
    grain: str = MISSING
    """number of grains"""
    figures: dict[str, float] = field(default_factory=dict)
    """key of results.json -> published value, accuracies as fractions"""


@dataclass(kw_only=True, slots=True)
class ReferenceConfig:
    """Published figures, printed beside the measured ones. Set by `experiment=published_*`."""

    source: str | None = None
    """where the figures were published"""
    model: str | None = None
    """model.name that they belong to"""
    rows: list[PublishedRow] = field(default_factory=list)
    """one entry per T and grain: T, grain, figures (key of results.json: value)"""

    def figures(self, model: str, T: int, grain: str) -> dict[str, float]:
        """Key of results.json -> published value for a job; empty where nothing was published."""
        return next((row.figures for row in self.rows if (self.model, row.T, row.grain) == (model, T, grain)), {})


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """The page that people read, report.html."""

    html: bool = True
    """write report.html at the end of a run; a sweep always has one"""
    folder: str | None = None
    """run or sweep to report on; null: the newest below output_root; stages=[report] only"""
