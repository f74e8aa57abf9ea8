"""Half-precision models are the networks that they claim to be. Truth: transformers, or a dense formula, in float64 on the same weights."""

from contextlib import ExitStack
from copy import deepcopy

import pytest
import torch
from torch import nn

from spikellm.calibration.calibrate import calibrate, observing
from spikellm.calibration.statistics import Observer
from spikellm.coding.neuron import PhaseNeuron, decode, fire
from spikellm.config.choices import Device, DType, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.config.snn import PrefixConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.execution.stepped import stepped
from spikellm.kernels.hadamard import hadamard_matrix, split
from spikellm.model import modules
from spikellm.model.attention import SpikingAttention
from spikellm.model.blocks import enter
from spikellm.model.conversion import clear, fill, get_neuron, install, model_sites, prepare
from spikellm.model.load import load_model
from spikellm.model.modules import SpikingLinear, WideLinear
from spikellm.model.prefix import attach_prefix
from spikellm.model.rotation import PARTS, random_signs, rotate
from spikellm.search.fit import CodeFit
from spikellm.search.search import base2, evolution
from tests.codes import asked, base2_table, base2_tables
from tests.models import greedy, norm_ratio, tiny_model

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
# How far logits may move by rotation: each of a few dozen weights rounded once more. transformers' norms are float32 in float64 models.
ROTATED = {torch.float64: 2e-6, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# How far from exact arithmetic on the same weights: activations are float32.
TRANSPARENT = 2e-6
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
halves = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))


def exact(name: str, dtype: torch.dtype, **options) -> nn.Module:
    """transformers' own model with the weights of `tiny_model(name, dtype=dtype)`, in float64."""
    return tiny_model(name, dtype=dtype, **options).double()


def spiking(name: str, dtype: torch.dtype, T: int, *, prefix: tuple[int, ...] = (1, 7), **options):
    model = tiny_model(name, dtype=dtype, **options)
    prepare(model, rotation_seed=0, query_block=16)
    attach_prefix(model, list(prefix))
    fill(model, base2_tables(model, T), compiled=False)
    return model


@dtypes
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_an_installed_model_is_the_pretrained_one_in_exact_arithmetic(name, dtype, ids):
    model = tiny_model(name, dtype=dtype)
    install(model, rotated=(), query_block=16)
    logits = model(ids).logits
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    assert norm_ratio(logits, exact(name, dtype)(ids).logits) <= TRANSPARENT


@dtypes
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_rotation_moves_logits_by_the_rounding_of_weights(name, dtype, ids):
    model = tiny_model(name, dtype=dtype)
    rotate(model, seed=3)
    install(model, rotated=PARTS, query_block=16)
    assert norm_ratio(model(ids).logits, exact(name, dtype)(ids).logits) <= ROTATED[dtype]


@halves
def test_every_rotated_weight_is_rounded_once(dtype):
    """Truth: dense orthogonal matrices in float64."""
    model, before = tiny_model("llama-biases", dtype=dtype), tiny_model("llama-biases", dtype=dtype).double()
    rotate(model, seed=3)

    def dense(n: int) -> torch.Tensor:
        left, right = split(n)
        return torch.kron(hadamard_matrix(left), hadamard_matrix(right)) / n**0.5

    Q = random_signs(64, seed=3)[:, None] * dense(64)
    heads = torch.block_diag(*[dense(16)] * 4)
    key_heads = torch.block_diag(*[dense(16)] * 2)
    old, new = before.model.layers[1], model.model.layers[1]
    attention, mlp = torch.diag(old.input_layernorm.weight) @ Q, torch.diag(old.post_attention_layernorm.weight) @ Q
    wanted = {
        "self_attn.q_proj": old.self_attn.q_proj.weight @ attention,
        "self_attn.v_proj": key_heads.T @ old.self_attn.v_proj.weight @ attention,
        "self_attn.o_proj": Q.T @ old.self_attn.o_proj.weight @ heads,
        "mlp.gate_proj": old.mlp.gate_proj.weight @ mlp,
        "mlp.down_proj": Q.T @ old.mlp.down_proj.weight @ dense(144),
    }
    found = {name: new.get_submodule(name).weight for name in wanted}
    wanted |= {"o bias": Q.T @ old.self_attn.o_proj.bias, "v bias": key_heads.T @ old.self_attn.v_proj.bias}
    found |= {"o bias": new.self_attn.o_proj.bias, "v bias": new.self_attn.v_proj.bias}
    wanted |= {"embedding": before.model.embed_tokens.weight @ Q, "head": before.lm_head.weight @ torch.diag(before.model.norm.weight) @ Q}
    found |= {"embedding": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    for name, weight in wanted.items():
        rounding = (weight.to(dtype).double() - weight).norm()
        assert (found[name].double() - weight).norm() <= 1.02 * rounding, name


@dtypes
@pytest.mark.parametrize("width", [11008, 14336, 128])
def test_online_transforms_keep_norms_at_the_widths_of_llama(width, dtype):
    linear = SpikingLinear.adopt(nn.Linear(width, 1, bias=False, dtype=dtype), rotated=True)
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    ratios = linear.transform(x).double().norm(dim=-1) / x.double().norm(dim=-1)
    assert (ratios - 1).abs().max() <= 1e-3
    assert abs(ratios.mean().item() - 1) <= 2e-5


@halves
def test_a_cast_leaves_online_transforms_exact(dtype):
    linear = SpikingLinear.adopt(nn.Linear(144, 1, bias=False), rotated=True)
    x = torch.randn(3, 144)
    wanted = linear.transform(x)
    assert torch.equal(linear.to(dtype).transform(x), wanted)


@halves
@pytest.mark.parametrize("together", [modules.WIDENED, 7 * 64, 1])  # numbers of the weight that are float32 at a time
def test_a_product_with_half_precision_weights_is_that_of_float64(dtype, together, monkeypatch):
    monkeypatch.setattr(modules, "WIDENED", together)
    linear = WideLinear.adopt(nn.Linear(64, 48, dtype=dtype))
    x = torch.randn(2, 5, 64)
    wanted = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert norm_ratio(linear(x), wanted) <= 1e-6


@halves
def test_the_importance_of_near_values_is_not_rounded_away(dtype):
    """A sink: all outputs lie near one value, squared distances are a thousandth of squared values."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 32, 16, generator=generator) for heads in (4, 2))
    value = torch.randn(1, 2, 1, 16, generator=generator) + 0.03 * torch.randn(1, 2, 32, 16, generator=generator)
    mask = torch.ones(32, 32).tril().bool()[None, None]
    found = []
    for wide in (dtype, torch.float64):
        attention = SpikingAttention(
            16, rotated=False, normalise_after=True, query_block=16, dtype=torch.float32, device=torch.device("cpu")
        )
        attention.softmax = Observer("softmax", groups=4, axis=1, held=True)
        q, k, v = (x.to(dtype).to(wide) for x in (query, key, value))
        attention(q, *attention.code(k, v), mask, 0.25)
        found.append(attention.softmax.result())
    weights, wanted = (each.weights.sum(-1) for each in found)
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-9)


@halves
def test_statistics_are_those_of_exact_arithmetic(dtype):
    """Total variation of the histograms at every site; with rounded activations a tenth of them and more moves to other bins."""
    windows = torch.randint(2, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (tiny_model(dtype=dtype), exact("llama", dtype)):
        install(model, rotated=(), query_block=16)
        found.append(calibrate(model, windows, PrefixConfig(enabled=False)).statistics)
    for name, wanted in found[1].items():
        got = found[0][name]
        bins = [
            torch.zeros(1 << 15).index_add_(0, site.first_bin + torch.arange(site.counts.shape[-1]), site.counts.sum((0, 1)))
            for site in (got, wanted)
        ]
        assert (bins[0] - bins[1]).abs().sum() <= 0.01 * bins[1].sum(), name


@dtypes
@pytest.mark.parametrize("T", range(4, 13))
def test_a_neuron_sends_all_levels_of_its_code(T, dtype):
    """Base 2 on inputs in the middle of every step: 2^T levels, the code's own numbers."""
    table = base2_table(1.0, T).to(torch.promote_types(dtype, torch.float32))
    levels = torch.arange(1 << T, dtype=table.d.dtype) / (1 << T)
    sent = PhaseNeuron(table, compiled=False)(levels)
    assert torch.equal(sent, levels)
    linear = WideLinear.adopt(nn.Linear(1, 1, bias=False, dtype=dtype))
    linear.weight.data.fill_(1.0)
    assert torch.equal(linear(sent[:, None])[:, 0], levels)


@dtypes
def test_folded_levels_are_those_of_the_spike_trains_at_every_site(dtype, ids):
    """T = 10, as in the published table; LLaMA-2 has as many key heads as query heads."""
    model = spiking("llama", dtype, 10, num_key_value_heads=4)
    seen = {}
    for site in model_sites(model):
        neuron = get_neuron(model, site)
        neuron.register_forward_hook(lambda module, inputs, output, name=site.name: seen.update({name: (module, inputs[0], output)}))
    model(ids)
    assert len(seen) == 19
    for name, (neuron, x, y) in seen.items():
        train = decode(fire(neuron.grouped(x), neuron.table), neuron.table).view(x.shape)
        assert torch.equal(y, train), name
        assert len(y.abs().unique()) > 100, name


@dtypes
def test_stepped_logits_are_the_folded_ones(dtype, ids):
    """At T = 16 a spike more or less, from another order of additions, hardly shows."""
    model = spiking("llama", dtype, 16)
    folded = model(ids).logits
    with stepped(model):
        assert norm_ratio(model(ids).logits, folded) <= (1e-9 if dtype is torch.float64 else 1e-3)


@dtypes
def test_generation_with_a_cache_equals_greedy_without(dtype, ids):
    model = spiking("llama", dtype, 8)
    tokens = ids[:1, :9]
    wanted = greedy(model, tokens, 6)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, use_cache=True)
    assert made.tolist() == wanted.tolist()


@halves
def test_a_random_model_is_what_a_checkpoint_of_it_would_be(dtype, tmp_path, ids):
    from transformers import AutoModelForCausalLM

    options = {"hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    config = ModelConfig(
        name="tiny", source=ModelSource.random, path="llama", options=options, dtype=DType(str(dtype).removeprefix("torch."))
    )
    model = load_model(config, HardwareConfig(device=Device.cpu))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(model(ids).logits, again(ids).logits)
    float32 = load_model(
        ModelConfig(name="tiny", source=ModelSource.random, path="llama", options=options), HardwareConfig(device=Device.cpu)
    )
    assert torch.equal(model.lm_head.weight, float32.lm_head.weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_statistics_and_codes_do_not_depend_on_query_blocks(dtype):
    windows = torch.randint(2, 256, (4, 256), generator=torch.Generator().manual_seed(1))
    found = []
    for block in (16, 256, 1024):
        model = tiny_model(dtype=dtype)
        prepare(model, rotation_seed=0, query_block=block)
        found.append(calibrate(model, windows, PrefixConfig()))
        assert model.model.layers[0].self_attn.spiking.query_block == block
    tensors = [{key: value for name, site in each.statistics.items() for key, value in site.tensors(name).items()} for each in found]
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.equal(value, other[key]) for key, value in tensors[0].items())
    softmax = found[0].statistics["layers.0.softmax"]
    pairs = sum(row + 1 for row in range(0, 256, 8))  # every eighth query, and the keys that it may see
    assert (softmax.counts.sum(-1) + softmax.zeros).sum(0).tolist() == [4 * pairs] * 4


def test_codes_are_equal_where_statistics_are():
    windows = torch.randint(2, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    fits = []
    for block in (16, 64):
        model = tiny_model()
        install(model, rotated=(), query_block=block)
        found = calibrate(model, windows, PrefixConfig(enabled=False)).statistics
        fits.append(evolution({name: found[name] for name in list(found)[:4]}, asked(4)))
    for name, fit in fits[0].items():
        assert torch.equal(fit.d, fits[1][name].d), name


def test_statistics_do_not_depend_on_the_batch():
    """In float64, where no rounding carries an activation into the next bin."""
    windows = torch.randint(2, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    found = []
    for batch in (1, 4):
        model = tiny_model(dtype=torch.float64)
        install(model, rotated=(), query_block=16)
        with ExitStack() as stack:
            observers = [
                each for block in enter(model, windows[:1].split(1))[1] for each in stack.enter_context(observing(model, block)).values()
            ]
            for rows in windows.split(batch):
                model.base_model(rows, use_cache=False)
        found.append([observer.result() for observer in observers])
    for one, four in zip(*found, strict=True):
        for field in ("counts", "zeros", "maximum"):
            assert torch.equal(getattr(one, field), getattr(four, field))
        if one.weights is not None:
            torch.testing.assert_close(one.weights, four.weights, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_real_model_in_bfloat16_is_the_real_model(real_model, real_tokenizer):
    """Perplexities of the ANN and of base-2 networks, relative to float32's. A thousand tokens: at T = 8 coding noise alone is 0.3 %."""
    from pydoc_data.topics import topics

    text = real_tokenizer("\n\n".join(topics[name] for name in sorted(topics)[:12]), add_special_tokens=False, verbose=False)["input_ids"]
    calibration, windows = torch.tensor(text[:512])[None], torch.tensor(text[512 : 512 + 2 * 512]).view(2, 512)
    found: dict[torch.dtype, list[float]] = {}
    fits: dict[int, dict[str, CodeFit]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = deepcopy(real_model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        found[dtype] = [perplexity(model, windows, label="ann").value]
        prepare(model, rotation_seed=0)
        attach_prefix(model, [1])
        found[dtype].append(perplexity(model, windows, label="transparent").value)
        if not fits:
            statistics = calibrate(model, calibration, PrefixConfig()).statistics
            fits = {T: base2(statistics, asked(T)) for T in (8, 10)}
        for T in (8, 10):
            clear(model)
            attach_prefix(model, [1])
            fill(model, {name: fit.table for name, fit in fits[T].items()})
            found[dtype].append(perplexity(model, windows, label=f"T={T}").value)
    for wanted, value, allowed in zip(found[torch.float32], found[torch.bfloat16], (0.005, 0.005, 0.01, 0.005), strict=True):
        assert value == pytest.approx(wanted, rel=allowed)
