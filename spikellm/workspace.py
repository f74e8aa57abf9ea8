"""What the stages share: what each result depends on, the artefact store, and models loaded no earlier than needed."""

import gc
import logging
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spikellm import conversion, data, evaluation, rotation
from spikellm.artifacts import ArtifactStore, artifact_key, write_json
from spikellm.calibration import Calibration, calibrate
from spikellm.code_fit import CodeFit, load_fits, save_fits
from spikellm.config import Config, Device, Execution, InputError, RotationKind, SoftmaxNorm
from spikellm.fitting import find_codes, search_summary
from spikellm.hadamard import HAS_CUDA_KERNEL
from spikellm.model import load_model, load_tokenizer, source_fingerprint, vocabulary
from spikellm.prefix import attach_prefix
from spikellm.published import file_hash
from spikellm.search import base2_search
from spikellm.sites import HEAD
from spikellm.stepped import fitting_chunk, stepped

log = logging.getLogger(__name__)

# Changes when what calibrate or search write no longer means the same.
ARTIFACT_SCHEMA = 2


class Workspace:
    """What the stages share: the configuration, the artefact store, and models loaded no earlier than needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = ArtifactStore(Path(config.output_root) / "artifacts")
        self._installed: PreTrainedModel | None = None
        self.benchmarks: dict[str, Any] = {}
        if config.hardware.threads is not None:
            torch.set_num_threads(config.hardware.threads)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return load_tokenizer(self.config.model)

    @cached_property
    def vocabulary(self) -> int | None:
        return vocabulary(self.config.model)

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        return source_fingerprint(self.config.model)

    @cached_property
    def calibrate_inputs(self) -> dict[str, Any]:
        config = self.config
        return {
            "schema": ARTIFACT_SCHEMA,
            "model": self.model_inputs,
            "rotation": plain(config.rotation),
            "prefix": plain(config.prefix),
            "softmax_norm": config.snn.softmax_norm.value,
            "text": data.fingerprint(config.dataset.calibration, "dataset.calibration"),
        }

    @cached_property
    def search_inputs(self) -> dict[str, Any]:
        snn, options = self.config.snn, plain(self.config.search)
        if options["import_file"] is not None:  # what is in the file, not where it lies
            options["import_file"] = file_hash(Path(options["import_file"]))
        code = {"T": snn.T, "grain": snn.grain, "min_grain_length": snn.min_grain_length, "coding": snn.coding.value}
        return {
            "schema": ARTIFACT_SCHEMA,
            "calibrate": artifact_key(self.calibrate_inputs),
            "snn": code | ({} if snn.max_spikes is None else {"max_spikes": snn.max_spikes}),
            "search": options,
            "seed": self.config.seed,
        }

    @cached_property
    def calibration_windows(self) -> torch.Tensor:
        """[W, L]."""
        return data.token_windows(self.config.dataset.calibration, "dataset.calibration", self.tokenizer, self.vocabulary)

    @cached_property
    def networks(self) -> list[evaluation.Network]:
        """What is measured, the spiking ones first: they share the converted model, which then makes room for the ANN."""

        def ann() -> PreTrainedModel:
            self.release()
            return self.ann()

        common = {"schema": ARTIFACT_SCHEMA, "device": self.config.hardware.device.value}
        calibrate, search = artifact_key(self.calibrate_inputs), artifact_key(self.search_inputs)
        snn = {"search": search, "execution": self.config.snn.execution.value}
        base2 = {"calibrate": calibrate, "T": self.config.snn.T}

        def prefix() -> list[int]:
            return self.calibration()[0].prefix_tokens

        def base2_fits() -> dict[str, CodeFit]:
            return base2_search(self.calibration()[0].statistics, self.config.snn.T)

        measure = self._stepped_perplexity if self.config.snn.execution is Execution.stepped else evaluation.folded_perplexity
        return [
            evaluation.Network(
                name="snn", inputs=common | snn, build=lambda: self.spiking(self.fits()[0]), prefix_tokens=prefix, measure=measure
            ),
            evaluation.Network(name="base2", inputs=common | base2, build=lambda: self.spiking(base2_fits()), prefix_tokens=prefix),
            evaluation.Network(name="ann", inputs=common | {"model": self.model_inputs}, build=ann, prefix_tokens=list),
        ]

    def prepare_evaluation(self) -> None:
        """Read texts and benchmarks, and refuse what cannot be read, before the long work starts."""
        if not self.store.folder("calibrate", self.calibrate_inputs).is_dir():
            log.debug("calibration: %d windows", len(self.calibration_windows))
        self.benchmarks = evaluation.prepare(self.config.dataset, lambda: self.tokenizer, self.store, self.networks)

    @property
    def evaluation_windows(self) -> torch.Tensor:
        """Windows of the main evaluation text [W, L]."""
        return data.token_windows(self.config.dataset.evaluation, "dataset.evaluation", self.tokenizer, self.vocabulary)

    @property
    def snn_inputs(self) -> dict[str, Any]:
        """What figures of the spiking model on the main text depend on."""
        return self.networks[0].inputs | {"text": data.fingerprint(self.config.dataset.evaluation, "dataset.evaluation")}

    @property
    def rotation_record(self) -> dict[str, Any]:
        kind, seed = self.config.rotation.kind.value, self.config.rotation.seed
        return {"kind": kind, "seed": seed, "hash": artifact_key({"kind": kind, "seed": seed, "model": self.model_inputs})}

    def ann(self) -> PreTrainedModel:
        """The model as it was pretrained, loaded afresh."""
        return load_model(self.config.model, self.config.hardware)

    def installed(self) -> PreTrainedModel:
        """The rotated model with transparent neuron slots and no prefix yet."""
        if self._installed is None:
            model = self.ann()
            rotated = self.config.rotation.kind is RotationKind.hadamard
            if rotated:
                try:
                    rotation.rotate(model, seed=self.config.rotation.seed)
                except ValueError as error:
                    raise InputError(f"rotation.kind=hadamard with model={self.config.model.name}: {error}") from error
            if rotated:
                log.info("rotation: online transforms by %s", "fast-hadamard-transform" if HAS_CUDA_KERNEL else "matrix products")
            after = self.config.snn.softmax_norm is SoftmaxNorm.after
            conversion.install(model, rotated=rotated, normalise_after=after, query_block=self.config.hardware.query_block)
            self._installed = model
        return self._installed

    def spiking(self, fits: dict[str, CodeFit]) -> PreTrainedModel:
        """The spiking model for `fits`: prefix attached, a neuron at every site."""
        model = self.installed()
        conversion.clear(model)
        attach_prefix(model, self.calibration()[0].prefix_tokens)
        conversion.convert(model, {name: fit.table for name, fit in fits.items()}, compiled=self.config.hardware.compile)
        return model

    def _stepped_perplexity(self, model: PreTrainedModel, windows: torch.Tensor, label: str) -> dict[str, Any]:
        """Perplexity with spikes step by step, and what the logits give after 1 .. T steps."""
        snn = self.config.snn
        chunk = fitting_chunk(model, windows.shape[1], chunk=snn.step_chunk, max_gib=snn.max_memory_gib)
        log.info("stepped execution: %d of %d time steps per matrix product", chunk, snn.T)
        with stepped(model, chunk=chunk):
            readouts: Any = model.get_submodule(HEAD)
            curve = evaluation.readout_perplexities(model, windows, readouts=readouts.readouts, label=f"{label}, stepped")
        return asdict(curve[-1]) | {"anytime": [point.value for point in curve]}

    def release(self) -> None:
        """Drop the converted model, so that another fits into memory."""
        self._installed = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def calibration(self) -> tuple[Calibration, bool]:
        """Statistics of every site and the prefix tokens, and whether they were there already."""
        folder, cached = self.store.load_or_compute("calibrate", self.calibrate_inputs, self._calibrate)
        return Calibration.load(folder), cached

    def fits(self) -> tuple[dict[str, CodeFit], Path, bool]:
        """One code per site, the artefact's folder, and whether it was there already."""
        folder, cached = self.store.load_or_compute("search", self.search_inputs, self._search)
        return load_fits(folder / "codes.safetensors"), folder, cached

    def _calibrate(self, folder: Path) -> None:
        windows, model = self.calibration_windows, self.installed()
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
