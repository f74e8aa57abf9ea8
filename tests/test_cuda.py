"""On a GPU, against the same on the CPU: skipped where there is none."""

import math

import pytest
import torch

import spikellm
from spikellm.calibration.calibrate import calibrate
from spikellm.coding.neuron import count_spikes, encode, fire
from spikellm.config.snn import PrefixConfig
from spikellm.execution.stepped import stepped
from spikellm.kernels.hadamard import Factors, hadamard_factors, hadamard_transform
from spikellm.model.conversion import fill, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.reconstruction.surrogate import differentiable_encode
from spikellm.search.methods import find_codes
from tests.codes import PARTITIONS, asked, partitioned_table, partitioned_tables
from tests.models import TINY, norm_ratio, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def inputs() -> torch.Tensor:
    return torch.randn(3, 2, 5000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_neurons_fire_the_same_spikes(digits, compiled):
    """Products with 0 and 1 are exact, so that fused multiplications and additions round as separate ones do."""
    table, x = partitioned_table([1.0, 1.3], 4, digits), inputs()
    there = table.to("cuda")
    assert torch.equal(encode(x.cuda(), there, compiled=compiled).cpu(), encode(x, table, compiled=False))
    assert torch.equal(fire(x.cuda(), there, compiled=compiled).cpu(), fire(x, table))
    rows = x.transpose(0, 1).contiguous()
    assert torch.equal(count_spikes(rows.cuda(), there, compiled=compiled).cpu(), count_spikes(rows, table, compiled=False))


@pytest.mark.parametrize("digits", [PARTITIONS[0], PARTITIONS[-1]], ids=str)
def test_derivatives(digits):
    found = []
    for device in ("cpu", "cuda"):
        table, x = partitioned_table([1.0, 1.3], 4, digits).to(device), inputs().to(device).requires_grad_()
        parts = [x, *(part.requires_grad_() for part in table.rows), *([] if table.cuts is None else [table.cuts.requires_grad_()])]
        differentiable_encode(x, table, compiled=device == "cuda").square().mean().backward()
        found.append([part.grad.cpu() for part in parts])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 100, 576, 1535, 1536, 14336])
def test_online_transforms(size, dtype):
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors = hadamard_factors(size, dtype=torch.float64)
    wanted = hadamard_transform(x.double(), factors)
    found = hadamard_transform(x.cuda(), Factors(*(None if factor is None else factor.cuda() for factor in factors)))
    assert norm_ratio(found.cpu().double(), wanted) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("name", list(TINY))
def test_spiking_networks_folded_and_stepped(name, ids):
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(name, dtype=torch.float64)
        prepare(model, rotation_seed=0, query_block=16)
        attach_prefix(model, [1, 7])
        fill(model, partitioned_tables(model, 4, shift=1, heads=True), compiled=device == "cuda")
        model.to(device)
        found.append(model(ids.to(device)).logits.cpu())
    with stepped(model, chunk=3):
        found.append(model(ids.cuda()).logits.cpu())
    assert norm_ratio(found[1], found[0]) < 1e-9
    assert norm_ratio(found[2], found[0]) < 1e-9


def test_statistics_and_codes():
    windows = torch.randint(2, 256, (6, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(dtype=torch.float64).to(device)
        prepare(model, rotation_seed=0)
        found[device] = calibrate(model, windows, PrefixConfig()).statistics
    for name, here in found["cpu"].items():
        there = found["cuda"][name].to("cpu")
        torch.testing.assert_close(there.counts, here.counts, rtol=0, atol=2.0)  # a value may lie on a bin's edge
        if here.weights is not None:
            torch.testing.assert_close(there.weights.sum(-1), here.weights.sum(-1), rtol=1e-6, atol=0)
    options = asked(4, 2, coding="phase_signed", intervals=2)
    errors = []
    for device in ("cpu", "cuda"):
        fits = find_codes({name: site.to(device) for name, site in found["cpu"].items()}, options)
        errors.append(sum(math.log(fit.relative_error) for fit in fits.values()) / len(fits))
    assert abs(errors[1] - errors[0]) < 0.05, "both search the same candidates"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_way_there_and_back(dtype, tmp_path, ids):
    windows = torch.randint(2, 256, (6, 64), generator=torch.Generator().manual_seed(0))
    model = tiny_model(dtype=dtype).to("cuda")
    found = spikellm.convert(model, windows, T=4, intervals=1, tune_epochs=1)
    logits = found.model(ids.cuda()).logits
    assert logits.isfinite().all()
    found.save(tmp_path)
    loaded, _ = spikellm.load(tmp_path)
    assert norm_ratio(loaded(ids).logits.float(), logits.cpu().float()) < {torch.float32: 1e-2, torch.bfloat16: 0.1}[dtype]
    assert found.model.generate(ids.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 44)
