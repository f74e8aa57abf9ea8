"""Integer weights in a job: what it computes again, what it compares with, what it says of them."""

import pytest
import torch

from spikellm.config.checks import InputError
from spikellm.model.attention import attentions
from spikellm.model.integers import Rounding, load_integers, round_to_nearest, save_integers
from spikellm.model.sites import LAYERS, LINEARS, UP, decoder_layers
from spikellm.run.stages import run_stages
from spikellm.run.workspace import Workspace
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run

ONE_WINDOW = "dataset.evaluation.max_windows=1"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Results of one store by what was asked for, the job without integers first."""
    root = tmp_path_factory.mktemp("weights")
    asked = {
        "w16": [],
        "gptq4": ["weights.bits=4", "weights.group_size=16"],
        "nearest4": ["weights.bits=4", "weights.group_size=16", "weights.rounding=nearest"],
        "nearest8": ["weights.bits=8", "weights.rounding=nearest"],
    }
    return root, {name: run(root, ONE_WINDOW, *options) for name, options in asked.items()}


def test_compensation_comes_after_the_search_and_rounding_to_nearest_before_calibration(jobs):
    root, found = jobs
    assert cached(found["gptq4"]) | {"evaluate": False} == {"calibrate": True, "search": True, "convert": False, "evaluate": False}
    assert not any(cached(found["nearest4"]).values())
    (kept,) = artefacts(root, "weights")
    integers = load_integers(kept / "integers.safetensors")
    assert len(integers) == 7 * 2
    assert max(int(each.integers.abs().max()) for each in integers.values()) == 7


def test_the_reference_has_its_own_weights(jobs):
    _, found = jobs
    references = {name: results["perplexity"]["ann_prefix"] for name, results in found.items()}
    for name in ("gptq4", "nearest4", "nearest8"):
        assert references[name] == references["w16"]
        for network in ("snn", "base2"):
            assert found[name]["perplexity"][network] != found["w16"]["perplexity"][network]
    assert found["nearest8"]["perplexity"]["snn"] == pytest.approx(found["w16"]["perplexity"]["snn"], rel=0.01)


def test_integers_found_behind_a_prefix_leave_it_as_it_was(tmp_path):
    """What GPTQ makes up for is measured on text: the massive activations of prefix tokens would come out of it as anything."""
    models, prefix = Workspace(configure(*SMALL, f"output_root={tmp_path}")).models, [1, 7]
    model = models.transparent(prefix)
    whole = [attention.prefix_key.clone() for attention in attentions(model)]
    found = {
        f"{LAYERS}.{layer}.{name}": round_to_nearest(module.get_submodule(name).weight, bits=4, group_size=None)
        for layer, module in enumerate(decoder_layers(model))
        for name in LINEARS
    }
    save_integers(tmp_path / "integers.safetensors", found)
    for file, same in ((tmp_path / "integers.safetensors", True), (None, False)):
        model = models.transparent(prefix, Rounding(bits=4, group_size=None, file=file))
        assert torch.equal(decoder_layers(model)[0].mlp.up_proj.weight, found[f"{LAYERS}.0.{UP}"].weight)
        kept = [attention.prefix_key for attention in attentions(model)]
        assert all(torch.equal(*pair) for pair in zip(kept, whole, strict=True)) is same


def test_results_say_so(jobs):
    _, found = jobs
    assert "weights" not in found["w16"]
    assert found["nearest8"]["weights"] == {"bits": 8, "group_size": None, "rounding": "nearest"}
    said = found["gptq4"]["weights"]
    assert 0 < said.pop("relative_error") < 0.05
    assert said == {"bits": 4, "group_size": 16, "rounding": "gptq"}
    assert found["gptq4"]["energy"]["weights"] == {"ann": "fp32", "snn": "fp32", "int": "int4", "snn_int": "int4"}
    assert "lm_head" in found["gptq4"]["energy"]["weights_note"]
    assert "weights_note" not in found["w16"]["energy"]
    assert found["w16"]["energy"]["weights"]["snn_int"] == f"int{found['w16']['T'] + 1}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["weights.bits=3"], r"^weights\.bits=3: takes 8 or 4, or null"),
        (["weights.bits=4", "weights.group_size=0"], r"^weights\.group_size=0: must be at least 1"),
        (["weights.bits=4", "weights.group_size=-64"], r"^weights\.group_size=-64: must"),
        (["weights.bits=8", "model.dtype=bfloat16", "save_model=true"], r"^save_model=true with weights\.bits=8, model\.dtype=bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_with_the_configuration(options, message):
    with pytest.raises(InputError, match=message):
        configure(*SMALL, *options)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_groups_that_do_not_divide_are_refused_in_one_line_before_the_work(rounding, tmp_path):
    arguments = [*SMALL, f"output_root={tmp_path}", "weights.bits=4", "weights.group_size=50", f"weights.rounding={rounding}"]
    with pytest.raises(InputError, match=r"^weights\.group_size=50 with model=tiny: does not divide hidden_size=\d+.*take a divisor of"):
        run_stages(configure(*arguments))
    assert not list(tmp_path.glob("artifacts/*/*/*"))


def test_options_without_effect_are_named(tmp_path, caplog):
    run(tmp_path, "stages=[convert]", "weights.group_size=16", "weights.rounding=nearest")
    assert "weights.group_size=16 has no effect without weights.bits" in caplog.text
    assert "weights.rounding=nearest has no effect without weights.bits" in caplog.text
