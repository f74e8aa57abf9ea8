"""The spiking network and the way to its codes: the nodes `snn`, `rotation`, `weights`, `prefix`, `search`, `tune` and `compensate`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from spikellm.config.checks import check
from spikellm.config.choices import (
    Amplitude,
    Coding,
    CompensatedLinear,
    Execution,
    Groups,
    ImportV0,
    RotationKind,
    RotationPart,
    Rounding,
    SearchMethod,
    SoftmaxNorm,
    TunedPart,
)

MAX_T = 16
MAX_INTERVALS = 8
WEIGHT_BITS = (8, 4)
# search.spike_weight of signed digits: with it they take no more operations than digits 0 and 1 in one interval, at T = 4 to 8 (a quarter
# fewer at 8), and err less.
SIGNED_SPIKE_WEIGHT = 1.5


@dataclass(kw_only=True, slots=True)
class SpikingConfig:
    """The spiking network: its time steps, its code and how it is run."""

    T: int = MISSING
    """time steps = phases of the code [steps]"""
    grain: str = MISSING
    """number of grains G: 1, 2, 3, .. or auto; set by the group `grain`"""
    min_grain_length: int = 2
    """phases in a grain, at least [steps]"""
    coding: Coding = Coding.phase_signed
    """what a spike stands for; search.method=gradient and base2 and files of the authors have phase"""
    intervals: str = "auto"
    """intervals of the range of |x| with a table and a wire each: 1, 2, 3, .. or auto, as many as a neuron group needs; phase codes only"""
    amplitude: Amplitude = Amplitude.static
    """where neurons have theirs from; q, k, v, softmax (whose sums run over tokens) and SiLU (one synapse a spike) keep static ones"""
    max_spikes: int | None = None
    """spikes of a neuron, at most; coding=few_spike only"""
    execution: Execution = Execution.folded
    """how the network is run"""
    step_chunk: int | None = None
    """time steps per matrix product, at most; null: all T; execution=stepped only [steps]"""
    max_memory_gib: float | None = None
    """weights and activations, at most: lowers step_chunk; null: no bound; execution=stepped only [GiB]"""
    softmax_norm: SoftmaxNorm = SoftmaxNorm.after
    """where attention's softmax is normalised"""

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
        fits = self.intervals == "auto" or (self.intervals.isdigit() and 1 <= int(self.intervals) <= MAX_INTERVALS)
        check(fits, "snn.intervals", self.intervals, f"takes 1 to {MAX_INTERVALS} or auto")
        phases = self.coding in (Coding.phase, Coding.phase_signed)
        cure = f"intervals are of phase codes: leave it out, or take snn.coding=phase or phase_signed instead of {self.coding.value}"
        check(phases or self.intervals in ("1", "auto"), "snn.intervals", self.intervals, cure)
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

    @property
    def interval_count(self) -> int | None:
        """`intervals` as a number; None: auto."""
        return None if self.intervals == "auto" else int(self.intervals)


@dataclass(kw_only=True, slots=True)
class RotationConfig:
    """Rotation of the model before its conversion (QuaRot, SpinQuant)."""

    kind: RotationKind = RotationKind.hadamard
    """rotations that spread outliers and leave the function as it is"""
    parts: list[RotationPart] = field(default_factory=lambda: list(RotationPart))
    """those that act; []: norms are folded alone"""
    seed: int = 0
    """of R1's random signs"""

    def __post_init__(self) -> None:
        check(len(set(self.parts)) == len(self.parts), "rotation.parts", f"[{','.join(self.parts)}]", "one of them is there twice")
        self.parts.sort()

    @property
    def acting(self) -> list[RotationPart]:
        """The parts that are applied."""
        return self.parts if self.kind is RotationKind.hadamard else []


@dataclass(kw_only=True, slots=True)
class WeightsConfig:
    """Integer weights of the decoder layers' Linears in spiking networks; embedding and lm_head keep theirs."""

    bits: int | None = None
    """of an integer, 8 or 4; null: weights as they are [bits]"""
    group_size: int | None = None
    """inputs of an output that share a scale; null: all of them"""
    rounding: Rounding = Rounding.gptq
    """how the integers are found"""

    def __post_init__(self) -> None:
        known = " or ".join(map(str, WEIGHT_BITS))
        check(self.bits is None or self.bits in WEIGHT_BITS, "weights.bits", self.bits, f"takes {known}, or null")
        check(self.group_size is None or self.group_size >= 1, "weights.group_size", self.group_size, "must be at least 1, or null")

    def rounds(self, rounding: Rounding) -> bool:
        """Whether weights become integers in this way."""
        return self.bits is not None and self.rounding is rounding


@dataclass(kw_only=True, slots=True)
class TuneConfig:
    """Block-wise tuning of the spiking network on the calibration text, by gradients."""

    epochs: int = 0
    """passes over the fitting part of the text at each block; 0: no tuning"""
    what: TunedPart = TunedPart.neurons
    """what is tuned"""
    rate: float = 0.005
    """Adam's first learning rate of the neurons, in units of a table's smallest threshold"""
    weight_rate: float = 1e-5
    """the weights'; what=all only"""
    batch: int = 1
    """windows between two steps"""

    def __post_init__(self) -> None:
        check(self.rate > 0, "tune.rate", self.rate, "must be positive")
        check(self.weight_rate > 0, "tune.weight_rate", self.weight_rate, "must be positive")
        check(self.batch >= 1, "tune.batch", self.batch, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class CompensateConfig:
    """Weights of decoder Linears re-fitted in closed form behind what the neurons send, on the calibration text."""

    enabled: bool = False
    """re-fit them block by block, after search and tuning, where that lowers the error at the block's output"""
    linears: list[CompensatedLinear] = field(default_factory=lambda: [CompensatedLinear.o, CompensatedLinear.gate, CompensatedLinear.up])
    """those that are re-fitted"""
    damping: list[float] = field(default_factory=lambda: [0.1, 1.0])
    """pull towards the weights as they are, in mean squares of a Linear's coded inputs; of several the best at each block"""

    def __post_init__(self) -> None:
        given = f"[{','.join(self.linears)}]"
        check(bool(self.linears), "compensate.linears", given, "name at least one; compensate.enabled=false re-fits none")
        check(len(set(self.linears)) == len(self.linears), "compensate.linears", given, "one of them is there twice")
        fits = bool(self.damping) and all(value > 0 for value in self.damping)
        check(fits, "compensate.damping", self.damping, "takes positive numbers, at least one")


@dataclass(kw_only=True, slots=True)
class PrefixConfig:
    """Tokens before every sequence, which take the outliers upon themselves (PrefixQuant)."""

    enabled: bool = True
    """keys and values of outlier tokens before every sequence"""
    eta: float = 64.0
    """a token is an outlier where its largest |x| exceeds eta times the median token's"""
    max_tokens: int = 8
    """prefix tokens, at most"""

    def __post_init__(self) -> None:
        check(self.eta > 1, "prefix.eta", self.eta, "must exceed 1")
        check(self.max_tokens >= 1, "prefix.max_tokens", self.max_tokens, "must be at least 1; prefix.enabled=false takes none")


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """How codes are found from the statistics of calibration."""

    method: SearchMethod = SearchMethod.evolution
    """how the codes are found"""
    groups: Groups = Groups.head
    """neurons that share a table"""
    sequential: bool = False
    """fit block by block on the spiking stream, amplitudes by the error at the block's output; runs the calibration text again"""
    spike_weight: float | None = None
    """lambda: a spike a neuron costs as much as a relative squared error of lambda 2^-((4T+11)/3); null: 0, phase_signed 1.5"""
    sufficient_error: float = 5e-5
    """snn.intervals=auto: relative squared error of a neuron group (on the choosing part of the text) that needs no further interval"""
    tolerance: float = 0.02
    """grain=auto: relative excess of the error (on the choosing part of the text) that a coarser grain may have"""
    gradient_outer: int = 20
    """method=gradient: rounds; this and the next three as the authors have them"""
    gradient_inner: int = 50
    """method=gradient: steps of (h, theta), and as many of d, in a round"""
    gradient_samples: int = 100_000
    """method=gradient: activations drawn for each neuron group"""
    gradient_rate: float = 1e-3
    """method=gradient: Adam's learning rate of the bases"""
    import_file: str | None = None
    """neuron file of the authors (.pth): its codes instead of a search"""
    import_v0: ImportV0 = ImportV0.stored
    """initial potentials of import_file"""

    def __post_init__(self) -> None:
        check(self.tolerance >= 0, "search.tolerance", self.tolerance, "must not be negative")
        check(self.sufficient_error >= 0, "search.sufficient_error", self.sufficient_error, "must not be negative")
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


def check_tuning(options: TuneConfig, coding: Coding, weights: WeightsConfig) -> None:
    """Refuse tuning that would undo what a coding or the weights are.

    Raises:
        InputError: naming what goes with it.
    """
    if not options.epochs:
        return
    cure = "tuned, it is no such code: take phase, phase_signed or few_spike"
    check(coding not in (Coding.rate, Coding.ttfs), "tune.epochs", f"{options.epochs} with snn.coding={coding.value}", cure)
    given = f"all with weights.bits={weights.bits}, weights.rounding={weights.rounding.value}"
    integers = options.what is TunedPart.all and weights.rounds(Rounding.nearest)
    check(not integers, "tune.what", given, "tuned weights are no integers: take weights.rounding=gptq, which rounds them afterwards")


def check_compensation(options: CompensateConfig, weights: WeightsConfig) -> None:
    """Refuse re-fitted weights where integers come before them.

    Raises:
        InputError: naming what goes with it.
    """
    given = f"true with weights.bits={weights.bits}, weights.rounding={weights.rounding.value}"
    cure = "re-fitted weights are no integers: take weights.rounding=gptq, which rounds them afterwards"
    check(not (options.enabled and weights.rounds(Rounding.nearest)), "compensate.enabled", given, cure)
