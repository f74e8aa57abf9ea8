"""The configuration as a whole: its nodes, the checks across them, and how Hydra comes to know it.

A node's dataclass, here or in a file beside, is the only home of a field's default, unit, meaning and check; `conf/` holds
deltas only. Hydra composes YAML and command line onto these dataclasses; a job turns the result into instances once
(`OmegaConf.to_object`), which runs the checks. No DictConfig goes further, and the room imports no torch, so that `--help`
and a sweep's composition stay fast.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from spikellm.config.checks import check
from spikellm.config.choices import Amplitude, Coding, DType, SearchMethod, own_coding
from spikellm.config.dataset import DatasetConfig
from spikellm.config.generate import GenerateConfig
from spikellm.config.help import field_help
from spikellm.config.labels import NetworkName
from spikellm.config.measures import (
    DiagnosticsConfig,
    EnergyConfig,
    EvaluationConfig,
    ReferenceConfig,
    ReportConfig,
    SpikesConfig,
    TrackingConfig,
)
from spikellm.config.model import HardwareConfig, ModelConfig, path_part
from spikellm.config.places import project_root
from spikellm.config.snn import (
    CompensateConfig,
    PrefixConfig,
    RotationConfig,
    SearchConfig,
    SpikingConfig,
    TuneConfig,
    WeightsConfig,
    check_compensation,
    check_tuning,
)

STAGE_NAMES = ("calibrate", "search", "convert", "evaluate", "diagnose", "generate", "report")
DEFAULT_STAGES = STAGE_NAMES[:4]  # a report is written at the end of a run and of a sweep anyway
MAX_COUNT, MAX_SEED = 2**31 - 1, 2**63 - 1  # torch takes 64-bit seeds


@dataclass(kw_only=True, slots=True)
class Config:
    """All that a job is told; each node is documented in its own class."""

    model: ModelConfig = MISSING
    snn: SpikingConfig = MISSING
    dataset: DatasetConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    rotation: RotationConfig = field(default_factory=RotationConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    compensate: CompensateConfig = field(default_factory=CompensateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    """what to run; [report] alone rebuilds a report"""
    seed: int = 0
    """of the search"""
    output_root: str = MISSING
    """runs, sweeps and artefacts lie below it"""
    objective: str = "perplexity.snn"
    """key of results.json that main() returns (for optimising sweepers)"""
    save_model: bool = False
    """write the spiking model into the run's folder, `model/`: transformers' format, with a model card"""
    plan: bool = False
    """print what the run would read, hold and take on this machine, and stop"""

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
        check(binary or self.search.import_file is None, "search.import_file", given, "such a file holds codes of snn.coding=phase: add it")
        given = f"gradient with snn.coding={self.snn.coding.value}"
        check(
            binary or self.search.method is not SearchMethod.gradient,
            "search.method",
            given,
            "its codes are those of snn.coding=phase: add it",
        )
        static = self.snn.amplitude is Amplitude.static
        given = f"{self.search.import_file} with snn.amplitude={self.snn.amplitude.value}"
        cure = "tau in such a file is that of all tokens: leave snn.amplitude out"
        check(static or self.search.import_file is None, "search.import_file", given, cure)
        given = f"[{','.join(name.value for name in self.evaluation.networks)}] with snn.amplitude={self.snn.amplitude.value}"
        cure = "calibration then leaves nothing to fit levels of all tokens to: leave int_static out, or snn.amplitude"
        check(static or NetworkName.int_static not in self.evaluation.networks, "evaluation.networks", given, cure)
        narrow = self.weights.bits is not None and self.model.dtype in (DType.bfloat16, DType.float16)
        given = f"true with weights.bits={self.weights.bits}, model.dtype={self.model.dtype.value}"
        check(not (self.save_model and narrow), "save_model", given, "a checkpoint holds integers times scales, exact from float32 on")
        check_tuning(self.tune, self.snn.coding, self.weights)
        check_compensation(self.compensate, self.weights)
        if self.dataset.zero_shot.tasks:
            self.dataset.zero_shot.scored(self.evaluation.networks)
        check(
            self.report.folder is None or self.stages == ["report"], "report.folder", self.report.folder,
            "stages=[report] rebuilds the report of an earlier run or sweep; other stages write into the run's own folder",
        )  # fmt: skip


def _numbers(node: object, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number below a node, with its dotted key."""
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield key, node
    parts: dict[object, object] = {}
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


def tracking_options(composed: DictConfig) -> tuple[TrackingConfig, dict[str, object]]:
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
    OmegaConf.register_new_resolver("own_coding", own_coding, replace=True)
    OmegaConf.register_new_resolver("field_help", lambda: field_help(Config), replace=True)
    ConfigStore.instance().store(name="schema", node=Config)
