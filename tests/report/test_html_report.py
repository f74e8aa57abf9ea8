"""report.html: whole in itself, true to the folder, laid out for phone and desktop."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spikellm.config.checks import InputError
from spikellm.report import plots
from spikellm.report.html import rebuild, write_report
from tests.configure import configure
from tests.jobs import SMALL
from tests.launch import launch
from tests.results import ZERO_SHOT, leave, make, results, sites, sweep

VOID = {"meta", "link", "img", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"]  # fmt: skip
# A window of a chosen width (Chromium's own has at least 500 pixels) around the page, and what is to be known of it.
PROBE = """<!doctype html><title></title><iframe width="{width}" height="2000" style="border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => { const page = document.querySelector("iframe").contentDocument; document.title = JSON.stringify({
  window: page.documentElement.clientWidth, page: page.documentElement.scrollWidth,
  figures: [...page.querySelectorAll("figure svg, figure img")].map(each => each.getBoundingClientRect().width),
  tables: page.querySelectorAll("table").length }) })</script>"""


class Balance(HTMLParser):
    """Open elements, text, and what a page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href", "xlink:href") and not value.startswith(("data:", "#"))]

    def handle_startendtag(self, tag, attributes):
        if tag not in VOID:
            self.handle_starttag(tag, attributes)
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = sweep(tmp_path_factory.mktemp("sweep"))
    plots.png(plots.perplexity_curves([{"T": 4, "grain": 1, "snn": 2.0, "ann": 1.0}]), make(folder / "0-T4-G1" / "plots") / "density.png")
    return write_report(folder)


def test_a_sweep_s_page_is_whole_in_itself(page):
    text = page.read_text()
    parsed = Balance(text)
    assert not parsed.open
    assert not parsed.loads
    assert "<script" not in text
    assert "<b>too" not in text  # what came from outside is text, not markup
    assert "<b>too | few</b>" in parsed.text
    assert not re.search(r"url\((?!#)", text)
    for wanted in ("python main.py -m snn.T=4,6", "51.56", "1.2", "2-T4-G3", "10-T6-G1", "grain auto", "synaptic operations", "0.1.0"):
        assert wanted in parsed.text, wanted
    assert text.count("<svg") == 3 + 2 * 2  # curves, heat map, Pareto; two maps of each finished job
    assert text.count('<img alt="density" src="data:image/png;base64,') == 1
    assert (page.parent / "summary.png").is_file()


def test_a_run_s_page(tmp_path):
    leave(tmp_path, results(4, 1, 12.0, **ZERO_SHOT), {"sites.csv": sites()}, [])
    text = Balance(write_report(tmp_path).read_text()).text
    for wanted in ("tiny, T = 4, grain 1", "python main.py model=tiny", "12.000", "1.2000", "76.56", "75.00", "a table", "2 windows of 64"):
        assert wanted in text, wanted


def test_maps_of_a_run_whose_sites_had_other_names(tmp_path):
    """spikes.csv has their kinds and layers."""
    old = [{"name": f"model.layers.{layer}.some.{kind}", "layer": layer, "kind": kind} for layer in (0, 1) for kind in ("query", "softmax")]
    old.append({"name": "model.norm.output", "layer": None, "kind": "head_input"})
    rows = [{"name": row["name"], "relative_error": 0.1, "firing_rate": 0.2} for row in old]
    leave(tmp_path, results(4, 1, 12.0), {"sites.csv": rows}, [])
    assert "<svg" not in write_report(tmp_path).read_text()
    lines = [f"{row['name']},{'' if row['layer'] is None else row['layer']},{row['kind']}" for row in old]
    (tmp_path / "spikes.csv").write_text("\n".join(["name,layer,kind", *lines]) + "\n")
    assert write_report(tmp_path).read_text().count("<svg") == 2


def test_ratios_of_a_page_are_to_the_same_prefix(tmp_path):
    found = results(4, 1, 12.0)
    found["perplexity"]["ann_prefix"] = 8.0
    leave(tmp_path, found, {}, [])
    text = Balance(write_report(tmp_path).read_text()).text
    for wanted in ("pretrained, same prefix", "8.000", "1.2500", "1.5000", "3.0000", "with the same prefix"):
        assert wanted in text, wanted


def test_a_run_of_some_stages_has_a_page_too(tmp_path):
    partial = results(4, 1, 12.0)
    del partial["perplexity"], partial["search"]
    leave(tmp_path, partial, {}, [])
    assert "calibrate" in Balance(write_report(tmp_path).read_text()).text


def test_rebuilding(tmp_path):
    old, new = tmp_path / "runs" / "2001-01-01" / "00-00-00-a", tmp_path / "sweeps" / "2001-01-01" / "00-00-01"
    with pytest.raises(InputError, match=r"report\.folder=null.*no run or sweep"):
        rebuild(configure("stages=[report]", f"output_root={tmp_path}"))
    leave(make(old), results(4, 1, 12.0), {}, [])
    sweep(make(new))
    assert rebuild(configure("stages=[report]", f"output_root={tmp_path}")) == new / "report.html"
    assert rebuild(configure("stages=[report]", f"report.folder={old}")) == old / "report.html"
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=rf"report\.folder={wrong}"):
            rebuild(configure("stages=[report]", f"report.folder={wrong}"))
    with pytest.raises(InputError, match=r"report\.folder.*stages"):
        configure(f"report.folder={old}")


def test_the_command_line_makes_and_remakes_a_report(tmp_path):
    run = tmp_path / "runs" / "2001-01-01" / "run"
    done = launch(*SMALL, "report.html=true", f"output_root={tmp_path}", f"hydra.run.dir={run}")
    assert done.code == 0, done.err
    assert f"report   {run}/report.html" in done.out
    first = (run / "report.html").read_text()
    (run / "report.html").unlink()
    again = launch("stages=[report]", f"output_root={tmp_path}", f"hydra.run.dir={tmp_path}/elsewhere")
    assert again.code == 0, again.err
    assert (run / "report.html").read_text() == first


def test_maps_place_every_site(tmp_path):
    figure = plots.site_map([{key: str(value) for key, value in row.items()} for row in sites(3)], "firing_rate", "rates")
    grid = figure.axes[0].images[0].get_array()
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert grid.shape == (9, 3)
    for kind in ("attention input", "query", "softmax", "MLP product"):
        assert grid[rows.index(kind)].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert plots.site_map([], "firing_rate", "rates") is None


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_in_a_browser(width, page, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("{width}", str(width)).replace("{page}", escape(page.read_text())))
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}/profile", "--window-size=1400,2100", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["window"] == width
    assert found["page"] <= width
    shown = [wide for wide in found["figures"] if wide]  # those of closed jobs have no size
    assert len(shown) >= 5
    assert all(250 < wide < width for wide in shown)
    assert found["tables"] >= 2
    assert "CONSOLE" not in done.stderr, done.stderr
