"""The configuration: every field with its default, unit, meaning and check. The only home of a default.

`conf/` holds deltas only. Hydra composes YAML and command line onto these dataclasses; a job turns the result into
instances once (`OmegaConf.to_object`), which runs the checks below. No DictConfig goes further, and this module imports
no torch, so that `--help` and a sweep's composition stay fast.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from spikellm.config.checks import check
from spikellm.config.choices import (
    Coding,
    Device,
    DType,
    EnergyTable,
    Execution,
    Groups,
    ImportV0,
    ModelSource,
    NetworkName,
    RotationKind,
    RotationPart,
    SearchMethod,
    SoftmaxNorm,
    Tracker,
    TrackingMode,
)
from spikellm.config.dataset import DatasetConfig
from spikellm.config.help import field_help
from spikellm.config.places import project_root

STAGE_NAMES = ("calibrate", "search", "convert", "evaluate", "diagnose", "report")
DEFAULT_STAGES = STAGE_NAMES[:4]  # a report is written at the end of a run and of a sweep anyway
DEFAULT_NETWORKS = (NetworkName.ann, NetworkName.ann_prefix, NetworkName.base2, NetworkName.snn)
MAX_T = 16
MAX_THREADS = 1024
MAX_NAME = 100  # of a name that becomes part of a path; file systems take 255 bytes [characters]
# search.spike_weight of signed digits: they have fewer spikes (a fifth, at T = 8) and smaller errors than digits 0 and 1, at T = 4 to 8.
SIGNED_SPIKE_WEIGHT = 2.5
MAX_COUNT, MAX_SEED = 2**31 - 1, 2**63 - 1  # torch takes 64-bit seeds


def path_part(name: Any) -> str:
    """`name` as the part of a path that it can be: the folder of a run, which Hydra makes before any check, stays where it belongs."""
    return re.sub(r"[^\w.+ -]|^\.", "_", str(name))[:MAX_NAME]


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = MISSING  # short name, in results and folder names
    source: ModelSource = MISSING  # where the weights come from
    path: str = MISSING  # hub id, local folder, or package:file for gguf, or architecture for random
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: DType = DType.float32  # of the weights; activations of spiking networks are float32 at least, rotation is float64
    seed: int = 0  # of the weights; source=random only
    options: dict[str, Any] = field(default_factory=dict)  # overrides of the architecture's config; source=random only

    def __post_init__(self) -> None:
        plain = self.name.isprintable() and not re.search(r"^\.|[/\\]", self.name) and 1 <= len(self.name) <= MAX_NAME
        check(plain, "model.name", repr(self.name), f"is part of a folder's name: 1 to {MAX_NAME} letters, no / or \\, no dot in front")


@dataclass(kw_only=True, slots=True)
class SpikingConfig:
    T: int = MISSING  # time steps = phases of the code [steps]
    grain: str = MISSING  # number of grains G: 1, 2, 3, .. or auto; set by the group `grain`
    min_grain_length: int = 2  # phases in a grain, at least [steps]
    coding: Coding = Coding.phase  # what a spike stands for
    max_spikes: int | None = None  # spikes of a neuron, at most; coding=few_spike only
    execution: Execution = Execution.folded  # how the network is run
    step_chunk: int | None = None  # time steps per matrix product, at most; null: all T; execution=stepped only [steps]
    max_memory_gib: float | None = None  # weights and activations, at most: lowers step_chunk; null: no bound; execution=stepped only [GiB]
    softmax_norm: SoftmaxNorm = SoftmaxNorm.after  # where attention's softmax is normalised

    def __post_init__(self) -> None:
        check(1 <= self.T <= MAX_T, "snn.T", self.T, f"takes 1 to {MAX_T} time steps")
        check(self.step_chunk is None or self.step_chunk >= 1, "snn.step_chunk", self.step_chunk, "must be at least 1 or null")
        check(self.max_memory_gib is None or self.max_memory_gib > 0, "snn.max_memory_gib", self.max_memory_gib, "must be positive or null")
        check(self.min_grain_length >= 1, "snn.min_grain_length", self.min_grain_length, "must be at least 1")
        if self.coding is Coding.few_spike:
            given = "null" if self.max_spikes is None else self.max_spikes
            check(1 <= (self.max_spikes or 0) <= self.T, "snn.max_spikes", given, f"snn.coding=few_spike takes 1 to snn.T={self.T} spikes")
        else:
            check(self.max_spikes is None, "snn.max_spikes", self.max_spikes, "goes with snn.coding=few_spike; leave it out otherwise")
        check(self.grain == "auto" or (self.grain.isdigit() and int(self.grain) > 0), "grain", self.grain, "takes 1, 2, 3 or auto")
        if self.grain != "auto":
            needed = self.min_grain_length * int(self.grain)
            check(
                needed <= self.T, "snn.T", f"{self.T} with grain={self.grain}",
                f"{self.grain} grains of at least {self.min_grain_length} phases need snn.T >= {needed}; "
                "take more time steps or fewer grains",
            )  # fmt: skip

    @property
    def grains(self) -> int | None:
        """`grain` as a number; None: auto."""
        return None if self.grain == "auto" else int(self.grain)


@dataclass(kw_only=True, slots=True)
class RotationConfig:
    kind: RotationKind = RotationKind.hadamard  # rotations that spread outliers and leave the function as it is
    parts: list[RotationPart] = field(default_factory=lambda: list(RotationPart))  # those that act; []: norms are folded alone
    seed: int = 0  # of R1's random signs

    def __post_init__(self) -> None:
        check(len(set(self.parts)) == len(self.parts), "rotation.parts", f"[{','.join(self.parts)}]", "one of them is there twice")
        self.parts.sort()

    @property
    def acting(self) -> list[RotationPart]:
        """The parts that are applied."""
        return self.parts if self.kind is RotationKind.hadamard else []


@dataclass(kw_only=True, slots=True)
class PrefixConfig:
    enabled: bool = True  # keys and values of outlier tokens before every sequence
    eta: float = 64.0  # a token is an outlier where its largest |x| exceeds eta times the median token's
    max_tokens: int = 8  # prefix tokens, at most

    def __post_init__(self) -> None:
        check(self.eta > 1, "prefix.eta", self.eta, "must exceed 1")
        check(self.max_tokens >= 1, "prefix.max_tokens", self.max_tokens, "must be at least 1; prefix.enabled=false takes none")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    device: Device = MISSING  # where the network is run
    compile: bool = True  # fuse each neuron's T steps into one pass (torch.compile)
    query_block: int = 256  # queries per block of attention; bounds memory [tokens]
    threads: int | None = None  # CPU threads; null: torch's choice

    def __post_init__(self) -> None:
        check(self.query_block >= 1, "hardware.query_block", self.query_block, "must be at least 1")
        allowed = self.threads is None or 1 <= self.threads <= MAX_THREADS
        check(allowed, "hardware.threads", self.threads, f"takes 1 to {MAX_THREADS}, or null")


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    method: SearchMethod = SearchMethod.evolution  # how the codes are found
    groups: Groups = Groups.head  # neurons that share a table
    spike_weight: float | None = None  # lambda: a squared error counts exp(lambda x mean spikes of a neuron); null: 0, phase_signed 2.5
    tolerance: float = 0.02  # grain=auto: relative excess of the error (on the choosing part of the text) that a coarser grain may have
    gradient_outer: int = 20  # method=gradient: rounds; this and the next three as the authors have them
    gradient_inner: int = 50  # method=gradient: steps of (h, theta), and as many of d, in a round
    gradient_samples: int = 100_000  # method=gradient: activations drawn for each neuron group
    gradient_rate: float = 1e-3  # method=gradient: Adam's learning rate of the bases
    import_file: str | None = None  # neuron file of the authors (.pth): its codes instead of a search
    import_v0: ImportV0 = ImportV0.stored  # initial potentials of import_file

    def __post_init__(self) -> None:
        check(self.tolerance >= 0, "search.tolerance", self.tolerance, "must not be negative")
        check(
            self.spike_weight is None or 0 <= self.spike_weight < 100,
            "search.spike_weight",
            self.spike_weight,
            "takes 0 (accuracy alone) to 100, or null",
        )
        for key in ("gradient_outer", "gradient_inner", "gradient_samples"):
            check(getattr(self, key) >= 1, f"search.{key}", getattr(self, key), "must be at least 1")
        check(self.gradient_rate > 0, "search.gradient_rate", self.gradient_rate, "must be positive")

    def weight_of_spikes(self, coding: Coding) -> float:
        """`spike_weight`, or what null stands for with a coding."""
        default = SIGNED_SPIKE_WEIGHT if coding is Coding.phase_signed else 0.0
        return default if self.spike_weight is None else self.spike_weight


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    networks: list[NetworkName] = field(default_factory=lambda: list(DEFAULT_NETWORKS))  # that are measured; the integer rivals at request

    def __post_init__(self) -> None:
        given = f"[{','.join(self.networks)}]"
        check(bool(self.networks), "evaluation.networks", given, f"name at least one of {', '.join(NetworkName)}")
        check(len(set(self.networks)) == len(self.networks), "evaluation.networks", given, "one of them is there twice")
        self.networks.sort(key=list(NetworkName).index)


@dataclass(kw_only=True, slots=True)
class DiagnosticsConfig:
    windows: int = 1  # stage diagnose: evaluation windows for the loss by kind of site, about twenty forwards each; 0: none

    def __post_init__(self) -> None:
        check(self.windows >= 0, "diagnostics.windows", self.windows, "must not be negative; 0 leaves the measurement out")


@dataclass(kw_only=True, slots=True)
class SpikesConfig:
    enabled: bool = True  # count the spikes and synaptic operations of the spiking model while evaluating it
    windows: int = 1  # of the evaluation text, the first ones; each costs about two forwards

    def __post_init__(self) -> None:
        check(self.windows >= 1, "spikes.windows", self.windows, "must be at least 1; spikes.enabled=false counts none")


@dataclass(kw_only=True, slots=True)
class EnergyConfig:
    table: EnergyTable = EnergyTable.fp32  # what an operation costs (see energy.py for the numbers and their source)
    mac_pj: float | None = None  # a multiply-accumulate; table=custom only [pJ]
    ac_pj: float | None = None  # an accumulate; table=custom only [pJ]

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
    kind: Tracker = MISSING  # where results are mirrored
    project: str = "spikellm"  # project of Weights & Biases
    entity: str | None = None  # W&B user or team; null: the key's default
    mode: TrackingMode = TrackingMode.auto  # whether runs are uploaded
    artifacts: bool = False  # also upload the codes, results.json and sites.csv as an artefact


@dataclass(kw_only=True, slots=True)
class PublishedRow:
    """Figures that were published for one T and grain."""

    T: int = MISSING  # time steps [steps]
    grain: str = MISSING  # number of grains
    figures: dict[str, float] = field(default_factory=dict)  # key of results.json -> published value, accuracies as fractions


@dataclass(kw_only=True, slots=True)
class ReferenceConfig:
    """Published figures, printed beside the measured ones. Set by `experiment=published_*`."""

    source: str | None = None  # where the figures were published
    model: str | None = None  # model.name that they belong to
    rows: list[PublishedRow] = field(default_factory=list)  # one entry per T and grain: T, grain, figures (key of results.json: value)

    def figures(self, model: str, T: int, grain: str) -> dict[str, float]:
        """Key of results.json -> published value for a job; empty where nothing was published."""
        return next((row.figures for row in self.rows if (self.model, row.T, row.grain) == (model, T, grain)), {})


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    html: bool = True  # write report.html at the end of a run; a sweep always has one
    folder: str | None = None  # run or sweep to report on; null: the newest below output_root; stages=[report] only


@dataclass(kw_only=True, slots=True)
class Config:
    model: ModelConfig = MISSING
    snn: SpikingConfig = MISSING
    dataset: DatasetConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    rotation: RotationConfig = field(default_factory=RotationConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))  # what to run; [report] alone rebuilds a report
    seed: int = 0  # of the search
    output_root: str = MISSING  # runs, sweeps and artefacts lie below it
    objective: str = "perplexity.snn"  # key of results.json that main() returns (for optimising sweepers)
    save_model: bool = False  # write the spiking model (transformers format) into the artefact of convert; results.json says where

    def __post_init__(self) -> None:
        for key, value in _numbers(self):
            if isinstance(value, float):
                check(math.isfinite(value), key, value, "must be a finite number")
            elif key.endswith("seed"):
                check(abs(value) <= MAX_SEED, key, value, f"takes {-MAX_SEED} to {MAX_SEED}")
            else:
                check(value >= 0 or key.startswith("model.options."), key, value, "must not be negative")
                check(abs(value) <= MAX_COUNT, key, value, f"is too large; at most {MAX_COUNT}")
        unknown = [stage for stage in self.stages if stage not in STAGE_NAMES]
        check(not unknown, "stages", unknown, f"known stages: {', '.join(STAGE_NAMES)}")
        check(bool(self.stages), "stages", self.stages, f"name at least one of {', '.join(STAGE_NAMES)}")
        binary = self.snn.coding is Coding.phase
        given = f"{self.search.import_file} with snn.coding={self.snn.coding.value}"
        check(binary or self.search.import_file is None, "search.import_file", given, "such a file holds codes of snn.coding=phase")
        given = f"gradient with snn.coding={self.snn.coding.value}"
        check(binary or self.search.method is not SearchMethod.gradient, "search.method", given, "it finds codes of snn.coding=phase")
        if self.dataset.zero_shot.tasks:
            self.dataset.zero_shot.scored(self.evaluation.networks)
        check(
            self.report.folder is None or self.stages == ["report"], "report.folder", self.report.folder,
            "stages=[report] rebuilds the report of an earlier run or sweep; other stages write into the run's own folder",
        )  # fmt: skip


def _numbers(node: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number below a node, with its dotted key."""
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield key, node
    parts: dict[Any, Any] = {}
    if is_dataclass(node):
        parts = {each.name: getattr(node, each.name) for each in fields(node)}
    elif isinstance(node, dict | list):
        parts = node if isinstance(node, dict) else dict(enumerate(node))
    for name, part in parts.items():
        yield from _numbers(part, f"{key}.{name}" if key else str(name))


def _refuse_unknown_keys(composed: DictConfig, prefix: str = "") -> None:
    """`+snn.steps=4` can write beside the fields of a node, where nobody would read it."""
    owner = OmegaConf.get_type(composed)
    known = [each.name for each in fields(owner)] if is_dataclass(owner) else None
    for key in map(str, composed):
        node = composed._get_node(key)
        check(known is None or key in known, f"{prefix}{key}", node, f"no such key; there is {', '.join(known or ())}")
        if isinstance(node, DictConfig) and not OmegaConf.is_missing(composed, key) and not OmegaConf.is_interpolation(composed, key):
            _refuse_unknown_keys(node, f"{prefix}{key}.")


def instantiate(composed: DictConfig) -> Config:
    """The checked configuration from what Hydra has composed.

    Raises:
        InputError, OmegaConfBaseException: an unknown key, a missing or unsuitable value.
    """
    _refuse_unknown_keys(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def tracking_options(composed: DictConfig) -> tuple[TrackingConfig, dict[str, Any]]:
    """How a job is tracked, and the configuration in plain types, which the tracker keeps: also of a job whose input is wrong."""
    _refuse_unknown_keys(composed)
    options, tree = OmegaConf.to_object(composed.tracking), OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(options, TrackingConfig)
    assert isinstance(tree, dict)
    return options, {str(key): value for key, value in tree.items()}


def register(program: str = "python main.py") -> None:
    """Make the schema and the resolvers known to Hydra, which hands them on to the processes of a sweep's jobs. Call before composing.

    Args:
        program: how the command was called.
    """
    root = str(project_root())  # of this process: a job elsewhere writes to the same place
    OmegaConf.register_new_resolver("project_root", lambda: root, replace=True)
    OmegaConf.register_new_resolver("program", lambda: program, replace=True)
    OmegaConf.register_new_resolver("path_part", path_part, replace=True)
    OmegaConf.register_new_resolver("field_help", lambda: field_help(Config), replace=True)
    ConfigStore.instance().store(name="schema", node=Config)
