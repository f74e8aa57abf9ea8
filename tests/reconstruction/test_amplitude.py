"""Blocks on the spiking stream whose neurons have amplitudes of tokens."""

import pytest
import torch

from spikellm.coding.neuron import PhaseNeuron
from spikellm.config.choices import Amplitude, SearchMethod
from spikellm.config.snn import TuneConfig
from spikellm.kernels.encode import Digits
from spikellm.model.conversion import common_amplitude, fill, get_neuron, model_sites, prepare
from spikellm.reconstruction.sequential import fit_sequentially
from spikellm.reconstruction.surrogate import TunableNeuron
from spikellm.reconstruction.tuning import tune_spiking
from spikellm.search.options import Options
from tests.codes import asked, partitioned_table
from tests.models import tiny_model


def windows() -> torch.Tensor:
    return torch.randint(2, 256, (4, 16), generator=torch.Generator().manual_seed(0))


def options() -> Options:
    found = asked(4, 1, method=SearchMethod.base2)
    found.snn.amplitude = Amplitude.token
    return found


def test_what_is_learnt_sees_shares_of_the_tokens_amplitude():
    """Chain rule: the gradient of m y(x / m) for the table is that of y at x / m, its upstream times m."""
    neuron = PhaseNeuron(partitioned_table([0.9, 1.1], 4, Digits(signed=True, intervals=2)), per_token=True, compiled=False).double()
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    m = x.abs().amax(-1, keepdim=True)
    token, plain = TunableNeuron(neuron), TunableNeuron(PhaseNeuron(neuron.table, compiled=False))
    y = token(x)
    assert torch.allclose(y, neuron(x), rtol=1e-12)
    y.backward(upstream)
    plain(x / m).backward(m * upstream)
    for found, wanted in zip(token.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    assert token.d.grad.abs().max() > 0


def test_sequential_codes_are_of_shares_and_stand_as_such_in_the_model():
    model = tiny_model()
    prepare(model, rotation_seed=0)
    fits = fit_sequentially(model, windows(), options())
    assert common_amplitude(model) is Amplitude.token
    for site in model_sites(model):
        if get_neuron(model, site).per_token:  # tau of base 2 is the largest share, 1, but for the factor of the block's output
            steps = fits[site.name].tau.log() / torch.tensor(1.07).log()
            assert steps == pytest.approx(steps.round(), abs=1e-4), site.name


def test_tuning_keeps_the_kind_of_amplitude_and_lowers_the_error(ids):
    model = tiny_model()
    prepare(model, rotation_seed=0)
    fits = fit_sequentially(model, windows(), options())
    fill(model, {name: fit.table for name, fit in fits.items()}, amplitude=Amplitude.token, compiled=False)
    before = model(ids).logits
    found = tune_spiking(model, windows(), TuneConfig(epochs=2), seed=0)
    assert common_amplitude(model) is Amplitude.token
    assert all(block.after <= block.before for block in found.values())
    assert any(block.after < block.before for block in found.values())
    assert not torch.equal(model(ids).logits, before)
