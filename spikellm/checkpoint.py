"""Save a spiking model in transformers' format, and read it back with `AutoModelForCausalLM.from_pretrained`.

transformers lets other packages add "quantizers": code that changes a model's modules before the weights are read. Ours
gives the skeleton its slots, neurons and prefix buffers, of the shapes that the checkpoint's config records; the tables
then arrive as buffers like any weight, and `generate` works as usual.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.attention import SpikingAttention
from spikellm.conversion import convert, get_neuron, install, model_sites
from spikellm.modules import OnlineHadamard
from spikellm.neuron import PhaseNeuron, PhaseTable
from spikellm.sites import LAYERS

METHOD = "spikellm"


@register_quantization_config(METHOD)
class SpikingModelConfig(QuantizationConfigMixin):
    """What the modules of a saved spiking model look like: `quantization_config` of its config.json.

    Args:
        rotated: R3 and R4 act online.
        normalise_after: where the softmax is normalised.
        T: time steps.
        groups: site name -> tables at the site.
        prefix_length: P.
        query_block: queries per block of attention [tokens].
        compiled: neurons run fused.
        max_spikes: bound on the spikes of a neuron, None without.
        two_sided: sites with tables for either sign.
        signed: digits may be negative.
    """

    def __init__(
        self,
        *,
        rotated: bool,
        normalise_after: bool,
        T: int,
        groups: dict[str, int],
        prefix_length: int,
        query_block: int,
        compiled: bool,
        max_spikes: int | None = None,
        two_sided: tuple[str, ...] | list[str] = (),
        signed: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.rotated, self.normalise_after, self.T, self.groups = rotated, normalise_after, T, groups
        self.prefix_length, self.query_block, self.compiled = prefix_length, query_block, compiled
        self.max_spikes, self.two_sided, self.signed = max_spikes, list(two_sided), signed


@register_quantizer(METHOD)
class SpikingModelQuantizer(HfQuantizer):
    """Rebuilds the modules of a saved spiking model around its weights."""

    requires_calibration = True
    quantization_config: SpikingModelConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        install(model, rotated=config.rotated, normalise_after=config.normalise_after, query_block=config.query_block)
        tables = {}
        for name, groups in config.groups.items():
            two_sided = name in config.two_sided
            rows = torch.zeros(groups * (1 + two_sided), config.T)
            tables[name] = PhaseTable(
                theta=rows,
                h=rows,
                d=rows,
                v0=rows[:, 0],
                max_spikes=config.max_spikes,
                two_sided=two_sided,
                signed=config.signed,
            )
        convert(model, tables, compiled=config.compiled)
        if config.prefix_length:
            for module in model.modules():
                if isinstance(module, SpikingAttention):
                    heads = model.config.num_key_value_heads
                    empty = torch.empty(heads, config.prefix_length, module.head_width, device="meta", dtype=module.dtype)
                    module.set_prefix(empty, empty)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, OnlineHadamard):
                module.reset()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a converted model to `folder`: weights, tables, prefix, config.

    Raises:
        ValueError: a site carries no neuron.
    """
    neurons = {site.name: get_neuron(model, site) for site in model_sites(model)}
    bare = [name for name, neuron in neurons.items() if not isinstance(neuron, PhaseNeuron)]
    if bare:
        raise ValueError(f"{len(bare)} sites carry no neuron, {bare[0]} first: convert the model before saving it")
    some = next(iter(neurons.values()))
    attention = model.get_submodule(f"{LAYERS}.0.self_attn.spiking")
    assert isinstance(some, PhaseNeuron)
    assert isinstance(attention, SpikingAttention)
    config = SpikingModelConfig(
        rotated=attention.rotation is not None,
        normalise_after=attention.normalise_after,
        T=some.table.T,
        groups={name: neuron.table.groups for name, neuron in neurons.items() if isinstance(neuron, PhaseNeuron)},
        prefix_length=0 if attention.prefix_key is None else attention.prefix_key.shape[1],
        query_block=attention.query_block,
        compiled=some.compiled,
        max_spikes=some.max_spikes,
        two_sided=[name for name, neuron in neurons.items() if isinstance(neuron, PhaseNeuron) and neuron.two_sided],
        signed=some.signed,
    )
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = SpikingModelQuantizer(config, pre_quantized=True)
    model.save_pretrained(folder)
