"""The Triton of GPUs where there is none: run by Triton's interpreter, compiled for cards that are not here, and never in a CPU's way."""

import os
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest
import torch

from spikellm.kernels.attention import mixture_plain
from spikellm.kernels.compiled import fused
from spikellm.kernels.encode import Digits, count_plain, encode_plain, fire_plain
from tests.codes import partitioned_table
from tests.places import ROOT

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SHARED = 99 * 2**10  # bytes of shared memory that a block of threads may have on every card since Ampere, consumers' among them


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.first
@pytest.mark.parametrize("what", ["neurons", "attention"])
def test_under_the_interpreter(what):
    """In a process of its own: Triton is told before it is imported, and everything that this process compiles would go that way."""
    cases = Path(__file__).with_name(f"interpreted_{what}.py")
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases), TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_a_cpu_never_imports_it():
    """Once it is installed, torch's own compiler does, which transformers imports: 0.2 s."""
    script = """
import sys, torch, spikellm
from spikellm.coding.neuron import PhaseTable, count_spikes, encode, fire
x, table = torch.zeros(1, 1, 3), PhaseTable(*torch.ones(3, 1, 2), torch.zeros(1))
encode(x, table), fire(x, table, compiled=True), count_spikes(x, table)
print("triton" in sys.modules)
from spikellm.model.conversion import fill, prepare
from tests.codes import base2_tables
from tests.models import tiny_model
model = tiny_model()
prepare(model, rotation_seed=0)
fill(model, base2_tables(model), compiled=True)
model(torch.tensor([[1, 2, 3]]))
print([name for name in sys.modules if name.startswith("spikellm.kernels.") and ("triton" in name or "gpu" in name)])
"""
    run = python("-c", script)
    assert run.stdout.split("\n") == ["False", "[]", ""], run.stdout + run.stderr


@pytest.fixture
def binaries(monkeypatch, tmp_path):
    """Kernels are compiled, and not started, for a card of a compute capability: [(name, compiled)] in the order of their starts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spikellm.kernels import gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "INTERPRETED", True)  # which takes a CPU's tensors
    found: list = []
    names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
             torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}  # fmt: skip

    def kind(value: object) -> str:
        if isinstance(value, torch.Tensor):
            return "*" + names[value.dtype]
        return "constexpr" if value is None or value == 1 or not isinstance(value, int) else "i32"  # as Triton does at a start

    def for_card(capability: int) -> list:
        def run(kernel, *arguments, grid, warmup, num_warps=4, **options):
            known = signature(kernel.fn)
            bound = known.bind(*arguments, **options).arguments
            fixed = {name for name, each in known.parameters.items() if each.annotation is triton.language.constexpr}
            kinds = {name: "constexpr" if name in fixed else kind(value) for name, value in bound.items()}
            constants = {(kernel.arg_names.index(name),): bound[name] for name, each in kinds.items() if each == "constexpr"}
            source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            found.append((kernel.__name__, compiled))

        monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
        return found

    return for_card


@needs_triton
def test_neurons_compile_for_cards(binaries):
    from spikellm.kernels import gpu

    found = binaries(80)
    digits = Digits(intervals=2, sides=2, signed=True, max_spikes=2)
    for groups, dtype in ((1, torch.bfloat16), (2, torch.float64)):
        table = partitioned_table([1.0] * groups, 4, digits).to(torch.promote_types(dtype, torch.float32))
        x = torch.zeros(groups, groups, 3, dtype=dtype)
        for plain in (encode_plain, fire_plain, count_plain):
            gpu.KERNELS[plain](x, table.rows, digits, table.cuts)
    assert [name for name, _ in found] == ["encode_kernel", "fire_kernel", "count_kernel"] * 2
    assert all(compiled.metadata.shared <= SHARED and compiled.asm["cubin"] for _, compiled in found)


@needs_triton
@pytest.mark.parametrize(("capability", "E", "L", "own", "prefix", "before"), [
    (90, 128, 70, True, True, False),
    (90, 128, 1, True, True, False),
    (80, 64, 70, False, False, False),
    (80, 256, 70, False, False, True),
    (90, 80, 3, False, False, True),
])  # fmt: skip
def test_attention_compiles_for_cards(binaries, capability, E, L, own, prefix, before):
    from spikellm.kernels import gpu

    found = binaries(capability)
    H, K, digits = 4, 1 if own else 4, Digits(intervals=2) if own else Digits(signed=True)  # without cuts
    table = partitioned_table([1.0] * (H if own else 1), 8, digits)
    query, key, value = torch.zeros(1, H, L, E), torch.zeros(1, K, L, E), torch.zeros(1, K, L, E)
    sinks = (torch.zeros(1, K, 1, E), torch.zeros(1, K, 1, E)) if prefix else None
    mask = torch.ones(1, 1, L, L, dtype=torch.bool)
    gpu.attended(query, key, value, mask, E**-0.5, sinks, table.rows, digits, table.cuts, before=before)
    few = ["survey_kernel", "gather_kernel", "conclude_kernel"]
    assert [name for name, _ in found] == (few if L == 1 or L == 3 else ["ends_kernel", "attend_kernel"])
    assert all(compiled.metadata.shared <= SHARED and compiled.asm["cubin"] for _, compiled in found)


@needs_triton
def test_on_cuda_functions_are_tritons_or_inductors():
    from spikellm.kernels import gpu

    assert all(fused(plain, "cuda") is kernel for plain, kernel in gpu.KERNELS.items())
    assert {encode_plain, count_plain, fire_plain, mixture_plain} < set(gpu.KERNELS)

    def unknown(x):
        return x + 1

    assert fused(unknown, "cuda") is not unknown


@needs_triton
def test_without_a_gpu_its_kernels_leave_everything_to_the_plain_form():
    from spikellm.kernels import gpu

    table, x = partitioned_table([1.0], 4, Digits(intervals=2)), torch.linspace(-1, 1, 50).view(1, 1, -1)
    assert torch.equal(gpu.encode(x, table.rows, table.digits, table.cuts), encode_plain(x, table.rows, table.digits, table.cuts))
