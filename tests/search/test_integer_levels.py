"""Levels of int_static: no clip, and no zero point, does better on the distribution itself."""

import pytest
import torch
from torch.nn.functional import silu

from spikellm.coding.integers import IntegerQuantizer, TokenQuantizer
from spikellm.config.choices import Groups
from spikellm.config.labels import SiteKind
from spikellm.model.sites import Site
from spikellm.search.integers import fitted_levels, static_quantizers, token_quantizers
from tests.codes import asked, observed


def draw(number: int = 40000) -> torch.Tensor:
    return torch.randn(number, 1, generator=torch.Generator().manual_seed(0))


def squared_error(x: torch.Tensor, step: float, low: int, high: int) -> float:
    return ((x / step).round().clamp(low, high) * step - x).square().mean().item()


def fit_part(x: torch.Tensor) -> torch.Tensor:
    """`observed` fits on the first half."""
    return x[: len(x) // 2].double().flatten()


@pytest.mark.parametrize("T", [2, 3, 4, 8])
@pytest.mark.parametrize("heavy", [1.0, 3.0])
def test_the_clip_is_the_best_there_is(T, heavy):
    """Brute force over steps on the samples; 1 % is left to the histogram."""
    x = draw().sign() * draw().abs() ** heavy
    found = fitted_levels(observed(x), T, signed=True)
    assert (found.low.item(), found.high.item()) == (-(2**T), 2**T - 1)
    samples = fit_part(x)
    largest = samples.abs().max().item()
    steps = (torch.logspace(-7, 0.2, 400, base=2) * largest / (2**T - 1)).tolist()
    best = min(squared_error(samples, step, -(2**T), 2**T - 1) for step in steps)
    assert squared_error(samples, found.step.item(), -(2**T), 2**T - 1) <= 1.01 * best
    assert found.step * found.high < 0.99 * largest or T == 8  # coarse integers clip


def test_the_level_below_counts_on_one_side():
    """Two's complement reaches a step further down: of uniform values both ends are clipped as little as can be."""
    x = torch.linspace(-1, 1, 40001)[torch.randperm(40001, generator=torch.Generator().manual_seed(0))][:40000, None]
    found = fitted_levels(observed(x), 3, signed=True)
    steps = torch.linspace(0.1, 0.16, 601).tolist()
    best = min(squared_error(fit_part(x), step, -8, 7) for step in steps)
    assert squared_error(fit_part(x), found.step.item(), -8, 7) <= 1.01 * best


@pytest.mark.parametrize("T", [3, 4, 8])
def test_the_softmax_has_unsigned_integers(T):
    x = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0)) ** 4
    found = fitted_levels(observed(x), T, signed=False)
    assert (found.low.item(), found.high.item()) == (0, 2**T - 1)
    steps = torch.linspace(0.3, 1.1, 401).div(2**T - 1).tolist()
    best = min(squared_error(fit_part(x), step, 0, 2**T - 1) for step in steps)
    assert squared_error(fit_part(x), found.step.item(), 0, 2**T - 1) <= 1.02 * best


@pytest.mark.parametrize("T", [3, 4, 8])
def test_silu_has_a_zero_point_that_no_other_beats(T):
    x = silu(2 * draw())
    found = fitted_levels(observed(x, sides=2), T, signed=True)
    span = 2 ** (T + 1) - 1
    assert found.high.item() - found.low.item() == span
    assert -found.low.item() < 2**T  # not symmetric
    samples = fit_part(x)

    def every():
        for low in range(-(2**T), 1, max(1, 2**T // 16)):
            for step in torch.logspace(-2, 0.1, 60, base=2).mul(samples.max().item() / (span + low)).tolist():
                yield squared_error(samples, step, low, span + low)

    own = squared_error(samples, found.step.item(), int(found.low), int(found.high))
    assert own <= 1.03 * min(every())
    assert own < 0.6 * squared_error(samples, fitted_levels(observed(x), T, signed=True).step.item(), -(2**T), 2**T - 1)


def test_groups_have_steps_of_their_own_and_weights_count():
    x = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0])
    step = fitted_levels(observed(x, groups=2), 4, signed=True).step
    assert step[1] / step[0] == pytest.approx(10, rel=0.05)


def test_where_nothing_passed_there_are_levels_all_the_same():
    found = fitted_levels(observed(torch.zeros(400, 3), groups=3), 4, signed=True)
    assert torch.isfinite(torch.stack(found)).all()
    assert (found.step > 0).all()


def test_occupants_have_the_axis_and_groups_of_their_site():
    query, softmax, activation = (Site(kind, 0).name for kind in (SiteKind.query, SiteKind.softmax, SiteKind.activation))
    x = torch.rand(8, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    statistics = {
        query: observed(x - 0.5, groups=4, axis=1),
        softmax: observed(x, groups=4, axis=1),
        activation: observed(silu(8 * x - 4), sides=2),
    }
    for method, kind in ((static_quantizers, IntegerQuantizer), (token_quantizers, TokenQuantizer)):
        for groups, number in ((Groups.head, 4), (Groups.site, 1)):
            found = method(statistics, asked(4, groups=groups))
            assert list(found) == list(statistics)
            assert all(isinstance(each, kind) for each in found.values())
            assert [each.axis for each in found.values()] == [1, 1, -1]
            counts = [each.groups if kind is TokenQuantizer else len(each.step) for each in found.values()]
            assert counts == [number, number, 1]
            assert found[softmax](x).unique().numel() <= number * 16 * (1 if kind is IntegerQuantizer else 40)
            assert (found[softmax](x) >= 0).all()
            assert (found[activation](silu(8 * x - 4)) < 0).any()
