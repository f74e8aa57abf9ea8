"""The search on distributions whose best codes are known, and the laws that it promises to keep."""

import pytest
import torch

from spikellm.code_fit import load_fits, save_fits
from spikellm.neuron import encode_plain
from spikellm.search import base2_search, search
from spikellm.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics

T = 4


def observe(fit: torch.Tensor, held_out: torch.Tensor | None = None) -> SiteStatistics:
    observer = Observer("some.site")
    for part, x in ((FIT, fit), (HELD_OUT, fit if held_out is None else held_out)):
        observer.part = part
        observer(x.view(1, -1, 1))
    return observer.result()


def normal(seed: int, count: int = 20000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int) -> torch.Tensor:
    return torch.rand(20000, generator=torch.Generator().manual_seed(seed))


def laplace(seed: int) -> torch.Tensor:
    return -uniform(seed).clamp_min(1e-7).log()


DISTRIBUTIONS = {"uniform": uniform, "normal": normal, "laplace": laplace, "heavy": lambda seed: normal(seed).pow(3)}


@pytest.fixture(scope="module")
def statistics() -> dict[str, SiteStatistics]:
    return {name: observe(draw(0), draw(1)) for name, draw in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def by_grains(statistics):
    return {G: search(statistics, T=T, G=G, seed=0, compiled=False) for G in (1, 2)}


def relative_error(x: torch.Tensor, table) -> float:
    """By sending samples through neurons, not by histograms."""
    y = encode_plain(x.view(1, 1, -1), table.theta, table.h, table.d, table.v0).flatten()
    return ((y - x).square().sum() / x.square().sum()).item()


def lloyd_max(x: torch.Tensor, levels: int) -> float:
    """Relative error of the best scalar quantiser with that many levels, by Lloyd's iteration in float64."""
    x = x.abs().double().sort().values
    centers = x[(torch.arange(levels) + 0.5).mul(len(x) / levels).long()]
    for _ in range(300):
        cell = torch.bucketize(x, (centers[1:] + centers[:-1]) / 2)
        total = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, x)
        count = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, torch.ones_like(x))
        centers = torch.where(count > 0, total / count.clamp_min(1), centers).sort().values
    nearest = centers[torch.bucketize(x, (centers[1:] + centers[:-1]) / 2)]
    return ((nearest - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_reported_errors_are_those_of_neurons_on_samples(by_grains, statistics, name):
    held_out = DISTRIBUTIONS[name](1)
    for fits in (*by_grains.values(), base2_search(statistics, T)):
        fit = fits[name]
        assert fit.relative_error == pytest.approx(relative_error(held_out, fit.table), rel=0.05)


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_fits_stand_between_the_best_quantiser_and_base_2(by_grains, name):
    bound = lloyd_max(DISTRIBUTIONS[name](1), 2**T)
    for fits in by_grains.values():
        fit = fits[name]
        assert 0.95 * bound <= fit.relative_error <= fit.relative_error_base2
    if name != "uniform":  # base 2 is all but optimal there
        assert by_grains[2][name].relative_error < 0.7 * by_grains[2][name].relative_error_base2
    if name != "heavy":  # its tail spans more octaves than four phases have bases for
        assert by_grains[2][name].relative_error < 2.5 * bound


def test_more_grains_are_never_worse_on_the_objective(by_grains):
    for name in DISTRIBUTIONS:
        assert (by_grains[2][name].objective <= by_grains[1][name].objective).all()


def test_the_same_seed_gives_the_same_codes(statistics, by_grains):
    again = search(statistics, T=T, G=1, seed=0, compiled=False)
    for name, fit in again.items():
        assert torch.equal(fit.table.d, by_grains[1][name].table.d)
        assert torch.equal(fit.table.theta, by_grains[1][name].table.theta)


def test_auto_takes_the_coarsest_grain_within_the_tolerance(statistics, by_grains):
    strict = search(statistics, T=T, G=None, seed=0, tolerance=0.0, compiled=False)
    lax = search(statistics, T=T, G=None, seed=0, tolerance=1e9, compiled=False)
    middle = search(statistics, T=T, G=None, seed=0, tolerance=0.05, compiled=False)
    for name in DISTRIBUTIONS:
        assert lax[name].grain.tolist() == [1]
        assert strict[name].objective <= min(by_grains[1][name].objective, by_grains[2][name].objective)
        assert middle[name].objective <= 1.05 * strict[name].objective
        assert middle[name].grain.item() in (1, 2)


def test_silent_constant_and_outlier_sites():
    sites = {
        "silent": observe(torch.zeros(1000)),
        "constant": observe(torch.full((1000,), 3.0)),
        "outlier": observe(torch.cat([normal(0), torch.tensor([1e4])])),
        "tiny": observe(normal(0) * 1e-6),
        "one_value": observe(torch.tensor([2.5])),
    }
    for name, fit in search(sites, T=T, G=2, seed=0, compiled=False).items():
        assert all(torch.isfinite(part).all() for part in (fit.theta, fit.h, fit.d, fit.v0)), name
        assert fit.relative_error <= fit.relative_error_base2, name
    silent = search({"silent": sites["silent"]}, T=T, G=1, seed=0, compiled=False)["silent"]
    assert silent.relative_error == 0
    assert silent.firing_rate.item() == 0


def test_held_out_data_decides():
    """A fitting part from another world: the found codes lose on held-out data and base 2 stays."""
    site = observe(normal(0) * 0.01, uniform(1) * 4)
    fit = search({"site": site}, T=T, G=1, seed=0, compiled=False)["site"]
    assert fit.fallback.all()
    assert fit.relative_error <= fit.relative_error_base2


def test_too_many_grains_are_refused(statistics):
    with pytest.raises(ValueError, match="T=4"):
        search(statistics, T=4, G=3, seed=0)


def test_codes_round_trip_through_a_file(by_grains, tmp_path):
    save_fits(tmp_path / "codes.safetensors", by_grains[2])
    again = load_fits(tmp_path / "codes.safetensors")
    assert set(again) == set(by_grains[2])
    for name, fit in again.items():
        assert torch.equal(fit.table.theta, by_grains[2][name].table.theta)
        assert torch.equal(fit.assignment, by_grains[2][name].assignment)
