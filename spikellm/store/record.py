"""What results.json holds, section by section: who computes a figure builds its record here, who shows one reads it.

A field without a default is in every file of this schema. One with the default None is left out of the file where it is None, and is None
where a file lacks it: the section of a stage that did not run, a fact that older versions did not write. A new fact is a new field of that
kind; a field keeps its meaning. Units are in the names, or said in the README.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

Row = dict[str, Any]  # a line of a csv file: column -> number, text, list or None


@dataclass(frozen=True)
class Record:
    """A JSON object."""

    def to_json(self) -> dict[str, Any]:
        """In JSON types; a field that may be absent and is None is left out."""
        found = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: _plain(value) for field, value in found if value is not None or field.default is MISSING}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """The record that a file holds; what this version does not know is passed over.

        Raises:
            ValueError: no object, or a field is missing that every version has written.
        """
        if not isinstance(found, dict):
            raise ValueError(f"{cls.__name__}: found {type(found).__name__}, not an object")
        known = {field.name: field for field in fields(cls)}
        if missing := [name for name, field in known.items() if field.default is MISSING and name not in found]:
            raise ValueError(f"{cls.__name__}: {', '.join(missing)} missing")
        hints = get_type_hints(cls)
        return cls(**{name: _typed(hints[name], found[name]) for name in known if name in found})


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _typed(kind: Any, value: Any) -> Any:
    """`value` of a file with the records of which `kind`, a type hint, speaks."""
    if value is None:
        return None
    if get_origin(kind) in (Union, UnionType):
        records = [each for each in get_args(kind) if each is not type(None)]
        return _typed(records[0], value) if len(records) == 1 else value
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _typed(get_args(kind)[1], each) for key, each in value.items()}
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], each) for each in value]
    return kind.from_json(value) if isinstance(kind, type) and issubclass(kind, Record) else value


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """What a stage took."""

    seconds: float
    cached: bool  # all of it was in the store
    versions: dict[str, str] | None = None  # that computed it, by library
    memory_gib: float | None = None  # of the process, at most; None: not known
    device_gib: float | None = None  # tensors on the GPU, at most; None: there is none


@dataclass(frozen=True, kw_only=True)
class PlannedStage(Record):
    """What a stage will take, as it was told before."""

    seconds: float
    reads_gib: float
    writes_gib: float
    memory_gib: float  # of the process, at most
    device_gib: float | None = None  # on the GPU, at most; None: the CPU computes


@dataclass(frozen=True, kw_only=True)
class PlanRecord(Record):
    """A run as it was planned: the stages, and the machine that it was planned for."""

    stages: dict[str, PlannedStage]
    offload: bool  # decoder layers stay on disk
    weights_gib: float  # of the pretrained model
    disk_gib: float  # that the run leaves there
    disk_free_gib: float
    memory_free_gib: float
    device_free_gib: float | None = None
    threads: int
    products_gflops: float  # float32 matrix products
    copying_gib_per_s: float
    reading_gib_per_s: float

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())


@dataclass(frozen=True, kw_only=True)
class ReferenceRecord(Record):
    """Published figures by the dotted key of the measured one."""

    source: str | None  # where they were published
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RotationRecord(Record):
    """Which rotation, and a hash that tells it from any other."""

    kind: str
    seed: int
    parts: list[str] | None = None  # that act
    orders: dict[str, list[int]] | None = None  # of a part's Hadamard matrices: one of its width, or two that overlap
    hash: str

    @property
    def overlapping(self) -> dict[str, int]:
        """Parts whose width no constructed Hadamard matrix has, and the order of the two that act there."""
        return {part: orders[0] for part, orders in (self.orders or {}).items() if len(orders) > 1}


@dataclass(frozen=True, kw_only=True)
class SearchRecord(Record):
    """How well the codes fit: mean of the sites."""

    seconds: float | None = None  # None: not timed
    relative_mse: float
    relative_mse_base2: float
    worse_than_base2: int  # sites
    groups: int | None = None  # neuron groups of all sites
    groups_by_grain: list[int] | None = None  # with 1, 2, .. grains in a table, at most
    groups_by_intervals: list[int] | None = None  # with 1, 2, .. intervals
    groups_at_base2: int | None = None


@dataclass(frozen=True, kw_only=True)
class TuneRecord(Record):
    """Block-wise tuning: squared error of a block's output over the ANN's power, on the choosing part of the text, mean of the blocks.

    Before is that of each block untuned, behind tuned ones.
    """

    epochs: int
    what: str
    relative_error_before: float
    relative_error: float
    blocks: int
    blocks_improved: int


@dataclass(frozen=True, kw_only=True)
class CompensateRecord(Record):
    """Weights re-fitted behind coded inputs: errors as in `TuneRecord`; before is that of each block as it was, behind re-fitted ones."""

    linears: list[str]
    weights_refitted: int
    relative_error_before: float
    relative_error: float
    blocks: int
    blocks_improved: int


@dataclass(frozen=True, kw_only=True)
class WeightsRecord(Record):
    """Integer weights of the spiking networks' decoder Linears."""

    bits: int
    group_size: int | None  # inputs of an output that share a scale; None: all
    rounding: str
    relative_error: float | None = None  # squared, of the Linears' outputs on the calibration text, mean of the Linears; None: not known


@dataclass(frozen=True, kw_only=True)
class AnytimeRecord(Record):
    """Figures of a stepped run when its last neuron is read after 1 .. T steps."""

    perplexity: list[float]


@dataclass(frozen=True, kw_only=True)
class PerplexityRecord(Record):
    """Perplexities on one text by network; in the file the networks stand beside what they were measured on."""

    networks: dict[str, float]  # by key of `config.labels.NETWORKS`
    windows: int
    window: int  # [tokens]
    tokens: int | None = None  # targets

    @property
    def reference(self) -> float | None:
        """What perplexities of spiking networks are divided by, see `reference_perplexity`."""
        return reference_perplexity(self.networks)

    def to_json(self) -> dict[str, Any]:
        """The networks' figures, and on what text they were taken."""
        found = super().to_json()
        return found.pop("networks") | found

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """What `to_json` gave."""
        if isinstance(found, dict):
            own = [field.name for field in fields(cls)]
            found = found | {"networks": {key: value for key, value in found.items() if key not in own}}
        return super().from_json(found)


def reference_perplexity(networks: Mapping[str, Any]) -> float | None:
    """That of the pretrained network behind the same prefix; of figures by network, a row of a summary too.

    The prefix alone moves a perplexity by about what a fine code does. Results of older versions have the bare network's only.
    """
    return networks.get("ann_prefix") or networks.get("ann")


@dataclass(frozen=True, kw_only=True)
class AccuracyRecord(Record):
    """lm-eval's scores of a network on a task, in [0, 1]."""

    acc: float
    acc_stderr: float | None = None  # None: of a single row
    acc_norm: float | None = None  # None: the task has none
    acc_norm_stderr: float | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class KindSpikes(Record):
    """Spikes of one kind of site."""

    firing_rate: float
    spikes_per_token: float
    sops_per_token: float


@dataclass(frozen=True, kw_only=True)
class DenseOperation(Record):
    """Work beside the spikes."""

    name: str
    mac_per_token: float
    ac_per_token: float


@dataclass(frozen=True, kw_only=True)
class SpikesRecord(Record):
    """Spikes and synaptic operations of the spiking network; rates are spikes / (neurons x T)."""

    windows: int
    window: int  # [tokens]
    tokens: int | None = None
    firing_rate: float
    firing_rate_at_synapses: float  # spikes weighted by their fan-out
    spikes_per_token: float
    sops_per_token: float
    latency_steps: int | None = None  # from a token to its logits
    firing_rate_by_step: list[float] | None = None
    by_kind: dict[str, KindSpikes] | None = None  # by name of `config.labels.SiteKind`
    dense_operations: list[DenseOperation] | None = None


@dataclass(frozen=True, kw_only=True)
class EnergyRecord(Record):
    """Energy of four networks and of the integer rivals that are measured; `spikes/energy.py` says which, and how it is counted."""

    table: str
    mac_pj: float
    ac_pj: float
    source: str
    int_bits: int
    int_mac_pj: float | None = None
    int_ac_pj: float | None = None
    weights: dict[str, str] | None = None  # of each network
    weights_note: str | None = None  # where they are not the same everywhere
    int_source: str | None = None
    ann_mac_per_token: float | None = None
    snn_mac_per_token: float | None = None
    snn_ac_per_token: float | None = None
    ann_pj_per_token: float
    int_pj_per_token: float
    snn_pj_per_token: float
    snn_int_pj_per_token: float | None = None
    break_even_firing_rate: float
    break_even_firing_rate_int: float
    break_even_firing_rate_snn_int: float | None = None
    int_static_pj_per_token: float | None = None
    int_token_pj_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class DiagnosticsRecord(Record):
    """Where the error is; perplexities with one kind of site, or one site, spiking alone."""

    perplexity_by_kind: dict[str, float] | None = None  # "none": without neurons
    perplexity_by_site: dict[str, float] | None = None
    median_above_bound: float | None  # squared error over the Lloyd-Max bound; None: no site has one


@dataclass(frozen=True, kw_only=True)
class TextRecord(Record):
    """A text that the spiking model continued."""

    prompt: str
    text: str  # what follows
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GenerateRecord(Record):
    """What stage generate has written; spikes and operations are those of the new tokens that were read again, each in its forward."""

    texts: list[TextRecord]
    seconds: float
    seconds_prompt: float  # from a batch of prompts to its first token, median
    seconds_per_token: float | None = None  # a forward of one token for each text of a batch, median; None: there was none
    firing_rate: float | None = None
    spikes_per_token: float | None = None
    sops_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class Header(Record):
    """What a job was and how it went."""

    schema: int
    model: str
    dtype: str | None = None
    T: int
    grain: int | str
    coding: str | None = None
    intervals: int | str | None = None  # None: written before there were any
    amplitude: str | None = None  # None: static
    execution: str | None = None
    seed: int | None = None
    stages: dict[str, StageRecord]
    plan: PlanRecord | None = None  # None: nothing was planned
    versions: dict[str, str | None] | None = None  # of the process that wrote the file
    inputs: dict[str, str | None] | None = None  # fingerprints of what was read and of the code; None: it was not there
    reference: ReferenceRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Findings(Record):
    """What the stages have found; each adds its own."""

    sites: int | None = None
    prefix_tokens: list[int] | None = None
    rotation: RotationRecord | None = None
    search: SearchRecord | None = None
    tune: TuneRecord | None = None  # None: no tuning
    compensate: CompensateRecord | None = None  # None: no weights re-fitted
    weights: WeightsRecord | None = None  # None: as the model has them
    codes: str | None = None  # path
    saved_model: str | None = None  # path
    anytime: AnytimeRecord | None = None
    perplexity: PerplexityRecord | None = None
    perplexity_by_text: dict[str, PerplexityRecord] | None = None
    zero_shot: dict[str, dict[str, AccuracyRecord]] | None = None  # by network and task
    spikes: SpikesRecord | None = None
    energy: EnergyRecord | None = None
    diagnostics: DiagnosticsRecord | None = None
    generate: GenerateRecord | None = None

    def __or__(self, other: "Findings") -> Self:
        """With what `other` has found."""
        return replace(self, **{name: value for name, value in vars(other).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Results(Findings, Header):
    """results.json; the header's fields stand first."""

    command: str | None = None  # that repeats the job
    config: str | None = None  # hash of the resolved configuration
    warnings: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class JobRecord(Record):
    """What a job is, whether it fails or not; with the reason it is error.json."""

    error: str | None = None
    model: str | None = None
    T: int | None = None
    grain: int | str | None = None
    command: str | None = None
    config: str | None = None
