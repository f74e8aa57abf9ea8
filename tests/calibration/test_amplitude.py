"""What calibration sees of neurons with the token's amplitude: x / m, an error of which counts m^2."""

import pytest
import torch

from spikellm.calibration.calibrate import calibrate
from spikellm.calibration.statistics import FIT, Observer
from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.choices import Amplitude, SearchMethod
from spikellm.config.snn import PrefixConfig
from spikellm.model.conversion import prepare
from spikellm.search.methods import find_codes
from tests.codes import asked, observed
from tests.models import tiny_model

READ_BY_LINEARS = ("attention_input", "attention_output", "mlp_input", "mlp_product", "head_input")


def by_value(statistics, what: str) -> dict[float, float]:
    """Counts or weights of the fitting part by the lower end of their bin."""
    values = getattr(statistics, what)[FIT, 0]
    return {edge: value for edge, value in zip(statistics.edges.tolist(), values.tolist(), strict=False) if value}


@pytest.mark.parametrize("held", [False, True])
def test_counts_and_weights_by_hand(held):
    observer = Observer("site", per_token=True, held=held)
    x = torch.tensor([[2.0, -1.0, 0.5], [8.0, 4.0, 0.0]])
    assert observer(x) is x
    if held:
        observer.weigh(torch.tensor([[1.0], [10.0]]))
    found = observer.result()
    assert by_value(found, "counts") == {1.0: 2, 0.5: 2, 0.25: 1}
    assert by_value(found, "weights") == ({1.0: 644, 0.5: 644, 0.25: 4} if held else {1.0: 68, 0.5: 68, 0.25: 4})
    assert found.zeros[FIT].tolist() == [1]
    assert found.maximum[FIT].tolist() == [1.0]


def heavy_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4000, 64, generator=generator) * torch.randn(4000, 1, generator=generator).exp()


def test_the_reported_error_is_that_of_what_comes_out():
    """Relative squared error of m y on the part that nothing is decided on; tokens of unlike size gain by it."""
    x, errors = heavy_tokens(), {}
    for per_token in (False, True):
        statistics = observed(x, per_token=per_token)
        (fit,) = find_codes({"layers.0.mlp_product": statistics}, asked(5, 1, method=SearchMethod.base2)).values()
        last = x.chunk(4)[3]
        y = PhaseNeuron(fit.table, per_token=per_token, compiled=False)(last)
        errors[per_token] = fit.relative_error
        measured = ((y - last).square().sum() / last.square().sum()).item()
        # the largest input, 1, is taken for the middle of the bin that begins there
        assert fit.relative_error == pytest.approx(measured, rel=0.04)
    assert errors[True] < 0.5 * errors[False]


def test_what_is_not_finite_is_still_refused():
    observer = Observer("site", per_token=True)
    observer(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="site site: NaN or infinite"):
        observer.result()


def test_sites_that_linears_read_are_seen_in_units_of_their_tokens_and_no_others():
    """A token's largest input is 1 there, in the FIT, CHOOSE and REPORT parts alike; all else is seen as ever."""
    windows = torch.randint(2, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    seen = {}
    for amplitude in Amplitude:
        model = tiny_model()
        prepare(model, rotation_seed=0)
        seen[amplitude] = calibrate(model, windows, PrefixConfig(), amplitude=amplitude)
    assert seen[Amplitude.static].prefix_tokens == seen[Amplitude.token].prefix_tokens
    for name, site in seen[Amplitude.token].statistics.items():
        static = seen[Amplitude.static].statistics[name]
        if name.rpartition(".")[2] in READ_BY_LINEARS:
            assert site.maximum.amax(1).tolist() == [1.0] * 3, name
            assert site.weights is not None
            power = (site.weights * site.centers.square()).sum().item()  # of m (x / m)
            weights = static.counts if static.weights is None else static.weights
            assert power == pytest.approx((weights * static.centers.square()).sum().item(), rel=1e-2), name
        else:
            assert torch.equal(site.counts, static.counts), name
            assert (site.weights is None) == (static.weights is None)
