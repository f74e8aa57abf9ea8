"""Tuning in a job: what it computes again, what survives a kill, what is said of it."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from spikellm.config.checks import InputError
from spikellm.reconstruction import tuning
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run, stopped_behind_the_first_block

# without kernels: Inductor takes a minute for those of gradients
SHORT = [
    "dataset.calibration.max_windows=8", "dataset.evaluation.max_windows=1", "dataset.calibration.window=32", "snn.T=4",
    "hardware.fused=false",
]  # fmt: skip
TUNED = [*SHORT, "tune.epochs=3"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Results of one store by what was asked for, the job without tuning first."""
    root = tmp_path_factory.mktemp("tuning")
    asked = {
        "plain": SHORT,
        "neurons": TUNED,
        "all": [*TUNED, "tune.what=all", "tune.weight_rate=1e-4"],
        "gptq": [*TUNED, "tune.what=all", "tune.weight_rate=1e-4", "weights.bits=8"],
    }
    return root, {name: run(root, *options) for name, options in asked.items()}


def test_it_comes_between_search_and_conversion(jobs):
    root, found = jobs
    for name in ("neurons", "all", "gptq"):
        assert cached(found[name]) == {"calibrate": True, "search": True, "convert": False, "evaluate": False}
        for network in ("ann_prefix", "ann"):
            assert found[name]["perplexity"][network] == found["plain"]["perplexity"][network]
        assert found[name]["perplexity"]["snn"] != found["plain"]["perplexity"]["snn"]
        assert found[name]["codes"] == found["plain"]["codes"]
    assert found["all"]["perplexity"]["base2"] == found["plain"]["perplexity"]["base2"]
    assert len(artefacts(root, "tune")) == 2, "integers are found behind the same tuning"


def test_results_say_so(jobs):
    _, found = jobs
    assert "tune" not in found["plain"]
    for what in ("neurons", "all"):
        said = found[what]["tune"]
        assert said["epochs"] == 3
        assert said["what"] == what
        assert said["blocks"] == 2
        assert 1 <= said["blocks_improved"] <= 2
        assert said["relative_error"] < said["relative_error_before"]
    assert found["gptq"]["tune"] == found["all"]["tune"]


def test_the_same_job_finds_it_all_there(jobs):
    root, found = jobs
    again = run(root, *TUNED)
    assert all(cached(again).values())
    assert again["tune"] == found["neurons"]["tune"]


def test_a_job_that_was_stopped_goes_on_and_finds_the_same(jobs, tmp_path, caplog):
    root, found = jobs
    stopped_behind_the_first_block(tuning, "tune_block", tmp_path, *TUNED)
    (kept,) = artefacts(tmp_path, "tune_block")
    assert '"block": "layer 0"' in (kept / "inputs.json").read_text()
    with caplog.at_level(logging.INFO):
        again = run(tmp_path, *TUNED)
    assert "tune: goes on behind 1 finished blocks" in caplog.messages
    assert not artefacts(tmp_path, "tune_block"), "they are in the whole"
    assert again["perplexity"] == found["neurons"]["perplexity"]
    (kept,), others = artefacts(tmp_path, "tune"), artefacts(root, "tune")
    wanted = load_file(next(other for other in others if other.name == kept.name) / "codes.safetensors")
    codes = load_file(kept / "codes.safetensors")
    assert all(torch.equal(codes[key].nan_to_num(), wanted[key].nan_to_num()) for key in wanted), "base 2 has no objective"


def test_options_without_effect_are_named(tmp_path, caplog):
    run(tmp_path, *SHORT, "stages=[convert]", "tune.what=all", "tune.batch=2")
    assert {"tune.what=all has no effect with tune.epochs=0", "tune.batch=2 has no effect with tune.epochs=0"} <= set(caplog.messages)
    run(tmp_path, *TUNED, "stages=[convert]", "tune.weight_rate=1e-3")
    assert "tune.weight_rate=0.001 has no effect without tune.what=all" in caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tune.rate=0"], r"^tune\.rate=0.*: must be positive"),
        (["tune.weight_rate=-1"], r"^tune\.weight_rate=-1.*: must be positive"),
        (["tune.batch=0"], r"^tune\.batch=0: must be at least 1"),
        (["tune.epochs=-1"], r"^tune\.epochs=-1: must not be negative"),
        (["tune.epochs=1", "snn.coding=rate"], r"^tune\.epochs=1 with snn\.coding=rate: .*phase_signed"),
        (["tune.epochs=1", "tune.what=all", "weights.bits=8", "weights.rounding=nearest"], r"^tune\.what=all with weights\.bits=8, .*gptq"),
    ],
)
def test_what_cannot_be_is_refused_with_the_configuration(options, message):
    with pytest.raises(InputError, match=message):
        configure(*SMALL, *options)


def test_a_missing_calibration_text_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"dataset\.calibration"):
        run(tmp_path, *TUNED, "dataset=text", "dataset.calibration.path=/nowhere.txt", "dataset.evaluation.path=/nowhere.txt")
