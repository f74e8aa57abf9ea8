"""Codes of several intervals: cuts by brute force, known distributions, and the laws that the search promises to keep."""

from itertools import combinations_with_replacement, product

import pytest
import torch

from spikellm.coding.codes import IntervalCodes, base2_codes
from spikellm.coding.neuron import BEYOND, PhaseNeuron, fire
from spikellm.config.checks import InputError
from spikellm.config.choices import Coding
from spikellm.config.snn import SpikingConfig
from spikellm.kernels.encode import Digits
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.search.intervals import best_chain, running_sums, totals
from spikellm.search.search import evolution, group_maxima
from tests.codes import asked, observed

T = 4


def normal(seed: int, count: int = 200_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def clusters(seed: int, count: int = 40000) -> torch.Tensor:
    """Uniform on [0, 1] and on [8, 9]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator) + 8 * (torch.rand(count, generator=generator) > 0.5)


DRAWS = {"normal": normal, "clusters": clusters, "heavy": lambda seed: normal(seed).pow(3)}


def error_of(fit: CodeFit, x: torch.Tensor) -> float:
    """Relative, by sending samples through neurons."""
    y = PhaseNeuron(fit.table, compiled=False)(x)
    return ((y - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_best_chain_is_the_one_that_trying_all_finds(K):
    generator = torch.Generator().manual_seed(K)
    N, M, edges = 5, 3, 6
    running = [torch.rand(2, N, M, edges, generator=generator).cumsum(-1) for _ in range(K)]
    for each in running:
        each -= each[..., :1].clone()
    members, cuts = best_chain([each[0] for each in running])
    found = totals(running, members, cuts)
    for n in range(N):
        least = torch.inf
        for chosen in product(range(M), repeat=K):
            for ends in combinations_with_replacement(range(edges), K - 1):
                stops = (0, *ends, edges - 1)
                cost = sum(
                    (
                        each[:, n, m, stop] - each[:, n, m, start]
                        for each, m, start, stop in zip(running, chosen, stops, stops[1:], strict=False)
                    ),
                    start=torch.zeros(2),
                )
                least = min(least, cost[0].item())
        assert found[0][n].item() == pytest.approx(least, rel=1e-5)


@pytest.fixture(scope="module")
def statistics():
    return {name: observed(draw(0)) for name, draw in DRAWS.items()}


@pytest.fixture(scope="module", params=["phase", "phase_signed"])
def by_intervals(request, statistics):
    return {K: evolution(statistics, asked(T, coding=request.param, intervals=K)) for K in (1, 2, 3)}


def test_intervals_lower_the_error_on_samples_that_no_part_has_seen(by_intervals):
    for name, draw in DRAWS.items():
        errors = [error_of(by_intervals[K][name], draw(1)) for K in (1, 2, 3)]
        assert errors[1] < 0.5 * errors[0]
        assert errors[2] < errors[1]
    # twice as many levels on the same range are four times as fine
    normals = [error_of(by_intervals[K]["normal"], normal(1)) for K in (1, 2)]
    assert normals[1] < 0.4 * normals[0]


def test_reported_errors_and_rates_are_those_of_neurons_on_samples(by_intervals):
    for name in ("normal", "clusters"):
        unseen = DRAWS[name](1)
        for fits in by_intervals.values():
            if name == "normal":  # steps of the clusters' codes come down to the histogram's bins
                assert fits[name].relative_error == pytest.approx(error_of(fits[name], unseen), rel=0.05)
            train = fire(unseen[None, None], fits[name].table)
            assert fits[name].mean_firing_rate * T == pytest.approx(train.ne(0).sum(0).float().mean().item(), rel=0.02)


def test_the_cut_falls_into_the_gap(by_intervals):
    fit = by_intervals[2]["clusters"]
    assert fit.cuts is not None
    assert 0.9 < fit.cuts.item() < 8.1
    assert fit.intervals.tolist() == [2]


def test_no_group_is_worse_off_than_with_fewer_intervals(statistics):
    """Whatever the objectives say, the choosing part decides; what is left over is silent."""
    site = statistics["normal"]
    good = IntervalCodes.single(base2_codes(group_maxima({"": site}), T))
    bad = IntervalCodes(codes=base2_codes(torch.full((2,), 0.1), T).at((slice(None), None)), cuts=torch.ones(1, 1))
    fit = CodeFit.assess(site, [(good, torch.ones(1)), (bad, torch.zeros(1))], fall_back=False)
    assert fit.intervals.tolist() == [1]
    assert fit.digits.intervals == 1
    # beside a group that uses both, the unused interval stays in the table and sends nothing
    both = observed(torch.cat([normal(0), 0.2 * normal(1)]).view(2, -1).T.reshape(-1), groups=1)
    assert both.counts.shape[1] == 1
    padded = good.padded(3)
    assert padded.cuts.tolist() == [[BEYOND], [BEYOND]]
    train = fire(1e30 * normal(2)[None, None], padded.table(Digits())).unflatten(0, (T, 3))
    assert not train[:, 1:].any()
    assert torch.equal(train[:, 0], fire(1e30 * normal(2)[None, None], good.table(Digits())))


def test_auto_takes_the_fewest_within_the_tolerance(statistics):
    normal = {"normal": statistics["normal"]}
    relative = {K: evolution(normal, asked(T, intervals=K))["normal"].relative_error for K in (1, 2)}
    between = (relative[1] * relative[2]) ** 0.5
    for options, wanted in (
        ({"tolerance": 0.0}, 3),
        ({"tolerance": 1e9}, 1),
        ({"sufficient_error": between}, 2),
        ({"sufficient_error": 1.0}, 1),
    ):
        fits = evolution(normal, asked(T, intervals="auto", **options))
        assert fits["normal"].intervals.tolist() == [wanted]


def test_a_weight_on_spikes_buys_fewer_of_them(statistics):
    fits = [evolution(statistics, asked(T, coding="phase_signed", intervals=2, spike_weight=weight)) for weight in (0.0, 2.0, 4.0)]
    for name in DRAWS:
        rates, errors = ([getattr(each[name], what) for each in fits] for what in ("mean_firing_rate", "relative_error"))
        assert rates == sorted(rates, reverse=True)
        if name != "heavy":  # the tail that errors are reported on is another one
            assert errors == sorted(errors)


def test_codes_are_read_back_as_they_were_written(by_intervals, tmp_path):
    path = tmp_path / "codes.safetensors"
    save_fits(path, by_intervals[3])
    for name, fit in load_fits(path).items():
        before = by_intervals[3][name]
        assert fit.digits == before.digits
        for mine, theirs in zip((*fit.table.rows, fit.cuts), (*before.table.rows, before.cuts), strict=True):
            assert torch.equal(mine, theirs)


def test_two_sides_may_be_cut_and_signed():
    x = torch.nn.functional.silu(2 * normal(0))
    errors = {}
    for sides in (1, 2):
        fit = evolution({"site": observed(x, sides=sides)}, asked(T, coding="phase_signed", intervals=2))["site"]
        assert fit.digits == Digits(signed=True, sides=sides, intervals=2)
        errors[sides] = error_of(fit, torch.nn.functional.silu(2 * normal(1)))
    assert errors[2] < 0.85 * errors[1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"intervals": "0"}, "snn.intervals=0: takes 1 to"),
        ({"intervals": "two"}, "snn.intervals=two"),
        ({"intervals": "2", "coding": Coding.rate}, "intervals are of phase codes"),
        ({"intervals": "3", "coding": Coding.ttfs}, "intervals are of phase codes"),
    ],
)
def test_what_no_code_has_is_refused(options, complaint):
    with pytest.raises((InputError, ValueError), match=complaint):
        SpikingConfig(T=4, grain="1", **options)


def test_a_tables_error_far_from_its_interval_hides_nothing_inside():
    """Running sums are taken apart again: in float32 1e8 swallows what comes behind it."""
    errors = torch.tensor([1e8, 1e-3, 2e-3, 1e8, 5e-4])
    running = running_sums(errors)
    assert running.diff().tolist() == pytest.approx(errors.tolist(), rel=1e-4)
