"""The search on distributions whose best codes are known, and the laws that it promises to keep."""

from dataclasses import replace

import pytest
import torch

from spikellm.calibration.calibrate import calibrate
from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.coding.codes import FIXED, IntervalCodes, base2_codes
from spikellm.coding.grains import assignments
from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.labels import SiteKind
from spikellm.config.snn import PrefixConfig
from spikellm.kernels.encode import encode_plain
from spikellm.model.conversion import clear, get_neuron, install, model_sites, place
from spikellm.model.sites import Site, sites
from spikellm.search.evolution import first_population
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.search.methods import search_summary
from spikellm.search.search import base2, evolution, group_maxima
from spikellm.search.traditional import classic
from tests.codes import asked
from tests.models import tiny_model

T = 4


def observe(fit: torch.Tensor, choose: torch.Tensor | None = None, report: torch.Tensor | None = None) -> SiteStatistics:
    observer = Observer("some.site")
    for part, x in ((FIT, fit), (CHOOSE, fit if choose is None else choose), (REPORT, fit if report is None else report)):
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
    return {name: observe(draw(0), draw(1), draw(2)) for name, draw in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def by_grains(statistics):
    return {G: evolution(statistics, asked(T, G)) for G in (1, 2)}


def relative_error(x: torch.Tensor, table) -> float:
    """By sending samples through neurons, not by histograms."""
    y = encode_plain(x.view(1, 1, -1), table.rows, table.digits).flatten()
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
    unseen = DISTRIBUTIONS[name](2)
    for fits in (*by_grains.values(), base2(statistics, asked(T))):
        fit = fits[name]
        assert fit.relative_error == pytest.approx(relative_error(unseen, fit.table), rel=0.05)


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_fits_stand_between_the_best_quantiser_and_base_2(by_grains, name):
    bound = lloyd_max(DISTRIBUTIONS[name](2), 2**T)
    for fits in by_grains.values():
        fit = fits[name]
        assert 0.95 * bound <= fit.relative_error <= 1.02 * fit.relative_error_base2
    if name != "uniform":  # base 2 is all but optimal there
        assert by_grains[2][name].relative_error < 0.7 * by_grains[2][name].relative_error_base2
    if name != "heavy":  # its tail spans more octaves than four phases have bases for
        assert by_grains[2][name].relative_error < 2.5 * bound


def two_clusters(seed: int) -> torch.Tensor:
    """Uniform on [0, 1] and on [8, 9]: one base for the step between them, another inside."""
    return uniform(seed) + 8 * (normal(seed + 50) > 0.5)


def test_more_grains_pay_where_the_density_has_two_scales(by_grains):
    """On samples that no part of the statistics has seen; on smooth densities four phases gain nothing, and lose next to nothing."""
    for name, draw in DISTRIBUTIONS.items():
        one, two = (relative_error(draw(3), by_grains[G][name].table) for G in (1, 2))
        assert two <= 1.01 * one, name
    site = {"site": observe(*(two_clusters(seed) for seed in range(3)))}
    one, two = (relative_error(two_clusters(3), evolution(site, asked(T, G))["site"].table) for G in (1, 2))
    assert two < 0.6 * one


def test_the_same_seed_gives_the_same_codes(statistics, by_grains):
    again = evolution(statistics, asked(T, 1))
    for name, fit in again.items():
        assert torch.equal(fit.table.d, by_grains[1][name].table.d)
        assert torch.equal(fit.table.theta, by_grains[1][name].table.theta)


def test_auto_takes_the_coarsest_grain_within_the_tolerance():
    sites = {"clusters": observe(*(two_clusters(seed) for seed in range(3))), "normal": observe(normal(0), normal(1), normal(2))}
    grains = {}
    for tolerance in (0.0, 0.05, 1e9):
        fits = evolution(sites, asked(T, None, tolerance=tolerance))
        grains[tolerance] = [fits[name].grain.item() for name in sites]
    assert grains[0.0][0] == grains[0.05][0] == 2  # 0.42 of the error of one grain
    assert grains[0.05][1] == 1  # 0.9995
    assert grains[1e9] == [1, 1]


def test_unseen_data_decides_between_grains():
    """Whatever the objectives say: of two codes the one with the larger error on the choosing part is not taken."""
    site = observe(normal(0), normal(1), normal(2))
    good, bad = base2_codes(group_maxima({"": site}), T), base2_codes(torch.full((1,), 0.1), T)
    for rounds, tolerance, wanted in (([good, bad], 0.0, 0), ([bad, good], 0.0, 1), ([bad, good], 1e9, 0)):
        scored = [(IntervalCodes.single(code), torch.tensor([1.0 - number])) for number, code in enumerate(rounds)]
        fit = CodeFit.assess(site, scored, tolerance=tolerance, fall_back=False)
        assert torch.equal(fit.tau, rounds[wanted].tau)
        assert fit.objective.item() == 1.0 - wanted


def test_silent_constant_and_outlier_sites():
    sites = {
        "silent": observe(torch.zeros(1000)),
        "constant": observe(torch.full((1000,), 3.0)),
        "outlier": observe(torch.cat([normal(0), torch.tensor([1e4])])),
        "tiny": observe(normal(0) * 1e-6),
        "one_value": observe(torch.tensor([2.5])),
    }
    for name, fit in evolution(sites, asked(T, 2)).items():
        assert all(torch.isfinite(part).all() for part in (fit.theta, fit.h, fit.d, fit.v0)), name
        assert fit.relative_error <= fit.relative_error_base2, name
    silent = evolution({"silent": sites["silent"]}, asked(T, 1))["silent"]
    assert silent.relative_error == 0
    assert silent.firing_rate.item() == 0


def test_the_second_part_decides_and_the_third_does_not():
    """A fitting part from another world: base 2 stays where the choosing part shows it, and only there."""
    small, wide = normal(0) * 0.01, uniform(1)
    kept = evolution({"site": observe(small, wide, small)}, asked(T, 1))["site"]
    assert kept.fallback.all()
    assert not kept.worse_than_base2
    taken = evolution({"site": observe(torch.cat([small, torch.ones(1)]), small, wide)}, asked(T, 1))["site"]
    assert not taken.fallback.any()
    assert taken.relative_error > 2 * taken.relative_error_base2
    assert search_summary({"kept": kept, "taken": taken}).worse_than_base2 == 1


def test_no_code_knows_the_largest_activation_of_the_reporting_part():
    """An outlier there is clipped, as it would be in use, and its error is reported."""
    site = observe(normal(0), normal(1), torch.cat([normal(2), torch.tensor([100.0])]))
    known = site.maximum[:REPORT].max().item()
    baseline = base2({"site": site}, asked(8))["site"]
    assert baseline.tau.item() == pytest.approx(known)
    lost = (100 - known) ** 2 / (len(normal(2)) + 100**2)
    assert baseline.relative_error == pytest.approx(lost, rel=0.02)
    traditional = classic({"site": site}, asked(8, coding="rate"))["site"]
    for fit in (traditional, evolution({"site": site}, asked(8, 1))["site"]):
        assert fit.d.sum() < 1.3 * known
        assert fit.relative_error > 0.5 * lost
    assert group_maxima({"site": site}).item() == known  # tau of the published search


def softmax_rows(seed: int) -> torch.Tensor:
    """Probabilities of 64 queries over 1000 keys each."""
    return (2.5 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(seed))).softmax(-1)[None, None]


@pytest.fixture(scope="module")
def summed() -> SiteStatistics:
    observer = Observer("softmax", held=True, summed=True)
    for part in (FIT, CHOOSE, REPORT):
        observer.part = part
        observer(softmax_rows(part))
        observer.weigh(None, torch.ones(1, 1, 64, 1000, dtype=torch.bool))
    return observer.result()


FINDERS = {
    "search": lambda site: evolution({"site": site}, asked(6, 1)),
    "few_spike": lambda site: classic({"site": site}, asked(6, coding="few_spike", max_spikes=2)),
}


@pytest.mark.parametrize("finder", list(FINDERS))
def test_sums_of_coded_probabilities_stay_near_one(summed, finder):
    """The errors of a row add up: the mean error counts a thousand times, as METHOD's prototype had it (T = 6: 42.5 to 22.0 perplexity)."""
    assert summed.row_neurons == 1000
    off, errors = [], []
    for site in (summed, replace(summed, row_neurons=None)):
        fit = FINDERS[finder](site)["site"]
        coded = PhaseNeuron(fit.table, compiled=False)(softmax_rows(9))
        off.append((coded.sum(-1) - 1).square().mean().sqrt().item())
        errors.append(fit.relative_error)
    assert off[0] < 0.3 * off[1]
    assert errors[0] > errors[1]  # what it costs


def test_the_cost_is_the_squared_error_of_the_rows_sums(summed):
    """S mse + S^2 bias^2 of a row, against rows: what the search takes to be the cost of a site."""
    fit = FINDERS["search"](summed)["site"]
    x = softmax_rows(REPORT)
    off = PhaseNeuron(fit.table, compiled=False)(x) - x
    power = x.square().sum()
    wanted = (off.square().sum() + 1000 * off.numel() * off.mean().square()) / power
    assert (fit.cost / fit.power).item() == pytest.approx(wanted.item(), rel=0.05)
    assert not fit.worse_than_base2
    plain = FINDERS["search"](replace(summed, row_neurons=None))["site"]
    assert torch.equal(plain.cost, plain.error)


# 66, 36 and 36 assignments, more than the 32 members of most searches; 6 at T = 8.
@pytest.mark.parametrize(("steps", "min_length", "count"), [(16, 2, 66), (13, 2, 36), (10, 1, 36), (8, 2, 6)])
def test_every_assignment_starts_at_the_optimum_of_fewer_grains(steps, min_length, count):
    options = assignments(steps, 3, min_length=min_length)
    assert len(options) == count
    previous = base2_codes(torch.ones(2), steps)
    previous = replace(previous, values=torch.cat([previous.values[:, :FIXED], torch.full((2, 3), 3.0)], 1))
    population = first_population(previous, torch.ones(2), options, torch.Generator().manual_seed(0), signed=False)
    near = (population.values[0, :, FIXED:] - 3).abs().amax(-1) < 0.5  # random members lie around 1
    assert len({tuple(row) for row in population.assignment[0, near].tolist()}) == count


def test_spikes_that_reach_one_synapse_cost_nothing():
    options = asked(T, spike_weight=1.5)
    names = [site.name for site in sites(2)]
    assert [name for name in names if not options.spike_price(name)] == [
        f"layers.{layer}.{kind}" for layer in range(2) for kind in ("value", "activation")
    ]
    assert options.spike_price("some.site") == 1.5 * 2.0 ** -((4 * T + 11) / 3)


def test_a_site_is_known_by_its_name():
    assert [Site.of(site.name) for site in sites(12)] == list(sites(12))
    for wrong in ("some.site", "layers.softmax", "layers.1.head_input", "softmax", "model.layers.1.softmax", "layers.01.softmax", ""):
        assert Site.of(wrong) is None


def test_too_many_grains_are_refused(statistics):
    with pytest.raises(ValueError, match="T=4"):
        evolution(statistics, asked(4, 3))


def test_codes_round_trip_through_a_file(by_grains, tmp_path):
    save_fits(tmp_path / "codes.safetensors", by_grains[2])
    again = load_fits(tmp_path / "codes.safetensors")
    assert set(again) == set(by_grains[2])
    for name, fit in again.items():
        assert torch.equal(fit.table.theta, by_grains[2][name].table.theta)
        assert torch.equal(fit.assignment, by_grains[2][name].assignment)


def test_rows_of_a_models_attention_stay_near_one():
    """Calibrated, searched and placed: `snn.softmax_norm=before` codes probabilities whose sums change less."""
    model = tiny_model(num_hidden_layers=1)
    install(model, rotated=(), normalise_after=False)
    windows = torch.randint(2, 256, (6, 256), generator=torch.Generator().manual_seed(0))
    (site,) = (site for site in model_sites(model) if site.kind is SiteKind.softmax)
    found = calibrate(model, windows[:4], PrefixConfig(enabled=False)).statistics[site.name]
    off: dict[str, list[float]] = {"aware": [], "plain": []}
    for name, statistics in {"aware": found, "plain": replace(found, row_neurons=None)}.items():
        clear(model)
        place(model, site, evolution({"": statistics}, asked(5, 1))[""].table, compiled=False)
        get_neuron(model, site).register_forward_hook(
            lambda _module, inputs, coded, name=name: off[name].append((coded - inputs[0]).sum(-1).abs().mean().item())
        )
        model(windows[4:])
    assert sum(off["aware"]) < 0.6 * sum(off["plain"])
