"""What the stages share: what each result depends on, the artefact store, and models loaded no earlier than needed."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spikellm.calibration.calibrate import Calibration, calibrate
from spikellm.config.schema import Config, Device, Execution, InputError, ModelConfig
from spikellm.evaluation import figures, texts
from spikellm.evaluation.networks import Networks
from spikellm.evaluation.perplexity import readout_perplexities
from spikellm.execution.memory import fitting_chunk
from spikellm.execution.stepped import stepped
from spikellm.model.load import load_tokenizer, pinned, vocabulary
from spikellm.model.sites import HEAD
from spikellm.search.fit import CodeFit, load_fits, save_fits
from spikellm.search.methods import find_codes, search_summary
from spikellm.search.published import file_hash
from spikellm.search.search import base2_search
from spikellm.store.artifacts import Artefact, ArtifactStore, artifact_key, write_json
from spikellm.store.provenance import code
from spikellm.store.sources import model_source, text_source

log = logging.getLogger(__name__)


class Workspace:
    """What the stages share: the configuration, the artefact store, and models loaded no earlier than needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = ArtifactStore(Path(config.output_root) / "artifacts")

    @cached_property
    def model(self) -> ModelConfig:
        """What is loaded: one commit of a hub id for everything."""
        return pinned(self.config.model)

    @cached_property
    def models(self) -> Networks:
        config = self.config
        return Networks(self.model, config.hardware, config.rotation, config.snn.softmax_norm)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.model)

    @cached_property
    def vocabulary(self) -> int | None:
        return vocabulary(self.model)

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        return model_source(self.model, self.store.digests)

    @cached_property
    def calibrate_inputs(self) -> dict[str, Any]:
        config = self.config
        return {
            "code": code("calibrate"),
            "model": self.model_inputs,
            "rotation": plain(config.rotation),
            "prefix": plain(config.prefix),
            "softmax_norm": config.snn.softmax_norm.value,
            "text": text_source(config.dataset.calibration, self.store.digests),
        }

    @cached_property
    def search_inputs(self) -> dict[str, Any]:
        snn, options = self.config.snn, plain(self.config.search)
        if options["import_file"] is not None:  # what is in the file, not where it lies
            options["import_file"] = file_hash(Path(options["import_file"]))
        wanted = {"T": snn.T, "grain": snn.grain, "min_grain_length": snn.min_grain_length, "coding": snn.coding.value}
        return {
            "code": code("search"),
            "calibrate": artifact_key(self.calibrate_inputs),
            "snn": wanted | ({} if snn.max_spikes is None else {"max_spikes": snn.max_spikes}),
            "search": options,
            "seed": self.config.seed,
        }

    @cached_property
    def convert_inputs(self) -> dict[str, Any]:
        return {"code": code("convert"), "search": artifact_key(self.search_inputs), "save_model": self.config.save_model}

    @cached_property
    def calibration_windows(self) -> torch.Tensor:
        """[W, L]."""
        return texts.token_windows(self.config.dataset.calibration, "dataset.calibration", self.tokenizer, self.vocabulary)

    @cached_property
    def networks(self) -> dict[str, figures.Network]:
        """What is measured, by name, the spiking ones first: they share the converted model, which then makes room for the ANN."""
        device = {"device": self.config.hardware.device.value}
        calibrate, search = artifact_key(self.calibrate_inputs), artifact_key(self.search_inputs)
        snn, is_stepped = self.config.snn, self.config.snn.execution is Execution.stepped

        def prefix() -> list[int]:
            return self.calibration()[0].prefix_tokens

        def base2() -> PreTrainedModel:
            return self._spiking(base2_search(self.calibration()[0].statistics, snn.T))

        networks = [
            figures.Network(
                name="snn",
                inputs=device
                | {"code": code("evaluate stepped" if is_stepped else "evaluate"), "search": search, "execution": snn.execution.value},
                build=self.spiking,
                prefix_tokens=prefix,
                measure=self._stepped_perplexity if is_stepped else figures.folded_perplexity,
            ),
            figures.Network(
                name="base2",
                inputs=device | {"code": code("evaluate base2"), "calibrate": calibrate, "T": snn.T},
                build=base2,
                prefix_tokens=prefix,
            ),
            figures.Network(
                name="ann_prefix",
                inputs=device | {"code": code("evaluate"), "calibrate": calibrate},
                build=self.transparent,
                prefix_tokens=prefix,
            ),
            figures.Network(
                name="ann",
                inputs=device | {"code": code("evaluate ann"), "model": self.model_inputs},
                build=self.models.ann,
                prefix_tokens=list,
            ),
        ]
        return {network.name: network for network in networks}

    @cached_property
    def benchmarks(self) -> figures.Benchmarks:
        return figures.Benchmarks(self.config.dataset.zero_shot)

    def prepare_evaluation(self) -> None:
        """Read texts and benchmarks, and refuse what cannot be read, before the long work starts."""
        if not self.store.holds("calibrate", self.calibrate_inputs):
            log.debug("calibration: %d windows", len(self.calibration_windows))
        figures.prepare(self.config.dataset, lambda: self.tokenizer, self.store, self.networks.values(), self.benchmarks)

    @property
    def evaluation_windows(self) -> torch.Tensor:
        """Windows of the main evaluation text [W, L]."""
        return texts.token_windows(self.config.dataset.evaluation, "dataset.evaluation", self.tokenizer, self.vocabulary)

    def snn_inputs(self, stage: str, **more: Any) -> dict[str, Any]:
        """What figures of the folded spiking model on the main text depend on, computed by the code of `stage`."""
        text = text_source(self.config.dataset.evaluation, self.store.digests)
        device = self.config.hardware.device.value
        return {"code": code(stage), "search": artifact_key(self.search_inputs), "device": device, "text": text} | more

    @property
    def rotation_record(self) -> dict[str, Any]:
        rotation = self.config.rotation
        record = {"kind": rotation.kind.value, "seed": rotation.seed, "parts": rotation.acting}
        return record | {"hash": artifact_key(record | {"model": self.model_inputs})}

    def transparent(self) -> PreTrainedModel:
        """The rotated model with its prefix and without neurons."""
        return self.models.transparent(self.calibration()[0].prefix_tokens)

    def spiking(self) -> PreTrainedModel:
        """The spiking model with the codes that were found: prefix attached, a neuron at every site."""
        return self._spiking(self.fits()[0])

    def _spiking(self, fits: dict[str, CodeFit]) -> PreTrainedModel:
        return self.models.spiking({name: fit.table for name, fit in fits.items()}, self.calibration()[0].prefix_tokens)

    def _stepped_perplexity(self, model: PreTrainedModel, windows: torch.Tensor, label: str) -> dict[str, Any]:
        """Perplexity with spikes step by step, and what the logits give after 1 .. T steps."""
        snn = self.config.snn
        chunk = fitting_chunk(model, windows.shape[1], chunk=snn.step_chunk, max_gib=snn.max_memory_gib)
        log.info("stepped execution: %d of %d time steps per matrix product", chunk, snn.T)
        with stepped(model, chunk=chunk):
            readouts: Any = model.get_submodule(HEAD)
            curve = readout_perplexities(model, windows, readouts=readouts.readouts, label=f"{label}, stepped")
        return asdict(curve[-1]) | {"anytime": [point.value for point in curve]}

    def calibration(self) -> tuple[Calibration, Artefact]:
        """Statistics of every site and the prefix tokens."""
        artefact = self.store.load_or_compute("calibrate", self.calibrate_inputs, self._calibrate)
        return Calibration.load(artefact.folder), artefact

    def fits(self) -> tuple[dict[str, CodeFit], Artefact]:
        """One code per site."""
        artefact = self.store.load_or_compute("search", self.search_inputs, self._search)
        return load_fits(artefact.folder / "codes.safetensors"), artefact

    def _calibrate(self, folder: Path) -> None:
        windows, model = self.calibration_windows, self.models.transparent([])
        try:
            found = calibrate(model, windows, self.config.prefix)
        except ValueError as error:
            raise InputError(f"calibrate with model={self.config.model.name}, dataset={self.config.dataset.name}: {error}") from error
        found.save(folder)

    def _search(self, folder: Path) -> None:
        device = "cpu" if self.config.hardware.device is Device.cpu else "cuda"
        statistics = {name: site.to(device) for name, site in self.calibration()[0].statistics.items()}
        start = time.perf_counter()
        fits = find_codes(self.config, statistics)
        save_fits(folder / "codes.safetensors", fits)
        write_json(folder / "search.json", {"seconds": round(time.perf_counter() - start, 3)} | search_summary(fits))


def plain(node: Any) -> dict[str, Any]:
    """A config node in JSON types."""
    return {key: getattr(value, "value", value) for key, value in asdict(node).items()}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within: torch computes with `count` CPU threads; None: with its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
