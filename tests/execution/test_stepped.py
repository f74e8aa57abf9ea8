"""The stepped network against the folded one, and what its wires carry."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.config.checks import InputError
from spikellm.config.labels import SiteKind
from spikellm.evaluation.perplexity import perplexity, readout_perplexities
from spikellm.execution import attention as stepped_attention
from spikellm.execution.memory import fitting_chunk, peak_bytes
from spikellm.execution.modules import SteppedHead, SteppedLinear, SteppedNeuron, SteppedSpikingLinear, unbatch
from spikellm.execution.stepped import stepped
from spikellm.kernels import native, temporal
from spikellm.kernels.encode import Digits
from spikellm.model import attention
from spikellm.model.conversion import fill, get_neuron, install, model_sites, prepare, set_neuron
from spikellm.model.modules import SpikingActivation, SpikingRMSNorm
from spikellm.model.prefix import attach_prefix
from spikellm.spikes import ledger
from tests.codes import base2_table, base2_tables, partitioned_tables
from tests.models import TINY, norm_ratio, tiny_model

GROUPS = {
    SiteKind.query: 4,
    SiteKind.key: 2,
    SiteKind.value: 2,
    SiteKind.softmax: 4,
    SiteKind.attention_output: 4,
    SiteKind.activation: 144,
}
PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.nn.functional.linear, torch.einsum}


def tables(model, T: int) -> dict[str, PhaseTable]:
    """A table of its own for every head, and for every channel at SiLU: no two steps or groups with the same weight."""
    found = {}
    for index, site in enumerate(model_sites(model)):
        groups = GROUPS.get(site.kind, 1)
        if site.kind is SiteKind.attention_output:
            groups = model.config.num_attention_heads
        tau = (1.0 if site.kind is SiteKind.softmax else 4.0) * (1 + 0.01 * index + 0.1 * torch.arange(groups) / groups)
        found[site.name] = base2_table(tau.tolist(), T)
    return found


def spiking(name="llama", *, T=6, normalise_after=True, rotated=True, prefix=(1, 7), dtype=torch.float64, **options):
    model = tiny_model(name, dtype=dtype, **options)
    prepare(model, rotation_seed=0 if rotated else None, query_block=16, normalise_after=normalise_after)
    attach_prefix(model, list(prefix))
    fill(model, tables(model, T), compiled=False)
    return model


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", list(TINY))
def test_logits_equal_the_folded_ones(name, normalise_after, ids):
    model = spiking(name, normalise_after=normalise_after, **({"sliding_window": 8} if name == "mistral" else {}))
    folded = model(ids).logits
    with stepped(model, chunk=4):
        assert norm_ratio(model(ids).logits, folded) <= 1e-9
    assert torch.equal(model(ids).logits, folded)  # folded again


@pytest.mark.parametrize(("T", "chunk"), [(1, None), (2, 1), (10, 3), (16, None)])
def test_any_number_of_steps_and_of_steps_a_product(T, chunk, ids):
    model = spiking(T=T)
    folded = model(ids).logits
    with stepped(model, chunk=chunk):
        assert norm_ratio(model(ids).logits, folded) <= 1e-9


@pytest.mark.parametrize("rotated", [True, False])
def test_plain_model_without_prefix_in_float32(rotated, ids):
    """At T=16 a spike more or less, from another order of additions, hardly shows."""
    model = spiking(rotated=rotated, prefix=(), T=16, dtype=torch.float32)
    folded = model(ids).logits
    with stepped(model):
        assert norm_ratio(model(ids).logits, folded) <= 2e-3


@pytest.mark.parametrize(("dtype", "T", "within"), [(torch.float64, 6, 1e-9), (torch.float32, 16, 2e-3)], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_products_in_cpp_are_the_folded_network_too(name, dtype, T, within, ids, monkeypatch):
    """None of a Linear is left to the plain form, and counters see the same trains."""
    model = spiking(name, T=T, dtype=dtype)
    fill(model, tables(model, T), compiled=True)
    folded, counted = model(ids).logits, ledger.count(model, ids)
    if native.library() is not None:
        monkeypatch.setattr(temporal, "spike_linear", None)
    with stepped(model, chunk=4):
        assert norm_ratio(model(ids).logits, folded) <= within
        steps = ledger.count(model, ids)
    if dtype == torch.float64:
        assert steps == counted
    else:
        assert steps.spikes == pytest.approx(counted.spikes, rel=1e-3)


def captured(model, ids, paths) -> dict[str, torch.Tensor]:
    """Outputs of modules in one forward."""
    seen = {}

    def keep(path):
        def hook(_module, _inputs, output):
            seen[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_the_sum_over_time_of_every_layer_is_the_folded_output(name, normalise_after, ids):
    model = spiking(name, normalise_after=normalise_after)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    parts += ("self_attn", "mlp", "self_attn.q_norm") if name == "qwen3" else ("self_attn", "mlp")
    paths = [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts] + ["model.layers.0", "model.layers.1"]
    folded = captured(model, ids, [*paths, "model.layers.0.mlp.up_proj"])
    with stepped(model, chunk=4):
        steps = captured(model, ids, [*paths, "model.layers.0.mlp.up_proj"])
    for path in paths:
        assert norm_ratio(unbatch(steps[path], 6).sum(0), folded[path]) <= 1e-9, path
    # up_proj holds its sum while SiLU fires
    for held in unbatch(steps["model.layers.0.mlp.up_proj"], 6):
        assert norm_ratio(held, folded["model.layers.0.mlp.up_proj"]) <= 1e-9


@pytest.mark.parametrize("name", list(TINY))
def test_what_every_site_fires_decodes_to_the_folded_neurons_output(name, ids):
    model = spiking(name)
    outputs: dict[str, list] = {site.name: [] for site in model_sites(model)}

    def watch():
        return [
            get_neuron(model, site).register_forward_hook(lambda _m, _i, out, name=site.name: outputs[name].append(out))
            for site in model_sites(model)
        ]

    handles = watch()
    model(ids)
    folded, outputs = outputs, {name: [] for name in outputs}
    for handle in handles:
        handle.remove()
    with stepped(model):
        watch()
        model(ids)
        for site in model_sites(model):
            neuron = get_neuron(model, site)
            assert isinstance(neuron, SteppedNeuron)
            for train, wanted in zip(outputs[site.name], folded[site.name], strict=True):
                values = sum(neuron.grouped(spikes.double()) * d[:, None] for spikes, d in zip(train, neuron.d.T, strict=True))
                assert norm_ratio(values.view_as(wanted), wanted) <= 1e-9, site.name


def is_spikes(x: torch.Tensor) -> bool:
    return bool(torch.isin(x, torch.tensor([-1, 0, 1], dtype=x.dtype)).all())


class Products(TorchFunctionMode):
    """Within: every matrix product is looked at; `dense` counts those with no spikes on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.dense = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in PRODUCTS:
            self.total += 1
            operands = [x for x in arguments if isinstance(x, torch.Tensor)]
            self.dense += not any(is_spikes(x) for x in operands)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", list(TINY))
def test_every_product_has_spikes_on_one_side(name, normalise_after, ids):
    """Without rotation and prefix there are no dense products at all; the folded network has hardly any others."""
    model = spiking(name, normalise_after=normalise_after, rotated=False, prefix=())
    rope = 1  # transformers' table of angles
    with Products() as folded:
        model(ids)
    assert folded.dense >= 2 * 9
    with stepped(model), Products() as products:
        model(ids)
    assert products.total > 6 * 2 * 9
    assert products.dense <= rope


@pytest.mark.parametrize("name", list(TINY))
def test_every_wire_behind_a_neuron_carries_spikes(name, ids):
    model = spiking(name)
    checked = []

    def check(module, inputs):
        assert inputs[0].dtype == torch.int8
        assert is_spikes(inputs[0])
        checked.append(module)

    with stepped(model):
        readers = [module for module in model.modules() if isinstance(module, SteppedLinear)]
        for module in readers:
            module.register_forward_pre_hook(check)
        for module in model.modules():
            if isinstance(module, SteppedSpikingLinear):
                module.neuron.register_forward_hook(lambda m, _i, out: check(m, (out,)))
        model(ids)
    assert len(checked) == 2 * (5 + 2) + 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_and_positions(side, ids):
    model = spiking("qwen3")
    mask = torch.ones_like(ids)
    mask[1, slice(0, 9) if side == "left" else slice(31, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    folded = model(ids, attention_mask=mask, position_ids=positions).logits
    with stepped(model):
        assert norm_ratio(model(ids, attention_mask=mask, position_ids=positions).logits, folded) <= 1e-9


def test_generation_and_a_cache(ids):
    model = spiking()
    prompt = ids[:, :9]

    def generate():
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, use_cache=True)

    wanted, whole = generate(), model(ids, use_cache=False).logits
    with stepped(model, chunk=2):
        assert generate().tolist() == wanted.tolist()
        cache = DynamicCache(config=model.config)
        parts = [model(part, None, None, cache, use_cache=True).logits for part in ids.split([20, 1, 19], dim=1)]
    assert norm_ratio(torch.cat(parts, 1), whole) <= 1e-9


def test_a_bfloat16_model_runs_with_exact_currents(ids):
    """Truth: the float32 model with the same (bfloat16) weights; the stepped network keeps them and adds up in float32."""
    model = spiking(dtype=torch.bfloat16, T=16)
    with stepped(model):
        logits = model(ids).logits
    assert logits.dtype == torch.float32
    wide = spiking(dtype=torch.bfloat16, T=16).float()
    assert norm_ratio(logits, wide(ids).logits) <= 2e-3


def test_anytime_readouts_end_at_the_logits_and_come_closer(ids):
    model = spiking(T=8)
    wanted = perplexity(model, ids, label="folded")
    logits = model(ids).logits
    with stepped(model):
        head = model.get_submodule("lm_head")
        assert isinstance(head, SteppedHead)
        hidden = model.base_model(ids).last_hidden_state
        distances = [norm_ratio(readout, logits) for readout in head.readouts(hidden)]
        curve = readout_perplexities(model, ids, readouts=head.readouts, label="stepped")
    assert len(distances) == len(curve) == 8
    assert distances[-1] <= 1e-9
    assert all(later <= 0.8 * earlier for earlier, later in pairwise(distances))
    assert curve[-1].value == pytest.approx(wanted.value, rel=1e-9)
    assert curve[-1].tokens == wanted.tokens


def test_what_cannot_be_stepped_is_refused(ids):
    model = tiny_model()
    install(model, rotated=())
    with pytest.raises(ValueError, match=r"layers\.0\.attention_input carries no neuron"), stepped(model):
        pass
    model = spiking(T=6)
    found = tables(model, 6) | {"head_input": base2_table(4.0, 4)}
    fill(model, found, compiled=False)
    with pytest.raises(ValueError, match=r"\[4, 6\]"), stepped(model):
        pass
    model = spiking()
    with stepped(model), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.float64))


def test_the_memory_bound_picks_the_chunk_or_names_the_cure():
    model = spiking(T=6)
    sizes = [peak_bytes(model, 512, chunk=chunk) / 2**30 for chunk in range(1, 7)]
    assert sizes == sorted(sizes)
    assert fitting_chunk(model, 512, chunk=None, max_gib=None) == 6
    assert fitting_chunk(model, 512, chunk=2, max_gib=None) == 2
    assert fitting_chunk(model, 512, chunk=99, max_gib=None) == 6
    assert fitting_chunk(model, 512, chunk=None, max_gib=sizes[5] * 1.01) == 6
    assert 1 <= fitting_chunk(model, 512, chunk=None, max_gib=(sizes[0] + sizes[1]) / 2) < 6
    with pytest.raises(InputError, match=r"snn\.max_memory_gib=0\.001: .*512 tokens.* allow"):
        fitting_chunk(model, 512, chunk=None, max_gib=0.001)
    assert math.isfinite(sizes[-1])


def other_tables(model, T: int, digits: Digits) -> dict[str, PhaseTable]:
    """`tables` with digits of another kind; two sides at SiLU, the negative ones finer."""
    found = {}
    for site in model_sites(model):
        table = tables(model, T)[site.name]
        if digits.sides == 2:
            if site.kind is SiteKind.activation:
                table = PhaseTable(*table.rows.map(lambda rows: torch.cat([rows, 0.1 * rows])), digits=digits)
        else:
            table = replace(table, theta=0.7 * table.theta if digits.signed else table.theta, digits=digits)
        found[site.name] = table
    return found


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("digits", [Digits(sides=2), Digits(signed=True), Digits(max_spikes=2)], ids=str)
def test_every_kind_of_digits_and_the_same_ledger_to_the_spike(digits, normalise_after, ids):
    model = spiking(normalise_after=normalise_after)
    fill(model, other_tables(model, 6, digits), compiled=False)
    folded, counted = model(ids).logits, ledger.count(model, ids)
    with stepped(model, chunk=4):
        assert norm_ratio(model(ids).logits, folded) <= 1e-9
        assert ledger.count(model, ids) == counted
    assert ledger.count(model, ids) == counted
    assert counted.spikes > 0


@pytest.mark.parametrize(
    ("name", "normalise_after", "shift", "heads", "chunk"),
    [
        ("llama-biases", True, 0, True, 2),
        ("llama-biases", False, 1, False, 3),
        ("qwen3", True, 2, False, None),
        ("qwen3", False, 3, True, 1),
        ("mistral", True, 4, True, None),
        ("mistral", False, 5, False, 4),
    ],
)
def test_populations_fire_side_by_side_and_add_up_to_the_folded_network(name, normalise_after, shift, heads, chunk, ids):
    """Another partition at every site, random tables, one of them not in use."""
    T = 4
    model = spiking(name, normalise_after=normalise_after)
    found = partitioned_tables(model, T, shift=shift, heads=heads, unused=shift % 2 == 1)
    fill(model, found, compiled=False)
    query, key = (found[f"layers.0.{part}"].digits for part in ("query", "key"))
    assert query.populations != key.populations
    folded, counted = model(ids).logits, ledger.count(model, ids)
    parts = [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp", "mlp.gate_proj", "self_attn.o_proj")]
    wanted = captured(model, ids, parts)
    with stepped(model, chunk=chunk):
        for site in model_sites(model):
            neuron = get_neuron(model, site)
            neuron.register_forward_hook(partial(one_wire_at_a_time, neuron.digits.populations))
        assert norm_ratio(model(ids).logits, folded) <= 1e-9
        assert ledger.count(model, ids) == counted
        hidden = model.base_model(ids).last_hidden_state
        readouts = [logits.clone() for logits in model.get_submodule("lm_head").readouts(hidden)]
        steps = captured(model, ids, parts)
    assert len(readouts) == T
    assert norm_ratio(readouts[-1], folded) <= 1e-9
    for path in parts:
        assert len(steps[path]) == T * len(ids), path
        assert norm_ratio(unbatch(steps[path], T).sum(0), wanted[path]) <= 1e-9, path
    for site in counted.sites:
        digits, groups = found[site.name].digits, found[site.name].groups
        idle = shift % 2 == 1 and digits.intervals > 1
        assert site.populations == [digits.populations - idle * digits.sides] + [digits.populations] * (groups - 1)
        assert site.intervals == [digits.intervals - idle] + [digits.intervals] * (groups - 1)
        assert sum(sum(row) for row in site.spikes) > 0


def one_wire_at_a_time(populations, _neuron, inputs, train):
    """Spikes, and of each neuron's wires at most one that ever carries any."""
    assert train.dtype == torch.int8
    assert is_spikes(train)
    assert train.shape == (4 * populations, *inputs[0].shape)
    assert (train.unflatten(0, (4, populations)).ne(0).any(0).sum(0) <= 1).all()


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
def test_every_product_of_populations_has_spikes_on_one_side(normalise_after, ids):
    model = spiking(normalise_after=normalise_after, rotated=False, prefix=())
    fill(model, partitioned_tables(model, 4), compiled=False)
    with stepped(model), Products() as products:
        model(ids)
    assert products.dense <= 1  # RoPE's angles


def test_populations_need_memory_for_their_wires():
    model = spiking(T=4)
    fill(model, base2_tables(model, 4), compiled=False)
    one = peak_bytes(model, 512, chunk=4)
    for site in model_sites(model):  # 512 tokens, float64: the MLP is widest, and SiLU's wires come with their currents
        if site.kind is SiteKind.activation:
            fill_one = PhaseTable(*base2_table([4.0] * 4, 4).rows, digits=Digits(sides=2, intervals=2), cuts=torch.ones(1, 2))
            set_neuron(model, site, PhaseNeuron(fill_one.to(torch.float64), compiled=False))
    assert peak_bytes(model, 512, chunk=4) - one == 512 * 144 * 12 * (8 + 2)


@pytest.mark.parametrize("normalise_after", [True, False], ids=["after", "before"])
def test_functions_are_evaluated_once_a_token_as_they_are_costed(normalise_after, ids, monkeypatch):
    """Elements that pass norms, SiLU and exponentials in a stepped forward: those of a folded one, not T times as many."""
    seen = dict.fromkeys(("norm", "silu", "softmax"), 0)

    def counted(name, function):
        def counting(x, *arguments):
            seen[name] += x.numel()
            return function(x, *arguments)

        return counting

    model = spiking("llama", normalise_after=normalise_after)
    monkeypatch.setattr(
        SpikingRMSNorm, "normalise", lambda self, x, whole=SpikingRMSNorm.normalise: counted("norm", partial(whole, self))(x)
    )
    for name in ("exponentials", "probabilities"):
        for module in (attention, stepped_attention):
            monkeypatch.setattr(module, name, counted("softmax", getattr(module, name)))
    monkeypatch.setattr(
        SpikingActivation, "activate", lambda self, x, whole=SpikingActivation.activate: counted("silu", partial(whole, self))(x)
    )
    model(ids)
    folded, seen = seen | {}, dict.fromkeys(seen, 0)
    assert all(folded.values())
    with stepped(model):
        model(ids)
    assert seen == folded


@pytest.mark.slow
@pytest.mark.parametrize("tables_of", [base2_tables, partitioned_tables], ids=["one table", "populations"])
def test_in_float64_the_real_model_sends_the_same_spikes_either_way(tables_of, real_model, real_tokenizer):
    """Few steps, so a single threshold crossed by rounding is felt: in float32 these perplexities differ by some percent."""
    model = deepcopy(real_model).double()
    prepare(model, rotation_seed=0)
    fill(model, tables_of(model, T=4), compiled=False)
    windows = torch.tensor(real_tokenizer("The capital of France is Paris, and the river on which it lies is the Seine.").input_ids)[None]
    folded, counted = perplexity(model, windows, label="folded"), ledger.count(model, windows)
    with stepped(model):
        assert perplexity(model, windows, label="stepped").value == pytest.approx(folded.value, rel=1e-9)
        assert ledger.count(model, windows) == counted
