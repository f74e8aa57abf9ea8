"""results.json and its records: what is written is what was written before there were records, and old files are read."""

import json
from dataclasses import MISSING, fields
from typing import Any

import pytest

from spikellm.config.dataset import ZeroShotConfig
from spikellm.config.labels import NETWORKS, Label, SiteKind
from spikellm.report.console import console_table
from spikellm.report.results import FIGURES, value_at
from spikellm.store.record import (
    AccuracyRecord,
    DiagnosticsRecord,
    EnergyRecord,
    Findings,
    JobRecord,
    KindSpikes,
    PerplexityRecord,
    Results,
    SearchRecord,
    SpikesRecord,
    StageRecord,
)

# The contract's own example, as the first version wrote it.
FIRST: dict[str, Any] = {
    "schema": 1, "model": "smollm2_135m", "T": 8, "grain": 2, "coding": "phase", "execution": "folded", "seed": 0,
    "stages": {"calibrate": {"seconds": 14.2, "cached": False}}, "versions": {"python": "3.11", "torch": "2.13"},
    "sites": 271, "prefix_tokens": [1], "rotation": {"kind": "hadamard", "seed": 0, "hash": "0f"},
    "search": {"seconds": 9.1, "relative_mse": 0.0003, "relative_mse_base2": 0.0009, "worse_than_base2": 0},
    "perplexity": {"ann": 24.5, "snn": 24.9, "base2": 27.0, "windows": 8, "window": 1024, "tokens": 8184},
}  # fmt: skip
LATER: dict[str, Any] = FIRST | {
    "reference": {"source": None, "figures": {"perplexity.snn": 5.5}},
    "anytime": {"perplexity": [30.0, 25.0]},
    "perplexity_by_text": {"c4": {"snn": 1.5, "windows": 1, "window": 2, "tokens": 1}},
    "zero_shot": {"snn": {"piqa": {"acc": 0.5, "acc_norm": 0.25, "rows": 4}}},
    "spikes": {
        "windows": 1, "window": 4, "tokens": 4, "firing_rate": 0.5, "firing_rate_at_synapses": 0.25, "spikes_per_token": 8.0,
        "sops_per_token": 16.0, "latency_steps": 4, "firing_rate_by_step": [0.5],
        "by_kind": {"query": {"firing_rate": 0.5, "spikes_per_token": 8.0, "sops_per_token": 16.0}},
        "dense_operations": [{"name": "RoPE", "mac_per_token": 1.0, "ac_per_token": 0.0}],
    },
    "diagnostics": {"perplexity_by_kind": {"none": 2.0}, "perplexity_by_site": {"layers.0.query": 3.0}, "median_above_bound": None},
    "codes": "/a/codes.safetensors", "command": "python main.py", "config": "01", "warnings": ["one"],
}  # fmt: skip


@pytest.mark.parametrize("found", [FIRST, LATER])
def test_what_is_read_is_written_again(found):
    read = Results.from_json(json.loads(json.dumps(found)))
    assert read.to_json() == found
    assert read.to_json().keys() <= {field.name for field in fields(Results)}


def test_sections_are_records():
    read = Results.from_json(LATER)
    assert read.stages["calibrate"] == StageRecord(seconds=14.2, cached=False)
    assert read.perplexity == PerplexityRecord(networks={"ann": 24.5, "snn": 24.9, "base2": 27.0}, windows=8, window=1024, tokens=8184)
    assert read.perplexity_by_text["c4"].networks == {"snn": 1.5}
    assert read.zero_shot["snn"]["piqa"] == AccuracyRecord(acc=0.5, acc_norm=0.25, rows=4)
    assert read.spikes.by_kind["query"] == KindSpikes(firing_rate=0.5, spikes_per_token=8.0, sops_per_token=16.0)
    assert read.spikes.dense_operations[0].name == "RoPE"
    assert value_at(read, "perplexity.snn") == 24.9
    assert value_at(read, "perplexity_by_text.c4.snn") == 1.5
    assert value_at(read, "zero_shot.snn.piqa.acc_norm") == 0.25


def test_the_header_stands_first_and_the_order_is_that_of_the_stages():
    names = list(Results.from_json(dict(reversed(LATER.items()))).to_json())
    assert names[:8] == ["schema", "model", "T", "grain", "coding", "execution", "seed", "stages"]
    assert names.index("sites") < names.index("search") < names.index("perplexity") < names.index("spikes") < names.index("diagnostics")
    assert names[-3:] == ["command", "config", "warnings"]


def test_a_section_that_was_not_computed_is_absent_and_a_figure_that_is_none_is_null():
    bare = Results(schema=1, model="tiny", T=4, grain="auto", stages={})
    assert bare.to_json() == {"schema": 1, "model": "tiny", "T": 4, "grain": "auto", "stages": {}}
    assert DiagnosticsRecord(median_above_bound=None).to_json() == {"median_above_bound": None}
    assert JobRecord(T=4).to_json() == {"T": 4}


@pytest.mark.parametrize("found", [None, [1], "text", {}, {"schema": 1}, FIRST | {"perplexity": 3}, FIRST | {"search": {"seconds": 1.0}}])
def test_what_is_no_results_file_is_refused(found):
    with pytest.raises(ValueError, match=r"missing|not an object"):
        Results.from_json(found)


def test_facts_of_a_newer_version_are_passed_over():
    assert Results.from_json(FIRST | {"new": 1, "search": FIRST["search"] | {"new": {"a": 1}}}).to_json() == FIRST


def test_stages_add_to_each_other():
    search = SearchRecord(relative_mse=0.1, relative_mse_base2=0.2, worse_than_base2=3)
    both = Findings(sites=10, prefix_tokens=[1]) | Findings(sites=10, search=search)
    assert both == Findings(sites=10, prefix_tokens=[1], search=search)
    assert (Results.from_json(FIRST) | both).to_json() == FIRST | {"search": search.to_json(), "sites": 10}


def test_every_writer_is_asked_for_what_readers_rely_on():
    """What the last lines of a run print without asking is required."""
    for kind, names in (
        (SpikesRecord, ("windows", "window", "firing_rate", "firing_rate_at_synapses", "sops_per_token")),
        (EnergyRecord, ("table", "mac_pj", "ac_pj", "source", "ann_pj_per_token", "snn_pj_per_token", "int_pj_per_token")),
        (SearchRecord, ("relative_mse", "relative_mse_base2", "worse_than_base2")),
        (StageRecord, ("seconds", "cached")),
    ):
        required = {field.name for field in fields(kind) if field.default is MISSING}
        assert required >= set(names), kind


def test_energy_of_older_versions_is_shown_as_far_as_it_goes(tmp_path):
    """Without weights and the integer SNN."""
    energy = {
        "table": "fp32", "mac_pj": 4.6, "ac_pj": 0.9, "source": "a paper", "int_bits": 9, "ann_pj_per_token": 4e6, "int_pj_per_token": 1e6,
        "snn_pj_per_token": 1e6, "break_even_firing_rate": 0.5, "break_even_firing_rate_int": 0.1,
    }  # fmt: skip
    lines = console_table(Results.from_json(FIRST | {"energy": energy}), tmp_path).splitlines()
    assert [line.strip() for line in lines if "[uJ]" in line or "weights" in line] == [
        "energy per token [uJ], fp32: MAC 4.6 pJ, AC 0.9 pJ (a paper)"
    ]


def test_a_new_network_is_one_entry(monkeypatch, tmp_path):
    assert all(FIGURES[network] == (f"perplexity.{network}", f"ppl {label.short}") for network, label in NETWORKS.items())
    monkeypatch.setitem(NETWORKS, "other", Label("other one", "another network"))
    ZeroShotConfig(networks=["other"])
    found = FIRST | {"perplexity": FIRST["perplexity"] | {"other": 49.0}, "zero_shot": {"other": {"piqa": {"acc": 0.5}}}}
    lines = [line.split() for line in console_table(Results.from_json(found), tmp_path).splitlines()]
    assert ["other", "one", "49.000", "x", "2.0000"] in lines
    assert ["other", "one", "50.00", "+-", "0.00", "50.00"] in lines


def test_labels_tell_kinds_and_networks_apart():
    assert len({kind.value for kind in SiteKind}) == len(SiteKind) == 10
    assert len({label.short for label in NETWORKS.values()}) == len({label.long for label in NETWORKS.values()}) == len(NETWORKS)
