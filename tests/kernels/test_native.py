"""The C++ of the CPU against the plain forms: to the last bit where nothing is rounded, else within rounding."""

import platform
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spikellm import cores
from spikellm.coding.neuron import PhaseTable, encode
from spikellm.kernels import bindings, build, native
from spikellm.kernels.attention import coded_mixture, mixture_plain, visible_ends
from spikellm.kernels.encode import Digits, Rows, code_sums, count_plain, encode_plain, fire_plain, segment_sums
from spikellm.kernels.hadamard import hadamard_factors, hadamard_matrix
from spikellm.kernels.histogram import BINS, Tally, tally_plain
from spikellm.kernels.transforms import kronecker
from tests.codes import base2_table

pytestmark = pytest.mark.kernels

law = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = (torch.float32, torch.float64)

every_digits = st.builds(
    Digits, signed=st.booleans(), max_spikes=st.sampled_from([None, 1, 2]), sides=st.sampled_from([1, 2]), intervals=st.integers(1, 4)
)


def code(digits: Digits, groups: int, T: int, dtype: torch.dtype, numbers: torch.Generator) -> tuple[Rows, torch.Tensor | None]:
    """Rows in which no number can stand for another, and ascending cuts."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=numbers, dtype=dtype)

    R = digits.populations * groups
    cuts = None if digits.intervals == 1 else rand(digits.intervals - 1, digits.sides * groups).sort(0).values * 2
    return Rows(rand(R, T), rand(R, T), rand(R, T) - 0.3, rand(R) / 5 - 0.1), cuts


def awkward(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """With inputs that are 0, on a threshold, infinite, not a number, the smallest there are."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, torch.finfo(x.dtype).tiny], dtype=x.dtype)
    special = torch.cat([special, (rows.theta[0] - rows.v0[0])[:3]])
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x


@given(every_digits, st.integers(1, 3), st.integers(1, 9), st.integers(1, 150), st.sampled_from(DTYPES), st.integers(0, 1 << 30))
@law
def test_codes_trains_and_counts_are_those_of_the_plain_form_to_the_last_bit(digits, groups, T, width, dtype, seed):
    numbers = torch.Generator().manual_seed(seed)
    rows, cuts = code(digits, groups, T, dtype, numbers)
    x = awkward(torch.randn(2, groups, width, generator=numbers, dtype=dtype), rows)
    assert torch.equal(native.encode(x, rows, digits, cuts), encode_plain(x, rows, digits, cuts))
    assert torch.equal(native.fire(x, rows, digits, cuts), fire_plain(x, rows, digits, cuts))
    many = x.transpose(0, 1).contiguous()  # [C, I, J]
    assert torch.equal(native.count(many, rows, digits, cuts), count_plain(many, rows, digits, cuts))


@given(
    every_digits.filter(lambda digits: digits.sides == 1),
    st.integers(1, 3),
    st.integers(1, 200),
    st.sampled_from(DTYPES),
    st.integers(0, 1 << 30),
)
@law
def test_sums_of_a_code_are_those_of_its_values_and_spikes(digits, groups, points, dtype, seed):
    numbers = torch.Generator().manual_seed(seed)
    rows, cuts = code(digits, groups, 5, dtype, numbers)
    x, weight, share = (torch.rand(groups, points, generator=numbers, dtype=dtype) + 1e-3 for _ in range(3))
    off = encode_plain(x[None], rows, digits, cuts)[0].double() - x.double()
    spikes = fire_plain(x[None], rows, digits, cuts)[:, 0].abs().sum(0).double()
    wanted = torch.stack([(weight * off.square()).sum(-1), (weight * off).sum(-1), (share * spikes).sum(-1)])
    for found in (native.sums(x, weight, share, rows, digits, cuts), code_sums(x, weight, share, rows, digits, cuts)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_more_numbers_than_a_thread_takes_at_a_time():
    numbers, digits = torch.Generator().manual_seed(0), Digits(signed=True, intervals=2)
    for groups in (1, 3):
        rows, cuts = code(digits, groups, 6, torch.float32, numbers)
        x = torch.randn(2, groups, 70_001, generator=numbers)
        assert torch.equal(native.encode(x, rows, digits, cuts), encode_plain(x, rows, digits, cuts))
        assert torch.equal(native.count(x.mT[..., :groups].mT.transpose(0, 1), rows, digits, cuts).sum(-1),
                           count_plain(x.transpose(0, 1), rows, digits, cuts).sum(-1))  # fmt: skip


@given(st.booleans(), st.sampled_from([None, 2]), st.sampled_from([4, 5, 16, 33]), st.sampled_from(DTYPES), st.integers(0, 1 << 30))
@law
def test_sums_of_candidates_are_those_of_the_plain_form(signed, max_spikes, points, dtype, seed):
    """Candidates of a search may have thresholds below 0."""
    numbers = torch.Generator().manual_seed(seed)
    N, M, Q, T = 3, 4, 6, 5
    rows = Rows(*(torch.rand(*shape, generator=numbers, dtype=dtype) - 0.1 for shape in ((N, M, T), (N, M, T), (N, M, T), (N, M))))
    x, weight, share = (torch.rand(N, 1, Q, points, generator=numbers, dtype=dtype) for _ in range(3))
    arguments = (x, weight, share, rows, Digits(signed=signed, max_spikes=max_spikes))
    for found, wanted in zip(native.candidates(*arguments), segment_sums(*arguments), strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_it_does_not_serve_is_left_to_the_plain_form():
    x = torch.linspace(-1, 1, 50).view(1, 1, -1)
    below = Rows(torch.tensor([[-0.1, 0.2]]), torch.tensor([[0.3, 0.1]]), torch.tensor([[0.4, 0.2]]), torch.zeros(1))
    signed = Digits(signed=True)
    assert torch.equal(native.encode(x, below, signed), encode_plain(x, below, signed))  # +1 and -1 at once is 0
    many = Digits(intervals=40)
    rows, cuts = code(many, 1, 3, torch.float32, torch.Generator().manual_seed(0))
    assert torch.equal(native.encode(x, rows, many, cuts), encode_plain(x, rows, many, cuts))
    table = base2_table(1.0, 4)
    assert native.encode(x.double(), table.rows, table.digits).dtype == torch.float64
    learnt = table.rows.map(lambda row: row.clone().requires_grad_())
    native.encode(x, learnt, table.digits).sum().backward()
    assert learnt.d.grad is not None


@given(
    st.none() | every_digits.filter(lambda digits: digits.sides == 1), st.sampled_from([1, 3, 8, 9, 21, 150]), st.integers(1, 300),
    st.sampled_from([4, 24, 37, 64, 80]), st.booleans(), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
@law
def test_mixtures_are_those_of_the_plain_form(digits, L, S, E, own, prefix, seed):
    """In float64: no exponential is so near a threshold that rounding decides. No digits: exponentials pass whole."""
    numbers = torch.Generator().manual_seed(seed)
    N, H, K = 2, 4, 2
    rows, cuts = code(digits, H if own else 1, 5, torch.float64, numbers) if digits else (None, None)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64)

    query, key, value = randn(N, L, H, E).transpose(1, 2), randn(N, K, S + 3, E)[:, :, 3:], randn(N, K, S, E)
    sinks = (randn(1, K, 2, E), randn(1, K, 2, E)) if prefix else None
    mask = (torch.rand(1, 1, L, S, generator=numbers) < 0.7).expand(N, -1, -1, -1)
    given_scores = (query, key, value, mask, E**-0.5, sinks, rows, digits or Digits(), cuts)
    found = native.mixture(*given_scores, 8)
    torch.testing.assert_close(found, coded_mixture(*given_scores), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture_plain(*given_scores, 8), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "T"), [(torch.float32, 20), (torch.float64, 32)])
@pytest.mark.parametrize("L", [2, 12])
def test_with_a_fine_code_it_is_the_softmax(dtype, T, L):
    """Against softmax itself: exponentials between 0 and 1 meet a code whose steps are 2^-T."""
    query, key, value = (torch.randn(1, 2, n, 32, dtype=dtype, generator=torch.Generator().manual_seed(n)) for n in (L, 90, 90))
    mask = torch.ones(1, 1, L, 90, dtype=torch.bool)
    fine = base2_table(1.0, T).to(dtype)
    rows = Rows(*(part * 2 for part in fine.rows))
    found = native.mixture(query, key, value, mask, 0.7, None, rows, fine.digits, None, 8)
    wanted = (query.double() @ key.double().mT * 0.7).softmax(-1) @ value.double()
    assert (found - wanted).abs().max() < 90 * 2.0**-T


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_transformers(dtype):
    """Which computes in float32 whatever comes: in float64 the closed form."""
    for width in (3, 64, 577):
        x = 5 * torch.randn(2, 7, width, dtype=dtype, generator=torch.Generator().manual_seed(width))
        weight = torch.randn(width, dtype=dtype, generator=torch.Generator().manual_seed(1))
        norm = LlamaRMSNorm(width, eps=1e-5)
        norm.weight.data = weight
        exact = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        found = native.norm(x, weight, 1e-5)
        torch.testing.assert_close(found, exact.to(dtype))
        torch.testing.assert_close(found.float(), norm(x).detach().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 8, 16, 64, 128, 576, 1536, 11008])
def test_transforms_are_products_with_the_matrix(n, dtype):
    left, right, _ = hadamard_factors(n, dtype=dtype)
    x = torch.randn(3, 2, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    found = native.hadamard(x, left, right)
    torch.testing.assert_close(found, kronecker(x, left, right), rtol=1e-4, atol=1e-5)
    matrix = torch.kron(hadamard_matrix(len(left)), hadamard_matrix(len(right)))
    wanted = x.double() @ matrix / n**0.5
    torch.testing.assert_close(
        found.double(), wanted, rtol=1e-4 if dtype is torch.float32 else 1e-11, atol=1e-5 if dtype is torch.float32 else 1e-11
    )


@pytest.mark.parametrize(("kernel", "parameters"), [
    (native.norm, (torch.linspace(0.5, 2, 32, dtype=torch.float64), 1e-5)),
    (native.hadamard, hadamard_factors(32, dtype=torch.float64)[:2]),
    (native.hadamard, hadamard_factors(192, dtype=torch.float64)[:2]),
])  # fmt: skip
def test_numbers_are_the_same_where_gradients_are_asked_for_and_these_are_right(kernel, parameters):
    width = 192 if kernel is native.hadamard and len(parameters[0]) > 1 else 32
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asked = x.clone().requires_grad_()
    assert torch.equal(kernel(asked, *parameters).detach(), kernel(x, *parameters))
    assert torch.autograd.gradcheck(lambda x: kernel(x, *parameters), asked)


@given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(0, 1 << 30))
@law
def test_blocks_end_where_the_plain_form_says(L, S, size, density, seed):
    mask = torch.rand(2, 1, L, S, generator=torch.Generator().manual_seed(seed)) < density
    assert native.ends(mask, size) == visible_ends(mask, size)
    shared = mask[:1].expand(3, -1, -1, -1)
    assert native.ends(shared, size) == visible_ends(shared, size)


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(DTYPES), st.integers(0, 1 << 30))
@law
def test_histograms_are_those_of_the_plain_form(outer, groups, two_sided, weighed, masked, dtype, seed):
    """Counts and peaks to the last number; importance comes row by row or number by number, sums of it are rounded in another order."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(outer, 5, groups, 37, generator=numbers) * 10.0 ** torch.randint(-13, 7, (outer, 5, groups, 37), generator=numbers)
    special = torch.tensor([0.0, -0.0, torch.nan, -torch.inf, 2.0**24, 1e-45])
    x.view(-1)[: len(special)] = special
    x = x.transpose(1, 2)  # [A, C, J, K], not contiguous
    importance = torch.rand(outer, 1, 5, 1 if seed % 2 else 37, generator=numbers, dtype=dtype).expand(x.shape) if weighed else None
    neurons = (torch.rand(1, 1, 5, 37, generator=numbers) < 0.6).expand(x.shape) if masked else None
    rows = (2 if two_sided else 1) * groups
    found, wanted = (
        Tally(torch.ones(rows, BINS, dtype=torch.int64), torch.ones(rows, BINS, dtype=torch.float64), torch.zeros(rows)) for _ in range(2)
    )
    native.tally(x, importance, neurons, found)
    tally_plain(x, importance, neurons, wanted)
    assert torch.equal(found.counts, wanted.counts)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-12, atol=0)
    for side in range(rows // groups):  # a side without numbers has no NaN of its own
        some = slice(side * groups, (side + 1) * groups)
        finite = wanted.peaks[some].isfinite()
        assert torch.equal(found.peaks[some][finite], wanted.peaks[some][finite])
    assert (found.peaks.isfinite().view(-1, groups).all(0) == wanted.peaks.isfinite().view(-1, groups).all(0)).all()


def test_sums_of_importance_do_not_depend_on_threads():
    """In parts of their own, added in their order."""
    numbers = torch.Generator().manual_seed(0)
    x, importance = torch.randn(1, 1, 700, 600, generator=numbers), torch.rand(1, 1, 700, 600, generator=numbers)
    found = []
    for threads in (1, 3):
        tally = Tally(torch.zeros(1, BINS, dtype=torch.int64), torch.zeros(1, BINS, dtype=torch.float64), torch.zeros(1))
        with cores.threads(threads):
            native.tally(x, importance, None, tally)
        found.append(tally)
    assert torch.equal(found[0].weights, found[1].weights)
    assert torch.equal(found[0].counts, found[1].counts)
    assert found[0].counts.sum() == x.numel()
    assert found[0].weights.sum().item() == pytest.approx(importance.double().sum().item())


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library was built or loaded before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in (build.built, bindings.loaded):
        each.cache_clear()
    yield tmp_path
    for each in (build.built, bindings.loaded):
        each.cache_clear()


QUICKLY = ("-std=c++17", "-O0", "-fPIC", "-w")  # what is compiled, not how well


def test_it_is_compiled_once_for_a_machine(fresh, monkeypatch):
    monkeypatch.setattr(build, "ALWAYS", QUICKLY)
    first = build.built()
    assert first is not None
    assert first.parent == fresh / "spikellm"
    assert list(first.parent.iterdir()) == [first]
    build.built.cache_clear()
    monkeypatch.setattr(build, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert build.built() == first


def test_whoever_asks_while_it_is_compiled_waits_for_that(fresh, monkeypatch):
    compiled, original = [], build._compiled
    monkeypatch.setattr(build, "ALWAYS", QUICKLY)
    monkeypatch.setattr(build, "_compiled", lambda *given: compiled.append(given) or original(*given))
    build.begin()
    assert build.built() is not None
    assert bindings.loaded() is not None
    assert len(compiled) == 1


def test_a_compiler_that_is_stopped_is_not_asked_again(fresh, monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    dying = f'case "$*" in *version*) exit 0;; esac; echo once >> {asked}; kill -TERM $$'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, dying))
    assert build.built() is None
    assert len(asked.read_text().split()) <= len(list(build.SOURCES.glob("*.cpp")))  # side by side, with the same options


def test_where_nobody_has_a_home_it_is_kept_among_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr("spikellm.kernels.build.os.path.expanduser", lambda path: path)
    monkeypatch.setattr("spikellm.kernels.build.tempfile.gettempdir", lambda: str(tmp_path))
    folder = build._folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0


def compiler_that(folder: Path, does: str) -> str:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of other widths are those of x86")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_registers_of_other_widths_make_the_same_numbers(fresh, monkeypatch, level):
    monkeypatch.setattr(build, "FLAGS", ((f"-march={level}", "-fopenmp"),))
    monkeypatch.setattr(build, "ALWAYS", ("-std=c++17", "-O1", "-fPIC", "-w"))  # registers are named in the code, and taken at any level
    numbers = torch.Generator().manual_seed(0)
    for signed, sides, intervals in product((False, True), (1, 2), (1, 2)):
        digits = Digits(signed=signed, sides=sides, intervals=intervals)
        for dtype in DTYPES:
            rows, cuts = code(digits, 2, 5, dtype, numbers)
            x = awkward(torch.randn(2, 2, 77, generator=numbers, dtype=dtype), rows)
            assert torch.equal(native.encode(x, rows, digits, cuts), encode_plain(x, rows, digits, cuts))
            assert torch.equal(native.fire(x, rows, digits, cuts), fire_plain(x, rows, digits, cuts))
    left, right, _ = hadamard_factors(576, dtype=torch.float64)
    x = torch.randn(2, 576, dtype=torch.float64, generator=numbers)
    torch.testing.assert_close(native.hadamard(x, left, right), kronecker(x, left, right))
    test_with_a_fine_code_it_is_the_softmax(L=12, dtype=torch.float64, T=32)
    assert build.built() is not None


def test_a_compiler_that_knows_less_is_asked_for_less(fresh, monkeypatch, tmp_path):
    refusing = 'case "$*" in *march=native*) echo "unknown -march=native" >&2; exit 1;; esac; exec g++ "$@"'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, refusing))
    monkeypatch.setattr(build, "ALWAYS", QUICKLY)
    x, table = torch.linspace(-1, 1, 50).view(1, 1, -1), base2_table(1.0, 4)
    assert build.built() is not None
    assert torch.equal(native.encode(x, table.rows, table.digits), encode_plain(x, table.rows, table.digits))


def test_a_compiler_that_fails_is_named_and_neurons_run_plain(fresh, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'case "$*" in *version*) exit 0;; esac; echo "out of order" >&2; exit 1'))
    x, table = torch.linspace(-1, 1, 50).view(1, 1, -1), base2_table(1.0, 4)
    assert torch.equal(native.encode(x, table.rows, table.digits), encode_plain(x, table.rows, table.digits))
    assert "could not compile" in caplog.text
    assert "out of order" in caplog.text


def test_compiling_side_by_side_keeps_the_message_of_the_source_that_failed(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("this is no C++;")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build._compiled("g++", [source], (), tmp_path)
    assert "wrong.cpp" in failure.value.stderr


def test_a_table_of_other_rows_is_used_at_once():
    """No address is kept between two calls."""
    x = torch.linspace(-1, 1, 9).view(1, 1, -1)
    first, second = base2_table(1.0, 4), base2_table(0.5, 4)
    assert isinstance(first, PhaseTable)
    assert not torch.equal(encode(x, first), encode(x, second))
    assert torch.equal(encode(x, second), encode(x, second, compiled=False))
