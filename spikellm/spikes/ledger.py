"""The spike ledger: spikes, firing rates and synaptic operations of a real run, per site, head and time step.

A synaptic operation (SOP) is one spike arriving at one synapse: an accumulate. SOPs = spikes x fan-out, and the fan-out of a spike is
what a time-stepped execution (`kernels/temporal.py`) adds up because of it:

    norms, o_proj's and down_proj's input    the outputs of the Linears that read it (q, k, v; gate, up; o; down; lm_head)
    query            the keys its query may see, the prefix among them, + 1
    key              the queries that may see it, in every query head of its group, + 1
    value            1
    softmax          E, a row of values; + 1 for the row's sum where the softmax is normalised after coding
    activation       1, the channel of `up` that it gates

Queries and keys fire in the same steps, and with X_t, Y_t their spikes summed so far (each weighted by its d_t),

    X_t Y_t^T - X_t-1 Y_t-1^T  =  x_t Y_t^T + X_t-1 y_t^T

so every spike of either side adds one element of the other side's sums to each score that it takes part in: its fan-out is the other
operand's row, whether or not something has been summed there yet; the 1 is its own sum. Softmax and activation fire when value and
`up` have been integrated: their spikes meet complete operands, and a value's spike only builds its sum. Pairs that the mask hides
count nowhere. Counting each pair of spikes that meet (T^2 a product) would count work that nobody does.

A token that is decoded with a cache comes in a forward of its own: its key fires beside its own query alone, which is then the key's
whole fan-out, and queries to come collect rows of its sum. What a pair costs a query's spikes and the softmax's is the same.

Populations of a neuron (ON and OFF, intervals of |x|) send on wires of their own in the same T steps. An input is one population's, so that
spikes and fan-outs are counted as those of one neuron; what there is more of with each population, comparisons and scaled sums of the
receivers, is in `accounts.py`.

Counters (`counter.py`) sit around neurons only while `count` runs. What stays dense is in `energy.py`, and is listed in
results.json.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.choices import RotationPart
from spikellm.config.labels import SiteKind
from spikellm.execution.modules import SteppedNeuron
from spikellm.model.attention import SpikingAttention, attentions
from spikellm.model.cache import read
from spikellm.model.conversion import get_neuron, model_sites, online_parts, set_neuron, site_groups
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import (
    ATTENTION,
    GROUP_AXIS,
    HEAD,
    LINEARS,
    ONE_SYNAPSE,
    READERS,
    SPIKING_ATTENTION,
    Site,
    decoder_layers,
    head_width,
)
from spikellm.spikes.counter import SpikeCounter
from spikellm.spikes.energy import DecoderShape


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpikes:
    """Counts of one site: per time step and column (attention head, or one), summed over all tokens; plain numbers."""

    name: str
    kind: str  # of `SiteKind`
    layer: int | None
    populations: list[int]  # of each neuron group: its tables in use, each with a wire of its own
    intervals: list[int]  # of each group: pieces in use that |x| is cut into, the most of its sides
    spikes: list[list[int]]  # [T][C]
    sops: list[list[int]]  # [T][C]
    neurons: list[int]  # [C]
    synapses: list[int]  # [C] neurons times their fan-out
    per_token: bool = False  # each token has an amplitude of its own

    @property
    def firing_rate(self) -> float:
        """spikes / (neurons x T); a neuron and all its populations are one."""
        return _sum(self.spikes) / max(1, sum(self.neurons) * len(self.spikes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """All sites of a run, and what else its costs depend on."""

    sites: list[SiteSpikes]
    tokens: int
    windows: int
    pairs: int  # (query, key) pairs that the mask let see each other, over all sequences and layers, without the prefix
    coded_prefix: int  # prefix positions whose keys and values pass neurons
    exact_prefix: int  # prefix positions beside the coded ones
    normalise_after: bool
    rotated: list[RotationPart]  # those that act online, R3 and R4
    shape: DecoderShape

    def to_json(self) -> dict[str, object]:
        """In JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        sites = [SiteSpikes(**site) for site in record["sites"]]
        rotated = [RotationPart(part) for part in record["rotated"]]
        return cls(**record | {"sites": sites, "rotated": rotated, "shape": DecoderShape(**record["shape"])})

    @property
    def coded_pairs(self) -> int:
        """Pairs with coded prefix columns among them: they are in the softmax like any other."""
        return self.pairs + self.coded_prefix * self.tokens * self.shape.layers

    @property
    def T(self) -> int:
        """Time steps."""
        return len(self.sites[0].spikes)

    @property
    def latency_steps(self) -> int:
        """Time steps from a token to its logits.

        Neurons integrate while the layer of neurons before them fires, and then fire for T steps themselves, all populations at once; all
        that is between them takes no steps, nor does the embedding. In a decoder layer there fire one after the other: norm; query, key
        and value; softmax; o_proj's input; norm; SiLU (`up` integrates beside it); down_proj's input; and, in the end, the final norm.
        """
        beside = (SiteKind.key.name, SiteKind.value.name)  # the query
        return self.T * sum(site.kind not in beside for site in self.sites)

    @property
    def spikes(self) -> int:
        """Spikes of all sites."""
        return sum(_sum(site.spikes) for site in self.sites)

    @property
    def sops(self) -> int:
        """Synaptic operations of all sites: one for each synapse that a spike reaches."""
        return sum(_sum(site.sops) for site in self.sites)

    @property
    def neurons(self) -> int:
        """Neurons of all sites, summed over tokens."""
        return sum(sum(site.neurons) for site in self.sites)

    @property
    def synapses(self) -> int:
        """Neurons times their fan-out, summed over sites and tokens."""
        return sum(sum(site.synapses) for site in self.sites)


def _sum(table: list[list[int]]) -> int:
    return sum(sum(row) for row in table)


def decoder_shape(model: PreTrainedModel) -> DecoderShape:
    """The shape of a model, installed or not, also on the meta device."""
    config: Any = model.config
    layer = decoder_layers(model)[0]
    linears: list[Any] = [layer.get_submodule(name) for name in LINEARS]
    return DecoderShape(
        layers=config.num_hidden_layers,
        D=config.hidden_size,
        F=config.intermediate_size,
        H=config.num_attention_heads,
        K=config.num_key_value_heads,
        E=head_width(config),
        V=config.vocab_size,
        biases=sum(linear.bias.numel() for linear in linears if linear.bias is not None),
        head_norms=hasattr(layer.get_submodule(ATTENTION), "q_norm"),
    )


def site_fan_out(model: PreTrainedModel, site: Site) -> int:
    """Synapses of a spike at `site`; 0 at queries and keys, where it depends on what the mask lets see."""
    if site.kind is SiteKind.head_input:
        head: Any = model.get_submodule(HEAD)
        return head.out_features
    layer: Any = decoder_layers(model)[site.layer or 0]
    if site.kind in READERS:
        return sum(layer.get_submodule(name).out_features for name in READERS[site.kind])
    if site.kind in ONE_SYNAPSE:
        return 1
    attention: SpikingAttention = layer.get_submodule(f"{ATTENTION}.{SPIKING_ATTENTION}")
    return attention.head_width + attention.normalise_after if site.kind is SiteKind.softmax else 0


class AttentionWatch:
    """Before each forward of one attention, tells its counters what the mask lets see.

    Args:
        attention: the layer's, of transformers.
        decoded: each token as in a forward of its own, behind a cache; a coded prefix has fired before.
    """

    def __init__(self, attention: nn.Module, counters: dict[SiteKind, SpikeCounter], *, decoded: bool) -> None:
        spiking: Any = attention.get_submodule(SPIKING_ATTENTION)
        self.counters, self.decoded, self.pairs, self.counts = counters, decoded, 0, True
        self.spiking: SpikingAttention = spiking
        self.steps = spiking.query.T if isinstance(spiking.query, SteppedNeuron) else 1  # in the batch axis
        counters[SiteKind.softmax].whole = False
        self.handles = [attention.register_forward_pre_hook(self._look, with_kwargs=True), spiking.register_forward_pre_hook(self._coded)]

    def _look(self, _: nn.Module, _arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keys are coded inside this forward, before attention."""
        if not self.counts:
            return
        prefix = 0 if self.spiking.prefix_key is None else self.spiking.prefix_key.shape[1]
        mask = keywords["attention_mask"]
        keys, queries = visibility(mask[: len(mask) // self.steps])
        pairs = int(keys.sum())
        self.pairs += pairs
        if not self.spiking.normalise_after:  # the prefix is among the keys, and every query sees it
            pairs += prefix * keys.numel()
        softmax = self.counters[SiteKind.softmax]
        self.counters[SiteKind.query].fan_out = keys.flatten() + prefix + 1
        self._keys(torch.ones_like(keys) if self.decoded else queries)
        assert isinstance(softmax.fan_out, int)
        share = pairs * self.counters[SiteKind.query].columns // softmax.columns
        softmax.add_neurons(share, share * softmax.fan_out)
        for kind in (SiteKind.key, SiteKind.value):
            self.counters[kind].counts = True

    def _coded(self, spiking: nn.Module, inputs: tuple[Any, ...]) -> None:
        """What keys and values code from here on are those of a prefix, which every query sees."""
        if not self.counts:
            return
        assert isinstance(spiking, SpikingAttention)
        queries = inputs[3].shape[2]
        prefix = 0 if spiking.prefix_key is None else spiking.prefix_key.shape[1]
        self._keys(torch.full((len(inputs[0]) // self.steps, prefix), queries))
        for kind in (SiteKind.key, SiteKind.value):
            self.counters[kind].counts = not self.decoded

    def _keys(self, queries: Int64[Tensor, "B S"]) -> None:
        heads, key = self.counters[SiteKind.query].columns, self.counters[SiteKind.key]
        key.fan_out = queries.flatten() * (heads // key.columns) + 1


def visibility(mask: Bool[Tensor, "B 1 L S"]) -> tuple[Int64[Tensor, "B L"], Int64[Tensor, "B S"]]:
    """Keys that every query may see, queries that may see every key.

    Raises:
        ValueError: a query that may see nothing, as padding has.
    """
    keys, queries = mask[:, 0].sum(-1), mask[:, 0].sum(-2)
    if not keys.all():
        raise ValueError("spikes of padded sequences cannot be counted: padding would fire as well")
    return keys, queries


@contextmanager
def counting(model: PreTrainedModel, *, decoded: bool = False) -> Iterator[tuple[dict[Site, SpikeCounter], list[AttentionWatch]]]:
    """Within: counters around the neurons of a converted model, or fed by the trains of one that runs in steps (`execution/stepped.py`).

    Args:
        decoded: see `AttentionWatch`.

    Raises:
        ValueError: a site carries no neuron.
    """
    counters, handles = {}, []
    for site in model_sites(model):
        neuron = get_neuron(model, site)
        if not isinstance(neuron, PhaseNeuron):
            raise ValueError(f"{site.name} carries no neuron: convert the model before its spikes are counted")
        counters[site] = SpikeCounter(
            neuron, axis=GROUP_AXIS[site.kind], columns=site_groups(model.config, site.kind), fan_out=site_fan_out(model, site)
        )
    watches = []
    for index, layer in enumerate(decoder_layers(model)):
        own = {site.kind: counter for site, counter in counters.items() if site.layer == index}
        watches.append(AttentionWatch(layer.get_submodule(ATTENTION), own, decoded=decoded))
    for site, counter in counters.items():
        if isinstance(counter.neuron, SteppedNeuron):
            handles.append(counter.neuron.register_forward_hook(counter.look))
        else:
            set_neuron(model, site, counter)
    try:
        yield counters, watches
    finally:
        for handle in (*handles, *(handle for watch in watches for handle in watch.handles)):
            handle.remove()
        for site, counter in counters.items():
            set_neuron(model, site, counter.neuron)


@torch.no_grad()
def count(model: PreTrainedModel, windows: Int[Tensor, "W L"]) -> Ledger:
    """The ledger of a converted model on `windows`, one window a forward; within `stepped.stepped` counted from its spike trains.

    Every token counts, the last of a window too: its final norm fires into the language model's head.
    """
    with counting(model) as (counters, watches):
        for window in tqdm(windows, desc="count spikes", unit="window", disable=None):
            model.base_model(window[None].to(model.device), use_cache=False)
    return _ledger(model, counters, watches, tokens=windows.numel(), windows=len(windows))


@torch.no_grad()
def count_decoded(model: PreTrainedModel, texts: Iterable[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]]) -> Ledger:
    """The ledger of the tokens N that followed the prompts P, as they are decoded one by one; the prompts themselves are not in it.

    N tokens go through the model in one forward behind the cache of their prompt: they cause the spikes that they caused alone.
    """
    texts = [(prompt, made) for prompt, made in texts if len(made)]
    with counting(model, decoded=True) as (counters, watches):
        for prompt, made in tqdm(texts, desc="count spikes", unit="text", disable=None):
            with _still(counters, watches):
                cache = read(model, prompt)
            read(model, made, cache)
    return _ledger(model, counters, watches, tokens=sum(len(made) for _, made in texts), windows=len(texts))


@contextmanager
def _still(counters: dict[Site, SpikeCounter], watches: list[AttentionWatch]) -> Iterator[None]:
    """Within: nothing is counted."""
    watching: list[Any] = [*counters.values(), *watches]
    for each in watching:
        each.counts = False
    yield
    for each in watching:
        each.counts = True


def _ledger(
    model: PreTrainedModel, counters: dict[Site, SpikeCounter], watches: list[AttentionWatch], *, tokens: int, windows: int
) -> Ledger:
    attention = attentions(model)[0]
    prefix = 0 if attention.prefix_key is None else attention.prefix_key.shape[1]
    return Ledger(
        sites=[site_spikes(site, counter) for site, counter in counters.items()],
        tokens=tokens,
        windows=windows,
        pairs=sum(watch.pairs for watch in watches),
        coded_prefix=0 if attention.normalise_after else prefix,
        exact_prefix=prefix if attention.normalise_after else 0,
        normalise_after=attention.normalise_after,
        rotated=online_parts(decoder_layers(model)[0]),
        shape=decoder_shape(model),
    )


def site_spikes(site: Site, counter: SpikeCounter) -> SiteSpikes:
    """What a counter has counted, in plain numbers."""
    intervals = counter.neuron.table.intervals
    return SiteSpikes(
        name=site.name,
        kind=site.kind.name,
        layer=site.layer,
        populations=intervals.sum(0).tolist(),
        intervals=intervals.amax(0).tolist(),
        spikes=counter.spikes.tolist(),
        sops=counter.sops.tolist(),
        neurons=counter.neurons.tolist(),
        synapses=counter.synapses.tolist(),
        per_token=counter.neuron.per_token,
    )
