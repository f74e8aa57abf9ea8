"""Rate, TTFS and few-spike codes: their levels in closed form, and a fit that no other amplitude beats."""

from itertools import combinations

import pytest
import torch

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.coding.grains import uniform_rows
from spikellm.coding.neuron import PhaseTable, encode, fire
from spikellm.config.choices import Coding
from spikellm.kernels.encode import Digits
from spikellm.search.fit import load_fits, save_fits
from spikellm.search.traditional import classic, variants
from tests.codes import asked, base2_table

T = 6


def table(coding: Coding, option: dict[str, float], *, max_spikes: int | None = None) -> PhaseTable:
    """With 1 as the largest output (of base 2: the amplitude)."""
    rows = uniform_rows(torch.tensor([option["first"]]), T, base=option["base"], ratio=option["ratio"], v0=option["v0"])
    return PhaseTable(*rows, digits=asked(T, coding=coding.value, max_spikes=max_spikes).digits)


X = torch.linspace(-1.2, 1.2, 4801).view(1, 1, -1)


def nearest(levels: torch.Tensor) -> torch.Tensor:
    """The level nearest to |X|, with X's sign."""
    index = (X.abs().view(-1, 1) - levels.view(1, -1)).abs().argmin(1)
    return (levels[index] * X.view(-1).sign()).view(X.shape)


def test_rate_coding_rounds_to_the_nearest_count():
    code = table(Coding.rate, variants(Coding.rate, T)[0])
    y = encode(X, code, compiled=False)
    wanted = nearest(torch.arange(T + 1) / T)
    assert ((y - X).abs() <= (wanted - X).abs() + 1e-6).all()
    spikes = fire(X, code).abs().sum(0)
    assert torch.allclose(spikes / T, y.abs(), atol=1e-6)  # the number of spikes is the value
    assert ((fire(X, code)[1:] != 0) <= (fire(X, code)[:-1] != 0)).all()  # and they come first


@pytest.mark.parametrize("option", variants(Coding.ttfs, T), ids=lambda option: str(option["base"]))
def test_ttfs_sends_one_spike_at_the_time_of_the_nearest_level(option):
    code = table(Coding.ttfs, option)
    assert fire(X, code).abs().sum(0).max() == 1
    y = encode(X, code, compiled=False)
    levels = float(option["base"]) ** -torch.arange(T)
    silent = X.abs() <= (levels[-1] * option["ratio"])
    assert not y[silent].any()
    assert ((y - X).abs() <= (nearest(levels) - X).abs() + 1e-6)[~silent].all()


@pytest.mark.parametrize("k", range(1, T + 1))
def test_few_spike_keeps_the_first_k_spikes_of_base_2(k):
    option = variants(Coding.few_spike, T)[-1]
    assert option["ratio"] == 1
    code = table(Coding.few_spike, option, max_spikes=k)
    whole = fire(X, base2_table(1.0, T))
    first = whole * ((whole != 0).cumsum(0) <= k)
    assert torch.equal(fire(X, code), first)
    levels = {round(sum(2.0**-t for t in chosen), 9) for n in range(k + 1) for chosen in combinations(range(1, T + 1), n)}
    assert {round(value, 9) for value in encode(X, code, compiled=False).abs().flatten().tolist()} <= levels


def test_all_spikes_allowed_is_base_2():
    code = table(Coding.few_spike, variants(Coding.few_spike, T)[-1], max_spikes=T)
    assert torch.equal(encode(X, code, compiled=False), encode(X, base2_table(1.0, T), compiled=False))


def observed(*, scale: float = 1.0, groups: int = 1) -> SiteStatistics:
    observer = Observer("site", groups=groups)
    generator = torch.Generator().manual_seed(0)
    for part in (CHOOSE, FIT, REPORT):
        observer.part = part
        observer(scale * torch.randn(20000, groups, generator=generator) * torch.arange(1, groups + 1))
    return observer.result()


@pytest.mark.parametrize("coding", [Coding.rate, Coding.ttfs, Coding.few_spike])
def test_the_fit_is_the_best_amplitude(coding):
    """Brute force over amplitudes on samples of the same distribution; every group has its own."""
    statistics = {"site": observed(groups=2)}
    fit = classic(statistics, asked(T, coding=coding.value, max_spikes=2 if coding is Coding.few_spike else None))["site"]
    assert fit.tau[1] / fit.tau[0] == pytest.approx(2, rel=0.15)
    x = torch.randn(1, 1, 40000, generator=torch.Generator().manual_seed(1))

    def error(code: PhaseTable) -> float:
        return (encode(x, code, compiled=False) - x).square().mean().item()

    mine = error(PhaseTable(*fit.table.rows.at(slice(1)), digits=fit.digits))
    others = []
    for option in variants(coding, T):
        for largest in torch.linspace(0.3, 8, 78).tolist():
            rows = uniform_rows(torch.tensor([largest * option["first"]]), T, base=option["base"], ratio=option["ratio"], v0=option["v0"])
            others.append(error(PhaseTable(*rows, digits=fit.digits)))
    assert mine <= 1.02 * min(others)
    assert fit.relative_error == pytest.approx(mine, rel=0.1)
    assert 0 < fit.firing_rate.max() < 1


def test_more_spikes_are_better_and_phase_is_best():
    statistics = {"site": observed()}
    errors = [classic(statistics, asked(T, coding="few_spike", max_spikes=k))["site"].relative_error for k in (1, 2, 3, T)]
    assert errors == sorted(errors, reverse=True)
    for coding in (Coding.rate, Coding.ttfs):
        worse = classic(statistics, asked(T, coding=coding.value))["site"]
        assert worse.relative_error > 5 * errors[-1]
        assert worse.relative_error > worse.relative_error_base2


def test_a_site_without_activations_and_the_way_to_disk(tmp_path):
    silent = Observer("silent")
    silent(torch.zeros(3, 4))
    fits = classic({"site": observed(), "silent": silent.result()}, asked(T, coding="ttfs"))
    save_fits(tmp_path / "codes.safetensors", fits)
    again = load_fits(tmp_path / "codes.safetensors")
    for name, fit in fits.items():
        assert again[name].digits == fit.digits == Digits(max_spikes=1)
        assert torch.equal(again[name].d, fit.d)
        assert torch.isfinite(fit.d).all()
