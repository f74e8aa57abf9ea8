"""On a GPU, against the same on the CPU: skipped where there is none."""

import math

import pytest
import torch

import spikellm
from spikellm.calibration.calibrate import calibrate
from spikellm.coding.neuron import count_spikes, encode, fire
from spikellm.config.snn import PrefixConfig
from spikellm.execution.stepped import stepped
from spikellm.kernels.attention import average_plain, mixture_plain
from spikellm.kernels.compiled import fused
from spikellm.kernels.hadamard import Factors, hadamard_factors, hadamard_transform
from spikellm.model.conversion import fill, prepare
from spikellm.model.prefix import attach_prefix
from spikellm.reconstruction.surrogate import differentiable_encode
from spikellm.search.methods import find_codes
from tests.codes import PARTITIONS, asked, base2_table, partitioned_table, partitioned_tables
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_neurons_of_other_dtypes_fire_the_same_spikes(dtype):
    table, x = partitioned_table([1.0, 1.3], 4, PARTITIONS[-2]), inputs().to(dtype)
    found, wanted = encode(x.cuda(), table.to("cuda")), encode(x, table, compiled=False)
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu(), wanted)


def attention_inputs(L: int, S: int, E: int, dtype: torch.dtype = torch.float32):
    """Queries, keys and values of 4 and 2 heads, and a prefix; a causal mask, whose first sequence is padded."""
    sizes = [(2, 4, L, E), (2, 2, S, E), (2, 2, S, E), (1, 2, 3, E), (1, 2, 3, E)]
    numbers = torch.Generator().manual_seed(0)
    query, key, value, *prefix = (torch.randn(*size, generator=numbers).to(dtype) for size in sizes)
    mask = torch.ones(L, S, dtype=torch.bool).tril(S - L).repeat(2, 1, 1, 1)
    mask[0, :, :, :3] = False
    return query, key, value, mask, tuple(prefix)


def attended(given, table, *, before: bool, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Compiled on a GPU, in plain form on the CPU."""
    query, key, value, mask, prefix = given
    query, key, value, *prefix = (each.to(device, dtype) for each in (query, key, value, *prefix))
    table, mask = table.to(device, torch.promote_types(dtype, torch.float32)), mask.to(device)
    code = (table.rows, table.digits, table.cuts)
    plain = average_plain if before else mixture_plain
    if device == "cuda":
        from spikellm.kernels import gpu

        assert gpu.attends(query, key, value, mask, None if before else tuple(prefix), *code)
    function = fused(plain, device) if device == "cuda" else plain
    return function(query, key, value, mask, query.shape[-1] ** -0.5, *([] if before else [tuple(prefix)]), *code, 256).cpu().double()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("E", [64, 80, 128, 256])
@pytest.mark.parametrize(("L", "S"), [(1, 700), (5, 300), (40, 40), (300, 310)])
def test_attention_with_a_fine_code(L, S, E, dtype, before):
    """A spike on the other side of a threshold is worth 2^-20 of base 2: rounding cannot be seen. The truth is in float64."""
    given, table = attention_inputs(L, S, E, dtype), base2_table(2.0, 21)
    wanted = attended(given, table, before=before, device="cpu", dtype=torch.float64)
    assert norm_ratio(attended(given, table, before=before, device="cuda", dtype=dtype), wanted) < (1e-5 if not before else 1e-4)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("L", [2, 300])
@pytest.mark.parametrize("digits", PARTITIONS, ids=str)
def test_attention_with_every_kind_of_digits(digits, L, before):
    """Rounding moves a spike in some rows: of each a few hundred weights, one in a hundred thousand of which is so near a threshold."""
    given, table = attention_inputs(L, 310, 64), partitioned_table([1.0, 1.1, 0.9, 1.2], 4, digits)
    wanted, found = (attended(given, table, before=before, device=device, dtype=dtype)
                     for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)))  # fmt: skip
    same = (found - wanted).norm(dim=-1) <= 1e-5 * wanted.norm(dim=-1) + 1e-9
    assert same.double().mean() > 0.9


@pytest.mark.parametrize("before", [False, True])
def test_attention_holds_no_scores(before):
    H, L, E = 2, 4096, 64
    query, key, value = (torch.randn(1, H, L, E, device="cuda") for _ in range(3))
    mask, table = torch.ones(1, 1, L, L, dtype=torch.bool, device="cuda").tril(), base2_table(1.0, 6).to("cuda")
    function, given = (
        fused(average_plain if before else mixture_plain, "cuda"),
        (query, key, value, mask, E**-0.5, *([] if before else [None])),
    )
    function(*given, table.rows, table.digits, table.cuts, 256)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function(*given, table.rows, table.digits, table.cuts, 256)
    assert torch.cuda.max_memory_allocated() - held < 4 * L * L / 8  # bytes; the output is 1/16 of a head's scores


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
