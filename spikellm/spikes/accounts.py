"""From a ledger to what a run reports: rates and operations per token, what stays dense, energy, the rows of spikes.csv."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from jaxtyping import Int
from torch import Tensor

from spikellm.config.choices import EnergyTable
from spikellm.config.labels import NetworkName, SiteKind
from spikellm.config.measures import EnergyConfig
from spikellm.config.snn import WeightsConfig
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import LINEAR_INPUTS, READERS
from spikellm.spikes.energy import (
    COST_TABLES,
    HOROWITZ,
    CostTable,
    Operation,
    RoundedWork,
    compare,
    integer_ac_pj,
    integer_mac_pj,
    integer_operations,
    integer_pj,
    linear_products,
    matrix_products,
    pointwise_operations,
    softmax_quotients,
    spiking_operations,
    token_amplitudes,
    weight_receivers,
)
from spikellm.spikes.ledger import Ledger, SiteSpikes, count
from spikellm.store.record import DenseOperation, EnergyRecord, KindSpikes, Row, SpikesRecord


def cost_table(options: EnergyConfig) -> CostTable:
    """The configured costs of operations."""
    if options.table is not EnergyTable.custom:
        return COST_TABLES[options.table.value]
    assert options.mac_pj is not None
    assert options.ac_pj is not None
    return CostTable(name="custom", mac_pj=options.mac_pj, ac_pj=options.ac_pj, source="energy.mac_pj, energy.ac_pj")


def dense_operations(ledger: Ledger, weights: WeightsConfig | None = None) -> list[Operation]:
    """All that the spiking model computes beside its spikes, over the ledger's tokens.

    Args:
        weights: where its Linears have integers, whose scales multiply sums.
    """
    shape, tokens = ledger.shape, ledger.tokens
    pairs = ledger.coded_pairs
    receivers = weight_receivers(shape)
    return [
        *pointwise_operations(shape, tokens=tokens, pairs=pairs),
        softmax_quotients(shape, tokens=tokens, pairs=pairs, after=ledger.normalise_after),
        *spiking_operations(
            shape,
            T=ledger.T,
            tokens=tokens,
            receivers=sum(scaled_sums(site, receivers[SiteKind[site.kind]], segments(ledger, site, weights)) for site in ledger.sites),
            comparisons=sum(comparisons(site) for site in ledger.sites),
            spikes=ledger.spikes,
            rotated=ledger.rotated,
            prefix=ledger.exact_prefix,
        ),
        *amplitudes(ledger, weights),
    ]


def amplitudes(ledger: Ledger, weights: WeightsConfig | None) -> list[Operation]:
    """What amplitudes of tokens cost; nothing where there are none."""
    sites = [site for site in ledger.sites if site.per_token]
    if not sites:
        return []
    rows = 3 * ledger.T + 1  # theta, h, d and v0 of a table
    entries = sum(rows * tables + pieces - 1 for site in sites for tables, pieces in zip(site.populations, site.intervals, strict=True))
    return [
        token_amplitudes(
            inputs=sum(sum(site.neurons) for site in sites),
            entries=ledger.tokens * entries,
            sums=0 if weights is None else amplitude_sums(ledger, weights),
        )
    ]


def amplitude_sums(ledger: Ledger, weights: WeightsConfig) -> int:
    """Sums that amplitudes of tokens multiply by themselves: outputs of integer weights, whose scales are in their d_t already."""
    if weights.bits is None:
        return 0
    receivers = weight_receivers(ledger.shape)
    kinds = [SiteKind[site.kind] for site in ledger.sites if site.per_token]
    return ledger.tokens * sum(receivers[kind] for kind in kinds if kind in READERS)


def scaled_sums(site: SiteSpikes, receivers: int, parts: list[int]) -> int:
    """Multiplications by output weights per token and step, where one population of one group has so many receivers.

    Behind a Linear each output adds up all groups, whose populations are scaled apart, in as many parts as have scales of their own;
    elsewhere the groups divide the receivers.
    """
    if SiteKind[site.kind] in LINEAR_INPUTS:
        return receivers * sum(populations * part for populations, part in zip(site.populations, parts, strict=True))
    return receivers * sum(site.populations) // len(site.populations)


def segments(ledger: Ledger, site: SiteSpikes, weights: WeightsConfig | None) -> list[int]:
    """Into how many parts groups of weights cut the inputs of each neuron group; a part's sums are scaled by one number, d_t s."""
    groups, size = len(site.populations), None if weights is None or weights.bits is None else weights.group_size
    if size is None or SiteKind[site.kind] not in READERS:
        return [1] * groups
    shape = ledger.shape
    widths = {SiteKind.attention_output: shape.H * shape.E, SiteKind.mlp_product: shape.F}
    width = widths.get(SiteKind[site.kind], shape.D)
    ends = [index * width // groups for index in range(groups + 1)]
    return [-(-end // size) - start // size for start, end in pairwise(ends)]


def rounded_work(ledger: Ledger, weights: WeightsConfig) -> RoundedWork | None:
    """The work of the integer pair that meets integer weights; None: it has none."""
    if weights.bits is None:
        return None
    linears, calls = linear_products(ledger.shape).values(), ledger.tokens * ledger.shape.layers
    grouped = sum(outputs * (inputs // weights.group_size) for inputs, outputs in linears) if weights.group_size else 0
    receivers = weight_receivers(ledger.shape)
    readers = [site for site in ledger.sites if SiteKind[site.kind] in READERS]
    scaled = [
        scaled_sums(site, receivers[SiteKind[site.kind]], segments(ledger, site, weights))
        - scaled_sums(site, receivers[SiteKind[site.kind]], segments(ledger, site, None))
        for site in readers
    ]
    return RoundedWork(
        bits=weights.bits,
        mac=calls * sum(inputs * outputs for inputs, outputs in linears),
        sops=sum(sum(map(sum, site.sops)) for site in readers),
        ann_scales=calls * grouped,
        snn_scales=ledger.tokens * ledger.T * sum(scaled) + amplitude_sums(ledger, weights),
    )


def comparisons(site: SiteSpikes) -> int:
    """Of v with theta at every step in every population, and of |x| with the cuts, once."""
    T, neurons = len(site.spikes), sum(site.neurons) // len(site.populations)  # of a group
    return neurons * sum(T * tables + pieces - 1 for tables, pieces in zip(site.populations, site.intervals, strict=True))


def count_spikes(model: PreTrainedModel, windows: Int[Tensor, "W L"]) -> dict[str, Any]:
    """Spikes and synaptic operations of a converted model on `windows`, one window a forward, in plain types.

    Args:
        model: converted, as it is or within `spikellm.stepped`, where its spike trains are counted.
        windows: token ids.

    Returns:
        `spikes` of results.json: firing_rate (spikes / neurons / time steps), spikes_per_token, sops_per_token (what a synaptic
        operation is: `ledger.py`), latency_steps [time steps], the same by kind of site, what stays dense.

    Raises:
        ValueError: a site carries no neuron.
    """
    return spikes_record(count(model, windows)).to_json()


def spikes_record(ledger: Ledger, weights: WeightsConfig | None = None) -> SpikesRecord:
    """Rates and operations per token; `weights` as in `dense_operations`."""
    tokens, T = ledger.tokens, ledger.T
    by_kind: dict[str, KindSpikes] = {}
    rows = spike_rows(ledger)
    for kind in SiteKind:
        chosen = [row for row in rows if row["kind"] == kind.name]
        neurons, spikes, sops = (sum(row[f"{what}_per_token"] for row in chosen) for what in ("neurons", "spikes", "sops"))
        by_kind[kind.name] = KindSpikes(firing_rate=spikes / (neurons * T), spikes_per_token=spikes, sops_per_token=sops)
    steps = [sum(sum(site.spikes[t]) for site in ledger.sites) for t in range(T)]
    dense = dense_operations(ledger, weights)
    return SpikesRecord(
        windows=ledger.windows,
        window=tokens // ledger.windows,
        tokens=tokens,
        firing_rate=ledger.spikes / (ledger.neurons * T),
        firing_rate_at_synapses=ledger.sops / (ledger.synapses * T),
        spikes_per_token=ledger.spikes / tokens,
        sops_per_token=ledger.sops / tokens,
        latency_steps=ledger.latency_steps,
        firing_rate_by_step=[spikes / ledger.neurons for spikes in steps],
        by_kind=by_kind,
        dense_operations=[DenseOperation(name=x.name, mac_per_token=x.mac / tokens, ac_per_token=x.ac / tokens) for x in dense],
    )


def dense_operations_of_integers(ledger: Ledger, *, per_token: bool, by_head: bool) -> list[Operation]:
    """All that int_static, or int_token (`per_token`), computes beside its integer MACs, on the ledger's tokens.

    Its integers are where the ledger's neurons are, an ON and an OFF neuron being one of them; its prefix is the same. by_head: attention
    heads have levels of their own.
    """
    shape, tokens, after = ledger.shape, ledger.tokens, ledger.normalise_after
    pairs = ledger.coded_pairs
    scales = sum(len(site.neurons) if by_head else 1 for site in ledger.sites)
    row_sums = [Operation(name="sums of the softmax's rows", mac=0, ac=pairs * shape.H)] if after else []
    return [
        *pointwise_operations(shape, tokens=tokens, pairs=pairs),
        softmax_quotients(shape, tokens=tokens, pairs=pairs, after=after),
        *row_sums,
        *integer_operations(
            shape,
            tokens=tokens,
            pairs=pairs,
            activations=sum(sum(site.neurons) for site in ledger.sites),
            scales=tokens * scales if per_token else 0,
            linear_groups=shape.H if by_head else 1,
            rotated=ledger.rotated,
            prefix=ledger.exact_prefix,
        ),
    ]


def rivals_energy(ledger: Ledger, table: CostTable, names: Collection[NetworkName], *, by_head: bool) -> dict[NetworkName, float]:
    """Energy of the integer networks among `names` [pJ per token]; their weights are integers of as many bits as their activations."""
    matrices = matrix_products(ledger.shape, tokens=ledger.tokens, pairs=ledger.coded_pairs)
    found = {}
    for name, per_token in ((NetworkName.int_static, False), (NetworkName.int_token, True)):
        if name in names:
            dense = dense_operations_of_integers(ledger, per_token=per_token, by_head=by_head)
            found[name] = integer_pj(table, bits=ledger.T + 1, matrices=matrices, dense=dense) / ledger.tokens
    return found


def energy_record(
    ledger: Ledger, table: CostTable, *, rivals: Mapping[NetworkName, float] | None = None, weights: WeightsConfig | None = None
) -> EnergyRecord:
    """Energy per token. ANN and integer ANN see the same tokens and mask, without a prefix; rivals: of `rivals_energy`.

    The integer pair has integer `weights`, where there are any.
    """
    rounded = None if weights is None else rounded_work(ledger, weights)
    seen = {"tokens": ledger.tokens, "pairs": ledger.pairs}
    matrices = matrix_products(ledger.shape, **seen)
    pointwise = [*pointwise_operations(ledger.shape, **seen), softmax_quotients(ledger.shape, **seen, after=False)]
    dense = dense_operations(ledger)
    energy = compare(
        table,
        T=ledger.T,
        matrices=matrices,
        pointwise=pointwise,
        dense=dense,
        sops=ledger.sops,
        spikes=ledger.spikes,
        synapses=ledger.synapses,
        tokens=ledger.tokens,
        rounded=rounded,
    )
    bits, rivals = ledger.T + 1, rivals or {}
    integer = f"int{bits if rounded is None else rounded.bits}"
    return EnergyRecord(
        table=table.name,
        mac_pj=table.mac_pj,
        ac_pj=table.ac_pj,
        source=table.source,
        int_bits=bits,
        int_mac_pj=integer_mac_pj(bits),
        int_ac_pj=integer_ac_pj(bits),
        weights={"ann": table.name, "snn": table.name, "int": integer, "snn_int": integer} | {name.value: f"int{bits}" for name in rivals},
        weights_note=None if rounded is None else f"of the decoder's Linears; activations, attention, gate and lm_head count int{bits}",
        int_source=f"{HOROWITZ}, 8 bits, scaled to {bits}",
        ann_mac_per_token=sum(each.mac for each in matrices + pointwise) / ledger.tokens,
        snn_mac_per_token=sum(each.mac for each in dense) / ledger.tokens,
        snn_ac_per_token=(ledger.sops + sum(each.ac for each in dense)) / ledger.tokens,
        **asdict(energy),
        int_static_pj_per_token=rivals.get(NetworkName.int_static),
        int_token_pj_per_token=rivals.get(NetworkName.int_token),
    )


def spike_rows(ledger: Ledger) -> list[Row]:
    """The rows of spikes.csv, one a site; lists have one entry a time step, a head, or a list of steps a head."""
    return [_row(site, ledger.tokens) for site in ledger.sites]


def _row(site: SiteSpikes, tokens: int) -> Row:
    T, neurons = len(site.spikes), sum(site.neurons)
    heads = [list(steps) for steps in zip(*site.spikes, strict=True)]  # [C][T]
    steps = [sum(row) for row in site.spikes]
    operations = [sum(row) for row in site.sops]
    return {
        "name": site.name,
        "layer": site.layer,
        "kind": site.kind,
        "neurons_per_token": neurons / tokens,
        "fan_out": sum(site.synapses) / max(1, neurons),
        "spikes_per_token": sum(steps) / tokens,
        "firing_rate": site.firing_rate,
        "sops_per_token": sum(operations) / tokens,
        "firing_rate_by_step": [spikes / max(1, neurons) for spikes in steps],
        "sops_per_token_by_step": [sops / tokens for sops in operations],
        "firing_rate_by_head": [sum(spikes) / max(1, population * T) for spikes, population in zip(heads, site.neurons, strict=True)],
        "spikes_by_head_and_step": heads,
        "sops_by_head_and_step": [list(steps) for steps in zip(*site.sops, strict=True)],
    }
