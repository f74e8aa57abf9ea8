"""The authors' neuron files: what is read is what stands in them, and what does not fit is refused by name."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer
from spikellm.config.checks import InputError
from spikellm.config.choices import ImportV0
from spikellm.config.labels import SiteKind
from spikellm.model.sites import Site, sites
from spikellm.search.published import KINDS, imported, own_name, read_neurons
from tests.codes import asked
from tests.configure import configure

NAMES = sorted(["layer.norm", "layer.softmax"])


def entry(*, v0: float | None = None, G: int = 2, assignment=(0, 0, 1, 1), tau: float = 3.0) -> tuple:
    bases = [torch.tensor([2.1, 1.9, 2.0][:G]) + shift for shift in (0.0, 0.01, -0.02)]
    found = (G, list(assignment), bases[0], tau, bases[1], bases[2])
    return found if v0 is None else (*found, torch.tensor(v0))


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def statistics():
    observer = Observer("site", groups=2)
    for part in (FIT, CHOOSE, REPORT):
        observer.part = part
        observer(torch.randn(50, 2, generator=torch.Generator().manual_seed(part)))
    return dict.fromkeys(NAMES, observer.result())


@pytest.mark.parametrize("stored", [True, False])
def test_tables_are_those_of_the_file(tmp_path, statistics, stored):
    path = write(tmp_path / "neurons.pth", {NAMES[0]: entry(), NAMES[1]: entry(v0=0.07)})
    fits = imported(statistics, asked(4, 2, import_file=str(path), import_v0=ImportV0.stored if stored else ImportV0.rule))
    assert list(fits) == list(statistics)
    rule = 3.0 * 2**-4 / 2
    for name, v0 in zip(NAMES, (rule, 0.07 if stored else rule), strict=True):
        fit = fits[name]
        assert fit.v0.item() == pytest.approx(v0, rel=1e-6)
        for row, shift in ((fit.d, 0.0), (fit.h, 0.01), (fit.theta, -0.02)):
            wanted = [3.0 * ((2.1, 1.9)[grain] + shift) ** -(t + 1) for t, grain in enumerate((0, 0, 1, 1))]
            assert row[0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_imported_means_imported(tmp_path, statistics):
    """No base 2 in its place, however bad; the error reported is the file's."""
    path = write(tmp_path / "neurons.pth", {name: entry(tau=1e-3) for name in NAMES})
    for fit in imported(statistics, asked(4, None, import_file=str(path))).values():
        assert fit.tau.item() == pytest.approx(1e-3)
        assert not fit.fallback.any()
        assert fit.relative_error == pytest.approx(1, abs=0.01)  # next to nothing gets through
        assert fit.relative_error_base2 < 0.1


BROKEN = {
    "T=4 at .*snn.T=6; set snn.T=4": ({name: entry() for name in NAMES}, {"T": 6}),
    "G=2 at .*grain=3; set grain=2": ({name: entry() for name in NAMES}, {"G": 3, "min_length": 1}),
    r"lacks 1 sites of the model \(layer.softmax\)": ({NAMES[0]: entry()}, {}),
    r"has 1 sites that the model lacks \(other\)": ({name: entry() for name in [*NAMES, "other"]}, {}),
    "not neurons by site name": ([1, 2], {}),
    "layer.norm is not one: found tuple of 5 items": ({NAMES[0]: entry()[:5]}, {}),
    "does not run through the grains": ({NAMES[0]: entry(assignment=(0, 1, 0, 1))}, {}),
    "is not 3 positive numbers": ({NAMES[0]: (3, [0, 1, 2, 2], *entry()[2:])}, {}),
    "tau=-1.0 is not a positive number": ({NAMES[0]: entry(tau=-1.0)}, {}),
    "v0=.*nan.* is not a number": ({NAMES[0]: entry(v0=math.nan)}, {}),
    "v0=.*inf.* is not a number": ({NAMES[0]: entry(v0=math.inf)}, {}),
    "B=.*nan.* is not 2 positive numbers": ({NAMES[0]: (2, [0, 0, 1, 1], torch.full((2,), math.nan), *entry()[3:])}, {}),
    "beyond what float32 holds": ({NAMES[0]: (2, [0, 0, 1, 1], torch.full((2,), 1e-30), *entry()[3:])}, {}),
    "beyond what float32 holds.*": ({NAMES[0]: entry(tau=1e300)}, {}),
    "layer.norm is not one: .*invalid data type": ({NAMES[0]: (2, "abcd", *entry()[2:])}, {}),
    "holds 7 among its keys": ({7: entry()}, {}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path, statistics, message):
    content, arguments = BROKEN[message]
    path = write(tmp_path / "neurons.pth", content)
    with pytest.raises(InputError, match=rf"search.import_file={re.escape(str(path))}: .*{message}"):
        imported(statistics, asked(**{"T": 4, "G": 2, "import_file": str(path)} | arguments))


class Stranger:
    """Anything that a pickle may not contain."""


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no neurons here")
    (tmp_path / "empty.pth").touch()
    write(tmp_path / "code.pth", {"site": Stranger()})
    for name, reason in {"absent": "cannot be read", "text": "torch.load", "empty": "torch.load", "code": "torch.load"}.items():
        with pytest.raises(InputError, match=rf"search.import_file=.*{name}.pth: .*{reason}"):
            read_neurons(tmp_path / f"{name}.pth")


def test_all_published_files_are_read(shared_data):
    files = sorted((shared_data / "published_neurons").glob("*.pth"))
    assert len(files) == 8
    for path in files:
        T, G = map(int, re.search(r"T-(\d+)-grains-(\d)", path.name).groups())
        raw = torch.load(path, map_location="cpu", weights_only=True)
        codes = read_neurons(path, T=T, G=G)
        assert set(codes) == {site.name for site in sites(32)}
        for name in list(raw)[::40]:
            theta, h, d, v0 = codes[own_name(name)].spell().at(0)
            _, assignment, B, tau, H, Theta, *rest = raw[name]
            for row, bases in ((d, B), (h, H), (theta, Theta)):
                wanted = [tau * bases[grain].item() ** -(t + 1) for t, grain in enumerate(assignment)]
                assert row.tolist() == pytest.approx(wanted, rel=1e-5)
            assert v0.item() == pytest.approx(rest[0].item() if rest else tau * 2**-T / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.layers.3.self_attn.softmax_Identity.input", "layers.3.softmax"),
        ("model.layers.0.input_layernorm.output", "layers.0.attention_input"),
        ("model.layers.31.post_attention_layernorm.output", "layers.31.mlp_input"),
        ("model.layers.10.mlp.silu_Identity.input", "layers.10.activation"),
        ("model.norm.output", "head_input"),
        ("model.layers.03.mlp.down_proj.input", "model.layers.03.mlp.down_proj.input"),  # not one of theirs
        ("anything", "anything"),
    ],
)
def test_the_authors_names_become_ours(theirs, ours):
    assert own_name(theirs) == ours


def authors_name(name: str) -> str:
    site = Site.of(name)
    kind = {kind: theirs for theirs, kind in KINDS.items()}[site.kind]
    return kind if site.kind is SiteKind.head_input else f"model.layers.{site.layer}.{kind}"


SMALL = ["model=tiny", "dataset.calibration.window=64", "dataset.calibration.max_windows=2", "stages=[search]"]


def test_a_run_imports_and_knows_the_file_by_its_content(tmp_path, caplog):
    from spikellm.run.stages import run_stages

    def run(*arguments: str):
        found = run_stages(configure(*SMALL, f"output_root={tmp_path}", "snn.coding=phase", "snn.T=4", "grain='2'", *arguments))
        return found.results.to_json(), found.tables["sites.csv"]

    _, rows = run("search.method=base2")  # names of sites
    first, second = ({authors_name(row["name"]): entry(tau=tau, v0=0.2) for row in rows} for tau in (3.0, 4.0))
    path = write(tmp_path / "first.pth", first)
    results, imported = run(f"search.import_file={path}")
    assert {row["tau"][0] for row in imported} == {3.0}
    assert not results["stages"]["search"]["cached"]
    moved = path.rename(tmp_path / "moved.pth")
    assert run(f"search.import_file={moved}")[0]["stages"]["search"]["cached"]
    write(moved, second)
    assert {row["tau"][0] for row in run(f"search.import_file={moved}")[1]} == {4.0}
    with caplog.at_level(logging.WARNING):
        ruled = run(f"search.import_file={moved}", "search.import_v0=rule", "search.method=base2")[1]
    assert ruled[0]["v0"][0] == pytest.approx(4.0 * 2**-4 / 2)
    assert "search.method=base2 has no effect" in caplog.text
    with pytest.raises(InputError, match=r"snn.T=6; set snn.T=4"):
        run_stages(configure(*SMALL, f"output_root={tmp_path}", "snn.coding=phase", "snn.T=6", "grain='2'", f"search.import_file={moved}"))
