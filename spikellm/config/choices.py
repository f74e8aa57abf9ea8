"""What the configuration lets one choose from; the docstring under each member is what `--help` says of it."""

from enum import Enum, StrEnum


class ModelSource(Enum):
    """Where weights come from."""

    gguf = "gguf"
    """a GGUF file inside an installed Python package"""
    hub = "hub"
    """hub id or local folder in transformers' format"""
    random = "random"
    """freshly initialised, for tests"""
    spiking = "spiking"
    """a folder that save_model=true wrote, measured as it is; taken by itself where model.path is one"""


class DType(Enum):
    """Floating-point format of the weights."""

    float64 = "float64"
    """rounding moves no spike: figures do not depend on the order of sums; twice the time"""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class RotationKind(Enum):
    """How the model is rotated."""

    hadamard = "hadamard"
    """the parts R1 to R4, or those of rotation.parts"""
    none = "none"
    """the model as it is"""


class RotationPart(StrEnum):
    """The places of rotation, as SpinQuant numbers them."""

    R1 = "R1"
    """the residual stream"""
    R2 = "R2"
    """values, per head"""
    R3 = "R3"
    """queries and keys, per head, online"""
    R4 = "R4"
    """what down_proj reads, online"""


class Coding(Enum):
    """What a spike stands for."""

    phase = "phase"
    """phase t of the code weighs base^-t"""
    phase_signed = "phase_signed"
    """digits -1, 0, +1 in every phase: finer codes, or fewer spikes"""
    rate = "rate"
    """traditional conversion: T equal spikes at most, their number is the value"""
    ttfs = "ttfs"
    """traditional conversion: one spike, its time is the value"""
    few_spike = "few_spike"
    """base 2, at most snn.max_spikes spikes"""


class Amplitude(Enum):
    """Where neurons have their amplitude from."""

    static = "static"
    """from calibration"""
    token = "token"
    """where a Linear reads them: the token's largest |x|, times a share that calibration finds; elsewhere static"""


class Execution(Enum):
    """How the spiking network is run."""

    folded = "folded"
    """a layer's T steps in one pass"""
    stepped = "stepped"
    """spikes step by step; the same sums, about T times the work"""


class SoftmaxNorm(Enum):
    """Where attention's softmax is normalised."""

    before = "before"
    """probabilities are coded: the authors' network"""
    after = "after"
    """exponentials are coded, the output is divided by their sum"""


class SearchMethod(Enum):
    """How codes are found."""

    evolution = "evolution"
    """tables fitted to each site's distribution"""
    gradient = "gradient"
    """the authors' search: surrogate gradients, tau the largest activation; minutes per site"""
    base2 = "base2"
    """base 2, tau the largest activation"""


def own_coding(method: SearchMethod | str, import_file: str | None) -> str:
    """The coding of codes that are found in this way, unless another is asked for: digits 0 and 1 are the authors'."""
    published = SearchMethod(method) is not SearchMethod.evolution or import_file is not None
    return (Coding.phase if published else Coding.phase_signed).value


class ImportV0(Enum):
    """Initial potentials of an imported neuron file."""

    stored = "stored"
    """the file's initial potential where it has one, the rule elsewhere"""
    rule = "rule"
    """tau 2^-T / 2 at every site, as the authors' own loader"""


class Rounding(Enum):
    """How weights become integers."""

    nearest = "nearest"
    """each by itself, before calibration, which then observes the rounded network"""
    gptq = "gptq"
    """after the search, block by block: later weights make up for the rounding of earlier ones, on inputs as the found codes give them"""


class TunedPart(Enum):
    """What is tuned, block by block."""

    neurons = "neurons"
    """tables and cuts alone"""
    all = "all"
    """these, and the weights of the block's Linears"""


class CompensatedLinear(StrEnum):
    """Linears that can be re-fitted behind their coded inputs."""

    o = "o"
    """attention's output"""
    gate = "gate"
    up = "up"
    down = "down"
    """the MLP's output"""


class Groups(Enum):
    """The neurons of a site that share a table."""

    site = "site"
    """one table a site"""
    head = "head"
    """one table an attention head where there are heads, one for each sign at the activation function"""


class DatasetSource(Enum):
    """Where text comes from."""

    pydocs = "pydocs"
    """the language reference that every CPython carries (pydoc_data.topics)"""
    text = "text"
    """a local UTF-8 text file"""
    hub = "hub"
    """a data set of the hub, rows joined by blank lines"""


class Device(Enum):
    """Where the network is run."""

    cpu = "cpu"
    cuda = "cuda"
    """one GPU"""
    auto = "auto"
    """accelerate's device map over all GPUs"""


class EnergyTable(Enum):
    """Energy per operation, by number format."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    custom = "custom"
    """energy.mac_pj and energy.ac_pj"""


class Tracker(Enum):
    """Where results are mirrored."""

    none = "none"
    """results.json and the console only"""
    wandb = "wandb"
    """Weights & Biases"""


class TrackingMode(Enum):
    """Whether runs of the tracker are uploaded."""

    auto = "auto"
    """online with a key and a server that answers, else offline"""
    online = "online"
    offline = "offline"
    """files in the run's folder, for `wandb sync`"""
    disabled = "disabled"
    """nothing at all"""
