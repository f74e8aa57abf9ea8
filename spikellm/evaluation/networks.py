"""The models of a job, loaded no earlier than needed, one at a time in memory.

ann           as pretrained
transparent   rotated, a slot at every site and nothing in it, the prefix attached: the ANN that the spiking networks approximate
spiking       the same model with a neuron in every slot
integer       the same model with integers there

saved         a spiking model from its folder, with its neurons or without

Those that are converted here have weights as they are, or integers (`weights.bits`), or others in their places (`tune.what=all`,
`compensate.enabled`). The ANN that figures are compared with has its own.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from spikellm.coding.neuron import PhaseTable, Slot
from spikellm.config.checks import InputError
from spikellm.config.choices import Amplitude, RotationKind, RotationPart, SoftmaxNorm
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.config.snn import RotationConfig
from spikellm.kernels import native
from spikellm.kernels.transforms import HAS_CUDA_KERNEL
from spikellm.model import conversion
from spikellm.model.intake import CURE
from spikellm.model.load import load_model, load_offloaded, load_spiking, stays_on_disk
from spikellm.model.offload import Keep, change_layers, rotate
from spikellm.model.prefix import attach_prefix, attached_prefix
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.replaced import WeightChange
from spikellm.model.rotation import orders
from spikellm.store.provenance import Code

log = logging.getLogger(__name__)

ROTATED = Code(1, ("model.rotation", "model.offload"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A network as the converted model is it: what its layers' weights are, and what sits in its slots."""

    occupants: Mapping[str, Slot]  # by site name; none: all slots are empty
    change: WeightChange | None = None  # of the weights


class Networks:
    """See the module's text. Each call gives the one converted model its state: what was asked for before is no longer valid."""

    def __init__(
        self,
        model: ModelConfig,
        hardware: HardwareConfig,
        rotation: RotationConfig,
        softmax_norm: SoftmaxNorm,
        amplitude: Amplitude = Amplitude.static,
        *,
        keeping: Callable[[Mapping[str, object]], Keep] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.model, self.hardware, self.rotation, self.softmax_norm, self.amplitude = model, hardware, rotation, softmax_norm, amplitude
        self.scratch = scratch  # for hidden states of an offloaded model
        self.keeping = keeping  # where layers of an offloaded model are kept, by what they depend on; None: all is in memory
        self._installed: PreTrainedModel | None = None
        self._change: WeightChange | None = None  # of the converted model's weights

    def ann(self) -> PreTrainedModel:
        """The model as it was pretrained, loaded afresh; the converted one makes room for it."""
        self.release()
        if self.keeping is None or not self.offloaded:
            return load_model(self.model, self.hardware)
        return load_offloaded(self.model, self.hardware, self.keeping({}), self.scratch)

    @cached_property
    def offloaded(self) -> bool:
        """Whether decoder layers stay on disk."""
        return self.keeping is not None and stays_on_disk(self.model, self.hardware)

    def transparent(self, prefix_tokens: list[int], change: WeightChange | None = None) -> PreTrainedModel:
        """The converted model with empty slots and the prefix of `prefix_tokens`, its weights as they are or as a `change` has them.

        Weights that were found after calibration were found behind the prefix of those before, which stays: integers that make up for
        their rounding on text know nothing of the prefix tokens' massive activations, and a sink that they compute is none.
        """
        replaced = change is not None and not change.calibrated
        if self._installed is None or self._change != change:
            self.release()  # weights as they are have no copy
            self._installed, self._change = self._install(), change
            if replaced:
                attach_prefix(self._installed, prefix_tokens)
            if change is not None:
                change_layers(self._installed, change)
        conversion.clear(self._installed)
        if not replaced and attached_prefix(self._installed) != prefix_tokens:  # layers on disk would all be read for it
            attach_prefix(self._installed, prefix_tokens)
        return self._installed

    def take(self, variant: Variant, prefix_tokens: list[int]) -> PreTrainedModel:
        """The converted model as a variant of it, behind the prefix of `prefix_tokens`."""
        model = self.transparent(prefix_tokens, variant.change)
        if variant.occupants:
            conversion.occupy(model, variant.occupants)
        return model

    def neurons(self, tables: Mapping[str, PhaseTable]) -> dict[str, Slot]:
        """The neurons of `tables`, by site name."""
        return conversion.neurons(tables, amplitude=self.amplitude, compiled=self.hardware.fused)

    def spiking(self, tables: Mapping[str, PhaseTable], prefix_tokens: list[int], change: WeightChange | None = None) -> PreTrainedModel:
        """The converted model with the neurons of `tables`, by site name; the rest as in `transparent`."""
        return self.take(Variant(occupants=self.neurons(tables), change=change), prefix_tokens)

    def release(self) -> None:
        """Drop the converted model, so that another fits into memory."""
        self._installed = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _install(self) -> PreTrainedModel:
        model, parts, kind = self.ann(), self.rotation.acting, self.rotation.kind
        if kind is RotationKind.none and self.rotation.parts != list(RotationPart):
            log.warning("rotation.parts=[%s] has no effect with rotation.kind=none", ",".join(self.rotation.parts))
        if self.rotation.seed and RotationPart.R1 not in parts:
            log.warning("rotation.seed=%d has no effect without R1", self.rotation.seed)
        seed, after = self.rotation.seed if kind is RotationKind.hadamard else None, self.softmax_norm is SoftmaxNorm.after
        try:
            if self.keeping is not None and self.offloaded and seed is not None:
                what = {"code": ROTATED.key(), "rotation": {"seed": seed, "parts": [str(part) for part in parts]}}
                rotate(model, seed=seed, parts=parts, keep=self.keeping(what))
                conversion.install(model, rotated=parts, normalise_after=after, query_block=self.hardware.query_block)
            else:
                conversion.prepare(model, rotation_seed=seed, parts=parts, normalise_after=after, query_block=self.hardware.query_block)
        except FloatingPointError as error:
            raise InputError(f"model.path={self.model.path}: {error}; {CURE}") from error
        except ValueError as error:
            raise InputError(f"model={self.model.name}, model.path={self.model.path}: {error}") from error
        if seed is not None:
            taken = ", ".join(f"{part} {' + '.join(map(str, found))}" for part, found in orders(model.config, parts).items())
            on_cpu = "sums and differences" if native.library() is not None else "matrix products"
            on_cuda = "fast-hadamard-transform" if HAS_CUDA_KERNEL else "matrix products"
            way = on_cpu if model.device.type == "cpu" else on_cuda
            log.info("rotation: Hadamard matrices of order %s; online transforms by %s", taken or "none", way)
        return model


class SavedNetworks:
    """The networks that a saved spiking model holds. Each call gives the one model its state."""

    def __init__(self, model: ModelConfig, hardware: HardwareConfig) -> None:
        self.model, self.hardware = model, hardware
        self._loaded: PreTrainedModel | None = None
        self._tables: dict[str, PhaseTable] = {}
        self._amplitude = Amplitude.static

    @property
    def tables(self) -> dict[str, PhaseTable]:
        """The codes by site name."""
        self._load()
        return self._tables

    def spiking(self) -> PreTrainedModel:
        """The model as it was saved."""
        model = self._load()
        conversion.fill(model, self._tables, amplitude=self._amplitude, compiled=self.hardware.fused)
        return model

    def transparent(self) -> PreTrainedModel:
        """The same weights behind the same prefix, without neurons."""
        model = self._load()
        conversion.clear(model)
        return model

    def _load(self) -> PreTrainedModel:
        if self._loaded is None:
            self._loaded = load_spiking(self.model, self.hardware)
            self._tables, self._amplitude = conversion.tables(self._loaded), conversion.common_amplitude(self._loaded)
        return self._loaded
