"""Diagnostics against closed forms and published constants."""

import pytest
import torch
from conftest import observed, tiny_model
from torch import nn

from spikellm.code_plots import write_density_plots
from spikellm.conversion import get_neuron, install, model_sites
from spikellm.diagnostics import bound, damage, lloyd_max, site_levels, site_rows
from spikellm.evaluation import perplexity
from spikellm.search import search
from spikellm.sites import SiteKind


# Max 1960, table I: least mean squared error of a unit Gaussian with 2 n levels, symmetric about 0.
@pytest.mark.parametrize(("levels", "least"), [(1, 0.3634), (2, 0.1175), (4, 0.03454), (8, 0.009497), (16, 0.002499)])
def test_the_gaussian_has_the_published_optimum(levels, least):
    x = torch.linspace(0, 6, 6001, dtype=torch.float64)[None]
    weight = torch.exp(-x.square() / 2)
    _, error = lloyd_max(x, weight / weight.sum(), levels, iterations=400)
    assert error.item() == pytest.approx(least, rel=6e-3)


def test_a_uniform_density_has_evenly_spaced_levels():
    x = torch.linspace(0, 1, 8001)[None]
    levels, error = lloyd_max(x, torch.full_like(x, 1 / 8001), 8)
    assert torch.allclose(levels[0], (torch.arange(8) + 0.5) / 8, atol=1e-3)
    assert error.item() == pytest.approx(1 / 12 / 64, rel=1e-2)


def test_points_without_weight_and_groups_without_points_do_no_harm():
    x = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    weight = torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    levels, error = lloyd_max(x, weight, 2)
    assert levels[0].tolist() == [1.0, 2.0]
    assert error.tolist() == [0.0, 0.0]


def test_no_code_is_below_its_bound():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200_000, generator=generator)
    statistics = {"gaussian": observed(gaussian), "silu": observed(nn.functional.silu(3 * gaussian), two_sided=True)}
    fits = search(statistics, T=4, G=2, seed=0, compiled=False)
    for row in site_rows(statistics, fits):
        assert 0.9 * row["relative_error"] > row["lloyd_max"] > 0
        assert row["above_bound"] == pytest.approx(row["relative_error"] / row["lloyd_max"])
    assert bound(statistics["gaussian"], fits["gaussian"]) == pytest.approx(0.002499, rel=0.03)


def test_levels_of_base_2_are_its_multiples():
    statistics = {"site": observed(torch.rand(1000, generator=torch.Generator().manual_seed(0)))}
    from spikellm.search import base2_search

    table = base2_search(statistics, T=3)["site"].table
    tau = statistics["site"].maximum.max()
    assert torch.allclose(site_levels(table, 0, torch.linspace(0.001, 2, 4000)), tau * torch.arange(8) / 8)


def test_damage_puts_neurons_where_it_says_and_takes_them_away(tmp_path, ids):
    model = tiny_model()
    reference = perplexity(model, ids, label="").value
    install(model, rotated=False)
    from spikellm.calibration import calibrate
    from spikellm.config import PrefixConfig

    statistics = calibrate(model, ids, PrefixConfig(enabled=False)).statistics
    fits = search(statistics, T=4, G=2, seed=0, compiled=False)
    by_kind, by_site = damage(model, fits, ids, compiled=False)
    assert set(by_kind) == {"none", *(kind.name for kind in SiteKind)}
    assert by_kind["none"] == pytest.approx(reference, rel=1e-5)
    assert sum(value != by_kind["none"] for value in by_kind.values()) == len(SiteKind)
    assert len(by_site) == 10
    assert list(by_site.values()) == sorted(by_site.values(), reverse=True)
    assert all(isinstance(get_neuron(model, site), nn.Identity) for site in model_sites(model))
    paths = write_density_plots(tmp_path, statistics, fits)
    assert len(paths) == len(SiteKind)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
