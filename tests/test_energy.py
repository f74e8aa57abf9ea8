"""Operations and energy against the published arithmetic, parameter counts of real modules, and sums by hand."""

import pytest
import torch
from conftest import TINY, tiny_model
from test_conversion import PUBLISHED_MODELS
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from spikellm.energy import (
    COST_TABLES,
    CostTable,
    DecoderShape,
    Operation,
    causal_pairs,
    compare,
    fast_hadamard_additions,
    integer_mac_pj,
    matrix_products,
    pointwise_operations,
    softmax_quotients,
    spiking_operations,
    uniform_sops,
)
from spikellm.ledger import decoder_shape


def macs(operations: list[Operation]) -> int:
    return sum(operation.mac for operation in operations)


def llama3_8b() -> DecoderShape:
    with torch.device("meta"):
        return decoder_shape(AutoModelForCausalLM.from_config(LlamaConfig(**PUBLISHED_MODELS["llama3_8b"])))


def test_the_papers_llama3_8b_on_the_meta_device():
    """Zheng et al.: 512 tokens, masked pairs computed too: 3912.08 G MAC = 18.00 J; SNN 15.87 G MAC + 11521.88 G AC = 10.44 J."""
    shape, tokens, T, table = llama3_8b(), 512, 6, COST_TABLES["fp32"]
    pairs = shape.layers * tokens**2
    matrices = matrix_products(shape, tokens=tokens, pairs=pairs)
    pointwise = pointwise_operations(shape, tokens=tokens, pairs=pairs)
    dense = [
        *pointwise,
        softmax_quotients(shape, tokens=tokens, pairs=pairs, after=False),
        *spiking_operations(shape, T=T, tokens=tokens, neurons=0, spikes=0, linear_groups=1, rotated=True, prefix=0),
    ]
    assert macs(matrices) == pytest.approx(3912.08e9, rel=1e-3)
    assert macs(matrices + pointwise) == pytest.approx(3912.08e9, rel=1e-3)
    assert table.joule(mac=macs(matrices), ac=0) == pytest.approx(18.00, rel=1e-3)
    sops = uniform_sops(macs(matrices), T=T, firing_rate=0.493)
    assert sops == pytest.approx(11521.88e9, rel=5e-3)
    assert table.joule(mac=15.87e9, ac=11521.88e9) == pytest.approx(10.44, rel=1e-3)
    assert table.joule(mac=macs(dense), ac=sops) == pytest.approx(10.44, rel=1e-2)
    # METHOD's other figure: 8-bit units
    assert COST_TABLES["int8"].joule(mac=macs(matrices), ac=0) == pytest.approx(0.90, rel=1e-2)


@pytest.mark.parametrize("name", list(TINY))
def test_linear_macs_are_the_weights_of_the_model(name):
    """One multiplication a weight and token: the parameter count of every Linear."""
    model = tiny_model(name)
    shape = decoder_shape(model)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    gate_product = shape.layers * shape.F
    assert macs(matrix_products(shape, tokens=3, pairs=0)) == 3 * (weights + gate_product)
    biases = sum(module.bias.numel() for module in model.modules() if isinstance(module, nn.Linear) and module.bias is not None)
    assert shape.layers * shape.biases == biases
    assert shape.head_norms == (name == "qwen3")


def test_attention_counts_visible_pairs():
    shape = DecoderShape(layers=1, D=4, F=8, H=2, K=1, E=2, V=10)
    assert causal_pairs(3) == 6
    by_name = {each.name: each.mac for each in matrix_products(shape, tokens=3, pairs=6)}
    assert by_name["query x key"] == by_name["probabilities x value"] == 6 * 2 * 2
    assert by_name["language model head"] == 3 * 4 * 10


def test_integers_of_other_widths():
    assert integer_mac_pj(8) == pytest.approx(COST_TABLES["int8"].mac_pj)
    assert integer_mac_pj(32) == pytest.approx(3.2, rel=0.05)  # Horowitz: 3.1 + 0.1
    assert integer_mac_pj(9) == pytest.approx(0.2 * 81 / 64 + 0.03 * 9 / 8)


@pytest.mark.parametrize(("width", "additions"), [(64, 6), (128, 7), (14336, 28 + 9), (1536, 12 + 7), (576, 36 + 4)])
def test_additions_of_an_online_transform(width, additions):
    assert fast_hadamard_additions(width) == additions


def test_energies_and_break_even_by_hand():
    table = CostTable(name="hand", mac_pj=5.0, ac_pj=1.0, source="here")
    found = compare(
        table, T=7, matrices=[Operation(name="m", mac=1000)], pointwise=[Operation(name="p", mac=10, ac=20)],
        dense=[Operation(name="d", mac=50, ac=30)], sops=2000, synapses=1000, tokens=10,
    )  # fmt: skip
    assert found.ann_pj_per_token == pytest.approx((5 * 1010 + 20) / 10)
    assert found.int_pj_per_token == pytest.approx((0.23 * 1000 + 5 * 10 + 20) / 10)
    assert found.snn_pj_per_token == pytest.approx((5 * 50 + 30 + 2000) / 10)
    # at this rate the spikes cost what the ANN costs beyond the SNN's dense part
    assert 1.0 * 7 * 1000 * found.break_even_firing_rate == pytest.approx(5070 - 280)
    assert 1.0 * 7 * 1000 * found.break_even_firing_rate_int == pytest.approx(300 - 280)


def test_a_network_whose_dense_part_costs_more_than_the_ann_never_breaks_even():
    found = compare(
        COST_TABLES["fp32"], T=4, matrices=[Operation(name="m", mac=10)], pointwise=[], dense=[Operation(name="d", mac=11)], sops=0,
        synapses=10, tokens=1,
    )  # fmt: skip
    assert found.break_even_firing_rate == 0


@pytest.mark.parametrize(("mac", "ac"), [(-1.0, 0.1), (1.0, 0.0), (float("nan"), 1.0)])
def test_costs_must_be_positive(mac, ac):
    with pytest.raises(ValueError, match="positive"):
        CostTable(name="bad", mac_pj=mac, ac_pj=ac, source="")
