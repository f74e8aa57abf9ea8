"""Groups that lend each other codes: what scales with the activations and what does not, and that little is lost by it."""

import pytest
import torch

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.kernels.encode import Digits
from spikellm.search import exchange
from spikellm.search.exchange import Shapes, lend
from spikellm.search.points import table_sums
from spikellm.search.search import evolution, objective_of
from tests.codes import asked, observed

T = 4


def draws(kind: int, seed: int, count: int = 20000) -> torch.Tensor:
    """A normal, a Laplace, a uniform, a heavy-tailed sample."""
    generator = torch.Generator().manual_seed(100 * kind + seed)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    return (normal, -uniform.clamp_min(1e-7).log(), uniform, normal.pow(3))[kind % 4]


def sites(count: int) -> dict[str, SiteStatistics]:
    """As many distributions, of four shapes and many scales."""
    return {f"site {number}": observed(10 ** (number / count) * draws(number, number)) for number in range(count)}


def test_shapes_know_no_scale_and_tell_distributions_apart():
    shapes = Shapes.of(objective_of(sites(8), asked(T), 1))
    distance = torch.cdist(shapes.features, shapes.features)
    same = torch.eye(4).bool().repeat(2, 2)
    assert distance[same].max() < 0.5 * distance[~same].min()
    near, larger = shapes.nearest(torch.arange(8))
    assert near[:, :2].sort(1).values.tolist() == [[number % 4, number % 4 + 4] for number in range(8)]
    scales = torch.arange(8) / 8 * torch.tensor(10.0).log()
    pair = torch.tensor([4, 5, 6])  # the heavy tail's size is its few largest
    assert larger[pair, 1].tolist() == pytest.approx((scales[pair] - scales[pair - 4]).tolist(), abs=0.05)


def test_every_group_is_near_a_representative(monkeypatch):
    monkeypatch.setattr(exchange, "REPRESENTATIVES", 4)
    shapes = Shapes.of(objective_of(sites(12), asked(T), 1))
    assert sorted((shapes.representatives() % 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("coding", ["phase", "phase_signed"])
def test_a_lent_code_makes_the_same_relative_error_of_a_scaled_distribution(coding):
    x = draws(1, 0)
    statistics = {"one": observed(x), "eight": observed(8 * x)}
    own = evolution(statistics, asked(T, 2, coding=coding))["one"]
    objective = objective_of(statistics, asked(T, coding=coding), 1)
    shapes = Shapes.of(objective)
    bases = [base.log2()[0] for base in (own.base_d, own.base_h, own.base_theta)]
    values = torch.cat([own.tau.log(), own.v0 / own.tau * 2 ** (T + 1), own.rho.log2(), *bases])
    codes = exchange.Codes(values=values[None], assignment=own.assignment)
    near, larger = shapes.nearest(torch.tensor([0]))
    lent = lend(codes, near, larger, torch.Generator().manual_seed(0))
    found = objective(lent)[:, 0]
    assert found[1].item() == pytest.approx(found[0].item(), rel=0.02)  # bins of the two histograms lie elsewhere
    table = PhaseTable(*lent.at((1, slice(0, 1))).spell(), digits=own.digits)
    scaled, plain = PhaseNeuron(table, compiled=False)(8 * x), PhaseNeuron(own.table, compiled=False)(x)
    assert (scaled / 8 - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize(("intervals", "excess"), [(1, 0.02), (2, 0.06)])
def test_what_is_lent_is_about_as_good_as_what_each_would_find(monkeypatch, intervals, excess):
    """Against a search of every group from nothing: with a quarter as many, which is far fewer than real searches have."""
    statistics = sites(24)
    options = asked(T, 2, coding="phase_signed", intervals=intervals)
    alone = evolution(statistics, options)
    monkeypatch.setattr(exchange, "REPRESENTATIVES", 6)
    together = evolution(statistics, options)
    ratio = torch.tensor([together[name].objective.item() / fit.objective.item() for name, fit in alone.items()])
    assert ratio.max() < 1.2
    assert ratio.log().mean() < excess


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_of_tables_are_those_of_neurons(compiled, count):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1000, generator=generator) * 3
    weight, share = torch.rand(2, count, 1000, generator=generator)

    def table(K: int) -> PhaseTable:
        rows = (torch.rand(K * count, T, generator=generator) for _ in range(3))
        cuts = torch.rand(K - 1, count, generator=generator).mul(3).sort(0).values if K > 1 else None
        return PhaseTable(*rows, torch.rand(K * count, generator=generator), digits=Digits(signed=True, intervals=K), cuts=cuts)

    tables = [table(K) for K in (1, 3, 2)]
    error, off, _ = table_sums(x, weight, share, tables, compiled=compiled)
    for number, each in enumerate(tables):
        y = PhaseNeuron(each, axis=0, compiled=False)(x)
        assert torch.allclose(error[number], (weight * (y - x).square()).sum(1), rtol=1e-4)
        assert torch.allclose(off[number], (weight * (y - x)).sum(1), rtol=1e-3, atol=1e-3)
