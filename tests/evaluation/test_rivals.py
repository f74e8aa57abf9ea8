"""The integer networks against a fake-quantised LLaMA in plain torch, their costs against a count, and the job that measures them."""

import math
from collections.abc import Callable

import pytest
import torch
from hydra.errors import HydraException
from torch import Tensor

from spikellm.calibration.calibrate import calibrate
from spikellm.config.checks import InputError
from spikellm.config.choices import Groups
from spikellm.config.labels import NetworkName, SiteKind
from spikellm.config.measures import DEFAULT_NETWORKS
from spikellm.config.snn import PrefixConfig
from spikellm.model.attention import attentions
from spikellm.model.conversion import fill, get_neuron, model_sites, occupy, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.model.sites import Site
from spikellm.report.console import console_table
from spikellm.report.results import summary_rows, write_results, write_summary
from spikellm.run.command import explain
from spikellm.search.integers import static_quantizers, token_quantizers
from spikellm.spikes.accounts import dense_operations_of_integers, energy_record, rivals_energy
from spikellm.spikes.energy import COST_TABLES, integer_mac_pj
from spikellm.spikes.ledger import count
from spikellm.store.record import Results
from tests.codes import asked, base2_tables
from tests.configure import configure
from tests.jobs import run
from tests.models import norm_ratio, tiny_model

T = 4
WIDTHS = {"intermediate_size": 128}  # R4 is Sylvester's matrix
Quantise = Callable[[Tensor, str, bool], Tensor]  # values [.., groups, N], name of the site, signed


# ---- a LLaMA with fake quantisation, from weights alone ---------------------------------------------------------------------


def sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(order)


def fixed(levels: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Quantise:
    """One step a group, as it was found."""

    def quantise(x: Tensor, site: str, _: bool) -> Tensor:
        step, low, high = (each.to(x.dtype)[:, None] for each in levels[site])
        return torch.minimum(torch.maximum(torch.round(x / step), low), high) * step

    return quantise


CLIPPED = {4: 0.94}  # of a token's range, by T: the best uniform quantiser of 32 levels (Max 1960)


def by_token(T: int) -> Quantise:
    """Integers over a share of what lies between a token's least and largest value."""

    def quantise(x: Tensor, _: str, signed: bool) -> Tensor:
        number = (2 ** (T + 1) if signed else 2**T) - 1
        share = CLIPPED.get(T, 1.0) if signed else 1.0
        least, largest = share * x.amin(-1, keepdim=True).clamp(max=0), share * x.amax(-1, keepdim=True).clamp(min=0)
        step = (largest - least) / number
        zero_point = torch.round(-least / step)
        return ((torch.round(x / step) + zero_point).clamp(0, number) - zero_point) * step

    return quantise


class Reference:
    """Forward of rotated weights (norms folded) in float64, everything that is multiplied sent through `quantise`."""

    def __init__(self, model, quantise: Quantise, *, after: bool, prefix: bool = False) -> None:
        self.weights = {name: weight.double() for name, weight in model.state_dict().items()}
        self.attentions = attentions(model) if prefix else []
        self.config, self.quantise, self.after = model.config, quantise, after
        self.values = self.levels = 0

    def coded(self, x: Tensor, site: str, groups: int = 1, *, signed: bool = True) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))
        self.values += x.numel()
        self.levels += parts.shape[:-1].numel()
        return self.quantise(parts, site, signed).view(x.shape)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def heads(self, x: Tensor, number: int, *, rotated: bool) -> Tensor:
        """[L, heads, E], positions and R3 applied."""
        x, E = x.unflatten(-1, (number, -1)), self.config.head_dim
        if not rotated:
            return x
        frequency = 10000.0 ** (-torch.arange(0, E, 2, dtype=torch.float32) / E)
        angle = (torch.arange(len(x), dtype=torch.float32)[:, None] * frequency).double()[:, None]
        # transformers has the tables of a float32 angle
        cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat([-second, first], -1) * sin) @ sylvester(E)

    def layer(self, h: Tensor, number: int) -> Tensor:
        name, place, config = f"model.layers.{number}", f"layers.{number}", self.config
        H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        x = self.coded(self.norm(h), f"{place}.attention_input")
        q, k, v = (self.linear(x, f"{name}.self_attn.{part}_proj") for part in "qkv")
        q, k, v = self.heads(q, H, rotated=True), self.heads(k, K, rotated=True), self.heads(v, K, rotated=False)
        q, k, v = (
            self.coded(each.flatten(1), f"{place}.{part}", groups).unflatten(-1, (groups, E))
            for part, each, groups in (("query", q, H), ("key", k, K), ("value", v, K))
        )
        mixed = torch.stack([self.head(q[:, head], k[:, head * K // H], v[:, head * K // H], number, head) for head in range(H)], 1)
        h = h + self.linear(self.coded(mixed.flatten(1), f"{place}.attention_output", H), f"{name}.self_attn.o_proj")
        x = self.coded(self.norm(h), f"{place}.mlp_input")
        gate = self.linear(x, f"{name}.mlp.gate_proj")
        product = self.coded(gate * torch.sigmoid(gate), f"{place}.activation") * self.linear(x, f"{name}.mlp.up_proj")
        product = self.coded(product @ sylvester(config.intermediate_size), f"{place}.mlp_product")
        return h + self.linear(product, f"{name}.mlp.down_proj")

    def head(self, q: Tensor, k: Tensor, v: Tensor, place: int, number: int) -> Tensor:
        """Query by query: a row of the softmax is what the query may see, no more."""
        prefix = None
        if self.attentions:
            layer = self.attentions[place]
            own = number * self.config.num_key_value_heads // self.config.num_attention_heads
            prefix = (layer.prefix_key[own].double() @ sylvester(len(q[0])), layer.prefix_value[own].double())
        return torch.stack(
            [self.mixture(q[row], k[: row + 1], v[: row + 1], f"layers.{place}.softmax", number, prefix) for row in range(len(q))]
        )

    def mixture(self, q: Tensor, k: Tensor, v: Tensor, site: str, number: int, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        scores = k @ q / math.sqrt(len(q))
        seen = self.quantise_head(torch.exp(scores - scores.max()) if self.after else torch.softmax(scores, 0), site, number)
        if not self.after:
            return seen @ v
        if prefix is None:
            return seen @ v / seen.sum()
        sink = torch.exp(prefix[0] @ q / math.sqrt(len(q)) - scores.max())
        return (seen @ v + sink @ prefix[1]) / (seen.sum() + sink.sum())

    def quantise_head(self, x: Tensor, site: str, number: int) -> Tensor:
        """One head's row; the levels of all heads are of one site."""
        self.values += x.numel()
        self.levels += 1
        groups = self.config.num_attention_heads
        return self.quantise(x.expand(groups, -1), site, False)[number]

    def logits(self, ids: Tensor) -> Tensor:
        h = self.weights["model.embed_tokens.weight"][ids]
        for number in range(self.config.num_hidden_layers):
            h = self.layer(h, number)
        return self.linear(self.coded(self.norm(h), "head_input"), "lm_head")


def converted(*, after: bool = True, dtype=torch.float64, prefix: bool = False):
    """A rotated tiny LLaMA and its calibration."""
    model = tiny_model(dtype=dtype, **WIDTHS)
    prepare(model, rotation_seed=3, normalise_after=after, query_block=16)
    windows = torch.randint(2, 256, (4, 64), generator=torch.Generator().manual_seed(5))
    found = calibrate(model, windows, PrefixConfig(enabled=False))
    if prefix:
        attach_prefix(model, [7, 200])
    return model, found.statistics


def levels_of(model) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    occupants = {site.name: get_neuron(model, site) for site in model_sites(model)}
    return {name: (each.step, each.low, each.high) for name, each in occupants.items()}


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("groups", list(Groups))
def test_int_static_is_the_fake_quantised_model(after, groups, ids):
    model, statistics = converted(after=after)
    ann = model(ids).logits
    occupy(model, static_quantizers(statistics, asked(T, groups=groups)))
    levels = levels_of(model)
    if groups is Groups.site:  # every head the site's levels
        heads = {"query": 4, "key": 2, "value": 2, "softmax": 4, "attention_output": 4}
        levels = {name: tuple(each.expand(heads.get(name.rpartition(".")[2], 1)) for each in own) for name, own in levels.items()}
    found = model(ids).logits
    for row, own in zip(ids, found, strict=True):
        wanted = Reference(model, fixed(levels), after=after).logits(row)
        assert norm_ratio(own, wanted) <= 1e-6  # RoPE's float32 tables
    assert norm_ratio(found, ann) > 0.02  # the integers are felt


@pytest.mark.parametrize("after", [True, False])
def test_int_token_is_the_fake_quantised_model(after, ids):
    model, statistics = converted(after=after)
    ann = model(ids).logits
    occupy(model, token_quantizers(statistics, asked(T)))
    found = model(ids).logits
    for row, own in zip(ids, found, strict=True):
        assert norm_ratio(own, Reference(model, by_token(T), after=after).logits(row)) <= 1e-6
    assert norm_ratio(found, ann) > 0.02


@pytest.mark.parametrize("name", ["int_static", "int_token"])
def test_behind_an_exact_prefix(name, ids):
    model, statistics = converted(prefix=True)
    quantizers = {"int_static": static_quantizers, "int_token": token_quantizers}[name]
    occupy(model, quantizers(statistics, asked(T)))
    quantise = fixed(levels_of(model)) if name == "int_static" else by_token(T)
    wanted = Reference(model, quantise, after=True, prefix=True).logits(ids[0])
    assert norm_ratio(model(ids[:1]).logits[0], wanted) <= 1e-6


@pytest.mark.parametrize("quantizers", [static_quantizers, token_quantizers])
def test_bfloat16_weights_meet_float32_integers(quantizers, ids):
    """The weights are those of the checkpoint; neither levels nor activations have their 8 bits: at T = 12 that would be felt."""
    model, statistics = converted(dtype=torch.bfloat16)
    occupy(model, quantizers(statistics, asked(12)))
    quantise = fixed(levels_of(model)) if quantizers is static_quantizers else by_token(12)
    wanted = Reference(model, quantise, after=True).logits(ids[0])
    found = model(ids[:1]).logits[0]
    assert found.dtype is torch.float32
    assert norm_ratio(found, wanted) <= 1e-3  # here and there a value between two levels goes to the other one


def test_every_site_has_an_occupant_or_none_has():
    model, statistics = converted()
    occupants = token_quantizers(statistics, asked(T))
    occupants.pop("head_input")
    with pytest.raises(ValueError, match=r"1 sites without one \['head_input'\]"):
        occupy(model, occupants)


# ---- what they cost ---------------------------------------------------------------------------------------------------------


def test_values_levels_and_products_are_those_that_the_model_has(ids):
    """The ledger of a spiking model tells what is in an integer model; a forward of the other has counted it."""
    model, _ = converted(prefix=True)
    reference = Reference(model, by_token(T), after=True, prefix=True)
    reference.logits(ids[0])
    fill(model, base2_tables(model, T), compiled=False)
    ledger = count(model, ids[:1])
    by_name = {each.name: each for each in dense_operations_of_integers(ledger, per_token=True, by_head=True)}
    assert by_name["integers: a factor, rounding"].mac == reference.values
    assert by_name["levels of every token"].mac == 2 * reference.levels
    assert by_name["levels of every token"].ac == 2 * reference.values + reference.levels
    H, E, L, layers, P = 4, 16, 40, 2, 2
    pairs = layers * L * (L + 1) // 2
    assert by_name["steps of keys and values"].mac == 2 * pairs * H
    assert by_name["exact prefix"].mac == layers * L * H * P * (2 * E + 2)  # q K, exp, and e V, sum
    sums = layers * (64 + 2 * 32 + 4 * 64 + 3 * 128 + 64 + 64) + 256  # q, k, v; o of four heads; gate, up, product; down; mixture; logits
    assert by_name["factors of integer sums"].mac == L * sums + pairs * H
    fixed_levels = {each.name: each for each in dense_operations_of_integers(ledger, per_token=False, by_head=True)}
    assert set(by_name) - set(fixed_levels) == {"levels of every token", "steps of keys and values"}
    one = {each.name: each.mac for each in dense_operations_of_integers(ledger, per_token=True, by_head=False)}
    assert by_name["factors of integer sums"].mac - one["factors of integer sums"] == L * layers * 3 * 64
    assert by_name["levels of every token"].mac > one["levels of every token"]


def test_energy_is_that_of_integer_macs_and_the_rest(ids):
    model, _ = converted()
    fill(model, base2_tables(model, T), compiled=False)
    ledger, table = count(model, ids), COST_TABLES["fp32"]
    found = rivals_energy(ledger, table, list(NetworkName), by_head=True)
    assert list(found) == ["int_static", "int_token"]
    assert found[NetworkName.int_static] < found[NetworkName.int_token]
    per_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 128
    products = 2 * per_layer + 64 * 256 + 2 * (41 / 2) * 4 * 16 * 2  # the mean token sees 20.5 keys, in two layers, twice
    dense = dense_operations_of_integers(ledger, per_token=False, by_head=True)
    rest = sum(4.6 * each.mac + 0.9 * each.ac for each in dense) / ledger.tokens
    assert found[NetworkName.int_static] == pytest.approx(integer_mac_pj(T + 1) * products + rest)
    record = energy_record(ledger, table, rivals=found).to_json()
    assert record["int_token_pj_per_token"] == found[NetworkName.int_token]
    assert record["weights"]["int_token"] == record["weights"]["int"] == "int5"
    plain = energy_record(ledger, table).to_json()
    assert set(record) - set(plain) == {"int_static_pj_per_token", "int_token_pj_per_token"}
    assert plain == {key: value for key, value in record.items() if key in plain} | {"weights": plain["weights"]}
    # more than the bound, which takes its integers for granted
    assert record["int_pj_per_token"] < record["int_static_pj_per_token"]


# ---- the job ----------------------------------------------------------------------------------------------------------------


def test_a_job_measures_the_networks_that_are_named(tmp_path):
    usual = run(tmp_path)
    assert [name for name in usual["perplexity"] if name in tuple(NetworkName)] == ["snn", "base2", "ann_prefix", "ann"]
    assert not [key for key in usual["energy"] if key.startswith(("int_static", "int_token"))]
    chosen = run(tmp_path, "evaluation.networks=[int_token,ann_prefix,int_static]", "snn.T=4")
    measured = [name for name in chosen["perplexity"] if name in tuple(NetworkName)]
    assert measured == ["int_static", "int_token", "ann_prefix"]
    assert chosen["perplexity"]["ann_prefix"] == usual["perplexity"]["ann_prefix"]
    assert chosen["energy"]["int_static_pj_per_token"] < chosen["energy"]["int_token_pj_per_token"]
    again = run(tmp_path, "evaluation.networks=[int_static]", "snn.T=4")
    assert again["perplexity"]["int_static"] == chosen["perplexity"]["int_static"]
    assert again["stages"]["evaluate"]["cached"]


def test_more_bits_come_closer_to_the_pretrained_model(tmp_path):
    networks = "evaluation.networks=[ann_prefix,int_static,int_token]"
    distance = {}
    for steps in (2, 14):
        perplexity = run(tmp_path, networks, f"snn.T={steps}", "grain=1", "spikes.enabled=false")["perplexity"]
        distance[steps] = [abs(perplexity[name] / perplexity["ann_prefix"] - 1) for name in ("int_static", "int_token")]
    assert max(distance[14]) < 2e-4  # fixed levels clip what calibration has not seen
    assert min(distance[2]) > 5e-4


def test_people_see_perplexity_ratio_and_energy_beside_ours(tmp_path):
    folder = tmp_path / "0-T4-G1"
    found = run(tmp_path, f"evaluation.networks=[{','.join(NetworkName)}]", "snn.T=4", "grain=1")
    results = Results.from_json(found)
    folder.mkdir()
    write_results(folder, results, {}, [])
    perplexity, energy = found["perplexity"], found["energy"]
    shown = console_table(results, tmp_path).splitlines()
    lines = [line.split() for line in shown]
    for name, title in (("int_static", ["INT,", "static"]), ("int_token", ["INT,", "token"])):
        assert [*title, f"{perplexity[name]:.3f}", "x", f"{perplexity[name] / perplexity['ann_prefix']:.4f}"] in lines
        pj = energy[f"{name}_pj_per_token"]
        assert ["INT,", f"{title[1]},", "int5", "weights", f"{pj / 1e6:.4g}", "x", f"{pj / energy['int_pj_per_token']:.4f}"] in lines
    assert len({line.index("   x ") for line in shown if "weights" in line}) == 1
    row = summary_rows(tmp_path)[0]
    assert row["int_static_ratio"] == perplexity["int_static"] / perplexity["ann_prefix"]
    assert row["int_token_pj_per_token"] == energy["int_token_pj_per_token"]
    write_summary(tmp_path)
    heading = (tmp_path / "summary.md").read_text().splitlines()[0]
    assert all(part in heading for part in ("ppl INT, static", "INT, token / ANN", "pJ / token, integers"))
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from spikellm.report.html import write_report

    page = write_report(folder).read_text()
    assert "integers, fixed steps" in page
    assert f"{energy['int_static_pj_per_token']:.4g}" in page


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("evaluation.networks=[]", ["name at least one", "int_static"]),
        ("evaluation.networks=[ann,ann]", ["[ann,ann]", "twice"]),
        ("evaluation.networks=[cnn]", ["cnn", "int_static"]),
    ],
)
def test_wrong_networks_are_refused(argument, named):
    with pytest.raises((InputError, HydraException)) as caught:
        configure(argument)
    assert all(part in explain(caught.value) for part in ("evaluation.networks", *named))


def test_tasks_are_answered_by_networks_that_are_measured():
    tasks = "dataset.zero_shot.tasks=[piqa]"

    def scored(*arguments: str) -> list[str]:
        config = configure(tasks, *arguments)
        return config.dataset.zero_shot.scored(config.evaluation.networks)

    assert configure().evaluation.networks == list(DEFAULT_NETWORKS)
    assert scored() == ["ann", "snn"]
    assert scored("evaluation.networks=[int_token,base2,snn]") == ["snn", "int_token"]
    assert scored("dataset.zero_shot.networks=[base2]") == ["base2"]
    with pytest.raises(InputError, match=r"dataset\.zero_shot\.networks=\[snn\]: evaluation\.networks=\[ann\] has no snn"):
        configure(tasks, "evaluation.networks=[ann]", "dataset.zero_shot.networks=[snn]")
    with pytest.raises(InputError, match=r"dataset\.zero_shot\.networks=null: no network of evaluation\.networks=\[base2\]"):
        configure(tasks, "evaluation.networks=[base2]")
    configure("evaluation.networks=[base2]")  # without tasks nobody is asked


def test_steps_without_a_spiking_network_are_said_to_have_no_effect(tmp_path, caplog):
    run(tmp_path, "snn.execution=stepped", "evaluation.networks=[int_token]", "spikes.enabled=false")
    assert "snn.execution=stepped has no effect without snn in evaluation.networks" in caplog.text


def test_the_softmax_alone_has_unsigned_integers():
    _, statistics = converted()
    for name, each in token_quantizers(statistics, asked(T)).items():
        assert each.signed == (Site.of(name).kind is not SiteKind.softmax)
