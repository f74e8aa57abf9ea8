"""Jobs with amplitudes of tokens: what is kept apart by the keys, what is measured, what is refused."""

import json

import pytest
from hydra.errors import HydraException

from spikellm.config.checks import InputError
from spikellm.report.console import console_table
from spikellm.run.command import explain
from spikellm.run.fitting import CALIBRATE, SEARCH
from spikellm.run.workspace import Workspace
from spikellm.store.record import Results
from tests.configure import configure
from tests.jobs import SMALL, cached, run

TOKEN = "snn.amplitude=token"


def test_keys_of_static_amplitudes_are_as_ever_and_those_of_tokens_their_own():
    static, spelled, token = (Workspace(configure(*SMALL, *more)) for more in ([], ["snn.amplitude=static"], [TOKEN]))
    assert "amplitude" not in json.dumps([CALIBRATE.inputs(static), SEARCH.inputs(static)])
    assert CALIBRATE.inputs(static) == CALIBRATE.inputs(spelled)
    assert CALIBRATE.inputs(token) == CALIBRATE.inputs(static) | {"amplitude": "token"}
    assert SEARCH.key(token) != SEARCH.key(static)


def test_every_network_of_a_job_has_them_and_results_say_so(tmp_path):
    """base2 is coded in shares of the token's largest input, too: with amplitudes of about 1 for all tokens it would be far off."""
    pytest.importorskip("matplotlib")
    static = run(tmp_path)
    stages = "stages=[calibrate,search,convert,evaluate,diagnose]"
    found = run(tmp_path, TOKEN, stages, "evaluation.networks=[ann_prefix,base2,snn,int_token]", "diagnostics.windows=1")
    assert not any(cached(found).values())
    assert (found["amplitude"], "amplitude" in static) == ("token", False)
    perplexity = found["perplexity"]
    assert perplexity["ann_prefix"] == pytest.approx(static["perplexity"]["ann_prefix"], rel=1e-6)
    for network in ("base2", "snn"):
        assert perplexity[network] == pytest.approx(perplexity["ann_prefix"], rel=0.02)
    assert found["diagnostics"]["perplexity_by_kind"]["mlp_product"] == pytest.approx(perplexity["ann_prefix"], rel=0.05)
    assert any(each["name"].startswith("amplitudes of tokens") for each in found["spikes"]["dense_operations"])
    assert not any(each["name"].startswith("amplitudes of tokens") for each in static["spikes"]["dense_operations"])
    assert "  amplitude=token" in console_table(Results.from_json(found), tmp_path).splitlines()[0]
    assert "amplitude" not in console_table(Results.from_json(static), tmp_path).splitlines()[0]
    stepped = run(tmp_path, TOKEN, "snn.execution=stepped", "evaluation.networks=[snn]")
    assert stepped["perplexity"]["snn"] == pytest.approx(perplexity["snn"], rel=1e-3)


@pytest.mark.parametrize("coding", ["rate", "ttfs", "phase_signed"])
def test_other_codes_have_them_too(coding, tmp_path):
    found = run(tmp_path, TOKEN, f"snn.coding={coding}", "snn.T=16", "evaluation.networks=[ann_prefix,snn]")["perplexity"]
    assert found["snn"] == pytest.approx(found["ann_prefix"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["snn.amplitude=row"], ["snn.amplitude", "row", "static, token"]),
        ([TOKEN, "search.import_file=F.pth"], ["search.import_file=F.pth with snn.amplitude=token", "leave snn.amplitude out"]),
        (
            [TOKEN, "evaluation.networks=[snn,int_static]"],
            ["evaluation.networks=[snn,int_static] with snn.amplitude=token", "leave int_static out, or snn.amplitude"],
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, named):
    with pytest.raises((InputError, HydraException)) as caught:
        configure(*arguments)
    message = explain(caught.value)
    assert len(message.splitlines()) == 1
    assert all(part in message for part in named), message
