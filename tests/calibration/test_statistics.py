"""Calibration statistics against numpy on the same samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikellm.calibration.calibrate import PERIOD, calibrate, enough_pieces
from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.config.snn import PrefixConfig
from spikellm.model.conversion import install
from tests.models import tiny_model

RELATIVE_WIDTH = 2.0**-8  # of a bin


def observe(*batches: torch.Tensor, **options) -> SiteStatistics:
    observer = Observer("some.site", **options)
    for batch in batches:
        assert torch.equal(observer(batch), batch)
    return observer.result()


def spelled_out(found: SiteStatistics, group: int = 0) -> np.ndarray:
    """The fitting part's histogram as sorted samples."""
    return np.repeat(np.append(0.0, found.centers.numpy()), np.append(found.zeros[FIT, group], found.counts[FIT, group].long().numpy()))


@given(seed=st.integers(0, 1 << 30), spread=st.floats(0.1, 3), batches=st.integers(1, 3))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_every_sample_lies_in_the_bin_that_counts_it(seed, spread, batches):
    generator = torch.Generator().manual_seed(seed)
    samples = [
        torch.randn(4, 50, generator=generator) * torch.exp(spread * torch.randn(4, 50, generator=generator)) for _ in range(batches)
    ]
    found = observe(*samples)
    magnitude = np.sort(torch.cat(samples).abs().flatten().numpy())
    counted = spelled_out(found)
    assert counted.shape == magnitude.shape
    np.testing.assert_allclose(counted, magnitude, rtol=RELATIVE_WIDTH, atol=2.0**-40)
    assert found.maximum[FIT, 0].item() == magnitude.max()


def test_moments_agree_with_numpy():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    found = observe(x.view(100, 200))
    counted = spelled_out(found).astype(np.float64)
    exact = x.abs().numpy().astype(np.float64)
    for power in (1, 2, 4):
        assert np.mean(counted**power) == pytest.approx(np.mean(exact**power), rel=1e-3)


def test_windows_go_to_the_part_that_is_set():
    observer = Observer("some.site")
    for part, scale in ((FIT, 1.0), (CHOOSE, 4.0), (FIT, 2.0), (REPORT, 8.0)):
        observer.part = part
        observer(torch.full((3, 5), scale))
    found = observer.result()
    assert found.counts.sum(-1).flatten().tolist() == [30, 15, 15]
    assert found.maximum.flatten().tolist() == [2.0, 4.0, 8.0]
    assert found.known_maximum.tolist() == [4.0]


def test_groups_are_counted_apart():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    heads = observe(x, groups=3, axis=1)
    assert torch.equal(heads.maximum[FIT], x.abs().amax((0, 2, 3)))
    assert heads.counts[FIT].sum(-1).tolist() == [70, 70, 70]
    blocks = observe(x[..., :6], groups=2, axis=-1)
    assert torch.equal(blocks.maximum[FIT], torch.stack([x[..., :3].abs().amax(), x[..., 3:6].abs().amax()]))
    for group in range(3):
        counted = spelled_out(heads, group)
        np.testing.assert_allclose(counted, np.sort(x[:, group].abs().flatten().numpy()), rtol=RELATIVE_WIDTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_no_usable_number_names_its_site(bad):
    observer = Observer("layers.3.mlp_product")
    observer(torch.ones(2, 3))
    observer(torch.tensor([[1.0, bad]]))
    observer(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"layers\.3\.mlp_product"):
        observer.result()


def test_a_site_that_saw_nothing_names_itself():
    with pytest.raises(ValueError, match=r"some\.site"):
        Observer("some.site").result()


def test_zeros_count_as_zeros_and_a_silent_site_is_no_error():
    found = observe(torch.tensor([[0.0, -0.0, 1.0, -2.0]]))
    counted = spelled_out(found)
    assert np.count_nonzero(counted == 0) == 2
    np.testing.assert_allclose(np.sort(counted)[2:], [1.0, 2.0], rtol=RELATIVE_WIDTH)
    silent = observe(torch.zeros(3, 4))
    assert silent.maximum.max() == 0
    assert spelled_out(silent).tolist() == [0.0] * 12


def test_low_precision_activations_are_counted_exactly():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = observe(x)
    assert found.maximum[FIT, 0].item() == x.abs().max().item()
    assert found.counts.sum() == 64


def test_tensors_round_trip():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weighted = Observer("some.site", held=True)
    weighted(x)
    weighted.weigh(x.square())
    for found in (observe(x), weighted.result()):
        again = SiteStatistics.from_tensors(found.tensors("a"), "a")
        assert (again.weights is None) == (found.weights is None)
        for name in ("counts", "zeros", "maximum", "edges"):
            assert torch.equal(getattr(again, name), getattr(found, name))


def test_weights_are_the_summed_importance_of_a_bins_activations():
    generator = torch.Generator().manual_seed(0)
    x, importance = torch.randn(2, 3, 4, 5, generator=generator), torch.rand(2, 3, 4, 1, generator=generator)
    observer = Observer("some.site", groups=3, axis=1, held=True)
    observer(x)
    observer.weigh(importance)
    found = observer.result()
    assert found.weights is not None
    for group in range(3):
        exact = (importance * x.square())[:, group].double().sum().item()
        counted = (found.weights[FIT, group] * found.centers.double().square()).sum().item()
        assert counted == pytest.approx(exact, rel=2 * RELATIVE_WIDTH)
    assert found.merged().weights.sum() == pytest.approx(importance.sum().item() * 5)
    assert found.merged().counts.sum() == x.numel()


CUTS = [(8, 64, 8, 64), (4, 5, 4, 5), (3, 65, 6, 32), (2, 64, 4, 32), (1, 64, 4, 16), (1, 7, 4, 1)]


@pytest.mark.parametrize(("number", "length", "pieces", "piece"), CUTS)
def test_every_part_gets_text_and_half_of_it_is_fitted_to(number, length, pieces, piece):
    windows = torch.arange(number * length).view(number, length)
    found = enough_pieces(windows)
    assert found.shape == (pieces, piece)
    assert all(row.tolist() == list(range(row[0], row[0] + piece)) for row in found)  # text in its order
    parts = [PERIOD[index % len(PERIOD)] for index in range(pieces)]
    assert set(parts) == {FIT, CHOOSE, REPORT}
    assert parts.count(FIT) == pieces / 2


def test_text_too_short_for_all_parts_is_refused():
    with pytest.raises(ValueError, match=r"dataset\.calibration\.window=3: 1 of it .* take a larger window"):
        enough_pieces(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("after", [True, False])
def test_one_window_fills_all_parts_and_rows_are_measured_where_they_are_summed(after):
    model = tiny_model(num_hidden_layers=1)
    install(model, rotated=(), normalise_after=after)
    window = torch.randint(2, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    found = calibrate(model, window, PrefixConfig(enabled=False))
    for name, site in found.statistics.items():
        passed = site.counts.sum((1, 2)) + site.zeros.sum(1)
        assert passed[FIT] == 2 * passed[CHOOSE] == 2 * passed[REPORT] > 0, name
        summed = "softmax" in name and not after
        assert (site.row_neurons is not None) == summed
        if summed:  # queries 0 and 8 of pieces of ten tokens: rows of 1 and 9 keys
            assert site.row_neurons == pytest.approx((1 + 81) / (1 + 9))
            assert SiteStatistics.from_tensors(site.tensors("a"), "a").row_neurons == pytest.approx(site.row_neurons)
