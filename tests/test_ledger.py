"""The ledger against a count that walks along every spike and every synapse of a small network."""

import json
from collections import Counter

import pytest
import torch
from conftest import base2_table, base2_tables, tiny_model

from spikellm import ledger
from spikellm.conversion import convert, get_neuron, install, model_sites, site_groups
from spikellm.neuron import PhaseNeuron, PhaseTable, count_spikes, fire
from spikellm.prefix import attach_prefix
from spikellm.rotation import rotate
from spikellm.sites import SiteKind
from spikellm.spike_counter import SpikeCounter, train_counts

T = 5


def converted(name: str = "llama", *, after: bool, prefix: tuple[int, ...] = (), tables=None, max_spikes: int | None = None, **options):
    model = tiny_model(name, **options)
    rotate(model, seed=0)
    install(model, rotated=True, normalise_after=after, query_block=4)
    attach_prefix(model, list(prefix))
    tables = tables or base2_tables(model, T)
    if max_spikes:
        tables = {key: PhaseTable(theta=each.theta, h=each.h, d=each.d, v0=each.v0, max_spikes=max_spikes) for key, each in tables.items()}
    convert(model, tables, compiled=False)
    return model


def spikes_by_hand(value: float, table: PhaseTable, group: int) -> list[int]:
    """The time steps at which one neuron fires, in float32 arithmetic as the membrane's."""
    potential = torch.tensor(value).abs() + table.v0[group]
    times: list[int] = []
    for t in range(table.T):
        full = table.max_spikes is not None and len(times) == table.max_spikes
        if value != 0 and potential > table.theta[group, t] and not full:
            potential = potential - table.h[group, t]
            times.append(t)
    return times


def walk(model, ids, *, after: bool, prefix: int, window: int | None = None) -> dict[tuple[str, str], Counter]:
    """(site, what) -> how much at (time step, column), by one loop per spike; what: spikes, sops."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        get_neuron(model, site).register_forward_hook(lambda _m, inputs, _o, name=site.name: seen.setdefault(name, []).append(inputs[0]))
        for site in model_sites(model)
    ]
    model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    config, found = model.config, {}
    L, H, K = ids.shape[1], config.num_attention_heads, config.num_key_value_heads

    def visible(query: int, key: int) -> bool:
        return key <= query and (window is None or query - key < window)

    linear = {
        SiteKind.attention_input: (H + 2 * K) * config.head_dim, SiteKind.attention_output: config.hidden_size,
        SiteKind.mlp_input: 2 * config.intermediate_size, SiteKind.mlp_product: config.hidden_size, SiteKind.head_input: config.vocab_size,
    }  # fmt: skip
    shift = 0 if after else prefix  # coded prefix keys stand first
    for site in model_sites(model):
        table, columns = get_neuron(model, site).table, site_groups(config, site.kind)
        spikes, sops = Counter(), Counter()
        first_query = 0
        for x in seen[site.name]:
            for index in torch.nonzero(torch.ones_like(x), as_tuple=False).tolist():
                headed = site.kind in (SiteKind.query, SiteKind.key, SiteKind.value, SiteKind.softmax)
                size, place = (x.shape[1], index[1]) if headed else (x.shape[-1], index[-1])
                column, group = place * columns // size, place * table.groups // size
                for t in spikes_by_hand(x[tuple(index)].item(), table, group):
                    spikes[t, column] += 1
                    if site.kind in linear:
                        sops[t, column] += linear[site.kind]  # one weight a row
                    elif site.kind is SiteKind.query:  # its own sum, then the sums of every key that it sees
                        sops[t, column] += 1
                        for _ in [key for key in range(L) if visible(index[2], key)] + ["prefix"] * prefix:
                            sops[t, column] += 1
                    elif site.kind is SiteKind.key:
                        sops[t, column] += 1
                        for query in range(L):
                            for head in range(H):
                                if head * K // H == index[1] and (index[2] < shift or visible(query, index[2] - shift)):
                                    sops[t, column] += 1
                    elif site.kind is SiteKind.softmax:
                        assert index[3] < shift or visible(first_query + index[2], index[3] - shift)
                        sops[t, column] += config.head_dim + (1 if after else 0)
                    else:  # its own sum; the channel that it gates
                        sops[t, column] += 1
            first_query += x.shape[2] if site.kind is SiteKind.softmax else 0
        found[site.name, "spikes"], found[site.name, "sops"] = spikes, sops
    return found


def as_counter(table: list[list[int]]) -> Counter:
    return Counter({(t, column): value for t, row in enumerate(table) for column, value in enumerate(row) if value})


CASES = {
    "after": ("llama", {"after": True}, {}),
    "after, prefix": ("llama", {"after": True, "prefix": (7, 1)}, {}),
    "before, prefix": ("llama", {"after": False, "prefix": (7, 1)}, {}),
    "sliding window": ("mistral", {"after": True, "sliding_window": 3}, {"window": 3}),
    "two spikes": ("qwen3", {"after": True, "max_spikes": 2}, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_every_spike_and_operation_is_counted(case):
    name, build, known = CASES[case]
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 64}
    model = converted(name, **build, **small)
    ids = torch.randint(2, 64, (1, 7), generator=torch.Generator().manual_seed(1))
    wanted = walk(model, ids, after=build["after"], prefix=len(build.get("prefix", ())), **known)
    found = ledger.count(model, ids)
    for site in found.sites:
        assert as_counter(site.spikes) == wanted[site.name, "spikes"], site.name
        assert as_counter(site.sops) == wanted[site.name, "sops"], site.name
    assert found.spikes == sum(counts.total() for (_, what), counts in wanted.items() if what == "spikes") > 0
    assert all(0 <= site.firing_rate <= 1 for site in found.sites)


def test_neurons_and_synapses_of_a_site():
    """If every neuron fired at every step, SOPs would be T x synapses: tables that always fire, inputs that are never zero."""
    always = PhaseTable(theta=-torch.ones(1, T), h=torch.zeros(1, T), d=torch.full((1, T), 0.01), v0=torch.zeros(1))
    for after, prefix in ((True, (7, 1)), (False, (7, 1)), (True, ())):
        model = tiny_model()
        install(model, rotated=False, normalise_after=after, query_block=4)
        tables = {site.name: always for site in model_sites(model)}
        attach_prefix(model, list(prefix))
        convert(model, tables, compiled=False)
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


def test_firing_rate_of_hand_traces():
    """tau = 1, T = 3, v0 = 1/16: 1/2 -> 100, 5/8 -> 101, 7/8 -> 111, 0 and 1/32 -> 000."""
    x = torch.tensor([0.5, -0.625, 0.875, 0.0, 0.03125])
    counts = count_spikes(x.view(1, 1, -1), base2_table(1.0, 3), compiled=False)
    assert counts.flatten().tolist() == [3, 1, 2]
    assert train_counts(fire(x.view(1, 1, -1), base2_table(1.0, 3))).flatten().tolist() == [3, 1, 2]


def test_observing_changes_nothing_and_leaves_nothing_behind(ids):
    model = converted(after=True, prefix=(1,))
    neurons = [get_neuron(model, site) for site in model_sites(model)]
    before = model(ids).logits
    with ledger.counting(model):
        assert torch.equal(model(ids).logits, before)
    assert [get_neuron(model, site) for site in model_sites(model)] == neurons
    assert not any(module._forward_pre_hooks for module in model.modules())


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
            base = base2_table(taus, T)
            table = PhaseTable(theta=base.theta, h=base.h, d=base.d, v0=base.v0, max_spikes=max_spikes)
            assert torch.equal(count_spikes(x, table), count_spikes(x, table, compiled=False))
