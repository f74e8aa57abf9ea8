"""Save a spiking model in transformers' format, and read it back with `AutoModelForCausalLM.from_pretrained`.

transformers lets other packages add "quantizers": code that changes a model's modules before the weights are read. Ours
gives the skeleton its slots, neurons and prefix buffers, of the shapes that the checkpoint's config records site by site; the tables
then arrive as buffers like any weight, and `generate` works as usual.

A reader that knows nothing of neurons must not take the weights for the pretrained model's. transformers itself would: it warns of an
unknown quantizer and goes on. Therefore config.json names a model type of its own, which no other program opens, and for who asks for
`LlamaForCausalLM` a file of weights that is none; either message says what to do. And a file that was changed since must not pass for
what was converted: checksums over flags, every site's table and the prefix stand in config.json and are compared on loading.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
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
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.coding.neuron import PhaseNeuron, PhaseTable
from spikellm.config.boundary import blamed_on, reason
from spikellm.config.checks import InputError
from spikellm.config.choices import Amplitude, RotationPart
from spikellm.kernels.encode import Digits
from spikellm.model.attention import attentions
from spikellm.model.conversion import common_amplitude, get_neuron, install, model_sites, online_parts, place, set_neuron
from spikellm.model.intake import unfilled
from spikellm.model.modules import OnlineHadamard
from spikellm.model.sites import ARCHITECTURES, EMBEDDING, GROUP_AXIS, LINEARS, ROTARY, SPIKING_TYPE, decoder_layers

METHOD = "spikellm"
SCHEMA = 4  # of `SpikingModelConfig`; raised when what is written no longer means the same
NOTICE = "none for a plain model: pip install spikellm, import spikellm, then AutoModelForCausalLM.from_pretrained"
CURE = "copy or convert it again"
EXECUTION = ("query_block", "compiled")  # how the network is computed, not which one it is: free to be edited


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """One site's neurons: the digits of a `PhaseTable`, its shape, and the sha256 of its rows and cuts."""

    T: int
    groups: int
    digits: Digits
    sha256: str

    @classmethod
    def of(cls, name: str, table: PhaseTable) -> Self:
        """What is recorded of `table`.

        Raises:
            ValueError: the neuron can send nothing or is never reset, or the table was rounded.
        """
        if table.theta.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: the table was rounded to {table.theta.dtype}; convert after model.to(..), not before it")
        for row in ("h", "d"):
            if not getattr(table, row).any():
                raise ValueError(f"{name}: {row} is 0 everywhere, which no code is")
        values = [*table.rows, *([] if table.cuts is None else [table.cuts])]
        return cls(T=table.T, groups=table.groups, digits=table.digits, sha256=digest(values))

    @classmethod
    def read(cls, place: str, found: Any) -> Self:
        """What `asdict` gave.

        Raises:
            InputError: it was changed since; the message names `place`.
        """
        _check_keys(place, cls, found)
        _check_keys(f"{place}.digits", Digits, found["digits"])
        try:
            digits = Digits(**found["digits"])
        except (ValueError, TypeError) as error:
            raise InputError(f"{place}.digits: {reason(error)}; {CURE}") from error
        return cls(**found | {"digits": digits})

    def empty(self) -> PhaseTable:
        """A table of this shape, to be filled; float64, which changes no value that a file can hold."""
        rows = torch.zeros(self.groups * self.digits.populations, self.T, dtype=torch.float64)
        ends = self.digits.intervals - 1
        cuts = rows.new_zeros(ends, self.groups * self.digits.sides) if ends else None
        return PhaseTable(rows, rows, rows, rows[:, 0], digits=self.digits, cuts=cuts)


@register_quantization_config(METHOD)
@dataclass(kw_only=True, repr=False)
class SpikingModelConfig(QuantizationConfigMixin):
    """What the modules of a saved spiking model look like: `quantization_config` of its config.json."""

    quant_method: Any = METHOD
    schema: int = SCHEMA
    rotated: list[str]  # which of R3 and R4 act online
    normalise_after: bool  # where the softmax is normalised
    amplitude: str = Amplitude.static.value  # of the neurons that Linears read; left out where it is static, as in older files
    prefix_length: int  # P
    prefix_sha256: str | None  # of the prefix's keys and values, layer by layer
    rotary_dtype: str  # of RoPE's frequencies, which no checkpoint holds: model.to(bfloat16) rounds them, from_pretrained does not
    rotation: dict[str, object] | None = None  # kind, seed, parts and hash of the rotation, where the caller of `save` knows them
    sites: dict[str, SiteRecord]  # by name
    query_block: int  # queries per block of attention [tokens]
    compiled: bool  # neurons run fused
    sha256: str = ""  # of everything here, but for EXECUTION

    def __post_init__(self) -> None:
        self.sha256 = self.sha256 or self.checksum()

    def checksum(self) -> str:
        """sha256 of all fields that decide which network this is."""
        content = {key: value for key, value in self.to_dict().items() if key not in (*EXECUTION, "sha256")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """In JSON types, as transformers asks for it."""
        found = asdict(self)
        return found if found.pop("amplitude") == Amplitude.static.value else found | {"amplitude": self.amplitude}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *_: object, **__: object) -> Self:
        """What `to_dict` gave.

        Raises:
            InputError: written by another version, or changed since.
        """
        place = "config.json, quantization_config"
        if (schema := config_dict.get("schema")) != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            cure = "update spikellm" if newer else "convert again"
            raise InputError(f"{place}: schema={schema}, this version reads {SCHEMA}; {cure}")
        config_dict = {"amplitude": Amplitude.static.value} | config_dict
        _check_keys(place, cls, config_dict)
        sites = {}
        for name, record in config_dict["sites"].items():
            sites[name] = SiteRecord.read(f"{place}.sites.{name}", record)
        config = cls(**config_dict | {"sites": sites})
        if config.sha256 != config.checksum():
            raise InputError(f"{place}: does not match its checksum, the file was changed; {CURE}")
        return config


def _check_keys(place: str, kind: type, found: object) -> None:
    wanted = {field.name for field in fields(kind)}
    if not isinstance(found, dict):
        raise InputError(f"{place}: is no table of {', '.join(sorted(wanted))}; {CURE}")
    if unknown := sorted(set(found) - wanted):
        raise InputError(f"{place}: unknown key {unknown[0]!r}; {CURE}")
    if missing := sorted(wanted - set(found)):
        raise InputError(f"{place}: {missing[0]!r} is missing; {CURE}")


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of shapes and values, in whatever floating dtype they are held."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes())
    return found.hexdigest()


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
        """From config.json, without the notice that `to_dict` adds."""
        return super().from_dict({key: value for key, value in config_dict.items() if key != "transformers_weights"}, **options)

    def to_dict(self) -> dict[str, object]:
        """For config.json, with the notice for who takes the checkpoint for the plain architecture's."""
        return super().to_dict() | {"transformers_weights": NOTICE}


class SpikingModel(PreTrainedModel):
    """Mixed into an architecture's model: a checkpoint fills it or is refused, and it is saved as what it is."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """The model with its neurons, as transformers' own; every weight finds its place or none is taken.

        Raises:
            InputError: the checkpoint does not fill the model.
        """
        place = str(arguments[0] if arguments else options.get("pretrained_model_name_or_path"))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        load: Any = super().from_pretrained
        try:
            with blamed_on(place, CURE):
                found = load(*arguments, **options)
        except InputError as error:
            if place in str(error):
                raise
            raise InputError(f"{place}: {error}") from error  # from where the folder is not known
        if lost := unfilled(found[1]):
            raise InputError(f"{place}: {lost}; {CURE}")
        return found if output_loading_info else found[0]

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """Save weights, neurons and the description of both, as transformers' own."""
        known = getattr(self.config, "quantization_config", None)
        self.config.quantization_config = described(self, rotation=known and known.rotation)
        super().save_pretrained(save_directory, *arguments, **options)


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


def described(model: PreTrainedModel, *, rotation: dict[str, object] | None = None) -> SpikingModelConfig:
    """What is recorded of a converted model.

    Raises:
        ValueError: a site carries no neuron or one that codes nothing, or layers differ.
    """
    neurons = {site.name: get_neuron(model, site) for site in model_sites(model)}
    bare = [name for name, neuron in neurons.items() if type(neuron) is not PhaseNeuron]
    if bare:
        raise ValueError(f"{len(bare)} sites carry no neuron, {bare[0]} first: convert the model (outside `stepped`) before saving it")
    tables: dict[str, Any] = {name: neuron.table for name, neuron in neurons.items()}
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
    some: Any = next(iter(neurons.values()))
    return SpikingModelConfig(
        rotated=list(rotated),
        normalise_after=normalise_after,
        amplitude=common_amplitude(model).value,
        prefix_length=prefix_length,
        prefix_sha256=prefix_digest(model),
        rotary_dtype=str(next(model.get_submodule(ROTARY).buffers()).dtype).removeprefix("torch."),
        rotation=rotation,
        sites={name: SiteRecord.of(name, table) for name, table in tables.items()},
        query_block=attentions(model)[0].query_block,
        compiled=some.compiled,
    )


def save(model: PreTrainedModel, folder: Path, *, rotation: dict[str, object] | None = None) -> None:
    """Write a converted model to `folder`: weights, tables, prefix, config. The model itself stays as it is.

    Args:
        rotation: kind, seed, parts and hash of the rotation, to be recorded.

    Raises:
        ValueError: a site carries no neuron or one that codes nothing, or layers differ.
    """
    kind = MODELS[model.config.model_type.removesuffix(SPIKING_TYPE)]
    twin = kind.__new__(kind)  # the same modules under another config and name
    config_class: Any = kind.config_class
    vars(twin).update(vars(model), config=config_class.from_dict(model.config.to_dict()))
    vars(twin).pop("save_pretrained", None)  # its class knows how
    twin.config.quantization_config = described(model, rotation=rotation)
    twin.save_pretrained(folder)


def load(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A saved spiking model, ready to be called, and its tokenizer.

    Args:
        folder: where it was saved.
        options: of transformers' `from_pretrained`, as `dtype`, `device_map`.

    Returns:
        The model, and the tokenizer; None where the folder has none.

    Raises:
        InputError: there is no such folder, it holds another kind of model, or it was changed since.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise InputError(f"{place}: no such folder; name one that a spiking model was saved in")
    with blamed_on(str(place), CURE):
        config = AutoConfig.from_pretrained(place)
    if not isinstance(config, SpikingConfig):
        raise InputError(f"{place}: holds a {config.model_type} model without neurons; spikellm.convert puts them in")
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    tokenizer = None
    if (place / "tokenizer_config.json").is_file():
        with blamed_on(f"{place}, tokenizer", CURE):
            tokenizer = AutoTokenizer.from_pretrained(place)
    return model, tokenizer
