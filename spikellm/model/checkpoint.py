"""Save a spiking model in transformers' format, and read it back with `AutoModelForCausalLM.from_pretrained`.

transformers lets other packages add "quantizers": code that changes a model's modules before the weights are read. Ours
gives the skeleton its slots, neurons and prefix buffers, of the shapes that the checkpoint's config records site by site; the tables
then arrive as buffers like any weight, and `generate` works as usual.

A reader that knows nothing of neurons must not take the weights for the pretrained model's. transformers itself would: it warns of an
unknown quantizer and goes on. Therefore config.json names a model type of its own, which no other program opens, and for who asks for
`LlamaForCausalLM` a file of weights that is none; either message says what to do. Programs that import nothing for anybody, as lm-eval's
command, open the folder by the hub's way for models with code of their own: `trust_remote_code=True` runs `spiking.py`, which lies in
the folder and imports this package.

A file that was changed since is refused, see `store/saved.py` and `description.py`.
"""

from copy import deepcopy
from pathlib import Path
from shutil import copymode
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils import cached_file

from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.config.boundary import blamed_on, reason
from spikellm.config.checks import InputError
from spikellm.config.choices import Amplitude, RotationPart
from spikellm.model import shards  # a name out of it would not be there yet: see `registration.py`
from spikellm.model.attention import attentions
from spikellm.model.conversion import common_amplitude, get_neuron, install, model_sites, online_parts, place, set_neuron, tables
from spikellm.model.description import SiteRecord, SpikingModelConfig, digest
from spikellm.model.intake import unfilled
from spikellm.model.modules import OnlineHadamard
from spikellm.model.offload import is_offloaded
from spikellm.model.sites import ARCHITECTURES, EMBEDDING, GROUP_AXIS, LINEARS, ROTARY, SPIKING_TYPE, decoder_layers
from spikellm.store.artifacts import write_text
from spikellm.store.saved import CONFIG, CURE, MANIFEST, METHOD, TOKENIZER, Provenance, check, seal, sealed

NOTICE = "none for a plain model: pip install spikellm, import spikellm, then AutoModelForCausalLM.from_pretrained"
CODE = "spiking.py"
HUB = ("revision", "token", "cache_dir", "local_files_only")  # of from_pretrained: which files of the hub are meant
SHARD = "2GB"  # at most: shards are hashed side by side


@register_quantizer(METHOD)
class SpikingModelQuantizer(HfQuantizer):
    """Rebuilds the modules of a saved spiking model around its weights."""

    requires_calibration = True
    quantization_config: SpikingModelConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        config = self.quantization_config
        rotated = [RotationPart(part) for part in config.rotated]
        install(model, rotated=rotated, normalise_after=config.normalise_after, query_block=config.query_block)
        del vars(model)["save_pretrained"]  # its class knows how
        places = model_sites(model)
        if {site.name for site in places} != set(config.sites):
            raise InputError(f"{model.config.name_or_path}: tables of {len(config.sites)} sites for a model of {len(places)}; {CURE}")
        for site in places:
            set_neuron(model, site, PhaseNeuron(config.sites[site.name].empty(), axis=GROUP_AXIS[site.kind], compiled=config.compiled))
        if config.prefix_length:
            for attention in attentions(model):
                empty = torch.empty(
                    model.config.num_key_value_heads, config.prefix_length, attention.head_width, dtype=torch.float64, device="meta"
                )
                attention.set_prefix(empty, empty)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        config, folder = self.quantization_config, model.config.name_or_path
        for site in model_sites(model):
            neuron: Any = get_neuron(model, site)
            record = config.sites[site.name]
            try:
                table = PhaseTable(neuron.theta, neuron.h, neuron.d, neuron.v0, digits=neuron.digits, cuts=neuron.cuts)
                intact = SiteRecord.of(site.name, table) == record
            except (ValueError, TypeError) as error:
                raise InputError(f"{folder}, weights: {site.name}: {reason(error)}; {CURE}") from error
            if not intact:
                raise InputError(f"{folder}, weights: {site.name}: the table does not match its checksum, the file was changed; {CURE}")
            place(model, site, table, amplitude=Amplitude(config.amplitude), compiled=config.compiled)
        if prefix_digest(model) != config.prefix_sha256:
            raise InputError(f"{folder}, weights: the prefix does not match its checksum, the file was changed; {CURE}")
        for attention in attentions(model):
            if attention.prefix_key is not None and attention.prefix_value is not None:
                attention.set_prefix(attention.prefix_key.to(attention.dtype), attention.prefix_value.to(attention.dtype))
        for module in model.modules():
            if isinstance(module, OnlineHadamard):
                module.reset()
        rotary = model.get_submodule(ROTARY)
        for name, buffer in rotary.named_buffers():
            rotary.register_buffer(name, buffer.to(getattr(torch, config.rotary_dtype)), persistent=False)
        return model

    def is_serializable(self) -> bool:
        """Yes: the model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: spikes have no derivative."""
        return False


class SpikingConfig(PreTrainedConfig):
    """Mixed into an architecture's config: its own model type, and no file of weights for who takes it for the plain one."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **options: Any) -> Any:
        """From config.json, without what `to_dict` adds."""
        added = ("transformers_weights", "auto_map")
        return super().from_dict({key: value for key, value in config_dict.items() if key not in added}, **options)

    def to_dict(self) -> dict[str, object]:
        """For config.json, with the notice for who takes the checkpoint for the plain architecture's, and the way to the code."""
        return super().to_dict() | {"transformers_weights": NOTICE, "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.Config"}}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the code is this package, of which transformers would copy a file into the folder of a model that is saved again."""


class SpikingModel(PreTrainedModel):
    """Mixed into an architecture's model: a checkpoint fills it or is refused, and it is saved as what it is."""

    @classmethod
    def from_pretrained(
        cls,
        *arguments: Any,
        verify: bool = True,
        compiled: bool | None = None,
        query_block: int | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The model with its neurons, as transformers' own; every weight finds its place or none is taken.

        Args:
            verify: hash all files beforehand, a second or two for each GB and core; else their sizes are compared, and all tables.
            compiled: neurons run fused; None: as when it was saved.
            query_block: queries per block of attention; None: as when it was saved [tokens].

        Raises:
            InputError: the files are not those that were saved, or do not fill the model.
        """
        name = str(arguments[0] if arguments else options.get("pretrained_model_name_or_path"))
        if Path(name).is_dir():
            check(Path(name), verify=verify)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        load: Any = super().from_pretrained
        try:
            with blamed_on(name, CURE):
                found = load(*arguments, **options)
        except InputError as error:
            if name in str(error):
                raise
            raise InputError(f"{name}: {error}") from error  # from where the folder is not known
        if lost := unfilled(found[1]):
            raise InputError(f"{name}: {lost}; {CURE}")
        if not Path(name).is_dir():  # from the hub: now its files are here
            check(_fetched(name, options), verify=verify, whole=False)
        model = found[0]
        for attention in attentions(model):
            attention.query_block = query_block or attention.query_block
        for site in model_sites(model):
            neuron: Any = get_neuron(model, site)
            neuron.compiled = neuron.compiled if compiled is None else compiled
        return found if output_loading_info else model

    def half(self, *_: object) -> Any:
        """Weights in float16, which transformers refuses for whatever a quantizer has loaded; tables stay as they are."""
        return nn.Module.to(self, torch.float16)

    def float(self, *_: object) -> Any:
        """Weights in float32."""
        return nn.Module.to(self, torch.float32)

    def save_pretrained(self, save_directory: Any, *arguments: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Save weights, neurons and the description of both, as transformers' own.

        Raises:
            InputError: push_to_hub, which would send the files before they are whole.
        """
        if push_to_hub:
            raise InputError("save_pretrained(push_to_hub=True) leaves out what is written last: take model.push_to_hub(NAME)")
        known = getattr(self.config, "quantization_config", None)
        self.config.quantization_config = described(self, provenance=known and known.provenance)
        folder = Path(save_directory)
        if is_offloaded(self):  # transformers would want all weights at once
            super().save_pretrained(save_directory, *arguments, **options | {"state_dict": {}})
            shards.write_shards(self, folder)
        else:
            super().save_pretrained(save_directory, *arguments, **{"max_shard_size": SHARD} | options)
        write_text(folder / CODE, _code(type(self.config).__name__))
        for file in folder.glob("*.safetensors"):  # safetensors lets their owner alone read them
            copymode(folder / CONFIG, file)
        seal(folder)


def _fetched(name: str, options: dict[str, Any]) -> Path:
    """The folder of the local cache that holds the files of a model of the hub.

    Raises:
        InputError: it was not saved by this package.
    """
    with blamed_on(f"{name}, {MANIFEST}", CURE):
        found = cached_file(name, MANIFEST, **{key: options[key] for key in HUB if key in options})
    assert found is not None  # or it has raised
    return Path(found).parent


def _code(config: str) -> str:
    return f'''"""What trust_remote_code=True runs: it imports spikellm (pip install spikellm), which knows the format of this folder."""

from {__name__} import {config} as Config
'''


def _register(architecture: str) -> type[SpikingModel]:
    """Teach transformers the spiking kind of an architecture."""
    plain_config: Any = CONFIG_MAPPING[architecture]
    plain_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    kind = architecture + SPIKING_TYPE
    config = type(f"Spiking{plain_config.__name__}", (SpikingConfig, plain_config), {"model_type": kind, "__module__": __name__})
    model = type(f"Spiking{plain_model.__name__}", (SpikingModel, plain_model), {"config_class": config, "__module__": __name__})
    globals().update({config.__name__: config, model.__name__: model})  # where pickle looks for them
    AutoConfig.register(kind, config)
    AutoModelForCausalLM.register(config, model)
    return model


MODELS = {architecture: _register(architecture) for architecture in ARCHITECTURES}


def prefix_digest(model: PreTrainedModel) -> str | None:
    """sha256 of all layers' prefixes; None without."""
    found = [part for each in attentions(model) for part in (each.prefix_key, each.prefix_value) if part is not None]
    return digest(found) if found else None


def described(model: PreTrainedModel, *, provenance: dict[str, object] | None = None) -> SpikingModelConfig:
    """What is recorded of a converted model.

    Raises:
        ValueError: a site carries no neuron or one that codes nothing, or layers differ.
    """
    found = tables(model)
    weight: Any = model.get_submodule(EMBEDDING).weight
    linear: Any = decoder_layers(model)[0].get_submodule(LINEARS[0])
    if linear.weight.dtype is not weight.dtype:
        raise ValueError(
            f"integer weights are held in {linear.weight.dtype} beside {weight.dtype}, which loading would round them to; "
            "convert the model in float32 to save it"
        )
    layers = {
        (tuple(online_parts(layer)), each.normalise_after, 0 if each.prefix_key is None else each.prefix_key.shape[1])
        for layer, each in zip(decoder_layers(model), attentions(model), strict=True)
    }
    if len(layers) != 1:
        raise ValueError(f"layers differ in (rotated, normalise_after, prefix length): {sorted(layers)}; install them alike")
    rotated, normalise_after, prefix_length = layers.pop()
    some: Any = get_neuron(model, model_sites(model)[0])
    return SpikingModelConfig(
        rotated=list(rotated),
        normalise_after=normalise_after,
        amplitude=common_amplitude(model).value,
        prefix_length=prefix_length,
        prefix_sha256=prefix_digest(model),
        rotary_dtype=str(next(model.get_submodule(ROTARY).buffers()).dtype).removeprefix("torch."),
        provenance=provenance,
        sites={name: SiteRecord.of(name, table) for name, table in found.items()},
        query_block=attentions(model)[0].query_block,
        compiled=some.compiled,
    )


def save(
    model: PreTrainedModel, folder: Path, *, provenance: Provenance | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a converted model to `folder`: weights, tables, prefix, config. The model itself stays as it is.

    Args:
        provenance: how it was made, to be recorded.
        tokenizer: saved beside it, see `behind_prefix`.

    Raises:
        ValueError: a site carries no neuron or one that codes nothing, or layers differ.
    """
    kind = MODELS[model.config.model_type.removesuffix(SPIKING_TYPE)]
    twin = kind.__new__(kind)  # the same modules under another config and name
    config_class: Any = kind.config_class
    vars(twin).update(vars(model), config=config_class.from_dict(model.config.to_dict()))
    vars(twin).pop("save_pretrained", None)  # its class knows how
    twin.config.quantization_config = described(model, provenance=None if provenance is None else provenance.to_json())
    twin.save_pretrained(folder)
    if tokenizer is not None:
        own = behind_prefix(tokenizer, [] if provenance is None else provenance.prefix_tokens)
        seal(folder, [Path(file).name for file in own.save_pretrained(folder) if Path(file).is_file()])


def behind_prefix(tokenizer: PreTrainedTokenizerBase, prefix_tokens: list[int]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that has `prefix_tokens` before every sequence by itself: where BOS is among them, none is added to a text.

    A second BOS would pass the neurons with the massive activations that the prefix is there to keep from them.
    """
    bos: Any = tokenizer.bos_token_id
    if bos not in prefix_tokens or bos not in tokenizer("a").input_ids:
        return tokenizer
    own: Any = deepcopy(tokenizer)
    own.add_bos_token = False
    return own


def load(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A saved spiking model, ready to be called, and its tokenizer.

    Args:
        folder: where it was saved, or its name on the hub.
        options: of `SpikingModel.from_pretrained`: transformers' own, as `dtype`, `device_map`; `verify=False` hashes no files.

    Returns:
        The model, and the tokenizer; None where the folder has none.

    Raises:
        InputError: there is no such folder, it holds another kind of model, or it was changed since.
    """
    place = Path(folder).expanduser()
    name = str(place) if place.is_dir() else str(folder)
    cure = CURE if place.is_dir() else "there is no such folder; name one that a spiking model was saved in, or a model on the hub"
    asked = {key: options[key] for key in HUB if key in options}
    with blamed_on(name, cure):
        config = AutoConfig.from_pretrained(name, **asked)
    if not isinstance(config, SpikingConfig):
        raise InputError(f"{name}: holds a {config.model_type} model without neurons; spikellm.convert puts them in")
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    files = place if place.is_dir() else _fetched(name, options)
    if TOKENIZER not in sealed(files) and not (files / TOKENIZER).is_file():
        return model, None
    with blamed_on(f"{name}, tokenizer", CURE):
        return model, AutoTokenizer.from_pretrained(name, **asked)
