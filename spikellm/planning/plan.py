"""What each stage of a run will read, write, hold and take, of a run that finds nothing in the store.

Times: `probe.py` has timed one layer; the rest are products of lm_head, reading and writing, and the search, whose work is a number of
operations for each neuron group. Memory: what is held (weights, hidden states, statistics) and the most that lives together while
something is computed: the widest activations of a layer, a block of attention's scores, a slice of the logits. Planned and measured
stand side by side in `experiments/large_models`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from spikellm.calibration.calibrate import PERIOD, PREFIX_LENGTH, PREFIX_WINDOWS, QUERY_BLOCK
from spikellm.calibration.statistics import BINS, PARTS
from spikellm.config.labels import NetworkName
from spikellm.evaluation.batches import STATE_COPIES, WIDE_COPIES
from spikellm.execution.memory import LOGIT_ROWS
from spikellm.model.blocks import STATES_BYTES
from spikellm.model.modules import WIDENED
from spikellm.model.rotation import ROWS
from spikellm.planning.machine import Machine
from spikellm.planning.probe import LayerCosts
from spikellm.planning.shape import Shape
from spikellm.store.record import PlannedStage, PlanRecord

GIB = 2**30
# On CUDA: Inductor and what it brings into the process; kernels of a run, on a core that is free. A CPU's are made while the model is read.
COMPILER, COMPILE_SECONDS = GIB * 15 // 100, 25.0
SEARCH_FLOPS = 9e7  # of a group, time step and grain, at the rate of matrix products: fitted to searches of 1141 and 3744 groups
OBSERVER_BYTES = 16  # a bin's count and its weight while they are added up
STATISTICS_BYTES, STATISTICS_BINS = 8, 6000  # a bin's count and weight as they are kept; bins from the smallest to the largest value
SCORE_COPIES, LOGIT_COPIES = 5, 2  # of these tensors that live together: a block of scores, a slice of the logits
LOGIT_PASSES = 4  # over the logits, for their cross entropy
READ_AHEAD = 2  # layers in memory where they lie on disk: one that computes, and the next
PRETRAINED_PASSES = 3  # through PREFIX_LENGTH tokens of the first windows, while prefix tokens are looked for
COUNTED = 2.0  # a forward in which spikes are counted, in folded ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a run is to do."""

    stages: list[str]
    calibration: tuple[int, int]  # windows, tokens of one
    texts: list[tuple[int, int]]  # that networks are measured on
    networks: list[NetworkName]
    T: int
    grains: int  # at most
    spike_windows: int  # 0: spikes are not counted
    save: bool
    offload: bool
    made: bool  # weights are written to disk before anything else: random ones, or others than safetensors
    random: bool
    compiled: bool
    query_block: int
    resident: int  # of this process now [bytes]


def plan(shape: Shape, costs: LayerCosts, machine: Machine, job: Job) -> PlanRecord:
    """The stages in their order, those that are needed for others among them."""
    return PlanRecord(
        stages=dict(_stages(shape, costs, machine, job)),
        offload=job.offload,
        weights_gib=shape.checkpoint_bytes / GIB,
        disk_gib=_kept(shape, job) / GIB,
        disk_free_gib=machine.disk / GIB,
        memory_free_gib=machine.memory / GIB,
        device_free_gib=None if machine.device_memory is None else machine.device_memory / GIB,
        threads=machine.threads,
        products_gflops=machine.products / 1e9,
        copying_gib_per_s=machine.copying / GIB,
        reading_gib_per_s=machine.reading / GIB,
    )


def _stages(shape: Shape, costs: LayerCosts, machine: Machine, job: Job) -> Iterable[tuple[str, PlannedStage]]:
    use = _Use(shape, costs, machine, job)
    for name, found in (("calibrate", use.calibrate), ("search", use.search), ("convert", use.convert), ("evaluate", use.evaluate)):
        if name in job.stages or any(name in NEEDS[asked] for asked in job.stages if asked in NEEDS):
            yield name, found()


NEEDS = {"evaluate": ("calibrate", "search"), "convert": ("calibrate", "search"), "search": ("calibrate",)}


@dataclass(frozen=True, slots=True)
class _Use:
    """What a run uses, stage by stage."""

    shape: Shape
    costs: LayerCosts
    machine: Machine
    job: Job

    def calibrate(self) -> PlannedStage:
        """Weights as the run needs them on disk, rotation, prefix tokens, statistics."""
        shape, job, (windows, tokens) = self.shape, self.job, self.job.calibration
        pieces = max(windows, len(PERIOD))
        length = windows * tokens // pieces
        starts = min(windows, PREFIX_WINDOWS)
        looks = 1 if job.random else PRETRAINED_PASSES
        seconds = shape.layers * (
            self.costs.rotate
            + pieces * self.costs.observed(length)
            + looks * starts * self.costs.plain(min(tokens, PREFIX_LENGTH))
            + (0 if job.random else 2 * starts * self.costs.plain(tokens))
        )
        read = shape.checkpoint_bytes
        if job.random:
            seconds += shape.checkpoint_bytes / shape.weight_bytes / self.machine.normals
        if job.offload:
            read += (1 + looks + (0 if job.random else 2)) * shape.layers_bytes
        rotating = 3 * 8 * max(shape.largest, ROWS * shape.hidden) + shape.layer * shape.weight_bytes
        observers = shape.groups * BINS * PARTS * OBSERVER_BYTES
        states = pieces * length * shape.hidden * shape.state_bytes
        states = min(states, STATES_BYTES) if job.offload else states
        active = max(rotating, states + self._layer(length, QUERY_BLOCK) + observers + self._statistics)
        return self._planned(seconds, read, _layers_on_disk(shape, job), self._end + active)

    def search(self) -> PlannedStage:
        """Codes of all sites."""
        shape, job = self.shape, self.job
        groups = shape.layers * shape.groups + 1
        seconds = SEARCH_FLOPS * groups * job.T * job.grains / self.machine.products + (COMPILE_SECONDS if self._inductor else 0)
        return self._planned(seconds, self._statistics, 0, 2 * self._statistics)

    def convert(self) -> PlannedStage:
        """The model is written, where it is to be kept."""
        shape = self.shape
        wrote = shape.converted_bytes if self.job.save else 0
        active = self._statistics + (self._end if wrote else 0)
        return self._planned(wrote / self.machine.copying, wrote if self.job.offload else 0, wrote, active)

    def evaluate(self) -> PlannedStage:
        """Perplexities of all networks, spikes of one."""
        shape, job = self.shape, self.job
        seconds = 0.0
        for name in job.networks:
            cost = self.costs.plain if name in (NetworkName.ann, NetworkName.ann_prefix) else self.costs.spiking
            seconds += sum(windows * (shape.layers * cost(tokens) + self._readout(tokens)) for windows, tokens in job.texts)
        own = [name for name in job.networks if name is not NetworkName.ann]  # in one pass
        read = (shape.checkpoint_bytes if NetworkName.ann in job.networks else 0) + (shape.converted_bytes if own and job.offload else 0)
        windows, tokens = min(job.spike_windows, job.texts[0][0]), job.texts[0][1]
        seconds += windows * COUNTED * (shape.layers * self.costs.spiking(tokens) + self._readout(tokens))
        active = max(self._layer(tokens, job.query_block) + self._logits(tokens) for _, tokens in job.texts)
        states = max(len(own) * windows * tokens for windows, tokens in job.texts) * shape.hidden * shape.state_bytes
        flying = min(states, STATES_BYTES) if job.offload else 0
        return self._planned(seconds, read, 0, self._end + active + flying)

    def _planned(self, seconds: float, read: int, wrote: int, active: int) -> PlannedStage:
        """A stage's record from what it computes, reads and writes, and what it has in memory beside the weights [bytes]."""
        shape, job = self.shape, self.job
        held = shape.ends_bytes + READ_AHEAD * shape.layer * shape.weight_bytes if job.offload else shape.converted_bytes
        on_device = self.machine.device_memory is not None
        own = job.resident + (COMPILER if self._inductor else 0)
        seconds += read / self.machine.reading + wrote / self.machine.writing
        return PlannedStage(
            seconds=seconds,
            reads_gib=read / GIB,
            writes_gib=wrote / GIB,
            memory_gib=(own if on_device else own + held + active) / GIB,
            device_gib=(held + active) / GIB if on_device else None,
        )

    def _layer(self, tokens: int, block: int) -> int:
        """Activations of a layer that live together, and a matrix of it that is widened [bytes]."""
        shape, size = self.shape, self.shape.state_bytes
        mlp = WIDE_COPIES * tokens * shape.width
        mixing = SCORE_COPIES * shape.heads * min(block, tokens) * tokens + STATE_COPIES * tokens * shape.heads * shape.head_width
        widened = shape.largest if size > shape.weight_bytes else 0
        return size * (STATE_COPIES * tokens * shape.hidden + max(mlp, mixing) + widened)

    def _logits(self, tokens: int) -> int:
        shape = self.shape
        widened = min(shape.head, WIDENED) if shape.state_bytes > shape.weight_bytes else 0
        return shape.state_bytes * (LOGIT_COPIES * min(tokens, LOGIT_ROWS) * shape.vocabulary + widened)

    @property
    def _inductor(self) -> bool:
        """Whether a compiler comes into the process."""
        return self.job.compiled and self.machine.device_memory is not None

    @property
    def _end(self) -> int:
        """Bytes of the embedding or lm_head once more: beside the file that it is read from, or what it is rotated into."""
        return self.shape.weight_bytes * max(self.shape.embedding, self.shape.head)

    def _readout(self, tokens: int) -> float:
        """Seconds of lm_head for a window: its products, and the passes of cross entropy over the logits."""
        shape, machine = self.shape, self.machine
        passes = LOGIT_PASSES * tokens * shape.vocabulary * shape.state_bytes
        return 2 * tokens * shape.head / machine.products + passes / machine.copying

    @property
    def _statistics(self) -> int:
        """Bytes of the statistics of all sites."""
        shape = self.shape
        return (shape.layers * shape.groups + 1) * PARTS * STATISTICS_BINS * STATISTICS_BYTES


def _layers_on_disk(shape: Shape, job: Job) -> int:
    """Bytes that are written where layers stay on disk: rotated ones, and the checkpoint where it is made first."""
    return shape.layers_bytes + (shape.checkpoint_bytes if job.made else 0) if job.offload else 0


def _kept(shape: Shape, job: Job) -> int:
    """Bytes that the run leaves on the disk; a saved model is the store's own, by hard links."""
    return _layers_on_disk(shape, job) + (shape.converted_bytes if job.save else 0)
