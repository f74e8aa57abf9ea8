"""The pretrained model and the machine that it runs on: the nodes `model` and `hardware`."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from spikellm.config.checks import check
from spikellm.config.choices import Device, DType, ModelSource

MAX_THREADS = 1024
MAX_NAME = 100  # of a name that becomes part of a path; file systems take 255 bytes [characters]


def path_part(name: object) -> str:
    """`name` as the part of a path that it can be: the folder of a run, which Hydra makes before any check, stays where it belongs."""
    return re.sub(r"[^\w.+ -]|^\.", "_", str(name))[:MAX_NAME]


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The pretrained model that is converted."""

    name: str = MISSING
    """short name, in results and folder names"""
    source: ModelSource = MISSING
    """where the weights come from"""
    path: str = MISSING
    """hub id, local folder, or package:file for gguf, or architecture for random, or folder of a saved spiking model"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    dtype: DType = DType.float32
    """of the weights; activations of spiking networks are float32 at least, rotation is float64"""
    seed: int = 0
    """of the weights; source=random only"""
    options: dict[str, Any] = field(default_factory=dict)
    """the architecture's config, with model_type if model.path does not name it; source=random only"""

    def __post_init__(self) -> None:
        plain = self.name.isprintable() and not re.search(r"^\.|[/\\]", self.name) and 1 <= len(self.name) <= MAX_NAME
        check(plain, "model.name", repr(self.name), f"is part of a folder's name: 1 to {MAX_NAME} letters, no / or \\, no dot in front")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Where the network is run, and what it may take there."""

    device: Device = MISSING
    """where the network is run"""
    fused: bool = True
    """kernels (C++ on a CPU, Triton on CUDA) instead of the plain forms that specify them, many times slower"""
    query_block: int = 256
    """queries per block of attention; bounds memory where scores are held in it: without kernels, and where spikes are counted [tokens]"""
    threads: int | None = None
    """CPU threads; null: torch's choice, or fewer where the container has a share of fewer cores"""
    offload: bool | None = None
    """decoder layers stay on disk, one at a time is in memory; null: where the model does not fit"""
    max_memory_gib: float | None = None
    """of the weights, on the device; null: what is free there [GiB]"""

    def __post_init__(self) -> None:
        check(self.query_block >= 1, "hardware.query_block", self.query_block, "must be at least 1")
        allowed = self.threads is None or 1 <= self.threads <= MAX_THREADS
        check(allowed, "hardware.threads", self.threads, f"takes 1 to {MAX_THREADS}, or null")
        bound = self.max_memory_gib
        check(bound is None or bound > 0, "hardware.max_memory_gib", bound, "must be positive or null")
        several = self.offload is True and self.device is Device.auto
        check(not several, "hardware.offload", "true with hardware.device=auto", "layers come to one device; take hardware=gpu or cpu")
