"""Which networks are measured: what each one's figures depend on, how it is built, how its perplexity is taken.

snn          the fitted codes, folded or step by step
base2        base-2 phase coding of the same T
int_static   integers of T + 1 bits in the neurons' places, each group's step fitted to the calibration text
int_token    the same with levels of each token's own
ann_prefix   the rotated model without neurons, behind the spiking networks' prefix
ann          the model as it was pretrained
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from spikellm.calibration.calibrate import Calibration
from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.neuron import Slot
from spikellm.config.choices import Execution
from spikellm.config.labels import NetworkName
from spikellm.config.snn import SpikingConfig
from spikellm.evaluation.batches import sequences
from spikellm.evaluation.figures import Measurement, Network, folded_perplexity
from spikellm.evaluation.networks import Networks, SavedNetworks, Variant
from spikellm.evaluation.perplexity import readout_perplexities
from spikellm.evaluation.side_by_side import SideBySide
from spikellm.execution.memory import fitting_chunk
from spikellm.execution.modules import neuron_of
from spikellm.execution.stepped import stepped
from spikellm.model.integers import Rounding
from spikellm.model.passage import Passes
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.replaced import ReplacedWeights
from spikellm.model.sites import FINAL_NORM, HEAD
from spikellm.search.fit import CodeFit
from spikellm.search.integers import static_quantizers, token_quantizers
from spikellm.search.options import Options
from spikellm.search.search import base2
from spikellm.store.provenance import Code

log = logging.getLogger(__name__)

FOLDED = Code(1, ("evaluation.networks", "evaluation.side_by_side"))
STEPPED = Code(2, ("evaluation.networks", "evaluation.figures", "execution.memory", "execution.stepped"))
INTEGER = Code(1, ("evaluation.networks", "evaluation.side_by_side", "search.integers"))
BASE2 = Code(1, ("evaluation.networks", "evaluation.side_by_side", "search.search"))
PRETRAINED = Code(1, ("model.load", "evaluation.figures"))


def measured_networks(
    names: Collection[NetworkName],
    models: Networks,
    options: Options,
    keys: Mapping[str, object],
    calibration: Callable[[], Calibration],
    fits: Callable[[], dict[str, CodeFit]],
    rounding: Callable[[], Rounding | None] = lambda: None,
    replaced: Callable[[], ReplacedWeights | None] = lambda: None,
) -> list[Network]:
    """The networks of a job, that of the ANN last: the others share the converted model, which then makes room for it.

    Args:
        names: of those that are wanted.
        models: builds them.
        options: of the codes; T, execution.
        keys: stand for `model`, `calibrate` and `search` in what figures depend on, for `tune` and `compensate` where these act, for
            `weights` where integers are found by codes.
        calibration, fits, rounding, replaced: called no earlier than a figure is missing; the weights of the spiking networks, replaced
            ones of `snn` alone, `ann_prefix` has its own.
    """
    weights = {key: value for key, value in keys.items() if key == "weights"}
    taught = {key: value for key, value in keys.items() if key in ("tune", "compensate")}
    device = {"device": models.hardware.device.value}
    snn = options.snn
    execution, measure = executed(snn)

    def prefix() -> list[int]:
        return calibration().prefix_tokens

    def spiking(codes: Callable[[], dict[str, CodeFit]], own: Callable[[], ReplacedWeights | None] = lambda: None) -> Variant:
        tables = {name: fit.table for name, fit in codes().items()}
        return Variant(occupants=models.neurons(tables), change=rounding() or own())

    def integer(quantizers: Callable[[Mapping[str, SiteStatistics], Options], dict[str, Slot]]) -> Variant:
        return Variant(occupants=quantizers(calibration().statistics, options))

    variants: dict[NetworkName, Callable[[], Variant]] = {
        NetworkName.snn: partial(spiking, fits, replaced),
        NetworkName.base2: partial(spiking, lambda: base2(calibration().statistics, options)),
        NetworkName.int_static: partial(integer, static_quantizers),
        NetworkName.int_token: partial(integer, token_quantizers),
        NetworkName.ann_prefix: lambda: Variant(occupants={}),
    }
    side_by_side = SideBySide(models, prefix, variants)

    def network(name: NetworkName, inputs: dict[str, object], measure: Callable[..., Measurement] = folded_perplexity) -> Network:
        return Network(
            name=name,
            inputs=device | inputs,
            build=partial(side_by_side.build, name),
            prefix_tokens=prefix,
            measure=measure,
            together=side_by_side if measure is folded_perplexity else None,
        )

    integers = {"code": INTEGER.key(), "calibrate": keys["calibrate"], "T": options.T, "groups": options.search.groups.value}
    known = [
        network(NetworkName.snn, taught | weights | execution | {"search": keys["search"]}, measure),
        network(NetworkName.base2, weights | {"code": BASE2.key(), "calibrate": keys["calibrate"], "T": options.T}),
        network(NetworkName.int_static, integers),
        network(NetworkName.int_token, integers),
        network(NetworkName.ann_prefix, {"code": FOLDED.key(), "calibrate": keys["calibrate"]}),
        Network(
            name=NetworkName.ann,
            inputs=device | {"code": PRETRAINED.key(), "model": keys["model"]},
            build=models.ann,
            prefix_tokens=list,
        ),
    ]
    return [network for network in known if network.name in names]


def saved_networks(
    names: Collection[NetworkName],
    models: SavedNetworks,
    snn: SpikingConfig,
    source: Mapping[str, object],
    prefix_tokens: list[int],
) -> list[Network]:
    """The networks of a job that measures a saved model: `snn` and `ann_prefix`.

    Args:
        names: of those that are wanted.
        models: gives them.
        snn: how they are run.
        source: fingerprint of the folder.
        prefix_tokens: stand before every sequence by themselves.
    """
    keys = {"device": models.hardware.device.value, "model": source}
    execution, measure = executed(snn)
    known = [
        Network(
            name=NetworkName.snn,
            inputs=keys | execution,
            build=models.spiking,
            prefix_tokens=lambda: prefix_tokens,
            measure=measure,
        ),
        Network(
            name=NetworkName.ann_prefix,
            inputs=keys | {"code": FOLDED.key()},
            build=models.transparent,
            prefix_tokens=lambda: prefix_tokens,
        ),
    ]
    return [network for network in known if network.name in names]


def executed(snn: SpikingConfig) -> tuple[dict[str, object], Callable[..., Measurement]]:
    """How figures of a spiking network are taken, folded or step by step: what their keys hold of it, and the perplexity."""
    is_stepped = snn.execution is Execution.stepped
    measure = partial(stepped_perplexity, chunk=snn.step_chunk, max_gib=snn.max_memory_gib) if is_stepped else folded_perplexity
    return {"code": (STEPPED if is_stepped else FOLDED).key(), "execution": snn.execution.value}, measure


def stepped_perplexity(
    model: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    label: str,
    passes: Passes,
    batch_size: int | None,
    *,
    chunk: int | None,
    max_gib: float | None,
) -> Measurement:
    """Perplexity with spikes step by step, and as `anytime` what the logits give after 1 .. T steps.

    Args:
        passes: where losses of windows are kept, and hidden states.
        batch_size: windows of a forward; None: see `batches.sequences`.
        chunk: time steps per matrix product, at most; None: all.
        max_gib: bound on weights and activations that lowers it; None: none [GiB].

    Raises:
        InputError: a single step does not fit into `max_gib`.
    """
    length = windows.shape[1]
    if batch_size is None:  # a bound on memory is for as many steps a product as can be
        batch_size = 1 if max_gib is not None else sequences(model, length * neuron_of(model.get_submodule(FINAL_NORM)).table.T)
    chunk = fitting_chunk(model, min(batch_size, len(windows)) * length, chunk=chunk, max_gib=max_gib)
    log.info("stepped execution: %d time steps per matrix product", chunk)
    with stepped(model, chunk=chunk):
        readouts: Any = model.get_submodule(HEAD)
        curve = readout_perplexities(
            model, windows, readouts=readouts.readouts, label=f"{label}, stepped", batch_size=batch_size, passes=passes
        )
    return Measurement(**asdict(curve[-1]), anytime=[point.value for point in curve])
