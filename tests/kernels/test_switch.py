"""Kernels switched off: the plain forms give the same figures, and nothing of the library is called."""

import pytest
import torch

from spikellm.calibration.calibrate import calibrate
from spikellm.config.snn import PrefixConfig
from spikellm.cores import side_by_side, threads
from spikellm.evaluation.perplexity import perplexity
from spikellm.kernels import bindings, native
from spikellm.kernels.compiled import chosen
from spikellm.kernels.encode import encode_plain
from spikellm.kernels.switch import fusing, is_fusing
from spikellm.model.conversion import fill, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.spikes import ledger
from tests.codes import partitioned_tables
from tests.models import TINY, tiny_model

pytestmark = pytest.mark.kernels


def test_within_every_kernel_is_its_plain_form_on_other_threads_too():
    x = torch.zeros(1, 1, 1)
    with fusing(False), threads(2):
        assert native.library() is None
        assert chosen(encode_plain, x, compiled=True) is encode_plain
        assert side_by_side(is_fusing, [()] * 4) == [False] * 4
        with fusing(True):
            assert native.library() is bindings.loaded() is not None
    assert is_fusing()


@pytest.mark.parametrize("name", list(TINY))
def test_figures_are_the_same_to_rounding_and_spikes_to_the_last(name, ids):
    """In float64, where no rounding is so near a threshold that it moves a spike."""
    found = []
    for on in (True, False):
        model = tiny_model(name, dtype=torch.float64)
        with fusing(on):
            prepare(model, rotation_seed=0, query_block=16)
            attach_prefix(model, [1, 7])
            ann = perplexity(model, ids).value
            fill(model, partitioned_tables(model, 4, shift=1, heads=True), compiled=True)
            found.append((ann, perplexity(model, ids).value, ledger.count(model, ids)))
    (ann, snn, spikes), (plain_ann, plain_snn, plain_spikes) = found
    assert ann == pytest.approx(plain_ann, rel=1e-9)
    assert snn == pytest.approx(plain_snn, rel=1e-4)
    assert spikes == plain_spikes


def test_statistics_are_the_same_to_rounding():
    windows = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for on in (True, False):
        model = tiny_model(dtype=torch.float64)
        with fusing(on):
            prepare(model, rotation_seed=0, query_block=16)
            found.append(calibrate(model, windows, PrefixConfig(enabled=False)).statistics)
    for name, site in found[0].items():
        other = found[1][name]
        assert site.first_bin == other.first_bin
        moved = (site.counts - other.counts).abs().sum() / 2
        assert moved <= 1e-4 * site.counts.sum(), name  # over the edge of a bin, by a float32's rounding of a float64
        torch.testing.assert_close(site.maximum, other.maximum, rtol=1e-6, atol=0)
        if site.weights is not None:
            torch.testing.assert_close(site.weights.sum(-1), other.weights.sum(-1), rtol=1e-4, atol=1e-9)
