"""The ledger against counts that walk along every spike of a small network, and against attention performed one addition at a time."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from spikellm.coding.neuron import PhaseNeuron, PhaseTable, Slot, count_spikes, fire
from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind
from spikellm.execution.stepped import stepped
from spikellm.kernels.encode import Digits
from spikellm.kernels.temporal import spike_mixture, spike_pairs, step_weights
from spikellm.model.conversion import fill, get_neuron, install, model_sites, prepare, set_neuron, site_groups
from spikellm.model.prefix import attach_prefix
from spikellm.model.sites import GROUP_AXIS
from spikellm.spikes import accounts, ledger
from spikellm.spikes.counter import SpikeCounter, train_counts
from tests.codes import PARTITIONS, base2_table, base2_tables, partitioned_table, partitioned_tables
from tests.models import tiny_model

T = 5


def converted(
    name: str = "llama",
    *,
    after: bool,
    prefix: tuple[int, ...] = (),
    max_spikes: int | None = None,
    shift: int | None = None,
    amplitude: Amplitude = Amplitude.static,
    **options,
):
    model = tiny_model(name, **options)
    prepare(model, rotation_seed=0, normalise_after=after, query_block=4)
    attach_prefix(model, list(prefix))
    tables = base2_tables(model, T) if shift is None else partitioned_tables(model, T, shift=shift, heads=shift == 2)
    if max_spikes:
        tables = {key: replace(each, digits=Digits(max_spikes=max_spikes)) for key, each in tables.items()}
    fill(model, tables, amplitude=amplitude, compiled=False)
    return model


def spikes_by_hand(value: float, table: PhaseTable, group: int) -> list[int]:
    """The time steps at which one neuron fires, in float32 arithmetic as the membrane's."""
    digits, magnitude = table.digits, torch.tensor(value).abs()
    side = digits.sides == 2 and value < 0
    ends = [] if table.cuts is None else table.cuts[:, side * table.groups + group].tolist()
    interval = sum(magnitude > end for end in ends)
    row = (interval * digits.sides + side) * table.groups + group
    potential = magnitude + table.v0[row]
    times: list[int] = []
    for t in range(table.T):
        full = digits.max_spikes is not None and len(times) == digits.max_spikes
        digit = 1 if potential > table.theta[row, t] else -1 if digits.signed and potential < -table.theta[row, t] else 0
        if value != 0 and digit and not full:
            potential = potential - digit * table.h[row, t]
            times.append(t)
    return times


def walk(model, ids, amplitude: Amplitude = Amplitude.static) -> dict[tuple[str, str], Counter]:
    """(site, what) -> how much at (time step, column), by one loop per spike; what: spikes, sops (inside attention: `perform`)."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        get_neuron(model, site).register_forward_hook(lambda _m, inputs, _o, name=site.name: seen.setdefault(name, []).append(inputs[0]))
        for site in model_sites(model)
    ]
    model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    config, found = model.config, {}
    H, K = config.num_attention_heads, config.num_key_value_heads
    linear = {
        SiteKind.attention_input: (H + 2 * K) * config.head_dim, SiteKind.attention_output: config.hidden_size,
        SiteKind.mlp_input: 2 * config.intermediate_size, SiteKind.mlp_product: config.hidden_size, SiteKind.head_input: config.vocab_size,
    }  # fmt: skip
    for site in model_sites(model):
        table, columns = get_neuron(model, site).table, site_groups(config, site.kind)
        spikes, sops = Counter(), Counter()
        for x in seen[site.name]:
            if amplitude is Amplitude.token and site.kind in linear:
                x = x / x.abs().amax(-1, keepdim=True)
            for index in torch.nonzero(torch.ones_like(x), as_tuple=False).tolist():
                headed = site.kind in (SiteKind.query, SiteKind.key, SiteKind.value, SiteKind.softmax)
                size, place = (x.shape[1], index[1]) if headed else (x.shape[-1], index[-1])
                column, group = place * columns // size, place * table.groups // size
                for t in spikes_by_hand(x[tuple(index)].item(), table, group):
                    spikes[t, column] += 1
                    if site.kind in linear:
                        sops[t, column] += linear[site.kind]  # one weight a row
                    elif site.kind is SiteKind.activation:
                        sops[t, column] += 1  # the channel that it gates
        found[site.name, "spikes"], found[site.name, "sops"] = spikes, sops
    return found


def as_counter(table: list[list[int]]) -> Counter:
    return Counter({(t, column): value for t, row in enumerate(table) for column, value in enumerate(row) if value})


INSIDE = (SiteKind.query, SiteKind.key, SiteKind.value, SiteKind.softmax)


def trains_of(model, ids) -> dict[SiteKind, torch.Tensor]:
    """The spike trains [S, heads, rows, channels] of the neurons in the only layer's attention, of one sequence."""
    found: dict[SiteKind, list[torch.Tensor]] = {kind: [] for kind in INSIDE}

    def keep(kind):
        def look(neuron, inputs, _output):
            found[kind].append(fire(neuron.grouped(inputs[0]), neuron.table).view(-1, *inputs[0].shape)[:, 0])

        return look

    hooks = [get_neuron(model, site).register_forward_hook(keep(site.kind)) for site in model_sites(model) if site.kind in INSIDE]
    model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for kind in (SiteKind.key, SiteKind.value):
        found[kind].reverse()  # those of a prefix are coded last and stand first
    # a block of queries ends with the last key that any of them sees
    keys = found[SiteKind.softmax][-1].shape[-1]
    found[SiteKind.softmax] = [torch.nn.functional.pad(block, (0, keys - block.shape[-1])) for block in found[SiteKind.softmax]]
    return {kind: torch.cat(blocks, 2) for kind, blocks in found.items()}


def places(train: list) -> list[tuple[int, int, int, int]]:
    """(head, row, channel, sign) of every spike of a step."""
    return [
        (head, row, channel, sign)
        for head, rows in enumerate(train)
        for row, channels in enumerate(rows)
        for channel, sign in enumerate(channels)
        if sign
    ]


def perform(model, trains, seen: list[list[bool]], constants: torch.Tensor, *, after: bool):
    """Attention by adders: what every spike adds, one number at a time, in float64.

    Args:
        seen: [queries][keys] which coded keys a query sees.
        constants: exact keys [K, P, E], which every query sees.
        after: the row's sum is added up beside the values.

    Returns:
        by site: additions at (time step, head); scores [H, L, S] and of the exact keys [H, L, P]; mixtures [H, L, E (+ 1)].
    """
    tables = {site.kind: get_neuron(model, site).table for site in model_sites(model)}
    heads = {kind: train.shape[1] for kind, train in trains.items()}
    additions = {kind: Counter() for kind in INSIDE}
    (H, L, E), (K, S) = trains[SiteKind.query].shape[1:], trains[SiteKind.key].shape[1:3]
    wide = {"dtype": torch.float64}
    scores, exact = torch.zeros(H, L, S, **wide), torch.zeros(H, L, constants.shape[1], **wide)
    x, y, values = torch.zeros(H, L, E, **wide), torch.zeros(K, S, E, **wide), torch.zeros(K, S, E + after, **wide)
    mixtures = torch.zeros(H, L, E + after, **wide)
    values[..., E:] = 1

    def spikes(kind: SiteKind, t: int) -> list[tuple[float, tuple[int, int, int]]]:
        """(the wire's weight with the spike's sign, place) of every spike of a step, population by population."""
        table, populations = tables[kind], tables[kind].digits.populations
        found = []
        for p in range(populations):
            for head, row, channel, sign in places(trains[kind][t * populations + p].tolist()):
                d = table.d[p * table.groups + head * table.groups // heads[kind], t].double().item()
                found.append((sign * d, (head, row, channel)))
        return found

    def add(kind: SiteKind, t: int, head: int, total: torch.Tensor, index: tuple[int, ...], number: float) -> None:
        total[index] += number
        additions[kind][t, head] += 1

    for t in range(T):
        # keys first: they meet what queries have sent before this step
        for d, (head, key, e) in spikes(SiteKind.key, t):
            for reader in range(head * H // K, (head + 1) * H // K):
                for query in range(L):
                    if seen[query][key]:
                        add(SiteKind.key, t, head, scores, (reader, query, key), d * x[reader, query, e].item())
            add(SiteKind.key, t, head, y, (head, key, e), d)
        for d, (head, query, e) in spikes(SiteKind.query, t):
            for key in range(S):
                if seen[query][key]:
                    add(SiteKind.query, t, head, scores, (head, query, key), d * y[head * K // H, key, e].item())
            for column in range(constants.shape[1]):
                add(SiteKind.query, t, head, exact, (head, query, column), d * constants[head * K // H, column, e].item())
            add(SiteKind.query, t, head, x, (head, query, e), d)
    for t in range(T):
        for d, (head, key, e) in spikes(SiteKind.value, t):
            add(SiteKind.value, t, head, values, (head, key, e), d)
    for t in range(T):
        for d, (head, query, key) in spikes(SiteKind.softmax, t):
            assert seen[query][key]
            for e in range(E + after):
                add(SiteKind.softmax, t, head, mixtures, (head, query, e), d * values[head * K // H, key, e].item())
    return additions, scores, exact, mixtures


def by_operators(model, trains, *, after: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as coded, and the same scores and mixtures as stepped execution computes them (`kernels/temporal.py`), summed over time."""
    neurons = {site.kind: get_neuron(model, site) for site in model_sites(model)}
    H, K = (trains[kind].shape[1] for kind in (SiteKind.query, SiteKind.key))
    d = {kind: step_weights(neurons[kind].table.wires.double(), trains[kind].shape[1])[:, :, None, None] for kind in trains}
    wires = {kind: neuron.digits.populations for kind, neuron in neurons.items()}
    key, values = (trains[kind].repeat_interleave(H // K, 1) for kind in (SiteKind.key, SiteKind.value))
    pair = wires[SiteKind.query], wires[SiteKind.key]
    scores = sum(
        spike_pairs(trains[SiteKind.query], key, d[SiteKind.query], d[SiteKind.key].repeat_interleave(H // K, 1), populations=pair)
    )
    summed = (values * d[SiteKind.value].repeat_interleave(H // K, 1)).sum(0)
    if after:
        summed = torch.cat([summed, torch.ones_like(summed[..., :1])], -1)
    return (
        (trains[SiteKind.query] * d[SiteKind.query]).sum(0),
        scores,
        sum(spike_mixture(trains[SiteKind.softmax], summed, d[SiteKind.softmax], populations=wires[SiteKind.softmax])),
    )


CASES = {
    "after": ("llama", {"after": True}, {}),
    "after, prefix": ("llama", {"after": True, "prefix": (7, 1)}, {}),
    "before, prefix": ("llama", {"after": False, "prefix": (7, 1)}, {}),
    "sliding window": ("mistral", {"after": True, "sliding_window": 3}, {"window": 3}),
    "two spikes": ("qwen3", {"after": True, "max_spikes": 2}, {}),
    "populations": ("llama", {"after": True, "prefix": (7, 1), "shift": 0}, {}),
    "amplitudes of tokens": ("llama", {"after": True, "prefix": (7, 1), "shift": 1, "amplitude": Amplitude.token}, {}),
    "populations of every head": ("qwen3", {"after": False, "prefix": (7, 1), "shift": 2}, {}),
}
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 64}


@pytest.mark.parametrize("case", list(CASES))
def test_every_spike_and_operation_is_counted(case):
    """Linear layers and the gate synapse by synapse; attention by performing it, which also must give its result."""
    name, build, known = CASES[case]
    model = converted(name, **build, **SMALL)
    ids = torch.randint(2, 64, (1, 7), generator=torch.Generator().manual_seed(1))
    wanted = walk(model, ids, build.get("amplitude", Amplitude.static))
    trains = trains_of(model, ids)
    coded = 0 if build["after"] else len(build.get("prefix", ()))  # they stand first
    window = known.get("window", 7)
    seen = [[True] * coded + [key <= query < key + window for key in range(7)] for query in range(7)]
    attention = model.get_submodule("model.layers.0.self_attn.spiking")
    constants = torch.zeros(len(trains[SiteKind.key][0]), 0, 8)
    if attention.prefix_key is not None and build["after"]:
        constants = attention.rotation(attention.prefix_key).double()
    additions, scores, exact, mixtures = perform(model, trains, seen, constants, after=build["after"])
    queries, operator_scores, operator_mixtures = by_operators(model, trains, after=build["after"])
    mask = torch.tensor(seen)
    assert torch.allclose(scores[:, mask], operator_scores[:, mask], rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        exact, queries @ constants.double().repeat_interleave(len(queries) // len(constants), 0).mT, rtol=1e-12, atol=1e-12
    )
    assert torch.allclose(mixtures, operator_mixtures, rtol=1e-12, atol=1e-12)
    assert mixtures.abs().max() > 0.1
    found = ledger.count(model, ids)
    for site in found.sites:
        assert as_counter(site.spikes) == wanted[site.name, "spikes"], site.name
        performed = additions.get(SiteKind[site.kind], wanted[site.name, "sops"])
        assert as_counter(site.sops) == performed, site.name
        assert sum(performed.values()) > 0
    assert found.spikes == sum(counts.total() for (_, what), counts in wanted.items() if what == "spikes") > 0
    assert all(0 <= site.firing_rate <= 1 for site in found.sites)


class Marked(torch.autograd.Function):
    """A layer of neurons as a node of the graph."""

    @staticmethod
    def forward(ctx, x, trains):
        ctx.trains = trains
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Marker(Slot):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Marked.apply(x, 1)


def longest(node, known: dict) -> int:
    """Trains on the longest way from a node of autograd's graph to a leaf."""
    if node is None:
        return 0
    if node not in known:
        known[node] = getattr(node, "trains", 0) + max((longest(each, known) for each, _ in node.next_functions), default=0)
    return known[node]


@pytest.mark.parametrize(("name", "after", "two_sided"), [("llama", True, False), ("llama", False, True), ("qwen3", True, True)])
def test_latency_is_the_longest_way_through_the_networks_own_graph(name, after, two_sided):
    """T steps for every layer of neurons that fires before the next can: found in the graph of a forward of the model.

    ON and OFF neurons fire side by side.
    """
    model = tiny_model(name, num_hidden_layers=3)
    install(model, rotated=(), normalise_after=after)
    tables = base2_tables(model, T)
    if two_sided:
        for site, table in tables.items():
            if SiteKind.activation.name in site:
                tables[site] = PhaseTable(*table.rows.map(lambda rows: torch.cat([rows, rows])), digits=Digits(sides=2))
    fill(model, tables, compiled=False)
    ids = torch.arange(2, 8)[None]
    found = ledger.count(model, ids)
    for site in model_sites(model):
        set_neuron(model, site, Marker())
    model.get_input_embeddings().weight.requires_grad_(True)
    trains = longest(model(ids).logits.grad_fn, {})
    assert found.latency_steps == T * trains
    assert trains == 7 * 3 + 1
    assert accounts.spikes_record(found).latency_steps == found.latency_steps
    comparing = sum(sum(site.neurons) for site in found.sites) + two_sided * 3 * 6 * model.config.intermediate_size
    (neurons,) = (each for each in accounts.dense_operations(found) if each.name.startswith("neurons"))
    assert neurons.ac == T * comparing + found.spikes


def test_neurons_and_synapses_of_a_site():
    """If every neuron fired at every step, SOPs would be T x synapses: tables that always fire, inputs that are never zero."""
    always = PhaseTable(theta=-torch.ones(1, T), h=torch.zeros(1, T), d=torch.full((1, T), 0.01), v0=torch.zeros(1))
    for after, prefix in ((True, (7, 1)), (False, (7, 1)), (True, ())):
        model = tiny_model()
        install(model, rotated=(), normalise_after=after, query_block=4)
        tables = {site.name: always for site in model_sites(model)}
        attach_prefix(model, list(prefix))
        fill(model, tables, compiled=False)
        found = ledger.count(model, torch.randint(2, 256, (2, 9), generator=torch.Generator().manual_seed(1)))
        assert found.pairs == 2 * 2 * 45  # windows, layers, 9 * 10 / 2
        coded = 0 if after else len(prefix)
        assert (found.coded_prefix, found.exact_prefix) == (coded, len(prefix) - coded)
        for site in found.sites:
            assert [sum(row) for row in site.spikes] == [sum(site.neurons)] * T, site.name
            assert [sum(row) for row in site.sops] == [sum(site.synapses)] * T, site.name
            assert site.firing_rate == 1
        by_kind = {site.kind: sum(site.neurons) for site in found.sites if site.layer in (0, None)}
        assert by_kind["query"] == 2 * 9 * 4 * 16
        assert by_kind["key"] == by_kind["value"] == 2 * (9 + coded) * 2 * 16
        assert by_kind["softmax"] == 2 * 4 * (45 + 9 * coded)
        assert by_kind["activation"] == by_kind["mlp_product"] == 2 * 9 * 144


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
def test_codes_and_trains_count_the_same(groups):
    """Folded and stepped feeding, whatever tables the columns have."""
    taus = [0.5 + 0.25 * index for index in range(groups)]
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    x[0, 0, :4] = 0
    neuron = PhaseNeuron(base2_table(taus, T), axis=-1, compiled=False)
    folded, stepped = (SpikeCounter(neuron, axis=-1, columns=4 if groups != 1 else 2, fan_out=10) for _ in range(2))
    assert torch.equal(folded(x), neuron(x))
    train = fire(neuron.grouped(x), neuron.table)
    stepped.add_train(train.view(T, *x.shape))
    for name in ("spikes", "sops", "neurons", "synapses"):
        assert torch.equal(getattr(folded, name), getattr(stepped, name)), name
    assert folded.spikes.sum() == train.count_nonzero() > 0


@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_populations_count_together_step_by_step(digits):
    x = 4 * torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    neuron = PhaseNeuron(partitioned_table([3.0, 4.0], T, digits), axis=-1, compiled=False)
    folded, stepped = (SpikeCounter(neuron, axis=-1, columns=4, fan_out=10) for _ in range(2))
    folded.add_values(x)
    stepped.add_train(fire(neuron.grouped(x), neuron.table).view(-1, *x.shape))
    wanted = torch.zeros(T, 4, dtype=torch.int64)
    for place, value in enumerate(x.movedim(-1, 0).flatten().tolist()):
        channel = place // 6
        for t in spikes_by_hand(value, neuron.table, channel // 6):
            wanted[t, channel // 3] += 1
    for counter in (folded, stepped):
        assert torch.equal(counter.spikes, wanted)
        assert torch.equal(counter.sops, 10 * wanted)
        assert counter.neurons.tolist() == [18] * 4


def test_firing_rate_of_hand_traces():
    """tau = 1, T = 3, v0 = 1/16: 1/2 -> 100, 5/8 -> 101, 7/8 -> 111, 0 and 1/32 -> 000."""
    x = torch.tensor([0.5, -0.625, 0.875, 0.0, 0.03125])
    counts = count_spikes(x.view(1, 1, -1), base2_table(1.0, 3), compiled=False)
    assert counts.flatten().tolist() == [3, 1, 2]
    assert train_counts(fire(x.view(1, 1, -1), base2_table(1.0, 3))).flatten().tolist() == [3, 1, 2]


def test_observing_changes_nothing_and_leaves_nothing_behind(ids):
    model = converted(after=True, prefix=(1,))
    neurons = [get_neuron(model, site) for site in model_sites(model)]
    before, hooks = model(ids).logits, [list(module._forward_pre_hooks.values()) for module in model.modules()]
    with ledger.counting(model):
        assert torch.equal(model(ids).logits, before)
    assert [get_neuron(model, site) for site in model_sites(model)] == neurons
    assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == hooks


def by_steps(model, prompt, made):
    """Spikes of every site in a decoding loop with a cache, a forward a token, as a counter of trains finds them."""
    found = {site.name: Counter() for site in model_sites(model)}
    _, cache = model.base_model(prompt[None], use_cache=True, return_dict=False)

    def keep(neuron, inputs, _, site):
        x, axis = inputs[0], GROUP_AXIS[site.kind]
        train = fire(neuron.grouped(neuron.coded(x)), neuron.table).view(T, -1, *x.shape).abs().sum(1)
        for column, part in enumerate(train.chunk(site_groups(model.config, site.kind), dim=axis if axis < 0 else axis + 1)):
            found[site.name].update({(t, column): spikes for t, spikes in enumerate(part.flatten(1).sum(1).tolist()) if spikes})

    hooks = [get_neuron(model, site).register_forward_hook(partial(keep, site=site)) for site in model_sites(model)]
    for token in made:
        model.base_model(token[None, None], None, None, cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"after": True, "prefix": (7, 1)}), ("mistral", {"after": True, "sliding_window": 5}), ("llama", {"after": False})],
)
def test_decoded_tokens_count_what_a_loop_with_a_cache_fires(name, options, ids):
    model = converted(name, dtype=torch.float64, **options)
    prompt, made = ids[0, :9], ids[0, 9:16]
    found = ledger.count_decoded(model, [(prompt, made)])
    wanted = by_steps(model, prompt, made)
    for site in found.sites:
        assert as_counter(site.spikes) == wanted[site.name], site.name
    assert found.tokens == 7
    window, prefix = options.get("sliding_window", 99), len(options.get("prefix", ()))
    pairs = sum(min(9 + step + 1, window) for step in range(7))
    assert found.pairs == 2 * pairs
    for site in found.sites:
        spikes, sops = sum(map(sum, site.spikes)), sum(map(sum, site.sops))
        match SiteKind[site.kind]:
            case SiteKind.key:  # its own query in both heads of the group, and its sum
                assert sops == 3 * spikes
            case SiteKind.value:
                assert sops == spikes
            case SiteKind.query:
                assert sum(site.synapses) == 4 * 16 * (pairs + 7 * (prefix + 1))
            case SiteKind.softmax:
                assert sops == spikes * (16 + options["after"])
    with stepped(model):
        assert ledger.count_decoded(model, [(prompt, made)]) == found
    assert ledger.count_decoded(model, [(prompt, made[:0]), (prompt, made)]) == found


def test_a_coded_prefix_fires_once_and_not_with_every_token(ids):
    model = converted(after=False, prefix=(7, 1), dtype=torch.float64)
    found = ledger.count_decoded(model, [(ids[0, :9], ids[0, 9:16])])
    for site in found.sites:
        if site.kind in ("key", "value"):
            assert sum(site.neurons) == 7 * 2 * 16


def test_padding_is_refused(ids):
    model = converted(after=True)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with ledger.counting(model), pytest.raises(ValueError, match="padd"):
        model(ids, attention_mask=mask)


def test_a_ledger_survives_json():
    found = ledger.count(converted(after=True), torch.arange(2, 10)[None])
    assert ledger.Ledger.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.slow
def test_the_fused_count_equals_the_plain_one():
    for shape, taus in [((1, 1, 999), [3.0]), ((4, 30, 5), [0.5, 1.0, 2.0, 4.0])]:
        x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x.view(-1)[:2] = 0.0
        for max_spikes in (None, 2):
            table = replace(base2_table(taus, T), digits=Digits(max_spikes=max_spikes))
            assert torch.equal(count_spikes(x, table), count_spikes(x, table, compiled=False))
