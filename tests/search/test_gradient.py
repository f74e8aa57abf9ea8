"""The published search: surrogate derivative, samples, steps, what is returned."""

import math

import pytest
import torch

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer
from spikellm.coding.neuron import PhaseTable, encode
from spikellm.kernels.encode import Rows
from spikellm.search.gradient import BATCH, SurrogateSpike, descend_grains, differentiable_encode, draw_samples
from spikellm.search.search import gradient
from tests.codes import asked
from tests.configure import configure

QUICK = {"gradient_outer": 4, "gradient_inner": 10, "gradient_samples": 2000, "gradient_rate": 1e-3}


def laplacian(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape).exponential_(generator=generator)


def statistics(x: torch.Tensor, *, importance: torch.Tensor | None = None):
    """One site, the same values in both parts."""
    observer = Observer("site", held=importance is not None)
    for part in (FIT, CHOOSE, REPORT):
        observer.part = part
        observer(x)
        if importance is not None:
            observer.weigh(importance)
    return observer.result()


def reference(x: float, tau: float, bases: torch.Tensor, assignment: list[int]) -> float:
    """The neuron of METHOD's definition in plain numbers; bases [3, G] of d, h, theta."""
    T, y = len(assignment), 0.0
    v = x + tau * 2.0**-T / 2
    for t, grain in enumerate(assignment):
        d, h, theta = (tau * float(row[grain]) ** -(t + 1) for row in bases)
        if v > theta:
            v, y = v - h, y + d
    return y


def test_the_spike_is_a_step_with_the_derivative_of_a_sigmoid():
    u = torch.tensor([-0.3, 0.0, 0.1, 2.0], requires_grad=True)
    spikes = SurrogateSpike.apply(u, 10.0)
    spikes.backward(torch.tensor([1.0, 1.0, 2.0, 1.0]))
    assert spikes.tolist() == [0.0, 0.0, 1.0, 1.0]
    smooth = [math.exp(-10 * value) / (1 + math.exp(-10 * value)) ** 2 * 10 for value in u.tolist()]
    torch.testing.assert_close(u.grad, torch.tensor(smooth) * torch.tensor([1.0, 1.0, 2.0, 1.0]))


def test_the_differentiable_neuron_is_the_neuron():
    x = torch.rand(1, 1, 500, generator=torch.Generator().manual_seed(0))
    theta, h, d = (torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    rows = Rows(theta, h, d, torch.tensor([[0.0, 0.01, 0.1]]))
    y = differentiable_encode(x, rows)
    table = PhaseTable(*rows.at(0))
    wanted = encode(x.expand(1, 3, 500).contiguous(), table, compiled=False)
    torch.testing.assert_close(y, wanted)


def test_samples_follow_the_histogram():
    values = laplacian(0, 1, 50_000)
    site = statistics(torch.cat([values, torch.zeros(1, 50_000)], 1))  # zeros are left out
    drawn = draw_samples(site, 0, 50_000, torch.Generator().manual_seed(0))
    levels = torch.linspace(0.01, 0.99, 25)
    assert (torch.quantile(drawn, levels) / torch.quantile(values[0], levels) - 1).abs().max() < 0.04
    assert drawn.max() <= site.edges[-1]
    assert torch.equal(drawn, draw_samples(site, 0, 50_000, torch.Generator().manual_seed(0)))


def test_samples_follow_the_importance():
    values = torch.tensor([[1.0, 8.0]]).repeat(1, 50)
    site = statistics(values, importance=torch.tensor([[3.0, 1.0]]).repeat(1, 50))
    drawn = draw_samples(site, 0, 4000, torch.Generator().manual_seed(0))
    assert (drawn < 2).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert not draw_samples(statistics(torch.zeros(1, 4)), 0, 3, torch.Generator()).any()


# T = 2 leaves much to gain; several grains at T = 4 a little
@pytest.mark.parametrize(("T", "G", "rate", "gain"), [(2, 1, 1e-2, 0.9), (4, 2, 1e-3, 1.0)])
def test_few_steps_gain_and_the_objective_is_that_of_the_codes(T, G, rate, gain):
    samples = laplacian(1, 2, 1000) * torch.tensor([[1.0], [30.0]])
    maximum = samples.amax(1)
    quick = asked(T, G, gradient_outer=6, gradient_inner=20, gradient_samples=1000, gradient_rate=rate)
    codes, found = descend_grains(samples, maximum, quick, G=G)
    torch.testing.assert_close(codes.tau, maximum)
    for site in range(2):
        tau, x = maximum[site].item(), samples[site].tolist()
        bases = torch.stack([part[site].exp2() for part in codes.bases()])
        power = sum(value**2 for value in x)

        def error(bases: torch.Tensor, site: int = site, tau: float = tau, x: list[float] = x, power: float = power) -> float:
            return sum((reference(value, tau, bases, codes.assignment[site].tolist()) - value) ** 2 for value in x) / power

        assert error(bases) == pytest.approx(found[site].item(), rel=2e-3)
        assert found[site] < gain * error(torch.full((3, G), 2.0))


def test_never_worse_than_the_start_even_where_every_step_hurts():
    samples = torch.rand(1, 2000, generator=torch.Generator().manual_seed(0))
    maximum = torch.ones(1)
    wild = asked(6, gradient_outer=1, gradient_inner=3, gradient_samples=2000, gradient_rate=0.3)
    codes, found = descend_grains(samples, maximum, wild, G=1)
    assert torch.equal(codes.values[:, 2:], torch.tensor([[0.0, 1.0, 1.0, 1.0]]))  # base 2
    power = samples.square().sum().item()
    base2 = sum((reference(value, 1.0, torch.full((3, 1), 2.0), [0] * 6) - value) ** 2 for value in samples[0].tolist())
    assert found.item() == pytest.approx(base2 / power, rel=1e-4)


def test_sites_of_a_batch_do_not_feel_each_other(monkeypatch):
    samples = laplacian(2, 3, 400)
    options = asked(5, 2, seed=3, **QUICK)
    together = descend_grains(samples, samples.amax(1), options, G=2)
    monkeypatch.setitem(BATCH, "cpu", 1)
    rounds: list[int] = []
    apart = descend_grains(samples, samples.amax(1), options, G=2, progress=rounds.append)
    assert rounds == [1] * 3 * QUICK["gradient_outer"]
    assert torch.equal(together[0].assignment, apart[0].assignment)
    torch.testing.assert_close(together[0].values, apart[0].values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("G", [2, None])
def test_the_search_returns_fits(G):
    sites = {"dense": statistics(laplacian(3, 1, 20_000)), "silent": statistics(torch.zeros(1, 10))}
    fits = gradient(sites, asked(4, G, gradient_outer=2, gradient_inner=5, gradient_samples=500))
    assert fits.keys() == sites.keys()
    assert fits["silent"].relative_error == 0
    for fit in fits.values():
        assert fit.relative_error <= fit.relative_error_base2
        assert torch.isfinite(fit.theta).all()
        assert fit.base_d.shape == (1, 2)
    with pytest.raises(ValueError, match="cannot be cut"):
        descend_grains(torch.ones(1, 10), torch.ones(1), asked(4, **QUICK), G=3)


def test_it_is_an_option_of_the_command_line(tmp_path):
    from spikellm.run.stages import run_stages

    arguments = ["gradient_outer=1", "gradient_inner=1", "gradient_samples=50", "groups=site", "method=gradient"]
    small = ["model=tiny", "dataset.calibration.window=64", "dataset.calibration.max_windows=2"]
    config = configure(*small, "snn.T=4", "stages=[search]", f"output_root={tmp_path}", *(f"search.{option}" for option in arguments))
    found = run_stages(config)
    results, rows = found.results, found.tables["sites.csv"]
    # four steps are not many: on data that decided nothing some codes are worse
    assert results.search.worse_than_base2 == sum(row["relative_error"] > row["relative_error_base2"] for row in rows)
    assert len(rows) == results.search.groups
