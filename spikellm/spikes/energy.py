"""What a network's arithmetic costs: operations of a decoder from its shape, picojoules from a cost table.

A multiply-accumulate (MAC) costs e_mac, an accumulate (AC) e_ac, and

    E = e_mac MAC + e_ac AC        [pJ]

counts arithmetic alone: no memory traffic, no leakage. Two pairs of networks stand side by side, each of weights of one precision:

    ANN          every matrix product a MAC of the table
    SNN          every spike that arrives at a synapse an AC of the table (a synaptic operation, SOP; `ledger.py` counts them), and MACs
                 or ACs for whatever stays dense
    integer ANN  the ANN's MACs on signed integers of T + 1 bits, activations (the accuracy of base-2 phase coding in T steps) and weights
    integer SNN  the SNN's SOPs on integers of the same T + 1 bits: the accumulates of the integer ANN without its multiplications

The integer ANN is a bound: its numbers are integers for nothing. What the networks int_static and int_token (`coding/integers.py`) compute
beside its MACs is in `integer_operations`: theirs is the energy that stands beside the integer SNN's at their perplexity.

Perplexities are those of the network's own weights. Where these are integers (`weights.bits`), the integer pair has them in the decoder's
Linears: MACs of T + 1 bits with weights of so many, spikes that add them, and the scales of groups of inputs that multiply sums; attention,
the gate and lm_head, which is not rounded, still count integers of T + 1 bits. Without the option the integer pair has weights that no
perplexity here is of. What stays dense costs what the table says in all four.

Sources: Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm, 0.9 V; that energy is the one of spiking papers' tables
(Zheng et al., ICLR 2026: 4.6 and 0.9 pJ). Ours: the list of what stays dense, and integers of other widths than 8 bits.
"""

from collections.abc import Collection
from dataclasses import dataclass

from spikellm.config.choices import RotationPart
from spikellm.kernels.hadamard import order
from spikellm.model.sites import SiteKind

HOROWITZ = "Horowitz, ISSCC 2014, 45 nm"
# Multiplication and addition of 8-bit integers [pJ] (Horowitz). Array multipliers grow with the square of the width, adders
# linearly: the law gives 3.32 pJ for a MAC of 32 bits where the source has 3.1 + 0.1.
INT8_MULTIPLY_PJ, INT8_ADD_PJ = 0.2, 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Energy of an operation [pJ] and where the numbers are from.

    Raises:
        ValueError: a cost that is not positive.
    """

    name: str
    mac_pj: float
    ac_pj: float
    source: str

    def __post_init__(self) -> None:
        if not (self.mac_pj > 0 and self.ac_pj > 0):
            raise ValueError(f"a MAC and an AC need positive costs, got {self.mac_pj} and {self.ac_pj} pJ")

    def joule(self, *, mac: float | int, ac: float | int) -> float:
        """Energy of so many operations [J]."""
        return (mac * self.mac_pj + ac * self.ac_pj) * 1e-12


COST_TABLES = {
    table.name: table
    for table in (
        CostTable(name="fp32", mac_pj=4.6, ac_pj=0.9, source=HOROWITZ),
        CostTable(name="fp16", mac_pj=1.5, ac_pj=0.4, source=HOROWITZ),
        CostTable(name="int8", mac_pj=0.23, ac_pj=0.03, source=HOROWITZ),
    )
}


def integer_mac_pj(bits: int, weight_bits: int | None = None) -> float:
    """A MAC of signed integers [pJ]: INT8_MULTIPLY_PJ (bits / 8) (weight_bits / 8) + `integer_ac_pj` of half the product's width."""
    other = bits if weight_bits is None else weight_bits
    return INT8_MULTIPLY_PJ * (bits * other / 64) + integer_ac_pj((bits + other) / 2)


def integer_ac_pj(bits: int | float) -> float:
    """An accumulate of signed integers [pJ]: INT8_ADD_PJ bits / 8."""
    return INT8_ADD_PJ * bits / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The numbers of a LLaMA-family decoder that decide what it computes."""

    layers: int
    D: int  # width
    F: int  # MLP width
    H: int  # query heads
    K: int  # key heads
    E: int  # head width
    V: int  # vocabulary
    biases: int = 0  # elements of all biases of a layer's Linears
    head_norms: bool = False  # RMSNorm on every query and key head (Qwen3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A kind of work and how much of it: multiplications (with or without an accumulate) and lone additions."""

    name: str
    mac: int
    ac: int = 0


def matrix_products(shape: DecoderShape, *, tokens: int, pairs: int) -> list[Operation]:
    """MACs of every matrix product and of the gate, the work that spikes take over.

    Args:
        tokens: tokens of all sequences.
        pairs: (query, key) pairs, over all sequences and layers; `layers * tokens**2` if masked pairs are computed too.
    """
    D, F, H, E = shape.D, shape.F, shape.H, shape.E
    per_layer = {name: inputs * outputs for name, (inputs, outputs) in linear_products(shape).items()} | {"gate product": F}
    linear = [Operation(name=name, mac=tokens * shape.layers * each) for name, each in per_layer.items()]
    attention = [Operation(name=name, mac=pairs * H * E) for name in ("query x key", "probabilities x value")]
    return [*linear, *attention, Operation(name="language model head", mac=tokens * D * shape.V)]


def pointwise_operations(shape: DecoderShape, *, tokens: int, pairs: int) -> list[Operation]:
    """What the ANN and the SNN both compute beside matrix products.

    A multiplication, an exponential, a quotient and a root count one MAC each: low for hardware that has no unit for them, and
    the same for both networks.
    """
    layers, D, F, H, K, E = shape.layers, shape.D, shape.F, shape.H, shape.K, shape.E
    normed = (2 * layers + 1) * D + (layers * (H + K) * E if shape.head_norms else 0)
    operations = [
        Operation(name="embedding", mac=0),  # a row is read
        Operation(name="RMSNorm", mac=2 * tokens * normed),  # square and sum, scale; the weight is folded
        Operation(name="RoPE", mac=2 * tokens * layers * (H + K) * E),
        Operation(name="softmax exponential", mac=pairs * H),
        Operation(name="SiLU", mac=2 * tokens * layers * F),  # exponential, quotient
        Operation(name="residual stream", mac=0, ac=2 * tokens * layers * D),
    ]
    return operations + ([Operation(name="biases", mac=0, ac=tokens * layers * shape.biases)] if shape.biases else [])


def softmax_quotients(shape: DecoderShape, *, tokens: int, pairs: int, after: bool) -> Operation:
    """Normalising the softmax: one quotient a channel of the output (`after`), or one a probability, and the row sums' addends."""
    if after:
        return Operation(name="softmax quotient", mac=tokens * shape.layers * shape.H * shape.E)
    return Operation(name="softmax quotient", mac=pairs * shape.H, ac=pairs * shape.H)


def fast_hadamard_additions(width: int) -> float:
    """Additions of one element of an online transform of `width` = odd part x 2^k: k butterflies, and the odd part times 4 densely.

    Hadamard matrices of orders that are no power of two exist from 4 on (12, 20, 28, ..), so that an odd part above 1 takes two
    of the factors of two with it. Where none of the width is constructed two of a smaller order act (`kernels/hadamard.py`).
    """
    size = order(width)
    if size < width:
        return 2 * size / width * fast_hadamard_additions(size)
    power = (width & -width).bit_length() - 1
    odd = width >> power
    return float(power if odd == 1 else 4 * odd + power - 2)


def linear_products(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the Linears of a decoder layer, by their names among `matrix_products`."""
    D, F, H, K, E = shape.D, shape.F, shape.H, shape.K, shape.E
    return {
        "query": (D, H * E),
        "key": (D, K * E),
        "value": (D, K * E),
        "attention output": (H * E, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }


def weight_receivers(shape: DecoderShape) -> dict[SiteKind, int]:
    """Sums of one site and population that an output weight multiplies, per token and step.

    Outputs of the Linears that read the site; the gate; attention's operands, q and k scaled per query head, and the mixture, which
    takes fewer multiplications than scaling scores. A value's spike adds its weight to its own sum: there is nothing to multiply.
    """
    D, F, H, K, E = shape.D, shape.F, shape.H, shape.K, shape.E
    return {
        SiteKind.attention_input: (H + 2 * K) * E,
        SiteKind.query: H * E,
        SiteKind.key: H * E,
        SiteKind.value: 0,
        SiteKind.softmax: H * E,
        SiteKind.attention_output: D,
        SiteKind.mlp_input: 2 * F,
        SiteKind.activation: F,
        SiteKind.mlp_product: D,
        SiteKind.head_input: shape.V,
    }


def online_rotations(shape: DecoderShape, *, tokens: int, rotated: Collection[RotationPart]) -> list[Operation]:
    """R3 and R4 as far as they act; nothing where neither does."""
    if not rotated:
        return []
    # additions alone, counted as dearly as MACs: what stays dense must not look cheap
    vectors = {RotationPart.R3: (shape.H + shape.K, shape.E), RotationPart.R4: (1, shape.F)}  # how many a token, how long
    additions = round(sum(number * width * fast_hadamard_additions(width) for number, width in (vectors[part] for part in rotated)))
    return [Operation(name=f"online Hadamard {', '.join(rotated)}", mac=tokens * shape.layers * additions)]


def spiking_operations(
    shape: DecoderShape,
    *,
    T: int,
    tokens: int,
    receivers: int,
    comparisons: int,
    spikes: int,
    rotated: Collection[RotationPart],
    prefix: int,
) -> list[Operation]:
    """What the SNN computes beside its spikes and `pointwise_operations`.

    Args:
        receivers: sums that output weights multiply, of all sites, per token and step (`weight_receivers`).
        comparisons, spikes: of all neurons, over the same tokens.
        rotated: which of R3 and R4 act online.
        prefix: exact prefix keys and values beside the coded ones; 0 where they pass neurons or there are none.
    """
    layers, H, E = shape.layers, shape.H, shape.E
    operations = [
        Operation(name="output weights d_t", mac=tokens * T * receivers),
        Operation(name="neurons: comparison a step, reset a spike", mac=0, ac=comparisons + spikes),
        *online_rotations(shape, tokens=tokens, rotated=rotated),
    ]
    if prefix:
        # exponentials, mixture and sum of P columns; the scores come from query spikes
        operations.append(Operation(name="exact prefix", mac=tokens * layers * H * prefix * (E + 2)))
    return operations


def token_amplitudes(*, inputs: int, entries: int, sums: int) -> Operation:
    """Amplitudes of tokens: the largest of `inputs`, by which `entries` of tables are multiplied, and `sums` that no entry scales.

    A table that is m times as large, thresholds, resets, output weights and cuts, codes x as its original codes x / m, times m: inputs stay
    as they are, and so do the sums of readers that output weights multiply anyway.
    """
    return Operation(name="amplitudes of tokens: largest input, factor of tables", mac=entries + sums, ac=inputs)


def integer_operations(
    shape: DecoderShape,
    *,
    tokens: int,
    pairs: int,
    activations: int,
    scales: int,
    linear_groups: int,
    rotated: Collection[RotationPart],
    prefix: int,
) -> list[Operation]:
    """What a network of integer activations computes beside its integer MACs and `pointwise_operations`.

    Steps of weights are taken to be folded into those of activations. What comes in as a real number is scaled and rounded; sums of
    integers are scaled back: a Linear's outputs as many times as there are groups along its inputs, the gate, the mixture, every score.

    Args:
        tokens, pairs: of all sequences, as for `matrix_products`.
        activations: that become integers, of all sites.
        scales: found at run time, one a token, group and site; 0: all are constants.
        linear_groups: groups along the inputs of attention's output.
        rotated, prefix: as for `spiking_operations`.
    """
    layers, D, F, H, K, E = shape.layers, shape.D, shape.F, shape.H, shape.K, shape.E
    sums = layers * ((H + 2 * K) * E + linear_groups * D + 2 * F + F + D + H * E) + shape.V
    operations = [
        Operation(name="integers: a factor, rounding", mac=activations, ac=activations),
        Operation(name="factors of integer sums", mac=tokens * sums + pairs * H),
        *online_rotations(shape, tokens=tokens, rotated=rotated),
    ]
    if scales:
        operations += [
            # least and largest value; difference, quotient and zero point
            Operation(name="levels of every token", mac=2 * scales, ac=2 * activations + scales),
            # steps that differ along a sum over keys: the key's on its score, the value's on its probability
            Operation(name="steps of keys and values", mac=2 * pairs * H),
        ]
    if prefix:
        # scores, exponentials, mixture and sum of P columns
        operations.append(Operation(name="exact prefix", mac=tokens * layers * H * prefix * (2 * E + 2)))
    return operations


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedWork:
    """The part of the integer pair's work that meets integer weights, over the same tokens."""

    bits: int
    mac: int  # of the integer ANN
    sops: int  # of the integer SNN
    ann_scales: int  # multiplications of sums by scales
    snn_scales: int  # the same of the SNN, beside those that output weights take anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Energy of four networks for the same tokens [pJ per token] and the firing rates at which they would meet.

    The firing rate is that of synapses: SOPs / (synapses x T), with spikes weighted by their fan-out. Below the break-even rate
    the SNN takes less energy than the ANN (`_int`: than the integer ANN, a comparison of unlike weights; `_snn_int`: the integer SNN
    than the integer ANN); a rate of 0 says that it never does.
    """

    ann_pj_per_token: float
    int_pj_per_token: float
    snn_pj_per_token: float
    snn_int_pj_per_token: float
    break_even_firing_rate: float
    break_even_firing_rate_int: float
    break_even_firing_rate_snn_int: float


def integer_pj(table: CostTable, *, bits: int, matrices: list[Operation], dense: list[Operation]) -> float:
    """MACs of integers of so many bits, and the rest by the table [pJ]."""
    rest = table.joule(mac=sum(each.mac for each in dense), ac=sum(each.ac for each in dense)) * 1e12
    return integer_mac_pj(bits) * sum(each.mac for each in matrices) + rest


def compare(
    table: CostTable, *, T: int, matrices: list[Operation], pointwise: list[Operation], dense: list[Operation], sops: int, spikes: int,
    synapses: int, tokens: int, rounded: RoundedWork | None = None,
) -> Energy:  # fmt: skip
    """Energy of ANN and SNN, and of both with integer weights.

    Args:
        matrices, pointwise: of the ANN.
        dense: all that the SNN computes beside its synaptic operations, a reset a spike included.
        sops, spikes, synapses: spikes times their fan-out, spikes, neurons times their fan-out, over the same tokens.
        rounded: of the integer pair, where it has weights of their own width; None: they have T + 1 bits.
    """
    rounded = rounded or RoundedWork(bits=T + 1, mac=0, sops=0, ann_scales=0, snn_scales=0)

    def cost(operations: list[Operation]) -> float:
        return table.joule(mac=sum(each.mac for each in operations), ac=sum(each.ac for each in operations)) * 1e12

    def snn(ac_pj: float, scales: int = 0) -> float:
        return cost(dense) + table.mac_pj * scales + ac_pj * sops

    def break_even(rival: float, ac_pj: float, scales: int = 0) -> float:
        # resets come and go with the spikes: at every rate there are as many to a synaptic operation as now
        resting = cost(dense) + table.mac_pj * scales - table.ac_pj * spikes
        saturated = T * synapses * (ac_pj + table.ac_pj * spikes / max(1, sops))
        return max(0.0, (rival - resting) / saturated)

    ann = cost(matrices + pointwise)
    plain = sum(each.mac for each in matrices) - rounded.mac
    integer = integer_mac_pj(T + 1) * plain + integer_mac_pj(T + 1, rounded.bits) * rounded.mac
    integer += table.mac_pj * rounded.ann_scales + cost(pointwise)
    share = rounded.sops / max(1, sops)  # of the spikes that meet such weights
    integer_ac = integer_ac_pj(T + 1) * (1 - share) + integer_ac_pj(rounded.bits) * share
    return Energy(
        ann_pj_per_token=ann / tokens,
        int_pj_per_token=integer / tokens,
        snn_pj_per_token=snn(table.ac_pj) / tokens,
        snn_int_pj_per_token=snn(integer_ac, rounded.snn_scales) / tokens,
        break_even_firing_rate=break_even(ann, table.ac_pj),
        break_even_firing_rate_int=break_even(integer, table.ac_pj),
        break_even_firing_rate_snn_int=break_even(integer, integer_ac, rounded.snn_scales),
    )
