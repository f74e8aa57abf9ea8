"""What people read: tables of the console and of sweeps, from folders with known content."""

import csv

import pytest

from spikellm.report.console import console_table
from spikellm.report.results import NOT_FINISHED, finished_results, summary_rows, value_at, write_failure, write_summary
from spikellm.store.record import JobRecord, Results
from tests.results import ZERO_SHOT, leave, make, results, sweep


def test_summary_has_the_shape_of_the_published_table(tmp_path):
    rows = write_summary(sweep(tmp_path))
    read = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["folder"] for row in read] == ["0-T4-G1", "1-T4-Gauto", "2-T4-G3", "10-T6-G1"]  # by number
    first = read[0]
    wanted = {"model": "tiny", "T": "4", "grain": "1", "ann": "10.0", "base2": "24.0", "snn": "12.0", "ratio": "1.2", "wino": "0.515625"}
    wanted |= {"arc_c": "0.265625", "arc_e": "0.640625", "piqa": "0.765625", "sops_per_token": "1234567.0", "error": ""}
    wanted |= {"snn_published": "11.5", "piqa_published": "0.7", "relative_mse": "0.25", "pj_per_token": "1110000.0", "hellaswag": ""}
    assert {key: first[key] for key in wanted} == wanted
    assert (read[2]["T"], read[2]["grain"], read[2]["error"]) == ("4", "3", "snn.T=4 with grain=3: <b>too | few</b> steps")
    assert read[3]["error"].startswith("not finished")
    assert list(first) == list(rows[0])
    assert not any(row["options"] for row in read)  # all the same but for T and grain; one left no word

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "summary.md").read_text().splitlines()]
    assert len({len(line) for line in lines}) == 1
    table = dict(zip(lines[0], lines[2], strict=True))
    assert (table["Wino"], table["ArcC"], table["PIQA"], table["PIQA, published"]) == ("51.56", "26.56", "76.56", "70.00")
    assert (table["ppl SNN"], table["ppl SNN, published"], table["SNN / ANN"]) == ("12", "11.5", "1.2")
    assert "HellaSwag" not in table  # nobody measured it


def test_every_ratio_is_to_the_pretrained_network_with_the_same_prefix(tmp_path):
    """And to the bare one in results of older versions, which have no other."""
    old = results(4, 1, 12.0)
    new = results(4, 2, 12.0, perplexity=old["perplexity"] | {"ann_prefix": 8.0})
    new["perplexity_by_text"] = {"more": new["perplexity"]}
    for number, each in enumerate((old, new)):
        leave(make(tmp_path / f"{number}-T4-G{number + 1}"), each, {}, [])
    assert [(row["ratio"], row["ann"], row["ann_prefix"]) for row in summary_rows(tmp_path)] == [(1.2, 10.0, None), (1.5, 10.0, 8.0)]
    lines = [
        [line.split()[-1] for line in console_table(Results.from_json(each), tmp_path).splitlines() if "   x " in line]
        for each in (old, new)
    ]
    assert lines == [["1.0000", "2.4000", "1.2000"], ["1.2500", "1.0000", "3.0000", "1.5000"] * 2]


def test_a_later_failure_is_told_and_a_later_success_forgets_it(tmp_path):
    job = make(tmp_path / "0-T4-G1")
    leave(job, results(4, 1, 12.0), {}, [])
    write_failure(job, "disk full", JobRecord(model="tiny"))
    assert summary_rows(tmp_path)[0]["error"] == "disk full"
    assert (job / "results.json").is_file()  # an earlier result is not lost
    assert finished_results(job, "0123") is None
    leave(job, results(4, 1, 12.0), {}, [])
    assert summary_rows(tmp_path)[0]["error"] is None
    assert finished_results(job, "0123").T == 4
    assert finished_results(job, "4567") is None
    for content in (b"", bytes(50), (job / "results.json").read_bytes()[:100], b"{}", b"[1]"):
        (job / "results.json").write_bytes(content)
        assert finished_results(job, "0123") is None
        assert "damaged" in summary_rows(tmp_path)[0]["error"]
    (job / "error.json").write_bytes(bytes(50))
    assert summary_rows(tmp_path)[0]["error"] == NOT_FINISHED


def test_published_figures_stand_beside_the_measured_ones_on_the_console(tmp_path):
    text = console_table(Results.from_json(results(4, 1, 12.0, **ZERO_SHOT)), tmp_path)
    lines = [line.split() for line in text.splitlines()]
    assert ["perplexity.snn", "11.5", "measured", "12"] in lines
    # like with like: each SNN beside the ANN of the same weights
    assert ["SNN,", "fp32", "weights", "1.11", "x", "0.2775"] in lines
    assert ["SNN,", "int5", "weights", "0.25", "x", "0.5000"] in lines
    assert any(line[-3:] == ["latency", "60", "steps"] for line in lines)
    assert ["zero_shot.snn.piqa.acc_norm", "0.7", "measured", "0.7656"] in lines
    assert text.splitlines()[-1].endswith(str(tmp_path / "results.json"))
    missing = console_table(Results.from_json(results(4, 1, 12.0, reference=ZERO_SHOT["reference"])), tmp_path)
    assert "measured nothing" in missing


@pytest.mark.parametrize(("key", "value"), [("perplexity.snn", 12.0), ("perplexity.nothing", None), ("T.deeper", None), ("T", 4)])
def test_dotted_keys(key, value):
    assert value_at(Results.from_json(results(4, 1, 12.0)), key) == value


def test_the_console_names_what_does_the_damage_worst_first(tmp_path):
    diagnosed = {
        "median_above_bound": 3.149,
        "perplexity_by_kind": {"none": 20.0, "query": 20.5, "softmax": 22.0},
        "perplexity_by_site": {"head_input": 21.0},
    }
    lines = console_table(Results.from_json(results(4, 1, 12.0, diagnostics=diagnosed)), tmp_path).splitlines()
    start = next(number for number, line in enumerate(lines) if "Lloyd-Max" in line)
    assert lines[start].endswith(" 3.15")
    assert "(20.000)" in lines[start + 1]
    assert [line.split() for line in lines[start + 2 : start + 5]] == [
        ["1.10000", "softmax"], ["1.02500", "query"], ["1.05000", "head_input"]
    ]  # fmt: skip
    without = console_table(Results.from_json(results(4, 1, 12.0, diagnostics={"median_above_bound": None})), tmp_path)
    assert "Lloyd" not in without
