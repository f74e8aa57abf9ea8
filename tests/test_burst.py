"""A new code is one function and one entry of METHODS: burst coding is searched, run step by step, counted, saved and loaded.

A number's digits of base 3 are sent as bursts of up to two equal spikes, the leading digit first.
"""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikellm.calibration.statistics import FIT, SiteStatistics
from spikellm.coding.neuron import PhaseTable, encode, fire
from spikellm.config.choices import Execution
from spikellm.evaluation.perplexity import perplexity
from spikellm.evaluation.texts import token_windows
from spikellm.run.stages import run_stages
from spikellm.search.fit import CodeFit, load_fits
from spikellm.search.methods import METHODS
from spikellm.search.options import Options
from spikellm.search.search import group_maxima
from tests.codes import asked, observed
from tests.configure import configure
from tests.jobs import SMALL

BURST = 2  # spikes of a digit, at most
SHARES = torch.linspace(0.5, 1.1, 13)  # tried amplitudes, in units of the largest activation
T = 6


def burst_table(tau: torch.Tensor, T: int) -> PhaseTable:
    """Amplitudes tau [C]: the largest output is tau (1 - (BURST + 1)^-(T / BURST))."""
    d = tau[:, None] * (BURST + 1.0) ** -(torch.arange(T) // BURST + 1)
    return PhaseTable(theta=d, h=d, d=d, v0=d[:, -1] / 2)


def burst(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The method: one table a site, its amplitude that of least squared error on the fitting part."""
    fits = {}
    for name, site in ((name, site.merged()) for name, site in statistics.items()):
        x, count = site.centers[None, None], site.counts[FIT, 0]
        tables = [burst_table(share * group_maxima({name: site}), options.T) for share in SHARES]
        errors = torch.stack([(count * (encode(x, table, compiled=False) - x)[0, 0].square()).sum() for table in tables])
        table, base = tables[int(errors.argmin())], torch.full((1, 1), BURST + 1.0)
        fits[name] = CodeFit.reported(
            site,
            table,
            tau=(BURST + 1) * table.d[:, 0],
            assignment=torch.zeros(1, options.T, dtype=torch.int64),
            base_d=base,
            base_h=base,
            base_theta=base,
            objective=errors.amin(0, keepdim=True).float(),
            fallback=torch.zeros(1, dtype=torch.bool),
            rho=torch.ones(1),
        )
    return fits


class Method(Enum):
    """Stands for the line in config/choices.py that `--help` shows."""

    burst = "burst"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "burst", burst)


def test_digits_of_base_3_are_sent():
    """Against rounding: the nearest multiple of the last digit, its digits as counts."""
    x = torch.rand(1, 1, 2000, generator=torch.Generator().manual_seed(0))
    table = burst_table(torch.ones(1), T)
    number = (27 * x).round().clamp_max(26)
    torch.testing.assert_close(encode(x, table, compiled=False), number / 27)
    counts = fire(x, table).view(3, BURST, -1).sum(1)
    assert torch.equal(counts, torch.stack([number.flatten().div(27 // 3**place, rounding_mode="floor") % 3 for place in (1, 2, 3)]))


def test_its_amplitude_is_fitted():
    sites = {"site": observed(torch.randn(40_000, generator=torch.Generator().manual_seed(1)))}
    fit = burst(sites, asked(T))["site"]
    other = burst_table(group_maxima(sites), T)
    x = torch.randn(1, 1, 40_000, generator=torch.Generator().manual_seed(2))
    found, plain = ((encode(x, table, compiled=False) - x).square().mean() for table in (fit.table, other))
    assert found < 0.9 * plain
    assert fit.relative_error == pytest.approx(found.item(), rel=0.05)
    assert fit.mean_firing_rate == pytest.approx(fire(x, fit.table).ne(0).float().mean().item(), rel=0.02)


def test_one_entry_takes_a_code_the_whole_way(registered, tmp_path):
    arguments = [*SMALL, f"output_root={tmp_path}", f"snn.T={T}", "grain=1", "model.options.num_hidden_layers=1", "save_model=true"]
    config = configure(*arguments)
    config.search.method = Method.burst
    found = run_stages(config).results.to_json()
    fits = load_fits(Path(found["codes"]))
    assert len(fits) == found["sites"] == 10
    for fit in fits.values():
        torch.testing.assert_close(fit.table.d, burst_table(fit.tau, T).d)
    # counted: no more than all, and not those of base 2, which is measured beside it
    assert 0 < found["spikes"]["firing_rate"] < 1
    assert found["perplexity"]["snn"] != found["perplexity"]["base2"]
    config.snn.execution = Execution.stepped
    steps = run_stages(config).results.to_json()
    assert steps["stages"]["search"]["cached"]
    assert steps["perplexity"]["snn"] == pytest.approx(found["perplexity"]["snn"], rel=1e-3)
    assert len(steps["anytime"]["perplexity"]) == T
    windows = token_windows(config.dataset.evaluation, "dataset.evaluation", None)
    model = AutoModelForCausalLM.from_pretrained(found["saved_model"], dtype=torch.float32)
    assert perplexity(model, windows, label="saved").value == pytest.approx(found["perplexity"]["snn"], rel=1e-5)
