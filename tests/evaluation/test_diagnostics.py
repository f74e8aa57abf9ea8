"""Diagnostics against closed forms and published constants."""

import pytest
import torch
from torch import nn

from spikellm.coding.neuron import PhaseTable, encode
from spikellm.config.labels import SiteKind
from spikellm.evaluation.density_plots import write_density_plots
from spikellm.evaluation.diagnostics import damage, lloyd_max, site_levels, site_rows, spelled_levels
from spikellm.evaluation.perplexity import perplexity
from spikellm.kernels.encode import Digits
from spikellm.model.conversion import get_neuron, install, model_sites
from spikellm.search.search import base2, evolution
from spikellm.search.traditional import classic
from tests.codes import PARTITIONS, asked, observed, partitioned_table
from tests.models import tiny_model


# Max 1960, table I: least mean squared error of a unit Gaussian with 2 n levels, symmetric about 0.
@pytest.mark.parametrize(("levels", "least"), [(1, 0.3634), (2, 0.1175), (4, 0.03454), (8, 0.009497), (16, 0.002499)])
def test_the_gaussian_has_the_published_optimum(levels, least):
    x = torch.linspace(0, 6, 6001, dtype=torch.float64)[None]
    weight = torch.exp(-x.square() / 2)
    _, error = lloyd_max(x, weight / weight.sum(), levels, iterations=400)
    assert error.item() == pytest.approx(least, rel=6e-3)


def test_a_uniform_density_has_evenly_spaced_levels():
    x = torch.linspace(0, 1, 8001)[None]
    levels, error = lloyd_max(x, torch.full_like(x, 1 / 8001), 8)
    assert torch.allclose(levels[0], (torch.arange(8) + 0.5) / 8, atol=1e-3)
    assert error.item() == pytest.approx(1 / 12 / 64, rel=1e-2)


def test_points_without_weight_and_groups_without_points_do_no_harm():
    x = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    weight = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    levels, error = lloyd_max(x, weight, 2)
    assert levels[0].tolist() == [1.0, 2.0]
    assert error.tolist() == [0.0, 0.0]


def density(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "uniform":
        return torch.rand(1_000_000, generator=generator)
    if name == "gaussian":
        return torch.randn(1_000_000, generator=generator)
    return torch.empty(1_000_000).exponential_(generator=generator)


@pytest.fixture(scope="module")
def densities():
    return {name: observed(density(name)) for name in ("uniform", "gaussian", "exponential")}


# How many levels neurons have: those of digit strings that an input can bring about.
CODES = {
    "base 2": (lambda statistics, T: base2(statistics, asked(T)), lambda T: 2**T),
    "fitted": (lambda statistics, T: evolution(statistics, asked(T, 2)), lambda T: 2**T),
    "signed": (lambda statistics, T: evolution(statistics, asked(T, coding="phase_signed")), lambda T: 3**T),
    "rate": (lambda statistics, T: classic(statistics, asked(T, coding="rate")), lambda T: T + 1),
    "ttfs": (lambda statistics, T: classic(statistics, asked(T, coding="ttfs")), lambda T: T + 1),
    "two spikes": (
        lambda statistics, T: classic(statistics, asked(T, coding="few_spike", max_spikes=2)),
        lambda T: 1 + T + T * (T - 1) // 2,
    ),
}


@pytest.mark.parametrize("code", list(CODES))
@pytest.mark.parametrize("T", [4, 6])
def test_no_code_is_below_the_bound_of_its_own_levels(densities, code, T):
    find, most = CODES[code]
    fits = find(densities, T)
    for row in site_rows(densities, fits):
        levels = len(spelled_levels(fits[row["name"]].table, 0, most=3**T))
        assert levels <= most(T) if code == "signed" else levels == most(T)
        if row["lloyd_max"] is None:
            assert code == "signed"
            assert levels > 300
            continue
        assert row["relative_error"] >= row["lloyd_max"] * (1 - 1e-3)
        assert row["above_bound"] == pytest.approx(row["relative_error"] / row["lloyd_max"])
        # a unit Gaussian, 2 n levels on both sides: Max's table, and for many levels 2.72 / (2 n)^2 (Panter & Dite)
        if row["name"] == "gaussian" and levels in (16, 64):
            assert row["lloyd_max"] == pytest.approx({16: 0.002499, 64: 0.0001668}[levels], rel=0.03)


@pytest.mark.parametrize("T", [3, 4, 5, 6, 7, 8])
def test_base_2_on_a_uniform_density_is_as_far_above_the_bound_as_its_ends_are(densities, T):
    """Inner cells are the optimal ones. Zero has half a cell (1/2), the last level one and a half, off its middle (9/2): 2^T + 3."""
    uniform = {"uniform": densities["uniform"]}
    (row,) = site_rows(uniform, base2(uniform, asked(T)))
    assert row["above_bound"] == pytest.approx(1 + 3 / 2**T, rel=0.01)


def test_a_bound_that_the_histogram_cannot_tell_is_absent(densities):
    for T in (10, 12, 16):
        for row in site_rows(densities, base2(densities, asked(T))):
            assert row["lloyd_max"] is None
            assert row["above_bound"] is None


def test_two_sides_are_bounded_each_for_its_own_levels():
    silu = {"silu": observed(nn.functional.silu(3 * density("gaussian")), sides=2)}
    fits = evolution(silu, asked(4, 2))
    (row,) = site_rows(silu, fits)
    assert 0.9 * row["relative_error"] > row["lloyd_max"] > 0
    joined = {"silu": silu["silu"].merged()}
    (one_side,) = site_rows(joined, evolution(joined, asked(4, 2)))
    assert row["lloyd_max"] < one_side["lloyd_max"]


def test_a_bound_on_spikes_bounds_the_levels(densities):
    fit = classic(densities, asked(6, coding="ttfs"))["gaussian"]
    sent = site_levels(fit.table, 0, torch.linspace(0.001, 6, 4000))
    assert torch.allclose(sent, spelled_levels(fit.table, 0, most=99))
    assert len(sent) == 7


def test_digit_strings_of_one_value_are_one_level():
    """A rate code of equal weights has T + 1 sums, whichever steps fire; thresholds that fall let it fire late."""
    table = PhaseTable(theta=torch.tensor([[3.0, 0.1, 2.0]]), h=torch.ones(1, 3), d=torch.ones(1, 3), v0=torch.zeros(1))
    assert spelled_levels(table, 0, most=9).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert spelled_levels(table, 0, most=3) is None


def test_each_interval_has_the_levels_that_its_inputs_bring_about():
    """Steps of 1 from 0, of 4 from 6; the digits 1 1 of the inner table need x > 2.5, the 1 0 of it x > 1.5."""
    theta, d = torch.tensor([[2.0, 1.0], [0.0, 2.0]]), torch.tensor([[2.0, 1.0], [6.0, 4.0]])

    def table(cut: float) -> PhaseTable:
        return PhaseTable(theta, d, d, torch.tensor([0.5, 0.0]), digits=Digits(intervals=2), cuts=torch.tensor([[cut]]))

    for cut, wanted in ((4.0, [0, 1, 2, 3, 6, 10]), (2.5, [0, 1, 2, 6, 10]), (1.5, [0, 1, 6, 10]), (9.0, [0, 1, 2, 3, 10])):
        assert spelled_levels(table(cut), 0, most=9).tolist() == wanted
        assert site_levels(table(cut), 0, torch.linspace(0.001, 20, 40_000)).tolist() == wanted
    assert spelled_levels(table(4.0), 0, most=5) is None
    # beyond all inputs: not in use
    assert spelled_levels(table(torch.finfo(torch.float32).max), 0, most=9).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sides", [1, 2])
def test_the_levels_of_two_intervals_are_bounded_together(sides):
    """Twice as many levels to choose: the bound falls, and the code stays above it."""
    statistics = {"site": observed(density("exponential") * torch.tensor([1.0, -0.3]).repeat(500_000), sides=sides)}
    one = asked(3, coding="phase_signed")
    rows = []
    for options in (one, asked(3, coding="phase_signed", intervals=2)):
        fits = evolution(statistics, options)
        assert fits["site"].table.intervals.amax() == int(options.snn.intervals)
        rows += site_rows(statistics, fits)
    for row in rows:
        assert row["relative_error"] >= row["lloyd_max"] * (1 - 1e-3)
    assert rows[1]["lloyd_max"] < 0.6 * rows[0]["lloyd_max"]


@pytest.mark.parametrize("digits", [digits for digits in PARTITIONS if digits.intervals > 1], ids=str)
def test_levels_of_every_group_and_side_are_what_a_fine_sweep_sends(digits):
    """Of its own side, which is coded as |x|."""
    table = partitioned_table([3.0, 4.0], 3, digits)
    x = torch.linspace(0, 12, 1_000_001)[1:]
    for row in range(digits.sides * 2):
        side, group = divmod(row, 2)
        sent = encode((-x if side else x)[None, None], table.group(group), compiled=False).abs().unique()
        spelled = spelled_levels(table, row, most=999)
        assert len(spelled) == len(sent.mul(1e5).round().unique())
        assert torch.allclose(spelled.abs().sort().values, sent[sent.diff(prepend=sent[:1] - 1) > 1e-5], atol=1e-5)


def test_levels_of_base_2_are_its_multiples():
    statistics = {"site": observed(torch.rand(1000, generator=torch.Generator().manual_seed(0)))}
    table = base2(statistics, asked(3))["site"].table
    tau = statistics["site"].maximum.max()
    assert torch.allclose(site_levels(table, 0, torch.linspace(0.001, 2, 4000)), tau * torch.arange(8) / 8)


def test_damage_puts_neurons_where_it_says_and_takes_them_away(tmp_path, ids):
    model = tiny_model()
    reference = perplexity(model, ids, label="").value
    install(model, rotated=())
    from spikellm.calibration.calibrate import calibrate
    from spikellm.config.snn import PrefixConfig

    statistics = calibrate(model, ids, PrefixConfig(enabled=False)).statistics
    fits = evolution(statistics, asked(4, 2))
    by_kind, by_site = damage(
        model,
        {name: fit.table for name, fit in fits.items()},
        {name: fit.relative_error for name, fit in fits.items()},
        ids,
        compiled=False,
    )
    assert set(by_kind) == {"none", *(kind.name for kind in SiteKind)}
    assert by_kind["none"] == pytest.approx(reference, rel=1e-5)
    assert sum(value != by_kind["none"] for value in by_kind.values()) == len(SiteKind)
    assert len(by_site) == 10
    assert list(by_site.values()) == sorted(by_site.values(), reverse=True)
    assert all(get_neuron(model, site).transparent for site in model_sites(model))
    paths = write_density_plots(tmp_path, statistics, fits)
    assert len(paths) == len(SiteKind)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
