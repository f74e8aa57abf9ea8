"""search.sequential in a job: what its result depends on, how it goes on where it was stopped, where it has no effect."""

import pytest

import spikellm
from spikellm.evaluation.perplexity import perplexity
from spikellm.reconstruction import sequential
from spikellm.run.fitting import SEARCH, without_effect
from spikellm.run.workspace import Workspace
from spikellm.search.options import Options
from tests.configure import configure
from tests.jobs import SMALL, artefacts, cached, run, stopped_behind_the_first_block

SEQUENTIAL = "search.sequential=true"


def test_the_key_of_codes_knows_the_switch_only_where_it_is_on():
    plain, off, on = (SEARCH.inputs(Workspace(configure(*SMALL, *each))) for each in ([], ["search.sequential=false"], [SEQUENTIAL]))
    assert plain == off
    assert "sequential" not in plain["search"]
    assert plain.items() < on.items()
    assert on["sequential"]["sha256"] != plain["code"]["sha256"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("sequential")
    plain = run(root, "stages=[evaluate]")
    return root, plain, run(root, SEQUENTIAL, "save_model=true")


def test_it_begins_with_the_calibration_that_is_there(job):
    root, plain, found = job
    assert cached(found) == {"calibrate": True, "search": False, "convert": False, "evaluate": False}
    assert found["perplexity"]["ann_prefix"] == plain["perplexity"]["ann_prefix"]
    assert found["perplexity"]["snn"] != plain["perplexity"]["snn"]
    assert all(cached(run(root, SEQUENTIAL, "save_model=true")).values())


def test_the_saved_model_is_the_evaluated_one(job):
    root, _, found = job
    model, _ = spikellm.load(found["saved_model"])
    windows = Workspace(configure(*SMALL, f"output_root={root}")).evaluation_windows
    assert perplexity(model, windows).value == pytest.approx(found["perplexity"]["snn"], rel=1e-6)


def test_a_stopped_search_goes_on_behind_its_last_block(job, monkeypatch, tmp_path):
    _, _, found = job
    stopped_behind_the_first_block(sequential, "fit_block", tmp_path, SEQUENTIAL)
    assert len(artefacts(tmp_path, "search_block")) == 1
    searched = []

    def find_codes(statistics, options):
        searched.extend(statistics)
        return known(statistics, options)

    known = sequential.find_codes
    monkeypatch.setattr(sequential, "find_codes", find_codes)
    again = run(tmp_path, SEQUENTIAL)
    assert not any(site.startswith("layers.0.") for site in searched)
    assert len(searched) == 9 + 1
    assert not artefacts(tmp_path, "search_block"), "they are in the whole"
    assert again["perplexity"] == found["perplexity"]


def test_a_file_of_codes_is_not_fitted_again():
    options = Options.of(configure(*SMALL, SEQUENTIAL, "search.method=evolution", "search.import_file=neurons.pth"))
    assert list(without_effect(options)) == ["search.sequential=true has no effect: the codes come from search.import_file"]
