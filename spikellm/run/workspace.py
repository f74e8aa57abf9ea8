"""What the stages share: the configuration, the artefact store, the model, its texts, loaded no earlier than needed."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from spikellm.config.model import ModelConfig
from spikellm.config.schema import Config
from spikellm.evaluation import figures, texts
from spikellm.evaluation.networks import Networks, SavedNetworks
from spikellm.model.load import load_tokenizer, pinned, vocabulary
from spikellm.model.offload import Keep
from spikellm.search.options import Options
from spikellm.store.artifacts import ArtifactStore
from spikellm.store.saved import Provenance, provenance_of
from spikellm.store.sources import model_source, text_source


class Workspace:
    """See the module's text. What a job reads is fingerprinted once, so that all its keys speak of the same content."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = ArtifactStore(Path(config.output_root) / "artifacts")

    @property
    def options(self) -> Options:
        """Of the codes."""
        return Options.of(self.config)

    @property
    def device(self) -> str:
        """Where the network is run: cpu, cuda or auto."""
        return self.config.hardware.device.value

    @cached_property
    def model(self) -> ModelConfig:
        """What is loaded: one commit of a hub id for everything."""
        return pinned(self.config.model)

    @cached_property
    def models(self) -> Networks:
        """The networks, loaded when they are asked for."""
        config = self.config
        snn = config.snn
        return Networks(
            self.model,
            config.hardware,
            config.rotation,
            snn.softmax_norm,
            snn.amplitude,
            keeping=self.keeping,
            scratch=self.store.root / "scratch",
        )

    def keeping(self, what: Mapping[str, object]) -> Keep:
        """Where parts of the model are kept, each an artefact of its own; `what` they depend on beside the model."""

        def keep(part: str, compute: Callable[[Path], None]) -> Path:
            inputs = {"model": self.model_source, "part": part, **what}
            return self.store.load_or_compute("weights_on_disk", inputs, compute).folder

        return keep

    @cached_property
    def saved(self) -> SavedNetworks:
        """Those of a saved spiking model, where `model.path` is one."""
        return SavedNetworks(self.config.model, self.config.hardware)

    @cached_property
    def provenance(self) -> Provenance:
        """How that one was made."""
        return provenance_of(Path(self.config.model.path))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None: it has none, bytes are tokens."""
        return load_tokenizer(self.model)

    @cached_property
    def vocabulary(self) -> int | None:
        """Tokens that the model has embeddings for; None: a GGUF file, whose tokenizer is in it."""
        return vocabulary(self.model)

    @cached_property
    def calibration_windows(self) -> Int[torch.Tensor, "W L"]:
        """Token ids of the calibration text."""
        return texts.token_windows(self.config.dataset.calibration, "dataset.calibration", self.tokenizer, self.vocabulary)

    @cached_property
    def evaluation_windows(self) -> Int[torch.Tensor, "W L"]:
        """Of the main evaluation text."""
        return texts.token_windows(self.config.dataset.evaluation, "dataset.evaluation", self.tokenizer, self.vocabulary)

    @cached_property
    def benchmarks(self) -> figures.Benchmarks:
        """The zero-shot benchmarks, read when they are asked for."""
        return figures.Benchmarks(self.config.dataset.zero_shot)

    @cached_property
    def model_source(self) -> dict[str, object]:
        """Fingerprint of the model."""
        return model_source(self.model, self.store.digests)

    @cached_property
    def calibration_source(self) -> dict[str, object]:
        """Fingerprint of the calibration text."""
        return text_source(self.config.dataset.calibration, self.store.digests)

    @cached_property
    def evaluation_source(self) -> dict[str, object]:
        """Fingerprint of the main evaluation text."""
        return text_source(self.config.dataset.evaluation, self.store.digests)
